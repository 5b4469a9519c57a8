// The scan: scores of all codes by tensor cores in bf16, and lists of the codes that bound B6 (docs/bounds.md) cannot
// rule out.
//
//   half distance = constant of the row - s_k;   computed: a_k = c_k + <p, q_k>, with p and q_k in bf16
//   a_k - A w_k - 2 B_k <= s_k <= a_k + A w_k;   A is `reach` of the row, w_k `width` of the code
// A row's `floor` is the largest lower bound so far, minus decision_slack (B1); only codes with a_k + A w_k > floor can
// win.
//
// A warp scores 32 rows x 128 codes in 128 accumulators; a block is one, two or four warps along the rows, which share
// the codes. The four threads of a quad see all codes of their rows: they own the floors and the lists of candidates
// until the decision. The rows stay in shared memory in bf16; the codes pass through a ring of kStages chunks of 32
// channels.
//
// Per chunk, a warp does 64 mma and 20 ldmatrix.x4 (10 KiB of shared memory, 160 bytes per mma); a block reads 8 KiB
// from L2, 32 bytes per mma with 128 rows. Per tile, 3 KiB of headers (half of it used), one max per score and one
// compare per 32 scores. Only if a row of a quad exceeds its floor, about 1.2 (ln(K/128) + 0.6) times per row on
// Gaussian data, the slow part raises the floor and stores a mask of codes. On sm_90: 146 instructions per chunk, about
// 15 more in a tile's first, 137 for the 128 scores of a thread; no spills at 255 registers.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/ptx.cuh"
#include "common/warp.cuh"
#include "ops/residual_search/bound.cuh"

