// SPDX-License-Identifier: MIT
// The typed-in examples of scored retention, through a cache of one layer and attend().
#include "sluice/attention/scored_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/position/rotary.hpp"
#include "support/naive_attention.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;

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

// Test B.4: two proxies choose among the four keys of a frame, and weigh its prototype.
TEST(ScoredCache, ProxyQueriesAndPrototypes) {
  ScorePolicy policy = ScorePolicy::stream_mem(0, 3, 6, 2, 2);
  policy.frame_size = 4;
  Layer layer(2, 1, static_cast<float>(1 / std::sqrt(2)), policy);
  const Row keys[] = {{1, 0}, {0, 2}, {1, 1}, {-1, 0}};
  const double scores[] = {0.4883, 0.6854, 0.6146, 0.2117};
  double value = 0;
  double sum = 0;
  for (std::size_t t = 0; t < 4; ++t) {
    layer.commit({0, 0}, keys[t], {static_cast<float>(t + 1)});
    value += scores[t] * static_cast<double>(t + 1);
    sum += scores[t];
  }
  layer.token({1, 0}, {5, 5}, {0});
  layer.token({0, 1}, {5, 5}, {0});
  layer.cache.compact();
  // The prototype has the index of the frame's middle and lies behind the token of that index.
  EXPECT_EQ(layer.kept(), (Entries{1, 1, 2}));
  const std::span<const std::int32_t> folded = layer.cache.folded(0, 0);
  EXPECT_EQ(std::vector<std::int32_t>(folded.begin(), folded.end()),
            (std::vector<std::int32_t>{1, 4, 1}));
  std::array<Segment<float>, 1> segments;
  ASSERT_EQ(layer.cache.segments(0, 0, segments), 1);
  EXPECT_NEAR(segments[0].key(0, 1)[0], 0.4456, 1e-4);
  EXPECT_NEAR(segments[0].key(0, 1)[1], 0.9927, 1e-4);
  EXPECT_NEAR(static_cast<double>(segments[0].value(0, 1)[0]), value / sum, 2e-4);
  EXPECT_EQ(segments[0].value(0, 0)[0], 2.0F);
  EXPECT_EQ(segments[0].value(0, 2)[0], 3.0F);
}

