// The float32 scan: row_tile rows x panel_width codes in registers. For cpu_simd.cpp.
//
// Scores are |e_k|^2/2 - <r, e_k>: half the squared distance minus a constant of the row. 2 C operations per row and
// code; a panel stays in cache while all rows of the chunk pass over it. A row stores the codes that bound B2
// (docs/bounds.md) cannot rule out; if there are too many, the scan runs again with the final limit and evaluates them
// at once.
#pragma once

#include "common/simd.h"
#include "ops/residual_search/decide.h"
#include "ops/residual_search/panels.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr double kHuge = 1e37;  // a tenth of the range of float32

// State of the rows of a tile.
struct FloatRows {
  float factor[kRowTile];  // g(C + 2) |r|
  float slack[kRowTile];   // decision_slack
  float upper[kRowTile];
  float keep[kRowTile];  // upper + slack, rounded up: a code whose lower bound is above cannot win
  Candidates candidates[kRowTile];
  Nearest nearest[kRowTile];  // for rows that need the second scan
};

inline void pack_float_panel(const PackedCodebook& codebook, int64_t first, float* panel) {
  for (int w = 0; w < kPanelWidth; ++w) {
    const int64_t k = codebook.order[first + w];
    pack_column(k < 0 ? nullptr : codebook.codes_kc + k * codebook.channels, codebook.channels, kPanelWidth, panel + w);
  }
}

// Excludes a row from the scan: no score is below its limit.
inline void leave_out(FloatRows& rows, int i) { rows.keep[i] = -__builtin_inff(); }

// Starts a row. Returns false, and excludes it, if a score could overflow or is NaN.
inline bool begin_row(const PackedCodebook& codebook, double squared_norm, FloatRows& rows, int i) {
  const double u = 0x1p-24, terms = double(codebook.channels) + 2;
  const double norm = __builtin_sqrt(squared_norm), extent = norm + codebook.max_norm;
  rows.factor[i] = round_up(terms * u / (1 - terms * u) * norm * (1 + 1e-6));
  rows.slack[i] = round_up(decision_slack(extent, codebook.channels));
  rows.upper[i] = rows.keep[i] = __builtin_inff();
  rows.candidates[i].count = 0;
  if (extent * extent < kHuge && terms < 0x1p20) return true;
  rows.factor[i] = rows.slack[i] = 0;
  leave_out(rows, i);
  return false;
}

// First scan: some score of this panel is below the row's limit. Lowers `upper`, then stores the codes that could win.
inline void take_candidates(FloatRows& rows, int i, const float* scores, float error, const int32_t* order) {
  float best = scores[0];
  for (int w = 1; w < kPanelWidth; ++w) best = scores[w] < best ? scores[w] : best;
  const float above = round_up(double(best) + double(error));
  if (above < rows.upper[i]) {
    rows.upper[i] = above;
    rows.keep[i] = round_up(double(above) + double(rows.slack[i]));
  }
  for (int w = 0; w < kPanelWidth && rows.candidates[i].count >= 0; ++w) {
    const float least = least_of(scores[w], error);
    if (least <= rows.keep[i] && order[w] >= 0) add(rows.candidates[i], order[w], least, rows.keep[i]);
  }
}

