// my_op on a GPU: one thread per element.
//
// TODO(my_op): the idea, and the bytes and operations that the kernel must move. Here: reads 4 bytes of x and writes 4
// of y per element, for one multiplication.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/my_op/params.h"

namespace rqk {
namespace my_op {

constexpr int kThreads = 256;

// Works with any number of blocks.
__global__ void __launch_bounds__(kThreads) multiply(MyOpParams p) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.elements; i += stride) {
    p.y[i] = p.factor * p.x[i];
  }
}

}  // namespace my_op
}  // namespace rqk
