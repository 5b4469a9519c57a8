// The part of the CPU's depth attention that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/depth_attention/params.h"

namespace rqk {

struct DepthAttentionKernels {
  // Floats of scratch memory for a thread, 64-byte aligned.
  int64_t (*scratch)(const DepthAttentionParams& p, bool backward);
  // The heads [begin, end) of all stacks' heads, one stack after another.
  void (*forward)(const DepthAttentionParams& p, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const DepthAttentionBackwardParams& p, int64_t begin, int64_t end, float* scratch);
};

RQK_DECLARE_KERNEL_TABLE(DepthAttentionKernels, depth_attention_kernels)

}  // namespace rqk
