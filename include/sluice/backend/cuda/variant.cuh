// SPDX-License-Identifier: MIT
/// Attention variants on the device: what attention/variant.hpp has for the CPU, under the same
/// names, with the same meaning. A functor of a program's own needs the members that these have.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "sluice/backend/cuda/backend.cuh"

namespace sluice::device {

/// What a visibility functor knows of a query row.
struct QueryInfo {
  std::int64_t index;  ///< stream index of the query's token
  double position;     ///< the reader's own position, before a segment's shift
};

/// What a functor knows of a cached key: never its slot.
struct KeyInfo {
  std::int64_t index;  ///< stream index
  std::int32_t kind;   ///< TokenKind
  std::int32_t group;
};

/// A functor's word on a whole tile.
enum class TileVisibility { kNone, kSome, kAll };

inline constexpr std::int64_t kUnlimitedWindow = std::numeric_limits<std::int64_t>::max() / 4;

/// sluice::CausalWindow: the last `window_size` keys, the query's own included, and the first
/// `num_sink_tokens` of the stream.
struct CausalWindow {
  std::int64_t window_size = kUnlimitedWindow;
  std::int64_t num_sink_tokens = 0;

  __device__ bool visible(QueryInfo query, KeyInfo key) const {
    return key.index <= query.index &&
           (key.index > query.index - window_size || key.index < num_sink_tokens);
  }
  /// Queries [query_first, query_last], keys [key_first.index, key_last] of one segment.
  __device__ TileVisibility classify(std::int64_t query_first, std::int64_t query_last,
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

/// sluice::GroupCausalWindow: `own` rules the reader's own group, of every other the whole visible
/// prefix is seen.
struct GroupCausalWindow {
  CausalWindow own{};
  std::int32_t own_group = 0;
  bool bidirectional = false;

  __device__ bool visible(QueryInfo query, KeyInfo key) const {
    if (key.group != own_group) return true;
    return own.visible(query, key) || (bidirectional && key.index > query.index);
  }
  __device__ TileVisibility classify(std::int64_t query_first, std::int64_t query_last,
                                     KeyInfo key_first, std::int64_t key_last) const {
    if (key_first.group != own_group) return TileVisibility::kAll;
    if (bidirectional) return TileVisibility::kSome;
    return own.classify(query_first, query_last, key_first, key_last);
  }
};

/// sluice::AllVisible.
struct AllVisible {
  __device__ bool visible(QueryInfo, KeyInfo) const { return true; }
  __device__ TileVisibility classify(std::int64_t, std::int64_t, KeyInfo, std::int64_t) const {
    return TileVisibility::kAll;
  }
};

/// Where a score stands: one query head against one key.
struct ScorePlace {
  std::int64_t head;  ///< query head
  double distance;    ///< key position - query position, in the segment's numbering
};

/// Scores as they are.
struct PlainScores {
  static constexpr bool kIdentity = true;
  __device__ float apply(const ScorePlace&, float score) const { return score; }
};

/// cap * tanh(score / cap).
struct SoftCap {
  static constexpr bool kIdentity = false;
  float cap;
  __device__ float apply(const ScorePlace&, float score) const { return cap * tanhf(score / cap); }
};

/// ALiBi: slope of the head times (key position - query position).
struct AlibiBias {
  static constexpr bool kIdentity = false;
  const float* slopes;  ///< [num_qo_heads], in device memory
  __device__ float apply(const ScorePlace& place, float score) const {
    return score +
           static_cast<float>(static_cast<double>(__ldg(slopes + place.head)) * place.distance);
  }
};

/// The ordinary softmax.
struct NoSinkTerm {
  __device__ float logit(std::int64_t) const { return -__int_as_float(0x7f800000); }
};

/// e^z / (1 + sum).
struct SoftmaxOffByOne {
  __device__ float logit(std::int64_t) const { return 0; }
};

/// A learned logit per query head, compared with already scaled scores.
struct SinkLogits {
  const float* logits;  ///< [num_qo_heads], in device memory
  __device__ float logit(std::int64_t head) const { return __ldg(logits + head); }
};

/// score = transform(sm_scale * <q, k>), masked by visibility, softmax with the sink term.
template <class Mask = CausalWindow, class Transform = PlainScores, class Sink = NoSinkTerm>
struct AttentionVariant {
  float sm_scale = 1;
  Mask visibility{};
  Transform transform{};
  Sink sink{};
};

}  // namespace sluice::device
