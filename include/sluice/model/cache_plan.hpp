// SPDX-License-Identifier: MIT
/// From what a user asks of a stream (sinks, window, full) to what each layer of a model retains.
/// Layers that were trained with a window of their own keep at most that window.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/cache/head_map.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/core/error.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// The retention policies of a stream; the four baselines of the StreamingLLM paper are among them.
enum class CachePolicy : std::uint8_t {
  kSinkWindow,  ///< attention sinks and a window (StreamingLLM)
  kWindow,      ///< a window, keys kept: collapses once the first tokens leave
  kFull,        ///< everything, up to the capacity; then Error(kCapacity)
  kRecompute,   ///< the window's keys and values rebuilt from its tokens at every step
  kPerHead,     ///< each KV head keeps what CacheOptions::heads says (DuoAttention, MoA)
};

constexpr std::string_view to_string(CachePolicy policy) {
  switch (policy) {
    case CachePolicy::kSinkWindow: return "sink-window";
    case CachePolicy::kWindow: return "window";
    case CachePolicy::kFull: return "full";
    case CachePolicy::kRecompute: return "recompute";
    case CachePolicy::kPerHead: return "per-head";
  }
  return "unknown";
}

/// What a user chooses about a stream's memory.
struct CacheOptions {
  CachePolicy policy = CachePolicy::kSinkWindow;
  std::int64_t num_sink_tokens = 4;  ///< kSinkWindow only
  /// Keys a query sees besides the sinks, its own included. Not used by kFull.
  std::int64_t window_size = 1024;
  /// Tokens that kFull can hold, and heads of kPerHead that keep everything.
  std::int64_t capacity = 8192;
  /// kPerHead: what each head keeps. Its windows take the place of num_sink_tokens and window_size;
  /// heads that evict per chunk count in the text, whatever position_rule says.
  HeadMap heads{};
  /// Tokens of one prefill step. 0: the smaller of 512 and the window.
  std::int64_t chunk_size = 0;
  PositionRule position_rule = PositionRule::kInCache;
  KeyForm key_form = KeyForm::kRotated;
  /// Position of the stream's token 0: the target offset (phi) of group position encoding.
  Position origin = 0;
  /// Tokens that the stream may be ahead of what a reader of another group sees (cache/group.hpp);
  /// a window's storage grows by what exceeds chunk - 1. A full cache has it all, but for layers
  /// with a trained window.
  std::int64_t lead = 0;

  /// Tokens of one prefill step, the default resolved.
  std::int64_t chunk() const {
    if (chunk_size != 0) return chunk_size;
    const bool windowed = policy == CachePolicy::kSinkWindow || policy == CachePolicy::kWindow;
    const std::int64_t most = windowed ? window_size : capacity_needed();
    return most < 512 ? most : 512;
  }
  /// Whether the stream ends when `capacity` tokens are held.
  bool is_bounded() const {
    return policy == CachePolicy::kFull ||
           (policy == CachePolicy::kPerHead && heads.num_full() > 0);
  }
  /// Entries of a cache that never lets go (kFull, kRecompute).
  std::int64_t capacity_needed() const {
    return policy == CachePolicy::kRecompute ? window_size : capacity;
  }
};

/// The largest CacheOptions::lead: sums with it do not overflow.
inline constexpr std::int64_t kMaxLead = std::int64_t{1} << 32;

/// Retentions, and which of them each layer uses.
struct CachePlan {
  std::vector<RetentionConfig> retentions;
  std::vector<int> retention_of_layer;
  /// [layers], each [num_kv_heads] or empty: the layer's heads retain alike. Empty: all do.
  std::vector<std::vector<int>> retention_of_head{};
};

namespace detail {

/// The place of a retention in a plan, added where it is new.
inline int planned(CachePlan& plan, const RetentionConfig& config) {
  for (std::size_t r = 0; r < plan.retentions.size(); ++r)
    if (plan.retentions[r].num_sink_tokens == config.num_sink_tokens &&
        plan.retentions[r].window_size == config.window_size)
      return static_cast<int>(r);
  plan.retentions.push_back(config);
  return static_cast<int>(plan.retentions.size()) - 1;
}

/// The retention of one head of a map, in a layer that was trained with a window of its own.
inline RetentionConfig head_retention(const HeadRetention& head, Eviction eviction,
                                      std::int64_t trained_window, std::int64_t capacity,
                                      std::int64_t chunk) {
  if (trained_window < head.window_size)
    return RetentionConfig::window(trained_window, std::min(chunk, trained_window));
  if (head.is_full()) return RetentionConfig::full(capacity, chunk);
  if (eviction == Eviction::kPerChunk)
    return RetentionConfig::per_chunk(head.num_sink_tokens, head.window_size, chunk);
  return RetentionConfig::sink_window(head.num_sink_tokens, head.window_size,
                                      std::min(chunk, head.window_size));
}

}  // namespace detail

