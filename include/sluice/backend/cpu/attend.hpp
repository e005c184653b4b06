// SPDX-License-Identifier: MIT
/// attend() for the CPU, as callers see it: what a call's segments and variant are to the kernels
/// of attend_work.hpp, which know neither element types nor variants as template arguments. They
/// are compiled once for all of them, and a program may link them (sluice::kernels) instead.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "sluice/attention/attention_query.hpp"
#include "sluice/attention/softmax_state.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

namespace detail {

inline constexpr std::int64_t kMostSplitKeys = 256;  // keys of a decode work item

/// A segment whose element types are known by their tags (KvRow::kTag) alone.
struct AnySegment {
  SegmentRule rule;
  const void* keys;
  const void* values;
  std::int64_t key_head_stride;
  std::int64_t key_token_stride;
  std::int64_t value_head_stride;
  std::int64_t value_token_stride;
  const float* key_rotation;
  std::int64_t key_rotation_stride;
  const void* key_scales;
  const void* value_scales;
  std::int64_t key_scale_head_stride;
  std::int64_t key_scale_token_stride;
  std::int64_t value_scale_head_stride;
  std::int64_t value_scale_token_stride;
  std::int64_t key_first;

  AnySegment() = default;
  template <class Key, class Value>
  explicit AnySegment(const Segment<Key, Value>& from)
      : rule(from.rule),
        keys(from.keys),
        values(from.values),
        key_head_stride(from.key_head_stride),
        key_token_stride(from.key_token_stride),
        value_head_stride(from.value_head_stride),
        value_token_stride(from.value_token_stride),
        key_rotation(from.key_rotation),
        key_rotation_stride(from.key_rotation_stride),
        key_scales(from.key_scales),
        value_scales(from.value_scales),
        key_scale_head_stride(from.key_scale_head_stride),
        key_scale_token_stride(from.key_scale_token_stride),
        value_scale_head_stride(from.value_scale_head_stride),
        value_scale_token_stride(from.value_scale_token_stride),
        key_first(from.key_first) {}

  template <class Key>
  const Key* key(std::int64_t head, std::int64_t entry) const {
    return static_cast<const Key*>(keys) + head * key_head_stride + entry * key_token_stride;
  }
  template <class Value>
  const Value* value(std::int64_t head, std::int64_t entry) const {
    return static_cast<const Value*>(values) + head * value_head_stride +
           entry * value_token_stride;
  }
  /// Their scales; null where rows are not quantised.
  template <class Key>
  const typename KvRow<Key>::Scale* key_scale(std::int64_t head, std::int64_t entry) const {
    if constexpr (!QuantisedElement<Key>) return nullptr;
    return static_cast<const typename KvRow<Key>::Scale*>(key_scales) +
           head * key_scale_head_stride + entry * key_scale_token_stride;
  }
  template <class Value>
  const typename KvRow<Value>::Scale* value_scale(std::int64_t head, std::int64_t entry) const {
    if constexpr (!QuantisedElement<Value>) return nullptr;
    return static_cast<const typename KvRow<Value>::Scale*>(value_scales) +
           head * value_scale_head_stride + entry * value_scale_token_stride;
  }
};

/// Keys begin to end of those that a functor was asked about.
struct KeyRun {
  std::int32_t begin;
  std::int32_t end;
};
// Runs among the keys of a tile, at most.
inline constexpr std::int64_t kMostKeyRuns = kMostSplitKeys / 2 + 1;

/// A variant behind plain functions, each called once for a tile or a row of it, never for a key.
struct AnyVariant {
  const void* self;
  float sm_scale;
  TileVisibility (*classify)(const void* self, std::int64_t query_first, std::int64_t query_last,
                             KeyInfo key_first, std::int64_t key_last);
  /// Writes the runs that a query does not see of `count` keys from key_first on; returns how many.
  int (*hidden_runs)(const void* self, QueryInfo query, KeyInfo key_first, std::int64_t count,
                     KeyRun* runs);
  /// Null where scores stay as they are.
  void (*transform)(const void* self, const ScoreRow& row, std::span<float> scores);
  /// Null where the softmax is the ordinary one.
  float (*sink_logit)(const void* self, std::int64_t head);
};

template <Visibility Mask>
int hidden_runs(const Mask& mask, QueryInfo query, KeyInfo key_first, std::int64_t count,
                KeyRun* runs) {
  constexpr std::int64_t kTogether = 16;  // keys that are classified together
  int written = 0;
  bool open = false;  // the last run goes on to the key at hand
  const auto hide = [&](std::int64_t begin, std::int64_t end) {
    if (open)
      runs[written - 1].end = static_cast<std::int32_t>(end);
    else
      runs[written++] = {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end)};
    open = true;
  };
  for (std::int64_t begin = 0; begin < count; begin += kTogether) {
    const std::int64_t end = std::min(begin + kTogether, count);
    KeyInfo key = key_first;
    key.index += begin;
    const TileVisibility tile =
        mask.classify(query.index, query.index, key, key_first.index + end - 1);
    if (tile == TileVisibility::kNone) {
      hide(begin, end);
    } else if (tile == TileVisibility::kAll) {
      open = false;
    } else {
      for (std::int64_t j = begin; j < end; ++j, ++key.index) {
        if (mask.visible(query, key))
          open = false;
        else
          hide(j, j + 1);
      }
    }
  }
  return written;
}

