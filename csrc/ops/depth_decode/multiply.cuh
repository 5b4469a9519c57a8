// Products of rows with packed weights: out = epilogue(x W^T).
//
// A warp multiplies a panel of 32 outputs with up to 8 or up to 32 rows. All operands go straight from memory to the
// registers that use them: panels are packed so that a warp's load is one run of 128 to 512 bytes, and activations are
// stored in lane order (arrange.cuh). So nothing waits at a barrier while weights arrive. Each warp has four steps in
// flight (two for 32 rows); a step is 1 KB of weights (fp32: 256 bytes).
//
// The inputs are divided into eight slices, each summed in order, and the slices are added as ((0 + 1 + 2 + 3) + (4 + 5
// + 6 + 7)), from left to right. To keep the device busy with few rows, the eight warps of a block take one slice each
// of one panel: a layer of 48 panels has 384 warps reading. With many rows, a block has four panels, and two warps per
// panel take four slices each: four warps then read the same activations, three of them from L1. Both give the same
// bits. Partial sums are exchanged in shared memory, 4 to 36 KB per block (int8: twice that).
//
//   fp32   a lane has 4 outputs and 2 of each 8 rows: true float32, one multiply-add per weight and row. TF32 would
//          change greedy codes.
//   bf16   the weights are the 16 x 16 operand of mma.m16n8k16, two per step, eight rows the other operand; the low
//          and the high parts of the activations are added to the same float32 sums.
//   int8   the same with mma.m16n8k32, and an integer sum for each part.
//
// Per KB of weights and eight rows a warp issues four mma, at most 7 cycles of an SM's tensor cores; 3.0 TB/s bring a
// KB to each of 132 SMs in 75 cycles at 1.7 GHz. So up to 80 rows the weights are the limit, a tile with a single row
// costs nothing extra, and one kernel serves all. L2 delivers the weights once per tile of 32 rows, and 4 bytes per
// activation for every 32 or 128 outputs: with 100 rows and 128 outputs 5.6 times the weights' bytes in bf16, which is
// the limit there (at 5.5 TB/s three times the floor).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/ptx.cuh"
#include "ops/depth_decode/arrange.cuh"
#include "ops/depth_decode/params.h"

namespace rqk {
namespace depth_decode {

constexpr int kPanel = static_cast<int>(kOutputPanel);
constexpr int kSlices = kWarps;
constexpr int kMostPanels = 4;          // per block
constexpr int kSumStride = kPanel + 4;  // spreads the rows over the shared memory banks

struct Product {
  PackedLinear layer;
  Activations from;
  const float* scales;  // of the rows, int8 only
  int64_t rows;
  unsigned row_tiles;   // blocks are (panels / panels_of_block, row_tiles); the row tiles of a panel are neighbours
  int panels_of_block;  // 1 or kMostPanels
  Epilogue epilogue;
  float* out;  // (rows, stride); fp32 and bf16 write activations to `to` instead
  int64_t stride;
  Activations to;
};

template <WeightType kType>
constexpr int kSumParts = kType == WeightType::kInt8 ? 2 : 1;

template <WeightType kType, int kTiles>
constexpr int kSumWords = kSumParts<kType> * kTiles * kRowGroup * kSumStride;  // per warp

// Operands of one lane in one step.
template <int kTiles>
struct Step {
  uint32_t weights[8];
  uint4 x[kTiles];
};

template <WeightType kType, int kTiles>
__device__ inline void load_step(const uint8_t* panel, const Activations& from, int64_t first_group, int groups,
                                 int step, Step<kTiles>& to) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (kType == WeightType::kBFloat16) {
    const uint8_t* at = panel + step * 1024 + t * 64 + g * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // input 4 i + t, pairs 2 g and 2 g + 1
      const uint2 pairs = *reinterpret_cast<const uint2*>(at + i * 256);
      to.weights[2 * i] = pairs.x;
      to.weights[2 * i + 1] = pairs.y;
    }
  } else {
    // fp32: input i of the step; int8: inputs 16 i + 4 t .. + 3. Outputs 4 g .. 4 g + 3.
    const uint8_t* at =
        kType == WeightType::kFloat32 ? panel + step * 256 + g * 16 : panel + step * 1024 + t * 128 + g * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = *reinterpret_cast<const uint4*>(at + i * (kType == WeightType::kFloat32 ? 128 : 512));
      to.weights[4 * i] = four.x;
      to.weights[4 * i + 1] = four.y;
      to.weights[4 * i + 2] = four.z;
      to.weights[4 * i + 3] = four.w;
    }
  }
  constexpr int kStepLanes = kType == WeightType::kFloat32 ? 4 : 32;
  const int64_t steps = from.inputs / kStepInputs<kType>;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n >= groups) break;
    const int64_t at = ((first_group + n) * steps + step) * kStepLanes + (kType == WeightType::kFloat32 ? t : lane);
    to.x[n] = reinterpret_cast<const uint4*>(from.at)[at];
  }
}

