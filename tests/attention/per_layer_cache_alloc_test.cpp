// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/attention/key_clusters.hpp"
#include "sluice/attention/kivi_cache.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/cache/shard_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr std::int64_t kLayers = 3;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 16;

/// One layer's protocol, attention left out: log-sum-exps are made up.
template <class Cache>
void feed(Cache& cache, std::span<const float> rows, std::span<const float> lse, RotaryTable& table,
          std::int64_t tokens) {
  const std::int64_t first = cache.total();
  cache.append(tokens);
  table.fill_run(cache.write_position(first), tokens);
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    if constexpr (requires { cache.begin_layer(layer); }) cache.begin_layer(layer);
    cache.store(layer, {rows.data(), tokens, kHeads, kDim}, {rows.data(), tokens, kHeads, kDim},
                table.rows(), 0, tokens);
    const AttentionQuery query{
        {rows.data(), tokens, 2 * kHeads, kDim}, first, cache.write_position(first)};
    if constexpr (requires { cache.select(layer, query); }) cache.select(layer, query);
    for (int part = 0; part < cache.num_classes(layer); ++part) {
      std::array<typename Cache::SegmentType, Cache::kMaxSegments> segments;
      const auto count = static_cast<std::size_t>(cache.segments(layer, tokens, segments, part));
      if constexpr (requires { cache.observes(layer); })
        if (cache.observes(layer))
          cache.observe({layer, part, query, {segments.data(), count}, lse.data()});
    }
  }
}

struct Material {
  Rotary rotary{{.head_dim = kDim, .rotary_dim = kDim}};
  std::array<const Rotary*, kLayers> rotaries{&rotary, &rotary, nullptr};
  RotaryTable table{rotary, 32};
  std::vector<float> rows = std::vector<float>(32 * 2 * kHeads * kDim);
  std::vector<float> lse = std::vector<float>(32 * 2 * kHeads, 4);

  Material() {
    Random random(1);
    for (float& x : rows) x = static_cast<float>(random.normal());
  }
};

TEST(PerLayerCacheAllocations, LazyLayers) {
  Material m;
  LazyLayerKvCache<f16> cache({kLayers, kHeads, kDim, kDim}, 2 * kHeads, 0.25F,
                              {.num_full_layers = 1,
                               .num_sink_tokens = 2,
                               .recent_size = 8,
                               .num_queries = 4,
                               .capacity = 200,
                               .max_prompt = 32,
                               .max_chunk = 4},
                              m.rotaries);
  const std::int64_t before = test::allocation_count();
  for (int round = 0; round < 3; ++round) {
    feed(cache, m.rows, m.lse, m.table, 30);
    cache.rollback();
    feed(cache, m.rows, m.lse, m.table, 32);
    cache.commit();
    for (int step = 0; step < 40; ++step) {
      feed(cache, m.rows, m.lse, m.table, 1 + step % 4);
      if (step % 5 == 0)
        cache.rollback();
      else
        cache.commit();
    }
    cache.set_lazy(0);
    cache.set_lazy(1);
    cache.set_lazy(2);
    cache.reset();
  }
  EXPECT_EQ(test::allocation_count(), before);
}

TEST(PerLayerCacheAllocations, LazyLayersWhosePromptComesInChunks) {
  Material m;
  LazyLayerKvCache<f16> cache({kLayers, kHeads, kDim, kDim}, 2 * kHeads, 0.25F,
                              {.num_full_layers = 1,
                               .num_sink_tokens = 2,
                               .recent_size = 8,
                               .num_queries = 6,
                               .capacity = 200,
                               .max_prompt = 64,
                               .max_chunk = 4,
                               .prompt_in_chunks = true},
                              m.rotaries);
  LazyLayerKvCache<f16> copy = cache.sibling();
  LazyLayerKvCache<f16>::Checkpoint checkpoint = cache.make_checkpoint();
  const std::int64_t before = test::allocation_count();
  for (int round = 0; round < 3; ++round) {
    for (int step = 0; step < 60; ++step) {
      if (step % 7 == 0) {  // before the prompt's end and after it, and back over it
        if (step >= 28) cache.revert(checkpoint);
        cache.capture(checkpoint);
        copy.copy_from(cache);
      }
      feed(cache, m.rows, m.lse, m.table, 1 + step % 4);
      if (step % 5 == 0)
        cache.rollback();
      else
        cache.commit();
      if (step == 24 || step == 40) cache.end_prompt();
    }
    cache.reset();
  }
  EXPECT_EQ(test::allocation_count(), before);
}

