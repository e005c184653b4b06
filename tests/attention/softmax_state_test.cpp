// SPDX-License-Identifier: MIT
#include "sluice/attention/softmax_state.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/core/view.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::HeadsView;
using sluice::kEmptyLse;
using sluice::SoftmaxState;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Partial {
  std::vector<float> out;  // [dim]
  float lse = kEmptyLse;
};

/// The oracle: softmax over keys [first, last), with a sink's e^sink in the denominator if it is
/// not minus infinity, in double and without subtracting a maximum. lse is without the sink.
Partial attend(const std::vector<float>& scores, const std::vector<std::vector<float>>& values,
               std::size_t first, std::size_t last, double sink = -INFINITY) {
  double keys = 0;
  for (std::size_t i = first; i < last; ++i) keys += std::exp(static_cast<double>(scores[i]));
  Partial result;
  for (std::size_t d = 0; d < values.front().size(); ++d) {
    double sum = 0;
    for (std::size_t i = first; i < last; ++i)
      sum += std::exp(static_cast<double>(scores[i])) * values[i][d] / (keys + std::exp(sink));
    result.out.push_back(static_cast<float>(sum));
  }
  result.lse = static_cast<float>(std::log(keys));
  return result;
}

Partial merged(const Partial& a, const Partial& b) {
  Partial result;
  result.out.resize(a.out.size());
  sluice::merge(a.out.data(), a.lse, b.out.data(), b.lse, static_cast<std::int64_t>(a.out.size()),
                result.out.data(), &result.lse);
  return result;
}

Partial with_sink(Partial partial, float sink) {
  sluice::apply_sink_logit(partial.out.data(), static_cast<std::int64_t>(partial.out.size()),
                           partial.lse, sink);
  return partial;
}

void expect_near(const std::vector<float>& actual, const std::vector<float>& expected,
                 double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    EXPECT_NEAR(actual[i], expected[i], tolerance) << "element " << i;
}

// The typed-in example: expected values come from the formulas, by other means, with six decimals.
const std::vector<float> kScores{1, 2, 0.5F};
const std::vector<std::vector<float>> kValues{{1, 0}, {0, 1}, {1, 1}};

SoftmaxState state_of(const std::vector<float>& scores) {
  SoftmaxState state;
  for (const float score : scores) {
    state.raise_max(score);
    state.sum += state.weight(score);
  }
  return state;
}

TEST(SoftmaxState, TypedInExample) {
  SoftmaxState a = state_of({1, 2});
  const SoftmaxState b = state_of({0.5F});
  EXPECT_EQ(a.max, 2);
  EXPECT_NEAR(a.sum, 1.367879, 1e-6);
  EXPECT_EQ(b.max, 0.5F);
  EXPECT_EQ(b.sum, 1);
  a.merge(b);
  EXPECT_NEAR(a.lse(), 2.464369, 1e-6);
}

TEST(SoftmaxState, EmptyIsNeutralAndMaskedScoresAddNothing) {
  SoftmaxState empty;
  EXPECT_TRUE(empty.empty());
  EXPECT_EQ(empty.lse(), kEmptyLse);
  EXPECT_EQ(empty.weight(kEmptyLse), 0);
  EXPECT_EQ(empty.raise_max(kEmptyLse), 1);
  EXPECT_EQ(empty.sum, 0);
  empty.merge(SoftmaxState{});
  EXPECT_TRUE(empty.empty());
  EXPECT_EQ(empty.sum, 0);

  const SoftmaxState some = state_of({-3, kEmptyLse, 4});
  EXPECT_FALSE(some.empty());
  SoftmaxState left = some;
  left.merge(SoftmaxState{});
  SoftmaxState right;
  right.merge(some);
  for (const SoftmaxState& state : {left, right}) {
    EXPECT_EQ(state.max, some.max);
    EXPECT_EQ(state.sum, some.sum);
  }
}

TEST(SoftmaxState, RaisingTheMaximumSaysHowToRescale) {
  SoftmaxState state;
  EXPECT_EQ(state.raise_max(1), 0);  // was empty
  state.sum += state.weight(1);
  EXPECT_EQ(state.raise_max(0), 1);  // stays
  EXPECT_NEAR(state.raise_max(3), std::exp(-2.0), 1e-7);
  EXPECT_NEAR(state.sum, std::exp(-2.0), 1e-7);
  EXPECT_NEAR(state.lse(), 1, 1e-6);
}

TEST(SoftmaxState, LargeScoresNeitherOverflowNorVanish) {
  for (const float shift : {1e4F, -1e4F}) {
    SoftmaxState state = state_of({shift + 1, shift + 2});
    state.merge(state_of({shift + 0.5F}));
    EXPECT_NEAR(state.lse() - shift, 2.464369, 1e-3);  // floats near 1e4 are 1e-3 apart
  }
}

