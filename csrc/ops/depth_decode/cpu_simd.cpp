// Transformer decoding on the CPU, the work of one thread: norms, rows in the order of the products, the products
// (multiply.h), attention of one head, sampling. cpu.cpp calls them in sequence.
#include "ops/depth_decode/kernel_table.h"

#include "common/simd.h"
#include "ops/depth_decode/multiply.h"
#include "shared/sample_row.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

// The sum of all lanes, folded by halves: the order depends on the instruction set only.
inline float total(Vec a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 eight = a.v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
#endif
}

inline float most(Vec a) {
  float lanes[Vec::kSize];
  a.store(lanes);
  for (int j = 1; j < Vec::kSize; ++j) lanes[0] = lanes[0] < lanes[j] ? lanes[j] : lanes[0];
  return lanes[0];
}

inline Vec load_up_to(const float* p, int64_t n) { return n >= Vec::kSize ? Vec::load(p) : Vec::load_partial(p, n); }

void normalize(const float* x, const float* weight, const float* bias, int64_t width, double eps, float* y) {
  Vec sum = Vec::zero(), squares = Vec::zero();
  for (int64_t c = 0; c < width; c += Vec::kSize) sum = sum + load_up_to(x + c, width - c);
  const Vec mean = Vec::fill(total(sum) / float(width));
  for (int64_t c = 0; c < width; c += Vec::kSize) {
    Vec d = load_up_to(x + c, width - c) - mean;
    if (width - c < Vec::kSize) {  // past the last channel the difference must be zero
      float lanes[Vec::kSize];
      d.store(lanes);
      d = Vec::load_partial(lanes, width - c);
    }
    squares = fma(d, d, squares);
  }
  const float variance = total(squares) / float(width);
  const Vec factor = Vec::fill(1.0f / __builtin_sqrtf(variance + float(eps)));
  // Weight and bias are zero past the last channel; x is readable there.
  for (int64_t c = 0; c < padded(width); c += Vec::kSize) {
    const Vec d = width - c > 0 ? load_up_to(x + c, width - c) - mean : Vec::zero();
    fma(d * factor, Vec::load(weight + c), Vec::load(bias + c)).store(y + c);
  }
}

