// SPDX-License-Identifier: MIT
/// Who gets which position when tokens arrive in several groups: a source that is still being read
/// and a target that is already being written. A cache stores what a layout answers; readers need
/// nothing but the positions.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <string>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Groups that a layout can tell apart. Fixed, so that layouts are plain values.
inline constexpr int kMaxGroups = 16;

/// The group of what is read: prompt and instruction, words, sentences, audio, frames.
inline constexpr int kSourceGroup = 0;
/// The group of what is written: the assistant prefix and the generated tokens.
inline constexpr int kTargetGroup = 1;

/// Assigns positions in order of arrival. A unit is whatever is placed in one call: a token, a
/// word, a frame. Extents are in position units: one a token of text, what VisionGrid::extent()
/// says for a frame, halves included.
///
/// - `place(group, extent)`: the position of the first token of a unit that arrives in `group`
///   now; advances. A unit of extent 0 (an empty segment) changes nothing.
/// - `retract(group, extent)`: takes back the newest `extent` position units of `group`, so that a
///   token whose keys were dropped is fed again where it stood. Where another group's later unit
///   was placed in relation to them they stay behind as a gap: no unit ever moves, and within a
///   group no position is given out twice unless it was taken back in between.
/// - `next(group)`: where the group's next unit would start.
/// - `reset()`: back to the state after construction.
///
/// From unit to unit a group's positions increase strictly. They are exact while origins and
/// extents are whole numbers or binary fractions (halves, quarters), as those of all published
/// systems but frame steps such as 2/15. The layouts of this header are trivially copyable values:
/// a copy is a checkpoint. They allocate nothing after construction, assert their preconditions in
/// debug builds (0 <= group < num_groups(), extent >= 0) and want one thread at a time.
template <class T>
concept GroupLayout = requires(T layout, const T& placed, int group, Position extent) {
  { layout.place(group, extent) } -> std::same_as<Position>;
  { layout.retract(group, extent) } -> std::same_as<void>;
  { placed.next(group) } -> std::same_as<Position>;
  { layout.reset() } -> std::same_as<void>;
};

namespace detail {

inline void check_layout_option(bool sound, const char* where, const char* field,
                                const char* expected, double found) {
  if (!sound)
    throw Error(ErrorCode::kConfig,
                {"option out of range", where, field, expected, std::to_string(found)});
}

}  // namespace detail

/// Each group counts for itself, from an origin of its own; groups may share positions. This is
/// group position encoding (GPE, arXiv 2505.16983), and with it the layout of StreamingThinker
/// (arXiv 2510.17238) and Think-as-You-See (arXiv 2603.02872), which both start either group at 0.
class GroupedLayout {
 public:
  /// Group g counts from origins[g]. origins: [num_groups], in tokens.
  /// \throws Error kConfig for no group, more than kMaxGroups, or an origin that is not finite.
  explicit GroupedLayout(std::span<const Position> origins)
      : num_groups_(static_cast<int>(std::min<std::size_t>(origins.size(), kMaxGroups))) {
    detail::check_layout_option(!origins.empty() && origins.size() <= kMaxGroups, "GroupedLayout",
                                "origins", "1 to kMaxGroups groups",
                                static_cast<double>(origins.size()));
    for (const Position origin : origins)
      detail::check_layout_option(std::isfinite(origin), "GroupedLayout", "origins",
                                  "a finite position", origin);
    std::copy(origins.begin(), origins.end(), origins_.begin());
    reset();
  }

  /// GPE: the source counts from 0, the target from `target_offset` (the paper's phi; it studies 0,
  /// 0.5 and 128 to 2048). The prompt is part of the source and the assistant prefix part of the
  /// target, so with offset 0 the two overlap. \throws Error kConfig if it is not finite.
  static GroupedLayout group_positions(Position target_offset = 0) {
    detail::check_layout_option(std::isfinite(target_offset), "GroupedLayout::group_positions",
                                "target_offset", "a finite position", target_offset);
    return GroupedLayout(std::array<Position, 2>{0, target_offset});
  }

