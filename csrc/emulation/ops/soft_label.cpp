#include <cmath>

#include "emulation/cases.h"
#include "ops/soft_label/plan.h"

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

// Bytes of shared memory of a block, bits after which an mma errs (0: exact).
void set_device(const Array& numbers) {
  int64_t values[2];
  std::memcpy(values, numbers.data.data(), sizeof(values));
  device() = {};
  device().shared_bytes = static_cast<int>(values[0]);
  if (values[1] != 0) device().mma_error = std::ldexp(1.0, -static_cast<int>(values[1]));
}

// How many rows went the direct way; -1 where the channels leave no room for tiles.
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

// x (o, i, c), codebooks (1 or i, k, c), tau, device (2) -> q (o, i, k), direct rows (1)
std::vector<Array> distance_softmax(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 3), &codebooks = inputs.array(1, "<f4", 3);
  const DeviceBuffer x_device = to_device(x), codebooks_device = to_device(codebooks);
  const std::vector<int64_t> shape{x.shape[0], x.shape[1], codebooks.shape[1]};
  const DeviceBuffer q = device_array("<f4", shape);
  DistanceSoftmaxParams p{};
  p.labels = labels_of(x, codebooks, x_device, codebooks_device, scalar(inputs, 2));
  set_device(inputs.array(3, "<i8", 1));
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p.labels)));
  p.labels.workspace = static_cast<uint8_t*>(workspace.data());
  p.q = static_cast<float*>(q.data());
  launch(p, nullptr);
  return {to_host(q, "<f4", shape), direct_rows(p.labels)};
}

// logits, of `type`: (o, i, k + padding), or with `swapped` (i, o, k + padding); x (o, i, c), codebooks (1 or i, k, c),
// tau; mask u1 (o, i), weight (o * i, or 1, or 0 for none); type (0 float32, 1 float16, 2 bfloat16:
// its bits as uint16), swapped, how (0 no gradient, 1 a packed one, 2 in place), device (2)
// -> losses (o, i), total (1), gradient (packed, of the logits' shape in place, or empty), direct rows (1)
std::vector<Array> soft_label_cross_entropy(const Inputs& inputs) {
  const auto type = static_cast<FloatType>(inputs.number(6));
  const std::string dtype = type == FloatType::kFloat32 ? "<f4" : type == FloatType::kFloat16 ? "<f2" : "<u2";
  const Array& logits = inputs.array(0, dtype, 3);
  const Array &x = inputs.array(1, "<f4", 3), &codebooks = inputs.array(2, "<f4", 3);
  const Array &mask = inputs.array(4, "|u1", 2), &weight = inputs.array(5, "<f4", 1);
  const bool swapped = inputs.number(7) != 0;
  const int64_t how = inputs.number(8), stride = logits.shape[2];
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
  set_device(inputs.array(9, "<i8", 1));
  const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p.labels)));
  p.labels.workspace = static_cast<uint8_t*>(workspace.data());
  launch(p, nullptr);
  return {to_host(losses, "<f4", {outer, inner}), to_host(total, "<f4", {1}),
          how == 2 ? to_host(logits_device, dtype, logits.shape) : to_host(gradient, dtype, packed),
          direct_rows(p.labels)};
}

}  // namespace rqk::emulation
