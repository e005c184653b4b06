// SPDX-License-Identifier: MIT
/// The vector layer: registers of float and int32 lanes over the compiler's vector extensions, as
/// wide as the instruction set that the translation unit is compiled for, with one-lane scalars
/// where the compiler has no such extensions. This is the only header that tests instruction-set
/// macros. All functions allocate nothing, have no state and may be called from any thread. Loads
/// and stores need no alignment and touch exactly the elements they name.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"

// 512-bit code uses byte and word instructions too; all processors with AVX-512 since Skylake-X
// have the four subsets.
#if SLUICE_HAS_VECTOR_EXTENSIONS && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512DQ__)
#define SLUICE_SIMD_AVX512 1
#else
#define SLUICE_SIMD_AVX512 0
#endif
#if SLUICE_HAS_VECTOR_EXTENSIONS && defined(__AVX__) && !SLUICE_SIMD_AVX512
#define SLUICE_SIMD_AVX 1
#else
#define SLUICE_SIMD_AVX 0
#endif
#if SLUICE_HAS_VECTOR_EXTENSIONS && defined(__SSE2__) && !SLUICE_SIMD_AVX && !SLUICE_SIMD_AVX512
#define SLUICE_SIMD_SSE 1
#else
#define SLUICE_SIMD_SSE 0
#endif

// An instruction that adds four products of an unsigned and a signed byte to each int32 lane.
#if (SLUICE_SIMD_AVX512 && defined(__AVX512VNNI__)) || (SLUICE_SIMD_AVX && defined(__AVXVNNI__))
#define SLUICE_SIMD_VNNI 1
#else
#define SLUICE_SIMD_VNNI 0
#endif

// An instruction that adds the products of two pairs of bf16 to each float lane.
#if SLUICE_SIMD_AVX512 && defined(__AVX512BF16__)
#define SLUICE_SIMD_BF16 1
#else
#define SLUICE_SIMD_BF16 0
#endif

namespace sluice::simd {

/// Lanes of a VecF and a VecI: 16 with AVX-512, 8 with AVX, 4 otherwise, 1 without extensions.
#if !SLUICE_HAS_VECTOR_EXTENSIONS
inline constexpr int kWidth = 1;
#elif SLUICE_SIMD_AVX512
inline constexpr int kWidth = 16;
#elif SLUICE_SIMD_AVX
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

/// Vector registers of the instruction set: what register blocking may count on.
#if SLUICE_SIMD_AVX512 || defined(__aarch64__)
inline constexpr int kNumRegisters = 32;
#else
inline constexpr int kNumRegisters = 16;
#endif

/// What this translation unit is compiled for.
#if SLUICE_SIMD_AVX512
inline constexpr const char* kSetName = "AVX-512";
#elif SLUICE_SIMD_AVX
inline constexpr const char* kSetName = "AVX";
#elif SLUICE_SIMD_SSE
inline constexpr const char* kSetName = "SSE2";
#else
inline constexpr const char* kSetName = "portable";
#endif

/// Whether fma() rounds once.
#if SLUICE_SIMD_AVX512 || defined(__FP_FAST_FMAF)
inline constexpr bool kFusedMultiplyAdd = true;
#else
inline constexpr bool kFusedMultiplyAdd = false;
#endif

/// The extensions of x86-64 that the compiler may use here of its own accord: bit i stands for the
/// i-th of the list. Those whose instructions are only ever written by hand (AES, AMX, SHA) are not
/// in it. What reads it is cmake/kernel_dispatch.cpp.in, in the same order.
inline constexpr std::uint64_t kExtensions = 0
#if defined(__SSSE3__)
                                             | std::uint64_t{1} << 0
#endif
#if defined(__SSE4_1__)
                                             | std::uint64_t{1} << 1
#endif
#if defined(__SSE4_2__)
                                             | std::uint64_t{1} << 2
#endif
#if defined(__POPCNT__)
                                             | std::uint64_t{1} << 3
#endif
#if defined(__AVX__)
                                             | std::uint64_t{1} << 4
#endif
#if defined(__AVX2__)
                                             | std::uint64_t{1} << 5
#endif
#if defined(__FMA__)
                                             | std::uint64_t{1} << 6
#endif
#if defined(__F16C__)
                                             | std::uint64_t{1} << 7
#endif
#if defined(__BMI__)
                                             | std::uint64_t{1} << 8
#endif
#if defined(__BMI2__)
                                             | std::uint64_t{1} << 9
#endif
#if defined(__LZCNT__)
                                             | std::uint64_t{1} << 10
#endif
#if defined(__MOVBE__)
                                             | std::uint64_t{1} << 11
#endif
#if defined(__AVX512F__)
                                             | std::uint64_t{1} << 12
#endif
#if defined(__AVX512BW__)
                                             | std::uint64_t{1} << 13
#endif
#if defined(__AVX512CD__)
                                             | std::uint64_t{1} << 14
#endif
#if defined(__AVX512DQ__)
                                             | std::uint64_t{1} << 15
#endif
#if defined(__AVX512VL__)
                                             | std::uint64_t{1} << 16
#endif
#if defined(__AVX512IFMA__)
                                             | std::uint64_t{1} << 17
#endif
#if defined(__AVX512VBMI__)
                                             | std::uint64_t{1} << 18
#endif
#if defined(__AVX512VBMI2__)
                                             | std::uint64_t{1} << 19
#endif
#if defined(__AVX512VNNI__)
                                             | std::uint64_t{1} << 20
#endif
#if defined(__AVX512BITALG__)
                                             | std::uint64_t{1} << 21
#endif
#if defined(__AVX512VPOPCNTDQ__)
                                             | std::uint64_t{1} << 22
#endif
#if defined(__AVX512BF16__)
                                             | std::uint64_t{1} << 23
#endif
#if defined(__AVXVNNI__)
                                             | std::uint64_t{1} << 24
#endif
#if defined(__GFNI__)
                                             | std::uint64_t{1} << 25
#endif
#if defined(__VAES__)
                                             | std::uint64_t{1} << 26
#endif
#if defined(__VPCLMULQDQ__)
                                             | std::uint64_t{1} << 27
#endif
#if defined(__AVX512FP16__)
                                             | std::uint64_t{1} << 28
#endif
#if defined(__SSE3__)
                                             | std::uint64_t{1} << 29
#endif
#if defined(__SSE4A__)
                                             | std::uint64_t{1} << 30
#endif
#if defined(__FMA4__)
                                             | std::uint64_t{1} << 31
#endif
#if defined(__XOP__)
                                             | std::uint64_t{1} << 32
#endif
#if defined(__TBM__)
                                             | std::uint64_t{1} << 33
#endif
#if defined(__AVXIFMA__)
                                             | std::uint64_t{1} << 34
#endif
#if defined(__AVXVNNIINT8__)
                                             | std::uint64_t{1} << 35
#endif
#if defined(__AVXNECONVERT__)
                                             | std::uint64_t{1} << 36
#endif
#if defined(__CMPCCXADD__)
                                             | std::uint64_t{1} << 37
#endif
#if defined(__AVXVNNIINT16__)
                                             | std::uint64_t{1} << 38
#endif
#if defined(__APX_F__)
                                             | std::uint64_t{1} << 39
#endif
#if defined(__AVX10_2__)  // and whatever comes with it: more than the list knows
                                             | std::uint64_t{1} << 63
#endif
    ;

namespace detail {
#if SLUICE_HAS_VECTOR_EXTENSIONS
typedef float NativeF __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t NativeI __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t NativeU __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t NativeU16 __attribute__((vector_size(kWidth * 2)));
typedef std::int8_t NativeI8 __attribute__((vector_size(kWidth)));
typedef std::uint8_t NativeU8 __attribute__((vector_size(kWidth)));
#else
using NativeF = float;
using NativeI = std::int32_t;
using NativeU = std::uint32_t;
#endif

#if SLUICE_SIMD_AVX512
// Zero-masking forms with all lanes chosen compile to the plain instructions; the plain intrinsics
// make GCC 12 warn about an uninitialised value in its own header.
inline constexpr __mmask16 kAllLanes = 0xffff;
inline constexpr __mmask8 kAllOfEight = 0xff;
#endif

// The same bits as another register type.
template <class To, class From>
[[gnu::always_inline]] inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace detail

/// kWidth float lanes.
struct VecF {
  detail::NativeF v;
};

/// kWidth int32 lanes; right shifts are logical.
struct VecI {
  detail::NativeI v;
};

/// A register with all lanes equal.
[[gnu::always_inline]] inline VecF broadcast(float value) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  return {value - detail::NativeF{}};  // minus zero changes nothing, not even -0
#else
  return {value};
#endif
}
[[gnu::always_inline]] inline VecI broadcast(std::int32_t value) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  return {detail::NativeI{} + value};
#else
  return {value};
#endif
}
[[gnu::always_inline]] inline VecF zero() {
  return {detail::NativeF{}};
}

/// Its argument, which the compiler is made to hold in a register. Without this it repeats a load
/// that several products share as a memory operand of each, and loads become the bottleneck.
template <class Vec>  // VecF or VecI
[[gnu::always_inline]] inline Vec in_register(Vec a) {
#if SLUICE_SIMD_AVX512
  asm("" : "+v"(a.v));
#elif SLUICE_SIMD_AVX || SLUICE_SIMD_SSE
  asm("" : "+x"(a.v));
#endif
  return a;
}

