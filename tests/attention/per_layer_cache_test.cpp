// SPDX-License-Identifier: MIT
// Policies per layer and per head that need caches of their own: LightTransfer's lazy layers, the
// shards of S2-Attention, KIVI's codes; and heads that stay in their order. The specification's
// examples (cache-and-kernel-algorithms.md A.1, A.4, E.6a; core-algorithms.md 6.3), and equality
// with plain definitions on random streams.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "sluice/attention/kivi_cache.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/cache/head_map.hpp"
#include "sluice/cache/kivi_codes.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/shard_cache.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/cache_driver.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::CacheDriver;
using test::Extents;

// ---- LightTransfer ---------------------------------------------------------------------------

// Test A.1: keys are unit vectors, so that a query is its row of scores.
TEST(LazyLayers, RatioOfTheExample) {
  std::array<float, 36> keys{};
  for (std::size_t i = 0; i < 6; ++i) keys[i * 7] = 1;
  const std::array<float, 12> queries{2, 0, 1, 0, 1, 1.5F, 2, 0, 0, 1, 0, 1};
  std::array<float, 2> lse{};
  for (std::size_t t = 0; t < 2; ++t) {
    double sum = 0;
    for (std::size_t j = 0; j <= 4 + t; ++j)
      sum += std::exp(static_cast<double>(queries[t * 6 + j]));
    lse[t] = static_cast<float>(std::log(sum));
  }
  Segment<float> segment;
  segment.keys = keys.data();
  segment.key_token_stride = 6;
  segment.rule.count = segment.rule.visible = 6;
  const auto ratio = [&](std::int64_t first, std::int64_t count, std::int64_t rows) {
    const AttentionQuery query{{queries.data() + first * 6, count, 1, 6}, 4 + first};
    return lazy_ratio(query, segment, 1, nullptr, 1, lse.data() + first, 1, 2, rows);
  };
  EXPECT_NEAR(ratio(0, 1, 1), 0.681748, 1e-6);
  EXPECT_NEAR(ratio(1, 1, 1), 0.701858, 1e-6);
  EXPECT_NEAR(ratio(0, 2, 2), 0.691803, 1e-6);  // 0.842950 where row 4 counts the key after it
  EXPECT_NEAR(ratio(0, 2, 1), 0.701858, 1e-6);
  EXPECT_NEAR(ratio(0, 2, 9), 0.691803, 1e-6);
}

TEST(LazyLayers, QueueOfTheExample) {
  LazyQueue queue(2);
  const double ratios[] = {.3, .9, .6, .7, .2};
  std::vector<std::int64_t> lazy;
  for (std::int64_t layer = 0; layer < 5; ++layer)
    if (const auto out = queue.push(ratios[layer], layer)) lazy.push_back(*out);
  EXPECT_EQ(lazy, (std::vector<std::int64_t>{1, 3, 2}));
  queue.clear();
  lazy.clear();
  for (std::int64_t layer = 0; layer < 4; ++layer)
    if (const auto out = queue.push(1, layer)) lazy.push_back(*out);
  EXPECT_EQ(lazy, (std::vector<std::int64_t>{0, 1}));  // ties: the lower layer
}

/// The ratio by its definition, from what went in.
template <class Driver>
double naive_ratio(const Driver& driver, const Extents& e, const test::NaiveRotation& rotation,
                   std::int64_t layer, std::int64_t prompt, const LazyLayerConfig& c) {
  double sum = 0;
  std::int64_t rows = 0;
  for (std::int64_t t = std::max<std::int64_t>(0, prompt - c.num_queries); t < prompt; ++t)
    for (std::int64_t head = 0; head < e.qo_heads(); ++head, ++rows) {
      double all = 0;
      double chosen = 0;
      for (std::int64_t j = 0; j <= t; ++j) {
        const auto& q = driver.rows(layer)[static_cast<std::size_t>(t)].query;
        const auto& k = driver.rows(layer)[static_cast<std::size_t>(j)].key;
        const auto dim = static_cast<std::size_t>(e.dim);
        const double weight =
            std::exp(driver.scale() * rotation.score(static_cast<double>(t - j),
                                                     {q.data() + head * e.dim, dim},
                                                     {k.data() + head / e.group * e.dim, dim}));
        all += weight;
        if (j < c.num_sink_tokens || j >= prompt - c.recent_size) chosen += weight;
      }
      sum += chosen / all;
    }
  return sum / static_cast<double>(rows);
}

