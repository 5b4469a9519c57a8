// Soft labels on a GPU: a block takes 64 rows through all codes, 128 at a time; Q is never in memory.
//
//   Q_k = softmax_k(-|x - e_k|^2 / tau) = softmax_k(2 h_k / tau),  h_k = <x - m, e_k - m> - |e_k - m|^2 / 2
//
//   tiles.cuh    half scores h by tensor cores, and the bound E of their error; the codebooks in two parts of float16
//   direct.cuh   the direct way, for rows that they cannot serve
//   row.cuh, logit_dtypes.cuh, plan.h   a row's pointers; logits of each type; tile shapes and the workspace
//
//   first pass   nearest code, largest logit and the sums below them, online: a sum is scaled where its reference
//                moves. Terms of sum_k Q_k (logit_k - largest) are never positive, so that moving that reference adds
//                numbers of one sign: nothing cancels there either. Codes that may need float64 (below) are listed.
//   settle       the two columns of warps are added up, listed codes evaluated, the loss written.
//   second pass  half scores once more, from the last tile to the first, and the gradient (or Q) is written; then that
//                of listed codes. An element is read and written by the same thread, so that the gradient may take the
//                place of the logits.
// Sums are float32 over a warp's 64 codes of a tile and float64 over tiles, in an order that K alone decides: a row's
// result depends on nothing but the row.
//
// What limits it, for N rows of K codes. Per element and pass there are 6 C operations of the matrix unit, fed by 5
// C/16 bytes of shared memory, of which 4 C / 64 bytes of codes come from L2, and some 25 instructions elsewhere, two
// of them exponentials; the logits are read once per pass and the gradient is written once. By an H100's data
// sheet, 1.7 GHz (mma.sync at two thirds of the 990 TFLOP/s that wgmma reaches; 128 bytes of shared memory and 4
// instructions of warps per clock and multiprocessor; 5.5 TB/s of L2 and 3 TB/s of memory), N K = 2^28, both passes:
//                      matrix unit  shared memory  L2       instructions  memory: logits read once / twice
//   C = 256, float32   1.3 ms       1.5 ms         1.6 ms   0.5 ms        0.7 / 1.1 ms
//            bfloat16                                                     0.4 / 0.5 ms
//   C =  32, float32   0.2 ms       0.2 ms         0.2 ms   0.5 ms        0.7 / 1.1 ms
//            bfloat16                                                     0.4 / 0.5 ms
// At C = 256 three units of the products are about even, and a second read of the logits hides behind them. At C = 32
// memory is the limit, or with bfloat16 as good as the instructions. There 264 blocks of 64 rows of 4096 codes have 138
// MB of bfloat16 logits in flight (twice that in float32), for 50 MB of L2. To keep a row's logits on chip a block
// could hold 8 rows or so, and their codes would cost 4 C / 8 bytes of L2 per element and pass, for 2 or 4 bytes of
// memory saved once; many small launches over fewer rows would each fill and drain the device in as long as they run.
// So the second pass goes backwards: what was read last is read first, and L2 serves what it still has. 128 rows to a
// block would halve the reads of the codes, but leave one block per multiprocessor at C = 256, whose exponentials then
// wait for its products; two blocks hide each other's. None of this has been measured.
//
// Refining. A difference of two half scores is off by 2 E, an exponent by 4 E / tau. Where that is at most
// kNeverRefine, the half scores serve as they are. Above, codes that could have the most of Q get their exponents from
// distances in the definition's float64: a code with h_k < max h - 2 E - r tau / 2 has Q_k < e^-r of the largest and
// stays out.
//   4 E / tau > kAlwaysRefine    r = 40: Q beyond is nothing, and the sums are those of the listed codes. As tau -> 0,
//   Q tends
//                        to the certified code. Where a list overflows, the row goes the direct way.
//   above kNeverRefine        r = 12, and the sums are corrected. Where a list overflows (more than kCapacity codes of
//   a
//                        column), the half scores serve after all: rounding errors have signs and stay far below their
//                        bound, and a Q of that many codes averages them.
// A list is filled with what comes within reach of the largest h so far, and weeded where it is full.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "ops/soft_label/direct.cuh"
#include "ops/soft_label/tiles.cuh"

