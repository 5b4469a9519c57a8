// Samples one code from one row of logits on a CPU. For files compiled once per instruction set.
//
// Definition. Keep the top_k largest logits; of equal ones, those with lower indices. A code weighs exp((logit -
// largest) / temperature). In descending order, keep a code while the weights before it sum to less than top_p times
// the total. Sample the first code, in code order, whose cumulative weight exceeds u times the total of the kept codes.
//
// Nothing is sorted, and only top_p stores an array of the row's size (the weights). Both cuts are thresholds: the
// smallest logit v such that all larger ones have less mass than a target, where the mass of a code is 1 or its weight.
// 256 evenly spaced codes bracket v; one pass sums the mass above the bracket and compacts the codes inside, on which
// the next round works; the last 256 are tried one by one. Top-k starts with a bracket open above, so that all later
// steps work on few codes. A row is read once from memory, and without cuts once more from cache.
//
// Weights are float32 first; if their error (bound B13, docs/bounds.md) leaves the code open, the row is sampled again
// with float64 weights. The result depends on the row alone.
#pragma once

#include "common/simd.h"
#include "shared/sample_settings.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int64_t kSampleGroup = 16;   // codes whose comparisons form one word of bits
constexpr int64_t kSampleBlock = 256;  // codes whose weights are summed as one block, a multiple of the group
constexpr int64_t kSampleGuess = 256;  // codes sampled for a bracket, and few enough to try each
constexpr float kNegInf = -__builtin_inff();

inline int64_t padded_to(int64_t multiple, int64_t n) { return (n + multiple - 1) / multiple * multiple; }

// A row's logits in blocks; the last block is padded with -inf.
struct SampleCodes {
  const float* x;
  int64_t n;
  const float* last;  // the incomplete block
  int64_t blocks() const { return (n + kSampleBlock - 1) / kSampleBlock; }
  const float* block(int64_t b) const { return (b + 1) * kSampleBlock <= n ? x + b * kSampleBlock : last; }
};

// Pads memory that has room for whole blocks.
inline SampleCodes padded_codes(float* x, int64_t n) {
  for (int64_t i = n; i < padded_to(kSampleBlock, n); ++i) x[i] = kNegInf;
  return {x, n, x + n / kSampleBlock * kSampleBlock};
}

// Parts of the scratch memory, each aligned to a cache line and long enough for whole blocks.
struct SampleScratch {
  float *last, *candidates, *ranges[2];  // the row's last block; candidates to keep; codes among which a threshold is
                                         // sought
  double *weights, *range_weights[2];    // their weights, double or float
  double* sums;                          // total weight of each block
  int64_t *before, *ties;                // per block: number of candidates before it; ties that may still be kept
  size_t bytes;
};

inline SampleScratch divide_sample_scratch(void* memory, int64_t num_codes) {
  // A vector may be stored past the last code.
  const int64_t codes = padded_to(kSampleBlock, num_codes) + kSampleGroup, blocks = codes / kSampleBlock;
  SampleScratch scratch{};
  auto take = [&scratch, memory](auto*& part, int64_t size) {
    part = reinterpret_cast<decltype(part + 0)>(static_cast<char*>(memory) + scratch.bytes);
    scratch.bytes += size_t(padded_to(64, size * int64_t(sizeof *part)));
  };
  take(scratch.last, kSampleBlock);
  take(scratch.sums, blocks);
  take(scratch.before, blocks);
  take(scratch.ties, blocks);
  take(scratch.candidates, codes);
  take(scratch.weights, codes);
  for (float*& range : scratch.ranges) take(range, codes);
  for (double*& range : scratch.range_weights) take(range, codes);
  return scratch;
}

// Maps floats to integers in the same order; both zeros are equal.
inline int32_t order_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? -(bits & 0x7fffffff) : bits;
}
inline float float_of_order(int32_t order) {
  const int32_t bits = order < 0 ? -order : order;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return order < 0 ? -value : value;
}

