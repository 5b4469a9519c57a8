// Sampling from logits on the CPU: threads and scratch memory around cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/cpu_capability.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "ops/sample_logits/kernel_table.h"
#include "ops/sample_logits/params.h"

namespace rqk {

void launch(const SampleLogitsParams& p, void*) {
  const SampleLogitsKernels& kernels = RQK_KERNEL_TABLE(sample_logits_kernels);
  const uint64_t offset = static_cast<uint64_t>(p.offset_ptr != nullptr ? *p.offset_ptr : p.offset);
  const uint32_t stream = static_cast<uint32_t>(p.stream_ptr != nullptr ? *p.stream_ptr : p.stream);
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t tasks = std::min(threads, p.rows);
  // Allocate here: an exception inside parallel_for would lose its message.
  std::vector<Buffer<char>> scratch;
  for (int64_t i = 0; i < tasks; ++i) scratch.emplace_back(static_cast<int64_t>(kernels.scratch_bytes(p.num_codes)));
  for_each_task(tasks, [&](int64_t task) {
    for (int64_t n = p.rows * task / tasks; n < p.rows * (task + 1) / tasks; ++n) {
      const double uniform = philox_uniform(p.seed, offset + static_cast<uint64_t>(n / p.streams),
                                            stream + static_cast<uint32_t>(n % p.streams), kPhiloxSampleLogits);
      p.codes[n] = kernels.sample_row(p.logits + n * p.num_codes, p.num_codes, p.settings, uniform, scratch[task]);
    }
  });
}

}  // namespace rqk
