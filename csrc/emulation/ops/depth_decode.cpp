#include "ops/depth_decode/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {
namespace {

// Arguments blocks, layers, hidden, heads, activation, precision, eps.
PackedStack stack_of(const Inputs& inputs, const DeviceBuffer& blocks, int64_t width) {
  PackedStack stack{};
  stack.blocks = blocks.as<const uint8_t>();
  stack.layers = inputs.integer("layers");
  stack.width = width;
  stack.hidden = inputs.integer("hidden");
  stack.heads = inputs.integer("heads");
  stack.activation = static_cast<Activation>(inputs.choice("activation", {"gelu", "quick_gelu"}));
  stack.type = static_cast<WeightType>(inputs.choice("precision", {"fp32", "bf16", "int8"}));
  stack.eps = inputs.number("eps");
  if (blocks.bytes() != static_cast<size_t>(stack.layers * stack.block_bytes())) fail("blocks have another size");
  return stack;
}

// An int64 on the device, or nothing.
class DeviceStep {
 public:
  explicit DeviceStep(const Inputs& inputs)
      : given_(inputs.optional("step", "<i8", 0)), buffer_(given_ == nullptr ? 0 : sizeof(int64_t), data()) {}
  const int64_t* get() const { return given_ == nullptr ? nullptr : buffer_.as<const int64_t>(); }

 private:
  const void* data() const { return given_ == nullptr ? nullptr : given_->data.data(); }
  const Array* given_;
  DeviceBuffer buffer_;
};

template <class Params>
void launch_with_workspace(Params& p) {
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p)));
  p.workspace = workspace.as<uint8_t>();
  launch(p, nullptr);
}

}  // namespace

// x (b, n, w), keys and values (layers, b, heads, capacity, w / heads), a stack (see stack_of), length, step or None
//   -> y, keys, values
RQK_CASE(transformer_step) {
  const Array &x = inputs.array("x", "<f4", 3), &keys = inputs.array("keys", "<f4", 5),
              &values = inputs.array("values", "<f4", 5);
  const DeviceBuffer x_device = to_device(x), blocks = to_device(inputs.array("blocks", "|u1", 1));
  const DeviceBuffer keys_device = to_device(keys), values_device = to_device(values);
  const DeviceBuffer y = device_array("<f4", x.shape);
  const DeviceStep step(inputs);
  TransformerStepParams p{};
  p.stack = stack_of(inputs, blocks, x.shape[2]);
  p.x = x_device.as<const float>();
  p.keys = keys_device.as<float>();
  p.values = values_device.as<float>();
  p.y = y.as<float>();
  p.batch = x.shape[0];
  p.count = x.shape[1];
  p.capacity = keys.shape[3];
  p.length = inputs.integer("length");
  p.step = step.get();
  launch_with_workspace(p);
  return {to_host(y, "<f4", x.shape), to_host(keys_device, "<f4", keys.shape),
          to_host(values_device, "<f4", values.shape)};
}

// context (rows, or twice as many with guidance; w), a stack (see stack_of), classifier, classifiers, classifier_eps,
// num_codes, positions (d, w), vectors (k or d k, w), cumulative, guidance; temperature, top_k, top_p (d); seed,
// offset, stream, step or None, given (rows, d) or None
//   -> codes (rows, d), or of given ones logits (rows, d, k)
RQK_CASE(depth_decode) {
  const Array &context = inputs.array("context", "<f4", 2), &positions = inputs.array("positions", "<f4", 2);
  const Array& vectors = inputs.array("vectors", "<f4", 2);
  const Array* given = inputs.optional("given", "<i8", 2);
  const DeviceBuffer context_device = to_device(context), blocks = to_device(inputs.array("blocks", "|u1", 1));
  const DeviceBuffer classifier = to_device(inputs.array("classifier", "|u1", 1));
  const DeviceBuffer positions_device = to_device(positions), vectors_device = to_device(vectors);
  const DeviceBuffer given_device = to_device(given == nullptr ? Array{} : *given);
  const DeviceStep step(inputs);
  const auto temperature = values_of<double>(inputs.array("temperature", "<f8", 1));
  const auto top_k = values_of<int64_t>(inputs.array("top_k", "<i8", 1));
  const auto top_p = values_of<double>(inputs.array("top_p", "<f8", 1));
  std::vector<SampleSettings> settings;
  for (size_t d = 0; d < static_cast<size_t>(positions.shape[0]); ++d) {
    settings.push_back({temperature.at(d), top_k.at(d), top_p.at(d)});
  }
  DepthDecodeParams p{};
  p.stack = stack_of(inputs, blocks, context.shape[1]);
  p.classifier = classifier.as<const uint8_t>();
  p.num_codes = inputs.integer("num_codes");
  p.classifiers = inputs.integer("classifiers");
  p.classifier_eps = inputs.number("classifier_eps");
  p.positions = positions_device.as<const float>();
  p.vectors = vectors_device.as<const float>();
  p.vectors_stride = vectors.shape[0] == p.num_codes ? 0 : p.num_codes * context.shape[1];
  p.cumulative = inputs.flag("cumulative");
  p.guidance = inputs.number("guidance");
  p.rows = context.shape[0] / (p.guidance > 0 ? 2 : 1);
  p.depth = positions.shape[0];
  p.context = context_device.as<const float>();
  p.settings = settings.data();
  p.seed = inputs.bits("seed");
  p.offset = inputs.integer("offset");
  p.stream = inputs.integer("stream");
  p.step = step.get();
  p.given = given == nullptr ? nullptr : given_device.as<const int64_t>();
  const std::vector<int64_t> shape{p.rows, p.depth, p.num_codes};
  const DeviceBuffer codes = device_array("<i8", {p.rows, given == nullptr ? p.depth : 0});
  const DeviceBuffer logits = device_array("<f4", {p.rows, given == nullptr ? 0 : p.depth, p.num_codes});
  p.codes = codes.as<int64_t>();
  p.logits = logits.as<float>();
  launch_with_workspace(p);
  return {given == nullptr ? to_host(codes, "<i8", {p.rows, p.depth}) : to_host(logits, "<f4", shape)};
}

}  // namespace rqk::emulation
