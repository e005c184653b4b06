// SPDX-License-Identifier: MIT
/// What a stream that reads while it writes is made of, and what follows from it for the caches of
/// its two groups, whichever backend they lie on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "sluice/backend/cpu/linear_workspace.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/stream/policy.hpp"
#include "sluice/stream/sampler.hpp"

namespace sluice {

/// What a Duplex is made of.
struct DuplexOptions {
  /// What each group retains; origins come from the layout. Both are endless by default, sinks and
  /// a window each: exact until the window is full. CachePolicy::kFull keeps everything up to a
  /// capacity, as the published systems do, and takes the memory for it at once; kRecompute is
  /// refused.
  CacheOptions source;
  CacheOptions target;
  /// Fed before the first target token is predicted (an assistant turn's opening); at least one.
  std::vector<Token> target_prefix;
  /// The prefix tokens see each other in both directions, as in group position encoding's released
  /// inference (its training is causal).
  bool bidirectional_prefix = false;
  SamplerOptions sampler;
  /// When a candidate among these would become part of the target (kWrite, or kRead that keeps it),
  /// the target ends without it. A policy that rather reads on answers kRead and drops it:
  /// hypotheses that end with an end token do.
  std::vector<Token> end_tokens;
  std::int64_t max_target_tokens = std::int64_t{1} << 62;
  /// The most tokens of one source unit.
  std::int64_t max_unit_tokens = 256;
  /// Source that was fed and not yet read: feed() blocks beyond it.
  std::int64_t queue_units = 1024;
  std::int64_t queue_tokens = 8192;
  /// The same for units fed as embeddings (frames of an encoder), in rows; 0: units are tokens
  /// alone. Both kinds may be mixed: a question between frames.
  std::int64_t queue_embeddings = 0;
  /// How far the source may be read ahead of what the target has seen. 0: 4 * max_unit_tokens.
  std::int64_t max_lead_tokens = 0;
  std::int64_t max_lead_units = 1024;
  /// Units that one forward of the source may take together when they are waiting. Above 1 a late
  /// source catches up faster, and results depend on timing to rounding: 1 is bit for bit
  /// repeatable.
  std::int64_t coalesce_units = 1;
  /// Outputs that wait for their reader: the target pauses beyond it. At least 4.
  std::int64_t output_capacity = 1024;
  /// Target tokens whose delay is kept for AL and LAAL.
  std::int64_t delay_capacity = 65536;
  int source_threads = 1;
  int target_threads = 1;
  /// One team for both sides, in place of one each (source_threads and target_threads are not used
  /// then), and for whoever else holds it: its members help the side that forks first, and the
  /// other when that one waits for source, so that two cores need no more than two threads.
  std::shared_ptr<ThreadTeam> team{};
  /// In which form activations meet quantised and bf16 weights: exact, or rounded and faster.
  Activations activations = Activations::kFloat32;
  /// Whether chunks go through oneDNN, in programs compiled with it; what that rounds and allocates
  /// is said there. The GPU has no use for it.
  OneDnn onednn = OneDnn::kWhereFaster;
  /// Two threads, or everything on the caller's (the sequential loop of the published systems).
  bool concurrent = true;
};

/// What a policy asks of the sides by its optional members (ReadWritePolicy).
struct DuplexNeeds {
  std::int64_t max_provisional = 0;
  MassProbe probe{};   ///< of the target's forwards; newest = 0: none
  bool logits = true;  ///< PolicyState::logits are read

  template <ReadWritePolicy Policy>
  static DuplexNeeds of(const Policy& policy, const DecoderConfig& model) {
    DuplexNeeds needs;
    if constexpr (requires { policy.max_provisional(); })
      needs.max_provisional = policy.max_provisional();
    if constexpr (requires { policy.needs_logits(); }) needs.logits = policy.needs_logits();
    if constexpr (requires { policy.newest_source_tokens(); }) {
      needs.probe.newest = policy.newest_source_tokens();
      needs.probe.group = kSourceGroup;
      std::int64_t layer = -1;
      if constexpr (requires { policy.probe_layer(); }) layer = policy.probe_layer();
      needs.probe.layer = layer < 0 ? model.num_layers() + layer : layer;
    }
    return needs;
  }
};

namespace detail {

/// GroupedLayout counts each group from its origin, as caches do by themselves. Any other layout's
/// answers are stored token by token, and depend on the order of arrival.
template <GroupLayout Layout>
inline constexpr bool kInArrivalOrder = !std::is_same_v<Layout, GroupedLayout>;

template <GroupLayout Layout>
CachePlan plan_duplex_group(const DecoderConfig& model, CacheOptions cache, const Layout& layout,
                            int group) {
  if constexpr (!kInArrivalOrder<Layout>) {
    if (layout.num_groups() <= kTargetGroup)
      throw Error(ErrorCode::kConfig, {"a source and a target", "GroupedLayout", "origins",
                                       "2 groups", std::to_string(layout.num_groups())});
    cache.origin = layout.origin(group);
  }
  return plan_cache(model, cache);
}

}  // namespace detail

/// What the source group retains: room to be read ahead of the target, chunks of a forward.
/// \throws Error(kConfig) as plan_cache(), or for a layout without a target.
template <GroupLayout Layout>
CachePlan plan_duplex_source(const DecoderConfig& model, const DuplexOptions& options,
                             const Layout& layout) {
  CacheOptions cache = options.source;
  cache.lead = std::max(cache.lead, options.max_lead_tokens != 0 ? options.max_lead_tokens
                                                                 : 4 * options.max_unit_tokens);
  if (cache.chunk_size == 0)
    cache.chunk_size = std::min(cache.chunk(), options.max_unit_tokens * options.coalesce_units);
  return detail::plan_duplex_group(model, cache, layout, kSourceGroup);
}

/// What the target group retains: a hypothesis and the token before it can be recovered from a
/// window. \throws as plan_duplex_source().
template <GroupLayout Layout>
CachePlan plan_duplex_target(const DecoderConfig& model, const DuplexOptions& options,
                             std::int64_t max_provisional, const Layout& layout) {
  CacheOptions cache = options.target;
  cache.lead = std::max(cache.lead, max_provisional + 1);
  if (cache.chunk_size == 0)
    cache.chunk_size = static_cast<std::int64_t>(options.target_prefix.size());
  return detail::plan_duplex_group(model, cache, layout, kTargetGroup);
}

namespace detail {

/// \throws Error(kConfig): the prefix is fed at once.
inline void check_prefix_fits(const DuplexOptions& options, std::int64_t max_chunk) {
  if (static_cast<std::int64_t>(options.target_prefix.size()) > max_chunk)
    throw Error(ErrorCode::kConfig,
                {"the prefix is fed in one step", "DuplexOptions", "target_prefix",
                 "at most the target's chunk, " + std::to_string(max_chunk),
                 std::to_string(options.target_prefix.size())});
}

}  // namespace detail

}  // namespace sluice
