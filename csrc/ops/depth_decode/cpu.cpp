// Transformer decoding on the CPU: the sequence of the parts in cpu_simd.cpp, threads and scratch memory.
//
// A step of one row reads and multiplies each weight once, so it is bound by memory: with int8 at width 512, 12 + 4
// layers, K = 16384 and D = 4 that is 122 MB per position. Threads share a product by panels of outputs, and the work
// between two products is small. So a call is one parallel region, in which threads pass through about eight short
// phases per block (Phases). Up to kRowsAtOnce rows share one pass over the weights.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "common/cpu_capability.h"
#include "common/denormals.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "ops/depth_decode/kernel_table.h"
#include "ops/depth_decode/params.h"

namespace rqk {
namespace {

constexpr int64_t kRowsAtOnce = 64;
// Maximum bytes of weights per task of a product; smaller if that balances the threads. More would not improve the
// streaming rate.
constexpr int64_t kTaskBytes = int64_t(1) << 17;

int64_t bytes_per_weight(WeightType type) {
  return type == WeightType::kFloat32 ? 4 : type == WeightType::kBFloat16 ? 2 : 1;
}

// Scratch for a block of rows; all strides are padded.
class Memory {
 public:
  Memory(const PackedStack& stack, int64_t rows, int64_t threads, int64_t positions, int64_t num_codes = 0)
      : threads(threads),
        width(padded(stack.width)),
        qkv_width(padded(3 * stack.width)),
        hidden_width(padded(stack.hidden)),
        logits_width(padded(num_codes)),
        scores_width(divide_up(positions, 16) * 16),
        x(rows * width),
        normed(rows * width),
        qkv(rows * qkv_width),
        heads(rows * width),
        hidden(rows * hidden_width),
        logits(rows * logits_width),
        scores(threads * scores_width),
        scales(rows),
        sums(2 * rows),
        values(rows * std::max(width, hidden_width) * int64_t(sizeof(float))) {
    // Stays zero past the last channel.
    std::memset(x, 0, static_cast<size_t>(rows * width) * sizeof(float));
    std::memset(heads, 0, static_cast<size_t>(rows * width) * sizeof(float));
  }

  int64_t threads, width, qkv_width, hidden_width, logits_width, scores_width;
  Buffer<float> x, normed, qkv, heads, hidden, logits, scores, scales;
  Buffer<int32_t> sums;
  Buffer<uint8_t> values;
};

// The work of one thread in a call. All threads make the same calls in the same order.
class Worker {
 public:
  Worker(const DepthDecodeKernels& kernels, const PackedStack& stack, const Memory& memory, Phases& phases,
         int64_t thread)
      : kernels_(kernels), stack_(stack), memory_(memory), phases_(phases), thread_(thread) {}

  template <class Work>
  void phase(int64_t tasks, Work work) {
    phases_.run(phase_++, static_cast<uint32_t>(tasks), work);
  }

  // out = epilogue(linear(rows)), with the rows normalized first if norm weight and bias are given.
  void linear(const float* rows, int64_t stride, int64_t count, const float* norm_weight, const float* norm_bias,
              double eps, const PackedLinear& layer, float* out, int64_t out_stride, Epilogue epilogue) {
    const int64_t at_once = kernels_.rows_at_once(stack_.type);
    RowGroups groups{};
    groups.rows = count;
    groups.groups = divide_up(count, at_once);
    groups.inputs = padded(layer.inputs);
    groups.values = memory_.values;
    groups.scales = memory_.scales;
    groups.sums = memory_.sums;
    phase(groups.groups, [&](int64_t group) {
      const float* from = rows;
      if (norm_weight != nullptr) {
        for (int64_t i = groups.begin(group); i < groups.begin(group + 1); ++i) {
          kernels_.normalize(rows + i * stride, norm_weight, norm_bias, layer.inputs, eps,
                             memory_.normed + i * memory_.width);
        }
        from = memory_.normed;
      }
      kernels_.arrange(from, stride, stack_.type, groups, group);
    });
    const LinearTask task{layer, &groups, out, out_stride, epilogue};
    const int64_t panels = padded(layer.outputs) / kOutputPanel;
    const int64_t panel_bytes = padded(layer.inputs) * kOutputPanel * bytes_per_weight(stack_.type);
    const int64_t step = std::min(kTaskBytes / panel_bytes, panels / (2 * memory_.threads));
    const int64_t tasks = divide_up(panels, std::max<int64_t>(1, step));
    phase(tasks,
          [&](int64_t i) { kernels_.multiply(task, stack_.type, i * panels / tasks, (i + 1) * panels / tasks); });
  }

