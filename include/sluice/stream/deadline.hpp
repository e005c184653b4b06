// SPDX-License-Identifier: MIT
/// Deadlines of frames: how well a stream held them, and what to leave out to hold the next one.
/// Nothing here reads a clock.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/work_counter.hpp"

namespace sluice {

// --- Measuring -----------------------------------------------------------------------------------

/// What the display deadlines of a stream count from. Frame i is due at t0 + (i + 1) / rate.
enum class DeadlineAnchor : std::uint8_t {
  kStreamStart,  ///< t0 is when the stream began: start-up time counts against the first frames
  kFirstFrame,   ///< t0 is one period before the first frame was finished: that one is in time
};

/// How a stream held its deadlines. Times in milliseconds; NaN where too few frames define none.
struct DeadlineReport {
  std::int64_t frames = 0;   ///< finished
  std::int64_t misses = 0;   ///< finished after their deadline
  std::int64_t skipped = 0;  ///< reported by on_skipped(): neither finished nor missed
  double miss_rate = std::numeric_limits<double>::quiet_NaN();  ///< misses / frames
  /// Times between frames finished one after the other: their mean, their standard deviation (of
  /// the population), 99th less 50th percentile (nearest rank, each to 1/256), the largest.
  double mean_gap_ms = std::numeric_limits<double>::quiet_NaN();
  double gap_deviation_ms = std::numeric_limits<double>::quiet_NaN();
  double gap_p99_less_p50_ms = std::numeric_limits<double>::quiet_NaN();
  double largest_gap_ms = std::numeric_limits<double>::quiet_NaN();
  /// The latest finish against its frame's time i / rate: a display that begins so long after the
  /// stream's start misses nothing.
  double start_up_delay_ms = std::numeric_limits<double>::quiet_NaN();
};

/// Counts frames against deadlines that the caller knows: a frame that came when it came is due so
/// long after that. One thread finishes frames, one (the same or another) leaves them out; any
/// thread may ask for a report() at any time and gets figures that lag a little. Allocates at
/// construction only.
class DeadlineRecord {
 public:
  /// A frame was finished. Frames are finished in order.
  void on_frame(std::int64_t deadline_ns, std::int64_t now_ns) noexcept {
    const std::int64_t frames = frames_.get();
    if (frames > 0) {
      const std::int64_t gap_ns = now_ns - last_ns_;
      gaps_.record(gap_ns);
      const auto gap = static_cast<double>(gap_ns);
      const double before = gap - mean_gap_.get();
      mean_gap_.add(before / static_cast<double>(frames));
      gap_squares_.add(before * (gap - mean_gap_.get()));
    }
    if (now_ns > deadline_ns) misses_.add(1);
    last_ns_ = now_ns;
    frames_.add(1);
  }
  /// A frame was left out on purpose.
  void on_skipped() noexcept { skipped_.add(1); }

  std::int64_t frames() const noexcept { return frames_.get(); }

  /// All but start_up_delay_ms, which no deadlines tell.
  DeadlineReport report() const {
    DeadlineReport report;
    report.frames = frames_.get();
    report.misses = std::min(misses_.get(), report.frames);  // one may be counted in between
    report.skipped = skipped_.get();
    if (report.frames > 0)
      report.miss_rate = static_cast<double>(report.misses) / static_cast<double>(report.frames);
    if (report.frames > 1) {
      report.mean_gap_ms = mean_gap_.get() * 1e-6;
      report.gap_deviation_ms =
          std::sqrt(gap_squares_.get() / static_cast<double>(report.frames - 1)) * 1e-6;
      report.gap_p99_less_p50_ms =
          static_cast<double>(gaps_.quantile_ns(0.99) - gaps_.quantile_ns(0.5)) * 1e-6;
      report.largest_gap_ms = static_cast<double>(gaps_.max_ns()) * 1e-6;
    }
    return report;
  }

