// SPDX-License-Identifier: MIT
/// The latency and throughput of one stream, with the start and the end of every clock defined.
#pragma once

#include <cstdint>

#include "sluice/stream/latency_histogram.hpp"

namespace sluice {

/// A histogram's figures for a report, in milliseconds. All 0 when count is 0. Percentiles are of
/// nearest rank, to 1/256 of their value; min, mean and max are exact.
struct LatencySummary {
  std::int64_t count = 0;
  double min_ms = 0;
  double mean_ms = 0;
  double p50_ms = 0;
  double p95_ms = 0;
  double p99_ms = 0;
  double p99_9_ms = 0;
  double max_ms = 0;
};

/// The figures of a histogram. Allocates nothing.
inline LatencySummary summarise(const LatencyHistogram& histogram) {
  const auto ms = [&](double q) {
    return static_cast<double>(histogram.quantile_ns(q)) * 1e-6;
  };
  return {histogram.count(), ms(0.0), histogram.mean_ns() * 1e-6, ms(0.5), ms(0.95), ms(0.99),
          ms(0.999),         ms(1.0)};
}

/// Measures one stream. The caller tells it what happened and when (monotonic_ns(), or a made-up
/// clock in a test); it reads no clock itself.
///
/// A stream consists of turns: input, then output, each in any number of calls. A turn ends when
/// the caller says so (a chat's answer is complete); a stream of which nobody says so is one turn.
/// A turn that has output but no input has no time to first token.
///
/// One thread at a time. Allocates at construction only; every on_...() call is O(1).
class StreamMetrics {
 public:
  /// All figures at one moment, for printing and for JSON.
  struct Report {
    /// One value a turn: from the moment the turn's first input was accepted to its first output.
    LatencySummary ttft_from_first_input;
    /// One value a turn: from the moment the turn's last input before its first output was accepted
    /// to that output.
    LatencySummary ttft_from_last_input;
    /// One value for every output but a turn's first: from the output before it to this one. Input
    /// processed between the two is part of it.
    LatencySummary inter_token;
    /// Tokens whose processing on_input_done() reported, over the sum of the reported durations:
    /// compute time only. 0 when nothing was reported.
    double prefill_tokens_per_s = 0;
    /// Outputs after each turn's first, over the time from each turn's first output to its last
    /// (1 / mean inter-token latency). 0 with fewer than two outputs in every turn.
    double decode_tokens_per_s = 0;
    std::int64_t tokens_read = 0;
    std::int64_t tokens_written = 0;
    std::int64_t turns = 0;  ///< turns with at least one output
    std::int64_t cache_bytes = 0;
  };

  /// `tokens` input tokens were accepted at `now_ns`: handed over by the source, not yet processed.
  void on_input(std::int64_t now_ns, std::int64_t tokens) noexcept {
    tokens_read_ += tokens;
    if (!has_input_) first_input_ns_ = now_ns;
    has_input_ = true;
    last_input_ns_ = now_ns;
  }

  /// Processing `tokens` accepted tokens took `duration_ns`: from the start of the first layer on
  /// the first of them to the end of the last layer (or of what is computed of it) on the last.
  void on_input_done(std::int64_t duration_ns, std::int64_t tokens) noexcept {
    prefill_ns_ += duration_ns;
    prefill_tokens_ += tokens;
  }

  /// One output token was sampled at `now_ns` and can be handed to the reader.
  void on_output(std::int64_t now_ns) noexcept {
    ++tokens_written_;
    if (has_output_) {
      inter_token_.record(now_ns - last_output_ns_);
    } else {
      ++turns_;
      if (has_input_) {
        ttft_from_first_input_.record(now_ns - first_input_ns_);
        ttft_from_last_input_.record(now_ns - last_input_ns_);
      }
    }
    has_output_ = true;
    last_output_ns_ = now_ns;
  }

  /// The turn is over: the next input is the first of a new turn, and so is the next output.
  void on_turn_end() noexcept { has_input_ = has_output_ = false; }

  /// Bytes that the caches hold reserved now; the last value given is reported.
  void set_cache_bytes(std::int64_t bytes) noexcept { cache_bytes_ = bytes; }

  /// Durations between outputs, for merging over streams.
  const LatencyHistogram& inter_token() const noexcept { return inter_token_; }

  Report report() const {
    Report report;
    report.ttft_from_first_input = summarise(ttft_from_first_input_);
    report.ttft_from_last_input = summarise(ttft_from_last_input_);
    report.inter_token = summarise(inter_token_);
    report.prefill_tokens_per_s = rate_per_s(prefill_tokens_, static_cast<double>(prefill_ns_));
    report.decode_tokens_per_s =
        rate_per_s(inter_token_.count(), static_cast<double>(inter_token_.sum_ns()));
    report.tokens_read = tokens_read_;
    report.tokens_written = tokens_written_;
    report.turns = turns_;
    report.cache_bytes = cache_bytes_;
    return report;
  }

  /// Forgets everything but the cache bytes.
  void reset() noexcept {
    inter_token_.reset();
    ttft_from_first_input_.reset();
    ttft_from_last_input_.reset();
    tokens_read_ = tokens_written_ = turns_ = 0;
    prefill_tokens_ = prefill_ns_ = 0;
    on_turn_end();
  }

 private:
  static double rate_per_s(std::int64_t tokens, double duration_ns) {
    return duration_ns > 0.0 ? static_cast<double>(tokens) / (duration_ns * 1e-9) : 0.0;
  }

  LatencyHistogram inter_token_;
  LatencyHistogram ttft_from_first_input_;
  LatencyHistogram ttft_from_last_input_;
  std::int64_t tokens_read_ = 0;
  std::int64_t tokens_written_ = 0;
  std::int64_t turns_ = 0;
  std::int64_t prefill_tokens_ = 0;
  std::int64_t prefill_ns_ = 0;
  std::int64_t cache_bytes_ = 0;
  std::int64_t first_input_ns_ = 0;  // of this turn
  std::int64_t last_input_ns_ = 0;   // of this turn
  std::int64_t last_output_ns_ = 0;  // of this turn
  bool has_input_ = false;           // in this turn
  bool has_output_ = false;          // in this turn
};

}  // namespace sluice