namespace rqk {
namespace soft_label {

// Per multiprocessor. What ptxas makes of sm_100 and later does not fit into the 128 registers of two: it spills a few
// numbers around the scans.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksAtOnce = 1;
#else
constexpr int kBlocksAtOnce = 2;
#endif

constexpr double kAlwaysRefine = 1.0 / 16, kNeverRefine = 1.0 / 4096;

enum RowPath : int32_t { kAbsent, kMasked, kTiled, kDirect };

// What a column of warps has seen of a row. Sums are of exponentials below the references.
struct Sums {
  float nearest, largest;          // the references: the largest half score and logit
  double labels, logits, product;  // product: of label and logit less the largest
  int32_t listed, unused;          // candidates; -1: more than the list holds
};

// A block's rows, in shared memory.
struct RowTables {
  int64_t codebook, first;  // whose rows they are, and the first of them
  PackedCodes codes;        // of that codebook
  Row row[kTileRows];
  RowPath path[kTileRows];
  float scale[kTileRows];  // of its parts
  float error[kTileRows];  // 4 E / tau
  float reach[kTileRows];  // a code this far below the largest half score needs no look; -inf: none does
  Sums sums[kColumns][kTileRows];
  // What the second pass needs.
  RowPath decided[kTileRows];
  int32_t corrected[kColumns][kTileRows];  // candidates
  float nearest[kTileRows], largest[kTileRows], label_factor[kTileRows], logit_factor[kTileRows];
};
static_assert(sizeof(RowTables) <= kSharedTables);

// The rows that a warp sets, settles and corrects; in a scan it has others.
constexpr int kOwnRows = kTileRows / kWarps;
__device__ inline int first_own_row() { return threadIdx.x / 32 * kOwnRows; }

// Folds a thread's values of its two rows over the four threads that share them; a lane gets that of row lane % 2.
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
// The other way round: what lane r of the four has.
template <class T>
__device__ inline T of_row(T value, int r) {
  return __shfl_sync(kFullWarp, value, r, 4);
}

// The rows of a tile: pointers, their way, and their parts.
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

// A column's list of a row of the block's.
__device__ inline Candidate* list_at(const Work& w, int place, int column) {
  return w.candidates + ((int64_t(blockIdx.x) * kTileRows + place) * kColumns + column) * kCapacity;
}

// Writes codes within reach of the warp's rows down. marks[r]: bit 2 n + b for h[n][2 r + b]; `lists` begins with that
// of the warp's first row; floor and listed are those of row lane % 2 of the quad. By the whole warp.
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
      int place = own;  // and of the lanes before it
      for (int lanes_up = 1; lanes_up < 4; lanes_up *= 2) {
        const int before = __shfl_up_sync(kFullWarp, place, lanes_up, 4);
        place += lane % 4 >= lanes_up ? before : 0;
      }
      const int added = __shfl_sync(kFullWarp, place, 4 * from + 3);
      int count = __shfl_sync(kFullWarp, listed, 4 * from + r);
      if (count + added > kCapacity) {
        const float least = __shfl_sync(kFullWarp, floor, 4 * from + r);
        // Other lanes wrote some, before a tile's barrier: here each list is met once per tile.
        const Candidate old = lane < count ? list[lane] : Candidate{};
        const bool is_kept = lane < count && old.value >= least;
        const unsigned kept = __ballot_sync(kFullWarp, is_kept);
        __syncwarp();  // all have read theirs
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

// Two columns' sums as one.
__device__ inline Sums add_columns(const Sums& a, const Sums& b, float factor) {
  const float inf = __int_as_float(0x7f800000);
  Sums all{max(a.nearest, b.nearest), max(a.largest, b.largest), 0, 0, 0, 0, 0};
  for (const Sums& part : {a, b}) {
    if (!(part.nearest > -inf)) continue;  // it had no codes
    const double scale = expf((part.nearest - all.nearest) * factor);
    all.labels += scale * part.labels;
    all.product += scale * (part.product - (double(all.largest) - double(part.largest)) * part.labels);
    all.logits += double(expf(part.largest - all.largest)) * part.logits;
  }
  return all;
}

// What a block's rows come to, from their sums and lists: losses, and what the second pass needs. Candidates' values
// become the gradient there. A warp settles the rows that it has set, one after another.
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
    // A label that could count stands at a logit of -inf, or so far down, or something is NaN.
    const bool is_odd = kLoss && !(fabs(all.product) < double(inf));
    const bool is_listed = error > kNeverRefine && left.listed >= 0 && right.listed >= 0;
    const bool is_direct = tables.path[place] == kDirect || (is_tiled && (is_odd || (is_all && !is_listed)));
    const bool is_refined = is_tiled && is_listed && !is_direct;

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

// A thread's logits of a row: values[i] is that of code k + 8 (i / 2) + i % 2, -inf past the last.
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

// The same in the other direction.
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

// Cross-entropy, or with kLoss false Q alone, which is then what `gradient` points to.
template <FloatType kType, bool kLoss>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) label_rows(SoftLabelCrossEntropyParams p, Work w) {
  CU_DYN_SMEM(uint8_t, parts);  // of the rows: (chunks, kTileRows, kVectorBytes); then the ring
  CU_SHARED(RowTables, tables);
  const float inf = __int_as_float(0x7f800000);
  const int lane = lane_of_warp();
  const int seen_row = first_row_of_warp() + lane / 4;  // in a scan: this one and the eighth after it
  const int kept_row = seen_row + lane % 2 * 8;         // whose sums this lane keeps
  const unsigned num_codes = unsigned(p.labels.num_codes);
  uint8_t* ring = parts + w.chunks * kTileRows * kVectorBytes;

  // A block's last warps may have none.
  auto has_rows = [&] { return tables.first + first_row_of_warp() < w.rows; };

  set_rows(p, w, tables, parts);
  __syncthreads();

  scan(w, tables.codes, false, has_rows() ? num_codes : 0, parts, tables.scale, ring,
       [&](unsigned k, const float (&h)[8][4]) {
         // Between tiles the sums are not in registers, which the products need. What the last two lanes of a row have
         // is never used.
         Sums sums{};
         if (lane % 4 < 2) sums = tables.sums[column_of_warp()][kept_row];
         const bool is_whole = k + kWarpCodes <= num_codes;
         auto is_code = [&](int i) { return is_whole || k + 8 * (i / 2) + i % 2 < num_codes; };
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
         // Without a list the floor is +inf, or before the first code no number.
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

         float labels[2] = {0, 0};
         [[maybe_unused]] float exponentials[2] = {0, 0}, product[2] = {0, 0};
    // A row's logits after the other's: those of both would not fit into the registers.
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
  // No barrier: what was settled is read after the scan's own.

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

// weight[0] times the sum of all losses, always in the same order.
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
