// Sampling settings, as CPU and GPU kernels read them.
#pragma once

#include <cstdint>

namespace rqk {

struct SampleSettings {
  double temperature;  // finite, >= 0; 0 takes the largest logit
  int64_t top_k;       // >= 1; num_codes or more keeps all
  double top_p;        // in (0, 1]; 1 keeps all
};

}  // namespace rqk
