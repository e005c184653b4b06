// SPDX-License-Identifier: MIT
// What goes to stderr before and after a run, and the same as JSON.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "options.hpp"
#include "sluice/io/json.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/metrics.hpp"
#include "step_log.hpp"

namespace stream_text {

/// Why a run ended.
enum class Ending { kLimit, kEndToken, kInputEnd, kQuit, kCacheFull, kSignal };
std::string_view to_string(Ending ending);

/// What --perplexity found.
struct Scores {
  double nll_sum = 0;                // nats
  std::int64_t scored = 0;           // tokens in nll_sum
  std::int64_t position = 0;         // tokens of the stream so far
  std::vector<std::int64_t> tokens;  // of the points
  std::vector<double> perplexity;    // of the points

  double nll_mean() const { return scored == 0 ? 0 : nll_sum / static_cast<double>(scored); }
};

/// A finished run.
struct Outcome {
  Ending ending = Ending::kLimit;
  sluice::StreamMetrics::Report metrics;
  sluice::LatencySummary read_latency;  // of single tokens, with --token-wise
};

/// Bytes that the cache of a session will hold, before it is made.
std::int64_t cache_bytes(const sluice::Decoder& model, const Options& options);

/// Model, cache and sampling on stderr, with a warning where a setting is known to fail.
/// \throws sluice::Error(kCapacity) when the machine has not as much memory as the cache needs.
void print_setting(const sluice::LoadedModel& model, const Options& options);

void print_report(const Options& options, const Outcome& outcome);

/// {"kind": "report", ...}
sluice::Json report_json(const sluice::LoadedModel& model, const Options& options,
                         const Outcome& outcome);

/// {"kind": "perplexity", ...}, as bench/plot.py reads it.
sluice::Json perplexity_json(const sluice::LoadedModel& model, const Options& options,
                             const Outcome& outcome, const Scores& scores);

/// {"kind": "endless", ...}, as bench/plot.py reads it. \throws sluice::Error(kIo).
void write_latency_log(const sluice::LoadedModel& model, const Options& options,
                       const std::vector<StepBin>& bins);

}  // namespace stream_text
