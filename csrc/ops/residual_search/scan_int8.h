// The int8 scan: four channels per instruction (vpdpbusd), and a bound that says which codes it cannot rule out. For
// cpu_simd.cpp, where the instruction set has it.
//
// With m in the middle of the codes, e'_k = e_k - m, and v either r or r - m, whichever is shorter:
//   half distance = constant of the row + s_k,  s_k = g_k - <v, e'_k>,  g_k = |e'_k|^2/2 (v = r - m) or
//                                                                            |e'_k|^2/2 + <m, e'_k> (v = r)
// so a common offset of the data costs nothing at the first depth, and nothing at the later ones, where residuals lie
// around zero again. Quantized, e'_k = b_k q_k + (error of norm <= f_k) and v = a p + (error of norm z), with a, b_k
// floats and p, q_k in [-127, 127]; the scan computes t_k = g_k - a b_k <p, q_k>, the product exactly in int32.
//
// Let u = 2^-24, n_k = |e'_k|, G = max|g_k| <= n_k^2/2 (+ |m| n_k where v = r):
//   <v - a p, e'_k>                              <= z n_k
//   <a p, e'_k - b_k q_k>                        <= (|v| + z) f_k
//   r - m rounded to float                       <= u |v| n_k
//   int32 to float, times b_k, times a           <= 3.1 u (|v| + z)(n_k + f_k)
//   g_k rounded to float, and the subtraction    <= u G + u (G + (|v| + z)(n_k + f_k))
// Together |t_k - s_k| <= E = A n + B f + 1.1 u n^2 + 1e-42 with the panel's largest n and f, and
//   A = z + 6 u (|v| + z) + 2.2 u |m|,   B = (|v| + z)(1 + 6 u);   the last term is what denormals lose.
// A row keeps `upper` = min over the codes seen of t_k + E, an upper bound of the smallest s. A code could win only if
// s_k <= upper + decision_slack, hence only if t_k - E <= upper + decision_slack: that is the test.
//
// 1/4 of the float scan's instructions per product; about four more per 16 scores. Too many candidates, or numbers near
// float's range: the row is left to the float scan.
#pragma once

#include "ops/residual_search/exact.h"
#include "ops/residual_search/scan_float.h"

#if defined(__AVX512VNNI__)

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr float kDenormalLoss = 1e-42f;

// Twelve rows side by side, padded to a vector.
struct Int8Rows {
  alignas(64) float scale[16];         // a
  alignas(64) float factor_norm[16];   // A
  alignas(64) float factor_error[16];  // B
  alignas(64) float slack[16];         // decision_slack
  alignas(64) float upper[16];
  int32_t start[16];  // -128 sum(p): undoes the 128 that the codes' bytes carry
  bool centred[16];
  Candidates candidates[kRowTile];
};

inline int64_t quads(int64_t channels) { return (channels + 3) / 4; }

// max_c |x_c - m_c| of floats; m null for none.
inline float largest(const float* x, const float* m, int64_t channels) {
  __m512 top = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = channels - c >= 16 ? 0xffff : __mmask16((1u << (channels - c)) - 1);
    __m512 value = _mm512_maskz_loadu_ps(mask, x + c);
    if (m != nullptr) value = _mm512_sub_ps(value, _mm512_maskz_loadu_ps(mask, m + c));
    top = _mm512_max_ps(top, _mm512_abs_ps(value));
  }
  return _mm512_reduce_max_ps(top);
}

// Quantizes x - m (m null for none) into bytes (`stride` bytes apart from one four of channels to the next), adding
// `bias`; channels missing in the last four are zero. Returns the squared norm of the error, in float64; `sum` is the
// sum of the quantized channels.
inline double quantize(const float* x, const float* m, int64_t channels, float scale, int bias, uint8_t* bytes,
                       int64_t stride, int32_t* sum) {
  const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1.0f / scale : 0.0f), step = _mm512_set1_ps(scale);
  __m512d error = _mm512_setzero_pd();
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < channels; c += 16) {
    const __mmask16 mask = channels - c >= 16 ? 0xffff : __mmask16((1u << (channels - c)) - 1);
    __m512 value = _mm512_maskz_loadu_ps(mask, x + c);
    if (m != nullptr) value = _mm512_sub_ps(value, _mm512_maskz_loadu_ps(mask, m + c));
    __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    q = _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
    total = _mm512_add_epi32(total, q);
    const __m512 difference = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), step, value);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(difference));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(difference, 1));
    error = _mm512_fmadd_pd(low, low, error);
    error = _mm512_fmadd_pd(high, high, error);
    alignas(16) uint8_t four[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(four),
                    _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(bias))));
    for (int64_t i = 0; i < 4 && c + 4 * i < channels; ++i) {
      __builtin_memcpy(bytes + (c / 4 + i) * stride, four + 4 * i, 4);
    }
  }
  *sum = _mm512_reduce_add_epi32(total);
  return _mm512_reduce_add_pd(error);
}

