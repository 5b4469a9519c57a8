// Sum of codes on the CPU: one gather and add per depth, bound by reading the codebook rows.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "ops/residual_decode/params.h"

namespace rqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

// Returns whether all of the row's codes were good.
bool decode_row(const ResidualDecodeParams& p, int64_t row) {
  float* sum = p.decoded + row * p.channels;
  std::fill(sum, sum + p.channels, 0.0f);
  for (int64_t d = 0; d < p.depth; ++d) {
    const int64_t code = p.codes[row * p.code_depth + d];
    if (code < 0 || code >= p.num_codes) {
      std::fill(sum, sum + p.channels, std::numeric_limits<float>::quiet_NaN());
      return false;
    }
    const float* e = p.codebooks + d * p.codebook_stride + code * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) sum[c] += e[c];
  }
  return true;
}

}  // namespace

void launch(const ResidualDecodeParams& p, void*) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / (p.channels * p.depth));
  torch::stable::parallel_for(0, p.rows, grain, [&p](int64_t begin, int64_t end) {
    bool good = true;
    for (int64_t row = begin; row < end; ++row) good &= decode_row(p, row);
    // Threads only ever store the same value.
    if (!good) __atomic_store_n(p.any_bad, 1, __ATOMIC_RELAXED);
  });
}

}  // namespace rqk
