// Vectors of floats as the compiler's vector type, as wide as the instruction set this file is compiled for.
//
// Included by kernels.cpp alone, inside the namespace CHAI_ISA: one translation unit per instruction set. No
// inline function of the standard library may be called from here on (see chai/inline.h for why).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "chai/softmax_state.h"
#include "support/half.h"

#if defined(__AVX512F__) || defined(CHAI_TEST_WIDE)
#define CHAI_LANES 16
#elif defined(__AVX2__)
#define CHAI_LANES 8
#else
#define CHAI_LANES 4
#endif

namespace chai {
namespace CHAI_ISA {

constexpr int kLanes = CHAI_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef float Quad __attribute__((vector_size(16)));
typedef std::int32_t IntQuad __attribute__((vector_size(16)));

// Storage types are bits only; arithmetic is float.
struct Float16 {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

template <typename To, typename From>
CHAI_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

CHAI_INLINE Vec splat(float x) {
  return x - Vec{};
}
CHAI_INLINE IntVec splat(std::int32_t x) {
  return x - IntVec{};
}

// 0, 1, 2, …
CHAI_INLINE Vec lane_numbers() {
  constexpr float kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec v;
  __builtin_memcpy(&v, kNumbers, sizeof(v));
  return v;
}

// --- Loads: kLanes elements of storage as floats ---------------------------------------------------------

CHAI_INLINE Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

CHAI_INLINE Quad load_four(const float* from) {
  Quad q;
  __builtin_memcpy(&q, from, sizeof(q));
  return q;
}

// Four floats in the first lanes, zeros in the others.
CHAI_INLINE Vec widened(Quad q) {
#if defined(__AVX512F__)
  return _mm512_zextps128_ps512(q);
#elif defined(__AVX2__) && CHAI_LANES == 8
  return _mm256_zextps128_ps256(q);
#else
  Vec v = {};
  __builtin_memcpy(&v, &q, sizeof(q));
  return v;
#endif
}

CHAI_INLINE UintVec load_bits(const void* from) {
  HalfVec half;
  __builtin_memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, UintVec);
}

CHAI_INLINE Vec load(const Bfloat16* from) {
  return bit_cast<Vec>(load_bits(from) << 16);
}

#if defined(__F16C__) && CHAI_LANES == 8
CHAI_INLINE Vec load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__AVX512F__)
CHAI_INLINE Vec load(const Float16* from) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
CHAI_INLINE Vec load(const Float16* from) {
  // Exponent and mantissa moved to a float's place are the value times 2^-112, denormals included.
  const UintVec bits = load_bits(from);
  const UintVec magnitude = (bits & 0x7fffu) << 13;
  const UintVec finite = bit_cast<UintVec>(bit_cast<Vec>(magnitude) * 0x1p112f);
  const UintVec special = magnitude | 0x7f800000u;
  const UintVec is_special = bit_cast<UintVec>((bits & 0x7fffu) >= 0x7c00u);
  return bit_cast<Vec>((is_special & special) | (~is_special & finite) | ((bits & 0x8000u) << 16));
}
#endif

CHAI_INLINE float load_one(const float* from) {
  return *from;
}
CHAI_INLINE float load_one(const Bfloat16* from) {
  return bfloat16_to_float(from->bits);
}
CHAI_INLINE float load_one(const Float16* from) {
  return half_to_float(from->bits);
}

// kLanes bytes as integers, and signed ones as floats.
typedef std::uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef std::int8_t SignedByteVec __attribute__((vector_size(kLanes)));

CHAI_INLINE IntVec load_bytes(const std::uint8_t* from) {
#if defined(__AVX512F__)
  return bit_cast<IntVec>(
      _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__) && CHAI_LANES == 8
  return bit_cast<IntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  ByteVec bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, IntVec);
#endif
}

CHAI_INLINE Vec to_floats(IntVec v) {
  return __builtin_convertvector(v, Vec);
}