/// kWidth consecutive floats.
[[gnu::always_inline]] inline VecF load(const float* source) {
  VecF result;
  std::memcpy(&result.v, source, sizeof(result.v));
  return result;
}
[[gnu::always_inline]] inline void store(float* target, VecF value) {
  std::memcpy(target, &value.v, sizeof(value.v));
}

/// kWidth consecutive int32 (4 * kWidth bytes).
[[gnu::always_inline]] inline VecI load_int32(const void* source) {
  VecI result;
  std::memcpy(&result.v, source, sizeof(result.v));
  return result;
}

/// The first `count` lanes from memory, the others 0. 0 <= count <= kWidth.
[[gnu::always_inline]] inline VecF load_partial(const float* source, std::int64_t count) {
#if SLUICE_SIMD_AVX512
  const auto mask = static_cast<__mmask16>((1U << count) - 1U);
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_loadu_ps(mask, source))};
#else
  float lanes[kWidth] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
#endif
}
/// Writes the first `count` lanes. 0 <= count <= kWidth.
[[gnu::always_inline]] inline void store_partial(float* target, VecF value, std::int64_t count) {
#if SLUICE_SIMD_AVX512
  const auto mask = static_cast<__mmask16>((1U << count) - 1U);
  _mm512_mask_storeu_ps(target, mask, detail::bits_as<__m512>(value.v));
#else
  float lanes[kWidth];
  store(lanes, value);
  for (std::int64_t i = 0; i < count; ++i) target[i] = lanes[i];
#endif
}

[[gnu::always_inline]] inline VecF operator+(VecF a, VecF b) {
  return {a.v + b.v};
}
[[gnu::always_inline]] inline VecF operator-(VecF a, VecF b) {
  return {a.v - b.v};
}
[[gnu::always_inline]] inline VecF operator*(VecF a, VecF b) {
  return {a.v * b.v};
}
[[gnu::always_inline]] inline VecF operator/(VecF a, VecF b) {
  return {a.v / b.v};
}
[[gnu::always_inline]] inline VecF operator-(VecF a) {
  return {-a.v};
}
[[gnu::always_inline]] inline VecF& operator+=(VecF& a, VecF b) {
  return a = a + b;
}
[[gnu::always_inline]] inline VecF& operator-=(VecF& a, VecF b) {
  return a = a - b;
}
[[gnu::always_inline]] inline VecF& operator*=(VecF& a, VecF b) {
  return a = a * b;
}

[[gnu::always_inline]] inline VecI operator&(VecI a, VecI b) {
  return {a.v & b.v};
}
[[gnu::always_inline]] inline VecI operator|(VecI a, VecI b) {
  return {a.v | b.v};
}
[[gnu::always_inline]] inline VecI operator^(VecI a, VecI b) {
  return {a.v ^ b.v};
}
[[gnu::always_inline]] inline VecI operator+(VecI a, VecI b) {
  return {detail::bits_as<detail::NativeI>(detail::bits_as<detail::NativeU>(a.v) +
                                           detail::bits_as<detail::NativeU>(b.v))};
}
[[gnu::always_inline]] inline VecI operator<<(VecI a, int count) {
  return {detail::bits_as<detail::NativeI>(detail::bits_as<detail::NativeU>(a.v) << count)};
}
[[gnu::always_inline]] inline VecI operator>>(VecI a, int count) {
  return {detail::bits_as<detail::NativeI>(detail::bits_as<detail::NativeU>(a.v) >> count)};
}

/// Lane-wise logical right shift.
[[gnu::always_inline]] inline VecI shift_right(VecI a, VecI counts) {
  return {detail::bits_as<detail::NativeI>(detail::bits_as<detail::NativeU>(a.v) >>
                                           detail::bits_as<detail::NativeU>(counts.v))};
}

/// Lane bits taken as the other type.
[[gnu::always_inline]] inline VecF bits_as_float(VecI a) {
  return {detail::bits_as<detail::NativeF>(a.v)};
}
[[gnu::always_inline]] inline VecI bits_as_int(VecF a) {
  return {detail::bits_as<detail::NativeI>(a.v)};
}

/// Lanes converted from signed integers.
[[gnu::always_inline]] inline VecF to_float(VecI a) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  return {__builtin_convertvector(a.v, detail::NativeF)};
#else
  return {static_cast<float>(a.v)};
#endif
}

/// a * b + c, rounded once where the target has fused multiply-add.
[[gnu::always_inline]] inline VecF fma(VecF a, VecF b, VecF c) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(_mm512_fmadd_ps(
      detail::bits_as<__m512>(a.v), detail::bits_as<__m512>(b.v), detail::bits_as<__m512>(c.v)))};
#elif SLUICE_SIMD_AVX && defined(__FMA__)
  return {detail::bits_as<detail::NativeF>(_mm256_fmadd_ps(
      detail::bits_as<__m256>(a.v), detail::bits_as<__m256>(b.v), detail::bits_as<__m256>(c.v)))};
#elif SLUICE_HAS_VECTOR_EXTENSIONS && defined(__aarch64__)
  // Written out: a compiler that does not optimise would round twice.
  return {detail::bits_as<detail::NativeF>(vfmaq_f32(detail::bits_as<float32x4_t>(c.v),
                                                     detail::bits_as<float32x4_t>(a.v),
                                                     detail::bits_as<float32x4_t>(b.v)))};
#else
  return {a.v * b.v + c.v};  // the compiler contracts this where it can
#endif
}

/// Lane-wise a > b ? a : b and a < b ? a : b, so b where either is NaN.
[[gnu::always_inline]] inline VecF max(VecF a, VecF b) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_max_ps(
      detail::kAllLanes, detail::bits_as<__m512>(a.v), detail::bits_as<__m512>(b.v)))};
#elif SLUICE_SIMD_AVX
  return {detail::bits_as<detail::NativeF>(
      _mm256_max_ps(detail::bits_as<__m256>(a.v), detail::bits_as<__m256>(b.v)))};
#elif SLUICE_SIMD_SSE
  return {detail::bits_as<detail::NativeF>(
      _mm_max_ps(detail::bits_as<__m128>(a.v), detail::bits_as<__m128>(b.v)))};
#else
  return {a.v > b.v ? a.v : b.v};
#endif
}
[[gnu::always_inline]] inline VecF min(VecF a, VecF b) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_min_ps(
      detail::kAllLanes, detail::bits_as<__m512>(a.v), detail::bits_as<__m512>(b.v)))};
#elif SLUICE_SIMD_AVX
  return {detail::bits_as<detail::NativeF>(
      _mm256_min_ps(detail::bits_as<__m256>(a.v), detail::bits_as<__m256>(b.v)))};
#elif SLUICE_SIMD_SSE
  return {detail::bits_as<detail::NativeF>(
      _mm_min_ps(detail::bits_as<__m128>(a.v), detail::bits_as<__m128>(b.v)))};
#else
  return {a.v < b.v ? a.v : b.v};
#endif
}

/// Lane-wise the larger one.
[[gnu::always_inline]] inline VecI max(VecI a, VecI b) {
  return {a.v > b.v ? a.v : b.v};
}

/// Lane-wise a < b ? if_true : if_false (if_false where either is NaN).
[[gnu::always_inline]] inline VecF select_less(VecF a, VecF b, VecF if_true, VecF if_false) {
  return {a.v < b.v ? if_true.v : if_false.v};
}

/// Lane-wise |a|.
[[gnu::always_inline]] inline VecF abs(VecF a) {
  return bits_as_float(bits_as_int(a) & broadcast(std::int32_t{0x7fffffff}));
}

namespace detail {
// Folds a register by halves: lane i of the result's first half is f(lane i, lane i + half).
template <class Function>
[[gnu::always_inline]] inline float fold(VecF a, Function&& function) {
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = function(lanes[i], lanes[i + half]);
  return lanes[0];
}
#if SLUICE_SIMD_AVX || SLUICE_SIMD_AVX512 || SLUICE_SIMD_SSE
// The same in registers, down to four lanes; `function` takes two __m128.
template <class Function>
[[gnu::always_inline]] inline __m128 fold_to_four(VecF a, [[maybe_unused]] Function&& function) {
#if SLUICE_SIMD_AVX512
  const auto wide = bits_as<__m512>(a.v);
  return function(function(_mm512_maskz_extractf32x4_ps(kAllOfEight, wide, 0),
                           _mm512_maskz_extractf32x4_ps(kAllOfEight, wide, 2)),
                  function(_mm512_maskz_extractf32x4_ps(kAllOfEight, wide, 1),
                           _mm512_maskz_extractf32x4_ps(kAllOfEight, wide, 3)));
#elif SLUICE_SIMD_AVX
  const auto wide = bits_as<__m256>(a.v);
  return function(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
#else
  return bits_as<__m128>(a.v);
#endif
}
template <class Function>
[[gnu::always_inline]] inline float fold128(VecF a, Function&& function) {
  const __m128 four = fold_to_four(a, function);
  const __m128 two = function(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(function(two, _mm_shuffle_ps(two, two, 1)));
}
#endif
}  // namespace detail

/// The sum of all lanes, added by halves: (0 + kWidth/2), ... as a tree.
[[gnu::always_inline]] inline float reduce_add(VecF a) {
#if SLUICE_SIMD_AVX || SLUICE_SIMD_AVX512 || SLUICE_SIMD_SSE
  return detail::fold128(a, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); });
#else
  return detail::fold(a, [](float x, float y) { return x + y; });
#endif
}

