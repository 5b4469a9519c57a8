// Depth attention on a GPU: a few lanes of a warp take one head of a stack, so a warp takes several heads.
//
// A lane holds the same channels of all rows: 16 bytes of each, or several times that for long rows. All rows of a head
// are fetched at once into shared memory, where each lane reads only what it wrote itself: it holds the 32 rows that do
// not fit the registers, without barriers. Products of rows are sums over lanes by shuffles, four keys at a time;
// probabilities are in every lane's registers. Masked keys are skipped, so only visible values can turn a result into
// NaN.
//   forward    per query: scores, softmax, weighted rows of v
//   backward   per query: recompute p, dp = grad v^T, ds = scale p (dp - sum_j p dp), dq = ds k; p and ds go to the
//              group's shared memory. Then per four keys: dk = ds^T q, dv = p^T grad
// Everything is read once and written once by a single lane: no atomics, and results depend on the head alone.
//
// Moves 4 rows of head_dim per depth forward and 7 backward: for D = 4 depths of 64 bf16 channels, 2 and 3.5 KiB per
// head. Does 2 D (D + 1) head_dim operations forward and 5 D (D + 1) head_dim backward. Memory-bound: 2.5 operations
// per byte in bf16 at D = 4, 8.5 at D = 16.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/half.cuh"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "ops/depth_attention/params.h"

