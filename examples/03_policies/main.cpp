// SPDX-License-Identifier: MIT
// policies: one stream through every cache policy, side by side.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <CLI/CLI.hpp>

#include "measure.hpp"
#include "policies.hpp"

#include "sluice/core/error.hpp"
#include "sluice/io/json.hpp"
#include "sluice/model/load_head_map.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/clock.hpp"
#include "support/command_line.hpp"
#include "support/report_text.hpp"
#include "support/terminal.hpp"
#include "support/text_source.hpp"

namespace {

using namespace policies;
using sluice::Json;
using sluice::Token;
using support::format;

struct Options {
  std::string model;
  std::string file = "-";
  std::string heads;
  std::vector<std::string> names;
  std::int64_t tokens = 4096;
  std::int64_t calibration = 1024;
  std::int64_t threads = 1;
  double sparsity = 0.5;
  std::string activations = "int8";
  std::int64_t passkeys = 0;
  bool json = false;
  Setting setting;

  sluice::Activations chosen() const { return support::activations_of(activations); }
};

/// The tokens of a text, at most `most`.
std::vector<Token> read_tokens(const sluice::Tokenizer& tokenizer, const std::string& file,
                               std::int64_t most) {
  support::TokenSource source(
      tokenizer,
      file == "-" ? support::TextSource::from_stdin() : support::TextSource::from_file(file), true);
  std::vector<Token> tokens;
  while (static_cast<std::int64_t>(tokens.size()) < most && source.next(tokens)) {
  }
  if (static_cast<std::int64_t>(tokens.size()) > most)
    tokens.resize(static_cast<std::size_t>(most));
  return tokens;
}

/// The token from which a policy reads one by one.
std::int64_t singles(const std::string& policy, const Setting& setting) {
  return chunks_of(policy) == Chunks::kSingle ? setting.budget
                                              : std::numeric_limits<std::int64_t>::max();
}

/// Says how a run over several policies comes along: a line that moves on a terminal, else lines,
/// of which a log keeps a few for each policy.
class Course {
 public:
  Course(const std::string& policy, std::size_t number, std::size_t count)
      : name_(policy + format(" (%zu of %zu)", number, count)), line_(name_) {
    if (!support::stderr_is_terminal()) std::cerr << "policies: " << name_ << '\n';
  }
  /// Whether to go on.
  bool show(std::size_t done, std::size_t all) {
    line_.show(static_cast<std::int64_t>(done),
               static_cast<double>(done) / static_cast<double>(all));
    if (!support::stderr_is_terminal() && sluice::monotonic_ns() >= next_ns_) {
      std::cerr << "policies: " << name_ << format(": %zu of %zu tokens\n", done, all);
      next_ns_ = sluice::monotonic_ns() + kPause;
    }
    return support::caught_signal() == 0;
  }
  void clear() { line_.clear(); }

 private:
  static constexpr std::int64_t kPause = 30'000'000'000;

