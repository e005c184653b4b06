// SPDX-License-Identifier: MIT
/// Keys and values of all layers of one stream, in memory that is fixed at construction, presented
/// to attention as segments. Layers may retain different tokens (alternating local and global
/// layers), and so may the KV heads of one layer (DuoAttention, MoA): each names one of a few
/// retentions. Heads of a layer that share one form a class: they are stored and read together.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Extents that all layers share.
struct KvShape {
  std::int64_t num_layers = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;   ///< channels of a key
  std::int64_t value_dim = 0;  ///< channels of a value
};

namespace detail {

/// What snapshots of caches of rows say first: the types of elements, and the extents.
template <KvElement Key, KvElement Value>
void write_shape(ByteWriter& writer, const KvShape& shape) {
  writer.write<std::uint32_t>(KvRow<Key>::kTag);
  writer.write<std::uint32_t>(KvRow<Value>::kTag);
  for (const std::int64_t extent :
       {shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.value_dim})
    writer.write<std::int64_t>(extent);
}
/// \throws Error(kFormat) naming the one that is another.
template <KvElement Key, KvElement Value>
void expect_shape(ByteReader& reader, const KvShape& shape) {
  reader.read_expected("key type", KvRow<Key>::kTag);
  reader.read_expected("value type", KvRow<Value>::kTag);
  reader.read_expected("num_layers", shape.num_layers);
  reader.read_expected("num_kv_heads", shape.num_kv_heads);
  reader.read_expected("head_dim", shape.head_dim);
  reader.read_expected("value_dim", shape.value_dim);
}

}  // namespace detail

/// How one layer uses the cache.
struct LayerCacheConfig {
  int retention = 0;               ///< index into the retentions
  const Rotary* rotary = nullptr;  ///< null: keys carry no rotation; must outlive the cache
  /// [num_kv_heads], indices into the retentions, or empty: `retention` serves all heads.
  std::vector<int> retention_of_head{};
};

/// What attention has to know of one class of a layer's KV heads.
struct HeadClassView {
  /// The heads, ascending, in the order of the segments' head axis; empty: all heads.
  std::span<const std::int32_t> kv_heads{};
  std::int64_t window_size = kUnlimitedWindow;  ///< for CausalWindow
  std::int64_t num_sink_tokens = 0;             ///< for CausalWindow
  ReaderPlace place{};                          ///< where its queries stand among other groups
};

