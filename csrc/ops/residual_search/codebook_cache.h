// Codebooks that were searched lately, kept in their packed form. For cpu.cpp.
//
// Callers search the same codebook again and again, and packing it costs a tenth of a search or more. Nothing outside a
// codebook tells that it is still the same: writes through `.data`, numpy or another process leave a tensor's version
// as it was. So its contents are compared with a copy, bit for bit, which costs little more than reading it.
//
// A codebook that training changes at every step must not pay for that: a copy is made only of contents that come a
// second time, which their fingerprint tells (packing has it for nothing), and an entry of other contents is dismissed
// at the first difference. Where entries of a shape were kept and never found again, the next must come twice as often
// for each of them.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ops/residual_search/packed_codebook.h"
#include "ops/residual_search/params.h"

namespace rqk {
namespace {

// A packed form with the memory it lies in.
struct OwnedCodebooks {
  OwnedCodebooks(const ResidualSearchKernels& kernels, int64_t num_codes, int64_t channels)
      : packed(kernels, num_codes, channels) {}
  Buffer<float> values;  // a copy of the codebooks, in an entry
  Buffer<uint8_t> memory;
  PackedCodebooks packed;
};

class CodebookCache {
 public:
  static constexpr size_t kMostEntries = 8;
  static constexpr int64_t kMostBytes = int64_t(96) << 20;

  using Codebooks = std::shared_ptr<const OwnedCodebooks>;

  static CodebookCache& of_this_process() {
    static CodebookCache* cache = new CodebookCache;  // never destroyed: threads may outlive static objects
    return *cache;
  }

  // `count` codebooks (num_codes, channels), one after another, packed. Null where one of them is not finite.
  Codebooks pack(const ResidualSearchKernels& kernels, const float* values, int64_t count, int64_t num_codes,
                 int64_t channels) {
    const Shape shape{count, num_codes, channels};
    if (Codebooks found = find(shape, values)) return found;
    auto made = std::make_shared<OwnedCodebooks>(kernels, num_codes, channels);
    if (!made->packed.measure(values, count)) return nullptr;
    const int64_t bytes =
        shape.values() * static_cast<int64_t>(sizeof(float)) + count * made->packed.bytes() + made->packed.lazy_bytes();
    const bool kept = is_to_keep(shape, made->packed.fingerprint(), bytes) && copy_values(shape, values, *made);
    // What is kept is made of the copy alone: of the original, another thread could change a part meanwhile.
    if (kept && !made->packed.measure(made->values, count)) return nullptr;
    made->memory = Buffer<uint8_t>(count * made->packed.bytes());
    made->packed.fill(made->memory);
    if (kept) keep({shape, made, bytes, 0});
    return made;
  }

  CodebookCacheState state() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {static_cast<int64_t>(entries_.size()), bytes(), found_};
  }

 private:
  struct Shape {
    int64_t count, num_codes, channels;
    int64_t values() const { return count * num_codes * channels; }
    bool operator==(const Shape& other) const {
      return count == other.count && num_codes == other.num_codes && channels == other.channels;
    }
  };
  struct Entry {
    Shape shape;
    Codebooks codebooks;
    int64_t bytes, found;
  };
  struct Seen {
    Shape shape;
    uint64_t fingerprint;
    int64_t times;
  };
  static constexpr size_t kMostSeen = 32;
  // Compared at a time: a difference is soon found, and all threads have a share of a large codebook.
  static constexpr int64_t kPart = 1 << 16;

  // A forked child has none of the threads that may be at work on an entry: it starts anew.
  CodebookCache() {
    pthread_atfork([] { of_this_process().mutex_.lock(); }, [] { of_this_process().mutex_.unlock(); },
                   [] {
                     of_this_process().entries_.clear();
                     of_this_process().mutex_.unlock();
                   });
  }

  static bool equal(const float* a, const float* b, int64_t size) {
    auto equal_part = [a, b, size](int64_t part) {
      const int64_t begin = part * kPart, length = std::min(kPart, size - begin);
      return std::memcmp(a + begin, b + begin, static_cast<size_t>(length) * sizeof(float)) == 0;
    };
    if (!equal_part(0)) return false;
    std::atomic<bool> same{true};
    for_each_task(divide_up(size, kPart) - 1, [&](int64_t task) {
      if (same.load(std::memory_order_relaxed) && !equal_part(task + 1)) same = false;
    });
    return same;
  }

  static bool copy_values(const Shape& shape, const float* values, OwnedCodebooks& to) {
    to.values = Buffer<float>::if_available(shape.values());
    if (to.values == nullptr) return false;  // the search can do without
    std::copy(values, values + shape.values(), to.values + 0);
    return true;
  }

  Codebooks find(const Shape& shape, const float* values) {
    std::vector<Codebooks> candidates;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const Entry& entry : entries_) {
        if (entry.shape == shape) candidates.push_back(entry.codebooks);
      }
    }
    for (const Codebooks& codebooks : candidates) {
      if (!equal(codebooks->values, values, shape.values())) continue;
      std::lock_guard<std::mutex> lock(mutex_);
      ++found_;
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
        if (entry->codebooks != codebooks) continue;
        ++entry->found;
        entries_.splice(entries_.begin(), entries_, entry);
        break;
      }
      return codebooks;
    }
    return nullptr;
  }

  bool is_to_keep(const Shape& shape, uint64_t fingerprint, int64_t bytes) {
    if (bytes > kMostBytes) return false;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto never_found = std::count_if(entries_.begin(), entries_.end(), [&shape](const Entry& entry) {
      return entry.shape == shape && entry.found == 0;
    });
    auto seen = std::find_if(seen_.begin(), seen_.end(), [&](const Seen& other) {
      return other.shape == shape && other.fingerprint == fingerprint;
    });
    if (seen == seen_.end()) {
      seen_.push_front({shape, fingerprint, 1});
      if (seen_.size() > kMostSeen) seen_.pop_back();
      return false;
    }
    if (++seen->times < int64_t(2) << never_found) {
      seen_.splice(seen_.begin(), seen_, seen);
      return false;
    }
    seen_.erase(seen);
    return true;
  }

  void keep(Entry entry) {
    std::list<Entry> dropped;  // freed once the lock is given back
    std::lock_guard<std::mutex> lock(mutex_);
    entries_.push_front(std::move(entry));
    while (entries_.size() > kMostEntries || bytes() > kMostBytes) {
      dropped.splice(dropped.begin(), entries_, std::prev(entries_.end()));
    }
  }

  int64_t bytes() const {
    int64_t sum = 0;
    for (const Entry& entry : entries_) sum += entry.bytes;
    return sum;
  }

  std::mutex mutex_;
  // Both in the order of their last use, the latest first.
  std::list<Entry> entries_;
  std::list<Seen> seen_;
  int64_t found_ = 0;
};

}  // namespace
}  // namespace rqk
