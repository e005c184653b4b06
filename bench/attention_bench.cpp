// SPDX-License-Identifier: MIT
/// Attention and cache, one layer at a time: what a decoding step and a prefill chunk cost as the
/// cache grows. Rows carry their geometry: num_qo_heads:num_kv_heads x head_dim, sinks + window.
/// Counters: K/V bandwidth in bytes/s for one query, flop/s for a chunk.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/kivi_cache.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/random.hpp"

namespace {

using namespace sluice;

struct Geometry {
  std::int64_t num_qo_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
};

std::vector<float> noise(std::int64_t count) {
  Random random(1);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(random.normal());
  return values;
}

/// The cache that holds an element type, and the bytes of a token's key in one head.
template <class Element>
struct Storage {
  using Cache = KvCache<Element>;
  static Cache make(const KvShape& shape, const RetentionConfig& config, const Rotary& rotary) {
    return Cache(shape, std::span(&config, 1), std::array{LayerCacheConfig{0, &rotary}});
  }
  static std::int64_t row_bytes(std::int64_t dim) {
    return KvRow<Element>::stored(dim) * static_cast<std::int64_t>(sizeof(Element)) +
           KvRow<Element>::scales(dim) *
               static_cast<std::int64_t>(sizeof(typename KvRow<Element>::Scale));
  }
};
template <int kBits>
struct Storage<KiviElement<kBits, f16>> {
  using Cache = KiviKvCache<kBits>;
  static Cache make(const KvShape& shape, const RetentionConfig& config, const Rotary& rotary) {
    return Cache(shape, {.retention = config}, std::array{&rotary});
  }
  static std::int64_t row_bytes(std::int64_t dim) { return dim * kBits / 8 + dim / 32 * 4; }
};

/// One layer with a cache that has evicted already: the steady state of a stream.
template <class Element>
class Layer {
  using Cache = typename Storage<Element>::Cache;

 public:
  Layer(const Geometry& geometry, std::int64_t sinks, std::int64_t window, std::int64_t chunk,
        int threads)
      : geometry_(geometry),
        rotary_({.head_dim = static_cast<int>(geometry.head_dim),
                 .rotary_dim = static_cast<int>(geometry.head_dim)}),
        config_(RetentionConfig::sink_window(sinks, window, chunk)),
        cache_(Storage<Element>::make(
            {1, geometry.num_kv_heads, geometry.head_dim, geometry.head_dim}, config_, rotary_)),
        team_(threads),
        workspace_(&rotary_,
                   {.num_qo_heads = geometry.num_qo_heads,
                    .num_kv_heads = geometry.num_kv_heads,
                    .head_dim = geometry.head_dim,
                    .value_dim = geometry.head_dim,
                    .max_queries = chunk,
                    .max_keys = config_.capacity,
                    .max_segments = std::max(16, Cache::kMaxSegments)},
                   threads),
        rotation_(rotary_, chunk),
        query_(noise(chunk * geometry.num_qo_heads * geometry.head_dim)),
        key_(noise(chunk * geometry.num_kv_heads * geometry.head_dim)),
        out_(query_.size()) {
    while (cache_.total() < 2 * config_.capacity) {
      append(chunk);
      cache_.commit();
    }
  }

  /// Stores `tokens` new tokens.
  void append(std::int64_t tokens) {
    rotation_.fill_run(static_cast<Position>(cache_.total()), tokens);
    cache_.append(tokens);
    const HeadsView<const float> rows(key_.data(), tokens, geometry_.num_kv_heads,
                                      geometry_.head_dim);
    cache_.store(0, rows, rows, rotation_.rows(), 0, tokens);
  }

  void attend_newest(std::int64_t tokens) {
    std::array<Segment<Element>, static_cast<std::size_t>(Cache::kMaxSegments)> segments;
    const int count = cache_.segments(0, tokens, segments);
    const std::int64_t first = cache_.total() - tokens;
    const AttentionVariant<> variant{0.125F, {config_.window_size, config_.num_sink_tokens}};
    attend(AttentionQuery{{query_.data(), tokens, geometry_.num_qo_heads, geometry_.head_dim},
                          first,
                          static_cast<Position>(first)},
           std::span<const Segment<Element>>(segments.data(), static_cast<std::size_t>(count)),
           variant,
           HeadsView<float>(out_.data(), tokens, geometry_.num_qo_heads, geometry_.head_dim),
           nullptr, workspace_, team_, cpu{});
    benchmark::DoNotOptimize(out_.data());
  }

