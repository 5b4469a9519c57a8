// Packs the codebooks for the scan, once per call. Reads them once, and writes half as many bytes.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/bound.cuh"
#include "shared/center.cuh"

namespace rqk {
namespace residual_search {

// Finds the center of each codebook. Also zeroes what pack_codes and the search add to.
__global__ void __launch_bounds__(kGroupThreads) find_centers(ResidualSearchParams p, Work w) {
  const int64_t padded = w.chunks * kChunk;
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.counters = {0, 0};
  for (int64_t i = int64_t(blockIdx.x) * kGroupThreads + threadIdx.x; i < w.codebooks * padded;
       i += int64_t(gridDim.x) * kGroupThreads) {
    const int64_t q = i / padded, c = i % padded;
    if (c == 0) w.extents[q] = {0, 0};
    w.centers[i] = c < p.channels ? codebook_center(codebook_at(p, q), p.num_codes, p.channels, c) : 0.0f;
  }
}

// A tile's bounds while they are collected, as bits of non-negative floats.
struct TileBounds {
  int32_t widest, gap[2];
};

// Packs one code: its row in the chunks, its place in the headers, its part in the bounds. All threads of the group
// call.
__device__ inline void pack_code(const ResidualSearchParams& p, const Work& w, int64_t q, int64_t k, int place,
                                 TileHeader* headers, TileBounds& bounds) {
  const float* e = k < p.num_codes ? codebook_at(p, q) + k * p.channels : nullptr;
  const float* center = w.centers + q * w.chunks * kChunk;
  const Rounded rounded =
      round_row(e, center, p.channels, w.chunks, place, reinterpret_cast<uint8_t*>(headers + 2), kChunkBytes);
  double centered = 0, product = 0, squared = 0;
  for (int64_t c = lane_of_group(); c < p.channels && e != nullptr; c += kLanes) {
    const double code = e[c], difference = code - double(center[c]);
    centered += difference * difference;
    product += double(center[c]) * difference;
    squared += code * code;
  }
  centered = sum_lanes(centered);
  product = sum_lanes(product);
  squared = sum_lanes(squared);
  if (lane_of_group() != 0) return;
  // A code that is not finite, or past the last, can never be chosen.
  const bool finite = e != nullptr && rounded.finite;
  const double accumulation = accumulation_error(w), share = 1.2 * accumulation + 0x1p-22;
  // |center| <= |e| + |e - center|; the float64 rounding of g (h_k of bound B6) is below this.
  const double loss = 0x1p-40 * (2 * centered + sqrt(centered * squared));
  for (int kind = 0; kind < 2; ++kind) {
    const double g = centered / 2 + (kind == 0 ? 0.0 : product);
    const double extra = share * fabs(g) + loss + denormal_loss(p.channels);
    float* start = headers[kind].start[place / 2] + place % 2;
    start[0] = start[2] = finite ? float(extra - g) : -__int_as_float(0x7f800000);
    if (finite) atomicMax(&bounds.gap[kind], __float_as_int(round_up(2.01 * extra)));
  }
  const double norm = 1.000001 * sqrt(centered), error = rounded_error(rounded, p.channels);
  const float width = finite ? round_up(1.0001 * (norm / 1024 + error + accumulation * (norm + error))) : 0.0f;
  headers[0].width[place] = headers[1].width[place] = width;
  if (!finite) return;
  atomicMax(&bounds.widest, __float_as_int(width));
  atomicMax(&w.extents[q].norm, __float_as_int(round_up(1.000001 * sqrt(squared))));
  atomicMax(&w.extents[q].centered_norm, __float_as_int(round_up(norm)));
}

// Packs the tiles: a block takes a tile at a time, a group a code.
__global__ void __launch_bounds__(kGroupThreads) pack_codes(ResidualSearchParams p, Work w) {
  CU_SHARED(TileBounds, bounds);
  for (int64_t i = blockIdx.x; i < w.codebooks * w.tiles; i += gridDim.x) {
    auto* headers = reinterpret_cast<TileHeader*>(w.packed + i * w.tile_bytes);
    if (threadIdx.x == 0) bounds = {0, {0, 0}};
    __syncthreads();
    for (int place = threadIdx.x / kLanes; place < kTileCodes; place += kGroupThreads / kLanes) {
      pack_code(p, w, i / w.tiles, i % w.tiles * kTileCodes + place, place, headers, bounds);
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    for (int kind = 0; kind < 2; ++kind) {
      headers[kind].widest = __int_as_float(bounds.widest);
      headers[kind].gap = __int_as_float(bounds.gap[kind]);
      headers[kind].unused[0] = headers[kind].unused[1] = 0.0f;
    }
  }
}

}  // namespace residual_search
}  // namespace rqk
