// SPDX-License-Identifier: MIT
/// Matrix products of quantised weights with activations rounded to 8 bits (Activations::kInt8).
///
/// Rounding: a block of 32 columns of a token has the scale d = a / 127, a its largest magnitude,
/// and the levels x / d rounded to the nearest integer, ties to even; where a < 2^-96 the block
/// counts as zero. Each value is then within d / 2 of what it was, plus float32 rounding, so that
/// an output is within the sum over blocks of a / 254 * sum |W| of the product with unrounded
/// activations. A block with an infinity or a NaN makes its token's outputs NaN.
///
/// Arithmetic: weights stand in units that share a scale, 16 columns for Q6_K and 32 for the
/// others. A unit's products of levels are added exactly, in integers; units are then added in
/// float32, in column order within kInt8Chains interleaved chains. The order is a function of the
/// columns alone: a token's outputs are the same bits whatever tokens are computed beside it, on
/// either path, by a team of any size.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "sluice/backend/cpu/linear_task.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::detail {

// Chains of additions: one per group of four lanes, so that a register of unit sums of four rows
// is added at once.
inline constexpr int kInt8Chains = std::max(1, simd::kWidth / 4);
// Rows of a panel, one per lane of kInt8Vectors registers.
inline constexpr int kInt8Vectors = simd::kNumRegisters >= 32 ? 2 : 1;
inline constexpr int kInt8Rows = kInt8Vectors * simd::kWidth;
// Tokens of a group, and tokens that the panel kernel multiplies at a time: for each register of
// rows and token an accumulator and a unit's sum of products. A group and a panel of a few hundred
// columns fill a first-level cache.
inline constexpr int kInt8Tokens = simd::kNumRegisters >= 32 ? 16 : 8;
inline constexpr int kInt8Four = 4;
// Words (4 bytes) of the panels that one member holds at a time: 384 KiB.
inline constexpr std::int64_t kInt8Budget = 96 * 1024;

/// How a type's weights are divided and read. A weight is scale * (level - kZero) + offset.
///   kUnit: columns of a unit; kValues: columns of a stored block;
///   kChainUnits: consecutive units of one chain;
///   kSigned: levels are signed bytes (else 0 to 127); kHasOffset: offsets are not all zero;
///   unpack(block, levels, scales, offsets, stride): levels [kValues] in column order, scales and
///     offsets [kValues / kUnit] at multiples of `stride`.
template <ElementType kType>
struct Int8Weights {
  static constexpr bool kExists = false;
};

struct Int8WeightsDefaults {
  static constexpr bool kExists = true;
  static constexpr int kUnit = 32;
  static constexpr int kValues = 32;
  static constexpr int kChainUnits = 1;
  static constexpr bool kSigned = false;
  static constexpr bool kHasOffset = false;
  static constexpr int kZero = 0;
};

inline float half_at(const std::uint8_t* bytes) {
  f16 half;
  std::memcpy(&half, bytes, sizeof(half));
  return simd::to_float(half);
}

// The low halves of kBytes bytes, then their high halves.
template <int kBytes>
[[gnu::always_inline]] inline void unpack_nibbles(const std::uint8_t* bytes, std::uint8_t* levels) {
  for (int i = 0; i < kBytes; i += 8) {  // eight at a time, by which all targets do well
    std::uint64_t word;
    std::memcpy(&word, bytes + i, sizeof(word));
    const std::uint64_t low = word & 0x0f0f0f0f0f0f0f0fU;
    const std::uint64_t high = (word >> 4) & 0x0f0f0f0f0f0f0f0fU;
    std::memcpy(levels + i, &low, sizeof(low));
    std::memcpy(levels + kBytes + i, &high, sizeof(high));
  }
}

template <>
struct Int8Weights<ElementType::kQ8_0> : Int8WeightsDefaults {
  static constexpr bool kSigned = true;
  static constexpr int kZero = simd::kSignedBias;
  static void unpack(const std::uint8_t* block, std::uint8_t* levels, float* scales,
                     float* /*offsets*/, std::int64_t /*stride*/) {
    for (int i = 0; i < 32; ++i)
      levels[i] = static_cast<std::uint8_t>(block[offsetof(BlockQ8_0, qs) + i] ^ kZero);
    *scales = half_at(block);
  }
};

