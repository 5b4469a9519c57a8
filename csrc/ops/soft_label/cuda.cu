// Launchers of the soft labels on the current stream.
#include "common/launch.cuh"
#include "ops/soft_label/kernel.cuh"

namespace rqk {
namespace soft_label {
namespace {

template <FloatType kType, bool kLoss>
void launch_rows(const char* op, const SoftLabelCrossEntropyParams& p, void* stream) {
  const SoftLabels& labels = p.labels;
  const bool is_shared = labels.codebook_stride == 0;
  const int64_t rows = is_shared ? labels.outer * labels.inner : labels.outer;
  const Tiles tiles{is_shared ? 1 : labels.inner, (rows + kRows - 1) / kRows};
  launch_kernel(op, label_rows<kType, kLoss>, grid_for(tiles.codebooks * tiles.per_codebook), kThreads, 0, stream, p,
                tiles);
}

}  // namespace
}  // namespace soft_label

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
