// rqkernels::depth_attention and depth_attention_packed, each with its backward: schemas, argument checks, tensors to
// params.
#include <cmath>

#include "common/tensors.h"
#include "ops/depth_attention/params.h"

namespace {

using rqk::HeadRows;
using rqk::Tensor;

constexpr const char* kOp = "depth_attention";
constexpr const char* kPacked = "depth_attention_packed";
constexpr const char* kInstead = "; larger ones are for torch.nn.functional.scaled_dot_product_attention";

// Returns t itself if its last dimension is contiguous.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) == 1 || t.stride(last) == 1 ? t : rqk::contiguous(t);
}

void check_sizes(const char* op, const char* name, const Tensor& t, const char* layout, int64_t depths,
                 int64_t head_dim) {
  if (depths < 1 || depths > rqk::kMostDepths) {
    rqk::value_error(op, ": ", name, " must be ", layout, " with 1 <= D <= ", rqk::kMostDepths, ", got ",
                     rqk::shape_of(t), kInstead);
  }
  if (head_dim < 1 || head_dim > rqk::kMostHeadDim) {
    rqk::value_error(op, ": ", name, " must be ", layout, " with 1 <= head_dim <= ", rqk::kMostHeadDim, ", got ",
                     rqk::shape_of(t), kInstead);
  }
}

float checked_scale(const char* op, std::optional<double> scale, int64_t head_dim) {
  const double value = scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(head_dim));
  // The kernels use it in float32, where 1e39 is infinite.
  if (!std::isfinite(static_cast<float>(value))) {
    rqk::value_error(op, ": scale must be finite", std::isfinite(value) ? " in float32" : "", ", got ",
                     rqk::number_text(value));
  }
  return static_cast<float>(value);
}

void check_like(const char* op, const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  rqk::check_same_device(op, name, t, other_name, other);
  if (t.scalar_type() != other.scalar_type()) {
    rqk::value_error(op, ": ", name, " and ", other_name, " must have the same dtype");
  }
}

// --- q, k and v (N, H, D, head_dim) ----------------------------------------------------------------------

template <class T>
HeadRows<T> head_rows(T* data, const Tensor& t) {
  return {data, t.stride(0), t.stride(1), t.stride(2)};
}

// New memory (N, D, H, head_dim), viewed as (N, H, D, head_dim).
Tensor new_heads(const Tensor& like) {
  const Tensor memory = rqk::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type(), like);
  return torch::stable::transpose(memory, 1, 2);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  constexpr const char* kLayout = "(N, H, D, head_dim)";
  auto each = {std::make_pair("q", &q), std::make_pair("k", &k), std::make_pair("v", &v)};
  for (const auto& [name, t] : each) {
    if (t->dim() != 4) rqk::value_error(kOp, ": ", name, " must be ", kLayout, ", got ", rqk::shape_of(*t));
    check_sizes(kOp, name, *t, kLayout, t->size(2), t->size(3));
    rqk::check_elements(kOp, name, *t);
    check_like(kOp, name, *t, "q", q);
    if (t->size(0) != q.size(0) || t->size(1) != q.size(1) || t->size(3) != q.size(3)) {
      rqk::value_error(kOp, ": q, k and v must agree in N, H and head_dim, got q ", rqk::shape_of(q), " and ", name,
                       " ", rqk::shape_of(*t));
    }
  }
  if (v.size(2) != k.size(2)) {
    rqk::value_error(kOp, ": k and v must have the same number of depths, got k ", rqk::shape_of(k), " and v ",
                     rqk::shape_of(v));
  }
  if (k.size(2) < q.size(2)) {
    rqk::value_error(kOp, ": k must have at least the depths of q (a query sees its own key), got q ", rqk::shape_of(q),
                     " and k ", rqk::shape_of(k));
  }
}

// Sets all but `out`.
rqk::DepthAttentionParams params_of(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  rqk::DepthAttentionParams p{};
  p.q = head_rows(q.const_data_ptr(), q);
  p.k = head_rows(k.const_data_ptr(), k);
  p.v = head_rows(v.const_data_ptr(), v);
  p.type = rqk::float_type(kOp, "q", q);
  p.stacks = q.size(0);
  p.heads = q.size(1);
  p.queries = static_cast<int>(q.size(2));
  p.keys = static_cast<int>(k.size(2));
  p.head_dim = static_cast<int>(q.size(3));
  p.scale = checked_scale(kOp, scale, q.size(3));
  return p;
}

