// SPDX-License-Identifier: MIT
#include "sluice/attention/group_mask.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/attention_mass.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/rotary.hpp"
#include "support/attention_scene.hpp"
#include "support/naive_attention.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::attend;
using sluice::attention_mass;
using sluice::AttentionQuery;
using sluice::AttentionVariant;
using sluice::AttentionWorkspace;
using sluice::bf16;
using sluice::CausalWindow;
using sluice::cpu;
using sluice::Error;
using sluice::ErrorCode;
using sluice::f16;
using sluice::GroupCausalWindow;
using sluice::GroupPrefixMask;
using sluice::HeadsView;
using sluice::KeyInfo;
using sluice::kNoCeiling;
using sluice::on_all_axes;
using sluice::Position;
using sluice::Position3;
using sluice::QueryInfo;
using sluice::Random;
using sluice::Rotary;
using sluice::Segment;
using sluice::SegmentRule;
using sluice::tays_prefixes;
using sluice::TaysSequence;
using sluice::ThreadTeam;
using sluice::TileVisibility;
using sluice::TokenKind;
using sluice::wait_k_prefixes;
using sluice::test::Extents;
using sluice::test::rotary_for;
using sluice::test::run_at;
using sluice::test::scale_for;
using sluice::test::Scene;

using Lengths = std::vector<std::int64_t>;

std::int64_t sum_of(const Lengths& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
}

Lengths wait_k(std::int64_t k, const Lengths& source, const Lengths& target) {
  Lengths prefix(static_cast<std::size_t>(sum_of(target)), -7);
  wait_k_prefixes(k, source, target, prefix);
  return prefix;
}

Lengths tays(const TaysSequence& sequence) {
  Lengths prefix(
      static_cast<std::size_t>(sequence.preamble_tokens +
                               std::accumulate(sequence.sentence_tokens.begin(),
                                               sequence.sentence_tokens.end(), std::int64_t{0})),
      -7);
  tays_prefixes(sequence, prefix);
  return prefix;
}

/// A mask as the specification prints it: one text a row, a bar between source and target columns.
std::vector<std::string> printed(const GroupPrefixMask& mask, std::int64_t source,
                                 std::int64_t target) {
  std::vector<std::string> rows;
  for (std::int64_t row = 0; row < source + target; ++row) {
    std::string text;
    for (std::int64_t column = 0; column < source + target; ++column) {
      if (column == source) text += "|";
      text += mask.visible({row, static_cast<Position>(row)}, {column, TokenKind::kText, 0}) ? "1"
                                                                                             : "0";
    }
    rows.push_back(text);
  }
  return rows;
}

using sluice::test::between;
using sluice::test::error_of;

// ---- Typed-in tests -----------------------------------------------------------------------------

// core-algorithms 2.3
TEST(GroupPrefixMask, WaitKMasksOfGroupPositionEncoding) {
  const Lengths source{2, 1, 1, 1};
  const Lengths target{1, 2, 1};
  const std::vector<std::string> triangle{"10000|0000", "11000|0000", "11100|0000", "11110|0000",
                                          "11111|0000"};
  const auto expect = [&](std::int64_t k, const std::vector<std::string>& target_rows) {
    std::vector<std::string> rows = triangle;
    rows.insert(rows.end(), target_rows.begin(), target_rows.end());
    const Lengths prefix = wait_k(k, source, target);
    EXPECT_EQ(printed(GroupPrefixMask(5, prefix), 5, 4), rows) << "k = " << k;
  };
  expect(1, {"11100|1000", "11100|1100", "11110|1110", "11110|1111"});
  expect(2, {"11110|1000", "11110|1100", "11111|1110", "11111|1111"});
  // k >= number of segments: everything is read first.
  for (const std::int64_t k :
       {std::int64_t{4}, std::int64_t{7}, std::numeric_limits<std::int64_t>::max()})
    expect(k, {"11111|1000", "11111|1100", "11111|1110", "11111|1111"});
}

// core-algorithms 3.2
TEST(GroupPrefixMask, MasksOfStreamingThinkerAreWaitOne) {
  const Lengths prefix = wait_k(1, {3, 1, 1}, {2, 1, 1});
  EXPECT_EQ(prefix, (Lengths{3, 4, 5, 5}));
  const std::vector<std::string> rows = printed(GroupPrefixMask(5, prefix), 5, 4);
  EXPECT_EQ(rows[4], "11111|0000");
  EXPECT_EQ(rows[5], "11100|1000");
  EXPECT_EQ(rows[6], "11110|1100");
  EXPECT_EQ(rows[7], "11111|1110");
  EXPECT_EQ(rows[8], "11111|1111");
  // Target units beyond the last source unit see everything.
  EXPECT_EQ(wait_k(1, {3, 1}, {1, 1, 2, 3}), (Lengths{4, 4, 4, 4, 4, 4, 4}));
  EXPECT_EQ(wait_k(1, {3, 1}, {2, 1, 2}), (Lengths{3, 4, 4, 4, 4}));
}

