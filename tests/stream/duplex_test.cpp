// SPDX-License-Identifier: MIT
#include "sluice/stream/duplex.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ranges>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using namespace std::chrono_literals;
using Kind = DuplexOutput::Kind;
using Units = std::vector<std::vector<Token>>;

std::shared_ptr<const Decoder> model() {
  static const std::shared_ptr<const Decoder> decoder = [] {
    const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/llama3";
    return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
  }();
  return decoder;
}

Units random_units(int count, std::uint64_t seed, std::int64_t longest = 4) {
  Random random(seed);
  Units units;
  for (int u = 0; u < count; ++u) {
    units.emplace_back(1 + random.below(static_cast<std::uint64_t>(longest)));
    for (Token& token : units.back()) token = static_cast<Token>(random.below(128));
  }
  return units;
}

CacheOptions sink_window(std::int64_t sinks, std::int64_t window) {
  return {.policy = CachePolicy::kSinkWindow, .num_sink_tokens = sinks, .window_size = window};
}

DuplexOptions options(bool concurrent, std::int64_t tokens = 40) {
  DuplexOptions options;
  options.source.policy = options.target.policy = CachePolicy::kFull;
  options.target_prefix = {1, 2};
  options.max_target_tokens = tokens;
  options.max_unit_tokens = 4;
  options.concurrent = concurrent;
  return options;
}

/// What a consumer believes to be the target so far: provisional tokens come and go.
struct Reader {
  std::vector<Token> tokens;
  std::vector<Token> final_tokens;

  void operator()(const DuplexOutput& output) {
    switch (output.kind) {
      case Kind::kFinal:
        ASSERT_EQ(tokens.size(), final_tokens.size()) << "a final token behind provisional ones";
        tokens.push_back(output.token);
        final_tokens.push_back(output.token);
        return;
      case Kind::kProvisional: tokens.push_back(output.token); return;
      case Kind::kConfirmed:
        for (std::int64_t i = 0; i < output.count; ++i)
          final_tokens.push_back(tokens.at(final_tokens.size()));
        return;
      case Kind::kRetracted:
        ASSERT_LE(final_tokens.size() + static_cast<std::size_t>(output.count), tokens.size());
        tokens.resize(tokens.size() - static_cast<std::size_t>(output.count));
        return;
    }
  }
};

struct Always {
  Decision answer;
  Decision decide(const PolicyState&) const { return answer; }
};

/// Notes every question: state, and the bits of the logits.
struct Trace {
  struct Entry {
    std::int64_t units_read, tokens_read, tokens_written;
    Token candidate;
    std::uint64_t logits;
    Action action;
    friend bool operator==(const Entry&, const Entry&) = default;
  };
  std::vector<Entry> entries;
};

template <class Inner>
struct Traced {
  Inner inner;
  std::shared_ptr<Trace> trace;

  Decision decide(const PolicyState& state) {
    std::uint64_t hash = 1469598103934665603ULL;
    for (const float logit : state.logits) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, &logit, sizeof bits);
      hash = (hash ^ bits) * 1099511628211ULL;
    }
    const Decision decision = inner.decide(state);
    trace->entries.push_back({state.units_read, state.tokens_read, state.tokens_written,
                              state.candidate.value_or(-1), hash, decision.action});
    return decision;
  }
  std::int64_t max_provisional() const {
    if constexpr (requires { inner.max_provisional(); })
      return inner.max_provisional();
    else
      return 0;
  }
  std::int64_t newest_source_tokens() const {
    if constexpr (requires { inner.newest_source_tokens(); })
      return inner.newest_source_tokens();
    else
      return 0;
  }
};

struct Outcome {
  Reader reader;
  Trace trace;
  DuplexEnd end;
  DuplexReport report;
};

/// What the model makes of a unit's tokens before its first layer. [tokens, hidden_size]
std::vector<float> embeddings_of(const std::vector<Token>& unit) {
  const std::int64_t width = model()->config().hidden_size;
  std::vector<float> rows(unit.size() * static_cast<std::size_t>(width));
  embed(model()->weights().embedding, unit, static_cast<float>(model()->config().embedding_scale),
        {rows.data(), static_cast<std::int64_t>(unit.size()), width});
  return rows;
}

