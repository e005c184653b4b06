// SPDX-License-Identifier: MIT
/// The one structure of the library: a segment is a run of cached tokens that one reader sees under
/// one rule. Caches produce short lists of segments, attention consumes them, and nothing else
/// passes between the two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#include "sluice/cache/kv_element.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// What a cached token is, for retention per kind and for visibility functors.
enum class TokenKind : std::uint8_t { kText, kVision, kAudio, kPinned };
inline constexpr std::size_t kNumTokenKinds = 4;

constexpr std::string_view to_string(TokenKind kind) {
  switch (kind) {
    case TokenKind::kText: return "text";
    case TokenKind::kVision: return "vision";
    case TokenKind::kAudio: return "audio";
    case TokenKind::kPinned: return "pinned";
  }
  return "unknown";
}

/// How a cache stores keys: rotated once with the position that they were written with, or raw and
/// rotated while they are read. Repeated rotation of rounded keys exists in neither form.
enum class KeyForm : std::uint8_t { kRotated, kRaw };

constexpr std::string_view to_string(KeyForm form) {
  return form == KeyForm::kRotated ? "rotated" : "raw";
}

inline constexpr Position kNoCeiling = std::numeric_limits<Position>::infinity();

/// The rule of a segment, without its storage; all layers that share a retention share these.
///
/// Entry i has stream index `first_index + i` and, in the segment's own numbering, the position
/// `first_position + i`. A reader whose position is p stands, in that numbering, at
/// `min(p + shift, ceiling)`: rotary scores and ALiBi depend on differences only, so one rotation
/// of the query places the whole segment, and a constant ceiling places it for every query of a
/// chunk at once (attention sinks of a full window stay at one distance from every later query).
struct SegmentRule {
  std::int64_t first_index = 0;   ///< stream index of entry 0, in tokens
  std::int64_t count = 0;         ///< entries
  std::int64_t visible = 0;       ///< the reader sees the first `visible` entries, <= count
  Position first_position = 0;    ///< position of entry 0, in tokens
  Position shift = 0;             ///< added to the reader's position
  Position ceiling = kNoCeiling;  ///< then clamped from above
  std::int64_t first_slot = 0;    ///< where entry 0 is stored; entries follow each other
  TokenKind kind = TokenKind::kText;
  std::int32_t group = 0;  ///< which group (source, target, a writer) the run belongs to

  /// Where a reader at `position` stands in this segment's numbering.
  constexpr Position reader_position(Position position) const {
    const Position shifted = position + shift;
    return shifted < ceiling ? shifted : ceiling;
  }
};

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
