// SPDX-License-Identifier: MIT
/// A whole stream: time to first token by prompt length, and the latency of a step in the steady
/// state under the four baselines of the StreamingLLM paper, each named by its policy:
///   full         every token kept (here: a context of `window` tokens, then it would be full)
///   window       the last `window` keys kept, no sinks
///   recompute    keys and values of the last `window` tokens rebuilt for every token
///   sink-window  4 sinks and the last `window` keys
/// The model is the GGUF file that SLUICE_MODEL names, else random Q8_0 weights in the geometry of
/// SmolLM2-135M. The backend is the tag that the program is compiled for; what it does not do is a
/// row that says so. SLUICE_THREADS sets the team (default 2), SLUICE_INT8 takes activations of 8
/// bits, SLUICE_GREEDY the greatest logit instead of a draw from all. A step's clock runs from the
/// call of step() to its return; the time to first token from accept() with the whole prompt to the
/// return of the first step().
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/stream/latency_histogram.hpp"
#include "sluice/stream/session.hpp"
#include "support/backend.hpp"
#include "support/random_decoder.hpp"

namespace {

using namespace sluice;
using bench::Tag;

const std::shared_ptr<const Decoder>& model() {
  static const std::shared_ptr<const Decoder> loaded = [] {
    if (const char* path = std::getenv("SLUICE_MODEL"))
      return load_decoder(std::make_shared<const GgufFile>(std::string(path)));
    return bench::random_decoder(bench::smollm2_135m(), ElementType::kQ8_0);
  }();
  return loaded;
}

/// The same where the backend reads it.
const std::shared_ptr<const ModelOn<Tag>>& placed_model() {
  static const std::shared_ptr<const ModelOn<Tag>> placed = place_model<Tag>(model());
  return placed;
}

int threads() {
  const char* text = std::getenv("SLUICE_THREADS");
  return text == nullptr ? 2 : std::max(1, std::atoi(text));
}

std::vector<Token> random_tokens(std::int64_t count) {
  Random random(7);
  std::vector<Token> tokens(static_cast<std::size_t>(count));
  for (Token& token : tokens)
    token =
        static_cast<Token>(random.below(static_cast<std::uint64_t>(model()->config().vocab_size)));
  return tokens;
}

SessionOn<Tag> make_session(CachePolicy policy, std::int64_t window) {
  SessionOptions options;
  options.cache.policy = policy;
  options.cache.window_size = window;
  options.cache.capacity = 2 * window;
  options.sampler.temperature = std::getenv("SLUICE_GREEDY") != nullptr ? 0 : 1;
  options.num_threads = threads();
  if (std::getenv("SLUICE_INT8") != nullptr) options.activations = Activations::kInt8;
  return SessionOn<Tag>(placed_model(), options);
}

void time_to_first_token(benchmark::State& state) {
  SessionOn<Tag> session = make_session(CachePolicy::kSinkWindow, 1020);
  const std::vector<Token> prompt = random_tokens(state.range(0));
  for (auto _ : state) {
    session.reset();
    session.accept(prompt);
    benchmark::DoNotOptimize(session.step());
  }
  state.counters["prompt_tokens_per_s"] = benchmark::Counter(
      static_cast<double>(state.range(0)), benchmark::Counter::kIsIterationInvariantRate);
}

void run_steps(benchmark::State& state, CachePolicy policy) {
  const std::int64_t window = state.range(0);
  SessionOn<Tag> session = make_session(policy, window);
  // Streams start with the window full; the full cache starts with as many tokens.
  session.accept(random_tokens(window + 4));
  session.step();
  LatencyHistogram latency;
  for (auto _ : state) {
    if (!session.is_ready()) {
      state.PauseTiming();
      session.reset();
      session.accept(random_tokens(window + 4));
      session.step();
      state.ResumeTiming();
    }
    const std::int64_t begin = monotonic_ns();
    benchmark::DoNotOptimize(session.step());
    latency.record(monotonic_ns() - begin);
  }
  state.counters["p50_us"] = static_cast<double>(latency.quantile_ns(0.5)) * 1e-3;
  state.counters["p99_us"] = static_cast<double>(latency.quantile_ns(0.99)) * 1e-3;
  state.counters["cache_bytes"] = static_cast<double>(session.cache().bytes());
}

/// What the backend does not do, or has nothing to do it with, is the row's error.
template <class Run>
void run_or_say_why(benchmark::State& state, Run&& run) {
  try {
    run();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kUnsupported && error.code() != ErrorCode::kDevice) throw;
    state.SkipWithError(error.what());
  }
}
void ttft(benchmark::State& state) {
  run_or_say_why(state, [&] { time_to_first_token(state); });
}
void step(benchmark::State& state, CachePolicy policy) {
  run_or_say_why(state, [&] { run_steps(state, policy); });
}

std::string row(const char* what) {
  return std::string("stream/") + what + "/" + std::string(backend_traits<Tag>::kName) + "/f16";
}

BENCHMARK(ttft)
    ->Name(row("ttft"))
    ->ArgName("prompt")
    ->RangeMultiplier(2)
    ->Range(16, 4096)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void windows(benchmark::internal::Benchmark* bench) {
  bench->ArgName("window")->RangeMultiplier(2)->Range(256, 2048)->Unit(benchmark::kMillisecond);
  bench->UseRealTime();
}
BENCHMARK_CAPTURE(step, full, CachePolicy::kFull)->Name(row("step/full"))->Apply(windows);
BENCHMARK_CAPTURE(step, window, CachePolicy::kWindow)->Name(row("step/window"))->Apply(windows);
BENCHMARK_CAPTURE(step, recompute, CachePolicy::kRecompute)
    ->Name(row("step/recompute"))
    ->Apply(windows);
BENCHMARK_CAPTURE(step, sink_window, CachePolicy::kSinkWindow)
    ->Name(row("step/sink-window"))
    ->Apply(windows);

}  // namespace

BENCHMARK_MAIN();
