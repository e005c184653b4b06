// SPDX-License-Identifier: MIT
#include "sluice/cache/score_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

using Entries = std::vector<std::int64_t>;

Entries selected(const std::vector<double>& scores, const KeepRule& rule) {
  Entries order(scores.size());
  Entries kept(scores.size());
  kept.resize(static_cast<std::size_t>(select_entries(scores, rule, order, kept)));
  return kept;
}

// core-algorithms.md, test 8.2: start 2, recent 0, entropy 4, a cache of 6.
TEST(SelectEntries, SirLlmAsReleased) {
  const std::vector<double> surprisal{9, 1, 5, 0.5, 3, 0.2};
  const struct {
    std::int64_t coming;
    Entries kept;
  } rows[] = {{0, {0, 1, 2, 3, 4, 5}},
              {1, {0, 1, 2, 4, 5}},
              {2, {0, 1, 2, 5}},
              {3, {0, 1, 5}},
              {4, {0, 1}}};
  for (const auto& row : rows) {
    const KeepRule rule{.num_sink_tokens = 2,
                        .budget = 6 - row.coming,
                        .top = std::max<std::int64_t>(0, 4 - row.coming)};
    EXPECT_EQ(selected(surprisal, rule), row.kept) << row.coming;
    const ScorePolicy policy = ScorePolicy::sir_llm_released(2, 0, 4, 1, row.coming);
    EXPECT_EQ(policy.keep_rule().budget, rule.budget);
    EXPECT_EQ(policy.keep_rule().top, rule.top);
  }
  // Five coming tokens: the sinks alone would not fit.
  EXPECT_THROW(ScorePolicy::sir_llm_released(2, 0, 4, 1, 5).validate(), Error);
  // The rule of the paper: sinks, and the best of the rest.
  EXPECT_EQ(selected(surprisal, ScorePolicy::sir_llm(2, 0, 2, 1, 1).keep_rule()),
            (Entries{0, 1, 2, 4}));
}

// cache-and-kernel-algorithms.md, test B.1: votes before the window of two.
TEST(SelectEntries, SnapKvPooledVotes) {
  const std::vector<double> votes{0.1065, 0.7869, 0.1065, 0.1065, 0.4773, 0.1065};
  std::vector<double> pooled(6);
  pool_scores(votes, ScorePooling::kAverage, 3, pooled);
  const std::vector<double> average{0.2978, 0.3333, 0.3333, 0.2301, 0.2301, 0.1946};
  for (std::size_t i = 0; i < 6; ++i) EXPECT_NEAR(pooled[i], average[i], 6e-5) << i;
  const auto kept = [&](ScorePooling pooling, std::int64_t budget) {
    std::vector<double> scores(8, 0);
    pool_scores(votes, pooling, 3, std::span<double>(scores).first(6));
    return selected(scores, {.recent = 2, .budget = budget});
  };
  EXPECT_EQ(kept(ScorePooling::kAverage, 5), (Entries{0, 1, 2, 6, 7}));
  EXPECT_EQ(kept(ScorePooling::kAverage, 6), (Entries{0, 1, 2, 3, 6, 7}));
  pool_scores(votes, ScorePooling::kMax, 3, pooled);
  EXPECT_EQ(pooled, (std::vector<double>{0.7869, 0.7869, 0.7869, 0.4773, 0.4773, 0.4773}));
  EXPECT_EQ(kept(ScorePooling::kMax, 4), (Entries{0, 1, 6, 7}));
  EXPECT_EQ(kept(ScorePooling::kMax, 9), (Entries{0, 1, 2, 3, 4, 5, 6, 7}));
  pool_scores(votes, ScorePooling::kNone, 1, pooled);
  EXPECT_EQ(pooled, votes);
}

TEST(SelectEntries, TiesGoToTheOlderAndNumbersThatAreNoneLast) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(selected({1, 1, 1, 1, 1}, {.budget = 3}), (Entries{0, 1, 2}));
  EXPECT_EQ(selected({nan, 1, nan, 2, -5}, {.budget = 3}), (Entries{1, 3, 4}));
  EXPECT_EQ(selected({nan, nan, nan}, {.budget = 2}), (Entries{0, 1}));
  EXPECT_EQ(selected({}, {.budget = 2}), Entries{});
}

