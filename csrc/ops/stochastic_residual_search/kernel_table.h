// The part of the CPU's stochastic search that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu_capability.h"
#include "shared/centered_codes.h"

namespace rqk {

// Rows whose scores are known, and what draws their codes.
struct SampleRows {
  const float* residuals;  // (rows, channels)
  const double* uniforms;  // (rows)
  int first, last;         // those to deal with: first .. last - 1
  int64_t parts;
  void* tile;
};

struct StochasticResidualSearchKernels {
  CodeScoresKernels scores;
  // Bytes of scratch that `sample` needs.
  size_t (*scratch_bytes)(int64_t num_codes);
  // codes[i]: drawn by uniforms[i] from Q_tau of row i; -1 where the row is not finite.
  void (*sample)(const CenteredCodes& codebook, const SampleRows& rows, double tau, void* scratch, int64_t* codes);
};

RQK_DECLARE_KERNEL_TABLE(StochasticResidualSearchKernels, stochastic_residual_search_kernels)

}  // namespace rqk
