// rqkernels::distance_softmax and soft_label_cross_entropy: schemas, argument checks, tensors to params.
#include <algorithm>
#include <cmath>

#include "common/tensors.h"
#include "ops/soft_label/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kSoftmax = "distance_softmax";
constexpr const char* kCrossEntropy = "soft_label_cross_entropy";

int64_t product(const std::vector<int64_t>& sizes, size_t count) {
  int64_t result = 1;
  for (size_t i = 0; i < count; ++i) result *= sizes[i];
  return result;
}

// The tensors that `labels` points to, to keep them alive.
struct LabelTensors {
  Tensor x, codebook;
  std::optional<Tensor> workspace;
  rqk::SoftLabels labels;
};

// The tensor as contiguous `type`; a copy if it may share memory with `written`, which the kernel writes.
Tensor as_read(const Tensor& t, ScalarType type, const Tensor* written) {
  const bool is_safe = t.scalar_type() == type && t.is_contiguous() && !(written && rqk::may_overlap(t, *written));
  return is_safe ? t : rqk::copy_of(t, type);
}

LabelTensors label_tensors(const char* op, const Tensor& x, const Tensor& codebook, double tau,
                           const Tensor* written = nullptr) {
  if (!(tau > 0)) rqk::value_error(op, ": tau must be > 0, got ", rqk::number_text(tau));
  if (x.dim() < 1) rqk::value_error(op, ": x must be (..., C), got a scalar");
  rqk::check_elements(op, "x", x);
  rqk::check_elements(op, "codebook", codebook);
  if (codebook.dim() != 2 && codebook.dim() != 3) {
    rqk::value_error(op, ": codebook must be (K, C), or (D, K, C) for x (..., D, C); got ", rqk::shape_of(codebook));
  }
  if (codebook.numel() == 0) rqk::value_error(op, ": codebook must not be empty, got ", rqk::shape_of(codebook));
  const std::vector<int64_t> sizes = rqk::sizes_of(x);
  const int64_t channels = sizes.back(), codebook_channels = codebook.size(codebook.dim() - 1);
  if (codebook_channels != channels) {
    rqk::value_error(op, ": x ", rqk::shape_of(x), " has ", channels, " channels, codebook ", rqk::shape_of(codebook),
                     " has ", codebook_channels);
  }
  const size_t leading = sizes.size() - 1;
  const int64_t inner = leading > 0 ? sizes[leading - 1] : 1;
  if (codebook.dim() == 3 && (leading < 1 || inner != codebook.size(0))) {
    rqk::value_error(op, ": x must be (..., D, C) for codebook ", rqk::shape_of(codebook),
                     " with D = ", codebook.size(0), ", got ", rqk::shape_of(x));
  }
  if (codebook.size(codebook.dim() - 2) > INT32_MAX) {
    rqk::value_error(op, ": codebook may hold at most 2^31 - 1 codes, got ", rqk::shape_of(codebook));
  }
  rqk::check_same_device(op, "x", x, "codebook", codebook);

  LabelTensors result{as_read(x, ScalarType::Float, written), as_read(codebook, ScalarType::Float, written), {}, {}};
  rqk::SoftLabels& labels = result.labels;
  labels.x = result.x.const_data_ptr<float>();
  labels.codebook = result.codebook.const_data_ptr<float>();
  labels.channels = channels;
  labels.num_codes = codebook.size(codebook.dim() - 2);
  labels.codebook_stride = codebook.dim() == 3 ? labels.num_codes * channels : 0;
  labels.inner = inner;
  labels.outer = leading > 0 ? product(sizes, leading - 1) : 1;
  labels.tau = tau;
  return result;
}

// On a GPU only. Freed when the caller returns, and reused only after the kernels launched here: torch's allocator
// keeps memory to its stream.
void take_workspace([[maybe_unused]] LabelTensors& from) {
#ifdef RQK_CUDA_LIBRARY
  from.workspace = rqk::empty({rqk::workspace_bytes(from.labels)}, ScalarType::Byte, from.x);
  from.labels.workspace = from.workspace->mutable_data_ptr<uint8_t>();
#endif
}

