// What launchers share. Kernel files (kernel.cuh) do not include this: they are device code only.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace rqk {

// A launch reports a bad configuration here, and an error of an earlier kernel too.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// Blocks of a kernel that loops over `items` with a stride of the grid.
inline unsigned grid_for(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, INT32_MAX)); }

}  // namespace rqk
