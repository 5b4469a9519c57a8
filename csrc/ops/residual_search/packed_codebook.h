// Packed codebooks: their size, the place of each part, and how they are filled. For cpu.cpp.
//
// kernel_table.h describes the parts. Their way into memory:
//   measure    center (shared/codebooks.h), squared norms of codes and of centered codes
//   fill       codes in order of norm; int8 panels without the outlier channels (scan_int8.h), or float panels
//              (panels.h); with Gram rows, norms of the blocks and the products of all codes (gram.h)
//   on demand  float panels next to int8 panels, when the int8 scan leaves the first row to the float scan
// codebook_cache.h keeps packed codebooks from call to call; rqkernels.PackedCodebook keeps one as a tensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "ops/residual_search/kernel_table.h"
#include "shared/codebooks.h"

namespace rqk {
namespace {

constexpr int64_t kPanelsPerTask = 16;
// With fewer codes, quantizing the rows costs more than the int8 scan saves.
constexpr int64_t kInt8MinCodes = 128;
// Ratio of a channel to the others above which it is an outlier. Each outlier channel costs the scan one operation per
// code and row, and makes the quantization of the others finer.
constexpr double kOutlierRatio = 5;
// Limits for Gram rows: their size, the number of channels above which reading them is cheaper than a scan, and norms
// whose products fit float32.
constexpr int64_t kGramMaxBytes = int64_t(320) << 20;
constexpr int64_t kGramMinChannels = 32;
constexpr double kGramMinNorm = 1e-10, kGramMaxNorm = 1e10;
constexpr double kGramNormSpread = 1e-6;  // least norm of a block, relative to the largest

// Sorts the places of the codes by norm, coarsely: a counting sort by exponent and three bits of mantissa.
void order_by_size(const double* squared_norms, int64_t num_codes, int64_t padded, int32_t* order) {
  std::vector<int64_t> begin((1 << 14) + 1, 0);
  auto key = [squared_norms](int64_t k) {
    uint64_t bits;
    std::memcpy(&bits, squared_norms + k, sizeof bits);
    return bits >> 49;
  };
  for (int64_t k = 0; k < num_codes; ++k) ++begin[key(k) + 1];
  for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
  for (int64_t k = 0; k < num_codes; ++k) order[begin[key(k)]++] = static_cast<int32_t>(k);
  std::fill(order + num_codes, order + padded, -1);
}

// Codebooks of one size in the layout of the scans, in memory of the caller: `bytes` for each, aligned to a cache line
// and free of pointers, so that it can be a tensor's storage. They take as much as the codebook, or a quarter with
// int8; Gram rows add a byte per pair of codes. Packing has two steps, `measure` and `fill`, so that the caller can
// decide in between what to fill.
class PackedCodebooks {
 public:
  PackedCodebooks(const ResidualSearchKernels& kernels, int64_t num_codes, int64_t channels)
      : kernels_(kernels),
        num_codes_(num_codes),
        channels_(channels),
        num_panels_(divide_up(num_codes, kernels.panel_width)),
        num_blocks_(divide_up(num_codes, GramRows::kBlock)),
        int8_(kernels.has_int8 && num_codes >= kInt8MinCodes) {
    set_gram(false);
  }

  int64_t bytes() const { return bytes_; }
  bool int8() const { return int8_; }
  bool gram() const { return gram_; }
  int64_t scores_per_row() const { return num_blocks_ * (GramRows::kBlock + 1) + 8; }
  const PackedCodebook& at(int64_t depth) const { return views_[index(depth)]; }

  // As `at`, with float panels. With int8, the first thread that asks for them packs them; if memory runs out there are
  // none, and the scan packs on demand.
  PackedCodebook with_float_panels(int64_t depth) const {
    PackedCodebook view = views_[index(depth)];
    if (view.panels != nullptr) return view;
    LazyPanels& lazy = float_panels_[index(depth)];
    std::call_once(lazy.once, [&] {
      lazy.memory = Buffer<float>::if_available(padded() * channels_);
      if (lazy.memory != nullptr) kernels_.pack_float(view, 0, num_panels_, lazy.memory);
    });
    view.panels = lazy.memory;
    return view;
  }

  const int8_t* gram_row(int64_t code) const { return views_[0].gram.rows + code * num_blocks_ * GramRows::kBlock; }

