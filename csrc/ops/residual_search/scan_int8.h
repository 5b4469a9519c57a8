// The int8 scan. For cpu_simd.cpp, where the instruction set has vpdpbusd (AVX-512 VNNI, four channels per lane and
// instruction) or vpmaddubsw (AVX2, with 7-bit values, so that pairs of products fit 16 bits).
//
// Rows and codes are centered where that makes them shorter, and quantized with a scale each. In up to four outlier
// channels, where the codes are far larger than elsewhere, products are float32. Bound B3 (docs/bounds.md) tells which
// codes the scores cannot rule out. The scores of a tile for a block of panels are stored and read twice: for the
// smallest upper bound, then for candidates, without a data-dependent branch except for the few codes found.
//
// Takes a third (AVX2: half) of the float scan's instructions per product, and about 20 more per panel and row. Rows
// with too many candidates, or with values near the range of float32, go to the float scan.
#pragma once

#include "ops/residual_search/decide.h"
#include "ops/residual_search/scan_float.h"

#if defined(__AVX2__)

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kByteMax = 127;
#else
constexpr int kByteMax = 63;
#endif
constexpr int kBias = kByteMax + 1;  // added to the codes' bytes, to make them unsigned
// Panels per block of scores: 48 KiB for a tile (AVX2: 12 KiB), which stay in L1 or L2.
constexpr int kBlockPanels = 32;
constexpr int kGroupPanels = 4, kBlockGroups = kBlockPanels / kGroupPanels;  // panels of a group share an error bound
constexpr float kDenormalLoss = 1e-42f;

// State of a tile's rows, interleaved.
struct Int8Rows {
  alignas(64) float factor_kept[Vec::kSize];   // z
  alignas(64) float factor_norm[Vec::kSize];   // A
  alignas(64) float factor_error[Vec::kSize];  // B
  alignas(64) float slack[Vec::kSize];         // decision_slack
  alignas(64) float upper[Vec::kSize];
  float scale[kRowTile];            // a
  double half_reach[kRowTile];      // |r - m|^2/2
  double reach_rounding[kRowTile];  // bound of the error of that
  int32_t start[kRowTile];          // -kBias sum(p), which compensates the bias of the codes' bytes
  bool centered[kRowTile];
  float outlier[Int8Panels::kMaxOutliers][kRowTile];  // v in these channels
  Candidates candidates[kRowTile];
};

// Groups of four channels, rounded up to an even number.
inline int64_t quads(int64_t channels) { return (channels + 7) / 8 * 2; }

// The vector to quantize: x, minus m unless that is null, and zero where `kept` is zero unless that is null.
struct Centered {
  const float *x, *m, *kept;

  float at(int64_t c) const {
    const float value = m != nullptr ? x[c] - m[c] : x[c];
    return kept != nullptr ? value * kept[c] : value;
  }
  // Calls visit(c, v_c ..) for all channels, a vector at a time; channels past the last are zero.
  template <class Visit>
  void for_each(int64_t channels, Visit visit) const {
    for (int64_t c = 0; c < channels; c += Vec::kSize) {
      const int64_t left = channels - c;
      auto load = [c, left](const float* p) {
        return left >= Vec::kSize ? Vec::load(p + c) : Vec::load_partial(p + c, left);
      };
      Vec value = load(x);
      if (m != nullptr) value = value - load(m);
      if (kept != nullptr) value = value * load(kept);
      visit(c, value);
    }
  }
};

// max_c |v_c|.
inline float largest(const Centered& v, int64_t channels) {
  Vec top = Vec::zero();
  v.for_each(channels, [&top](int64_t, Vec value) { top = max(top, abs(value)); });
  return reduce_max(top);
}

