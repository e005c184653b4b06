// SPDX-License-Identifier: MIT
/// A stream that reads while it writes on the GPU against the same program with the tag cpu. Linked
/// twice, as session_test.cpp: with the device's half, and with plain_device_session.cpp in its
/// place, which tests the host's half anywhere.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/duplex_session.hpp>
#include <sluice/cache/head_map.hpp>
#include <sluice/core/random.hpp>
#include <sluice/nn/embedding.hpp>
#include <sluice/position/group_layout.hpp>
#include <sluice/stream/duplex_backend.hpp>
#include <sluice/stream/policy.hpp>

#include "backend/cuda/random_decoder.hpp"

namespace {

using namespace sluice;
using namespace host_test;
using namespace std::chrono_literals;

using Units = std::vector<std::vector<Token>>;

Units random_units(std::size_t count, std::uint64_t seed, std::uint64_t longest = 5) {
  Random random(seed);
  Units units;
  for (std::size_t u = 0; u < count; ++u)
    units.push_back(some_tokens(1 + random.below(longest), seed + 17 * u));
  return units;
}

CacheOptions sink_window(std::int64_t sinks, std::int64_t window,
                         PositionRule rule = PositionRule::kInCache) {
  return {.policy = CachePolicy::kSinkWindow,
          .num_sink_tokens = sinks,
          .window_size = window,
          .position_rule = rule};
}
CacheOptions full(std::int64_t capacity) {
  return {.policy = CachePolicy::kFull, .capacity = capacity};
}

DuplexOptions options_of(const CacheOptions& source, const CacheOptions& target) {
  DuplexOptions options;
  options.source = source;
  options.target = target;
  options.target_prefix = {1, 2, 3};
  options.max_unit_tokens = 5;
  options.max_lead_tokens = 7;
  options.max_target_tokens = 40;
  return options;
}

// ---- one side beside the other, the same text for both
// -------------------------------------------

/// What the embedding of a unit's tokens is. [tokens, hidden_size]
std::vector<float> embeddings_of(const Decoder& model, std::span<const Token> unit) {
  std::vector<float> rows(unit.size() * static_cast<std::size_t>(kHidden));
  embed(model.weights().embedding, unit, 1.0F,
        {rows.data(), static_cast<std::int64_t>(unit.size()), kHidden});
  return rows;
}

/// Any order of reading, feeding and taking back that an engine might choose, over several rounds
/// of both rings: logits at every step, with the CPU's text fed to both.
template <KvElement Element>
void expect_the_same_logits(const char* what, const Setting& setting, DuplexOptions options,
                            const GroupedLayout& layout, int steps, std::uint64_t seed) {
  SCOPED_TRACE(what);
  const auto model = make_model(setting, seed);
  options.queue_embeddings = 64;
  const DuplexNeeds needs{.max_provisional = 3};
  CpuDuplexSides<Element, Element, GroupedLayout> expected(model, options, needs, layout);
  CudaDuplexSides<Element, GroupedLayout> found(place_model<cuda, Element>(model), options, needs,
                                                layout);
  Random random(seed);
  std::int64_t held = 0;
  std::int64_t fed = 0;
  double worst = 0;
  const auto feed = [&](std::span<const Token> tokens) {
    ASSERT_EQ(found.target_status(static_cast<std::int64_t>(tokens.size())),
              expected.target_status(static_cast<std::int64_t>(tokens.size())));
    expected.feed_target(tokens, held, {});
    found.feed_target(tokens, held, {});
    fed += static_cast<std::int64_t>(tokens.size());
    const double error = relative_error(found.logits(), expected.logits());
    ASSERT_TRUE(std::isfinite(error)) << "token " << fed;
    worst = std::max(worst, error);
  };
  const auto read = [&] {
    const std::vector<Token> unit = some_tokens(1 + random.below(5), random.below(1 << 20));
    ASSERT_EQ(found.source_room(), expected.source_room());
    if (static_cast<std::int64_t>(unit.size()) > expected.source_room()) return;
    const std::vector<float> rows = embeddings_of(*model, unit);
    DecoderInput input;
    if (random.below(3) == 0)
      input.embeddings = {rows.data(), static_cast<std::int64_t>(unit.size()), kHidden};
    else
      input.tokens = unit;
    expected.read_source(input);
    found.read_source(input);
    ASSERT_EQ(found.source_total(), expected.source_total());
  };
  read();
  feed(options.target_prefix);
  for (int step = 0; step < steps && !testing::Test::HasFailure(); ++step) {
    read();
    if (random.below(2) == 0) {
      held += static_cast<std::int64_t>(
          random.below(static_cast<std::uint64_t>(expected.source_total() - held + 1)));
      expected.hold(held);
      found.hold(held);
    }
    if (random.below(5) == 0 && fed > 4) {
      const auto back = static_cast<std::int64_t>(1 + random.below(4));
      expected.take_back(back);
      found.take_back(back);
      fed -= back;
    }
    feed(some_tokens(1, random.below(1 << 20)));
  }
  // The source's rows come from rounded products on a GPU.
  const double unit = std::is_same_v<Element, bf16> ? 1 : 0x1p-3;
  EXPECT_LE(worst, unit * kRoundedBound);
  std::printf("%s: relative error of logits %.2e, %lld source and %lld target tokens\n", what,
              worst, static_cast<long long>(found.source_total()), static_cast<long long>(fed));
}

TEST(CudaDuplexSession, ComputesTheCpusLogits) {
  SKIP_WITHOUT_DEVICE();
  const GroupedLayout groups = GroupedLayout::group_positions(64);
  const Setting setting{.head_dim = 64};
  expect_the_same_logits<bf16>("full", setting, options_of(full(300), full(200)), groups, 40, 1);
  expect_the_same_logits<bf16>("endless", setting,
                               options_of(sink_window(2, 12), sink_window(1, 9)), groups, 90, 2);
  expect_the_same_logits<f16>("endless, in text, padded", {.head_dim = 16, .interleaved = true},
                              options_of(sink_window(3, 10, PositionRule::kInText),
                                         sink_window(0, 8, PositionRule::kInText)),
                              GroupedLayout::group_positions(0.5), 60, 3);
  expect_the_same_logits<bf16>(
      "two rules", {.head_dim = 128},
      options_of(sink_window(2, 9), sink_window(1, 7, PositionRule::kInText)), groups, 40, 4);
  CacheOptions window = sink_window(0, 11);
  window.policy = CachePolicy::kWindow;
  expect_the_same_logits<bf16>("an endless source, a full target", setting,
                               options_of(window, full(100)), groups, 40, 5);
}

// ---- whole streams
// -------------------------------------------------------------------------------

struct Question {
  std::int64_t units_read, tokens_read, tokens_written;
  std::optional<Token> candidate;
  std::vector<float> logits;
  Action action;
  friend bool operator==(const Question&, const Question&) = default;
};

/// Notes what its inner policy is asked and answers.
template <class Inner>
struct Traced {
  Inner inner;
  std::shared_ptr<std::vector<Question>> asked;