// core-algorithms 4.2
TEST(GroupPrefixMask, MasksOfThinkAsYouSee) {
  const Lengths frames{1, 1};
  const Lengths sentences{2, 2, 3};
  const Lengths prefix = tays({.tokens_before_frames = 10,
                               .frame_tokens = frames,
                               .tokens_after_frames = 3,
                               .preamble_tokens = 3,
                               .sentence_tokens = sentences});
  EXPECT_EQ(prefix, (Lengths{11, 11, 11, 11, 15, 15, 15, 15, 15, 15}));
  const std::vector<std::string> rows = printed(GroupPrefixMask(15, prefix), 15, 10);
  EXPECT_EQ(rows[15], "111111111110000|1000000000");
  EXPECT_EQ(rows[17], "111111111110000|1110000000");
  EXPECT_EQ(rows[18], "111111111110000|1111000000");
  EXPECT_EQ(rows[19], "111111111111111|1111100000");
  for (std::size_t row = 20; row < 25; ++row)
    EXPECT_EQ(rows[row],
              "111111111111111|" + std::string(row - 14, '1') + std::string(24 - row, '0'));
  for (std::size_t row = 0; row < 15; ++row)
    EXPECT_EQ(rows[row], std::string(row + 1, '1') + std::string(14 - row, '0') + "|0000000000");
}

TEST(GroupPrefixMask, ThinkAsYouSeeWithFramesOfSeveralTokens) {
  const Lengths frames{4, 4, 2};
  // Fewer sentences than frames: nothing sees what closes the turn.
  const Lengths two{3, 2};
  EXPECT_EQ(tays({.tokens_before_frames = 5,
                  .frame_tokens = frames,
                  .tokens_after_frames = 3,
                  .preamble_tokens = 2,
                  .sentence_tokens = two}),
            (Lengths{9, 9, 9, 9, 13, 13, 13}));
  // One frame: the preamble does not see what closes the turn, the first sentence does.
  const Lengths one_frame{4};
  const Lengths one{2};
  EXPECT_EQ(tays({.tokens_before_frames = 5,
                  .frame_tokens = one_frame,
                  .tokens_after_frames = 3,
                  .preamble_tokens = 2,
                  .sentence_tokens = one}),
            (Lengths{9, 9, 12, 12}));
  // No preamble, and sentences beyond the frames.
  const Lengths five{1, 1, 1, 1, 1};
  EXPECT_EQ(tays({.frame_tokens = frames, .tokens_after_frames = 1, .sentence_tokens = five}),
            (Lengths{8, 11, 11, 11, 11}));
}

TEST(GroupPrefixMask, EmptyUnitsAndSequences) {
  EXPECT_EQ(wait_k(1, {2, 0, 3}, {1, 1, 1}), (Lengths{2, 5, 5}));
  EXPECT_EQ(wait_k(1, {0, 2}, {2, 1}), (Lengths{0, 2, 2}));  // row 0 sees no source
  EXPECT_EQ(wait_k(1, {2, 1}, {1, 0, 1}), (Lengths{3, 3}));
  EXPECT_EQ(wait_k(3, {}, {1, 2}), (Lengths{0, 0, 0}));
  EXPECT_EQ(wait_k(3, {4}, {}), Lengths{});
  const Lengths nothing;
  EXPECT_EQ(printed(GroupPrefixMask(2, nothing), 2, 0), (std::vector<std::string>{"10", "11"}));
  const Lengths alone{0, 0};
  EXPECT_EQ(printed(GroupPrefixMask(0, alone), 0, 2), (std::vector<std::string>{"|10", "|11"}));
}

// ---- The rule, from the specification, as a dense matrix
// ------------------------------------------