// Quantizes v into bytes (`stride` bytes from one group of four channels to the next), adding `bias`; missing channels
// of the last groups are zero. Returns the squared norm of the error in float64; `sum` is the sum of the quantized
// channels.
inline double quantize(const Centered& v, int64_t channels, float scale, int bias, uint8_t* bytes, int64_t stride,
                       int32_t* sum) {
  const Vec inverse = Vec::fill(scale > 0 ? 1.0f / scale : 0.0f), step = Vec::fill(scale);
  const Vec most = Vec::fill(kByteMax), least = Vec::fill(-kByteMax);
  const VecInt biases = VecInt::fill(bias);
  SquareSum error;
  VecInt total = VecInt::zero();
  v.for_each(channels, [&](int64_t c, Vec value) {
    const VecInt q = nearest_int(max(min(value * inverse, most), least));
    total = total + q;
    error.add(negated_fma(to_float(q), step, value));
    alignas(16) uint8_t fours[Vec::kSize];
    store_bytes(q + biases, fours);
    for (int64_t i = 0; i < Vec::kSize / 4 && c / 4 + i < quads(channels); ++i) {
      __builtin_memcpy(bytes + (c / 4 + i) * stride, fours + 4 * i, 4);
    }
  });
  const int64_t written = (channels + Vec::kSize - 1) / Vec::kSize * (Vec::kSize / 4);
  for (int64_t four = written; four < quads(channels); ++four) __builtin_memset(bytes + four * stride, bias, 4);
  *sum = reduce_add(total);
  return error.total();
}

// |v| in float64.
inline double norm_of(const Centered& v, int64_t channels) {
  SquareSum squares;
  v.for_each(channels, [&squares](int64_t, Vec value) { squares.add(value); });
  return __builtin_sqrt(squares.total());
}

// Covers the rounding of norms of float32 differences, generously.
constexpr double kNormMargin = 1 + 1e-6;

// The mask that excludes outlier channels; null if there are none.
inline const float* kept_channels(const Int8Panels& int8) { return int8.num_outliers > 0 ? int8.kept : nullptr; }

inline void pack_int8_panel(const PackedCodebook& codebook, const double* squared_norms, int64_t panel) {
  const Int8Panels& int8 = codebook.int8;
  const int64_t channels = codebook.channels, first = panel * kPanelWidth;
  const float* m = int8.mean_norm > 0 ? int8.mean : nullptr;
  double max_norm = 0, max_kept = 0, max_error = 0;
  for (int w = 0; w < kPanelWidth; ++w) {
    const int64_t place = first + w;
    uint8_t* bytes = int8.bytes + panel * quads(channels) * kPanelWidth * 4 + w * 4;
    const int32_t k = codebook.order[place];
    for (int o = 0; o < int8.num_outliers; ++o) {
      int8.outliers[o * int8.outlier_stride + place] =
          k < 0 ? 0.0f : Centered{codebook.codes_kc + k * channels, m, nullptr}.at(int8.outlier_channel[o]);
    }
    if (k < 0) {
      for (int64_t four = 0; four < quads(channels); ++four) __builtin_memset(bytes + four * kPanelWidth * 4, kBias, 4);
      int8.scale[place] = 0;
      int8.offset[place] = int8.offset_centered[place] = __builtin_inff();
      continue;
    }
    const float* e = codebook.codes_kc + k * channels;
    const Centered kept{e, m, kept_channels(int8)};
    const float scale = largest(kept, channels) / kByteMax;
    int32_t sum;
    const double error = __builtin_sqrt(quantize(kept, channels, scale, kBias, bytes, kPanelWidth * 4, &sum));
    const double squared = squared_norms[k], norm = __builtin_sqrt(squared);
    const double shift =
        m == nullptr ? 0 : lane_sum(channels, [e, m](auto load) { return load(m) * (load(e) - load(m)); });
    int8.scale[place] = scale;
    int8.offset_centered[place] = float(squared / 2);
    int8.offset[place] = float(squared / 2 + shift);
    max_norm = norm > max_norm ? norm : max_norm;
    const double kept_norm = int8.num_outliers > 0 ? norm_of(kept, channels) : norm;
    max_kept = kept_norm > max_kept ? kept_norm : max_kept;
    // The difference e - m was rounded to float32, and so were the terms of the error.
    const double bound = error * kNormMargin + 0x1p-22 * norm;
    max_error = bound > max_error ? bound : max_error;
  }
  int8.max_norm[panel] = round_up(max_norm * kNormMargin);
  int8.max_kept[panel] = round_up(max_kept * kNormMargin);
  int8.max_error[panel] = round_up(max_error);
}