  Decision decide(const PolicyState& state) {
    const Decision decision = inner.decide(state);
    asked->push_back({state.units_read, state.tokens_read, state.tokens_written, state.candidate,
                      copy(state.logits), decision.action});
    return decision;
  }
  std::int64_t max_provisional() const {
    if constexpr (requires { inner.max_provisional(); })
      return inner.max_provisional();
    else
      return 0;
  }
};

struct Outcome {
  std::vector<Token> text;
  std::vector<Question> asked;
  DuplexEnd end = DuplexEnd::kRunning;
  DuplexReport report;
};

template <Backend Tag, KvElement Element = bf16, class Policy>
Outcome run(const auto& model, const DuplexOptions& options, Policy policy, const Units& units,
            std::uint64_t seed = 0) {
  Outcome result;
  const auto asked = std::make_shared<std::vector<Question>>();
  DuplexOn<Tag, Traced<Policy>, Element> duplex(model, options, {std::move(policy), asked},
                                                GroupedLayout::group_positions(64));
  std::jthread feeder([&] {
    Random random(seed + 1);
    for (std::size_t u = 0; u < units.size(); ++u) {
      if (seed != 0 && random.below(3) == 0) std::this_thread::sleep_for(300us * random.below(5));
      if (duplex.feed(units[u], u + 1 == units.size()) != FeedStatus::kAccepted) return;
    }
  });
  if (!options.concurrent) feeder.join();
  std::vector<Token> provisional;
  for (const DuplexOutput& output : duplex) {
    const auto count = static_cast<std::ptrdiff_t>(output.count);
    switch (output.kind) {
      case DuplexOutput::Kind::kFinal: result.text.push_back(output.token); break;
      case DuplexOutput::Kind::kProvisional: provisional.push_back(output.token); break;
      case DuplexOutput::Kind::kConfirmed:
        result.text.insert(result.text.end(), provisional.begin(), provisional.begin() + count);
        provisional.erase(provisional.begin(), provisional.begin() + count);
        break;
      case DuplexOutput::Kind::kRetracted:
        provisional.erase(provisional.end() - count, provisional.end());
        break;
    }
  }
  result.end = duplex.end_reason();
  result.report = duplex.report();
  duplex.stop();
  feeder = {};
  result.asked = *asked;
  return result;
}

/// Questions and answers are the CPU's up to a candidate whose logit leads by no more than the
/// bound: the texts may part there. Returns how many were compared.
std::size_t expect_the_same_course(const Outcome& found, const Outcome& expected) {
  const std::size_t count = std::min(found.asked.size(), expected.asked.size());
  for (std::size_t i = 0; i < count; ++i) {
    const Question& a = found.asked[i];
    const Question& b = expected.asked[i];
    EXPECT_EQ(a.units_read, b.units_read) << "question " << i;
    EXPECT_EQ(a.tokens_read, b.tokens_read) << "question " << i;
    EXPECT_EQ(a.tokens_written, b.tokens_written) << "question " << i;
    EXPECT_EQ(a.logits.empty(), b.logits.empty()) << "question " << i;
    if (!b.logits.empty()) {
      EXPECT_LE(relative_error(a.logits, b.logits), kRoundedBound) << "question " << i;
      if (a.candidate != b.candidate) {
        EXPECT_LT(margin_of(b.logits), 2 * kRoundedBound * norm_of(b.logits)) << "question " << i;
        return i;
      }
    }
    if (testing::Test::HasFailure()) return i;
  }
  EXPECT_EQ(found.text, expected.text);
  EXPECT_EQ(found.end, expected.end);
  return count;
}

TEST(CudaDuplexSession, GoesTheCpusCourse) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 7);
  const auto placed = place_model<cuda, bf16>(model);
  const Units units = random_units(14, 8);
  std::size_t same = 0;
  std::size_t all = 0;
  const auto compare = [&](const char* what, const DuplexOptions& options, const auto& policy) {
    SCOPED_TRACE(what);
    const Outcome expected = run<cpu>(model, options, policy, units);
    const Outcome found = run<cuda>(placed, options, policy, units);
    same += expect_the_same_course(found, expected);
    all += expected.asked.size();
  };
  for (const bool endless : {false, true}) {
    const DuplexOptions options = endless ? options_of(sink_window(2, 10), sink_window(1, 9))
                                          : options_of(full(100), full(100));
    compare("wait-k", options, WaitK(2, FixedUnits{3}));
    compare("local agreement", options, LocalAgreement(4));
    compare("speak or silence", options, SpeakOrSilence(7, 0.01F, 4));
  }
  // A text that parts early is compared no further: most must not.
  EXPECT_GE(2 * same, all);
  std::printf("%zu of %zu questions before texts part within the bound\n", same, all);
}

