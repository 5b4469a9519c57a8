// What op.cpp files share: the stable tensor API under short names, and errors a tired person understands.
//
// Errors are std::invalid_argument (ValueError in Python) and std::out_of_range (IndexError).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/float_type.h"

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

// Straight from the allocator: through the dispatcher it costs 1 us more, and 20 us where the caches are cold.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  const torch::stable::Device device = like.device();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  static_cast<int32_t>(type), static_cast<int32_t>(device.type()),
                                                  device.index(), &handle));
  return Tensor(handle);
}

// The tensor as contiguous float32; itself where it already is, without two calls that would find that out.
inline Tensor as_float(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous()) return t;
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
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

// Makes the device of `t` current while it lives, and names the stream that launches go to. Both nothing on a CPU.
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

}  // namespace rqk

// op.cpp is compiled into both libraries: `_C` defines the schema and registers the CPU kernel, `_cuda` registers the
// CUDA kernel under it.
#ifdef RQK_CUDA_LIBRARY
#define RQK_REGISTER(name, schema, function) \
  STABLE_TORCH_LIBRARY_IMPL(rqkernels, CUDA, m) { m.impl(name, TORCH_BOX(&function)); }
#else
#define RQK_REGISTER(name, schema, function)                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(rqkernels, m) { m.def(schema); } \
  STABLE_TORCH_LIBRARY_IMPL(rqkernels, CPU, m) { m.impl(name, TORCH_BOX(&function)); }
#endif
