// SPDX-License-Identifier: MIT
/// Matrix products of bf16 weights with activations rounded to bf16 (Activations::kBf16).
///
/// Rounding: each activation is rounded to the nearest bf16, ties to even, so that it is within
/// 2^-8 of itself of what it was, and an output within 2^-8 * sum |x W| of the product with
/// unrounded activations, plus the float32 rounding of sums.
///
/// Arithmetic: products of two bf16 are exact in float32. Columns go by pairs, pair i to chain
/// i mod 4; within a chain products are added in float32 in the order of the columns, of a pair the
/// second one first (that is what the instruction does), each with one rounding where there is
/// fused multiply-add. The chains 0 to 3 are added as (0 + 2) + (1 + 3). The order is a function of
/// the columns alone: a token's outputs are the same bits whatever tokens are computed beside it,
/// on either path, by a team of any size. Builds for different instruction sets agree bit for bit
/// if they have fused multiply-add, wherever no operand, product or sum is below 2^-126, which the
/// instruction for pairs takes as zero.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "sluice/backend/cpu/linear_task.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::detail {

inline constexpr int kPairChains = 4;
// Columns of a step: a pair for each chain. Rows are taken as padded with zeros to whole steps.
inline constexpr std::int64_t kPairStep = 2 * kPairChains;
inline constexpr std::int64_t kPairStepBytes = kPairStep * sizeof(bf16);
// Columns that a register of pairs holds.
inline constexpr std::int64_t kPairLoad = 2 * simd::kWidth;
// Rows of a panel, one per lane of two registers.
inline constexpr int kPairRows = 2 * simd::kWidth;
// Tokens of one call of the panel kernel, 2 accumulators each, and of what it is compiled for.
inline constexpr int kPairTokens = simd::kNumRegisters >= 32 ? 12 : 4;
inline constexpr int kPairGrain = 4;
// Words of the panels that one member holds at a time: 384 KiB.
inline constexpr std::int64_t kPairBudget = 96 * 1024;

constexpr std::int64_t pair_steps(std::int64_t cols) {
  return (cols + kPairStep - 1) / kPairStep;
}
// Words (two columns each) of a row in whole steps.
constexpr std::int64_t pair_words(std::int64_t cols) {
  return pair_steps(cols) * kPairChains;
}

// A register of a row's pairs, of which `count` columns are there.
[[gnu::always_inline]] inline simd::VecI load_pairs(const std::uint8_t* source,
                                                    std::int64_t count) {
  if (count >= kPairLoad) return simd::load_int32(source);
  std::uint8_t padded[kPairLoad * sizeof(bf16)] = {};
  std::memcpy(padded, source, static_cast<std::size_t>(count) * sizeof(bf16));
  return simd::load_int32(padded);
}
[[gnu::always_inline]] inline simd::VecI round_pairs(const float* source, std::int64_t count) {
  if (count >= kPairLoad)
    return simd::round_pairs(simd::load(source), simd::load(source + simd::kWidth));
  float padded[kPairLoad] = {};
  std::memcpy(padded, source, static_cast<std::size_t>(count) * sizeof(float));
  return simd::round_pairs(simd::load(padded), simd::load(padded + simd::kWidth));
}

// Few tokens: a prepared token is its words in order. prepared: [round_up(pair_words, kWidth)].
constexpr std::int64_t pair_prepared_size(std::int64_t cols) {
  return round_up(pair_words(cols), simd::kWidth);
}
inline void prepare_pairs(const float* x, std::int64_t cols, float* prepared) {
  for (std::int64_t c = 0; c < cols; c += kPairLoad)
    simd::store(prepared + c / 2, simd::bits_as_float(round_pairs(x + c, cols - c)));
}

// Registers that hold one step of kPairPassRows rows, the rows' chains side by side. Two of them
// keep additions of different rows in flight.
inline constexpr int kPairRegisters = simd::kWidth >= 4 ? 2 : kPairChains;
inline constexpr int kPairRowsPerRegister = simd::kWidth >= 4 ? simd::kWidth / 4 : 1;
inline constexpr int kPairPassRows = simd::kWidth >= 4 ? 2 * kPairRowsPerRegister : 1;

