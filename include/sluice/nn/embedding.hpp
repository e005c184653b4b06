// SPDX-License-Identifier: MIT
/// Token embeddings: rows of a stored table as float32.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/core/config.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// y[i, c] = scale * table[tokens[i], c]. The scale is Gemma's sqrt(hidden size), otherwise 1,
/// which leaves dequantise()'s bits. table: [vocabulary, cols]; tokens: [num_tokens], each asserted
/// to be in [0, vocabulary); y: [num_tokens, cols]. Allocates nothing.
inline void embed(const WeightMatrix& table, std::span<const Token> tokens, float scale,
                  MatrixView<float> y) {
  SLUICE_ASSERT(y.rows == static_cast<std::int64_t>(tokens.size()) && y.cols == table.cols);
  for (std::int64_t i = 0; i < y.rows; ++i) {
    float* target = y.row(i);
    dequantise(table.type, table.row(tokens[static_cast<std::size_t>(i)]), table.cols, target);
    if (scale != 1.0F)
      for (std::int64_t c = 0; c < y.cols; ++c) target[c] *= scale;
  }
}

}  // namespace sluice
