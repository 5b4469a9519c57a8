// Draws one code from one row of logits on a CPU. For files compiled once per instruction set.
//
// Definition. Of the row's codes, the top_k largest logits are kept, the lower index first where logits are equal. A
// code weighs exp((logit - largest) / temperature). From the largest down, in the same order, a code stays while the
// weights before it sum to less than top_p times all of them. The code drawn is the first, in code order, with which
// the weights of those that stayed sum to more than u times all of theirs.
//
// Nothing is sorted, and nothing of the row's size is written but the weights, with top_p alone. Both cuts are
// thresholds: "the smallest logit v such that what is larger measures less than a target", where a code measures 1 or
// its weight. A sample of 256 codes brackets v; one pass measures what is above the bracket and lays side by side what
// is in it, on which the next round works, until 256 codes are left, of which each is tried. Top-k begins with a
// bracket that is open above, so that all that follows works on the few codes in it. K*4 bytes are read from memory;
// without cuts once more from the cache, and of each block of codes the sum of weights is all that is kept.
//
// Weights are float32 at first, with a bound on what they and their sums are off by; where u or top_p falls within it
// of a boundary between two codes, which is a few rows in a hundred, the row is drawn again with weights of float64.
// These are off by a relative 1e-14 or so, and their sums by no more: so the code is the definition's but where u or
// top_p falls within about 1e-13 of a boundary. It depends on the row alone. Equal weights are equal to the last bit,
// and cuts among them fall where the definition has them.
#pragma once

#include "common/simd.h"
#include "shared/sample_settings.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int64_t kSampleGroup = 16;   // codes whose comparisons make one word of bits
constexpr int64_t kSampleBlock = 256;  // codes whose weights are summed in one, a multiple of the group
constexpr int64_t kSampleGuess = 256;  // codes that a threshold is guessed from, and so few that each is tried
constexpr float kNegInf = -__builtin_inff();

inline int64_t padded_to(int64_t multiple, int64_t n) { return (n + multiple - 1) / multiple * multiple; }

// A row's logits, block by block; the last block has -inf behind the last of them.
struct SampleCodes {
  const float* x;
  int64_t n;
  const float* last;  // the block that is not full
  int64_t blocks() const { return (n + kSampleBlock - 1) / kSampleBlock; }
  const float* block(int64_t b) const { return (b + 1) * kSampleBlock <= n ? x + b * kSampleBlock : last; }
};

// Of memory that is padded already.
inline SampleCodes padded_codes(float* x, int64_t n) {
  for (int64_t i = n; i < padded_to(kSampleBlock, n); ++i) x[i] = kNegInf;
  return {x, n, x + n / kSampleBlock * kSampleBlock};
}

// Parts of the scratch memory, each starting on a cache line and long enough for whole blocks.
struct SampleScratch {
  float *last, *candidates, *ranges[2];  // the row's last block; what may be kept; among what a threshold is sought
  double *weights, *range_weights[2];    // the same, or floats
  double* sums;                          // of the weights of each block
  int64_t *before, *ties;                // of each block: how many there are before it; how many may still stay
  size_t bytes;
};

inline SampleScratch divide_sample_scratch(void* memory, int64_t num_codes) {
  // A vector may be written behind the last code.
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

// Floats in an order of integers, both zeros one.
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

// Of codes that weigh 1 each: their number.
struct Count {};
template <>
struct Weights<Count> {
  int64_t codes;
  static Weights load(const Count*) { return {kSampleGroup}; }
  void operator+=(const Weights& other) { codes += other.codes; }
  double sum() const { return double(codes); }
};
inline Weights<Count> keep(Weights<Count>, uint32_t bits) { return {__builtin_popcount(bits)}; }
inline Weights<Count> squares(Weights<Count> w) { return w; }  // themselves

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
inline void compress_group(const Count*, uint32_t, Count*) {}

// The sum over the groups of a block, each by group(j), at the same speed at which the groups come.
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
  // Where the temperature is so small that its inverse overflows, what is not the largest weighs nothing all the same.
  Weigh(double temperature, float largest)
      : factor(Lanes8::fill(1 / temperature < 1e300 ? 1 / temperature : 1e300)), shift(Lanes8::fill(double(largest))) {}
  Weights<double> operator()(const float* x) const {
    return {exp((Lanes8::load(x) - shift) * factor), exp((Lanes8::load(x + 8) - shift) * factor)};
  }
  // What the sum over any of n codes that weigh `total` may be off by: too little to be asked for.
  static double error(double, int64_t) { return 0; }
};