template <class Mask, class Transform, class Sink>
AnyVariant any_variant(const AttentionVariant<Mask, Transform, Sink>& variant) {
  using Variant = AttentionVariant<Mask, Transform, Sink>;
  AnyVariant any{};
  any.self = &variant;
  any.sm_scale = variant.sm_scale;
  any.classify = [](const void* self, std::int64_t query_first, std::int64_t query_last,
                    KeyInfo key_first, std::int64_t key_last) {
    return static_cast<const Variant*>(self)->visibility.classify(query_first, query_last,
                                                                  key_first, key_last);
  };
  any.hidden_runs = [](const void* self, QueryInfo query, KeyInfo key_first, std::int64_t count,
                       KeyRun* runs) {
    return hidden_runs(static_cast<const Variant*>(self)->visibility, query, key_first, count,
                       runs);
  };
  if constexpr (!std::is_same_v<Transform, PlainScores>)
    any.transform = [](const void* self, const ScoreRow& row, std::span<float> scores) {
      static_cast<const Variant*>(self)->transform.apply(row, scores);
    };
  if constexpr (!std::is_same_v<Sink, NoSinkTerm>)
    any.sink_logit = [](const void* self, std::int64_t head) {
      return static_cast<const Variant*>(self)->sink.logit(head);
    };
  return any;
}

/// One call of attend().
struct AttentionCall {
  const AttentionQuery& query;
  std::span<const AnySegment> segments;
  AnyVariant variant;
  HeadsView<float> out;
  float* lse;
};

/// What depends on the width of the registers.
struct AttentionExtents {
  std::int64_t key_cols;    // head_dim rounded up to whole registers
  std::int64_t value_cols;  // value_dim likewise
  std::int64_t scratch;     // floats of a member
};

AttentionExtents attention_extents(const AttentionShape& shape);

class CpuAttention;

#if SLUICE_COMPILED_KERNELS
/// Tags: of the segments' keys and values.
void run_attention(const AttentionCall& call, std::uint32_t key_tag, std::uint32_t value_tag,
                   AttentionWorkspace<cpu>& workspace, ThreadTeam& team);
#else
struct KeyKernels;
struct ValueKernels;
template <class Key>
const KeyKernels& key_kernels();
template <class Value>
const ValueKernels& value_kernels();
void run_attention(const AttentionCall& call, const KeyKernels& keys, const ValueKernels& values,
                   AttentionWorkspace<cpu>& workspace, ThreadTeam& team);
#endif

}  // namespace detail

template <>
class AttentionWorkspace<cpu> {
 public:
  /// The largest AttentionShape::max_segments.
  static constexpr int kMaxSegments = 512;

  /// `rotary` is copied; null: queries are not rotated. Allocates bytes(). Teams of at most
  /// `team_size` members may use it.
  /// \throws Error(kShape) when extents are not positive or num_qo_heads is no multiple of
  /// num_kv_heads, Error(kConfig) when team_size is below 1.
  AttentionWorkspace(const Rotary* rotary, const AttentionShape& shape, int team_size)
      : shape_(checked(rotary, shape)),
        group_(shape.num_qo_heads / shape.num_kv_heads),
        extents_(detail::attention_extents(shape)),
        max_splits_(std::max<std::int64_t>(32, shape.max_keys / kMostSplitKeys) + 1 +
                    shape.max_segments),
        partial_out_(static_cast<std::size_t>(max_splits_ * shape.num_qo_heads * shape.value_dim)),
        partial_state_(static_cast<std::size_t>(max_splits_ * shape.num_qo_heads)),
        splits_(static_cast<std::size_t>(max_splits_)),
        splits_left_(static_cast<std::size_t>(shape.num_kv_heads)),
        segments_(static_cast<std::size_t>(shape.max_segments)) {
    if (rotary != nullptr) {
      const int places = std::min(shape.max_segments, shape.max_places);
      tables_.reserve(static_cast<std::size_t>(places));
      for (int i = 0; i < places; ++i) tables_.emplace_back(*rotary, shape.max_queries);
    }
    if (team_size < 1)
      throw Error(ErrorCode::kConfig, {"no team to work for", "AttentionWorkspace", "team_size",
                                       "at least 1", std::to_string(team_size)});
    for (int i = 0; i < team_size; ++i)
      scratch_.emplace_back(static_cast<std::size_t>(extents_.scratch));
    loaded_queries_.resize(static_cast<std::size_t>(team_size));
  }