// The rows rows[0], rows[0] + stride, ... times kTokens prepared tokens. sums: [kTokens][rows].
template <int kTokens>
[[gnu::always_inline]] inline void pair_dot(const std::uint8_t* rows, std::int64_t stride,
                                            std::int64_t cols, const float* prepared,
                                            std::int64_t prepared_stride,
                                            float (&sums)[kTokens][kPairPassRows]) {
  simd::VecF parts[kTokens][kPairRegisters] = {};
  const auto step = [&](const std::uint8_t* source, std::int64_t source_stride, std::int64_t word) {
    simd::VecI pairs[kPairRegisters];
#pragma GCC unroll 4
    for (int k = 0; k < kPairRegisters; ++k) {
      if constexpr (simd::kWidth >= 4)
        pairs[k] =
            simd::load_quads(source + k * kPairRowsPerRegister * source_stride, source_stride);
      else
        pairs[k] = simd::load_int32(source + 4 * k);
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const float* words = prepared + t * prepared_stride + word;
#pragma GCC unroll 4
      for (int k = 0; k < kPairRegisters; ++k) {
        simd::VecI values;
        if constexpr (simd::kWidth >= 4)
          values = simd::repeat_quad(words);
        else
          values = simd::load_int32(words + k);
        parts[t][k] = simd::dot_pairs(parts[t][k], pairs[k], values);
      }
    }
  };
  std::int64_t c = 0;
  if constexpr (simd::kWidth >= 4) {
    // Four steps at once: whole lines of every row.
    for (; c + 4 * kPairStep <= cols; c += 4 * kPairStep) {
#pragma GCC unroll 2
      for (int k = 0; k < kPairRegisters; ++k) {
        simd::VecI pairs[4];
        simd::load_quads(rows + c * 2 + k * kPairRowsPerRegister * stride, stride, pairs);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
          const float* words = prepared + t * prepared_stride + c / 2;
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s)
            parts[t][k] =
                simd::dot_pairs(parts[t][k], pairs[s], simd::repeat_quad(words + kPairChains * s));
        }
      }
    }
  }
  for (; c + kPairStep <= cols; c += kPairStep) step(rows + c * 2, stride, c / 2);
  if (c < cols) {
    std::uint8_t padded[kPairPassRows][kPairStepBytes] = {};
    for (int r = 0; r < kPairPassRows; ++r)
      std::memcpy(padded[r], rows + r * stride + c * 2,
                  static_cast<std::size_t>(cols - c) * sizeof(bf16));
    step(padded[0], kPairStepBytes, c / 2);
  }
  for (int t = 0; t < kTokens; ++t) {
    float lanes[kPairPassRows][kPairChains];
    static_assert(sizeof(lanes) == sizeof(parts[0]));
    std::memcpy(lanes, parts[t], sizeof(lanes));
    for (int r = 0; r < kPairPassRows; ++r)
      sums[t][r] = (lanes[r][0] + lanes[r][2]) + (lanes[r][1] + lanes[r][3]);
  }
}

/// Few tokens, see FloatStream in linear.hpp.
struct PairStream {
  static constexpr int kPassRows = kPairPassRows;

  static void prepare(MatrixView<const float> x, float* scratch) {
    for (std::int64_t t = 0; t < x.rows; ++t)
      prepare_pairs(x.row(t), x.cols, scratch + t * pair_prepared_size(x.cols));
  }

  template <int kTokens>
  static void multiply(const LinearTask& task, const StreamRows& all, WorkRange passes,
                       std::int64_t token, const float* prepared) {
    const std::int64_t cols = task.weight.cols;
    const std::int64_t row_bytes = task.weight.row_bytes();
    const std::int64_t stride = pair_prepared_size(cols);
    const auto* weights = static_cast<const std::uint8_t*>(task.weight.data);
    float sums[kTokens][kPairPassRows];
    for (std::int64_t i = passes.begin; i < passes.end; ++i) {
      const std::int64_t first = all.row(i, 0);
      if (all.row(i, kPairPassRows - 1) < all.rows.end) {
        pair_dot<kTokens>(weights + first * row_bytes, all.apart * row_bytes, cols, prepared,
                          stride, sums);
        for (int t = 0; t < kTokens; ++t)
          for (int r = 0; r < kPairPassRows; ++r)
            put_sum(task, token + t, first + r * all.apart, sums[t][r]);
        continue;
      }
      // One row in every place of a pass.
      for (std::int64_t row = first; row < all.rows.end; row += all.apart) {
        pair_dot<kTokens>(weights + row * row_bytes, 0, cols, prepared, stride, sums);
        for (int t = 0; t < kTokens; ++t) put_sum(task, token + t, row, sums[t][0]);
      }
    }
  }

  static void run(const LinearTask& task, const StreamRows& all, WorkRange passes,
                  std::int64_t tokens, const float* scratch) {
    for (std::int64_t t = 0; t < tokens; t += 4) {
      const float* group = scratch + t * pair_prepared_size(task.weight.cols);
      switch (std::min<std::int64_t>(tokens - t, 4)) {
        case 4: multiply<4>(task, all, passes, t, group); break;
        case 3: multiply<3>(task, all, passes, t, group); break;
        case 2: multiply<2>(task, all, passes, t, group); break;
        default: multiply<1>(task, all, passes, t, group); break;
      }
    }
  }
};

