// What the CPU library offers beside the operators: which instruction set its kernels run with, and for which GPUs the
// CUDA library of the same build was compiled (asked here, because that library is only loaded where it can serve).
#include "common/cpu_capability.h"
#include "common/tensors.h"

namespace {

std::string cpu_capability() { return rqk::capability_name(rqk::cpu_capability()); }

std::string cuda_architectures() { return RQK_BUILT_CUDA_ARCHITECTURES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rqkernels, m) {
  m.def("cpu_capability() -> str");
  m.def("cuda_architectures() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rqkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
