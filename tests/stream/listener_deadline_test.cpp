// SPDX-License-Identifier: MIT
// A listener that has a deadline, on a made-up clock: what is missed, put off and dropped, against
// the definition in tests/support/listen_scene.hpp played with the same costs.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/stream/listener.hpp"
#include "sluice/stream/paced_source.hpp"
#include "support/listen_scene.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::Heard;
using test::HearingPace;
using test::HearingRule;
using test::load_tiny;
using test::NaiveListener;
using test::options_for;
using test::TinyListen;

constexpr std::int64_t kMs = 1'000'000;
constexpr std::int64_t kPacket = 40;  // samples, 10 ms

/// When the packet that brings the sample before `end` was there.
std::int64_t arrival_ns(std::int64_t end, std::int64_t samples) {
  const std::int64_t packet_end = (end + kPacket - 1) / kPacket * kPacket;
  return std::min(packet_end, samples) * 1'000'000'000 / 4000;
}

/// What work costs, and a time in which none is done: packets from stall_begin to stall_end (in
/// samples, both ends of packets) are seen at its end.
struct Costs {
  std::int64_t row_ns = 0;    // to read a row
  std::int64_t piece_ns = 0;  // to predict a piece
  std::int64_t stall_begin = 0;
  std::int64_t stall_end = 0;
};

/// When it is seen.
std::int64_t seen_ns(std::int64_t end, std::int64_t samples, const Costs& costs) {
  const bool stalled = end > costs.stall_begin && end <= costs.stall_end;
  return arrival_ns(stalled ? costs.stall_end : end, samples);
}

struct Figures {
  std::int64_t rows = 0, misses = 0, put_off = 0, forced = 0;
  bool operator==(const Figures&) const = default;
};

/// The definition's time: work is done in turns, rows as soon as they are there, and a piece's cost
/// passes behind what follows from it.
class NaivePace final : public HearingPace {
 public:
  NaivePace(const ListenerOptions& options, const Costs& costs, std::int64_t samples)
      : options_(options), costs_(costs), samples_(samples) {}

  void row(std::int64_t end, bool last) override {
    spend();
    if (last_) in_a_row_ = 0;  // another utterance
    const std::int64_t arrival = arrival_ns(end, samples_);
    now_ = std::max(now_, seen_ns(end, samples_, costs_)) + costs_.row_ns;
    due_ = arrival + std::llround(options_.deadline_ms * 1e6);
    last_ = last;
  }
  void row_done() override {
    ++figures.rows;
    if (now_ > due_) ++figures.misses;
  }
  bool allows(bool inside_word) override {
    if (last_ || options_.shedding == Shedding::kNone) return true;
    if (inside_word && options_.shedding == Shedding::kSkipFrame) return true;
    if (now_ < due_) {
      in_a_row_ = 0;
      return true;
    }
    if (in_a_row_ == options_.max_put_off) {
      in_a_row_ = 0;
      ++figures.forced;
      return true;
    }
    ++in_a_row_;
    ++figures.put_off;
    broken += inside_word ? 1 : 0;
    return false;
  }
  void forward() override {
    spend();
    left_ = costs_.piece_ns;
  }

  Figures figures;
  std::int64_t broken = 0;  // words

 private:
  void spend() { now_ += std::exchange(left_, 0); }

  const ListenerOptions& options_;
  Costs costs_;
  std::int64_t samples_;
  std::int64_t now_ = 0;
  std::int64_t due_ = 0;
  std::int64_t left_ = 0;
  std::int64_t in_a_row_ = 0;
  bool last_ = false;
};

void keep(const ListenEvent& event, std::vector<Heard>& heard) {
  const bool endpoint = event.kind == ListenEvent::Kind::kEndpoint;
  if (!endpoint && event.kind != ListenEvent::Kind::kWord) return;
  const auto tokens = event.tokens();
  heard.push_back({endpoint,
                   event.utterance,
                   event.word,
                   {tokens.begin(), tokens.end()},
                   event.samples,
                   event.spoken_samples});
}

struct Played {
  std::vector<Heard> heard;
  ListenerReport report;
};

