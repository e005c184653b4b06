// SPDX-License-Identifier: MIT
/// A context that arrives in pieces before the answer may start, measured. JSON lines on stdout:
///
///   append      chunks of a text arrive one after the other (a crawl): time to first token, from
///   the
///               arrival of the last chunk, if each is prefilled while the others are on their way,
///               and if the whole context is waited for.
///   update      lists of documents arrive, each replacing the one before from a random rank on (a
///               search that refines its result): time to first token from the arrival of the last
///               list, if each list is read as an update of the one before, if each is read anew,
///               and if only the last is read. A list that arrives cancels the reading of the one
///               before between chunks.
///   fork        eight continuations of one context: memory in pages and as caches of their own,
///   and
///               what a fork costs.
///   checkpoint  what taking a checkpoint of a window costs, going back, its memory, and a fork
///   into
///               a session that is there.
///   draft       what verifying a draft costs whose guesses steps have written, beside these steps,
///               and one whose first guess is wrong. Rounding may take fewer than were guessed.
///
/// Arrivals are a seeded trace in virtual time, with exponential gaps; the clock of each way of
/// reading advances by the measured time of its own work and otherwise waits for the next arrival.
/// The model is the GGUF file that SLUICE_MODEL names, else random weights. On a GPU, where there
/// are no pages, fork is left out.
#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/stream/session.hpp"
#include "support/arguments.hpp"
#include "support/backend.hpp"
#include "support/json_record.hpp"
#include "support/random_decoder.hpp"

namespace {

using namespace sluice;
using bench::number;
using bench::numbers;
using bench::Record;

constexpr std::array<std::string_view, 5> kExperiments{"append", "update", "fork", "checkpoint",
                                                       "draft"};

constexpr const char* kHelp = R"(usage: context_bench [EXPERIMENT...] [option=value...]

experiments (all if none is named): append update fork checkpoint draft

  tokens=N      tokens of a context                             (default 1024)
  pieces=N      chunks of a context, documents of a list        (default 16)
  lists=N       lists of an update trace                        (default 6)
  gaps=MS,...   mean times between arrivals                     (default 25,50,100,200,400)
  rounds=N      traces of each gap; medians are given           (default 3)
  threads=N     of the session's team                           (default 2)
  int8=1        activations of 8 bits                           (default exact)
  big=1         random weights of Llama 3.2 1B's geometry       (default SmolLM2-135M's)
  --help        this text

Prints one JSON object a line on stdout.
)";

struct Options {
  std::vector<std::string> experiments;
  std::int64_t tokens = 1024;
  std::int64_t pieces = 16;
  std::int64_t lists = 6;
  std::vector<std::int64_t> gaps{25, 50, 100, 200, 400};
  std::int64_t rounds = 3;
  std::int64_t threads = 2;
  bool int8 = false;
  bool big = false;
};

Options parse(std::span<char*> arguments) {
  Options options;
  for (const std::string argument : arguments) {
    const std::size_t equal = argument.find('=');
    const std::string name = argument.substr(0, equal);
    const std::string value = equal == std::string::npos ? "" : argument.substr(equal + 1);
    if (std::ranges::find(kExperiments, name) != kExperiments.end()) {
      options.experiments.push_back(name);
    } else if (name == "gaps") {
      options.gaps = numbers(value, argument);
    } else if (name == "tokens") {
      options.tokens = number(value, argument);
    } else if (name == "pieces") {
      options.pieces = number(value, argument);
    } else if (name == "lists") {
      options.lists = number(value, argument);
    } else if (name == "rounds") {
      options.rounds = number(value, argument);
    } else if (name == "threads") {
      options.threads = number(value, argument);
    } else if (name == "int8") {
      options.int8 = number(value, argument) == 1;
    } else if (name == "big") {
      options.big = number(value, argument) == 1;
    } else {
      throw std::invalid_argument("unknown argument '" + argument + "'");
    }
  }
  if (options.pieces > options.tokens)
    throw std::invalid_argument("pieces: expected at most tokens");
  if (options.experiments.empty())
    options.experiments.assign(kExperiments.begin(), kExperiments.end());
  return options;
}

