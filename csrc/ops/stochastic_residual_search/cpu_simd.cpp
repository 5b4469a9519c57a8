// Codes sampled from Q_tau on a CPU, compiled once per instruction set.
//
// The definition samples the first code, in code order, whose cumulative weight exp(-D_k / tau) exceeds u times the
// total, with float64 distances D_k. The fast step uses float32 scores (shared/code_scores.h: 2 C operations per row
// and code, a score is written once and read twice from cache), one exponential each, and float64 sums of blocks. Bound
// B8 (docs/bounds.md) tells whether u could fall to another code. If so, the codes near enough to have any weight are
// decided by float64 distances, unless there are too many of them and the weights are accurate to kTolerated. Nothing
// of size rows x codes is stored beyond a tile's scores, and a result depends on its row alone.
#include "ops/stochastic_residual_search/kernel_table.h"
#include "shared/code_scores.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int64_t kBlock = kScoreBlock;  // codes whose weights are summed in float32
constexpr int kAdditions = kBlock / (2 * Vec::kSize) + 1;
constexpr double kRoundoff = 0x1p-24;
constexpr double kReach = 40;
constexpr double kHuge = 1e37;     // a tenth of the range of float32
constexpr double kBlurred = 0.25;  // relative error of the weights above which the fast step is not worth trying
constexpr float kLeastFactor = 1e-44f;
// Rows whose mass lies in more than few(K) codes keep the code of the fast step up to this relative error. See B8.
constexpr double kTolerated = 0x1p-10;
inline int64_t few(int64_t num_codes) { return 32 + num_codes / 64; }

// Parts of the scratch memory.
struct Scratch {
  double* blocks;  // (blocks): sums of weights
  int32_t* near;   // (num_codes): candidates for float64
  double* weight;  // (num_codes): their distances, then weights
  size_t bytes;
};

Scratch divide(void* memory, int64_t num_codes) {
  Division division{static_cast<char*>(memory)};
  Scratch scratch{};
  division.take(scratch.blocks, round_to(kBlock, num_codes) / kBlock);
  division.take(scratch.near, num_codes);
  division.take(scratch.weight, num_codes);
  scratch.bytes = division.used;
  return scratch;
}

size_t scratch_bytes(int64_t num_codes) { return divide(nullptr, num_codes).bytes; }

inline Vec weights(const float* scores, Vec lowest, Vec factor) { return exp((lowest - Vec::load(scores)) * factor); }

inline double sum_of_lanes(Vec a) {
  float lanes[Vec::kSize];
  a.store(lanes);
  double sum = 0;
  for (const float lane : lanes) sum += double(lane);
  return sum;
}

struct Sampled {
  int64_t code;
  bool certain;  // whether it is the definition's code
};

// Samples by float32 weights. `eta` bounds their relative error.
Sampled sample_by_scores(const CenteredCodes& codebook, const float* scores, float lowest, double two_over_tau,
                         double uniform, double eta, double* blocks) {
  const int64_t num_blocks = round_to(kBlock, codebook.num_codes) / kBlock;
  // Never zero, so that the +inf past the last code stays infinite.
  const float factor = two_over_tau > double(kLeastFactor) ? float(two_over_tau) : kLeastFactor;
  const Vec low = Vec::fill(lowest), factors = Vec::fill(factor);
  double total = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    Vec even = Vec::zero(), odd = Vec::zero();
    for (int64_t k = b * kBlock; k < (b + 1) * kBlock; k += 2 * Vec::kSize) {
      even = even + weights(scores + k, low, factors);
      odd = odd + weights(scores + k + Vec::kSize, low, factors);
    }
    blocks[b] = sum_of_lanes(even + odd);
    total += blocks[b];
  }
  const double target = uniform * total;
  double before = 0;
  int64_t b = 0;
  for (; b + 1 < num_blocks && before + blocks[b] <= target; ++b) before += blocks[b];
  double behind = 0;
  for (int64_t other = b + 1; other < num_blocks; ++other) behind += blocks[other];

  // Within the block, add the weights one by one.
  float within[kBlock];
  for (int64_t k = 0; k < kBlock; k += Vec::kSize) weights(scores + b * kBlock + k, low, factors).store(within + k);
  double inside = 0;
  for (const float weight : within) inside += double(weight);
  total = before + inside + behind;
  const double negligible = (1e-12 + double(codebook.num_codes) * 1e-16) * total;
  double up_to = before;
  for (int64_t k = 0; k < kBlock; ++k) {
    const double without = up_to;
    up_to += double(within[k]);
    if (up_to <= uniform * total) continue;
    const double rest = total - without, rest_behind = total - up_to;
    const bool not_later = up_to * (1 - eta) * (1 - uniform) - rest_behind * (1 + eta) * uniform > negligible;
    const bool not_earlier = rest * (1 - eta) * uniform - without * (1 + eta) * (1 - uniform) > negligible;
    return {b * kBlock + k, not_later && not_earlier};
  }
  // The block's sum, added in another order, was larger than that of its weights: take the last code with any weight.
  int64_t last = kBlock - 1;
  while (last > 0 && within[last] == 0) --last;
  return {b * kBlock + last, false};
}

