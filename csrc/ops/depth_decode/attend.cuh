// Attention of the new positions over all positions up to their own: softmax(q k^T / sqrt(head_dim)) v, one warp per
// row and head.
//
// Each lane scores one of 32 positions; then lanes hold channels, and the 32 values are added with weights fetched by
// shuffles. The softmax is online: sums are rescaled when a later score is the largest. Keys and values of a new
// position are read from the product's output and written to the caches on the way, so no warp waits for another.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "ops/depth_decode/arrange.cuh"

namespace rqk {
namespace depth_decode {

struct Attention {
  const float* qkv;  // (batch * count, stride): queries, keys, values of `width`
  int64_t stride;
  int width, heads, rows, count;  // rows = batch * count; rows * heads fits an int
  float scale;
  float *keys, *values;  // (batch, heads, capacity, width / heads), of this layer
  int64_t capacity, length;
  const int64_t* step;   // added to the length; or null
  bool is_vectorizable;  // head_dim and all addresses are multiples of four elements
  Activations to;        // output for fp32 and bf16
  float* out;            // output for int8: (rows, width)
};

template <WeightType kType>
__global__ void __launch_bounds__(kThreads) attend_rows(Attention p) {
  constexpr int kChannels = 4;  // per lane
  const int lane = threadIdx.x % 32;
  const int item = blockIdx.x * kWarps + threadIdx.x / 32;
  if (item >= p.rows * p.heads) return;
  const int row = item / p.heads, head = item % p.heads, dim = p.width / p.heads;
  const int sequence = row / p.count, first_new = sequence * p.count;
  // A position beyond the capacity of the caches is not written and attends to nothing: its row becomes NaN.
  const int64_t step = p.step == nullptr ? 0 : *p.step;
  const bool fits = step >= 0 && step < p.capacity - p.length - (row - first_new);
  const int length = fits ? int(p.length + step) : 0, n = fits ? length + row - first_new + 1 : 0;
  const int64_t cache = (int64_t(sequence) * p.heads + head) * p.capacity * dim;
  const float* q = p.qkv + row * p.stride + head * dim;
  float *keys = p.keys + cache, *values = p.values + cache;
  // Append the new key and value to the caches.
  for (int c = lane; fits && c < dim; c += 32) {
    keys[int64_t(n - 1) * dim + c] = q[p.width + c];
    values[int64_t(n - 1) * dim + c] = q[2 * p.width + c];
  }
  // The keys (part 1) or values (part 2) of a new position.
  auto fresh = [&](int part, int j) {
    return p.qkv + (first_new + j - length) * p.stride + part * p.width + head * dim;
  };

  // Scores are recomputed for each 128 channels of a head; mostly there is one such pass.
  for (int first = 0; first < dim; first += 32 * kChannels) {
    float top = -__int_as_float(0x7f800000), sum = 0, weighed[kChannels] = {};
    for (int begin = 0; begin < n; begin += 32) {
      const int j = begin + lane;
      float score = -__int_as_float(0x7f800000);
      if (j < n) {
        const float* key = j < length ? keys + int(j) * dim : fresh(1, j);
        score = 0;
        if (p.is_vectorizable) {
#pragma unroll 4
          for (int c = 0; c < dim; c += 4) {
            const float4 a = *reinterpret_cast<const float4*>(q + c), b = *reinterpret_cast<const float4*>(key + c);
            score = __fmaf_rn(a.w, b.w, __fmaf_rn(a.z, b.z, __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, score))));
          }
        } else {
#pragma unroll 1
          for (int c = 0; c < dim; ++c) score = __fmaf_rn(q[c], key[c], score);
        }
        score *= p.scale;
      }
      float next = fmaxf(top, score);
      for (int lanes = 16; lanes > 0; lanes /= 2) next = fmaxf(next, __shfl_xor_sync(kFullWarp, next, lanes));
      const float kept = expf(top - next), weight = j < n ? expf(score - next) : 0.0f;
      top = next;
      sum = sum * kept + sum_of_warp(weight);
      for (float& w : weighed) w *= kept;
#pragma unroll 2
      for (int i = 0; i < 32 && begin + i < n; ++i) {
        const float weight_i = __shfl_sync(kFullWarp, weight, i);
        const float* value = begin + i < length ? values + int(begin + i) * dim : fresh(2, begin + i);
#pragma unroll
        for (int r = 0; r < kChannels; ++r) {
          const int c = first + lane + 32 * r;
          if (c < dim) weighed[r] = __fmaf_rn(weight_i, value[c], weighed[r]);
        }
      }
    }
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int r = 0; r < kChannels; ++r) {
      const int c = first + lane + 32 * r;
      if (c >= dim) break;
      if constexpr (kType == WeightType::kInt8) {
        p.out[int64_t(row) * p.width + head * dim + c] = weighed[r] * inverse;
      } else {
        store_activation<kType>(p.to, row, head * dim + c, weighed[r] * inverse);
      }
    }
  }
}

}  // namespace depth_decode
}  // namespace rqk
