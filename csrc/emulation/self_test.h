// Kernels that test the emulation: correct ones, and one for each kind of bug that must be detected.
#pragma once

#include <cstdint>

namespace rqk::emulation {

struct SelfTestParams {
  const int32_t* in;  // (elements)
  int32_t* out;       // (elements)
  int64_t elements;
};

struct SelfTest {
  const char* name;
  void (*launch)(const SelfTestParams&);
};

extern const SelfTest self_tests[];
extern const int num_self_tests;

}  // namespace rqk::emulation
