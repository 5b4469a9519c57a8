// Codes drawn from Q_tau on a CPU, compiled once per instruction set.
//
// The definition draws the first code, in code order, whose cumulative weight exceeds u times the total, with weights
// W_k = exp(-D_k / tau) of the float64 distances D_k. Two steps:
//
//   by float32   scores of all codes by row_tile x panel_width products in registers (2 C operations per row and code,
//                a score written once and read twice from the cache), one exponential each, sums of blocks in float64.
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
// Scores. With r' = r - m and e' = e - m, s_k = |e'_k|^2/2 - <r', e'_k> = (D_k - |r'|^2)/2. Let u = 2^-24,
// g(n) = n u / (1 - n u), t_k the computed score of a code with |e'_k| <= q:
//   r' and e' rounded to float:                 every product off by (1 + u)^2
//   dot product in parts of kPart channels:     min(C, kPart) products and additions, then C/kPart additions of parts
//   together, L = min(C, kPart) + C/kPart + 3:  error <= g(L) |r'| q, plus C 2^-149 where products underflow
//   half norm rounded from float64:             error <= u q^2 / 2
//   the subtraction:                            error <= u (q^2 / 2 + |r'| q)
//   |t_k - s_k| <= E(q) = g(L + 1) |r'| q + 2.1 u q^2 / 2 + C 2^-148
// and the definition's own sums are off by a relative (C/8 + 8) 2^-53 at most, which E(q) is made to include.
//
// Weights. w_k = exp((t_min - t_k) 2/tau), against W_k exp((2 t_min + |r'|^2) / tau), which differ by a factor in
// exp(+-a), a = 2 E(q)/tau + 3.1 u x, x the size of the exponent; then by 4 u of `exp`, and by 1 u for every addition
// of a block's lane. Codes farther than kReach tau from the nearest weigh less than e^-kReach, and as many of them as
// there are do not count (`negligible`). The others satisfy x <= kReach + a and |e'_k| <= |r'| + sqrt(D_min + kReach
// tau), which keeps q small at the later depths.
//
// Test. With relative errors of at most `eta`, S the sum of the w up to and including code j and T the sum of those
// behind, S (1 - eta) (1 - u) > T (1 + eta) u says that the exact sums are on the same side.
#include "common/exact.h"
#include "common/panels.h"
#include "ops/stochastic_residual_search/sample.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int64_t kPart = 32;    // channels
constexpr int64_t kBlock = 256;  // codes whose weights are summed in float32
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

inline int64_t round_to(int64_t multiple, int64_t n) { return (n + multiple - 1) / multiple * multiple; }

// A float that is not below `value`; 1e-44 stands for what denormals lose.
inline float round_up(double value) { return float(value + 1.2e-7 * __builtin_fabs(value) + 1e-44); }

// A row's scores are a cache line apart from a power of two: rows would share the same few lines of the cache.
inline int64_t score_stride(int64_t num_codes) { return round_to(kBlock, num_codes) + 16; }

// Parts of the scratch memory, each starting on a cache line.
struct Scratch {
  float* tiles;    // (tiles, channels, kRowTile): r - m
  float* lowest;   // (tiles, kRowTile, Vec::kSize): the smallest score in each lane
  float* scores;   // (rows up to whole tiles, score_stride)
  double* blocks;  // (blocks): sums of weights
  int32_t* near;   // (num_codes): codes that float64 decides among
  double* weight;  // (num_codes): their distances, then weights
  size_t bytes;
};

Scratch divide(void* memory, int64_t rows, int64_t num_codes, int64_t channels) {
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile, padded = tiles * kRowTile;
  size_t used = 0;
  auto take = [&used, memory](int64_t bytes) {
    void* part = static_cast<char*>(memory) + used;
    used += (size_t(bytes) + 63) / 64 * 64;
    return part;
  };
  Scratch scratch{};
  scratch.tiles = static_cast<float*>(take(padded * channels * int64_t(sizeof(float))));
  scratch.lowest = static_cast<float*>(take(padded * Vec::kSize * int64_t(sizeof(float))));
  scratch.scores = static_cast<float*>(take(padded * score_stride(num_codes) * int64_t(sizeof(float))));
  scratch.blocks = static_cast<double*>(take(round_to(kBlock, num_codes) / kBlock * int64_t(sizeof(double))));
  scratch.near = static_cast<int32_t*>(take(num_codes * int64_t(sizeof(int32_t))));
  scratch.weight = static_cast<double*>(take(num_codes * int64_t(sizeof(double))));
  scratch.bytes = used;
  return scratch;
}

