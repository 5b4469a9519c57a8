// A codebook prepared for code_scores.h, and tiles of rows scored against it. For cpu.cpp files.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "shared/centered_codes.h"
#include "shared/codebooks.h"

namespace rqk {
namespace {

// One codebook (num_codes, channels) with its norms. Where subtracting the center helps, it holds a centered copy.
class CenteredCodebook {
 public:
  CenteredCodebook(const CodeScoresKernels& kernels, const float* codes_kc, int64_t num_codes, int64_t channels)
      : half_norms_(static_cast<size_t>(kernels.padded(num_codes)), std::numeric_limits<float>::infinity()),
        center_(codebook_center(codes_kc, num_codes, channels)) {
    view_.codes_kc = view_.centered_kc = codes_kc;
    view_.half_norms = half_norms_.data();
    view_.num_codes = num_codes;
    view_.channels = channels;
    if (center_.norm > 0) {
      centered_ = Buffer<float>(num_codes * channels);
      view_.mean = center_.values.data();
      view_.centered_kc = centered_;
    }
    std::vector<double> largest(static_cast<size_t>(divide_up(num_codes, kCodesPerTask)));
    for_each_task(static_cast<int64_t>(largest.size()), [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kCodesPerTask, num_codes);
      double most = 0;
      for (int64_t k = task * kCodesPerTask; k < end; ++k) {
        const float* e = codes_kc + k * channels;
        const double squared = view_.mean == nullptr ? kernels.squared_norm(e, channels)
                                                     : kernels.squared_distance(e, view_.mean, channels);
        half_norms_[k] = static_cast<float>(squared / 2);
        // Squares of floats do not overflow float64, so this is NaN or infinite exactly if a code is.
        most = squared <= most ? most : squared;
        if (!std::isfinite(squared)) break;
        if (centered_ == nullptr) continue;
        for (int64_t c = 0; c < channels; ++c) centered_[k * channels + c] = e[c] - view_.mean[c];
      }
      largest[task] = most;
    });
    // A maximum would ignore NaN.
    finite_ = std::all_of(largest.begin(), largest.end(), [](double squared) { return std::isfinite(squared); });
    view_.max_norm = std::sqrt(*std::max_element(largest.begin(), largest.end()));
  }

  bool finite() const { return finite_; }
  const CenteredCodes& view() const { return view_; }

 private:
  static constexpr int64_t kCodesPerTask = 256;

  // Moving an object keeps the addresses of these, which the view points to.
  std::vector<float> half_norms_;
  CodebookCenter center_;
  Buffer<float> centered_;
  CenteredCodes view_{};
  bool finite_;
};

// A division of the rows among threads. With one part, each of `workers` threads takes its own tile of `rows` rows.
// With more, all threads share the codes and then the rows of one tile at a time: used if there are too few rows to
// give each thread a tile, or if the scores of several tiles would need too much memory.
struct TilePlan {
  int64_t rows, parts, workers;
};

inline TilePlan plan_tiles(const CodeScoresKernels& kernels, int64_t rows, int64_t num_codes, int64_t channels,
                           int64_t rows_to_pay_a_tile) {
  // Least number of elements per thread: fewer would be read before the threads have synchronized.
  constexpr int64_t kElementsPerPart = 1 << 18, kMostParts = 64;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  TilePlan plan{};
  plan.rows = kernels.tile_rows;
  plan.parts = std::min({threads, kMostParts, num_codes * channels / kElementsPerPart});
  plan.workers = 1;
  if (plan.parts > 1 && rows < threads * rows_to_pay_a_tile) return plan;
  // Half a tile takes little more than half the time.
  if (divide_up(rows, threads) <= kernels.tile_rows / 2) plan.rows = kernels.tile_rows / 2;
  plan.parts = 1;
  plan.workers = std::min(threads, divide_up(rows, plan.rows));
  return plan;
}

// A tile of rows and its scores.
class ScoredRows {
 public:
  ScoredRows(const CodeScoresKernels& kernels, const TilePlan& plan, int64_t num_codes, int64_t channels)
      : kernels_(kernels),
        parts_(plan.parts),
        memory_(static_cast<int64_t>(kernels.tile_bytes(num_codes, channels, plan.parts))) {}

  void* memory() const { return memory_; }
  int64_t parts() const { return parts_; }

  template <class Denormals>
  void score(const CenteredCodes& codes, const float* const* x, int count) const {
    const Denormals denormals;
    kernels_.pack_rows(codes, x, count, parts_, memory_);
    for_each_part<Denormals>([&](int64_t part) { kernels_.scan(codes, count, part, parts_, memory_); });
  }

  // Calls body(part, first, last) for each part's share of `count` rows.
  template <class Denormals, class Body>
  void share_rows(int count, Body body) const {
    for_each_part<Denormals>([&](int64_t part) {
      body(part, static_cast<int>(count * part / parts_), static_cast<int>(count * (part + 1) / parts_));
    });
  }

 private:
  // Runs on the calling thread if there is one part.
  template <class Denormals, class Body>
  void for_each_part(Body body) const {
    if (parts_ > 1) {
      for_each_task<Denormals>(parts_, body);
    } else {
      body(int64_t(0));
    }
  }

  const CodeScoresKernels& kernels_;
  int64_t parts_;
  Buffer<char> memory_;
};

}  // namespace
}  // namespace rqk
