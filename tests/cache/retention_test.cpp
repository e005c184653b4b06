// SPDX-License-Identifier: MIT
#include "sluice/cache/retention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::ByteReader;
using sluice::ByteWriter;
using sluice::CacheStatus;
using sluice::Error;
using sluice::ErrorCode;
using sluice::Eviction;
using sluice::KeyForm;
using sluice::kNoCeiling;
using sluice::kUnlimitedWindow;
using sluice::Position;
using sluice::PositionRule;
using sluice::Random;
using sluice::Retention;
using sluice::RetentionConfig;
using sluice::SegmentRule;
using sluice::TokenKind;

using Indices = std::vector<std::int64_t>;

Indices kept(const Retention& retention) {
  Indices result;
  for (std::int64_t rank = 0; rank < retention.size(); ++rank)
    result.push_back(retention.index_of_rank(rank));
  return result;
}

Indices first_integers(std::int64_t count) {
  Indices result(static_cast<std::size_t>(count));
  std::iota(result.begin(), result.end(), 0);
  return result;
}

std::vector<SegmentRule> rules_of(const Retention& retention, std::int64_t queries) {
  std::array<SegmentRule, Retention::kMaxSegments> rules;
  const int count = retention.rules(queries, rules);
  return {rules.begin(), rules.begin() + count};
}

void feed(Retention& retention, std::int64_t tokens) {
  for (std::int64_t i = 0; i < tokens; ++i) {
    ASSERT_EQ(retention.status(1), CacheStatus::kOk);
    retention.append(1);
    retention.commit();
  }
}

template <class Action>
std::optional<Error> error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

std::vector<std::byte> saved(const Retention& retention) {
  ByteWriter writer;
  retention.save(writer);
  return writer.take();
}

// ---- core-algorithms 1.1: the table of evictions
// -------------------------------------------------

Retention eight_or(std::int64_t tokens) {
  Retention retention(RetentionConfig::on_request(2, 6, 20));
  retention.append(tokens);
  retention.commit();
  return retention;
}

TEST(RetentionEvictions, TypedInTable) {
  const struct {
    std::int64_t cached;
    std::int64_t coming;
    Indices expected;
  } rows[] = {
      {8, 0, {0, 1, 2, 3, 4, 5, 6, 7}},
      {8, 1, {0, 1, 3, 4, 5, 6, 7}},
      {8, 4, {0, 1, 6, 7}},
      {8, 6, {0, 1}},
      {8, 7, {0, 1}},
      {8, 8, {0, 1}},
      {8, 9, {0, 1}},
      {5, 3, {0, 1, 2, 3, 4}},
      {5, 4, {0, 1, 3, 4}},
      {5, 6, {0, 1}},
  };
  for (const auto& row : rows) {
    Retention retention = eight_or(row.cached);
    retention.evict_for_space(row.coming);
    EXPECT_EQ(kept(retention), row.expected) << row.cached << " cached, " << row.coming;
  }
  Retention retention = eight_or(8);
  retention.evict_range(3, 5, [](std::int64_t, std::int64_t) {});
  EXPECT_EQ(kept(retention), (Indices{0, 1, 2, 5, 6, 7}));
}

TEST(RetentionEvictions, FewerTokensThanSinks) {
  for (const std::int64_t coming : {0, 7, 8, 100}) {
    Retention retention = eight_or(1);
    retention.evict_for_space(coming);
    EXPECT_EQ(kept(retention), Indices{0}) << coming;
  }
  Retention empty(RetentionConfig::on_request(2, 6, 20));
  empty.shrink();
  empty.evict_for_space(100);
  EXPECT_EQ(empty.size(), 0);
}

TEST(RetentionEvictions, ShrinkKeepsSinksAndRecent) {
  // The original's cache may grow past its size; the next shrink takes it back.
  Retention retention = eight_or(15);
  retention.shrink();
  EXPECT_EQ(kept(retention), (Indices{0, 1, 9, 10, 11, 12, 13, 14}));
  retention.shrink();
  EXPECT_EQ(retention.size(), 8);
}

TEST(RetentionEvictions, NoRecentTokensKeepsTheSinksAlone) {
  Retention retention(RetentionConfig::on_request(3, 0, 8));
  retention.append(5);
  retention.commit();
  retention.shrink();
  EXPECT_EQ(kept(retention), (Indices{0, 1, 2}));
}

TEST(RetentionEvictions, RangeMovesTheSmallerSideAndLosesNoRow) {
  for (std::int64_t begin = 2; begin <= 9; ++begin) {
    for (std::int64_t end = begin; end <= 9; ++end) {
      Retention retention = eight_or(9);
      Indices rows(20, -1);
      for (std::int64_t i = 0; i < 9; ++i)
        rows[static_cast<std::size_t>(retention.slot_of_rank(i))] = i;
      std::int64_t moves = 0;
      retention.evict_range(begin, end, [&](std::int64_t from, std::int64_t to) {
        rows[static_cast<std::size_t>(to)] = rows[static_cast<std::size_t>(from)];
        ++moves;
      });
      Indices expected = first_integers(9);
      expected.erase(expected.begin() + begin, expected.begin() + end);
      EXPECT_EQ(kept(retention), expected);
      for (std::int64_t rank = 0; rank < retention.size(); ++rank)
        EXPECT_EQ(rows[static_cast<std::size_t>(retention.slot_of_rank(rank))],
                  expected[static_cast<std::size_t>(rank)])
            << begin << " to " << end << ", rank " << rank;
      EXPECT_EQ(moves, begin == end ? 0 : std::min(begin - 2, 9 - end)) << begin << " to " << end;
    }
  }
}

TEST(RetentionEvictions, RefusedCallsChangeNothing) {
  const auto nothing = [](std::int64_t, std::int64_t) {
    FAIL() << "a row was moved";
  };
  Retention retention = eight_or(8);
  const std::vector<std::byte> before = saved(retention);
  const struct {
    std::int64_t begin;
    std::int64_t end;
    const char* found;
  } ranges[] = {{1, 4, "[1, 4)"}, {0, 2, "[0, 2)"}, {5, 4, "[5, 4)"},
                {3, 9, "[3, 9)"}, {9, 9, "[9, 9)"}, {-1, 3, "[-1, 3)"}};
  for (const auto& range : ranges) {
    const auto error = error_of([&] { retention.evict_range(range.begin, range.end, nothing); });
    ASSERT_TRUE(error) << range.found;
    EXPECT_EQ(error->code(), ErrorCode::kShape);
    EXPECT_EQ(error->detail().expected, "within [2, 8]");
    EXPECT_EQ(error->detail().found, range.found);
  }
  EXPECT_EQ(saved(retention), before);

  retention.append(1);
  for (const auto& error :
       {error_of([&] { retention.shrink(); }), error_of([&] { retention.evict_for_space(3); }),
        error_of([&] { retention.evict_range(3, 4, nothing); }),
        error_of([&] { saved(retention); })}) {
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kOrder);
    EXPECT_EQ(error->detail().found, "1");
  }
  retention.rollback();
  EXPECT_EQ(saved(retention).size(), before.size());

  Retention by_itself(RetentionConfig::window(4, 1));
  for (const auto& error :
       {error_of([&] { by_itself.shrink(); }), error_of([&] { by_itself.evict_for_space(1); }),
        error_of([&] { by_itself.evict_range(0, 0, nothing); })}) {
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kOrder);
  }
}

