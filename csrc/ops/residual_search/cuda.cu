// Launches of residual_search on the current stream.
#include "common/launch.cuh"
#include "ops/residual_search/kernel.cuh"

namespace rqk {
namespace {

using namespace residual_search;

constexpr const char* kOp = "residual_search";

int64_t plan_here(const ResidualSearchParams& p, Work* w) {
  const DeviceLimits limits = device_limits(kOp);
  return plan(p, limits.multiprocessors, limits.shared_bytes, p.workspace, w);
}

template <int kWarps>
void scan_on(const ResidualSearchParams& p, const Work& w, int64_t first_depth, int64_t last_depth, void* stream) {
  const unsigned blocks = grid_for(w.blocks) * static_cast<unsigned>(w.splits);
  launch_kernel(kOp, scan_rows<kWarps>, blocks, 32 * kWarps, static_cast<size_t>(w.scan_shared_bytes), stream, p, w,
                first_depth, last_depth);
}

}  // namespace

int64_t workspace_bytes(const ResidualSearchParams& p) {
  Work w;
  return plan_here(p, &w);
}

void launch(const ResidualSearchParams& p, void* stream) {
  Work w;
  plan_here(p, &w);
  auto decide = [&](int64_t first_depth, int64_t last_depth) {
    const int64_t blocks = w.warps == 0 ? p.rows : divide_up(p.rows, kGroupThreads / kLanes);
    launch_kernel(kOp, decide_splits, grid_for(blocks), kGroupThreads, 0, stream, p, w, first_depth, last_depth);
  };
  if (w.warps == 0) return decide(0, p.depth);

  launch_kernel(kOp, find_centers, grid_for(divide_up(w.codebooks * w.chunks * kChunk, kGroupThreads)), kGroupThreads,
                0, stream, p, w);
  launch_kernel(kOp, pack_codes, grid_for(w.codebooks * w.tiles), kGroupThreads, 0, stream, p, w);
  const auto scan = w.warps == 1 ? scan_on<1> : w.warps == 2 ? scan_on<2> : scan_on<4>;
  if (w.splits == 1) return scan(p, w, 0, p.depth, stream);
  for (int64_t d = 0; d < p.depth; ++d) {
    scan(p, w, d, d + 1, stream);
    decide(d, d + 1);
  }
}

}  // namespace rqk
