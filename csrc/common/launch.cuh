// What launchers (cuda.cu) share: one way to launch a kernel, on a GPU's stream or on the emulation's host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device.h"

namespace rqk {

// What launchers size their work by, of the current device.
struct DeviceLimits {
  int multiprocessors;
  int64_t shared_bytes;  // of a block that asks for all it may have
};

inline DeviceLimits device_limits(const char* op) {
#ifdef __CUDACC__
  // Attributes are known to the host: nothing here waits for the device.
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
  return {multiprocessors, shared_bytes};
#else
  static_cast<void>(op);
  return {emulation::device().multiprocessors, emulation::device().shared_bytes};
#endif
}

// Blocks of a kernel that loops over `items` with a stride of the grid.
inline unsigned grid_for(int64_t items) {
#ifdef RQK_EMULATION
  // Fewer under some schedules, so that the loop goes round more than once.
  items = emulation::strided_grid(items);
#endif
  return static_cast<unsigned>(std::min<int64_t>(items, INT32_MAX));
}

// `shared` is dynamic shared memory in bytes. An empty grid is nothing to do.
template <class... Params, class... Args>
void launch_kernel(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, void* stream,
                   const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  // More than the 48 KiB that every launch may use must be asked for; static shared memory counts too, and no kernel
  // here has more than 16 KiB of it.
  if (shared > 32 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  }
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(args...);
    // A launch reports a bad configuration here, and an error of an earlier kernel too.
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
#else
  static_cast<void>(stream);
  emulation::launch(op, grid, block, shared, [&] { kernel(args...); });
#endif
}

}  // namespace rqk