  // Bytes of the float panels that `with_float_panels` may pack.
  int64_t lazy_bytes() const {
    return int8_ ? static_cast<int64_t>(views_.size() * sizeof(float)) * padded() * channels_ : 0;
  }

  // Measures `count` consecutive codebooks. Returns false if a code is not finite.
  bool measure(const float* codebooks, int64_t count) {
    KeepDenormals keep;
    set_count(count);
    squared_norms_ = Buffer<double>(count * num_codes_);
    centered_norms_ = Buffer<double>(count * num_codes_);
    centers_.clear();
    for (int64_t d = 0; d < count; ++d) {
      const float* codes_kc = codebooks + d * num_codes_ * channels_;
      views_[d].codes_kc = codes_kc;
      if (int8_) centers_.push_back(codebook_center(codes_kc, num_codes_, channels_));
      const float* mean = int8_ && centers_.back().norm > 0 ? centers_.back().values.data() : nullptr;
      for_panels([&](int64_t begin, int64_t end) {
        kernels_.measure(codes_kc, channels_, mean, begin * kernels_.panel_width,
                         std::min(end * kernels_.panel_width, num_codes_), squared_norms(d), centered_norms(d));
      });
    }
    // Squares of floats cannot overflow float64, so a norm is finite exactly if the code is.
    return std::all_of(squared_norms(0), squared_norms(count), [](double norm) { return std::isfinite(norm); });
  }

