#include <cmath>

#include "emulation/residual_arrays.h"
#include "ops/residual_search/plan.h"

namespace rqk::emulation {

// x (n, c), codebooks (1 or depth, k, c), depth, multiprocessors, bytes of shared memory of a block, bits after which
// an mma errs (0: exact)
//   -> codes, quantized, residual_sq_norms, residuals, and what the search counted: rows (times depths) that were
//   searched
//      directly, codes evaluated for the others; -1 where the device or the channels leave no room for a scan
std::vector<Array> residual_search(const Inputs& inputs) {
  ResidualSearchParams p{};
  const ResidualArrays arrays(inputs.array(0, "<f4", 2), inputs.array(1, "<f4", 3), inputs.number(2), p);
  device() = {static_cast<int>(inputs.number(3)), static_cast<int>(inputs.number(4)),
              inputs.number(5) == 0 ? 0.0 : std::ldexp(1.0, -static_cast<int>(inputs.number(5)))};
  Array counted{"<i8", {2}, std::vector<std::byte>(sizeof(rqk::residual_search::Counters))};
  if (p.rows > 0) {
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
  std::vector<Array> results = arrays.results();
  results.push_back(counted);
  return results;
}

}  // namespace rqk::emulation
