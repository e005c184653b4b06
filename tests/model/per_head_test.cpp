// SPDX-License-Identifier: MIT
// KV heads of one layer that keep different tokens: every row's logits are those of a plain decoder
// in double that is told, head by head, who sees whom.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sluice/cache/head_map.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/session.hpp"
#include "support/naive_decoder.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::Geometry;
using test::kVocab;
using test::NaiveDecoder;
using test::random_tokens;
using test::small_decoder;

// As in group_streaming_test.cpp: the same model and sums; one key more or less, or one position
// off, changes a logit by 1e-2 and more.
constexpr double kTolerance = 1.5e-4;

/// Logits of every row of a stream that is read in the given chunks.
std::vector<std::vector<float>> stream(const Decoder& model, const CacheOptions& options,
                                       const std::vector<Token>& tokens,
                                       const std::vector<std::int64_t>& chunks) {
  KvCache<float> cache = model.make_cache<float>(plan_cache(model.config(), options));
  ThreadTeam team(1);
  DecoderWorkspace workspace(model, cache.max_chunk(), cache.max_entries(), 1);
  std::vector<std::vector<float>> logits;
  std::size_t first = 0;
  for (const std::int64_t chunk : chunks) {
    model.forward({tokens.data() + first, static_cast<std::size_t>(chunk)}, cache, workspace, team);
    std::vector<float> rows(static_cast<std::size_t>(chunk * kVocab));
    model.logits(0, {rows.data(), chunk, kVocab}, workspace, team);
    for (std::int64_t r = 0; r < chunk; ++r)
      logits.emplace_back(rows.begin() + r * kVocab, rows.begin() + (r + 1) * kVocab);
    cache.commit();
    first += static_cast<std::size_t>(chunk);
  }
  return logits;
}

double largest_difference(const std::vector<std::vector<float>>& got,
                          const NaiveDecoder::Rows& expected) {
  double worst = 0;
  EXPECT_EQ(got.size(), expected.size());
  for (std::size_t t = 0; t < got.size(); ++t)
    for (std::size_t i = 0; i < got[t].size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(got[t][i]) - expected[t][i]));
  return worst;
}

std::vector<std::int64_t> random_chunks(Random& random, std::int64_t tokens, std::int64_t most) {
  std::vector<std::int64_t> chunks;
  for (std::int64_t left = tokens; left > 0; left -= chunks.back())
    chunks.push_back(std::min(left, between(random, 1, most)));
  return chunks;
}

/// A map of full heads, one window and another.
HeadMap random_map(Random& random, std::int64_t layers, std::int64_t heads, Eviction eviction) {
  std::vector<HeadRetention> retentions;
  for (std::int64_t i = 0; i < layers * heads; ++i) switch (random.below(3)) {
      case 0: retentions.push_back(HeadRetention::full()); break;
      case 1: retentions.push_back({2, 7}); break;
      default: retentions.push_back({0, 5}); break;
    }
  return HeadMap(layers, heads, std::move(retentions), eviction);
}

