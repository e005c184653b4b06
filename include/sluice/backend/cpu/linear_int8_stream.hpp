// SPDX-License-Identifier: MIT
/// Products with activations of 8 bits for a few tokens: weights are read once from memory, four
/// rows at a time, and taken apart in registers. The arithmetic is that of linear_int8.hpp, bit for
/// bit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "sluice/backend/cpu/linear_int8.hpp"
#include "sluice/backend/cpu/linear_task.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"

namespace sluice::detail {

// Up to kStreamTokens tokens weights are taken apart in registers, once per group of up to
// kInt8StreamGroup tokens; above it panels pay. On a Zen 4 core the two meet at 8 tokens for Q8_0
// and Q6_K, at 12 for Q4_0 and Q4_1 and at 20 for Q4_K; bench/linear_bench has both sides under
// `crossover`. Registers of one lane hold no unit: they always take panels.
inline constexpr bool kInt8Streams = simd::kWidth >= 4;
inline constexpr int kInt8StreamGroup = 4;

// Calls body.operator()<r>() for the four rows of a pass: rows are numbered when the compiler
// places what is of them in registers, which comes before it unrolls loops.
template <class Body>
[[gnu::always_inline]] inline void for_rows(Body&& body) {
  body.template operator()<0>();
  body.template operator()<1>();
  body.template operator()<2>();
  body.template operator()<3>();
}

/// How a type's stored rows are read as pieces: four rows' levels of one unit a chain.
///   kColumns: columns of a step, whole blocks; kStepBytes: their stored bytes;
///   kPieces, kDots: pieces of a step, registers of levels of a piece and row;
///   column(piece, dot, group): first of the 16 columns whose levels are in lanes 4 group ... of a
///     register;
///   visit_pieces(rows, count, visit): calls visit(levels, scales, offsets) for each piece of the
///     step at rows[0 ... 3], levels [4][kDots]; row r's scale and offset for a group are in lane
///     4 group + r. Of the step's kColumns only `count` blocks are there, if it has several.
template <ElementType kType>
struct Int8Pieces;

// Steps of kInt8Chains blocks of 32 columns, one piece each.
struct Int8SmallBlocks {
  static constexpr std::int64_t kColumns = 32 * kInt8Chains;
  static constexpr int kPieces = 1;
  static constexpr int kDots = 2;
  static constexpr int column(int /*piece*/, int dot, int group) { return 32 * group + 16 * dot; }
};

template <>
struct Int8Pieces<ElementType::kQ8_0> : Int8SmallBlocks {
  static constexpr std::int64_t kStepBytes = kInt8Chains * sizeof(BlockQ8_0);
  template <class Visit>
  [[gnu::always_inline]] static void visit_pieces(const std::uint8_t* const (&rows)[4], int count,
                                                  Visit&& visit) {
    const simd::WideRecords records[4] = {
        {rows[0], count}, {rows[1], count}, {rows[2], count}, {rows[3], count}};
    const simd::VecI bias =
        simd::broadcast(static_cast<std::int32_t>(simd::kSignedBias * 0x01010101U));
    simd::VecI levels[4][2];
    for_rows([&]<int r>() {
      levels[r][0] = records[r].template chunks<0>() ^ bias;
      levels[r][1] = records[r].template chunks<1>() ^ bias;
    });
    visit(levels, simd::WideRecords::fields(records), simd::zero());
  }
};

template <class Block, bool kHasMin>
struct Int8Nibbles : Int8SmallBlocks {
  static constexpr std::int64_t kStepBytes = kInt8Chains * sizeof(Block);
  template <class Visit>
  [[gnu::always_inline]] static void visit_pieces(const std::uint8_t* const (&rows)[4], int count,
                                                  Visit&& visit) {
    using Records = simd::Records<sizeof(Block)>;
    const Records records[4] = {
        {rows[0], count}, {rows[1], count}, {rows[2], count}, {rows[3], count}};
    const simd::VecI nibbles = simd::broadcast(std::int32_t{0x0f0f0f0f});
    simd::VecI levels[4][2];
    for_rows([&]<int r>() {
      const simd::VecI words = records[r].template chunks<offsetof(Block, qs)>();
      levels[r][0] = words & nibbles;
      levels[r][1] = (words >> 4) & nibbles;
    });
    simd::VecF offsets = simd::zero();
    if constexpr (kHasMin) offsets = Records::template fields<offsetof(Block, m)>(records);
    visit(levels, Records::template fields<offsetof(Block, d)>(records), offsets);
  }
};
template <>
struct Int8Pieces<ElementType::kQ4_0> : Int8Nibbles<BlockQ4_0, false> {};
template <>
struct Int8Pieces<ElementType::kQ4_1> : Int8Nibbles<BlockQ4_1, true> {};

// A super-block a step. Its units 2 c and 2 c + 1 are the low and the high halves of 32 bytes.
template <>
struct Int8Pieces<ElementType::kQ4_K> {
  static constexpr std::int64_t kColumns = 256;
  static constexpr std::int64_t kStepBytes = sizeof(BlockQ4_K);
  static constexpr int kRuns = 4 / std::min(kInt8Chains, 4);
  static constexpr int kPieces = 2 * kRuns;
  static constexpr int kDots = 2;
  static constexpr int column(int piece, int dot, int group) {
    return 64 * (piece / 2 * kInt8Chains + group) + 32 * (piece % 2) + 16 * dot;
  }
  template <class Visit>
  [[gnu::always_inline]] static void visit_pieces(const std::uint8_t* const (&rows)[4],
                                                  int /*count*/, Visit&& visit) {
    const simd::VecI nibbles = simd::broadcast(std::int32_t{0x0f0f0f0f});
    float d[4];
    float min[4];
    for (int r = 0; r < 4; ++r) {
      d[r] = half_at(rows[r]);
      min[r] = -half_at(rows[r] + offsetof(BlockQ4_K, dmin));
    }
    const simd::VecF scale = simd::repeat_four(d);
    const simd::VecF offset = simd::repeat_four(min);
    simd::RowBytes bytes(rows, 0);
    bytes.unpack_scales_q4_k();
#pragma GCC unroll 4
    for (int run = 0; run < kRuns; ++run) {
      simd::VecI words[4][2];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        simd::load_runs(rows[r] + offsetof(BlockQ4_K, qs) + 32 * run * kInt8Chains, words[r]);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        simd::VecI levels[4][2];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
          for (int k = 0; k < 2; ++k)
            levels[r][k] = (odd == 0 ? words[r][k] : words[r][k] >> 4) & nibbles;
        const int unit = 2 * run * kInt8Chains + odd;
        visit(levels, scale * bytes.template at<false>(unit, 2),
              offset * bytes.template at<false>(8 + unit, 2));
      }
    }
  }
};

