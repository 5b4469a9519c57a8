// CPU kernels of stochastic_residual_search, one table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "shared/centered_codes.h"

namespace rqk {

// A tile of scored rows and the uniforms that sample their codes.
struct SampleRows {
  const float* residuals;  // (rows, channels)
  const double* uniforms;  // (rows)
  int first, last;         // process rows first .. last - 1
  int64_t parts;
  void* tile;
};

struct StochasticResidualSearchKernels {
  CodeScoresKernels scores;
  // Scratch bytes that `sample` needs.
  size_t (*scratch_bytes)(int64_t num_codes);
  // codes[i]: sampled from Q_tau of row i by uniforms[i]; -1 if the row is not finite.
  void (*sample)(const CenteredCodes& codebook, const SampleRows& rows, double tau, void* scratch, int64_t* codes);
};

RQK_DECLARE_KERNEL_TABLE(StochasticResidualSearchKernels, stochastic_residual_search_kernels)

}  // namespace rqk
