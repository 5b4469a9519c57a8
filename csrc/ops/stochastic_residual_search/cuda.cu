// Launch of stochastic_residual_search on the current stream.
#include "common/launch.cuh"
#include "ops/stochastic_residual_search/kernel.cuh"

namespace rqk {

void launch(const StochasticResidualSearchParams& p, void* stream) {
  const size_t shared = static_cast<size_t>(p.channels) * sizeof(float);
  if (p.channels > stochastic_residual_search::kMaxChannels) {
    throw std::invalid_argument("stochastic_residual_search: on CUDA x may have at most " +
                                std::to_string(stochastic_residual_search::kMaxChannels) + " channels, got " +
                                std::to_string(p.channels));
  }
  launch_kernel("stochastic_residual_search", stochastic_residual_search::sample_rows, grid_for(p.rows),
                stochastic_residual_search::kThreads, shared, stream, p);
}

}  // namespace rqk