// A super-block a step: for each half of 128 columns the low, then the high four bits of its 64
// bytes, 16 of them a unit.
template <>
struct Int8Pieces<ElementType::kQ6_K> {
  static constexpr std::int64_t kColumns = 256;
  static constexpr std::int64_t kStepBytes = sizeof(BlockQ6_K);
  static constexpr int kRuns = 4 / std::min(kInt8Chains, 4);
  static constexpr int kPieces = 4 * kRuns;
  static constexpr int kDots = 1;
  static constexpr int column(int piece, int /*dot*/, int group) {
    return 64 * (piece / kRuns) + 16 * (piece % kRuns * kInt8Chains + group);
  }
  template <class Visit>
  [[gnu::always_inline]] static void visit_pieces(const std::uint8_t* const (&rows)[4],
                                                  int /*count*/, Visit&& visit) {
    const simd::VecI nibbles = simd::broadcast(std::int32_t{0x0f0f0f0f});
    const simd::VecI pairs = simd::broadcast(std::int32_t{0x30303030});
    float d[4];
    for (int r = 0; r < 4; ++r) d[r] = half_at(rows[r] + offsetof(BlockQ6_K, d));
    const simd::VecF scale = simd::repeat_four(d);
    const simd::RowBytes bytes(rows, offsetof(BlockQ6_K, scales));
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int half = quarter / 2;
#pragma GCC unroll 4
      for (int run = 0; run < kRuns; ++run) {
        simd::VecI levels[4][1];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const simd::VecI low = simd::load_int32(rows[r] + 64 * half + 16 * kInt8Chains * run);
          const simd::VecI high =
              upper_bits_q6_k(rows[r] + offsetof(BlockQ6_K, qh) + 32 * half, run);
          levels[r][0] = quarter % 2 == 0 ? (low & nibbles) | ((high << 4) & pairs)
                                          : ((low >> 4) & nibbles) | (high & pairs);
        }
        visit(levels, scale * bytes.template at<true>(4 * quarter + run * kInt8Chains, 1),
              simd::zero());
      }
    }
  }
};

