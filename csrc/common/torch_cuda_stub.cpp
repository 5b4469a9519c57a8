// Stands in for libtorch_cuda.so where `_cuda` is built against a CPU-only torch: what `_cuda` takes from there, by
// name. Linking it makes `_cuda` ask for libtorch_cuda.so when it is loaded, and the torch of that process has the real
// one.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 1;  // AOTI_TORCH_FAILURE: nobody should get here
}
