// SPDX-License-Identifier: MIT
#include "sluice/position/rotary.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstdint>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/position.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::bf16;
using sluice::f16;
using sluice::HeadsView;
using sluice::LinearScaling;
using sluice::Llama3Scaling;
using sluice::NtkScaling;
using sluice::Position;
using sluice::Position3;
using sluice::Rotary;
using sluice::RotaryConfig;
using sluice::RotaryPairing;
using sluice::RotaryTable;
using sluice::YarnScaling;

constexpr auto kPairings = {RotaryPairing::kHalfSplit, RotaryPairing::kInterleaved};

RotaryConfig plain(int head_dim, int rotary_dim, double theta = 10000,
                   RotaryPairing pairing = RotaryPairing::kHalfSplit) {
  RotaryConfig config;
  config.head_dim = head_dim;
  config.rotary_dim = rotary_dim;
  config.theta = theta;
  config.pairing = pairing;
  return config;
}

std::vector<float> rotated(const Rotary& rotary, Position3 position, const std::vector<float>& x) {
  std::vector<float> cos_sin(static_cast<std::size_t>(rotary.row_size()));
  std::vector<float> y(x.size());
  rotary.angles(position, cos_sin.data());
  rotary.rotate(cos_sin.data(), x.data(), y.data());
  return y;
}

std::vector<float> rotated(const Rotary& rotary, Position position, const std::vector<float>& x) {
  return rotated(rotary, sluice::on_all_axes(position), x);
}

std::vector<float> random_vector(std::size_t size, std::uint64_t seed) {
  sluice::Random random(seed);
  std::vector<float> values(size);
  for (float& value : values) value = static_cast<float>(random.normal());
  return values;
}

void expect_near(const std::vector<float>& actual, const std::vector<float>& expected,
                 double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    EXPECT_NEAR(actual[i], expected[i], tolerance) << "element " << i;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

/// The oracle: pair (a, b) as the complex number a + ib times e^(i p f), in long double.
std::vector<float> rotated_as_complex(const RotaryConfig& config, Position3 position,
                                      const std::vector<float>& x) {
  using Real = long double;
  std::vector<float> y = x;
  const int half = config.rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const bool halves = config.pairing == RotaryPairing::kHalfSplit;
    const auto first = static_cast<std::size_t>(halves ? i : 2 * i);
    const auto second = static_cast<std::size_t>(halves ? i + half : 2 * i + 1);
    const int axis = config.sections[0] + config.sections[1] + config.sections[2] == 0 ? 0
                     : i < config.sections[0]                                          ? 0
                     : i < config.sections[0] + config.sections[1]                     ? 1
                                                                                       : 2;
    const Real p = axis == 0 ? position.t : axis == 1 ? position.h : position.w;
    const Real f = std::pow(static_cast<Real>(config.theta),
                            -2 * static_cast<Real>(i) / static_cast<Real>(config.rotary_dim));
    const std::complex<Real> turned =
        std::complex<Real>(x[first], x[second]) * std::polar<Real>(1, p * f);
    y[first] = static_cast<float>(turned.real());
    y[second] = static_cast<float>(turned.imag());
  }
  return y;
}

// Typed-in values here come from the formulas, by other means, with six decimals: 1e-6 is one unit
// of the last.
TEST(Rotary, TypedInExample) {
  const Rotary rotary(plain(4, 4));
  const std::vector<float> k{1, 2, 3, 4};
  EXPECT_DOUBLE_EQ(rotary.frequency(0), 1);
  EXPECT_DOUBLE_EQ(rotary.frequency(1), 0.01);
  const std::vector<float> at_3{-1.413353F, 1.879118F, -2.828857F, 4.058191F};
  const std::vector<float> at_5{3.160435F, 1.797584F, -0.107938F, 4.094959F};
  expect_near(rotated(rotary, 3, k), at_3, 1e-6);
  expect_near(rotated(rotary, 5, k), at_5, 1e-6);
  expect_near(rotated(rotary, -2, rotated(rotary, 5, k)), rotated(rotary, 3, k), 1e-6);
}

TEST(Rotary, TypedInPartialExample) {
  const Rotary rotary(plain(4, 2));
  expect_near(rotated(rotary, 1, {1, 2, 3, 4}), {-1.142640F, 1.922076F, 3, 4}, 1e-6);
}

