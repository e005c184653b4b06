// SPDX-License-Identifier: MIT
/// A stored weight matrix, seen but not owned: what linear layers and embeddings read.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/nn/quantised_blocks.hpp"

namespace sluice {

/// A matrix [rows = out features, cols = in features] of any element type, row after row without
/// gaps, quantisation blocks along cols. Does not own `data`, which must outlive the view and be
/// aligned to the size of a plain element (F32: 4 bytes, F16 and BF16: 2; block types: 1).
struct WeightMatrix {
  ElementType type = ElementType::kF32;
  const void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;

  /// A view of float32 weights [rows, cols].
  static constexpr WeightMatrix of(const float* data, std::int64_t rows, std::int64_t cols) {
    return {ElementType::kF32, data, rows, cols};
  }

  /// Bytes of one row.
  constexpr std::int64_t row_bytes() const { return storage_bytes(type, cols); }
  /// Bytes of the whole matrix.
  constexpr std::int64_t bytes() const { return rows * row_bytes(); }
  /// The stored form of row `index`.
  const std::uint8_t* row(std::int64_t index) const {
    SLUICE_ASSERT(index >= 0 && index < rows);
    return static_cast<const std::uint8_t*>(data) + index * row_bytes();
  }
};

/// Checks a matrix that came from outside; `name` says which in the message.
/// \throws Error(kShape) if an extent is not positive, cols is not a multiple of the type's block,
/// or data is null.
inline void validate(const WeightMatrix& matrix, const std::string& name) {
  const auto refuse = [&](const char* field, std::string expected, std::string found) {
    throw Error(ErrorCode::kShape,
                {"weight matrix", name, field, std::move(expected), std::move(found)});
  };
  if (matrix.rows < 1) refuse("rows", "at least 1", std::to_string(matrix.rows));
  if (matrix.cols < 1) refuse("cols", "at least 1", std::to_string(matrix.cols));
  const int block = block_shape(matrix.type).values;
  if (matrix.cols % block != 0)
    refuse("cols", "a multiple of " + std::to_string(block), std::to_string(matrix.cols));
  if (matrix.data == nullptr) refuse("data", "an address", "null");
}

}  // namespace sluice