Tensor distance_softmax(Tensor x, Tensor codebook, double tau) {
  LabelTensors from = label_tensors(kSoftmax, x, codebook, tau);
  rqk::LaunchScope scope(x);
  take_workspace(from);
  std::vector<int64_t> sizes = rqk::sizes_of(x);
  sizes.back() = from.labels.num_codes;
  const Tensor q = rqk::empty(sizes, ScalarType::Float, x);
  rqk::launch(rqk::DistanceSoftmaxParams{from.labels, q.mutable_data_ptr<float>()}, scope.stream());
  return q;
}

// Strides of a tensor (..., K) viewed as (outer, inner, K), K contiguous.
struct RowStrides {
  bool exist;
  int64_t outer, inner;
};

RowStrides row_strides(const Tensor& t) {
  const std::vector<int64_t> sizes = rqk::sizes_of(t);
  const auto strides = t.strides();
  const int64_t last = t.dim() - 1;
  RowStrides rows{sizes[last] <= 1 || strides[last] == 1, 0, 0};
  if (last > 0) rows.inner = strides[last - 1];
  int64_t expected = -1;  // stride of the next larger dimension
  for (int64_t d = last - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (expected < 0) rows.outer = strides[d];
    rows.exist = rows.exist && (expected < 0 || strides[d] == expected);
    expected = strides[d] * sizes[d];
  }
  return rows;
}

// True if no two elements share memory, as far as sizes and strides show.
bool is_apart(const Tensor& t) {
  if (t.numel() == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < reach) return false;
    reach = stride * (size - 1) + reach;
  }
  return true;
}

void check(const Tensor& logits, const Tensor& x, const Tensor& codebook, const std::optional<Tensor>& mask,
           const std::optional<Tensor>& weight, bool reduce) {
  const std::vector<int64_t> sizes = rqk::sizes_of(logits), x_sizes = rqk::sizes_of(x);
  const std::vector<int64_t> leading(x_sizes.begin(), x_sizes.end() - 1);
  if (sizes.empty() || std::vector<int64_t>(sizes.begin(), sizes.end() - 1) != leading) {
    rqk::value_error(kCrossEntropy, ": logits ", rqk::shape_of(logits), " and x ", rqk::shape_of(x),
                     " must agree up to the last dimension");
  }
  if (sizes.back() != codebook.size(codebook.dim() - 2)) {
    rqk::value_error(kCrossEntropy, ": logits have ", sizes.back(), " codes, the codebook has ",
                     codebook.size(codebook.dim() - 2));
  }
  rqk::check_elements(kCrossEntropy, "logits", logits);
  rqk::check_same_device(kCrossEntropy, "logits", logits, "x", x);
  if (mask.has_value()) {
    rqk::check_same_device(kCrossEntropy, "logits", logits, "mask", *mask);
    if (mask->scalar_type() != ScalarType::Bool || rqk::sizes_of(*mask) != leading) {
      rqk::value_error(kCrossEntropy, ": mask must be bool of the shape of logits without K, ", rqk::shape_of(logits),
                       "; got ", rqk::shape_of(*mask));
    }
  }
  if (weight.has_value()) {
    rqk::check_same_device(kCrossEntropy, "logits", logits, "weight", *weight);
    if (weight->scalar_type() != ScalarType::Float || (weight->dim() != 0 && rqk::sizes_of(*weight) != leading)) {
      rqk::value_error(kCrossEntropy, ": weight must be float32, a scalar or one for each row; got ",
                       rqk::shape_of(*weight));
    }
    if (reduce && weight->dim() != 0) {
      rqk::value_error(kCrossEntropy, ": weight must be a scalar for a reduced loss, got ", rqk::shape_of(*weight));
    }
  }
}