/// A snapshot of any moment of a stream goes on as the stream does; one that is cut short or says
/// what no stream has is refused, and the cache is empty then.
TEST(LazyLayers, Snapshots) {
  const Extents extents{.kv_heads = 2, .group = 2, .dim = 16, .value_dim = 8};
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16, .theta = 100});
  const std::array<const Rotary*, 4> rotaries{&rotary, &rotary, &rotary, &rotary};
  using Cache = LazyLayerKvCache<f16>;
  for (const bool in_chunks : {false, true}) {
    Cache cache({4, 2, 16, 8}, 4, test::scale_for(16),
                {.num_full_layers = 2,
                 .num_sink_tokens = 1,
                 .recent_size = 6,
                 .num_queries = 4,
                 .capacity = 60,
                 .max_prompt = 30,
                 .max_chunk = 3,
                 .prompt_in_chunks = in_chunks},
                rotaries);
    CacheDriver<Cache> driver(cache, extents, 4, &rotary, 5);
    const auto saved = [](const Cache& of) {
      ByteWriter writer;
      of.save(writer);
      return std::vector<std::byte>(writer.bytes().begin(), writer.bytes().end());
    };
    const auto restored = [&](const std::vector<std::byte>& bytes) {
      Cache other = cache.sibling();
      ByteReader reader(bytes, "snapshot");
      other.restore(reader);
      return other;
    };
    for (int moment = 0; moment < 4; ++moment) {
      SCOPED_TRACE(moment);
      if (moment == 1) {
        for (int i = 0; i < (in_chunks ? 6 : 1); ++i, driver.commit())
          driver.feed(in_chunks ? 3 : 18);
      } else if (moment == 2) {
        cache.end_prompt();
      } else if (moment == 3) {
        driver.feed(2);
        driver.commit();
      }
      const std::vector<std::byte> bytes = saved(cache);
      Cache other = restored(bytes);
      EXPECT_EQ(saved(other), bytes);
      Cache forked = cache.sibling();
      forked.copy_from(cache);
      auto checkpoint = other.make_checkpoint();
      other.capture(checkpoint);
      EXPECT_EQ(checkpoint.total(), cache.total());
      // All three go on alike, and back.
      if (moment == 1 && in_chunks) {
        forked.end_prompt();
        other.end_prompt();
        EXPECT_EQ(saved(other), saved(forked));
      }
      if (moment > 0) {
        CacheDriver<Cache> a(forked, extents, 4, &rotary, 6);
        CacheDriver<Cache> b(other, extents, 4, &rotary, 6);
        a.feed(3);
        b.feed(3);
        for (std::int64_t l = 0; l < 4; ++l)
          for (std::size_t t = 0; t < 3; ++t) EXPECT_EQ(a.rows(l)[t].out, b.rows(l)[t].out);
        a.commit();
        b.commit();
        EXPECT_EQ(saved(other), saved(forked));
      }
      other.revert(checkpoint);
      EXPECT_EQ(saved(other), bytes);
      EXPECT_EQ(other.bytes_kept(), cache.bytes_kept());

      for (std::size_t cut = 0; cut < bytes.size(); cut += 1 + bytes.size() / 61) {
        ByteReader reader(std::span<const std::byte>(bytes).first(cut), "snapshot");
        const auto error = test::error_of([&] { other.restore(reader); });
        ASSERT_TRUE(error);
        EXPECT_EQ(error->code(), ErrorCode::kFormat);
        EXPECT_EQ(other.total(), 0);
      }
    }
    // Two layers with one block, a block that is not there, a layer without one, a mark that is
    // none.
    const std::vector<std::byte> bytes = saved(cache);
    std::array<std::int64_t, 4> blocks{};
    for (std::int64_t l = 0; l < 4; ++l) blocks[static_cast<std::size_t>(l)] = cache.is_lazy(l);
    const std::uint64_t four = 4;
    std::size_t at = 0;  // the count in front of the blocks
    for (bool found = false; !found; at += found ? 0 : 1) {
      std::array<std::int64_t, 4> there{};
      ASSERT_LT(at + 8 + sizeof(there), bytes.size());
      std::memcpy(there.data(), bytes.data() + at + 8, sizeof(there));
      found = std::memcmp(bytes.data() + at, &four, 8) == 0;
      for (std::size_t l = 0; l < 4; ++l)
        found = found && there[l] >= -2 && there[l] < 4 && (there[l] == -2) == (blocks[l] == 1);
    }
    std::memcpy(blocks.data(), bytes.data() + at + 8, sizeof(blocks));
    const std::int64_t held = *std::max_element(blocks.begin(), blocks.end());
    for (const std::int64_t wrong : {held, std::int64_t{4}, std::int64_t{-1}, std::int64_t{-3}}) {
      std::vector<std::byte> changed = bytes;
      const auto lazy =
          static_cast<std::size_t>(std::find(blocks.begin(), blocks.end(), -2) - blocks.begin());
      std::memcpy(changed.data() + at + 8 + 8 * lazy, &wrong, 8);
      const auto error = test::error_of([&] { restored(changed); });
      ASSERT_TRUE(error) << wrong;
      EXPECT_EQ(error->code(), ErrorCode::kFormat);
    }
  }
}

TEST(LazyLayers, RandomStreams) {
  const Extents extents{.kv_heads = 2, .group = 2, .dim = 16, .value_dim = 8};
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16, .theta = 100});
  const std::array<const Rotary*, 5> rotaries{&rotary, &rotary, &rotary, &rotary, &rotary};
  const test::NaiveRotation rotation(16, 100, false);
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    Random random(seed);
    const LazyLayerConfig config{.num_full_layers = between(random, 0, 5),
                                 .num_sink_tokens = between(random, 0, 3),
                                 .recent_size = between(random, 3, 9),
                                 .num_queries = between(random, 1, 6),
                                 .capacity = 70,
                                 .max_prompt = 40,
                                 .max_chunk = 3};
    LazyLayerKvCache<float> cache({5, 2, 16, 8}, 4, test::scale_for(16), config, rotaries);
    CacheDriver<LazyLayerKvCache<float>> driver(cache, extents, 5, &rotary, seed);
    const std::int64_t prompt = between(random, 1, 40);
    driver.feed(prompt);
    if (seed % 2 == 0) {  // the prompt is taken back, and another read
      driver.rollback();
      EXPECT_EQ(cache.num_lazy(), 0);
      driver.feed(prompt);
    }
    driver.commit();
    // Which layers are lazy, by the definition.
    std::vector<std::pair<double, std::int64_t>> held;
    std::set<std::int64_t> lazy;
    for (std::int64_t l = 0; l < 5; ++l) {
      const double ratio = naive_ratio(driver, extents, rotation, l, prompt, config);
      EXPECT_NEAR(cache.ratio(l), ratio, 1e-5);
      held.push_back({ratio, -l});
      if (static_cast<std::int64_t>(held.size()) <= config.num_full_layers) continue;
      const auto out = std::max_element(held.begin(), held.end());
      lazy.insert(-out->second);
      held.erase(out);
    }
    if (config.num_full_layers >= 5) lazy.clear();
    // Ratios that are equal in double may differ in float32 where everything is in the sets.
    if (prompt > config.num_sink_tokens + config.recent_size) {
      for (std::int64_t l = 0; l < 5; ++l) EXPECT_EQ(cache.is_lazy(l), lazy.contains(l));
    }
    EXPECT_EQ(cache.num_lazy(), std::max<std::int64_t>(0, 5 - config.num_full_layers));
    std::array<bool, 5> is_lazy{};
    for (std::size_t l = 0; l < 5; ++l) is_lazy[l] = cache.is_lazy(static_cast<std::int64_t>(l));
    for (int step = 0; step < 9; ++step) {
      const std::int64_t tokens = between(random, 1, 3);
      driver.feed(tokens);
      if (random.below(3) == 0)
        driver.rollback();
      else
        driver.commit();
    }
    driver.expect([&](std::int64_t layer, std::int64_t, std::int64_t query,
                      std::int64_t key) -> std::optional<double> {
      const bool cut = query >= prompt && is_lazy[static_cast<std::size_t>(layer)];
      if (cut && key >= config.num_sink_tokens && query - key > config.recent_size)
        return std::nullopt;
      return static_cast<double>(query - key);
    });
    // Memory: so many full layers and one, and a window for each.
    const std::int64_t blocks = std::min<std::int64_t>(config.num_full_layers + 1, 5);
    const std::int64_t window = config.num_sink_tokens + config.recent_size + 1 + 3 - 1;
    EXPECT_EQ(cache.bytes(),
              static_cast<std::size_t>((blocks * 70 + 5 * window) * 2 * (16 + 8) * 4));
    EXPECT_LE(cache.peak_bytes_kept(),
              static_cast<std::size_t>(
                  (blocks * cache.total() + 5 * (config.num_sink_tokens + config.recent_size + 3)) *
                  2 * (16 + 8) * 4));
  }
}

