// Which instruction set the CPU kernels use: the best of this machine, or what RQK_CPU_CAPABILITY forces.
#pragma once

namespace rqk {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// Decided once. Throws std::invalid_argument where RQK_CPU_CAPABILITY names an unknown level, or one that this
// machine does not have.
CpuCapability cpu_capability();

const char* capability_name(CpuCapability capability);

}  // namespace rqk