/// Keys that were rotated at their places are averaged as if they were raw, and the mean stands at
/// the frame's middle: to a reader it is one key at that distance.
TEST(ScoredCache, PrototypesStandAtTheMiddleOfTheirFrames) {
  const test::NaiveRotation rotation(4, 100, false);
  for (const PositionRule rule : {PositionRule::kInText, PositionRule::kInCache}) {
    ScorePolicy policy = ScorePolicy::stream_mem(1, 8, 24, 2, 2);
    policy.frame_size = 5;
    policy.position_rule = rule;
    Layer layer(4, 2, 0.5F, policy, 100.0);
    Random random(4);
    std::vector<Row> keys, values;
    const auto row = [&](std::size_t count) {
      Row made(count);
      for (float& x : made) x = static_cast<float>(random.normal());
      return made;
    };
    // A sink, text that stays, and two frames and a half.
    layer.cache.set_kind(TokenKind::kText);
    for (int t = 0; t < 16; ++t) {
      if (t == 3) layer.cache.set_kind(TokenKind::kVision);
      keys.push_back(row(4));
      values.push_back(row(2));
      layer.commit(row(4), keys.back(), values.back());
    }
    const Row proxies[] = {row(4), row(4)};
    layer.token(proxies[0], row(4), row(2));
    layer.token(proxies[1], row(4), row(2));
    // What the proxies say, in double: their attention is over what may leave.
    std::vector<double> votes(16);
    for (std::size_t p = 0; p < 2; ++p) {
      std::vector<double> weights(16);
      double sum = 0;
      for (std::size_t j = 1; j < 16; ++j) {
        const std::vector<double> q(proxies[p].begin(), proxies[p].end());
        const std::vector<double> k(keys[j].begin(), keys[j].end());
        weights[j] = std::exp(0.5 * rotation.score(static_cast<double>(16 + p - j), q, k));
        sum += weights[j];
      }
      for (std::size_t j = 1; j < 16; ++j) votes[j] += weights[j] / sum;
    }
    layer.cache.compact();
    EXPECT_EQ(layer.kept().size(), 8U);
    const std::span<const std::int32_t> folded = layer.cache.folded(0, 0);
    std::vector<std::size_t> prototypes;
    for (std::size_t i = 0; i < folded.size(); ++i)
      if (folded[i] == 5) prototypes.push_back(i);
    // Text is folded no more than vision is: runs of one kind count, three and thirteen tokens.
    ASSERT_EQ(prototypes.size(), 2U);
    std::array<Segment<float>, 1> segments;
    ASSERT_EQ(layer.cache.segments(0, 0, segments), 1);
    for (std::size_t f = 0; f < 2; ++f) {
      const std::size_t first = 3 + 5 * f;
      EXPECT_EQ(layer.kept()[prototypes[f]], static_cast<std::int64_t>(first + 2));
      double sum = 0;
      for (std::size_t j = first; j < first + 5; ++j) sum += votes[j];
      std::vector<double> key(4), value(2);
      for (std::size_t j = first; j < first + 5; ++j) {
        for (std::size_t d = 0; d < 4; ++d)
          key[d] += votes[j] / sum * static_cast<double>(keys[j][d]);
        for (std::size_t d = 0; d < 2; ++d)
          value[d] += votes[j] / sum * static_cast<double>(values[j][d]);
      }
      // In the text the key is stored rotated, at ranks raw.
      if (rule == PositionRule::kInText) key = rotation.rotate(static_cast<double>(first + 2), key);
      const auto at = static_cast<std::int64_t>(prototypes[f]);
      for (std::size_t d = 0; d < 4; ++d)
        EXPECT_NEAR(static_cast<double>(segments[0].key(0, at)[d]), key[d], 2e-5);
      for (std::size_t d = 0; d < 2; ++d)
        EXPECT_NEAR(static_cast<double>(segments[0].value(0, at)[d]), value[d], 2e-6);
    }
  }
}

/// Tokens of protected kinds stay, and budgets hold even where they do not fit.
TEST(ScoredCache, KindsThatMayNotLeave) {
  ScorePolicy policy = ScorePolicy::h2o(6, 2);
  policy.may_leave[static_cast<std::size_t>(TokenKind::kText)] = false;
  Layer layer(4, 1, 1, policy);
  Random random(8);
  Entries text;
  for (int t = 0; t < 200; ++t) {
    const bool is_text = t % 37 == 5;
    layer.cache.set_kind(is_text ? TokenKind::kText : TokenKind::kVision);
    if (is_text) text.push_back(t);
    Row q(4), k(4);
    for (float& x : q) x = static_cast<float>(random.normal());
    for (float& x : k) x = static_cast<float>(random.normal());
    layer.commit(q, k, {0});
    const Entries kept = layer.kept();
    ASSERT_LE(kept.size(), 9U);
    for (const std::int64_t token : text)
      ASSERT_TRUE(std::binary_search(kept.begin(), kept.end(), token)) << token;
    const std::span<const TokenKind> kinds = layer.cache.kinds(0, 0);
    for (std::size_t i = 0; i < kept.size(); ++i)
      ASSERT_EQ(kinds[i] == TokenKind::kText, kept[i] % 37 == 5);
  }
  // More text than the budget holds: the oldest of it stays.
  layer.cache.set_kind(TokenKind::kText);
  for (int t = 0; t < 30; ++t) layer.commit({0, 0, 0, 0}, {1, 0, 0, 0}, {0});
  const Entries kept = layer.kept();
  ASSERT_EQ(kept.size(), 8U);
  for (std::size_t i = 0; i < 6; ++i) EXPECT_EQ(kept[i], text[i]);
  EXPECT_EQ(kept.back(), 229);
}

// Test B.4, without prototypes: two proxies choose among four keys.
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

using Scored = ScoredKvCache<f16>;

