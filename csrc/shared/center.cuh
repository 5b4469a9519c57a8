// A vector near the mean of a codebook. Subtracting it from rows and codes makes a common offset of the data cost no
// digits.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace rqk {

// Channel c of it: the mean of a sample of the codes. Any vector would be correct.
__device__ inline float codebook_center(const float* codes_kc, int64_t num_codes, int64_t channels, int64_t c) {
  constexpr int kSample = 32;
  float values[kSample];  // so that all reads are in flight at once
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
