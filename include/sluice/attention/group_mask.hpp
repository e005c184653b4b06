// SPDX-License-Identifier: MIT
/// Who sees whom when source and target stand in one sequence, source first: prefill, scoring and
/// training masks of the methods that read while they write. A target row sees a prefix of the
/// source, so a mask is one length per target row, never a matrix.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>

#include "sluice/attention/variant.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// Visibility of a sequence [source tokens | target tokens]. Source rows see the source causally
/// and no target; target row t sees the first `prefix[t]` source tokens and the target causally.
/// Either group may have sinks and a window of its own; the source's window ends, for a target row,
/// at its prefix. Indices are those of the sequence. Holds a view: `prefix` must outlive it.
class GroupPrefixMask {
 public:
  /// prefix: [target tokens], each 0 .. source_tokens, never falling.
  /// \throws Error(kShape) naming the row that breaks this.
  GroupPrefixMask(std::int64_t source_tokens, std::span<const std::int64_t> prefix,
                  CausalWindow source = {}, CausalWindow target = {})
      : source_tokens_(source_tokens), prefix_(prefix), source_(source), target_(target) {
    std::int64_t least = 0;
    for (std::size_t row = 0; row < prefix.size(); ++row) {
      if (prefix[row] < least || prefix[row] > source_tokens)
        throw Error(ErrorCode::kShape,
                    {"visible prefixes must not fall", "GroupPrefixMask",
                     "prefix[" + std::to_string(row) + "]",
                     std::to_string(least) + " to " + std::to_string(source_tokens),
                     std::to_string(prefix[row])});
      least = prefix[row];
    }
  }

  bool visible(QueryInfo query, KeyInfo key) const {
    const bool source_key = key.index < source_tokens_;
    if (query.index < source_tokens_) return source_key && source_.visible(query, key);
    if (!source_key)
      return target_.visible(in_target(query.index),
                             {key.index - source_tokens_, key.kind, key.group});
    // The last source token that the row sees saw the same window.
    return source_.visible({prefix_of(query.index) - 1, 0}, key);
  }

  TileVisibility classify(std::int64_t query_first, std::int64_t query_last, KeyInfo key_first,
                          std::int64_t key_last) const {
    // At most four rectangles of (source, target) x (source, target); they must agree.
    Agreement tile;
    const auto key_at = [&](std::int64_t index) {
      return KeyInfo{index, key_first.kind, key_first.group};
    };
    const std::int64_t source_key_last = std::min(key_last, source_tokens_ - 1);
    const std::int64_t target_key_first = std::max(key_first.index, source_tokens_);
    if (query_first < source_tokens_) {
      const std::int64_t last = std::min(query_last, source_tokens_ - 1);
      if (key_first.index < source_tokens_)
        tile.add(source_.classify(query_first, last, key_first, source_key_last));
      if (key_last >= source_tokens_) tile.add(TileVisibility::kNone);
    }
    if (query_last >= source_tokens_) {
      const std::int64_t first = std::max(query_first, source_tokens_);
      if (key_first.index < source_tokens_)
        tile.add(source_.classify(prefix_of(first) - 1, prefix_of(query_last) - 1, key_first,
                                  source_key_last));
      if (key_last >= source_tokens_)
        tile.add(target_.classify(in_target(first).index, in_target(query_last).index,
                                  key_at(target_key_first - source_tokens_),
                                  key_last - source_tokens_));
    }
    return tile.result();
  }

 private:
  class Agreement {
   public:
    void add(TileVisibility part) {
      result_ = any_ && part != result_ ? TileVisibility::kSome : part;
      any_ = true;
    }
    TileVisibility result() const { return result_; }

   private:
    bool any_ = false;
    TileVisibility result_ = TileVisibility::kNone;
  };

  QueryInfo in_target(std::int64_t index) const { return {index - source_tokens_, 0}; }
  std::int64_t prefix_of(std::int64_t index) const {
    const auto row = static_cast<std::size_t>(index - source_tokens_);
    SLUICE_ASSERT(row < prefix_.size());
    return prefix_[row];
  }

  std::int64_t source_tokens_;
  std::span<const std::int64_t> prefix_;
  CausalWindow source_;
  CausalWindow target_;
};

namespace detail {

/// Row r predicts token r + 1, so it sees what that token's unit may see; the last row keeps its
/// own. Rows before `first` are left alone.
inline void shift_prefixes_by_one_row(std::span<std::int64_t> prefix, std::size_t first) {
  for (std::size_t row = first; row + 1 < prefix.size(); ++row) prefix[row] = prefix[row + 1];
}

inline std::int64_t sum_of(std::span<const std::int64_t> units) {
  return std::accumulate(units.begin(), units.end(), std::int64_t{0});
}

inline void require_rows(const char* where, std::span<const std::int64_t> prefix,
                         std::int64_t tokens) {
  if (static_cast<std::int64_t>(prefix.size()) != tokens)
    throw Error(ErrorCode::kShape, {"one prefix for each target token", where, "prefix",
                                    std::to_string(tokens), std::to_string(prefix.size())});
}

}  // namespace detail

