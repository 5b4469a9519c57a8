// What the CPU library offers beside the operators: which instruction set its kernels run with.
#include "common/cpu_capability.h"
#include "common/tensors.h"

namespace {

std::string cpu_capability() { return rqk::capability_name(rqk::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rqkernels, m) { m.def("cpu_capability() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(rqkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
