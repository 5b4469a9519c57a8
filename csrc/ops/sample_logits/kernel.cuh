// Sampling from logits on a GPU: one block per row (shared/sample_row.cuh). Writes only the codes; a row moves K*4
// bytes from memory and, with both cuts, six times as many from L1 and L2.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/philox.h"
#include "ops/sample_logits/params.h"
#include "shared/sample_row.cuh"

namespace rqk {
namespace sample_logits {

constexpr int kThreads = 512;

// At least 2 blocks per multiprocessor, 64 registers.
__global__ void __launch_bounds__(kThreads, 2) sample_rows(SampleLogitsParams p) {
  CU_DYN_SMEM(SampleShared<kThreads>, shared);
  const int64_t offset = p.offset_ptr != nullptr ? *p.offset_ptr : p.offset;
  const int64_t stream = p.stream_ptr != nullptr ? *p.stream_ptr : p.stream;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const double uniform = philox_uniform(p.seed, static_cast<uint64_t>(offset + row / p.streams),
                                          static_cast<uint32_t>(stream + row % p.streams), kPhiloxSampleLogits);
    const int64_t code = sample_row(p.logits + row * p.num_codes, p.num_codes, p.settings, uniform, *shared);
    if (threadIdx.x == 0) p.codes[row] = code;
  }
}

}  // namespace sample_logits
}  // namespace rqk
