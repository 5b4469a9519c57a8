// A stand-in for libtorch_cuda.so when `_cuda` is built against a CPU-only torch: defines the symbol that `_cuda` uses.
// Linking it makes `_cuda` require libtorch_cuda.so at load time, where the torch of that process provides the real
// one.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 1;  // AOTI_TORCH_FAILURE: never called
}
