// Inputs and outputs of residual_search. All arrays are contiguous.
#pragma once

#include <cstdint>
#include <functional>

namespace rqk {

struct ResidualSearchParams {
  const float* x;          // (rows, channels)
  const float* codebooks;  // (num_codes, channels), or one such block per depth
  int64_t rows, channels, num_codes, depth;
  int64_t codebook_stride;   // elements from one depth's codebook to the next; 0 if all depths share one
  int64_t* codes;            // (rows, depth)
  float* quantized;          // (rows, channels)
  float* residual_sq_norms;  // (rows, depth)
  float* residuals;          // (rows, depth, channels), or null
  const uint8_t* packed;     // CPU only: the shared codebook as packed by pack_codebook; or null
  int64_t packed_bytes;
  uint8_t* workspace;  // workspace_bytes(params) on a GPU, 256-byte aligned; unused on the CPU
};

// CUDA: for the current device.
int64_t workspace_bytes(const ResidualSearchParams& params);

// Runs on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const ResidualSearchParams& params, void* stream);

// CPU: packs a shared codebook for many searches, with Gram rows if they are useful. Calls `allocate` once, for memory
// aligned to a cache line, which holds the result.
void pack_codebook(const float* codebook, int64_t num_codes, int64_t channels,
                   const std::function<uint8_t*(int64_t bytes)>& allocate);
bool packed_has_gram(const uint8_t* packed, int64_t bytes);

// CPU: state of the cache of packed codebooks; `found` counts the hits.
struct CodebookCacheState {
  int64_t entries, bytes, found;
};
CodebookCacheState codebook_cache_state();

}  // namespace rqk
