// SPDX-License-Identifier: MIT
/// Keys and values of streams that keep everything and share what they have in common: forks of one
/// stream, and streams that begin alike. Memory is one store of pages, fixed at construction.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/page_pool.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// The pages of all layers: keys [num_layers, num_kv_heads, slots, head_dim] and values alike,
/// slots = num_pages * page_size, so that consecutive pages are one run of rows in each head. A
/// page is the same slots in every layer.
///
/// Caches of one store share its counts: one thread at a time uses all of them.
template <RotaryElement Key, RotaryElement Value = Key>
class PageStore {
 public:
  /// Allocates bytes() at once. `rotaries`: one entry a layer; null: keys carry no rotation; they
  /// must outlive the store. A page_size that is a multiple of 256 makes attention over pages equal
  /// to attention over a KvCache bit for bit, wherever the pages lie (kernels cut keys there); a
  /// smaller one shares more.
  /// \throws Error(kConfig) as PagePool; Error(kShape) when extents are not positive or too large,
  /// or rotaries do not fit.
  PageStore(const KvShape& shape, std::span<const Rotary* const> rotaries, std::int64_t num_pages,
            std::int64_t page_size)
      : shape_(shape), rotaries_(rotaries.begin(), rotaries.end()), pool_(num_pages, page_size) {
    const auto fail = [](const char* field, const std::string& expected, std::int64_t found) {
      throw Error(ErrorCode::kShape, {"cache shape does not fit", "PageStore", field, expected,
                                      std::to_string(found)});
    };
    if (shape.num_layers < 1) fail("num_layers", "at least 1", shape.num_layers);
    if (shape.num_kv_heads < 1) fail("num_kv_heads", "at least 1", shape.num_kv_heads);
    if (shape.head_dim < 1) fail("head_dim", "at least 1", shape.head_dim);
    if (shape.value_dim < 1) fail("value_dim", "at least 1", shape.value_dim);
    if (static_cast<std::int64_t>(rotaries.size()) != shape.num_layers)
      fail("rotaries", std::to_string(shape.num_layers) + " entries",
           static_cast<std::int64_t>(rotaries.size()));
    for (const Rotary* rotary : rotaries)
      if (rotary != nullptr && rotary->head_dim() != shape.head_dim)
        fail("rotary head_dim", std::to_string(shape.head_dim), rotary->head_dim());
    // A product that wraps must not give a small buffer.
    constexpr std::int64_t kMost = std::int64_t{1} << 50;
    std::int64_t rows = slots();
    for (const std::int64_t extent :
         {shape.num_layers, shape.num_kv_heads, std::max(shape.head_dim, shape.value_dim)}) {
      if (extent > kMost / rows) fail("elements", "at most 2^50", extent);
      rows *= extent;
    }
    const std::int64_t lines = shape.num_layers * shape.num_kv_heads * slots();
    keys_ = Buffer<Key>(static_cast<std::size_t>(lines * shape.head_dim));
    values_ = Buffer<Value>(static_cast<std::size_t>(lines * shape.value_dim));
  }

  const KvShape& shape() const { return shape_; }
  const Rotary* rotary(std::int64_t layer) const {
    return rotaries_[static_cast<std::size_t>(layer)];
  }
  PagePool& pool() { return pool_; }
  const PagePool& pool() const { return pool_; }
  std::int64_t slots() const { return pool_.num_pages() * pool_.page_size(); }
  std::size_t bytes() const { return keys_.bytes() + values_.bytes(); }
  std::size_t page_bytes() const { return bytes() / static_cast<std::size_t>(pool_.num_pages()); }
  /// Of the pages that any cache holds, each counted once.
  std::size_t bytes_in_use() const {
    return page_bytes() * static_cast<std::size_t>(pool_.num_pages() - pool_.free_pages());
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
  /// Copies the rows of `count` slots, in all layers and heads.
  void copy_slots(std::int64_t from, std::int64_t to, std::int64_t count) {
    for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer)
      for (std::int64_t head = 0; head < shape_.num_kv_heads; ++head) {
        std::copy_n(key(layer, head, from), count * shape_.head_dim, key(layer, head, to));
        std::copy_n(value(layer, head, from), count * shape_.value_dim, value(layer, head, to));
      }
  }

