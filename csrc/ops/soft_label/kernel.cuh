// Soft labels on a GPU: a block takes 64 rows through all codes, 128 at a time; Q is never stored.
//
//   Q_k = softmax_k(-|x - e_k|^2 / tau) = softmax_k(2 h_k / tau),  h_k = <x - m, e_k - m> - |e_k - m|^2 / 2
//
//   tiles.cuh          half scores h by tensor cores; the codebooks in two parts of fp16
//   direct.cuh         the direct path, for rows that these cannot handle
//   row.cuh            pointers of a row
//   logit_dtypes.cuh   loads and stores of logits of each dtype
//   plan.h             tile shapes and workspace
//
//   first pass   nearest code, largest logit and the sums relative to them, online: sums are rescaled when a reference
//                changes. All terms Q_k (logit_k - largest) have one sign, so nothing cancels. Lists the codes that
//                bound B11 (docs/bounds.md) assigns to float64
//   settle       adds up the two columns of warps, evaluates listed codes, writes the loss
//   second pass  half scores again, from the last tile to the first; writes the gradient (or Q), then that of listed
//                codes. The same thread reads and writes an element, so the gradient may overwrite the logits
// Sums are float32 over a warp's 64 codes of a tile and float64 over tiles, in an order that depends on K only: a
// result depends on its row alone. docs/bounds.md estimates the cost, at its end.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/soft_label/direct.cuh"
#include "ops/soft_label/tiles.cuh"

