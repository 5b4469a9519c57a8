// Inputs and outputs of sample_logits. All arrays are contiguous.
#pragma once

#include <cstdint>

#include "shared/sample_settings.h"

namespace rqk {

struct SampleLogitsParams {
  const float* logits;  // (rows, num_codes)
  int64_t rows, num_codes;
  SampleSettings settings;
  uint64_t seed;
  int64_t offset;             // row n has the counter offset + n / streams ...
  int64_t stream;             // ... and the third counter word stream + n % streams
  int64_t streams;            // rows that share a counter's first two words, >= 1
  const int64_t* offset_ptr;  // (1), read by the kernel instead of `offset`; or null
  const int64_t* stream_ptr;  // (1), read instead of `stream`; or null
  int64_t* codes;             // (rows); -1 for a row with NaN, +inf, or nothing but -inf
};

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const SampleLogitsParams& params, void* stream);

}  // namespace rqk
