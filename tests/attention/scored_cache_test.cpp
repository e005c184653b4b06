// SPDX-License-Identifier: MIT
// The typed-in examples of scored retention, through a cache of one layer and attend().
#include "sluice/attention/scored_cache.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/position/rotary.hpp"

namespace {

using namespace sluice;

using Row = std::vector<float>;
using Entries = std::vector<std::int64_t>;

/// One layer, one KV head; tokens are given as query, key and value.
struct Layer {
  std::int64_t dim;
  std::int64_t value_dim;
  float scale;
  std::unique_ptr<Rotary> rotary;
  std::array<const Rotary*, 1> rotaries;
  ScoredKvCache<float> cache;
  AttentionWorkspace<cpu> workspace;
  ThreadTeam team{1};

  Layer(std::int64_t dim_, std::int64_t value_dim_, float scale_, const ScorePolicy& policy,
        std::optional<double> theta = {}, std::span<const float> directions = {})
      : dim(dim_),
        value_dim(value_dim_),
        scale(scale_),
        rotary(theta ? std::make_unique<Rotary>(RotaryConfig{.head_dim = static_cast<int>(dim_),
                                                             .rotary_dim = static_cast<int>(dim_),
                                                             .theta = *theta})
                     : nullptr),
        rotaries{rotary.get()},
        cache({1, 1, dim_, value_dim_}, 1, scale_, policy, rotaries, directions),
        workspace(rotary.get(),
                  {.num_qo_heads = 1,
                   .num_kv_heads = 1,
                   .head_dim = dim_,
                   .value_dim = value_dim_,
                   .max_queries = policy.max_chunk,
                   .max_keys = cache.max_entries()},
                  1) {}

