// SPDX-License-Identifier: MIT
// A cache that reads the clusters its queries need, against plain loops in double that form the
// clusters, pick tokens and attend to them, on random histories.
#include "sluice/attention/cluster_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/rotary.hpp"
#include "support/cache_driver.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::CacheDriver;
using test::Extents;

using Cache = ClusterSelectKvCache<float>;
using List = std::vector<std::int64_t>;

constexpr Extents kExtents{.kv_heads = 2, .group = 2, .dim = 12, .value_dim = 8};
constexpr KvShape kShape{2, 2, 12, 8};
constexpr std::array<const Rotary*, 2> kNoRotation{nullptr, nullptr};

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

/// The tokens that a KV head reads, by the definition.
/// keys: of tokens 0 to newest; committed: those that clusters are formed of.
std::set<std::int64_t> plain_pick(const ClusterSelection& rule, const KeyClusters& signs_of,
                                  const std::vector<std::vector<double>>& keys,
                                  std::int64_t committed,
                                  const std::vector<std::vector<double>>& queries, double scale) {
  std::vector<std::uint64_t> first;
  std::vector<List> members;
  for (std::int64_t i = 0; i < committed; ++i) {
    const std::vector<float> key(keys[at(i)].begin(), keys[at(i)].end());
    const std::uint64_t bits = signs_of.signs(key.data());
    std::size_t nearest = 0;
    int least = 100;
    for (std::size_t c = 0; c < first.size(); ++c)
      if (const int distance = std::popcount(first[c] ^ bits); distance < least) {
        least = distance;
        nearest = c;
      }
    if (least >= rule.threshold && std::ssize(first) < rule.max_clusters) {
      nearest = first.size();
      first.push_back(bits);
      members.emplace_back();
    }
    members[nearest].push_back(i);
  }
  std::vector<List> wants;
  for (const std::vector<double>& query : queries) {
    std::vector<double> scores;
    double whole = 0;
    for (const List& member : members) {
      double score = 0;
      for (const std::int64_t i : member)
        for (std::size_t d = 0; d < query.size(); ++d) score += query[d] * keys[at(i)][d];
      scores.push_back(std::exp(scale * score / static_cast<double>(member.size())));
      whole += scores.back() * static_cast<double>(member.size());
    }
    List order(members.size());
    for (std::size_t c = 0; c < order.size(); ++c) order[c] = static_cast<std::int64_t>(c);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t a, std::int64_t b) { return scores[at(a)] > scores[at(b)]; });
    double sum = 0;
    std::size_t count = 0;
    while (count < order.size() && !(sum > rule.share * whole)) {
      sum += scores[at(order[count])] * static_cast<double>(members[at(order[count])].size());
      ++count;
    }
    order.resize(count);
    wants.push_back(order);
  }
  const auto total = static_cast<std::int64_t>(keys.size());
  std::set<std::int64_t> read;
  for (std::int64_t i = std::min(committed, total - rule.recent); i < total; ++i) read.insert(i);
  std::set<std::int64_t> seen;
  for (std::size_t rank = 0; rank < members.size(); ++rank)
    for (const List& want : wants) {
      if (rank >= want.size() || !seen.insert(want[rank]).second) continue;
      const List& member = members[at(want[rank])];
      for (auto i = member.rbegin(); i != member.rend(); ++i) {
        if (std::ssize(read) >= rule.budget) return read;
        read.insert(*i);
      }
    }
  return read;
}

