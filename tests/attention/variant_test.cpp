// SPDX-License-Identifier: MIT
#include "sluice/attention/variant.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/position/alibi.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::AlibiBias;
using sluice::AllVisible;
using sluice::CausalWindow;
using sluice::KeyInfo;
using sluice::QueryInfo;
using sluice::Random;
using sluice::SoftCap;
using sluice::TileVisibility;
using sluice::TokenKind;

constexpr KeyInfo key_at(std::int64_t index) {
  return {index, TokenKind::kText, 0};
}
constexpr QueryInfo query_at(std::int64_t index) {
  return {index, static_cast<double>(index)};
}

std::int64_t visible_keys(const CausalWindow& window, std::int64_t query, std::int64_t keys) {
  std::int64_t count = 0;
  for (std::int64_t k = 0; k < keys; ++k)
    count += window.visible(query_at(query), key_at(k)) ? 1 : 0;
  return count;
}

TEST(CausalWindow, CountsTheQuerysOwnKey) {
  for (const std::int64_t size : {127, 128, 129}) {
    const CausalWindow window{.window_size = size};
    for (std::int64_t query = 0; query < 300; ++query) {
      EXPECT_EQ(visible_keys(window, query, 400), std::min(query + 1, size)) << query;
      EXPECT_TRUE(window.visible(query_at(query), key_at(query)));
      EXPECT_FALSE(window.visible(query_at(query), key_at(query + 1)));
    }
    EXPECT_TRUE(window.visible(query_at(size - 1), key_at(0)));  // the W-th key
    EXPECT_FALSE(window.visible(query_at(size), key_at(0)));     // one more
    EXPECT_TRUE(window.visible(query_at(1000), key_at(1001 - size)));
    EXPECT_FALSE(window.visible(query_at(1000), key_at(1000 - size)));
  }
}

TEST(CausalWindow, SinksStayVisible) {
  const CausalWindow window{.window_size = 128, .num_sink_tokens = 4};
  EXPECT_EQ(visible_keys(window, 127, 2000), 128);
  EXPECT_EQ(visible_keys(window, 128, 2000), 129);  // token 0 left the window, but stays
  EXPECT_EQ(visible_keys(window, 131, 2000), 132);
  EXPECT_EQ(visible_keys(window, 1000, 2000), 132);
  EXPECT_TRUE(window.visible(query_at(1000), key_at(3)));
  EXPECT_FALSE(window.visible(query_at(1000), key_at(4)));
  EXPECT_FALSE(window.visible(query_at(2), key_at(3)));  // a sink, but in the future
}

TEST(CausalWindow, UnlimitedIsCausal) {
  const CausalWindow window;
  EXPECT_EQ(visible_keys(window, 999, 2000), 1000);
  EXPECT_TRUE(window.visible(query_at(std::int64_t{1} << 53), key_at(0)));
  EXPECT_FALSE(window.visible(query_at(0), key_at(std::int64_t{1} << 53)));
}

TEST(CausalWindow, ConvertsALeftBound) {
  // "Window" as keys i - left ... i is one key more (core-algorithms 0.5).
  EXPECT_EQ(CausalWindow::from_left_bound(127).window_size, 128);
  EXPECT_EQ(visible_keys(CausalWindow::from_left_bound(128), 500, 600), 129);
  EXPECT_EQ(visible_keys(CausalWindow::from_left_bound(0), 500, 600), 1);
  EXPECT_EQ(visible_keys(CausalWindow::from_left_bound(-1), 500, 600), 501);  // no bound
}