// Bit j: x[j] > limit, or is NaN.
inline uint32_t larger(const float* x, float limit) {
  uint32_t bits = 0;
  for (int64_t j = 0; j < kSampleGroup; j += Vec::kSize) {
    bits |= (cmp_le_mask(Vec::load(x + j), Vec::fill(limit)) ^ ((1u << Vec::kSize) - 1)) << j;
  }
  return bits;
}
// Bit j: x[j] >= limit.
inline uint32_t at_least(const float* x, float limit) {
  uint32_t bits = 0;
  for (int64_t j = 0; j < kSampleGroup; j += Vec::kSize) {
    bits |= cmp_le_mask(Vec::fill(limit), Vec::load(x + j)) << j;
  }
  return bits;
}

// The weights of a group of codes.
template <class Real>
struct Weights;

template <>
struct Weights<float> {
  static constexpr int kVectors = int(kSampleGroup) / Vec::kSize;
  Vec v[kVectors];
  static Weights zero() {
    Weights w;
    for (Vec& v : w.v) v = Vec::zero();
    return w;
  }
  static Weights load(const float* p) {
    Weights w;
    for (int i = 0; i < kVectors; ++i) w.v[i] = Vec::load(p + i * Vec::kSize);
    return w;
  }
  void store(float* p) const {
    for (int i = 0; i < kVectors; ++i) v[i].store(p + i * Vec::kSize);
  }
  void operator+=(const Weights& other) {
    for (int i = 0; i < kVectors; ++i) v[i] = v[i] + other.v[i];
  }
  double sum() const {
    float lanes[kSampleGroup];
    store(lanes);
    return (Lanes8::load(lanes) + Lanes8::load(lanes + 8)).sum();
  }
};
inline Weights<float> keep(Weights<float> w, uint32_t bits) {
  for (int i = 0; i < w.kVectors; ++i) w.v[i] = keep(w.v[i], bits >> i * Vec::kSize);
  return w;
}
inline Weights<float> squares(Weights<float> w) {
  for (Vec& v : w.v) v = v * v;
  return w;
}

template <>
struct Weights<double> {
  Lanes8 low, high;
  static Weights zero() { return {Lanes8::zero(), Lanes8::zero()}; }
  static Weights load(const double* p) { return {Lanes8::load(p), Lanes8::load(p + 8)}; }
  void store(double* p) const {
    low.store(p);
    high.store(p + 8);
  }
  void operator+=(const Weights& other) {
    low = low + other.low;
    high = high + other.high;
  }
  double sum() const { return (low + high).sum(); }
};
inline Weights<double> keep(Weights<double> w, uint32_t bits) { return {keep(w.low, bits), keep(w.high, bits >> 8)}; }
inline Weights<double> squares(Weights<double> w) { return {w.low * w.low, w.high * w.high}; }

// Stands for codes that weigh 1 each.
struct Count {};
template <>
struct Weights<Count> {
  int64_t codes;
  static Weights load(const Count*) { return {kSampleGroup}; }
  void operator+=(const Weights& other) { codes += other.codes; }
  double sum() const { return double(codes); }
};
inline Weights<Count> keep(Weights<Count>, uint32_t bits) { return {__builtin_popcount(bits)}; }
inline Weights<Count> squares(Weights<Count> w) { return w; }  // 1 squared

// Stores the elements whose bits are set next to each other. Returns their number.
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
inline void compress_group(const Count*, uint32_t, Count*) {}

// Sums group(j) over the groups of a block, with enough accumulators to keep up with group().
template <class Real>
constexpr int kSumParts = sizeof(Real) == 4 ? 4 * Vec::kSize / int(kSampleGroup) : 1;
template <class Real, class Group>
inline double sum_of_block(Group group) {
  constexpr int kParts = kSumParts<Real>;
  Weights<Real> parts[kParts];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) parts[i] = group(i * kSampleGroup);
#pragma GCC unroll 1
  for (int64_t j = kParts * kSampleGroup; j < kSampleBlock; j += kParts * kSampleGroup) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) parts[i] += group(j + i * kSampleGroup);
  }
#pragma GCC unroll 4
  for (int i = 1; i < kParts; ++i) parts[0] += parts[i];
  return parts[0].sum();
}

