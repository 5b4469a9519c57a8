// Sum of codes on a GPU: one thread per output element, neighbouring threads on neighbouring channels.
//
// Reads depth*C*4 bytes of the codebooks per row (mostly from L2) and depth*8 of codes; writes C*4.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/residual_decode/params.h"

namespace rqk {
namespace residual_decode {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) decode(ResidualDecodeParams p) {
  const int64_t elements = p.rows * p.channels, stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += stride) {
    const int64_t row = i / p.channels, c = i % p.channels;
    float sum = 0.0f;
    for (int64_t d = 0; d < p.depth; ++d) {
      const int64_t code = p.codes[row * p.code_depth + d];
      if (code < 0 || code >= p.num_codes) {
        sum = __int_as_float(0x7fffffff);
        // Several threads may find the same bad code: set the flag atomically.
        if (c == 0) atomicExch(p.any_bad, 1);
        break;
      }
      sum += p.codebooks[d * p.codebook_stride + code * p.channels + c];
    }
    p.decoded[i] = sum;
  }
}

}  // namespace residual_decode
}  // namespace rqk
