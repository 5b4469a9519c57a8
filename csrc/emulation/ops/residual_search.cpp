#include "emulation/residual_arrays.h"
#include "ops/residual_search/plan.h"

namespace rqk::emulation {

// x, codebooks, depth -> codes, quantized, residual_sq_norms, residuals (see residual_arrays.h), and what the search
// counted: rows (times depths) that were searched directly, codes evaluated for the others; -1 where the device or the
// channels leave no room for a scan
RQK_CASE(residual_search) {
  ResidualSearchParams p{};
  const ResidualArrays arrays(inputs, p);
  Array counted{"<i8", {2}, std::vector<std::byte>(sizeof(rqk::residual_search::Counters))};
  if (p.rows > 0) {
    const DeviceBuffer workspace(static_cast<size_t>(workspace_bytes(p)));
    p.workspace = workspace.as<uint8_t>();
    launch(p, nullptr);
    rqk::residual_search::Work w;
    rqk::residual_search::plan(p, device().multiprocessors, device().shared_bytes, p.workspace, &w);
    if (w.counters == nullptr) {
      std::memset(counted.data.data(), 0xff, counted.data.size());
    } else {
      std::memcpy(counted.data.data(), w.counters, counted.data.size());
    }
  }
  Results results = arrays.results();
  results.push_back(counted);
  return results;
}

}  // namespace rqk::emulation
