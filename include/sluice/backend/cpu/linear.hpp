// SPDX-License-Identifier: MIT
/// Matrix products with stored weights on the processor: y = x W^T. Few tokens are served by
/// streaming every weight once from memory, converted in registers; many tokens by converting tiles
/// of weights to float32 panels and multiplying with a register-blocked kernel. Products and sums
/// are float32 throughout; linear_int8.hpp has the products with activations of 8 bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <type_traits>

#include "sluice/backend/cpu/linear_bf16.hpp"
#include "sluice/backend/cpu/linear_int8.hpp"
#include "sluice/backend/cpu/linear_int8_stream.hpp"
#include "sluice/backend/cpu/linear_task.hpp"
#include "sluice/backend/cpu/linear_workspace.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::detail {

// Rows and tokens that one pass over the weights serves.
inline constexpr int kStreamRows = simd::kNumRegisters >= 32 ? 4 : 2;
inline constexpr int kStreamGroup = 4;
// A panel holds kPanelRows weight rows with the columns outermost: [cols, kPanelRows].
inline constexpr int kPanelRows = 2 * simd::kWidth;
// Tokens of one call of the panel kernel: 2 accumulators each, and a few registers left over.
inline constexpr int kPanelTokens = simd::kNumRegisters >= 32 ? 12 : 6;
// Floats of the panels that one member holds at a time: 384 KiB, well inside a second-level cache.
inline constexpr std::int64_t kPanelBudget = 96 * 1024;
// Columns of a panel, at most. Those of a wide matrix are taken in blocks of nearly equal size, a
// multiple of every type's: a panel of all of them would not wait in a near cache for the next
// tokens. Sums of blocks are added in their order.
inline constexpr std::int64_t kPanelCols = 768;
constexpr std::int64_t panel_cols(std::int64_t cols) {
  const std::int64_t blocks = (cols + kPanelCols - 1) / kPanelCols;
  return std::min(cols, round_up((cols + blocks - 1) / blocks, 256));
}

// `cols`: those of a panel.
inline std::int64_t panels_per_tile(std::int64_t cols) {
  return kPanelBudget / (kPanelRows * cols);
}

// Widest prepared token of any type (see StreamKernel): a quarter more than its columns, after
// rounding up to whole groups.
inline std::int64_t max_prepared_size(std::int64_t cols) {
  return round_up(cols, 8 * std::max(simd::kWidth, 4)) / 4 * 5 + 64;
}

/// How a type's weights are multiplied with few tokens. Each specialisation has
///   prepared_size(cols): floats of one token in the order in which the kernel reads it,
///   prepare(x, cols, prepared): brings x [cols] into that order,
///   dot<kRows, kTokens>(weights, row_bytes, cols, prepared, prepared_stride, sums):
///     sums[r][t] = row r of the weights times prepared token t. The order of additions within a
///     sum depends on cols alone, so that results do not depend on the grouping.
template <ElementType kType>
struct StreamKernel;

// Types whose values stand in order: the token is copied, padded with zeros to whole registers.
struct InOrder {
  static std::int64_t prepared_size(std::int64_t cols) { return round_up(cols, simd::kWidth); }
  static void prepare(const float* x, std::int64_t cols, float* prepared) {
    std::memcpy(prepared, x, static_cast<std::size_t>(cols) * sizeof(float));
    std::fill(prepared + cols, prepared + prepared_size(cols), 0.0F);
  }
};

template <class Element>
struct PlainKernel : InOrder {
  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void dot(const std::uint8_t* weights, std::int64_t row_bytes,
                                         std::int64_t cols, const float* prepared,
                                         std::int64_t prepared_stride,
                                         float (&result)[kRows][kTokens]) {
    simd::VecF sums[kRows][kTokens] = {};
    const auto row = [&](int r) {
      return reinterpret_cast<const Element*>(weights + r * row_bytes);
    };
    std::int64_t c = 0;
    for (; c + simd::kWidth <= cols; c += simd::kWidth) {
      simd::VecF values[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        values[t] = simd::in_register(simd::load(prepared + t * prepared_stride + c));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const simd::VecF w = simd::load(row(r) + c);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sums[r][t] = simd::fma(w, values[t], sums[r][t]);
      }
    }
    if (c < cols) {
      for (int r = 0; r < kRows; ++r) {
        const simd::VecF w = simd::load_partial(row(r) + c, cols - c);
        for (int t = 0; t < kTokens; ++t)
          sums[r][t] = simd::fma(w, simd::load(prepared + t * prepared_stride + c), sums[r][t]);
      }
    }
    reduce_all(sums, result);
  }
};

template <>
struct StreamKernel<ElementType::kF32> : PlainKernel<float> {};
template <>
struct StreamKernel<ElementType::kF16> : PlainKernel<f16> {};
template <>
struct StreamKernel<ElementType::kBF16> : PlainKernel<bf16> {};

template <>
struct StreamKernel<ElementType::kQ8_0> : InOrder {
  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void dot(const std::uint8_t* weights, std::int64_t row_bytes,
                                         std::int64_t cols, const float* prepared,
                                         std::int64_t prepared_stride,
                                         float (&result)[kRows][kTokens]) {
    simd::VecF sums[kRows][kTokens] = {};
    for (std::int64_t b = 0; b < cols / 32; ++b) {
      simd::VecF parts[kRows][kTokens] = {};
#pragma GCC unroll 8
      for (int i = 0; i < 32; i += simd::kWidth) {
        simd::VecF values[kTokens];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
          values[t] = simd::in_register(simd::load(prepared + t * prepared_stride + i));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const simd::VecF q = simd::load(reinterpret_cast<const std::int8_t*>(
              weights + r * row_bytes + offsetof(BlockQ8_0, qs) + i));
#pragma GCC unroll 4
          for (int t = 0; t < kTokens; ++t) parts[r][t] = simd::fma(q, values[t], parts[r][t]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const simd::VecF d = simd::broadcast_half(weights + r * row_bytes);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sums[r][t] = simd::fma(parts[r][t], d, sums[r][t]);
      }
      weights += sizeof(BlockQ8_0);
      prepared += 32;
    }
    reduce_all(sums, result);
  }
};

// Four-bit levels are taken from 32-bit words of eight. The k-th level of every lane's word is
// masked in place and converted to float, which leaves a factor of 2^(4 k); the prepared token has
// its reciprocal. The top level is shifted down instead, since conversion is signed.
[[gnu::always_inline]] inline simd::VecF level_in_place(simd::VecI words, int k) {
  if (k == 7) return simd::to_float(words >> 28);
  return simd::to_float(words & simd::broadcast(static_cast<std::int32_t>(0xF << (4 * k))));
}
inline constexpr float kLevelScale[8] = {1.0F,     0x1p-4F,  0x1p-8F,  0x1p-12F,
                                         0x1p-16F, 0x1p-20F, 0x1p-24F, 1.0F};

// Q4_0 and Q4_1: kWidth / 4 blocks fill a register with their four words each. A prepared group is
// eight registers of scaled values, one per level, and one of the lanes' sums of values, by which
// Q4_1 multiplies its minimum; Q4_0 takes it times -8.
template <class Block, bool kHasMin>
struct NibbleKernel {
  static constexpr int kBlocks = std::max(1, simd::kWidth / 4);
  static constexpr int kValues = 32 * kBlocks;
  static constexpr int kFloats = 9 * simd::kWidth;

