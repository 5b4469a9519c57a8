// The arithmetic of the definition, on a GPU: float64, in a fixed summation order, never fused. Eight threads (a group)
// compute one sum, each of them one lane of the definition; the groups of a warp run independently.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace rqk {

constexpr int kLanes = 8;

// The mask of this thread's group within its warp.
__device__ inline unsigned group_mask() { return 0xffu << (threadIdx.x % 32 / kLanes * kLanes); }

// The sum of the eight lanes, folded three times, in every lane: addition commutes, so mirrored halves agree.
__device__ inline double sum_lanes(double lane) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    lane = __dadd_rn(lane, __shfl_xor_sync(group_mask(), lane, half, kLanes));
  }
  return lane;
}

// |a - b|^2, or |a|^2 if b is null. All threads of the group call.
__device__ inline double squared_distance(const float* a, const float* b, int64_t channels) {
  double lane = 0;
  for (int64_t c = threadIdx.x % kLanes; c < channels; c += kLanes) {
    const double difference = b == nullptr ? double(a[c]) : double(a[c]) - double(b[c]);
    lane = __dadd_rn(lane, __dmul_rn(difference, difference));
  }
  return sum_lanes(lane);
}

}  // namespace rqk
