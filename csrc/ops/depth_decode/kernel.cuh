// Transformer decoding on a GPU: a few small kernels per block, the whole batch at once, weights read once.
//
//   arrange.cuh    input rows; activations in register order: norms, rounding
//   multiply.cuh   products of a few rows with packed weights, bias, activation, residual addition
//   attend.cuh     attention of the new positions over the cached ones
//   sample.cuh     the code of a row, and the input of the next depth
// Seven launches per block: norm, qkv, attention, out, norm, mlp_in, mlp_out; int8 needs two more, because a row's
// scale is known only when the row is complete. No host-device sync: `step` is read by the kernel, so a captured graph
// of one position can be replayed for the next. A result depends on its row alone: each output is summed in an order
// that depends only on the layer's size.
//
// Moves all weights once per step (depth_decode: per depth), for any batch; keys and values once; activations through
// L2. Example: the published model of 1.4B parameters (width 1536, 42 + 6 blocks, 16384 codes, four depths) has 42 * 12
// * 1536^2 = 1.19e9 weights in the spatial stack, 1.70e8 in the depth stack and 2.5e7 in the classifier. A position
// reads 1.19e9 + 4 * 1.95e8 = 1.97e9 of them, 3.94 GB in bf16: 1.3 ms at 3.0 TB/s, for one row and for 100. 100 rows
// need 7.9e11 operations (twice, for two parts of an activation), 1.0 ms at 790 TFLOP/s. For few rows the latency of
// the 476 launches counts: 42 * 7 + 4 * (6 * 7 + 3) + 2.
#pragma once

#include "ops/depth_decode/arrange.cuh"
#include "ops/depth_decode/attend.cuh"
#include "ops/depth_decode/multiply.cuh"
#include "ops/depth_decode/sample.cuh"
