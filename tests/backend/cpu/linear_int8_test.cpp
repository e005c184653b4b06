// SPDX-License-Identifier: MIT
// Products with activations of eight bits against a plain loop over their definition, bit for bit
// and for every way of cutting the work; and against exact products within the documented bound.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/nn/linear.hpp"
#include "support/kernel_arithmetic.hpp"
#include "support/random_matrix.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::kernels;
using test::multiply_add;
using test::random_values;
using test::RandomMatrix;

constexpr ElementType kTypes[] = {ElementType::kQ8_0, ElementType::kQ4_0, ElementType::kQ4_1,
                                  ElementType::kQ4_K, ElementType::kQ6_K};

// One row's columns of a unit: weight[i] = scale * level[i] + offset.
struct Unit {
  std::vector<int> levels;
  float scale = 0.0F;
  float offset = 0.0F;
  int chain = 0;
};

template <class Block>
Block block_at(const RandomMatrix& weight, std::int64_t row, std::int64_t index) {
  Block block;
  std::memcpy(&block, weight.view.row(row) + index * static_cast<std::int64_t>(sizeof(Block)),
              sizeof(Block));
  return block;
}

// The units of a row, written from the formats' descriptions in nn/quantised_blocks.hpp.
std::vector<Unit> units_of(const RandomMatrix& weight, std::int64_t row) {
  const ElementType type = weight.view.type;
  std::vector<Unit> units;
  for (std::int64_t b = 0; b < weight.view.cols / block_shape(type).values; ++b) {
    switch (type) {
      case ElementType::kQ8_0: {
        const auto block = block_at<BlockQ8_0>(weight, row, b);
        units.push_back({{block.qs, block.qs + 32}, static_cast<float>(block.d), 0.0F});
        break;
      }
      case ElementType::kQ4_0: {
        const auto block = block_at<BlockQ4_0>(weight, row, b);
        Unit unit{{}, static_cast<float>(block.d), 0.0F};
        for (int i = 0; i < 32; ++i)
          unit.levels.push_back((i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4) - 8);
        units.push_back(unit);
        break;
      }
      case ElementType::kQ4_1: {
        const auto block = block_at<BlockQ4_1>(weight, row, b);
        Unit unit{{}, static_cast<float>(block.d), static_cast<float>(block.m)};
        for (int i = 0; i < 32; ++i)
          unit.levels.push_back(i < 16 ? block.qs[i] & 15 : block.qs[i - 16] >> 4);
        units.push_back(unit);
        break;
      }
      case ElementType::kQ4_K: {
        const auto block = block_at<BlockQ4_K>(weight, row, b);
        std::uint8_t scales[16];
        unpack_scales_q4_k(block.scales, scales);
        for (int s = 0; s < 8; ++s) {
          Unit unit{{},
                    static_cast<float>(block.d) * static_cast<float>(scales[s]),
                    -static_cast<float>(block.dmin) * static_cast<float>(scales[8 + s])};
          for (int i = 0; i < 32; ++i) {
            const int byte = block.qs[s / 2 * 32 + i];
            unit.levels.push_back(s % 2 == 0 ? byte & 15 : byte >> 4);
          }
          units.push_back(unit);
        }
        break;
      }
      default: {
        const auto block = block_at<BlockQ6_K>(weight, row, b);
        for (int s = 0; s < 16; ++s) {
          Unit unit{{}, static_cast<float>(block.d) * static_cast<float>(block.scales[s]), 0.0F};
          for (int i = 16 * s; i < 16 * s + 16; ++i) {
            const int quarter = i % 128 / 32;
            const int byte = block.ql[i / 128 * 64 + quarter % 2 * 32 + i % 32];
            const int high = (block.qh[i / 128 * 32 + i % 32] >> (2 * quarter)) & 3;
            unit.levels.push_back(((quarter < 2 ? byte & 15 : byte >> 4) | (high << 4)) - 32);
          }
          units.push_back(unit);
        }
      }
    }
  }
  const int run = type == ElementType::kQ4_K ? 2 : 1;
  for (std::size_t u = 0; u < units.size(); ++u)
    units[u].chain = static_cast<int>(u) / run % kernels().int8_chains;
  return units;
}

