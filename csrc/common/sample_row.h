// Draws one code from one row of logits on a CPU. For files compiled once per instruction set.
//
// Definition. Of the row's codes, the top_k largest logits are kept, the lower index first where logits are equal. A
// code weighs exp((logit - largest) / temperature). From the largest down, in the same order, a code stays while the
// weights before it sum to less than top_p times all of them. The code drawn is the first, in code order, with which
// the weights of those that stayed sum to more than u times all of theirs.
//
// Nothing is sorted. Both cuts are thresholds: "the smallest logit v such that what is larger measures less than a
// target", where a code measures 1 or its weight. A sample of 64 codes guesses a range for v, one pass measures what
// is above and in that range, what lies in it goes on to the next round; three or four rounds leave 64 codes, of which
// each is tried. Without cuts the row is read twice, and one block of weights is computed again.
//
// Weights are float64, off by a relative 1e-14 or so, and their sums by no more: so the code is the definition's but
// where u or top_p falls within about 1e-13 of a boundary between two codes. It depends on the row alone. Equal weights
// are equal to the last bit, and cuts among them fall where the definition has them.
#pragma once

#include "common/sampling.h"
#include "common/simd.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int64_t kSampleGroup = 16;   // codes whose comparisons make one word of bits
constexpr int64_t kSampleBlock = 256;  // codes whose weights are summed in one, a multiple of the group
constexpr int64_t kSampleGuess = 64;   // codes that a threshold is guessed from, and few enough to be all tried

inline int64_t padded_to(int64_t multiple, int64_t n) { return (n + multiple - 1) / multiple * multiple; }

// Parts of the scratch memory, each starting on a cache line and long enough for whole blocks.
struct SampleScratch {
  float *row, *kept, *range;  // the logits; those that top_k keeps; those that a threshold is sought among
  double *weights, *range_weights, *blocks;
  size_t bytes;
};

inline SampleScratch divide_sample_scratch(void* memory, int64_t num_codes) {
  // A vector may be written behind the last code.
  const int64_t codes = padded_to(kSampleBlock, num_codes) + kSampleGroup;
  SampleScratch scratch{};
  auto take = [&scratch, memory](int64_t bytes) {
    void* part = static_cast<char*>(memory) + scratch.bytes;
    scratch.bytes += size_t(padded_to(64, bytes));
    return part;
  };
  scratch.row = static_cast<float*>(take(codes * int64_t(sizeof(float))));
  scratch.kept = static_cast<float*>(take(codes * int64_t(sizeof(float))));
  scratch.range = static_cast<float*>(take(codes * int64_t(sizeof(float))));
  scratch.weights = static_cast<double*>(take(codes * int64_t(sizeof(double))));
  scratch.range_weights = static_cast<double*>(take(codes * int64_t(sizeof(double))));
  scratch.blocks = static_cast<double*>(take(codes / kSampleBlock * int64_t(sizeof(double))));
  return scratch;
}