/// A prompt in chunks of any sizes, some of them taken back: the ratios, the choice and all that is
/// attended to are those of the prompt in one chunk.
TEST(LazyLayers, PromptsInChunks) {
  const Extents extents{.kv_heads = 2, .group = 2, .dim = 16, .value_dim = 8};
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16, .theta = 100});
  const std::array<const Rotary*, 5> rotaries{&rotary, &rotary, &rotary, &rotary, &rotary};
  const test::NaiveRotation rotation(16, 100, false);
  using Cache = LazyLayerKvCache<float>;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    Random random(seed);
    LazyLayerConfig config{.num_full_layers = between(random, 0, 5),
                           .num_sink_tokens = between(random, 0, 3),
                           .recent_size = between(random, 5, 9),
                           .num_queries = between(random, 1, 12),
                           .capacity = 70,
                           .max_prompt = 40,
                           .max_chunk = 6};
    // More than a prompt has: all of it.
    if (seed == 8) config.num_queries = std::int64_t{1} << 40;
    const std::int64_t prompt = between(random, 20, 40);
    // What token t of a layer is, whatever chunk it comes in.
    std::array<std::int64_t, 5> next{};
    const auto row_of = [&](std::int64_t layer, auto& row) {
      Random own(seed * 1000003 +
                 static_cast<std::uint64_t>(next[static_cast<std::size_t>(layer)]++ * 5 + layer));
      for (auto* part : {&row.query, &row.key, &row.value})
        for (double& x : *part) x = static_cast<double>(static_cast<float>(own.normal()));
    };
    Cache whole({5, 2, 16, 8}, 4, test::scale_for(16), config, rotaries);
    CacheDriver<Cache> once(whole, extents, 5, &rotary, seed);
    once.feed(prompt, row_of);
    once.commit();

    config.prompt_in_chunks = true;
    Cache cache({5, 2, 16, 8}, 4, test::scale_for(16), config, rotaries);
    CacheDriver<Cache> driver(cache, extents, 5, &rotary, seed);
    EXPECT_THROW(cache.end_prompt(), Error);
    next = {};
    while (cache.total() < prompt) {
      if (random.below(3) == 0) {
        driver.feed(std::min(prompt - cache.total(), between(random, 1, 6)));
        EXPECT_THROW(cache.end_prompt(), Error);
        driver.rollback();
      }
      driver.feed(std::min(prompt - cache.total(), between(random, 1, 6)), row_of);
      driver.commit();
      EXPECT_EQ(cache.num_lazy(), 0);
    }
    EXPECT_TRUE(cache.prompt_open());
    EXPECT_EQ(cache.status(41 - prompt), CacheStatus::kFull);
    EXPECT_THROW(cache.set_lazy(0), Error);
    EXPECT_EQ(cache.num_lazy(), 0);
    cache.end_prompt();
    cache.end_prompt();  // nothing more
    EXPECT_FALSE(cache.prompt_open());
    EXPECT_EQ(cache.num_lazy(), std::max<std::int64_t>(0, 5 - config.num_full_layers));
    std::array<bool, 5> is_lazy{};
    for (std::int64_t l = 0; l < 5; ++l) {
      const double ratio = naive_ratio(driver, extents, rotation, l, prompt, config);
      EXPECT_NEAR(cache.ratio(l), ratio, 1e-5);
      EXPECT_NEAR(cache.ratio(l), whole.ratio(l), 1e-5);
      // With these seeds no two ratios are as close as their rounding.
      EXPECT_EQ(cache.is_lazy(l), whole.is_lazy(l)) << "seed " << seed << ", layer " << l;
      is_lazy[static_cast<std::size_t>(l)] = cache.is_lazy(l);
    }
    for (int step = 0; step < 12; ++step) {
      const std::size_t kept = cache.bytes_kept();
      driver.feed(between(random, 1, 3));
      if (random.below(3) == 0) {
        driver.rollback();
        EXPECT_EQ(cache.bytes_kept(), kept);
      } else {
        driver.commit();
      }
      const std::int64_t in_lazy =
          std::min(cache.total(), config.num_sink_tokens + config.recent_size);
      EXPECT_EQ(cache.bytes_kept(),
                static_cast<std::size_t>(
                    (cache.num_lazy() * in_lazy + (5 - cache.num_lazy()) * cache.total()) * 2 *
                    (16 + 8) * 4));
    }
    EXPECT_GT(cache.total(), prompt);
    driver.expect([&](std::int64_t layer, std::int64_t, std::int64_t query,
                      std::int64_t key) -> std::optional<double> {
      const bool cut = query >= prompt && is_lazy[static_cast<std::size_t>(layer)];
      if (cut && key >= config.num_sink_tokens && query - key > config.recent_size)
        return std::nullopt;
      return static_cast<double>(query - key);
    });
    // Memory: so many full layers, the prompt in the others, and a window for each.
    const std::int64_t full = std::min<std::int64_t>(config.num_full_layers, 5);
    const std::int64_t window = config.num_sink_tokens + config.recent_size + 1 + 6 - 1;
    EXPECT_EQ(cache.bytes(), static_cast<std::size_t>((full * 70 + (5 - full) * 40 + 5 * window) *
                                                      2 * (16 + 8) * 4));
    cache.reset();
    EXPECT_TRUE(cache.prompt_open());
    EXPECT_EQ(cache.num_lazy(), 0);
  }
}

