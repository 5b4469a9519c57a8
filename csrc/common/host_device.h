// RQK_HD marks functions that the host and kernels share.
#pragma once

#if defined(__CUDACC__)
#define RQK_HD __host__ __device__ inline
#else
// Always inlined: a cpu_simd.cpp file must not emit a function that the linker could keep for every instruction set.
#define RQK_HD [[gnu::always_inline]] inline
#endif
