// SPDX-License-Identifier: MIT
/// What attend() is asked: query rows, and the extents that its scratch is made for.
#pragma once

#include <cstdint>
#include <span>

#include "sluice/core/backend.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Query rows of one call. query: [T, num_qo_heads, head_dim], not rotated. Row t belongs to the
/// token with stream index first_index + t, which stands at positions[t], or at first_position + t
/// where positions is null. Segments shift and clamp all three axes alike; ALiBi and visibility
/// functors are given the time axis.
struct AttentionQuery {
  HeadsView<const float> rows;
  std::int64_t first_index = 0;
  Position first_position = 0;
  const Position3* positions = nullptr;  ///< [T] or null
  /// The KV heads whose keys and values the segments hold, in the order of the segments' head axis:
  /// entry j of that axis is read by query heads kv_heads[j] * group to kv_heads[j] * group +
  /// group - 1, and the rows of no other query head are read or written. Empty: all KV heads in
  /// order. So the heads of one layer may keep different tokens, with one call for each class of
  /// heads that keep the same. Distinct, each in [0, num_kv_heads).
  std::span<const std::int32_t> kv_heads{};

  /// Where row t stands, on the time axis.
  Position position(std::int64_t t) const {
    return positions == nullptr ? first_position + static_cast<Position>(t) : positions[t].t;
  }

  /// Heads on the segments' head axis, of a layer with num_kv_heads.
  std::int64_t num_segment_heads(std::int64_t num_kv_heads) const {
    return kv_heads.empty() ? num_kv_heads : static_cast<std::int64_t>(kv_heads.size());
  }
  /// The layer's KV head that entry j of the segments' head axis is.
  std::int64_t kv_head(std::int64_t j) const {
    return kv_heads.empty() ? j : kv_heads[static_cast<std::size_t>(j)];
  }
};

/// Extents that a workspace is made for.
struct AttentionShape {
  std::int64_t num_qo_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;     ///< channels of queries and keys
  std::int64_t value_dim = 0;    ///< channels of values and outputs
  std::int64_t max_queries = 1;  ///< rows of one call, T
  std::int64_t max_keys = 1;     ///< entries of all segments of one call together
  int max_segments = 16;         ///< segments of one call
  /// Distinct shifts and ceilings of one call's segments, where they are fewer than the segments;
  /// each costs max_queries rotations.
  int max_places = 128;
};

/// Scratch of attend() and the rotations of its queries, allocated at construction. Layers that
/// share a Rotary should share a workspace: rotations of a step are then formed once. One call at a
/// time.
template <Backend Tag>
class AttentionWorkspace;

}  // namespace sluice