// Floats in an order of integers, both zeros apart.
inline int32_t order_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
inline float float_of_order(int32_t order) {
  const int32_t bits = order < 0 ? order ^ 0x7fffffff : order;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Bit j: x[j] > limit, of a group without NaN.
inline uint32_t larger(const float* x, float limit) {
  uint32_t bits = 0;
  for (int64_t j = 0; j < kSampleGroup; j += Vec::kSize) {
    bits |= (at_most(Vec::load(x + j), Vec::fill(limit)) ^ ((1u << Vec::kSize) - 1)) << j;
  }
  return bits;
}
// Bit j: x[j] >= limit.
inline uint32_t at_least(const float* x, float limit) {
  uint32_t bits = 0;
  for (int64_t j = 0; j < kSampleGroup; j += Vec::kSize) {
    bits |= at_most(Vec::fill(limit), Vec::load(x + j)) << j;
  }
  return bits;
}

// The set bits of a group's codes, side by side. Returns how many.
inline int64_t compress_group(const float* x, uint32_t bits, float* out) {
  int64_t n = 0;
  for (int64_t j = 0; j < kSampleGroup; j += Vec::kSize) {
    const uint32_t part = bits >> j & ((1u << Vec::kSize) - 1);
    compress(Vec::load(x + j), part, out + n);
    n += __builtin_popcount(part);
  }
  return n;
}
inline void compress_group(const double* w, uint32_t bits, double* out) {
  compress(Lanes8::load(w), bits & 0xff, out);
  compress(Lanes8::load(w + 8), bits >> 8, out + __builtin_popcount(bits & 0xff));
}

// Sums of what codes measure: their number, or their weights.
template <bool kWeighted>
struct Measure {
  Lanes8 low = Lanes8::zero(), high = Lanes8::zero();
  int64_t codes = 0;
  void add(const double* w, uint32_t bits) {
    if constexpr (kWeighted) {
      low = low + keep(Lanes8::load(w), bits);
      high = high + keep(Lanes8::load(w + 8), bits >> 8);
    } else {
      codes += __builtin_popcount(bits);
    }
  }
  double total() const { return kWeighted ? (low + high).sum() : double(codes); }
};

// What x[i] > limit measure; x has -inf, and w zeros, up to a whole group.
template <bool kWeighted>
inline double measure_above(const float* x, const double* w, int64_t n, float limit) {
  Measure<kWeighted> measure;
  for (int64_t i = 0; i < n; i += kSampleGroup) measure.add(w + (kWeighted ? i : 0), larger(x + i, limit));
  return measure.total();
}

struct Extent {
  float smallest, largest;
  void add(float x) {
    smallest = x < smallest ? x : smallest;
    largest = x > largest ? x : largest;
  }
};

inline Extent extent_of(const float* x, int64_t n) {
  const float inf = __builtin_inff();
  Vec low = Vec::fill(inf), high = Vec::fill(-inf);
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) {
    low = min(low, Vec::load(x + i));
    high = max(high, Vec::load(x + i));
  }
  float lanes[2 * Vec::kSize];
  low.store(lanes);
  high.store(lanes + Vec::kSize);
  Extent extent{inf, -inf};
  if (i > 0) {
    for (const float lane : lanes) extent.add(lane);
  }
  for (; i < n; ++i) extent.add(x[i]);
  return extent;
}

struct Threshold {
  float value;   // the smallest that stays, or some of those equal to it
  double above;  // what the larger ones measure: less than the target
};

// Of x[0, n), up to a whole group as above: measuring `total`, more than the target. The range is scratch.
template <bool kWeighted>
Threshold find_threshold(const float* x, const double* w, int64_t n, double total, double target, float* range_x,
                         double* range_w) {
  const float inf = __builtin_inff();
  double base = 0;  // what lies above the range measures
  bool guess = true;
  while (n > kSampleGuess) {
    float low = -inf, high = inf;
    if (guess) {
      float sample_x[kSampleGuess];
      double sample_w[kSampleGuess];
      Measure<kWeighted> all;
      for (int64_t i = 0; i < kSampleGuess; ++i) {
        const int64_t at = i * n / kSampleGuess;
        sample_x[i] = x[at];
        if constexpr (kWeighted) sample_w[i] = w[at];
      }
      for (int64_t i = 0; i < kSampleGuess; i += kSampleGroup) all.add(sample_w + i, 0xffff);
      const double part = (target - base) / total, of_sample = all.total();
      // One and a half standard deviations of the share of a sample.
      const double margin = 1.5 * __builtin_sqrt(part * (1 - part) / kSampleGuess) + 1.0 / kSampleGuess;
      for (int64_t i = 0; i < kSampleGuess; ++i) {
        const double above = measure_above<kWeighted>(sample_x, sample_w, kSampleGuess, sample_x[i]);
        if (above < (part - margin) * of_sample && sample_x[i] < high) high = sample_x[i];
        if (above >= (part + margin) * of_sample && sample_x[i] > low) low = sample_x[i];
      }
    } else {
      // A guess that failed: half of the order's range, so that 32 such rounds are the most there can be.
      const Extent extent = extent_of(x, n);
      if (extent.smallest == extent.largest) return {extent.smallest, base};
      const int64_t middle = (int64_t(order_of(extent.smallest)) + order_of(extent.largest)) >> 1;
      low = high = float_of_order(int32_t(middle));
    }
    Measure<kWeighted> larger_ones, rest;
    for (int64_t i = 0; i < n; i += kSampleGroup) {
      const double* weights = w + (kWeighted ? i : 0);
      const uint32_t above = larger(x + i, high);
      larger_ones.add(weights, above);
      rest.add(weights, at_least(x + i, low) & ~above);
    }
    const double above = larger_ones.total(), within = rest.total();
    double measured = within;
    if (base + above >= target) {
      low = float_of_order(order_of(high) + 1);
      high = inf;
      measured = above;
    } else if (base + above + within >= target) {
      base += above;
    } else {
      high = float_of_order(order_of(low) - 1);
      low = -inf;
      base += above + within;
      measured = total - above - within;
    }
    int64_t left = 0;
    for (int64_t i = 0; i < n; i += kSampleGroup) {
      uint32_t bits = at_least(x + i, low) & ~larger(x + i, high);
      if (n - i < kSampleGroup) bits &= (1u << (n - i)) - 1;
      if constexpr (kWeighted) compress_group(w + i, bits, range_w + left);
      left += compress_group(x + i, bits, range_x + left);
    }
    for (int64_t i = left; i < padded_to(kSampleGroup, left); ++i) {
      range_x[i] = -inf;
      if constexpr (kWeighted) range_w[i] = 0;
    }
    guess = 2 * left <= n;
    x = range_x, w = range_w, n = left, total = measured;
  }
  Threshold found{inf, base};
  for (int64_t i = 0; i < n; ++i) {
    const double above = base + measure_above<kWeighted>(x, w, n, x[i]);
    if (x[i] < found.value && above < target) found = {x[i], above};
  }
  // Sums in another order may all stay below a target near the total: then everything stays.
  return found.value < inf ? found : Threshold{-inf, base};
}

