#include "ops/stochastic_residual_search/params.h"

#include "emulation/residual_arrays.h"

namespace rqk::emulation {

// x, codebooks, depth, tau, seed, offset -> codes, quantized, residual_sq_norms, residuals (see residual_arrays.h)
RQK_CASE(stochastic_residual_search) {
  StochasticResidualSearchParams p{};
  const ResidualArrays arrays(inputs, p);
  p.tau = inputs.number("tau");
  p.seed = inputs.bits("seed");
  p.offset = inputs.integer("offset");
  launch(p, nullptr);
  return arrays.results();
}

}  // namespace rqk::emulation
