// One vector of floats for whichever instruction set this file is compiled for. For cpu_simd.cpp files alone: they
// are compiled once per level, so they include nothing of the standard library that has inline functions (the linker
// would keep one level's copy of those for all).
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace rqk {
namespace RQK_CAPABILITY {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kSize = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec fill(float a) { return {_mm512_set1_ps(a)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline bool any_at_most(Vec a, float limit) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_LE_OQ) != 0; }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kSize = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec fill(float a) { return {_mm256_set1_ps(a)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline bool any_at_most(Vec a, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_LE_OQ)) != 0;
}

#else

// GCC's and Clang's generic vectors: SSE2 on x86-64, NEON on aarch64.
struct Vec {
  static constexpr int kSize = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes v;
  static Vec zero() { return {Lanes{0, 0, 0, 0}}; }
  static Vec load(const float* p) {
    Lanes v;
    __builtin_memcpy(&v, p, sizeof v);
    return {v};
  }
  static Vec fill(float a) { return {Lanes{a, a, a, a}}; }
  void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline bool any_at_most(Vec a, float limit) {
  return a.v[0] <= limit || a.v[1] <= limit || a.v[2] <= limit || a.v[3] <= limit;
}

#endif

}  // namespace RQK_CAPABILITY
}  // namespace rqk
