// SPDX-License-Identifier: MIT
// Eviction at the end of a chunk, as DuoAttention's streaming heads have it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "sluice/cache/retention.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

using Indices = std::vector<std::int64_t>;

/// Stream indices that the newest `queries` tokens are shown, the causal rule left aside.
Indices shown(const Retention& retention, std::int64_t queries) {
  std::array<SegmentRule, Retention::kMaxSegments> rules;
  const int count = retention.rules(queries, rules);
  Indices indices;
  for (int r = 0; r < count; ++r)
    for (std::int64_t i = 0; i < rules[static_cast<std::size_t>(r)].count; ++i)
      indices.push_back(rules[static_cast<std::size_t>(r)].first_index + i);
  return indices;
}

/// Keys that the last of `tokens` tokens sees, read in chunks of `chunk`.
Indices seen_by_the_last(std::int64_t tokens, std::int64_t chunk) {
  Retention retention(RetentionConfig::per_chunk(1, 2, chunk));
  for (std::int64_t read = 0; read < tokens; read += chunk) {
    retention.append(chunk);
    if (read + chunk == tokens) return shown(retention, chunk);
    retention.commit();
  }
  return {};
}

// core-algorithms.md, test 6.5: sink 1, recent 2, tokens 0 to 5.
TEST(PerChunk, TypedInVisibility) {
  EXPECT_EQ(seen_by_the_last(6, 6), (Indices{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(seen_by_the_last(6, 2), (Indices{0, 2, 3, 4, 5}));
  EXPECT_EQ(seen_by_the_last(6, 1), (Indices{0, 3, 4, 5}));
  // The training mask is the exact window: recent 2 counts the token itself.
  Retention exact(RetentionConfig::sink_window(1, 2, 1));
  for (int t = 0; t < 5; ++t) {
    exact.append(1);
    exact.commit();
  }
  exact.append(1);
  EXPECT_EQ(shown(exact, 1), (Indices{0, 4, 5}));
}

/// A retention beside a list of the kept tokens, and which token each slot holds.
struct Model {
  RetentionConfig config;
  Retention retention;
  Indices kept;  // committed
  Indices uncommitted;
  std::map<std::int64_t, std::int64_t> slots;  // slot -> token

  explicit Model(const RetentionConfig& c) : config(c), retention(c) {}

  void append(std::int64_t tokens) {
    ASSERT_EQ(retention.status(tokens), CacheStatus::kOk);
    for (std::int64_t t = 0; t < tokens; ++t) uncommitted.push_back(retention.total() + t);
    retention.append(tokens);
    for (std::int64_t back = tokens; back >= 1; --back)
      slots[retention.slot_of_newest(back)] = retention.total() - back;
  }
  void commit() {
    retention.commit();
    kept.insert(kept.end(), uncommitted.begin(), uncommitted.end());
    uncommitted.clear();
    Indices stay;
    const auto count = static_cast<std::int64_t>(kept.size());
    for (std::int64_t rank = 0; rank < count; ++rank)
      if (rank < config.num_sink_tokens || rank >= count - config.window_size)
        stay.push_back(kept[static_cast<std::size_t>(rank)]);
    kept = stay;
  }
  void check() const {
    const auto fresh = static_cast<std::int64_t>(uncommitted.size());
    Indices expected = kept;
    expected.insert(expected.end(), uncommitted.begin(), uncommitted.end());
    ASSERT_EQ(shown(retention, fresh), expected);
    ASSERT_EQ(retention.size(), static_cast<std::int64_t>(expected.size()));
    std::array<SegmentRule, Retention::kMaxSegments> rules;
    const int count = retention.rules(fresh, rules);
    for (int r = 0; r < count; ++r) {
      const SegmentRule& rule = rules[static_cast<std::size_t>(r)];
      ASSERT_LE(rule.first_slot + rule.count, config.capacity);
      for (std::int64_t i = 0; i < rule.count; ++i)
        ASSERT_EQ(slots.at(rule.first_slot + i), rule.first_index + i);
      // At their places in the text.
      ASSERT_EQ(rule.reader_position(100) - rule.first_position,
                static_cast<Position>(100 - rule.first_index));
    }
  }
};

TEST(PerChunk, AgreesWithAListOfKeptTokens) {
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    Random random(seed);
    const auto below = [&](std::uint64_t n) {
      return static_cast<std::int64_t>(random.below(n));
    };
    RetentionConfig config = RetentionConfig::per_chunk(below(4), 1 + below(6), 1 + below(9));
    config.capacity += below(3);
    if (seed % 2 == 0) config.key_form = KeyForm::kRaw;
    Model model(config);
    for (int step = 0; step < 120; ++step) {
      const auto fresh = static_cast<std::int64_t>(model.uncommitted.size());
      switch (random.below(6)) {
        case 0:
        case 1:
        case 2: {
          const std::int64_t room = config.max_chunk - fresh;
          if (room > 0) model.append(1 + below(static_cast<std::uint64_t>(room)));
          break;
        }
        case 3: model.commit(); break;
        case 4:
          model.retention.rollback();
          model.uncommitted.clear();
          break;
        default: {
          // What was read since the last commit comes back, and everything before tokens left.
          const bool all =
              model.retention.committed() <= config.num_sink_tokens + config.window_size;
          ASSERT_EQ(model.retention.max_truncate(), all ? model.retention.total() : fresh);
          const std::int64_t tokens =
              below(static_cast<std::uint64_t>(model.retention.max_truncate()) + 1);
          model.retention.truncate(tokens);
          for (std::int64_t i = 0; i < tokens; ++i) {
            Indices& from = model.uncommitted.empty() ? model.kept : model.uncommitted;
            from.pop_back();
          }
        }
      }
      model.check();
      if (::testing::Test::HasFatalFailure()) FAIL() << "seed " << seed << ", step " << step;
      if (!model.uncommitted.empty()) continue;
      ByteWriter writer;
      model.retention.save(writer);
      ByteReader reader(writer.bytes(), "snapshot");
      Retention restored(config);
      restored.restore(reader);
      ASSERT_EQ(shown(restored, 0), model.kept);
    }
  }
}

TEST(PerChunk, ConfigurationsThatDoNotFit) {
  RetentionConfig in_cache = RetentionConfig::per_chunk(2, 4, 8);
  in_cache.position_rule = PositionRule::kInCache;
  EXPECT_THROW(Retention{in_cache}, Error);
  RetentionConfig small = RetentionConfig::per_chunk(2, 4, 8);
  small.capacity -= 1;
  EXPECT_THROW(Retention{small}, Error);
  EXPECT_THROW(Retention{RetentionConfig::per_chunk(2, 0, 8)}, Error);
  EXPECT_FALSE(Retention(RetentionConfig::per_chunk(2, 4, 8)).supports_snapshots());
}

TEST(PerChunk, EndlessInTheSameSlots) {
  Retention retention(RetentionConfig::per_chunk(4, 16, 8));
  for (int chunk = 0; chunk < 200'000; ++chunk) {
    retention.append(8);
    ASSERT_LT(retention.slot_of_newest(1), 28);
    retention.commit();
  }
  EXPECT_EQ(retention.size(), 20);
  EXPECT_EQ(shown(retention, 0).back(), 8 * 200'000 - 1);
}

}  // namespace SLUICE_TEST_UNIT
