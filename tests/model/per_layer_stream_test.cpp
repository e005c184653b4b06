// SPDX-License-Identifier: MIT
// Caches with rules per layer and head in a whole decoder: LightTransfer's lazy layers, shards of
// blocks, KIVI's rows. Logits are those of a plain decoder in double whose rows see what the rule
// says.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "sluice/attention/kivi_cache.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/cache/shard_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/decoder.hpp"
#include "support/naive_decoder.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::kVocab;
using test::NaiveDecoder;
using test::random_tokens;
using test::small_decoder;

// As in scored_stream_test.cpp.
constexpr double kTolerance = 1.5e-4;

/// Feeds `tokens` in chunks that next(tokens fed) gives; logits of every row.
template <class Cache, class Next>
std::vector<std::vector<float>> logits_of(const Decoder& model, Cache& cache,
                                          const std::vector<Token>& tokens, Next&& next) {
  ThreadTeam team(2);
  DecoderWorkspace workspace(model, cache.max_chunk(), cache.max_entries(), 2);
  std::vector<std::vector<float>> logits;
  for (std::size_t done = 0; done < tokens.size();) {
    const auto count = std::min(tokens.size() - done,
                                static_cast<std::size_t>(next(static_cast<std::int64_t>(done))));
    EXPECT_EQ(cache.status(static_cast<std::int64_t>(count)), CacheStatus::kOk);
    model.forward({tokens.data() + done, count}, cache, workspace, team);
    const auto rows = static_cast<std::int64_t>(count);
    std::vector<float> out(count * static_cast<std::size_t>(kVocab));
    model.logits(0, {out.data(), rows, kVocab}, workspace, team);
    for (std::int64_t r = 0; r < rows; ++r)
      logits.emplace_back(out.begin() + r * kVocab, out.begin() + (r + 1) * kVocab);
    cache.commit();
    done += count;
  }
  return logits;
}

void expect_equal(const std::vector<std::vector<float>>& logits, const NaiveDecoder::Pass& pass) {
  double largest = 0;
  for (std::size_t t = 0; t < logits.size(); ++t)
    for (std::size_t i = 0; i < logits[t].size(); ++i)
      largest = std::max(largest, std::abs(static_cast<double>(logits[t][i]) - pass.logits[t][i]));
  EXPECT_LT(largest, kTolerance);
}

TEST(PerLayerStream, LazyLayers) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    Random random(seed);
    const auto model = small_decoder({.num_layers = 4, .num_qo_heads = 4, .num_kv_heads = 2}, seed);
    const std::int64_t prompt = between(random, 20, 30);
    const std::vector<Token> tokens = random_tokens(random, prompt + 15);
    auto cache = model->make_lazy_layer_cache<float>({.num_full_layers = 2,
                                                      .num_sink_tokens = 1,
                                                      .recent_size = 6,
                                                      .num_queries = 4,
                                                      .capacity = 60,
                                                      .max_prompt = 30,
                                                      .max_chunk = 3});
    const auto logits = logits_of(*model, cache, tokens, [&](std::int64_t done) {
      return done == 0 ? prompt : between(random, 1, 3);
    });
    EXPECT_EQ(cache.num_lazy(), 2);
    // The laziest by the plain decoder's own weights, over a prompt that everything sees.
    const auto pass = NaiveDecoder(*model).run(
        tokens,
        [&](std::size_t layer, std::size_t query, std::size_t key) -> std::optional<double> {
          if (key > query) return std::nullopt;
          const auto distance = static_cast<std::int64_t>(query - key);
          if (static_cast<std::int64_t>(query) >= prompt &&
              cache.is_lazy(static_cast<std::int64_t>(layer)) && key >= 1 && distance > 6)
            return std::nullopt;
          return static_cast<double>(distance);
        });
    expect_equal(logits, pass);
    std::vector<std::pair<double, std::int64_t>> held;
    std::vector<bool> lazy(4);
    for (std::size_t l = 0; l < 4; ++l) {
      double sum = 0;
      for (std::size_t h = 0; h < 4; ++h)
        for (auto t = static_cast<std::size_t>(prompt - 4); t < static_cast<std::size_t>(prompt);
             ++t)
          for (std::size_t j = 0; j <= t; ++j)
            if (j < 1 || static_cast<std::int64_t>(j) >= prompt - 6)
              sum += pass.weights[l][h][t][j];
      EXPECT_NEAR(cache.ratio(static_cast<std::int64_t>(l)), sum / 16, 1e-4);
      held.push_back({sum, -static_cast<std::int64_t>(l)});
      if (held.size() <= 2) continue;
      const auto out = std::max_element(held.begin(), held.end());
      lazy[static_cast<std::size_t>(-out->second)] = true;
      held.erase(out);
    }
    for (std::size_t l = 0; l < 4; ++l)
      EXPECT_EQ(cache.is_lazy(static_cast<std::int64_t>(l)), lazy[l]) << l;
  }
}

