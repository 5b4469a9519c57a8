// Soft labels on a CPU, compiled once per instruction set.
//
//   Q_k = softmax_k(-|x - e_k|^2 / tau) = softmax_k(-2 t_k / tau),   t_k the scores of shared/code_scores.h
// A tile of rows goes through three steps:
//   scan     scores of all codes: 2 C operations per row and code; the codebook is read once per tile
//   refine   float64 distances for the codes that matter, if rounding could show in Q: bound B9 (docs/bounds.md)
//   row      the exponentials of both softmaxes, each computed once, and all sums: logits are read for their maximum
//            and again (from cache) for these, and the gradient is written once
// Sums are float32 over kBlockVecs vectors and float64 beyond. A result depends on its row alone. Denormals are flushed
// to zero (cpu.cpp sets that per thread), so a Q below about 1e-38 is zero.
#include "ops/soft_label/kernel_table.h"
#include "shared/code_scores.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kBlockVecs = 64;
constexpr double kAlwaysRefine = 1.0 / 16, kNeverRefine = 1.0 / 4096;
constexpr int kFew = 64;
constexpr double kHuge = 1e37;  // a tenth of the range of float32

// Bytes for a row's exponentials of its logits.
size_t scratch_bytes(int64_t num_codes) { return size_t(score_stride(num_codes)) * sizeof(float); }

// --- refine ----------------------------------------------------------------------------------------------

// Q_k is proportional to e^((shift - scores[k]) factor), at most 1.
struct Exponent {
  float shift, factor;
};

// E of bound B9.
double score_error(double a, double n, int64_t channels) {
  const double u = 0x1p-24, terms = dot_terms(channels) + 4;
  return terms * u / (1 - terms * u) * a * n + 1.1 * u * n * n + 0x1p-125 * (double(channels) + 4) * (1 + a + n);
}

Exponent refine(const CenteredCodes& codebook, double tau, const float* x, double squared, float lowest,
                float* scores) {
  const int64_t channels = codebook.channels, num_codes = codebook.num_codes;
  const double a = __builtin_sqrt(squared), n = codebook.max_norm;
  const double most = 3e38, wanted = 2 / tau;
  const Exponent plain{lowest, float(wanted < most ? wanted : most)};
  auto exact = [&](int64_t k) { return squared_distance(x, codebook.codes_kc + k * channels, channels); };
  // If a product could overflow, the scores are meaningless.
  if (!((a + n) * (a + n) < kHuge) || double(channels) > 0x1p20) {
    double nearest = __builtin_inf();
    for (int64_t k = 0; k < num_codes; ++k) nearest = exact(k) < nearest ? exact(k) : nearest;
    for (int64_t k = 0; k < num_codes; ++k) scores[k] = float((exact(k) - nearest) / tau);
    return {0.0f, 1.0f};
  }
  if (wanted < 1e-37) {
    // Such a factor underflows float32: Q is nearly uniform.
    for (int64_t k = 0; k < num_codes; ++k) scores[k] = float((double(scores[k]) - double(lowest)) * wanted);
    return {0.0f, 1.0f};
  }
  const double error = 4 * score_error(a, n, channels) / tau;
  if (error <= kNeverRefine) return plain;
  const bool all = error > kAlwaysRefine;
  const double reach = (error + (all ? 40 : 12)) * (1 + 1e-6);
  if (!all && !few_are_near(scores, num_codes, float(double(lowest) + reach / wanted), kFew)) return plain;
  for (int64_t k = 0; k < num_codes; ++k) scores[k] = (scores[k] - plain.shift) * plain.factor;
  double nearest = __builtin_inf();
  for_each_near(scores, num_codes, float(reach), [&](int64_t k) {
    const double d = exact(k);
    nearest = d < nearest ? d : nearest;
  });
  for_each_near(scores, num_codes, float(reach), [&](int64_t k) { scores[k] = float((exact(k) - nearest) / tau); });
  return {0.0f, 1.0f};
}

// --- rows ------------------------------------------------------------------------------------------------

// A vector that accumulates in float32 within a block and in float64 beyond.
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
  if (k < num_codes) high[0] = max(load_partial<F>(logits + k, num_codes - k, -__builtin_inff()), high[0]);
  float lanes[Vec::kSize], result = -__builtin_inff();
  max(max(high[0], high[1]), max(high[2], high[3])).store(lanes);
  for (const float lane : lanes) result = lane > result ? lane : result;
  return result;
}

inline Vec label_exponential(const Exponent& exponent, Vec score) {
  return exp((Vec::fill(exponent.shift) - score) * Vec::fill(exponent.factor));
}