  static std::int64_t prepared_size(std::int64_t cols) {
    return round_up(cols, kValues) / kValues * kFloats;
  }

  static void prepare(const float* x, std::int64_t cols, float* prepared) {
    std::fill(prepared, prepared + prepared_size(cols), 0.0F);
    for (std::int64_t b = 0; b < cols / 32; ++b) {
      float* lanes = prepared + b / kBlocks * kFloats + b % kBlocks * 4;
      for (int word = 0; word < 4; ++word) {
        float sum = 0.0F;
        for (int k = 0; k < 8; ++k) {
          const float value = x[b * 32 + 4 * word + k / 2 + 16 * (k % 2)];
          lanes[k * simd::kWidth + word] = value * kLevelScale[k];
          sum += value;
        }
        lanes[8 * simd::kWidth + word] = kHasMin ? sum : -8.0F * sum;
      }
    }
  }

  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void add_group(const std::uint8_t* group, std::int64_t row_bytes,
                                               int count, const float* prepared,
                                               std::int64_t prepared_stride,
                                               simd::VecF (&sums)[kRows][kTokens]) {
    const auto value = [&](int t, int k) {
      return simd::in_register(simd::load(prepared + t * prepared_stride + k * simd::kWidth));
    };
    simd::VecI words[kRows];
    simd::VecF scales[kRows];
    simd::VecF parts[kRows][kTokens] = {};
    simd::VecF offsets[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) offsets[t] = value(t, 8);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const simd::Records<sizeof(Block)> records(group + r * row_bytes, count);
      words[r] = records.template chunks<offsetof(Block, qs)>();
      scales[r] = records.template halves<offsetof(Block, d)>();
      if constexpr (kHasMin) {
        const simd::VecF m = records.template halves<offsetof(Block, m)>();
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sums[r][t] = simd::fma(m, offsets[t], sums[r][t]);
      } else {
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) parts[r][t] = offsets[t];
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      simd::VecF values[kTokens];
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) values[t] = value(t, k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const simd::VecF q = level_in_place(words[r], k);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) parts[r][t] = simd::fma(q, values[t], parts[r][t]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sums[r][t] = simd::fma(parts[r][t], scales[r], sums[r][t]);
    }
  }

  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void dot(const std::uint8_t* weights, std::int64_t row_bytes,
                                         std::int64_t cols, const float* prepared,
                                         std::int64_t prepared_stride,
                                         float (&result)[kRows][kTokens]) {
    simd::VecF sums[kRows][kTokens] = {};
    for (std::int64_t g = 0; g < cols / kValues; ++g) {
      add_group<kRows, kTokens>(weights, row_bytes, kBlocks, prepared, prepared_stride, sums);
      weights += kBlocks * sizeof(Block);
      prepared += kFloats;
    }
    if (const auto rest = static_cast<int>(cols % kValues / 32); rest != 0)
      add_group<kRows, kTokens>(weights, row_bytes, rest, prepared, prepared_stride, sums);
    reduce_all(sums, result);
  }
};

// For one-lane registers, which hold no block: each block is read by the plain reference.
template <class Block>
struct BlockwiseKernel : InOrder {
  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void dot(const std::uint8_t* weights, std::int64_t row_bytes,
                                         std::int64_t cols, const float* prepared,
                                         std::int64_t prepared_stride,
                                         float (&result)[kRows][kTokens]) {
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) result[r][t] = 0.0F;
      for (std::int64_t b = 0; b < cols / 32; ++b) {
        float values[32];
        dequantise_blocks<Block, 32>(
            weights + r * row_bytes + b * static_cast<std::int64_t>(sizeof(Block)), 32, values);
        for (int t = 0; t < kTokens; ++t)
          for (int i = 0; i < 32; ++i)
            result[r][t] += values[i] * prepared[t * prepared_stride + b * 32 + i];
      }
    }
  }
};

template <>
struct StreamKernel<ElementType::kQ4_0>
    : std::conditional_t<(simd::kWidth >= 4), NibbleKernel<BlockQ4_0, false>,
                         BlockwiseKernel<BlockQ4_0>> {};
template <>
struct StreamKernel<ElementType::kQ4_1>
    : std::conditional_t<(simd::kWidth >= 4), NibbleKernel<BlockQ4_1, true>,
                         BlockwiseKernel<BlockQ4_1>> {};

// Q4_K: the 32 words of a super-block fill 32 / kWidth registers; even levels belong to a word's
// first sub-block, odd ones to its second. A prepared super-block is eight registers of scaled
// values per register of words, then 16 floats: 8 zeros, and the sums of values of the sub-blocks.
template <>
struct StreamKernel<ElementType::kQ4_K> {
  static constexpr int kRegisters = 32 / simd::kWidth;
  static constexpr int kFloats = 256 + 16;

  static std::int64_t prepared_size(std::int64_t cols) { return cols / 256 * kFloats; }

