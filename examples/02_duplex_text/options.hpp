// SPDX-License-Identifier: MIT
// What the command line asks for. Parsing is in options.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sluice/model/cache_plan.hpp"
#include "sluice/stream/sampler.hpp"

namespace duplex_text {

/// What of the source is read at once.
enum class UnitKind { kWord, kLine, kSentence };
enum class PolicyKind { kWaitK, kSeparator, kLocalAgreement, kHoldN, kAttention, kSpeak, kBatch };
enum class LayoutKind { kGroup, kDecoupled, kGap, kBatch, kInterleaved, kOverlapped };

std::string_view to_string(UnitKind kind);
std::string_view to_string(PolicyKind kind);
std::string_view to_string(LayoutKind kind);

inline constexpr std::int64_t kForEver = -1;

struct Options {
  std::optional<std::string> model;  // else the cached one, else the tiny one

  std::optional<std::string> file;  // else stdin
  double words_per_minute = 0;      // 0: as they come
  UnitKind unit = UnitKind::kWord;
  std::int64_t max_unit_tokens = 256;
  std::string prompt;

  PolicyKind policy = PolicyKind::kWaitK;
  std::int64_t k = 3;
  std::int64_t first = 1;  // source units before the first token, but for wait-k and batch
  std::int64_t n = 4;
  std::int64_t longest = 16;
  double alpha = 0.1;
  std::int64_t newest = 4;
  std::int64_t layer = -1;
  double threshold = 0.5;
  std::string silence;  // "": the first end token
  std::vector<std::string> separators{".", "!", "?"};
  bool stop_at_end_token = false;
  bool ignore_eos = false;

  LayoutKind layout = LayoutKind::kGroup;
  double phi = 0;
  double gap = 9999;
  std::int64_t source_tokens = 0;  // 0: what the file has
  sluice::CacheOptions source;
  sluice::CacheOptions target;

  std::int64_t max_tokens = 256;  // or kForEver
  sluice::SamplerOptions sampler;
  std::int64_t reference_words = 0;  // 0: as many as were written

  std::string_view backend = "cpu";  // that the program is compiled for
  int source_threads = 1;
  int target_threads = 1;
  int shared_threads = 0;  // of one team for both sides; 0: a team each
  bool sequential = false;

  bool json = false;
  bool report = false;
  bool plain = false;

  std::string command;             // the command line, for reports
  std::vector<std::string> notes;  // options that were given and have no effect, or implied others

  /// Positions that depend on the order of arrival.
  bool in_arrival_order() const {
    return layout == LayoutKind::kInterleaved || layout == LayoutKind::kOverlapped;
  }
};

/// "source=sinks:4+window:1024,target=full:8192": each group at most once, others keep what they
/// have. \throws std::invalid_argument whose text says what was expected and found.
void parse_groups(std::string_view text, sluice::CacheOptions& source,
                  sluice::CacheOptions& target);

/// The same spelling for reports.
std::string groups_text(const Options& options);

/// The options, or the status that the program ends with at once: 0 after --help and --version,
/// 2 after naming a wrong flag or value on stderr.
std::variant<Options, int> parse_options(int argc, char** argv);

}  // namespace duplex_text