/// Random appends, commits, roll-backs and truncations, and every row against its definition.
void expect_histories(const ClusterSelection& rule, std::uint64_t seed) {
  constexpr std::int64_t kCapacity = 90;
  Cache cache(kShape, 4, static_cast<float>(1 / std::sqrt(12.0)), rule, kNoRotation, kCapacity, 5);
  CacheDriver<Cache> driver(cache, kExtents, 2, nullptr, seed);
  Random random(seed + 100);
  struct Step {
    bool single;
    std::int64_t committed;
  };
  std::vector<Step> steps;
  std::int64_t committed = 0;
  for (int i = 0; i < 160; ++i) {
    const std::int64_t tokens = random.below(4) == 0 ? between(random, 1, 5) : 1;
    if (cache.status(tokens) != CacheStatus::kOk) {
      cache.truncate(between(random, 1, 30));
    } else {
      driver.feed(tokens);
      for (std::int64_t t = 0; t < tokens; ++t) steps.push_back({tokens == 1, committed});
      if (cache.picks()) {
        for (std::int64_t h = 0; h < 2; ++h) {
          const auto picked = cache.picked(h);
          ASSERT_TRUE(std::ranges::is_sorted(picked));
          ASSERT_EQ(std::ranges::adjacent_find(picked), picked.end());
          ASSERT_EQ(picked.back(), cache.total() - 1);
          ASSERT_LE(std::ssize(picked), rule.budget);
        }
      }
      switch (random.below(8)) {
        case 0: cache.rollback(); break;
        case 1:  // more comes before it is committed, as far as a chunk has room
          if (cache.total() - committed >= 5) cache.commit();
          break;
        case 2: cache.truncate(between(random, 0, std::min<std::int64_t>(6, cache.total()))); break;
        default: cache.commit();
      }
    }
    committed = cache.committed();
    for (std::int64_t h = 0; h < 2; ++h) ASSERT_LE(cache.clusters(1, h).num_keys(), cache.total());
    steps.resize(at(cache.total()));
    driver.keep_rows();
  }
  EXPECT_GT(cache.selections(), 40);
  std::map<std::array<std::int64_t, 3>, std::set<std::int64_t>> read;
  driver.expect([&](std::int64_t layer, std::int64_t head, std::int64_t query,
                    std::int64_t key) -> std::optional<double> {
    const Step& step = steps[at(query)];
    if (layer < rule.dense_layers || !step.single || query + 1 <= rule.budget) return 0.0;
    const auto [found, is_new] =
        read.try_emplace(std::array{layer, head, query}, std::set<std::int64_t>{});
    if (is_new) {
      const auto part = [](const std::vector<double>& all, std::int64_t i) {
        return std::vector<double>(all.begin() + i * kExtents.dim,
                                   all.begin() + (i + 1) * kExtents.dim);
      };
      std::vector<std::vector<double>> keys;
      for (std::int64_t j = 0; j <= query; ++j)
        keys.push_back(part(driver.rows(layer)[at(j)].key, head));
      std::vector<std::vector<double>> queries;
      for (std::int64_t g = 0; g < kExtents.group; ++g)
        queries.push_back(part(driver.rows(layer)[at(query)].query, head * kExtents.group + g));
      found->second = plain_pick(rule, cache.clusters(layer, head), keys, step.committed, queries,
                                 driver.scale());
    }
    if (!found->second.contains(key)) return std::nullopt;
    return 0.0;
  });
}

TEST(ClusterSelection, IsItsDefinition) {
  expect_histories({.num_bits = 16,
                    .threshold = 5,
                    .max_clusters = 40,
                    .budget = 20,
                    .recent = 4,
                    .share = 0.5,
                    .dense_layers = 1},
                   1);
  // The budget alone ends the choice; clusters run out and keys join the nearest.
  expect_histories({.num_bits = 24,
                    .threshold = 7,
                    .max_clusters = 6,
                    .budget = 25,
                    .recent = 8,
                    .share = 1,
                    .dense_layers = 0},
                   2);
  // Nothing but the newest, as good as a window.
  expect_histories({.num_bits = 64,
                    .threshold = 20,
                    .max_clusters = 9,
                    .budget = 6,
                    .recent = 6,
                    .share = 0.8,
                    .dense_layers = 0},
                   3);
}

/// Gathered rows stand at their places in the text.
TEST(ClusterSelection, KeepsPlaces) {
  const Rotary rotary({.head_dim = 12, .rotary_dim = 12, .theta = 50});
  const std::array<const Rotary*, 1> rotaries{&rotary};
  Cache cache({1, 2, 12, 8}, 4, static_cast<float>(1 / std::sqrt(12.0)),
              {.num_bits = 16, .threshold = 4, .budget = 15, .recent = 3, .dense_layers = 0},
              rotaries, 90, 5, 7);
  CacheDriver<Cache> driver(cache, kExtents, 1, &rotary, 4);
  std::vector<std::array<std::set<std::int64_t>, 2>> picked;
  while (cache.total() < 80) {
    driver.feed(1);
    auto& heads = picked.emplace_back();
    for (std::int64_t h = 0; h < 2 && cache.picks(); ++h)
      heads[at(h)] = {cache.picked(h).begin(), cache.picked(h).end()};
    driver.commit();
  }
  driver.expect([&](std::int64_t, std::int64_t head, std::int64_t query,
                    std::int64_t key) -> std::optional<double> {
    const auto& of_head = picked[at(query)][at(head)];
    if (!of_head.empty() && !of_head.contains(key)) return std::nullopt;
    return static_cast<double>(query - key);
  });
}

