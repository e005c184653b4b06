// SPDX-License-Identifier: MIT
// watch: frames on a clock through a vision encoder and a decoder that keeps text and frames by
// kind; what it sustains, what it misses, what it holds. SLUICE_WATCH_BACKEND is the tag of the
// backend that computes: sluice::cpu makes `watch`, sluice::cuda makes `watch_cuda`.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <CLI/CLI.hpp>

#include "models.hpp"
#include "scene.hpp"
#include "watcher.hpp"

#include "sluice/backend/cuda/tag.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/frame_source.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/tokenizer.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/deadline.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/paced_source.hpp"
#include "support/command_line.hpp"
#include "support/report_text.hpp"
#include "support/terminal.hpp"

namespace {

using namespace watch;
using sluice::Json;
using sluice::Token;
using sluice::TokenKind;
using support::format;

using Backend = SLUICE_WATCH_BACKEND;
constexpr bool kOnHost = std::is_same_v<Backend, sluice::cpu>;
constexpr const char* kProgram = kOnHost ? "watch" : "watch_cuda";

struct Options {
  std::string geometry = "small";
  std::string model;
  std::string encoder;
  std::int64_t encoder_heads = 16;
  std::string input;
  double fps = 8;
  std::int64_t pictures = 240;
  std::int64_t rows = 4;
  std::int64_t cols = 4;
  std::int64_t reply = 2;
  double temperature = 0.9;
  double vision_window = 16;
  std::int64_t text_sinks = 64;
  std::int64_t text_window = 128;
  bool real_time = false;
  std::string late = "block";
  std::int64_t queue = 2;
  std::string shed = "none";
  std::int64_t threads = 2;
  std::uint64_t seed = 1;
  bool json = false;
};

/// All that is measured.
struct Measured {
  sluice::LatencyHistogram encode;
  sluice::LatencyHistogram read;
  sluice::LatencyHistogram token;        // one after the other
  sluice::LatencyHistogram first_token;  // from when the picture was due
  sluice::LatencyHistogram whole;        // from when it was due to the end of its reply
  sluice::DeadlineReport deadlines;
  sluice::PacedSourceCounts frames;
  sluice::WorkShedder::Counts shed;
  std::int64_t watched = 0;             // pictures
  std::int64_t frames_per_picture = 1;  // that the encoder takes at once
  double seconds = 0;
};

double ms(std::int64_t ns) {
  return static_cast<double>(ns) * 1e-6;
}

Json bytes_by_kind(const Watcher& watcher) {
  Json kinds;
  for (const TokenKind kind : {TokenKind::kPinned, TokenKind::kText, TokenKind::kVision})
    kinds[std::string(to_string(kind))] = {{"tokens", watcher.retention().kept(kind)},
                                           {"bytes", watcher.bytes_in_use(kind)},
                                           {"reserved_bytes", watcher.reserved_bytes(kind)}};
  return kinds;
}

void report(const Options& options, const Measured& m, const Watcher& watcher) {
  const auto summary = [](const sluice::LatencyHistogram& h) {
    return sluice::summarise(h);
  };
  const double pictures_per_s = static_cast<double>(m.watched) / m.seconds;
  const double fps = pictures_per_s * static_cast<double>(m.frames_per_picture);
  if (options.json) {
    Json line{{"kind", "report"},
              {"device", watcher.device()},
              {"geometry", options.model.empty() ? options.geometry : options.model},
              {"pictures_watched", m.watched},
              {"seconds", m.seconds},
              {"frames_per_picture", m.frames_per_picture},
              {"pictures_per_s", pictures_per_s},
              {"sustained_fps", fps},
              {"encode", support::latency_json(summary(m.encode))},
              {"read", support::latency_json(summary(m.read))},
              {"token", support::latency_json(summary(m.token))},
              {"first_token", support::latency_json(summary(m.first_token))},
              {"whole", support::latency_json(summary(m.whole))},
              {"taken", m.frames.taken},
              {"dropped", m.frames.dropped_oldest + m.frames.dropped_newest},
              {"coalesced", m.frames.coalesced},
              {"late", m.frames.late},
              {"skipped", m.shed.skipped},
              {"shortened", m.shed.shortened},
              {"cache", bytes_by_kind(watcher)},
              {"cache_bytes", watcher.cache_bytes()},
              {"resident_bytes", support::peak_resident_bytes()}};
    if (options.real_time) {
      line["deadlines"] = support::deadline_json(m.deadlines);
      line["deadlines"]["start_up_delay_ms"] = m.deadlines.start_up_delay_ms;
    }
    support::write_stdout(line.dump() + "\n");
    return;
  }
  const auto row = [&](const char* name, const sluice::LatencyHistogram& h) {
    const sluice::LatencySummary s = summary(h);
    return format("| %s | %.2f | %.2f | %.2f |\n", name, s.p50_ms, s.p99_ms, s.max_ms);
  };
  std::string text =
      format(
          "%lld pictures in %.2f s: %.1f frames a second%s\n\n", static_cast<long long>(m.watched),
          m.seconds, fps,
          m.frames_per_picture == 1
              ? ""
              : format(", %lld a picture", static_cast<long long>(m.frames_per_picture)).c_str()) +
      "| milliseconds | median | p99 | largest |\n|---|---|---|---|\n" + row("encode", m.encode) +
      row("read into the cache", m.read) + row("a token", m.token);
  if (options.real_time)
    text +=
        row("due to first token", m.first_token) + row("due to reply done", m.whole) +
        "\ndeadlines " + support::deadline_text(m.deadlines) + "\n" +
        format("dropped %lld, joined %lld, skipped %lld, replies shortened %lld\n",
               static_cast<long long>(m.frames.dropped_oldest + m.frames.dropped_newest),
               static_cast<long long>(m.frames.coalesced), static_cast<long long>(m.shed.skipped),
               static_cast<long long>(m.shed.shortened));
  text += "\n| kind | tokens | in use | reserved |\n|---|---|---|---|\n";
  for (const TokenKind kind : {TokenKind::kPinned, TokenKind::kText, TokenKind::kVision})
    text +=
        format("| %s | %lld | %s | %s |\n", std::string(to_string(kind)).c_str(),
               static_cast<long long>(watcher.retention().kept(kind)),
               support::megabytes(static_cast<std::int64_t>(watcher.bytes_in_use(kind))).c_str(),
               support::megabytes(static_cast<std::int64_t>(watcher.reserved_bytes(kind))).c_str());
  support::write_stdout(text);
}

int run(const Options& options) {
  const Models models({.preset = preset_of(options.geometry),
                       .model = options.model,
                       .encoder = options.encoder,
                       .encoder_heads = options.encoder_heads,
                       .seed = options.seed});
  const sluice::Tokenizer* const tokenizer = models.tokenizer();
  const sluice::VisionEncoderConfig& vision = models.encoder();
  const sluice::PictureFormat size{.width = options.cols * vision.merge * vision.patch_size,
                                   .height = options.rows * vision.merge * vision.patch_size};
  // Rounds a second: the encoder may take several frames at once.
  const double rate = options.fps / static_cast<double>(vision.grid_frames);
  const std::int64_t rounds = std::max<std::int64_t>(1, std::llround(options.vision_window * rate));
  const std::int64_t tokens = options.rows * options.cols;
  const std::unique_ptr<Watcher> watcher = make_watcher<Backend>(
      models, {.retention = {.text_sinks = options.text_sinks,
                             .text_window = options.text_window,
                             .text_rounds = rounds,
                             .vision_rounds = rounds,
                             .max_turn = 0,
                             .max_reply = std::max<std::int64_t>(options.reply, 1),
                             .max_vision = tokens,
                             .max_spans = 2,
                             .max_chunk = std::max<std::int64_t>(tokens, 16)},
               .rows = options.rows,
               .cols = options.cols,
               .seconds_per_frame = 1 / rate,
               .temperature = static_cast<float>(options.temperature),
               .seed = options.seed + 2,
               .threads = options.threads});
  const auto text = [&](const std::string& words, std::int64_t count) {
    std::vector<Token> result;
    if (tokenizer != nullptr) {
      result = tokenizer->encode(words);
    } else {
      for (std::int64_t i = 0; i < count; ++i)
        result.push_back(static_cast<Token>((7 + 31 * i) % models.decoder().vocab_size));
    }
    if (static_cast<std::int64_t>(result.size()) > count)
      result.resize(static_cast<std::size_t>(count));
    return result;
  };
  watcher->read_prompt(
      text("previous text\n", 4),
      text("The camera shows what happens.", std::min<std::int64_t>(24, options.text_sinks)),
      text("\n\n", 2));

  // Also asked while no frame comes, and while none is due.
  const auto stops = [] {
    return support::caught_signal() != 0;
  };
  const std::unique_ptr<sluice::PictureReader> reader =
      [&]() -> std::unique_ptr<sluice::PictureReader> {
    if (options.input.empty()) return std::make_unique<Scene>(size, options.fps);
    if (options.input == "-") {
      sluice::ByteSource frames = sluice::ByteSource::standard_input();
      frames.stop_when(stops);
      return std::make_unique<sluice::RawVideoReader>(std::move(frames), size, options.fps);
    }
    return std::make_unique<sluice::FfmpegVideo>(
        options.input,
        sluice::FfmpegVideoConfig{
            .rate = options.fps, .width = size.width, .height = size.height, .stop_when = stops});
  }();
  sluice::PictureFrames source(*reader);
  sluice::MonotonicClock clock;
  sluice::PacedSource paced(source, clock,
                            {.speed = options.real_time ? 1.0 : 0.0,
                             .late = support::late_policy_of(options.late),
                             .queue_length = options.queue,
                             // Late is what is taken when the next one is there.
                             .late_after_ns = static_cast<std::int64_t>(1e9 / options.fps),
                             .stop_when = stops});
  std::vector<std::int64_t> amounts{options.reply};
  while (amounts.back() > 0) amounts.push_back(amounts.back() / 2);
  sluice::WorkShedder shedder({.policy = support::shedding_of(options.shed), .amounts = amounts});

  Measured m;
  m.frames_per_picture = vision.grid_frames;
  std::optional<sluice::DeadlineMeter> meter;
  sluice::Picture picture = paced.make_frame();
  const std::int64_t start = sluice::monotonic_ns();
  paced.start();
  // A frame is there once its time is over, and has until the next one is.
  meter.emplace(rate, sluice::DeadlineAnchor::kStreamStart,
                start + static_cast<std::int64_t>(1e9 / rate));
  while (support::caught_signal() == 0 && paced.counts().taken < options.pictures &&
         paced.next(picture) == sluice::FrameStatus::kFrame) {
    if (!watcher->take(picture.pixels)) continue;
    const std::int64_t index = picture.index / vision.grid_frames;
    const std::int64_t now = sluice::monotonic_ns();
    const std::int64_t due = options.real_time ? paced.due_ns(picture) : now;
    sluice::WorkShedder::Choice choice{.amount = options.reply};
    if (options.real_time) choice = shedder.decide(meter->deadline_ns(index) - now);
    if (choice.skip) {
      meter->on_skipped();
      continue;
    }
    const FrameTimes times = watcher->see(choice.amount);
    if (options.real_time) shedder.on_step(choice.index, times.done - now);
    meter->on_frame(index, times.done);
    m.encode.record(times.encoded - times.begin);
    m.read.record(times.read - times.encoded);
    if (choice.amount > 0) {
      m.token.record((times.done - times.read) / choice.amount);
      m.first_token.record(times.first_token - due);
    }
    m.whole.record(times.done - due);
    ++m.watched;
    if (options.json) {
      Json line{{"kind", "picture"},
                {"index", picture.index},
                {"encode_ms", ms(times.encoded - times.begin)},
                {"read_ms", ms(times.read - times.encoded)},
                {"reply_ms", ms(times.done - times.read)},
                {"late_ms", ms(now - due)},
                {"tokens", watcher->last_reply()}};
      support::write_stdout(line.dump() + "\n");
    } else if (tokenizer != nullptr && choice.amount > 0) {
      support::write_stdout(tokenizer->decode(watcher->last_reply()));
    }
  }
  if (!options.json && tokenizer != nullptr) support::write_stdout("\n\n");
  m.seconds = static_cast<double>(sluice::monotonic_ns() - start) * 1e-9;
  m.deadlines = meter->report();
  m.frames = paced.counts();
  m.shed = shedder.counts();
  report(options, m, *watcher);
  if (m.watched == 0 && support::caught_signal() == 0) {
    std::cerr << kProgram
              << (m.frames.taken == 0 ? ": no frame came from "
                                      : ": too few frames to answer any came from ")
              << reader->name() << '\n';
    return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Frames on a clock through a vision encoder and a decoder that keeps text and frames by "
      "kind: text sinks, a text window, the frames of the last seconds. Weights are random unless "
      "loaded.",
      kProgram);
  app.footer(
      "The report goes to stdout, everything else to stderr.\n"
      "Exit status: 0 done, 1 an error, 2 a wrong flag or value, 130 after Ctrl-C.");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("-i,--input", options.input,
                 "a video (ffmpeg decodes it), or - for raw RGB frames on stdin; default: a scene "
                 "made up on the spot")
      ->check(support::some_name());
  app.add_option("--fps", options.fps, "frames a second")
      ->capture_default_str()
      ->check(support::number(0.01, 1000, "a number from 0.01 to 1000"));
  app.add_option("-n,--frames", options.pictures, "frames to take, at most")
      ->capture_default_str()
      ->check(support::whole_number(1));
  app.add_option("--rows", options.rows, "tokens of a frame, vertically")
      ->capture_default_str()
      ->check(support::whole_number(1, 256));
  app.add_option("--cols", options.cols, "tokens of a frame, horizontally")
      ->capture_default_str()
      ->check(support::whole_number(1, 256));
  app.add_option("--reply", options.reply, "tokens said about a frame")
      ->capture_default_str()
      ->check(support::whole_number(0, 128));
  app.add_option("--temperature", options.temperature, "of what is said; 0: the likeliest token")
      ->capture_default_str()
      ->check(support::number(0, 100, "a number from 0 to 100"));
  app.add_option("--vision-window", options.vision_window, "seconds of frames that stay")
      ->capture_default_str()
      ->check(support::number(0.001, 86400, "seconds, up to a day"));
  app.add_option("--text-sinks", options.text_sinks, "first tokens of text that stay")
      ->capture_default_str()
      ->check(support::whole_number(0, 1 << 20));
  app.add_option("--text-window", options.text_window, "last tokens of text that stay")
      ->capture_default_str()
      ->check(support::whole_number(1, 1 << 20));
  app.add_flag("--real-time", options.real_time, "frames come on their clock and have deadlines");
  app.add_option("--late", options.late, "what becomes of frames while the watcher is busy")
      ->capture_default_str()
      ->check(CLI::IsMember({"block", "drop-oldest", "drop-newest", "coalesce"}));
  app.add_option("--queue", options.queue, "frames that may wait")
      ->capture_default_str()
      ->check(support::whole_number(1, 65536));
  app.add_option("--shed", options.shed, "what to leave out to hold a deadline")
      ->capture_default_str()
      ->check(support::shedding_name());
  app.add_option("--geometry", options.geometry,
                 "of models from the seed. qwen2.5-vl-7b has other defaults: --fps 30 --rows 8 "
                 "--cols 16 --text-sinks 512 --text-window 512")
      ->capture_default_str()
      ->check(CLI::IsMember({"small", "qwen2.5-vl-7b"}));
  app.add_option("-m,--model", options.model,
                 "decoder: GGUF file, or folder with config.json and weights")
      ->check(support::some_name());
  app.add_option("--encoder", options.encoder,
                 "vision encoder: safetensors with the names of Qwen2.5-VL's")
      ->check(support::some_name());
  app.add_option("--encoder-heads", options.encoder_heads, "its attention heads")
      ->capture_default_str()
      ->check(support::whole_number(1, 1024));
  if (kOnHost)
    app.add_option("-t,--threads", options.threads, "threads")
        ->capture_default_str()
        ->check(support::thread_count());
  app.add_option("--seed", options.seed, "of random weights and of what is said")
      ->capture_default_str()
      ->check(support::whole_number(0));
  app.add_flag("--json", options.json, "a JSON line for each frame, and one for the report");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  const Preset preset = preset_of(options.geometry);
  const auto unless_given = [&](const char* name, auto& option, auto value) {
    if (app.count(name) == 0) option = value;
  };
  unless_given("--fps", options.fps, preset.fps);
  unless_given("--rows", options.rows, preset.rows);
  unless_given("--cols", options.cols, preset.cols);
  unless_given("--text-sinks", options.text_sinks, preset.text_sinks);
  unless_given("--text-window", options.text_window, preset.text_window);
  return support::run_program(kProgram, [&] { return run(options); });
}
