// Half scores of 64 rows against 128 codes at a time, by tensor cores, nearly as exact as float32 would have them.
//
//   h_k = <x', e'_k> - |e'_k|^2 / 2,  x' = x - m,  e'_k = e_k - m,  m a vector in the middle of the codes.
//
// Every vector is scaled by a power of two, so that its largest number lies in [2^14, 2^15), and split into two parts
// of float16, high = float16(v) and low = float16(v - high). A product is low*high + high*low + high*high: three mma of
// float16 where TF32 would take three of half their rate for the same digits, and bfloat16 six. A mma accumulates 16
// channels from zero, the small products first; their sum is added to the others in float32, so that what an mma loses
// does not grow with the channels.
//
// The bound. With u = 2^-24, a = |x'|, n = max|e'_k| and C channels in B = ceil(C/16) chunks:
//   x' and e' rounded once                     2 u a n
//   v - high is a whole number of up to 13 bits of v's last place (float32 has 24 bits, high 11 of them and a sign), so
//   low is off by one place at most, 2^-23 |v|; where it is below 2^-14 by 2^-25, or 2^-39 of the largest: both parts
//                                              2 (2^-23 + C^(1/2) 2^-39) a n  <=  (4 + C^(1/2) 2^-14) u a n
//   low * low is left out: both at most 2^-11 of v, and 2^-39 of the largest
//                                              (4 + C 2^-24) u a n
//   an mma errs by at most 2^-18 (|addend| + sum|products|), as in residual_search. Over a chunk the first two add to
//   at most 2^-9.9 of the third's products, (1 + 2^-10)^2 a n over all chunks: 2^-18 (1 + 4 * 2^-9.9) a n or less
//                                              65 u a n
//   B additions, of numbers of at most a n     1.01 B u a n
//   |e'|^2/2 to float, and the subtraction     u n^2 / 2 + u (n^2 / 2 + a n)
//   room for a list's floor, itself rounded    u a n + 0.3 u n^2, half of that rounding
//   underflow, as with any float32 products    2^-125 (C + 3) (1 + a + n)
// C is at most some thousands, since the rows lie in shared memory. Together
//   E = (78 + 1.01 B) u a n + 1.4 u n^2 + 2^-125 (C + 3) (1 + a + n);
// a sum of C float32 multiply-adds is bounded by (C + 4) u a n.
//
// A warp has 16 rows x 64 codes in 32 accumulators; a block is four warps along the rows and two along the codes. Per
// chunk a warp does 24 mma, 10 ldmatrix.x4 (5 KiB of shared memory, 213 bytes per mma) and 32 additions per thread; a
// block reads 8 KiB from L2 per 192 mma.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/ptx.cuh"
#include "ops/soft_label/logit_dtypes.cuh"
#include "ops/soft_label/row.cuh"
#include "shared/center.cuh"
#include "shared/exact.cuh"

