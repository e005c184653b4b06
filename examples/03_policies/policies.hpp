// SPDX-License-Identifier: MIT
// The policies that are compared, each with as many entries a head as the budget says.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "measure.hpp"

#include "sluice/attention/cluster_cache.hpp"
#include "sluice/attention/kivi_cache.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/attention/query_directions.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/cache/head_map.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/cache/shard_cache.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"

namespace policies {

/// What cutting a text into chunks means to a policy.
enum class Chunks {
  kExact,      ///< nothing: any chunks give what single tokens give, to rounding
  kSelecting,  ///< entries are selected, when `growth` is used up, or coded, at the ends of chunks
  kSingle,     ///< it acts in single tokens alone: what is beyond the budget is read one by one
};

struct Policy {
  std::string_view name;
  std::string_view keeps;
  Chunks chunks;
};

inline constexpr std::array<Policy, 16> kPolicies{{
    {"full", "everything, whatever the budget", Chunks::kExact},
    {"window", "the newest", Chunks::kExact},
    {"sink-window", "4 sinks and the newest (StreamingLLM)", Chunks::kExact},
    {"per-head", "what --heads says, or every other KV head everything (DuoAttention)",
     Chunks::kExact},
    {"snap-kv", "what the last 32 queries attend to, and the newest 32", Chunks::kSelecting},
    {"snap-kv-ranks", "the same, read at their ranks: positions stay small for ever",
     Chunks::kSelecting},
    {"h2o", "half by all attention so far, half the newest", Chunks::kSelecting},
    {"h2o-ranks", "the same, read at their ranks", Chunks::kSelecting},
    {"q-filters", "half by the key's direction, half the newest", Chunks::kSelecting},
    {"sir-llm", "4 sinks, half by surprisal, half the newest, at their ranks", Chunks::kSelecting},
    {"quest", "everything; a single token reads the pages of 16 with the best bounds",
     Chunks::kSingle},
    {"tidal-decode", "everything; a single token reads what layers 2 and 13 chose",
     Chunks::kSingle},
    {"clusters", "everything; a single token reads the clusters of keys that score highest",
     Chunks::kSingle},
    {"lazy", "everything in half of the layers, 4 sinks and the newest in others (LightTransfer)",
     Chunks::kExact},
    {"shards", "the newest half, and every n-th older block, another in each head (S2-Attention)",
     Chunks::kExact},
    {"kivi", "everything, in 4 bits but for the newest (KIVI)", Chunks::kSelecting},
}};

inline Chunks chunks_of(std::string_view policy) {
  for (const Policy& known : kPolicies)
    if (known.name == policy) return known.chunks;
  return Chunks::kExact;
}

/// What all policies of a run share.
struct Setting {
  const sluice::Decoder* model = nullptr;
  std::int64_t budget = 512;  ///< entries of a KV head
  std::int64_t chunk = 32;    ///< tokens read at once
  /// Entries that scored policies take in before they select again, at least `chunk`; what exceeds
  /// a chunk is taken from their budget, a quarter of it at most, so that all policies hold as many
  /// entries. 0: two chunks.
  std::int64_t growth = 0;
  std::int64_t tokens = 0;  ///< of the whole stream, for caches that keep it
  sluice::HeadMap heads{};  ///< empty: every other head full
  std::vector<float> filters{};
};

/// Directions of all heads, from the first tokens of a stream.
inline std::vector<float> calibrate(const sluice::Decoder& model,
                                    std::span<const sluice::Token> tokens, sluice::ThreadTeam& team,
                                    sluice::Activations activations) {
  const sluice::DecoderConfig& c = model.config();
  sluice::QueryDirections directions(c.num_layers(), c.num_qo_heads, c.num_kv_heads, c.head_dim);
  const auto count = static_cast<std::int64_t>(tokens.size());
  const sluice::CacheOptions full{.policy = sluice::CachePolicy::kFull, .capacity = count};
  sluice::QueryRecordingCache<sluice::f16> cache(model.make_cache<sluice::f16>(plan_cache(c, full)),
                                                 directions);
  Stream stream(model, cache, team, activations);
  std::vector<double> ignored;
  stream.read(tokens, ignored);
  return directions.filters();
}

/// Makes the policy's cache and calls visit(cache). \throws sluice::Error(kConfig) where the budget
/// is too small for it.
template <class Visit>
auto with_cache(std::string_view policy, const Setting& s, Visit&& visit) {
  const sluice::Decoder& model = *s.model;
  constexpr std::int64_t kSinks = 4;
  const auto plain = [&](sluice::CacheOptions options) {
    options.chunk_size = s.chunk;
    options.capacity = s.tokens;
    auto cache = model.make_cache<sluice::f16>(plan_cache(model.config(), options));
    return visit(cache);
  };
  const auto scored = [&](const sluice::ScorePolicy& chosen) {
    const bool directed = chosen.source == sluice::ScoreSource::kKeyDirection;
    auto cache = model.make_scored_cache<sluice::f16>(
        chosen, directed ? std::span<const float>(s.filters) : std::span<const float>());
    return visit(cache);
  };
  if (policy == "full") return plain({.policy = sluice::CachePolicy::kFull});
  if (policy == "window")
    return plain({.policy = sluice::CachePolicy::kWindow, .window_size = s.budget});
  if (policy == "sink-window")
    return plain({.policy = sluice::CachePolicy::kSinkWindow,
                  .num_sink_tokens = kSinks,
                  .window_size = s.budget - kSinks});
  if (policy == "per-head") {
    sluice::CacheOptions options{.policy = sluice::CachePolicy::kPerHead, .heads = s.heads};
    if (options.heads.empty()) {
      std::vector<sluice::HeadRetention> heads;
      const sluice::KvShape shape = model.kv_shape();
      for (std::int64_t i = 0; i < shape.num_layers * shape.num_kv_heads; ++i)
        heads.push_back(i % 2 == 0 ? sluice::HeadRetention::full()
                                   : sluice::HeadRetention{kSinks, s.budget - kSinks});
      options.heads = sluice::HeadMap(shape.num_layers, shape.num_kv_heads, std::move(heads));
    }
    return plain(options);
  }
  // Storage holds the budget and one chunk more, as a window's does.
  const std::int64_t growth =
      std::clamp(s.growth == 0 ? 2 * s.chunk : s.growth, s.chunk, s.chunk + s.budget / 4);
  const std::int64_t budget = s.budget - (growth - s.chunk);
  const sluice::PositionRule rule =
      policy.ends_with("-ranks") ? sluice::PositionRule::kInCache : sluice::PositionRule::kInText;
  if (policy.starts_with("snap-kv")) {
    sluice::ScorePolicy snap_kv = sluice::ScorePolicy::snap_kv(
        budget, growth, s.chunk, std::min<std::int64_t>(32, budget / 2));
    snap_kv.position_rule = rule;
    return scored(snap_kv);
  }
  if (policy.starts_with("h2o")) {
    sluice::ScorePolicy h2o = sluice::ScorePolicy::h2o(budget / 2, budget - budget / 2, s.chunk);
    h2o.growth = growth;
    h2o.position_rule = rule;
    return scored(h2o);
  }
  if (policy == "q-filters")
    return scored(sluice::ScorePolicy::q_filters(budget, budget / 2, growth, s.chunk));
  if (policy == "quest") {
    auto cache = model.make_page_select_cache<sluice::f16>(sluice::PageSelection::quest(s.budget),
                                                           s.tokens, s.chunk);
    return visit(cache);
  }
  if (policy == "tidal-decode") {
    const std::int64_t layers = model.config().num_layers();
    sluice::TokenSelection selection{.publishing_layers = {std::min<std::int64_t>(2, layers - 1)},
                                     .budget = s.budget};
    if (layers > 13) selection.publishing_layers.push_back(13);
    auto cache = model.make_token_select_cache<sluice::f16>(selection, s.tokens, s.chunk);
    return visit(cache);
  }
  if (policy == "clusters") {
    // The budget is to be used up, whatever share of attention it has.
    const sluice::ClusterSelection selection{
        .max_clusters = std::max<std::int64_t>(16, s.tokens / 16),
        .budget = s.budget,
        .recent = std::min<std::int64_t>(64, s.budget / 4),
        .share = 1};
    auto cache = model.make_cluster_select_cache<sluice::f16>(selection, s.tokens, s.chunk);
    return visit(cache);
  }
  if (policy == "lazy") {
    const std::int64_t prompt = std::min(s.tokens, 2 * s.budget);
    const std::int64_t recent = s.budget - kSinks;
    auto cache = model.make_lazy_layer_cache<sluice::f16>(
        {.num_full_layers = model.config().num_layers() / 2,
         .num_sink_tokens = kSinks,
         .recent_size = recent,
         .capacity = s.tokens,
         .max_prompt = prompt,
         .max_chunk = std::min({s.chunk, recent + 1, prompt}),
         .prompt_in_chunks = true});
    return visit(cache);
  }
  std::vector<const sluice::Rotary*> rotaries;
  for (std::int64_t l = 0; l < model.config().num_layers(); ++l)
    rotaries.push_back(&model.rotary(l));
  const sluice::KvShape shape = model.kv_shape();
  if (policy == "shards") {
    sluice::ShardPattern pattern{.num_heads = shape.num_kv_heads,
                                 .block_size = std::clamp<std::int64_t>(s.budget / 8, 1, 64)};
    const std::int64_t blocks = (s.tokens + pattern.block_size - 1) / pattern.block_size;
    const std::int64_t kept = s.budget / pattern.block_size;
    pattern.local_blocks = kept / 2;
    const std::int64_t shard = kept - pattern.local_blocks;
    pattern.vert_stride =
        std::max<std::int64_t>(1, (blocks - pattern.local_blocks + shard - 1) / shard);
    sluice::ShardKvCache<sluice::f16> cache(shape, pattern, s.tokens, rotaries);
    return visit(cache);
  }
  if (policy == "kivi") {
    std::int64_t group = 32;
    while (group > 8 && shape.value_dim % group != 0) group /= 2;
    sluice::KiviKvCache<4> cache(
        shape, {.group = group, .retention = sluice::RetentionConfig::full(s.tokens, s.chunk)},
        rotaries);
    return visit(cache);
  }
  const std::int64_t recent = (budget - kSinks) / 2;
  sluice::ScorePolicy sir_llm =
      sluice::ScorePolicy::sir_llm(kSinks, recent, budget - kSinks - recent, 1.0, s.chunk);
  sir_llm.growth = growth;
  return scored(sir_llm);
}

}  // namespace policies