namespace rqk {
namespace depth_attention {

constexpr int kMostThreads = 128;
constexpr int kLeastLanes = 4;
// Division of work, the same for all warps.
struct Division {
  int lanes;          // per head: a power of two, at least kLeastLanes
  int slices;         // per row: 16-byte chunks that each lane holds
  bool is_aligned;    // all rows start at, and are, multiples of 16 bytes
  int weight_stride;  // floats from one query's probabilities to the next, a multiple of four
};

template <FloatType kType>
constexpr int kPerChunk = kType == FloatType::kFloat32 ? 4 : 8;

template <FloatType kType>
__device__ inline void to_floats(const uint4& chunk, float (&x)[kPerChunk<kType>]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == FloatType::kFloat32) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 two = unpack<kType>(words[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

template <FloatType kType>
__device__ inline uint4 to_chunk(const float (&x)[kPerChunk<kType>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == FloatType::kFloat32) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = pack<kType>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Position of a lane: its head, and its channels of the rows.
template <FloatType kType>
struct Lane {
  static constexpr int kSize = kPerChunk<kType>, kBytes = 16 / kSize;

  int64_t stack, head;
  int head_dim, lane;
  Division division;

  __device__ int channel(int slice) const { return (slice * division.lanes + lane) * kSize; }

  __device__ int64_t offset(int64_t stack_stride, int64_t head_stride) const {
    return stack * stack_stride + head * head_stride;
  }

  // Starts copying a head's rows to `to`, where a lane's chunks are blockDim.x apart.
  __device__ void fetch(const HeadsIn& rows, int count, uint4* to) const {
    const int64_t first = offset(rows.stack_stride, rows.head_stride);
    for (int i = 0; i < count; ++i) {
      for (int slice = 0; slice < division.slices; ++slice, to += blockDim.x) {
        const int c = channel(slice), left = head_dim - c;
        const int64_t at = first + i * rows.row_stride + c;
        if (division.is_aligned) {
          const char* from = static_cast<const char*>(rows.data) + (left > 0 ? at : 0) * kBytes;
          ptx::cp_async_16(to, from, left > 0);
        } else {
          float x[kSize];
#pragma unroll
          for (int e = 0; e < kSize; ++e) x[e] = e < left ? load<kType>(rows.data, at + e) : 0.0f;
          *to = to_chunk<kType>(x);
        }
      }
    }
  }

  __device__ void put(const HeadsOut& rows, int row, int slice, const float (&x)[kSize]) const {
    const int c = channel(slice), left = head_dim - c;
    if (left <= 0) return;
    const int64_t at = offset(rows.stack_stride, rows.head_stride) + row * rows.row_stride + c;
    if (division.is_aligned) {
      *reinterpret_cast<uint4*>(static_cast<char*>(rows.data) + at * kBytes) = to_chunk<kType>(x);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (e < left) store<kType>(rows.data, at + e, x[e]);
      }
    }
  }

  __device__ void take(const uint4* rows, int row, int slice, float (&x)[kSize]) const {
    to_floats<kType>(rows[(row * division.slices + slice) * int(blockDim.x)], x);
  }

  // Products of row i of a with rows [0, last] of b, in all lanes; entries past `last` are unspecified.
  template <int kKeys>
  __device__ void products(const uint4* a, int i, const uint4* b, int last, float (&sum)[kKeys]) const {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) sum[j] = 0;
    for (int slice = 0; slice < division.slices; ++slice) {
      float of_a[kSize];
      take(a, i, slice, of_a);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (j / 4 * 4 > last) break;
        float of_b[kSize];
        take(b, min(j, last), slice, of_b);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[j] = __fmaf_rn(of_a[e], of_b[e], sum[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; j += 4) {
      if (j > last) break;
      for (int apart = division.lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int t = 0; t < 4; ++t) sum[j + t] += __shfl_xor_sync(kFullWarp, sum[j + t], apart);
      }
    }
  }

  // Probabilities of query i; zero past `last`, the last key it sees.
  template <int kKeys>
  __device__ void softmax(const uint4* q, int i, const uint4* k, int last, const Exponents& exponents,
                          float (&p)[kKeys]) const {
    products(q, i, k, last, p);
    const float inf = __int_as_float(0x7f800000);
    float most = -inf, total = 0;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      p[j] = j <= last ? p[j] * exponents.sign : -inf;
      most = max(most, p[j]);
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      if (j / 4 * 4 > last) break;
      p[j] = expf((p[j] - most) * exponents.factor);
      total += p[j];
    }
    const float factor = 1 / total;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) p[j] = j <= last ? p[j] * factor : 0.0f;
  }

  // Row `row` of the result: the weighted sum of rows [0, last] of x.
  template <int kKeys>
  __device__ void combine(const float (&weights)[kKeys], const uint4* x, int last, const HeadsOut& to, int row,
                          bool is_there) const {
    for (int slice = 0; slice < division.slices; ++slice) {
      float sum[kSize] = {};
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (j > last) break;
        float of_x[kSize];
        take(x, j, slice, of_x);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[e] = __fmaf_rn(weights[j], of_x[e], sum[e]);
      }
      if (is_there) put(to, row, slice, sum);
    }
  }
};

// The lane for head `index`, or for the last head if there are fewer.
template <FloatType kType>
__device__ inline Lane<kType> lane_of(const DepthAttentionParams& p, const Division& division, int64_t index) {
  const int64_t last = p.stacks * p.heads - 1, given = index < last ? index : last;
  return {given / p.heads, given % p.heads, p.head_dim, int(threadIdx.x) % division.lanes, division};
}

// kKeys: at least p.keys, a multiple of four. The launch bound asks for only one block per multiprocessor: shared
// memory limits the number of blocks, and with its own choice ptxas spills.
template <FloatType kType, int kKeys>
__global__ void __launch_bounds__(kMostThreads, 1)
    attend(DepthAttentionParams p, Exponents exponents, Division division) {
  CU_DYN_SMEM(uint4, chunks);
  const int step = division.slices * int(blockDim.x);
  uint4 *q = chunks + threadIdx.x, *k = q + p.queries * step, *v = k + p.keys * step;
  const int64_t total = p.stacks * p.heads;
  const int per_block = int(blockDim.x) / division.lanes, group = int(threadIdx.x) / division.lanes;

  for (int64_t first = int64_t(blockIdx.x) * per_block; first < total; first += int64_t(gridDim.x) * per_block) {
    const Lane<kType> lane = lane_of<kType>(p, division, first + group);
    const bool is_there = first + group < total;
    lane.fetch(p.q, p.queries, q);
    lane.fetch(p.k, p.keys, k);
    lane.fetch(p.v, p.keys, v);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < p.queries; ++i) {
      const int last = i + p.keys - p.queries;
      float weights[kKeys];
      lane.softmax(q, i, k, last, exponents, weights);
      lane.combine(weights, v, last, p.out, i, is_there);
    }
  }
}