/// A full cache takes any number of tokens before a commit. They are in no cluster and are always
/// read: where they are more than the budget, everything is.
TEST(ClusterSelection, ReadsEverythingWhereTooMuchIsNotCommitted) {
  constexpr std::int64_t kBudget = 6;
  const std::array<const Rotary*, 1> rotaries{nullptr};
  Cache cache({1, 2, 12, 8}, 4, static_cast<float>(1 / std::sqrt(12.0)),
              {.num_bits = 16, .threshold = 4, .budget = kBudget, .recent = 2, .dense_layers = 0},
              rotaries, 60, 3);
  CacheDriver<Cache> driver(cache, kExtents, 1, nullptr, 6);
  std::vector<std::array<std::set<std::int64_t>, 2>> picked(3);
  driver.feed(3);
  driver.commit();
  const auto feed_one = [&] {
    driver.feed(1);
    auto& heads = picked.emplace_back();
    for (std::int64_t h = 0; h < 2 && cache.picks(); ++h) {
      EXPECT_LE(std::ssize(cache.picked(h)), kBudget);
      heads[at(h)] = {cache.picked(h).begin(), cache.picked(h).end()};
    }
  };
  for (std::int64_t waiting = 1; waiting <= 40; ++waiting) {
    feed_one();
    EXPECT_EQ(cache.picks(), cache.total() > kBudget && waiting <= kBudget) << waiting;
  }
  driver.commit();
  feed_one();
  EXPECT_TRUE(cache.picks());
  driver.expect([&](std::int64_t, std::int64_t head, std::int64_t query,
                    std::int64_t key) -> std::optional<double> {
    const auto& of_head = picked[at(query)][at(head)];
    if (!of_head.empty() && !of_head.contains(key)) return std::nullopt;
    return 0.0;
  });
}

/// Clusters after keys went back are those of a cache that never saw them, bit for bit; so are
/// those of copies and of what was saved.
TEST(ClusterSelection, ForgetsWhatWentBack) {
  const ClusterSelection rule{.num_bits = 16,
                              .threshold = 4,
                              .max_clusters = 12,
                              .budget = 10,
                              .recent = 2,
                              .dense_layers = 0};
  const auto make = [&] {
    return Cache(kShape, 4, 0.3F, rule, kNoRotation, 200, 5);
  };
  Random random(5);
  std::vector<float> rows(200 * 2 * 12);
  for (float& x : rows) x = static_cast<float>(random.normal());
  const auto feed = [&](Cache& cache, std::int64_t from, std::int64_t to) {
    for (std::int64_t t = from; t < to; ++t) {
      cache.append(1);
      for (std::int64_t l = 0; l < 2; ++l)
        cache.store(l, {rows.data() + t * 24, 1, 2, 12}, {rows.data() + t * 24, 1, 2, 8}, nullptr,
                    0, 1);
      cache.commit();
    }
  };
  const auto expect_same = [](const Cache& a, const Cache& b) {
    for (std::int64_t l = 0; l < 2; ++l)
      for (std::int64_t h = 0; h < 2; ++h) {
        const KeyClusters& x = a.clusters(l, h);
        const KeyClusters& y = b.clusters(l, h);
        ASSERT_EQ(x.num_keys(), y.num_keys());
        ASSERT_TRUE(std::ranges::equal(x.cluster_of(), y.cluster_of()));
        ASSERT_TRUE(std::ranges::equal(x.counts(), y.counts()));
        for (std::int64_t c = 0; c < x.size(); ++c)
          ASSERT_TRUE(std::ranges::equal(x.representative(c), y.representative(c)));
      }
  };
  Cache cache = make();
  feed(cache, 0, 150);
  cache.truncate(90);
  Cache fresh = make();
  feed(fresh, 0, 60);
  expect_same(cache, fresh);
  feed(cache, 60, 120);
  feed(fresh, 60, 120);
  expect_same(cache, fresh);
  Cache copy = cache.sibling();
  copy.copy_from(cache);
  expect_same(copy, cache);
  ByteWriter writer;
  cache.save(writer);
  ByteReader reader(writer.bytes(), "memory");
  Cache restored = make();
  feed(restored, 30, 90);
  restored.restore(reader);
  expect_same(restored, cache);
  // Of another selection it is not taken over.
  ByteReader again(writer.bytes(), "memory");
  ClusterSelection other_rule = rule;
  other_rule.share = 0.7;
  Cache other(kShape, 4, 0.3F, other_rule, kNoRotation, 200, 5);
  const auto error = test::error_of([&] { other.restore(again); });
  ASSERT_TRUE(error);
  EXPECT_TRUE(error->detail().field.starts_with("share"));
}

TEST(ClusterSelection, RefusesWhatMakesNoSense) {
  const auto field = [](const ClusterSelection& rule) {
    const auto error = test::error_of([&] { Cache(kShape, 4, 1.0F, rule, kNoRotation, 50, 5); });
    return error ? error->detail().field : "";
  };
  EXPECT_EQ(field({}), "");
  EXPECT_EQ(field({.num_bits = 65}), "num_bits");
  EXPECT_EQ(field({.threshold = -1}), "threshold");
  EXPECT_EQ(field({.max_clusters = 0}), "max_clusters");
  EXPECT_EQ(field({.budget = 0}), "budget");
  EXPECT_EQ(field({.budget = 10, .recent = 11}), "recent");
  EXPECT_EQ(field({.share = -1}), "share");
  EXPECT_EQ(field({.dense_layers = -1}), "dense_layers");
}

}  // namespace SLUICE_TEST_UNIT
