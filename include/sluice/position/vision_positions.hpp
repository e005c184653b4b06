// SPDX-License-Identifier: MIT
/// Three-axis positions of text and vision blocks in one sequence (multimodal rotary positions:
/// Qwen2-VL, arXiv 2409.12191, section 2.1), with the real-valued time steps of streaming video.
///
/// Writing on is what the StreamingVLM code calls "append": fill the new spans from where the last
/// call ended. Its default "shrink" (arXiv 2510.09608, contiguous positions) is filling the list of
/// kept spans again, from 0, after each eviction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <variant>

#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Consecutive text tokens. Each has one position on all three axes, one more than the one before.
struct TextRun {
  std::int64_t tokens = 0;

  std::int64_t num_tokens() const { return tokens; }
  /// What a unit adds to the position of the token after it, in position units.
  Position extent() const { return static_cast<Position>(tokens); }
};

/// What becomes of a frame's offset on the time axis.
enum class TimeRounding {
  kNone,   ///< real offsets: StreamingVLM
  kFloor,  ///< whole offsets: Think-as-You-See (arXiv 2603.02872), Qwen2.5-VL offline
};

/// A vision block: frames x rows x cols tokens, row by row, frame by frame. A frame is a temporal
/// grid (Qwen2.5-VL makes one of 2 video frames); rows and cols count after spatial merging.
struct VisionGrid {
  std::int64_t frames = 1;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  /// Position units on the time axis from one frame to the next; time_step() computes it.
  Position frame_step = 1;
  TimeRounding rounding = TimeRounding::kNone;

  /// Tokens of the block; 0 if any of its sides is.
  std::int64_t num_tokens() const { return frames * rows * cols; }
  /// Position units on the time axis from the block's first frame to frame `frame`: frame *
  /// frame_step, rounded as asked. The offset is rounded, not the position, so a block that starts
  /// on a half keeps it. Formed in double; the released codes multiply in float32, whose floor can
  /// differ where the product is within rounding of a whole number.
  Position time_offset(std::int64_t frame) const {
    const Position offset = static_cast<Position>(frame) * frame_step;
    return rounding == TimeRounding::kFloor ? std::floor(offset) : offset;
  }
  /// What the block adds to the position of the token after it, in position units: 1 + the largest
  /// offset on any axis; 0 for a block without tokens. So many units GroupLayout::place() is asked
  /// for.
  Position extent() const {
    if (num_tokens() == 0) return 0;
    return 1 + std::max(time_offset(frames - 1), static_cast<Position>(std::max(rows, cols) - 1));
  }
};

/// The frame_step of Qwen2.5-VL: seconds from one temporal grid to the next, times the positions
/// that a second has on the time axis (the model's tokens_per_second, 2). A temporal grid of 2
/// frames at 8 frames a second is 0.25 s: half a position.
constexpr Position time_step(double seconds_per_grid, double tokens_per_second = 2) {
  return seconds_per_grid * tokens_per_second;
}

/// A part of a sequence whose tokens get positions by one rule.
using SequenceSpan = std::variant<TextRun, VisionGrid>;

/// Tokens of all spans.
inline std::int64_t count_tokens(std::span<const SequenceSpan> spans) {
  std::int64_t total = 0;
  for (const SequenceSpan& span : spans)
    total += std::visit([](const auto& part) { return part.num_tokens(); }, span);
  return total;
}

/// What all spans together add to the position of the token after them, in position units.
inline Position position_extent(std::span<const SequenceSpan> spans) {
  Position total = 0;
  for (const SequenceSpan& span : spans)
    total += std::visit([](const auto& part) { return part.extent(); }, span);
  return total;
}

namespace detail {

inline void check_vision_option(bool sound, const char* where, const char* field, double found) {
  if (!sound)
    throw Error(ErrorCode::kConfig,
                {"option out of range", where, field, "finite, at least 0", std::to_string(found)});
}

inline void check_span(const TextRun& text) {
  check_vision_option(text.tokens >= 0, "TextRun", "tokens", static_cast<double>(text.tokens));
}
inline void check_span(const VisionGrid& grid) {
  for (const auto& [field, side] : {std::pair{"frames", grid.frames}, std::pair{"rows", grid.rows},
                                    std::pair{"cols", grid.cols}})
    check_vision_option(side >= 0, "VisionGrid", field, static_cast<double>(side));
  check_vision_option(std::isfinite(grid.frame_step) && grid.frame_step >= 0, "VisionGrid",
                      "frame_step", grid.frame_step);
}

inline void check_position_count(std::int64_t tokens, std::size_t positions) {
  if (positions != static_cast<std::size_t>(tokens))
    throw Error(ErrorCode::kShape, {"one position for each token", "fill_positions", "positions",
                                    std::to_string(tokens), std::to_string(positions)});
}

inline void write_positions(const TextRun& text, Position base, Position3* positions) {
  for (std::int64_t i = 0; i < text.tokens; ++i)
    positions[i] = on_all_axes(base + static_cast<Position>(i));
}
inline void write_positions(const VisionGrid& grid, Position base, Position3* positions) {
  for (std::int64_t frame = 0; frame < grid.frames; ++frame)
    for (std::int64_t row = 0; row < grid.rows; ++row)
      for (std::int64_t col = 0; col < grid.cols; ++col)
        *positions++ = {base + grid.time_offset(frame), base + static_cast<Position>(row),
                        base + static_cast<Position>(col)};
}

}  // namespace detail

/// The positions of a list of spans, the first starting at `base` and each where the one before it
/// ends, and the position of the token after them: base + position_extent(spans). A vision token
/// has t = base + time_offset(frame), h = base + row, w = base + col, with the base of its own
/// block; text after a block starts at 1 + the block's largest position on any axis. After half
/// steps of time text has halves too (arXiv 2510.09608's code does not round). positions:
/// [count_tokens(spans)], overwritten, nothing if an error is thrown. Allocates nothing but an
/// error.
///
/// An answer that counts for itself on all three axes (Think-as-You-See restarts the assistant's
/// turn at 0) is a call of its own, with the base that its group's layout gives.
/// \throws Error kShape if positions.size() is another; kConfig, naming the field, for a negative
/// count or a frame_step that is negative or not finite.
inline Position fill_positions(std::span<const SequenceSpan> spans, Position base,
                               std::span<Position3> positions) {
  for (const SequenceSpan& span : spans)
    std::visit([](const auto& part) { detail::check_span(part); }, span);
  detail::check_position_count(count_tokens(spans), positions.size());
  Position3* next = positions.data();
  for (const SequenceSpan& span : spans) {
    std::visit(
        [&](const auto& part) {
          detail::write_positions(part, base, next);
          next += part.num_tokens();
          base += part.extent();
        },
        span);
  }
  return base;
}
/// The same for one span: a block that arrives alone.
inline Position fill_positions(const SequenceSpan& span, Position base,
                               std::span<Position3> positions) {
  return fill_positions(std::span(&span, 1), base, positions);
}

}  // namespace sluice
