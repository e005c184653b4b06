// SPDX-License-Identifier: MIT
// A listening model on audio that arrives as it is spoken; kHelp says how it is run.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <sys/resource.h>
#include <unistd.h>

#include "sluice/io/audio_input.hpp"
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/listener.hpp"
#include "sluice/stream/paced_source.hpp"
#include "support/arguments.hpp"
#include "support/json_record.hpp"

namespace {

using namespace sluice;
using bench::Record;

constexpr const char* kHelp =
    R"(usage: listen_bench mode=endless|overlap model=M.gguf audio=a.wav,b.wav [name=value]...

A listening model on audio that arrives as it is spoken. JSON lines on stdout.

  mode=endless   the files, one behind the other with a second of silence between, over and over:
                 work, words, lateness and memory of each minute, and the whole
  mode=overlap   each file once for each k, and once written after its end: the share of the work
                 that was done before the audio ended, how long after it the text was complete

  minutes=30     of audio (endless)
  k=1            words heard before one is written; several with commas; all: 0
  speed=1        times real time
  packet_ms=20   audio given at once
  threads=1      of each side
  in_turns=0     1: both sides on one thread
  int8=0         1: rounded activations
)";

struct Settings {
  std::string mode, model;
  std::vector<std::string> audio;
  std::vector<std::int64_t> wait_words{1};  // 0: the whole utterance
  double minutes = 30;
  double speed = 1;
  std::int64_t packet_ms = 20;
  int threads = 1;
  bool in_turns = false;
  bool int8 = false;
};

Settings parse(int argc, char** argv) {
  Settings settings;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::size_t equals = argument.find('=');
    if (equals == std::string::npos)
      throw std::invalid_argument("expected name=value, found '" + argument + "'");
    const std::string name = argument.substr(0, equals);
    const std::string value = argument.substr(equals + 1);
    if (name == "mode")
      settings.mode = value;
    else if (name == "model")
      settings.model = value;
    else if (name == "audio")
      for (const std::string_view part : bench::split(value, ','))
        settings.audio.emplace_back(part);
    else if (name == "k") {
      settings.wait_words.clear();
      for (const std::string_view part : bench::split(value, ','))
        settings.wait_words.push_back(part == "all" ? 0 : bench::number(part, argument));
    } else if (name == "minutes")
      settings.minutes = std::stod(value);
    else if (name == "speed")
      settings.speed = std::stod(value);
    else if (name == "packet_ms")
      settings.packet_ms = bench::number(value, argument);
    else if (name == "threads")
      settings.threads = static_cast<int>(bench::number(value, argument));
    else if (name == "in_turns")
      settings.in_turns = value == "1";
    else if (name == "int8")
      settings.int8 = value == "1";
    else
      throw std::invalid_argument("unknown argument '" + argument + "'");
  }
  if (settings.model.empty() || settings.audio.empty() ||
      (settings.mode != "endless" && settings.mode != "overlap"))
    throw std::invalid_argument("expected mode=endless or mode=overlap, model= and audio=");
  return settings;
}

/// Samples that are played over and over, for so many samples.
class Loop {
 public:
  struct Frame {
    std::vector<float> samples;
    std::int64_t end = 0;
  };

  Loop(std::vector<float> samples, std::int64_t total, std::int64_t packet, double rate)
      : samples_(std::move(samples)), total_(total), packet_(packet), rate_(rate) {}

  Frame make_frame() const {
    Frame frame;
    frame.samples.reserve(static_cast<std::size_t>(packet_));
    return frame;
  }
  bool read(Frame& frame) {
    frame.samples.clear();
    const auto length = static_cast<std::int64_t>(samples_.size());
    for (; next_ < total_ && static_cast<std::int64_t>(frame.samples.size()) < packet_; ++next_)
      frame.samples.push_back(samples_[static_cast<std::size_t>(next_ % length)]);
    frame.end = next_;
    return !frame.samples.empty();
  }
  std::int64_t time_ns(const Frame& frame) const {
    return std::llround(1e9 * static_cast<double>(frame.end) / rate_);
  }

 private:
  std::vector<float> samples_;
  std::int64_t total_;
  std::int64_t packet_;
  double rate_;
  std::int64_t next_ = 0;
};

std::vector<float> read_audio(const std::string& path, double rate) {
  AudioInput input = open_wav(path, {.sample_rate = std::llround(rate)});
  std::vector<float> samples;
  std::vector<float> block(4096);
  while (const std::int64_t count = input.read(block))
    samples.insert(samples.end(), block.begin(), block.begin() + count);
  return samples;
}

