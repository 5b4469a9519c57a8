// Counts and sums by code on the CPU, by one of two methods that add the same numbers in the same order.
//
// Direct: reads the rows in order and adds each to its code's accumulators. Used if the float64 accumulators of all
// codes fit a core's own cache (kAccumulators) and there are enough rows per code (kRowsPerCode) that clearing and
// reading them is cheap. Reads x once, and the codes once per slice. Sorted, otherwise: a counting sort of the rows (8
// bytes each), then each code adds its rows. Reads x once, in segments.
//
// Threads divide channels and codes, never the rows of a code, so each sum is computed by one thread in one order.
// Denormal inputs become normal float64 numbers; only the final conversion could flush them, and must not.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "ops/code_statistics/kernel_table.h"

namespace rqk {
namespace {

using code_statistics::Accumulators;
using code_statistics::Slice;

constexpr int64_t kAccumulators = (1 << 20) / sizeof(double);  // per thread: 1 MiB
constexpr int64_t kRowsPerCode = 16;
constexpr int64_t kLine = 16;  // floats per cache line; slices are multiples of it
constexpr int64_t kElementsPerTask = 1 << 15;

int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

struct Plan {
  bool direct;
  int64_t slice, slices;  // channels per slice, number of slices
  int64_t group, groups;  // codebooks per slice (direct method), number of groups of them
  int64_t workers;
};

Plan plan_of(const CodeStatisticsParams& p) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  Plan plan{};
  const int64_t items = p.codebooks > 1 ? p.rows : p.rows * p.depth;
  plan.direct = items >= kRowsPerCode * p.num_codes && p.channels * p.num_codes <= kAccumulators;
  // Enough slices for all threads, unless they become too narrow.
  plan.slice = round_up((p.channels + threads - 1) / threads, kLine);
  if (!plan.direct) plan.slice = std::min(plan.slice, code_statistics::kSliceChannels);
  plan.slice = std::min(plan.slice, p.channels);
  plan.slices = (p.channels + plan.slice - 1) / plan.slice;
  // Handle as many codebooks per pass over the rows as the cache holds, but leave work for all threads.
  const int64_t in_cache = std::max<int64_t>(1, kAccumulators / (p.num_codes * plan.slice));
  const int64_t shared_out = (p.codebooks * plan.slices + threads - 1) / threads;
  plan.group = plan.direct ? std::min({p.codebooks, in_cache, shared_out}) : 1;
  plan.groups = (p.codebooks + plan.group - 1) / plan.group;
  plan.workers = plan.direct ? std::min(threads, plan.groups * plan.slices) : threads;
  return plan;
}

// Divides the workspace into parts aligned to cache lines.
struct Parts {
  explicit Parts(uint8_t* memory) : begin(reinterpret_cast<uintptr_t>(memory)), end(begin) {}

  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(end);
    end += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return part;
  }

  uintptr_t begin, end;
};

Accumulators take_accumulators(Parts& parts, const CodeStatisticsParams& p, const Plan& plan) {
  const int64_t num_codes = plan.group * p.num_codes, elements = num_codes * plan.slice;
  double *sums = parts.take<double>(elements), *totals = parts.take<double>(elements);
  return {sums, totals, parts.take<int64_t>(num_codes)};
}

struct Sorted {
  int64_t *begin, *next, *offsets;
};

Sorted take_sorted(Parts& parts, const CodeStatisticsParams& p) {
  int64_t *begin = parts.take<int64_t>(p.num_codes + 1), *next = parts.take<int64_t>(p.num_codes);
  return {begin, next, parts.take<int64_t>((p.codebooks > 1 ? p.rows : p.rows * p.depth) + 1)};
}

void launch_direct(const CodeStatisticsParams& p, const Plan& plan) {
  torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t first_worker, int64_t last_worker) {
    const KeepDenormals keep;
    for (int64_t worker = first_worker; worker < last_worker; ++worker) {
      Parts parts(p.workspace);
      Accumulators own{};
      for (int64_t w = 0; w <= worker; ++w) own = take_accumulators(parts, p, plan);
      for (int64_t task = worker; task < plan.groups * plan.slices; task += plan.workers) {
        const int64_t first = task % plan.slices * plan.slice, codebook = task / plan.slices * plan.group;
        const int64_t codebooks = std::min(plan.group, p.codebooks - codebook);
        RQK_KERNEL_TABLE(code_statistics_kernels)
            .add_direct(p, {codebook, codebooks, first, std::min(plan.slice, p.channels - first)}, own);
      }
    }
  });
}

template <class Visit>
void for_each_item(const CodeStatisticsParams& p, int64_t codebook, const Visit& visit) {
  const int64_t first = p.codebooks > 1 ? codebook : 0, end = p.codebooks > 1 ? codebook + 1 : p.depth;
  for (int64_t n = 0; n < p.rows; ++n) {
    for (int64_t d = first; d < end; ++d) {
      const int64_t code = p.codes[n * p.code_row_stride + d * p.code_depth_stride];
      if (code >= 0) visit(code, n * p.x_row_stride + d * p.x_depth_stride);
    }
  }
}

void launch_sorted(const CodeStatisticsParams& p, const Plan& plan) {
  Parts parts(p.workspace);
  const Sorted sorted = take_sorted(parts, p);
  const int64_t work_per_code = (1 + p.rows * p.depth / p.num_codes) * plan.slice;
  const int64_t codes_per_task = std::max<int64_t>(1, kElementsPerTask / work_per_code);
  const int64_t tasks = (p.num_codes + codes_per_task - 1) / codes_per_task * plan.slices;
  for (int64_t b = 0; b < p.codebooks; ++b) {
    std::fill(sorted.begin, sorted.begin + p.num_codes + 1, 0);
    for_each_item(p, b, [&sorted](int64_t code, int64_t) { ++sorted.begin[code + 1]; });
    for (int64_t k = 0; k < p.num_codes; ++k) {
      sorted.next[k] = sorted.begin[k];
      sorted.begin[k + 1] += sorted.begin[k];
    }
    for_each_item(p, b, [&sorted](int64_t code, int64_t offset) { sorted.offsets[sorted.next[code]++] = offset; });

    sorted.offsets[sorted.begin[p.num_codes]] = 0;

    // Neighbouring tasks are slices of the same codes, so a code with most of the rows is still divided among threads.
    torch::stable::parallel_for(0, plan.workers, 1, [&](int64_t first_worker, int64_t last_worker) {
      const KeepDenormals keep;
      for (int64_t worker = first_worker; worker < last_worker; ++worker) {
        for (int64_t task = worker; task < tasks; task += plan.workers) {
          const int64_t first = task % plan.slices * plan.slice, begin = task / plan.slices * codes_per_task;
          RQK_KERNEL_TABLE(code_statistics_kernels)
              .add_sorted(p, {b, 1, first, std::min(plan.slice, p.channels - first)}, sorted.begin, sorted.offsets,
                          begin, std::min(begin + codes_per_task, p.num_codes));
        }
      }
    });
  }
}

}  // namespace

int64_t workspace_bytes(const CodeStatisticsParams& p) {
  const Plan plan = plan_of(p);
  Parts parts(nullptr);
  if (plan.direct) {
    for (int64_t w = 0; w < plan.workers; ++w) take_accumulators(parts, p, plan);
  } else {
    take_sorted(parts, p);
  }
  return static_cast<int64_t>(parts.end - parts.begin);
}

void launch(const CodeStatisticsParams& p, void*) {
  const Plan plan = plan_of(p);
  if (plan.direct) {
    launch_direct(p, plan);
  } else {
    launch_sorted(p, plan);
  }
}

}  // namespace rqk
