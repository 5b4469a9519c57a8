// Inputs and outputs of the soft labels; strides in elements.
//
// Q(k | x) = softmax_k(-|x - e_k|^2 / tau). Rows are numbered (outer, inner), row = o * inner_size + i. With a codebook
// per depth, inner is the depth; otherwise it is the last leading dimension.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace rqk {

// Inputs of Q.
struct SoftLabels {
  const float* x;           // (outer, inner, channels), contiguous
  const float* codebook;    // (num_codes, channels), contiguous; or one such block per inner index
  int64_t codebook_stride;  // elements from one inner index's codebook to the next; 0 if all share one
  int64_t outer, inner, channels, num_codes;
  double tau;          // > 0; may be infinite
  uint8_t* workspace;  // workspace_bytes(labels) on a GPU, 256-byte aligned; unused on the CPU
};

// CUDA: for the current device.
int64_t workspace_bytes(const SoftLabels& labels);

struct DistanceSoftmaxParams {
  SoftLabels labels;
  float* q;  // (outer, inner, num_codes), contiguous
};

// loss = logsumexp(logits) - sum_k Q_k logits_k;  gradient = weight * (softmax(logits) - Q).
struct SoftLabelCrossEntropyParams {
  SoftLabels labels;
  const void* logits;  // (outer, inner, num_codes) of `type`; strides below, the last is 1
  FloatType type;
  int64_t logits_outer_stride, logits_inner_stride;
  const uint8_t* mask;    // (outer, inner): rows with 0 are not read, have loss 0 and gradient 0; or null
  const float* weight;    // weight of a row's gradient: (outer, inner), or one for all; null: 1
  int64_t weight_stride;  // 1, or 0 if all rows share one
  float* losses;          // (outer, inner), unweighted
  float* total;           // weight[0] times the sum of all losses; null if not wanted
  void* gradient;         // of `type`; may be `logits` (with their strides); or null
  int64_t gradient_outer_stride, gradient_inner_stride;
};

// Run on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const DistanceSoftmaxParams& params, void* stream);
void launch(const SoftLabelCrossEntropyParams& params, void* stream);

}  // namespace rqk
