// Threads around the arithmetic of cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/my_op/kernel_table.h"

namespace rqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

}  // namespace

// TODO(my_op): how the work is shared out. Nothing may be thrown inside parallel_for: the message would be lost.
void launch(const MyOpParams& p, void*) {
  const MyOpKernels& kernels = RQK_KERNEL_TABLE(my_op_kernels);
  torch::stable::parallel_for(0, p.elements, kElementsPerTask, [&p, &kernels](int64_t begin, int64_t end) {
    const KeepDenormals keep;
    kernels.multiply(p, begin, end);
  });
}

}  // namespace rqk