/// The whole stream; concurrent runs feed from another thread, with pauses if `seed` is not 0.
/// embedded: every so many units one is fed as embeddings; 0: none is.
template <class Policy, class Layout = GroupedLayout>
Outcome run(Policy policy, const DuplexOptions& options, const Units& units, std::uint64_t seed = 0,
            Layout layout = GroupedLayout::group_positions(0.5), std::size_t embedded = 0) {
  Outcome result;
  const auto trace = std::make_shared<Trace>();
  Duplex<Traced<Policy>, float, float, Layout> duplex(
      model(), options, Traced<Policy>{std::move(policy), trace}, std::move(layout));
  const auto feed = [&] {
    Random random(seed + 1);
    for (std::size_t u = 0; u < units.size(); ++u) {
      if (seed != 0 && random.below(3) == 0) std::this_thread::sleep_for(200us * random.below(5));
      if (embedded == 0 || u % embedded != 0) {
        if (duplex.feed(units[u]) != FeedStatus::kAccepted) return;
        continue;
      }
      const std::vector<float> rows = embeddings_of(units[u]);
      if (duplex.feed_embeddings({rows.data(), static_cast<std::int64_t>(units[u].size()),
                                  model()->config().hidden_size}) != FeedStatus::kAccepted)
        return;
    }
    duplex.end_input();
  };
  std::jthread feeder;
  if (options.concurrent)
    feeder = std::jthread(feed);
  else
    feed();
  Random random(seed + 2);
  while (const auto output = duplex.next()) {
    if (seed != 0 && random.below(4) == 0) std::this_thread::sleep_for(100us * random.below(5));
    result.reader(*output);
  }
  result.end = duplex.end_reason();
  result.report = duplex.report();
  duplex.stop();  // a feeder that still waits goes home
  feeder = {};
  result.trace = *trace;
  return result;
}

/// The concurrent run asks the same questions, gets the same answers and sees the same bits.
template <class Policy>
void expect_repeatable(const Policy& policy, const DuplexOptions& base, const std::string& what) {
  SCOPED_TRACE(what);
  const Units units = random_units(14, 3);
  DuplexOptions sequential = base;
  sequential.concurrent = false;
  sequential.queue_units = 64;  // all is fed before anything runs
  sequential.queue_tokens = 256;
  const Outcome reference = run(policy, sequential, units);
  EXPECT_FALSE(reference.reader.final_tokens.empty());
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    DuplexOptions concurrent = base;
    concurrent.concurrent = true;
    concurrent.source_threads = seed == 2 ? 2 : 1;
    concurrent.target_threads = seed == 1 ? 3 : 1;
    if (seed == 3) concurrent.team = std::make_shared<ThreadTeam>(2);
    const Outcome found = run(policy, concurrent, units, seed);
    EXPECT_EQ(found.reader.final_tokens, reference.reader.final_tokens);
    EXPECT_EQ(found.trace.entries, reference.trace.entries);
    EXPECT_EQ(found.end, reference.end);
    EXPECT_EQ(found.report.target_forwards, reference.report.target_forwards);
  }
}

TEST(Duplex, ConcurrentRunIsTheSequentialOneBitForBit) {
  const DuplexOptions full = options(true);
  DuplexOptions bounded = options(true);
  bounded.source = sink_window(2, 7);
  bounded.target = sink_window(1, 9);
  DuplexOptions raw = bounded;
  raw.source.key_form = raw.target.key_form = KeyForm::kRaw;
  DuplexOptions text = bounded;
  text.source.position_rule = text.target.position_rule = PositionRule::kInText;
  DuplexOptions tight = bounded;
  tight.queue_units = 1;
  tight.queue_tokens = tight.max_lead_tokens = 4;
  tight.max_lead_units = 1;
  tight.output_capacity = 4;
  DuplexOptions drawn = bounded;
  drawn.sampler.temperature = 1;
  drawn.sampler.seed = 5;
  const WaitK wait_k(2, FixedUnits{3});
  for (const auto& [name, base] : {std::pair<const char*, const DuplexOptions&>{"full", full},
                                   {"bounded", bounded},
                                   {"raw", raw},
                                   {"in text", text},
                                   {"tight", tight},
                                   {"drawn", drawn}})
    expect_repeatable(wait_k, base, std::string("wait-k, ") + name);
  expect_repeatable(ReadUntilSeparator({5, 20, 40, 41, 42, 43, 44, 45, 90, 91, 92, 93, 94}), full,
                    "separator");
  expect_repeatable(LocalAgreement(6), bounded, "local agreement");
  expect_repeatable(HoldN(2, 5), bounded, "hold-n");
  expect_repeatable(AttentionGuided(0.1F, 2), full, "attention");
  expect_repeatable(SpeakOrSilence(7, 0.01F, 5), bounded, "speak or silence");
}

// A unit of embeddings is a unit of tokens whose embeddings they are, alone or among others.
TEST(Duplex, EmbeddingsOfTokensAreTheTokensBitForBit) {
  const Units units = random_units(14, 3);
  DuplexOptions base = options(false);
  base.source = sink_window(2, 7);
  base.target = sink_window(1, 9);
  base.queue_units = 64;
  base.queue_tokens = base.queue_embeddings = 256;
  const WaitK policy(2, FixedUnits{3});
  const Outcome reference = run(policy, base, units);
  EXPECT_FALSE(reference.reader.final_tokens.empty());
  for (const std::size_t embedded : {std::size_t{1}, std::size_t{2}, std::size_t{3}})
    for (const bool concurrent : {false, true}) {
      DuplexOptions options = base;
      options.concurrent = concurrent;
      if (concurrent) options.queue_tokens = options.queue_embeddings = 4;
      const Outcome found = run(policy, options, units, concurrent ? 2 : 0,
                                GroupedLayout::group_positions(0.5), embedded);
      EXPECT_EQ(found.reader.final_tokens, reference.reader.final_tokens) << embedded;
      EXPECT_EQ(found.trace.entries, reference.trace.entries) << embedded;
    }
  // Joined units keep to their kind.
  base.coalesce_units = 4;
  const Outcome joined = run(policy, base, units, 0, GroupedLayout::group_positions(0.5), 3);
  EXPECT_EQ(joined.report.units_read, reference.report.units_read);
  EXPECT_EQ(joined.report.source_tokens, reference.report.source_tokens);
}

