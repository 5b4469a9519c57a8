// Certified nearest code on a CPU, compiled once per instruction set.
//
// The definition asks for the code with the smallest float64 distance. A float32 scan finds the few that could be it,
// float64 decides among them, so the codes do not depend on the instruction set or on how rows are grouped.
//
//   scan     score_k = |e_k|^2/2 - <r, e_k> in float32, row_tile rows x panel_width codes in registers; a panel stays
//   in
//            the cache while all rows of the chunk pass over it. 2*C operations per row and code, and nothing of size
//            rows x codes is kept: a row remembers the codes whose score came within `slack` of its best.
//   decide   float64 distances of those codes, in the definition's summation order; strictly smaller wins, and
//            candidates come in ascending order, so equal distances go to the lowest index.
//
// Why the winner is always a candidate. Let u = 2^-24, g(n) = n u / (1 - n u), s_k the exact score, t_k the computed.
//   dot product of C terms, fused or not, in any order: error <= g(C) |r||e_k|, plus C 2^-149 where products underflow
//   half norm rounded from float64:                     error <= u |e_k|^2 / 2
//   the subtraction:                                    error <= u (|half norm| + |dot|)
//   together  |t_k - s_k| <= E = g(C + 2) |r| max|e| + 2.1 u max|e|^2 / 2 + C 2^-148
// The definition's own sums carry a relative error of at most h = (C/8 + 8) 2^-53, so its winner w satisfies
// s_w <= s_k + 1.1 h (|r| + max|e|)^2 for all k. With m the smallest computed score:
//   t_w <= s_w + E <= s_m + E + 1.1 h (...)^2 <= t_m + 2 E + 1.1 h (...)^2 = t_m + slack.
// Where the slack is not small against float's range (so a score could overflow), or too many codes come within it (a
// large common offset, a collapsed codebook), the row is searched in float64 throughout: slower, the same codes.
#include "common/simd.h"
#include "ops/residual_search/search_kernel.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kRowTile = 12;  // 12 x 2 accumulators of the 32 registers
#else
constexpr int kRowTile = 6;  // 6 x 2 accumulators of 16
#endif
constexpr int kPanelVecs = 2;
constexpr int kPanelWidth = kPanelVecs * Vec::kSize;

constexpr double kHuge = 1e37;  // a tenth of float's range

// The definition's fixed order: eight lanes, lane j adds terms j, j + 8, ...; then the lanes are halved three times.
template <class Term>
inline double lane_sum(int64_t channels, Term term) {
  double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    for (int j = 0; j < 8; ++j) lane[j] += term(c + j);
  }
  for (int j = 0; c + j < channels; ++j) lane[j] += term(c + j);
  for (int half = 4; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  return lane[0];
}

inline double squared_norm(const float* r, int64_t channels) {
  return lane_sum(channels, [r](int64_t c) { return double(r[c]) * double(r[c]); });
}

inline double squared_distance(const float* r, const float* e, int64_t channels) {
  return lane_sum(channels, [r, e](int64_t c) {
    const double difference = double(r[c]) - double(e[c]);
    return difference * difference;
  });
}

double pack(const float* codes_kc, int64_t channels, int64_t begin, int64_t end, float* panels, float* half_norms) {
  double largest = 0;
  for (int64_t first = begin; first < end; first += kPanelWidth) {
    float* panel = panels + first * channels;
    for (int w = 0; w < kPanelWidth; ++w) {
      const int64_t k = first + w;
      const bool present = k < end;
      const double squared = present ? squared_norm(codes_kc + k * channels, channels) : 0;
      if (squared > largest) largest = squared;
      half_norms[k] = present ? float(squared / 2) : __builtin_inff();
      for (int64_t c = 0; c < channels; ++c) panel[c * kPanelWidth + w] = present ? codes_kc[k * channels + c] : 0.0f;
    }
  }
  return largest;
}

// best + slack as a float that is not below it.
inline float limit_of(const RowState& row) {
  const double limit = double(row.best) + row.slack;
  return float(limit + 1.2e-7 * __builtin_fabs(limit) + 1e-44);
}

void begin_row(const PackedCodebook& codebook, const float* r, RowState& row) {
  const double u = 0x1p-24, channels = double(codebook.channels);
  const double norm = __builtin_sqrt(squared_norm(r, codebook.channels)), max_norm = codebook.max_norm;
  const double gamma = (channels + 2) * u / (1 - (channels + 2) * u);
  const double error = gamma * norm * max_norm + 2.1 * u * max_norm * max_norm / 2 + channels * 0x1p-148;
  const double decision = 1.1 * (channels / 8 + 8) * 0x1p-53 * (norm + max_norm) * (norm + max_norm);
  row.slack = 2 * error + decision;
  row.best = row.limit = __builtin_inff();
  // The negated comparison also gives up on NaN.
  const bool usable = (norm + max_norm) * (norm + max_norm) < kHuge && channels < 0x1p20;
  row.num_candidates = usable ? 0 : -1;
  // A row that gave up should not enter the slow path of the scan (it still may, where its scores overflow).
  if (!usable) row.limit = -__builtin_inff();
}