// Three sections of one pair each; values as above.
TEST(Rotary, TypedInThreeAxesExample) {
  RotaryConfig config = plain(6, 6);
  config.sections = {1, 1, 1};
  const Rotary rotary(config);
  EXPECT_NEAR(rotary.frequency(1), 0.04641589, 5e-9);
  EXPECT_NEAR(rotary.frequency(2), 0.00215443, 5e-9);
  expect_near(rotated(rotary, Position3{2, 1, 3}, {1, 2, 3, 4, 5, 6}),
              {-4.053337F, 1.765850F, 2.961158F, -0.755290F, 5.087413F, 6.019264F}, 1e-6);
}

// A cache of tokens 0, 2, 3 read by token 4: the score of the sink depends on the rule, the others'
// do not.
TEST(Rotary, TypedInScoresInCacheAndInText) {
  const Rotary rotary(plain(2, 2));
  const std::vector<std::vector<float>> keys{{1, 0}, {0, 1}, {1, 1}, {1, -1}};
  const std::vector<float> query{1, 0.5F};
  const auto scores = [&](const std::vector<double>& positions) {
    std::vector<float> result;
    const std::vector<float> q = rotated(rotary, positions.back(), query);
    for (std::size_t key = 0; key < keys.size(); ++key)
      result.push_back(
          static_cast<float>(dot(q, rotated(rotary, positions[key], keys[key])) / std::sqrt(2.0)));
    return result;
  };
  const std::vector<float> in_cache = scores({0, 1, 2, 3});
  const std::vector<float> in_text = scores({0, 2, 3, 4});
  const std::vector<float> sink_moved = scores({1, 2, 3, 4});
  expect_near(in_cache, {-0.749924F, 0.495840F, 0.870582F, 0.353553F}, 1e-6);
  expect_near(in_text, {-0.194626F, 0.495840F, 0.870582F, 0.353553F}, 1e-6);
  expect_near(sink_moved, in_cache, 1e-6);
}

// Sizes below, at and beside the vector block, with and without pass-through, both pairings, real
// and negative positions. Bound: elements below 5, a few float roundings of 6e-8 each.
TEST(Rotary, EqualsComplexMultiplication) {
  const std::vector<std::array<int, 2>> dims{{2, 2},   {6, 4},   {30, 30}, {32, 32},
                                             {34, 34}, {80, 20}, {64, 64}, {96, 70}};
  for (const RotaryPairing pairing : kPairings) {
    for (const auto& [head_dim, rotary_dim] : dims) {
      const RotaryConfig config = plain(head_dim, rotary_dim, 10000, pairing);
      const Rotary rotary(config);
      const std::vector<float> x = random_vector(static_cast<std::size_t>(head_dim), 1);
      for (const double position : {0.0, 0.5, 5.5, -3.0, 1023.0, 1e6 + 0.5, 1e8}) {
        SCOPED_TRACE(testing::Message() << to_string(pairing) << " " << rotary_dim << " of "
                                        << head_dim << " at " << position);
        const Position3 everywhere = sluice::on_all_axes(position);
        expect_near(rotated(rotary, position, x), rotated_as_complex(config, everywhere, x), 2e-6);
      }
    }
  }
}

TEST(Rotary, InPlaceAndByHeadsEqualOneHeadAtATime) {
  for (const RotaryPairing pairing : kPairings) {
    const Rotary rotary(plain(40, 36, 10000, pairing));
    const std::vector<float> x = random_vector(3 * 40, 2);
    std::vector<float> cos_sin(static_cast<std::size_t>(rotary.row_size()));
    rotary.angles(17.5, cos_sin.data());
    std::vector<float> by_head(x.size());
    for (std::size_t head = 0; head < 3; ++head)
      rotary.rotate(cos_sin.data(), x.data() + 40 * head, by_head.data() + 40 * head);
    std::vector<float> heads(x.size());
    rotary.rotate_heads(cos_sin.data(), x.data(), 3, heads.data());
    std::vector<float> in_place = x;
    rotary.rotate_heads(cos_sin.data(), in_place.data(), 3, in_place.data());
    EXPECT_EQ(heads, by_head);
    EXPECT_EQ(in_place, by_head);
  }
}