std::vector<std::pair<const char*, ScorePolicy>> all_policies() {
  ScorePolicy shared = ScorePolicy::h2o(8, 4, 3);
  shared.floor = 0.25;
  shared.growth = 7;
  ScorePolicy ranks = ScorePolicy::snap_kv(12, 8, 4, 4, ScorePooling::kMax, 3);
  ranks.position_rule = PositionRule::kInCache;
  ScorePolicy largest = ScorePolicy::snap_kv(12, 8, 4, 4);
  largest.group_reduction = GroupReduction::kMax;
  ScorePolicy mean = ScorePolicy::h2o(6, 6, 2);
  mean.query_reduction = QueryReduction::kMean;
  mean.num_sink_tokens = 2;
  mean.budget = 14;
  ScorePolicy kinds = ScorePolicy::q_filters(12, 4, 6, 3);
  kinds.may_leave[static_cast<std::size_t>(TokenKind::kText)] = false;
  ScorePolicy frames = ScorePolicy::stream_mem(1, 12, 15, 4, 3);
  frames.frame_size = 4;
  return {{"SnapKV", ScorePolicy::snap_kv(12, 8, 4, 4)},
          {"SnapKV at ranks", ranks},
          {"SnapKV, largest of the group", largest},
          {"H2O", ScorePolicy::h2o(6, 6, 3)},
          {"H2O, mean", mean},
          {"H2O, shared budgets", shared},
          {"Q-Filters", ScorePolicy::q_filters(12, 6, 6, 3)},
          {"Q-Filters, text stays", kinds},
          {"SirLLM", ScorePolicy::sir_llm(2, 4, 6, 0.9, 3)},
          {"SirLLM as released", ScorePolicy::sir_llm_released(2, 2, 10, 0.9, 3)},
          {"StreamMem", ScorePolicy::stream_mem(2, 12, 10, 4, 4)},
          {"StreamMem with prototypes", frames}};
}

/// Two layers, two KV heads of two query heads; what is fed follows from `random` alone, so that
/// two streams of equal seeds are equal.
struct Stream {
  Rotary rotary{{.head_dim = 16, .rotary_dim = 16, .theta = 100}};
  std::array<const Rotary*, 2> rotaries{&rotary, nullptr};
  std::vector<float> directions;
  Scored cache;
  AttentionWorkspace<cpu> workspace;
  AttentionWorkspace<cpu> plain;
  ThreadTeam team{1};

  explicit Stream(const ScorePolicy& policy)
      : directions(policy.source == ScoreSource::kKeyDirection ? 64 : 0, 0.5F),
        cache({2, 2, 16, 8}, 4, 0.25F, policy, rotaries, directions),
        workspace(&rotary, shape(), 1),
        plain(nullptr, shape(), 1) {}
  Stream(const Stream&) = delete;
  AttentionShape shape() const {
    return {.num_qo_heads = 4,
            .num_kv_heads = 2,
            .head_dim = 16,
            .value_dim = 8,
            .max_queries = cache.max_chunk(),
            .max_keys = cache.max_entries()};
  }

