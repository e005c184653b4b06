// SPDX-License-Identifier: MIT
#include "sluice/stream/sample_queue.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// More pieces wait than arrivals are remembered: what is told of the newest is too early, and says
// so, until a piece that comes later stands for them.
TEST(SampleQueue, SaysWhichArrivalsItDoesNotKnow) {
  SampleQueue queue(10000);
  const std::array<float, 1> sample{0.5F};
  for (std::int64_t piece = 1; piece <= 5000; ++piece)
    ASSERT_EQ(queue.push(sample, 10 * piece), 1U);
  EXPECT_EQ(queue.waiting(), 5000);
  for (const std::int64_t place : {1, 2000, 4096}) {
    EXPECT_EQ(queue.arrival_before(place), 10 * place);
    EXPECT_TRUE(queue.arrival_known());
  }
  EXPECT_EQ(queue.arrival_before(4500), 40960);
  EXPECT_FALSE(queue.arrival_known());
  ASSERT_EQ(queue.push(sample, 60000), 1U);
  for (const std::int64_t place : {4500, 5000, 5001}) {
    EXPECT_EQ(queue.arrival_before(place), 60000);
    EXPECT_TRUE(queue.arrival_known());
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
