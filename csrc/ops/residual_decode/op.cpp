// rqkernels::residual_decode: schema, argument checks, tensors to params.
#include "common/tensors.h"
#include "ops/residual_decode/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "residual_decode";

int64_t resolve_depth(const Tensor& codes, const Tensor& codebooks, std::optional<int64_t> depth) {
  if (codes.dim() < 1) rqk::value_error(kOp, ": codes must be (..., D), got a scalar");
  rqk::check_elements(kOp, "codes", codes);
  rqk::check_elements(kOp, "codebooks", codebooks);
  if (codebooks.dim() != 2 && codebooks.dim() != 3) {
    rqk::value_error(kOp, ": codebooks must be (K, C), shared by all depths, or (D, K, C), one per depth; got ",
                     rqk::shape_of(codebooks));
  }
  if (codebooks.numel() == 0) rqk::value_error(kOp, ": codebooks must not be empty, got ", rqk::shape_of(codebooks));
  const int64_t available = codes.size(codes.dim() - 1);
  if (available < 1) rqk::value_error(kOp, ": codes must have at least one depth, got ", rqk::shape_of(codes));
  if (codebooks.dim() == 3 && available > codebooks.size(0)) {
    rqk::value_error(kOp, ": codes ", rqk::shape_of(codes), " have ", available, " depths, codebooks ",
                     rqk::shape_of(codebooks), " only ", codebooks.size(0));
  }
  if (depth.has_value() && (*depth < 1 || *depth > available)) {
    rqk::value_error(kOp, ": depth must be in [1, ", available, "], got ", *depth);
  }
  return depth.value_or(available);
}

// Reads a flag back from the device, and the codes only if it is set.
void check_codes(const Tensor& any_bad, const Tensor& codes, int64_t depth, int64_t num_codes) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  if (*torch::stable::to(any_bad, cpu).const_data_ptr<int32_t>() == 0) return;
  const Tensor host = torch::stable::to(codes, cpu);
  const int64_t* values = host.const_data_ptr<int64_t>();
  const int64_t code_depth = codes.size(codes.dim() - 1);
  for (int64_t i = 0; i < host.numel(); ++i) {
    if (i % code_depth >= depth || (values[i] >= 0 && values[i] < num_codes)) continue;
    rqk::index_error(kOp, ": codes must be in [0, ", num_codes, "), got ", values[i], " in row ", i / code_depth,
                     ", depth ", i % code_depth);
  }
}

Tensor residual_decode(Tensor codes, Tensor codebooks, std::optional<int64_t> depth_, bool check) {
  const int64_t depth = resolve_depth(codes, codebooks, depth_);
  rqk::check_same_device(kOp, "codes", codes, "codebooks", codebooks);
  rqk::LaunchScope scope(codes);

  const Tensor codes_packed = rqk::contiguous(codes);
  const Tensor codebooks_float = rqk::as_float(codebooks);
  std::vector<int64_t> sizes = rqk::sizes_of(codes);
  const int64_t code_depth = sizes.back();
  sizes.back() = codebooks.size(codebooks.dim() - 1);
  const Tensor decoded = rqk::empty(sizes, ScalarType::Float, codes);
  Tensor any_bad = rqk::empty({1}, ScalarType::Int, codes);
  torch::stable::zero_(any_bad);

  rqk::ResidualDecodeParams params{};
  params.codes = codes_packed.const_data_ptr<int64_t>();
  params.codebooks = codebooks_float.const_data_ptr<float>();
  params.rows = codes.numel() / code_depth;
  params.channels = sizes.back();
  params.num_codes = codebooks.size(codebooks.dim() - 2);
  params.depth = depth;
  params.code_depth = code_depth;
  params.codebook_stride = codebooks.dim() == 3 ? params.num_codes * params.channels : 0;
  params.decoded = decoded.mutable_data_ptr<float>();
  params.any_bad = any_bad.mutable_data_ptr<int32_t>();
  if (params.rows > 0) rqk::launch(params, scope.stream());
  if (check) check_codes(any_bad, codes_packed, depth, params.num_codes);
  return rqk::to_type(decoded, codebooks.scalar_type());
}

}  // namespace

RQK_REGISTER("residual_decode", "residual_decode(Tensor codes, Tensor codebooks, int? depth, bool check) -> Tensor",
             residual_decode)