// Sums of a lane: rows 8 n + 2 t + j % 2; outputs 4 g + j / 2, for bf16 2 g + j / 2 % 2 + 16 (j / 4).
template <WeightType kType, int kTiles>
struct Sums;

template <int kTiles>
struct Sums<WeightType::kFloat32, kTiles> {
  float sum[kTiles][8] = {};

  __device__ void add(const Step<kTiles>& step, int groups) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= groups) break;
      const float x[4] = {__uint_as_float(step.x[n].x), __uint_as_float(step.x[n].y), __uint_as_float(step.x[n].z),
                          __uint_as_float(step.x[n].w)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum[n][j] = __fmaf_rn(__uint_as_float(step.weights[4 * i + j / 2]), x[2 * i + j % 2], sum[n][j]);
        }
      }
    }
  }
};

template <int kTiles>
struct Sums<WeightType::kBFloat16, kTiles> {
  float sum[kTiles][2][4] = {};

  __device__ void add(const Step<kTiles>& step, int groups) {
    const uint32_t (&w)[8] = step.weights;
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Inputs t and 4 + t (i / 2: 8 + t and 12 + t) of pair 2 g + i % 2.
      const uint32_t first = w[i / 2 * 4 + i % 2], second = w[i / 2 * 4 + 2 + i % 2];
      a[0][i] = (first & 0xffffu) | second << 16;
      a[1][i] = first >> 16 | (second & 0xffff0000u);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= groups) break;
      const uint32_t high[2] = {step.x[n].x, step.x[n].y}, low[2] = {step.x[n].z, step.x[n].w};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::mma_bf16(sum[n][m], a[m], low);
        ptx::mma_bf16(sum[n][m], a[m], high);
      }
    }
  }
};

template <int kTiles>
struct Sums<WeightType::kInt8, kTiles> {
  int32_t high[kTiles][2][4] = {}, low[kTiles][2][4] = {};

  __device__ void add(const Step<kTiles>& step, int groups) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i % 4 / 2][i / 4 * 2 + i % 2] = step.weights[i] ^ 0x80808080u;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= groups) break;
      const uint32_t b_high[2] = {step.x[n].x, step.x[n].y}, b_low[2] = {step.x[n].z, step.x[n].w};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::mma_s8(high[n][m], a[m], b_high);
        ptx::mma_s8(low[n][m], a[m], b_low);
      }
    }
  }
};

// Stores a warp's sums of a slice in its part of shared memory, or adds them unless the slice is the first.
template <bool kPairs, int kTiles, class T, class SumAt>
__device__ inline void put_sums(T* to, bool first, SumAt sum_at) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int output = kPairs ? 2 * g + j / 2 % 2 + 16 * (j / 4) : 4 * g + j / 2;
      T& total = to[(n * kRowGroup + 2 * t + j % 2) * kSumStride + output];
      total = first ? sum_at(n, j) : total + sum_at(n, j);
    }
  }
}

template <int kTiles>
__device__ inline void put_sums(const Sums<WeightType::kFloat32, kTiles>& sums, float* to, bool first) {
  put_sums<false, kTiles>(to, first, [&](int n, int j) { return sums.sum[n][j]; });
}
template <int kTiles>
__device__ inline void put_sums(const Sums<WeightType::kBFloat16, kTiles>& sums, float* to, bool first) {
  put_sums<true, kTiles>(to, first, [&](int n, int j) { return sums.sum[n][j / 4][j % 4]; });
}
template <int kTiles>
__device__ inline void put_sums(const Sums<WeightType::kInt8, kTiles>& sums, int32_t* to, bool first) {
  put_sums<false, kTiles>(to, first, [&](int n, int j) { return sums.high[n][j / 4][j % 4]; });
  put_sums<false, kTiles>(to + kTiles * kRowGroup * kSumStride, first,
                          [&](int n, int j) { return sums.low[n][j / 4][j % 4]; });
}

// The sum of an even number of parts, `stride` apart, each half from left to right.
template <class T>
__device__ inline T add_parts(const T* parts, int count, int stride) {
  T halves[2];
  for (int half = 0; half < 2; ++half) {
    const T* part = parts + half * (count / 2) * stride;
    halves[half] = part[0];
    for (int i = 1; i < count / 2; ++i) halves[half] += part[i * stride];
  }
  return halves[0] + halves[1];
}

