// The stable tensor API under short names, and readable error messages. For op.cpp files.
//
// Errors are std::invalid_argument (ValueError in Python) and std::out_of_range (IndexError).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/float_type.h"
#include "common/memory.h"

// Text of torch's latest error in this thread. Only torch >= 2.13 has it, and this library also loads in older ones.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rqk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
[[noreturn]] void index_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::out_of_range(message.str());
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

// "(2, 8, 8)"
inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

// Formats a number as Python does: C++ also prints the sign of a NaN.
inline std::string number_text(double value) {
  if (std::isnan(value)) return "nan";
  std::ostringstream text;
  text << value;
  return text.str();
}

// A limit on the elements of a tensor. No memory holds more: only zero strides reach it, and a sum over them would
// never finish. Sizes below it can be multiplied without overflow.
constexpr int64_t kMostElements = int64_t(1) << 40;

// Counts dimensions of size zero as one, so that the other sizes are checked too.
inline void check_elements(const char* op, const char* name, const Tensor& t) {
  int64_t elements = 1;
  for (const int64_t size : t.sizes()) {
    if (__builtin_mul_overflow(elements, std::max<int64_t>(size, 1), &elements) || elements >= kMostElements) {
      value_error(op, ": ", name, " must have fewer than 2^40 elements, got ", shape_of(t));
    }
  }
}

[[noreturn]] inline void refuse_bytes(uint64_t bytes, const torch::stable::Device& device) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    const char* what = torch_exception_get_what_without_backtrace();
    if (what != nullptr && *what != '\0') throw std::runtime_error(what);
  }
  device.is_cuda() ? refuse_gpu_bytes(bytes) : refuse_cpu_bytes(bytes);
}

inline int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Bool:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

// Calls the allocator directly: the dispatcher adds 1 us, and 20 us with cold caches.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t elements = 1, bytes = 0;
  bool overflows = false;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = elements;
    overflows |= __builtin_mul_overflow(elements, std::max<int64_t>(sizes[i], 1), &elements);
  }
  overflows |= __builtin_mul_overflow(elements, bytes_of(type), &bytes);
  if (overflows) {
    std::string text;
    for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("Storage size calculation overflowed with sizes=[" + text + "]");
  }
  const torch::stable::Device device = like.device();
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               static_cast<int32_t>(type), static_cast<int32_t>(device.type()), device.index(),
                               &handle) != TORCH_SUCCESS) {
    refuse_bytes(static_cast<uint64_t>(bytes), device);
  }
  return Tensor(handle);
}

// A contiguous copy with this dtype. Allocates through `empty`, whose error states the size.
inline Tensor copy_of(const Tensor& t, ScalarType type) {
  Tensor copy = empty(sizes_of(t), type, t);
  torch::stable::copy_(copy, t);
  return copy;
}

// Returns t itself if it is contiguous.
inline Tensor contiguous(const Tensor& t) { return t.is_contiguous() ? t : copy_of(t, t.scalar_type()); }

inline Tensor to_type(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : copy_of(t, type); }

// The tensor as contiguous float32; t itself if it already is.
inline Tensor as_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float && t.is_contiguous() ? t : copy_of(t, ScalarType::Float);
}

inline FloatType float_type(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat32;
    case ScalarType::Half:
      return FloatType::kFloat16;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    default:
      value_error(op, ": ", name, " must be float32, float16 or bfloat16");
  }
}

inline void check_same_device(const char* op, const char* name_a, const Tensor& a, const char* name_b,
                              const Tensor& b) {
  if (a.device() != b.device()) {
    value_error(op, ": ", name_a, " and ", name_b, " must be on the same device, got ", a.is_cuda() ? "cuda:" : "cpu",
                a.is_cuda() ? std::to_string(a.get_device_index()) : "", " and ", b.is_cuda() ? "cuda:" : "cpu",
                b.is_cuda() ? std::to_string(b.get_device_index()) : "");
  }
}

// Makes the device of `t` current during its lifetime and provides the stream for launches. No effect on a CPU.
#ifdef RQK_CUDA_LIBRARY
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#else
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#endif

// The memory from a tensor's first element to its last; empty for a tensor without elements.
struct MemoryRange {
  uintptr_t begin, end;
};

inline MemoryRange memory_of(const Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>((last + 1) * bytes_of(t.scalar_type()))};
}

inline bool may_overlap(const Tensor& a, const Tensor& b) {
  const MemoryRange x = memory_of(a), y = memory_of(b);
  return x.begin < y.end && y.begin < x.end;
}

// An operator as torch calls it. If a standard container runs out of memory, the error has the class of torch's own.
template <auto kOperator>
struct Registered;

template <class Result, class... Args, Result (*kOperator)(Args...)>
struct Registered<kOperator> {
  static Result call(Args... args) {
    try {
      return kOperator(std::move(args)...);
    } catch (const std::bad_alloc&) {
      throw std::runtime_error("DefaultCPUAllocator: not enough memory: you tried to allocate more than there is.");
    } catch (const std::length_error&) {
      throw std::runtime_error("DefaultCPUAllocator: not enough memory: you tried to allocate more than there can be.");
    }
  }
};

}  // namespace rqk

// op.cpp is compiled into both libraries: `_C` defines the schema and registers the CPU kernel, `_cuda` registers the
// CUDA kernel for the same schema.
#ifdef RQK_CUDA_LIBRARY
#define RQK_REGISTER(name, schema, function) \
  STABLE_TORCH_LIBRARY_IMPL(rqkernels, CUDA, m) { m.impl(name, TORCH_BOX((&rqk::Registered<&function>::call))); }
#else
#define RQK_REGISTER(name, schema, function)                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(rqkernels, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(rqkernels, CPU, m) { m.impl(name, TORCH_BOX((&rqk::Registered<&function>::call))); }
#endif
