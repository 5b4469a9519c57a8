// The part of the CPU's soft labels that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/soft_label/params.h"
#include "shared/centered_codes.h"

namespace rqk {

// Rows whose scores are known.
struct LabelTile {
  const float* const* x;
  int first, last;  // those to deal with: first .. last - 1
  int64_t parts;
  void* memory;
};

struct CrossEntropyRow {
  const void* logits;
  void* gradient;  // or null
  float weight;
  float* loss;
  bool streams;  // the gradient is not read again before it has left the cache
};

struct SoftLabelKernels {
  CodeScoresKernels scores;
  size_t (*scratch_bytes)(int64_t num_codes);
  // Of the tile's rows first .. last - 1, at the same places of q and `rows`. Neighbours have no influence on a row's
  // result. Scores are overwritten. Memory: scratch_bytes, 64-byte aligned.
  void (*distance_softmax)(const CenteredCodes& codebook, double tau, const LabelTile& tile, float* const* q);
  void (*cross_entropy)(const CenteredCodes& codebook, double tau, const LabelTile& tile, const CrossEntropyRow* rows,
                        FloatType type, void* memory);
};

RQK_DECLARE_KERNEL_TABLE(SoftLabelKernels, soft_label_kernels)

}  // namespace rqk
