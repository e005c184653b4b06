// SPDX-License-Identifier: MIT
#include "sluice/stream/attention_policy.hpp"
#include "support/test_unit.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// The matrix of test C.5 of frame-stream-algorithms.md: 4 tokens by 8 frames.
constexpr float kWeights[] = {.30F, .40F, .10F, .05F, .05F, .03F, .02F, .05F,  //
                              .05F, .10F, .45F, .20F, .10F, .05F, .02F, .03F,  //
                              .02F, .03F, .05F, .10F, .15F, .40F, .20F, .05F,  //
                              .01F, .02F, .02F, .05F, .10F, .15F, .60F, .05F};
const MatrixView<const float> kMatrix(kWeights, 4, 8);

TEST(AlignAtt, WritesUpToTheFirstTokenThatLooksAtTheEnd) {
  std::vector<std::int64_t> frames(4);
  most_attended_frames(kMatrix, AlignAtt{}, frames);
  EXPECT_EQ(frames, (std::vector<std::int64_t>{1, 2, 5, 6}));
  const auto written = [](std::int64_t f, bool drop) {
    return writable_tokens(kMatrix, AlignAtt{.frames = f, .drop_last_frame = drop});
  };
  EXPECT_EQ(written(1, true), 3);
  EXPECT_EQ(written(2, true), 2);
  EXPECT_EQ(written(3, true), 2);
  EXPECT_EQ(written(4, true), 2);
  EXPECT_EQ(written(1, false), 4);
  EXPECT_EQ(written(2, false), 3);
  EXPECT_EQ(written(3, false), 2);
  EXPECT_EQ(written(8, false), 0);
}

// A column that every token likes most is no place to look at once columns are standardised.
TEST(AlignAtt, StandardisedColumnsHideSinks) {
  constexpr float weights[] = {.90F, .06F, .02F, .02F,  //
                               .91F, .02F, .06F, .01F,  //
                               .89F, .02F, .02F, .07F};
  const MatrixView<const float> matrix(weights, 3, 4);
  std::vector<std::int64_t> frames(3);
  most_attended_frames(matrix, AlignAtt{.drop_last_frame = false}, frames);
  EXPECT_EQ(frames, (std::vector<std::int64_t>{0, 0, 0}));
  most_attended_frames(matrix, AlignAtt{.drop_last_frame = false, .standardise = true}, frames);
  EXPECT_EQ(frames, (std::vector<std::int64_t>{1, 2, 3}));
  // One token has nothing to be compared with, a constant column says nothing.
  std::vector<std::int64_t> one(1);
  most_attended_frames({weights, 1, 4}, AlignAtt{.drop_last_frame = false, .standardise = true},
                       one);
  EXPECT_EQ(one, (std::vector<std::int64_t>{0}));
}

TEST(EdAtt, WritesUpToTheFirstTokenThatLeansOnTheEnd) {
  constexpr double kPrinted = 1e-6;
  std::vector<double> sums(4);
  const auto expect_sums = [&](const EdAtt& policy, const std::vector<double>& expected) {
    newest_attention(kMatrix, policy, sums);
    for (std::size_t t = 0; t < 4; ++t) EXPECT_NEAR(sums[t], expected[t], kPrinted);
  };
  expect_sums({.newest_frames = 2}, {.096891, .135242, 1.234296, 1.191979});
  expect_sums({.newest_frames = 3}, {.193782, .328445, 1.542870, 1.350909});
  expect_sums({.newest_frames = 2, .scale = AttentionScale::kSum},
              {.052632, .072165, .631579, .789474});
  const auto written = [](std::int64_t newest, double alpha) {
    return writable_tokens(kMatrix, EdAtt{.alpha = alpha, .newest_frames = newest});
  };
  EXPECT_EQ(written(2, .6), 2);
  EXPECT_EQ(written(2, .4), 2);
  EXPECT_EQ(written(2, .2), 2);
  EXPECT_EQ(written(2, .1), 1);
  EXPECT_EQ(written(3, .6), 2);
  EXPECT_EQ(written(3, .4), 2);
  EXPECT_EQ(written(3, .2), 1);
  EXPECT_EQ(written(3, .1), 0);
  EXPECT_EQ(written(3, 9), 4);
}

TEST(AttentionPolicies, RefuseWhatHasNoFrames) {
  EXPECT_THROW(writable_tokens(kMatrix, EdAtt{.newest_frames = 0}), Error);
  EXPECT_THROW(writable_tokens({kWeights, 4, 1}, EdAtt{}), Error);
  EXPECT_THROW(writable_tokens({kWeights, 4, 1}, AlignAtt{}), Error);
  EXPECT_THROW(writable_tokens({kWeights, 4, 0}, AlignAtt{.drop_last_frame = false}), Error);
  std::vector<double> sums(3);
  EXPECT_THROW(newest_attention(kMatrix, EdAtt{}, sums), Error);
  std::vector<std::int64_t> frames(3);
  EXPECT_THROW(most_attended_frames(kMatrix, AlignAtt{}, frames), Error);
  // No tokens: nothing is written.
  EXPECT_EQ(writable_tokens({kWeights, 0, 8}, AlignAtt{}), 0);
}

// Test C.6.
TEST(HistoryCut, KeepsTheLastWordsOrTheLastSentence) {
  const std::vector<std::string> pieces{"_the", "_cat",  "_s",  "at",  "_down",
                                        ".",    "_then", "_it", "_sl", "ept"};
  const auto tokens = [](const std::vector<std::string>& text) {
    std::vector<HistoryToken> result;
    for (std::size_t i = 0; i < text.size(); ++i)
      result.push_back({text[i].front() == '_', text[i] == ".",
                        // frames grow, but for one that looks back
                        text[i] == "_sl" ? 9 : static_cast<std::int64_t>(2 * i)});
    return result;
  };
  const auto kept = [&](const std::vector<std::string>& text, const TextHistory& history) {
    std::string result;
    const auto from = static_cast<std::size_t>(history_cut(tokens(text), history).tokens);
    for (std::size_t i = from; i < text.size(); ++i) result += text[i];
    return result;
  };
  EXPECT_EQ(kept(pieces, {.words = 2}), "_it_slept");
  EXPECT_EQ(kept(pieces, {.words = 3}), "_then_it_slept");
  EXPECT_EQ(kept(pieces, {.words = 5}), "_sat_down._then_it_slept");
  EXPECT_EQ(kept(pieces, {.words = 7}), "_the_cat_sat_down._then_it_slept");
  EXPECT_EQ(kept(pieces, {.words = 20}), "_the_cat_sat_down._then_it_slept");
  EXPECT_EQ(kept(pieces, {.words = 0}), "");
  EXPECT_EQ(kept(pieces, {.words = 5, .max_tokens = 4}), "_then_it_slept");
  const TextHistory sentence{.rule = TextHistory::Rule::kPunctuation};
  EXPECT_EQ(kept(pieces, sentence), "_then_it_slept");
  auto closed = pieces;
  closed.emplace_back(".");
  EXPECT_EQ(kept(closed, sentence), "_then_it_slept.");

  // Audio goes with the text: up to the earliest frame of what is kept, and not without it.
  EXPECT_EQ(history_cut(tokens(pieces), {.words = 2}).frames, 9);
  EXPECT_EQ(history_cut(tokens(pieces), {.words = 5}).frames, 4);
  EXPECT_EQ(history_cut(tokens(pieces), {.words = 20}).frames, 0);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