// |x - m| in float64, of the float difference.
inline double centred_norm(const float* x, const float* m, int64_t channels) {
  return __builtin_sqrt(lane_sum(channels, [x, m](int64_t c) {
    const double value = double(x[c] - m[c]);
    return value * value;
  }));
}

// The share by which a norm of float differences can be below that of the exact ones, generously.
constexpr double kNormMargin = 1 + 1e-6;

inline void pack_int8_panel(const PackedCodebook& codebook, const double* squared_norms, int64_t panel) {
  const Int8Panels& int8 = codebook.int8;
  const int64_t channels = codebook.channels, first = panel * kPanelWidth;
  const float* m = int8.mean_norm > 0 ? int8.mean : nullptr;
  double max_norm = 0, max_error = 0;
  for (int w = 0; w < kPanelWidth; ++w) {
    const int64_t place = first + w;
    uint8_t* bytes = int8.bytes + panel * quads(channels) * kPanelWidth * 4 + w * 4;
    const int32_t k = codebook.order[place];
    if (k < 0) {
      for (int64_t four = 0; four < quads(channels); ++four) __builtin_memset(bytes + four * kPanelWidth * 4, 128, 4);
      int8.scale[place] = 0;
      int8.offset[place] = int8.offset_centred[place] = __builtin_inff();
      continue;
    }
    const float* e = codebook.codes_kc + k * channels;
    const float scale = largest(e, m, channels) / 127;
    int32_t sum;
    const double error = __builtin_sqrt(quantize(e, m, channels, scale, 128, bytes, kPanelWidth * 4, &sum));
    const double squared = squared_norms[k], norm = __builtin_sqrt(squared);
    const double shift =
        m == nullptr ? 0
                     : lane_sum(channels, [e, m](int64_t c) { return double(m[c]) * (double(e[c]) - double(m[c])); });
    int8.scale[place] = scale;
    int8.offset_centred[place] = float(squared / 2);
    int8.offset[place] = float(squared / 2 + shift);
    max_norm = norm > max_norm ? norm : max_norm;
    // The difference e - m was rounded to float, and so was the error's own term.
    const double bound = error * kNormMargin + 0x1p-22 * norm;
    max_error = bound > max_error ? bound : max_error;
  }
  int8.max_norm[panel] = round_up(max_norm * kNormMargin);
  int8.max_error[panel] = round_up(max_error);
}

// Quantizes row i of a tile; tile is (quads, kRowTile, 4) bytes. False where the float scan must take the row.
inline bool begin_int8_row(const PackedCodebook& codebook, const float* r, double squared, Int8Rows& rows, int i,
                           uint8_t* tile) {
  const Int8Panels& int8 = codebook.int8;
  const int64_t channels = codebook.channels;
  const double u = 0x1p-24, raw = __builtin_sqrt(squared);
  const double centred = int8.mean_norm > 0 ? centred_norm(r, int8.mean, channels) : raw;
  rows.centred[i] = centred < raw;
  const float* m = rows.centred[i] ? int8.mean : nullptr;
  const double norm = (rows.centred[i] ? centred : raw) * kNormMargin;
  const double extent = raw + codebook.max_norm, reach = norm + int8.mean_norm + codebook.max_norm;
  // vpdpbusd sums up to 255 * 127 * C in int32; the negated comparison also leaves NaN to the float scan.
  if (!(extent * extent < kHuge && reach * reach < kHuge && channels < 65536)) return false;
  const float scale = largest(r, m, channels) / 127;
  int32_t sum;
  const double z = __builtin_sqrt(quantize(r, m, channels, scale, 0, tile + i * 4, kRowTile * 4, &sum)) * kNormMargin +
                   0x1p-22 * norm;
  rows.scale[i] = scale;
  rows.factor_norm[i] = round_up(z + 6 * u * (norm + z) + 2.2 * u * int8.mean_norm);
  rows.factor_error[i] = round_up((norm + z) * (1 + 6 * u));
  rows.slack[i] = round_up(decision_slack(extent, channels));
  rows.upper[i] = __builtin_inff();
  rows.start[i] = -128 * sum;
  rows.candidates[i].count = 0;
  return true;
}

