// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/element.hpp"
#include "sluice/position/rotary.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::f16;
using sluice::fp8_e4m3;
using sluice::HeadsView;
using sluice::int4x2;
using sluice::KeyForm;
using sluice::KvCache;
using sluice::LayerCacheConfig;
using sluice::RetentionConfig;
using sluice::Rotary;
using sluice::RotaryTable;

TEST(KvCacheAllocations, TheCounterSeesAllocations) {
  const std::int64_t before = sluice::test::allocation_count();
  const RetentionConfig config = RetentionConfig::full(8, 8);
  const LayerCacheConfig layer{0, nullptr};
  const KvCache<float> cache({1, 1, 8, 8}, {&config, 1}, {&layer, 1});
  EXPECT_GT(sluice::test::allocation_count(), before);
}

class KvCacheSteps : public testing::TestWithParam<KeyForm> {};

template <class Key, class Value>
void expect_steps_without_allocation(KeyForm form) {
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16});
  std::vector<RetentionConfig> retentions{RetentionConfig::sink_window(2, 20, 6),
                                          RetentionConfig::window(7, 6)};
  for (RetentionConfig& config : retentions) config.key_form = form;
  const std::vector<LayerCacheConfig> layers{{0, &rotary}, {1, &rotary}, {1, nullptr}};
  KvCache<Key, Value> cache({3, 2, 16, 8}, retentions, layers);
  RotaryTable table(rotary, 6);
  const std::vector<float> keys(6 * 2 * 16, 1.5F);
  const std::vector<float> values(6 * 2 * 8, 0.5F);
  std::array<typename KvCache<Key, Value>::SegmentType, KvCache<Key, Value>::kMaxSegments> segments;
  std::int64_t seen = 0;

  const std::int64_t before = sluice::test::allocation_count();
  for (std::int64_t step = 0; step < 500; ++step) {
    const std::int64_t tokens = 1 + step % 6;
    cache.append(tokens);
    table.fill_run(static_cast<double>(cache.total() - tokens), tokens);
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      cache.store(layer, {keys.data(), tokens, 2, 16}, {values.data(), tokens, 2, 8}, table.rows(),
                  0, tokens);
      seen += cache.segments(layer, tokens, segments);
    }
    if (step % 5 == 0)
      cache.rollback();
    else
      cache.commit();
    if (step % 11 == 0) cache.truncate(std::min<std::int64_t>(1, cache.max_truncate()));
  }
  cache.reset();
  EXPECT_EQ(sluice::test::allocation_count(), before);
  EXPECT_GT(seen, 3 * 500);
}

TEST_P(KvCacheSteps, AllocateNothing) {
  expect_steps_without_allocation<f16, float>(GetParam());
  expect_steps_without_allocation<std::int8_t, fp8_e4m3>(GetParam());
  expect_steps_without_allocation<int4x2, int4x2>(GetParam());
}

INSTANTIATE_TEST_SUITE_P(Forms, KvCacheSteps, testing::Values(KeyForm::kRotated, KeyForm::kRaw),
                         [](const auto& form) { return std::string(to_string(form.param)); });

TEST(KvCacheAllocations, RequestedEvictionsAllocateNothing) {
  const RetentionConfig config = RetentionConfig::on_request(2, 20, 32);
  const LayerCacheConfig layer{0, nullptr};
  KvCache<float> cache({1, 2, 8, 8}, {&config, 1}, {&layer, 1});
  const std::int64_t before = sluice::test::allocation_count();
  for (int step = 0; step < 100; ++step) {
    cache.append(7);
    cache.commit();
    cache.evict_range(4, 7);
    cache.shrink();
    cache.evict_for_space(11);
  }
  EXPECT_EQ(sluice::test::allocation_count(), before);
}

}  // namespace SLUICE_TEST_UNIT
