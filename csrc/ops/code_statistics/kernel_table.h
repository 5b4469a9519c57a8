// The part of the CPU code statistics that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "ops/code_statistics/params.h"

namespace rqk {
namespace code_statistics {

// Channels [first, first + channels) of the statistics of some codebooks, one behind the other.
struct Slice {
  int64_t codebook, codebooks, first, channels;
};

// The most channels of a slice of the sorted way.
constexpr int64_t kSliceChannels = 512;

// Memory of one worker of the direct way; nothing need be in it.
struct Accumulators {
  double* sums;     // (slice's codebooks, num_codes, slice's channels)
  double* totals;   // the same: of the pieces that are whole
  int64_t* counts;  // (slice's codebooks, num_codes)
};

}  // namespace code_statistics

struct CodeStatisticsKernels {
  // Reads the rows in their order and adds each where its code's accumulators are.
  void (*add_direct)(const CodeStatisticsParams&, code_statistics::Slice, const code_statistics::Accumulators&);
  // For codes [begin, end) of a slice of one codebook: adds the rows of places[k] .. places[k + 1], given as offsets in
  // x, with one more (of any row) behind the last.
  void (*add_sorted)(const CodeStatisticsParams&, code_statistics::Slice, const int64_t* places, const int64_t* offsets,
                     int64_t begin, int64_t end);
};

RQK_DECLARE_KERNEL_TABLE(CodeStatisticsKernels, code_statistics_kernels)

}  // namespace rqk
