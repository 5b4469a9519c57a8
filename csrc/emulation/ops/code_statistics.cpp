#include "ops/code_statistics/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// x (n, 1 or d, c), codes (n, d), num_codes, codebooks (1 or d) -> counts (codebooks, k), sums (codebooks, k, c)
std::vector<Array> code_statistics(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 3), &codes = inputs.array(1, "<i8", 2);
  const int64_t k = inputs.number(2), codebooks = inputs.number(3), c = x.shape[2];
  const DeviceBuffer x_device = to_device(x), codes_device = to_device(codes);
  const DeviceBuffer counts = device_array("<f4", {codebooks, k}), sums = device_array("<f4", {codebooks, k, c});

  CodeStatisticsParams p{};
  p.x = static_cast<const float*>(x_device.data());
  p.codes = static_cast<const int64_t*>(codes_device.data());
  p.rows = codes.shape[0];
  p.depth = codes.shape[1];
  p.channels = c;
  p.num_codes = k;
  p.x_row_stride = x.shape[1] * c;
  p.x_depth_stride = x.shape[1] == p.depth ? c : 0;
  p.code_row_stride = p.depth;
  p.code_depth_stride = 1;
  p.codebooks = codebooks;
  p.counts = static_cast<float*>(counts.data());
  p.sums = static_cast<float*>(sums.data());
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p)));
  p.workspace = static_cast<uint8_t*>(workspace.data());
  launch(p, nullptr);
  return {to_host(counts, "<f4", {codebooks, k}), to_host(sums, "<f4", {codebooks, k, c})};
}

}  // namespace rqk::emulation
