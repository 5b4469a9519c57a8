// Depth attention on a CPU, compiled once per instruction set.
//
// A head of a stack has at most 32 rows: it fits L1, and it is too small for GEMM tiles. So each head goes from q, k
// and v to its result in one piece:
//   products  tiles of kGroups queries x 4 keys, one accumulator per pair, along the channels; reduce_add_each() then
//             folds them into one vector with a lane per pair
//   softmax   on such vectors: the keys of a query are four lanes of each of its tiles, so maximum and sum take two
//             shuffles for all queries of the tile
//   combine   kGroups rows of a result in registers; each row of v (or k, q, grad) is read once for all of them. Masked
//             pairs are skipped, not multiplied by zero, which would turn infinity into NaN
// The backward pass recomputes the probabilities p and, with dp = grad v^T,
//   ds = scale p (dp - sum_j p dp),   dq = ds k,   dk = ds^T q,   dv = p^T grad.
// Rows are float32 in whole vectors, read in place if they are laid out so, else from a copy of one head; that copy
// handles fp16 and bf16, any head dimension and zero padding.
//
// Moves 4 rows of head_dim per depth forward and 7 backward; does 4 head_dim operations per visible pair of query and
// key forward and 10 backward. At 4 depths it is memory-bound.
#include "ops/depth_attention/kernel_table.h"
#include "ops/depth_attention/lane_groups.h"

