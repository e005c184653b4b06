// SPDX-License-Identifier: MIT
/// What a position is, and which of a token's two positions a model is shown. A position belongs to
/// a pair (cached token, reader), never to a slot of the cache.
#pragma once

#include <string_view>

namespace sluice {

/// A rotary position, in tokens. Real, because published systems use halves (group position
/// encoding, frames at 8 per second). A double counts tokens exactly up to 2^53.
using Position = double;

/// A position on three axes (multimodal rotary positions: Qwen2-VL, arXiv 2409.12191): time,
/// height, width. Text has the same value on all of them.
struct Position3 {
  Position t = 0;
  Position h = 0;
  Position w = 0;

  friend constexpr bool operator==(const Position3&, const Position3&) = default;
};

/// The three-axis position of a text token: `position` on every axis.
constexpr Position3 on_all_axes(Position position) {
  return {position, position, position};
}

/// Which positions the tokens of a cache with gaps have when a query reads it.
enum class PositionRule {
  /// Places in the cache: contiguous ranks of the kept tokens, the query's own rank last.
  /// Positions stay below the cache's capacity however long the stream is. StreamingLLM (arXiv
  /// 2309.17453, section 3.2).
  kInCache,
  /// Places in the text: each token's index in the stream; gaps stay where tokens were evicted.
  /// DuoAttention (arXiv 2410.10819), SnapKV, plain windows.
  kInText,
};

/// The rule's name as options and JSON spell it.
constexpr std::string_view to_string(PositionRule rule) {
  switch (rule) {
    case PositionRule::kInCache: return "in-cache";
    case PositionRule::kInText: return "in-text";
  }
  return "unknown";
}

}  // namespace sluice
