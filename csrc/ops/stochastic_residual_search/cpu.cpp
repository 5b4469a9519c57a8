// Stochastic residual search on the CPU: threads, memory and the loop over depths around the draws of cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/codebooks.h"
#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/residual_rows.h"
#include "ops/stochastic_residual_search/params.h"
#include "ops/stochastic_residual_search/sample.h"

namespace rqk {

RQK_DECLARE_KERNEL(SampleKernel, sample_kernel)

namespace {

constexpr const char* kOp = "stochastic_residual_search";

// Rows that one thread takes at a time: enough that a panel read from memory is used many times, few enough that their
// scores of all codes take about so many bytes.
constexpr int64_t kTilesPerChunk = 8;
constexpr int64_t kScoreBytes = int64_t(4) << 20;
constexpr int64_t kPanelsPerTask = 16;

// The codebooks of all depths, packed; one where they share it.
class CentredCodebooks {
 public:
  CentredCodebooks(const SampleKernel& kernel, const StochasticResidualSearchParams& p)
      : shared_(p.codebook_stride == 0),
        num_panels_(divide_up(p.num_codes, kernel.panel_width)),
        padded_(num_panels_ * kernel.panel_width),
        channels_(p.channels),
        panels_(count(p) * padded_ * channels_),
        half_norms_(count(p) * padded_) {
    const int64_t tasks_each = divide_up(num_panels_, kPanelsPerTask);
    for (int64_t d = 0; d < count(p); ++d) {
      const float* codes_kc = p.codebooks + d * p.codebook_stride;
      middles_.push_back(middle_of(codes_kc, p.num_codes, channels_));
      views_.push_back({codes_kc, p.num_codes, channels_, middles_.back().values.data(), 0,
                        panels_ + d * padded_ * channels_, half_norms_ + d * padded_});
    }
    std::vector<double> largest(static_cast<size_t>(count(p) * tasks_each));
    for_each_task(count(p) * tasks_each, [&](int64_t task) {
      const int64_t begin = task % tasks_each * kPanelsPerTask;
      largest[task] = kernel.pack(views_[task / tasks_each], begin, std::min(begin + kPanelsPerTask, num_panels_));
    });
    for (int64_t d = 0; d < count(p); ++d) {
      const auto first = largest.begin() + d * tasks_each;
      views_[d].max_norm = std::sqrt(*std::max_element(first, first + tasks_each));
      if (!std::isfinite(views_[d].max_norm)) {
        refuse_not_finite(kOp, "codebooks", p.codebooks, count(p), p.num_codes, channels_, !shared_);
      }
    }
  }

  const CentredCodebook& at(int64_t depth) const { return views_[shared_ ? 0 : depth]; }

 private:
  static int64_t count(const StochasticResidualSearchParams& p) { return p.codebook_stride == 0 ? 1 : p.depth; }

  bool shared_;
  int64_t num_panels_, padded_, channels_;
  std::vector<Middle> middles_;  // moved where the vector grows, their values stay where they are
  Buffer<float> panels_, half_norms_;
  std::vector<CentredCodebook> views_;
};

// What one thread works with, for `rows` rows at a time.
struct Workspace {
  Workspace(const SampleKernel& kernel, int64_t rows, int64_t num_codes, int64_t channels)
      : residuals(rows * channels),
        squared(rows),
        uniforms(rows),
        codes(rows),
        scratch(static_cast<int64_t>(kernel.scratch_bytes(rows, num_codes, channels))) {}

  Buffer<float> residuals;
  Buffer<double> squared, uniforms;
  Buffer<int64_t> codes;
  Buffer<char> scratch;
};

// All depths of rows [begin, end).
void draw_codes(const StochasticResidualSearchParams& p, const SampleKernel& kernel, const CentredCodebooks& codebooks,
                int64_t begin, int64_t end, const Workspace& at) {
  const int64_t rows = end - begin, channels = p.channels;
  for (int64_t i = 0; i < rows; ++i) {
    at.squared[i] = begin_row(p, begin + i, at.residuals + i * channels, kernel.squared_norm);
  }
  for (int64_t d = 0; d < p.depth; ++d) {
    const CentredCodebook& codebook = codebooks.at(d);
    for (int64_t i = 0; i < rows; ++i) {
      const uint64_t row = static_cast<uint64_t>(p.offset + begin + i);
      at.uniforms[i] = philox_uniform(p.seed, row, static_cast<uint32_t>(d), kDrawStochasticResidualSearch);
    }
    kernel.sample(codebook, at.residuals, at.squared, at.uniforms, p.tau, rows, at.scratch, at.codes);
    for (int64_t i = 0; i < rows; ++i) {
      at.squared[i] =
          take_code(p, begin + i, d, at.codes[i], codebook.codes_kc, at.residuals + i * channels, kernel.squared_norm);
    }
  }
}

}  // namespace

void launch(const StochasticResidualSearchParams& p, void*) {
  const SampleKernel& kernel = RQK_KERNEL(sample_kernel);
  const CentredCodebooks codebooks(kernel, p);
  // Small batches are cut finer, so that every thread has some rows.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t bytes_of_tile = kernel.row_tile * p.num_codes * int64_t(sizeof(float));
  const int64_t most = std::clamp<int64_t>(kScoreBytes / bytes_of_tile, 1, kTilesPerChunk);
  const int64_t tiles = std::clamp<int64_t>(divide_up(divide_up(p.rows, threads), kernel.row_tile), 1, most);
  const int64_t chunk = tiles * kernel.row_tile;
  // Memory is taken here: an exception inside parallel_for would lose its message. Each worker owns one slot.
  const int64_t slots = std::min(threads, divide_up(p.rows, chunk));
  std::vector<Workspace> workspaces;
  for (int64_t i = 0; i < slots; ++i) workspaces.emplace_back(kernel, chunk, p.num_codes, p.channels);
  // Chunks are handed out one by one, as some rows take longer than others.
  std::atomic<int64_t> next{0};
  for_each_task(slots, [&](int64_t slot) {
    for (int64_t begin = next.fetch_add(chunk); begin < p.rows; begin = next.fetch_add(chunk)) {
      draw_codes(p, kernel, codebooks, begin, std::min(begin + chunk, p.rows), workspaces[slot]);
    }
  });
}

}  // namespace rqk
