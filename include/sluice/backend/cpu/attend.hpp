// SPDX-License-Identifier: MIT
/// attend() for the CPU. One query row (decoding): keys are split into runs of 64 to 256, each (KV
/// head, split) is a work item that streams its keys and values once for all query heads of the
/// group, and whoever finishes the last split of a head merges them by log-sum-exp. Several rows
/// (prefill): each (KV head, block of query rows) runs an online softmax over key tiles; a tile is
/// converted once and met by the block's query rows a panel of columns at a time, each panel with
/// the keys that it can see. Neither way of cutting depends on the number of threads, so neither
/// does the result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/softmax_state.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/backend/cpu/attend_kernels.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

namespace detail {
template <class Key, class Value, class Variant>
class CpuAttention;
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
        key_cols_(padded(shape.head_dim)),
        value_cols_(padded(shape.value_dim)),
        max_splits_(std::max<std::int64_t>(32, shape.max_keys / kMostSplitKeys) + 1 +
                    shape.max_segments),
        partial_out_(static_cast<std::size_t>(max_splits_ * shape.num_qo_heads * shape.value_dim)),
        partial_state_(static_cast<std::size_t>(max_splits_ * shape.num_qo_heads)),
        splits_(static_cast<std::size_t>(max_splits_)),
        splits_left_(static_cast<std::size_t>(shape.num_kv_heads)) {
    if (rotary != nullptr) {
      const int places = std::min(shape.max_segments, shape.max_places);
      tables_.reserve(static_cast<std::size_t>(places));
      for (int i = 0; i < places; ++i) tables_.emplace_back(*rotary, shape.max_queries);
    }
    if (team_size < 1)
      throw Error(ErrorCode::kConfig, {"no team to work for", "AttentionWorkspace", "team_size",
                                       "at least 1", std::to_string(team_size)});
    // Scores twice, for rows whose channels come in groups of their own scales.
    const std::int64_t decode = group_ * (key_cols_ + 2 * kMostSplitKeys + value_cols_) +
                                4 * key_cols_ + 2 * kMostSplitKeys;
    const std::int64_t columns =
        std::max(panels(1), std::min(kBlockPanels, panels(shape.max_queries))) *
        detail::kTileColumns;
    const std::int64_t tiles = kTileKeys * (key_cols_ + value_cols_ + detail::kTileColumns) +
                               columns * (key_cols_ + value_cols_ + 2) + detail::kTileColumns +
                               simd::kWidth * (key_cols_ + value_cols_) + kTileKeys;
    for (int i = 0; i < team_size; ++i)
      scratch_.emplace_back(static_cast<std::size_t>(std::max(decode, tiles) + 64));
  }

  const AttentionShape& shape() const { return shape_; }
  /// The rotation that queries get; null: none.
  const Rotary* rotary() const { return tables_.empty() ? nullptr : &tables_.front().rotary(); }
  std::size_t bytes() const {
    std::size_t total = partial_out_.bytes() + partial_state_.bytes();
    for (const auto& scratch : scratch_) total += scratch.bytes();
    return total + tables_.size() * static_cast<std::size_t>(shape_.max_queries) *
                       (tables_.empty() ? 0 : static_cast<std::size_t>(rotary()->row_size())) *
                       sizeof(float);
  }

 private:
  template <class Key, class Value, class Variant>
  friend class detail::CpuAttention;

  static constexpr std::int64_t kMostSplitKeys = 256;  // keys of a decode work item
  static constexpr std::int64_t kTileKeys = 128;       // keys of a prefill tile
  static constexpr std::int64_t kBlockPanels = 4;      // panels of a prefill work item, at most

  struct Split {
    int segment;
    std::int64_t begin;
    std::int64_t end;
    bool masked;
  };

  // Whole registers and whole blocks of accumulators.
  static std::int64_t padded(std::int64_t count) {
    constexpr std::int64_t kUnit = std::max(simd::kWidth, detail::kTileBlockRows);
    return (count + kUnit - 1) / kUnit * kUnit;
  }
  // Panels that the query rows of `tokens` tokens and one KV head fill.
  std::int64_t panels(std::int64_t tokens) const {
    return (tokens * group_ + detail::kTileColumns - 1) / detail::kTileColumns;
  }

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
  std::int64_t group_;       // query heads of a KV head
  std::int64_t key_cols_;    // head_dim rounded up to whole registers
  std::int64_t value_cols_;  // value_dim likewise
  std::int64_t max_splits_;
  std::vector<RotaryTable> tables_;     // one per distinct reader rule of a call
  std::vector<Buffer<float>> scratch_;  // one per team member
  Buffer<float> partial_out_;           // [splits, num_qo_heads, value_dim]
  Buffer<SoftmaxState> partial_state_;  // [splits, num_qo_heads]
  Buffer<Split> splits_;
  std::vector<std::atomic<std::int64_t>> splits_left_;  // of each KV head, in a decode call
};

