// Inputs and outputs of depth_attention; strides in elements.
//
// Each stack has `heads` heads; query i of `queries` sees keys up to i + (keys - queries).
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "common/host_device.h"

namespace rqk {

// Larger problems are for tiled kernels.
constexpr int kMostDepths = 32;
constexpr int kMostHeadDim = 256;

// (stacks, heads, rows, head_dim), the last dimension contiguous.
template <class T>
struct HeadRows {
  T* data;
  int64_t stack_stride, head_stride, row_stride;
};
using HeadsIn = HeadRows<const void>;
using HeadsOut = HeadRows<void>;

struct DepthAttentionParams {
  HeadsIn q;     // rows: queries
  HeadsIn k, v;  // rows: keys
  HeadsOut out;  // rows: queries
  FloatType type;
  int64_t stacks, heads;
  int queries, keys, head_dim;  // 1 <= queries <= keys <= kMostDepths, 1 <= head_dim <= kMostHeadDim
  float scale;
};

// Exponents are factor (sign score - largest), so that scores keep all digits until the largest is subtracted. For a
// scale of zero the factor is the smallest positive float, so that masked scores of -inf stay -inf.
struct Exponents {
  float sign, factor;
};
RQK_HD Exponents exponents_of(float scale) {
  return {scale < 0 ? -1.0f : 1.0f, scale == 0 ? 0x1p-149f : scale < 0 ? -scale : scale};
}

struct DepthAttentionBackwardParams {
  DepthAttentionParams forward;  // without out
  HeadsIn grad;                  // of out
  HeadsOut grad_q, grad_k, grad_v;
};

// Run on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const DepthAttentionParams& params, void* stream);
void launch(const DepthAttentionBackwardParams& params, void* stream);

}  // namespace rqk
