// Test kernels, compiled like a kernel file, also by nvcc (.ci/registers.py), which shows that they are CUDA. Each
// broken kernel differs from a correct one in one line.
#include "emulation/self_test.h"

#include <type_traits>

#include "common/device.h"
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace rqk::emulation {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

// --- correct kernels -----------------------------------------------------------------------------------

// out[i] = in[last of the block - i]; the last block may be ragged.
template <bool kBarrier>
__global__ void reverse_blocks(SelfTestParams p) {
  CU_DYN_SMEM(int32_t, tile);
  const int64_t first = int64_t(blockIdx.x) * blockDim.x;
  const int64_t n = min(int64_t(blockDim.x), p.elements - first);
  if (threadIdx.x < n) tile[threadIdx.x] = p.in[first + threadIdx.x];
  if (kBarrier) __syncthreads();
  if (threadIdx.x < n) p.out[first + threadIdx.x] = tile[n - 1 - threadIdx.x];
}

// As above within each warp.
template <bool kBarrier>
__global__ void reverse_warps(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [64]);
  const int other = threadIdx.x ^ 31;
  tile[threadIdx.x] = p.in[threadIdx.x];
  if (kBarrier) __syncwarp();
  p.out[threadIdx.x] = tile[other];
}

// Every collective once: out[op * 64 + thread].
__global__ void collectives(SelfTestParams p) {
  const int t = threadIdx.x, v = p.in[t];
  int op = 0;
  auto put = [&](auto value) { p.out[64 * op++ + t] = static_cast<int32_t>(value); };
  put(__shfl_sync(kFullWarp, v, 5));
  put(__shfl_sync(kFullWarp, v, 9, 8));
  put(__shfl_up_sync(kFullWarp, v, 3, 16));
  put(__shfl_down_sync(kFullWarp, v, 3, 16));
  put(__shfl_xor_sync(kFullWarp, v, 6));
  put(__shfl_down_sync(kFullWarp, double(v) * 0.5, 1) * 2.0);
  put(__ballot_sync(kFullWarp, v & 1));
  put(__any_sync(kFullWarp, v == p.in[0]));
  put(__all_sync(kFullWarp, v < 1 << 20));
  put(__match_any_sync(kFullWarp, v & 3));
  int all = 0;
  put(__match_all_sync(kFullWarp, v & 0, &all) + unsigned(all));
  put(__reduce_add_sync(kFullWarp, v));
  put(__reduce_min_sync(kFullWarp, v));
  put(__reduce_max_sync(kFullWarp, v));
  put(__reduce_and_sync(kFullWarp, unsigned(v) | 8u));
  put(__reduce_or_sync(kFullWarp, unsigned(v)));
  put(__reduce_xor_sync(kFullWarp, unsigned(v)));
  put(__syncthreads_count(v & 1));
  put(__syncthreads_and(v < 1 << 20));
  put(__syncthreads_or(v == p.in[63]));
}

// The halves of a warp diverge and shuffle among themselves.
__global__ void half_warps(SelfTestParams p) {
  const int t = threadIdx.x, v = p.in[t];
  if (t < 16) {
    p.out[t] = __shfl_xor_sync(0x0000ffffu, v, 1);
  } else {
    p.out[t] = __shfl_xor_sync(0xffff0000u, v, 2);
  }
}

// Threads past the elements return before the barrier, which the others pass.
__global__ void early_return(SelfTestParams p) {
  CU_SHARED(int32_t, sum);
  if (threadIdx.x >= p.elements) return;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, p.in[threadIdx.x]);
  __syncthreads();
  p.out[threadIdx.x] = sum;
}

// out: add, sub, exchanged count, min, max, and, or, xor, cas over in[1..], from in[0]; one block or many.
__global__ void atomics(SelfTestParams p) {
  const int32_t v = p.in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&p.out[0], v);
  atomicSub(&p.out[1], v);
  atomicAdd(&p.out[2], atomicExch(&p.out[9], v));  // the sum of all but the last one, plus the initial value
  atomicMin(&p.out[3], v);
  atomicMax(&p.out[4], v);
  atomicAnd(&p.out[5], v);
  atomicOr(&p.out[6], v);
  atomicXor(&p.out[7], v);
  for (int32_t seen = p.out[10], old; (old = atomicCAS(&p.out[8], seen, seen + v)) != seen;) seen = old;
}

