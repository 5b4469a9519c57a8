// CPU kernels of residual_decode, one table per instruction set.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/residual_decode/params.h"

namespace rqk {

struct ResidualDecodeKernels {
  // Decodes rows [begin, end); returns whether all their codes are in range.
  bool (*decode_rows)(const ResidualDecodeParams& params, int64_t begin, int64_t end);
};

RQK_DECLARE_KERNEL_TABLE(ResidualDecodeKernels, residual_decode_kernels)

}  // namespace rqk
