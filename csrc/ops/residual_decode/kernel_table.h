// The part of the CPU decode that is compiled once per instruction set, as cpu.cpp calls it.
#pragma once

#include <cstdint>

#include "ops/residual_decode/params.h"

namespace rqk {

// Decodes rows [begin, end); returns whether all their codes were good.
using DecodeRows = bool (*)(const ResidualDecodeParams&, int64_t begin, int64_t end);

namespace default_ {
bool decode_rows(const ResidualDecodeParams&, int64_t begin, int64_t end);
}
namespace avx2 {
bool decode_rows(const ResidualDecodeParams&, int64_t begin, int64_t end);
}
namespace avx512 {
bool decode_rows(const ResidualDecodeParams&, int64_t begin, int64_t end);
}

}  // namespace rqk
