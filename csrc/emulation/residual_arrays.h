// What the cases of all residual searches have in common: their arrays on the emulated device.
#pragma once

#include "emulation/cases.h"

namespace rqk::emulation {

struct ResidualArrays {
  int64_t rows, channels, depth;
  DeviceBuffer x, codebooks, codes, quantized, norms, residuals;

  // x (rows, channels), codebooks (1 or depth, num_codes, channels); `params` is pointed to them and to the results.
  template <class Params>
  ResidualArrays(const Array& x_nc, const Array& codebooks_dkc, int64_t depth_, Params& params)
      : rows(x_nc.shape[0]),
        channels(x_nc.shape[1]),
        depth(depth_),
        x(to_device(x_nc)),
        codebooks(to_device(codebooks_dkc)),
        codes(device_array("<i8", {rows, depth})),
        quantized(device_array("<f4", {rows, channels})),
        norms(device_array("<f4", {rows, depth})),
        residuals(device_array("<f4", {rows, depth, channels})) {
    params.x = static_cast<const float*>(x.data());
    params.codebooks = static_cast<const float*>(codebooks.data());
    params.rows = rows;
    params.channels = channels;
    params.num_codes = codebooks_dkc.shape[1];
    params.depth = depth;
    params.codebook_stride = codebooks_dkc.shape[0] == 1 ? 0 : params.num_codes * channels;
    params.codes = static_cast<int64_t*>(codes.data());
    params.quantized = static_cast<float*>(quantized.data());
    params.residual_sq_norms = static_cast<float*>(norms.data());
    params.residuals = static_cast<float*>(residuals.data());
  }

  // codes, quantized, residual_sq_norms, residuals
  std::vector<Array> results() const {
    return {to_host(codes, "<i8", {rows, depth}), to_host(quantized, "<f4", {rows, channels}),
            to_host(norms, "<f4", {rows, depth}), to_host(residuals, "<f4", {rows, depth, channels})};
  }
};

}  // namespace rqk::emulation