namespace detail {

/// One call of attend() on the CPU.
template <class Key, class Value, class Variant>
class CpuAttention {
 public:
  using Workspace = AttentionWorkspace<cpu>;
  using SegmentType = Segment<Key, Value>;
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
  static constexpr std::int64_t kMaskKeys = 16;  // keys that are classified together

  CpuAttention(const AttentionQuery& query, std::span<const SegmentType> segments,
               const Variant& variant, HeadsView<float> out, float* lse, Workspace& workspace)
      : query_(query),
        segments_(segments),
        variant_(variant),
        out_(out),
        lse_(lse),
        workspace_(workspace) {
    SLUICE_ASSERT(query.rows.head_dim == workspace.shape_.head_dim);
    SLUICE_ASSERT(query.rows.num_heads == workspace.shape_.num_qo_heads);
    SLUICE_ASSERT(query.rows.tokens <= workspace.shape_.max_queries);
    SLUICE_ASSERT(out.head_dim == workspace.shape_.value_dim);
    for ([[maybe_unused]] const SegmentType& segment : segments)
      SLUICE_ASSERT(segment.key_rotation == nullptr || workspace.rotary() != nullptr);
    SLUICE_ASSERT(static_cast<int>(segments.size()) <= workspace.shape_.max_segments);
    for ([[maybe_unused]] const std::int32_t head : query.kv_heads)
      SLUICE_ASSERT(head >= 0 && head < workspace.shape_.num_kv_heads);
    place_readers();
  }

  void run(ThreadTeam& team) {
    SLUICE_ASSERT(team.size() <= static_cast<int>(workspace_.scratch_.size()));
    if (query_.rows.tokens == 1 &&
        workspace_.shape_.head_dim % (KvRow<Key>::kUnit * simd::kWidth) == 0 &&
        workspace_.shape_.value_dim % (KvRow<Value>::kUnit * simd::kWidth) == 0)
      decode(team);
    else
      prefill(team);
  }

 private:
  /// Heads on the segments' head axis; kernels below call one of them kv_head.
  std::int64_t segment_heads() const {
    return query_.num_segment_heads(workspace_.shape_.num_kv_heads);
  }
  /// The first query head that reads one of them.
  std::int64_t first_head(std::int64_t kv_head) const {
    return query_.kv_head(kv_head) * workspace_.group_;
  }

  /// Forms the rotations of the query rows for each distinct reader rule.
  void place_readers() {
    if (workspace_.tables_.empty()) return;
    int used = 0;
    Position shifts[Workspace::kMaxSegments];
    Position ceilings[Workspace::kMaxSegments];
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const Position shift = segments_[s].rule.shift;
      const Position ceiling = segments_[s].rule.ceiling;
      int table = 0;
      while (table < used && !(shifts[table] == shift && ceilings[table] == ceiling)) ++table;
      if (table == used) {
        SLUICE_ASSERT(used < static_cast<int>(workspace_.tables_.size()));
        shifts[used] = shift;
        ceilings[used] = ceiling;
        RotaryTable& rotations = workspace_.tables_[static_cast<std::size_t>(used++)];
        if (query_.positions == nullptr)
          rotations.fill_clamped_run(query_.first_position + shift, query_.rows.tokens, ceiling);
        else
          rotations.fill_placed({query_.positions, static_cast<std::size_t>(query_.rows.tokens)},
                                shift, ceiling);
      }
      table_of_[s] = table;
    }
  }

  /// The query head of one row, rotated for segment s and scaled.
  void load_query(std::size_t s, std::int64_t token, std::int64_t head, float* to) const {
    const float* from = query_.rows.head(token, head);
    const std::int64_t dim = query_.rows.head_dim;
    if (workspace_.tables_.empty()) {
      std::copy_n(from, dim, to);
    } else {
      const RotaryTable& table = workspace_.tables_[static_cast<std::size_t>(table_of_[s])];
      table.rotary().rotate(table.row(token), from, to);
    }
    for (std::int64_t d = 0; d < dim; ++d) to[d] *= variant_.sm_scale;
  }

  ScoreRow score_row(const SegmentType& segment, std::int64_t token, std::int64_t head,
                     std::int64_t key) const {
    return {head, segment.rule.reader_position(query_.position(token)),
            segment.rule.first_position + static_cast<Position>(key)};
  }

  QueryInfo query_info(std::int64_t token) const {
    return {query_.first_index + token, query_.position(token)};
  }
  static KeyInfo key_info(const SegmentType& segment, std::int64_t key) {
    return {segment.rule.first_index + key, segment.rule.kind, segment.rule.group};
  }