/// core-algorithms 2.3, steps 1 to 3, one after the other, on a matrix.
std::vector<std::vector<bool>> dense_wait_k(std::int64_t k, const Lengths& source_units,
                                            const Lengths& target_units) {
  const std::int64_t sources = sum_of(source_units);
  const std::int64_t targets = sum_of(target_units);
  std::vector<std::vector<bool>> seen(
      static_cast<std::size_t>(sources + targets),
      std::vector<bool>(static_cast<std::size_t>(sources + targets)));
  for (std::int64_t row = 0; row < sources; ++row)
    for (std::int64_t column = 0; column <= row; ++column)
      seen[static_cast<std::size_t>(row)][static_cast<std::size_t>(column)] = true;
  std::int64_t row = sources;
  for (std::size_t unit = 0; unit < target_units.size(); ++unit)
    for (std::int64_t t = 0; t < target_units[unit]; ++t, ++row) {
      std::int64_t column = 0;
      for (std::size_t u = 0; u < source_units.size(); ++u)
        for (std::int64_t s = 0; s < source_units[u]; ++s, ++column)
          seen[static_cast<std::size_t>(row)][static_cast<std::size_t>(column)] =
              static_cast<std::int64_t>(u) < k + static_cast<std::int64_t>(unit);
      for (column = sources; column <= row; ++column)
        seen[static_cast<std::size_t>(row)][static_cast<std::size_t>(column)] = true;
    }
  const std::vector<std::vector<bool>> before = seen;
  for (std::int64_t target = sources; target + 1 < sources + targets; ++target)
    for (std::int64_t column = 0; column < sources; ++column)
      seen[static_cast<std::size_t>(target)][static_cast<std::size_t>(column)] =
          before[static_cast<std::size_t>(target + 1)][static_cast<std::size_t>(column)];
  return seen;
}

/// Sinks and a window over what a row sees of one group: of the columns [first, first + size) that
/// are seen, the last `window` stay, and the group's first `sinks`.
void narrow(std::vector<bool>& row, std::int64_t first, std::int64_t size,
            const CausalWindow& rule) {
  std::int64_t kept = 0;
  for (std::int64_t column = first + size - 1; column >= first; --column) {
    const auto at = static_cast<std::size_t>(column);
    if (!row[at]) continue;
    if (kept++ >= rule.window_size && column - first >= rule.num_sink_tokens) row[at] = false;
  }
}

Lengths random_units(Random& random, std::int64_t least) {
  Lengths units;
  for (std::int64_t left = between(random, 0, 7); left > 0; --left)
    units.push_back(between(random, least, 4));
  return units;
}

CausalWindow random_window(Random& random) {
  if (random.below(3) == 0) return {};
  return {between(random, 1, 9), between(random, 0, 3)};
}

TEST(GroupPrefixMask, EqualsTheDenseMatrix) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    Random random(seed);
    const std::int64_t k = between(random, 1, 7);
    const Lengths source_units = random_units(random, 0);
    const Lengths target_units = random_units(random, 0);
    const CausalWindow source = random_window(random);
    const CausalWindow target = random_window(random);
    const std::int64_t sources = sum_of(source_units);
    const std::int64_t targets = sum_of(target_units);
    std::vector<std::vector<bool>> dense = dense_wait_k(k, source_units, target_units);
    const Lengths prefix = wait_k(k, source_units, target_units);
    const GroupPrefixMask mask(sources, prefix, source, target);
    for (std::int64_t row = 0; row < sources + targets; ++row) {
      std::vector<bool>& expected = dense[static_cast<std::size_t>(row)];
      narrow(expected, 0, sources, source);
      narrow(expected, sources, targets, target);
      for (std::int64_t column = 0; column < sources + targets; ++column)
        ASSERT_EQ(mask.visible({row, 1e9}, {column, TokenKind::kAudio, 3}),
                  expected[static_cast<std::size_t>(column)])
            << "seed " << seed << ", row " << row << ", column " << column;
    }
  }
}

// ---- Tiles --------------------------------------------------------------------------------------

/// How often classify() said each word; fails where a word is untrue.
template <class Mask>
void check_tile(const Mask& mask, std::int64_t query_first, std::int64_t query_last,
                KeyInfo key_first, std::int64_t key_last, std::array<int, 3>& said) {
  const TileVisibility word = mask.classify(query_first, query_last, key_first, key_last);
  ++said[static_cast<std::size_t>(word)];
  for (std::int64_t query = query_first; query <= query_last; ++query)
    for (std::int64_t key = key_first.index; key <= key_last; ++key) {
      const bool visible = mask.visible({query, 0}, {key, key_first.kind, key_first.group});
      if (word == TileVisibility::kSome) continue;
      ASSERT_EQ(visible, word == TileVisibility::kAll)
          << "tile of queries " << query_first << " .. " << query_last << " and keys "
          << key_first.index << " .. " << key_last << ", pair " << query << ", " << key;
    }
}

