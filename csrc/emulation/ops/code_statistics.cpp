#include "ops/code_statistics/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// x (n, c), codes (n), num_codes -> counts, sums
std::vector<Array> code_statistics(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 2), &codes = inputs.array(1, "<i8", 1);
  const int64_t k = inputs.number(2), c = x.shape[1];
  const DeviceBuffer x_device = to_device(x), codes_device = to_device(codes);
  const DeviceBuffer counts = device_array("<f4", {k}), sums = device_array("<f4", {k, c});

  CodeStatisticsParams p{};
  p.x = static_cast<const float*>(x_device.data());
  p.codes = static_cast<const int64_t*>(codes_device.data());
  p.rows = x.shape[0];
  p.channels = c;
  p.num_codes = k;
  p.counts = static_cast<float*>(counts.data());
  p.sums = static_cast<float*>(sums.data());
  launch(p, nullptr);
  return {to_host(counts, "<f4", {k}), to_host(sums, "<f4", {k, c})};
}

}  // namespace rqk::emulation
