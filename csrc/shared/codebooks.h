// Preparation of codebooks for CPU kernels. For cpu.cpp files.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "common/tensors.h"

namespace rqk {
namespace {

// Number of codes sampled for the center: any vector would be correct.
constexpr int64_t kCenterSample = 256;
constexpr double kSmallOffset = 0.1;  // |center|^2 over the mean of |e|^2

// A vector near the mean of the codes; subtracting it makes a common offset of the data cost no digits.
struct CodebookCenter {
  std::vector<float> values;
  double norm;
};

// The center of codes (num_codes, channels). Zero if the offset is small, where centering does not pay off, and if a
// sampled code is not finite.
inline CodebookCenter codebook_center(const float* codes_kc, int64_t num_codes, int64_t channels) {
  const int64_t step = (num_codes + kCenterSample - 1) / kCenterSample, sampled = (num_codes + step - 1) / step;
  double squared = 0, spread = 0;
  std::vector<double> sum(static_cast<size_t>(channels), 0.0);
  for (int64_t k = 0; k < num_codes; k += step) {
    for (int64_t c = 0; c < channels; ++c) {
      const double e = codes_kc[k * channels + c];
      sum[c] += e;
      spread += e * e / static_cast<double>(sampled);
    }
  }
  CodebookCenter center{std::vector<float>(sum.size()), 0};
  for (size_t c = 0; c < sum.size(); ++c) {
    center.values[c] = static_cast<float>(sum[c] / static_cast<double>(sampled));
    squared += double(center.values[c]) * double(center.values[c]);
  }
  // The negated comparison also catches NaN.
  if (!(squared >= kSmallOffset * spread && std::isfinite(squared))) {
    std::fill(center.values.begin(), center.values.end(), 0.0f);
    squared = 0;
  }
  center.norm = std::sqrt(squared);
  return center;
}

// Throws the error for `count` codebooks (num_codes, channels) that are not finite; `name` is the argument's.
[[noreturn]] inline void refuse_not_finite(const char* op, const char* name, const float* values, int64_t count,
                                           int64_t num_codes, int64_t channels, bool per_depth) {
  const float* end = values + count * num_codes * channels;
  const float* bad = std::find_if(values, end, [](float value) { return !std::isfinite(value); });
  if (bad == end) value_error(op, ": ", name, " must be finite, and must not change during the call");
  const int64_t code = (bad - values) / channels;
  value_error(op, ": ", name, " must be finite, got ", number_text(*bad), " in code ", code % num_codes,
              per_depth ? " of depth " + std::to_string(code / num_codes) : "");
}

}  // namespace
}  // namespace rqk
