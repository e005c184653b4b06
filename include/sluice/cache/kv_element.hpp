// SPDX-License-Identifier: MIT
/// The element types of cached keys and values: floats as they are, or codes with scales beside
/// them. A row is one token's key or value in one head. Quantised rows are written once, from
/// float32, and read in place: attention converts codes in registers and applies scales to scores
/// and weights.
///
/// | type     | x^               | scales                | error |x - x^|, at most              |
/// |----------|------------------|-----------------------|--------------------------------------|
/// | int8_t   | scale * n        | 1 a row               | scale (1/2 + 2^-16)                  |
/// | fp8_e4m3 | scale * n        | 1 a row               | (1 + 2^-16) max(2^-4 |x|, 2^-10 scale) |
/// | int4x2   | scale * n + zero | 1 in each 128 channels | (1/2 + 2^-16) scale + 2^-11 (max - min
/// + |min|) + 2^-20 |
/// | q8_0     | scale * n        | 1 in each 32 channels | (1/2 + 2^-4) scale + 2^-18 |
/// | q4_0     | scale * (n - 8)  | 1 in each 32 channels | (1 + 2^-7) |scale| + 2^-21 |
///
/// x^ is meant exactly, without the roundings of what computes with it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

#include "sluice/core/element.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Elements that stand for codes.
template <class T>
concept BlockElement = std::same_as<T, q8_0> || std::same_as<T, q4_0>;
template <class T>
concept QuantisedElement = std::same_as<T, std::int8_t> || std::same_as<T, fp8_e4m3> ||
    std::same_as<T, int4x2> || BlockElement<T>;

/// Elements of a cache.
template <class T>
concept KvElement = RotaryElement<T> || QuantisedElement<T>;

/// What segments of a KIVI cache are made of (cache/kivi_codes.hpp): words of codes of kBits bits,
/// or, in segments whose scales are null, rows of Tail, strides in elements of Tail. As keys: [kv
/// heads, groups of tokens, head_dim, words of a channel], key_token_stride from group to group,
/// and Segment::key_first of the first group's tokens stand before entry 0; key_scales: [kv heads,
/// groups of tokens, 2, head_dim], scales and then zeros. As values: [kv heads, tokens, words of a
/// row]; value_scales: [kv heads, tokens, groups of channels, 2], each a scale and a zero.
template <int kBits, RotaryElement Tail>
struct KiviElement {
  std::uint8_t bytes[4];  ///< a word, which needs no alignment
};

template <class T>
inline constexpr bool kIsKiviElement = false;
template <int kBits, class Tail>
inline constexpr bool kIsKiviElement<KiviElement<kBits, Tail>> = true;
/// Elements of segments that attention reads and no row alone is stored as.
template <class T>
concept GroupedElement = kIsKiviElement<T>;

/// What turns the codes of a group of channels into numbers: scale * n + zero.
struct GroupScale {
  f16 scale;
  f16 zero;
};

/// How a row of `dim` channels is stored: stored(dim) elements and scales(dim) scales.
template <class T>
requires(KvElement<T> || GroupedElement<T>) struct KvRow {
  using Scale = float;             ///< never present
  static constexpr int kUnit = 1;  ///< a row has a multiple of so many channels
  static constexpr std::uint32_t kTag = static_cast<std::uint32_t>(element_type_of<T>);
  static constexpr std::int64_t stored(std::int64_t dim) { return dim; }
  static constexpr std::int64_t scales(std::int64_t) { return 0; }
  static void quantise(const float* from, std::int64_t dim, T* to, Scale*) {
    for (std::int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(from[d]);
  }
  static void dequantise(const T* from, const Scale*, std::int64_t dim, float* to) {
    for (std::int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d]);
  }
};