CHAI_INLINE Vec load(const std::int8_t* from) {
#if defined(__AVX512F__)
  return to_floats(bit_cast<IntVec>(
      _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif defined(__AVX2__) && CHAI_LANES == 8
  return to_floats(
      bit_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  SignedByteVec bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return to_floats(__builtin_convertvector(bytes, IntVec));
#endif
}

// --- Stores: floats to storage, rounded to nearest even --------------------------------------------------

CHAI_INLINE void store(float* to, Vec v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

CHAI_INLINE void store_four(float* to, Quad q) {
  __builtin_memcpy(to, &q, sizeof(q));
}

CHAI_INLINE void store_one(float* to, float x) {
  *to = x;
}

CHAI_INLINE void store_one(Bfloat16* to, float x) {
  to->bits = bfloat16_from_float(x);
}

CHAI_INLINE void store_one(Float16* to, float x) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  to->bits = half_from_float(x);
#endif
}

// --- Arithmetic ------------------------------------------------------------------------------------------

// Not a number on the left wins, so that it is never hidden.
CHAI_INLINE Vec larger(Vec a, Vec b) {
  return a < b ? b : a;
}

CHAI_INLINE Quad fold(Vec v) {
  Quad part[kLanes / 4];
  __builtin_memcpy(part, &v, sizeof(v));
#if CHAI_LANES == 16
  return (part[0] + part[1]) + (part[2] + part[3]);
#elif CHAI_LANES == 8
  return part[0] + part[1];
#else
  return part[0];
#endif
}

// Within each four lanes: the first two of a and b in turn, the last two; the first two of a, then of b, ….
#if CHAI_LANES == 16
constexpr IntVec kLowPairs = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
constexpr IntVec kHighPairs = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
constexpr IntVec kFirstTwo = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
constexpr IntVec kLastTwo = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
#elif CHAI_LANES == 8
constexpr IntVec kLowPairs = {0, 8, 1, 9, 4, 12, 5, 13};
constexpr IntVec kHighPairs = {2, 10, 3, 11, 6, 14, 7, 15};
constexpr IntVec kFirstTwo = {0, 1, 8, 9, 4, 5, 12, 13};
constexpr IntVec kLastTwo = {2, 3, 10, 11, 6, 7, 14, 15};
#else
constexpr IntVec kLowPairs = {0, 4, 1, 5};
constexpr IntVec kHighPairs = {2, 6, 3, 7};
constexpr IntVec kFirstTwo = {0, 1, 4, 5};
constexpr IntVec kLastTwo = {2, 3, 6, 7};
#endif

// The four sums of four vectors: added up together as long as they are wide.
CHAI_INLINE Quad sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = __builtin_shuffle(a, b, kLowPairs) + __builtin_shuffle(a, b, kHighPairs);
  const Vec cd = __builtin_shuffle(c, d, kLowPairs) + __builtin_shuffle(c, d, kHighPairs);
  return fold(__builtin_shuffle(ab, cd, kFirstTwo) + __builtin_shuffle(ab, cd, kLastTwo));
}

CHAI_INLINE float sum(Vec v) {
  const Quad q = fold(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

CHAI_INLINE float largest(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// 2^x for x <= 0, relative error below 1e-7; 0 below 2^-126; not a number stays one. The polynomial is a
// minimax fit of 2^f, |f| <= 1/2, made for this file.
CHAI_INLINE Vec exp2_nonpositive(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr float kSmallest = -126.0f;
  const Vec clamped = x < kSmallest ? splat(kSmallest) : x;
  const Vec shifted = clamped + kRound;
  const Vec fraction = clamped - (shifted - kRound);
  Vec power = splat(0.0001534581242594868f);
  power = power * fraction + 0.0013399930903688073f;
  power = power * fraction + 0.009618489071726799f;
  power = power * fraction + 0.05550328642129898f;
  power = power * fraction + 0.24022646248340607f;
  power = power * fraction + 0.6931471824645996f;
  power = power * fraction + 1.0f;
  const IntVec exponent = bit_cast<IntVec>(shifted) - bit_cast<std::int32_t>(kRound);
  const Vec scale = bit_cast<Vec>((exponent + 127) << 23);
  return x < kSmallest ? Vec{} : power * scale;
}

// tanh(x), relative error below 1e-6 but near 0, where the error is absolute.
CHAI_INLINE Vec tanh_of(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec e = exp2_nonpositive(size * -2.8853900817779268f);  // exp(-2 |x|)
  const Vec t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

// Elements alternating from a and b: the first half of the result, and the second.
#if CHAI_LANES == 16
constexpr IntVec kFirstHalf = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
constexpr IntVec kSecondHalf = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#elif CHAI_LANES == 8
constexpr IntVec kFirstHalf = {0, 8, 1, 9, 2, 10, 3, 11};
constexpr IntVec kSecondHalf = {4, 12, 5, 13, 6, 14, 7, 15};
#else
constexpr IntVec kFirstHalf = {0, 4, 1, 5};
constexpr IntVec kSecondHalf = {2, 6, 3, 7};
#endif

CHAI_INLINE std::int64_t least(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
CHAI_INLINE std::int64_t most(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}
CHAI_INLINE std::int64_t round_up(std::int64_t n, std::int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// n elements of storage as floats, times a factor.
template <typename T>
CHAI_INLINE void widen(float* to, const T* from, std::int64_t n, float factor) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i) * factor);
  for (; i < n; ++i) to[i] = load_one(from + i) * factor;
}

// n floats, times a factor, as storage.
template <typename T>
CHAI_INLINE void narrow(T* to, const float* from, std::int64_t n, float factor) {
  for (std::int64_t i = 0; i < n; ++i) store_one(to + i, from[i] * factor);
}

}  // namespace CHAI_ISA
}  // namespace chai