/// Audio comes as it is spoken, whatever the work costs: the engine's steps, in turns, on a clock
/// that they move.
Played play(const std::shared_ptr<const ListenModel>& model, ListenerOptions options,
            std::span<const float> samples, const Costs& costs) {
  VirtualClock clock;
  options.clock = ClockView::of(clock);
  ListenerEngine engine(model, options);
  Played played;
  const auto all = static_cast<std::int64_t>(samples.size());
  std::int64_t fed = 0;
  const auto next_end = [&] {
    return std::min(fed + kPacket, all);
  };
  using Progress = ListenerEngine::Progress;
  std::int64_t forwards = 0;
  std::int64_t rows = 0;
  for (;;) {
    const Progress target = engine.step_target();
    for (ListenEvent event; engine.events().try_pop(event);) keep(event, played.heard);
    clock.advance((engine.metrics().target_forwards() - forwards) * costs.piece_ns);
    forwards = engine.metrics().target_forwards();
    if (target == Progress::kEnded) break;
    if (target != Progress::kNeedsSource) continue;
    for (; fed < all && seen_ns(next_end(), all, costs) <= clock.now_ns(); fed = next_end()) {
      const auto packet = samples.subspan(static_cast<std::size_t>(fed),
                                          static_cast<std::size_t>(next_end() - fed));
      EXPECT_EQ(engine.queue().push(packet, arrival_ns(next_end(), all)), packet.size());
      engine.metrics().on_samples(std::ssize(packet));
    }
    const Progress source = engine.step_source();
    clock.advance((engine.metrics().source_rows() - rows) * costs.row_ns);
    rows = engine.metrics().source_rows();
    if (source != Progress::kNeedsSamples) continue;
    if (fed == all)
      engine.end_input();
    else
      clock.wait_until(seen_ns(next_end(), all, costs));
  }
  played.report = engine.metrics().report(4000);
  return played;
}

Figures figures_of(const ListenerReport& report) {
  EXPECT_EQ(report.deadlines.frames, report.source_rows);
  EXPECT_NEAR(
      report.deadlines.miss_rate,
      static_cast<double>(report.deadlines.misses) / static_cast<double>(report.deadlines.frames),
      1e-15);
  return {report.deadlines.frames, report.deadlines.misses, report.put_off_rows,
          report.forced_writes};
}

std::string text_of(const std::vector<Heard>& heard) {
  std::string text;
  for (const Heard& event : heard) {
    if (event.endpoint) text += "| ";
    for (const Token piece : event.pieces) text += std::to_string(piece) + " ";
    text += "@" + std::to_string(event.samples) + " ";
  }
  return text;
}

// A listener that keeps up writes what one without a deadline writes, bit for bit.
TEST(ListenerDeadline, WhatIsInTimeIsWhatItWas) {
  const TinyListen tiny(1);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(24000, 101);
  ListenerOptions options = options_for(*model, {});
  const Played without = play(model, options, samples, {});
  EXPECT_GT(without.heard.size(), 20U);
  EXPECT_EQ(without.report.deadlines.frames, 0);
  EXPECT_TRUE(std::isnan(without.report.deadlines.miss_rate));
  options.deadline_ms = 30;
  for (const Shedding shedding : {Shedding::kNone, Shedding::kSkipFrame, Shedding::kShortenWrite})
    for (const LatePolicy late : {LatePolicy::kBlock, LatePolicy::kDropOldest}) {
      options.shedding = shedding;
      options.late = late;
      const Played with = play(model, options, samples, {});
      EXPECT_EQ(with.heard, without.heard);
      EXPECT_EQ(figures_of(with.report), (Figures{with.report.source_rows, 0, 0, 0}));
      EXPECT_EQ(with.report.dropped_samples, 0);
      EXPECT_EQ(with.report.deadlines.skipped, 0);
      // A row comes with every fourth packet, sooner where an utterance has begun.
      EXPECT_NEAR(with.report.deadlines.largest_gap_ms, 40, 1e-9);
    }
}

