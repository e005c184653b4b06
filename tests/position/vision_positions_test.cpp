// SPDX-License-Identifier: MIT
#include "sluice/position/vision_positions.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "sluice/position/group_layout.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::fill_positions;
using sluice::on_all_axes;
using sluice::Position;
using sluice::Position3;
using sluice::SequenceSpan;
using sluice::TextRun;
using sluice::time_step;
using sluice::TimeRounding;
using sluice::VisionGrid;

using Positions = std::vector<Position>;
using Spans = std::vector<SequenceSpan>;

std::vector<Position3> positions_of(const Spans& spans, Position base = 0) {
  std::vector<Position3> positions(static_cast<std::size_t>(sluice::count_tokens(spans)));
  EXPECT_EQ(fill_positions(spans, base, positions), base + sluice::position_extent(spans));
  return positions;
}

Positions on_axis(const std::vector<Position3>& positions, Position Position3::*axis) {
  Positions values;
  for (const Position3& position : positions) values.push_back(position.*axis);
  return values;
}

// --- One block -----------------------------------------------------------------------------------

TEST(VisionGrid, CountsOnEachAxisFromItsBase) {
  const VisionGrid grid{.frames = 2, .rows = 2, .cols = 3};
  EXPECT_EQ(grid.num_tokens(), 12);
  EXPECT_EQ(positions_of({grid}, 7), (std::vector<Position3>{{7, 7, 7},
                                                             {7, 7, 8},
                                                             {7, 7, 9},
                                                             {7, 8, 7},
                                                             {7, 8, 8},
                                                             {7, 8, 9},
                                                             {8, 7, 7},
                                                             {8, 7, 8},
                                                             {8, 7, 9},
                                                             {8, 8, 7},
                                                             {8, 8, 8},
                                                             {8, 8, 9}}));
}

TEST(VisionGrid, ExtendsToOnePastItsLargestAxis) {
  EXPECT_EQ((VisionGrid{.frames = 2, .rows = 2, .cols = 5, .frame_step = 1}.extent()), 5);
  EXPECT_EQ((VisionGrid{.frames = 2, .rows = 6, .cols = 5, .frame_step = 1}.extent()), 6);
  EXPECT_EQ((VisionGrid{.frames = 9, .rows = 6, .cols = 5, .frame_step = 1}.extent()), 9);
  EXPECT_EQ((VisionGrid{.frames = 9, .rows = 1, .cols = 1, .frame_step = 0.5}.extent()), 5);
  EXPECT_EQ((VisionGrid{.frames = 8, .rows = 1, .cols = 1, .frame_step = 0.5}.extent()), 4.5);
  EXPECT_EQ((VisionGrid{.frames = 8, .rows = 1, .cols = 1, .frame_step = 0}.extent()), 1);
}

TEST(VisionGrid, FloorsTheOffsetAndNotThePosition) {
  const VisionGrid grid{.frames = 5,
                        .rows = 1,
                        .cols = 1,
                        .frame_step = time_step(0.375),
                        .rounding = TimeRounding::kFloor};
  EXPECT_EQ(on_axis(positions_of({grid}, 2.5), &Position3::t),
            (Positions{2.5, 2.5, 3.5, 4.5, 5.5}));
  EXPECT_EQ(grid.extent(), 4);
}

TEST(VisionGrid, WithoutTokensAddsNothing) {
  for (const VisionGrid& grid : {VisionGrid{.frames = 0, .rows = 2, .cols = 2},
                                 VisionGrid{.frames = 2, .rows = 0, .cols = 2},
                                 VisionGrid{.frames = 2, .rows = 2, .cols = 0}, VisionGrid{}}) {
    EXPECT_EQ(grid.num_tokens(), 0);
    EXPECT_EQ(grid.extent(), 0);
    EXPECT_TRUE(positions_of({grid}, 3).empty());
  }
  EXPECT_EQ(positions_of({TextRun{1}, VisionGrid{}, TextRun{0}, TextRun{1}}, 3),
            (std::vector<Position3>{on_all_axes(3), on_all_axes(4)}));
}

