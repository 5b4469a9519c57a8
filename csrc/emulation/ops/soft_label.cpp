#include "emulation/cases.h"
#include "ops/soft_label/plan.h"

namespace rqk::emulation {
namespace {

// Arguments x (o, i, c), codebooks (1 or i, k, c), tau; all but the workspace.
struct LabelArrays {
  const Array &x, &codebooks;
  DeviceBuffer x_device, codebooks_device;
  double tau;

  explicit LabelArrays(const Inputs& inputs)
      : x(inputs.array("x", "<f4", 3)),
        codebooks(inputs.array("codebooks", "<f4", 3)),
        x_device(to_device(x)),
        codebooks_device(to_device(codebooks)),
        tau(inputs.number("tau")) {}

  SoftLabels labels() const {
    SoftLabels labels{};
    labels.x = x_device.as<const float>();
    labels.codebook = codebooks_device.as<const float>();
    labels.outer = x.shape[0];
    labels.inner = x.shape[1];
    labels.channels = x.shape[2];
    labels.num_codes = codebooks.shape[1];
    labels.codebook_stride = codebooks.shape[0] == 1 ? 0 : labels.num_codes * labels.channels;
    labels.tau = tau;
    return labels;
  }
};

// The number of rows that took the direct path; -1 if the channels leave no room for tiles.
Array direct_rows(const SoftLabels& labels) {
  rqk::soft_label::Work w;
  rqk::soft_label::plan(labels, device().shared_bytes, labels.workspace, &w);
  int64_t rows = w.blocks == 0 ? -1 : 0;
  for (int64_t q = 0; q < w.codebooks && w.blocks > 0; ++q) rows += w.direct_counts[q];
  Array result{"<i8", {1}, std::vector<std::byte>(sizeof(rows))};
  std::memcpy(result.data.data(), &rows, sizeof(rows));
  return result;
}

}  // namespace

// x, codebooks, tau (see LabelArrays) -> q (o, i, k), direct rows (1)
RQK_CASE(distance_softmax) {
  const LabelArrays arrays(inputs);
  const std::vector<int64_t> shape{arrays.x.shape[0], arrays.x.shape[1], arrays.codebooks.shape[1]};
  const DeviceBuffer q = device_array("<f4", shape);
  DistanceSoftmaxParams p{};
  p.labels = arrays.labels();
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p.labels)));
  p.labels.workspace = workspace.as<uint8_t>();
  p.q = q.as<float>();
  launch(p, nullptr);
  return {to_host(q, "<f4", shape), direct_rows(p.labels)};
}

// x, codebooks, tau (see LabelArrays); logits of any type: (o, i, k + padding), or with `swapped`
// (i, o, k + padding); mask u1 (o, i), weight (o * i, or 1) or None; gradient: "none", "packed" or "in_place"
//   -> losses (o, i), total (1), gradient (packed, of the logits' shape in place, or empty), direct rows (1)
RQK_CASE(soft_label_cross_entropy) {
  const LabelArrays arrays(inputs);
  const Array &logits = inputs.floats("logits", 3), &mask = inputs.array("mask", "|u1", 2);
  const Array* weight = inputs.optional("weight", "<f4", 1);
  const bool swapped = inputs.flag("swapped");
  enum { kNoGradient, kPacked, kInPlace };
  const size_t how = inputs.choice("gradient", {"none", "packed", "in_place"});
  const DeviceBuffer logits_device = to_device(logits), mask_device = to_device(mask);
  const DeviceBuffer weight_device = to_device(weight == nullptr ? Array{} : *weight);
  const int64_t outer = arrays.x.shape[0], inner = arrays.x.shape[1], num_codes = arrays.codebooks.shape[1];
  const int64_t stride = logits.shape[2];
  const std::vector<int64_t> packed{how == kPacked ? outer : 0, inner, num_codes};
  const DeviceBuffer gradient = device_array(logits.dtype, packed);
  const DeviceBuffer losses = device_array("<f4", {outer, inner}), total = device_array("<f4", {1});

  SoftLabelCrossEntropyParams p{};
  p.labels = arrays.labels();
  p.logits = logits_device.data();
  p.type = float_type_of(logits);
  p.logits_outer_stride = swapped ? stride : inner * stride;
  p.logits_inner_stride = swapped ? outer * stride : stride;
  p.mask = mask_device.as<const uint8_t>();
  p.weight = weight == nullptr ? nullptr : weight_device.as<const float>();
  p.weight_stride = weight != nullptr && weight->elements() > 1 ? 1 : 0;
  p.losses = losses.as<float>();
  p.total = total.as<float>();
  if (how == kPacked) {
    p.gradient = gradient.data();
    p.gradient_outer_stride = inner * num_codes;
    p.gradient_inner_stride = num_codes;
  } else if (how == kInPlace) {
    p.gradient = logits_device.data();
    p.gradient_outer_stride = p.logits_outer_stride;
    p.gradient_inner_stride = p.logits_inner_stride;
  }
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p.labels)));
  p.labels.workspace = workspace.as<uint8_t>();
  launch(p, nullptr);
  return {
      to_host(losses, "<f4", {outer, inner}), to_host(total, "<f4", {1}),
      how == kInPlace ? to_host(logits_device, logits.dtype, logits.shape) : to_host(gradient, logits.dtype, packed),
      direct_rows(p.labels)};
}

}  // namespace rqk::emulation
