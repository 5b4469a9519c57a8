// Float32 products of many rows with many codes: tiles of rows against panels of codes, in registers. For files
// compiled once per instruction set.
#pragma once

#include "common/simd.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kRowTile = 12;  // 12 x 2 accumulators of 32 registers
#else
constexpr int kRowTile = 6;  // 6 x 2 accumulators of 16 registers
#endif
constexpr int kPanelVecs = 2;
constexpr int kPanelWidth = kPanelVecs * Vec::kSize;

// Writes channel c of a vector to column[c * width], zeros if it is null: a tile of rows is (channels, kRowTile), a
// panel of codes (channels, kPanelWidth).
inline void pack_column(const float* values, int64_t channels, int64_t width, float* column) {
  for (int64_t c = 0; c < channels; ++c) column[c * width] = values != nullptr ? values[c] : 0.0f;
}

// Products of one tile of rows, (channels, kRowTile), with one panel, (channels, kPanelWidth), in registers.
[[gnu::always_inline]] inline void multiply_panel(const float* __restrict__ tile, const float* __restrict__ panel,
                                                  int64_t channels, Vec (&dot)[kRowTile][kPanelVecs]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRowTile; ++i) {
    for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = Vec::zero();
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vec e[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) e[v] = Vec::load(panel + c * kPanelWidth + v * Vec::kSize);
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile; ++i) {
      const Vec r = Vec::fill(tile[c * kRowTile + i]);
      for (int v = 0; v < kPanelVecs; ++v) dot[i][v] = fma(r, e[v], dot[i][v]);
    }
  }
}

}  // namespace
}  // namespace RQK_CAPABILITY
}  // namespace rqk