namespace rqk {
namespace soft_label {

// Per multiprocessor. On sm_100 and later the code does not fit the 128 registers of two blocks: ptxas spills a few
// values around the scans.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksAtOnce = 1;
#else
constexpr int kBlocksAtOnce = 2;
#endif

constexpr double kAlwaysRefine = 1.0 / 16, kNeverRefine = 1.0 / 4096;

enum RowPath : int32_t { kAbsent, kMasked, kTiled, kDirect };

// State of a row in a column of warps. Sums are of exponentials relative to the references.
struct Sums {
  float nearest, largest;          // the references: the largest half score and logit
  double labels, logits, product;  // product: sum of label times (logit - largest)
  int32_t listed, unused;          // number of candidates; -1: more than the list holds
};

// State of a block's rows, in shared memory.
struct RowTables {
  int64_t codebook, first;  // the codebook of these rows, and the number of the first
  PackedCodes codes;        // of that codebook
  Row row[kTileRows];
  RowPath path[kTileRows];
  float scale[kTileRows];  // of the fp16 parts
  float error[kTileRows];  // 4 E / tau
  float reach[kTileRows];  // codes further below the largest half score are not listed; -inf: none is
  Sums sums[kColumns][kTileRows];
  // Input of the second pass.
  RowPath decided[kTileRows];
  int32_t corrected[kColumns][kTileRows];  // number of candidates to correct
  float nearest[kTileRows], largest[kTileRows], label_factor[kTileRows], logit_factor[kTileRows];
};
static_assert(sizeof(RowTables) <= kSharedTables);

// The rows that a warp initializes, settles and corrects; in a scan it processes others.
constexpr int kOwnRows = kTileRows / kWarps;
__device__ inline int first_own_row() { return threadIdx.x / 32 * kOwnRows; }

// Folds a thread's values of its two rows over the four threads that share them; a lane gets the result of row lane %
// 2.
template <class T, class Fold>
__device__ inline T fold_rows(const T (&values)[2], Fold fold) {
  const bool second = lane_of_warp() % 2 != 0;
  const T mine = fold(second ? values[1] : values[0], __shfl_xor_sync(kFullWarp, second ? values[0] : values[1], 1));
  return fold(mine, __shfl_xor_sync(kFullWarp, mine, 2));
}
__device__ inline float sum_rows(const float (&values)[2]) {
  return fold_rows(values, [](float a, float b) { return a + b; });
}
__device__ inline float max_rows(const float (&values)[2]) {
  return fold_rows(values, [](float a, float b) { return max(a, b); });
}
// The inverse: the value of lane r of the four.
template <class T>
__device__ inline T of_row(T value, int r) {
  return __shfl_sync(kFullWarp, value, r, 4);
}

// Initializes the rows of a tile: pointers, path, and fp16 parts.
__device__ inline void set_rows(const SoftLabelCrossEntropyParams& p, const Work& w, RowTables& tables,
                                uint8_t* parts) {
  const int64_t q = blockIdx.x / w.row_tiles, first = blockIdx.x % w.row_tiles * kTileRows;
  if (threadIdx.x == 0) {
    tables.codebook = q;
    tables.first = first;
    tables.codes.packed = w.packed + q * w.tiles * w.chunks * (kTileCodes * kVectorBytes);
    tables.codes.terms = w.terms + q * w.tiles * kTileCodes;
  }
  const int64_t channels = p.labels.channels;
  const float inf = __int_as_float(0x7f800000);
  const double n = __int_as_float(w.norms[q]), tau = p.labels.tau;
  for (int i = lane_of_warp() / kLanes; i < kOwnRows; i += 32 / kLanes) {
    const int place = first_own_row() + i;
    const Row row = first + place < w.rows ? row_at(p, q, first + place) : Row{};
    const SplitVector split = split_vector(row.x, w.centers + q * w.chunks * kChunk, channels, w.chunks, place, parts,
                                           kTileRows * kVectorBytes);
    if (threadIdx.x % kLanes != 0) continue;
    const double a = sqrt(split.squared), error = 4 * half_score_error(a, n, channels, w.chunks) / tau;
    const bool is_usual = split.finite && a < kHuge && n < kHuge;
    RowPath path = row.x != nullptr ? (is_usual ? kTiled : kDirect) : kMasked;
    if (row.x == nullptr && row.gradient == nullptr && row.loss == nullptr) path = kAbsent;
    tables.row[place] = row;
    tables.path[place] = path;
    tables.scale[place] = split.scale;
    for (Sums(&sums)[kTileRows] : tables.sums) sums[place] = {-inf, -inf, 0, 0, 0, 0, 0};
    tables.error[place] = float(error);
    const double reach = tau / 2 * (error + (error > kAlwaysRefine ? 40 : 12)) * 1.00001;
    tables.reach[place] = path == kTiled && error > kNeverRefine ? float(reach) : -inf;
  }
}

// A column's candidate list of a row.
__device__ inline Candidate* list_at(const Work& w, int place, int column) {
  return w.candidates + ((int64_t(blockIdx.x) * kTileRows + place) * kColumns + column) * kCapacity;
}

// Adds codes within reach of the warp's rows to their lists. marks[r]: bit 2 n + b for h[n][2 r + b]. `lists` starts
// with the list of the warp's first row; floor and listed belong to row lane % 2 of the quad. The whole warp calls.
__device__ inline void list_codes(const float (&h)[8][4], const unsigned (&marks)[2], unsigned k, float floor,
                                  int32_t& listed, Candidate* lists) {
  const int lane = lane_of_warp(), quad = lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    for (unsigned lanes = __ballot_sync(kFullWarp, marks[r] != 0); lanes != 0;) {
      const int from = (__ffs(int(lanes)) - 1) / 4;
      lanes &= ~(0xfu << 4 * from);
      Candidate* list = lists + (from + 8 * r) * (kColumns * kCapacity);
      const int own = quad == from ? __popc(marks[r]) : 0;
      int place = own;  // ... plus those of earlier lanes
      for (int lanes_up = 1; lanes_up < 4; lanes_up *= 2) {
        const int before = __shfl_up_sync(kFullWarp, place, lanes_up, 4);
        place += lane % 4 >= lanes_up ? before : 0;
      }
      const int added = __shfl_sync(kFullWarp, place, 4 * from + 3);
      int count = __shfl_sync(kFullWarp, listed, 4 * from + r);
      if (count + added > kCapacity) {
        const float least = __shfl_sync(kFullWarp, floor, 4 * from + r);
        // Other lanes wrote some of these before a tile's barrier: each list is used once per tile.
        const Candidate old = lane < count ? list[lane] : Candidate{};
        const bool is_kept = lane < count && old.value >= least;
        const unsigned kept = __ballot_sync(kFullWarp, is_kept);
        __syncwarp();  // all lanes have read theirs
        if (is_kept) list[__popc(kept & ((1u << lane) - 1))] = old;
        count = __popc(kept);
      }
      const bool fits = count + added <= kCapacity;
      if (fits) {
        Candidate* to = list + count + place - own;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          if (quad == from && (marks[r] >> i & 1) != 0) {
            *to++ = {int32_t(k + 8 * (i / 2) + i % 2), h[i / 2][2 * r + i % 2]};
          }
        }
      }
      if (quad == from && lane % 2 == r) listed = fits ? count + added : -1;
    }
  }
}

