// Argument checks, inputs and results of the residual searches. For op.cpp files; `op` is the operator's name in error
// messages.
#pragma once

#include "common/tensors.h"

namespace rqk {
namespace {

inline int64_t resolve_depth(const char* op, const Tensor& codebooks, std::optional<int64_t> depth) {
  if (codebooks.dim() != 2 && codebooks.dim() != 3) {
    value_error(op, ": codebooks must be (K, C), shared by all depths, or (D, K, C), one per depth; got ",
                shape_of(codebooks));
  }
  if (depth.has_value() && *depth < 1) value_error(op, ": depth must be >= 1, got ", *depth);
  if (depth.has_value() && *depth > INT32_MAX) value_error(op, ": depth must be < 2^31, got ", *depth);
  if (codebooks.dim() == 2) {
    if (!depth.has_value()) value_error(op, ": depth is required with a shared codebook (K, C)");
    return *depth;
  }
  if (depth.has_value() && *depth != codebooks.size(0)) {
    value_error(op, ": depth is ", *depth, ", but codebooks ", shape_of(codebooks), " hold ", codebooks.size(0),
                " depths; leave depth out or slice the codebooks");
  }
  return codebooks.size(0);
}

inline void check_x_and_codebooks(const char* op, const Tensor& x, const Tensor& codebooks) {
  if (x.dim() < 1) value_error(op, ": x must be (..., C), got a scalar");
  check_elements(op, "x", x);
  check_elements(op, "codebooks", codebooks);
  const int64_t channels = x.size(x.dim() - 1);
  if (codebooks.size(codebooks.dim() - 1) != channels) {
    value_error(op, ": x ", shape_of(x), " has ", channels, " channels, codebooks ", shape_of(codebooks), " have ",
                codebooks.size(codebooks.dim() - 1));
  }
  if (codebooks.numel() == 0) value_error(op, ": codebooks must not be empty, got ", shape_of(codebooks));
  if (codebooks.size(codebooks.dim() - 2) > INT32_MAX) {
    value_error(op, ": codebooks may hold at most 2^31 - 1 codes, got ", shape_of(codebooks));
  }
  check_same_device(op, "x", x, "codebooks", codebooks);
}

// The inputs of a search as contiguous float32, and its results.
struct ResidualTensors {
  Tensor x, codebooks;
  Tensor codes, quantized, sq_norms, residuals;
};

// Allocates the tensors and points `params` to them. Residuals that are not wanted have no elements.
template <class Params>
ResidualTensors residual_tensors(const Tensor& x, const Tensor& codebooks, int64_t depth, bool return_residuals,
                                 Params& params) {
  std::vector<int64_t> leading = sizes_of(x);
  const int64_t channels = leading.back();
  leading.pop_back();
  auto result = [&](std::initializer_list<int64_t> more, ScalarType type) {
    std::vector<int64_t> sizes = leading;
    sizes.insert(sizes.end(), more);
    return empty(sizes, type, x);
  };
  const Tensor x_float = as_float(x), codebooks_float = as_float(codebooks);
  const Tensor codes = result({depth}, ScalarType::Long), quantized = result({channels}, ScalarType::Float);
  const Tensor sq_norms = result({depth}, ScalarType::Float);
  const Tensor residuals =
      return_residuals ? result({depth, channels}, ScalarType::Float) : empty({0}, ScalarType::Float, x);
  params.x = x_float.const_data_ptr<float>();
  params.codebooks = codebooks_float.const_data_ptr<float>();
  params.rows = x.numel() / channels;
  params.channels = channels;
  params.num_codes = codebooks.size(codebooks.dim() - 2);
  params.depth = depth;
  params.codebook_stride = codebooks.dim() == 3 ? params.num_codes * channels : 0;
  params.codes = codes.mutable_data_ptr<int64_t>();
  params.quantized = quantized.mutable_data_ptr<float>();
  params.residual_sq_norms = sq_norms.mutable_data_ptr<float>();
  params.residuals = return_residuals ? residuals.mutable_data_ptr<float>() : nullptr;
  return {x_float, codebooks_float, codes, quantized, sq_norms, residuals};
}

}  // namespace
}  // namespace rqk
