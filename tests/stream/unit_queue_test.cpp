// SPDX-License-Identifier: MIT
#include "sluice/stream/unit_queue.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

TEST(UnitQueue, KeepsUnitsWholeAndInOrder) {
  UnitQueue queue(2, 5);
  EXPECT_EQ(queue.front(), nullptr);
  EXPECT_TRUE(queue.try_push(std::vector<Token>{1, 2, 3}, 10, false));
  EXPECT_FALSE(queue.try_push(std::vector<Token>{4, 5, 6}, 11, false));  // tokens
  EXPECT_TRUE(queue.try_push(std::vector<Token>{4}, 12, false));
  EXPECT_FALSE(queue.try_push(std::vector<Token>{5}, 13, true));  // units
  ASSERT_NE(queue.front(), nullptr);
  EXPECT_EQ(queue.front()->tokens, 3);
  EXPECT_EQ(queue.front()->arrival_ns, 10);
  std::vector<Token> out(3);
  queue.copy_front(out);
  EXPECT_EQ(out, (std::vector<Token>{1, 2, 3}));
  queue.pop();
  EXPECT_TRUE(queue.try_push(std::vector<Token>{5, 6, 7, 8}, 14, true));  // over the ring's end
  queue.pop();
  EXPECT_TRUE(queue.front()->last);
  out.resize(4);
  queue.copy_front(out);
  EXPECT_EQ(out, (std::vector<Token>{5, 6, 7, 8}));
  queue.pop();
  EXPECT_EQ(queue.front(), nullptr);
}

TEST(UnitQueue, HoldsTokensAndEmbeddingsInOrder) {
  UnitQueue queue(3, 2, 3, 2);
  EXPECT_EQ(queue.max_rows(), 3);
  const std::vector<float> rows{1, 2, 3, 4, 5, 6};
  const auto of = [&](std::int64_t first, std::int64_t count) {
    return MatrixView<const float>(rows.data() + 2 * first, count, 2);
  };
  EXPECT_TRUE(queue.try_push(of(0, 2), 10, false));
  EXPECT_TRUE(queue.try_push(std::vector<Token>{7, 8}, 11, false));
  EXPECT_FALSE(queue.try_push(std::vector<Token>{9}, 12, false));  // tokens
  EXPECT_FALSE(queue.try_push(of(0, 2), 12, false));               // rows
  ASSERT_TRUE(queue.front()->embedded);
  std::vector<float> out(4);
  queue.copy_front(MatrixView<float>(out.data(), 2, 2));
  EXPECT_EQ(out, (std::vector<float>{1, 2, 3, 4}));
  queue.pop();
  EXPECT_TRUE(queue.try_push(of(1, 2), 13, true));  // over the ring's end
  std::vector<Token> tokens(2);
  ASSERT_FALSE(queue.front()->embedded);
  queue.copy_front(tokens);
  EXPECT_EQ(tokens, (std::vector<Token>{7, 8}));
  queue.pop();
  queue.copy_front(MatrixView<float>(out.data(), 2, 2));
  EXPECT_EQ(out, (std::vector<float>{3, 4, 5, 6}));
  EXPECT_TRUE(queue.front()->last);
  queue.pop();
  EXPECT_EQ(queue.front(), nullptr);
  EXPECT_EQ(UnitQueue(1, 1).max_rows(), 0);
}

TEST(UnitQueue, RefusesSizesOutOfRange) {
  EXPECT_THROW(UnitQueue(1, 1, 1, 0), Error);
  EXPECT_THROW(UnitQueue(1, 1, -1, 1), Error);
  EXPECT_THROW(UnitQueue(1, 1, 0, 64), Error);
  EXPECT_THROW(UnitQueue(0, 5), Error);
  EXPECT_THROW(UnitQueue(5, 0), Error);
  EXPECT_THROW(UnitQueue(5, std::int64_t{1} << 40), Error);
}

TEST(UnitQueue, TwoThreads) {
  UnitQueue queue(3, 7);
  constexpr int kUnits = 20000;
  std::jthread producer([&] {
    Random random(1);
    for (int u = 0; u < kUnits; ++u) {
      const std::vector<Token> unit(1 + random.below(4), static_cast<Token>(u));
      while (!queue.try_push(unit, u, u + 1 == kUnits)) std::this_thread::yield();
    }
  });
  std::vector<Token> out(4);
  for (int u = 0; u < kUnits; ++u) {
    while (queue.front() == nullptr) std::this_thread::yield();
    const QueuedUnit unit = *queue.front();
    queue.copy_front(out);
    queue.pop();
    ASSERT_EQ(unit.arrival_ns, u);
    ASSERT_EQ(unit.last, u + 1 == kUnits);
    for (std::int64_t i = 0; i < unit.tokens; ++i)
      ASSERT_EQ(out[static_cast<std::size_t>(i)], static_cast<Token>(u));
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
