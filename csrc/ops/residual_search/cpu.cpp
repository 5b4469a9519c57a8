// Residual search on the CPU: threads, scratch memory and the loop over depths around cpu_simd.cpp.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/cpu_capability.h"
#include "common/tensors.h"
#include "ops/residual_search/codebook_cache.h"
#include "ops/residual_search/kernel_table.h"
#include "ops/residual_search/packed_codebook.h"
#include "ops/residual_search/params.h"
#include "shared/codebooks.h"
#include "shared/residual_rows.h"

namespace rqk {
namespace {

// Row tiles per chunk of a thread: enough that a panel read from memory is used many times, few enough that the chunk
// stays in L2 (96 rows of 256 channels are 96 KiB).
constexpr int64_t kTilesPerChunk = 8;
// Rows that a thread advances alternately by their scores, so that the products of one are prefetched while the other
// is processed.
constexpr int64_t kRowsInTurn = 2;
// A scan costs about as much as evaluating num_codes / kScanInCandidates candidates.
constexpr int64_t kScanInCandidates = 80;

// Least number of elements per thread when threads share the codes of a tile: fewer would be read before the threads
// have synchronized.
constexpr int64_t kElementsPerPart = 1 << 18;
constexpr int64_t kMostParts = 64;

// Decides whether to try the int8 scan at a depth: not if it has left most rows to the float scan so far.
class Int8ScanHeuristic {
 public:
  bool operator()() const { return tried_ < kEnough || 2 * left_ < tried_; }
  void record(int64_t tried, int64_t left) {
    tried_ += tried;
    left_ += left;
  }

 private:
  static constexpr int64_t kEnough = 48;
  std::atomic<int64_t> tried_{0}, left_{0};
};

// Scratch of one thread, for `rows` rows at a time.
struct Workspace {
  Workspace(const ResidualSearchKernels& kernels, const PackedCodebooks& codebooks, int64_t rows, int64_t channels)
      : residuals(rows * channels),
        squared(rows),
        codes(rows),
        scratch(static_cast<int64_t>(kernels.scratch_bytes(rows, channels))) {
    if (!codebooks.gram()) return;
    for (Buffer<int64_t>* part : {&row, &depth, &left}) *part = Buffer<int64_t>(rows);
    left_residuals = Buffer<float>(rows * channels);
    left_squared = Buffer<double>(rows);
    score_rows = Buffer<ScoreRow>(rows);
    // A cache line more than needed: rows a power of two apart would map to the same cache sets.
    const int64_t size = divide_up(codebooks.scores_per_row(), 32) * 32 + 32;
    scores = Buffer<int16_t>(rows * size);
    for (int64_t i = 0; i < rows; ++i) score_rows[i].scores = scores + i * size;
  }

  Buffer<float> residuals;
  Buffer<double> squared;
  Buffer<int64_t> codes;
  Buffer<char> scratch;
  // With Gram rows:
  Buffer<int64_t> row;    // the rows in progress
  Buffer<int64_t> depth;  // how many of their codes are known
  Buffer<ScoreRow> score_rows;
  Buffer<int16_t> scores;
  Buffer<int64_t> left;  // those of them that need the float scan
  Buffer<float> left_residuals;
  Buffer<double> left_squared;
};

class Search {
 public:
  Search(const ResidualSearchParams& p, const ResidualSearchKernels& kernels, const PackedCodebooks& codebooks,
         int64_t chunk)
      : p_(p), kernels_(kernels), codebooks_(codebooks), chunk_(chunk), int8_pays_(static_cast<size_t>(p.depth)) {}

  // Runs one thread. Chunks are handed out dynamically, since some rows take longer than others.
  void work(Workspace& at) {
    if (codebooks_.gram()) {
      by_scores(at);
      return;
    }
    for (int64_t begin = next_.fetch_add(chunk_); begin < p_.rows; begin = next_.fetch_add(chunk_)) {
      by_scans(at, begin, std::min(begin + chunk_, p_.rows));
    }
  }

