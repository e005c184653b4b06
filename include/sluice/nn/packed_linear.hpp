// SPDX-License-Identifier: MIT
/// A float32 matrix laid out once for products with a few rows at a time: the linear layers and the
/// convolutions of frame networks. Unlike sluice::linear it has one path for any number of rows and
/// adds in one order, so that a stream gives the same bits however it is cut; it needs no
/// workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// y = x W^T + bias with W: [rows, cols] of any stored type, widened to float32. Copies share the
/// weights. Each output is one chain of multiply-adds in the order of the columns, begun with the
/// bias, whatever the number of rows of x: within (cols + 1) 2^-24 sum |x w| of the exact value.
class PackedLinear {
 public:
  PackedLinear() = default;

  /// `bias`: [rows] or null. `name` is what errors call it.
  /// \throws Error(kShape) as validate(). Allocates rows * cols floats, rows rounded up to a panel.
  explicit PackedLinear(const WeightMatrix& weight, const float* bias = nullptr,
                        const std::string& name = "PackedLinear")
      : rows_(weight.rows), cols_(weight.cols) {
    validate(weight, name);
    const std::int64_t panels = num_panels();
    auto packed =
        std::make_shared<Buffer<float>>(static_cast<std::size_t>(panels * kPanel * (cols_ + 1)));
    std::vector<float> row(static_cast<std::size_t>(cols_));
    for (std::int64_t r = 0; r < rows_; ++r) {
      dequantise(weight.type, weight.row(r), cols_, row.data());
      float* panel = packed->data() + r / kPanel * kPanel * (cols_ + 1) + r % kPanel;
      panel[0] = bias != nullptr ? bias[r] : 0.0F;
      for (std::int64_t c = 0; c < cols_; ++c) panel[(c + 1) * kPanel] = row[c];
    }
    packed_ = std::move(packed);
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  /// Bytes of weights held.
  std::size_t bytes() const { return packed_ != nullptr ? packed_->bytes() : 0; }

  /// x: [frames, cols], whose rows may overlap each other; y: [frames, rows], which overlaps
  /// neither. Allocates nothing.
  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    SLUICE_ASSERT(x.cols == cols_ && y.cols == rows_ && x.rows == y.rows);
    std::int64_t p = 0;
    const std::int64_t panels = num_panels();
    if (x.rows == 1)  // two panels at once: one row alone has too few sums to keep busy
      for (; p + 2 <= panels; p += 2) tile<1, 2>(p, x.data, 0, y.data, 0);
    for (; p < panels; ++p) {
      std::int64_t t = 0;
      for (; t + kTokens <= x.rows; t += kTokens) rows_of<kTokens>(p, x, y, t);
      switch (x.rows - t) {
        case 5: rows_of<5>(p, x, y, t); break;
        case 4: rows_of<4>(p, x, y, t); break;
        case 3: rows_of<3>(p, x, y, t); break;
        case 2: rows_of<2>(p, x, y, t); break;
        case 1: rows_of<1>(p, x, y, t); break;
        default: break;
      }
    }
  }

 private:
  // A panel of outputs by a few rows fills the registers with sums.
  static constexpr int kRegisters = simd::kNumRegisters >= 32 ? 4 : 2;
  static constexpr int kTokens = 6;
  static constexpr std::int64_t kPanel = std::int64_t{kRegisters} * simd::kWidth;

  std::int64_t num_panels() const { return (rows_ + kPanel - 1) / kPanel; }

  template <int kRows>
  void rows_of(std::int64_t panel, MatrixView<const float> x, MatrixView<float> y,
               std::int64_t t) const {
    tile<kRows, 1>(panel, x.data + t * x.stride, x.stride, y.data + t * y.stride, y.stride);
  }

  template <int kRows, int kPanels>
  void tile(std::int64_t panel, const float* x, std::int64_t x_stride, float* y,
            std::int64_t y_stride) const {
    constexpr int kColumns = kRegisters * kPanels;
    const std::int64_t panel_size = kPanel * (cols_ + 1);
    const float* weights = packed_->data() + panel * panel_size;
    const auto at = [&](std::int64_t c, int v) {
      return weights + v / kRegisters * panel_size + c * kPanel + v % kRegisters * simd::kWidth;
    };
    simd::VecF sums[kRows][kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      const simd::VecF bias = simd::load(at(0, v));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][v] = bias;
    }
    for (std::int64_t c = 0; c < cols_; ++c) {
      simd::VecF w[kColumns];
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) w[v] = simd::in_register(simd::load(at(c + 1, v)));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const simd::VecF value = simd::broadcast(x[r * x_stride + c]);
#pragma GCC unroll 8
        for (int v = 0; v < kColumns; ++v) sums[r][v] = simd::fma(w[v], value, sums[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kColumns; ++v) {
        const std::int64_t first = panel * kPanel + v * simd::kWidth;
        float* target = y + r * y_stride + first;
        if (first + simd::kWidth <= rows_)
          simd::store(target, sums[r][v]);
        else if (first < rows_)
          simd::store_partial(target, sums[r][v], rows_ - first);
      }
    }
  }

  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  std::shared_ptr<const Buffer<float>> packed_;  // per panel: the biases, then column by column
};

}  // namespace sluice
