// CPU kernels of depth_decode, one table per instruction set.
#pragma once

#include <cstddef>

#include "common/cpu_capability.h"
#include "ops/depth_decode/params.h"

namespace rqk {

// Rows in the order of the products: groups of at most rows_at_once, of nearly equal size. A group of n rows holds, for
// each input, the values of its rows next to each other, padded with zero inputs:
//   float  (inputs, n)
//   int8   (inputs / 4, n, 2, 4): the high bytes of four inputs, then the low ones; value = scale * (256 high + low)
struct RowGroups {
  int64_t rows, groups, inputs;  // inputs is padded
  uint8_t* values;               // rows * inputs floats, or pairs of bytes
  float* scales;                 // (rows), int8 only
  int32_t* sums;                 // (rows, 2), int8 only: sums of the high bytes and of the low ones

  int64_t begin(int64_t group) const { return group * rows / groups; }
};

// out = epilogue(linear(rows)), for some panels of outputs.
struct LinearTask {
  PackedLinear layer;
  const RowGroups* rows;
  float* out;  // (rows, stride); stride is at least the padded number of outputs
  int64_t stride;
  Epilogue epilogue;  // kAdd: out += linear(rows)
};

// Attention of one head, for `count` new positions of one sequence.
struct HeadTask {
  const float* qkv;  // (count, stride): queries, keys and values of this sequence, `width` apart
  int64_t stride, width, head, head_dim, count;
  float *keys, *values;  // (capacity, head_dim); written at length .. length + count
  int64_t length;
  float* out;  // (count, out_stride); this head writes its own channels
  int64_t out_stride;
  float* scores;  // scratch: (length + count), rounded up to a multiple of 16
};

struct DepthDecodeKernels {
  int64_t (*rows_at_once)(WeightType type);
  // y = (x - mean) / sqrt(variance + eps) * weight + bias; zeros up to the padded width.
  void (*normalize)(const float* x, const float* weight, const float* bias, int64_t width, double eps, float* y);
  // Arranges one group of rows (rows, stride); the rows are zero past the last input.
  void (*arrange)(const float* rows, int64_t stride, WeightType type, const RowGroups& groups, int64_t group);
  void (*multiply)(const LinearTask& task, WeightType type, int64_t first_panel, int64_t last_panel);
  void (*attend)(const HeadTask& head);
  size_t (*sample_scratch_bytes)(int64_t num_codes);
  int64_t (*sample_row)(const float* logits, int64_t num_codes, const SampleSettings& settings, double uniform,
                        void* scratch);
};

RQK_DECLARE_KERNEL_TABLE(DepthDecodeKernels, depth_decode_kernels)

}  // namespace rqk