template <>
struct Int8Weights<ElementType::kQ4_0> : Int8WeightsDefaults {
  static constexpr int kZero = 8;
  static void unpack(const std::uint8_t* block, std::uint8_t* levels, float* scales,
                     float* /*offsets*/, std::int64_t /*stride*/) {
    unpack_nibbles<16>(block + offsetof(BlockQ4_0, qs), levels);
    *scales = half_at(block);
  }
};

template <>
struct Int8Weights<ElementType::kQ4_1> : Int8WeightsDefaults {
  static constexpr bool kHasOffset = true;
  static void unpack(const std::uint8_t* block, std::uint8_t* levels, float* scales, float* offsets,
                     std::int64_t /*stride*/) {
    unpack_nibbles<16>(block + offsetof(BlockQ4_1, qs), levels);
    *scales = half_at(block);
    *offsets = half_at(block + offsetof(BlockQ4_1, m));
  }
};

template <>
struct Int8Weights<ElementType::kQ4_K> : Int8WeightsDefaults {
  static constexpr int kValues = 256;
  static constexpr int kChainUnits = 2;  // the low and the high halves of the same bytes
  static constexpr bool kHasOffset = true;
  static void unpack(const std::uint8_t* block, std::uint8_t* levels, float* scales, float* offsets,
                     std::int64_t stride) {
    const std::uint8_t* qs = block + offsetof(BlockQ4_K, qs);
    for (int c = 0; c < 4; ++c) unpack_nibbles<32>(qs + 32 * c, levels + 64 * c);
    std::uint8_t packed[12];
    std::uint8_t unpacked[16];
    std::memcpy(packed, block + offsetof(BlockQ4_K, scales), sizeof(packed));
    unpack_scales_q4_k(packed, unpacked);
    const float d = half_at(block);
    const float dmin = half_at(block + offsetof(BlockQ4_K, dmin));
    for (int s = 0; s < 8; ++s) {
      scales[s * stride] = d * static_cast<float>(unpacked[s]);
      offsets[s * stride] = -dmin * static_cast<float>(unpacked[8 + s]);
    }
  }
};

template <>
struct Int8Weights<ElementType::kQ6_K> : Int8WeightsDefaults {
  static constexpr int kUnit = 16;
  static constexpr int kValues = 256;
  static constexpr int kZero = 32;
  static void unpack(const std::uint8_t* block, std::uint8_t* levels, float* scales,
                     float* /*offsets*/, std::int64_t stride) {
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* low = block + 64 * half;
      const std::uint8_t* high = block + offsetof(BlockQ6_K, qh) + 32 * half;
      std::uint8_t* target = levels + 128 * half;
      for (int l = 0; l < 32; ++l) {
        target[l] = static_cast<std::uint8_t>((low[l] & 15) | ((high[l] & 3) << 4));
        target[32 + l] = static_cast<std::uint8_t>((low[32 + l] & 15) | ((high[l] & 12) << 2));
        target[64 + l] = static_cast<std::uint8_t>((low[l] >> 4) | (high[l] & 48));
        target[96 + l] = static_cast<std::uint8_t>((low[32 + l] >> 4) | ((high[l] & 192) >> 2));
      }
    }
    const float d = half_at(block + offsetof(BlockQ6_K, d));
    for (int s = 0; s < 16; ++s) {
      std::int8_t scale;
      std::memcpy(&scale, block + offsetof(BlockQ6_K, scales) + s, 1);
      scales[s * stride] = d * static_cast<float>(scale);
    }
  }
};

// The rule of rounding, for one block a lane whose largest magnitude is there.
struct ActivationScale {
  simd::VecF inverse;
  simd::VecF scale;