namespace rqk {
namespace RQK_CAPABILITY {
namespace {

constexpr int kCols = 4;  // vectors of a result row at once
constexpr int kTiles = kMostDepths / 4;

struct Rows {
  const float* data;
  int64_t stride;
};

// One head in float32. width: elements of a row, whole vectors.
struct Head {
  int queries, keys, offset;  // offset: query i sees keys up to i + offset
  int64_t width;
  float scale;
  Exponents exponents;
};

// Queries by keys; masked entries are unset or zero.
using Weights = float[kMostDepths][kMostDepths];

// Lane 4 r + j: product of row a0 + r of a and row b0 + j of b; rows past the last repeat it.
[[gnu::always_inline]] inline Vec products(Rows a, int a0, int a_rows, Rows b, int b0, int b_rows, int64_t width) {
  const float *from_a[kGroups], *from_b[4];
  for (int r = 0; r < kGroups; ++r) from_a[r] = a.data + (a0 + r < a_rows ? a0 + r : a_rows - 1) * a.stride;
  for (int j = 0; j < 4; ++j) from_b[j] = b.data + (b0 + j < b_rows ? b0 + j : b_rows - 1) * b.stride;
  Vec sum[Vec::kSize];
#pragma GCC unroll 16
  for (int i = 0; i < Vec::kSize; ++i) sum[i] = Vec::zero();
  for (int64_t c = 0; c < width; c += Vec::kSize) {
    Vec of_b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) of_b[j] = Vec::load(from_b[j] + c);
#pragma GCC unroll 4
    for (int r = 0; r < kGroups; ++r) {
      const Vec of_a = Vec::load(from_a[r] + c);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[4 * r + j] = fma(of_a, of_b[j], sum[4 * r + j]);
    }
  }
  return reduce_add_each(sum);
}

// Number of key tiles that any of the kGroups queries from i0 on sees.
inline int tiles_seen(const Head& head, int i0) {
  const int last = i0 + kGroups - 1 + head.offset;
  return (last < head.keys ? last : head.keys - 1) / 4 + 1;
}

// Per lane, key index - query index within a tile.
alignas(64) constexpr float kKeyLessQuery[16] = {0, 1, 2, 3, -1, 0, 1, 2, -2, -1, 0, 1, -3, -2, -1, 0};

// a where the query sees the key, else b.
[[gnu::always_inline]] inline Vec seen_or(const Head& head, int i0, int tile, Vec a, float b) {
  const int limit = i0 + head.offset - 4 * tile;
  return limit >= 3 ? a : select_le(Vec::load(kKeyLessQuery), Vec::fill(float(limit)), a, Vec::fill(b));
}

// Probabilities of kGroups queries from i0 on.
[[gnu::always_inline]] inline void softmax(const Head& head, Rows q, Rows k, int i0, Vec (&p)[kTiles]) {
  const int tiles = tiles_seen(head, i0);
  Vec most = Vec::fill(-__builtin_inff());
  for (int t = 0; t < tiles; ++t) {
    const Vec scores = products(q, i0, head.queries, k, 4 * t, head.keys, head.width) * Vec::fill(head.exponents.sign);
    p[t] = seen_or(head, i0, t, scores, -__builtin_inff());
    most = max(most, p[t]);
  }
  most = reduce_max_groups(most);
  Vec total = Vec::zero();
  for (int t = 0; t < tiles; ++t) {
    p[t] = exp((p[t] - most) * Vec::fill(head.exponents.factor));
    total = total + p[t];
  }
  const Vec factor = Vec::fill(1) / reduce_add_groups(total);
  for (int t = 0; t < tiles; ++t) p[t] = p[t] * factor;
}

// kGroups rows of a result: the sum of weights(row, term) x[term] over the visible terms. Rows are queries from `row0`
// on and terms the keys they see; with kOfKeys, rows are keys and terms the queries that see them.
template <int V, bool kOfKeys>
[[gnu::always_inline]] inline void combine(const Head& head, const Weights& weights, int row0, Rows x, float* out,
                                           int64_t out_stride) {
  constexpr int64_t kRowStep = kOfKeys ? 1 : kMostDepths, kTermStep = kOfKeys ? kMostDepths : 1;
  const int rows = kOfKeys ? head.keys : head.queries, terms = kOfKeys ? head.queries : head.keys;
  const float* of_rows = &weights[0][0] + row0 * kRowStep;
  Vec sum[kGroups][V];
#pragma GCC unroll 4
  for (int r = 0; r < kGroups; ++r) {
    for (int v = 0; v < V; ++v) sum[r][v] = Vec::zero();
  }
  auto add = [&](int term, auto belongs) {
    const float *from = x.data + term * x.stride, *weight = of_rows + term * kTermStep;
    Vec of_x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) of_x[v] = Vec::load(from + v * Vec::kSize);
#pragma GCC unroll 4
    for (int r = 0; r < kGroups; ++r) {
      if (!belongs(r)) continue;
      const Vec factor = Vec::fill(weight[r * kRowStep]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = fma(factor, of_x[v], sum[r][v]);
    }
  };
  // Terms visible to all rows, and kGroups - 1 terms around the diagonal visible to some.
  const int all_begin = kOfKeys ? row0 - head.offset + kGroups - 1 : 0;
  const int all_end = kOfKeys ? head.queries : row0 + head.offset + 1;
  const int edge = kOfKeys ? row0 - head.offset : all_end;
  for (int term = all_begin < 0 ? 0 : all_begin; term < all_end; ++term) {
    add(term, [](int) { return true; });
  }
#pragma GCC unroll 4
  for (int s = 0; s < kGroups - 1; ++s) {
    if (edge + s < 0 || edge + s >= terms) continue;
    add(edge + s, [s](int r) { return kOfKeys ? r <= s : r > s; });
  }
#pragma GCC unroll 4
  for (int r = 0; r < kGroups; ++r) {
    if (row0 + r >= rows) break;
    for (int v = 0; v < V; ++v) sum[r][v].store(out + (row0 + r) * out_stride + v * Vec::kSize);
  }
}

template <bool kOfKeys>
[[gnu::always_inline]] inline void combine_rows(const Head& head, const Weights& weights, int row0, Rows x, float* out,
                                                int64_t out_stride) {
  int64_t c = 0;
  for (; c + kCols * Vec::kSize <= head.width; c += kCols * Vec::kSize) {
    combine<kCols, kOfKeys>(head, weights, row0, {x.data + c, x.stride}, out + c, out_stride);
  }
  for (; c < head.width; c += Vec::kSize) {
    combine<1, kOfKeys>(head, weights, row0, {x.data + c, x.stride}, out + c, out_stride);
  }
}

void attend(const Head& head, Rows q, Rows k, Rows v, float* out, int64_t out_stride) {
  Weights p;
  for (int i = 0; i < head.queries; i += kGroups) {
    Vec tiles[kTiles];
    softmax(head, q, k, i, tiles);
    for (int t = 0; t < tiles_seen(head, i); ++t) store_groups(tiles[t], &p[i][4 * t], kMostDepths);
    combine_rows<false>(head, p, i, v, out, out_stride);
  }
}

struct Gradients {
  float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
};

void attend_backward(const Head& head, Rows q, Rows k, Rows v, Rows grad, const Gradients& to) {
  Weights p, ds;
  for (int i = 0; i < head.queries; i += kGroups) {
    Vec of_p[kTiles], of_dp[kTiles], total = Vec::zero();
    softmax(head, q, k, i, of_p);
    const int tiles = tiles_seen(head, i);
    for (int t = 0; t < tiles; ++t) {
      const Vec dp = products(grad, i, head.queries, v, 4 * t, head.keys, head.width);
      of_dp[t] = seen_or(head, i, t, dp, 0);
      total = fma(of_p[t], of_dp[t], total);
    }
    total = reduce_add_groups(total);
    for (int t = 0; t < tiles; ++t) {
      store_groups(of_p[t], &p[i][4 * t], kMostDepths);
      store_groups(of_p[t] * (of_dp[t] - total) * Vec::fill(head.scale), &ds[i][4 * t], kMostDepths);
    }
    combine_rows<false>(head, ds, i, k, to.q, to.q_stride);
  }
  for (int j = 0; j < head.keys; j += kGroups) {
    combine_rows<true>(head, ds, j, q, to.k, to.k_stride);
    combine_rows<true>(head, p, j, grad, to.v, to.v_stride);
  }
}

// --- heads in float32 ------------------------------------------------------------------------------------

inline int64_t whole_vectors(int64_t head_dim) { return (head_dim + Vec::kSize - 1) / Vec::kSize * Vec::kSize; }

inline bool is_direct(const DepthAttentionParams& p) {
  return p.type == FloatType::kFloat32 && p.head_dim % Vec::kSize == 0;
}

inline Head head_of(const DepthAttentionParams& p) {
  return {.queries = p.queries,
          .keys = p.keys,
          .offset = p.keys - p.queries,
          .width = whole_vectors(p.head_dim),
          .scale = p.scale,
          .exponents = exponents_of(p.scale)};
}

template <class F, class T>
inline auto* rows_of(const HeadRows<T>& all, int64_t stack, int64_t head) {
  // Const rows have const elements.
  using Element = decltype(static_cast<typename F::T*>(nullptr));
  const int64_t first = stack * all.stack_stride + head * all.head_stride;
  if constexpr (__is_same(T, const void)) {
    return static_cast<const typename F::T*>(all.data) + first;
  } else {
    return static_cast<Element>(all.data) + first;
  }
}

// Scratch memory, used from the front.
struct Scratch {
  float* free;
  float* take(int64_t floats) {
    float* taken = free;
    free += floats;
    return taken;
  }
};

template <class F, bool kDirect>
inline Rows read(const DepthAttentionParams& p, const HeadsIn& all, int64_t stack, int64_t head, int rows,
                 Scratch& scratch) {
  const auto* from = rows_of<F>(all, stack, head);
  if constexpr (kDirect) {
    return {from, all.row_stride};
  } else {
    const int64_t width = whole_vectors(p.head_dim), whole = p.head_dim / Vec::kSize * Vec::kSize;
    float* to = scratch.take(rows * width);
    for (int i = 0; i < rows; ++i, from += all.row_stride) {
      for (int64_t c = 0; c < whole; c += Vec::kSize) F::load(from + c).store(to + i * width + c);
      if (whole < width) load_partial<F>(from + whole, p.head_dim - whole, 0).store(to + i * width + whole);
    }
    return {to, width};
  }
}

// The rows of a result: written in place, or to scratch memory and converted by finish().
template <class F, bool kDirect>
struct Result {
  const HeadsOut& all;
  typename F::T* to;
  float* rows;
  int64_t stride;