void distance_softmax(const CenteredCodes& codebook, double tau, const LabelTile& rows, float* const* q) {
  const int64_t num_codes = codebook.num_codes;
  const RowTile tile = row_tile(rows.memory, num_codes, codebook.channels, rows.parts);
  for (int row = rows.first; row < rows.last; ++row) {
    float* scores = tile.scores + row * tile.stride;
    if (!__builtin_isfinite(tile.squared[row])) {
      for (int64_t k = 0; k < num_codes; ++k) q[row][k] = __builtin_nanf("");
      continue;
    }
    const Exponent exponent =
        refine(codebook, tau, rows.x[row], tile.squared[row], lowest_of_row(tile, rows.parts, row), scores);
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
    if (k < num_codes) store_partial<Float32>(Vec::load(scores + k) * inverse, q[row] + k, num_codes - k);
  }
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % (sizeof(float) * Vec::kSize) == 0; }

// Replaces `scores` by the exponentials of the labels, and `exps` by those of the logits. Prefetches the logits of the
// next row; the last row may be its own next.
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
  // The sums, block by block.
  for (int64_t k = 0; k < num_codes;) {
    const int64_t end = k + kBlockVecs * Vec::kSize < num_codes ? k + kBlockVecs * Vec::kSize : num_codes;
    for (; k + Vec::kSize <= end; k += Vec::kSize) take(k, F::load(logits + k));
    if (k < end) {
      // Far below all logits, yet finite: with a label of zero it must not give NaN.
      take(k, load_partial<F>(logits + k, end - k, -1e38f));
      k = end;
    }
    label_sum.end_block();
    logit_sum.end_block();
    product_sum.end_block();
  }
  if (!__builtin_isfinite(product_sum.total)) {
    // A logit is -inf, or so small that a difference overflows: it does not count if its label is zero.
    product_sum.total = 0;
    for (int64_t k = 0; k < num_codes; k += Vec::kSize) {
      const int64_t n = num_codes - k < Vec::kSize ? num_codes - k : Vec::kSize;
      float values[Vec::kSize];
      load_partial<F>(logits + k, n, 0.0f).store(values);
      for (int64_t j = 0; j < n; ++j) {
        if (scores[k + j] > 0) product_sum.total += double(scores[k + j]) * (double(values[j]) - double(largest));
      }
    }
  }
  // Loss, and gradient from the stored exponentials.
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
    stream_fence();
  }
  for (; k + Vec::kSize <= num_codes; k += Vec::kSize) F::store(gradient_at(k), gradient + k);
  if (k < num_codes) store_partial<F>(gradient_at(k), gradient + k, num_codes - k);
}

template <class F>
void finish_rows(const CenteredCodes& codebook, double tau, const LabelTile& at, const CrossEntropyRow* rows,
                 void* memory) {
  const int64_t num_codes = codebook.num_codes;
  const RowTile tile = row_tile(at.memory, num_codes, codebook.channels, at.parts);
  float* exps = static_cast<float*>(memory);
  for (int i = at.first; i < at.last; ++i) {
    const CrossEntropyRow& row = rows[i];
    if (!__builtin_isfinite(tile.squared[i])) {
      const Vec nan = Vec::fill(__builtin_nanf(""));
      *row.loss = __builtin_nanf("");
      typename F::T* gradient = static_cast<typename F::T*>(row.gradient);
      for (int64_t k = 0; gradient != nullptr && k < num_codes; k += Vec::kSize) {
        store_partial<F>(nan, gradient + k, num_codes - k < Vec::kSize ? num_codes - k : Vec::kSize);
      }
      continue;
    }
    const CrossEntropyRow& next = rows[i + 1 < at.last ? i + 1 : i];
    float* scores = tile.scores + i * tile.stride;
    const Exponent exponent = refine(codebook, tau, at.x[i], tile.squared[i], lowest_of_row(tile, at.parts, i), scores);
    if (row.gradient != nullptr) {
      finish_row<F, true>(row, next, num_codes, exponent, scores, exps);
    } else {
      finish_row<F, false>(row, next, num_codes, exponent, scores, nullptr);
    }
  }
}

void cross_entropy(const CenteredCodes& codebook, double tau, const LabelTile& tile, const CrossEntropyRow* rows,
                   FloatType type, void* memory) {
  if (type == FloatType::kFloat32) {
    finish_rows<Float32>(codebook, tau, tile, rows, memory);
  } else if (type == FloatType::kFloat16) {
    finish_rows<Float16>(codebook, tau, tile, rows, memory);
  } else {
    finish_rows<BFloat16>(codebook, tau, tile, rows, memory);
  }
}

}  // namespace

constexpr SoftLabelKernels soft_label_kernels = {
    .scores = kCodeScores,
    .scratch_bytes = scratch_bytes,
    .distance_softmax = distance_softmax,
    .cross_entropy = cross_entropy,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
