// The direct path, for rows that the tensor cores cannot handle: a logit of -inf at a positive label, more candidates
// than a list holds, extreme magnitudes; and for all rows if they have too many channels for the tiles. A block takes
// 32 rows through all codes, 128 at a time.
//
// Distances are float32 sums of squared differences: twice the operations of a dot product, but without cancellation or
// centering. Bound B12 (docs/bounds.md) tells which codes need float64. Chunks of 32 channels of 32 rows and 128 codes
// pass through two stages of shared memory, with the next chunk in flight. A warp owns four rows; a lane holds 4 x 4
// distances, to every 32nd code, so loads of logits are coalesced and all sums per row stay within the warp.
//   first pass     nearest distance, largest logit and the sums relative to them, online: sums are rescaled when a
//                  reference changes. All terms Q_k (logit_k - largest) have one sign, so nothing cancels
//   careful pass   for blocks with rows that need float64 or have logits of -inf: the sums again, with known
//                  references; before it, if float64 is needed, a pass for the nearest float64 distance
//   last pass      distances again, and the gradient (or Q). The same thread reads and writes an element, so the
//                  gradient may overwrite the logits
// A result depends on its row alone. Sums are float32 over a tile's codes and float64 over tiles. Moves the codebook
// per 32 rows and pass (from L2), the logits once per pass and the gradient once. Each pass does 3 N K C float32
// operations in 2 N K C instructions, and two exponentials per element.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/soft_label/logit_dtypes.cuh"
#include "ops/soft_label/row.cuh"
#include "shared/exact.cuh"

namespace rqk {
namespace soft_label {
namespace direct {

constexpr int kRowsPerWarp = 4, kRows = kWarps * kRowsPerWarp;
constexpr int kCodesPerLane = 4, kCodes = 32 * kCodesPerLane;
constexpr int kStageChannels = 32;  // channels per stage, one per lane while loading
constexpr int kUnroll = 8;          // channels; the number computed is a multiple of this
constexpr double kDirectNeverRefine = 1e-3;
constexpr unsigned kAllRows = (1u << kRowsPerWarp) - 1;

// A stage of shared memory. The padding spreads the 32 channels that a warp stores over 32 banks.
struct __align__(16) Stage {
  float x[kStageChannels][kRows + 4];
  float codes[kStageChannels][kCodes + 1];
};

__device__ inline int first_row_of_warp() { return threadIdx.x / 32 * kRowsPerWarp; }

// Calls visit(k, distance) for every tile of codes: distance[r][j] is between the warp's row r and code k + 32 j.
template <class Visit>
__device__ inline void scan(const Row* rows, const float* codebook, int64_t num_codes, int64_t channels,
                            Stage (&stages)[2], Visit visit) {
  const int lane = lane_of_warp(), warp = threadIdx.x / 32, first_row = first_row_of_warp();
  constexpr int kCodesPerThread = kCodes / kWarps;
  float next_codes[kCodesPerThread], next_x[kRowsPerWarp];
  auto fetch = [&](int64_t tile, int64_t chunk) {
    const int64_t c = chunk + lane;
#pragma unroll
    for (int i = 0; i < kCodesPerThread; ++i) {
      const int64_t k = tile + i * kWarps + warp;
      next_codes[i] = k < num_codes && c < channels ? codebook[k * channels + c] : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const float* x = rows[first_row + r].x;
      next_x[r] = x != nullptr && c < channels ? x[c] : 0.0f;
    }
  };
  auto put = [&](Stage& stage) {
#pragma unroll
    for (int i = 0; i < kCodesPerThread; ++i) stage.codes[lane][i * kWarps + warp] = next_codes[i];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) stage.x[lane][first_row + r] = next_x[r];
  };

