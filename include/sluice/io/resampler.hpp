// SPDX-License-Identifier: MIT
/// Audio at one rate to another, in pieces of any length: a windowed-sinc filter in polyphase form.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// The filter of a Resampler. The default is flat up to 0.9 of the lower rate's half, and from that
/// half on 90 dB down.
struct ResamplerConfig {
  /// On either side; an output waits for so many samples of the lower rate.
  std::int64_t zero_crossings = 64;
  double roll_off = 0.95;  ///< where the filter is 6 dB down, of the lower rate's half
  double kaiser_beta = 9.5;
};

/// One channel from in_rate to out_rate. Output n stands at input time n in_rate / out_rate,
/// exactly (counters are whole numbers), so hours do not drift; before the first sample and behind
/// the last stand zeros. ceil(N out_rate / in_rate) samples come of N, in any chunks the same bits.
/// Movable, copyable: a copy is a snapshot. Allocates at construction only. Source: J. O. Smith,
/// "Digital Audio Resampling"; window: Kaiser.
class Resampler {
 public:
  /// \throws Error(kConfig) naming the field; kUnsupported if the rates' ratio in lowest terms
  /// needs a table of more than 2^22 coefficients.
  Resampler(std::int64_t in_rate, std::int64_t out_rate, ResamplerConfig config = {}) {
    const auto require = [](bool sound, const char* field, const char* expected, double found) {
      if (!sound)
        throw Error(ErrorCode::kConfig,
                    {"option out of range", "Resampler", field, expected, std::to_string(found)});
    };
    require(in_rate >= 1 && in_rate <= 1'000'000, "in_rate", "1 to 1000000 Hz",
            static_cast<double>(in_rate));
    require(out_rate >= 1 && out_rate <= 1'000'000, "out_rate", "1 to 1000000 Hz",
            static_cast<double>(out_rate));
    require(config.zero_crossings >= 1 && config.zero_crossings <= 1024, "zero_crossings",
            "1 to 1024", static_cast<double>(config.zero_crossings));
    require(config.roll_off > 0 && config.roll_off <= 1, "roll_off", "above 0, at most 1",
            config.roll_off);
    require(config.kaiser_beta >= 0 && config.kaiser_beta <= 40, "kaiser_beta", "0 to 40",
            config.kaiser_beta);
    const std::int64_t common = std::gcd(in_rate, out_rate);
    up_ = out_rate / common;
    down_ = in_rate / common;
    if (up_ == down_) return;  // samples pass through

    // Half the filter's length, in input samples: zeros lie 1 / scale apart.
    const double scale = std::min(1.0, static_cast<double>(up_) / static_cast<double>(down_));
    const double half = static_cast<double>(config.zero_crossings) / scale;
    reach_ = static_cast<std::int64_t>(std::ceil(half));
    taps_ = 2 * reach_;
    constexpr std::int64_t kMostCoefficients = std::int64_t{1} << 22;
    if (up_ > kMostCoefficients / taps_)
      throw Error(ErrorCode::kUnsupported,
                  {"the ratio of sample rates needs too large a table", "Resampler", "rates",
                   "phases times taps at most " + std::to_string(kMostCoefficients),
                   std::to_string(up_) + " times " + std::to_string(taps_)});
    filter_.resize(static_cast<std::size_t>(up_ * taps_));
    std::vector<double> row(static_cast<std::size_t>(taps_));
    for (std::int64_t phase = 0; phase < up_; ++phase) {
      // The output stands phase / up behind the newest input that is not after it.
      const double fraction = static_cast<double>(phase) / static_cast<double>(up_);
      double sum = 0;
      for (std::int64_t i = 0; i < taps_; ++i) {
        const double x = static_cast<double>(i - (reach_ - 1)) - fraction;
        const double inside = 1.0 - (x / half) * (x / half);
        double& value = row[static_cast<std::size_t>(i)];
        value = 0;
        if (inside > 0)
          value =
              sinc(x * scale * config.roll_off) * bessel(config.kaiser_beta * std::sqrt(inside));
        sum += value;
      }
      // A constant stays the constant at every phase.
      for (std::int64_t i = 0; i < taps_; ++i)
        filter_[static_cast<std::size_t>(phase * taps_ + i)] =
            static_cast<float>(row[static_cast<std::size_t>(i)] / sum);
    }
    history_.resize(static_cast<std::size_t>(taps_ + kBlock));
    reset();
  }

  bool passes_through() const noexcept { return up_ == down_; }
  /// Input samples that an output waits for behind its own time.
  std::int64_t look_ahead() const noexcept { return reach_; }
  /// Samples that step() writes at most for `samples` more, and flush().
  std::int64_t max_outputs(std::int64_t samples) const noexcept {
    return (samples * up_ + down_ - 1) / down_ + 1;
  }
  std::int64_t max_flush_outputs() const noexcept { return max_outputs(reach_ + 1); }