namespace detail {

/// The largest |x|; NaN where a channel is NaN or infinite. Bit patterns are compared, since
/// compilers vectorise the maximum of integers.
inline float finite_peak(const float* x, std::int64_t count) {
  std::uint32_t peak = 0;
  for (std::int64_t i = 0; i < count; ++i)
    peak = std::max(peak, std::bit_cast<std::uint32_t>(x[i]) & 0x7fffffffU);
  return peak < 0x7f800000U ? std::bit_cast<float>(peak) : std::numeric_limits<float>::quiet_NaN();
}

/// A float's bits, in an order of integers that is that of the floats; its own inverse.
constexpr std::int32_t ordered_bits(std::int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

/// The scale with which |x| of at most `peak` reaches `top`: normal, so that quotients by it are
/// accurate, and NaN for NaN.
inline float scale_to(float peak, float top) {
  const float scale = peak / top;
  return scale < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : scale;
}

}  // namespace detail

/// Symmetric codes of a byte: scale = max|x| / 127 in float32, at least 2^-126; n = x / scale,
/// rounded to nearest even. A row with a NaN or an infinity has a scale of NaN and codes of 0: what
/// reads it gets NaN, as with floats.
template <>
struct KvRow<std::int8_t> {
  using Scale = float;
  static constexpr int kUnit = 1;
  static constexpr std::uint32_t kTag = 0x100;
  static constexpr std::int64_t stored(std::int64_t dim) { return dim; }
  static constexpr std::int64_t scales(std::int64_t) { return 1; }
  static void quantise(const float* from, std::int64_t dim, std::int8_t* to, Scale* scale) {
    *scale = detail::scale_to(detail::finite_peak(from, dim), 127.0F);
    if (std::isnan(*scale)) {
      std::fill_n(to, dim, std::int8_t{0});
      return;
    }
    // Next to 1.5 * 2^23 floats are whole numbers: the sum is rounded to one.
    constexpr float kMagic = 12582912.0F;
    for (std::int64_t d = 0; d < dim; ++d)
      to[d] =
          static_cast<std::int8_t>(static_cast<std::int32_t>((from[d] / *scale + kMagic) - kMagic));
  }
  static void dequantise(const std::int8_t* from, const Scale* scale, std::int64_t dim, float* to) {
    for (std::int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d]) * *scale;
  }
};

/// FP8 E4M3 with a scale of its own for each row: scale = max|x| / 448 in float32, at least 2^-126;
/// n = x / scale, rounded to nearest even. What is not finite: as int8_t.
template <>
struct KvRow<fp8_e4m3> {
  using Scale = float;
  static constexpr int kUnit = 1;
  static constexpr std::uint32_t kTag = 0x101;
  static constexpr std::int64_t stored(std::int64_t dim) { return dim; }
  static constexpr std::int64_t scales(std::int64_t) { return 1; }
  static void quantise(const float* from, std::int64_t dim, fp8_e4m3* to, Scale* scale) {
    *scale = detail::scale_to(detail::finite_peak(from, dim), 448.0F);
    const bool finite = !std::isnan(*scale);
    for (std::int64_t d = 0; d < dim; ++d) to[d] = fp8_e4m3(finite ? from[d] / *scale : 0.0F);
  }
  static void dequantise(const fp8_e4m3* from, const Scale* scale, std::int64_t dim, float* to) {
    for (std::int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d]) * *scale;
  }
};