TEST(Duplex, RangeCallbackAndPollingGiveTheSame) {
  const Units units = random_units(6, 4);
  const auto feed = [&](auto& duplex) {
    for (const auto& unit : units) duplex.feed(unit);
    duplex.end_input();
  };
  using Stream = Duplex<WaitK<FixedUnits>, float>;
  static_assert(std::input_iterator<Stream::Iterator>);
  std::vector<Token> range;
  std::vector<Token> callback;
  std::vector<Token> polled;
  Stream first(model(), options(true), WaitK(1, FixedUnits{2}));
  feed(first);
  for (const DuplexOutput& output : first) range.push_back(output.token);
  Stream second(model(), options(true), WaitK(1, FixedUnits{2}));
  feed(second);
  second.for_each([&](const DuplexOutput& output) { callback.push_back(output.token); });
  Stream third(model(), options(true), WaitK(1, FixedUnits{2}));
  feed(third);
  for (;;) {
    const bool finished = third.is_finished();
    if (const auto output = third.poll())
      polled.push_back(output->token);
    else if (finished)
      break;
    else
      std::this_thread::yield();
  }
  EXPECT_EQ(range.size(), 40U);
  EXPECT_EQ(range, callback);
  EXPECT_EQ(range, polled);
}

// ---- group position encoding's loop (core-algorithms 2.4) --------------------------------------

/// Every word is one token: seen from the first token of the next.
struct OneTokenWords {
  UnitEdge edge(Token, std::int64_t tokens_in_unit) const {
    return tokens_in_unit > 0 ? UnitEdge::kBeforeCandidate : UnitEdge::kInside;
  }
};

/// A user's own layout: group positions that are written down as they are given out.
struct NotedLayout {
  struct Note {
    char what;  // 'p'laced, 'r'etracted
    int group;
    Position position;
    friend bool operator==(const Note&, const Note&) = default;
  };
  GroupedLayout inner;
  std::shared_ptr<std::vector<Note>> notes = std::make_shared<std::vector<Note>>();

  Position place(int group, Position extent) {
    notes->push_back({'p', group, inner.next(group)});
    return inner.place(group, extent);
  }
  void retract(int group, Position extent) {
    inner.retract(group, extent);
    notes->push_back({'r', group, inner.next(group)});
  }
  Position next(int group) const { return inner.next(group); }
  void reset() { inner.reset(); }
};

TEST(GroupPositionEncoding, LoopOfTheSpecification) {
  const Units units{{10, 11}, {12}, {13}, {14}};
  for (const double phi : {0.0, 0.5}) {
    DuplexOptions one = options(false, 2);
    one.target_prefix = {1};
    NotedLayout layout{GroupedLayout::group_positions(phi)};
    const auto notes = layout.notes;
    const Outcome found = run(WaitK(1, OneTokenWords{}), one, units, 0, layout);
    using Note = NotedLayout::Note;
    const std::vector<Note> expected{
        {'p', 0, 0},       {'p', 0, 1}, {'p', 0, 2},  // READ prompt and one word
        {'p', 1, phi},                                // WRITE the prefix
        {'p', 1, phi + 1},                            // WRITE word 1
        {'r', 1, phi + 1},  // the next word's start is dropped, word 1 too
        {'p', 0, 3},        // READ
        {'p', 1, phi + 1},  // WRITE word 1 again
    };
    ASSERT_GE(notes->size(), expected.size());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), notes->begin())) << "phi " << phi;
    // Source tokens visible at each question with a candidate: 3, 3 (then the READ), 4, ...
    std::vector<std::int64_t> seen;
    for (const auto& entry : found.trace.entries)
      if (entry.candidate >= 0) seen.push_back(entry.tokens_read);
    EXPECT_EQ(std::vector(seen.begin(), seen.begin() + 3), (std::vector<std::int64_t>{3, 3, 4}));
    // Explicit positions are the ones that caches count by themselves.
    const Outcome counted =
        run(WaitK(1, OneTokenWords{}), one, units, 0, GroupedLayout::group_positions(phi));
    EXPECT_EQ(counted.trace.entries, found.trace.entries);
  }
}

TEST(GroupPositionEncoding, KBeyondTheSourceReadsEverythingFirst) {
  const Outcome found = run(WaitK(9, OneTokenWords{}), options(false, 5), random_units(4, 8));
  for (const auto& entry : found.trace.entries)
    if (entry.candidate >= 0) {
      EXPECT_EQ(entry.units_read, 4);
    }
  EXPECT_EQ(found.report.unit_wait, 4);
  EXPECT_EQ(found.reader.final_tokens.size(), 5U);
}