// One token, rounded: levels [cols], scales [cols / 32].
struct Rounded {
  std::vector<int> levels;
  std::vector<float> scales;
};

Rounded round_token(const float* x, std::int64_t cols) {
  Rounded rounded;
  for (std::int64_t b = 0; b < cols / 32; ++b) {
    float a = 0.0F;
    bool finite = true;
    for (int i = 0; i < 32; ++i) {
      a = std::max(a, std::fabs(x[32 * b + i]));
      finite = finite && std::isfinite(x[32 * b + i]);
    }
    const bool counts = a >= 0x1p-96F;
    const float inverse = counts ? 127.0F / a : 0.0F;
    for (int i = 0; i < 32; ++i)
      rounded.levels.push_back(
          finite ? static_cast<int>(multiply_add(x[32 * b + i], inverse, 0x1.8p23F) - 0x1.8p23F)
                 : 0);
    rounded.scales.push_back(!finite  ? std::numeric_limits<float>::quiet_NaN()
                             : counts ? a / 127.0F
                                      : 0.0F);
  }
  return rounded;
}

float expected_product(const std::vector<Unit>& units, const Rounded& x) {
  std::vector<float> chains(static_cast<std::size_t>(kernels().int8_chains), 0.0F);
  std::size_t column = 0;
  for (const Unit& unit : units) {
    std::int64_t products = 0;
    std::int64_t levels = 0;
    const float token_scale = x.scales[column / 32];
    for (const int level : unit.levels) {
      products += std::int64_t{level} * x.levels[column];
      levels += x.levels[column++];
    }
    float& chain = chains[static_cast<std::size_t>(unit.chain)];
    chain = multiply_add(static_cast<float>(products), unit.scale * token_scale, chain);
    if (unit.offset != 0.0F)
      chain = multiply_add(unit.offset, token_scale * static_cast<float>(levels), chain);
  }
  for (std::size_t half = chains.size() / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) chains[i] += chains[i + half];
  return chains[0];
}

struct Shape {
  std::int64_t rows;
  std::int64_t cols;
};

std::vector<Shape> shapes_of(ElementType type) {
  if (block_shape(type).values == 32)
    return {{1, 32}, {5, 96}, {37, 64}, {35, 160}, {13, 576}, {70, 224}, {3, 1088}};
  return {{1, 256}, {5, 768}, {37, 512}, {70, 1024}};
}

class LinearInt8 : public testing::TestWithParam<ElementType> {};

