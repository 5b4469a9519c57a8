// Launch of residual_decode on the current stream.
#include "common/launch.cuh"
#include "ops/residual_decode/kernel.cuh"

namespace rqk {

void launch(const ResidualDecodeParams& p, void* stream) {
  const int64_t blocks = (p.rows * p.channels + residual_decode::kThreads - 1) / residual_decode::kThreads;
  launch_kernel("residual_decode", residual_decode::decode, grid_for(blocks), residual_decode::kThreads, 0, stream, p);
}

}  // namespace rqk
