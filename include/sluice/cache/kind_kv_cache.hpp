// SPDX-License-Identifier: MIT
/// Keys and values of a conversation about a video, kept by kind (kind_retention.hpp): text sinks,
/// text window, the last rounds and their frames, in memory that is fixed at construction.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/cache/kind_retention.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/segment.hpp"
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
/// its own; for frames, fill_positions(grid, next_position(), ...) gives them. Only construction
/// allocates. One thread changes the cache; store() of different rows may run on several.
template <RotaryElement Key, RotaryElement Value = Key>
class KindKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = KindRetention::kMaxSegments;

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
  Key* key(std::int64_t layer, std::int64_t head, std::int64_t slot) {
    return keys_.data() + row(layer, head, slot) * shape_.head_dim;
  }
  Value* value(std::int64_t layer, std::int64_t head, std::int64_t slot) {
    return values_.data() + row(layer, head, slot) * shape_.value_dim;
  }
  float* raw_reply(std::int64_t layer, std::int64_t head, std::int64_t reply) {
    return raw_replies_.data() +
           ((layer * shape_.num_kv_heads + head) * retention_.reply_slots() + reply) *
               shape_.head_dim;
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
