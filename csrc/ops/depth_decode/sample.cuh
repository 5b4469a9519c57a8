// The code of a row from its logits, and the input of the next depth. One block per row.
//
// Reads a row of logits a few times, from L2 (shared/sample_row.cuh), and one row of the vectors. A row without a code
// (-1, or a given code out of range) continues with NaN, so that none of its later codes looks valid.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/philox.h"
#include "ops/depth_decode/params.h"
#include "shared/sample_row.cuh"

namespace rqk {
namespace depth_decode {

constexpr int kSampleThreads = 512;

struct SampleTask {
  float* logits;  // (rows, num_codes), of one depth; with guidance (2, rows, num_codes). Null if codes are given
  int64_t rows, num_codes, width;
  bool guided;
  float more, less;  // logits = more * first half - less * second half
  SampleSettings settings;
  uint64_t seed;
  int64_t offset, stream;  // of the uniform
  const int64_t* step;     // adds *step * depth to the stream; or null
  const int64_t* given;
  int64_t* codes;  // (rows, depth)
  int64_t d, depth;
  const float* vectors;        // of this depth
  bool accumulate;             // whether to add to the sum or to start it
  float* sums;                 // (rows, width)
  const float* next_position;  // (width), of the next depth; null at the last depth
  float* x;                    // (rows, width); with guidance (2, rows, width)
};

__global__ void __launch_bounds__(kSampleThreads) sample_rows(SampleTask p) {
  CU_SHARED(SampleShared<kSampleThreads>, shared);
  const int64_t row = blockIdx.x;
  int64_t code;
  if (p.logits == nullptr) {
    code = p.given[row * p.depth + p.d];
  } else {
    float* logits = p.logits + row * p.num_codes;
    if (p.guided) {
      const float* null = logits + p.rows * p.num_codes;
      for (int64_t k = threadIdx.x; k < p.num_codes; k += kSampleThreads) {
        logits[k] = __fsub_rn(__fmul_rn(p.more, logits[k]), __fmul_rn(p.less, null[k]));
      }
      // No barrier: the sampler starts with a pass over the same logits per thread, followed by a barrier.
    }
    const int64_t stream = p.stream + p.d + (p.step == nullptr ? 0 : *p.step * p.depth);
    const double uniform = philox_uniform(p.seed, static_cast<uint64_t>(p.offset + row), static_cast<uint32_t>(stream),
                                          kPhiloxSampleLogits);
    code = sample_row(logits, p.num_codes, p.settings, uniform, shared);
    if (threadIdx.x == 0) p.codes[row * p.depth + p.d] = code;
  }
  if (p.next_position == nullptr) return;
  const bool known = code >= 0 && code < p.num_codes;
  for (int64_t c = threadIdx.x; c < p.width; c += kSampleThreads) {
    const float vector = known ? p.vectors[code * p.width + c] : __int_as_float(0x7fc00000);
    float& sum = p.sums[row * p.width + c];
    sum = p.accumulate ? sum + vector : vector;
    const float x = sum + p.next_position[c];
    p.x[row * p.width + c] = x;
    if (p.guided) p.x[(p.rows + row) * p.width + c] = x;
  }
}

}  // namespace depth_decode
}  // namespace rqk