std::int64_t resident_bytes() {
  long pages = 0;
  if (std::FILE* const file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return std::int64_t{pages} * ::sysconf(_SC_PAGESIZE);
}

/// Processor time of the whole program, in seconds.
double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return std::nan("");
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<std::size_t>(std::ceil(q * static_cast<double>(values.size())));
  return values[std::max<std::size_t>(rank, 1) - 1];
}

ListenerOptions listener_options(const Settings& settings, std::int64_t wait_words) {
  ListenerOptions options;
  options.wait_words = wait_words == 0 ? ListenerOptions::kWholeUtterance : wait_words;
  options.source_threads = options.target_threads = settings.threads;
  options.activations = settings.int8 ? Activations::kInt8 : Activations::kFloat32;
  options.concurrent = !settings.in_turns;
  return options;
}

/// Plays a loop into a listener; calls shown(event) on the thread that takes events and
/// handed_over(samples so far) after each packet.
template <class Shown, class HandedOver>
PacedSourceCounts play(Loop& loop, const Settings& settings, Listener& listener, Shown&& shown,
                       HandedOver&& handed_over) {
  MonotonicClock clock;
  PacedSource paced(loop, clock, {.speed = settings.speed, .late_after_ns = 10'000'000});
  auto frame = paced.make_frame();
  const auto take = [&] {
    if (settings.in_turns)
      listener.for_each(shown);
    else
      while (const auto event = listener.poll()) shown(*event);
  };
  while (paced.next(frame) == FrameStatus::kFrame) {
    listener.accept(frame.samples);
    take();
    handed_over(frame.end);
  }
  listener.finish();
  listener.for_each(shown);
  return paced.counts();
}

void endless(const Settings& settings, const std::shared_ptr<const ListenModel>& model) {
  std::vector<float> samples;
  for (const std::string& path : settings.audio) {
    const std::vector<float> file = read_audio(path, model->sample_rate());
    samples.insert(samples.end(), file.begin(), file.end());
    samples.insert(samples.end(), static_cast<std::size_t>(model->sample_rate()), 0.0F);
  }
  const auto minute = std::llround(60 * model->sample_rate());
  Loop loop(samples, std::llround(settings.minutes * static_cast<double>(minute)),
            std::llround(model->sample_rate() * static_cast<double>(settings.packet_ms) / 1000),
            model->sample_rate());
  Listener listener(model, listener_options(settings, settings.wait_words.front()));
  const std::int64_t start_ns = monotonic_ns();
  double cpu_before = cpu_seconds();
  ListenerReport before;
  std::int64_t next = minute;
  std::vector<double> lags;
  std::int64_t first_resident = 0;
  const auto record = [&](const char* kind, std::int64_t samples_done) {
    const ListenerReport report = listener.report();
    const double audio_ms = report.audio_ms - before.audio_ms;
    const double busy = report.source_busy_ms + report.target_busy_ms - before.source_busy_ms -
                        before.target_busy_ms;
    const double cpu = cpu_seconds();
    const double wall_ms = 1e-6 * static_cast<double>(monotonic_ns() - start_ns);
    if (first_resident == 0) first_resident = resident_bytes();
    Record(kind)
        .field("audio_s", static_cast<double>(samples_done) / model->sample_rate())
        .field("words", report.words - before.words)
        .field("utterances", report.utterances - before.utterances)
        .field("rows", report.source_rows - before.source_rows)
        .field("late_rows", report.late_rows - before.late_rows)
        .field("real_time_factor", busy / audio_ms)
        .field("cpu_over_audio", 1000 * (cpu - cpu_before) / audio_ms)
        .field("word_ms_p50", quantile(lags, 0.5))
        .field("word_ms_p99", quantile(lags, 0.99))
        .field("row_ms_max_so_far", report.row.max_ms)
        // of the clock that plays the audio against the audio
        .field("drift_ms", wall_ms - 1000 * static_cast<double>(samples_done) /
                                         model->sample_rate() / settings.speed)
        .field("samples_waiting", report.samples_waiting)
        .field("resident_bytes", resident_bytes())
        .field("resident_growth_bytes", resident_bytes() - first_resident);
    before = report;
    cpu_before = cpu;
    lags.clear();
  };
  const PacedSourceCounts counts = play(
      loop, settings, listener,
      [&](const ListenEvent& event) {
        if (event.kind == ListenEvent::Kind::kWord && event.spoken_ns != 0)
          lags.push_back(1e-6 * static_cast<double>(event.time_ns - event.spoken_ns));
      },
      [&](std::int64_t done) {
        if (done < next) return;
        record("listen_minute", done);
        next += minute;
      });
  const ListenerReport report = listener.report();
  Record("listen_endless")
      .field("model", settings.model)
      .field("parameters", model->parameters())
      .field("k", settings.wait_words.front())
      .field("threads", std::int64_t{settings.threads})
      .field("in_turns", std::int64_t{settings.in_turns ? 1 : 0})
      .field("int8", std::int64_t{settings.int8 ? 1 : 0})
      .field("speed", settings.speed)
      .field("audio_s", report.audio_ms / 1000)
      .field("words", report.words)
      .field("utterances", report.utterances)
      .field("rows", report.source_rows)
      .field("late_rows", report.late_rows)
      .field("late_packets", counts.late)
      .field("max_late_packet_ms", 1e-6 * static_cast<double>(counts.max_late_ns))
      .field("real_time_factor", report.real_time_factor)
      .field("source_ms_per_row", report.source_busy_ms / static_cast<double>(report.source_rows))
      .field("target_ms_per_forward",
             report.target_busy_ms / static_cast<double>(report.target_forwards))
      .field("row_ms_p50", report.row.p50_ms)
      .field("row_ms_p99", report.row.p99_ms)
      .field("row_ms_max", report.row.max_ms)
      .field("first_word_ms_p50", report.first_word.p50_ms)
      .field("first_word_ms_p95", report.first_word.p95_ms)
      .field("word_ms_p50", report.word.p50_ms)
      .field("word_ms_p99", report.word.p99_ms)
      .field("cache_bytes", listener.engine().cache_bytes())
      .field("resident_bytes", resident_bytes())
      .field("resident_growth_bytes", resident_bytes() - first_resident);
}