/// One retention for layers without a window of their own, one for each distinct trained window
/// that is smaller than what the user asks for; with kPerHead one for each distinct retention of
/// the map. \throws Error(kConfig) through Retention when sinks, window and chunk do not fit,
/// Error(kShape) when a head map is of another model.
inline CachePlan plan_cache(const DecoderConfig& model, const CacheOptions& options) {
  const std::int64_t chunk = options.chunk();
  RetentionConfig base;
  switch (options.policy) {
    case CachePolicy::kSinkWindow:
      base = RetentionConfig::sink_window(options.num_sink_tokens, options.window_size, chunk);
      break;
    case CachePolicy::kWindow: base = RetentionConfig::window(options.window_size, chunk); break;
    case CachePolicy::kFull:
    case CachePolicy::kRecompute:
    case CachePolicy::kPerHead:
      base = RetentionConfig::full(options.capacity_needed(), chunk);
      break;
  }
  const auto complete = [&](RetentionConfig& config) {
    if (config.eviction != Eviction::kPerChunk) config.position_rule = options.position_rule;
    config.key_form = options.key_form;
    config.origin = options.origin;
    if (config.window_size < kUnlimitedWindow && options.lead > config.max_chunk - 1)
      config.capacity = config.num_sink_tokens + config.window_size + options.lead;
  };
  if (options.lead < 0 || options.lead > kMaxLead)
    throw Error(ErrorCode::kConfig,
                {"cache configuration does not fit", "CacheOptions", "lead",
                 "0 to " + std::to_string(kMaxLead), std::to_string(options.lead)});
  complete(base);
  static_cast<void>(Retention(base));  // the user's own numbers fail before any derived ones

  CachePlan plan;
  if (options.policy == CachePolicy::kPerHead) {
    const HeadMap& map = options.heads;
    if (map.num_layers() != model.num_layers() || map.num_kv_heads() != model.num_kv_heads)
      throw Error(ErrorCode::kShape,
                  {"the head map is of another model", "CacheOptions", "heads",
                   std::to_string(model.num_layers()) + " layers of " +
                       std::to_string(model.num_kv_heads) + " KV heads",
                   std::to_string(map.num_layers()) + " of " + std::to_string(map.num_kv_heads())});
    for (std::int64_t l = 0; l < model.num_layers(); ++l) {
      std::vector<int> of_head;
      for (std::int64_t head = 0; head < model.num_kv_heads; ++head) {
        RetentionConfig config = detail::head_retention(
            map.at(l, head), map.eviction(), model.layers[static_cast<std::size_t>(l)].window_size,
            options.capacity_needed(), chunk);
        complete(config);
        of_head.push_back(detail::planned(plan, config));
      }
      plan.retention_of_layer.push_back(of_head.front());
      const bool alike = std::all_of(of_head.begin(), of_head.end(),
                                     [&](int retention) { return retention == of_head.front(); });
      plan.retention_of_head.push_back(alike ? std::vector<int>{} : std::move(of_head));
    }
    return plan;
  }
  plan.retentions.push_back(base);
  for (const DecoderLayerConfig& layer : model.layers) {
    int index = 0;
    if (layer.window_size < base.window_size) {
      RetentionConfig local = RetentionConfig::window(
          layer.window_size, chunk < layer.window_size ? chunk : layer.window_size);
      complete(local);
      // A full cache cannot outgrow its capacity, whatever a layer's window is.
      index = 1;
      while (index < static_cast<int>(plan.retentions.size()) &&
             plan.retentions[static_cast<std::size_t>(index)].window_size != layer.window_size)
        ++index;
      if (index == static_cast<int>(plan.retentions.size())) plan.retentions.push_back(local);
    }
    plan.retention_of_layer.push_back(index);
  }
  return plan;
}

}  // namespace sluice
