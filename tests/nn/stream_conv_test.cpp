// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_conv.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/frame_stream.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::between;
using test::error_of;
using test::expect_close;
using test::expect_declared_latency;
using test::expect_exact_streaming;
using test::Frames;
using test::random_values;
using test::run_whole;

// float32 sums of at most a few hundred products of unit normals.
constexpr double kTolerance = 2e-6;

Frames counting(std::int64_t count) {
  Frames frames(count, 1);
  for (std::int64_t t = 0; t < count; ++t) frames.values[t] = static_cast<float>(t + 1);
  return frames;
}

StreamConv1d one_channel(const StreamKernelConfig& time, const std::vector<float>& taps,
                         const float* bias = nullptr) {
  return {{.time = time},
          WeightMatrix::of(taps.data(), 1, static_cast<std::int64_t>(taps.size())),
          bias};
}

using Values = std::vector<float>;

// frame-stream A.1a, NeMo's CausalConv1D.
TEST(StreamConv1d, CausalWithItsState) {
  const StreamConv1d conv = one_channel(StreamKernelConfig::causal(3), {1, 2, 3});
  EXPECT_EQ(run_whole(conv, counting(6)).values, (Values{3, 8, 14, 20, 26, 32}));
  auto state = conv.make_state();
  const Frames in = counting(6);
  Frames out(6, 1);
  std::int64_t at = 0;
  const std::vector<std::vector<float>> states{{1, 2}, {4, 5}, {5, 6}};
  std::size_t chunk = 0;
  for (const std::int64_t frames : {2, 3, 1}) {
    EXPECT_EQ(
        conv.step(in.view().middle_rows(at, frames), state, out.view().middle_rows(at, frames)),
        frames);
    at += frames;
    ASSERT_EQ(state.window.size(), 2);
    EXPECT_EQ(state.window.row(0)[0], states[chunk][0]);
    EXPECT_EQ(state.window.row(1)[0], states[chunk][1]);
    ++chunk;
  }
  EXPECT_EQ(out.values, (Values{3, 8, 14, 20, 26, 32}));
  const StreamConv1d dilated = one_channel(StreamKernelConfig::causal(3, 1, 2), {1, 2, 3});
  EXPECT_EQ(run_whole(dilated, counting(8)).values, (Values{3, 6, 11, 16, 22, 28, 34, 40}));
}

// A.1b: the two alignments of a stride, and how many outputs each chunk gives.
TEST(StreamConv1d, AlignmentsOfAStride) {
  StreamKernelConfig time = StreamKernelConfig::causal(3, 2);
  for (const auto alignment : {StreamAlignment::kFirst, StreamAlignment::kLast}) {
    time.alignment = alignment;
    const bool first = alignment == StreamAlignment::kFirst;
    const StreamConv1d conv = one_channel(time, {1, 2, 3});
    EXPECT_EQ(run_whole(conv, counting(8)).values,
              first ? (Values{3, 14, 26, 38}) : (Values{8, 20, 32, 44}));
    auto state = conv.make_state();
    const Frames in = counting(8);
    Frames out(8, 1);
    std::int64_t at = 0;
    std::vector<std::int64_t> counts;
    for (const std::int64_t frames : {1, 1, 3, 2, 1}) {
      counts.push_back(conv.step(in.view().middle_rows(at, frames), state, out.view()));
      at += frames;
    }
    EXPECT_EQ(counts, first ? (std::vector<std::int64_t>{1, 0, 2, 1, 0})
                            : (std::vector<std::int64_t>{0, 1, 1, 1, 1}));
  }
}

// A.3: kernel [1, 2, 3] with one frame of look-ahead, where NeMo's cached mode goes wrong.
TEST(StreamConv1d, LookAheadAtBothEnds) {
  const StreamConv1d conv = one_channel(StreamKernelConfig::same(3), {1, 2, 3});
  EXPECT_EQ(run_whole(conv, counting(6)).values, (Values{8, 14, 20, 26, 32, 17}));
}

