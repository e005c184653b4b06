// SPDX-License-Identifier: MIT
#include "sluice/cache/kind_retention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "support/naive_kinds.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::error_of;

/// A retention, the definition beside it, and what lies in each slot.
struct Pair {
  explicit Pair(const KindRetentionConfig& config) : retention(config), naive(config) {}

  void begin_round() {
    retention.begin_round([&](const KindMove& move) {
      ASSERT_EQ(slots.count(move.from_slot), 1U);
      slots[move.to_slot] = slots[move.from_slot];
      written[move.to_slot] = {move.position, move.position, move.position};
    });
    naive.begin_round();
  }
  void begin_span(SpanRole role, const VisionGrid& grid = {}) {
    retention.begin_span(role, grid);
    naive.begin_span(role, grid);
    open.resize(static_cast<std::size_t>(grid.num_tokens()));
    fill_positions(grid, retention.next_position() - grid.extent(), open);
    in_span = 0;
  }
  void append(std::int64_t tokens) {
    const bool vision = retention.role() == SpanRole::kVision;
    const Position text = retention.next_position();
    ASSERT_EQ(retention.status(tokens), CacheStatus::kOk);
    retention.append(tokens);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const std::int64_t slot = retention.slot_of_newest(tokens - t);
      ASSERT_GE(slot, 0);
      ASSERT_LT(slot, retention.config().capacity());
      slots[slot] = retention.total() - tokens + t;
      written[slot] = vision ? open[static_cast<std::size_t>(in_span + t)]
                             : on_all_axes(text + static_cast<Position>(t));
    }
    in_span += tokens;
  }
  /// Appends, and now and then takes back first.
  void extend(std::int64_t tokens, Random& random) {
    while (tokens > 0) {
      const std::int64_t part =
          std::min(tokens, test::between(random, 1, retention.config().max_chunk));
      if (random.below(4) == 0) {
        append(part);
        retention.rollback();
        in_span -= part;
      }
      append(part);
      for (std::int64_t t = 0; t < part; ++t) naive.append(retention.total() - part + t);
      check();
      retention.commit();
      tokens -= part;
    }
  }
  /// The runs hold exactly the definition's tokens, at its distances from the reader.
  void check() {
    std::array<SegmentRule, KindRetention::kMaxSegments> rules;
    const int count = retention.rules(rules);
    std::map<std::int64_t, std::pair<Position3, TokenKind>> seen;  // rank positions by index
    const Position reader = retention.next_position();
    for (int r = 0; r < count; ++r) {
      const SegmentRule& rule = rules[static_cast<std::size_t>(r)];
      ASSERT_EQ(rule.visible, rule.count);
      for (std::int64_t i = 0; i < rule.count; ++i) {
        const std::int64_t slot = rule.first_slot + i;
        // A rank counts from the reader's: what stands in its numbering, less its shift.
        const Position offset = retention.rank_of(reader) - (reader + rule.shift);
        const Position3 at = written[slot];
        const bool fresh =
            seen.insert({slots[slot], {{at.t + offset, at.h + offset, at.w + offset}, rule.kind}})
                .second;
        ASSERT_TRUE(fresh) << "token " << slots[slot] << " twice";
      }
    }
    const std::vector<test::NaiveKinds::Token> expected = naive.tokens();
    ASSERT_EQ(seen.size(), expected.size());
    std::int64_t vision = 0;
    for (const test::NaiveKinds::Token& token : expected) {
      const auto found = seen.find(token.index);
      ASSERT_NE(found, seen.end()) << "token " << token.index;
      // Positions are sums of thirds of a unit over a stream of some thousand units.
      EXPECT_NEAR(found->second.first.t, token.position[0], 1e-9) << token.index;
      EXPECT_NEAR(found->second.first.h, token.position[1], 1e-9) << token.index;
      EXPECT_NEAR(found->second.first.w, token.position[2], 1e-9) << token.index;
      EXPECT_EQ(found->second.second, token.kind);
      vision += token.kind == TokenKind::kVision ? 1 : 0;
    }
    EXPECT_EQ(retention.kept(TokenKind::kVision), vision);
    EXPECT_EQ(retention.size(), static_cast<std::int64_t>(expected.size()));
    most_segments = std::max(most_segments, count);
  }

  KindRetention retention;
  test::NaiveKinds naive;
  std::map<std::int64_t, std::int64_t> slots;
  std::map<std::int64_t, Position3> written;
  std::vector<Position3> open;
  std::int64_t in_span = 0;
  int most_segments = 0;
};

