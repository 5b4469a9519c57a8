// Launcher of the residual search on the current stream.
#include "common/launch.cuh"
#include "ops/residual_search/kernel.cuh"

namespace rqk {

void launch(const ResidualSearchParams& p, void* stream) {
  const size_t shared = static_cast<size_t>(p.channels) * sizeof(float);
  if (p.channels > residual_search::kMaxChannels) {
    throw std::invalid_argument("residual_search: on CUDA x may have at most " +
                                std::to_string(residual_search::kMaxChannels) + " channels, got " +
                                std::to_string(p.channels));
  }
  launch_kernel("residual_search", residual_search::search_rows, grid_for(p.rows), residual_search::kThreads, shared,
                stream, p);
}

}  // namespace rqk