// Merges the sums of two columns.
__device__ inline Sums add_columns(const Sums& a, const Sums& b, float factor) {
  const float inf = __int_as_float(0x7f800000);
  Sums all{max(a.nearest, b.nearest), max(a.largest, b.largest), 0, 0, 0, 0, 0};
  for (const Sums& part : {a, b}) {
    if (!(part.nearest > -inf)) continue;  // this column had no codes
    const double scale = expf((part.nearest - all.nearest) * factor);
    all.labels += scale * part.labels;
    all.product += scale * (part.product - (double(all.largest) - double(part.largest)) * part.labels);
    all.logits += double(expf(part.largest - all.largest)) * part.logits;
  }
  return all;
}

// Computes losses and the input of the second pass from the sums and lists of a block's rows. Replaces the candidates'
// values by the gradient there. A warp settles its own rows one after another.
template <FloatType kType, bool kLoss>
__device__ inline void settle_rows(const SoftLabelCrossEntropyParams& p, const Work& w, RowTables& tables) {
  const float inf = __int_as_float(0x7f800000);
  const int lane = lane_of_warp();
  const int64_t q = tables.codebook;
  const float* codebook = p.labels.codebook + q * p.labels.codebook_stride;
  const double tau = p.labels.tau;
  for (int i = 0; i < kOwnRows; ++i) {
    const int place = first_own_row() + i;
    const Row& row = tables.row[place];
    const Sums &left = tables.sums[0][place], &right = tables.sums[1][place];
    Sums all = add_columns(left, right, w.factor);
    const float error = tables.error[place];
    const bool is_tiled = tables.path[place] == kTiled, is_all = error > kAlwaysRefine;
    // A logit of -inf (or nearly) at a label that may count, or NaN.
    const bool is_odd = kLoss && !(fabs(all.product) < double(inf));
    const bool is_listed = error > kNeverRefine && left.listed >= 0 && right.listed >= 0;
    const bool is_direct = tables.path[place] == kDirect || (is_tiled && (is_odd || (is_all && !is_listed)));
    const bool is_refined = is_tiled && is_listed && !is_direct;

    // Labels of listed codes by exact distances, and what that changes in the sums.
    Candidate mine[kColumns];
    double exact[kColumns], nearest = inf;
    [[maybe_unused]] float logit[kColumns];
    if (is_refined) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const bool is_there = lane < tables.sums[c][place].listed;
        mine[c] = is_there ? list_at(w, place, c)[lane] : Candidate{-1, 0};
        if (!(mine[c].value >= all.nearest - tables.reach[place])) mine[c].code = -1;
        const unsigned mask = __ballot_sync(kFullWarp, mine[c].code >= 0);
        exact[c] = exact_distance(mask, row.x, codebook, mine[c].code, p.labels.channels);
        if (mine[c].code >= 0) nearest = min(nearest, exact[c]);
      }
      for (int lanes = 16; lanes > 0; lanes /= 2) nearest = min(nearest, __shfl_xor_sync(kFullWarp, nearest, lanes));
      double labels = 0, product = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (mine[c].code < 0) continue;
        const float label = expf(float((nearest - exact[c]) / tau));
        double change = label;
        if (!is_all) change -= double(expf((mine[c].value - all.nearest) * w.factor));
        mine[c].value = label;
        labels += change;
        if constexpr (kLoss) {
          logit[c] = load<kType>(row.logits, mine[c].code) - all.largest;
          product += change * double(logit[c]);
        }
      }
      all.labels = sum_of_warp(labels) + (is_all ? 0 : all.labels);
      all.product = sum_of_warp(product) + (is_all ? 0 : all.product);
    }

    // Gradient of listed codes; input of the second pass; loss.
    const double weight = row.weight;
    const float label_factor = float(kLoss ? -weight / all.labels : 1 / all.labels);
    const float logit_factor = float(weight / all.logits);
    if (is_refined) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane >= tables.sums[c][place].listed) continue;
        mine[c].value *= label_factor;
        if constexpr (kLoss) mine[c].value = __fmaf_rn(expf(logit[c]), logit_factor, mine[c].value);
        list_at(w, place, c)[lane] = mine[c];
      }
    }
    if (lane != 0) continue;
    tables.decided[place] = is_direct ? kDirect : tables.path[place];
    tables.corrected[0][place] = is_refined ? left.listed : 0;
    tables.corrected[1][place] = is_refined ? right.listed : 0;
    tables.nearest[place] = all.nearest;
    tables.largest[place] = all.largest;
    tables.label_factor[place] = label_factor;
    tables.logit_factor[place] = logit_factor;
    if (is_direct) {
      w.direct[q * w.rows + atomicAdd(&w.direct_counts[q], 1)] = tables.first + place;
    } else if (kLoss && row.loss != nullptr) {
      *row.loss = is_tiled ? float(log(all.logits) - all.product / all.labels) : 0.0f;
    }
  }
}

