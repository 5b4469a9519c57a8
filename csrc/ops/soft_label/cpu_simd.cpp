// Soft labels on a CPU, compiled once per instruction set.
//
//   Q_k = softmax_k(-|x - e_k|^2 / tau) = softmax_k(2 h_k / tau),   h_k = <x', e'_k> - |e'_k|^2 / 2,
//
// with x' = x - m and e'_k = e_k - m for any vector m: one in the middle of the codes, where they lie off the origin,
// so that h has digits left. kRows rows go together:
//   scan     products in registers, kCodeTile codes x kRows rows. A row is a lane: only the few rows are packed, and
//   the
//            codebook is read as it lies. Tiles are turned into (row, code) on their way to memory. 2 C operations per
//            row and code, the codebook read once per kRows rows, 4 kRows bytes of scores per code, which stay near.
//   refine   where rounding could be seen in Q, float64 for the codes that matter (below).
//   row      the exponentials of both softmaxes, each computed once, and all sums: logits are read once for their
//            maximum, once (from the cache) for that, and the gradient is written once.
//
// Sums run in float32 over kBlockVecs vectors and in float64 over those; a row's result depends on nothing but the row.
// Numbers below the normal floats are zero (cpu.cpp sets that for every thread), so a Q below about 1e-38 is zero.
//
// Refining. With u = 2^-24, a = |x'|, n = max|e'_k|, g(j) = j u / (1 - j u), half scores are off by at most
//   the dot product and its factors' rounding (x' and e' once each)   g(C + 3) a n
//   |e'|^2/2, in float64 from the unrounded difference, to float      u n^2 / 2
//   the subtraction                                                   u (n^2 / 2 + a n)
//   underflow: of C products and sums, of the three roundings         2^-125 (C + 3) (1 + a + n)
//   together  E = g(C + 4) a n + 1.1 u n^2 + 2^-125 (C + 3) (1 + a + n)
// and a difference of two scores by 4 E / tau. Where that is at most kSeldom, the scores serve as they are. Above,
// codes that could have the most of Q get their scores from distances in the definition's float64: a code with h_k <
// max h - 2 E - r tau has Q_k < e^-2r of the largest (its exact half score is more than r tau below that of the code
// with max h) and stays out.
//   4 E / tau > kSeen     r = 20: Q beyond is nothing. However many codes there are, for as tau -> 0 Q has to tend to
//                         the certified code.
//   above kSeldom         r = 6, where they are at most kFew: rounding errors have signs and stay far below their
//   bound,
//                         and a Q of more codes averages them; it is as good as one from any float32 products.
#include "common/exact.h"
#include "common/simd.h"
#include "ops/soft_label/rows.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kRowVecs = 2;
constexpr int kRows = kRowVecs * Vec::kSize;
#if defined(__AVX512F__)
constexpr int kCodeTile = 12;  // 12 x 2 accumulators of 32 registers
#else
constexpr int kCodeTile = 4;  // 4 x 2 of 16
#endif
constexpr int kBlockVecs = 64;
constexpr double kSeen = 1.0 / 16, kSeldom = 1.0 / 4096;
constexpr int kFew = 64;
constexpr double kHuge = 1e37;  // a tenth of float's range

int64_t round_up_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

int64_t padded(int64_t num_codes) { return round_up_to(round_up_to(num_codes, Vec::kSize), kCodeTile); }

// A cache line more than a row needs: rows a power of two apart would share the same few lines of the cache.
int64_t row_stride(int64_t num_codes) { return round_up_to(padded(num_codes), 16) + 16; }

struct Scratch {
  float* x_cn;        // (channels, kRows): the rows side by side, less the mean
  float* last_codes;  // (kCodeTile, channels): the last codes, and zeros
  float* scores;      // (kRows, row_stride)
  float* exps;        // (row_stride): of one row's logits
  float* highest;     // (kRows): of each row's half scores
  double* squared;    // (kRows): |x'|^2
  size_t bytes;
};

Scratch divide(void* memory, int64_t num_codes, int64_t channels) {
  size_t used = 0;
  auto take = [&used, memory](int64_t bytes) {
    void* part = static_cast<char*>(memory) + used;
    used += size_t(round_up_to(bytes, 64));
    return part;
  };
  const int64_t size = sizeof(float);
  Scratch scratch{};
  scratch.x_cn = static_cast<float*>(take(channels * kRows * size));
  scratch.last_codes = static_cast<float*>(take(kCodeTile * channels * size));
  scratch.scores = static_cast<float*>(take(kRows * row_stride(num_codes) * size));
  scratch.exps = static_cast<float*>(take(row_stride(num_codes) * size));
  scratch.highest = static_cast<float*>(take(kRows * size));
  scratch.squared = static_cast<double*>(take(kRows * int64_t(sizeof(double))));
  scratch.bytes = used;
  return scratch;
}

