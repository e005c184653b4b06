// SPDX-License-Identifier: MIT
#include "sluice/stream/sampler.hpp"
#include "support/test_unit.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The oracle: the filters as their definitions say, on a full sort, in double, with a new vector
// for each step. Returns probabilities by token.
std::map<Token, double> naive_distribution(std::vector<float> logits, const SamplerOptions& options,
                                           std::vector<Token> history) {
  struct Entry {
    Token token;
    double logit;
    double probability;
  };
  if (history.size() > static_cast<std::size_t>(options.repetition_window))
    history.erase(history.begin(), history.end() - options.repetition_window);
  const std::set<Token> repeated(history.begin(), history.end());
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    double logit = logits[i];
    if (repeated.count(static_cast<Token>(i)) != 0)
      logit = logit < 0 ? logit * options.repetition_penalty : logit / options.repetition_penalty;
    if (std::isnan(logit) || logit == -HUGE_VAL) continue;
    entries.push_back({static_cast<Token>(i), logit / options.temperature, 0.0});
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return a.logit > b.logit; });
  const auto normalise = [&] {
    double total = 0;
    for (Entry& e : entries) total += e.probability = std::exp(e.logit - entries.front().logit);
    for (Entry& e : entries) e.probability /= total;
  };
  if (options.top_k > 0 && static_cast<std::size_t>(options.top_k) < entries.size()) {
    const double last = entries[static_cast<std::size_t>(options.top_k) - 1].logit;
    std::erase_if(entries, [&](const Entry& e) { return e.logit < last; });
  }
  normalise();
  if (options.top_p < 1) {
    double mass = 0;
    std::size_t kept = 0;
    while (kept < entries.size() && (kept == 0 || mass < options.top_p))
      mass += entries[kept++].probability;
    entries.resize(kept);
  }
  normalise();
  const double least = options.min_p * entries.front().probability;
  std::erase_if(entries, [&](const Entry& e) { return e.probability < least; });
  normalise();
  std::map<Token, double> result;
  for (const Entry& e : entries)
    if (e.probability > 0) result[e.token] = e.probability;
  return result;
}

std::map<Token, double> as_map(std::span<const Sampler::Candidate> candidates) {
  std::map<Token, double> result;
  for (const auto& candidate : candidates) result[candidate.token] = candidate.probability;
  return result;
}

// Both sides sum up to a few thousand doubles, in different orders, and take exp() of arguments
// that were rounded differently: some 1e-13 relative.
void expect_same(const std::map<Token, double>& found, const std::map<Token, double>& expected,
                 double bound = 1e-11) {
  ASSERT_EQ(found.size(), expected.size());
  auto f = found.begin();
  for (const auto& [token, probability] : expected) {
    ASSERT_EQ(f->first, token);
    ASSERT_NEAR(f->second, probability, bound * probability) << "token " << token;
    ++f;
  }
}

std::vector<float> random_logits(Random& random, std::size_t size, double spread) {
  std::vector<float> logits(size);
  for (float& logit : logits) logit = static_cast<float>(spread * random.normal());
  return logits;
}

TEST(Sampler, KeepsWhatTransformersKeeps) {
  std::ifstream file(SLUICE_TEST_DATA "/sampler/goldens.json");
  ASSERT_TRUE(file.good());
  const auto goldens = nlohmann::json::parse(file);
  ASSERT_GE(goldens.at("cases").size(), 60U);
  for (const auto& golden : goldens.at("cases")) {
    SCOPED_TRACE(golden.at("options").dump() + " on " + golden.at("logits").get<std::string>());
    std::vector<float> logits;
    for (const auto& value : goldens.at("logits").at(golden.at("logits").get<std::string>()))
      logits.push_back(value.is_string() ? -kInf : static_cast<float>(value.get<double>()));
    const auto& recorded = golden.at("options");
    SamplerOptions options;
    options.temperature = recorded.at("temperature").get<double>();
    options.top_k = recorded.value("top_k", 0);
    options.top_p = recorded.value("top_p", 1.0);
    options.min_p = recorded.value("min_p", 0.0);
    options.repetition_penalty = recorded.value("repetition_penalty", 1.0);
    Sampler sampler(options, static_cast<std::int64_t>(logits.size()));
    for (const auto& token : golden.at("history")) sampler.accept(token.get<Token>());
    const Token drawn = sampler.sample(logits);

    std::map<Token, double> expected;
    for (std::size_t i = 0; i < golden.at("tokens").size(); ++i)
      expected[golden["tokens"][i].get<Token>()] = golden["probabilities"][i].get<double>();
    expect_same(as_map(sampler.candidates()), expected);
    EXPECT_EQ(expected.count(drawn), 1U);
    EXPECT_FALSE(sampler.nothing_to_sample());
  }
}

