// SPDX-License-Identifier: MIT
#include "sluice/position/group_layout.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::BatchLayout;
using sluice::GroupedLayout;
using sluice::GroupLayout;
using sluice::InterleavedLayout;
using sluice::kSourceGroup;
using sluice::kTargetGroup;
using sluice::OverlappedLayout;
using sluice::Position;

using Positions = std::vector<Position>;

/// Places `count` units of one token each.
template <GroupLayout Layout>
Positions place_tokens(Layout& layout, int group, int count) {
  Positions positions;
  for (int i = 0; i < count; ++i) positions.push_back(layout.place(group, 1));
  return positions;
}

/// The positions of one unit of `extent` tokens.
template <GroupLayout Layout>
Positions place_unit(Layout& layout, int group, int extent) {
  const Position first = layout.place(group, extent);
  Positions positions;
  for (int i = 0; i < extent; ++i) positions.push_back(first + i);
  return positions;
}

template <class Function>
void expect_config_error(const Function& function, const std::string& field,
                         const std::string& found) {
  try {
    function();
    FAIL() << "accepted " << found;
  } catch (const sluice::Error& error) {
    EXPECT_EQ(error.code(), sluice::ErrorCode::kConfig);
    EXPECT_EQ(error.detail().field, field);
    EXPECT_NE(error.detail().found.find(found), std::string::npos) << error.what();
  }
}

// --- The positions of the published systems ------------------------------------------------------

// GPE's two modes: S = 5 source tokens, T = 4 target tokens, arriving alternately.
TEST(GroupedLayout, SourceAndTargetCountApart) {
  for (const Position target_offset : {0.0, 0.5, 128.0}) {
    GroupedLayout layout = GroupedLayout::group_positions(target_offset);
    EXPECT_EQ(place_unit(layout, kSourceGroup, 2), (Positions{0, 1}));
    EXPECT_EQ(layout.place(kTargetGroup, 1), target_offset);
    EXPECT_EQ(place_unit(layout, kSourceGroup, 3), (Positions{2, 3, 4}));
    EXPECT_EQ(place_tokens(layout, kTargetGroup, 3),
              (Positions{target_offset + 1, target_offset + 2, target_offset + 3}));
  }
}

TEST(BatchLayout, TargetFollowsTheWholeSource) {
  BatchLayout layout(5);
  EXPECT_EQ(place_unit(layout, kSourceGroup, 2), (Positions{0, 1}));
  EXPECT_EQ(layout.place(kTargetGroup, 1), 5);
  EXPECT_EQ(place_unit(layout, kSourceGroup, 3), (Positions{2, 3, 4}));
  EXPECT_EQ(place_tokens(layout, kTargetGroup, 3), (Positions{6, 7, 8}));
}

TEST(BatchLayout, IsGroupPositionsWithTheSourceExtentAsOffset) {
  BatchLayout batch(7.5);
  GroupedLayout grouped = GroupedLayout::group_positions(7.5);
  for (const int group : {0, 1, 1, 0, 0, 1})
    EXPECT_EQ(batch.place(group, 2.5), grouped.place(group, 2.5));
}

TEST(InterleavedLayout, CountsInOrderOfArrival) {
  InterleavedLayout layout;
  EXPECT_EQ(place_unit(layout, kSourceGroup, 3), (Positions{0, 1, 2}));
  EXPECT_EQ(layout.place(kTargetGroup, 1), 3);
  EXPECT_EQ(layout.place(kSourceGroup, 1), 4);
  EXPECT_EQ(place_tokens(layout, kTargetGroup, 2), (Positions{5, 6}));
  EXPECT_EQ(layout.next(kSourceGroup), 7);
  EXPECT_EQ(layout.next(sluice::kMaxGroups - 1), 7);
}

// Source segments of 2, 1, 1, 1 tokens, wait-1, an assistant prefix of one token, words of one
// token. The token predicted after w1a opens a word: it is dropped, w1a's keys are removed and w1a
// is fed again after the next READ.
TEST(GroupedLayout, FollowsTheReadsAndWritesOfGroupPositionEncoding) {
  for (const Position target_offset : {0.0, 0.5}) {
    GroupedLayout layout = GroupedLayout::group_positions(target_offset);
    Positions read = place_unit(layout, kSourceGroup, 2);  // READ the prompt
    read.push_back(layout.place(kSourceGroup, 1));         // and k = 1 word
    EXPECT_EQ(read, (Positions{0, 1, 2}));
    EXPECT_EQ(layout.place(kTargetGroup, 1), target_offset);      // WRITE the prefix
    EXPECT_EQ(layout.place(kTargetGroup, 1), target_offset + 1);  // WRITE w1a
    layout.retract(kTargetGroup, 1);
    EXPECT_EQ(layout.next(kTargetGroup), target_offset + 1);
    EXPECT_EQ(layout.place(kSourceGroup, 1), 3);                  // READ segment 2
    EXPECT_EQ(layout.place(kTargetGroup, 1), target_offset + 1);  // WRITE w1a again
  }
}

