// SPDX-License-Identifier: MIT
/// The list rule of the CUDA backend's groups against the CPU's books, and against slots that are
/// filled one by one: plain arithmetic, which needs no GPU.
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/group_list.hpp>
#include <sluice/cache/retention.hpp>
#include <sluice/core/random.hpp>

namespace {

using namespace sluice;

struct Case {
  RetentionConfig config;
  GroupExtents extents;
};

Case random_case(Random& random) {
  const auto below = [&](std::uint64_t n) {
    return static_cast<std::int64_t>(random.below(n));
  };
  Case result;
  RetentionConfig& c = result.config;
  if (below(4) == 0) {
    c = RetentionConfig::full(200, 1 + below(9));
  } else {
    const std::int64_t sinks = below(5);
    const std::int64_t window = 1 + below(20);
    c = RetentionConfig::sink_window(sinks, window, 1 + below(static_cast<std::uint64_t>(window)));
    c.capacity += below(12);  // a lead
  }
  c.position_rule = below(2) == 0 ? PositionRule::kInCache : PositionRule::kInText;
  c.origin = 0.5 * static_cast<double>(below(40));
  result.extents = {c.num_sink_tokens, c.window_size, c.capacity, c.position_rule, c.origin};
  return result;
}

std::vector<SegmentRule> runs_of(auto&& run) {
  std::vector<SegmentRule> runs;
  for (int which = 0; which < detail::kGroupRuns; ++which)
    if (const SegmentRule rule = run(which); rule.count > 0) runs.push_back(rule);
  return runs;
}

void expect_equal(const std::vector<SegmentRule>& found, std::span<const SegmentRule> expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    SCOPED_TRACE("run " + std::to_string(i));
    EXPECT_EQ(found[i].first_index, expected[i].first_index);
    EXPECT_EQ(found[i].count, expected[i].count);
    EXPECT_EQ(found[i].visible, expected[i].visible);
    EXPECT_EQ(found[i].first_slot, expected[i].first_slot);
    EXPECT_EQ(found[i].first_position, expected[i].first_position);
    EXPECT_EQ(found[i].shift, expected[i].shift);
    EXPECT_EQ(found[i].ceiling, expected[i].ceiling);
    EXPECT_EQ(found[i].kind, expected[i].kind);
  }
}

// Any chunks and roll-backs: snapshots that a reader may hold, and what the newest token sees.
TEST(GroupList, IsWhatRetentionSays) {
  Random random(1);
  for (int n = 0; n < 150; ++n) {
    const Case c = random_case(random);
    SCOPED_TRACE(
        "case " + std::to_string(n) + ": sinks " + std::to_string(c.config.num_sink_tokens) +
        ", window " + std::to_string(c.config.window_size) + ", capacity " +
        std::to_string(c.config.capacity) + ", " + std::string(to_string(c.config.position_rule)));
    Retention retention(c.config);
    EXPECT_EQ(c.extents.ceiling(), retention.reader_place().ceiling);
    for (int step = 0; step < 60; ++step) {
      const auto chunk = static_cast<std::int64_t>(
          1 + random.below(static_cast<std::uint64_t>(c.config.max_chunk)));
      if (retention.status(chunk) != CacheStatus::kOk) break;
      for (std::int64_t t = 0; t < chunk; ++t) {  // one by one: a query each
        retention.append(1);
        std::array<SegmentRule, Retention::kMaxSegments> rules;
        const int count = retention.rules(1, rules);
        expect_equal(runs_of([&](int which) {
                       return detail::own_run(c.extents, retention.total() - 1, which);
                     }),
                     std::span<const SegmentRule>(rules).first(static_cast<std::size_t>(count)));
        retention.commit();
      }
      const auto back = static_cast<std::uint64_t>(retention.max_truncate());
      if (random.below(4) == 0)
        retention.truncate(static_cast<std::int64_t>(random.below(back + 1)));
      const std::int64_t snapshot = static_cast<std::int64_t>(
          random.below(static_cast<std::uint64_t>(retention.total()) + 1));
      const ReaderPlace place{0.25 * static_cast<double>(random.below(99)),
                              random.below(2) == 0 ? kNoCeiling : 17.5};
      std::array<SegmentRule, Retention::kMaxSegments> rules;
      const int count = retention.snapshot_rules(snapshot, place, rules);
      expect_equal(runs_of([&](int which) {
                     return detail::snapshot_run(c.extents, snapshot, place.shift, place.ceiling,
                                                 which);
                   }),
                   std::span<const SegmentRule>(rules).first(static_cast<std::size_t>(count)));
      if (HasFailure()) return;
    }
  }
}

// As far as a writer may go: the rows of a snapshot are still those of its tokens.
TEST(GroupList, RowsOfASnapshotStayWhileTheWriterGoesOn) {
  Random random(2);
  for (int n = 0; n < 60; ++n) {
    const Case c = random_case(random);
    const Retention retention(c.config);
    const std::int64_t sinks = c.config.num_sink_tokens;
    const std::int64_t ring = c.config.capacity - sinks;
    for (std::int64_t snapshot = 0; snapshot < 3 * c.config.capacity; ++snapshot) {
      const bool full = c.config.window_size >= kUnlimitedWindow;
      const std::int64_t total = full ? c.config.capacity : snapshot + retention.max_lead();
      if (snapshot > total) break;
      std::vector<std::int64_t> slots(static_cast<std::size_t>(c.config.capacity), -1);
      for (std::int64_t i = 0; i < total; ++i)
        slots[static_cast<std::size_t>(i < sinks ? i : sinks + (i - sinks) % ring)] = i;
      std::vector<std::int64_t> seen;
      for (const SegmentRule& run : runs_of([&](int which) {
             return detail::snapshot_run(c.extents, snapshot, 0, kNoCeiling, which);
           }))
        for (std::int64_t i = 0; i < run.count; ++i) {
          ASSERT_LT(run.first_slot + i, c.config.capacity);
          ASSERT_EQ(slots[static_cast<std::size_t>(run.first_slot + i)], run.first_index + i);
          seen.push_back(run.first_index + i);
        }
      std::vector<std::int64_t> expected;
      for (std::int64_t i = 0; i < snapshot; ++i)
        if (i < sinks || i >= snapshot - c.config.window_size) expected.push_back(i);
      ASSERT_EQ(seen, expected) << "snapshot " << snapshot;
    }
  }
}

}  // namespace