// Nearest in relative error to 2^r for |r| <= 1/2 among polynomials of this degree that are 1 at 0: off by less than
// 1.9 2^-24.
constexpr float kExp2Series[] = {1.32645911e-3f, 9.67161916e-3f, 5.55073507e-2f, 0.240222409f, 0.693147004f, 1.0f};

template <>
struct Weigh<float> {
  Vec factor, factor_rest, shift, smallest;
  // With t = (x - largest) log2(e) / temperature the weight is 2^n 2^r, where n is the integer next to t. n comes by
  // rounding to 2^23 and more, where integers are all there is, and with 127 added its bits are the exponent of 2^n: of
  // -127 zero.
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
  // What P - u T may be off by, for the sum P over any of n codes that weigh T = `total` in all, and any u: in units of
  // 2^-24 a weight by 4 of itself and by its |log| from the rounding of x - largest (and from that of products, where
  // they are not fused); P and T by the longest chain of sums. Now sum_i w_i |log w_i| is T times the entropy of w / T
  // less T log T, so at most T log(n / T).
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

// What those of the codes measure that are larger than the limit.
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

// The largest of them, NaN where one is NaN.
inline float largest_or_nan(const SampleCodes& codes) {
  constexpr uint32_t kAll = (1u << Vec::kSize) - 1;
  const Vec inf = Vec::fill(__builtin_inff());
  Vec even = Vec::fill(kNegInf), odd = even;
  uint32_t numbers = kAll;
  for (int64_t b = 0; b < codes.blocks(); ++b) {
    const float* x = codes.block(b);
    uint32_t here = kAll;  // a short chain of dependent instructions
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

// The codes larger than `low`, and not larger than `high`.
struct Bracket {
  float low, high;
};

// Where the smallest v probably lies of which what is larger measures less than the target; all codes measure `total`.
// From evenly spaced codes: what is above v, or what is below it, whichever is better known, measures in them as much
// as it does among all but for their number, within a few standard deviations.
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
  // What is forbidden says nothing of where the others are.
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
      const double one = part > 0 ? part_squares / part : unseen;  // more than the sample has
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
  float value;   // the smallest that stays, or some of those equal to it
  double above;  // what the larger ones measure: less than the target
};

// Of codes that measure `total`, more than the target.
template <class Real>
Threshold find_threshold(SampleCodes codes, const Real* weights, double total, double target, float* const (&ranges)[2],
                         Real* const (&range_weights)[2]) {
  const float inf = __builtin_inff();
  double base = 0;  // what lies above those that are left measures: less than the target
  bool guess = true;
  for (int round = 0; codes.n > kSampleGuess; ++round) {
    Bracket bracket;
    if (guess) {
      bracket = guess_bracket(codes, weights, total, target - base);
    } else {
      // A guess that failed: half of the order's range, so that 32 such rounds are the most there can be.
      const Extent extent = extent_of(codes.x, codes.n);
      if (extent.smallest == extent.largest) return {extent.smallest, base};
      const int64_t middle = (int64_t(order_of(extent.smallest)) + order_of(extent.largest)) >> 1;
      bracket = {float_of_order(int32_t(middle)), inf};
    }
    // Lays what is within a bracket side by side; returns what is above it.
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

// The first i with which `before` and the values up to it sum to more than the goal, or else the last that is not zero.
// `before` becomes the sum in front of it.
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

// The place among the codes of the one drawn, or kUndecided where rounding may have moved it; `top_k` are those of them
// that top_k keeps.
template <class Real>
int64_t sample_place(const SampleCodes& codes, const Stayers& top_k, const SampleSettings& settings, float largest,
                     double uniform, const SampleScratch& scratch) {
  const Weigh<Real> weigh(settings.temperature, largest);
  Real* const weights = reinterpret_cast<Real*>(scratch.weights);
  double total = 0;
  auto sum_blocks = [&](Stayers stayers, auto group) {
    total = 0;
    for (int64_t b = 0; b < codes.blocks(); ++b) {
      scratch.ties[b] = stayers.ties;
      const float* x = codes.block(b);
      scratch.sums[b] = sum_of_block<Real>([&](int64_t j) { return group(x + j, b * kSampleBlock + j, stayers); });
      total += scratch.sums[b];
    }
  };
  Stayers stayers = top_k;
  const bool cut = top_k.value > -__builtin_inff(), nucleus = settings.top_p < 1;
  if (!cut && !nucleus) {
    sum_blocks(stayers, [&](const float* x, int64_t, Stayers&) { return weigh(x); });
  } else if (!nucleus) {
    sum_blocks(stayers, [&](const float* x, int64_t, Stayers& kept) { return keep(weigh(x), kept.next(x)); });
  } else {
    sum_blocks(stayers, [&](const float* x, int64_t i, Stayers& kept) {
      Weights<Real> w = weigh(x);
      if (cut) w = keep(w, kept.next(x));
      w.store(weights + i);
      return w;
    });
  }
  double error = weigh.error(total, codes.n);
  if (nucleus) {
    const double target = settings.top_p * total;
    Real* const range_weights[2] = {reinterpret_cast<Real*>(scratch.range_weights[0]),
                                    reinterpret_cast<Real*>(scratch.range_weights[1])};
    const Threshold found = find_threshold(codes, weights, total, target, scratch.ranges, range_weights);
    float value[kSampleGroup];
    for (float& one : value) one = found.value;
    const double each = weigh(value).sum() / kSampleGroup;
    // Those of equal logits before which too little has been summed; all, where they weigh nothing.
    int64_t ties = codes.n;
    if ((target - found.above) / each < double(codes.n)) {
      ties = int64_t((target - found.above) / each);
      while (ties > 0 && found.above + double(ties - 1) * each >= target) --ties;
      while (found.above + double(ties) * each < target) ++ties;
    }
    // Where the cut may lie one code earlier or later, so much less or more stays. What is drawn all the same weighs
    // more than twice that, and so is certain to stay.
    const double up_to = found.above + double(ties) * each;
    if (up_to - each > target - error || up_to < target + error) error += error + each;
    stayers = {found.value, ties};
    sum_blocks(stayers, [&](const float* x, int64_t i, Stayers& kept) {
      return keep(Weights<Real>::load(weights + i), kept.next(x));
    });
  }
  const double goal = uniform * total;
  double before = 0;
  const int64_t block = first_beyond(codes.blocks(), goal, before, [&](int64_t b) { return scratch.sums[b]; });
  const float* const x = codes.block(block);
  Real w[kSampleBlock];
  stayers.ties = scratch.ties[block];
  for (int64_t j = 0; j < kSampleBlock; j += kSampleGroup) {
    keep(nucleus ? Weights<Real>::load(weights + block * kSampleBlock + j) : weigh(x + j), stayers.next(x + j))
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

// A code in [0, num_codes), or -1 where the row has NaN, +inf, or nothing but -inf; uniform in (0, 1). `memory` has
// sample_scratch_bytes(num_codes) bytes, aligned to a cache line.
inline int64_t sample_row(const float* logits, int64_t num_codes, const SampleSettings& settings, double uniform,
                          void* memory) {
  const float inf = __builtin_inff();
  const SampleScratch scratch = divide_sample_scratch(memory, num_codes);
  const int64_t whole = num_codes / kSampleBlock * kSampleBlock;
  for (int64_t i = 0; i < kSampleBlock; ++i) scratch.last[i] = whole + i < num_codes ? logits[whole + i] : -inf;
  const SampleCodes row{logits, num_codes, scratch.last};
  const bool greedy = settings.temperature == 0 || settings.top_k == 1;

  // The candidates: larger than a guess that leaves top_k and more, or NaN.
  SampleCodes codes = row;
  float guess = -inf;
  if (!greedy && settings.top_k < num_codes) {
    const double kept = double(settings.top_k);
    Count* const ones = static_cast<Count*>(memory);  // which are not read
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

  Stayers top_k{-inf, codes.n};
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
  // The code of that candidate.
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