void run_stream(const KindRetentionConfig& config, std::uint64_t seed, int rounds, int* segments) {
  Random random(seed);
  Pair pair(config);
  pair.begin_span(SpanRole::kHead);
  pair.extend(test::between(random, 0, 2), random);
  pair.begin_span(SpanRole::kPrevious);
  pair.extend(test::between(random, 0, 10), random);
  pair.begin_span(SpanRole::kTail);
  pair.extend(test::between(random, 0, 2), random);
  for (int r = 0; r < rounds; ++r) {
    pair.begin_round();
    pair.check();
    pair.begin_span(SpanRole::kTurn);
    pair.extend(test::between(random, 0, 2), random);
    for (std::int64_t grids = test::between(random, 0, 2); grids > 0; --grids) {
      const VisionGrid grid{.frames = test::between(random, 1, 2),
                            .rows = test::between(random, 1, 2),
                            .cols = test::between(random, 1, 3),
                            .frame_step = static_cast<Position>(random.below(4)) / 3};
      pair.begin_span(SpanRole::kVision, grid);
      pair.extend(grid.num_tokens(), random);
    }
    pair.begin_span(SpanRole::kTurn);
    pair.extend(test::between(random, 0, 3), random);
    pair.begin_span(SpanRole::kReply);
    pair.extend(test::between(random, 0, 4), random);
    if (testing::Test::HasFatalFailure()) return;
  }
  *segments = pair.most_segments;
}

TEST(KindRetention, KeepsWhatTheDefinitionKeepsWhereItStands) {
  int segments = 0;
  for (std::uint64_t seed = 1; seed <= 12; ++seed)
    for (const auto& [text, vision] : {std::pair{3, 3}, {5, 2}, {2, 5}, {1, 1}, {4, 1}}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed << ", rounds " << text << ", " << vision);
      run_stream(test::small_kinds(text, vision), seed, 40, &segments);
      if (HasFatalFailure()) return;
      // Rounds that are whole add at most a wrap for each kind, however many there are.
      if (text == vision) {
        EXPECT_LE(segments, 9);
      }
    }
}

TEST(KindRetention, HasFewRunsAtTheDefaults) {
  KindRetentionConfig config;
  config.max_vision = 4 * 66;
  config.max_chunk = 66;
  Pair pair(config);
  Random random(3);
  for (const SpanRole role : {SpanRole::kHead, SpanRole::kPrevious, SpanRole::kTail}) {
    pair.begin_span(role);
    pair.append(role == SpanRole::kTail ? 2 : 4);
    pair.retention.commit();
  }
  int most = 0;
  for (int r = 0; r < 200; ++r) {
    pair.retention.begin_round();
    pair.begin_span(SpanRole::kTurn);
    pair.append(10);
    pair.retention.commit();
    for (int frame = 0; frame < 4; ++frame) {
      pair.begin_span(SpanRole::kVision, {.frames = 1, .rows = 6, .cols = 11, .frame_step = 0.5});
      pair.append(66);
      pair.retention.commit();
    }
    pair.begin_span(SpanRole::kReply);
    for (std::int64_t i = test::between(random, 1, 20); i > 0; --i) {
      pair.append(1);
      pair.retention.commit();
    }
    std::array<SegmentRule, KindRetention::kMaxSegments> rules;
    most = std::max(most, pair.retention.rules(rules));
  }
  EXPECT_LE(most, 9);
  EXPECT_EQ(pair.retention.kept(TokenKind::kPinned), 4 + 512 + 2);
  EXPECT_EQ(pair.retention.kept(TokenKind::kVision), 16 * 4 * 66);
  EXPECT_GE(pair.retention.kept(TokenKind::kText), 512 + 16 * 11);
}

// Specification, test 7.3: two chunks at 2 and at 8 frames a second.
TEST(KindRetention, StandsAtTheReleasedPositions) {
  struct Case {
    VisionGrid grid;
    std::vector<double> t;
    std::vector<double> w;
  };
  for (const Case& c : {Case{{.frames = 1, .rows = 1, .cols = 2, .frame_step = 2},
                             {0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 9, 11, 12},
                             {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}},
                        Case{{.frames = 4, .rows = 1, .cols = 2, .frame_step = 0.5},
                             {0,   1,   2,   3,   3,  3.5, 3.5,  4,    4,  4.5, 4.5, 5.5, 6.5,
                              7.5, 8.5, 9.5, 9.5, 10, 10,  10.5, 10.5, 11, 11,  12,  13},
                             {}}}) {
    KindRetentionConfig config = test::small_kinds(4, 4);
    config.max_chunk = config.max_turn = 8;
    Pair pair(config);
    Random random(1);
    const auto text = [&](std::int64_t tokens) {
      pair.begin_span(SpanRole::kTurn);
      pair.extend(tokens, random);
    };
    const auto vision = [&] {
      pair.begin_span(SpanRole::kVision, c.grid);
      pair.extend(c.grid.num_tokens(), random);
    };
    pair.begin_round();
    text(3);
    vision();
    text(4);
    pair.begin_round();
    vision();
    text(2);
    std::map<std::int64_t, Position3> by_index;
    for (const auto& [slot, index] : pair.slots) by_index[index] = pair.written[slot];
    std::vector<double> t;
    std::vector<double> w;
    for (const auto& [index, position] : by_index) {
      t.push_back(position.t);
      w.push_back(position.w);
    }
    EXPECT_EQ(t, c.t);
    if (!c.w.empty()) {
      EXPECT_EQ(w, c.w);
    }
  }
}

