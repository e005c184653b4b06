// SPDX-License-Identifier: MIT
#include "sluice/stream/paced_source.hpp"

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
using Numbers = std::vector<std::int64_t>;

// Frame i is complete at (i + 1) periods and holds the numbers of the frames joined in it.
struct Counter {
  struct Frame {
    std::int64_t time_ns = 0;
    Numbers numbers;
  };
  std::int64_t frames = 10;
  std::int64_t period_ns = 100 * kMs;
  std::size_t most_joined = 1000;
  std::int64_t next = 0;

  Frame make_frame() { return {}; }
  bool read(Frame& frame) {
    if (next == frames) return false;
    frame.numbers = {next++};
    frame.time_ns = next * period_ns;
    return true;
  }
  std::int64_t time_ns(const Frame& frame) const { return frame.time_ns; }
  bool merge(Frame& into, Frame& more) const {
    if (into.numbers.size() + more.numbers.size() > most_joined) return false;
    into.numbers.insert(into.numbers.end(), more.numbers.begin(), more.numbers.end());
    into.time_ns = more.time_ns;
    return true;
  }
};

void expect_accounted(const PacedSourceCounts& counts, std::int64_t left) {
  EXPECT_EQ(counts.read,
            counts.taken + counts.dropped_oldest + counts.dropped_newest + counts.coalesced + left);
}

struct Outcome {
  std::vector<Numbers> taken;
  Numbers times_ms;
  PacedSourceCounts counts;
};