Tensor depth_attention(Tensor q, Tensor k, Tensor v, std::optional<double> scale) {
  check(q, k, v);
  rqk::LaunchScope scope(q);
  const Tensor from_q = with_rows(q), from_k = with_rows(k), from_v = with_rows(v), out = new_heads(q);
  rqk::DepthAttentionParams p = params_of(from_q, from_k, from_v, scale);
  p.out = head_rows(out.mutable_data_ptr(), out);
  rqk::launch(p, scope.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> depth_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                            std::optional<double> scale) {
  check(q, k, v);
  check_like(kOp, "grad", grad, "q", q);
  if (rqk::sizes_of(grad) != rqk::sizes_of(q)) {
    rqk::value_error(kOp, ": grad must have the shape of q, ", rqk::shape_of(q), ", got ", rqk::shape_of(grad));
  }
  rqk::LaunchScope scope(q);
  const Tensor from_q = with_rows(q), from_k = with_rows(k), from_v = with_rows(v), from_grad = with_rows(grad);
  const Tensor grad_q = new_heads(q), grad_k = new_heads(k), grad_v = new_heads(v);
  rqk::DepthAttentionBackwardParams p{};
  p.forward = params_of(from_q, from_k, from_v, scale);
  p.grad = head_rows(from_grad.const_data_ptr(), from_grad);
  p.grad_q = head_rows(grad_q.mutable_data_ptr(), grad_q);
  p.grad_k = head_rows(grad_k.mutable_data_ptr(), grad_k);
  p.grad_v = head_rows(grad_v.mutable_data_ptr(), grad_v);
  rqk::launch(p, scope.stream());
  return {grad_q, grad_k, grad_v};
}

// --- qkv (N, D, 3, H, head_dim) --------------------------------------------------------------------------

void check_packed(const Tensor& qkv) {
  constexpr const char* kLayout = "(N, D, 3, H, head_dim)";
  if (qkv.dim() != 5 || qkv.size(2) != 3) {
    rqk::value_error(kPacked, ": qkv must be ", kLayout, ", got ", rqk::shape_of(qkv));
  }
  check_sizes(kPacked, "qkv", qkv, kLayout, qkv.size(1), qkv.size(4));
  rqk::check_elements(kPacked, "qkv", qkv);
}

// The rows of q, k or v in qkv: part 0, 1 or 2.
template <class T>
HeadRows<T> packed_rows(T* data, const Tensor& qkv, int64_t part) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  const int64_t offset = part * qkv.stride(2) * rqk::size_of(rqk::float_type(kPacked, "qkv", qkv));
  return {static_cast<Byte*>(data) + offset, qkv.stride(0), qkv.stride(3), qkv.stride(1)};
}

// (N, D, H, head_dim)
template <class T>
HeadRows<T> unpacked_rows(T* data, const Tensor& t) {
  return {data, t.stride(0), t.stride(2), t.stride(1)};
}

rqk::DepthAttentionParams packed_params(const Tensor& qkv, std::optional<double> scale) {
  rqk::DepthAttentionParams p{};
  p.q = packed_rows(qkv.const_data_ptr(), qkv, 0);
  p.k = packed_rows(qkv.const_data_ptr(), qkv, 1);
  p.v = packed_rows(qkv.const_data_ptr(), qkv, 2);
  p.type = rqk::float_type(kPacked, "qkv", qkv);
  p.stacks = qkv.size(0);
  p.heads = qkv.size(3);
  p.queries = p.keys = static_cast<int>(qkv.size(1));
  p.head_dim = static_cast<int>(qkv.size(4));
  p.scale = checked_scale(kPacked, scale, qkv.size(4));
  return p;
}

Tensor depth_attention_packed(Tensor qkv, std::optional<double> scale) {
  check_packed(qkv);
  rqk::LaunchScope scope(qkv);
  const Tensor from = with_rows(qkv);
  const Tensor out = rqk::empty({qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)}, qkv.scalar_type(), qkv);
  rqk::DepthAttentionParams p = packed_params(from, scale);
  p.out = unpacked_rows(out.mutable_data_ptr(), out);
  rqk::launch(p, scope.stream());
  return out;
}

Tensor depth_attention_packed_backward(Tensor grad, Tensor qkv, std::optional<double> scale) {
  check_packed(qkv);
  check_like(kPacked, "grad", grad, "qkv", qkv);
  const std::vector<int64_t> shape{qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
  if (rqk::sizes_of(grad) != shape) {
    rqk::value_error(kPacked, ": grad must be (N, D, H, head_dim) as the result of qkv ", rqk::shape_of(qkv), ", got ",
                     rqk::shape_of(grad));
  }
  rqk::LaunchScope scope(qkv);
  const Tensor from = with_rows(qkv), from_grad = with_rows(grad);
  const Tensor grad_qkv = rqk::empty(rqk::sizes_of(qkv), qkv.scalar_type(), qkv);
  rqk::DepthAttentionBackwardParams p{};
  p.forward = packed_params(from, scale);
  p.grad = unpacked_rows(from_grad.const_data_ptr(), from_grad);
  p.grad_q = packed_rows(grad_qkv.mutable_data_ptr(), grad_qkv, 0);
  p.grad_k = packed_rows(grad_qkv.mutable_data_ptr(), grad_qkv, 1);
  p.grad_v = packed_rows(grad_qkv.mutable_data_ptr(), grad_qkv, 2);
  rqk::launch(p, scope.stream());
  return grad_qkv;
}

}  // namespace

RQK_REGISTER("depth_attention", "depth_attention(Tensor q, Tensor k, Tensor v, float? scale) -> Tensor",
             depth_attention)
RQK_REGISTER("depth_attention_backward",
             "depth_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, float? scale)"
             " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
             depth_attention_backward)
RQK_REGISTER("depth_attention_packed", "depth_attention_packed(Tensor qkv, float? scale) -> Tensor",
             depth_attention_packed)
RQK_REGISTER("depth_attention_packed_backward",
             "depth_attention_packed_backward(Tensor grad, Tensor qkv, float? scale) -> Tensor",
             depth_attention_packed_backward)
