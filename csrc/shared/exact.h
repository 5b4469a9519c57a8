// The arithmetic of the definition: float64, in a fixed summation order, never fused. For files compiled once per
// instruction set.
#pragma once

#include "common/simd.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// Sums `channels` terms in eight lanes: lane j adds terms j, j + 8, ..., and the lanes are folded three times.
// term(load) returns the next eight terms, of arrays read by load(array).
template <class Term>
inline double lane_sum(int64_t channels, Term term) {
  Lanes8 sum = Lanes8::zero();
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) sum = sum + term([c](const float* p) { return Lanes8::load(p + c); });
  const int64_t left = channels - c;
  if (left > 0) sum = sum + term([c, left](const float* p) { return Lanes8::load_partial(p + c, left); });
  return sum.sum();
}

inline double squared_norm(const float* r, int64_t channels) {
  return lane_sum(channels, [r](auto load) { return load(r) * load(r); });
}

inline double squared_distance(const float* r, const float* e, int64_t channels) {
  return lane_sum(channels, [r, e](auto load) {
    const Lanes8 difference = load(r) - load(e);
    return difference * difference;
  });
}

// A float at least as large as `value`; 1e-44 covers what denormals lose.
inline float round_up(double value) { return float(value + 1.2e-7 * __builtin_fabs(value) + 1e-44); }

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