  static void prepare(const float* x, std::int64_t cols, float* prepared) {
    for (std::int64_t b = 0; b < cols / 256; ++b, x += 256, prepared += kFloats) {
      for (int word = 0; word < 32; ++word) {
        const int chunk = word / 8;
        float* lane = prepared + word / simd::kWidth * 8 * simd::kWidth + word % simd::kWidth;
        for (int k = 0; k < 8; ++k)
          lane[k * simd::kWidth] =
              x[64 * chunk + 32 * (k % 2) + 4 * (word % 8) + k / 2] * kLevelScale[k];
      }
      for (int s = 0; s < 8; ++s) {
        float sum = 0.0F;
        for (int i = 0; i < 32; ++i) sum += x[32 * s + i];
        prepared[256 + s] = 0.0F;
        prepared[256 + 8 + s] = sum;
      }
    }
  }

  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void dot(const std::uint8_t* weights, std::int64_t row_bytes,
                                         std::int64_t cols, const float* prepared,
                                         std::int64_t prepared_stride,
                                         float (&result)[kRows][kTokens]) {
    simd::VecF sums[kRows][kTokens] = {};
    for (std::int64_t b = 0; b < cols / 256; ++b) {
      alignas(64) float scales[kRows][16];  // d * scale of each sub-block, then -dmin * min
      for (int r = 0; r < kRows; ++r) {
        const std::uint8_t* block = weights + r * row_bytes;
        scale_q4_k(block, scales[r]);
        // Where a register has 16 lanes the eight zeros cancel the scales.
        for (int i = simd::kWidth > 8 ? 0 : 8; i < 16; i += simd::kWidth)
          for (int t = 0; t < kTokens; ++t)
            sums[r][t] =
                simd::fma(simd::load(scales[r] + i),
                          simd::load(prepared + t * prepared_stride + 256 + i), sums[r][t]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kRegisters; ++v) {
        const int chunk = v * simd::kWidth / 8;  // of the register's first word
        const int next = simd::kWidth > 8 ? chunk + 1 : chunk;
        simd::VecI words[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          words[r] = simd::load_int32(weights + r * row_bytes + offsetof(BlockQ4_K, qs) +
                                      4 * simd::kWidth * v);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          simd::VecF parts[kRows][kTokens] = {};
#pragma GCC unroll 4
          for (int k = odd; k < 8; k += 2) {
            simd::VecF values[kTokens];
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t)
              values[t] = simd::in_register(
                  simd::load(prepared + t * prepared_stride + (v * 8 + k) * simd::kWidth));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const simd::VecF q = level_in_place(words[r], k);
#pragma GCC unroll 4
              for (int t = 0; t < kTokens; ++t) parts[r][t] = simd::fma(q, values[t], parts[r][t]);
            }
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const simd::VecF scale =
                simd::broadcast_halves(scales[r][2 * chunk + odd], scales[r][2 * next + odd]);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t)
              sums[r][t] = simd::fma(parts[r][t], scale, sums[r][t]);
          }
        }
      }
      weights += sizeof(BlockQ4_K);
      prepared += kFloats;
    }
    reduce_all(sums, result);
  }

  [[gnu::always_inline]] static void scale_q4_k(const std::uint8_t* block, float (&scales)[16]) {
    f16 d[2];
    std::memcpy(d, block, sizeof(d));
    std::uint32_t packed[3];
    std::memcpy(packed, block + offsetof(BlockQ4_K, scales), sizeof(packed));
    // The four bytes of each word at once, see unpack_scales_q4_k.
    const std::uint32_t unpacked[4] = {
        packed[0] & 0x3f3f3f3fU,
        (packed[2] & 0x0f0f0f0fU) | ((packed[0] >> 2) & 0x30303030U),
        packed[1] & 0x3f3f3f3fU,
        ((packed[2] >> 4) & 0x0f0f0f0fU) | ((packed[1] >> 2) & 0x30303030U),
    };
    simd::store_bytes_scaled(unpacked, simd::to_float(d[0]), -simd::to_float(d[1]), scales);
  }
};

// Q6_K: the 16 words of low bits of a half (128 values) fill 16 / kWidth registers, and each is
// read twice, for its low and for its high four bits. The upper bits of the words 0 to 7 are bits
// 0-1 and 4-5 of the high words, those of the words 8 to 15 bits 2-3 and 6-7. Levels stay in their
// byte of the word and the prepared token has the reciprocal factor 2^(-8 j). After four registers
// of values comes one with -32 times the lanes' sums.
template <>
struct StreamKernel<ElementType::kQ6_K> {
  static constexpr int kRegisters = 16 / simd::kWidth;
  static constexpr int kFloats = 256 / 4 * 5;

  static std::int64_t prepared_size(std::int64_t cols) { return cols / 256 * kFloats; }

  static void prepare(const float* x, std::int64_t cols, float* prepared) {
    constexpr float kByteScale[4] = {1.0F, 0x1p-8F, 0x1p-16F, 0x1p-24F};
    for (std::int64_t b = 0; b < cols / 128; ++b, x += 128, prepared += kFloats / 2) {
      for (int word = 0; word < 16; ++word) {
        for (int high = 0; high < 2; ++high) {
          float* lane =
              prepared + (word / simd::kWidth * 2 + high) * 5 * simd::kWidth + word % simd::kWidth;
          float sum = 0.0F;
          for (int j = 0; j < 4; ++j) {
            const float value = x[64 * high + 4 * word + j];
            lane[j * simd::kWidth] = value * kByteScale[j];
            sum += value;
          }
          lane[4 * simd::kWidth] = -32.0F * sum;
        }
      }
    }
  }

  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void dot(const std::uint8_t* weights, std::int64_t row_bytes,
                                         std::int64_t cols, const float* prepared,
                                         std::int64_t prepared_stride,
                                         float (&result)[kRows][kTokens]) {
    simd::VecF sums[kRows][kTokens] = {};
    const simd::VecI nibbles = simd::broadcast(std::int32_t{0x0f0f0f0f});
    const simd::VecI pairs = simd::broadcast(std::int32_t{0x30303030});
    for (std::int64_t b = 0; b < cols / 256; ++b) {
      alignas(64) float scales[kRows][16];
      for (int r = 0; r < kRows; ++r) {
        const std::uint8_t* block = weights + r * row_bytes;
        const simd::VecF d = simd::broadcast_half(block + offsetof(BlockQ6_K, d));
        const auto* levels =
            reinterpret_cast<const std::int8_t*>(block + offsetof(BlockQ6_K, scales));
        for (int i = 0; i < 16; i += simd::kWidth)
          simd::store(scales[r] + i, d * simd::load(levels + i));
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int v = 0; v < kRegisters; ++v) {
#pragma GCC unroll 2
          for (int s = 0; s < 2; ++s) {
            simd::VecI q[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const std::uint8_t* block = weights + r * row_bytes;
              const simd::VecI low = simd::load_int32(block + 64 * half + 4 * simd::kWidth * v);
              const simd::VecI high =
                  upper_bits_q6_k(block + offsetof(BlockQ6_K, qh) + 32 * half, v);
              q[r] = s == 0 ? (low & nibbles) | ((high << 4) & pairs)
                            : ((low >> 4) & nibbles) | (high & pairs);
            }
            const float* lanes = prepared + ((half * kRegisters + v) * 2 + s) * 5 * simd::kWidth;
            const auto value = [&](int t, int j) {
              return simd::in_register(simd::load(lanes + t * prepared_stride + j * simd::kWidth));
            };
            simd::VecF parts[kRows][kTokens];
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
              const simd::VecF offset = value(t, 4);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) parts[r][t] = offset;
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
              const simd::VecI mask = simd::broadcast(static_cast<std::int32_t>(0x3f << (8 * j)));
              simd::VecF values[kTokens];
#pragma GCC unroll 4
              for (int t = 0; t < kTokens; ++t) values[t] = value(t, j);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) {
                const simd::VecF level = simd::to_float(q[r] & mask);
#pragma GCC unroll 4
                for (int t = 0; t < kTokens; ++t)
                  parts[r][t] = simd::fma(level, values[t], parts[r][t]);
              }
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const simd::VecF scale =
                  simd::repeat_by_four(scales[r] + 8 * half + 4 * s + v * simd::kWidth / 4);
#pragma GCC unroll 4
              for (int t = 0; t < kTokens; ++t)
                sums[r][t] = simd::fma(parts[r][t], scale, sums[r][t]);
            }
          }
        }
      }
      weights += sizeof(BlockQ6_K);
      prepared += kFloats;
    }
    reduce_all(sums, result);
  }
};

