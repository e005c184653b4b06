// SPDX-License-Identifier: MIT
/// GGUF's block formats: their layouts, and plain conversions to and from float32. These loops are
/// the reference; the fast kernels in backend/cpu/linear.hpp are tested against them. Layouts and
/// rounding follow ggml (ggml-common.h, ggml-quants.c) and its Python package `gguf`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// 32 values: value[i] = d * qs[i].
struct BlockQ8_0 {
  f16 d;
  std::int8_t qs[32];
};

/// 32 values: value[i] = d * (q[i] - 8); q[i] is the low half of qs[i] for i < 16, the high half of
/// qs[i - 16] otherwise.
struct BlockQ4_0 {
  f16 d;
  std::uint8_t qs[16];
};

/// 32 values: value[i] = d * q[i] + m; halves as in BlockQ4_0.
struct BlockQ4_1 {
  f16 d;
  f16 m;
  std::uint8_t qs[16];
};

/// 256 values in 8 sub-blocks of 32: value = d * scale[s] * q - dmin * min[s], scales and mins of 6
/// bits packed into 12 bytes (see unpack_scales_q4_k). Sub-blocks 2c and 2c + 1 are the low and the
/// high halves of qs[32 c ... 32 c + 31].
struct BlockQ4_K {
  f16 d;
  f16 dmin;
  std::uint8_t scales[12];
  std::uint8_t qs[128];
};

/// 256 values in 16 sub-blocks of 16: value = d * scales[s] * (q - 32), q of 6 bits. Each half of
/// 128 values has 64 bytes of ql and 32 of qh; for l in 0 ... 31 the values l, l + 32, l + 64,
/// l + 96 take their low four bits from ql[l] low, ql[l + 32] low, ql[l] high, ql[l + 32] high, and
/// their upper two from bits 0-1, 2-3, 4-5, 6-7 of qh[l].
struct BlockQ6_K {
  std::uint8_t ql[128];
  std::uint8_t qh[64];
  std::int8_t scales[16];
  f16 d;
};

static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 &&
              sizeof(BlockQ4_K) == 144 && sizeof(BlockQ6_K) == 210);

/// Bytes of `count` values of a type. `count` must be a multiple of the type's block.
constexpr std::int64_t storage_bytes(ElementType type, std::int64_t count) {
  const BlockShape shape = block_shape(type);
  return count / shape.values * shape.bytes;
}

/// The 8 scales (first) and 8 mins (after them) of a BlockQ4_K as bytes of 0 to 63.
inline void unpack_scales_q4_k(const std::uint8_t (&packed)[12], std::uint8_t (&unpacked)[16]) {
  for (int s = 0; s < 4; ++s) {
    const int scale_low = packed[s];    // its two upper bits belong to scale s + 4
    const int min_low = packed[s + 4];  // its two upper bits belong to min s + 4
    const int both_high = packed[s + 8];
    unpacked[s] = static_cast<std::uint8_t>(scale_low & 63);
    unpacked[s + 8] = static_cast<std::uint8_t>(min_low & 63);
    unpacked[s + 4] = static_cast<std::uint8_t>((both_high & 15) | (scale_low >> 6 << 4));
    unpacked[s + 12] = static_cast<std::uint8_t>((both_high >> 4) | (min_low >> 6 << 4));
  }
}

namespace detail {

inline void dequantise_block(const BlockQ8_0& block, float* values) {
  const auto d = static_cast<float>(block.d);
  for (int i = 0; i < 32; ++i) values[i] = d * static_cast<float>(block.qs[i]);
}

inline void dequantise_block(const BlockQ4_0& block, float* values) {
  const auto d = static_cast<float>(block.d);
  for (int i = 0; i < 16; ++i) {
    values[i] = d * static_cast<float>((block.qs[i] & 15) - 8);
    values[i + 16] = d * static_cast<float>((block.qs[i] >> 4) - 8);
  }
}

inline void dequantise_block(const BlockQ4_1& block, float* values) {
  const auto d = static_cast<float>(block.d);
  const auto m = static_cast<float>(block.m);
  for (int i = 0; i < 16; ++i) {
    values[i] = d * static_cast<float>(block.qs[i] & 15) + m;
    values[i + 16] = d * static_cast<float>(block.qs[i] >> 4) + m;
  }
}

inline void dequantise_block(const BlockQ4_K& block, float* values) {
  const auto d = static_cast<float>(block.d);
  const auto dmin = static_cast<float>(block.dmin);
  std::uint8_t scales[16];
  unpack_scales_q4_k(block.scales, scales);
  for (int s = 0; s < 8; ++s) {
    const float scale = d * static_cast<float>(scales[s]);
    const float min = dmin * static_cast<float>(scales[s + 8]);
    const std::uint8_t* qs = block.qs + s / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int q = s % 2 == 0 ? qs[i] & 15 : qs[i] >> 4;
      values[s * 32 + i] = scale * static_cast<float>(q) - min;
    }
  }
}

