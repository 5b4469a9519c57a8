// The interface between code_scores.h, compiled once per instruction set, and centered_codebook.h, its caller.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rqk {

// A codebook seen from a vector m near the mean of its codes, if they lie off the origin: a common offset of the data
// then costs no digits.
struct CenteredCodes {
  const float* codes_kc;     // the original, which float64 decisions use
  const float* centered_kc;  // e_k - m; the original if mean is null
  const float* mean;         // m; null for zero, if that is as good
  const float* half_norms;   // |e_k - m|^2 / 2; +inf past the last code, up to a whole block of the scan
  double max_norm;           // at least every |e_k - m|
  int64_t num_codes, channels;
};

// Memory is 64-byte aligned; a tile needs tile_bytes for its number of parts.
struct CodeScoresKernels {
  int tile_rows;
  int64_t (*padded)(int64_t num_codes);
  size_t (*tile_bytes)(int64_t num_codes, int64_t channels, int64_t parts);
  // Packs the rows x[0] .. x[count - 1], at most tile_rows.
  void (*pack_rows)(const CenteredCodes& codes, const float* const* x, int count, int64_t parts, void* tile);
  // Computes their scores for one share of `parts` of the codes.
  void (*scan)(const CenteredCodes& codes, int count, int64_t part, int64_t parts, void* tile);
  // In float64, in the fixed summation order.
  double (*squared_distance)(const float* a, const float* b, int64_t channels);
  double (*squared_norm)(const float* a, int64_t channels);
};

}  // namespace rqk
