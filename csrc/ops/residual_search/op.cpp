// rqkernels::residual_search: schema, argument checks, tensors to params.
#include <cstring>

#include "common/tensors.h"
#include "ops/residual_search/params.h"
#include "shared/residual_arguments.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "residual_search";

void check_packed(const Tensor& codebooks, const Tensor& packed) {
  if (codebooks.is_cuda() || packed.is_cuda() || codebooks.dim() != 2 || packed.scalar_type() != ScalarType::Byte ||
      packed.dim() != 1 || !packed.is_contiguous()) {
    rqk::value_error(kOp, ": packed must be what pack_codebook made of a shared codebook on the cpu, got ",
                     rqk::shape_of(packed), " with codebooks ", rqk::shape_of(codebooks));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_search(Tensor x, Tensor codebooks, std::optional<int64_t> depth_,
                                                           bool return_residuals, std::optional<Tensor> packed) {
  const int64_t depth = rqk::resolve_depth(kOp, codebooks, depth_);
  rqk::check_x_and_codebooks(kOp, x, codebooks);
  if (packed.has_value()) check_packed(codebooks, *packed);
  rqk::LaunchScope scope(x);

  rqk::ResidualSearchParams params{};
  const rqk::ResidualTensors tensors = rqk::residual_tensors(x, codebooks, depth, return_residuals, params);
  if (packed.has_value()) {
    params.packed = packed->const_data_ptr<uint8_t>();
    params.packed_bytes = packed->numel();
  }
  // On a CPU the launch rejects codebooks that are not finite, even without rows. On a GPU that would need a
  // host-device sync; there a bad code is never chosen.
#ifdef RQK_CUDA_LIBRARY
  if (params.rows > 0) {
    // Freed at the end of this block, and reused only after the kernels launched here: torch's allocator keeps memory
    // to its stream.
    const Tensor workspace = rqk::empty({rqk::workspace_bytes(params)}, ScalarType::Byte, x);
    params.workspace = workspace.mutable_data_ptr<uint8_t>();
    rqk::launch(params, scope.stream());
  }
#else
  rqk::launch(params, scope.stream());
#endif
  return {tensors.codes, rqk::to_type(tensors.quantized, x.scalar_type()), tensors.sq_norms, tensors.residuals};
}

#ifndef RQK_CUDA_LIBRARY
Tensor pack_codebook(Tensor codebook) {
  constexpr const char* kPackOp = "PackedCodebook";
  if (codebook.dim() != 2 || codebook.numel() == 0 || codebook.size(0) > INT32_MAX) {
    rqk::value_error(kPackOp, ": codebook must be (K, C) with 1 to 2^31 - 1 codes, got ", rqk::shape_of(codebook));
  }
  rqk::check_elements(kPackOp, "codebook", codebook);
  const Tensor codebook_float = rqk::as_float(codebook);
  std::optional<Tensor> packed;
  rqk::pack_codebook(codebook_float.const_data_ptr<float>(), codebook.size(0), codebook.size(1),
                     [&packed, &codebook](int64_t bytes) {
                       packed = rqk::empty({bytes}, ScalarType::Byte, codebook);
                       // Clears the gaps between its parts too: equal codebooks give equal bytes.
                       return static_cast<uint8_t*>(std::memset(packed->mutable_data_ptr<uint8_t>(), 0, bytes));
                     });
  return packed.value();
}

bool packed_has_gram(Tensor packed) {
  if (packed.is_cuda() || packed.scalar_type() != ScalarType::Byte || !packed.is_contiguous()) {
    rqk::value_error("packed_has_gram: packed must be what pack_codebook made, got ", rqk::shape_of(packed));
  }
  return rqk::packed_has_gram(packed.const_data_ptr<uint8_t>(), packed.numel());
}

// For tests: number and bytes of the cached codebooks, and number of cache hits.
std::tuple<int64_t, int64_t, int64_t> codebook_cache_state() {
  const rqk::CodebookCacheState state = rqk::codebook_cache_state();
  return {state.entries, state.bytes, state.found};
}
#endif

}  // namespace

#ifndef RQK_CUDA_LIBRARY
RQK_REGISTER("pack_codebook", "pack_codebook(Tensor codebook) -> Tensor", pack_codebook)
RQK_REGISTER("packed_has_gram", "packed_has_gram(Tensor packed) -> bool", packed_has_gram)
STABLE_TORCH_LIBRARY_FRAGMENT(rqkernels, m) { m.def("codebook_cache_state() -> (int entries, int bytes, int found)"); }
STABLE_TORCH_LIBRARY_IMPL(rqkernels, CompositeExplicitAutograd, m) {
  m.impl("codebook_cache_state", TORCH_BOX(&codebook_cache_state));
}
#endif
RQK_REGISTER("residual_search",
             "residual_search(Tensor x, Tensor codebooks, int? depth, bool return_residuals, Tensor? packed=None)"
             " -> (Tensor codes, Tensor quantized, Tensor residual_sq_norms, Tensor residuals)",
             residual_search)
