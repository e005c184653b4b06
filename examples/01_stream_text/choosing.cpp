// SPDX-License-Identifier: MIT
// Sessions over caches that choose what they keep or read.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "options.hpp"
#include "runner.hpp"

#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/core/element.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/stream/session.hpp"

namespace stream_text {

namespace {

using sluice::f16;

/// Scored policies hold --window entries a head, a chunk and what grows between two selections
/// included.
sluice::ScorePolicy score_policy(const Options& options) {
  const std::int64_t window = options.cache.window_size;
  const std::int64_t chunk = options.cache.chunk_size > 0
                                 ? std::min(options.cache.chunk_size, window / 8)
                                 : std::min<std::int64_t>(32, window / 8);
  const std::int64_t growth = 2 * chunk;
  const std::int64_t budget = window - growth;
  sluice::ScorePolicy policy;
  switch (options.choosing) {
    case Choosing::kSnapKv:
      policy = sluice::ScorePolicy::snap_kv(budget, growth, chunk,
                                            std::min<std::int64_t>(32, budget / 2));
      break;
    case Choosing::kH2O:
      policy = sluice::ScorePolicy::h2o(budget / 2, budget - budget / 2, chunk);
      break;
    case Choosing::kSirLlm: {
      const std::int64_t sinks = options.cache.num_sink_tokens;
      const std::int64_t recent = (budget - sinks) / 2;
      policy = sluice::ScorePolicy::sir_llm(sinks, recent, budget - sinks - recent, 1, chunk);
      break;
    }
    case Choosing::kNone:
    case Choosing::kQuest:
    case Choosing::kTidalDecode:
    case Choosing::kLightTransfer: break;
  }
  policy.growth = growth;
  policy.position_rule = options.cache.position_rule;
  return policy;
}

template <class Cache>
int run(const sluice::LoadedModel& model, const Options& options, Cache&& cache) {
  using Session = sluice::Session<f16, f16, Cache>;
  return Runner<Session>(model, options,
                         Session(model.decoder, session_options(options), std::move(cache)))
      .run();
}

}  // namespace

int run_choosing(const sluice::LoadedModel& model, const Options& options) {
  const sluice::Decoder& decoder = *model.decoder;
  const std::int64_t capacity = options.cache.capacity;
  const std::int64_t chunk = options.cache.chunk();
  if (options.choosing == Choosing::kQuest)
    return run(model, options,
               decoder.make_page_select_cache<f16>(
                   sluice::PageSelection::quest(options.cache.window_size), capacity, chunk));
  if (options.choosing == Choosing::kTidalDecode) {
    const std::int64_t layers = decoder.config().num_layers();
    sluice::TokenSelection selection{.publishing_layers = {std::min<std::int64_t>(2, layers - 1)},
                                     .budget = options.cache.window_size};
    if (layers > 13) selection.publishing_layers.push_back(13);
    return run(model, options, decoder.make_token_select_cache<f16>(selection, capacity, chunk));
  }
  if (options.choosing == Choosing::kLightTransfer) {
    // How long the prompt is shows when it ends: any length up to the capacity, as it comes.
    const std::int64_t window = options.cache.window_size;
    return run(model, options,
               decoder.make_lazy_layer_cache<f16>({
                   .num_full_layers = decoder.config().num_layers() / 2,
                   .num_sink_tokens = options.cache.num_sink_tokens,
                   .recent_size = window - 1,
                   .capacity = capacity,
                   .max_prompt = capacity,
                   .max_chunk = chunk,
                   .prompt_in_chunks = true,
               }));
  }
  return run(model, options, decoder.make_scored_cache<f16>(score_policy(options)));
}

}  // namespace stream_text
