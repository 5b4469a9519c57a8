// Turns flushing of denormals off for the thread that holds one, and back to what it was. torch.set_flush_denormal
// would otherwise change which of two tiny distances is smaller, thread by thread.
#pragma once

#ifdef RQK_X86
#include <xmmintrin.h>
#endif

namespace rqk {

class KeepDenormals {
#ifdef RQK_X86
 public:
  KeepDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero)); }
  ~KeepDenormals() { _mm_setcsr(saved_); }
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#else
 public:
  KeepDenormals() {}
#endif
};

}  // namespace rqk
