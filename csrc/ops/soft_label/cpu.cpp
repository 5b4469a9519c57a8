// Soft labels on the CPU: threads and scratch memory around cpu_simd.cpp.
//
// Besides its results, a call holds the scores of a tile of rows (2 MiB at 16384 codes and 32 rows): one tile per
// thread if there are many rows, else one tile that all threads share. It also holds the norms of one codebook at a
// time and, if the codes lie off the origin, a centered copy.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "common/parallel.h"
#include "ops/soft_label/kernel_table.h"
#include "ops/soft_label/params.h"
#include "shared/centered_codebook.h"

namespace rqk {
namespace {

constexpr int kMostRows = 64;
// Each thread also holds a row of exponentials. All of this is at most a twentieth of the logits if each thread has
// this many rows for every row of its tile.
constexpr int64_t kRowsPerRowOfScores = 20;

// Calls work(kernels, codebook, rows, tile, memory) for tiles of the counted rows; all rows of a tile have the same
// codebook. A call processes the rows tile.first .. tile.last - 1.
template <class Counted, class Work>
void for_each_tile(const SoftLabels& labels, const char* op, Counted counted, Work work) {
  const SoftLabelKernels& kernels = RQK_KERNEL_TABLE(soft_label_kernels);
  const int64_t num_codes = labels.num_codes, channels = labels.channels;
  const int64_t codebooks = labels.codebook_stride == 0 ? 1 : labels.inner;
  const int64_t step = labels.codebook_stride == 0 ? 1 : labels.inner;
  const int64_t num_rows = labels.outer * labels.inner;
  const Buffer<int64_t> rows(divide_up(num_rows, step));
  for (int64_t d = 0; d < codebooks; ++d) {
    const float* codes_kc = labels.codebook + d * labels.codebook_stride;
    const CenteredCodebook codebook(kernels.scores, codes_kc, num_codes, channels);
    if (!codebook.finite()) {
      refuse_not_finite(op, "codebook", labels.codebook, codebooks, num_codes, channels, labels.codebook_stride > 0);
    }
    int64_t count = 0;
    for (int64_t row = d; row < num_rows; row += step) {
      if (counted(row)) rows[count++] = row;
    }
    const TilePlan plan =
        plan_tiles(kernels.scores, count, num_codes, channels, kRowsPerRowOfScores * (kernels.scores.tile_rows + 1));
    // Allocate here: an exception inside parallel_for would lose its message. Each worker owns a tile.
    std::vector<ScoredRows> tiles;
    std::vector<Buffer<char>> memory;
    for (int64_t i = 0; i < plan.workers; ++i) tiles.emplace_back(kernels.scores, plan, num_codes, channels);
    for (int64_t i = 0; i < plan.workers * plan.parts; ++i) {
      memory.emplace_back(static_cast<int64_t>(kernels.scratch_bytes(num_codes)));
    }
    std::atomic<int64_t> next{0};
    auto take_tiles = [&](int64_t worker) {
      const ScoredRows& tile = tiles[worker];
      const float* x[kMostRows];
      for (int64_t begin = next.fetch_add(plan.rows); begin < count; begin = next.fetch_add(plan.rows)) {
        const int n = static_cast<int>(std::min(plan.rows, count - begin));
        for (int i = 0; i < n; ++i) x[i] = labels.x + rows[begin + i] * channels;
        tile.score<FlushDenormals>(codebook.view(), x, n);
        tile.share_rows<FlushDenormals>(n, [&](int64_t part, int first, int last) {
          LabelTile share{};
          share.x = x;
          share.first = first;
          share.last = last;
          share.parts = tile.parts();
          share.memory = tile.memory();
          work(kernels, codebook.view(), rows + begin, share, memory[worker * plan.parts + part]);
        });
      }
    };
    if (plan.parts > 1) {
      take_tiles(0);
    } else {
      for_each_task<FlushDenormals>(plan.workers, take_tiles);
    }
  }
}

// Gradients at least this large get non-temporal stores (no read-for-ownership).
constexpr int64_t kStreamedBytes = 16 << 20;

}  // namespace

void launch(const DistanceSoftmaxParams& p, void*) {
  const SoftLabels& labels = p.labels;
  for_each_tile(
      labels, "distance_softmax", [](int64_t) { return true; },
      [&](const SoftLabelKernels& kernels, const CenteredCodes& codebook, const int64_t* rows, const LabelTile& tile,
          void*) {
        float* q[kMostRows];
        for (int i = tile.first; i < tile.last; ++i) q[i] = p.q + rows[i] * labels.num_codes;
        kernels.distance_softmax(codebook, labels.tau, tile, q);
      });
}

void launch(const SoftLabelCrossEntropyParams& p, void*) {
  const SoftLabels& labels = p.labels;
  const int64_t size = size_of(p.type), num_rows = labels.outer * labels.inner;
  auto logits_at = [&](int64_t row) {
    const int64_t offset = row / labels.inner * p.logits_outer_stride + row % labels.inner * p.logits_inner_stride;
    return static_cast<const char*>(p.logits) + offset * size;
  };
  auto gradient_at = [&](int64_t row) -> char* {
    if (p.gradient == nullptr) return nullptr;
    const int64_t offset = row / labels.inner * p.gradient_outer_stride + row % labels.inner * p.gradient_inner_stride;
    return static_cast<char*>(p.gradient) + offset * size;
  };
  const bool streams = p.gradient != p.logits && num_rows * labels.num_codes * size >= kStreamedBytes;
  auto counted = [&](int64_t row) { return p.mask == nullptr || p.mask[row] != 0; };
  for_each_tile(labels, "soft_label_cross_entropy", counted,
                [&](const SoftLabelKernels& kernels, const CenteredCodes& codebook, const int64_t* rows,
                    const LabelTile& tile, void* memory) {
                  CrossEntropyRow all[kMostRows];
                  for (int i = tile.first; i < tile.last; ++i) {
                    all[i].logits = logits_at(rows[i]);
                    all[i].gradient = gradient_at(rows[i]);
                    all[i].weight = p.weight == nullptr ? 1.0f : p.weight[rows[i] * p.weight_stride];
                    all[i].loss = p.losses + rows[i];
                    all[i].streams = streams;
                  }
                  kernels.cross_entropy(codebook, labels.tau, tile, all, p.type, memory);
                });
  double total = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (!counted(row)) {
      p.losses[row] = 0;
      if (p.gradient != nullptr) std::memset(gradient_at(row), 0, static_cast<size_t>(labels.num_codes * size));
    }
    total += static_cast<double>(p.losses[row]);
  }
  if (p.total != nullptr) {
    *p.total = static_cast<float>(total * (p.weight == nullptr ? 1.0 : static_cast<double>(p.weight[0])));
  }
}

}  // namespace rqk
