// SPDX-License-Identifier: MIT
#include "options.hpp"

#include <algorithm>
#include <iostream>
#include <limits>
#include <string_view>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>

#include "support/command_line.hpp"

namespace stream_text {

namespace {

using support::number;
using support::whole_number;

int fail(const std::string& message) {
  std::cerr << "stream_text: " << message << "\nstream_text --help lists the options.\n";
  return 2;
}

}  // namespace

std::string_view to_string(KvType type) {
  switch (type) {
    case KvType::kF32: return "f32";
    case KvType::kF16: return "f16";
    case KvType::kBF16: return "bf16";
    case KvType::kInt8: return "int8";
    case KvType::kFp8: return "fp8";
    case KvType::kQ8_0: return "q8_0";
    case KvType::kQ4_0: return "q4_0";
  }
  return "unknown";
}

std::string_view to_string(Choosing policy) {
  switch (policy) {
    case Choosing::kNone: return "none";
    case Choosing::kSnapKv: return "snap-kv";
    case Choosing::kH2O: return "h2o";
    case Choosing::kSirLlm: return "sir-llm";
    case Choosing::kQuest: return "quest";
    case Choosing::kTidalDecode: return "tidal-decode";
    case Choosing::kLightTransfer: return "light-transfer";
  }
  return "unknown";
}

std::variant<Options, int> parse_options(int argc, char** argv) {
  Options o;
  o.command = support::join_command(argc, argv);
  o.threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 8U));
  // The sampling defaults of llama.cpp; the seed is fixed, so that a command repeats its text.
  o.sampler.temperature = 0.8;
  o.sampler.top_k = 40;
  o.sampler.top_p = 0.95;
  o.sampler.min_p = 0.05;
  std::string prompt, file, perplexity, save, load, latency_log;
  std::string policy = "sink-window", position = "in-cache", keys = "rotated", kv_type = "f16",
              format = "text", activations = "f32";
  bool chat = false;

  CLI::App app{
      "Streams text through a language model at constant memory and constant latency.\n"
      "Text goes to stdout, everything else to stderr."};
  app.name("stream_text");
  app.set_version_flag("--version", support::version_text("stream_text"));
  app.footer(
      "Exit status: 0 done (also when the reader of stdout went away), 1 an error, 2 a wrong flag\n"
      "or value, 130 after Ctrl-C and 143 after SIGTERM, both with the report. An option that is\n"
      "given twice counts the last time.");
  app.get_formatter()->column_width(32);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);

  const char* group = "Model";
  const auto option = [&](const std::string& name, auto& target, const std::string& text) {
    return app.add_option(name, target, text)->group(group);
  };
  const auto with_default = [&](const std::string& name, auto& target, const std::string& text) {
    return option(name, target, text)->capture_default_str();
  };
  const auto flag = [&](const std::string& name, bool& target, const std::string& text) {
    return app.add_flag(name, target, text)->group(group);
  };

  option("-m,--model", o.model, "GGUF file, or folder with config.json and safetensors")
      ->required()
      ->check(support::some_name());
  with_default("-t,--threads", o.threads, "threads of the model")->check(support::thread_count());
  flag("--mlock", o.lock_memory, "keep the weights in memory: they are never paged out");
  with_default(
      "--activations", activations,
      "how activations meet weights: f32 (exact), bf16 (rounded beside bf16 weights), int8 "
      "(also rounded beside quantised weights, faster)")
      ->check(support::activations_name());

  group = "Input (without any of these: stdin, read as it comes)";
  CLI::Option* const prompt_option = option("-p,--prompt", prompt, "text to continue");
  CLI::Option* const file_option = option("-f,--file", file, "file to read; - is stdin");
  file_option->excludes(prompt_option);

  group = "Cache";
  with_default("--policy", policy,
               "what is kept: sink-window (StreamingLLM), window (no sinks), full (all,\n"
               "up to --capacity), recompute (the window rebuilt for every token),\n"
               "per-head (what --heads says of each KV head); snap-kv, h2o, sir-llm\n"
               "(--window entries a head, chosen by attention or surprisal); quest,\n"
               "tidal-decode (all, of which a token reads --window); light-transfer (all in\n"
               "half of the layers, in others sinks and --window, by what the prompt shows)")
      ->check(CLI::IsMember({"sink-window", "window", "full", "recompute", "per-head", "snap-kv",
                             "h2o", "sir-llm", "quest", "tidal-decode", "light-transfer"}));
  CLI::Option* const heads_option =
      option("--heads", o.heads,
             "head map of per-head: a .json of our form, a DuoAttention folder or .tsv");
  CLI::Option* const sparsity_option =
      with_default("--sparsity", o.sparsity, "share of streaming heads of a DuoAttention map")
          ->check(number(0, 1, "a number from 0 to 1"));
  CLI::Option* const sinks_option =
      with_default("--sinks", o.cache.num_sink_tokens, "first tokens kept for ever (sink-window)")
          ->check(whole_number(0, 1 << 30));
  CLI::Option* const window_option =
      with_default("--window", o.cache.window_size,
                   "keys a token sees besides the sinks, its own included (all but full and\n"
                   "per-head)")
          ->check(whole_number(1, 1 << 30));
  CLI::Option* const capacity_option =
      with_default("--capacity", o.cache.capacity,
                   "tokens that --policy full can hold, and full heads of per-head")
          ->check(whole_number(1, 1 << 30));
  with_default("--position", position,
               "where a query sees the kept tokens: in-cache (contiguous ranks) or\n"
               "in-text (their places in the stream)")
      ->check(CLI::IsMember({"in-cache", "in-text"}));
  with_default("--keys", keys, "keys are stored rotated once, or raw and rotated when read")
      ->check(CLI::IsMember({"rotated", "raw"}));
  with_default("--kv-type", kv_type,
               "elements of keys and values; int8, fp8: codes of a byte\nand a float scale a row; "
               "q8_0, q4_0: llama.cpp's\nblocks of 32 channels, 8.5 and 4.5 bits each")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8", "fp8", "q8_0", "q4_0"}));
  with_default("-b,--chunk,--batch-size", o.cache.chunk_size,
               "tokens read at once; 0: the smaller of 512 and the window")
      ->check(whole_number(0, 1 << 20));

  group = "Writing";
  std::int64_t predict = o.predict;
  CLI::Option* const predict_option =
      with_default("-n,--predict,--n-predict", predict,
                   "tokens to write (with --chat: a reply; with --perplexity: to read,\n"
                   "all unless given); -1: for ever")
          ->check(whole_number(-1));
  flag("--ignore-eos", o.ignore_eos, "go on after an end token");
  with_default("--temp", o.sampler.temperature, "temperature; 0: the most likely token (greedy)")
      ->check(number(0, 1e6, "a number of 0 or more"));
  with_default("--top-k", o.sampler.top_k, "draw from the k most likely tokens; 0: from all")
      ->check(whole_number(0, std::numeric_limits<int>::max()));
  with_default("--top-p", o.sampler.top_p, "draw from the most likely tokens that make up p")
      ->check(number(0, 1, "a number from 0 to 1"));
  with_default("--min-p", o.sampler.min_p, "drop tokens less than p times as likely as the first")
      ->check(number(0, 1, "a number from 0 to 1"));
  with_default("--repeat-penalty", o.sampler.repetition_penalty,
               "divides the logits of recent tokens; 1: off")
      ->check(number(1e-6, 1e6, "a number above 0"));
  with_default("--repeat-last-n", o.sampler.repetition_window, "tokens that count as recent")
      ->check(whole_number(0, 1 << 20));
  with_default("-s,--seed", o.sampler.seed, "the same seed gives the same text")
      ->check(whole_number(0));

  group = "Dialogue";
  CLI::Option* const chat_option =
      flag("--chat,--conversation", chat,
           "endless rounds over one bounded cache, a line of stdin each, in the\n"
           "model's own chat template; /reset starts anew, /quit ends")
          ->excludes(prompt_option)
          ->excludes(file_option);
  option("--system,--system-prompt", o.system, "system message")->needs(chat_option);

  group = "Perplexity";
  CLI::Option* const perplexity_option =
      option("--perplexity", perplexity,
             "FILE: read a stream and score it instead of writing; without FILE:\n"
             "what -f, -p or stdin gives")
          ->expected(0, 1)
          ->excludes(chat_option);
  with_default("--ppl-stride", o.ppl_stride, "print a point every so many tokens; 0: only the end")
      ->check(whole_number(0))
      ->needs(perplexity_option);
  with_default("--score-every", o.score_every,
               "score every so many tokens only: makes --policy recompute bearable")
      ->check(whole_number(1))
      ->needs(perplexity_option);
  flag("--token-wise", o.token_wise, "read token by token and measure the latency of each")
      ->needs(perplexity_option);

  group = "Snapshots";
  CLI::Option* const save_option =
      option("--save", save, "at the end, write the stream's state to this file");
  CLI::Option* const load_option =
      option("--load", load,
             "continue a saved stream (same model and cache options); stdin is\n"
             "read only for -f -");

  group = "Output";
  with_default("--format", format, "text, or json: one object a line on stdout")
      ->check(CLI::IsMember({"text", "json"}));
  CLI::Option* const log_option =
      option("--latency-log", latency_log,
             "at the end, write latency and resident memory by parts of the stream,\n"
             "as JSON");
  with_default("--endless-bins", o.endless_bins, "parts in that file")
      ->check(whole_number(1, 1000))
      ->needs(log_option);

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return 0;
  } catch (const CLI::CallForVersion&) {
    std::cout << app.version() << '\n';
    return 0;
  } catch (const CLI::ParseError& error) {
    return fail(error.what());
  }

  const auto taken = [](const CLI::Option* given, std::string& text) {
    return given->count() > 0 ? std::optional(std::move(text)) : std::nullopt;
  };
  o.prompt = taken(prompt_option, prompt);
  o.file = taken(file_option, file);
  o.save = taken(save_option, save);
  o.load = taken(load_option, load);
  o.latency_log = taken(log_option, latency_log);
  o.format = format == "json" ? Format::kJson : Format::kText;
  o.activations = support::activations_of(activations);
  for (const KvType type :
       {KvType::kF32, KvType::kBF16, KvType::kInt8, KvType::kFp8, KvType::kQ8_0, KvType::kQ4_0})
    if (kv_type == to_string(type)) o.kv_type = type;
  o.cache.key_form = keys == "raw" ? sluice::KeyForm::kRaw : sluice::KeyForm::kRotated;
  o.cache.position_rule =
      position == "in-text" ? sluice::PositionRule::kInText : sluice::PositionRule::kInCache;
  for (const auto value :
       {sluice::CachePolicy::kSinkWindow, sluice::CachePolicy::kWindow, sluice::CachePolicy::kFull,
        sluice::CachePolicy::kRecompute, sluice::CachePolicy::kPerHead})
    if (policy == sluice::to_string(value)) o.cache.policy = value;

  for (const Choosing value : {Choosing::kSnapKv, Choosing::kH2O, Choosing::kSirLlm,
                               Choosing::kQuest, Choosing::kTidalDecode, Choosing::kLightTransfer})
    if (policy == to_string(value)) o.choosing = value;
  const bool chooses = o.choosing != Choosing::kNone;
  if (chooses) o.cache.policy = sluice::CachePolicy::kFull;
  if (chooses && kv_type != "f16")
    return fail("--kv-type: expected f16 with --policy " + policy + ", found " + kv_type);
  if (chooses && keys != "rotated")
    return fail("--keys: expected rotated with --policy " + policy + ", found " + keys);
  if (chooses && o.cache.window_size < 64)
    return fail("--window: expected at least 64 with --policy " + policy + ", found " +
                std::to_string(o.cache.window_size));
  if (o.choosing == Choosing::kLightTransfer)
    o.cache.chunk_size = std::min(o.cache.chunk(), o.cache.window_size);
  if (o.choosing == Choosing::kLightTransfer && perplexity_option->count() > 0)
    return fail("--policy: expected one that needs no prompt with --perplexity, found " + policy);
  if (chooses && position == "in-cache" && keeps_all(o.choosing))
    o.cache.position_rule = sluice::PositionRule::kInText;  // a full cache knows no other

  o.predict = predict;
  if (chat) {
    o.mode = Mode::kChat;
  } else if (perplexity_option->count() > 0) {
    o.mode = Mode::kPerplexity;
    if (!perplexity.empty()) {
      if (o.file || o.prompt)
        return fail("--perplexity: a FILE cannot be combined with --file or --prompt");
      o.file = std::move(perplexity);
    }
    if (predict_option->count() > 0 && predict != kForEver) o.read_limit = predict;
  }

  // Options that do not act are named, so that no run is taken for another.
  using sluice::CachePolicy;
  const CachePolicy kept = o.cache.policy;
  const auto idle = [&](const CLI::Option* given, bool acts) {
    if (given->count() > 0 && !acts)
      o.notes.push_back(given->get_name() + " has no effect with --policy " + policy);
  };
  idle(sinks_option, kept == CachePolicy::kSinkWindow || o.choosing == Choosing::kSirLlm ||
                         o.choosing == Choosing::kLightTransfer);
  idle(window_option, chooses || (kept != CachePolicy::kFull && kept != CachePolicy::kPerHead));
  idle(capacity_option, chooses ? keeps_all(o.choosing)
                                : kept == CachePolicy::kFull || kept == CachePolicy::kPerHead);
  idle(heads_option, kept == CachePolicy::kPerHead);
  idle(sparsity_option, kept == CachePolicy::kPerHead);
  if (kept == CachePolicy::kPerHead && o.heads.empty())
    return fail("--heads: --policy per-head needs a head map");

  const std::int64_t chunk = o.cache.chunk_size;
  if ((kept == CachePolicy::kSinkWindow || kept == CachePolicy::kWindow) &&
      chunk > o.cache.window_size)
    return fail("--chunk: expected at most the window, " + std::to_string(o.cache.window_size) +
                ", found " + std::to_string(chunk));
  if (chunk > o.cache.capacity_needed() &&
      (kept == CachePolicy::kFull || kept == CachePolicy::kRecompute))
    return fail("--chunk: expected at most what the cache holds, " +
                std::to_string(o.cache.capacity_needed()) + ", found " + std::to_string(chunk));
  if (o.score_every > 1 && o.token_wise)
    return fail("--token-wise: expected --score-every 1, found " + std::to_string(o.score_every));
  return o;
}

}  // namespace stream_text