  // Searches all rows at once if there are too few to give each thread a tile: at every depth, threads share the codes
  // of each tile. `groups`: for each tile of rows one workspace per share; the first of them holds the rows.
  void by_parts(std::vector<std::vector<Workspace>>& groups) {
    const int64_t tiles = static_cast<int64_t>(groups.size()), parts = static_cast<int64_t>(groups[0].size());
    auto rows_of = [this](int64_t tile) { return std::min<int64_t>(chunk_, p_.rows - tile * chunk_); };
    for (int64_t t = 0; t < tiles; ++t) {
      Workspace& at = groups[t][0];
      for (int64_t i = 0; i < rows_of(t); ++i) {
        at.squared[i] = begin_row(t * chunk_ + i, at.residuals + i * p_.channels);
      }
    }
    for (int64_t d = 0; d < p_.depth; ++d) {
      const bool try_int8 = int8_pays_[d]();
      if (try_int8) {
        for_each_task(tiles * parts, [&](int64_t task) {
          const int64_t tile = task / parts, part = task % parts;
          const Workspace& at = groups[tile][0];
          kernels_.scan_part(codebooks_.at(d), at.residuals, at.squared, rows_of(tile), part, parts,
                             groups[tile][part].scratch);
        });
      }
      for_each_task(tiles, [&](int64_t tile) {
        Workspace& at = groups[tile][0];
        if (try_int8) {
          std::array<void*, kMostParts> scratches;
          for (int64_t part = 0; part < parts; ++part) scratches[part] = groups[tile][part].scratch;
          decide(at, d, rows_of(tile), scratches.data(), parts);
        } else {
          kernels_.nearest(codebooks_.with_float_panels(d), at.residuals, at.squared, rows_of(tile), at.scratch,
                           at.codes);
        }
        take_all(at, tile * chunk_, d, rows_of(tile));
      });
    }
  }

 private:
  double begin_row(int64_t row, float* residual) const {
    return rqk::begin_row(p_, row, residual, kernels_.squared_norm);
  }
  double take(int64_t row, int64_t depth, int64_t code, float* residual) const {
    return take_code(p_, row, depth, code, codebooks_.at(depth).codes_kc, residual, kernels_.squared_norm);
  }

  // Searches rows [begin, end), with one scan per depth.
  void by_scans(Workspace& at, int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    for (int64_t i = 0; i < rows; ++i) at.squared[i] = begin_row(begin + i, at.residuals + i * p_.channels);
    for (int64_t d = 0; d < p_.depth; ++d) {
      if (codebooks_.int8() && int8_pays_[d]()) {
        void* scratch = at.scratch;
        kernels_.scan_part(codebooks_.at(d), at.residuals, at.squared, rows, 0, 1, scratch);
        decide(at, d, rows, &scratch, 1);
      } else {
        kernels_.nearest(codebooks_.with_float_panels(d), at.residuals, at.squared, rows, at.scratch, at.codes);
      }
      take_all(at, begin, d, rows);
    }
  }

  void decide(Workspace& at, int64_t depth, int64_t rows, void* const* scratches, int64_t parts) {
    const int64_t left =
        kernels_.decide_parts(codebooks_.at(depth), at.residuals, at.squared, rows, scratches, parts, at.codes);
    int8_pays_[depth].record(rows, left);
  }

  void take_all(Workspace& at, int64_t begin, int64_t depth, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      at.squared[i] = take(begin + i, depth, at.codes[i], at.residuals + i * p_.channels);
    }
  }

