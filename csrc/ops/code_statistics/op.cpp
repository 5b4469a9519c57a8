// rqkernels::code_statistics: schema, argument checks, tensors to params.
#include "common/tensors.h"
#include "ops/code_statistics/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "code_statistics";

void check(const Tensor& x, const Tensor& codes, int64_t num_codes, bool by_depth) {
  if (x.dim() < 1) rqk::value_error(kOp, ": x must be (..., C), got a scalar");
  if (num_codes < 1) rqk::value_error(kOp, ": num_codes must be >= 1, got ", num_codes);
  if (num_codes >= rqk::kMostElements) rqk::value_error(kOp, ": num_codes must be < 2^40, got ", num_codes);
  rqk::check_elements(kOp, "x", x);
  const std::vector<int64_t> x_sizes = rqk::sizes_of(x);
  if (rqk::sizes_of(codes) != std::vector<int64_t>(x_sizes.begin(), x_sizes.end() - 1)) {
    rqk::value_error(kOp, ": codes must have the shape of x without its last dimension; x is ", rqk::shape_of(x),
                     ", codes are ", rqk::shape_of(codes));
  }
  if (x_sizes.back() < 1) rqk::value_error(kOp, ": x must have at least one channel, got ", rqk::shape_of(x));
  if (by_depth && (codes.dim() < 1 || codes.size(codes.dim() - 1) < 1)) {
    rqk::value_error(kOp, ": by_depth needs codes (..., D) with D >= 1, got ", rqk::shape_of(codes));
  }
  rqk::check_same_device(kOp, "x", x, "codes", codes);
}

// Sets the rows and their strides. Merges leading dimensions that a single stride describes, in x and in codes. Returns
// false if more than rows and depth are left; with `by_depth` the last dimension is the depth and is not merged.
bool set_rows(rqk::CodeStatisticsParams& p, const Tensor& x, const Tensor& codes, bool by_depth) {
  struct Dimension {
    int64_t size, x_stride, code_stride;
  };
  std::vector<Dimension> merged;
  const int64_t flat = codes.dim() - (by_depth ? 1 : 0);
  for (int64_t i = 0; i < codes.dim(); ++i) {
    const Dimension next{codes.size(i), x.strides()[i], codes.strides()[i]};
    if (i < flat && next.size == 1) continue;
    if (i < flat && !merged.empty() && merged.back().x_stride == next.size * next.x_stride &&
        merged.back().code_stride == next.size * next.code_stride) {
      merged.back() = {merged.back().size * next.size, next.x_stride, next.code_stride};
    } else {
      merged.push_back(next);
    }
  }
  if (by_depth && merged.size() == 1) merged.insert(merged.begin(), {1, 0, 0});
  if (merged.size() > 2) return false;
  const Dimension one{1, 0, 0}, rows = merged.empty() ? one : merged[0], depth = merged.size() < 2 ? one : merged[1];
  p.rows = rows.size, p.x_row_stride = rows.x_stride, p.code_row_stride = rows.code_stride;
  p.depth = depth.size, p.x_depth_stride = depth.x_stride, p.code_depth_stride = depth.code_stride;
  return true;
}

#ifndef RQK_CUDA_LIBRARY
void check_codes(const rqk::CodeStatisticsParams& p) {
  // The sign bit of either term is set if a code is outside [-1, num_codes), also if it overflows.
  uint64_t signs = 0;
  for (int64_t n = 0; n < p.rows; ++n) {
    for (int64_t d = 0; d < p.depth; ++d) {
      const uint64_t code = static_cast<uint64_t>(p.codes[n * p.code_row_stride + d * p.code_depth_stride]);
      signs |= (code + 1) | (static_cast<uint64_t>(p.num_codes) - 1 - code);
    }
  }
  if (signs >> 63 == 0) return;
  for (int64_t i = 0; i < p.rows * p.depth; ++i) {
    const int64_t code = p.codes[i / p.depth * p.code_row_stride + i % p.depth * p.code_depth_stride];
    if (code >= -1 && code < p.num_codes) continue;
    rqk::index_error(kOp, ": codes must be in [-1, ", p.num_codes, "), got ", code, " in row ", i);
  }
}
#endif

// `by_depth`: the last dimension of codes is a depth, and each depth has its own statistics.
std::tuple<Tensor, Tensor> code_statistics(Tensor x, Tensor codes, int64_t num_codes, bool by_depth) {
  check(x, codes, num_codes, by_depth);
  rqk::LaunchScope scope(x);

  const int64_t channels = x.size(x.dim() - 1), depth = by_depth ? codes.size(codes.dim() - 1) : 1;
  Tensor x_float = rqk::to_type(x, ScalarType::Float);
  if (channels > 1 && x_float.strides()[x.dim() - 1] != 1) x_float = rqk::contiguous(x_float);
  rqk::CodeStatisticsParams params{};
  if (!set_rows(params, x_float, codes, by_depth)) {
    x_float = rqk::contiguous(x_float);
    codes = rqk::contiguous(codes);
    set_rows(params, x_float, codes, by_depth);
  }
  const std::vector<int64_t> leading =
      by_depth ? std::vector<int64_t>{depth, num_codes} : std::vector<int64_t>{num_codes};
  std::vector<int64_t> with_channels = leading;
  with_channels.push_back(channels);
  const Tensor counts = rqk::empty(leading, ScalarType::Float, x);
  const Tensor sums = rqk::empty(with_channels, ScalarType::Float, x);

  params.x = x_float.const_data_ptr<float>();
  params.codes = codes.const_data_ptr<int64_t>();
  params.channels = channels;
  params.num_codes = num_codes;
  params.codebooks = depth;
  params.counts = counts.mutable_data_ptr<float>();
  params.sums = sums.mutable_data_ptr<float>();
  const Tensor workspace = rqk::empty({rqk::workspace_bytes(params)}, ScalarType::Byte, x);
  params.workspace = workspace.mutable_data_ptr<uint8_t>();
#ifndef RQK_CUDA_LIBRARY
  // On a GPU this would need a host-device sync; there a bad code turns the statistics into NaN.
  check_codes(params);
#endif
  rqk::launch(params, scope.stream());
  return {counts, sums};
}

}  // namespace

RQK_REGISTER("code_statistics",
             "code_statistics(Tensor x, Tensor codes, int num_codes, bool by_depth=False)"
             " -> (Tensor counts, Tensor sums)",
             code_statistics)