// Calls function.operator()<kType>() for a run-time type.
template <class Function>
void with_type(ElementType type, Function&& function) {
  switch (type) {
    case ElementType::kF32: return function.template operator()<ElementType::kF32>();
    case ElementType::kF16: return function.template operator()<ElementType::kF16>();
    case ElementType::kBF16: return function.template operator()<ElementType::kBF16>();
    case ElementType::kQ8_0: return function.template operator()<ElementType::kQ8_0>();
    case ElementType::kQ4_0: return function.template operator()<ElementType::kQ4_0>();
    case ElementType::kQ4_1: return function.template operator()<ElementType::kQ4_1>();
    case ElementType::kQ4_K: return function.template operator()<ElementType::kQ4_K>();
    case ElementType::kQ6_K: return function.template operator()<ElementType::kQ6_K>();
  }
}

/// Few tokens with float32 activations: what stream_tasks() asks of each form of activations.
///   kPassRows: rows of a pass;
///   prepare(x, scratch): brings all tokens into the order in which the kernel reads them;
///   run(task, all, passes, tokens, scratch): the passes `passes` of the rows `all`, for the tokens
///     that scratch holds in prepared form.
template <ElementType kType>
struct FloatStream {
  using Kernel = StreamKernel<kType>;
  static constexpr int kPassRows = kStreamRows;

  static std::int64_t stride(std::int64_t cols) {
    return round_up(Kernel::prepared_size(cols), simd::kWidth);
  }
  static void prepare(MatrixView<const float> x, float* scratch) {
    for (std::int64_t t = 0; t < x.rows; ++t)
      Kernel::prepare(x.row(t), x.cols, scratch + t * stride(x.cols));
  }

  // kRows rows of each pass, from row number `index` on, times the kTokens tokens from `token` on.
  template <int kRows, int kTokens>
  static void multiply(const LinearTask& task, const StreamRows& all, WorkRange passes, int index,
                       std::int64_t token, const float* prepared) {
    const std::int64_t cols = task.weight.cols;
    const std::int64_t row_bytes = task.weight.row_bytes();
    const auto* weights = static_cast<const std::uint8_t*>(task.weight.data);
    for (std::int64_t i = passes.begin; i < passes.end; ++i) {
      const std::int64_t first = all.row(i, index);
      if (all.row(i, index + kRows - 1) < all.rows.end) {
        float sums[kRows][kTokens];
        Kernel::template dot<kRows, kTokens>(weights + first * row_bytes, all.apart * row_bytes,
                                             cols, prepared, stride(cols), sums);
        for (int t = 0; t < kTokens; ++t)
          for (int r = 0; r < kRows; ++r)
            put_sum(task, token + t, first + r * all.apart, sums[r][t]);
        continue;
      }
      for (std::int64_t row = first; row < all.rows.end; row += all.apart) {
        float sums[1][kTokens];
        Kernel::template dot<1, kTokens>(weights + row * row_bytes, 0, cols, prepared, stride(cols),
                                         sums);
        for (int t = 0; t < kTokens; ++t) put_sum(task, token + t, row, sums[0][t]);
      }
    }
  }

  static void run(const LinearTask& task, const StreamRows& all, WorkRange passes,
                  std::int64_t tokens, const float* scratch) {
    if (tokens == 1) return multiply<kPassRows, 1>(task, all, passes, 0, 0, scratch);
    for (std::int64_t t = 0; t < tokens; t += kStreamGroup) {
      const float* group = scratch + t * stride(task.weight.cols);
      for (int index = 0; index < kPassRows; index += 2) {
        switch (std::min<std::int64_t>(tokens - t, kStreamGroup)) {
          case 4: multiply<2, 4>(task, all, passes, index, t, group); break;
          case 3: multiply<2, 3>(task, all, passes, index, t, group); break;
          case 2: multiply<2, 2>(task, all, passes, index, t, group); break;
          default: multiply<2, 1>(task, all, passes, index, t, group); break;
        }
      }
    }
  }
};

// The panels' reading of weights: `count` stored values as float32, the same bits as dequantise()
// gives. One function per kind of type, then the choice among them.
template <class Element>
inline void widen_fast(const std::uint8_t* stored, std::int64_t count, float* target) {
  const auto* source = reinterpret_cast<const Element*>(stored);
  std::int64_t i = 0;
  for (; i + simd::kWidth <= count; i += simd::kWidth)
    simd::store(target + i, simd::load(source + i));
  if (i < count)
    simd::store_partial(target + i, simd::load_partial(source + i, count - i), count - i);
}

// The block readers take addresses in the stored row: a copy of the block would be read back from
// the store buffer in other pieces than it was written, which stalls.
template <ElementType kType>
void dequantise_block_fast(const std::uint8_t* block, float* target);

template <>
[[gnu::always_inline]] inline void dequantise_block_fast<ElementType::kQ8_0>(
    const std::uint8_t* block, float* target) {
  const simd::VecF d = simd::broadcast_half(block);
  const auto* qs = reinterpret_cast<const std::int8_t*>(block + offsetof(BlockQ8_0, qs));
#pragma GCC unroll 8
  for (int i = 0; i < 32; i += simd::kWidth) simd::store(target + i, d * simd::load(qs + i));
}

// `count` bytes: their low halves, then their high halves.
template <int kCount>
[[gnu::always_inline]] inline void dequantise_nibbles(const std::uint8_t* qs, simd::VecF low_scale,
                                                      simd::VecF low_min, simd::VecF high_scale,
                                                      simd::VecF high_min, float* target) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; i += simd::kWidth) {
    const simd::VecI bytes = simd::load_uint8(qs + i);
    const simd::VecF low = simd::to_float(bytes & simd::broadcast(std::int32_t{15}));
    simd::store(target + i, simd::fma(low, low_scale, low_min));
    simd::store(target + kCount + i, simd::fma(simd::to_float(bytes >> 4), high_scale, high_min));
  }
}

