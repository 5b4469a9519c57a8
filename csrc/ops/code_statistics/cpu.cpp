// Counts and sums by code on the CPU: a counting sort of the row numbers, then each code adds its rows in row order.
//
// Threads split the codes, not the rows, so every sum is made by one thread in one order: the result does not depend on
// their number. Reads x once, in segments; the sort moves 8 bytes per row.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "ops/code_statistics/params.h"

namespace rqk {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

}  // namespace

void launch(const CodeStatisticsParams& p, void*) {
  // begin[k] .. begin[k + 1] are the places of code k's rows in `order`.
  std::vector<int64_t> begin(static_cast<size_t>(p.num_codes) + 1, 0);
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.codes[n] >= 0) ++begin[p.codes[n] + 1];
  }
  for (int64_t k = 0; k < p.num_codes; ++k) begin[k + 1] += begin[k];
  std::vector<int64_t> order(static_cast<size_t>(begin.back()));
  std::vector<int64_t> place(begin.begin(), begin.end() - 1);
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.codes[n] >= 0) order[place[p.codes[n]]++] = n;
  }

  // One float64 accumulator row per worker, taken here: memory must not run out inside parallel_for.
  const int64_t work_per_code = (1 + p.rows / p.num_codes) * p.channels;
  const int64_t codes_per_task = std::max<int64_t>(1, kElementsPerTask / work_per_code);
  const int64_t tasks = (p.num_codes + codes_per_task - 1) / codes_per_task;
  const int64_t workers = std::min<int64_t>(tasks, std::max<int64_t>(1, torch::stable::get_num_threads()));
  std::vector<double> accumulators(static_cast<size_t>(workers * p.channels));
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first_worker, int64_t last_worker) {
    for (int64_t worker = first_worker; worker < last_worker; ++worker) {
      double* sum = accumulators.data() + worker * p.channels;
      for (int64_t task = worker; task < tasks; task += workers) {
        const int64_t end = std::min((task + 1) * codes_per_task, p.num_codes);
        for (int64_t k = task * codes_per_task; k < end; ++k) {
          std::fill(sum, sum + p.channels, 0.0);
          for (int64_t i = begin[k]; i < begin[k + 1]; ++i) {
            const float* row = p.x + order[i] * p.channels;
            for (int64_t c = 0; c < p.channels; ++c) sum[c] += double(row[c]);
          }
          p.counts[k] = static_cast<float>(begin[k + 1] - begin[k]);
          std::copy(sum, sum + p.channels, p.sums + k * p.channels);
        }
      }
    }
  });
}

}  // namespace rqk