namespace rqk {
namespace residual_search {

// True if the center is subtracted from the rows of depth d.
__device__ inline bool is_centered(int64_t d) { return d == 0; }

// Loads the rows of a block in bf16 (chunks, rows, kChunk) and fills their table. The whole block calls; both are
// visible after a barrier.
template <int kWarps>
__device__ inline void load_rows(const ResidualSearchParams& p, const Work& w, int64_t d, int64_t first_row,
                                 uint8_t* rows, RowTable<kWarps * kWarpRows>& table) {
  constexpr int kRows = kWarps * kWarpRows, kGroups = kRows / kLanes;
  const int64_t q = p.codebook_stride == 0 ? 0 : d;
  const float* center = w.centers + q * w.chunks * kChunk;
  const double max_norm = __int_as_float(w.extents[q].norm), max_centered = __int_as_float(w.extents[q].centered_norm);
  for (int row = threadIdx.x / kLanes; row < kRows; row += kGroups) {
    const float* r = first_row + row < p.rows ? residual_at(p, w, d, first_row + row) : nullptr;
    const Rounded rounded =
        round_row(r, is_centered(d) ? center : nullptr, p.channels, w.chunks, row, rows, kRows * kChunk * 2);
    if (lane_of_group() != 0) continue;
    const double norm = rounded_norm(rounded, p.channels), error = rounded_error(rounded, p.channels);
    const double reach = 1.0001 * max(norm + error, 1024 * error);
    // |r| + max|e|, where |center| <= |e| + |e - center|.
    const double extent = norm + (is_centered(d) ? max_norm + max_centered : 0.0) + max_norm;
    const bool scanned = reach < kLargest && max_centered < kLargest;
    table.state[row] = !rounded.finite ? kNotFinite : scanned ? kScanned : kDirect;
    table.reach[row] = scanned ? round_up(reach) : 0.0f;
    table.slack[row] = round_up(1.1 * (double(p.channels) / 8 + 8) * 0x1p-53 * extent * extent);
  }
}

// A thread's state of one of its rows.
struct RowScan {
  float reach, floor;
  int count;  // number of its candidates; or kDirect
};

// Adds a candidate; if the list is full, drops those below the floor first. A row whose list stays full is left to the
// direct search: its floor becomes infinite.
__device__ inline void keep(RowScan& row, const Candidate& candidate, Candidate* list) {
  if (row.count == kCapacity) {
    row.count = 0;
#pragma unroll 1
    for (int i = 0; i < kCapacity; ++i) {
      if (list[i].upper > row.floor) list[row.count++] = list[i];
    }
  }
  if (row.count == kCapacity) {
    row.floor = __int_as_float(0x7f800000);
    row.count = kDirect;
  } else {
    list[row.count++] = candidate;
  }
}

// Byte offset of a lane's 16-byte row for the first ldmatrix of a chunk, for 16 rows and for 16 codes. The next 16
// channels are 32 bytes away, up or down. The next 16 rows or codes have the same swizzle and lie 16 whole rows
// further.
__device__ inline int row_offset(int lane) { return unit_offset(lane % 16, lane / 16); }
__device__ inline int code_offset(int lane) { return unit_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

// scores += rows * codes over kSteps times 16 channels of a chunk; the first chunk begins with `start`. `rows`, `codes`
// and `start` are the lane's own.
template <bool kFirst, int kSteps>
__device__ inline void multiply_chunk(float (&scores)[2][16][4], const uint8_t* rows, const uint8_t* codes,
                                      int row_offset, int code_offset, const float (*start)[4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      ptx::ldmatrix_x4<false>(a[m], rows + 16 * m * (kChunk * 2) + (row_offset ^ 32 * step));
    }
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4<false>(b, codes + 16 * pair * (kChunk * 2) + (code_offset ^ 32 * step));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * pair + half;
        const uint32_t b_half[2] = {b[2 * half], b[2 * half + 1]};
        if (kFirst && step == 0) {
          const float4 from = *reinterpret_cast<const float4*>(start[4 * n]);
          const float c[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
          for (int m = 0; m < 2; ++m) ptx::mma_bf16(scores[m][n], a[m], b_half, c);
        } else {
#pragma unroll
          for (int m = 0; m < 2; ++m) ptx::mma_bf16(scores[m][n], a[m], b_half);
        }
      }
    }
  }
}

// The largest of a thread's scores of a row, in n-tiles [first, first + kCount).
template <int kCount>
__device__ inline float largest(const float (&scores)[16][4], int half, int first) {
  float top = max(scores[first][2 * half], scores[first][2 * half + 1]);
#pragma unroll
  for (int n = 1; n < kCount; ++n) {
    top = max(top, max(scores[first + n][2 * half], scores[first + n][2 * half + 1]));
  }
  return top;
}

// Finds the candidates among a tile's scores. The whole warp calls.
__device__ inline void select(const float (&scores)[2][16][4], const TileHeader& header, int32_t tile,
                              const float* slack, RowScan (&row)[4], Candidate* lists) {
  const int lane = threadIdx.x % 32;
  float top[4];
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    top[i] = largest<16>(scores[i / 2], i % 2, 0);
    any = any || top[i] > __fmaf_rn(-row[i].reach, header.widest, row[i].floor);
  }
  if (!__any_sync(kFullWarp, any)) return;

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float error = row[i].reach * header.widest;
    if (!__any_sync(kFullWarp, top[i] > row[i].floor - error)) continue;
    // Raise the quad's floor first, so that a first tile does not make all its codes candidates. 1e-5 and 2e-6 cover
    // the float32 rounding here and in the tests below.
    float floor = top[i] - (1.00001f * (error + header.gap + slack[lane / kQuad + 8 * i]) + 2e-6f * fabsf(top[i]));
    floor = max(floor, __shfl_xor_sync(kFullWarp, floor, 1));
    floor = max(floor, __shfl_xor_sync(kFullWarp, floor, 2));
    row[i].floor = max(row[i].floor, floor);
    if (!(top[i] > row[i].floor - error)) continue;
    uint32_t mask = 0;
#pragma unroll
    for (int first = 0; first < 16; first += 4) {
      if (!(largest<4>(scores[i / 2], i % 2, first) > row[i].floor - error)) continue;
      // Test each code by its own width: one outlier does not make all of its tile candidates.
#pragma unroll
      for (int n = first; n < first + 4; ++n) {
        const float2 width = *reinterpret_cast<const float2*>(header.width + 8 * n + 2 * (lane % kQuad));
        const float left = scores[i / 2][n][2 * (i % 2)], right = scores[i / 2][n][2 * (i % 2) + 1];
        if (left > __fmaf_rn(-row[i].reach, width.x, row[i].floor)) mask |= 1u << 2 * n;
        if (right > __fmaf_rn(-row[i].reach, width.y, row[i].floor)) mask |= 2u << 2 * n;
      }
    }
    if (mask != 0) keep(row[i], {top[i] + error, tile, mask}, lists + 8 * i * (kQuad * kCapacity));
  }
}

// Drops the candidates that the final floor rules out, and summarizes the others. The whole warp calls; lists, counts
// and summaries are those of the thread's first row.
__device__ inline void settle(const RowScan (&row)[4], Candidate* lists, int32_t* counts, Summary* summaries) {
  const float inf = __int_as_float(0x7f800000);
  // All reads are in flight at once.
  float upper[4][kCapacity];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int e = 0; e < kCapacity; ++e) {
      upper[i][e] = e < row[i].count ? lists[8 * i * (kQuad * kCapacity) + e].upper : -inf;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Candidate* list = lists + 8 * i * (kQuad * kCapacity);
    Summary sum{row[i].floor, -inf, 0, -1};
    int kept = 0, state = min(row[i].count, int(kScanned));
#pragma unroll
    for (int e = 0; e < kCapacity; ++e) {
      if (!(upper[i][e] > row[i].floor)) continue;
      const Candidate candidate = list[e];
      list[kept++] = candidate;
      sum.top = max(sum.top, candidate.upper);
      sum.codes += __popc(candidate.mask);
      sum.code = code_of(candidate.tile, __ffs(int(candidate.mask)) - 1, threadIdx.x % kQuad);
    }
#pragma unroll
    for (int lanes = 1; lanes < kQuad; lanes *= 2) {
      state = min(state, __shfl_xor_sync(kFullWarp, state, lanes));
      sum.floor = max(sum.floor, __shfl_xor_sync(kFullWarp, sum.floor, lanes));
      sum.top = max(sum.top, __shfl_xor_sync(kFullWarp, sum.top, lanes));
      sum.codes += __shfl_xor_sync(kFullWarp, sum.codes, lanes);
      sum.code = max(sum.code, __shfl_xor_sync(kFullWarp, sum.code, lanes));
    }
    if (state != kScanned) sum.codes = state;
    counts[8 * i * kQuad] = kept;
    if (threadIdx.x % kQuad == 0) summaries[8 * i] = sum;
  }
}

