// SPDX-License-Identifier: MIT
#include "sluice/stream/deadline.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::int64_t kMs = 1'000'000;

// --- Measuring -----------------------------------------------------------------------------------

DeadlineReport measure(DeadlineAnchor anchor, std::int64_t start_ns) {
  DeadlineMeter meter(10.0, anchor, start_ns);
  std::int64_t index = 0;
  for (const std::int64_t finished : {90, 195, 310, 395, 520, 600})
    meter.on_frame(index++, start_ns + finished * kMs);
  return meter.report();
}

// 10 frames a second, frames finished at 90, 195, 310, 395, 520, 600 ms.
TEST(DeadlineMeter, TypedInExample) {
  for (const std::int64_t start : {std::int64_t{0}, std::int64_t{1} << 55}) {
    const DeadlineReport report = measure(DeadlineAnchor::kStreamStart, start);
    EXPECT_EQ(report.frames, 6);
    EXPECT_EQ(report.misses, 2);
    EXPECT_DOUBLE_EQ(report.miss_rate, 2.0 / 6.0);
    EXPECT_DOUBLE_EQ(report.mean_gap_ms, 102.0);
    EXPECT_NEAR(report.gap_deviation_ms, 17.204651, 5e-7);
    EXPECT_DOUBLE_EQ(report.largest_gap_ms, 125.0);
    EXPECT_NEAR(report.gap_p99_less_p50_ms, 125.0 - 105.0, 105.0 / 256);  // a histogram's bucket
    EXPECT_DOUBLE_EQ(report.start_up_delay_ms, 120.0);

    const DeadlineReport from_first = measure(DeadlineAnchor::kFirstFrame, start);
    EXPECT_EQ(from_first.misses, 5);
    EXPECT_DOUBLE_EQ(from_first.start_up_delay_ms, 120.0);
  }
}

TEST(DeadlineMeter, WhichFramesAreLate) {
  DeadlineMeter meter(10.0, DeadlineAnchor::kStreamStart, 0);
  std::vector<std::int64_t> late;
  std::int64_t index = 0;
  std::int64_t misses = 0;
  for (const std::int64_t finished : {90, 195, 310, 395, 520, 600}) {
    meter.on_frame(index, finished * kMs);
    if (meter.report().misses > misses) late.push_back(index);
    misses = meter.report().misses;
    ++index;
  }
  EXPECT_EQ(late, (std::vector<std::int64_t>{2, 4}));
}

TEST(DeadlineMeter, DoesNotDrift) {
  // An hour and a day at 30000/1001 frames a second: the deadline is the exact one, rounded.
  const DeadlineMeter meter(30000.0 / 1001.0, DeadlineAnchor::kStreamStart, 0);
  for (const std::int64_t frame : {0, 1, 107891, 2589409}) {
    const std::int64_t exact = (frame + 1) * 1001 * 100000 / 3;  // 1001 / 30000 s, in ns
    EXPECT_NEAR(static_cast<double>(meter.deadline_ns(frame) - exact), 0.0, 1.0) << frame;
  }
}

TEST(DeadlineMeter, FramesLeftOutKeepTheirTime) {
  DeadlineMeter meter(10.0, DeadlineAnchor::kStreamStart, 0);
  meter.on_frame(0, 100 * kMs);  // on the dot: in time
  meter.on_skipped();
  meter.on_frame(2, 300 * kMs);
  const DeadlineReport report = meter.report();
  EXPECT_EQ(report.misses, 0);
  EXPECT_EQ(report.frames, 2);
  EXPECT_EQ(report.skipped, 1);
  EXPECT_DOUBLE_EQ(report.largest_gap_ms, 200.0);
}

TEST(DeadlineMeter, WithoutFramesNothingIsDefined) {
  const DeadlineReport report = DeadlineMeter(25.0, DeadlineAnchor::kFirstFrame, 5).report();
  EXPECT_TRUE(std::isnan(report.miss_rate));
  EXPECT_TRUE(std::isnan(report.mean_gap_ms));
  EXPECT_TRUE(std::isnan(report.start_up_delay_ms));
  for (const double rate : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
    const auto error =
        test::error_of([&] { DeadlineMeter meter(rate, DeadlineAnchor::kStreamStart, 0); });
    ASSERT_TRUE(error) << rate;
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
    EXPECT_EQ(error->detail().field, "rate");
  }
}

// --- Predicting ----------------------------------------------------------------------------------

TEST(StepCost, MeanAndPercentileByDefinition) {
  StepCost cost(0.25, 50);
  EXPECT_EQ(cost.predicted_ns(), 0);
  Random random(3);
  std::vector<std::int64_t> all;
  double mean = 0;
  for (int i = 0; i < 300; ++i) {
    const std::int64_t value = test::between(random, 1, 1'000'000);
    mean = i == 0 ? static_cast<double>(value) : 0.75 * mean + 0.25 * static_cast<double>(value);
    all.push_back(value);
    cost.record(value);
    std::vector<std::int64_t> latest(all.end() - std::min<std::ptrdiff_t>(50, std::ssize(all)),
                                     all.end());
    std::sort(latest.begin(), latest.end());
    const auto rank = (99 * latest.size() + 99) / 100;
    ASSERT_EQ(cost.p99_ns(), latest[rank - 1]);
    ASSERT_NEAR(static_cast<double>(cost.mean_ns()), mean, 1.0);
    ASSERT_EQ(cost.predicted_ns(), std::max(cost.mean_ns(), cost.p99_ns()));
  }
}

// --- Shedding ------------------------------------------------------------------------------------

struct Outcome {
  DeadlineReport deadlines;
  WorkShedder::Counts counts;
};