namespace rqk {
namespace soft_label {

constexpr double kHuge = 1e17;  // beyond it, products of norms come near the ends of float

// How far half scores can be from the exact ones.
__device__ inline double half_score_error(double a, double n, int64_t channels, int64_t chunks) {
  const double u = 0x1p-24;
  return (78 + 1.01 * double(chunks)) * u * a * n + 1.4 * u * n * n + 0x1p-125 * (double(channels) + 3) * (1 + a + n);
}

// In bytes, where 16-byte unit u of vector `place` stands in a chunk: the high parts of 16 channels are units 0 and 1,
// the low parts 2 and 3. The rows of an ldmatrix, eight in a row, lie in eight different sixteenths of 128 bytes.
__device__ inline int unit_offset(int place, int unit) {
  return place * kVectorBytes + ((unit ^ (place >> 1 & 3)) << 4);
}

struct SplitVector {
  float scale;     // times the parts is the vector
  double squared;  // its squared norm
  bool finite;
};

// Writes both parts of a - origin to its place in all chunks, `stride` bytes from one to the next: zeros in channels
// past the last, where it is not finite, and everywhere where a is null. By a group; the result is in all its lanes.
__device__ inline SplitVector split_vector(const float* a, const float* origin, int64_t channels, int64_t chunks,
                                           int place, uint8_t* chunk, int64_t stride) {
  const float inf = __int_as_float(0x7f800000);
  const int j = threadIdx.x % kLanes;
  float largest = 0;
  double squared = 0;
  bool finite = true;
  for (int64_t c = j; c < channels && a != nullptr; c += kLanes) {
    const float v = a[c] - origin[c];
    finite = finite && fabsf(v) < inf;
    largest = max(largest, fabsf(v));
    squared += double(v) * double(v);
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(group_mask(), largest, lanes, kLanes));
  }
  squared = sum_lanes(squared);
  finite = __ballot_sync(group_mask(), finite) == group_mask();
  // Where the ends are cut off, kHuge rules the vector out, or it is as good as zero.
  const int exponent = min(max(int(__float_as_uint(largest) >> 23) - 127, -100), 100);
  const float scale = __uint_as_float(uint32_t(14 - exponent + 127) << 23);
  for (int64_t unit = j; unit < chunks * 2; unit += kLanes) {
    uint32_t high[4] = {}, low[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t c = unit * 8 + i;
      const float v = a != nullptr && finite && c < channels ? (a[c] - origin[c]) * scale : 0.0f;
      const uint16_t part = ptx::half_of_float(v);
      high[i / 2] |= uint32_t(part) << 16 * (i % 2);
      low[i / 2] |= uint32_t(ptx::half_of_float(v - ptx::float_of_half(part))) << 16 * (i % 2);
    }
    uint8_t* to = chunk + unit / 2 * stride;
    *reinterpret_cast<uint4*>(to + unit_offset(place, int(unit % 2))) = uint4{high[0], high[1], high[2], high[3]};
    *reinterpret_cast<uint4*>(to + unit_offset(place, int(unit % 2) + 2)) = uint4{low[0], low[1], low[2], low[3]};
  }
  return {__uint_as_float(uint32_t(exponent - 14 + 127) << 23), squared, finite};
}

// --- once per call: the codebooks in two parts --------------------------------------------------------------

// Also zeroes what pack_codes and label_rows add to.
__global__ void __launch_bounds__(kThreads) find_centers(SoftLabels labels, Work w) {
  const int64_t padded = w.chunks * kChunk;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < w.codebooks * padded;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t q = i / padded, c = i % padded;
    if (c == 0) w.norms[q] = w.direct_counts[q] = 0;
    const float* codebook = labels.codebook + q * labels.codebook_stride;
    w.centers[i] = c < labels.channels ? codebook_center(codebook, labels.num_codes, labels.channels, c) : 0.0f;
  }
}

// A tile to a block at a time, a code to a group.
__global__ void __launch_bounds__(kThreads) pack_codes(SoftLabels labels, Work w) {
  const float inf = __int_as_float(0x7f800000);
  constexpr int64_t kChunkBytes = kTileCodes * kVectorBytes;
  for (int64_t i = blockIdx.x; i < w.codebooks * w.tiles; i += gridDim.x) {
    const int64_t q = i / w.tiles, first = i % w.tiles * kTileCodes;
    const float* codebook = labels.codebook + q * labels.codebook_stride;
    for (int place = threadIdx.x / kLanes; place < kTileCodes; place += kThreads / kLanes) {
      const bool is_code = first + place < labels.num_codes;
      const float* e = is_code ? codebook + (first + place) * labels.channels : nullptr;
      const SplitVector split = split_vector(e, w.centers + q * w.chunks * kChunk, labels.channels, w.chunks, place,
                                             w.packed + i * w.chunks * kChunkBytes, kChunkBytes);
      if (threadIdx.x % kLanes != 0) continue;
      w.terms[i * kTileCodes + place] = is_code ? Term{split.scale, float(split.squared / 2)} : Term{0, inf};
      const float norm = float(1.000001 * sqrt(split.squared));
      if (is_code) atomicMax(&w.norms[q], __float_as_int(split.finite ? norm : inf));
    }
  }
}

// --- scan ---------------------------------------------------------------------------------------------------

// What a warp sees of a tile.
__device__ inline int first_row_of_warp() { return threadIdx.x / 32 / kColumns * kWarpRows; }
__device__ inline int column_of_warp() { return threadIdx.x / 32 % kColumns; }

// Of one codebook. In shared memory: registers are short.
struct PackedCodes {
  const uint8_t* packed;
  const Term* terms;
};

