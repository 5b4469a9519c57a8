// The CUDA language as kernel files (kernel.cuh) see it: CUDA itself under nvcc, the emulation on the host.
//
// Kernels declare shared memory through these macros, because the host must allocate it per block:
//   CU_SHARED(double, partial, [32][8]);   // __shared__ double partial[32][8];
//   CU_SHARED(int64_t, chosen);            // __shared__ int64_t chosen;
//   CU_DYN_SMEM(float, row);               // the launch's dynamic shared memory, as float* row, 16-byte aligned
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define CU_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// One name for all kernels of a file: extern arrays of different types would conflict.
#define CU_DYN_SMEM(T, name)                                          \
  extern __shared__ __align__(16) unsigned char rqk_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(rqk_dynamic_shared)

#elif defined(RQK_EMULATION)

#include "emulation/cuda_language.h"

#else
#error "device code is compiled by nvcc, or for the host by csrc/emulation"
#endif