/// DuoAttention's four bits (its demo's quantised cache), asymmetric, in groups of 128 channels of
/// which the last may be shorter: zero = min, scale = (max - min) / 15 + 1e-8, n = (x - zero) /
/// scale in float32, rounded half away from zero and clipped to 0 ... 15; zero and scale are then
/// stored as binary16. Channels come in pairs: `dim` is even. A group with a channel that is not
/// finite, or whose zero or scale overflows binary16, has NaN for both and codes of 0.
template <>
struct KvRow<int4x2> {
  using Scale = GroupScale;
  static constexpr int kUnit = 2;
  static constexpr std::int64_t kGroup = 128;
  static constexpr std::uint32_t kTag = 0x102;
  static constexpr std::int64_t stored(std::int64_t dim) { return dim / 2; }
  static constexpr std::int64_t scales(std::int64_t dim) { return (dim + kGroup - 1) / kGroup; }
  static void quantise(const float* from, std::int64_t dim, int4x2* to, Scale* scales) {
    for (std::int64_t begin = 0; begin < dim; begin += kGroup)
      quantise_group(from + begin, std::min(kGroup, dim - begin), to + begin / 2,
                     scales[begin / kGroup]);
  }
  static void dequantise(const int4x2* from, const Scale* scales, std::int64_t dim, float* to) {
    for (std::int64_t begin = 0; begin < dim; begin += kGroup) {
      const auto scale = static_cast<float>(scales[begin / kGroup].scale);
      const auto zero = static_cast<float>(scales[begin / kGroup].zero);
      const std::int64_t end = std::min(begin + kGroup, dim);
      for (std::int64_t d = begin; d < end; d += 2) {
        const std::uint32_t pair = from[d / 2].bits;
        to[d] = static_cast<float>(pair >> 4) * scale + zero;
        to[d + 1] = static_cast<float>(pair & 15U) * scale + zero;
      }
    }
  }

 private:
  static void quantise_group(const float* x, std::int64_t count, int4x2* to, Scale& stored) {
    std::int32_t least = std::numeric_limits<std::int32_t>::max();
    std::int32_t most = std::numeric_limits<std::int32_t>::min();
    for (std::int64_t d = 0; d < count; ++d) {
      const std::int32_t ordered = detail::ordered_bits(std::bit_cast<std::int32_t>(x[d]));
      least = std::min(least, ordered);
      most = std::max(most, ordered);
    }
    const float low = std::bit_cast<float>(detail::ordered_bits(least));
    const float high = std::bit_cast<float>(detail::ordered_bits(most));
    const float scale = (high - low) / 15.0F + 1e-8F;
    stored = {f16(scale), f16(low)};
    constexpr std::uint16_t kInfinity = 0x7c00;
    if (std::isnan(detail::finite_peak(x, count)) || stored.scale.bits >= kInfinity ||
        (stored.zero.bits & 0x7fffU) >= kInfinity) {
      stored = {f16(std::numeric_limits<float>::quiet_NaN()),
                f16(std::numeric_limits<float>::quiet_NaN())};
      std::fill_n(to, count / 2, int4x2{0});
      return;
    }
    const auto code = [&](float value) {
      const float n = std::min((value - low) / scale, 15.0F);
      const auto whole = static_cast<std::int32_t>(n);
      return whole + (n - static_cast<float>(whole) >= 0.5F ? 1 : 0);
    };
    for (std::int64_t d = 0; d < count; d += 2)
      to[d / 2].bits = static_cast<std::uint8_t>(code(x[d]) << 4 | code(x[d + 1]));
  }
};

namespace detail {

/// The scale of a block as binary16 and, for codes, its inverse as ggml forms it: of the scale
/// before it is rounded. NaN for what is not finite, or overflows binary16.
struct BlockScale {
  f16 stored;
  float inverse;

  explicit BlockScale(float scale) : stored(scale), inverse(scale != 0 ? 1.0F / scale : 0.0F) {
    if ((stored.bits & 0x7fffU) >= 0x7c00U) stored = f16(std::numeric_limits<float>::quiet_NaN());
    // A scale below 2^-128 has no inverse in float32; it is 0 in binary16.
    if (!std::isfinite(inverse)) inverse = 0;
  }
  bool is_nan() const { return (stored.bits & 0x7fffU) > 0x7c00U; }
};

}  // namespace detail

