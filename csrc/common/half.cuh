// Fp16 and bf16 loads and stores in kernels, without NVIDIA's types, which the emulation lacks.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/float_type.h"
#include "common/ptx.cuh"

namespace rqk {

// Two elements packed into 32 bits, the first one in the low half.
template <FloatType kType>
__device__ inline float2 unpack(uint32_t two) {
  if constexpr (kType == FloatType::kFloat16) {
    return {ptx::float_of_half(uint16_t(two)), ptx::float_of_half(uint16_t(two >> 16))};
  } else {
    return {__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u)};
  }
}

template <FloatType kType>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (kType == FloatType::kFloat16) {
    return ptx::half_of_float(low) | uint32_t(ptx::half_of_float(high)) << 16;
  } else {
    return ptx::bfloat16_of_float(low) | uint32_t(ptx::bfloat16_of_float(high)) << 16;
  }
}

template <FloatType kType>
__device__ inline float load(const void* from, int64_t i) {
  if constexpr (kType == FloatType::kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  if constexpr (kType == FloatType::kFloat16) return ptx::float_of_half(bits);
  return __uint_as_float(uint32_t(bits) << 16);
}

template <FloatType kType>
__device__ inline void store(void* to, int64_t i, float value) {
  if constexpr (kType == FloatType::kFloat32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] =
        kType == FloatType::kFloat16 ? ptx::half_of_float(value) : ptx::bfloat16_of_float(value);
  }
}

}  // namespace rqk
