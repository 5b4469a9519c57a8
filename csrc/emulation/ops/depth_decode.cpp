#include "ops/depth_decode/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {
namespace {

template <class T>
const T* numbers(const Inputs& inputs, size_t i, const char* dtype, size_t count) {
  const Array& array = inputs.array(i, dtype, 1);
  if (array.data.size() != count * sizeof(T)) fail("input " + std::to_string(i) + " has another size");
  return reinterpret_cast<const T*>(array.data.data());
}

const float* floats(const DeviceBuffer& buffer) { return static_cast<const float*>(buffer.data()); }

// Null where the array is empty.
const int64_t* integers(const DeviceBuffer& buffer) {
  return buffer.bytes() == 0 ? nullptr : static_cast<const int64_t*>(buffer.data());
}

// sizes: layers, hidden, heads, activation, type, multiprocessors
PackedStack stack_of(const DeviceBuffer& blocks, int64_t width, const int64_t* sizes, double eps) {
  device().multiprocessors = static_cast<int>(sizes[5]);
  PackedStack stack{};
  stack.blocks = static_cast<const uint8_t*>(blocks.data());
  stack.layers = sizes[0];
  stack.width = width;
  stack.hidden = sizes[1];
  stack.heads = sizes[2];
  stack.activation = static_cast<Activation>(sizes[3]);
  stack.type = static_cast<WeightType>(sizes[4]);
  stack.eps = eps;
  if (blocks.bytes() != static_cast<size_t>(stack.layers * stack.block_bytes())) fail("blocks have another size");
  return stack;
}

template <class Params>
void launch_with_workspace(Params& p) {
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p)));
  p.workspace = static_cast<uint8_t*>(workspace.data());
  launch(p, nullptr);
}

}  // namespace

// x (b, n, w), blocks, keys, values (l, b, h, capacity, w / h), sizes (6, see stack_of), eps, length, step (1, or 0 for
// none) -> y, keys, values
std::vector<Array> transformer_step(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 3), &keys = inputs.array(2, "<f4", 5), &values = inputs.array(3, "<f4", 5);
  const DeviceBuffer x_device = to_device(x), blocks = to_device(inputs.array(1, "|u1", 1));
  const DeviceBuffer keys_device = to_device(keys), values_device = to_device(values);
  const DeviceBuffer step = to_device(inputs.array(7, "<i8", 1)), y = device_array("<f4", x.shape);
  TransformerStepParams p{};
  p.stack = stack_of(blocks, x.shape[2], numbers<int64_t>(inputs, 4, "<i8", 6), *numbers<double>(inputs, 5, "<f8", 1));
  p.x = floats(x_device);
  p.keys = static_cast<float*>(keys_device.data());
  p.values = static_cast<float*>(values_device.data());
  p.y = static_cast<float*>(y.data());
  p.batch = x.shape[0];
  p.count = x.shape[1];
  p.capacity = keys.shape[3];
  p.length = inputs.number(6);
  p.step = integers(step);
  launch_with_workspace(p);
  return {to_host(y, "<f4", x.shape), to_host(keys_device, "<f4", keys.shape),
          to_host(values_device, "<f4", values.shape)};
}

// context (rows, or twice as many with guidance; w), blocks, classifier, positions (d, w), vectors (k or d k, w), sizes
// (6, see stack_of, then num_codes, classifiers, cumulative, seed as 64 bits, offset, stream), numbers (eps,
// classifier_eps, guidance), temperature (d), top_k (d), top_p (d), step (1, or 0 for none), given (rows, d), or (0, d)
// for none
//   -> codes (rows, d) or logits (rows, d, k)
std::vector<Array> depth_decode(const Inputs& inputs) {
  const Array &context = inputs.array(0, "<f4", 2), &positions = inputs.array(3, "<f4", 2);
  const Array &vectors = inputs.array(4, "<f4", 2), &given = inputs.array(11, "<i8", 2);
  const DeviceBuffer context_device = to_device(context), blocks = to_device(inputs.array(1, "|u1", 1));
  const DeviceBuffer classifier = to_device(inputs.array(2, "|u1", 1)), positions_device = to_device(positions);
  const DeviceBuffer vectors_device = to_device(vectors), step = to_device(inputs.array(10, "<i8", 1));
  const DeviceBuffer given_device = to_device(given);
  const int64_t* sizes = numbers<int64_t>(inputs, 5, "<i8", 12);
  const double* values = numbers<double>(inputs, 6, "<f8", 3);
  const size_t depth = static_cast<size_t>(positions.shape[0]);
  std::vector<SampleSettings> settings;
  for (size_t d = 0; d < depth; ++d) {
    settings.push_back({numbers<double>(inputs, 7, "<f8", depth)[d], numbers<int64_t>(inputs, 8, "<i8", depth)[d],
                        numbers<double>(inputs, 9, "<f8", depth)[d]});
  }
  DepthDecodeParams p{};
  p.stack = stack_of(blocks, context.shape[1], sizes, values[0]);
  p.classifier = static_cast<const uint8_t*>(classifier.data());
  p.num_codes = sizes[6];
  p.classifiers = sizes[7];
  p.classifier_eps = values[1];
  p.positions = floats(positions_device);
  p.vectors = floats(vectors_device);
  p.vectors_stride = vectors.shape[0] == p.num_codes ? 0 : p.num_codes * context.shape[1];
  p.cumulative = sizes[8] != 0;
  p.guidance = values[2];
  p.rows = context.shape[0] / (p.guidance > 0 ? 2 : 1);
  p.depth = positions.shape[0];
  p.context = floats(context_device);
  p.settings = settings.data();
  p.seed = static_cast<uint64_t>(sizes[9]);
  p.offset = sizes[10];
  p.stream = sizes[11];
  p.step = integers(step);
  p.given = integers(given_device);
  const std::vector<int64_t> shape{p.rows, p.depth, p.num_codes};
  const DeviceBuffer codes = device_array("<i8", {p.rows, p.given == nullptr ? p.depth : 0});
  const DeviceBuffer logits = device_array("<f4", {p.rows, p.given == nullptr ? 0 : p.depth, p.num_codes});
  p.codes = static_cast<int64_t*>(codes.data());
  p.logits = static_cast<float*>(logits.data());
  launch_with_workspace(p);
  return {p.given == nullptr ? to_host(codes, "<i8", {p.rows, p.depth}) : to_host(logits, "<f4", shape)};
}

}  // namespace rqk::emulation
