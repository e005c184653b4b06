// SPDX-License-Identifier: MIT
#include "view.hpp"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <utility>
#include <vector>

#include <sys/ioctl.h>
#include <unistd.h>

#include "sluice/io/json.hpp"
#include "support/report_text.hpp"
#include "support/terminal.hpp"

namespace listen {

namespace {

using sluice::Json;
using sluice::ListenEvent;
using sluice::ListenModel;
using support::format;

std::string line_of(const Json& object) {
  return object.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

/// Milliseconds, to a thousandth.
Json ms(double value) {
  return std::isfinite(value) ? Json(std::round(value * 1000) / 1000) : Json();
}

class JsonView : public View {
 public:
  using View::View;

 private:
  void put(const Shown& shown) override {
    const ListenEvent& event = shown.event;
    Json object{{"kind", to_string(event.kind)},
                {"audio_ms", ms(shown.audio_ms)},
                {"wall_ms", ms(shown.wall_ms)}};
    if (event.kind != ListenEvent::Kind::kEnd) {
      object["utterance"] = event.utterance;
      object["text"] = shown.text;
    }
    if (event.kind == ListenEvent::Kind::kWord) {
      object["word"] = event.word;
      object["tokens"] = std::vector<sluice::Token>(event.tokens().begin(), event.tokens().end());
      object["spoken_ms"] = shown.spoken_ms < 0 ? Json() : ms(shown.spoken_ms);
    }
    if (event.kind == ListenEvent::Kind::kEndpoint) object["words"] = event.word;
    support::write_stdout(line_of(object));
  }
};

class TimestampView : public View {
 public:
  using View::View;

 private:
  void put(const Shown& shown) override {
    if (shown.event.kind == ListenEvent::Kind::kEndpoint) support::write_stdout("\n");
    if (shown.event.kind != ListenEvent::Kind::kWord) return;
    const std::string spoken =
        shown.spoken_ms < 0 ? "      -" : format("%7.2f", shown.spoken_ms / 1000);
    support::write_stdout(spoken + format(" %7.2f  ", shown.audio_ms / 1000) + shown.text + "\n");
  }
};

/// Words as they become final, a line an utterance.
class PlainView : public View {
 public:
  using View::View;
  void close() override {
    if (in_line_) support::write_stdout("\n");
    in_line_ = false;
  }

 private:
  void put(const Shown& shown) override {
    if (shown.event.kind == ListenEvent::Kind::kEndpoint) close();
    if (shown.event.kind != ListenEvent::Kind::kWord) return;
    support::write_stdout((in_line_ ? " " : "") + shown.text);
    in_line_ = true;
  }

  bool in_line_ = false;
};

/// The same with what is not final behind them, dim, rewritten in place.
class TerminalView : public View {
 public:
  using View::View;
  void close() override {
    if (line_.empty() && partial_.empty()) return;
    partial_.clear();
    draw();
    support::write_stdout("\n");
    line_.clear();
  }

 private:
  static std::size_t columns() {
    winsize size{};
    return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
  }

  void put(const Shown& shown) override {
    switch (shown.event.kind) {
      case ListenEvent::Kind::kPartial:
        partial_ = shown.text;
        draw();
        break;
      case ListenEvent::Kind::kWord:
        // A line that is full stays: what is drawn over must not wrap.
        if (line_.size() + shown.text.size() + 2 > columns()) {
          std::string rest;
          std::swap(rest, partial_);
          draw();
          support::write_stdout("\n");
          line_.clear();
          partial_ = rest;
        }
        line_ += (line_.empty() ? "" : " ") + shown.text;
        draw();
        break;
      case ListenEvent::Kind::kEndpoint:
      case ListenEvent::Kind::kEnd: close(); break;
    }
  }

  void draw() const {
    std::string text = "\r" + line_;
    const std::size_t room = columns() - 1;
    if (!partial_.empty() && line_.size() + 2 < room) {
      const std::string more = (line_.empty() ? "" : " ") + partial_;
      text += "\x1b[2m" + more.substr(0, room - line_.size()) + "\x1b[0m";
    }
    support::write_stdout(text + "\x1b[K");
  }

  std::string line_;
  std::string partial_;
};

}  // namespace

std::string View::text_of(std::span<const sluice::Token> pieces) const {
  std::string text;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    model_.append_text(pieces[i], text);
    if (model_.ends_word(pieces[i]) && i + 1 < pieces.size()) text += ' ';
  }
  return text;
}

void View::show(const ListenEvent& event) {
  Shown shown{event, text_of(event.tokens()), audio_ms(event.samples),
              event.spoken_samples < 0 ? -1 : audio_ms(event.spoken_samples),
              static_cast<double>(event.time_ns - start_ns_) * 1e-6};
  switch (event.kind) {
    case ListenEvent::Kind::kPartial:
    case ListenEvent::Kind::kEnd: break;
    case ListenEvent::Kind::kWord:
      utterance_ += (utterance_.empty() ? "" : " ") + shown.text;
      break;
    case ListenEvent::Kind::kEndpoint: shown.text = std::exchange(utterance_, {}); break;
  }
  put(shown);
}

std::unique_ptr<View> make_view(const Options& options, const ListenModel& model,
                                std::int64_t start_ns) {
  if (options.json) return std::make_unique<JsonView>(model, start_ns);
  if (options.timestamps) return std::make_unique<TimestampView>(model, start_ns);
  if (options.plain || !support::stdout_is_terminal())
    return std::make_unique<PlainView>(model, start_ns);
  return std::make_unique<TerminalView>(model, start_ns);
}

void print_stats(const Options& options, const ListenModel& model, const Outcome& outcome) {
  const sluice::ListenerReport& r = outcome.report;
  const auto row = [](const char* name, const std::string& text) {
    std::cerr << format("%-10s ", name) << text << '\n';
  };
  const auto number = [](double value, const char* pattern) {
    return std::isfinite(value) ? format(pattern, value) : std::string("-");
  };
  const auto latency = [](const sluice::LatencySummary& summary) {
    return summary.count > 0 ? support::latency_text(summary) : std::string("-");
  };
  row("model", options.model + format(", %.2f million parameters",
                                      static_cast<double>(model.parameters()) * 1e-6));
  row("audio", format("%.2f s, %lld utterances, %lld words", r.audio_ms / 1000,
                      static_cast<long long>(r.utterances), static_cast<long long>(r.words)));
  row("latency", latency_text(options.latency) + ": LAAL " + number(r.laal_ms, "%.0f") +
                     " ms, first word after " + number(r.start_offset_ms, "%.0f") +
                     " ms of its utterance (without computing)");
  if (options.speed > 0 || options.input == "-") {
    row("first word", latency(r.first_word) + " from its end, by CTC's label");
    row("words", latency(r.word) + " from their ends");
    row("last word", latency(r.speech_end_to_text) + " from the end of speech");
    row("overlap", number(100 * r.work_before_end, "%.1f") + " % of the work, " +
                       number(100 * r.target_work_before_end, "%.1f") +
                       " % of the writing, before the audio had ended; last word " +
                       number(r.end_to_last_word_ms, "%.1f") + " ms after it");
  }
  if (options.speed > 0 || options.input == "-")
    row("frames", latency(r.row) + format(" from their samples, %lld of %lld late",
                                          static_cast<long long>(r.late_rows),
                                          static_cast<long long>(r.source_rows)));
  if (options.deadline_ms > 0)
    row("deadline",
        format("%.4g ms: ", options.deadline_ms) + support::deadline_text(r.deadlines) +
            format("; put off %lld times, forced %lld; dropped %lld (%.0f ms)",
                   static_cast<long long>(r.put_off_rows), static_cast<long long>(r.forced_writes),
                   static_cast<long long>(r.deadlines.skipped),
                   1000 * static_cast<double>(r.dropped_samples) / model.sample_rate()));
  if (options.speed > 0)
    row("pace",
        format("%lld of %lld packets late, at most %.1f ms", static_cast<long long>(outcome.late),
               static_cast<long long>(outcome.packets), outcome.max_late_ms));
  row("work", format("listening %.1f ms, writing %.1f ms: real-time factor ", r.source_busy_ms,
                     r.target_busy_ms) +
                  number(r.real_time_factor, "%.4f"));
  row("memory", "groups " + support::megabytes(outcome.cache_bytes) + ", resident " +
                    support::megabytes(support::resident_bytes()) + ", at most " +
                    support::megabytes(support::peak_resident_bytes()));
}

std::string stats_json(const Options& options, const ListenModel& model, const Outcome& outcome) {
  const sluice::ListenerReport& r = outcome.report;
  const auto number = [](double value) {
    return std::isfinite(value) ? Json(value) : Json();
  };
  Json line{{"kind", "report"},
            {"audio_ms", ms(r.audio_ms)},
            {"source_rows", r.source_rows},
            {"utterances", r.utterances},
            {"words", r.words},
            {"target_forwards", r.target_forwards},
            {"late_rows", r.late_rows},
            {"row_ms", support::latency_json(r.row)},
            {"source_busy_ms", r.source_busy_ms},
            {"target_busy_ms", r.target_busy_ms},
            {"real_time_factor", number(r.real_time_factor)},
            {"work_before_end", number(r.work_before_end)},
            {"target_work_before_end", number(r.target_work_before_end)},
            {"end_to_last_word_ms", number(r.end_to_last_word_ms)},
            {"first_word_ms", support::latency_json(r.first_word)},
            {"word_ms", support::latency_json(r.word)},
            {"speech_end_to_text_ms", support::latency_json(r.speech_end_to_text)},
            {"laal_ms", number(r.laal_ms)},
            {"start_offset_ms", number(r.start_offset_ms)},
            {"packets", outcome.packets},
            {"late_packets", outcome.late},
            {"max_late_ms", outcome.max_late_ms},
            {"cache_bytes", outcome.cache_bytes},
            {"resident_bytes", support::resident_bytes()},
            {"peak_resident_bytes", support::peak_resident_bytes()},
            {"setting",
             {{"model", options.model},
              {"parameters", model.parameters()},
              {"latency", latency_text(options.latency)},
              {"endpoint_ms", options.endpoint_ms},
              {"max_utterance_ms", options.max_utterance_ms},
              {"speed", options.speed},
              {"packet_ms", options.packet_ms},
              {"concurrent", !options.sequential},
              {"source_threads", options.source_threads},
              {"target_threads", options.target_threads},
              {"activations", to_string(options.activations)},
              {"command", options.command}}}};
  if (options.deadline_ms > 0) {
    line["deadlines"] = support::deadline_json(r.deadlines);
    line["deadlines"]["deadline_ms"] = options.deadline_ms;
    line["put_off_rows"] = r.put_off_rows;
    line["forced_writes"] = r.forced_writes;
    line["dropped_rows"] = r.deadlines.skipped;
    line["dropped_ms"] = ms(1000 * static_cast<double>(r.dropped_samples) / model.sample_rate());
  }
  return line_of(line);
}

}  // namespace listen