template <>
[[gnu::always_inline]] inline void dequantise_block_fast<ElementType::kQ4_0>(
    const std::uint8_t* block, float* target) {
  const simd::VecF d = simd::broadcast_half(block);
  const simd::VecF min = d * simd::broadcast(-8.0F);
  dequantise_nibbles<16>(block + offsetof(BlockQ4_0, qs), d, min, d, min, target);
}

template <>
[[gnu::always_inline]] inline void dequantise_block_fast<ElementType::kQ4_1>(
    const std::uint8_t* block, float* target) {
  const simd::VecF d = simd::broadcast_half(block);
  const simd::VecF min = simd::broadcast_half(block + offsetof(BlockQ4_1, m));
  dequantise_nibbles<16>(block + offsetof(BlockQ4_1, qs), d, min, d, min, target);
}

template <>
[[gnu::always_inline]] inline void dequantise_block_fast<ElementType::kQ4_K>(
    const std::uint8_t* block, float* target) {
  alignas(64) float scales[16];
  StreamKernel<ElementType::kQ4_K>::scale_q4_k(block, scales);
  for (int c = 0; c < 4; ++c)
    dequantise_nibbles<32>(block + offsetof(BlockQ4_K, qs) + 32 * c, simd::broadcast(scales[2 * c]),
                           simd::broadcast(scales[8 + 2 * c]), simd::broadcast(scales[2 * c + 1]),
                           simd::broadcast(scales[9 + 2 * c]), target + 64 * c);
}

template <>
[[gnu::always_inline]] inline void dequantise_block_fast<ElementType::kQ6_K>(
    const std::uint8_t* block, float* target) {
  const simd::VecF d = simd::broadcast_half(block + offsetof(BlockQ6_K, d));
  const auto* levels = reinterpret_cast<const std::int8_t*>(block + offsetof(BlockQ6_K, scales));
  alignas(64) float scales[16];
  for (int i = 0; i < 16; i += simd::kWidth) simd::store(scales + i, d * simd::load(levels + i));
  const simd::VecF offset = simd::broadcast(-32.0F);
  const simd::VecI nibble = simd::broadcast(std::int32_t{15});
  const simd::VecI pair = simd::broadcast(std::int32_t{0x30});
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 32; l += simd::kWidth) {
      const simd::VecI high = simd::load_uint8(block + offsetof(BlockQ6_K, qh) + 32 * half + l);
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        const simd::VecI bytes = simd::load_uint8(block + 64 * half + 32 * (quarter % 2) + l);
        const simd::VecI low = quarter < 2 ? bytes & nibble : bytes >> 4;
        const simd::VecI q = low | ((high >> (2 * quarter) << 4) & pair);
        const simd::VecF scale = simd::broadcast(scales[8 * half + 2 * quarter + l / 16]);
        simd::store(target + 128 * half + 32 * quarter + l, (simd::to_float(q) + offset) * scale);
      }
    }
  }
}

template <ElementType kType>
void dequantise_blocks_fast(const std::uint8_t* stored, std::int64_t count, float* target) {
  constexpr BlockShape kShape = block_shape(kType);
  for (std::int64_t i = 0; i < count; i += kShape.values, stored += kShape.bytes)
    dequantise_block_fast<kType>(stored, target + i);
}

inline void dequantise_fast(ElementType type, const std::uint8_t* stored, std::int64_t count,
                            float* target) {
  switch (type) {
    case ElementType::kF32: return widen_fast<float>(stored, count, target);
    case ElementType::kF16: return widen_fast<f16>(stored, count, target);
    case ElementType::kBF16: return widen_fast<bf16>(stored, count, target);
    case ElementType::kQ8_0:
      return dequantise_blocks_fast<ElementType::kQ8_0>(stored, count, target);
    case ElementType::kQ4_0:
      return dequantise_blocks_fast<ElementType::kQ4_0>(stored, count, target);
    case ElementType::kQ4_1:
      return dequantise_blocks_fast<ElementType::kQ4_1>(stored, count, target);
    case ElementType::kQ4_K:
      return dequantise_blocks_fast<ElementType::kQ4_K>(stored, count, target);
    case ElementType::kQ6_K:
      return dequantise_blocks_fast<ElementType::kQ6_K>(stored, count, target);
  }
}

// Fills a panel [cols, kPanelRows] with the columns `cols` of rows row, row + 1, ... of a matrix;
// missing rows are 0. cols.begin is a multiple of 256.
inline void fill_panel(const WeightMatrix& weight, std::int64_t row, WorkRange cols, float* panel) {
  constexpr std::int64_t kStrip = 256;  // columns converted at a time: a multiple of every block
  alignas(64) float strip[simd::kWidth][kStrip];
  const std::int64_t row_bytes = weight.row_bytes();
  for (int side = 0; side < 2; ++side) {
    const std::int64_t first_row = row + side * simd::kWidth;
    const std::int64_t num_rows =
        std::clamp<std::int64_t>(weight.rows - first_row, 0, simd::kWidth);
    if (num_rows < simd::kWidth) std::memset(strip, 0, sizeof(strip));
    for (std::int64_t c = cols.begin; c < cols.end; c += kStrip) {
      const std::int64_t count = std::min(kStrip, cols.end - c);
      const std::int64_t strip_bytes = storage_bytes(weight.type, count);
      const std::uint8_t* source = static_cast<const std::uint8_t*>(weight.data) +
                                   first_row * row_bytes + storage_bytes(weight.type, c);
      for (std::int64_t r = 0; r < num_rows; ++r, source += row_bytes) {
        // The same columns of the rows that come next: too short a run for the processor to see.
        for (std::int64_t line = 0; line < strip_bytes; line += 64)
          simd::prefetch_far(source + simd::kWidth * row_bytes + line);
        dequantise_fast(weight.type, source, count, strip[r]);
      }
      float* target = panel + (c - cols.begin) * kPanelRows + side * simd::kWidth;
      for (std::int64_t i = 0; i < count; i += simd::kWidth) {
        simd::VecF square[simd::kWidth];
        for (int r = 0; r < simd::kWidth; ++r) square[r] = simd::load(strip[r] + i);
        simd::transpose(square);
        const auto num_cols = static_cast<int>(std::min<std::int64_t>(simd::kWidth, count - i));
        for (int k = 0; k < num_cols; ++k) simd::store(target + (i + k) * kPanelRows, square[k]);
      }
    }
  }
}

