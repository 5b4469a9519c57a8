// How a code is drawn from logits: the settings, as CPU and GPU kernels see them.
#pragma once

#include <cstdint>

namespace rqk {

struct SampleSettings {
  double temperature;  // finite, >= 0; 0: the largest logit
  int64_t top_k;       // >= 1; the number of codes or more: all
  double top_p;        // in (0, 1]; 1: all
};

}  // namespace rqk