  // Searches rows by Gram scores. A scan computes the scores of all rows in progress; each row then advances through
  // further depths as long as its scores suffice. Unfinished rows join new rows in the next scan.
  void by_scores(Workspace& at) {
    for (int64_t count = 0;;) {
      const int64_t begin = next_.fetch_add(chunk_ - count), end = std::min(begin + chunk_ - count, p_.rows);
      for (int64_t row = begin; row < end; ++row, ++count) {
        at.row[count] = row;
        at.depth[count] = 0;
        at.squared[count] = begin_row(row, at.residuals + count * p_.channels);
      }
      if (count == 0) return;
      const bool try_scores = int8_pays_[0]();
      if (try_scores)
        kernels_.scan_scores(codebooks_.at(0), at.residuals, at.squared, count, at.scratch, at.score_rows);
      const int64_t left = try_scores ? follow_scores(at, count) : all(at, count);
      // Rows that are not finite do not count against the scan.
      const int64_t finite =
          std::count_if(at.left + 0, at.left + left, [&at](int64_t i) { return std::isfinite(at.squared[i]); });
      if (try_scores) int8_pays_[0].record(count, finite);
      without_scores(at, left);
      count = keep_unfinished(at, count);
    }
  }

  static int64_t all(Workspace& at, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at.left[i] = i;
    return count;
  }

  // Advances rows by their scores. Stores in at.left the rows that even a fresh scan could not decide; returns their
  // number.
  int64_t follow_scores(Workspace& at, int64_t count) {
    int64_t turn[kRowsInTurn], in_turn = 0, entered = 0, left = 0;
    for (;;) {
      while (in_turn < kRowsInTurn && entered < count) turn[in_turn++] = entered++;
      if (in_turn == 0) return left;
      for (int64_t j = 0; j < in_turn;) {
        const int64_t i = turn[j], next = at.score_rows[turn[(j + 1) % in_turn]].taken;
        const bool fresh = at.score_rows[i].taken < 0;
        const int8_t* ahead = next < 0 ? nullptr : codebooks_.gram_row(next);
        const bool found = step(at, i, ahead);
        if (!found && fresh) at.left[left++] = i;
        const bool goes_on =
            found && at.depth[i] < p_.depth && at.score_rows[i].decided * kScanInCandidates <= p_.num_codes;
        if (goes_on) {
          ++j;
        } else {
          turn[j] = turn[--in_turn];
        }
      }
    }
  }

  // Advances one row by one depth. Returns false if its scores do not decide the code.
  bool step(Workspace& at, int64_t i, const int8_t* ahead) {
    ScoreRow& scores = at.score_rows[i];
    float* residual = at.residuals + i * p_.channels;
    const int64_t code = kernels_.nearest_by_scores(codebooks_.at(0), residual, at.squared[i], scores, ahead);
    if (code < 0) return false;
    at.squared[i] = take(at.row[i], at.depth[i]++, code, residual);
    scores.taken = code;
    return true;
  }

  // Advances the first `left` rows of at.left by one depth, by the float scan.
  void without_scores(Workspace& at, int64_t left) {
    if (left == 0) return;
    for (int64_t j = 0; j < left; ++j) copy_residual(at, at.left[j], at.left_residuals, at.left_squared, j);
    kernels_.nearest(codebooks_.with_float_panels(0), at.left_residuals, at.left_squared, left, at.scratch, at.codes);
    for (int64_t j = 0; j < left; ++j) {
      const int64_t i = at.left[j];
      at.squared[i] = take(at.row[i], at.depth[i]++, at.codes[j], at.residuals + i * p_.channels);
    }
  }

  // Moves unfinished rows to the front and returns their number.
  int64_t keep_unfinished(Workspace& at, int64_t count) const {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (at.depth[i] == p_.depth) continue;
      if (kept < i) {
        copy_residual(at, i, at.residuals, at.squared, kept);
        at.row[kept] = at.row[i];
        at.depth[kept] = at.depth[i];
      }
      ++kept;
    }
    return kept;
  }

  void copy_residual(Workspace& at, int64_t from, float* residuals, double* squared, int64_t to) const {
    std::copy(at.residuals + from * p_.channels, at.residuals + (from + 1) * p_.channels, residuals + to * p_.channels);
    squared[to] = at.squared[from];
  }