TEST(RetentionEvictions, GapsAreBounded) {
  // Every second token leaves until the runs are used up; shrink() may still cut once more, and
  // nothing can be cut after that, but what needs no new run goes on.
  Retention retention(RetentionConfig::on_request(1, 30, 64));
  const auto move = [](std::int64_t, std::int64_t) {
  };
  retention.append(60);
  retention.commit();
  for (int gap = 0; gap < Retention::kMaxRuns - 1; ++gap) {
    const std::int64_t rank = 8 + gap;  // kept ones and gaps alternate behind the eighth
    retention.evict_range(rank, rank + 1, move);
  }
  const auto refused = [&] {
    const Indices then = kept(retention);
    const auto error =
        error_of([&] { retention.evict_range(retention.size() - 3, retention.size() - 2, move); });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kCapacity);
    EXPECT_EQ(error->detail().field, "runs");
    EXPECT_EQ(kept(retention), then);
  };
  refused();
  retention.evict_for_space(30 - (retention.size() - 5));  // ranks 1 to 4: cuts the first run
  EXPECT_EQ(retention.index_of_rank(0), 0);
  EXPECT_EQ(retention.index_of_rank(1), 5);
  refused();
  retention.append(1);
  EXPECT_LE(rules_of(retention, 1).size(), std::size_t{Retention::kMaxSegments});
  retention.commit();
  retention.evict_range(1, 6, move);  // whole runs: fewer than before
  retention.evict_range(retention.size() - 3, retention.size() - 2, move);
  EXPECT_EQ(retention.index_of_rank(0), 0);
}

// ---- core-algorithms 1.3: the order of operations
// ------------------------------------------------

struct Seen {
  Indices tokens;
  Indices positions;  // of each key and, last, of the query itself
  Indices kept_after;
};

/// What the newest token, still uncommitted, sees, read off the rules alone: a key's position is
/// the query's in-cache place less the distance that the rule gives it.
Seen seen_by_newest(const Retention& retention) {
  Seen seen;
  const std::int64_t query = retention.total() - 1;
  std::int64_t count = 0;
  const std::vector<SegmentRule> rules = rules_of(retention, 1);
  for (const SegmentRule& rule : rules) count += rule.visible;
  for (const SegmentRule& rule : rules) {
    const Position reader = rule.reader_position(retention.write_position(query));
    for (std::int64_t i = 0; i < rule.visible; ++i) {
      seen.tokens.push_back(rule.first_index + i);
      const Position distance = reader - (rule.first_position + static_cast<Position>(i));
      seen.positions.push_back(count - 1 - static_cast<std::int64_t>(distance));
    }
  }
  return seen;
}

std::vector<Seen> run_streaming_llm_loop(Retention retention, std::int64_t steps) {
  std::vector<Seen> result;
  for (std::int64_t t = 0; t < steps; ++t) {
    retention.append(1);
    result.push_back(seen_by_newest(retention));
    retention.commit();
    if (retention.config().eviction == Eviction::kOnRequest) retention.shrink();
    result.back().kept_after = kept(retention);
  }
  return result;
}

TEST(RetentionSteps, TypedInStreamingLlmLoop) {
  // The original's way and this library's token-wise ring must agree in every step.
  std::vector<std::vector<Seen>> ways;
  ways.push_back(run_streaming_llm_loop(Retention(RetentionConfig::on_request(4, 4, 9)), 40));
  ways.push_back(run_streaming_llm_loop(Retention(RetentionConfig::streaming_llm(4, 4)), 40));
  RetentionConfig raw = RetentionConfig::streaming_llm(4, 4);
  raw.key_form = KeyForm::kRaw;
  ways.push_back(run_streaming_llm_loop(Retention(raw), 40));
  for (const std::vector<Seen>& steps : ways) {
    EXPECT_EQ(steps[7].tokens, first_integers(8));
    EXPECT_EQ(steps[7].kept_after, first_integers(8));
    EXPECT_EQ(steps[8].tokens, first_integers(9));
    EXPECT_EQ(steps[8].kept_after, (Indices{0, 1, 2, 3, 5, 6, 7, 8}));
    EXPECT_EQ(steps[9].tokens, (Indices{0, 1, 2, 3, 5, 6, 7, 8, 9}));
    EXPECT_EQ(steps[9].kept_after, (Indices{0, 1, 2, 3, 6, 7, 8, 9}));
    EXPECT_EQ(steps[13].tokens, (Indices{0, 1, 2, 3, 9, 10, 11, 12, 13}));
    EXPECT_EQ(steps[13].kept_after, (Indices{0, 1, 2, 3, 10, 11, 12, 13}));
    for (std::size_t t = 0; t < steps.size(); ++t) {
      EXPECT_EQ(steps[t].positions,
                first_integers(std::min<std::int64_t>(static_cast<std::int64_t>(t) + 1, 9)))
          << "step " << t;
      EXPECT_EQ(steps[t].tokens, ways.front()[t].tokens) << "step " << t;
      EXPECT_EQ(steps[t].kept_after, ways.front()[t].kept_after) << "step " << t;
    }
  }
}

TEST(RetentionSteps, PaperExampleOfPositions) {
  // core-algorithms 1.2: the cache holds 0,1,2,3,6,7,8; token 9 is decoded at positions 0 ... 7.
  Retention retention(RetentionConfig::on_request(4, 3, 16));
  retention.append(9);
  retention.commit();
  retention.shrink();
  EXPECT_EQ(kept(retention), (Indices{0, 1, 2, 3, 6, 7, 8}));
  retention.append(1);
  EXPECT_EQ(seen_by_newest(retention).tokens, (Indices{0, 1, 2, 3, 6, 7, 8, 9}));
  EXPECT_EQ(seen_by_newest(retention).positions, first_integers(8));
}

