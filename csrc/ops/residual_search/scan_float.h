// The float32 scan: row_tile rows x panel_width codes in registers. For cpu_simd.cpp.
//
//   score_k = |e_k|^2/2 - <r, e_k>: half the squared distance, but for a constant of the row. 2*C operations per row
//   and code; a panel stays in the cache while all rows of the chunk pass over it; a row remembers the codes whose
//   score came within `slack` of its best.
//
// Why the winner is always a candidate. Let u = 2^-24, g(n) = n u / (1 - n u), s_k the exact score, t_k the computed.
//   dot product of C terms, fused or not, in any order: error <= g(C) |r||e_k|, plus C 2^-149 where products underflow
//   half norm rounded from float64:                     error <= u |e_k|^2 / 2
//   the subtraction:                                    error <= u (|half norm| + |dot|)
//   together  |t_k - s_k| <= E = g(C + 2) |r| max|e| + 2.1 u max|e|^2 / 2 + C 2^-148
// The definition's winner w satisfies s_w <= s_k + decision_slack for all k. With m the smallest computed score:
//   t_w <= s_w + E <= s_m + E + decision_slack <= t_m + 2 E + decision_slack = t_m + slack.
// Where a score could overflow, or too many codes come within the slack (a large common offset, a collapsed codebook),
// the row is given up: it is searched in float64 throughout, with the same result.
#pragma once

#include "common/simd.h"
#include "ops/residual_search/exact.h"

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

struct FloatRow {
  double slack;       // how far above the best score the winner's own score can be
  float best, limit;  // best score so far; best + slack, rounded up
  Candidates candidates;
};

inline void pack_float_panel(const PackedCodebook& codebook, int64_t first, float* panel) {
  const int64_t channels = codebook.channels;
  for (int w = 0; w < kPanelWidth; ++w) {
    const int64_t k = first + w;
    for (int64_t c = 0; c < channels; ++c) {
      panel[c * kPanelWidth + w] = k < codebook.num_codes ? codebook.codes_kc[k * channels + c] : 0.0f;
    }
  }
}

inline void give_up(FloatRow& row) {
  row.candidates.count = -1;
  // Keeps the row out of the slow path of the scan, unless its scores overflow.
  row.limit = -__builtin_inff();
}

inline void begin_row(const PackedCodebook& codebook, double squared_norm, FloatRow& row) {
  const double u = 0x1p-24, channels = double(codebook.channels), max_norm = codebook.max_norm;
  const double norm = __builtin_sqrt(squared_norm), extent = norm + max_norm;
  const double gamma = (channels + 2) * u / (1 - (channels + 2) * u);
  const double error = gamma * norm * max_norm + 2.1 * u * max_norm * max_norm / 2 + channels * 0x1p-148;
  row.slack = 2 * error + decision_slack(extent, codebook.channels);
  row.best = row.limit = __builtin_inff();
  row.candidates.count = 0;
  // The negated comparison also gives up on NaN.
  if (!(extent * extent < kHuge && channels < 0x1p20)) give_up(row);
}

// Some score of this panel is within the row's limit: lower the limit, then remember the codes within it.
inline void take_candidates(FloatRow& row, const float* scores, int64_t first_code) {
  if (row.candidates.count < 0) return;
  for (int w = 0; w < kPanelWidth; ++w) {
    if (scores[w] < row.best) row.best = scores[w];
  }
  row.limit = round_up(double(row.best) + row.slack);
  for (int w = 0; w < kPanelWidth; ++w) {
    if (scores[w] > row.limit || scores[w] == __builtin_inff()) continue;
    if (!add(row.candidates, int32_t(first_code + w), scores[w], row.limit)) {
      give_up(row);
      return;
    }
  }
}

// Scores of one tile of rows against one panel, in registers; tile is (channels, kRowTile).
inline void scan_panel(const float* __restrict__ tile, const float* __restrict__ panel, const float* half_norms,
                       int64_t channels, int64_t first_code, FloatRow* rows) {
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

// codes[which[i]] for rows which[0 .. count) of residuals. tiles: (count rounded up to kRowTile) * channels floats;
// panel: kPanelWidth * channels floats, used where the codebook has no panels.
inline void search_float(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                         const int32_t* which, int64_t count, float* tiles, float* panel, FloatRow* rows,
                         int64_t* codes) {
  const int64_t channels = codebook.channels, num_tiles = (count + kRowTile - 1) / kRowTile;
  for (int64_t i = 0; i < num_tiles * kRowTile; ++i) {
    float* column = tiles + i / kRowTile * kRowTile * channels + i % kRowTile;
    const float* r = i < count ? residuals + which[i] * channels : nullptr;
    for (int64_t c = 0; c < channels; ++c) column[c * kRowTile] = r != nullptr ? r[c] : 0.0f;
    if (r != nullptr) {
      begin_row(codebook, squared_norms[which[i]], rows[i]);
    } else {
      give_up(rows[i]);
    }
  }
  for (int64_t first = 0; first < codebook.num_codes; first += kPanelWidth) {
    const float* packed = codebook.panels != nullptr ? codebook.panels + first * channels : panel;
    if (codebook.panels == nullptr) pack_float_panel(codebook, first, panel);
    for (int64_t t = 0; t < num_tiles; ++t) {
      scan_panel(tiles + t * kRowTile * channels, packed, codebook.half_norms + first, channels, first,
                 rows + t * kRowTile);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    drop_above(rows[i].candidates, rows[i].limit);
    codes[which[i]] = decide(codebook, residuals + which[i] * channels, rows[i].candidates);
  }
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
