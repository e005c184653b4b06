// SPDX-License-Identifier: MIT
#include "sluice/stream/event_log.hpp"
#include "support/test_unit.hpp"

#include <cstdint>
#include <deque>
#include <string>

#include <gtest/gtest.h>

namespace sluice {
namespace SLUICE_TEST_UNIT {

Event event(std::int64_t n) {
  constexpr EventKind kKinds[] = {EventKind::kInput, EventKind::kOutput, EventKind::kProvisional};
  return {n * 3, n * 1'000'000'007, static_cast<Token>(n % 50'000), kKinds[n % 3]};
}

void expect_same(const Event& found, const Event& expected) {
  ASSERT_EQ(found.source_clock, expected.source_clock);
  ASSERT_EQ(found.time_ns, expected.time_ns);
  ASSERT_EQ(found.token, expected.token);
  ASSERT_EQ(found.kind, expected.kind);
}

TEST(EventLog, HoldsTheLatestInOrderAndCountsTheRest) {
  for (std::int64_t capacity : {1, 2, 3, 7, 100}) {
    EventLog log(capacity);
    EXPECT_EQ(log.capacity(), capacity);
    std::deque<Event> expected;
    std::int64_t dropped = 0;
    for (std::int64_t n = 0; n < 250; ++n) {
      log.record(event(n));
      expected.push_back(event(n));
      if (static_cast<std::int64_t>(expected.size()) > capacity) {
        expected.pop_front();
        ++dropped;
      }
      ASSERT_EQ(log.size(), static_cast<std::int64_t>(expected.size()));
      ASSERT_EQ(log.dropped(), dropped);
      std::size_t index = 0;
      log.for_each([&](const Event& found) { expect_same(found, expected.at(index++)); });
      ASSERT_EQ(index, expected.size());
      expect_same(log[0], expected.front());
      expect_same(log[log.size() - 1], expected.back());
    }
  }
}

TEST(EventLog, StartsEmptyAndClears) {
  EventLog log(3);
  EXPECT_EQ(log.size(), 0);
  log.for_each([](const Event&) { FAIL(); });
  for (std::int64_t n = 0; n < 5; ++n) log.record(event(n));
  EXPECT_EQ(log.dropped(), 2);
  log.clear();
  EXPECT_EQ(log.size(), 0);
  EXPECT_EQ(log.dropped(), 0);
  log.record(event(9));
  ASSERT_EQ(log.size(), 1);
  expect_same(log[0], event(9));
}

TEST(EventLog, ClocksAre64Bit) {
  EventLog log(1);
  const Event late{std::int64_t{1} << 40, std::int64_t{1} << 61, 1, EventKind::kInput};
  log.record(late);
  expect_same(log[0], late);
}

TEST(EventLog, CapacityOutOfRangeIsNamed) {
  for (std::int64_t capacity : {std::int64_t{0}, std::int64_t{-1}, std::int64_t{1} << 40}) {
    try {
      EventLog log(capacity);
      ADD_FAILURE() << capacity;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, "capacity");
      EXPECT_EQ(error.detail().found, std::to_string(capacity));
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
