// Kernel launches for cuda.cu files, on a GPU's stream or in the emulation.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device.h"

namespace rqk {

// Properties of the current device that launchers size their work by.
struct DeviceLimits {
  int multiprocessors;
  int64_t shared_bytes;  // per block, if the block opts in to the maximum
};

inline DeviceLimits device_limits(const char* op) {
#ifdef __CUDACC__
  // Attributes are cached on the host: no host-device sync here.
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

// Number of blocks for a kernel with a grid-stride loop over `items`.
inline unsigned grid_for(int64_t items) {
#ifdef RQK_EMULATION
  // Fewer under some schedules, so that the loop runs more than once.
  items = emulation::strided_grid(items);
#endif
  return static_cast<unsigned>(std::min<int64_t>(items, INT32_MAX));
}

// Shared memory available to every launch: in total, and its dynamic part. More needs cudaFuncSetAttribute, which is
// slow; it is called only for more than 36 KiB of dynamic memory, so a kernel with less may declare 12 KiB of static.
constexpr size_t kDefaultShared = 48 * 1024, kDefaultDynamicShared = 36 * 1024;

#ifdef __CUDACC__
// Raises the kernel's limit to all that the device has, once per kernel and device. A limit of `shared` bytes would be
// a race: another thread could lower it before this one launches.
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

// `shared`: dynamic shared memory in bytes. An empty grid is a no-op.
template <class... Params, class... Args>
void launch_kernel(const char* op, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, void* stream,
                   const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  cudaError_t error = shared > kDefaultDynamicShared ? raise_shared_limit(op, kernel, shared) : cudaSuccess;
  if (error == cudaSuccess) kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  // Reports a bad configuration of this launch, but also the error of an earlier kernel. Clear it in any case, or the
  // next launch would report it again.
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
