// The part of the CPU search that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstdint>

namespace rqk {

// One depth's codebook, prepared for the scan: codes in panels of `panel_width`, channel by channel, so that one
// vector load takes the same channel of neighbouring codes. Codes missing in the last panel never win.
struct PackedCodebook {
  const float* codes_kc;    // the original, which decides
  const float* panels;      // (num_panels, channels, panel_width)
  const float* half_norms;  // (num_panels, panel_width): |e_k|^2 / 2, rounded to float; +inf past the last code
  int64_t num_codes, channels;
  double max_norm;  // max_k |e_k|
};

// What one row needs while it is scanned.
struct RowState {
  static constexpr int kCapacity = 48;  // more candidates than this: the row is searched in float64 throughout
  double slack;                         // how far above the best score the winner's own score can be
  float best, limit;                    // best score so far; best + slack, rounded up
  int32_t num_candidates;               // -1: gave up, search in float64
  int32_t candidate[kCapacity];
  float score[kCapacity];
};

struct SearchKernel {
  int row_tile, panel_width;
  // Half squared norms of codes [begin, end) and their panels. begin and end are multiples of panel_width, but for the
  // last end. Returns the largest squared norm.
  double (*pack)(const float* codes_kc, int64_t channels, int64_t begin, int64_t end, float* panels, float* half_norms);
  // codes[i] = certified nearest code of row i of residuals (rows, channels); -1 where the row is not finite.
  // tiles: room for rows rounded up to row_tile, times channels. states: room for as many.
  void (*nearest)(const PackedCodebook& codebook, const float* residuals, int64_t rows, float* tiles, RowState* states,
                  int64_t* codes);
  // |r|^2 in float64, in the fixed summation order.
  double (*squared_norm)(const float* r, int64_t channels);
};

#define RQK_DECLARE_SEARCH_KERNEL(capability) \
  namespace capability {                      \
  extern const SearchKernel search_kernel;    \
  }

}  // namespace rqk
