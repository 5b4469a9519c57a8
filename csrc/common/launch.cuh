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

// What every launch may use of shared memory, static and dynamic. More must be asked for, which takes time: it is done
// where the dynamic part alone is above 36 KiB, and a kernel that has a smaller one may declare 12 KiB.
constexpr size_t kDefaultShared = 48 * 1024, kDefaultDynamicShared = 36 * 1024;

#ifdef __CUDACC__
// Asks for all that the device has, once for a kernel and device: were it for `shared` bytes, then another thread could
// ask for less before this one launches.
template <class Kernel>
cudaError_t raise_shared_limit(const char* op, Kernel* kernel, size_t shared) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const size_t left = static_cast<size_t>(device_limits(op).shared_bytes) - attributes.sharedSizeBytes;
  const int most = static_cast<int>(std::max(left, shared));
  if (attributes.maxDynamicSharedSizeBytes >= most) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}
#endif

// `shared` is dynamic shared memory in bytes. An empty grid is nothing to do.
template <class... Params, class... Args>
void launch_kernel(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, void* stream,
                   const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  cudaError_t error = shared > kDefaultDynamicShared ? raise_shared_limit(op, kernel, shared) : cudaSuccess;
  if (error == cudaSuccess) kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  // A launch reports a bad configuration here, and an error of an earlier kernel too. What failed before it is
  // forgotten, or the next launch would find it.
  const cudaError_t latest = cudaGetLastError();
  if (error == cudaSuccess) error = latest;
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
#else
  static_cast<void>(stream);
  const size_t most =
      shared > kDefaultDynamicShared ? static_cast<size_t>(emulation::device().shared_bytes) : kDefaultShared;
  emulation::launch(op, grid, block, shared, most, [&] { kernel(args...); });
#endif
}

}  // namespace rqk