 private:
  LatencyHistogram gaps_;
  WorkCounter<double> mean_gap_;
  WorkCounter<double> gap_squares_;  // sum of squared deviations
  WorkCounter<> frames_;
  WorkCounter<> misses_;
  WorkCounter<> skipped_;
  std::int64_t last_ns_ = 0;  // of the thread that finishes frames
};

/// Measures one stream against its frame rate. Deadlines are formed from the frame's number, never
/// by adding periods up, so they do not drift. One thread at a time; allocates at construction
/// only. Definitions: those of StreamDiffusionV2's evaluation (arXiv 2511.07399), made exact.
class DeadlineMeter {
 public:
  /// rate: frames a second. start_ns: when the stream began, on the caller's clock.
  /// \throws Error(kConfig) unless the rate is above 0 and finite.
  DeadlineMeter(double rate, DeadlineAnchor anchor, std::int64_t start_ns)
      : period_ns_(1e9 / checked(rate)),
        anchor_(anchor),
        start_ns_(start_ns),
        origin_ns_(start_ns) {}

  /// When frame `index` (from 0) is due, on the caller's clock. With kFirstFrame the time is that
  /// of kStreamStart until a first frame was finished.
  std::int64_t deadline_ns(std::int64_t index) const noexcept {
    return origin_ns_ + offset_ns(index + 1);
  }
  std::int64_t period_ns() const noexcept { return offset_ns(1); }

  /// Frame `index` was finished at `now_ns`. Frames may be left out, but come in order.
  void on_frame(std::int64_t index, std::int64_t now_ns) noexcept {
    if (record_.frames() == 0 && anchor_ == DeadlineAnchor::kFirstFrame)
      origin_ns_ = now_ns - offset_ns(index + 1);
    record_.on_frame(deadline_ns(index), now_ns);
    start_up_ns_ = std::max(start_up_ns_, now_ns - start_ns_ - offset_ns(index));
  }

  /// A frame was left out on purpose.
  void on_skipped() noexcept { record_.on_skipped(); }

  DeadlineReport report() const {
    DeadlineReport report = record_.report();
    if (report.frames > 0) report.start_up_delay_ms = static_cast<double>(start_up_ns_) * 1e-6;
    return report;
  }

 private:
  static double checked(double rate) {
    if (!(rate > 0) || !std::isfinite(rate))
      throw Error(ErrorCode::kConfig, {"option out of range", "DeadlineMeter", "rate",
                                       "frames a second, above 0", std::to_string(rate)});
    return rate;
  }
  std::int64_t offset_ns(std::int64_t frames) const noexcept {
    return std::llround(static_cast<double>(frames) * period_ns_);
  }

  double period_ns_;
  DeadlineAnchor anchor_;
  std::int64_t start_ns_;
  std::int64_t origin_ns_;  // t0
  DeadlineRecord record_;
  std::int64_t start_up_ns_ = std::numeric_limits<std::int64_t>::min();
};

// --- Predicting ----------------------------------------------------------------------------------

/// What a step costs: an exponentially weighted mean, and the 99th percentile (nearest rank) of the
/// latest `window` costs. One thread at a time; allocates at construction only.
class StepCost {
 public:
  /// weight: that of the newest cost in the mean, in (0, 1].
  /// \throws Error(kConfig) naming the field.
  explicit StepCost(double weight = 0.125, std::int64_t window = 128)
      : weight_(weight), latest_(checked(weight, window)), sorted_(latest_.size()) {}

  void record(std::int64_t cost_ns) noexcept {
    const auto cost = static_cast<double>(cost_ns);
    mean_ = count_ == 0 ? cost : mean_ + weight_ * (cost - mean_);
    latest_[static_cast<std::size_t>(count_) % latest_.size()] = cost_ns;
    ++count_;
    const std::size_t held = std::min(static_cast<std::size_t>(count_), latest_.size());
    std::copy_n(latest_.data(), held, sorted_.data());
    const auto rank = static_cast<std::size_t>(std::ceil(0.99 * static_cast<double>(held)));
    std::nth_element(sorted_.data(), sorted_.data() + (rank - 1), sorted_.data() + held);
    p99_ns_ = sorted_[rank - 1];
  }

