// SPDX-License-Identifier: MIT
#include "options.hpp"

#include <charconv>
#include <cstdlib>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string_view>
#include <system_error>

#include <CLI/CLI.hpp>

#include "support/command_line.hpp"
#include "support/terminal.hpp"

namespace listen {

namespace {

using sluice::ListenerOptions;
using sluice::SampleEncoding;
using support::number;
using support::whole_number;

constexpr std::int64_t kMostWords = 1000;
constexpr double kMostDelay = 60000;

int fail(const std::string& message) {
  std::cerr << "listen: " << message << "\nlisten --help lists the options.\n";
  return 2;
}

const std::map<std::string, SampleEncoding> kEncodings{
    {"u8", SampleEncoding::kU8},   {"s16", SampleEncoding::kS16}, {"s24", SampleEncoding::kS24},
    {"s32", SampleEncoding::kS32}, {"f32", SampleEncoding::kF32}, {"f64", SampleEncoding::kF64}};

}  // namespace

Latency parse_latency(const std::string& text) {
  Latency latency;
  if (text == "all") {
    latency.words = ListenerOptions::kWholeUtterance;
    return latency;
  }
  const char* const end = text.data() + text.size();
  double value = 0;
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  const std::string_view unit(stop, static_cast<std::size_t>(end - stop));
  const bool whole = value >= 1 && value <= static_cast<double>(kMostWords) &&
                     value == static_cast<double>(static_cast<std::int64_t>(value));
  if (error == std::errc() && unit == "ms" && value >= 0 && value <= kMostDelay)
    latency.milliseconds = value;
  else if (error == std::errc() && unit.empty() && whole)
    latency.words = static_cast<std::int64_t>(value);
  else
    throw std::invalid_argument("expected a number of words from 1 to " +
                                std::to_string(kMostWords) +
                                ", milliseconds such as 240ms, or all, found '" + text + "'");
  return latency;
}

std::string latency_text(const Latency& latency) {
  if (latency.words == ListenerOptions::kWholeUtterance) return "all";
  if (!latency.milliseconds) return std::to_string(latency.words);
  std::string text = std::to_string(*latency.milliseconds);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text + "ms";
}

std::variant<Options, int> parse_options(int argc, char** argv) {
  Options o;
  o.command = support::join_command(argc, argv);
  std::string latency = "1", encoding = "s16", activations = "f32", late = "block", shed = "none";
  bool real_time = false;

  CLI::App app{
      "Writes down what is said while it is said: English, one speaker, on one or two CPU cores.\n"
      "Words appear on stdout when they are final; on a terminal the words to come are shown "
      "behind\n"
      "them, dim, and rewritten. Everything else is on stderr.\n\n"
      "A small model, trained on synthetic speech alone: see MODEL_CARD.md for what it can do."};
  app.name("listen");
  app.set_version_flag("--version", support::version_text("listen"));
  app.footer(
      "Examples:\n"
      "  listen talk.wav                                     a file, as fast as it goes\n"
      "  listen --real-time --timestamps talk.wav            as if it were spoken now\n"
      "  arecord -q -t raw -f S16_LE -r 16000 - | listen -   a microphone (ALSA)\n"
      "  parec --raw --format=s16le --rate=16000 --channels=1 | listen -   (PulseAudio, PipeWire)\n"
      "  ffmpeg -v error -i talk.mp3 -f s16le -ar 16000 -ac 1 - | listen -\n"
      "Exit status: 0 done (also when the reader of stdout went away), 1 an error, 2 a wrong flag "
      "or\n"
      "value, 130 after Ctrl-C and 143 after SIGTERM. An option given twice counts the last time.");
  app.get_formatter()->column_width(32);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);

  const char* group = "Audio";
  const auto option = [&](const std::string& name, auto& target, const std::string& text) {
    return app.add_option(name, target, text)->group(group);
  };
  const auto with_default = [&](const std::string& name, auto& target, const std::string& text) {
    return option(name, target, text)->capture_default_str();
  };
  const auto flag = [&](const std::string& name, bool& target, const std::string& text) {
    return app.add_flag(name, target, text)->group(group);
  };