  Result(const DepthAttentionParams& p, const HeadsOut& all, int64_t stack, int64_t head, int count, Scratch& scratch)
      : all(all), to(rows_of<F>(all, stack, head)) {
    if constexpr (kDirect) {
      rows = to;
      stride = all.row_stride;
    } else {
      stride = whole_vectors(p.head_dim);
      rows = scratch.take(count * stride);
    }
  }

  void finish(const DepthAttentionParams& p, int count) const {
    if constexpr (!kDirect) {
      const int64_t whole = p.head_dim / Vec::kSize * Vec::kSize;
      for (int i = 0; i < count; ++i) {
        typename F::T* row = to + i * all.row_stride;
        for (int64_t c = 0; c < whole; c += Vec::kSize) F::store(Vec::load(rows + i * stride + c), row + c);
        if (whole < stride) store_partial<F>(Vec::load(rows + i * stride + whole), row + whole, p.head_dim - whole);
      }
    }
  }
};

template <class F, bool kDirect>
void forward_of(const DepthAttentionParams& p, int64_t begin, int64_t end, float* memory) {
  const Head head = head_of(p);
  int64_t n = begin / p.heads, h = begin % p.heads;
  for (int64_t i = begin; i < end; ++i) {
    Scratch scratch{memory};
    const Rows q = read<F, kDirect>(p, p.q, n, h, p.queries, scratch);
    const Rows k = read<F, kDirect>(p, p.k, n, h, p.keys, scratch);
    const Rows v = read<F, kDirect>(p, p.v, n, h, p.keys, scratch);
    const Result<F, kDirect> out(p, p.out, n, h, p.queries, scratch);
    attend(head, q, k, v, out.rows, out.stride);
    out.finish(p, p.queries);
    if (++h == p.heads) {
      h = 0;
      ++n;
    }
  }
}

template <class F, bool kDirect>
void backward_of(const DepthAttentionBackwardParams& b, int64_t begin, int64_t end, float* memory) {
  const DepthAttentionParams& p = b.forward;
  const Head head = head_of(p);
  int64_t n = begin / p.heads, h = begin % p.heads;
  for (int64_t i = begin; i < end; ++i) {
    Scratch scratch{memory};
    const Rows q = read<F, kDirect>(p, p.q, n, h, p.queries, scratch);
    const Rows k = read<F, kDirect>(p, p.k, n, h, p.keys, scratch);
    const Rows v = read<F, kDirect>(p, p.v, n, h, p.keys, scratch);
    const Rows grad = read<F, kDirect>(p, b.grad, n, h, p.queries, scratch);
    const Result<F, kDirect> dq(p, b.grad_q, n, h, p.queries, scratch), dk(p, b.grad_k, n, h, p.keys, scratch),
        dv(p, b.grad_v, n, h, p.keys, scratch);
    attend_backward(head, q, k, v, grad,
                    {.q = dq.rows,
                     .k = dk.rows,
                     .v = dv.rows,
                     .q_stride = dq.stride,
                     .k_stride = dk.stride,
                     .v_stride = dv.stride});
    dq.finish(p, p.queries);
    dk.finish(p, p.keys);
    dv.finish(p, p.keys);
    if (++h == p.heads) {
      h = 0;
      ++n;
    }
  }
}

int64_t scratch(const DepthAttentionParams& p, bool backward) {
  if (is_direct(p)) return 0;
  const int64_t rows = backward ? 3 * p.queries + 4 * p.keys : 2 * p.queries + 2 * p.keys;
  return rows * whole_vectors(p.head_dim);
}

void forward(const DepthAttentionParams& p, int64_t begin, int64_t end, float* memory) {
  if (is_direct(p)) return forward_of<Float32, true>(p, begin, end, memory);
  if (p.type == FloatType::kFloat32) return forward_of<Float32, false>(p, begin, end, memory);
  if (p.type == FloatType::kFloat16) return forward_of<Float16, false>(p, begin, end, memory);
  forward_of<BFloat16, false>(p, begin, end, memory);
}

void backward(const DepthAttentionBackwardParams& p, int64_t begin, int64_t end, float* memory) {
  if (is_direct(p.forward)) return backward_of<Float32, true>(p, begin, end, memory);
  if (p.forward.type == FloatType::kFloat32) return backward_of<Float32, false>(p, begin, end, memory);
  if (p.forward.type == FloatType::kFloat16) return backward_of<Float16, false>(p, begin, end, memory);
  backward_of<BFloat16, false>(p, begin, end, memory);
}

}  // namespace

constexpr DepthAttentionKernels depth_attention_kernels = {
    .scratch = scratch,
    .forward = forward,
    .backward = backward,
};

}  // namespace RQK_CAPABILITY
}  // namespace rqk