// The definition in float64: groups, dilation, both alignments, any padding.
std::vector<double> reference_conv1d(const StreamConv1dConfig& config, const Values& weight,
                                     const Values& bias, const Frames& in) {
  const StreamKernelConfig& time = config.time;
  const std::int64_t per_in = config.in_channels / config.groups;
  const std::int64_t per_out = config.out_channels / config.groups;
  const std::int64_t end_padding = time.end_padding < 0 ? time.right : time.end_padding;
  std::vector<double> out;
  for (std::int64_t j = 0;; ++j) {
    const std::int64_t anchor =
        time.alignment == StreamAlignment::kFirst ? j * time.stride : (j + 1) * time.stride - 1;
    const std::int64_t newest = anchor + time.right;
    if (newest >= in.rows + end_padding || in.rows == 0) break;
    for (std::int64_t o = 0; o < config.out_channels; ++o) {
      double sum = static_cast<double>(bias[o]);
      for (std::int64_t c = 0; c < per_in; ++c)
        for (std::int64_t i = 0; i < time.kernel; ++i) {
          const std::int64_t t = newest - (time.kernel - 1 - i) * time.dilation;
          const std::int64_t channel = o / per_out * per_in + c;
          double x = 0.0;
          if (t < 0 && !config.initial.empty()) x = static_cast<double>(config.initial[channel]);
          if (t >= 0 && t < in.rows) x = static_cast<double>(in.at(t, channel));
          sum += static_cast<double>(weight[(o * per_in + c) * time.kernel + i]) * x;
        }
      out.push_back(sum);
    }
  }
  return out;
}

struct Conv1dCase {
  const char* name;
  StreamConv1dConfig config;
};

StreamKernelConfig last_aligned(std::int64_t kernel, std::int64_t stride) {
  StreamKernelConfig time = StreamKernelConfig::causal(kernel, stride);
  time.alignment = StreamAlignment::kLast;
  return time;
}

std::vector<Conv1dCase> conv1d_cases() {
  using K = StreamKernelConfig;
  return {
      {"dense_causal", {3, 5, 1, K::causal(4), {}}},
      {"dense_wide", {19, 70, 1, K::causal(3), {}}},
      {"dense_same_dilated", {3, 4, 1, K::same(3, 1, 3), {}}},
      {"dense_strided", {4, 3, 1, K::causal(5, 3), {}}},
      {"strided_beyond_kernel", {2, 2, 1, K::causal(2, 5), {}}},
      {"strided_same", {4, 6, 1, K::same(3, 2), {}}},
      {"valid_strided", {4, 3, 1, K::valid(3, 2), {}}},
      {"valid_strided_dilated", {2, 3, 1, K::valid(3, 2, 2), {}}},
      {"last_aligned", {3, 4, 1, last_aligned(3, 2), {}}},
      {"last_aligned_short_kernel", {2, 3, 1, last_aligned(2, 4), {}}},
      {"nemo", {2, 3, 1, K::nemo_causal(3, 2), {}}},
      {"uneven_padding", {2, 2, 1, {.kernel = 5, .stride = 2, .right = 1, .end_padding = 3}, {}}},
      {"grouped", {6, 4, 2, K::causal(3), {}}},
      {"grouped_dilated", {6, 9, 3, K::same(3, 2, 2), {}}},
      {"depthwise", {37, 37, 37, K::causal(9), {}}},
      {"depthwise_same", {70, 70, 70, K::same(31), {}}},
      {"depthwise_strided_dilated", {5, 5, 5, K::causal(3, 2, 4), {}}},
      {"channel_multiplier", {4, 8, 4, K::causal(3), {}}},
      {"pointwise", {5, 4, 1, K::causal(1), {}}},
      {"initial_frame", {3, 4, 1, K::causal(4), {0.5F, -1.0F, 2.0F}}},
      {"initial_frame_depthwise", {3, 3, 3, K::causal(4, 2), {0.5F, -1.0F, 2.0F}}},
  };
}

