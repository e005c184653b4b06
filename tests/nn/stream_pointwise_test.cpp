// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_pointwise.hpp"

#include <cmath>
#include <cstdint>
#include <functional>
#include <numbers>
#include <vector>

#include <gtest/gtest.h>

#include "support/frame_stream.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::error_of;
using test::expect_close;
using test::expect_exact_streaming;
using test::Frames;
using test::random_values;
using test::run_whole;

using Values = std::vector<float>;

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

// Each output of `layer` on frames of normal values, by `expected(frame, channel)`.
template <class Layer>
void expect_frame_function(
    const Layer& layer,
    const std::function<double(const Frames&, std::int64_t, std::int64_t)>& expected,
    double tolerance) {
  Random random(1);
  const Frames in = Frames::random(random, 33, layer.in_width());
  std::vector<double> values;
  for (std::int64_t t = 0; t < in.rows; ++t)
    for (std::int64_t c = 0; c < layer.out_width(); ++c) values.push_back(expected(in, t, c));
  expect_close(run_whole(layer, in), values, tolerance);
  expect_exact_streaming(layer, in, 2);
}

TEST(FrameActivation, EqualsItsDefinition) {
  const std::vector<std::pair<FrameFunction, double (*)(double)>> functions{
      {FrameFunction::kRelu,
       [](double x) {
         return std::max(x, 0.0);
       }},
      {FrameFunction::kSilu,
       [](double x) {
         return x * sigmoid(x);
       }},
      {FrameFunction::kGelu,
       [](double x) {
         return 0.5 * x * std::erfc(-x / std::numbers::sqrt2);
       }},
      {FrameFunction::kGeluTanh,
       [](double x) {
         return 0.5 * x *
                (1.0 + std::tanh(std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
       }},
      {FrameFunction::kSigmoid, sigmoid},
      {FrameFunction::kTanh, [](double x) {
         return std::tanh(x);
       }}};
  for (const auto& [function, exact] : functions)
    expect_frame_function(
        FrameActivation(function, 21),
        [exact = exact](const Frames& in, std::int64_t t, std::int64_t c) {
          return exact(static_cast<double>(in.at(t, c)));
        },
        3e-7);
  const FrameActivation relu(FrameFunction::kRelu, 1);
  EXPECT_TRUE(std::isnan(run_whole(relu, Frames(1, 1, std::nanf(""))).values[0]));
}

TEST(FrameGlu, GatesTheFirstHalf) {
  expect_frame_function(
      FrameGlu(19),
      [](const Frames& in, std::int64_t t, std::int64_t c) {
        return static_cast<double>(in.at(t, c)) * sigmoid(static_cast<double>(in.at(t, c + 19)));
      },
      3e-7);
}

TEST(FrameLinear, MultipliesAndAdds) {
  Random random(3);
  const Values weight = random_values(random, 6 * 23);
  const Values bias = random_values(random, 6);
  expect_frame_function(
      FrameLinear(WeightMatrix::of(weight.data(), 6, 23), bias.data()),
      [&](const Frames& in, std::int64_t t, std::int64_t c) {
        double sum = static_cast<double>(bias[c]);
        for (std::int64_t i = 0; i < 23; ++i)
          sum += static_cast<double>(weight[c * 23 + i]) * static_cast<double>(in.at(t, i));
        return sum;
      },
      1e-6);
  const auto error = error_of([&] { const FrameLinear linear(WeightMatrix::of(nullptr, 6, 23)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kShape);
}

TEST(FrameAffine, IsBatchNormAtInference) {
  Random random(4);
  const std::int64_t width = 21;
  const Values mean = random_values(random, width);
  const Values gamma = random_values(random, width);
  const Values beta = random_values(random, width);
  Values variance = random_values(random, width);
  for (float& value : variance) value = value * value + 0.1F;
  const FrameAffine norm = FrameAffine::batch_norm(mean, variance, gamma, beta, 1e-5);
  expect_frame_function(
      norm,
      [&](const Frames& in, std::int64_t t, std::int64_t c) {
        return (static_cast<double>(in.at(t, c)) - static_cast<double>(mean[c])) /
                   std::sqrt(static_cast<double>(variance[c]) + 1e-5) *
                   static_cast<double>(gamma[c]) +
               static_cast<double>(beta[c]);
      },
      1e-6);

  // Folded into the linear layer before it, the same to rounding.
  Values weight = random_values(random, width * 5);
  Values bias = random_values(random, width);
  const Frames in = Frames::random(random, 9, 5);
  const FrameLinear plain(WeightMatrix::of(weight.data(), width, 5), bias.data());
  const Frames behind = run_whole(norm, run_whole(plain, in));
  fold_affine(norm, weight, bias);
  const FrameLinear folded(WeightMatrix::of(weight.data(), width, 5), bias.data());
  const Frames once = run_whole(folded, in);
  expect_close(once, std::vector<double>(behind.values.begin(), behind.values.end()), 1e-6);

  EXPECT_TRUE(error_of([&] { FrameAffine::batch_norm(mean, variance, gamma, Values(3), 1e-5); }));
  EXPECT_TRUE(error_of([&] { const FrameAffine affine({}, {}); }));
  EXPECT_TRUE(error_of([&] { const FrameAffine affine({1.0F}, {1.0F, 2.0F}); }));
  EXPECT_TRUE(error_of([&] { fold_affine(norm, weight, std::span(bias).first(3)); }));
}

TEST(FrameNorm, EqualsItsDefinition) {
  Random random(5);
  const std::int64_t width = 24;
  const Values weight = random_values(random, width);
  const Values bias = random_values(random, width);
  for (const FrameNormKind kind : {FrameNormKind::kLayer, FrameNormKind::kMeanSquare})
    for (const std::int64_t groups : {1, 3, 24})
      for (const bool add_one : {false, true}) {
        if (kind == FrameNormKind::kLayer && groups == 24) continue;  // nothing but the bias
        expect_frame_function(
            FrameNorm({kind, 1e-5, groups, add_one}, weight, bias),
            [&](const Frames& in, std::int64_t t, std::int64_t c) {
              const std::int64_t size = width / groups;
              const std::int64_t first = c / size * size;
              double mean = 0.0;
              double squares = 0.0;
              for (std::int64_t i = first; i < first + size; ++i)
                mean += static_cast<double>(in.at(t, i)) / static_cast<double>(size);
              if (kind == FrameNormKind::kMeanSquare) mean = 0.0;
              for (std::int64_t i = first; i < first + size; ++i)
                squares += std::pow(static_cast<double>(in.at(t, i)) - mean, 2);
              return (static_cast<double>(in.at(t, c)) - mean) /
                         std::sqrt(squares / static_cast<double>(size) + 1e-5) *
                         (static_cast<double>(weight[c]) + (add_one ? 1.0 : 0.0)) +
                     static_cast<double>(bias[c]);
            },
            1e-6);
      }
  EXPECT_TRUE(error_of([&] { const FrameNorm norm({.groups = 5}, weight, bias); }));
  EXPECT_TRUE(error_of([&] { const FrameNorm norm({}, weight, Values(3)); }));
  EXPECT_TRUE(error_of([&] { const FrameNorm norm({}, {}); }));
}

TEST(StreamGroupNorm, NormalisesByTheFramesSoFar) {
  Random random(6);
  const std::int64_t width = 12;
  const Values weight = random_values(random, width);
  const Values bias = random_values(random, width);
  for (const std::int64_t groups : {1, 4}) {
    const StreamGroupNorm norm(groups, weight, bias, 1e-5);
    expect_frame_function(
        norm,
        [&](const Frames& in, std::int64_t t, std::int64_t c) {
          const std::int64_t size = width / groups;
          const std::int64_t first = c / size * size;
          const double count = static_cast<double>(size * (t + 1));
          double mean = 0.0;
          double squares = 0.0;
          for (std::int64_t s = 0; s <= t; ++s)
            for (std::int64_t i = first; i < first + size; ++i)
              mean += static_cast<double>(in.at(s, i)) / count;
          for (std::int64_t s = 0; s <= t; ++s)
            for (std::int64_t i = first; i < first + size; ++i)
              squares += std::pow(static_cast<double>(in.at(s, i)) - mean, 2);
          return (static_cast<double>(in.at(t, c)) - mean) / std::sqrt(squares / count + 1e-5) *
                     static_cast<double>(weight[c]) +
                 static_cast<double>(bias[c]);
        },
        1e-6);
    EXPECT_EQ(norm.state_bytes(), static_cast<std::size_t>(groups * 16 + 8));
  }
  EXPECT_TRUE(error_of([&] { const StreamGroupNorm norm(5, weight, bias); }));
  EXPECT_TRUE(error_of([&] { const StreamGroupNorm norm(1, weight, Values(3)); }));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