// Quantizes row i of a tile of (quads, kRowTile, 4) bytes. Returns false if the row needs the float scan.
inline bool begin_int8_row(const PackedCodebook& codebook, const float* r, double squared, Int8Rows& rows, int i,
                           uint8_t* tile) {
  const Int8Panels& int8 = codebook.int8;
  const int64_t channels = codebook.channels;
  const double u = 0x1p-24, raw = __builtin_sqrt(squared);
  const double centered = int8.mean_norm > 0 ? norm_of({r, int8.mean, nullptr}, channels) : raw;
  rows.centered[i] = centered < raw;
  const float* m = rows.centered[i] ? int8.mean : nullptr;
  const double norm = (rows.centered[i] ? centered : raw) * kNormMargin;
  const double extent = raw + codebook.max_norm, reach = norm + int8.mean_norm + codebook.max_norm;
  // Sums of products must fit int32: 255 * 127 * C. The negated comparison also leaves NaN to the float scan.
  if (!(extent * extent < kHuge && reach * reach < kHuge && channels < 65536)) return false;
  const Centered kept{r, m, kept_channels(int8)};
  const double kept_norm = int8.num_outliers > 0 ? norm_of(kept, channels) * kNormMargin : norm;
  const float scale = largest(kept, channels) / kByteMax;
  int32_t sum;
  const double z = __builtin_sqrt(quantize(kept, channels, scale, 0, tile + i * 4, kRowTile * 4, &sum)) * kNormMargin +
                   0x1p-22 * norm;
  rows.scale[i] = scale;
  rows.factor_kept[i] = round_up(z);
  rows.factor_norm[i] = round_up(10 * u * (norm + z) + 6.1 * u * int8.mean_norm);
  rows.factor_error[i] = round_up(kept_norm + z + 10 * u * (norm + z));
  rows.slack[i] = round_up(decision_slack(extent, channels));
  rows.upper[i] = __builtin_inff();
  rows.half_reach[i] = centered * centered / 2;
  // Rounding of differences to float32 and of the sum of squares: 2 u, and less than u more.
  rows.reach_rounding[i] = int8.mean_norm > 0 ? 3 * u * rows.half_reach[i] : 0;
  rows.start[i] = -kBias * sum;
  for (int o = 0; o < int8.num_outliers; ++o) rows.outlier[o][i] = Centered{r, m, nullptr}.at(int8.outlier_channel[o]);
  rows.candidates[i].count = 0;
  return true;
}

inline void skip_int8_row(Int8Rows& rows, int i, uint8_t* tile, int64_t channels) {
  for (int64_t four = 0; four < quads(channels); ++four) __builtin_memset(tile + four * kRowTile * 4 + i * 4, 0, 4);
  rows.scale[i] = rows.factor_kept[i] = rows.factor_norm[i] = rows.factor_error[i] = rows.slack[i] = rows.upper[i] = 0;
  for (int o = 0; o < Int8Panels::kMaxOutliers; ++o) rows.outlier[o][i] = 0;
  rows.start[i] = 0;
  rows.centered[i] = true;
  rows.candidates[i].count = -1;
}

// Multiplies one tile of rows with one panel, in registers, four channels at a time: a row's four signed bytes are
// broadcast to all lanes, four unsigned bytes of each code fill a lane.
[[gnu::always_inline]] inline void multiply_int8_panel(const uint8_t* tile, const uint8_t* panel, int64_t fours,
                                                       const int32_t* start, VecInt (&dot)[kRowTile][kPanelVecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = VecInt::fill(start[i]);
  }
  constexpr int64_t kPanelBytes = kPanelWidth * 4, kRowBytes = kRowTile * 4;
#if defined(__AVX512VNNI__)
  for (int64_t four = 0; four < fours; ++four) {
    const __m512i e0 = _mm512_loadu_si512(panel + four * kPanelBytes);
    const __m512i e1 = _mm512_loadu_si512(panel + four * kPanelBytes + 64);
    const uint8_t* row = tile + four * kRowBytes;
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile; ++i) {
      int32_t bits;
      __builtin_memcpy(&bits, row + i * 4, 4);
      const __m512i r = _mm512_set1_epi32(bits);
      multiply_add(dot[i][0], e0, r);
      multiply_add(dot[i][1], e1, r);
    }
  }
#else
  // Sums of four products, at most 4 * 127 * 63, fit 16 bits: two groups of channels share the widening to 32 bits.
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t four = 0; four < fours; four += 2) {
    const uint8_t* row = tile + four * kRowBytes;
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile; ++i) {
      int32_t bits, next_bits;
      __builtin_memcpy(&bits, row + i * 4, 4);
      __builtin_memcpy(&next_bits, row + kRowBytes + i * 4, 4);
      const __m256i r = _mm256_set1_epi32(bits), next_r = _mm256_set1_epi32(next_bits);
      for (int v = 0; v < kPanelVecs; ++v) {
        const __m256i* e = reinterpret_cast<const __m256i*>(panel + four * kPanelBytes) + v;
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_loadu_si256(e), r),
                                               _mm256_maddubs_epi16(_mm256_loadu_si256(e + kPanelVecs), next_r));
        dot[i][v].v = _mm256_add_epi32(dot[i][v].v, _mm256_madd_epi16(pairs, ones));
      }
    }
  }