// A prepared token: for each piece of each step its registers of levels, the scales of the
// activations, and what unit_offset() gives, the last two for every group in its four lanes.
template <ElementType kType>
constexpr std::int64_t int8_prepared_size(std::int64_t cols) {
  using Pieces = Int8Pieces<kType>;
  return round_up(cols, Pieces::kColumns) / Pieces::kColumns * Pieces::kPieces *
         (Pieces::kDots + 2) * simd::kWidth;
}

// Columns of the rounded token that prepare_int8() reads: whole steps, and whole registers of
// blocks.
inline std::int64_t int8_padded_cols(std::int64_t cols) {
  return round_up(cols, std::max(256, 32 * simd::kWidth));
}

// Floats that prepare_int8() needs beside its result: levels and scales in column order.
inline std::int64_t int8_rounded_size(std::int64_t cols) {
  return int8_padded_cols(cols) / 4 + int8_padded_cols(cols) / 32;
}

template <ElementType kType>
void prepare_int8(const float* x, std::int64_t cols, float* prepared, float* rounded) {
  using Pieces = Int8Pieces<kType>;
  using Weights = Int8Weights<kType>;
  const std::int64_t padded = int8_padded_cols(cols);
  auto* levels = reinterpret_cast<std::int8_t*>(rounded);
  float* scales = rounded + padded / 4;
  for (std::int64_t b = 0; b < padded / 32; b += simd::kWidth) {
    const std::int64_t count = cols / 32 - b;
    if (count <= 0) {
      std::fill(scales + b, scales + padded / 32, 0.0F);
      std::memset(levels + 32 * b, 0, static_cast<std::size_t>(padded - 32 * b));
      break;
    }
    simd::store(scales + b, quantise_activations(x + 32 * b, count, levels + 32 * b));
    // Lanes without a block repeat the last one; without a scale they count for nothing.
    for (std::int64_t i = count; i < simd::kWidth; ++i) scales[b + i] = 0.0F;
  }
  const simd::VecI ones = simd::broadcast(std::int32_t{0x01010101});
  for (std::int64_t c = 0; c < cols; c += Pieces::kColumns) {
    for (int piece = 0; piece < Pieces::kPieces; ++piece) {
      simd::VecI sum = simd::broadcast(std::int32_t{0});
      for (int dot = 0; dot < Pieces::kDots; ++dot) {
        for (int g = 0; g < kInt8Chains; ++g)
          std::memcpy(prepared + 4 * g, levels + c + Pieces::column(piece, dot, g), 16);
        sum = simd::dot_levels(sum, ones, simd::load_int32(prepared));
        prepared += simd::kWidth;
      }
      for (int lane = 0; lane < simd::kWidth; ++lane)
        prepared[lane] = scales[(c + Pieces::column(piece, 0, lane / 4)) / 32];
      const simd::VecI same[4] = {sum, sum, sum, sum};
      simd::store(prepared + simd::kWidth,
                  unit_offset<Weights>(simd::add_groups(same), simd::load(prepared)));
      prepared += 2 * simd::kWidth;
    }
  }
}

