// Block shapes and workspace layout of the search on a GPU. For the host and for kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "ops/residual_search/params.h"

namespace rqk {
namespace residual_search {

constexpr int kWarpRows = 32;       // rows per warp of a scanning block
constexpr int kTileCodes = 128;     // codes per tile, scanned at a time by every warp
constexpr int kChunk = 32;          // channels per stage
constexpr int kStages = 3;          // of the ring buffer of codes
constexpr int kGroupThreads = 128;  // threads of a block that works in groups of eight only
constexpr int kMostGroups = kGroupThreads / 8;
constexpr int kQuad = 4;      // threads that share a row in an mma fragment
constexpr int kCapacity = 8;  // candidates (of up to 32 codes each) per thread and row

constexpr int kChunkBytes = kTileCodes * kChunk * 2;

// A set of up to 32 codes of a tile that belong to one thread: bit 2 j + b is code 8 j + 2 (lane % 4) + b.
struct Candidate {
  float upper;  // upper bound of their scores
  int32_t tile;
  uint32_t mask;
};

// A tile's constants for the scan (bound B6). `start` holds those of codes 2 i and 2 i + 1 twice: the initial values of
// an mma, without copies.
struct TileHeader {
  float start[kTileCodes / 2][4];
  float width[kTileCodes];
  float widest, gap, unused[2];
};
static_assert(sizeof(TileHeader) % 16 == 0, "cp.async copies 16 bytes");

enum RowState : int32_t { kScanned = 0, kDirect = -1, kNotFinite = -2 };

// Result of a scan for a row.
struct Summary {
  float floor;    // a code can win only if the upper bound of its score is above
  float top;      // upper bound of the candidates' scores
  int32_t codes;  // number of candidate codes; or a RowState other than kScanned
  int32_t code;   // the code, if there is one candidate
};

// Norms as bits of non-negative floats, which compare like integers.
struct Extent {
  int32_t norm;           // at least every |e| of the codebook
  int32_t centered_norm;  // at least every |e - center|
};

struct Counters {
  unsigned long long direct_rows;      // rows and depths left to the direct search
  unsigned long long evaluated_codes;  // distances evaluated for the others
};

// Constants and results of a scanning block's rows, in shared memory.
template <int kRows>
struct RowTable {
  float reach[kRows];
  float slack[kRows];
  int32_t state[kRows];
  Summary summary[kRows];
};

struct DirectRows {
  double distance[kMostGroups];
  int64_t code[kMostGroups];
  int32_t count;
  int32_t row[kWarpRows * 4];
};

// The plan, and pointers into the workspace.
struct Work {
  int warps;                   // per scanning block; 0: too many channels, every row is searched directly
  bool halved;                 // at most half a chunk of channels: half the products suffice
  int splits;                  // number of parts of the codes; 1: one launch does everything
  int64_t row_blocks, blocks;  // blocks of rows, and how many of them run at a time
  int64_t codebooks, tiles, tiles_per_split, chunks;
  int64_t tile_bytes, scan_shared_bytes;

  float* centers;   // (codebooks, chunks * kChunk)
  Extent* extents;  // (codebooks)
  Counters* counters;
  uint8_t* packed;     // (codebooks, tiles): a TileHeader for centered rows, one for rows as they are, then chunks of
                       // kChunkBytes
  float* residual;     // (rows, channels), from the second depth on
  Summary* summaries;  // (blocks, splits, rows of a block), if there are several splits
  int32_t* counts;     // (blocks, splits, rows of a block, kQuad): number of candidates
  Candidate* candidates;  // (blocks, splits, rows of a block, kQuad, kCapacity)
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Shared memory of a scanning block: dynamic (its rows in bf16, and the ring) and static.
inline int64_t scan_shared_bytes(int warps, int64_t chunks) {
  return chunks * warps * kWarpRows * kChunk * 2 + kStages * (kChunkBytes + int64_t(sizeof(TileHeader)));
}
inline int64_t static_shared_bytes(int warps) {
  return warps * int64_t(sizeof(RowTable<kWarpRows>)) + int64_t(sizeof(DirectRows)) + 64;
}

// Sets the pointers relative to `base`; returns the total bytes.
inline int64_t plan(const ResidualSearchParams& p, int multiprocessors, int64_t shared_bytes, uint8_t* base, Work* w) {
  // A scanning warp takes an eighth of a multiprocessor's registers.
  constexpr int kWarpsPerMultiprocessor = 8;
  constexpr int kMaxWarps = 4;
  *w = {};
  w->codebooks = p.codebook_stride == 0 ? 1 : p.depth;
  w->chunks = divide_up(p.channels, kChunk);
  w->halved = p.channels <= kChunk / 2;
  w->tiles = divide_up(p.num_codes, kTileCodes);
  w->tile_bytes = 2 * int64_t(sizeof(TileHeader)) + w->chunks * kChunkBytes;
  auto shared = [w](int warps) { return scan_shared_bytes(warps, w->chunks) + static_shared_bytes(warps); };
  w->warps = kMaxWarps;
  while (w->warps > 0 && (shared(w->warps) > shared_bytes || p.rows <= w->warps / 2 * kWarpRows)) w->warps /= 2;

  int64_t bytes = 0;
  auto take = [&bytes, base](auto** piece, int64_t count) {
    *piece = reinterpret_cast<std::remove_reference_t<decltype(*piece)>>(reinterpret_cast<uintptr_t>(base) + bytes);
    bytes += divide_up(count * int64_t(sizeof(**piece)), 256) * 256;
  };
  take(&w->residual, p.depth > 1 ? p.rows * p.channels : 0);
  if (w->warps == 0) return bytes;

  // As many blocks as the device runs at a time; more splits of the codes would only wait. A multiprocessor has shared
  // memory for its largest block, and every block takes a KiB more than it asks for.
  const int64_t fitting = (shared_bytes + 1024) / (shared(w->warps) + 1024);
  const int64_t resident = std::min<int64_t>(kWarpsPerMultiprocessor / w->warps, fitting);
  const int64_t at_once = multiprocessors * resident;
  const int rows_of_block = w->warps * kWarpRows;
  w->scan_shared_bytes = scan_shared_bytes(w->warps, w->chunks);
  w->row_blocks = divide_up(p.rows, rows_of_block);
  w->tiles_per_split = divide_up(w->tiles, std::max<int64_t>(1, std::min(at_once / w->row_blocks, w->tiles)));
  w->splits = int(divide_up(w->tiles, w->tiles_per_split));
  w->blocks = w->splits > 1 ? w->row_blocks : std::min(w->row_blocks, 2 * at_once);
  const int64_t lists = w->blocks * w->splits * rows_of_block;

  take(&w->centers, w->codebooks * w->chunks * kChunk);
  take(&w->extents, w->codebooks);
  take(&w->counters, 1);
  take(&w->packed, w->codebooks * w->tiles * w->tile_bytes);
  take(&w->summaries, w->splits > 1 ? lists : 0);
  take(&w->counts, lists * kQuad);
  take(&w->candidates, lists * kQuad * kCapacity);
  return bytes;
}

}  // namespace residual_search
}  // namespace rqk
