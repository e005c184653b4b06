// SPDX-License-Identifier: MIT
#include "sluice/stream/policy.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/error.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

/// A state with a candidate.
PolicyState state(Token candidate, std::int64_t units_read = 1, bool source_ended = false) {
  PolicyState result;
  result.candidate = candidate;
  result.units_read = units_read;
  result.source_ended = source_ended;
  return result;
}

PolicyState before_the_first_write(std::int64_t units_read, bool source_ended = false) {
  PolicyState result;
  result.units_read = units_read;
  result.source_ended = source_ended;
  return result;
}

/// The answers as letters: w(rite), p(rovisional), r(ead and feed again), k(eep and read), .(wait),
/// s
template <class Policy>
char ask(Policy& policy, const PolicyState& asked) {
  const Decision decision = policy.decide(asked);
  switch (decision.action) {
    case Action::kWrite: return decision.provisional ? 'p' : 'w';
    case Action::kRead: return decision.last_token == LastToken::kKeep ? 'k' : 'r';
    case Action::kWait: return '.';
    case Action::kStop: return 's';
  }
  return '?';
}

TEST(WaitK, ReadsThePromptAndKUnitsFirst) {
  WaitK policy(3, FixedUnits{2});
  for (std::int64_t units = 0; units < 4; ++units)
    EXPECT_EQ(ask(policy, before_the_first_write(units)), 'r') << units;
  EXPECT_EQ(ask(policy, before_the_first_write(4)), 'w');
  EXPECT_EQ(ask(policy, before_the_first_write(2, true)), 'w');  // all there is
  WaitK no_prompt(3, FixedUnits{2}, 0);
  EXPECT_EQ(ask(no_prompt, before_the_first_write(3)), 'w');
}

TEST(WaitK, FixedUnitsKeepTheirLastToken) {
  WaitK policy(1, FixedUnits{3});
  std::string answers;
  for (int i = 0; i < 7; ++i) answers += ask(policy, state(5));
  EXPECT_EQ(answers, "wwkwwkw");
  EXPECT_EQ(ask(policy, state(5, 1, true)), 'w');
  WaitK every(1, FixedUnits{1});
  EXPECT_EQ(ask(every, state(5)), 'k');
}

TEST(WaitK, WordsAreSeenFromTheNextWord) {
  WordUnits words;
  words.classes = {0, WordUnits::kStartsWord, WordUnits::kEndsWord};
  WaitK policy(1, words);
  // [1] first word; [0] goes on; [1] begins the next: dropped; asked again; then a full stop ends
  // it.
  std::string answers;
  for (const Token token : {1, 0, 1, 1, 0, 2, 1, 2}) answers += ask(policy, state(token));
  EXPECT_EQ(answers, "wwrwwkwk");
  // Tokens beyond the table are inside words, but no word is longer than `longest`.
  words.longest = 3;
  WaitK bounded(1, words);
  answers.clear();
  for (int i = 0; i < 6; ++i) answers += ask(bounded, state(99));
  EXPECT_EQ(answers, "wwkwwk");
  // The released loop reads at punctuation and again at the space behind it.
  words.punctuation_ends_word = false;
  WaitK released(1, words);
  answers.clear();
  for (const Token token : {1, 2, 1, 1}) answers += ask(released, state(token));
  EXPECT_EQ(answers, "wkrw");
}

TEST(WaitK, ResetBeginsANewUnit) {
  WaitK policy(1, FixedUnits{2});
  EXPECT_EQ(ask(policy, state(1)), 'w');
  policy.reset();
  EXPECT_EQ(ask(policy, state(1)), 'w');
  EXPECT_EQ(ask(policy, state(1)), 'k');
}

TEST(WordUnits, ClassesOfTokenTexts) {
  EXPECT_EQ(WordUnits::classify(" the"), WordUnits::kStartsWord);
  EXPECT_EQ(WordUnits::classify("ing"), 0);
  EXPECT_EQ(WordUnits::classify(""), 0);
  EXPECT_EQ(WordUnits::classify("."), WordUnits::kEndsWord);
  EXPECT_EQ(WordUnits::classify("\n"), WordUnits::kStartsWord);
  EXPECT_EQ(WordUnits::classify(" why?"), WordUnits::kStartsWord | WordUnits::kEndsWord);
  for (const char* mark : {".", ",", ":", ";", "?", "!"})
    EXPECT_EQ(WordUnits::classify(mark), WordUnits::kEndsWord) << mark;
}

