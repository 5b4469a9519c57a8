// rqkernels::transformer_step and depth_decode: schemas, argument checks, tensors to params.
#include <cmath>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/tensors.h"
#include "ops/depth_decode/params.h"

namespace {

using rqk::ScalarType;
using rqk::Tensor;

constexpr const char* kStep = "transformer_step";
constexpr const char* kDecode = "depth_decode";
constexpr const char* kLogits = "depth_logits";
constexpr int64_t kStreams = int64_t(1) << 32;

rqk::WeightType weight_type(const char* op, const std::string& name) {
  if (name == "fp32") return rqk::WeightType::kFloat32;
  if (name == "bf16") return rqk::WeightType::kBFloat16;
  if (name == "int8") return rqk::WeightType::kInt8;
  rqk::value_error(op, ": precision must be fp32, bf16 or int8, got '", name, "'");
}

rqk::Activation activation_of(const char* op, const std::string& name) {
  if (name == "gelu") return rqk::Activation::kGelu;
  if (name == "quick_gelu") return rqk::Activation::kQuickGelu;
  rqk::value_error(op, ": activation must be gelu or quick_gelu, got '", name, "'");
}

// Requires contiguous float32 and never copies: a copy would hide writes, or cost time at each step.
const float* floats_of(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() != ScalarType::Float || !t.is_contiguous()) {
    rqk::value_error(op, ": ", name, " must be contiguous float32, got shape ", rqk::shape_of(t));
  }
  return t.const_data_ptr<float>();
}

const uint8_t* packed_of(const char* op, const char* name, const Tensor& packed, int64_t bytes) {
  if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || !packed.is_contiguous() ||
      packed.numel() != bytes || reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 64 != 0) {
    rqk::value_error(op, ": ", name, " must be ", bytes, " packed bytes at a multiple of 64, got ",
                     rqk::shape_of(packed));
  }
  return packed.const_data_ptr<uint8_t>();
}

// Norms add eps in float32.
void check_eps(const char* op, const char* name, double eps) {
  if (!(eps >= 0 && std::isfinite(static_cast<float>(eps)))) {
    rqk::value_error(op, ": ", name, " must be a finite number >= 0, got ", rqk::number_text(eps));
  }
}

// Far above any model; the size of such a packed stack fits int64.
constexpr int64_t kMostLayers = 4096, kMostWidth = 32768, kMostDepth = 32768;

rqk::PackedStack stack_of(const char* op, const Tensor& blocks, int64_t layers, int64_t width, int64_t hidden,
                          int64_t heads, const std::string& activation, const std::string& precision, double eps) {
  if (layers < 0 || layers > kMostLayers || width < 1 || width > kMostWidth || hidden < 1 || hidden > kMostWidth ||
      heads < 1 || width % heads != 0) {
    rqk::value_error(op, ": layers must be in [0, ", kMostLayers, "], width and hidden in [1, ", kMostWidth,
                     "], heads a divisor of width; got ", layers, ", ", width, ", ", hidden, " and ", heads);
  }
  check_eps(op, "eps", eps);
  rqk::PackedStack stack{};
  stack.blocks = blocks.const_data_ptr<uint8_t>();
  stack.layers = layers;
  stack.width = width;
  stack.hidden = hidden;
  stack.heads = heads;
  stack.type = weight_type(op, precision);
  stack.activation = activation_of(op, activation);
  stack.eps = eps;
  packed_of(op, "blocks", blocks, layers * stack.block_bytes());
  return stack;
}

const int64_t* step_of(const char* op, const char* name, const Tensor& like, const std::optional<Tensor>& step) {
  if (!step.has_value()) return nullptr;
  rqk::check_same_device(op, name, like, "step", *step);
  if (step->scalar_type() != ScalarType::Long || step->numel() != 1) {
    rqk::value_error(op, ": step must be one int64 number, got ", rqk::shape_of(*step));
  }
  return step->const_data_ptr<int64_t>();
}

