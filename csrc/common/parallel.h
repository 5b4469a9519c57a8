// Threads and memory of the CPU kernels. For cpu.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <thread>
#include <utility>

#include "common/denormals.h"
#include "common/memory.h"

namespace rqk {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialized memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : Buffer(if_available(size)) {
    if (data_ == nullptr) refuse_cpu_bytes(bytes(size));
  }
  // Null if there is not enough memory.
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

// Runs work(task) on all threads, which handle denormals as `Denormals` says.
template <class Denormals = KeepDenormals, class Work>
void for_each_task(int64_t tasks, Work work) {
  torch::stable::parallel_for(0, tasks, 1, [&work](int64_t begin, int64_t end) {
    const Denormals denormals;
    for (int64_t task = begin; task < end; ++task) work(task);
  });
}

// A sequence of short phases that all threads work on; each phase begins when the previous one is complete. A parallel
// region per phase would cost several microseconds, this costs a fraction of one. A late thread skips finished phases,
// and no thread waits for one that has not arrived, so any number of threads may take part.
class Phases {
 public:
  // Runs work(task) for tasks 0 .. tasks - 1 (at least one) on the threads that have arrived. Every thread must run the
  // same phases in the same order, numbered from 0. Returns when the phase is complete.
  template <class Work>
  void run(uint32_t phase, uint32_t tasks, Work work) {
    for (int turns = 0;;) {
      uint64_t next = next_.load(std::memory_order_acquire);
      if (next >> 32 != phase) return;
      if (uint32_t(next) >= tasks) {
        // All tasks are taken. Completing them may take long if another process holds the core.
        if (++turns > kTurns) std::this_thread::yield();
        relax();
        continue;
      }
      if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
      work(int64_t(uint32_t(next)));
      if (complete_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
        complete_.store(0, std::memory_order_relaxed);
        next_.store(uint64_t(phase + 1) << 32, std::memory_order_release);
      }
    }
  }

 private:
  static constexpr int kTurns = 2000;
  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  alignas(64) std::atomic<uint64_t> next_{0};  // the phase (high half) and its next task
  alignas(64) std::atomic<uint32_t> complete_{0};
};

}  // namespace
}  // namespace rqk
