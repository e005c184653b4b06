// SPDX-License-Identifier: MIT
#include "sluice/stream/ctc.hpp"
#include "sluice/stream/transducer.hpp"
#include "support/test_unit.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using Tokens = std::vector<Token>;

// Test C.9a of frame-stream-algorithms.md.
TEST(CtcGreedy, CarriesTheLastLabelAcrossChunks) {
  const Tokens labels{0, 3, 3, 0, 0, 3, 5, 5, 0, 5, 7};
  std::vector<Tokens> chunks;
  CtcGreedy ctc(0);
  std::size_t next = 0;
  for (const int count : {2, 4, 1, 4}) {
    chunks.emplace_back();
    for (int i = 0; i < count; ++i)
      if (const auto token = ctc.push(labels[next++])) chunks.back().push_back(*token);
  }
  EXPECT_EQ(chunks, (std::vector<Tokens>{{3}, {3}, {5}, {5, 7}}));
  EXPECT_EQ(ctc.frames(), 11);
}

// The definition: repeats collapse, then blanks go.
TEST(CtcGreedy, IsTheCollapsedBestPath) {
  Random random(3);
  for (int round = 0; round < 100; ++round) {
    Tokens labels;
    for (int i = 0; i < 60; ++i) labels.push_back(static_cast<Token>(random.below(4)));
    Tokens expected;
    for (std::size_t i = 0; i < labels.size(); ++i)
      if (labels[i] != 3 && (i == 0 || labels[i] != labels[i - 1])) expected.push_back(labels[i]);
    CtcGreedy ctc(3);
    Tokens tokens;
    for (const Token label : labels) {
      std::vector<float> scores(4, -1.0F);
      scores[static_cast<std::size_t>(label)] = 2.0F;
      if (const auto token = ctc.push(scores)) tokens.push_back(*token);
    }
    EXPECT_EQ(tokens, expected);
    std::int64_t blanks = 0;
    while (blanks < 60 && labels[static_cast<std::size_t>(59 - blanks)] == 3) ++blanks;
    EXPECT_EQ(ctc.blank_run(), blanks);
    ctc.reset();
    EXPECT_EQ(ctc.frames(), 0);
  }
}

TEST(Argmax, TakesTheFirstOfEqualValues) {
  EXPECT_EQ(argmax(std::vector<float>{1, 3, 2, 3}), 1);
  EXPECT_EQ(argmax(std::vector<float>{-2}), 0);
}

// Test C.9b: the joint network as a table by (frame, last label), -1: none yet.
TEST(TransducerGreedy, CarriesThePredictorAcrossFramesAndChunks) {
  const std::map<std::pair<std::int64_t, Token>, Token> table{
      {{0, -1}, 4}, {{0, 4}, 0}, {{1, 4}, 6}, {{1, 6}, 0},
      {{2, 6}, 0},  {{3, 6}, 2}, {{3, 2}, 9}, {{3, 9}, 0}};
  struct Emitted {
    Token token;
    std::int64_t frame;
    bool operator==(const Emitted&) const = default;
  };
  const auto decode = [&](std::int64_t limit, std::vector<std::int64_t> chunks,
                          std::int64_t& joints, std::int64_t& predictions) {
    TransducerGreedy transducer(0, limit);
    std::vector<Emitted> emitted;
    Token last = -1;
    joints = 0;
    predictions = 1;  // on nothing, before the first frame
    std::int64_t first = 0;
    for (const std::int64_t count : chunks) {
      transducer.push(
          count,
          [&](std::int64_t t) {
            ++joints;
            return table.at({first + t, last});
          },
          [&](Token token) {
            ++predictions;
            last = token;
          },
          [&](Token token, std::int64_t frame) {
            emitted.push_back({token, frame});
          });
      first += count;
    }
    EXPECT_EQ(transducer.frames(), 4);
    return emitted;
  };
  for (const auto& chunks : {std::vector<std::int64_t>{4}, {1, 1, 1, 1}, {2, 0, 2}, {1, 3}}) {
    std::int64_t joints = 0;
    std::int64_t predictions = 0;
    EXPECT_EQ(decode(1, chunks, joints, predictions),
              (std::vector<Emitted>{{4, 0}, {6, 1}, {2, 3}}));
    EXPECT_EQ(joints, 4);
    EXPECT_EQ(predictions, 4);
    EXPECT_EQ(decode(10, chunks, joints, predictions),
              (std::vector<Emitted>{{4, 0}, {6, 1}, {2, 3}, {9, 3}}));
    EXPECT_EQ(joints, 8);
    EXPECT_EQ(predictions, 5);
  }
  EXPECT_THROW(TransducerGreedy(0, 0), Error);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