/// A layer is switched by hand, while the stream goes on.
TEST(LazyLayers, SwitchedAtRunTime) {
  const Extents extents{.dim = 16, .value_dim = 16};
  const std::array<const Rotary*, 2> rotaries{nullptr, nullptr};
  const LazyLayerConfig config{.num_full_layers = 2,
                               .num_sink_tokens = 1,
                               .recent_size = 4,
                               .num_queries = 1,
                               .capacity = 50,
                               .max_prompt = 20,
                               .max_chunk = 2};
  LazyLayerKvCache<float> cache({2, 1, 16, 16}, 1, test::scale_for(16), config, rotaries);
  CacheDriver<LazyLayerKvCache<float>> driver(cache, extents, 2, nullptr, 5);
  EXPECT_THROW(cache.set_lazy(0), Error);
  driver.feed(12);
  EXPECT_THROW(cache.set_lazy(0), Error);
  driver.commit();
  EXPECT_EQ(cache.num_lazy(), 0);
  driver.feed(2);
  driver.commit();
  const std::size_t before = cache.bytes_kept();
  cache.set_lazy(1);
  EXPECT_LT(cache.bytes_kept(), before);
  for (int i = 0; i < 6; ++i) {
    driver.feed(1 + i % 2);
    driver.commit();
  }
  driver.expect([](std::int64_t layer, std::int64_t, std::int64_t query,
                   std::int64_t key) -> std::optional<double> {
    if (layer == 1 && query >= 14 && key >= 1 && query - key > 4) return std::nullopt;
    return 0.0;
  });
}

TEST(LazyLayers, RefusesWhatDoesNotFit) {
  const std::array<const Rotary*, 1> rotaries{nullptr};
  const auto make = [&](LazyLayerConfig config) {
    LazyLayerKvCache<float>({1, 1, 4, 4}, 1, 1, config, rotaries);
  };
  const LazyLayerConfig good{
      .num_full_layers = 1, .recent_size = 4, .capacity = 20, .max_prompt = 10};
  EXPECT_NO_THROW(make(good));
  for (const auto& change :
       std::vector<void (*)(LazyLayerConfig&)>{[](LazyLayerConfig& c) { c.num_full_layers = -1; },
                                               [](LazyLayerConfig& c) { c.recent_size = 0; },
                                               [](LazyLayerConfig& c) { c.num_queries = 0; },
                                               [](LazyLayerConfig& c) { c.capacity = 0; },
                                               [](LazyLayerConfig& c) { c.max_prompt = 21; },
                                               [](LazyLayerConfig& c) { c.max_chunk = 11; },
                                               [](LazyLayerConfig& c) {
                                                 c.max_chunk = 6;
                                               }}) {
    LazyLayerConfig config = good;
    change(config);
    EXPECT_THROW(make(config), Error);
  }
}

// ---- S2-Attention ----------------------------------------------------------------------------

// Test A.4.
TEST(Shards, BlocksOfTheExample) {
  const ShardPattern pattern{.num_heads = 4, .local_blocks = 2, .vert_stride = 4};
  const std::vector<std::vector<std::int64_t>> expected{
      {0, 4, 6, 7}, {3, 6, 7}, {2, 6, 7}, {1, 5, 6, 7}};
  for (std::int64_t head = 0; head < 4; ++head) {
    std::vector<std::int64_t> seen;
    for (std::int64_t key = 0; key < 10; ++key)
      if (pattern.sees(head, 7, key)) seen.push_back(key);
    EXPECT_EQ(seen, expected[static_cast<std::size_t>(head)]);
    for (std::int64_t blocks = 0; blocks < 30; ++blocks) {
      std::int64_t count = 0;
      for (std::int64_t key = 0; key < blocks; ++key) count += pattern.keeps(head, key) ? 1 : 0;
      EXPECT_EQ(pattern.kept_before(head, blocks), count);
    }
    EXPECT_NO_THROW(check_cache_efficient(
        20, 2, [&](std::int64_t q, std::int64_t k) { return pattern.sees(head, q, k); }));
  }
  // Strides that count from the query need every block sooner or later.
  EXPECT_THROW(
      check_cache_efficient(
          20, 2, [](std::int64_t q, std::int64_t k) { return q - k < 2 || (q - k) % 4 == 0; }),
      Error);
}