TEST(PerHead, WindowsPerQueryInAnyChunking) {
  double worst = 0;
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    Random random(seed);
    const Geometry geometry{.num_layers = 3,
                            .num_qo_heads = seed % 2 == 0 ? 4 : 6,
                            .num_kv_heads = seed % 2 == 0 ? 4 : 3};
    const auto model = small_decoder(geometry, seed);
    CacheOptions options{.policy = CachePolicy::kPerHead, .capacity = 64};
    options.heads =
        random_map(random, geometry.num_layers, geometry.num_kv_heads, Eviction::kPerQuery);
    options.position_rule = seed % 3 == 0 ? PositionRule::kInCache : PositionRule::kInText;
    options.key_form = seed % 4 < 2 ? KeyForm::kRotated : KeyForm::kRaw;
    const std::vector<Token> tokens = random_tokens(random, 40);
    const auto got = stream(*model, options, tokens, random_chunks(random, 40, 5));
    const auto expected = NaiveDecoder(*model).run_heads(
        tokens,
        [&](std::size_t layer, std::size_t head, std::size_t query,
            std::size_t key) -> std::optional<double> {
          const auto i = static_cast<std::int64_t>(query);
          const auto j = static_cast<std::int64_t>(key);
          const HeadRetention& kept =
              options.heads.at(static_cast<std::int64_t>(layer), static_cast<std::int64_t>(head));
          if (j > i || (!kept.is_full() && j >= kept.num_sink_tokens && i - j >= kept.window_size))
            return std::nullopt;
          if (options.position_rule == PositionRule::kInText || kept.is_full() ||
              j >= kept.num_sink_tokens)
            return static_cast<double>(i - j);
          // Ranks: a sink is never further away than the sinks and the window reach.
          return static_cast<double>(std::min(i, kept.num_sink_tokens + kept.window_size - 1) - j);
        });
    worst = std::max(worst, largest_difference(got, expected.logits));
  }
  RecordProperty("largest logit difference", std::to_string(worst));
  EXPECT_LT(worst, kTolerance);
}

TEST(PerHead, ChunksAsDuoAttentionReadsThem) {
  double worst = 0;
  for (std::uint64_t seed = 1; seed <= 24; ++seed) {
    Random random(seed);
    const Geometry geometry{.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 4};
    const auto model = small_decoder(geometry, seed);
    CacheOptions options{.policy = CachePolicy::kPerHead, .capacity = 64, .chunk_size = 11};
    options.heads = random_map(random, 2, 4, Eviction::kPerChunk);
    options.key_form = seed % 4 < 2 ? KeyForm::kRotated : KeyForm::kRaw;
    const std::vector<Token> tokens = random_tokens(random, 40);
    // Chunks longer than the windows, too.
    const std::vector<std::int64_t> chunks = random_chunks(random, 40, 11);
    std::vector<std::int64_t> chunk_start;
    for (const std::int64_t chunk : chunks)
      chunk_start.insert(chunk_start.end(), static_cast<std::size_t>(chunk),
                         static_cast<std::int64_t>(chunk_start.size()));
    const auto got = stream(*model, options, tokens, chunks);
    const auto expected = NaiveDecoder(*model).run_heads(
        tokens,
        [&](std::size_t layer, std::size_t head, std::size_t query,
            std::size_t key) -> std::optional<double> {
          const auto j = static_cast<std::int64_t>(key);
          const HeadRetention& kept =
              options.heads.at(static_cast<std::int64_t>(layer), static_cast<std::int64_t>(head));
          if (key > query || (!kept.is_full() && j >= kept.num_sink_tokens &&
                              j < chunk_start[query] - kept.window_size))
            return std::nullopt;
          return static_cast<double>(query) - static_cast<double>(key);
        });
    worst = std::max(worst, largest_difference(got, expected.logits));
  }
  RecordProperty("largest logit difference", std::to_string(worst));
  EXPECT_LT(worst, kTolerance);
}

TEST(PerHead, AMapOfOneKindIsThatPolicy) {
  Random random(3);
  const auto model = small_decoder({.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 2}, 3);
  const std::vector<Token> tokens = random_tokens(random, 50);
  const std::vector<std::int64_t> chunks = random_chunks(random, 50, 6);
  CacheOptions per_head{.policy = CachePolicy::kPerHead, .capacity = 64};
  per_head.heads = HeadMap(2, 2, std::vector<HeadRetention>(4, {2, 9}));
  const CacheOptions plain{
      .policy = CachePolicy::kSinkWindow, .num_sink_tokens = 2, .window_size = 9};
  EXPECT_EQ(stream(*model, per_head, tokens, chunks), stream(*model, plain, tokens, chunks));
  per_head.heads = HeadMap(2, 2, std::vector<HeadRetention>(4));
  EXPECT_EQ(stream(*model, per_head, tokens, chunks),
            stream(*model, {.policy = CachePolicy::kFull, .capacity = 64}, tokens, chunks));
}