#endif
}

// Computes the scores of one tile against one panel, (kRowTile, kPanelWidth), without outlier channels, and passes them
// to finish(i, v, score).
template <class Finish>
[[gnu::always_inline]] inline void score_int8_panel(const PackedCodebook& codebook, const uint8_t* tile, int64_t panel,
                                                    const Int8Rows& rows, Finish finish) {
  const Int8Panels& int8 = codebook.int8;
  const int64_t fours = quads(codebook.channels), first = panel * kPanelWidth;
  VecInt dot[kRowTile][kPanelVecs];
  multiply_int8_panel(tile, int8.bytes + panel * fours * kPanelWidth * 4, fours, rows.start, dot);
  Vec scale[kPanelVecs];
  for (int v = 0; v < kPanelVecs; ++v) scale[v] = Vec::load(int8.scale + first + v * Vec::kSize);
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    const float* offset = (rows.centered[i] ? int8.offset_centered : int8.offset) + first;
    const Vec a = Vec::fill(rows.scale[i]);
    for (int v = 0; v < kPanelVecs; ++v) {
      finish(i, v, negated_fma(a, to_float(dot[i][v]) * scale[v], Vec::load(offset + v * Vec::kSize)));
    }
  }
}

// Vector v of row i's scores of a panel, minus the products of the outlier channels.
inline Vec less_outliers(const Int8Panels& int8, int64_t panel, const Int8Rows& rows, int i, int v, Vec score) {
  for (int o = 0; o < int8.num_outliers; ++o) {
    const Vec e = Vec::load(int8.outliers + o * int8.outlier_stride + panel * kPanelWidth + v * Vec::kSize);
    score = negated_fma(Vec::fill(rows.outlier[o][i]), e, score);
  }
  return score;
}

inline void subtract_outliers(const Int8Panels& int8, int64_t panel, const Int8Rows& rows,
                              float (&scores)[kRowTile][kPanelWidth]) {
  for (int i = 0; i < kRowTile; ++i) {
    for (int v = 0; v < kPanelVecs; ++v) {
      float* part = scores[i] + v * Vec::kSize;
      less_outliers(int8, panel, rows, i, v, Vec::load(part)).store(part);
    }
  }
}

// Scores of a block of panels for one tile of rows.
struct BlockScores {
  alignas(64) float scores[kBlockPanels][kRowTile][kPanelWidth];
  alignas(64) float least[kBlockGroups][kRowTile][Vec::kSize];  // smallest score of each group of panels, per lane
  // Per group, the same for all tiles: the largest max_norm, max_kept and max_error, and the part of E that does not
  // depend on the row.
  alignas(64) float norm[kBlockGroups], kept[kBlockGroups], error[kBlockGroups], constant[kBlockGroups];
};

inline void measure_groups(const Int8Panels& int8, int64_t begin, int64_t end, BlockScores& block) {
  for (int g = 0; g < kBlockGroups; ++g) {
    float norm = 0, kept = 0, error = 0;
    for (int64_t p = begin + g * kGroupPanels; p < begin + (g + 1) * kGroupPanels && p < end; ++p) {
      norm = int8.max_norm[p] > norm ? int8.max_norm[p] : norm;
      kept = int8.max_kept[p] > kept ? int8.max_kept[p] : kept;
      error = int8.max_error[p] > error ? int8.max_error[p] : error;
    }
    block.norm[g] = norm;
    block.kept[g] = kept;
    block.error[g] = error;
    block.constant[g] = 1.86e-7f * norm * norm + kDenormalLoss;
  }
}

inline void score_block(const PackedCodebook& codebook, const uint8_t* tile, int64_t begin, int64_t end,
                        const Int8Rows& rows, BlockScores& block) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t p = panel - begin;
    float (&scores)[kRowTile][kPanelWidth] = block.scores[p];
    score_int8_panel(codebook, tile, panel, rows,
                     [&scores](int i, int v, Vec score) { score.store(scores[i] + v * Vec::kSize); });
    if (codebook.int8.num_outliers > 0) subtract_outliers(codebook.int8, panel, rows, scores);
    float (&least)[kRowTile][Vec::kSize] = block.least[p / kGroupPanels];
    for (int i = 0; i < kRowTile; ++i) {
      Vec low = min(Vec::load(scores[i]), Vec::load(scores[i] + Vec::kSize));
      if (p % kGroupPanels != 0) low = min(low, Vec::load(least[i]));
      low.store(least[i]);
    }
  }
}

