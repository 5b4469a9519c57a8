// The floating-point types that operators read and write without conversion.
#pragma once

#include <cstdint>

namespace rqk {

enum class FloatType : int32_t { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t size_of(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

}  // namespace rqk
