// SPDX-License-Identifier: MIT
/// What the processor's matrix products are given, and the choice of arithmetic: shared by
/// linear.hpp (float32 activations) and linear_int8.hpp (activations of eight bits).
#pragma once

#include <cstdint>

#include "sluice/core/element.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// In which form activations meet quantised weights (Q8_0, Q4_0, Q4_1, Q4_K, Q6_K). Plain weights
/// (F32, F16, BF16) are multiplied with float32 activations either way.
enum class Activations : std::uint8_t {
  /// As they are: products and sums in float32, the accurate choice.
  kFloat32,
  /// Rounded to 8 bits per token and block of 32 columns, with exact integer products within a
  /// block: up to twice as fast where the processor multiplies bytes (AVX-512 VNNI); on plain AVX2
  /// prompts gain and single tokens of some types lose. The rule and the error bound are in
  /// backend/cpu/linear_int8.hpp.
  kInt8,
};

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

}  // namespace detail

}  // namespace sluice
