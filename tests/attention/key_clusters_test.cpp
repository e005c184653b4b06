// SPDX-License-Identifier: MIT
// Units of variable length: the specification's example (cache-and-kernel-algorithms.md C.5), plain
// definitions, and planted clusters and spans that must be found.
#include "sluice/attention/key_clusters.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using List = std::vector<std::int64_t>;

// Test C.5: sum 96, threshold 76.8, cumulative 36, 60, 81.
TEST(KeyClusters, PicksThoseOfTheExample) {
  const std::vector<float> scores{9, 8, 7, 3};
  const List counts{4, 3, 3, 5};
  List order(4);
  ASSERT_EQ(pick_clusters(scores, counts, 0.8, order), 3);
  EXPECT_EQ(List(order.begin(), order.begin() + 3), (List{0, 1, 2}));
  EXPECT_EQ(pick_clusters(scores, counts, 0, order), 1);
  EXPECT_EQ(pick_clusters(scores, counts, 1, order), 4);
  const std::vector<float> ties{1, -5, 1};
  ASSERT_EQ(pick_clusters(ties, List{1, 9, 1}, 0.6, order), 2);
  EXPECT_EQ(List(order.begin(), order.begin() + 2), (List{0, 2}));
}

/// Clusters in plain code: signs differ in fewer than the threshold from a cluster's first key.
TEST(KeyClusters, AreTheirDefinition) {
  Random random(3);
  for (const int threshold : {0, 3, 7, 65}) {
    KeyClusters clusters(8, 30, 400, 24, threshold, 5);
    std::vector<std::uint64_t> first;
    std::vector<List> members;
    std::vector<std::vector<float>> keys;
    for (std::int64_t i = 0; i < 400; ++i) {
      std::vector<float>& key = keys.emplace_back(8);
      for (float& x : key) x = static_cast<float>(random.normal());
      const std::uint64_t bits = clusters.signs(key.data());
      std::size_t nearest = 0;
      int least = 100;
      for (std::size_t c = 0; c < first.size(); ++c)
        if (const int distance = std::popcount(first[c] ^ bits); distance < least) {
          least = distance;
          nearest = c;
        }
      if (first.empty() || (least >= threshold && first.size() < 30)) {
        nearest = first.size();
        first.push_back(bits);
        members.emplace_back();
      }
      members[nearest].push_back(i);
      ASSERT_EQ(clusters.add(key.data()), static_cast<std::int64_t>(nearest));
    }
    ASSERT_EQ(clusters.size(), std::ssize(members));
    for (std::size_t c = 0; c < members.size(); ++c) {
      EXPECT_EQ(clusters.counts()[c], std::ssize(members[c]));
      for (std::size_t d = 0; d < 8; ++d) {
        double mean = 0;
        for (const std::int64_t i : members[c])
          mean += static_cast<double>(keys[static_cast<std::size_t>(i)][d]);
        mean /= static_cast<double>(members[c].size());
        // Running means of at most 400 numbers of size 4, each step rounded.
        EXPECT_NEAR(static_cast<double>(clusters.representative(static_cast<std::int64_t>(c))[d]),
                    mean, 400 * 4 * 0x1p-24);
      }
    }
  }
}

/// Tight groups of keys are clusters of their own, and a query for one picks it.
TEST(KeyClusters, PlantedGroupsAreRecalled) {
  Random random(9);
  constexpr std::int64_t kGroups = 12;
  std::vector<std::vector<float>> centres(kGroups, std::vector<float>(32));
  for (auto& centre : centres)
    for (float& x : centre) x = static_cast<float>(random.normal());
  KeyClusters clusters(32, 40, 600, 32, 7, 2);
  std::vector<std::int64_t> group_of;
  for (int i = 0; i < 600; ++i) {
    group_of.push_back(static_cast<std::int64_t>(random.below(kGroups)));
    std::vector<float> key = centres[static_cast<std::size_t>(group_of.back())];
    for (float& x : key) x += static_cast<float>(0.02 * random.normal());
    clusters.add(key.data());
  }
  std::vector<float> scores(40);
  List order(40);
  for (std::int64_t g = 0; g < kGroups; ++g) {
    clusters.score(centres[static_cast<std::size_t>(g)].data(), 1, scores);
    const std::int64_t picked = pick_clusters(
        std::span<const float>(scores).first(static_cast<std::size_t>(clusters.size())),
        clusters.counts(), 0.8, order);
    const std::set<std::int64_t> chosen(order.begin(), order.begin() + picked);
    std::int64_t there = 0;
    std::int64_t found = 0;
    for (std::size_t i = 0; i < group_of.size(); ++i)
      if (group_of[i] == g) {
        ++there;
        found += chosen.contains(clusters.cluster_of()[i]) ? 1 : 0;
      }
    EXPECT_GE(found, there * 9 / 10) << "group " << g;
    EXPECT_LE(picked, 5) << "group " << g;
  }
}

