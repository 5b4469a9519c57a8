// A vector of floats for the instruction set that this file is compiled for. For cpu_simd.cpp files only: they are
// compiled once per level, so they must not include standard headers with inline functions (the linker would keep one
// level's copy for all).
#pragma once

#include <cstdint>

#if defined(__SSE2__)
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
  // The first n floats, 0 < n < kSize; the other lanes are loaded as zeros.
  static Vec load_partial(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store_partial(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
};
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec negated_fma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float reduce_min(Vec a) { return _mm512_reduce_min_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Bit j: a[j] <= limit[j]; false where either is NaN.
inline uint32_t cmp_le_mask(Vec a, Vec limit) { return _mm512_cmp_ps_mask(a.v, limit.v, _CMP_LE_OQ); }

struct VecInt {
  __m512i v;
  static VecInt zero() { return {_mm512_setzero_si512()}; }
  static VecInt fill(int32_t a) { return {_mm512_set1_epi32(a)}; }
};
inline VecInt operator+(VecInt a, VecInt b) { return {_mm512_add_epi32(a.v, b.v)}; }
#if defined(__AVX512VNNI__)
// sum += the four products of each lane, unsigned bytes times signed bytes. In assembly, because GCC 12 spills the sums
// of its intrinsic to memory, at half the speed.
inline void multiply_add(VecInt& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(bytes), "v"(signed_bytes));
}
#endif
inline Vec rounded(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a 2^n for an integral n; results below the normal range become zero.
inline Vec times_power_of_two(Vec a, Vec n) {
  const __mmask16 normal = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, a.v, n.v)};
}
inline VecInt nearest_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Vec to_float(VecInt a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline int32_t reduce_add(VecInt a) { return _mm512_reduce_add_epi32(a.v); }
inline void store_bytes(VecInt a, uint8_t* bytes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(a.v));
}

// Non-temporal store; see stream_fence().
inline void stream(Vec a, float* p) { _mm512_stream_ps(p, a.v); }
inline Vec load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_float16(Vec a, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_bfloat16(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
inline void store_bfloat16(Vec a, uint16_t* p) {
  const __m512i bits = _mm512_castps_si512(a.v), top = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_and_si512(top, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(nearest, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
// rows[j * stride .. + 4) = a[j], b[j], c[j], d[j].
inline void store_columns(Vec a, Vec b, Vec c, Vec d, float* rows, int64_t stride) {
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v)),
                ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v)),
                cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c.v, d.v)),
                cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c.v, d.v));
  const __m512 fours[4] = {
      _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)),
      _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high))};
  for (int j = 0; j < 4; ++j) {
    _mm_storeu_ps(rows + j * stride, _mm512_castps512_ps128(fours[j]));
    _mm_storeu_ps(rows + (j + 4) * stride, _mm512_extractf32x4_ps(fours[j], 1));
    _mm_storeu_ps(rows + (j + 8) * stride, _mm512_extractf32x4_ps(fours[j], 2));
    _mm_storeu_ps(rows + (j + 12) * stride, _mm512_extractf32x4_ps(fours[j], 3));
  }
}

// Accumulates squares of floats in float64.
struct SquareSum {
  __m512d sum = _mm512_setzero_pd();
  void add(Vec a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
    sum = _mm512_fmadd_pd(low, low, sum);
    sum = _mm512_fmadd_pd(high, high, sum);
  }
  double total() const { return _mm512_reduce_add_pd(sum); }
};

// Eight float64 lanes.
struct Lanes8 {
  __m512d v;
  static Lanes8 zero() { return {_mm512_setzero_pd()}; }
  static Lanes8 load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static Lanes8 load_partial(const float* p, int64_t n) {
    return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(__mmask8((1u << n) - 1), p))};
  }
  static Lanes8 fill(double a) { return {_mm512_set1_pd(a)}; }
  static Lanes8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  // Adds lane j and lane j + 4, and so on: the fixed summation order.
  double sum() const {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};
