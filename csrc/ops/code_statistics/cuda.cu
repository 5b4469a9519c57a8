// Launcher of the code statistics on the current stream.
#include "common/launch.cuh"
#include "ops/code_statistics/kernel.cuh"

namespace rqk {

void launch(const CodeStatisticsParams& p, void* stream) {
  code_statistics::gather<<<grid_for(p.num_codes), code_statistics::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p);
  check_launch("code_statistics");
}

}  // namespace rqk