inline void skip_int8_row(Int8Rows& rows, int i, uint8_t* tile, int64_t channels) {
  for (int64_t four = 0; four < quads(channels); ++four) __builtin_memset(tile + four * kRowTile * 4 + i * 4, 0, 4);
  rows.scale[i] = rows.factor_norm[i] = rows.factor_error[i] = rows.slack[i] = 0;
  rows.upper[i] = -__builtin_inff();  // no score is at most that
  rows.start[i] = 0;
  rows.centred[i] = true;
  rows.candidates[i].count = -1;
}

// upper + slack, rounded up.
inline float int8_limit(const Int8Rows& rows, int i) { return round_up(double(rows.upper[i]) + double(rows.slack[i])); }

// Some scores of this panel are within the row's limit (`hits`): lower `upper`, then remember the codes that could be
// below it.
inline void take_int8_candidates(Int8Rows& rows, int i, __m512 score0, __m512 score1, __mmask16 hits0, __mmask16 hits1,
                                 float error, const int32_t* order) {
  Candidates& candidates = rows.candidates[i];
  if (candidates.count < 0) return;
  const __m512 none = _mm512_set1_ps(__builtin_inff());
  const float best = _mm512_reduce_min_ps(
      _mm512_min_ps(_mm512_mask_mov_ps(none, hits0, score0), _mm512_mask_mov_ps(none, hits1, score1)));
  const float above = round_up(double(best) + double(error));
  if (above < rows.upper[i]) rows.upper[i] = above;
  const float keep = int8_limit(rows, i);
  const __m512 at_most = _mm512_set1_ps(round_up(double(keep) + double(error)));
  const uint32_t within = uint32_t(_mm512_mask_cmp_ps_mask(hits0, score0, at_most, _CMP_LE_OQ)) |
                          uint32_t(_mm512_mask_cmp_ps_mask(hits1, score1, at_most, _CMP_LE_OQ)) << 16;
  alignas(64) float scores[kPanelWidth];
  _mm512_store_ps(scores, score0);
  _mm512_store_ps(scores + 16, score1);
  for (uint32_t left = within; left != 0; left &= left - 1) {
    const int w = __builtin_ctz(left);
    if (order[w] < 0) continue;
    if (!add(candidates, order[w], least_of(scores[w], error), keep)) {
      rows.upper[i] = -__builtin_inff();
      return;
    }
  }
}

// sum += the four products of each lane, unsigned bytes times signed bytes. Assembly, because GCC 12 copies the sums of
// its intrinsic to memory and back: half the speed.
inline void multiply_add(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

// Products of one tile of rows with one panel, in registers. Four channels at a time: a row's four signed bytes go to
// all lanes, the codes' four unsigned bytes stand in one lane each.
[[gnu::always_inline]] inline void multiply_int8_panel(const uint8_t* tile, const uint8_t* panel, int64_t fours,
                                                       const int32_t* start, __m512i (&dot)[kRowTile][kPanelVecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = _mm512_set1_epi32(start[i]);
  }
  for (int64_t four = 0; four < fours; ++four) {
    const __m512i e0 = _mm512_loadu_si512(panel + four * kPanelWidth * 4);
    const __m512i e1 = _mm512_loadu_si512(panel + four * kPanelWidth * 4 + 64);
    const uint8_t* row = tile + four * kRowTile * 4;
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile; ++i) {
      int32_t bits;
      __builtin_memcpy(&bits, row + i * 4, 4);
      const __m512i r = _mm512_set1_epi32(bits);
      multiply_add(dot[i][0], e0, r);
      multiply_add(dot[i][1], e1, r);
    }
  }
}