TEST(StreamConv1d, EqualsTheWholeSequenceInAnyChunks) {
  Random random(1);
  for (const auto& [name, config] : conv1d_cases()) {
    SCOPED_TRACE(name);
    const std::int64_t fan_in = config.in_channels / config.groups * config.time.kernel;
    const Values weight = random_values(random, config.out_channels * fan_in);
    const Values bias = random_values(random, config.out_channels);
    const StreamConv1d conv(config, WeightMatrix::of(weight.data(), config.out_channels, fan_in),
                            bias.data());
    for (const std::int64_t frames : {0, 1, 2, 3, 7, 90}) {
      const Frames in = Frames::random(random, frames, config.in_channels);
      expect_close(run_whole(conv, in), reference_conv1d(config, weight, bias, in), kTolerance);
      expect_exact_streaming(conv, in, random.next(), frames == 90 ? 1000 : 20);
    }
    expect_declared_latency(conv, 40);
    const std::int64_t held = config.time.extent() - 1;
    EXPECT_EQ(conv.state_bytes(), static_cast<std::size_t>(held * config.in_channels * 4 + 17));
  }
}

// Whatever the last frame does, it cannot reach further than the window.
TEST(StreamConv1d, NanReachesItsWindowAlone) {
  Random random(2);
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [name, config] : conv1d_cases()) {
    SCOPED_TRACE(name);
    const std::int64_t fan_in = config.in_channels / config.groups * config.time.kernel;
    const Values weight = random_values(random, config.out_channels * fan_in);
    const StreamConv1d conv(config, WeightMatrix::of(weight.data(), config.out_channels, fan_in));
    Frames in = Frames::random(random, 100, config.in_channels);
    const Frames clean = run_whole(conv, in);
    const std::int64_t bad = 40;
    std::fill_n(in.row(bad), config.in_channels, kNan);
    const Frames poisoned = run_whole(conv, in);
    expect_exact_streaming(conv, in, 3, 50);
    ASSERT_EQ(clean.rows, poisoned.rows);
    const StreamTiming timing = conv.timing();
    for (std::int64_t j = 0; j < clean.rows; ++j) {
      const std::int64_t oldest = timing.first_input(j);
      const bool sees = bad >= oldest && bad <= timing.last_input(j) &&
                        (bad - oldest) % config.time.dilation == 0;
      for (std::int64_t o = 0; o < clean.width; ++o) {
        ASSERT_EQ(std::isnan(poisoned.at(j, o)), sees) << "output " << j;
        if (!sees) {
          ASSERT_EQ(poisoned.at(j, o), clean.at(j, o));
        }
      }
    }
  }
}

// Weights of other stored types are widened once.
TEST(StreamConv1d, TakesStoredTypes) {
  Random random(3);
  std::vector<bf16> stored;
  Values widened;
  for (int i = 0; i < 4 * 3 * 2; ++i) {
    stored.emplace_back(static_cast<float>(random.normal()));
    widened.push_back(static_cast<float>(stored.back()));
  }
  const StreamConv1dConfig config{
      .in_channels = 2, .out_channels = 4, .time = StreamKernelConfig::causal(3)};
  const StreamConv1d a(config, {ElementType::kBF16, stored.data(), 4, 6});
  const StreamConv1d b(config, WeightMatrix::of(widened.data(), 4, 6));
  const Frames in = Frames::random(random, 9, 2);
  EXPECT_EQ(run_whole(a, in).values, run_whole(b, in).values);
}

