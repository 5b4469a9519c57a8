#include "ops/sample_logits/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// logits (n, k), temperature and top_p (2), top_k, seed (64 bits), offset, stream, whether the device holds the last
// two, streams -> codes
std::vector<Array> sample_logits(const Inputs& inputs) {
  const Array &logits = inputs.array(0, "<f4", 2), &numbers = inputs.array(1, "<f8", 1);
  double temperature_and_top_p[2];
  std::memcpy(temperature_and_top_p, numbers.data.data(), sizeof(temperature_and_top_p));
  SampleLogitsParams p{};
  p.rows = logits.shape[0];
  p.num_codes = logits.shape[1];
  p.settings = {temperature_and_top_p[0], inputs.number(2), temperature_and_top_p[1]};
  p.seed = static_cast<uint64_t>(inputs.number(3));
  p.streams = inputs.number(7);
  const int64_t counters[2] = {inputs.number(4), inputs.number(5)};
  const DeviceBuffer on_device(sizeof(counters), counters), logits_nk = to_device(logits);
  DeviceBuffer codes = device_array("<i8", {p.rows});
  if (inputs.number(6) != 0) {
    p.offset_ptr = static_cast<const int64_t*>(on_device.data());
    p.stream_ptr = p.offset_ptr + 1;
  } else {
    p.offset = counters[0];
    p.stream = counters[1];
  }
  p.logits = static_cast<const float*>(logits_nk.data());
  p.codes = static_cast<int64_t*>(codes.data());
  launch(p, nullptr);
  return {to_host(codes, "<i8", {p.rows})};
}

}  // namespace rqk::emulation