/// sums[i] = reduce_add(a[i]), the same bits, for four registers at once.
[[gnu::always_inline]] inline void reduce_add(const VecF (&a)[4], float* sums) {
#if SLUICE_SIMD_AVX || SLUICE_SIMD_AVX512 || SLUICE_SIMD_SSE
  const auto add = [](__m128 x, __m128 y) {
    return _mm_add_ps(x, y);
  };
  __m128 fours[4];
  for (int i = 0; i < 4; ++i) fours[i] = detail::fold_to_four(a[i], add);
  // Lanes 0 + 2 of two registers, then their lanes 1 + 3.
  const __m128 low = add(_mm_unpacklo_ps(fours[0], fours[1]), _mm_unpackhi_ps(fours[0], fours[1]));
  const __m128 high = add(_mm_unpacklo_ps(fours[2], fours[3]), _mm_unpackhi_ps(fours[2], fours[3]));
  _mm_storeu_ps(sums, add(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low)));
#else
  for (int i = 0; i < 4; ++i) sums[i] = reduce_add(a[i]);
#endif
}

/// sums[i] = the sum of the lanes of a[i]: fewer steps than reduce_add(), in another order, which
/// is the same for all four.
[[gnu::always_inline]] inline void add_lanes(const VecF (&a)[4], float* sums) {
#if SLUICE_SIMD_AVX512 || SLUICE_SIMD_AVX
  __m256 part[4];
  for (int i = 0; i < 4; ++i) {
#if SLUICE_SIMD_AVX512
    const auto wide = detail::bits_as<__m512d>(a[i].v);
    part[i] =
        _mm256_add_ps(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(detail::kAllOfEight, wide, 0)),
                      _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(detail::kAllOfEight, wide, 1)));
#else
    part[i] = detail::bits_as<__m256>(a[i].v);
#endif
  }
  // Within each half: lanes 0 + 2 and 1 + 3 of two registers, then these of all four.
  const __m256 low =
      _mm256_add_ps(_mm256_unpacklo_ps(part[0], part[1]), _mm256_unpackhi_ps(part[0], part[1]));
  const __m256 high =
      _mm256_add_ps(_mm256_unpacklo_ps(part[2], part[3]), _mm256_unpackhi_ps(part[2], part[3]));
  const __m256 both =
      _mm256_add_ps(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
  reduce_add(a, sums);
#endif
}

/// The largest lane. Unspecified if a lane is NaN.
[[gnu::always_inline]] inline float reduce_max(VecF a) {
#if SLUICE_SIMD_AVX || SLUICE_SIMD_AVX512 || SLUICE_SIMD_SSE
  return detail::fold128(a, [](__m128 x, __m128 y) { return _mm_max_ps(x, y); });
#else
  return detail::fold(a, [](float x, float y) { return x > y ? x : y; });
#endif
}

/// kWidth consecutive values widened to float, exactly.
[[gnu::always_inline]] inline VecF load(const bf16* source) {
#if SLUICE_SIMD_AVX512
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(
      detail::kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_slli_epi32(detail::kAllLanes, wide, 16))};
#elif SLUICE_HAS_VECTOR_EXTENSIONS
  detail::NativeU16 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return {detail::bits_as<detail::NativeF>(__builtin_convertvector(narrow, detail::NativeU) << 16)};
#else
  return {static_cast<float>(*source)};
#endif
}
/// As above; a signalling NaN may come out quiet.
[[gnu::always_inline]] inline VecF load(const f16* source) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_cvtph_ps(
      detail::kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))))};
#elif SLUICE_SIMD_AVX && defined(__F16C__)
  return {detail::bits_as<detail::NativeF>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))))};
#elif SLUICE_HAS_VECTOR_EXTENSIONS
  // Magnitude in place at a float's exponent, rebased by an exact multiplication, which also
  // normalises subnormals; infinity and NaN get the full exponent back afterwards.
  detail::NativeU16 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  const detail::NativeU wide = __builtin_convertvector(narrow, detail::NativeU);
  const detail::NativeU magnitude = wide & 0x7fffU;
  const detail::NativeF scaled =
      detail::bits_as<detail::NativeF>(magnitude << 13) * (detail::NativeF{} + 0x1p112F);
  const detail::NativeU special =
      detail::bits_as<detail::NativeU>(magnitude > 0x7bffU) & 0x7f800000U;
  return {detail::bits_as<detail::NativeF>(detail::bits_as<detail::NativeU>(scaled) | special |
                                           ((wide & 0x8000U) << 16))};
#else
  return {static_cast<float>(*source)};
#endif
}
[[gnu::always_inline]] inline VecF load(const std::int8_t* source) {
#if SLUICE_SIMD_AVX512
  return to_float(VecI{detail::bits_as<detail::NativeI>(_mm512_maskz_cvtepi8_epi32(
      detail::kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(source))))});
#elif SLUICE_SIMD_AVX && defined(__AVX2__)
  return to_float(VecI{detail::bits_as<detail::NativeI>(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))))});
#elif SLUICE_HAS_VECTOR_EXTENSIONS
  detail::NativeI8 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return {
      __builtin_convertvector(__builtin_convertvector(narrow, detail::NativeI), detail::NativeF)};
#else
  return {static_cast<float>(*source)};
#endif
}

/// kWidth consecutive bytes as 0 to 255.
[[gnu::always_inline]] inline VecI load_uint8(const std::uint8_t* source) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeI>(_mm512_maskz_cvtepu8_epi32(
      detail::kAllLanes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(source))))};
#elif SLUICE_SIMD_AVX && defined(__AVX2__)
  return {detail::bits_as<detail::NativeI>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))))};
#elif SLUICE_HAS_VECTOR_EXTENSIONS
  detail::NativeU8 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return {__builtin_convertvector(narrow, detail::NativeI)};
#else
  return {*source};
#endif
}

[[gnu::always_inline]] inline VecF load(const std::uint8_t* source) {
  return to_float(load_uint8(source));
}

/// The low (bits 0 to 3) or high (bits 4 to 7) halves of kWidth consecutive bytes, 0 to 15.
[[gnu::always_inline]] inline VecF load_low_nibbles(const std::uint8_t* source) {
  return to_float(load_uint8(source) & broadcast(std::int32_t{15}));
}
[[gnu::always_inline]] inline VecF load_high_nibbles(const std::uint8_t* source) {
  return to_float(load_uint8(source) >> 4);
}

/// kWidth consecutive values widened to float, exactly; the NaN codes come out as 480 or -480.
[[gnu::always_inline]] inline VecF load(const fp8_e4m3* source) {
  // As binary16 with the same mantissa the exponent is 8 too small; subnormals become such. The
  // byte is extended by its sign, of which one bit is kept.
#if SLUICE_SIMD_AVX512
  const __m256i wide =
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return VecF{detail::bits_as<detail::NativeF>(_mm512_maskz_cvtph_ps(detail::kAllLanes, half))} *
         broadcast(256.0F);
#elif SLUICE_SIMD_AVX && defined(__AVX2__) && defined(__F16C__)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  const __m128i half =
      _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
  return VecF{detail::bits_as<detail::NativeF>(_mm256_cvtph_ps(half))} * broadcast(256.0F);
#else
  const VecI wide = load_uint8(reinterpret_cast<const std::uint8_t*>(source));
  const VecI magnitude = (wide & broadcast(std::int32_t{0x7f})) << 20;
  const VecI sign = (wide & broadcast(std::int32_t{0x80})) << 24;
  return bits_as_float(magnitude | sign) * broadcast(0x1p120F);
#endif
}

/// kWidth channels of a row of pairs from channel `first` on, a multiple of kWidth: codes 0 to 15.
/// Within 2 * kWidth channels the even ones come first, then the odd ones.
[[gnu::always_inline]] inline VecF load_codes(const int4x2* row, std::int64_t first) {
  const std::int64_t block = first / (2 * kWidth) * kWidth;
  const int shift = first / kWidth % 2 == 0 ? 4 : 0;
  const VecI pairs = load_uint8(reinterpret_cast<const std::uint8_t*>(row + block)) >> shift;
  return to_float(pairs & broadcast(std::int32_t{15}));
}

/// kWidth channels of a row in blocks of 32 from channel `first` on, a multiple of kWidth: codes,
/// without the block's scale.
[[gnu::always_inline]] inline VecF load_codes(const q8_0* row, std::int64_t first) {
  return load(reinterpret_cast<const std::int8_t*>(row) + first);
}
[[gnu::always_inline]] inline VecF load_codes(const q4_0* row, std::int64_t first) {
  const auto* const bytes =
      reinterpret_cast<const std::uint8_t*>(row) + first / 32 * 16 + first % 16;
  const VecI pairs = load_uint8(bytes) >> (first % 32 < 16 ? 0 : 4);
  return to_float((pairs & broadcast(std::int32_t{15})) + broadcast(std::int32_t{-8}));
}

