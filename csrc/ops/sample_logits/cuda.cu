// Launch of sample_logits on the current stream.
#include "common/launch.cuh"
#include "ops/sample_logits/kernel.cuh"

namespace rqk {

void launch(const SampleLogitsParams& p, void* stream) {
  launch_kernel("sample_logits", sample_logits::sample_rows, grid_for(p.rows), sample_logits::kThreads,
                sizeof(SampleShared<sample_logits::kThreads>), stream, p);
}

}  // namespace rqk