  // Chunk by chunk, with the next one in flight in registers.
  fetch(0, 0);
  put(stages[0]);
  __syncthreads();
  int at = 0;
  for (int64_t tile = 0; tile < num_codes; tile += kCodes) {
    float distance[kRowsPerWarp][kCodesPerLane] = {};
    for (int64_t chunk = 0; chunk < channels; chunk += kStageChannels) {
      const bool last_chunk = chunk + kStageChannels >= channels, last = last_chunk && tile + kCodes >= num_codes;
      if (!last) fetch(last_chunk ? tile + kCodes : tile, last_chunk ? 0 : chunk + kStageChannels);
      const Stage& stage = stages[at];
      float sum[kRowsPerWarp][kCodesPerLane] = {};
      // Past the last channel, both are zero.
      const int end = last_chunk ? int(channels - chunk) : kStageChannels;
      for (int c = 0; c < end; c += kUnroll) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          const float4 four = *reinterpret_cast<const float4*>(&stage.x[c + i][first_row]);
          const float x[kRowsPerWarp] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < kCodesPerLane; ++j) {
            const float code = stage.codes[c + i][32 * j + lane];
#pragma unroll
            for (int r = 0; r < kRowsPerWarp; ++r) {
              const float difference = x[r] - code;
              sum[r][j] = __fmaf_rn(difference, difference, sum[r][j]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
        for (int j = 0; j < kCodesPerLane; ++j) distance[r][j] += sum[r][j];
      }
      at ^= 1;
      if (!last) put(stages[at]);
      if (last_chunk) visit(tile + lane, distance);
      // The other stage is full, and no thread reads this one any more.
      __syncthreads();
    }
  }
}

// Folds the lanes' values of each of the warp's rows; a lane gets the result of row lane % 4. The whole warp calls.
template <class T, class Fold>
__device__ inline T fold_rows(const T (&values)[kRowsPerWarp], Fold fold) {
  static_assert(kRowsPerWarp == 4);
  const bool second = lane_of_warp() % 2 != 0, upper = lane_of_warp() % 4 >= 2;
  const T low = fold(second ? values[1] : values[0], __shfl_xor_sync(kFullWarp, second ? values[0] : values[1], 1));
  const T high = fold(second ? values[3] : values[2], __shfl_xor_sync(kFullWarp, second ? values[2] : values[3], 1));
  T all = fold(upper ? high : low, __shfl_xor_sync(kFullWarp, upper ? low : high, 2));
  for (int lanes = 4; lanes < 32; lanes *= 2) all = fold(all, __shfl_xor_sync(kFullWarp, all, lanes));
  return all;
}
template <class T>
__device__ inline T sum_rows(const T (&values)[kRowsPerWarp]) {
  return fold_rows(values, [](T a, T b) { return a + b; });
}
template <class T>
__device__ inline T min_rows(const T (&values)[kRowsPerWarp]) {
  return fold_rows(values, [](T a, T b) { return min(a, b); });
}
__device__ inline float max_rows(const float (&values)[kRowsPerWarp]) {
  return fold_rows(values, [](float a, float b) { return max(a, b); });
}

// --- rows ------------------------------------------------------------------------------------------------

// State of a row; lane i of a warp keeps that of the warp's row i % 4. Sums are of exponentials relative to the
// references.
struct RowState {
  float nearest, largest;          // the references
  double labels, logits, product;  // product: sum of label times (logit - largest)
  double nearest64;                // smallest float64 distance, if the row has candidates
  float limit;
};

template <class T>
__device__ inline T of_row(T value, int row) {
  return __shfl_sync(kFullWarp, value, row);
}

// Converts a tile's distances to exponents of labels. The whole warp calls.
struct Exponents {
  const float* codebook;
  int64_t num_codes, channels;
  double tau;
  float factor;  // 1 / tau

  // Calls take(j, float64 distance) in the lanes and for the j that are candidates.
  template <class Take>
  __device__ void for_candidates(const RowState& state, int r, const float* x, int64_t k,
                                 const float (&distance)[kCodesPerLane], Take take) const {
    const float inf = __int_as_float(0x7f800000), limit = of_row(state.limit, r);
#pragma unroll
    for (int j = 0; j < kCodesPerLane; ++j) {
      const bool is_far = distance[j] > limit && distance[j] < inf;
      const bool is_candidate = k + 32 * j < num_codes && !is_far;
      const unsigned mask = __ballot_sync(kFullWarp, is_candidate);
      if (mask == 0) continue;
      const double exact = exact_distance(mask, x, codebook, k + 32 * j, channels);
      if (is_candidate) take(j, exact);
    }
  }

