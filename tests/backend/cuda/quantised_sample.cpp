// SPDX-License-Identifier: MIT
#include "backend/cuda/quantised_sample.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <sluice/backend/cuda/quantised_packing.hpp>
#include <sluice/core/random.hpp>
#include <sluice/nn/quantised_blocks.hpp>
#include <sluice/nn/weight_matrix.hpp>

namespace sluice_test {

using namespace sluice;

namespace {

f16 half_at(const std::uint8_t* bytes) {
  f16 value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

template <class Block>
void set_scales(Block& block, Random& random, double size) {
  const auto scale = [&](double of_largest) {
    return f16(static_cast<float>(size * (0.5 + random.uniform()) / of_largest));
  };
  if constexpr (std::is_same_v<Block, BlockQ8_0>) {
    block.d = scale(80);
  } else if constexpr (std::is_same_v<Block, BlockQ6_K>) {
    block.d = scale(2000);
  } else if constexpr (std::is_same_v<Block, BlockQ4_K>) {
    block.d = scale(250);
    block.dmin = scale(50);
  } else {
    block.d = scale(5);
    if constexpr (std::is_same_v<Block, BlockQ4_1>) block.m = f16(-static_cast<float>(block.d) * 7);
  }
}

template <class Block>
void fill(std::vector<std::uint8_t>& stored, Random& random, double size) {
  for (std::size_t at = 0; at < stored.size(); at += sizeof(Block)) {
    std::array<std::uint8_t, sizeof(Block)> bytes;
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.next() >> 40);
    Block block;
    std::memcpy(&block, bytes.data(), sizeof(block));
    set_scales(block, random, size);
    std::memcpy(stored.data() + at, &block, sizeof(block));
  }
}

}  // namespace

std::vector<float> unpacked(ElementType type, const std::vector<std::uint8_t>& packed,
                            std::int64_t rows, std::int64_t cols, std::vector<float>* magnitudes) {
  const QuantisedLayout layout = quantised_layout(type);
  const std::int64_t chunks = (cols + layout.chunk_cols - 1) / layout.chunk_cols;
  std::vector<float> values;
  if (magnitudes != nullptr) magnitudes->clear();
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) {
      const std::uint8_t* const chunk =
          packed.data() + (r / 8 * chunks + c / layout.chunk_cols) * layout.chunk_bytes;
      const auto g = static_cast<int>(r % 8);
      const auto at = static_cast<int>(c % layout.chunk_cols);
      const std::uint8_t* const run = chunk + 16 * (4 * g + at % 16 / 4);
      const std::uint8_t* const scales = chunk + 512;
      // Tables [t][entry][row of two].
      const auto f16_of = [&](int table, int entries, int entry) {
        return static_cast<float>(
            half_at(scales + table + 2 * ((g / 2 * entries + entry) * 2 + g % 2)));
      };
      const auto byte_of = [&](int entries, int entry) {
        return scales[(g / 2 * entries + entry) * 2 + g % 2];
      };
      float scaled = 0;
      float min = 0;
      if (layout.chunk_cols == 64) {
        const int level = run[4 * (at / 16) + at % 4] - 128;
        if (type == ElementType::kQ8_0)
          scaled = f16_of(0, 2, at / 32) * static_cast<float>(level);
        else
          scaled = f16_of(32, 1, 0) *
                   static_cast<float>(static_cast<std::int8_t>(byte_of(4, at / 16))) *
                   static_cast<float>(level);
      } else {
        std::uint32_t word = 0;
        std::memcpy(&word, run + 4 * (at / 32), sizeof(word));
        constexpr int kNibbles[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
        const auto level = static_cast<int>(word >> (4 * kNibbles[at / 16 % 2][at % 4]) & 15U);
        const int block = at / 32;
        if (type == ElementType::kQ4_0) {
          scaled = f16_of(0, 4, block) * static_cast<float>(level - 8);
        } else if (type == ElementType::kQ4_1) {
          scaled = f16_of(0, 4, block) * static_cast<float>(level);
          min = f16_of(64, 4, block);
        } else {
          scaled =
              f16_of(64, 2, 0) * static_cast<float>(byte_of(8, block)) * static_cast<float>(level);
          min = -(f16_of(64, 2, 1) * static_cast<float>(byte_of(8, 4 + block)));
        }
      }
      values.push_back(scaled + min);
      if (magnitudes != nullptr) magnitudes->push_back(std::abs(scaled) + std::abs(min));
    }
  return values;
}

QuantisedSample random_quantised(ElementType type, std::int64_t rows, std::int64_t cols,
                                 std::uint64_t seed, double size) {
  QuantisedSample sample;
  sample.type = type;
  sample.rows = rows;
  sample.cols = cols;
  Random random(seed);
  sample.stored.resize(static_cast<std::size_t>(storage_bytes(type, rows * cols)));
  switch (type) {
    case ElementType::kQ8_0: fill<BlockQ8_0>(sample.stored, random, size); break;
    case ElementType::kQ4_0: fill<BlockQ4_0>(sample.stored, random, size); break;
    case ElementType::kQ4_1: fill<BlockQ4_1>(sample.stored, random, size); break;
    case ElementType::kQ4_K: fill<BlockQ4_K>(sample.stored, random, size); break;
    case ElementType::kQ6_K: fill<BlockQ6_K>(sample.stored, random, size); break;
    case ElementType::kF32:
    case ElementType::kF16:
    case ElementType::kBF16: break;
  }
  const WeightMatrix matrix{type, sample.stored.data(), rows, cols};
  sample.packed = pack_quantised({&matrix, 1});
  sample.values.resize(static_cast<std::size_t>(rows * cols));
  dequantise(type, sample.stored.data(), rows * cols, sample.values.data());
  static_cast<void>(unpacked(type, sample.packed, rows, cols, &sample.magnitudes));
  return sample;
}

std::vector<std::uint8_t> packed_in_turns(const QuantisedSample& gate, const QuantisedSample& up) {
  const std::array<WeightMatrix, 2> both{
      WeightMatrix{gate.type, gate.stored.data(), gate.rows, gate.cols},
      WeightMatrix{up.type, up.stored.data(), up.rows, up.cols}};
  return pack_quantised(both);
}

}  // namespace sluice_test