TEST(Duplex, LayoutsOfTheOrderOfArrivalRunOnOneThread) {
  const Units units = random_units(8, 9);
  const Outcome interleaved =
      run(WaitK(1, FixedUnits{2}), options(false), units, 0, InterleavedLayout());
  const Outcome overlapped =
      run(WaitK(1, FixedUnits{2}), options(false), units, 0, OverlappedLayout());
  const Outcome grouped = run(WaitK(1, FixedUnits{2}), options(false), units);
  EXPECT_EQ(interleaved.reader.final_tokens.size(), 40U);
  EXPECT_EQ(overlapped.reader.final_tokens.size(), 40U);
  // Other positions, other logits.
  EXPECT_NE(interleaved.trace.entries, grouped.trace.entries);
  EXPECT_NE(overlapped.trace.entries, interleaved.trace.entries);
  using Interleaved = Duplex<WaitK<FixedUnits>, float, float, InterleavedLayout>;
  EXPECT_THROW(Interleaved(model(), options(true), WaitK(1, FixedUnits{2}), InterleavedLayout()),
               Error);
}

// An end token ends the target when it would be written, with all that is provisional; a policy
// that reads on instead is not stopped by it.
TEST(Duplex, EndTokens) {
  const Units units = random_units(6, 5);
  const std::vector<Token> tokens =
      run(WaitK(1, FixedUnits{2}), options(false), units).reader.final_tokens;
  DuplexOptions ends = options(false);
  ends.end_tokens = {tokens[7]};
  const auto first = std::find(tokens.begin(), tokens.end(), tokens[7]) - tokens.begin();
  const Outcome found = run(WaitK(1, FixedUnits{2}), ends, units);
  EXPECT_EQ(found.end, DuplexEnd::kEndToken);
  EXPECT_EQ(found.reader.final_tokens, std::vector(tokens.begin(), tokens.begin() + first));

  // Every token is an end token: nothing is written, but all hypotheses are closed by reading on.
  DuplexOptions all = options(false);
  for (Token token = 0; token < 128; ++token) all.end_tokens.push_back(token);
  EXPECT_EQ(run(WaitK(1, FixedUnits{5}), all, units).report.units_read, 2);
  struct ReadsOn {
    Decision decide(const PolicyState& state) const {
      return state.source_ended ? Decision::write() : Decision::read();
    }
  };
  const Outcome read = run(ReadsOn{}, all, units);
  EXPECT_EQ(read.report.units_read, 6);
  EXPECT_EQ(read.end, DuplexEnd::kEndToken);
  EXPECT_TRUE(read.reader.tokens.empty());

  // Provisional tokens before the end token become final.
  struct Provisional {
    Decision decide(const PolicyState& state) const {
      if (!state.candidate) return state.units_read < 1 ? Decision::read() : Decision::write();
      return Decision::write_provisional();
    }
    std::int64_t max_provisional() const { return 64; }
  };
  const std::vector<Token> once = run(Provisional{}, options(false, 12), units).reader.tokens;
  EXPECT_EQ(once.size(), 12U);
  DuplexOptions provisional = options(false, 12);
  provisional.end_tokens = {once[5]};
  const Outcome closed = run(Provisional{}, provisional, units);
  EXPECT_EQ(closed.end, DuplexEnd::kEndToken);
  EXPECT_FALSE(closed.reader.final_tokens.empty());
  EXPECT_EQ(closed.reader.final_tokens, closed.reader.tokens);
}

// ---- hostile use -------------------------------------------------------------------------------

template <class Call>
ErrorCode code_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_FALSE(error.detail().what.empty());
    return error.code();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorCode::kIo;
}

using Stream = Duplex<WaitK<FixedUnits>, float>;

TEST(DuplexHostile, RefusesEmbeddingsThatDoNotFit) {
  const std::int64_t width = model()->config().hidden_size;
  std::vector<float> rows(static_cast<std::size_t>(5 * width));
  Stream none(model(), options(false), WaitK(1, FixedUnits{1}));
  EXPECT_EQ(code_of([&] { none.feed_embeddings({rows.data(), 1, width}); }), ErrorCode::kConfig);
  DuplexOptions with = options(false);
  with.queue_embeddings = 3;
  EXPECT_EQ(code_of([&] { Stream(model(), with, WaitK(1, FixedUnits{1})); }), ErrorCode::kConfig);
  with.queue_embeddings = 4;
  Stream duplex(model(), with, WaitK(1, FixedUnits{1}));
  const auto refused = [&](std::int64_t count, std::int64_t cols) {
    return code_of([&] { duplex.feed_embeddings({rows.data(), count, cols}); });
  };
  EXPECT_EQ(refused(0, width), ErrorCode::kShape);
  EXPECT_EQ(refused(5, width), ErrorCode::kShape);
  EXPECT_EQ(refused(1, width - 1), ErrorCode::kShape);
  rows[static_cast<std::size_t>(width) + 2] = std::nanf("");
  EXPECT_EQ(refused(2, width), ErrorCode::kFormat);
  EXPECT_EQ(duplex.feed_embeddings({rows.data(), 1, width}), FeedStatus::kAccepted);
}

