// Gram scores: for a shared codebook that is packed once, one scan serves several depths. For cpu_simd.cpp, where the
// instruction set has AVX-512 VNNI.
//
// Choosing code k turns r into r - e_k, and so the score s_j into s_j + <e_k, e'_j>: one stored product instead of C
// multiplications. Scores are int16 and products int8, in units of each block of 128 codes, which are sorted by norm. A
// depth reads one byte of the Gram matrix per code and updates two bytes of scores; it is memory-bound. Bound B4
// (docs/bounds.md), which grows with each depth: if it leaves too many candidates, the row is scanned again.
#pragma once

#include "ops/residual_search/scan_int8.h"

#if defined(__AVX512VNNI__)

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kBlock = GramRows::kBlock;
constexpr int kPanelsPerBlock = kBlock / kPanelWidth;
constexpr double kMostUnits = 32000;
constexpr int16_t kNoCode = 32767;  // stored past the last code
constexpr int kGramTiles = 4;
constexpr int kMostCandidates = 1024, kMostBeforeScan = 64;
constexpr int kGramRowsAtOnce = kGramTiles * kRowTile;

inline int64_t num_blocks(const PackedCodebook& codebook) { return (codebook.num_codes + kBlock - 1) / kBlock; }

void pack_centered(const PackedCodebook& codebook, int64_t begin, int64_t end, float* panels) {
  const int64_t channels = codebook.channels;
  for (int64_t place = begin * kPanelWidth; place < end * kPanelWidth; ++place) {
    const int32_t k = codebook.order[place];
    const float* e = codebook.codes_kc + k * channels;
    float* packed = panels + place / kPanelWidth * kPanelWidth * channels + place % kPanelWidth;
    for (int64_t c = 0; c < channels; ++c) packed[c * kPanelWidth] = k < 0 ? 0.0f : e[c] - codebook.int8.mean[c];
  }
}

// Smaller scales are taken as zero: their inverse would overflow float32.
constexpr float kTiniestScale = 1e-30f;

// Quantizes one row of products, already divided by N. Returns the scale.
inline float quantize_products(const float* products, int64_t size, int8_t* quantized) {
  const float measured = largest({products, nullptr, nullptr}, size) / 127,
              scale = measured < kTiniestScale ? 0.0f : measured;
  const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f);
  for (int64_t j = 0; j < size; j += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(products + j), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quantized + j), _mm512_cvtsepi32_epi8(q));
  }
  return scale;
}

void pack_gram(const PackedCodebook& codebook, const float* panels, int64_t begin, int64_t end, float* scratch) {
  const GramRows& gram = codebook.gram;
  const int64_t channels = codebook.channels, size = num_blocks(codebook) * kBlock;
  float* products = scratch + kGramRowsAtOnce * channels;
  for (int i = 0; i < kGramRowsAtOnce; ++i) {
    const float* e = begin + i < end ? codebook.codes_kc + (begin + i) * channels : nullptr;
    pack_column(e, channels, kRowTile, scratch + i / kRowTile * kRowTile * channels + i % kRowTile);
  }
  const int64_t num_panels = (codebook.num_codes + kPanelWidth - 1) / kPanelWidth;
  for (int64_t panel = 0; panel < size / kPanelWidth; ++panel) {
    for (int t = 0; t < kGramTiles; ++t) {
      Vec dot[kRowTile][kPanelVecs];
      const bool any = panel < num_panels;
      multiply_panel(scratch + t * kRowTile * channels, panels + panel * kPanelWidth * channels, any ? channels : 0,
                     dot);
      const __m512 norm = _mm512_set1_ps(gram.block_norm[panel / kPanelsPerBlock]);
      for (int i = 0; i < kRowTile; ++i) {
        float* row = products + (t * kRowTile + i) * size + panel * kPanelWidth;
        for (int v = 0; v < kPanelVecs; ++v) _mm512_storeu_ps(row + v * 16, _mm512_div_ps(dot[i][v].v, norm));
      }
    }
  }
  for (int64_t k = begin; k < end; ++k) {
    float* row = products + (k - begin) * size;
    gram.diagonal[k] = row[gram.place[k]];
    row[gram.place[k]] = 0;
    gram.scale[k] = quantize_products(row, size, gram.rows + k * size);
    const double norm = __builtin_sqrt(squared_norm(codebook.codes_kc + k * channels, channels));
    const double rounding =
        1.01 * (double(channels) + 5) * 0x1p-24 * norm + double(channels) * 0x1p-148 / gram.min_norm;
    gram.error[k] = round_up(0.5001 * double(gram.scale[k]) + rounding + 128.0 * double(kTiniestScale));
  }
}

// |r - m|^2.
inline double squared_reach(const PackedCodebook& codebook, const float* r, double squared) {
  const Int8Panels& int8 = codebook.int8;
  return int8.mean_norm > 0 ? squared_distance(r, int8.mean, codebook.channels) : squared;
}

