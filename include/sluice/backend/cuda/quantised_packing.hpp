// SPDX-License-Identifier: MIT
/// Arranges stored matrices as quantised_layout.hpp says, on the host. Nothing is rounded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "sluice/backend/cuda/quantised_layout.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

namespace detail {

/// A chunk of a tile, to write one of its rows.
template <ElementType kType>
class QuantisedChunkRow {
 public:
  static constexpr QuantisedLayout kLayout = quantised_layout(kType);
  static constexpr int kBlocks = kLayout.chunk_cols / kLayout.block_cols;

  QuantisedChunkRow(std::uint8_t* chunk, int row)
      : levels_(chunk + 16 * 4 * row),
        scales_(chunk + kQuantisedLevelBytes),
        thread_(row / 2),
        second_(row % 2) {}

  /// level: as the file stores it, from 0 in 4 bits, signed in 8.
  void set_level(int col, int level) const {
    std::uint8_t* const run = levels_ + 16 * (col % 16 / 4);
    if constexpr (kLayout.chunk_cols == 64) {
      run[col / 16 * 4 + col % 4] = static_cast<std::uint8_t>(level + 128);
    } else {
      const int nibble = col % 4 / 2 + 4 * (col % 2) + 2 * (col / 16 % 2);
      std::uint8_t& byte = run[col / 32 * 4 + nibble / 2];
      byte = static_cast<std::uint8_t>(byte | level << (nibble % 2 * 4));
    }
  }
  /// Entry `block` of a table of `kBlocks` (or `blocks`) entries per thread and row, which begins
  /// `begin` bytes behind the levels; tables of `stride` bytes per thread.
  template <class T>
  void set_scale(int begin, int stride, int block, T value) const {
    std::memcpy(
        scales_ + begin + thread_ * stride + (2 * block + second_) * static_cast<int>(sizeof(T)),
        &value, sizeof(T));
  }