// out[linear index] = the index, from a grid and a block of three dimensions.
__global__ void three_dimensions(SelfTestParams p) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  p.out[i] = static_cast<int32_t>(i) + p.in[i];
}

// One mma on 10 registers per lane, a (4), b (2) and d (4). d is returned in the first 4 registers; the next 4 hold the
// result of the form with a separate addend, which is returned in the last 2.
#define RQK_MULTIPLY(name, mma, T)                                                              \
  __global__ void name(SelfTestParams p) {                                                      \
    const int32_t* in = p.in + 10 * threadIdx.x;                                                \
    const uint32_t a[4] = {uint32_t(in[0]), uint32_t(in[1]), uint32_t(in[2]), uint32_t(in[3])}; \
    const uint32_t b[2] = {uint32_t(in[4]), uint32_t(in[5])};                                   \
    T d[4];                                                                                     \
    for (int i = 0; i < 4; ++i) d[i] = as<T>(in[6 + i]);                                        \
    T apart[4], c[4] = {d[0], d[1], d[2], d[3]};                                                \
    ptx::mma(apart, a, b, c);                                                                   \
    ptx::mma(d, a, b);                                                                          \
    int32_t* out = p.out + 10 * threadIdx.x;                                                    \
    for (int i = 0; i < 4; ++i) out[i] = as<int32_t>(d[i]);                                     \
    for (int i = 0; i < 4; ++i) out[4 + i] = as<int32_t>(apart[i]);                             \
    for (int i = 0; i < 2; ++i) out[8 + i] = as<int32_t>(c[i]);                                 \
  }
template <class T>
__device__ T as(int32_t bits) {
  if constexpr (std::is_same_v<T, float>) return __int_as_float(bits);
  return bits;
}
template <class T>
__device__ T as(float value) {
  return __float_as_int(value);
}
RQK_MULTIPLY(multiply_bf16, mma_bf16, float)
RQK_MULTIPLY(multiply_f16, mma_f16, float)
RQK_MULTIPLY(multiply_tf32, mma_tf32, float)
RQK_MULTIPLY(multiply_s8, mma_s8, int32_t)
#undef RQK_MULTIPLY

// Four 8x8 matrices of 16 bits, as they are and transposed: out[128 * transposed + 4 * lane + register].
__global__ void load_matrices(SelfTestParams p) {
  CU_SHARED(int4, tile, [32]);
  int32_t* words = reinterpret_cast<int32_t*>(tile);
  for (int i = threadIdx.x; i < 128; i += 32) words[i] = p.in[i];
  __syncwarp();
  uint32_t d[4];
  ptx::ldmatrix_x4<false>(d, &tile[threadIdx.x]);
  for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = static_cast<int32_t>(d[i]);
  ptx::ldmatrix_x4<true>(d, &tile[threadIdx.x]);
  for (int i = 0; i < 4; ++i) p.out[128 + 4 * threadIdx.x + i] = static_cast<int32_t>(d[i]);
}

// Tiles of 64 int4 through two buffers, each reversed; zeros beyond the elements (a multiple of 4).
enum class Pipeline { right, no_commit, waits_too_little, no_barrier, no_second_barrier };
template <Pipeline kPipeline>
__global__ void pipeline(SelfTestParams p) {
  CU_SHARED(int4, tile, [2][64]);
  const int t = threadIdx.x;
  const int64_t vectors = p.elements / 4, tiles = (vectors + 63) / 64;
  auto fetch = [&](int64_t i) {
    const int64_t v = 64 * i + t;
    const bool valid = v < vectors;
    if (i < tiles) ptx::cp_async_16(&tile[i % 2][t], reinterpret_cast<const int4*>(p.in) + (valid ? v : 0), valid);
    if (kPipeline != Pipeline::no_commit) ptx::cp_async_commit();
  };
  fetch(0);
  for (int64_t i = 0; i < tiles; ++i) {
    fetch(i + 1);
    ptx::cp_async_wait<kPipeline == Pipeline::waits_too_little ? 2 : 1>();
    if (kPipeline != Pipeline::no_barrier) __syncthreads();
    const int64_t v = 64 * i + t;
    if (v < vectors) reinterpret_cast<int4*>(p.out)[v] = tile[i % 2][63 - t];
    if (kPipeline != Pipeline::no_second_barrier) __syncthreads();
  }
  ptx::cp_async_wait<0>();
}