// Scans tiles [first_tile, last_tile) for the block's rows; writes its lists as number `slot`, and the rows' summaries.
// The whole block calls; another call needs a barrier first.
template <int kWarps>
__device__ inline void scan(const Work& w, const uint8_t* packed, int64_t first_tile, int64_t last_tile, bool centered,
                            const uint8_t* rows, uint8_t* ring, const RowTable<kWarps * kWarpRows>& table, int64_t slot,
                            Summary* summaries) {
  constexpr int kRows = kWarps * kWarpRows, kThreads = kWarps * 32;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kWarpRows, first_row = warp_row + lane / kQuad;
  auto* headers = reinterpret_cast<TileHeader*>(ring + kStages * kChunkBytes);

  // Chunks are fetched in scan order; a tile's header comes with its first chunk.
  const int chunks = int(w.chunks);
  int64_t tiles_to_fetch = last_tile - first_tile;
  int fetched_chunk = 0;
  const uint8_t* from = packed + first_tile * w.tile_bytes + 16 * threadIdx.x;
  int stage = 0, header_stage = 0;
  auto fetch = [&] {
    constexpr int kBytes = 16 * kThreads;  // per copy
    if (tiles_to_fetch > 0) {
      if (fetched_chunk == 0) {
        auto* to = reinterpret_cast<uint8_t*>(headers + header_stage) + 16 * threadIdx.x;
#pragma unroll
        for (int i = 0; i < int(sizeof(TileHeader)); i += kBytes) {
          if (i + 16 * int(threadIdx.x) >= int(sizeof(TileHeader))) break;
          ptx::cp_async_16(to + i, from + (centered ? 0 : sizeof(TileHeader)) + i);
        }
        from += 2 * sizeof(TileHeader);
        header_stage = header_stage + 1 == kStages ? 0 : header_stage + 1;
      }
      uint8_t* to = ring + stage * kChunkBytes + 16 * threadIdx.x;
#pragma unroll
      for (int i = 0; i < kChunkBytes; i += kBytes) ptx::cp_async_16(to + i, from + i);
      from += kChunkBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (++fetched_chunk == chunks) {
        fetched_chunk = 0;
        --tiles_to_fetch;
      }
    }
    // Commit even without copies, so that the number of groups tells which chunk has arrived.
    ptx::cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) fetch();
  __syncthreads();  // the table of the rows is visible

  // State of the thread's four rows.
  RowScan row[4];
  const float inf = __int_as_float(0x7f800000);
  for (int i = 0; i < 4; ++i) {
    const int r = first_row + 8 * i;
    row[i] = {table.reach[r], table.state[r] == kScanned ? -inf : inf, table.state[r]};
  }
  Candidate* lists = w.candidates + ((slot * kRows + first_row) * kQuad + lane % kQuad) * kCapacity;

  // Scan: multiply chunk by chunk, then select candidates per tile.
  const int rows_at = row_offset(lane), codes_at = code_offset(lane);
  int current = 0, current_header = 0;
  float scores[2][16][4];
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const TileHeader& header = headers[current_header];
    for (int chunk = 0; chunk < chunks; ++chunk) {
      // This chunk has arrived, and all threads are done with the previous one, which the next fetch overwrites.
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      fetch();
      const uint8_t* rows_chunk = rows + (chunk * kRows + warp_row) * (kChunk * 2);
      const uint8_t* codes_chunk = ring + current * kChunkBytes;
      if (chunk > 0) {
        multiply_chunk<false, 2>(scores, rows_chunk, codes_chunk, rows_at, codes_at, nullptr);
      } else if (w.halved) {
        multiply_chunk<true, 1>(scores, rows_chunk, codes_chunk, rows_at, codes_at, header.start + lane % kQuad);
      } else {
        multiply_chunk<true, 2>(scores, rows_chunk, codes_chunk, rows_at, codes_at, header.start + lane % kQuad);
      }
      current = current + 1 == kStages ? 0 : current + 1;
    }
    select(scores, header, int32_t(tile), table.slack + warp_row, row, lists);
    current_header = current_header + 1 == kStages ? 0 : current_header + 1;
  }
  ptx::cp_async_wait<0>();

  const int64_t place = slot * kRows + first_row;
  settle(row, lists, w.counts + place * kQuad + lane % kQuad, summaries + first_row);
}

}  // namespace residual_search
}  // namespace rqk