// Three frames of 3, a prompt at 0-3, texts of 2 and 4 tokens.
struct Rounds {
  Positions v1, a1, v2, a2, v3;
  bool operator==(const Rounds&) const = default;
};

template <GroupLayout Layout>
Rounds place_rounds(Layout layout) {
  EXPECT_EQ(place_unit(layout, kSourceGroup, 4), (Positions{0, 1, 2, 3}));
  Rounds rounds;
  rounds.v1 = place_unit(layout, kSourceGroup, 3);
  rounds.a1 = place_tokens(layout, kTargetGroup, 2);
  rounds.v2 = place_unit(layout, kSourceGroup, 3);
  rounds.a2 = place_tokens(layout, kTargetGroup, 4);
  rounds.v3 = place_unit(layout, kSourceGroup, 3);
  return rounds;
}

TEST(GroupLayout, GivesTheThreeDesignsOfSpeakWhileWatching) {
  EXPECT_EQ(place_rounds(OverlappedLayout()),
            (Rounds{{4, 5, 6}, {7, 8}, {7, 8, 9}, {10, 11, 12, 13}, {10, 11, 12}}));
  EXPECT_EQ(place_rounds(GroupedLayout::group_decoupled()),
            (Rounds{{4, 5, 6}, {0, 1}, {7, 8, 9}, {2, 3, 4, 5}, {10, 11, 12}}));
  EXPECT_EQ(place_rounds(GroupedLayout::gap_isolated(100)),
            (Rounds{{4, 5, 6}, {101, 102}, {7, 8, 9}, {103, 104, 105, 106}, {10, 11, 12}}));
}

// E_1 = 6, E_2 = 9, E_3 = 13: the open round always starts one further.
TEST(OverlappedLayout, KeepsTheLastPositionOfEachRound) {
  OverlappedLayout layout;
  layout.place(kSourceGroup, 4);
  EXPECT_EQ(layout.next(kSourceGroup), 3 + 1);
  layout.place(kSourceGroup, 3);
  EXPECT_EQ(layout.next(kSourceGroup), 6 + 1);
  layout.place(kTargetGroup, 2);
  layout.place(kSourceGroup, 3);
  EXPECT_EQ(layout.next(kSourceGroup), 9 + 1);
  layout.place(kTargetGroup, 4);
  layout.place(kSourceGroup, 3);
  EXPECT_EQ(layout.next(kSourceGroup), 13 + 1);
  EXPECT_EQ(layout.next(kTargetGroup), 13 + 1);
}

// The same with the recurrence written out, for random rounds in halves, text in random pieces.
TEST(OverlappedLayout, FollowsTheRecurrence) {
  std::mt19937 random(7);
  const auto halves = [&](int most) {
    return (static_cast<int>(random() % 1000U) % most) * 0.5;
  };
  for (int stream = 0; stream < 50; ++stream) {
    OverlappedLayout layout;
    Position last = -1;  // E_i
    for (int round = 0; round < 40; ++round) {
      Position text = 0;  // k_i
      for (int piece = static_cast<int>(random() % 4U); piece > 0; --piece) {
        const Position extent = halves(6);
        EXPECT_EQ(layout.next(kSourceGroup), last + 1) << "the frame's place waits for no text";
        EXPECT_EQ(layout.place(kTargetGroup, extent), last + 1 + text);
        text += extent;
      }
      const Position frame = 0.5 + halves(8);  // m_{i+1}
      EXPECT_EQ(layout.place(kSourceGroup, frame), last + 1);
      last += std::max(frame, text);
    }
  }
}

TEST(OverlappedLayout, FramesWithoutTextFollowEachOther) {
  OverlappedLayout whole;
  OverlappedLayout pieces;
  EXPECT_EQ(whole.place(kSourceGroup, 5), 0);
  EXPECT_EQ(place_tokens(pieces, kSourceGroup, 5), (Positions{0, 1, 2, 3, 4}));
  EXPECT_EQ(whole.next(kTargetGroup), pieces.next(kTargetGroup));
  EXPECT_EQ(whole.next(kSourceGroup), pieces.next(kSourceGroup));
}