TEST(ReadUntilSeparator, ReadsAfterEachSeparator) {
  ReadUntilSeparator policy({7, 9}, 2);
  EXPECT_EQ(ask(policy, before_the_first_write(1)), 'r');
  EXPECT_EQ(ask(policy, before_the_first_write(2)), 'w');
  std::string answers;
  for (const Token token : {1, 7, 2, 3, 9, 9}) answers += ask(policy, state(token));
  EXPECT_EQ(answers, "wkwwkk");
  EXPECT_EQ(ask(policy, state(7, 5, true)), 'w');  // generation goes on as ordinary decoding
}

/// Offers `hypothesis`, then the end token; returns how many were confirmed at the READ.
template <class Policy>
std::int64_t offer(Policy& policy, const std::vector<Token>& hypothesis, Token end) {
  for (std::size_t i = 0; i < hypothesis.size(); ++i) {
    PolicyState asked = state(hypothesis[i]);
    asked.provisional = std::span(hypothesis).first(i);
    EXPECT_EQ(ask(policy, asked), 'p');
  }
  PolicyState asked = state(end);
  asked.provisional = hypothesis;
  const Decision decision = policy.decide(asked);
  EXPECT_EQ(decision.action, Action::kRead);
  EXPECT_EQ(decision.last_token, LastToken::kFeedAgain);
  return decision.confirm;
}

TEST(LocalAgreement, ConfirmsWhatTwoHypothesesBeginWith) {
  LocalAgreement policy(5, 0);
  EXPECT_EQ(policy.max_provisional(), 5);
  EXPECT_EQ(offer(policy, {1, 2, 3}, 0), 0);     // nothing to agree with
  EXPECT_EQ(offer(policy, {1, 2, 4, 5}, 0), 2);  // 1 2
  // The next hypothesis continues behind what is final: 4 5 was left.
  EXPECT_EQ(offer(policy, {4, 5, 6}, 0), 2);
  EXPECT_EQ(offer(policy, {7}, 0), 0);  // 6 was left
  EXPECT_EQ(offer(policy, {}, 0), 0);
  EXPECT_EQ(offer(policy, {1, 2, 3, 4, 5}, 9), 0);  // complete by its length
  policy.reset();
  EXPECT_EQ(offer(policy, {1, 2, 3, 4, 5}, 9), 0);
  EXPECT_EQ(ask(policy, state(3, 4, true)), 'w');  // all of the source is there: final
}

// Tests C.2 and C.3 of frame-stream-algorithms.md: a b x | a b c y | a b c d | a b c d e (the
// last), each without what is final by then.
constexpr Token kA = 1, kB = 2, kC = 3, kD = 4, kX = 8, kY = 9;

TEST(LocalAgreement, OfTwoAndThreeHypotheses) {
  LocalAgreement two(8, 0);
  EXPECT_EQ(offer(two, {kA, kB, kX}, 0), 0);
  EXPECT_EQ(offer(two, {kA, kB, kC, kY}, 0), 2);
  EXPECT_EQ(offer(two, {kC, kD}, 0), 1);
  EXPECT_EQ(ask(two, state(kD, 4, true)), 'w');
  LocalAgreement three(8, 0, 1, 3);
  EXPECT_EQ(offer(three, {kA, kB, kX}, 0), 0);
  EXPECT_EQ(offer(three, {kA, kB, kC, kY}, 0), 0);
  EXPECT_EQ(offer(three, {kA, kB, kC, kD}, 0), 2);
  // Two of what is left agree, the third, x, does not.
  EXPECT_EQ(offer(three, {kC, kD}, 0), 1);
  EXPECT_EQ(ask(three, state(kD, 4, true)), 'w');
  // A copy has room for hypotheses of its own.
  LocalAgreement copy = three;
  three.reset();
  EXPECT_EQ(offer(three, {kD}, 0), 0);
  EXPECT_EQ(offer(copy, {kD}, 0), 1);
}

