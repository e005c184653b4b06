// SPDX-License-Identifier: MIT
// Picking frames and what happens to their rows on the way to the host and back. What a decoder
// reads through the cache is in tests/model/retrieval_stream_test.cpp.
#include "sluice/attention/retrieval_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <stop_token>
#include <thread>
#include <vector>

#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::error_of;

using List = std::vector<std::int64_t>;

List pick(const std::vector<float>& scores, std::int64_t top, std::int64_t chunk) {
  std::vector<float> means(scores.size());
  std::vector<std::int64_t> order(scores.size());
  std::vector<std::int64_t> picked(static_cast<std::size_t>(top));
  picked.resize(static_cast<std::size_t>(pick_frames(scores, top, chunk, means, order, picked)));
  return picked;
}

// Specification, test C.4: three frames, not four.
TEST(RetrievalCache, PicksFrames) {
  EXPECT_EQ(pick({3, 1, 2, 5, 4}, 4, 2), (List{2, 3, 4}));
  EXPECT_EQ(pick({3, 1, 2, 5, 4}, 5, 2), (List{0, 1, 2, 3, 4}));
  EXPECT_EQ(pick({3, 1, 2, 5, 4}, 2, 1), (List{3, 4}));
  EXPECT_EQ(pick({2, 2, 2}, 2, 1), (List{0, 1}));
  EXPECT_EQ(pick({}, 2, 1), (List{}));
}

constexpr RetrievalConfig kSmall{.num_init_tokens = 1,
                                 .window_size = 6,
                                 .frame_size = 3,
                                 .max_frames = 10,
                                 .top_frames = 2,
                                 .chunk_frames = 1,
                                 .num_slots = 3,
                                 .max_question = 4,
                                 .max_chunk = 4};
constexpr KvShape kShape{2, 2, 3, 2};
const std::array<const Rotary*, 2> kNoRotaries{nullptr, nullptr};

template <class Cache>
void store(Cache& cache, const std::vector<float>& keys, const std::vector<float>& values) {
  const auto tokens = static_cast<std::int64_t>(keys.size()) / 6;
  cache.append(tokens);
  for (std::int64_t layer = 0; layer < 2; ++layer)
    cache.store(layer, {keys.data(), tokens, 2, 3}, {values.data(), tokens, 2, 2}, nullptr, 0,
                tokens);
}

/// Rows of token t, different in every channel.
std::vector<float> rows(std::int64_t first, std::int64_t tokens, std::int64_t width, float scale) {
  std::vector<float> result;
  for (std::int64_t i = first * width; i < (first + tokens) * width; ++i)
    result.push_back(scale * static_cast<float>(i) + 0.37F);
  return result;
}

void expect_rows_come_back(const RetrievalConfig& config, int loaders = -1) {
  RetrievalKvCache<f16, bf16> cache(kShape, 2, config, kNoRotaries);
  // Not below 0: loads overlap, and so many threads of ours serve them beside the step.
  cache.overlap_loads(loaders >= 0);
  std::vector<std::jthread> threads;
  for (int i = 0; i < loaders; ++i)
    threads.emplace_back([&](const std::stop_token& stop) {
      std::vector<std::byte> record(static_cast<std::size_t>(cache.store().record_bytes()));
      while (!stop.stop_requested())
        if (!cache.load_one(record)) std::this_thread::yield();
    });
  Random random(4);
  while (cache.total() < 31) {
    const std::int64_t tokens =
        test::between(random, 1, std::min<std::int64_t>(4, 31 - cache.total()));
    store(cache, rows(cache.total(), tokens, 6, 0.11F), rows(cache.total(), tokens, 4, -0.23F));
    if (random.below(3) == 0)
      cache.rollback();
    else
      cache.commit();
  }
  EXPECT_EQ(cache.frames(), 10);
  EXPECT_EQ(cache.status(3), CacheStatus::kFull);  // an eleventh frame
  EXPECT_EQ(cache.status(2), CacheStatus::kOk);
  std::array<Segment<f16, bf16>,
             static_cast<std::size_t>(RetrievalKvCache<f16, bf16>::kMaxSegments)>
      out;
  const std::vector<float> zeros(12, 0);
  std::int64_t loads = 0;
  const auto ask = [&](const List& frames, std::int64_t expected_loads) {
    cache.begin_question(frames);
    store(cache, rows(90, 2, 6, 0.5F), rows(90, 2, 4, 0.5F));
    for (std::int64_t layer = 0; layer < 2; ++layer) {
      cache.select(layer, {{zeros.data(), 2, 2, 3}, cache.total() - 2, 0});
      ASSERT_EQ(List(cache.picked(layer).begin(), cache.picked(layer).end()), frames);
      int count = cache.segments(layer, 2, out);
      count +=
          cache.late_segments(layer, 2, std::span(out).subspan(static_cast<std::size_t>(count)));
      ASSERT_EQ(count, static_cast<int>(frames.size()) + 2);
      ASSERT_EQ(cache.late_segments(layer, 2, out), 0);
      std::sort(out.begin(), out.begin() + count, [](const auto& a, const auto& b) {
        return a.rule.first_position < b.rule.first_position;
      });
      for (std::size_t s = 0; s < frames.size(); ++s) {
        const std::int64_t first = 1 + 3 * frames[s];
        const std::vector<float> keys = rows(first, 3, 6, 0.11F);
        const std::vector<float> values = rows(first, 3, 4, -0.23F);
        const auto& segment = out[s + 1];
        ASSERT_EQ(segment.rule.visible, 3);
        ASSERT_EQ(segment.rule.first_position, 1 + 3 * static_cast<double>(s));
        for (std::int64_t j = 0; j < 3; ++j)
          for (std::int64_t h = 0; h < 2; ++h) {
            for (std::int64_t d = 0; d < 3; ++d)
              ASSERT_EQ(segment.key(h, j)[d].bits,
                        static_cast<f16>(keys[static_cast<std::size_t>((j * 2 + h) * 3 + d)]).bits);
            for (std::int64_t d = 0; d < 2; ++d)
              ASSERT_EQ(
                  segment.value(h, j)[d].bits,
                  static_cast<bf16>(values[static_cast<std::size_t>((j * 2 + h) * 2 + d)]).bits);
          }
      }
    }
    cache.commit();
    cache.end_question();
    loads += 2 * expected_loads;  // two layers
    EXPECT_EQ(cache.loads(), loads);
  };
  // Three slots; the least recently used frame makes room, never one of the same request.
  ask({0, 9}, 2);
  ask({0, 4}, 1);
  ask({0, 4}, 0);
  ask({4, 9}, 0);
  ask({1, 4}, 1);  // instead of 0
  ask({0, 9}, 1);  // instead of 1 or 4: 1 comes first
  ask({1, 4}, 1);
}