TEST(Shards, RandomStreams) {
  const Extents extents{.kv_heads = 3, .group = 2, .dim = 16, .value_dim = 8};
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16, .theta = 100});
  const std::array<const Rotary*, 2> rotaries{&rotary, &rotary};
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    Random random(seed);
    const ShardPattern pattern{.num_heads = 3,
                               .block_size = between(random, 1, 5),
                               .local_blocks = between(random, 1, 3),
                               .vert_stride = between(random, 1, 5),
                               .offset = between(random, 0, 3),
                               .num_dense_heads = between(random, 0, 1)};
    ShardKvCache<float> cache({2, 3, 16, 8}, pattern, 90, rotaries);
    CacheDriver<ShardKvCache<float>> driver(cache, extents, 2, &rotary, seed);
    while (cache.total() < 90) {
      const std::int64_t most = std::min(cache.room_in_block(), 90 - cache.total());
      EXPECT_EQ(cache.status(cache.room_in_block() + 1), CacheStatus::kFull);
      driver.feed(between(random, 1, most));
      for (std::int64_t h = 0; h < 3; ++h) {
        const std::int64_t block = (cache.total() - 1) / pattern.block_size;
        std::int64_t seen = 0;
        for (std::int64_t key = 0; key < cache.total(); ++key)
          seen += pattern.sees(h, block, key / pattern.block_size) ? 1 : 0;
        EXPECT_EQ(cache.size_of(0, h), seen);
      }
      if (random.below(4) == 0)
        driver.rollback();
      else
        driver.commit();
    }
    driver.expect([&](std::int64_t, std::int64_t head, std::int64_t query,
                      std::int64_t key) -> std::optional<double> {
      if (!pattern.sees(head, query / pattern.block_size, key / pattern.block_size))
        return std::nullopt;
      return static_cast<double>(query - key);
    });
    EXPECT_EQ(cache.status(1), CacheStatus::kFull);
  }
  // Memory: a shard and the local blocks, not everything.
  const ShardPattern pattern{.num_heads = 3, .block_size = 4, .local_blocks = 2, .vert_stride = 3};
  const ShardKvCache<float> cache({2, 3, 16, 8}, pattern, 1200, rotaries);
  EXPECT_EQ(cache.bytes(), static_cast<std::size_t>(2 * 3 * (100 * 4 + 2 * 4) * (16 + 8) * 4));
}

// ---- Heads stay where they are ---------------------------------------------------------------

// core-algorithms.md, test 6.3. DuoAttention permutes weights so that full heads come first; here
// no head moves: the classes name the same heads in the same order, and what an attention writes
// lies where it always did.
TEST(HeadClasses, OfTheReorderingExample) {
  const HeadTable gates{.num_layers = 1, .num_heads = 4, .values = {1, 0, 0, 1}};
  const HeadMap map = duo_attention_map(gates, 0.5, 1, 4);
  std::vector<int> of_head;
  for (std::int64_t h = 0; h < 4; ++h) of_head.push_back(map.at(0, h).is_full() ? 0 : 1);
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16, .theta = 100});
  const std::array<LayerCacheConfig, 1> split{
      LayerCacheConfig{.retention = 0, .rotary = &rotary, .retention_of_head = of_head}};
  const std::array<LayerCacheConfig, 1> whole{LayerCacheConfig{.retention = 0, .rotary = &rotary}};
  // Treated as full: what the second class keeps holds everything.
  const std::array<RetentionConfig, 2> kept{RetentionConfig::full(40, 8),
                                            RetentionConfig::window(40, 8)};
  KvCache<float> classes({1, 4, 16, 8}, kept, split);
  KvCache<float> one({1, 4, 16, 8}, std::span(kept).first(1), whole);
  std::vector<std::int64_t> kv_order;
  std::vector<std::int64_t> query_order;
  std::vector<std::size_t> splits;
  for (int part = 0; part < classes.num_classes(0); ++part) {
    for (const std::int32_t head : classes.head_class(0, part).kv_heads) {
      kv_order.push_back(head);
      for (std::int64_t g = 0; g < 2; ++g) query_order.push_back(2 * head + g);
    }
    splits.push_back(query_order.size());
  }
  EXPECT_EQ(kv_order, (std::vector<std::int64_t>{0, 3, 1, 2}));
  EXPECT_EQ(query_order, (std::vector<std::int64_t>{0, 1, 6, 7, 2, 3, 4, 5}));
  EXPECT_EQ(splits, (std::vector<std::size_t>{4, 8}));

  const Extents extents{.kv_heads = 4, .group = 2, .dim = 16, .value_dim = 8};
  CacheDriver<KvCache<float>> by_class(classes, extents, 1, &rotary, 3);
  CacheDriver<KvCache<float>> at_once(one, extents, 1, &rotary, 3);
  for (int step = 0; step < 10; ++step) {
    by_class.feed(1 + step % 4);
    at_once.feed(1 + step % 4);
    by_class.commit();
    at_once.commit();
  }
  for (std::size_t t = 0; t < by_class.rows(0).size(); ++t)
    EXPECT_EQ(by_class.rows(0)[t].out, at_once.rows(0)[t].out);
}

// ---- KIVI ------------------------------------------------------------------------------------

// Test E.6a: two bits, groups of 16 tokens.
TEST(Kivi, WordsOfTheExample) {
  std::array<float, 32> keys{};  // [16 tokens, 2 channels]
  const float first[] = {0, .5F, 1.5F, 3};
  const float second[] = {-1, -1, 0, 2};
  for (std::size_t t = 0; t < 4; ++t) {
    keys[2 * t] = first[t];
    keys[2 * t + 1] = second[t];
  }
  std::uint32_t word = 0;
  GroupScale scale = KiviCodes<2>::quantise(keys.data(), 16, 2, &word);
  EXPECT_EQ(word, 0x000000E0U);
  EXPECT_EQ(static_cast<float>(scale.scale), 1.0F);
  EXPECT_EQ(static_cast<float>(scale.zero), 0.0F);
  scale = KiviCodes<2>::quantise(keys.data() + 1, 16, 2, &word);
  EXPECT_EQ(word, 0x555555D0U);
  EXPECT_EQ(static_cast<float>(scale.zero), -1.0F);
  EXPECT_EQ(KiviCodes<2>::dequantise(KiviCodes<2>::code(&word, 3), scale), 2.0F);
  // A group of equal numbers: scale 1, nothing is NaN.
  const std::array<float, 16> equal{.25F, .25F, .25F, .25F, .25F, .25F, .25F, .25F,
                                    .25F, .25F, .25F, .25F, .25F, .25F, .25F, .25F};
  scale = KiviCodes<2>::quantise(equal.data(), 16, 1, &word);
  EXPECT_EQ(static_cast<float>(scale.scale), 1.0F);
  EXPECT_EQ(KiviCodes<2>::dequantise(KiviCodes<2>::code(&word, 7), scale), 0.25F);
}