namespace detail {
/// Where in its word each lane of load_fields() has its code, and the codes as floats, repeated.
template <int kBits>
struct FieldLanes {
  alignas(64) std::int32_t shifts[kWidth];
  alignas(64) float values[kWidth];

  constexpr FieldLanes() : shifts(), values() {
    for (int i = 0; i < kWidth; ++i) {
      shifts[i] = i * kBits % 32;
      values[i] = static_cast<float>(i % (1 << kBits));
    }
  }
};
template <int kBits>
inline constexpr FieldLanes<kBits> kFieldLanes{};
}  // namespace detail

/// kWidth consecutive codes of kBits bits from code `first` on, a multiple of kWidth. They are
/// fields of 32-bit words, the first in the lowest bits; `words` needs no alignment.
template <int kBits>
[[gnu::always_inline]] inline VecF load_fields(const void* words, std::int64_t first) {
  static_assert(kBits == 2 || kBits == 4);
  const auto* const bytes = static_cast<const std::uint8_t*>(words);
  const auto word = [&](std::int64_t i) {
    std::int32_t value;
    std::memcpy(&value, bytes + 4 * i, sizeof(value));
    return value;
  };
  const std::int64_t at = first * kBits / 32;
  const VecI shifts = load_int32(detail::kFieldLanes<kBits>.shifts);
#if SLUICE_SIMD_AVX512
  __m512i wide = _mm512_set1_epi32(word(at));
  if constexpr (kBits == 4) wide = _mm512_mask_set1_epi32(wide, 0xff00, word(at + 1));
  const VecI codes = shift_right(VecI{detail::bits_as<detail::NativeI>(wide)}, shifts);
  // A choice of sixteen floats by the lowest four bits: bits of the next codes choose a repetition.
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_permutexvar_ps(
      detail::kAllLanes, detail::bits_as<__m512i>(codes.v),
      detail::bits_as<__m512>(load(detail::kFieldLanes<kBits>.values).v)))};
#else
  const VecI codes =
      shift_right(broadcast(word(at)) >> static_cast<int>(first * kBits % 32), shifts);
  return to_float(codes & broadcast(std::int32_t{(1 << kBits) - 1}));
#endif
}

/// The first `count` elements widened to float, the other lanes 0. 0 <= count <= kWidth.
template <class Element>
[[gnu::always_inline]] inline VecF load_partial(const Element* source, std::int64_t count) {
  Element lanes[kWidth] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
}

/// kWidth values rounded to nearest even, bit for bit as bf16(float) and f16(float) do.
[[gnu::always_inline]] inline void store(bf16* target, VecF value) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  const auto x = detail::bits_as<detail::NativeU>(value.v);
  const detail::NativeU rounded = (x + 0x7fffU + ((x >> 16) & 1U)) >> 16;
  const detail::NativeU quiet = (x >> 16) | 0x40U;
  const auto is_nan = detail::bits_as<detail::NativeU>((x & 0x7fffffffU) > 0x7f800000U);
  const detail::NativeU result = (is_nan & quiet) | (~is_nan & rounded);
  const auto narrow = __builtin_convertvector(result, detail::NativeU16);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  *target = bf16(value.v);
#endif
}
[[gnu::always_inline]] inline void store(f16* target, VecF value) {
#if SLUICE_SIMD_AVX512
  // The conversion instruction keeps part of a NaN's payload; f16(float) does not.
  const auto x = detail::bits_as<__m512>(value.v);
  const auto bits = detail::bits_as<detail::NativeU>(value.v);
  const auto quiet = detail::bits_as<__m512>((bits & 0x80000000U) | 0x7fc00000U);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm512_maskz_cvtps_ph(detail::kAllLanes, _mm512_mask_mov_ps(x, is_nan, quiet),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif SLUICE_SIMD_AVX && defined(__F16C__)
  const auto x = detail::bits_as<__m256>(value.v);
  const auto bits = detail::bits_as<detail::NativeU>(value.v);
  const auto quiet = detail::bits_as<__m256>((bits & 0x80000000U) | 0x7fc00000U);
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                   _mm256_cvtps_ph(_mm256_blendv_ps(x, quiet, is_nan), _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[kWidth];
  store(lanes, value);
  for (int i = 0; i < kWidth; ++i) target[i] = f16(lanes[i]);
#endif
}

/// The first `count` lanes rounded as store() does. 0 <= count <= kWidth.
template <class Element>
[[gnu::always_inline]] inline void store_partial(Element* target, VecF value, std::int64_t count) {
  Element lanes[kWidth];
  store(lanes, value);
  for (std::int64_t i = 0; i < count; ++i) target[i] = lanes[i];
}

/// e^a. At most 2 ulp from the exact value (tested over [-87, 88]); 0 below -103.98, infinity above
/// 88.73, NaN for NaN; results below 2^-126 are subnormal and correct to 1.5 units of 2^-149.
/// e^a = 2^n e^r with n = round(a / ln 2), |r| <= ln(2)/2, and a polynomial for e^r.
[[gnu::always_inline]] inline VecF exp(VecF a) {
  // Both clamps keep NaN: the comparison's second operand is returned then.
  const VecF x = min(broadcast(89.0F), max(broadcast(-104.0F), a));
  // Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits.
  const VecF magic = broadcast(12582912.0F);
  const VecF shifted = fma(x, broadcast(1.44269504088896341F), magic);
  const VecF n = shifted - magic;
  // ln 2 in two parts; the upper has 9 trailing zero bits, so n times it is exact.
  VecF r = fma(n, broadcast(-0.693359375F), x);
  r = fma(n, broadcast(2.12194440e-4F), r);
  // Cephes expf's minimax coefficients for (e^r - 1 - r) / r^2.
  VecF p = broadcast(1.9875691500e-4F);
  p = fma(p, r, broadcast(1.3981999507e-3F));
  p = fma(p, r, broadcast(8.3334519073e-3F));
  p = fma(p, r, broadcast(4.1665795894e-2F));
  p = fma(p, r, broadcast(1.6666665459e-1F));
  p = fma(p, r, broadcast(5.0000001201e-1F));
  p = fma(p, r * r, r) + broadcast(1.0F);
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(_mm512_maskz_scalef_ps(
      detail::kAllLanes, detail::bits_as<__m512>(p.v), detail::bits_as<__m512>(n.v)))};
#else
  // 2^n in two factors, since n reaches -150 and 128.
  const VecI whole = bits_as_int(shifted) + broadcast(std::int32_t{-0x4b400000});
  const VecI half = ((whole + broadcast(std::int32_t{512})) >> 1) + broadcast(std::int32_t{-256});
  const VecI rest = {whole.v - half.v};
  const VecI bias = broadcast(std::int32_t{127});
  return p * bits_as_float((half + bias) << 23) * bits_as_float((rest + bias) << 23);
#endif
}

/// One binary16 as float, exactly (a signalling NaN may come out quiet).
[[gnu::always_inline]] inline float to_float(f16 value) {
#if defined(__F16C__) && (SLUICE_SIMD_AVX || SLUICE_SIMD_AVX512)
  return _cvtsh_ss(value.bits);
#else
  return static_cast<float>(value);
#endif
}

/// The binary16 at `source`, which needs no alignment, in all lanes as float.
[[gnu::always_inline]] inline VecF broadcast_half(const void* source) {
  f16 half;
  std::memcpy(&half, source, sizeof(half));
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(
      _mm512_maskz_cvtph_ps(detail::kAllLanes, _mm256_set1_epi16(static_cast<short>(half.bits))))};
#else
  return broadcast(to_float(half));
#endif
}

/// Two values, each in one half of the lanes: the first in lanes 0 to kWidth / 2 - 1.
[[gnu::always_inline]] inline VecF broadcast_halves(float first, float second) {
#if SLUICE_SIMD_AVX512
  const auto low = detail::bits_as<__m512>(broadcast(first).v);
  return {detail::bits_as<detail::NativeF>(
      _mm512_mask_broadcastss_ps(low, 0xff00, _mm_set_ss(second)))};
#else
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = 2 * i < kWidth ? first : second;
  return load(lanes);
#endif
}

/// Sixteen bytes, in four words of which the first holds the first four, as floats: the first eight
/// times one factor, the others times another.
[[gnu::always_inline]] inline void store_bytes_scaled(const std::uint32_t (&words)[4],
                                                      float first_factor, float second_factor,
                                                      float (&target)[16]) {
#if SLUICE_SIMD_AVX512
  const __m128i bytes = _mm_setr_epi32(static_cast<int>(words[0]), static_cast<int>(words[1]),
                                       static_cast<int>(words[2]), static_cast<int>(words[3]));
  const VecI wide = {
      detail::bits_as<detail::NativeI>(_mm512_maskz_cvtepu8_epi32(detail::kAllLanes, bytes))};
  store(target, to_float(wide) * broadcast_halves(first_factor, second_factor));
#else
  for (int i = 0; i < 16; ++i)
    target[i] = (i < 8 ? first_factor : second_factor) *
                static_cast<float>((words[i / 4] >> (8 * (i % 4))) & 255U);
#endif
}

