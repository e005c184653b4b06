// SPDX-License-Identifier: MIT
// What goes to stderr before and after a run, and the same as JSON.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "options.hpp"
#include "sluice/io/json.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/duplex_engine.hpp"
#include "sluice/stream/duplex_metrics.hpp"
#include "sluice/stream/lagging.hpp"

namespace duplex_text {

/// A finished run.
struct Outcome {
  std::string ending;
  sluice::DuplexReport metrics;
  std::int64_t source_units = 0;  ///< fed, without prompt and closing
  std::int64_t tokens = 0;        ///< final ones
  std::int64_t words = 0;         ///< of these
  sluice::Lagging lagging;        ///< of the words, in source units
  std::int64_t cache_bytes = 0;
};

/// Model, groups, policy and layout on stderr.
void print_setting(const sluice::LoadedModel& model, const Options& options,
                   const sluice::DuplexOptions& duplex, std::int64_t cache_bytes);

/// One line, or with `whole` all figures.
void print_report(const Options& options, const Outcome& outcome, bool whole);

/// {"kind": "report", ...}; what was not measured is null.
sluice::Json report_json(const sluice::LoadedModel& model, const Options& options,
                         const Outcome& outcome);

}  // namespace duplex_text