TEST(OverlappedLayout, TextAfterTheLastFrameContinues) {
  OverlappedLayout layout;
  layout.place(kSourceGroup, 3);
  EXPECT_EQ(place_tokens(layout, kTargetGroup, 5), (Positions{3, 4, 5, 6, 7}));
}

// --- Retracting ----------------------------------------------------------------------------------

TEST(InterleavedLayout, TakesBackWhatNoOtherGroupFollows) {
  InterleavedLayout layout;
  layout.place(kSourceGroup, 3);
  layout.place(kTargetGroup, 1);
  layout.place(kTargetGroup, 1);
  layout.retract(kTargetGroup, 1);
  EXPECT_EQ(layout.place(kSourceGroup, 2), 4);
  EXPECT_EQ(layout.place(kTargetGroup, 1), 6);
}

TEST(InterleavedLayout, LeavesAGapBehindAnotherGroup) {
  InterleavedLayout layout;
  layout.place(kTargetGroup, 2);  // 0, 1
  layout.place(kSourceGroup, 3);  // 2 to 4
  layout.retract(kTargetGroup, 1);
  EXPECT_EQ(layout.next(kTargetGroup), 5);
  layout.place(kTargetGroup, 1);    // 5
  layout.retract(kTargetGroup, 2);  // 5, and 1 behind the source
  EXPECT_EQ(layout.next(kTargetGroup), 5);
}

TEST(OverlappedLayout, TakesBackTextOfTheOpenRound) {
  OverlappedLayout layout;
  layout.place(kSourceGroup, 4);
  layout.place(kTargetGroup, 2);  // 4, 5
  layout.retract(kTargetGroup, 1);
  EXPECT_EQ(layout.next(kTargetGroup), 5);
  EXPECT_EQ(layout.place(kSourceGroup, 1), 4);
  // The text that was taken back no longer holds the next round off.
  EXPECT_EQ(layout.place(kTargetGroup, 1), 5);
}

TEST(OverlappedLayout, LeavesTextOfAClosedRound) {
  OverlappedLayout layout;
  layout.place(kTargetGroup, 3);  // 0 to 2
  layout.place(kSourceGroup, 1);  // 0; the next round starts at 3
  layout.place(kTargetGroup, 1);  // 3
  layout.retract(kTargetGroup, 2);
  EXPECT_EQ(layout.next(kTargetGroup), 3);
  EXPECT_EQ(layout.next(kSourceGroup), 3);
}

TEST(OverlappedLayout, TakesBackAFrameThatNoTextFollows) {
  OverlappedLayout layout;
  layout.place(kSourceGroup, 2);  // 0, 1
  layout.place(kTargetGroup, 2);  // 2, 3
  layout.place(kSourceGroup, 5);  // 2 to 6
  layout.retract(kSourceGroup, 1);
  EXPECT_EQ(layout.next(kTargetGroup), 6);
  layout.retract(kSourceGroup, 3);
  EXPECT_EQ(layout.next(kTargetGroup), 4) << "the text is longer than what is left of the frame";
  layout.retract(kSourceGroup, 1);
  EXPECT_EQ(layout.next(kSourceGroup), 2);
  EXPECT_EQ(layout.next(kTargetGroup), 4);
  layout.retract(kTargetGroup, 2);
  layout.retract(kSourceGroup, 1);  // of an earlier round: stays
  EXPECT_EQ(layout.next(kSourceGroup), 2);
  EXPECT_EQ(layout.next(kTargetGroup), 2);
}

TEST(OverlappedLayout, LeavesAFrameThatTextFollows) {
  OverlappedLayout layout;
  layout.place(kSourceGroup, 3);
  layout.place(kTargetGroup, 1);
  layout.retract(kSourceGroup, 3);
  EXPECT_EQ(layout.next(kSourceGroup), 3);
  EXPECT_EQ(layout.next(kTargetGroup), 4);
  layout.retract(kTargetGroup, 1);
  layout.retract(kSourceGroup, 3);
  EXPECT_EQ(layout.next(kSourceGroup), 0);
}

// --- Every layout --------------------------------------------------------------------------------

/// A layout of a user's own, with nothing but the four functions: the target starts at 4.
class OwnLayout {
 public:
  Position place(int group, Position extent) {
    const Position first = next(group);
    next_[static_cast<std::size_t>(group)] += extent;
    return first;
  }
  void retract(int group, Position extent) { next_[static_cast<std::size_t>(group)] -= extent; }
  Position next(int group) const { return next_[static_cast<std::size_t>(group)]; }
  void reset() { next_ = {0, 4}; }

 private:
  std::array<Position, 2> next_{0, 4};
};

