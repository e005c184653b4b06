// SPDX-License-Identifier: MIT
#include "sluice/stream/stream_times.hpp"

#include <cmath>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::int64_t kMs = 1'000'000;

EventLog log_of(const std::vector<Event>& events) {
  EventLog log(64);
  for (const Event& event : events) log.record(event);
  return log;
}

Event input(std::int64_t clock, std::int64_t ms) {
  return {clock, ms * kMs, 0, EventKind::kInput};
}
Event final_token(std::int64_t clock, std::int64_t ms, Token token) {
  return {clock, ms * kMs, token, EventKind::kOutput};
}
Event provisional(std::int64_t clock, std::int64_t ms, Token token) {
  return {clock, ms * kMs, token, EventKind::kProvisional};
}

// Source clock in samples at 1 kHz: one a millisecond. Audio of 400 ms in packets of 100.
TEST(StreamTimes, EveryClockHasItsStartAndEnd) {
  const EventLog log =
      log_of({input(100, 1100), input(200, 1200), final_token(200, 1230, 5), input(300, 1300),
              final_token(300, 1340, 6), input(400, 1400), final_token(400, 1470, 7)});
  const StreamTimes times = stream_times(log, {.input_finished_ns = 1410 * kMs,
                                               .trigger_ns = 1200 * kMs,
                                               .busy_ns = 100.0 * kMs,
                                               .media_ns = 400.0 * kMs});
  EXPECT_DOUBLE_EQ(times.ttft_from_first_input_ms, 130);
  EXPECT_DOUBLE_EQ(times.ttft_from_last_input_ms, -170);
  EXPECT_DOUBLE_EQ(times.ttft_from_trigger_ms, 30);
  EXPECT_DOUBLE_EQ(times.final_ttft_from_first_input_ms, 130);
  EXPECT_DOUBLE_EQ(times.start_offset, 200);
  EXPECT_DOUBLE_EQ(times.tail_ms, 60);
  EXPECT_EQ(times.inter_token.count, 2);
  EXPECT_DOUBLE_EQ(times.inter_token.mean_ms, 120);
  EXPECT_DOUBLE_EQ(times.real_time_factor, 0.25);
  EXPECT_DOUBLE_EQ(times.simuleval_rtf, 1.0);
  EXPECT_DOUBLE_EQ(times.simuleval_rtf_elapsed, 370.0 / 400.0);
  EXPECT_EQ(times.final_tokens, 3);
  EXPECT_EQ(times.revisions, 0);
  EXPECT_EQ(times.revisions_per_token, 0);
}

TEST(StreamTimes, RevisionsAreWhatWasShownAndChanged) {
  const EventLog log = log_of({
      input(100, 100), provisional(100, 110, 1), provisional(100, 111, 2),  // 1 2
      input(200, 200), provisional(200, 210, 1), provisional(200, 211, 3),
      provisional(200, 212, 4),                            // 1 3 4: one changed
      input(300, 300), final_token(300, 310, 1),           // stands
      provisional(300, 311, 3), provisional(300, 312, 5),  // 3 5: one changed
      input(400, 400), final_token(400, 410, 3),           // stands
      provisional(400, 420, 5),                            // the same
      final_token(400, 430, 6),                            // 5 became 6
  });
  const StreamTimes times = stream_times(log);
  EXPECT_EQ(times.revisions, 3);
  EXPECT_EQ(times.provisional_tokens, 8);
  EXPECT_EQ(times.final_tokens, 3);
  EXPECT_DOUBLE_EQ(times.revisions_per_token, 1);
  EXPECT_DOUBLE_EQ(times.ttft_from_first_input_ms, 10);
  EXPECT_DOUBLE_EQ(times.final_ttft_from_first_input_ms, 210);
  EXPECT_DOUBLE_EQ(times.tail_ms, 30);
}

TEST(StreamTimes, AShorterHypothesisTakesTheRestBack) {
  const EventLog log = log_of(
      {provisional(1, 1, 7), provisional(1, 1, 8), provisional(1, 1, 9), provisional(2, 2, 7)});
  EXPECT_EQ(stream_times(log).revisions, 2);
}

TEST(StreamTimes, WhatDidNotHappenIsNotANumber) {
  const StreamTimes none = stream_times(log_of({}));
  EXPECT_TRUE(std::isnan(none.ttft_from_first_input_ms));
  EXPECT_TRUE(std::isnan(none.tail_ms));
  EXPECT_TRUE(std::isnan(none.real_time_factor));
  EXPECT_TRUE(std::isnan(none.revisions_per_token));
  EXPECT_EQ(none.inter_token.count, 0);
  const StreamTimes output = stream_times(log_of({final_token(3, 5, 1)}));
  EXPECT_TRUE(std::isnan(output.ttft_from_first_input_ms));
  EXPECT_TRUE(std::isnan(output.simuleval_rtf));
  EXPECT_DOUBLE_EQ(output.start_offset, 3);
}

TEST(StreamTimes, WordEmissionLag) {
  EXPECT_DOUBLE_EQ(word_emission_lag_ms(std::vector<std::int64_t>{500 * kMs, 900 * kMs},
                                        std::vector<std::int64_t>{300 * kMs, 800 * kMs}),
                   150);
  EXPECT_TRUE(std::isnan(word_emission_lag_ms({}, {})));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
