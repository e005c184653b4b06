// SPDX-License-Identifier: MIT
#include "options.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <iostream>
#include <limits>
#include <map>
#include <stdexcept>
#include <system_error>
#include <utility>

#include <CLI/CLI.hpp>

#include "sluice/position/position.hpp"
#include "support/command_line.hpp"

namespace duplex_text {

namespace {

using sluice::CacheOptions;
using sluice::CachePolicy;
using support::number;
using support::whole_number;

constexpr std::array kUnits{UnitKind::kWord, UnitKind::kLine, UnitKind::kSentence};
constexpr std::array kPolicies{
    PolicyKind::kWaitK,     PolicyKind::kSeparator, PolicyKind::kLocalAgreement, PolicyKind::kHoldN,
    PolicyKind::kAttention, PolicyKind::kSpeak,     PolicyKind::kBatch};
constexpr std::array kLayouts{LayoutKind::kGroup,       LayoutKind::kDecoupled,
                              LayoutKind::kGap,         LayoutKind::kBatch,
                              LayoutKind::kInterleaved, LayoutKind::kOverlapped};

int fail(const std::string& message) {
  std::cerr << "duplex_text: " << message << "\nduplex_text --help lists the options.\n";
  return 2;
}

template <class Kinds>
CLI::IsMember one_of(const Kinds& kinds) {
  std::vector<std::string> names;
  for (const auto kind : kinds) names.emplace_back(to_string(kind));
  return CLI::IsMember(names);
}

template <class Kinds>
auto named(const Kinds& kinds, const std::string& name) {
  return *std::find_if(kinds.begin(), kinds.end(),
                       [&](auto kind) { return to_string(kind) == name; });
}

/// Calls visit for each part between separators, empty ones too.
template <class Visit>
void split(std::string_view text, char separator, Visit&& visit) {
  for (;;) {
    const std::size_t end = text.find(separator);
    visit(text.substr(0, end));
    if (end == std::string_view::npos) return;
    text.remove_prefix(end + 1);
  }
}

/// "sinks:4+window:1024", "window:1024" or "full:8192".
void parse_retention(std::string_view text, CacheOptions& cache) {
  const auto wrong = [&] {
    throw std::invalid_argument(
        "expected sinks:N+window:N, window:N or full:N, each N a whole number from 1 to " +
        std::to_string(1 << 30) + " (sinks: from 0), found '" + std::string(text) + "'");
  };
  std::map<std::string, std::int64_t, std::less<>> values;
  split(text, '+', [&](std::string_view part) {
    const std::size_t colon = part.find(':');
    if (colon == std::string_view::npos) wrong();
    const std::string name(part.substr(0, colon));
    const std::string_view digits = part.substr(colon + 1);
    std::int64_t value = 0;
    const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || stop != digits.data() + digits.size() || value > (1 << 30) ||
        value < (name == "sinks" ? 0 : 1) || !values.emplace(name, value).second)
      wrong();
  });
  const auto has = [&](std::string_view name) {
    return values.find(name) != values.end();
  };
  if (values.size() == 1 && has("full")) {
    cache.policy = CachePolicy::kFull;
    cache.capacity = values["full"];
  } else if (values.size() == 1 && has("window")) {
    cache.policy = CachePolicy::kWindow;
    cache.window_size = values["window"];
  } else if (values.size() == 2 && has("window") && has("sinks")) {
    cache.policy = CachePolicy::kSinkWindow;
    cache.window_size = values["window"];
    cache.num_sink_tokens = values["sinks"];
  } else {
    wrong();
  }
}

std::string retention_text(const CacheOptions& cache) {
  switch (cache.policy) {
    case CachePolicy::kSinkWindow:
      return "sinks:" + std::to_string(cache.num_sink_tokens) +
             "+window:" + std::to_string(cache.window_size);
    case CachePolicy::kWindow: return "window:" + std::to_string(cache.window_size);
    case CachePolicy::kFull: return "full:" + std::to_string(cache.capacity);
    case CachePolicy::kRecompute:
    case CachePolicy::kPerHead: break;
  }
  return "unknown";
}

}  // namespace

