// Groups of eight threads, one per lane of the definition: exact distances and the direct search.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/plan.h"
#include "shared/exact.cuh"

namespace rqk {
namespace residual_search {

static_assert(kMostGroups * kLanes == kGroupThreads);

__device__ inline int lane_of_group() { return threadIdx.x % kLanes; }

// The code of a candidate's bit, in thread `t` of a quad.
__device__ inline int32_t code_of(int32_t tile, int bit, int t) {
  return tile * kTileCodes + bit / 2 * 8 + 2 * t + bit % 2;
}

__device__ inline const float* codebook_at(const ResidualSearchParams& p, int64_t d) {
  return p.codebooks + d * p.codebook_stride;
}

// r_d; at the first depth x itself.
__device__ inline const float* residual_at(const ResidualSearchParams& p, const Work& w, int64_t d, int64_t row) {
  return (d == 0 ? p.x : w.residual) + row * p.channels;
}

// Subtracts code k (-1: none) from r_d and writes the results of this depth. All threads of the group call.
__device__ inline void take_code(const ResidualSearchParams& p, const Work& w, int64_t d, int64_t row, int64_t k) {
  constexpr int kAtOnce = 8;  // so that several reads are in flight, which may not pass the writes
  const float nan = __int_as_float(0x7fffffff);
  const float* r = residual_at(p, w, d, row);
  const float* e = codebook_at(p, d) + (k < 0 ? 0 : k) * p.channels;
  float* quantized = p.quantized + row * p.channels;
  double lane = 0;
  for (int64_t first = lane_of_group(); first < p.channels; first += kAtOnce * kLanes) {
    float from[kAtOnce], taken[kAtOnce], before[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t c = first + i * kLanes;
      const bool real = c < p.channels;
      from[i] = real ? r[c] : 0.0f;
      taken[i] = real && k >= 0 ? e[c] : nan;
      before[i] = real && d > 0 ? quantized[c] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t c = first + i * kLanes;
      if (c >= p.channels) continue;
      const float left = from[i] - taken[i];
      if (p.residuals != nullptr) p.residuals[(row * p.depth + d) * p.channels + c] = from[i];
      if (d + 1 < p.depth) w.residual[row * p.channels + c] = left;
      quantized[c] = before[i] + taken[i];
      lane = __dadd_rn(lane, __dmul_rn(double(left), double(left)));
    }
  }
  const double norm = sum_lanes(lane);
  if (lane_of_group() == 0) {
    p.codes[row * p.depth + d] = k;
    p.residual_sq_norms[row * p.depth + d] = float(norm);
  }
}

// The direct search: evaluates every code; the groups of the block take turns. The whole block calls; the result is
// valid in the first group. Reads the codebook once, from L2, and does 3 K C float64 operations.
__device__ inline int64_t nearest_of_all(const ResidualSearchParams& p, const float* r, const float* codebook,
                                         DirectRows& shared) {
  const int group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  double nearest = __int_as_float(0x7f800000);
  int64_t code = -1;
  for (int64_t k = group; k < p.num_codes; k += groups) {
    const double distance = squared_distance(r, codebook + k * p.channels, p.channels);
    // A distance that is not finite (a bad code) never wins. k ascends, so equal distances keep the lower index.
    if (distance < nearest) {
      nearest = distance;
      code = k;
    }
  }
  if (lane_of_group() == 0) {
    shared.distance[group] = nearest;
    shared.code[group] = code;
  }
  __syncthreads();
  if (group == 0) {
    for (int g = 1; g < groups; ++g) {
      const double distance = shared.distance[g];
      const int64_t other = shared.code[g];
      if (other < 0 || distance > nearest) continue;
      if (code < 0 || distance < nearest || other < code) {
        nearest = distance;
        code = other;
      }
    }
  }
  // The next row's distances overwrite those read here.
  __syncthreads();
  return code;
}

}  // namespace residual_search
}  // namespace rqk
