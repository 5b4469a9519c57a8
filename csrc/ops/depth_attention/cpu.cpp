// Depth attention on the CPU: threads and scratch memory around cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "ops/depth_attention/kernel_table.h"
#include "ops/depth_attention/params.h"

namespace rqk {
namespace {

// Elements per chunk of heads.
constexpr int64_t kElementsPerChunk = 1 << 15;

// Runs work(begin, end, scratch) for chunks of all heads of all stacks.
template <class Work>
void for_each_chunk(const DepthAttentionParams& p, int64_t scratch_floats, Work work) {
  const int64_t heads = p.stacks * p.heads, per_head = 2 * (p.queries + p.keys) * int64_t(p.head_dim);
  const int64_t chunk = std::max<int64_t>(1, kElementsPerChunk / per_head), chunks = divide_up(heads, chunk);
  const int64_t workers = std::min<int64_t>(std::max<int64_t>(1, torch::stable::get_num_threads()), chunks);
  // Allocate here: an exception inside parallel_for would lose its message. Each worker owns one slot.
  std::vector<Buffer<float>> slots;
  for (int64_t i = 0; i < workers; ++i) slots.emplace_back(scratch_floats);
  std::atomic<int64_t> next{0};
  for_each_task(workers, [&](int64_t worker) {
    for (int64_t begin = next.fetch_add(chunk); begin < heads; begin = next.fetch_add(chunk)) {
      work(begin, std::min(begin + chunk, heads), slots[worker]);
    }
  });
}

}  // namespace

void launch(const DepthAttentionParams& p, void*) {
  const DepthAttentionKernels& kernels = RQK_KERNEL_TABLE(depth_attention_kernels);
  for_each_chunk(p, kernels.scratch(p, false),
                 [&](int64_t begin, int64_t end, float* scratch) { kernels.forward(p, begin, end, scratch); });
}

void launch(const DepthAttentionBackwardParams& p, void*) {
  const DepthAttentionKernels& kernels = RQK_KERNEL_TABLE(depth_attention_kernels);
  for_each_chunk(p.forward, kernels.scratch(p.forward, true),
                 [&](int64_t begin, int64_t end, float* scratch) { kernels.backward(p, begin, end, scratch); });
}

}  // namespace rqk
