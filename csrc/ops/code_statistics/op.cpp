// rqkernels::code_statistics: schema, argument checks, tensors to params.
#include "common/tensors.h"
#include "ops/code_statistics/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "code_statistics";

void check(const Tensor& x, const Tensor& codes, int64_t num_codes) {
  if (x.dim() < 1) rqk::value_error(kOp, ": x must be (..., C), got a scalar");
  if (num_codes < 1) rqk::value_error(kOp, ": num_codes must be >= 1, got ", num_codes);
  const std::vector<int64_t> x_sizes = rqk::sizes_of(x);
  if (rqk::sizes_of(codes) != std::vector<int64_t>(x_sizes.begin(), x_sizes.end() - 1)) {
    rqk::value_error(kOp, ": codes must have the shape of x without its last dimension; x is ", rqk::shape_of(x),
                     ", codes are ", rqk::shape_of(codes));
  }
  if (x_sizes.back() < 1) rqk::value_error(kOp, ": x must have at least one channel, got ", rqk::shape_of(x));
  rqk::check_same_device(kOp, "x", x, "codes", codes);
}

#ifndef RQK_CUDA_LIBRARY
void check_codes(const Tensor& codes, int64_t num_codes) {
  const int64_t* values = codes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < codes.numel(); ++i) {
    if (values[i] >= -1 && values[i] < num_codes) continue;
    rqk::index_error(kOp, ": codes must be in [-1, ", num_codes, "), got ", values[i], " in row ", i);
  }
}
#endif

std::tuple<Tensor, Tensor> code_statistics(Tensor x, Tensor codes, int64_t num_codes) {
  check(x, codes, num_codes);
  rqk::LaunchScope scope(x);

  const Tensor x_float = rqk::as_float(x);
  const Tensor codes_packed = torch::stable::contiguous(codes);
#ifndef RQK_CUDA_LIBRARY
  // On a GPU this would have to wait for the device: there a bad code turns the statistics into NaN.
  check_codes(codes_packed, num_codes);
#endif
  const int64_t channels = x.size(x.dim() - 1);
  const Tensor counts = rqk::empty({num_codes}, ScalarType::Float, x);
  const Tensor sums = rqk::empty({num_codes, channels}, ScalarType::Float, x);

  rqk::CodeStatisticsParams params{};
  params.x = x_float.const_data_ptr<float>();
  params.codes = codes_packed.const_data_ptr<int64_t>();
  params.rows = codes.numel();
  params.channels = channels;
  params.num_codes = num_codes;
  params.counts = counts.mutable_data_ptr<float>();
  params.sums = sums.mutable_data_ptr<float>();
  rqk::launch(params, scope.stream());
  return {counts, sums};
}

}  // namespace

RQK_REGISTER("code_statistics",
             "code_statistics(Tensor x, Tensor codes, int num_codes) -> (Tensor counts, Tensor sums)", code_statistics)
