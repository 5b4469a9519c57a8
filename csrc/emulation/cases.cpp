#include "emulation/cases.h"

#include "emulation/self_test.h"

namespace rqk::emulation {
namespace {

constexpr struct {
  const char* name;
  Case run;
} kOperators[] = {
    {"residual_search", residual_search},   {"residual_decode", residual_decode},
    {"code_statistics", code_statistics},   {"stochastic_residual_search", stochastic_residual_search},
    {"distance_softmax", distance_softmax}, {"soft_label_cross_entropy", soft_label_cross_entropy},
    {"sample_logits", sample_logits},       {"depth_attention", depth_attention},
    {"transformer_step", transformer_step}, {"depth_decode", depth_decode},
};

// in int32 (n) -> out int32 (n)
std::vector<Array> run_self_test(const SelfTest& test, const Inputs& inputs) {
  const Array& in = inputs.array(0, "<i4", 1);
  const DeviceBuffer in_device = to_device(in), out_device = device_array("<i4", in.shape);
  test.launch({static_cast<const int32_t*>(in_device.data()), static_cast<int32_t*>(out_device.data()), in.elements()});
  return {to_host(out_device, "<i4", in.shape)};
}

std::vector<Array> run_once(const std::string& name, const Inputs& inputs) {
  for (const auto& op : kOperators) {
    if (name == op.name) return op.run(inputs);
  }
  for (int i = 0; i < num_self_tests; ++i) {
    if (name == self_tests[i].name) return run_self_test(self_tests[i], inputs);
  }
  fail("no case is called '" + name + "'");
}

}  // namespace

int64_t Array::elements() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

const Array& Inputs::array(size_t i, const std::string& dtype, size_t dimensions) const {
  if (i >= arrays_.size()) {
    fail("input " + std::to_string(i) + " is missing: there are " + std::to_string(arrays_.size()));
  }
  const Array& found = arrays_[i];
  if (found.dtype != dtype || found.shape.size() != dimensions) {
    fail("input " + std::to_string(i) + " must be " + dtype + " with " + std::to_string(dimensions) +
         " dimensions, got " + found.dtype + " with " + std::to_string(found.shape.size()));
  }
  return found;
}

int64_t Inputs::number(size_t i) const {
  int64_t value;
  std::memcpy(&value, array(i, "<i8", 0).data.data(), sizeof(value));
  return value;
}

std::vector<Array> run_case(const std::string& name, const Inputs& inputs, const std::vector<uint64_t>& seeds) {
  if (seeds.empty()) fail("no schedule to run");
  std::vector<Array> first;
  for (size_t s = 0; s < seeds.size(); ++s) {
    set_schedule(seeds[s]);
    device() = {};
    std::vector<Array> results = run_once(name, inputs);
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