  [[gnu::always_inline]] explicit ActivationScale(simd::VecF a) {
    const simd::VecF range = simd::broadcast(127.0F);
    const simd::VecF smallest = simd::broadcast(0x1p-96F);  // 127 / a stays within float32
    inverse = simd::select_less(a, smallest, simd::zero(), range / a);
    // a - a makes the scale NaN where a is not finite; the levels are then of no account.
    scale = simd::select_less(a, smallest, simd::zero(), a / range + (a - a));
  }
  // The level in the lowest byte: adding 1.5 * 2^23 rounds to an integer and leaves it in the
  // mantissa's.
  [[gnu::always_inline]] static simd::VecF rounded(simd::VecF value, simd::VecF inverse) {
    return simd::fma(value, inverse, simd::broadcast(12582912.0F));
  }
};

// Rounds one block of 32 activations for each lane: lane i's values are at x + 32 i, its levels go
// to levels + 32 i, its scale to lane i of the result. Lanes from `count` on repeat the last one.
// 1 <= count <= kWidth.
[[gnu::always_inline]] inline simd::VecF quantise_activations(const float* x, std::int64_t count,
                                                              std::int8_t* levels) {
  simd::VecF square[simd::kWidth];
  for (int i = 0; i < simd::kWidth; ++i) {
    const float* values = x + std::min<std::int64_t>(i, count - 1) * 32;
    // The bits of magnitudes compare as integers, where a NaN is larger than all others.
    simd::VecI largest = simd::broadcast(std::int32_t{0});
#pragma GCC unroll 8
    for (int k = 0; k < 32; k += simd::kWidth)
      largest = simd::max(largest, simd::bits_as_int(simd::abs(simd::load(values + k))));
    square[i] = simd::bits_as_float(largest);
  }
  simd::transpose(square);
  simd::VecI bits = simd::bits_as_int(square[0]);
  for (int i = 1; i < simd::kWidth; ++i) bits = simd::max(bits, simd::bits_as_int(square[i]));
  const ActivationScale scale(simd::bits_as_float(bits));
  alignas(64) float inverses[simd::kWidth];
  simd::store(inverses, scale.inverse);
  for (int i = 0; i < simd::kWidth; ++i) {
    const float* values = x + std::min<std::int64_t>(i, count - 1) * 32;
    const simd::VecF inverse = simd::broadcast(inverses[i]);
#pragma GCC unroll 8
    for (int k = 0; k < 32; k += simd::kWidth)
      simd::store_low_bytes(levels + 32 * i + k, simd::bits_as_int(ActivationScale::rounded(
                                                     simd::load(values + k), inverse)));
  }
  return scale.scale;
}

// What a unit's sum of products starts with, or what its weights' offsets are multiplied with.
template <class Weights>
[[gnu::always_inline]] inline simd::VecF unit_offset(simd::VecI level_sum, simd::VecF scale) {
  if constexpr (Weights::kHasOffset)
    return scale * simd::to_float(level_sum);
  else
    return simd::bits_as_float({level_sum.v * -Weights::kZero});
}

// Units stand chain by chain in panels and groups, so that each is read from end to end.
template <class Weights>
constexpr std::int64_t units_before(std::int64_t num_units, int chain) {
  constexpr std::int64_t kRun = Weights::kChainUnits;
  constexpr std::int64_t kRound = kRun * kInt8Chains;
  return num_units / kRound * kRun * chain + std::min(num_units % kRound, kRun * chain);
}
template <class Weights>
constexpr std::int64_t place_of_unit(std::int64_t unit, std::int64_t num_units) {
  constexpr std::int64_t kRun = Weights::kChainUnits;
  const auto chain = static_cast<int>(unit / kRun % kInt8Chains);
  return units_before<Weights>(num_units, chain) + unit / (kRun * kInt8Chains) * kRun + unit % kRun;
}

/// A panel: for each unit its words of four levels, its scales and, where a type has them, its
/// offsets. [units, kUnit / 4 + 1 or 2, kInt8Rows]
template <class Weights>
inline constexpr std::int64_t kInt8PanelUnit = kInt8Rows*(Weights::kUnit / 4 + 1 +
                                                          (Weights::kHasOffset ? 1 : 0));
template <class Weights>
constexpr std::int64_t int8_panel_size(std::int64_t cols) {
  return cols / Weights::kUnit * kInt8PanelUnit<Weights>;
}

