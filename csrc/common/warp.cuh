// Reductions and scans over the 32 lanes of a warp. All lanes must call.
#pragma once

#include "common/device.h"

namespace rqk {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over all lanes, in every lane.
template <class T>
__device__ inline T sum_of_warp(T value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

// The sum over this lane and all before it.
template <class T>
__device__ inline T scan_of_warp(T value) {
  const int lane = threadIdx.x % 32;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, lanes);
    if (lane >= lanes) value += before;
  }
  return value;
}

}  // namespace rqk
