#include "ops/my_op/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// x (n), factor -> y (n)
RQK_CASE(my_op) {
  const Array& x = inputs.array("x", "<f4", 1);
  const DeviceBuffer x_device = to_device(x), y = device_array("<f4", x.shape);

  MyOpParams p{};
  p.x = x_device.as<const float>();
  p.elements = x.elements();
  p.factor = static_cast<float>(inputs.number("factor"));
  p.y = y.as<float>();
  launch(p, nullptr);
  return {to_host(y, "<f4", x.shape)};
}

}  // namespace rqk::emulation