Tensor transformer_step(Tensor x, Tensor blocks, Tensor keys, Tensor values, int64_t length, std::optional<Tensor> step,
                        int64_t layers, int64_t hidden, int64_t heads, std::string activation, std::string precision,
                        double eps) {
  if (x.dim() != 2 && x.dim() != 3) rqk::value_error(kStep, ": x must be (B, W) or (B, n, W), got ", rqk::shape_of(x));
  for (const auto& [name, tensor] : {std::pair{"x", x}, {"keys", keys}, {"values", values}}) {
    rqk::check_elements(kStep, name, tensor);
  }
  const int64_t batch = x.size(0), count = x.dim() == 3 ? x.size(1) : 1, width = x.size(x.dim() - 1);
  rqk::TransformerStepParams params{};
  params.stack = stack_of(kStep, blocks, layers, width, hidden, heads, activation, precision, eps);
  const std::vector<int64_t> sizes = rqk::sizes_of(keys);
  const std::vector<int64_t> expected{layers, batch, heads, sizes.size() == 5 ? sizes[3] : 0, width / heads};
  if (sizes != expected || rqk::sizes_of(values) != expected) {
    rqk::value_error(kStep, ": keys and values must be (", layers, ", ", batch, ", ", heads, ", capacity, ",
                     width / heads, "), got ", rqk::shape_of(keys), " and ", rqk::shape_of(values));
  }
  // Written so that no sum overflows.
  if (length < 0 || length > sizes[3] - count) {
    rqk::value_error(kStep, ": length ", length, " and ", count, " new positions do not fit the keys' capacity ",
                     sizes[3]);
  }
#ifdef RQK_CUDA_LIBRARY
  if (sizes[3] * (width / heads) > INT32_MAX) {
    rqk::value_error(kStep, ": keys must have fewer than 2^31 elements per head on CUDA, got ", rqk::shape_of(keys));
  }
#endif
  for (const auto& [name, tensor] : {std::pair{"blocks", blocks}, {"keys", keys}, {"values", values}}) {
    rqk::check_same_device(kStep, "x", x, name, tensor);
  }
  const Tensor x_read = rqk::contiguous(x);  // torch passes a zero tensor without storage as one element with strides
                                             // of 0
  params.x = floats_of(kStep, "x", x_read);
  floats_of(kStep, "keys", keys);
  floats_of(kStep, "values", values);
  if (rqk::may_overlap(keys, values)) rqk::value_error(kStep, ": keys and values must not share memory");
  if (rqk::may_overlap(x, keys) || rqk::may_overlap(x, values)) {
    rqk::value_error(kStep, ": x must not share memory with keys or values");
  }
  params.step = step_of(kStep, "x", x, step);
#ifndef RQK_CUDA_LIBRARY
  if (params.step != nullptr && (*params.step < 0 || *params.step > sizes[3] - count - length)) {
    rqk::value_error(kStep, ": length ", length, ", step ", *params.step, " and ", count,
                     " new positions do not fit the keys' capacity ", sizes[3]);
  }
#endif
  rqk::LaunchScope scope(x);
  const Tensor y = rqk::empty(rqk::sizes_of(x), ScalarType::Float, x);
  params.keys = keys.mutable_data_ptr<float>();
  params.values = values.mutable_data_ptr<float>();
  params.y = y.mutable_data_ptr<float>();
  params.batch = batch;
  params.count = count;
  params.capacity = sizes[3];
  params.length = length;
  if (x.numel() == 0) return y;
#ifdef RQK_CUDA_LIBRARY
  const Tensor workspace = rqk::empty({rqk::workspace_bytes(params)}, ScalarType::Byte, x);
  params.workspace = workspace.mutable_data_ptr<uint8_t>();
#endif
  rqk::launch(params, scope.stream());
  return y;
}

std::vector<rqk::SampleSettings> settings_of(const std::vector<double>& temperature, const std::vector<int64_t>& top_k,
                                             const std::vector<double>& top_p, int64_t depth) {
  const size_t expected = static_cast<size_t>(depth);
  if (temperature.size() != expected || top_k.size() != expected || top_p.size() != expected) {
    rqk::value_error(kDecode, ": temperature, top_k and top_p must have ", depth, " values, one per depth; got ",
                     temperature.size(), ", ", top_k.size(), " and ", top_p.size());
  }
  std::vector<rqk::SampleSettings> settings;
  for (size_t d = 0; d < expected; ++d) {
    if (!(temperature[d] >= 0 && std::isfinite(temperature[d]))) {
      rqk::value_error(kDecode, ": temperature must be a finite number >= 0, got ", rqk::number_text(temperature[d]));
    }
    if (top_k[d] < 1) rqk::value_error(kDecode, ": top_k must be >= 1, got ", top_k[d]);
    if (!(top_p[d] > 0 && top_p[d] <= 1)) {
      rqk::value_error(kDecode, ": top_p must be in (0, 1], got ", rqk::number_text(top_p[d]));
    }
    settings.push_back({temperature[d], top_k[d], top_p[d]});
  }
  return settings;
}

