// SPDX-License-Identifier: MIT
/// Random weights of every element type, with what a test needs to judge products of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::test {

/// A stored matrix of random weights, in memory of exactly its size so that a sanitizer sees any
/// read beyond it, with its float32 values and a bound of the terms that a kernel may form of each:
/// a kernel may add scale * level and offset * 1 separately.
struct RandomMatrix {
  WeightMatrix view;
  std::unique_ptr<unsigned char[]> stored;
  std::vector<float> values;      // [rows, cols], by the plain reference
  std::vector<float> magnitudes;  // [rows, cols], at least the sum of the absolute terms

  RandomMatrix(ElementType type, std::int64_t rows, std::int64_t cols, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const std::int64_t count = rows * cols;
    const BlockShape shape = block_shape(type);
    stored.reset(new unsigned char[static_cast<std::size_t>(storage_bytes(type, count))]);
    values.resize(static_cast<std::size_t>(count));
    magnitudes.resize(static_cast<std::size_t>(count));
    if (type == ElementType::kQ4_K || type == ElementType::kQ6_K) {
      for (std::int64_t i = 0; i < storage_bytes(type, count); ++i)
        stored[static_cast<std::size_t>(i)] = static_cast<unsigned char>(random());
      for (std::int64_t b = 0; b < count / shape.values; ++b) {
        unsigned char* block = stored.get() + b * shape.bytes;
        const f16 halves[2] = {f16(normal(random) * 1e-3F), f16(normal(random) * 1e-3F)};
        if (type == ElementType::kQ4_K)
          std::memcpy(block, halves, 4);
        else
          std::memcpy(block + 208, halves, 2);
      }
    } else {
      for (float& value : values) value = normal(random);
      quantise(type, values.data(), count, stored.get());
    }
    dequantise(type, stored.get(), count, values.data());
    // Within a block |scale * level| and |offset| are each at most the block's range of values;
    // twice the largest value and the range bounds their sum, for blocks that use both ends.
    for (std::int64_t b = 0; b < count; b += shape.values) {
      const auto [low, high] =
          std::minmax_element(values.data() + b, values.data() + b + shape.values);
      const float largest = std::max(std::fabs(*low), std::fabs(*high));
      const float terms = shape.values == 1 ? largest : 2.0F * largest + (*high - *low);
      std::fill_n(magnitudes.data() + b, shape.values, terms);
    }
    view = {type, stored.get(), rows, cols};
  }
};

/// Standard normal values.
inline std::vector<float> random_values(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace sluice::test
