// SPDX-License-Identifier: MIT
/// S2-Attention (dkernel): each head sees the newest blocks of tokens and, of the older ones, its
/// own shard, every vert_stride-th block. A head keeps its shard and the newest blocks and nothing
/// else; shards of different heads together cover the text.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Which blocks of keys a block of queries sees, for each KV head (dkernel's LocalStrideSparse
/// rule).
struct ShardPattern {
  std::int64_t num_heads = 0;
  std::int64_t block_size = 64;   ///< tokens
  std::int64_t local_blocks = 1;  ///< newest blocks that every head sees, the query's own included
  std::int64_t vert_stride = 1;   ///< of the older blocks a head sees one in so many
  std::int64_t offset = 0;
  std::int64_t num_dense_heads = 0;  ///< the last heads see everything

  bool is_dense(std::int64_t head) const { return head >= num_heads - num_dense_heads; }
  /// Blocks from one head's shard to the next head's.
  std::int64_t head_step() const { return std::max<std::int64_t>(1, vert_stride / num_heads); }
  /// Whether a block stays with a head when it is no longer local.
  bool keeps(std::int64_t head, std::int64_t block) const {
    return is_dense(head) || (block + head * head_step() + offset) % vert_stride == 0;
  }
  /// Whether queries of block `query` see keys of block `key` (causality inside the block aside).
  bool sees(std::int64_t head, std::int64_t query, std::int64_t key) const {
    return key <= query && (query - key < local_blocks || keeps(head, key));
  }
  /// Blocks of the head's shard among the first `blocks`.
  std::int64_t kept_before(std::int64_t head, std::int64_t blocks) const {
    if (is_dense(head)) return blocks;
    const std::int64_t first =
        (vert_stride - (head * head_step() + offset) % vert_stride) % vert_stride;
    return blocks <= first ? 0 : (blocks - first - 1) / vert_stride + 1;
  }

  /// \throws Error(kConfig) naming the field that makes no sense.
  void validate() const {
    const auto need = [](bool fine, const char* field, const char* expected, std::int64_t found) {
      if (!fine)
        throw Error(ErrorCode::kConfig, {"shard pattern does not fit", "ShardPattern", field,
                                         expected, std::to_string(found)});
    };
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    need(num_heads >= 1 && num_heads <= kMost, "num_heads", "at least 1", num_heads);
    need(block_size >= 1 && block_size <= kMost, "block_size", "at least 1", block_size);
    need(local_blocks >= 1 && local_blocks <= kMost, "local_blocks", "at least 1", local_blocks);
    need(vert_stride >= 1 && vert_stride <= kMost, "vert_stride", "at least 1", vert_stride);
    need(offset >= 0 && offset <= kMost, "offset", "at least 0", offset);
    need(num_dense_heads >= 0 && num_dense_heads <= num_heads, "num_dense_heads", "0 to num_heads",
         num_dense_heads);
  }
};

/// Refuses a block mask under which a cache that lets blocks go would lack one later: a block that
/// has left the local blocks and that an earlier query did not see, but a later one does. dkernel
/// warns of such patterns; they would need everything kept. sees(query, key): of one head, over
/// `blocks` blocks. \throws Error(kConfig) naming the first such pair.
template <class Sees>
void check_cache_efficient(std::int64_t blocks, std::int64_t local_blocks, Sees&& sees) {
  for (std::int64_t key = 0; key < blocks; ++key)
    for (std::int64_t query = key + local_blocks + 1; query < blocks; ++query)
      if (sees(query, key) && !sees(query - 1, key))
        throw Error(ErrorCode::kConfig,
                    {"the pattern is not cache-efficient", "check_cache_efficient",
                     "block " + std::to_string(query),
                     "no block that block " + std::to_string(query - 1) + " did not see",
                     "block " + std::to_string(key)});
}

