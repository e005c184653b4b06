// SPDX-License-Identifier: MIT
/// What the processor's matrix products are given, and the choice of arithmetic: shared by
/// linear.hpp (float32 activations), linear_bf16.hpp and linear_int8.hpp (rounded ones).
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// In which form activations meet weights: how far they may be rounded for products that are faster
/// then. Sums are float32 (within a block of 8-bit products exact) whatever is chosen; F32 and F16
/// weights are always multiplied with float32 activations.
enum class Activations : std::uint8_t {
  /// As they are: products and sums in float32, the accurate choice.
  kFloat32,
  /// Rounded to bf16 (8 bits of mantissa, the precision of the weights themselves) where weights
  /// are
  /// BF16: twice as fast for chunks of tokens where the processor multiplies pairs of bf16
  /// (AVX512_BF16), the same results at about the speed of kFloat32 elsewhere. The rule is in
  /// backend/cpu/linear_bf16.hpp. Quantised weights (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K) still meet
  /// float32
  /// activations.
  kBf16,
  /// Rounded to 8 bits per token and block of 32 columns where weights are quantised, with exact
  /// integer products within a block, and as with kBf16 where weights are BF16: up to twice as fast
  /// where the processor multiplies bytes (AVX-512 VNNI); on plain AVX2
  /// prompts gain and single tokens of some types lose. The rule and the error bound are in
  /// backend/cpu/linear_int8.hpp.
  kInt8,
};

/// "f32", "bf16" or "int8".
constexpr std::string_view to_string(Activations activations) {
  switch (activations) {
    case Activations::kFloat32: return "f32";
    case Activations::kBf16: return "bf16";
    case Activations::kInt8: return "int8";
  }
  return "unknown";
}

/// One product of linear_many: y = x weight^T + bias, or y += that if `accumulate` is set.
struct LinearTask {
  WeightMatrix weight;          ///< [rows, cols]
  const float* bias = nullptr;  ///< [rows], or null for none
  MatrixView<float> y;          ///< [tokens, rows]
  bool accumulate = false;      ///< add to what y holds
};

namespace detail {

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Up to this many tokens weights are converted in registers, once per group of up to four tokens;
// above it panels pay. On a Zen 4 core the two meet at about 10 tokens for four-bit types and later
// for the others; bench/linear_bench has both sides under `crossover`.
inline constexpr std::int64_t kStreamTokens = 8;
// Bytes of weights that several groups of tokens visit in turn, so that the later groups find them
// in a second-level cache.
inline constexpr std::int64_t kStretchBytes = 256 * 1024;

/// Rows that are streamed from memory by passes: pass i takes `pass_rows` rows, begin + i and every
/// `apart`-th after it that is there. Each is then the head of a stream that runs through memory
/// without jumps from pass to pass, which the processor's prefetchers follow better than the short
/// rows themselves.
struct StreamRows {
  WorkRange rows;
  std::int64_t apart;  // also the number of passes

  constexpr StreamRows(WorkRange all, std::int64_t pass_rows)
      : rows(all), apart((all.end - all.begin + pass_rows - 1) / pass_rows) {}
  // The pass's row number `index`, which is there if it is below rows.end.
  constexpr std::int64_t row(std::int64_t pass, std::int64_t index) const {
    return rows.begin + index * apart + pass;
  }
};

// y = sum + bias, or y += that.
[[gnu::always_inline]] inline void put_sum(const LinearTask& task, std::int64_t token,
                                           std::int64_t row, float sum) {
  float& y = task.y.row(token)[row];
  if (task.bias != nullptr) sum += task.bias[row];
  y = task.accumulate ? y + sum : sum;
}
// Floats of rounded tokens that several panels visit in turn: 256 KiB.
inline constexpr std::int64_t kRoundedBudget = 64 * 1024;

template <int kRows, int kTokens>
[[gnu::always_inline]] inline void reduce_all(const simd::VecF (&sums)[kRows][kTokens],
                                              float (&result)[kRows][kTokens]) {
  if constexpr (kRows == 4 && kTokens == 1) {
    const simd::VecF four[4] = {sums[0][0], sums[1][0], sums[2][0], sums[3][0]};
    simd::reduce_add(four, &result[0][0]);
  } else {
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTokens; ++t) result[r][t] = simd::reduce_add(sums[r][t]);
  }
}

// Sums over chains of additions, for each of kCount registers, are added by halves: the first half
// of the chains to the second and so on, which is the order in which simd::reduce_add() folds
// lanes. chain_in_order(0), chain_in_order(1), ... is their order with the bits of their numbers
// reversed, in which no more than log2(kChains) sums wait. Chains are a power of two.
constexpr int chain_in_order(int index, int num_chains) {
  int chain = 0;
  for (int bit = 1; bit < num_chains; bit *= 2)
    if ((index & bit) != 0) chain += num_chains / (2 * bit);
  return chain;
}

template <int kChains, int kCount>
struct ChainSums {
  static constexpr int kLevels = std::bit_width(static_cast<unsigned>(kChains));
  simd::VecF waiting[kLevels][kCount];

  // Takes the sums of chain_in_order(index), index being 0, 1, ... in turn.
  [[gnu::always_inline]] void add(int index, simd::VecF (&sums)[kCount]) {
    int level = 0;
    for (; (index >> level & 1) != 0; ++level) {
#pragma GCC unroll 32
      for (int k = 0; k < kCount; ++k) sums[k] += waiting[level][k];
    }
#pragma GCC unroll 32
    for (int k = 0; k < kCount; ++k) waiting[level][k] = sums[k];
  }
  const simd::VecF (&total() const)[kCount] {
    return waiting[kLevels - 1];
  }
};

}  // namespace detail

}  // namespace sluice