TEST(PerLayerCacheAllocations, Shards) {
  Material m;
  ShardKvCache<f16> cache(
      {kLayers, kHeads, kDim, kDim},
      {.num_heads = kHeads, .block_size = 8, .local_blocks = 2, .vert_stride = 2}, 400, m.rotaries);
  const std::int64_t before = test::allocation_count();
  for (int step = 0; step < 90; ++step) {
    feed(cache, m.rows, m.lse, m.table, std::min<std::int64_t>(3, cache.room_in_block()));
    if (step % 5 == 0)
      cache.rollback();
    else
      cache.commit();
  }
  EXPECT_EQ(test::allocation_count(), before);
}

TEST(PerLayerCacheAllocations, Kivi) {
  Material m;
  KiviKvCache<2> cache(
      {kLayers, kHeads, kDim, kDim},
      {.group = 16, .residual = 16, .retention = RetentionConfig::sink_window(2, 60, 8)},
      m.rotaries);
  auto checkpoint = cache.make_checkpoint();
  const std::int64_t before = test::allocation_count();
  for (int step = 0; step < 90; ++step) {
    feed(cache, m.rows, m.lse, m.table, 1 + step % 8);
    if (step % 5 == 0)
      cache.rollback();
    else
      cache.commit();
    if (step == 30) cache.capture(checkpoint);
    if (step == 60) cache.revert(checkpoint);
  }
  EXPECT_GT(cache.coded_keys(), 100);
  EXPECT_EQ(test::allocation_count(), before);
}

TEST(PerLayerCacheAllocations, PrototypesTeamsAndCheckpoints) {
  Material m;
  ScorePolicy policy = ScorePolicy::stream_mem(2, 24, 16, 4, 4);
  policy.frame_size = 4;
  ScoredKvCache<f16> cache({kLayers, kHeads, kDim, kDim}, 2 * kHeads, 0.25F, policy, m.rotaries);
  ThreadTeam team(2);
  auto checkpoint = cache.make_checkpoint();
  const std::int64_t before = test::allocation_count();
  for (int step = 0; step < 90; ++step) {
    cache.set_kind(step % 7 == 0 ? TokenKind::kText : TokenKind::kVision);
    feed(cache, m.rows, m.lse, m.table, 4);
    cache.commit(team);
    if (cache.room() < 8) {
      feed(cache, m.rows, m.lse, m.table, 2);
      cache.compact(team);
    }
    if (step == 30) cache.capture(checkpoint);
    if (step == 60) cache.revert(checkpoint);
  }
  EXPECT_GT(cache.selections(), 10);
  EXPECT_EQ(test::allocation_count(), before);
}

TEST(PerLayerCacheAllocations, Clusters) {
  Material m;
  KeyClusters clusters(kDim, 20, 500);
  std::vector<float> scores(20);
  std::vector<std::int64_t> order(20);
  const std::int64_t before = test::allocation_count();
  for (std::int64_t i = 0; i < 100; ++i) clusters.add(m.rows.data() + i % 60 * kDim);
  clusters.score(m.rows.data(), 0.25F, scores);
  pick_clusters(std::span(scores).first(static_cast<std::size_t>(clusters.size())),
                clusters.counts(), 0.8, order);
  EXPECT_EQ(test::allocation_count(), before);
}

}  // namespace SLUICE_TEST_UNIT
