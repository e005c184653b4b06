// SPDX-License-Identifier: MIT
/// Random matrices of the quantised types: as a file stores them, as the device has them, and the
/// values that they stand for. For .cu files: what makes them is compiled by the host compiler.
#pragma once

#include <cstdint>
#include <vector>

#include <sluice/core/element.hpp>

namespace sluice_test {

struct QuantisedSample {
  sluice::ElementType type = sluice::ElementType::kQ8_0;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<std::uint8_t> stored;  ///< blocks of a GGUF file
  std::vector<std::uint8_t> packed;  ///< pack_quantised()
  std::vector<float> values;         ///< [rows, cols]
  /// [rows, cols]: |scale level| + |minimum|, what a value is the difference of.
  std::vector<float> magnitudes;
};

/// Random levels and scales; values have about this size. cols: a multiple of the type's block.
QuantisedSample random_quantised(sluice::ElementType type, std::int64_t rows, std::int64_t cols,
                                 std::uint64_t seed, double size = 1);

/// Gate's and up's rows in turns, as the device has them.
std::vector<std::uint8_t> packed_in_turns(const QuantisedSample& gate, const QuantisedSample& up);

/// The values of a matrix that is arranged for the device, read by its description alone
/// (quantised_layout.hpp), and the magnitudes if there is room.
std::vector<float> unpacked(sluice::ElementType type, const std::vector<std::uint8_t>& packed,
                            std::int64_t rows, std::int64_t cols,
                            std::vector<float>* magnitudes = nullptr);

}  // namespace sluice_test