TEST(Sampler, EqualsNaiveSortForRandomOptions) {
  Random random(1);
  for (int trial = 0; trial < 1500; ++trial) {
    const std::size_t vocab = 1 + random.below(trial % 50 == 0 ? 5000 : 300);
    auto logits = random_logits(random, vocab, 0.1 + 4 * random.uniform());
    if (trial % 3 == 0)  // many ties
      for (float& logit : logits) logit = std::round(logit);
    for (float& logit : logits) {
      const double u = random.uniform();
      if (trial % 4 == 1 && u < 0.3) logit = u < 0.02 ? kNaN : -kInf;
    }
    logits[random.below(vocab)] = 0.5F;  // at least one can be sampled
    SamplerOptions options;
    options.temperature = 0.2 + 2 * random.uniform();
    if (random.uniform() < 0.6) options.top_k = static_cast<int>(random.below(vocab + 10));
    if (random.uniform() < 0.6) options.top_p = random.uniform();
    if (random.uniform() < 0.5) options.min_p = random.uniform();
    if (random.uniform() < 0.5) options.repetition_penalty = 0.5 + random.uniform();
    options.repetition_window = static_cast<int>(random.below(40));
    options.seed = random.next();
    Sampler sampler(options, static_cast<std::int64_t>(vocab));
    std::vector<Token> history(random.below(80));
    for (Token& token : history) {
      token = static_cast<Token>(random.below(vocab + 2)) - 1;  // also outside the vocabulary
      sampler.accept(token);
    }
    SCOPED_TRACE("trial " + std::to_string(trial));
    const Token drawn = sampler.sample(logits);
    const auto found = as_map(sampler.candidates());
    ASSERT_NO_FATAL_FAILURE(expect_same(found, naive_distribution(logits, options, history)));
    ASSERT_EQ(found.count(drawn), 1U);
    double sum = 0;
    for (const auto& candidate : sampler.candidates()) sum += candidate.probability;
    ASSERT_NEAR(sum, 1.0, 1e-12);
  }
}

TEST(Sampler, CandidatesAreSortedWithTopKAndByTokenWithout) {
  Random random(2);
  const auto logits = random_logits(random, 1000, 2.0);
  for (const auto& [top_k, top_p, min_p] :
       {std::tuple{50, 1.0, 0.0}, std::tuple{50, 0.9, 0.01}, std::tuple{5000, 1.0, 0.0}}) {
    Sampler sampler({.temperature = 1.0, .top_k = top_k, .top_p = top_p, .min_p = min_p}, 1000);
    sampler.sample(logits);
    const auto candidates = sampler.candidates();
    ASSERT_GT(candidates.size(), 20U);
    for (std::size_t i = 1; i < candidates.size(); ++i)
      ASSERT_GE(candidates[i - 1].probability, candidates[i].probability);
  }
  for (const auto& [top_p, min_p] :
       {std::tuple{1.0, 0.0}, std::tuple{0.97, 0.0}, std::tuple{0.97, 0.01}}) {
    Sampler sampler({.temperature = 1.0, .top_p = top_p, .min_p = min_p}, 1000);
    sampler.sample(logits);
    const auto candidates = sampler.candidates();
    ASSERT_GT(candidates.size(), 20U);
    for (std::size_t i = 1; i < candidates.size(); ++i)
      ASSERT_LT(candidates[i - 1].token, candidates[i].token);
  }
}

