// Residual search on a GPU: the direct form, all depths of a row in one block, float64 throughout.
//
// A group of eight threads computes one distance, thread j of it the definition's lane j, so that the sums round as the
// definition's do; 32 groups per block take the codes in turn. The residual stays in shared memory over all depths.
// Per row and depth it reads the codebook once (K*C*4 bytes, from L2) and does 3*K*C float64 operations.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/params.h"

namespace rqk {
namespace residual_search {

constexpr int kThreads = 256;
constexpr int64_t kMaxChannels = 8192;  // 32 KiB of the 48 KiB of shared memory that every launch may use
constexpr int kLanes = 8;
constexpr int kGroups = kThreads / kLanes;
constexpr unsigned kFullWarp = 0xffffffffu;

// Valid in lane 0 of each group. Every thread of the warp must call.
__device__ inline double sum_lanes(double lane) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    lane = __dadd_rn(lane, __shfl_down_sync(kFullWarp, lane, half, kLanes));
  }
  return lane;
}

// Lane j of |a - b|^2, or of |a|^2 where b is null.
__device__ inline double squared_lane(const float* a, const float* b, int64_t channels, int j) {
  double lane = 0;
  for (int64_t c = j; c < channels; c += kLanes) {
    const double difference = b == nullptr ? double(a[c]) : double(a[c]) - double(b[c]);
    lane = __dadd_rn(lane, __dmul_rn(difference, difference));
  }
  return lane;
}

// At least 4 blocks per multiprocessor, 64 registers: left to itself ptxas takes 48 on sm_90 and spills.
__global__ void __launch_bounds__(kThreads, 4) search_rows(ResidualSearchParams p) {
  CU_DYN_SMEM(float, residual);  // (channels)
  CU_SHARED(double, group_distance, [kGroups]);
  CU_SHARED(int64_t, group_code, [kGroups]);
  CU_SHARED(int64_t, chosen);
  const int group = threadIdx.x / kLanes, j = threadIdx.x % kLanes;
  const float nan = __int_as_float(0x7fffffff), inf = __int_as_float(0x7f800000);

  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
      residual[c] = p.x[row * p.channels + c];
      p.quantized[row * p.channels + c] = 0.0f;
    }
    __syncthreads();

    for (int64_t d = 0; d < p.depth; ++d) {
      const float* codebook = p.codebooks + d * p.codebook_stride;
      double nearest = inf;
      int64_t code = -1;
      // All groups of a warp go round equally often, since the shuffle needs every thread.
      for (int64_t first = 0; first < p.num_codes; first += kGroups) {
        const int64_t k = first + group < p.num_codes ? first + group : p.num_codes - 1;
        const double distance = sum_lanes(squared_lane(residual, codebook + k * p.channels, p.channels, j));
        // A distance that is not finite (a bad code, a bad row) never wins; k ascends, so equal distances keep the
        // lower index.
        if (distance < nearest) {
          nearest = distance;
          code = k;
        }
      }
      if (j == 0) {
        group_distance[group] = nearest;
        group_code[group] = code;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int g = 1; g < kGroups; ++g) {
          if (group_code[g] < 0) continue;
          if (code < 0 || group_distance[g] < nearest || (group_distance[g] == nearest && group_code[g] < code)) {
            nearest = group_distance[g];
            code = group_code[g];
          }
        }
        chosen = code;
        p.codes[row * p.depth + d] = code;
      }
      __syncthreads();
      const int64_t k = chosen;
      for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
        const float r = residual[c], e = k < 0 ? nan : codebook[k * p.channels + c];
        if (p.residuals != nullptr) p.residuals[(row * p.depth + d) * p.channels + c] = r;
        residual[c] = r - e;
        p.quantized[row * p.channels + c] += e;
      }
      __syncthreads();
      if (threadIdx.x < 32) {
        const double norm = sum_lanes(squared_lane(residual, nullptr, p.channels, j));
        if (threadIdx.x == 0) p.residual_norms[row * p.depth + d] = float(norm);
      }
      // The next row overwrites the residual; the next depth only reads it, and writes `chosen` behind a barrier.
      if (d + 1 == p.depth) __syncthreads();
    }
  }
}

}  // namespace residual_search
}  // namespace rqk
