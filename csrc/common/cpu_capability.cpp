#include "common/cpu_capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace rqk {
namespace {

constexpr CpuCapability kLevels[] = {CpuCapability::kDefault, CpuCapability::kAvx2, CpuCapability::kAvx512};

CpuCapability best_of_this_machine() {
#ifdef RQK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    return avx512 ? CpuCapability::kAvx512 : CpuCapability::kAvx2;
  }
#endif
  return CpuCapability::kDefault;
}

CpuCapability choose() {
  const CpuCapability best = best_of_this_machine();
  const char* forced = std::getenv("RQK_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best;
  for (const CpuCapability level : kLevels) {
    if (std::string(forced) != capability_name(level)) continue;
    if (level <= best) return level;
    throw std::invalid_argument("RQK_CPU_CAPABILITY=" + std::string(forced) + ": this machine has no more than '" +
                                capability_name(best) + "'");
  }
  throw std::invalid_argument("RQK_CPU_CAPABILITY must be default, avx2 or avx512, got '" + std::string(forced) + "'");
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability chosen = choose();
  return chosen;
}

const char* capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    case CpuCapability::kDefault:
      break;
  }
  return "default";
}

}  // namespace rqk
