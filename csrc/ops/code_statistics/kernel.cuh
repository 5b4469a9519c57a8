// Counts and sums by code on a GPU: the direct, deterministic form, one block per code.
//
// A block reads all codes tile by tile into shared memory and adds the rows that are its own, in row order and float64,
// each thread its channels. Reads rows*8 bytes of codes per block, and x once over all blocks.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/code_statistics/params.h"

namespace rqk {
namespace code_statistics {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) gather(CodeStatisticsParams p) {
  CU_SHARED(int64_t, tile, [kThreads]);
  const float nan = __int_as_float(0x7fffffff);

  for (int64_t k = blockIdx.x; k < p.num_codes; k += gridDim.x) {
    int64_t count = 0;
    bool bad = false;
    // Channels in passes of one per thread; one pass where there are at most kThreads.
    for (int64_t first_channel = 0; first_channel < p.channels; first_channel += kThreads) {
      const int64_t c = first_channel + threadIdx.x;
      double sum = 0;
      count = 0;
      for (int64_t first = 0; first < p.rows; first += kThreads) {
        const int64_t n = first + threadIdx.x;
        const int64_t code = n < p.rows ? p.codes[n] : -1;
        tile[threadIdx.x] = code;
        const int own = __syncthreads_count(code == k);
        bad |= __syncthreads_or(code < -1 || code >= p.num_codes) != 0;
        count += own;
        for (int i = 0; own > 0 && i < kThreads; ++i) {
          if (tile[i] == k && c < p.channels) sum += double(p.x[(first + i) * p.channels + c]);
        }
        __syncthreads();  // before the next tile overwrites this one
      }
      if (c < p.channels) p.sums[k * p.channels + c] = bad ? nan : float(sum);
    }
    if (threadIdx.x == 0) p.counts[k] = bad ? nan : float(count);
  }
}

}  // namespace code_statistics
}  // namespace rqk
