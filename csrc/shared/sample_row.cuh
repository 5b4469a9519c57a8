// Samples one code from one row of logits on a GPU, with one block. shared/sample_row.h gives the definition.
//
// Both cuts are thresholds on the bits of a float, found digit by digit (11, 11 and 10 bits): a histogram in shared
// memory of the codes' mass (their number or their weights), and the bin that contains the target. Weights are
// integers, so their sums are exact in any order: the code does not depend on atomics or the number of threads. Bound
// B14 (docs/bounds.md).
//
// A row is read once for its largest logit, three times for top_k, three times for top_p and once to sample, after the
// first time from L1 or L2. Exponentials: one per code that top_k keeps (for top_p), and one per code kept in the end.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/warp.cuh"
#include "shared/sample_settings.h"

namespace rqk {

constexpr int kSampleBins = 2048;

// The block's shared memory; its contents do not matter before or after a call.
template <int kThreads>
struct SampleShared {
  static constexpr int kWarps = kThreads / 32;
  uint32_t low[kSampleBins], high[kSampleBins];  // mass of each bin, in two words
  uint64_t weights[kWarps];
  int64_t indices[kWarps];
  float largest[kWarps];
  uint32_t ties[kWarps];
  double target;
  uint64_t above;
  int64_t first, sampled;
  uint32_t digit;
};

// Maps floats to keys in the same order; both zeros have the same key.
__device__ inline uint32_t sample_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of_sample_key(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

// exp((x - largest) / temperature) as an integer.
struct SampleWeight {
  float largest;
  double inverse, scale;
  __device__ SampleWeight(float largest_, double temperature, int64_t num_codes) : largest(largest_), scale(0x1p62) {
    // If the inverse overflows, all but the largest logit still weigh nothing.
    inverse = 1 / temperature < 1e300 ? 1 / temperature : 1e300;
    for (int64_t codes = 1; codes < num_codes; codes *= 2) scale /= 2;
  }
  __device__ uint64_t operator()(float x) const {
    return static_cast<uint64_t>(exp((double(x) - double(largest)) * inverse) * scale + 0.5);
  }
};

// The kept codes: those with a larger key, and the first `ties` with this key.
struct SampleKept {
  uint32_t key;
  uint32_t ties;
};

__device__ inline void add_to_bin(uint32_t* low, uint32_t* high, uint64_t measure) {
  const uint32_t part = static_cast<uint32_t>(measure);
  const uint32_t carry = atomicAdd(low, part) > 0xffffffffu - part ? 1 : 0;
  const uint32_t rest = static_cast<uint32_t>(measure >> 32) + carry;
  if (rest != 0) atomicAdd(high, rest);
}

// Finds, among the codes kept by `from`, the smallest key to keep: codes with larger keys have less mass than the
// target, which is top_k codes or (kWeighted) the fraction top_p of all weights. Codes equal to it have the same mass
// `each`, and those are kept that have less than the target before them. The whole block calls.
template <bool kWeighted, int kThreads>
__device__ inline SampleKept sample_threshold(const float* logits, int64_t num_codes, const SampleSettings& settings,
                                              const SampleKept& from, const SampleWeight& weight,
                                              SampleShared<kThreads>& at) {
  uint32_t prefix = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int width = pass < 2 ? 11 : 10, shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    // Clear the histogram.
    for (int i = threadIdx.x; i < kSampleBins; i += kThreads) at.low[i] = at.high[i] = 0;
    __syncthreads();
    // The bin of a key, or the number of bins if it has another prefix.
    auto bin_of = [prefix, shift, width](uint32_t key) {
      return uint64_t(key) >> (shift + width) == prefix ? (key >> shift) & ((1u << width) - 1) : kSampleBins;
    };
    // Add up the mass of each bin.
    for (int64_t c = threadIdx.x; c < num_codes; c += kThreads) {
      const float x = logits[c];
      const uint32_t key = sample_key(x), bin = bin_of(key);
      if (bin == kSampleBins || key <= from.key) continue;
      add_to_bin(&at.low[bin], &at.high[bin], kWeighted ? weight(x) : 1);
    }
    if (threadIdx.x == 0 && from.ties > 0 && bin_of(from.key) != kSampleBins) {
      const uint32_t bin = bin_of(from.key);
      add_to_bin(&at.low[bin], &at.high[bin], from.ties * (kWeighted ? weight(value_of_sample_key(from.key)) : 1));
    }
    __syncthreads();
    // Find the bin with the target.
    if (threadIdx.x < 32) {
      // Scans from the largest bin down, 64 bins per lane; lanes start at different bins to avoid bank conflicts.
      constexpr int kEach = kSampleBins / 32;
      const int lane = threadIdx.x, last = kSampleBins - 1 - lane * kEach;
      uint64_t sum = 0;
      for (int j = 0; j < kEach; ++j) {
        const int bin = last - (j + lane) % kEach;
        sum += uint64_t(at.high[bin]) << 32 | at.low[bin];
      }
      uint64_t up_to = scan_of_warp(sum);
      if (pass == 0) {
        const uint64_t total = __shfl_sync(kFullWarp, up_to, 31);
        if (lane == 0) {
          at.target = kWeighted ? settings.top_p * double(total) : double(settings.top_k);
          at.above = 0;
        }
        __syncwarp();
      }
      const double target = at.target;
      up_to += at.above;
      __syncwarp();
      const unsigned reached = __ballot_sync(kFullWarp, double(up_to) >= target);
      if (lane == __ffs(reached) - 1) {
        uint64_t above = up_to - sum;
        int bin = last;
        for (; bin > last - kEach + 1; --bin) {
          const uint64_t next = above + (uint64_t(at.high[bin]) << 32 | at.low[bin]);
          if (double(next) >= target) break;
          above = next;
        }
        at.above = above;
        at.digit = bin;
      }
    }
    __syncthreads();
    prefix = prefix << width | at.digit;
  }
  const uint64_t above = at.above;
  const double target = at.target;
  if (!kWeighted) return {prefix, static_cast<uint32_t>(settings.top_k - above)};
  const uint64_t each = weight(value_of_sample_key(prefix));
  uint64_t ties = static_cast<uint64_t>((target - double(above)) / double(each));
  while (ties > 0 && double(above + (ties - 1) * each) >= target) --ties;
  while (double(above + ties * each) < target) ++ties;
  return {prefix, static_cast<uint32_t>(ties)};
}

// Returns a code in [0, num_codes), or -1 if the row has NaN, +inf, or nothing but -inf; the same for all threads of
// the block, which must all call. uniform is in (0, 1). The logits must have been written before a barrier. Another
// call may follow at once; other uses of the shared memory need a barrier first.
template <int kThreads>
__device__ inline int64_t sample_row(const float* logits, int64_t num_codes, const SampleSettings& settings,
                                     double uniform, SampleShared<kThreads>& at) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kThreads % 32 == 0 && kWarps <= 32);
  const float inf = __int_as_float(0x7f800000);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // The largest logit and its lowest index; greedy sampling is done then.
  float largest = -inf;
  int64_t index = num_codes;
  bool is_number = true;
  for (int64_t c = threadIdx.x; c < num_codes; c += kThreads) {
    const float x = logits[c];
    is_number = is_number && x == x;
    if (x > largest) largest = x, index = c;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, largest, lanes);
    const int64_t other_index = __shfl_xor_sync(kFullWarp, index, lanes);
    if (other > largest || (other == largest && other_index < index)) largest = other, index = other_index;
  }
  if (lane == 0) {
    at.largest[warp] = largest;
    at.indices[warp] = index;
  }
  is_number = __syncthreads_and(is_number);
  for (int i = 0; i < kWarps; ++i) {
    if (at.largest[i] > largest || (at.largest[i] == largest && at.indices[i] < index)) {
      largest = at.largest[i];
      index = at.indices[i];
    }
  }
  const bool is_good = is_number && largest > -inf && largest < inf;
  if (!is_good || settings.temperature == 0 || settings.top_k == 1) {
    __syncthreads();
    return is_good ? index : -1;
  }

  // The two cuts.
  const SampleWeight weight(largest, settings.temperature, num_codes);
  SampleKept kept{0, 0};
  if (settings.top_k < num_codes) {
    kept = sample_threshold<false>(logits, num_codes, settings, kept, weight, at);
  }
  if (settings.top_p < 1) kept = sample_threshold<true>(logits, num_codes, settings, kept, weight, at);

  // Divide the codes into parts, in code order, one per warp. The part in which the cumulative weight exceeds u times
  // the total is divided again, until one warp holds it.
  const uint64_t each = kept.ties > 0 ? weight(value_of_sample_key(kept.key)) : 0;
  int64_t first = 0, last = num_codes;
  // State of thread 0: u times the total weight, the weight before `first`, and the ties that are left.
  double target = -1;
  uint64_t before = 0;
  uint32_t left = kept.ties;
  while (last - first > 32) {
    const int64_t size = ((last - first + kWarps - 1) / kWarps + 31) / 32 * 32;
    const int64_t begin = first + warp * size, end = begin + size < last ? begin + size : last;
    uint64_t sum = 0;
    uint32_t ties = 0;
    for (int64_t c = begin + lane; c < end; c += 32) {
      const float x = logits[c];
      const uint32_t key = sample_key(x);
      if (key > kept.key) sum += weight(x);
      if (key == kept.key) ++ties;
    }
    sum = sum_of_warp(sum);
    ties = sum_of_warp(ties);
    if (lane == 0) {
      at.weights[warp] = sum;
      at.ties[warp] = ties;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (target < 0) {
        uint64_t total = 0;
        uint32_t there = 0;
        for (int i = 0; i < kWarps; ++i) total += at.weights[i], there += at.ties[i];
        total += each * (there < left ? there : left);
        target = uniform * double(total);
      }
      // The last part with any weight, in case rounding puts the target at the total.
      int64_t found = first;
      uint64_t up_to = before;
      uint32_t ties_left = left;
      for (int i = 0; i < kWarps && !(double(up_to) > target); ++i) {
        const uint32_t here = at.ties[i] < ties_left ? at.ties[i] : ties_left;
        const uint64_t of_part = at.weights[i] + here * each;
        if (of_part > 0) {
          found = first + i * size;
          before = up_to;
          left = ties_left;
        }
        up_to += of_part;
        ties_left -= here;
      }
      at.first = found;
    }
    __syncthreads();
    first = at.first;
    last = first + size < last ? first + size : last;
  }
  // One warp holds the part that is left.
  if (warp == 0) {
    const float x = first + lane < last ? logits[first + lane] : -inf;
    const uint32_t key = sample_key(x);
    const bool is_tie = first + lane < last && key == kept.key;
    const unsigned tied = __ballot_sync(kFullWarp, is_tie);
    left = __shfl_sync(kFullWarp, left, 0);
    const bool stays =
        (first + lane < last && key > kept.key) || (is_tie && uint32_t(__popc(tied & ((1u << lane) - 1))) < left);
    const uint64_t mine = stays ? weight(x) : 0;
    const uint64_t up_to = scan_of_warp(mine) + __shfl_sync(kFullWarp, before, 0);
    target = __shfl_sync(kFullWarp, target, 0);
    if (target < 0) target = uniform * double(__shfl_sync(kFullWarp, up_to, 31));
    const unsigned over = __ballot_sync(kFullWarp, double(up_to) > target && mine > 0);
    const unsigned any = __ballot_sync(kFullWarp, mine > 0);
    if (lane == 0) at.sampled = first + (over != 0 ? __ffs(int(over)) - 1 : 31 - __clz(int(any)));
  }
  __syncthreads();
  return at.sampled;
}

}  // namespace rqk