// Loads a thread's logits of a row: values[i] belongs to code k + 8 (i / 2) + i % 2, -inf past the last.
template <FloatType kType>
__device__ inline void load_logits(const void* row, unsigned k, unsigned num_codes, float (&values)[16]) {
  const bool is_paired = reinterpret_cast<uintptr_t>(row) % (2 * kSize<kType>) == 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float both[2] = {-__int_as_float(0x7f800000), -__int_as_float(0x7f800000)};
    if (k + 8 * n + 1 < num_codes) {
      load_pair<kType>(row, k + 8 * n, is_paired, both);
    } else if (k + 8 * n < num_codes) {
      both[0] = load<kType>(row, k + 8 * n);
    }
    values[2 * n] = both[0];
    values[2 * n + 1] = both[1];
  }
}

// Stores a thread's gradient of a row, in the same layout.
template <FloatType kType>
__device__ inline void store_gradient(void* row, unsigned k, unsigned num_codes, const float (&values)[16]) {
  const bool is_paired = reinterpret_cast<uintptr_t>(row) % (2 * kSize<kType>) == 0;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float both[2] = {values[2 * n], values[2 * n + 1]};
    if (k + 8 * n + 1 < num_codes) {
      store_pair<kType>(row, k + 8 * n, is_paired, both);
    } else if (k + 8 * n < num_codes) {
      store<kType>(row, k + 8 * n, both[0]);
    }
  }
}