template <int kBits>
void expect_error_bound(std::uint64_t seed) {
  using Codes = KiviCodes<kBits>;
  Random random(seed);
  for (int round = 0; round < 3000; ++round) {
    std::array<float, 32> x;
    const double size = std::pow(10, 8 * random.uniform() - 5);  // 1e-5 to 1e3
    const double shift = random.below(2) == 0 ? 0 : 10 * size * random.normal();
    double low = 1e30;
    for (float& value : x) {
      value = static_cast<float>(shift + size * random.normal());
      low = std::min(low, static_cast<double>(value));
    }
    std::array<std::uint32_t, 32 / Codes::kPerWord> words;
    const GroupScale scale = Codes::quantise(x.data(), 32, 1, words.data());
    const auto step = static_cast<double>(static_cast<float>(scale.scale));
    const auto zero = static_cast<double>(static_cast<float>(scale.zero));
    const double bound = step * (0.5 + 0x1p-11 * Codes::kMost) + 0x1p-11 * std::abs(low) + 0x1p-21;
    for (std::int64_t i = 0; i < 32; ++i) {
      const double exact = Codes::code(words.data(), i) * step + zero;
      ASSERT_LE(std::abs(exact - static_cast<double>(x[static_cast<std::size_t>(i)])), bound)
          << kBits << " bits, round " << round;
    }
  }
}

TEST(Kivi, KeepsItsErrorBound) {
  expect_error_bound<2>(1);
  expect_error_bound<4>(2);
  std::array<float, 16> bad{};
  bad[3] = std::numeric_limits<float>::infinity();
  std::uint32_t word = 1;
  const GroupScale scale = KiviCodes<2>::quantise(bad.data(), 16, 1, &word);
  EXPECT_TRUE(std::isnan(KiviCodes<2>::dequantise(KiviCodes<2>::code(&word, 0), scale)));
}

/// A group in plain code: what each of its numbers becomes.
std::vector<double> naive_group(const std::vector<double>& x, int bits) {
  const double low = *std::min_element(x.begin(), x.end());
  const double high = *std::max_element(x.begin(), x.end());
  const int most = (1 << bits) - 1;
  const auto half = [](double value) {
    return static_cast<double>(static_cast<float>(f16(static_cast<float>(value))));
  };
  const double scale = high > low ? half((high - low) / most) : 1;
  std::vector<double> result;
  for (const double value : x)
    result.push_back(
        std::clamp(std::nearbyint((value - half(low)) / scale), 0.0, static_cast<double>(most)) *
            scale +
        half(low));
  return result;
}

template <int kBits, class Tail = float>
void expect_kivi_streams(
    const RetentionConfig& retention, std::int64_t length, std::uint64_t seed,
    const Extents& extents = {.kv_heads = 2, .group = 2, .dim = 16, .value_dim = 32},
    std::int64_t group = 16) {
  const std::array<const Rotary*, 2> rotaries{nullptr, nullptr};
  const KiviConfig config{.group = group, .residual = 2 * group, .retention = retention};
  KiviKvCache<kBits, Tail> cache({2, extents.kv_heads, extents.dim, extents.value_dim}, config,
                                 rotaries);
  CacheDriver<KiviKvCache<kBits, Tail>> driver(cache, extents, 2, nullptr, seed);
  Random random(seed);
  std::vector<std::int64_t> chunk_begin;  // of each token's chunk: what was committed before it
  while (cache.total() < length) {
    const std::int64_t begin = cache.total();
    const std::int64_t tokens = std::min(length - begin, between(random, 1, retention.max_chunk));
    driver.feed(tokens);
    if (random.below(4) == 0) {
      driver.rollback();
      continue;
    }
    driver.commit();
    for (std::int64_t t = 0; t < tokens; ++t) chunk_begin.push_back(begin);
  }
  const std::int64_t sinks = retention.num_sink_tokens;
  // By layer, head and token: a query finds a row as it was or coded, but always coded alike.
  std::map<std::array<std::int64_t, 3>, std::vector<double>> coded_keys;
  std::map<std::array<std::int64_t, 3>, std::vector<double>> coded_values;
  driver.expect(
      [&](std::int64_t, std::int64_t, std::int64_t query,
          std::int64_t key) -> std::optional<double> {
        if (key >= sinks && query - key >= retention.window_size) return std::nullopt;
        return 0.0;
      },
      // A number on the edge between two codes may fall to the other side in float32: such a key
      // would be off by a step. With these seeds none does.
      0, 0,
      [&](std::int64_t layer, std::int64_t head, std::int64_t query, std::int64_t key) {
        const auto& rows = driver.rows(layer);
        const auto dim = static_cast<std::size_t>(extents.dim);
        const auto value_dim = static_cast<std::size_t>(extents.value_dim);
        const auto at = [&](std::int64_t token) -> const auto& {
          return rows[static_cast<std::size_t>(token)];
        };
        std::vector<double> k(at(key).key.begin() + head * extents.dim,
                              at(key).key.begin() + (head + 1) * extents.dim);
        std::vector<double> v(at(key).value.begin() + head * extents.value_dim,
                              at(key).value.begin() + (head + 1) * extents.value_dim);
        const std::int64_t past =
            std::max<std::int64_t>(0, chunk_begin[static_cast<std::size_t>(query)] - sinks);
        const std::int64_t token = key - sinks;
        if (token >= 0 && token < past / config.residual * config.residual) {
          const auto [coded, is_new] = coded_keys.try_emplace({layer, head, key}, k);
          for (std::size_t d = 0; d < dim && is_new; ++d) {
            std::vector<double> channel;
            const std::int64_t first = sinks + token / config.group * config.group;
            for (std::int64_t t = first; t < first + config.group; ++t)
              channel.push_back(at(t).key[static_cast<std::size_t>(head) * dim + d]);
            coded->second[d] =
                naive_group(channel, kBits)[static_cast<std::size_t>(token % config.group)];
          }
          k = coded->second;
        }
        if (token >= 0 && token < past - config.residual) {
          const auto [coded, is_new] = coded_values.try_emplace({layer, head, key}, v);
          for (std::size_t d = 0; d < value_dim && is_new;
               d += static_cast<std::size_t>(config.group)) {
            const auto begin = static_cast<std::ptrdiff_t>(d);
            const std::vector<double> part =
                naive_group({v.begin() + begin, v.begin() + begin + config.group}, kBits);
            std::copy(part.begin(), part.end(), coded->second.begin() + begin);
          }
          v = coded->second;
        }
        return std::pair(k, v);
      });
}

