// Loads and stores of logits whose dtype is known at run time, and of two elements at once.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/half.cuh"

namespace rqk {
namespace soft_label {

using rqk::load;
using rqk::store;

template <FloatType kType>
constexpr int kSize = kType == FloatType::kFloat32 ? 4 : 2;

__device__ inline float load(FloatType type, const void* from, int64_t i) {
  if (type == FloatType::kFloat32) return load<FloatType::kFloat32>(from, i);
  return type == FloatType::kFloat16 ? load<FloatType::kFloat16>(from, i) : load<FloatType::kBFloat16>(from, i);
}
__device__ inline void store(FloatType type, void* to, int64_t i, float value) {
  if (type == FloatType::kFloat32) return store<FloatType::kFloat32>(to, i, value);
  if (type == FloatType::kFloat16) return store<FloatType::kFloat16>(to, i, value);
  store<FloatType::kBFloat16>(to, i, value);
}

// Elements k and k + 1, k even; in one access if `paired`, which requires alignment to two elements.
template <FloatType kType>
__device__ inline void load_pair(const void* from, int64_t k, bool paired, float (&values)[2]) {
  if (!paired) {
    values[0] = load<kType>(from, k);
    values[1] = load<kType>(from, k + 1);
    return;
  }
  float2 both;
  if constexpr (kType == FloatType::kFloat32) {
    both = *reinterpret_cast<const float2*>(static_cast<const float*>(from) + k);
  } else {
    both = unpack<kType>(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(from) + k));
  }
  values[0] = both.x;
  values[1] = both.y;
}

template <FloatType kType>
__device__ inline void store_pair(void* to, int64_t k, bool paired, const float (&values)[2]) {
  if (!paired) {
    store<kType>(to, k, values[0]);
    store<kType>(to, k + 1, values[1]);
  } else if constexpr (kType == FloatType::kFloat32) {
    *reinterpret_cast<float2*>(static_cast<float*>(to) + k) = float2{values[0], values[1]};
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(to) + k) = pack<kType>(values[0], values[1]);
  }
}

}  // namespace soft_label
}  // namespace rqk