// Stores all scores of a panel for the first `count` rows of the tile; inverse[i] is 1/unit.
inline void store_int8_panel(const PackedCodebook& codebook, const uint8_t* tile, int64_t panel, const Int8Rows& rows,
                             const float* inverse, int count, ScoreRow* score_rows) {
  const int64_t first = panel * kPanelWidth;
  const Vec none = Vec::fill(float(kNoCode));
  const float inverse_norm = 1.0f / codebook.gram.block_norm[panel / kPanelsPerBlock];
  score_int8_panel(codebook, tile, panel, rows, [&](int i, int v, Vec score) {
    if (i >= count) return;
    score = less_outliers(codebook.int8, panel, rows, i, v, score);
    const VecInt t = nearest_int(min(score * Vec::fill(inverse[i] * inverse_norm), none));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(score_rows[i].scores + first + v * Vec::kSize),
                        _mm512_cvtsepi32_epi16(t.v));
  });
}

inline void scan_scores(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                        int64_t count, uint8_t* tiles, Int8Rows* rows, float* inverse, ScoreRow* score_rows) {
  const GramRows& gram = codebook.gram;
  const int64_t channels = codebook.channels, num_tiles = (count + kRowTile - 1) / kRowTile;
  const int64_t num_panels = (codebook.num_codes + kPanelWidth - 1) / kPanelWidth;
  const int64_t padding = num_blocks(codebook) * kBlock - num_panels * kPanelWidth;
  quantize_tiles(codebook, residuals, squared_norms, count, tiles, rows);
  for (int64_t i = 0; i < count; ++i) {
    const Int8Rows& tile = rows[i / kRowTile];
    const int place = int(i % kRowTile);
    ScoreRow& row = score_rows[i];
    row.taken = -1;
    row.decided = 0;
    row.unit = row.error = inverse[i] = 0;
    if (tile.candidates[place].count < 0) continue;
    const double error = double(tile.factor_kept[place]) + double(tile.factor_norm[place]) +
                         double(tile.factor_error[place]) * gram.relative_error + 3.1 * 0x1p-24 * gram.max_norm +
                         double(kDenormalLoss) / gram.min_norm;
    const double most =
        gram.max_norm / 2 + __builtin_sqrt(squared_reach(codebook, residuals + i * channels, squared_norms[i]));
    // Leaves some headroom, since residuals may also grow.
    row.unit = 1.05 * (most + error) / kMostUnits;
    row.error = error + 0.52 * row.unit;
    inverse[i] = float(1 / row.unit);
    for (int64_t j = 0; j < padding; ++j) row.scores[num_panels * kPanelWidth + j] = kNoCode;
    for (int64_t b = 0; b < 8; ++b) row.scores[num_blocks(codebook) * (kBlock + 1) + b] = kNoCode;
  }
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t first = t * kRowTile, left = count - first;
      store_int8_panel(codebook, tiles + t * quads(channels) * kRowTile * 4, panel, rows[t], inverse + first,
                       left < kRowTile ? int(left) : kRowTile, score_rows + first);
    }
  }
}

inline int16_t smallest(__m512i values) {
  const __m256i half = _mm256_min_epi16(_mm512_castsi512_si256(values), _mm512_extracti64x4_epi64(values, 1));
  const __m128i quarter = _mm_min_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  // The instruction takes unsigned numbers.
  const __m128i flip = _mm_set1_epi16(int16_t(0x8000));
  return int16_t(_mm_extract_epi16(_mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(quarter, flip)), flip), 0));
}

// Computes the smallest score of each block. If kTake, first adds factor/256 * products to the scores.
template <bool kTake>
inline void pass_over_scores(int16_t* scores, const int8_t* products, int factor, int64_t blocks, const int8_t* ahead,
                             int16_t* smallest_b) {
  const __m512i times = _mm512_set1_epi16(int16_t(factor));
  for (int64_t b = 0; b < blocks; ++b) {
    __m512i low = _mm512_set1_epi16(kNoCode);
#pragma GCC unroll 4
    for (int64_t j = b * kBlock; j < (b + 1) * kBlock; j += 32) {
      __m512i score = _mm512_loadu_si512(scores + j);
      if (kTake) {
        const __m512i q = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(products + j)));
        score = _mm512_adds_epi16(score, _mm512_mulhrs_epi16(_mm512_slli_epi16(q, 7), times));
        _mm512_storeu_si512(scores + j, score);
      }
      low = _mm512_min_epi16(low, score);
    }
    smallest_b[b] = smallest(low);
    if (ahead != nullptr) {
      __builtin_prefetch(ahead + b * kBlock, 0, 2);
      __builtin_prefetch(ahead + b * kBlock + 64, 0, 2);
    }
  }
}

// N_b (w m_b + shift) of eight blocks, in float64.
inline __m512d bounds_of_blocks(const float* block_norm, const int16_t* smallest_b, double unit, double shift) {
  const __m512d norm = _mm512_cvtps_pd(_mm256_loadu_ps(block_norm));
  const __m512d m =
      _mm512_cvtepi32_pd(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(smallest_b))));
  return _mm512_mul_pd(norm, _mm512_fmadd_pd(_mm512_set1_pd(unit), m, _mm512_set1_pd(shift)));
}

