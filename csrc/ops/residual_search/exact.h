// The definition's arithmetic: float64, in its fixed summation order, never fused. For cpu_simd.cpp.
#pragma once

#include "common/simd.h"
#include "ops/residual_search/scan.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// Eight lanes, lane j adds terms j, j + 8, ...; then the lanes are halved three times. term(load) gives the next eight
// terms of arrays load(array).
template <class Term>
inline double lane_sum(int64_t channels, Term term) {
  Lanes8 sum = Lanes8::zero();
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) sum = sum + term([c](const float* p) { return Lanes8::load(p + c); });
  const int64_t left = channels - c;
  if (left > 0) sum = sum + term([c, left](const float* p) { return Lanes8::load_first(p + c, left); });
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

// How far two exact half distances can lie apart while the definition, whose sums carry a relative error of at most
// (C/8 + 8) 2^-53, still finds them the other way round. `extent` is |r| + max|e|.
inline double decision_slack(double extent, int64_t channels) {
  return 1.1 * (double(channels) / 8 + 8) * 0x1p-53 * extent * extent;
}

// A float that is not below `value`; 1e-44 stands for what denormals lose.
inline float round_up(double value) { return float(value + 1.2e-7 * __builtin_fabs(value) + 1e-44); }

// The nearest of the codes seen so far, which come in any order: an equal distance goes to the lower index.
struct Nearest {
  int64_t code = -1;
  double distance = 0;

  void see(const PackedCodebook& codebook, const float* r, int64_t k) {
    const double d = squared_distance(r, codebook.codes_kc + k * codebook.channels, codebook.channels);
    if (code >= 0 && !(d < distance || (d == distance && k < code))) return;
    distance = d;
    code = k;
  }
};

inline int64_t nearest_of_all(const PackedCodebook& codebook, const float* r) {
  Nearest nearest;
  for (int64_t k = 0; k < codebook.num_codes; ++k) nearest.see(codebook, r, k);
  return nearest.code;
}

inline int64_t nearest_of(const PackedCodebook& codebook, const float* r, const int32_t* codes, int64_t count) {
  if (count == 1) return codes[0];
  Nearest nearest;
  for (int64_t i = 0; i < count; ++i) nearest.see(codebook, r, codes[i]);
  return nearest.code;
}

// The least that a score can be which was computed as `score` and is off by at most `error`, rounded down.
inline float least_of(float score, float error) { return -round_up(double(error) - double(score)); }

inline void drop_above(Candidates& candidates, float limit) {
  if (candidates.count < 0) return;
  int32_t kept = 0;
  for (int32_t i = 0; i < candidates.count; ++i) {
    if (candidates.least[i] > limit) continue;
    candidates.code[kept] = candidates.code[i];
    candidates.least[kept++] = candidates.least[i];
  }
  candidates.count = kept;
}

// False, and the row given up, where there is no room even after dropping those above `limit`.
inline bool add(Candidates& candidates, int32_t code, float least, float limit) {
  if (candidates.count == Candidates::kCapacity) drop_above(candidates, limit);
  if (candidates.count == Candidates::kCapacity) {
    candidates.count = -1;
    return false;
  }
  candidates.code[candidates.count] = code;
  candidates.least[candidates.count++] = least;
  return true;
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
