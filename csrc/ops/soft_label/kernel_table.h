// CPU kernels of soft_label, one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/soft_label/params.h"
#include "shared/centered_codes.h"

namespace rqk {

// A tile of scored rows.
struct LabelTile {
  const float* const* x;
  int first, last;  // process rows first .. last - 1
  int64_t parts;
  void* memory;
};

struct CrossEntropyRow {
  const void* logits;
  void* gradient;  // or null
  float weight;
  float* loss;
  bool streams;  // whether to use non-temporal stores for the gradient
};

struct SoftLabelKernels {
  CodeScoresKernels scores;
  size_t (*scratch_bytes)(int64_t num_codes);
  // Process rows first .. last - 1 of the tile, with the same indices in q and `rows`. A result depends on its row
  // alone. Scores are overwritten. Memory: scratch_bytes, 64-byte aligned.
  void (*distance_softmax)(const CenteredCodes& codebook, double tau, const LabelTile& tile, float* const* q);
  void (*cross_entropy)(const CenteredCodes& codebook, double tau, const LabelTile& tile, const CrossEntropyRow* rows,
                        FloatType type, void* memory);
};

RQK_DECLARE_KERNEL_TABLE(SoftLabelKernels, soft_label_kernels)

}  // namespace rqk