TEST(RetentionSteps, EvictThenPrefillThenDecodeAsTheChatDemoDoes) {
  // Room for prompt and answer first, then no eviction until the turn ends (1.3, second item).
  Retention retention(RetentionConfig::on_request(2, 10, 12));
  std::int64_t next = 0;
  for (const std::int64_t prompt : {3, 5, 1, 6}) {
    const std::int64_t answer = 4;
    retention.evict_for_space(prompt + answer);
    ASSERT_EQ(retention.status(prompt), CacheStatus::kOk);
    retention.append(prompt);
    retention.commit();
    feed(retention, answer);
    next += prompt + answer;
    EXPECT_EQ(retention.total(), next);
    const Indices tokens = kept(retention);
    EXPECT_EQ(tokens[0], 0);
    EXPECT_EQ(tokens[1], 1);
    EXPECT_EQ(tokens.back(), next - 1);
  }
}

// ---- core-algorithms 1.7: the ring --------------------------------------------------------------

TEST(RetentionRing, TypedInSlots) {
  Retention retention(RetentionConfig::sink_window(2, 3, 1));
  ASSERT_EQ(retention.config().capacity, 5);
  feed(retention, 6);
  retention.append(1);  // "store, then attend": token 6 is in its slot while it is read
  EXPECT_EQ(kept(retention), (Indices{0, 1, 4, 5, 6}));
  Indices by_slot(5);
  Indices position_by_slot(5);
  for (std::int64_t rank = 0; rank < 5; ++rank) {
    const auto slot = static_cast<std::size_t>(retention.slot_of_rank(rank));
    by_slot[slot] = retention.index_of_rank(rank);
    position_by_slot[slot] = rank;
  }
  EXPECT_EQ(by_slot, (Indices{0, 1, 5, 6, 4}));
  EXPECT_EQ(position_by_slot, (Indices{0, 1, 3, 4, 2}));
  EXPECT_EQ(seen_by_newest(retention).tokens, (Indices{0, 1, 4, 5, 6}));
  EXPECT_EQ(seen_by_newest(retention).positions, first_integers(5));
  const std::vector<SegmentRule> rules = rules_of(retention, 1);
  ASSERT_EQ(rules.size(), 3U);  // sinks, and a ring in two runs
  EXPECT_EQ(rules[0].kind, TokenKind::kPinned);
  EXPECT_EQ(rules[1].kind, TokenKind::kText);
  EXPECT_EQ(rules[1].first_slot, 4);
  EXPECT_EQ(rules[2].first_slot, 2);
}

TEST(RetentionRing, NamedConfigurationsHaveTheStatedStorage) {
  EXPECT_EQ(RetentionConfig::window(128, 1).capacity, 128);
  EXPECT_EQ(RetentionConfig::window(128, 64).capacity, 191);
  EXPECT_EQ(RetentionConfig::sink_window(4, 252, 32).capacity, 287);
  const RetentionConfig original = RetentionConfig::streaming_llm(4, 508);
  EXPECT_EQ(original.window_size, 509);  // one convention: the query's own key counts
  EXPECT_EQ(original.capacity, 513);     // cache_size cached keys and the token itself
}

// ---- core-algorithms 10.1: llama.cpp's context shift is an evict_range
// ---------------------------

TEST(RetentionEvictions, TypedInContextShift) {
  const struct {
    std::int64_t tokens, keep, left, discard, after;
  } rows[] = {{15, 4, 11, 5, 10},
              {4095, 1, 4094, 2047, 2048},
              {4095, 4092, 3, 1, 4094},
              {63, 0, 63, 31, 32}};
  for (const auto& row : rows) {
    Retention retention(RetentionConfig::on_request(row.keep, row.tokens - row.keep, row.tokens));
    retention.append(row.tokens);
    retention.commit();
    const std::int64_t left = retention.size() - row.keep;
    EXPECT_EQ(left, row.left);
    EXPECT_EQ(left / 2, row.discard);
    EXPECT_EQ(retention.status(1), CacheStatus::kFull);
    std::int64_t moves = 0;
    retention.evict_range(row.keep, row.keep + left / 2,
                          [&](std::int64_t, std::int64_t) { ++moves; });
    EXPECT_EQ(moves, 0);  // the ring's tail moves, no row does
    EXPECT_EQ(retention.size(), row.after);
    // Positions after the shift are contiguous: ranks.
    retention.append(1);
    EXPECT_EQ(seen_by_newest(retention).positions, first_integers(row.after + 1));
  }
}

// ---- Random sequences against a list of kept indices --------------------------------------------

/// A token as it was written: taken back and appended again it is another one.
struct Written {
  std::int64_t index = -1;
  std::int64_t version = -1;
  friend bool operator==(const Written&, const Written&) = default;
};

/// The naive model: what is kept is a list, slots hold what was written into them.
class Model {
 public:
  explicit Model(const RetentionConfig& config)
      : config_(config), slots_(static_cast<std::size_t>(config.capacity)) {}

  std::int64_t total() const { return total_; }
  std::int64_t uncommitted() const { return total_ - committed_; }
  const Indices& kept() const { return kept_; }
  bool windowed() const {
    return config_.eviction == Eviction::kPerQuery && config_.window_size < kUnlimitedWindow;
  }

  bool fits(std::int64_t tokens) const {
    if (tokens > config_.max_chunk) return false;
    if (windowed()) return uncommitted() + tokens <= config_.max_chunk;
    return static_cast<std::int64_t>(kept_.size()) + tokens <= config_.capacity;
  }
  /// Takes the places of the new tokens from the retention, which has appended them already.
  void append(std::int64_t tokens, const Retention& retention) {
    for (std::int64_t i = 0; i < tokens; ++i) {
      versions_.resize(static_cast<std::size_t>(total_));
      versions_.push_back(++writes_);
      slots_[static_cast<std::size_t>(retention.slot_of_newest(tokens - i))] = {total_, writes_};
      kept_.push_back(total_++);
    }
  }
  void commit() {
    committed_ = total_;
    if (windowed()) kept_ = needed(total_);
  }
  void truncate(std::int64_t tokens) {
    total_ -= tokens;
    if (total_ >= committed_) {
      kept_.resize(kept_.size() - static_cast<std::size_t>(tokens));
      return;
    }
    committed_ = total_;
    if (windowed())
      kept_ = needed(total_);
    else
      kept_.resize(kept_.size() - static_cast<std::size_t>(tokens));
  }
  void evict_for_space(std::int64_t coming) {
    // kv_cache.py in words of lists: [0, start) and [n - recent + coming, n).
    const auto count = static_cast<std::int64_t>(kept_.size());
    if (count + coming <= config_.num_sink_tokens + config_.window_size) return;
    Indices result;
    for (std::int64_t i = 0; i < count; ++i)
      if (i < config_.num_sink_tokens || i >= count - config_.window_size + coming)
        result.push_back(kept_[static_cast<std::size_t>(i)]);
    kept_ = result;
  }
  void evict_range(std::int64_t begin, std::int64_t end) {
    kept_.erase(kept_.begin() + begin, kept_.begin() + end);
  }
  void move(std::int64_t from, std::int64_t to) {
    slots_[static_cast<std::size_t>(to)] = slots_[static_cast<std::size_t>(from)];
  }