inline void dequantise_block(const BlockQ6_K& block, float* values) {
  const auto d = static_cast<float>(block.d);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128;
    const int quarter = i % 128 / 32;
    const int l = i % 32;
    const int low_byte = block.ql[half * 64 + quarter % 2 * 32 + l];
    const int low = quarter < 2 ? low_byte & 15 : low_byte >> 4;
    const int high = (block.qh[half * 32 + l] >> (2 * quarter)) & 3;
    const float scale = d * static_cast<float>(block.scales[i / 16]);
    values[i] = scale * static_cast<float>((low | (high << 4)) - 32);
  }
}

template <class Block, int kValues>
void dequantise_blocks(const void* source, std::int64_t count, float* target) {
  const auto* bytes = static_cast<const unsigned char*>(source);
  for (std::int64_t i = 0; i < count / kValues; ++i) {
    Block block;
    std::memcpy(&block, bytes + i * static_cast<std::int64_t>(sizeof(Block)), sizeof(Block));
    dequantise_block(block, target + i * kValues);
  }
}

template <class Element>
void widen(const void* source, std::int64_t count, float* target) {
  const auto* bytes = static_cast<const unsigned char*>(source);
  for (std::int64_t i = 0; i < count; ++i) {
    Element element;
    std::memcpy(&element, bytes + i * static_cast<std::int64_t>(sizeof(Element)), sizeof(Element));
    target[i] = static_cast<float>(element);
  }
}

inline float reciprocal_or_zero(float value) {
  return value == 0.0F ? 0.0F : 1.0F / value;
}

// The four-bit level trunc(value * inverse + shift). In double the product is exact, so that fused
// and separate arithmetic agree and every build stores the same bytes; ggml's own float expression
// depends on its compiler.
inline int round_level(float value, float inverse, double shift) {
  const double scaled = static_cast<double>(value) * static_cast<double>(inverse) + shift;
  return static_cast<int>(std::clamp(scaled, 0.0, 15.0));
}

inline BlockQ8_0 quantise_block_q8_0(const float* values) {
  float largest = 0.0F;
  for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(values[i]));
  const float d = largest / 127.0F;
  const float inverse = reciprocal_or_zero(d);
  BlockQ8_0 block;
  block.d = f16(d);
  for (int i = 0; i < 32; ++i)
    block.qs[i] = static_cast<std::int8_t>(std::round(values[i] * inverse));
  return block;
}

inline BlockQ4_0 quantise_block_q4_0(const float* values) {
  float extreme = 0.0F;  // the first value of largest magnitude, with its sign; it becomes q = 0
  for (int i = 0; i < 32; ++i)
    if (std::fabs(values[i]) > std::fabs(extreme)) extreme = values[i];
  const float d = extreme / -8.0F;
  const float inverse = reciprocal_or_zero(d);
  const auto level = [inverse](float value) {
    return round_level(value, inverse, 8.5);
  };
  BlockQ4_0 block;
  block.d = f16(d);
  for (int i = 0; i < 16; ++i)
    block.qs[i] = static_cast<std::uint8_t>(level(values[i]) | (level(values[i + 16]) << 4));
  return block;
}

