// Products of a few rows with panels of packed weights. For cpu_simd.cpp.
//
// A panel's weights are read in storage order, once for each group of rows, whose sums stay in registers. With one
// group a product runs at memory speed; with more, the panel stays in cache. Each output of a row is summed in the
// order of the inputs, independently of the other rows. The int8 products are exact integers: bound B15
// (docs/bounds.md).
#pragma once

#include "common/simd.h"
#include "ops/depth_decode/kernel_table.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// A panel is computed in strips of two vectors: outputs strip * Vec::kSize + lane, and the same + 16.
constexpr int64_t kStrips = kOutputPanel / 2 / Vec::kSize;
#if defined(__AVX512F__)
constexpr int kFloatRows = 12, kByteRows = 6;  // 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kFloatRows = 6, kByteRows = 2;  // 12 and 8 of 16
#else
constexpr int kFloatRows = 6, kByteRows = 2;
#endif
constexpr int64_t kBlock = 128;   // inputs per partial sum: a single sum over thousands of inputs would accumulate more
                                  // rounding error
constexpr int64_t kAhead = 4096;  // prefetch distance in bytes for a single group

// Prefetches weights during the multiplication. A single group of rows prefetches ahead in its panel; with more, each
// group prefetches its share of the next panel, so that memory and arithmetic overlap.
struct Fetcher {
  const uint8_t* at;
  int64_t step;

  Fetcher(const LinearTask& task, const uint8_t* panel, int64_t panel_bytes, int64_t bytes, int64_t begin) {
    const int64_t groups = task.rows->groups;
    step = (bytes + groups - 1) / groups;
    at = groups == 1 ? panel + kAhead : panel + panel_bytes + begin * panel_bytes / task.rows->rows;
  }
  void next() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 64, 0, 2);
    at += step;
  }
};

template <int kRows>
using Products = Vec[kRows][2];

struct FloatWeights {
  static constexpr int kMostRows = kFloatRows;
  static constexpr int64_t kBytes = 4;
  static void load(const uint8_t* inputs_weights, int64_t strip, Vec (&w)[2]) {
    const float* values = reinterpret_cast<const float*>(inputs_weights) + strip * Vec::kSize;
    w[0] = Vec::load(values);
    w[1] = Vec::load(values + 16);
  }
};

struct BFloatWeights {
  static constexpr int kMostRows = kFloatRows;
  static constexpr int64_t kBytes = 2;
  // Two weights per word: the lower half belongs to the first vector.
  static void load(const uint8_t* inputs_weights, int64_t strip, Vec (&w)[2]) {
    const uint8_t* words = inputs_weights + strip * Vec::kSize * 4;
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_loadu_si512(words);
    w[0].v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    w[1].v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    w[0].v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    w[1].v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
#else
    for (int j = 0; j < Vec::kSize; ++j) {
      uint32_t pair;
      __builtin_memcpy(&pair, words + 4 * j, sizeof pair);
      w[0].v[j] = bits_to_float(pair << 16);
      w[1].v[j] = bits_to_float(pair & 0xffff0000);
    }
#endif
  }
};

// Multiplies one strip of a panel with one group of kRows rows.
template <class Weights, int kRows>
[[gnu::always_inline]] inline void products(const LinearTask& task, int64_t panel, int64_t strip, int64_t begin,
                                            Products<kRows>& dot) {
  const RowGroups& rows = *task.rows;
  const float* x = reinterpret_cast<const float*>(rows.values) + begin * rows.inputs;
  const uint8_t* weights = task.layer.weights + panel * rows.inputs * kOutputPanel * Weights::kBytes;
  Fetcher fetcher(task, weights, rows.inputs * kOutputPanel * Weights::kBytes, kOutputPanel * Weights::kBytes, begin);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) dot[i][0] = dot[i][1] = Vec::zero();
  for (int64_t done = 0; done < rows.inputs; done += kBlock) {
    Vec part[kRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) part[i][0] = part[i][1] = Vec::zero();
    const int64_t left = rows.inputs - done;
    for (int64_t c = 0; c < (left < kBlock ? left : kBlock); ++c) {
      fetcher.next();
      Vec w[2];
      Weights::load(weights, strip, w);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec value = Vec::fill(x[i]);
        part[i][0] = fma(value, w[0], part[i][0]);
        part[i][1] = fma(value, w[1], part[i][1]);
      }
      weights += kOutputPanel * Weights::kBytes;
      x += kRows;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      dot[i][0] = dot[i][0] + part[i][0];
      dot[i][1] = dot[i][1] + part[i][1];
    }
  }
}

