// Launches of distance_softmax and soft_label_cross_entropy on the current stream.
#include "common/launch.cuh"
#include "ops/soft_label/kernel.cuh"

namespace rqk {
namespace soft_label {
namespace {

int64_t plan_here(const char* op, const SoftLabels& labels, Work* w) {
  return plan(labels, device_limits(op).shared_bytes, labels.workspace, w);
}

template <FloatType kType, bool kLoss>
void launch_rows(const char* op, const SoftLabelCrossEntropyParams& p, void* stream) {
  Work w;
  plan_here(op, p.labels, &w);
  if (w.blocks > 0) {
    launch_kernel(op, find_centers, grid_for(divide_up(w.codebooks * w.chunks * kChunk, kThreads)), kThreads, 0, stream,
                  p.labels, w);
    launch_kernel(op, pack_codes, grid_for(w.codebooks * w.tiles), kThreads, 0, stream, p.labels, w);
    launch_kernel(op, label_rows<kType, kLoss>, static_cast<unsigned>(w.blocks), kThreads,
                  static_cast<size_t>(w.shared_bytes), stream, p, w);
  }
  launch_kernel(op, direct::label_listed_rows<kLoss>, grid_for(w.codebooks * divide_up(w.rows, direct::kRows)),
                kThreads, 0, stream, p, w);
}

}  // namespace
}  // namespace soft_label

int64_t workspace_bytes(const SoftLabels& labels) {
  soft_label::Work w;
  return soft_label::plan_here("soft_labels", labels, &w);
}

void launch(const DistanceSoftmaxParams& p, void* stream) {
  SoftLabelCrossEntropyParams rows{};
  rows.labels = p.labels;
  rows.type = FloatType::kFloat32;
  rows.gradient = p.q;
  rows.gradient_outer_stride = p.labels.inner * p.labels.num_codes;
  rows.gradient_inner_stride = p.labels.num_codes;
  soft_label::launch_rows<FloatType::kFloat32, false>("distance_softmax", rows, stream);
}

void launch(const SoftLabelCrossEntropyParams& p, void* stream) {
  constexpr const char* kOp = "soft_label_cross_entropy";
  switch (p.type) {
    case FloatType::kFloat32:
      soft_label::launch_rows<FloatType::kFloat32, true>(kOp, p, stream);
      break;
    case FloatType::kFloat16:
      soft_label::launch_rows<FloatType::kFloat16, true>(kOp, p, stream);
      break;
    case FloatType::kBFloat16:
      soft_label::launch_rows<FloatType::kBFloat16, true>(kOp, p, stream);
      break;
  }
  if (p.total == nullptr) return;
  launch_kernel(kOp, soft_label::add_losses, 1, soft_label::kThreads, 0, stream, p.losses,
                p.labels.outer * p.labels.inner, p.weight, p.total);
}

}  // namespace rqk