  /// Group-decoupled positions (GDPE, Speak While Watching, arXiv 2601.06843): frames continue the
  /// prompt's counter, text counts from zero. The same as GPE with offset 0.
  static GroupedLayout group_decoupled() { return group_positions(0); }

  /// Gap-isolated positions (GIPE, arXiv 2601.06843): as group_decoupled(), but the text starts at
  /// delta + 1. The paper does not state delta; its released training data starts text at 10000,
  /// which is a delta of 9999. \throws Error kConfig if delta is negative or not finite.
  static GroupedLayout gap_isolated(Position delta) {
    detail::check_layout_option(std::isfinite(delta) && delta >= 0, "GroupedLayout::gap_isolated",
                                "delta", "a finite position, at least 0", delta);
    return group_positions(delta + 1);
  }

  int num_groups() const { return num_groups_; }
  /// Where the group's first unit starts.
  Position origin(int group) const { return origins_[index(group)]; }

  Position place(int group, Position extent) {
    SLUICE_ASSERT(extent >= 0);
    Position& next = next_[index(group)];
    const Position first = next;
    next += extent;
    return first;
  }
  /// At most what the group has placed.
  void retract(int group, Position extent) {
    SLUICE_ASSERT(extent >= 0 && extent <= next(group) - origin(group));
    next_[index(group)] -= extent;
  }
  Position next(int group) const { return next_[index(group)]; }
  void reset() { next_ = origins_; }

 private:
  std::size_t index(int group) const {
    SLUICE_ASSERT(group >= 0 && group < num_groups_);
    return static_cast<std::size_t>(group);
  }

  int num_groups_;
  std::array<Position, kMaxGroups> origins_{};  // [kMaxGroups], the first num_groups_ in use
  std::array<Position, kMaxGroups> next_{};     // [kMaxGroups], likewise
};

/// The layout of a batch model: the target begins where the whole source ends, whether or not the
/// source has arrived by then. Two groups.
class BatchLayout {
 public:
  /// `source_extent`: position units of the whole source, prompt included. More than that must not
  /// be placed in the source. \throws Error kConfig if it is negative or not finite.
  explicit BatchLayout(Position source_extent)
      : groups_(GroupedLayout::group_positions(checked(source_extent))) {}

  int num_groups() const { return groups_.num_groups(); }
  Position place(int group, Position extent) {
    const Position first = groups_.place(group, extent);
    SLUICE_ASSERT(group != kSourceGroup || next(kSourceGroup) <= groups_.origin(kTargetGroup));
    return first;
  }
  /// At most what the group has placed.
  void retract(int group, Position extent) { groups_.retract(group, extent); }
  Position next(int group) const { return groups_.next(group); }
  void reset() { groups_.reset(); }

 private:
  static Position checked(Position source_extent) {
    detail::check_layout_option(std::isfinite(source_extent) && source_extent >= 0, "BatchLayout",
                                "source_extent", "a finite extent, at least 0", source_extent);
    return source_extent;
  }

  GroupedLayout groups_;
};

/// One counter for all groups, in order of arrival: interleaved streaming, and any model that knows
/// nothing of groups. kMaxGroups groups.
class InterleavedLayout {
 public:
  static constexpr int num_groups() { return kMaxGroups; }
  Position place(int group, Position extent) {
    SLUICE_ASSERT(group >= 0 && group < num_groups() && extent >= 0);
    const Position first = next_;
    if (extent == 0) return first;
    if (group != newest_group_) {
      newest_group_ = group;
      newest_extent_ = 0;
    }
    newest_extent_ += extent;
    next_ += extent;
    return first;
  }
  /// Reaches back to the last unit of another group, taken back or not: only the newest run of
  /// units of one group is remembered. What lies before it stays behind as a gap.
  void retract(int group, Position extent) {
    SLUICE_ASSERT(group >= 0 && group < num_groups() && extent >= 0);
    if (group != newest_group_) return;
    const Position taken = std::min(extent, newest_extent_);
    newest_extent_ -= taken;
    next_ -= taken;
  }
  Position next(int group) const {
    SLUICE_ASSERT(group >= 0 && group < num_groups());
    static_cast<void>(group);  // one counter for all
    return next_;
  }
  void reset() { *this = InterleavedLayout(); }

