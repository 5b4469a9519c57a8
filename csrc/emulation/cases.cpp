#include "emulation/cases.h"

#include "emulation/self_test.h"

namespace rqk::emulation {
namespace {

// Built by the first registration: those of other files may come before any variable of this one. A name that two
// cases claim is found when it is run: nothing could catch an Error while a library is being loaded.
std::multimap<std::string, Case>& registry() {
  static std::multimap<std::string, Case> cases;
  return cases;
}

// values int32 (n) -> int32 (n)
Results run_self_test(const SelfTest& test, const Inputs& inputs) {
  const Array& in = inputs.array("values", "<i4", 1);
  const DeviceBuffer in_device = to_device(in), out_device = device_array("<i4", in.shape);
  test.launch({in_device.as<const int32_t>(), out_device.as<int32_t>(), in.elements()});
  return {to_host(out_device, "<i4", in.shape)};
}

Results run_once(const std::string& name, const Inputs& inputs) {
  const auto [first, last] = registry().equal_range(name);
  if (first != last) {
    if (std::next(first) != last) fail("two cases are called '" + name + "'");
    return first->second(inputs);
  }
  for (int i = 0; i < num_self_tests; ++i) {
    if (name == self_tests[i].name) return run_self_test(self_tests[i], inputs);
  }
  std::string names;
  for (const auto& [registered, run] : registry()) names += (names.empty() ? "" : ", ") + registered;
  fail("no case is called '" + name + "'; there are " + names + ", and the tests of the emulation itself");
}

void set_device(const Inputs& inputs) {
  Device& d = device();
  d = {};
  d.multiprocessors = static_cast<int>(inputs.integer_or("multiprocessors", d.multiprocessors));
  d.shared_bytes = static_cast<int>(inputs.integer_or("shared_bytes", d.shared_bytes));
  d.mma_error = inputs.number_or("mma_error", d.mma_error);
}

std::string described(const Array& array) {
  if (array.dtype == kNone) return "None";
  return array.dtype + " with " + std::to_string(array.shape.size()) + " dimensions";
}

template <class T>
T scalar(const Array& array) {
  T value;
  std::memcpy(&value, array.data.data(), sizeof(value));
  return value;
}

}  // namespace

Registration::Registration(const char* name, Case run) { registry().emplace(name, run); }

int64_t Array::elements() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

FloatType float_type_of(const Array& array) {
  return array.dtype == "<f4" ? FloatType::kFloat32 : array.dtype == "<f2" ? FloatType::kFloat16 : FloatType::kBFloat16;
}

std::string Inputs::names() const {
  std::string text;
  for (const auto& [name, array] : arrays_) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

bool Inputs::is_given(const std::string& name) const {
  read_.insert(name);
  const auto found = arrays_.find(name);
  return found != arrays_.end() && found->second.dtype != kNone;
}

const Array& Inputs::given(const std::string& name) const {
  read_.insert(name);
  const auto found = arrays_.find(name);
  if (found == arrays_.end()) fail(case_ + ": " + name + " is missing, got " + names());
  return found->second;
}

const Array& Inputs::expect(const std::string& name, bool fits, const std::string& expected) const {
  const Array& found = given(name);
  if (!fits) fail(case_ + ": " + name + ": expected " + expected + ", got " + described(found));
  return found;
}

const Array& Inputs::array(const std::string& name, const std::string& dtype, size_t dimensions) const {
  const Array& found = given(name);
  return expect(name, found.dtype == dtype && found.shape.size() == dimensions,
                dtype + " with " + std::to_string(dimensions) + " dimensions");
}

const Array* Inputs::optional(const std::string& name, const std::string& dtype, size_t dimensions) const {
  return is_given(name) ? &array(name, dtype, dimensions) : nullptr;
}

const Array& Inputs::floats(const std::string& name, size_t dimensions) const {
  const Array& found = given(name);
  const bool is_float = found.dtype == "<f4" || found.dtype == "<f2" || found.dtype == "<u2";
  return expect(name, is_float && found.shape.size() == dimensions,
                "<f4, <f2 or <u2 (bits of bfloat16) with " + std::to_string(dimensions) + " dimensions");
}

int64_t Inputs::integer(const std::string& name) const {
  const Array& found = given(name);
  return scalar<int64_t>(expect(name, found.dtype == "<i8" && found.shape.empty(), "an integer below 2^63"));
}

int64_t Inputs::integer_or(const std::string& name, int64_t otherwise) const {
  return is_given(name) ? integer(name) : otherwise;
}

uint64_t Inputs::bits(const std::string& name) const {
  const Array& found = given(name);
  // numpy has an integer from 2^63 on as an unsigned one.
  if (found.dtype == "<u8" && found.shape.empty()) return scalar<uint64_t>(found);
  const int64_t value = integer(name);
  if (value < 0) fail(case_ + ": " + name + ": expected an integer in [0, 2^64), got " + std::to_string(value));
  return static_cast<uint64_t>(value);
}

double Inputs::number(const std::string& name) const {
  const Array& found = given(name);
  if (found.dtype == "<i8" && found.shape.empty()) return static_cast<double>(scalar<int64_t>(found));
  return scalar<double>(expect(name, found.dtype == "<f8" && found.shape.empty(), "a number"));
}

double Inputs::number_or(const std::string& name, double otherwise) const {
  return is_given(name) ? number(name) : otherwise;
}

bool Inputs::flag(const std::string& name) const {
  const Array& found = given(name);
  return scalar<bool>(expect(name, found.dtype == "|b1" && found.shape.empty(), "a bool"));
}

std::string Inputs::text(const std::string& name) const {
  const Array& found = given(name);
  expect(name, found.dtype.rfind("|S", 0) == 0 && found.shape.empty(), "a string");
  std::string value(reinterpret_cast<const char*>(found.data.data()), found.data.size());
  return value.substr(0, value.find('\0'));  // numpy has the empty string as one zero
}

size_t Inputs::choice(const std::string& name, std::initializer_list<const char*> choices) const {
  const std::string value = text(name);
  std::string listed;
  for (size_t i = 0; i < choices.size(); ++i) {
    const char* choice = choices.begin()[i];
    if (value == choice) return i;
    listed += (listed.empty() ? "" : ", ") + std::string(choice);
  }
  fail(case_ + ": " + name + ": expected one of " + listed + ", got '" + value + "'");
}

void Inputs::check_all_read() const {
  for (const auto& [name, array] : arrays_) {
    if (read_.count(name) > 0) continue;
    std::string taken;
    for (const std::string& known : read_) taken += (taken.empty() ? "" : ", ") + known;
    fail(case_ + ": unexpected argument " + name + ", expected " + taken);
  }
}

Results run_case(const std::string& name, std::map<std::string, Array> arguments, const std::vector<uint64_t>& seeds) {
  if (seeds.empty()) fail("no schedule to run");
  const Inputs inputs(name, std::move(arguments));
  Results first;
  for (size_t s = 0; s < seeds.size(); ++s) {
    set_schedule(seeds[s]);
    set_device(inputs);
    Results results = run_once(name, inputs);
    inputs.check_all_read();
    for (size_t i = 0; s > 0 && i < results.size(); ++i) {
      if (results[i].data != first[i].data) {
        fail(name + ": result " + std::to_string(i) + " differs between the schedules " + std::to_string(seeds[0]) +
             " and " + std::to_string(seeds[s]));
      }
    }
    if (s == 0) first = std::move(results);
  }
  return first;
}

}  // namespace rqk::emulation