template <class Layout>
Layout make() {
  if constexpr (std::is_same_v<Layout, GroupedLayout>)
    return GroupedLayout::group_positions(0.5);
  else if constexpr (std::is_same_v<Layout, BatchLayout>)
    return BatchLayout(1e6);
  else
    return Layout();
}

template <class Layout>
class EveryLayout : public testing::Test {};
using Layouts =
    testing::Types<GroupedLayout, BatchLayout, InterleavedLayout, OverlappedLayout, OwnLayout>;
TYPED_TEST_SUITE(EveryLayout, Layouts);

TYPED_TEST(EveryLayout, IsAPlainValue) {
  static_assert(GroupLayout<TypeParam>);
  static_assert(std::is_trivially_copyable_v<TypeParam>);
}

TYPED_TEST(EveryLayout, PositionsOfAGroupIncreaseForAnyOrderOfArrival) {
  std::mt19937 random(3);
  for (int stream = 0; stream < 20; ++stream) {
    TypeParam layout = make<TypeParam>();
    std::array<Position, 2> end{-1, -1};  // one past each group's last position
    for (int unit = 0; unit < 500; ++unit) {
      const int group = static_cast<int>(random() % 2U);
      const Position extent = 0.5 * (1 + static_cast<int>(random() % 9U));
      Position& last_end = end[static_cast<std::size_t>(group)];
      const Position expected = layout.next(group);
      EXPECT_GE(expected, last_end);
      EXPECT_EQ(layout.place(group, extent), expected);
      last_end = expected + extent;
    }
  }
}

// Units placed and taken back at random: what is left never shares a position within its group, nor
// between groups where there is one counter.
TYPED_TEST(EveryLayout, NoTwoUnitsOfAGroupShareAPositionAfterRetracting) {
  struct Unit {
    Position first;
    Position extent;
  };
  std::mt19937 random(6);
  TypeParam layout = make<TypeParam>();
  std::array<std::vector<Unit>, 2> left;  // by group, in order of arrival
  for (int step = 0; step < 5000; ++step) {
    const int group = static_cast<int>(random() % 2U);
    std::vector<Unit>& units = left[static_cast<std::size_t>(group)];
    if (random() % 3U == 0 && !units.empty()) {
      layout.retract(group, units.back().extent);
      units.pop_back();
    } else {
      const Position extent = 0.5 * (1 + static_cast<int>(random() % 5U));
      units.push_back({layout.place(group, extent), extent});
    }
    for (std::size_t g = 0; g < 2; ++g) {
      const bool one_counter = std::is_same_v<TypeParam, InterleavedLayout>;
      const std::size_t reader = one_counter ? static_cast<std::size_t>(group) : g;
      if (left[g].empty()) continue;
      const Unit& newest = left[g].back();
      EXPECT_GE(layout.next(static_cast<int>(reader)), newest.first + newest.extent);
      if (left[g].size() < 2) continue;
      const Unit& before = left[g][left[g].size() - 2];
      EXPECT_GE(newest.first, before.first + before.extent);
    }
  }
}

TYPED_TEST(EveryLayout, PlacesAgainWhereItRetracted) {
  std::mt19937 random(4);
  TypeParam layout = make<TypeParam>();
  for (int unit = 0; unit < 2000; ++unit) {
    const int group = static_cast<int>(random() % 2U);
    const Position extent = 0.25 * (1 + static_cast<int>(random() % 20U));
    const std::array<Position, 2> before{layout.next(0), layout.next(1)};
    const Position first = layout.place(group, extent);
    const std::array<Position, 2> after{layout.next(0), layout.next(1)};
    layout.retract(group, extent);
    EXPECT_EQ(layout.next(0), before[0]);
    EXPECT_EQ(layout.next(1), before[1]);
    EXPECT_EQ(layout.place(group, extent), first);
    EXPECT_EQ(layout.next(0), after[0]);
    EXPECT_EQ(layout.next(1), after[1]);
  }
}

TYPED_TEST(EveryLayout, APartTakenBackIsAsIfItHadNeverBeenPlaced) {
  std::mt19937 random(5);
  TypeParam layout = make<TypeParam>();
  for (int unit = 0; unit < 2000; ++unit) {
    const int group = static_cast<int>(random() % 2U);
    const Position kept = 0.5 * (1 + static_cast<int>(random() % 6U));
    const Position dropped = 0.5 * static_cast<int>(random() % 6U);
    TypeParam once = layout;
    once.place(group, kept);
    layout.place(group, kept + dropped);
    layout.retract(group, dropped);
    EXPECT_EQ(layout.next(0), once.next(0));
    EXPECT_EQ(layout.next(1), once.next(1));
  }
}