inline Lanes8 operator+(Lanes8 a, Lanes8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Lanes8 operator-(Lanes8 a, Lanes8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Lanes8 operator*(Lanes8 a, Lanes8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline Lanes8 max(Lanes8 a, Lanes8 b) { return {_mm512_max_pd(a.v, b.v)}; }
// Fused if the instruction set has it.
inline Lanes8 fma(Lanes8 a, Lanes8 b, Lanes8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// a[j] where bit j is set, else zero.
inline Lanes8 keep(Lanes8 a, uint32_t bits) { return {_mm512_maskz_mov_pd(__mmask8(bits), a.v)}; }
inline Vec keep(Vec a, uint32_t bits) { return {_mm512_maskz_mov_ps(__mmask16(bits), a.v)}; }
// Moves the lowest bits of a (nine of a float, twelve of a float64) into the place of sign and exponent.
inline Vec low_bits_as_exponent(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
inline Lanes8 low_bits_as_exponent(Lanes8 a) {
  return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a.v), 52))};
}

// Stores the lanes whose bits are set next to each other; may overwrite a whole vector from p on.
inline void compress(Vec a, uint32_t bits, float* p) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(bits), a.v));
}
inline void compress(Lanes8 a, uint32_t bits, double* p) {
  _mm512_storeu_pd(p, _mm512_maskz_compress_pd(__mmask8(bits), a.v));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kSize = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec fill(float a) { return {_mm256_set1_ps(a)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  // The first n floats, 0 < n < kSize; the other lanes are loaded as zeros.
  static Vec load_partial(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  void store_partial(float* p, int64_t n) const { _mm256_maskstore_ps(p, first(n), v); }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec negated_fma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float reduce_min(Vec a) {
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(Vec a) { return -reduce_min(Vec::zero() - a); }
// Bit j: a[j] <= limit[j]; false where either is NaN.
inline uint32_t cmp_le_mask(Vec a, Vec limit) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, limit.v, _CMP_LE_OQ)));
}

struct VecInt {
  __m256i v;
  static VecInt zero() { return {_mm256_setzero_si256()}; }
  static VecInt fill(int32_t a) { return {_mm256_set1_epi32(a)}; }
};
inline VecInt operator+(VecInt a, VecInt b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Vec rounded(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a 2^n for an integral n <= 127; results below the normal range become zero.
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  const __m256 normal = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126), _CMP_NLT_UQ);
  return {_mm256_and_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(power)), normal)};
}
inline VecInt nearest_int(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
inline Vec to_float(VecInt a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline int32_t reduce_add(VecInt a) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
inline void store_bytes(VecInt a, uint8_t* bytes) {
  const __m128i low = _mm_set1_epi32(0xff);
  const __m128i words = _mm_packus_epi32(_mm_and_si128(_mm256_castsi256_si128(a.v), low),
                                         _mm_and_si128(_mm256_extracti128_si256(a.v, 1), low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(words, words));
}

// Non-temporal store; see stream_fence().
inline void stream(Vec a, float* p) { _mm256_stream_ps(p, a.v); }
inline Vec load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_float16(Vec a, uint16_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_bfloat16(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}
inline void store_bfloat16(Vec a, uint16_t* p) {
  const __m256i bits = _mm256_castps_si256(a.v), top = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(top, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
}
// rows[j * stride .. + 4) = a[j], b[j], c[j], d[j].
inline void store_columns(Vec a, Vec b, Vec c, Vec d, float* rows, int64_t stride) {
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v)),
                ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v)),
                cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c.v, d.v)),
                cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c.v, d.v));
  const __m256 fours[4] = {
      _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)),
      _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high))};
  for (int j = 0; j < 4; ++j) {
    _mm_storeu_ps(rows + j * stride, _mm256_castps256_ps128(fours[j]));
    _mm_storeu_ps(rows + (j + 4) * stride, _mm256_extractf128_ps(fours[j], 1));
  }
}