  const AttentionShape& shape() const { return shape_; }
  /// The rotation that queries get; null: none.
  const Rotary* rotary() const { return tables_.empty() ? nullptr : &tables_.front().rotary(); }
  /// Where attend() puts the segments of a call.
  std::span<detail::AnySegment> segments() { return segments_.span(); }
  std::size_t bytes() const {
    std::size_t total = partial_out_.bytes() + partial_state_.bytes() + segments_.bytes();
    for (const auto& scratch : scratch_) total += scratch.bytes();
    return total + tables_.size() * static_cast<std::size_t>(shape_.max_queries) *
                       (tables_.empty() ? 0 : static_cast<std::size_t>(rotary()->row_size())) *
                       sizeof(float);
  }

 private:
  friend class detail::CpuAttention;

  static constexpr std::int64_t kMostSplitKeys = detail::kMostSplitKeys;

  struct Split {
    int segment;
    std::int64_t begin;
    std::int64_t end;
    bool masked;
  };

  /// The query rows that a member's scratch holds in a decode call.
  struct alignas(64) LoadedQuery {
    std::int64_t kv_head = -1;
    int table = -1;
  };

  static const AttentionShape& checked(const Rotary* rotary, const AttentionShape& shape) {
    const auto fail = [](const char* field, const std::string& expected, std::int64_t found) {
      throw Error(ErrorCode::kShape, {"attention shape does not fit", "AttentionWorkspace", field,
                                      expected, std::to_string(found)});
    };
    if (shape.num_kv_heads < 1) fail("num_kv_heads", "at least 1", shape.num_kv_heads);
    if (shape.num_qo_heads < 1 || shape.num_qo_heads % shape.num_kv_heads != 0)
      fail("num_qo_heads", "a multiple of num_kv_heads = " + std::to_string(shape.num_kv_heads),
           shape.num_qo_heads);
    if (shape.head_dim < 1) fail("head_dim", "at least 1", shape.head_dim);
    if (shape.value_dim < 1) fail("value_dim", "at least 1", shape.value_dim);
    if (shape.max_queries < 1) fail("max_queries", "at least 1", shape.max_queries);
    if (shape.max_keys < 1) fail("max_keys", "at least 1", shape.max_keys);
    if (shape.max_segments < 1 || shape.max_segments > kMaxSegments)
      fail("max_segments", "1 to " + std::to_string(kMaxSegments), shape.max_segments);
    if (shape.max_places < 1) fail("max_places", "at least 1", shape.max_places);
    if (rotary != nullptr && rotary->head_dim() != shape.head_dim)
      fail("head_dim", "the rotation's, " + std::to_string(rotary->head_dim()), shape.head_dim);
    return shape;
  }

  AttentionShape shape_;
  std::int64_t group_;  // query heads of a KV head
  detail::AttentionExtents extents_;
  std::int64_t max_splits_;
  std::vector<RotaryTable> tables_;          // one per distinct reader rule of a call
  std::vector<Buffer<float>> scratch_;       // one per team member
  std::vector<LoadedQuery> loaded_queries_;  // likewise
  Buffer<float> partial_out_;                // [splits, num_qo_heads, value_dim]
  Buffer<SoftmaxState> partial_state_;       // [splits, num_qo_heads]
  Buffer<Split> splits_;
  std::vector<std::atomic<std::int64_t>> splits_left_;  // of each KV head, in a decode call
  Buffer<detail::AnySegment> segments_;                 // those of a call
};

/// See attention/attend.hpp.
template <class Key, class Value, Visibility Mask, ScoreTransform Transform, SinkTerm Sink>
void attend(const AttentionQuery& query, std::span<const Segment<Key, Value>> segments,
            const AttentionVariant<Mask, Transform, Sink>& variant, HeadsView<float> out,
            float* lse, AttentionWorkspace<cpu>& workspace, ThreadTeam& team, cpu) {
  SLUICE_ASSERT(segments.size() <= workspace.segments().size());
  const std::span<detail::AnySegment> any = workspace.segments().first(segments.size());
  std::transform(segments.begin(), segments.end(), any.begin(),
                 [](const Segment<Key, Value>& segment) { return detail::AnySegment(segment); });
  const detail::AttentionCall call{query, any, detail::any_variant(variant), out, lse};
#if SLUICE_COMPILED_KERNELS
  detail::run_attention(call, KvRow<Key>::kTag, KvRow<Value>::kTag, workspace, team);
#else
  detail::run_attention(call, detail::key_kernels<Key>(), detail::value_kernels<Value>(), workspace,
                        team);
#endif
}

}  // namespace sluice
