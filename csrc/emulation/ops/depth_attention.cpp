#include "ops/depth_attention/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {
namespace {

// How an array (n, h, d, stride) lies in memory, or with `swapped` one (n, d, h, stride): (n, h, d) seen from `offset`
// on.
struct Layout {
  FloatType type;
  bool swapped;
  int64_t offset;

  template <class T>
  HeadRows<T> rows(const DeviceBuffer& memory, const std::vector<int64_t>& shape) const {
    const int64_t outer = shape[2] * shape[3], inner = shape[3];
    return {static_cast<char*>(memory.data()) + offset * size_of(type), shape[1] * outer, swapped ? inner : outer,
            swapped ? outer : inner};
  }
};

}  // namespace

// q, k, v, grad of `type`: (n, h, d, stride), or with `swapped` (n, d, h, stride); type (0 float32, 1 float16, 2
// bfloat16: its bits as uint16), swapped, head_dim, offset: rows are elements [offset, offset + head_dim) of a stride;
// scale f4 (1), shared_bytes of the device (0: as it is) -> out, grad_q, grad_k, grad_v, each as its twin lies
std::vector<Array> depth_attention(const Inputs& inputs) {
  const Layout layout{static_cast<FloatType>(inputs.number(4)), inputs.number(5) != 0, inputs.number(7)};
  const std::string dtype = layout.type == FloatType::kFloat32   ? "<f4"
                            : layout.type == FloatType::kFloat16 ? "<f2"
                                                                 : "<u2";
  const Array &q = inputs.array(0, dtype, 4), &k = inputs.array(1, dtype, 4), &v = inputs.array(2, dtype, 4);
  const Array& grad = inputs.array(3, dtype, 4);
  if (inputs.number(9) != 0) device().shared_bytes = inputs.number(9);
  const DeviceBuffer q_device = to_device(q), k_device = to_device(k), v_device = to_device(v);
  const DeviceBuffer grad_device = to_device(grad), out = device_array(dtype, q.shape);
  const DeviceBuffer grad_q = device_array(dtype, q.shape), grad_k = device_array(dtype, k.shape),
                     grad_v = device_array(dtype, v.shape);

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
  p.head_dim = static_cast<int>(inputs.number(6));
  std::memcpy(&p.scale, inputs.array(8, "<f4", 1).data.data(), sizeof(p.scale));
  b.grad = layout.rows<const void>(grad_device, q.shape);
  b.grad_q = layout.rows<void>(grad_q, q.shape);
  b.grad_k = layout.rows<void>(grad_k, k.shape);
  b.grad_v = layout.rows<void>(grad_v, v.shape);
  launch(p, nullptr);
  launch(b, nullptr);
  return {to_host(out, dtype, q.shape), to_host(grad_q, dtype, q.shape), to_host(grad_k, dtype, k.shape),
          to_host(grad_v, dtype, v.shape)};
}

}  // namespace rqk::emulation
