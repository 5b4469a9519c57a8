// One code from a row of logits, compiled once per instruction set.
#include "common/sample_row.h"
#include "ops/sample_logits/sample.h"

namespace rqk {
namespace RQK_CAPABILITY {

extern const SampleLogitsKernel sample_logits_kernel;
const SampleLogitsKernel sample_logits_kernel = {sample_scratch_bytes, sample_row};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
