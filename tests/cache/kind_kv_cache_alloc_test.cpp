// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <vector>

#include "sluice/cache/kind_kv_cache.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

// A thousand rounds: rings wrap, replies move, texts leave.
TEST(KindKvCacheAllocations, AreNone) {
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16});
  KindRetentionConfig config{.text_sinks = 4,
                             .text_window = 30,
                             .text_rounds = 6,
                             .vision_rounds = 4,
                             .max_vision = 24,
                             .max_chunk = 12};
  KindKvCache<f16> cache({2, 2, 16, 16}, config, std::array<const Rotary*, 2>{&rotary, &rotary});
  RotaryTable table(rotary, 12);
  const std::vector<float> rows(12 * 2 * 16, 0.5F);
  std::array<Position3, 12> positions{};
  std::array<Segment<f16>, KindKvCache<f16>::kMaxSegments> segments;
  std::int64_t seen = 0;
  const VisionGrid grid{.frames = 1, .rows = 3, .cols = 4, .frame_step = 0.5};
  const auto chunk = [&](std::int64_t tokens) {
    cache.append(tokens);
    table.fill({positions.data(), static_cast<std::size_t>(tokens)});
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      cache.store(layer, {rows.data(), tokens, 2, 16}, {rows.data(), tokens, 2, 16}, table.rows(),
                  0, tokens);
      seen += cache.segments(layer, tokens, segments);
    }
    cache.commit();
  };
  auto checkpoint = cache.make_checkpoint();
  KindKvCache<f16> copy = cache.sibling();
  const std::int64_t before = test::allocation_count();
  const std::size_t bytes = cache.bytes();
  for (int round = 0; round < 1000; ++round) {
    cache.begin_round();
    for (int frame = 0; frame < 2; ++frame) {
      fill_positions(grid, cache.next_position(), positions);
      cache.begin_span(SpanRole::kVision, grid);
      chunk(12);
    }
    cache.begin_span(SpanRole::kReply);
    for (int token = 0; token < round % 20; ++token) {
      positions[0] = on_all_axes(cache.next_position());
      chunk(1);
    }
    // Going back costs none either.
    if (round % 10 == 0) cache.capture(checkpoint);
    if (round % 10 == 3) {
      cache.truncate(cache.max_truncate());
      copy.copy_from(cache);
      cache.revert(checkpoint);
    }
  }
  EXPECT_EQ(test::allocation_count(), before);
  EXPECT_EQ(cache.bytes(), bytes);
  EXPECT_GT(seen, 0);
  EXPECT_GT(cache.tokens_moved(), 1000);
  EXPECT_GT(copy.total(), 1000);
}

}  // namespace SLUICE_TEST_UNIT
