// Which instruction set the CPU kernels use: the best of this machine, or what RQK_CPU_CAPABILITY forces.
#pragma once

namespace rqk {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// Decided once. Throws std::invalid_argument where RQK_CPU_CAPABILITY names an unknown level, or one that this
// machine does not have.
CpuCapability cpu_capability();

const char* capability_name(CpuCapability capability);

// What a cpu_simd.cpp defines once per level, under one name: RQK_DECLARE_KERNEL declares it at namespace rqk,
// RQK_KERNEL is that of the level in use.
#ifdef RQK_X86
#define RQK_DECLARE_KERNEL(Type, name) \
  namespace default_ {                 \
  extern const Type name;              \
  }                                    \
  namespace avx2 {                     \
  extern const Type name;              \
  }                                    \
  namespace avx512 {                   \
  extern const Type name;              \
  }
#define RQK_KERNEL(name)                                     \
  (cpu_capability() == CpuCapability::kAvx512 ? avx512::name \
   : cpu_capability() == CpuCapability::kAvx2 ? avx2::name   \
                                              : default_::name)
#else
#define RQK_DECLARE_KERNEL(Type, name) \
  namespace default_ {                 \
  extern const Type name;              \
  }
#define RQK_KERNEL(name) (default_::name)
#endif

}  // namespace rqk