// Work that costs more than there is time for, all the time or after a stall, and what each policy
// makes of it. Words of these random models are long, up to 16 pieces.
TEST(ListenerDeadline, OverloadPutsOffWhatTheDefinitionPutsOff) {
  Figures all_late, words_put_off, pieces_put_off;
  std::int64_t broken = 0;
  for (const auto& [seed, rule] : {std::pair{std::uint64_t{1}, HearingRule{}},
                                   {std::uint64_t{3}, HearingRule{.wait_words = 2, .delay = 1}}}) {
    const TinyListen tiny(seed);
    const auto model = load_tiny(tiny.file());
    const std::vector<float> samples = tiny.sound(24000, 100 + seed);
    for (const Costs costs :
         {Costs{2 * kMs, 15 * kMs}, Costs{30 * kMs, 3 * kMs}, Costs{3 * kMs, kMs, 8000, 12000}}) {
      std::int64_t all_words = 0;
      const auto run = [&](Shedding shedding, std::int64_t max_put_off, Figures& sum) {
        ListenerOptions options = options_for(*model, rule);
        options.deadline_ms = 40;
        options.shedding = shedding;
        options.max_put_off = max_put_off;
        NaivePace pace(options, costs, std::ssize(samples));
        NaiveListener naive(tiny, &pace);
        const std::vector<Heard> expected = naive.run(samples, rule);
        // As in listener_test.cpp: a decision that rounding could turn.
        ASSERT_GT(naive.margin(), 1e-4);
        const Played played = play(model, options, samples, costs);
        ASSERT_TRUE(played.heard == expected)
            << "seed " << seed << ", policy " << static_cast<int>(shedding) << "\n"
            << text_of(played.heard) << "\n"
            << text_of(expected);
        const Figures found = figures_of(played.report);
        EXPECT_EQ(found, pace.figures)
            << found.rows << " " << found.misses << " " << found.put_off << " " << found.forced
            << " for " << pace.figures.rows << " " << pace.figures.misses << " "
            << pace.figures.put_off << " " << pace.figures.forced;
        sum.misses += found.misses;
        sum.put_off += found.put_off;
        sum.forced += found.forced;
        broken += pace.broken;
        // Words are put off, not lost: nine in ten at the least, since those that have heard more
        // may be others.
        if (shedding == Shedding::kNone) all_words = played.report.words;
        EXPECT_GE(10 * played.report.words, 9 * all_words);
      };
      run(Shedding::kNone, 3, all_late);
      run(Shedding::kSkipFrame, 3, words_put_off);
      run(Shedding::kSkipFrame, 1000, words_put_off);
      run(Shedding::kShortenWrite, 3, pieces_put_off);
    }
  }
  EXPECT_GT(all_late.misses, 300);
  EXPECT_EQ(all_late.put_off + all_late.forced, 0);
  EXPECT_GT(words_put_off.put_off, 100);
  EXPECT_GT(words_put_off.forced, 20);
  EXPECT_LT(2 * pieces_put_off.misses, all_late.misses);
  EXPECT_GT(broken, 3);
}

// A listener that gets nothing done for a second, all of whose costs are none: the rows of that
// second are late by as much as they are old.
TEST(ListenerDeadline, AStallMissesOrDropsWhatWaited) {
  const TinyListen tiny(1);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(16000, 101);
  const auto count = static_cast<std::int64_t>(samples.size());
  const HearingRule rule{.endpoint_rows = 0, .max_rows = 0, .silence_rows = 0};
  ListenerOptions options = options_for(*model, rule);
  options.deadline_ms = 100;
  // Rows end at 100 + 160 j samples, with the packet that ends at 120 + 160 j. The first 30 are
  // heard; when the stall ends the newest ones are younger than 100 ms.
  const std::int64_t begin = 120 + 160 * 29;
  const std::int64_t until = begin + 4000;
  std::int64_t late = 0;
  for (std::int64_t j = 30; 100 + 160 * j <= until; ++j)
    if (arrival_ns(100 + 160 * j, count) + 100 * kMs < arrival_ns(until, count)) ++late;
  EXPECT_EQ(late, 22);

  const Played blocked = play(model, options, samples, {.stall_begin = begin, .stall_end = until});
  const Played whole = play(model, options, samples, {});
  EXPECT_EQ(blocked.heard, whole.heard);
  EXPECT_EQ(blocked.report.deadlines.misses, late);
  EXPECT_EQ(blocked.report.deadlines.frames, whole.report.deadlines.frames);
  EXPECT_EQ(blocked.report.deadlines.skipped, 0);

  options.late = LatePolicy::kDropOldest;
  const Played dropped = play(model, options, samples, {.stall_begin = begin, .stall_end = until});
  EXPECT_EQ(dropped.report.deadlines.misses, 0);
  EXPECT_EQ(dropped.report.deadlines.skipped, late);
  EXPECT_EQ(dropped.report.dropped_samples, late * 160);
  EXPECT_EQ(dropped.report.samples, count);
  EXPECT_EQ(dropped.report.samples_waiting, 0);
  EXPECT_EQ(dropped.report.deadlines.frames, whole.report.deadlines.frames - late);
  std::vector<float> heard(samples.begin(), samples.begin() + begin);
  heard.insert(heard.end(), samples.begin() + begin + dropped.report.dropped_samples,
               samples.end());
  NaiveListener naive(tiny);
  std::vector<Heard> expected = naive.run(heard, rule);
  ASSERT_GT(naive.margin(), 1e-4);
  for (Heard& event : expected)
    for (std::int64_t* place : {&event.samples, &event.spoken})
      if (*place > begin) *place += dropped.report.dropped_samples;
  EXPECT_GT(expected.size(), 10U);
  EXPECT_TRUE(dropped.heard == expected) << text_of(dropped.heard) << "\n" << text_of(expected);
}

