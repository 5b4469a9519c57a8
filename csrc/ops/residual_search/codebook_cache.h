// A cache of recently searched codebooks in packed form. For cpu.cpp.
//
// Callers search the same codebook repeatedly, and packing it costs a tenth of a search or more. Nothing but its
// contents shows that a codebook is unchanged: writes through `.data`, numpy or another process do not change a
// tensor's version. So contents are compared bit by bit with a copy, which costs little more than reading them.
//
// A codebook that changes at every training step must not pay for that. A copy is made only when contents come for the
// second time, which a fingerprint shows (a by-product of packing), and a comparison stops at the first difference. If
// entries of a shape were kept and never found again, the next one must come twice as often for each of them.
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

// Packed codebooks and their memory.
struct OwnedCodebooks {
  OwnedCodebooks(const ResidualSearchKernels& kernels, int64_t num_codes, int64_t channels)
      : packed(kernels, num_codes, channels) {}
  Buffer<float> values;  // a copy of the codebooks, in cache entries
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

  // Packs `count` consecutive codebooks (num_codes, channels), or finds them in the cache. Null if one is not finite.
  Codebooks pack(const ResidualSearchKernels& kernels, const float* values, int64_t count, int64_t num_codes,
                 int64_t channels) {
    const Shape shape{count, num_codes, channels};
    if (Codebooks found = find(shape, values)) return found;
    auto made = std::make_shared<OwnedCodebooks>(kernels, num_codes, channels);
    if (!made->packed.measure(values, count)) return nullptr;
    const int64_t bytes =
        shape.values() * static_cast<int64_t>(sizeof(float)) + count * made->packed.bytes() + made->packed.lazy_bytes();
    const bool kept = is_to_keep(shape, made->packed.fingerprint(), bytes) && copy_values(shape, values, *made);
    // An entry is made from the copy only: another thread could be changing the original.
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
  // Elements per comparison: a difference is found soon, and all threads share a large codebook.
  static constexpr int64_t kPart = 1 << 16;

  // A forked child has none of the threads that may be using an entry: it starts with an empty cache.
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
    if (to.values == nullptr) return false;  // the search works without an entry
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
    std::list<Entry> dropped;  // freed after the lock is released
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
  // Both ordered by last use, the latest first.
  std::list<Entry> entries_;
  std::list<Seen> seen_;
  int64_t found_ = 0;
};

}  // namespace
}  // namespace rqk