TEST(Merge, TypedInExample) {
  const Partial a{{0.268941F, 0.731059F}, 2 + std::log(1.367879F)};
  const Partial b{{1, 1}, 0.5F};
  const Partial both = merged(a, b);
  expect_near(both.out, {0.371468F, 0.768776F}, 1e-6);
  EXPECT_NEAR(both.lse, 2.464369, 1e-6);
  const Partial single = attend(kScores, kValues, 0, 3);
  expect_near(both.out, single.out, 1e-6);
  EXPECT_NEAR(both.lse, single.lse, 1e-6);
}

TEST(Merge, EmptySetsAreNeutralBitForBit) {
  const Partial some = attend(kScores, kValues, 0, 2);
  const Partial nothing{{0, 0}, kEmptyLse};
  for (const Partial& result : {merged(some, nothing), merged(nothing, some)}) {
    EXPECT_EQ(result.out, some.out);
    EXPECT_EQ(result.lse, some.lse);
  }
  const Partial none = merged(nothing, nothing);
  EXPECT_EQ(none.out, (std::vector<float>{0, 0}));
  EXPECT_EQ(none.lse, kEmptyLse);
}

TEST(Merge, DoesNotReadTheOutputOfAnEmptySet) {
  const Partial some = attend(kScores, kValues, 0, 2);
  const Partial unwritten{{kNan, kNan}, kEmptyLse};
  EXPECT_EQ(merged(some, unwritten).out, some.out);
  EXPECT_EQ(merged(unwritten, some).out, some.out);
  EXPECT_EQ(merged(unwritten, unwritten).out, (std::vector<float>{0, 0}));
}

TEST(Merge, MayWriteOverEitherInput) {
  const Partial a = attend(kScores, kValues, 0, 2);
  const Partial b = attend(kScores, kValues, 2, 3);
  const Partial expected = merged(a, b);
  Partial over_a = a;
  sluice::merge(over_a.out.data(), over_a.lse, b.out.data(), b.lse, 2, over_a.out.data(),
                &over_a.lse);
  Partial over_b = b;
  sluice::merge(a.out.data(), a.lse, over_b.out.data(), over_b.lse, 2, over_b.out.data(),
                &over_b.lse);
  for (const Partial& result : {over_a, over_b}) {
    EXPECT_EQ(result.out, expected.out);
    EXPECT_EQ(result.lse, expected.lse);
  }
}

TEST(Merge, AFarSmallerSetVanishesWithoutNan) {
  const Partial big{{1, 2}, 80};
  const Partial small{{-5, 7}, -90};
  const Partial result = merged(small, big);
  EXPECT_EQ(result.out, big.out);
  EXPECT_EQ(result.lse, big.lse);
}

// Any cutting of 200 keys into parts, empty ones included, folded in a random order, equals the
// single pass. Bound: up to 41 merges of outputs below 4, each rounding a few times by 6e-8.
TEST(Merge, RandomSplitsEqualTheSinglePass) {
  constexpr std::size_t kKeys = 200;
  constexpr std::size_t kDim = 5;
  sluice::Random random(1);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<float> scores(kKeys);
    for (float& score : scores) score = static_cast<float>(6 * random.normal());
    std::vector<std::vector<float>> values(kKeys, std::vector<float>(kDim));
    for (auto& value : values)
      for (float& element : value) element = static_cast<float>(random.normal());

    std::vector<std::size_t> cuts{0, kKeys};
    const std::uint64_t num_cuts = random.below(41);
    for (std::uint64_t i = 0; i < num_cuts; ++i)
      cuts.push_back(static_cast<std::size_t>(random.below(kKeys + 1)));
    std::sort(cuts.begin(), cuts.end());
    std::vector<Partial> parts;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i)
      parts.push_back(cuts[i] == cuts[i + 1] ? Partial{std::vector<float>(kDim, 0.0F), kEmptyLse}
                                             : attend(scores, values, cuts[i], cuts[i + 1]));
    while (parts.size() > 1) {
      const auto first = static_cast<std::size_t>(random.below(parts.size() - 1));
      parts[first] = merged(parts[first], parts.back());
      parts.pop_back();
    }
    const Partial single = attend(scores, values, 0, kKeys);
    expect_near(parts.front().out, single.out, 1e-5);
    EXPECT_NEAR(parts.front().lse, single.lse, 1e-5);
  }
}

TEST(MergePartials, MergesEveryRowByItsOwnLseAndStride) {
  constexpr std::int64_t kTokens = 3;
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kDim = 2;
  constexpr std::int64_t kStride = 7;  // elements between tokens of `out`, more than 2 * 2
  sluice::Random random(2);
  std::vector<float> out(kTokens * kStride);
  for (float& value : out) value = static_cast<float>(random.normal());
  std::vector<float> other(kTokens * kHeads * kDim);
  for (float& value : other) value = static_cast<float>(random.normal());
  std::vector<float> lse{0, 1, kEmptyLse, -2, 3, kEmptyLse};             // [tokens, heads]
  const std::vector<float> other_lse{1, kEmptyLse, 2, 5, 3, kEmptyLse};  // [tokens, heads]
  const std::vector<float> out_before = out;
  const std::vector<float> lse_before = lse;
  sluice::merge_partials(HeadsView<float>(out.data(), kTokens, kHeads, kDim, kStride), lse.data(),
                         HeadsView<const float>(other.data(), kTokens, kHeads, kDim),
                         other_lse.data());
  for (std::int64_t token = 0; token < kTokens; ++token) {
    for (std::int64_t head = 0; head < kHeads; ++head) {
      const std::int64_t row = token * kHeads + head;
      const auto at = static_cast<std::size_t>(row);
      const auto begin = out_before.begin() + token * kStride + head * kDim;
      const auto other_begin = other.begin() + row * kDim;
      const Partial expected = merged({{begin, begin + kDim}, lse_before[at]},
                                      {{other_begin, other_begin + kDim}, other_lse[at]});
      const auto result = out.begin() + token * kStride + head * kDim;
      EXPECT_EQ(std::vector<float>(result, result + kDim), expected.out);
      EXPECT_EQ(lse[at], expected.lse);
    }
    for (std::int64_t i = token * kStride + kHeads * kDim; i < (token + 1) * kStride; ++i)
      EXPECT_EQ(out[static_cast<std::size_t>(i)], out_before[static_cast<std::size_t>(i)]);
  }
}