  with_default("file", o.input, "audio file (WAV, FLAC, ...), or - for raw samples on stdin");
  const CLI::Option* const rate_option =
      with_default("--rate", o.raw.sample_rate, "samples a second, of raw audio")
          ->check(whole_number(1000, 768000));
  const CLI::Option* const channels_option =
      with_default("--channels", o.raw.channels, "channels of raw audio; their mean is heard")
          ->check(whole_number(1, 64));
  const CLI::Option* const encoding_option = with_default("--encoding", encoding,
                                                          "samples of raw audio, little endian:\n"
                                                          "u8, s16, s24, s32, f32 or f64")
                                                 ->check(CLI::IsMember(&kEncodings));
  flag("--real-time", real_time, "play a file at the speed at which it was spoken");
  option("--speed", o.speed, "the same so many times as fast")
      ->check(number(0.01, 1000, "a factor from 0.01 to 1000"));
  with_default("--packet-ms", o.packet_ms, "audio that is handed over at a time")
      ->check(number(0.1, 10000, "milliseconds from 0.1 to 10000"));

  group = "Listening";
  option("-m,--model", o.model,
         "GGUF file; without it $SLUICE_LISTEN_MODEL, else the one that\n"
         "comes with this example")
      ->check(support::some_name());
  with_default("-l,--latency", latency,
               "when a word is final: once so many words were heard from it on\n"
               "(1, 3, 5, ...), so many milliseconds after it was heard (240ms),\n"
               "or when the speaker pauses (all)");
  with_default("--endpoint-ms", o.endpoint_ms, "a pause that ends an utterance; 0: none does")
      ->check(number(0, 1e6, "milliseconds from 0 to 1e6"));
  with_default("--max-utterance-ms", o.max_utterance_ms,
               "an utterance ends after so long at the latest, silence before its\n"
               "first word included; 0: never")
      ->check(number(0, 1e6, "milliseconds from 0 to 1e6"));

  group = "Deadlines (of audio that comes as it is spoken)";
  option("--deadline", o.deadline_ms,
         "milliseconds from when a frame of 40 ms was there to when it is\n"
         "heard and what is due with it written")
      ->check(number(1, 1e6, "milliseconds from 1 to 1e6"));
  with_default("--late", late,
               "audio that is not heard in time: block (it is heard late) or\n"
               "drop-oldest (it is not heard)")
      ->check(CLI::IsMember({"block", "drop-oldest"}));
  with_default("--shed", shed,
               "writing that would be late: none (it is late), skip (no word is\n"
               "begun) or shorten (words are broken off); it comes later")
      ->check(support::shedding_name());

  group = "Work";
  with_default("--source-threads", o.source_threads, "threads that listen")
      ->check(support::thread_count());
  with_default("--target-threads", o.target_threads, "threads that write")
      ->check(support::thread_count());
  flag("--sequential", o.sequential, "listen and write in turns on one thread: the same words");
  with_default("--activations", activations,
               "how activations meet weights: f32 (exact), bf16 or int8 (rounded)")
      ->check(support::activations_name());

  group = "Output";
  CLI::Option* const timestamps_option =
      flag("-t,--timestamps", o.timestamps,
           "a line a word: when it was spoken, when it was final, the word");
  CLI::Option* const json_option =
      flag("-j,--json", o.json, "an object a line: partial, word, endpoint, end");
  flag("-s,--stats", o.stats, "figures at the end, on stderr (with --json an object more)");
  CLI::Option* const plain_option =
      flag("--plain", o.plain, "final words only, also on a terminal");
  json_option->excludes(timestamps_option)->excludes(plain_option);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    return fail(error.what());
  }
  try {
    o.latency = parse_latency(latency);
  } catch (const std::invalid_argument& error) {
    return fail(std::string("--latency: ") + error.what());
  }
  if (real_time && o.speed == 0) o.speed = 1;
  if (o.input == "-" && o.speed > 0) return fail("--real-time: stdin sets its own pace");
  if (o.input == "-" && support::stdin_is_terminal())
    return fail("file: expected one, or raw samples on stdin, found a terminal");
  for (const CLI::Option* const of_raw : {rate_option, channels_option, encoding_option})
    if (of_raw->count() > 0 && o.input != "-")
      return fail(of_raw->get_name() + ": of raw samples on stdin; a file says its own");
  o.encoding = kEncodings.at(encoding);
  o.activations = support::activations_of(activations);
  o.late = support::late_policy_of(late);
  o.shedding = support::shedding_of(shed);
  if (o.deadline_ms > 0 && o.input != "-" && o.speed == 0)
    return fail("--deadline: a file has none without --real-time or --speed");
  if (o.deadline_ms == 0 && (late != "block" || shed != "none"))
    return fail("--late, --shed: for which --deadline?");
  if (o.model.empty()) {
    const char* const named = std::getenv("SLUICE_LISTEN_MODEL");
    o.model = named != nullptr && *named != '\0' ? named : SLUICE_LISTEN_MODEL_FILE;
  }
  return o;
}

}  // namespace listen