using Stream = SessionOn<bench::Tag, f16>;

struct Bench {
  std::shared_ptr<const Decoder> model;
  std::shared_ptr<const backend_traits<bench::Tag>::Model<f16>> placed;
  std::string name;
  Options options;

  SessionOptions session_options(CachePolicy policy) const {
    SessionOptions result;
    result.cache.policy = policy;
    result.cache.capacity = options.tokens + 512;
    result.cache.chunk_size = 64;  // the grain of a cancellation
    result.num_threads = static_cast<int>(options.threads);
    result.history = options.tokens;
    if (options.int8) result.activations = Activations::kInt8;
    return result;
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<Token> random_tokens(Random& random, std::int64_t count, const Decoder& model) {
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Token& token : tokens)
    token = static_cast<Token>(random.below(static_cast<std::uint64_t>(model.config().vocab_size)));
  return tokens;
}

/// Arrival times in ms, the first at 0.
std::vector<double> arrivals(Random& random, std::int64_t count, double gap) {
  std::vector<double> times{0};
  while (static_cast<std::int64_t>(times.size()) < count)
    times.push_back(times.back() - gap * std::log(1.0 - random.uniform()));
  return times;
}

template <class Work>
double measured_ms(Work&& work) {
  const std::int64_t begin = monotonic_ns();
  work();
  return static_cast<double>(monotonic_ns() - begin) * 1e-6;
}

void append(const Bench& bench) {
  Stream session(bench.placed, bench.session_options(CachePolicy::kFull));
  const std::int64_t tokens = bench.options.tokens;
  const std::int64_t pieces = bench.options.pieces;
  for (const std::int64_t gap : bench.options.gaps) {
    std::vector<double> streamed;
    std::vector<double> waited;
    std::vector<double> ratios;
    for (std::int64_t round = 0; round < bench.options.rounds; ++round) {
      Random random(static_cast<std::uint64_t>(round + 1));
      const std::vector<Token> text = random_tokens(random, tokens, *bench.model);
      const std::vector<double> times = arrivals(random, pieces, static_cast<double>(gap));
      const auto end_of = [&](std::int64_t piece) {
        return static_cast<std::size_t>(tokens * (piece + 1) / pieces);
      };
      session.reset();
      waited.push_back(measured_ms([&] {
        session.accept(text);
        session.step();
      }));
      session.reset();
      double now = 0;
      std::size_t read = 0;
      for (std::int64_t piece = 0; piece < pieces; ++piece) {
        now = std::max(now, times[static_cast<std::size_t>(piece)]);
        // All that has arrived by now is read at once.
        while (piece + 1 < pieces && times[static_cast<std::size_t>(piece + 1)] <= now) ++piece;
        now += measured_ms(
            [&] { session.accept(std::span(text).subspan(read, end_of(piece) - read)); });
        read = end_of(piece);
      }
      now += measured_ms([&] { session.step(); });
      streamed.push_back(now - times.back());
      ratios.push_back(waited.back() / streamed.back());
    }
    Record("context_append")
        .field("model", bench.name)
        .field("tokens", tokens)
        .field("chunks", pieces)
        .field("gap_ms", gap)
        .field("rounds", bench.options.rounds)
        .field("threads", bench.options.threads)
        .field("activations", std::string(bench.options.int8 ? "int8" : "float32"))
        .field("wait_ttft_ms", median(waited))
        .field("append_ttft_ms", median(streamed))
        .field("ratio", median(ratios));
  }
}

struct UpdateRun {
  double ttft_ms = 0;
  std::int64_t computed = 0;
  std::int64_t kept = 0;
  std::int64_t cancelled = 0;
};

/// Reads the lists as they arrive; each as an update of the one before, or anew.
UpdateRun read_lists(Stream& session, const std::vector<std::vector<Token>>& lists,
                     const std::vector<double>& times, bool as_updates) {
  UpdateRun run;
  session.reset();
  double now = 0;
  for (std::size_t list = 0; list < lists.size(); ++list) {
    now = std::max(now, times[list]);
    if (list + 1 < lists.size() && times[list + 1] <= now) continue;  // replaced already
    const std::int64_t begin = monotonic_ns();
    const auto clock = [&] {
      return now + static_cast<double>(monotonic_ns() - begin) * 1e-6;
    };
    const auto replaced = [&] {
      return list + 1 < lists.size() && clock() >= times[list + 1];
    };
    const auto count = static_cast<std::int64_t>(lists[list].size());
    UpdateResult result;
    if (as_updates) {
      result = session.update(lists[list], replaced);
    } else {
      session.reset();
      result.computed = session.accept(lists[list], replaced);
    }
    run.computed += result.computed;
    run.kept += result.kept;
    if (result.kept + result.computed < count) ++run.cancelled;
    now = clock();
  }
  now += measured_ms([&] { session.step(); });
  run.ttft_ms = now - times.back();
  return run;
}

void update(const Bench& bench) {
  Stream session(bench.placed, bench.session_options(CachePolicy::kFull));
  const std::int64_t tokens = bench.options.tokens;
  const std::int64_t documents = bench.options.pieces;
  for (const std::int64_t gap : bench.options.gaps) {
    std::vector<double> updated;
    std::vector<double> anew;
    std::vector<double> waited;
    std::vector<double> ratios;
    double computed = 0;
    double computed_anew = 0;
    double kept = 0;
    double cancelled = 0;
    for (std::int64_t round = 0; round < bench.options.rounds; ++round) {
      Random random(static_cast<std::uint64_t>(round + 1));
      std::vector<std::vector<Token>> lists;
      for (std::int64_t list = 0; list < bench.options.lists; ++list) {
        // From a uniformly random rank on, the documents are others; later lists keep more, as a
        // search settles.
        const std::int64_t low = list == 0 ? 0 : documents * list / bench.options.lists;
        const std::int64_t rank =
            list == 0 ? 0
                      : low + static_cast<std::int64_t>(
                                  random.below(static_cast<std::uint64_t>(documents - low)));
        std::vector<Token> text = random_tokens(random, tokens, *bench.model);
        const auto shared = static_cast<std::ptrdiff_t>(tokens * rank / documents);
        if (list > 0) std::copy_n(lists.back().begin(), shared, text.begin());
        lists.push_back(std::move(text));
      }
      const std::vector<double> times =
          arrivals(random, bench.options.lists, static_cast<double>(gap));
      session.reset();
      waited.push_back(measured_ms([&] {
        session.accept(lists.back());
        session.step();
      }));
      const UpdateRun fresh = read_lists(session, lists, times, false);
      const UpdateRun run = read_lists(session, lists, times, true);
      anew.push_back(fresh.ttft_ms);
      updated.push_back(run.ttft_ms);
      ratios.push_back(waited.back() / updated.back());
      computed += static_cast<double>(run.computed);
      computed_anew += static_cast<double>(fresh.computed);
      kept += static_cast<double>(run.kept);
      cancelled += static_cast<double>(run.cancelled);
    }
    const auto rounds = static_cast<double>(bench.options.rounds);
    Record("context_update")
        .field("model", bench.name)
        .field("tokens", tokens)
        .field("documents", documents)
        .field("lists", bench.options.lists)
        .field("gap_ms", gap)
        .field("rounds", bench.options.rounds)
        .field("threads", bench.options.threads)
        .field("activations", std::string(bench.options.int8 ? "int8" : "float32"))
        .field("wait_ttft_ms", median(waited))
        .field("anew_ttft_ms", median(anew))
        .field("update_ttft_ms", median(updated))
        .field("ratio", median(ratios))
        .field("tokens_computed", computed / rounds)
        .field("tokens_computed_anew", computed_anew / rounds)
        .field("tokens_kept", kept / rounds)
        .field("lists_cancelled", cancelled / rounds);
  }
}

void forks(const Bench& bench) {
  constexpr std::int64_t kForks = 8;
  constexpr std::int64_t kTail = 64;
  constexpr std::int64_t kPage = 16;
  const SessionOptions options = bench.session_options(CachePolicy::kFull);
  const std::int64_t capacity = options.cache.capacity;
  const std::int64_t pages =
      (bench.options.tokens + kForks * (kTail + 2 * kPage)) / kPage + 2 * kForks;
  const auto store = bench.model->make_page_store<f16>(pages, kPage);
  Random random(1);
  std::vector<PagedSession<f16>> sessions;
  sessions.reserve(kForks);
  sessions.emplace_back(bench.model, options,
                        PagedKvCache<f16>(store, capacity, options.cache.chunk()));
  sessions[0].accept(random_tokens(random, bench.options.tokens, *bench.model));
  const auto one = static_cast<std::int64_t>(store->bytes_in_use());
  for (std::int64_t i = 1; i < kForks; ++i) sessions.push_back(sessions[0].fork());
  std::vector<double> costs;
  for (int i = 0; i < 25; ++i)
    costs.push_back(1e3 * measured_ms([&] { sessions[0].fork_into(sessions[1]); }));
  double steps_ms = 0;
  for (std::int64_t t = 0; t < kTail; ++t)
    for (std::size_t i = 0; i < sessions.size(); ++i) {
      if (t == 0) sessions[i].reseed(i);
      steps_ms += measured_ms([&] { sessions[i].step(); });
    }
  int runs = 0;
  for (const auto& session : sessions) runs = std::max(runs, session.cache().table().runs());
  // A contiguous cache of the same capacity, and what a step costs in it.
  Session<f16> alone(bench.model, options);
  alone.accept(random_tokens(random, bench.options.tokens, *bench.model));
  double alone_ms = 0;
  for (std::int64_t t = 0; t < kTail; ++t) alone_ms += measured_ms([&] { alone.step(); });
  const auto all = static_cast<std::int64_t>(store->bytes_in_use());
  const double tail_bytes =
      static_cast<double>(kTail * static_cast<std::int64_t>(store->page_bytes())) /
      static_cast<double>(kPage);
  Record("context_fork")
      .field("model", bench.name)
      .field("tokens", bench.options.tokens)
      .field("forks", kForks)
      .field("tail_tokens", kTail)
      .field("page_size", kPage)
      .field("one_stream_bytes", one)
      .field("forks_bytes", all)
      .field("one_stream_and_tails_bytes", static_cast<double>(one) + kForks * tail_bytes)
      .field("copies_bytes", kForks * (static_cast<double>(one) + tail_bytes))
      .field("most_runs", std::int64_t{runs})
      .field("fork_us", median(costs))
      .field("step_ms", steps_ms / static_cast<double>(kForks * kTail))
      .field("contiguous_step_ms", alone_ms / static_cast<double>(kTail));
}

void checkpoints(const Bench& bench) {
  for (const std::int64_t window : {256, 1024}) {
    SessionOptions options = bench.session_options(CachePolicy::kSinkWindow);
    options.cache.window_size = window;
    options.checkpoints = 2;
    Stream session(bench.placed, options);
    Random random(1);
    const std::vector<Token> text = random_tokens(random, 256, *bench.model);
    for (std::int64_t fed = 0; fed < window + 256; fed += 256) session.accept(text);
    std::vector<double> taking;
    std::vector<double> returning;
    std::vector<double> forking;
    Stream child = session.fork();
    for (int i = 0; i < 9; ++i) {
      CheckpointId id;
      taking.push_back(measured_ms([&] { id = session.checkpoint(); }));
      for (int t = 0; t < 3; ++t) session.step();
      returning.push_back(measured_ms([&] { session.rollback_to(id); }));
      forking.push_back(measured_ms([&] { session.fork_into(child); }));
    }
    Record("context_checkpoint")
        .field("model", bench.name)
        .field("backend", std::string(backend_traits<bench::Tag>::kName))
        .field("window", window)
        .field("bytes", static_cast<std::int64_t>(session.checkpoint_bytes()))
        .field("cache_bytes", static_cast<std::int64_t>(session.cache().bytes()))
        .field("take_ms", median(taking))
        .field("return_ms", median(returning))
        .field("fork_ms", median(forking));
  }
}

void drafts(const Bench& bench) {
  constexpr int kRounds = 15;
  SessionOptions options = bench.session_options(CachePolicy::kSinkWindow);
  options.cache.window_size = 1024;
  options.checkpoints = 1;
  options.sampler.temperature = 0;
  Stream session(bench.placed, options);
  Random random(1);
  session.accept(random_tokens(random, bench.options.tokens, *bench.model));
  static_cast<void>(session.step());
  const CheckpointId begin = session.checkpoint();
  const auto written = [&](std::int64_t count) {
    std::vector<Token> tokens{*session.result()};
    while (std::ssize(tokens) < count) tokens.push_back(*session.step());
    return tokens;
  };
  for (const std::int64_t nodes : {1, 2, 3, 5, 9, 17, 33}) {
    session.rollback_to(begin);
    std::vector<Token> path = written(nodes);
    std::vector<double> steps;
    std::vector<double> verified;
    std::vector<double> rejected;
    std::int64_t taken = 0;
    for (int round = 0; round < kRounds; ++round) {
      session.rollback_to(begin);
      steps.push_back(measured_ms([&] {
        for (std::int64_t i = 0; i < nodes; ++i) static_cast<void>(session.step());
      }));
      DraftTree draft(nodes);
      for (const Token token : path) draft.add(token, draft.size() - 1);
      session.rollback_to(begin);
      verified.push_back(measured_ms([&] { taken = std::ssize(session.step(draft)); }));
      if (nodes == 1) continue;
      // The first guess is wrong: the rest is taken back.
      draft.set_token(1, (path[1] + 1) % static_cast<Token>(bench.model->config().vocab_size));
      session.rollback_to(begin);
      rejected.push_back(measured_ms([&] { static_cast<void>(session.step(draft)); }));
    }
    Record record("context_draft");
    record.field("model", bench.name)
        .field("backend", std::string(backend_traits<bench::Tag>::kName))
        .field("nodes", nodes)
        .field("taken", taken)
        .field("steps_ms", median(steps))
        .field("draft_ms", median(verified));
    if (!rejected.empty()) record.field("rejected_ms", median(rejected));
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::span<char*> arguments(argv + 1, static_cast<std::size_t>(argc - 1));
    for (const std::string_view argument : arguments) {
      if (argument == "--help" || argument == "-h") {
        std::cout << kHelp;
        return 0;
      }
      if (argument == "--benchmark_list_tests") {
        for (const std::string_view experiment : kExperiments) std::cout << experiment << "\n";
        return 0;
      }
    }
    Bench bench{nullptr, nullptr, "", parse(arguments)};
    if (const char* path = std::getenv("SLUICE_MODEL")) {
      bench.model = load_decoder(std::make_shared<const GgufFile>(std::string(path)));
      bench.name = std::string(path).substr(std::string(path).rfind('/') + 1);
    } else {
      const bench::Geometry geometry =
          bench.options.big ? bench::llama_1b() : bench::smollm2_135m();
      bench.model = bench::random_decoder(geometry, ElementType::kQ8_0);
      bench.name = std::string("random ") + geometry.name;
    }
    bench.placed = place_model<bench::Tag, f16>(bench.model);
    for (const std::string& experiment : bench.options.experiments) {
      if (experiment == "append") append(bench);
      if (experiment == "update") update(bench);
      if (experiment == "fork" && std::same_as<bench::Tag, cpu>) forks(bench);
      if (experiment == "checkpoint") checkpoints(bench);
      if (experiment == "draft") drafts(bench);
    }
  } catch (const std::exception& error) {
    std::cerr << "context_bench: " << error.what() << "\n";
    return 2;
  }
  return 0;
}
