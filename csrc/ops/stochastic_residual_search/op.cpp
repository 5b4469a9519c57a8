// rqkernels::stochastic_residual_search: schema, argument checks, tensors to params.
#include "common/tensors.h"
#include "ops/stochastic_residual_search/params.h"
#include "shared/residual_arguments.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "stochastic_residual_search";

// `seed` holds the 64 bits of an unsigned integer.
std::tuple<Tensor, Tensor, Tensor, Tensor> stochastic_residual_search(Tensor x, Tensor codebooks,
                                                                      std::optional<int64_t> depth_, double tau,
                                                                      int64_t seed, int64_t offset,
                                                                      bool return_residuals) {
  const int64_t depth = rqk::resolve_depth(kOp, codebooks, depth_);
  rqk::check_x_and_codebooks(kOp, x, codebooks);
  const int64_t channels = x.size(x.dim() - 1), rows = x.numel() / channels;
  if (!(tau > 0)) rqk::value_error(kOp, ": tau must be > 0, got ", tau);
  if (offset < 0 || offset > INT64_MAX - rows) {
    rqk::value_error(kOp, ": offset must be >= 0, and offset + rows below 2^63; got ", offset, " with ", rows, " rows");
  }
  rqk::LaunchScope scope(x);

  rqk::StochasticResidualSearchParams params{};
  const rqk::ResidualTensors tensors = rqk::residual_tensors(x, codebooks, depth, return_residuals, params);
  params.tau = tau;
  params.seed = static_cast<uint64_t>(seed);
  params.offset = offset;
  // On a CPU the launch rejects codebooks that are not finite, even without rows. On a GPU that would need a
  // host-device sync; there a bad code is never sampled.
  if (rows > 0 || !x.is_cuda()) rqk::launch(params, scope.stream());
  return {tensors.codes, rqk::to_type(tensors.quantized, x.scalar_type()), tensors.sq_norms, tensors.residuals};
}

}  // namespace

RQK_REGISTER("stochastic_residual_search",
             "stochastic_residual_search(Tensor x, Tensor codebooks, int? depth, float tau, SymInt seed, SymInt offset,"
             " bool return_residuals)"
             " -> (Tensor codes, Tensor quantized, Tensor residual_sq_norms, Tensor residuals)",
             stochastic_residual_search)
