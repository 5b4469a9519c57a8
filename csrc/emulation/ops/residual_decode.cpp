#include "ops/residual_decode/params.h"

#include "emulation/cases.h"

namespace rqk::emulation {

// codes (n, code_depth), codebooks (1 or depth, k, c), depth -> decoded, any_bad
std::vector<Array> residual_decode(const Inputs& inputs) {
  const Array &codes = inputs.array(0, "<i8", 2), &codebooks = inputs.array(1, "<f4", 3);
  const int64_t n = codes.shape[0], c = codebooks.shape[2];
  const int32_t zero = 0;
  const DeviceBuffer codes_device = to_device(codes), codebooks_device = to_device(codebooks);
  const DeviceBuffer decoded = device_array("<f4", {n, c}), any_bad(sizeof(zero), &zero);

  ResidualDecodeParams p{};
  p.codes = static_cast<const int64_t*>(codes_device.data());
  p.codebooks = static_cast<const float*>(codebooks_device.data());
  p.rows = n;
  p.channels = c;
  p.num_codes = codebooks.shape[1];
  p.depth = inputs.number(2);
  p.code_depth = codes.shape[1];
  p.codebook_stride = codebooks.shape[0] == 1 ? 0 : p.num_codes * c;
  p.decoded = static_cast<float*>(decoded.data());
  p.any_bad = static_cast<int32_t*>(any_bad.data());
  launch(p, nullptr);
  return {to_host(decoded, "<f4", {n, c}), to_host(any_bad, "<i4", {1})};
}

}  // namespace rqk::emulation
