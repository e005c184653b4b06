// SPDX-License-Identifier: MIT
/// A matrix laid out once for products with a few rows at a time: the linear layers and the
/// convolutions of frame networks. Unlike sluice::linear it has one path for any number of rows and
/// adds in one order, so that a stream gives the same bits however it is cut; it needs no
/// workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// y = x W^T + bias with W: [rows, cols] of any stored type. F16 and BF16 stay as they are, since a
/// stream that takes few rows at a time waits for its weights; block types are widened to float32.
/// Copies share the weights. Each output is one chain of float32 multiply-adds in the order of the
/// columns, begun with the bias, whatever the number of rows of x: within (cols + 1) 2^-24 sum |x
/// w| of the exact value.
class PackedLinear {
 public:
  PackedLinear() = default;

  /// `bias`: [rows] or null. `name` is what errors call it.
  /// \throws Error(kShape) as validate(). Allocates the weights, rows rounded up to a panel.
  explicit PackedLinear(const WeightMatrix& weight, const float* bias = nullptr,
                        const std::string& name = "PackedLinear")
      : rows_(weight.rows), cols_(weight.cols) {
    validate(weight, name);
    const bool keeps = weight.type == ElementType::kF16 || weight.type == ElementType::kBF16;
    type_ = keeps ? weight.type : ElementType::kF32;
    const auto size = static_cast<std::size_t>(block_shape(type_).bytes);
    auto packed = std::make_shared<Packed>(Packed{
        Buffer<float>(static_cast<std::size_t>(num_panels() * kPanel)),
        Buffer<std::uint8_t>(static_cast<std::size_t>(num_panels() * kPanel * cols_) * size)});
    if (bias != nullptr) std::copy_n(bias, rows_, packed->bias.data());
    std::vector<float> row(static_cast<std::size_t>(cols_));
    for (std::int64_t r = 0; r < rows_; ++r) {
      const auto* source = weight.row(r);
      if (!keeps) {
        dequantise(weight.type, source, cols_, row.data());
        source = reinterpret_cast<const std::uint8_t*>(row.data());
      }
      std::uint8_t* target =
          packed->weights.data() +
          static_cast<std::size_t>(r / kPanel * kPanel * cols_ + r % kPanel) * size;
      for (std::int64_t c = 0; c < cols_; ++c)
        std::memcpy(target + static_cast<std::size_t>(c * kPanel) * size,
                    source + static_cast<std::size_t>(c) * size, size);
    }
    packed_ = std::move(packed);
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  /// Bytes of weights held.
  std::size_t bytes() const {
    return packed_ != nullptr ? packed_->bias.bytes() + packed_->weights.bytes() : 0;
  }

  /// x: [frames, cols], whose rows may overlap each other; y: [frames, rows], which overlaps
  /// neither. Allocates nothing.
  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    SLUICE_ASSERT(x.cols == cols_ && y.cols == rows_ && x.rows == y.rows);
    switch (type_) {
      case ElementType::kF16: return apply_as<f16>(x, y);
      case ElementType::kBF16: return apply_as<bf16>(x, y);
      default: return apply_as<float>(x, y);
    }
  }

 private:
  struct Packed {
    Buffer<float> bias;            // [panels * kPanel]
    Buffer<std::uint8_t> weights;  // [panels, cols, kPanel] of type_
  };

  // A panel of outputs by a few rows fills the registers with sums.
  static constexpr int kRegisters = simd::kNumRegisters >= 32 ? 4 : 2;
  static constexpr int kTokens = 6;
  static constexpr std::int64_t kPanel = std::int64_t{kRegisters} * simd::kWidth;

  std::int64_t num_panels() const { return (rows_ + kPanel - 1) / kPanel; }

  template <class Element>
  void apply_as(MatrixView<const float> x, MatrixView<float> y) const {
    std::int64_t p = 0;
    const std::int64_t panels = num_panels();
    if (x.rows == 1)  // two panels at once: one row alone has too few sums to keep busy
      for (; p + 2 <= panels; p += 2) tile<Element, 1, 2>(p, x, y, 0);
    for (; p < panels; ++p) {
      std::int64_t t = 0;
      for (; t + kTokens <= x.rows; t += kTokens) tile<Element, kTokens, 1>(p, x, y, t);
      switch (x.rows - t) {
        case 5: tile<Element, 5, 1>(p, x, y, t); break;
        case 4: tile<Element, 4, 1>(p, x, y, t); break;
        case 3: tile<Element, 3, 1>(p, x, y, t); break;
        case 2: tile<Element, 2, 1>(p, x, y, t); break;
        case 1: tile<Element, 1, 1>(p, x, y, t); break;
        default: break;
      }
    }
  }

  // Rows `first_row` on of kPanels panels.
  template <class Element, int kRows, int kPanels>
  void tile(std::int64_t panel, MatrixView<const float> x_all, MatrixView<float> y_all,
            std::int64_t first_row) const {
    constexpr int kColumns = kRegisters * kPanels;
    const std::int64_t panel_size = kPanel * cols_;
    const Element* weights =
        reinterpret_cast<const Element*>(packed_->weights.data()) + panel * panel_size;
    const float* x = x_all.data + first_row * x_all.stride;
    const std::int64_t x_stride = x_all.stride;
    simd::VecF sums[kRows][kColumns];
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) {
      const simd::VecF bias = simd::load(packed_->bias.data() + panel * kPanel + v * simd::kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][v] = bias;
    }
    for (std::int64_t c = 0; c < cols_; ++c) {
      simd::VecF w[kColumns];
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v)
        w[v] = simd::in_register(simd::load(weights + v / kRegisters * panel_size + c * kPanel +
                                            v % kRegisters * simd::kWidth));
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
        float* target = y_all.data + (first_row + r) * y_all.stride + first;
        if (first + simd::kWidth <= rows_)
          simd::store(target, sums[r][v]);
        else if (first < rows_)
          simd::store_partial(target, sums[r][v], rows_ - first);
      }
    }
  }

  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  ElementType type_ = ElementType::kF32;
  std::shared_ptr<const Packed> packed_;
};

}  // namespace sluice
