// SPDX-License-Identifier: MIT
/// attend() for the CPU. One query row (decoding): keys are split into runs of 256, each (KV head,
/// split) is a work item that streams its keys and values once for all query heads of the group,
/// and the partial results merge by log-sum-exp. Several rows (prefill): each (KV head, block of
/// query rows) runs an online softmax over key tiles as small matrix products; masked tiles are
/// skipped. Neither way of cutting depends on the number of threads, so neither does the result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/softmax_state.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/backend/cpu/tile_product.hpp"
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
  static constexpr int kMaxSegments = 128;

  /// `rotary` is copied; null: queries are not rotated. Allocates bytes(). Teams of at most
  /// `team_size` members may use it.
  /// \throws Error(kShape) when extents are not positive or num_qo_heads is no multiple of
  /// num_kv_heads, Error(kConfig) when team_size is below 1.
  AttentionWorkspace(const Rotary* rotary, const AttentionShape& shape, int team_size)
      : shape_(checked(rotary, shape)),
        group_(shape.num_qo_heads / shape.num_kv_heads),
        value_cols_(padded(shape.value_dim)),
        tile_tokens_(std::max<std::int64_t>(1, kTileRows / group_)),
        tile_rows_(std::min(tile_tokens_, shape.max_queries) * group_),
        max_splits_(shape.max_keys / kSplitKeys + 1 + shape.max_segments),
        partial_out_(static_cast<std::size_t>(max_splits_ * shape.num_qo_heads * shape.value_dim)),
        partial_state_(static_cast<std::size_t>(max_splits_ * shape.num_qo_heads)),
        splits_(static_cast<std::size_t>(max_splits_)) {
    if (rotary != nullptr) {
      tables_.reserve(static_cast<std::size_t>(shape.max_segments));
      for (int i = 0; i < shape.max_segments; ++i) tables_.emplace_back(*rotary, shape.max_queries);
    }
    if (team_size < 1)
      throw Error(ErrorCode::kConfig, {"no team to work for", "AttentionWorkspace", "team_size",
                                       "at least 1", std::to_string(team_size)});
    const std::int64_t decode = group_ * (padded(shape.head_dim) + kSplitKeys);
    const std::int64_t tiles = tile_rows_ * (shape.head_dim + kTileKeys + value_cols_ + 2) +
                               kTileKeys * (2 * shape.head_dim + value_cols_);
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

  static constexpr std::int64_t kSplitKeys = 256;  // keys of a decode work item
  static constexpr std::int64_t kTileKeys = 128;   // keys of a prefill tile
  static constexpr std::int64_t kTileRows = 192;   // query rows of a prefill tile

  struct Split {
    int segment;
    std::int64_t begin;
    std::int64_t end;
    bool masked;
  };

  static std::int64_t padded(std::int64_t count) {
    return (count + simd::kWidth - 1) / simd::kWidth * simd::kWidth;
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
    if (rotary != nullptr && rotary->head_dim() != shape.head_dim)
      fail("head_dim", "the rotation's, " + std::to_string(rotary->head_dim()), shape.head_dim);
    return shape;
  }

  AttentionShape shape_;
  std::int64_t group_;        // query heads of a KV head
  std::int64_t value_cols_;   // value_dim rounded up to whole registers
  std::int64_t tile_tokens_;  // tokens of a prefill tile
  std::int64_t tile_rows_;    // group_ rows each
  std::int64_t max_splits_;
  std::vector<RotaryTable> tables_;     // one per distinct reader rule of a call
  std::vector<Buffer<float>> scratch_;  // one per team member
  Buffer<float> partial_out_;           // [splits, num_qo_heads, value_dim]
  Buffer<SoftmaxState> partial_state_;  // [splits, num_qo_heads]
  Buffer<Split> splits_;
};

namespace detail {

/// One call of attend() on the CPU.
template <class Key, class Value, class Variant>
class CpuAttention {
 public:
  using Workspace = AttentionWorkspace<cpu>;
  using SegmentType = Segment<Key, Value>;
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

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
    if (query_.rows.tokens == 1 && decode_vectors() > 0)
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