TEST(CudaDuplexSession, TwoThreadsGiveTheBitsOfOne) {
  SKIP_WITHOUT_DEVICE();
  const auto placed = place_model<cuda, bf16>(make_model({.head_dim = 64}, 9));
  const Units units = random_units(12, 10);
  const auto compare = [&](const char* what, DuplexOptions options, const auto& policy) {
    SCOPED_TRACE(what);
    options.concurrent = false;
    const Outcome expected = run<cuda>(placed, options, policy, units);
    EXPECT_FALSE(expected.text.empty());
    options.concurrent = true;
    for (const std::uint64_t seed : {0, 1, 2}) {
      options.queue_tokens = seed == 1 ? 5 : 8192;
      options.max_lead_units = seed == 1 ? 1 : 1024;
      const Outcome found = run<cuda>(placed, options, policy, units, seed);
      EXPECT_EQ(found.text, expected.text) << "run " << seed;
      EXPECT_TRUE(found.asked == expected.asked) << "run " << seed;
      EXPECT_EQ(found.end, expected.end) << "run " << seed;
    }
  };
  compare("full", options_of(full(100), full(100)), WaitK(2, FixedUnits{3}));
  DuplexOptions endless = options_of(sink_window(2, 6), sink_window(1, 7));
  compare("endless", endless, WaitK(1, FixedUnits{2}));
  endless.sampler.temperature = 1;
  endless.sampler.seed = 5;
  compare("endless, drawn", endless, HoldN(1, 3));
}