  std::string name_;
  support::Progress line_;
  std::int64_t next_ns_ = sluice::monotonic_ns() + kPause;
};

/// What is left after an interrupt, as the option that goes on with it.
void say_what_is_left(std::span<const std::string> names) {
  std::cerr << "policies: interrupted; what is left: -p ";
  for (std::size_t i = 0; i < names.size(); ++i) std::cerr << (i == 0 ? "" : ",") << names[i];
  std::cerr << '\n';
}

void print_row(const Options& options, const std::string& name, const Measured& m, bool whole) {
  if (options.json) {
    Json row{{"kind", "policy"},
             {"policy", name},
             {"tokens", m.tokens},
             {"budget", options.setting.budget},
             {"chunk", options.setting.chunk},
             {"growth", options.setting.growth},
             {"perplexity", m.perplexity},
             {"late_perplexity", m.late_perplexity},
             {"entries", m.entries},
             {"cache_bytes", m.cache_bytes},
             {"tokens_per_s", m.tokens_per_s},
             {"step_ms", m.step_ms}};
    if (!whole) row["interrupted"] = true;
    support::write_stdout(row.dump() + "\n");
    return;
  }
  const std::string shown = whole ? name : name + format(", the first %zu tokens", m.tokens);
  support::write_stdout(format("| %s | %.3f | %.3f | %lld | %s | %.0f | %.2f ms |\n", shown.c_str(),
                               m.perplexity, m.late_perplexity, static_cast<long long>(m.entries),
                               support::megabytes(m.cache_bytes).c_str(), m.tokens_per_s,
                               m.step_ms));
}

/// Says why a policy has no row; returns the exit status. The others go on.
int say_why(const std::string& what, const sluice::Error& error) {
  std::cerr << "policies: " << what << ": " << error.what() << '\n';
  return error.code() == sluice::ErrorCode::kConfig ? 2 : 1;
}

/// A row for each policy as soon as it is done, and one for what was read of the policy that an
/// interrupt meets. A policy that cannot be made (the budget is too small for it) says so and
/// leaves the others be. Returns the exit status.
int compare(const Options& options, const sluice::LoadedModel& model, std::span<const Token> tokens,
            sluice::ThreadTeam& team) {
  const double budget_share =
      static_cast<double>(options.setting.budget) / static_cast<double>(tokens.size());
  if (!options.json)
    support::write_stdout(format("%lld tokens, a budget of %lld entries a head (%.1f%%)\n\n",
                                 static_cast<long long>(tokens.size()),
                                 static_cast<long long>(options.setting.budget),
                                 100 * budget_share) +
                          "| policy | perplexity | beyond the budget | entries | cache | "
                          "read, tokens/s | a token |\n|---|---|---|---|---|---|---|\n");
  int status = 0;
  for (std::size_t i = 0; i < options.names.size(); ++i) {
    const std::string& name = options.names[i];
    Course course(name, i + 1, options.names.size());
    Measured m;
    try {
      m = with_cache(name, options.setting, [&](auto& cache) {
        Stream stream(*model.decoder, cache, team, options.chosen());
        return measure(stream, cache, tokens, options.setting.budget,
                       singles(name, options.setting),
                       [&](std::size_t done) { return course.show(done, tokens.size()); });
      });
    } catch (const sluice::Error& error) {
      course.clear();
      status = say_why(name, error);
      continue;
    }
    course.clear();
    const bool whole = m.tokens == tokens.size();
    if (m.tokens >= 2) print_row(options, name, m, whole);
    if (!whole) {
      say_what_is_left(std::span(options.names).subspan(i));
      return status;
    }
  }
  return status;
}

/// A number is said at each of several depths of the text and asked for at its end: how many of its
/// five digits come back. Returns the exit status.
int recall(const Options& options, const sluice::LoadedModel& model, std::span<const Token> tokens,
           sluice::ThreadTeam& team) {
  const sluice::Tokenizer& tokenizer = *model.tokenizer;
  if (!options.json) {
    std::string head = "\n| digits recalled of 5, said at |";
    std::string rule = "|---|";
    for (std::int64_t i = 0; i < options.passkeys; ++i) {
      head += format(" %.0f%% |",
                     100.0 * static_cast<double>(i) /
                         static_cast<double>(std::max<std::int64_t>(1, options.passkeys - 1)));
      rule += "---|";
    }
    support::write_stdout(head + "\n" + rule + "\n");
  }
  int status = 0;
  for (std::size_t n = 0; n < options.names.size(); ++n) {
    const std::string& name = options.names[n];
    std::string line = "| " + name + " |";
    Course course(name + ", pass keys", n + 1, options.names.size());
    std::int64_t asked_for = 0;
    for (std::int64_t i = 0; i < options.passkeys && support::caught_signal() == 0; ++i) {
      const std::string key = std::to_string(10007 + (i * 7919 + 31337) % 89989);
      const std::vector<Token> said = tokenizer.encode(
          "\n\nThe pass key is " + key + ". Remember it. " + key + " is the pass key.\n\n");
      const std::vector<Token> asked =
          tokenizer.encode("\n\nWhat is the pass key? The pass key is");
      const std::size_t depth =
          (tokens.size() - 1) * static_cast<std::size_t>(i) /
          static_cast<std::size_t>(std::max<std::int64_t>(1, options.passkeys - 1));
      const std::size_t place =
          std::max<std::size_t>(depth, std::min<std::size_t>(8, tokens.size()));
      std::vector<Token> text(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(place));
      text.insert(text.end(), said.begin(), said.end());
      text.insert(text.end(), tokens.begin() + static_cast<std::ptrdiff_t>(place), tokens.end());
      text.insert(text.end(), asked.begin(), asked.end());
      constexpr std::int64_t kAnswer = 8;
      Setting setting = options.setting;
      setting.tokens = static_cast<std::int64_t>(text.size()) + kAnswer;
      std::string answer;
      try {
        answer = with_cache(name, setting, [&](auto& cache) {
          Stream stream(*model.decoder, cache, team, options.chosen());
          std::vector<double> ignored;
          const auto whole =
              static_cast<std::size_t>(std::min(singles(name, setting), setting.tokens));
          for (std::size_t done = 0; done < text.size();) {
            if (!course.show(static_cast<std::size_t>(i) * text.size() + done,
                             static_cast<std::size_t>(options.passkeys) * text.size()))
              return std::string();
            const bool single = done >= whole;
            const std::size_t end = single ? text.size() : std::min(text.size(), whole);
            const std::size_t piece = std::min(stream.piece(), end - done);
            stream.read(std::span(text).subspan(done, piece), ignored,
                        single ? 1 : cache.max_chunk());
            done += piece;
          }
          return tokenizer.decode(stream.write(kAnswer));
        });
      } catch (const sluice::Error& error) {
        course.clear();
        status = say_why(name + ", pass keys", error);
        break;
      }
      if (support::caught_signal() != 0) break;
      ++asked_for;
      // The first run of digits in the answer, from its front.
      const std::size_t first = answer.find_first_of("0123456789");
      std::int64_t right = 0;
      while (first != std::string::npos && right < 5 &&
             first + static_cast<std::size_t>(right) < answer.size() &&
             answer[first + static_cast<std::size_t>(right)] ==
                 key[static_cast<std::size_t>(right)])
        ++right;
      line += format(" %lld |", static_cast<long long>(right));
      if (options.json)
        support::write_stdout(
            Json{{"kind", "passkey"},
                 {"policy", name},
                 {"passkey_depth", static_cast<double>(place) / static_cast<double>(tokens.size())},
                 {"digits_recalled", right},
                 {"tokens", text.size()},
                 {"budget", options.setting.budget}}
                .dump() +
            "\n");
    }
    course.clear();
    if (!options.json && asked_for > 0) support::write_stdout(line + "\n");
    if (support::caught_signal() != 0 && asked_for < options.passkeys) {
      say_what_is_left(std::span(options.names).subspan(n));
      return status;
    }
  }
  return status;
}

int run(Options& options) {
  const sluice::LoadedModel model = sluice::load_model(options.model);
  const sluice::DecoderConfig& config = model.decoder->config();
  options.setting.model = model.decoder.get();
  sluice::ThreadTeam team(static_cast<int>(options.threads));
  if (!options.heads.empty()) {
    const bool table = options.heads.size() > 5 &&
                       options.heads.compare(options.heads.size() - 5, 5, ".json") == 0;
    options.setting.heads =
        table ? sluice::load_head_map(options.heads, config, options.tokens)
              : sluice::load_duo_attention(options.heads, {.sparsity = options.sparsity});
  }
  const std::vector<Token> tokens = read_tokens(*model.tokenizer, options.file, options.tokens);
  if (tokens.size() < 2) {
    std::cerr << "policies: the text has fewer than two tokens\n";
    return 1;
  }
  options.setting.tokens = static_cast<std::int64_t>(tokens.size());
  if (std::find(options.names.begin(), options.names.end(), "q-filters") != options.names.end()) {
    const std::size_t count =
        std::min(tokens.size(), static_cast<std::size_t>(options.calibration));
    options.setting.filters =
        calibrate(*model.decoder, std::span(tokens).first(count), team, options.chosen());
  }
  const int status = compare(options, model, tokens, team);
  if (support::caught_signal() != 0 || options.passkeys == 0) return status;
  const int of_recall = recall(options, model, tokens, team);
  return status != 0 ? status : of_recall;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app(
      "One stream through every cache policy, side by side: likelihood, entries, memory, "
      "time, recall.",
      "policies");
  std::string known;
  std::vector<std::string> all;
  for (const Policy& policy : kPolicies) {
    known +=
        format("  %-12s ", std::string(policy.name).c_str()) + std::string(policy.keeps) + "\n";
    all.emplace_back(policy.name);
  }
  app.footer("Policies:\n" + known +
             "\nThe table goes to stdout, everything else to stderr.\n"
             "Exit status: 0 done, 1 an error, 2 a wrong flag or value, 130 after Ctrl-C.");
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("-m,--model", options.model, "GGUF file, or folder with config.json and weights")
      ->check(support::some_name())
      ->required();
  app.add_option("-f,--file", options.file, "text to read; - is stdin")->capture_default_str();
  app.add_option("-n,--tokens", options.tokens, "tokens of it, at most")
      ->capture_default_str()
      ->check(support::whole_number(2, 1 << 24));
  app.add_option("-b,--budget", options.setting.budget, "entries of a KV head")
      ->capture_default_str()
      ->check(support::whole_number(16, 1 << 24));
  app.add_option(
         "-c,--chunk", options.setting.chunk,
         "tokens read at once: exact for full, window, sink-window, per-head, lazy and shards; "
         "scored policies "
         "select, and kivi codes, at the ends of chunks; quest, tidal-decode and clusters act in "
         "single tokens, so "
         "what is beyond the budget is read one by one")
      ->capture_default_str()
      ->check(support::whole_number(1, 4096));
  app.add_option(
         "-g,--growth", options.setting.growth,
         "entries that a scored policy takes in before it selects again, which it keeps fewer of; "
         "0: two chunks")
      ->capture_default_str()
      ->check(support::whole_number(0, 1 << 20));
  app.add_option("-p,--policies", options.names, "which ones, by name")
      ->delimiter(',')
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->check(CLI::IsMember(all));
  app.add_option("--heads", options.heads,
                 "head map of per-head: a .json of our form, a DuoAttention folder or .tsv");
  app.add_option("--sparsity", options.sparsity, "share of streaming heads of a DuoAttention map")
      ->capture_default_str()
      ->check(support::number(0, 1, "a number from 0 to 1"));
  app.add_option("--calibration", options.calibration, "tokens that q-filters are found from")
      ->capture_default_str()
      ->check(support::whole_number(16, 1 << 20));
  app.add_option("--passkey", options.passkeys,
                 "say a number at so many depths of the text and ask for it at the end")
      ->capture_default_str()
      ->check(support::whole_number(0, 1000));
  app.add_option("-t,--threads", options.threads, "threads")
      ->capture_default_str()
      ->check(support::thread_count());
  app.add_option("--activations", options.activations,
                 "how activations meet weights: f32 (exact), bf16 or int8 (rounded, faster)")
      ->capture_default_str()
      ->check(support::activations_name());
  app.add_flag("--json", options.json, "JSON lines instead of tables");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (options.names.empty()) options.names = all;
  return support::run_program("policies", [&] { return run(options); });
}
