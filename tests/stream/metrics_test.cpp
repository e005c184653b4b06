// SPDX-License-Identifier: MIT
#include "sluice/stream/metrics.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "sluice/stream/clock.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::int64_t kMs = 1'000'000;

TEST(StreamMetrics, OneTurnOnAFakeClock) {
  StreamMetrics metrics;
  metrics.set_cache_bytes(4096);
  metrics.on_input(1000 * kMs, 100);  // the turn's clock starts
  metrics.on_input_done(40 * kMs, 100);
  metrics.on_input(1200 * kMs, 20);  // the last input
  metrics.on_input_done(10 * kMs, 20);
  metrics.on_output(1230 * kMs);
  metrics.on_output(1240 * kMs);
  metrics.on_output(1260 * kMs);
  metrics.on_output(1290 * kMs);

  const auto report = metrics.report();
  EXPECT_EQ(report.ttft_from_first_input.count, 1);
  EXPECT_DOUBLE_EQ(report.ttft_from_first_input.p50_ms, 230.0);
  EXPECT_DOUBLE_EQ(report.ttft_from_last_input.p50_ms, 30.0);
  EXPECT_EQ(report.inter_token.count, 3);
  EXPECT_DOUBLE_EQ(report.inter_token.min_ms, 10.0);
  EXPECT_DOUBLE_EQ(report.inter_token.mean_ms, 20.0);
  EXPECT_NEAR(report.inter_token.p50_ms, 20.0, 20.0 / 256);
  EXPECT_NEAR(report.inter_token.p99_9_ms, 30.0, 30.0 / 256);
  EXPECT_DOUBLE_EQ(report.inter_token.max_ms, 30.0);
  EXPECT_DOUBLE_EQ(report.prefill_tokens_per_s, 120 / 0.050);
  EXPECT_DOUBLE_EQ(report.decode_tokens_per_s, 3 / 0.060);
  EXPECT_EQ(report.tokens_read, 120);
  EXPECT_EQ(report.tokens_written, 4);
  EXPECT_EQ(report.turns, 1);
  EXPECT_EQ(report.cache_bytes, 4096);
}

TEST(StreamMetrics, EveryTurnHasItsOwnFirstToken) {
  StreamMetrics metrics;
  std::int64_t now = 0;
  for (int turn = 1; turn <= 10; ++turn) {
    now += 5'000 * kMs;  // somebody thinks: part of no figure
    metrics.on_input(now, 3);
    metrics.on_input(now + 7 * kMs, 1);
    now += (7 + turn) * kMs;
    for (int token = 0; token < 5; ++token) {
      metrics.on_output(now);
      now += 2 * kMs;
    }
    metrics.on_turn_end();
  }
  const auto report = metrics.report();
  EXPECT_EQ(report.turns, 10);
  EXPECT_EQ(report.ttft_from_last_input.count, 10);
  EXPECT_DOUBLE_EQ(report.ttft_from_last_input.min_ms, 1.0);
  EXPECT_DOUBLE_EQ(report.ttft_from_last_input.max_ms, 10.0);
  EXPECT_DOUBLE_EQ(report.ttft_from_last_input.mean_ms, 5.5);
  EXPECT_DOUBLE_EQ(report.ttft_from_first_input.max_ms, 17.0);
  EXPECT_EQ(report.inter_token.count, 40);
  EXPECT_DOUBLE_EQ(report.inter_token.max_ms, 2.0);  // never across turns
  EXPECT_DOUBLE_EQ(report.decode_tokens_per_s, 500.0);
  EXPECT_EQ(report.tokens_read, 40);
}

TEST(StreamMetrics, InputBetweenOutputsIsPartOfTheInterTokenLatencyAndOfNoFirstToken) {
  StreamMetrics metrics;
  metrics.on_input(0, 1);
  metrics.on_output(10 * kMs);
  metrics.on_input(11 * kMs, 1);
  metrics.on_output(30 * kMs);
  const auto report = metrics.report();
  EXPECT_EQ(report.turns, 1);
  EXPECT_EQ(report.ttft_from_last_input.count, 1);
  EXPECT_DOUBLE_EQ(report.ttft_from_last_input.max_ms, 10.0);
  EXPECT_DOUBLE_EQ(report.inter_token.max_ms, 20.0);
}

