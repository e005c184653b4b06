// SPDX-License-Identifier: MIT
// What the command line asks for. Parsing is in options.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "sluice/io/wav.hpp"
#include "sluice/stream/listener_engine.hpp"

namespace listen {

/// When words are written: k words after they were heard, or some milliseconds after.
struct Latency {
  std::int64_t words = 1;
  std::optional<double> milliseconds;  // else what the model was trained for
};

struct Options {
  std::string model;  // a GGUF file

  std::string input = "-";  // a file, or "-": raw samples on stdin
  sluice::AudioFormat raw;  // of raw samples
  sluice::SampleEncoding encoding = sluice::SampleEncoding::kS16;
  double speed = 0;  // of real time; 0: as fast as it goes
  double packet_ms = 20;

  Latency latency;
  double endpoint_ms = 800;
  double max_utterance_ms = 20000;

  double deadline_ms = 0;  // of a source row; 0: none
  sluice::LatePolicy late = sluice::LatePolicy::kBlock;
  sluice::Shedding shedding = sluice::Shedding::kNone;

  sluice::Activations activations = sluice::Activations::kFloat32;
  int source_threads = 1;
  int target_threads = 1;
  bool sequential = false;

  bool json = false;
  bool timestamps = false;
  bool stats = false;
  bool plain = false;

  std::string command;  // the command line, for reports
};

/// "3" (words), "240ms" (milliseconds), "all" (when the utterance has ended).
/// \throws std::invalid_argument whose text says what was expected and found.
Latency parse_latency(const std::string& text);
std::string latency_text(const Latency& latency);

/// The options, or the status that the program ends with at once: 0 after --help and --version,
/// 2 after naming a wrong flag or value on stderr.
std::variant<Options, int> parse_options(int argc, char** argv);

}  // namespace listen