TEST(KindRetention, RefusesWhatDoesNotFit) {
  const auto refused = [](auto change) {
    KindRetentionConfig config = test::small_kinds(2, 2);
    change(config);
    return error_of([&] { KindRetention retention(config); });
  };
  EXPECT_FALSE(refused([](KindRetentionConfig&) {}));
  for (const auto& error : {refused([](KindRetentionConfig& c) { c.text_sinks = -1; }),
                            refused([](KindRetentionConfig& c) { c.text_window = 0; }),
                            refused([](KindRetentionConfig& c) { c.text_rounds = 0; }),
                            refused([](KindRetentionConfig& c) { c.vision_rounds = 0; }),
                            refused([](KindRetentionConfig& c) { c.max_reply = 8; }),
                            refused([](KindRetentionConfig& c) { c.max_chunk = 0; }),
                            refused([](KindRetentionConfig& c) { c.text_rounds = 100; })}) {
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
  }
}

// Nothing of one conversation is left in the next.
TEST(KindRetention, AConversationAfterAResetIsAFreshOne) {
  KindRetention used(test::small_kinds(2, 2));
  const auto feed = [](KindRetention& retention, SpanRole role, std::int64_t tokens) {
    retention.begin_span(role);
    for (std::int64_t t = 0; t < tokens; ++t) {
      ASSERT_EQ(retention.status(1), CacheStatus::kOk) << to_string(role);
      retention.append(1);
      retention.commit();
    }
  };
  feed(used, SpanRole::kHead, 1);
  feed(used, SpanRole::kPrevious, 5);
  used.reset();
  KindRetention fresh(test::small_kinds(2, 2));
  for (KindRetention* retention : {&used, &fresh}) {
    feed(*retention, SpanRole::kHead, 2);
    feed(*retention, SpanRole::kTail, 1);
    feed(*retention, SpanRole::kTail, 1);  // the tail goes on: it does not begin anew
    retention->begin_round();
    feed(*retention, SpanRole::kReply, 2);
  }
  std::array<SegmentRule, KindRetention::kMaxSegments> a;
  std::array<SegmentRule, KindRetention::kMaxSegments> b;
  const int count = used.rules(a);
  ASSERT_EQ(count, fresh.rules(b));
  for (int i = 0; i < count; ++i) {
    const auto n = static_cast<std::size_t>(i);
    EXPECT_EQ(a[n].first_position, b[n].first_position) << i;
    EXPECT_EQ(a[n].shift, b[n].shift) << i;
    EXPECT_EQ(a[n].first_index, b[n].first_index) << i;
    EXPECT_EQ(a[n].count, b[n].count) << i;
    // Head, tail and reply stand one behind the other: nobody is shifted.
    EXPECT_EQ(a[n].shift, 0) << i;
  }
}

TEST(KindRetention, HoldsEachKindToItsRoom) {
  KindRetention retention(test::small_kinds(2, 2));
  EXPECT_EQ(retention.status(1), CacheStatus::kFull);                      // no span is open
  EXPECT_TRUE(error_of([&] { retention.begin_span(SpanRole::kReply); }));  // no round
  retention.begin_span(SpanRole::kTail);
  EXPECT_TRUE(error_of([&] { retention.begin_span(SpanRole::kHead); }));  // out of order
  EXPECT_EQ(retention.status(2), CacheStatus::kOk);
  EXPECT_EQ(retention.status(3), CacheStatus::kFull);
  retention.append(2);
  EXPECT_TRUE(error_of([&] { retention.begin_round(); }));  // uncommitted
  retention.commit();
  retention.begin_round();
  EXPECT_TRUE(error_of([&] { retention.begin_span(SpanRole::kTail); }));
  EXPECT_EQ(retention.status(1), CacheStatus::kFull);
  retention.begin_span(SpanRole::kReply);
  EXPECT_EQ(retention.status(4), CacheStatus::kOk);
  EXPECT_EQ(retention.status(5), CacheStatus::kFull);
  retention.append(4);
  retention.commit();
  EXPECT_EQ(retention.status(1), CacheStatus::kFull);
  for (int span = 0; span < 5; ++span) retention.begin_span(SpanRole::kTurn);
  EXPECT_TRUE(error_of([&] { retention.begin_span(SpanRole::kTurn); }));
  retention.reset();
  EXPECT_EQ(retention.total(), 0);
  EXPECT_EQ(retention.size(), 0);
}

}  // namespace SLUICE_TEST_UNIT