 private:
  Position next_ = 0;
  int newest_group_ = kSourceGroup;  // of the newest run of units
  Position newest_extent_ = 0;       // of that run
};

/// Overlapped positions (OSPE, Speak While Watching, arXiv 2601.06843): the text written for frame
/// i and the frame i + 1 that arrives meanwhile share positions. Two groups: frames, with the
/// prompt before them, and text. With E_i the last position of round i, the text of round i and
/// frame i + 1 both start at E_i + 1, and E_{i+1} = E_i + max(m_{i+1}, k_i), where m_{i+1} is the
/// frame's extent and k_i that of the round's text.
///
/// In a stream: a round takes any number of text units, one by one, and is closed by the one source
/// unit that is placed in it. Text placed before that is this round's, text placed after it is the
/// next one's and starts behind both. So place(kSourceGroup, m) means "frame i + 1 is complete":
/// it is the synchronisation that the design needs, for k_i must be final before frame i + 2 has a
/// position. Until then next(kSourceGroup) does not move, so that a frame can be encoded and
/// prefilled at that position while text goes on. A frame placed in pieces is as many rounds: the
/// same positions if no text is written between them, but torn apart by text that is. The prompt is
/// such a source unit too. Without text, frames follow each other, and text after the last frame
/// continues one round without end.
///
/// Deviation: the paper displays E_{i+1} + k_i inside the maximum; its text and its figure need
/// E_i + k_i, which this computes.
class OverlappedLayout {
 public:
  static constexpr int num_groups() { return 2; }
  Position place(int group, Position extent) {
    SLUICE_ASSERT(extent >= 0);
    const Position first = next(group);
    if (extent == 0) return first;
    if (group == kTargetGroup) {
      round_.text += extent;
    } else {
      closed_ = round_;
      closing_extent_ = extent;
      open_next_round();
    }
    return first;
  }
  /// Text: reaches back to the beginning of the open round; text of a closed round stays behind as
  /// a gap, for frames stand after it. Source: the newest unit or a part of it, and only while no
  /// text of the next round stands after it; taking all of it back opens its round again.
  void retract(int group, Position extent) {
    SLUICE_ASSERT(is_group(group) && extent >= 0);
    if (group == kTargetGroup) {
      round_.text -= std::min(extent, round_.text);
      return;
    }
    if (closing_extent_ == 0 || round_.text > 0) return;
    closing_extent_ -= std::min(extent, closing_extent_);
    if (closing_extent_ == 0)
      round_ = closed_;
    else
      open_next_round();
  }
  Position next(int group) const {
    SLUICE_ASSERT(is_group(group));
    return group == kTargetGroup ? round_.first + round_.text : round_.first;
  }
  void reset() { *this = OverlappedLayout(); }

 private:
  struct Round {
    Position first = 0;  // E_i + 1
    Position text = 0;   // k_i so far
  };

  static constexpr bool is_group(int group) {
    return group == kSourceGroup || group == kTargetGroup;
  }
  void open_next_round() { round_ = {closed_.first + std::max(closing_extent_, closed_.text), 0}; }

  Round round_;                  // the open one
  Round closed_;                 // the one before it
  Position closing_extent_ = 0;  // of the source unit that closed it; 0: cannot be taken back
};

static_assert(GroupLayout<GroupedLayout> && GroupLayout<BatchLayout> &&
              GroupLayout<InterleavedLayout> && GroupLayout<OverlappedLayout>);

}  // namespace sluice
