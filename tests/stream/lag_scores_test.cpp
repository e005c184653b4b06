// SPDX-License-Identifier: MIT
#include "sluice/stream/lag_scores.hpp"
#include "support/test_unit.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using Times = std::vector<double>;
constexpr double kPrinted = 1e-6;  // the figures are printed with six digits

// What SimulEval gives for words (frame-stream-algorithms.md, test C.12a).
TEST(LagScores, OfWordsAreThoseOfSimulEval) {
  struct Case {
    Times delays;
    double source;
    std::int64_t reference;
    double ap, al, laal, dal, atd;
  };
  const Case cases[] = {
      {{1, 2, 3, 4}, 4, 4, .625, 1, 1, 1, 1},
      {{2, 3, 4, 4, 4}, 4, 5, .85, 2.2, 2.2, 2.28, 2.2},
      {{2, 3, 4, 4, 4}, 4, 3, 1.416667, 1.666667, 2.2, 2.28, 2.2},
      {{4, 4, 4, 4}, 4, 4, 1, 4, 4, 4, 4},
      {{3, 3, 3, 5, 5}, 5, 5, .76, 2, 2, 3, 3},
      {{2, 4, 4, 6}, 6, 4, .666667, 1.75, 1.75, 2.375, 2.75},
  };
  for (const Case& c : cases) {
    const LagScores s = lag_scores(c.delays, {}, c.source, c.reference, LagSource::kWords);
    EXPECT_NEAR(s.average_proportion, c.ap, kPrinted);
    EXPECT_NEAR(s.average_lagging, c.al, kPrinted);
    EXPECT_NEAR(s.length_adaptive, c.laal, kPrinted);
    EXPECT_NEAR(s.differentiable, c.dal, kPrinted);
    EXPECT_NEAR(s.average_token_delay, c.atd, kPrinted);
    EXPECT_EQ(s.start_offset, c.delays.front());
    EXPECT_EQ(s.end_offset, c.delays.back() - c.source);
    EXPECT_EQ(s.last_delay_ratio, c.delays.back() / c.source);
  }
}

// The same for speech, without and with the time of computing (test C.12b).
TEST(LagScores, OfSpeechAreThoseOfSimulEval) {
  struct Case {
    Times delays, elapsed;
    double source;
    std::int64_t reference;
    double ap, ap_ca, al, al_ca, laal, dal, dal_ca, atd, atd_ca;
  };
  const Case cases[] = {
      {{1000, 1000, 2000, 3000, 3000},
       {1100, 1150, 2200, 3300, 3340},
       3000,
       5,
       .666667,
       .739333,
       850,
       1037.5,
       850,
       1080,
       1260,
       1180,
       1288},
      {{500, 1000, 1500, 2000},
       {600, 1150, 1700, 2250},
       2000,
       4,
       .625,
       .7125,
       500,
       675,
       500,
       500,
       675,
       600,
       662.5},
  };
  for (const Case& c : cases) {
    const LagScores s = lag_scores(c.delays, {}, c.source, c.reference, LagSource::kMilliseconds);
    EXPECT_NEAR(s.average_proportion, c.ap, kPrinted);
    EXPECT_NEAR(s.average_lagging, c.al, kPrinted);
    EXPECT_NEAR(s.length_adaptive, c.laal, kPrinted);
    EXPECT_NEAR(s.differentiable, c.dal, kPrinted);
    EXPECT_NEAR(s.average_token_delay, c.atd, kPrinted);
    const LagScores ca =
        lag_scores(c.delays, c.elapsed, c.source, c.reference, LagSource::kMilliseconds);
    EXPECT_NEAR(ca.average_proportion, c.ap_ca, kPrinted);
    EXPECT_NEAR(ca.average_lagging, c.al_ca, kPrinted);
    EXPECT_NEAR(ca.length_adaptive, c.al_ca, kPrinted);
    EXPECT_NEAR(ca.differentiable, c.dal_ca, kPrinted);
    EXPECT_NEAR(ca.average_token_delay, c.atd_ca, kPrinted);
    EXPECT_EQ(ca.start_offset, c.elapsed.front());
    EXPECT_EQ(ca.end_offset, c.elapsed.back() - c.source);
  }
  const Times longer{800, 1600, 2400, 2400, 2400};
  const LagScores s = lag_scores(longer, {}, 2400, 3, LagSource::kMilliseconds);
  EXPECT_NEAR(s.average_proportion, 1.333333, kPrinted);
  EXPECT_NEAR(s.average_lagging, 800, kPrinted);
  EXPECT_NEAR(s.length_adaptive, 1120, kPrinted);
  EXPECT_NEAR(s.differentiable, 1248, kPrinted);
  EXPECT_NEAR(s.average_token_delay, 1080, kPrinted);
}

TEST(LagScores, AreNoNumbersWithoutOutputOrSource) {
  EXPECT_TRUE(std::isnan(lag_scores({}, {}, 4, 4, LagSource::kWords).average_lagging));
  EXPECT_TRUE(std::isnan(lag_scores(Times{1}, {}, 0, 4, LagSource::kWords).average_proportion));
  EXPECT_THROW(lag_scores(Times{1, 2}, Times{1}, 4, 4, LagSource::kWords), Error);
  // Without a reference the output stands for it.
  const Times delays{2, 3, 4, 4, 4};
  EXPECT_EQ(lag_scores(delays, {}, 4, 0, LagSource::kWords).average_lagging,
            lag_scores(delays, {}, 4, 5, LagSource::kWords).average_lagging);
  // Everything was written after the source: the first delay.
  EXPECT_EQ(lag_scores(Times{5, 5}, {}, 3, 2, LagSource::kWords).average_lagging, 5);
}

