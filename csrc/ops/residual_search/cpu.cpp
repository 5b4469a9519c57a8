// Residual search on the CPU: threads, scratch memory and the loop over depths around the scan of cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/residual_search/params.h"
#include "ops/residual_search/scan.h"

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
// Below this many codes quantizing the rows costs more than the int8 scan saves.
constexpr int64_t kInt8MinCodes = 128;
// The vector in the middle of the codes is the mean of about so many of them: any vector serves.
constexpr int64_t kMeanSample = 256;
constexpr double kSmallOffset = 0.1;  // |mean|^2 over the mean of |e|^2

const SearchKernel& kernel_of_this_machine() {
#ifdef RQK_X86
  if (cpu_capability() == CpuCapability::kAvx512) return avx512::search_kernel;
  if (cpu_capability() == CpuCapability::kAvx2) return avx2::search_kernel;
#endif
  return default_::search_kernel;
}

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
  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(T); }
  T* data_ = nullptr;
};

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

// The codebooks of all depths in the layout of the scans: as much memory as the codebooks, or a quarter with int8.
class PackedCodebooks {
 public:
  PackedCodebooks(const ResidualSearchParams& p, const SearchKernel& kernel)
      : kernel_(kernel),
        count_(p.codebook_stride == 0 ? 1 : p.depth),
        num_panels_(divide_up(p.num_codes, kernel.panel_width)),
        padded_(num_panels_ * kernel.panel_width),
        int8_(kernel.int8 && p.num_codes >= kInt8MinCodes),
        order_(count_ * padded_),
        floats_(count_ * floats_per_codebook(p)),
        bytes_(int8_ ? count_ * padded_ * divide_up(p.channels, 4) * 4 : 0),
        float_panels_(static_cast<size_t>(count_)) {
    for (int64_t d = 0; d < count_; ++d) views_.push_back(view(p, d));
    pack();
    for (int64_t d = 0; !int8_ && d < count_; ++d) {
      float_panels_[d].memory = Buffer<float>(padded_ * p.channels);
      for_panels([&](int64_t begin, int64_t end) {
        kernel_.pack_float(views_[d], begin, end, float_panels_[d].memory.data());
      });
      views_[d].panels = float_panels_[d].memory.data();
    }
  }
  bool int8() const { return int8_; }
  const PackedCodebook& at(int64_t depth) const { return views_[index(depth)]; }

  // As `at`, with float panels. With int8 they are made when they are first asked for, by whichever thread asks; where
  // memory has run out there are none, and the scan packs as it goes.
  PackedCodebook with_float_panels(int64_t depth) const {
    PackedCodebook v = views_[index(depth)];
    if (v.panels != nullptr) return v;
    LazyPanels& lazy = float_panels_[index(depth)];
    std::call_once(lazy.once, [&] {
      lazy.memory = Buffer<float>::if_available(padded_ * v.channels);
      if (lazy.memory.data() != nullptr) kernel_.pack_float(v, 0, num_panels_, lazy.memory.data());
    });
    v.panels = lazy.memory.data();
    return v;
  }

 private:
  struct LazyPanels {
    std::once_flag once;
    Buffer<float> memory;
  };

  size_t index(int64_t depth) const { return static_cast<size_t>(count_ == 1 ? 0 : depth); }

  int64_t floats_per_codebook(const ResidualSearchParams& p) const {
    return padded_ + num_panels_ + (int8_ ? 3 * padded_ + 2 * num_panels_ + p.channels : 0);
  }

  PackedCodebook view(const ResidualSearchParams& p, int64_t d) {
    PackedCodebook v{};
    v.codes_kc = p.codebooks + d * p.codebook_stride;
    v.num_codes = p.num_codes;
    v.channels = p.channels;
    v.order = order_.data() + d * padded_;
    float* next = floats_.data() + d * floats_per_codebook(p);
    auto take = [&next](int64_t size) { return std::exchange(next, next + size); };
    v.half_norms = take(padded_);
    v.panel_norms = take(num_panels_);
    if (!int8_) return v;
    v.int8.bytes = bytes_.data() + d * padded_ * divide_up(p.channels, 4) * 4;
    v.int8.scale = take(padded_);
    v.int8.offset = take(padded_);
    v.int8.offset_centred = take(padded_);
    v.int8.max_norm = take(num_panels_);
    v.int8.max_error = take(num_panels_);
    v.int8.mean = take(p.channels);
    find_mean(v);
    return v;
  }

