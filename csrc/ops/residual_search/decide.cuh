// The decision: evaluates a row's candidates by the definition, with eight threads per row. A single candidate is taken
// without evaluation. If the scan found too many, or could not handle the row, the block searches all codes directly.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/residual_search/groups.cuh"
#include "ops/residual_search/nearest.h"

namespace rqk {
namespace residual_search {

// Chooses among candidates. The first one is evaluated only if there is a second.
struct Decision {
  Nearest nearest;
  int seen = 0;

  __device__ void see(const float* r, const float* codebook, int64_t channels, int64_t k) {
    if (seen++ == 0) {
      nearest.code = k;
      return;
    }
    if (seen == 2) nearest.distance = squared_distance(r, codebook + nearest.code * channels, channels);
    nearest.update(k, squared_distance(r, codebook + k * channels, channels));
  }
};

// Decides row `row` of the block of rows whose lists start at `slot`, `rows_of_block` per split, with these summaries.
// Returns its state; the code is valid for kScanned.
__device__ inline int decide_row(const ResidualSearchParams& p, const Work& w, const float* r, const float* codebook,
                                 int64_t slot, const Summary* summaries, int rows_of_block, int row,
                                 Decision& decision) {
  const int j = lane_of_group();
  const unsigned mask = group_mask();
  // Merge the summaries of all splits.
  int state = kScanned, codes = 0, code = -1;
  float floor = -__int_as_float(0x7f800000);
  for (int s = j; s < w.splits; s += kLanes) {
    const Summary summary = summaries[s * rows_of_block + row];
    state = min(state, summary.codes);
    floor = max(floor, summary.floor);
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    state = min(state, __shfl_xor_sync(mask, state, lanes, kLanes));
    floor = max(floor, __shfl_xor_sync(mask, floor, lanes, kLanes));
  }
  if (state != kScanned) return state;
  // A single candidate needs no evaluation.
  for (int s = j; s < w.splits; s += kLanes) {
    const Summary summary = summaries[s * rows_of_block + row];
    if (!(summary.top > floor)) continue;
    codes += summary.codes;
    code = summary.code;
  }
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    codes += __shfl_xor_sync(mask, codes, lanes, kLanes);
    code = max(code, __shfl_xor_sync(mask, code, lanes, kLanes));
  }
  if (codes <= 1) {
    decision.nearest.code = code;
    return state;
  }

  // Evaluate the candidates of all lists, eight lists at a time.
  // List l belongs to split l / kQuad and thread l % kQuad.
  const int lists = w.splits * kQuad;
  auto place = [&](int l) { return (slot + l / kQuad) * rows_of_block + row; };
  for (int first = 0; first < lists; first += kLanes) {
    const int l = first + j;
    const int64_t list = l < lists ? place(l) * kQuad + l % kQuad : 0;
    const int count = l < lists ? w.counts[list] : 0;
    int longest = count;
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      longest = max(longest, __shfl_xor_sync(mask, longest, lanes, kLanes));
    }
    for (int i = 0; i < longest; ++i) {
      Candidate mine{0, 0, 0};
      if (i < count) mine = w.candidates[list * kCapacity + i];
      const bool alive = i < count && mine.upper > floor;
      unsigned left = __ballot_sync(mask, alive) >> (threadIdx.x % 32 / kLanes * kLanes) & 0xffu;
      for (; left != 0; left &= left - 1) {
        const int from = __ffs(int(left)) - 1;
        const int32_t tile = __shfl_sync(mask, mine.tile, from, kLanes);
        for (uint32_t rest = __shfl_sync(mask, mine.mask, from, kLanes); rest != 0; rest &= rest - 1) {
          const int bit = __ffs(int(rest)) - 1;
          decision.see(r, codebook, p.channels, code_of(tile, bit, from % kQuad));
        }
      }
    }
  }
  if (decision.seen > 1 && j == 0)
    atomicAdd(&w.counters->evaluated_codes, static_cast<unsigned long long>(decision.seen));
  return state;
}

// Decides rows [first_row, first_row + num_rows) and takes their codes. They are rows `first`.. of the block of rows
// whose lists start at `slot`, with these summaries. The whole block calls; another call needs a barrier first.
__device__ inline void decide_rows(const ResidualSearchParams& p, const Work& w, int64_t d, int64_t first_row,
                                   int num_rows, int64_t slot, const Summary* summaries, int first,
                                   DirectRows& shared) {
  const float* codebook = codebook_at(p, d);
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (int i = threadIdx.x / kLanes; i < num_rows; i += blockDim.x / kLanes) {
    const int64_t row = first_row + i;
    Decision decision;
    const int state = w.warps == 0 ? kDirect
                                   : decide_row(p, w, residual_at(p, w, d, row), codebook, slot, summaries,
                                                w.warps * kWarpRows, first + i, decision);
    if (state != kDirect) {
      take_code(p, w, d, row, state == kScanned ? decision.nearest.code : -1);
    } else if (lane_of_group() == 0) {
      shared.row[atomicAdd(&shared.count, 1)] = i;
    }
  }
  __syncthreads();
  for (int i = 0; i < shared.count; ++i) {
    const int64_t row = first_row + shared.row[i];
    const int64_t k = nearest_of_all(p, residual_at(p, w, d, row), codebook, shared);
    if (threadIdx.x < kLanes) take_code(p, w, d, row, k);
  }
  if (threadIdx.x == 0 && w.counters != nullptr && shared.count > 0) {
    atomicAdd(&w.counters->direct_rows, static_cast<unsigned long long>(shared.count));
  }
}

}  // namespace residual_search
}  // namespace rqk