TEST(StreamConv1d, RefusesWhatIsNoLayer) {
  const Values weight(64, 1.0F);
  const auto made = [&](const StreamConv1dConfig& config, std::int64_t rows, std::int64_t cols) {
    return error_of(
        [&] { const StreamConv1d conv(config, WeightMatrix::of(weight.data(), rows, cols)); });
  };
  const StreamKernelConfig time = StreamKernelConfig::causal(3);
  EXPECT_FALSE(made({2, 4, 1, time, {}}, 4, 6));
  const auto code_of = [](const std::optional<Error>& error) {
    return error.value_or(Error(ErrorCode::kIo, {})).code();
  };
  EXPECT_EQ(code_of(made({2, 4, 1, time, {}}, 4, 5)), ErrorCode::kShape);
  EXPECT_EQ(code_of(made({2, 4, 1, time, {}}, 3, 6)), ErrorCode::kShape);
  EXPECT_EQ(code_of(made({2, 4, 1, time, {1.0F}}, 4, 6)), ErrorCode::kShape);
  EXPECT_EQ(code_of(made({0, 4, 1, time, {}}, 4, 6)), ErrorCode::kConfig);
  EXPECT_EQ(code_of(made({3, 4, 2, time, {}}, 4, 6)), ErrorCode::kConfig);
  EXPECT_EQ(code_of(made({2, 4, 1, {.kernel = 0}, {}}, 4, 6)), ErrorCode::kConfig);
  EXPECT_EQ(code_of(made({2, 4, 1, {.kernel = 3, .stride = 0}, {}}, 4, 6)), ErrorCode::kConfig);
  EXPECT_EQ(code_of(made({2, 4, 1, {.kernel = 3, .dilation = 0}, {}}, 4, 6)), ErrorCode::kConfig);
  EXPECT_EQ(code_of(made({2, 4, 1, {.kernel = 3, .right = 3}, {}}, 4, 6)), ErrorCode::kConfig);
  EXPECT_EQ(code_of(made({2, 4, 1, {.kernel = 3, .end_padding = -2}, {}}, 4, 6)),
            ErrorCode::kConfig);
  const auto error = made({2, 4, 1, time, {}}, 4, 5);
  EXPECT_STREQ(error->what(),
               "shape: weights do not fit the layer in StreamConv1d, field shape: expected 4 x 6, "
               "found 4 x 5");
}

// --- two dimensions ------------------------------------------------------------------------------

