// The CUDA language on the host, for kernel files compiled by a C++20 compiler. Included through common/device.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "emulation/runtime.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Without this, it would silently declare one variable per thread.
#define __shared__ _Pragma("GCC error \"declare shared memory with CU_SHARED or CU_DYN_SMEM (common/device.h)\"")

// The address is looked up once per thread and block, by the address of the static key.
#define CU_SHARED(T, name, ...)                   \
  static constexpr char name##_key = 0;           \
  using name##_type = T __VA_ARGS__;              \
  name##_type& name = *static_cast<name##_type*>( \
      ::rqk::emulation::shared_variable(&name##_key, #name, sizeof(name##_type), alignof(name##_type)))
#define CU_DYN_SMEM(T, name) T* const name = static_cast<T*>(::rqk::emulation::dynamic_shared())

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// Only the alignment matters: it decides how wide, and from where, a kernel may load.
#define RQK_VECTOR_TYPES(T, name)                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
  struct alignas(16) name##4 { T x, y, z, w; };
RQK_VECTOR_TYPES(float, float)
RQK_VECTOR_TYPES(int, int)
RQK_VECTOR_TYPES(unsigned, uint)
#undef RQK_VECTOR_TYPES
struct alignas(16) double2 {
  double x, y;
};

// --- arithmetic ----------------------------------------------------------------------------------------

template <class To, class From>
inline To rqk_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &value, sizeof(to));
  return to;
}
inline int __float_as_int(float v) { return rqk_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return rqk_bits<unsigned>(v); }
inline float __int_as_float(int v) { return rqk_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return rqk_bits<float>(v); }
inline long long __double_as_longlong(double v) { return rqk_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return rqk_bits<double>(v); }

// Not fused: compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

#define RQK_MIN_MAX(T)                             \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
RQK_MIN_MAX(int)
RQK_MIN_MAX(unsigned)
RQK_MIN_MAX(long)
RQK_MIN_MAX(unsigned long)
RQK_MIN_MAX(long long)
RQK_MIN_MAX(unsigned long long)
#undef RQK_MIN_MAX
// As on a device, NaN loses against a number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// Blocks run one after another and fibers on one core, so memory is always in order: a missing fence is not detected.
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- barriers ------------------------------------------------------------------------------------------

using rqk_site = rqk::emulation::Site;
using rqk_barrier = rqk::emulation::Barrier;

inline void __syncthreads(rqk_site at = rqk_site::current()) {
  rqk::emulation::block_barrier(rqk_barrier::plain, false, at);
}
inline int __syncthreads_count(int predicate, rqk_site at = rqk_site::current()) {
  return rqk::emulation::block_barrier(rqk_barrier::count, predicate != 0, at);
}
inline int __syncthreads_and(int predicate, rqk_site at = rqk_site::current()) {
  return rqk::emulation::block_barrier(rqk_barrier::all, predicate != 0, at);
}
inline int __syncthreads_or(int predicate, rqk_site at = rqk_site::current()) {
  return rqk::emulation::block_barrier(rqk_barrier::any, predicate != 0, at);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, rqk_site at = rqk_site::current()) {
  rqk::emulation::warp_barrier(mask, at);
}

// --- shuffles ------------------------------------------------------------------------------------------

template <class T>
inline T rqk_shuffle(unsigned mask, const char* kind, T value, int source, const rqk_site& at) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  rqk::emulation::Shuffle argument{0, source};
  __builtin_memcpy(&argument.value, &value, sizeof(T));
  const uint64_t result = rqk::emulation::warp_shuffle(mask, kind, argument, at);
  __builtin_memcpy(&value, &result, sizeof(T));
  return value;
}
inline int rqk_segment(int width, const rqk_site& at) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    rqk::emulation::fail("shuffle width must be a power of two up to 32, got " + std::to_string(width) + " at " +
                         rqk::emulation::describe(at));
  }
  return static_cast<int>(rqk::emulation::lane_index()) & ~(width - 1);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, rqk_site at = rqk_site::current()) {
  return rqk_shuffle(mask, "__shfl_sync", value, rqk_segment(width, at) | (source & (width - 1)), at);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, rqk_site at = rqk_site::current()) {
  const int lane = static_cast<int>(rqk::emulation::lane_index()), source = lane - static_cast<int>(delta);
  return rqk_shuffle(mask, "__shfl_up_sync", value, source < rqk_segment(width, at) ? lane : source, at);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, rqk_site at = rqk_site::current()) {
  const int lane = static_cast<int>(rqk::emulation::lane_index()), source = lane + static_cast<int>(delta);
  return rqk_shuffle(mask, "__shfl_down_sync", value, source >= rqk_segment(width, at) + width ? lane : source, at);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, rqk_site at = rqk_site::current()) {
  const int lane = static_cast<int>(rqk::emulation::lane_index()), source = lane ^ lanes;
  return rqk_shuffle(mask, "__shfl_xor_sync", value, source >= rqk_segment(width, at) + width ? lane : source, at);
}