/// A group: up to kInt8Tokens rounded tokens, in fours that the panel kernel multiplies at a time.
/// For each unit its words, then the scales, then what a sum of products of levels starts with
/// (int32) or what the weights' offsets are multiplied with (float).
/// [chains, units of the chain, fours, kUnit / 4 + 2, 4]
inline constexpr int kInt8Fours = kInt8Tokens / kInt8Four;
template <class Weights>
inline constexpr std::int64_t kInt8FourUnit = kInt8Four*(Weights::kUnit / 4 + 2);
template <class Weights>
inline constexpr std::int64_t kInt8GroupUnit = kInt8Fours* kInt8FourUnit<Weights>;
template <class Weights>
constexpr std::int64_t int8_group_size(std::int64_t cols) {
  return cols / Weights::kUnit * kInt8GroupUnit<Weights>;
}
// At least that for any type.
constexpr std::int64_t int8_group_bound(std::int64_t cols) {
  return round_up(cols, 32) / 16 * kInt8Tokens * 6;
}

// Rounds a block of 32 columns of kWidth tokens, lane t's being those of rows[t]: the levels' words
// of four columns, and the scales as quantise_activations() gives them. Everything happens across
// lanes, so that no lane's levels are written and read back in other pieces.
[[gnu::always_inline]] inline simd::VecF quantise_tokens(const float* const (&rows)[simd::kWidth],
                                                         std::int64_t column,
                                                         simd::VecI (&words)[8]) {
  simd::VecF columns[32];
  simd::VecI largest = simd::broadcast(std::int32_t{0});
  for (int i = 0; i < 32; i += simd::kWidth) {
    simd::VecF square[simd::kWidth];
    for (int t = 0; t < simd::kWidth; ++t) square[t] = simd::load(rows[t] + column + i);
    simd::transpose(square);
    for (int k = 0; k < simd::kWidth; ++k) {
      largest = simd::max(largest, simd::bits_as_int(simd::abs(square[k])));
      columns[i + k] = square[k];
    }
  }
  const ActivationScale scale(simd::bits_as_float(largest));
  const simd::VecI byte = simd::broadcast(std::int32_t{255});
  for (int w = 0; w < 8; ++w) {
    const auto level = [&](int k) {
      return simd::bits_as_int(scale.rounded(columns[4 * w + k], scale.inverse));
    };
    words[w] =
        (level(0) & byte) | ((level(1) & byte) << 8) | ((level(2) & byte) << 16) | (level(3) << 24);
  }
  return scale.scale;
}

// Columns that are rounded together.
inline constexpr int kInt8Strip = 64;

// Rounds the columns c ... c + kInt8Strip - 1 of a group's tokens.
template <class Weights>
void fill_group(const MatrixView<const float>& x, std::int64_t c, float* group) {
  constexpr int kUnit = Weights::kUnit;
  constexpr int kWords = kUnit / 4;
  const std::int64_t num_units = x.cols / kUnit;
  const std::int64_t end = std::min(c + kInt8Strip, x.cols);
  prefetch_columns<kInt8Strip>(x, end);
  for (std::int64_t unit = c / kUnit; unit < end / kUnit; ++unit) {
    const std::int64_t place = place_of_unit<Weights>(unit, num_units);
    prefetch_for_write(group + place * kInt8GroupUnit<Weights>, kInt8GroupUnit<Weights>);
  }
  const simd::VecI ones = simd::broadcast(std::int32_t{0x01010101});
  for (std::int64_t first = 0; first < x.rows; first += simd::kWidth) {
    const float* rows[simd::kWidth];
    // Lanes without a token repeat the last one.
    for (int t = 0; t < simd::kWidth; ++t) rows[t] = x.row(std::min(first + t, x.rows - 1));
    for (std::int64_t column = c; column < end; column += 32) {
      simd::VecI words[8];
      const simd::VecF scale = quantise_tokens(rows, column, words);
      for (int i = 0; i < 32; i += kUnit) {
        const std::int64_t place = place_of_unit<Weights>((column + i) / kUnit, num_units);
        float* unit = group + place * kInt8GroupUnit<Weights> +
                      first / kInt8Four * kInt8FourUnit<Weights> + first % kInt8Four;
        simd::VecI sum = simd::broadcast(std::int32_t{0});
        for (int k = 0; k < kWords; ++k) {
          simd::store_quads(unit + k * kInt8Four, kInt8FourUnit<Weights>,
                            simd::bits_as_float(words[i / 4 + k]));
          sum = simd::dot_levels(sum, ones, words[i / 4 + k]);
        }
        simd::store_quads(unit + kWords * kInt8Four, kInt8FourUnit<Weights>, scale);
        simd::store_quads(unit + (kWords + 1) * kInt8Four, kInt8FourUnit<Weights>,
                          unit_offset<Weights>(sum, scale));
      }
    }
  }
}

