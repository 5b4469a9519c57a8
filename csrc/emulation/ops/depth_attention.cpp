#include "ops/depth_attention/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {
namespace {

// Layout of an array (n, h, d, stride) in memory, or with `swapped` one (n, d, h, stride): (n, h, d) seen from `offset`
// on.
struct Layout {
  FloatType type;
  bool swapped;
  int64_t offset;

  template <class T>
  HeadRows<T> rows(const DeviceBuffer& memory, const std::vector<int64_t>& shape) const {
    const int64_t outer = shape[2] * shape[3], inner = shape[3];
    return {memory.as<char>() + offset * size_of(type), shape[1] * outer, swapped ? inner : outer,
            swapped ? outer : inner};
  }
};

}  // namespace

// q, k, v, grad of one type: (n, h, d, stride), or with `swapped` (n, d, h, stride); head_dim, offset: rows are
// elements [offset, offset + head_dim) of a stride; scale
//   -> out, grad_q, grad_k, grad_v, each as its twin lies
RQK_CASE(depth_attention) {
  const Array &q = inputs.floats("q", 4), &k = inputs.array("k", q.dtype, 4), &v = inputs.array("v", q.dtype, 4);
  const Array& grad = inputs.array("grad", q.dtype, 4);
  const Layout layout{float_type_of(q), inputs.flag("swapped"), inputs.integer("offset")};
  const DeviceBuffer q_device = to_device(q), k_device = to_device(k), v_device = to_device(v);
  const DeviceBuffer grad_device = to_device(grad), out = device_array(q.dtype, q.shape);
  const DeviceBuffer grad_q = device_array(q.dtype, q.shape), grad_k = device_array(q.dtype, k.shape),
                     grad_v = device_array(q.dtype, v.shape);

  DepthAttentionBackwardParams b{};
  DepthAttentionParams& p = b.forward;
  p.q = layout.rows<const void>(q_device, q.shape);
  p.k = layout.rows<const void>(k_device, k.shape);
  p.v = layout.rows<const void>(v_device, v.shape);
  p.out = layout.rows<void>(out, q.shape);
  p.type = layout.type;
  p.stacks = q.shape[0];
  p.heads = q.shape[layout.swapped ? 2 : 1];
  p.queries = static_cast<int>(q.shape[layout.swapped ? 1 : 2]);
  p.keys = static_cast<int>(k.shape[layout.swapped ? 1 : 2]);
  p.head_dim = static_cast<int>(inputs.integer("head_dim"));
  p.scale = static_cast<float>(inputs.number("scale"));
  b.grad = layout.rows<const void>(grad_device, q.shape);
  b.grad_q = layout.rows<void>(grad_q, q.shape);
  b.grad_k = layout.rows<void>(grad_k, k.shape);
  b.grad_v = layout.rows<void>(grad_v, v.shape);
  launch(p, nullptr);
  launch(b, nullptr);
  return {to_host(out, q.dtype, q.shape), to_host(grad_q, q.dtype, q.shape), to_host(grad_k, q.dtype, k.shape),
          to_host(grad_v, q.dtype, v.shape)};
}

}  // namespace rqk::emulation
