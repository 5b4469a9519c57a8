// Codes drawn from Q_tau on a CPU, compiled once per instruction set.
//
// The definition draws the first code, in code order, whose cumulative weight exceeds u times the total, with weights
// W_k = exp(-D_k / tau) of the float64 distances D_k. Two steps:
//
//   by float32   scores of all codes (shared/code_scores.h: 2 C operations per row and code, a score written once and
//                read twice from the cache), one exponential each, sums of blocks in float64.
//                A bound on the error of every weight says whether u could fall to another code.
//   by float64   where it could: distances of the codes near enough to have any weight, by the definition. These are
//                few while tau is small, and then the code drawn is the definition's. Where the mass is spread over
//                many codes, u lies near a boundary almost always, and float64 would cost more than the scan: there the
//                first step's code stands, if its weights are off by a relative kTolerated at most.
//
// Both depend on the row alone, not on its place or its neighbours.
//
// A tile of rows keeps its scores of all codes; nothing of size rows x codes is kept.
//
// Scores t_k are those of shared/code_scores.h, |t_k - s_k| <= E(q) of a code with |e'_k| <= q, where s_k is half of
// D_k - |r'|^2: what is said there and C 2^-148 where products underflow. The definition's own sums are off by a
// relative (C/8 + 8) 2^-53 at most, which E(q) is made to include.
//
// Weights. w_k = exp((t_min - t_k) 2/tau), against W_k exp((2 t_min + |r'|^2) / tau), which differ by a factor in
// exp(+-a), a = 2 E(q)/tau + 3.1 u x, x the size of the exponent; then by 4 u of `exp`, and by 1 u for every addition
// of a block's lane. Codes farther than kReach tau from the nearest weigh less than e^-kReach, and as many of them as
// there are do not count (`negligible`). The others satisfy x <= kReach + a and |e'_k| <= |r'| + sqrt(D_min + kReach
// tau), which keeps q small at the later depths.
//
// Test. With relative errors of at most `eta`, S the sum of the w up to and including code j and T the sum of those
// behind, S (1 - eta) (1 - u) > T (1 + eta) u says that the exact sums are on the same side.
#include "ops/stochastic_residual_search/kernel_table.h"
#include "shared/code_scores.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int64_t kBlock = kScoreBlock;  // codes whose weights are summed in float32
constexpr int kAdditions = kBlock / (2 * Vec::kSize) + 1;
constexpr double kRoundoff = 0x1p-24;
constexpr double kReach = 40;
constexpr double kHuge = 1e37;     // a tenth of float's range
constexpr double kBlurred = 0.25;  // a relative error of weights above that decides too little to be tried
constexpr float kLeastFactor = 1e-44f;
// Rows whose mass lies in more codes than few(K) keep the first step's code up to this error: u is then within half of
// it of a boundary of the definition (a bound; sums of many errors come to a hundredth of it).
constexpr double kTolerated = 0x1p-10;
inline int64_t few(int64_t num_codes) { return 32 + num_codes / 64; }

// A float that is not below `value`; 1e-44 stands for what denormals lose.
inline float round_up(double value) { return float(value + 1.2e-7 * __builtin_fabs(value) + 1e-44); }

// Parts of the scratch memory.
struct Scratch {
  double* blocks;  // (blocks): sums of weights
  int32_t* near;   // (num_codes): codes that float64 decides among
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
  bool certain;  // the definition's
};

// The code by float32 weights. `eta` as above.
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

  // Within the block, from its weights one by one.
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
  // The block's sum, made in another order, promised more than its weights hold: the last that has any.
  int64_t last = kBlock - 1;
  while (last > 0 && within[last] == 0) --last;
  return {b * kBlock + last, false};
}

// Distances of four codes together: one waits for its additions while the others go on.
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

// The code by the definition, among those whose score is at most `limit`; all where it is infinite.
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
    // Rounding may push the target up to the total: then the last code that has weight is the one.
    if (up_to > target || up_to >= total) return scratch.near[i];
  }
  return scratch.near[count - 1];
}

// E(q), and what the definition's sums are off by.
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
  // Where a score could overflow, or has too many terms for the bound, all codes go to float64.
  if (!(extent * extent < kHuge) || codebook.channels > (1 << 24)) {
    return sample_by_distances(codebook, r, scores, __builtin_inff(), tau, uniform, scratch);
  }
  const double error = score_error(r_norm, codebook.max_norm, codebook.channels);
  const float limit = round_up(double(lowest) + 2 * error + kReach / 2 * tau);
  if (2 * error / tau < kBlurred) {
    // Twice the lowest score and |r'|^2 make the smallest distance.
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
    // The rest of the last block weighs nothing.
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
