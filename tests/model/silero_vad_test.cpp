// SPDX-License-Identifier: MIT
#include "sluice/nn/silero_vad.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "sluice/model/load_silero_vad.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// --- The oracle: the network's definition in float64, on padded signals and [channel][time]
// --------

using Grid = std::vector<std::vector<double>>;  // [channels][frames]

Grid convolve(const Grid& in, const SileroVadWeights::Convolution& weights, std::size_t out,
              std::size_t stride) {
  const std::size_t frames = in[0].size();
  Grid result(out);
  for (std::size_t o = 0; o < out; ++o) {
    for (std::size_t t = 0; t < frames; t += stride) {
      double sum = static_cast<double>(weights.bias[o]);
      for (std::size_t c = 0; c < in.size(); ++c)
        for (std::size_t k = 0; k < 3; ++k)
          if (t + k >= 1 && t + k - 1 < frames)
            sum +=
                static_cast<double>(weights.weight[(o * in.size() + c) * 3 + k]) * in[c][t + k - 1];
      result[o].push_back(std::max(sum, 0.0));
    }
  }
  return result;
}

double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

struct NaiveVad {
  SileroVadWeights weights;
  std::vector<double> h = std::vector<double>(128);
  std::vector<double> c = std::vector<double>(128);

  std::vector<double> run(std::vector<float> samples) {
    while (samples.size() % 512 != 0) samples.push_back(0.0F);
    samples.insert(samples.begin(), 64, 0.0F);
    std::vector<double> probabilities;
    for (std::size_t start = 0; start + 576 <= samples.size(); start += 512) {
      std::vector<double> x(samples.begin() + static_cast<std::ptrdiff_t>(start),
                            samples.begin() + static_cast<std::ptrdiff_t>(start + 576));
      for (std::size_t i = 0; i < 64; ++i) x.push_back(x[574 - i]);  // 575 is the last of them
      probabilities.push_back(window(x));
    }
    return probabilities;
  }

  double window(const std::vector<double>& x) {
    Grid grid(129);
    for (std::size_t t = 0; t < 4; ++t) {
      for (std::size_t k = 0; k < 129; ++k) {
        double re = 0;
        double im = 0;
        for (std::size_t i = 0; i < 256; ++i) {
          re += static_cast<double>(weights.stft[k * 256 + i]) * x[128 * t + i];
          im += static_cast<double>(weights.stft[(k + 129) * 256 + i]) * x[128 * t + i];
        }
        grid[k].push_back(std::hypot(re, im));
      }
    }
    grid = convolve(grid, weights.conv[0], 128, 1);
    grid = convolve(grid, weights.conv[1], 64, 2);
    grid = convolve(grid, weights.conv[2], 64, 2);
    grid = convolve(grid, weights.conv[3], 128, 1);
    std::vector<double> gates;
    for (std::size_t r = 0; r < 512; ++r) {
      double sum =
          static_cast<double>(weights.input_bias[r]) + static_cast<double>(weights.hidden_bias[r]);
      for (std::size_t k = 0; k < 128; ++k) {
        sum += static_cast<double>(weights.input_weight[r * 128 + k]) * grid[k][0];
        sum += static_cast<double>(weights.hidden_weight[r * 128 + k]) * h[k];
      }
      gates.push_back(sum);
    }
    double logit = static_cast<double>(weights.output_bias[0]);
    for (std::size_t k = 0; k < 128; ++k) {
      c[k] = sigmoid(gates[128 + k]) * c[k] + sigmoid(gates[k]) * std::tanh(gates[256 + k]);
      h[k] = sigmoid(gates[384 + k]) * std::tanh(c[k]);
      logit += static_cast<double>(weights.output[k]) * std::max(h[k], 0.0);
    }
    return sigmoid(logit);
  }
};

// --- Weights and signals
// ---------------------------------------------------------------------------

const std::string kFile = std::string(SLUICE_TEST_DATA) + "/silero_vad/silero_vad_16k.safetensors";

SileroVadWeights released() {
  return load_silero_vad_weights(SafetensorsFile(kFile), kFile);
}

// x(t) = 0.1 sum over k = 1 .. 10 of cos(2 pi 150 k t) / k, faded in and out four times a second.
std::vector<float> buzz(std::size_t windows) {
  std::vector<float> samples;
  for (std::size_t i = 0; i < 512 * windows; ++i) {
    const double t = static_cast<double>(i) / 16000.0;
    double sum = 0;
    for (int k = 1; k <= 10; ++k) sum += std::cos(2 * std::numbers::pi * 150 * k * t) / k;
    samples.push_back(
        static_cast<float>(0.1 * sum * (0.5 - 0.5 * std::cos(2 * std::numbers::pi * 4 * t))));
  }
  return samples;
}