  // A hash of the measured norms, which almost always differs for other codebooks.
  uint64_t fingerprint() const {
    uint64_t hash = 0;
    for (const double* norm = squared_norms(0); norm < squared_norms(views_.size()); ++norm) {
      uint64_t bits;
      std::memcpy(&bits, norm, sizeof bits);
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    return hash;
  }

  // Whether Gram rows are useful for the one measured codebook.
  bool gram_pays() const {
    const double norm = std::sqrt(*std::max_element(centered_norms(0), centered_norms(1)));
    return kernels_.pack_gram != nullptr && int8_ && channels_ >= kGramMinChannels && gram_bytes() <= kGramMaxBytes &&
           norm > kGramMinNorm && norm < kGramMaxNorm;
  }
  void set_gram(bool gram) {
    gram_ = gram;
    PackedCodebook unused;
    bytes_ = place(nullptr, unused);
  }

  // Packs the measured codebooks.
  void fill(uint8_t* memory) {
    for (size_t d = 0; d < views_.size(); ++d) {
      PackedCodebook& view = views_[d];
      const float* codes_kc = view.codes_kc;
      place(memory + static_cast<int64_t>(d) * bytes_, view);
      view.codes_kc = codes_kc;
      pack(view, d);
      if (int8_) measure_blocks(view);
      if (gram_) fill_gram(view);
      const Header header = header_of(view);
      std::memcpy(memory + static_cast<int64_t>(d) * bytes_, &header, sizeof header);
    }
    squared_norms_ = Buffer<double>();
    centered_norms_ = Buffer<double>();
  }

  // Opens what an earlier `fill` wrote for one codebook. Returns false if the memory holds something else.
  bool open(const uint8_t* memory, int64_t size, const float* codebook) {
    Header header;
    if (!read_header(memory, size, header)) return false;
    set_gram(header.gram != 0);
    set_count(1);
    PackedCodebook& view = views_[0];
    place(const_cast<uint8_t*>(memory), view);  // the scans only read
    view.codes_kc = codebook;
    view.max_norm = header.max_norm;
    view.int8.mean_norm = header.mean_norm;
    view.int8.num_outliers = header.num_outliers;
    view.gram.max_norm = header.gram_max_norm;
    view.gram.min_norm = header.gram_min_norm;
    view.gram.relative_error = header.gram_relative_error;
    const Header expected = header_of(view);
    return size == bytes_ && std::memcmp(&header, &expected, sizeof header) == 0;
  }

  // Whether the result of `fill` for one codebook has Gram rows.
  static bool has_gram(const uint8_t* memory, int64_t size) {
    Header header;
    return read_header(memory, size, header) && header.gram != 0;
  }

 private:
  // Fields of eight bytes each, no pointers.
  struct Header {
    int64_t capability, num_codes, channels, gram;
    int64_t num_outliers;
    double max_norm, mean_norm, gram_max_norm, gram_min_norm, gram_relative_error;
  };

  static bool read_header(const uint8_t* memory, int64_t size, Header& header) {
    if (size < static_cast<int64_t>(sizeof header) || reinterpret_cast<uintptr_t>(memory) % 64 != 0) return false;
    std::memcpy(&header, memory, sizeof header);
    return true;
  }

  Header header_of(const PackedCodebook& view) const {
    Header header{};
    header.capability = static_cast<int64_t>(cpu_capability());
    header.num_codes = num_codes_;
    header.channels = channels_;
    header.gram = gram_;
    header.num_outliers = view.int8.num_outliers;
    header.max_norm = view.max_norm;
    header.mean_norm = view.int8.mean_norm;
    header.gram_max_norm = view.gram.max_norm;
    header.gram_min_norm = view.gram.min_norm;
    header.gram_relative_error = view.gram.relative_error;
    return header;
  }

  struct LazyPanels {
    std::once_flag once;
    Buffer<float> memory;
  };

  size_t index(int64_t depth) const { return views_.size() == 1 ? 0 : static_cast<size_t>(depth); }
  void set_count(int64_t count) {
    views_.assign(static_cast<size_t>(count), PackedCodebook{});
    float_panels_ = std::vector<LazyPanels>(static_cast<size_t>(count));
  }
  int64_t gram_bytes() const { return num_codes_ * num_blocks_ * GramRows::kBlock; }
  int64_t padded() const { return num_panels_ * kernels_.panel_width; }
  double* squared_norms(size_t depth) const { return squared_norms_ + static_cast<int64_t>(depth) * num_codes_; }
  double* centered_norms(size_t depth) const { return centered_norms_ + static_cast<int64_t>(depth) * num_codes_; }

  // Points the parts of a codebook into the memory, and returns their total size.
  int64_t place(uint8_t* memory, PackedCodebook& view) const {
    int64_t used = 0;
    auto take = [&used, memory](auto*& part, int64_t size) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory + used);
      used += divide_up(size * static_cast<int64_t>(sizeof *part), 64) * 64;
    };
    view = PackedCodebook{};
    view.num_codes = num_codes_;
    view.channels = channels_;
    Header* header;
    take(header, 1);
    take(view.order, padded());
    take(view.half_norms, padded());
    take(view.panel_norms, num_panels_);
    if (!int8_) {
      take(view.panels, padded() * channels_);
      return used;
    }
    take(view.int8.bytes, padded() * divide_up(channels_, 8) * 8);
    take(view.int8.scale, padded());
    take(view.int8.offset, padded());
    take(view.int8.offset_centered, padded());
    take(view.int8.max_norm, num_panels_);
    take(view.int8.max_kept, num_panels_);
    take(view.int8.max_error, num_panels_);
    take(view.int8.mean, channels_);
    take(view.int8.outlier_channel, Int8Panels::kMaxOutliers);
    take(view.int8.kept, channels_);
    take(view.int8.outliers, Int8Panels::kMaxOutliers * padded());
    view.int8.outlier_stride = padded();
    if (!gram_) return used;
    take(view.gram.scale, num_codes_);
    take(view.gram.error, num_codes_);
    take(view.gram.diagonal, num_codes_);
    take(view.gram.place, num_codes_);
    take(view.gram.block_norm, num_blocks_ + 8);
    take(view.gram.rows, gram_bytes());
    return used;
  }

  // Finds the channels whose root mean square over the codes is kOutlierRatio times that of all others.
  void find_outliers(PackedCodebook& view) const {
    Int8Panels& int8 = view.int8;
    const int64_t step = divide_up(num_codes_, kCenterSample);
    std::vector<double> squared(static_cast<size_t>(channels_), 0.0);
    for (int64_t k = 0; k < num_codes_; k += step) {
      for (int64_t c = 0; c < channels_; ++c) {
        const double e = double(view.codes_kc[k * channels_ + c]) - double(int8.mean[c]);
        squared[c] += e * e;
      }
    }
    double rest = std::accumulate(squared.begin(), squared.end(), 0.0);
    while (int8.num_outliers < Int8Panels::kMaxOutliers && int8.num_outliers + 1 < channels_) {
      const auto largest = std::max_element(squared.begin(), squared.end());
      const double others = rest - *largest, count = static_cast<double>(channels_ - int8.num_outliers - 1);
      if (!(*largest > kOutlierRatio * kOutlierRatio * others / count)) break;
      int8.outlier_channel[int8.num_outliers++] = largest - squared.begin();
      rest = others;
      *largest = 0;
    }
    std::fill(int8.kept, int8.kept + channels_, 1.0f);
    for (int64_t o = 0; o < int8.num_outliers; ++o) int8.kept[int8.outlier_channel[o]] = 0;
  }

