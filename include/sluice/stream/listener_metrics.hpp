// SPDX-License-Identifier: MIT
/// What a stream that listens is measured by, with the start and the end of every clock defined.
#pragma once

#include <cstdint>
#include <limits>
#include <span>

#include "sluice/stream/deadline.hpp"
#include "sluice/stream/lag_scores.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/work_counter.hpp"

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
  /// With ListenerOptions::deadline_ms: rows against it, each finished when it is read and what is
  /// written with it is written, a row that ends an utterance when the utterance's text is; their
  /// gaps are the jitter; skipped are rows that were dropped unheard. Otherwise all 0 and NaN.
  DeadlineReport deadlines;
  std::int64_t put_off_rows = 0;     ///< rows at which something due was left for a later one
  std::int64_t forced_writes = 0;    ///< words or pieces written late after max_put_off such rows
  std::int64_t dropped_samples = 0;  ///< of those accepted, unheard
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
  void on_samples(std::int64_t count) noexcept { samples_.add(count); }
  void on_input_end(std::int64_t now_ns) noexcept {
    if (input_end_ns_.get() != 0) return;
    source_busy_at_end_.set(source_.busy_ns.get());
    target_busy_at_end_.set(target_.busy_ns.get());
    input_end_ns_.set(now_ns);
  }
  /// The source side: a step ended that took so many samples and read so many rows.
  void on_source_work(std::int64_t duration_ns, std::int64_t samples, std::int64_t rows) noexcept {
    source_.on_work(duration_ns, rows);
    samples_taken_.add(samples);
  }
  /// The source side: so many rows of so many samples in all were dropped.
  void on_dropped(std::int64_t samples, std::int64_t rows) noexcept {
    samples_taken_.add(samples);
    dropped_samples_.add(samples);
    for (std::int64_t i = 0; i < rows; ++i) deadlines_.on_skipped();
  }
  /// The source side: a row was read, whose last sample was accepted at `arrival_ns`.
  void on_row(std::int64_t now_ns, std::int64_t arrival_ns) noexcept {
    row_.record(now_ns - arrival_ns);
    if (now_ns - arrival_ns > row_ns_) late_rows_.add(1);
  }
  /// The target side: nothing more is done with a row.
  void on_row_done(std::int64_t deadline_ns, std::int64_t now_ns) noexcept {
    deadlines_.on_frame(deadline_ns, now_ns);
  }
  /// The target side: something was left for a later row; something was not, though it is late.
  void on_put_off() noexcept { put_off_rows_.add(1); }
  void on_forced() noexcept { forced_writes_.add(1); }
  /// The target side: a forward ended.
  void on_target_work(std::int64_t duration_ns) noexcept { target_.on_work(duration_ns, 1); }
  /// The target side: a word was written. spoken_ns: when its end was accepted; 0: not known.
  void on_word(std::int64_t now_ns, std::int64_t spoken_ns, bool first) noexcept {
    words_.add(1);
    last_word_ns_.set(now_ns);
    if (spoken_ns == 0) return;
    word_.record(now_ns - spoken_ns);
    if (first) first_word_.record(now_ns - spoken_ns);
  }
  /// The target side: an utterance of `source` ms ended. sounding_ns: when its last row with a
  /// label was accepted; 0: it had none. delays: where its words were written, in ms from its
  /// start.
  void on_utterance(std::int64_t sounding_ns, std::span<const double> delays,
                    double source) noexcept {
    utterances_.add(1);
    if (delays.empty()) return;
    const double laal = mean_lag(delays, source, source / static_cast<double>(delays.size()));
    utterances_with_words_.add(1);
    sum_laal_.add(laal);
    sum_start_offset_.add(delays.front());
    // The last word may be written before the last label, by less than its delay.
    const std::int64_t last = last_word_ns_.get();
    if (sounding_ns != 0) speech_end_to_text_.record(last > sounding_ns ? last - sounding_ns : 0);
  }

  /// Of the report, what costs nothing to ask. Any thread.
  std::int64_t source_rows() const noexcept { return source_.count.get(); }
  std::int64_t target_forwards() const noexcept { return target_.count.get(); }

  ListenerReport report(double sample_rate) const {
    ListenerReport report;
    // In this order: what was taken had been accepted.
    const std::int64_t taken = samples_taken_.get();
    report.samples = samples_.get();
    report.samples_waiting = report.samples > taken ? report.samples - taken : 0;
    report.source_rows = source_.count.get();
    report.words = words_.get();
    report.utterances = utterances_.get();
    report.target_forwards = target_.count.get();
    report.late_rows = late_rows_.get();
    report.deadlines = deadlines_.report();
    report.put_off_rows = put_off_rows_.get();
    report.forced_writes = forced_writes_.get();
    report.dropped_samples = dropped_samples_.get();
    report.row = summarise(row_);
    report.audio_ms = 1000 * static_cast<double>(report.samples) / sample_rate;
    report.source_busy_ms = source_.busy_ms();
    report.target_busy_ms = target_.busy_ms();
    const double busy_ms = report.source_busy_ms + report.target_busy_ms;
    if (report.samples > 0) report.real_time_factor = busy_ms / report.audio_ms;
    if (const std::int64_t end = input_end_ns_.get(); end != 0) {
      const double target_ms = ms(target_busy_at_end_.get());
      if (busy_ms > 0)
        report.work_before_end = (ms(source_busy_at_end_.get()) + target_ms) / busy_ms;
      if (report.target_busy_ms > 0)
        report.target_work_before_end = target_ms / report.target_busy_ms;
      if (report.words > 0) report.end_to_last_word_ms = ms(last_word_ns_.get() - end);
    }
    if (const std::int64_t count = utterances_with_words_.get(); count > 0) {
      report.laal_ms = sum_laal_.get() / static_cast<double>(count);
      report.start_offset_ms = sum_start_offset_.get() / static_cast<double>(count);
    }
    report.first_word = summarise(first_word_);
    report.word = summarise(word_);
    report.speech_end_to_text = summarise(speech_end_to_text_);
    return report;
  }

 private:
  static double ms(std::int64_t ns) { return static_cast<double>(ns) * 1e-6; }

  std::int64_t row_ns_;
  LatencyHistogram row_;
  LatencyHistogram first_word_;
  LatencyHistogram word_;
  LatencyHistogram speech_end_to_text_;
  DeadlineRecord deadlines_;
  // The caller.
  alignas(64) WorkCounter<> samples_;
  WorkCounter<> input_end_ns_;
  WorkCounter<> source_busy_at_end_;
  WorkCounter<> target_busy_at_end_;
  // The source side.
  SideCounter source_;  // rows
  WorkCounter<> samples_taken_;
  WorkCounter<> dropped_samples_;
  WorkCounter<> late_rows_;
  // The target side.
  SideCounter target_;  // forwards
  WorkCounter<> words_;
  WorkCounter<> utterances_;
  WorkCounter<> utterances_with_words_;
  WorkCounter<double> sum_laal_;
  WorkCounter<double> sum_start_offset_;
  WorkCounter<> last_word_ns_;
  WorkCounter<> put_off_rows_;
  WorkCounter<> forced_writes_;
};

}  // namespace sluice