// A consumer that needs work_ms for each frame.
Outcome play(PacedSourceConfig config, Counter source, std::int64_t work_ms) {
  VirtualClock clock(7'000 * kMs);
  PacedSource paced(source, clock, config);
  Counter::Frame frame = paced.make_frame();
  Outcome run;
  paced.start();
  while (paced.next(frame) == FrameStatus::kFrame) {
    run.taken.push_back(frame.numbers);
    run.times_ms.push_back(clock.now_ns() / kMs - 7'000);
    clock.advance(work_ms * kMs);
  }
  EXPECT_EQ(paced.poll(frame), FrameStatus::kEnd);
  run.counts = paced.counts();
  expect_accounted(run.counts, 0);
  EXPECT_EQ(run.counts.read, source.frames);
  return run;
}

TEST(PacedSource, FastConsumersGetEveryFrameOnItsTime) {
  for (const LatePolicy late : {LatePolicy::kBlock, LatePolicy::kDropOldest,
                                LatePolicy::kDropNewest, LatePolicy::kCoalesce}) {
    const Outcome run = play({.late = late}, {.frames = 4}, 60);
    EXPECT_EQ(run.taken, (std::vector<Numbers>{{0}, {1}, {2}, {3}}));
    EXPECT_EQ(run.times_ms, (Numbers{100, 200, 300, 400}));
    EXPECT_EQ(run.counts.late, 0);
    EXPECT_EQ(run.counts.waits, 4);
  }
  const Outcome fast = play({.speed = 4}, {.frames = 4}, 0);
  EXPECT_EQ(fast.times_ms, (Numbers{25, 50, 75, 100}));
}

// A frame that is due in an hour: whoever wants to stop need not wait for it.
TEST(PacedSource, CanBeStoppedBetweenFrames) {
  static int asked = 0;
  asked = 0;
  Counter source{.frames = 3, .period_ns = 3'600'000 * kMs};
  VirtualClock clock(7'000 * kMs);
  PacedSource paced(source, clock, {.stop_when = [] {
                      return ++asked > 5;
                    }});
  Counter::Frame frame = paced.make_frame();
  EXPECT_EQ(paced.next(frame), FrameStatus::kEnd);
  EXPECT_EQ(clock.now_ns(), 7'500 * kMs);  // ten times a second
  EXPECT_EQ(paced.next(frame), FrameStatus::kEnd);
  EXPECT_EQ(paced.counts().taken, 0);
  expect_accounted(paced.counts(), 1);
  // One that never stops changes nothing but the number of waits.
  Counter again{.frames = 4};
  PacedSource whole(again, clock, {.speed = 0.25, .stop_when = [] {
                                     return false;
                                   }});
  Numbers times_ms;
  while (whole.next(frame) == FrameStatus::kFrame) times_ms.push_back(clock.now_ns() / kMs - 7'500);
  EXPECT_EQ(times_ms, (Numbers{400, 800, 1200, 1600}));
}

// Frames every 100 ms, 250 ms of work for each, one may wait.
TEST(PacedSource, Block) {
  const Outcome run = play({.late = LatePolicy::kBlock}, {.frames = 5}, 250);
  EXPECT_EQ(run.taken, (std::vector<Numbers>{{0}, {1}, {2}, {3}, {4}}));
  EXPECT_EQ(run.times_ms, (Numbers{100, 350, 600, 850, 1100}));
  EXPECT_EQ(run.counts.late, 4);
  EXPECT_EQ(run.counts.max_late_ns, 600 * kMs);
}

TEST(PacedSource, DropOldest) {
  const Outcome run = play({.late = LatePolicy::kDropOldest}, {.frames = 7}, 250);
  // Taken at 100, 350 (2 is the newest), 600 (5), and 6, due at 700, at 850.
  EXPECT_EQ(run.taken, (std::vector<Numbers>{{0}, {2}, {5}, {6}}));
  EXPECT_EQ(run.counts.dropped_oldest, 3);
  const Outcome longer =
      play({.late = LatePolicy::kDropOldest, .queue_length = 2}, {.frames = 7}, 250);
  EXPECT_EQ(longer.taken, (std::vector<Numbers>{{0}, {1}, {4}, {5}, {6}}));
}

TEST(PacedSource, DropNewest) {
  const Outcome run = play({.late = LatePolicy::kDropNewest}, {.frames = 7}, 250);
  EXPECT_EQ(run.taken, (std::vector<Numbers>{{0}, {1}, {3}, {6}}));
  EXPECT_EQ(run.counts.dropped_newest, 3);
}

TEST(PacedSource, Coalesce) {
  const Outcome run = play({.late = LatePolicy::kCoalesce}, {.frames = 7}, 250);
  EXPECT_EQ(run.taken, (std::vector<Numbers>{{0}, {1, 2}, {3, 4, 5}, {6}}));
  EXPECT_EQ(run.counts.coalesced, 3);
  // No room for three: the third waits as with kBlock, and nothing is lost.
  const Outcome full = play({.late = LatePolicy::kCoalesce}, {.frames = 7, .most_joined = 2}, 250);
  EXPECT_EQ(full.taken, (std::vector<Numbers>{{0}, {1, 2}, {3, 4}, {5, 6}}));
}

TEST(PacedSource, AsFastAsPossibleNeverWaitsAndLosesNothing) {
  for (const LatePolicy late : {LatePolicy::kBlock, LatePolicy::kDropOldest,
                                LatePolicy::kDropNewest, LatePolicy::kCoalesce}) {
    const Outcome run = play({.speed = 0, .late = late}, {.frames = 50}, 30);
    EXPECT_EQ(run.counts.taken, 50);
    EXPECT_EQ(run.counts.waits, 0);
    EXPECT_EQ(run.counts.late, 0);
    EXPECT_EQ(run.times_ms.back(), 49 * 30);
  }
}

TEST(PacedSource, PollNeverWaits) {
  Counter source{.frames = 1};
  VirtualClock clock;
  PacedSource paced(source, clock, {});
  Counter::Frame frame;
  EXPECT_EQ(paced.poll(frame), FrameStatus::kNone);
  clock.advance(99 * kMs);
  EXPECT_EQ(paced.poll(frame), FrameStatus::kNone);
  clock.advance(1 * kMs);
  EXPECT_EQ(paced.poll(frame), FrameStatus::kFrame);
  EXPECT_EQ(paced.poll(frame), FrameStatus::kEnd);
  EXPECT_EQ(clock.now_ns(), 100 * kMs);
}

TEST(PacedSource, AnEmptySourceEndsAtOnce) {
  const Outcome run = play({}, {.frames = 0}, 0);
  EXPECT_TRUE(run.taken.empty());
}

TEST(PacedSource, HoursDoNotDrift) {
  Counter source{.frames = 30 * 3600, .period_ns = 33'366'667};
  VirtualClock clock;
  PacedSource paced(source, clock, {});
  Counter::Frame frame;
  while (paced.next(frame) == FrameStatus::kFrame) {
    ASSERT_EQ(clock.now_ns(), frame.time_ns);
    clock.advance(20 * kMs);
  }
  EXPECT_EQ(paced.counts().late, 0);
}

// --- Clocks that jump ----------------------------------------------------------------------------

TEST(PacedSource, AClockThatGoesBackTakesTheScheduleWithIt) {
  Counter source{.frames = 5};
  VirtualClock clock(1'000'000 * kMs);
  PacedSource paced(source, clock, {});
  Counter::Frame frame;
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  clock.set(5 * kMs);  // set back by 17 minutes
  EXPECT_EQ(paced.poll(frame), FrameStatus::kNone);
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  EXPECT_EQ(clock.now_ns(), 105 * kMs);  // one period later, not 17 minutes
  EXPECT_EQ(frame.numbers, Numbers{2});
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  EXPECT_EQ(clock.now_ns(), 205 * kMs);
  EXPECT_EQ(paced.counts().clock_back, 1);
  EXPECT_EQ(paced.counts().late, 0);
}

TEST(PacedSource, AClockThatJumpsAheadMakesFramesDue) {
  for (const LatePolicy late : {LatePolicy::kBlock, LatePolicy::kDropOldest}) {
    Counter source{.frames = 100};
    VirtualClock clock;
    PacedSource paced(source, clock, {.late = late});
    Counter::Frame frame;
    ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
    clock.advance(5'000 * kMs);  // to 5100: frame 50 is due
    ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
    EXPECT_EQ(frame.numbers, Numbers{late == LatePolicy::kBlock ? 1 : 50});
    EXPECT_EQ(paced.counts().dropped_oldest, late == LatePolicy::kBlock ? 0 : 49);
    EXPECT_EQ(clock.now_ns(), 5'100 * kMs);
    EXPECT_EQ(paced.counts().clock_ahead, 0);
  }
}

TEST(PacedSource, AJumpAheadCanMoveTheSchedule) {
  Counter source{.frames = 100};
  VirtualClock clock;
  PacedSource paced(source, clock,
                    {.late = LatePolicy::kDropOldest, .resync_after_ns = 1'000 * kMs});
  Counter::Frame frame;
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  clock.advance(60'000 * kMs);  // the machine slept a minute at 100 ms
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  EXPECT_EQ(frame.numbers, Numbers{1});
  EXPECT_EQ(clock.now_ns(), 60'100 * kMs);
  ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
  EXPECT_EQ(frame.numbers, Numbers{2});
  EXPECT_EQ(clock.now_ns(), 60'200 * kMs);
  EXPECT_EQ(paced.counts().clock_ahead, 1);
  EXPECT_EQ(paced.counts().dropped_oldest, 0);
  EXPECT_EQ(paced.counts().late, 0);
}

// Whatever clock and consumer do: numbers grow, nothing comes twice, everything is accounted for.
TEST(PacedSource, RandomClocksAndConsumers) {
  Random random(17);
  for (int trial = 0; trial < 400; ++trial) {
    Counter source{.frames = test::between(random, 0, 60), .most_joined = 3};
    VirtualClock clock(test::between(random, 0, 1'000) * kMs);
    PacedSourceConfig config;
    config.late = static_cast<LatePolicy>(random.below(4));
    config.queue_length = test::between(random, 1, 5);
    if (random.below(2) == 0) config.resync_after_ns = 700 * kMs;
    PacedSource paced(source, clock, config);
    Counter::Frame frame = paced.make_frame();
    std::int64_t last = -1;
    std::int64_t seen = 0;
    for (;;) {
      const FrameStatus status = random.below(3) == 0 ? paced.poll(frame) : paced.next(frame);
      if (status == FrameStatus::kEnd) break;
      if (status == FrameStatus::kFrame) {
        for (const std::int64_t number : frame.numbers) {
          ASSERT_GT(number, last);
          last = number;
          ++seen;
        }
      }
      ASSERT_LE(paced.waiting(), config.queue_length);
      if (random.below(10) == 0)
        clock.set(clock.now_ns() + test::between(random, -2'000, 2'000) * kMs);
      else
        clock.advance(test::between(random, 0, 300) * kMs);
    }
    const PacedSourceCounts& counts = paced.counts();
    expect_accounted(counts, 0);
    EXPECT_EQ(counts.read, source.frames);
    EXPECT_EQ(seen, counts.taken + counts.coalesced);
    if (config.late == LatePolicy::kBlock || config.late == LatePolicy::kCoalesce) {
      EXPECT_EQ(seen, source.frames);
    }
  }
}

TEST(PacedSource, WhatTheSourceThrowsComesBehindItsFrames) {
  struct Broken : Counter {
    bool read(Frame& frame) {
      if (next == 3) throw Error(ErrorCode::kFormat, {"truncated", "source", "", "", ""});
      return Counter::read(frame);
    }
  };
  Broken source;
  VirtualClock clock;
  PacedSource paced(source, clock, {.queue_length = 5});
  paced.start();
  clock.advance(1'000 * kMs);
  Counter::Frame frame;
  for (std::int64_t i = 0; i < 3; ++i) {
    ASSERT_EQ(paced.next(frame), FrameStatus::kFrame);
    EXPECT_EQ(frame.numbers, Numbers{i});
  }
  EXPECT_TRUE(test::error_of([&] { paced.next(frame); }));
  EXPECT_EQ(paced.next(frame), FrameStatus::kEnd);
}

TEST(PacedSource, RefusesConfigurationsByName) {
  struct Plain {
    struct Frame {};
    Frame make_frame() { return {}; }
    bool read(Frame&) { return false; }
    std::int64_t time_ns(const Frame&) const { return 0; }
  };
  const auto field_of = [](PacedSourceConfig config) {
    Plain source;
    VirtualClock clock;
    const auto error = test::error_of([&] { PacedSource paced(source, clock, config); });
    return error ? error->detail().field : std::string("none");
  };
  EXPECT_EQ(field_of({}), "none");
  EXPECT_EQ(field_of({.speed = -1}), "speed");
  EXPECT_EQ(field_of({.queue_length = 0}), "queue_length");
  EXPECT_EQ(field_of({.late_after_ns = -1}), "late_after_ns");
  EXPECT_EQ(field_of({.resync_after_ns = 0}), "resync_after_ns");
  EXPECT_EQ(field_of({.late = LatePolicy::kCoalesce}), "late");
}

TEST(PacedSource, RealTime) {
  Counter source{.frames = 3, .period_ns = 2 * kMs};
  MonotonicClock clock;
  PacedSource paced(source, clock, {});
  Counter::Frame frame;
  const std::int64_t start = clock.now_ns();
  while (paced.next(frame) == FrameStatus::kFrame) {
  }
  EXPECT_GE(clock.now_ns() - start, 6 * kMs);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