  // Runs body(begin, end) over all panels, on all threads.
  template <class Body>
  void for_panels(const Body& body) const {
    torch::stable::parallel_for(0, num_panels_, kPanelsPerTask, [&body](int64_t begin, int64_t end) {
      KeepDenormals keep;
      body(begin, end);
    });
  }

  void pack(PackedCodebook& view, size_t depth) const {
    const double *squared = squared_norms(depth), *centered = centered_norms(depth);
    view.max_norm = std::sqrt(*std::max_element(squared, squared + num_codes_));
    if (int8_) {
      std::copy(centers_[depth].values.begin(), centers_[depth].values.end(), view.int8.mean);
      view.int8.mean_norm = centers_[depth].norm;
      find_outliers(view);
    }
    order_by_size(centered, num_codes_, padded(), view.order);
    for_panels([&](int64_t begin, int64_t end) { kernels_.pack(view, squared, centered, begin, end); });
    if (view.panels == nullptr) return;
    for_panels(
        [&](int64_t begin, int64_t end) { kernels_.pack_float(view, begin, end, const_cast<float*>(view.panels)); });
  }

  // Computes the norms of the blocks (with Gram rows) and their extremes.
  void measure_blocks(PackedCodebook& view) const {
    GramRows& gram = view.gram;
    const float* panel_norm = view.int8.max_norm;
    gram.max_norm = *std::max_element(panel_norm, panel_norm + num_panels_);
    gram.min_norm = gram.max_norm;
    if (!gram_) return;
    const int64_t panels = GramRows::kBlock / kernels_.panel_width;
    for (int64_t b = 0; b < num_blocks_ + 8; ++b) {
      const int64_t begin = std::min(b * panels, num_panels_), end = std::min((b + 1) * panels, num_panels_);
      const float least = static_cast<float>(kGramNormSpread * gram.max_norm);
      float& norm = gram.block_norm[b];
      norm = b < num_blocks_ ? std::max(least, *std::max_element(panel_norm + begin, panel_norm + end))
                             : static_cast<float>(gram.max_norm);
      gram.min_norm = std::min<double>(gram.min_norm, norm);
      for (int64_t panel = begin; panel < end; ++panel) {
        gram.relative_error = std::max(gram.relative_error, double(view.int8.max_error[panel]) / double(norm));
      }
    }
  }

  void fill_gram(PackedCodebook& view) const {
    for (int64_t place = 0; place < num_codes_; ++place) view.gram.place[view.order[place]] = place;
    Buffer<float> panels(padded() * channels_);
    for_panels([&](int64_t begin, int64_t end) { kernels_.pack_centered(view, begin, end, panels); });
    // Allocate here: an exception inside parallel_for would lose its message. Each worker owns one slot.
    const int64_t tasks = divide_up(num_codes_, kernels_.gram_rows_at_once);
    const int64_t slots = std::min<int64_t>(std::max<int64_t>(1, torch::stable::get_num_threads()), tasks);
    const int64_t scratch_size = kernels_.gram_rows_at_once * (channels_ + num_blocks_ * GramRows::kBlock);
    Buffer<float> scratch(slots * scratch_size);
    for_each_task(slots, [&](int64_t slot) {
      for (int64_t task = slot; task < tasks; task += slots) {
        const int64_t first = task * kernels_.gram_rows_at_once;
        kernels_.pack_gram(view, panels, first, std::min(first + kernels_.gram_rows_at_once, num_codes_),
                           scratch + slot * scratch_size);
      }
    });
  }

  const ResidualSearchKernels& kernels_;
  int64_t num_codes_, channels_, num_panels_, num_blocks_, bytes_;
  bool int8_, gram_;
  std::vector<PackedCodebook> views_;
  // Norms of all codes of all codebooks, between `measure` and `fill`.
  Buffer<double> squared_norms_, centered_norms_;
  std::vector<CodebookCenter> centers_;
  mutable std::vector<LazyPanels> float_panels_;
};

}  // namespace
}  // namespace rqk
