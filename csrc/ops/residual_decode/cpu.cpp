// Sum of codes on the CPU: reads each row's codebook rows once and writes its sum once (cpu_simd.cpp).
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/residual_decode/kernel_table.h"

namespace rqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

const ResidualDecodeKernels& kernels_for(int64_t channels) {
  // Up to eight channels fit an AVX2 vector. An AVX-512 access, masked or not, would reach into a second cache line.
  const CpuCapability most = channels > 8 ? CpuCapability::kAvx512 : CpuCapability::kAvx2;
  return RQK_KERNEL_TABLE_OF(std::min(cpu_capability(), most), residual_decode_kernels);
}

}  // namespace

void launch(const ResidualDecodeParams& p, void*) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (p.channels * p.depth));
  const ResidualDecodeKernels& kernels = kernels_for(p.channels);
  torch::stable::parallel_for(0, p.rows, grain, [&p, &kernels](int64_t begin, int64_t end) {
    const KeepDenormals keep;
    // All threads store the same value.
    if (!kernels.decode_rows(p, begin, end)) __atomic_store_n(p.any_bad, 1, __ATOMIC_RELAXED);
  });
}

}  // namespace rqk
