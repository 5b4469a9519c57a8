// The arithmetic of my_op on the CPU, compiled once per instruction set.
#include "common/simd.h"
#include "ops/my_op/kernel_table.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// TODO(my_op): the arithmetic. Results must not depend on the level: sums run in a fixed order, and a multiply-add is
// fused on every level or on none.
void multiply(const MyOpParams& p, int64_t begin, int64_t end) {
  const Vec factor = Vec::fill(p.factor);
  int64_t i = begin;
  for (; i + Vec::kSize <= end; i += Vec::kSize) (factor * Vec::load(p.x + i)).store(p.y + i);
  for (; i < end; ++i) p.y[i] = p.factor * p.x[i];
}

}  // namespace

constexpr MyOpKernels my_op_kernels = {
    .multiply = multiply,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
