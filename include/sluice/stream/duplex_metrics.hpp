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
    if (get(units_fed_) == 0) first_fed_ns_.store(now_ns, kRelaxed);
    last_fed_ns_.store(now_ns, kRelaxed);
    add(units_fed_, 1);
  }
  /// The source side: a forward of `tokens` ended at `now_ns`.
  void on_source_work(std::int64_t duration_ns, std::int64_t now_ns, std::int64_t tokens) noexcept {
    add(source_busy_ns_, duration_ns);
    add(source_tokens_, tokens);
    source_done_ns_.store(now_ns, kRelaxed);
  }
  /// The target side: a forward ended at `now_ns`.
  void on_target_work(std::int64_t duration_ns, std::int64_t now_ns) noexcept {
    add(target_busy_ns_, duration_ns);
    add(target_forwards_, 1);
    target_done_ns_.store(now_ns, kRelaxed);
  }
  /// The target side: a READ showed it a unit that was fed at `arrival_ns`.
  void on_read(std::int64_t arrival_ns) noexcept {
    add(units_read_, 1);
    unread_arrival_ns_ = arrival_ns;
  }
  /// The target side: a token was written.
  void on_written(std::int64_t now_ns, std::int64_t units_read, std::int64_t tokens_read) noexcept {
    const std::int64_t written = get(tokens_written_);
    if (written == 0) {
      first_written_ns_.store(now_ns, kRelaxed);
      unit_wait_.store(units_read, kRelaxed);
      token_wait_.store(tokens_read, kRelaxed);
    } else {
      inter_token_.record(now_ns - last_written_ns_);
    }
    last_written_ns_ = now_ns;
    if (unread_arrival_ns_ != 0) unit_to_token_.record(now_ns - unread_arrival_ns_);
    unread_arrival_ns_ = 0;
    add(tokens_written_, 1);
    target_done_ns_.store(now_ns, kRelaxed);
  }
  /// The target side: so many provisional tokens were taken back.
  void on_retracted(std::int64_t tokens) noexcept { add(tokens_retracted_, tokens); }
  /// The target side: a token became final with `units_read` source units visible.
  void on_final(std::int64_t units_read) noexcept {
    const std::int64_t count = get(finals_);
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
    const std::int64_t first_fed = get(first_fed_ns_);
    if (get(tokens_written_) > 0 && get(units_fed_) > 0) {
      report.ttft_from_first_unit_ms = ms(get(first_written_ns_) - first_fed);
      report.ttft_from_last_unit_ms = ms(get(first_written_ns_) - get(last_fed_ns_));
    }
    report.unit_wait = get(unit_wait_);
    report.token_wait = get(token_wait_);
    report.inter_token = summarise(inter_token_);
    report.unit_to_token = summarise(unit_to_token_);
    report.units_fed = get(units_fed_);
    report.source_tokens = get(source_tokens_);
    report.units_read = get(units_read_);
    report.tokens_written = get(tokens_written_);
    report.tokens_retracted = get(tokens_retracted_);
    report.target_forwards = get(target_forwards_);
    report.source_busy_ms = ms(get(source_busy_ns_));
    report.target_busy_ms = ms(get(target_busy_ns_));
    const std::int64_t last = std::max(get(source_done_ns_), get(target_done_ns_));
    if (report.units_fed > 0 && last > first_fed) report.wall_ms = ms(last - first_fed);
    return report;
  }

 private:
  using Counter = std::atomic<std::int64_t>;
  static constexpr auto kRelaxed = std::memory_order_relaxed;

  static std::int64_t get(const Counter& counter) noexcept { return counter.load(kRelaxed); }
  /// Each counter has one writing thread at a time.
  static void add(Counter& counter, std::int64_t more) noexcept {
    counter.store(get(counter) + more, kRelaxed);
  }
  static double ms(std::int64_t ns) { return static_cast<double>(ns) * 1e-6; }

  Buffer<std::int64_t> delays_;
  LatencyHistogram inter_token_;
  LatencyHistogram unit_to_token_;
  // Feeders.
  alignas(64) Counter units_fed_{0};
  Counter first_fed_ns_{0};
  Counter last_fed_ns_{0};
  // The source side.
  alignas(64) Counter source_busy_ns_{0};
  Counter source_tokens_{0};
  Counter source_done_ns_{0};
  // The target side.
  alignas(64) Counter target_busy_ns_{0};
  Counter target_forwards_{0};
  Counter target_done_ns_{0};
  Counter units_read_{0};
  Counter tokens_written_{0};
  Counter tokens_retracted_{0};
  Counter finals_{0};
  Counter first_written_ns_{0};
  Counter unit_wait_{0};
  Counter token_wait_{0};
  std::int64_t last_written_ns_ = 0;
  std::int64_t unread_arrival_ns_ = 0;  // of the newest unit read, until a token follows; 0: none
};

}  // namespace sluice
