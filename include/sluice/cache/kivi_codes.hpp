// SPDX-License-Identifier: MIT
/// KIVI's codes of two or four bits (arXiv 2402.02750; quant/new_pack.py of its release): keys in
/// groups of tokens, each channel with a scale of its own, values in groups of channels, each token
/// with scales of its own. Keys have channels that are large for every token, which a scale a token
/// would spoil; values have none.
///
/// x^ = scale * n + zero with zero = min and scale = (max - min) / (2^bits - 1), both binary16, and
/// n = (x - zero) / scale, rounded half to even and clipped to 0 ... 2^bits - 1. Deviation: a group
/// of equal numbers has scale 1, where the release divides by 0.
///
/// |x - x^| <= scale (1/2 + 2^-11 (2^bits - 1)) + 2^-11 |min| + 2^-21, x^ meant exactly: half a
/// step, and at the group's ends what the roundings of scale and zero leave. A group with a number
/// that is not finite, or whose scale or zero overflows binary16, has NaN for both and codes of 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "sluice/cache/kv_element.hpp"
#include "sluice/core/element.hpp"

namespace sluice {

/// Codes are fields of 32-bit words, the first in the lowest bits.
template <int kBits>
struct KiviCodes {
  static_assert(kBits == 2 || kBits == 4);
  static constexpr std::int64_t kPerWord = 32 / kBits;
  static constexpr std::int32_t kMost = (1 << kBits) - 1;

  /// Codes of a group. x: `count` numbers, `stride` apart, a multiple of kPerWord; words: [count /
  /// kPerWord].
  static GroupScale quantise(const float* x, std::int64_t count, std::int64_t stride,
                             std::uint32_t* words) {
    float low = x[0];
    float high = x[0];
    bool finite = true;
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = x[i * stride];
      finite = finite && std::isfinite(value);
      low = std::min(low, value);
      high = std::max(high, value);
    }
    std::fill_n(words, count / kPerWord, 0U);
    const float width = (high - low) / static_cast<float>(kMost);
    const GroupScale stored{f16(width > 0 ? width : 1.0F), f16(low)};
    auto scale = static_cast<float>(stored.scale);
    const auto zero = static_cast<float>(stored.zero);
    if (!finite || !std::isfinite(scale) || !std::isfinite(zero)) {
      const f16 none(std::numeric_limits<float>::quiet_NaN());
      return {none, none};
    }
    // A step below what binary16 holds is none: every number is the lowest.
    if (scale == 0) scale = 1;
    constexpr float kMagic = 12582912.0F;  // next to it floats are whole numbers
    for (std::int64_t i = 0; i < count; ++i) {
      const float n = std::clamp((x[i * stride] - zero) / scale, 0.0F, static_cast<float>(kMost));
      const auto code =
          static_cast<std::uint32_t>(static_cast<std::int32_t>((n + kMagic) - kMagic));
      words[i / kPerWord] |= code << (i % kPerWord * kBits);
    }
    return stored;
  }

  /// The i-th code of a group.
  static std::uint32_t code(const std::uint32_t* words, std::int64_t i) {
    return words[i / kPerWord] >> (i % kPerWord * kBits) & static_cast<std::uint32_t>(kMost);
  }
  static float dequantise(std::uint32_t code, GroupScale scale) {
    return static_cast<float>(code) * static_cast<float>(scale.scale) +
           static_cast<float>(scale.zero);
  }
};

}  // namespace sluice
