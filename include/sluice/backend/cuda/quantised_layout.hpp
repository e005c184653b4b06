// SPDX-License-Identifier: MIT
/// How quantised weights lie in device memory, for host compilers and nvcc alike.
///
/// A matrix is cut into tiles of 8 rows, a tile into chunks of 64 (8-bit levels) or 128 columns
/// (4-bit levels); tiles follow one another, and so do a tile's chunks, so that any rows are one
/// run of memory. What is missing at the right and at the bottom is filled up. A chunk holds 512
/// bytes of levels and then its scales:
///
/// - levels: 32 runs of 16 bytes, run 4 g + t for row g of the tile. Its word j has the columns
///   16 j + 4 t + 0 ... 3 as bytes, level + 128 (8 bits); or the columns 32 j + 4 t + 0 ... 3 as
///   nibbles 0, 4, 1, 5 and the columns 32 j + 16 + 4 t + 0 ... 3 as nibbles 2, 6, 3, 7, lowest
///   nibble first (4 bits). So the run is thread 4 g + t's part of matrix fragments (PTX ISA,
///   mma.m16n8k16: matrix B, or eight rows of matrix A) whose 16 columns have the same scale.
/// - scales, for t in 0 ... 3, the last [2] being rows 2 t and 2 t + 1, S the sub-blocks of a
///   chunk; by type, with the value of a level q:
///   - Q8_0, d q: d f16 [t][S = 2][2];
///   - Q6_K, d scale q: scale int8 [t][S = 4][2], then d f16 [t][2];
///   - Q4_0, d (q - 8): d f16 [t][S = 4][2];
///   - Q4_1, d q + m: d f16 [t][S = 4][2], then m f16 [t][S = 4][2];
///   - Q4_K, d scale q - dmin min: scale, then min, uint8 [t][2][S = 4][2], then d and dmin, f16
///     [t][2][2].
///
/// These are the numbers of the file: nothing is rounded. Planes of levels at multiples of 512
/// bytes and of scales behind them are no faster to read (bench/cuda/NOTES.md).
#pragma once

#include <cstdint>
#include <span>

#include "sluice/core/element.hpp"

namespace sluice {

/// Extents of a type's chunks.
struct QuantisedLayout {
  int chunk_cols = 0;   ///< 0: there is no such layout
  int chunk_bytes = 0;  ///< levels and scales, a multiple of 16
  int block_cols = 0;   ///< columns under one scale
  bool has_min = false;
};

inline constexpr int kQuantisedTileRows = 8;
inline constexpr int kQuantisedLevelBytes = 512;  ///< of a chunk

constexpr QuantisedLayout quantised_layout(ElementType type) {
  switch (type) {
    case ElementType::kQ8_0: return {64, kQuantisedLevelBytes + 32, 32, false};
    case ElementType::kQ6_K: return {64, kQuantisedLevelBytes + 48, 16, false};
    case ElementType::kQ4_0: return {128, kQuantisedLevelBytes + 64, 32, false};
    case ElementType::kQ4_1: return {128, kQuantisedLevelBytes + 128, 32, true};
    case ElementType::kQ4_K: return {128, kQuantisedLevelBytes + 96, 32, true};
    case ElementType::kF32:
    case ElementType::kF16:
    case ElementType::kBF16: break;
  }
  return {};
}

/// Whether the GPU multiplies matrices of this type as they are stored.
constexpr bool is_quantised(ElementType type) {
  return quantised_layout(type).chunk_cols > 0;
}

/// Rows of a matrix on the host, arranged for the device.
struct CudaPackedRows {
  ElementType type = ElementType::kF32;
  std::int64_t rows = 0;
  std::span<const std::uint8_t> content;  ///< [quantised_bytes(type, rows, cols)]; empty: none
};

/// Device memory of a matrix. Precondition: is_quantised(type).
constexpr std::int64_t quantised_bytes(ElementType type, std::int64_t rows, std::int64_t cols) {
  const QuantisedLayout layout = quantised_layout(type);
  return (rows + kQuantisedTileRows - 1) / kQuantisedTileRows *
         ((cols + layout.chunk_cols - 1) / layout.chunk_cols) * layout.chunk_bytes;
}

}  // namespace sluice
