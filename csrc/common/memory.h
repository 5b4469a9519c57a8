// Out-of-memory errors with torch's own text: a RuntimeError on a CPU. On a GPU rqkernels/_library.py turns it into
// torch.OutOfMemoryError, which only Python can raise.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rqk {

[[noreturn]] inline void refuse_cpu_bytes(uint64_t bytes) {
  throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                           std::to_string(bytes) + " bytes.");
}

[[noreturn]] inline void refuse_gpu_bytes(uint64_t bytes) {
  throw std::runtime_error("CUDA out of memory. Tried to allocate " + std::to_string(bytes) + " bytes.");
}

}  // namespace rqk