  bool holds(std::int64_t slot, std::int64_t index) const {
    return slots_[static_cast<std::size_t>(slot)] ==
           Written{index, versions_[static_cast<std::size_t>(index)]};
  }
  bool stored(std::int64_t index) const {
    return std::find(slots_.begin(), slots_.end(),
                     Written{index, versions_[static_cast<std::size_t>(index)]}) != slots_.end();
  }

  /// The largest t such that every shorter cut, and it, leaves all that the next query needs.
  std::int64_t max_truncate() const {
    std::int64_t result = 0;
    if (!windowed()) {
      while (result < static_cast<std::int64_t>(kept_.size()) &&
             kept_[kept_.size() - 1 - static_cast<std::size_t>(result)] == total_ - 1 - result)
        ++result;
      return result;
    }
    for (; result < total_; ++result)
      for (const std::int64_t index : needed(total_ - result - 1))
        if (!stored(index)) return result;
    return result;
  }

  /// Keys that query `query` sees, in order.
  Indices visible(std::int64_t query) const {
    Indices result;
    for (std::int64_t i = 0; i <= query; ++i) {
      if (windowed() ? i < config_.num_sink_tokens || i > query - config_.window_size
                     : std::find(kept_.begin(), kept_.end(), i) != kept_.end())
        result.push_back(i);
    }
    return result;
  }

 private:
  /// What a query with index `total` sees beside itself.
  Indices needed(std::int64_t total) const {
    Indices result;
    for (std::int64_t i = 0; i < total; ++i)
      if (i < config_.num_sink_tokens || i > total - config_.window_size) result.push_back(i);
    return result;
  }

  RetentionConfig config_;
  Indices kept_;
  std::vector<Written> slots_;
  std::vector<std::int64_t> versions_;
  std::int64_t total_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t writes_ = 0;
};

std::string describe(const RetentionConfig& c) {
  return "sinks " + std::to_string(c.num_sink_tokens) + ", window " +
         std::to_string(c.window_size) + ", capacity " + std::to_string(c.capacity) + ", chunk " +
         std::to_string(c.max_chunk) + ", " + std::string(to_string(c.position_rule)) + ", " +
         std::string(to_string(c.key_form)) +
         (c.eviction == Eviction::kOnRequest ? ", on request" : ", per query") + ", origin " +
         std::to_string(c.origin);
}

/// What the newest `queries` tokens are shown: exactly the keys that one of them sees, at the
/// distances of the position rule, from the slots that hold them.
void expect_rules(const Retention& retention, const Model& model, std::int64_t queries) {
  const RetentionConfig& config = retention.config();
  const std::vector<SegmentRule> rules = rules_of(retention, queries);
  const std::int64_t first_query = model.total() - queries;
  Indices shown;
  for (const SegmentRule& rule : rules) {
    ASSERT_GT(rule.count, 0);
    ASSERT_EQ(rule.visible, rule.count);
    ASSERT_GE(rule.first_slot, 0);
    ASSERT_LE(rule.first_slot + rule.count, config.capacity);
    ASSERT_EQ(rule.kind == TokenKind::kPinned, std::cmp_less(shown.size(), config.num_sink_tokens));
    for (std::int64_t i = 0; i < rule.count; ++i) {
      ASSERT_TRUE(model.holds(rule.first_slot + i, rule.first_index + i))
          << "slot " << rule.first_slot + i << " lost token " << rule.first_index + i;
      shown.push_back(rule.first_index + i);
    }
    if (config.key_form == KeyForm::kRaw) {
      // Rows of a table with `capacity` rows.
      ASSERT_EQ(rule.first_position,
                static_cast<Position>(static_cast<std::int64_t>(rule.first_position)));
      ASSERT_GE(rule.first_position, 0);
      ASSERT_LE(rule.first_position + static_cast<Position>(rule.count - 1),
                static_cast<Position>(config.capacity - 1));
    } else {
      ASSERT_EQ(rule.first_position, retention.write_position(rule.first_index));
    }
  }
  std::vector<bool> is_kept(static_cast<std::size_t>(model.total()));
  for (const std::int64_t i : model.kept()) is_kept[static_cast<std::size_t>(i)] = true;
  Indices expected;
  for (std::int64_t i = 0; i < model.total(); ++i) {
    const bool kept_still = is_kept[static_cast<std::size_t>(i)];
    bool seen =
        queries == 0 && kept_still &&
        (!model.windowed() || i < config.num_sink_tokens || i > model.total() - config.window_size);
    for (std::int64_t q = std::max(first_query, i); q < model.total() && !seen; ++q)
      seen =
          model.windowed() ? i < config.num_sink_tokens || i > q - config.window_size : kept_still;
    if (seen) expected.push_back(i);
  }
  ASSERT_EQ(shown, expected);

  for (std::int64_t query = first_query; query < model.total(); ++query) {
    const Indices visible = model.visible(query);
    const auto own_rank = static_cast<std::int64_t>(visible.size()) - 1;
    std::vector<std::int64_t> rank_of(static_cast<std::size_t>(model.total()), -1);
    for (std::int64_t rank = 0; rank <= own_rank; ++rank)
      rank_of[static_cast<std::size_t>(visible[static_cast<std::size_t>(rank)])] = rank;
    for (const SegmentRule& rule : rules) {
      const Position reader = rule.reader_position(retention.write_position(query));
      for (std::int64_t i = 0; i < rule.count; ++i) {
        const std::int64_t key = rule.first_index + i;
        const std::int64_t rank = rank_of.at(static_cast<std::size_t>(key));
        if (rank < 0) continue;  // for another query of the chunk
        const std::int64_t distance =
            config.position_rule == PositionRule::kInText ? query - key : own_rank - rank;
        ASSERT_EQ(reader - (rule.first_position + static_cast<Position>(i)),
                  static_cast<Position>(distance))
            << "query " << query << ", key " << key;
      }
    }
  }
}

void expect_state(const Retention& retention, const Model& model) {
  ASSERT_EQ(retention.total(), model.total());
  ASSERT_EQ(retention.committed(), model.total() - model.uncommitted());
  ASSERT_EQ(kept(retention), model.kept());
  std::vector<bool> taken(static_cast<std::size_t>(retention.config().capacity));
  for (std::int64_t rank = 0; rank < retention.size(); ++rank) {
    const std::int64_t slot = retention.slot_of_rank(rank);
    ASSERT_GE(slot, 0);
    ASSERT_LT(slot, retention.config().capacity);
    ASSERT_FALSE(taken[static_cast<std::size_t>(slot)]);
    taken[static_cast<std::size_t>(slot)] = true;
    ASSERT_TRUE(model.holds(slot, retention.index_of_rank(rank))) << "rank " << rank;
  }
  if (model.windowed() && retention.config().window_size == 1) {
    // A query that sees no older token needs none; the ring's length is the limit all the same.
    ASSERT_LE(retention.max_truncate(), model.max_truncate());
    ASSERT_GE(retention.max_truncate(), model.uncommitted());
  } else {
    ASSERT_EQ(retention.max_truncate(), model.max_truncate());
  }
  for (std::int64_t tokens = 1; tokens <= retention.config().max_chunk + 1; ++tokens)
    ASSERT_EQ(retention.status(tokens) == CacheStatus::kOk, model.fits(tokens)) << tokens;
}

