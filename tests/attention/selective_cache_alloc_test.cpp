// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <vector>

#include "sluice/attention/cluster_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/position/rotary.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

template <class Cache>
void expect_no_allocation(Cache& cache, const Rotary& rotary) {
  RotaryTable table(rotary, 5);
  const std::vector<float> rows(5 * 4 * 16, 1.5F);
  const std::vector<float> lse(5 * 4, 3);
  std::array<Segment<f16>, static_cast<std::size_t>(Cache::kMaxSegments)> segments;
  std::int64_t read = 0;

  const std::int64_t before = test::allocation_count();
  for (std::int64_t step = 0; step < 200; ++step) {
    const std::int64_t tokens = step % 7 == 0 ? 5 : 1;
    const std::int64_t first = cache.total();
    cache.append(tokens);
    table.fill_run(cache.write_position(first), tokens);
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      const AttentionQuery query{{rows.data(), tokens, 4, 16}, first, cache.write_position(first)};
      cache.store(layer, {rows.data(), tokens, 2, 16}, {rows.data(), tokens, 2, 8}, table.rows(), 0,
                  tokens);
      cache.select(layer, query);
      for (int part = 0; part < cache.num_classes(layer); ++part)
        read += cache.segments(layer, tokens, segments, part);
      if constexpr (requires { cache.observes(layer); })
        if (cache.observes(layer)) cache.observe({layer, 0, query, {}, lse.data()});
    }
    if (step % 5 == 0)
      cache.rollback();
    else
      cache.commit();
    if (step % 11 == 10) cache.truncate(1);
  }
  EXPECT_EQ(test::allocation_count(), before);
  EXPECT_GE(read, 400);  // a segment a layer and step, or more
}

TEST(SelectiveCacheAllocations, Steps) {
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16});
  const std::array<const Rotary*, 2> rotaries{&rotary, nullptr};
  PageSelectKvCache<f16> pages(
      {2, 2, 16, 8}, 4,
      {.page_size = 4, .logical_page_size = 2, .budget = 5, .interval = 3, .dense_layers = 0},
      rotaries, 600, 5);
  expect_no_allocation(pages, rotary);
  EXPECT_GT(pages.selections(), 20);
  TokenSelectKvCache<f16> tokens({2, 2, 16, 8}, 4, 0.25F, {{0}, 20}, rotaries, 600, 5);
  expect_no_allocation(tokens, rotary);
  EXPECT_TRUE(tokens.gathers());
  ClusterSelectKvCache<f16> clusters(
      {2, 2, 16, 8}, 4, 0.25F, {.max_clusters = 10, .budget = 12, .recent = 4, .dense_layers = 0},
      rotaries, 600, 5);
  expect_no_allocation(clusters, rotary);
  EXPECT_GT(clusters.selections(), 20);
}

}  // namespace SLUICE_TEST_UNIT