 private:
  std::int64_t row(std::int64_t layer, std::int64_t head, std::int64_t slot) const {
    return (layer * shape_.num_kv_heads + head) * slots() + slot;
  }

  KvShape shape_;
  std::vector<const Rotary*> rotaries_;
  PagePool pool_;
  Buffer<Key> keys_;
  Buffer<Value> values_;
};

/// A cache of one stream in the pages of a store: everything is kept, keys are stored rotated, and
/// a layer with a trained window masks what it must not see. The protocol of a step, and what each
/// function does, are those of KvCache. Its segments are the maximal runs of consecutive pages.
/// Only construction, save() and restore() allocate.
template <RotaryElement Key, RotaryElement Value = Key>
class PagedKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = PageTable::kMaxRuns;

  /// Pages stay in place until they are taken back: a length says it all.
  struct Checkpoint {
    std::int64_t tokens = 0;
    std::size_t bytes() const { return 0; }
    std::int64_t total() const { return tokens; }
    std::int64_t max_truncate() const { return tokens; }
  };

  /// For at most max_tokens tokens, max_chunk of them in a step, the first at position `origin`.
  /// \throws Error(kConfig) as Retention.
  PagedKvCache(std::shared_ptr<PageStore<Key, Value>> store, std::int64_t max_tokens,
               std::int64_t max_chunk, Position origin = 0)
      : store_(std::move(store)),
        retention_(config(max_tokens, max_chunk, origin)),
        table_(store_->pool(), max_tokens) {
    tokens_.reserve(static_cast<std::size_t>(max_tokens));
    named_.reserve(static_cast<std::size_t>(max_tokens / store_->pool().page_size()));
  }
  PagedKvCache(PagedKvCache&&) noexcept = default;

  /// An empty cache of the same store and extents.
  PagedKvCache sibling() const {
    return PagedKvCache(store_, table_.max_tokens(), retention_.config().max_chunk,
                        retention_.config().origin);
  }

  const KvShape& shape() const { return store_->shape(); }
  const PageStore<Key, Value>& store() const { return *store_; }
  const PageTable& table() const { return table_; }
  const Retention& retention(std::int64_t) const { return retention_; }
  const Rotary* rotary(std::int64_t layer) const { return store_->rotary(layer); }
  std::int64_t total() const { return retention_.total(); }
  Position write_position(std::int64_t index) const { return retention_.write_position(index); }
  bool takes_positions() const { return true; }
  /// Bytes of the pages that this cache holds, shared or not.
  std::size_t bytes() const { return store_->page_bytes() * table_.pages().size(); }
  std::int64_t max_entries() const { return table_.max_tokens(); }
  std::int64_t max_chunk() const { return retention_.config().max_chunk; }

  /// kFull too when the store has no page left, or none that would keep the table short.
  CacheStatus status(std::int64_t tokens) const {
    return retention_.status(tokens) == CacheStatus::kOk && table_.fits(tokens)
               ? CacheStatus::kOk
               : CacheStatus::kFull;
  }
  /// Tokens that the cache could take if it held its first `length` ones.
  std::int64_t room_behind(std::int64_t length) const { return table_.room_behind(length); }
  /// Copies a shared page before it is written. Precondition: status(tokens) == kOk.
  void append(std::int64_t tokens) {
    table_.append(tokens, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
      store_->copy_slots(from, to, count);
      bytes_copied_ +=
          count * static_cast<std::int64_t>(store_->page_bytes()) / store_->pool().page_size();
    });
    retention_.append(tokens);
  }
  void commit() { retention_.commit(); }
  void rollback() { cut(retention_.committed()); }
  std::int64_t max_truncate() const { return retention_.max_truncate(); }
  void truncate(std::int64_t tokens) {
    retention_.truncate(tokens);
    cut(retention_.total());
  }
  void reset() {
    retention_.reset();
    cut(0);
  }
  void keep_path(std::int64_t tokens, std::span<const std::int64_t> path) {
    const std::int64_t first = total() - tokens;
    for (std::size_t i = 0; i < path.size(); ++i)
      if (path[i] != static_cast<std::int64_t>(i))
        store_->copy_slots(table_.slot(first + path[i]),
                           table_.slot(first + static_cast<std::int64_t>(i)), 1);
    truncate(tokens - static_cast<std::int64_t>(path.size()));
  }

  Checkpoint make_checkpoint() const { return {}; }
  void capture(Checkpoint& checkpoint) const { checkpoint.tokens = total(); }
  void revert(const Checkpoint& checkpoint) { truncate(total() - checkpoint.tokens); }
  /// Becomes a fork of `other`: the same pages, their counts one higher, nothing copied until one
  /// of the two writes into the last. Precondition: caches of one store, made alike.
  void copy_from(const PagedKvCache& other) {
    SLUICE_ASSERT(store_ == other.store_);
    table_.share(other.table_);
    retention_ = other.retention_;
    tokens_.assign(other.tokens_.begin(), other.tokens_.end());
    named_.assign(other.named_.begin(), other.named_.end());
  }
  /// Bytes copied because pages were shared or scattered.
  std::int64_t bytes_copied() const { return bytes_copied_; }

  /// Says which tokens the newest rows hold, after a commit: full pages become known to other
  /// caches of the store. Has no effect if older rows were not named (those that restore() read).
  void name_tokens(std::span<const Token> tokens) {
    if (static_cast<std::int64_t>(tokens_.size() + tokens.size()) != total()) return;
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    const auto size = static_cast<std::size_t>(store_->pool().page_size());
    while ((named_.size() + 1) * size <= tokens_.size()) {
      const std::size_t page = named_.size();
      const NamedPage parent = page == 0 ? NamedPage{} : named_.back();
      // Behind a page that nobody finds any more, nothing is found.
      const bool lost = page > 0 && parent.page == kNoPage;
      named_.push_back(lost
                           ? NamedPage{}
                           : store_->pool().publish(table_.pages()[page], parent,
                                                    std::span(tokens_).subspan(page * size, size)));
    }
  }
  /// Of an empty cache: takes over the full pages that hold the beginning of `tokens`, all but the
  /// last token at most, whose logits must be computed. Returns how many tokens it holds then.
  /// (Prefix reuse as in vLLM, but for the hash, which is never trusted alone.)
  std::int64_t adopt_prefix(std::span<const Token> tokens) {
    SLUICE_ASSERT(total() == 0);
    const std::int64_t size = store_->pool().page_size();
    const std::int64_t most =
        std::min(static_cast<std::int64_t>(tokens.size()) - 1, table_.max_tokens());
    while (total() + size <= most) {
      const auto page_tokens =
          tokens.subspan(static_cast<std::size_t>(total()), static_cast<std::size_t>(size));
      const NamedPage found =
          store_->pool().find(named_.empty() ? NamedPage{} : named_.back(), page_tokens);
      if (found.page == kNoPage) break;
      if (table_.runs() == PageTable::kMaxRuns && table_.pages().back() + 1 != found.page) break;
      table_.adopt(found.page);
      tokens_.insert(tokens_.end(), page_tokens.begin(), page_tokens.end());
      named_.push_back(found);
      restart(table_.total());
    }
    return total();
  }

  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Rotary* rotary = store_->rotary(layer);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t slot = table_.slot(total() - keys.tokens + t);
      for (std::int64_t head = 0; head < shape().num_kv_heads; ++head) {
        Key* key = store_->key(layer, head, slot);
        if (rotary != nullptr)
          rotary->rotate(rotation + t * rotary->row_size(), keys.head(t, head), key);
        else
          convert(keys.head(t, head), shape().head_dim, key);
        convert(values.head(t, head), shape().value_dim, store_->value(layer, head, slot));
      }
    }
  }

  /// All heads keep everything.
  int num_classes(std::int64_t) const { return 1; }
  HeadClassView head_class(std::int64_t, int = 0) const { return {}; }
  int segments(std::int64_t layer, [[maybe_unused]] std::int64_t queries,
               std::span<SegmentType, kMaxSegments> out, int = 0) const {
    SLUICE_ASSERT(queries <= total());
    int written = 0;
    table_.each_run([&](std::int64_t first, std::int64_t count, std::int64_t slot) {
      SegmentType& segment = out[static_cast<std::size_t>(written++)];
      segment = {};
      segment.rule = {.first_index = first,
                      .count = count,
                      .visible = count,
                      .first_position = retention_.write_position(first),
                      .first_slot = slot};
      segment.keys = store_->key(layer, 0, slot);
      segment.values = store_->value(layer, 0, slot);
      segment.key_token_stride = shape().head_dim;
      segment.key_head_stride = store_->slots() * shape().head_dim;
      segment.value_token_stride = shape().value_dim;
      segment.value_head_stride = store_->slots() * shape().value_dim;
    });
    return written;
  }

  /// Appends the rows of this stream, shared or not; names of pages are not saved.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    retention_.save(writer);
    detail::write_shape<Key, Value>(writer, shape());
    each_row(*this, [&](const auto* row, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) detail::put_element(writer, row[i]);
    });
  }
  /// Takes over a saved state, in pages of its own.
  /// \throws Error(kFormat) as KvCache::restore; Error(kCapacity) when the store has no room. On an
  /// error the cache is reset.
  void restore(ByteReader& reader) {
    reset();
    Retention loaded = retention_;
    loaded.restore(reader);
    detail::expect_shape<Key, Value>(reader, shape());
    if (!table_.fits(loaded.total()))
      throw Error(
          ErrorCode::kCapacity,
          {"the page store has no room", "PagedKvCache::restore", "tokens",
           "at most " + std::to_string(table_.room_behind(0)), std::to_string(loaded.total())});
    table_.append(loaded.total(), [](std::int64_t, std::int64_t, std::int64_t) {});
    retention_ = loaded;
    try {
      each_row(*this, [&](auto* row, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) detail::get_element(reader, row[i]);
      });
    } catch (...) {
      reset();
      throw;
    }
  }

 private:
  static RetentionConfig config(std::int64_t max_tokens, std::int64_t max_chunk, Position origin) {
    RetentionConfig result = RetentionConfig::full(max_tokens, max_chunk);
    result.origin = origin;
    return result;
  }

  /// Everything behind the first `length` tokens goes.
  void cut(std::int64_t length) {
    if (retention_.total() > length) retention_.rollback();
    table_.truncate(length);
    const auto tokens = static_cast<std::size_t>(length);
    if (tokens_.size() > tokens) tokens_.resize(tokens);
    const std::size_t pages = tokens_.size() / static_cast<std::size_t>(store_->pool().page_size());
    if (named_.size() > pages) named_.resize(pages);
  }
  /// Counters of a cache that holds `tokens` committed tokens.
  void restart(std::int64_t tokens) {
    retention_.reset();
    for (std::int64_t left = tokens; left > 0;) {
      const std::int64_t step = std::min(left, max_chunk());
      retention_.append(step);
      retention_.commit();
      left -= step;
    }
  }

  template <class Self, class Visit>
  static void each_row(Self& self, Visit&& visit) {
    std::conditional_t<std::is_const_v<Self>, const PageStore<Key, Value>, PageStore<Key, Value>>&
        store = *self.store_;
    for (std::int64_t layer = 0; layer < store.shape().num_layers; ++layer)
      for (std::int64_t token = 0; token < self.total(); ++token)
        for (std::int64_t head = 0; head < store.shape().num_kv_heads; ++head) {
          const std::int64_t slot = self.table_.slot(token);
          visit(store.key(layer, head, slot), store.shape().head_dim);
          visit(store.value(layer, head, slot), store.shape().value_dim);
        }
  }

  template <class T>
  static void convert(const float* from, std::int64_t count, T* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }

  std::shared_ptr<PageStore<Key, Value>> store_;
  Retention retention_;
  PageTable table_;
  std::vector<Token> tokens_;     // of the oldest rows, as far as they were named
  std::vector<NamedPage> named_;  // of the oldest full pages: by which page each is found
  std::int64_t bytes_copied_ = 0;
};

}  // namespace sluice
