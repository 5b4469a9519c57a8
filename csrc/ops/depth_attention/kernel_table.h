// CPU kernels of depth_attention, one table per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/depth_attention/params.h"

namespace rqk {

struct DepthAttentionKernels {
  // Scratch floats per thread, 64-byte aligned.
  int64_t (*scratch)(const DepthAttentionParams& p, bool backward);
  // Processes heads [begin, end), numbered stack by stack.
  void (*forward)(const DepthAttentionParams& p, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const DepthAttentionBackwardParams& p, int64_t begin, int64_t end, float* scratch);
};

RQK_DECLARE_KERNEL_TABLE(DepthAttentionKernels, depth_attention_kernels)

}  // namespace rqk