/// ggml's Q8_0 (its quantize_row_q8_0_ref), the scales beside the codes: scale = max|x| / 127,
/// stored as binary16; n = x / scale, by the scale before that rounding, half away from zero. A
/// block with a channel that is not finite, or whose scale overflows binary16, has a scale of NaN
/// and codes of 0. `dim` is a multiple of 32.
template <>
struct KvRow<q8_0> {
  using Scale = f16;
  static constexpr int kUnit = 32;
  static constexpr std::int64_t kGroup = 32;
  static constexpr std::uint32_t kTag = 0x103;
  static constexpr std::int64_t stored(std::int64_t dim) { return dim; }
  static constexpr std::int64_t scales(std::int64_t dim) { return dim / kGroup; }
  static void quantise(const float* from, std::int64_t dim, q8_0* to, Scale* scales) {
    for (std::int64_t begin = 0; begin < dim; begin += kGroup) {
      const float* const x = from + begin;
      const detail::BlockScale scale(detail::finite_peak(x, kGroup) / 127.0F);
      scales[begin / kGroup] = scale.stored;
      for (std::int64_t d = 0; d < kGroup; ++d)
        to[begin + d].bits = scale.is_nan()
                                 ? std::int8_t{0}
                                 : static_cast<std::int8_t>(std::round(x[d] * scale.inverse));
    }
  }
  static void dequantise(const q8_0* from, const Scale* scales, std::int64_t dim, float* to) {
    for (std::int64_t d = 0; d < dim; ++d)
      to[d] = static_cast<float>(from[d].bits) * static_cast<float>(scales[d / kGroup]);
  }
};

/// ggml's Q4_0 (its quantize_row_q4_0_ref), the scales beside the codes: scale = x / -8 of the x of
/// largest magnitude, the first of several, stored as binary16; n = x / scale + 8, by the scale
/// before that rounding, half away from -infinity, at most 15: so what has the opposite sign and
/// reaches 8 steps is a step off. What is not finite, and `dim`: as q8_0.
template <>
struct KvRow<q4_0> {
  using Scale = f16;
  static constexpr int kUnit = 32;
  static constexpr std::int64_t kGroup = 32;
  static constexpr std::uint32_t kTag = 0x104;
  static constexpr std::int64_t stored(std::int64_t dim) { return dim / 2; }
  static constexpr std::int64_t scales(std::int64_t dim) { return dim / kGroup; }
  static void quantise(const float* from, std::int64_t dim, q4_0* to, Scale* scales) {
    for (std::int64_t begin = 0; begin < dim; begin += kGroup) {
      const float* const x = from + begin;
      float peak = 0;
      for (std::int64_t d = 0; d < kGroup; ++d)
        if (std::abs(x[d]) > std::abs(peak)) peak = x[d];
      if (std::isnan(detail::finite_peak(x, kGroup)))
        peak = std::numeric_limits<float>::quiet_NaN();
      const detail::BlockScale scale(peak / -8.0F);
      scales[begin / kGroup] = scale.stored;
      const auto code = [&](std::int64_t d) {
        if (scale.is_nan()) return 0;
        return std::min(15, static_cast<int>(x[d] * scale.inverse + 8.5F));
      };
      for (std::int64_t d = 0; d < kGroup / 2; ++d)
        to[begin / 2 + d].bits = static_cast<std::uint8_t>(code(d) | code(d + kGroup / 2) << 4);
    }
  }
  static void dequantise(const q4_0* from, const Scale* scales, std::int64_t dim, float* to) {
    for (std::int64_t begin = 0; begin < dim; begin += kGroup) {
      const auto scale = static_cast<float>(scales[begin / kGroup]);
      for (std::int64_t d = 0; d < kGroup; ++d) {
        const int pair = from[begin / 2 + d % (kGroup / 2)].bits;
        to[begin + d] = static_cast<float>((d < kGroup / 2 ? pair & 15 : pair >> 4) - 8) * scale;
      }
    }
  }
};

/// Groups of KIVI's codes; stored(): of a row of values.
template <int kBits, RotaryElement Tail>
struct KvRow<KiviElement<kBits, Tail>> {
  using Scale = f16;
  static constexpr int kUnit = 1;
  static constexpr std::uint32_t kTag = 0x200 | kBits << 4 | KvRow<Tail>::kTag;
  static constexpr std::int64_t stored(std::int64_t dim) { return dim * kBits / 32; }
};

}  // namespace sluice