// Accumulates squares of floats in float64.
struct SquareSum {
  __m256d sum = _mm256_setzero_pd();
  void add(Vec a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
    sum = _mm256_fmadd_pd(low, low, sum);
    sum = _mm256_fmadd_pd(high, high, sum);
  }
  double total() const {
    double lanes[4];
    _mm256_storeu_pd(lanes, sum);
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
};

// Eight float64 lanes.
struct Lanes8 {
  __m256d low, high;
  static Lanes8 zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Lanes8 of(Vec a) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
  }
  static Lanes8 load(const float* p) { return of(Vec::load(p)); }
  static Lanes8 load_partial(const float* p, int64_t n) { return of(Vec::load_partial(p, n)); }
  static Lanes8 fill(double a) { return {_mm256_set1_pd(a), _mm256_set1_pd(a)}; }
  static Lanes8 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  void store(double* p) const {
    _mm256_storeu_pd(p, low);
    _mm256_storeu_pd(p + 4, high);
  }
  // Adds lane j and lane j + 4, and so on: the fixed summation order.
  double sum() const {
    const __m256d four = _mm256_add_pd(low, high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};
inline Lanes8 operator+(Lanes8 a, Lanes8 b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
inline Lanes8 operator-(Lanes8 a, Lanes8 b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
inline Lanes8 operator*(Lanes8 a, Lanes8 b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
inline Lanes8 max(Lanes8 a, Lanes8 b) { return {_mm256_max_pd(a.low, b.low), _mm256_max_pd(a.high, b.high)}; }
// Fused if the instruction set has it.
inline Lanes8 fma(Lanes8 a, Lanes8 b, Lanes8 c) {
  return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
// a[j] where bit j is set, else zero.
inline Lanes8 keep(Lanes8 a, uint32_t bits) {
  const __m256i all = _mm256_set1_epi64x(bits);
  const __m256i first = _mm256_setr_epi64x(1, 2, 4, 8), second = _mm256_setr_epi64x(16, 32, 64, 128);
  const __m256i low = _mm256_cmpeq_epi64(_mm256_and_si256(all, first), first);
  const __m256i high = _mm256_cmpeq_epi64(_mm256_and_si256(all, second), second);
  return {_mm256_and_pd(a.low, _mm256_castsi256_pd(low)), _mm256_and_pd(a.high, _mm256_castsi256_pd(high))};
}
inline Vec keep(Vec a, uint32_t bits) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lanes), lanes);
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(kept))};
}
// Moves the lowest bits of a (nine of a float, twelve of a float64) into the place of sign and exponent.
inline Vec low_bits_as_exponent(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
inline Lanes8 low_bits_as_exponent(Lanes8 a) {
  return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.low), 52)),
          _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.high), 52))};
}

// For each mask, the positions of its set bits.
struct BitPlaces {
  uint8_t at[256][8] = {};
  constexpr BitPlaces() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int j = 0, n = 0; j < 8; ++j) {
        if ((bits >> j & 1) != 0) at[bits][n++] = uint8_t(j);
      }
    }
  }
};
constexpr BitPlaces kBitPlaces;
inline __m256 compressed(__m256 a, uint32_t bits) {
  const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitPlaces.at[bits]));
  return _mm256_permutevar8x32_ps(a, _mm256_cvtepu8_epi32(places));
}

