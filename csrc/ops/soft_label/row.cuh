// Pointers of the rows, and exact distances for single lanes.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/warp.cuh"
#include "ops/soft_label/plan.h"
#include "shared/exact.cuh"

namespace rqk {
namespace soft_label {

__device__ inline int lane_of_warp() { return threadIdx.x % 32; }

struct Row {
  const float* x;      // null for a masked row
  const void* logits;  // of rows that are not masked
  void* gradient;      // null if there is no row, or no gradient
  float* loss;         // null if there is no row, or no loss
  float weight;
};

// Row `place` of those with codebook `q`: with one codebook per inner index they are `inner` apart.
__device__ inline Row row_at(const SoftLabelCrossEntropyParams& p, int64_t q, int64_t place) {
  const SoftLabels& labels = p.labels;
  const int64_t i = labels.codebook_stride == 0 ? place % labels.inner : q;
  const int64_t o = labels.codebook_stride == 0 ? place / labels.inner : place;
  Row row{};
  if (o >= labels.outer) return row;
  const int64_t number = o * labels.inner + i, size = p.type == FloatType::kFloat32 ? 4 : 2;
  if (p.gradient != nullptr) {
    row.gradient = static_cast<char*>(p.gradient) + (o * p.gradient_outer_stride + i * p.gradient_inner_stride) * size;
  }
  if (p.losses != nullptr) row.loss = p.losses + number;
  if (p.mask != nullptr && p.mask[number] == 0) return row;
  row.x = labels.x + number * labels.channels;
  row.logits = static_cast<const char*>(p.logits) + (o * p.logits_outer_stride + i * p.logits_inner_stride) * size;
  row.weight = p.weight == nullptr ? 1.0f : p.weight[number * p.weight_stride];
  return row;
}

// |x - e_k|^2 as the definition rounds it, for the lanes of `mask`, each with its own code. Four codes at a time, each
// by a group of eight. The whole warp calls.
__device__ inline double exact_distance(unsigned mask, const float* x, const float* codebook, int64_t k,
                                        int64_t channels) {
  const int lane = lane_of_warp(), group = lane / kLanes;
  double mine = 0;
  while (mask != 0) {
    unsigned rest = mask;
    for (int i = 0; i < group; ++i) rest &= rest - 1;
    const int64_t code = __shfl_sync(kFullWarp, k, rest == 0 ? 0 : __ffs(int(rest)) - 1);
    const double sum = rest == 0 ? 0 : squared_distance(x, codebook + code * channels, channels);
    const int rank = __popc(mask & ((1u << lane) - 1));
    const double taken = __shfl_sync(kFullWarp, sum, rank * kLanes % 32);
    if ((mask >> lane & 1) != 0 && rank < 32 / kLanes) mine = taken;
    for (int i = 0; i < 32 / kLanes; ++i) mask &= mask - 1;
  }
  return mine;
}

}  // namespace soft_label
}  // namespace rqk