  TileVisibility classify(const SegmentType& segment, std::int64_t token_begin,
                          std::int64_t token_end, std::int64_t key_begin,
                          std::int64_t key_end) const {
    return variant_.visibility.classify(
        query_.first_index + token_begin, query_.first_index + token_end - 1,
        key_info(segment, key_begin), segment.rule.first_index + key_end - 1);
  }

  void mask_row(const SegmentType& segment, std::int64_t token, std::int64_t key_begin,
                std::span<float> scores) const {
    const QueryInfo query = query_info(token);
    for (std::size_t j = 0; j < scores.size(); ++j)
      if (!variant_.visibility.visible(query,
                                       key_info(segment, key_begin + static_cast<std::int64_t>(j))))
        scores[j] = kMinusInfinity;
  }

  static float row_max(std::span<const float> scores) {
    simd::VecF max = simd::broadcast(kMinusInfinity);
    std::size_t j = 0;
    for (; j + simd::kWidth <= scores.size(); j += simd::kWidth)
      max = simd::max(max, simd::load(scores.data() + j));
    float result = simd::reduce_max(max);
    for (; j < scores.size(); ++j) result = std::max(result, scores[j]);
    return result;
  }

  /// scores[j] = exp(scores[j] - max) in place; returns their sum.
  static float exponentiate(std::span<float> scores, float max) {
    const simd::VecF shift = simd::broadcast(max);
    simd::VecF sum = simd::zero();
    std::size_t j = 0;
    for (; j + simd::kWidth <= scores.size(); j += simd::kWidth) {
      const simd::VecF weight = simd::exp(simd::load(scores.data() + j) - shift);
      simd::store(scores.data() + j, weight);
      sum += weight;
    }
    const auto rest = static_cast<std::int64_t>(scores.size() - j);
    if (rest > 0) {
      const simd::VecF weight = simd::exp(simd::load_partial(scores.data() + j, rest) - shift);
      simd::store_partial(scores.data() + j, weight, rest);
      sum += simd::load_partial(scores.data() + j, rest);
    }
    return simd::reduce_add(sum);
  }

  /// Writes a finished row: accumulated values over their sum and the sink's share.
  void finish(std::int64_t token, std::int64_t head, const float* accumulated,
              const SoftmaxState& state) {
    float* out = out_.head(token, head);
    if (lse_ != nullptr) lse_[token * out_.num_heads + head] = state.lse();
    if (state.empty()) {
      std::fill_n(out, out_.head_dim, 0.0F);
      return;
    }
    const float sink = variant_.sink.logit(head);
    // A sink far above every score would overflow exp: then its share is everything.
    const float sink_weight = sink == kMinusInfinity ? 0.0F : std::exp(sink - state.max);
    const float factor = 1.0F / (state.sum + sink_weight);
    for (std::int64_t d = 0; d < out_.head_dim; ++d) out[d] = accumulated[d] * factor;
  }

  // ---- one query row -------------------------------------------------------------------------

  /// Keys of a split of `keys` in all: enough splits for several threads even where keys are few,
  /// and little to merge where they are many.
  static constexpr std::int64_t split_keys(std::int64_t keys) {
    return keys <= 512 ? 64 : keys <= 2048 ? 128 : Workspace::kMostSplitKeys;
  }

