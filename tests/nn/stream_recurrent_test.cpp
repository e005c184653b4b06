// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_recurrent.hpp"

#include <cmath>
#include <cstdint>
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

// Float32 gates; errors do not grow, because the state forgets.
constexpr double kTolerance = 2e-6;

// frame-stream A.7, computed with PyTorch.
const Values kInputWeight{.1F, -.2F, .3F, .4F, -.5F, .6F, .7F, -.8F};
const Values kHiddenWeight{.1F,  .2F, -.3F, .4F,  .5F, -.1F, .2F,  .3F,
                           -.2F, .1F, .4F,  -.4F, .3F, .2F,  -.1F, .5F};
const Values kBias{0, .01F, .02F, .03F, .04F, .05F, .06F, .07F};

TEST(StreamLstm, GivesPyTorchsNumbers) {
  const StreamLstm lstm(WeightMatrix::of(kInputWeight.data(), 8, 1),
                        WeightMatrix::of(kHiddenWeight.data(), 8, 2), kBias.data());
  const Frames in(1, Values{1, -2, .5F});
  expect_close(run_whole(lstm, in),
               std::vector<double>{-.151278, .082319, .055408, -.353238, .018760, -.010955}, 1e-6);
  auto state = lstm.make_state();
  Frames out(1, 2);
  const std::vector<double> cells{-.225785, .258762, .280343, -.442960, .031912, -.029246};
  for (std::int64_t t = 0; t < 3; ++t) {
    lstm.step(in.view().middle_rows(t, 1), state, out.view());
    EXPECT_NEAR(static_cast<double>(state.c[0]), cells[2 * t], 1e-6);
    EXPECT_NEAR(static_cast<double>(state.c[1]), cells[2 * t + 1], 1e-6);
  }
  // Which of the two biases a value is in makes no difference.
  const StreamLstm other(WeightMatrix::of(kInputWeight.data(), 8, 1),
                         WeightMatrix::of(kHiddenWeight.data(), 8, 2), nullptr, kBias.data());
  EXPECT_EQ(run_whole(other, in).values, run_whole(lstm, in).values);
}

TEST(StreamGru, KeepsTheSecondBiasInsideTheResetGate) {
  const Values hidden_bias{0, 0, 0, 0, .1F, -.1F};
  const StreamGru gru(WeightMatrix::of(kInputWeight.data(), 6, 1),
                      WeightMatrix::of(kHiddenWeight.data(), 6, 2), kBias.data(),
                      hidden_bias.data());
  const Frames in(1, Values{1, -2, .5F});
  expect_close(run_whole(gru, in),
               std::vector<double>{-.162528, .212990, .479645, -.515697, .205440, -.080672}, 1e-6);
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

// row . values + bias, in float64.
double affine(const Values& weight, std::int64_t row, const std::vector<double>& values,
              double bias) {
  double sum = bias;
  for (std::size_t i = 0; i < values.size(); ++i)
    sum +=
        static_cast<double>(weight[static_cast<std::size_t>(row) * values.size() + i]) * values[i];
  return sum;
}

TEST(RecurrentLayers, EqualTheWholeSequenceInAnyChunks) {
  Random random(1);
  const std::int64_t width = 5;
  const std::int64_t hidden = 19;
  const Values input_weight = random_values(random, 4 * hidden * width, 0.4);
  const Values hidden_weight = random_values(random, 4 * hidden * hidden, 0.2);
  const Values input_bias = random_values(random, 4 * hidden, 0.3);
  const Values hidden_bias = random_values(random, 4 * hidden, 0.3);
  const Frames in = Frames::random(random, 60, width);

  std::vector<double> h(hidden);
  std::vector<double> c(hidden);
  std::vector<double> lstm_rows;
  std::vector<double> g(hidden);
  std::vector<double> gru_rows;
  for (std::int64_t t = 0; t < in.rows; ++t) {
    const std::vector<double> x(in.row(t), in.row(t) + width);
    const auto gate = [&](const std::vector<double>& state, std::int64_t row) {
      return affine(input_weight, row, x, static_cast<double>(input_bias[row])) +
             affine(hidden_weight, row, state, static_cast<double>(hidden_bias[row]));
    };
    std::vector<double> next_h(hidden);
    for (std::int64_t k = 0; k < hidden; ++k) {
      c[k] = sigmoid(gate(h, hidden + k)) * c[k] +
             sigmoid(gate(h, k)) * std::tanh(gate(h, 2 * hidden + k));
      next_h[k] = sigmoid(gate(h, 3 * hidden + k)) * std::tanh(c[k]);
    }
    h = next_h;
    lstm_rows.insert(lstm_rows.end(), h.begin(), h.end());

    std::vector<double> next_g(hidden);
    for (std::int64_t k = 0; k < hidden; ++k) {
      const double r = sigmoid(gate(g, k));
      const double z = sigmoid(gate(g, hidden + k));
      const std::int64_t row = 2 * hidden + k;
      const double n =
          std::tanh(affine(input_weight, row, x, static_cast<double>(input_bias[row])) +
                    r * affine(hidden_weight, row, g, static_cast<double>(hidden_bias[row])));
      next_g[k] = (1.0 - z) * n + z * g[k];
    }
    g = next_g;
    gru_rows.insert(gru_rows.end(), g.begin(), g.end());
  }

  const StreamLstm lstm(WeightMatrix::of(input_weight.data(), 4 * hidden, width),
                        WeightMatrix::of(hidden_weight.data(), 4 * hidden, hidden),
                        input_bias.data(), hidden_bias.data());
  expect_close(run_whole(lstm, in), lstm_rows, kTolerance);
  expect_exact_streaming(lstm, in, 2);
  EXPECT_EQ(lstm.state_bytes(), static_cast<std::size_t>(2 * hidden * 4));

  const StreamGru gru(WeightMatrix::of(input_weight.data(), 3 * hidden, width),
                      WeightMatrix::of(hidden_weight.data(), 3 * hidden, hidden), input_bias.data(),
                      hidden_bias.data());
  expect_close(run_whole(gru, in), gru_rows, kTolerance);
  expect_exact_streaming(gru, in, 3);
  EXPECT_EQ(gru.state_bytes(), static_cast<std::size_t>(hidden * 4));
}

TEST(RecurrentLayers, RefuseOtherShapes) {
  const Values weight(64, 0.0F);
  const auto shape = [&](std::int64_t rows, std::int64_t cols) {
    return WeightMatrix::of(weight.data(), rows, cols);
  };
  EXPECT_FALSE(error_of([&] { const StreamLstm lstm(shape(8, 1), shape(8, 2)); }));
  EXPECT_TRUE(error_of([&] { const StreamLstm lstm(shape(8, 1), shape(6, 2)); }));
  EXPECT_TRUE(error_of([&] { const StreamLstm lstm(shape(6, 1), shape(8, 2)); }));
  EXPECT_FALSE(error_of([&] { const StreamGru gru(shape(6, 1), shape(6, 2)); }));
  EXPECT_TRUE(error_of([&] { const StreamGru gru(shape(6, 1), shape(8, 2)); }));
  EXPECT_TRUE(error_of([&] { const StreamGru gru(shape(6, 0), shape(6, 2)); }));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