  // Runs the rows in memory.x, (batch, count), through the stack, in place. Caches are (layers, cache_batch, heads,
  // capacity, head_dim); these sequences are number first .. first + batch - 1.
  void stack(float* keys, float* values, int64_t cache_batch, int64_t capacity, int64_t first, int64_t batch,
             int64_t count, int64_t length) {
    const int64_t rows = batch * count, head_dim = stack_.width / stack_.heads;
    for (int64_t layer = 0; layer < stack_.layers; ++layer) {
      const PackedBlock w = stack_.block(layer);
      linear(memory_.x, memory_.width, rows, w.attention_norm_weight, w.attention_norm_bias, stack_.eps, w.qkv,
             memory_.qkv, memory_.qkv_width, Epilogue::kStore);
      phase(batch * stack_.heads, [&](int64_t task) {
        const int64_t b = task / stack_.heads, head = task % stack_.heads;
        const int64_t cache = (((layer * cache_batch + first + b) * stack_.heads) + head) * capacity * head_dim;
        HeadTask attention{};
        attention.qkv = memory_.qkv + b * count * memory_.qkv_width;
        attention.stride = memory_.qkv_width;
        attention.width = stack_.width;
        attention.head = head;
        attention.head_dim = head_dim;
        attention.count = count;
        attention.keys = keys + cache;
        attention.values = values + cache;
        attention.length = length;
        attention.out = memory_.heads + b * count * memory_.width;
        attention.out_stride = memory_.width;
        attention.scores = memory_.scores + thread_ * memory_.scores_width;
        kernels_.attend(attention);
      });
      linear(memory_.heads, memory_.width, rows, nullptr, nullptr, 0, w.out, memory_.x, memory_.width, Epilogue::kAdd);
      linear(memory_.x, memory_.width, rows, w.mlp_norm_weight, w.mlp_norm_bias, stack_.eps, w.mlp_in, memory_.hidden,
             memory_.hidden_width, stack_.activation == Activation::kGelu ? Epilogue::kGelu : Epilogue::kQuickGelu);
      linear(memory_.hidden, memory_.hidden_width, rows, nullptr, nullptr, 0, w.mlp_out, memory_.x, memory_.width,
             Epilogue::kAdd);
    }
  }