TEST(Kivi, RandomStreams) {
  RetentionConfig full = RetentionConfig::full(100, 20);
  expect_kivi_streams<2>(full, 100, 1);
  expect_kivi_streams<4>(full, 100, 2);
  RetentionConfig window = RetentionConfig::sink_window(3, 50, 7);
  window.position_rule = PositionRule::kInText;
  expect_kivi_streams<2>(window, 130, 3);
  expect_kivi_streams<4>(window, 130, 4);
  // Groups of a whole register and more, and of less than one; heads that no register divides.
  const Extents wide{.kv_heads = 1, .group = 3, .dim = 64, .value_dim = 64};
  expect_kivi_streams<4>(window, 150, 5, wide, 32);
  expect_kivi_streams<2>(window, 150, 6, wide, 32);
  expect_kivi_streams<4>(window, 100, 7, wide, 8);
  expect_kivi_streams<4>(window, 100, 8, {.kv_heads = 2, .group = 5, .dim = 20, .value_dim = 24},
                         8);
}

/// Scores over codes in place are within the stated bound of the codes' exact ones, and so is what
/// float32 makes of the widened rows: neither is better than the other by more than the bound.
template <int kBits>
void expect_score_bound(std::int64_t dim, std::uint64_t seed) {
  constexpr std::int64_t kGroup = 32;
  constexpr std::int64_t kTokens = 200;
  constexpr std::int64_t kHeads = 4;
  using Cache = KiviKvCache<kBits, f16>;
  const std::array<const Rotary*, 1> rotaries{nullptr};
  Cache cache({1, 1, dim, dim},
              {.group = kGroup, .residual = kGroup, .retention = RetentionConfig::full(256, 256)},
              rotaries);
  Random random(seed);
  // Channels of very different sizes, as keys have them, some far from 0.
  std::vector<float> keys(static_cast<std::size_t>(kTokens * dim));
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto channel = static_cast<std::int64_t>(i) % dim;
    const double size = channel % 7 == 0 ? 20 : 0.5;
    keys[i] = static_cast<float>(size * random.normal() + (channel % 5 == 0 ? 10 * size : 0));
  }
  std::vector<float> query(static_cast<std::size_t>(kHeads * dim));
  for (float& x : query) x = static_cast<float>(random.normal());
  cache.append(kTokens);
  cache.store(0, {keys.data(), kTokens, 1, dim}, {keys.data(), kTokens, 1, dim}, nullptr, 0,
              kTokens);
  cache.commit();
  std::array<typename Cache::SegmentType, Cache::kMaxSegments> runs;
  const int count = cache.segments(0, 1, runs);
  AttentionWorkspace<cpu> workspace(
      nullptr, {.num_qo_heads = kHeads, .num_kv_heads = 1, .head_dim = dim, .value_dim = dim}, 1);
  ThreadTeam team(1);
  std::vector<float> out(query.size());
  std::array<float, kHeads> scores;
  std::int64_t coded = 0;
  for (int r = 0; r < count; ++r) {
    typename Cache::SegmentType run = runs[static_cast<std::size_t>(r)];
    if (run.key_scales == nullptr) continue;
    const std::int64_t in_run = run.rule.count;
    const std::int64_t run_first = run.key_first;
    run.rule.count = run.rule.visible = 1;
    for (std::int64_t j = 0; j < in_run; ++j, ++coded) {
      // The log-sum-exp of one key is its score.
      const std::int64_t token = run.key_first = run_first + j;
      attend(AttentionQuery{{query.data(), 1, kHeads, dim}, kTokens},
             std::span<const typename Cache::SegmentType>(&run, 1), AttentionVariant<>{1.0F},
             {out.data(), 1, kHeads, dim}, scores.data(), workspace, team, cpu{});
      for (std::int64_t h = 0; h < kHeads; ++h) {
        double exact = 0;
        double size = 0;
        float widened = 0;
        for (std::int64_t d = 0; d < dim; ++d) {
          const auto* words = reinterpret_cast<const std::uint32_t*>(run.keys->bytes) +
                              token / kGroup * run.key_token_stride +
                              d * kGroup / KiviCodes<kBits>::kPerWord;
          const f16* scales = run.key_scales + token / kGroup * run.key_scale_token_stride;
          const std::uint32_t code = KiviCodes<kBits>::code(words, token % kGroup);
          const auto scale = static_cast<float>(scales[d]);
          const auto zero = static_cast<float>(scales[dim + d]);
          const float q = query[static_cast<std::size_t>(h * dim + d)];
          const double part = code * static_cast<double>(scale);
          exact += static_cast<double>(q) * (part + static_cast<double>(zero));
          size += std::abs(static_cast<double>(q)) *
                  (std::abs(part) + std::abs(static_cast<double>(zero)));
          widened += q * (static_cast<float>(code) * scale + zero);
        }
        const double bound = (static_cast<double>(dim) + 4) * 0x1p-24 * size;
        const auto in_place = static_cast<double>(scores[static_cast<std::size_t>(h)]);
        ASSERT_NEAR(in_place, exact, bound) << kBits << " bits, token " << j;
        ASSERT_NEAR(in_place, static_cast<double>(widened), 2 * bound);
      }
    }
  }
  EXPECT_GT(coded, 100);
}