// The place of a code whose score is at most `upper`.
inline int64_t likely_place(const GramRows& gram, const ScoreRow& row, const int16_t* smallest_b, int64_t blocks,
                            double upper) {
  for (int64_t b = 0; b < blocks; b += 8) {
    const __m512d bounds = bounds_of_blocks(gram.block_norm + b, smallest_b + b, row.unit, row.error);
    const uint32_t found = _mm512_cmp_pd_mask(bounds, _mm512_set1_pd(upper), _CMP_LE_OQ);
    if (found == 0) continue;
    const int64_t block = b + __builtin_ctz(found);
    for (int64_t j = block * kBlock;; j += 32) {
      const uint32_t at =
          _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(row.scores + j), _mm512_set1_epi16(smallest_b[block]));
      if (at != 0) return j + __builtin_ctz(at);
    }
  }
  return 0;
}

// Prepares adding the product row of the code that was taken. Returns false if the scores would no longer be bounded.
inline bool take(const PackedCodebook& codebook, const float* r, double squared, ScoreRow& row, int& factor) {
  const GramRows& gram = codebook.gram;
  const double ratio = 256 * double(gram.scale[row.taken]) / row.unit;
  const double error =
      row.error + double(gram.error[row.taken]) + 0.75 * row.unit + 1.01 * 0x1p-24 * __builtin_sqrt(squared);
  const double most = gram.max_norm / 2 + __builtin_sqrt(squared_reach(codebook, r, squared));
  // The negated comparison also rejects NaN.
  if (!(ratio < 32767 && most + error < kMostUnits * row.unit)) return false;
  row.error = error;
  factor = int(ratio + 0.5);
  int16_t& own = row.scores[gram.place[row.taken]];
  own = int16_t(double(own) + __builtin_rint(double(gram.diagonal[row.taken]) / row.unit));
  return true;
}

int64_t nearest_by_scores(const PackedCodebook& codebook, const float* r, double squared, ScoreRow& row,
                          const int8_t* ahead) {
  const GramRows& gram = codebook.gram;
  if (row.unit == 0) return -1;
  const int64_t blocks = num_blocks(codebook), size = blocks * kBlock;
  // Eight more than there are blocks; the extra ones are kNoCode, like the scores past the last code.
  int16_t* smallest_b = row.scores + size;
  // Subtract the code taken last from the scores; find the smallest score of each block.
  const bool scanned = row.taken < 0;
  if (!scanned) {
    int factor;
    if (!take(codebook, r, squared, row, factor)) return -1;
    pass_over_scores<true>(row.scores, gram.rows + row.taken * size, factor, blocks, ahead, smallest_b);
  } else {
    pass_over_scores<false>(row.scores, nullptr, 0, blocks, ahead, smallest_b);
  }
  // An upper bound of the smallest score: by the error bound, and by evaluating a likely code.
  __m512d lowest = _mm512_set1_pd(__builtin_inf());
  for (int64_t b = 0; b < blocks; b += 8) {
    lowest = _mm512_min_pd(lowest, bounds_of_blocks(gram.block_norm + b, smallest_b + b, row.unit, row.error));
  }
  double upper = _mm512_reduce_min_pd(lowest);
  const double slack = decision_slack(__builtin_sqrt(squared) + codebook.max_norm, codebook.channels);
  const int64_t likely = codebook.order[likely_place(gram, row, smallest_b, blocks, upper)];
  const double exact = (squared_distance(r, codebook.codes_kc + likely * codebook.channels, codebook.channels) -
                        squared_reach(codebook, r, squared)) /
                           2 +
                       slack;
  upper = exact < upper ? exact : upper;
  const double limit = upper + slack;
  // Collect the candidates from the blocks within the limit. Right after a scan, the alternative is the float scan,
  // which is slow for single rows.
  const int most_candidates = scanned ? kMostCandidates : kMostBeforeScan;
  int32_t candidates[kMostCandidates];
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; b += 8) {
    const __m512d least = bounds_of_blocks(gram.block_norm + b, smallest_b + b, row.unit, -row.error);
    for (uint32_t left = _mm512_cmp_pd_mask(least, _mm512_set1_pd(limit), _CMP_LE_OQ); left != 0; left &= left - 1) {
      const int64_t block = b + __builtin_ctz(left);
      if (block >= blocks) break;
      const double most = (limit / double(gram.block_norm[block]) + row.error) / row.unit;
      const __m512i at_most = _mm512_set1_epi16(int16_t(most < kMostUnits ? __builtin_floor(most) : kMostUnits));
      for (int64_t j = block * kBlock; j < (block + 1) * kBlock; j += 32) {
        uint32_t within = _mm512_cmple_epi16_mask(_mm512_loadu_si512(row.scores + j), at_most);
        for (; within != 0; within &= within - 1) {
          if (count == most_candidates) return -1;
          const int32_t k = codebook.order[j + __builtin_ctz(within)];
          for (int64_t c = 0; c < codebook.channels; c += 16) {
            __builtin_prefetch(codebook.codes_kc + k * codebook.channels + c);
          }
          candidates[count++] = k;
        }
      }
    }
  }
  row.decided += count;
  return nearest_of(codebook, r, candidates, count);
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk

#endif