// Stores the codes of a group of panels whose score for row i is at most `limit`.
inline void take_group(const PackedCodebook& codebook, int64_t begin, int64_t end, const BlockScores& block, int g,
                       int i, float limit, float error, float keep, Candidates& candidates) {
  for (int64_t p = g * kGroupPanels; p < (g + 1) * kGroupPanels && begin + p < end; ++p) {
    const float* scores = block.scores[p][i];
    const Vec at = Vec::fill(limit);
    uint32_t within = cmp_le_mask(Vec::load(scores), at) | cmp_le_mask(Vec::load(scores + Vec::kSize), at)
                                                               << Vec::kSize;
    for (; within != 0; within &= within - 1) {
      const int w = __builtin_ctz(within);
      const int32_t k = codebook.order[(begin + p) * kPanelWidth + w];
      if (k < 0) continue;
      __builtin_prefetch(codebook.codes_kc + k * codebook.channels);
      const float least = scores[w] - error;
      if (!add(candidates, k, least - 4.8e-7f * __builtin_fabsf(least), keep)) return;
    }
  }
}

// Lowers `upper` of a tile's rows, then stores the codes that could win. Starts with what all rows have in common,
// without branches, so that the rows overlap. A float32 operation has a relative error of 2^-24 = 6e-8.
inline void select_int8(const PackedCodebook& codebook, int64_t begin, int64_t end, const BlockScores& block,
                        Int8Rows& rows) {
  const int groups = int((end - begin + kGroupPanels - 1) / kGroupPanels);
  alignas(64) float errors[kBlockGroups][Vec::kSize], limits[kBlockGroups][Vec::kSize];
  alignas(64) float lowest[Vec::kSize] = {}, keep[Vec::kSize];
  const Vec kept = Vec::load(rows.factor_kept), norm = Vec::load(rows.factor_norm);
  const Vec error = Vec::load(rows.factor_error), rounding = Vec::fill(4.8e-7f);
  for (int g = 0; g < groups; ++g) {
    Vec sum = fma(norm, Vec::fill(block.norm[g]), Vec::fill(block.constant[g]));
    sum = fma(error, Vec::fill(block.error[g]), fma(kept, Vec::fill(block.kept[g]), sum));
    fma(sum, rounding, sum).store(errors[g]);
  }
  for (int i = 0; i < kRowTile; ++i) {
    Vec low = Vec::load(block.least[0][i]) + Vec::fill(errors[0][i]);
    for (int g = 1; g < groups; ++g) low = min(low, Vec::load(block.least[g][i]) + Vec::fill(errors[g][i]));
    lowest[i] = reduce_min(low);
  }
  const Vec low = Vec::load(lowest), upper = min(fma(abs(low), rounding, low), Vec::load(rows.upper));
  upper.store(rows.upper);
  const Vec sum = upper + Vec::load(rows.slack), most = fma(abs(sum), rounding, sum);
  most.store(keep);
  for (int g = 0; g < groups; ++g) {
    const Vec width = Vec::load(errors[g]);
    fma(abs(most) + width, rounding, most + width).store(limits[g]);
  }
  for (int i = 0; i < kRowTile; ++i) {
    uint32_t found = 0;
    for (int g = 0; g < groups; ++g) {
      found |= uint32_t(cmp_le_mask(Vec::load(block.least[g][i]), Vec::fill(limits[g][i])) != 0) << g;
    }
    Candidates& candidates = rows.candidates[i];
    for (; found != 0 && candidates.count >= 0; found &= found - 1) {
      const int g = __builtin_ctz(found);
      take_group(codebook, begin, end, block, g, i, limits[g][i], errors[g][i], keep[i], candidates);
    }
  }
}

// upper + slack, rounded up: a code whose lower bound is above cannot win.
inline float int8_limit(const Int8Rows& rows, int i) { return round_up(double(rows.upper[i]) + double(rows.slack[i])); }

