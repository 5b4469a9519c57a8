// Sum of codes, compiled once per instruction set. Sums stay in registers over all depths.
//
// Short rows are grouped, so that the chains of additions of several rows overlap. Codebook rows are prefetched if the
// codebooks do not fit a core's own cache.
#include "ops/residual_decode/kernel_table.h"

#include "common/simd.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kVectors = 8;  // accumulators: codebook rows are read in long runs, and the registers suffice
constexpr int kGroup = 4;    // short rows per group
constexpr int64_t kRowsAhead = 2;
constexpr int64_t kCacheBytes = 1 << 20;
// Outputs at least this large are evicted before they are read, so they get non-temporal stores (no
// read-for-ownership).
constexpr int64_t kStreamedBytes = 32 << 20;

inline const float* codebook_row(const ResidualDecodeParams& p, int64_t d, int64_t code) {
  return p.codebooks + d * p.codebook_stride + code * p.channels;
}

inline bool is_code(const ResidualDecodeParams& p, int64_t code) {
  return static_cast<uint64_t>(code) < static_cast<uint64_t>(p.num_codes);
}

// Channels [c, c + kCount * Vec::kSize) of the sums of kRows rows, starting from zero, in depth order.
template <int kRows, int kCount>
inline void add_codes(const ResidualDecodeParams& p, const int64_t* codes, int64_t c, float* out, bool is_streamed) {
  Vec sum[kRows][kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) sum[r][v] = Vec::zero();
  }
  for (int64_t d = 0; d < p.depth; ++d) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float* e = codebook_row(p, d, codes[r * p.code_depth + d]) + c;
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) sum[r][v] = sum[r][v] + Vec::load(e + v * Vec::kSize);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) {
      float* at = out + r * p.channels + c + v * Vec::kSize;
      if (is_streamed) {
        stream(sum[r][v], at);
      } else {
        sum[r][v].store(at);
      }
    }
  }
}

// The last channels, less than a vector.
template <int kRows>
inline void add_last_channels(const ResidualDecodeParams& p, const int64_t* codes, int64_t c, float* out) {
  const int count = static_cast<int>(p.channels - c);
  Vec sum[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = Vec::zero();
  for (int64_t d = 0; d < p.depth; ++d) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sum[r] = sum[r] + Vec::load_partial(codebook_row(p, d, codes[r * p.code_depth + d]) + c, count);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r].store_partial(out + r * p.channels + c, count);
}

// kRows rows whose codes are in range.
template <int kRows>
inline void decode_good(const ResidualDecodeParams& p, const int64_t* codes, float* out, bool is_streamed) {
  constexpr int kCount = kVectors / kRows;
  int64_t c = 0;
  for (; c + kCount * Vec::kSize <= p.channels; c += kCount * Vec::kSize) {
    add_codes<kRows, kCount>(p, codes, c, out, is_streamed);
  }
  for (; c + Vec::kSize <= p.channels; c += Vec::kSize) add_codes<kRows, 1>(p, codes, c, out, is_streamed);
  if (c < p.channels) add_last_channels<kRows>(p, codes, c, out);
}

inline bool all_good(const ResidualDecodeParams& p, const int64_t* codes, int64_t rows) {
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < p.depth; ++d) good &= is_code(p, codes[r * p.code_depth + d]);
  }
  return good;
}

inline void prefetch(const ResidualDecodeParams& p, const int64_t* codes) {
  for (int64_t d = 0; d < p.depth; ++d) {
    if (!is_code(p, codes[d])) continue;
    const float* e = codebook_row(p, d, codes[d]);
    for (int64_t c = 0; c < p.channels; c += 16) __builtin_prefetch(e + c);
  }
}

bool decode_rows(const ResidualDecodeParams& p, int64_t begin, int64_t end) {
  const int64_t codebooks = p.codebook_stride == 0 ? 1 : p.depth;
  const bool is_large = codebooks * p.num_codes * p.channels * int64_t(sizeof(float)) > kCacheBytes;
  const bool is_short = p.channels <= kVectors / kGroup * Vec::kSize;
  const bool is_streamed = p.rows * p.channels * int64_t(sizeof(float)) >= kStreamedBytes &&
                           p.channels % Vec::kSize == 0 && reinterpret_cast<uintptr_t>(p.decoded) % sizeof(Vec) == 0;
  bool good = true;
  for (int64_t row = begin; row < end;) {
    const int64_t* codes = p.codes + row * p.code_depth;
    float* out = p.decoded + row * p.channels;
    const int64_t rows = is_short && row + kGroup <= end ? kGroup : 1;
    if (is_large) {
      for (int64_t r = 0; r < rows && row + r + rows * kRowsAhead < end; ++r) {
        prefetch(p, codes + (r + rows * kRowsAhead) * p.code_depth);
      }
    }
    if (rows == kGroup && all_good(p, codes, kGroup)) {
      decode_good<kGroup>(p, codes, out, is_streamed);
      row += kGroup;
      continue;
    }
    if (all_good(p, codes, 1)) {
      decode_good<1>(p, codes, out, is_streamed);
    } else {
      good = false;
      for (int64_t c = 0; c < p.channels; ++c) out[c] = __builtin_nanf("");
    }
    ++row;
  }
  if (is_streamed) stream_fence();
  return good;
}

}  // namespace

constexpr ResidualDecodeKernels residual_decode_kernels = {
    .decode_rows = decode_rows,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
