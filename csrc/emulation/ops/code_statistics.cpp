#include "ops/code_statistics/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// x (n, 1 or d, c), codes (n, d), num_codes, codebooks: 1, or d for one per depth
//   -> counts (codebooks, num_codes), sums (codebooks, num_codes, c)
RQK_CASE(code_statistics) {
  const Array &x = inputs.array("x", "<f4", 3), &codes = inputs.array("codes", "<i8", 2);
  const int64_t k = inputs.integer("num_codes"), codebooks = inputs.integer("codebooks"), c = x.shape[2];
  const DeviceBuffer x_device = to_device(x), codes_device = to_device(codes);
  const DeviceBuffer counts = device_array("<f4", {codebooks, k}), sums = device_array("<f4", {codebooks, k, c});

  CodeStatisticsParams p{};
  p.x = x_device.as<const float>();
  p.codes = codes_device.as<const int64_t>();
  p.rows = codes.shape[0];
  p.depth = codes.shape[1];
  p.channels = c;
  p.num_codes = k;
  p.x_row_stride = x.shape[1] * c;
  p.x_depth_stride = x.shape[1] == p.depth ? c : 0;
  p.code_row_stride = p.depth;
  p.code_depth_stride = 1;
  p.codebooks = codebooks;
  p.counts = counts.as<float>();
  p.sums = sums.as<float>();
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p)));
  p.workspace = workspace.as<uint8_t>();
  launch(p, nullptr);
  return {to_host(counts, "<f4", {codebooks, k}), to_host(sums, "<f4", {codebooks, k, c})};
}

}  // namespace rqk::emulation