void run_random_sequence(const RetentionConfig& config, std::uint64_t seed, int operations) {
  SCOPED_TRACE(describe(config));
  Retention retention(config);
  Model model(config);
  Random random(seed);
  const auto below = [&](std::int64_t bound) {
    return static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(bound)));
  };
  for (int step = 0; step < operations; ++step) {
    SCOPED_TRACE("operation " + std::to_string(step));
    const std::int64_t choice = below(16);
    if (choice < 8) {
      const std::int64_t tokens = 1 + below(config.max_chunk);
      if (!model.fits(tokens)) {
        ASSERT_EQ(retention.status(tokens), CacheStatus::kFull);
      } else {
        retention.append(tokens);
        model.append(tokens, retention);
      }
    } else if (choice < 11) {
      retention.commit();
      model.commit();
    } else if (choice == 11) {
      retention.rollback();
      model.truncate(model.uncommitted());
    } else if (choice == 12) {
      const std::int64_t most = retention.max_truncate();
      const auto error = error_of([&] { retention.truncate(most + 1); });
      ASSERT_TRUE(error);
      ASSERT_EQ(error->code(), ErrorCode::kCapacity);
      ASSERT_EQ(error->detail().expected, "0 to " + std::to_string(most));
      ASSERT_TRUE(error_of([&] { retention.truncate(-1); }));
      const std::int64_t tokens = below(most + 1);
      retention.truncate(tokens);
      model.truncate(tokens);
    } else if (config.eviction == Eviction::kOnRequest && model.uncommitted() == 0) {
      if (choice == 13) {
        const std::int64_t coming = below(config.window_size + 3);
        retention.evict_for_space(coming);
        model.evict_for_space(coming);
      } else if (choice == 14) {
        retention.shrink();
        model.evict_for_space(0);
      } else if (retention.size() >= config.num_sink_tokens) {
        const std::int64_t spare = retention.size() - config.num_sink_tokens;
        const std::int64_t begin = config.num_sink_tokens + below(spare + 1);
        const std::int64_t end = begin + below(retention.size() - begin + 1);
        const auto error = error_of([&] {
          retention.evict_range(begin, end,
                                [&](std::int64_t from, std::int64_t to) { model.move(from, to); });
        });
        if (error)
          ASSERT_EQ(error->code(), ErrorCode::kCapacity);
        else
          model.evict_range(begin, end);
      }
    }
    expect_state(retention, model);
    for (std::int64_t queries = 0; queries <= model.uncommitted(); ++queries)
      expect_rules(retention, model, queries);
    if (model.uncommitted() == 0 && step % 7 == 0) {
      // A restored copy goes on in place of the original.
      const std::vector<std::byte> bytes = saved(retention);
      Retention restored(config);
      restored.append(1);
      ByteReader reader(bytes);
      restored.restore(reader);
      reader.expect_end();
      ASSERT_EQ(saved(restored), bytes);
      retention = restored;
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(RetentionProperties, WindowsAgreeWithAListOfKeptTokens) {
  std::uint64_t seed = 0;
  for (std::int64_t sinks = 0; sinks <= 4; ++sinks)
    for (std::int64_t window = 1; window <= 9; ++window)
      for (std::int64_t chunk = 1; chunk <= window; chunk += 1 + chunk / 3)
        for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText})
          for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
            RetentionConfig config = RetentionConfig::sink_window(sinks, window, chunk);
            config.capacity += static_cast<std::int64_t>(seed % 4);  // spare slots are allowed
            config.position_rule = rule;
            config.key_form = form;
            config.origin = seed % 3 == 0 ? 1000.5 : 0;
            run_random_sequence(config, ++seed, 100);
            if (HasFatalFailure()) return;
          }
}

TEST(RetentionProperties, FullCachesAgreeWithAListOfKeptTokens) {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    RetentionConfig config = RetentionConfig::full(24, 5);
    config.num_sink_tokens = static_cast<std::int64_t>(seed % 3);
    config.position_rule = seed % 2 == 0 ? PositionRule::kInCache : PositionRule::kInText;
    config.key_form = seed % 5 < 2 ? KeyForm::kRaw : KeyForm::kRotated;
    config.origin = seed % 7 == 0 ? 0.5 : 0;
    run_random_sequence(config, seed, 150);
    if (HasFatalFailure()) return;
  }
}

TEST(RetentionProperties, RequestedEvictionsAgreeWithAListOfKeptTokens) {
  std::uint64_t seed = 0;
  for (std::int64_t start = 0; start <= 4; ++start)
    for (const std::int64_t recent : {0, 1, 2, 5, 9, 30})
      for (const std::int64_t spare : {1, 4, 11})
        for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText})
          for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
            RetentionConfig config =
                RetentionConfig::on_request(start, recent, start + recent + spare);
            config.position_rule = rule;
            config.key_form = form;
            config.origin = seed % 3 == 0 ? 1000.5 : 0;
            run_random_sequence(config, ++seed, 120);
            if (HasFatalFailure()) return;
          }
}

TEST(RetentionTransactions, RollBackRestoresTheKeptTokensExactly) {
  Retention retention(RetentionConfig::sink_window(2, 5, 4));
  feed(retention, 23);
  const Indices before = kept(retention);
  Indices slots;
  for (std::int64_t rank = 0; rank < retention.size(); ++rank)
    slots.push_back(retention.slot_of_rank(rank));
  for (int attempt = 0; attempt < 10; ++attempt) {
    retention.append(3);
    retention.append(1);
    EXPECT_EQ(retention.status(1), CacheStatus::kFull);
    for (std::int64_t back = 1; back <= 4; ++back)
      EXPECT_EQ(std::count(slots.begin(), slots.end(), retention.slot_of_newest(back)), 0)
          << "a roll-back would find this slot overwritten";
    retention.rollback();
    EXPECT_EQ(kept(retention), before);
    EXPECT_EQ(retention.total(), 23);
  }
}

