// SPDX-License-Identifier: MIT
#include "sluice/core/signal.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "sluice/core/spsc_ring.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

TEST(Signal, ARaiseBetweenLookingAndWaitingIsNotMissed) {
  Signal signal;
  const auto seen = signal.now();
  signal.raise();
  signal.wait(seen);  // returns at once
  EXPECT_NE(signal.now(), seen);
}

// Two threads hand a turn to each other; a lost wake-up would hang the test.
TEST(Signal, PingPong) {
  Signal signal;
  std::atomic<int> turn{0};
  constexpr int kTurns = 20000;
  const auto play = [&](int mine) {
    for (int i = mine; i < kTurns; i += 2) {
      for (;;) {
        const auto seen = signal.now();
        if (turn.load() == i) break;
        signal.wait(seen);
      }
      turn.store(i + 1);
      signal.raise();
    }
  };
  {
    std::jthread one(play, 0);
    std::jthread two(play, 1);
  }
  EXPECT_EQ(turn, kTurns);
}

TEST(SpscRing, FirstInFirstOutUpToItsCapacity) {
  SpscRing<int> ring(2);
  int item = 0;
  EXPECT_FALSE(ring.try_pop(item));
  EXPECT_TRUE(ring.try_push(1));
  EXPECT_TRUE(ring.try_push(2));
  EXPECT_EQ(ring.room(), 0);
  EXPECT_FALSE(ring.try_push(3));
  EXPECT_EQ(*ring.front(), 1);
  EXPECT_TRUE(ring.try_pop(item));
  EXPECT_EQ(item, 1);
  EXPECT_EQ(ring.room(), 1);
  EXPECT_TRUE(ring.try_push(3));
  EXPECT_TRUE(ring.try_pop(item));
  EXPECT_TRUE(ring.try_pop(item));
  EXPECT_EQ(item, 3);
  EXPECT_EQ(ring.front(), nullptr);
}

TEST(SpscRing, TwoThreads) {
  SpscRing<std::int64_t> ring(5);
  constexpr std::int64_t kItems = 50000;
  std::jthread producer([&] {
    for (std::int64_t i = 0; i < kItems; ++i)
      while (!ring.try_push(i)) std::this_thread::yield();
  });
  for (std::int64_t i = 0; i < kItems; ++i) {
    std::int64_t item = -1;
    while (!ring.try_pop(item)) std::this_thread::yield();
    ASSERT_EQ(item, i);
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
