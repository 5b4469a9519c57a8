// Counter-based uniforms: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). One
// source for CPU and GPU. It uses integers only, so both give the same numbers.
//
// A uniform is a pure function of (seed, row, stream, op): key = seed, counter = (row low, row high, stream, op).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace rqk {

// The fourth word of the counter: the operator that samples. Two operators never share a uniform.
constexpr uint32_t kPhiloxStochasticResidualSearch = 1;
constexpr uint32_t kPhiloxSampleLogits = 2;

// In (0, 1): (word 0 + 0.5) 2^-32, exact in float64.
RQK_HD double philox_uniform(uint64_t seed, uint64_t row, uint32_t stream, uint32_t op) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint32_t word0 = uint32_t(row), word1 = uint32_t(row >> 32), word2 = stream, word3 = op;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(word0) * 0xD2511F53u, product1 = uint64_t(word2) * 0xCD9E8D57u;
    word0 = uint32_t(product1 >> 32) ^ word1 ^ key0;
    word2 = uint32_t(product0 >> 32) ^ word3 ^ key1;
    word1 = uint32_t(product1);
    word3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return (double(word0) + 0.5) * 0x1p-32;
}

}  // namespace rqk
