// A codebook in the layout of the scans: how much memory that takes, where each part lies in it, and filling it. For
// cpu.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/residual_search/scan.h"

namespace rqk {
namespace {

constexpr int64_t kPanelsPerTask = 16;
// Below this many codes quantizing the rows costs more than the int8 scan saves.
constexpr int64_t kInt8MinCodes = 128;
// The vector in the middle of the codes is the mean of about so many of them: any vector serves.
constexpr int64_t kMeanSample = 256;
constexpr double kSmallOffset = 0.1;  // |mean|^2 over the mean of |e|^2
// Gram rows are at most so large, serve where a scan costs more than reading them, and need numbers whose products
// are floats.
constexpr int64_t kGramMaxBytes = int64_t(320) << 20;
constexpr int64_t kGramMinChannels = 32;
constexpr double kGramMinNorm = 1e-10, kGramMaxNorm = 1e10;
constexpr double kGramNormSpread = 1e-6;  // no block's size is below that share of the largest

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(bytes(size), kAlignment))) {}
  // Empty where there is no memory left.
  static Buffer if_available(int64_t size) {
    Buffer buffer;
    buffer.data_ = static_cast<T*>(::operator new(bytes(size), kAlignment, std::nothrow));
    return buffer;
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { ::operator delete(data_, kAlignment); }
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(T); }
  T* data_ = nullptr;
};

template <class Work>
void for_each_task(int64_t tasks, Work work) {
  torch::stable::parallel_for(0, tasks, 1, [&work](int64_t begin, int64_t end) {
    KeepDenormals keep;
    for (int64_t task = begin; task < end; ++task) work(task);
  });
}

// Places of the codes in ascending order of size, coarsely: a counting sort by exponent and three bits of mantissa.
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

// Codebooks of one size in the layout of the scans, in memory of the caller's: `bytes` for each, aligned to a cache
// line and free of pointers, so that it can be a tensor's. As much as the codebook, or a quarter with int8; with Gram
// rows another byte for each pair of codes.
class PackedCodebooks {
 public:
  PackedCodebooks(const SearchKernel& kernel, int64_t num_codes, int64_t channels)
      : kernel_(kernel),
        num_codes_(num_codes),
        channels_(channels),
        num_panels_(divide_up(num_codes, kernel.panel_width)),
        num_blocks_(divide_up(num_codes, GramRows::kBlock)),
        int8_(kernel.int8 && num_codes >= kInt8MinCodes) {
    set_gram(false);
  }

  int64_t bytes() const { return bytes_; }
  bool int8() const { return int8_; }
  bool gram() const { return gram_; }
  int64_t scores_per_row() const { return num_blocks_ * (GramRows::kBlock + 1) + 8; }
  const PackedCodebook& at(int64_t depth) const { return views_[index(depth)]; }

  // As `at`, with float panels. With int8 they are made when they are first asked for, by whichever thread asks; where
  // memory has run out there are none, and the scan packs as it goes.
  PackedCodebook with_float_panels(int64_t depth) const {
    PackedCodebook view = views_[index(depth)];
    if (view.panels != nullptr) return view;
    LazyPanels& lazy = float_panels_[index(depth)];
    std::call_once(lazy.once, [&] {
      lazy.memory = Buffer<float>::if_available(padded() * channels_);
      if (lazy.memory != nullptr) kernel_.pack_float(view, 0, num_panels_, lazy.memory);
    });
    view.panels = lazy.memory;
    return view;
  }

  const int8_t* gram_row(int64_t code) const { return views_[0].gram.rows + code * num_blocks_ * GramRows::kBlock; }

  // Whether Gram rows would serve the one codebook that was packed.
  bool gram_pays() const {
    const double norm = views_[0].gram.max_norm;
    return int8_ && channels_ >= kGramMinChannels && gram_bytes() <= kGramMaxBytes && norm > kGramMinNorm &&
           norm < kGramMaxNorm;
  }
  void set_gram(bool gram) {
    gram_ = gram;
    PackedCodebook unused;
    bytes_ = place(nullptr, unused);
  }

