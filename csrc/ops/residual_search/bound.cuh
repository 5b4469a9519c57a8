// Quantities of bounds B5 and B6 (docs/bounds.md): vectors rounded to bf16, and the errors of that.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/groups.cuh"

namespace rqk {
namespace residual_search {

constexpr double kLargest = 1e17;  // maximum norm of scanned vectors: their products stay far inside the range of
                                   // float32

// x as bf16, rounded to nearest even; NaN becomes an arbitrary number.
__device__ inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// A float at least as large as `value`, which must not be negative; 1e-44 covers what denormals lose.
__device__ inline float round_up(double value) { return float(value + 1.2e-7 * value + 1e-44); }

// An upper bound of what flushing denormals costs a sum over all channels, or a norm.
__device__ inline double denormal_loss(int64_t channels) { return 2.4e-38 * double(channels); }

// G of B5: the error of all mma of a sum, relative to the sum of magnitudes.
__device__ inline double accumulation_error(const Work& w) { return 1.1 * double(w.chunks * (kChunk / 16)) * 0x1p-18; }

// Byte offset of 16-byte unit u of row `row` in a chunk whose rows have four units. The eight rows of an ldmatrix lie
// in eight different sixteenths of 128 bytes: no bank conflicts.
__device__ inline int unit_offset(int row, int unit) { return row * (kChunk * 2) + ((unit ^ (row >> 1 & 3)) << 4); }

// Norms of a vector a - origin and of its rounding error, as sums of squares in float32.
struct Rounded {
  float squared;        // of a - origin, rounded to float
  float error_squared;  // of the difference between that and its bf16 value
  bool finite;
};

// Loads eight channels of a, zeros past the last; as two float4 if they are complete and aligned.
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

// Writes a - origin in bf16 to its row of all chunks, `stride` bytes apart (origin: null for zero, else padded to whole
// chunks). Writes zeros for channels past the last, for values that are not finite, and if a is null. All threads of
// the group call; the result is valid in all lanes.
__device__ inline Rounded round_row(const float* a, const float* origin, int64_t channels, int64_t chunks, int row,
                                    uint8_t* chunk, int64_t stride) {
  constexpr int kUnits = kChunk / 8;  // 16-byte units per chunk
  constexpr int kAtOnce = 4;          // so that several reads are in flight
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

// An upper bound of a norm whose square was summed in float32. The relative error of C/8 + 16 roundings is below 1e-4
// up to C = 13000; 4e-23 covers squares below the smallest denormal.
__device__ inline double length(float squared, int64_t channels) {
  return 1.0001 * sqrt(double(squared)) + 4e-23 * double(channels);
}

// Upper bounds of |a - origin| and of the error of its bf16 row.
__device__ inline double rounded_norm(const Rounded& rounded, int64_t channels) {
  return length(rounded.squared, channels);
}
__device__ inline double rounded_error(const Rounded& rounded, int64_t channels) {
  return length(rounded.error_squared, channels) + 0x1p-23 * rounded_norm(rounded, channels) + denormal_loss(channels);
}

}  // namespace residual_search
}  // namespace rqk