  /// Accepts samples, writes what they complete: the number. in: [any number]; out: [at least
  /// max_outputs(in.size())]; they do not overlap. Allocates nothing.
  std::int64_t step(std::span<const float> in, std::span<float> out) noexcept {
    SLUICE_ASSERT(static_cast<std::int64_t>(out.size()) >=
                  max_outputs(static_cast<std::int64_t>(in.size())));
    if (passes_through()) {
      std::copy(in.begin(), in.end(), out.begin());
      return static_cast<std::int64_t>(in.size());
    }
    std::int64_t written = 0;
    while (!in.empty()) {
      const std::size_t taken = std::min(in.size(), history_.size() - held_);
      std::copy_n(in.data(), taken, history_.data() + held_);
      in = in.subspan(taken);
      held_ += taken;
      accepted_ += static_cast<std::int64_t>(taken);
      written += produce(out.data() + written, -1);
    }
    return written;
  }

  /// Ends the stream: writes the rest. Only reset() may follow.
  std::int64_t flush(std::span<float> out) noexcept {
    SLUICE_ASSERT(static_cast<std::int64_t>(out.size()) >= max_flush_outputs());
    if (passes_through()) return 0;
    const std::int64_t total = (accepted_ * up_ + down_ - 1) / down_;
    std::int64_t written = 0;
    while (produced_ + written < total) {
      const std::size_t zeros = history_.size() - held_;
      std::fill_n(history_.data() + held_, zeros, 0.0F);
      held_ += zeros;
      written += produce(out.data() + written, total - produced_ - written);
    }
    return written;
  }

  /// Back to the start of a stream.
  void reset() noexcept {
    accepted_ = produced_ = 0;
    phase_ = 0;
    // reach - 1 zeros stand before the first sample.
    held_ = static_cast<std::size_t>(std::max<std::int64_t>(reach_ - 1, 0));
    std::fill(history_.begin(), history_.end(), 0.0F);
  }

 private:
  static constexpr std::int64_t kBlock = 1024;

  static double sinc(double x) {
    const double angle = std::numbers::pi * x;
    return std::abs(angle) < 1e-9 ? 1.0 : std::sin(angle) / angle;
  }
  // The modified Bessel function of order 0, by its power series.
  static double bessel(double x) {
    double term = 1;
    double sum = 1;
    for (int k = 1; term > 1e-18 * sum; ++k) {
      term *= (x / (2.0 * k)) * (x / (2.0 * k));
      sum += term;
    }
    return sum;
  }

  // Outputs whose window is in history_, at most `most` (all if negative), then drops what no later
  // one needs. The next output's window begins at history_[0].
  std::int64_t produce(float* out, std::int64_t most) noexcept {
    std::int64_t written = 0;
    std::size_t begin = 0;
    while (written != most && begin + static_cast<std::size_t>(taps_) <= held_) {
      const float* const x = history_.data() + begin;
      const float* const w = filter_.data() + phase_ * taps_;
      double sums[4] = {};  // four chains: the order of adding does not depend on the chunks
      std::int64_t i = 0;
      for (; i + 4 <= taps_; i += 4)
        for (std::int64_t k = 0; k < 4; ++k)
          sums[k] += static_cast<double>(x[i + k]) * static_cast<double>(w[i + k]);
      for (; i < taps_; ++i) sums[0] += static_cast<double>(x[i]) * static_cast<double>(w[i]);
      // Finite samples stay finite: the filter overshoots.
      constexpr double kMost = std::numeric_limits<float>::max();
      const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      out[written++] = static_cast<float>(std::clamp(sum, -kMost, kMost));
      phase_ += down_;
      begin += static_cast<std::size_t>(phase_ / up_);
      phase_ %= up_;
    }
    if (most < 0) produced_ += written;
    // A step down by more than the window may begin behind what is held.
    const std::size_t dropped = std::min(begin, held_);
    SLUICE_ASSERT(dropped == begin);
    std::copy(history_.begin() + static_cast<std::ptrdiff_t>(dropped),
              history_.begin() + static_cast<std::ptrdiff_t>(held_), history_.begin());
    held_ -= dropped;
    return written;
  }

  std::int64_t up_ = 1;     // out_rate / gcd
  std::int64_t down_ = 1;   // in_rate / gcd
  std::int64_t reach_ = 0;  // input samples on either side
  std::int64_t taps_ = 0;
  std::vector<float> filter_;   // [up, taps]
  std::vector<float> history_;  // [taps + block]
  std::size_t held_ = 0;        // of history_
  std::int64_t phase_ = 0;      // of the next output, in 1 / up of an input sample
  std::int64_t accepted_ = 0;
  std::int64_t produced_ = 0;  // by step()
};

}  // namespace sluice