struct ByteWeights {
  static constexpr int kMostRows = kByteRows;
};

#if defined(__AVX512F__)
// Four bytes in every lane. Loaded from memory: a broadcast from a register would occupy one of the two multiply ports.
inline __m512i broadcast(const uint8_t* four) {
  __m512i lanes;
  asm("vpbroadcastd %1, %0" : "=v"(lanes) : "m"(*reinterpret_cast<const uint8_t (*)[4]>(four)));
  return lanes;
}
#endif

template <int kRows>
[[gnu::always_inline]] inline void byte_products(const LinearTask& task, int64_t panel, int64_t strip, int64_t begin,
                                                 Products<kRows>& dot) {
  const RowGroups& rows = *task.rows;
  const uint8_t* x = rows.values + begin * rows.inputs * 2;
  const uint8_t* weights = task.layer.weights + panel * rows.inputs * kOutputPanel + strip * Vec::kSize * 4;
  const int32_t* sums = rows.sums + begin * 2;
  const float* scales = task.layer.scales + panel * kOutputPanel + strip * Vec::kSize;
  auto scaled = [&](int i, int v, Vec high, Vec low) {
    const Vec sum = fma(high, Vec::fill(256.0f), low);  // 256 times a float is exact, so fusing changes nothing
    return (sum * Vec::load(scales + 16 * v)) * Vec::fill(rows.scales[begin + i]);
  };
  Fetcher fetcher(task, weights, rows.inputs * kOutputPanel, 4 * kOutputPanel, begin);
#if defined(__AVX512F__)
  // Sums start at -128 times those of the inputs, because weights are stored plus 128.
  VecInt high[kRows][2], low[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    high[i][0] = high[i][1] = VecInt::fill(-128 * sums[2 * i]);
    low[i][0] = low[i][1] = VecInt::fill(-128 * sums[2 * i + 1]);
  }
  for (int64_t c = 0; c < rows.inputs; c += 4) {
    fetcher.next();
    const __m512i w0 = _mm512_loadu_si512(weights), w1 = _mm512_loadu_si512(weights + 64);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512i h = broadcast(x + 8 * i), l = broadcast(x + 8 * i + 4);
      multiply_add(high[i][0], w0, h);
      multiply_add(high[i][1], w1, h);
      multiply_add(low[i][0], w0, l);
      multiply_add(low[i][1], w1, l);
    }
    weights += 4 * kOutputPanel;
    x += 8 * kRows;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      dot[i][v] = scaled(i, v, to_float(high[i][v]), to_float(low[i][v]));
    }
  }
#elif defined(__AVX2__)
  VecInt high[kRows][2], low[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    high[i][0] = high[i][1] = VecInt::fill(-128 * sums[2 * i]);
    low[i][0] = low[i][1] = VecInt::fill(-128 * sums[2 * i + 1]);
  }
  // Bytes 0 and 2 of a lane, and 1 and 3, as 16-bit words: pairs of products of 255 * 128 do not saturate in 32 bits.
  const __m256i first = _mm256_set1_epi16(0xff);
  for (int64_t c = 0; c < rows.inputs; c += 4) {
    fetcher.next();
    __m256i even[2], odd[2];
    for (int v = 0; v < 2; ++v) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 64 * v));
      even[v] = _mm256_and_si256(w, first);
      odd[v] = _mm256_srli_epi16(w, 8);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int part = 0; part < 2; ++part) {
        int32_t bits;
        __builtin_memcpy(&bits, x + 8 * i + 4 * part, 4);
        const __m256i a = _mm256_set1_epi32(bits);
        const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
        for (int v = 0; v < 2; ++v) {
          VecInt& sum = part == 0 ? high[i][v] : low[i][v];
          sum = sum + VecInt{_mm256_add_epi32(_mm256_madd_epi16(even[v], a_even), _mm256_madd_epi16(odd[v], a_odd))};
        }
      }
    }
    weights += 4 * kOutputPanel;
    x += 8 * kRows;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      dot[i][v] = scaled(i, v, to_float(high[i][v]), to_float(low[i][v]));
    }
  }
