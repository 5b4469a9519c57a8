// The nearest of several codes by exact distance, for the host and for kernels.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace rqk {

// Codes may come in any order: of equal distances the lower index wins.
struct Nearest {
  int64_t code = -1;  // none yet
  double distance = 0;

  RQK_HD void update(int64_t k, double d) {
    if (code >= 0 && !(d < distance || (d == distance && k < code))) return;
    distance = d;
    code = k;
  }
};

}  // namespace rqk