// Copies tokens side by side, kWidth columns of each at a time, zeros behind the last column:
// [blocks of kWidth columns, tokens, kWidth]. The panel kernel reads every value by itself, at
// distances that it knows, and no two rows meet in a set of a cache whatever their stride was.
inline void pack_tokens(MatrixView<const float> x, float* packed) {
  for (std::int64_t c = 0; c < x.cols; c += simd::kWidth) {
    const std::int64_t count = x.cols - c;
    for (std::int64_t t = 0; t < x.rows; ++t, packed += simd::kWidth)
      simd::store(packed, count >= simd::kWidth ? simd::load(x.row(t) + c)
                                                : simd::load_partial(x.row(t) + c, count));
  }
}
constexpr std::int64_t packed_tokens_size(std::int64_t cols) {
  return round_up(cols, simd::kWidth) * kPanelTokens;
}

// One panel of `cols` columns times kTokens packed tokens, for the rows from `row` on.
template <int kTokens>
void multiply_panel(const LinearTask& task, std::int64_t cols, const float* panel,
                    const float* packed, std::int64_t row, std::int64_t token) {
  prefetch_outputs<kPanelRows>(task, row, token, kTokens);
  simd::VecF sums[kTokens][2] = {};
  for (std::int64_t c = 0; c < cols; c += simd::kWidth, packed += kTokens * simd::kWidth) {
    const std::int64_t count = std::min<std::int64_t>(simd::kWidth, cols - c);
    for (std::int64_t i = 0; i < count; ++i, panel += kPanelRows) {
      const simd::VecF low = simd::load(panel);
      const simd::VecF high = simd::load(panel + simd::kWidth);
#pragma GCC unroll 12
      for (int t = 0; t < kTokens; ++t) {
        const simd::VecF value = simd::broadcast(packed[t * simd::kWidth + i]);
        sums[t][0] = simd::fma(low, value, sums[t][0]);
        sums[t][1] = simd::fma(high, value, sums[t][1]);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      const std::int64_t first = row + side * simd::kWidth;
      const std::int64_t count =
          std::clamp<std::int64_t>(task.weight.rows - first, 0, simd::kWidth);
      if (count == 0) continue;
      float* y = task.y.row(token + t) + first;
      simd::VecF sum = sums[t][side];
      if (task.bias != nullptr) sum += simd::load_partial(task.bias + first, count);
      if (task.accumulate) sum += simd::load_partial(y, count);
      simd::store_partial(y, sum, count);
    }
  }
}

template <int kTokens>
void multiply_panel_any(int tokens, const LinearTask& task, std::int64_t cols, const float* panel,
                        const float* packed, std::int64_t row, std::int64_t token) {
  if (tokens == kTokens) return multiply_panel<kTokens>(task, cols, panel, packed, row, token);
  if constexpr (kTokens > 1)
    multiply_panel_any<kTokens - 1>(tokens, task, cols, panel, packed, row, token);
}

// A share of one task with many tokens; `next` is what the member takes then.
// scratch: [panels_per_tile * kPanelRows * panel_cols + packed_tokens_size(panel_cols)].
inline void panel_task(const LinearTask& task, const ShareRows& share, const ShareRows& next,
                       MatrixView<const float> x, float* scratch) {
  const WeightMatrix& weight = task.weight;
  const WorkRange rows = share.rows;
  const std::int64_t widest = panel_cols(weight.cols);
  const std::int64_t panel_size = kPanelRows * widest;
  const std::int64_t tile_rows = panels_per_tile(widest) * kPanelRows;
  float* packed = scratch + panels_per_tile(widest) * panel_size;
  // Groups of nearly equal size: 13 tokens are 7 and 6, not 12 and 1.
  const std::int64_t num_groups = (x.rows + kPanelTokens - 1) / kPanelTokens;
  for (std::int64_t tile = rows.begin; tile < rows.end; tile += tile_rows) {
    const std::int64_t tile_end = std::min(tile + tile_rows, rows.end);
    const std::int64_t num_panels = (tile_end - tile + kPanelRows - 1) / kPanelRows;
    for (std::int64_t c = 0; c < weight.cols; c += widest) {
      const WorkRange cols{c, std::min(c + widest, weight.cols)};
      const std::int64_t num_cols = cols.end - cols.begin;
      float* panel = scratch;
      for (std::int64_t row = tile; row < tile_end; row += kPanelRows, panel += panel_size)
        fill_panel(weight, row, cols, panel);
      LinearTask part = task;
      if (c > 0) {
        part.bias = nullptr;
        part.accumulate = true;
      }
      const std::int64_t times = num_panels * num_groups;
      Ahead ahead = cols.end < weight.cols
                        ? Ahead(weight, {tile, tile_end},
                                {cols.end, std::min(cols.end + widest, weight.cols)}, times)
                        : share.ahead(tile_end, next, tile_rows, times, widest);
      for (std::int64_t group = 0; group < num_groups; ++group) {
        const WorkRange tokens = share_of(x.rows, group, num_groups);
        const auto count = static_cast<int>(tokens.end - tokens.begin);
        pack_tokens({x.row(tokens.begin) + c, count, num_cols, x.stride}, packed);
        panel = scratch;
        for (std::int64_t row = tile; row < tile_end; row += kPanelRows, panel += panel_size) {
          ahead.fetch();
          multiply_panel_any<kPanelTokens>(count, part, num_cols, panel, packed, row, tokens.begin);
        }
      }
    }
  }
}

// Shares of each member that rows are cut into: members that do not advance alike take them from
// one another. Float tokens are copied once a share and tile, so that more of them would cost.
inline constexpr std::int64_t kRoundedShares = 4;
inline constexpr std::int64_t kFloatShares = 2;

// Calls use(task, rows, rows that come next, member) for every share of every task.
template <class Use>
void deal_shares(ThreadTeam& team, std::int64_t shares_per_member,
                 std::span<const LinearTask> tasks, std::int64_t grain, Use&& use) {
  const std::int64_t num_shares = team.size() == 1 ? 1 : shares_per_member * team.size();
  team.for_each(num_shares, [&](std::int64_t share, int member) {
    ShareRows rows(tasks[0].weight, share, num_shares, grain);
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      // Behind the last task a member goes on with the first task's next share.
      ShareRows next;
      if (i + 1 < tasks.size())
        next = ShareRows(tasks[i + 1].weight, share, num_shares, grain);
      else if (share + 1 < num_shares)
        next = ShareRows(tasks[0].weight, share + 1, num_shares, grain);
      use(tasks[i], rows, next, member);
      rows = next;
    }
  });
}