  std::int64_t count() const noexcept { return count_; }
  /// 0 before the first cost.
  std::int64_t mean_ns() const noexcept { return std::llround(mean_); }
  std::int64_t p99_ns() const noexcept { return p99_ns_; }
  /// What the next step is taken to cost: the larger of the two. The mean follows a change within a
  /// few steps, the percentile remembers the spread.
  std::int64_t predicted_ns() const noexcept { return std::max(mean_ns(), p99_ns_); }

 private:
  static std::size_t checked(double weight, std::int64_t window) {
    if (!(weight > 0 && weight <= 1))
      throw Error(ErrorCode::kConfig, {"option out of range", "StepCost", "weight",
                                       "above 0, at most 1", std::to_string(weight)});
    if (window < 1 || window > 65536)
      throw Error(ErrorCode::kConfig, {"option out of range", "StepCost", "window", "1 to 65536",
                                       std::to_string(window)});
    return static_cast<std::size_t>(window);
  }

  double weight_;
  Buffer<std::int64_t> latest_;  // [window], a ring
  Buffer<std::int64_t> sorted_;  // [window], work space
  double mean_ = 0;
  std::int64_t p99_ns_ = 0;
  std::int64_t count_ = 0;
};

// --- Shedding ------------------------------------------------------------------------------------

/// What a stream does about a frame whose work will not be done in time.
enum class Shedding : std::uint8_t {
  kNone,          ///< all of it, late
  kSkipFrame,     ///< leave the frame out
  kShortenWrite,  ///< less of it: the largest amount of the list that fits, else the smallest
};

/// Options of a WorkShedder.
struct SheddingConfig {
  Shedding policy = Shedding::kNone;
  /// Amounts of work that a step can have (tokens to write, diffusion steps, frames of a chunk),
  /// largest first: all that is ever asked for, so that buffers and graphs can be made beforehand.
  std::vector<std::int64_t> amounts{1};
  double weight = 0.125;      ///< see StepCost
  std::int64_t window = 128;  ///< see StepCost, per amount
  /// After so many frames skipped in a row the next is done whatever it costs: a cost is known only
  /// by paying it. forget_skips() begins the row anew.
  std::int64_t max_skips = 8;
  /// Every so many shortened steps the next larger amount is tried, in case it has become cheaper;
  /// 0: never.
  std::int64_t retry_every = 32;
};

/// Picks the work of each step from a fixed list by what steps of that amount cost lately. An
/// amount that was never tried is taken to fit. One thread at a time; allocates at construction
/// only.
class WorkShedder {
 public:
  struct Choice {
    bool skip = false;        ///< leave the frame out; `index` means nothing then
    std::size_t index = 0;    ///< in amounts
    std::int64_t amount = 0;  ///< amounts[index]
  };
  struct Counts {
    std::int64_t full = 0;       ///< steps of the largest amount
    std::int64_t shortened = 0;  ///< steps of another
    std::int64_t skipped = 0;
    std::int64_t forced =
        0;  ///< steps that were not expected to fit: the smallest, after max_skips
  };

  /// \throws Error(kConfig) naming the field.
  explicit WorkShedder(SheddingConfig config) : config_(checked(std::move(config))) {
    costs_.reserve(config_.amounts.size());
    for (std::size_t i = 0; i < config_.amounts.size(); ++i)
      costs_.emplace_back(config_.weight, config_.window);
  }