TEST(StreamMetrics, OutputWithoutInputHasNoTimeToFirstToken) {
  StreamMetrics metrics;
  metrics.on_output(10 * kMs);
  metrics.on_output(20 * kMs);
  const auto report = metrics.report();
  EXPECT_EQ(report.ttft_from_first_input.count, 0);
  EXPECT_EQ(report.ttft_from_last_input.count, 0);
  EXPECT_EQ(report.inter_token.count, 1);
  EXPECT_EQ(report.turns, 1);
}

TEST(StreamMetrics, NothingGivesZerosNotDivisions) {
  StreamMetrics metrics;
  metrics.on_input(5, 10);
  metrics.on_input_done(0, 10);
  metrics.on_output(5);
  const auto report = metrics.report();
  EXPECT_EQ(report.prefill_tokens_per_s, 0.0);
  EXPECT_EQ(report.decode_tokens_per_s, 0.0);
  EXPECT_EQ(report.inter_token.count, 0);
  EXPECT_EQ(report.inter_token.max_ms, 0.0);
}

TEST(StreamMetrics, ResetForgetsAllButTheCacheSize) {
  StreamMetrics metrics;
  metrics.set_cache_bytes(77);
  metrics.on_input(0, 1);
  metrics.on_input_done(10, 1);
  metrics.on_output(10);
  metrics.on_output(20);
  metrics.reset();
  auto report = metrics.report();
  EXPECT_EQ(report.tokens_read, 0);
  EXPECT_EQ(report.tokens_written, 0);
  EXPECT_EQ(report.turns, 0);
  EXPECT_EQ(report.inter_token.count, 0);
  EXPECT_EQ(report.ttft_from_first_input.count, 0);
  EXPECT_EQ(report.prefill_tokens_per_s, 0.0);
  EXPECT_EQ(report.cache_bytes, 77);
  metrics.on_output(1000);  // no input since the reset
  EXPECT_EQ(metrics.report().ttft_from_last_input.count, 0);
  EXPECT_EQ(metrics.report().inter_token.count, 0);
}

TEST(StreamMetrics, PercentilesOfALongStreamMatchSortedGaps) {
  StreamMetrics metrics;
  Random random(1);
  std::vector<std::int64_t> gaps;
  std::int64_t now = 0;
  metrics.on_output(now);
  for (int i = 0; i < 50'000; ++i) {
    gaps.push_back(static_cast<std::int64_t>(2e6 * std::exp(0.3 * random.normal())));
    now += gaps.back();
    metrics.on_output(now);
  }
  std::sort(gaps.begin(), gaps.end());
  const auto exact_ms = [&](double q) {
    const auto rank = static_cast<std::size_t>(std::ceil(q * static_cast<double>(gaps.size())));
    return static_cast<double>(gaps[rank - 1]) * 1e-6;
  };
  const auto summary = metrics.report().inter_token;
  EXPECT_NEAR(summary.p50_ms, exact_ms(0.5), exact_ms(0.5) / 256);
  EXPECT_NEAR(summary.p95_ms, exact_ms(0.95), exact_ms(0.95) / 256);
  EXPECT_NEAR(summary.p99_ms, exact_ms(0.99), exact_ms(0.99) / 256);
  EXPECT_NEAR(summary.p99_9_ms, exact_ms(0.999), exact_ms(0.999) / 256);
  EXPECT_DOUBLE_EQ(summary.max_ms, static_cast<double>(gaps.back()) * 1e-6);
  EXPECT_NEAR(metrics.report().decode_tokens_per_s, 50'000 / (static_cast<double>(now) * 1e-9),
              1e-6);
}

TEST(Clock, IsMonotonicAndCountsNanoseconds) {
  std::int64_t last = monotonic_ns();
  for (int i = 0; i < 100'000; ++i) {
    const std::int64_t now = monotonic_ns();
    ASSERT_GE(now, last);
    last = now;
  }
  const std::int64_t before = monotonic_ns();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const std::int64_t slept = monotonic_ns() - before;
  EXPECT_GE(slept, 20 * kMs);
  EXPECT_LT(slept, 20'000 * kMs);  // the unit is right, however busy the machine
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