// Codes larger than a value, and the first `ties` of those equal to it, group by group.
struct Stayers {
  float value;
  int64_t ties;
  uint32_t next(const float* x) {
    uint32_t bits = at_least(x, value);
    uint32_t equal = bits & ~larger(x, value);
    while (ties < __builtin_popcount(equal)) {
      // The last of them goes.
      bits ^= 1u << (31 - __builtin_clz(equal));
      equal &= bits;
    }
    ties -= __builtin_popcount(equal);
    return bits;
  }
};

// The first position at which the weights sum to more than u times all of them, in a fixed order of summation.
// weights(i, out): those of a block from i on; sum(i): their sum.
template <class Weights, class Sum>
inline int64_t position_drawn(int64_t n, double uniform, double* blocks, Weights weights, Sum sum) {
  const int64_t num_blocks = (n + kSampleBlock - 1) / kSampleBlock;
  double total = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    blocks[b] = sum(b * kSampleBlock);
    total += blocks[b];
  }
  // Of sums in another order the target may be left over: then the last with any weight is the one.
  const double target = uniform * total;
  double up_to = 0, before = 0;
  int64_t block = 0;
  for (int64_t b = 0; b < num_blocks && !(up_to > target); ++b) {
    if (!(blocks[b] > 0)) continue;
    block = b;
    before = up_to;
    up_to += blocks[b];
  }
  double of_block[kSampleBlock];
  weights(block * kSampleBlock, of_block);
  int64_t drawn = 0;
  up_to = before;
  for (int64_t i = 0; i < kSampleBlock && !(up_to > target); ++i) {
    if (!(of_block[i] > 0)) continue;
    drawn = i;
    up_to += of_block[i];
  }
  return block * kSampleBlock + drawn;
}

inline size_t sample_scratch_bytes(int64_t num_codes) { return divide_sample_scratch(nullptr, num_codes).bytes; }