// Fills a panel with rows row, row + 1, ... of a matrix, one a lane. Missing rows are 0.
template <class Weights>
void fill_int8_panel(const WeightMatrix& weight, std::int64_t row, float* panel) {
  constexpr int kUnit = Weights::kUnit;
  constexpr int kStrip = 256;  // columns unpacked at a time: a multiple of every block
  alignas(64) std::uint8_t strip[kInt8Rows][kStrip];
  alignas(64) float scales[kStrip / kUnit][kInt8Rows];
  alignas(64) float offsets[kStrip / kUnit][kInt8Rows];
  const std::int64_t num_rows = std::min<std::int64_t>(kInt8Rows, weight.rows - row);
  const std::int64_t row_bytes = weight.row_bytes();
  if (num_rows < kInt8Rows) {
    std::memset(strip, 0, sizeof(strip));
    std::memset(scales, 0, sizeof(scales));
    std::memset(offsets, 0, sizeof(offsets));
  }
  for (std::int64_t c = 0; c < weight.cols; c += kStrip) {
    const auto count = static_cast<int>(std::min<std::int64_t>(kStrip, weight.cols - c));
    const std::int64_t strip_bytes = storage_bytes(weight.type, count);
    const std::uint8_t* source = static_cast<const std::uint8_t*>(weight.data) + row * row_bytes +
                                 storage_bytes(weight.type, c);
    for (std::int64_t r = 0; r < num_rows; ++r, source += row_bytes) {
      // The same columns of the rows that come next: too short a run for the processor to see.
      for (std::int64_t line = 0; line < strip_bytes; line += 64)
        simd::prefetch_far(source + kInt8Rows * row_bytes + line);
      const std::uint8_t* block = source;
      for (int i = 0; i < count; i += Weights::kValues) {
        Weights::unpack(block, strip[r] + i, scales[i / kUnit] + r, offsets[i / kUnit] + r,
                        kInt8Rows);
        block += storage_bytes(weight.type, Weights::kValues);
      }
    }
    float* units[kStrip / kUnit];
    for (int i = 0; i < count; i += kUnit) {
      const std::int64_t place = place_of_unit<Weights>((c + i) / kUnit, weight.cols / kUnit);
      float* unit = panel + place * kInt8PanelUnit<Weights>;
      units[i / kUnit] = unit;
      std::memcpy(unit + kUnit / 4 * kInt8Rows, scales[i / kUnit], sizeof(scales[0]));
      if constexpr (Weights::kHasOffset)
        std::memcpy(unit + (kUnit / 4 + 1) * kInt8Rows, offsets[i / kUnit], sizeof(offsets[0]));
    }
    for (int i = 0; i < count; i += 4 * simd::kWidth) {
      for (int side = 0; side < kInt8Rows; side += simd::kWidth) {
        simd::VecF square[simd::kWidth];
        for (int r = 0; r < simd::kWidth; ++r)
          square[r] = simd::bits_as_float(simd::load_int32(strip[side + r] + i));
        simd::transpose(square);
        // Words that follow one another in a unit.
        constexpr int kTogether = std::min(simd::kWidth, kUnit / 4);
        for (int k = 0; k < simd::kWidth; k += kTogether) {
          const int column = i + 4 * k;
          if (column >= count) break;
          float* target = units[column / kUnit] + column % kUnit / 4 * kInt8Rows + side;
#pragma GCC unroll 8
          for (int w = 0; w < kTogether; ++w) simd::store(target + w * kInt8Rows, square[k + w]);
        }
      }
    }
  }
}