// Scores of one tile against one panel.
inline void scan_int8_panel(const PackedCodebook& codebook, const uint8_t* tile, int64_t panel, Int8Rows& rows) {
  const Int8Panels& int8 = codebook.int8;
  const int64_t fours = quads(codebook.channels), first = panel * kPanelWidth;
  __m512i dot[kRowTile][kPanelVecs];
  multiply_int8_panel(tile, int8.bytes + panel * fours * kPanelWidth * 4, fours, rows.start, dot);
  // E of every row for this panel, and the largest score that is still of interest.
  const float n = int8.max_norm[panel], f = int8.max_error[panel];
  const __m512 constant = _mm512_set1_ps(6.7e-8f * n * n + kDenormalLoss);
  __m512 error = _mm512_fmadd_ps(_mm512_set1_ps(n), _mm512_load_ps(rows.factor_norm), constant);
  error = _mm512_fmadd_ps(_mm512_set1_ps(f), _mm512_load_ps(rows.factor_error), error);
  error = _mm512_mul_ps(error, _mm512_set1_ps(1.000001f));
  const __m512 upper = _mm512_load_ps(rows.upper);
  __m512 limit = _mm512_add_ps(_mm512_add_ps(upper, _mm512_load_ps(rows.slack)), error);
  limit = _mm512_fmadd_ps(_mm512_set1_ps(3e-7f), _mm512_add_ps(_mm512_abs_ps(upper), error), limit);
  alignas(64) float errors[16], limits[16];
  _mm512_store_ps(errors, error);
  _mm512_store_ps(limits, limit);
  const __m512 scale0 = _mm512_loadu_ps(int8.scale + first), scale1 = _mm512_loadu_ps(int8.scale + first + 16);
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    const float* offset = (rows.centred[i] ? int8.offset_centred : int8.offset) + first;
    const __m512 a = _mm512_set1_ps(rows.scale[i]), at_most = _mm512_set1_ps(limits[i]);
    const __m512 score0 =
        _mm512_fnmadd_ps(a, _mm512_mul_ps(_mm512_cvtepi32_ps(dot[i][0]), scale0), _mm512_loadu_ps(offset));
    const __m512 score1 =
        _mm512_fnmadd_ps(a, _mm512_mul_ps(_mm512_cvtepi32_ps(dot[i][1]), scale1), _mm512_loadu_ps(offset + 16));
    const __mmask16 hits0 = _mm512_cmp_ps_mask(score0, at_most, _CMP_LE_OQ);
    const __mmask16 hits1 = _mm512_cmp_ps_mask(score1, at_most, _CMP_LE_OQ);
    if (__builtin_expect((hits0 | hits1) != 0, 0)) {
      take_int8_candidates(rows, i, score0, score1, hits0, hits1, errors[i], codebook.order + first);
    }
  }
}

// The rows as tiles of bytes, those that the scan cannot serve as zeros.
inline void quantize_tiles(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                           int64_t count, uint8_t* tiles, Int8Rows* rows) {
  const int64_t channels = codebook.channels, num_tiles = (count + kRowTile - 1) / kRowTile;
  for (int64_t i = 0; i < num_tiles * kRowTile; ++i) {
    uint8_t* tile = tiles + i / kRowTile * quads(channels) * kRowTile * 4;
    Int8Rows& state = rows[i / kRowTile];
    const int place = int(i % kRowTile);
    if (place == 0) {
      for (int lane = kRowTile; lane < 16; ++lane) {
        state.scale[lane] = state.factor_norm[lane] = state.factor_error[lane] = state.slack[lane] = state.upper[lane] = 0;
      }
    }
    if (i >= count || !begin_int8_row(codebook, residuals + i * channels, squared_norms[i], state, place, tile)) {
      skip_int8_row(state, place, tile, channels);
    }
  }
}

// As search_float, for all rows; leaves the rows it cannot serve in `left` and returns their number. Rows that are not
// finite are among them.
inline int64_t search_int8(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                           int64_t count, uint8_t* tiles, Int8Rows* rows, int64_t* codes, int32_t* left) {
  const int64_t channels = codebook.channels, num_tiles = (count + kRowTile - 1) / kRowTile;
  const int64_t tile_bytes = quads(channels) * kRowTile * 4;
  quantize_tiles(codebook, residuals, squared_norms, count, tiles, rows);
  const int64_t num_panels = (codebook.num_codes + kPanelWidth - 1) / kPanelWidth;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t t = 0; t < num_tiles; ++t) scan_int8_panel(codebook, tiles + t * tile_bytes, panel, rows[t]);
  }
  int64_t num_left = 0;
  for (int64_t i = 0; i < count; ++i) {
    Candidates& candidates = rows[i / kRowTile].candidates[i % kRowTile];
    if (candidates.count < 0) {
      left[num_left++] = int32_t(i);
      continue;
    }
    drop_above(candidates, int8_limit(rows[i / kRowTile], int(i % kRowTile)));
    codes[i] = nearest_of(codebook, residuals + i * channels, candidates.code, candidates.count);
  }
  return num_left;
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk

#endif