// --- votes, matches, reductions ------------------------------------------------------------------------

// Every lane passes a value and receives the fold over the lanes of the mask.
template <class T, class Fold>
inline T rqk_reduce(unsigned mask, const char* kind, T value, const rqk_site& at) {
  rqk::emulation::warp_exchange(
      mask, kind, &value,
      [](const rqk::emulation::Lanes& lanes) {
        T total{};
        bool first = true;
        for (void* argument : lanes.argument) {
          if (argument == nullptr) continue;
          total = first ? *static_cast<T*>(argument) : Fold()(total, *static_cast<T*>(argument));
          first = false;
        }
        for (void* argument : lanes.argument) {
          if (argument != nullptr) *static_cast<T*>(argument) = total;
        }
      },
      at);
  return value;
}
#define RQK_FOLD(name, expression) \
  struct name {                    \
    template <class T>             \
    T operator()(T a, T b) const { \
      return expression;           \
    }                              \
  };
RQK_FOLD(rqk_add, a + b)
RQK_FOLD(rqk_min, b < a ? b : a)
RQK_FOLD(rqk_max, a < b ? b : a)
RQK_FOLD(rqk_and, a& b)
RQK_FOLD(rqk_or, a | b)
RQK_FOLD(rqk_xor, a ^ b)
#undef RQK_FOLD

inline unsigned __ballot_sync(unsigned mask, int predicate, rqk_site at = rqk_site::current()) {
  const unsigned bit = predicate != 0 ? 1u << rqk::emulation::lane_index() : 0u;
  return rqk_reduce<unsigned, rqk_or>(mask, "__ballot_sync", bit, at);
}
inline int __any_sync(unsigned mask, int predicate, rqk_site at = rqk_site::current()) {
  return rqk_reduce<int, rqk_or>(mask, "__any_sync", predicate != 0, at);
}
inline int __all_sync(unsigned mask, int predicate, rqk_site at = rqk_site::current()) {
  return rqk_reduce<int, rqk_and>(mask, "__all_sync", predicate != 0, at);
}
#define RQK_REDUCE(T, op)                                                                    \
  inline T __reduce_##op##_sync(unsigned mask, T value, rqk_site at = rqk_site::current()) { \
    return rqk_reduce<T, rqk_##op>(mask, "__reduce_" #op "_sync", value, at);                \
  }
RQK_REDUCE(unsigned, add)
RQK_REDUCE(unsigned, min)
RQK_REDUCE(unsigned, max)
RQK_REDUCE(unsigned, and)
RQK_REDUCE(unsigned, or)
RQK_REDUCE(unsigned, xor)
RQK_REDUCE(int, add)
RQK_REDUCE(int, min)
RQK_REDUCE(int, max)
#undef RQK_REDUCE

// Returns the mask of lanes that passed the same bits.
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, rqk_site at = rqk_site::current()) {
  struct Argument {
    T value;
    unsigned same;
  } argument{value, 0};
  rqk::emulation::warp_exchange(
      mask, "__match_any_sync", &argument,
      [](const rqk::emulation::Lanes& lanes) {
        for (void* mine : lanes.argument) {
          if (mine == nullptr) continue;
          for (int lane = 0; lane < 32; ++lane) {
            const auto* other = static_cast<const Argument*>(lanes.argument[lane]);
            if (other != nullptr && __builtin_memcmp(&other->value, mine, sizeof(T)) == 0) {
              static_cast<Argument*>(mine)->same |= 1u << lane;
            }
          }
        }
      },
      at);
  return argument.same;
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T value, int* all, rqk_site at = rqk_site::current()) {
  const bool same = __match_any_sync(mask, value, at) == mask;
  *all = same;
  return same ? mask : 0;
}

// --- atomics -------------------------------------------------------------------------------------------

// Not instrumented: the race checker is told that the access is atomic. Not inlined, so that reports name the caller's
// line.
template <class T, class Change>
__attribute__((noinline, no_sanitize("thread"))) T rqk_atomic(T* address, Change change) {
  rqk::emulation::before_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}
#define RQK_ATOMIC(name, expression)                                        \
  template <class T>                                                        \
  __forceinline__ T name(T* address, std::type_identity_t<T> value) {       \
    return rqk_atomic(address, [value](T old) -> T { return expression; }); \
  }
RQK_ATOMIC(atomicAdd, old + value)
RQK_ATOMIC(atomicSub, old - value)
RQK_ATOMIC(atomicExch, (static_cast<void>(old), value))
RQK_ATOMIC(atomicMin, value < old ? value : old)
RQK_ATOMIC(atomicMax, old < value ? value : old)
RQK_ATOMIC(atomicAnd, old& value)
RQK_ATOMIC(atomicOr, old | value)
RQK_ATOMIC(atomicXor, old ^ value)
#undef RQK_ATOMIC
template <class T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return rqk_atomic(address, [expected, value](T old) -> T { return old == expected ? value : old; });
}