TEST(CudaDuplexSession, EmbeddingsOfTokensAreTheTokensBitForBit) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 11);
  DuplexOptions options = options_of(sink_window(2, 8), sink_window(1, 7));
  options.queue_embeddings = 64;
  options.concurrent = false;
  options.max_target_tokens = 12;
  const Units units = random_units(8, 12);
  std::vector<Token> texts[2];
  for (const bool embedded : {false, true}) {
    DuplexOn<cuda, WaitK<FixedUnits>, bf16> duplex(place_model<cuda, bf16>(model), options,
                                                   WaitK(1, FixedUnits{2}));
    for (const std::vector<Token>& unit : units) {
      const std::vector<float> rows = embeddings_of(*model, unit);
      const FeedStatus status =
          embedded ? duplex.try_feed_embeddings(
                         {rows.data(), static_cast<std::int64_t>(unit.size()), kHidden})
                   : duplex.try_feed(unit);
      ASSERT_EQ(status, FeedStatus::kAccepted);
    }
    duplex.end_input();
    for (const DuplexOutput& output : duplex) texts[embedded].push_back(output.token);
  }
  EXPECT_EQ(texts[1].size(), 12U);
  EXPECT_EQ(texts[1], texts[0]);
}

TEST(CudaDuplexSession, JoinedUnitsAreAllRead) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 13);
  DuplexOptions options = options_of(full(100), full(100));
  options.coalesce_units = 3;
  options.concurrent = false;
  options.max_target_tokens = 6;
  const Units units = random_units(9, 14);
  const Outcome joined =
      run<cuda>(place_model<cuda, bf16>(model), options, WaitK(9, FixedUnits{3}, 0), units);
  const Outcome expected = run<cpu>(model, options, WaitK(9, FixedUnits{3}, 0), units);
  EXPECT_EQ(joined.report.units_read, 9);
  EXPECT_EQ(joined.report.source_tokens, expected.report.source_tokens);
  expect_the_same_course(joined, expected);
}