void overlap(const Settings& settings, const std::shared_ptr<const ListenModel>& model) {
  std::vector<std::int64_t> wait_words = settings.wait_words;
  if (std::find(wait_words.begin(), wait_words.end(), 0) == wait_words.end())
    wait_words.push_back(0);
  struct Sums {
    std::vector<double> work, writing, after_end, first_word;
  };
  std::map<std::int64_t, Sums> sums;
  for (const std::string& path : settings.audio) {
    const std::vector<float> samples = read_audio(path, model->sample_rate());
    for (const std::int64_t k : wait_words) {
      Loop loop(samples, static_cast<std::int64_t>(samples.size()),
                std::llround(model->sample_rate() * static_cast<double>(settings.packet_ms) / 1000),
                model->sample_rate());
      ListenerOptions options = listener_options(settings, k);
      options.endpoint_ms = options.max_utterance_ms = options.silence_ms = 0;
      Listener listener(model, options);
      play(
          loop, settings, listener, [](const ListenEvent&) {}, [](std::int64_t) {});
      const ListenerReport report = listener.report();
      Record("listen_overlap")
          .field("audio", path)
          .field("k", k)
          .field("audio_ms", report.audio_ms)
          .field("words", report.words)
          .field("work_before_end", report.work_before_end)
          .field("writing_before_end", report.target_work_before_end)
          .field("end_to_text_ms", report.end_to_last_word_ms)
          .field("first_word_ms", report.first_word.p50_ms)
          .field("source_busy_ms", report.source_busy_ms)
          .field("target_busy_ms", report.target_busy_ms)
          .field("real_time_factor", report.real_time_factor);
      if (report.words == 0) continue;
      Sums& sum = sums[k];
      sum.work.push_back(report.work_before_end);
      sum.writing.push_back(report.target_work_before_end);
      sum.after_end.push_back(report.end_to_last_word_ms);
      if (report.first_word.count > 0) sum.first_word.push_back(report.first_word.p50_ms);
    }
  }
  const auto mean = [](const std::vector<double>& values) {
    double sum = 0;
    for (const double value : values) sum += value;
    return sum / static_cast<double>(values.size());
  };
  for (const auto& [k, sum] : sums)
    Record("listen_overlap_mean")
        .field("k", k)
        .field("files", static_cast<std::int64_t>(sum.work.size()))
        .field("work_before_end", mean(sum.work))
        .field("writing_before_end", mean(sum.writing))
        .field("end_to_text_ms", mean(sum.after_end))
        .field("end_to_text_ms_p95", quantile(sum.after_end, 0.95))
        .field("first_word_ms", mean(sum.first_word))
        .field("first_word_ms_p95", quantile(sum.first_word, 0.95));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc == 2 && std::string_view(argv[1]) == "--benchmark_list_tests") {
    std::cout << "endless\noverlap\n";
    return 0;
  }
  if (argc < 2 || std::string_view(argv[1]) == "--help" || std::string_view(argv[1]) == "-h") {
    (argc < 2 ? std::cerr : std::cout) << kHelp;
    return argc < 2 ? 2 : 0;
  }
  const Settings settings = parse(argc, argv);
  const auto model = load_listen_model(settings.model);
  if (settings.mode == "endless")
    endless(settings, model);
  else
    overlap(settings, model);
  return 0;
} catch (const std::exception& error) {
  std::cerr << "listen_bench: " << error.what() << '\n';
  return 1;
}