// exp((x - largest) / temperature) of a group.
template <class Real>
struct Weigh;

template <>
struct Weigh<double> {
  Lanes8 factor, shift;
  // If the temperature is so small that its inverse overflows, all but the largest logit still weigh nothing.
  Weigh(double temperature, float largest)
      : factor(Lanes8::fill(1 / temperature < 1e300 ? 1 / temperature : 1e300)), shift(Lanes8::fill(double(largest))) {}
  Weights<double> operator()(const float* x) const {
    return {exp((Lanes8::load(x) - shift) * factor), exp((Lanes8::load(x + 8) - shift) * factor)};
  }
  // The error of a sum over any of n codes that weigh `total`: negligible.
  static double error(double, int64_t) { return 0; }
};

// Polynomial for 2^r, |r| <= 1/2, that is 1 at 0, with the least relative error for its degree: below 1.9 * 2^-24.
constexpr float kExp2Series[] = {1.32645911e-3f, 9.67161916e-3f, 5.55073507e-2f, 0.240222409f, 0.693147004f, 1.0f};

template <>
struct Weigh<float> {
  Vec factor, factor_rest, shift, smallest;
  // With t = (x - largest) log2(e) / temperature the weight is 2^n 2^r, n the integer nearest to t. n is computed by
  // rounding at 2^23, where floats are integers; with 127 added, its low bits are the exponent of 2^n (zero for -127).
  Weigh(double temperature, float largest) : shift(Vec::fill(largest)) {
    const double exact = 1.4426950408889634 / temperature;
    const float rounded = float(exact);
    factor = Vec::fill(rounded);
    factor_rest = Vec::fill(float(exact - double(rounded)));
    smallest = Vec::fill(-127 / rounded);
  }
  static bool possible(double temperature) { return temperature > 0x1p-60 && temperature < 0x1p60; }
  Weights<float> operator()(const float* x) const {
    constexpr float kInteger = 0x1.8p23f + 127;
    Weights<float> w;
    for (int i = 0; i < w.kVectors; ++i) {
      const Vec below = max(Vec::load(x + i * Vec::kSize) - shift, smallest);
      const Vec shifted = fma(below, factor, Vec::fill(kInteger));
      Vec r = fma(below, factor, Vec::fill(kInteger) - shifted);
      r = fma(below, factor_rest, r);
      Vec series = Vec::fill(kExp2Series[0]);
      for (int k = 1; k < 6; ++k) series = fma(series, r, Vec::fill(kExp2Series[k]));
      w.v[i] = series * low_bits_as_exponent(shifted);
    }
    return w;
  }
  // The error of P - u T, where P is the weight of any of the n codes, T = `total`, for any u. Bound B13.
  static double error(double total, int64_t n) {
#if defined(__FMA__)
    constexpr double kLogs = 1;
#else
    constexpr double kLogs = 2;
#endif
    constexpr double kSums = kSampleBlock / kSampleGroup / kSumParts<float> + kSumParts<float> - 2;
    return 0x1p-24 * total * (5 + 2 * kSums + kLogs * __builtin_log(double(n) / total));
  }
};

// The mass of the codes larger than the limit.
template <class Real>
inline double measure_above(const SampleCodes& codes, const Real* weights, float limit) {
  double sum = 0;
  for (int64_t b = 0; b < codes.blocks(); ++b) {
    const float* x = codes.block(b);
    const Real* w = weights + b * kSampleBlock;
    sum += sum_of_block<Real>([=](int64_t j) { return keep(Weights<Real>::load(w + j), larger(x + j, limit)); });
  }
  return sum;
}

