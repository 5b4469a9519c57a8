// Stochastic residual search on the CPU: threads, memory and the loop over depths around cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "ops/stochastic_residual_search/kernel_table.h"
#include "ops/stochastic_residual_search/params.h"
#include "shared/centered_codebook.h"
#include "shared/residual_rows.h"

namespace rqk {
namespace {

using Kernels = StochasticResidualSearchKernels;

constexpr const char* kOp = "stochastic_residual_search";

constexpr int64_t kMostRows = 64;

// The codebooks of all depths, or the one that all depths share.
std::vector<CenteredCodebook> prepare(const Kernels& kernels, const StochasticResidualSearchParams& p) {
  const int64_t count = p.codebook_stride == 0 ? 1 : p.depth;
  std::vector<CenteredCodebook> codebooks;
  codebooks.reserve(static_cast<size_t>(count));
  for (int64_t d = 0; d < count; ++d) {
    codebooks.emplace_back(kernels.scores, p.codebooks + d * p.codebook_stride, p.num_codes, p.channels);
    if (!codebooks.back().finite()) {
      refuse_not_finite(kOp, "codebooks", p.codebooks, count, p.num_codes, p.channels, p.codebook_stride > 0);
    }
  }
  return codebooks;
}

// Scratch for a tile of rows, used by one thread or by several.
struct Workspace {
  Workspace(const Kernels& kernels, const TilePlan& plan, int64_t num_codes, int64_t channels)
      : scored(kernels.scores, plan, num_codes, channels), residuals(plan.rows * channels) {
    for (int64_t part = 0; part < plan.parts; ++part) {
      scratch.emplace_back(static_cast<int64_t>(kernels.scratch_bytes(num_codes)));
    }
  }

  ScoredRows scored;
  Buffer<float> residuals;
  std::vector<Buffer<char>> scratch;
};

// Samples the codes of all depths for rows [begin, end).
void sample_codes(const StochasticResidualSearchParams& p, const Kernels& kernels,
                  const std::vector<CenteredCodebook>& codebooks, int64_t begin, int64_t end, const Workspace& at) {
  const int rows = static_cast<int>(end - begin);
  const float* residuals[kMostRows];
  double uniforms[kMostRows];
  int64_t codes[kMostRows];
  for (int i = 0; i < rows; ++i) {
    residuals[i] = at.residuals + i * p.channels;
    begin_row(p, begin + i, at.residuals + i * p.channels, kernels.scores.squared_norm);
  }
  for (int64_t d = 0; d < p.depth; ++d) {
    const CenteredCodes& codebook = codebooks[codebooks.size() == 1 ? 0 : static_cast<size_t>(d)].view();
    for (int i = 0; i < rows; ++i) {
      const uint64_t row = static_cast<uint64_t>(p.offset + begin + i);
      uniforms[i] = philox_uniform(p.seed, row, static_cast<uint32_t>(d), kPhiloxStochasticResidualSearch);
    }
    at.scored.score<KeepDenormals>(codebook, residuals, rows);
    at.scored.share_rows<KeepDenormals>(rows, [&](int64_t part, int first, int last) {
      SampleRows share{};
      share.residuals = at.residuals;
      share.uniforms = uniforms;
      share.first = first;
      share.last = last;
      share.parts = at.scored.parts();
      share.tile = at.scored.memory();
      kernels.sample(codebook, share, p.tau, at.scratch[part], codes);
    });
    for (int i = 0; i < rows; ++i) {
      take_code(p, begin + i, d, codes[i], codebook.codes_kc, at.residuals + i * p.channels,
                kernels.scores.squared_norm);
    }
  }
}

}  // namespace

void launch(const StochasticResidualSearchParams& p, void*) {
  const Kernels& kernels = RQK_KERNEL_TABLE(stochastic_residual_search_kernels);
  const std::vector<CenteredCodebook> codebooks = prepare(kernels, p);
  if (p.rows == 0) return;
  const TilePlan plan = plan_tiles(kernels.scores, p.rows, p.num_codes, p.channels, kernels.scores.tile_rows);
  // Allocate here: an exception inside parallel_for would lose its message. Each worker owns one workspace.
  std::vector<Workspace> workspaces;
  for (int64_t i = 0; i < plan.workers; ++i) workspaces.emplace_back(kernels, plan, p.num_codes, p.channels);
  // Tiles are handed out dynamically, since some rows take longer than others.
  std::atomic<int64_t> next{0};
  auto take_tiles = [&](int64_t worker) {
    for (int64_t begin = next.fetch_add(plan.rows); begin < p.rows; begin = next.fetch_add(plan.rows)) {
      sample_codes(p, kernels, codebooks, begin, std::min(begin + plan.rows, p.rows), workspaces[worker]);
    }
  };
  if (plan.parts > 1) {
    take_tiles(0);
  } else {
    for_each_task(plan.workers, take_tiles);
  }
}

}  // namespace rqk
