// SPDX-License-Identifier: MIT
/// The times that a stream reports, all computed from its event log afterwards, each with the start
/// and the end of its clock defined.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/stream/event_log.hpp"
#include "sluice/stream/metrics.hpp"

namespace sluice {

/// What the log does not hold.
struct StreamTimesInput {
  /// When the input ended, in monotonic_ns(); without it, when the last input was accepted.
  std::int64_t input_finished_ns = std::numeric_limits<std::int64_t>::min();
  /// When the input was accepted after which the policy allowed the first output; without it there
  /// is no trigger time.
  std::int64_t trigger_ns = std::numeric_limits<std::int64_t>::min();
  double busy_ns = std::numeric_limits<double>::quiet_NaN();   ///< time spent computing
  double media_ns = std::numeric_limits<double>::quiet_NaN();  ///< length of the audio or video
  /// Length of the source in the unit of the log's source clock; without it, where the last input
  /// stands.
  std::int64_t source_length = std::numeric_limits<std::int64_t>::min();
};

/// Times of one stream, in milliseconds; NaN where what they need did not happen. "Output" is the
/// first sight of a token, final or provisional.
struct StreamTimes {
  static constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

  /// To the first output: from when the first input was accepted, from the last input (negative
  /// while the input goes on), from the trigger.
  double ttft_from_first_input_ms = kNone;
  double ttft_from_last_input_ms = kNone;
  double ttft_from_trigger_ms = kNone;
  /// To the first output that is final, from the first input.
  double final_ttft_from_first_input_ms = kNone;
  /// Source clock of the first output: how much of the source it needed, computation apart.
  double start_offset = kNone;
  /// From the end of the input to the last output: the wait of a listener for the rest.
  double tail_ms = kNone;
  /// From one final token to the next.
  LatencySummary inter_token;
  /// Time spent computing over the length of the media: what everybody calls RTF.
  double real_time_factor = kNone;
  /// SimulEval's "RTF": source clock of the last output over the source's length. Not a time.
  double simuleval_rtf = kNone;
  /// The same with computation: from the first input to the last output, over the media's length.
  double simuleval_rtf_elapsed = kNone;
  std::int64_t final_tokens = 0;
  std::int64_t provisional_tokens = 0;  ///< shown, each time that they were
  /// Tokens that were shown and then were others or gone, and those for each final token.
  std::int64_t revisions = 0;
  double revisions_per_token = kNone;
};

/// Computes them. A stream's provisional tokens are recorded anew each time that they are shown:
/// neighbouring kProvisional events with one source clock are one hypothesis of what follows the
/// final tokens, and it replaces the one before it. A final token takes the place of the
/// hypothesis's first; what is in sight at the end counts as standing. Allocates a histogram.
/// O(events); exact as long as the log dropped none.
inline StreamTimes stream_times(const EventLog& log, const StreamTimesInput& input = {}) {
  constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::min();
  StreamTimes times;
  LatencyHistogram inter_token;
  const Event* first_input = nullptr;
  const Event* last_input = nullptr;
  const Event* first_output = nullptr;
  const Event* last_output = nullptr;
  const Event* last_final = nullptr;
  const Event* first_final = nullptr;
  // The hypothesis in sight is events [begin, end); the one being recorded starts at end.
  std::int64_t begin = 0;
  std::int64_t end = 0;
  const std::int64_t size = log.size();
  for (std::int64_t i = 0; i < size;) {
    const Event& event = log[i];
    if (event.kind == EventKind::kInput) {
      if (first_input == nullptr) first_input = &event;
      last_input = &event;
      ++i;
      continue;
    }
    if (first_output == nullptr) first_output = &event;
    if (event.kind == EventKind::kOutput) {
      if (begin < end && log[begin++].token != event.token) ++times.revisions;
      if (last_final != nullptr) inter_token.record(event.time_ns - last_final->time_ns);
      if (first_final == nullptr) first_final = &event;
      last_final = last_output = &event;
      ++times.final_tokens;
      ++i;
      continue;
    }
    std::int64_t next = i;
    while (next < size && log[next].kind == EventKind::kProvisional &&
           log[next].source_clock == event.source_clock)
      ++next;
    const std::int64_t common = std::min(end - begin, next - i);
    for (std::int64_t k = 0; k < common; ++k)
      if (log[begin + k].token != log[i + k].token) ++times.revisions;
    times.revisions += end - begin - common;
    times.provisional_tokens += next - i;
    last_output = &log[next - 1];
    begin = i;
    end = i = next;
  }

  const auto ms = [](std::int64_t from, std::int64_t to) {
    return static_cast<double>(to - from) * 1e-6;
  };
  times.inter_token = summarise(inter_token);
  times.real_time_factor = input.busy_ns / input.media_ns;
  if (times.final_tokens > 0)
    times.revisions_per_token =
        static_cast<double>(times.revisions) / static_cast<double>(times.final_tokens);
  if (first_output == nullptr) return times;
  times.start_offset = static_cast<double>(first_output->source_clock);
  if (input.trigger_ns != kUnknown)
    times.ttft_from_trigger_ms = ms(input.trigger_ns, first_output->time_ns);
  std::int64_t finished = input.input_finished_ns;
  std::int64_t length = input.source_length;
  if (first_input != nullptr) {
    times.ttft_from_first_input_ms = ms(first_input->time_ns, first_output->time_ns);
    times.ttft_from_last_input_ms = ms(last_input->time_ns, first_output->time_ns);
    if (first_final != nullptr)
      times.final_ttft_from_first_input_ms = ms(first_input->time_ns, first_final->time_ns);
    times.simuleval_rtf_elapsed =
        static_cast<double>(last_output->time_ns - first_input->time_ns) / input.media_ns;
    if (finished == kUnknown) finished = last_input->time_ns;
    if (length == kUnknown) length = last_input->source_clock;
  }
  if (finished != kUnknown) times.tail_ms = ms(finished, last_output->time_ns);
  if (length != kUnknown && length > 0)
    times.simuleval_rtf =
        static_cast<double>(last_output->source_clock) / static_cast<double>(length);
  return times;
}

/// Word emission lag: the mean of emission time less the end of the word in the audio, in
/// milliseconds. Both [words], nanoseconds on one clock (from an alignment, the audio's start being
/// when its first sample was accepted). NaN without a word.
inline double word_emission_lag_ms(std::span<const std::int64_t> emitted_ns,
                                   std::span<const std::int64_t> ended_ns) {
  const std::size_t words = std::min(emitted_ns.size(), ended_ns.size());
  double sum = 0;
  for (std::size_t i = 0; i < words; ++i) sum += static_cast<double>(emitted_ns[i] - ended_ns[i]);
  return words == 0 ? StreamTimes::kNone : sum * 1e-6 / static_cast<double>(words);
}

}  // namespace sluice
