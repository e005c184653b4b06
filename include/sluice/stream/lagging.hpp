// SPDX-License-Identifier: MIT
/// How far a simultaneous output lags behind its source, and how much of the possible overlap of
/// reading and writing a run achieved. A figure that its inputs do not define is a quiet NaN, never
/// 0, which would read as a perfect lag. Nothing here allocates, throws or reads a clock.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace sluice {

/// Average lagging measures, in source units (words, sentences, frames: the unit of the delays).
/// Negative if the output is ahead of the diagonal.
struct Lagging {
  double al = std::numeric_limits<double>::quiet_NaN();    ///< average lagging
  double laal = std::numeric_limits<double>::quiet_NaN();  ///< length-adaptive average lagging
};

/// AL (Ma et al., arXiv 1810.08398, section 4) and LAAL (Papi et al., arXiv 2206.05807) of one
/// output: the mean of d_t - t * num_source / length over its units t = 0, 1, ... up to the first
/// one written with the whole source read, that one included. length is `reference_length` for AL
/// and max(delays.size(), reference_length) for LAAL, so that an output longer than the reference
/// is not rewarded.
///
/// delays: [output units], d_t is the number of source units read when output unit t ended; it
/// never decreases. num_source: units of the source, without prompt and instruction.
/// reference_length: units of the reference; its own length where there is none makes AL and LAAL
/// equal.
///
/// As in SimulEval and the GPE code (arXiv 2505.16983) a delay above num_source is left out, and if
/// the first one is, both measures are that delay. Deviation from the AL paper: the slope comes
/// from the reference's length, not the output's. Not defined, hence NaN: both without any output,
/// AL if reference_length < 1.
inline Lagging lagging(std::span<const std::int64_t> delays, std::int64_t num_source,
                       std::int64_t reference_length) {
  if (delays.empty()) return {};
  if (delays.front() > num_source) {
    const double whole = static_cast<double>(delays.front());
    return {whole, whole};
  }
  double sum_delays = 0;
  double sum_ranks = 0;  // of t over the summed units
  std::int64_t summed = 0;
  for (std::size_t t = 0; t < delays.size(); ++t) {
    if (delays[t] > num_source) continue;
    sum_delays += static_cast<double>(delays[t]);
    sum_ranks += static_cast<double>(t);
    ++summed;
    if (delays[t] == num_source) break;
  }
  const auto mean_lag = [&](std::int64_t length) {
    const double slope = static_cast<double>(num_source) / static_cast<double>(length);
    return (sum_delays - slope * sum_ranks) / static_cast<double>(summed);
  };
  Lagging result;
  if (reference_length >= 1) result.al = mean_lag(reference_length);
  result.laal = mean_lag(std::max(static_cast<std::int64_t>(delays.size()), reference_length));
  return result;
}

/// The most that running source and target side by side can speed a stream up: (1 + r) / max(1, r),
/// between 1 and 2, with r = source time / target time (Speak While Watching, arXiv 2601.06843; r =
/// (m / R_v) / (k / R_t) there). 1 for r = 0 and r = infinity: nothing to overlap. NaN for a
/// negative r.
inline double overlap_bound(double r) {
  if (r < 0) return std::numeric_limits<double>::quiet_NaN();
  if (std::isinf(r)) return 1;
  return (1 + r) / std::max(1.0, r);
}

/// The part of that bound which a run reached: (sequential_time / concurrent_time) /
/// overlap_bound(source_time / target_time). 1: overlapped perfectly; max(1, r) / (1 + r): no
/// faster than one after the other; below that: overlapping cost time.
///
/// Four measured durations in one unit, say seconds: the whole stream done one after the other, the
/// same stream done side by side, and the sums of what its source and its target work take by
/// themselves. Source and target are totals: with a barrier in each round the reachable speed-up is
/// sum(s + t) / sum(max(s, t)), which is less when rounds are uneven. Sequential overheads outside
/// the two sums can bring it above 1.
///
/// Where source_time and target_time are both 0 the bound is 1. NaN if sequential_time or
/// concurrent_time is not positive (nothing was measured), or any time is negative or not finite.
inline double overlap_efficiency(double sequential_time, double concurrent_time, double source_time,
                                 double target_time) {
  const bool measured = sequential_time > 0 && concurrent_time > 0 && source_time >= 0 &&
                        target_time >= 0 && std::isfinite(sequential_time) &&
                        std::isfinite(concurrent_time) && std::isfinite(source_time) &&
                        std::isfinite(target_time);
  if (!measured) return std::numeric_limits<double>::quiet_NaN();
  const double ratio =
      target_time > 0 ? source_time / target_time : std::numeric_limits<double>::infinity();
  return sequential_time / concurrent_time / overlap_bound(ratio);
}

}  // namespace sluice