/// Keys and values of one stream under a ShardPattern: of each layer and head the shard, all of it
/// up to `capacity` tokens, and a ring of local blocks. Keys are rotated once, at their places in
/// the text. A head is a class of its own; it sees its shard as one segment and the local blocks as
/// one or two.
///
/// Protocol of a step: as KvCache. A chunk lies within one block, whose queries all see the same
/// blocks: status() says kFull for one that would cross into the next; room_in_block() is what
/// fits. Nothing has to be undone in a roll-back: what is visible follows from the number of
/// tokens. Only construction allocates. One thread at a time; store() of different rows may run on
/// several.
template <RotaryElement Key, RotaryElement Value = Key>
class ShardKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = 3;

  /// rotaries: [num_layers], each null or outliving the cache. \throws Error(kConfig) as
  /// ShardPattern::validate, Error(kShape) for extents that do not fit.
  ShardKvCache(const KvShape& shape, const ShardPattern& pattern, std::int64_t capacity,
               std::span<const Rotary* const> rotaries)
      : shape_(shape),
        pattern_(pattern),
        capacity_(capacity),
        rotaries_(rotaries.begin(), rotaries.end()) {
    pattern_.validate();
    const auto need = [](bool fine, const char* field, const std::string& expected,
                         std::int64_t found) {
      if (!fine)
        throw Error(ErrorCode::kShape, {"cache shape does not fit", "ShardKvCache", field, expected,
                                        std::to_string(found)});
    };
    need(shape.num_layers >= 1, "num_layers", "at least 1", shape.num_layers);
    need(shape.num_kv_heads == pattern.num_heads, "num_kv_heads", std::to_string(pattern.num_heads),
         shape.num_kv_heads);
    need(shape.head_dim >= 1, "head_dim", "at least 1", shape.head_dim);
    need(shape.value_dim >= 1, "value_dim", "at least 1", shape.value_dim);
    need(capacity >= 1 && capacity <= (std::int64_t{1} << 40), "capacity", "1 to 2^40", capacity);
    need(static_cast<std::int64_t>(rotaries.size()) == shape.num_layers, "rotaries",
         std::to_string(shape.num_layers) + " entries", static_cast<std::int64_t>(rotaries.size()));
    for (const Rotary* rotary : rotaries)
      need(rotary == nullptr || rotary->head_dim() == shape.head_dim, "rotary head_dim",
           std::to_string(shape.head_dim), rotary == nullptr ? 0 : rotary->head_dim());
    const std::int64_t blocks = (capacity + pattern.block_size - 1) / pattern.block_size;
    for (std::int64_t h = 0; h < shape.num_kv_heads; ++h) {
      Head head;
      head.first = layer_rows_;
      head.shard = pattern.kept_before(h, blocks) * pattern.block_size;
      head.local =
          pattern.is_dense(h) ? 0 : std::min(pattern.local_blocks, blocks) * pattern.block_size;
      layer_rows_ += head.shard + head.local;
      heads_.push_back(head);
      numbers_.push_back(static_cast<std::int32_t>(h));
    }
    keys_ = Buffer<Key>(size(shape.num_layers * layer_rows_ * shape.head_dim));
    values_ = Buffer<Value>(size(shape.num_layers * layer_rows_ * shape.value_dim));
  }

  const KvShape& shape() const { return shape_; }
  const ShardPattern& pattern() const { return pattern_; }
  std::int64_t total() const { return total_; }
  std::int64_t committed() const { return committed_; }
  Position write_position(std::int64_t index) const { return static_cast<Position>(index); }
  bool takes_positions() const { return false; }
  std::int64_t max_chunk() const { return pattern_.block_size; }
  std::int64_t max_entries() const {
    std::int64_t most = 0;
    for (const Head& head : heads_) most = std::max(most, head.shard + head.local);
    return most;
  }
  std::size_t bytes() const { return keys_.bytes() + values_.bytes(); }
  /// Entries that the newest token sees in a head of any layer.
  std::int64_t size_of(std::int64_t, std::int64_t head) const {
    if (total_ == 0 || pattern_.is_dense(head)) return total_;
    const std::int64_t local =
        std::max<std::int64_t>(0, (total_ - 1) / pattern_.block_size - pattern_.local_blocks + 1);
    return (pattern_.kept_before(head, local) - local) * pattern_.block_size + total_;
  }
  /// Tokens that fit the current block.
  std::int64_t room_in_block() const { return pattern_.block_size - total_ % pattern_.block_size; }

  CacheStatus status(std::int64_t tokens) const {
    // A new block takes the place of one that a roll-back would want again.
    const bool filled = total_ > committed_ && total_ % pattern_.block_size == 0;
    return !filled && tokens <= room_in_block() && total_ + tokens <= capacity_
               ? CacheStatus::kOk
               : CacheStatus::kFull;
  }
  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    total_ += tokens;
  }
  void commit() { committed_ = total_; }
  void rollback() { total_ = committed_; }
  void reset() { total_ = committed_ = 0; }

  /// Writes keys and values of the newest tokens; as KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Rotary* rotary = rotaries_[size(layer)];
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t index = total_ - keys.tokens + t;
      const std::int64_t block = index / pattern_.block_size;
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        const Head& head = heads_[size(h)];
        const auto write = [&](std::int64_t row) {
          row += layer * layer_rows_ + head.first;
          Key* key = keys_.data() + row * shape_.head_dim;
          if (rotary != nullptr)
            rotary->rotate(rotation + t * rotary->row_size(), keys.head(t, h), key);
          else
            for (std::int64_t d = 0; d < shape_.head_dim; ++d)
              key[d] = static_cast<Key>(keys.head(t, h)[d]);
          Value* value = values_.data() + row * shape_.value_dim;
          for (std::int64_t d = 0; d < shape_.value_dim; ++d)
            value[d] = static_cast<Value>(values.head(t, h)[d]);
        };
        if (pattern_.keeps(h, block))
          write(pattern_.kept_before(h, block) * pattern_.block_size + index % pattern_.block_size);
        if (head.local > 0) write(head.shard + index % head.local);
      }
    }
  }

  int num_classes(std::int64_t) const { return static_cast<int>(shape_.num_kv_heads); }
  HeadClassView head_class(std::int64_t, int part = 0) const {
    HeadClassView view;
    view.kv_heads = {numbers_.data() + part, 1};
    return view;
  }
  /// The head's shard as far as it has left the local blocks, and the local blocks. The shard's
  /// entries are numbered from 0: all of them lie before the queries, which is what visibility
  /// asks.
  int segments(std::int64_t layer, [[maybe_unused]] std::int64_t queries,
               std::span<SegmentType, kMaxSegments> out, int part = 0) const {
    if (total_ == 0) return 0;
    const Head& head = heads_[size(part)];
    const std::int64_t newest = (total_ - 1) / pattern_.block_size;
    SLUICE_ASSERT(queries <= total_ - newest * pattern_.block_size);
    int written = 0;
    const auto add = [&](std::int64_t first_index, std::int64_t row, std::int64_t count) {
      SegmentType& segment = out[size(written++)];
      segment = SegmentType{};
      segment.rule.first_index = first_index;
      segment.rule.count = segment.rule.visible = count;
      segment.rule.first_position = static_cast<Position>(first_index);
      row += layer * layer_rows_ + head.first;
      segment.keys = keys_.data() + row * shape_.head_dim;
      segment.values = values_.data() + row * shape_.value_dim;
      segment.key_token_stride = shape_.head_dim;
      segment.value_token_stride = shape_.value_dim;
    };
    if (head.local == 0) {
      add(0, 0, total_);
      return written;
    }
    const std::int64_t oldest =
        std::max<std::int64_t>(0, newest - pattern_.local_blocks + 1);  // local block
    const std::int64_t shard = pattern_.kept_before(part, oldest) * pattern_.block_size;
    if (shard > 0) add(0, 0, shard);
    for (std::int64_t index = oldest * pattern_.block_size; index < total_;) {
      const std::int64_t slot = index % head.local;
      const std::int64_t count = std::min(total_ - index, head.local - slot);
      add(index, head.shard + slot, count);
      index += count;
    }
    return written;
  }

 private:
  /// A head's rows in its layer: the shard, then the ring of local blocks.
  struct Head {
    std::int64_t first = 0;
    std::int64_t shard = 0;
    std::int64_t local = 0;
  };
  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  KvShape shape_;
  ShardPattern pattern_;
  std::int64_t capacity_;
  std::vector<const Rotary*> rotaries_;
  std::vector<Head> heads_;
  std::vector<std::int32_t> numbers_;
  std::int64_t layer_rows_ = 0;
  Buffer<Key> keys_;      // [layers, rows, head_dim]
  Buffer<Value> values_;  // [layers, rows, value_dim]
  std::int64_t total_ = 0;
  std::int64_t committed_ = 0;
};

}  // namespace sluice
