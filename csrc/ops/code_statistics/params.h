// What code statistics work on. All arrays are contiguous.
#pragma once

#include <cstdint>

namespace rqk {

struct CodeStatisticsParams {
  const float* x;        // (rows, channels)
  const int64_t* codes;  // (rows); -1 counts nowhere
  int64_t rows, channels, num_codes;
  float* counts;  // (num_codes)
  float* sums;    // (num_codes, channels)
};

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const CodeStatisticsParams& params, void* stream);

}  // namespace rqk
