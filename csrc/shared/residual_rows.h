// Updates of a row between the choices of its codes, on the CPU. For cpu.cpp files. `Params` is the operator's own
// struct, with the members of ResidualSearchParams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace rqk {
namespace {

// Starts a row with r_0 = x. Returns its squared norm.
template <class Params, class SquaredNorm>
double begin_row(const Params& p, int64_t row, float* residual, SquaredNorm squared_norm) {
  std::copy(p.x + row * p.channels, p.x + (row + 1) * p.channels, residual);
  std::fill(p.quantized + row * p.channels, p.quantized + (row + 1) * p.channels, 0.0f);
  return squared_norm(residual, p.channels);
}

// Records the code of a depth and subtracts that code of `codes_kc` from the residual. Returns its squared norm.
template <class Params, class SquaredNorm>
double take_code(const Params& p, int64_t row, int64_t depth, int64_t code, const float* codes_kc, float* residual,
                 SquaredNorm squared_norm) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const int64_t channels = p.channels;
  float* q = p.quantized + row * channels;
  if (p.residuals != nullptr) {
    std::copy(residual, residual + channels, p.residuals + (row * p.depth + depth) * channels);
  }
  if (code >= 0) {
    const float* e = codes_kc + code * channels;
    for (int64_t c = 0; c < channels; ++c) {
      residual[c] -= e[c];
      q[c] += e[c];
    }
  } else {
    std::fill(residual, residual + channels, kNan);
    std::fill(q, q + channels, kNan);
  }
  const double squared = squared_norm(residual, channels);
  p.codes[row * p.depth + depth] = code;
  p.residual_sq_norms[row * p.depth + depth] = static_cast<float>(squared);
  return squared;
}

}  // namespace
}  // namespace rqk