  __device__ void operator()(const RowState& state, int r, bool is_refined, const float* x, int64_t k,
                             const float (&distance)[kCodesPerLane], float (&exponent)[kCodesPerLane]) const {
    const float nearest = of_row(state.nearest, r);
#pragma unroll
    for (int j = 0; j < kCodesPerLane; ++j) exponent[j] = (nearest - distance[j]) * factor;
    if (!is_refined) return;
    const double nearest64 = of_row(state.nearest64, r);
    for_candidates(state, r, x, k, distance,
                   [&](int j, double exact) { exponent[j] = float((nearest64 - exact) / tau); });
  }
};

// Cross-entropy; with kLoss false only Q, to which `gradient` then points. The launch bound asks for one block per
// multiprocessor: the chunk in flight takes registers, and with its own choice ptxas spills.
template <bool kLoss>
__global__ void __launch_bounds__(kThreads, 1) label_listed_rows(SoftLabelCrossEntropyParams p, Work w) {
  CU_SHARED(Stage, stages, [2]);
  CU_SHARED(Row, rows, [kRows]);
  const float inf = __int_as_float(0x7f800000), nan = __int_as_float(0x7fffffff);
  const int lane = lane_of_warp(), row = lane % kRowsPerWarp;  // this lane keeps the state of this row
  Row* mine = rows + first_row_of_warp();
  const int64_t num_codes = p.labels.num_codes, channels = p.labels.channels;
  const double tau = p.labels.tau, wanted = 1 / tau;
  const double relative =
      (double(min(channels, int64_t(kStageChannels))) + double((channels + kStageChannels - 1) / kStageChannels) + 5) *
      0x1p-24;
  const double absolute = double(channels) * 0x1p-120;

  const int64_t per_codebook = (w.rows + kRows - 1) / kRows;
  for (int64_t tile = blockIdx.x; tile < w.codebooks * per_codebook; tile += gridDim.x) {
    const int64_t q = tile / per_codebook, first = tile % per_codebook * kRows;
    const int64_t count = w.direct == nullptr ? w.rows : w.direct_counts[q];
    if (first >= count) continue;
    const float* codebook = p.labels.codebook + q * p.labels.codebook_stride;
    const Exponents exponents{codebook, num_codes, channels, tau, float(wanted < 3e38 ? wanted : 3e38)};
    if (lane < kRowsPerWarp) {
      const int64_t i = first + first_row_of_warp() + lane;
      mine[lane] = i < count ? row_at(p, q, w.direct == nullptr ? i : w.direct[q * w.rows + i]) : Row{};
    }
    __syncwarp();

    // Bits of rows: `odd` has a logit of -inf (or nearly) that may count; `far` has a distance that overflows float32.
    unsigned odd = 0, far = 0;
    RowState state{inf, -inf, 0, 0, 0, inf, 0};

    // First pass.
    scan(rows, codebook, num_codes, channels, stages, [&](int64_t k, const auto& distances) {
      float lowest[kRowsPerWarp];
      [[maybe_unused]] float highest[kRowsPerWarp], logit[kRowsPerWarp][kCodesPerLane];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        lowest[r] = inf;
        highest[r] = -inf;
        if (mine[r].x == nullptr) continue;
#pragma unroll
        for (int j = 0; j < kCodesPerLane; ++j) {
          if (k + 32 * j >= num_codes) continue;
          lowest[r] = min(lowest[r], distances[r][j]);
          if (!(distances[r][j] < inf)) far |= 1u << r;
          if constexpr (kLoss) {
            logit[r][j] = load(p.type, mine[r].logits, k + 32 * j);
            highest[r] = max(highest[r], logit[r][j]);
          }
        }
      }
      const float low = min_rows(lowest);
      if (low < state.nearest) {
        // Before the first code the sums are zero.
        const double scale = state.nearest < inf ? double(expf((low - state.nearest) * exponents.factor)) : 0;
        state.labels *= scale;
        state.product *= scale;
        state.nearest = low;
      }
      if constexpr (kLoss) {
        const float high = max_rows(highest);
        if (high > state.largest) {
          if (state.largest > -inf) state.product -= (double(high) - double(state.largest)) * state.labels;
          state.logits *= double(expf(state.largest - high));
          state.largest = high;
        }
      }
      float labels[kRowsPerWarp] = {};
      [[maybe_unused]] float logits[kRowsPerWarp] = {}, product[kRowsPerWarp] = {};
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        const float nearest = of_row(state.nearest, r), largest = of_row(state.largest, r);
        if (mine[r].x == nullptr) continue;
#pragma unroll
        for (int j = 0; j < kCodesPerLane; ++j) {
          if (k + 32 * j >= num_codes) continue;
          const float label = expf((nearest - distances[r][j]) * exponents.factor);
          labels[r] += label;
          if constexpr (kLoss) {
            const float below = logit[r][j] - largest;
            if (!(below > -inf)) odd |= 1u << r;
            product[r] += label * below;
            logits[r] += expf(below);
          }
        }
      }
      state.labels += double(sum_rows(labels));
      if constexpr (kLoss) {
        state.logits += double(sum_rows(logits));
        state.product += double(sum_rows(product));
      }
    });