std::vector<double> reference_conv2d(const StreamConv2dConfig& config, const Values& weight,
                                     const Values& bias, const Frames& in) {
  const StreamKernelConfig& time = config.time;
  const std::int64_t per_in = config.in_channels / config.groups;
  const std::int64_t per_out = config.out_channels / config.groups;
  const std::int64_t end_padding = time.end_padding < 0 ? time.right : time.end_padding;
  const std::int64_t out_features = (config.features + config.feature_padding_before +
                                     config.feature_padding_after - config.feature_kernel) /
                                        config.feature_stride +
                                    1;
  const auto place = [](FeatureLayout layout, std::int64_t f, std::int64_t features, std::int64_t c,
                        std::int64_t channels) {
    return layout == FeatureLayout::kChannelsLast ? f * channels + c : c * features + f;
  };
  std::vector<double> out;
  for (std::int64_t j = 0;; ++j) {
    const std::int64_t newest = j * time.stride + time.right;
    if (newest >= in.rows + end_padding || in.rows == 0) break;
    std::vector<double> row(static_cast<std::size_t>(out_features * config.out_channels));
    for (std::int64_t f = 0; f < out_features; ++f)
      for (std::int64_t o = 0; o < config.out_channels; ++o) {
        double sum = static_cast<double>(bias[o]);
        for (std::int64_t c = 0; c < per_in; ++c)
          for (std::int64_t i = 0; i < time.kernel; ++i)
            for (std::int64_t k = 0; k < config.feature_kernel; ++k) {
              const std::int64_t t = newest - (time.kernel - 1 - i) * time.dilation;
              const std::int64_t g = f * config.feature_stride + k - config.feature_padding_before;
              if (t < 0 || t >= in.rows || g < 0 || g >= config.features) continue;
              const std::int64_t channel = o / per_out * per_in + c;
              sum += static_cast<double>(
                         weight[((o * per_in + c) * time.kernel + i) * config.feature_kernel + k]) *
                     static_cast<double>(in.at(t, place(config.in_layout, g, config.features,
                                                        channel, config.in_channels)));
            }
        row[place(config.out_layout, f, out_features, o, config.out_channels)] = sum;
      }
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

TEST(StreamConv2d, EqualsTheWholeSequenceInAnyChunks) {
  using K = StreamKernelConfig;
  constexpr auto kFirst = FeatureLayout::kChannelsFirst;
  constexpr auto kLast = FeatureLayout::kChannelsLast;
  const std::vector<std::pair<const char*, StreamConv2dConfig>> cases{
      {"nemo_causal", {1, 6, 1, K::nemo_causal(3, 2), 10, 3, 2, 2, 1, kLast, kLast}},
      {"symmetric", {2, 3, 1, K::same(3, 2), 9, 3, 2, 1, 1, kFirst, kFirst}},
      {"valid", {1, 5, 1, K::valid(3, 2), 11, 3, 2, 0, 0, kLast, kFirst}},
      {"valid_deep", {5, 19, 1, K::valid(3, 2), 5, 3, 2, 0, 0, kFirst, kLast}},
      {"depthwise", {18, 18, 18, K::nemo_causal(3, 2), 6, 3, 2, 2, 1, kLast, kFirst}},
      {"pointwise", {4, 7, 1, K::causal(1), 6, 1, 1, 0, 0, kFirst, kLast}},
      {"dilated", {2, 3, 1, K::causal(3, 1, 2), 5, 3, 1, 1, 1, kLast, kLast}},
  };
  Random random(4);
  for (const auto& [name, config] : cases) {
    SCOPED_TRACE(name);
    const std::int64_t fan_in =
        config.in_channels / config.groups * config.time.kernel * config.feature_kernel;
    const Values weight = random_values(random, config.out_channels * fan_in);
    const Values bias = random_values(random, config.out_channels);
    const StreamConv2d conv(config, WeightMatrix::of(weight.data(), config.out_channels, fan_in),
                            bias.data());
    for (const std::int64_t frames : {0, 1, 2, 5, 40}) {
      const Frames in = Frames::random(random, frames, conv.in_width());
      expect_close(run_whole(conv, in), reference_conv2d(config, weight, bias, in), kTolerance);
      expect_exact_streaming(conv, in, random.next(), frames == 40 ? 1000 : 20);
    }
    expect_declared_latency(conv, 20);

    Frames in = Frames::random(random, 30, conv.in_width());
    const Frames clean = run_whole(conv, in);
    in.row(10)[0] = std::numeric_limits<float>::quiet_NaN();
    const Frames poisoned = run_whole(conv, in);
    for (std::int64_t j = 0; j < clean.rows; ++j)
      if (conv.timing().first_input(j) > 10 || conv.timing().last_input(j) < 10) {
        for (std::int64_t o = 0; o < clean.width; ++o)
          ASSERT_EQ(poisoned.at(j, o), clean.at(j, o)) << "a NaN beyond its window";
      }
  }
}

TEST(StreamConv2d, RefusesWhatIsNoLayer) {
  const Values weight(256, 1.0F);
  const auto code_of = [&](const StreamConv2dConfig& config, std::int64_t rows, std::int64_t cols) {
    const auto error = error_of(
        [&] { const StreamConv2d conv(config, WeightMatrix::of(weight.data(), rows, cols)); });
    return error.value_or(Error(ErrorCode::kIo, {})).code();
  };
  StreamConv2dConfig config{.in_channels = 2,
                            .out_channels = 4,
                            .time = StreamKernelConfig::causal(3),
                            .features = 5,
                            .feature_kernel = 3};
  EXPECT_EQ(code_of(config, 4, 18), ErrorCode::kIo) << "this one is a layer";
  EXPECT_EQ(code_of(config, 4, 17), ErrorCode::kShape);
  config.groups = 2;
  EXPECT_EQ(code_of(config, 4, 9), ErrorCode::kUnsupported);
  config.groups = 1;
  config.feature_kernel = 6;
  EXPECT_EQ(code_of(config, 4, 36), ErrorCode::kConfig);
  config.feature_kernel = 3;
  config.feature_stride = 0;
  EXPECT_EQ(code_of(config, 4, 18), ErrorCode::kConfig);
  config.feature_stride = 1;
  config.feature_padding_before = -1;
  EXPECT_EQ(code_of(config, 4, 18), ErrorCode::kConfig);
}

// --- transposed ----------------------------------------------------------------------------------

// frame-stream A.2: the bias once for each output, the state without it.
TEST(StreamConvTranspose1d, AddsTheBiasOnce) {
  const Values weight{1, 2, 3, 4};
  const float bias = 0.5F;
  const StreamConvTranspose1d up(1, 1, 4, 2, WeightMatrix::of(weight.data(), 1, 4), &bias);
  EXPECT_EQ(run_whole(up, counting(3)).values, (Values{1.5F, 2.5F, 5.5F, 8.5F, 9.5F, 14.5F}));
  auto state = up.make_state();
  Frames out(6, 1);
  up.step(counting(3).view(), state, out.view());
  EXPECT_EQ(state.sums, (Values{9, 12}));
}

TEST(StreamConvTranspose1d, EqualsTheWholeSequenceInAnyChunks) {
  Random random(5);
  for (const auto& [kernel, stride] : {std::pair{4, 2}, {3, 3}, {2, 5}, {7, 2}, {1, 1}, {5, 1}}) {
    SCOPED_TRACE(testing::Message() << "kernel " << kernel << ", stride " << stride);
    const std::int64_t in_channels = 3;
    const std::int64_t out_channels = 5;
    const Values weight = random_values(random, in_channels * out_channels * kernel);
    const Values bias = random_values(random, out_channels);
    const StreamConvTranspose1d up(
        in_channels, out_channels, kernel, stride,
        WeightMatrix::of(weight.data(), in_channels, out_channels * kernel), bias.data());
    const Frames in = Frames::random(random, 60, in_channels);
    std::vector<double> expected(static_cast<std::size_t>(60 * stride * out_channels));
    for (std::int64_t n = 0; n < 60 * stride; ++n)
      for (std::int64_t o = 0; o < out_channels; ++o) {
        double sum = static_cast<double>(bias[o]);
        for (std::int64_t t = 0; t < 60; ++t) {
          const std::int64_t i = n - t * stride;
          if (i < 0 || i >= kernel) continue;
          for (std::int64_t c = 0; c < in_channels; ++c)
            sum += static_cast<double>(in.at(t, c)) *
                   static_cast<double>(weight[(c * out_channels + o) * kernel + i]);
        }
        expected[n * out_channels + o] = sum;
      }
    expect_close(run_whole(up, in), expected, kTolerance);
    expect_exact_streaming(up, in, random.next());
    EXPECT_EQ(up.state_bytes(), static_cast<std::size_t>(std::max(kernel - stride, 0)) * 5 * 4);
  }
  const Values weight(12, 1.0F);
  const auto error = error_of(
      [&] { const StreamConvTranspose1d up(1, 2, 4, 2, WeightMatrix::of(weight.data(), 1, 9)); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kShape);
}

// What the convolutions are made of, at every number of rows and around panels.
TEST(PackedLinear, EveryNumberOfRowsGivesTheSameBits) {
  Random random(6);
  for (const std::int64_t rows : {1, 5, 16, 63, 64, 65, 129, 200})
    for (const std::int64_t cols : {1, 7, 40}) {
      const Values weight = random_values(random, rows * cols);
      const Values bias = random_values(random, rows);
      const PackedLinear linear(WeightMatrix::of(weight.data(), rows, cols), bias.data());
      const Frames x = Frames::random(random, 14, cols);
      Frames whole(14, rows);
      linear.apply(x.view(), whole.view());
      std::vector<double> expected;
      for (std::int64_t t = 0; t < 14; ++t)
        for (std::int64_t r = 0; r < rows; ++r) {
          double sum = static_cast<double>(bias[r]);
          for (std::int64_t c = 0; c < cols; ++c)
            sum += static_cast<double>(weight[r * cols + c]) * static_cast<double>(x.at(t, c));
          expected.push_back(sum);
        }
      expect_close(whole, expected, kTolerance);
      for (std::int64_t count = 1; count < 14; ++count) {
        Frames part(count, rows);
        linear.apply(x.view().middle_rows(1, count), part.view());
        EXPECT_TRUE(
            test::same_bits(part.values, std::span<const float>(whole.row(1), part.values.size())));
      }
    }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