size_t scratch_bytes(int64_t rows, int64_t num_codes, int64_t channels) {
  return divide(nullptr, rows, num_codes, channels).bytes;
}

double pack(const CentredCodebook& codebook, int64_t begin, int64_t end) {
  double largest = 0;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelWidth, left = codebook.num_codes - first;
    const int64_t width = left < kPanelWidth ? left : kPanelWidth;
    const float* codes = codebook.codes_kc + first * codebook.channels;
    float* column = codebook.panels + first * codebook.channels;
    for (int64_t c = 0; c < codebook.channels; ++c, column += kPanelWidth) {
      const float m = codebook.mean[c];
      for (int64_t w = 0; w < width; ++w) column[w] = codes[w * codebook.channels + c] - m;
      for (int64_t w = width; w < kPanelWidth; ++w) column[w] = 0.0f;
    }
    for (int64_t w = 0; w < kPanelWidth; ++w) {
      double norm = __builtin_inf();
      if (w < width) {
        const double squared = squared_distance(codes + w * codebook.channels, codebook.mean, codebook.channels);
        if (__builtin_isfinite(squared)) norm = squared;
        if (norm > largest) largest = norm;
      }
      codebook.half_norms[first + w] = float(norm / 2);
    }
  }
  return largest;
}

// Products of a tile with a panel, in parts of kPart channels.
[[gnu::always_inline]] inline void multiply_in_parts(const float* tile, const float* panel, int64_t channels,
                                                     Vec (&dot)[kRowTile][kPanelVecs]) {
  multiply_panel(tile, panel, channels < kPart ? channels : kPart, dot);
  for (int64_t c = kPart; c < channels; c += kPart) {
    const int64_t left = channels - c;
    Vec part[kRowTile][kPanelVecs];
    multiply_panel(tile + c * kRowTile, panel + c * kPanelWidth, left < kPart ? left : kPart, part);
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile; ++i) {
      for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = dot[i][v] + part[i][v];
    }
  }
}

// Scores of all codes for all rows, and the lowest of each.
void scan(const CentredCodebook& codebook, int64_t rows, const Scratch& scratch) {
  const int64_t channels = codebook.channels, stride = score_stride(codebook.num_codes);
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile;
  for (int64_t i = 0; i < tiles * kRowTile; ++i) Vec::fill(__builtin_inff()).store(scratch.lowest + i * Vec::kSize);
  int64_t first = 0;
  for (; first < codebook.num_codes; first += kPanelWidth) {
    for (int64_t t = 0; t < tiles; ++t) {
      Vec dot[kRowTile][kPanelVecs];
      multiply_in_parts(scratch.tiles + t * kRowTile * channels, codebook.panels + first * channels, channels, dot);
      float* scores = scratch.scores + t * kRowTile * stride + first;
      float* lowest = scratch.lowest + t * kRowTile * Vec::kSize;
#pragma GCC unroll 16
      for (int i = 0; i < kRowTile; ++i) {
        Vec low = Vec::load(lowest + i * Vec::kSize);
        for (int v = 0; v < kPanelVecs; ++v) {
          const Vec score = Vec::load(codebook.half_norms + first + v * Vec::kSize) - dot[i][v];
          score.store(scores + i * stride + v * Vec::kSize);
          low = min(low, score);
        }
        low.store(lowest + i * Vec::kSize);
      }
    }
  }
  // The rest of the last block weighs nothing.
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = first; k < round_to(kBlock, codebook.num_codes); ++k) {
      scratch.scores[i * stride + k] = __builtin_inff();
    }
  }
}

inline Vec weights(const float* scores, Vec lowest, Vec factor) { return exp((lowest - Vec::load(scores)) * factor); }

inline double sum_of_lanes(Vec a) {
  float lanes[Vec::kSize];
  a.store(lanes);
  double sum = 0;
  for (const float lane : lanes) sum += double(lane);
  return sum;
}

struct Draw {
  int64_t code;
  bool certain;  // the definition's
};