TEST(TimeStep, IsSecondsTimesPositionsPerSecond) {
  EXPECT_EQ(time_step(1), 2);
  EXPECT_EQ(time_step(2.0 / 8), 0.5);
  EXPECT_EQ(time_step(0.5, 4), 2);
}

// --- Sequences of the published systems ----------------------------------------------------------

// text, text, vision_start, one row of two merged patches per temporal grid, vision_end, text,
// text, vision_start, the next second's grids, vision_end, text.
Spans two_chunks(double frames_per_second, std::int64_t grids) {
  const VisionGrid chunk{
      .frames = grids, .rows = 1, .cols = 2, .frame_step = time_step(2 / frames_per_second)};
  return {TextRun{3}, chunk, TextRun{4}, chunk, TextRun{2}};
}

TEST(FillPositions, IsContiguousAtTwoFramesASecond) {
  const std::vector<Position3> positions = positions_of(two_chunks(2, 1));
  EXPECT_EQ(on_axis(positions, &Position3::t),
            (Positions{0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 9, 11, 12}));
  EXPECT_EQ(on_axis(positions, &Position3::w),
            (Positions{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
}

TEST(FillPositions, GivesTextHalvesAtEightFramesASecond) {
  EXPECT_EQ(on_axis(positions_of(two_chunks(8, 4)), &Position3::t),
            (Positions{0,   1,   2,   3,   3,  3.5, 3.5,  4,    4,  4.5, 4.5, 5.5, 6.5,
                       7.5, 8.5, 9.5, 9.5, 10, 10,  10.5, 10.5, 11, 11,  12,  13}));
}

// StreamingVLM's "append": a stream's later chunks go on where the last one ended.
TEST(FillPositions, ContinuesInAnyPieces) {
  const Spans spans = two_chunks(8, 4);
  const std::vector<Position3> whole = positions_of(spans);
  std::vector<Position3> pieces(whole.size());
  std::span<Position3> rest = pieces;
  Position next = 0;
  for (const SequenceSpan& span : spans) {
    const auto tokens = static_cast<std::size_t>(sluice::count_tokens(std::span(&span, 1)));
    next = fill_positions(span, next, rest.first(tokens));
    rest = rest.subspan(tokens);
  }
  EXPECT_EQ(pieces, whole);
  EXPECT_EQ(next, 14);
}

// StreamingVLM's "shrink": the kept spans are laid out again, with no gap where one was removed.
TEST(FillPositions, ClosesTheGapOfAnEvictedSpan) {
  Spans spans = two_chunks(8, 4);
  spans.erase(spans.begin() + 1);  // the first second's vision
  EXPECT_EQ(on_axis(positions_of(spans), &Position3::t),
            (Positions{0, 1, 2, 3, 4, 5, 6, 7, 7, 7.5, 7.5, 8, 8, 8.5, 8.5, 9.5, 10.5}));
}

// Ten text tokens with vision_start last, two temporal grids of 2 x 2 merged patches a second
// apart, vision_end, end of turn, newline; then the assistant's turn.
Spans user_turn() {
  return {TextRun{10},
          VisionGrid{.frames = 2,
                     .rows = 2,
                     .cols = 2,
                     .frame_step = time_step(1),
                     .rounding = TimeRounding::kFloor},
          TextRun{3}};
}

TEST(FillPositions, GivesTheUserTurnOfThinkAsYouSee) {
  const std::vector<Position3> positions = positions_of(user_turn());
  EXPECT_EQ(on_axis(positions, &Position3::t),
            (Positions{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 12, 12, 12, 12, 13, 14, 15}));
  const std::vector<Position3> patches(positions.begin() + 10, positions.begin() + 18);
  EXPECT_EQ(on_axis(patches, &Position3::h), (Positions{10, 10, 11, 11, 10, 10, 11, 11}));
  EXPECT_EQ(on_axis(patches, &Position3::w), (Positions{10, 11, 10, 11, 10, 11, 10, 11}));
  EXPECT_EQ(positions.back(), on_all_axes(15));
}

template <sluice::GroupLayout Layout>
std::vector<Position3> assistant_turn(Layout layout) {
  layout.place(sluice::kSourceGroup, sluice::position_extent(user_turn()));
  return positions_of({TextRun{3}}, layout.place(sluice::kTargetGroup, 3));
}

TEST(FillPositions, RestartsTheAssistantTurnWhereItsGroupCounts) {
  const std::vector<Position3> restarted{on_all_axes(0), on_all_axes(1), on_all_axes(2)};
  const std::vector<Position3> continued{on_all_axes(16), on_all_axes(17), on_all_axes(18)};
  EXPECT_EQ(assistant_turn(sluice::GroupedLayout::group_positions()), restarted);
  EXPECT_EQ(assistant_turn(sluice::BatchLayout(16)), continued);
  EXPECT_EQ(assistant_turn(sluice::InterleavedLayout()), continued);
}

// A frame that arrives as a unit of a layout stands where it stands in the whole sequence.
TEST(FillPositions, AgreesWithALayoutThatPlacesSpanBySpan) {
  sluice::InterleavedLayout layout;
  std::vector<Position3> placed;
  for (const SequenceSpan& span : two_chunks(8, 4)) {
    const Position base =
        layout.place(sluice::kSourceGroup, sluice::position_extent(std::span(&span, 1)));
    const std::vector<Position3> unit = positions_of({span}, base);
    placed.insert(placed.end(), unit.begin(), unit.end());
  }
  EXPECT_EQ(placed, positions_of(two_chunks(8, 4)));
}

TEST(FillPositions, IsExactLateInAStream) {
  const Spans spans = two_chunks(8, 4);
  const std::vector<Position3> early = positions_of(spans);
  const std::vector<Position3> late = positions_of(spans, 1e12);
  for (std::size_t i = 0; i < early.size(); ++i) {
    EXPECT_EQ(late[i].t - 1e12, early[i].t);
    EXPECT_EQ(late[i].h - 1e12, early[i].h);
    EXPECT_EQ(late[i].w - 1e12, early[i].w);
  }
}

// --- Errors --------------------------------------------------------------------------------------

TEST(FillPositions, RefusesAnotherNumberOfPositions) {
  for (const std::size_t size : {0U, 20U, 22U}) {
    std::vector<Position3> positions(size, on_all_axes(-1));
    try {
      fill_positions(user_turn(), 0, positions);
      FAIL() << "accepted " << size;
    } catch (const sluice::Error& error) {
      EXPECT_EQ(error.code(), sluice::ErrorCode::kShape);
      EXPECT_EQ(error.detail().expected, "21");
      EXPECT_EQ(error.detail().found, std::to_string(size));
    }
    EXPECT_EQ(positions, std::vector<Position3>(size, on_all_axes(-1)));
  }
}

TEST(FillPositions, RefusesSpansWithoutSense) {
  struct Case {
    SequenceSpan span;
    std::string field;
  };
  const Case cases[] = {
      {TextRun{-1}, "tokens"},
      {VisionGrid{.frames = -1, .rows = -1, .cols = 4}, "frames"},
      {VisionGrid{.frames = 1, .rows = -1, .cols = -4}, "rows"},
      {VisionGrid{.frames = 1, .rows = 1, .cols = -4}, "cols"},
      {VisionGrid{.frames = 1, .rows = 2, .cols = 2, .frame_step = -1}, "frame_step"},
      {VisionGrid{.frames = 1, .rows = 2, .cols = 2, .frame_step = std::nan("")}, "frame_step"},
      {VisionGrid{.frames = 1, .rows = 2, .cols = 2, .frame_step = INFINITY}, "frame_step"},
  };
  std::vector<Position3> positions(4);
  for (const Case& refused : cases) {
    try {
      fill_positions(refused.span, 0, positions);
      FAIL() << "accepted " << refused.field;
    } catch (const sluice::Error& error) {
      EXPECT_EQ(error.code(), sluice::ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, refused.field);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
