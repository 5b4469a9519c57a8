// Float32 scores of a tile of rows against all codes of a codebook. For files compiled once per instruction set.
//
//   score_k = |e'_k|^2/2 - <r', e'_k>,   r' = r - m, e' = e - m:   half of |r - e_k|^2 minus a constant of the row
// Register tiles are kCodeTile codes x kTileRows rows. A row is a lane: only the few rows are packed, the codebook is
// read in place, once for all of them, and the products are transposed to (row, code) on their way to memory. Costs 2 C
// operations and 4 bytes written (to cache) per row and code. Threads may share the blocks. Bound B7 (docs/bounds.md).
#pragma once

#include <cstddef>

#include "common/simd.h"
#include "shared/centered_codes.h"
#include "shared/exact.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kTileVecs = 2;
constexpr int kTileRows = kTileVecs * Vec::kSize;
#if defined(__AVX512F__)
constexpr int kCodeTile = 12;  // 12 x 2 accumulators of 32 registers
constexpr int kCodeGroup = 3;  // codes addressed by one pointer
#else
constexpr int kCodeTile = 4;  // 4 x 2 accumulators of 16 registers
constexpr int kCodeGroup = 2;
#endif
constexpr int kBlockCodes = 3 * Vec::kSize;  // whole tiles, and whole vectors
constexpr int64_t kPart = 128;               // channels
static_assert(kBlockCodes % kCodeTile == 0 && kCodeTile % kCodeGroup == 0, "");

inline int64_t round_to(int64_t multiple, int64_t n) { return (n + multiple - 1) / multiple * multiple; }

inline int64_t padded_codes(int64_t num_codes) { return round_to(kBlockCodes, num_codes); }

// Rounded up to whole blocks of kScoreBlock, plus a cache line: rows a power of two apart would map to the same cache
// sets.
constexpr int64_t kScoreBlock = 256;
inline int64_t score_stride(int64_t num_codes) { return round_to(kScoreBlock, padded_codes(num_codes)) + 16; }

inline double dot_terms(int64_t channels) { return double((channels < kPart ? channels : kPart) + channels / kPart); }

// Divides a piece of memory into parts, each aligned to a cache line.
struct Division {
  char* memory;
  size_t used = 0;
  template <class T>
  void take(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(memory + used);
    used += size_t(round_to(64, count * int64_t(sizeof(T))));
  }
};

// A tile of rows and its scores.
struct RowTile {
  float* x_cn;        // (channels, kTileRows): r' of the rows, interleaved
  float* last_codes;  // (kBlockCodes, channels): the codes of an incomplete last block, padded with zeros
  float* scores;      // (kTileRows, stride)
  float* lowest;      // (parts, kTileRows): the lowest score of each row
  double* squared;    // (kTileRows): |r'|^2, not finite if the row is not
  int64_t stride;
  size_t bytes;
};

inline RowTile row_tile(void* memory, int64_t num_codes, int64_t channels, int64_t parts) {
  Division division{static_cast<char*>(memory)};
  RowTile tile{};
  tile.stride = score_stride(num_codes);
  division.take(tile.x_cn, channels * kTileRows);
  division.take(tile.last_codes, kBlockCodes * channels);
  division.take(tile.scores, kTileRows * tile.stride);
  division.take(tile.lowest, parts * kTileRows);
  division.take(tile.squared, kTileRows);
  tile.bytes = division.used;
  return tile;
}

inline size_t row_tile_bytes(int64_t num_codes, int64_t channels, int64_t parts) {
  return row_tile(nullptr, num_codes, channels, parts).bytes;
}

// Packs the rows x[0] .. x[count - 1].
inline void pack_rows(const CenteredCodes& codes, const float* const* x, int count, int64_t parts, void* memory) {
  const RowTile tile = row_tile(memory, codes.num_codes, codes.channels, parts);
  for (int row = 0; row < kTileRows; ++row) {
    if (row < count) {
      tile.squared[row] = codes.mean == nullptr ? squared_norm(x[row], codes.channels)
                                                : squared_distance(x[row], codes.mean, codes.channels);
    }
    // Squares of floats cannot overflow float64, so the norm is finite exactly if the row is.
    const bool there = row < count && __builtin_isfinite(tile.squared[row]);
    for (int64_t c = 0; c < codes.channels; ++c) {
      tile.x_cn[c * kTileRows + row] = !there ? 0.0f : codes.mean == nullptr ? x[row][c] : x[row][c] - codes.mean[c];
    }
  }
}

