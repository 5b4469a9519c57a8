// What the scan's bound is made of: numbers rounded to bf16, and how far off each of them is.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/groups.cuh"

namespace rqk {
namespace residual_search {

constexpr double kLargest = 1e17;  // of vectors that are scanned: their products stay far inside float

// x as bf16, rounded to nearest even; a NaN becomes some number.
__device__ inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// A float not below `value`, which is not negative; 1e-44 stands for what denormals lose.
__device__ inline float round_up(double value) { return float(value + 1.2e-7 * value + 1e-44); }

// What flushing denormals can cost a sum over all channels, or a norm.
__device__ inline double denormal_loss(int64_t channels) { return 2.4e-38 * double(channels); }

// An mma of depth 16 adds its products and its addend with an error of at most 2^-18 of the sum of their magnitudes;
// times the number of them in a row, and a tenth for how the errors compound.
__device__ inline double accumulation_error(const Work& w) { return 1.1 * double(w.chunks * (kChunk / 16)) * 0x1p-18; }

// In bytes, where 16-byte unit u of row `row` stands in a chunk whose rows have four. The rows of an ldmatrix, eight in
// a row, lie in eight different sixteenths of 128 bytes: no bank conflicts.
__device__ inline int unit_offset(int row, int unit) { return row * (kChunk * 2) + ((unit ^ (row >> 1 & 3)) << 4); }

// A vector a - origin as the scan has it, by sums of squares in float.
struct Rounded {
  float squared;        // of a - origin, rounded to float
  float error_squared;  // of what bf16 makes of that
  bool finite;
};

// Eight channels of a, zeros past the last; as two vectors where they are one and lie so.
__device__ inline void load_unit(const float* a, int64_t unit, int64_t channels, float (&values)[8]) {
  const float* from = a + unit * 8;
  if (a != nullptr && unit * 8 + 8 <= channels && (reinterpret_cast<uintptr_t>(from) & 15) == 0) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = a != nullptr && unit * 8 + i < channels ? from[i] : 0.0f;
  }
}

// Writes a - origin (origin null for zero, else padded to whole chunks) in bf16 into its row of all chunks, `stride`
// bytes from one to the next: zeros in channels past the last, where it is not finite, and everywhere where a is null.
// By a group; the result is valid in all its lanes.
__device__ inline Rounded round_row(const float* a, const float* origin, int64_t channels, int64_t chunks, int row,
                                    uint8_t* chunk, int64_t stride) {
  constexpr int kUnits = kChunk / 8;  // of 16 bytes
  constexpr int kAtOnce = 4;          // so that as many reads are under way
  const float inf = __int_as_float(0x7f800000);
  const int64_t units = chunks * kUnits;
  Rounded sums{0, 0, true};
  for (int64_t first = lane_of_group(); first < units; first += kAtOnce * kLanes) {
    float values[kAtOnce][8];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) load_unit(a, first + u * kLanes, channels, values[u]);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t unit = first + u * kLanes;
      if (unit >= units) break;
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool real = a != nullptr && unit * 8 + i < channels;
        const float value = real && origin != nullptr ? values[u][i] - origin[unit * 8 + i] : values[u][i];
        const uint32_t bits = fabsf(value) < 3e38f ? bf16_bits(value) : 0;
        const float error = value - __uint_as_float(bits << 16);  // exact
        words[i / 2] |= bits << 16 * (i % 2);
        sums.squared += value * value;
        sums.error_squared += error * error;
        sums.finite = sums.finite && fabsf(value) < inf;
      }
      uint8_t* to = chunk + unit / kUnits * stride + unit_offset(row, int(unit % kUnits));
      *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
    }
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    sums.squared += __shfl_xor_sync(group_mask(), sums.squared, lanes, kLanes);
    sums.error_squared += __shfl_xor_sync(group_mask(), sums.error_squared, lanes, kLanes);
  }
  sums.finite = __ballot_sync(group_mask(), sums.finite) == group_mask();
  return sums;
}

// An upper bound of the length whose square was summed up in float: the sum of C/8 + 16 roundings is off by less than
// 1e-4 up to C = 13000, and 4e-23 stands for squares below the smallest denormal.
__device__ inline double length(float squared, int64_t channels) {
  return 1.0001 * sqrt(double(squared)) + 4e-23 * double(channels);
}

// Upper bounds of |a - origin| and of how far the row in bf16 is from it.
__device__ inline double rounded_norm(const Rounded& rounded, int64_t channels) {
  return length(rounded.squared, channels);
}
__device__ inline double rounded_error(const Rounded& rounded, int64_t channels) {
  return length(rounded.error_squared, channels) + 0x1p-23 * rounded_norm(rounded, channels) + denormal_loss(channels);
}

}  // namespace residual_search
}  // namespace rqk
