// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_pool.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include <gtest/gtest.h>

#include "support/frame_stream.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::error_of;
using test::expect_close;
using test::expect_declared_latency;
using test::expect_exact_streaming;
using test::Frames;
using test::run_whole;

using Values = std::vector<float>;

// frame-stream A.4: windows of 6 over cells of 2.
TEST(StreamPool1d, WindowsShareCellsAtAlignedHopsOnly) {
  const Frames in(1, Values{3, 1, 4, 1, 5, 9, 2, 6, 5, 3});
  const StreamPool1d pool(Pooling::kMax, 1, 2, 2);
  auto state = pool.make_state();
  const auto windows = [&](std::int64_t hop) {
    Frames out(16, 1);
    const std::int64_t rows = windowed_inference(pool, in.view(), 6, hop, state, out.view());
    return Values(out.values.begin(), out.values.begin() + rows);
  };
  EXPECT_EQ(windows(2), (Values{3, 4, 9, 4, 9, 6, 9, 6, 5}));
  EXPECT_EQ(windows(3), (Values{3, 4, 9, 5, 9, 6}));
  // What a stream computes once: its cells are those of every window at an aligned hop.
  EXPECT_EQ(run_whole(pool, in).values, (Values{3, 4, 9, 6, 5}));
  const std::array chain{pool.timing(), pool.timing()};
  EXPECT_TRUE(reuse_is_exact(std::span(chain).first(1), 2));
  EXPECT_FALSE(reuse_is_exact(std::span(chain).first(1), 3));
  EXPECT_FALSE(reuse_is_exact(chain, 2)) << "the product of both strides";
  EXPECT_TRUE(reuse_is_exact(chain, 4));
}

// A.4: the largest change of a reused cell of a cosine sum, measured, against the bound.
TEST(StreamPool1d, MisalignedReuseStaysWithinItsBound) {
  struct Case {
    std::int64_t stride, terms;
    double sample_rate, measured, bound;
  };
  const std::vector<Case> cases{{2, 1, 256, .024541, .024544},
                                {4, 1, 256, .073609, .073631},
                                {8, 1, 256, .171582, .171806},
                                {8, 5, 256, 2.223444, 4.295146},
                                {8, 5, 1024, .566294, 1.073787}};
  for (const Case& c : cases) {
    const double bound =
        pooling_reuse_bound(c.stride, c.sample_rate, cosine_sum_slope_bound(c.terms, 1.0));
    EXPECT_NEAR(bound, c.bound, 5e-7);
    // A cell that was computed s samples early stands for one at this place, for every s. Over ten
    // seconds and at every sample.
    const auto samples = static_cast<std::int64_t>(10 * c.sample_rate);
    Frames in(samples, 1);
    for (std::int64_t t = 0; t < samples; ++t) {
      double sum = 0.0;
      for (std::int64_t k = 1; k <= c.terms; ++k)
        sum += std::cos(2.0 * std::numbers::pi * static_cast<double>(k * t) / c.sample_rate);
      in.values[t] = static_cast<float>(sum);
    }
    const StreamPool1d pool(Pooling::kMax, 1, c.stride, 1);  // a cell at every sample
    const Frames cells = run_whole(pool, in);
    double largest = 0.0;
    for (std::int64_t shift = 1; shift < c.stride; ++shift)
      for (std::int64_t t = shift; t < cells.rows; ++t)
        largest = std::max(largest, std::fabs(static_cast<double>(cells.values[t]) -
                                              static_cast<double>(cells.values[t - shift])));
    EXPECT_NEAR(largest, c.measured, 2e-6) << "stride " << c.stride;  // float32 samples
    EXPECT_LE(largest, bound);
  }
}

