// Stochastic residual search on a GPU: all depths of a row in one block, float64 throughout.
//
// The codes are divided into 32 parts, in code order, and a group of eight threads sums the weights of each: exp(-(D -
// smallest D) / tau), with the definition's distances D. The part in which the cumulative weight exceeds u times the
// total is divided into 32 parts again, until a part is one code. Only the first round reads the whole codebook, and no
// array of weights is stored. In that round the smallest distance is not known yet: each group uses its own, and the
// sums are rescaled in the end. The residual stays in shared memory over all depths. Per row and depth, the kernel
// reads the codebook 1 + 1/32 + ... times (K*C*4 bytes, from L2) and does 3*K*C float64 operations and K exponentials.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/philox.h"
#include "ops/stochastic_residual_search/params.h"
#include "shared/exact.cuh"

namespace rqk {
namespace stochastic_residual_search {

constexpr int kThreads = 256;
constexpr int64_t kMaxChannels = 8192;  // 32 KiB of the 48 KiB of shared memory available to every launch
constexpr int kParts = kThreads / kLanes;

// Computes the smallest distance of codes [first, last), and the sum of their weights relative to it. A distance that
// is not finite (a bad code or row) weighs nothing. All threads of the group call.
__device__ inline void sum_first(const StochasticResidualSearchParams& p, const float* residual, const float* codebook,
                                 int64_t first, int64_t last, double* nearest, double* sum) {
  const double inf = __int_as_float(0x7f800000);
  *nearest = inf;
  *sum = 0;
  for (int64_t k = first; k < last; ++k) {
    const double distance = squared_distance(residual, codebook + k * p.channels, p.channels);
    if (!(distance < inf)) continue;
    if (distance < *nearest) {
      // Do not use the initial infinity: divided by an infinite tau it would be NaN.
      *sum = 1 + (*sum > 0 ? *sum * exp(-(*nearest - distance) / p.tau) : 0);
      *nearest = distance;
    } else {
      *sum += exp(-(distance - *nearest) / p.tau);
    }
  }
}

// The same sum relative to a known distance.
__device__ inline double sum_again(const StochasticResidualSearchParams& p, const float* residual,
                                   const float* codebook, int64_t first, int64_t last, double nearest) {
  const double inf = __int_as_float(0x7f800000);
  double sum = 0;
  for (int64_t k = first; k < last; ++k) {
    const double distance = squared_distance(residual, codebook + k * p.channels, p.channels);
    if (distance < inf) sum += exp(-(distance - nearest) / p.tau);
  }
  return sum;
}

// At least 3 blocks per multiprocessor, 80 registers.
__global__ void __launch_bounds__(kThreads, 3) sample_rows(StochasticResidualSearchParams p) {
  CU_DYN_SMEM(float, residual);  // (channels)
  CU_SHARED(double, part_nearest, [kParts]);
  CU_SHARED(double, part_sum, [kParts]);
  CU_SHARED(double, row_nearest);
  CU_SHARED(int64_t, chosen);  // the first code of the chosen part; -1 if no code has any weight
  const int part = threadIdx.x / kLanes, j = threadIdx.x % kLanes;
  const float nan = __int_as_float(0x7fffffff);

  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
      residual[c] = p.x[row * p.channels + c];
      p.quantized[row * p.channels + c] = 0.0f;
    }
    __syncthreads();

    for (int64_t d = 0; d < p.depth; ++d) {
      const float* codebook = p.codebooks + d * p.codebook_stride;
      int64_t first = 0, last = p.num_codes;
      double target = 0;  // thread 0: what the cumulative weight within [first, last) must exceed
      for (bool whole = true; first >= 0 && (whole || last - first > 1); whole = false) {
        const int64_t size = (last - first + kParts - 1) / kParts;
        const int64_t begin = first + part * size, end = begin + size < last ? begin + size : last;
        // Sum the weights of each part.
        double nearest, sum;
        if (whole) {
          sum_first(p, residual, codebook, begin, end, &nearest, &sum);
        } else {
          nearest = row_nearest;
          sum = sum_again(p, residual, codebook, begin, end, nearest);
        }
        if (j == 0) {
          part_nearest[part] = nearest;
          part_sum[part] = sum;
        }
        __syncthreads();
        // Choose the part that contains the target.
        if (threadIdx.x == 0) {
          if (whole) {
            for (int i = 1; i < kParts; ++i) nearest = part_nearest[i] < nearest ? part_nearest[i] : nearest;
            row_nearest = nearest;
            double total = 0;
            for (int i = 0; i < kParts; ++i) {
              if (part_sum[i] > 0) part_sum[i] *= exp(-(part_nearest[i] - nearest) / p.tau);
              total += part_sum[i];
            }
            const uint64_t counter = static_cast<uint64_t>(p.offset + row);
            target = total * philox_uniform(p.seed, counter, static_cast<uint32_t>(d), kPhiloxStochasticResidualSearch);
          }
          // Sums over other parts round differently, so the target may not be reached: then take the last part with any
          // weight.
          int64_t found = -1;
          double up_to = 0, before = 0;
          for (int i = 0; i < kParts && !(up_to > target); ++i) {
            if (!(part_sum[i] > 0)) continue;
            found = i;
            before = up_to;
            up_to += part_sum[i];
          }
          target -= before;
          chosen = found < 0 ? -1 : first + found * size;
        }
        __syncthreads();
        first = chosen;
        last = first + size < last ? first + size : last;
      }

      // Subtract the code and write the results of this depth.
      for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
        const float r = residual[c], e = first < 0 ? nan : codebook[first * p.channels + c];
        if (p.residuals != nullptr) p.residuals[(row * p.depth + d) * p.channels + c] = r;
        residual[c] = r - e;
        p.quantized[row * p.channels + c] += e;
      }
      __syncthreads();
      if (threadIdx.x < kLanes) {
        const double norm = squared_distance(residual, nullptr, p.channels);
        if (threadIdx.x == 0) {
          p.codes[row * p.depth + d] = first;
          p.residual_sq_norms[row * p.depth + d] = float(norm);
        }
      }
      // The next row overwrites the residual. The next depth only reads it, and writes shared memory after a barrier.
      if (d + 1 == p.depth) __syncthreads();
    }
  }
}

}  // namespace stochastic_residual_search
}  // namespace rqk
