// CPU kernels of residual_search and the packed codebooks they read, one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"

namespace rqk {

// A codebook in the layout of the int8 scan.
struct Int8Panels {
  static constexpr int kMaxOutliers = 4;
  uint8_t* bytes;          // (num_panels, groups of 4 channels up to a multiple of 8, panel_width, 4): quantized,
                           // biased
  float* scale;            // (num_panels, panel_width)
  float* offset;           // (num_panels, panel_width): |e - m|^2/2 + <m, e - m>; +inf past the last code
  float* offset_centered;  // (num_panels, panel_width): |e - m|^2/2; +inf past the last code
  float* max_norm;         // (num_panels): at least every |e - m| of the panel
  float* max_kept;         // (num_panels): at least every |e - m| without the outlier channels
  float* max_error;        // (num_panels): at least every |e - m - scale * quantized| without them
  float* mean;             // (channels): m, a vector near the mean of the codes, or zero if that is as good
  double mean_norm;        // |m|
  // Outlier channels, in which the codes are far larger than in the others; excluded from `bytes`.
  int64_t num_outliers;
  int64_t* outlier_channel;  // (kMaxOutliers)
  float* kept;               // (channels): 0 for outlier channels, else 1
  float* outliers;           // (kMaxOutliers, outlier_stride): e - m in these channels; outlier_stride = num_panels *
                             // panel_width
  int64_t outlier_stride;
};

// Products of the codes of a packed codebook with each other, which turn the scores of one residual into those of the
// next (gram.h). Places are those of PackedCodebook::order, in blocks of kBlock codes; scores are divided by a norm N
// per block.
struct GramRows {
  static constexpr int kBlock = 128;
  int8_t* rows;       // (num_codes, num_blocks * kBlock): q, zero at the code's own place and past the last; or null
  float* scale;       // (num_codes): scale * q approximates <e_k, e_j - m> / N
  float* error;       // (num_codes): bound of the error of that
  float* diagonal;    // (num_codes): <e_k, e_k - m> / N
  int32_t* place;     // (num_codes): the place of each code
  float* block_norm;  // (num_blocks + 8): N, at least every |e - m| of the block
  double max_norm, min_norm;  // over all blocks
  double relative_error;      // at least every Int8Panels::max_error / N
};

// One depth's codebook, packed for the scans. Codes are sorted by norm, so that a panel's bound fits all its codes: in
// a shared codebook, the small codes of later depths must not pay for the large codes of the first. Parts that an
// instruction set does not use are null.
struct PackedCodebook {
  const float* codes_kc;  // the original, which float64 decisions use
  int64_t num_codes, channels;
  double max_norm;      // max_k |e_k|
  int32_t* order;       // (num_panels, panel_width): the code at each place; -1 past the last
  float* half_norms;    // (num_panels, panel_width): |e_k|^2/2, rounded to float; +inf past the last code
  float* panel_norms;   // (num_panels): at least every |e_k| of the panel
  const float* panels;  // (num_panels, channels, panel_width), for the float scan; null: packed on demand
  Int8Panels int8;
  GramRows gram;
};

// Codes that may be a row's nearest.
struct Candidates {
  static constexpr int kCapacity = 128;
  int32_t count;  // -1: more than kCapacity
  int32_t code[kCapacity];
  float least[kCapacity];  // lower bound of the exact score
};

// Scores of all codes for one row on its way through the depths (gram.h).
struct ScoreRow {
  int16_t* scores;  // (num_blocks * kBlock): s / (N * unit); then the smallest of each block, and 8 more
  double unit;      // 0: the int8 scan cannot handle this row
  double error;     // bound of |s / N - unit * score|
  int64_t taken;    // the code chosen by these scores and not yet subtracted from them; -1 after a scan
  int64_t decided;  // candidates evaluated in float64 since the scan
};

struct ResidualSearchKernels {
  int row_tile, panel_width;
  // |e_k|^2 and |e_k - m|^2 (m: `mean`, null for zero) of codes [begin, end).
  void (*measure)(const float* codes_kc, int64_t channels, const float* mean, int64_t begin, int64_t end,
                  double* squared_norms, double* centered_norms);
  // Fills panels [begin, end) of a codebook, except for the float panels. `order`, int8.mean and what `measure` gives
  // must be set.
  void (*pack)(const PackedCodebook& codebook, const double* squared_norms, const double* centered_norms, int64_t begin,
               int64_t end);
  // The float panels [begin, end).
  void (*pack_float)(const PackedCodebook& codebook, int64_t begin, int64_t end, float* panels);
  // Scratch bytes that a search of this many rows needs, a multiple of 64.
  size_t (*scratch_bytes)(int64_t rows, int64_t channels);
  // codes[i] = certified nearest code of row i of residuals (rows, channels), given its |r|^2; -1 for a row that is not
  // finite. Uses the float scan.
  void (*nearest)(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
                  void* scratch, int64_t* codes);
  // |r|^2 in float64, in the fixed summation order.
  double (*squared_norm)(const float* r, int64_t channels);

  // The int8 scan; null if the instruction set lacks it. It has two steps: `scan_part` finds the candidates in one
  // share of the codes (in whole blocks of `codes_per_block`), each share with its own scratch; `decide_parts` reads
  // the scratches of all shares and writes the codes. It returns how many rows it left to the float scan.
  bool has_int8 = false;
  int codes_per_block = 0;
  void (*scan_part)(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
                    int64_t part, int64_t parts, void* scratch) = nullptr;
  int64_t (*decide_parts)(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                          int64_t rows, void* const* scratches, int64_t parts, int64_t* codes) = nullptr;

  // Gram rows; null if the instruction set lacks them. pack_centered writes e - m as float panels. pack_gram writes the
  // rows of codes [begin, end), at most `gram_rows_at_once`, from these panels; its scratch holds tiles
  // (gram_rows_at_once, channels) and products (gram_rows_at_once, num_blocks * kBlock).
  int gram_rows_at_once = 0;
  void (*pack_centered)(const PackedCodebook& codebook, int64_t begin, int64_t end, float* panels) = nullptr;
  void (*pack_gram)(const PackedCodebook& codebook, const float* panels, int64_t begin, int64_t end,
                    float* scratch) = nullptr;
  // The scores of all codes for each row of residuals (rows, channels).
  void (*scan_scores)(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
                      void* scratch, ScoreRow* score_rows) = nullptr;
  // The certified nearest code of residual r: the scanned residual minus the codes taken since. Returns -1 if these
  // scores leave too many candidates or no longer bound the distances. `ahead`: the Gram row to prefetch, or null.
  int64_t (*nearest_by_scores)(const PackedCodebook& codebook, const float* r, double squared_norm, ScoreRow& row,
                               const int8_t* ahead) = nullptr;
};

RQK_DECLARE_KERNEL_TABLE(ResidualSearchKernels, residual_search_kernels)

}  // namespace rqk