// What a workspace for matrices of up to `cols` columns and chunks of up to `tokens` tokens holds.
SLUICE_KERNEL LinearExtents linear_extents(std::int64_t cols, std::int64_t tokens,
                                           Activations activations) {
  static_assert(kPanelRows * kPanelCols <= kPanelBudget);
  const std::int64_t many = kPanelBudget + packed_tokens_size(std::min(cols, kPanelCols));
  const std::int64_t few = kStreamTokens * max_prepared_size(cols);
  LinearExtents extents;
  extents.int8_chains = kInt8Chains;
  extents.fused = simd::kFusedMultiplyAdd;
  extents.member = round_up(std::max({many, few, pair_scratch_size(cols), int8_scratch_size(cols),
                                      int8_stream_scratch_size(cols)}),
                            64);
  using Bytes = Int8Panels<Int8Weights<ElementType::kQ8_0>>;
  if (activations != Activations::kFloat32)
    extents.rounded = std::max(PairPanels::num_groups(tokens) * PairPanels::group_size(cols),
                               Bytes::num_groups(tokens) * int8_group_bound(cols));
  return extents;
}

// Products of several tasks of one type with rounded activations, for many tokens: all members
// round shares of the tokens, then multiply shares of the rows. Panels is PairPanels or an
// Int8Panels.
template <class Panels>
void round_and_multiply(std::span<const LinearTask> tasks, MatrixView<const float> x,
                        LinearWorkspace& workspace, ThreadTeam& team) {
  const std::int64_t group_size = Panels::group_size(x.cols);
  const std::int64_t num_strips = (x.cols + Panels::kStrip - 1) / Panels::kStrip;
  float* rounded = workspace.rounded();
  for (std::int64_t first = 0; first < x.rows; first += workspace.max_tokens()) {
    const std::int64_t tokens = std::min(workspace.max_tokens(), x.rows - first);
    const std::int64_t num_groups = Panels::num_groups(tokens);
    team.run([&](int member, int num_members) {
      const WorkRange items = share_of(num_groups * num_strips, member, num_members);
      for (std::int64_t i = items.begin; i < items.end; ++i) {
        const std::int64_t g = i / num_strips;
        const WorkRange range = share_of(tokens, g, num_groups);
        Panels::round_strip(x.middle_rows(first + range.begin, range.end - range.begin),
                            i % num_strips * Panels::kStrip, rounded + g * group_size);
      }
    });
    deal_shares(
        team, kRoundedShares, tasks, Panels::kGrain,
        [&](const LinearTask& task, const ShareRows& rows, const ShareRows& next, int member) {
          Panels::multiply(task, rows, next, first, tokens, rounded, workspace.member(member));
        });
  }
}

// Calls use.operator()<kType, Form>() with what multiplies weights of a type with few tokens.
template <class Use>
void with_form(ElementType type, Activations chosen, Use&& use) {
  with_type(type, [&]<ElementType kType>() {
    if constexpr (kType == ElementType::kBF16) {
      if (chosen != Activations::kFloat32) return use.template operator()<kType, PairStream>();
    } else if constexpr (Int8Weights<kType>::kExists) {
      if (chosen == Activations::kInt8) return use.template operator()<kType, Int8Stream<kType>>();
    }
    use.template operator()<kType, FloatStream<kType>>();
  });
}

// Members that stream weights from memory do not advance alike: the bus serves one before the
// other, or a neighbour has one's processor. So each takes the passes of its share in blocks, and
// one that has no block left takes another's. Streams go on from block to block, and the bits are
// the same: a row's sums do not depend on who forms them.
inline constexpr std::int64_t kBlocksPerShare = 16;
inline constexpr std::int64_t kFewestBlockBytes = 8 * 1024;

// One member's share of a task, cut into blocks of passes.
template <class Form>
struct StreamBlocks {
  StreamRows all;
  std::int64_t block_passes;

  StreamBlocks(const WeightMatrix& weight, std::int64_t tokens, int member, int num_members)
      : all(share_of(weight.rows, member, num_members, Form::kPassRows), Form::kPassRows) {
    const std::int64_t pass_bytes = Form::kPassRows * weight.row_bytes();
    block_passes = std::max(all.apart / kBlocksPerShare, kFewestBlockBytes / pass_bytes);
    // Several groups of tokens visit a block in turn.
    if (tokens > kStreamGroup) block_passes = std::min(block_passes, kStretchBytes / pass_bytes);
    block_passes = std::max<std::int64_t>(block_passes, 1);
  }
  std::int64_t size() const { return (all.apart + block_passes - 1) / block_passes; }
  WorkRange operator[](std::int64_t index) const {
    return {index * block_passes, std::min((index + 1) * block_passes, all.apart)};
  }
};

// Few tokens: one member's part of all tasks. Cursors are at 0 before the members begin.
inline void stream_tasks(std::span<const LinearTask> tasks, MatrixView<const float> x,
                         Activations activations, StreamCursor* cursors, float* scratch, int member,
                         int num_members) {
  const LinearTask* prepared_for = nullptr;
  for (int i = 0; i < num_members; ++i) {
    const int owner = (member + i) % num_members;
    std::atomic<std::int64_t>& next = cursors[owner].next_block;
    const auto take = [&] {
      return next.fetch_add(1, std::memory_order_relaxed);
    };
    std::int64_t before = 0;  // blocks of earlier tasks
    std::int64_t block = take();
    for (const LinearTask& task : tasks) {
      with_form(task.weight.type, activations, [&]<ElementType /*kType*/, class Form>() {
        const StreamBlocks<Form> blocks(task.weight, x.rows, owner, num_members);
        const std::int64_t count = blocks.size();
        for (; block - before < count; block = take()) {
          // Tasks of one type share the prepared tokens.
          if (prepared_for == nullptr || prepared_for->weight.type != task.weight.type)
            Form::prepare(x, scratch);
          prepared_for = &task;
          Form::run(task, blocks.all, blocks[block - before], x.rows, scratch);
        }
        before += count;
      });
    }
  }
}

#if SLUICE_ONEDNN

inline void round_row(const float* source, std::int64_t count, bf16* target) {
  std::int64_t c = 0;
  for (; c + kPairLoad <= count; c += kPairLoad) {
    const simd::VecI pairs = round_pairs(source + c, kPairLoad);
    std::memcpy(target + c, &pairs, sizeof(pairs));
  }
  for (; c < count; ++c) target[c] = bf16(source[c]);
}