/// A few consecutive floats, each in four lanes: lane i is source[i / 4]. Needs kWidth >= 4.
[[gnu::always_inline]] inline VecF repeat_by_four(const float* source) {
#if SLUICE_SIMD_AVX512
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512 four = _mm512_maskz_broadcast_f32x4(detail::kAllLanes, _mm_loadu_ps(source));
  return {detail::bits_as<detail::NativeF>(
      _mm512_maskz_permutexvar_ps(detail::kAllLanes, lanes, four))};
#elif SLUICE_SIMD_AVX
  return {detail::bits_as<detail::NativeF>(_mm256_insertf128_ps(
      _mm256_castps128_ps256(_mm_set1_ps(source[0])), _mm_set1_ps(source[1]), 1))};
#else
  return broadcast(source[0]);
#endif
}

namespace detail {
#if SLUICE_SIMD_AVX512
// The bits of the first `count` bytes, 0 <= count, in a mask of 64.
[[gnu::always_inline]] inline __mmask64 first_bytes(int count) {
  // Not by comparing: masks of many rows are made at a time, and branches would keep them in
  // memory.
  return _bzhi_u64(~std::uint64_t{0}, static_cast<unsigned>(count < 0 ? 0 : count));
}

// A permutation of the 16-bit words of the first and the last 64 of the bytes of four records.
struct alignas(64) WordTable {
  std::int16_t words[32];
};
// Takes the 16 bytes at kOffset of every record.
template <int kStride, int kOffset>
inline constexpr WordTable kChunkWords = [] {
  WordTable table{};
  for (int i = 0; i < 32; ++i) {
    const int at = i / 8 * kStride + kOffset + i % 8 * 2;
    table.words[i] =
        static_cast<std::int16_t>(at < 64 ? at / 2 : 32 + (at - (4 * kStride - 64)) / 2);
  }
  return table;
}();
// Takes the two bytes at kOffset of every record four times; they are all among the first 64.
template <int kStride, int kOffset>
inline constexpr WordTable kFieldWords = [] {
  static_assert(3 * kStride + kOffset + 2 <= 64);
  WordTable table{};
  for (int i = 0; i < 32; ++i)
    table.words[i] = static_cast<std::int16_t>((i % 16 / 4 * kStride + kOffset) / 2);
  return table;
}();
#endif
}  // namespace detail

#if !SLUICE_SIMD_AVX512
namespace detail {
// 16 bytes from `first` and, where a register has eight lanes, 16 from `second` or zeros if null.
[[gnu::always_inline]] inline VecI join_quads(const char* first,
                                              [[maybe_unused]] const char* second) {
#if SLUICE_SIMD_AVX
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i high = second == nullptr
                           ? _mm_setzero_si128()
                           : _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  return {bits_as<NativeI>(_mm256_insertf128_si256(_mm256_castsi128_si256(low), high, 1))};
#else
  return load_int32(first);
#endif
}

// The binary16 at first[r] in lane r and, where a register has eight lanes, the one `stride` bytes
// after it in lane 4 + r, or 0 if the stride is 0.
[[gnu::always_inline]] inline VecF join_halves(const char* const (&first)[4],
                                               [[maybe_unused]] int stride) {
  const auto half_at = [](const char* source) {
    f16 half;
    std::memcpy(&half, source, sizeof(half));
    return half;
  };
#if SLUICE_SIMD_AVX && defined(__F16C__)
  // Word by word into a register: stores would be read back in a wider piece, which stalls.
  const auto word = [&](int r, int offset) {
    return static_cast<short>(half_at(first[r] + offset).bits);
  };
  const __m128i low = _mm_setr_epi16(word(0, 0), word(1, 0), word(2, 0), word(3, 0), 0, 0, 0, 0);
  if (stride == 0) return {bits_as<NativeF>(_mm256_cvtph_ps(low))};
  const __m128i high = _mm_setr_epi16(word(0, stride), word(1, stride), word(2, stride),
                                      word(3, stride), 0, 0, 0, 0);
  return {bits_as<NativeF>(_mm256_cvtph_ps(_mm_unpacklo_epi64(low, high)))};
#else
  float values[kWidth] = {};
  for (int i = 0; i < kWidth; ++i)
    if (i < 4 || stride != 0) values[i] = to_float(half_at(first[i % 4] + i / 4 * stride));
  return load(values);
#endif
}
}  // namespace detail
#endif

/// kWidth / 4 records of kStride bytes: what a group of small quantised blocks is to a register.
/// Needs kWidth >= 4, and kStride even and 16 to 20.
template <int kStride>
class Records {
 public:
  /// Reads the first `count` records (1 <= count <= kWidth / 4) from `source`; the others are zero.
  [[gnu::always_inline]] Records(const void* source, [[maybe_unused]] int count) {
    static_assert(kStride % 2 == 0 && kStride >= 16 && kStride <= 20);
#if SLUICE_SIMD_AVX512
    constexpr int kTail = 4 * kStride - 64;
    const auto* bytes = static_cast<const char*>(source);
    __m512i head;
    if (count == 4) {
      head = _mm512_loadu_si512(bytes);
      tail_ = _mm512_loadu_si512(bytes + kTail);
    } else {
      const int size = count * kStride;
      head = _mm512_maskz_loadu_epi8(detail::first_bytes(size), bytes);
      tail_ = _mm512_maskz_loadu_epi8(detail::first_bytes(size - kTail), bytes + kTail);
    }
    asm("" : "+v"(head));  // read once, not once per field
    head_ = head;
#else
    source_ = static_cast<const char*>(source);
    count_ = count;
#endif
  }

  /// The 16 bytes at kOffset of every record, in record order.
  template <int kOffset>
  [[gnu::always_inline]] VecI chunks() const {
#if SLUICE_SIMD_AVX512
    const __m512i words = _mm512_load_si512(detail::kChunkWords<kStride, kOffset>.words);
    return {detail::bits_as<detail::NativeI>(_mm512_permutex2var_epi16(head_, words, tail_))};
#else
    const char* chunk = source_ + kOffset;
    return detail::join_quads(chunk, count_ < 2 ? nullptr : chunk + kStride);
#endif
  }

  /// The binary16 at kOffset of every record of four rows of records: that of record g of rows[r]
  /// in lane 4 g + r.
  template <int kOffset>
  [[gnu::always_inline]] static VecF fields(const Records (&rows)[4]) {
#if SLUICE_SIMD_AVX512
    const __m512i words = _mm512_load_si512(detail::kFieldWords<kStride, kOffset>.words);
    __m512i picked = _mm512_maskz_permutexvar_epi16(0x1111, words, rows[0].head_);
    picked = _mm512_mask_permutexvar_epi16(picked, 0x2222, words, rows[1].head_);
    picked = _mm512_mask_permutexvar_epi16(picked, 0x4444, words, rows[2].head_);
    picked = _mm512_mask_permutexvar_epi16(picked, 0x8888, words, rows[3].head_);
    return {detail::bits_as<detail::NativeF>(_mm512_maskz_cvtph_ps(
        detail::kAllLanes, _mm512_maskz_extracti64x4_epi64(detail::kAllOfEight, picked, 0)))};
#else
    const char* const first[4] = {rows[0].source_ + kOffset, rows[1].source_ + kOffset,
                                  rows[2].source_ + kOffset, rows[3].source_ + kOffset};
    return detail::join_halves(first, rows[0].count_ < 2 ? 0 : kStride);
#endif
  }

  /// The binary16 at kOffset of every record, as float in the record's four lanes.
  template <int kOffset>
  [[gnu::always_inline]] VecF halves() const {
#if SLUICE_SIMD_AVX512
    const __m512i words = _mm512_load_si512(detail::kFieldWords<kStride, kOffset>.words);
    const __m512i picked = _mm512_maskz_permutexvar_epi16(~__mmask32{0}, words, head_);
    return {detail::bits_as<detail::NativeF>(_mm512_maskz_cvtph_ps(
        detail::kAllLanes, _mm512_maskz_extracti64x4_epi64(detail::kAllOfEight, picked, 0)))};
#else
    float values[2] = {};
    for (int i = 0; i < (kWidth > 4 ? count_ : 1); ++i) {
      f16 half;
      std::memcpy(&half, source_ + i * kStride + kOffset, sizeof(half));
      values[i] = to_float(half);
    }
    return repeat_by_four(values);
#endif
  }

 private:
#if SLUICE_SIMD_AVX512
  __m512i head_;
  __m512i tail_;
#else
  const char* source_;
  int count_;
#endif
};