TEST(Rotary, TokensUseTheirOwnRowsAndStrides) {
  constexpr std::int64_t kTokens = 3;
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kDim = 8;
  constexpr std::int64_t kStride = 21;  // elements between tokens, more than 2 * 8
  const Rotary rotary(plain(kDim, kDim));
  RotaryTable table(rotary, kTokens);
  table.fill_run(2.5, kTokens);
  std::vector<float> x = random_vector(kTokens * kStride, 3);
  const std::vector<float> before = x;
  std::vector<float> packed(kTokens * kHeads * kDim);
  rotary.rotate_tokens(table.rows(),
                       HeadsView<const float>(x.data(), kTokens, kHeads, kDim, kStride),
                       HeadsView<float>(packed.data(), kTokens, kHeads, kDim));
  rotary.rotate_tokens(table.rows(), HeadsView<float>(x.data(), kTokens, kHeads, kDim, kStride));
  for (std::int64_t token = 0; token < kTokens; ++token) {
    for (std::int64_t head = 0; head < kHeads; ++head) {
      const auto begin = before.begin() + token * kStride + head * kDim;
      const std::vector<float> expected =
          rotated(rotary, 2.5 + static_cast<double>(token), {begin, begin + kDim});
      const auto strided = x.begin() + token * kStride + head * kDim;
      const auto dense = packed.begin() + (token * kHeads + head) * kDim;
      EXPECT_EQ(std::vector<float>(strided, strided + kDim), expected);
      EXPECT_EQ(std::vector<float>(dense, dense + kDim), expected);
    }
    for (std::int64_t i = token * kStride + kHeads * kDim; i < (token + 1) * kStride; ++i)
      EXPECT_EQ(x[static_cast<std::size_t>(i)], before[static_cast<std::size_t>(i)]) << "padding";
  }
}

// R(p)R(s) = R(p + s), and the inverse. Bound: two rotations of elements below 5.
TEST(Rotary, RotationsAdd) {
  for (const RotaryPairing pairing : kPairings) {
    const Rotary rotary(plain(64, 64, 10000, pairing));
    const std::vector<float> x = random_vector(64, 4);
    expect_near(rotated(rotary, 3.5, rotated(rotary, 1000, x)), rotated(rotary, 1003.5, x), 2e-6);
    expect_near(rotated(rotary, -1e6, rotated(rotary, 1e6, x)), x, 2e-6);
  }
}

TEST(Rotary, ThreeAxesEqualOneForText) {
  RotaryConfig config = plain(128, 128, 1000000);
  const Rotary one(config);
  config.sections = {16, 24, 24};  // Qwen2.5-VL
  const Rotary three(config);
  EXPECT_FALSE(one.has_three_axes());
  EXPECT_TRUE(three.has_three_axes());
  const std::vector<float> x = random_vector(128, 5);
  for (const double position : {0.0, 7.0, 5.5, 123456.0}) {
    EXPECT_EQ(rotated(three, Position3{position, position, position}, x),
              rotated(one, position, x));
    EXPECT_EQ(rotated(three, position, x), rotated(one, position, x));
  }
}

TEST(Rotary, ThreeAxesEqualTheOracle) {
  RotaryConfig config = plain(128, 128, 1000000);
  for (const std::array<int, 3>& sections :
       {std::array{16, 24, 24}, std::array{64, 0, 0}, std::array{0, 1, 63}}) {
    config.sections = sections;
    const Rotary rotary(config);
    const std::vector<float> x = random_vector(128, 6);
    const Position3 position{12.5, 1e6, 3};
    expect_near(rotated(rotary, position, x), rotated_as_complex(config, position, x), 2e-6);
  }
}

/// Cosine and sine of every pair with angles formed in float, as the public references do.
std::vector<float> float_angles(const Rotary& rotary, float position) {
  const auto pairs = static_cast<std::size_t>(rotary.num_pairs());
  std::vector<float> row(2 * pairs);
  for (std::size_t i = 0; i < pairs; ++i) {
    const float angle = position * static_cast<float>(rotary.frequency(static_cast<int>(i)));
    row[i] = std::cos(angle);
    row[pairs + i] = std::sin(angle);
  }
  return row;
}