/// A clock of which every reading costs something.
class TickingClock {
 public:
  explicit TickingClock(std::int64_t tick_ns) : tick_ns_(tick_ns) {}
  std::int64_t now_ns() const noexcept { return now_ns_ += tick_ns_; }

 private:
  std::int64_t tick_ns_;
  mutable std::int64_t now_ns_ = 0;
};

// What words cost lately counts: with 5 ms left, a word of 10 ms is not begun.
TEST(ListenerDeadline, WhatWouldBeLateIsNotBegun) {
  const TinyListen tiny(1);
  const auto model = load_tiny(tiny.file());
  const std::vector<float> samples = tiny.sound(24000, 101);
  const auto run = [&](Shedding shedding) {
    const TickingClock clock(10 * kMs);
    ListenerOptions options = options_for(*model, {});
    options.clock = ClockView::of(clock);
    options.deadline_ms = 95;  // a row is read, noted and asked for with five readings
    options.shedding = shedding;
    options.max_put_off = 1000;
    Listener listener(model, options);
    for (std::size_t done = 0; done < samples.size(); done += 160) {
      listener.accept(std::span(samples).subspan(done, 160));
      while (listener.next()) {
      }
    }
    listener.finish();
    while (listener.next()) {
    }
    return listener.report();
  };
  const ListenerReport none = run(Shedding::kNone);
  const ListenerReport skip = run(Shedding::kSkipFrame);
  EXPECT_GT(none.deadlines.misses, skip.deadlines.misses);
  EXPECT_GT(skip.put_off_rows, 0);
  EXPECT_EQ(skip.forced_writes, 0);
  EXPECT_GT(skip.words, 20);
}

TEST(ListenerDeadline, RefusesWhatMakesNoSense) {
  const TinyListen tiny(2);
  const auto model = load_tiny(tiny.file());
  const auto refused = [&](const char* field, auto change) {
    ListenerOptions options;
    change(options);
    const auto error = test::error_of([&] { Listener listener(model, options); });
    ASSERT_TRUE(error) << field;
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
    EXPECT_EQ(error->detail().field, field);
  };
  refused("deadline_ms", [](ListenerOptions& o) { o.deadline_ms = -1; });
  refused("deadline_ms", [](ListenerOptions& o) { o.deadline_ms = std::nan(""); });
  refused("deadline_ms", [](ListenerOptions& o) { o.shedding = Shedding::kSkipFrame; });
  refused("deadline_ms", [](ListenerOptions& o) { o.late = LatePolicy::kDropOldest; });
  refused("max_put_off", [](ListenerOptions& o) { o.max_put_off = -1; });
  for (const LatePolicy late : {LatePolicy::kDropNewest, LatePolicy::kCoalesce})
    refused("late", [&](ListenerOptions& o) {
      o.deadline_ms = 40;
      o.late = late;
    });
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
