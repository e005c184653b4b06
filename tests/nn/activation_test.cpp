// SPDX-License-Identifier: MIT
#include "sluice/nn/activation.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr double kPi = 3.14159265358979323846;

// The definitions in float64, each in the form that keeps its negative tail.
double exact(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.0 + std::exp(-x));
    case Activation::kGeluTanh:
      return x / (1.0 + std::exp(-2.0 * std::sqrt(2.0 / kPi) * (x + 0.044715 * x * x * x)));
    case Activation::kGelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  }
  return 0.0;
}

double ulp(double value) {
  const auto rounded = static_cast<float>(std::fabs(value));
  return static_cast<double>(std::nextafter(rounded, std::numeric_limits<float>::infinity())) -
         static_cast<double>(rounded);
}

class ActivationTest : public testing::TestWithParam<Activation> {};

TEST_P(ActivationTest, MatchesFloat64) {
  std::vector<float> x;
  for (int i = -300000; i <= 300000; ++i) x.push_back(static_cast<float>(i) * 1e-4F);
  std::vector<float> y(x.size());
  activate(GetParam(), x, y);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double value = exact(GetParam(), static_cast<double>(x[i]));
    const double error = std::fabs(static_cast<double>(y[i]) - value);
    // An error of the exponent shows as a relative error in the GELUs' negative tails, where the
    // value itself is tiny; SiLU's exponent is exact.
    const bool tail = GetParam() != Activation::kSilu && x[i] < -1.0F;
    ASSERT_LE(error, tail ? 1e-7 : 4.0 * ulp(value)) << "at " << x[i];
  }
}

TEST_P(ActivationTest, EndsAreFinite) {
  const std::vector<float> x = {0.0F, -0.0F, 1e4F, -1e4F, 200.0F, -200.0F, 1e-30F, -1e-30F};
  std::vector<float> y(x.size());
  activate(GetParam(), x, y);
  EXPECT_EQ(y[0], 0.0F);
  EXPECT_EQ(y[1], 0.0F);
  EXPECT_EQ(y[2], 1e4F);
  EXPECT_EQ(y[3], 0.0F);
  EXPECT_EQ(y[4], 200.0F);
  EXPECT_EQ(y[5], 0.0F);
  EXPECT_EQ(y[6], 5e-31F);
  EXPECT_EQ(y[7], -5e-31F);
}

TEST_P(ActivationTest, GateTimesUpForAnyLengthAndInPlace) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const std::int64_t count : {0, 1, 5, 16, 33, 100}) {
    std::vector<float> gate(static_cast<std::size_t>(count) + 1, 9.0F);
    std::vector<float> up = gate;
    for (std::int64_t i = 0; i < count; ++i) {
      gate[i] = normal(random);
      up[i] = normal(random);
    }
    std::vector<float> activated(static_cast<std::size_t>(count));
    activate(GetParam(), {gate.data(), activated.size()}, activated);
    std::vector<float> out(static_cast<std::size_t>(count) + 1, 9.0F);
    gate_up(GetParam(), gate.data(), up.data(), out.data(), count);
    for (std::int64_t i = 0; i < count; ++i) EXPECT_EQ(out[i], activated[i] * up[i]);
    EXPECT_EQ(out[count], 9.0F) << "beyond the end";
    std::vector<float> over_up = up;
    gate_up(GetParam(), gate.data(), over_up.data(), over_up.data(), count);
    gate_up(GetParam(), gate.data(), up.data(), gate.data(), count);
    EXPECT_EQ(gate, out);
    EXPECT_EQ(over_up, out);
  }
}

INSTANTIATE_TEST_SUITE_P(All, ActivationTest,
                         testing::Values(Activation::kSilu, Activation::kGeluTanh,
                                         Activation::kGelu),
                         [](const auto& each) -> std::string {
                           switch (each.param) {
                             case Activation::kSilu: return "Silu";
                             case Activation::kGeluTanh: return "GeluTanh";
                             case Activation::kGelu: return "Gelu";
                           }
                           return "";
                         });

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