// Bound: half a float ulp of a cosine (3e-8), 1e8 * 2^-53 for the product (1.1e-8), and the same
// order for the frequency's own rounding.
TEST(Rotary, AnglesAreExactAtLatePositions) {
  const RotaryConfig config = plain(128, 128);
  const Rotary rotary(config);
  std::vector<float> row(128);
  double worst_double = 0;
  double worst_float = 0;
  for (const double position : {1e3, 1e6, 1e8 - 1, 1e8, 1e8 + 0.5}) {
    rotary.angles(position, row.data());
    const std::vector<float> contrast = float_angles(rotary, static_cast<float>(position));
    for (int i = 0; i < 64; ++i) {
      const long double angle =
          static_cast<long double>(position) * std::pow(10000.0L, -2.0L * i / 128);
      const auto exact = [&](std::size_t at, long double value) {
        worst_double = std::max(worst_double, static_cast<double>(std::abs(row[at] - value)));
        worst_float = std::max(worst_float, static_cast<double>(std::abs(contrast[at] - value)));
      };
      exact(static_cast<std::size_t>(i), std::cos(angle));
      exact(static_cast<std::size_t>(64 + i), std::sin(angle));
    }
  }
  EXPECT_LT(worst_double, 1e-7);
  EXPECT_GT(worst_float, 1.0);  // the contrast: such cosines are noise
}

// A stream must score the same at any place: query at p, key at p - 7, unit vectors. Bound: each
// of 64 products is off by a few 6e-8 of itself, and they sum to at most 1.
TEST(Rotary, ScoresDependOnDifferencesOnly) {
  const Rotary rotary(plain(64, 64));
  std::vector<float> query = random_vector(64, 7);
  std::vector<float> key = random_vector(64, 8);
  for (std::vector<float>* vector : {&query, &key}) {
    const auto norm = static_cast<float>(std::sqrt(dot(*vector, *vector)));
    for (float& value : *vector) value /= norm;
  }
  const auto score = [&](double position) {
    return dot(rotated(rotary, position, query), rotated(rotary, position - 7, key));
  };
  const auto float_score = [&](float position) {
    std::vector<float> q(64);
    std::vector<float> k(64);
    rotary.rotate(float_angles(rotary, position).data(), query.data(), q.data());
    rotary.rotate(float_angles(rotary, position - 7).data(), key.data(), k.data());
    return dot(q, k);
  };
  const double reference = score(7);
  for (const double start : {1e3, 1e3 + 0.5, 1e6, 1e8, 1e8 + 0.5}) {
    double worst = 0;
    double worst_float = 0;
    for (int i = 0; i < 32; ++i) {
      const double position = start + i;
      worst = std::max(worst, std::abs(score(position) - reference));
      worst_float =
          std::max(worst_float, std::abs(float_score(static_cast<float>(position)) - reference));
    }
    EXPECT_LT(worst, 1e-7) << start;
    // The contrast, at positions that a real stream reaches.
    if (start >= 1e6) {
      EXPECT_GT(worst_float, start >= 1e8 ? 1e-2 : 1e-4) << start;
    }
  }
}

TEST(Rotary, AttentionFactorIsAppliedOnceAndNotByPureAngles) {
  RotaryConfig config = plain(64, 64, 150000);
  const Rotary unscaled(config);
  YarnScaling yarn;
  yarn.factor = 32;
  yarn.truncate = false;
  config.scaling = yarn;
  const Rotary rotary(config);  // gpt-oss
  EXPECT_NEAR(rotary.attention_factor(), 1.346574, 5e-7);
  EXPECT_EQ(unscaled.attention_factor(), 1);
  std::vector<float> with(64);
  std::vector<float> without(64);
  rotary.angles(1234.5, with.data());
  rotary.pure_angles(1234.5, without.data());
  for (std::size_t i = 0; i < 32; ++i) {
    EXPECT_NEAR(std::hypot(with[i], with[32 + i]), 1.346574, 1e-6);
    EXPECT_NEAR(std::hypot(without[i], without[32 + i]), 1, 1e-6);
  }
  // A delta rotation of a key that carries the factor leaves exactly one factor on it.
  const std::vector<float> key = random_vector(64, 9);
  std::vector<float> moved = rotated(rotary, 100, key);
  rotary.rotate_by(-58.0, moved.data(), 1);
  expect_near(moved, rotated(rotary, 42, key), 3e-6);
}

template <class T>
class RotaryElementTest : public testing::Test {
 protected:
  /// Distance to the next value near 4, relative: what one rounding may cost twice over.
  static constexpr double kEpsilon = std::is_same_v<T, float> ? 0x1p-23
                                     : std::is_same_v<T, f16> ? 0x1p-10
                                                              : 0x1p-7;
};
using Elements = testing::Types<float, f16, bf16>;
TYPED_TEST_SUITE(RotaryElementTest, Elements);

