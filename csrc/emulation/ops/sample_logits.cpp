#include "ops/sample_logits/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// logits (n, k), temperature, top_k, top_p, seed, offset, stream, streams, on_device: the kernel reads offset and
// stream from the device -> codes (n)
RQK_CASE(sample_logits) {
  const Array& logits = inputs.array("logits", "<f4", 2);
  const int64_t counters[2] = {inputs.integer("offset"), inputs.integer("stream")};
  const DeviceBuffer logits_device = to_device(logits), counters_device(sizeof(counters), counters);
  SampleLogitsParams p{};
  p.logits = logits_device.as<const float>();
  p.rows = logits.shape[0];
  p.num_codes = logits.shape[1];
  p.settings = {inputs.number("temperature"), inputs.integer("top_k"), inputs.number("top_p")};
  p.seed = inputs.bits("seed");
  p.streams = inputs.integer("streams");
  if (inputs.flag("on_device")) {
    p.offset_ptr = counters_device.as<const int64_t>();
    p.stream_ptr = p.offset_ptr + 1;
  } else {
    p.offset = counters[0];
    p.stream = counters[1];
  }
  const DeviceBuffer codes = device_array("<i8", {p.rows});
  p.codes = codes.as<int64_t>();
  launch(p, nullptr);
  return {to_host(codes, "<i8", {p.rows})};
}

}  // namespace rqk::emulation
