// Cases that run by name: an operator on named arrays and numbers, or a kernel that tests the emulation itself.
//
// A case registers itself; the Python module (plain build) and the executables (sanitized builds) run it by its name:
//
//   // logits (n, k), seed -> codes (n)
//   RQK_CASE(sample_logits) {
//     const Array& logits = inputs.array("logits", "<f4", 2);
//     ...
//   }
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/float_type.h"
#include "emulation/runtime.h"

namespace rqk::emulation {

// A contiguous array as numpy has it; dtype is "<f4", "<i8", ...
struct Array {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> data;

  int64_t elements() const;
};

// Python's None: an argument that is named but not given.
inline constexpr const char* kNone = "|V1";

// Arguments of a case by name. A missing one, one of another type, and one that the case never asks for is an Error
// that names it.
class Inputs {
 public:
  Inputs(std::string case_name, std::map<std::string, Array> arrays)
      : case_(std::move(case_name)), arrays_(std::move(arrays)) {}

  const Array& array(const std::string& name, const std::string& dtype, size_t dimensions) const;
  // Null where the argument is None or not given.
  const Array* optional(const std::string& name, const std::string& dtype, size_t dimensions) const;
  // float32, float16, or bfloat16 as uint16 of its bits: see float_type_of.
  const Array& floats(const std::string& name, size_t dimensions) const;

  int64_t integer(const std::string& name) const;
  int64_t integer_or(const std::string& name, int64_t otherwise) const;  // where it is None or not given
  uint64_t bits(const std::string& name) const;                          // an integer in [0, 2^64), such as a seed
  double number(const std::string& name) const;                          // an integer too
  double number_or(const std::string& name, double otherwise) const;
  bool flag(const std::string& name) const;
  std::string text(const std::string& name) const;
  size_t choice(const std::string& name, std::initializer_list<const char*> choices) const;  // the index of the text

  // Throws Error if an argument was given that the case never asked for.
  void check_all_read() const;

 private:
  bool is_given(const std::string& name) const;
  const Array& given(const std::string& name) const;
  const Array& expect(const std::string& name, bool fits, const std::string& expected) const;
  std::string names() const;

  std::string case_;
  std::map<std::string, Array> arrays_;
  mutable std::set<std::string> read_;
};

using Results = std::vector<Array>;
using Case = Results (*)(const Inputs&);

// Runs a case once per schedule seed and returns its results, which must not depend on the schedule by a single bit.
// For the device that a case runs on, every one takes `multiprocessors`, `shared_bytes` (of a block) and `mma_error`.
Results run_case(const std::string& name, std::map<std::string, Array> arguments, const std::vector<uint64_t>& seeds);

// --- for those who write cases -------------------------------------------------------------------------

struct Registration {
  Registration(const char* name, Case run);
};

#define RQK_CASE(name)                                                                    \
  static ::rqk::emulation::Results case_##name(const ::rqk::emulation::Inputs& inputs);   \
  static const ::rqk::emulation::Registration registration_of_##name{#name, case_##name}; \
  static ::rqk::emulation::Results case_##name([[maybe_unused]] const ::rqk::emulation::Inputs& inputs)

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

// An array of `Inputs::floats`.
FloatType float_type_of(const Array& array);

// The values of an array, T as its dtype says.
template <class T>
std::vector<T> values_of(const Array& array) {
  std::vector<T> values(array.data.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), array.data.data(), values.size() * sizeof(T));
  return values;
}

}  // namespace rqk::emulation