/// Writes without ever reading more than its first unit.
struct Writes {
  Decision decide(const PolicyState& state) const {
    return state.units_read == 0 ? Decision::read() : Decision::write();
  }
};
/// Reads to the end.
struct Reads {
  Decision decide(const PolicyState&) const { return Decision::read(); }
};

TEST(CudaDuplexSession, EndsAsTheCpus) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 15);
  const auto placed = place_model<cuda, bf16>(model);
  const Units units = random_units(3, 16);
  const auto ends = [&](DuplexEnd expected, const DuplexOptions& options, const auto& policy,
                        std::size_t tokens) {
    const Outcome on_gpu = run<cuda>(placed, options, policy, units);
    EXPECT_EQ(on_gpu.end, expected) << to_string(on_gpu.end);
    EXPECT_EQ(on_gpu.text.size(), tokens);
    const Outcome on_cpu = run<cpu>(model, options, policy, units);
    EXPECT_EQ(on_cpu.end, expected) << to_string(on_cpu.end);
    EXPECT_EQ(on_cpu.text.size(), tokens);
  };
  const DuplexOptions plain = options_of(sink_window(2, 8), sink_window(2, 8));
  DuplexOptions options = plain;
  options.max_target_tokens = 5;
  ends(DuplexEnd::kTokenLimit, options, Writes{}, 5);
  options = plain;
  options.target = full(10);  // the prefix, seven tokens, and one that is not fed any more
  ends(DuplexEnd::kTargetFull, options, Writes{}, 8);
  ends(DuplexEnd::kNothingLeft, plain, Reads{}, 0);
  options = plain;
  for (Token token = 0; token < kVocab; ++token) options.end_tokens.push_back(token);
  ends(DuplexEnd::kEndToken, options, Writes{}, 0);

  CudaDuplexSession<Writes, bf16> duplex(placed, plain, Writes{});
  ASSERT_EQ(duplex.feed(units[0]), FeedStatus::kAccepted);
  ASSERT_TRUE(duplex.next().has_value());
  duplex.stop();
  while (duplex.next()) continue;
  EXPECT_EQ(duplex.end_reason(), DuplexEnd::kStopped);
  EXPECT_EQ(duplex.feed(units[0]), FeedStatus::kStopped);
}

/// Reads no logits, and notes whether there are any.
struct Blind {
  std::shared_ptr<bool> saw_logits;
  Decision decide(const PolicyState& state) const {
    if (!state.logits.empty()) *saw_logits = true;
    return state.units_read == 0 ? Decision::read() : Decision::write();
  }
  bool needs_logits() const { return false; }
};

TEST(CudaDuplexSession, BringsLogitsToWhomReadsThem) {
  SKIP_WITHOUT_DEVICE();
  const auto placed = place_model<cuda, bf16>(make_model({.head_dim = 64}, 17));
  DuplexOptions options = options_of(full(20), full(20));
  options.max_target_tokens = 3;
  for (const double temperature : {0.0, 1.0}) {
    options.sampler.temperature = temperature;
    const auto saw = std::make_shared<bool>(false);
    CudaDuplexSession<Blind, bf16> duplex(placed, options, Blind{saw});
    ASSERT_EQ(duplex.feed(std::vector<Token>{4, 5}, true), FeedStatus::kAccepted);
    duplex.for_each([](const DuplexOutput&) {});
    EXPECT_EQ(*saw, temperature > 0);  // the sampler reads them
  }
}

TEST(CudaDuplexSession, RunsWhereItsModelLies) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 19);
  DuplexOptions options = options_of(sink_window(2, 8), sink_window(1, 7));
  options.max_target_tokens = 10;
  const Units units = random_units(6, 20);
  std::vector<Outcome> outcomes;
  for (int device = 0; device < 2 && has_device(device); ++device)
    outcomes.push_back(
        run<cuda>(place_model<cuda, bf16>(model, device), options, WaitK(1, FixedUnits{2}), units));
  for (const Outcome& outcome : outcomes) EXPECT_TRUE(outcome.asked == outcomes.front().asked);
}

