// Parameters of my_op: raw pointers, sizes in elements. All arrays are contiguous.
#pragma once

#include <cstdint>

namespace rqk {

// TODO(my_op): the arrays of the operator, each with its shape.
struct MyOpParams {
  const float* x;  // (elements)
  int64_t elements;
  float factor;
  float* y;  // (elements)
};

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const MyOpParams& params, void* stream);

}  // namespace rqk