/// Visible source prefixes of a wait-k target: unit i sees the first min(k + i, P) of the P source
/// units (group position encoding, arXiv 2505.16983, as its dataloader has it: source unit 0, the
/// prompt, counts as one), then the row shift. k = 1 is StreamingThinker's rule (arXiv 2510.17238:
/// unit i sees source units 0 .. i). source_units, target_units: tokens of each unit; prefix:
/// [target tokens], written.
/// \throws Error(kConfig) if k < 1, Error(kShape) if prefix has another length. Allocates nothing.
inline void wait_k_prefixes(std::int64_t k, std::span<const std::int64_t> source_units,
                            std::span<const std::int64_t> target_units,
                            std::span<std::int64_t> prefix) {
  if (k < 1)
    throw Error(ErrorCode::kConfig, {"nothing would be read before the first unit",
                                     "wait_k_prefixes", "k", "at least 1", std::to_string(k)});
  detail::require_rows("wait_k_prefixes", prefix, detail::sum_of(target_units));
  std::size_t row = 0;
  for (std::size_t unit = 0; unit < target_units.size(); ++unit) {
    // A huge k must not overflow: beyond the last unit all are seen.
    const std::size_t left = source_units.size() - std::min(unit, source_units.size());
    const std::size_t seen = static_cast<std::uint64_t>(k) >= left
                                 ? source_units.size()
                                 : unit + static_cast<std::size_t>(k);
    const std::int64_t tokens = detail::sum_of(source_units.first(seen));
    for (std::int64_t t = 0; t < target_units[unit]; ++t) prefix[row++] = tokens;
  }
  detail::shift_prefixes_by_one_row(prefix, 0);
}

/// A sequence of Think-as-You-See (arXiv 2603.02872): the user's side is text up to and with
/// vision_start, frames, and the tokens that close the turn; the assistant's side is a preamble and
/// then sentences.
struct TaysSequence {
  std::int64_t tokens_before_frames = 0;            ///< system prompt, question, vision_start
  std::span<const std::int64_t> frame_tokens{};     ///< tokens of each frame (group)
  std::int64_t tokens_after_frames = 0;             ///< vision_end, end of turn, newline
  std::int64_t preamble_tokens = 0;                 ///< of the assistant's turn
  std::span<const std::int64_t> sentence_tokens{};  ///< of each sentence; the last may be unclosed
};

/// Visible user-side prefixes of the assistant's tokens, as TaYS' causal_mask_CoT computes them:
/// the preamble sees frame 0, sentence i frames 0 .. i, the tokens behind the frames from sentence
/// F - 1 on (F frames); then the row shift, from the first sentence on. prefix: [preamble +
/// sentences]. Deviation: fewer sentences than frames are allowed (the released code cannot index
/// them). \throws Error(kShape) if there is no frame or prefix has another length. Allocates
/// nothing.
inline void tays_prefixes(const TaysSequence& sequence, std::span<std::int64_t> prefix) {
  const std::size_t frames = sequence.frame_tokens.size();
  if (frames == 0)
    throw Error(ErrorCode::kShape,
                {"the preamble sees frame 0", "tays_prefixes", "frame_tokens", "at least 1", "0"});
  detail::require_rows("tays_prefixes", prefix,
                       sequence.preamble_tokens + detail::sum_of(sequence.sentence_tokens));
  const auto seen = [&](std::size_t sentence) {
    const std::size_t count = std::min(sentence + 1, frames);
    return sequence.tokens_before_frames + detail::sum_of(sequence.frame_tokens.first(count)) +
           (sentence + 1 >= frames ? sequence.tokens_after_frames : 0);
  };
  std::size_t row = 0;
  // The preamble sees frame 0 without what closes the turn, even if it is the only frame.
  for (std::int64_t t = 0; t < sequence.preamble_tokens; ++t)
    prefix[row++] = sequence.tokens_before_frames + sequence.frame_tokens[0];
  for (std::size_t i = 0; i < sequence.sentence_tokens.size(); ++i)
    for (std::int64_t t = 0; t < sequence.sentence_tokens[i]; ++t) prefix[row++] = seen(i);
  detail::shift_prefixes_by_one_row(prefix, static_cast<std::size_t>(sequence.preamble_tokens));
}

}  // namespace sluice