  void decode(ThreadTeam& team) {
    std::int64_t all_keys = 0;
    for (const SegmentType& segment : segments_) all_keys += segment.rule.visible;
    const std::int64_t length = split_keys(all_keys);
    std::int64_t splits = 0;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const std::int64_t keys = segments_[s].rule.visible;
      for (std::int64_t begin = 0; begin < keys; begin += length) {
        const std::int64_t end = std::min(begin + length, keys);
        const TileVisibility tile = classify(segments_[s], 0, 1, begin, end);
        if (tile == TileVisibility::kNone) continue;
        SLUICE_ASSERT(splits < workspace_.max_splits_);
        workspace_.splits_[static_cast<std::size_t>(splits++)] = {static_cast<int>(s), begin, end,
                                                                  tile == TileVisibility::kSome};
      }
    }
    const std::int64_t heads = segment_heads();
    if (splits == 0) {
      for (std::int64_t j = 0; j < heads; ++j) merge_heads(j, 0);
      return;
    }
    for (std::int64_t j = 0; j < heads; ++j)
      workspace_.splits_left_[static_cast<std::size_t>(j)].store(splits, std::memory_order_relaxed);
    team.for_each(splits * heads, [&](std::int64_t item, int member) {
      const std::int64_t kv_head = item / splits;
      decode_split(item % splits, kv_head,
                   workspace_.scratch_[static_cast<std::size_t>(member)].data());
      // The last one has seen what the others wrote.
      if (workspace_.splits_left_[static_cast<std::size_t>(kv_head)].fetch_sub(
              1, std::memory_order_acq_rel) == 1)
        merge_heads(kv_head, splits);
    });
  }

  /// All query heads of one KV head against one split.
  void decode_split(std::int64_t split_index, std::int64_t kv_head, float* scratch) {
    const std::int64_t dim = workspace_.shape_.head_dim;
    const std::int64_t value_dim = workspace_.shape_.value_dim;
    const std::int64_t group = workspace_.group_;
    const std::int64_t head = first_head(kv_head);
    const auto& split = workspace_.splits_[static_cast<std::size_t>(split_index)];
    const SegmentType& segment = segments_[static_cast<std::size_t>(split.segment)];
    const std::int64_t count = split.end - split.begin;
    float* const query = scratch;                                     // [group, dim]
    float* const scores = query + group * dim;                        // [group, kMostSplitKeys]
    float* const more = scores + group * Workspace::kMostSplitKeys;   // as scores
    float* const factors = more + group * Workspace::kMostSplitKeys;  // [2, kMostSplitKeys]
    float* const rows = factors + 2 * Workspace::kMostSplitKeys;  // [4, dim] or [group, value_dim]
    const auto load_head = [&](std::int64_t g, float* to) {
      load_query(static_cast<std::size_t>(split.segment), 0, head + g, to);
    };
    const Key* const keys = segment.key(kv_head, split.begin);
    if (segment.key_rotation != nullptr) {
      for (std::int64_t g = 0; g < group; ++g) load_head(g, query + g * dim);
      for (std::int64_t j = 0; j < count; j += 4) {
        const std::int64_t some = std::min<std::int64_t>(4, count - j);
        for (std::int64_t i = 0; i < some; ++i)
          load_key(segment, kv_head, split.begin + j + i, rows + i * dim);
        decode_scores(group, query, dim, rows, dim, some, scores + j, Workspace::kMostSplitKeys);
      }
    } else if constexpr (std::is_same_v<Key, int4x2>) {
      group_scores(segment, kv_head, split.begin, count, load_head, query, scores, more, factors,
                   rows);
    } else {
      for (std::int64_t g = 0; g < group; ++g) load_head(g, query + g * dim);
      decode_scores(group, query, dim, keys, segment.key_token_stride, count, scores,
                    Workspace::kMostSplitKeys);
      if constexpr (QuantisedElement<Key>)
        multiply_rows(scores, segment.key_scale(kv_head, split.begin),
                      segment.key_scale_token_stride, count, factors, scores);
    }
    const std::int64_t first_row = split_index * workspace_.shape_.num_qo_heads + head;
    for (std::int64_t g = 0; g < group; ++g) {
      const std::span<float> row(scores + g * Workspace::kMostSplitKeys,
                                 static_cast<std::size_t>(count));
      variant_.transform.apply(score_row(segment, 0, head + g, split.begin), row);
      if (split.masked) mask_row(segment, 0, split.begin, row);
      SoftmaxState state{.max = row_max(row), .sum = 0};
      if (!state.empty())
        state.sum = exponentiate(row, state.max);
      else
        std::fill(row.begin(), row.end(), 0.0F);
      workspace_.partial_state_[static_cast<std::size_t>(first_row + g)] = state;
    }
    float* const out = workspace_.partial_out_.data() + first_row * value_dim;
    if constexpr (std::is_same_v<Value, int4x2>) {
      group_sums(segment, kv_head, split.begin, count, scores, more, factors, rows, out);
    } else {
      if constexpr (QuantisedElement<Value>)
        multiply_rows(scores, segment.value_scale(kv_head, split.begin),
                      segment.value_scale_token_stride, count, factors, scores);
      decode_sums(group, scores, Workspace::kMostSplitKeys, segment.value(kv_head, split.begin),
                  segment.value_token_stride, count, out, value_dim);
    }
  }

  /// to[g, j] = from[g, j] * scales[j * stride] for the rows of a split.
  void multiply_rows(const float* from, const float* scales, std::int64_t stride,
                     std::int64_t count, float* factors, float* to) const {
    for (std::int64_t j = 0; j < count; ++j) factors[j] = scales[j * stride];
    for (std::int64_t g = 0; g < workspace_.group_; ++g)
      for (std::int64_t j = 0; j < count; ++j)
        to[g * Workspace::kMostSplitKeys + j] =
            from[g * Workspace::kMostSplitKeys + j] * factors[j];
  }

  /// Scales and zeros of one group of channels as floats: [2, kMostSplitKeys].
  static void load_group_scales(const GroupScale* scales, std::int64_t stride, std::int64_t count,
                                float* factors) {
    for (std::int64_t j = 0; j < count; ++j) {
      factors[j] = simd::to_float(scales[j * stride].scale);
      factors[Workspace::kMostSplitKeys + j] = simd::to_float(scales[j * stride].zero);
    }
  }

  /// Scores of keys in groups of channels: scale * <q, n> + zero * sum(q), over the groups.
  template <class LoadHead>
  void group_scores(const SegmentType& segment, std::int64_t kv_head, std::int64_t begin,
                    std::int64_t count, const LoadHead& load_head, float* query, float* scores,
                    float* more, float* factors, float* line) const {
    constexpr std::int64_t kMost = Workspace::kMostSplitKeys;
    constexpr std::int64_t kGroup = KvRow<int4x2>::kGroup;
    const std::int64_t dim = workspace_.shape_.head_dim;
    const std::int64_t heads = workspace_.group_;
    // The query in the order of the products: [groups of channels, heads, channels].
    for (std::int64_t g = 0; g < heads; ++g) {
      load_head(g, line);
      for (std::int64_t d = 0; d < dim; d += kGroup) {
        const std::int64_t width = std::min(kGroup, dim - d);
        order_channels<int4x2>(line + d, width, query + d * heads + g * width);
      }
    }
    for (std::int64_t d = 0; d < dim; d += kGroup) {
      const std::int64_t width = std::min(kGroup, dim - d);
      const float* const part = query + d * heads;
      float* const to = d == 0 ? scores : more;
      decode_scores(heads, part, width, segment.key(kv_head, begin) + d / 2,
                    segment.key_token_stride, count, to, kMost);
      load_group_scales(segment.key_scale(kv_head, begin) + d / kGroup,
                        segment.key_scale_token_stride, count, factors);
      for (std::int64_t g = 0; g < heads; ++g) {
        simd::VecF lanes = simd::zero();
        for (std::int64_t i = 0; i < width; i += simd::kWidth)
          lanes += simd::load(part + g * width + i);
        const float sum = simd::reduce_add(lanes);
        float* const row = scores + g * kMost;
        const float* const products = to + g * kMost;
        for (std::int64_t j = 0; j < count; ++j) {
          const float score = products[j] * factors[j] + factors[kMost + j] * sum;
          row[j] = d == 0 ? score : row[j] + score;
        }
      }
    }
  }

  /// Sums of values in groups of channels: those of w * scale * n, and of w * zero once a group.
  void group_sums(const SegmentType& segment, std::int64_t kv_head, std::int64_t begin,
                  std::int64_t count, const float* weights, float* more, float* factors,
                  float* rows, float* out) const {
    constexpr std::int64_t kMost = Workspace::kMostSplitKeys;
    constexpr std::int64_t kGroup = KvRow<int4x2>::kGroup;
    const std::int64_t dim = workspace_.shape_.value_dim;
    const std::int64_t heads = workspace_.group_;
    for (std::int64_t d = 0; d < dim; d += kGroup) {
      const std::int64_t width = std::min(kGroup, dim - d);
      load_group_scales(segment.value_scale(kv_head, begin) + d / kGroup,
                        segment.value_scale_token_stride, count, factors);
      for (std::int64_t g = 0; g < heads; ++g)
        for (std::int64_t j = 0; j < count; ++j)
          more[g * kMost + j] = weights[g * kMost + j] * factors[j];
      decode_sums(heads, more, kMost, segment.value(kv_head, begin) + d / 2,
                  segment.value_token_stride, count, rows, width);
      for (std::int64_t g = 0; g < heads; ++g) {
        const float* const weight = weights + g * kMost;
        simd::VecF lanes = simd::zero();
        std::int64_t j = 0;
        for (; j + simd::kWidth <= count; j += simd::kWidth)
          lanes = simd::fma(simd::load(weight + j), simd::load(factors + kMost + j), lanes);
        float zero = simd::reduce_add(lanes);
        for (; j < count; ++j) zero += weight[j] * factors[kMost + j];
        float* const to = out + g * dim + d;
        restore_channels<int4x2>(rows + g * width, width, to);
        for (std::int64_t i = 0; i < width; ++i) to[i] += zero;
      }
    }
  }

  void merge_heads(std::int64_t kv_head, std::int64_t splits) {
    for (std::int64_t g = 0; g < workspace_.group_; ++g)
      merge_splits(first_head(kv_head) + g, splits);
  }

  /// Adds the splits of one head in their order; the first split's row is the accumulator.
  void merge_splits(std::int64_t head, std::int64_t splits) {
    const std::int64_t dim = workspace_.shape_.value_dim;
    const std::int64_t heads = workspace_.shape_.num_qo_heads;
    SoftmaxState all;
    for (std::int64_t s = 0; s < splits; ++s)
      all.max = std::max(all.max,
                         workspace_.partial_state_[static_cast<std::size_t>(s * heads + head)].max);
    float* sum = workspace_.partial_out_.data() + head * dim;
    for (std::int64_t s = 0; s < splits && !all.empty(); ++s) {
      const SoftmaxState& part =
          workspace_.partial_state_[static_cast<std::size_t>(s * heads + head)];
      const float factor = part.empty() ? 0.0F : std::exp(part.max - all.max);
      const float* from = workspace_.partial_out_.data() + (s * heads + head) * dim;
      if (s == 0)
        for (std::int64_t d = 0; d < dim; ++d) sum[d] *= factor;
      else
        for (std::int64_t d = 0; d < dim; ++d) sum[d] += factor * from[d];
      all.sum += part.sum * factor;
    }
    finish(0, head, sum, all);
  }

  // ---- several query rows --------------------------------------------------------------------

  /// The query rows of an item, as columns: column c is query head c % group of token begin + c /
  /// group. Panels of kTileColumns columns follow each other.
  struct Block {
    std::int64_t begin = 0;    // first token
    std::int64_t end = 0;      // behind the last one
    std::int64_t kv_head = 0;  // on the segments' head axis
    float* keys = nullptr;     // [kTileKeys, key_cols]
    float* values = nullptr;   // [kTileKeys, value_cols]
    float* scores = nullptr;   // [kTileKeys, kTileColumns], of one panel
    float* query = nullptr;    // [panels, key_cols, kTileColumns]
    float* sums = nullptr;     // [panels, value_cols, kTileColumns]
    float* max = nullptr;      // [panels, kTileColumns]
    float* sum = nullptr;      // [panels, kTileColumns]
    float* factors = nullptr;  // [kTileColumns]
    float* rows = nullptr;     // [kWidth, key_cols or value_cols]
    float* line = nullptr;     // [kTileKeys], scores of one row

    std::int64_t columns(std::int64_t group) const { return (end - begin) * group; }
  };

  void prefill(ThreadTeam& team) {
    // A block is whole tokens that fill at most kBlockPanels panels, of fewer panels where that
    // leaves too few items to share out, but at least one token however many heads its group has.
    const std::int64_t tokens = query_.rows.tokens;
    const std::int64_t group = workspace_.group_;
    std::int64_t block_panels = Workspace::kBlockPanels;
    const auto block_tokens = [&] {
      return std::max<std::int64_t>(1, block_panels * kTileColumns / group);
    };
    const auto blocks = [&] {
      return (tokens + block_tokens() - 1) / block_tokens();
    };
    while (block_panels > 1 && blocks() * segment_heads() < 16) block_panels /= 2;
    const std::int64_t count = blocks();
    team.for_each(count * segment_heads(), [&](std::int64_t item, int member) {
      // Later blocks see more keys than earlier ones: the long items first.
      const std::int64_t block = count - 1 - item % count;
      prefill_block(item / count, block * block_tokens(),
                    std::min((block + 1) * block_tokens(), tokens),
                    workspace_.scratch_[static_cast<std::size_t>(member)].data());
    });
  }

  void prefill_block(std::int64_t kv_head, std::int64_t begin, std::int64_t end, float* scratch) {
    const std::int64_t group = workspace_.group_;
    const std::int64_t key_cols = workspace_.key_cols_;
    const std::int64_t value_cols = workspace_.value_cols_;
    const std::int64_t columns = workspace_.panels(end - begin) * kTileColumns;
    Block block{.begin = begin, .end = end, .kv_head = kv_head};
    const auto take = [&](std::int64_t size) {
      return std::exchange(scratch, scratch + size);
    };
    block.keys = take(Workspace::kTileKeys * key_cols);
    block.values = take(Workspace::kTileKeys * value_cols);
    block.scores = take(Workspace::kTileKeys * kTileColumns);
    block.query = take(columns * key_cols);
    block.sums = take(columns * value_cols);
    block.max = take(columns);
    block.sum = take(columns);
    block.factors = take(kTileColumns);
    block.rows = take(simd::kWidth * std::max(key_cols, value_cols));
    block.line = take(Workspace::kTileKeys);
    std::fill_n(block.sums, columns * value_cols, 0.0F);
    std::fill_n(block.max, columns, kMinusInfinity);
    std::fill_n(block.sum, columns, 0.0F);

    int loaded = -1;  // the rotation that block.query has
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const SegmentType& segment = segments_[s];
      for (std::int64_t first = 0; first < segment.rule.visible; first += Workspace::kTileKeys) {
        const std::int64_t last = std::min(first + Workspace::kTileKeys, segment.rule.visible);
        if (classify(segment, begin, end, first, last) == TileVisibility::kNone) continue;
        if (loaded != table_of_[s]) load_queries(s, block);
        loaded = table_of_[s];
        load_keys(segment, kv_head, first, last - first, block.keys);
        load_values(segment, kv_head, first, last - first, block.values);
        for (std::int64_t column = 0; column < block.columns(group); column += kTileColumns)
          prefill_panel(segment, block, column, first, last);
      }
    }
    finish_block(block);
  }

  /// Query rows of a block as columns, rotated for segment s. Columns beyond the last are 0.
  void load_queries(std::size_t s, const Block& block) const {
    const std::int64_t dim = workspace_.shape_.head_dim;
    const std::int64_t key_cols = workspace_.key_cols_;
    const std::int64_t group = workspace_.group_;
    const std::int64_t columns = block.columns(group);
    const std::int64_t head = first_head(block.kv_head);
    for (std::int64_t c = 0; c < columns; c += simd::kWidth) {
      for (std::int64_t i = 0; i < simd::kWidth; ++i) {
        float* const row = block.rows + i * key_cols;
        if (c + i < columns)
          load_query(s, block.begin + (c + i) / group, head + (c + i) % group, row);
        const std::int64_t from = c + i < columns ? dim : 0;
        std::fill(row + from, row + key_cols, 0.0F);
      }
      transpose(block.rows, key_cols, simd::kWidth, key_cols,
                block.query + c / kTileColumns * kTileColumns * key_cols + c % kTileColumns,
                kTileColumns);
    }
  }

  /// The panel that begins with `column` against keys first to last of a segment, which
  /// block.keys and block.values hold.
  void prefill_panel(const SegmentType& segment, const Block& block, std::int64_t column,
                     std::int64_t first, std::int64_t last) const {
    const std::int64_t group = workspace_.group_;
    const std::int64_t columns =
        std::min<std::int64_t>(block.columns(group) - column, kTileColumns);
    const std::int64_t token_begin = block.begin + column / group;
    const std::int64_t token_end = block.begin + (column + columns - 1) / group + 1;
    // The keys that some row of the panel may see: those of a later token, or behind a window, are
    // left out a block of rows at a time.
    std::int64_t begin = first;
    const auto hidden = [&](std::int64_t from, std::int64_t to) {
      return classify(segment, token_begin, token_end, from, to) == TileVisibility::kNone;
    };
    while (begin < last && hidden(begin, std::min(begin + kTileBlockRows, last)))
      begin += kTileBlockRows;
    if (begin >= last) return;
    std::int64_t end = last;
    while (true) {
      const std::int64_t from = first + (end - 1 - first) / kTileBlockRows * kTileBlockRows;
      if (!hidden(from, end)) break;
      end = from;
    }
    const std::int64_t count = end - begin;
    const float* const keys = block.keys + (begin - first) * workspace_.key_cols_;
    const float* const values = block.values + (begin - first) * workspace_.value_cols_;
    const float* const query = block.query + column * workspace_.key_cols_;
    float* const sums = block.sums + column * workspace_.value_cols_;
    const auto with_vectors = [&]<int kVectors>() {
      tile_scores<kVectors>(keys, workspace_.key_cols_, count, query, workspace_.shape_.head_dim,
                            block.scores);
      apply_variant(segment, block, column, columns, begin, end, token_begin, token_end);
      tile_softmax<kVectors>(block.scores, count, block.max + column, block.sum + column,
                             block.factors);
      tile_sums<kVectors>(values, workspace_.value_cols_, count, block.scores,
                          workspace_.value_cols_, block.factors, sums);
    };
    if (columns <= simd::kWidth)
      with_vectors.template operator()<1>();
    else if (kTileVectors == 2 || columns <= 2 * simd::kWidth)
      with_vectors.template operator()<2>();
    else
      with_vectors.template operator()<kTileVectors>();
  }

  /// Transforms and masks the scores of a panel against keys begin to end.
  void apply_variant(const SegmentType& segment, const Block& block, std::int64_t column,
                     std::int64_t columns, std::int64_t begin, std::int64_t end,
                     std::int64_t token_begin, std::int64_t token_end) const {
    const std::int64_t group = workspace_.group_;
    const std::int64_t count = end - begin;
    if constexpr (!std::is_same_v<decltype(variant_.transform), PlainScores>) {
      for (std::int64_t c = 0; c < columns; ++c) {
        for (std::int64_t j = 0; j < count; ++j) block.line[j] = block.scores[j * kTileColumns + c];
        variant_.transform.apply(score_row(segment, block.begin + (column + c) / group,
                                           first_head(block.kv_head) + (column + c) % group, begin),
                                 std::span<float>(block.line, static_cast<std::size_t>(count)));
        for (std::int64_t j = 0; j < count; ++j) block.scores[j * kTileColumns + c] = block.line[j];
      }
    }
    if (classify(segment, token_begin, token_end, begin, end) == TileVisibility::kAll) return;
    for (std::int64_t token = token_begin; token < token_end; ++token) {
      const std::int64_t from = std::max((token - block.begin) * group - column, std::int64_t{0});
      const std::int64_t to = std::min((token - block.begin + 1) * group - column, columns);
      const QueryInfo info = query_info(token);
      for (std::int64_t key = begin; key < end; key += kMaskKeys) {
        const std::int64_t stop = std::min(key + kMaskKeys, end);
        const TileVisibility tile = classify(segment, token, token + 1, key, stop);
        if (tile == TileVisibility::kAll) continue;
        for (std::int64_t j = key; j < stop; ++j)
          if (tile == TileVisibility::kNone ||
              !variant_.visibility.visible(info, key_info(segment, j)))
            std::fill(block.scores + (j - begin) * kTileColumns + from,
                      block.scores + (j - begin) * kTileColumns + to, kMinusInfinity);
      }
    }
  }

  void finish_block(const Block& block) {
    const std::int64_t value_cols = workspace_.value_cols_;
    const std::int64_t group = workspace_.group_;
    const std::int64_t columns = block.columns(group);
    for (std::int64_t c = 0; c < columns; c += simd::kWidth) {
      transpose(block.sums + c / kTileColumns * kTileColumns * value_cols + c % kTileColumns,
                kTileColumns, value_cols, simd::kWidth, block.rows, value_cols);
      for (std::int64_t i = 0; i < simd::kWidth && c + i < columns; ++i)
        finish(block.begin + (c + i) / group, first_head(block.kv_head) + (c + i) % group,
               block.rows + i * value_cols, {.max = block.max[c + i], .sum = block.sum[c + i]});
    }
  }

  /// Keys of a tile as rows, raw ones rotated.
  void load_keys(const SegmentType& segment, std::int64_t kv_head, std::int64_t first,
                 std::int64_t count, float* keys) const {
    for (std::int64_t j = 0; j < count; ++j, keys += workspace_.key_cols_)
      load_key(segment, kv_head, first + j, keys);
  }

  /// One key as floats, a raw one rotated.
  void load_key(const SegmentType& segment, std::int64_t kv_head, std::int64_t entry,
                float* to) const {
    const Key* const key = segment.key(kv_head, entry);
    const float* const angles = segment.key_rotation == nullptr
                                    ? nullptr
                                    : segment.key_rotation + entry * segment.key_rotation_stride;
    if constexpr (QuantisedElement<Key>) {
      widen(key, segment.key_scale(kv_head, entry), workspace_.shape_.head_dim, to);
      if (angles != nullptr) workspace_.rotary()->rotate(angles, to, to);
    } else if (angles != nullptr) {
      workspace_.rotary()->rotate(angles, key, to);
    } else {
      widen(key, nullptr, workspace_.shape_.head_dim, to);
    }
  }

  /// Values of a tile as rows; channels beyond value_dim are 0.
  void load_values(const SegmentType& segment, std::int64_t kv_head, std::int64_t first,
                   std::int64_t count, float* values) const {
    const std::int64_t dim = workspace_.shape_.value_dim;
    for (std::int64_t j = 0; j < count; ++j, values += workspace_.value_cols_) {
      widen(segment.value(kv_head, first + j), segment.value_scale(kv_head, first + j), dim,
            values);
      std::fill(values + dim, values + workspace_.value_cols_, 0.0F);
    }
  }

  template <class T>
  static void widen(const T* from, const typename KvRow<T>::Scale* scales, std::int64_t count,
                    float* to) {
    if constexpr (std::is_same_v<T, int4x2>) {
      KvRow<T>::dequantise(from, scales, count, to);
    } else {
      float scale = 1;
      if constexpr (QuantisedElement<T>) scale = *scales;
      const auto scaled = [&](auto value, auto factor) {
        if constexpr (QuantisedElement<T>) return value * factor;
        return value;
      };
      std::int64_t d = 0;
      for (; d + simd::kWidth <= count; d += simd::kWidth)
        simd::store(to + d, scaled(simd::load(from + d), simd::broadcast(scale)));
      for (; d < count; ++d) to[d] = scaled(static_cast<float>(from[d]), scale);
    }
  }

  const AttentionQuery& query_;
  std::span<const SegmentType> segments_;
  const Variant& variant_;
  HeadsView<float> out_;
  float* lse_;
  Workspace& workspace_;
  int table_of_[Workspace::kMaxSegments] = {};
};

}  // namespace detail

template <class Key, class Value, Visibility Mask, ScoreTransform Transform, SinkTerm Sink>
void attend(const AttentionQuery& query, std::span<const Segment<Key, Value>> segments,
            const AttentionVariant<Mask, Transform, Sink>& variant, HeadsView<float> out,
            float* lse, AttentionWorkspace<cpu>& workspace, ThreadTeam& team, cpu) {
  detail::CpuAttention<Key, Value, AttentionVariant<Mask, Transform, Sink>>(
      query, segments, variant, out, lse, workspace)
      .run(team);
}

}  // namespace sluice