  Cache& cache() { return cache_; }

 private:
  Geometry geometry_;
  Rotary rotary_;
  RetentionConfig config_;
  Cache cache_;
  ThreadTeam team_;
  AttentionWorkspace<cpu> workspace_;
  RotaryTable rotation_;
  std::vector<float> query_;
  std::vector<float> key_;
  std::vector<float> out_;
};

Geometry geometry_of(const benchmark::State& state) {
  return {state.range(0), state.range(1), state.range(2)};
}

/// One token: store, attend, evict. The cost of a step in one layer.
template <class Element>
void decode_step(benchmark::State& state) {
  const Geometry geometry = geometry_of(state);
  const std::int64_t sinks = 4;
  const std::int64_t window = state.range(3);
  Layer<Element> layer(geometry, sinks, window, 1, static_cast<int>(state.range(4)));
  for (auto _ : state) {
    layer.append(1);
    layer.attend_newest(1);
    layer.cache().commit();
  }
  const std::int64_t bytes =
      (sinks + window) * geometry.num_kv_heads * 2 * Storage<Element>::row_bytes(geometry.head_dim);
  state.counters["kv_bytes_per_s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::OneK::kIs1000);
}

/// The cache alone: append, store, list segments, commit.
template <class Element>
void cache_step(benchmark::State& state) {
  const Geometry geometry = geometry_of(state);
  Layer<Element> layer(geometry, 4, state.range(3), 1, 1);
  for (auto _ : state) {
    layer.append(1);
    std::array<Segment<Element>, KvCache<Element>::kMaxSegments> segments;
    benchmark::DoNotOptimize(layer.cache().segments(0, 1, segments));
    layer.cache().commit();
  }
}

/// A chunk of 256 tokens through sinks + window.
template <class Element>
void prefill_chunk(benchmark::State& state) {
  const Geometry geometry = geometry_of(state);
  const std::int64_t window = state.range(3);
  const std::int64_t chunk = 256;
  Layer<Element> layer(geometry, 4, window, chunk, static_cast<int>(state.range(4)));
  for (auto _ : state) {
    layer.append(chunk);
    layer.attend_newest(chunk);
    layer.cache().commit();
  }
  const std::int64_t flops = chunk * (window + 4) * geometry.num_qo_heads * geometry.head_dim * 4;
  state.counters["flop_per_s"] =
      benchmark::Counter(static_cast<double>(flops), benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::OneK::kIs1000);
}

/// A whole prompt of `length` tokens in chunks of 512: causal attention over all that came before,
/// or through 4 sinks + 1,020 keys, where the time is linear in the length. flop_per_s counts the
/// keys that the tokens see, 4 operations a channel, and no others.
template <class Element>
void prefill_prompt(benchmark::State& state) {
  const Geometry geometry = geometry_of(state);
  const std::int64_t length = state.range(3);
  const bool full = state.range(4) == 0;
  const std::int64_t chunk = 512;
  const std::int64_t sinks = full ? 0 : 4;
  const std::int64_t window = full ? length : state.range(4);
  Layer<Element> layer(geometry, sinks, window, chunk, static_cast<int>(state.range(5)));
  for (auto _ : state) {
    layer.cache().reset();
    for (std::int64_t done = 0; done < length; done += chunk) {
      layer.append(chunk);
      layer.attend_newest(chunk);
      layer.cache().commit();
    }
  }
  std::int64_t pairs = 0;
  for (std::int64_t t = 0; t < length; ++t) pairs += std::min(t + 1, sinks + window);
  const std::int64_t flops = pairs * geometry.num_qo_heads * geometry.head_dim * 4;
  state.counters["flop_per_s"] =
      benchmark::Counter(static_cast<double>(flops), benchmark::Counter::kIsIterationInvariantRate,
                         benchmark::Counter::OneK::kIs1000);
}

/// What the processor can do: independent fused multiply-adds in registers, on one thread.
void multiply_add_peak(benchmark::State& state) {
  constexpr int kChains = 12;
  constexpr int kSteps = 1000;
  simd::VecF sum[kChains];
  for (simd::VecF& chain : sum) chain = simd::broadcast(1.0F);
  const simd::VecF factor = simd::broadcast(0.999F);
  const simd::VecF summand = simd::broadcast(0.5F);
  for (auto _ : state)
    for (int step = 0; step < kSteps; ++step)
      for (simd::VecF& chain : sum) chain = simd::in_register(simd::fma(chain, factor, summand));
  for (const simd::VecF& chain : sum) benchmark::DoNotOptimize(simd::reduce_add(chain));
  state.counters["flop_per_s"] = benchmark::Counter(2.0 * kChains * kSteps * simd::kWidth,
                                                    benchmark::Counter::kIsIterationInvariantRate,
                                                    benchmark::Counter::OneK::kIs1000);
}

void prompts(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"qo_heads", "kv_heads", "head_dim", "length", "window", "threads"});
  for (const Geometry& g : {Geometry{9, 3, 64}, Geometry{32, 8, 128}})
    for (const std::int64_t window : {0, 1020})  // 0: everything
      for (const std::int64_t length : {512, 2048, 8192})
        for (const std::int64_t threads : {1, 2})
          bench->Args({g.num_qo_heads, g.num_kv_heads, g.head_dim, length, window, threads});
}

