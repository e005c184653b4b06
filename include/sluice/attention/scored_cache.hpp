// SPDX-License-Identifier: MIT
/// A cache that keeps what scores highest under a fixed budget, per layer and KV head: SnapKV, H2O,
/// Q-Filters, SirLLM, StreamMem and what lies between them (cache/score_policy.hpp). It watches
/// attention, which is why it lives here and not beside KvCache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Keys and values of one stream of which a fixed number stays, chosen by a ScorePolicy for each
/// layer and KV head. Entries lie in order of age in one run a head, so a layer is one segment (one
/// a head where heads share a budget): at their places in the text with gaps (rotated keys), or at
/// their ranks (raw keys).
///
/// Protocol of a step: as KvCache: append(T); store() and observe() for each layer; commit() or
/// rollback(). commit() selects when less than a chunk is free; compact() selects at once. Both
/// move rows: O(entries) for each selection, which `growth` spreads over that many tokens. What was
/// observed of tokens that are rolled back leaves no trace.
///
/// Only construction allocates: bytes() of keys and values, and less than half as much again for
/// indices and scores. One thread at a time; store() of different rows may run on several. Models
/// whose scores depend on distances otherwise than by rotation (ALiBi) cannot use it: gaps are not
/// in the segment's positions.
template <RotaryElement Key, RotaryElement Value = Key>
class ScoredKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = 1;

  /// rotaries: [num_layers], each null or outliving the cache. directions: for kKeyDirection,
  /// [num_layers, num_kv_heads, head_dim], copied: an entry scores minus its (rotated) key's
  /// product with its head's (Q-Filters' stored filters); otherwise empty. sm_scale and
  /// num_qo_heads are the model's. \throws Error(kConfig) as ScorePolicy::validate, Error(kShape)
  /// for extents that do not fit.
  ScoredKvCache(const KvShape& shape, std::int64_t num_qo_heads, float sm_scale,
                const ScorePolicy& policy, std::span<const Rotary* const> rotaries,
                std::span<const float> directions = {})
      : shape_(shape),
        policy_(policy),
        group_(shape.num_kv_heads > 0 ? num_qo_heads / shape.num_kv_heads : 0),
        sm_scale_(sm_scale),
        rotaries_(rotaries.begin(), rotaries.end()),
        directions_(directions.begin(), directions.end()) {
    policy_.validate();
    check_shape(num_qo_heads);
    const std::int64_t heads = shape.num_kv_heads;
    layer_rows_ = heads * policy_.capacity();
    for (std::int32_t h = 0; h < heads; ++h) head_numbers_.push_back(h);
    blocks_.resize(static_cast<std::size_t>(shape.num_layers));
    for (std::size_t l = 0; l < blocks_.size(); ++l) blocks_[l] = static_cast<std::int64_t>(l);
    spare_ = shape.num_layers;
    const std::int64_t rows = (shape.num_layers + (shares() ? 1 : 0)) * layer_rows_;
    keys_ = Buffer<Key>(size(rows * shape.head_dim));
    values_ = Buffer<Value>(size(rows * shape.value_dim));
    indices_ = Buffer<std::int64_t>(size(rows));
    scores_ = Buffer<double>(size(rows));
    if (policy_.source == ScoreSource::kAllQueries)
      pending_ = Buffer<double>(size(shape.num_layers * layer_rows_));
    heads_.resize(size(shape.num_layers * heads));
    if (stores_queries())
      queries_ =
          Buffer<float>(size(shape.num_layers * query_slots() * num_qo_heads * shape.head_dim));
    selection_ = Buffer<double>(size(layer_rows_));
    pooled_ = Buffer<double>(size(layer_rows_));
    order_ = Buffer<std::int64_t>(size(layer_rows_));
    kept_ = Buffer<std::int64_t>(size(layer_rows_));
    row_scores_ = Buffer<float>(size(largest_head()));
    reduced_ = Buffer<double>(size(largest_head()));
    for (const Rotary* rotary : rotaries_) {
      const auto known =
          std::find(rotaries_.begin(), rotaries_.begin() + std::ssize(tables_), rotary);
      if (known - rotaries_.begin() < std::ssize(tables_)) {
        tables_.push_back(tables_[size(known - rotaries_.begin())]);
        continue;
      }
      Tables& tables = tables_.emplace_back();
      if (rotary == nullptr) continue;
      tables.queries =
          std::make_shared<RotaryTable>(*rotary, std::max(policy_.num_queries, policy_.max_chunk));
      if (policy_.position_rule != PositionRule::kInCache) continue;
      tables.ranks = std::make_shared<RotaryTable>(*rotary, largest_head());
      tables.ranks->fill_run(0, largest_head());
    }
    reset();
  }

  const KvShape& shape() const { return shape_; }
  const ScorePolicy& policy() const { return policy_; }
  /// Stream index of the next token.
  std::int64_t total() const { return total_; }
  std::int64_t committed() const { return committed_; }
  Position write_position(std::int64_t index) const {
    return policy_.origin + static_cast<Position>(index);
  }
  /// Ranks and gaps are counted here.
  bool takes_positions() const { return false; }
  std::int64_t max_chunk() const { return policy_.max_chunk; }
  /// Entries that one query can see in a layer.
  std::int64_t max_entries() const { return largest_head(); }
  /// Bytes of keys and values.
  std::size_t bytes() const { return keys_.bytes() + values_.bytes(); }
  /// Whether `tokens` more fit now. Only kProxyQueries runs out of room: it selects when asked.
  CacheStatus status(std::int64_t tokens) const {
    return total_ - committed_ + tokens <= std::min(policy_.max_chunk, room()) ? CacheStatus::kOk
                                                                               : CacheStatus::kFull;
  }
  /// Tokens that may be appended to what is committed before a selection, in every head.
  std::int64_t room() const {
    std::int64_t room = std::numeric_limits<std::int64_t>::max();
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
        room = std::min(room, room_of(l, h) - head(l, h).count);
    return room;
  }

  /// Entries of a head, uncommitted ones included.
  std::int64_t size_of(std::int64_t layer, std::int64_t kv_head) const {
    return head(layer, kv_head).count + total_ - committed_;
  }
  /// Stream indices of a head's entries, oldest first.
  std::span<const std::int64_t> kept(std::int64_t layer, std::int64_t kv_head) const {
    return {indices_.data() + row_of(layer, kv_head, 0), size(size_of(layer, kv_head))};
  }
  /// Scores of a head's committed entries, as accumulated or given (not of kLastQueries and
  /// kProxyQueries, which form them when they select).
  std::span<const double> scores(std::int64_t layer, std::int64_t kv_head) const {
    return {scores_.data() + row_of(layer, kv_head, 0), size(head(layer, kv_head).count)};
  }
  /// Selections so far, and entries that they let go.
  std::int64_t selections() const { return selections_; }
  std::int64_t evicted() const { return evicted_; }

  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
        for (std::int64_t t = 0; t < tokens; ++t) {
          const std::int64_t row = row_of(l, h, size_of(l, h) + t);
          indices_[size(row)] = total_ + t;
          scores_[size(row)] = 0;
        }
    total_ += tokens;
  }

  /// Writes keys and values of the newest tokens; as KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Rotary* rotary = rotaries_[size(layer)];
    const bool rotates = rotary != nullptr && policy_.position_rule == PositionRule::kInText;
    for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
      const std::int64_t first = size_of(layer, h) - keys.tokens;
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t row = row_of(layer, h, first + t);
        Key* key = keys_.data() + row * shape_.head_dim;
        if (rotates)
          rotary->rotate(rotation + t * rotary->row_size(), keys.head(t, h), key);
        else
          convert(keys.head(t, h), shape_.head_dim, key);
        convert(values.head(t, h), shape_.value_dim, values_.data() + row * shape_.value_dim);
        if (policy_.source == ScoreSource::kKeyDirection)
          scores_[size(row)] = -direction_score(layer, h, rotary, rotation, t, keys, rotates, key);
      }
    }
  }

  int num_classes(std::int64_t) const {
    return shares() ? static_cast<int>(shape_.num_kv_heads) : 1;
  }
  HeadClassView head_class(std::int64_t, int part = 0) const {
    HeadClassView view;
    if (shares()) view.kv_heads = {head_numbers_.data() + part, 1};
    return view;
  }
  /// The entries that the newest `queries` tokens see: one segment. Its stream indices count back
  /// from the newest, as if nothing had left: the order is true, which is what visibility asks.
  int segments(std::int64_t layer, std::int64_t queries, std::span<SegmentType, kMaxSegments> out,
               int part = 0) const {
    SLUICE_ASSERT(queries <= total_ - committed_ || queries == 0);
    static_cast<void>(queries);
    const std::int64_t count = size_of(layer, part);
    if (count == 0) return 0;
    const std::int64_t row = row_of(layer, part, 0);
    SegmentType& segment = out[0];
    segment = SegmentType{};
    segment.rule.first_index = total_ - count;
    segment.rule.count = segment.rule.visible = count;
    segment.rule.first_position = write_position(segment.rule.first_index);
    segment.keys = keys_.data() + row * shape_.head_dim;
    segment.values = values_.data() + row * shape_.value_dim;
    segment.key_token_stride = shape_.head_dim;
    segment.value_token_stride = shape_.value_dim;
    // Without shared budgets all heads of a layer have as many rows.
    segment.key_head_stride = policy_.capacity() * shape_.head_dim;
    segment.value_head_stride = policy_.capacity() * shape_.value_dim;
    if (policy_.position_rule == PositionRule::kInCache) {
      segment.rule.first_position = 0;
      segment.rule.shift = static_cast<Position>(count - total_) - policy_.origin;
      if (rotaries_[size(layer)] != nullptr) {
        segment.key_rotation = tables_[size(layer)].ranks->row(0);
        segment.key_rotation_stride = rotaries_[size(layer)]->row_size();
      }
    }
    return 1;
  }

  /// Whether observe() needs a layer's log-sum-exps.
  bool observes(std::int64_t) const {
    return policy_.source == ScoreSource::kAllQueries || stores_queries();
  }
  /// Takes in one layer's attention of the newest tokens (all of the last append()).
  void observe(const ObservedAttention<Key, Value>& seen) {
    const AttentionQuery& query = seen.query;
    if (stores_queries()) {
      if (seen.part != 0) return;  // rows hold all heads
      const std::int64_t width = query.rows.num_heads * shape_.head_dim;
      for (std::int64_t t = 0; t < query.rows.tokens; ++t)
        for (std::int64_t h = 0; h < query.rows.num_heads; ++h)
          std::copy_n(query.rows.head(t, h), shape_.head_dim,
                      stored_query(seen.layer, query.first_index + t, width) + h * shape_.head_dim);
      return;
    }
    if (policy_.source != ScoreSource::kAllQueries) return;
    const std::int64_t first = shares() ? seen.part : 0;
    const std::int64_t last = shares() ? seen.part + 1 : shape_.num_kv_heads;
    for (std::int64_t h = first; h < last; ++h) {
      const std::int64_t count = size_of(seen.layer, h);
      double* pending = pending_.data() + pending_row(seen.layer, h);
      place_queries(seen.layer, h, query.first_index, query.rows.tokens);
      for (std::int64_t t = 0; t < query.rows.tokens; ++t) {
        // The chunk's later tokens are not seen.
        const std::int64_t visible = count - (query.rows.tokens - 1 - t);
        reduce_begin(visible);
        for (std::int64_t g = 0; g < group_; ++g) {
          const std::int64_t head = h * group_ + g;
          key_scores(seen.layer, h, query.rows.head(t, head), t, visible);
          const float lse = seen.lse[t * query.rows.num_heads + head];
          for (std::int64_t j = 0; j < visible; ++j)
            row_scores_[size(j)] = std::exp(row_scores_[size(j)] - lse);
          reduce_add(g, visible);
        }
        for (std::int64_t j = 0; j < visible; ++j) pending[j] += reduced_[size(j)];
      }
    }
  }

  /// Scores of the newest tokens, uncommitted or not (kGiven): scores: of tokens total() -
  /// scores.size() .. total() - 1, the same in every layer and head.
  /// Precondition: these tokens are still there (given before the commit after which they may
  /// leave).
  void give_scores(std::span<const float> scores) {
    const auto count = static_cast<std::int64_t>(scores.size());
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        const std::int64_t first = size_of(l, h) - count;
        SLUICE_ASSERT(first >= 0 && indices_[size(row_of(l, h, first))] == total_ - count);
        for (std::int64_t t = 0; t < count; ++t)
          scores_[size(row_of(l, h, first + t))] = static_cast<double>(scores[size(t)]);
      }
  }

  /// Makes the appended tokens final; selects if less than a chunk is free then.
  void commit() {
    const std::int64_t fresh = total_ - committed_;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        head(l, h).count += fresh;
        if (policy_.source == ScoreSource::kAllQueries) add_pending(l, h);
      }
    committed_ = total_;
    if (policy_.source != ScoreSource::kProxyQueries && room() < policy_.max_chunk) select();
  }
  /// Forgets the tokens appended since the last commit, and what was observed of them.
  void rollback() {
    if (policy_.source == ScoreSource::kAllQueries)
      std::fill_n(pending_.data(), pending_.size(), 0.0);
    total_ = committed_;
  }
  /// Selects now: entries beyond the budget leave. With kProxyQueries the uncommitted tokens are
  /// the proxies: they choose among the committed entries and are forgotten. \throws Error(kOrder)
  /// with uncommitted tokens, or without any for kProxyQueries; nothing changes.
  void compact() {
    const bool proxies = policy_.source == ScoreSource::kProxyQueries;
    if (proxies != (total_ > committed_))
      throw Error(ErrorCode::kOrder,
                  {proxies ? "no proxy tokens were fed" : "uncommitted tokens",
                   "ScoredKvCache::compact", "uncommitted tokens", proxies ? "at least 1" : "0",
                   std::to_string(total_ - committed_)});
    select();
    if (proxies) rollback();
  }

  void reset() {
    total_ = committed_ = selections_ = evicted_ = 0;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
        head(l, h) = {h * policy_.capacity(), 0};
    if (policy_.source == ScoreSource::kAllQueries)
      std::fill_n(pending_.data(), pending_.size(), 0.0);
  }

 private:
  /// Where a head's rows lie in its layer's block.
  struct Head {
    std::int64_t first_row = 0;
    std::int64_t count = 0;  // committed
  };

  /// Rotations of a layer, shared by layers that rotate alike; null without a rotation.
  struct Tables {
    std::shared_ptr<RotaryTable> queries{};  // of the queries that are being scored
    std::shared_ptr<RotaryTable> ranks{};    // of entries at their ranks, kInCache
  };

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  bool shares() const { return policy_.floor < 1; }
  bool stores_queries() const {
    return policy_.source == ScoreSource::kLastQueries ||
           policy_.source == ScoreSource::kProxyQueries;
  }
  /// Queries of a chunk that is rolled back must not cost older ones.
  std::int64_t query_slots() const { return policy_.num_queries + policy_.max_chunk; }
  /// Most entries of one head: a head that takes all that others may lose.
  std::int64_t largest_head() const {
    if (!shares()) return policy_.capacity();
    return policy_.budget * shape_.num_kv_heads - (shape_.num_kv_heads - 1) * least_kept() +
           policy_.growth;
  }
  /// Entries that every head keeps when heads share.
  std::int64_t least_kept() const {
    return std::max(policy_.num_sink_tokens + policy_.recent,
                    static_cast<std::int64_t>(policy_.floor * static_cast<double>(policy_.budget)));
  }

  Head& head(std::int64_t layer, std::int64_t kv_head) {
    return heads_[size(layer * shape_.num_kv_heads + kv_head)];
  }
  const Head& head(std::int64_t layer, std::int64_t kv_head) const {
    return heads_[size(layer * shape_.num_kv_heads + kv_head)];
  }
  std::int64_t row_of(std::int64_t layer, std::int64_t kv_head, std::int64_t entry) const {
    return blocks_[size(layer)] * layer_rows_ + head(layer, kv_head).first_row + entry;
  }
  /// Pending shares stay with the layer: a block may become another's.
  std::int64_t pending_row(std::int64_t layer, std::int64_t kv_head) const {
    return layer * layer_rows_ + head(layer, kv_head).first_row;
  }
  float* stored_query(std::int64_t layer, std::int64_t index, std::int64_t width) {
    return queries_.data() + (layer * query_slots() + index % query_slots()) * width;
  }

  /// Rows of a head, taken or free.
  std::int64_t room_of(std::int64_t layer, std::int64_t kv_head) const {
    const bool last = kv_head + 1 == shape_.num_kv_heads;
    return (last ? layer_rows_ : head(layer, kv_head + 1).first_row) -
           head(layer, kv_head).first_row;
  }

  void add_pending(std::int64_t layer, std::int64_t kv_head) {
    double* pending = pending_.data() + pending_row(layer, kv_head);
    double* scores = scores_.data() + row_of(layer, kv_head, 0);
    const std::int64_t count = head(layer, kv_head).count;
    for (std::int64_t j = 0; j < count; ++j) scores[j] += pending[j];
    std::fill_n(pending, count, 0.0);
  }

  // ---- scores --------------------------------------------------------------------------------

  /// Forms the rotations of `count` queries from token `first` on: heads and layers that place them
  /// alike find them formed.
  void place_queries(std::int64_t layer, std::int64_t kv_head, std::int64_t first,
                     std::int64_t count) {
    if (tables_[size(layer)].queries == nullptr) return;
    // The newest entry is token total() - 1, at the last rank.
    const std::int64_t rank = size_of(layer, kv_head) - (total_ - first);
    tables_[size(layer)].queries->fill_run(policy_.position_rule == PositionRule::kInCache
                                               ? static_cast<Position>(rank)
                                               : write_position(first),
                                           count);
  }

  /// row_scores_[j] = sm_scale <R(reader) q, key j> for the first `count` entries. placed: which of
  /// the placed queries it is.
  void key_scores(std::int64_t layer, std::int64_t kv_head, const float* query, std::int64_t placed,
                  std::int64_t count) {
    const std::int64_t dim = shape_.head_dim;
    const Rotary* rotary = rotaries_[size(layer)];
    const Tables& tables = tables_[size(layer)];
    const bool ranks = policy_.position_rule == PositionRule::kInCache;
    float q[kMaxRotaryDim];
    float k[kMaxRotaryDim];
    if (rotary == nullptr)
      std::copy_n(query, dim, q);
    else
      rotary->rotate(tables.queries->row(placed), query, q);
    for (std::int64_t d = 0; d < dim; ++d) q[d] *= sm_scale_;
    const Key* key = keys_.data() + row_of(layer, kv_head, 0) * dim;
    const std::int64_t whole = dim - dim % simd::kWidth;
    for (std::int64_t j = 0; j < count; ++j, key += dim) {
      simd::VecF sum = simd::zero();
      float rest = 0;
      if (ranks && rotary != nullptr) {
        rotary->rotate(tables.ranks->row(j), key, k);
        for (std::int64_t d = 0; d < whole; d += simd::kWidth)
          sum = simd::fma(simd::load(q + d), simd::load(k + d), sum);
        for (std::int64_t d = whole; d < dim; ++d) rest += q[d] * k[d];
      } else {
        for (std::int64_t d = 0; d < whole; d += simd::kWidth)
          sum = simd::fma(simd::load(q + d), simd::load(key + d), sum);
        for (std::int64_t d = whole; d < dim; ++d) rest += q[d] * static_cast<float>(key[d]);
      }
      row_scores_[size(j)] = simd::reduce_add(sum) + rest;
    }
  }

  void reduce_begin(std::int64_t count) { std::fill_n(reduced_.data(), count, 0.0); }
  /// Adds row_scores_, which hold shares, of query head g of the group.
  void reduce_add(std::int64_t g, std::int64_t count) {
    const double weight =
        policy_.group_reduction == GroupReduction::kMean ? 1.0 / static_cast<double>(group_) : 1.0;
    for (std::int64_t j = 0; j < count; ++j) {
      const double share = static_cast<double>(row_scores_[size(j)]);
      if (policy_.group_reduction == GroupReduction::kMax)
        reduced_[size(j)] = g == 0 ? share : std::max(reduced_[size(j)], share);
      else
        reduced_[size(j)] += weight * share;
    }
  }

  double direction_score(std::int64_t layer, std::int64_t kv_head, const Rotary* rotary,
                         const float* rotation, std::int64_t t, HeadsView<const float> keys,
                         bool rotates, const Key* stored) const {
    const float* direction =
        directions_.data() + (layer * shape_.num_kv_heads + kv_head) * shape_.head_dim;
    float rotated[kMaxRotaryDim];
    const bool raw = !rotates && rotary != nullptr;
    if (raw) rotary->rotate(rotation + t * rotary->row_size(), keys.head(t, kv_head), rotated);
    double sum = 0;
    for (std::int64_t d = 0; d < shape_.head_dim; ++d)
      sum += static_cast<double>(direction[d]) *
             static_cast<double>(raw ? rotated[d] : static_cast<float>(stored[d]));
    return sum;
  }

  /// Shares of the last (or the proxies') queries, summed into `to`. count: entries that may leave
  /// or be pooled, committed ones; of kLastQueries those before the queries' own.
  void query_votes(std::int64_t layer, std::int64_t kv_head, std::int64_t count, double* to) {
    const bool proxies = policy_.source == ScoreSource::kProxyQueries;
    const std::int64_t width = shape_.num_kv_heads * group_ * shape_.head_dim;
    const std::int64_t last = proxies ? total_ : committed_;
    const std::int64_t most = proxies ? total_ - committed_ : committed_;
    const std::int64_t queries = std::min(policy_.num_queries, most);
    const std::int64_t entries = head(layer, kv_head).count;
    const std::int64_t* index = indices_.data() + row_of(layer, kv_head, 0);
    std::fill_n(to, count, 0.0);
    place_queries(layer, kv_head, last - queries, queries);
    for (std::int64_t token = last - queries; token < last; ++token) {
      const float* row = stored_query(layer, token, width);
      // Proxies attend to what may leave alone; a query of the stream to what is not after it.
      const std::int64_t first = proxies ? policy_.num_sink_tokens : 0;
      std::int64_t visible = entries;
      while (!proxies && visible > 0 && index[visible - 1] > token) --visible;
      reduce_begin(visible);
      for (std::int64_t g = 0; g < group_; ++g) {
        key_scores(layer, kv_head, row + (kv_head * group_ + g) * shape_.head_dim,
                   token - (last - queries), visible);
        float max = -std::numeric_limits<float>::infinity();
        for (std::int64_t j = first; j < visible; ++j) max = std::max(max, row_scores_[size(j)]);
        double sum = 0;
        for (std::int64_t j = 0; j < visible; ++j) {
          row_scores_[size(j)] = j < first ? 0.0F : std::exp(row_scores_[size(j)] - max);
          sum += static_cast<double>(row_scores_[size(j)]);
        }
        for (std::int64_t j = 0; j < visible; ++j)
          row_scores_[size(j)] =
              static_cast<float>(static_cast<double>(row_scores_[size(j)]) / sum);
        reduce_add(g, visible);
      }
      for (std::int64_t j = 0; j < std::min(count, visible); ++j) to[j] += reduced_[size(j)];
    }
    if (policy_.query_reduction == QueryReduction::kMean && queries > 0)
      for (std::int64_t j = 0; j < count; ++j)
        to[j] /= static_cast<double>(proxies ? queries : std::min(queries, last - index[j]));
  }

  /// What a head's entries are chosen by, pooled. selection_ and pooled_ at the head's rows.
  void selection_scores(std::int64_t layer, std::int64_t kv_head) {
    const Head& at = head(layer, kv_head);
    double* raw = selection_.data() + at.first_row;
    // Votes are for what lies before the window that votes.
    std::int64_t count = at.count;
    const std::int64_t* index = indices_.data() + row_of(layer, kv_head, 0);
    if (stores_queries()) {
      if (policy_.source == ScoreSource::kLastQueries)
        while (count > 0 && index[count - 1] >= committed_ - policy_.num_queries) --count;
      query_votes(layer, kv_head, count, raw);
      std::fill_n(raw + count, at.count - count, 0.0);
    } else {
      const double* scores = scores_.data() + row_of(layer, kv_head, 0);
      const bool mean = policy_.source == ScoreSource::kAllQueries &&
                        policy_.query_reduction == QueryReduction::kMean;
      for (std::int64_t j = 0; j < count; ++j)
        raw[j] = mean ? scores[j] / static_cast<double>(committed_ - index[j]) : scores[j];
    }
    double* pooled = pooled_.data() + at.first_row;
    pool_scores({raw, size(count)}, policy_.pooling, policy_.pool_size, {pooled, size(count)});
    std::copy_n(pooled, count, raw);
  }

  // ---- selection -----------------------------------------------------------------------------

  void select() {
    ++selections_;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) selection_scores(l, h);
      if (shares())
        select_shared(l);
      else
        for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) select_alone(l, h);
    }
  }

  void select_alone(std::int64_t layer, std::int64_t kv_head) {
    Head& at = head(layer, kv_head);
    const std::span<std::int64_t> kept(kept_.data(), size(layer_rows_));
    const std::int64_t stay = select_entries({selection_.data() + at.first_row, size(at.count)},
                                             policy_.keep_rule(), order_.span(), kept);
    for (std::int64_t i = 0; i < stay; ++i) move_row(layer, kv_head, kept[size(i)], i);
    evicted_ += at.count - stay;
    at.count = stay;  // rows of proxies do not follow: they are about to be forgotten
    decay(layer, kv_head);
  }

  /// Chooses among all heads of a layer and lays them out anew in the spare block.
  void select_shared(std::int64_t layer) {
    const std::int64_t heads = shape_.num_kv_heads;
    const KeepRule own{policy_.num_sink_tokens, policy_.recent, least_kept(), -1};
    // First what every head keeps, marked by a score above all others.
    std::int64_t left = heads * policy_.budget;
    for (std::int64_t h = 0; h < heads; ++h) {
      const Head& at = head(layer, h);
      double* scores = selection_.data() + at.first_row;
      const std::int64_t stay =
          select_entries({scores, size(at.count)}, own, order_.span(), kept_.span());
      for (std::int64_t i = 0; i < stay; ++i)
        scores[kept_[size(i)]] = std::numeric_limits<double>::infinity();
      left -= stay;
    }
    // Then the best of the rest, whoever has them. order_ holds rows of the layer.
    std::int64_t candidates = 0;
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t j = 0; j < head(layer, h).count; ++j) {
        const std::int64_t row = head(layer, h).first_row + j;
        if (selection_[size(row)] != std::numeric_limits<double>::infinity())
          order_[size(candidates++)] = row;
      }
    const auto value = [&](std::int64_t row) {
      const double score = selection_[size(row)];
      return std::isnan(score) ? -std::numeric_limits<double>::infinity() : score;
    };
    const auto begin = order_.span().begin();
    if (left < candidates)
      std::nth_element(begin, begin + left, begin + candidates,
                       [&](std::int64_t a, std::int64_t b) {
                         return value(a) != value(b) ? value(a) > value(b) : a < b;
                       });
    for (std::int64_t i = 0; i < std::min(left, candidates); ++i)
      selection_[size(order_[size(i)])] = std::numeric_limits<double>::infinity();
    // Rows go to the spare block, each head with room to grow.
    const std::int64_t from_block = blocks_[size(layer)];
    std::int64_t next_row = 0;
    for (std::int64_t h = 0; h < heads; ++h) {
      Head& at = head(layer, h);
      const std::int64_t first = next_row;
      for (std::int64_t j = 0; j < at.count; ++j) {
        if (selection_[size(at.first_row + j)] != std::numeric_limits<double>::infinity()) continue;
        copy_row(from_block * layer_rows_ + at.first_row + j, spare_ * layer_rows_ + next_row++);
      }
      evicted_ += at.count - (next_row - first);
      at = {first, next_row - first};
      next_row += policy_.growth;
    }
    blocks_[size(layer)] = spare_;
    spare_ = from_block;
    for (std::int64_t h = 0; h < heads; ++h) decay(layer, h);
  }

  void decay(std::int64_t layer, std::int64_t kv_head) {
    if (policy_.decay == 1) return;
    double* scores = scores_.data() + row_of(layer, kv_head, 0);
    for (std::int64_t j = 0; j < head(layer, kv_head).count; ++j) scores[j] *= policy_.decay;
  }

  void move_row(std::int64_t layer, std::int64_t kv_head, std::int64_t from, std::int64_t to) {
    if (from != to) copy_row(row_of(layer, kv_head, from), row_of(layer, kv_head, to));
  }
  void copy_row(std::int64_t from, std::int64_t to) {
    std::copy_n(keys_.data() + from * shape_.head_dim, shape_.head_dim,
                keys_.data() + to * shape_.head_dim);
    std::copy_n(values_.data() + from * shape_.value_dim, shape_.value_dim,
                values_.data() + to * shape_.value_dim);
    indices_[size(to)] = indices_[size(from)];
    scores_[size(to)] = scores_[size(from)];
  }

  template <class T>
  static void convert(const float* from, std::int64_t count, T* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }

  void check_shape(std::int64_t num_qo_heads) const {
    const auto fail = [](const char* field, const std::string& expected, std::int64_t found) {
      throw Error(ErrorCode::kShape, {"cache shape does not fit", "ScoredKvCache", field, expected,
                                      std::to_string(found)});
    };
    const KvShape& s = shape_;
    constexpr std::int64_t kMostHeads = 1024;
    if (s.num_layers < 1) fail("num_layers", "at least 1", s.num_layers);
    if (s.num_kv_heads < 1 || s.num_kv_heads > kMostHeads)
      fail("num_kv_heads", "1 to " + std::to_string(kMostHeads), s.num_kv_heads);
    if (s.head_dim < 1 || s.head_dim > kMaxRotaryDim)
      fail("head_dim", "1 to " + std::to_string(kMaxRotaryDim), s.head_dim);
    if (s.value_dim < 1) fail("value_dim", "at least 1", s.value_dim);
    if (num_qo_heads < 1 || num_qo_heads % s.num_kv_heads != 0)
      fail("num_qo_heads", "a multiple of num_kv_heads = " + std::to_string(s.num_kv_heads),
           num_qo_heads);
    if (static_cast<std::int64_t>(rotaries_.size()) != s.num_layers)
      fail("rotaries", std::to_string(s.num_layers) + " entries",
           static_cast<std::int64_t>(rotaries_.size()));
    for (const Rotary* rotary : rotaries_)
      if (rotary != nullptr && rotary->head_dim() != s.head_dim)
        fail("rotary head_dim", std::to_string(s.head_dim), rotary->head_dim());
    const std::int64_t wanted = policy_.source == ScoreSource::kKeyDirection
                                    ? s.num_layers * s.num_kv_heads * s.head_dim
                                    : 0;
    if (static_cast<std::int64_t>(directions_.size()) != wanted)
      fail("directions", std::to_string(wanted) + " numbers",
           static_cast<std::int64_t>(directions_.size()));
    constexpr std::int64_t kMost = std::int64_t{1} << 50;
    if (policy_.capacity() >
        kMost / s.num_kv_heads / std::max(s.head_dim, s.value_dim) / (s.num_layers + 1))
      fail("capacity", "at most 2^50 elements", policy_.capacity());
  }

  KvShape shape_;
  ScorePolicy policy_;
  std::int64_t group_;
  float sm_scale_;
  std::vector<const Rotary*> rotaries_;
  std::vector<float> directions_;           // [layers, kv heads, head_dim] or empty
  std::vector<std::int32_t> head_numbers_;  // 0, 1, ..: a class for each where heads share
  std::vector<Tables> tables_;              // [layers]
  std::int64_t layer_rows_ = 0;             // rows of a block
  std::vector<std::int64_t> blocks_;        // of each layer
  std::int64_t spare_ = 0;                  // the block that no layer has
  std::vector<Head> heads_;                 // [layers, kv heads]
  Buffer<Key> keys_;                        // [blocks, rows, head_dim]
  Buffer<Value> values_;                    // [blocks, rows, value_dim]
  Buffer<std::int64_t> indices_;            // [blocks, rows], stream indices
  Buffer<double> scores_;                   // [blocks, rows]
  Buffer<double> pending_;                  // [layers, rows], observed of uncommitted queries
  Buffer<float> queries_;                   // [layers, slots, qo heads, head_dim]
  Buffer<double> selection_;                // [rows], of the layer that selects
  Buffer<double> pooled_;                   // [rows]
  Buffer<std::int64_t> order_;
  Buffer<std::int64_t> kept_;
  Buffer<float> row_scores_;  // [entries of a head], one query head
  Buffer<double> reduced_;    // [entries of a head], one query
  std::int64_t total_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t selections_ = 0;
  std::int64_t evicted_ = 0;
};

}  // namespace sluice