/// The same for records of 34 bytes: a binary16 and two runs of 16 bytes.
class WideRecords {
 public:
  /// Reads the first `count` records (1 <= count <= kWidth / 4) from `source`; the others are zero.
  [[gnu::always_inline]] WideRecords(const void* source, [[maybe_unused]] int count) {
#if SLUICE_SIMD_AVX512
    // Each run of two records is within the 64 bytes read for it, and all reads within the records.
    const auto* bytes = static_cast<const char*>(source);
    __m512i first;
    __m512i second;
    if (count == 4) {
      first = _mm512_loadu_si512(bytes + kStarts[0]);
      second = _mm512_loadu_si512(bytes + kStarts[1]);
      parts_[2] = _mm512_loadu_si512(bytes + kStarts[2]);
      parts_[3] = _mm512_loadu_si512(bytes + kStarts[3]);
    } else {
      const auto there = [&](int part) {
        return _mm512_maskz_loadu_epi8(detail::first_bytes(34 * count - kStarts[part]),
                                       bytes + kStarts[part]);
      };
      first = there(0);
      second = there(1);
      parts_[2] = there(2);
      parts_[3] = there(3);
    }
    asm("" : "+v"(first), "+v"(second));  // read once, not for the run and the field
    parts_[0] = first;
    parts_[1] = second;
#else
    source_ = static_cast<const char*>(source);
    count_ = count;
#endif
  }

  /// The first (kRun = 0) or second run of every record, in record order.
  template <int kRun>
  [[gnu::always_inline]] VecI chunks() const {
#if SLUICE_SIMD_AVX512
    const __m512i words = _mm512_load_si512(kRunWords[kRun].words);
    return {detail::bits_as<detail::NativeI>(
        _mm512_permutex2var_epi16(parts_[2 * kRun], words, parts_[2 * kRun + 1]))};
#else
    const char* run = source_ + 2 + 16 * kRun;
    return detail::join_quads(run, count_ < 2 ? nullptr : run + 34);
#endif
  }

  /// The binary16 of record g of rows[r], as float in lane 4 g + r.
  [[gnu::always_inline]] static VecF fields(const WideRecords (&rows)[4]) {
#if SLUICE_SIMD_AVX512
    const __m512i words = _mm512_load_si512(kFieldWords.words);
    __m512i picked =
        _mm512_maskz_permutex2var_epi16(0x1111, rows[0].parts_[0], words, rows[0].parts_[1]);
    for (int r = 1; r < 4; ++r)
      picked = _mm512_or_si512(
          picked, _mm512_maskz_permutex2var_epi16(static_cast<__mmask32>(0x1111 << r),
                                                  rows[r].parts_[0], words, rows[r].parts_[1]));
    return {detail::bits_as<detail::NativeF>(_mm512_maskz_cvtph_ps(
        detail::kAllLanes, _mm512_maskz_extracti64x4_epi64(detail::kAllOfEight, picked, 0)))};
#else
    const char* const first[4] = {rows[0].source_, rows[1].source_, rows[2].source_,
                                  rows[3].source_};
    return detail::join_halves(first, rows[0].count_ < 2 ? 0 : 34);
#endif
  }

 private:
#if SLUICE_SIMD_AVX512
  // First bytes of the four reads: records 0 and 1, then 2 and 3, for each of the runs.
  static constexpr int kStarts[4] = {0, 68, 8, 72};
  static constexpr detail::WordTable words_at(int offset, int run, bool is_field) {
    detail::WordTable table{};
    for (int i = 0; i < 32; ++i) {
      const int record = is_field ? i % 16 / 4 : i / 8;
      const int at = record * 34 + offset + (is_field ? 0 : i % 8 * 2);
      table.words[i] = static_cast<std::int16_t>(record < 2 ? (at - kStarts[2 * run]) / 2
                                                            : 32 + (at - kStarts[2 * run + 1]) / 2);
    }
    return table;
  }
  static const detail::WordTable kRunWords[2];
  static const detail::WordTable kFieldWords;
  __m512i parts_[4];
#else
  const char* source_;
  int count_;
#endif
};
#if SLUICE_SIMD_AVX512
inline constexpr detail::WordTable WideRecords::kRunWords[2] = {words_at(2, 0, false),
                                                                words_at(18, 1, false)};
inline constexpr detail::WordTable WideRecords::kFieldWords = words_at(0, 0, true);
#endif

/// 32 bytes as kWidth lanes twice, that is lane i is word i mod 8; only for kWidth = 16.
[[gnu::always_inline]] inline VecI load_int32_twice(const void* source) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeI>(_mm512_maskz_broadcast_i64x4(
      detail::kAllOfEight, _mm256_loadu_si256(static_cast<const __m256i*>(source))))};
#else
  return load_int32(source);
#endif
}

namespace detail {
#if SLUICE_HAS_VECTOR_EXTENSIONS
// Lane i of the result is lane i of the wanted half of a and b interleaved in runs of kRun lanes:
// runs 0, 2, ... of a (kUpper = 0) or 1, 3, ... (kUpper = 1) go to the even runs, b's to the odd.
template <int kRun, int kUpper, int... kLanes>
[[gnu::always_inline]] inline NativeF interleave(NativeF a, NativeF b,
                                                 std::integer_sequence<int, kLanes...>) {
  return __builtin_shufflevector(
      a, b,
      (kLanes / kRun % 2 == 0 ? kLanes + kUpper * kRun
                              : kWidth + kLanes - kRun + kUpper * kRun)...);
}

// Exchanges off-diagonal blocks of kRun x kRun lanes, then goes on with half the size.
template <int kRun>
[[gnu::always_inline]] inline void transpose_blocks(VecF (&rows)[kWidth]) {
  constexpr auto kLanes = std::make_integer_sequence<int, kWidth>{};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i / kRun % 2 != 0) continue;
    const NativeF a = rows[i].v;
    const NativeF b = rows[i + kRun].v;
    rows[i].v = interleave<kRun, 0>(a, b, kLanes);
    rows[i + kRun].v = interleave<kRun, 1>(a, b, kLanes);
  }
  if constexpr (kRun > 1) transpose_blocks<kRun / 2>(rows);
}
#endif
}  // namespace detail

/// Transposes kWidth registers of kWidth lanes in place.
[[gnu::always_inline]] inline void transpose([[maybe_unused]] VecF (&rows)[kWidth]) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  detail::transpose_blocks<kWidth / 2>(rows);
#endif
}

/// Writes the lowest byte of each lane: kWidth bytes.
[[gnu::always_inline]] inline void store_low_bytes(std::int8_t* target, VecI value) {
#if SLUICE_SIMD_AVX512
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(target),
      _mm512_maskz_cvtepi32_epi8(detail::kAllLanes, detail::bits_as<__m512i>(value.v)));
#elif SLUICE_HAS_VECTOR_EXTENSIONS
  const auto narrow = __builtin_convertvector(value.v, detail::NativeI8);
  std::memcpy(target, &narrow, sizeof(narrow));
#else
  *target = static_cast<std::int8_t>(value.v & 255);
#endif
}

/// What dot_signed() wants added to its first operand's bytes: its instruction may take unsigned
/// bytes only.
inline constexpr int kSignedBias = SLUICE_SIMD_VNNI ? 128 : 0;

namespace detail {
// Each lane of `sum` plus the products of its four bytes in a, taken as signed or unsigned, and in
// b, signed. For targets without an instruction for it; no sum in between can overflow.
template <bool kSigned>
[[gnu::always_inline]] inline VecI dot_bytes_plain(VecI sum, VecI a, VecI b) {
#if SLUICE_SIMD_SSE || SLUICE_SIMD_AVX
  // Even and odd bytes as 16-bit words, whose products are added in pairs. One half at a time where
  // registers of integers are narrower than those of floats.
  const auto words = [](__m128i bytes, bool odd, bool is_signed) {
    const __m128i high = odd ? bytes : _mm_slli_epi16(bytes, 8);
    return is_signed ? _mm_srai_epi16(high, 8) : _mm_srli_epi16(high, 8);
  };
  constexpr int kParts = kWidth / 4;
  __m128i sums[kParts];
  __m128i as[kParts];
  __m128i bs[kParts];
  std::memcpy(sums, &sum, sizeof(sums));
  std::memcpy(as, &a, sizeof(as));
  std::memcpy(bs, &b, sizeof(bs));
  for (int i = 0; i < kParts; ++i)
    for (const bool odd : {false, true})
      sums[i] = _mm_add_epi32(sums[i],
                              _mm_madd_epi16(words(as[i], odd, kSigned), words(bs[i], odd, true)));
  std::memcpy(&sum, sums, sizeof(sums));
  return sum;
#else
  const VecI byte = broadcast(std::int32_t{255});
  const VecI sign = broadcast(std::int32_t{128});
  for (int i = 0; i < 4; ++i) {
    const VecI ua = (a >> (8 * i)) & byte;
    const VecI ub = (b >> (8 * i)) & byte;
    // u - 2 (u & 128) is the byte as a signed number.
    const auto va = kSigned ? ua.v - 2 * (ua & sign).v : ua.v;
    sum = {sum.v + va * (ub.v - 2 * (ub & sign).v)};
  }
  return sum;
#endif
}
}  // namespace detail