  // Packs `count` codebooks, `stride` floats apart.
  void fill(uint8_t* memory, const float* codebooks, int64_t stride, int64_t count) {
    set_count(count);
    for (int64_t d = 0; d < count; ++d) {
      place(memory + d * bytes_, views_[d]);
      views_[d].codes_kc = codebooks + d * stride;
      if (int8_) find_mean(views_[d]);
    }
    pack();
    for (PackedCodebook& view : views_) {
      if (int8_) measure_blocks(view);
      if (gram_) fill_gram(view);
    }
    for (int64_t d = 0; d < count; ++d) {
      const Header header = header_of(views_[d]);
      std::memcpy(memory + d * bytes_, &header, sizeof header);
    }
  }

  // Takes up what an earlier `fill` made of one codebook. False where the memory holds something else.
  bool open(const uint8_t* memory, int64_t size, const float* codebook) {
    if (size < static_cast<int64_t>(sizeof(Header)) || reinterpret_cast<uintptr_t>(memory) % 64 != 0) return false;
    Header header;
    std::memcpy(&header, memory, sizeof header);
    set_gram(header.gram != 0);
    set_count(1);
    PackedCodebook& view = views_[0];
    place(const_cast<uint8_t*>(memory), view);  // the scans read alone
    view.codes_kc = codebook;
    view.max_norm = header.max_norm;
    view.int8.mean_norm = header.mean_norm;
    view.gram.max_norm = header.gram_max_norm;
    view.gram.min_norm = header.gram_min_norm;
    view.gram.relative_error = header.gram_relative_error;
    const Header expected = header_of(view);
    return size == bytes_ && std::memcmp(&header, &expected, sizeof header) == 0;
  }

 private:
  // Numbers alone, of eight bytes each.
  struct Header {
    int64_t capability, num_codes, channels, gram;
    double max_norm, mean_norm, gram_max_norm, gram_min_norm, gram_relative_error;
  };

  Header header_of(const PackedCodebook& view) const {
    return {static_cast<int64_t>(cpu_capability()),
            num_codes_,
            channels_,
            gram_,
            view.max_norm,
            view.int8.mean_norm,
            view.gram.max_norm,
            view.gram.min_norm,
            view.gram.relative_error};
  }

  struct LazyPanels {
    std::once_flag once;
    Buffer<float> memory;
  };

  size_t index(int64_t depth) const { return views_.size() == 1 ? 0 : static_cast<size_t>(depth); }
  void set_count(int64_t count) {
    views_.resize(static_cast<size_t>(count));
    float_panels_ = std::vector<LazyPanels>(static_cast<size_t>(count));
  }
  int64_t gram_bytes() const { return num_codes_ * num_blocks_ * GramRows::kBlock; }
  int64_t padded() const { return num_panels_ * kernel_.panel_width; }