/// A cache of one stream. Key and Value: float, f16, bf16, or quantised with scales beside the rows
/// (int8_t, fp8_e4m3, int4x2; formats and error bounds in cache/kv_element.hpp); layout [heads,
/// capacity, dim] in each class of a layer. Keys are quantised once: after their rotation, or raw
/// where the retention keeps them raw.
///
/// Protocol of a step with T tokens: append(T); for each layer store() the T new keys and values,
/// then attend over segments(); commit() (or rollback()). Only construction allocates. One thread
/// changes the cache; store() of different rows or layers may run on several.
template <KvElement Key, KvElement Value = Key, Backend Tag = cpu>
class KvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = Retention::kMaxSegments;

  /// A state that revert() returns to: all counters, and the rows of every retention that
  /// overwrites its own. Retentions that only append keep their rows in place, for nothing.
  struct Checkpoint {
    std::vector<Retention> retentions;
    Buffer<std::byte> rows;
    /// What it costs, the counters left out.
    std::size_t bytes() const { return rows.bytes(); }
    /// As those of the cache, at the captured state.
    std::int64_t total() const { return retentions.front().total(); }
    std::int64_t max_truncate() const {
      std::int64_t result = retentions.front().max_truncate();
      for (const Retention& retention : retentions)
        result = std::min(result, retention.max_truncate());
      return result;
    }
  };

  /// Allocates bytes() at once. `layers` has one entry per layer.
  /// \throws Error(kConfig, kShape) when extents are not positive, a layer names a retention that
  /// does not exist, a retention does not fit in itself, an element holds two channels of an odd
  /// number, or keys to be rotated and quantised are wider than kMaxRotaryDim.
  KvCache(const KvShape& shape, std::span<const RetentionConfig> retentions,
          std::span<const LayerCacheConfig> layers)
      : shape_(shape) {
    check_shape(shape, retentions, layers);
    for (const RetentionConfig& config : retentions) retentions_.emplace_back(config);
    std::int64_t key_count = 0;
    std::int64_t value_count = 0;
    std::int64_t key_scale_count = 0;
    std::int64_t value_scale_count = 0;
    for (const LayerCacheConfig& config : layers) {
      layers_.push_back({config.rotary, classes_of(config, shape.num_kv_heads)});
      for (HeadClass& part : layers_.back().classes) {
        const RetentionConfig& retention = retentions[static_cast<std::size_t>(part.retention)];
        part.key_offset = key_count;
        part.value_offset = value_count;
        part.key_scale_offset = key_scale_count;
        part.value_scale_offset = value_scale_count;
        const Extents extents(shape, part.num_heads, retention.capacity);
        key_count += extents.keys;
        value_count += extents.values;
        key_scale_count += extents.key_scales;
        value_scale_count += extents.value_scales;
        if (retention.key_form == KeyForm::kRaw && config.rotary != nullptr)
          part.key_rotation = raw_key_table(*config.rotary, retention.capacity);
      }
    }
    keys_ = Buffer<Key, Tag>(static_cast<std::size_t>(key_count));
    values_ = Buffer<Value, Tag>(static_cast<std::size_t>(value_count));
    key_scales_ = Buffer<KeyScale, Tag>(static_cast<std::size_t>(key_scale_count));
    value_scales_ = Buffer<ValueScale, Tag>(static_cast<std::size_t>(value_scale_count));
  }

  const KvShape& shape() const { return shape_; }
  std::span<const Retention> retentions() const { return retentions_; }
  /// Classes of the layer's KV heads; 1 unless its heads retain different tokens.
  int num_classes(std::int64_t layer) const { return static_cast<int>(at(layer).classes.size()); }
  HeadClassView head_class(std::int64_t layer, int part = 0) const {
    const Retention& retained = retention(layer, part);
    return {at(layer, part).kv_heads, retained.window(), retained.config().num_sink_tokens,
            retained.reader_place()};
  }
  const Retention& retention(std::int64_t layer, int part = 0) const {
    return retentions_[static_cast<std::size_t>(at(layer, part).retention)];
  }
  const Rotary* rotary(std::int64_t layer) const { return at(layer).rotary; }
  /// Stream index of the next token.
  std::int64_t total() const { return retentions_.front().total(); }
  /// Position of the stream's token `index`, in the layers that use the first retention: models
  /// give all their layers one origin.
  Position write_position(std::int64_t index) const {
    return retentions_.front().write_position(index);
  }
  /// Whether tokens may be stored at positions of the caller's choice: keys are rotated and read
  /// where they stand, not at ranks that are counted from their indices.
  bool takes_positions() const {
    return std::all_of(retentions_.begin(), retentions_.end(), [](const Retention& retention) {
      return retention.config().key_form == KeyForm::kRotated &&
             (retention.config().position_rule == PositionRule::kInText ||
              retention.window() >= kUnlimitedWindow);
    });
  }
  /// Tokens that may follow a snapshot before a row of it is overwritten, in any layer.
  std::int64_t max_lead() const {
    std::int64_t result = retentions_.front().max_lead();
    for (const Retention& retention : retentions_) result = std::min(result, retention.max_lead());
    return result;
  }
  /// bytes() of a cache that is not made: what a plan promises.
  /// \throws what the constructor throws, but for want of memory.
  static std::size_t bytes_needed(const KvShape& shape, std::span<const RetentionConfig> retentions,
                                  std::span<const LayerCacheConfig> layers) {
    std::size_t bytes = 0;
    check_shape(shape, retentions, layers);
    for (const RetentionConfig& config : retentions) static_cast<void>(Retention(config));
    for (const LayerCacheConfig& config : layers)
      for (const HeadClass& part : classes_of(config, shape.num_kv_heads))
        bytes += Extents(shape, part.num_heads,
                         retentions[static_cast<std::size_t>(part.retention)].capacity)
                     .bytes();
    return bytes;
  }
  /// Bytes of keys and values and of their scales.
  std::size_t bytes() const {
    return keys_.bytes() + values_.bytes() + key_scales_.bytes() + value_scales_.bytes();
  }
  /// Entries of the layer that holds the most: what one query can see of this cache.
  std::int64_t max_entries() const {
    std::int64_t most = 0;
    for (const Retention& retention : retentions_)
      most = std::max(most, retention.config().capacity);
    return most;
  }
  /// The most tokens that append() takes at once.
  std::int64_t max_chunk() const {
    std::int64_t result = retentions_.front().config().max_chunk;
    for (const Retention& retention : retentions_)
      result = std::min(result, retention.config().max_chunk);
    return result;
  }

  /// Whether `tokens` more fit now, in every retention.
  CacheStatus status(std::int64_t tokens) const {
    for (const Retention& retention : retentions_)
      if (retention.status(tokens) != CacheStatus::kOk) return CacheStatus::kFull;
    return CacheStatus::kOk;
  }
  /// Precondition: status(tokens) == kOk.
  void append(std::int64_t tokens) {
    for (Retention& retention : retentions_) retention.append(tokens);
  }
  void commit() {
    for (Retention& retention : retentions_) retention.commit();
  }
  void rollback() {
    for (Retention& retention : retentions_) retention.rollback();
  }
  /// The most tokens that truncate() takes back.
  std::int64_t max_truncate() const {
    std::int64_t result = retentions_.front().max_truncate();
    for (const Retention& retention : retentions_)
      result = std::min(result, retention.max_truncate());
    return result;
  }
  /// Takes back the newest tokens, committed or not. \throws Error(kCapacity): nothing changes.
  void truncate(std::int64_t tokens) {
    if (tokens > max_truncate()) {
      retentions_[static_cast<std::size_t>(tightest())].truncate(tokens);  // throws, naming limits
    }
    for (Retention& retention : retentions_) retention.truncate(tokens);
  }
  void reset() {
    for (Retention& retention : retentions_) retention.reset();
  }

  /// Of the newest `tokens` tokens, none of them committed, keeps those numbered path[0] < path[1]
  /// < ... (0 is the oldest) and takes back the rest: rows move, in ascending order, and nothing is
  /// rotated anew, so each kept token must have been stored with the position of its new place.
  /// What verifying a tree of drafted tokens leaves (Medusa, arXiv 2401.10774).
  void keep_path(std::int64_t tokens, std::span<const std::int64_t> path) {
    for (int r = 0; r < static_cast<int>(retentions_.size()); ++r) {
      Retention& retention = retentions_[static_cast<std::size_t>(r)];
      SLUICE_ASSERT(tokens <= retention.total() - retention.committed());
      for (std::size_t i = 0; i < path.size(); ++i)
        if (path[i] != static_cast<std::int64_t>(i))
          move_row(r, retention.slot_of_newest(tokens - path[i]),
                   retention.slot_of_newest(tokens - static_cast<std::int64_t>(i)));
      retention.truncate(tokens - static_cast<std::int64_t>(path.size()));
    }
  }

  /// An empty checkpoint with all the room that capture() needs. Allocates it.
  Checkpoint make_checkpoint() const {
    std::int64_t bytes = 0;
    for (const Layer& layer : layers_)
      for (const HeadClass& part : layer.classes) {
        const Retention& retention = retentions_[static_cast<std::size_t>(part.retention)];
        if (!retention.only_appends())
          bytes += retention.config().capacity * part.num_heads * row_bytes();
      }
    return {retentions_, Buffer<std::byte>(static_cast<std::size_t>(bytes))};
  }
  /// Takes the state of now. Allocates nothing. Precondition: nothing is uncommitted, `checkpoint`
  /// is of this cache or of one made alike.
  void capture(Checkpoint& checkpoint) const {
    SLUICE_ASSERT(retentions_.front().total() == retentions_.front().committed());
    checkpoint.retentions = retentions_;
    std::byte* to = checkpoint.rows.data();
    each_kept_row(
        *this,
        [&](const auto* row, std::int64_t count) {
          const std::size_t size = sizeof(*row) * static_cast<std::size_t>(count);
          std::memcpy(to, row, size);
          to += size;
        },
        [](const Retention& retention) { return !retention.only_appends(); });
  }
  /// Returns to a captured state, exactly: as far as truncate() and save() go, nothing tells it
  /// from a cache that never went on. Allocates nothing. Precondition: retentions that only append
  /// have not been taken back behind it meanwhile (truncate, reset, restore, copy_from).
  void revert(const Checkpoint& checkpoint) {
    retentions_ = checkpoint.retentions;
    const std::byte* from = checkpoint.rows.data();
    each_kept_row(
        *this,
        [&](auto* row, std::int64_t count) {
          const std::size_t size = sizeof(*row) * static_cast<std::size_t>(count);
          std::memcpy(row, from, size);
          from += size;
        },
        [](const Retention& retention) { return !retention.only_appends(); });
  }
  /// Becomes a copy of `other`, a cache made with the same shape and retentions: the fork of a
  /// stream whose rows are few (a window). Copies what is kept; allocates nothing.
  /// Precondition: nothing is uncommitted in `other`.
  void copy_from(const KvCache& other) {
    SLUICE_ASSERT(keys_.size() == other.keys_.size() && values_.size() == other.values_.size());
    retentions_ = other.retentions_;
    for (const Layer& layer : layers_)
      for (const HeadClass& part : layer.classes) {
        const Retention& retention = retentions_[static_cast<std::size_t>(part.retention)];
        retention.each_stored_slot([&](std::int64_t slot) {
          for (std::int64_t j = 0; j < part.num_heads; ++j)
            copy_row(other.row(part, retention, j, slot), row(part, retention, j, slot));
        });
      }
  }

  /// StreamingLLM's batched evictions, for caches with Eviction::kOnRequest (retention.hpp).
  /// Where one retention throws, none has changed.
  void shrink() { evict_for_space(0); }
  void evict_for_space(std::int64_t coming) {
    for (const Retention& retention : retentions_) retention.check_evict();
    for (Retention& retention : retentions_) retention.evict_for_space(coming);
  }
  /// Removes the kept tokens with ranks [begin, end) and moves the rows of the smaller side.
  void evict_range(std::int64_t begin, std::int64_t end) {
    for (const Retention& retention : retentions_) retention.check_evict_range(begin, end);
    for (int r = 0; r < static_cast<int>(retentions_.size()); ++r)
      retentions_[static_cast<std::size_t>(r)].evict_range(
          begin, end, [&](std::int64_t from, std::int64_t to) { move_row(r, from, to); });
  }

  /// Writes keys and values of the newest tokens. keys: [T, num_kv_heads, head_dim], not rotated;
  /// values: [T, num_kv_heads, value_dim]; rotation: rows of cosines and sines of the T tokens at
  /// their write positions (Rotary::row_size() floats each), unused for raw keys. Rows [begin, end)
  /// of T are written, so that several threads may share the work.
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Layer& into = at(layer);
    for (const HeadClass& part : into.classes) {
      const Retention& retention = retentions_[static_cast<std::size_t>(part.retention)];
      const bool rotates =
          into.rotary != nullptr && retention.config().key_form == KeyForm::kRotated;
      for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t slot = retention.slot_of_newest(keys.tokens - t);
        for (std::int64_t j = 0; j < part.num_heads; ++j) {
          const std::int64_t head = part.head(j);
          const Row<Key, Value> to = row(part, retention, j, slot);
          const float* const key = keys.head(t, head);
          const float* const angles = rotates ? rotation + t * into.rotary->row_size() : nullptr;
          if constexpr (QuantisedElement<Key>) {
            float rotated[kMaxRotaryDim];
            if (rotates) into.rotary->rotate(angles, key, rotated);
            KvRow<Key>::quantise(rotates ? rotated : key, shape_.head_dim, to.key, to.key_scales);
          } else if (rotates) {
            into.rotary->rotate(angles, key, to.key);
          } else {
            KvRow<Key>::quantise(key, shape_.head_dim, to.key, nullptr);
          }
          KvRow<Value>::quantise(values.head(t, head), shape_.value_dim, to.value, to.value_scales);
        }
      }
    }
  }

  /// The segments that the newest `queries` tokens see in a layer, for one class of its heads;
  /// returns how many were written.
  int segments(std::int64_t layer, std::int64_t queries, std::span<SegmentType, kMaxSegments> out,
               int part = 0) const {
    const HeadClass& from = at(layer, part);
    const Retention& retention = retentions_[static_cast<std::size_t>(from.retention)];
    std::array<SegmentRule, kMaxSegments> rules;
    const int count = retention.rules(queries, rules);
    for (int i = 0; i < count; ++i)
      out[static_cast<std::size_t>(i)] =
          stored(at(layer), from, retention, rules[static_cast<std::size_t>(i)]);
    return count;
  }

  /// The segments that a reader of another group sees of this cache's first `snapshot` tokens;
  /// returns how many were written. May be called while another thread appends
  /// (Retention::snapshot_rules), if the snapshot was published to this one.
  int snapshot_segments(std::int64_t layer, std::int64_t snapshot, const ReaderPlace& place,
                        std::span<SegmentType, kMaxSegments> out, int part = 0) const {
    const HeadClass& from = at(layer, part);
    const Retention& retention = retentions_[static_cast<std::size_t>(from.retention)];
    std::array<SegmentRule, kMaxSegments> rules;
    const int count = retention.snapshot_rules(snapshot, place, rules);
    for (int i = 0; i < count; ++i)
      out[static_cast<std::size_t>(i)] =
          stored(at(layer), from, retention, rules[static_cast<std::size_t>(i)]);
    return count;
  }

  /// Bytes of keys and values that were ever moved or copied inside the cache after they had been
  /// stored: only evict_range() and keep_path() move any.
  std::int64_t bytes_moved() const { return bytes_moved_; }

  /// Appends retentions and the kept rows. Allocates in the writer.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    detail::write_shape<Key, Value>(writer, shape_);
    for (const Retention& retention : retentions_) retention.save(writer);
    for (const Layer& layer : layers_)
      for (std::int64_t head = 0; head < shape_.num_kv_heads; ++head)
        writer.write<std::int32_t>(retention_of(layer, head));
    each_kept_row(*this, [&](const auto* row, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) detail::put_element(writer, row[i]);
    });
  }
  /// Takes over a saved state.
  /// \throws Error(kFormat) when shapes, types or retentions differ or data is short. On an error
  /// the cache is reset.
  void restore(ByteReader& reader) {
    reset();
    detail::expect_shape<Key, Value>(reader, shape_);
    std::vector<Retention> loaded = retentions_;
    for (Retention& retention : loaded) {
      retention.restore(reader);
      if (retention.total() != loaded.front().total())
        throw Error(ErrorCode::kFormat,
                    {"layers disagree", reader.source(), "total",
                     std::to_string(loaded.front().total()), std::to_string(retention.total())});
    }
    for (const Layer& layer : layers_)
      for (std::int64_t head = 0; head < shape_.num_kv_heads; ++head)
        reader.read_expected("retention of a head", retention_of(layer, head));
    retentions_.swap(loaded);
    try {
      each_kept_row(*this, [&](auto* row, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) detail::get_element(reader, row[i]);
      });
    } catch (...) {
      reset();
      throw;
    }
  }

 private:
  /// KV heads of one layer that share a retention.
  struct HeadClass {
    int retention = 0;
    std::int64_t num_heads = 0;
    std::vector<std::int32_t> kv_heads{};               // ascending; empty: all, in order
    std::int64_t key_offset = 0;                        // elements
    std::int64_t value_offset = 0;                      // elements
    std::int64_t key_scale_offset = 0;                  // scales
    std::int64_t value_scale_offset = 0;                // scales
    std::shared_ptr<const RotaryTable> key_rotation{};  // rows 0 .. capacity-1, for raw keys

    std::int64_t head(std::int64_t j) const {
      return kv_heads.empty() ? j : kv_heads[static_cast<std::size_t>(j)];
    }
  };
  struct Layer {
    const Rotary* rotary;
    std::vector<HeadClass> classes;
  };
  using KeyScale = typename KvRow<Key>::Scale;
  using ValueScale = typename KvRow<Value>::Scale;

  /// One token's key and value in one head; for reading with const types.
  template <class K, class V>
  struct Row {
    template <class Like, class T>
    using AsConst = std::conditional_t<std::is_const_v<Like>, const T, T>;
    K* key;
    V* value;
    AsConst<K, KeyScale>* key_scales;
    AsConst<V, ValueScale>* value_scales;
  };

  /// Elements and scales of a class of heads.
  struct Extents {
    std::int64_t keys;
    std::int64_t values;
    std::int64_t key_scales;
    std::int64_t value_scales;

    Extents(const KvShape& shape, std::int64_t heads, std::int64_t capacity)
        : keys(elements("head_dim", heads, capacity, KvRow<Key>::stored(shape.head_dim))),
          values(elements("value_dim", heads, capacity, KvRow<Value>::stored(shape.value_dim))),
          key_scales(elements("head_dim", heads, capacity, KvRow<Key>::scales(shape.head_dim))),
          value_scales(
              elements("value_dim", heads, capacity, KvRow<Value>::scales(shape.value_dim))) {}
    std::size_t bytes() const {
      return static_cast<std::size_t>(keys) * sizeof(Key) +
             static_cast<std::size_t>(values) * sizeof(Value) +
             static_cast<std::size_t>(key_scales) * sizeof(KeyScale) +
             static_cast<std::size_t>(value_scales) * sizeof(ValueScale);
    }
  };

  /// Classes in the order of their first heads.
  static std::vector<HeadClass> classes_of(const LayerCacheConfig& config,
                                           std::int64_t num_kv_heads) {
    if (config.retention_of_head.empty())
      return {HeadClass{.retention = config.retention, .num_heads = num_kv_heads}};
    std::vector<HeadClass> classes;
    for (std::int64_t head = 0; head < num_kv_heads; ++head) {
      const int retention = config.retention_of_head[static_cast<std::size_t>(head)];
      auto part = std::find_if(classes.begin(), classes.end(), [&](const HeadClass& known) {
        return known.retention == retention;
      });
      if (part == classes.end()) part = classes.insert(part, HeadClass{.retention = retention});
      part->kv_heads.push_back(static_cast<std::int32_t>(head));
      ++part->num_heads;
    }
    if (classes.size() == 1) classes.front().kv_heads.clear();
    return classes;
  }

  static std::int32_t retention_of(const Layer& layer, std::int64_t head) {
    for (const HeadClass& part : layer.classes)
      if (part.kv_heads.empty() ||
          std::binary_search(part.kv_heads.begin(), part.kv_heads.end(), head))
        return part.retention;
    return -1;  // never: every head is in a class
  }

  /// A rule with the storage of one class.
  SegmentType stored(const Layer& layer, const HeadClass& from, const Retention& retention,
                     const SegmentRule& rule) const {
    SegmentType segment;
    segment.rule = rule;
    const std::int64_t capacity = retention.config().capacity;
    const Row<const Key, const Value> first = row(from, retention, 0, rule.first_slot);
    segment.keys = first.key;
    segment.values = first.value;
    segment.key_token_stride = key_elements();
    segment.key_head_stride = capacity * key_elements();
    segment.value_token_stride = value_elements();
    segment.value_head_stride = capacity * value_elements();
    if constexpr (QuantisedElement<Key>) {
      segment.key_scales = first.key_scales;
      segment.key_scale_token_stride = KvRow<Key>::scales(shape_.head_dim);
      segment.key_scale_head_stride = capacity * segment.key_scale_token_stride;
    }
    if constexpr (QuantisedElement<Value>) {
      segment.value_scales = first.value_scales;
      segment.value_scale_token_stride = KvRow<Value>::scales(shape_.value_dim);
      segment.value_scale_head_stride = capacity * segment.value_scale_token_stride;
    }
    if (from.key_rotation != nullptr) {
      // Raw keys are numbered by small integers (Retention::rules), whose rows are tabled.
      segment.key_rotation = from.key_rotation->row(static_cast<std::int64_t>(rule.first_position));
      segment.key_rotation_stride = layer.rotary->row_size();
    }
    return segment;
  }

  /// Elements of the keys or values of a layer's `heads` heads, in whole cache lines.
  static std::int64_t elements(const char* field, std::int64_t heads, std::int64_t capacity,
                               std::int64_t dim) {
    // Extents may come from files: a product that wraps must not give a small buffer.
    constexpr std::int64_t kMost = std::int64_t{1} << 50;
    if (heads > kMost / capacity || dim > kMost / (heads * capacity))
      throw Error(ErrorCode::kShape, {"cache shape does not fit", "KvCache", field,
                                      "at most 2^50 elements in a layer", std::to_string(dim)});
    const auto line = static_cast<std::int64_t>(kAlignment);
    return (heads * capacity * dim + line - 1) / line * line;
  }

  const Layer& at(std::int64_t layer) const {
    SLUICE_ASSERT(layer >= 0 && layer < shape_.num_layers);
    return layers_[static_cast<std::size_t>(layer)];
  }
  const HeadClass& at(std::int64_t layer, int part) const {
    SLUICE_ASSERT(part >= 0 && part < num_classes(layer));
    return at(layer).classes[static_cast<std::size_t>(part)];
  }

  std::int64_t key_elements() const { return KvRow<Key>::stored(shape_.head_dim); }
  std::int64_t value_elements() const { return KvRow<Value>::stored(shape_.value_dim); }

  template <class K, class V, class Self>
  static Row<K, V> row_of(Self& self, const HeadClass& part, const Retention& retention,
                          std::int64_t head, std::int64_t slot) {
    const std::int64_t index = head * retention.config().capacity + slot;
    const KvShape& shape = self.shape_;
    Row<K, V> row{self.keys_.data() + part.key_offset + index * self.key_elements(),
                  self.values_.data() + part.value_offset + index * self.value_elements(), nullptr,
                  nullptr};
    if constexpr (QuantisedElement<Key>)
      row.key_scales = self.key_scales_.data() + part.key_scale_offset +
                       index * KvRow<Key>::scales(shape.head_dim);
    if constexpr (QuantisedElement<Value>)
      row.value_scales = self.value_scales_.data() + part.value_scale_offset +
                         index * KvRow<Value>::scales(shape.value_dim);
    return row;
  }
  Row<Key, Value> row(const HeadClass& part, const Retention& retention, std::int64_t head,
                      std::int64_t slot) {
    return row_of<Key, Value>(*this, part, retention, head, slot);
  }
  Row<const Key, const Value> row(const HeadClass& part, const Retention& retention,
                                  std::int64_t head, std::int64_t slot) const {
    return row_of<const Key, const Value>(*this, part, retention, head, slot);
  }
  /// Calls visit(data, count) for the parts of a row, in a fixed order.
  template <class Parts, class Visit>
  void each_part(const Parts& parts, Visit&& visit) const {
    visit(parts.key, key_elements());
    if constexpr (QuantisedElement<Key>)
      visit(parts.key_scales, KvRow<Key>::scales(shape_.head_dim));
    visit(parts.value, value_elements());
    if constexpr (QuantisedElement<Value>)
      visit(parts.value_scales, KvRow<Value>::scales(shape_.value_dim));
  }
  template <class From>
  void copy_row(const From& from, const Row<Key, Value>& to) const {
    std::copy_n(from.key, key_elements(), to.key);
    std::copy_n(from.value, value_elements(), to.value);
    if constexpr (QuantisedElement<Key>)
      std::copy_n(from.key_scales, KvRow<Key>::scales(shape_.head_dim), to.key_scales);
    if constexpr (QuantisedElement<Value>)
      std::copy_n(from.value_scales, KvRow<Value>::scales(shape_.value_dim), to.value_scales);
  }

  /// Calls visit(data, count) for the parts of each stored row, in a fixed order. With
  /// Eviction::kPerQuery the rows older than the window that a truncation may bring back belong to
  /// the state too.
  template <class Self, class Visit>
  static void each_kept_row(Self& self, Visit&& visit) {
    each_kept_row(self, visit, [](const Retention&) { return true; });
  }
  /// Those of the retentions that `wanted` says.
  template <class Self, class Visit, class Wanted>
  static void each_kept_row(Self& self, Visit&& visit, Wanted&& wanted) {
    for (const Layer& layer : self.layers_)
      for (const HeadClass& part : layer.classes) {
        const Retention& retention = self.retentions_[static_cast<std::size_t>(part.retention)];
        if (!wanted(retention)) continue;
        retention.each_stored_slot([&](std::int64_t slot) {
          for (std::int64_t j = 0; j < part.num_heads; ++j)
            self.each_part(self.row(part, retention, j, slot), visit);
        });
      }
  }

  void move_row(int retention_index, std::int64_t from, std::int64_t to) {
    const Retention& retention = retentions_[static_cast<std::size_t>(retention_index)];
    for (const Layer& layer : layers_)
      for (const HeadClass& part : layer.classes) {
        if (part.retention != retention_index) continue;
        for (std::int64_t j = 0; j < part.num_heads; ++j) {
          copy_row(row(part, retention, j, from), row(part, retention, j, to));
          bytes_moved_ += row_bytes();
        }
      }
  }

  /// Bytes of one token's key and value in one head.
  std::int64_t row_bytes() const {
    const auto bytes = [](std::int64_t count, std::size_t size) {
      return count * static_cast<std::int64_t>(size);
    };
    return bytes(key_elements(), sizeof(Key)) + bytes(value_elements(), sizeof(Value)) +
           bytes(KvRow<Key>::scales(shape_.head_dim), sizeof(KeyScale)) +
           bytes(KvRow<Value>::scales(shape_.value_dim), sizeof(ValueScale));
  }

  std::shared_ptr<const RotaryTable> raw_key_table(const Rotary& rotary, std::int64_t capacity) {
    for (const Layer& layer : layers_)
      for (const HeadClass& part : layer.classes)
        if (layer.rotary == &rotary && part.key_rotation != nullptr &&
            part.key_rotation->capacity() == capacity)
          return part.key_rotation;
    auto table = std::make_shared<RotaryTable>(rotary, capacity);
    table->fill_run(0, capacity);
    return table;
  }

  int tightest() const {
    int result = 0;
    for (int r = 1; r < static_cast<int>(retentions_.size()); ++r)
      if (retentions_[static_cast<std::size_t>(r)].max_truncate() <
          retentions_[static_cast<std::size_t>(result)].max_truncate())
        result = r;
    return result;
  }

  static void check_shape(const KvShape& shape, std::span<const RetentionConfig> retentions,
                          std::span<const LayerCacheConfig> layers) {
    const auto fail = [](const char* field, const std::string& expected, std::int64_t found) {
      throw Error(ErrorCode::kShape,
                  {"cache shape does not fit", "KvCache", field, expected, std::to_string(found)});
    };
    if (shape.num_layers < 1) fail("num_layers", "at least 1", shape.num_layers);
    if (shape.num_kv_heads < 1) fail("num_kv_heads", "at least 1", shape.num_kv_heads);
    if (shape.head_dim < 1) fail("head_dim", "at least 1", shape.head_dim);
    if (shape.value_dim < 1) fail("value_dim", "at least 1", shape.value_dim);
    if (shape.head_dim % KvRow<Key>::kUnit != 0)
      fail("head_dim",
           "a multiple of " + std::to_string(KvRow<Key>::kUnit) + ", for its element type",
           shape.head_dim);
    if (shape.value_dim % KvRow<Value>::kUnit != 0)
      fail("value_dim",
           "a multiple of " + std::to_string(KvRow<Value>::kUnit) + ", for its element type",
           shape.value_dim);
    if (static_cast<std::int64_t>(layers.size()) != shape.num_layers)
      fail("layers", std::to_string(shape.num_layers) + " entries",
           static_cast<std::int64_t>(layers.size()));
    if (retentions.empty()) fail("retentions", "at least one", 0);
    for (const LayerCacheConfig& layer : layers) {
      const auto check = [&](int retention) {
        if (retention < 0 || retention >= static_cast<int>(retentions.size()))
          fail("layer retention", "below " + std::to_string(retentions.size()), retention);
      };
      check(layer.retention);
      for (const int retention : layer.retention_of_head) check(retention);
      if (!layer.retention_of_head.empty() &&
          static_cast<std::int64_t>(layer.retention_of_head.size()) != shape.num_kv_heads)
        fail("retention_of_head", std::to_string(shape.num_kv_heads) + " entries, or none",
             static_cast<std::int64_t>(layer.retention_of_head.size()));
      if (layer.rotary != nullptr && layer.rotary->head_dim() != shape.head_dim)
        fail("rotary head_dim", std::to_string(shape.head_dim), layer.rotary->head_dim());
      if (QuantisedElement<Key> && layer.rotary != nullptr && shape.head_dim > kMaxRotaryDim)
        fail("head_dim", "at most " + std::to_string(kMaxRotaryDim) + " for quantised keys",
             shape.head_dim);
    }
  }

  KvShape shape_;
  std::vector<Retention> retentions_;
  std::vector<Layer> layers_;
  std::int64_t bytes_moved_ = 0;
  Buffer<Key, Tag> keys_;                 // per layer [num_kv_heads, capacity, head_dim]
  Buffer<Value, Tag> values_;             // per layer [num_kv_heads, capacity, value_dim]
  Buffer<KeyScale, Tag> key_scales_;      // per layer [num_kv_heads, capacity, scales of a row]
  Buffer<ValueScale, Tag> value_scales_;  // likewise
};

}  // namespace sluice
