// rqkernels::sample_logits: schema, argument checks, tensors to params.
#include <cmath>

#include "common/tensors.h"
#include "ops/sample_logits/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kOp = "sample_logits";

rqk::SampleSettings settings_of(int64_t num_codes, double temperature, std::optional<int64_t> top_k,
                                std::optional<double> top_p) {
  if (!(temperature >= 0 && std::isfinite(temperature))) {
    rqk::value_error(kOp, ": temperature must be a finite number >= 0, got ", rqk::number_text(temperature));
  }
  if (top_k.has_value() && *top_k < 1) rqk::value_error(kOp, ": top_k must be >= 1, got ", *top_k);
  if (top_p.has_value() && !(*top_p > 0 && *top_p <= 1)) {
    rqk::value_error(kOp, ": top_p must be in (0, 1], got ", rqk::number_text(*top_p));
  }
  return {temperature, top_k.value_or(num_codes), top_p.value_or(1.0)};
}

// A counter is a number, or a tensor on the device of the logits, which the kernel reads.
const int64_t* check_counter(const char* name, const std::optional<Tensor>& counter, const Tensor& logits) {
  if (!counter.has_value()) return nullptr;
  if (counter->numel() != 1) {
    rqk::value_error(kOp, ": ", name, " must be one number, got a tensor ", rqk::shape_of(*counter));
  }
  rqk::check_same_device(kOp, "logits", logits, name, *counter);
  return counter->const_data_ptr<int64_t>();
}

void check_counters(int64_t offset, int64_t stream, int64_t rows, int64_t streams) {
  if (offset < 0 || offset > INT64_MAX - rows / streams) {
    rqk::value_error(kOp, ": offset must be >= 0, and offset + rows below 2^63; got ", offset, " with ", rows, " rows");
  }
  if (stream < 0 || stream > UINT32_MAX) rqk::value_error(kOp, ": stream must be in [0, 2^32), got ", stream);
  if (stream > UINT32_MAX - (streams - 1)) {
    rqk::value_error(kOp, ": stream + streams must be <= 2^32, got ", stream, " + ", streams);
  }
}

// `seed` holds the 64 bits of an unsigned integer. A counter's tensor replaces its number.
Tensor sample_logits(Tensor logits, double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                     int64_t seed, int64_t offset, int64_t stream, std::optional<Tensor> offset_tensor,
                     std::optional<Tensor> stream_tensor, int64_t streams) {
  if (logits.dim() < 1) rqk::value_error(kOp, ": logits must be (..., K), got a scalar");
  std::vector<int64_t> sizes = rqk::sizes_of(logits);
  const int64_t num_codes = sizes.back();
  if (num_codes < 1) rqk::value_error(kOp, ": logits must have at least one code, got ", rqk::shape_of(logits));
  rqk::check_elements(kOp, "logits", logits);
  sizes.pop_back();
  rqk::LaunchScope scope(logits);

  rqk::SampleLogitsParams params{};
  params.rows = logits.numel() / num_codes;
  params.num_codes = num_codes;
  if (streams < 1 || params.rows % streams != 0) {
    rqk::value_error(kOp, ": streams must be >= 1 and divide the number of rows (", params.rows, "), got ", streams);
  }
  params.streams = streams;
  params.settings = settings_of(num_codes, temperature, top_k, top_p);
  params.seed = static_cast<uint64_t>(seed);
  params.offset = offset;
  params.stream = stream;
  params.offset_ptr = check_counter("offset", offset_tensor, logits);
  params.stream_ptr = check_counter("stream", stream_tensor, logits);
#ifdef RQK_CUDA_LIBRARY
  check_counters(offset, stream, params.rows, streams);
#else
  check_counters(params.offset_ptr != nullptr ? *params.offset_ptr : offset,
                 params.stream_ptr != nullptr ? *params.stream_ptr : stream, params.rows, streams);
#endif
  const Tensor logits_float = rqk::as_float(logits);
  const Tensor codes = rqk::empty(sizes, ScalarType::Long, logits);
  params.logits = logits_float.const_data_ptr<float>();
  params.codes = codes.mutable_data_ptr<int64_t>();
  rqk::launch(params, scope.stream());
#ifndef RQK_CUDA_LIBRARY
  // On a GPU this would need a host-device sync; there the code is -1.
  for (int64_t n = 0; n < params.rows; ++n) {
    if (params.codes[n] < 0) rqk::value_error(kOp, ": logits: row ", n, " has NaN, +inf, or nothing but -inf");
  }
#endif
  return codes;
}

}  // namespace

RQK_REGISTER("sample_logits",
             "sample_logits(Tensor logits, float temperature, int? top_k, float? top_p, SymInt seed, SymInt offset,"
             " SymInt stream, Tensor? offset_tensor=None, Tensor? stream_tensor=None, SymInt streams=1) -> Tensor",
             sample_logits)