/// Each lane of `sum` plus the products of its four bytes in `levels`, 0 to 127, with its four
/// bytes in `values`, -127 to 127. Exact as long as the sum is within int32.
[[gnu::always_inline]] inline VecI dot_levels(VecI sum, VecI levels, VecI values) {
#if SLUICE_SIMD_AVX512 && SLUICE_SIMD_VNNI
  return {detail::bits_as<detail::NativeI>(
      _mm512_dpbusd_epi32(detail::bits_as<__m512i>(sum.v), detail::bits_as<__m512i>(levels.v),
                          detail::bits_as<__m512i>(values.v)))};
#elif SLUICE_SIMD_AVX512
  const __m512i pairs =
      _mm512_maddubs_epi16(detail::bits_as<__m512i>(levels.v), detail::bits_as<__m512i>(values.v));
  return sum +
         VecI{detail::bits_as<detail::NativeI>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif SLUICE_SIMD_AVX && SLUICE_SIMD_VNNI
  return {detail::bits_as<detail::NativeI>(
      _mm256_dpbusd_avx_epi32(detail::bits_as<__m256i>(sum.v), detail::bits_as<__m256i>(levels.v),
                              detail::bits_as<__m256i>(values.v)))};
#elif SLUICE_SIMD_AVX && defined(__AVX2__)
  const __m256i pairs =
      _mm256_maddubs_epi16(detail::bits_as<__m256i>(levels.v), detail::bits_as<__m256i>(values.v));
  return sum +
         VecI{detail::bits_as<detail::NativeI>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#else
  return detail::dot_bytes_plain<false>(sum, levels, values);
#endif
}

/// The same for signed bytes a, -128 to 127, given as a + kSignedBias. The result has
/// kSignedBias times the four bytes of `values` too much.
[[gnu::always_inline]] inline VecI dot_signed(VecI sum, VecI biased, VecI values) {
#if SLUICE_SIMD_VNNI
  return dot_levels(sum, biased, values);
#elif SLUICE_SIMD_AVX512
  // |a| times the values with the sign of a; |-128| is 128 as an unsigned byte.
  const auto a = detail::bits_as<__m512i>(biased.v);
  const auto x = detail::bits_as<__m512i>(values.v);
  const __m512i turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(a), _mm512_setzero_si512(), x);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(a), turned);
  return sum +
         VecI{detail::bits_as<detail::NativeI>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif SLUICE_SIMD_AVX && defined(__AVX2__)
  const auto a = detail::bits_as<__m256i>(biased.v);
  const __m256i turned = _mm256_sign_epi8(detail::bits_as<__m256i>(values.v), a);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), turned);
  return sum +
         VecI{detail::bits_as<detail::NativeI>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#else
  return detail::dot_bytes_plain<true>(sum, biased, values);
#endif
}

/// 16 bytes of each of kWidth / 4 rows that are `stride` bytes apart: those of row g in lanes 4 g
/// to 4 g + 3. Needs kWidth >= 4.
[[gnu::always_inline]] inline VecI load_quads(const std::uint8_t* rows,
                                              [[maybe_unused]] std::int64_t stride) {
#if SLUICE_SIMD_AVX512
  const auto quad = [&](int g) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + g * stride));
  };
  __m512i quads = _mm512_maskz_broadcast_i32x4(0x000f, quad(0));
  quads = _mm512_mask_broadcast_i32x4(quads, 0x00f0, quad(1));
  quads = _mm512_mask_broadcast_i32x4(quads, 0x0f00, quad(2));
  quads = _mm512_mask_broadcast_i32x4(quads, 0xf000, quad(3));
  return {detail::bits_as<detail::NativeI>(quads)};
#elif SLUICE_SIMD_AVX
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + stride));
  return {detail::bits_as<detail::NativeI>(
      _mm256_insertf128_si256(_mm256_castsi128_si256(low), high, 1))};
#else
  return load_int32(rows);
#endif
}

/// quads[i] = load_quads(rows + 16 * i, stride) for four 16 bytes that follow one another. Needs
/// kWidth >= 4.
[[gnu::always_inline]] inline void load_quads(const std::uint8_t* rows, std::int64_t stride,
                                              VecI (&quads)[4]) {
#if SLUICE_SIMD_AVX512
  // Whole registers of a row, transposed: half of the reads' time.
  const auto row = [&](int g) {
    return _mm512_loadu_si512(rows + g * stride);
  };
  const __m512i first[4] = {row(0), row(1), row(2), row(3)};
  const auto halves = [&]<int kHalf>(int g) {
    return _mm512_maskz_shuffle_i64x2(detail::kAllOfEight, first[g], first[g + 1], kHalf);
  };
  const auto quad = [&]<int kQuad>(__m512i upper_rows, __m512i lower_rows) {
    return VecI{detail::bits_as<detail::NativeI>(
        _mm512_maskz_shuffle_i64x2(detail::kAllOfEight, upper_rows, lower_rows, kQuad))};
  };
  constexpr int kLow = 0x44;
  constexpr int kHigh = 0xee;
  constexpr int kEven = 0x88;
  constexpr int kOdd = 0xdd;
  const __m512i low[2] = {halves.template operator()<kLow>(0), halves.template operator()<kLow>(2)};
  const __m512i high[2] = {halves.template operator()<kHigh>(0),
                           halves.template operator()<kHigh>(2)};
  quads[0] = quad.template operator()<kEven>(low[0], low[1]);
  quads[1] = quad.template operator()<kOdd>(low[0], low[1]);
  quads[2] = quad.template operator()<kEven>(high[0], high[1]);
  quads[3] = quad.template operator()<kOdd>(high[0], high[1]);
#else
  quads[0] = load_quads(rows, stride);
  quads[1] = load_quads(rows + 16, stride);
  quads[2] = load_quads(rows + 32, stride);
  quads[3] = load_quads(rows + 48, stride);
#endif
}

/// The same 16 bytes kWidth / 4 times. Needs kWidth >= 4.
[[gnu::always_inline]] inline VecI repeat_quad(const void* source) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeI>(_mm512_maskz_broadcast_i32x4(
      detail::kAllLanes, _mm_loadu_si128(static_cast<const __m128i*>(source))))};
#else
  return load_quads(static_cast<const std::uint8_t*>(source), 0);
#endif
}

/// 2 kWidth values rounded to bf16 as store() does, in pairs: lane i holds values 2 i and 2 i + 1
/// in the order of memory, `low` being the first kWidth values. Subnormals may become zero.
[[gnu::always_inline]] inline VecI round_pairs(VecF low, VecF high) {
#if SLUICE_SIMD_BF16
  const __m512bh pairs =
      _mm512_cvtne2ps_pbh(detail::bits_as<__m512>(high.v), detail::bits_as<__m512>(low.v));
  return {detail::bits_as<detail::NativeI>(pairs)};
#else
  bf16 pairs[2 * kWidth];
  store(pairs, low);
  store(pairs + kWidth, high);
  return load_int32(pairs);
#endif
}

/// Each lane of `sum` plus the products of its two bf16 in a and in b: first the product of the
/// upper 16 bits is added, then that of the lower, each as fma() does. Where one instruction does
/// it, operands, products and sums below 2^-126 count as zero.
[[gnu::always_inline]] inline VecF dot_pairs(VecF sum, VecI a, VecI b) {
#if SLUICE_SIMD_BF16
  return {detail::bits_as<detail::NativeF>(_mm512_dpbf16_ps(detail::bits_as<__m512>(sum.v),
                                                            detail::bits_as<__m512bh>(a.v),
                                                            detail::bits_as<__m512bh>(b.v)))};
#else
  const VecI upper = broadcast(std::int32_t{-65536});
  sum = fma(bits_as_float(a & upper), bits_as_float(b & upper), sum);
  return fma(bits_as_float(a << 16), bits_as_float(b << 16), sum);
#endif
}

/// Sums within groups of four lanes, of four registers: lane 4 g + r of the result is the sum of
/// lanes 4 g to 4 g + 3 of a[r]. Needs kWidth >= 4.
[[gnu::always_inline]] inline VecI add_groups(const VecI (&a)[4]) {
#if SLUICE_SIMD_AVX512
  const auto low = [](VecI x, VecI y) {
    return VecI{detail::bits_as<detail::NativeI>(_mm512_maskz_unpacklo_epi32(
        detail::kAllLanes, detail::bits_as<__m512i>(x.v), detail::bits_as<__m512i>(y.v)))};
  };
  const auto high = [](VecI x, VecI y) {
    return VecI{detail::bits_as<detail::NativeI>(_mm512_maskz_unpackhi_epi32(
        detail::kAllLanes, detail::bits_as<__m512i>(x.v), detail::bits_as<__m512i>(y.v)))};
  };
  // Lanes 0 + 2 of two registers, then their lanes 1 + 3.
  const auto first = detail::bits_as<__m512i>((low(a[0], a[1]) + high(a[0], a[1])).v);
  const auto second = detail::bits_as<__m512i>((low(a[2], a[3]) + high(a[2], a[3])).v);
  return VecI{detail::bits_as<detail::NativeI>(
             _mm512_maskz_unpacklo_epi64(detail::kAllOfEight, first, second))} +
         VecI{detail::bits_as<detail::NativeI>(
             _mm512_maskz_unpackhi_epi64(detail::kAllOfEight, first, second))};
#elif SLUICE_SIMD_AVX && defined(__AVX2__)
  const auto half = [](VecI x, VecI y) {
    const auto u = detail::bits_as<__m256i>(x.v);
    const auto v = detail::bits_as<__m256i>(y.v);
    return _mm256_add_epi32(_mm256_unpacklo_epi32(u, v), _mm256_unpackhi_epi32(u, v));
  };
  const __m256i first = half(a[0], a[1]);
  const __m256i second = half(a[2], a[3]);
  return {detail::bits_as<detail::NativeI>(_mm256_add_epi32(_mm256_unpacklo_epi64(first, second),
                                                            _mm256_unpackhi_epi64(first, second)))};
#else
  VecI result = broadcast(std::int32_t{0});
  std::int32_t lanes[kWidth];
  std::int32_t sums[kWidth];
  for (int r = 0; r < 4; ++r) {
    std::memcpy(lanes, &a[r].v, sizeof(lanes));
    for (int g = 0; g + 4 <= kWidth; g += 4)
      sums[g + r] = lanes[g] + lanes[g + 1] + lanes[g + 2] + lanes[g + 3];
  }
  std::memcpy(&result.v, sums, sizeof(sums));
  return result;
#endif
}