// Distances of four codes together, so that their chains of additions overlap.
inline void squared_distances(const float* r, const float* codes_kc, int64_t channels, const int32_t* codes,
                              double* distances) {
  const float* e[4];
  for (int i = 0; i < 4; ++i) e[i] = codes_kc + int64_t(codes[i]) * channels;
  Lanes8 sum[4] = {Lanes8::zero(), Lanes8::zero(), Lanes8::zero(), Lanes8::zero()};
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    const Lanes8 row = Lanes8::load(r + c);
    for (int i = 0; i < 4; ++i) {
      const Lanes8 difference = row - Lanes8::load(e[i] + c);
      sum[i] = sum[i] + difference * difference;
    }
  }
  if (const int64_t left = channels - c; left > 0) {
    const Lanes8 row = Lanes8::load_partial(r + c, left);
    for (int i = 0; i < 4; ++i) {
      const Lanes8 difference = row - Lanes8::load_partial(e[i] + c, left);
      sum[i] = sum[i] + difference * difference;
    }
  }
  for (int i = 0; i < 4; ++i) distances[i] = sum[i].sum();
}

// Samples by the definition, among the codes whose score is at most `limit`; among all if it is infinite.
int64_t sample_by_distances(const CenteredCodes& codebook, const float* r, const float* scores, float limit, double tau,
                            double uniform, const Scratch& scratch) {
  int64_t count = 0;
  if (__builtin_isinf(limit)) {
    for (; count < codebook.num_codes; ++count) scratch.near[count] = int32_t(count);
  } else {
    for_each_near(scores, codebook.num_codes, limit, [&](int64_t k) { scratch.near[count++] = int32_t(k); });
  }
  int64_t done = 0;
  for (; done + 4 <= count; done += 4) {
    squared_distances(r, codebook.codes_kc, codebook.channels, scratch.near + done, scratch.weight + done);
  }
  for (; done < count; ++done) {
    const float* e = codebook.codes_kc + int64_t(scratch.near[done]) * codebook.channels;
    scratch.weight[done] = squared_distance(r, e, codebook.channels);
  }
  double nearest = scratch.weight[0];
  for (int64_t i = 1; i < count; ++i) nearest = scratch.weight[i] < nearest ? scratch.weight[i] : nearest;
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    scratch.weight[i] = __builtin_exp(-(scratch.weight[i] - nearest) / tau);
    total += scratch.weight[i];
  }
  const double target = uniform * total;
  double up_to = 0;
  for (int64_t i = 0; i < count; ++i) {
    up_to += scratch.weight[i];
    // Rounding may raise the target to the total: then take the last code with any weight.
    if (up_to > target || up_to >= total) return scratch.near[i];
  }
  return scratch.near[count - 1];
}

// E(q) of B8, which includes the error of the definition's own sums.
inline double score_error(double r_norm, double q, int64_t channels) {
  const double terms = dot_terms(channels) + 4, extent = r_norm + q;
  const double dot = terms * kRoundoff / (1 - terms * kRoundoff) * r_norm * q;
  const double definition = (double(channels) / 8 + 8) * 0x1p-53 * extent * extent;
  return 1.001 * (dot + 1.05 * kRoundoff * q * q + definition) + double(channels) * 0x1p-148;
}

int64_t sample_row(const CenteredCodes& codebook, const float* r, double r_squared, const float* scores, float lowest,
                   double tau, double uniform, const Scratch& scratch) {
  const double r_norm = __builtin_sqrt(r_squared);
  const double extent = r_norm + codebook.max_norm;
  // If a score could overflow, or has too many terms for the bound, all codes are evaluated in float64.
  if (!(extent * extent < kHuge) || codebook.channels > (1 << 24)) {
    return sample_by_distances(codebook, r, scores, __builtin_inff(), tau, uniform, scratch);
  }
  const double error = score_error(r_norm, codebook.max_norm, codebook.channels);
  const float limit = round_up(double(lowest) + 2 * error + kReach / 2 * tau);
  if (2 * error / tau < kBlurred) {
    // The smallest distance is twice the lowest score plus |r'|^2.
    const double nearest = 2 * (double(lowest) + error) + r_squared;
    const double reach = r_norm + __builtin_sqrt((nearest > 0 ? nearest : 0) + kReach * tau);
    const double q = reach < codebook.max_norm ? reach : codebook.max_norm;
    const double farthest = extent * extent / tau, x = farthest < kReach ? farthest : kReach + 1;
    const double a = 2 * score_error(r_norm, q, codebook.channels) / tau + 3.1 * kRoundoff * (x + 1);
    const double eta = 1.01 * (a * (1 + a) + (5 + kAdditions) * kRoundoff);
    const Sampled sampled = sample_by_scores(codebook, scores, lowest, 2 / tau, uniform, eta, scratch.blocks);
    if (sampled.certain ||
        (eta <= kTolerated && !few_are_near(scores, codebook.num_codes, limit, few(codebook.num_codes)))) {
      return sampled.code;
    }
  }
  return sample_by_distances(codebook, r, scores, limit, tau, uniform, scratch);
}

void sample(const CenteredCodes& codebook, const SampleRows& rows, double tau, void* memory, int64_t* codes) {
  const int64_t channels = codebook.channels, num_codes = codebook.num_codes;
  const RowTile tile = row_tile(rows.tile, num_codes, channels, rows.parts);
  const Scratch scratch = divide(memory, num_codes);
  for (int i = rows.first; i < rows.last; ++i) {
    float* scores = tile.scores + i * tile.stride;
    // The rest of the last block must weigh nothing.
    for (int64_t k = padded_codes(num_codes); k < round_to(kBlock, num_codes); ++k) scores[k] = __builtin_inff();
    codes[i] = !__builtin_isfinite(tile.squared[i])
                   ? -1
                   : sample_row(codebook, rows.residuals + i * channels, tile.squared[i], scores,
                                lowest_of_row(tile, rows.parts, i), tau, rows.uniforms[i], scratch);
  }
}

}  // namespace

constexpr StochasticResidualSearchKernels stochastic_residual_search_kernels = {
    .scores = kCodeScores,
    .scratch_bytes = scratch_bytes,
    .sample = sample,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
