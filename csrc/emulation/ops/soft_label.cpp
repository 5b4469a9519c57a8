#include "ops/soft_label/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {
namespace {

// A float64 comes as an array of one.
double scalar(const Inputs& inputs, size_t i) {
  double value;
  std::memcpy(&value, inputs.array(i, "<f8", 1).data.data(), sizeof(value));
  return value;
}

SoftLabels labels_of(const Array& x, const Array& codebooks, const DeviceBuffer& x_device,
                     const DeviceBuffer& codebooks_device, double tau) {
  SoftLabels labels{};
  labels.x = static_cast<const float*>(x_device.data());
  labels.codebook = static_cast<const float*>(codebooks_device.data());
  labels.outer = x.shape[0];
  labels.inner = x.shape[1];
  labels.channels = x.shape[2];
  labels.num_codes = codebooks.shape[1];
  labels.codebook_stride = codebooks.shape[0] == 1 ? 0 : labels.num_codes * labels.channels;
  labels.tau = tau;
  return labels;
}

}  // namespace

// x (o, i, c), codebooks (1 or i, k, c), tau -> q (o, i, k)
std::vector<Array> distance_softmax(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 3), &codebooks = inputs.array(1, "<f4", 3);
  const DeviceBuffer x_device = to_device(x), codebooks_device = to_device(codebooks);
  const std::vector<int64_t> shape{x.shape[0], x.shape[1], codebooks.shape[1]};
  const DeviceBuffer q = device_array("<f4", shape);
  DistanceSoftmaxParams p{};
  p.labels = labels_of(x, codebooks, x_device, codebooks_device, scalar(inputs, 2));
  p.q = static_cast<float*>(q.data());
  launch(p, nullptr);
  return {to_host(q, "<f4", shape)};
}

// logits, of `type`: (o, i, k + padding), or with `swapped` (i, o, k + padding); x (o, i, c), codebooks (1 or i, k, c),
// tau; mask u1 (o, i), weight (o * i, or 1, or 0 for none), gradient_scale; type (0 float32, 1 float16, 2 bfloat16:
// its bits as uint16), swapped, how (0 no gradient, 1 a packed one, 2 in place)
// -> losses (o, i), total (1), gradient (packed, of the logits' shape in place, or empty)
std::vector<Array> soft_label_cross_entropy(const Inputs& inputs) {
  const auto type = static_cast<FloatType>(inputs.number(7));
  const std::string dtype = type == FloatType::kFloat32 ? "<f4" : type == FloatType::kFloat16 ? "<f2" : "<u2";
  const Array& logits = inputs.array(0, dtype, 3);
  const Array &x = inputs.array(1, "<f4", 3), &codebooks = inputs.array(2, "<f4", 3);
  const Array &mask = inputs.array(4, "|u1", 2), &weight = inputs.array(5, "<f4", 1);
  const bool swapped = inputs.number(8) != 0;
  const int64_t how = inputs.number(9), stride = logits.shape[2];
  const DeviceBuffer logits_device = to_device(logits), x_device = to_device(x);
  const DeviceBuffer codebooks_device = to_device(codebooks), mask_device = to_device(mask);
  const DeviceBuffer weight_device = to_device(weight);
  const int64_t outer = x.shape[0], inner = x.shape[1], num_codes = codebooks.shape[1];
  const std::vector<int64_t> packed{how == 1 ? outer : 0, inner, num_codes};
  const DeviceBuffer gradient = device_array(dtype, packed);
  const DeviceBuffer losses = device_array("<f4", {outer, inner}), total = device_array("<f4", {1});

  SoftLabelCrossEntropyParams p{};
  p.labels = labels_of(x, codebooks, x_device, codebooks_device, scalar(inputs, 3));
  p.logits = logits_device.data();
  p.type = type;
  p.logits_outer_stride = swapped ? stride : inner * stride;
  p.logits_inner_stride = swapped ? outer * stride : stride;
  p.mask = static_cast<const uint8_t*>(mask_device.data());
  p.weight = weight.elements() == 0 ? nullptr : static_cast<const float*>(weight_device.data());
  p.weight_stride = weight.elements() > 1 ? 1 : 0;
  p.gradient_scale = static_cast<float>(scalar(inputs, 6));
  p.losses = static_cast<float*>(losses.data());
  p.total = static_cast<float*>(total.data());
  if (how == 1) {
    p.gradient = gradient.data();
    p.gradient_outer_stride = inner * num_codes;
    p.gradient_inner_stride = num_codes;
  } else if (how == 2) {
    p.gradient = logits_device.data();
    p.gradient_outer_stride = p.logits_outer_stride;
    p.gradient_inner_stride = p.logits_inner_stride;
  }
  launch(p, nullptr);
  return {to_host(losses, "<f4", {outer, inner}), to_host(total, "<f4", {1}),
          how == 2 ? to_host(logits_device, dtype, logits.shape) : to_host(gradient, dtype, packed)};
}

}  // namespace rqk::emulation