  static void find_mean(PackedCodebook& v) {
    const int64_t step = divide_up(v.num_codes, kMeanSample), sampled = divide_up(v.num_codes, step);
    double squared = 0, spread = 0;
    std::vector<double> sum(static_cast<size_t>(v.channels), 0.0);
    for (int64_t k = 0; k < v.num_codes; k += step) {
      for (int64_t c = 0; c < v.channels; ++c) {
        const double e = v.codes_kc[k * v.channels + c];
        sum[c] += e;
        spread += e * e / static_cast<double>(sampled);
      }
    }
    for (int64_t c = 0; c < v.channels; ++c) {
      v.int8.mean[c] = static_cast<float>(sum[c] / static_cast<double>(sampled));
      squared += double(v.int8.mean[c]) * double(v.int8.mean[c]);
    }
    // A small offset is not worth the second look at every row.
    if (squared < kSmallOffset * spread) {
      std::fill(v.int8.mean, v.int8.mean + v.channels, 0.0f);
      squared = 0;
    }
    v.int8.mean_norm = std::sqrt(squared);
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
    const int64_t num_codes = views_[0].num_codes, width = kernel_.panel_width;
    Buffer<double> squared_norms(num_codes), centred_norms(num_codes);
    for (PackedCodebook& v : views_) {
      const float* mean = int8_ && v.int8.mean_norm > 0 ? v.int8.mean : nullptr;
      for_panels([&](int64_t begin, int64_t end) {
        kernel_.measure(v.codes_kc, v.channels, mean, begin * width, std::min(end * width, num_codes),
                        squared_norms.data(), centred_norms.data());
      });
      v.max_norm = std::sqrt(*std::max_element(squared_norms.data(), squared_norms.data() + num_codes));
      order_by_size(centred_norms.data(), num_codes, padded_, v.order);
      for_panels(
          [&](int64_t begin, int64_t end) { kernel_.pack(v, squared_norms.data(), centred_norms.data(), begin, end); });
    }
  }

  const SearchKernel& kernel_;
  int64_t count_, num_panels_, padded_;
  bool int8_;
  Buffer<int32_t> order_;
  Buffer<float> floats_;
  Buffer<uint8_t> bytes_;
  mutable std::vector<LazyPanels> float_panels_;
  std::vector<PackedCodebook> views_;
};

// Whether the int8 scan pays at a depth: not where it left most rows to the float scan so far.
class Worthwhile {
 public:
  bool operator()() const { return tried_ < kEnough || 2 * left_ < tried_; }
  void record(int64_t tried, int64_t left) {
    tried_ += tried;
    left_ += left;
  }

 private:
  static constexpr int64_t kEnough = 48;
  std::atomic<int64_t> tried_{0}, left_{0};
};

// All depths of rows [begin, end). Room for the rows' residuals, for their squared norms, and for one depth's codes.
void search_chunk(const ResidualSearchParams& p, const SearchKernel& kernel, const PackedCodebooks& codebooks,
                  std::vector<Worthwhile>& int8_pays, int64_t begin, int64_t end, float* residual, double* squared,
                  void* scratch, int64_t* codes) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const int64_t rows = end - begin, channels = p.channels;
  float* quantized = p.quantized + begin * channels;
  std::copy(p.x + begin * channels, p.x + end * channels, residual);
  std::fill(quantized, quantized + rows * channels, 0.0f);
  for (int64_t i = 0; i < rows; ++i) squared[i] = kernel.squared_norm(residual + i * channels, channels);
  for (int64_t d = 0; d < p.depth; ++d) {
    const bool try_int8 = codebooks.int8() && int8_pays[d]();
    const PackedCodebook codebook = try_int8 ? codebooks.at(d) : codebooks.with_float_panels(d);
    const int64_t left = kernel.nearest(codebook, residual, squared, rows, try_int8, scratch, codes);
    if (try_int8) int8_pays[d].record(rows, left);
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
      squared[i] = kernel.squared_norm(r, channels);
      p.residual_norms[(begin + i) * p.depth + d] = static_cast<float>(squared[i]);
    }
  }
}

}  // namespace

void launch(const ResidualSearchParams& p, void*) {
  const SearchKernel& kernel = kernel_of_this_machine();
  const PackedCodebooks codebooks(p, kernel);
  std::vector<Worthwhile> int8_pays(static_cast<size_t>(p.depth));
  // Small batches are cut finer, so that every thread has some rows.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t tiles_per_chunk =
      std::clamp<int64_t>(divide_up(divide_up(p.rows, threads), kernel.row_tile), 1, kTilesPerChunk);
  const int64_t chunk = tiles_per_chunk * kernel.row_tile, num_chunks = divide_up(p.rows, chunk);
  // Memory is taken here: an exception inside parallel_for would lose its message. Each worker owns one slot.
  const int64_t slots = std::min(threads, num_chunks);
  const int64_t scratch_bytes = static_cast<int64_t>(kernel.scratch_bytes(chunk, p.channels));
  Buffer<char> scratch(slots * scratch_bytes);
  Buffer<float> residuals(slots * chunk * p.channels);
  Buffer<double> squared(slots * chunk);
  Buffer<int64_t> codes(slots * chunk);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    KeepDenormals keep;
    for (int64_t slot = begin; slot < end; ++slot) {
      // Chunks are handed out one by one: some rows take longer than others.
      for (int64_t i = next++; i < num_chunks; i = next++) {
        search_chunk(p, kernel, codebooks, int8_pays, i * chunk, std::min((i + 1) * chunk, p.rows),
                     residuals.data() + slot * chunk * p.channels, squared.data() + slot * chunk,
                     scratch.data() + slot * scratch_bytes, codes.data() + slot * chunk);
      }
    }
  });
}

}  // namespace rqk