  /// What to do in the `slack_ns` that are left until the deadline (negative: it has passed).
  Choice decide(std::int64_t slack_ns) noexcept {
    const auto fits = [&](std::size_t index) {
      return costs_[index].predicted_ns() <= slack_ns;
    };
    switch (config_.policy) {
      case Shedding::kNone: break;
      case Shedding::kSkipFrame:
        if (fits(0) && slack_ns > 0) break;
        if (skips_in_row_ < config_.max_skips) {
          ++skips_in_row_;
          ++counts_.skipped;
          return {.skip = true};
        }
        ++counts_.forced;
        break;
      case Shedding::kShortenWrite: {
        const std::size_t last = costs_.size() - 1;
        std::size_t index = 0;
        while (index < last && !fits(index)) ++index;
        if (!fits(index)) ++counts_.forced;
        if (index == 0) {
          since_retry_ = 0;
        } else if (config_.retry_every > 0 && ++since_retry_ >= config_.retry_every) {
          since_retry_ = 0;
          --index;
        }
        return chosen(index);
      }
    }
    skips_in_row_ = 0;
    return chosen(0);
  }

  /// What was skipped so far was of something that has ended (an utterance, a reply): what comes
  /// next may be skipped max_skips times itself. Costs and counts stay.
  void forget_skips() noexcept { skips_in_row_ = 0; }

  /// A step of the amount with that index took so long.
  void on_step(std::size_t index, std::int64_t cost_ns) noexcept {
    SLUICE_ASSERT(index < costs_.size());
    costs_[index].record(cost_ns);
  }

  const StepCost& cost(std::size_t index) const { return costs_[index]; }
  const Counts& counts() const noexcept { return counts_; }
  const SheddingConfig& config() const noexcept { return config_; }

 private:
  static SheddingConfig checked(SheddingConfig config) {
    const auto fail = [](const char* field, const char* expected, std::int64_t found) {
      throw Error(ErrorCode::kConfig, {"option out of range", "SheddingConfig", field, expected,
                                       std::to_string(found)});
    };
    if (config.amounts.empty()) fail("amounts", "at least one", 0);
    for (std::size_t i = 1; i < config.amounts.size(); ++i)
      if (config.amounts[i] >= config.amounts[i - 1])
        fail("amounts", "largest first, no two alike", config.amounts[i]);
    if (config.max_skips < 0) fail("max_skips", "at least 0", config.max_skips);
    if (config.retry_every < 0) fail("retry_every", "at least 0", config.retry_every);
    return config;
  }

  Choice chosen(std::size_t index) noexcept {
    ++(index == 0 ? counts_.full : counts_.shortened);
    return {.index = index, .amount = config_.amounts[index]};
  }

  SheddingConfig config_;
  std::vector<StepCost> costs_;  // one an amount
  Counts counts_;
  std::int64_t skips_in_row_ = 0;
  std::int64_t since_retry_ = 0;  // shortened steps
};

// --- Motion-aware noise --------------------------------------------------------------------------

/// How much noise a streamed video-to-video step begins with, and so how many steps it costs: less
/// where the picture moves. StreamDiffusionV2 (arXiv 2511.07399), as its released code has it.
class MotionNoise {
 public:
  /// initial: share of noise, 0 to 1, for a still picture.
  explicit MotionNoise(double initial) : initial_(initial), noise_(initial) {}

  /// largest_difference: the largest root mean square difference of two neighbouring frames among
  /// the new ones, the last old one included, pixels in [-1, 1]. Returns the share of noise from
  /// now on.
  double update(double largest_difference) noexcept {
    const double motion = std::clamp(largest_difference / 0.2, 0.0, 1.0);
    noise_ = 0.9 * (initial_ - 0.1 * motion) + 0.1 * noise_;
    return noise_;
  }
  double noise() const noexcept { return noise_; }
  /// The denoising step to begin with, of 1000.
  std::int64_t first_step() const noexcept {
    return static_cast<std::int64_t>(std::floor(1000.0 * noise_)) - 100;
  }

 private:
  double initial_;
  double noise_;
};

}  // namespace sluice