// ---- what is refused: before a device is looked for
// ----------------------------------------------

template <class Policy, class Layout>
std::string refused_field(const std::shared_ptr<const Decoder>& model, const DuplexOptions& options,
                          ErrorCode code, const Policy& policy, const Layout& layout) {
  try {
    DuplexOn<cuda, Policy, bf16, Layout> duplex(model, options, policy, layout);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_FALSE(error.detail().expected.empty());
    EXPECT_FALSE(error.detail().found.empty());
    return error.detail().field;
  }
  return "none";
}

TEST(CudaDuplexSession, SaysWhatItDoesNotDo) {
  const auto model = make_model({.head_dim = 64}, 71);
  const WaitK policy(1, FixedUnits{2});
  const GroupedLayout groups = GroupedLayout::group_positions();
  const auto refused = [&](auto&& change) {
    DuplexOptions options = options_of(sink_window(2, 8), sink_window(2, 8));
    change(options);
    return refused_field(model, options, ErrorCode::kUnsupported, policy, groups);
  };
  const HeadMap map(kLayers, kKvHeads,
                    std::vector<HeadRetention>(static_cast<std::size_t>(kLayers * kKvHeads),
                                               {.num_sink_tokens = 1, .window_size = 8}));
  EXPECT_EQ(refused([&](auto& o) {
              o.source.policy = o.target.policy = CachePolicy::kPerHead;
              o.source.heads = o.target.heads = map;
            }),
            "source.policy");
  EXPECT_EQ(refused([](auto& o) { o.source.key_form = KeyForm::kRaw; }), "source.key_form");
  EXPECT_EQ(refused([](auto& o) { o.target.key_form = KeyForm::kRaw; }), "target.key_form");
  EXPECT_EQ(refused([](auto& o) { o.activations = Activations::kInt8; }), "activations");
  EXPECT_EQ(refused([](auto& o) { o.bidirectional_prefix = true; }), "bidirectional_prefix");
  DuplexOptions options = options_of(sink_window(2, 8), sink_window(2, 8));
  EXPECT_EQ(
      refused_field(model, options, ErrorCode::kUnsupported, AttentionGuided(0.1F, 2), groups),
      "newest_source_tokens");
  options.concurrent = false;
  EXPECT_EQ(refused_field(model, options, ErrorCode::kUnsupported, policy, InterleavedLayout()),
            "layout");
  EXPECT_EQ(refused_field(make_model({.head_dim = 64, .trained_window = 5}, 1), options,
                          ErrorCode::kUnsupported, policy, groups),
            "source.window_size");
  EXPECT_EQ(refused_field(make_model({.head_dim = 64, .biased = true}, 1), options,
                          ErrorCode::kUnsupported, policy, groups),
            "biases of attention");
  // What makes no sense on any backend.
  options.sampler.temperature = -1;
  EXPECT_EQ(refused_field(model, options, ErrorCode::kConfig, policy, groups), "temperature");
  options = options_of(sink_window(2, 8), sink_window(2, 2));
  EXPECT_EQ(refused_field(model, options, ErrorCode::kConfig, policy, groups), "max_chunk");
  options = options_of(sink_window(2, 8), sink_window(2, 8));
  options.target.policy = CachePolicy::kRecompute;
  EXPECT_EQ(refused_field(model, options, ErrorCode::kConfig, policy, groups), "target.policy");
}

TEST(CudaDuplexSession, SaysThatThereIsNoDevice) {
  if (has_device(kCurrentDevice)) GTEST_SKIP() << "there is one";
  EXPECT_EQ(refused_field(make_model({.head_dim = 64}, 81),
                          options_of(sink_window(2, 8), sink_window(2, 8)), ErrorCode::kDevice,
                          WaitK(1, FixedUnits{2}), GroupedLayout::group_positions()),
            "device");
}

}  // namespace