// Pearson's statistic over the surviving tokens. For n degrees of freedom its mean is n and its
// standard deviation sqrt(2 n): the seeds are fixed, so a bound of five deviations only fails if
// the draw is wrong.
TEST(Sampler, DrawsWithTheCandidatesFrequencies) {
  constexpr int kDraws = 200'000;
  Random random(3);
  const auto logits = random_logits(random, 40, 1.0);
  for (const SamplerOptions& options :
       {SamplerOptions{.temperature = 1.0, .seed = 5},
        SamplerOptions{.temperature = 0.8, .top_k = 12, .seed = 6},
        SamplerOptions{.temperature = 1.2, .top_p = 0.8, .seed = 7},
        SamplerOptions{.temperature = 1.0, .top_k = 30, .top_p = 0.9, .min_p = 0.1, .seed = 8}}) {
    Sampler sampler(options, 40);
    std::map<Token, int> counts;
    for (int i = 0; i < kDraws; ++i) ++counts[sampler.sample(logits)];
    const auto expected = naive_distribution(logits, options, {});
    ASSERT_GT(expected.size(), 3U);
    double statistic = 0;
    int drawn = 0;
    for (const auto& [token, probability] : expected) {
      const double mean = kDraws * probability;
      ASSERT_GT(mean, 5.0);
      statistic += (counts[token] - mean) * (counts[token] - mean) / mean;
      drawn += counts[token];
    }
    EXPECT_EQ(drawn, kDraws);
    const double freedom = static_cast<double>(expected.size()) - 1;
    EXPECT_LT(std::abs(statistic - freedom), 5 * std::sqrt(2 * freedom)) << statistic;
  }
}

// The draw itself, from the definition: the uniform number of the generator against the cumulative
// probabilities in the documented order.
TEST(Sampler, DrawIsTheInverseOfTheCumulativeDistribution) {
  Random random(4);
  const auto logits = random_logits(random, 100, 1.5);
  const SamplerOptions options{.temperature = 1.0, .top_p = 0.95, .seed = 99};
  Sampler sampler(options, 100);
  Random generator(99);
  for (int i = 0; i < 2000; ++i) {
    const Token drawn = sampler.sample(logits);
    const double u = generator.uniform();
    double cumulative = 0;
    Token expected = -1;
    for (const auto& candidate : sampler.candidates()) {
      cumulative += candidate.probability;
      if (cumulative > u) {
        expected = candidate.token;
        break;
      }
    }
    ASSERT_EQ(drawn, expected);
  }
}

TEST(Sampler, GreedyTakesTheLargestAndTiesGoToTheLowest) {
  Sampler sampler({}, 6);
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 3, 2, 3, -1, 3}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-1, -1, -1, -1, -1, -1}), 0);
  EXPECT_EQ(sampler.sample(std::vector<float>{kNaN, -5, kNaN, -4, kNaN, -4}), 3);
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 2, kInf, 4, kInf, 6}), 2);
  EXPECT_EQ(sampler.sample(std::vector<float>{-0.0F, 0.0F, -1, -1, -1, -1}), 0);
  ASSERT_EQ(sampler.candidates().size(), 1U);
  EXPECT_EQ(sampler.candidates()[0].probability, 1.0);
}

TEST(Sampler, GreedyAgreesWithASearchFromTheFirstLogit) {
  Random random(8);
  for (int round = 0; round < 300; ++round) {
    const auto size = static_cast<std::int64_t>(1 + random.below(300));
    Sampler sampler({}, size);
    // Few different values: ties are the rule; some are no numbers, some rounds have no other.
    std::vector<float> logits(static_cast<std::size_t>(size));
    for (float& logit : logits) {
      const auto kind = round % 10 == 0 ? 6 + random.below(2) : random.below(9);
      logit = kind == 6 ? kNaN : kind == 7 ? -kInf : static_cast<float>(kind) - 3.0F;
    }
    std::size_t expected = 0;
    bool found = false;
    for (std::size_t i = 0; i < logits.size(); ++i)
      if (logits[i] > -kInf && (!found || logits[i] > logits[expected])) {
        expected = i;
        found = true;
      }
    ASSERT_EQ(sampler.sample(logits), static_cast<Token>(expected)) << "round " << round;
    ASSERT_EQ(sampler.nothing_to_sample(), !found);
    ASSERT_EQ(sampler.candidates().size(), 1U);
  }
}

TEST(Sampler, GreedyIgnoresFiltersAndSeed) {
  Random random(5);
  Sampler plain({}, 500);
  Sampler filtered({.top_k = 7, .top_p = 0.3, .min_p = 0.5, .seed = 1234}, 500);
  for (int i = 0; i < 50; ++i) {
    const auto logits = random_logits(random, 500, 2.0);
    const auto largest = std::max_element(logits.begin(), logits.end()) - logits.begin();
    ASSERT_EQ(plain.sample(logits), largest);
    ASSERT_EQ(filtered.sample(logits), largest);
  }
}

