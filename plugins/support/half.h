// Floats from and to the bits of 16-bit types, rounded to nearest even.
#pragma once

#include <cstdint>

#include "chai/inline.h"

namespace chai {

CHAI_INLINE std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

CHAI_INLINE float float_of_bits(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

CHAI_INLINE float bfloat16_to_float(std::uint16_t bits) {
  return float_of_bits(static_cast<std::uint32_t>(bits) << 16);
}

CHAI_INLINE std::uint16_t bfloat16_from_float(float x) {
  const std::uint32_t bits = float_bits(x);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

CHAI_INLINE float half_to_float(std::uint16_t half) {
  // Exponent and mantissa moved to a float's place are the value times 2^-112, denormals included.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const bool special = (half & 0x7fffu) >= 0x7c00u;
  const std::uint32_t finite = float_bits(float_of_bits(magnitude) * 0x1p112f);
  return float_of_bits(sign | (special ? (magnitude | 0x7f800000u) : finite));
}

CHAI_INLINE std::uint16_t half_from_float(float x) {
  const std::uint32_t bits = float_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the denormal's bits, rounded
    half = float_bits(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

}  // namespace chai
