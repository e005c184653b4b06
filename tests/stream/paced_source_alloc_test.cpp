// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "sluice/stream/deadline.hpp"
#include "sluice/stream/paced_source.hpp"
#include "sluice/stream/speech_segmenter.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

struct Generator {
  struct Frame {
    std::vector<float> samples;
    std::int64_t time_ns = 0;
  };
  std::int64_t next = 0;
  Frame make_frame() const { return {std::vector<float>(160), 0}; }
  bool read(Frame& frame) {
    frame.time_ns = ++next * 10'000'000;
    return true;
  }
  std::int64_t time_ns(const Frame& frame) const { return frame.time_ns; }
};

TEST(PacedSourceAllocations, AreNone) {
  Generator generator;
  sluice::VirtualClock clock;
  sluice::PacedSource source(generator, clock,
                             {.late = sluice::LatePolicy::kDropOldest, .queue_length = 3});
  Generator::Frame frame = source.make_frame();
  sluice::DeadlineMeter meter(100, sluice::DeadlineAnchor::kFirstFrame, 0);
  sluice::WorkShedder shedder(
      {.policy = sluice::Shedding::kShortenWrite, .amounts = {4, 2, 1}, .window = 16});
  sluice::SpeechSegmenter segmenter;
  source.start();
  const std::int64_t before = sluice::test::allocation_count();
  for (std::int64_t i = 0; i < 1000; ++i) {
    source.next(frame);
    const auto choice = shedder.decide(meter.deadline_ns(i) - clock.now_ns());
    const std::int64_t cost = choice.amount * (i % 7) * 1'000'000;
    clock.advance(cost + (i % 100 == 0 ? 60'000'000 : 0));  // now and then somebody else's turn
    shedder.on_step(choice.index, cost);
    meter.on_frame(i, clock.now_ns());
    segmenter.accept(i % 50 < 25 ? 0.9 : 0.1);
  }
  EXPECT_EQ(sluice::test::allocation_count(), before);
  EXPECT_GT(source.counts().dropped_oldest, 0);
}

}  // namespace SLUICE_TEST_UNIT