TEST_P(LinearInt8, IsItsDefinitionBitForBitHoweverTheWorkIsCut) {
  constexpr std::int64_t kTokens = 37;
  for (const Shape shape : shapes_of(GetParam())) {
    const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 1);
    std::vector<float> x = random_values(kTokens * shape.cols, 2);
    for (int i = 0; i < 32; ++i) x[static_cast<std::size_t>(i)] = 0.0F;
    for (std::int64_t i = shape.cols; i < 2 * shape.cols; ++i)
      x[static_cast<std::size_t>(i)] *= 1e-20F;
    const std::vector<float> bias = random_values(shape.rows, 3);
    const std::vector<float> start = random_values(kTokens * shape.rows, 4);

    std::vector<float> expected(static_cast<std::size_t>(kTokens * shape.rows));
    for (std::int64_t r = 0; r < shape.rows; ++r) {
      const std::vector<Unit> units = units_of(weight, r);
      for (std::int64_t t = 0; t < kTokens; ++t)
        expected[static_cast<std::size_t>(t * shape.rows + r)] =
            expected_product(units, round_token(x.data() + t * shape.cols, shape.cols));
    }

    for (const int team_size : {1, 2, 3}) {
      LinearWorkspace workspace(shape.cols, team_size, Activations::kInt8);
      ThreadTeam team(team_size);
      for (const std::int64_t chunk : {1, 2, 3, 4, 5, 8, 9, 16, 17, 37}) {
        for (const bool accumulate : {false, true}) {
          std::vector<float> y = start;
          for (std::int64_t first = 0; first < kTokens; first += chunk) {
            const std::int64_t tokens = std::min(chunk, kTokens - first);
            const MatrixView<const float> chunk_x{x.data() + first * shape.cols, tokens,
                                                  shape.cols};
            const MatrixView<float> chunk_y{y.data() + first * shape.rows, tokens, shape.rows};
            if (accumulate)
              linear_add(weight.view, chunk_x, bias.data(), chunk_y, workspace, team);
            else
              linear(weight.view, chunk_x, nullptr, chunk_y, workspace, team);
          }
          for (std::size_t i = 0; i < y.size(); ++i) {
            const float product = expected[i];
            const float wanted =
                accumulate ? start[i] + (product + bias[i % static_cast<std::size_t>(shape.rows)])
                           : product;
            ASSERT_EQ(y[i], wanted) << "[" << shape.rows << ", " << shape.cols << "], row "
                                    << i % static_cast<std::size_t>(shape.rows) << ", token "
                                    << i / static_cast<std::size_t>(shape.rows) << ", chunks of "
                                    << chunk << ", " << team_size << " members";
          }
        }
      }
    }
  }
}

// Each activation is off by at most half a level, a / 254, and by the rounding of its scale and of
// the product before it is rounded to a level (together below 2^-22 of a); sums round as elsewhere.
TEST_P(LinearInt8, IsWithinItsBoundOfTheExactProduct) {
  const Shape shape = shapes_of(GetParam()).back();
  const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 5);
  LinearWorkspace workspace(shape.cols, 2, Activations::kInt8);
  ThreadTeam team(2);
  for (const std::int64_t tokens : {1, 20}) {
    const std::vector<float> x = random_values(tokens * shape.cols, 6);
    std::vector<float> y(static_cast<std::size_t>(tokens * shape.rows));
    linear(weight.view, MatrixView<const float>{x.data(), tokens, shape.cols}, nullptr,
           MatrixView<float>{y.data(), tokens, shape.rows}, workspace, team);
    double error_squares = 0.0;
    double squares = 0.0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t r = 0; r < shape.rows; ++r) {
        double sum = 0.0;
        double bound = 0.0;
        for (std::int64_t b = 0; b < shape.cols; b += 32) {
          double a = 0.0;
          double weights = 0.0;
          double terms = 0.0;
          for (std::int64_t c = b; c < b + 32; ++c) {
            const auto value = static_cast<double>(x[static_cast<std::size_t>(t * shape.cols + c)]);
            const auto w =
                static_cast<double>(weight.values[static_cast<std::size_t>(r * shape.cols + c)]);
            sum += value * w;
            a = std::max(a, std::fabs(value));
            weights += std::fabs(w);
            terms += static_cast<double>(
                weight.magnitudes[static_cast<std::size_t>(r * shape.cols + c)]);
          }
          bound += a * (1.0 / 254.0 + 0x1p-22) * weights +
                   a * static_cast<double>(shape.cols / 16 + 8) * 0x1p-24 * terms;
        }
        const double error =
            static_cast<double>(y[static_cast<std::size_t>(t * shape.rows + r)]) - sum;
        ASSERT_LE(std::fabs(error), bound) << "row " << r << ", token " << t;
        error_squares += error * error;
        squares += sum * sum;
      }
    }
    // Uniform rounding errors of normal activations: a is about 2.1 deviations, so that the error
    // has a root mean square of 2.1 / 127 / sqrt(12), about 0.5 percent.
    EXPECT_LE(std::sqrt(error_squares), 0.02 * std::sqrt(squares));
  }
}

