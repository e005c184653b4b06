// SPDX-License-Identifier: MIT
#include "sluice/nn/embedding.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/random_matrix.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

class Embedding : public testing::TestWithParam<ElementType> {};

TEST_P(Embedding, CopiesTheRowsThatAreNamed) {
  const test::RandomMatrix table(GetParam(), 11, 512, 1);
  const std::vector<Token> tokens = {10, 0, 3, 3, 7};
  std::vector<float> y(5 * 515, -1.0F);
  embed(table.view, tokens, 1.0F, MatrixView<float>{y.data(), 5, 512, 515});
  for (std::int64_t i = 0; i < 5; ++i) {
    for (std::int64_t c = 0; c < 512; ++c)
      ASSERT_EQ(y[i * 515 + c], table.values[tokens[i] * 512 + c]) << "token " << i;
    for (std::int64_t c = 512; c < 515; ++c) EXPECT_EQ(y[i * 515 + c], -1.0F);
  }
}

TEST_P(Embedding, ScalesWithOneRounding) {
  const test::RandomMatrix table(GetParam(), 4, 256, 2);
  const std::vector<Token> tokens = {2};
  std::vector<float> y(256);
  embed(table.view, tokens, 25.3F, MatrixView<float>{y.data(), 1, 256});
  for (std::int64_t c = 0; c < 256; ++c) EXPECT_EQ(y[c], table.values[2 * 256 + c] * 25.3F);
}

INSTANTIATE_TEST_SUITE_P(Types, Embedding,
                         testing::Values(ElementType::kF32, ElementType::kF16, ElementType::kBF16,
                                         ElementType::kQ8_0, ElementType::kQ4_0, ElementType::kQ4_1,
                                         ElementType::kQ4_K, ElementType::kQ6_K),
                         [](const auto& each) { return std::string(to_string(each.param)); });

TEST(EmbeddingOfNothing, NoTokensGiveNothing) {
  const test::RandomMatrix table(ElementType::kF32, 4, 8, 3);
  embed(table.view, {}, 1.0F, MatrixView<float>{nullptr, 0, 8});
}

#if SLUICE_DEBUG_ASSERTS
TEST(EmbeddingDeathTest, TokensOutsideTheVocabularyAreAsserted) {
  const test::RandomMatrix table(ElementType::kF32, 4, 8, 4);
  std::vector<float> y(8);
  const MatrixView<float> view{y.data(), 1, 8};
  for (const Token token : {Token{-1}, Token{4}}) {
    const std::vector<Token> tokens = {token};
    EXPECT_DEATH(embed(table.view, tokens, 1.0F, view), "index");
  }
}
#endif

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
