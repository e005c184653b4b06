// SPDX-License-Identifier: MIT
/// What a stream that listens is measured by, with the start and the end of every clock defined.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/stream/lag_scores.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/metrics.hpp"

namespace sluice {

/// All figures of a Listener at one moment. What has not happened yet is NaN, or 0 where it counts.
/// Latencies tell something about a speaker only where audio is accepted as it is spoken: they
/// begin when samples were accepted.
struct ListenerReport {
  std::int64_t samples = 0;          ///< accepted
  std::int64_t samples_waiting = 0;  ///< of these not yet processed
  std::int64_t source_rows = 0;      ///< read
  std::int64_t words = 0;            ///< written
  std::int64_t utterances = 0;       ///< that have ended
  std::int64_t target_forwards = 0;  ///< model calls of the target side
  /// Source rows that were read later than one row's time after their last sample was accepted:
  /// missed deadlines of a listener that keeps up with speech.
  std::int64_t late_rows = 0;
  double audio_ms = 0;
  /// Sums of the time that each side worked.
  double source_busy_ms = 0;
  double target_busy_ms = 0;
  /// Work over audio: 1 would be just as fast as speech. Of one core for each side.
  double real_time_factor = std::numeric_limits<double>::quiet_NaN();
  /// Of the work of both sides, and of the target side alone, the share that was done before the
  /// input ended; NaN until it has.
  double work_before_end = std::numeric_limits<double>::quiet_NaN();
  double target_work_before_end = std::numeric_limits<double>::quiet_NaN();
  /// Means over utterances with words, in ms of audio, without computing (lag_scores.hpp): average
  /// lagging with the utterance's own number of words for a reference (AL and LAAL are the same
  /// then), and where in its utterance the first word was written.
  double laal_ms = std::numeric_limits<double>::quiet_NaN();
  double start_offset_ms = std::numeric_limits<double>::quiet_NaN();
  /// From the input's end to the last word.
  double end_to_last_word_ms = std::numeric_limits<double>::quiet_NaN();
  /// One value a source row: from the moment its last sample was accepted to its being read.
  LatencySummary row;
  /// One value an utterance: from the end of its first word, by CTC's label, to its writing.
  LatencySummary first_word;
  /// The same for every word that CTC counted.
  LatencySummary word;
  /// One value an utterance: from its last row with a label to its last word.
  LatencySummary speech_end_to_text;
};

/// Collects it. The caller, the source side and the target side each call their own functions; any
/// thread may ask for a report() at any time and gets figures that lag a little. Allocates at
/// construction only.
class ListenerMetrics {
 public:
  /// row_ns: the time from one source row to the next.
  explicit ListenerMetrics(std::int64_t row_ns) : row_ns_(row_ns) {}

  /// The caller.
  void on_samples(std::int64_t count) noexcept { add(samples_, count); }
  void on_input_end(std::int64_t now_ns) noexcept {
    if (get(input_end_ns_) != 0) return;
    source_busy_at_end_.store(get(source_busy_ns_), kRelaxed);
    target_busy_at_end_.store(get(target_busy_ns_), kRelaxed);
    input_end_ns_.store(now_ns, kRelaxed);
  }
  /// The source side: a step ended that took so many samples and read so many rows.
  void on_source_work(std::int64_t duration_ns, std::int64_t samples, std::int64_t rows) noexcept {
    add(source_busy_ns_, duration_ns);
    add(samples_taken_, samples);
    add(source_rows_, rows);
  }
  /// The source side: a row was read, whose last sample was accepted at `arrival_ns`.
  void on_row(std::int64_t now_ns, std::int64_t arrival_ns) noexcept {
    row_.record(now_ns - arrival_ns);
    if (now_ns - arrival_ns > row_ns_) add(late_rows_, 1);
  }
  /// The target side: a forward ended.
  void on_target_work(std::int64_t duration_ns) noexcept {
    add(target_busy_ns_, duration_ns);
    add(target_forwards_, 1);
  }
  /// The target side: a word was written. spoken_ns: when its end was accepted; 0: not known.
  void on_word(std::int64_t now_ns, std::int64_t spoken_ns, bool first) noexcept {
    add(words_, 1);
    last_word_ns_.store(now_ns, kRelaxed);
    if (spoken_ns == 0) return;
    word_.record(now_ns - spoken_ns);
    if (first) first_word_.record(now_ns - spoken_ns);
  }
  /// The target side: an utterance of `source` ms ended. sounding_ns: when its last row with a
  /// label was accepted; 0: it had none. delays: where its words were written, in ms from its
  /// start.
  void on_utterance(std::int64_t sounding_ns, std::span<const double> delays,
                    double source) noexcept {
    add(utterances_, 1);
    if (delays.empty()) return;
    const double laal = mean_lag(delays, source, source / static_cast<double>(delays.size()));
    add(utterances_with_words_, 1);
    sum_laal_.store(sum_laal_.load(kRelaxed) + laal, kRelaxed);
    sum_start_offset_.store(sum_start_offset_.load(kRelaxed) + delays.front(), kRelaxed);
    // The last word may be written before the last label, by less than its delay.
    const std::int64_t last = get(last_word_ns_);
    if (sounding_ns != 0) speech_end_to_text_.record(last > sounding_ns ? last - sounding_ns : 0);
  }

