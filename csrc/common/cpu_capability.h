// Instruction sets ("levels") of the CPU kernels, and the choice among them at run time.
//
// Each cpu_simd.cpp is compiled once per level, in the namespace RQK_CAPABILITY. Its operator's kernel_table.h lists
// its functions in a struct and declares an object of it per level (RQK_DECLARE_KERNEL_TABLE); cpu.cpp takes that of
// the level in use (RQK_KERNEL_TABLE). A new level is a line below, its CPU features in cpu_capability.cpp, its
// compiler flags in CMakeLists.txt and its vectors in simd.h. cpu_simd.cpp files include this: no standard header here.
#pragma once

// LEVEL(enumerator, namespace, name, ...), lowest first.
#define RQK_ALL_LEVELS(LEVEL, ...)                  \
  LEVEL(kDefault, default_, "default", __VA_ARGS__) \
  LEVEL(kAvx2, avx2, "avx2", __VA_ARGS__)           \
  LEVEL(kAvx512, avx512, "avx512", __VA_ARGS__)

// The levels that are compiled for this machine's architecture.
#if defined(__x86_64__)
#define RQK_BUILT_LEVELS(LEVEL, ...) RQK_ALL_LEVELS(LEVEL, __VA_ARGS__)
#else
#define RQK_BUILT_LEVELS(LEVEL, ...) LEVEL(kDefault, default_, "default", __VA_ARGS__)
#endif

namespace rqk {

#define RQK_ENUMERATOR(enumerator, space, name, unused) enumerator,
enum class CpuCapability { RQK_ALL_LEVELS(RQK_ENUMERATOR, unused) };
#undef RQK_ENUMERATOR

// The best level of this machine, or the one that RQK_CPU_CAPABILITY names; decided once. Throws std::invalid_argument
// if that name is unknown or this machine does not support its level.
CpuCapability cpu_capability();

const char* capability_name(CpuCapability capability);

template <class Table, int kLevels>
const Table& table_of_level(CpuCapability level, const Table* const (&tables)[kLevels]) {
  return *tables[static_cast<int>(level)];
}

}  // namespace rqk

// In namespace rqk: declares `table`, a Type, in the namespace of every level. A cpu_simd.cpp file defines its own.
#define RQK_DECLARE_KERNEL_TABLE(Type, table) RQK_BUILT_LEVELS(RQK_DECLARE_IN_LEVEL, Type, table)
#define RQK_DECLARE_IN_LEVEL(enumerator, space, name, Type, table) \
  namespace space {                                                \
  extern const Type table;                                         \
  }

// The table of a level, and of the level in use.
#define RQK_KERNEL_TABLE_OF(level, table) ::rqk::table_of_level(level, {RQK_BUILT_LEVELS(RQK_ADDRESS_IN_LEVEL, table)})
#define RQK_KERNEL_TABLE(table) RQK_KERNEL_TABLE_OF(::rqk::cpu_capability(), table)
#define RQK_ADDRESS_IN_LEVEL(enumerator, space, name, table) &::rqk::space::table,
