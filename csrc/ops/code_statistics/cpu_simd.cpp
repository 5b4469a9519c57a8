// Sums of rows by code, compiled once per instruction set: float32 rows, accumulated in float64.
//
// Loops of fixed length over blocks of channels, which the compiler vectorizes. No sum is fused or reordered, so the
// instruction set does not change a bit.
#include "ops/code_statistics/kernel_table.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

using code_statistics::Accumulators;
using code_statistics::kRowsPerPiece;
using code_statistics::kSliceChannels;
using code_statistics::Slice;

// channels must be a multiple of kBlock.
template <int kBlock>
inline void add_row(const float* __restrict row, int64_t channels, double* __restrict sum) {
  for (int64_t first = 0; first < channels; first += kBlock) {
    for (int c = 0; c < kBlock; ++c) sum[first + c] += double(row[first + c]);
  }
}

template <int kBlock>
void add_rows_direct(const CodeStatisticsParams& p, Slice slice, const Accumulators& to) {
  const int64_t channels = slice.channels;
  const int64_t first_depth = p.codebooks > 1 ? slice.codebook : 0;
  const int64_t end_depth = p.codebooks > 1 ? first_depth + slice.codebooks : p.depth;
  for (int64_t n = 0; n < p.rows; ++n) {
    for (int64_t d = first_depth; d < end_depth; ++d) {
      const int64_t code = p.codes[n * p.code_row_stride + d * p.code_depth_stride];
      if (code < 0) continue;
      const int64_t k = code + (p.codebooks > 1 ? (d - first_depth) * p.num_codes : 0);
      double* sum = to.sums + k * channels;
      add_row<kBlock>(p.x + n * p.x_row_stride + d * p.x_depth_stride + slice.first, channels, sum);
      const int64_t count = ++to.counts[k];
      if (count % kRowsPerPiece != 0) continue;
      // The first piece is stored, not added: totals are uninitialized before it.
      double* total = to.totals + k * channels;
      for (int64_t c = 0; c < channels; ++c) {
        total[c] = count == kRowsPerPiece ? sum[c] : total[c] + sum[c];
        sum[c] = 0;
      }
    }
  }
}

void add_direct(const CodeStatisticsParams& p, Slice slice, const Accumulators& to) {
  const int64_t channels = slice.channels, num_codes = slice.codebooks * p.num_codes;
  __builtin_memset(to.sums, 0, size_t(num_codes * channels) * sizeof(double));
  __builtin_memset(to.counts, 0, size_t(num_codes) * sizeof(int64_t));
  if (channels % 16 == 0) {
    add_rows_direct<16>(p, slice, to);
  } else if (channels % 8 == 0) {
    add_rows_direct<8>(p, slice, to);
  } else {
    add_rows_direct<1>(p, slice, to);
  }
  float* counts = p.counts + slice.codebook * p.num_codes;
  float* sums = p.sums + slice.codebook * p.num_codes * p.channels + slice.first;
  for (int64_t k = 0; k < num_codes; ++k) {
    // All slices have the same counts.
    if (slice.first == 0) counts[k] = float(to.counts[k]);
    const double *sum = to.sums + k * channels, *total = to.totals + k * channels;
    float* out = sums + k * p.channels;
    if (to.counts[k] < kRowsPerPiece) {
      for (int64_t c = 0; c < channels; ++c) out[c] = float(sum[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) out[c] = float(total[c] + sum[c]);
    }
  }
}

// add_row on empty accumulators. 0 + x equals x, except for -0.
inline void set_row(const float* __restrict row, int64_t channels, double* __restrict sum) {
  for (int64_t c = 0; c < channels; ++c) sum[c] = 0.0 + double(row[c]);
}

inline void prefetch_row(const float* row, int64_t channels) {
  for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(row + c);
}

// Channels [0, channels) of one code's sums; its rows are at x + offsets[i]. The accumulators stay in L1.
void add_segment(const float* x, const int64_t* offsets, int64_t rows, int64_t channels, float* out) {
  double sum[kSliceChannels], total[kSliceChannels];
  const int64_t whole = channels / 16 * 16;
  for (int64_t first = 0; first < rows; first += kRowsPerPiece) {
    const int64_t end = rows - first < kRowsPerPiece ? rows : first + kRowsPerPiece;
    for (int64_t i = first; i < end; ++i) {
      const float* row = x + offsets[i];
      // Possibly the first row of the next code: its rows follow.
      prefetch_row(x + offsets[i + 1], channels);
      if (i == first) {
        set_row(row, channels, sum);
        continue;
      }
      add_row<16>(row, whole, sum);
      add_row<1>(row + whole, channels - whole, sum + whole);
    }
    if (rows <= kRowsPerPiece) continue;
    for (int64_t c = 0; c < channels; ++c) total[c] = first == 0 ? sum[c] : total[c] + sum[c];
  }
  const double* result = rows <= kRowsPerPiece ? sum : total;
  for (int64_t c = 0; c < channels; ++c) out[c] = float(result[c]);
}

void add_sorted(const CodeStatisticsParams& p, Slice slice, const int64_t* places, const int64_t* offsets,
                int64_t begin, int64_t end) {
  const float* x = p.x + slice.first;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t* from = offsets + places[k];
    const int64_t rows = places[k + 1] - places[k], channels = slice.channels;
    float* out = p.sums + (slice.codebook * p.num_codes + k) * p.channels + slice.first;
    if (slice.first == 0) p.counts[slice.codebook * p.num_codes + k] = float(rows);
    if (rows == 0) {
      __builtin_memset(out, 0, size_t(channels) * sizeof(float));
    } else if (rows == 1) {
      // The common case of a large codebook.
      prefetch_row(x + from[1], channels);
      for (int64_t c = 0; c < channels; ++c) out[c] = x[*from + c] + 0.0f;
    } else {
      add_segment(x, from, rows, channels, out);
    }
  }
}

}  // namespace

constexpr CodeStatisticsKernels code_statistics_kernels = {
    .add_direct = add_direct,
    .add_sorted = add_sorted,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
