// Activations in the order in which the lanes of a product load them: 16 bytes per lane and step.
//
// Rows come in groups of eight, padded with zeros. A step is 2 (fp32), 16 (bf16) or 32 (int8) inputs.
//   fp32   (groups, steps, 4, 2, 2)        (t, input, row): rows 2 t and 2 t + 1 of both inputs, for lane t
//   bf16   (groups, steps, 8, 4, 2, 4)     (row, t, part, i): input 4 i + t. An activation is the sum of two bf16
//                                           parts: a second mma, but no second read
//   int8   (groups, steps, 8, 4, 2, 2, 4)  (row, t, part, half, i): input 16 half + 4 t + i. An activation is an
//                                           integer 256 high + low in [-32639, 32639] with a scale per row, as on the
//                                           CPU
// Bound B15 (docs/bounds.md). For int8, CPU and GPU differ only in the order of float32 sums outside the products.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "ops/depth_decode/params.h"

namespace rqk {
namespace depth_decode {

constexpr int kRowGroup = 8;
constexpr int kThreads = 256, kWarps = kThreads / 32;
template <WeightType kType>
constexpr int kStepInputs = kType == WeightType::kFloat32    ? 2
                            : kType == WeightType::kBFloat16 ? 16
                                                             : 32;

template <WeightType kType>
constexpr int kBytesPerActivation = kType == WeightType::kInt8 ? 2 : 4;

// A buffer of activations. `inputs` is padded.
struct Activations {
  uint8_t* at;
  int64_t inputs;
};

// Stores one element of a row, for fp32 and bf16.
template <WeightType kType>
__device__ inline void store_activation(const Activations& to, int64_t row, int64_t input, float value) {
  static_assert(kType != WeightType::kInt8);
  const int64_t step = row / kRowGroup * (to.inputs / kStepInputs<kType>)+input / kStepInputs<kType>;
  const int r = row % kRowGroup, k = input % kStepInputs<kType>;
  if constexpr (kType == WeightType::kFloat32) {
    reinterpret_cast<float*>(to.at)[step * 16 + r / 2 * 4 + k * 2 + r % 2] = value;
  } else {
    uint16_t* parts = reinterpret_cast<uint16_t*>(to.at) + (step * 32 + r * 4 + k % 4) * 8 + k / 4;
    const uint16_t high = ptx::bfloat16_of_float(value);
    parts[0] = high;
    parts[4] = ptx::bfloat16_of_float(value - __uint_as_float(uint32_t(high) << 16));
  }
}

// Stores both parts of four inputs of an int8 row, from `input` on.
__device__ inline void store_bytes(const Activations& to, int64_t row, int64_t input, uint32_t high, uint32_t low) {
  constexpr int kStep = kStepInputs<WeightType::kInt8>;
  const int64_t step = row / kRowGroup * (to.inputs / kStep) + input / kStep;
  const int r = row % kRowGroup, four = input % kStep / 4;
  uint32_t* words = reinterpret_cast<uint32_t*>(to.at) + (step * 32 + r * 4 + four % 4) * 4 + four / 4;
  words[0] = high;
  words[2] = low;
}

template <WeightType kType>
__device__ inline void store_zeros(const Activations& to, int64_t row, int64_t input) {
  if constexpr (kType == WeightType::kInt8) {
    store_bytes(to, row, input, 0, 0);
  } else {
    for (int i = 0; i < 4; ++i) store_activation<kType>(to, row, input + i, 0.0f);
  }
}

// Copies the input rows, adding `addend` (width) if given, and zeroes what no other kernel writes: past the last
// channel and past the last row. One block per row of the padded groups.
struct Begin {
  const float *from, *addend;
  int64_t rows, width;
  float* x;  // (rows, width)
  Activations narrow, wide;
};

template <WeightType kType>
__global__ void __launch_bounds__(kThreads) begin_rows(Begin p) {
  const int64_t row = blockIdx.x;
  const bool there = row < p.rows;
  for (int64_t c = threadIdx.x; there && c < p.width; c += kThreads) {
    const float value = p.from[row * p.width + c];
    p.x[row * p.width + c] = p.addend == nullptr ? value : value + p.addend[c];
  }
  const int64_t first = there ? p.width / 4 * 4 : 0;
  for (int64_t c = first + 4 * threadIdx.x; c < p.narrow.inputs; c += 4 * kThreads)
    store_zeros<kType>(p.narrow, row, c);
  for (int64_t c = 4 * threadIdx.x; !there && c < p.wide.inputs; c += 4 * kThreads) store_zeros<kType>(p.wide, row, c);
}

// The sum over the block's threads, the same in all. `shared` must not be used by another call.
__device__ inline float sum_of_block(float value, float (&shared)[kWarps]) {
  value = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  return sum;
}

// Converts rows to activations; normalizes them first if norm weight and bias are given. One block per row.
struct Arrange {
  const float* from;  // (rows, width)
  int64_t width;
  const float *norm_weight, *norm_bias;
  float eps;
  Activations to;
  float* scales;  // (rows), int8 only
};

template <WeightType kType>
__global__ void __launch_bounds__(kThreads) arrange_rows(Arrange p) {
  CU_SHARED(float, sums, [kWarps]);
  CU_SHARED(float, squares, [kWarps]);
  const int64_t row = blockIdx.x;
  const float* x = p.from + row * p.width;
  float mean = 0, factor = 1;
  // Mean and variance.
  if (p.norm_weight != nullptr) {
    float sum = 0, square = 0;
    for (int64_t c = threadIdx.x; c < p.width; c += kThreads) sum += x[c];
    mean = sum_of_block(sum, sums) / float(p.width);
    for (int64_t c = threadIdx.x; c < p.width; c += kThreads) square += (x[c] - mean) * (x[c] - mean);
    factor = 1.0f / sqrtf(sum_of_block(square, squares) / float(p.width) + p.eps);
  }
  auto value_at = [&](int64_t c) {
    if (c >= p.width) return 0.0f;
    const float value = (x[c] - mean) * factor;
    return p.norm_weight == nullptr ? x[c] : value * p.norm_weight[c] + p.norm_bias[c];
  };
  if constexpr (kType != WeightType::kInt8) {
    for (int64_t c = threadIdx.x; c < p.to.inputs; c += kThreads) store_activation<kType>(p.to, row, c, value_at(c));
  } else {
    // The largest magnitude of the row sets its scale.
    CU_SHARED(float, largests, [kWarps]);
    constexpr float kMost = 32639;  // 256 * 127 + 127
    float largest = 0;
    bool finite = true;
    for (int64_t c = threadIdx.x; c < p.width; c += kThreads) {
      const float value = fabsf(value_at(c));
      finite = finite && value < __int_as_float(0x7f800000);
      largest = fmaxf(largest, value);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
    }
    if (threadIdx.x % 32 == 0) largests[threadIdx.x / 32] = largest;
    finite = __syncthreads_and(finite);
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, largests[i]);
    // The inverse of a smaller number overflows: such a row counts as zero, which changes a result by less than 1e-30
    // of its weights.
    const float inverse = finite && largest > 1e-30f && largest <= 3e38f ? kMost / largest : 0.0f;
    if (threadIdx.x == 0) p.scales[row] = finite ? largest / kMost : __int_as_float(0x7fc00000);
    for (int64_t c = 4 * threadIdx.x; c < p.to.inputs; c += 4 * kThreads) {
      uint32_t high = 0, low = 0;
      for (int i = 0; finite && i < 4; ++i) {
        const float integer = rintf(value_at(c + i) * inverse);
        // Adding a quarter breaks the tie that would leave 128 for the low byte. All of this is exact.
        const int upper = int(rintf((integer + 0.25f) * (1.0f / 256))), lower = int(integer) - 256 * upper;
        high |= uint32_t(upper & 255) << (8 * i);
        low |= uint32_t(lower & 255) << (8 * i);
      }
      store_bytes(p.to, row, c, high, low);
    }
  }
}

}  // namespace depth_decode
}  // namespace rqk
