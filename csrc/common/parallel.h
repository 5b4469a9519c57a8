// Threads and memory of the CPU kernels. For cpu.cpp files.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "common/denormals.h"

namespace rqk {
namespace {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// work(task) on all threads, which treat denormals as said.
template <class Denormals = KeepDenormals, class Work>
void for_each_task(int64_t tasks, Work work) {
  torch::stable::parallel_for(0, tasks, 1, [&work](int64_t begin, int64_t end) {
    const Denormals denormals;
    for (int64_t task = begin; task < end; ++task) work(task);
  });
}

}  // namespace
}  // namespace rqk