// One rounding: as near to the double result as the element type can be (half an ulp), plus float
// arithmetic on elements below 5.
TYPED_TEST(RotaryElementTest, DeltaRotationRoundsOnce) {
  for (const RotaryPairing pairing : kPairings) {
    const RotaryConfig config = plain(48, 40, 10000, pairing);
    const Rotary rotary(config);
    const std::vector<float> raw = random_vector(2 * 3 * 48, 10);
    std::vector<TypeParam> keys(raw.size());
    std::vector<float> stored(raw.size());
    for (std::size_t i = 0; i < raw.size(); ++i) {
      keys[i] = static_cast<TypeParam>(raw[i]);
      stored[i] = static_cast<float>(keys[i]);
    }
    rotary.rotate_by(-2000.5, HeadsView<TypeParam>(keys.data(), 2, 3, 48));
    for (std::size_t head = 0; head < 6; ++head) {
      const auto begin = stored.begin() + static_cast<std::ptrdiff_t>(48 * head);
      const std::vector<float> expected =
          rotated_as_complex(config, sluice::on_all_axes(-2000.5), {begin, begin + 48});
      for (std::size_t i = 0; i < 48; ++i) {
        const float actual = static_cast<float>(keys[48 * head + i]);
        const double bound = i >= 40 ? 0 : 0.5 * this->kEpsilon * std::abs(expected[i]) + 1e-6;
        EXPECT_NEAR(actual, expected[i], bound) << head << " " << i;
      }
    }
  }
}

TYPED_TEST(RotaryElementTest, ReadsAndWritesAnyElementType) {
  const Rotary rotary(plain(20, 12));
  const std::vector<float> x = random_vector(20, 11);
  std::vector<TypeParam> stored(20);
  for (std::size_t i = 0; i < 20; ++i) stored[i] = static_cast<TypeParam>(x[i]);
  std::vector<float> widened(20);
  for (std::size_t i = 0; i < 20; ++i) widened[i] = static_cast<float>(stored[i]);
  std::vector<float> row(12);
  rotary.angles(9, row.data());

  std::vector<float> from_stored(20);  // raw keys, rotated when read
  rotary.rotate(row.data(), stored.data(), from_stored.data());
  EXPECT_EQ(from_stored, rotated(rotary, 9, widened));

  std::vector<TypeParam> to_stored(20);  // float keys, rotated when written
  rotary.rotate(row.data(), x.data(), to_stored.data());
  const std::vector<float> expected = rotated(rotary, 9, x);
  for (std::size_t i = 0; i < 20; ++i)
    EXPECT_EQ(static_cast<float>(to_stored[i]),
              static_cast<float>(static_cast<TypeParam>(expected[i])));
}

TEST(Rotary, DeltaRotationOnThreeAxes) {
  RotaryConfig config = plain(24, 24);
  config.sections = {4, 4, 4};
  const Rotary rotary(config);
  const std::vector<float> key = random_vector(24, 12);
  std::vector<float> moved = rotated(rotary, Position3{10, 20, 30}, key);
  rotary.rotate_by(Position3{-3, 0, 0.5}, HeadsView<float>(moved.data(), 1, 1, 24));
  expect_near(moved, rotated(rotary, Position3{7, 20, 30.5}, key), 2e-6);
}

// Why stored keys are moved at most once: a thousand steps by one each round a float16 key a
// thousand times, one step by a thousand rounds it once.
TEST(Rotary, RepeatedRotationOfRoundedKeysDrifts) {
  const Rotary rotary(plain(64, 64));
  const std::vector<float> raw = random_vector(64, 13);
  const std::vector<float> at_1000 = rotated(rotary, 1000, raw);
  std::vector<f16> once(64);
  for (std::size_t i = 0; i < 64; ++i) once[i] = static_cast<f16>(at_1000[i]);
  std::vector<f16> repeated = once;
  rotary.rotate_by(-1000.0, once.data(), 1);
  for (int step = 0; step < 1000; ++step) rotary.rotate_by(-1.0, repeated.data(), 1);
  const auto error = [&](const std::vector<f16>& keys) {
    double sum = 0;
    for (std::size_t i = 0; i < 64; ++i)
      sum += std::pow(static_cast<double>(static_cast<float>(keys[i])) - raw[i], 2);
    return std::sqrt(sum / dot(raw, raw));
  };
  EXPECT_LT(error(once), 0x1p-11);  // two roundings of relative size 2^-11 at most, mostly less
  EXPECT_GT(error(repeated), 10 * error(once));
}