TEST(GroupPrefixMask, ClassifyAgreesWithVisible) {
  std::array<int, 3> said{};
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const std::int64_t sources = between(random, 0, 20);
    const std::int64_t targets = between(random, 0, 20);
    if (sources + targets == 0) continue;
    Lengths prefix;
    for (std::int64_t row = 0; row < targets; ++row) prefix.push_back(between(random, 0, sources));
    std::sort(prefix.begin(), prefix.end());
    const GroupPrefixMask mask(sources, prefix, random_window(random), random_window(random));
    const std::int64_t last = sources + targets - 1;
    for (int tile = 0; tile < 60; ++tile) {
      const std::int64_t query_first = between(random, 0, last);
      const std::int64_t key_first = between(random, 0, last);
      check_tile(mask, query_first, std::min(last, query_first + between(random, 0, 9)),
                 {key_first, TokenKind::kText, 0},
                 std::min(last, key_first + between(random, 0, 9)), said);
    }
    check_tile(mask, 0, last, {0, TokenKind::kText, 0}, last, said);
    if (HasFatalFailure()) return;
  }
  // A word that is never given would make tiles slow, or this test empty.
  for (const TileVisibility word :
       {TileVisibility::kNone, TileVisibility::kSome, TileVisibility::kAll})
    EXPECT_GT(said[static_cast<std::size_t>(word)], 1000);
}

TEST(GroupPrefixMask, ATileThatNobodySeesIsSkipped) {
  const Lengths prefix{2, 2, 6, 6};
  const GroupPrefixMask mask(8, prefix);
  const auto word = [&](std::int64_t query_first, std::int64_t query_last, std::int64_t key_first,
                        std::int64_t key_last) {
    return mask.classify(query_first, query_last, {key_first, TokenKind::kText, 0}, key_last);
  };
  EXPECT_EQ(word(0, 7, 8, 11), TileVisibility::kNone);  // the source sees no target
  EXPECT_EQ(word(8, 9, 2, 7), TileVisibility::kNone);   // behind the prefix
  EXPECT_EQ(word(8, 11, 6, 7), TileVisibility::kNone);
  EXPECT_EQ(word(8, 11, 0, 1), TileVisibility::kAll);  // in every prefix
  EXPECT_EQ(word(10, 11, 0, 5), TileVisibility::kAll);
  EXPECT_EQ(word(10, 11, 0, 9), TileVisibility::kSome);  // source keys 6, 7 are not seen
  EXPECT_EQ(word(8, 10, 0, 5), TileVisibility::kSome);
  EXPECT_EQ(word(4, 9, 0, 1), TileVisibility::kAll);  // rows of both groups agree
  EXPECT_EQ(word(4, 9, 9, 9), TileVisibility::kSome);
}

TEST(GroupCausalWindow, ClassifyAgreesWithVisible) {
  std::array<int, 3> said{};
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const GroupCausalWindow mask{random_window(random), static_cast<std::int32_t>(random.below(3)),
                                 random.below(2) == 0};
    for (int tile = 0; tile < 40; ++tile) {
      const std::int64_t query_first = between(random, 0, 20);
      const std::int64_t key_first = between(random, 0, 20);
      check_tile(mask, query_first, query_first + between(random, 0, 6),
                 {key_first, TokenKind::kText, static_cast<std::int32_t>(random.below(3))},
                 key_first + between(random, 0, 6), said);
    }
    if (HasFatalFailure()) return;
  }
  for (const int count : said) EXPECT_GT(count, 100);
}

TEST(GroupCausalWindow, ShowsOtherGroupsWholeAndItsOwnCausally) {
  const GroupCausalWindow mask{{.window_size = 3, .num_sink_tokens = 1}, 2};
  const auto sees = [](const GroupCausalWindow& rule, std::int64_t key, std::int32_t group) {
    return rule.visible({10, 0}, {key, TokenKind::kText, group});
  };
  for (std::int64_t key = 0; key < 30; ++key) {
    EXPECT_TRUE(sees(mask, key, 0)) << key;
    EXPECT_TRUE(sees(mask, key, 3)) << key;
    EXPECT_EQ(sees(mask, key, 2), key == 0 || (key >= 8 && key <= 10)) << key;
  }
  GroupCausalWindow both_ways = mask;
  both_ways.bidirectional = true;
  for (std::int64_t key = 0; key < 30; ++key)
    EXPECT_EQ(sees(both_ways, key, 2), key == 0 || key >= 8) << key;
}

// ---- Errors -------------------------------------------------------------------------------------

TEST(GroupPrefixMask, ErrorsNameTheRow) {
  const struct {
    std::int64_t sources;
    Lengths prefix;
    std::string field, expected, found;
  } rows[] = {
      {5, {3, 2}, "prefix[1]", "3 to 5", "2"},
      {5, {0, 4, 6}, "prefix[2]", "4 to 5", "6"},
      {5, {-1}, "prefix[0]", "0 to 5", "-1"},
      {0, {0, 1}, "prefix[1]", "0 to 0", "1"},
  };
  for (const auto& row : rows) {
    const auto error = error_of([&] { GroupPrefixMask(row.sources, row.prefix); });
    ASSERT_TRUE(error.has_value()) << row.field;
    EXPECT_EQ(error->code(), ErrorCode::kShape);
    EXPECT_EQ(error->detail().where, "GroupPrefixMask");
    EXPECT_EQ(error->detail().field, row.field);
    EXPECT_EQ(error->detail().expected, row.expected);
    EXPECT_EQ(error->detail().found, row.found);
  }
}