// A tile's rows row, row + 1, ... as bf16, those that the matrix does not have as zeros: where they
// are stored if that is what is stored, otherwise in `room`. [OneDnnProducts::kRows, cols]
inline const void* rows_of_pairs(const WeightMatrix& weight, std::int64_t row, bf16* room) {
  constexpr std::int64_t kStrip = 256;  // columns converted at a time: a multiple of every block
  const std::int64_t num_rows = std::min(OneDnnProducts::kRows, weight.rows - row);
  const bool is_stored = weight.type == ElementType::kBF16;
  if (is_stored && num_rows == OneDnnProducts::kRows) return weight.row(row);
  alignas(64) float strip[kStrip];
  for (std::int64_t r = 0; r < num_rows; ++r) {
    const auto* source =
        static_cast<const std::uint8_t*>(weight.data) + (row + r) * weight.row_bytes();
    bf16* target = room + r * weight.cols;
    if (is_stored) {
      std::memcpy(target, source, static_cast<std::size_t>(weight.row_bytes()));
      continue;
    }
    for (std::int64_t c = 0; c < weight.cols; c += kStrip) {
      const std::int64_t count = std::min(kStrip, weight.cols - c);
      dequantise_fast(weight.type, source + storage_bytes(weight.type, c), count, strip);
      round_row(strip, count, target + c);
    }
  }
  std::fill(room + num_rows * weight.cols, room + OneDnnProducts::kRows * weight.cols, bf16(0.0F));
  return room;
}

// A tile's sums, [tokens, OneDnnProducts::kRows], to the rows from `row` on of the tokens from
// `first` on.
inline void put_tile(const LinearTask& task, std::int64_t row, std::int64_t first,
                     std::int64_t tokens, const float* sums) {
  const std::int64_t num_rows = std::min(OneDnnProducts::kRows, task.weight.rows - row);
  for (std::int64_t t = 0; t < tokens; ++t, sums += OneDnnProducts::kRows) {
    float* y = task.y.row(first + t) + row;
    for (std::int64_t r = 0; r < num_rows; r += simd::kWidth) {
      const std::int64_t count = std::min<std::int64_t>(simd::kWidth, num_rows - r);
      simd::VecF sum = simd::load(sums + r);
      if (task.bias != nullptr) sum += simd::load_partial(task.bias + row + r, count);
      if (task.accumulate) sum += simd::load_partial(y + r, count);
      simd::store_partial(y + r, sum, count);
    }
  }
}

// Many tokens by oneDNN: tokens are rounded once, then members take tiles of rows.
inline void tile_tasks(std::span<const LinearTask> tasks, MatrixView<const float> x,
                       OneDnnProducts& products, ThreadTeam& team) {
  constexpr std::int64_t kRows = OneDnnProducts::kRows;
  constexpr std::int64_t kGroup = OneDnnProducts::kFewestTokens;
  const int width = products.width_of(x.cols);
  std::int64_t num_tiles = 0;
  for (const LinearTask& task : tasks) num_tiles += (task.weight.rows + kRows - 1) / kRows;
  for (std::int64_t first = 0; first < x.rows; first += products.max_tokens()) {
    const std::int64_t tokens = std::min(products.max_tokens(), x.rows - first);
    team.for_each_range(OneDnnProducts::padded(tokens), kGroup, [&](WorkRange group, int) {
      bf16* target = products.tokens() + group.begin * x.cols;
      for (std::int64_t t = group.begin; t < group.end; ++t, target += x.cols) {
        if (t < tokens)
          round_row(x.row(first + t), x.cols, target);
        else
          std::fill(target, target + x.cols, bf16(0.0F));
      }
    });
    team.for_each(num_tiles, [&](std::int64_t tile, int member) {
      const LinearTask* task = tasks.data();
      for (std::int64_t count; tile >= (count = (task->weight.rows + kRows - 1) / kRows); ++task)
        tile -= count;
      const std::int64_t row = tile * kRows;
      const void* rows = rows_of_pairs(task->weight, row, products.rows(member));
      prefetch_outputs<kRows>(*task, row, first, tokens);
      products.multiply(member, width, rows, tokens);
      put_tile(*task, row, first, tokens, products.sums(member));
    });
  }
}

#endif

// Many tokens: tasks of one type that follow one another share the rounded tokens.
inline void panel_tasks(std::span<const LinearTask> tasks, MatrixView<const float> x,
                        LinearWorkspace& workspace, ThreadTeam& team) {
  for (std::size_t begin = 0, end; begin < tasks.size(); begin = end) {
    const ElementType type = tasks[begin].weight.type;
    for (end = begin + 1; end < tasks.size() && tasks[end].weight.type == type;) ++end;
    const std::span<const LinearTask> same = tasks.subspan(begin, end - begin);
    with_form(type, workspace.activations(), [&]<ElementType kType, class Form>() {
#if SLUICE_ONEDNN
      if constexpr (!std::is_same_v<Form, FloatStream<kType>>) {
        OneDnnProducts* const products = workspace.onednn();
        if (products != nullptr && x.rows >= OneDnnProducts::kFewestTokens &&
            products->width_of(x.cols) >= 0)
          return tile_tasks(same, x, *products, team);
      }
#endif
      if constexpr (std::is_same_v<Form, Int8Stream<kType>>)
        round_and_multiply<Int8Panels<Int8Weights<kType>>>(same, x, workspace, team);
      else if constexpr (std::is_same_v<Form, PairStream>)
        round_and_multiply<PairPanels>(same, x, workspace, team);
      else
        deal_shares(team, kFloatShares, same, kPanelRows,
                    [&](const LinearTask& task, const ShareRows& rows, const ShareRows& next,
                        int member) { panel_task(task, rows, next, x, workspace.member(member)); });
    });
  }
}

// The fast products behind linear_many in nn/linear.hpp.
SLUICE_KERNEL void linear_many(std::span<const LinearTask> tasks, MatrixView<const float> x,
                               LinearWorkspace& workspace, ThreadTeam& team, cpu) {
  SLUICE_ASSERT(x.cols <= workspace.max_cols() && team.size() <= workspace.team_size());
  if (x.rows == 0) return;
  const bool can_stream = kInt8Streams || workspace.activations() != Activations::kInt8;
  if (x.rows > kStreamTokens || !can_stream) return panel_tasks(tasks, x, workspace, team);
  StreamCursor* cursors = workspace.cursors();
  for (int i = 0; i < team.size(); ++i) cursors[i].next_block.store(0, std::memory_order_relaxed);
  team.run([&](int member, int num_members) {
    stream_tasks(tasks, x, workspace.activations(), cursors, workspace.member(member), member,
                 num_members);
  });
}

}  // namespace sluice::detail
