// SPDX-License-Identifier: MIT
/// A tensor as it lies in a model file: what GGUF and safetensors readers hand out and writers
/// take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/element.hpp"

namespace sluice {

/// One named tensor whose elements stay in the file's bytes. Dense, row-major, little endian; block
/// formats run along the last axis. `data` points into the file that the reader holds and lives as
/// long as it does. It is aligned to the element in a mapped GGUF file; safetensors promises no
/// alignment, so copy elements out with memcpy unless the address was checked.
struct FileTensor {
  std::string name;
  ElementType type = ElementType::kF32;
  std::vector<std::int64_t> shape;  ///< outermost axis first: a matrix is [rows, cols]
  const std::byte* data = nullptr;  ///< [bytes]
  std::size_t bytes = 0;            ///< shape's product in blocks, times the bytes of a block

  /// The tensor's bytes as a span.
  std::span<const std::byte> span() const noexcept { return {data, bytes}; }
};

}  // namespace sluice