TEST(GroupPrefixMask, PrefixesRefuseWhatMakesNoSense) {
  const Lengths units{1, 2};
  Lengths prefix(3);
  for (const std::int64_t k : {0, -1}) {
    const auto error = error_of([&] { wait_k_prefixes(k, units, units, prefix); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
    EXPECT_EQ(error->detail().where, "wait_k_prefixes");
    EXPECT_EQ(error->detail().field, "k");
    EXPECT_EQ(error->detail().found, std::to_string(k));
  }
  const TaysSequence sequence{
      .frame_tokens = units, .preamble_tokens = 1, .sentence_tokens = units};
  for (const std::size_t size : {2U, 5U}) {
    Lengths wrong(size);
    const auto wait = error_of([&] { wait_k_prefixes(1, units, units, wrong); });
    ASSERT_TRUE(wait.has_value());
    EXPECT_EQ(wait->code(), ErrorCode::kShape);
    EXPECT_EQ(wait->detail().field, "prefix");
    EXPECT_EQ(wait->detail().expected, "3");
    EXPECT_EQ(wait->detail().found, std::to_string(size));
    const auto see = error_of([&] { tays_prefixes(sequence, wrong); });
    ASSERT_TRUE(see.has_value());
    EXPECT_EQ(see->code(), ErrorCode::kShape);
    EXPECT_EQ(see->detail().where, "tays_prefixes");
    EXPECT_EQ(see->detail().expected, "4");
  }
  const auto blind =
      error_of([&] { tays_prefixes({.frame_tokens = {}, .sentence_tokens = units}, prefix); });
  ASSERT_TRUE(blind.has_value());
  EXPECT_EQ(blind->code(), ErrorCode::kShape);
  EXPECT_EQ(blind->detail().field, "frame_tokens");
}

// ---- Positions of the caller's choice
// -------------------------------------------------------------

/// attend() for rows that stand where `positions` says, on one axis.
template <class Key, class Value, class Variant>
std::vector<float> attend_at(const Scene<Key, Value>& scene, const std::vector<float>& rows,
                             std::int64_t first_index, std::span<const Position3> positions,
                             const Variant& variant, std::vector<float>& lse, int threads = 1) {
  const Extents& e = scene.extents();
  const auto tokens = static_cast<std::int64_t>(positions.size());
  AttentionWorkspace<cpu> workspace(scene.rotary(),
                                    {.num_qo_heads = e.qo_heads(),
                                     .num_kv_heads = e.kv_heads,
                                     .head_dim = e.dim,
                                     .value_dim = e.value_dim,
                                     .max_queries = tokens,
                                     .max_keys = scene.keys()},
                                    threads);
  ThreadTeam team(threads);
  std::vector<float> out(static_cast<std::size_t>(tokens * e.qo_heads() * e.value_dim));
  lse.resize(static_cast<std::size_t>(tokens * e.qo_heads()));
  // first_position must not count beside positions.
  attend(AttentionQuery{.rows = {rows.data(), tokens, e.qo_heads(), e.dim},
                        .first_index = first_index,
                        .first_position = -12345,
                        .positions = positions.data()},
         scene.segments(), variant, HeadsView<float>(out.data(), tokens, e.qo_heads(), e.value_dim),
         lse.data(), workspace, team, cpu{});
  return out;
}

template <class Key, class Value>
void add_random_groups(Scene<Key, Value>& scene, Random& random, bool may_be_raw) {
  // Sinks and two runs of a ring of each of three groups, as caches hand them out.
  for (std::int32_t group = 0; group < 3; ++group) {
    const std::int64_t sinks = between(random, 0, 3);
    const std::int64_t oldest = sinks + between(random, 0, 50);
    const std::int64_t cut = between(random, 1, 70);
    const bool raw = may_be_raw && random.below(2) == 0;
    for (SegmentRule rule :
         {run_at(0, sinks), run_at(oldest, cut), run_at(oldest + cut, between(random, 0, 70))}) {
      if (rule.count == 0) continue;
      rule.group = group;
      rule.first_position = static_cast<Position>(between(random, 0, 40)) + 0.5 * group;
      rule.shift = static_cast<Position>(between(random, -20, 20)) / 4;
      if (random.below(2) == 0) rule.ceiling = static_cast<Position>(between(random, 0, 60));
      scene.add(rule, raw);
    }
  }
}

TEST(AttentionQueryPositions, RowsStandWhereTheyAreTold) {
  for (const std::int64_t tokens : {1, 2, 9, 40}) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
      Random random(seed);
      const Extents extents{.kv_heads = 2, .group = 2, .dim = 16, .value_dim = 16};
      Scene<float, float> scene(extents, rotary_for(16), 100 + seed);
      add_random_groups(scene, random, true);
      const std::vector<float> rows = scene.queries(tokens);
      std::vector<Position3> positions;
      for (std::int64_t t = 0; t < tokens; ++t)
        positions.push_back(on_all_axes(static_cast<Position>(between(random, 0, 400)) / 4));
      // A window that the rows' indices decide, not their places.
      const AttentionVariant<GroupCausalWindow> variant{
          .sm_scale = scale_for(16), .visibility = {{.window_size = 40, .num_sink_tokens = 1}, 1}};
      std::vector<float> lse;
      const std::vector<float> out =
          attend_at<float, float>(scene, rows, 60, positions, variant, lse);
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t head = 0; head < 4; ++head) {
          const auto at = static_cast<std::size_t>(t * 4 + head);
          const auto exact = scene.naive(
              rows.data() + at * 16, {60 + t, positions[static_cast<std::size_t>(t)].t}, head,
              static_cast<double>(variant.sm_scale),
              {.visible = [&](const QueryInfo& query, const KeyInfo& key) {
                return key.group != 1 || (key.index <= query.index &&
                                          (key.index > query.index - 40 || key.index < 1));
              }});
          ASSERT_NEAR(static_cast<double>(lse[at]), exact.lse, exact.lse_bound)
              << "seed " << seed << ", row " << t;
          for (std::size_t d = 0; d < 16; ++d)
            ASSERT_NEAR(static_cast<double>(out[at * 16 + d]), exact.out[d], exact.out_bound)
                << "seed " << seed << ", row " << t;
        }
    }
  }
}

