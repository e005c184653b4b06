// SPDX-License-Identifier: MIT
// A tree of drafted tokens through a decoder, against the naive float64 decoder: each node's logits
// are those of the plain sequence that ends with it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "sluice/attention/draft_tree.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/decoder.hpp"
#include "support/naive_decoder.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::between;

using test::kVocab;

// The tolerance is that of group_streaming_test.cpp, for the same models and sums: 1e-5 is seen, a
// key too many or a position off by one gives 1e-2.
constexpr double kTolerance = 1.5e-4;

class DraftForward : public testing::Test {
 protected:
  /// The worst difference of any node's logits on random trees behind random texts. `rule` as the
  /// cache reads, `sinks` and `window` what it keeps; 0: everything.
  static double worst(const Decoder& decoder, std::int64_t sinks, std::int64_t window,
                      PositionRule rule, std::uint64_t seed) {
    Random random(seed);
    ThreadTeam team(2);
    const test::NaiveDecoder naive(decoder);
    double worst = 0;
    for (int trial = 0; trial < 6; ++trial) {
      CacheOptions options;
      options.policy = window == 0 ? CachePolicy::kFull : CachePolicy::kSinkWindow;
      options.num_sink_tokens = sinks;
      options.window_size = window == 0 ? 1 : window;
      options.capacity = 64;
      options.chunk_size = 8;
      options.position_rule = rule;
      KvCache<float> cache = decoder.make_cache<float>(plan_cache(decoder.config(), options));
      DecoderWorkspace workspace(decoder, cache.max_chunk(), cache.max_entries(), team.size());
      std::vector<Token> text;
      const std::int64_t length = between(random, 1, 40);
      for (std::int64_t i = 0; i < length; ++i) {
        text.push_back(static_cast<Token>(random.below(kVocab)));
        decoder.forward(std::span<const Token>(&text.back(), 1), cache, workspace, team);
        cache.commit();
      }
      DraftTree draft(8);
      const std::int64_t nodes = between(random, 1, cache.max_chunk());
      for (std::int64_t i = 0; i < nodes; ++i)
        draft.add(static_cast<Token>(random.below(kVocab)),
                  i == 0 ? DraftTree::kNoNode : between(random, 0, i - 1));
      decoder.forward(draft, cache, workspace, team);
      std::vector<float> found(static_cast<std::size_t>(nodes * kVocab));
      decoder.logits(0, {found.data(), nodes, kVocab}, workspace, team);
      cache.rollback();
      for (std::int64_t node = 0; node < nodes; ++node) {
        std::vector<std::int64_t> path(static_cast<std::size_t>(nodes));
        path.resize(static_cast<std::size_t>(draft.path_to(node, path)));
        std::vector<Token> plain = text;
        for (const std::int64_t step : path) plain.push_back(draft.token(step));
        const auto pass = naive.run(
            plain,
            [&](std::size_t layer, std::size_t query, std::size_t key) -> std::optional<double> {
              if (key > query) return std::nullopt;
              const auto q = static_cast<std::int64_t>(query);
              const auto k = static_cast<std::int64_t>(key);
              const std::int64_t trained = decoder.config().layers[layer].window_size;
              if (trained < kUnlimitedWindow && (window == 0 || trained < window))
                return q - k < trained ? std::optional<double>(q - k) : std::nullopt;
              if (window == 0 || q - k < window) return static_cast<double>(q - k);
              if (k >= sinks) return std::nullopt;
              // A sink: in the cache, what was evicted between is not counted.
              return static_cast<double>(
                  rule == PositionRule::kInText ? q - k : std::min(q, sinks + window - 1) - k);
            });
        for (std::int64_t token = 0; token < kVocab; ++token)
          worst = std::max(worst,
                           std::abs(pass.logits.back()[static_cast<std::size_t>(token)] -
                                    static_cast<double>(
                                        found[static_cast<std::size_t>(node * kVocab + token)])));
      }
    }
    return worst;
  }
};

TEST_F(DraftForward, EqualsThePlainSequencesOfItsNodes) {
  const auto plain = test::small_decoder({}, 1);
  const auto windows =
      test::small_decoder({.num_layers = 3, .windows = {4, kUnlimitedWindow, 9}}, 4);
  for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
    EXPECT_LT(worst(*plain, 0, 0, rule, 2), kTolerance);
    EXPECT_LT(worst(*plain, 3, 9, rule, 3), kTolerance);
    EXPECT_LT(worst(*plain, 0, 8, rule, 4), kTolerance);
    EXPECT_LT(worst(*windows, 2, 12, rule, 5), kTolerance);
    EXPECT_LT(worst(*windows, 0, 0, rule, 6), kTolerance);
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