// A code in [0, num_codes), or -1 where the row has NaN, +inf, or nothing but -inf; uniform in (0, 1). `memory` has
// sample_scratch_bytes(num_codes) bytes, aligned to a cache line.
inline int64_t sample_row(const float* logits, int64_t num_codes, const SampleSettings& settings, double uniform,
                          void* memory) {
  const float inf = __builtin_inff();
  const SampleScratch scratch = divide_sample_scratch(memory, num_codes);
  float* const row = scratch.row;
  Vec largest = Vec::fill(-inf);
  uint32_t numbers = (1u << Vec::kSize) - 1;
  int64_t copied = 0;
  for (; copied + Vec::kSize <= num_codes; copied += Vec::kSize) {
    const Vec x = Vec::load(logits + copied) + Vec::zero();  // which makes one of the two zeros
    x.store(row + copied);
    largest = max(largest, x);
    numbers &= at_most(x, Vec::fill(inf));
  }
  float best = -inf;
  float lanes[Vec::kSize];
  largest.store(lanes);
  for (const float lane : lanes) best = lane > best ? lane : best;
  bool is_number = numbers == (1u << Vec::kSize) - 1;
  for (; copied < num_codes; ++copied) {
    row[copied] = logits[copied] + 0.0f;
    best = row[copied] > best ? row[copied] : best;
    is_number = is_number && row[copied] == row[copied];
  }
  for (int64_t i = num_codes; i < padded_to(kSampleBlock, num_codes); ++i) row[i] = -inf;
  if (!is_number || !(__builtin_fabsf(best) < inf)) return -1;

  if (settings.temperature == 0 || settings.top_k == 1) {
    int64_t i = 0;
    while (at_least(row + i, best) == 0) i += kSampleGroup;
    return i + __builtin_ctz(at_least(row + i, best));
  }

  const float* x = row;
  int64_t n = num_codes;
  Stayers top_k{-inf, num_codes};
  if (settings.top_k < num_codes) {
    const double target = double(settings.top_k);
    const Threshold found = find_threshold<false>(row, nullptr, n, double(n), target, scratch.range, nullptr);
    top_k = {found.value, settings.top_k - int64_t(found.above)};
    int64_t kept = 0;
    Stayers stayers = top_k;
    for (int64_t i = 0; i < num_codes; i += kSampleGroup) {
      kept += compress_group(row + i, stayers.next(row + i), scratch.kept + kept);
    }
    for (int64_t i = kept; i < padded_to(kSampleBlock, kept); ++i) scratch.kept[i] = -inf;
    x = scratch.kept, n = kept;
  }

  // Where the temperature is so small that its inverse overflows, what is not the largest weighs nothing all the same.
  const double inverse = 1 / settings.temperature;
  const Lanes8 factor = Lanes8::fill(inverse < 1e300 ? inverse : 1e300), shift = Lanes8::fill(double(best));
  auto weight = [x, factor, shift](int64_t i) { return exp((Lanes8::load(x + i) - shift) * factor); };
  double* const weights = scratch.weights;
  int64_t drawn;
  if (settings.top_p < 1) {
    Lanes8 low = Lanes8::zero(), high = low;
    for (int64_t i = 0; i < padded_to(kSampleBlock, n); i += kSampleGroup) {
      const Lanes8 first = weight(i), second = weight(i + 8);
      first.store(weights + i);
      second.store(weights + i + 8);
      low = low + first;
      high = high + second;
    }
    const double total = (low + high).sum(), target = settings.top_p * total;
    const Threshold found = find_threshold<true>(x, weights, n, total, target, scratch.range, scratch.range_weights);
    const double each = exp((Lanes8::fill(double(found.value)) - shift) * factor).sum() / 8;
    // Those of equal logits before which too little has been summed; all, where they weigh nothing.
    int64_t ties = n;
    if ((target - found.above) / each < double(n)) {
      ties = int64_t((target - found.above) / each);
      while (ties > 0 && found.above + double(ties - 1) * each >= target) --ties;
      while (found.above + double(ties) * each < target) ++ties;
    }
    Stayers stayers{found.value, ties};
    auto drop = [x, weights, &stayers](int64_t begin) {
      Measure<true> left;
      for (int64_t i = begin; i < begin + kSampleBlock; i += kSampleGroup) {
        const uint32_t bits = stayers.next(x + i);
        left.add(weights + i, bits);
        keep(Lanes8::load(weights + i), bits).store(weights + i);
        keep(Lanes8::load(weights + i + 8), bits >> 8).store(weights + i + 8);
      }
      return left.total();
    };
    drawn = position_drawn(
        n, uniform, scratch.blocks,
        [weights](int64_t begin, double* out) {
          __builtin_memcpy(out, weights + begin, kSampleBlock * sizeof(double));
        },
        drop);
  } else {
    drawn = position_drawn(
        n, uniform, scratch.blocks,
        [&weight](int64_t begin, double* out) {
          for (int64_t i = 0; i < kSampleBlock; i += 8) weight(begin + i).store(out + i);
        },
        [&weight](int64_t begin) {
          Lanes8 low = Lanes8::zero(), high = low;
          for (int64_t i = begin; i < begin + kSampleBlock; i += kSampleGroup) {
            low = low + weight(i);
            high = high + weight(i + 8);
          }
          return (low + high).sum();
        });
  }
  if (x == row) return drawn;
  // The drawn-th of those that top_k kept.
  for (int64_t i = 0;; i += kSampleGroup) {
    uint32_t bits = top_k.next(row + i);
    const int64_t here = __builtin_popcount(bits);
    if (drawn < here) {
      for (; drawn > 0; --drawn) bits &= bits - 1;
      return i + __builtin_ctz(bits);
    }
    drawn -= here;
  }
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