  // Points the parts of a codebook into the memory, and returns how much they take.
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
    take(view.int8.bytes, padded() * divide_up(channels_, 4) * 4);
    take(view.int8.scale, padded());
    take(view.int8.offset, padded());
    take(view.int8.offset_centred, padded());
    take(view.int8.max_norm, num_panels_);
    take(view.int8.max_error, num_panels_);
    take(view.int8.mean, channels_);
    if (!gram_) return used;
    take(view.gram.scale, num_codes_);
    take(view.gram.error, num_codes_);
    take(view.gram.diagonal, num_codes_);
    take(view.gram.place, num_codes_);
    take(view.gram.block_norm, num_blocks_ + 8);
    take(view.gram.rows, gram_bytes());
    return used;
  }

  void find_mean(PackedCodebook& view) const {
    const int64_t step = divide_up(num_codes_, kMeanSample), sampled = divide_up(num_codes_, step);
    double squared = 0, spread = 0;
    std::vector<double> sum(static_cast<size_t>(channels_), 0.0);
    for (int64_t k = 0; k < num_codes_; k += step) {
      for (int64_t c = 0; c < channels_; ++c) {
        const double e = view.codes_kc[k * channels_ + c];
        sum[c] += e;
        spread += e * e / static_cast<double>(sampled);
      }
    }
    for (int64_t c = 0; c < channels_; ++c) {
      view.int8.mean[c] = static_cast<float>(sum[c] / static_cast<double>(sampled));
      squared += double(view.int8.mean[c]) * double(view.int8.mean[c]);
    }
    // A small offset is not worth the second look at every row.
    if (squared < kSmallOffset * spread) {
      std::fill(view.int8.mean, view.int8.mean + channels_, 0.0f);
      squared = 0;
    }
    view.int8.mean_norm = std::sqrt(squared);
  }

  // body(begin, end) over all panels, on all threads.
  template <class Body>
  void for_panels(const Body& body) const {
    torch::stable::parallel_for(0, num_panels_, kPanelsPerTask, [&body](int64_t begin, int64_t end) {
      KeepDenormals keep;
      body(begin, end);
    });
  }

  void pack() {
    const int64_t width = kernel_.panel_width;
    Buffer<double> squared_norms(num_codes_), centred_norms(num_codes_);
    for (PackedCodebook& view : views_) {
      const float* mean = int8_ && view.int8.mean_norm > 0 ? view.int8.mean : nullptr;
      for_panels([&](int64_t begin, int64_t end) {
        kernel_.measure(view.codes_kc, channels_, mean, begin * width, std::min(end * width, num_codes_), squared_norms,
                        centred_norms);
      });
      view.max_norm = std::sqrt(*std::max_element<double*>(squared_norms, squared_norms + num_codes_));
      order_by_size(centred_norms, num_codes_, padded(), view.order);
      for_panels([&](int64_t begin, int64_t end) { kernel_.pack(view, squared_norms, centred_norms, begin, end); });
      if (view.panels == nullptr) continue;
      for_panels(
          [&](int64_t begin, int64_t end) { kernel_.pack_float(view, begin, end, const_cast<float*>(view.panels)); });
    }
  }

  // Sizes of the blocks, where there are any, and of them all.
  void measure_blocks(PackedCodebook& view) const {
    GramRows& gram = view.gram;
    const float* panel_norm = view.int8.max_norm;
    gram.max_norm = *std::max_element(panel_norm, panel_norm + num_panels_);
    gram.min_norm = gram.max_norm;
    if (!gram_) return;
    const int64_t panels = GramRows::kBlock / kernel_.panel_width;
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
    for_panels([&](int64_t begin, int64_t end) { kernel_.pack_centred(view, begin, end, panels); });
    // Memory is taken here: an exception inside parallel_for would lose its message. Each worker owns one slot.
    const int64_t tasks = divide_up(num_codes_, kernel_.gram_rows_at_once);
    const int64_t slots = std::min<int64_t>(std::max<int64_t>(1, torch::stable::get_num_threads()), tasks);
    const int64_t scratch_size = kernel_.gram_rows_at_once * (channels_ + num_blocks_ * GramRows::kBlock);
    Buffer<float> scratch(slots * scratch_size);
    for_each_task(slots, [&](int64_t slot) {
      for (int64_t task = slot; task < tasks; task += slots) {
        const int64_t first = task * kernel_.gram_rows_at_once;
        kernel_.pack_gram(view, panels, first, std::min(first + kernel_.gram_rows_at_once, num_codes_),
                          scratch + slot * scratch_size);
      }
    });
  }

  const SearchKernel& kernel_;
  int64_t num_codes_, channels_, num_panels_, num_blocks_, bytes_;
  bool int8_, gram_;
  std::vector<PackedCodebook> views_;
  mutable std::vector<LazyPanels> float_panels_;
};

}  // namespace
}  // namespace rqk