TEST(RetentionTransactions, TruncationReachesAsFarAsTheSpareSlots) {
  RetentionConfig config = RetentionConfig::sink_window(1, 4, 2);
  config.capacity += 10;  // ring of 15, of which a step needs 5
  Retention retention(config);
  feed(retention, 100);
  EXPECT_EQ(retention.max_truncate(), 12);  // the next query needs 3 of the 15 newest
  retention.truncate(12);
  EXPECT_EQ(kept(retention), (Indices{0, 85, 86, 87}));
  EXPECT_EQ(retention.max_truncate(), 0);
  feed(retention, 1);
  EXPECT_EQ(retention.max_truncate(), 1);

  Retention young(config);
  feed(young, 16);  // sink and ring are just full: everything is there still
  EXPECT_EQ(young.max_truncate(), 16);
  young.truncate(16);
  EXPECT_EQ(young.size(), 0);
  EXPECT_EQ(young.total(), 0);
  feed(young, 20);
  EXPECT_EQ(kept(young), (Indices{0, 17, 18, 19}));
}

TEST(RetentionTransactions, ResetIsANewStream) {
  for (const RetentionConfig& config :
       {RetentionConfig::sink_window(2, 5, 3), RetentionConfig::on_request(2, 5, 12)}) {
    Retention retention(config);
    feed(retention, 9);
    if (config.eviction == Eviction::kOnRequest) retention.shrink();
    retention.reset();
    EXPECT_EQ(saved(retention), saved(Retention(config)));
    EXPECT_EQ(retention.size(), 0);
    EXPECT_EQ(retention.max_truncate(), 0);
  }
}

TEST(RetentionCapacity, StatusSaysWhenTokensDoNotFit) {
  Retention full(RetentionConfig::full(6, 4));
  EXPECT_EQ(full.status(5), CacheStatus::kFull);  // more than a chunk
  full.append(4);
  full.commit();
  EXPECT_EQ(full.status(2), CacheStatus::kOk);
  EXPECT_EQ(full.status(3), CacheStatus::kFull);
  full.append(2);
  full.commit();
  EXPECT_EQ(full.status(1), CacheStatus::kFull);
  full.truncate(1);
  EXPECT_EQ(full.status(1), CacheStatus::kOk);

  Retention ring(RetentionConfig::sink_window(1, 4, 3));
  for (int step = 0; step < 50; ++step) {
    EXPECT_EQ(ring.status(3), CacheStatus::kOk);
    EXPECT_EQ(ring.status(4), CacheStatus::kFull);
    ring.append(3);
    EXPECT_EQ(ring.status(1), CacheStatus::kFull);  // only a commit makes room
    ring.commit();
  }
}

// ---- Configurations that make no sense
// -----------------------------------------------------------

TEST(RetentionConfiguration, ErrorsNameFieldExpectedAndFound) {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  const auto with = [](RetentionConfig config, auto change) {
    change(config);
    return config;
  };
  const RetentionConfig good = RetentionConfig::sink_window(4, 16, 8);
  const RetentionConfig request = RetentionConfig::on_request(4, 16, 24);
  const struct {
    RetentionConfig config;
    std::string field;
    std::string expected;
    std::string found;
  } rows[] = {
      {with(good, [](auto& c) { c.capacity = 0; }), "capacity", "1 to 2^40", "0"},
      {with(good, [](auto& c) { c.capacity = -5; }), "capacity", "1 to 2^40", "-5"},
      {RetentionConfig::full(kHuge, 1), "capacity", "1 to 2^40", std::to_string(kHuge)},
      {with(good, [](auto& c) { c.num_sink_tokens = c.capacity; }), "num_sink_tokens",
       "0 to capacity - 1 = 26", "27"},
      {with(good, [](auto& c) { c.num_sink_tokens = -1; }), "num_sink_tokens",
       "0 to capacity - 1 = 26", "-1"},
      {with(good, [](auto& c) { c.max_chunk = 0; }), "max_chunk", "at least 1", "0"},
      {with(good, [](auto& c) { c.window_size = 0; }), "window_size", "at least 1", "0"},
      {with(good, [](auto& c) { c.window_size = -3; }), "window_size", "at least 1", "-3"},
      {with(good, [](auto& c) { c.window_size = 7; }), "max_chunk", "at most the window, 7", "8"},
      {with(good, [](auto& c) { c.capacity = 26; }), "capacity",
       "at least sinks + window + chunk - 1 = 27", "26"},
      {with(good, [](auto& c) { c.window_size = 1000; }), "capacity",
       "at least sinks + window + chunk - 1 = 1011", "27"},
      {with(request, [](auto& c) { c.window_size = -1; }), "window_size", "at least 0", "-1"},
      {with(request, [](auto& c) { c.capacity = 19; }), "capacity",
       "at least sinks + recent = 4 + 16", "19"},
      {with(request, [](auto& c) { c.window_size = kHuge; }), "capacity",
       "at least sinks + recent = 4 + " + std::to_string(kHuge), "24"},
      {with(good, [](auto& c) { c.origin = std::numeric_limits<double>::infinity(); }), "origin",
       "a finite position", "inf"},
      // What a command line may ask for must not overflow on the way here.
      {RetentionConfig::sink_window(kHuge, kHuge, kHuge), "capacity", "1 to 2^40",
       std::to_string(3 * (std::int64_t{1} << 60) - 1)},
      {RetentionConfig::streaming_llm(4, kHuge), "capacity", "1 to 2^40",
       std::to_string((std::int64_t{1} << 60) + 4)},
  };
  for (const auto& row : rows) {
    const auto error = error_of([&] { Retention{row.config}; });
    ASSERT_TRUE(error) << row.field << " " << row.found;
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
    EXPECT_EQ(error->detail().where, "RetentionConfig");
    EXPECT_EQ(error->detail().field, row.field) << error->what();
    EXPECT_EQ(error->detail().expected, row.expected) << error->what();
    EXPECT_EQ(error->detail().found, row.found) << error->what();
    const std::string text = error->what();
    for (const std::string& part : {row.field, row.expected, row.found})
      EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  EXPECT_FALSE(error_of([&] { Retention{good}; }));
  EXPECT_FALSE(error_of([&] { Retention{request}; }));
  EXPECT_FALSE(error_of([&] { Retention{RetentionConfig::window(1, 1)}; }));
  EXPECT_FALSE(error_of([&] { Retention{RetentionConfig::full(1, 1)}; }));
}

// ---- Snapshots ----------------------------------------------------------------------------------

std::vector<Retention> typical_states() {
  std::vector<Retention> states;
  for (const std::int64_t tokens : {0, 1, 3, 9, 40}) {
    for (const RetentionConfig& config :
         {RetentionConfig::sink_window(2, 5, 3), RetentionConfig::window(3, 1),
          RetentionConfig::full(64, 64)}) {
      states.emplace_back(config);
      feed(states.back(), tokens);
    }
  }
  states.emplace_back(RetentionConfig::sink_window(2, 5, 3));
  feed(states.back(), 30);
  states.back().truncate(2);
  const auto move = [](std::int64_t, std::int64_t) {
  };
  Retention gaps(RetentionConfig::on_request(2, 30, 40));
  feed(gaps, 20);
  states.push_back(gaps);
  gaps.evict_range(5, 8, move);
  states.push_back(gaps);
  gaps.evict_range(10, gaps.size(), move);
  states.push_back(gaps);
  feed(gaps, 10);
  gaps.evict_range(3, 4, move);
  states.push_back(gaps);
  gaps.evict_for_space(26);
  states.push_back(gaps);
  return states;
}

/// Whatever a snapshot said, a state that was accepted must obey the class's promises.
void expect_sound(Retention retention) {
  const RetentionConfig& config = retention.config();
  ASSERT_GE(retention.total(), 0);
  ASSERT_EQ(retention.committed(), retention.total());
  ASSERT_GE(retention.size(), 0);
  ASSERT_LE(retention.size(), config.capacity);
  for (int step = 0; step < 3; ++step) {
    ASSERT_GE(retention.max_truncate(), 0);
    ASSERT_LE(retention.max_truncate(), retention.total());
    std::vector<bool> taken(static_cast<std::size_t>(config.capacity));
    std::int64_t last = -1;
    for (std::int64_t rank = 0; rank < retention.size(); ++rank) {
      const std::int64_t slot = retention.slot_of_rank(rank);
      ASSERT_TRUE(slot >= 0 && slot < config.capacity);
      ASSERT_FALSE(taken[static_cast<std::size_t>(slot)]);
      taken[static_cast<std::size_t>(slot)] = true;
      ASSERT_GT(retention.index_of_rank(rank), last);
      last = retention.index_of_rank(rank);
      ASSERT_LT(last, retention.total());
      // Sinks are the first tokens of the stream.
      ASSERT_TRUE(rank >= config.num_sink_tokens || last == rank);
    }
    retention.each_stored_slot(
        [&](std::int64_t slot) { ASSERT_TRUE(slot >= 0 && slot < config.capacity); });
    for (const SegmentRule& rule : rules_of(retention, 0)) {
      ASSERT_GE(rule.first_slot, 0);
      ASSERT_LE(rule.first_slot + rule.count, config.capacity);
    }
    retention.truncate(std::min<std::int64_t>(1, retention.max_truncate()));
    if (config.eviction == Eviction::kOnRequest) {
      retention.evict_for_space(config.window_size / 2);
      // Ends in an error or not, but in no disorder.
      const std::int64_t middle = (config.num_sink_tokens + retention.size()) / 2;
      error_of(
          [&] { retention.evict_range(middle, middle + 1, [](std::int64_t, std::int64_t) {}); });
    }
    if (retention.status(1) == CacheStatus::kOk) {
      retention.append(1);
      rules_of(retention, 1);
      retention.commit();
    }
  }
}

TEST(RetentionSnapshots, GoOnWhereTheyWereTaken) {
  for (const Retention& state : typical_states()) {
    const std::vector<std::byte> bytes = saved(state);
    Retention restored(state.config());
    ByteReader reader(bytes);
    restored.restore(reader);
    EXPECT_EQ(reader.remaining(), 0U);
    EXPECT_EQ(saved(restored), bytes);
    EXPECT_EQ(kept(restored), kept(state));
    expect_sound(restored);
  }
}

TEST(RetentionSnapshots, TruncatedOnesGiveAnErrorAndChangeNothing) {
  for (const Retention& state : typical_states()) {
    const std::vector<std::byte> bytes = saved(state);
    Retention target(state.config());
    target.append(1);
    target.commit();
    const std::vector<std::byte> before = saved(target);
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      const auto error = error_of([&] {
        ByteReader reader({bytes.data(), size}, "the snapshot");
        target.restore(reader);
      });
      ASSERT_TRUE(error) << size << " of " << bytes.size();
      EXPECT_EQ(error->code(), ErrorCode::kFormat);
      EXPECT_EQ(error->detail().where, "the snapshot");
      EXPECT_FALSE(error->detail().field.empty());
      ASSERT_EQ(saved(target), before);
    }
  }
}

