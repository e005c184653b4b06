// SPDX-License-Identifier: MIT
/// What is arranged for the GPU stands for the values of the file, bit for bit.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/quantised_packing.hpp>

#include "backend/cuda/quantised_sample.hpp"

namespace {

using namespace sluice;
using namespace sluice_test;

constexpr ElementType kTypes[] = {ElementType::kQ8_0, ElementType::kQ6_K, ElementType::kQ4_0,
                                  ElementType::kQ4_1, ElementType::kQ4_K};

TEST(QuantisedPacking, KeepsEveryValue) {
  std::uint64_t seed = 1;
  for (const ElementType type : kTypes) {
    const std::int64_t block = block_shape(type).values;
    for (const std::int64_t rows : {1, 7, 8, 21})
      for (const std::int64_t blocks : {1, 2, 5}) {
        const QuantisedSample sample = random_quantised(type, rows, blocks * block, ++seed);
        ASSERT_EQ(static_cast<std::int64_t>(sample.packed.size()),
                  quantised_bytes(type, rows, sample.cols));
        EXPECT_EQ(unpacked(type, sample.packed, rows, sample.cols), sample.values)
            << to_string(type) << ", " << rows << " x " << sample.cols;
      }
  }
}

TEST(QuantisedPacking, InterleavesRows) {
  for (const ElementType type : kTypes) {
    const std::int64_t cols = 2 * block_shape(type).values;
    const QuantisedSample gate = random_quantised(type, 9, cols, 1);
    const QuantisedSample up = random_quantised(type, 9, cols, 2);
    const std::vector<float> both = unpacked(type, packed_in_turns(gate, up), 18, cols);
    for (std::int64_t r = 0; r < 18; ++r) {
      const std::vector<float>& expected = r % 2 == 0 ? gate.values : up.values;
      EXPECT_TRUE(std::equal(both.begin() + r * cols, both.begin() + (r + 1) * cols,
                             expected.begin() + r / 2 * cols))
          << to_string(type) << ", row " << r;
    }
  }
}

// 4,096 x 11,008: bits of a weight, scales and minima included.
TEST(QuantisedPacking, TakesTheFilesBytes) {
  const auto bits = [](ElementType type) {
    return 8 * static_cast<double>(quantised_bytes(type, 4096, 11008)) / (4096.0 * 11008.0);
  };
  EXPECT_EQ(bits(ElementType::kQ8_0), 8.5);
  EXPECT_EQ(bits(ElementType::kQ4_0), 4.5);
  EXPECT_EQ(bits(ElementType::kQ4_1), 5);
  EXPECT_EQ(bits(ElementType::kQ4_K), 4.75);  // 4.5 in the file
  EXPECT_EQ(bits(ElementType::kQ6_K), 8.75);  // 6.5625 in the file
  EXPECT_FALSE(is_quantised(ElementType::kBF16));
}

TEST(QuantisedPacking, RefusesWhatIsNotOneMatrix) {
  const QuantisedSample a = random_quantised(ElementType::kQ8_0, 4, 64, 1);
  const QuantisedSample b = random_quantised(ElementType::kQ4_0, 4, 64, 2);
  const std::array<WeightMatrix, 2> mixed{WeightMatrix{a.type, a.stored.data(), 4, 64},
                                          WeightMatrix{b.type, b.stored.data(), 4, 64}};
  EXPECT_THROW(static_cast<void>(pack_quantised(mixed)), Error);
  const std::vector<float> plain(64);
  const WeightMatrix floats = WeightMatrix::of(plain.data(), 1, 64);
  EXPECT_THROW(static_cast<void>(pack_quantised({&floats, 1})), Error);
}

}  // namespace
