// The arithmetic by which codes are defined, on a GPU: float64, in one fixed summation order, never fused. A group of
// eight threads makes one sum, thread j of it the definition's lane j; groups of a warp go their own ways.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace rqk {

constexpr int kLanes = 8;

// The threads of this one's group within the warp.
__device__ inline unsigned group_mask() { return 0xffu << (threadIdx.x % 32 / kLanes * kLanes); }

// The eight lanes' sum by halves, in every lane: addition commutes, so the mirrored halves agree.
__device__ inline double sum_lanes(double lane) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    lane = __dadd_rn(lane, __shfl_xor_sync(group_mask(), lane, half, kLanes));
  }
  return lane;
}

// |a - b|^2, or |a|^2 where b is null; by a group.
__device__ inline double squared_distance(const float* a, const float* b, int64_t channels) {
  double lane = 0;
  for (int64_t c = threadIdx.x % kLanes; c < channels; c += kLanes) {
    const double difference = b == nullptr ? double(a[c]) : double(a[c]) - double(b[c]);
    lane = __dadd_rn(lane, __dmul_rn(difference, difference));
  }
  return sum_lanes(lane);
}

}  // namespace rqk
