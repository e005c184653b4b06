// SPDX-License-Identifier: MIT
/// The one structure of the library: a segment is a run of cached tokens that one reader sees under
/// one rule. Caches produce short lists of segments, attention consumes them, and nothing else
/// passes between the two.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sluice/cache/kv_element.hpp"
#include "sluice/cache/segment_rule.hpp"

namespace sluice {

/// A rule with its storage in one layer. keys: [num_kv_heads, count, head_dim], values:
/// [num_kv_heads, count, value_dim]; strides are in elements, channels are consecutive. V may alias
/// the first channels of K. Of quantised rows (cache/kv_element.hpp) an element may hold two
/// channels, and key_scales: [num_kv_heads, count, scales of a row], value_scales likewise; strides
/// in scales, those of a row are consecutive.
template <class Key, class Value = Key>
struct Segment {
  using KeyScale = typename KvRow<Key>::Scale;
  using ValueScale = typename KvRow<Value>::Scale;

  SegmentRule rule;
  const Key* keys = nullptr;
  const Value* values = nullptr;
  std::int64_t key_head_stride = 0;
  std::int64_t key_token_stride = 0;
  std::int64_t value_head_stride = 0;
  std::int64_t value_token_stride = 0;
  /// Null: keys are stored rotated. Otherwise one row of cosines and sines per entry, as
  /// Rotary::angles writes them, with which raw keys are rotated while they are read.
  const float* key_rotation = nullptr;
  std::int64_t key_rotation_stride = 0;
  const KeyScale* key_scales = nullptr;      ///< null: not quantised
  const ValueScale* value_scales = nullptr;  ///< null: not quantised
  std::int64_t key_scale_head_stride = 0;
  std::int64_t key_scale_token_stride = 0;
  std::int64_t value_scale_head_stride = 0;
  std::int64_t value_scale_token_stride = 0;
  std::int64_t key_first = 0;  ///< of keys in groups of tokens (KiviElement)

  const Key* key(std::int64_t head, std::int64_t entry) const {
    return keys + head * key_head_stride + entry * key_token_stride;
  }
  const Value* value(std::int64_t head, std::int64_t entry) const {
    return values + head * value_head_stride + entry * value_token_stride;
  }
  /// Their scales, for quantised rows.
  const KeyScale* key_scale(std::int64_t head, std::int64_t entry) const {
    if constexpr (!QuantisedElement<Key>) return nullptr;
    return key_scales + head * key_scale_head_stride + entry * key_scale_token_stride;
  }
  const ValueScale* value_scale(std::int64_t head, std::int64_t entry) const {
    if constexpr (!QuantisedElement<Value>) return nullptr;
    return value_scales + head * value_scale_head_stride + entry * value_scale_token_stride;
  }
};

}  // namespace sluice
