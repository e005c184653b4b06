// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <vector>

#include "sluice/attention/scored_cache.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/position/rotary.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

/// Steps that observe, select, roll back and share budgets allocate nothing.
TEST(ScoredCacheAllocations, Steps) {
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16});
  const std::array<const Rotary*, 2> rotaries{&rotary, nullptr};
  std::vector<ScorePolicy> policies{ScorePolicy::snap_kv(20, 12, 6, 8), ScorePolicy::h2o(12, 8, 6),
                                    ScorePolicy::q_filters(20, 8, 12, 6),
                                    ScorePolicy::sir_llm(2, 6, 12, 0.9, 6)};
  policies.push_back(policies[1]);
  policies.back().floor = 0.5;
  for (const ScorePolicy& policy : policies) {
    const std::vector<float> directions(
        policy.source == ScoreSource::kKeyDirection ? 2 * 2 * 16 : 0, 0.25F);
    ScoredKvCache<f16> cache({2, 2, 16, 8}, 4, 0.25F, policy, rotaries, directions);
    RotaryTable table(rotary, 6);
    const std::vector<float> rows(6 * 4 * 16, 1.5F);
    const std::vector<float> lse(6 * 4, 3);
    const std::vector<float> scores(6, 1);
    std::array<Segment<f16>, 1> segments;

    const std::int64_t before = test::allocation_count();
    for (std::int64_t step = 0; step < 300; ++step) {
      const std::int64_t tokens = 1 + step % 6;
      const std::int64_t first = cache.total();
      cache.append(tokens);
      table.fill_run(cache.write_position(first), tokens);
      for (std::int64_t layer = 0; layer < 2; ++layer) {
        cache.store(layer, {rows.data(), tokens, 2, 16}, {rows.data(), tokens, 2, 8}, table.rows(),
                    0, tokens);
        for (int part = 0; part < cache.num_classes(layer); ++part) {
          const int count = cache.segments(layer, tokens, segments, part);
          if (cache.observes(layer))
            cache.observe({layer,
                           part,
                           {{rows.data(), tokens, 4, 16}, first, cache.write_position(first)},
                           {segments.data(), static_cast<std::size_t>(count)},
                           lse.data()});
        }
      }
      if (policy.source == ScoreSource::kGiven)
        cache.give_scores({scores.data(), static_cast<std::size_t>(tokens)});
      if (step % 5 == 0)
        cache.rollback();
      else
        cache.commit();
    }
    EXPECT_EQ(test::allocation_count(), before);
    EXPECT_GT(cache.selections(), 10);
  }
}

}  // namespace SLUICE_TEST_UNIT