TEST(RetentionSnapshots, NoFlippedBitBreaksAnInvariant) {
  int refused = 0;
  int accepted = 0;
  for (const Retention& state : typical_states()) {
    SCOPED_TRACE(describe(state.config()));
    const std::vector<std::byte> bytes = saved(state);
    for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      std::vector<std::byte> damaged = bytes;
      damaged[bit / 8] ^= std::byte{1} << (bit % 8);
      Retention target(state.config());
      const auto error = error_of([&] {
        ByteReader reader(damaged);
        target.restore(reader);
      });
      if (error) {
        ASSERT_EQ(error->code(), ErrorCode::kFormat);
        ASSERT_EQ(saved(target), saved(Retention(state.config())));
        ++refused;
      } else {
        expect_sound(target);
        if (HasFatalFailure()) {
          FAIL() << "bit " << bit % 64 << " of word " << bit / 64;
        }
        ++accepted;
      }
    }
  }
  // Damage that leaves a possible state (another order in the ring, say) is the checksum's to find.
  EXPECT_GT(refused, 30 * accepted);
}

TEST(RetentionSnapshots, NoRandomDamageBreaksAnInvariant) {
  Random random(5);
  const std::vector<Retention> states = typical_states();
  for (int trial = 0; trial < 40000; ++trial) {
    const Retention& state = states[random.below(states.size())];
    std::vector<std::byte> bytes = saved(state);
    // The configuration is 8 words; what comes after is what can be wrong in interesting ways.
    const std::size_t words = bytes.size() / 8;
    for (std::uint64_t change = 0; change <= random.below(3); ++change) {
      const std::size_t word = 8 + random.below(words - 8);
      const std::int64_t values[] = {0,
                                     1,
                                     -1,
                                     static_cast<std::int64_t>(random.below(50)),
                                     std::numeric_limits<std::int64_t>::max(),
                                     std::numeric_limits<std::int64_t>::min(),
                                     std::int64_t{1} << random.below(63)};
      ByteWriter writer;
      writer.write(values[random.below(std::size(values))]);
      std::copy(writer.bytes().begin(), writer.bytes().end(),
                bytes.begin() + static_cast<std::ptrdiff_t>(word * 8));
    }
    Retention target(state.config());
    if (error_of([&] {
          ByteReader reader(bytes);
          target.restore(reader);
        }))
      continue;
    expect_sound(target);
    if (HasFatalFailure()) FAIL() << describe(state.config()) << ", trial " << trial;
  }
}