TEST(Rotary, FrequencyFactorsDivide) {
  RotaryConfig config = plain(8, 8);
  const Rotary unscaled(config);
  config.frequency_factors = {1, 2, 8, 0.5F};
  const Rotary rotary(config);
  for (int i = 0; i < 4; ++i)
    EXPECT_DOUBLE_EQ(
        rotary.frequency(i),
        unscaled.frequency(i) /
            static_cast<double>(config.frequency_factors[static_cast<std::size_t>(i)]));
}

/// One case of tests/data/rotary/goldens.txt; its format is in tests/oracle/make_rotary_goldens.py.
struct Golden {
  std::string name;
  RotaryConfig config;
  double attention_factor = 0;
  std::vector<double> frequencies;        // [R/2], the released code in float64
  std::vector<double> float_frequencies;  // [R/2], as released
};

std::vector<Golden> read_goldens() {
  std::ifstream file(SLUICE_TEST_DATA "/rotary/goldens.txt");
  EXPECT_TRUE(file) << "no " SLUICE_TEST_DATA "/rotary/goldens.txt";
  std::vector<Golden> goldens;
  std::string line;
  std::string word;
  while (std::getline(file, line)) {
    if (line.empty() || line.front() == '#') continue;
    Golden golden;
    RotaryConfig& config = golden.config;
    std::istringstream header(line);
    std::string scaling;
    header >> word >> golden.name >> config.head_dim >> config.rotary_dim >> config.theta >>
        scaling;
    std::vector<double> option;
    for (double value = 0; header >> value;) option.push_back(value);
    if (scaling == "linear") {
      config.scaling = LinearScaling{option.at(0)};
    } else if (scaling == "ntk") {
      config.scaling = NtkScaling{option.at(0)};
    } else if (scaling == "llama3") {
      config.scaling = Llama3Scaling{option.at(0), option.at(1), option.at(2), option.at(3)};
    } else if (scaling == "yarn") {
      YarnScaling yarn{option.at(0), option.at(1), option.at(2),
                       option.at(3), {},           option.at(5) != 0};
      if (option.at(4) != 0) yarn.attention_factor = option.at(4);
      config.scaling = yarn;
    } else {
      EXPECT_EQ(scaling, "none");
    }
    std::size_t pairs = 0;
    file >> word >> golden.attention_factor >> word >> pairs;
    golden.frequencies.resize(pairs);
    golden.float_frequencies.resize(pairs);
    for (std::size_t i = 0; i < pairs; ++i)
      file >> golden.frequencies[i] >> golden.float_frequencies[i];
    std::getline(file, line);  // the rest of the last line
    EXPECT_TRUE(file) << golden.name;
    goldens.push_back(golden);
  }
  return goldens;
}

// Formulas against Transformers' own code run in float64: 1e-12, the order of operations differs.
// Numbers against the code as released: its float32 powers and ramps are off by up to 1e-5.
TEST(RotaryScaling, EqualsTransformers) {
  const std::vector<Golden> goldens = read_goldens();
  ASSERT_EQ(goldens.size(), 15U);
  for (const Golden& golden : goldens) {
    SCOPED_TRACE(golden.name);
    const Rotary rotary(golden.config);
    EXPECT_NEAR(rotary.attention_factor(), golden.attention_factor, 1e-15);
    ASSERT_EQ(static_cast<std::size_t>(rotary.num_pairs()), golden.frequencies.size());
    for (int i = 0; i < rotary.num_pairs(); ++i) {
      const double exact = golden.frequencies[static_cast<std::size_t>(i)];
      const double released = golden.float_frequencies[static_cast<std::size_t>(i)];
      EXPECT_NEAR(rotary.frequency(i), exact, 1e-12 * exact) << i;
      EXPECT_NEAR(rotary.frequency(i), released, 1e-5 * released) << i;
    }
  }
}