TEST(Sampler, RepetitionPenaltyCountsATokenOnceAndForgetsItAfterTheWindow) {
  const SamplerOptions options{.repetition_penalty = 2.0, .repetition_window = 3};
  Sampler sampler(options, 4);
  const std::vector<float> logits{4.0F, 3.0F, 1.5F, -1.0F};
  EXPECT_EQ(sampler.sample(logits), 0);
  sampler.accept(0);  // 2 3 1.5 -1
  sampler.accept(0);  // not 1 3 1.5 -1: once
  EXPECT_EQ(sampler.sample(logits), 1);
  sampler.accept(1);  // 2 1.5 1.5 -1
  EXPECT_EQ(sampler.sample(logits), 0);
  sampler.accept(2);  // window: 0 1 2
  EXPECT_EQ(sampler.sample(logits), 0);
  sampler.accept(2);  // window: 1 2 2, token 0 is free again
  EXPECT_EQ(sampler.sample(logits), 0);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0F, 1.9F, 0, 0}), 0);      // 1.9 / 2 < 1
  EXPECT_EQ(sampler.sample(std::vector<float>{-2.0F, -1.1F, -9, -9}), 0);  // -1.1 * 2 < -2
  sampler.reset();
  EXPECT_EQ(sampler.sample(std::vector<float>{-2.0F, -1.1F, -9, -9}), 1);
}

TEST(Sampler, NoWindowMeansNoPenalty) {
  Sampler sampler({.repetition_penalty = 100.0, .repetition_window = 0}, 2);
  sampler.accept(0);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0F, 0.9F}), 0);
}

TEST(Sampler, TopKKeepsTiesWithTheLastOne) {
  Sampler sampler({.temperature = 1.0, .top_k = 2}, 6);
  sampler.sample(std::vector<float>{1, 5, 3, 3, 3, 2});
  ASSERT_EQ(sampler.candidates().size(), 4U);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(sampler.candidates()[i].token, i + 1);
}

TEST(Sampler, TopPKeepsTheSmallestSetAndOfTiesTheLowest) {
  const std::vector<float> equal(4, 1.0F);  // probabilities 1/4, exact
  const auto kept = [&](double top_p) {
    Sampler sampler({.temperature = 1.0, .top_p = top_p}, 4);
    sampler.sample(equal);
    std::vector<Token> tokens;
    for (const auto& candidate : sampler.candidates()) tokens.push_back(candidate.token);
    return tokens;
  };
  EXPECT_EQ(kept(0.0), (std::vector<Token>{0}));
  EXPECT_EQ(kept(1e-300), (std::vector<Token>{0}));
  EXPECT_EQ(kept(0.25), (std::vector<Token>{0}));
  EXPECT_EQ(kept(0.2500001), (std::vector<Token>{0, 1}));
  EXPECT_EQ(kept(0.5), (std::vector<Token>{0, 1}));
  EXPECT_EQ(kept(0.75), (std::vector<Token>{0, 1, 2}));
  EXPECT_EQ(kept(0.999), (std::vector<Token>{0, 1, 2, 3}));
  EXPECT_EQ(kept(1.0), (std::vector<Token>{0, 1, 2, 3}));
}

