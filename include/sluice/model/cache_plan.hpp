// SPDX-License-Identifier: MIT
/// From what a user asks of a stream (sinks, window, full) to what each layer of a model retains.
/// Layers that were trained with a window of their own keep at most that window.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

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
};

constexpr std::string_view to_string(CachePolicy policy) {
  switch (policy) {
    case CachePolicy::kSinkWindow: return "sink-window";
    case CachePolicy::kWindow: return "window";
    case CachePolicy::kFull: return "full";
    case CachePolicy::kRecompute: return "recompute";
  }
  return "unknown";
}

/// What a user chooses about a stream's memory.
struct CacheOptions {
  CachePolicy policy = CachePolicy::kSinkWindow;
  std::int64_t num_sink_tokens = 4;  ///< kSinkWindow only
  /// Keys a query sees besides the sinks, its own included. Not used by kFull.
  std::int64_t window_size = 1024;
  /// Tokens that kFull can hold.
  std::int64_t capacity = 8192;
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
    const std::int64_t most = policy == CachePolicy::kFull || policy == CachePolicy::kRecompute
                                  ? capacity_needed()
                                  : window_size;
    return most < 512 ? most : 512;
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
};

/// One retention for layers without a window of their own, one for each distinct trained window
/// that is smaller than what the user asks for.
/// \throws Error(kConfig) through Retention when sinks, window and chunk do not fit.
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
      base = RetentionConfig::full(options.capacity_needed(), chunk);
      break;
  }
  const auto complete = [&](RetentionConfig& config) {
    config.position_rule = options.position_rule;
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