TEST(StreamPool1d, EqualsTheWholeSequenceInAnyChunks) {
  struct Case {
    std::int64_t kernel, stride, padding;
  };
  Random random(1);
  for (const Pooling pooling : {Pooling::kMax, Pooling::kAverage}) {
    for (const Case& c : {Case{4, 4, 0}, Case{1, 1, 0}, Case{3, 1, 1}, Case{3, 2, 1}, Case{2, 5, 0},
                          Case{5, 2, 0}, Case{4, 2, 2}}) {
      SCOPED_TRACE(testing::Message()
                   << c.kernel << " every " << c.stride << " padded " << c.padding
                   << (pooling == Pooling::kMax ? " max" : " mean"));
      const std::int64_t width = 5;
      const StreamPool1d pool(pooling, width, c.kernel, c.stride, c.padding);
      for (const std::int64_t frames : {0, 1, 2, 3, 50}) {
        const Frames in = Frames::random(random, frames, width);
        std::vector<double> expected;
        for (std::int64_t j = 0;
             frames > 0 && j * c.stride - c.padding + c.kernel <= frames + c.padding; ++j)
          for (std::int64_t channel = 0; channel < width; ++channel) {
            double largest = -std::numeric_limits<double>::infinity();
            double sum = 0.0;
            for (std::int64_t i = 0; i < c.kernel; ++i) {
              const std::int64_t t = j * c.stride - c.padding + i;
              if (t < 0 || t >= frames) continue;
              largest = std::max(largest, static_cast<double>(in.at(t, channel)));
              sum += static_cast<double>(in.at(t, channel));
            }
            expected.push_back(pooling == Pooling::kMax ? largest
                                                        : sum / static_cast<double>(c.kernel));
          }
        expect_close(run_whole(pool, in), expected, pooling == Pooling::kMax ? 0.0 : 1e-6);
        expect_exact_streaming(pool, in, random.next(), frames == 50 ? 1000 : 20);
      }
      expect_declared_latency(pool, 30);
      const bool cells = c.kernel == c.stride && c.padding == 0;
      EXPECT_EQ(pool.state_bytes(),
                cells ? static_cast<std::size_t>(width * 4 + 8)
                      : static_cast<std::size_t>((c.kernel - 1) * width * 4 + 17));

      Frames in = Frames::random(random, 40, width);
      const Frames clean = run_whole(pool, in);
      in.row(20)[2] = std::numeric_limits<float>::quiet_NaN();
      const Frames poisoned = run_whole(pool, in);
      for (std::int64_t j = 0; j < clean.rows; ++j)
        for (std::int64_t channel = 0; channel < width; ++channel) {
          const bool sees = channel == 2 && pool.timing().first_input(j) <= 20 &&
                            pool.timing().last_input(j) >= 20;
          ASSERT_EQ(std::isnan(poisoned.at(j, channel)), sees);
          if (!sees) {
            ASSERT_EQ(poisoned.at(j, channel), clean.at(j, channel));
          }
        }
    }
  }
}

TEST(StreamPool1d, RefusesWhatIsNoLayer) {
  const auto refused = [](std::int64_t width, std::int64_t kernel, std::int64_t stride,
                          std::int64_t padding) {
    const auto error =
        error_of([&] { const StreamPool1d pool(Pooling::kMax, width, kernel, stride, padding); });
    return error.has_value() && error->code() == ErrorCode::kConfig;
  };
  EXPECT_FALSE(refused(1, 2, 2, 1));
  EXPECT_TRUE(refused(0, 2, 2, 0));
  EXPECT_TRUE(refused(1, 0, 2, 0));
  EXPECT_TRUE(refused(1, 2, 0, 0));
  EXPECT_TRUE(refused(1, 2, 2, 2));
  EXPECT_TRUE(refused(1, 2, 2, -1));
}

TEST(StreamRunningMean, IsTheMeanOfEverythingSoFar) {
  Random random(2);
  const StreamRunningMean mean(3);
  const Frames in = Frames::random(random, 70, 3);
  std::vector<double> expected;
  for (std::int64_t t = 0; t < in.rows; ++t)
    for (std::int64_t c = 0; c < 3; ++c) {
      double sum = 0.0;
      for (std::int64_t i = 0; i <= t; ++i) sum += static_cast<double>(in.at(i, c));
      expected.push_back(sum / static_cast<double>(t + 1));
    }
  expect_close(run_whole(mean, in), expected, 1e-7);
  expect_exact_streaming(mean, in, 3);
  expect_declared_latency(mean, 5);
}

TEST(StreamDelay, GivesTheFrameOfSoManyAgo) {
  Random random(3);
  for (const std::int64_t frames : {0, 1, 7}) {
    const StreamDelay delay(2, frames);
    const Frames in = Frames::random(random, 30, 2);
    std::vector<double> expected;
    for (std::int64_t t = 0; t < in.rows; ++t)
      for (std::int64_t c = 0; c < 2; ++c)
        expected.push_back(t < frames ? 0.0 : static_cast<double>(in.at(t - frames, c)));
    expect_close(run_whole(delay, in), expected, 0.0);
    expect_exact_streaming(delay, in, 4);
  }
  EXPECT_TRUE(error_of([] { const StreamDelay delay(2, -1); }));
}

TEST(NormalisedDeviation, IsRelativeToTheRange) {
  const Values a{0, 1, 2, 3};
  const Values b{0, 1, 2, 4};
  EXPECT_DOUBLE_EQ(normalised_rms_deviation(a, b), 0.5 / 4.0);
  EXPECT_EQ(normalised_rms_deviation(b, b), 0.0);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