/// A session whose heads differ, and its options.
SessionOptions session_options(const Geometry& geometry, std::uint64_t seed) {
  Random random(seed);
  SessionOptions options;
  options.cache = {.policy = CachePolicy::kPerHead, .capacity = 40, .chunk_size = 4};
  options.cache.heads =
      random_map(random, geometry.num_layers, geometry.num_kv_heads, Eviction::kPerQuery);
  return options;
}

TEST(PerHead, ASnapshotGoesOnAndKnowsItsMap) {
  const Geometry geometry{.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 4};
  const std::shared_ptr<const Decoder> model = small_decoder(geometry, 5);
  Random random(5);
  const std::vector<Token> tokens = random_tokens(random, 20);
  KvCache<f16> cache =
      model->make_cache<f16>(plan_cache(model->config(), session_options(geometry, 5).cache));
  ThreadTeam team(1);
  DecoderWorkspace workspace(*model, cache.max_chunk(), cache.max_entries(), 1);
  for (std::size_t t = 0; t < tokens.size(); t += 4) {
    model->forward({tokens.data() + t, 4}, cache, workspace, team);
    cache.commit();
  }
  ByteWriter writer;
  cache.save(writer);
  const auto logits_after = [&](KvCache<f16>& from) {
    model->forward({tokens.data(), 1}, from, workspace, team);
    std::vector<float> logits(static_cast<std::size_t>(kVocab));
    model->logits(0, {logits.data(), 1, kVocab}, workspace, team);
    from.rollback();
    return logits;
  };
  KvCache<f16> again =
      model->make_cache<f16>(plan_cache(model->config(), session_options(geometry, 5).cache));
  ByteReader reader(writer.bytes(), "snapshot");
  again.restore(reader);
  EXPECT_EQ(logits_after(again), logits_after(cache));

  // The same retentions dealt to other heads.
  CacheOptions other = session_options(geometry, 5).cache;
  std::vector<HeadRetention> dealt;
  for (std::int64_t i = 7; i >= 0; --i) dealt.push_back(other.heads.at(i / 4, i % 4));
  other.heads = HeadMap(2, 4, dealt);
  KvCache<f16> stranger = model->make_cache<f16>(plan_cache(model->config(), other));
  ByteReader twice(writer.bytes(), "snapshot");
  EXPECT_THROW(stranger.restore(twice), Error);
  EXPECT_EQ(stranger.total(), 0);
}

TEST(PerHead, FullHeadsEndTheStream) {
  const Geometry geometry{.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 4};
  const std::shared_ptr<const Decoder> model = small_decoder(geometry, 7);
  Random random(7);
  Session<f16> session(model, session_options(geometry, 7));
  ASSERT_GT(session.options().cache.heads.num_full(), 0);
  session.accept(random_tokens(random, 30));
  const std::vector<Token> more = random_tokens(random, 11);
  try {
    session.accept(more);
    ADD_FAILURE() << "41 tokens in a cache of 40";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCapacity);
  }
  EXPECT_EQ(session.position(), 30);
  // The last token written is not fed, so one more than the capacity can be written.
  int written = 0;
  while (session.step()) ++written;
  EXPECT_EQ(written, 11);

  // Without a full head it goes on for ever.
  SessionOptions endless = session_options(geometry, 7);
  endless.cache.heads = HeadMap(2, 4, std::vector<HeadRetention>(8, {2, 7}));
  Session<f16> forever(model, endless);
  forever.accept(more);
  for (int i = 0; i < 200; ++i) ASSERT_TRUE(forever.step());
}

TEST(PerHead, AMapOfAnotherModelIsRefused) {
  const auto model = small_decoder({.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 2}, 1);
  CacheOptions options{.policy = CachePolicy::kPerHead};
  for (const HeadMap& map : {HeadMap(), HeadMap(2, 4, std::vector<HeadRetention>(8)),
                             HeadMap(3, 2, std::vector<HeadRetention>(6))}) {
    options.heads = map;
    try {
      plan_cache(model->config(), options);
      ADD_FAILURE() << "a map of " << map.num_layers() << " layers";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kShape);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