std::vector<float> run(const SileroVad& vad, const std::vector<float>& samples) {
  SileroVad::State state = vad.make_state();
  std::vector<float> probabilities(samples.size() / 512 + 2);
  std::int64_t count = vad.step(samples, state, probabilities);
  count += vad.flush(state, {probabilities.data() + count, 1, 1});
  probabilities.resize(static_cast<std::size_t>(count));
  return probabilities;
}

// --- With the released weights
// ---------------------------------------------------------------------

// Typed in: an independent float32 implementation, sums in another order.
TEST(SileroVad, TypedInProbabilities) {
  const SileroVad vad(released());
  const std::vector<float> silence = run(vad, std::vector<float>(8 * 512));
  const std::vector<double> expected_silence{.01801, .02567, .01977, .01561,
                                             .01358, .01287, .01283, .01327};
  ASSERT_EQ(silence.size(), 8U);
  for (std::size_t i = 0; i < 8; ++i) EXPECT_NEAR(silence[i], expected_silence[i], 2e-4) << i;

  const std::vector<float> probabilities = run(vad, buzz(12));
  const std::vector<double> expected{.1801, .8438, .7335, .5273, .3062, .2411,
                                     .5188, .4708, .5971, .4091, .2015, .0755};
  ASSERT_EQ(probabilities.size(), 12U);
  for (std::size_t i = 0; i < 12; ++i) EXPECT_NEAR(probabilities[i], expected[i], 2e-4) << i;

  SileroVad::State state = vad.make_state();
  std::vector<float> all(31);
  vad.step(buzz(31), state, all);
  EXPECT_NEAR(state.lstm.h[0], .19774, 2e-4);
  EXPECT_NEAR(state.lstm.h[1], .26092, 2e-4);
  EXPECT_NEAR(state.lstm.h[2], .06598, 2e-4);
}

// Float32 against float64: some 400 roundings a sum, through 100 windows of the LSTM.
TEST(SileroVad, MatchesTheDefinitionInFloat64) {
  Random random(3);
  std::vector<float> samples = buzz(100);
  for (float& sample : samples) sample += static_cast<float>(0.02 * random.normal());
  samples.resize(samples.size() - 100);  // the last window is filled up with zeros
  SileroVadWeights seeded = released();
  const auto shake = [&](std::vector<float>& values) {
    for (float& value : values) value = static_cast<float>(0.08 * random.normal());
  };
  for (std::vector<float>* values : {&seeded.input_weight, &seeded.hidden_weight, &seeded.output,
                                     &seeded.stft, &seeded.conv[2].weight, &seeded.conv[2].bias})
    shake(*values);
  for (const SileroVadWeights& weights : {released(), seeded}) {
    const std::vector<double> expected = NaiveVad{weights}.run(samples);
    const std::vector<float> found = run(SileroVad(weights), samples);
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 2e-5) << i;
  }
}

TEST(SileroVad, AnyChunkingGivesTheSameBits) {
  const SileroVad vad(released());
  const std::vector<float> samples = buzz(6);
  const std::vector<float> whole = run(vad, samples);
  Random random(9);
  for (int trial = 0; trial < 30; ++trial) {
    SileroVad::State state = vad.make_state();
    std::vector<float> found(8);
    std::int64_t count = 0;
    std::size_t done = 0;
    while (done < samples.size()) {
      const std::size_t length = std::min<std::size_t>(
          static_cast<std::size_t>(test::between(random, 0, 900)), samples.size() - done);
      count += vad.step(std::span(samples).subspan(done, length), state,
                        std::span(found).subspan(static_cast<std::size_t>(count)));
      done += length;
      EXPECT_EQ(count, vad.timing().outputs_after(static_cast<std::int64_t>(done)));
      if (trial % 3 == 0) {  // through bytes
        const std::vector<std::byte> bytes = save_stream_state(vad, state);
        SileroVad::State other = vad.make_state();
        restore_stream_state(vad, bytes, other);
        state = other;
      }
    }
    found.resize(static_cast<std::size_t>(count));
    EXPECT_EQ(found, whole);
  }
}

TEST(SileroVad, OtherWeightsAreRefused) {
  SileroVadWeights weights = released();
  weights.conv[1].bias.pop_back();
  const auto error = test::error_of([&] { SileroVad vad(weights); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kShape);
  EXPECT_EQ(error->detail().field, "conv2 bias");
  const std::string other = std::string(SLUICE_TEST_DATA) + "/safetensors/sample.safetensors";
  const auto missing = test::error_of([&] { load_silero_vad(other); });
  ASSERT_TRUE(missing);
  EXPECT_EQ(missing->code(), ErrorCode::kFormat);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
