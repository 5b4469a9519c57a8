// Inputs and outputs of stochastic_residual_search. All arrays are contiguous.
#pragma once

#include <cstdint>

namespace rqk {

struct StochasticResidualSearchParams {
  const float* x;          // (rows, channels)
  const float* codebooks;  // (num_codes, channels), or one such block per depth
  int64_t rows, channels, num_codes, depth;
  int64_t codebook_stride;  // elements from one depth's codebook to the next; 0 if all depths share one
  double tau;               // > 0; infinity samples all codes uniformly
  uint64_t seed;
  int64_t offset;            // the counter of row n is offset + n
  int64_t* codes;            // (rows, depth)
  float* quantized;          // (rows, channels)
  float* residual_sq_norms;  // (rows, depth)
  float* residuals;          // (rows, depth, channels), or null
};

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const StochasticResidualSearchParams& params, void* stream);

}  // namespace rqk
