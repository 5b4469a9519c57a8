// How numbers below the normal ones are treated by the thread that holds one of these, until it is gone.
// torch.set_flush_denormal would otherwise decide, thread by thread.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace rqk {

template <bool kFlush>
class DenormalResults {
#if defined(__x86_64__)
 public:
  DenormalResults() : saved_(_mm_getcsr()) {
    _mm_setcsr((saved_ & ~(kFlushToZero | kDenormalsAreZero)) | (kFlush ? kFlushToZero : 0));
  }
  ~DenormalResults() { _mm_setcsr(saved_); }
  DenormalResults(const DenormalResults&) = delete;
  DenormalResults& operator=(const DenormalResults&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#else
 public:
  DenormalResults() {}
#endif
};

// Kept, in and out: of two tiny distances it must be clear which is smaller.
using KeepDenormals = DenormalResults<false>;
// Results become zero, which is all they are worth in a sum of probabilities: each costs over a hundred cycles
// otherwise. Operands are kept. (Elsewhere than on x86 they cost nothing, and stay.)
using FlushDenormals = DenormalResults<true>;

}  // namespace rqk
