// CPU kernels of sample_logits, one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "shared/sample_settings.h"

namespace rqk {

struct SampleLogitsKernels {
  // Scratch bytes that `sample_row` needs.
  size_t (*scratch_bytes)(int64_t num_codes);
  // Samples the code of one row; -1 if it has NaN, +inf, or nothing but -inf.
  int64_t (*sample_row)(const float* logits, int64_t num_codes, const SampleSettings& settings, double uniform,
                        void* scratch);
};

RQK_DECLARE_KERNEL_TABLE(SampleLogitsKernels, sample_logits_kernels)

}  // namespace rqk