size_t scratch_bytes(int64_t num_codes, int64_t channels) { return divide(nullptr, num_codes, channels).bytes; }

// --- scan ------------------------------------------------------------------------------------------------

// Half scores of kCodeTile codes, channels apart, for V vectors of rows.
template <int V>
[[gnu::always_inline]] inline void scan_tile(const float* __restrict__ x_cn, const float* __restrict__ codes,
                                             const float* half_norms, int64_t channels, float* scores, int64_t stride,
                                             Vec (&highest)[V]) {
  Vec dot[kCodeTile][V];
#pragma GCC unroll 16
  for (int i = 0; i < kCodeTile; ++i) {
    for (int v = 0; v < V; ++v) dot[i][v] = Vec::zero();
  }
  // A pointer for every fourth code, the others by strides; hidden from the compiler, which would make it a pointer for
  // each, more than there are registers.
  const float* fourth[kCodeTile / 4];
  for (int i = 0; i < kCodeTile / 4; ++i) fourth[i] = codes + 4 * i * channels;
  const int64_t three = 3 * channels;
  for (int64_t c = 0; c < channels; ++c) {
    Vec r[V];
    for (int v = 0; v < V; ++v) r[v] = Vec::load(x_cn + c * kRows + v * Vec::kSize);
    // The next tile, which follows in memory.
    __builtin_prefetch(codes + kCodeTile * (channels + c), 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < kCodeTile / 4; ++i) {
      const float* e = fourth[i]++;
      asm("" : "+r"(e));
      const Vec four[4] = {Vec::fill(e[0]), Vec::fill(e[channels]), Vec::fill(e[2 * channels]), Vec::fill(e[three])};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        for (int v = 0; v < V; ++v) dot[4 * i + j][v] = fma(four[j], r[v], dot[4 * i + j][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCodeTile; ++i) {
    const Vec half_norm = Vec::fill(half_norms[i]);
    for (int v = 0; v < V; ++v) {
      dot[i][v] = dot[i][v] - half_norm;
      highest[v] = max(dot[i][v], highest[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCodeTile; i += 4) {
    for (int v = 0; v < V; ++v) {
      store_columns(dot[i][v], dot[i + 1][v], dot[i + 2][v], dot[i + 3][v], scores + v * Vec::kSize * stride + i,
                    stride);
    }
  }
}

template <int V>
void scan(const LabelCodebook& codebook, const Scratch& scratch) {
  const int64_t channels = codebook.channels, stride = row_stride(codebook.num_codes),
                whole = codebook.num_codes / kCodeTile * kCodeTile;
  Vec highest[V];
  for (int v = 0; v < V; ++v) highest[v] = Vec::fill(-__builtin_inff());
  for (int64_t k = 0; k < whole; k += kCodeTile) {
    scan_tile<V>(scratch.x_cn, codebook.centred_kc + k * channels, codebook.half_norms + k, channels,
                 scratch.scores + k, stride, highest);
  }
  for (int64_t k = whole; k < padded(codebook.num_codes); k += kCodeTile) {
    for (int64_t i = 0; i < kCodeTile; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        scratch.last_codes[i * channels + c] =
            k + i < codebook.num_codes ? codebook.centred_kc[(k + i) * channels + c] : 0.0f;
      }
    }
    scan_tile<V>(scratch.x_cn, scratch.last_codes, codebook.half_norms + k, channels, scratch.scores + k, stride,
                 highest);
  }
  for (int v = 0; v < V; ++v) highest[v].store(scratch.highest + v * Vec::kSize);
}

// Fills the lane of a row, with zeros where x is null.
void pack_row(const LabelCodebook& codebook, const float* x, int row, const Scratch& scratch) {
  const int64_t channels = codebook.channels;
  for (int64_t c = 0; c < channels; ++c) {
    scratch.x_cn[c * kRows + row] = x == nullptr ? 0.0f : codebook.mean == nullptr ? x[c] : x[c] - codebook.mean[c];
  }
  if (x == nullptr) return;
  scratch.squared[row] =
      codebook.mean == nullptr ? squared_norm(x, channels) : squared_distance(x, codebook.mean, channels);
}

// Half scores of the rows x(0) .. x(count - 1).
template <class X>
void scan_rows(const LabelCodebook& codebook, X x, int count, const Scratch& scratch) {
  for (int row = 0; row < kRows; ++row) pack_row(codebook, row < count ? x(row) : nullptr, row, scratch);
  if (count <= Vec::kSize) {
    scan<1>(codebook, scratch);
  } else {
    scan<kRowVecs>(codebook, scratch);
  }
}

// --- refine ----------------------------------------------------------------------------------------------

// The exponent of Q_k is (scores[k] - shift) * factor, at most 0.
struct Exponent {
  float shift, factor;
};

// How far a half score can be from the exact one.
double half_score_error(double a, double n, int64_t channels) {
  const double u = 0x1p-24, terms = double(channels) + 4;
  return terms * u / (1 - terms * u) * a * n + 1.1 * u * n * n + 0x1p-125 * terms * (1 + a + n);
}

bool has_more_above(const float* scores, int64_t num_codes, float limit, int64_t few) {
  const Vec least = Vec::fill(limit);
  int64_t count = 0;
  for (int64_t k = 0; k < num_codes && count <= few; k += Vec::kSize) {
    count += __builtin_popcount(at_most(least, Vec::load(scores + k)));
  }
  return count > few;
}

// visit(k) for the codes with exponents[k] >= limit; it may change that one.
template <class Visit>
void for_each_above(const float* exponents, int64_t num_codes, float limit, Visit visit) {
  const Vec least = Vec::fill(limit);
  for (int64_t k = 0; k < num_codes; k += Vec::kSize) {
    for (uint32_t left = at_most(least, Vec::load(exponents + k)); left != 0; left &= left - 1) {
      const int64_t found = k + __builtin_ctz(left);
      if (found < num_codes) visit(found);
    }
  }
}

Exponent refine(const LabelCodebook& codebook, const float* x, double squared, float highest, float* scores) {
  const int64_t channels = codebook.channels, num_codes = codebook.num_codes;
  const double a = __builtin_sqrt(squared), n = codebook.max_norm, tau = codebook.tau;
  const double most = 3e38, wanted = 2 / tau;
  const Exponent plain{highest, float(wanted < most ? wanted : most)};
  auto exact = [&](int64_t k) { return squared_distance(x, codebook.codes_kc + k * channels, channels); };
  // Where a product could overflow, no score says anything.
  if (!((a + n) * (a + n) < kHuge) || double(channels) > 0x1p20) {
    double nearest = __builtin_inf();
    for (int64_t k = 0; k < num_codes; ++k) nearest = exact(k) < nearest ? exact(k) : nearest;
    for (int64_t k = 0; k < num_codes; ++k) scores[k] = float((nearest - exact(k)) / tau);
    return {0.0f, 1.0f};
  }
  if (wanted < 1e-37) {
    // A factor that small is no float: Q is all but uniform.
    for (int64_t k = 0; k < num_codes; ++k) scores[k] = float((double(scores[k]) - double(highest)) * wanted);
    return {0.0f, 1.0f};
  }
  const double error = 4 * half_score_error(a, n, channels) / tau;
  if (error <= kSeldom) return plain;
  const bool all = error > kSeen;
  const double reach = (error + (all ? 40 : 12)) * (1 + 1e-6);
  if (!all && has_more_above(scores, num_codes, float(double(highest) - reach / wanted), kFew)) return plain;
  for (int64_t k = 0; k < num_codes; ++k) scores[k] = (scores[k] - plain.shift) * plain.factor;
  double nearest = __builtin_inf();
  for_each_above(scores, num_codes, float(-reach), [&](int64_t k) {
    const double d = exact(k);
    nearest = d < nearest ? d : nearest;
  });
  for_each_above(scores, num_codes, float(-reach), [&](int64_t k) { scores[k] = float((nearest - exact(k)) / tau); });
  return {0.0f, 1.0f};
}

// --- rows ------------------------------------------------------------------------------------------------

// One vector that sums up in float32 within a block and in float64 beyond.
struct BlockSum {
  Vec within = Vec::zero();
  double total = 0;
  void end_block() {
    float lanes[Vec::kSize];
    within.store(lanes);
    double sum = 0;
    for (const float lane : lanes) sum += double(lane);
    total += sum;
    within = Vec::zero();
  }
};

struct Float32 {
  using T = float;
  static constexpr bool kStreams = true;
  static Vec load(const T* p) { return Vec::load(p); }
  static void store(Vec a, T* p) { a.store(p); }
};
struct Float16 {
  using T = uint16_t;
  static constexpr bool kStreams = false;
  static Vec load(const T* p) { return load_float16(p); }
  static void store(Vec a, T* p) { store_float16(a, p); }
};
struct BFloat16 {
  using T = uint16_t;
  static constexpr bool kStreams = false;
  static Vec load(const T* p) { return load_bfloat16(p); }
  static void store(Vec a, T* p) { store_bfloat16(a, p); }
};

// The first n of a vector, fewer than there are, then `rest`.
template <class F>
Vec load_first(const typename F::T* p, int64_t n, float rest) {
  typename F::T raw[Vec::kSize] = {};
  float values[Vec::kSize];
  __builtin_memcpy(raw, p, size_t(n) * sizeof(*p));
  F::load(raw).store(values);
  for (int64_t j = n; j < Vec::kSize; ++j) values[j] = rest;
  return Vec::load(values);
}

template <class F>
void store_first(Vec a, typename F::T* p, int64_t n) {
  typename F::T raw[Vec::kSize];
  F::store(a, raw);
  __builtin_memcpy(p, raw, size_t(n) * sizeof(*p));
}

template <class F>
float largest_logit(const typename F::T* logits, int64_t num_codes) {
  constexpr int kChains = 4;
  Vec high[kChains];
  for (Vec& h : high) h = Vec::fill(-__builtin_inff());
  int64_t k = 0;
  for (; k + kChains * Vec::kSize <= num_codes; k += kChains * Vec::kSize) {
    for (int j = 0; j < kChains; ++j) high[j] = max(F::load(logits + k + j * Vec::kSize), high[j]);
  }
  for (; k + Vec::kSize <= num_codes; k += Vec::kSize) high[0] = max(F::load(logits + k), high[0]);
  if (k < num_codes) high[0] = max(load_first<F>(logits + k, num_codes - k, -__builtin_inff()), high[0]);
  float lanes[Vec::kSize], result = -__builtin_inff();
  max(max(high[0], high[1]), max(high[2], high[3])).store(lanes);
  for (const float lane : lanes) result = lane > result ? lane : result;
  return result;
}

inline Vec label_exponential(const Exponent& exponent, Vec score) {
  return exp((score - Vec::fill(exponent.shift)) * Vec::fill(exponent.factor));
}

void distance_softmax(const LabelCodebook& codebook, const float* const* x, float* const* q, int count, void* memory) {
  const Scratch scratch = divide(memory, codebook.num_codes, codebook.channels);
  const int64_t num_codes = codebook.num_codes, stride = row_stride(num_codes);
  scan_rows(codebook, [x](int row) { return x[row]; }, count, scratch);
  for (int row = 0; row < count; ++row) {
    float* scores = scratch.scores + row * stride;
    if (!__builtin_isfinite(scratch.squared[row])) {
      for (int64_t k = 0; k < num_codes; ++k) q[row][k] = __builtin_nanf("");
      continue;
    }
    const Exponent exponent = refine(codebook, x[row], scratch.squared[row], scratch.highest[row], scores);
    BlockSum sum;
    for (int64_t k = 0; k < num_codes; k += Vec::kSize) {
      const Vec e = label_exponential(exponent, Vec::load(scores + k));
      e.store(scores + k);
      sum.within = sum.within + e;
      if ((k / Vec::kSize + 1) % kBlockVecs == 0) sum.end_block();
    }
    sum.end_block();
    const Vec inverse = Vec::fill(float(1 / sum.total));
    int64_t k = 0;
    for (; k + Vec::kSize <= num_codes; k += Vec::kSize) (Vec::load(scores + k) * inverse).store(q[row] + k);
    if (k < num_codes) store_first<Float32>(Vec::load(scores + k) * inverse, q[row] + k, num_codes - k);
  }
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % (sizeof(float) * Vec::kSize) == 0; }

// `scores` become the exponentials of the labels, `exps` those of the logits. The logits of the next row are fetched on
// the way; the last row may be its own next.
template <class F, bool kGradient>
void finish_row(const CrossEntropyRow& row, const CrossEntropyRow& next, int64_t num_codes, const Exponent& exponent,
                float* scores, float* exps) {
  const typename F::T* ahead = static_cast<const typename F::T*>(next.logits);
  const typename F::T* logits = static_cast<const typename F::T*>(row.logits);
  const float largest = largest_logit<F>(logits, num_codes);
  BlockSum label_sum, logit_sum, product_sum;
  auto take = [&](int64_t k, Vec logit) {
    __builtin_prefetch(ahead + k, 0, 2);
    const Vec label = label_exponential(exponent, Vec::load(scores + k)), below = logit - Vec::fill(largest);
    const Vec e = exp(below);
    label.store(scores + k);
    if (kGradient) e.store(exps + k);
    label_sum.within = label_sum.within + label;
    logit_sum.within = logit_sum.within + e;
    product_sum.within = fma(label, below, product_sum.within);
  };
  for (int64_t k = 0; k < num_codes;) {
    const int64_t end = k + kBlockVecs * Vec::kSize < num_codes ? k + kBlockVecs * Vec::kSize : num_codes;
    for (; k + Vec::kSize <= end; k += Vec::kSize) take(k, F::load(logits + k));
    if (k < end) {
      // Far below all logits, but with labels of zero no NaN.
      take(k, load_first<F>(logits + k, end - k, -1e38f));
      k = end;
    }
    label_sum.end_block();
    logit_sum.end_block();
    product_sum.end_block();
  }
  if (!__builtin_isfinite(product_sum.total)) {
    // Some logit is -inf (or further below than a float says): where the label is zero, it does not count.
    product_sum.total = 0;
    for (int64_t k = 0; k < num_codes; k += Vec::kSize) {
      const int64_t n = num_codes - k < Vec::kSize ? num_codes - k : Vec::kSize;
      float values[Vec::kSize];
      load_first<F>(logits + k, n, 0.0f).store(values);
      for (int64_t j = 0; j < n; ++j) {
        if (scores[k + j] > 0) product_sum.total += double(scores[k + j]) * (double(values[j]) - double(largest));
      }
    }
  }
  *row.loss = float(__builtin_log(logit_sum.total) - product_sum.total / label_sum.total);
  if (!kGradient) return;
  typename F::T* gradient = static_cast<typename F::T*>(row.gradient);
  const Vec logit_factor = Vec::fill(float(double(row.weight) / logit_sum.total)),
            label_factor = Vec::fill(float(-double(row.weight) / label_sum.total));
  auto gradient_at = [&](int64_t k) {
    return fma(Vec::load(scores + k), label_factor, Vec::load(exps + k) * logit_factor);
  };
  int64_t k = 0;
  if (F::kStreams && row.streams && is_aligned(gradient)) {
    for (; k + Vec::kSize <= num_codes; k += Vec::kSize) stream(gradient_at(k), reinterpret_cast<float*>(gradient + k));
    end_streams();
  }
  for (; k + Vec::kSize <= num_codes; k += Vec::kSize) F::store(gradient_at(k), gradient + k);
  if (k < num_codes) store_first<F>(gradient_at(k), gradient + k, num_codes - k);
}

template <class F>
void finish_rows(const LabelCodebook& codebook, const CrossEntropyRow* rows, int count, const Scratch& scratch) {
  const int64_t num_codes = codebook.num_codes, stride = row_stride(num_codes);
  for (int i = 0; i < count; ++i) {
    const CrossEntropyRow& row = rows[i];
    if (!__builtin_isfinite(scratch.squared[i])) {
      const Vec nan = Vec::fill(__builtin_nanf(""));
      *row.loss = __builtin_nanf("");
      typename F::T* gradient = static_cast<typename F::T*>(row.gradient);
      for (int64_t k = 0; gradient != nullptr && k < num_codes; k += Vec::kSize) {
        store_first<F>(nan, gradient + k, num_codes - k < Vec::kSize ? num_codes - k : Vec::kSize);
      }
      continue;
    }
    const CrossEntropyRow& next = rows[i + 1 < count ? i + 1 : i];
    float* scores = scratch.scores + i * stride;
    const Exponent exponent = refine(codebook, row.x, scratch.squared[i], scratch.highest[i], scores);
    if (row.gradient != nullptr) {
      finish_row<F, true>(row, next, num_codes, exponent, scores, scratch.exps);
    } else {
      finish_row<F, false>(row, next, num_codes, exponent, scores, nullptr);
    }
  }
}

void cross_entropy(const LabelCodebook& codebook, const CrossEntropyRow* rows, FloatType type, int count,
                   void* memory) {
  const Scratch scratch = divide(memory, codebook.num_codes, codebook.channels);
  scan_rows(codebook, [rows](int row) { return rows[row].x; }, count, scratch);
  if (type == FloatType::kFloat32) {
    finish_rows<Float32>(codebook, rows, count, scratch);
  } else if (type == FloatType::kFloat16) {
    finish_rows<Float16>(codebook, rows, count, scratch);
  } else {
    finish_rows<BFloat16>(codebook, rows, count, scratch);
  }
}

}  // namespace

extern const SoftLabelKernel soft_label_kernel;
const SoftLabelKernel soft_label_kernel = {kRows,        padded,           scratch_bytes, squared_distance,
                                           squared_norm, distance_softmax, cross_entropy};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
