// Launches of depth_attention on the current stream.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/launch.cuh"
#include "ops/depth_attention/kernel.cuh"

namespace rqk {
namespace depth_attention {
namespace {

constexpr const char* kOp = "depth_attention";
// Shared memory per block unless a single warp needs more: several blocks should fit a multiprocessor.
constexpr int64_t kSharedBytes = 48 * 1024;

template <class T>
bool is_aligned(const HeadRows<T>& rows, int64_t size) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stack_stride * size % 16 == 0 &&
         rows.head_stride * size % 16 == 0 && rows.row_stride * size % 16 == 0;
}

struct Plan {
  Exponents exponents;
  Division division;
  unsigned grid;
  int threads;
  size_t shared;
};

// rows: rows of a head in shared memory; weights: floats per pair of query and key there.
Plan plan_of(const DepthAttentionParams& p, bool is_aligned, int rows, int weights) {
  const int64_t size = size_of(p.type), limit = device_limits(kOp).shared_bytes;
  const int chunks = static_cast<int>((p.head_dim * size + 15) / 16);
  Division division{kLeastLanes, 0, is_aligned && p.head_dim * size % 16 == 0, (p.keys + 3) / 4 * 4};
  // As many lanes as leave none idle; more if several heads do not fit a warp's shared memory.
  while (division.lanes < 32 && chunks % (2 * division.lanes) == 0) division.lanes *= 2;
  int64_t bytes = 0;
  for (;; division.lanes *= 2) {
    division.slices = (chunks + division.lanes - 1) / division.lanes;
    bytes = int64_t{rows} * division.slices * 32 * 16 +
            int64_t{32 / division.lanes} * weights * p.queries * division.weight_stride * 4;
    if (bytes <= limit) break;
    if (division.lanes == 32) {
      throw std::invalid_argument(std::string(kOp) + ": a head of " + std::to_string(p.keys) +
                                  " depths with head_dim " + std::to_string(p.head_dim) + " takes " +
                                  std::to_string(bytes) + " bytes of shared memory, this device has " +
                                  std::to_string(limit) + "; call torch.nn.functional.scaled_dot_product_attention");
    }
  }
  int warps = kMostThreads / 32;
  while (warps > 1 && warps * bytes > std::min(kSharedBytes, limit)) warps /= 2;
  const int64_t per_block = warps * 32 / division.lanes;
  return {exponents_of(p.scale), division, grid_for((p.stacks * p.heads + per_block - 1) / per_block), 32 * warps,
          static_cast<size_t>(warps * bytes)};
}

template <FloatType kType>
auto* kernel_for(const DepthAttentionParams& p) {
  return p.keys <= 8 ? attend<kType, 8> : attend<kType, kMostDepths>;
}
template <FloatType kType>
auto* kernel_for(const DepthAttentionBackwardParams& b) {
  return b.forward.keys <= 8 ? attend_backward<kType, 8> : attend_backward<kType, kMostDepths>;
}

template <class Params>
void launch_plan(const Params& params, FloatType type, const Plan& plan, void* stream) {
  auto* kernel = type == FloatType::kFloat32   ? kernel_for<FloatType::kFloat32>(params)
                 : type == FloatType::kFloat16 ? kernel_for<FloatType::kFloat16>(params)
                                               : kernel_for<FloatType::kBFloat16>(params);
  launch_kernel(kOp, kernel, plan.grid, plan.threads, plan.shared, stream, params, plan.exponents, plan.division);
}

}  // namespace
}  // namespace depth_attention

void launch(const DepthAttentionParams& p, void* stream) {
  using namespace depth_attention;
  const int64_t size = size_of(p.type);
  const bool aligned =
      is_aligned(p.q, size) && is_aligned(p.k, size) && is_aligned(p.v, size) && is_aligned(p.out, size);
  launch_plan(p, p.type, plan_of(p, aligned, p.queries + 2 * p.keys, 0), stream);
}

void launch(const DepthAttentionBackwardParams& b, void* stream) {
  using namespace depth_attention;
  const DepthAttentionParams& p = b.forward;
  const int64_t size = size_of(p.type);
  const bool aligned = is_aligned(p.q, size) && is_aligned(p.k, size) && is_aligned(p.v, size) &&
                       is_aligned(b.grad, size) && is_aligned(b.grad_q, size) && is_aligned(b.grad_k, size) &&
                       is_aligned(b.grad_v, size);
  launch_plan(b, p.type, plan_of(p, aligned, 2 * (p.queries + p.keys), 2), stream);
}

}  // namespace rqk
