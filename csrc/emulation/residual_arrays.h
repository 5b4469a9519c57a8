// Arguments and results that the cases of all residual searches have in common.
#pragma once

#include "emulation/cases.h"

namespace rqk::emulation {

struct ResidualArrays {
  int64_t rows, channels, depth;
  DeviceBuffer x, codebooks, codes, quantized, norms, residuals;

  // Arguments x (rows, channels), codebooks (1 or depth, num_codes, channels), depth; `params` is pointed to them and
  // to the results.
  template <class Params>
  ResidualArrays(const Inputs& inputs, Params& params)
      : ResidualArrays(inputs.array("x", "<f4", 2), inputs.array("codebooks", "<f4", 3), inputs.integer("depth")) {
    const std::vector<int64_t>& sizes = inputs.array("codebooks", "<f4", 3).shape;
    params.x = x.as<const float>();
    params.codebooks = codebooks.as<const float>();
    params.rows = rows;
    params.channels = channels;
    params.num_codes = sizes[1];
    params.depth = depth;
    params.codebook_stride = sizes[0] == 1 ? 0 : params.num_codes * channels;
    params.codes = codes.as<int64_t>();
    params.quantized = quantized.as<float>();
    params.residual_sq_norms = norms.as<float>();
    params.residuals = residuals.as<float>();
  }

  // codes, quantized, residual_sq_norms, residuals
  Results results() const {
    return {to_host(codes, "<i8", {rows, depth}), to_host(quantized, "<f4", {rows, channels}),
            to_host(norms, "<f4", {rows, depth}), to_host(residuals, "<f4", {rows, depth, channels})};
  }

 private:
  ResidualArrays(const Array& x_nc, const Array& codebooks_dkc, int64_t depth_)
      : rows(x_nc.shape[0]),
        channels(x_nc.shape[1]),
        depth(depth_),
        x(to_device(x_nc)),
        codebooks(to_device(codebooks_dkc)),
        codes(device_array("<i8", {rows, depth})),
        quantized(device_array("<f4", {rows, channels})),
        norms(device_array("<f4", {rows, depth})),
        residuals(device_array("<f4", {rows, depth, channels})) {}
};

}  // namespace rqk::emulation