  /// One token, uncommitted. Returns what it attends to.
  Row token(const Row& query, const Row& key, const Row& value) {
    const std::int64_t index = cache.total();
    cache.append(1);
    Row rotation(rotary ? static_cast<std::size_t>(rotary->row_size()) : 0);
    if (rotary) rotary->angles(cache.write_position(index), rotation.data());
    cache.store(0, HeadsView<const float>(key.data(), 1, 1, dim),
                HeadsView<const float>(value.data(), 1, 1, value_dim), rotation.data(), 0, 1);
    std::array<Segment<float>, 1> segments;
    const auto count = static_cast<std::size_t>(cache.segments(0, 1, segments));
    const std::span<const Segment<float>> seen(segments.data(), count);
    Row out(static_cast<std::size_t>(value_dim));
    float lse = 0;
    const AttentionQuery rows{HeadsView<const float>(query.data(), 1, 1, dim), index,
                              cache.write_position(index)};
    attend(rows, seen, AttentionVariant<CausalWindow>{scale, CausalWindow{}},
           HeadsView<float>(out.data(), 1, 1, value_dim), &lse, workspace, team, cpu{});
    cache.observe({0, 0, rows, seen, &lse});
    return out;
  }
  Row commit(const Row& query, const Row& key, const Row& value) {
    Row out = token(query, key, value);
    cache.commit();
    return out;
  }
  Entries kept() const {
    const std::span<const std::int64_t> entries = cache.kept(0, 0);
    return {entries.begin(), entries.end()};
  }
};

// cache-and-kernel-algorithms.md, test B.0: tokens 0, 3, 5 of six are kept.
TEST(ScoredCache, GapsAndRanks) {
  const struct {
    PositionRule rule;
    std::array<double, 2> out;
  } rows[] = {{PositionRule::kInText, {0.854285, 0.592674}},
              {PositionRule::kInCache, {0.635347, 0.895082}}};
  for (const auto& row : rows) {
    ScorePolicy policy = ScorePolicy::sir_llm(0, 0, 3, 1, 1);
    policy.position_rule = row.rule;
    policy.growth = 4;
    Layer layer(2, 2, static_cast<float>(1 / std::sqrt(2)), policy, 10000.0);
    const Row keys[] = {{1, 0}, {9, 9}, {9, -9}, {0, 1}, {-9, 3}, {1, 1}};
    const Row values[] = {{1, 0}, {7, 7}, {7, 7}, {0, 1}, {7, 7}, {1, 1}};
    const float scores[] = {5, 1, 2, 6, 0, 7};
    for (std::size_t t = 0; t < 6; ++t) {
      layer.token({0, 0}, keys[t], values[t]);
      layer.cache.give_scores(std::span(scores).subspan(t, 1));
      layer.cache.commit();
    }
    layer.cache.compact();
    EXPECT_EQ(layer.kept(), (Entries{0, 3, 5}));
    // The seventh token sees the three, and itself with a weight that vanishes.
    const Row out = layer.token({1, 0.5F}, {-100, -50}, {0, 0});
    EXPECT_NEAR(out[0], row.out[0], 2e-6);
    EXPECT_NEAR(out[1], row.out[1], 2e-6);
  }
}

// Test B.1: keys of one channel, window of two, votes pooled over three.
TEST(ScoredCache, SnapKv) {
  const float keys[] = {0, 2, 0, 0, 1.5F, 0, 0.5F, 1};
  const auto kept = [&](std::int64_t budget, ScorePooling pooling) {
    ScorePolicy policy = ScorePolicy::snap_kv(budget, 8, 1, 2, pooling, 3);
    Layer layer(1, 1, 1, policy);
    for (const float key : keys) layer.commit({1}, {key}, {0});
    EXPECT_EQ(layer.kept().size(), 8U);
    layer.cache.compact();
    return layer.kept();
  };
  EXPECT_EQ(kept(5, ScorePooling::kAverage), (Entries{0, 1, 2, 6, 7}));
  EXPECT_EQ(kept(6, ScorePooling::kAverage), (Entries{0, 1, 2, 3, 6, 7}));
  EXPECT_EQ(kept(4, ScorePooling::kMax), (Entries{0, 1, 6, 7}));
  EXPECT_EQ(kept(9, ScorePooling::kMax), (Entries{0, 1, 2, 3, 4, 5, 6, 7}));
}

// Test B.2: the filter points away from what queries look for.
TEST(ScoredCache, QFilters) {
  const Row directions{-1, 0};
  Layer layer(2, 1, 1, ScorePolicy::q_filters(4, 2, 8, 1), {}, directions);
  for (const Row& key : {Row{1, 0}, {-1, 2}, {.5F, 1}, {2, -1}, {0, 3}, {.1F, 0}})
    layer.commit({0, 0}, key, {0});
  EXPECT_EQ(std::vector<double>(layer.cache.scores(0, 0).begin(), layer.cache.scores(0, 0).end()),
            (std::vector<double>{1, -1, .5, 2, 0, static_cast<double>(.1F)}));
  layer.cache.compact();
  EXPECT_EQ(layer.kept(), (Entries{0, 3, 4, 5}));
}

// Test B.3: rows of shares are made by keys that are unit vectors and queries of logarithms.
TEST(ScoredCache, HeavyHitters) {
  ScorePolicy policy = ScorePolicy::h2o(2, 2);
  Layer layer(8, 1, 1, policy);
  const auto token = [&](const std::vector<std::pair<std::int64_t, double>>& shares) {
    Row query(8, 0);
    for (const auto& [key, share] : shares)
      query[static_cast<std::size_t>(key)] = static_cast<float>(std::log(share));
    Row key(8, 0);
    key[static_cast<std::size_t>(layer.cache.total())] = 1;
    layer.commit(query, key, {0});
  };
  const auto expect_scores = [&](const std::vector<double>& expected) {
    const std::span<const double> scores = layer.cache.scores(0, 0);
    ASSERT_EQ(scores.size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(scores[i], expected[i], 2e-6);
  };
  token({{0, 1}});
  token({{0, .6}, {1, .4}});
  token({{0, .2}, {1, .5}, {2, .3}});
  token({{0, .4}, {1, .1}, {2, .1}, {3, .4}});
  expect_scores({2.2, 1.0, .4, .4});
  token({{0, .3}, {1, .1}, {2, .2}, {3, .2}, {4, .2}});
  EXPECT_EQ(layer.kept(), (Entries{0, 1, 3, 4}));
  expect_scores({2.5, 1.1, .6, .2});
  token({{0, .1}, {1, .5}, {3, .1}, {4, .1}, {5, .2}});
  EXPECT_EQ(layer.kept(), (Entries{0, 1, 4, 5}));
  expect_scores({2.6, 1.6, .3, .2});
  token({{0, .1}, {1, .1}, {4, .1}, {5, .5}, {6, .2}});
  EXPECT_EQ(layer.kept(), (Entries{0, 1, 5, 6}));
  expect_scores({2.7, 1.7, .7, .2});
}

// Test B.4, without its prototypes: two proxies choose among four keys.
TEST(ScoredCache, ProxyQueries) {
  ScorePolicy policy = ScorePolicy::stream_mem(0, 2, 6, 2, 2);
  Layer layer(2, 1, static_cast<float>(1 / std::sqrt(2)), policy);
  for (const Row& key : {Row{1, 0}, {0, 2}, {1, 1}, {-1, 0}}) layer.commit({0, 0}, key, {0});
  EXPECT_THROW(layer.cache.compact(), Error);
  layer.token({1, 0}, {5, 5}, {0});
  layer.token({0, 1}, {5, 5}, {0});
  layer.cache.compact();
  EXPECT_EQ(layer.kept(), (Entries{1, 2}));
  EXPECT_EQ(layer.cache.total(), 4);
  // Nothing of the proxies is left: the next token has their index.
  layer.token({0, 0}, {0, 0}, {0});
  EXPECT_EQ(layer.kept(), (Entries{1, 2, 4}));
}

/// What is observed of tokens that are taken back leaves no trace.
TEST(ScoredCache, RollBackRestoresScores) {
  struct Left {
    std::vector<double> scores;
    Entries kept;
    bool operator==(const Left&) const = default;
  };
  const auto stream = [](bool disturbed) {
    ScorePolicy policy = ScorePolicy::h2o(3, 2);
    policy.growth = policy.max_chunk = 4;
    Layer layer(4, 1, 1, policy);
    for (int t = 0; t < 30; ++t) {
      const auto x = static_cast<float>(t);
      if (disturbed && t % 3 == 0) {
        for (int i = 0; i < 1 + t % 4; ++i) layer.token({9, 1, x, 2}, {1, -x, 3, 1}, {1});
        layer.cache.rollback();
      }
      layer.commit({std::sin(x), std::cos(x), 1, 0}, {std::sin(x * x), 1, std::cos(3 * x), 1}, {x});
    }
    const std::span<const double> scores = layer.cache.scores(0, 0);
    return Left{{scores.begin(), scores.end()}, layer.kept()};
  };
  const Left left = stream(false);
  EXPECT_GE(left.kept.size(), 5U);
  EXPECT_LE(left.kept.size(), 9U);
  EXPECT_EQ(stream(true), left);
}

TEST(ScoredCache, ShapesThatDoNotFit) {
  const ScorePolicy policy = ScorePolicy::h2o(2, 2);
  const std::array<const Rotary*, 2> rotaries{nullptr, nullptr};
  const auto make = [&](const KvShape& shape, std::int64_t heads, std::span<const float> directions,
                        const ScorePolicy& chosen) {
    ScoredKvCache<float>(shape, heads, 1, chosen, rotaries, directions);
  };
  EXPECT_NO_THROW(make({2, 2, 8, 8}, 4, {}, policy));
  EXPECT_THROW(make({2, 2, 8, 8}, 5, {}, policy), Error);
  EXPECT_THROW(make({3, 2, 8, 8}, 4, {}, policy), Error);
  EXPECT_THROW(make({2, 0, 8, 8}, 4, {}, policy), Error);
  EXPECT_THROW(make({2, 2, 0, 8}, 4, {}, policy), Error);
  EXPECT_THROW(make({2, 2, 8, 8}, 4, std::vector<float>(32), policy), Error);
  EXPECT_THROW(make({2, 2, 8, 8}, 4, {}, ScorePolicy::q_filters(4, 2, 2, 1)), Error);
  EXPECT_NO_THROW(
      make({2, 2, 8, 8}, 4, std::vector<float>(32), ScorePolicy::q_filters(4, 2, 2, 1)));
}

}  // namespace
