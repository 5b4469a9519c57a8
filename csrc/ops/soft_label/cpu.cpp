// Soft labels on the CPU: the codebook's norms, threads and scratch memory around the rows of cpu_simd.cpp.
//
// Beside its results a call holds, for every thread, the scores of kernel.rows_at_once rows (2 MiB at 16384 codes and
// 32 rows) and the norms of one codebook at a time; where codes lie off the origin, also a centred copy of it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/codebooks.h"
#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "common/parallel.h"
#include "ops/soft_label/params.h"
#include "ops/soft_label/rows.h"

namespace rqk {

RQK_DECLARE_KERNEL(SoftLabelKernel, soft_label_kernel)

namespace {

constexpr int64_t kCodesPerTask = 256;

// One codebook, measured and where it helps centred.
class PreparedCodebook {
 public:
  PreparedCodebook(const SoftLabelKernel& kernel, const float* codes_kc, const SoftLabels& labels, const char* op)
      : num_codes_(labels.num_codes),
        channels_(labels.channels),
        half_norms_(static_cast<size_t>(kernel.padded(labels.num_codes)), std::numeric_limits<float>::infinity()),
        middle_(middle_of(codes_kc, labels.num_codes, labels.channels)) {
    view_ = {codes_kc, codes_kc, nullptr, half_norms_.data(), 0, num_codes_, channels_, labels.tau};
    // Centring takes a copy of the codes: they stay where they are unless that costs digits.
    if (middle_.norm > 0) {
      centred_ = Buffer<float>(num_codes_ * channels_);
      view_.mean = middle_.values.data();
      view_.centred_kc = centred_;
    }
    std::vector<double> largest(static_cast<size_t>(divide_up(num_codes_, kCodesPerTask)));
    for_each_task<FlushDenormals>(static_cast<int64_t>(largest.size()), [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kCodesPerTask, num_codes_);
      double most = 0;
      for (int64_t k = task * kCodesPerTask; k < end; ++k) {
        const float* e = codes_kc + k * channels_;
        const double squared = view_.mean == nullptr ? kernel.squared_norm(e, channels_)
                                                     : kernel.squared_distance(e, view_.mean, channels_);
        half_norms_[k] = static_cast<float>(squared / 2);
        // Squares of floats do not overflow float64: this is NaN or infinite where a code is.
        most = squared <= most ? most : squared;
        if (!std::isfinite(squared)) break;
        if (centred_ == nullptr) continue;
        for (int64_t c = 0; c < channels_; ++c) centred_[k * channels_ + c] = e[c] - view_.mean[c];
      }
      largest[task] = most;
    });
    double most = 0;
    for (size_t task = 0; task < largest.size(); ++task) {
      if (!std::isfinite(largest[task])) refuse_not_finite(op, "codebook", codes_kc, 1, num_codes_, channels_, false);
      most = std::max(most, largest[task]);
    }
    view_.max_norm = std::sqrt(most);
  }

  const LabelCodebook& view() const { return view_; }

 private:
  int64_t num_codes_, channels_;
  std::vector<float> half_norms_;
  Middle middle_;
  Buffer<float> centred_;
  LabelCodebook view_;
};

// work(codebook, rows, count, memory) for chunks of the rows that are counted; all rows of a chunk have one codebook.
template <class Counted, class Work>
void for_each_chunk(const SoftLabels& labels, const char* op, Counted counted, Work work) {
  const SoftLabelKernel& kernel = RQK_KERNEL(soft_label_kernel);
  const int64_t codebooks = labels.codebook_stride == 0 ? 1 : labels.inner;
  const int64_t step = labels.codebook_stride == 0 ? 1 : labels.inner;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  // Memory is taken here: an exception inside parallel_for would lose its message. Each worker owns one slot.
  std::vector<Buffer<char>> slots;
  std::vector<int64_t> rows;
  for (int64_t d = 0; d < codebooks; ++d) {
    const PreparedCodebook codebook(kernel, labels.codebook + d * labels.codebook_stride, labels, op);
    rows.clear();
    for (int64_t row = d; row < labels.outer * labels.inner; row += step) {
      if (counted(row)) rows.push_back(row);
    }
    const int64_t count = static_cast<int64_t>(rows.size()), chunk = kernel.rows_at_once;
    const int64_t chunks = divide_up(count, chunk), workers = std::min(threads, chunks);
    while (static_cast<int64_t>(slots.size()) < workers) {
      slots.emplace_back(static_cast<int64_t>(kernel.scratch_bytes(labels.num_codes, labels.channels)));
    }
    std::atomic<int64_t> next{0};
    for_each_task<FlushDenormals>(workers, [&](int64_t worker) {
      for (int64_t begin = next.fetch_add(chunk); begin < count; begin = next.fetch_add(chunk)) {
        work(kernel, codebook.view(), rows.data() + begin, static_cast<int>(std::min(chunk, count - begin)),
             slots[worker]);
      }
    });
  }
}

constexpr int kMostRows = 64;
// A gradient from here on goes past the caches: written through them, it would be read first.
constexpr int64_t kStreamedBytes = 16 << 20;

int64_t size_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

}  // namespace

void launch(const DistanceSoftmaxParams& p, void*) {
  const SoftLabels& labels = p.labels;
  for_each_chunk(
      labels, "distance_softmax", [](int64_t) { return true; },
      [&](const SoftLabelKernel& kernel, const LabelCodebook& codebook, const int64_t* rows, int count, void* memory) {
        const float* x[kMostRows];
        float* q[kMostRows];
        for (int i = 0; i < count; ++i) {
          x[i] = labels.x + rows[i] * labels.channels;
          q[i] = p.q + rows[i] * labels.num_codes;
        }
        kernel.distance_softmax(codebook, x, q, count, memory);
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
  for_each_chunk(
      labels, "soft_label_cross_entropy", counted,
      [&](const SoftLabelKernel& kernel, const LabelCodebook& codebook, const int64_t* rows, int count, void* memory) {
        CrossEntropyRow all[kMostRows];
        for (int i = 0; i < count; ++i) {
          all[i] = {labels.x + rows[i] * labels.channels,
                    logits_at(rows[i]),
                    gradient_at(rows[i]),
                    p.gradient_scale * (p.weight == nullptr ? 1.0f : p.weight[rows[i] * p.weight_stride]),
                    p.losses + rows[i],
                    streams};
        }
        kernel.cross_entropy(codebook, all, p.type, count, memory);
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