__device__ inline float activated(float x, Epilogue epilogue) {
  return epilogue == Epilogue::kGelu ? 0.5f * x * (1.0f + erff(x * 0.70710678f)) : x / (1.0f + expf(-1.702f * x));
}

template <WeightType kType, int kTiles>
__global__ void __launch_bounds__(kThreads) multiply_rows(Product p) {
  using Sum = std::conditional_t<kType == WeightType::kInt8, int32_t, float>;
  constexpr int kAhead = kTiles == 1 ? 4 : 2, kRows = kTiles * kRowGroup, kWords = kSumWords<kType, kTiles>;
  CU_DYN_SMEM(Sum, sums);  // (warps, parts, kRows, kSumStride)
  const int warp = threadIdx.x / 32, warps_of_panel = kWarps / p.panels_of_block;
  const int64_t tile = blockIdx.x % p.row_tiles, first_panel = int64_t(blockIdx.x / p.row_tiles) * p.panels_of_block;
  const int64_t panels = (p.layer.outputs + kPanel - 1) / kPanel, panel = first_panel + warp / warps_of_panel;

  // Sum the slices of this warp, kAhead steps in flight.
  if (panel < panels) {
    constexpr int64_t kStepBytes = int64_t(kStepInputs<kType>) * kPanel *
                                   (kType == WeightType::kFloat32    ? 4
                                    : kType == WeightType::kBFloat16 ? 2
                                                                     : 1);
    const int steps = int(p.from.inputs / kStepInputs<kType>);
    const int64_t first_group = tile * kTiles, groups_left = (p.rows + kRowGroup - 1) / kRowGroup - first_group;
    const int groups = groups_left < kTiles ? int(groups_left) : kTiles;
    const uint8_t* weights = p.layer.weights + panel * steps * kStepBytes;
    int slice = warp % warps_of_panel * p.panels_of_block;  // as many slices as panels
    const int end = (slice + p.panels_of_block) * steps / kSlices;
    const int begin = slice * steps / kSlices;
    auto end_of_slice = [&] { return (slice + 1) * steps / kSlices; };

    Step<kTiles> ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i < end) load_step<kType, kTiles>(weights, p.from, first_group, groups, begin + i, ahead[i]);
    }
    Sum* mine = sums + warp * kWords;
    Sums<kType, kTiles> sum;
    bool first = true;
    for (int next = begin; next < end; next += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int step = next + i;
        if (step >= end) break;
        while (end_of_slice() <= step) ++slice;
        sum.add(ahead[i], groups);
        if (step + kAhead < end) {
          load_step<kType, kTiles>(weights, p.from, first_group, groups, step + kAhead, ahead[i]);
        }
        if (step + 1 == end_of_slice()) {
          put_sums<kTiles>(sum, mine, first);
          sum = {};
          first = false;
        }
      }
    }
    if (first) put_sums<kTiles>(sum, mine, true);  // zeros, if there are fewer steps than slices
  }
  __syncthreads();

  // Add the partial sums of the warps, and apply scale, bias and epilogue.
  for (int i = threadIdx.x; i < p.panels_of_block * kRows * kPanel; i += kThreads) {
    const int r = i / kPanel % kRows, part = i / kPanel / kRows * warps_of_panel;
    const int64_t row = tile * kRows + r;
    const int64_t output = (first_panel + i / kPanel / kRows) * kPanel + i % kPanel;
    if (row >= p.rows || output >= panels * kPanel) continue;
    const Sum* parts = sums + part * kWords + r * kSumStride + i % kPanel;
    float value = float(add_parts(parts, warps_of_panel, kWords));
    if constexpr (kType == WeightType::kInt8) {
      const float low = float(add_parts(parts + kRows * kSumStride, warps_of_panel, kWords));
      value = __fmaf_rn(value, 256.0f, low) * p.layer.scales[output] * p.scales[row];
    }
    value += p.layer.bias[output];
    const bool is_activation = p.epilogue == Epilogue::kGelu || p.epilogue == Epilogue::kQuickGelu;
    if (is_activation) value = activated(value, p.epilogue);
    if constexpr (kType != WeightType::kInt8) {
      if (is_activation) {
        store_activation<kType>(p.to, row, output, value);  // zeros past the last output
        continue;
      }
    }
    if (output >= p.layer.outputs) continue;
    float& out = p.out[row * p.stride + output];
    out = p.epilogue == Epilogue::kAdd ? out + value : value;
  }
}

}  // namespace depth_decode
}  // namespace rqk
