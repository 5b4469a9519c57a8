// What the scan's bound is made of: numbers rounded to bf16, and how far off each of them is.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/groups.cuh"

namespace rqk {
namespace residual_search {

constexpr float kLargest = 1e17f;  // of vectors that are scanned: their products stay far inside float

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

struct Rounded {
  double norm_squared;   // of a - origin, exactly but for float64
  double error_squared;  // of what bf16 makes of it
};

// Writes a - origin (origin null for zero) in bf16 into its row of all chunks, `stride` bytes from one to the next,
// zeros in channels past the last and where a is not finite (a null: zeros everywhere). By a group; the result is
// valid in all its lanes.
__device__ inline Rounded round_row(const float* a, const float* origin, int64_t channels, int64_t chunks, int row,
                                    uint8_t* chunk, int64_t stride) {
  constexpr int kUnit = 8, kUnits = kChunk / kUnit;
  Rounded sums{0, 0};
  for (int64_t unit = lane_of_group(); unit < chunks * kUnits; unit += kLanes) {
    uint32_t words[kUnit / 2] = {0, 0, 0, 0};
    for (int i = 0; i < kUnit; ++i) {
      const int64_t c = unit * kUnit + i;
      if (a == nullptr || c >= channels) continue;
      const double exact = double(a[c]) - (origin == nullptr ? 0.0 : double(origin[c]));
      const uint32_t bits = fabs(exact) < 3e38 ? bf16_bits(float(exact)) : 0;
      const double error = exact - double(__uint_as_float(bits << 16));
      words[i / 2] |= bits << 16 * (i % 2);
      sums.norm_squared += exact * exact;
      sums.error_squared += error * error;
    }
    uint8_t* to = chunk + unit / kUnits * stride + unit_offset(row, int(unit % kUnits));
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  }
  return {sum_lanes(sums.norm_squared), sum_lanes(sums.error_squared)};
}

// The norm of a rounded row's error, rounded up.
__device__ inline double error_norm(const Rounded& rounded, int64_t channels) {
  return 1.0001 * sqrt(rounded.error_squared) + 0x1p-40 * sqrt(rounded.norm_squared) + denormal_loss(channels);
}

}  // namespace residual_search
}  // namespace rqk