template <FloatType kType, int kKeys>
__global__ void __launch_bounds__(kMostThreads, 1)
    attend_backward(DepthAttentionBackwardParams b, Exponents exponents, Division division) {
  CU_DYN_SMEM(uint4, chunks);
  constexpr int kSize = kPerChunk<kType>;
  const DepthAttentionParams& p = b.forward;
  const int step = division.slices * int(blockDim.x), offset = p.keys - p.queries;
  uint4 *q = chunks + threadIdx.x, *grad = q + p.queries * step, *k = grad + p.queries * step, *v = k + p.keys * step;
  const int64_t total = p.stacks * p.heads;
  const int per_block = int(blockDim.x) / division.lanes, group = int(threadIdx.x) / division.lanes;
  // (queries, weight_stride) of p, then of ds.
  float* of_p = reinterpret_cast<float*>(chunks + 2 * (p.queries + p.keys) * step) +
                group * 2 * p.queries * division.weight_stride;
  float* of_ds = of_p + p.queries * division.weight_stride;

  for (int64_t first = int64_t(blockIdx.x) * per_block; first < total; first += int64_t(gridDim.x) * per_block) {
    const Lane<kType> lane = lane_of<kType>(p, division, first + group);
    const bool is_there = first + group < total;
    lane.fetch(p.q, p.queries, q);
    lane.fetch(b.grad, p.queries, grad);
    lane.fetch(p.k, p.keys, k);
    lane.fetch(p.v, p.keys, v);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();

    // Per query: p and ds to shared memory, and dq.
    for (int i = 0; i < p.queries; ++i) {
      const int last = i + offset;
      float weights[kKeys], ds[kKeys], sum = 0;
      lane.softmax(q, i, k, last, exponents, weights);
      lane.products(grad, i, v, last, ds);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (j > last) break;
        sum = __fmaf_rn(weights[j], ds[j], sum);
      }
#pragma unroll
      for (int j = 0; j < kKeys; ++j) ds[j] = j <= last ? p.scale * weights[j] * (ds[j] - sum) : 0.0f;
      // All lanes hold the same values: one writes p, another ds.
#pragma unroll
      for (int j = 0; j < kKeys; j += 4) {
        if (j > last) break;
        const int at = i * division.weight_stride + j;
        if (lane.lane == 0) {
          *reinterpret_cast<float4*>(of_p + at) = {weights[j], weights[j + 1], weights[j + 2], weights[j + 3]};
        }
        if (lane.lane == 1) *reinterpret_cast<float4*>(of_ds + at) = {ds[j], ds[j + 1], ds[j + 2], ds[j + 3]};
      }
      lane.combine(ds, k, last, b.grad_q, i, is_there);
    }
    __syncwarp();

    // Per four keys: dk and dv.
    for (int j = 0; j < p.keys; j += 4) {
      for (int slice = 0; slice < division.slices; ++slice) {
        float dk[4][kSize] = {}, dv[4][kSize] = {};
        for (int i = max(0, j - offset); i < p.queries; ++i) {
          float of_q[kSize], of_grad[kSize];
          lane.take(q, i, slice, of_q);
          lane.take(grad, i, slice, of_grad);
          const float4 p4 = *reinterpret_cast<const float4*>(of_p + i * division.weight_stride + j);
          const float4 ds4 = *reinterpret_cast<const float4*>(of_ds + i * division.weight_stride + j);
          const float weights[4] = {p4.x, p4.y, p4.z, p4.w}, ds[4] = {ds4.x, ds4.y, ds4.z, ds4.w};
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (j + t > i + offset) break;
#pragma unroll
            for (int e = 0; e < kSize; ++e) {
              dk[t][e] = __fmaf_rn(ds[t], of_q[e], dk[t][e]);
              dv[t][e] = __fmaf_rn(weights[t], of_grad[e], dv[t][e]);
            }
          }
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          if (j + t >= p.keys || !is_there) break;
          lane.put(b.grad_k, j + t, slice, dk[t]);
          lane.put(b.grad_v, j + t, slice, dv[t]);
        }
      }
    }
    __syncwarp();  // before the next head's p and ds overwrite these
  }
}

}  // namespace depth_attention
}  // namespace rqk
