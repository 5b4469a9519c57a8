// rqkernels::my_op: schema, argument checks, tensors to params. Part of both libraries.
#include "common/tensors.h"
#include "ops/my_op/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "my_op";

// TODO(my_op): shapes, devices and values, with the argument's name, what was expected and what came. The reference
// checks the same, in the same words (check_shapes in rqkernels/reference/my_op.py).
void check_shapes(const Tensor& x) {
  if (x.dim() < 1) rqk::value_error(kOp, ": x must be (..., C), got a scalar");
  rqk::check_elements(kOp, "x", x);
}

Tensor my_op(Tensor x, double factor) {
  check_shapes(x);
  rqk::LaunchScope scope(x);

  const Tensor x_float = rqk::as_float(x);
  const Tensor y = rqk::empty(rqk::sizes_of(x), ScalarType::Float, x);

  rqk::MyOpParams params{};
  params.x = x_float.const_data_ptr<float>();
  params.elements = x.numel();
  params.factor = static_cast<float>(factor);
  params.y = y.mutable_data_ptr<float>();
  if (params.elements > 0) rqk::launch(params, scope.stream());
  return rqk::to_type(y, x.scalar_type());
}

}  // namespace

RQK_REGISTER("my_op", "my_op(Tensor x, float factor) -> Tensor", my_op)