TYPED_TEST(EveryLayout, AnEmptyUnitChangesNothing) {
  TypeParam layout = make<TypeParam>();
  layout.place(kSourceGroup, 3);
  layout.place(kTargetGroup, 2);
  const std::array<Position, 2> before{layout.next(0), layout.next(1)};
  for (const int group : {kSourceGroup, kTargetGroup}) {
    EXPECT_EQ(layout.place(group, 0), layout.next(group));
    layout.retract(group, 0);
    EXPECT_EQ(layout.next(0), before[0]);
    EXPECT_EQ(layout.next(1), before[1]);
  }
  layout.retract(kTargetGroup, 2);
  EXPECT_EQ(layout.next(kTargetGroup), before[1] - 2) << "an empty unit stands behind no other";
}

TYPED_TEST(EveryLayout, ResetsToItsConstruction) {
  TypeParam layout = make<TypeParam>();
  for (const int group : {0, 1, 0, 0, 1}) layout.place(group, 2.5);
  layout.reset();
  TypeParam fresh = make<TypeParam>();
  for (const int group : {1, 0, 1, 1, 0}) EXPECT_EQ(layout.place(group, 1), fresh.place(group, 1));
}

TYPED_TEST(EveryLayout, CountsEveryTokenLateInAStream) {
  TypeParam layout = make<TypeParam>();
  const Position first = layout.place(kTargetGroup, 1e12);
  EXPECT_EQ(layout.place(kTargetGroup, 0.5), first + 1e12);
  EXPECT_EQ(layout.place(kTargetGroup, 1), first + 1e12 + 0.5);
  layout.retract(kTargetGroup, 1);
  EXPECT_EQ(layout.next(kTargetGroup), first + 1e12 + 0.5);
}

// --- Options -------------------------------------------------------------------------------------

TEST(GroupedLayout, TakesAnyOriginsOfUpToSixteenGroups) {
  const std::array<Position, 3> origins{0, -2.5, 1000};
  GroupedLayout layout{origins};
  EXPECT_EQ(layout.num_groups(), 3);
  for (int group = 0; group < 3; ++group) {
    EXPECT_EQ(layout.origin(group), origins[static_cast<std::size_t>(group)]);
    EXPECT_EQ(layout.place(group, 2), origins[static_cast<std::size_t>(group)]);
    EXPECT_EQ(layout.next(group), origins[static_cast<std::size_t>(group)] + 2);
  }
  const Positions most(sluice::kMaxGroups, 7);
  EXPECT_EQ(GroupedLayout(most).next(sluice::kMaxGroups - 1), 7);
}

TEST(GroupedLayout, RefusesOptionsWithoutSense) {
  const Position infinite = std::numeric_limits<Position>::infinity();
  expect_config_error([] { GroupedLayout{Positions{}}; }, "origins", "0");
  expect_config_error([] { GroupedLayout{Positions(sluice::kMaxGroups + 1, 0.0)}; }, "origins",
                      "17");
  expect_config_error([&] { GroupedLayout{Positions{0, infinite}}; }, "origins", "inf");
  expect_config_error([] { GroupedLayout::group_positions(std::nan("")); }, "target_offset", "nan");
  expect_config_error([] { GroupedLayout::gap_isolated(-1); }, "delta", "-1");
  expect_config_error([&] { GroupedLayout::gap_isolated(infinite); }, "delta", "inf");
}

TEST(BatchLayout, RefusesAnExtentWithoutSense) {
  expect_config_error([] { BatchLayout{-0.5}; }, "source_extent", "-0.5");
  expect_config_error([] { BatchLayout{std::nan("")}; }, "source_extent", "nan");
}

#if SLUICE_DEBUG_ASSERTS
TEST(GroupLayoutDeathTest, AssertsItsPreconditions) {
  GroupedLayout grouped = GroupedLayout::group_decoupled();
  EXPECT_DEATH(grouped.place(2, 1), "group");
  EXPECT_DEATH(grouped.place(kSourceGroup, -1), "extent");
  EXPECT_DEATH(grouped.retract(kSourceGroup, 1), "extent");
  BatchLayout batch(2);
  EXPECT_DEATH(batch.place(kSourceGroup, 3), "kSourceGroup");
  InterleavedLayout interleaved;
  EXPECT_DEATH(interleaved.place(sluice::kMaxGroups, 1), "group");
  OverlappedLayout overlapped;
  EXPECT_DEATH(overlapped.place(2, 1), "group");
}
#endif

}  // namespace SLUICE_TEST_UNIT
