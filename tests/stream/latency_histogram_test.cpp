// SPDX-License-Identifier: MIT
#include "sluice/stream/latency_histogram.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();

// Nearest rank on the sorted values: the definition that quantile_ns() states.
std::int64_t sorted_quantile(const std::vector<std::int64_t>& sorted, double q) {
  const auto rank = static_cast<std::size_t>(std::ceil(q * static_cast<double>(sorted.size())));
  return sorted[std::max<std::size_t>(rank, 1) - 1];
}

// The bound: a bucket is 1/128 of its lower end wide, its middle at most half of that away.
void expect_close(std::int64_t found, std::int64_t exact) {
  ASSERT_LE(std::abs(static_cast<double>(found) - static_cast<double>(exact)),
            static_cast<double>(exact) / 256)
      << found << " for " << exact;
}

TEST(LatencyHistogram, EveryValueAloneComesBackWithinTheBound) {
  // One value would be exact through minimum and maximum, so bracket it between extremes.
  const auto median_of = [](std::int64_t value) {
    LatencyHistogram histogram;
    histogram.record(0);
    histogram.record(value);
    histogram.record(kLargest);
    return histogram.quantile_ns(0.5);
  };
  for (std::int64_t value = 0; value < 256; ++value) ASSERT_EQ(median_of(value), value);
  for (std::int64_t value = 256; value < 2100; ++value) expect_close(median_of(value), value);
  Random random(1);
  for (int bits = 9; bits <= 63; ++bits) {
    const std::int64_t low = std::int64_t{1} << (bits - 1);
    for (std::int64_t value :
         {low - 1, low, low + 1, low + low / 128 - 1, low + low / 128, low + (low - 1)})
      expect_close(median_of(value), value);
    for (int i = 0; i < 20; ++i) {
      const std::int64_t value =
          low + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(low)));
      expect_close(median_of(value), value);
    }
  }
}

TEST(LatencyHistogram, QuantilesMatchSortedValues) {
  Random random(2);
  for (int trial = 0; trial < 30; ++trial) {
    std::vector<std::int64_t> values(1 + random.below(20'000));
    LatencyHistogram histogram;
    const double spread = 3 * random.uniform();
    for (std::int64_t& value : values) {
      value = static_cast<std::int64_t>(std::exp(12.0 + spread * random.normal()));  // about 160 us
      histogram.record(value);
    }
    std::sort(values.begin(), values.end());
    for (double q : {0.001, 0.1, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999})
      ASSERT_NO_FATAL_FAILURE(expect_close(histogram.quantile_ns(q), sorted_quantile(values, q)));
    ASSERT_EQ(histogram.quantile_ns(0.0), values.front());
    ASSERT_EQ(histogram.quantile_ns(1.0), values.back());
    ASSERT_EQ(histogram.min_ns(), values.front());
    ASSERT_EQ(histogram.max_ns(), values.back());
    ASSERT_EQ(histogram.count(), static_cast<std::int64_t>(values.size()));
    std::uint64_t sum = 0;
    for (std::int64_t value : values) sum += static_cast<std::uint64_t>(value);
    ASSERT_EQ(histogram.sum_ns(), sum);
    ASSERT_EQ(histogram.mean_ns(), static_cast<double>(sum) / static_cast<double>(values.size()));
  }
}

TEST(LatencyHistogram, EmptyIsZero) {
  const LatencyHistogram histogram;
  EXPECT_EQ(histogram.count(), 0);
  EXPECT_EQ(histogram.min_ns(), 0);
  EXPECT_EQ(histogram.max_ns(), 0);
  EXPECT_EQ(histogram.mean_ns(), 0.0);
  for (double q : {0.0, 0.5, 1.0}) EXPECT_EQ(histogram.quantile_ns(q), 0);
}

TEST(LatencyHistogram, OneValueIsExactAtEveryQuantile) {
  LatencyHistogram histogram;
  histogram.record(123'456'789);
  for (double q : {0.0, 0.01, 0.5, 0.999, 1.0}) EXPECT_EQ(histogram.quantile_ns(q), 123'456'789);
}

TEST(LatencyHistogram, NegativeCountsAsZeroAndTheLargestFits) {
  LatencyHistogram histogram;
  histogram.record(-5);
  histogram.record(kLargest);
  EXPECT_EQ(histogram.min_ns(), 0);
  EXPECT_EQ(histogram.max_ns(), kLargest);
  EXPECT_EQ(histogram.quantile_ns(0.5), 0);
  EXPECT_EQ(histogram.quantile_ns(1.0), kLargest);
  EXPECT_EQ(histogram.count(), 2);
}

TEST(LatencyHistogram, MergeEqualsRecordingBoth) {
  Random random(3);
  LatencyHistogram a;
  LatencyHistogram b;
  LatencyHistogram both;
  for (int i = 0; i < 5000; ++i) {
    const auto value = static_cast<std::int64_t>(random.below(1'000'000));
    (i % 3 == 0 ? a : b).record(value);
    both.record(value);
  }
  a.merge(b);
  a.merge(LatencyHistogram());  // empty is neutral
  EXPECT_EQ(a.count(), both.count());
  EXPECT_EQ(a.sum_ns(), both.sum_ns());
  EXPECT_EQ(a.min_ns(), both.min_ns());
  EXPECT_EQ(a.max_ns(), both.max_ns());
  for (int i = 0; i <= 1000; ++i)
    ASSERT_EQ(a.quantile_ns(i / 1000.0), both.quantile_ns(i / 1000.0));
  LatencyHistogram into_empty;
  into_empty.merge(a);
  EXPECT_EQ(into_empty.min_ns(), a.min_ns());
}

TEST(LatencyHistogram, ResetForgets) {
  LatencyHistogram histogram;
  histogram.record(7);
  histogram.record(70'000);
  histogram.reset();
  EXPECT_EQ(histogram.count(), 0);
  EXPECT_EQ(histogram.quantile_ns(0.5), 0);
  EXPECT_EQ(histogram.max_ns(), 0);
  histogram.record(100);
  EXPECT_EQ(histogram.min_ns(), 100);
  EXPECT_EQ(histogram.max_ns(), 100);
}

TEST(LatencyHistogram, CanBeReadWhileItIsWritten) {
  LatencyHistogram histogram;
  std::atomic<bool> done{false};
  std::jthread reader([&] {
    std::int64_t last_count = 0;
    while (!done.load(std::memory_order_relaxed)) {
      const std::int64_t count = histogram.count();
      ASSERT_GE(count, last_count);
      last_count = count;
      const std::int64_t median = histogram.quantile_ns(0.5);
      ASSERT_GE(median, 0);
      ASSERT_LE(median, 1000);
    }
  });
  for (int i = 0; i < 100'000; ++i) histogram.record(i % 1000);
  done = true;
  reader.join();
  EXPECT_EQ(histogram.count(), 100'000);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