TEST(AttentionQueryPositions, ConsecutiveOnesChangeNoBit) {
  for (const std::int64_t tokens : {1, 7, 70}) {
    Random random(3);
    Scene<bf16, bf16> scene({.kv_heads = 2, .group = 3, .dim = 64, .value_dim = 64}, rotary_for(64),
                            9);
    add_random_groups(scene, random, true);
    const std::vector<float> rows = scene.queries(tokens);
    std::vector<Position3> positions;
    for (std::int64_t t = 0; t < tokens; ++t)
      positions.push_back(on_all_axes(17.25 + static_cast<Position>(t)));
    const AttentionVariant<> variant{.sm_scale = scale_for(64)};
    const auto expected = scene.run(rows, 90, 17.25, variant);
    for (const int threads : {1, 2}) {
      std::vector<float> lse;
      EXPECT_EQ((attend_at<bf16, bf16>(scene, rows, 90, positions, variant, lse, threads)),
                expected.out);
      EXPECT_EQ(lse, expected.lse);
    }
  }
}

TEST(AttentionQueryPositions, ThreeAxesAreShiftedAndClampedAlike) {
  // Pairs 0 .. 2 turn with time, 3 .. 5 with height, 6 and 7 with width.
  const Rotary rotary({.head_dim = 16, .rotary_dim = 16, .theta = 100, .sections = {3, 3, 2}});
  const std::int64_t kCounts[] = {3, 40, 25};
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    Random random(seed);
    const auto place = [&] {
      const auto axis = [&] {
        return static_cast<Position>(between(random, 0, 120)) / 2;
      };
      return Position3{axis(), axis(), axis()};
    };
    struct Plain {
      std::vector<float> key, value;
      Position3 at;
    };
    std::vector<Plain> plain;
    std::vector<SegmentRule> rule_of;
    std::vector<std::vector<float>> keys, values;
    std::vector<Segment<float>> segments;
    std::int64_t index = 0;
    for (const std::int64_t count : kCounts) {
      SegmentRule rule = run_at(index, count);
      rule.shift = static_cast<Position>(between(random, -12, 12)) / 4;
      rule.ceiling =
          random.below(2) == 0 ? kNoCeiling : static_cast<Position>(between(random, 5, 50));
      std::vector<float>& key_rows = keys.emplace_back();
      std::vector<float>& value_rows = values.emplace_back();
      for (std::int64_t j = 0; j < count; ++j) {
        Plain& one = plain.emplace_back();
        one.at = place();
        for (int d = 0; d < 16; ++d) {
          one.key.push_back(static_cast<float>(random.normal()));
          one.value.push_back(static_cast<float>(random.normal()));
        }
        std::vector<float> angles(static_cast<std::size_t>(rotary.row_size()));
        std::vector<float> rotated(16);
        rotary.angles(one.at, angles.data());
        rotary.rotate(angles.data(), one.key.data(), rotated.data());
        key_rows.insert(key_rows.end(), rotated.begin(), rotated.end());
        value_rows.insert(value_rows.end(), one.value.begin(), one.value.end());
        rule_of.push_back(rule);
      }
      Segment<float>& segment = segments.emplace_back();
      segment.rule = rule;
      segment.key_token_stride = segment.value_token_stride = 16;
      index += count;
    }
    for (std::size_t s = 0; s < segments.size(); ++s) {
      segments[s].keys = keys[s].data();
      segments[s].values = values[s].data();
    }
    const std::int64_t tokens = between(random, 1, 12);
    std::vector<float> rows(static_cast<std::size_t>(tokens * 2 * 16));
    for (float& x : rows) x = static_cast<float>(random.normal());
    std::vector<Position3> positions;
    for (std::int64_t t = 0; t < tokens; ++t) positions.push_back(place());
    AttentionWorkspace<cpu> workspace(&rotary,
                                      {.num_qo_heads = 2,
                                       .num_kv_heads = 1,
                                       .head_dim = 16,
                                       .value_dim = 16,
                                       .max_queries = tokens,
                                       .max_keys = 68},
                                      1);
    ThreadTeam team(1);
    std::vector<float> out(rows.size());
    attend(AttentionQuery{.rows = {rows.data(), tokens, 2, 16},
                          .first_index = index,
                          .positions = positions.data()},
           std::span<const Segment<float>>(segments), AttentionVariant<>{.sm_scale = 0.25F},
           HeadsView<float>(out.data(), tokens, 2, 16), nullptr, workspace, team, cpu{});
    for (std::int64_t row = 0; row < tokens * 2; ++row) {
      const Position3& from = positions[static_cast<std::size_t>(row / 2)];
      const float* q = rows.data() + row * 16;
      std::vector<double> weights;
      double sum = 0;
      for (std::size_t j = 0; j < plain.size(); ++j) {
        const SegmentRule& rule = rule_of[j];
        const auto distance = [&](Position reader, Position key) {
          return std::min(reader + rule.shift, rule.ceiling) - key;
        };
        double score = 0;
        for (std::size_t i = 0; i < 8; ++i) {
          const double away = i < 3   ? distance(from.t, plain[j].at.t)
                              : i < 6 ? distance(from.h, plain[j].at.h)
                                      : distance(from.w, plain[j].at.w);
          const double angle = away * std::pow(100.0, -2.0 * static_cast<double>(i) / 16);
          const double qa = static_cast<double>(q[i]);
          const double qb = static_cast<double>(q[i + 8]);
          const double ka = static_cast<double>(plain[j].key[i]);
          const double kb = static_cast<double>(plain[j].key[i + 8]);
          score += std::cos(angle) * (qa * ka + qb * kb) + std::sin(angle) * (qa * kb - qb * ka);
        }
        weights.push_back(std::exp(0.25 * score));
        sum += weights.back();
      }
      for (std::size_t d = 0; d < 16; ++d) {
        double expected = 0;
        for (std::size_t j = 0; j < plain.size(); ++j)
          expected += weights[j] / sum * static_cast<double>(plain[j].value[d]);
        // naive_attention.hpp derives it: 2 * (16 + 12) units of a scaled product of norms below 12
        // and of values below 4.5, and as much again for sums over 68 keys, are 3e-4; rounding is
        // seldom of one sign: 3e-5.
        ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(row * 16) + d]), expected,
                    3e-5)
            << "seed " << seed << ", row " << row;
      }
    }
  }
}