#else
  int32_t high[kRows][2][Vec::kSize], low[kRows][2][Vec::kSize];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      for (int j = 0; j < Vec::kSize; ++j) high[i][v][j] = -128 * sums[2 * i], low[i][v][j] = -128 * sums[2 * i + 1];
    }
  }
  for (int64_t c = 0; c < rows.inputs; c += 4) {
    fetcher.next();
    for (int i = 0; i < kRows; ++i) {
      const int8_t* a = reinterpret_cast<const int8_t*>(x + 8 * i);
      for (int v = 0; v < 2; ++v) {
        for (int j = 0; j < Vec::kSize; ++j) {
          const uint8_t* w = weights + 64 * v + 4 * j;
          for (int b = 0; b < 4; ++b) {
            high[i][v][j] += int32_t(w[b]) * a[b];
            low[i][v][j] += int32_t(w[b]) * a[4 + b];
          }
        }
      }
    }
    weights += 4 * kOutputPanel;
    x += 8 * kRows;
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      Vec h, l;
      for (int j = 0; j < Vec::kSize; ++j) h.v[j] = float(high[i][v][j]), l.v[j] = float(low[i][v][j]);
      dot[i][v] = scaled(i, v, h, l);
    }
  }
#endif
}

inline Vec divided(Vec a, Vec b) { return {a.v / b.v}; }

// 1/2 erfc(x / sqrt 2) = t P(t) e^(-x^2/2) with t = 1 / (1 + 0.3 x / sqrt 2), x >= 0. P has a relative error of 2e-8,
// in float32 about 2e-7.
constexpr float kTail[] = {0.48478910f, -0.51053262f, 0.54551899f, -0.09295557f,
                           0.21411078f, 0.14857794f,  0.17067635f, 0.16919069f};

// x (1 + erf(x / sqrt 2)) / 2, with an error of about 2e-7 |x|.
inline Vec gelu(Vec x) {
  const Vec zero = Vec::zero(), size = max(zero - x, x);
  const Vec t = divided(Vec::fill(1.0f), fma(size, Vec::fill(0.21213203f), Vec::fill(1.0f)));
  Vec series = Vec::fill(-0.12937570f);
  for (const float factor : kTail) series = fma(series, t, Vec::fill(factor));
  const Vec tail = (Vec::fill(0.5f) * t) * (series * exp(size * size * Vec::fill(-0.5f)));
  return max(zero, x) - size * tail;
}

// x sigmoid(1.702 x).
inline Vec quick_gelu(Vec x) {
  return divided(x, Vec::fill(1.0f) + exp(min(Vec::fill(88.0f), x * Vec::fill(-1.702f))));
}

// Compiled once, not for every number of rows.
[[gnu::noinline]] inline void finish(Vec value, Epilogue epilogue, float* out) {
  if (epilogue == Epilogue::kAdd) value = Vec::load(out) + value;
  if (epilogue == Epilogue::kGelu) value = gelu(value);
  if (epilogue == Epilogue::kQuickGelu) value = quick_gelu(value);
  value.store(out);
}

template <class Weights, int kRows>
inline void multiply_group(const LinearTask& task, int64_t panel, int64_t begin) {
  for (int64_t strip = 0; strip < kStrips; ++strip) {
    Products<kRows> dot;
    if constexpr (Weights::kMostRows == kByteRows) {
      byte_products<kRows>(task, panel, strip, begin, dot);
    } else {
      products<Weights, kRows>(task, panel, strip, begin, dot);
    }
    const int64_t first = panel * kOutputPanel + strip * Vec::kSize;
    for (int v = 0; v < 2; ++v) {
      const Vec bias = Vec::load(task.layer.bias + first + 16 * v);
      for (int i = 0; i < kRows; ++i) {
        finish(dot[i][v] + bias, task.epilogue, task.out + (begin + i) * task.stride + first + 16 * v);
      }
    }
  }
}

// Calls the instance compiled for this number of rows.
template <class Weights, int kRows = Weights::kMostRows>
inline void multiply_rows(const LinearTask& task, int64_t panel, int64_t begin, int64_t count) {
  if constexpr (kRows > 0) {
    if (count == kRows) return multiply_group<Weights, kRows>(task, panel, begin);
    multiply_rows<Weights, kRows - 1>(task, panel, begin, count);
  }
}

template <class Weights>
inline void multiply_panels(const LinearTask& task, int64_t first_panel, int64_t last_panel) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    for (int64_t group = 0; group < task.rows->groups; ++group) {
      const int64_t begin = task.rows->begin(group);
      multiply_rows<Weights>(task, panel, begin, task.rows->begin(group + 1) - begin);
    }
  }
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