// --- what plain runs must catch ------------------------------------------------------------------------

__global__ void divergent_barrier(SelfTestParams p) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

// The first warp waits for its lane 3, which waits for the block.
__global__ void deadlock(SelfTestParams p) {
  if (threadIdx.x == 3) __syncthreads();
  __syncwarp(threadIdx.x < 32 ? kFullWarp : kFullWarp);
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

__global__ void inactive_source(SelfTestParams p) {
  if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_sync(0x0000ffffu, p.in[threadIdx.x], 20);
}

__global__ void returned_lane(SelfTestParams p) {
  if (threadIdx.x == 7) return;
  p.out[threadIdx.x] = __shfl_xor_sync(kFullWarp, p.in[threadIdx.x], 1);
}

__global__ void caller_outside_mask(SelfTestParams p) {
  p.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, p.in[threadIdx.x], 1);
}

__global__ void different_masks(SelfTestParams p) {
  const unsigned mask = threadIdx.x < 16 ? kFullWarp : 0xfffffff0u;
  p.out[threadIdx.x] = __ballot_sync(mask, p.in[threadIdx.x] & 1);
}

__global__ void different_collectives(SelfTestParams p) {
  if (threadIdx.x < 16) {
    p.out[threadIdx.x] = __any_sync(kFullWarp, p.in[threadIdx.x]);
  } else {
    p.out[threadIdx.x] = __all_sync(kFullWarp, p.in[threadIdx.x]);
  }
}

__global__ void bad_width(SelfTestParams p) {
  p.out[threadIdx.x] = __shfl_down_sync(kFullWarp, p.in[threadIdx.x], 1, 12);
}