std::string_view to_string(UnitKind kind) {
  switch (kind) {
    case UnitKind::kWord: return "word";
    case UnitKind::kLine: return "line";
    case UnitKind::kSentence: return "sentence";
  }
  return "unknown";
}

std::string_view to_string(PolicyKind kind) {
  switch (kind) {
    case PolicyKind::kWaitK: return "wait-k";
    case PolicyKind::kSeparator: return "separator";
    case PolicyKind::kLocalAgreement: return "local-agreement";
    case PolicyKind::kHoldN: return "hold-n";
    case PolicyKind::kAttention: return "attention";
    case PolicyKind::kSpeak: return "speak";
    case PolicyKind::kBatch: return "batch";
  }
  return "unknown";
}

std::string_view to_string(LayoutKind kind) {
  switch (kind) {
    case LayoutKind::kGroup: return "group";
    case LayoutKind::kDecoupled: return "decoupled";
    case LayoutKind::kGap: return "gap";
    case LayoutKind::kBatch: return "batch";
    case LayoutKind::kInterleaved: return "interleaved";
    case LayoutKind::kOverlapped: return "overlapped";
  }
  return "unknown";
}

void parse_groups(std::string_view text, CacheOptions& source, CacheOptions& target) {
  std::string seen;
  split(text, ',', [&](std::string_view group) {
    const std::size_t equals = group.find('=');
    const std::string name(group.substr(0, equals));
    if (equals == std::string_view::npos || (name != "source" && name != "target"))
      throw std::invalid_argument("expected source=... or target=..., found '" +
                                  std::string(group) + "'");
    if (seen == name) throw std::invalid_argument("expected " + name + " once, found it twice");
    seen = name;
    parse_retention(group.substr(equals + 1), name == "source" ? source : target);
  });
}

std::string groups_text(const Options& options) {
  return "source=" + retention_text(options.source) + ",target=" + retention_text(options.target);
}

