// Inputs and outputs of residual_decode. All arrays are contiguous.
#pragma once

#include <cstdint>

namespace rqk {

struct ResidualDecodeParams {
  const int64_t* codes;    // (rows, code_depth); the first `depth` of each row are used
  const float* codebooks;  // (num_codes, channels), or one such block per depth
  int64_t rows, channels, num_codes, depth, code_depth;
  int64_t codebook_stride;  // elements from one depth's codebook to the next; 0 if all depths share one
  float* decoded;           // (rows, channels); NaN for a row with a code outside [0, num_codes)
  int32_t* any_bad;         // (1), set to 1 if there is such a code; zero before the launch
};

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const ResidualDecodeParams& params, void* stream);

}  // namespace rqk