TEST(PerLayerStream, Shards) {
  Random random(5);
  const auto model = small_decoder({.num_layers = 2, .num_qo_heads = 6, .num_kv_heads = 3}, 5);
  const std::vector<Token> tokens = random_tokens(random, 60);
  const ShardPattern pattern{.num_heads = 3, .block_size = 5, .local_blocks = 2, .vert_stride = 3};
  const std::vector<const Rotary*> rotaries{&model->rotary(0), &model->rotary(1)};
  ShardKvCache<float> cache(model->kv_shape(), pattern, 60, rotaries);
  const auto logits = logits_of(*model, cache, tokens, [&](std::int64_t) {
    return between(random, 1, cache.room_in_block());
  });
  expect_equal(logits, NaiveDecoder(*model).run_heads(
                           tokens,
                           [&](std::size_t, std::size_t head, std::size_t query,
                               std::size_t key) -> std::optional<double> {
                             if (key > query || !pattern.sees(static_cast<std::int64_t>(head),
                                                              static_cast<std::int64_t>(query) / 5,
                                                              static_cast<std::int64_t>(key) / 5))
                               return std::nullopt;
                             return static_cast<double>(query - key);
                           }));
}

/// With a residual that nothing outgrows KIVI's cache is the retention it was given; with codes the
/// logits move by no more than codes of four bits move them.
TEST(PerLayerStream, Kivi) {
  Random random(6);
  const auto model = small_decoder({.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 2}, 6);
  const std::vector<Token> tokens = random_tokens(random, 90);
  const std::vector<const Rotary*> rotaries{&model->rotary(0), &model->rotary(1)};
  const auto run = [&](std::int64_t residual) {
    KiviKvCache<4, float> cache(
        model->kv_shape(),
        {.group = 8, .residual = residual, .retention = RetentionConfig::sink_window(2, 20, 4)},
        rotaries);
    return logits_of(*model, cache, tokens, [&](std::int64_t) { return 3; });
  };
  const auto exact = run(96);
  expect_equal(
      exact,
      NaiveDecoder(*model).run(
          tokens, [&](std::size_t, std::size_t query, std::size_t key) -> std::optional<double> {
            if (key > query || (key >= 2 && query - key >= 20)) return std::nullopt;
            // Sinks of a full window stand at one distance.
            if (key < 2 && query >= 22) return static_cast<double>(21) - static_cast<double>(key);
            return static_cast<double>(query - key);
          }));
  const auto coded = run(8);
  double largest = 0;
  double change = 0;
  for (std::size_t t = 0; t < exact.size(); ++t)
    for (std::size_t i = 0; i < exact[t].size(); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(exact[t][i])));
      change = std::max(change, std::abs(static_cast<double>(exact[t][i] - coded[t][i])));
    }
  // A step of a group is at most 2 / 15 of its largest number; what comes of it stays of that
  // order.
  EXPECT_GT(change, 1e-4);
  EXPECT_LT(change, 0.3 * largest);
}

}  // namespace SLUICE_TEST_UNIT
