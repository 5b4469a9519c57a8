// Sum of codes on the CPU: each row's codebook rows are read once and its sum written once (cpu_simd.cpp).
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/residual_decode/kernel_table.h"

namespace rqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

DecodeRows decoder([[maybe_unused]] int64_t channels) {
#ifdef RQK_X86
  // Eight channels are one vector of AVX2. Half a vector of AVX-512 reaches, masked or not, into a second cache line.
  if (cpu_capability() == CpuCapability::kAvx512 && channels > 8) return avx512::decode_rows;
  if (cpu_capability() != CpuCapability::kDefault) return avx2::decode_rows;
#endif
  return default_::decode_rows;
}

}  // namespace

void launch(const ResidualDecodeParams& p, void*) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (p.channels * p.depth));
  const DecodeRows decode_rows = decoder(p.channels);
  torch::stable::parallel_for(0, p.rows, grain, [&p, decode_rows](int64_t begin, int64_t end) {
    const KeepDenormals keep;
    // Threads only ever store the same value.
    if (!decode_rows(p, begin, end)) __atomic_store_n(p.any_bad, 1, __ATOMIC_RELAXED);
  });
}

}  // namespace rqk
