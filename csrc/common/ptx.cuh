// All inline assembly of the kernels; each instruction has a device body and a host body.
//
// Fragments follow the PTX ISA, section "Matrix multiply-accumulate operation using mma instruction". With E elements
// per register (4 for int8, 2 for f16 or bf16, 1 for tf32), g = lane / 4 and t = lane % 4, element j is
//   a[i] = A(g + 8 (i % 2), E t + j + 4 E (i / 2))
//   b[i] = B(E t + j + 4 E i, g)
//   d[i] = D(g + 8 (i / 2), 2 t + i % 2)
// All lanes of the warp must call mma and ldmatrix. The rounding within an mma is up to the device. The host adds exact
// products in float64 and rounds once, after truncating tf32 inputs to 10 bits of fraction.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace rqk::ptx {

#ifdef __CUDACC__

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes, both addresses 16-byte aligned. If not `valid`, writes zeros and reads nothing.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// Commits a group: all copies that this thread has started since the last commit.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are in flight. Other threads see the data after a barrier.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8, 16-byte aligned.
// d[i] holds elements (lane / 4, 2 (lane % 4)) and the next one of matrix i, or of its transpose.
template <bool kTranspose>
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

#define RQK_MMA(name, shape_and_types, T, constraint)                                                             \
  __device__ inline void name(T(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                         \
    asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
                 : "+" constraint(d[0]), "+" constraint(d[1]), "+" constraint(d[2]), "+" constraint(d[3])         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
  }                                                                                                               \
  __device__ inline void name(T(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const T(&c)[4]) {         \
    asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};" \
                 : "=" constraint(d[0]), "=" constraint(d[1]), "=" constraint(d[2]), "=" constraint(d[3])         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), constraint(c[0]),            \
                   constraint(c[1]), constraint(c[2]), constraint(c[3]));                                         \
  }
// d += a b, and d = a b + c
RQK_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
RQK_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
RQK_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32", float, "f")
RQK_MMA(mma_s8, "m16n8k32.row.col.s32.s8.s8.s32", int32_t, "r")
#undef RQK_MMA

// Fp16 and bf16 conversions on bit patterns, rounding to nearest even.
__device__ inline float float_of_half(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

__device__ inline uint16_t half_of_float(float value) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

__device__ inline uint16_t bfloat16_of_float(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#else

__forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true,
                                 rqk_site at = rqk_site::current()) {
  emulation::async_copy(shared, global, valid ? 16 : 0, 16, at);
}

__forceinline__ void cp_async_commit() { emulation::async_commit(); }

template <int kPending>
__forceinline__ void cp_async_wait() {
  static_assert(kPending >= 0);
  emulation::async_wait(kPending);
}

template <bool kTranspose>
__forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* row, rqk_site at = rqk_site::current()) {
  emulation::load_matrices(d, row, kTranspose, at);
}

#define RQK_MMA(name, type, T)                                                                        \
  __forceinline__ void name(T(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],                 \
                            rqk_site at = rqk_site::current()) {                                      \
    emulation::multiply_matrices(type, d, a, b, d, at);                                               \
  }                                                                                                   \
  __forceinline__ void name(T(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const T(&c)[4], \
                            rqk_site at = rqk_site::current()) {                                      \
    emulation::multiply_matrices(type, d, a, b, c, at);                                               \
  }
RQK_MMA(mma_bf16, emulation::Element::bf16, float)
RQK_MMA(mma_f16, emulation::Element::f16, float)
RQK_MMA(mma_tf32, emulation::Element::tf32, float)
RQK_MMA(mma_s8, emulation::Element::s8, int32_t)
#undef RQK_MMA

inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest < 0x400) return __uint_as_float(sign | __float_as_uint(float(rest) * 0x1p-24f));
  return __uint_as_float(sign | ((rest << 13) + (rest < 0x7c00 ? 0x38000000u : 0x70000000u)));
}

inline uint16_t half_of_float(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x47800000) return uint16_t(sign | 0x7c00);
  // The last place of 0.5 is the smallest fp16 denormal, so the addition rounds correctly.
  if (rest < 0x38800000) {
    return uint16_t(sign | (__float_as_uint(__fadd_rn(__uint_as_float(rest), 0.5f)) - 0x3f000000));
  }
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif

}  // namespace rqk::ptx