TEST(Sampler, TopPOverALargeVocabulary) {
  Random random(6);
  // From nearly equal logits, all in one band of weights, to logits whose weights underflow.
  for (double spread : {0.001, 0.1, 1.0, 10.0, 300.0})
    for (double top_p : {0.01, 0.5, 0.9, 0.9999}) {
      const auto logits = random_logits(random, 20'000, spread);
      const SamplerOptions options{.temperature = 1.0, .top_p = top_p};
      Sampler sampler(options, 20'000);
      sampler.sample(logits);
      SCOPED_TRACE(std::to_string(spread) + " " + std::to_string(top_p));
      expect_same(as_map(sampler.candidates()), naive_distribution(logits, options, {}), 1e-10);
    }
}

TEST(Sampler, TopPOfEqualLogitsIsExact) {
  for (double top_p : {0.25, 0.5, 0.875}) {
    Sampler sampler({.temperature = 1.0, .top_p = top_p}, 20'000);
    sampler.sample(std::vector<float>(20'000, -3.0F));
    ASSERT_EQ(static_cast<double>(sampler.candidates().size()), top_p * 20'000);
    EXPECT_EQ(sampler.candidates().back().token + 1.0, top_p * 20'000);  // the lowest tokens
  }
}

TEST(Sampler, TopPJustBelowOneKeepsAllThatCounts) {
  Random random(7);
  const auto logits = random_logits(random, 3000, 1.0);
  Sampler sampler({.temperature = 1.0, .top_p = std::nextafter(1.0, 0.0)}, 3000);
  sampler.sample(logits);
  // What rounding may cut off has a probability of some 1e-13 in all; no token here is that rare.
  EXPECT_EQ(sampler.candidates().size(), 3000U);
}

TEST(Sampler, MinPOneKeepsOnlyTheMostLikely) {
  Sampler sampler({.temperature = 1.0, .min_p = 1.0}, 5);
  sampler.sample(std::vector<float>{1, 2, 7, 6.99F, 7});
  ASSERT_EQ(sampler.candidates().size(), 2U);
  EXPECT_EQ(sampler.candidates()[0].token, 2);
  EXPECT_EQ(sampler.candidates()[1].token, 4);
}

TEST(Sampler, OneTokenIsAlwaysLeft) {
  for (double temperature : {0.0, 1.0}) {
    Sampler tiny({.temperature = temperature, .top_k = 5, .top_p = 0.0, .min_p = 1.0}, 1);
    EXPECT_EQ(tiny.sample(std::vector<float>{-123.0F}), 0);
    ASSERT_EQ(tiny.candidates().size(), 1U);
    EXPECT_EQ(tiny.candidates()[0].probability, 1.0);

    Sampler sampler({.temperature = temperature, .top_k = 3, .top_p = 0.5, .min_p = 0.5}, 4);
    EXPECT_EQ(sampler.sample(std::vector<float>{-kInf, -kInf, -1000.0F, -kInf}), 2);
    ASSERT_EQ(sampler.candidates().size(), 1U);
    EXPECT_FALSE(sampler.nothing_to_sample());
  }
}

TEST(Sampler, BrokenLogitsGiveTokenZeroAndSaySo) {
  for (double temperature : {0.0, 1.0}) {
    Sampler sampler({.temperature = temperature, .top_k = 2}, 3);
    EXPECT_EQ(sampler.sample(std::vector<float>{kNaN, kNaN, -kInf}), 0);
    EXPECT_TRUE(sampler.nothing_to_sample());
    EXPECT_EQ(sampler.sample(std::vector<float>{kNaN, 1.0F, -kInf}), 1);
    EXPECT_FALSE(sampler.nothing_to_sample());
  }
}

TEST(Sampler, PlusInfinitySharesTheProbability) {
  Sampler sampler({.temperature = 0.5}, 4);
  sampler.sample(std::vector<float>{kInf, 3.0F, kInf, -kInf});
  expect_same(as_map(sampler.candidates()), {{0, 0.5}, {2, 0.5}});
}

TEST(Sampler, ExtremeTemperaturesStayDefined) {
  const std::vector<float> logits{1.0F, 2.0F, 2.0F, -3e38F, 0.0F};
  Sampler cold({.temperature = 1e-308}, 5);
  cold.sample(logits);
  expect_same(as_map(cold.candidates()), {{1, 0.5}, {2, 0.5}});
  Sampler hot({.temperature = 1e300}, 5);
  hot.sample(logits);
  expect_same(as_map(hot.candidates()), {{0, 0.2}, {1, 0.2}, {2, 0.2}, {3, 0.2}, {4, 0.2}});
}

TEST(Sampler, SameSeedSameTextAndOneRandomNumberACall) {
  Random random(7);
  const SamplerOptions options{
      .temperature = 1.0, .top_k = 40, .repetition_penalty = 1.1, .seed = 2024};
  Sampler a(options, 300);
  Sampler b(options, 300);
  std::vector<float> certain(300, -kInf);
  certain[7] = 0.0F;
  std::vector<Token> text;
  for (int i = 0; i < 200; ++i) {
    const auto logits = random_logits(random, 300, 1.0);
    text.push_back(a.sample(logits));
    ASSERT_EQ(b.sample(logits), text.back());
    // A step with one survivor, or with none, takes a random number too: the two stay in step.
    ASSERT_EQ(a.sample(certain), 7);
    b.sample(i % 2 == 0 ? logits : std::vector<float>(300, kNaN));
    a.accept(text.back());
    b.accept(text.back());
  }
  EXPECT_GT(std::set<Token>(text.begin(), text.end()).size(), 50U);

  a.reset();  // as after construction
  Sampler fresh(options, 300);
  for (int i = 0; i < 50; ++i) {
    const auto logits = random_logits(random, 300, 1.0);
    ASSERT_EQ(a.sample(logits), fresh.sample(logits));
  }
}

TEST(Sampler, SavedSamplerContinuesBitForBit) {
  Random random(8);
  for (int window : {0, 1, 16}) {
    const SamplerOptions options{.temperature = 0.9,
                                 .top_p = 0.9,
                                 .repetition_penalty = 1.5,
                                 .repetition_window = window,
                                 .seed = 11};
    Sampler original(options, 50);
    for (int before : {0, 5, 40}) {
      for (int i = 0; i < before; ++i)
        original.accept(original.sample(random_logits(random, 50, 1.0)));
      ByteWriter writer;
      original.save(writer);
      Sampler copy(options, 50);
      copy.accept(3);
      copy.sample(random_logits(random, 50, 1.0));
      ByteReader reader(writer.bytes());
      copy.restore(reader);
      reader.expect_end();
      for (int i = 0; i < 100; ++i) {
        const auto logits = random_logits(random, 50, 1.0);
        const Token token = original.sample(logits);
        ASSERT_EQ(copy.sample(logits), token);
        original.accept(token);
        copy.accept(token);
      }
    }
  }
}

TEST(Sampler, RestoreRefusesDamageAndStaysAsItWas) {
  const SamplerOptions options{
      .temperature = 1.0, .repetition_penalty = 1.5, .repetition_window = 4, .seed = 3};
  Sampler saved(options, 20);
  for (Token token : {1, 2, 3}) saved.accept(token);
  ByteWriter writer;
  saved.save(writer);
  const std::vector<std::byte> good(writer.bytes().begin(), writer.bytes().end());

  Sampler sampler(
      {.temperature = 1.0, .repetition_penalty = 1.5, .repetition_window = 4, .seed = 77}, 20);
  sampler.accept(9);
  ByteWriter before;
  sampler.save(before);
  const auto refuses = [&](std::vector<std::byte> bytes, const std::string& field) {
    ByteReader reader(bytes, "state");
    try {
      sampler.restore(reader);
      ADD_FAILURE() << field << " accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kFormat);
      EXPECT_NE(error.detail().field.find(field), std::string::npos) << error.what();
    }
    ByteWriter after;
    sampler.save(after);
    EXPECT_TRUE(std::ranges::equal(before.bytes(), after.bytes()));
  };
  for (std::size_t size = 0; size < good.size(); ++size)
    refuses({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}, "sampler");
  const auto with_byte = [&](std::size_t index, int value) {
    auto bytes = good;
    bytes[index] = static_cast<std::byte>(value);
    return bytes;
  };
  auto zero_state = good;
  std::fill(zero_state.begin() + 8, zero_state.begin() + 40, std::byte{0});
  refuses(zero_state, "random state");
  refuses(with_byte(0, 5), "random state");  // count of state words
  refuses(with_byte(40, 5), "repetition_window");
  refuses(with_byte(48, 5), "history count");
  refuses(with_byte(56, 2), "history position");  // not after the last of three
  refuses(with_byte(64, 9), "sampler history");
}

TEST(Sampler, OptionsOutOfRangeAreNamed) {
  const auto refused = [](SamplerOptions options, const std::string& field,
                          const std::string& found) {
    try {
      Sampler sampler(options, 10);
      ADD_FAILURE() << field << " accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, field);
      EXPECT_EQ(error.detail().found, found);
      EXPECT_FALSE(error.detail().expected.empty());
    }
  };
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  refused({.temperature = -0.5}, "temperature", "-0.5");
  refused({.temperature = kNan}, "temperature", "nan");
  refused({.temperature = HUGE_VAL}, "temperature", "inf");
  refused({.top_k = -1}, "top_k", "-1");
  refused({.top_p = -1e-9}, "top_p", "-1e-09");
  refused({.top_p = 1.5}, "top_p", "1.5");
  refused({.top_p = kNan}, "top_p", "nan");
  refused({.min_p = 1.01}, "min_p", "1.01");
  refused({.repetition_penalty = 0.0}, "repetition_penalty", "0");
  refused({.repetition_penalty = HUGE_VAL}, "repetition_penalty", "inf");
  refused({.repetition_window = -1}, "repetition_window", "-1");
  refused({.repetition_window = 1 << 21}, "repetition_window", "2097152");
  for (std::int64_t size : {std::int64_t{0}, std::int64_t{-4}, std::int64_t{1} << 40})
    EXPECT_THROW(Sampler({}, size), Error);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