TEST(RotaryScaling, NtkKeepsTheHighestAndDividesTheLowestFrequency) {
  RotaryConfig config = plain(128, 128);
  const Rotary unscaled(config);
  config.scaling = NtkScaling{4};
  const Rotary rotary(config);
  EXPECT_EQ(rotary.frequency(0), 1);
  EXPECT_NEAR(rotary.frequency(63) / unscaled.frequency(63), 0.25, 1e-12);
}

struct BadConfig {
  std::string field;
  RotaryConfig config;
};

std::vector<BadConfig> bad_configs() {
  std::vector<BadConfig> bad;
  const auto add = [&](const std::string& field, auto change) {
    RotaryConfig config = plain(8, 8);
    change(config);
    bad.push_back({field, config});
  };
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  add("head_dim", [](RotaryConfig& c) { c.head_dim = 0; });
  add("head_dim", [](RotaryConfig& c) { c.head_dim = -8; });
  add("rotary_dim", [](RotaryConfig& c) { c.rotary_dim = 7; });
  add("rotary_dim", [](RotaryConfig& c) { c.rotary_dim = 0; });
  add("rotary_dim", [](RotaryConfig& c) { c.rotary_dim = -2; });
  add("rotary_dim", [](RotaryConfig& c) { c.rotary_dim = 10; });
  add("rotary_dim", [](RotaryConfig& c) { c.head_dim = c.rotary_dim = 2048; });
  for (const double theta : {0.0, -1.0, kNan, kInfinity})
    add("theta", [=](RotaryConfig& c) { c.theta = theta; });
  add("sections", [](RotaryConfig& c) { c.sections = {1, 1, 1}; });
  add("sections", [](RotaryConfig& c) { c.sections = {2, 2, 1}; });
  add("sections", [](RotaryConfig& c) { c.sections = {6, -2, 0}; });
  add("frequency_factors", [](RotaryConfig& c) { c.frequency_factors = {1, 1, 1}; });
  add("frequency_factors", [](RotaryConfig& c) { c.frequency_factors = {1, 1, 0, 1}; });
  add("frequency_factors", [](RotaryConfig& c) { c.frequency_factors = {1, 1, -1, 1}; });
  for (const double factor : {0.0, -2.0, kNan, kInfinity}) {
    add("scaling.factor", [=](RotaryConfig& c) { c.scaling = LinearScaling{factor}; });
    add("scaling.factor", [=](RotaryConfig& c) { c.scaling = NtkScaling{factor}; });
    add("scaling.factor", [=](RotaryConfig& c) { c.scaling = Llama3Scaling{factor}; });
    add("scaling.factor", [=](RotaryConfig& c) { c.scaling = YarnScaling{factor}; });
  }
  add("rotary_dim", [](RotaryConfig& c) {
    c.rotary_dim = 2;
    c.scaling = NtkScaling{2};
  });
  add("scaling.low_freq_factor", [](RotaryConfig& c) { c.scaling = Llama3Scaling{8, 0, 4}; });
  add("scaling.high_freq_factor", [](RotaryConfig& c) { c.scaling = Llama3Scaling{8, 1, 0}; });
  add("scaling.high_freq_factor", [](RotaryConfig& c) { c.scaling = Llama3Scaling{8, 4, 4}; });
  add("scaling.original_context", [](RotaryConfig& c) { c.scaling = Llama3Scaling{8, 1, 4, 0}; });
  add("scaling.original_context", [](RotaryConfig& c) { c.scaling = YarnScaling{4, -1}; });
  add("scaling.beta_fast", [](RotaryConfig& c) { c.scaling = YarnScaling{4, 4096, 0}; });
  add("scaling.beta_slow", [](RotaryConfig& c) { c.scaling = YarnScaling{4, 4096, 32, 0}; });
  add("scaling.beta_fast", [](RotaryConfig& c) { c.scaling = YarnScaling{4, 4096, 1, 32}; });
  add("scaling.attention_factor", [](RotaryConfig& c) {
    c.scaling = YarnScaling{4, 4096, 32, 1, 0.0};
  });
  add("theta", [](RotaryConfig& c) {
    c.theta = 1;
    c.scaling = YarnScaling{4};
  });
  return bad;
}