/// sums[r] = the sum of lanes r, r + 4, ..., added by halves of the register. Needs kWidth >= 4.
[[gnu::always_inline]] inline void fold_to_four(VecF a, float (&sums)[4]) {
#if SLUICE_SIMD_AVX || SLUICE_SIMD_AVX512 || SLUICE_SIMD_SSE
  _mm_storeu_ps(sums, detail::fold_to_four(a, [](__m128 x, __m128 y) { return _mm_add_ps(x, y); }));
#else
  float lanes[kWidth];
  store(lanes, a);
  for (int half = kWidth / 2; half >= 4; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  std::memcpy(sums, lanes, sizeof(sums));
#endif
}

/// Four floats, repeated: lane 4 g + r is source[r]. Needs kWidth >= 4.
[[gnu::always_inline]] inline VecF repeat_four(const float (&source)[4]) {
#if SLUICE_SIMD_AVX512
  return {detail::bits_as<detail::NativeF>(
      _mm512_maskz_broadcast_f32x4(detail::kAllLanes, _mm_loadu_ps(source)))};
#else
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = source[i % 4];
  return load(lanes);
#endif
}

/// kWidth / 4 runs of 32 bytes: the first 16 of each in target[0], the others in target[1]. Needs
/// kWidth >= 4.
[[gnu::always_inline]] inline void load_runs(const void* source, VecI (&target)[2]) {
#if SLUICE_SIMD_AVX512
  const auto* bytes = static_cast<const char*>(source);
  const __m512i first = _mm512_loadu_si512(bytes);
  const __m512i second = _mm512_loadu_si512(bytes + 64);
  target[0] = {detail::bits_as<detail::NativeI>(
      _mm512_maskz_shuffle_i64x2(detail::kAllOfEight, first, second, 0x88))};
  target[1] = {detail::bits_as<detail::NativeI>(
      _mm512_maskz_shuffle_i64x2(detail::kAllOfEight, first, second, 0xdd))};
#else
  const auto* bytes = static_cast<const char*>(source);
  for (int k = 0; k < 2; ++k) target[k] = detail::join_quads(bytes + 16 * k, bytes + 32 + 16 * k);
#endif
}

/// Sixteen bytes of each of four rows, such as the scales of a block. Needs kWidth >= 4.
class RowBytes {
 public:
  /// The bytes at rows[r] + offset.
  [[gnu::always_inline]] RowBytes(const std::uint8_t* const (&rows)[4], int offset) {
#if SLUICE_SIMD_AVX512
    const auto row = [&](int r) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
    };
    __m512i all = _mm512_castsi128_si512(row(0));
    all = _mm512_inserti32x4(all, row(1), 1);
    all = _mm512_inserti32x4(all, row(2), 2);
    bytes_ = detail::bits_as<detail::NativeI>(_mm512_inserti32x4(all, row(3), 3));
#else
    for (int r = 0; r < 4; ++r) std::memcpy(bytes_[r], rows[r] + offset, 16);
#endif
  }

  /// Of rows whose last twelve bytes are packed as those of a Q4_K block: the eight scales and the
  /// eight mins, see sluice::unpack_scales_q4_k.
  [[gnu::always_inline]] void unpack_scales_q4_k() {
#if SLUICE_SIMD_AVX512
    const detail::NativeU words = detail::bits_as<detail::NativeU>(bytes_);
    const detail::NativeU low =
        __builtin_shufflevector(words, words, 1, 1, 2, 2, 5, 5, 6, 6, 9, 9, 10, 10, 13, 13, 14, 14);
    const detail::NativeU high = __builtin_shufflevector(words, words, 3, 3, 3, 3, 7, 7, 7, 7, 11,
                                                         11, 11, 11, 15, 15, 15, 15);
    constexpr detail::NativeU kShift = {0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 4};
    constexpr detail::NativeU kOdd = {0, ~0U, 0, ~0U, 0, ~0U, 0, ~0U,
                                      0, ~0U, 0, ~0U, 0, ~0U, 0, ~0U};
    const detail::NativeU even_words = low & 0x3f3f3f3fU;
    const detail::NativeU odd_words = ((high >> kShift) & 0x0f0f0f0fU) | ((low >> 2) & 0x30303030U);
    bytes_ = detail::bits_as<detail::NativeI>((even_words & ~kOdd) | (odd_words & kOdd));
#else
    for (auto& row : bytes_) {
      std::uint32_t words[4];
      std::memcpy(words, row, sizeof(words));
      const std::uint32_t unpacked[4] = {
          words[1] & 0x3f3f3f3fU,
          (words[3] & 0x0f0f0f0fU) | ((words[1] >> 2) & 0x30303030U),
          words[2] & 0x3f3f3f3fU,
          ((words[3] >> 4) & 0x0f0f0f0fU) | ((words[2] >> 2) & 0x30303030U),
      };
      std::memcpy(row, unpacked, sizeof(unpacked));
    }
#endif
  }

  /// Byte first + step g of row r in lane 4 g + r, as a signed or unsigned number.
  template <bool kSigned>
  [[gnu::always_inline]] VecF at(int first, int step) const {
#if SLUICE_SIMD_AVX512
    constexpr detail::NativeI kRow = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    constexpr detail::NativeI kGroup = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const detail::NativeI byte = kGroup * step + first;
    const __m512i words = _mm512_maskz_permutexvar_epi32(
        detail::kAllLanes, detail::bits_as<__m512i>(kRow * 4 + (byte >> 2)),
        detail::bits_as<__m512i>(bytes_));
    const auto top = detail::bits_as<detail::NativeU>(words)
                     << detail::bits_as<detail::NativeU>(24 - (byte & 3) * 8);
    return to_float(VecI{kSigned ? detail::bits_as<detail::NativeI>(top) >> 24
                                 : detail::bits_as<detail::NativeI>(top >> 24)});
#else
    float lanes[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const std::uint8_t byte = bytes_[i % 4][first + step * (i / 4)];
      lanes[i] =
          kSigned ? static_cast<float>(static_cast<std::int8_t>(byte)) : static_cast<float>(byte);
    }
    return load(lanes);
#endif
  }

 private:
#if SLUICE_SIMD_AVX512
  detail::NativeI bytes_;
#else
  std::uint8_t bytes_[4][16];
#endif
};

/// Lanes 4 g to 4 g + 3 go to target + g * stride, for each of the kWidth / 4 groups; the lane of a
/// narrower register to target.
[[gnu::always_inline]] inline void store_quads(float* target, [[maybe_unused]] std::int64_t stride,
                                               VecF value) {
#if SLUICE_SIMD_AVX512
  const auto wide = detail::bits_as<__m512>(value.v);
  const auto quad = [&](int g, __m128 lanes) {
    _mm_storeu_ps(target + g * stride, lanes);
  };
  quad(0, _mm512_maskz_extractf32x4_ps(detail::kAllOfEight, wide, 0));
  quad(1, _mm512_maskz_extractf32x4_ps(detail::kAllOfEight, wide, 1));
  quad(2, _mm512_maskz_extractf32x4_ps(detail::kAllOfEight, wide, 2));
  quad(3, _mm512_maskz_extractf32x4_ps(detail::kAllOfEight, wide, 3));
#elif SLUICE_SIMD_AVX
  const auto wide = detail::bits_as<__m256>(value.v);
  _mm_storeu_ps(target, _mm256_castps256_ps128(wide));
  _mm_storeu_ps(target + stride, _mm256_extractf128_ps(wide, 1));
#else
  store(target, value);
#endif
}

/// Starts loading the cache line at `address` for reading. Never faults.
[[gnu::always_inline]] inline void prefetch(const void* address) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  __builtin_prefetch(address, 0, 3);
#else
  static_cast<void>(address);
#endif
}

/// The same for a line that will be written.
[[gnu::always_inline]] inline void prefetch_for_write(const void* address) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  __builtin_prefetch(address, 1, 3);
#else
  static_cast<void>(address);
#endif
}

/// As prefetch(), but only as far as the second-level cache: for what is not used at once.
[[gnu::always_inline]] inline void prefetch_far(const void* address) {
#if SLUICE_HAS_VECTOR_EXTENSIONS
  __builtin_prefetch(address, 0, 2);
#else
  static_cast<void>(address);
#endif
}

}  // namespace sluice::simd
