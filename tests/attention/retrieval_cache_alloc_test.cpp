// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <vector>

#include "sluice/attention/retrieval_cache.hpp"
#include "sluice/position/rotary.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

/// Reading, spilling, asking and loading allocate nothing, with frames in memory or in a file.
TEST(RetrievalCacheAllocations, Steps) {
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16});
  const std::array<const Rotary*, 2> rotaries{&rotary, nullptr};
  for (const bool on_disk : {false, true}) {
    RetrievalConfig config{.num_init_tokens = 3,
                           .window_size = 24,
                           .frame_size = 6,
                           .max_frames = 100,
                           .top_frames = 4,
                           .chunk_frames = 2,
                           .num_slots = 5,
                           .max_question = 10,
                           .max_chunk = 7};
    if (on_disk) config.folder = ::testing::TempDir();
    RetrievalKvCache<f16> cache({2, 2, 16, 8}, 4, config, rotaries);
    const std::vector<float> rows(7 * 4 * 16, 1.5F);
    std::array<Segment<f16>, static_cast<std::size_t>(RetrievalKvCache<f16>::kMaxSegments)> out;
    std::int64_t read = 0;

    const std::int64_t before = test::allocation_count();
    const auto step = [&](std::int64_t tokens) {
      const std::int64_t first = cache.total();
      cache.append(tokens);
      for (std::int64_t layer = 0; layer < 2; ++layer) {
        cache.store(layer, {rows.data(), tokens, 2, 16}, {rows.data(), tokens, 2, 8}, nullptr, 0,
                    tokens);
        cache.select(layer, {{rows.data(), tokens, 4, 16}, first, cache.write_position(first)});
        read += cache.segments(layer, tokens, out);
      }
    };
    for (int i = 0; i < 100; ++i) {
      step(1 + i % 7);
      if (i % 5 == 0)
        cache.rollback();
      else
        cache.commit();
      if (i % 10 != 9) continue;
      cache.begin_question();
      step(4);
      cache.commit();
      step(1);
      cache.rollback();
      cache.end_question();
    }
    EXPECT_EQ(test::allocation_count(), before);
    EXPECT_GT(cache.loads(), 4);
    EXPECT_GT(read, 200);
  }
}

}  // namespace SLUICE_TEST_UNIT
