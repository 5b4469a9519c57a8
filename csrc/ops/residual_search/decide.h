// The decision between candidates, in the definition's arithmetic. For cpu_simd.cpp.
#pragma once

#include "ops/residual_search/kernel_table.h"
#include "ops/residual_search/nearest.h"
#include "shared/exact.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// How far two exact half distances can lie apart while the definition, whose sums carry a relative error of at most
// (C/8 + 8) 2^-53, still finds them the other way round. `extent` is |r| + max|e|.
inline double decision_slack(double extent, int64_t channels) {
  return 1.1 * (double(channels) / 8 + 8) * 0x1p-53 * extent * extent;
}

// A float that is not below `value`; 1e-44 stands for what denormals lose.
inline float round_up(double value) { return float(value + 1.2e-7 * __builtin_fabs(value) + 1e-44); }

inline void see(Nearest& nearest, const PackedCodebook& codebook, const float* r, int64_t k) {
  nearest.update(k, squared_distance(r, codebook.codes_kc + k * codebook.channels, codebook.channels));
}

inline int64_t nearest_of_all(const PackedCodebook& codebook, const float* r) {
  Nearest nearest;
  for (int64_t k = 0; k < codebook.num_codes; ++k) see(nearest, codebook, r, k);
  return nearest.code;
}

inline int64_t nearest_of(const PackedCodebook& codebook, const float* r, const int32_t* codes, int64_t count) {
  if (count == 1) return codes[0];
  Nearest nearest;
  for (int64_t i = 0; i < count; ++i) see(nearest, codebook, r, codes[i]);
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
