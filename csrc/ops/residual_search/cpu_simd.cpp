// Certified nearest code on a CPU, compiled once per instruction set.
//
// The definition takes the code with the smallest float64 distance. A fast scan finds the few codes that could be it,
// and float64 decides among them, so codes depend neither on the instruction set nor on how rows are grouped:
//   scan_int8.h    int8 products, where the instruction set has them; rows it cannot decide go to
//   scan_float.h   float32 products; rows it cannot decide go to
//   decide.h       float64, the definition itself
//   gram.h         scores that serve several depths, for a codebook packed once
// Nothing of size rows x codes is stored.
#include "ops/residual_search/decide.h"
#include "ops/residual_search/gram.h"
#include "ops/residual_search/scan_float.h"
#include "ops/residual_search/scan_int8.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

void measure(const float* codes_kc, int64_t channels, const float* mean, int64_t begin, int64_t end,
             double* squared_norms, double* centered_norms) {
  for (int64_t k = begin; k < end; ++k) {
    const float* e = codes_kc + k * channels;
    squared_norms[k] = squared_norm(e, channels);
    centered_norms[k] = mean == nullptr ? squared_norms[k] : squared_distance(e, mean, channels);
  }
}

void pack(const PackedCodebook& codebook, const double* squared_norms, const double* centered_norms, int64_t begin,
          int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    double largest = 0;
    for (int64_t place = panel * kPanelWidth; place < (panel + 1) * kPanelWidth; ++place) {
      const int32_t k = codebook.order[place];
      codebook.half_norms[place] = k >= 0 ? float(squared_norms[k] / 2) : __builtin_inff();
      if (k >= 0 && squared_norms[k] > largest) largest = squared_norms[k];
    }
    codebook.panel_norms[panel] = round_up(__builtin_sqrt(largest));
#if defined(__AVX2__)
    if (codebook.int8.bytes != nullptr) pack_int8_panel(codebook, centered_norms, panel);
#else
    (void)centered_norms;
#endif
  }
}

void pack_float(const PackedCodebook& codebook, int64_t begin, int64_t end, float* panels) {
  for (int64_t panel = begin; panel < end; ++panel) {
    pack_float_panel(codebook, panel * kPanelWidth, panels + panel * kPanelWidth * codebook.channels);
  }
}

// Parts of the scratch memory, each aligned to a cache line.
struct Scratch {
  float* tiles;
  float* panel;
  FloatRows* float_rows;
  int32_t* left;
#if defined(__AVX2__)
  uint8_t* byte_tiles;
  Int8Rows* int8_rows;
  BlockScores* block;
  float* inverse_units;
#endif
  size_t bytes;
};

Scratch divide(void* memory, int64_t rows, int64_t channels) {
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile, padded = tiles * kRowTile;
  size_t used = 0;
  auto take = [&used, memory](int64_t bytes) {
    void* part = static_cast<char*>(memory) + used;
    used += (size_t(bytes) + 63) / 64 * 64;
    return part;
  };
  Scratch scratch{};
  scratch.tiles = static_cast<float*>(take(padded * channels * int64_t(sizeof(float))));
  scratch.panel = static_cast<float*>(take(kPanelWidth * channels * int64_t(sizeof(float))));
  scratch.float_rows = static_cast<FloatRows*>(take(tiles * int64_t(sizeof(FloatRows))));
  scratch.left = static_cast<int32_t*>(take(padded * int64_t(sizeof(int32_t))));
#if defined(__AVX2__)
  scratch.byte_tiles = static_cast<uint8_t*>(take(padded * quads(channels) * 4));
  scratch.int8_rows = static_cast<Int8Rows*>(take(tiles * int64_t(sizeof(Int8Rows))));
  scratch.block = static_cast<BlockScores*>(take(int64_t(sizeof(BlockScores))));
  scratch.inverse_units = static_cast<float*>(take(padded * int64_t(sizeof(float))));
#endif
  scratch.bytes = used;
  return scratch;
}

size_t scratch_bytes(int64_t rows, int64_t channels) { return divide(nullptr, rows, channels).bytes; }

// Searches the rows scratch.left[0 .. count) by the float scan; codes[i] is -1 for rows that are not finite. Returns
// the number of finite rows.
int64_t nearest_by_float(const PackedCodebook& codebook, const float* residuals, const double* squared_norms,
                         int64_t count, const Scratch& scratch, int64_t* codes) {
  // Squares of floats cannot overflow float64, so the norm is finite exactly if the row is.
  int64_t finite = 0;
  for (int64_t j = 0; j < count; ++j) {
    const int32_t i = scratch.left[j];
    if (__builtin_isfinite(squared_norms[i])) {
      scratch.left[finite++] = i;
    } else {
      codes[i] = -1;
    }
  }
  if (finite > 0) {
    search_float(codebook, residuals, squared_norms, scratch.left, finite, scratch.tiles, scratch.panel,
                 scratch.float_rows, codes);
  }
  return finite;
}

void nearest(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
             void* memory, int64_t* codes) {
  const Scratch scratch = divide(memory, rows, codebook.channels);
  for (int64_t i = 0; i < rows; ++i) scratch.left[i] = int32_t(i);
  nearest_by_float(codebook, residuals, squared_norms, rows, scratch, codes);
}

#if defined(__AVX2__)
void scan_part(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
               int64_t part, int64_t parts, void* memory) {
  const Scratch scratch = divide(memory, rows, codebook.channels);
  scan_int8(codebook, residuals, squared_norms, rows, part, parts, scratch.byte_tiles, scratch.int8_rows,
            *scratch.block);
}

int64_t decide_parts(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
                     void* const* memories, int64_t parts, int64_t* codes) {
  const Scratch scratch = divide(memories[0], rows, codebook.channels);
  for (int64_t part = 1; part < parts; ++part) {
    const Scratch other = divide(memories[part], rows, codebook.channels);
    for (int64_t t = 0; t < (rows + kRowTile - 1) / kRowTile; ++t) {
      merge_int8(scratch.int8_rows[t], other.int8_rows[t]);
    }
  }
  const int64_t left = decide_int8(codebook, residuals, rows, scratch.int8_rows, codes, scratch.left);
  return nearest_by_float(codebook, residuals, squared_norms, left, scratch, codes);
}
#endif

#if defined(__AVX512VNNI__)
void scan_scores(const PackedCodebook& codebook, const float* residuals, const double* squared_norms, int64_t rows,
                 void* memory, ScoreRow* score_rows) {
  const Scratch scratch = divide(memory, rows, codebook.channels);
  scan_scores(codebook, residuals, squared_norms, rows, scratch.byte_tiles, scratch.int8_rows, scratch.inverse_units,
              score_rows);
}
#endif

}  // namespace

constexpr ResidualSearchKernels residual_search_kernels = {
    .row_tile = kRowTile,
    .panel_width = kPanelWidth,
    .measure = measure,
    .pack = pack,
    .pack_float = pack_float,
    .scratch_bytes = scratch_bytes,
    .nearest = nearest,
    .squared_norm = squared_norm,
#if defined(__AVX2__)
    .has_int8 = true,
    .codes_per_block = kBlockPanels * kPanelWidth,
    .scan_part = scan_part,
    .decide_parts = decide_parts,
#endif
#if defined(__AVX512VNNI__)
    .gram_rows_at_once = kGramRowsAtOnce,
    .pack_centered = pack_centered,
    .pack_gram = pack_gram,
    .scan_scores = scan_scores,
    .nearest_by_scores = nearest_by_scores,
#endif
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
