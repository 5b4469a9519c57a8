// Launches of transformer_step and depth_decode on the current stream.
#include <cmath>

#include "common/launch.cuh"
#include "ops/depth_decode/kernel.cuh"

namespace rqk {
namespace depth_decode {
namespace {

constexpr int64_t kAlignment = 256;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Intermediate results between kernels.
struct Work {
  uint8_t *narrow, *wide;          // activations of size width, and of size hidden
  float* qkv;                      // (rows, 3 width)
  float *heads, *hidden, *scales;  // int8 only: (rows, width), (rows, hidden), (rows)
  // depth_decode only.
  float *x, *keys, *values, *sums, *logits;
};

// Assigns the parts of the workspace and counts their bytes.
class Layout {
 public:
  explicit Layout(uint8_t* workspace) : at_(reinterpret_cast<uintptr_t>(workspace)) {}
  template <class T>
  void take(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(at_ + static_cast<uintptr_t>(bytes_));
    bytes_ += divide_up(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t at_;
  int64_t bytes_ = 0;
};

void lay_out(const PackedStack& stack, int64_t rows, Layout& layout, Work& w) {
  const bool is_int8 = stack.type == WeightType::kInt8;
  const int64_t row_bytes = divide_up(rows, kRowGroup) * kRowGroup * (is_int8 ? 2 : 4);
  layout.take(w.narrow, padded(stack.width) * row_bytes);
  layout.take(w.wide, padded(stack.hidden) * row_bytes);
  layout.take(w.qkv, rows * 3 * stack.width);
  layout.take(w.heads, is_int8 ? rows * stack.width : 0);
  layout.take(w.hidden, is_int8 ? rows * stack.hidden : 0);
  layout.take(w.scales, is_int8 ? rows : 0);
}

int64_t lay_out(const TransformerStepParams& p, Work& w) {
  Layout layout(p.workspace);
  lay_out(p.stack, p.batch * p.count, layout, w);
  return layout.bytes();
}

int64_t rows_of(const DepthDecodeParams& p) { return p.rows * (p.guidance > 0 ? 2 : 1); }

int64_t lay_out(const DepthDecodeParams& p, Work& w) {
  const int64_t rows = rows_of(p), cache = p.stack.layers * rows * p.depth * p.stack.width;
  Layout layout(p.workspace);
  lay_out(p.stack, rows, layout, w);
  layout.take(w.x, rows * p.stack.width);
  layout.take(w.keys, cache);
  layout.take(w.values, cache);
  layout.take(w.sums, p.rows * p.stack.width);
  layout.take(w.logits, p.given == nullptr ? rows * p.num_codes : 0);
  return layout.bytes();
}

// The launches of one call. Its rows are x, (rows, width), modified in place.
template <WeightType kType>
class Launches {
 public:
  Launches(const char* op, const PackedStack& stack, const Work& w, float* x, int64_t rows, void* stream)
      : op_(op), stack_(stack), w_(w), x_(x), rows_(rows), stream_(stream), device_(device_limits(op)) {}

  void begin(const float* from, const float* addend) const {
    Begin task{};
    task.from = from;
    task.addend = addend;
    task.rows = rows_;
    task.width = stack_.width;
    task.x = x_;
    task.narrow = narrow();
    task.wide = wide();
    launch_kernel(op_, begin_rows<kType>, blocks(divide_up(rows_, kRowGroup) * kRowGroup), kThreads, 0, stream_, task);
  }

  // Runs `count` new positions of each of the rows / count sequences through the stack; `length` and `step` give their
  // place.
  void stack(float* keys, float* values, int64_t count, int64_t capacity, int64_t length, const int64_t* step) const {
    const int64_t width = stack_.width, cache = rows_ / count * capacity * width;
    const Epilogue activation = stack_.activation == Activation::kGelu ? Epilogue::kGelu : Epilogue::kQuickGelu;
    for (int64_t layer = 0; layer < stack_.layers; ++layer) {
      const PackedBlock block = stack_.block(layer);
      norm(block.attention_norm_weight, block.attention_norm_bias, stack_.eps);
      multiply(block.qkv, narrow(), Epilogue::kStore, w_.qkv, 3 * width);
      Attention task{};
      task.qkv = w_.qkv;
      task.stride = 3 * width;
      task.width = static_cast<int>(width);
      task.heads = static_cast<int>(stack_.heads);
      task.rows = static_cast<int>(rows_);
      task.count = static_cast<int>(count);
      task.scale = 1.0f / std::sqrt(static_cast<float>(width / stack_.heads));
      task.keys = keys + layer * cache;
      task.values = values + layer * cache;
      task.capacity = capacity;
      task.length = length;
      task.step = step;
      task.is_vectorizable = width / stack_.heads % 4 == 0 && reinterpret_cast<uintptr_t>(keys) % sizeof(float4) == 0;
      task.to = narrow();
      task.out = w_.heads;
      const unsigned heads = blocks(rows_ * stack_.heads);
      launch_kernel(op_, attend_rows<kType>, (heads + kWarps - 1) / kWarps, kThreads, 0, stream_, task);
      if (kType == WeightType::kInt8) arrange(w_.heads, width, nullptr, nullptr, 0, narrow());
      multiply(block.out, narrow(), Epilogue::kAdd, x_, width);
      norm(block.mlp_norm_weight, block.mlp_norm_bias, stack_.eps);
      multiply(block.mlp_in, narrow(), activation, w_.hidden, stack_.hidden);
      if (kType == WeightType::kInt8) arrange(w_.hidden, stack_.hidden, nullptr, nullptr, 0, wide());
      multiply(block.mlp_out, wide(), Epilogue::kAdd, x_, width);
    }
  }

  // Writes the normalized x to the activations narrow().
  void norm(const float* weight, const float* bias, double eps) const {
    arrange(x_, stack_.width, weight, bias, eps, narrow());
  }

  void multiply(const PackedLinear& layer, const Activations& from, Epilogue epilogue, float* out,
                int64_t stride) const {
    if (rows_ <= kRowGroup) {
      multiply_tiles<1>(layer, from, epilogue, out, stride);
    } else {
      multiply_tiles<4>(layer, from, epilogue, out, stride);
    }
  }

  Activations narrow() const { return {w_.narrow, padded(stack_.width)}; }
  Activations wide() const { return {w_.wide, padded(stack_.hidden)}; }

 private:
  unsigned blocks(int64_t count) const {
    if (count > INT32_MAX) {
      throw std::invalid_argument(std::string(op_) + ": needs " + std::to_string(count) +
                                  " blocks, a launch has at most 2^31 - 1: use fewer rows");
    }
    return static_cast<unsigned>(count);
  }

  void arrange(const float* from, int64_t width, const float* weight, const float* bias, double eps,
               const Activations& to) const {
    Arrange task{};
    task.from = from;
    task.width = width;
    task.norm_weight = weight;
    task.norm_bias = bias;
    task.eps = static_cast<float>(eps);
    task.to = to;
    task.scales = w_.scales;
    launch_kernel(op_, arrange_rows<kType>, blocks(rows_), kThreads, 0, stream_, task);
  }

  template <int kTiles>
  void multiply_tiles(const PackedLinear& layer, const Activations& from, Epilogue epilogue, float* out,
                      int64_t stride) const {
    Product task{};
    task.layer = layer;
    task.from = from;
    task.scales = w_.scales;
    task.rows = rows_;
    task.row_tiles = blocks(divide_up(rows_, kTiles * kRowGroup));
    task.epilogue = epilogue;
    task.out = out;
    task.stride = stride;
    task.to = wide();
    // Four panels per block if that still leaves a block for every third multiprocessor: the shared L2 then keeps them
    // supplied.
    const int64_t panels = divide_up(layer.outputs, kPanel);
    const bool many = kTiles > 1 && 3 * divide_up(panels, kMostPanels) * task.row_tiles >= device_.multiprocessors;
    task.panels_of_block = many ? kMostPanels : 1;
    const size_t shared = sizeof(float) * kWarps * kSumWords<kType, kTiles>;
    launch_kernel(op_, multiply_rows<kType, kTiles>, blocks(divide_up(panels, task.panels_of_block) * task.row_tiles),
                  kThreads, shared, stream_, task);
  }

  const char* op_;
  const PackedStack& stack_;
  const Work& w_;
  float* x_;
  int64_t rows_;
  void* stream_;
  DeviceLimits device_;
};

template <WeightType kType>
void launch_step(const TransformerStepParams& p, void* stream) {
  Work w{};
  lay_out(p, w);
  const Launches<kType> launches("transformer_step", p.stack, w, p.y, p.batch * p.count, stream);
  launches.begin(p.x, nullptr);
  launches.stack(p.keys, p.values, p.count, p.capacity, p.length, p.step);
}

template <WeightType kType>
void launch_decode(const DepthDecodeParams& p, void* stream) {
  constexpr const char* kOp = "depth_decode";
  Work w{};
  lay_out(p, w);
  const int64_t width = p.stack.width;
  const Launches<kType> launches(kOp, p.stack, w, w.x, rows_of(p), stream);
  launches.begin(p.context, p.positions);
  PackedClassifier classifier(p.classifier, kType, width);
  PackedLinear linear{};
  for (int64_t d = 0; d < p.depth; ++d) {
    launches.stack(w.keys, w.values, 1, p.depth, d, nullptr);
    if (d < p.classifiers) linear = classifier.linears.linear(p.num_codes, width);
    launches.norm(classifier.norm_weight, classifier.norm_bias, p.classifier_eps);
    if (p.given != nullptr) {
      launches.multiply(linear, launches.narrow(), Epilogue::kStore, p.logits + d * p.num_codes, p.depth * p.num_codes);
      if (d + 1 == p.depth) break;
    } else {
      launches.multiply(linear, launches.narrow(), Epilogue::kStore, w.logits, p.num_codes);
    }
    SampleTask task{};
    task.logits = p.given == nullptr ? w.logits : nullptr;
    task.rows = p.rows;
    task.num_codes = p.num_codes;
    task.width = width;
    task.guided = p.guidance > 0;
    task.more = static_cast<float>(1 + p.guidance);
    task.less = static_cast<float>(p.guidance);
    if (p.given == nullptr) task.settings = p.settings[d];
    task.seed = p.seed;
    task.offset = p.offset;
    task.stream = p.stream;
    task.step = p.step;
    task.given = p.given;
    task.codes = p.codes;
    task.d = d;
    task.depth = p.depth;
    task.vectors = p.vectors + d * p.vectors_stride;
    task.accumulate = d > 0 && p.cumulative;
    task.sums = w.sums;
    task.next_position = d + 1 < p.depth ? p.positions + (d + 1) * width : nullptr;
    task.x = w.x;
    launch_kernel(kOp, sample_rows, static_cast<unsigned>(p.rows), kSampleThreads, 0, stream, task);
  }
}

}  // namespace
}  // namespace depth_decode

int64_t workspace_bytes(const TransformerStepParams& p) {
  depth_decode::Work w{};
  return depth_decode::lay_out(p, w);
}

int64_t workspace_bytes(const DepthDecodeParams& p) {
  depth_decode::Work w{};
  return depth_decode::lay_out(p, w);
}

void launch(const TransformerStepParams& p, void* stream) {
  switch (p.stack.type) {
    case WeightType::kFloat32:
      return depth_decode::launch_step<WeightType::kFloat32>(p, stream);
    case WeightType::kBFloat16:
      return depth_decode::launch_step<WeightType::kBFloat16>(p, stream);
    case WeightType::kInt8:
      return depth_decode::launch_step<WeightType::kInt8>(p, stream);
  }
}

void launch(const DepthDecodeParams& p, void* stream) {
  switch (p.stack.type) {
    case WeightType::kFloat32:
      return depth_decode::launch_decode<WeightType::kFloat32>(p, stream);
    case WeightType::kBFloat16:
      return depth_decode::launch_decode<WeightType::kBFloat16>(p, stream);
    case WeightType::kInt8:
      return depth_decode::launch_decode<WeightType::kInt8>(p, stream);
  }
}

}  // namespace rqk