// `seed` holds the 64 bits of an unsigned integer; top_k = num_codes and top_p = 1 keep all codes.
std::tuple<Tensor, Tensor> depth_decode(Tensor context, Tensor blocks, Tensor classifier, Tensor positions,
                                        Tensor vectors, int64_t num_codes, bool classifier_per_depth, bool cumulative,
                                        int64_t layers, int64_t hidden, int64_t heads, std::string activation,
                                        std::string precision, double eps, double classifier_eps,
                                        std::vector<double> temperature, std::vector<int64_t> top_k,
                                        std::vector<double> top_p, double guidance, int64_t seed, int64_t offset,
                                        int64_t stream, std::optional<Tensor> step, std::optional<Tensor> given) {
  const char* op = given.has_value() ? kLogits : kDecode;
  // Check shapes, counters and devices.
  if (positions.dim() != 2 || positions.size(0) < 1) {
    rqk::value_error(op, ": depth_positions must be (D, W), got ", rqk::shape_of(positions));
  }
  for (const auto& [name, tensor] :
       {std::pair{"context", context}, {"depth_positions", positions}, {"vectors", vectors}}) {
    rqk::check_elements(op, name, tensor);
  }
  const int64_t depth = positions.size(0), width = positions.size(1);
  if (depth > kMostDepth)
    rqk::value_error(op, ": depth_positions must have at most ", kMostDepth, " depths, got ", depth);
  if (context.dim() != 2 || context.size(1) != width) {
    rqk::value_error(op, ": context must be (B, ", width, "), got ", rqk::shape_of(context));
  }
  if (num_codes < 1 || num_codes > INT32_MAX) {
    rqk::value_error(op, ": num_codes must be in [1, 2^31), got ", num_codes);
  }
  if (vectors.dim() != 2 || vectors.size(1) != width ||
      (vectors.size(0) != num_codes && vectors.size(0) != depth * num_codes)) {
    rqk::value_error(op, ": vectors must be (", num_codes, ", ", width, ") or (", depth * num_codes, ", ", width,
                     "), got ", rqk::shape_of(vectors));
  }
  // The kernels use it in float32.
  if (!(guidance >= 0 && std::isfinite(static_cast<float>(1 + guidance)))) {
    rqk::value_error(op, ": guidance must be a finite number >= 0, got ", rqk::number_text(guidance));
  }
  const int64_t contexts = context.size(0), copies = guidance > 0 ? 2 : 1, rows = contexts / copies;
  if (contexts % copies != 0) {
    rqk::value_error(op, ": context must be (2 B, W) with guidance, got ", rqk::shape_of(context));
  }
  if (offset < 0 || offset > INT64_MAX - rows) {
    rqk::value_error(op, ": offset must be >= 0, and offset + rows below 2^63; got ", offset, " with ", rows, " rows");
  }
  if (stream < 0 || stream > kStreams - depth) {
    rqk::value_error(op, ": stream must be >= 0, and stream + D at most 2^32; got ", stream, " with D = ", depth);
  }
  for (const auto& [name, tensor] : {std::pair{"blocks", blocks},
                                     {"classifier", classifier},
                                     {"depth_positions", positions},
                                     {"vectors", vectors}}) {
    rqk::check_same_device(op, "context", context, name, tensor);
  }

  // Weights and inputs.
  rqk::DepthDecodeParams params{};
  check_eps(op, "classifier_eps", classifier_eps);
  params.stack = stack_of(op, blocks, layers, width, hidden, heads, activation, precision, eps);
  params.classifiers = classifier_per_depth ? depth : 1;
  rqk::PackedClassifier parts(classifier.const_data_ptr<uint8_t>(), params.stack.type, width);
  for (int64_t d = 0; d < params.classifiers; ++d) parts.linears.linear(num_codes, width);
  params.classifier = packed_of(op, "classifier", classifier, parts.linears.at - classifier.const_data_ptr<uint8_t>());
  params.classifier_eps = classifier_eps;
  params.positions = floats_of(op, "depth_positions", positions);
  params.vectors = floats_of(op, "vectors", vectors);
  params.vectors_stride = vectors.size(0) == num_codes ? 0 : num_codes * width;
  params.cumulative = cumulative;
  params.rows = rows;
  params.depth = depth;
  params.num_codes = num_codes;
  const Tensor context_read = rqk::contiguous(context);
  params.context = floats_of(op, "context", context_read);
  params.guidance = guidance;
  params.step = step_of(op, "context", context, step);
#ifndef RQK_CUDA_LIBRARY
  if (params.step != nullptr && (*params.step < 0 || *params.step > (kStreams - depth - stream) / depth)) {
    rqk::value_error(op, ": step must be >= 0, and stream + (step + 1) D at most 2^32; got ", *params.step,
                     " with stream = ", stream, " and D = ", depth);
  }
#endif
  // Given codes, or settings to sample by.
  std::vector<rqk::SampleSettings> settings;
  if (given.has_value()) {
    rqk::check_same_device(op, "context", context, "codes", *given);
    rqk::check_elements(op, "codes", *given);
    if (given->scalar_type() != ScalarType::Long || rqk::sizes_of(*given) != std::vector<int64_t>{rows, depth}) {
      rqk::value_error(op, ": codes must be contiguous int64 (", rows, ", ", depth, "), got ", rqk::shape_of(*given));
    }
    given = rqk::contiguous(*given);
    params.given = given->const_data_ptr<int64_t>();
#ifndef RQK_CUDA_LIBRARY
    for (int64_t i = 0; i < rows * depth; ++i) {
      if (params.given[i] < 0 || params.given[i] >= num_codes) {
        rqk::index_error(op, ": codes must be in [0, ", num_codes, "), got ", params.given[i]);
      }
    }
#endif
  } else {
    settings = settings_of(temperature, top_k, top_p, depth);
    params.settings = settings.data();
  }
  // Either codes are sampled, or logits of the given codes are returned; the other result has no elements.
  using Sizes = std::vector<int64_t>;
  const bool samples = !given.has_value();
  const Tensor codes = rqk::empty(samples ? Sizes{rows, depth} : Sizes{0}, ScalarType::Long, context);
  const Tensor logits = rqk::empty(samples ? Sizes{0} : Sizes{rows, depth, num_codes}, ScalarType::Float, context);
  if (samples) {
    params.codes = codes.mutable_data_ptr<int64_t>();
  } else {
    params.logits = logits.mutable_data_ptr<float>();
  }
  params.seed = static_cast<uint64_t>(seed);
  params.offset = offset;
  params.stream = stream;
  int64_t bad_row = -1;
  params.bad_row = &bad_row;
  rqk::LaunchScope scope(context);
  if (rows == 0) return {codes, logits};
#ifdef RQK_CUDA_LIBRARY
  const Tensor workspace = rqk::empty({rqk::workspace_bytes(params)}, ScalarType::Byte, context);
  params.workspace = workspace.mutable_data_ptr<uint8_t>();
#endif
  rqk::launch(params, scope.stream());
  if (bad_row >= 0) {
    rqk::value_error(op, ": context: the logits of row ", bad_row, " have NaN, +inf, or nothing but -inf");
  }
  return {codes, logits};
}