void drop_hopeless(RowState& row) {
  int32_t kept = 0;
  for (int32_t i = 0; i < row.num_candidates; ++i) {
    if (row.score[i] > row.limit) continue;
    row.candidate[kept] = row.candidate[i];
    row.score[kept++] = row.score[i];
  }
  row.num_candidates = kept;
}

// Some score of this panel is within the row's limit: lower the limit, then remember the codes within it.
void take_candidates(RowState& row, const float* scores, int64_t first_code) {
  if (row.num_candidates < 0) return;
  for (int w = 0; w < kPanelWidth; ++w) {
    if (scores[w] < row.best) row.best = scores[w];
  }
  row.limit = limit_of(row);
  for (int w = 0; w < kPanelWidth; ++w) {
    if (scores[w] > row.limit || scores[w] == __builtin_inff()) continue;
    if (row.num_candidates == RowState::kCapacity) drop_hopeless(row);
    if (row.num_candidates == RowState::kCapacity) {
      row.num_candidates = -1;
      row.limit = -__builtin_inff();
      return;
    }
    row.candidate[row.num_candidates] = int32_t(first_code + w);
    row.score[row.num_candidates++] = scores[w];
  }
}

// Scores of one tile of rows against one panel, in registers; tile is (channels, kRowTile).
inline void scan(const float* __restrict__ tile, const float* __restrict__ panel, const float* half_norms,
                 int64_t channels, int64_t first_code, RowState* rows) {
  Vec dot[kRowTile][kPanelVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = Vec::zero();
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec e[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) e[v] = Vec::load(panel + c * kPanelWidth + v * Vec::kSize);
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile; ++i) {
      const Vec r = Vec::fill(tile[c * kRowTile + i]);
      for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = fma(r, e[v], dot[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    Vec score[kPanelVecs];
    bool any = false;
    for (int v = 0; v < kPanelVecs; ++v) {
      score[v] = Vec::load(half_norms + v * Vec::kSize) - dot[i][v];
      any = any || any_at_most(score[v], rows[i].limit);
    }
    if (__builtin_expect(any, 0)) {
      float scores[kPanelWidth];
      for (int v = 0; v < kPanelVecs; ++v) score[v].store(scores + v * Vec::kSize);
      take_candidates(rows[i], scores, first_code);
    }
  }
}

// The code of a row, from its candidates or, where it gave up, from all codes.
int64_t decide(const PackedCodebook& codebook, const float* r, RowState& row) {
  const bool all = row.num_candidates < 0;
  if (!all) drop_hopeless(row);
  const int64_t count = all ? codebook.num_codes : row.num_candidates;
  double nearest = 0;
  int64_t code = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t k = all ? i : row.candidate[i];
    const double distance = squared_distance(r, codebook.codes_kc + k * codebook.channels, codebook.channels);
    if (code >= 0 && !(distance < nearest)) continue;
    nearest = distance;
    code = k;
  }
  return code;
}

void nearest(const PackedCodebook& codebook, const float* residuals, int64_t rows, float* tiles, RowState* states,
             int64_t* codes) {
  const int64_t channels = codebook.channels;
  const int64_t num_tiles = (rows + kRowTile - 1) / kRowTile;
  for (int64_t i = 0; i < num_tiles * kRowTile; ++i) {
    const bool present = i < rows;
    float* column = tiles + i / kRowTile * kRowTile * channels + i % kRowTile;
    for (int64_t c = 0; c < channels; ++c) column[c * kRowTile] = present ? residuals[i * channels + c] : 0.0f;
    if (present) {
      begin_row(codebook, residuals + i * channels, states[i]);
    } else {
      states[i].num_candidates = -1;
      states[i].limit = -__builtin_inff();
    }
  }
  for (int64_t first = 0; first < codebook.num_codes; first += kPanelWidth) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      scan(tiles + t * kRowTile * channels, codebook.panels + first * channels, codebook.half_norms + first, channels,
           first, states + t * kRowTile);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* r = residuals + i * channels;
    // Squares of floats cannot overflow float64, so the norm is finite where the row is.
    codes[i] = __builtin_isfinite(squared_norm(r, channels)) ? decide(codebook, r, states[i]) : -1;
  }
}

}  // namespace

extern const SearchKernel search_kernel;
const SearchKernel search_kernel = {kRowTile, kPanelWidth, pack, nearest, squared_norm};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