/// Against sorting everything.
TEST(SelectEntries, RandomRules) {
  for (std::uint64_t seed = 1; seed <= 3000; ++seed) {
    Random random(seed);
    const auto below = [&](std::int64_t n) {
      return static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(n)));
    };
    const std::int64_t count = below(40);
    std::vector<double> scores;
    for (std::int64_t i = 0; i < count; ++i) scores.push_back(static_cast<double>(below(12)));
    KeepRule rule{.num_sink_tokens = below(5), .recent = below(6)};
    rule.budget = rule.num_sink_tokens + rule.recent + below(12) + 1;
    if (seed % 3 == 0) {
      rule.recent = 0;
      rule.top = below(rule.budget - rule.num_sink_tokens + 1);
    }
    Entries all(scores.size());
    std::iota(all.begin(), all.end(), 0);
    Entries expected = all;
    if (count > rule.budget) {
      std::vector<bool> stays(scores.size());
      std::int64_t stay = 0;
      const auto keep = [&](std::int64_t i) {
        stay += stays[static_cast<std::size_t>(i)] ? 0 : 1;
        stays[static_cast<std::size_t>(i)] = true;
      };
      const bool compete = rule.top >= 0;
      if (!compete) {
        for (std::int64_t i = 0; i < rule.num_sink_tokens; ++i) keep(i);
        for (std::int64_t i = 0; i < rule.recent; ++i) keep(count - 1 - i);
      }
      std::int64_t best = compete ? rule.top : rule.budget - stay;
      std::stable_sort(all.begin(), all.end(), [&](std::int64_t a, std::int64_t b) {
        return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
      });
      for (const std::int64_t i : all)
        if (best > 0 && !stays[static_cast<std::size_t>(i)]) {
          keep(i);
          --best;
        }
      if (compete) {
        for (std::int64_t i = 0; i < rule.num_sink_tokens; ++i) keep(i);
        for (std::int64_t i = count - 1; i >= 1 && stay < rule.budget; --i) keep(i);
      }
      expected.clear();
      for (std::int64_t i = 0; i < count; ++i)
        if (stays[static_cast<std::size_t>(i)]) expected.push_back(i);
    }
    ASSERT_EQ(selected(scores, rule), expected) << "seed " << seed;
  }
}

TEST(ScorePolicy, ErrorsNameTheField) {
  const auto field_of = [](const ScorePolicy& policy) -> std::string {
    try {
      policy.validate();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      return error.what();
    }
    return "";
  };
  const ScorePolicy good = ScorePolicy::snap_kv(64, 128, 32);
  EXPECT_EQ(field_of(good), "");
  const auto expect = [&](const char* field, const auto& change) {
    ScorePolicy policy = good;
    change(policy);
    EXPECT_NE(field_of(policy).find(field), std::string::npos) << field << ": " << field_of(policy);
  };
  expect("budget", [](ScorePolicy& p) { p.budget = 0; });
  expect("growth", [](ScorePolicy& p) { p.growth = 0; });
  expect("max_chunk", [](ScorePolicy& p) { p.max_chunk = 129; });
  expect("recent", [](ScorePolicy& p) { p.recent = 65; });
  expect("num_sink_tokens", [](ScorePolicy& p) { p.num_sink_tokens = -1; });
  expect("num_queries", [](ScorePolicy& p) { p.num_queries = 0; });
  expect("pool_size", [](ScorePolicy& p) { p.pool_size = 4; });
  expect("floor", [](ScorePolicy& p) { p.floor = 1.5; });
  expect("decay", [](ScorePolicy& p) { p.decay = 0; });
  expect("decay", [](ScorePolicy& p) { p.decay = std::nan(""); });
  expect("origin", [](ScorePolicy& p) { p.origin = std::nan(""); });
}

}  // namespace SLUICE_TEST_UNIT