TEST(RetentionSnapshots, MoreRunsThanEvictionsMakeAreRefused) {
  // kMaxRuns + 1 runs are possible only when the first is the sinks alone: with a longer one the
  // next eviction would need one run more than there is room for.
  const RetentionConfig config = RetentionConfig::on_request(1, 30, 64);
  for (const std::int64_t first_count : {1, 5}) {
    ByteWriter writer;
    Retention(config).save(writer);
    std::vector<std::byte> bytes = writer.take();
    bytes.resize(8 * 8);  // the configuration
    constexpr std::int64_t kRuns = Retention::kMaxRuns + 1;
    const std::int64_t total = 20 + 10 * (kRuns - 2) + 1;
    ByteWriter state;
    for (const std::int64_t value : {total, total, total, std::int64_t{0}, kRuns})
      state.write(value);
    state.write(std::int64_t{0});
    state.write(first_count);
    for (std::int64_t run = 1; run < kRuns; ++run) {
      state.write(10 + 10 * run);
      state.write(std::int64_t{1});
    }
    bytes.insert(bytes.end(), state.bytes().begin(), state.bytes().end());
    Retention retention(config);
    const auto error = error_of([&] {
      ByteReader reader(bytes);
      retention.restore(reader);
    });
    if (first_count == 1) {
      ASSERT_FALSE(error) << error->what();
      expect_sound(retention);
    } else {
      ASSERT_TRUE(error);
      EXPECT_EQ(error->detail().field, "runs");
    }
  }
}

TEST(RetentionSnapshots, AnotherConfigurationIsRefusedByName) {
  RetentionConfig config = RetentionConfig::sink_window(2, 5, 3);
  Retention retention(config);
  feed(retention, 9);
  const std::vector<std::byte> bytes = saved(retention);
  const auto field_of = [&](auto change) {
    RetentionConfig other = config;
    change(other);
    Retention target(other);
    const auto error = error_of([&] {
      ByteReader reader(bytes);
      target.restore(reader);
    });
    return error ? error->detail().field : std::string("(none)");
  };
  const auto starts = [](const std::string& text, const char* start) {
    return text.rfind(start, 0) == 0;
  };
  EXPECT_TRUE(starts(field_of([](auto& c) { c.num_sink_tokens = 1; }), "num_sink_tokens"));
  EXPECT_TRUE(starts(field_of([](auto& c) { c.window_size = 4; }), "window_size"));
  EXPECT_TRUE(starts(field_of([](auto& c) { c.capacity = 20; }), "capacity"));
  EXPECT_TRUE(starts(field_of([](auto& c) { c.max_chunk = 2; }), "max_chunk"));
  EXPECT_TRUE(
      starts(field_of([](auto& c) { c.position_rule = PositionRule::kInText; }), "position_rule"));
  EXPECT_TRUE(starts(field_of([](auto& c) { c.key_form = KeyForm::kRaw; }), "key_form"));
  EXPECT_TRUE(starts(field_of([](auto& c) { c.eviction = Eviction::kOnRequest; }), "eviction"));
  EXPECT_TRUE(starts(field_of([](auto& c) { c.origin = 0.5; }), "origin"));
}

// ---- Endless streams ----------------------------------------------------------------------------

/// A stream that is `total` tokens old, which no test can wait for: its snapshot is written by
/// hand.
Retention aged(const RetentionConfig& config, std::int64_t total) {
  const std::int64_t oldest = total - (config.window_size - 1);
  ByteWriter writer;
  for (const std::int64_t value :
       {config.num_sink_tokens, config.window_size, config.capacity, config.max_chunk,
        static_cast<std::int64_t>(config.position_rule), static_cast<std::int64_t>(config.key_form),
        static_cast<std::int64_t>(config.eviction)})
    writer.write(value);
  writer.write(config.origin);
  const std::int64_t runs = config.num_sink_tokens > 0 ? 2 : 1;
  for (const std::int64_t value :
       {total, total, total,
        (oldest - config.num_sink_tokens) % (config.capacity - config.num_sink_tokens), runs})
    writer.write(value);
  if (runs == 2) {
    writer.write(std::int64_t{0});
    writer.write(config.num_sink_tokens);
  }
  writer.write(oldest);
  writer.write(total - oldest);
  Retention retention(config);
  ByteReader reader(writer.bytes());
  retention.restore(reader);
  return retention;
}

TEST(RetentionEndless, BeyondThirtyTwoBitsNothingChanges) {
  for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
    for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
      for (const std::int64_t total : {(std::int64_t{1} << 31) - 20, (std::int64_t{1} << 32) - 20,
                                       (std::int64_t{1} << 33) + 5, std::int64_t{1} << 50}) {
        RetentionConfig config = RetentionConfig::sink_window(3, 6, 4);
        config.position_rule = rule;
        config.key_form = form;
        SCOPED_TRACE(describe(config) + ", total " + std::to_string(total));
        Retention retention = aged(config, total);
        std::vector<std::int64_t> slots(static_cast<std::size_t>(config.capacity), -1);
        for (std::int64_t rank = 0; rank < retention.size(); ++rank)
          slots[static_cast<std::size_t>(retention.slot_of_rank(rank))] =
              retention.index_of_rank(rank);
        std::int64_t next = total;
        for (int step = 0; step < 30; ++step) {
          const std::int64_t chunk = 1 + step % 4;
          retention.append(chunk);
          for (std::int64_t back = chunk; back > 0; --back)
            slots[static_cast<std::size_t>(retention.slot_of_newest(back))] = next++;
          ASSERT_EQ(retention.total(), next);
          for (std::int64_t query = next - chunk; query < next; ++query) {
            std::int64_t seen = 0;
            for (const SegmentRule& segment : rules_of(retention, chunk)) {
              const Position reader = segment.reader_position(retention.write_position(query));
              for (std::int64_t i = 0; i < segment.count; ++i) {
                const std::int64_t key = segment.first_index + i;
                ASSERT_EQ(slots[static_cast<std::size_t>(segment.first_slot + i)], key);
                if (key > query || (key >= 3 && key <= query - 6)) continue;
                ++seen;
                const std::int64_t distance =
                    key < 3 && rule == PositionRule::kInCache ? 3 + 6 - 1 - key : query - key;
                ASSERT_EQ(reader - (segment.first_position + static_cast<Position>(i)),
                          static_cast<Position>(distance));
              }
            }
            ASSERT_EQ(seen, 9);
          }
          retention.commit();
          ASSERT_EQ(retention.size(), 8);
        }
      }
    }
  }
}

TEST(RetentionEndless, MoreTokensThanAPositionCountsAreRefused) {
  const RetentionConfig config = RetentionConfig::sink_window(3, 6, 4);
  EXPECT_FALSE(error_of([&] { aged(config, std::int64_t{1} << 53); }));
  const auto error = error_of([&] { aged(config, (std::int64_t{1} << 53) + 1); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
  EXPECT_EQ(error->detail().field, "total");
}

}  // namespace SLUICE_TEST_UNIT
