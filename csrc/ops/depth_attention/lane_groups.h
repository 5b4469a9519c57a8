// A vector as groups of four lanes: a tile of kSize / 4 queries by 4 keys.
#pragma once

#include "common/simd.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kGroups = Vec::kSize / 4;

inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }

#if defined(__AVX512F__)

template <int kOrder>
inline Vec permute_groups(Vec a) {
  return {_mm512_permute_ps(a.v, kOrder)};
}
// a where key <= limit, else b, lane by lane.
inline Vec select_le(Vec key, Vec limit, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(key.v, limit.v, _CMP_LE_OQ), b.v, a.v)};
}
inline void store_groups(Vec a, float* rows, int64_t stride) {
  _mm_storeu_ps(rows, _mm512_castps512_ps128(a.v));
  _mm_storeu_ps(rows + stride, _mm512_extractf32x4_ps(a.v, 1));
  _mm_storeu_ps(rows + 2 * stride, _mm512_extractf32x4_ps(a.v, 2));
  _mm_storeu_ps(rows + 3 * stride, _mm512_extractf32x4_ps(a.v, 3));
}
// Lane j of each 128-bit part: the sum of that part of a[j].
inline __m512 sum_parts(const Vec* a) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
// Lane j: the sum of all lanes of a[j].
inline Vec reduce_add_each(const Vec (&a)[Vec::kSize]) {
  const __m512 r0 = sum_parts(a), r1 = sum_parts(a + 4), r2 = sum_parts(a + 8), r3 = sum_parts(a + 12);
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(r0, r1, 0x44), _mm512_shuffle_f32x4(r0, r1, 0xee));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(r2, r3, 0x44), _mm512_shuffle_f32x4(r2, r3, 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}

#elif defined(__AVX2__)

template <int kOrder>
inline Vec permute_groups(Vec a) {
  return {_mm256_permute_ps(a.v, kOrder)};
}
inline Vec select_le(Vec key, Vec limit, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(key.v, limit.v, _CMP_LE_OQ))};
}
inline void store_groups(Vec a, float* rows, int64_t stride) {
  _mm_storeu_ps(rows, _mm256_castps256_ps128(a.v));
  _mm_storeu_ps(rows + stride, _mm256_extractf128_ps(a.v, 1));
}
inline __m256 sum_parts(const Vec* a) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
inline Vec reduce_add_each(const Vec (&a)[Vec::kSize]) {
  const __m256 r0 = sum_parts(a), r1 = sum_parts(a + 4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(r0, r1, 0x20), _mm256_permute2f128_ps(r0, r1, 0x31))};
}

#else

template <int kOrder>
inline Vec permute_groups(Vec a) {
  return {Vec::Lanes{a.v[kOrder & 3], a.v[kOrder >> 2 & 3], a.v[kOrder >> 4 & 3], a.v[kOrder >> 6 & 3]}};
}
inline Vec select_le(Vec key, Vec limit, Vec a, Vec b) {
  for (int j = 0; j < Vec::kSize; ++j) b.v[j] = key.v[j] <= limit.v[j] ? a.v[j] : b.v[j];
  return b;
}
inline void store_groups(Vec a, float* rows, int64_t) { a.store(rows); }
inline Vec reduce_add_each(const Vec (&a)[Vec::kSize]) {
  Vec all;
  for (int j = 0; j < Vec::kSize; ++j) all.v[j] = (a[j].v[0] + a[j].v[2]) + (a[j].v[1] + a[j].v[3]);
  return all;
}

#endif

inline Vec reduce_max_groups(Vec a) {
  a = max(a, permute_groups<0xb1>(a));
  return max(a, permute_groups<0x4e>(a));
}
inline Vec reduce_add_groups(Vec a) {
  a = a + permute_groups<0xb1>(a);
  return a + permute_groups<0x4e>(a);
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