TEST(RotaryConfig, ErrorsNameTheField) {
  for (const BadConfig& bad : bad_configs()) {
    SCOPED_TRACE(bad.field);
    try {
      const Rotary rotary(bad.config);
      FAIL() << "accepted";
    } catch (const sluice::Error& error) {
      EXPECT_EQ(error.code(), sluice::ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, bad.field);
      EXPECT_FALSE(error.detail().expected.empty());
      EXPECT_FALSE(error.detail().found.empty());
      EXPECT_NE(std::string(error.what()).find(bad.field), std::string::npos);
    }
  }
  EXPECT_THROW(RotaryTable(Rotary(plain(8, 8)), -1), sluice::Error);
}

std::vector<float> row_of(const RotaryTable& table, std::int64_t i) {
  return {table.row(i), table.row(i) + table.rotary().row_size()};
}

std::vector<float> angles_of(const Rotary& rotary, Position3 position) {
  std::vector<float> row(static_cast<std::size_t>(rotary.row_size()));
  rotary.angles(position, row.data());
  return row;
}

TEST(RotaryTable, RunsClampedRunsAndListsGiveTheRowsOfTheirPositions) {
  const Rotary rotary(plain(16, 12));
  RotaryTable table(rotary, 6);
  EXPECT_EQ(table.capacity(), 6);
  EXPECT_EQ(table.size(), 0);
  const auto expect_positions = [&](const std::vector<double>& positions) {
    ASSERT_EQ(table.size(), static_cast<std::int64_t>(positions.size()));
    for (std::int64_t i = 0; i < table.size(); ++i)
      EXPECT_EQ(row_of(table, i),
                angles_of(rotary, sluice::on_all_axes(positions[static_cast<std::size_t>(i)])))
          << i;
  };
  table.fill_run(0.5, 4);
  expect_positions({0.5, 1.5, 2.5, 3.5});
  table.fill_run(0.5, 4);
  expect_positions({0.5, 1.5, 2.5, 3.5});
  table.fill_clamped_run(3, 6, 5);
  expect_positions({3, 4, 5, 5, 5, 5});
  table.fill_clamped_run(9, 2, 5);
  expect_positions({5, 5});
  table.fill_run(1e8, 1);
  expect_positions({1e8});
  table.fill(std::vector<Position>{4, 2, 2, 7.5, -1});
  expect_positions({4, 2, 2, 7.5, -1});
  table.fill(std::vector<Position>{4, 2, 3});  // rows beyond keep what they hold
  table.fill(std::vector<Position>{4, 2, 3, 7.5, -1});
  expect_positions({4, 2, 3, 7.5, -1});
  table.fill_run(0, 0);
  expect_positions({});
}

TEST(RotaryTable, HoldsThreeAxes) {
  RotaryConfig config = plain(12, 12);
  config.sections = {2, 2, 2};
  const Rotary rotary(config);
  RotaryTable table(rotary, 3);
  const std::vector<Position3> positions{{1, 2, 3}, {1, 2, 4}, {1, 2, 4}};
  table.fill(positions);
  for (std::int64_t i = 0; i < 3; ++i)
    EXPECT_EQ(row_of(table, i), angles_of(rotary, positions[static_cast<std::size_t>(i)]));
  table.fill_run(1, 3);
  EXPECT_EQ(row_of(table, 2), angles_of(rotary, Position3{3, 3, 3}));
}

// The layers of a model share one table: asking again must not compute again. A row marked by hand
// keeps its mark if and only if it was not computed.
TEST(RotaryTable, ComputesOnlyRowsWhosePositionChanged) {
  const Rotary rotary(plain(8, 8));
  RotaryTable table(rotary, 4);
  table.fill_run(10, 4);
  float* mark = const_cast<float*>(table.row(1));
  *mark = 99;
  table.fill_run(10, 4);
  EXPECT_EQ(*mark, 99);
  table.fill_clamped_run(10, 4, 12);  // rows 0 to 2 are the same
  EXPECT_EQ(*mark, 99);
  table.fill_run(11, 4);
  EXPECT_EQ(row_of(table, 1), angles_of(rotary, sluice::on_all_axes(12)));
}

TEST(RotaryTable, OutlivesTheRotationItWasMadeFrom) {
  const auto make = [] {
    const Rotary rotary(plain(8, 8));
    return RotaryTable(rotary, 2);
  };
  RotaryTable table = make();
  table.fill_run(3, 2);
  EXPECT_EQ(row_of(table, 1), angles_of(Rotary(plain(8, 8)), sluice::on_all_axes(4)));
}

}  // namespace SLUICE_TEST_UNIT