void arrange_floats(const float* rows, int64_t stride, const RowGroups& groups, int64_t begin, int64_t count) {
  const int64_t inputs = groups.inputs;
  float* values = reinterpret_cast<float*>(groups.values) + begin * inputs;
  if (count == 1) {
    __builtin_memcpy(values, rows + begin * stride, size_t(inputs) * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* x = rows + (begin + i) * stride;
    for (int64_t c = 0; c < inputs; c += Vec::kSize) {
      store_columns(Vec::load(x + c), Vec::load(x + stride + c), Vec::load(x + 2 * stride + c),
                    Vec::load(x + 3 * stride + c), values + c * count + i, count);
    }
  }
  for (; i < count; ++i) {
    const float* x = rows + (begin + i) * stride;
    for (int64_t c = 0; c < inputs; ++c) values[c * count + i] = x[c];
  }
}

// Stores integers in [-127, 127] as bytes.
inline void store_signed_bytes(Vec a, uint8_t* bytes) {
#if defined(__AVX2__)
  store_bytes(nearest_int(a), bytes);
#else
  for (int j = 0; j < Vec::kSize; ++j) bytes[j] = uint8_t(int8_t(a.v[j]));
#endif
}

// Splits one row into 256 high + low, both in [-128, 127]: integers in [-32639, 32639].
void arrange_bytes(const float* x, const RowGroups& groups, int64_t row, uint8_t* values, int64_t count) {
  constexpr float kMost = 32639;  // 256 * 127 + 127
  Vec top = Vec::zero(), poison = Vec::zero();
  for (int64_t c = 0; c < groups.inputs; c += Vec::kSize) {
    const Vec value = Vec::load(x + c);
    top = max(max(value, Vec::zero() - value), top);
    poison = fma(value, Vec::zero(), poison);  // NaN if any value is not finite, which makes the row's scale and
                                               // results NaN
  }
  const float largest = most(top);
  // The inverse of a smaller number overflows: such a row counts as zero, which changes a result by less than 1e-30 of
  // its weights.
  const bool tiny = !(largest > 1e-30f) || largest > 3e38f;
  groups.scales[row] = largest / kMost + total(poison);
  const Vec inverse = Vec::fill(tiny ? 0.0f : kMost / largest);
  Vec high_sum = Vec::zero(), low_sum = Vec::zero();
  for (int64_t c = 0; c < groups.inputs; c += Vec::kSize) {
    const Vec a = rounded(Vec::load(x + c) * inverse);
    // Adding a quarter breaks the tie that would leave 128 for the low byte. All of this is exact.
    const Vec high = rounded((a + Vec::fill(0.25f)) * Vec::fill(1.0f / 256));
    const Vec low = a - high * Vec::fill(256.0f);
    high_sum = high_sum + high;
    low_sum = low_sum + low;
    alignas(64) uint8_t highs[Vec::kSize], lows[Vec::kSize];
    store_signed_bytes(high, highs);
    store_signed_bytes(low, lows);
    for (int64_t four = 0; four < Vec::kSize; four += 4) {
      uint8_t* to = values + (c + four) / 4 * count * 8;
      __builtin_memcpy(to, highs + four, 4);
      __builtin_memcpy(to + 4, lows + four, 4);
    }
  }
  // A sum of at most 32768 bytes is exact. For a row that is not finite the value does not matter.
  const float high = total(high_sum), low = total(low_sum);
  groups.sums[2 * row] = high == high ? int32_t(high) : 0;
  groups.sums[2 * row + 1] = low == low ? int32_t(low) : 0;
}

void arrange(const float* rows, int64_t stride, WeightType type, const RowGroups& groups, int64_t group) {
  const int64_t begin = groups.begin(group), count = groups.begin(group + 1) - begin;
  if (type != WeightType::kInt8) return arrange_floats(rows, stride, groups, begin, count);
  uint8_t* values = groups.values + begin * groups.inputs * 2;
  for (int64_t i = 0; i < count; ++i) {
    arrange_bytes(rows + (begin + i) * stride, groups, begin + i, values + 8 * i, count);
  }
}

int64_t rows_at_once(WeightType type) { return type == WeightType::kInt8 ? kByteRows : kFloatRows; }

void multiply(const LinearTask& task, WeightType type, int64_t first_panel, int64_t last_panel) {
  switch (type) {
    case WeightType::kFloat32:
      return multiply_panels<FloatWeights>(task, first_panel, last_panel);
    case WeightType::kBFloat16:
      return multiply_panels<BFloatWeights>(task, first_panel, last_panel);
    case WeightType::kInt8:
      return multiply_panels<ByteWeights>(task, first_panel, last_panel);
  }
}

constexpr int kChannelVecs = 4;

// out = factor * sum_j weights[j] values[j], for kVecs vectors of channels.
template <int kVecs>
inline void weigh(const float* values, int64_t stride, const float* weights, int64_t n, float factor, float* out) {
  Vec sum[kVecs];
  for (Vec& s : sum) s = Vec::zero();
  for (int64_t j = 0; j < n; ++j) {
    const Vec weight = Vec::fill(weights[j]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[v] = fma(weight, Vec::load(values + j * stride + v * Vec::kSize), sum[v]);
  }
  for (int v = 0; v < kVecs; ++v) (sum[v] * Vec::fill(factor)).store(out + v * Vec::kSize);
}

void attend(const HeadTask& head) {
  const int64_t dim = head.head_dim;
  const Vec scale = Vec::fill(1.0f / __builtin_sqrtf(float(dim)));
  for (int64_t i = 0; i < head.count; ++i) {
    const float* q = head.qkv + i * head.stride + head.head * dim;
    const int64_t n = head.length + i + 1;
    __builtin_memcpy(head.keys + (n - 1) * dim, q + head.width, size_t(dim) * sizeof(float));
    __builtin_memcpy(head.values + (n - 1) * dim, q + 2 * head.width, size_t(dim) * sizeof(float));
    for (int64_t j = 0; j < n; ++j) {
      const float* key = head.keys + j * dim;
      Vec dot = Vec::zero();
      for (int64_t c = 0; c < dim; c += Vec::kSize) {
        dot = fma(load_up_to(q + c, dim - c), load_up_to(key + c, dim - c), dot);
      }
      head.scores[j] = total(dot);
    }
    const int64_t whole = (n + Vec::kSize - 1) / Vec::kSize * Vec::kSize;
    for (int64_t j = n; j < whole; ++j) head.scores[j] = -__builtin_inff();
    Vec top = Vec::load(head.scores), sum = Vec::zero();
    for (int64_t j = Vec::kSize; j < whole; j += Vec::kSize) top = max(top, Vec::load(head.scores + j));
    const Vec largest = Vec::fill(most(top));
    for (int64_t j = 0; j < whole; j += Vec::kSize) {
      const Vec e = exp((Vec::load(head.scores + j) - largest) * scale);
      e.store(head.scores + j);
      sum = sum + e;
    }
    const float factor = 1.0f / total(sum);
    float* out = head.out + i * head.out_stride + head.head * dim;
    int64_t c = 0;
    for (; c + kChannelVecs * Vec::kSize <= dim; c += kChannelVecs * Vec::kSize) {
      weigh<kChannelVecs>(head.values + c, dim, head.scores, n, factor, out + c);
    }
    for (; c + Vec::kSize <= dim; c += Vec::kSize) weigh<1>(head.values + c, dim, head.scores, n, factor, out + c);
    if (c < dim) {
      Vec rest = Vec::zero();
      for (int64_t j = 0; j < n; ++j) {
        rest = fma(Vec::fill(head.scores[j]), Vec::load_partial(head.values + j * dim + c, dim - c), rest);
      }
      (rest * Vec::fill(factor)).store_partial(out + c, dim - c);
    }
  }
}

}  // namespace

constexpr DepthDecodeKernels depth_decode_kernels = {
    .rows_at_once = rows_at_once,
    .normalize = normalize,
    .arrange = arrange,
    .multiply = multiply,
    .attend = attend,
    .sample_scratch_bytes = sample_scratch_bytes,
    .sample_row = sample_row,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