TEST(SinkLogit, TypedInExample) {
  const Partial plain = attend(kScores, kValues, 0, 3);
  expect_near(with_sink(plain, 1.5F).out, {0.268941F, 0.556591F}, 1e-6);
  // Weights are outputs for unit values; their sum is sigmoid(lse - sink).
  const std::vector<std::vector<float>> unit{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  const Partial weights = with_sink(attend(kScores, unit, 0, 3), 1.5F);
  expect_near(weights.out, {0.167405F, 0.455054F, 0.101536F}, 1e-6);
  EXPECT_NEAR(weights.out[0] + weights.out[1] + weights.out[2], 0.723996, 1e-6);
}

TEST(SinkLogit, ZeroIsSoftmaxOffByOne) {
  const std::vector<std::vector<float>> unit{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}};
  expect_near(with_sink(attend(kScores, unit, 0, 3), 0).out, {0.213097F, 0.579259F, 0.129250F},
              1e-6);
  expect_near(with_sink(attend(kScores, kValues, 0, 3), 0).out, {0.342347F, 0.708509F}, 1e-6);
}

TEST(SinkLogit, CountsOnceHoweverTheKeysAreSplit) {
  const Partial a = attend(kScores, kValues, 0, 2);
  const Partial b = attend(kScores, kValues, 2, 3);
  expect_near(with_sink(merged(a, b), 1.5F).out, {0.268941F, 0.556591F}, 1e-6);
  // The contrast: each part with a sink of its own. Its lse must then hold the sink for the parts
  // to merge at all.
  const auto own_sink = [](const Partial& part) {
    Partial result = with_sink(part, 1.5F);
    result.lse = std::log(std::exp(part.lse) + std::exp(1.5F));
    return result;
  };
  expect_near(merged(own_sink(a), own_sink(b)).out, {0.210768F, 0.436198F}, 1e-6);
}

TEST(SinkLogit, RandomSinksEqualTheSinglePass) {
  sluice::Random random(3);
  for (int trial = 0; trial < 100; ++trial) {
    std::vector<float> scores(20);
    for (float& score : scores) score = static_cast<float>(3 * random.normal());
    std::vector<std::vector<float>> values(20, std::vector<float>(4));
    for (auto& value : values)
      for (float& element : value) element = static_cast<float>(random.normal());
    const auto sink = static_cast<float>(5 * random.normal());
    const Partial expected = attend(scores, values, 0, 20, sink);
    expect_near(with_sink(attend(scores, values, 0, 20), sink).out, expected.out, 2e-6);
  }
}

TEST(SinkLogit, ExtremesAndEmptyRows) {
  const Partial plain = attend(kScores, kValues, 0, 3);
  EXPECT_EQ(with_sink(plain, -INFINITY).out, plain.out);
  EXPECT_EQ(with_sink(plain, 1e4F).out, (std::vector<float>{0, 0}));
  for (const float sink : {0.0F, 1.5F, -INFINITY}) {
    EXPECT_EQ(with_sink({{0, 0}, kEmptyLse}, sink).out, (std::vector<float>{0, 0}));
    EXPECT_EQ(with_sink({{kNan, kNan}, kEmptyLse}, sink).out, (std::vector<float>{0, 0}));
  }
}

TEST(SinkLogit, EachQueryHeadHasItsOwn) {
  const Partial plain = attend(kScores, kValues, 0, 3);
  const std::vector<float> sinks{1.5F, 0};
  std::vector<float> out;  // [2 tokens, 2 heads, 2]
  for (int row = 0; row < 4; ++row) out.insert(out.end(), plain.out.begin(), plain.out.end());
  const std::vector<float> lse{plain.lse, plain.lse, kEmptyLse, plain.lse};  // [2 tokens, 2 heads]
  sluice::apply_sink_logits(HeadsView<float>(out.data(), 2, 2, 2), lse.data(), sinks);
  expect_near(out, {0.268941F, 0.556591F, 0.342347F, 0.708509F, 0, 0, 0.342347F, 0.708509F}, 1e-6);
}

}  // namespace SLUICE_TEST_UNIT
