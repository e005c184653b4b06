// SPDX-License-Identifier: MIT
/// What a stream that reads while it writes is measured by, with the start and the end of every
/// clock defined. AL and LAAL follow from the delays (lagging.hpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/core/memory.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/work_counter.hpp"

namespace sluice {

/// All figures of a Duplex at one moment. A time that has not happened yet is NaN.
struct DuplexReport {
  /// From the moment the first source unit was fed to the first target token.
  double ttft_from_first_unit_ms = std::numeric_limits<double>::quiet_NaN();
  /// From the moment the last source unit (so far) was fed to the first target token: what a reader
  /// who waits for the whole source would call TTFT. Negative when writing began before that.
  double ttft_from_last_unit_ms = std::numeric_limits<double>::quiet_NaN();
  /// Source units, and source tokens, that the target saw when it wrote its first token
  /// (StreamingThinker's token wait: a count, no time).
  std::int64_t unit_wait = 0;
  std::int64_t token_wait = 0;
  /// From one written token to the next, READs in between included.
  LatencySummary inter_token;
  /// From the moment a source unit was fed to the first token written with it visible: one value
  /// for each READ that a token follows. Time that a unit spent waiting to be read is part of it.
  LatencySummary unit_to_token;
  std::int64_t units_fed = 0;
  std::int64_t source_tokens = 0;   ///< read into the cache
  std::int64_t units_read = 0;      ///< seen by the target
  std::int64_t tokens_written = 0;  ///< provisional ones count when they are written
  std::int64_t tokens_retracted = 0;
  std::int64_t target_forwards =
      0;  ///< model calls of the target side: more than tokens by those fed again
  /// Sums of the time that each side spent in the model.
  double source_busy_ms = 0;
  double target_busy_ms = 0;
  /// From the first unit fed to the last thing that either side did.
  double wall_ms = 0;

  /// Source work over target work: r in (1 + r) / max(1, r). NaN without target work.
  double work_ratio() const {
    return target_busy_ms > 0 ? source_busy_ms / target_busy_ms
                              : std::numeric_limits<double>::quiet_NaN();
  }
};

/// Collects it. Feeders, the source side and the target side each call their own functions; any
/// thread may ask for a report() at any time and gets figures that lag a little. Allocates at
/// construction only.
class DuplexMetrics {
 public:
  /// delay_capacity: target tokens of which the delay is kept, the first ones (an endless stream
  /// has no AL).
  explicit DuplexMetrics(std::int64_t delay_capacity)
      : delays_(static_cast<std::size_t>(std::max<std::int64_t>(delay_capacity, 0))) {}

  /// A feeder.
  void on_fed(std::int64_t now_ns) noexcept {
    if (units_fed_.get() == 0) first_fed_ns_.set(now_ns);
    last_fed_ns_.set(now_ns);
    units_fed_.add(1);
  }
  /// The source side: a forward of `tokens` ended at `now_ns`.
  void on_source_work(std::int64_t duration_ns, std::int64_t now_ns, std::int64_t tokens) noexcept {
    source_.on_work(duration_ns, tokens);
    source_done_ns_.set(now_ns);
  }
  /// The target side: a forward ended at `now_ns`.
  void on_target_work(std::int64_t duration_ns, std::int64_t now_ns) noexcept {
    target_.on_work(duration_ns, 1);
    target_done_ns_.set(now_ns);
  }
  /// The target side: a READ showed it a unit that was fed at `arrival_ns`.
  void on_read(std::int64_t arrival_ns) noexcept {
    units_read_.add(1);
    unread_arrival_ns_ = arrival_ns;
  }
  /// The target side: a token was written.
  void on_written(std::int64_t now_ns, std::int64_t units_read, std::int64_t tokens_read) noexcept {
    const std::int64_t written = tokens_written_.get();
    if (written == 0) {
      first_written_ns_.set(now_ns);
      unit_wait_.set(units_read);
      token_wait_.set(tokens_read);
    } else {
      inter_token_.record(now_ns - last_written_ns_);
    }
    last_written_ns_ = now_ns;
    if (unread_arrival_ns_ != 0) unit_to_token_.record(now_ns - unread_arrival_ns_);
    unread_arrival_ns_ = 0;
    tokens_written_.add(1);
    target_done_ns_.set(now_ns);
  }
  /// The target side: so many provisional tokens were taken back.
  void on_retracted(std::int64_t tokens) noexcept { tokens_retracted_.add(tokens); }
  /// The target side: a token became final with `units_read` source units visible.
  void on_final(std::int64_t units_read) noexcept {
    const std::int64_t count = finals_.load(std::memory_order_relaxed);
    if (count < static_cast<std::int64_t>(delays_.size()))
      delays_[static_cast<std::size_t>(count)] = units_read;
    finals_.store(count + 1, std::memory_order_release);
  }

  /// Source units visible to each final target token, the first delay_capacity of them: lagging()'s
  /// delays where a token is a target unit. Any thread.
  std::span<const std::int64_t> delays() const noexcept {
    const std::int64_t count = finals_.load(std::memory_order_acquire);
    return delays_.span().first(static_cast<std::size_t>(
        std::min<std::int64_t>(count, static_cast<std::int64_t>(delays_.size()))));
  }

  DuplexReport report() const {
    DuplexReport report;
    const std::int64_t first_fed = first_fed_ns_.get();
    if (tokens_written_.get() > 0 && units_fed_.get() > 0) {
      report.ttft_from_first_unit_ms = ms(first_written_ns_.get() - first_fed);
      report.ttft_from_last_unit_ms = ms(first_written_ns_.get() - last_fed_ns_.get());
    }
    report.unit_wait = unit_wait_.get();
    report.token_wait = token_wait_.get();
    report.inter_token = summarise(inter_token_);
    report.unit_to_token = summarise(unit_to_token_);
    report.units_fed = units_fed_.get();
    report.source_tokens = source_.count.get();
    report.units_read = units_read_.get();
    report.tokens_written = tokens_written_.get();
    report.tokens_retracted = tokens_retracted_.get();
    report.target_forwards = target_.count.get();
    report.source_busy_ms = source_.busy_ms();
    report.target_busy_ms = target_.busy_ms();
    const std::int64_t last = std::max(source_done_ns_.get(), target_done_ns_.get());
    if (report.units_fed > 0 && last > first_fed) report.wall_ms = ms(last - first_fed);
    return report;
  }

 private:
  static double ms(std::int64_t ns) { return static_cast<double>(ns) * 1e-6; }

  Buffer<std::int64_t> delays_;
  LatencyHistogram inter_token_;
  LatencyHistogram unit_to_token_;
  // Feeders.
  alignas(64) WorkCounter<> units_fed_;
  WorkCounter<> first_fed_ns_;
  WorkCounter<> last_fed_ns_;
  // The source side.
  SideCounter source_;  // tokens
  WorkCounter<> source_done_ns_;
  // The target side.
  SideCounter target_;  // forwards
  WorkCounter<> target_done_ns_;
  WorkCounter<> units_read_;
  WorkCounter<> tokens_written_;
  WorkCounter<> tokens_retracted_;
  std::atomic<std::int64_t> finals_{0};  // published: delays before it are written
  WorkCounter<> first_written_ns_;
  WorkCounter<> unit_wait_;
  WorkCounter<> token_wait_;
  std::int64_t last_written_ns_ = 0;
  std::int64_t unread_arrival_ns_ = 0;  // of the newest unit read, until a token follows; 0: none
};

}  // namespace sluice