// The largest logit, or NaN if any is NaN.
inline float largest_or_nan(const SampleCodes& codes) {
  constexpr uint32_t kAll = (1u << Vec::kSize) - 1;
  const Vec inf = Vec::fill(__builtin_inff());
  Vec even = Vec::fill(kNegInf), odd = even;
  uint32_t numbers = kAll;
  for (int64_t b = 0; b < codes.blocks(); ++b) {
    const float* x = codes.block(b);
    uint32_t here = kAll;  // keeps the chain of dependent instructions short
    for (int64_t j = 0; j < kSampleBlock; j += 2 * Vec::kSize) {
      const Vec first = Vec::load(x + j), second = Vec::load(x + j + Vec::kSize);
      even = max(even, first);
      odd = max(odd, second);
      here &= cmp_le_mask(first, inf) & cmp_le_mask(second, inf);
    }
    numbers &= here;
  }
  return numbers == kAll ? reduce_max(max(even, odd)) : __builtin_nanf("");
}

struct Extent {
  float smallest, largest;
};

inline Extent extent_of(const float* x, int64_t n) {
  Vec low = Vec::fill(-kNegInf), high = Vec::fill(kNegInf);
  int64_t i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) {
    low = min(low, Vec::load(x + i));
    high = max(high, Vec::load(x + i));
  }
  Extent extent{reduce_min(low), reduce_max(high)};
  for (; i < n; ++i) {
    extent.smallest = x[i] < extent.smallest ? x[i] : extent.smallest;
    extent.largest = x[i] > extent.largest ? x[i] : extent.largest;
  }
  return extent;
}

// The codes larger than `low` and not larger than `high`.
struct Bracket {
  float low, high;
};

// Guesses a bracket for the smallest v above which the mass is below the target; `total` is the mass of all codes.
// Estimates the mass above v from evenly spaced codes, by what they hold above or below v, whichever is known more
// precisely, and allows a few standard deviations.
template <class Real>
Bracket guess_bracket(const SampleCodes& codes, const Real* weights, double total, double target) {
  constexpr int kSteps = 8;
  constexpr double kDeviations[] = {-2.5, 2.5};
  float x[kSampleGuess + kSampleGroup];
  Real w[kSampleGuess + kSampleGroup];
  for (int64_t i = 0; i < kSampleGuess; ++i) {
    const int64_t at = i * codes.n / kSampleGuess;
    x[i] = codes.x[at];
    w[i] = weights[at];
  }
  const double all = sum_of_block<Real>([&](int64_t j) { return Weights<Real>::load(w + j); });
  const double all_squares = sum_of_block<Real>([&](int64_t j) { return squares(Weights<Real>::load(w + j)); });
  // Masked codes (-inf) say nothing about the others.
  int64_t left = 0;
  for (int64_t i = 0; i < kSampleGuess; i += kSampleGroup) {
    const uint32_t bits = larger(x + i, kNegInf);
    compress_group(w + i, bits, w + left);
    left += compress_group(x + i, bits, x + left);
  }
  const Extent extent = extent_of(x, left);
  for (int64_t i = left; i < kSampleGuess; ++i) x[i] = kNegInf;
  const double scale = double(codes.n) / double(kSampleGuess);
  Bracket ends[2] = {{extent.smallest, extent.largest}, {extent.smallest, extent.largest}};
  for (int step = 0; step < kSteps; ++step) {
    for (int end = 0; end < 2; ++end) {
      const float middle = 0.5f * ends[end].low + 0.5f * ends[end].high;
      auto above = [&](int64_t j) { return keep(Weights<Real>::load(w + j), larger(x + j, middle)); };
      double part = sum_of_block<Real>(above);
      double part_squares = part;
      if constexpr (sizeof(Real) > sizeof(Count)) {
        part_squares = sum_of_block<Real>([&](int64_t j) { return squares(above(j)); });
      }
      double estimate = scale * part, unseen = all;
      if (part_squares > all_squares - part_squares) {
        part = all - part;
        part_squares = all_squares - part_squares;
        estimate = total - scale * part;
        unseen = 0;
      }
      const double one = part > 0 ? part_squares / part : unseen;  // larger than any in the sample
      estimate += kDeviations[end] * scale * __builtin_sqrt(part_squares + one * one);
      (estimate < target ? ends[end].high : ends[end].low) = middle;
    }
  }
  Bracket bracket{ends[0].low, ends[1].high};
  if (bracket.low == extent.smallest) bracket.low = kNegInf;
  if (bracket.high == extent.largest) bracket.high = -kNegInf;
  return bracket;
}