#ifndef __CUDACC__  // ptxas rejects it
__global__ void too_much_static_shared(SelfTestParams p) {
  CU_SHARED(int32_t, large, [12289]);
  large[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = large[threadIdx.x];
}
#endif

// Exceeds the memory of a default launch in total, but its dynamic part is too small for launch_kernel to ask for more.
__global__ void too_much_default_shared(SelfTestParams p) {
  CU_SHARED(int32_t, large, [5 * 1024]);
  CU_DYN_SMEM(int32_t, tile);
  large[threadIdx.x] = tile[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = large[threadIdx.x] + tile[threadIdx.x];
}

__global__ void copy_never_awaited(SelfTestParams p) {
  CU_SHARED(int4, tile);
  ptx::cp_async_16(&tile, p.in);
  ptx::cp_async_commit();
}

__global__ void copy_misaligned(SelfTestParams p) {
  CU_SHARED(int4, tile);
  ptx::cp_async_16(&tile, p.in + 1);
}

__global__ void copy_past_shared(SelfTestParams p) {
  CU_SHARED(int4, tile);
  ptx::cp_async_16(&tile + 1, p.in);
}

__global__ void matrices_misaligned(SelfTestParams p) {
  CU_SHARED(int4, tile, [33]);
  uint32_t d[4];
  ptx::ldmatrix_x4<false>(d, reinterpret_cast<const char*>(&tile[threadIdx.x]) + 8);
  p.out[threadIdx.x] = static_cast<int32_t>(d[0]);
}

__global__ void matrices_of_global_memory(SelfTestParams p) {
  uint32_t d[4];
  ptx::ldmatrix_x4<false>(d, p.in + threadIdx.x / 8 * 4);
  p.out[threadIdx.x] = static_cast<int32_t>(d[0]);
}

__global__ void copy(SelfTestParams p) { p.out[threadIdx.x] = p.in[threadIdx.x]; }

// --- what the address build must catch -----------------------------------------------------------------

__global__ void read_past_global(SelfTestParams p) { p.out[threadIdx.x] = p.in[threadIdx.x + (threadIdx.x == 63)]; }

__global__ void write_past_global(SelfTestParams p) { p.out[threadIdx.x + 1] = p.in[threadIdx.x]; }

__global__ void read_before_global(SelfTestParams p) { p.out[threadIdx.x] = p.in[int(threadIdx.x) - 1]; }

__global__ void write_past_shared(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [63]);
  int32_t* flat = tile;
  flat[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = flat[threadIdx.x];
}

__global__ void write_past_dynamic(SelfTestParams p) {
  CU_DYN_SMEM(int32_t, tile);
  tile[threadIdx.x + 1] = p.in[threadIdx.x];
  p.out[threadIdx.x] = tile[threadIdx.x + 1];
}

// Inside the allocation, outside the row.
__global__ void past_inner_dimension(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [9][8]);
  const int t = threadIdx.x;
  tile[0][t] = p.in[t];
  p.out[t] = tile[0][t];
}

__global__ void misaligned_vector(SelfTestParams p) {
  const int4 v = *reinterpret_cast<const int4*>(p.in + 1);
  p.out[threadIdx.x] = v.x + v.w;
}

// An array of int is not aligned for vectors, on a device either.
__global__ void misaligned_shared_vector(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [4]);
  if (threadIdx.x < 4) tile[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = reinterpret_cast<const int4*>(tile)->y;
}

// --- what the race build must catch, in order and with right results ------------------------------------

__global__ void same_value_writes(SelfTestParams p) {
  CU_SHARED(int32_t, flag);
  flag = 1;
  __syncthreads();
  p.out[threadIdx.x] = flag + p.in[threadIdx.x];
}

__global__ void write_after_read(SelfTestParams p) {
  CU_SHARED(int32_t, value);
  if (threadIdx.x == 0) value = 1;
  __syncthreads();
  p.out[threadIdx.x] = value + p.in[threadIdx.x];
  if (threadIdx.x == 63) value = 2;  // others may not have read it yet
}

// A shuffle does not order memory.
__global__ void shuffle_as_barrier(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [64]);
  tile[threadIdx.x] = p.in[threadIdx.x];
  __shfl_sync(kFullWarp, 0, 0);
  p.out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

__global__ void half_warp_barrier(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [64]);
  tile[threadIdx.x] = p.in[threadIdx.x];
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
  p.out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

__global__ void uninitialised_shared(SelfTestParams p) {
  CU_SHARED(int32_t, tile, [64]);
  if (threadIdx.x != 7) tile[threadIdx.x] = 0;
  p.out[threadIdx.x] = p.in[threadIdx.x] + (tile[threadIdx.x] == 12345);
}

__global__ void uninitialised_global(SelfTestParams p) { p.out[threadIdx.x] += p.in[threadIdx.x]; }

// All blocks write the same element.
__global__ void blocks_share_an_output(SelfTestParams p) {
  if (threadIdx.x == 0) p.out[0] = p.in[0];
}

// A plain write next to other blocks' atomics.
__global__ void plain_next_to_atomic(SelfTestParams p) {
  if (blockIdx.x == 0) {
    p.out[0] = 0;
  } else if (threadIdx.x == 0) {
    atomicExch(&p.out[0], 0);
  }
}

// -------------------------------------------------------------------------------------------------------

template <void (*kKernel)(SelfTestParams), unsigned kBlocks = 1, unsigned kThreads = 64, size_t kShared = 0>
void run(const SelfTestParams& p) {
  launch_kernel("self_test", kKernel, kBlocks, kThreads, kShared, nullptr, p);
}

template <bool kBarrier>
void run_reverse(const SelfTestParams& p) {
  constexpr int kThreads = 96;
  launch_kernel("reverse_blocks", reverse_blocks<kBarrier>,
                static_cast<unsigned>((p.elements + kThreads - 1) / kThreads), kThreads, kThreads * sizeof(int32_t),
                nullptr, p);
}

__global__ void fill(SelfTestParams p) { p.out[threadIdx.x] = p.in[0]; }

void run_atomics(const SelfTestParams& p) {
  // Each result starts from in[0]. This needs its own kernel, since blocks cannot wait for each other.
  run<fill, 1, 11>(p);
  run<atomics, 2, 48>({p.in + 1, p.out, p.elements - 1});
}

void run_three_dimensions(const SelfTestParams& p) {
  launch_kernel("three_dimensions", three_dimensions, dim3(2, 3, 4), dim3(4, 5, 2), 0, nullptr, p);
}

}  // namespace