// Stores the lanes whose bits are set next to each other; may overwrite a whole vector from p on.
inline void compress(Vec a, uint32_t bits, float* p) { _mm256_storeu_ps(p, compressed(a.v, bits)); }
inline void compress(Lanes8 a, uint32_t bits, double* p) {
  // Each bit doubled, for the two 32-bit halves of a float64.
  constexpr uint8_t kTwice[16] = {0,   3,   12,  15,  48,  51,  60,  63,  //
                                  192, 195, 204, 207, 240, 243, 252, 255};
  const __m256 low = compressed(_mm256_castpd_ps(a.low), kTwice[bits & 15]);
  const __m256 high = compressed(_mm256_castpd_ps(a.high), kTwice[bits >> 4]);
  _mm256_storeu_pd(p, _mm256_castps_pd(low));
  _mm256_storeu_pd(p + __builtin_popcount(bits & 15), _mm256_castps_pd(high));
}

#else

// Generic vectors of GCC and Clang: SSE2 on x86-64, NEON on aarch64.
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
  // The first n floats, 0 < n < kSize; the other lanes are loaded as zeros.
  static Vec load_partial(const float* p, int64_t n) { return {Lanes{p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0}}; }
  void store_partial(float* p, int64_t n) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
// Bit j: a[j] <= limit[j]; false where either is NaN.
inline uint32_t cmp_le_mask(Vec a, Vec limit) {
#if defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(_mm_cmple_ps((__m128)a.v, (__m128)limit.v)));
#else
  uint32_t mask = 0;
  for (int j = 0; j < Vec::kSize; ++j) mask |= uint32_t(a.v[j] <= limit.v[j]) << j;
  return mask;
#endif
}

inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline float reduce_min(Vec a) {
  const float x = a.v[0] < a.v[1] ? a.v[0] : a.v[1], y = a.v[2] < a.v[3] ? a.v[2] : a.v[3];
  return x < y ? x : y;
}
inline float reduce_max(Vec a) { return -reduce_min(Vec::zero() - a); }
inline Vec rounded(Vec a) {
  for (int j = 0; j < Vec::kSize; ++j) a.v[j] = __builtin_rintf(a.v[j]);
  return a;
}
// a 2^n for an integral n <= 127; results below the normal range become zero.
inline Vec times_power_of_two(Vec a, Vec n) {
  for (int j = 0; j < Vec::kSize; ++j) {
    if (n.v[j] < -126) {
      a.v[j] = 0;
    } else if (n.v[j] == n.v[j]) {
      const int32_t power = (int32_t(n.v[j]) + 127) << 23;
      float factor;
      __builtin_memcpy(&factor, &power, sizeof factor);
      a.v[j] *= factor;
    }
  }
  return a;
}