// The code by float32 weights. `eta` as above.
Draw draw_by_scores(const CentredCodebook& codebook, const float* scores, float lowest, double two_over_tau,
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

// visit(k) for all codes whose score is at most `limit`, in their order.
template <class Visit>
inline void for_each_near(const float* scores, int64_t num_codes, float limit, Visit visit) {
  const Vec limits = Vec::fill(limit);
  for (int64_t k = 0; k < num_codes; k += Vec::kSize) {
    for (uint32_t near = at_most(Vec::load(scores + k), limits); near != 0; near &= near - 1) {
      visit(k + __builtin_ctz(near));
    }
  }
}

bool few_are_near(const float* scores, int64_t num_codes, float limit) {
  const Vec limits = Vec::fill(limit);
  int64_t count = 0;
  for (int64_t k = 0; k < num_codes && count <= few(num_codes); k += Vec::kSize) {
    count += __builtin_popcount(at_most(Vec::load(scores + k), limits));
  }
  return count <= few(num_codes);
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
    const Lanes8 row = Lanes8::load_first(r + c, left);
    for (int i = 0; i < 4; ++i) {
      const Lanes8 difference = row - Lanes8::load_first(e[i] + c, left);
      sum[i] = sum[i] + difference * difference;
    }
  }
  for (int i = 0; i < 4; ++i) distances[i] = sum[i].sum();
}

// The code by the definition, among those whose score is at most `limit`; all where it is infinite.
int64_t draw_by_distances(const CentredCodebook& codebook, const float* r, const float* scores, float limit, double tau,
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
  const int64_t part = channels < kPart ? channels : kPart;
  const double terms = double(part + channels / kPart + 4), extent = r_norm + q;
  const double dot = terms * kRoundoff / (1 - terms * kRoundoff) * r_norm * q;
  const double definition = (double(channels) / 8 + 8) * 0x1p-53 * extent * extent;
  return 1.001 * (dot + 1.05 * kRoundoff * q * q + definition) + double(channels) * 0x1p-148;
}

int64_t draw(const CentredCodebook& codebook, const float* r, const float* scores, const float* lowest_lanes,
             double tau, double uniform, const Scratch& scratch) {
  const double r_squared = squared_distance(r, codebook.mean, codebook.channels), r_norm = __builtin_sqrt(r_squared);
  const double extent = r_norm + codebook.max_norm;
  // Where a score could overflow, or has too many terms for the bound, all codes go to float64.
  if (!(extent * extent < kHuge) || codebook.channels > (1 << 24)) {
    return draw_by_distances(codebook, r, scores, __builtin_inff(), tau, uniform, scratch);
  }
  float lowest = lowest_lanes[0];
  for (int lane = 1; lane < Vec::kSize; ++lane) lowest = lowest_lanes[lane] < lowest ? lowest_lanes[lane] : lowest;
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
    const Draw draw = draw_by_scores(codebook, scores, lowest, 2 / tau, uniform, eta, scratch.blocks);
    if (draw.certain || (eta <= kTolerated && !few_are_near(scores, codebook.num_codes, limit))) return draw.code;
  }
  return draw_by_distances(codebook, r, scores, limit, tau, uniform, scratch);
}

void sample(const CentredCodebook& codebook, const float* residuals, const double* squared_norms,
            const double* uniforms, double tau, int64_t rows, void* memory, int64_t* codes) {
  const int64_t channels = codebook.channels, stride = score_stride(codebook.num_codes);
  const Scratch scratch = divide(memory, rows, codebook.num_codes, channels);
  for (int64_t i = 0; i < round_to(kRowTile, rows); ++i) {
    // Squares of floats cannot overflow float64, so the norm is finite where the row is.
    const bool there = i < rows && __builtin_isfinite(squared_norms[i]);
    float* column = scratch.tiles + i / kRowTile * kRowTile * channels + i % kRowTile;
    for (int64_t c = 0; c < channels; ++c) {
      column[c * kRowTile] = there ? residuals[i * channels + c] - codebook.mean[c] : 0.0f;
    }
  }
  scan(codebook, rows, scratch);
  for (int64_t i = 0; i < rows; ++i) {
    codes[i] = !__builtin_isfinite(squared_norms[i])
                   ? -1
                   : draw(codebook, residuals + i * channels, scratch.scores + i * stride,
                          scratch.lowest + i * Vec::kSize, tau, uniforms[i], scratch);
  }
}

}  // namespace

extern const SampleKernel sample_kernel;
const SampleKernel sample_kernel = {kRowTile, kPanelWidth, pack, scratch_bytes, sample, squared_norm};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
