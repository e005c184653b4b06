// SPDX-License-Identifier: MIT
/// What a reader sees of a run of cached tokens, without the storage: the part of a segment that
/// bookkeeping is about. Includes nothing that nvcc must not see, so that the CUDA backend keeps
/// the same books as the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

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

/// Says whether tokens fit.
enum class CacheStatus : std::uint8_t { kOk, kFull };

}  // namespace sluice
