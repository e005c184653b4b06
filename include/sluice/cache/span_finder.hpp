// SPDX-License-Identifier: MIT
/// Finds the labelled spans of a chat by its token ids: turns of a role, vision blocks, and the
/// part of a text block that sinks and window leave out (StreamingVLM, arXiv 2510.09608; its
/// utils/get_qwen_range.py finds them the same way). For programs that keep a list of ids beside a
/// cache, and for checking such lists; KindRetention is told and needs no scan.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "sluice/core/token.hpp"

namespace sluice {

/// A half-open range of a list of tokens.
struct TokenRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  std::int64_t size() const { return end - begin; }
  friend constexpr bool operator==(const TokenRange&, const TokenRange&) = default;
};

/// The ids that mark spans: <|im_start|>, <|im_end|>, the line feed, <|vision_start|>,
/// <|vision_end|>.
struct SpanMarkers {
  Token turn_begin = 0;
  Token turn_end = 0;
  Token line_feed = 0;
  Token vision_begin = 0;
  Token vision_end = 0;
};

/// The nth turn of a role, markers included: turn_begin, the role's ids, ..., turn_end, and the
/// line feed behind it if there is one and with_line_feed. nth < 0 counts from the last (-1). A
/// turn that has not ended reaches to the end of the list. Allocates nothing.
inline std::optional<TokenRange> find_turn(std::span<const Token> tokens,
                                           const SpanMarkers& markers, std::span<const Token> role,
                                           std::int64_t nth, bool with_line_feed = true) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  const auto at = [&](std::int64_t i) {
    return tokens[static_cast<std::size_t>(i)];
  };
  const auto begins_here = [&](std::int64_t i) {
    if (at(i) != markers.turn_begin) return false;
    for (const Token id : role)
      if (++i >= count || at(i) != id) return false;
    return true;
  };
  const std::int64_t step = nth < 0 ? -1 : 1;
  std::int64_t left = nth < 0 ? -1 - nth : nth;
  for (std::int64_t i = nth < 0 ? count - 1 : 0; i >= 0 && i < count; i += step) {
    if (!begins_here(i) || left-- > 0) continue;
    std::int64_t end = i + 1;
    while (end < count && at(end) != markers.turn_end) ++end;
    if (end < count) ++end;
    if (with_line_feed && end < count && at(end) == markers.line_feed) ++end;
    return TokenRange{i, end};
  }
  return std::nullopt;
}

/// The nth vision block, vision_begin and vision_end included. nth < 0 counts from the last. A
/// block that has not ended reaches to the end of the list.
inline std::optional<TokenRange> find_vision(std::span<const Token> tokens,
                                             const SpanMarkers& markers, std::int64_t nth) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  const auto at = [&](std::int64_t i) {
    return tokens[static_cast<std::size_t>(i)];
  };
  const std::int64_t step = nth < 0 ? -1 : 1;
  std::int64_t left = nth < 0 ? -1 - nth : nth;
  for (std::int64_t i = nth < 0 ? count - 1 : 0; i >= 0 && i < count; i += step) {
    if (at(i) != markers.vision_begin || left-- > 0) continue;
    std::int64_t end = i + 1;
    while (end < count && at(end) != markers.vision_end) ++end;
    return TokenRange{i, std::min(end + 1, count)};
  }
  return std::nullopt;
}

/// What counts as the last texts of a block when its middle is cut.
enum class TextCut : std::uint8_t {
  /// Structure tokens are no texts and never leave: KindRetention's rule.
  kProtected,
  /// As released: the window is counted from the block's end, its line feed included, so one text
  /// fewer stays, and a window of 0 takes the end token too.
  kReleased,
};

/// The middle of a text block that leaves: what lies between its first `sinks` and its last
/// `window` texts. block: of find_turn(), line feed included if there is one; head: its structure
/// tokens in front (4: turn_begin, "previous", "text", line feed); tail: those behind (end token,
/// line feed). Empty where nothing leaves.
inline TokenRange find_text_cut(TokenRange block, std::int64_t head, std::int64_t tail,
                                std::int64_t sinks, std::int64_t window, TextCut rule) {
  const std::int64_t begin = block.begin + head + sinks;
  const std::int64_t end =
      rule == TextCut::kReleased ? block.end - 1 - window : block.end - tail - window;
  return {begin, std::max(begin, end)};
}

}  // namespace sluice
