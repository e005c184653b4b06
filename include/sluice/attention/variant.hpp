// SPDX-License-Identifier: MIT
/// Attention variants: who sees whom, what happens to a score before the softmax, and what enters
/// its denominator. Each is a small functor, composed at compile time, so that no combination needs
/// a kernel of its own.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/cache/segment.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// What a visibility functor knows of a query row.
struct QueryInfo {
  std::int64_t index;  ///< stream index of the query's token
  Position position;   ///< the reader's own position, before a segment's shift
};

/// What a functor knows of a cached key: never its slot.
struct KeyInfo {
  std::int64_t index;  ///< stream index
  TokenKind kind;
  std::int32_t group;
};

/// A functor's word on a whole tile.
enum class TileVisibility { kNone, kSome, kAll };

/// Decides which keys a query sees inside the visible prefix of its segments. `classify` judges the
/// tile of query indices [query_first, query_last] and key indices [key_first, key_last]
/// (inclusive, one segment: one kind and group) so that masked tiles are skipped; it must agree
/// with `visible`.
template <class T>
concept Visibility = requires(const T visibility, QueryInfo query, KeyInfo key,
                              std::int64_t index) {
  { visibility.visible(query, key) } -> std::same_as<bool>;
  { visibility.classify(index, index, key, index) } -> std::same_as<TileVisibility>;
};

/// Causal, with the library's one window convention: a query sees `window_size` keys, its own
/// included, and the first `num_sink_tokens` of the stream. Unlimited by default.
struct CausalWindow {
  std::int64_t window_size = std::numeric_limits<std::int64_t>::max() / 4;
  std::int64_t num_sink_tokens = 0;

  /// flash-attention's left bound: keys i - left .. i, that is left + 1 of them; a negative bound
  /// means none. (Hugging Face's sliding_window counts keys as this library does.)
  static constexpr CausalWindow from_left_bound(std::int64_t left) {
    return left < 0 ? CausalWindow{} : CausalWindow{left + 1, 0};
  }

  constexpr bool visible(QueryInfo query, KeyInfo key) const {
    return key.index <= query.index &&
           (key.index > query.index - window_size || key.index < num_sink_tokens);
  }
  constexpr TileVisibility classify(std::int64_t query_first, std::int64_t query_last,
                                    KeyInfo key_first, std::int64_t key_last) const {
    if (key_first.index > query_last) return TileVisibility::kNone;
    const bool sinks = key_last < num_sink_tokens;
    const bool no_sinks = key_first.index >= num_sink_tokens;
    if (no_sinks && key_last <= query_first - window_size) return TileVisibility::kNone;
    const bool causal = key_last <= query_first;
    if (causal && (sinks || key_first.index > query_last - window_size))
      return TileVisibility::kAll;
    return TileVisibility::kSome;
  }
};

/// What a reader in one of several groups sees (cache/group.hpp): of its own group, the keys that
/// `own` shows it; of every other, the whole visible prefix of the segment. `bidirectional` shows
/// the new tokens of a chunk to each other, later ones too (the first WRITE of group position
/// encoding's released inference, core-algorithms 2.4).
struct GroupCausalWindow {
  CausalWindow own{};
  std::int32_t own_group = 0;
  bool bidirectional = false;

  constexpr bool visible(QueryInfo query, KeyInfo key) const {
    if (key.group != own_group) return true;
    return own.visible(query, key) || (bidirectional && key.index > query.index);
  }
  constexpr TileVisibility classify(std::int64_t query_first, std::int64_t query_last,
                                    KeyInfo key_first, std::int64_t key_last) const {
    if (key_first.group != own_group) return TileVisibility::kAll;
    if (bidirectional) return TileVisibility::kSome;
    return own.classify(query_first, query_last, key_first, key_last);
  }
};

/// Everything in the segments' visible prefixes: readers of another group, encoders.
struct AllVisible {
  constexpr bool visible(QueryInfo, KeyInfo) const { return true; }
  constexpr TileVisibility classify(std::int64_t, std::int64_t, KeyInfo, std::int64_t) const {
    return TileVisibility::kAll;
  }
};

/// Where a row of scores stands: one query head of one token against consecutive keys.
struct ScoreRow {
  std::int64_t head;         ///< query head
  Position reader_position;  ///< the query's position in the segment's numbering
  Position first_position;   ///< of the first key; the others follow by ones
};

/// Changes a row of already scaled scores in place. Called on whole rows, so that loops vectorise.
template <class T>
concept ScoreTransform = requires(const T transform, ScoreRow row, std::span<float> scores) {
  { transform.apply(row, scores) } -> std::same_as<void>;
};

/// Scores as they are.
struct PlainScores {
  static void apply(const ScoreRow&, std::span<float>) {}
};

/// cap * tanh(score / cap) (Gemma 2).
struct SoftCap {
  float cap;
  void apply(const ScoreRow&, std::span<float> scores) const {
    for (float& score : scores) score = cap * std::tanh(score / cap);
  }
};

/// ALiBi (arXiv 2108.12409): slope of the head times (key position - query position), positions in
/// the segment's numbering, so the bias is linear in the cache where the rule is in-cache.
struct AlibiBias {
  std::span<const float> slopes;  ///< [num_qo_heads], alibi_slopes()
  void apply(const ScoreRow& row, std::span<float> scores) const {
    const double slope = static_cast<double>(slopes[static_cast<std::size_t>(row.head)]);
    const double first = slope * (row.first_position - row.reader_position);
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] += static_cast<float>(first + slope * static_cast<double>(i));
  }
};

/// What the softmax denominator holds beside the keys: e^logit of the head. -infinity: nothing.
template <class T>
concept SinkTerm = requires(const T sink, std::int64_t head) {
  { sink.logit(head) } -> std::same_as<float>;
};

/// The ordinary softmax.
struct NoSinkTerm {
  static constexpr float logit(std::int64_t) { return -std::numeric_limits<float>::infinity(); }
};

/// SoftMax1, "softmax off by one", zero sink: e^z / (1 + sum).
struct SoftmaxOffByOne {
  static constexpr float logit(std::int64_t) { return 0.0F; }
};

/// A learned logit per QUERY head (gpt-oss), compared with already scaled scores.
struct SinkLogits {
  std::span<const float> logits;  ///< [num_qo_heads]
  float logit(std::int64_t head) const { return logits[static_cast<std::size_t>(head)]; }
};

/// One attention variant: score = transform(sm_scale * <q, k>), masked by visibility, softmax with
/// the sink term.
template <Visibility Mask = CausalWindow, ScoreTransform Transform = PlainScores,
          SinkTerm Sink = NoSinkTerm>
struct AttentionVariant {
  float sm_scale;
  Mask visibility{};
  Transform transform{};
  Sink sink{};
};

}  // namespace sluice