struct Threshold {
  float value;   // the smallest logit to keep, or equal to it
  double above;  // the mass of larger logits, less than the target
};

// Finds the threshold among codes whose mass `total` exceeds the target.
template <class Real>
Threshold find_threshold(SampleCodes codes, const Real* weights, double total, double target, float* const (&ranges)[2],
                         Real* const (&range_weights)[2]) {
  const float inf = __builtin_inff();
  double base = 0;  // mass above the codes that are left, less than the target
  bool guess = true;
  for (int round = 0; codes.n > kSampleGuess; ++round) {
    Bracket bracket;
    if (guess) {
      bracket = guess_bracket(codes, weights, total, target - base);
    } else {
      // A guess failed: halve the range of integer keys, which takes at most 32 rounds.
      const Extent extent = extent_of(codes.x, codes.n);
      if (extent.smallest == extent.largest) return {extent.smallest, base};
      const int64_t middle = (int64_t(order_of(extent.smallest)) + order_of(extent.largest)) >> 1;
      bracket = {float_of_order(int32_t(middle)), inf};
    }
    // Compacts the codes inside a bracket; returns the mass above it.
    SampleCodes within{};
    float* const range = ranges[round % 2];
    Real* const range_w = range_weights[round % 2];
    auto gather = [&](const Bracket& wanted) {
      double above = 0;
      int64_t left = 0;
      for (int64_t b = 0; b < codes.blocks(); ++b) {
        const float* x = codes.block(b);
        const Real* w = weights + b * kSampleBlock;
        above += sum_of_block<Real>([&](int64_t j) {
          const uint32_t beyond = larger(x + j, wanted.high), bits = larger(x + j, wanted.low) & ~beyond;
          compress_group(w + j, bits, range_w + left);
          left += compress_group(x + j, bits, range + left);
          return keep(Weights<Real>::load(w + j), beyond);
        });
      }
      within = padded_codes(range, left);
      total = measure_above(within, range_w, -inf);
      return above;
    };
    const double above = gather(bracket);
    if (base + above >= target) {
      gather({bracket.high, inf});
    } else if (base + above + total < target) {
      base += above + total;
      gather({-inf, bracket.low});
    } else {
      base += above;
    }
    guess = 2 * within.n <= codes.n;
    codes = within, weights = range_w;
  }
  // Few codes are left: try each as the threshold.
  Threshold found{inf, base};
  float too_small = -inf;
  const float* const x = codes.block(0);
  for (int64_t i = 0; i < codes.n; ++i) {
    const float value = x[i];
    if (!(value > too_small) || !(value < found.value)) continue;
    double above = base;
    for (int64_t j = 0; j < codes.n; j += kSampleGroup) {
      above += keep(Weights<Real>::load(weights + j), larger(x + j, value)).sum();
    }
    if (above < target) {
      found = {value, above};
    } else {
      too_small = value;
    }
  }
  // With another order of addition all sums may stay below a target near the total: then keep everything.
  return found.value < inf ? found : Threshold{-inf, base};
}

// Keeps codes larger than a value and the first `ties` equal to it, group by group.
struct KeptCodes {
  float value;
  int64_t ties;
  uint32_t next(const float* x) {
    uint32_t bits = at_least(x, value);
    uint32_t equal = bits & ~larger(x, value);
    while (ties < __builtin_popcount(equal)) {
      // Drop the last of them.
      bits ^= 1u << (31 - __builtin_clz(equal));
      equal &= bits;
    }
    ties -= __builtin_popcount(equal);
    return bits;
  }
};

// The first i with which the sum of `before` and the values up to it exceeds the goal, or else the last i with a
// positive value. Sets `before` to the sum in front of it.
template <class Value>
inline int64_t first_beyond(int64_t n, double goal, double& before, Value value) {
  int64_t found = 0;
  double up_to = before;
  for (int64_t i = 0; i < n && !(up_to > goal); ++i) {
    const double one = value(i);
    if (!(one > 0)) continue;
    found = i;
    before = up_to;
    up_to += one;
  }
  return found;
}