TEST(KeyClusters, RefusesWhatMakesNoSense) {
  EXPECT_THROW(KeyClusters(0, 1, 1), Error);
  EXPECT_THROW(KeyClusters(8, 0, 1), Error);
  EXPECT_THROW(KeyClusters(8, 1, 0), Error);
  EXPECT_THROW(KeyClusters(8, 1, 1, 65), Error);
  EXPECT_THROW(KeyClusters(8, 1, 1, 8, -1), Error);
}

/// Blocks on the diagonal of a map are the spans that are found; overlapping ones are dropped.
TEST(AttentionSpans, PlantedBlocksAreFound) {
  constexpr std::int64_t kTokens = 40;
  std::vector<float> map(kTokens * kTokens, 0.01F);
  const auto plant = [&](std::int64_t begin, std::int64_t end, float value) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t j = begin; j < end; ++j)
        map[static_cast<std::size_t>(i * kTokens + j)] = value;
  };
  plant(3, 9, 1);
  plant(15, 18, 0.8F);
  plant(30, 38, 0.6F);
  const std::vector<Span> spans = attention_spans(map, kTokens, 0.3, 12);
  ASSERT_GE(spans.size(), 3U);
  const auto at = [&](std::size_t i) {
    return List{spans[i].begin, spans[i].end};
  };
  EXPECT_EQ(at(0), (List{3, 9}));
  EXPECT_EQ(at(1), (List{30, 38}));
  EXPECT_EQ(at(2), (List{15, 18}));
  EXPECT_NEAR(spans[0].score, 36 * 0.7, 1e-5);
}

/// Scores and the greedy choice in plain code.
TEST(AttentionSpans, AreTheirDefinition) {
  Random random(4);
  for (int round = 0; round < 20; ++round) {
    constexpr std::int64_t kTokens = 14;
    std::vector<float> map(kTokens * kTokens);
    for (float& x : map) x = static_cast<float>(random.uniform());
    std::vector<Span> all;
    for (std::int64_t begin = 0; begin < kTokens; ++begin)
      for (std::int64_t end = begin + 1; end <= std::min(kTokens, begin + 5); ++end) {
        double score = 0;
        for (std::int64_t i = begin; i < end; ++i)
          for (std::int64_t j = begin; j < end; ++j)
            score += static_cast<double>(map[static_cast<std::size_t>(i * kTokens + j)]) - 0.5;
        if (score > 1e-9) all.push_back({begin, end, score});
      }
    std::vector<Span> expected;
    while (!all.empty()) {
      const auto best = std::max_element(
          all.begin(), all.end(), [](const Span& a, const Span& b) { return a.score < b.score; });
      const Span taken = *best;
      expected.push_back(taken);
      std::erase_if(all, [&](const Span& span) {
        std::set<std::int64_t> both;
        std::int64_t shared = 0;
        for (std::int64_t t = span.begin; t < span.end; ++t) both.insert(t);
        for (std::int64_t t = taken.begin; t < taken.end; ++t)
          shared += both.insert(t).second ? 0 : 1;
        return static_cast<double>(shared) > 0.3 * static_cast<double>(both.size());
      });
    }
    const std::vector<Span> spans = attention_spans(map, kTokens, 0.5, 5);
    ASSERT_EQ(spans.size(), expected.size());
    for (std::size_t i = 0; i < spans.size(); ++i) {
      EXPECT_EQ(spans[i].begin, expected[i].begin);
      EXPECT_EQ(spans[i].end, expected[i].end);
      EXPECT_NEAR(spans[i].score, expected[i].score, 1e-9);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