TEST(RetrievalCache, RowsComeBackBitForBit) {
  expect_rows_come_back(kSmall);
  RetrievalConfig on_disk = kSmall;
  on_disk.folder = ::testing::TempDir();
  expect_rows_come_back(on_disk);
  for (const int loaders : {0, 1, 3})
    for (int round = 0; round < 20; ++round) {
      expect_rows_come_back(kSmall, loaders);
      expect_rows_come_back(on_disk, loaders);
    }
}

TEST(RetrievalCache, DamageOnDiskIsAnErrorAndTheStreamGoesOn) {
  RetrievalConfig on_disk = kSmall;
  on_disk.folder = ::testing::TempDir();
  RetrievalKvCache<float> cache(kShape, 2, on_disk, kNoRotaries);
  for (int i = 0; i < 5; ++i) {
    store(cache, rows(4 * i, 4, 6, 0.1F), rows(4 * i, 4, 4, 0.1F));
    cache.commit();
  }
  std::filesystem::resize_file(cache.store().path(), 10);
  const List frames{2};
  cache.begin_question(frames);
  store(cache, rows(0, 1, 6, 0), rows(0, 1, 4, 0));
  const std::vector<float> zeros(6, 0);
  const auto error = error_of([&] { cache.select(0, {{zeros.data(), 1, 2, 3}, 20, 0}); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
  cache.rollback();
  cache.end_question();
  // The same where loads overlap attention: the step that needs the frame throws.
  cache.overlap_loads(true);
  cache.begin_question(frames);
  store(cache, rows(0, 1, 6, 0), rows(0, 1, 4, 0));
  EXPECT_NO_THROW(cache.select(0, {{zeros.data(), 1, 2, 3}, 20, 0}));
  std::vector<std::byte> record(static_cast<std::size_t>(cache.store().record_bytes()));
  EXPECT_TRUE(cache.load_one(record));
  EXPECT_FALSE(cache.load_one(record));
  std::array<Segment<float>, 16> late;
  const auto later = error_of([&] { cache.late_segments(0, 1, late); });
  ASSERT_TRUE(later);
  EXPECT_EQ(later->code(), ErrorCode::kFormat);
  cache.rollback();
  cache.end_question();
  store(cache, rows(20, 2, 6, 0.1F), rows(20, 2, 4, 0.1F));
  cache.commit();
  EXPECT_EQ(cache.frames(), 7);
}

TEST(RetrievalCache, RefusesWhatMakesNoSense) {
  const auto field = [](RetrievalConfig config) {
    const auto error = error_of([&] { RetrievalKvCache<float>(kShape, 2, config, kNoRotaries); });
    return error ? error->detail().field : "";
  };
  EXPECT_EQ(field(kSmall), "");
  RetrievalConfig config = kSmall;
  config.window_size = 5;
  EXPECT_EQ(field(config), "window_size");
  config = kSmall;
  config.num_slots = 1;
  EXPECT_EQ(field(config), "num_slots");
  config = kSmall;
  config.chunk_frames = 3;
  EXPECT_EQ(field(config), "top_frames");
  config = kSmall;
  config.max_frames = 0;
  EXPECT_EQ(field(config), "max_frames");

  RetrievalKvCache<float> cache(kShape, 2, kSmall, kNoRotaries);
  store(cache, rows(0, 4, 6, 1), rows(0, 4, 4, 1));
  const auto code = [&](const List& frames) {
    return error_of([&] { cache.begin_question(frames); })->code();
  };
  EXPECT_EQ(code({}), ErrorCode::kOrder);
  cache.commit();
  EXPECT_EQ(code({0, 1}), ErrorCode::kConfig);
  EXPECT_EQ(code({0, 0}), ErrorCode::kConfig);
  EXPECT_EQ(code({0, 1, 2}), ErrorCode::kCapacity);
  cache.begin_question();
  EXPECT_EQ(code({}), ErrorCode::kOrder);
}

}  // namespace SLUICE_TEST_UNIT