 private:
  std::uint8_t* levels_;
  std::uint8_t* scales_;
  int thread_;
  int second_;
};

/// Calls write(QuantisedChunkRow, column in the chunk, block) for the blocks of a stored row.
/// `kValues`: columns that one call writes.
template <ElementType kType, class Block, int kValues, class Write>
void pack_row_blocks(const std::uint8_t* stored, std::int64_t cols, int row, std::uint8_t* tile,
                     Write&& write) {
  using Row = QuantisedChunkRow<kType>;
  constexpr QuantisedLayout kLayout = Row::kLayout;
  for (std::int64_t col = 0; col < cols; col += kValues) {
    Block block;
    std::memcpy(&block, stored + col / kValues * static_cast<std::int64_t>(sizeof(Block)),
                sizeof(Block));
    for (int part = 0; part < kValues; part += kLayout.block_cols) {
      const std::int64_t at = col + part;
      const Row to(tile + at / kLayout.chunk_cols * kLayout.chunk_bytes, row);
      write(to, static_cast<int>(at % kLayout.chunk_cols), block, part);
    }
  }
}

inline void pack_row(ElementType type, const std::uint8_t* stored, std::int64_t cols, int row,
                     std::uint8_t* tile) {
  switch (type) {
    case ElementType::kQ8_0:
      return pack_row_blocks<ElementType::kQ8_0, BlockQ8_0, 32>(
          stored, cols, row, tile, [](const auto& to, int col, const BlockQ8_0& block, int) {
            to.set_scale(0, 8, col / 32, block.d);
            for (int i = 0; i < 32; ++i) to.set_level(col + i, block.qs[i]);
          });
    case ElementType::kQ4_0:
      return pack_row_blocks<ElementType::kQ4_0, BlockQ4_0, 32>(
          stored, cols, row, tile, [](const auto& to, int col, const BlockQ4_0& block, int) {
            to.set_scale(0, 16, col / 32, block.d);
            for (int i = 0; i < 32; ++i)
              to.set_level(col + i, i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4);
          });
    case ElementType::kQ4_1:
      return pack_row_blocks<ElementType::kQ4_1, BlockQ4_1, 32>(
          stored, cols, row, tile, [](const auto& to, int col, const BlockQ4_1& block, int) {
            to.set_scale(0, 16, col / 32, block.d);
            to.set_scale(64, 16, col / 32, block.m);
            for (int i = 0; i < 32; ++i)
              to.set_level(col + i, i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4);
          });
    case ElementType::kQ4_K:
      return pack_row_blocks<ElementType::kQ4_K, BlockQ4_K, 256>(
          stored, cols, row, tile, [](const auto& to, int col, const BlockQ4_K& block, int part) {
            std::uint8_t scales[16];
            unpack_scales_q4_k(block.scales, scales);
            const int sub = part / 32;
            to.set_scale(0, 16, col / 32, scales[sub]);
            to.set_scale(8, 16, col / 32, scales[sub + 8]);
            to.set_scale(64, 8, 0, block.d);
            to.set_scale(64, 8, 1, block.dmin);
            const std::uint8_t* const qs = block.qs + sub / 2 * 32;
            for (int i = 0; i < 32; ++i)
              to.set_level(col + i, sub % 2 == 0 ? qs[i] & 15 : qs[i] >> 4);
          });
    case ElementType::kQ6_K:
      return pack_row_blocks<ElementType::kQ6_K, BlockQ6_K, 256>(
          stored, cols, row, tile, [](const auto& to, int col, const BlockQ6_K& block, int part) {
            to.set_scale(0, 8, col / 16, block.scales[part / 16]);
            to.set_scale(32, 4, 0, block.d);
            for (int i = 0; i < 16; ++i) {
              const int at = part + i;
              const int quarter = at % 128 / 32;
              const int low = block.ql[at / 128 * 64 + quarter % 2 * 32 + at % 32];
              const int high = block.qh[at / 128 * 32 + at % 32] >> (2 * quarter) & 3;
              to.set_level(col + i, ((quarter < 2 ? low & 15 : low >> 4) | high << 4) - 32);
            }
          });
    case ElementType::kF32:
    case ElementType::kF16:
    case ElementType::kBF16: break;
  }
  SLUICE_ASSERT(false);
}

}  // namespace detail

/// Matrices of one type and width, arranged as one for the device: row r of matrix i of n is row
/// n r + i (n = 2: gate and up, interleaved).
/// \throws Error(kShape) unless they are of one shape and a quantised type; std::bad_alloc.
inline std::vector<std::uint8_t> pack_quantised(std::span<const WeightMatrix> matrices) {
  const WeightMatrix& first = matrices.front();
  for (const WeightMatrix& matrix : matrices) {
    validate(matrix, "to be arranged for the GPU");
    if (!is_quantised(matrix.type) || matrix.type != first.type || matrix.rows != first.rows ||
        matrix.cols != first.cols)
      throw Error(ErrorCode::kShape,
                  {"matrices that are arranged as one", "pack_quantised", "type, rows, cols",
                   "one quantised type, the same extents", std::string(to_string(matrix.type))});
  }
  const auto count = static_cast<std::int64_t>(matrices.size());
  const std::int64_t rows = count * first.rows;
  std::vector<std::uint8_t> packed(
      static_cast<std::size_t>(quantised_bytes(first.type, rows, first.cols)));
  const std::int64_t tile_bytes = quantised_bytes(first.type, kQuantisedTileRows, first.cols);
  for (std::int64_t row = 0; row < rows; ++row)
    detail::pack_row(first.type, matrices[static_cast<std::size_t>(row % count)].row(row / count),
                     first.cols, static_cast<int>(row % kQuantisedTileRows),
                     packed.data() + row / kQuantisedTileRows * tile_bytes);
  return packed;
}

}  // namespace sluice
