// Block shapes and workspace layout of the soft labels on a GPU. For the host and for kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "ops/soft_label/params.h"

namespace rqk {
namespace soft_label {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 2;     // of warps: each processes this fraction of a tile's codes
constexpr int kWarpRows = 16;   // rows per warp
constexpr int kWarpCodes = 64;  // codes of a tile per warp
constexpr int kTileRows = kWarps / kColumns * kWarpRows, kTileCodes = kColumns * kWarpCodes;
constexpr int kChunk = 16;                    // channels per stage
constexpr int kStages = 3;                    // of the ring buffer of codes
constexpr int kVectorBytes = 2 * 2 * kChunk;  // per vector and chunk: both parts in fp16
constexpr int kCapacity = 32;                 // candidates per warp and row
constexpr int kSharedTables = 11 * 1024;      // per block, besides its rows and the ring; kernel.cuh asserts it

// A code to be evaluated by the definition: its half score, later its gradient.
struct Candidate {
  int32_t code;
  float value;
};

// A half score is (sum of products) * (scale of the row) * scale - half_norm; 0 and infinity past the last code.
struct Term {
  float scale, half_norm;
};

// The plan, and pointers into the workspace.
struct Work {
  int64_t codebooks, rows;  // rows per codebook
  int64_t tiles, chunks;    // per codebook
  int64_t row_tiles;        // per codebook
  int64_t blocks;           // total tiles of rows; 0: too many channels, all rows take the direct path
  int64_t shared_bytes;
  float factor;  // 2 / tau, clamped to float32: exponent per half score

  float* centers;   // (codebooks, chunks * kChunk)
  int32_t* norms;   // (codebooks): bits of a float that is at least every |e_k - center|; infinity if a code is not
                    // finite
  Term* terms;      // (codebooks, tiles, kTileCodes)
  uint8_t* packed;  // (codebooks, tiles, chunks, kTileCodes, kVectorBytes)
  Candidate* candidates;   // (blocks, kTileRows, kColumns, kCapacity)
  int64_t* direct;         // (codebooks, rows): rows that the tiles could not handle
  int32_t* direct_counts;  // (codebooks)
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sets the pointers relative to `base`; returns the total bytes.
inline int64_t plan(const SoftLabels& labels, int64_t shared_bytes, uint8_t* base, Work* w) {
  *w = {};
  w->factor = float(std::min(2 / labels.tau, 3e38));
  const bool is_shared = labels.codebook_stride == 0;
  w->codebooks = is_shared ? 1 : labels.inner;
  w->rows = is_shared ? labels.outer * labels.inner : labels.outer;
  w->tiles = divide_up(labels.num_codes, kTileCodes);
  w->chunks = divide_up(labels.channels, kChunk);
  w->shared_bytes = w->chunks * kTileRows * kVectorBytes + kStages * kTileCodes * kVectorBytes;
  if (w->shared_bytes + kSharedTables > shared_bytes) return 0;
  w->row_tiles = divide_up(w->rows, kTileRows);
  w->blocks = w->codebooks * w->row_tiles;

  int64_t bytes = 0;
  auto take = [&bytes, base](auto** piece, int64_t count) {
    *piece = reinterpret_cast<std::remove_reference_t<decltype(*piece)>>(reinterpret_cast<uintptr_t>(base) + bytes);
    bytes += divide_up(count * int64_t(sizeof(**piece)), 256) * 256;
  };
  take(&w->centers, w->codebooks * w->chunks * kChunk);
  take(&w->norms, w->codebooks);
  take(&w->terms, w->codebooks * w->tiles * kTileCodes);
  take(&w->packed, w->codebooks * w->tiles * w->chunks * kTileCodes * kVectorBytes);
  take(&w->candidates, w->blocks * kTileRows * kColumns * kCapacity);
  take(&w->direct, w->codebooks * w->rows);
  take(&w->direct_counts, w->codebooks);
  return bytes;
}

}  // namespace soft_label
}  // namespace rqk
