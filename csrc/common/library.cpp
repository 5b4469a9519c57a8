// Functions of the CPU library besides the operators: the instruction set in use, and the GPU architectures that the
// CUDA library of the same build was compiled for (asked here, because `_cuda` is loaded only where it can run).
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