std::variant<Options, int> parse_options(int argc, char** argv) {
  Options o;
  o.command = support::join_command(argc, argv);
  std::string model, file, unit = "word", policy = "wait-k", layout = "group",
                           position = "in-cache", groups = groups_text(o);

  CLI::App app{
      "Reads text while it arrives and writes through a language model at the same time: a source\n"
      "group and a target group of keys and values, and a policy that says when to read and when "
      "to\n"
      "write. Target text goes to stdout, everything else to stderr.\n\n"
      "Common models (SmolLM2, Llama, Qwen as released) were trained on one counter for all text. "
      "A\n"
      "model that was not trained for a group layout and for reading while it writes loses "
      "quality,\n"
      "often down to loops: the program shows the mechanism. --policy batch --layout batch is "
      "what\n"
      "such models were trained on."};
  app.name("duplex_text");
  app.set_version_flag("--version", support::version_text("duplex_text"));
  app.footer(
      "Exit status: 0 done (also when the reader of stdout went away), 1 an error or a full "
      "cache,\n"
      "2 a wrong flag or value, 130 after Ctrl-C and 143 after SIGTERM, both with the report. An\n"
      "option that is given twice counts the last time.");
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
  constexpr std::int64_t kMost = std::int64_t{1} << 30;

  CLI::Option* const model_option =
      option("-m,--model", model,
             "GGUF file, or folder with config.json and safetensors. Without it:\n"
             "$SLUICE_MODEL, else the SmolLM2 of the user's cache folder, else a tiny\n"
             "model whose text is noise")
          ->check(support::some_name());
  with_default("--source-threads", o.source_threads, "threads that read")
      ->check(support::thread_count());
  with_default("--target-threads", o.target_threads, "threads that write")
      ->check(support::thread_count());
  with_default("--shared-threads", o.shared_threads,
               "one team of so many threads that helps both sides, in place of the two; 0: none")
      ->check(whole_number(0, 1024));
  flag("--sequential", o.sequential,
       "read and write in turns on one thread: the same tokens, later");

  group = "Source (stdin, as it comes, unless --file is given)";
  CLI::Option* const file_option = option("-f,--file", file, "file to read; - is stdin");
  with_default("--wpm", o.words_per_minute,
               "words per minute at which the source is fed; 0: as it comes")
      ->check(number(0, 1e9, "a number of 0 or more"));
  with_default("--unit", unit,
               "what is read at once: word, line, or sentence (up to . ! ? and white\n"
               "space, or an empty line)")
      ->check(one_of(kUnits));
  with_default("--max-unit", o.max_unit_tokens, "tokens of a unit; longer ones become several")
      ->check(whole_number(1, 1 << 16));
  option("-p,--prompt", o.prompt,
         "instruction. In the model's chat template, if it has one, the user's\n"
         "header and the instruction are the first source unit, the end of the\n"
         "user's turn the last, and the assistant's header opens the target");

  group = "Policy";
  with_default("--policy", policy,
               "when to read and when to write: wait-k (one source unit a word), separator\n"
               "(one a closed target unit), local-agreement and hold-n (a hypothesis a\n"
               "source unit, of which a part becomes final), attention (reads when the\n"
               "newest source is looked at), speak (speaks or is silent at each source\n"
               "unit), batch (reads everything first)")
      ->check(one_of(kPolicies));
  CLI::Option* const k_option =
      with_default("-k,--k", o.k, "wait-k: source units ahead of the target")
          ->check(whole_number(1, kMost));
  CLI::Option* const first_option =
      with_default("--first", o.first,
                   "source units, besides the prompt, before the first token (all but wait-k\n"
                   "and batch)")
          ->check(whole_number(1, kMost));
  CLI::Option* const separator_option =
      option("--separator", o.separators,
             "separator: text that ends a target unit where a token ends with it; may be\n"
             "given several times [. ! ?]")
          ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
          ->expected(1);
  CLI::Option* const n_option =
      with_default("--n", o.n, "hold-n: tokens of a hypothesis that are withheld")
          ->check(whole_number(0, 4096));
  CLI::Option* const longest_option =
      with_default("--longest", o.longest,
                   "tokens of a hypothesis (local-agreement, hold-n) or a turn (speak)")
          ->check(whole_number(1, 4096));
  CLI::Option* const alpha_option =
      with_default("--alpha", o.alpha,
                   "attention: reads when the newest source tokens get this share or more")
          ->check(number(1e-9, 1, "a number above 0, at most 1"));
  CLI::Option* const newest_option =
      with_default("--newest", o.newest, "attention: how many source tokens are the newest")
          ->check(whole_number(1, kMost));
  CLI::Option* const layer_option =
      with_default("--layer", o.layer, "attention: whose; below 0: from the last")
          ->check(whole_number(-(1 << 16), 1 << 16));
  CLI::Option* const threshold_option =
      with_default("--threshold", o.threshold,
                   "speak: silent while the silence token is more likely than this")
          ->check(number(0, 1, "a number from 0 to 1"));
  CLI::Option* const silence_option =
      option("--silence", o.silence, "speak: text of the silence token [the model's end token]");

  group = "Positions and memory";
  with_default("--layout", layout,
               "group (source from 0, target from --phi), decoupled (both from 0), gap\n"
               "(target from --gap + 1), batch (target behind the whole source),\n"
               "interleaved (one counter by arrival), overlapped (rounds share positions);\n"
               "the last two depend on the order of arrival: they imply --sequential")
      ->check(one_of(kLayouts));
  CLI::Option* const phi_option =
      with_default("--phi", o.phi, "group: position of the target's first token, halves allowed")
          ->check(number(-1e9, 1e9, "a number"));
  CLI::Option* const gap_option = with_default("--gap", o.gap, "gap: the delta")
                                      ->check(number(0, 1e9, "a number of 0 or more"));
  CLI::Option* const source_tokens_option =
      with_default("--source-tokens", o.source_tokens,
                   "batch layout: tokens of the whole source, prompt included; counted where\n"
                   "the source is a --file")
          ->check(whole_number(1, kMost));
  with_default("--groups", groups,
               "what each group keeps: sinks:N+window:N (endless), window:N (endless; falls\n"
               "apart once the first tokens leave), full:N (N tokens, then it ends)");
  CLI::Option* const position_option =
      with_default("--position", position,
                   "where kept tokens stand: in-cache (contiguous ranks, small for ever) or\n"
                   "in-text (their places in the stream)")
          ->check(CLI::IsMember({"in-cache", "in-text"}));

  group = "Writing";
  with_default("-n,--max-tokens,--predict", o.max_tokens, "target tokens; -1: for ever")
      ->check(whole_number(-1));
  flag("--stop-at-end-token", o.stop_at_end_token,
       "an end token ends the target at once; without it, only once the source has\n"
       "ended, and before that it means: read on");
  flag("--ignore-eos", o.ignore_eos, "an end token is a token like others");
  with_default("--temp,--temperature", o.sampler.temperature,
               "temperature; 0: the most likely token (greedy)")
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

  group = "Output";
  CLI::Option* const json_option =
      flag("--json", o.json,
           "events on stdout, one object a line: fed, read, token, provisional,\n"
           "confirmed, retracted, end, report");
  flag("--report", o.report, "the whole report on stderr at the end (after Ctrl-C in any case)");
  flag("--plain", o.plain, "target text alone on stdout on a terminal too, instead of two panes")
      ->excludes(json_option);
  with_default("--reference-words", o.reference_words,
               "words of a reference translation, for AL; 0: as many as were written")
      ->check(whole_number(0, kMost));

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

  if (model_option->count() > 0) o.model = std::move(model);
  if (file_option->count() > 0 && file != "-") o.file = std::move(file);
  o.unit = named(kUnits, unit);
  o.policy = named(kPolicies, policy);
  o.layout = named(kLayouts, layout);
  try {
    parse_groups(groups, o.source, o.target);
  } catch (const std::invalid_argument& error) {
    return fail(std::string("--groups: ") + error.what());
  }

  // Options that do not act are named, so that no run is taken for another.
  const auto idle = [&](const CLI::Option* given, bool acts, const std::string& with) {
    if (given->count() > 0 && !acts)
      o.notes.push_back(given->get_name() + " has no effect with " + with);
  };
  const auto for_policy = [&](const CLI::Option* given, std::initializer_list<PolicyKind> kinds) {
    idle(given, std::find(kinds.begin(), kinds.end(), o.policy) != kinds.end(),
         "--policy " + policy);
  };
  for_policy(k_option, {PolicyKind::kWaitK});
  for_policy(first_option, {PolicyKind::kSeparator, PolicyKind::kLocalAgreement, PolicyKind::kHoldN,
                            PolicyKind::kAttention, PolicyKind::kSpeak});
  for_policy(separator_option, {PolicyKind::kSeparator});
  for_policy(n_option, {PolicyKind::kHoldN});
  for_policy(longest_option, {PolicyKind::kLocalAgreement, PolicyKind::kHoldN, PolicyKind::kSpeak});
  for (const CLI::Option* given : {alpha_option, newest_option, layer_option})
    for_policy(given, {PolicyKind::kAttention});
  for (const CLI::Option* given : {threshold_option, silence_option})
    for_policy(given, {PolicyKind::kSpeak});
  idle(phi_option, o.layout == LayoutKind::kGroup, "--layout " + layout);
  idle(gap_option, o.layout == LayoutKind::kGap, "--layout " + layout);
  idle(source_tokens_option, o.layout == LayoutKind::kBatch, "--layout " + layout);

  if (o.layout == LayoutKind::kBatch && !o.file && source_tokens_option->count() == 0)
    return fail(
        "--source-tokens: --layout batch needs it when the source is stdin, for the target "
        "stands behind the whole source");
  auto rule =
      position == "in-text" ? sluice::PositionRule::kInText : sluice::PositionRule::kInCache;
  if (o.in_arrival_order()) {
    if (position_option->count() > 0 && position != "in-text")
      return fail("--position: expected in-text with --layout " + layout + ", found " + position);
    rule = sluice::PositionRule::kInText;
    if (!o.sequential)
      o.notes.push_back("--layout " + layout +
                        " depends on the order of arrival: --sequential is implied");
    o.sequential = true;
  }
  o.source.position_rule = o.target.position_rule = rule;
  if (o.max_tokens == 0) return fail("--max-tokens: expected -1 or at least 1, found '0'");
  if (o.stop_at_end_token && o.ignore_eos)
    return fail("--stop-at-end-token: excludes --ignore-eos");
  return o;
}

}  // namespace duplex_text
