#include "ops/stochastic_residual_search/params.h"

#include "emulation/residual_arrays.h"

namespace rqk::emulation {

// x (n, c), codebooks (1 or depth, k, c), tau (1), depth, seed (64 bits), offset -> codes, quantized,
// residual_sq_norms, residuals
std::vector<Array> stochastic_residual_search(const Inputs& inputs) {
  const Array& tau = inputs.array(2, "<f8", 1);
  StochasticResidualSearchParams p{};
  const ResidualArrays arrays(inputs.array(0, "<f4", 2), inputs.array(1, "<f4", 3), inputs.number(3), p);
  std::memcpy(&p.tau, tau.data.data(), sizeof(p.tau));
  p.seed = static_cast<uint64_t>(inputs.number(4));
  p.offset = inputs.number(5);
  launch(p, nullptr);
  return arrays.results();
}

}  // namespace rqk::emulation