// Words of a panel of all columns, and of a group of kPairTokens rounded tokens. In both the words
// of a chain follow one another and the chains come in the order of chain_in_order():
// [chains, steps, kPairRows or kPairTokens].
constexpr std::int64_t pair_panel_size(std::int64_t cols) {
  return pair_words(cols) * kPairRows;
}
constexpr std::int64_t pair_group_size(std::int64_t cols) {
  return pair_words(cols) * kPairTokens;
}

// Writes the words from `word` on of kWidth rows, one a register, to their lanes of a panel or
// group that is kLanes wide; num_words are in all.
template <int kLanes>
[[gnu::always_inline]] inline void scatter_pairs(simd::VecF (&square)[simd::kWidth],
                                                 std::int64_t word, std::int64_t num_words,
                                                 float* target) {
  simd::transpose(square);
  const std::int64_t num_steps = num_words / kPairChains;
#pragma GCC unroll 16
  for (int i = 0; i < simd::kWidth; ++i) {
    const std::int64_t at = word + i;
    if (at >= num_words) break;
    const int chain = chain_in_order(static_cast<int>(at % kPairChains), kPairChains);
    float* words = target + (chain * num_steps + at / kPairChains) * kLanes;
    if constexpr (kLanes >= simd::kWidth)
      simd::store(words, square[i]);
    else
      simd::store_partial(words, square[i], kLanes);
  }
}

// Fills a panel with rows row, row + 1, ... of a matrix; missing rows are 0.
inline void fill_pair_panel(const WeightMatrix& weight, std::int64_t row, float* panel) {
  const std::int64_t row_bytes = weight.row_bytes();
  for (int side = 0; side < 2; ++side) {
    const std::int64_t first = row + side * simd::kWidth;
    const std::int64_t num_rows = std::clamp<std::int64_t>(weight.rows - first, 0, simd::kWidth);
    const auto* source = static_cast<const std::uint8_t*>(weight.data) + first * row_bytes;
    for (std::int64_t c = 0; c < weight.cols; c += kPairLoad) {
      simd::VecF square[simd::kWidth];
      if (num_rows == simd::kWidth && c + kPairLoad <= weight.cols) {
#pragma GCC unroll 16
        for (int r = 0; r < simd::kWidth; ++r) {
          const std::uint8_t* words = source + r * row_bytes + c * 2;
          // The same columns of the rows that come next: too short a run for the processor to see.
          simd::prefetch_far(words + simd::kWidth * row_bytes);
          square[r] = simd::bits_as_float(simd::load_int32(words));
        }
      } else {
        for (int r = 0; r < simd::kWidth; ++r)
          square[r] =
              r < num_rows
                  ? simd::bits_as_float(load_pairs(source + r * row_bytes + c * 2, weight.cols - c))
                  : simd::zero();
      }
      scatter_pairs<kPairRows>(square, c / 2, pair_words(weight.cols), panel + side * simd::kWidth);
    }
  }
}

// Scratch of a member: the panels of a tile.
inline std::int64_t pair_scratch_size(std::int64_t cols) {
  return std::max(kPairBudget, pair_panel_size(cols));
}

/// The chunk side of the arithmetic, in two phases (see round_and_multiply() in linear.hpp): tokens
/// are rounded once into `rounded`, shared by all members and tasks, then multiplied by panels.
struct PairPanels {
  // Columns of an item of the first phase.
  static constexpr std::int64_t kStrip = 64;
  static_assert(kStrip % kPairLoad == 0);

  static std::int64_t num_groups(std::int64_t tokens) {
    return (tokens + kPairTokens - 1) / kPairTokens;
  }
  static constexpr std::int64_t group_size(std::int64_t cols) { return pair_group_size(cols); }

  static void round_strip(const MatrixView<const float>& x, std::int64_t c, float* group) {
    constexpr int kLanes = std::min(kPairTokens, simd::kWidth);
    const std::int64_t end = std::min(c + kStrip, x.cols);
    const std::int64_t num_steps = pair_steps(x.cols);
    const std::int64_t steps = pair_steps(end - c);
    for (int chain = 0; chain < kPairChains; ++chain)
      prefetch_for_write(group + (chain * num_steps + c / kPairStep) * kPairTokens,
                         steps * kPairTokens);
    for (; c < end; c += kPairLoad) {
      for (std::int64_t first = 0; first < x.rows; first += simd::kWidth) {
        simd::VecF square[simd::kWidth];
#pragma GCC unroll 16
        for (int t = 0; t < simd::kWidth; ++t) {
          // Lanes without a token repeat the last one.
          const std::int64_t token = std::min(first + t, x.rows - 1);
          square[t] = t < kLanes ? simd::bits_as_float(round_pairs(x.row(token) + c, x.cols - c))
                                 : simd::zero();
        }
        scatter_pairs<kPairTokens>(square, c / 2, pair_words(x.cols), group + first);
      }
    }
  }

