// Sampling a code from a row of logits, compiled once per instruction set.
#include "ops/sample_logits/kernel_table.h"
#include "shared/sample_row.h"

namespace rqk {
namespace RQK_CAPABILITY {

constexpr SampleLogitsKernels sample_logits_kernels = {
    .scratch_bytes = sample_scratch_bytes,
    .sample_row = sample_row,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
