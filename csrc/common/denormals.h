// Denormal handling of the current thread, for the lifetime of an object. Without it torch.set_flush_denormal would
// decide, thread by thread.
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

// Keeps denormal operands and results: of two tiny distances, the smaller one must stay recognizable.
using KeepDenormals = DenormalResults<false>;
// Flushes denormal results to zero: they contribute nothing to a sum of probabilities, and each costs over a hundred
// cycles. Operands are kept. Without effect outside x86, where denormals cost nothing.
using FlushDenormals = DenormalResults<true>;

}  // namespace rqk