TEST_P(LinearInt8, InfinityAndNanBecomeNanInTheirTokenAlone) {
  const Shape shape = shapes_of(GetParam())[2];
  const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 7);
  LinearWorkspace workspace(shape.cols, 1, Activations::kInt8);
  ThreadTeam team(1);
  for (const float poison :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN()}) {
    for (const std::int64_t tokens : {1, 3, 20}) {
      std::vector<float> x = random_values(tokens * shape.cols, 8);
      x[static_cast<std::size_t>((tokens - 1) * shape.cols + 40)] = poison;
      std::vector<float> y(static_cast<std::size_t>(tokens * shape.rows));
      linear(weight.view, MatrixView<const float>{x.data(), tokens, shape.cols}, nullptr,
             MatrixView<float>{y.data(), tokens, shape.rows}, workspace, team);
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t r = 0; r < shape.rows; ++r)
          EXPECT_EQ(std::isnan(y[static_cast<std::size_t>(t * shape.rows + r)]), t == tokens - 1);
    }
  }
}

TEST_P(LinearInt8, KeepsToItsViews) {
  const Shape shape = shapes_of(GetParam()).back();
  const RandomMatrix weight(GetParam(), shape.rows, shape.cols, 9);
  LinearWorkspace workspace(shape.cols, 2, Activations::kInt8);
  ThreadTeam team(2);
  for (const std::int64_t tokens : {1, 5, 20}) {
    const std::int64_t x_stride = shape.cols + 3;
    const std::int64_t y_stride = shape.rows + 5;
    const std::vector<float> x = random_values((tokens - 1) * x_stride + shape.cols, 10);
    std::vector<float> y(static_cast<std::size_t>(tokens * y_stride), -7.0F);
    linear(weight.view, MatrixView<const float>{x.data(), tokens, shape.cols, x_stride}, nullptr,
           MatrixView<float>{y.data(), tokens, shape.rows, y_stride}, workspace, team);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const Rounded token = round_token(x.data() + t * x_stride, shape.cols);
      for (std::int64_t r = 0; r < y_stride; ++r)
        ASSERT_EQ(y[static_cast<std::size_t>(t * y_stride + r)],
                  r < shape.rows ? expected_product(units_of(weight, r), token) : -7.0F);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, LinearInt8, testing::ValuesIn(kTypes),
                         [](const auto& each) { return std::string(to_string(each.param)); });

TEST(LinearInt8Many, PlainWeightsKeepFloat32Activations) {
  const RandomMatrix plain(ElementType::kF16, 41, 256, 11);
  const RandomMatrix first(ElementType::kQ4_1, 70, 256, 12);
  const RandomMatrix second(ElementType::kQ6_K, 19, 256, 13);
  LinearWorkspace workspace(256, 2, Activations::kInt8);
  LinearWorkspace exact(256, 2);
  ThreadTeam team(2);
  for (const std::int64_t tokens : {1, 6, 21}) {
    const std::vector<float> x = random_values(tokens * 256, 14);
    const MatrixView<const float> x_view{x.data(), tokens, 256};
    const RandomMatrix* matrices[] = {&first, &plain, &second};
    std::vector<std::vector<float>> together;
    std::vector<LinearTask> tasks;
    for (const RandomMatrix* matrix : matrices)
      together.emplace_back(static_cast<std::size_t>(tokens * matrix->view.rows));
    for (std::size_t i = 0; i < 3; ++i)
      tasks.push_back(
          {.weight = matrices[i]->view, .y = {together[i].data(), tokens, matrices[i]->view.rows}});
    linear_many(tasks, x_view, workspace, team);
    for (std::size_t i = 0; i < 3; ++i) {
      std::vector<float> alone(together[i].size());
      linear(matrices[i]->view, x_view, nullptr,
             MatrixView<float>{alone.data(), tokens, matrices[i]->view.rows},
             i == 1 ? exact : workspace, team);
      EXPECT_EQ(together[i], alone);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
