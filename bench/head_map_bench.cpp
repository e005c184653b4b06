// SPDX-License-Identifier: MIT
/// DuoAttention's headline on geometry: a decode step and the memory of a cache in which a share of
/// the KV heads keeps everything and the others sinks and a window, against a full cache. Two
/// layers with random weights stand for all of a model (a step's time is a multiple of a layer's;
/// the output projection is left out), both caches hold random rows and are stepped in turns. JSON
/// lines.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "support/json_record.hpp"
#include "support/random_decoder.hpp"

#include "sluice/cache/head_map.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/clock.hpp"

namespace {

using namespace sluice;

constexpr const char* kHelp =
    "usage: head_map_bench CONTEXT [THREADS [STEPS]]\n"
    "CONTEXT tokens in the cache (100000), THREADS (2), STEPS of each cache (15)\n";

struct Case {
  bench::Geometry geometry;  // two layers of it
  std::int64_t all_layers;
  double sparsity;  // share of streaming heads
  ElementType weights;
};

/// A cache in which `context` tokens are already, with random keys and values.
KvCache<f16> filled_cache(const Decoder& model, const CacheOptions& options, std::int64_t context) {
  KvCache<f16> cache = model.make_cache<f16>(plan_cache(model.config(), options));
  const KvShape shape = cache.shape();
  Random random(5);
  std::vector<float> rows(
      static_cast<std::size_t>(cache.max_chunk() * shape.num_kv_heads * shape.head_dim));
  for (float& x : rows) x = static_cast<float>(random.normal());
  std::vector<float> rotation(static_cast<std::size_t>(cache.max_chunk() * shape.head_dim), 0.7F);
  while (cache.total() < context) {
    const std::int64_t tokens = std::min(cache.max_chunk(), context - cache.total());
    cache.append(tokens);
    for (std::int64_t layer = 0; layer < shape.num_layers; ++layer)
      cache.store(layer, {rows.data(), tokens, shape.num_kv_heads, shape.head_dim},
                  {rows.data(), tokens, shape.num_kv_heads, shape.head_dim}, rotation.data(), 0,
                  tokens);
    cache.commit();
  }
  return cache;
}

CacheOptions options_of(const Case& c, double sparsity, std::int64_t context) {
  const bench::Geometry& g = c.geometry;
  HeadTable gates{g.num_layers, g.num_kv_heads, {}};
  for (std::int64_t i = 0; i < g.num_layers * g.num_kv_heads; ++i)
    gates.values.push_back(static_cast<double>((i * 7) % g.num_kv_heads));
  for (double& gate : gates.values) gate /= static_cast<double>(g.num_kv_heads);
  CacheOptions options{.policy = CachePolicy::kPerHead, .capacity = context + 256};
  options.chunk_size = 256;
  options.heads = duo_attention_map(gates, sparsity, 64, 256);
  return options;
}

void measure(const Case& c, std::int64_t context, int threads, int steps) {
  const auto model = bench::random_decoder(c.geometry, c.weights);
  const std::array<CacheOptions, 2> options{options_of(c, 0, context),
                                            options_of(c, c.sparsity, context)};
  std::array<KvCache<f16>, 2> caches{filled_cache(*model, options[0], context),
                                     filled_cache(*model, options[1], context)};
  ThreadTeam team(threads);
  DecoderWorkspace workspace(*model, 1, caches[0].max_entries(), threads);
  std::array<std::vector<double>, 2> ms;
  const Token token = 1;
  for (int step = -2; step < steps; ++step)
    for (std::size_t side = 0; side < 2; ++side) {
      const std::int64_t begin = monotonic_ns();
      model->forward({&token, 1}, caches[side], workspace, team);
      caches[side].rollback();
      if (step >= 0) ms[side].push_back(static_cast<double>(monotonic_ns() - begin) * 1e-6);
    }
  std::array<double, 2> median{};
  for (std::size_t side = 0; side < 2; ++side) {
    std::nth_element(ms[side].begin(), ms[side].begin() + steps / 2, ms[side].end());
    median[side] = ms[side][static_cast<std::size_t>(steps) / 2];
  }
  double weights = 0;
  for (const DecoderLayerWeights& layer : model->weights().layers)
    for (const WeightMatrix* m : {&layer.query, &layer.key, &layer.value, &layer.output,
                                  &layer.gate, &layer.up, &layer.down})
      weights += static_cast<double>(m->bytes());
  const double all = static_cast<double>(c.all_layers) / static_cast<double>(c.geometry.num_layers);
  const double full = static_cast<double>(caches[0].bytes()) * all * 1e-9;
  const double mapped = static_cast<double>(caches[1].bytes()) * all * 1e-9;
  const double weights_gb = weights * all * 1e-9;
  bench::Record("head_map")
      .field("geometry", c.geometry.name)
      .field("weights", std::string(to_string(c.weights)))
      .field("context", context)
      .field("full_heads", 1 - c.sparsity)
      .field("threads", std::int64_t{threads})
      .field("layers_measured", c.geometry.num_layers)
      .field("full_ms", median[0] * all)
      .field("mapped_ms", median[1] * all)
      .field("latency_ratio", median[0] / median[1])
      .field("full_cache_gb", full)
      .field("mapped_cache_gb", mapped)
      .field("cache_ratio", full / mapped)
      .field("weights_gb", weights_gb)
      .field("memory_ratio", (full + weights_gb) / (mapped + weights_gb));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc > 1 && std::string(argv[1]) == "--benchmark_list_tests") {
    std::cout << "head_map\n";
    return 0;
  }
  const std::int64_t context = argc > 1 ? std::atoll(argv[1]) : 0;
  if (context < 1) {
    std::cerr << kHelp;
    return argc > 1 && std::string(argv[1]) == "--help" ? 0 : 2;
  }
  const int threads = argc > 2 ? std::atoi(argv[2]) : 2;
  const int steps = std::max(1, argc > 3 ? std::atoi(argv[3]) : 15);
  const bench::Geometry multi_head{"llama-2-7b", 512, 4096, 11008, 2, 32, 32, 128};
  const bench::Geometry grouped{"llama-3-8b", 512, 4096, 14336, 2, 32, 8, 128};
  for (const ElementType type : {ElementType::kBF16, ElementType::kQ4_0}) {
    measure({multi_head, 32, 0.75, type}, context, threads, steps);
    measure({grouped, 32, 0.5, type}, context, threads, steps);
  }
} catch (const std::exception& error) {
  std::cerr << "head_map_bench: " << error.what() << "\n";
  return 2;
}
