// The part of the CPU's stochastic search that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rqk {

// One depth's codebook, seen from a vector m in the middle of its codes: an offset of the data costs no digits.
struct CentredCodebook {
  const float* codes_kc;  // the original, which decides
  int64_t num_codes, channels;
  const float* mean;  // (channels): m
  double max_norm;    // max_k |e_k - m|
  float* panels;      // (num_panels, channels, panel_width): e - m, codes in their order, zeros past the last
  float* half_norms;  // (num_panels, panel_width): |e_k - m|^2/2; +inf past the last code
};

struct SampleKernel {
  int row_tile, panel_width;
  // Fills panels [begin, end). Returns the largest |e_k - m|^2 among them, infinity where a code is not finite.
  double (*pack)(const CentredCodebook& codebook, int64_t begin, int64_t end);
  // Bytes of scratch that `sample` needs for this many rows.
  size_t (*scratch_bytes)(int64_t rows, int64_t num_codes, int64_t channels);
  // codes[i]: drawn by uniforms[i] from Q_tau of row i of residuals (rows, channels), given its |r|^2; -1 where the row
  // is not finite.
  void (*sample)(const CentredCodebook& codebook, const float* residuals, const double* squared_norms,
                 const double* uniforms, double tau, int64_t rows, void* scratch, int64_t* codes);
  // |r|^2 in float64, in the fixed summation order.
  double (*squared_norm)(const float* r, int64_t channels);
};

}  // namespace rqk
