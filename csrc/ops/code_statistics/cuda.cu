// Launcher of the code statistics on the current stream.
#include "common/launch.cuh"
#include "ops/code_statistics/kernel.cuh"

namespace rqk {

void launch(const CodeStatisticsParams& p, void* stream) {
  launch_kernel("code_statistics", code_statistics::gather, grid_for(p.num_codes), code_statistics::kThreads, 0, stream,
                p);
}

}  // namespace rqk