// ---- The mass of a few keys
// -----------------------------------------------------------------------

template <class Key, class Value>
void check_mass(std::int64_t dim, bool rotated, std::uint64_t seed) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Random random(seed);
  const Extents extents{.kv_heads = 2, .group = 3, .dim = dim, .value_dim = 16};
  Scene<Key, Value> scene(extents, rotated ? std::optional(rotary_for(dim)) : std::nullopt, seed);
  add_random_groups(scene, random, true);
  const std::vector<float> row = scene.queries(1);
  const float sm_scale = scale_for(dim);
  const Position place = static_cast<Position>(between(random, 0, 400)) / 4;
  const bool told = seed % 2 == 0;  // the place as a position of its own, or as the first one
  const std::vector<Position3> positions{on_all_axes(place)};
  const AttentionQuery query{.rows = {row.data(), 1, extents.qo_heads(), dim},
                             .first_index = 10000,
                             .first_position = told ? -5 : place,
                             .positions = told ? positions.data() : nullptr};
  const AttentionVariant<> variant{.sm_scale = sm_scale};
  std::vector<float> lse;
  attend_at<Key, Value>(scene, row, 10000, positions, variant, lse);

  // Weights of all keys, in double, by group and in the order of their indices.
  std::array<std::int64_t, 3> sizes{};
  for (const Segment<Key, Value>& segment : scene.segments())
    sizes[static_cast<std::size_t>(segment.rule.group)] += segment.rule.visible;
  std::vector<float> mass(static_cast<std::size_t>(extents.qo_heads()));
  std::vector<double> total(mass.size());
  for (std::int32_t group = 0; group < 3; ++group) {
    std::int64_t end = 0;
    std::int64_t begin = std::numeric_limits<std::int64_t>::max();
    for (const Segment<Key, Value>& segment : scene.segments())
      if (segment.rule.group == group) {
        end = std::max(end, segment.rule.first_index + segment.rule.visible);
        begin = std::min(begin, segment.rule.first_index);
      }
    for (const std::int64_t newest :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, std::int64_t{4},
          between(random, 5, 60), end - begin, end + 1000}) {
      attention_mass(query, scene.segments(), sm_scale, scene.rotary(), extents.kv_heads,
                     std::span<const float>(lse), group, newest, std::span<float>(mass));
      // Segments of one KV head alone give the same for its query heads and leave the others be.
      AttentionQuery part = query;
      const std::int32_t second = 1;
      part.kv_heads = {&second, 1};
      std::vector<Segment<Key, Value>> seconds(scene.segments().begin(), scene.segments().end());
      for (Segment<Key, Value>& segment : seconds) {
        segment.keys = segment.key(1, 0);
        segment.values = segment.value(1, 0);
      }
      std::vector<float> part_mass(mass.size(), -1.0F);
      attention_mass(part, std::span<const Segment<Key, Value>>(seconds), sm_scale, scene.rotary(),
                     extents.kv_heads, std::span<const float>(lse), group, newest,
                     std::span<float>(part_mass));
      for (std::size_t head = 0; head < mass.size(); ++head)
        if (head < 3)
          ASSERT_EQ(part_mass[head], -1.0F);
        else  // Two inlined copies of one loop, whose sums the compiler may fuse differently:
              // scores of the order of 10 agree to some 2^-20, and so do their exponentials.
          ASSERT_NEAR(part_mass[head], mass[head], 1e-5F * mass[head]);
      for (std::int64_t head = 0; head < extents.qo_heads(); ++head) {
        const float* q = row.data() + head * dim;
        const auto lse_of = [&](auto&& counts) {
          return scene.naive(q, {10000, place}, head, static_cast<double>(sm_scale),
                             {.visible = [&](const QueryInfo&, const KeyInfo& key) {
                               return counts(key);
                             }});
        };
        const auto all = lse_of([](const KeyInfo&) { return true; });
        const auto some = lse_of(
            [&](const KeyInfo& key) { return key.group == group && key.index >= end - newest; });
        const double expected = std::exp(some.lse - all.lse);
        const double found = static_cast<double>(mass[static_cast<std::size_t>(head)]);
        // A share errs by what its two exponents do, relatively, and sums up to 150 of them.
        const double bound = 1.1 * (all.lse_bound + some.lse_bound + 200 * 0x1p-24) * expected;
        ASSERT_NEAR(found, expected, bound)
            << "group " << group << ", newest " << newest << ", head " << head;
        if (newest > end) total[static_cast<std::size_t>(head)] += found;
      }
    }
  }
  for (const double sum : total) EXPECT_NEAR(sum, 1, 1e-5);
}

