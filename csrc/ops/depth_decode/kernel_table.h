// Parts of a decoding step on the CPU, compiled once per instruction set.
#pragma once

#include <cstddef>

#include "common/cpu_capability.h"
#include "ops/depth_decode/params.h"

namespace rqk {

// Rows as the products want them: groups of at most rows_at_once, all of nearly the same size. Group g of n rows holds
// for each input, zeros behind the last one, the values of its rows side by side:
//   float  (inputs, n)
//   int8   (inputs / 4, n, 2, 4): four inputs' high bytes, then their low ones: value = scale * (256 high + low)
struct RowGroups {
  int64_t rows, groups, inputs;  // inputs padded
  uint8_t* values;               // rows * inputs floats, or as many pairs of bytes
  float* scales;                 // (rows), int8 alone
  int32_t* sums;                 // (rows, 2), int8 alone: of the high bytes and of the low ones

  int64_t begin(int64_t group) const { return group * rows / groups; }
};

// out = epilogue(linear(rows)) for some panels of outputs.
struct LinearTask {
  PackedLinear layer;
  const RowGroups* rows;
  float* out;  // (rows, stride), stride at least the padded outputs
  int64_t stride;
  Epilogue epilogue;  // kAdd: out += linear(rows)
};

// One head of one sequence of `count` new positions.
struct HeadTask {
  const float* qkv;  // (count, stride) of this sequence: its queries at `query`, keys and values at their places
  int64_t stride, width, head, head_dim, count;
  float *keys, *values;  // (capacity, head_dim); written at length .. + count
  int64_t length;
  float* out;  // (count, out_stride), this head's channels at their place
  int64_t out_stride;
  float* scores;  // scratch: (length + count), up to a multiple of 16
};

struct DepthDecodeKernels {
  int64_t (*rows_at_once)(WeightType type);
  // y = (x - mean) / sqrt(variance + eps) * weight + bias; zeros up to the padded width.
  void (*normalize)(const float* x, const float* weight, const float* bias, int64_t width, double eps, float* y);
  // One group from rows (rows, stride), `stride` and zeros as the group's inputs have them.
  void (*arrange)(const float* rows, int64_t stride, WeightType type, const RowGroups& groups, int64_t group);
  void (*multiply)(const LinearTask& task, WeightType type, int64_t first_panel, int64_t last_panel);
  void (*attend)(const HeadTask& head);
  size_t (*sample_scratch_bytes)(int64_t num_codes);
  int64_t (*sample_row)(const float* logits, int64_t num_codes, const SampleSettings& settings, double uniform,
                        void* scratch);
};

RQK_DECLARE_KERNEL_TABLE(DepthDecodeKernels, depth_decode_kernels)

}  // namespace rqk
