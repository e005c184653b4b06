// SPDX-License-Identifier: MIT
/// A cache that keeps what scores highest under a fixed budget, per layer and KV head: SnapKV, H2O,
/// Q-Filters, SirLLM, StreamMem and what lies between them (cache/score_policy.hpp). It watches
/// attention, which is why it lives here and not beside KvCache.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/backend/cpu/attend_kernels.hpp"
#include "sluice/backend/cpu/simd.hpp"
#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
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
/// observed of tokens that are rolled back leaves no trace. Given a team, commit() and compact()
/// select for several heads at once, with the same result.
///
/// Only construction allocates: bytes() of keys and values, less than half as much again for
/// indices and scores, and where queries vote floats for one layer's keys. One thread at a time;
/// store() of different rows may run on several. Models
/// whose scores depend on distances otherwise than by rotation (ALiBi) cannot use it: gaps are not
/// in the segment's positions.
template <RotaryElement Key, RotaryElement Value = Key>
class ScoredKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = 1;

 private:
  /// Where a head's rows lie in its layer's block.
  struct Head {
    std::int64_t first_row = 0;
    std::int64_t count = 0;  // committed
  };
  /// The state beside the rows, with nothing uncommitted.
  struct Counters {
    std::int64_t total = 0;
    std::int64_t selections = 0;
    std::int64_t evicted = 0;
    std::int64_t fresh = 0;
    std::int64_t spare = 0;
    TokenKind kind = TokenKind::kText;
  };

 public:
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
    kinds_ = Buffer<TokenKind>(size(rows));
    folded_ = Buffer<std::int32_t>(size(rows));
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
    evicted_of_head_.resize(size(heads));
    row_scores_ = Buffer<float>(size(heads * largest_head()));
    reduced_ = Buffer<double>(size(heads * largest_head()));
    if (stores_queries() || (policy_.source == ScoreSource::kAllQueries &&
                             policy_.position_rule == PositionRule::kInCache))
      plain_keys_ = Buffer<float>(size(heads * panel_rows() * shape.head_dim));
    if (stores_queries()) {
      panel_query_ = Buffer<float>(size(heads * shape.head_dim * detail::kTileColumns));
      panel_scores_ = Buffer<float>(size(heads * panel_rows() * detail::kTileColumns));
    }
    if (policy_.frame_size > 0)
      prototypes_ = Buffer<float>(size(heads * most_prototypes() * prototype_width()));
    if (policy_.frame_size > 0) prototype_of_.resize(size(heads * most_prototypes()));
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
    if (policy_.frame_size > 0 && policy_.position_rule == PositionRule::kInText)
      for (std::size_t l = 0; l < tables_.size(); ++l) {
        if (rotaries_[l] == nullptr) continue;
        const auto known =
            std::find(rotaries_.begin(), rotaries_.begin() + std::ssize(tables_), rotaries_[l]) -
            rotaries_.begin();
        Tables& tables = tables_[l];
        if (size(known) < l) {
          tables.turns = tables_[size(known)].turns;
          continue;
        }
        // From a token of a frame to the frame's middle.
        const std::int64_t width = rotaries_[l]->row_size();
        tables.turns = std::make_shared<std::vector<float>>(size(policy_.frame_size * width));
        for (std::int64_t i = 0; i < policy_.frame_size; ++i)
          rotaries_[l]->pure_angles(
              static_cast<Position>(policy_.frame_size - 1) / 2 - static_cast<Position>(i),
              tables.turns->data() + i * width);
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
  /// How many tokens each of a head's entries stands for: 1, or the frame's where it is a prototype
  /// (ScorePolicy::frame_size), whose index is that of the frame's middle, rounded down.
  std::span<const std::int32_t> folded(std::int64_t layer, std::int64_t kv_head) const {
    return {folded_.data() + row_of(layer, kv_head, 0), size(size_of(layer, kv_head))};
  }
  /// What each of a head's entries is.
  std::span<const TokenKind> kinds(std::int64_t layer, std::int64_t kv_head) const {
    return {kinds_.data() + row_of(layer, kv_head, 0), size(size_of(layer, kv_head))};
  }
  /// Selections so far, and entries that they let go (those that a prototype stands for too).
  std::int64_t selections() const { return selections_; }
  std::int64_t evicted() const { return evicted_; }
  /// Tokens that may follow the first `fed`, selections between them: no limit.
  std::int64_t room_behind(std::int64_t) const { return std::numeric_limits<std::int64_t>::max(); }
  /// Tokens that can be taken back: those that are not committed.
  std::int64_t max_truncate() const { return total_ - committed_; }

  /// What tokens are that are appended from now on (ScorePolicy::may_leave). kText at first and
  /// after reset().
  void set_kind(TokenKind kind) { kind_ = kind; }

  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
        for (std::int64_t t = 0; t < tokens; ++t) {
          const std::int64_t row = row_of(l, h, size_of(l, h) + t);
          indices_[size(row)] = total_ + t;
          kinds_[size(row)] = kind_;
          folded_[size(row)] = 1;
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
      if (turns_keys(seen.layer)) widen_keys(seen.layer, h, count);
      for (std::int64_t t = 0; t < query.rows.tokens; ++t) {
        // The chunk's later tokens are not seen.
        const std::int64_t visible = count - (query.rows.tokens - 1 - t);
        double* reduced = reduced_of(h);
        std::fill_n(reduced, visible, 0.0);
        for (std::int64_t g = 0; g < group_; ++g) {
          const std::int64_t head = h * group_ + g;
          key_scores(seen.layer, h, query.rows.head(t, head), t, visible);
          exponentiate(row_scores_of(h), visible, seen.lse[t * query.rows.num_heads + head]);
          reduce_add(h, g, visible, 1);
        }
        for (std::int64_t j = 0; j < visible; ++j) pending[j] += reduced[j];
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
  void commit() { finish(nullptr); }
  void commit(ThreadTeam& team) { finish(&team); }
  /// Forgets the tokens appended since the last commit, and what was observed of them.
  void rollback() {
    if (policy_.source == ScoreSource::kAllQueries)
      std::fill_n(pending_.data(), pending_.size(), 0.0);
    total_ = committed_;
  }
  /// Selects now: entries beyond the budget leave. With kProxyQueries the uncommitted tokens are
  /// the proxies: they choose among the committed entries and are forgotten. \throws Error(kOrder)
  /// with uncommitted tokens, or without any for kProxyQueries; nothing changes.
  void compact() { select_now(nullptr); }
  void compact(ThreadTeam& team) { select_now(&team); }

  void reset() {
    total_ = committed_ = selections_ = evicted_ = fresh_ = 0;
    kind_ = TokenKind::kText;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
        head(l, h) = {h * policy_.capacity(), 0};
    if (policy_.source == ScoreSource::kAllQueries)
      std::fill_n(pending_.data(), pending_.size(), 0.0);
  }

  /// A state that revert() returns to: a copy of everything.
  struct Checkpoint {
    Buffer<Key> keys;
    Buffer<Value> values;
    Buffer<std::int64_t> indices;
    Buffer<TokenKind> kinds;
    Buffer<std::int32_t> folded;
    Buffer<double> scores;
    Buffer<float> queries;
    std::vector<Head> heads;
    std::vector<std::int64_t> blocks;
    Counters counters;
    std::size_t bytes() const {
      return keys.bytes() + values.bytes() + indices.bytes() + kinds.bytes() + folded.bytes() +
             scores.bytes() + queries.bytes();
    }
    std::int64_t total() const { return counters.total; }
    std::int64_t max_truncate() const { return 0; }
  };

  /// An empty checkpoint with all the room that capture() needs. Allocates it.
  Checkpoint make_checkpoint() const {
    Checkpoint made;
    made.keys = Buffer<Key>(keys_.size());
    made.values = Buffer<Value>(values_.size());
    made.indices = Buffer<std::int64_t>(indices_.size());
    made.kinds = Buffer<TokenKind>(kinds_.size());
    made.folded = Buffer<std::int32_t>(folded_.size());
    made.scores = Buffer<double>(scores_.size());
    made.queries = Buffer<float>(queries_.size());
    made.heads = heads_;
    made.blocks = blocks_;
    return made;
  }
  /// Takes the state of now. Allocates nothing. Precondition: nothing is uncommitted, `checkpoint`
  /// is of this cache or of one made alike.
  void capture(Checkpoint& checkpoint) const {
    SLUICE_ASSERT(total_ == committed_);
    transfer(*this, checkpoint);
    checkpoint.counters = counters();
  }
  /// Returns to a captured state, exactly. Allocates nothing.
  void revert(const Checkpoint& checkpoint) {
    restore_from(checkpoint);
    set(checkpoint.counters);
  }
  /// Becomes a copy of `other`, a cache made alike. Allocates nothing. Precondition: nothing is
  /// uncommitted in `other`.
  void copy_from(const ScoredKvCache& other) {
    SLUICE_ASSERT(other.total_ == other.committed_ && keys_.size() == other.keys_.size());
    copy(other.keys_, keys_);
    copy(other.values_, values_);
    copy(other.indices_, indices_);
    copy(other.kinds_, kinds_);
    copy(other.folded_, folded_);
    copy(other.scores_, scores_);
    copy(other.queries_, queries_);
    heads_ = other.heads_;
    blocks_ = other.blocks_;
    set(other.counters());
  }
  /// An empty cache made alike. Allocates it.
  ScoredKvCache sibling() const {
    return ScoredKvCache(shape_, group_ * shape_.num_kv_heads, sm_scale_, policy_, rotaries_,
                         directions_);
  }

  /// Appends policy, entries and scores. Allocates in the writer. \throws Error(kOrder) with
  /// uncommitted tokens.
  void save(ByteWriter& writer) const {
    if (total_ != committed_)
      throw Error(ErrorCode::kOrder, {"uncommitted tokens", "ScoredKvCache::save",
                                      "appended tokens", "0", std::to_string(total_ - committed_)});
    for (const auto& [field, value] : identity()) writer.write<std::int64_t>(value);
    for (const double value : {policy_.floor, policy_.decay, policy_.origin})
      writer.write<double>(value);
    const Counters now = counters();
    for (const std::int64_t value : {now.total, now.selections, now.evicted, now.fresh,
                                     static_cast<std::int64_t>(now.kind), now.spare})
      writer.write<std::int64_t>(value);
    for (const std::int64_t block : blocks_) writer.write<std::int64_t>(block);
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        writer.write<std::int64_t>(head(l, h).first_row);
        writer.write<std::int64_t>(head(l, h).count);
      }
    each_row(*this, [&](std::int64_t row) {
      writer.write<std::int64_t>(indices_[size(row)]);
      writer.write<std::uint8_t>(static_cast<std::uint8_t>(kinds_[size(row)]));
      writer.write<std::int32_t>(folded_[size(row)]);
      writer.write<double>(scores_[size(row)]);
      detail::put_elements(writer, std::span<const Key>(keys_.data() + row * shape_.head_dim,
                                                        size(shape_.head_dim)));
      detail::put_elements(writer, std::span<const Value>(values_.data() + row * shape_.value_dim,
                                                          size(shape_.value_dim)));
    });
    writer.write_span(queries_.span());
  }
  /// Takes over a saved state. \throws Error(kFormat) naming the field when it was saved under
  /// another shape, type or policy, or breaks an invariant; the cache is then reset.
  void restore(ByteReader& reader) {
    reset();
    try {
      read_state(reader);
    } catch (...) {
      for (std::size_t l = 0; l < blocks_.size(); ++l) blocks_[l] = static_cast<std::int64_t>(l);
      spare_ = shape_.num_layers;
      reset();
      throw;
    }
  }

 private:
  struct Prototype {
    std::int64_t index = 0;
    TokenKind kind = TokenKind::kText;
  };

  /// Rotations of a layer, shared by layers that rotate alike; null without a rotation.
  struct Tables {
    std::shared_ptr<RotaryTable> queries{};       // of the queries that are being scored
    std::shared_ptr<RotaryTable> ranks{};         // of entries at their ranks, kInCache
    std::shared_ptr<std::vector<float>> turns{};  // [frame_size, row_size], to a frame's middle
  };

  Counters counters() const { return {total_, selections_, evicted_, fresh_, spare_, kind_}; }
  void set(const Counters& to) {
    total_ = committed_ = to.total;
    selections_ = to.selections;
    evicted_ = to.evicted;
    fresh_ = to.fresh;
    spare_ = to.spare;
    kind_ = to.kind;
    if (policy_.source == ScoreSource::kAllQueries)
      std::fill_n(pending_.data(), pending_.size(), 0.0);
  }
  template <class T>
  static void copy(const Buffer<T>& from, Buffer<T>& to) {
    std::copy_n(from.data(), from.size(), to.data());
  }
  static void transfer(const ScoredKvCache& from, Checkpoint& to) {
    copy(from.keys_, to.keys);
    copy(from.values_, to.values);
    copy(from.indices_, to.indices);
    copy(from.kinds_, to.kinds);
    copy(from.folded_, to.folded);
    copy(from.scores_, to.scores);
    copy(from.queries_, to.queries);
    to.heads = from.heads_;
    to.blocks = from.blocks_;
  }
  void restore_from(const Checkpoint& from) {
    copy(from.keys, keys_);
    copy(from.values, values_);
    copy(from.indices, indices_);
    copy(from.kinds, kinds_);
    copy(from.folded, folded_);
    copy(from.scores, scores_);
    copy(from.queries, queries_);
    heads_ = from.heads;
    blocks_ = from.blocks;
  }

  /// What a snapshot must agree with, in order.
  std::array<std::pair<const char*, std::int64_t>, 22> identity() const {
    const auto number = [](auto value) {
      return static_cast<std::int64_t>(value);
    };
    std::int64_t leaves = 0;
    for (const bool may : policy_.may_leave) leaves = 2 * leaves + (may ? 1 : 0);
    return {{{"key type", number(KvRow<Key>::kTag)},
             {"value type", number(KvRow<Value>::kTag)},
             {"num_layers", shape_.num_layers},
             {"num_kv_heads", shape_.num_kv_heads},
             {"head_dim", shape_.head_dim},
             {"value_dim", shape_.value_dim},
             {"query heads of a KV head", group_},
             {"source", number(policy_.source)},
             {"num_queries", policy_.num_queries},
             {"query_reduction", number(policy_.query_reduction)},
             {"group_reduction", number(policy_.group_reduction)},
             {"pooling", number(policy_.pooling)},
             {"pool_size", policy_.pool_size},
             {"num_sink_tokens", policy_.num_sink_tokens},
             {"recent", policy_.recent},
             {"budget", policy_.budget},
             {"top", policy_.top},
             {"growth", policy_.growth},
             {"max_chunk", policy_.max_chunk},
             {"position_rule", number(policy_.position_rule)},
             {"may_leave", leaves},
             {"frame_size", policy_.frame_size}}};
  }

  /// Calls visit(row) for every entry, in a fixed order.
  template <class Visit>
  static void each_row(const ScoredKvCache& cache, Visit&& visit) {
    for (std::int64_t l = 0; l < cache.shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < cache.shape_.num_kv_heads; ++h)
        for (std::int64_t j = 0; j < cache.head(l, h).count; ++j) visit(cache.row_of(l, h, j));
  }

  void read_state(ByteReader& reader) {
    const auto require = [&](bool good, const char* field) {
      if (!good)
        throw Error(ErrorCode::kFormat,
                    {"inconsistent snapshot", reader.source(), field, "a consistent value", ""});
    };
    for (const auto& [field, value] : identity()) reader.read_expected<std::int64_t>(field, value);
    for (const double value : {policy_.floor, policy_.decay, policy_.origin})
      require(reader.read<double>("policy") == value, "policy");
    Counters loaded;
    loaded.total = reader.read<std::int64_t>("total");
    loaded.selections = reader.read<std::int64_t>("selections");
    loaded.evicted = reader.read<std::int64_t>("evicted");
    loaded.fresh = reader.read<std::int64_t>("fresh");
    const auto kind = reader.read<std::int64_t>("kind");
    loaded.spare = reader.read<std::int64_t>("spare");
    constexpr std::int64_t kMost = std::int64_t{1} << 53;  // what follows must not overflow
    require(loaded.total >= 0 && loaded.total <= kMost, "total");
    require(loaded.selections >= 0 && loaded.selections <= kMost, "selections");
    require(loaded.evicted >= 0 && loaded.evicted <= std::int64_t{1} << 62, "evicted");
    require(loaded.fresh >= 0 && loaded.fresh <= loaded.total, "fresh");
    require(kind >= 0 && kind < static_cast<std::int64_t>(kNumTokenKinds), "kind");
    loaded.kind = static_cast<TokenKind>(kind);
    // Every block is some layer's, or the spare.
    std::vector<bool> taken(blocks_.size() + 1);
    const auto take = [&](std::int64_t block) {
      require(block >= 0 && block <= shape_.num_layers && !taken[size(block)], "block");
      taken[size(block)] = true;
      return block;
    };
    static_cast<void>(take(loaded.spare));
    require(shares() || loaded.spare == shape_.num_layers, "block");
    for (std::int64_t& block : blocks_) block = take(reader.read<std::int64_t>("block"));
    for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
      std::int64_t next = 0;
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        Head& at = head(l, h);
        at.first_row = reader.read<std::int64_t>("first row");
        at.count = reader.read<std::int64_t>("entries");
        require(at.first_row >= next && at.first_row <= layer_rows_, "first row");
        require(shares() || at.first_row == h * policy_.capacity(), "first row");
        require(at.count >= 0 && at.count <= layer_rows_ - at.first_row &&
                    at.count <= std::min(loaded.total, largest_head()),
                "entries");
        next = at.first_row + at.count;
      }
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
        require(
            head(l, h).count <= room_of(l, h) && (shares() || head(l, h).count == head(0, 0).count),
            "entries");
    }
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        std::int64_t last = -1;
        for (std::int64_t j = 0; j < head(l, h).count; ++j) {
          const std::int64_t row = row_of(l, h, j);
          const auto index = reader.read<std::int64_t>("index");
          const auto of_row = reader.read<std::uint8_t>("kind");
          const auto folded = reader.read<std::int32_t>("folded");
          require(of_row < kNumTokenKinds, "kind");
          require(folded == 1 || (folded > 1 && folded == policy_.frame_size), "folded");
          require(
              index >= 0 && index < loaded.total && (index > last || (index == last && folded > 1)),
              "index");
          last = index;
          indices_[size(row)] = index;
          kinds_[size(row)] = static_cast<TokenKind>(of_row);
          folded_[size(row)] = folded;
          scores_[size(row)] = reader.read<double>("score");
          detail::get_elements(
              reader, std::span<Key>(keys_.data() + row * shape_.head_dim, size(shape_.head_dim)));
          detail::get_elements(reader, std::span<Value>(values_.data() + row * shape_.value_dim,
                                                        size(shape_.value_dim)));
        }
      }
    reader.read_span<float>("queries", queries_.span());
    set(loaded);
  }

  void finish(ThreadTeam* team) {
    const std::int64_t fresh = total_ - committed_;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        head(l, h).count += fresh;
        if (policy_.source == ScoreSource::kAllQueries) add_pending(l, h);
      }
    committed_ = total_;
    if (policy_.source != ScoreSource::kProxyQueries && room() < policy_.max_chunk) select(team);
  }

  void select_now(ThreadTeam* team) {
    const bool proxies = policy_.source == ScoreSource::kProxyQueries;
    if (proxies != (total_ > committed_))
      throw Error(ErrorCode::kOrder,
                  {proxies ? "no proxy tokens were fed" : "uncommitted tokens",
                   "ScoredKvCache::compact", "uncommitted tokens", proxies ? "at least 1" : "0",
                   std::to_string(total_ - committed_)});
    select(team);
    if (proxies) rollback();
  }

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  float* row_scores_of(std::int64_t kv_head) {
    return row_scores_.data() + kv_head * largest_head();
  }
  double* reduced_of(std::int64_t kv_head) { return reduced_.data() + kv_head * largest_head(); }
  /// Entries of a head in whole blocks of rows.
  std::int64_t panel_rows() const {
    constexpr std::int64_t kBlock = detail::kTileBlockRows;
    return (largest_head() + kBlock - 1) / kBlock * kBlock;
  }
  std::int64_t most_prototypes() const { return policy_.capacity() / policy_.frame_size; }
  /// Floats of a prototype: key and value.
  std::int64_t prototype_width() const { return shape_.head_dim + shape_.value_dim; }
  bool may_leave(TokenKind kind) const { return policy_.may_leave[static_cast<std::size_t>(kind)]; }

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

  /// A head's row scores: sm_scale <R(reader) q, key j> for the first `count` entries. placed:
  /// which of the placed queries it is. Keys at ranks: widen_keys() has turned them.
  void key_scores(std::int64_t layer, std::int64_t kv_head, const float* query, std::int64_t placed,
                  std::int64_t count) {
    const std::int64_t dim = shape_.head_dim;
    float q[kMaxRotaryDim];
    load_query(layer, query, placed, q, 1);
    if (turns_keys(layer))
      dot_products(q, plain_keys_.data() + kv_head * panel_rows() * dim, count,
                   row_scores_of(kv_head));
    else
      dot_products(q, keys_.data() + row_of(layer, kv_head, 0) * dim, count,
                   row_scores_of(kv_head));
  }
  /// scores[j] = <q, keys[j]>.
  template <class T>
  void dot_products(const float* q, const T* keys, std::int64_t count, float* scores) const {
    const std::int64_t dim = shape_.head_dim;
    const std::int64_t whole = dim - dim % simd::kWidth;
    for (std::int64_t j = 0; j < count; ++j, keys += dim) {
      simd::VecF sum = simd::zero();
      float rest = 0;
      for (std::int64_t d = 0; d < whole; d += simd::kWidth)
        sum = simd::fma(simd::load(q + d), simd::load(keys + d), sum);
      for (std::int64_t d = whole; d < dim; ++d) rest += q[d] * static_cast<float>(keys[d]);
      scores[j] = simd::reduce_add(sum) + rest;
    }
  }
  /// Whether a layer's keys are raw and turned when they are read.
  bool turns_keys(std::int64_t layer) const {
    return policy_.position_rule == PositionRule::kInCache && rotaries_[size(layer)] != nullptr;
  }

  /// x = e^(x - shift).
  static void exponentiate(float* x, std::int64_t count, float shift) {
    const simd::VecF by = simd::broadcast(shift);
    std::int64_t j = 0;
    for (; j + simd::kWidth <= count; j += simd::kWidth)
      simd::store(x + j, simd::exp(simd::load(x + j) - by));
    for (; j < count; ++j) x[j] = std::exp(x[j] - shift);
  }
  /// Adds a row of shares, times `factor`, of query head g of the group.
  void reduce_add(std::int64_t kv_head, std::int64_t g, std::int64_t count, double factor) {
    const double weight = policy_.group_reduction == GroupReduction::kMean
                              ? factor / static_cast<double>(group_)
                              : factor;
    const float* shares_of_row = row_scores_of(kv_head);
    double* reduced = reduced_of(kv_head);
    for (std::int64_t j = 0; j < count; ++j) {
      const double share = weight * static_cast<double>(shares_of_row[j]);
      if (policy_.group_reduction == GroupReduction::kMax)
        reduced[j] = g == 0 ? share : std::max(reduced[j], share);
      else
        reduced[j] += share;
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
  /// or be pooled, committed ones; of kLastQueries those before the queries' own. Queries pass the
  /// keys a panel of columns at a time: a key is widened once for all of them.
  void query_votes(std::int64_t layer, std::int64_t kv_head, std::int64_t count, double* to) {
    const bool proxies = policy_.source == ScoreSource::kProxyQueries;
    const std::int64_t width = shape_.num_kv_heads * group_ * shape_.head_dim;
    const std::int64_t last = proxies ? total_ : committed_;
    const std::int64_t most = proxies ? total_ - committed_ : committed_;
    const std::int64_t queries = std::min(policy_.num_queries, most);
    const std::int64_t entries = head(layer, kv_head).count;
    const std::int64_t* index = indices_.data() + row_of(layer, kv_head, 0);
    std::fill_n(to, count, 0.0);
    if (entries == 0) return;
    if (shares()) place_queries(layer, kv_head, last - queries, queries);
    widen_keys(layer, kv_head, entries);
    constexpr std::int64_t kColumns = detail::kTileColumns;
    const std::int64_t dim = shape_.head_dim;
    float* const query = panel_query_.data() + kv_head * dim * kColumns;
    float* const scores = panel_scores_.data() + kv_head * panel_rows() * kColumns;
    double* const largest = reduced_of(kv_head);
    std::array<std::int64_t, static_cast<std::size_t>(kColumns)> visible;
    for (std::int64_t first = 0; first < queries * group_; first += kColumns) {
      const std::int64_t columns = std::min(kColumns, queries * group_ - first);
      for (std::int64_t c = 0; c < kColumns; ++c) {
        if (c >= columns) {
          for (std::int64_t d = 0; d < dim; ++d) query[d * kColumns + c] = 0;
          visible[size(c)] = entries;
          continue;
        }
        const std::int64_t token = last - queries + (first + c) / group_;
        load_query(
            layer,
            stored_query(layer, token, width) + (kv_head * group_ + (first + c) % group_) * dim,
            token - (last - queries), query + c, kColumns);
        // A query of the stream sees what is not after it; proxies attend to all that may leave.
        std::int64_t& end = visible[size(c)];
        end = entries;
        while (!proxies && end > 0 && index[end - 1] > token) --end;
      }
      detail::tile_scores<detail::kTileVectors>(plain_keys_.data() + kv_head * panel_rows() * dim,
                                                dim, entries, query, dim, scores);
      hide(layer, kv_head, proxies, visible, scores);
      to_shares(scores, entries, columns);
      // Rows of shares to votes.
      if (policy_.group_reduction != GroupReduction::kMax) {
        const double weight = policy_.group_reduction == GroupReduction::kMean
                                  ? 1.0 / static_cast<double>(group_)
                                  : 1.0;
        for (std::int64_t j = 0; j < count; ++j) {
          simd::VecF sum = simd::zero();
          for (std::int64_t c = 0; c < kColumns; c += simd::kWidth)
            sum += simd::load(scores + j * kColumns + c);
          to[j] += weight * static_cast<double>(simd::reduce_add(sum));
        }
        continue;
      }
      for (std::int64_t c = 0; c < columns; ++c) {
        const std::int64_t g = (first + c) % group_;
        for (std::int64_t j = 0; j < count; ++j) {
          const auto share = static_cast<double>(scores[j * kColumns + c]);
          largest[j] = g == 0 ? share : std::max(largest[j], share);
          if (g + 1 == group_) to[j] += largest[j];
        }
      }
    }
    if (policy_.query_reduction == QueryReduction::kMean && queries > 0)
      for (std::int64_t j = 0; j < count; ++j)
        to[j] /= static_cast<double>(proxies ? queries : std::min(queries, last - index[j]));
  }

  /// A head's keys as floats, rotated where they are read: plain_keys_.
  void widen_keys(std::int64_t layer, std::int64_t kv_head, std::int64_t entries) {
    const std::int64_t dim = shape_.head_dim;
    const bool turns = turns_keys(layer);
    const Key* key = keys_.data() + row_of(layer, kv_head, 0) * dim;
    float* to = plain_keys_.data() + kv_head * panel_rows() * dim;
    for (std::int64_t j = 0; j < entries; ++j, key += dim, to += dim) {
      if (turns)
        rotaries_[size(layer)]->rotate(tables_[size(layer)].ranks->row(j), key, to);
      else
        for (std::int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(key[d]);
    }
    std::fill_n(to, (panel_rows() - entries) * dim, 0.0F);
  }

  /// A query, rotated and scaled, its channels `stride` apart (a column of a panel).
  void load_query(std::int64_t layer, const float* query, std::int64_t placed, float* to,
                  std::int64_t stride) const {
    const std::int64_t dim = shape_.head_dim;
    const Rotary* rotary = rotaries_[size(layer)];
    float q[kMaxRotaryDim];
    if (rotary == nullptr)
      std::copy_n(query, dim, q);
    else
      rotary->rotate(tables_[size(layer)].queries->row(placed), query, q);
    for (std::int64_t d = 0; d < dim; ++d) to[d * stride] = sm_scale_ * q[d];
  }

  /// Minus infinity where a column does not attend.
  void hide(std::int64_t layer, std::int64_t kv_head, bool proxies,
            std::span<const std::int64_t> visible, float* scores) const {
    constexpr std::int64_t kColumns = detail::kTileColumns;
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    const std::int64_t entries = head(layer, kv_head).count;
    const TokenKind* kinds = kinds_.data() + row_of(layer, kv_head, 0);
    if (proxies) {
      for (std::int64_t j = 0; j < entries; ++j)
        if (j < policy_.num_sink_tokens || !may_leave(kinds[j]))
          std::fill_n(scores + j * kColumns, kColumns, kHidden);
      return;
    }
    for (std::int64_t c = 0; c < kColumns; ++c)
      for (std::int64_t j = visible[size(c)]; j < entries; ++j) scores[j * kColumns + c] = kHidden;
  }

  /// Columns of scores to shares of each column's whole. A column that sees nothing, or is none of
  /// the first `columns`: zeros.
  static void to_shares(float* scores, std::int64_t entries, std::int64_t columns) {
    constexpr std::int64_t kColumns = detail::kTileColumns;
    for (std::int64_t v = 0; v < kColumns; v += simd::kWidth) {
      float* const column = scores + v;
      simd::VecF max = simd::broadcast(std::numeric_limits<float>::lowest());
      for (std::int64_t j = 0; j < entries; ++j)
        max = simd::max(max, simd::load(column + j * kColumns));
      simd::VecF sum = simd::zero();
      for (std::int64_t j = 0; j < entries; ++j) {
        const simd::VecF weight = simd::exp(simd::load(column + j * kColumns) - max);
        simd::store(column + j * kColumns, weight);
        sum += weight;
      }
      float lanes[simd::kWidth];
      simd::store(lanes, sum);
      for (std::int64_t i = 0; i < simd::kWidth; ++i)
        lanes[i] = v + i < columns && lanes[i] > 0 ? 1 / lanes[i] : 0;
      const simd::VecF share = simd::load(lanes);
      for (std::int64_t j = 0; j < entries; ++j)
        simd::store(column + j * kColumns, simd::load(column + j * kColumns) * share);
    }
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
    // Below what selections mark entries with, above every score.
    const TokenKind* kinds = kinds_.data() + row_of(layer, kv_head, 0);
    for (std::int64_t j = 0; j < at.count; ++j)
      if (!may_leave(kinds[j])) raw[j] = std::numeric_limits<double>::max();
  }

  // ---- selection -----------------------------------------------------------------------------

  void select(ThreadTeam* team) {
    ++selections_;
    if (shares()) {
      for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
        for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) selection_scores(l, h);
        select_shared(l);
      }
      return;
    }
    if (stores_queries()) {
      // Heads have as many entries each: their queries stand alike.
      const bool proxies = policy_.source == ScoreSource::kProxyQueries;
      const std::int64_t queries =
          std::min(policy_.num_queries, proxies ? total_ - committed_ : committed_);
      for (std::int64_t l = 0; l < shape_.num_layers; ++l)
        place_queries(l, 0, (proxies ? total_ : committed_) - queries, queries);
    }
    const bool leaves = head(0, 0).count > policy_.budget;
    const auto one_head = [&](std::int64_t h, int) {
      evicted_of_head_[size(h)] = 0;
      for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
        selection_scores(l, h);
        select_alone(l, h);
      }
    };
    if (team != nullptr)
      team->for_each(shape_.num_kv_heads, one_head);
    else
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) one_head(h, 0);
    for (const std::int64_t evicted : evicted_of_head_) evicted_ += evicted;
    if (leaves) fresh_ = committed_;
  }

  void select_alone(std::int64_t layer, std::int64_t kv_head) {
    Head& at = head(layer, kv_head);
    const std::int64_t count = at.count;
    const std::span<std::int64_t> kept(kept_.data() + at.first_row, size(policy_.capacity()));
    const std::span<std::int64_t> order(order_.data() + at.first_row, size(policy_.capacity()));
    const std::int64_t prototypes =
        policy_.frame_size > 0 && count > policy_.budget ? make_prototypes(layer, kv_head) : 0;
    KeepRule rule = policy_.keep_rule();
    rule.budget -= prototypes;
    const std::int64_t stay =
        select_entries({selection_.data() + at.first_row, size(count)}, rule, order, kept);
    for (std::int64_t i = 0; i < stay; ++i) move_row(layer, kv_head, kept[size(i)], i);
    evicted_of_head_[size(kv_head)] += count - stay;
    at.count = stay;  // rows of proxies do not follow: they are about to be forgotten
    if (prototypes > 0) insert_prototypes(layer, kv_head, prototypes);
    decay(layer, kv_head);
  }

  /// Forms the prototypes of a head's new frames, the newest ones where there is no room for all;
  /// returns how many.
  std::int64_t make_prototypes(std::int64_t layer, std::int64_t kv_head) {
    const Head& at = head(layer, kv_head);
    const std::int64_t* index = indices_.data() + row_of(layer, kv_head, 0);
    const TokenKind* kinds = kinds_.data() + row_of(layer, kv_head, 0);
    const std::int64_t length = policy_.frame_size;
    const auto frame_at = [&](std::int64_t first) {
      if (first + length > at.count || !may_leave(kinds[first])) return false;
      for (std::int64_t i = 1; i < length; ++i)
        if (kinds[first + i] != kinds[first] || index[first + i] != index[first] + i) return false;
      return true;
    };
    std::int64_t begin = policy_.num_sink_tokens;
    while (begin < at.count && index[begin] < fresh_) ++begin;
    std::int64_t frames = 0;
    for (std::int64_t j = begin; j < at.count; frame_at(j) ? (j += length, ++frames) : ++j) {
    }
    std::int64_t skipped = std::max<std::int64_t>(
        0, frames - std::min(policy_.budget - policy_.num_sink_tokens - policy_.recent,
                             most_prototypes()));
    const std::int64_t made = frames - skipped;
    std::int64_t written = 0;
    for (std::int64_t j = begin; written < made;) {
      if (!frame_at(j)) {
        ++j;
        continue;
      }
      if (skipped-- <= 0) make_prototype(layer, kv_head, j, written++);
      j += length;
    }
    return made;
  }

  /// The weighted mean of a frame's rows, its keys turned to the frame's middle.
  void make_prototype(std::int64_t layer, std::int64_t kv_head, std::int64_t first,
                      std::int64_t number) {
    const std::int64_t length = policy_.frame_size;
    const Rotary* rotary = rotaries_[size(layer)];
    const double* scores = selection_.data() + head(layer, kv_head).first_row + first;
    double total = 0;
    for (std::int64_t i = 0; i < length; ++i) total += scores[i];
    const bool weighted = total > 0 && std::isfinite(total);
    float* key = prototype(kv_head, number);
    float* value = key + shape_.head_dim;
    std::fill_n(key, prototype_width(), 0.0F);
    float turned[kMaxRotaryDim];
    for (std::int64_t i = 0; i < length; ++i) {
      const auto weight =
          static_cast<float>(weighted ? scores[i] / total : 1 / static_cast<double>(length));
      const std::int64_t row = row_of(layer, kv_head, first + i);
      const Key* from = keys_.data() + row * shape_.head_dim;
      if (rotary != nullptr && policy_.position_rule == PositionRule::kInText)
        rotary->rotate(tables_[size(layer)].turns->data() + i * rotary->row_size(), from, turned);
      else
        convert(from, shape_.head_dim, turned);
      for (std::int64_t d = 0; d < shape_.head_dim; ++d) key[d] += weight * turned[d];
      for (std::int64_t d = 0; d < shape_.value_dim; ++d)
        value[d] += weight * static_cast<float>(values_[size(row * shape_.value_dim + d)]);
    }
    prototype_of_[size(kv_head * most_prototypes() + number)] = {
        indices_[size(row_of(layer, kv_head, first))] + (length - 1) / 2,
        kinds_[size(row_of(layer, kv_head, first))]};
  }

  /// Puts prototypes among what is kept, in order of their indices, behind tokens of the same.
  void insert_prototypes(std::int64_t layer, std::int64_t kv_head, std::int64_t count) {
    Head& at = head(layer, kv_head);
    std::int64_t from = at.count;
    at.count += count;
    std::int64_t to = at.count;
    for (std::int64_t p = count; p > 0;) {
      const Prototype& made = prototype_of_[size(kv_head * most_prototypes() + p - 1)];
      if (from > 0 && indices_[size(row_of(layer, kv_head, from - 1))] > made.index) {
        move_row(layer, kv_head, --from, --to);
        continue;
      }
      const std::int64_t row = row_of(layer, kv_head, --to);
      const float* key = prototype(kv_head, --p);
      convert(key, shape_.head_dim, keys_.data() + row * shape_.head_dim);
      convert(key + shape_.head_dim, shape_.value_dim, values_.data() + row * shape_.value_dim);
      indices_[size(row)] = made.index;
      kinds_[size(row)] = made.kind;
      folded_[size(row)] = static_cast<std::int32_t>(policy_.frame_size);
      scores_[size(row)] = 0;
    }
  }
  float* prototype(std::int64_t kv_head, std::int64_t number) {
    return prototypes_.data() + (kv_head * most_prototypes() + number) * prototype_width();
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
    kinds_[size(to)] = kinds_[size(from)];
    folded_[size(to)] = folded_[size(from)];
    scores_[size(to)] = scores_[size(from)];
  }

  template <class From, class To>
  static void convert(const From* from, std::int64_t count, To* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(static_cast<float>(from[i]));
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
  Buffer<TokenKind> kinds_;                 // [blocks, rows]
  Buffer<std::int32_t> folded_;             // [blocks, rows], tokens that an entry stands for
  Buffer<double> scores_;                   // [blocks, rows]
  Buffer<double> pending_;                  // [layers, rows], observed of uncommitted queries
  Buffer<float> queries_;                   // [layers, slots, qo heads, head_dim]
  Buffer<double> selection_;                // [rows], of the layer that selects
  Buffer<double> pooled_;                   // [rows]
  Buffer<std::int64_t> order_;
  Buffer<std::int64_t> kept_;
  Buffer<float> row_scores_;    // [kv heads, entries of a head], one query head
  Buffer<double> reduced_;      // [kv heads, entries of a head], one query
  Buffer<float> plain_keys_;    // [kv heads, panel_rows, head_dim], of the layer that selects
  Buffer<float> panel_query_;   // [kv heads, head_dim, kTileColumns]
  Buffer<float> panel_scores_;  // [kv heads, panel_rows, kTileColumns]
  Buffer<float> prototypes_;    // [kv heads, most_prototypes, head_dim + value_dim]
  std::vector<Prototype> prototype_of_;        // [kv heads, most_prototypes]
  std::vector<std::int64_t> evicted_of_head_;  // of one selection
  TokenKind kind_ = TokenKind::kText;          // of tokens to come
  std::int64_t fresh_ = 0;                     // the first token since entries left
  std::int64_t total_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t selections_ = 0;
  std::int64_t evicted_ = 0;
};

}  // namespace sluice
