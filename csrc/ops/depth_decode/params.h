// Inputs and outputs of transformer_step and depth_decode; strides in elements.
//
// Weights are packed into one buffer for a stack of blocks and one for the classifier (by
// rqkernels/ops/depth_decode.py). Each part begins at a multiple of 128 bytes from the start of its buffer:
//   vector (n)             float32, zero-padded to a multiple of 32
//   linear (outputs, inputs)
//     weights              panels of 32 outputs; panels and inputs are zero-padded to multiples of 32
//       fp32               float32 (panels, inputs, 32)
//       bf16               bfloat16 (panels, inputs, 16, 2): output j of a panel at (j % 16, j / 16)
//       int8               uint8 (panels, inputs / 4, 32, 4): the weight's integer q in [-127, 127] plus 128
//     scales               int8 only: vector (outputs); the weight is q * scale
//     bias                 vector (outputs), zeros for a layer without bias
//   block                  attention_norm.weight, .bias, linear qkv (3 W, W), linear out (W, W),
//                          mlp_norm.weight, .bias, linear mlp_in (H, W), linear mlp_out (W, H)
//   classifier             norm.weight, .bias, then one linear (K, W) for all depths, or one per depth
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "shared/sample_settings.h"

namespace rqk {

enum class WeightType : int32_t { kFloat32, kBFloat16, kInt8 };
enum class Activation : int32_t { kGelu, kQuickGelu };
// Applied to the outputs of a product; kAdd adds them to `out`.
enum class Epilogue : int32_t { kStore, kAdd, kGelu, kQuickGelu };

// Outputs per panel; vectors and inputs are padded to a multiple of it.
constexpr int64_t kOutputPanel = 32;

RQK_HD int64_t padded(int64_t n) { return (n + kOutputPanel - 1) / kOutputPanel * kOutputPanel; }

// The parts of a packed linear layer.
struct PackedLinear {
  const uint8_t* weights;
  const float* scales;  // (padded outputs), null unless int8
  const float* bias;    // (padded outputs)
  int64_t inputs, outputs;
};

struct PackedBlock {
  const float *attention_norm_weight, *attention_norm_bias;
  PackedLinear qkv, out;
  const float *mlp_norm_weight, *mlp_norm_bias;
  PackedLinear mlp_in, mlp_out;
};

// Reads consecutive parts.
struct PackedReader {
  const uint8_t* at;
  WeightType type;

  RQK_HD const float* vector(int64_t n) {
    const float* values = reinterpret_cast<const float*>(at);
    at += padded(n) * static_cast<int64_t>(sizeof(float));
    return values;
  }
  RQK_HD PackedLinear linear(int64_t outputs, int64_t inputs) {
    PackedLinear layer{};
    layer.weights = at;
    layer.inputs = inputs;
    layer.outputs = outputs;
    const int64_t size = type == WeightType::kFloat32 ? 4 : type == WeightType::kBFloat16 ? 2 : 1;
    at += padded(outputs) * padded(inputs) * size;
    if (type == WeightType::kInt8) layer.scales = vector(outputs);
    layer.bias = vector(outputs);
    return layer;
  }
};

// A stack of causal pre-norm blocks: x += out(attention(norm(x))); x += mlp_out(activation(mlp_in(norm(x)))).
struct PackedStack {
  const uint8_t* blocks;  // (layers) consecutive blocks of block_bytes() each
  int64_t layers, width, hidden, heads;
  WeightType type;
  Activation activation;
  double eps;  // of the norms

  RQK_HD PackedBlock block_at(const uint8_t* at, const uint8_t** end) const {
    PackedReader reader{at, type};
    PackedBlock block;
    block.attention_norm_weight = reader.vector(width);
    block.attention_norm_bias = reader.vector(width);
    block.qkv = reader.linear(3 * width, width);
    block.out = reader.linear(width, width);
    block.mlp_norm_weight = reader.vector(width);
    block.mlp_norm_bias = reader.vector(width);
    block.mlp_in = reader.linear(hidden, width);
    block.mlp_out = reader.linear(width, hidden);
    *end = reader.at;
    return block;
  }
  RQK_HD int64_t block_bytes() const {
    const uint8_t* end;
    block_at(blocks, &end);
    return end - blocks;
  }
  RQK_HD PackedBlock block(int64_t layer) const {
    const uint8_t* end;
    return block_at(blocks + layer * block_bytes(), &end);
  }
};

// Runs n new positions of every row through the stack. Rows are (batch, count), row = b * count + i.
struct TransformerStepParams {
  PackedStack stack;
  const float* x;        // (batch, count, width), contiguous
  float *keys, *values;  // (layers, batch, heads, capacity, width / heads), contiguous; written at length .. length +
                         // count
  float* y;              // (batch, count, width), contiguous
  int64_t batch, count;
  int64_t capacity;
  int64_t length;       // number of earlier positions, ...
  const int64_t* step;  // ... plus *step; null: plus none. On a GPU in device memory, read by the kernel
  uint8_t* workspace;   // workspace_bytes(), on a GPU only
};

// Samples `depth` codes of every row, one after another:
//   x_0 = context + positions[0];   x_d = sum of the vectors of the codes before d (or of the last one) + positions[d]
//   logits_d = classifier_d(norm(last output of the stack for x_0 .. x_d));   code d ~ sample_logits(logits_d)
struct DepthDecodeParams {
  PackedStack stack;
  const uint8_t* classifier;  // packed norm and `classifiers` linears (num_codes, width), of the stack's WeightType
  int64_t classifiers;        // 1, or one per depth
  double classifier_eps;
  const float* positions;  // (depth, width), contiguous
  const float* vectors;    // (num_codes, width), contiguous; or (depth, num_codes, width)
  int64_t vectors_stride;  // elements from one depth's vectors to the next; 0 if all share them
  bool cumulative;         // whether x_d sums all codes before d
  int64_t rows, depth, num_codes;
  const float* context;  // (rows, width), contiguous; with guidance (2, rows, width), the second half for the null
                         // condition
  double guidance;       // logits = (1 + guidance) conditional - guidance null; 0: off
  const SampleSettings* settings;  // (depth), always in host memory
  uint64_t seed;
  int64_t offset;        // the uniform of a row is that of row offset + index, ...
  int64_t stream;        // ... stream + d, ...
  const int64_t* step;   // ... plus *step * depth; null: plus none. On a GPU in device memory, read by the kernel
  const int64_t* given;  // (rows, depth): codes to use instead of sampling; or null
  int64_t* codes;        // (rows, depth); unused with `given`
  float* logits;         // (rows, depth, num_codes) with `given`, else null
  int64_t* bad_row;      // CPU only: set to the first row whose logits have NaN, +inf or nothing but -inf, else
                         // unchanged; the codes are then invalid. On a GPU such a row has code -1 from there on
  uint8_t* workspace;    // workspace_bytes(), on a GPU only
};

// The parts of a packed classifier.
struct PackedClassifier {
  const float *norm_weight, *norm_bias;
  PackedReader linears;  // positioned at the first one

  RQK_HD PackedClassifier(const uint8_t* packed, WeightType type, int64_t width) : linears{packed, type} {
    norm_weight = linears.vector(width);
    norm_bias = linears.vector(width);
  }
};

// CUDA library only; aligned to 256 bytes, need not be initialized.
int64_t workspace_bytes(const TransformerStepParams& params);
int64_t workspace_bytes(const DepthDecodeParams& params);

// Run on the given CUDA stream, or on the CPU's threads (`stream` unused).
void launch(const TransformerStepParams& params, void* stream);
void launch(const DepthDecodeParams& params, void* stream);

}  // namespace rqk
