// Residual search on a GPU: tensor cores find the codes that could win, and the definition decides in float64.
//
//   prepare.cuh   codebooks in bf16, tile by tile, once per call
//   scan.cuh      a block of rows against the codes of some tiles: lists of candidates
//   bound.cuh     the error bound of the scan
//   decide.cuh    exact evaluation of a row's candidates; residual, quantized sum and norm of the next depth
//   groups.cuh    exact distances, and the direct search for rows that the scan cannot handle
//   plan.h        tile shapes, workspace, number of blocks
// If the blocks of rows alone fill the device, one launch goes through all depths. Otherwise the codes are divided
// among blocks too, and each depth is a scan and a decision. Residuals between depths are in the workspace. No N x K
// array, and no host-device sync.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/decide.cuh"
#include "ops/residual_search/prepare.cuh"
#include "ops/residual_search/scan.cuh"

namespace rqk {
namespace residual_search {

// Depths [first_depth, last_depth) of all rows, if one block has all codes; else the candidate lists of one depth for
// decide_splits. Eight warps of at most 255 registers per multiprocessor.
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 8 / kWarps)
    scan_rows(ResidualSearchParams p, Work w, int64_t first_depth, int64_t last_depth) {
  constexpr int kRows = kWarps * kWarpRows;
  CU_DYN_SMEM(uint8_t, rows);
  CU_SHARED(RowTable<kRows>, table);
  CU_SHARED(DirectRows, direct);
  uint8_t* ring = rows + w.chunks * kRows * kChunk * 2;
  const int split = int(blockIdx.x % w.splits);

  for (int64_t block = blockIdx.x / w.splits; block < w.row_blocks; block += gridDim.x / w.splits) {
    const int64_t first_row = block * kRows, slot = w.splits > 1 ? block * w.splits + split : blockIdx.x;
    const int64_t first_tile = split * w.tiles_per_split, last_tile = min(first_tile + w.tiles_per_split, w.tiles);
    for (int64_t d = first_depth; d < last_depth; ++d) {
      load_rows<kWarps>(p, w, d, first_row, rows, table);
      const uint8_t* packed = w.packed + (p.codebook_stride == 0 ? 0 : d) * w.tiles * w.tile_bytes;
      scan<kWarps>(w, packed, first_tile, last_tile, is_centered(d), rows, ring, table, slot,
                   w.splits > 1 ? w.summaries + slot * kRows : table.summary);
      __syncthreads();
      if (w.splits > 1) continue;
      decide_rows(p, w, d, first_row, int(min(int64_t(kRows), p.rows - first_row)), slot, table.summary, 0, direct);
      __syncthreads();
    }
  }
}

// The decision of depths [first_depth, last_depth), with one row per group; or one row per block if nothing was
// scanned.
__global__ void __launch_bounds__(kGroupThreads, 4)
    decide_splits(ResidualSearchParams p, Work w, int64_t first_depth, int64_t last_depth) {
  CU_SHARED(DirectRows, direct);
  const int at_once = w.warps == 0 ? 1 : kGroupThreads / kLanes, rows_of_block = w.warps * kWarpRows;
  for (int64_t row = int64_t(blockIdx.x) * at_once; row < p.rows; row += int64_t(gridDim.x) * at_once) {
    const int64_t block = w.warps == 0 ? 0 : row / rows_of_block;
    for (int64_t d = first_depth; d < last_depth; ++d) {
      decide_rows(p, w, d, row, int(min(int64_t(at_once), p.rows - row)), block * w.splits,
                  w.summaries + block * w.splits * rows_of_block, int(row - block * rows_of_block), direct);
      __syncthreads();
    }
  }
}

}  // namespace residual_search
}  // namespace rqk
