// Residual search on the CPU: threads, scratch memory and the loop over depths around the scan of cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/residual_search/params.h"
#include "ops/residual_search/search_kernel.h"

namespace rqk {

RQK_DECLARE_SEARCH_KERNEL(default_)
#ifdef RQK_X86
RQK_DECLARE_SEARCH_KERNEL(avx2)
RQK_DECLARE_SEARCH_KERNEL(avx512)
#endif

namespace {

// Rows that one thread takes at a time: enough that a panel read from memory is used many times, few enough that the
// chunk stays in the second-level cache (96 rows of 256 channels are 96 KiB).
constexpr int64_t kTilesPerChunk = 8;
constexpr int64_t kPanelsPerTask = 16;

const SearchKernel& kernel_of_this_machine() {
#ifdef RQK_X86
  if (cpu_capability() == CpuCapability::kAvx512) return avx512::search_kernel;
  if (cpu_capability() == CpuCapability::kAvx2) return avx2::search_kernel;
#endif
  return default_::search_kernel;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised floats, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(static_cast<size_t>(size) * sizeof(float), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

// The codebooks of all depths in the layout of the scan; as much memory as the codebooks themselves.
class PackedCodebooks {
 public:
  PackedCodebooks(const ResidualSearchParams& p, const SearchKernel& kernel)
      : count_(p.codebook_stride == 0 ? 1 : p.depth),
        num_panels_(divide_up(p.num_codes, kernel.panel_width)),
        panels_(count_ * num_panels_ * kernel.panel_width * p.channels),
        half_norms_(count_ * num_panels_ * kernel.panel_width) {
    const int64_t padded = num_panels_ * kernel.panel_width;
    const int64_t tasks = divide_up(num_panels_, kPanelsPerTask), codes_per_task = kPanelsPerTask * kernel.panel_width;
    std::vector<double> largest(static_cast<size_t>(count_ * tasks), 0.0);
    torch::stable::parallel_for(0, count_ * tasks, 1, [&](int64_t begin, int64_t end) {
      KeepDenormals keep;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t d = task / tasks, first = task % tasks * codes_per_task;
        largest[task] = kernel.pack(p.codebooks + d * p.codebook_stride, p.channels, first,
                                    std::min(first + codes_per_task, p.num_codes),
                                    panels_.data() + d * padded * p.channels, half_norms_.data() + d * padded);
      }
    });
    for (int64_t d = 0; d < count_; ++d) {
      const double squared = *std::max_element(largest.begin() + d * tasks, largest.begin() + (d + 1) * tasks);
      views_.push_back({p.codebooks + d * p.codebook_stride, panels_.data() + d * padded * p.channels,
                        half_norms_.data() + d * padded, p.num_codes, p.channels, std::sqrt(squared)});
    }
  }
  const PackedCodebook& at(int64_t depth) const { return views_[static_cast<size_t>(count_ == 1 ? 0 : depth)]; }

 private:
  int64_t count_, num_panels_;
  Buffer panels_, half_norms_;
  std::vector<PackedCodebook> views_;
};

// All depths of rows [begin, end).
void search_chunk(const ResidualSearchParams& p, const SearchKernel& kernel, const PackedCodebooks& codebooks,
                  int64_t begin, int64_t end, float* residual, float* tiles, RowState* states, int64_t* codes) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const int64_t rows = end - begin, channels = p.channels;
  float* quantized = p.quantized + begin * channels;
  std::copy(p.x + begin * channels, p.x + end * channels, residual);
  std::fill(quantized, quantized + rows * channels, 0.0f);
  for (int64_t d = 0; d < p.depth; ++d) {
    const PackedCodebook& codebook = codebooks.at(d);
    kernel.nearest(codebook, residual, rows, tiles, states, codes);
    for (int64_t i = 0; i < rows; ++i) {
      float* r = residual + i * channels;
      float* q = quantized + i * channels;
      if (p.residuals != nullptr) std::copy(r, r + channels, p.residuals + ((begin + i) * p.depth + d) * channels);
      if (codes[i] >= 0) {
        const float* e = codebook.codes_kc + codes[i] * channels;
        for (int64_t c = 0; c < channels; ++c) {
          r[c] -= e[c];
          q[c] += e[c];
        }
      } else {
        std::fill(r, r + channels, kNan);
        std::fill(q, q + channels, kNan);
      }
      p.codes[(begin + i) * p.depth + d] = codes[i];
      p.residual_norms[(begin + i) * p.depth + d] = static_cast<float>(kernel.squared_norm(r, channels));
    }
  }
}

}  // namespace

void launch(const ResidualSearchParams& p, void*) {
  const SearchKernel& kernel = kernel_of_this_machine();
  const PackedCodebooks codebooks(p, kernel);
  // Small batches are cut finer, so that every thread has some rows.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t tiles_per_chunk =
      std::clamp<int64_t>(divide_up(divide_up(p.rows, threads), kernel.row_tile), 1, kTilesPerChunk);
  const int64_t chunk = tiles_per_chunk * kernel.row_tile;
  // Memory is taken here: an exception inside parallel_for would lose its message. Each worker owns one slot.
  const int64_t slots = std::min(threads, divide_up(p.rows, chunk));
  Buffer scratch(slots * 2 * chunk * p.channels);
  std::vector<RowState> states(static_cast<size_t>(slots * chunk));
  std::vector<int64_t> codes(static_cast<size_t>(slots * chunk));
  std::atomic<int64_t> next{0};
  const int64_t num_chunks = divide_up(p.rows, chunk);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    KeepDenormals keep;
    for (int64_t slot = begin; slot < end; ++slot) {
      float* residual = scratch.data() + slot * 2 * chunk * p.channels;
      // Chunks are handed out one by one: rows that need float64 throughout take longer than others.
      for (int64_t i = next++; i < num_chunks; i = next++) {
        search_chunk(p, kernel, codebooks, i * chunk, std::min((i + 1) * chunk, p.rows), residual,
                     residual + chunk * p.channels, states.data() + slot * chunk, codes.data() + slot * chunk);
      }
    }
  });
}

}  // namespace rqk