TEST(HoldN, OfOneAndTwoTokens) {
  HoldN one(1, 8, 0);
  EXPECT_EQ(offer(one, {kA, kB, kX}, 0), 2);
  EXPECT_EQ(offer(one, {kC, kY}, 0), 1);
  EXPECT_EQ(offer(one, {kD}, 0), 0);
  EXPECT_EQ(ask(one, state(kD, 4, true)), 'w');
  HoldN two(2, 8, 0);
  EXPECT_EQ(offer(two, {kA, kB, kX}, 0), 1);
  EXPECT_EQ(offer(two, {kB, kC, kY}, 0), 1);
  EXPECT_EQ(offer(two, {kC, kD}, 0), 0);
  EXPECT_EQ(ask(two, state(kC, 4, true)), 'w');
}

// Test C.1.
TEST(WaitK, ReadsKUnitsMoreThanItHasWritten) {
  const auto read = [](std::int64_t k, std::int64_t count, std::int64_t total, std::int64_t unit) {
    std::vector<std::int64_t> result;
    for (std::int64_t i = 0; i < count; ++i) result.push_back(wait_k_read(k, i, total, unit));
    return result;
  };
  using Read = std::vector<std::int64_t>;
  EXPECT_EQ(read(1, 6, 6, 1), (Read{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(read(3, 6, 6, 1), (Read{3, 4, 5, 6, 6, 6}));
  EXPECT_EQ(read(5, 6, 6, 1), (Read{5, 6, 6, 6, 6, 6}));
  EXPECT_EQ(read(1, 5, 34, 8), (Read{8, 16, 24, 32, 34}));
  EXPECT_EQ(read(3, 5, 34, 8), (Read{24, 32, 34, 34, 34}));
  EXPECT_EQ(read(std::int64_t{1} << 62, 2, 34, 8), (Read{34, 34}));
}

TEST(HoldN, WithholdsTheLastTokens) {
  HoldN policy(2, 4, 0);
  EXPECT_EQ(offer(policy, {1, 2, 3}, 0), 1);
  EXPECT_EQ(offer(policy, {1}, 0), 0);
  EXPECT_EQ(offer(policy, {1, 2, 3, 4}, 7), 2);
  HoldN none(0, 4, 0);
  EXPECT_EQ(offer(none, {1, 2}, 0), 2);
}

TEST(AttentionGuided, WritesWhileTheNewestSourceMattersLittle) {
  AttentionGuided policy(0.3F, 2);
  EXPECT_EQ(policy.newest_source_tokens(), 2);
  PolicyState asked = state(4);
  asked.newest_source_mass = 0.29F;
  EXPECT_EQ(ask(policy, asked), 'w');
  asked.newest_source_mass = 0.3F;
  EXPECT_EQ(ask(policy, asked), 'r');
  asked.source_ended = true;
  EXPECT_EQ(ask(policy, asked), 'w');
}

TEST(SpeakOrSilence, SpeaksWhenSilenceIsUnlikely) {
  SpeakOrSilence policy(2, 0.5F, 3);
  // softmax(0, 0, ln 2) = 1/4, 1/4, 1/2; raise the silence token above or below the threshold.
  const std::array<float, 3> quiet{0, 0, std::log(2.1F)};
  const std::array<float, 3> loud{0, 0, std::log(1.9F)};
  EXPECT_NEAR(SpeakOrSilence::probability(quiet, 2), 2.1F / 4.1F, 1e-6F);
  PolicyState asked = state(2);
  asked.logits = quiet;
  EXPECT_EQ(ask(policy, asked), 'r');
  asked = state(0);
  asked.logits = loud;
  EXPECT_EQ(ask(policy, asked), 'w');
  asked.logits = quiet;  // within a turn only the token itself ends it
  EXPECT_EQ(ask(policy, asked), 'w');
  asked.candidate = 2;
  EXPECT_EQ(ask(policy, asked), 'r');
  // A turn has at most three tokens.
  asked = state(1);
  asked.logits = loud;
  EXPECT_EQ(ask(policy, asked), 'w');
  EXPECT_EQ(ask(policy, asked), 'w');
  EXPECT_EQ(ask(policy, asked), 'w');
  EXPECT_EQ(ask(policy, asked), 'r');
  asked.logits = quiet;
  asked.source_ended = true;
  EXPECT_EQ(ask(policy, asked), 's');
}

// Test C.10: the silence token is the first.
TEST(SpeakOrSilence, OrTheMostProbableTokenAboveAThreshold) {
  const auto silent = [](float threshold, const std::vector<double>& shares) {
    std::vector<float> logits;
    for (const double share : shares) logits.push_back(static_cast<float>(std::log(share)));
    return SpeakOrSilence(0, threshold, 3, 1, SilenceRule::kMostProbable).stays_silent(logits);
  };
  EXPECT_TRUE(silent(.725F, {.80, .15, .05}));
  EXPECT_FALSE(silent(.725F, {.70, .20, .10}));
  EXPECT_TRUE(silent(0, {.70, .20, .10}));
  EXPECT_FALSE(silent(.725F, {.30, .60, .10}));
  EXPECT_FALSE(silent(0, {.30, .60, .10}));
}

template <class Make>
void expect_refused(const char* where, Make&& make) {
  try {
    make();
    ADD_FAILURE() << where;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kConfig);
    EXPECT_EQ(error.detail().where, where);
    EXPECT_FALSE(error.detail().field.empty());
    EXPECT_FALSE(error.detail().found.empty());
  }
}

// frame-stream-algorithms B.5: CarelessWhisper's check of the last two tokens.
TEST(CountStable, KeepsWhatDidNotFallOrIsStillBest) {
  const std::array fell{RecheckedToken{3.0F, 3.2F, true}, RecheckedToken{2.0F, 1.5F, false}};
  EXPECT_EQ(count_stable(fell), 1);
  const std::array still_best{RecheckedToken{3.0F, 2.9F, true}, RecheckedToken{2.0F, 1.5F, true}};
  EXPECT_EQ(count_stable(still_best), 2);
  // What stands behind a token that goes, goes with it; a logit that stays equal did not fall.
  const std::array first{RecheckedToken{3.0F, 2.9F, false}, RecheckedToken{2.0F, 2.5F, true}};
  EXPECT_EQ(count_stable(first), 0);
  const std::array equal{RecheckedToken{3.0F, 3.0F, false}};
  EXPECT_EQ(count_stable(equal), 1);
  EXPECT_EQ(count_stable({}), 0);
}

TEST(Policies, RefuseOptionsThatMakeNoSense) {
  expect_refused("WaitK", [] { WaitK(0, FixedUnits{1}); });
  expect_refused("WaitK", [] { WaitK(1, FixedUnits{1}, -1); });
  expect_refused("WaitK", [] { ReadUntilSeparator({1}, 0); });
  expect_refused("LocalAgreement", [] { LocalAgreement(0); });
  expect_refused("LocalAgreement", [] { LocalAgreement(5000); });
  expect_refused("LocalAgreement", [] { LocalAgreement(5, 0, 1, 1); });
  expect_refused("LocalAgreement", [] { LocalAgreement(5, 0, 1, 65); });
  expect_refused("HoldN", [] { HoldN(-1, 4); });
  expect_refused("HoldN", [] { HoldN(1, 4, 0, 0); });
  expect_refused("AttentionGuided", [] { AttentionGuided(0.0F, 1); });
  expect_refused("AttentionGuided", [] { AttentionGuided(1.1F, 1); });
  expect_refused("AttentionGuided", [] { AttentionGuided(std::nanf(""), 1); });
  expect_refused("AttentionGuided", [] { AttentionGuided(0.5F, 0); });
  expect_refused("SpeakOrSilence", [] { SpeakOrSilence(1, 1.5F, 3); });
  expect_refused("SpeakOrSilence", [] { SpeakOrSilence(1, 0.5F, 0); });
  expect_refused("SpeakOrSilence", [] { SpeakOrSilence(-1, 0.5F, 3); });
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