TEST(Kivi, ScoresOverCodesKeepTheirBound) {
  expect_score_bound<2>(64, 1);
  expect_score_bound<4>(64, 2);
  expect_score_bound<4>(128, 3);
}

/// What no code replaces yet is attended to as a plain cache of the same rows is, bit for bit.
template <class Tail>
void expect_plain_rows() {
  const Extents extents{.kv_heads = 2, .group = 2, .dim = 64, .value_dim = 64};
  const KvShape shape{1, 2, 64, 64};
  const RetentionConfig full = RetentionConfig::full(80, 6);
  const std::array<const Rotary*, 1> rotaries{nullptr};
  KiviKvCache<4, Tail> kivi(shape, {.group = 32, .residual = 96, .retention = full}, rotaries);
  KvCache<Tail> plain(shape, std::array{full},
                      std::array{LayerCacheConfig{.retention = 0, .rotary = nullptr}});
  CacheDriver<KiviKvCache<4, Tail>> rows(kivi, extents, 1, nullptr, 3);
  CacheDriver<KvCache<Tail>> expected(plain, extents, 1, nullptr, 3);
  for (int step = 0; kivi.total() + 6 <= 80; ++step) {
    const std::int64_t tokens = step % 2 == 0 ? 1 : 6;
    rows.feed(tokens);
    rows.commit();
    expected.feed(tokens);
    expected.commit();
  }
  ASSERT_GT(kivi.total(), 70);
  for (std::size_t t = 0; t < rows.rows(0).size(); ++t)
    ASSERT_EQ(rows.rows(0)[t].out, expected.rows(0)[t].out) << "token " << t;
}

TEST(Kivi, NewRowsAreThoseOfAPlainCache) {
  expect_plain_rows<float>();
  expect_plain_rows<f16>();
  expect_plain_rows<bf16>();
}

/// A state goes on bit for bit where it was taken: copies, checkpoints, snapshots.
TEST(Kivi, GoesBackAndIsRestored) {
  const Extents extents{.kv_heads = 1, .group = 1, .dim = 16, .value_dim = 16};
  const std::array<const Rotary*, 1> rotaries{nullptr};
  const KiviConfig config{
      .group = 16, .residual = 16, .retention = RetentionConfig::sink_window(1, 40, 3)};
  using Cache = KiviKvCache<2, f16>;
  Cache cache({1, 1, 16, 16}, config, rotaries);
  CacheDriver<Cache> driver(cache, extents, 1, nullptr, 9);
  const auto run = [](CacheDriver<Cache>& on, int steps) {
    for (int i = 0; i < steps; ++i) {
      on.feed(1 + i % 3);
      on.commit();
    }
  };
  run(driver, 40);
  Cache::Checkpoint checkpoint = cache.make_checkpoint();
  cache.capture(checkpoint);
  ByteWriter writer;
  cache.save(writer);
  Cache copy = cache.sibling();
  copy.copy_from(cache);
  Cache restored = cache.sibling();
  ByteReader reader(writer.bytes(), "memory");
  restored.restore(reader);
  const auto next = [&](Cache& on) {
    CacheDriver<Cache> fresh(on, extents, 1, nullptr, 77);
    run(fresh, 30);
    std::vector<float> outs;
    for (const auto& row : fresh.rows(0)) outs.insert(outs.end(), row.out.begin(), row.out.end());
    return outs;
  };
  const std::vector<float> expected = next(cache);
  EXPECT_EQ(next(copy), expected);
  EXPECT_EQ(next(restored), expected);
  cache.revert(checkpoint);
  EXPECT_EQ(next(cache), expected);
  std::vector<std::byte> cut(writer.bytes().begin(), writer.bytes().end());
  cut.resize(cut.size() / 2);
  ByteReader broken(cut, "memory");
  EXPECT_THROW(restored.restore(broken), Error);
  EXPECT_EQ(restored.total(), 0);
  // Less than a fifth of what floats of 16 bits take, residual aside.
  const Cache large({1, 1, 64, 64},
                    {.group = 32, .residual = 32, .retention = RetentionConfig::full(8192, 1)},
                    rotaries);
  EXPECT_LT(large.bytes(), std::size_t{8192} * 128 * 2 / 5);
}

TEST(Kivi, RefusesWhatDoesNotFit) {
  const std::array<const Rotary*, 1> rotaries{nullptr};
  const auto make = [&](std::int64_t group, std::int64_t residual, std::int64_t value_dim,
                        RetentionConfig retention) {
    KiviKvCache<2>({1, 1, 16, value_dim}, {group, residual, retention}, rotaries);
  };
  const RetentionConfig full = RetentionConfig::full(64, 1);
  EXPECT_NO_THROW(make(16, 32, 16, full));
  EXPECT_THROW(make(12, 24, 24, full), Error);
  EXPECT_THROW(make(16, 24, 16, full), Error);
  EXPECT_THROW(make(16, 0, 16, full), Error);
  EXPECT_THROW(make(16, 32, 24, full), Error);
  EXPECT_THROW(make(16, 32, 16, RetentionConfig::on_request(1, 4, 20)), Error);
  RetentionConfig raw = full;
  raw.key_form = KeyForm::kRaw;
  EXPECT_THROW(make(16, 32, 16, raw), Error);
}

}  // namespace SLUICE_TEST_UNIT
