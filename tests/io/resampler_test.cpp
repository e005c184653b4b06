// SPDX-License-Identifier: MIT
#include "sluice/io/resampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr double kPi = std::numbers::pi;

std::vector<float> tone(double hz, double rate, std::int64_t count) {
  std::vector<float> samples;
  for (std::int64_t i = 0; i < count; ++i)
    samples.push_back(static_cast<float>(std::sin(2 * kPi * hz * static_cast<double>(i) / rate)));
  return samples;
}

template <class NextPiece>
std::vector<float> run(Resampler resampler, const std::vector<float>& in, NextPiece next_piece) {
  std::vector<float> out;
  std::vector<float> piece;
  std::size_t done = 0;
  while (done < in.size()) {
    const std::size_t length = std::min<std::size_t>(next_piece(), in.size() - done);
    piece.resize(
        static_cast<std::size_t>(resampler.max_outputs(static_cast<std::int64_t>(length))));
    const std::int64_t count = resampler.step(std::span(in).subspan(done, length), piece);
    out.insert(out.end(), piece.begin(), piece.begin() + count);
    done += length;
  }
  piece.resize(static_cast<std::size_t>(resampler.max_flush_outputs()));
  const std::int64_t count = resampler.flush(piece);
  EXPECT_LE(count, resampler.max_flush_outputs());
  out.insert(out.end(), piece.begin(), piece.begin() + count);
  return out;
}

std::vector<float> run_whole(const Resampler& resampler, const std::vector<float>& in) {
  return run(resampler, in, [&] { return in.size(); });
}

struct Rates {
  std::int64_t in;
  std::int64_t out;
};
const std::vector<Rates> kRates{{44100, 16000}, {48000, 16000}, {22050, 16000}, {8000, 16000},
                                {16000, 16000}, {16000, 44100}, {11025, 8000},  {3, 2}};

// A tone in the pass band is the same tone at the other rate: the analytic signal is the oracle.
// Ripple and rounding of the float coefficients stay below 2e-5 of full scale.
TEST(Resampler, TonesStayTones) {
  for (const Rates rates : {Rates{44100, 16000}, Rates{48000, 16000}, Rates{22050, 16000},
                            Rates{8000, 16000}, Rates{16000, 44100}}) {
    const auto lower = static_cast<double>(std::min(rates.in, rates.out));
    for (const double share : {0.01, 0.1, 0.3, 0.44}) {
      const double hz = share * lower;
      const std::vector<float> out = run_whole(Resampler(rates.in, rates.out),
                                               tone(hz, static_cast<double>(rates.in), rates.in));
      ASSERT_EQ(out.size(), static_cast<std::size_t>(rates.out));  // a second is a second
      double worst = 0;
      for (std::size_t n = 1000; n + 1000 < out.size(); ++n) {
        const double exact =
            std::sin(2 * kPi * hz * static_cast<double>(n) / static_cast<double>(rates.out));
        worst = std::max(worst, std::abs(static_cast<double>(out[n]) - exact));
      }
      EXPECT_LT(worst, 2e-5) << rates.in << " to " << rates.out << ", " << hz << " Hz";
    }
  }
}

// What the lower rate cannot hold is gone: 90 dB down from half that rate on.
TEST(Resampler, AliasesAreDown) {
  for (const Rates rates : {Rates{44100, 16000}, Rates{48000, 16000}, Rates{22050, 16000}}) {
    for (const double hz : {8050.0, 8500.0, 9500.0, 10500.0}) {
      const std::vector<float> out = run_whole(Resampler(rates.in, rates.out),
                                               tone(hz, static_cast<double>(rates.in), rates.in));
      double loudest = 0;
      for (std::size_t n = 1000; n + 1000 < out.size(); ++n)
        loudest = std::max(loudest, std::abs(static_cast<double>(out[n])));
      EXPECT_LT(20 * std::log10(loudest), -90) << rates.in << ", " << hz << " Hz";
    }
  }
}

TEST(Resampler, ConstantsStayConstants) {
  for (const Rates rates : kRates) {
    const std::vector<float> out =
        run_whole(Resampler(rates.in, rates.out), std::vector<float>(4000, 0.75F));
    const std::size_t edge = out.size() / 4;
    for (std::size_t n = edge; n + edge < out.size(); ++n) ASSERT_NEAR(out[n], 0.75F, 1e-6F);
  }
}

TEST(Resampler, FiniteSamplesStayFinite) {
  std::vector<float> in;
  for (int i = 0; i < 2000; ++i) in.push_back(i / 50 % 2 == 0 ? 3.4e38F : -3.4e38F);
  for (const float sample : run_whole(Resampler(48000, 16000), in))
    ASSERT_TRUE(std::isfinite(sample));
}

TEST(Resampler, AnyChunkingGivesTheSameBitsAndTheSameLength) {
  Random random(5);
  for (const Rates rates : kRates) {
    std::vector<float> in;
    for (int i = 0; i < 3000; ++i) in.push_back(static_cast<float>(random.normal()));
    for (const std::size_t length : {0U, 1U, 2U, 100U, 3000U}) {
      const std::vector<float> part(in.begin(), in.begin() + static_cast<std::ptrdiff_t>(length));
      const Resampler resampler(rates.in, rates.out);
      const std::vector<float> whole = run_whole(resampler, part);
      const auto exact = (static_cast<std::int64_t>(length) * rates.out + rates.in - 1) / rates.in;
      EXPECT_EQ(static_cast<std::int64_t>(whole.size()), exact) << rates.in << " " << length;
      EXPECT_EQ(run(resampler, part, [] { return 1; }), whole);
      for (int trial = 0; trial < 20; ++trial)
        ASSERT_EQ(run(resampler, part, [&] { return random.below(700); }), whole);
    }
  }
}

TEST(Resampler, RefusesConfigurationsByName) {
  using test::expect_error;
  expect_error(ErrorCode::kConfig, {"in_rate"}, [] { Resampler resampler(0, 1); });
  expect_error(ErrorCode::kConfig, {"out_rate"}, [] { Resampler resampler(1, 2'000'000); });
  expect_error(ErrorCode::kConfig, {"zero_crossings"},
               [] { Resampler resampler(1, 2, {.zero_crossings = 0}); });
  expect_error(ErrorCode::kConfig, {"roll_off"},
               [] { Resampler resampler(1, 2, {.roll_off = 1.5}); });
  expect_error(ErrorCode::kConfig, {"kaiser_beta"},
               [] { Resampler resampler(1, 2, {.kaiser_beta = -1}); });
  expect_error(ErrorCode::kUnsupported, {"ratio"}, [] { Resampler resampler(44101, 44100); });
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
