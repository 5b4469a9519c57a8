// Half scores of 64 rows against 128 codes at a time, by tensor cores, almost as accurate as in float32.
//
//   h_k = <x', e'_k> - |e'_k|^2 / 2,  x' = x - m,  e'_k = e_k - m
// Every vector is scaled by a power of two and split into two parts of fp16, high = fp16(v) and low = fp16(v - high). A
// product is low*high + high*low + high*high: three mma, where TF32 would take three at half the rate for the same
// accuracy, and bf16 six. Bound B10 (docs/bounds.md), with the assumption B5 about mma.
//
// A warp has 16 rows x 64 codes in 32 accumulators; a block is four warps along the rows and two along the codes. Per
// chunk, a warp does 24 mma, 10 ldmatrix.x4 (5 KiB of shared memory, 213 bytes per mma) and 32 additions per thread; a
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

constexpr double kHuge = 1e17;  // larger norms have products near the range of float32

// E of bound B10.
__device__ inline double half_score_error(double a, double n, int64_t channels, int64_t chunks) {
  const double u = 0x1p-24;
  return (78 + 1.01 * double(chunks)) * u * a * n + 1.4 * u * n * n + 0x1p-125 * (double(channels) + 3) * (1 + a + n);
}

// Byte offset of 16-byte unit u of vector `place` in a chunk: the high parts of 16 channels are units 0 and 1, the low
// parts 2 and 3. The eight rows of an ldmatrix lie in eight different sixteenths of 128 bytes.
__device__ inline int unit_offset(int place, int unit) {
  return place * kVectorBytes + ((unit ^ (place >> 1 & 3)) << 4);
}

struct SplitVector {
  float scale;     // factor from the parts to the vector
  double squared;  // its squared norm
  bool finite;
};

// Writes both parts of a - origin to its place in all chunks, `stride` bytes apart. Writes zeros for channels past the
// last, if it is not finite, and if a is null. All threads of the group call; the result is valid in all lanes.
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
  // A clamped exponent is harmless: kHuge excludes such a vector, or it is practically zero.
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

// --- packing of the codebooks, once per call ---------------------------------------------------------------

// Finds the center of each codebook. Also zeroes what pack_codes and label_rows add to.
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

// Packs the tiles: a block takes a tile at a time, a group a code.
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

// The rows and codes of a tile that a warp processes.
__device__ inline int first_row_of_warp() { return threadIdx.x / 32 / kColumns * kWarpRows; }
__device__ inline int column_of_warp() { return threadIdx.x / 32 % kColumns; }

// One packed codebook. Kept in shared memory to save registers.
struct PackedCodes {
  const uint8_t* packed;
  const Term* terms;
};

// Adds the products of a chunk to `scores`. A thread's scores[n][2 r + b] belong to the warp's row lane / 4 + 8 r and
// code 8 n + 2 (lane % 4) + b. `rows` and `codes` are the warp's.
__device__ inline void multiply_chunk(float (&scores)[8][4], const uint8_t* rows, const uint8_t* codes) {
  const int lane = lane_of_warp();
  constexpr int kAtOnce = 4;  // independent chains of mma
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

// Calls visit(k, h) for every tile of a codebook, from first to last or `backwards`: h in the layout of multiply_chunk,
// k the code of h[0][0]. Half scores past the last code are -inf; tiles whose codes are all past `num_codes` are
// skipped (0 skips all for this warp). `scales` are those of the block's rows. The whole block calls; another call
// needs a barrier first.
template <class Visit>
__device__ inline void scan(const Work& w, const PackedCodes& codes, bool backwards, unsigned num_codes,
                            const uint8_t* rows, const float* scales, uint8_t* ring, Visit visit) {
  constexpr int kChunkBytes = kTileCodes * kVectorBytes, kBytes = 16 * kThreads;  // bytes per copy of the block
  const int lane = lane_of_warp(), chunks = int(w.chunks), at = 16 * threadIdx.x;
  const int tiles = int(w.tiles), step = backwards ? -1 : 1, first = backwards ? tiles - 1 : 0;

  // Chunks are fetched in scan order.
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
    // Commit even without copies, so that the number of groups tells which chunk has arrived.
    ptx::cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  int current = 0;
  for (int tile = first; unsigned(tile) < unsigned(tiles); tile += step) {
    const unsigned first_code = unsigned(tile) * kTileCodes + column_of_warp() * kWarpCodes;
    const bool has_codes = first_code < num_codes;
    float h[8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      // This chunk has arrived, and all threads are done with the previous one, which the next fetch overwrites.
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
    // Scale the products to half scores.
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