TEST(AttentionMass, IsTheShareOfTheNewestTokensOfAGroup) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    check_mass<float, float>(16, true, seed);
    check_mass<float, float>(20, false, seed);
    check_mass<bf16, bf16>(64, true, seed);
    check_mass<f16, float>(32, true, seed);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(AttentionMass, AGroupThatIsNotThereHasNone) {
  Scene<float, float> scene({.kv_heads = 1, .group = 2, .dim = 16, .value_dim = 16}, rotary_for(16),
                            4);
  scene.add(run_at(0, 10));
  SegmentRule hidden = run_at(0, 5);
  hidden.group = 1;
  hidden.visible = 0;
  scene.add(hidden);
  const std::vector<float> row = scene.queries(1);
  const auto outcome = scene.run(row, 10, 10, AttentionVariant<>{.sm_scale = 0.25F});
  for (const std::int32_t group : {1, 2}) {
    std::vector<float> mass(2, -1.0F);
    attention_mass(AttentionQuery{{row.data(), 1, 2, 16}, 10, 10}, scene.segments(), 0.25F,
                   scene.rotary(), 1, std::span<const float>(outcome.lse), group, 4,
                   std::span<float>(mass));
    EXPECT_EQ(mass, (std::vector<float>{0, 0}));
  }
}

}  // namespace SLUICE_TEST_UNIT
