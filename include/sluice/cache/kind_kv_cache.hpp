// SPDX-License-Identifier: MIT
/// Keys and values of a conversation about a video, kept by kind (kind_retention.hpp): text sinks,
/// text window, the last rounds and their frames, in memory that is fixed at construction.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kind_retention.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// A DecoderCache (model/decoder.hpp) of one stream. Keys are stored rotated at the positions that
/// they were written with; a reply's keys are kept in float32 beside it until they move into the
/// block and are rotated to their place there, so that no rounded key is rotated again.
///
/// Protocol: KindRetention's, with forward() in the place of append(). Text needs no positions of
/// its own; for frames, fill_positions(grid, next_position(), ...) gives them. Only construction,
/// make_checkpoint(), sibling() and save() allocate. One thread changes the cache; store() of
/// different rows may run on several.
template <RotaryElement Key, RotaryElement Value = Key>
class KindKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = KindRetention::kMaxSegments;

  /// A state that revert() returns to: the books, and a copy of every row that is kept.
  struct Checkpoint {
    KindRetention retention;
    std::int64_t tokens_moved = 0;
    Buffer<std::byte> rows;
    /// What it costs, the books left out.
    std::size_t bytes() const { return rows.bytes(); }
    /// As those of the cache, at the captured state.
    std::int64_t total() const { return retention.total(); }
    std::int64_t max_truncate() const { return retention.max_truncate(); }
  };

  /// rotaries: [num_layers], each null or outliving the cache.
  /// \throws Error(kConfig, kShape) naming what does not fit.
  KindKvCache(const KvShape& shape, const KindRetentionConfig& config,
              std::span<const Rotary* const> rotaries)
      : shape_(shape),
        retention_(config),
        rotaries_(rotaries.begin(), rotaries.end()),
        capacity_(config.capacity()) {
    const auto positive = [](const char* field, std::int64_t extent) {
      if (extent < 1 || extent > (std::int64_t{1} << 20))
        throw Error(ErrorCode::kShape, {"cache shape does not fit", "KindKvCache", field,
                                        "1 to 2^20", std::to_string(extent)});
    };
    positive("num_layers", shape.num_layers);
    positive("num_kv_heads", shape.num_kv_heads);
    positive("head_dim", shape.head_dim);
    positive("value_dim", shape.value_dim);
    if (static_cast<std::int64_t>(rotaries.size()) != shape.num_layers)
      throw Error(ErrorCode::kShape,
                  {"cache shape does not fit", "KindKvCache", "rotaries",
                   std::to_string(shape.num_layers) + " entries", std::to_string(rotaries.size())});
    for (const Rotary* rotary : rotaries)
      if (rotary != nullptr && rotary->head_dim() != shape.head_dim)
        throw Error(ErrorCode::kShape,
                    {"cache shape does not fit", "KindKvCache", "rotary head_dim",
                     std::to_string(shape.head_dim), std::to_string(rotary->head_dim())});
    const std::int64_t heads = shape.num_layers * shape.num_kv_heads;
    if (heads > (std::int64_t{1} << 50) / (capacity_ * std::max(shape.head_dim, shape.value_dim)))
      throw Error(ErrorCode::kShape, {"cache shape does not fit", "KindKvCache", "slots",
                                      "at most 2^50 elements", std::to_string(capacity_)});
    keys_ = Buffer<Key>(size(heads * capacity_ * shape.head_dim));
    values_ = Buffer<Value>(size(heads * capacity_ * shape.value_dim));
    raw_replies_ = Buffer<float>(size(heads * retention_.reply_slots() * shape.head_dim));
    angles_ = Buffer<float>(static_cast<std::size_t>(kMaxRotaryDim));
  }

  const KvShape& shape() const { return shape_; }
  const KindRetention& retention() const { return retention_; }
  std::int64_t total() const { return retention_.total(); }
  Position next_position() const { return retention_.next_position(); }
  Position write_position(std::int64_t index) const {
    return next_position() + static_cast<Position>(index - total());
  }
  bool takes_positions() const { return true; }
  std::int64_t max_chunk() const { return retention_.config().max_chunk; }
  /// Entries that one query can see.
  std::int64_t max_entries() const { return capacity_; }

  /// Bytes of keys and values, and of the replies' keys in float32.
  std::size_t bytes() const { return keys_.bytes() + values_.bytes() + raw_replies_.bytes(); }
  /// Bytes of keys and values that are set aside for a kind.
  std::size_t bytes(TokenKind kind) const {
    return static_cast<std::size_t>(retention_.slots(kind)) * token_bytes();
  }
  /// Bytes of keys and values of the tokens of a kind that are kept now.
  std::size_t bytes_in_use(TokenKind kind) const {
    return static_cast<std::size_t>(retention_.kept(kind)) * token_bytes();
  }
  /// Keys and values of one token, all layers.
  std::size_t token_bytes() const {
    return static_cast<std::size_t>(shape_.num_layers * shape_.num_kv_heads) *
           (static_cast<std::size_t>(shape_.head_dim) * sizeof(Key) +
            static_cast<std::size_t>(shape_.value_dim) * sizeof(Value));
  }
  /// Tokens whose rows were ever moved: those of replies that left their rounds.
  std::int64_t tokens_moved() const { return tokens_moved_; }

  /// As KindRetention's. \throws what it throws.
  void begin_round() {
    retention_.begin_round([this](const KindMove& move) { take_over(move); });
  }
  void begin_span(SpanRole role, const VisionGrid& grid = {}) { retention_.begin_span(role, grid); }
  CacheStatus status(std::int64_t tokens) const { return retention_.status(tokens); }
  /// Precondition: status(tokens) == kOk.
  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    retention_.append(tokens);
  }
  void commit() { retention_.commit(); }
  void rollback() { retention_.rollback(); }
  void reset() { retention_.reset(); }
  /// The most tokens that truncate() takes back: those of the open span.
  std::int64_t max_truncate() const { return retention_.max_truncate(); }
  /// Takes back the newest tokens, committed or not. \throws Error(kCapacity): nothing changes.
  void truncate(std::int64_t tokens) { retention_.truncate(tokens); }

  /// An empty checkpoint with all the room that capture() needs. Allocates it.
  Checkpoint make_checkpoint() const {
    const auto heads = static_cast<std::size_t>(shape_.num_layers * shape_.num_kv_heads);
    return {retention_, tokens_moved_,
            Buffer<std::byte>(size(capacity_) * token_bytes() + size(retention_.reply_slots()) *
                                                                    heads * size(shape_.head_dim) *
                                                                    sizeof(float))};
  }
  /// Takes the state of now. Allocates nothing. Precondition: nothing is uncommitted, `checkpoint`
  /// is of this cache or of one made alike.
  void capture(Checkpoint& checkpoint) const {
    SLUICE_ASSERT(retention_.total() == retention_.committed());
    checkpoint.retention = retention_;
    checkpoint.tokens_moved = tokens_moved_;
    std::byte* to = checkpoint.rows.data();
    each_kept_row(*this, [&](const auto* row, std::int64_t count) {
      const std::size_t bytes = sizeof(*row) * size(count);
      std::memcpy(to, row, bytes);
      to += bytes;
    });
  }
  /// Returns to a captured state, exactly, whatever has happened since: nothing tells it from a
  /// cache that never went on. Allocates nothing.
  void revert(const Checkpoint& checkpoint) {
    retention_ = checkpoint.retention;
    tokens_moved_ = checkpoint.tokens_moved;
    const std::byte* from = checkpoint.rows.data();
    each_kept_row(*this, [&](auto* row, std::int64_t count) {
      const std::size_t bytes = sizeof(*row) * size(count);
      std::memcpy(row, from, bytes);
      from += bytes;
    });
  }
  /// Becomes a copy of `other`, a cache made alike. Copies what is kept; allocates nothing.
  /// Precondition: nothing is uncommitted in `other`.
  void copy_from(const KindKvCache& other) {
    SLUICE_ASSERT(other.total() == other.retention_.committed() &&
                  keys_.size() == other.keys_.size() && values_.size() == other.values_.size());
    retention_ = other.retention_;
    tokens_moved_ = other.tokens_moved_;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        retention_.each_stored_slot([&](std::int64_t slot) {
          std::copy_n(other.key(l, h, slot), shape_.head_dim, key(l, h, slot));
          std::copy_n(other.value(l, h, slot), shape_.value_dim, value(l, h, slot));
        });
        retention_.each_reply_slot([&](std::int64_t reply) {
          std::copy_n(other.raw_reply(l, h, reply), shape_.head_dim, raw_reply(l, h, reply));
        });
      }
  }
  /// An empty cache made alike. Allocates it.
  KindKvCache sibling() const { return KindKvCache(shape_, retention_.config(), rotaries_); }

  /// Appends the books and the rows that are kept. Allocates in the writer. A checksum is the
  /// caller's (ByteWriter::write_checksum). \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    if (retention_.total() != retention_.committed())
      throw Error(ErrorCode::kOrder,
                  {"uncommitted tokens", "KindKvCache::save", "appended tokens", "0",
                   std::to_string(retention_.total() - retention_.committed())});
    detail::write_shape<Key, Value>(writer, shape_);
    writer.write<std::int64_t>(tokens_moved_);
    retention_.save(writer);
    each_kept_row(*this, [&](const auto* row, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) detail::put_element(writer, row[i]);
    });
  }
  /// Takes over a saved state. \throws Error(kFormat) when shape, types or configuration differ,
  /// the books are inconsistent or data is short. On an error the cache is reset.
  void restore(ByteReader& reader) {
    reset();
    detail::expect_shape<Key, Value>(reader, shape_);
    const std::size_t begin = reader.offset();
    const auto moved = reader.read<std::int64_t>("tokens_moved");
    if (moved < 0)
      reader.fail_at(begin, "inconsistent snapshot", "tokens_moved", "at least 0",
                     std::to_string(moved));
    try {
      retention_.restore(reader);
      each_kept_row(*this, [&](auto* row, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) detail::get_element(reader, row[i]);
      });
    } catch (...) {
      reset();
      throw;
    }
    tokens_moved_ = moved;
  }

  /// As KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Rotary* rotary = rotaries_[size(layer)];
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t back = keys.tokens - t;
      const std::int64_t slot = retention_.slot_of_newest(back);
      const std::int64_t reply = retention_.reply_slot_of_newest(back);
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        const float* from = keys.head(t, h);
        if (rotary != nullptr)
          rotary->rotate(rotation + t * rotary->row_size(), from, key(layer, h, slot));
        else
          convert(from, shape_.head_dim, key(layer, h, slot));
        convert(values.head(t, h), shape_.value_dim, value(layer, h, slot));
        if (reply >= 0) std::copy_n(from, shape_.head_dim, raw_reply(layer, h, reply));
      }
    }
  }

  int num_classes(std::int64_t) const { return 1; }
  HeadClassView head_class(std::int64_t, int = 0) const { return {}; }

  /// The segments that the newest tokens see; returns how many were written.
  int segments(std::int64_t layer, std::int64_t, std::span<SegmentType, kMaxSegments> out,
               int = 0) const {
    std::array<SegmentRule, kMaxSegments> rules;
    const int count = retention_.rules(rules);
    for (int i = 0; i < count; ++i) {
      SegmentType& segment = out[size(i)];
      segment = {};
      segment.rule = rules[size(i)];
      const std::int64_t row = layer * shape_.num_kv_heads * capacity_ + segment.rule.first_slot;
      segment.keys = keys_.data() + row * shape_.head_dim;
      segment.values = values_.data() + row * shape_.value_dim;
      segment.key_token_stride = shape_.head_dim;
      segment.value_token_stride = shape_.value_dim;
      segment.key_head_stride = capacity_ * shape_.head_dim;
      segment.value_head_stride = capacity_ * shape_.value_dim;
    }
    return count;
  }

 private:
  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
  template <class T>
  static void convert(const float* from, std::int64_t count, T* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }
  std::int64_t row(std::int64_t layer, std::int64_t head, std::int64_t slot) const {
    return (layer * shape_.num_kv_heads + head) * capacity_ + slot;
  }
  std::int64_t reply_row(std::int64_t layer, std::int64_t head, std::int64_t reply) const {
    return (layer * shape_.num_kv_heads + head) * retention_.reply_slots() + reply;
  }
  Key* key(std::int64_t layer, std::int64_t head, std::int64_t slot) {
    return keys_.data() + row(layer, head, slot) * shape_.head_dim;
  }
  const Key* key(std::int64_t layer, std::int64_t head, std::int64_t slot) const {
    return keys_.data() + row(layer, head, slot) * shape_.head_dim;
  }
  Value* value(std::int64_t layer, std::int64_t head, std::int64_t slot) {
    return values_.data() + row(layer, head, slot) * shape_.value_dim;
  }
  const Value* value(std::int64_t layer, std::int64_t head, std::int64_t slot) const {
    return values_.data() + row(layer, head, slot) * shape_.value_dim;
  }
  float* raw_reply(std::int64_t layer, std::int64_t head, std::int64_t reply) {
    return raw_replies_.data() + reply_row(layer, head, reply) * shape_.head_dim;
  }
  const float* raw_reply(std::int64_t layer, std::int64_t head, std::int64_t reply) const {
    return raw_replies_.data() + reply_row(layer, head, reply) * shape_.head_dim;
  }
  /// Calls visit(data, count) for keys and values of what is kept and for the float32 keys of the
  /// replies, in a fixed order.
  template <class Self, class Visit>
  static void each_kept_row(Self& self, Visit&& visit) {
    for (std::int64_t l = 0; l < self.shape_.num_layers; ++l)
      for (std::int64_t h = 0; h < self.shape_.num_kv_heads; ++h) {
        self.retention_.each_stored_slot([&](std::int64_t slot) {
          visit(self.key(l, h, slot), self.shape_.head_dim);
          visit(self.value(l, h, slot), self.shape_.value_dim);
        });
        self.retention_.each_reply_slot(
            [&](std::int64_t reply) { visit(self.raw_reply(l, h, reply), self.shape_.head_dim); });
      }
  }

  /// A reply's token becomes one of the block's texts.
  void take_over(const KindMove& move) {
    const Rotary* formed = nullptr;
    for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
      const Rotary* rotary = rotaries_[size(l)];
      if (rotary != nullptr && rotary != formed) {
        rotary->angles(move.position, angles_.data());
        formed = rotary;
      }
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        const float* raw = raw_reply(l, h, move.reply_slot);
        if (rotary != nullptr)
          rotary->rotate(angles_.data(), raw, key(l, h, move.to_slot));
        else
          convert(raw, shape_.head_dim, key(l, h, move.to_slot));
        std::copy_n(value(l, h, move.from_slot), shape_.value_dim, value(l, h, move.to_slot));
      }
    }
    ++tokens_moved_;
  }

  KvShape shape_;
  KindRetention retention_;
  std::vector<const Rotary*> rotaries_;
  std::int64_t capacity_;
  Buffer<Key> keys_;           // [layers, kv heads, capacity, head_dim]
  Buffer<Value> values_;       // [layers, kv heads, capacity, value_dim]
  Buffer<float> raw_replies_;  // [layers, kv heads, reply slots, head_dim], not rotated
  Buffer<float> angles_;       // one row
  std::int64_t tokens_moved_ = 0;
};

}  // namespace sluice