constexpr int64_t kUndecided = -2;

// The position of the sampled code, or kUndecided if rounding may have moved it; `top_k` says which codes top_k keeps.
template <class Real>
int64_t sample_place(const SampleCodes& codes, const KeptCodes& top_k, const SampleSettings& settings, float largest,
                     double uniform, const SampleScratch& scratch) {
  const Weigh<Real> weigh(settings.temperature, largest);
  Real* const weights = reinterpret_cast<Real*>(scratch.weights);
  double total = 0;
  auto sum_blocks = [&](KeptCodes kept_codes, auto group) {
    total = 0;
    for (int64_t b = 0; b < codes.blocks(); ++b) {
      scratch.ties[b] = kept_codes.ties;
      const float* x = codes.block(b);
      scratch.sums[b] = sum_of_block<Real>([&](int64_t j) { return group(x + j, b * kSampleBlock + j, kept_codes); });
      total += scratch.sums[b];
    }
  };
  // Weigh the codes that top_k keeps, and sum the weights by block.
  KeptCodes kept_codes = top_k;
  const bool cut = top_k.value > -__builtin_inff(), nucleus = settings.top_p < 1;
  if (!cut && !nucleus) {
    sum_blocks(kept_codes, [&](const float* x, int64_t, KeptCodes&) { return weigh(x); });
  } else if (!nucleus) {
    sum_blocks(kept_codes, [&](const float* x, int64_t, KeptCodes& kept) { return keep(weigh(x), kept.next(x)); });
  } else {
    sum_blocks(kept_codes, [&](const float* x, int64_t i, KeptCodes& kept) {
      Weights<Real> w = weigh(x);
      if (cut) w = keep(w, kept.next(x));
      w.store(weights + i);
      return w;
    });
  }
  double error = weigh.error(total, codes.n);
  // Cut by top_p.
  if (nucleus) {
    const double target = settings.top_p * total;
    Real* const range_weights[2] = {reinterpret_cast<Real*>(scratch.range_weights[0]),
                                    reinterpret_cast<Real*>(scratch.range_weights[1])};
    const Threshold found = find_threshold(codes, weights, total, target, scratch.ranges, range_weights);
    float value[kSampleGroup];
    for (float& one : value) one = found.value;
    const double each = weigh(value).sum() / kSampleGroup;
    // Of equal logits, keep those before which the sum is below the target; all of them if they weigh nothing.
    int64_t ties = codes.n;
    if ((target - found.above) / each < double(codes.n)) {
      ties = int64_t((target - found.above) / each);
      while (ties > 0 && found.above + double(ties - 1) * each >= target) --ties;
      while (found.above + double(ties) * each < target) ++ties;
    }
    // The cut may lie one code earlier or later, which changes the kept weight by `each`. A sampled code that passes
    // the test below weighs more than twice the error, so it is certainly kept.
    const double up_to = found.above + double(ties) * each;
    if (up_to - each > target - error || up_to < target + error) error += error + each;
    kept_codes = {found.value, ties};
    sum_blocks(kept_codes, [&](const float* x, int64_t i, KeptCodes& kept) {
      return keep(Weights<Real>::load(weights + i), kept.next(x));
    });
  }
  // Find the block, the group and the code in which the cumulative weight exceeds the goal.
  const double goal = uniform * total;
  double before = 0;
  const int64_t block = first_beyond(codes.blocks(), goal, before, [&](int64_t b) { return scratch.sums[b]; });
  const float* const x = codes.block(block);
  Real w[kSampleBlock];
  kept_codes.ties = scratch.ties[block];
  for (int64_t j = 0; j < kSampleBlock; j += kSampleGroup) {
    keep(nucleus ? Weights<Real>::load(weights + block * kSampleBlock + j) : weigh(x + j), kept_codes.next(x + j))
        .store(w + j);
  }
  const int64_t group = kSampleGroup * first_beyond(kSampleBlock / kSampleGroup, goal, before, [&](int64_t g) {
                          return Weights<Real>::load(w + g * kSampleGroup).sum();
                        });
  const int64_t place =
      group + first_beyond(kSampleGroup, goal, before, [&](int64_t i) { return double(w[group + i]); });
  if (error > 0 && (before > goal - error || before + double(w[place]) <= goal + error)) return kUndecided;
  return block * kSampleBlock + place;
}