 private:
  const DepthDecodeKernels& kernels_;
  const PackedStack& stack_;
  const Memory& memory_;
  Phases& phases_;
  int64_t thread_;
  uint32_t phase_ = 0;
};

// As many threads as the smallest product of a block can use: 64 K multiplications take a thread a few microseconds,
// and synchronizing takes a good part of one.
int64_t threads_for(const PackedStack& stack, int64_t rows) {
  return std::min<int64_t>(torch::stable::get_num_threads(), 1 + rows * stack.width * stack.width / (1 << 16));
}

}  // namespace

void launch(const TransformerStepParams& p, void*) {
  const DepthDecodeKernels& kernels = RQK_KERNEL_TABLE(depth_decode_kernels);
  const int64_t width = p.stack.width;
  const int64_t length = p.length + (p.step == nullptr ? 0 : *p.step);
  const int64_t at_once = std::max<int64_t>(1, std::min(p.batch, kRowsAtOnce / p.count));
  const int64_t threads = threads_for(p.stack, at_once * p.count);
  const Memory memory(p.stack, at_once * p.count, threads, length + p.count);
  for (int64_t first = 0; first < p.batch; first += at_once) {
    const int64_t batch = std::min(at_once, p.batch - first), rows = batch * p.count;
    const float* x = p.x + first * p.count * width;
    float* y = p.y + first * p.count * width;
    for (int64_t i = 0; i < rows; ++i) std::copy_n(x + i * width, width, memory.x + i * memory.width);
    Phases phases;
    for_each_task<FlushDenormals>(threads, [&](int64_t thread) {
      Worker(kernels, p.stack, memory, phases, thread)
          .stack(p.keys, p.values, p.batch, p.capacity, first, batch, p.count, length);
    });
    for (int64_t i = 0; i < rows; ++i) std::copy_n(memory.x + i * memory.width, width, y + i * width);
  }
}

void launch(const DepthDecodeParams& p, void*) {
  const DepthDecodeKernels& kernels = RQK_KERNEL_TABLE(depth_decode_kernels);
  const PackedStack& stack = p.stack;
  const int64_t width = stack.width, copies = p.guidance > 0 ? 2 : 1;
  const int64_t at_once = std::min(p.rows, kRowsAtOnce / copies), threads = threads_for(stack, at_once * copies);
  const int64_t stream = p.stream + (p.step == nullptr ? 0 : *p.step * p.depth);
  const Memory memory(stack, at_once * copies, threads, p.depth, p.num_codes);
  const Buffer<float> sums(at_once * width);
  const int64_t cache_size = stack.layers * at_once * copies * p.depth * width;
  const Buffer<float> keys(cache_size), values(cache_size);
  const size_t scratch_bytes = (kernels.sample_scratch_bytes(p.num_codes) + 63) / 64 * 64;
  const Buffer<uint8_t> scratch(threads * static_cast<int64_t>(scratch_bytes));
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> bad_row{kNone};

  for (int64_t first = 0; first < p.rows; first += at_once) {
    const int64_t rows = std::min(at_once, p.rows - first), all_rows = rows * copies;
    // Input of depth 0.
    for (int64_t i = 0; i < all_rows; ++i) {
      const float* context = p.context + (i / rows * p.rows + first + i % rows) * width;
      for (int64_t c = 0; c < width; ++c) memory.x[i * memory.width + c] = context[c] + p.positions[c];
    }
    // Sets the input of the next depth, given the code of row i at depth d.
    auto feed = [&](int64_t i, int64_t d, int64_t code) {
      const float* vector = p.vectors + d * p.vectors_stride + code * width;
      const float* position = p.positions + (d + 1) * width;
      float* sum = sums + i * width;
      for (int64_t c = 0; c < width; ++c) {
        sum[c] = d == 0 || !p.cumulative ? vector[c] : sum[c] + vector[c];
        for (int64_t copy = 0; copy < copies; ++copy)
          memory.x[(i + copy * rows) * memory.width + c] = sum[c] + position[c];
      }
    };
    Phases phases;
    for_each_task<FlushDenormals>(threads, [&](int64_t thread) {
      Worker worker(kernels, stack, memory, phases, thread);
      PackedClassifier classifier(p.classifier, stack.type, width);
      PackedLinear linear{};
      // Per depth: the stack, the classifier, then one code per row.
      for (int64_t d = 0; d < p.depth; ++d) {
        worker.stack(keys, values, all_rows, p.depth, 0, all_rows, 1, d);
        if (d < p.classifiers) linear = classifier.linears.linear(p.num_codes, width);
        worker.linear(memory.x, memory.width, all_rows, classifier.norm_weight, classifier.norm_bias, p.classifier_eps,
                      linear, memory.logits, memory.logits_width, Epilogue::kStore);
        worker.phase(rows, [&](int64_t i) {
          float* logits = memory.logits + i * memory.logits_width;
          const int64_t place = (first + i) * p.depth + d;
          int64_t code;
          if (p.given != nullptr) {
            std::copy_n(logits, p.num_codes, p.logits + place * p.num_codes);
            code = p.given[place];
          } else {
            if (copies == 2) {
              const float* null = memory.logits + (rows + i) * memory.logits_width;
              const float more = static_cast<float>(1 + p.guidance), less = static_cast<float>(p.guidance);
              for (int64_t k = 0; k < p.num_codes; ++k) logits[k] = more * logits[k] - less * null[k];
            }
            const double uniform = philox_uniform(p.seed, static_cast<uint64_t>(p.offset + first + i),
                                                  static_cast<uint32_t>(stream + d), kPhiloxSampleLogits);
            code = kernels.sample_row(logits, p.num_codes, p.settings[d], uniform, scratch + thread * scratch_bytes);
            if (code < 0) {
              int64_t seen = bad_row.load();
              while (first + i < seen && !bad_row.compare_exchange_weak(seen, first + i)) {
              }
              code = 0;
            }
            p.codes[place] = code;
          }
          if (d + 1 < p.depth) feed(i, d, code);
        });
      }
    });
  }
  if (bad_row != kNone) *p.bad_row = bad_row;
}

}  // namespace rqk
