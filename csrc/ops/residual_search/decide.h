// The decision between candidates, in the arithmetic of the definition. For cpu_simd.cpp.
#pragma once

#include "ops/residual_search/kernel_table.h"
#include "ops/residual_search/nearest.h"
#include "shared/exact.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// The largest difference of two exact half distances that the definition may order the other way round. `extent` is
// |r| + max|e|. Bound B1 (docs/bounds.md).
inline double decision_slack(double extent, int64_t channels) {
  return 1.1 * (double(channels) / 8 + 8) * 0x1p-53 * extent * extent;
}

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

// A lower bound of a score that was computed as `score` with an error of at most `error`, rounded down.
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

// Adds a candidate. Returns false, with a count of -1 from then on, if there is no room even after dropping those above
// `limit`.
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