// Multiplies V vectors of rows with kCodeTile codes, `channels` apart, over `count` channels; stores the products or
// adds them to `products`. Prefetches from `ahead` for the next tiles. Not inlined: together with the caller's code,
// GCC would spill the rows' registers.
template <int V>
[[gnu::noinline]] void multiply_codes(const float* __restrict__ x_cn, const float* __restrict__ codes, int64_t channels,
                                      int64_t count, const float* ahead, bool add, float* __restrict__ products) {
  Vec dot[kCodeTile][V];
#pragma GCC unroll 16
  for (int i = 0; i < kCodeTile; ++i) {
    for (int v = 0; v < V; ++v) dot[i][v] = Vec::zero();
  }
  // One pointer per group of codes, the others by strides. Hidden from the compiler, which would otherwise keep a
  // pointer per code, more than there are registers.
  const float* group[kCodeTile / kCodeGroup];
  for (int i = 0; i < kCodeTile / kCodeGroup; ++i) group[i] = codes + kCodeGroup * i * channels;
  for (int64_t c = 0; c < count; ++c) {
    Vec r[V];
    for (int v = 0; v < V; ++v) r[v] = Vec::load(x_cn + c * kTileRows + v * Vec::kSize);
    __builtin_prefetch(ahead, 0, 2);
    ahead += kCodeTile;
#pragma GCC unroll 16
    for (int i = 0; i < kCodeTile / kCodeGroup; ++i) {
      const float* e = group[i]++;
      asm("" : "+r"(e));
#pragma GCC unroll 4
      for (int j = 0; j < kCodeGroup; ++j) {
        const Vec value = Vec::fill(e[j * channels]);
        for (int v = 0; v < V; ++v) dot[kCodeGroup * i + j][v] = fma(value, r[v], dot[kCodeGroup * i + j][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCodeTile; ++i) {
    for (int v = 0; v < V; ++v) {
      float* product = products + i * kTileRows + v * Vec::kSize;
      (add ? dot[i][v] + Vec::load(product) : dot[i][v]).store(product);
    }
  }
}

// Scores of the block of codes that starts with number `first`, stored at `codes`.
template <int V>
void score_block(const CenteredCodes& codebook, const RowTile& tile, const float* codes, int64_t first,
                 Vec (&lowest)[V]) {
  const int64_t channels = codebook.channels;
  alignas(64) float products[kCodeTile * kTileRows];
  for (int t = 0; t < kBlockCodes; t += kCodeTile) {
    const float *e = codes + t * channels, *next = e + kCodeTile * channels, *half = codebook.half_norms + first + t;
    for (int64_t c = 0; c < channels; c += kPart) {
      multiply_codes<V>(tile.x_cn + c * kTileRows, e + c, channels, channels - c < kPart ? channels - c : kPart,
                        next + c * kCodeTile, c > 0, products);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCodeTile; i += 4) {
      for (int v = 0; v < V; ++v) {
        Vec score[4];
        for (int j = 0; j < 4; ++j) {
          score[j] = Vec::fill(half[i + j]) - Vec::load(products + (i + j) * kTileRows + v * Vec::kSize);
          lowest[v] = min(score[j], lowest[v]);
        }
        store_columns(score[0], score[1], score[2], score[3],
                      tile.scores + v * Vec::kSize * tile.stride + first + t + i, tile.stride);
      }
    }
  }
}

template <int V>
void score_blocks(const CenteredCodes& codebook, const RowTile& tile, int64_t begin, int64_t end,
                  float* lowest_of_part) {
  const int64_t channels = codebook.channels;
  Vec lowest[V];
  for (int v = 0; v < V; ++v) lowest[v] = Vec::fill(__builtin_inff());
  for (int64_t first = begin; first < end; first += kBlockCodes) {
    const float* codes = codebook.centered_kc + first * channels;
    const int64_t left = codebook.num_codes - first;
    if (left < kBlockCodes) {
      for (int64_t i = 0; i < kBlockCodes * channels; ++i) tile.last_codes[i] = i < left * channels ? codes[i] : 0.0f;
      codes = tile.last_codes;
    }
    score_block<V>(codebook, tile, codes, first, lowest);
  }
  for (int v = 0; v < V; ++v) lowest[v].store(lowest_of_part + v * Vec::kSize);
}

// The scores of one share of `parts` of the codes, for the first `count` rows of a tile.
inline void scan_codes(const CenteredCodes& codebook, int count, int64_t part, int64_t parts, void* memory) {
  const RowTile tile = row_tile(memory, codebook.num_codes, codebook.channels, parts);
  const int64_t blocks = padded_codes(codebook.num_codes) / kBlockCodes;
  const int64_t begin = blocks * part / parts * kBlockCodes, end = blocks * (part + 1) / parts * kBlockCodes;
  if (count <= Vec::kSize) {
    score_blocks<1>(codebook, tile, begin, end, tile.lowest + part * kTileRows);
  } else {
    score_blocks<kTileVecs>(codebook, tile, begin, end, tile.lowest + part * kTileRows);
  }
}

constexpr CodeScoresKernels kCodeScores = {
    .tile_rows = kTileRows,
    .padded = padded_codes,
    .tile_bytes = row_tile_bytes,
    .pack_rows = pack_rows,
    .scan = scan_codes,
    .squared_distance = squared_distance,
    .squared_norm = squared_norm,
};

inline float lowest_of_row(const RowTile& tile, int64_t parts, int row) {
  float lowest = tile.lowest[row];
  for (int64_t part = 1; part < parts; ++part) {
    const float other = tile.lowest[part * kTileRows + row];
    lowest = other < lowest ? other : lowest;
  }
  return lowest;
}

// Calls visit(k) for all codes whose score is at most `limit`, in order; visit may overwrite that score.
template <class Visit>
inline void for_each_near(const float* scores, int64_t num_codes, float limit, Visit visit) {
  const Vec limits = Vec::fill(limit);
  for (int64_t k = 0; k < num_codes; k += Vec::kSize) {
    for (uint32_t near = cmp_le_mask(Vec::load(scores + k), limits); near != 0; near &= near - 1) {
      const int64_t found = k + __builtin_ctz(near);
      if (found < num_codes) visit(found);  // scores past the last code are +inf, which an infinite limit admits
    }
  }
}

inline bool few_are_near(const float* scores, int64_t num_codes, float limit, int64_t few) {
  const Vec limits = Vec::fill(limit);
  int64_t count = 0;
  for (int64_t k = 0; k < num_codes && count <= few; k += Vec::kSize) {
    count += __builtin_popcount(cmp_le_mask(Vec::load(scores + k), limits));
  }
  return count <= few;
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