  /// Feeds a chunk, uncommitted; returns what it attended to.
  std::vector<float> feed(Random& random, std::int64_t tokens) {
    cache.set_kind(random.below(3) == 0 ? TokenKind::kText : TokenKind::kVision);
    const std::int64_t first = cache.total();
    const Position position = cache.write_position(first);
    cache.append(tokens);
    RotaryTable table(rotary, tokens);
    table.fill_run(position, tokens);
    std::vector<float> outs;
    for (std::int64_t l = 0; l < 2; ++l) {
      const auto rows = [&](std::int64_t count) {
        std::vector<float> made(static_cast<std::size_t>(tokens * count));
        for (float& x : made) x = static_cast<float>(random.normal());
        return made;
      };
      const std::vector<float> q = rows(64), k = rows(32), v = rows(16);
      cache.store(l, {k.data(), tokens, 2, 16}, {v.data(), tokens, 2, 8}, table.rows(), 0, tokens);
      std::vector<float> out(static_cast<std::size_t>(tokens * 32));
      std::vector<float> lse(static_cast<std::size_t>(tokens * 4));
      for (int part = 0; part < cache.num_classes(l); ++part) {
        std::array<Segment<f16>, 1> segments;
        const auto count = static_cast<std::size_t>(cache.segments(l, tokens, segments, part));
        AttentionQuery query{{q.data(), tokens, 4, 16}, first, position};
        query.kv_heads = cache.head_class(l, part).kv_heads;
        attend(query, std::span<const Segment<f16>>(segments.data(), count),
               AttentionVariant<CausalWindow>{0.25F, CausalWindow{}},
               HeadsView<float>(out.data(), tokens, 4, 8), lse.data(), l == 0 ? workspace : plain,
               team, cpu{});
        if (cache.observes(l))
          cache.observe({l, part, query, {segments.data(), count}, lse.data()});
      }
      outs.insert(outs.end(), out.begin(), out.end());
    }
    if (cache.policy().source == ScoreSource::kGiven) {
      std::vector<float> scores(static_cast<std::size_t>(tokens));
      for (float& x : scores) x = static_cast<float>(random.uniform());
      cache.give_scores(scores);
    }
    return outs;
  }
  /// Proxies choose when the next chunk may not fit.
  void make_room(Random& random) {
    if (cache.policy().source != ScoreSource::kProxyQueries ||
        cache.room() >= 2 * cache.max_chunk())
      return;
    feed(random, 2);
    cache.compact();
  }
  /// One step of a stream; returns what it attended to.
  std::vector<float> step(Random& random) {
    make_room(random);
    std::vector<float> outs = feed(random, between(random, 1, cache.max_chunk()));
    if (random.below(4) == 0)
      cache.rollback();
    else
      cache.commit();
    return outs;
  }
  void expect_sound(const char* name) const {
    const ScorePolicy& policy = cache.policy();
    for (std::int64_t l = 0; l < 2; ++l) {
      std::int64_t entries = 0;
      for (std::int64_t h = 0; h < 2; ++h) {
        const std::span<const std::int64_t> kept = cache.kept(l, h);
        const std::span<const std::int32_t> folded = cache.folded(l, h);
        entries += std::ssize(kept);
        ASSERT_EQ(std::ssize(kept), cache.size_of(l, h)) << name;
        for (std::size_t i = 0; i < kept.size(); ++i) {
          ASSERT_TRUE(kept[i] >= 0 && kept[i] < cache.total()) << name;
          // In order of age; a prototype may have the index of the token before it.
          if (i > 0) {
            ASSERT_TRUE(kept[i] > kept[i - 1] || (kept[i] == kept[i - 1] && folded[i] > 1))
                << name << ", entry " << i;
          }
          ASSERT_TRUE(folded[i] == 1 || folded[i] == policy.frame_size) << name;
        }
        for (std::int64_t i = 0; i < std::min(policy.num_sink_tokens, std::ssize(kept)); ++i)
          if (policy.source != ScoreSource::kKeyDirection) {
            ASSERT_EQ(kept[static_cast<std::size_t>(i)], i) << name;
          }
        for (std::int64_t i = 1; i <= std::min(policy.recent, cache.total()); ++i)
          ASSERT_EQ(kept[kept.size() - static_cast<std::size_t>(i)], cache.total() - i) << name;
        std::array<Segment<f16>, 1> segments;
        const int part = cache.num_classes(l) > 1 ? static_cast<int>(h) : 0;
        ASSERT_EQ(cache.segments(l, 0, segments, part), kept.empty() ? 0 : 1) << name;
        if (!kept.empty()) {
          ASSERT_EQ(segments[0].rule.count, std::ssize(kept)) << name;
          // The newest entry is the newest token, and stands where it does.
          ASSERT_EQ(segments[0].rule.first_index + segments[0].rule.count, cache.total()) << name;
        }
      }
      ASSERT_LE(entries, 2 * policy.capacity()) << name;
    }
  }
};

TEST(ScoredCache, RandomOperationsOfEveryPolicy) {
  for (const auto& [name, policy] : all_policies()) {
    Random random(21);
    Stream stream(policy);
    for (int i = 0; i < 700; ++i) {
      stream.step(random);
      stream.expect_sound(name);
      if (HasFatalFailure()) return;
    }
    EXPECT_GT(stream.cache.selections(), 20) << name;
    EXPECT_GT(stream.cache.evicted(), 200) << name;
    stream.cache.reset();
    EXPECT_EQ(stream.cache.size_of(1, 1), 0);
  }
}