  // One panel times the first kTokens tokens of a group, of which `tokens` are stored.
  template <int kTokens>
  static void multiply_panel(int tokens, const LinearTask& task, const float* panel,
                             const float* group, std::int64_t row, std::int64_t token) {
    if constexpr (kTokens > kPairGrain)
      if (tokens <= kTokens - kPairGrain)
        return multiply_panel<kTokens - kPairGrain>(tokens, task, panel, group, row, token);
    prefetch_outputs<kPairRows>(task, row, token, tokens);
    const std::int64_t num_steps = pair_steps(task.weight.cols);
    ChainSums<kPairChains, 2 * kTokens> sums;
    for (int chain = 0; chain < kPairChains; ++chain) {
      simd::VecF parts[2 * kTokens] = {};
      for (std::int64_t s = 0; s < num_steps; ++s) {
        const simd::VecI low = simd::load_int32(panel);
        const simd::VecI high = simd::load_int32(panel + simd::kWidth);
#pragma GCC unroll 12
        for (int t = 0; t < kTokens; ++t) {
          std::int32_t word;
          std::memcpy(&word, group + t, sizeof(word));
          const simd::VecI pair = simd::broadcast(word);
          parts[2 * t] = simd::dot_pairs(parts[2 * t], low, pair);
          parts[2 * t + 1] = simd::dot_pairs(parts[2 * t + 1], high, pair);
        }
        panel += kPairRows;
        group += kPairTokens;
      }
      sums.add(chain, parts);
    }
    for (int t = 0; t < tokens; ++t) {
      for (int side = 0; side < 2; ++side) {
        const std::int64_t first = row + side * simd::kWidth;
        const std::int64_t count =
            std::clamp<std::int64_t>(task.weight.rows - first, 0, simd::kWidth);
        if (count == 0) continue;
        float* y = task.y.row(token + t) + first;
        simd::VecF sum = sums.total()[2 * t + side];
        if (task.bias != nullptr) sum += simd::load_partial(task.bias + first, count);
        if (task.accumulate) sum += simd::load_partial(y, count);
        simd::store_partial(y, sum, count);
      }
    }
  }

  // Rows of a panel: shares are whole panels.
  static constexpr std::int64_t kGrain = kPairRows;

  // A share of a task, for the `tokens` rounded tokens that begin at y's row `first`; `next` is
  // what the member is likely to take then.
  static void multiply(const LinearTask& task, const ShareRows& share, const ShareRows& next,
                       std::int64_t first, std::int64_t tokens, const float* rounded,
                       float* scratch) {
    const WeightMatrix& weight = task.weight;
    const WorkRange rows = share.rows;
    const std::int64_t panel_size = pair_panel_size(weight.cols);
    const std::int64_t tile_rows = std::max<std::int64_t>(1, kPairBudget / panel_size) * kPairRows;
    const std::int64_t groups = num_groups(tokens);
    for (std::int64_t tile = rows.begin; tile < rows.end; tile += tile_rows) {
      const std::int64_t tile_end = std::min(tile + tile_rows, rows.end);
      float* panel = scratch;
      for (std::int64_t row = tile; row < tile_end; row += kPairRows, panel += panel_size)
        fill_pair_panel(weight, row, panel);
      const std::int64_t num_panels = (tile_end - tile + kPairRows - 1) / kPairRows;
      Ahead next_rows = share.ahead(tile_end, next, tile_rows, num_panels * groups);
      // Groups in blocks that a second-level cache keeps beside the panels.
      const std::int64_t block =
          std::max<std::int64_t>(1, kRoundedBudget / group_size(weight.cols));
      for (std::int64_t begin = 0; begin < groups; begin += block) {
        panel = scratch;
        for (std::int64_t row = tile; row < tile_end; row += kPairRows, panel += panel_size) {
          for (std::int64_t g = begin; g < std::min(begin + block, groups); ++g) {
            const WorkRange range = share_of(tokens, g, groups);
            next_rows.fetch();
            multiply_panel<kPairTokens>(static_cast<int>(range.end - range.begin), task, panel,
                                        rounded + g * group_size(weight.cols), row,
                                        first + range.begin);
          }
        }
      }
    }
  }
};

}  // namespace sluice::detail