    // Find the rows that need float64 distances (`refined`) or a second sum.
    far = __reduce_or_sync(kFullWarp, far);
    odd = __reduce_or_sync(kFullWarp, odd);
    const double error = relative * double(state.nearest) + absolute;
    const double limit =
        ((1 + 2 * relative) * double(state.nearest) + 2 * absolute + 40 * tau) * (1 + relative) + absolute;
    state.limit = float(1.000001 * limit);  // rounded up to float
    unsigned refined = far | __ballot_sync(kFullWarp, mine[row].x != nullptr && !(error <= kDirectNeverRefine * tau));
    unsigned bad = 0;  // rows that are not finite, or have such codes
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if ((refined >> r & 1) == 0) continue;
      bool is_finite = true;
      for (int64_t c = lane; c < channels; c += 32) is_finite = is_finite && fabsf(mine[r].x[c]) < inf;
      if (!__all_sync(kFullWarp, is_finite)) bad |= 1u << r;
    }
    refined &= kAllRows & ~bad;

    // The nearest float64 distance.
    if (__syncthreads_or(refined != 0)) {
      double nearest64[kRowsPerWarp];
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) nearest64[r] = inf;
      unsigned bad_codes = 0;
      scan(rows, codebook, num_codes, channels, stages, [&](int64_t k, const auto& distances) {
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
          if ((refined >> r & 1) == 0) continue;
          exponents.for_candidates(state, r, mine[r].x, k, distances[r], [&](int, double exact) {
            nearest64[r] = min(nearest64[r], exact);
            if (!(exact < double(inf))) bad_codes |= 1u << r;
          });
        }
      });
      state.nearest64 = min_rows(nearest64);
      bad |= __reduce_or_sync(kFullWarp, bad_codes);
      refined &= ~bad;
    }

    // Careful pass.
    const unsigned careful = (refined | odd) & ~bad;
    if (__syncthreads_or(careful != 0)) {
      if ((careful >> row & 1) != 0) state.labels = state.logits = state.product = 0;
      scan(rows, codebook, num_codes, channels, stages, [&](int64_t k, const auto& distances) {
        if (careful == 0) return;
        double labels[kRowsPerWarp] = {};
        [[maybe_unused]] double logits[kRowsPerWarp] = {}, product[kRowsPerWarp] = {};
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
          if ((careful >> r & 1) == 0) continue;
          const float largest = of_row(state.largest, r);
          float exponent[kCodesPerLane];
          exponents(state, r, (refined >> r & 1) != 0, mine[r].x, k, distances[r], exponent);
#pragma unroll
          for (int j = 0; j < kCodesPerLane; ++j) {
            if (k + 32 * j >= num_codes) continue;
            const double label = expf(exponent[j]);
            labels[r] += label;
            if constexpr (kLoss) {
              const float logit = load(p.type, mine[r].logits, k + 32 * j);
              logits[r] += double(expf(logit - largest));
              // A logit of -inf does not count if its label is zero.
              if (label > 0) product[r] += label * (double(logit) - double(largest));
            }
          }
        }
        state.labels += sum_rows(labels);
        if constexpr (kLoss) {
          state.logits += sum_rows(logits);
          state.product += sum_rows(product);
        }
      });
    }

    // Loss.
    if ((bad >> row & 1) != 0) state.labels = nan;
    const double weight = mine[row].weight;
    const float label_factor = float(kLoss ? -weight / state.labels : 1 / state.labels);
    const float logit_factor = float(weight / state.logits);
    if (kLoss && lane < kRowsPerWarp && mine[lane].loss != nullptr) {
      const float loss = float(log(state.logits) - state.product / state.labels);
      *mine[lane].loss = mine[lane].x == nullptr ? 0.0f : loss;
    }

    // Last pass.
    if (p.gradient != nullptr) {
      scan(rows, codebook, num_codes, channels, stages, [&](int64_t k, const auto& distances) {
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r) {
          if (mine[r].gradient == nullptr) continue;
          const bool is_counted = mine[r].x != nullptr;
          const float of_labels = of_row(label_factor, r), of_logits = of_row(logit_factor, r);
          const float largest = of_row(state.largest, r);
          float exponent[kCodesPerLane];
          exponents(state, r, (refined >> r & 1) != 0, mine[r].x, k, distances[r], exponent);
#pragma unroll
          for (int j = 0; j < kCodesPerLane; ++j) {
            if (k + 32 * j >= num_codes) continue;
            float value = 0;
            if (is_counted) {
              value = expf(exponent[j]) * of_labels;
              if constexpr (kLoss) {
                const float below = load(p.type, mine[r].logits, k + 32 * j) - largest;
                value = __fmaf_rn(expf(below), of_logits, value);
              }
            }
            store(p.type, mine[r].gradient, k + 32 * j, value);
          }
        }
      });
    }
    __syncwarp();  // before the next tile's rows overwrite these
  }
}

}  // namespace direct
}  // namespace soft_label
}  // namespace rqk