// The four rows from rows[0 ... 3] on times kTokens prepared tokens. sums: [kTokens][4].
template <ElementType kType, int kTokens>
[[gnu::always_inline]] inline void int8_dot(const std::uint8_t* const (&first)[4],
                                            std::int64_t cols, const float* prepared,
                                            std::int64_t prepared_stride,
                                            float (&sums)[kTokens][4]) {
  using Pieces = Int8Pieces<kType>;
  using Weights = Int8Weights<kType>;
  std::int64_t at = 0;  // bytes of a row that are done
  simd::VecF totals[kTokens] = {};
  const auto add_step = [&](int blocks) __attribute__((always_inline)) {
    const auto add_piece = [&](const simd::VecI(&levels)[4][Pieces::kDots], simd::VecF scales,
                               simd::VecF offsets) {
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const float* token = prepared + t * prepared_stride;
        simd::VecI unit_sums[4] = {};
#pragma GCC unroll 2
        for (int k = 0; k < Pieces::kDots; ++k) {
          // Otherwise each of the four products reads it anew, in the place of a read of weights.
          const simd::VecI values = simd::in_register(simd::load_int32(token + k * simd::kWidth));
          for_rows([&]<int r>() {
            unit_sums[r] = Weights::kSigned ? simd::dot_signed(unit_sums[r], levels[r][k], values)
                                            : simd::dot_levels(unit_sums[r], levels[r][k], values);
          });
        }
        simd::VecI sum = simd::add_groups(unit_sums);
        const float* token_scales = token + Pieces::kDots * simd::kWidth;
        const float* token_offsets = token_scales + simd::kWidth;
        if constexpr (!Weights::kHasOffset) sum = sum + simd::load_int32(token_offsets);
        totals[t] = simd::fma(simd::to_float(sum), scales * simd::load(token_scales), totals[t]);
        if constexpr (Weights::kHasOffset)
          totals[t] = simd::fma(offsets, simd::load(token_offsets), totals[t]);
      }
      prepared += (Pieces::kDots + 2) * simd::kWidth;
    };
    const std::uint8_t* const rows[4] = {first[0] + at, first[1] + at, first[2] + at,
                                         first[3] + at};
    Pieces::visit_pieces(rows, blocks, add_piece);
    at += Pieces::kStepBytes;
  };
  // Whole steps apart: what reads a part of one takes registers from their loop.
  constexpr auto kBlocks = static_cast<int>(Pieces::kColumns / Weights::kValues);
  std::int64_t c = 0;
  for (; c + Pieces::kColumns <= cols; c += Pieces::kColumns) add_step(kBlocks);
  if constexpr (kBlocks > 1)
    if (c < cols) add_step(static_cast<int>((cols - c) / Weights::kValues));
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) simd::fold_to_four(totals[t], sums[t]);
}

// Scratch of a member for any type: prepared tokens, and one rounded token.
inline std::int64_t int8_stream_scratch_size(std::int64_t cols) {
  std::int64_t prepared = 0;
  for (const std::int64_t size :
       {int8_prepared_size<ElementType::kQ8_0>(cols), int8_prepared_size<ElementType::kQ4_K>(cols),
        int8_prepared_size<ElementType::kQ6_K>(cols)})
    prepared = std::max(prepared, size);
  return kStreamTokens * prepared + int8_rounded_size(cols);
}

/// Few tokens, see FloatStream in linear.hpp.
template <ElementType kType>
struct Int8Stream {
  static constexpr int kPassRows = 4;

  static void prepare(MatrixView<const float> x, float* scratch) {
    const std::int64_t stride = int8_prepared_size<kType>(x.cols);
    for (std::int64_t t = 0; t < x.rows; ++t)
      prepare_int8<kType>(x.row(t), x.cols, scratch + t * stride, scratch + x.rows * stride);
  }

  // Where a pass has no fourth row, another takes its place and its sum is dropped.
  template <int kTokens>
  static void multiply(const LinearTask& task, const StreamRows& all, WorkRange passes,
                       std::int64_t token, const float* prepared) {
    const std::int64_t row_bytes = task.weight.row_bytes();
    const std::int64_t stride = int8_prepared_size<kType>(task.weight.cols);
    const auto* weights = static_cast<const std::uint8_t*>(task.weight.data);
    for (std::int64_t i = passes.begin; i < passes.end; ++i) {
      const std::uint8_t* four[4];
      for (int r = 0; r < 4; ++r)
        four[r] = weights + std::min(all.row(i, r), all.rows.end - 1) * row_bytes;
      float sums[kTokens][4];
      int8_dot<kType, kTokens>(four, task.weight.cols, prepared, stride, sums);
      for (int r = 0; r < 4 && all.row(i, r) < all.rows.end; ++r)
        for (int t = 0; t < kTokens; ++t) put_sum(task, token + t, all.row(i, r), sums[t][r]);
    }
  }

  static void run(const LinearTask& task, const StreamRows& all, WorkRange passes,
                  std::int64_t tokens, const float* scratch) {
    for (std::int64_t t = 0; t < tokens; t += kInt8StreamGroup) {
      const float* group = scratch + t * int8_prepared_size<kType>(task.weight.cols);
      switch (std::min<std::int64_t>(tokens - t, kInt8StreamGroup)) {
        case 4: multiply<4>(task, all, passes, t, group); break;
        case 3: multiply<3>(task, all, passes, t, group); break;
        case 2: multiply<2>(task, all, passes, t, group); break;
        default: multiply<1>(task, all, passes, t, group); break;
      }
    }
  }
};

}  // namespace sluice::detail