  /// Registers of a head when keys and values have one width of 1, 2, 4, 8 or 16 registers; else 0.
  int decode_vectors() const {
    const std::int64_t dim = workspace_.shape_.head_dim;
    if (dim != workspace_.shape_.value_dim || dim % simd::kWidth != 0) return 0;
    const std::int64_t vectors = dim / simd::kWidth;
    return vectors <= 16 && (vectors & (vectors - 1)) == 0 ? static_cast<int>(vectors) : 0;
  }

  void decode(ThreadTeam& team) {
    std::int64_t splits = 0;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const std::int64_t keys = segments_[s].rule.visible;
      for (std::int64_t begin = 0; begin < keys; begin += Workspace::kSplitKeys) {
        const std::int64_t end = std::min(begin + Workspace::kSplitKeys, keys);
        const TileVisibility tile = classify(segments_[s], 0, 1, begin, end);
        if (tile == TileVisibility::kNone) continue;
        SLUICE_ASSERT(splits < workspace_.max_splits_);
        workspace_.splits_[static_cast<std::size_t>(splits++)] = {static_cast<int>(s), begin, end,
                                                                  tile == TileVisibility::kSome};
      }
    }
    const std::int64_t items = splits * segment_heads();
    team.run([&](int member, int members) {
      const WorkRange share = share_of(items, member, members);
      for (std::int64_t item = share.begin; item < share.end; ++item)
        decode_item(item % splits, item / splits,
                    workspace_.scratch_[static_cast<std::size_t>(member)].data());
    });
    for (std::int64_t j = 0; j < segment_heads(); ++j)
      for (std::int64_t g = 0; g < workspace_.group_; ++g) merge_splits(first_head(j) + g, splits);
  }

  void decode_item(std::int64_t split, std::int64_t kv_head, float* scratch) {
    switch (decode_vectors()) {
      case 1: return decode_heads<1>(split, kv_head, scratch);
      case 2: return decode_heads<2>(split, kv_head, scratch);
      case 4: return decode_heads<4>(split, kv_head, scratch);
      case 8: return decode_heads<8>(split, kv_head, scratch);
      default: return decode_heads<16>(split, kv_head, scratch);
    }
  }

  template <int kVectors>
  void decode_heads(std::int64_t split_index, std::int64_t kv_head, float* scratch) {
    const std::int64_t group = workspace_.group_;
    const std::int64_t first = first_head(kv_head);
    std::int64_t head = 0;
    // Values are accumulated in registers: few heads at once when heads are wide.
    if constexpr (kVectors <= 4) {
      for (; head + 4 <= group; head += 4)
        decode_block<kVectors, 4>(split_index, kv_head, first + head, scratch);
      if (head + 3 == group) {
        decode_block<kVectors, 3>(split_index, kv_head, first + head, scratch);
        return;
      }
    }
    if constexpr (kVectors <= 8)
      for (; head + 2 <= group; head += 2)
        decode_block<kVectors, 2>(split_index, kv_head, first + head, scratch);
    for (; head < group; ++head)
      decode_block<kVectors, 1>(split_index, kv_head, first + head, scratch);
  }