TEST(CausalWindow, ClassifyAgreesWithVisibleOnEveryTile) {
  Random random(4);
  int counts[3] = {};
  for (int trial = 0; trial < 200000; ++trial) {
    const CausalWindow window{
        .window_size = trial % 10 == 0 ? CausalWindow{}.window_size
                                       : static_cast<std::int64_t>(1 + random.below(40)),
        .num_sink_tokens = static_cast<std::int64_t>(random.below(2) * random.below(12))};
    const std::int64_t base = trial % 3 == 0 ? std::int64_t{1} << 40 : 0;
    const std::int64_t query_first = base + static_cast<std::int64_t>(random.below(60));
    const std::int64_t query_last = query_first + static_cast<std::int64_t>(random.below(20));
    const std::int64_t key_first =
        (random.below(3) == 0 ? 0 : base) + static_cast<std::int64_t>(random.below(70));
    const std::int64_t key_last = key_first + static_cast<std::int64_t>(random.below(20));
    bool any = false;
    bool all = true;
    for (std::int64_t q = query_first; q <= query_last; ++q)
      for (std::int64_t k = key_first; k <= key_last; ++k) {
        const bool visible = window.visible(query_at(q), key_at(k));
        any |= visible;
        all &= visible;
      }
    const TileVisibility tile =
        window.classify(query_first, query_last, key_at(key_first), key_last);
    ++counts[static_cast<int>(tile)];
    ASSERT_TRUE(tile != TileVisibility::kNone || !any) << trial;
    ASSERT_TRUE(tile != TileVisibility::kAll || all) << trial;
    // "Some" is always right but slow. It is given without need only where sinks and others share
    // a tile, which segments of a cache never do.
    if (tile == TileVisibility::kSome &&
        (key_first >= window.num_sink_tokens || key_last < window.num_sink_tokens)) {
      ASSERT_TRUE(any && !all) << trial;
    }
  }
  for (const int count : counts) EXPECT_GT(count, 5000);
}

TEST(AllVisible, SeesTheFutureAsWell) {
  EXPECT_TRUE(AllVisible{}.visible(query_at(0), key_at(99)));
  EXPECT_EQ(AllVisible{}.classify(0, 1, key_at(5), 9), TileVisibility::kAll);
}

TEST(SoftCap, IsTheScaledHyperbolicTangent) {
  const SoftCap cap{.cap = 50};
  std::vector<float> scores{0, 1e-3F, -1, 10, 50, -120, 1e4F, -1e4F};
  const std::vector<float> before = scores;
  cap.apply({0, 0, 0}, scores);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const double exact = 50 * std::tanh(static_cast<double>(before[i]) / 50);
    // Division, tanh (2 ulp) and product: 4 roundings.
    EXPECT_NEAR(static_cast<double>(scores[i]), exact, 4 * 0x1p-24 * std::abs(exact));
    EXPECT_LE(std::abs(scores[i]), 50);
  }
}

TEST(AlibiBias, AddsSlopeTimesDistance) {
  const std::vector<float> slopes = sluice::alibi_slopes(6);
  const AlibiBias bias{slopes};
  for (std::int64_t head = 0; head < 6; ++head) {
    std::vector<float> scores{1, 2, 3, 4};
    bias.apply({head, 9.5, 5}, scores);
    for (std::size_t i = 0; i < 4; ++i)
      EXPECT_FLOAT_EQ(scores[i],
                      static_cast<float>(i + 1) + slopes[static_cast<std::size_t>(head)] *
                                                      (5 + static_cast<float>(i) - 9.5F));
  }
}

TEST(AlibiBias, TypedInBiases) {
  // core-algorithms 1.2: slope 0.5, in the cache and in the text.
  const std::vector<float> slopes{0.5F};
  const AlibiBias bias{slopes};
  std::vector<float> in_cache(4);
  bias.apply({0, 3, 0}, in_cache);
  EXPECT_EQ(in_cache, (std::vector<float>{-1.5F, -1, -0.5F, 0}));
  std::vector<float> sink(1);
  std::vector<float> rest(3);
  bias.apply({0, 4, 0}, sink);
  bias.apply({0, 4, 2}, rest);
  EXPECT_EQ(sink, std::vector<float>{-2});
  EXPECT_EQ(rest, (std::vector<float>{-1, -0.5F, 0}));
}

TEST(AlibiBias, IsExactFarIntoAStream) {
  const std::vector<float> slopes{0.25F};
  const AlibiBias bias{slopes};
  std::vector<float> near(100);
  std::vector<float> far(100);
  bias.apply({0, 99, 0}, near);
  bias.apply({0, 1e12 + 99, 1e12}, far);
  EXPECT_EQ(near, far);
}

TEST(SinkTerms, AreWhatTheyAreCalled) {
  const std::vector<float> logits{0.5F, -2};
  const sluice::SinkLogits learned{logits};
  EXPECT_EQ(learned.logit(0), 0.5F);
  EXPECT_EQ(learned.logit(1), -2);
  EXPECT_EQ(sluice::SoftmaxOffByOne::logit(7), 0);
  EXPECT_EQ(sluice::NoSinkTerm::logit(7), -std::numeric_limits<float>::infinity());
}

}  // namespace SLUICE_TEST_UNIT