inline size_t sample_scratch_bytes(int64_t num_codes) { return divide_sample_scratch(nullptr, num_codes).bytes; }

// Returns a code in [0, num_codes), or -1 if the row has NaN, +inf, or nothing but -inf. uniform is in (0, 1). `memory`
// has sample_scratch_bytes(num_codes) bytes, aligned to a cache line.
inline int64_t sample_row(const float* logits, int64_t num_codes, const SampleSettings& settings, double uniform,
                          void* memory) {
  const float inf = __builtin_inff();
  const SampleScratch scratch = divide_sample_scratch(memory, num_codes);
  const int64_t whole = num_codes / kSampleBlock * kSampleBlock;
  for (int64_t i = 0; i < kSampleBlock; ++i) scratch.last[i] = whole + i < num_codes ? logits[whole + i] : -inf;
  const SampleCodes row{logits, num_codes, scratch.last};
  const bool greedy = settings.temperature == 0 || settings.top_k == 1;

  // Candidates: codes above a guess that leaves top_k or more, or NaN.
  SampleCodes codes = row;
  float guess = -inf;
  if (!greedy && settings.top_k < num_codes) {
    const double kept = double(settings.top_k);
    Count* const ones = static_cast<Count*>(memory);  // never dereferenced
    if (num_codes > kSampleGuess) guess = guess_bracket(row, ones, double(num_codes), kept).low;
    auto gather = [&] {
      int64_t n = 0;
      for (int64_t b = 0; b < row.blocks(); ++b) {
        scratch.before[b] = n;
        const float* x = row.block(b);
        for (int64_t j = 0; j < kSampleBlock; j += kSampleGroup) {
          n += compress_group(x + j, larger(x + j, guess), scratch.candidates + n);
        }
      }
      codes = padded_codes(scratch.candidates, n);
    };
    gather();
    if (codes.n < settings.top_k && guess > -inf) {
      guess = -inf;
      gather();
    }
  }
  const float largest = largest_or_nan(codes);
  if (!(__builtin_fabsf(largest) < inf)) return -1;
  if (greedy) {
    for (int64_t i = 0;; i += kSampleGroup) {
      const uint32_t bits = at_least(row.block(i / kSampleBlock) + i % kSampleBlock, largest);
      if (bits != 0) return i + __builtin_ctz(bits);
    }
  }

  // Cut by top_k, then sample: with float32 weights if possible, else with float64.
  KeptCodes top_k{-inf, codes.n};
  if (settings.top_k < codes.n && codes.x != logits) {
    const double kept = double(settings.top_k);
    Count* const ones = static_cast<Count*>(memory);
    const Threshold found = find_threshold(codes, ones, double(codes.n), kept, scratch.ranges, {ones, ones});
    top_k = {found.value, settings.top_k - int64_t(found.above)};
  }
  int64_t place = kUndecided;
  if (Weigh<float>::possible(settings.temperature)) {
    place = sample_place<float>(codes, top_k, settings, largest, uniform, scratch);
  }
  if (place == kUndecided) place = sample_place<double>(codes, top_k, settings, largest, uniform, scratch);
  if (codes.x == logits) return place;
  // Translate the candidate's position into a code.
  int64_t b = row.blocks() - 1;
  while (scratch.before[b] > place) --b;
  place -= scratch.before[b];
  for (int64_t j = 0;; j += kSampleGroup) {
    uint32_t bits = larger(row.block(b) + j, guess);
    const int64_t here = __builtin_popcount(bits);
    if (place < here) {
      for (; place > 0; --place) bits &= bits - 1;
      return b * kSampleBlock + j + __builtin_ctz(bits);
    }
    place -= here;
  }
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