// The certified nearest of row i's candidates.
inline int64_t nearest_candidate(const PackedCodebook& codebook, const float* r, Int8Rows& rows, int i) {
  Candidates& candidates = rows.candidates[i];
  drop_above(candidates, int8_limit(rows, i));
  if (candidates.count == 1) return candidates.code[0];
  int likeliest = 0;
  for (int j = 1; j < candidates.count; ++j) {
    if (candidates.least[j] < candidates.least[likeliest]) likeliest = j;
  }
  Nearest nearest;
  see(nearest, codebook, r, candidates.code[likeliest]);
  // One slack for the distance evaluated here, one for that of the code that could be nearer.
  const double limit = nearest.distance / 2 - rows.half_reach[i] + rows.reach_rounding[i] + 2 * double(rows.slack[i]);
  for (int j = 0; j < candidates.count; ++j) {
    if (j != likeliest && candidates.least[j] <= limit) see(nearest, codebook, r, candidates.code[j]);
  }
  return nearest.code;
}

// Quantizes the rows into tiles; rows that the scan cannot handle are zero.
inline void quantize_tiles(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                           int64_t count, uint8_t* tiles, Int8Rows* rows) {
  const int64_t channels = codebook.channels, num_tiles = (count + kRowTile - 1) / kRowTile;
  for (int64_t i = 0; i < num_tiles * kRowTile; ++i) {
    uint8_t* tile = tiles + i / kRowTile * quads(channels) * kRowTile * 4;
    Int8Rows& state = rows[i / kRowTile];
    const int place = int(i % kRowTile);
    // Places past the last row of the tile take part in the arithmetic and must not be denormal, which is slow.
    if (place == 0) {
      for (int j = kRowTile; j < Vec::kSize; ++j) {
        state.factor_kept[j] = state.factor_norm[j] = state.factor_error[j] = state.slack[j] = state.upper[j] = 0;
      }
    }
    if (i >= count || !begin_int8_row(codebook, residuals + i * channels, squared_norms[i], state, place, tile)) {
      skip_int8_row(state, place, tile, channels);
    }
  }
}

// Finds the candidates of all rows in share `part` of `parts` shares of the codes, in whole blocks.
inline void scan_int8(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                      int64_t count, int64_t part, int64_t parts, uint8_t* tiles, Int8Rows* rows, BlockScores& block) {
  const int64_t num_tiles = (count + kRowTile - 1) / kRowTile, tile_bytes = quads(codebook.channels) * kRowTile * 4;
  quantize_tiles(codebook, residuals, squared_norms, count, tiles, rows);
  const int64_t num_panels = (codebook.num_codes + kPanelWidth - 1) / kPanelWidth;
  const int64_t blocks = (num_panels + kBlockPanels - 1) / kBlockPanels;
  for (int64_t b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) {
    const int64_t begin = b * kBlockPanels;
    const int64_t end = begin + kBlockPanels < num_panels ? begin + kBlockPanels : num_panels;
    measure_groups(codebook.int8, begin, end, block);
    for (int64_t t = 0; t < num_tiles; ++t) {
      score_block(codebook, tiles + t * tile_bytes, begin, end, rows[t], block);
      select_int8(codebook, begin, end, block, rows[t]);
    }
  }
}

// Merges the candidates from another share of the codes.
inline void merge_int8(Int8Rows& rows, const Int8Rows& others) {
  for (int i = 0; i < kRowTile; ++i) {
    Candidates& candidates = rows.candidates[i];
    const Candidates& more = others.candidates[i];
    if (others.upper[i] < rows.upper[i]) rows.upper[i] = others.upper[i];
    if (more.count < 0) candidates.count = -1;
    const float keep = int8_limit(rows, i);
    for (int j = 0; j < more.count && candidates.count >= 0; ++j) {
      if (more.least[j] <= keep) add(candidates, more.code[j], more.least[j], keep);
    }
  }
}

// Sets codes[i] of the scanned rows. Stores the rows that the scan could not decide in `left` (also those that are not
// finite) and returns their number.
inline int64_t decide_int8(const PackedCodebook& codebook, const float* residuals, int64_t count, Int8Rows* rows,
                           int64_t* codes, int32_t* left) {
  int64_t num_left = 0;
  for (int64_t i = 0; i < count; ++i) {
    Int8Rows& tile = rows[i / kRowTile];
    const int place = int(i % kRowTile);
    if (tile.candidates[place].count < 0) {
      left[num_left++] = int32_t(i);
    } else {
      codes[i] = nearest_candidate(codebook, residuals + i * codebook.channels, tile, place);
    }
  }
  return num_left;
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk

#endif
