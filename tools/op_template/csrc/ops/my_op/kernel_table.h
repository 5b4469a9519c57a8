// CPU kernels of my_op, one table per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/my_op/params.h"

namespace rqk {

struct MyOpKernels {
  // Elements [begin, end) of y.
  void (*multiply)(const MyOpParams& params, int64_t begin, int64_t end);
};

RQK_DECLARE_KERNEL_TABLE(MyOpKernels, my_op_kernels)

}  // namespace rqk
