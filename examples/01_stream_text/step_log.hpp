// SPDX-License-Identifier: MIT
// Latency by parts of a stream, to show that it stays what it was: fixed memory for any length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sluice/stream/latency_histogram.hpp"

namespace stream_text {

/// Steps [from, to) of a stream.
struct StepBin {
  std::int64_t from = 0;
  std::int64_t to = 0;
  sluice::LatencyHistogram latency;
  std::int64_t resident_bytes = 0;  // at the bin's end
};

/// Collects step latencies in consecutive bins of equal length. Where the number of steps is not
/// known before, bins start short and are joined in pairs whenever their room is used up. record()
/// allocates nothing.
class StepLog {
 public:
  /// `total`: steps to come, or below 0. `parts`: bins wanted at the end.
  StepLog(std::int64_t total, int parts);

  void record(std::int64_t duration_ns);

  /// The bins so far, joined to at most `parts` of as equal length as they allow; the last may be
  /// shorter. Ends the log.
  std::vector<StepBin> finish();

 private:
  void join_pairs();

  int parts_;
  std::int64_t width_;
  std::int64_t steps_ = 0;
  std::vector<StepBin> bins_;  // all made at the start; the first used_ are in use
  std::size_t used_ = 0;
};

}  // namespace stream_text