  const ResidualSearchParams& p_;
  const ResidualSearchKernels& kernels_;
  const PackedCodebooks& codebooks_;
  const int64_t chunk_;
  std::vector<Int8ScanHeuristic> int8_pays_;
  std::atomic<int64_t> next_{0};
};

// Number of shares of the codes per tile of rows, if `threads` threads per tile are available.
int64_t parts_of_codes(const ResidualSearchKernels& kernels, const PackedCodebooks& codebooks,
                       const ResidualSearchParams& p, int64_t threads) {
  if (!codebooks.int8() || codebooks.gram()) return 1;
  return std::min(
      {threads, kMostParts, p.num_codes / kernels.codes_per_block, p.num_codes * p.channels / kElementsPerPart});
}

}  // namespace

void launch(const ResidualSearchParams& p, void*) {
  const ResidualSearchKernels& kernels = RQK_KERNEL_TABLE(residual_search_kernels);
  PackedCodebooks opened(kernels, p.num_codes, p.channels);
  CodebookCache::Codebooks packed;
  if (p.packed != nullptr) {
    if (!opened.open(p.packed, p.packed_bytes, p.codebooks)) {
      value_error("residual_search: packed was not made of this codebook on this machine");
    }
  } else {
    const int64_t count = p.codebook_stride == 0 ? 1 : p.depth;
    packed = CodebookCache::of_this_process().pack(kernels, p.codebooks, count, p.num_codes, p.channels);
    if (packed == nullptr) {
      refuse_not_finite("residual_search", "codebooks", p.codebooks, count, p.num_codes, p.channels,
                        p.codebook_stride > 0);
    }
  }
  if (p.rows == 0) return;
  const PackedCodebooks& codebooks = packed != nullptr ? packed->packed : opened;
  // Small batches use smaller chunks, so that every thread has some rows.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t tiles_per_chunk =
      std::clamp<int64_t>(divide_up(divide_up(p.rows, threads), kernels.row_tile), 1, kTilesPerChunk);
  const int64_t chunk = tiles_per_chunk * kernels.row_tile;
  // Allocate here: an exception inside parallel_for would lose its message. Each worker owns one slot.
  const int64_t slots = std::min(threads, divide_up(p.rows, chunk));
  const int64_t parts = parts_of_codes(kernels, codebooks, p, threads / slots);
  if (parts > 1) {
    std::vector<std::vector<Workspace>> groups(static_cast<size_t>(slots));
    for (auto& group : groups) {
      for (int64_t part = 0; part < parts; ++part) group.emplace_back(kernels, codebooks, chunk, p.channels);
    }
    Search(p, kernels, codebooks, chunk).by_parts(groups);
    return;
  }
  std::vector<Workspace> workspaces;
  for (int64_t i = 0; i < slots; ++i) workspaces.emplace_back(kernels, codebooks, chunk, p.channels);
  Search search(p, kernels, codebooks, chunk);
  for_each_task(slots, [&](int64_t slot) { search.work(workspaces[slot]); });
}

void pack_codebook(const float* codebook, int64_t num_codes, int64_t channels,
                   const std::function<uint8_t*(int64_t bytes)>& allocate) {
  PackedCodebooks codebooks(RQK_KERNEL_TABLE(residual_search_kernels), num_codes, channels);
  if (!codebooks.measure(codebook, 1))
    refuse_not_finite("PackedCodebook", "codebook", codebook, 1, num_codes, channels, false);
  codebooks.set_gram(codebooks.gram_pays());
  codebooks.fill(allocate(codebooks.bytes()));
}

bool packed_has_gram(const uint8_t* packed, int64_t bytes) { return PackedCodebooks::has_gram(packed, bytes); }

CodebookCacheState codebook_cache_state() { return CodebookCache::of_this_process().state(); }

}  // namespace rqk
