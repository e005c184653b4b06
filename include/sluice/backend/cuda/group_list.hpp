// SPDX-License-Identifier: MIT
/// Which runs of a group's slots a step sees, from counters alone: what Retention::snapshot_rules
/// and Retention::rules say for rotated keys, one run at a time and in constant time, so that the
/// threads of a warp form a list side by side. Plain arithmetic, the same for nvcc and the host's
/// compiler, which checks it against Retention.
#pragma once

#include <cstdint>
#include <limits>

#include "sluice/cache/segment_rule.hpp"
#include "sluice/position/position.hpp"

#if defined(__CUDACC__)
#define SLUICE_HOST_DEVICE __host__ __device__
#else
#define SLUICE_HOST_DEVICE
#endif

namespace sluice {

/// What a group keeps, and where: members of RetentionConfig (kPerQuery, KeyForm::kRotated).
struct GroupExtents {
  static constexpr std::int64_t kUnlimitedWindow = std::numeric_limits<std::int64_t>::max() / 4;

  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = 0;
  std::int64_t capacity = 0;
  PositionRule position_rule = PositionRule::kInCache;
  Position origin = 0;

  SLUICE_HOST_DEVICE bool is_limited() const { return window_size < kUnlimitedWindow; }
  /// Tokens that one query sees at most.
  SLUICE_HOST_DEVICE std::int64_t most_seen() const {
    return is_limited() ? num_sink_tokens + window_size : capacity;
  }
  /// Where the group's own queries stand at most when they read sinks and other groups:
  /// Retention::reader_place().
  SLUICE_HOST_DEVICE Position ceiling() const {
    return is_limited() && position_rule == PositionRule::kInCache
               ? origin + static_cast<Position>(num_sink_tokens + window_size - 1)
               : kNoCeiling;
  }
};

namespace detail {

/// The sinks, and the ring in two.
inline constexpr int kGroupRuns = 3;

/// Run `which` of what another group's reader sees of the first `snapshot` tokens; count 0: there
/// is no such run. The reader stands at min(p + shift, ceiling) in this group's ranks.
SLUICE_HOST_DEVICE inline SegmentRule snapshot_run(const GroupExtents& group, std::int64_t snapshot,
                                                   Position shift, Position ceiling, int which) {
  const std::int64_t sinks = group.num_sink_tokens;
  SegmentRule run;
  if (which == 0) {
    run.count = snapshot < sinks ? snapshot : sinks;
    run.kind = TokenKind::kPinned;
  } else {
    const std::int64_t windowed = group.is_limited() ? snapshot - group.window_size : 0;
    const std::int64_t oldest = windowed > sinks ? windowed : sinks;
    const std::int64_t slot = sinks + (oldest - sinks) % (group.capacity - sinks);
    const std::int64_t kept = snapshot > oldest ? snapshot - oldest : 0;
    const std::int64_t to_end = group.capacity - slot;
    const std::int64_t first = kept < to_end ? kept : to_end;
    run.first_index = which == 1 ? oldest : oldest + first;
    run.count = which == 1 ? first : kept - first;
    run.first_slot = which == 1 ? slot : sinks;
    // Ranks are places in the text less what was evicted before the snapshot.
    if (group.position_rule == PositionRule::kInCache) {
      shift += static_cast<Position>(oldest - sinks);
      ceiling += static_cast<Position>(oldest - sinks);
    }
  }
  run.visible = run.count;
  run.first_position = group.origin + static_cast<Position>(run.first_index);
  run.shift = shift;
  run.ceiling = ceiling;
  return run;
}

/// Run `which` of what the group's own token `index` sees, itself included.
SLUICE_HOST_DEVICE inline SegmentRule own_run(const GroupExtents& group, std::int64_t index,
                                              int which) {
  SegmentRule run = snapshot_run(group, index + 1, 0, group.ceiling(), which);
  if (which > 0) {
    run.shift = 0;
    run.ceiling = kNoCeiling;
  }
  return run;
}

}  // namespace detail

}  // namespace sluice