// The sums of products of a chunk are added to `scores`. A thread's scores[n][2 r + b] belong to row lane / 4 + 8 r of
// its warp's and code 8 n + 2 (lane % 4) + b. `rows` and `codes` are the warp's.
__device__ inline void multiply_chunk(float (&scores)[8][4], const uint8_t* rows, const uint8_t* codes) {
  const int lane = lane_of_warp();
  constexpr int kAtOnce = 4;  // chains of mma, so that one need not wait for itself
  const float zero[4] = {0, 0, 0, 0};
  uint32_t high[4], low[4];
  ptx::ldmatrix_x4<false>(high, rows + unit_offset(lane % 16, lane / 16));
  ptx::ldmatrix_x4<false>(low, rows + unit_offset(lane % 16, lane / 16 + 2));
  const uint8_t* from = codes + unit_offset(lane % 8, lane / 8);
#pragma unroll
  for (int first = 0; first < 8; first += kAtOnce) {
    uint32_t parts[kAtOnce][4];
    float sums[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) ptx::ldmatrix_x4<false>(parts[i], from + (first + i) * 8 * kVectorBytes);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t code_high[2] = {parts[i][0], parts[i][1]};
      ptx::mma_f16(sums[i], low, code_high, zero);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t code_low[2] = {parts[i][2], parts[i][3]};
      ptx::mma_f16(sums[i], high, code_low);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t code_high[2] = {parts[i][0], parts[i][1]};
      ptx::mma_f16(sums[i], high, code_high);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[first + i][j] += sums[i][j];
    }
  }
}

// Calls visit(k, h) for every tile of a codebook, first to last or `backwards`: h as multiply_chunk has its scores, k
// the code of h[0][0]. Half scores past the last code are -inf; there are no calls where all of a warp's would be, by
// `num_codes`, which is 0 where a warp wants none. `scales` are those of the block's rows. The whole block calls, and
// again only behind a barrier.
template <class Visit>
__device__ inline void scan(const Work& w, const PackedCodes& codes, bool backwards, unsigned num_codes,
                            const uint8_t* rows, const float* scales, uint8_t* ring, Visit visit) {
  constexpr int kChunkBytes = kTileCodes * kVectorBytes, kBytes = 16 * kThreads;  // fetched at a time
  const int lane = lane_of_warp(), chunks = int(w.chunks), at = 16 * threadIdx.x;
  const int tiles = int(w.tiles), step = backwards ? -1 : 1, first = backwards ? tiles - 1 : 0;

  int tiles_to_fetch = tiles;
  int fetched_chunk = 0;
  const uint8_t* from = codes.packed + int64_t(first) * chunks * kChunkBytes;
  auto fetch = [&](int stage) {
    if (tiles_to_fetch > 0) {
#pragma unroll
      for (int i = 0; i < kChunkBytes; i += kBytes) {
        ptx::cp_async_16(ring + stage * kChunkBytes + i + at, from + fetched_chunk * kChunkBytes + i + at);
      }
      if (++fetched_chunk == chunks) {
        fetched_chunk = 0;
        --tiles_to_fetch;
        from += int64_t(step) * chunks * kChunkBytes;
      }
    }
    // Where nothing is left to fetch too, so that the number of groups says which chunk has come.
    ptx::cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  int current = 0;
  for (int tile = first; unsigned(tile) < unsigned(tiles); tile += step) {
    const unsigned first_code = unsigned(tile) * kTileCodes + column_of_warp() * kWarpCodes;
    const bool has_codes = first_code < num_codes;
    float h[8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      // This chunk has come, and all are done with the last one, whose place the next fetch takes.
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch(current == 0 ? kStages - 1 : current - 1);
      if (has_codes) {
        multiply_chunk(h, rows + (chunk * kTileRows + first_row_of_warp()) * kVectorBytes,
                       ring + (current * kTileCodes + column_of_warp() * kWarpCodes) * kVectorBytes);
      }
      current = current + 1 == kStages ? 0 : current + 1;
    }
    if (!has_codes) continue;
    const float scale[2] = {scales[first_row_of_warp() + lane / 4], scales[first_row_of_warp() + lane / 4 + 8]};
    const unsigned k = first_code + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 both = *reinterpret_cast<const float4*>(codes.terms + k + 8 * n);  // of two codes
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        h[n][2 * r] = __fmaf_rn(h[n][2 * r] * scale[r], both.x, -both.y);
        h[n][2 * r + 1] = __fmaf_rn(h[n][2 * r + 1] * scale[r], both.z, -both.w);
      }
    }
    visit(k, h);
  }
  ptx::cp_async_wait<0>();
}

}  // namespace soft_label
}  // namespace rqk
