#include "ops/residual_decode/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// codes (n, code_depth), codebooks (1 or depth, k, c), depth -> decoded (n, c), any_bad (1)
RQK_CASE(residual_decode) {
  const Array &codes = inputs.array("codes", "<i8", 2), &codebooks = inputs.array("codebooks", "<f4", 3);
  const int64_t n = codes.shape[0], c = codebooks.shape[2];
  const int32_t zero = 0;
  const DeviceBuffer codes_device = to_device(codes), codebooks_device = to_device(codebooks);
  const DeviceBuffer decoded = device_array("<f4", {n, c}), any_bad(sizeof(zero), &zero);

  ResidualDecodeParams p{};
  p.codes = codes_device.as<const int64_t>();
  p.codebooks = codebooks_device.as<const float>();
  p.rows = n;
  p.channels = c;
  p.num_codes = codebooks.shape[1];
  p.depth = inputs.integer("depth");
  p.code_depth = codes.shape[1];
  p.codebook_stride = codebooks.shape[0] == 1 ? 0 : p.num_codes * c;
  p.decoded = decoded.as<float>();
  p.any_bad = any_bad.as<int32_t>();
  launch(p, nullptr);
  return {to_host(decoded, "<f4", {n, c}), to_host(any_bad, "<i4", {1})};
}

}  // namespace rqk::emulation
