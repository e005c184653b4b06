// SPDX-License-Identifier: MIT
// What the command line asks for. Parsing is in options.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sluice/backend/cpu/linear_workspace.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/stream/sampler.hpp"

namespace stream_text {

enum class Mode { kGenerate, kPerplexity, kChat };
enum class KvType { kF32, kF16, kBF16, kInt8, kFp8, kQ8_0, kQ4_0 };
enum class Format { kText, kJson };

/// Policies that look at queries or likelihoods, beside those of CachePolicy.
enum class Choosing { kNone, kSnapKv, kH2O, kSirLlm, kQuest, kTidalDecode, kLightTransfer };
std::string_view to_string(Choosing policy);
/// Whether it keeps everything, at least in some layers, or --window entries a head.
inline bool keeps_all(Choosing policy) {
  return policy == Choosing::kQuest || policy == Choosing::kTidalDecode ||
         policy == Choosing::kLightTransfer;
}

inline constexpr std::int64_t kForEver = -1;

struct Options {
  std::string model;
  Mode mode = Mode::kGenerate;

  // Input. Neither prompt nor file: stdin, or nothing when a snapshot is continued.
  std::optional<std::string> prompt;
  std::optional<std::string> file;  // "-" is stdin

  std::int64_t predict = 256;              // tokens to write (a reply, with --chat), or kForEver
  std::optional<std::int64_t> read_limit;  // --perplexity: tokens to read
  bool ignore_eos = false;
  sluice::SamplerOptions sampler;

  sluice::CacheOptions cache;
  Choosing choosing = Choosing::kNone;  // else cache.policy says kFull
  std::string heads;                    // --policy per-head: the head map's file or folder
  double sparsity = 0.5;                // of a DuoAttention map: share of streaming heads
  KvType kv_type = KvType::kF16;
  std::string_view backend = "cpu";  // that the program is compiled for
  int threads = 1;
  bool lock_memory = false;
  sluice::Activations activations = sluice::Activations::kFloat32;

  std::string system;  // --chat

  std::int64_t ppl_stride = 0;  // 0: no points
  std::int64_t score_every = 1;
  bool token_wise = false;

  std::optional<std::string> save;
  std::optional<std::string> load;

  Format format = Format::kText;
  std::optional<std::string> latency_log;
  int endless_bins = 10;

  std::string command;             // the command line, for reports
  std::vector<std::string> notes;  // options that were given and have no effect
};

std::string_view to_string(KvType type);

/// The options, or the status that the program ends with at once: 0 after --help and --version,
/// 2 after naming a wrong flag or value on stderr.
std::variant<Options, int> parse_options(int argc, char** argv);

}  // namespace stream_text