const SelfTest self_tests[] = {
    {"reverse_blocks", run_reverse<true>},
    {"reverse_warps", run<reverse_warps<true>>},
    {"collectives", run<collectives>},
    {"half_warps", run<half_warps, 1, 32>},
    {"early_return", run<early_return, 1, 128>},
    {"atomics", run_atomics},
    {"three_dimensions", run_three_dimensions},
    {"mma_bf16", run<multiply_bf16, 1, 32>},
    {"mma_f16", run<multiply_f16, 1, 32>},
    {"mma_tf32", run<multiply_tf32, 1, 32>},
    {"mma_s8", run<multiply_s8, 1, 32>},
    {"load_matrices", run<load_matrices, 1, 32>},
    {"pipeline", run<pipeline<Pipeline::right>>},
    {"pipeline_no_commit", run<pipeline<Pipeline::no_commit>>},
    {"pipeline_waits_too_little", run<pipeline<Pipeline::waits_too_little>>},
    {"pipeline_no_barrier", run<pipeline<Pipeline::no_barrier>>},
    {"pipeline_no_second_barrier", run<pipeline<Pipeline::no_second_barrier>>},
    {"copy_never_awaited", run<copy_never_awaited, 1, 1>},
    {"copy_misaligned", run<copy_misaligned, 1, 1>},
    {"copy_past_shared", run<copy_past_shared, 1, 1>},
    {"matrices_misaligned", run<matrices_misaligned, 1, 32>},
    {"matrices_of_global_memory", run<matrices_of_global_memory, 1, 32>},
    {"divergent_barrier", run<divergent_barrier>},
    {"deadlock", run<deadlock>},
    {"inactive_source", run<inactive_source, 1, 32>},
    {"returned_lane", run<returned_lane, 1, 32>},
    {"caller_outside_mask", run<caller_outside_mask, 1, 32>},
    {"different_masks", run<different_masks, 1, 32>},
    {"different_collectives", run<different_collectives, 1, 32>},
    {"missing_lanes", run<reverse_warps<true>, 1, 48>},
    {"bad_width", run<bad_width, 1, 32>},
#ifndef __CUDACC__
    {"too_much_static_shared", run<too_much_static_shared>},
#endif
    {"too_much_default_shared", run<too_much_default_shared, 1, 64, 30 * 1024>},
    {"too_much_dynamic_shared", run<copy, 1, 64, 227 * 1024 + 1>},
    {"too_many_threads", run<copy, 1, 1025>},
    {"read_past_global", run<read_past_global>},
    {"write_past_global", run<write_past_global>},
    {"read_before_global", run<read_before_global>},
    {"write_past_shared", run<write_past_shared>},
    {"write_past_dynamic", run<write_past_dynamic, 1, 64, 64 * sizeof(int32_t)>},
    {"past_inner_dimension", run<past_inner_dimension>},
    {"misaligned_vector", run<misaligned_vector>},
    {"misaligned_shared_vector", run<misaligned_shared_vector>},
    {"missing_block_barrier", run_reverse<false>},
    {"missing_warp_barrier", run<reverse_warps<false>>},
    {"same_value_writes", run<same_value_writes>},
    {"write_after_read", run<write_after_read>},
    {"shuffle_as_barrier", run<shuffle_as_barrier>},
    {"half_warp_barrier", run<half_warp_barrier>},
    {"uninitialised_shared", run<uninitialised_shared>},
    {"uninitialised_global", run<uninitialised_global>},
    {"blocks_share_an_output", run<blocks_share_an_output, 3>},
    {"plain_next_to_atomic", run<plain_next_to_atomic, 2, 1>},
};
const int num_self_tests = sizeof(self_tests) / sizeof(self_tests[0]);

}  // namespace rqk::emulation