#ifndef RQK_CUDA_LIBRARY
// Copies packed weights to 2 MiB pages if the system has them: streaming is then a quarter faster, since it stops at
// page boundaries and TLB misses.
Tensor copy_to_large_pages(Tensor packed) {
  if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || !packed.is_contiguous() || packed.is_cuda()) {
    rqk::value_error("copy_to_large_pages: packed must be contiguous bytes on the cpu, got ", rqk::shape_of(packed));
  }
  const Tensor copy = rqk::empty({packed.numel()}, ScalarType::Byte, packed);
  uint8_t* bytes = copy.mutable_data_ptr<uint8_t>();
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(bytes) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(bytes) + static_cast<uintptr_t>(packed.numel())) / kPage * kPage;
  // Best-effort hint; failure is harmless.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  std::memcpy(bytes, packed.const_data_ptr(), static_cast<size_t>(packed.numel()));
  return copy;
}
#endif

}  // namespace

#ifndef RQK_CUDA_LIBRARY
RQK_REGISTER("copy_to_large_pages", "copy_to_large_pages(Tensor packed) -> Tensor", copy_to_large_pages)
#endif
RQK_REGISTER(
    "transformer_step",
    "transformer_step(Tensor x, Tensor blocks, Tensor(a!) keys, Tensor(b!) values, SymInt length, Tensor? step,"
    " int layers, int hidden, int heads, str activation, str precision, float eps) -> Tensor",
    transformer_step)
RQK_REGISTER("depth_decode",
             "depth_decode(Tensor context, Tensor blocks, Tensor classifier, Tensor depth_positions, Tensor vectors,"
             " int num_codes, bool classifier_per_depth, bool cumulative,"
             " int layers, int hidden, int heads, str activation, str precision, float eps, float classifier_eps,"
             " float[] temperature, int[] top_k, float[] top_p, float guidance,"
             " SymInt seed, SymInt offset, SymInt stream, Tensor? step, Tensor? codes)"
             " -> (Tensor codes, Tensor logits)",
             depth_decode)