// Cross-entropy; with kLoss false only Q, to which `gradient` then points.
template <FloatType kType, bool kLoss>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) label_rows(SoftLabelCrossEntropyParams p, Work w) {
  CU_DYN_SMEM(uint8_t, parts);  // fp16 parts of the rows, (chunks, kTileRows, kVectorBytes); then the ring
  CU_SHARED(RowTables, tables);
  const float inf = __int_as_float(0x7f800000);
  const int lane = lane_of_warp();
  const int seen_row = first_row_of_warp() + lane / 4;  // in a scan: this row and the one eight after it
  const int kept_row = seen_row + lane % 2 * 8;         // this lane keeps the sums of this row
  const unsigned num_codes = unsigned(p.labels.num_codes);
  uint8_t* ring = parts + w.chunks * kTileRows * kVectorBytes;

  // The last warps of a block may have no rows.
  auto has_rows = [&] { return tables.first + first_row_of_warp() < w.rows; };

  // The rows of this block.
  set_rows(p, w, tables, parts);
  __syncthreads();

  // First pass.
  scan(w, tables.codes, false, has_rows() ? num_codes : 0, parts, tables.scale, ring,
       [&](unsigned k, const float (&h)[8][4]) {
         // Between tiles the sums are in shared memory, since the products need the registers. The last two lanes of a
         // row hold unused copies.
         Sums sums{};
         if (lane % 4 < 2) sums = tables.sums[column_of_warp()][kept_row];
         const bool is_whole = k + kWarpCodes <= num_codes;
         auto is_code = [&](int i) { return is_whole || k + 8 * (i / 2) + i % 2 < num_codes; };
         // The nearest code so far; older sums are rescaled to it.
         float top[2] = {h[0][0], h[0][2]};
#pragma unroll
         for (int i = 1; i < 16; ++i) {
           top[0] = max(top[0], h[i / 2][i % 2]);
           top[1] = max(top[1], h[i / 2][2 + i % 2]);
         }
         const float highest = max_rows(top);
         if (highest > sums.nearest) {
           // Before the first code the sums are zero.
           const double scale = sums.nearest > -inf ? double(expf((sums.nearest - highest) * w.factor)) : 0;
           sums.labels *= scale;
           sums.product *= scale;
           sums.nearest = highest;
         }
         // List codes within reach.
         // Without a list the floor is +inf; before the first code it is NaN.
         const float floor = sums.nearest - (sums.listed < 0 ? -inf : tables.reach[kept_row]);
         const float floors[2] = {of_row(floor, 0), of_row(floor, 1)};
         if (__any_sync(kFullWarp, top[0] >= floors[0] || top[1] >= floors[1])) {
           unsigned marks[2] = {0, 0};
#pragma unroll
           for (int i = 0; i < 16; ++i) {
             if (h[i / 2][i % 2] >= floors[0]) marks[0] |= 1u << i;
             if (h[i / 2][2 + i % 2] >= floors[1]) marks[1] |= 1u << i;
           }
           list_codes(h, marks, k, floor, sums.listed, list_at(w, first_row_of_warp(), column_of_warp()));
         }

         // Add the terms of this tile.
         float labels[2] = {0, 0};
         [[maybe_unused]] float exponentials[2] = {0, 0}, product[2] = {0, 0};
    // One row's logits after the other: both would not fit the registers.
#pragma unroll
         for (int r = 0; r < 2; ++r) {
           const float nearest = of_row(sums.nearest, r);
           if constexpr (kLoss) {
             const bool is_counted = tables.path[seen_row + 8 * r] == kTiled;
             float logits[16], largest = of_row(sums.largest, r);
             load_logits<kType>(tables.row[seen_row + 8 * r].logits, k, is_counted ? num_codes : 0, logits);
#pragma unroll
             for (int i = 0; i < 16; ++i) largest = max(largest, logits[i]);
             largest = max(largest, __shfl_xor_sync(kFullWarp, largest, 1));
             largest = max(largest, __shfl_xor_sync(kFullWarp, largest, 2));
             if (lane % 2 == r && largest > sums.largest) {
               if (sums.largest > -inf) sums.product -= (double(largest) - double(sums.largest)) * sums.labels;
               sums.logits *= double(expf(sums.largest - largest));
               sums.largest = largest;
             }
#pragma unroll
             for (int i = 0; i < 16; ++i) {
               if (!is_counted || !is_code(i)) continue;
               const float label = expf((h[i / 2][2 * r + i % 2] - nearest) * w.factor), below = logits[i] - largest;
               labels[r] += label;
               product[r] = __fmaf_rn(label, below, product[r]);
               exponentials[r] += expf(below);
             }
           } else {
#pragma unroll
             for (int i = 0; i < 16; ++i) {
               if (is_code(i)) labels[r] += expf((h[i / 2][2 * r + i % 2] - nearest) * w.factor);
             }
           }
         }
         sums.labels += double(sum_rows(labels));
         if constexpr (kLoss) {
           sums.logits += double(sum_rows(exponentials));
           sums.product += double(sum_rows(product));
         }
         if (lane % 4 < 2) tables.sums[column_of_warp()][kept_row] = sums;
       });
  __syncthreads();

  settle_rows<kType, kLoss>(p, w, tables);
  if (p.gradient == nullptr) return;
  // No barrier is needed: the scan has its own before the settled values are read.

  // Second pass.
  scan(w, tables.codes, true, has_rows() ? num_codes : 0, parts, tables.scale, ring,
       [&](unsigned k, const float (&h)[8][4]) {
#pragma unroll
         for (int r = 0; r < 2; ++r) {
           const int place = seen_row + 8 * r;
           const RowPath path = tables.decided[place];
           if (path == kAbsent || path == kDirect) continue;
           const float nearest = tables.nearest[place], of_labels = tables.label_factor[place];
           float values[16];
           if constexpr (kLoss) {
             const float largest = tables.largest[place], of_logits = tables.logit_factor[place];
             load_logits<kType>(tables.row[place].logits, k, path == kTiled ? num_codes : 0, values);
#pragma unroll
             for (int i = 0; i < 16; ++i) {
               const float label = expf((h[i / 2][2 * r + i % 2] - nearest) * w.factor);
               values[i] = path == kTiled ? __fmaf_rn(expf(values[i] - largest), of_logits, label * of_labels) : 0.0f;
             }
           } else {
#pragma unroll
             for (int i = 0; i < 16; ++i) values[i] = expf((h[i / 2][2 * r + i % 2] - nearest) * w.factor) * of_labels;
           }
           store_gradient<kType>(tables.row[place].gradient, k, num_codes, values);
         }
       });
  __syncthreads();
  // The gradient of listed codes.
  for (int i = 0; i < kOwnRows; ++i) {
    const int place = first_own_row() + i;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (lane >= tables.corrected[c][place]) continue;
      const Candidate mine = list_at(w, place, c)[lane];
      if (mine.code >= 0) store<kType>(tables.row[place].gradient, mine.code, mine.value);
    }
  }
}

// weight[0] times the sum of all losses, in a fixed order.
__global__ void __launch_bounds__(kThreads)
    add_losses(const float* losses, int64_t count, const float* weight, float* total) {
  CU_SHARED(double, of_warps, [kWarps]);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += double(losses[i]);
  sum = sum_of_warp(sum);
  if (lane_of_warp() == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += of_warps[warp];
  *total = float(sum * (weight == nullptr ? 1.0 : double(weight[0])));
}

}  // namespace soft_label
}  // namespace rqk
