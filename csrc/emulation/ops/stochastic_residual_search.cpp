#include "ops/stochastic_residual_search/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// x (n, c), codebooks (1 or depth, k, c), tau (1), depth, seed (64 bits), offset -> codes, quantized, residual_norms,
// residuals
std::vector<Array> stochastic_residual_search(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 2), &codebooks = inputs.array(1, "<f4", 3), &tau = inputs.array(2, "<f8", 1);
  const int64_t depth = inputs.number(3), n = x.shape[0], c = x.shape[1];
  const DeviceBuffer x_device = to_device(x), codebooks_device = to_device(codebooks);
  const DeviceBuffer codes = device_array("<i8", {n, depth}), quantized = device_array("<f4", {n, c});
  const DeviceBuffer norms = device_array("<f4", {n, depth}), residuals = device_array("<f4", {n, depth, c});

  StochasticResidualSearchParams p{};
  p.x = static_cast<const float*>(x_device.data());
  p.codebooks = static_cast<const float*>(codebooks_device.data());
  p.rows = n;
  p.channels = c;
  p.num_codes = codebooks.shape[1];
  p.depth = depth;
  p.codebook_stride = codebooks.shape[0] == 1 ? 0 : p.num_codes * c;
  std::memcpy(&p.tau, tau.data.data(), sizeof(p.tau));
  p.seed = static_cast<uint64_t>(inputs.number(4));
  p.offset = inputs.number(5);
  p.codes = static_cast<int64_t*>(codes.data());
  p.quantized = static_cast<float*>(quantized.data());
  p.residual_norms = static_cast<float*>(norms.data());
  p.residuals = static_cast<float*>(residuals.data());
  launch(p, nullptr);
  return {to_host(codes, "<i8", {n, depth}), to_host(quantized, "<f4", {n, c}), to_host(norms, "<f4", {n, depth}),
          to_host(residuals, "<f4", {n, depth, c})};
}

}  // namespace rqk::emulation