inline BlockQ4_1 quantise_block_q4_1(const float* values) {
  const auto [low, high] = std::minmax_element(values, values + 32);
  const float min = *low;
  const float d = (*high - min) / 15.0F;
  const float inverse = reciprocal_or_zero(d);
  const auto level = [inverse, min](float value) {
    return round_level(value - min, inverse, 0.5);
  };
  BlockQ4_1 block;
  block.d = f16(d);
  block.m = f16(min);
  for (int i = 0; i < 16; ++i)
    block.qs[i] = static_cast<std::uint8_t>(level(values[i]) | (level(values[i + 16]) << 4));
  return block;
}

template <int kValues, class QuantiseBlock>
void quantise_blocks(const float* source, std::int64_t count, void* target,
                     QuantiseBlock&& quantise_block) {
  auto* bytes = static_cast<unsigned char*>(target);
  for (std::int64_t i = 0; i < count / kValues; ++i) {
    const auto block = quantise_block(source + i * kValues);
    std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof(block)), &block, sizeof(block));
  }
}

}  // namespace detail

/// Writes `count` stored values as float32. `count` is a multiple of the type's block; `source` has
/// storage_bytes(type, count) bytes and needs no alignment. The result equals the Python package's
/// bit for bit: all products are exact in float32 (a scale of at most 18 bits times a level of at
/// most 5), so at most one rounding happens, fused or not. Allocates nothing.
inline void dequantise(ElementType type, const void* source, std::int64_t count, float* target) {
  SLUICE_ASSERT(count % block_shape(type).values == 0);
  switch (type) {
    case ElementType::kF32: return detail::widen<float>(source, count, target);
    case ElementType::kF16: return detail::widen<f16>(source, count, target);
    case ElementType::kBF16: return detail::widen<bf16>(source, count, target);
    case ElementType::kQ8_0: return detail::dequantise_blocks<BlockQ8_0, 32>(source, count, target);
    case ElementType::kQ4_0: return detail::dequantise_blocks<BlockQ4_0, 32>(source, count, target);
    case ElementType::kQ4_1: return detail::dequantise_blocks<BlockQ4_1, 32>(source, count, target);
    case ElementType::kQ4_K:
      return detail::dequantise_blocks<BlockQ4_K, 256>(source, count, target);
    case ElementType::kQ6_K:
      return detail::dequantise_blocks<BlockQ6_K, 256>(source, count, target);
  }
}

/// Stores `count` finite float32 values in a type, by the Python package's formulas. The bytes are
/// the same but for a four-bit level whose unrounded value is within float32 rounding of a boundary
/// between two levels: this decides in double. `target` has storage_bytes(type, count) bytes and
/// needs no alignment.
/// \throws Error(kUnsupported) for Q4_K and Q6_K, whose quantisers search for scales; Error(kShape)
/// if count is not a multiple of the type's block. Allocates nothing.
inline void quantise(ElementType type, const float* source, std::int64_t count, void* target) {
  if (count < 0 || count % block_shape(type).values != 0)
    throw Error(ErrorCode::kShape, {"values do not fill whole blocks", "quantise", "count",
                                    "a multiple of " + std::to_string(block_shape(type).values),
                                    std::to_string(count)});
  switch (type) {
    case ElementType::kF32:
      std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
      return;
    case ElementType::kF16:
      return detail::quantise_blocks<1>(source, count, target,
                                        [](const float* value) { return f16(*value); });
    case ElementType::kBF16:
      return detail::quantise_blocks<1>(source, count, target,
                                        [](const float* value) { return bf16(*value); });
    case ElementType::kQ8_0:
      return detail::quantise_blocks<32>(source, count, target, detail::quantise_block_q8_0);
    case ElementType::kQ4_0:
      return detail::quantise_blocks<32>(source, count, target, detail::quantise_block_q4_0);
    case ElementType::kQ4_1:
      return detail::quantise_blocks<32>(source, count, target, detail::quantise_block_q4_1);
    case ElementType::kQ4_K:
    case ElementType::kQ6_K: break;
  }
  throw Error(ErrorCode::kUnsupported,
              {"no quantiser for this type", "quantise", "type",
               "F32, F16, BF16, Q8_0, Q4_0 or Q4_1", std::string(to_string(type))});
}

}  // namespace sluice