// Scores of one tile of rows against one panel. Calls visit(i, scores, error, order) for rows i with a score below the
// limit.
template <class Visit>
inline void scan_panel(const PackedCodebook& codebook, const float* tile, const float* panel, int64_t first,
                       const FloatRows& rows, Visit visit) {
  Vec dot[kRowTile][kPanelVecs];
  multiply_panel(tile, panel, codebook.channels, dot);
  // E of each row for this panel, and the largest score of interest; both rounded up.
  const float n = codebook.panel_norms[first / kPanelWidth];
  const float constant = 6.3e-8f * n * n + float(codebook.channels) * 0x1p-147f + 1e-42f;
  float errors[kRowTile], limits[kRowTile];
  for (int i = 0; i < kRowTile; ++i) {
    errors[i] = (rows.factor[i] * n + constant) * 1.000001f;
    limits[i] = rows.keep[i] + errors[i] + 3e-7f * (__builtin_fabsf(rows.keep[i]) + errors[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    Vec score[kPanelVecs];
    bool any = false;
    for (int v = 0; v < kPanelVecs; ++v) {
      score[v] = Vec::load(codebook.half_norms + first + v * Vec::kSize) - dot[i][v];
      any = any || cmp_le_mask(score[v], Vec::fill(limits[i])) != 0;
    }
    if (__builtin_expect(any, 0)) {
      float scores[kPanelWidth];
      for (int v = 0; v < kPanelVecs; ++v) score[v].store(scores + v * Vec::kSize);
      visit(i, scores, errors[i], codebook.order + first);
    }
  }
}

// Sets codes[which[i]] for rows which[0 .. count) of residuals. tiles: (count rounded up to kRowTile) * channels
// floats; panel: kPanelWidth * channels floats, used if the codebook has no panels.
inline void search_float(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                         const int32_t* which, int64_t count, float* tiles, float* panel, FloatRows* rows,
                         int64_t* codes) {
  const int64_t channels = codebook.channels, num_tiles = (count + kRowTile - 1) / kRowTile;
  auto panel_at = [&](int64_t first) {
    if (codebook.panels != nullptr) return codebook.panels + first * channels;
    pack_float_panel(codebook, first, panel);
    return static_cast<const float*>(panel);
  };
  // Pack the rows into tiles.
  for (int64_t i = 0; i < num_tiles * kRowTile; ++i) {
    const float* r = i < count ? residuals + which[i] * channels : nullptr;
    pack_column(r, channels, kRowTile, tiles + i / kRowTile * kRowTile * channels + i % kRowTile);
    // A place without a row is excluded like a row whose norm is NaN.
    const double squared = r != nullptr ? squared_norms[which[i]] : __builtin_nan("");
    if (!begin_row(codebook, squared, rows[i / kRowTile], int(i % kRowTile)) && r != nullptr) {
      codes[which[i]] = nearest_of_all(codebook, r);
    }
  }
  // First scan: collect candidates.
  for (int64_t first = 0; first < codebook.num_codes; first += kPanelWidth) {
    const float* packed = panel_at(first);
    for (int64_t t = 0; t < num_tiles; ++t) {
      scan_panel(codebook, tiles + t * kRowTile * channels, packed, first, rows[t],
                 [&](int i, const float* scores, float error, const int32_t* order) {
                   take_candidates(rows[t], i, scores, error, order);
                 });
    }
  }
  // Decide the rows whose candidates fit the list, and exclude them from the second scan.
  bool again = false;
  for (int64_t i = 0; i < count; ++i) {
    FloatRows& tile = rows[i / kRowTile];
    const int place = int(i % kRowTile);
    if (tile.keep[place] == -__builtin_inff()) continue;
    Candidates& candidates = tile.candidates[place];
    if (candidates.count < 0) {
      tile.nearest[place] = Nearest();
      again = true;
      continue;
    }
    drop_above(candidates, tile.keep[place]);
    codes[which[i]] = nearest_of(codebook, residuals + which[i] * channels, candidates.code, candidates.count);
    leave_out(tile, place);
  }
  // Second scan, for the others: evaluate every code within the final limit.
  for (int64_t first = 0; again && first < codebook.num_codes; first += kPanelWidth) {
    const float* packed = panel_at(first);
    for (int64_t t = 0; t < num_tiles; ++t) {
      scan_panel(codebook, tiles + t * kRowTile * channels, packed, first, rows[t],
                 [&](int i, const float* scores, float error, const int32_t* order) {
                   const float* r = residuals + which[t * kRowTile + i] * channels;
                   for (int w = 0; w < kPanelWidth; ++w) {
                     if (order[w] < 0 || least_of(scores[w], error) > rows[t].keep[i]) continue;
                     see(rows[t].nearest[i], codebook, r, order[w]);
                   }
                 });
    }
  }
  for (int64_t i = 0; again && i < count; ++i) {
    const FloatRows& tile = rows[i / kRowTile];
    if (tile.keep[i % kRowTile] != -__builtin_inff()) codes[which[i]] = tile.nearest[i % kRowTile].code;
  }
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
