// Decoding with a transformer on a GPU: a few small kernels per block, all of the batch at once, weights read once.
//
//   arrange.cuh    what goes in at first; what a product multiplies, in the order of its registers: norms, rounding
//   multiply.cuh   products of a few rows with packed weights, bias, activation, addition to the residual
//   attend.cuh     attention of the new positions over the cached ones
//   draw.cuh       the code of a row, and what goes in after it
//
// Seven launches a block: norm, qkv, attention, out, norm, mlp_in, mlp_out. With int8 two more, since a row's scale is
// known only when all of it is there. Nothing goes to the host and nothing comes from it: `step` is read where it lies,
// so a captured graph of a position can be replayed for the next.
//
// Moves: all weights once per step (of depth_decode: per depth), whatever the batch; keys and values once; per row what
// is between the products, from and to L2. The published 1.4B parameters (width 1536, 42 + 6 blocks, 16384 codes, four
// depths) have 42 * 12 * 1536^2 = 1.19e9 weights in the spatial stack, 1.70e8 in the depth stack and 2.5e7 in the
// classifier. A position reads 1.19e9 + 4 * 1.95e8 = 1.97e9 of them, in bf16 3.94 GB: 1.3 ms at 3.0 TB/s, the floor for
// one row and for 100. It multiplies as often per row, twice for the two parts of an activation: 100 rows are 7.9e11
// operations, 1.0 ms at 790 TFLOP/s. For few rows the ends of its 476 launches count, 42 * 7 + 4 * (6 * 7 + 3) + 2.
//
// A row's result depends on nothing but the row: each output is summed in an order that the layer's size alone decides.
#pragma once

#include "ops/depth_decode/arrange.cuh"
#include "ops/depth_decode/attend.cuh"
#include "ops/depth_decode/multiply.cuh"
#include "ops/depth_decode/sample.cuh"
