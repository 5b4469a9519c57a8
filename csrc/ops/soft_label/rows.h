// The part of the CPU's soft labels that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/soft_label/params.h"

namespace rqk {

// One codebook and what its scores need.
struct LabelCodebook {
  const float* codes_kc;    // the original
  const float* centred_kc;  // e_k - mean; the original where mean is null
  const float* mean;        // a vector in the middle of the codes; null: zero, where that is as good
  const float* half_norms;  // (padded): |e_k - mean|^2 / 2; +inf past the last code
  double max_norm;          // no |e_k - mean| is above
  int64_t num_codes, channels;
  double tau;
};

struct CrossEntropyRow {
  const float* x;
  const void* logits;
  void* gradient;  // or null
  float weight;
  float* loss;
  bool streams;  // the gradient is not read again before it has left the cache
};

struct SoftLabelKernel {
  int rows_at_once;
  int64_t (*padded)(int64_t num_codes);
  size_t (*scratch_bytes)(int64_t num_codes, int64_t channels);
  double (*squared_distance)(const float* a, const float* b, int64_t channels);
  double (*squared_norm)(const float* a, int64_t channels);
  // Of `count` rows, at most rows_at_once. Neighbours have no influence on a row's result. Memory: 64-byte aligned.
  void (*distance_softmax)(const LabelCodebook& codebook, const float* const* x, float* const* q, int count,
                           void* memory);
  void (*cross_entropy)(const LabelCodebook& codebook, const CrossEntropyRow* rows, FloatType type, int count,
                        void* memory);
};

}  // namespace rqk