// Test C.13.
TEST(StreamLag, IsTheMeanOverSentences) {
  const Times delays{1000, 1000, 2000, 2000, 3000, 3000};
  const Times elapsed{1200, 1200, 2500, 2500, 3700, 3900};
  const std::vector<StreamSentence> sentences{{0, 1400, 4, 0, 4}, {1500, 1600, 3, 4, 6}};
  const StreamLag lag = stream_laal(delays, elapsed, sentences);
  EXPECT_NEAR(lag.laal, 1108.333333, kPrinted);
  EXPECT_NEAR(lag.laal_with_computing, 1458.333333, kPrinted);
  EXPECT_EQ(lag.sentences, 2);
  const auto only = [&](std::size_t s) {
    return stream_laal(delays, elapsed, std::span(sentences).subspan(s, 1));
  };
  EXPECT_NEAR(only(0).laal, 983.333333, kPrinted);
  EXPECT_NEAR(only(0).laal_with_computing, 1216.666667, kPrinted);
  EXPECT_NEAR(only(1).laal, 1233.333333, kPrinted);
  EXPECT_NEAR(only(1).laal_with_computing, 1700, kPrinted);
}

TEST(StreamLag, SkipsEmptySentencesAndClampsEarlyWords) {
  const Times delays{1000, 1200};
  std::vector<StreamSentence> sentences{{0, 900, 2, 0, 0}, {1500, 1000, 2, 0, 2}};
  EXPECT_NEAR(stream_laal(delays, {}, sentences).laal, -250, kPrinted);  // (0 + 0 - 500) / 2
  EXPECT_NEAR(stream_laal(delays, {}, sentences, false).laal, (-500 - 300 - 500) / 2.0, kPrinted);
  EXPECT_TRUE(std::isnan(stream_laal(delays, {}, sentences).laal_with_computing));
  EXPECT_EQ(stream_laal(delays, {}, sentences).sentences, 1);
  EXPECT_TRUE(std::isnan(stream_laal(delays, {}, std::span(sentences).first(1)).laal));
  sentences[1].end_output = 3;
  EXPECT_THROW(stream_laal(delays, {}, sentences), Error);
  EXPECT_THROW(stream_laal(delays, Times{1}, {}), Error);
}

using Words = std::vector<std::string>;

std::size_t edit_distance(std::span<const std::string> a, std::span<const std::string> b) {
  if (a.empty() || b.empty()) return a.size() + b.size();
  const std::size_t changed =
      edit_distance(a.subspan(1), b.subspan(1)) + (a.front() == b.front() ? 0 : 1);
  return std::min(
      {changed, edit_distance(a.subspan(1), b) + 1, edit_distance(a, b.subspan(1)) + 1});
}

/// The least sum of edit distances over all ways to part the output among the sentences.
std::size_t least_distance(std::span<const std::string> output,
                           std::span<const std::vector<std::string>> reference) {
  if (reference.empty()) return output.empty() ? 0 : std::size_t{1} << 20;
  std::size_t least = std::size_t{1} << 20;
  for (std::size_t first = 0; first <= output.size(); ++first)
    least = std::min(least, edit_distance(output.first(first), reference.front()) +
                                least_distance(output.subspan(first), reference.subspan(1)));
  return least;
}

TEST(Resegment, FindsACutOfLeastEditDistance) {
  Random random(5);
  for (int round = 0; round < 200; ++round) {
    Words output;
    std::vector<Words> reference(1 + random.below(3));
    for (std::uint64_t i = random.below(7); i > 0; --i)
      output.push_back(std::string(1, static_cast<char>('a' + random.below(3))));
    for (Words& sentence : reference)
      for (std::uint64_t i = random.below(4); i > 0; --i)
        sentence.push_back(std::string(1, static_cast<char>('a' + random.below(3))));
    const std::vector<std::size_t> cuts = resegment(output, reference);
    ASSERT_EQ(cuts.size(), reference.size() + 1);
    EXPECT_EQ(cuts.front(), 0U);
    EXPECT_EQ(cuts.back(), output.size());
    std::size_t distance = 0;
    for (std::size_t s = 0; s < reference.size(); ++s) {
      ASSERT_LE(cuts[s], cuts[s + 1]);
      distance +=
          edit_distance(std::span(output).subspan(cuts[s], cuts[s + 1] - cuts[s]), reference[s]);
    }
    EXPECT_EQ(distance, least_distance(output, reference)) << "round " << round;
  }
}

TEST(Resegment, GivesWordsBetweenSentencesToTheEarlier) {
  const Words output{"the", "cat", "sat", "um", "it", "slept"};
  const std::vector<Words> reference{{"the", "cat", "sat"}, {}, {"it", "slept", "well"}};
  EXPECT_EQ(resegment(output, reference), (std::vector<std::size_t>{0, 4, 4, 6}));
  EXPECT_EQ(resegment({}, reference), (std::vector<std::size_t>{0, 0, 0, 0}));
  EXPECT_EQ(resegment(Words{}, {}), (std::vector<std::size_t>{0}));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