// sums[t * kInt8Vectors + v] = `count` units of a panel's rows v times token t of a four of a
// group.
template <class Weights>
[[gnu::always_inline]] inline void add_chain(const float* panel, const float* four,
                                             std::int64_t count,
                                             simd::VecF (&sums)[kInt8Four * kInt8Vectors]) {
  constexpr int kWords = Weights::kUnit / 4;
  constexpr int kSums = kInt8Four * kInt8Vectors;
  const auto word = [&](int row, int t) {
    std::int32_t value;
    std::memcpy(&value, four + row * kInt8Four + t, sizeof(value));
    return simd::broadcast(value);
  };
#pragma GCC unroll 8
  for (int k = 0; k < kSums; ++k) sums[k] = simd::zero();
  for (; count > 0; --count) {
    simd::VecI unit_sums[kSums];
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k) {
      unit_sums[k] = simd::broadcast(std::int32_t{0});
      if constexpr (!Weights::kHasOffset) unit_sums[k] = word(kWords + 1, k / kInt8Vectors);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kWords; ++k) {
      simd::VecI rows[kInt8Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < kInt8Vectors; ++v)
        rows[v] = simd::load_int32(panel + k * kInt8Rows + v * simd::kWidth);
#pragma GCC unroll 4
      for (int t = 0; t < kInt8Four; ++t) {
        const simd::VecI values = word(k, t);
#pragma GCC unroll 2
        for (int v = 0; v < kInt8Vectors; ++v) {
          simd::VecI& sum = unit_sums[t * kInt8Vectors + v];
          sum = Weights::kSigned ? simd::dot_signed(sum, rows[v], values)
                                 : simd::dot_levels(sum, rows[v], values);
        }
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kSums; ++k) {
      const float* scales = panel + kWords * kInt8Rows + k % kInt8Vectors * simd::kWidth;
      const float* token = four + kWords * kInt8Four + k / kInt8Vectors;
      sums[k] = simd::fma(simd::to_float(unit_sums[k]),
                          simd::load(scales) * simd::broadcast(token[0]), sums[k]);
      if constexpr (Weights::kHasOffset)
        sums[k] =
            simd::fma(simd::load(scales + kInt8Rows), simd::broadcast(token[kInt8Four]), sums[k]);
    }
    panel += kInt8PanelUnit<Weights>;
    four += kInt8GroupUnit<Weights>;
  }
}

// One panel times the first `tokens` tokens of a group, four at a time, of which the last one's
// lanes beyond `tokens` are dropped. Each chain's part of the panel stays in a first-level cache
// from one four to the next.
template <class Weights>
void multiply_int8_panel(std::int64_t tokens, const LinearTask& task, const float* panel,
                         const float* group, std::int64_t row, std::int64_t token) {
  constexpr int kSums = kInt8Four * kInt8Vectors;
  const std::int64_t num_units = task.weight.cols / Weights::kUnit;
  prefetch_outputs<kInt8Rows>(task, row, token, tokens);
  ChainSums<kInt8Chains, kSums> fours[kInt8Fours];
  for (int i = 0; i < kInt8Chains; ++i) {
    const int chain = chain_in_order(i, kInt8Chains);
    const std::int64_t first = units_before<Weights>(num_units, chain);
    const std::int64_t count = units_before<Weights>(num_units, chain + 1) - first;
    const float* four = group + first * kInt8GroupUnit<Weights>;
    for (int f = 0; f * kInt8Four < tokens; ++f, four += kInt8FourUnit<Weights>) {
      simd::VecF sums[kSums];
      add_chain<Weights>(panel + first * kInt8PanelUnit<Weights>, four, count, sums);
      fours[f].add(i, sums);
    }
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int v = 0; v < kInt8Vectors; ++v) {
      const std::int64_t begin = row + v * simd::kWidth;
      const std::int64_t count = std::min<std::int64_t>(simd::kWidth, task.weight.rows - begin);
      if (count <= 0) continue;
      float* y = task.y.row(token + t) + begin;
      simd::VecF sum = fours[t / kInt8Four].total()[t % kInt8Four * kInt8Vectors + v];
      if (task.bias != nullptr) sum += simd::load_partial(task.bias + begin, count);
      if (task.accumulate) sum += simd::load_partial(y, count);
      simd::store_partial(y, sum, count);
    }
  }
}

