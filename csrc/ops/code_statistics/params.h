// Inputs and outputs of code_statistics.
#pragma once

#include <cstdint>

namespace rqk {

struct CodeStatisticsParams {
  const float* x;        // (rows, depth, channels); channels are contiguous
  const int64_t* codes;  // (rows, depth); -1 is counted nowhere
  int64_t rows, depth, channels, num_codes;
  // In elements; 0 if all rows or all depths share the data.
  int64_t x_row_stride, x_depth_stride, code_row_stride, code_depth_stride;
  int64_t codebooks;   // 1: all depths count together; or depth: each by itself
  float* counts;       // (codebooks, num_codes)
  float* sums;         // (codebooks, num_codes, channels)
  uint8_t* workspace;  // workspace_bytes(params) bytes, aligned to 64; need not be initialized
};

namespace code_statistics {

// A code's rows are added in row order, in pieces of this many: each piece from zero, then the pieces in order. Part of
// the definition (rqkernels/reference): a GPU adds pieces in parallel and gets the same bits.
constexpr int64_t kRowsPerPiece = 1024;

}  // namespace code_statistics

int64_t workspace_bytes(const CodeStatisticsParams& params);

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const CodeStatisticsParams& params, void* stream);

}  // namespace rqk