// A hundred frames at 10 a second on a virtual clock; a unit of work costs 10 ms, and 20 ms from
// frame 40 to frame 59.
Outcome play(const SheddingConfig& config, std::int64_t fixed_ms = 0) {
  WorkShedder shedder(config);
  DeadlineMeter meter(10.0, DeadlineAnchor::kStreamStart, 0);
  std::int64_t now = 0;
  for (std::int64_t frame = 0; frame < 100; ++frame) {
    now = std::max(now, frame * 100 * kMs);  // the frame is there
    const auto choice = shedder.decide(meter.deadline_ns(frame) - now);
    if (choice.skip) {
      meter.on_skipped();
      continue;
    }
    const std::int64_t cost =
        (fixed_ms + choice.amount * (frame >= 40 && frame < 60 ? 20 : 10)) * kMs;
    now += cost;
    shedder.on_step(choice.index, cost);
    meter.on_frame(frame, now);
  }
  return {meter.report(), shedder.counts()};
}

TEST(WorkShedder, NoneDoesEverythingLate) {
  const Outcome run = play({.policy = Shedding::kNone, .amounts = {8, 4, 2}});
  EXPECT_EQ(run.counts.full, 100);
  EXPECT_EQ(run.counts.shortened + run.counts.skipped, 0);
  EXPECT_EQ(run.deadlines.frames, 100);
  EXPECT_GT(run.deadlines.misses, 20);  // the slow frames, and those that wait behind them
}

TEST(WorkShedder, ShorterWritesHoldTheDeadline) {
  const Outcome none = play({.policy = Shedding::kNone, .amounts = {8, 4, 2}});
  const Outcome run = play(
      {.policy = Shedding::kShortenWrite, .amounts = {8, 4, 2}, .window = 8, .retry_every = 8});
  EXPECT_EQ(run.deadlines.frames, 100);
  EXPECT_EQ(run.counts.skipped, 0);
  EXPECT_GT(run.counts.shortened, 10);
  EXPECT_GT(run.counts.full, 40);  // the larger amount comes back
  // The first slow step, and each try whether the larger amount has become cheaper, which makes the
  // frame behind it late too.
  EXPECT_LE(run.deadlines.misses, 8);
  EXPECT_LT(run.deadlines.misses, none.deadlines.misses / 3);
}

TEST(WorkShedder, SkippingFramesKeepsTheOthersInTime) {
  const Outcome run =
      play({.policy = Shedding::kSkipFrame, .amounts = {8}, .window = 4, .max_skips = 3});
  EXPECT_EQ(run.deadlines.frames + run.deadlines.skipped, 100);
  EXPECT_EQ(run.counts.skipped, run.deadlines.skipped);
  EXPECT_GT(run.counts.skipped, 10);
  EXPECT_GT(run.counts.forced, 0);
  EXPECT_LE(run.deadlines.misses, run.counts.forced + 2);
}

// Three frames of an utterance are put off, then it ends: three of the next one may be.
TEST(WorkShedder, SkipsOfWhatHasEndedAreForgotten) {
  WorkShedder shedder({.policy = Shedding::kSkipFrame, .max_skips = 4});
  const auto skips = [&](int frames) {
    int skipped = 0;
    for (int i = 0; i < frames; ++i) skipped += shedder.decide(-1).skip ? 1 : 0;
    return skipped;
  };
  EXPECT_EQ(skips(3), 3);
  shedder.forget_skips();
  EXPECT_EQ(skips(4), 4);
  EXPECT_EQ(shedder.counts().forced, 0);
  EXPECT_EQ(skips(1), 0);
  EXPECT_EQ(shedder.counts().forced, 1);
  EXPECT_EQ(shedder.counts().skipped, 7);
}

TEST(WorkShedder, AHopelessStreamDoesTheLeast) {
  // 200 ms for nothing at all: every step is late, and every one is of the smallest amount once
  // all were tried.
  const Outcome run =
      play({.policy = Shedding::kShortenWrite, .amounts = {8, 4, 2}, .retry_every = 0}, 200);
  EXPECT_EQ(run.counts.full, 1);
  EXPECT_EQ(run.counts.shortened, 99);
  EXPECT_GE(run.counts.forced, 97);
  const Outcome skipping =
      play({.policy = Shedding::kSkipFrame, .amounts = {8}, .max_skips = 4}, 200);
  EXPECT_EQ(skipping.counts.skipped, 80);  // four of five
  EXPECT_EQ(skipping.counts.full, 20);
}

TEST(WorkShedder, RefusesConfigurationsByName) {
  const auto field_of = [](SheddingConfig config) {
    const auto error = test::error_of([&] { WorkShedder shedder(config); });
    return error ? error->detail().field : std::string("none");
  };
  EXPECT_EQ(field_of({}), "none");
  EXPECT_EQ(field_of({.amounts = {}}), "amounts");
  EXPECT_EQ(field_of({.amounts = {2, 2}}), "amounts");
  EXPECT_EQ(field_of({.weight = 0}), "weight");
  EXPECT_EQ(field_of({.window = 0}), "window");
  EXPECT_EQ(field_of({.max_skips = -1}), "max_skips");
  EXPECT_EQ(field_of({.retry_every = -1}), "retry_every");
}

// --- Motion-aware noise --------------------------------------------------------------------------

TEST(MotionNoise, TypedInExample) {
  MotionNoise noise(0.8);
  EXPECT_NEAR(noise.update(0.1), 0.755, 1e-12);
  EXPECT_EQ(noise.first_step(), 655);
  MotionNoise still(0.8);
  EXPECT_NEAR(still.update(0.0), 0.8, 1e-12);
  EXPECT_NEAR(MotionNoise(0.8).update(5.0), 0.9 * 0.7 + 0.08, 1e-12);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
