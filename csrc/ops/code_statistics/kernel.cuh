// Counts and sums by code on a GPU: a stable radix sort of the rows by code, then each code adds its rows.
//
// An item is a row at a depth; its key is its code, plus an offset per depth if each depth has its own statistics.
// Digits have 8 bits, the lowest first. Each digit takes three kernels: count_digits (a histogram per chunk of items),
// scan_chunks (where each chunk's items of a digit begin), place_items (ranks by warp match and counts per warp, so
// that the order does not depend on timing). find_segments finds each key's items, and add_rows adds them in float64, a
// thread per kWidth channels of a key. A key with more than kRowsPerPiece items is added in pieces by as many threads,
// and add_pieces adds the pieces in order: rows that all chose one code are spread over the device like any others.
//
// Moves, for M items of K keys: M*(8 + 8 + 8) bytes for the first digit, M*(4 + 8 + 8) for each other, then x once, M*4
// bytes of item numbers, K*C*4 of sums; M*C additions in float64. The only atomics are those of integer histograms in
// shared memory. The number of chunks is bounded (kMaxChunks), so the workspace has 16 M + 4 K bytes, 1/256 of x for
// pieces, and 1 MiB.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/warp.cuh"
#include "ops/code_statistics/params.h"

namespace rqk {
namespace code_statistics {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kDigits == kThreads, "a thread is a digit where a block scans them");
constexpr int kItemsPerThread = 4, kTile = kThreads * kItemsPerThread;
constexpr int kMaxChunks = 1024;
// Rows that a thread loads before it adds the first of them, to hide the memory latency.
constexpr int kRowsAhead = 8;
// The key of an item without a code: it matches no digit, so the first pass drops it.
constexpr uint32_t kDropped = 0xffffffffu;

// Pointers into the workspace.
struct Workspace {
  int64_t items, keys, windows;
  int chunks;
  int64_t items_per_chunk;
  int pass;  // digit of the sort; pass 0 reads the codes, later ones the arrays that the previous pass wrote
  uint32_t *keys_in, *items_in;    // (items) each; sorted in the end
  uint32_t *keys_out, *items_out;  // (items) each
  uint32_t* places;                // (kDigits, chunks): counts, then offsets within the digit
  uint32_t* totals;                // (kDigits)
  uint32_t* bad_in_chunk;          // (chunks)
  uint32_t* valid;                 // (1): number of items with a code
  uint32_t* bad;                   // (1): whether any code is out of range
  uint32_t* begin;                 // (keys + 1)
  double* pieces;                  // (windows, 2, channels)
};

// The key of item i; sets `bad` if its code is out of range.
__device__ inline uint32_t key_of(const CodeStatisticsParams& p, int64_t i, bool& bad) {
  const int64_t n = p.depth == 1 ? i : i / p.depth, d = i - n * p.depth;
  const int64_t code = p.codes[n * p.code_row_stride + d * p.code_depth_stride];
  bad |= code < -1 || code >= p.num_codes;
  if (code < 0 || code >= p.num_codes) return kDropped;
  return static_cast<uint32_t>(code + (p.codebooks > 1 ? d * p.num_codes : 0));
}

// Counts the digits of each chunk. Grid: chunks.
__global__ void __launch_bounds__(kThreads) count_digits(CodeStatisticsParams p, Workspace w) {
  CU_SHARED(uint32_t, count, [kDigits]);
  count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * w.items_per_chunk;
  const int64_t end = min(first + w.items_per_chunk, w.pass == 0 ? w.items : int64_t(*w.valid));
  bool bad = false;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = w.pass == 0 ? key_of(p, i, bad) : w.keys_in[i];
    if (key != kDropped) atomicAdd(&count[(key >> (w.pass * kDigitBits)) % kDigits], 1u);
  }
  const int any_bad = __syncthreads_or(bad);
  w.places[int64_t(threadIdx.x) * w.chunks + blockIdx.x] = count[threadIdx.x];
  if (w.pass == 0 && threadIdx.x == 0) w.bad_in_chunk[blockIdx.x] = any_bad != 0;
}

// Turns each digit's counts by chunk into the number of its items in earlier chunks. One warp per digit.
__global__ void __launch_bounds__(kThreads) scan_chunks(Workspace w) {
  const int lane = threadIdx.x % 32;
  const int64_t digit = blockIdx.x * kWarps + threadIdx.x / 32;
  uint32_t* places = w.places + digit * w.chunks;
  uint32_t total = 0;
  bool bad = false;
  for (int first = 0; first < w.chunks; first += 32) {
    const int chunk = first + lane;
    const uint32_t count = chunk < w.chunks ? places[chunk] : 0;
    const uint32_t inclusive = scan_of_warp(count);
    if (chunk < w.chunks) places[chunk] = total + inclusive - count;
    total += __shfl_sync(kFullWarp, inclusive, 31);
    bad |= w.pass == 0 && digit == 0 && chunk < w.chunks && w.bad_in_chunk[chunk] != 0;
  }
  if (lane == 0) w.totals[digit] = total;
  if (w.pass > 0 || digit > 0) return;
  const int any_bad = __any_sync(kFullWarp, bad);
  if (lane == 0) *w.bad = any_bad != 0;
}