TEST(DuplexHostile, FeedingAfterTheEnd) {
  for (const bool concurrent : {false, true}) {
    Stream duplex(model(), options(concurrent), WaitK(1, FixedUnits{2}));
    const std::vector<Token> unit{3};
    EXPECT_EQ(duplex.feed(unit), FeedStatus::kAccepted);
    duplex.end_input();
    duplex.end_input();  // again: nothing
    EXPECT_EQ(code_of([&] { duplex.feed(unit); }), ErrorCode::kOrder);
    EXPECT_EQ(code_of([&] { duplex.try_feed(unit); }), ErrorCode::kOrder);
    int outputs = 0;
    duplex.for_each([&](const DuplexOutput&) { ++outputs; });
    EXPECT_EQ(outputs, 40);
    Stream last(model(), options(concurrent), WaitK(1, FixedUnits{2}));
    EXPECT_EQ(last.feed(unit, true), FeedStatus::kAccepted);
    EXPECT_EQ(code_of([&] { last.feed(unit); }), ErrorCode::kOrder);
  }
}

TEST(DuplexHostile, UnitsThatDoNotFit) {
  DuplexOptions small = options(true);
  small.source.capacity = 6;
  Stream duplex(model(), small, WaitK(1, FixedUnits{2}));
  EXPECT_EQ(code_of([&] { duplex.feed({}); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { duplex.feed(std::vector<Token>(5, 1)); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { duplex.feed(std::vector<Token>{1, 128}); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { duplex.feed(std::vector<Token>{-1}); }), ErrorCode::kShape);
  EXPECT_EQ(duplex.feed(std::vector<Token>(4, 1)), FeedStatus::kAccepted);
  // The full source can never hold three more; two more it can.
  EXPECT_EQ(code_of([&] { duplex.feed(std::vector<Token>(3, 1)); }), ErrorCode::kCapacity);
  EXPECT_EQ(duplex.feed(std::vector<Token>(2, 1)), FeedStatus::kAccepted);
  duplex.end_input();
  duplex.for_each([](const DuplexOutput&) {});
  EXPECT_EQ(duplex.report().source_tokens, 6);
}

TEST(DuplexHostile, TwoFeedersAreSerialised) {
  DuplexOptions many = options(true, 1 << 20);
  many.source = sink_window(1, 8);
  many.target = sink_window(1, 8);
  many.queue_units = 2;
  Stream duplex(model(), many, WaitK(1, FixedUnits{1}));
  std::atomic<int> accepted{0};
  {
    const auto feed = [&](Token token) {
      for (int i = 0; i < 50; ++i)
        if (duplex.feed(std::vector<Token>(3, token)) == FeedStatus::kAccepted) ++accepted;
    };
    std::jthread one(feed, 5);
    std::jthread two(feed, 6);
    std::jthread consumer([&] {
      while (duplex.report().units_read < 100)
        if (!duplex.next_for(1ms) && duplex.is_finished()) return;
    });
  }
  EXPECT_EQ(accepted, 100);
  EXPECT_EQ(duplex.report().source_tokens, 300);
  duplex.stop();
}

TEST(DuplexHostile, SlowConsumerPausesTheTargetAndLosesNothing) {
  DuplexOptions slow = options(true);
  slow.output_capacity = 4;
  const Units units = random_units(10, 6);
  const Outcome reference = run(WaitK(2, FixedUnits{3}), options(false), units);
  Stream duplex(model(), slow, WaitK(2, FixedUnits{3}), GroupedLayout::group_positions(0.5));
  for (const auto& unit : units) duplex.feed(unit);
  duplex.end_input();
  std::this_thread::sleep_for(20ms);
  // Ahead of its reader by no more than the ring.
  EXPECT_LE(duplex.report().tokens_written, 4);
  std::vector<Token> written;
  while (const auto output = duplex.next()) {
    written.push_back(output->token);
    std::this_thread::sleep_for(200us);
  }
  EXPECT_EQ(written, reference.reader.final_tokens);
}

TEST(DuplexHostile, PolicyThatNeverWrites) {
  for (const bool concurrent : {false, true})
    for (const Decision answer : {Decision::read(), Decision::wait()}) {
      const Outcome found = run(Always{answer}, options(concurrent), random_units(9, 2));
      EXPECT_EQ(found.end, DuplexEnd::kNothingLeft);
      EXPECT_TRUE(found.reader.tokens.empty());
      EXPECT_EQ(found.report.units_read, answer.action == Action::kRead ? 9 : 0);
    }
  EXPECT_EQ(run(Always{Decision::stop()}, options(true), random_units(2, 2)).end,
            DuplexEnd::kPolicyStop);
}

struct ThrowsAfter {
  int left;
  Decision decide(const PolicyState& state) {
    if (!state.candidate) return state.units_read < 1 ? Decision::read() : Decision::write();
    if (left-- == 0) throw std::runtime_error("the policy gives up");
    return Decision::write();
  }
};

TEST(DuplexHostile, PolicyThatThrowsReachesTheCallerAfterItsOutputs) {
  for (const bool concurrent : {false, true}) {
    Duplex<ThrowsAfter, float> duplex(model(), options(concurrent), ThrowsAfter{3});
    duplex.feed(std::vector<Token>{4, 5});
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(duplex.next());
    EXPECT_THROW(duplex.next(), std::runtime_error);
    EXPECT_THROW(duplex.poll(), std::runtime_error);
    EXPECT_TRUE(duplex.is_finished());
    EXPECT_EQ(duplex.end_reason(), DuplexEnd::kError);
    EXPECT_EQ(duplex.feed(std::vector<Token>{4}), FeedStatus::kStopped);
  }
}

TEST(DuplexHostile, SourceThatStalls) {
  Stream duplex(model(), options(true), WaitK(1, FixedUnits{2}));
  EXPECT_FALSE(duplex.next_for(5ms));
  EXPECT_FALSE(duplex.is_finished());
  duplex.feed(std::vector<Token>{3});
  duplex.feed(std::vector<Token>{4});
  ASSERT_TRUE(duplex.next());
  ASSERT_TRUE(duplex.next());
  EXPECT_FALSE(duplex.next_for(5ms));  // waits for the third unit
  EXPECT_FALSE(duplex.poll());
  duplex.feed(std::vector<Token>{5});
  EXPECT_TRUE(duplex.next());
  duplex.stop();
  while (duplex.next()) {
  }
  EXPECT_EQ(duplex.end_reason(), DuplexEnd::kStopped);

  // Without threads there is nobody to wait for: starved is not finished.
  Stream sequential(model(), options(false), WaitK(1, FixedUnits{2}));
  EXPECT_FALSE(sequential.next());
  EXPECT_FALSE(sequential.is_finished());
  sequential.feed(std::vector<Token>{3});
  sequential.feed(std::vector<Token>{4});
  EXPECT_TRUE(sequential.next());
}

TEST(DuplexHostile, StopReleasesWhoeverWaits) {
  for (int trial = 0; trial < 20; ++trial) {
    DuplexOptions tight = options(true, 1 << 20);
    tight.source = sink_window(1, 8);
    tight.target = sink_window(1, 8);
    tight.queue_units = 1;
    tight.output_capacity = 4;  // nobody reads: the target stops, then the source, then the feeder
    Stream duplex(model(), tight, WaitK(1, FixedUnits{2}));
    std::jthread feeder([&] {
      while (duplex.feed(std::vector<Token>{3, 4}) == FeedStatus::kAccepted) {
      }
    });
    std::this_thread::sleep_for(500us * (trial % 7));
    duplex.stop();
    feeder.join();
    EXPECT_EQ(duplex.try_feed(std::vector<Token>{1}), FeedStatus::kStopped);
    while (duplex.next()) {
    }
    EXPECT_EQ(duplex.end_reason(), DuplexEnd::kStopped);
  }
  // Destroyed without having been used, consumed or stopped.
  Stream unused(model(), options(true), WaitK(1, FixedUnits{2}));
  Stream fed(model(), options(true), WaitK(1, FixedUnits{2}));
  fed.feed(std::vector<Token>{3});
}

TEST(DuplexHostile, FullQueueAndFullTarget) {
  DuplexOptions sequential = options(false);
  sequential.queue_units = 2;
  sequential.target.capacity = 10;
  Stream duplex(model(), sequential, WaitK(1, FixedUnits{2}));
  EXPECT_EQ(duplex.feed(std::vector<Token>{1}), FeedStatus::kAccepted);
  EXPECT_EQ(duplex.feed(std::vector<Token>{2}), FeedStatus::kAccepted);
  EXPECT_EQ(duplex.feed(std::vector<Token>{3}), FeedStatus::kFull);  // nobody else could make room
  duplex.end_input();
  std::size_t written = 0;
  duplex.for_each([&](const DuplexOutput&) { ++written; });
  EXPECT_EQ(duplex.end_reason(), DuplexEnd::kTargetFull);
  // Ten places, two for the prefix; the ninth token was predicted and could not be fed.
  EXPECT_EQ(written, 9U);
}

TEST(DuplexHostile, OptionsThatMakeNoSense) {
  const auto expect = [](const char* field, auto&& change) {
    DuplexOptions bad = options(true);
    change(bad);
    try {
      Stream duplex(model(), bad, WaitK(1, FixedUnits{2}));
      ADD_FAILURE() << field;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig) << error.what();
      EXPECT_NE(error.detail().field.find(field), std::string::npos) << error.what();
    }
  };
  expect("target_prefix", [](DuplexOptions& o) { o.target_prefix = {}; });
  expect("target_prefix", [](DuplexOptions& o) { o.target_prefix = {128}; });
  expect("end_tokens", [](DuplexOptions& o) { o.end_tokens = {-1}; });
  expect("max_unit_tokens", [](DuplexOptions& o) { o.max_unit_tokens = 0; });
  expect("max_unit_tokens", [](DuplexOptions& o) { o.max_unit_tokens = std::int64_t{1} << 60; });
  expect("max_target_tokens", [](DuplexOptions& o) { o.max_target_tokens = 0; });
  expect("max_lead_units", [](DuplexOptions& o) { o.max_lead_units = 0; });
  expect("max_lead_tokens", [](DuplexOptions& o) { o.max_lead_tokens = 3; });
  expect("coalesce_units", [](DuplexOptions& o) { o.coalesce_units = 65; });
  expect("queue_tokens", [](DuplexOptions& o) { o.queue_tokens = 3; });
  expect("max_units", [](DuplexOptions& o) { o.queue_units = 0; });
  expect("output_capacity", [](DuplexOptions& o) { o.output_capacity = 3; });
  expect("policy", [](DuplexOptions& o) { o.source.policy = CachePolicy::kRecompute; });
  expect("num_threads", [](DuplexOptions& o) { o.target_threads = 0; });
  expect("window_size", [](DuplexOptions& o) { o.source = sink_window(2, 0); });
  expect("lead", [](DuplexOptions& o) { o.target.lead = -1; });
}

TEST(DuplexHostile, ALayerThatTheModelLacks) {
  const std::int64_t layers = model()->config().num_layers();
  for (const std::int64_t layer : {-layers - 1, layers, std::int64_t{1000}}) {
    const auto error = test::error_of(
        [&] { Duplex duplex(model(), options(false), AttentionGuided(0.1F, 2, 1, layer)); });
    ASSERT_TRUE(error) << layer;
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
    EXPECT_EQ(error->detail().field, "probe_layer");
    EXPECT_EQ(error->detail().found, std::to_string(layer));
  }
  for (const std::int64_t layer : {-layers, layers - 1})
    EXPECT_NO_THROW(Duplex(model(), options(false), AttentionGuided(0.1F, 2, 1, layer)));
}

// ---- figures -----------------------------------------------------------------------------------

TEST(Duplex, ReportsWhatHappened) {
  const Units units = random_units(7, 5);
  std::int64_t source_tokens = 0;
  for (const auto& unit : units) source_tokens += static_cast<std::int64_t>(unit.size());
  Stream duplex(model(), options(true, 30), WaitK(2, FixedUnits{3}));
  for (const auto& unit : units) duplex.feed(unit);
  duplex.end_input();
  duplex.for_each([](const DuplexOutput&) {});
  const DuplexReport report = duplex.report();
  EXPECT_EQ(report.units_fed, 7);
  EXPECT_EQ(report.units_read, 7);
  EXPECT_EQ(report.source_tokens, source_tokens);
  EXPECT_EQ(report.tokens_written, 30);
  EXPECT_EQ(report.tokens_retracted, 0);
  EXPECT_EQ(report.unit_wait, 3);  // the prompt and two units
  EXPECT_EQ(report.token_wait,
            static_cast<std::int64_t>(units[0].size() + units[1].size() + units[2].size()));
  EXPECT_EQ(report.inter_token.count, 29);
  EXPECT_GT(report.ttft_from_first_unit_ms, 0);
  EXPECT_LE(report.ttft_from_last_unit_ms, report.ttft_from_first_unit_ms);
  EXPECT_GT(report.source_busy_ms, 0);
  EXPECT_GT(report.target_busy_ms, 0);
  EXPECT_GE(report.wall_ms, report.target_busy_ms);
  // Three tokens a unit: 3 3 3 4 4 4 ... 7 7 7 and on to the end.
  std::vector<std::int64_t> delays;
  for (std::int64_t t = 0; t < 30; ++t) delays.push_back(std::min<std::int64_t>(3 + t / 3, 7));
  EXPECT_EQ(std::vector(duplex.delays().begin(), duplex.delays().end()), delays);
  EXPECT_EQ(duplex.engine().source().cache().bytes_moved(), 0);
  EXPECT_EQ(duplex.engine().target().cache().bytes_moved(), 0);
}

TEST(Duplex, ReportBeforeAnythingHappened) {
  Stream duplex(model(), options(false), WaitK(1, FixedUnits{1}));
  const DuplexReport report = duplex.report();
  EXPECT_TRUE(std::isnan(report.ttft_from_first_unit_ms));
  EXPECT_TRUE(std::isnan(report.work_ratio()));
  EXPECT_EQ(report.wall_ms, 0);
  EXPECT_TRUE(duplex.delays().empty());
  // A target without any source has no time from its first unit.
  Duplex<Always, float> alone(model(), options(false, 3), Always{Decision::write()});
  alone.end_input();
  alone.for_each([](const DuplexOutput&) {});
  EXPECT_EQ(alone.report().tokens_written, 3);
  EXPECT_TRUE(std::isnan(alone.report().ttft_from_first_unit_ms));
}

// Both groups bounded: thousands of tokens pass through a few dozen slots, and the end is as
// deterministic as the beginning.
TEST(Duplex, EndlessStreamInBoundedGroups) {
  DuplexOptions bounded = options(true, 6000);
  bounded.source = sink_window(2, 12);
  bounded.target = sink_window(2, 12);
  const Units units = random_units(3000, 12, 3);
  const Outcome concurrent = run(WaitK(2, FixedUnits{2}), bounded, units);
  bounded.concurrent = false;
  bounded.queue_units = 3000;
  const Outcome sequential = run(WaitK(2, FixedUnits{2}), bounded, units);
  EXPECT_EQ(concurrent.reader.final_tokens.size(), 6000U);
  EXPECT_EQ(concurrent.trace.entries, sequential.trace.entries);
}

TEST(Duplex, CoalescedUnitsAreAllRead) {
  DuplexOptions joined = options(true);
  joined.coalesce_units = 8;
  const Outcome found = run(WaitK(3, FixedUnits{2}), joined, random_units(30, 4));
  EXPECT_EQ(found.reader.final_tokens.size(), 40U);
  joined.concurrent = false;
  EXPECT_EQ(run(WaitK(3, FixedUnits{2}), joined, random_units(30, 4)).report.tokens_written, 40);
}

// Random feeding, stopping and consuming for SLUICE_STRESS_SECONDS (1 by default): what
// ThreadSanitizer is to watch.
TEST(DuplexStress, RandomFeedCancelStop) {
  const char* const text = std::getenv("SLUICE_STRESS_SECONDS");
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::duration<double>(text == nullptr ? 1.0 : std::atof(text));
  std::uint64_t seed = 0;
  std::int64_t streams = 0;
  std::int64_t tokens = 0;
  while (std::chrono::steady_clock::now() < until) {
    Random random(++seed);
    DuplexOptions o = options(true, 1 + static_cast<std::int64_t>(random.below(200)));
    if (random.below(2) == 0)
      o.source = sink_window(2, 4 + static_cast<std::int64_t>(random.below(9)));
    if (random.below(2) == 0)
      o.target = sink_window(1, 4 + static_cast<std::int64_t>(random.below(9)));
    o.queue_units = 1 + static_cast<std::int64_t>(random.below(4));
    o.output_capacity = 4 + static_cast<std::int64_t>(random.below(4));
    o.max_lead_units = 1 + static_cast<std::int64_t>(random.below(4));
    o.coalesce_units = 1 + static_cast<std::int64_t>(random.below(3));
    o.source_threads = 1 + static_cast<int>(random.below(2));
    o.target_threads = 1 + static_cast<int>(random.below(2));
    if (random.below(3) == 0)
      o.team = std::make_shared<ThreadTeam>(1 + static_cast<int>(random.below(3)));
    const bool throws = random.below(8) == 0;
    struct Mixed {
      WaitK<FixedUnits> wait_k;
      LocalAgreement agreement;
      bool agrees;
      std::int64_t throws_at;
      Decision decide(const PolicyState& state) {
        if (throws_at-- == 0) throw std::runtime_error("as planned");
        return agrees ? agreement.decide(state) : wait_k.decide(state);
      }
      std::int64_t max_provisional() const { return agreement.max_provisional(); }
    };
    Duplex<Mixed, float> duplex(
        model(), o,
        Mixed{WaitK(1 + static_cast<std::int64_t>(random.below(3)), FixedUnits{2}),
              LocalAgreement(3), random.below(2) == 0,
              throws ? static_cast<std::int64_t>(random.below(60)) : -1});
    const auto feed = [&duplex](std::uint64_t feeder_seed) {
      Random r(feeder_seed);
      try {
        for (const auto& unit : random_units(static_cast<int>(r.below(60)), feeder_seed)) {
          const FeedStatus status = r.below(4) == 0 ? duplex.try_feed(unit) : duplex.feed(unit);
          if (status == FeedStatus::kStopped) return;
          if (r.below(16) == 0) std::this_thread::yield();
        }
        if (r.below(2) == 0) duplex.end_input();
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kOrder) << error.what();  // the other feeder ended it
      }
    };
    std::jthread one(feed, 2 * seed);
    std::jthread two(feed, 2 * seed + 1);
    Reader reader;
    try {
      const std::int64_t patience = static_cast<std::int64_t>(random.below(100));
      for (std::int64_t taken = 0; taken < patience; ++taken) {
        const auto output = random.below(2) == 0 ? duplex.poll() : duplex.next_for(1ms);
        if (output) reader(*output);
        static_cast<void>(duplex.report());
      }
      duplex.stop();
      while (const auto output = duplex.next()) reader(*output);
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "as planned");
      EXPECT_TRUE(throws);
    }
    tokens += static_cast<std::int64_t>(reader.tokens.size());
    ++streams;
  }
  EXPECT_GT(streams, 0);
  RecordProperty("streams", static_cast<int>(streams));
  RecordProperty("tokens", static_cast<int>(tokens));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
