// SPDX-License-Identifier: MIT
/// The attention mass of a few keys: a pass of its own for policies that score by it. attend()
/// gives the log-sum-exp of all scores, so the share of a key set is the sum of e^(score - lse)
/// over it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/attention/attend.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/config.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// mass[h] = share of query head h's attention that falls on the newest `newest` stream indices
/// that `group` shows (where fewer of them are kept, on those), for a call of one query row with
/// plain scores and every visible key of that group seen. lse: [num_qo_heads], what attend() wrote;
/// mass: [num_qo_heads], of which query.kv_heads may limit what is read and written. Meant for a
/// handful of keys (EDAtt looks at two to four): plain loops in float32, one rotation of the query
/// a segment and head. rotary may be null. Allocates nothing. Preconditions: one row; head_dim <=
/// kMaxRotaryDim.
template <class Key, class Value>
void attention_mass(const AttentionQuery& query, std::span<const Segment<Key, Value>> segments,
                    float sm_scale, const Rotary* rotary, std::int64_t num_kv_heads,
                    std::span<const float> lse, std::int32_t group, std::int64_t newest,
                    std::span<float> mass) {
  SLUICE_ASSERT(query.rows.tokens == 1 && query.rows.head_dim <= kMaxRotaryDim);
  const std::int64_t dim = query.rows.head_dim;
  const std::int64_t group_size = query.rows.num_heads / num_kv_heads;
  const std::int64_t segment_heads = query.num_segment_heads(num_kv_heads);
  std::int64_t end = 0;  // stream index behind the group's newest visible token
  for (const Segment<Key, Value>& segment : segments)
    if (segment.rule.group == group && segment.rule.visible > 0)
      end = std::max(end, segment.rule.first_index + segment.rule.visible);
  for (std::int64_t j = 0; j < segment_heads; ++j)
    std::fill_n(mass.begin() + query.kv_head(j) * group_size, group_size, 0.0F);
  float angles[kMaxRotaryDim];
  float rotated[kMaxRotaryDim];
  float key[kMaxRotaryDim];
  for (const Segment<Key, Value>& segment : segments) {
    const SegmentRule& rule = segment.rule;
    const std::int64_t first = std::max<std::int64_t>(0, end - newest - rule.first_index);
    if (rule.group != group || first >= rule.visible) continue;
    if (rotary != nullptr) {
      Position3 place =
          query.positions == nullptr ? on_all_axes(query.first_position) : query.positions[0];
      for (Position* axis : {&place.t, &place.h, &place.w}) *axis = rule.reader_position(*axis);
      rotary->angles(place, angles);
    }
    for (std::int64_t row = 0; row < segment_heads * group_size; ++row) {
      const std::int64_t segment_head = row / group_size;
      const std::int64_t head = query.kv_head(segment_head) * group_size + row % group_size;
      const float* q = query.rows.head(0, head);
      if (rotary != nullptr) {
        rotary->rotate(angles, q, rotated);
        q = rotated;
      }
      for (std::int64_t j = first; j < rule.visible; ++j) {
        const Key* stored = segment.key(segment_head, j);
        const float* const key_angles =
            segment.key_rotation == nullptr
                ? nullptr
                : segment.key_rotation + j * segment.key_rotation_stride;
        if constexpr (QuantisedElement<Key>) {
          KvRow<Key>::dequantise(stored, segment.key_scale(segment_head, j), dim, key);
          if (key_angles != nullptr) rotary->rotate(key_angles, key, key);
        } else if (key_angles != nullptr) {
          rotary->rotate(key_angles, stored, key);
        } else {
          for (std::int64_t d = 0; d < dim; ++d) key[d] = static_cast<float>(stored[d]);
        }
        float score = 0;
        for (std::int64_t d = 0; d < dim; ++d) score += q[d] * key[d];
        mass[static_cast<std::size_t>(head)] +=
            std::exp(score * sm_scale - lse[static_cast<std::size_t>(head)]);
      }
    }
  }
}

}  // namespace sluice
