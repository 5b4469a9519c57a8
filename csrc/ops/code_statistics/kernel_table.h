// CPU kernels of code_statistics, one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/code_statistics/params.h"

namespace rqk {
namespace code_statistics {

// Channels [first, first + channels) of the statistics of consecutive codebooks.
struct Slice {
  int64_t codebook, codebooks, first, channels;
};

// Maximum channels per slice of the sorted method.
constexpr int64_t kSliceChannels = 512;

// Scratch of one worker of the direct method; need not be initialized.
struct Accumulators {
  double* sums;     // (slice's codebooks, num_codes, slice's channels)
  double* totals;   // the same shape: sums of complete pieces
  int64_t* counts;  // (slice's codebooks, num_codes)
};

}  // namespace code_statistics

struct CodeStatisticsKernels {
  // Reads the rows in order and adds each to its code's accumulators.
  void (*add_direct)(const CodeStatisticsParams&, code_statistics::Slice, const code_statistics::Accumulators&);
  // For codes [begin, end) of a slice of one codebook: adds the rows places[k] .. places[k + 1], given as offsets in x.
  // `offsets` has one more element (any row) past the last.
  void (*add_sorted)(const CodeStatisticsParams&, code_statistics::Slice, const int64_t* places, const int64_t* offsets,
                     int64_t begin, int64_t end);
};

RQK_DECLARE_KERNEL_TABLE(CodeStatisticsKernels, code_statistics_kernels)

}  // namespace rqk