// Moves every item to its place among those of its digit, in stable order. Grid: chunks.
__global__ void __launch_bounds__(kThreads) place_items(CodeStatisticsParams p, Workspace w) {
  CU_SHARED(uint32_t, warp_totals, [kWarps]);
  // First the number of items with a digit that a warp has found in this tile, then the place of the first of them.
  CU_SHARED(uint32_t, place, [kWarps][kDigits]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, shift = w.pass * kDigitBits;
  const int64_t items = w.pass == 0 ? w.items : int64_t(*w.valid);
  const int64_t first = blockIdx.x * w.items_per_chunk, end = min(first + w.items_per_chunk, items);

  // Thread d holds the place of the next item with digit d.
  uint32_t next = w.totals[threadIdx.x], valid = 0;
  const uint32_t inclusive = scan_of_warp(next);
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  next = inclusive - next + w.places[int64_t(threadIdx.x) * w.chunks + blockIdx.x];
  for (int j = 0; j < kWarps; ++j) {
    if (j < warp) next += warp_totals[j];
    valid += warp_totals[j];
  }
  // Later passes read this.
  if (w.pass == 0 && blockIdx.x == 0 && threadIdx.x == 0) *w.valid = valid;

  for (int64_t tile = first; tile < end; tile += kTile) {
    for (int j = 0; j < kWarps; ++j) place[j][threadIdx.x] = 0;
    __syncthreads();
    // Rank each item among those of its digit in its warp.
    uint32_t key[kItemsPerThread], number[kItemsPerThread], rank[kItemsPerThread];
    for (int j = 0; j < kItemsPerThread; ++j) {
      const int64_t i = tile + (warp * kItemsPerThread + j) * 32 + lane;
      bool bad = false;
      key[j] = i >= end ? kDropped : w.pass == 0 ? key_of(p, i, bad) : w.keys_in[i];
      number[j] = w.pass == 0 || i >= end ? static_cast<uint32_t>(i) : w.items_in[i];
      const uint32_t digit = key[j] == kDropped ? kDigits : (key[j] >> shift) % kDigits;
      const unsigned same = __match_any_sync(kFullWarp, digit);
      const unsigned before = same & ((1u << lane) - 1);
      rank[j] = digit == kDigits ? 0 : place[warp][digit] + __popc(before);
      __syncwarp();
      if (before == 0 && digit < kDigits) place[warp][digit] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    // Turn the counts of the warps into places.
    for (int j = 0; j < kWarps; ++j) {
      const uint32_t count = place[j][threadIdx.x];
      place[j][threadIdx.x] = next;
      next += count;
    }
    __syncthreads();
    // Write the items.
    for (int j = 0; j < kItemsPerThread; ++j) {
      if (key[j] == kDropped) continue;
      const uint32_t at = place[warp][(key[j] >> shift) % kDigits] + rank[j];
      w.keys_out[at] = key[j];
      w.items_out[at] = number[j];
    }
    __syncthreads();  // before the next tile clears the places
  }
}

// Finds begin[k] .. begin[k + 1], the items of key k. One thread per key.
__global__ void __launch_bounds__(kThreads) find_segments(Workspace w) {
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k <= w.keys; k += int64_t(gridDim.x) * kThreads) {
    uint32_t low = 0, high = *w.valid;
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (w.keys_in[middle] < k) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    w.begin[k] = low;
  }
}

struct Piece {
  int64_t key, begin, end;
};

// Finds the pieces of long keys by where they begin. A window of kRowsPerPiece places holds at most one first piece of
// a key and at most one later piece: only a key's last piece is shorter than the window, so that another piece may
// begin behind it, and that is a long key's first piece, which reaches beyond the window. Returns an empty piece if
// there is none.
__device__ inline Piece piece_at(const Workspace& w, int64_t window, bool later) {
  const int64_t start = window * kRowsPerPiece, valid = *w.valid;
  // A long key whose first piece begins in this window holds the first place of the next window and begins before it.
  // One with a later piece here holds the first place of this window and begins before that.
  const int64_t inside = later ? start : start + kRowsPerPiece;
  if (inside >= valid) return {0, 0, 0};
  const int64_t key = w.keys_in[inside], begin = w.begin[key], end = w.begin[key + 1];
  if (end - begin <= kRowsPerPiece || begin == inside || (begin < start) != later) return {0, 0, 0};
  const int64_t from = later ? begin + (start - begin + kRowsPerPiece - 1) / kRowsPerPiece * kRowsPerPiece : begin;
  return from < end ? Piece{key, from, min(from + kRowsPerPiece, end)} : Piece{0, 0, 0};
}

template <int kWidth>
__device__ inline void load(const float* from, float (&values)[kWidth]) {
  if constexpr (kWidth == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
    for (int c = 0; c < kWidth; ++c) values[c] = from[c];
  }
}

template <int kWidth>
__device__ inline void load_item(const CodeStatisticsParams& p, uint32_t item, int64_t c, float (&values)[kWidth]) {
  const uint32_t depth = static_cast<uint32_t>(p.depth), n = depth == 1 ? item : item / depth, d = item - n * depth;
  load(p.x + n * p.x_row_stride + d * p.x_depth_stride + c, values);
}

// Adds channels c .. c + kWidth of items[begin .. end) to `sum`, in order.
template <int kWidth>
__device__ inline void add_items(const CodeStatisticsParams& p, const uint32_t* items, int64_t begin, int64_t end,
                                 int64_t c, double (&sum)[kWidth]) {
  int64_t i = begin;
  for (; i + kRowsAhead <= end; i += kRowsAhead) {
    float ahead[kRowsAhead][kWidth];
    for (int j = 0; j < kRowsAhead; ++j) load_item(p, items[i + j], c, ahead[j]);
    for (int j = 0; j < kRowsAhead; ++j) {
      for (int v = 0; v < kWidth; ++v) sum[v] += double(ahead[j][v]);
    }
  }
  for (; i < end; ++i) {
    float row[kWidth];
    load_item(p, items[i], c, row);
    for (int v = 0; v < kWidth; ++v) sum[v] += double(row[v]);
  }
}

// Division of work in add_rows and add_pieces: a block has 2^log_columns neighbouring threads for the columns of a
// unit, and blockIdx.y selects further columns of the same units. A power of two avoids integer division.
struct Share {
  int64_t unit, stride, column;
  __device__ explicit Share(int log_columns)
      : unit((int64_t(blockIdx.x) * kThreads + threadIdx.x) >> log_columns),
        stride((int64_t(gridDim.x) * kThreads) >> log_columns),
        column((int64_t(blockIdx.y) << log_columns) + (threadIdx.x & ((1u << log_columns) - 1))) {}
};

// A unit is a piece (first, since they take longest) or a key; a column is kWidth channels. kWidth 4 requires rows
// aligned to 16 bytes.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) add_rows(CodeStatisticsParams p, Workspace w, int log_columns) {
  const float nan = __int_as_float(0x7fffffff);
  const bool bad = *w.bad != 0;
  const Share share(log_columns);
  const int64_t c = share.column * kWidth;
  if (c >= p.channels) return;
  for (int64_t unit = share.unit; unit < 2 * w.windows + w.keys; unit += share.stride) {
    const int64_t k = unit - 2 * w.windows;
    double sum[kWidth] = {};
    if (k < 0) {
      const Piece piece = piece_at(w, unit / 2, unit % 2 != 0);
      if (piece.begin == piece.end) continue;
      add_items<kWidth>(p, w.items_in, piece.begin, piece.end, c, sum);
      for (int v = 0; v < kWidth; ++v) w.pieces[unit * p.channels + c + v] = sum[v];
    } else {
      const int64_t begin = w.begin[k], end = w.begin[k + 1];
      if (c == 0) p.counts[k] = bad ? nan : float(end - begin);
      if (end - begin > kRowsPerPiece) continue;
      add_items<kWidth>(p, w.items_in, begin, end, c, sum);
      for (int v = 0; v < kWidth; ++v) p.sums[k * p.channels + c + v] = bad ? nan : float(sum[v]);
    }
  }
}

// A unit is a window, for the long key whose first piece begins there. A column is a channel.
__global__ void __launch_bounds__(kThreads) add_pieces(CodeStatisticsParams p, Workspace w, int log_columns) {
  const float nan = __int_as_float(0x7fffffff);
  const bool bad = *w.bad != 0;
  const Share share(log_columns);
  const int64_t c = share.column;
  if (c >= p.channels) return;
  for (int64_t window = share.unit; window < w.windows; window += share.stride) {
    const Piece first = piece_at(w, window, false);
    if (first.begin == first.end) continue;
    const int64_t rows = int64_t(w.begin[first.key + 1]) - first.begin;
    double sum = w.pieces[2 * window * p.channels + c];
    for (int64_t i = 1; i * kRowsPerPiece < rows; ++i) sum += w.pieces[(2 * (window + i) + 1) * p.channels + c];
    p.sums[first.key * p.channels + c] = bad ? nan : float(sum);
  }
}

}  // namespace code_statistics
}  // namespace rqk