void geometries(benchmark::internal::Benchmark* bench, bool with_threads) {
  std::vector<std::string> names{"qo_heads", "kv_heads", "head_dim", "window"};
  if (with_threads) names.emplace_back("threads");
  bench->ArgNames(names);
  for (const Geometry& g : {Geometry{9, 3, 64}, Geometry{32, 8, 128}})
    for (const std::int64_t window : {256, 1024, 4096}) {
      if (!with_threads) {
        bench->Args({g.num_qo_heads, g.num_kv_heads, g.head_dim, window});
        continue;
      }
      for (const std::int64_t threads : {1, 2})
        bench->Args({g.num_qo_heads, g.num_kv_heads, g.head_dim, window, threads});
    }
}
void threaded(benchmark::internal::Benchmark* bench) {
  geometries(bench, true);
}
void single(benchmark::internal::Benchmark* bench) {
  geometries(bench, false);
}

BENCHMARK(decode_step<float>)->Name("attention/decode/cpu/f32")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<f16>)->Name("attention/decode/cpu/f16")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<bf16>)->Name("attention/decode/cpu/bf16")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<std::int8_t>)
    ->Name("attention/decode/cpu/i8")
    ->Apply(threaded)
    ->UseRealTime();
BENCHMARK(decode_step<fp8_e4m3>)->Name("attention/decode/cpu/e4m3")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<int4x2>)->Name("attention/decode/cpu/i4")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<q8_0>)->Name("attention/decode/cpu/q8_0")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<q4_0>)->Name("attention/decode/cpu/q4_0")->Apply(threaded)->UseRealTime();
BENCHMARK(decode_step<KiviElement<4, f16>>)
    ->Name("attention/decode/cpu/kivi4")
    ->Apply(threaded)
    ->UseRealTime();
BENCHMARK(decode_step<KiviElement<2, f16>>)
    ->Name("attention/decode/cpu/kivi2")
    ->Apply(threaded)
    ->UseRealTime();
BENCHMARK(cache_step<f16>)->Name("cache/step/cpu/f16")->Apply(single);
BENCHMARK(multiply_add_peak)->Name("attention/peak/cpu/f32");
BENCHMARK(prefill_prompt<f16>)
    ->Name("attention/prefill/cpu/f16")
    ->Apply(prompts)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(prefill_chunk<f16>)->Name("attention/prefill256/cpu/f16")->Apply(threaded)->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