/// Several heads selected at once are what they are one after the other, bit for bit.
TEST(ScoredCache, TheTeamsSizeChangesNothing) {
  for (const auto& [name, policy] : all_policies()) {
    const auto run = [&](int threads) {
      Random random(5);
      Stream stream(policy);
      ThreadTeam team(threads);
      std::vector<float> outs;
      for (int i = 0; i < 60; ++i) {
        stream.make_room(random);
        const std::vector<float> more = stream.feed(random, stream.cache.max_chunk());
        outs.insert(outs.end(), more.begin(), more.end());
        stream.cache.commit(team);
      }
      return outs;
    };
    EXPECT_EQ(run(1), run(3)) << name;
  }
}

/// A stream that was captured, copied or saved goes on bit for bit.
TEST(ScoredCache, GoesBackIsCopiedAndRestored) {
  for (const auto& [name, policy] : all_policies()) {
    Random random(31);
    Stream stream(policy);
    for (int i = 0; i < 50; ++i) stream.step(random);
    stream.cache.rollback();
    Scored::Checkpoint checkpoint = stream.cache.make_checkpoint();
    stream.cache.capture(checkpoint);
    ByteWriter writer;
    stream.cache.save(writer);
    Stream copy(policy);
    copy.cache.copy_from(stream.cache);
    Stream restored(policy);
    ByteReader reader(writer.bytes(), "memory");
    restored.cache.restore(reader);
    EXPECT_EQ(reader.remaining(), 0U) << name;
    const auto next = [](Stream& on) {
      Random same(99);
      std::vector<float> outs;
      for (int i = 0; i < 40; ++i) {
        const std::vector<float> more = on.step(same);
        outs.insert(outs.end(), more.begin(), more.end());
      }
      return outs;
    };
    const std::vector<float> expected = next(stream);
    EXPECT_EQ(next(copy), expected) << name;
    EXPECT_EQ(next(restored), expected) << name;
    stream.cache.revert(checkpoint);
    EXPECT_EQ(next(stream), expected) << name;
    // Another policy, and every truncation, is an error; the cache is empty then.
    ScorePolicy other = policy;
    other.budget += 1;
    Stream stranger(other);
    ByteReader foreign(writer.bytes(), "memory");
    EXPECT_THROW(stranger.cache.restore(foreign), Error) << name;
    for (std::size_t size = 0; size < writer.bytes().size(); size += 97) {
      ByteReader cut(writer.bytes().first(size), "memory");
      EXPECT_THROW(restored.cache.restore(cut), Error) << name << ", " << size;
      EXPECT_EQ(restored.cache.total(), 0) << name;
    }
  }
}

/// No damage breaks an invariant: an error, or a cache that goes on.
TEST(ScoredCache, RandomDamage) {
  const std::vector<std::pair<const char*, ScorePolicy>> policies = all_policies();
  for (const std::size_t which : {0U, 5U, 11U}) {
    const ScorePolicy& policy = policies[which].second;
    Random random(41);
    Stream stream(policy);
    for (int i = 0; i < 40; ++i) stream.step(random);
    stream.cache.rollback();
    ByteWriter writer;
    stream.cache.save(writer);
    for (int i = 0; i < 400; ++i) {
      std::vector<std::byte> bytes(writer.bytes().begin(), writer.bytes().end());
      const auto at = static_cast<std::size_t>(random.below(i % 2 == 0 ? 600 : bytes.size()));
      bytes[at] ^= static_cast<std::byte>(1 + random.below(255));
      ByteReader reader(bytes, "memory");
      Stream damaged(policy);
      try {
        damaged.cache.restore(reader);
      } catch (const Error&) {
        EXPECT_EQ(damaged.cache.total(), 0);
        continue;
      }
      Random same(3);
      if (damaged.cache.total() < std::int64_t{1} << 50) damaged.step(same);
    }
  }
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

}  // namespace SLUICE_TEST_UNIT
