// A vector in the middle of a codebook, from which rows and codes are seen: an offset of the data costs no digits then.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace rqk {

// Channel c: the mean of some codes. Any number would be right.
__device__ inline float codebook_center(const float* codes_kc, int64_t num_codes, int64_t channels, int64_t c) {
  constexpr int kSample = 32;
  float values[kSample];  // all reads under way at once
#pragma unroll
  for (int s = 0; s < kSample; ++s) values[s] = codes_kc[s * num_codes / kSample * channels + c];
  float sum = 0;
  int count = 0;
#pragma unroll
  for (int s = 0; s < kSample; ++s) {
    const bool usual = fabsf(values[s]) < 1e15f;
    sum += usual ? values[s] : 0.0f;
    count += usual ? 1 : 0;
  }
  return count == 0 ? 0.0f : sum / float(count);
}

}  // namespace rqk
