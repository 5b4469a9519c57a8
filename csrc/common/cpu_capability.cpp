#include "common/cpu_capability.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

namespace rqk {
namespace {

struct Level {
  CpuCapability capability;
  const char* name;
};

#define RQK_LEVEL(enumerator, space, name, unused) {CpuCapability::enumerator, name},
constexpr Level kLevels[] = {RQK_ALL_LEVELS(RQK_LEVEL, unused)};
constexpr Level kBuiltLevels[] = {RQK_BUILT_LEVELS(RQK_LEVEL, unused)};
#undef RQK_LEVEL

bool is_supported(CpuCapability capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (capability) {
    case CpuCapability::kAvx512:
      return is_supported(CpuCapability::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    case CpuCapability::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case CpuCapability::kDefault:
      break;
  }
#endif
  return capability == CpuCapability::kDefault;
}

CpuCapability best_of_this_machine() {
  CpuCapability best = CpuCapability::kDefault;
  for (const Level& level : kBuiltLevels) {
    if (is_supported(level.capability)) best = level.capability;
  }
  return best;
}

// "default, avx2 or avx512"
std::string all_names() {
  std::string names;
  for (size_t i = 0; i < std::size(kLevels); ++i) {
    names += (i == 0 ? "" : i + 1 < std::size(kLevels) ? ", " : " or ") + std::string(kLevels[i].name);
  }
  return names;
}

CpuCapability choose() {
  const CpuCapability best = best_of_this_machine();
  const char* forced = std::getenv("RQK_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best;
  for (const Level& level : kLevels) {
    if (std::string(forced) != level.name) continue;
    if (level.capability <= best) return level.capability;
    throw std::invalid_argument("RQK_CPU_CAPABILITY=" + std::string(forced) + ": this machine has no more than '" +
                                capability_name(best) + "'");
  }
  throw std::invalid_argument("RQK_CPU_CAPABILITY must be " + all_names() + ", got '" + std::string(forced) + "'");
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability chosen = choose();
  return chosen;
}

const char* capability_name(CpuCapability capability) { return kLevels[static_cast<int>(capability)].name; }

}  // namespace rqk
