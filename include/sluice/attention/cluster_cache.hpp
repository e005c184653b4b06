// SPDX-License-Identifier: MIT
/// A cache that keeps everything and reads the clusters of similar keys that the query at hand
/// scores highest (after V-Rex's ReSV, arXiv 2512.12284): clusters as units of selection, where
/// PageSelectKvCache has pages.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/key_clusters.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// How clusters are formed and picked. Signs and threshold are V-Rex's, what bounds memory and time
/// is ours.
struct ClusterSelection {
  int num_bits = 32;                ///< hyperplanes whose sides tell keys apart, 1 to 64
  int threshold = 7;                ///< a key with so many signs unlike every cluster's opens one
  std::int64_t max_clusters = 512;  ///< of a KV head; then keys join the nearest
  std::int64_t budget = 1024;       ///< tokens that a KV head reads, at most
  std::int64_t recent = 64;         ///< newest tokens, always read: part of the budget
  double share = 0.8;  ///< of a query head's estimated attention that its clusters must exceed;
                       ///< from 1 on the budget alone ends the choice
  std::int64_t dense_layers = 2;  ///< the first layers read everything
  std::uint64_t seed = 1;         ///< of the hyperplanes
};

/// A full cache of which a step reads, for each KV head, the newest tokens and the clusters that
/// its query heads need. Keys are rotated once, at their places in the text, and clustered so
/// (KeyClusters), each KV head of a layer by itself, as they are committed.
///
/// A step of one token reads everything in the first dense_layers layers, while there are at most
/// `budget` tokens, or while more than that are not committed. Otherwise each query head orders the
/// clusters by e^(sm_scale <q, representative>) and wants those in front until their scores times
/// their counts exceed `share` of the sum (pick_clusters). The KV head takes what its query heads
/// want rank by rank, of equal rank the lower head's first, until the budget is full; a cluster of
/// which not all fits gives its newest tokens. Deviation: V-Rex fetches the union, however large.
/// Chunks of several tokens read everything.
///
/// The chosen rows are copied side by side, as TokenSelectKvCache does and with its limits: models
/// whose layers have trained windows, or whose scores depend on distances otherwise than by
/// rotation, cannot use it. What goes back leaves the clusters of a run that never went on.
///
/// Protocol of a step: as KvCache, with select() between store() and segments(). A selection is
/// O(tokens + clusters * head_dim) a KV head, on the calling thread; commit() is O(num_bits *
/// head_dim + clusters) a key, taking back committed tokens O(tokens). Only construction allocates:
/// bytes(), index_bytes() and the copies. One thread at a time; store() of different rows may run
/// on several.
template <RotaryElement Key, RotaryElement Value = Key>
class ClusterSelectKvCache
    : public detail::SelectiveCache<ClusterSelectKvCache<Key, Value>, Key, Value> {
  using Base = detail::SelectiveCache<ClusterSelectKvCache, Key, Value>;
  friend Base;
  using Base::cache_;
  using Base::group_;
  using Base::size;

 public:
  using typename Base::SegmentType;
  static constexpr int kMaxSegments = 1;

  /// rotaries: [num_layers], each null or outliving the cache. num_qo_heads and sm_scale: the
  /// model's. \throws Error(kConfig) for a selection that makes no sense, Error(kConfig, kShape) as
  /// KvCache.
  ClusterSelectKvCache(const KvShape& shape, std::int64_t num_qo_heads, float sm_scale,
                       const ClusterSelection& selection, std::span<const Rotary* const> rotaries,
                       std::int64_t capacity, std::int64_t max_chunk, Position origin = 0)
      : Base("ClusterSelectKvCache", shape, num_qo_heads, rotaries, capacity, max_chunk, origin),
        selection_(checked(selection)),
        sm_scale_(sm_scale),
        most_(std::min(selection.budget, capacity)) {
    for (std::int64_t i = 0; i < shape.num_layers * shape.num_kv_heads; ++i) {
      const bool dense = i / shape.num_kv_heads < selection.dense_layers;
      clusters_.emplace_back(shape.head_dim, dense ? 1 : selection.max_clusters,
                             dense ? 1 : capacity, selection.num_bits, selection.threshold,
                             selection.seed);
    }
    for (std::int64_t h = 0; h < shape.num_kv_heads; ++h)
      heads_.push_back(static_cast<std::int32_t>(h));
    picked_ = Buffer<std::int64_t>(size(shape.num_kv_heads * most_));
    picked_count_ = Buffer<std::int64_t>(size(shape.num_kv_heads));
    keys_ = Buffer<Key>(size(shape.num_kv_heads * most_ * shape.head_dim));
    values_ = Buffer<Value>(size(shape.num_kv_heads * most_ * shape.value_dim));
    scores_ = Buffer<float>(size(selection.max_clusters));
    order_ = Buffer<std::int64_t>(size(group_ * selection.max_clusters));
    wanted_ = Buffer<std::int64_t>(size(group_));
    older_ = Buffer<std::int64_t>(size(selection.max_clusters));
    from_ = Buffer<std::int64_t>(size(selection.max_clusters));
    row_ = Buffer<float>(size(shape.head_dim));
  }

  const ClusterSelection& selection() const { return selection_; }
  /// Bytes of clusters: hyperplanes, representatives, and a number for each key.
  std::size_t index_bytes() const {
    std::size_t bytes = 0;
    for (const KeyClusters& clusters : clusters_) bytes += clusters.bytes();
    return bytes;
  }
  /// Clusters of a layer's committed keys; of dense layers, none.
  const KeyClusters& clusters(std::int64_t layer, std::int64_t kv_head) const {
    return clusters_[size(layer * this->shape().num_kv_heads + kv_head)];
  }
  /// Whether the last select() picked, or everything is read.
  bool picks() const { return picks_; }
  /// The tokens that a head reads in the layer selected last, ascending. Precondition: picks().
  std::span<const std::int64_t> picked(std::int64_t kv_head) const {
    return {picked_.data() + kv_head * most_, size(picked_count_.data()[kv_head])};
  }
  /// Selections so far, of all layers together.
  std::int64_t selections() const { return selections_; }

  void commit() {
    Base::commit();
    extend();
  }

  void copy_from(const ClusterSelectKvCache& other) {
    cache_.copy_from(other.cache_);
    form();
  }
  ClusterSelectKvCache sibling() const {
    const RetentionConfig& kept = this->retention();
    return ClusterSelectKvCache(this->shape(), this->num_qo_heads(), sm_scale_, selection_,
                                this->rotaries_, kept.capacity, kept.max_chunk, kept.origin);
  }
  /// Appends selection and rows; clusters follow from the rows. Allocates in the writer.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    for (const auto& [field, value] : identity()) writer.write<std::int64_t>(value);
    cache_.save(writer);
  }
  /// Takes over a saved state. \throws Error(kFormat) naming the field; the cache is then reset.
  void restore(ByteReader& reader) {
    this->reset();
    for (const auto& [field, value] : identity()) reader.read_expected<std::int64_t>(field, value);
    cache_.restore(reader);
    form();
  }

  /// Picks tokens for the newest one, whose keys are stored, and gathers their rows. query: all
  /// heads' rows, not rotated.
  void select(std::int64_t layer, const AttentionQuery& query) {
    picks_ = query.rows.tokens == 1 && layer >= selection_.dense_layers &&
             this->total() > selection_.budget &&
             this->total() - this->committed() <= selection_.budget;
    if (!picks_) return;
    ++selections_;
    const float* rows = this->placed_query(layer, query);
    const SegmentType all = this->everything(layer);
    const KvShape& s = this->shape();
    for (std::int64_t h = 0; h < s.num_kv_heads; ++h) {
      pick(layer, h, rows + h * group_ * s.head_dim);
      std::int64_t row = h * most_;
      for (const std::int64_t token : picked(h)) {
        std::copy_n(all.key(h, token), s.head_dim, keys_.data() + row * s.head_dim);
        std::copy_n(all.value(h, token), s.value_dim, values_.data() + row++ * s.value_dim);
      }
    }
  }

  int num_classes(std::int64_t) const { return picks_ ? static_cast<int>(heads_.size()) : 1; }
  HeadClassView head_class(std::int64_t, int part = 0) const {
    HeadClassView view;
    if (picks_) view.kv_heads = {heads_.data() + part, 1};
    return view;
  }
  /// Everything, or what one head picked, numbered as if nothing were left out.
  int segments(std::int64_t layer, [[maybe_unused]] std::int64_t queries,
               std::span<SegmentType, kMaxSegments> out, int part = 0) const {
    SLUICE_ASSERT(queries <= this->total());
    if (this->total() == 0) return 0;
    SegmentType& segment = out[0];
    segment = this->everything(layer);
    if (!picks_) return 1;
    const std::int64_t count = picked_count_.data()[part];
    segment.rule.first_index += this->total() - count;
    segment.rule.first_position += static_cast<Position>(this->total() - count);
    segment.rule.count = segment.rule.visible = count;
    segment.keys = keys_.data() + part * most_ * this->shape().head_dim;
    segment.values = values_.data() + part * most_ * this->shape().value_dim;
    return 1;
  }

 private:
  ClusterSelection checked(const ClusterSelection& s) const {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    if (s.budget < 1 || s.budget > kMost) this->refuse("budget", "at least 1", s.budget);
    if (s.recent < 1 || s.recent > s.budget)
      this->refuse("recent", "1 to the budget, " + std::to_string(s.budget), s.recent);
    if (!(s.share >= 0))
      this->refuse("share", "at least 0", s.share < 0 ? static_cast<std::int64_t>(s.share) : 0);
    if (s.dense_layers < 0) this->refuse("dense_layers", "at least 0", s.dense_layers);
    if (s.max_clusters < 1 || s.max_clusters > kMost)
      this->refuse("max_clusters", "at least 1", s.max_clusters);
    return s;
  }
  std::array<std::pair<const char*, std::int64_t>, 8> identity() const {
    return {{{"num_bits", selection_.num_bits},
             {"threshold", selection_.threshold},
             {"max_clusters", selection_.max_clusters},
             {"budget", selection_.budget},
             {"recent", selection_.recent},
             {"share", std::bit_cast<std::int64_t>(selection_.share)},
             {"dense_layers", selection_.dense_layers},
             {"seed", std::bit_cast<std::int64_t>(selection_.seed)}}};
  }

  /// Takes in the keys that are committed.
  void extend() {
    const KvShape& s = this->shape();
    if (this->total() == 0) return;
    for (std::int64_t l = selection_.dense_layers; l < s.num_layers; ++l) {
      const SegmentType all = this->everything(l);
      for (std::int64_t h = 0; h < s.num_kv_heads; ++h) {
        KeyClusters& clusters = clusters_[size(l * s.num_kv_heads + h)];
        for (std::int64_t token = clusters.num_keys(); token < this->total(); ++token)
          clusters.add(widened(all.key(h, token)));
      }
    }
  }
  /// What is picked serves one step, and clusters forget keys that are no longer there.
  void unselect() {
    picks_ = false;
    const KvShape& s = this->shape();
    for (std::int64_t l = selection_.dense_layers; l < s.num_layers; ++l)
      for (std::int64_t h = 0; h < s.num_kv_heads; ++h) {
        KeyClusters& clusters = clusters_[size(l * s.num_kv_heads + h)];
        if (clusters.num_keys() <= this->total()) continue;
        if (this->total() == 0) {
          clusters.reset();
          continue;
        }
        const SegmentType all = this->everything(l);
        clusters.truncate(this->total(),
                          [&](std::int64_t token) { return widened(all.key(h, token)); });
      }
  }
  /// Clusters anew, from the stored keys.
  void form() {
    picks_ = false;
    for (KeyClusters& clusters : clusters_) clusters.reset();
    extend();
  }
  const float* widened(const Key* key) {
    for (std::int64_t d = 0; d < this->shape().head_dim; ++d)
      row_.data()[d] = static_cast<float>(key[d]);
    return row_.data();
  }

  /// Tokens of one KV head. queries: [group, head_dim], rotated.
  void pick(std::int64_t layer, std::int64_t kv_head, const float* queries) {
    const KeyClusters& clusters = this->clusters(layer, kv_head);
    const std::int64_t count = clusters.size();
    const std::span<const std::int64_t> cluster_of = clusters.cluster_of();
    // What is not committed is in no cluster.
    const std::int64_t recent = std::min(this->total() - selection_.recent, clusters.num_keys());
    std::int64_t room = selection_.budget - (this->total() - recent);
    for (std::int64_t g = 0; g < group_; ++g) {
      const std::span<float> scores = scores_.span().first(size(count));
      clusters.score(queries + g * this->shape().head_dim, sm_scale_, scores);
      wanted_.data()[g] =
          pick_clusters(scores, clusters.counts(), selection_.share,
                        order_.span().subspan(size(g * selection_.max_clusters), size(count)));
    }
    // Tokens of each cluster that are not read anyway, and from which token on they are taken.
    std::copy_n(clusters.counts().begin(), count, older_.data());
    for (std::int64_t token = recent; token < clusters.num_keys(); ++token)
      --older_.data()[cluster_of[size(token)]];
    std::fill_n(from_.data(), count, this->total());
    for (std::int64_t rank = 0; room > 0 && rank < count; ++rank)
      for (std::int64_t g = 0; room > 0 && g < group_; ++g) {
        if (rank >= wanted_.data()[g]) continue;
        const std::int64_t cluster = order_.data()[g * selection_.max_clusters + rank];
        std::int64_t& from = from_.data()[cluster];
        if (from != this->total()) continue;
        from = 0;
        const std::int64_t tokens = older_.data()[cluster];
        if (tokens > room)
          for (from = recent; room > 0; room -= cluster_of[size(from)] == cluster ? 1 : 0) --from;
        else
          room -= tokens;
      }
    std::int64_t* const to = picked_.data() + kv_head * most_;
    std::int64_t written = 0;
    for (std::int64_t token = 0; token < recent; ++token)
      if (token >= from_.data()[cluster_of[size(token)]]) to[written++] = token;
    for (std::int64_t token = recent; token < this->total(); ++token) to[written++] = token;
    picked_count_.data()[kv_head] = written;
  }

  ClusterSelection selection_;
  float sm_scale_;
  std::int64_t most_;                  // rows that a head reads
  std::vector<KeyClusters> clusters_;  // [layers, kv heads]
  std::vector<std::int32_t> heads_;    // 0, 1, ..: a class for each where tokens are picked
  bool picks_ = false;
  std::int64_t selections_ = 0;
  Buffer<std::int64_t> picked_;        // [kv heads, most]
  Buffer<std::int64_t> picked_count_;  // [kv heads]
  Buffer<Key> keys_;                   // [kv heads, most, head_dim], of the layer that is read
  Buffer<Value> values_;               // [kv heads, most, value_dim]
  Buffer<float> scores_;               // [max_clusters]
  Buffer<std::int64_t> order_;         // [group, max_clusters]
  Buffer<std::int64_t> wanted_;        // [group]
  Buffer<std::int64_t> older_;         // [max_clusters]
  Buffer<std::int64_t> from_;          // [max_clusters]
  Buffer<float> row_;                  // [head_dim]
};

}  // namespace sluice