// Non-temporal store where the instruction set has one; see stream_fence().
inline void stream(Vec a, float* p) {
#if defined(__SSE2__)
  _mm_stream_ps(p, (__m128)a.v);
#else
  a.store(p);
#endif
}
inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline Vec load_bfloat16(const uint16_t* p) {
  Vec a;
  for (int j = 0; j < Vec::kSize; ++j) a.v[j] = bits_to_float(uint32_t(p[j]) << 16);
  return a;
}
inline void store_bfloat16(Vec a, uint16_t* p) {
  for (int j = 0; j < Vec::kSize; ++j) {
    const uint32_t bits = float_to_bits(a.v[j]);
    p[j] = a.v[j] != a.v[j] ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
inline Vec load_float16(const uint16_t* p) {
  Vec a;
  for (int j = 0; j < Vec::kSize; ++j) {
    const uint32_t sign = uint32_t(p[j] & 0x8000) << 16, rest = p[j] & 0x7fff;
    // Below the normal range a multiple of 2^-24; infinity and NaN keep the largest exponent.
    const float size = rest < 0x400    ? float(rest) * 0x1p-24f
                       : rest < 0x7c00 ? bits_to_float((rest << 13) + (112u << 23))
                                       : bits_to_float((rest << 13) + (224u << 23));
    a.v[j] = bits_to_float(float_to_bits(size) | sign);
  }
  return a;
}
inline void store_float16(Vec a, uint16_t* p) {
  for (int j = 0; j < Vec::kSize; ++j) {
    const uint32_t all = float_to_bits(a.v[j]), sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
      half = 0x7e00;
    } else if (bits >= 0x477ff000) {  // 65520, the smallest value that rounds to infinity
      half = 0x7c00;
    } else if (bits >= 0x38800000) {  // 2^-14
      half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    } else {
      half = uint32_t(int32_t(__builtin_rintf(bits_to_float(bits) * 0x1p24f)));
    }
    p[j] = uint16_t(sign | half);
  }
}
// rows[j * stride .. + 4) = a[j], b[j], c[j], d[j].
inline void store_columns(Vec a, Vec b, Vec c, Vec d, float* rows, int64_t stride) {
  for (int j = 0; j < Vec::kSize; ++j) Vec{Vec::Lanes{a.v[j], b.v[j], c.v[j], d.v[j]}}.store(rows + j * stride);
}

// Eight float64 lanes.
struct Lanes8 {
  double v[8];
  static Lanes8 zero() { return {}; }
  static Lanes8 fill(double a) { return {{a, a, a, a, a, a, a, a}}; }
  static Lanes8 load(const double* p) {
    Lanes8 lanes;
    __builtin_memcpy(lanes.v, p, sizeof lanes.v);
    return lanes;
  }
  void store(double* p) const { __builtin_memcpy(p, v, sizeof v); }
  static Lanes8 load(const float* p) { return load_partial(p, 8); }
  static Lanes8 load_partial(const float* p, int64_t n) {
    Lanes8 lanes{};
    for (int64_t j = 0; j < n; ++j) lanes.v[j] = double(p[j]);
    return lanes;
  }
  // Adds lane j and lane j + 4, and so on: the fixed summation order.
  double sum() const {
    const double four[4] = {v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]};
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};
#define RQK_LANES8(op)                                     \
  inline Lanes8 operator op(Lanes8 a, Lanes8 b) {          \
    for (int j = 0; j < 8; ++j) a.v[j] = a.v[j] op b.v[j]; \
    return a;                                              \
  }
RQK_LANES8(+)
RQK_LANES8(-)
RQK_LANES8(*)
#undef RQK_LANES8
inline Lanes8 max(Lanes8 a, Lanes8 b) {
  for (int j = 0; j < 8; ++j) a.v[j] = a.v[j] > b.v[j] ? a.v[j] : b.v[j];
  return a;
}
// Fused if the instruction set has it.
inline Lanes8 fma(Lanes8 a, Lanes8 b, Lanes8 c) { return a * b + c; }
// a[j] where bit j is set, else zero.
inline Lanes8 keep(Lanes8 a, uint32_t bits) {
  uint64_t lanes[8];
  __builtin_memcpy(lanes, a.v, sizeof lanes);
  for (int j = 0; j < 8; ++j) lanes[j] &= -uint64_t(bits >> j & 1);  // branch-free: the bits are unpredictable
  __builtin_memcpy(a.v, lanes, sizeof lanes);
  return a;
}
typedef int32_t IntLanes __attribute__((vector_size(16)));
inline Vec keep(Vec a, uint32_t bits) {
  const IntLanes lanes = {1, 2, 4, 8}, all = IntLanes{} + int32_t(bits);
  return {(Vec::Lanes)((IntLanes)a.v & ((all & lanes) == lanes))};
}
// Moves the lowest bits of a (nine of a float, twelve of a float64) into the place of sign and exponent.
inline Vec low_bits_as_exponent(Vec a) { return {(Vec::Lanes)((IntLanes)a.v << 23)}; }
inline Lanes8 low_bits_as_exponent(Lanes8 a) {
  uint64_t bits[8];
  __builtin_memcpy(bits, a.v, sizeof bits);
  for (int j = 0; j < 8; ++j) bits[j] <<= 52;
  __builtin_memcpy(a.v, bits, sizeof bits);
  return a;
}

// Stores the lanes whose bits are set next to each other; may overwrite a whole vector from p on.
template <class Lanes, class T>
inline void compress(Lanes a, uint32_t bits, T* p) {
  T lanes[sizeof(Lanes) / sizeof(T)];
  a.store(lanes);
  for (; bits != 0; bits &= bits - 1) *p++ = lanes[__builtin_ctz(bits)];
}

#endif

// Conversion of each dtype to vectors of float, and back.
struct Float32 {
  using T = float;
  static constexpr bool kStreams = true;
  static Vec load(const T* p) { return Vec::load(p); }
  static void store(Vec a, T* p) { a.store(p); }
};
struct Float16 {
  using T = uint16_t;
  static constexpr bool kStreams = false;
  static Vec load(const T* p) { return load_float16(p); }
  static void store(Vec a, T* p) { store_float16(a, p); }
};
struct BFloat16 {
  using T = uint16_t;
  static constexpr bool kStreams = false;
  static Vec load(const T* p) { return load_bfloat16(p); }
  static void store(Vec a, T* p) { store_bfloat16(a, p); }
};

// Loads the first n elements, n < kSize; the other lanes get `rest`.
template <class F>
inline Vec load_partial(const typename F::T* p, int64_t n, float rest) {
  typename F::T raw[Vec::kSize] = {};
  float values[Vec::kSize];
  __builtin_memcpy(raw, p, size_t(n) * sizeof(*p));
  F::load(raw).store(values);
  for (int64_t j = n; j < Vec::kSize; ++j) values[j] = rest;
  return Vec::load(values);
}

template <class F>
inline void store_partial(Vec a, typename F::T* p, int64_t n) {
  typename F::T raw[Vec::kSize];
  F::store(a, raw);
  __builtin_memcpy(p, raw, size_t(n) * sizeof(*p));
}

// Polynomial for e^r, |r| <= ln 2 / 2, with the least relative error for its degree: below 2e-8.
constexpr float kExpSeries[] = {
    1.38367701e-3f, 8.37485678e-3f, 4.16682288e-2f, 1.66664198e-1f, 4.99999911e-1f, 1.0f, 1.0f};

// e^x for x <= 88, off by less than 2 units in the last place; zero below -87.3, NaN for NaN. Bound B16
// (docs/bounds.md).
inline Vec exp(Vec x) {
  const Vec n = rounded(x * Vec::fill(1.44269504f));
  Vec r = fma(n, Vec::fill(-0.693359375f), x);
  r = fma(n, Vec::fill(2.12194440e-4f), r);
  Vec series = Vec::fill(kExpSeries[0]);
  for (int i = 1; i < 7; ++i) series = fma(series, r, Vec::fill(kExpSeries[i]));
  return times_power_of_two(series, n);  // far below, where r has no digits left, the factor is zero anyway
}

constexpr double kExpSeries64[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                                   1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};

// e^x for x <= 709, with a relative error of at most 7e-15 + |x| 2^-52; zero below -709. Bound B16. n is computed by
// rounding at 2^52, where floats are integers; with 1023 added, its low bits are the exponent of 2^n (zero for -1023).
inline Lanes8 exp(Lanes8 x) {
  constexpr double kInteger = 0x1.8p52 + 1023;
  x = max(x, Lanes8::fill(-1023 * 0.6931471805599453));
  const Lanes8 shifted = fma(x, Lanes8::fill(1.4426950408889634), Lanes8::fill(kInteger));
  const Lanes8 r = fma(shifted - Lanes8::fill(kInteger), Lanes8::fill(-0.6931471805599453), x);
  Lanes8 series = Lanes8::fill(1.0 / 39916800);
  for (const double factor : kExpSeries64) series = fma(series, r, Lanes8::fill(factor));
  return series * low_bits_as_exponent(shifted);
}

// Orders all earlier stream() calls before what follows; call it before another thread may read the data. Addresses
// passed to stream() must be aligned to the vector.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace RQK_CAPABILITY
}  // namespace rqk
