// Launches of code_statistics on the current stream.
#include <utility>

#include "common/launch.cuh"
#include "ops/code_statistics/kernel.cuh"

namespace rqk {
namespace code_statistics {
namespace {

constexpr const char* kOp = "code_statistics";
constexpr int64_t kAlignment = 256;

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Assigns the parts of the workspace and returns their total size in bytes.
int64_t lay_out(const CodeStatisticsParams& p, Workspace& w) {
  w.items = p.rows * p.depth;
  w.keys = p.codebooks * p.num_codes;
  if (w.items >= UINT32_MAX || w.keys >= UINT32_MAX) {
    throw std::invalid_argument("code_statistics: on CUDA rows and codes must each number at most 2^32 - 2, got " +
                                std::to_string(w.items) + " and " + std::to_string(w.keys));
  }
  w.windows = (w.items + kRowsPerPiece - 1) / kRowsPerPiece;
  const int64_t tiles = std::max<int64_t>(1, (w.items + kTile - 1) / kTile);
  const int64_t most_chunks = grid_for(std::min<int64_t>(tiles, kMaxChunks));
  w.items_per_chunk = (tiles + most_chunks - 1) / most_chunks * kTile;
  w.chunks = static_cast<int>((tiles * kTile + w.items_per_chunk - 1) / w.items_per_chunk);

  int64_t bytes = 0;
  auto take = [&bytes, &p](auto*& part, int64_t count) {
    using T = std::remove_reference_t<decltype(*part)>;
    part = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p.workspace) + static_cast<uintptr_t>(bytes));
    bytes += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  };
  take(w.keys_in, w.items);
  take(w.items_in, w.items);
  take(w.keys_out, w.items);
  take(w.items_out, w.items);
  take(w.places, int64_t{kDigits} * w.chunks);
  take(w.totals, kDigits);
  take(w.bad_in_chunk, w.chunks);
  take(w.valid, 1);
  take(w.bad, 1);
  take(w.begin, w.keys + 1);
  take(w.pieces, 2 * w.windows * p.channels);
  return bytes;
}

// Launches a kernel that divides its work by Share.
void launch_shared_out(void (*kernel)(CodeStatisticsParams, Workspace, int), int64_t units, int64_t columns,
                       void* stream, const CodeStatisticsParams& p, const Workspace& w) {
  int log_columns = 0;
  while ((1 << log_columns) < std::min<int64_t>(columns, kThreads)) ++log_columns;
  const int64_t side_by_side = int64_t{1} << log_columns;
  const dim3 grid(grid_for(blocks_for(units * side_by_side)),
                  static_cast<unsigned>((columns + side_by_side - 1) / side_by_side));
  launch_kernel(kOp, kernel, grid, kThreads, 0, stream, p, w, log_columns);
}

}  // namespace
}  // namespace code_statistics

int64_t workspace_bytes(const CodeStatisticsParams& p) {
  code_statistics::Workspace w{};
  return code_statistics::lay_out(p, w);
}

void launch(const CodeStatisticsParams& p, void* stream) {
  using namespace code_statistics;
  Workspace w{};
  lay_out(p, w);
  do {
    launch_kernel(kOp, count_digits, w.chunks, kThreads, 0, stream, p, w);
    launch_kernel(kOp, scan_chunks, kDigits / kWarps, kThreads, 0, stream, w);
    launch_kernel(kOp, place_items, w.chunks, kThreads, 0, stream, p, w);
    std::swap(w.keys_in, w.keys_out);
    std::swap(w.items_in, w.items_out);
    ++w.pass;
  } while ((w.keys - 1) >> (w.pass * kDigitBits) > 0);

  launch_kernel(kOp, find_segments, grid_for(blocks_for(w.keys + 1)), kThreads, 0, stream, w);
  const bool fours = p.channels % 4 == 0 && p.x_row_stride % 4 == 0 && p.x_depth_stride % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(p.x) % sizeof(float4) == 0;
  launch_shared_out(fours ? add_rows<4> : add_rows<1>, 2 * w.windows + w.keys, fours ? p.channels / 4 : p.channels,
                    stream, p, w);
  launch_shared_out(add_pieces, w.windows, p.channels, stream, p, w);
}

}  // namespace rqk
