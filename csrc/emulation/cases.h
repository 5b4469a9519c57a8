// What can be run by name: an operator on arrays, or a kernel that tests the emulation itself.
//
// The same table stands behind the Python module (plain build) and the executables (sanitized builds).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulation/runtime.h"

namespace rqk::emulation {

// A contiguous array as numpy has it; dtype is "<f4", "<i8", ...
struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> data;

  int64_t elements() const;
};

// The inputs of a case, taken with their expected type. A wrong one is an Error that says which.
class Inputs {
 public:
  explicit Inputs(std::vector<Array> arrays) : arrays_(std::move(arrays)) {}

  size_t size() const { return arrays_.size(); }
  const Array& array(size_t i, const std::string& dtype, size_t dimensions) const;
  int64_t number(size_t i) const;  // a 0-d int64

 private:
  std::vector<Array> arrays_;
};

using Case = std::vector<Array> (*)(const Inputs&);

// Runs a case once per schedule seed and returns its results, which must not depend on the schedule by a single bit.
std::vector<Array> run_case(const std::string& name, const Inputs& inputs, const std::vector<uint64_t>& seeds);

// --- for those who write cases -------------------------------------------------------------------------

inline DeviceBuffer to_device(const Array& array) { return DeviceBuffer(array.data.size(), array.data.data()); }

inline DeviceBuffer device_array(const std::string& dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = dtype.back() - '0';
  for (const int64_t size : shape) bytes *= size;
  return DeviceBuffer(static_cast<size_t>(bytes));
}

inline Array to_host(const DeviceBuffer& buffer, std::string dtype, std::vector<int64_t> shape) {
  Array array{std::move(dtype), std::move(shape), std::vector<std::byte>(buffer.bytes())};
  if (buffer.bytes() > 0) std::memcpy(array.data.data(), buffer.data(), buffer.bytes());
  return array;
}

// One per operator (ops/<slug>.cpp), and the emulation's own kernels by name (self_test.cpp).
std::vector<Array> residual_search(const Inputs& inputs);
std::vector<Array> residual_decode(const Inputs& inputs);
std::vector<Array> code_statistics(const Inputs& inputs);
std::vector<Array> stochastic_residual_search(const Inputs& inputs);
std::vector<Array> distance_softmax(const Inputs& inputs);
std::vector<Array> soft_label_cross_entropy(const Inputs& inputs);
std::vector<Array> sample_logits(const Inputs& inputs);
std::vector<Array> depth_attention(const Inputs& inputs);
std::vector<Array> transformer_step(const Inputs& inputs);
std::vector<Array> depth_decode(const Inputs& inputs);

}  // namespace rqk::emulation
