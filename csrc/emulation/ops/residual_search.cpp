#include <cmath>

#include "emulation/cases.h"
#include "ops/residual_search/plan.h"

namespace rqk::emulation {

// x (n, c), codebooks (1 or depth, k, c), depth, multiprocessors, bytes of shared memory of a block, bits after which
// an mma errs (0: exact)
//   -> codes, quantized, residual_norms, residuals, and what the search counted: rows (times depths) that were searched
//      directly, codes evaluated for the others; -1 where the device or the channels leave no room for a scan
std::vector<Array> residual_search(const Inputs& inputs) {
  const Array &x = inputs.array(0, "<f4", 2), &codebooks = inputs.array(1, "<f4", 3);
  const int64_t depth = inputs.number(2), n = x.shape[0], c = x.shape[1];
  device() = {static_cast<int>(inputs.number(3)), static_cast<int>(inputs.number(4)),
              inputs.number(5) == 0 ? 0.0 : std::ldexp(1.0, -static_cast<int>(inputs.number(5)))};
  const DeviceBuffer x_device = to_device(x), codebooks_device = to_device(codebooks);
  const DeviceBuffer codes = device_array("<i8", {n, depth}), quantized = device_array("<f4", {n, c});
  const DeviceBuffer norms = device_array("<f4", {n, depth}), residuals = device_array("<f4", {n, depth, c});

  ResidualSearchParams p{};
  p.x = static_cast<const float*>(x_device.data());
  p.codebooks = static_cast<const float*>(codebooks_device.data());
  p.rows = n;
  p.channels = c;
  p.num_codes = codebooks.shape[1];
  p.depth = depth;
  p.codebook_stride = codebooks.shape[0] == 1 ? 0 : p.num_codes * c;
  p.codes = static_cast<int64_t*>(codes.data());
  p.quantized = static_cast<float*>(quantized.data());
  p.residual_norms = static_cast<float*>(norms.data());
  p.residuals = static_cast<float*>(residuals.data());
  Array counted{"<i8", {2}, std::vector<std::byte>(sizeof(rqk::residual_search::Counters))};
  if (n > 0) {
    const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p)));
    p.workspace = static_cast<uint8_t*>(workspace.data());
    launch(p, nullptr);
    rqk::residual_search::Work w;
    rqk::residual_search::plan(p, device().multiprocessors, device().shared_bytes, p.workspace, &w);
    if (w.counters == nullptr) {
      std::memset(counted.data.data(), 0xff, counted.data.size());
    } else {
      std::memcpy(counted.data.data(), w.counters, counted.data.size());
    }
  }
  return {to_host(codes, "<i8", {n, depth}), to_host(quantized, "<f4", {n, c}), to_host(norms, "<f4", {n, depth}),
          to_host(residuals, "<f4", {n, depth, c}), counted};
}

}  // namespace rqk::emulation