// Scratch of a member for any type: the panels of a tile.
inline std::int64_t int8_scratch_size(std::int64_t cols) {
  const std::int64_t padded = round_up(cols, 32);
  return std::max(kInt8Budget, kInt8Rows * (padded / 4 + padded / 16));  // Q4_1 has the most
}

/// The chunk side of the arithmetic, in two phases (see round_and_multiply() in linear.hpp): tokens
/// are rounded once into `rounded`, shared by all members and tasks, then multiplied by panels.
template <class Weights>
struct Int8Panels {
  // Columns of an item of the first phase.
  static constexpr std::int64_t kStrip = kInt8Strip;

  static std::int64_t num_groups(std::int64_t tokens) {
    return (tokens + kInt8Tokens - 1) / kInt8Tokens;
  }
  static constexpr std::int64_t group_size(std::int64_t cols) {
    return int8_group_size<Weights>(cols);
  }

  static void round_strip(const MatrixView<const float>& x, std::int64_t c, float* group) {
    fill_group<Weights>(x, c, group);
  }

  // Rows of a panel: shares are whole panels.
  static constexpr std::int64_t kGrain = kInt8Rows;

  // A share of a task, for the `tokens` rounded tokens that begin at y's row `first`; `next` is
  // what the member is likely to take then.
  static void multiply(const LinearTask& task, const ShareRows& share, const ShareRows& next,
                       std::int64_t first, std::int64_t tokens, const float* rounded,
                       float* scratch) {
    const WeightMatrix& weight = task.weight;
    const WorkRange rows = share.rows;
    const std::int64_t panel_size = int8_panel_size<Weights>(weight.cols);
    const std::int64_t tile_rows = std::max<std::int64_t>(1, kInt8Budget / panel_size) * kInt8Rows;
    const std::int64_t groups = num_groups(tokens);
    for (std::int64_t tile = rows.begin; tile < rows.end; tile += tile_rows) {
      const std::int64_t tile_end = std::min(tile + tile_rows, rows.end);
      float* panel = scratch;
      for (std::int64_t row = tile; row < tile_end; row += kInt8Rows, panel += panel_size)
        fill_int8_panel<Weights>(weight, row, panel);
      const std::int64_t num_panels = (tile_end - tile + kInt8Rows - 1) / kInt8Rows;
      Ahead next_rows = share.ahead(tile_end, next, tile_rows, num_panels * groups);
      // Groups in blocks that a second-level cache keeps beside the panels.
      const std::int64_t block =
          std::max<std::int64_t>(1, kRoundedBudget / group_size(weight.cols));
      for (std::int64_t begin = 0; begin < groups; begin += block) {
        panel = scratch;
        for (std::int64_t row = tile; row < tile_end; row += kInt8Rows, panel += panel_size) {
          for (std::int64_t g = begin; g < std::min(begin + block, groups); ++g) {
            const WorkRange range = share_of(tokens, g, groups);
            next_rows.fetch();
            multiply_int8_panel<Weights>(range.end - range.begin, task, panel,
                                         rounded + g * group_size(weight.cols), row,
                                         first + range.begin);
          }
        }
      }
    }
  }
};

// The upper bits of the levels of half a Q6_K block (see StreamKernel and BlockQ6_K), for register
// v of its words: bits 0-1 and 4-5 of every byte.
[[gnu::always_inline]] inline simd::VecI upper_bits_q6_k(const std::uint8_t* qh, int v) {
  if constexpr (simd::kWidth == 16) {
    constexpr std::int32_t kCounts[16] = {0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2};
    return simd::shift_right(simd::load_int32_twice(qh), simd::load_int32(kCounts));
  } else {
    const int word = v * simd::kWidth;
    return simd::load_int32(qh + 4 * (word % 8)) >> (word < 8 ? 0 : 2);
  }
}

}  // namespace sluice::detail