  /// kHeads query heads of one KV head against one split.
  template <int kVectors, int kHeads>
  void decode_block(std::int64_t split_index, std::int64_t kv_head, std::int64_t first_head,
                    float* scratch) {
    constexpr int kDim = kVectors * simd::kWidth;
    const auto& split = workspace_.splits_[static_cast<std::size_t>(split_index)];
    const SegmentType& segment = segments_[static_cast<std::size_t>(split.segment)];
    const std::int64_t count = split.end - split.begin;
    float* query = scratch;                   // [kHeads, kDim]
    float* scores = scratch + kHeads * kDim;  // [kHeads, kSplitKeys]
    for (int h = 0; h < kHeads; ++h)
      load_query(static_cast<std::size_t>(split.segment), 0, first_head + h, query + h * kDim);

    simd::VecF q[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVectors; ++v) q[h][v] = simd::load(query + h * kDim + v * simd::kWidth);
    const Key* key = segment.key(kv_head, split.begin);
    for (std::int64_t j = 0; j < count; ++j, key += segment.key_token_stride) {
      simd::VecF k[kVectors];
      if (segment.key_rotation == nullptr) {
        simd::prefetch(key + 8 * segment.key_token_stride);
        for (int v = 0; v < kVectors; ++v) k[v] = simd::load(key + v * simd::kWidth);
      } else {
        float rotated[kDim];
        workspace_.rotary()->rotate(
            segment.key_rotation + (split.begin + j) * segment.key_rotation_stride, key, rotated);
        for (int v = 0; v < kVectors; ++v) k[v] = simd::load(rotated + v * simd::kWidth);
      }
      for (int h = 0; h < kHeads; ++h) {
        simd::VecF sum = q[h][0] * k[0];
        for (int v = 1; v < kVectors; ++v) sum = simd::fma(q[h][v], k[v], sum);
        scores[h * Workspace::kSplitKeys + j] = simd::reduce_add(sum);
      }
    }

    SoftmaxState state[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      const std::span<float> row(scores + h * Workspace::kSplitKeys,
                                 static_cast<std::size_t>(count));
      variant_.transform.apply(score_row(segment, 0, first_head + h, split.begin), row);
      if (split.masked) mask_row(segment, 0, split.begin, row);
      state[h].max = row_max(row);
      if (!state[h].empty())
        state[h].sum = exponentiate(row, state[h].max);
      else
        std::fill(row.begin(), row.end(), 0.0F);
    }

    simd::VecF sum[kHeads][kVectors];
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < kVectors; ++v) sum[h][v] = simd::zero();
    const Value* value = segment.value(kv_head, split.begin);
    for (std::int64_t j = 0; j < count; ++j, value += segment.value_token_stride) {
      simd::prefetch(value + 8 * segment.value_token_stride);
      simd::VecF x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = simd::load(value + v * simd::kWidth);
      for (int h = 0; h < kHeads; ++h) {
        const simd::VecF weight = simd::broadcast(scores[h * Workspace::kSplitKeys + j]);
        for (int v = 0; v < kVectors; ++v) sum[h][v] = simd::fma(weight, x[v], sum[h][v]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      const std::int64_t row = split_index * workspace_.shape_.num_qo_heads + first_head + h;
      float* out = workspace_.partial_out_.data() + row * kDim;
      for (int v = 0; v < kVectors; ++v) simd::store(out + v * simd::kWidth, sum[h][v]);
      workspace_.partial_state_[static_cast<std::size_t>(row)] = state[h];
    }
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

  void prefill(ThreadTeam& team) {
    const std::int64_t blocks =
        (query_.rows.tokens + workspace_.tile_tokens_ - 1) / workspace_.tile_tokens_;
    const std::int64_t items = blocks * segment_heads();
    team.run([&](int member, int members) {
      float* scratch = workspace_.scratch_[static_cast<std::size_t>(member)].data();
      // Items are dealt round: later blocks see more keys than earlier ones.
      for (std::int64_t item = member; item < items; item += members)
        prefill_item(item / blocks, item % blocks, scratch);
    });
  }

  void prefill_item(std::int64_t kv_head, std::int64_t block, float* scratch) {
    const std::int64_t dim = workspace_.shape_.head_dim;
    const std::int64_t group = workspace_.group_;
    const std::int64_t value_cols = workspace_.value_cols_;
    const std::int64_t begin = block * workspace_.tile_tokens_;
    const std::int64_t end = std::min(begin + workspace_.tile_tokens_, query_.rows.tokens);
    const std::int64_t rows = (end - begin) * group;
    const std::int64_t head = first_head(kv_head);
    float* keys = scratch;                                                // [head_dim, kTileKeys]
    float* values = keys + Workspace::kTileKeys * dim;                    // [kTileKeys, value_cols]
    float* scores = values + Workspace::kTileKeys * value_cols;           // [rows, kTileKeys]
    float* sums = scores + workspace_.tile_rows_ * Workspace::kTileKeys;  // [rows, value_cols]
    float* query = sums + workspace_.tile_rows_ * value_cols;             // [rows, head_dim]
    auto* states = reinterpret_cast<SoftmaxState*>(query + workspace_.tile_rows_ * dim);  // [rows]
    float* row = query + workspace_.tile_rows_ * (dim + 2);  // [head_dim], one key
    std::fill_n(sums, rows * value_cols, 0.0F);
    std::fill_n(states, rows, SoftmaxState{});

    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const SegmentType& segment = segments_[s];
      bool loaded = false;
      for (std::int64_t first = 0; first < segment.rule.visible; first += Workspace::kTileKeys) {
        const std::int64_t last = std::min(first + Workspace::kTileKeys, segment.rule.visible);
        const TileVisibility tile = classify(segment, begin, end, first, last);
        if (tile == TileVisibility::kNone) continue;
        if (!loaded) {
          for (std::int64_t t = begin; t < end; ++t)
            for (std::int64_t g = 0; g < group; ++g)
              load_query(s, t, head + g, query + ((t - begin) * group + g) * dim);
          loaded = true;
        }
        const std::int64_t count = last - first;
        const std::int64_t cols = Workspace::padded(count);
        load_keys(segment, kv_head, first, count, cols, keys, row);
        load_values(segment, kv_head, first, count, values);
        tile_product<false>(query, dim, keys, Workspace::kTileKeys, scores, Workspace::kTileKeys,
                            rows, cols, dim);
        for (std::int64_t r = 0; r < rows; ++r) {
          float* line = scores + r * Workspace::kTileKeys;
          const std::span<float> visible(line, static_cast<std::size_t>(count));
          const std::int64_t token = begin + r / group;
          variant_.transform.apply(score_row(segment, token, head + r % group, first), visible);
          if (tile == TileVisibility::kSome) mask_row(segment, token, first, visible);
          const float max = row_max(visible);
          if (max == kMinusInfinity) {
            std::fill_n(line, count, 0.0F);
            continue;
          }
          const float factor = states[r].raise_max(max);
          if (factor != 1.0F)
            for (std::int64_t d = 0; d < value_cols; ++d) sums[r * value_cols + d] *= factor;
          states[r].sum += exponentiate(visible, states[r].max);
        }
        tile_product<true>(scores, Workspace::kTileKeys, values, value_cols, sums, value_cols, rows,
                           value_cols, count);
      }
    }
    for (std::int64_t r = 0; r < rows; ++r)
      finish(begin + r / group, head + r % group, sums + r * value_cols, states[r]);
  }

  /// Keys of a tile as columns, raw ones rotated; columns from count to cols are 0.
  void load_keys(const SegmentType& segment, std::int64_t kv_head, std::int64_t first,
                 std::int64_t count, std::int64_t cols, float* keys, float* row) const {
    const std::int64_t dim = workspace_.shape_.head_dim;
    for (std::int64_t j = 0; j < count; ++j) {
      const Key* key = segment.key(kv_head, first + j);
      if (segment.key_rotation != nullptr)
        workspace_.rotary()->rotate(
            segment.key_rotation + (first + j) * segment.key_rotation_stride, key, row);
      else
        widen(key, dim, row);
      for (std::int64_t d = 0; d < dim; ++d) keys[d * Workspace::kTileKeys + j] = row[d];
    }
    if (count < cols)
      for (std::int64_t d = 0; d < dim; ++d)
        std::fill(keys + d * Workspace::kTileKeys + count, keys + d * Workspace::kTileKeys + cols,
                  0.0F);
  }

  /// Values of a tile as rows; columns beyond value_dim are 0.
  void load_values(const SegmentType& segment, std::int64_t kv_head, std::int64_t first,
                   std::int64_t count, float* values) const {
    const std::int64_t dim = workspace_.shape_.value_dim;
    for (std::int64_t j = 0; j < count; ++j) {
      float* row = values + j * workspace_.value_cols_;
      widen(segment.value(kv_head, first + j), dim, row);
      std::fill(row + dim, row + workspace_.value_cols_, 0.0F);
    }
  }

  template <class T>
  static void widen(const T* from, std::int64_t count, float* to) {
    std::int64_t d = 0;
    for (; d + simd::kWidth <= count; d += simd::kWidth) simd::store(to + d, simd::load(from + d));
    for (; d < count; ++d) to[d] = static_cast<float>(from[d]);
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