// Losses of the rows and, if `reduce`, weight[0] times their sum, else an empty tensor. With in_place, `gradient` may
// be `logits`; their layout is then checked even without a gradient.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& x, const Tensor& codebook, double tau,
                                         const std::optional<Tensor>& mask, const std::optional<Tensor>& weight,
                                         bool reduce, bool in_place, const Tensor* gradient) {
  const Tensor* written = in_place ? &logits : nullptr;
  LabelTensors from = label_tensors(kCrossEntropy, x, codebook, tau, written);
  check(logits, x, codebook, mask, weight, reduce);
  rqk::LaunchScope scope(logits);
  take_workspace(from);

  RowStrides strides = row_strides(logits);
  Tensor rows = logits;
  if (!strides.exist) {
    if (in_place) {
      rqk::value_error(kCrossEntropy,
                       ": inplace needs logits (outer, inner, K) with contiguous K and at most two other strides, "
                       "got shape ",
                       rqk::shape_of(logits), "; make them contiguous first");
    }
    rows = rqk::contiguous(logits);
    strides = row_strides(rows);
  }
  std::vector<int64_t> leading = rqk::sizes_of(logits);
  leading.pop_back();
  const Tensor losses = rqk::empty(leading, ScalarType::Float, logits);
  const Tensor total = rqk::empty(reduce ? std::vector<int64_t>{} : std::vector<int64_t>{0}, ScalarType::Float, logits);
  // Missing tensors are replaced by the logits and never read.
  const Tensor mask_packed = mask.has_value() ? as_read(*mask, ScalarType::Bool, written) : logits;
  const Tensor weight_packed = weight.has_value() ? as_read(*weight, ScalarType::Float, written) : logits;

  rqk::SoftLabelCrossEntropyParams params{};
  params.labels = from.labels;
  params.logits = rows.const_data_ptr();
  params.type = rqk::float_type(kCrossEntropy, "logits", logits);
  params.logits_outer_stride = strides.outer;
  params.logits_inner_stride = strides.inner;
  params.mask = mask.has_value() ? static_cast<const uint8_t*>(mask_packed.const_data_ptr()) : nullptr;
  params.weight = weight.has_value() ? weight_packed.const_data_ptr<float>() : nullptr;
  params.weight_stride = weight.has_value() && weight->dim() > 0 ? 1 : 0;
  params.losses = losses.mutable_data_ptr<float>();
  params.total = reduce ? total.mutable_data_ptr<float>() : nullptr;
  if (gradient != nullptr) {
    const RowStrides gradient_strides = row_strides(*gradient);
    params.gradient = gradient->mutable_data_ptr();
    params.gradient_outer_stride = gradient_strides.outer;
    params.gradient_inner_stride = gradient_strides.inner;
  }
  rqk::launch(params, scope.stream());
  return {total, losses};
}

std::tuple<Tensor, Tensor, Tensor> soft_label_cross_entropy(Tensor logits, Tensor x, Tensor codebook, double tau,
                                                            std::optional<Tensor> mask, std::optional<Tensor> weight,
                                                            bool reduce, bool with_gradient) {
  const Tensor gradient =
      rqk::empty(with_gradient ? rqk::sizes_of(logits) : std::vector<int64_t>{0}, logits.scalar_type(), logits);
  const auto [total, losses] =
      cross_entropy(logits, x, codebook, tau, mask, weight, reduce, false, with_gradient ? &gradient : nullptr);
  return {total, losses, gradient};
}

Tensor soft_label_cross_entropy_(Tensor logits, Tensor x, Tensor codebook, double tau, std::optional<Tensor> mask,
                                 std::optional<Tensor> weight, bool with_gradient) {
  if (!is_apart(logits)) {
    rqk::value_error(kCrossEntropy, ": inplace needs logits that share no memory with one another, got shape ",
                     rqk::shape_of(logits), " with a stride too small");
  }
  return std::get<1>(
      cross_entropy(logits, x, codebook, tau, mask, weight, false, true, with_gradient ? &logits : nullptr));
}

}  // namespace

RQK_REGISTER("distance_softmax", "distance_softmax(Tensor x, Tensor codebook, float tau) -> Tensor", distance_softmax)
RQK_REGISTER("soft_label_cross_entropy",
             "soft_label_cross_entropy(Tensor logits, Tensor x, Tensor codebook, float tau, Tensor? mask,"
             " Tensor? weight, bool reduce, bool with_gradient) -> (Tensor total, Tensor losses, Tensor gradient)",
             soft_label_cross_entropy)
// Writes the gradient over the logits.
RQK_REGISTER("soft_label_cross_entropy_",
             "soft_label_cross_entropy_(Tensor(a!) logits, Tensor x, Tensor codebook, float tau, Tensor? mask,"
             " Tensor? weight, bool with_gradient) -> Tensor",
             soft_label_cross_entropy_)