  ListenerReport report(double sample_rate) const {
    ListenerReport report;
    // In this order: what was taken had been accepted.
    const std::int64_t taken = get(samples_taken_);
    report.samples = get(samples_);
    report.samples_waiting = report.samples > taken ? report.samples - taken : 0;
    report.source_rows = get(source_rows_);
    report.words = get(words_);
    report.utterances = get(utterances_);
    report.target_forwards = get(target_forwards_);
    report.late_rows = get(late_rows_);
    report.row = summarise(row_);
    report.audio_ms = 1000 * static_cast<double>(report.samples) / sample_rate;
    const std::int64_t source = get(source_busy_ns_);
    const std::int64_t target = get(target_busy_ns_);
    report.source_busy_ms = ms(source);
    report.target_busy_ms = ms(target);
    if (report.samples > 0) report.real_time_factor = ms(source + target) / report.audio_ms;
    if (const std::int64_t end = get(input_end_ns_); end != 0) {
      if (source + target > 0)
        report.work_before_end =
            static_cast<double>(get(source_busy_at_end_) + get(target_busy_at_end_)) /
            static_cast<double>(source + target);
      if (target > 0)
        report.target_work_before_end =
            static_cast<double>(get(target_busy_at_end_)) / static_cast<double>(target);
      if (report.words > 0) report.end_to_last_word_ms = ms(get(last_word_ns_) - end);
    }
    if (const std::int64_t count = get(utterances_with_words_); count > 0) {
      report.laal_ms = sum_laal_.load(kRelaxed) / static_cast<double>(count);
      report.start_offset_ms = sum_start_offset_.load(kRelaxed) / static_cast<double>(count);
    }
    report.first_word = summarise(first_word_);
    report.word = summarise(word_);
    report.speech_end_to_text = summarise(speech_end_to_text_);
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

  std::int64_t row_ns_;
  LatencyHistogram row_;
  LatencyHistogram first_word_;
  LatencyHistogram word_;
  LatencyHistogram speech_end_to_text_;
  // The caller.
  alignas(64) Counter samples_{0};
  Counter input_end_ns_{0};
  Counter source_busy_at_end_{0};
  Counter target_busy_at_end_{0};
  // The source side.
  alignas(64) Counter source_busy_ns_{0};
  Counter samples_taken_{0};
  Counter source_rows_{0};
  Counter late_rows_{0};
  // The target side.
  alignas(64) Counter target_busy_ns_{0};
  Counter target_forwards_{0};
  Counter words_{0};
  Counter utterances_{0};
  Counter utterances_with_words_{0};
  std::atomic<double> sum_laal_{0};
  std::atomic<double> sum_start_offset_{0};
  Counter last_word_ns_{0};
};

}  // namespace sluice
