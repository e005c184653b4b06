// SPDX-License-Identifier: MIT
/// Non-owning views of dense data with a row stride: what kernels take and users with their own
/// weights pass. Extents are 64-bit.
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

#include "sluice/core/config.hpp"

namespace sluice {

/// Rows of `cols` consecutive elements, `stride` elements from row to row. [rows, cols]
template <class T>
struct MatrixView {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  constexpr MatrixView() = default;
  constexpr MatrixView(T* data_, std::int64_t rows_, std::int64_t cols_)
      : data(data_), rows(rows_), cols(cols_), stride(cols_) {}
  constexpr MatrixView(T* data_, std::int64_t rows_, std::int64_t cols_, std::int64_t stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
  /// A mutable view is a const view.
  template <class U>
    requires(std::is_same_v<const U, T>)
  constexpr MatrixView(const MatrixView<U>& other)
      : data(other.data), rows(other.rows), cols(other.cols), stride(other.stride) {}

  constexpr T* row(std::int64_t index) const {
    SLUICE_ASSERT(index >= 0 && index < rows);
    return data + index * stride;
  }
  constexpr MatrixView middle_rows(std::int64_t first, std::int64_t count) const {
    SLUICE_ASSERT(first >= 0 && count >= 0 && first + count <= rows);
    return {data + first * stride, count, cols, stride};
  }
};

/// Heads of one width for a run of tokens. [tokens, num_heads, head_dim], heads of one token are
/// consecutive, `token_stride` elements from token to token.
template <class T>
struct HeadsView {
  T* data = nullptr;
  std::int64_t tokens = 0;
  std::int64_t num_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t token_stride = 0;

  constexpr HeadsView() = default;
  constexpr HeadsView(T* data_, std::int64_t tokens_, std::int64_t num_heads_,
                      std::int64_t head_dim_)
      : HeadsView(data_, tokens_, num_heads_, head_dim_, num_heads_ * head_dim_) {}
  constexpr HeadsView(T* data_, std::int64_t tokens_, std::int64_t num_heads_,
                      std::int64_t head_dim_, std::int64_t token_stride_)
      : data(data_),
        tokens(tokens_),
        num_heads(num_heads_),
        head_dim(head_dim_),
        token_stride(token_stride_) {}
  template <class U>
    requires(std::is_same_v<const U, T>)
  constexpr HeadsView(const HeadsView<U>& other)
      : HeadsView(other.data, other.tokens, other.num_heads, other.head_dim, other.token_stride) {}

  constexpr T* head(std::int64_t token, std::int64_t index) const {
    SLUICE_ASSERT(token >= 0 && token < tokens && index >= 0 && index < num_heads);
    return data + token * token_stride + index * head_dim;
  }
};

}  // namespace sluice
