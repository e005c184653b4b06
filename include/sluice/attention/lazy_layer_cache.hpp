// SPDX-License-Identifier: MIT
/// LightTransfer at test time (arXiv 2410.13846; SimLayerKV is its first version): when a prompt is
/// read, layers whose last queries look at sinks and recent tokens alone become lazy and keep
/// only those. A layer changes from full to sinks + window while the program runs.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// The lazy ratio of a layer (section 3 of the paper): the share of attention that falls on the
/// first num_sink_tokens and the last recent_size of the tokens seen, averaged over the last
/// `queries` rows and all query heads. A row counts what is not after it, and a key that is in both
/// sets once; so the ratio of a short prompt is 1. query: rows of the chunk, not rotated, of all
/// heads; segment: everything, keys rotated; lse: [T, num_qo_heads]. Plain loops in float32: some
/// thousand keys for a few dozen rows. Allocates nothing.
/// Deviation: the paper's listing omits scale and causality, which makes early rows too lazy.
template <RotaryElement Key, RotaryElement Value>
double lazy_ratio(const AttentionQuery& query, const Segment<Key, Value>& segment, float sm_scale,
                  const Rotary* rotary, std::int64_t num_kv_heads, const float* lse,
                  std::int64_t num_sink_tokens, std::int64_t recent_size, std::int64_t queries) {
  SLUICE_ASSERT(query.rows.head_dim <= kMaxRotaryDim && segment.key_rotation == nullptr);
  const std::int64_t dim = query.rows.head_dim;
  const std::int64_t heads = query.rows.num_heads;
  const std::int64_t group = heads / num_kv_heads;
  const std::int64_t first_row = std::max<std::int64_t>(0, query.rows.tokens - queries);
  const std::int64_t count = segment.rule.count;
  const std::int64_t sinks = std::min(num_sink_tokens, count);
  const std::int64_t recent = std::max(sinks, count - recent_size);
  float angles[kMaxRotaryDim];
  float q[kMaxRotaryDim];
  double sum = 0;
  for (std::int64_t t = first_row; t < query.rows.tokens; ++t) {
    if (rotary != nullptr) rotary->angles(query.position(t), angles);
    const std::int64_t visible =
        std::min(count, query.first_index + t + 1 - segment.rule.first_index);
    for (std::int64_t head = 0; head < heads; ++head) {
      if (rotary != nullptr)
        rotary->rotate(angles, query.rows.head(t, head), q);
      else
        std::copy_n(query.rows.head(t, head), dim, q);
      const auto share = [&](std::int64_t j) {
        const Key* key = segment.key(head / group, j);
        float score = 0;
        for (std::int64_t d = 0; d < dim; ++d) score += q[d] * static_cast<float>(key[d]);
        return static_cast<double>(std::exp(score * sm_scale - lse[t * heads + head]));
      };
      for (std::int64_t j = 0; j < std::min(sinks, visible); ++j) sum += share(j);
      for (std::int64_t j = recent; j < visible; ++j) sum += share(j);
    }
  }
  return sum / static_cast<double>((query.rows.tokens - first_row) * heads);
}

/// Which layers stay full: of those pushed, the `capacity` with the smallest lazy ratios.
class LazyQueue {
 public:
  /// Allocates. capacity: full layers wanted, 0 or more.
  explicit LazyQueue(std::int64_t capacity) : capacity_(capacity) {
    held_.reserve(static_cast<std::size_t>(capacity + 1));
  }

  /// A layer and its ratio; returns the layer that becomes lazy by it, if one does: the laziest of
  /// all held, of equal ones the lower. Allocates nothing.
  std::optional<std::int64_t> push(double ratio, std::int64_t layer) {
    held_.push_back({ratio, layer});
    if (static_cast<std::int64_t>(held_.size()) <= capacity_) return std::nullopt;
    const auto laziest =
        std::max_element(held_.begin(), held_.end(), [](const Entry& a, const Entry& b) {
          return a.ratio != b.ratio ? a.ratio < b.ratio : a.layer > b.layer;
        });
    const std::int64_t layer_out = laziest->layer;
    held_.erase(laziest);
    return layer_out;
  }
  void clear() { held_.clear(); }

 private:
  struct Entry {
    double ratio;
    std::int64_t layer;
  };
  std::int64_t capacity_;
  std::vector<Entry> held_;
};

/// Extents of a LazyLayerKvCache. Defaults are the paper's, which keeps half of the layers full
/// (75% on needle tests).
struct LazyLayerConfig {
  std::int64_t num_full_layers = 0;  ///< layers that stay full, 0 or more
  std::int64_t num_sink_tokens = 4;
  std::int64_t recent_size =
      1020;  ///< entries that a lazy layer keeps besides, the query's not among them
  std::int64_t num_queries = 32;  ///< rows that the ratio is measured over
  std::int64_t capacity = 0;      ///< tokens of the whole stream: full layers end there
  std::int64_t max_prompt = 0;    ///< tokens of the prompt
  std::int64_t max_chunk = 1;     ///< tokens of later chunks, at most recent_size + 1
  /// The prompt comes in chunks of max_chunk, and end_prompt() ends it; else it is the first chunk.
  bool prompt_in_chunks = false;
};

/// Keys and values of one stream that begins with a prompt. Keys stay at their places in the text.
///
/// A prompt of one chunk: while it passes through the layers, each layer is full until its ratio
/// has been measured, and the laziest is cut to sinks + recent tokens as soon as more than
/// num_full_layers are held: so there is room for num_full_layers + 1 full layers and no more, and
/// that is all that is ever allocated (the one block more is what the layer at work needs).
///
/// A prompt in chunks (prompt_in_chunks): what is observed are the last num_queries queries of the
/// whole prompt so far, whichever chunks they came in, against the recent tokens that its end
/// leaves; the observation is made, and layers are cut, by end_prompt(). Until then every layer is
/// full, since a layer that were cut before would have lost what a later chunk asks for: room is
/// that of num_full_layers full layers, of the prompt in the others, and of num_queries + max_chunk
/// rows of queries a layer. Ratios and choice do not depend on the chunks but for the rounding of
/// float32 sums, nor differ from those of one chunk.
///
/// Protocol of a step: as KvCache, with begin_layer() before store() and observe() after attention.
/// Rolling back a prompt of one chunk forgets which layers were lazy, rolling back a later chunk
/// that it was seen. set_lazy() cuts a layer later on, by the caller's own measure (SimLayerKV:
/// ratio() of the first decoded token above a threshold). Layers with a trained window of their own
/// are read with it. Only construction, make_checkpoint(), sibling(), save() and restore()
/// allocate. One thread at a time; store() of different rows may run on several.
template <RotaryElement Key, RotaryElement Value = Key>
class LazyLayerKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = Retention::kMaxSegments;

 private:
  /// Who holds what: all of the state but rows.
  struct Books {
    Retention full;
    Retention lazy;
    std::vector<std::int64_t> blocks;  // [num_layers]: of full layers, kNoBlock, or kLazy
    std::vector<double> ratios;        // [num_layers]
    std::vector<std::int64_t> free{};  // blocks that no layer has
    bool ended = false;                // a prompt in chunks
    std::size_t kept = 0;
    std::size_t kept_peak = 0;
  };

 public:
  /// rotaries: [num_layers], each null or outliving the cache. num_qo_heads and sm_scale: the
  /// model's. \throws Error(kConfig, kShape) naming the extent that does not fit.
  LazyLayerKvCache(const KvShape& shape, std::int64_t num_qo_heads, float sm_scale,
                   const LazyLayerConfig& config, std::span<const Rotary* const> rotaries)
      : shape_(shape),
        config_(checked(shape, num_qo_heads, config, rotaries)),
        num_qo_heads_(num_qo_heads),
        sm_scale_(sm_scale),
        rotaries_(rotaries.begin(), rotaries.end()),
        books_{Retention(full_config(config)), Retention(lazy_config(config)),
               std::vector<std::int64_t>(static_cast<std::size_t>(shape.num_layers), kNoBlock),
               std::vector<double>(static_cast<std::size_t>(shape.num_layers))},
        queue_(std::min(config.num_full_layers, shape.num_layers)) {
    const std::int64_t full_layers = std::min(config.num_full_layers, shape.num_layers);
    if (config.prompt_in_chunks) {
      large_blocks_ = full_layers;
      num_blocks_ = shape.num_layers;
      const std::int64_t queries = std::min(config.num_queries, config.max_prompt);
      ring_ = queries + config.max_chunk;
      seen_queries_ = Buffer<float>(size(shape.num_layers * ring_ * num_qo_heads * shape.head_dim));
      seen_lse_ = Buffer<float>(size(shape.num_layers * ring_ * num_qo_heads));
      last_queries_ = Buffer<float>(size(queries * num_qo_heads * shape.head_dim));
      last_lse_ = Buffer<float>(size(queries * num_qo_heads));
    } else {
      // One block serves the layer at work, unless no layer is to be lazy.
      large_blocks_ = num_blocks_ = std::min(full_layers + 1, shape.num_layers);
    }
    const std::int64_t rows = block_row(num_blocks_) +
                              shape.num_layers * shape.num_kv_heads * books_.lazy.config().capacity;
    keys_ = Buffer<Key>(size(rows * shape.head_dim));
    values_ = Buffer<Value>(size(rows * shape.value_dim));
    books_.free.reserve(size(num_blocks_));
    reset();
  }

  const KvShape& shape() const { return shape_; }
  const LazyLayerConfig& config() const { return config_; }
  std::int64_t total() const { return books_.full.total(); }
  std::int64_t committed() const { return books_.full.committed(); }
  Position write_position(std::int64_t index) const { return books_.full.write_position(index); }
  bool takes_positions() const { return false; }
  /// Of the prompt, for workspaces; later chunks are at most config().max_chunk.
  std::int64_t max_chunk() const {
    return config_.prompt_in_chunks ? config_.max_chunk : config_.max_prompt;
  }
  /// The most tokens that append() takes next.
  std::int64_t next_chunk() const { return prompt_open() ? max_chunk() : config_.max_chunk; }
  /// Tokens that may follow the first `fed`: what is left of the prompt's room while it is open,
  /// and behind an empty cache.
  std::int64_t room_behind(std::int64_t fed) const {
    return (fed == 0 || prompt_open() ? config_.max_prompt : config_.capacity) - fed;
  }
  std::int64_t max_entries() const { return books_.full.config().capacity; }
  /// Bytes of keys and values: the full layers' and a window for each layer.
  std::size_t bytes() const { return keys_.bytes() + values_.bytes(); }
  /// Bytes of keys and values that are kept now, and the most that ever were at once.
  std::size_t bytes_kept() const { return books_.kept; }
  std::size_t peak_bytes_kept() const { return books_.kept_peak; }
  bool is_lazy(std::int64_t layer) const { return books_.blocks[size(layer)] == kLazy; }
  std::int64_t num_lazy() const {
    return std::count(books_.blocks.begin(), books_.blocks.end(), kLazy);
  }
  /// The ratio that was measured last; 0 before.
  double ratio(std::int64_t layer) const { return books_.ratios[size(layer)]; }
  /// Whether ratios are measured after the prompt too, at every chunk.
  void measure(bool always) { measures_ = always; }

  CacheStatus status(std::int64_t tokens) const {
    const bool whole_prompt = prompt_open() && !config_.prompt_in_chunks;
    if (whole_prompt && total() > 0) return CacheStatus::kFull;  // the prompt is one append
    return total() - committed() + tokens <= next_chunk() && tokens <= room_behind(total())
               ? CacheStatus::kOk
               : CacheStatus::kFull;
  }
  /// Precondition: status(tokens) == kOk.
  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    books_.full.append(tokens);
    if (!prompt_open() || config_.prompt_in_chunks) {
      books_.lazy.append(tokens);
      return;
    }
    // Where a lazy layer will have the prompt's tokens is known before the layer is.
    for (std::int64_t left = tokens; left > 0;) {
      const std::int64_t part = std::min(left, books_.lazy.config().max_chunk);
      books_.lazy.append(part);
      books_.lazy.commit();
      left -= part;
    }
  }
  void commit() {
    books_.full.commit();
    books_.lazy.commit();
    count_kept();
  }
  void rollback() {
    if (prompt_open() && !config_.prompt_in_chunks) {
      reset();
      return;
    }
    books_.full.rollback();
    books_.lazy.rollback();
    count_kept();
  }
  void reset() {
    books_.full.reset();
    books_.lazy.reset();
    queue_.clear();
    books_.free.clear();
    for (std::int64_t block = num_blocks_; block > 0; --block) books_.free.push_back(block - 1);
    std::fill(books_.blocks.begin(), books_.blocks.end(), kNoBlock);
    books_.ended = false;
    std::fill(books_.ratios.begin(), books_.ratios.end(), 0.0);
    books_.kept = books_.kept_peak = 0;
  }

  /// Whether what is appended belongs to the prompt.
  bool prompt_open() const {
    return config_.prompt_in_chunks ? !books_.ended : books_.full.committed() == 0;
  }
  /// Ends a prompt in chunks: measures each layer's ratio over the prompt's last queries and leaves
  /// the num_full_layers least lazy layers full. Does nothing where the prompt has ended.
  /// \throws Error(kOrder) with uncommitted tokens, or none at all; nothing changes.
  void end_prompt() {
    if (!prompt_open()) return;
    require_committed("LazyLayerKvCache::end_prompt");
    const std::int64_t rows = std::min(config_.num_queries, total());
    const std::int64_t first = total() - rows;
    const std::int64_t row_size = num_qo_heads_ * shape_.head_dim;
    for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer) {
      for (std::int64_t t = 0; t < rows; ++t) {
        const std::int64_t from = seen_row(layer, first + t);
        std::copy_n(seen_queries_.data() + from * row_size, row_size,
                    last_queries_.data() + t * row_size);
        std::copy_n(seen_lse_.data() + from * num_qo_heads_, num_qo_heads_,
                    last_lse_.data() + t * num_qo_heads_);
      }
      const AttentionQuery query{{last_queries_.data(), rows, num_qo_heads_, shape_.head_dim},
                                 first,
                                 write_position(first)};
      std::array<SegmentType, kMaxSegments> all;
      [[maybe_unused]] const int count = segments(layer, rows, all);
      SLUICE_ASSERT(count == 1);
      books_.ratios[size(layer)] = lazy_ratio(
          query, all[0], sm_scale_, rotaries_[size(layer)], shape_.num_kv_heads, last_lse_.data(),
          config_.num_sink_tokens, config_.recent_size, config_.num_queries);
    }
    books_.ended = true;
    if (config_.num_full_layers >= shape_.num_layers) return;
    for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer)
      if (const std::optional<std::int64_t> lazy = queue_.push(books_.ratios[size(layer)], layer))
        cut(*lazy);
    for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer)
      if (books_.blocks[size(layer)] >= large_blocks_) grow(layer);
  }

  /// Makes a full layer lazy. \throws Error(kOrder) with uncommitted tokens, or before the prompt
  /// has ended, which needs every layer full; nothing changes.
  void set_lazy(std::int64_t layer) {
    SLUICE_ASSERT(layer >= 0 && layer < shape_.num_layers);
    require_committed("LazyLayerKvCache::set_lazy");
    if (prompt_open())
      throw Error(ErrorCode::kOrder, {"the prompt has not ended", "LazyLayerKvCache::set_lazy",
                                      "prompt", "ended", "open"});
    if (!is_lazy(layer)) cut(layer);
  }

  /// A state that revert() returns to: a copy of everything.
  class Checkpoint {
   public:
    std::size_t bytes() const { return content_.bytes(); }
    std::int64_t total() const { return books_.full.total(); }
    std::int64_t max_truncate() const { return 0; }

   private:
    friend LazyLayerKvCache;
    Checkpoint(const Books& books, std::size_t bytes) : books_(books), content_(bytes) {
      books_.free.reserve(books.blocks.size());
    }

    Books books_;
    Buffer<std::byte> content_;
  };
  /// As KvCache's. What is being measured of an open prompt belongs to it.
  Checkpoint make_checkpoint() const {
    std::size_t bytes = 0;
    each_buffer(*this, [&](const auto& buffer) { bytes += buffer.bytes(); });
    return {books_, bytes};
  }
  void capture(Checkpoint& checkpoint) const {
    SLUICE_ASSERT(total() == committed());
    checkpoint.books_ = books_;
    std::byte* to = checkpoint.content_.data();
    each_buffer(*this, [&](const auto& buffer) { to = detail::pack(buffer, to); });
  }
  void revert(const Checkpoint& checkpoint) {
    take_over(checkpoint.books_);
    const std::byte* from = checkpoint.content_.data();
    each_buffer(*this, [&](auto& buffer) { from = detail::unpack(from, buffer); });
  }
  void copy_from(const LazyLayerKvCache& other) {
    SLUICE_ASSERT(other.total() == other.committed());
    take_over(other.books_);
    const auto copy = [](const auto& from, auto& to) {
      std::copy_n(from.data(), from.size(), to.data());
    };
    copy(other.keys_, keys_);
    copy(other.values_, values_);
    copy(other.seen_queries_, seen_queries_);
    copy(other.seen_lse_, seen_lse_);
  }
  LazyLayerKvCache sibling() const {
    return LazyLayerKvCache(shape_, num_qo_heads_, sm_scale_, config_, rotaries_);
  }

  /// Appends counters, layers and all of the storage. Allocates in the writer.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    detail::write_shape<Key, Value>(writer, shape_);
    for (const auto& [field, value] : identity()) writer.write<std::int64_t>(value);
    books_.full.save(writer);
    books_.lazy.save(writer);
    writer.write_span(std::span<const std::int64_t>(books_.blocks));
    writer.write_span(std::span<const double>(books_.ratios));
    writer.write(static_cast<std::uint8_t>(books_.ended));
    writer.write(static_cast<std::uint64_t>(books_.kept_peak));
    each_buffer(*this, [&](const auto& buffer) { detail::put_elements(writer, buffer.span()); });
  }
  /// Takes over a saved state. \throws Error(kFormat) naming the field; the cache is then reset.
  void restore(ByteReader& reader) {
    reset();
    try {
      detail::expect_shape<Key, Value>(reader, shape_);
      for (const auto& [field, value] : identity())
        reader.read_expected<std::int64_t>(field, value);
      books_.full.restore(reader);
      books_.lazy.restore(reader);
      const std::size_t begin = reader.offset();
      reader.read_span<std::int64_t>("blocks", std::span(books_.blocks));
      reader.read_span<double>("ratios", std::span(books_.ratios));
      books_.ended = reader.read<std::uint8_t>("ended") != 0;
      const auto peak = reader.read<std::uint64_t>("peak bytes");
      if (!take_blocks())
        reader.fail_at(begin, "inconsistent snapshot", "blocks", "one for each full layer",
                       "others");
      each_buffer(*this, [&](auto& buffer) { detail::get_elements(reader, buffer.span()); });
      books_.kept_peak = static_cast<std::size_t>(peak);
      count_kept();
    } catch (...) {
      reset();
      throw;
    }
  }

  /// Writes keys and values of the newest tokens, after begin_layer(); as KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const Rotary* rotary = rotaries_[size(layer)];
    const Place to = place(layer);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t slot = to.retention->slot_of_newest(keys.tokens - t);
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        const std::int64_t row = to.row(h, slot);
        Key* key = keys_.data() + row * shape_.head_dim;
        if (rotary != nullptr)
          rotary->rotate(rotation + t * rotary->row_size(), keys.head(t, h), key);
        else
          convert(keys.head(t, h), shape_.head_dim, key);
        convert(values.head(t, h), shape_.value_dim, values_.data() + row * shape_.value_dim);
      }
    }
  }

  int num_classes(std::int64_t) const { return 1; }
  HeadClassView head_class(std::int64_t layer, int = 0) const {
    HeadClassView view;
    if (!is_lazy(layer)) return view;
    view.window_size = books_.lazy.window();
    view.num_sink_tokens = config_.num_sink_tokens;
    return view;
  }
  int segments(std::int64_t layer, std::int64_t queries, std::span<SegmentType, kMaxSegments> out,
               int = 0) const {
    if (total() == 0) return 0;
    const Place from = place(layer);
    std::array<SegmentRule, kMaxSegments> rules;
    const int count = from.retention->rules(queries, rules);
    for (int i = 0; i < count; ++i) {
      SegmentType& segment = out[size(i)];
      segment = SegmentType{};
      segment.rule = rules[size(i)];
      const std::int64_t row = from.row(0, segment.rule.first_slot);
      segment.keys = keys_.data() + row * shape_.head_dim;
      segment.values = values_.data() + row * shape_.value_dim;
      segment.key_token_stride = shape_.head_dim;
      segment.value_token_stride = shape_.value_dim;
      segment.key_head_stride = from.capacity * shape_.head_dim;
      segment.value_head_stride = from.capacity * shape_.value_dim;
    }
    return count;
  }

  /// A layer gets its block before its rows are stored: to be called after append(), for each layer
  /// in order.
  void begin_layer(std::int64_t layer) {
    std::int64_t& block = books_.blocks[size(layer)];
    if (block != kNoBlock) {
      count_kept();
      return;
    }
    SLUICE_ASSERT(!books_.free.empty());
    block = books_.free.back();
    books_.free.pop_back();
    count_kept();
  }

  bool observes(std::int64_t layer) const {
    return prompt_open() || (measures_ && !is_lazy(layer));
  }
  /// Measures the layer's ratio; while a prompt of one chunk passes, a layer may become lazy by it.
  /// Of a prompt in chunks the rows are remembered.
  void observe(const ObservedAttention<Key, Value>& seen) {
    if (!observes(seen.layer)) return;
    if (prompt_open() && config_.prompt_in_chunks) {
      const std::int64_t tokens = seen.query.rows.tokens;
      for (std::int64_t t = std::max<std::int64_t>(0, tokens - config_.num_queries); t < tokens;
           ++t) {
        const std::int64_t to = seen_row(seen.layer, seen.query.first_index + t);
        for (std::int64_t h = 0; h < num_qo_heads_; ++h)
          std::copy_n(seen.query.rows.head(t, h), shape_.head_dim,
                      seen_queries_.data() + (to * num_qo_heads_ + h) * shape_.head_dim);
        std::copy_n(seen.lse + t * num_qo_heads_, num_qo_heads_,
                    seen_lse_.data() + to * num_qo_heads_);
      }
      return;
    }
    double& ratio = books_.ratios[size(seen.layer)];
    ratio = lazy_ratio(seen.query, seen.segments[0], sm_scale_, rotaries_[size(seen.layer)],
                       shape_.num_kv_heads, seen.lse, config_.num_sink_tokens, config_.recent_size,
                       config_.num_queries);
    if (!prompt_open() || config_.num_full_layers >= shape_.num_layers) return;
    if (const std::optional<std::int64_t> lazy = queue_.push(ratio, seen.layer)) cut(*lazy);
  }

 private:
  static constexpr std::int64_t kNoBlock = -1;
  static constexpr std::int64_t kLazy = -2;

  /// Where a layer's rows lie.
  struct Place {
    const Retention* retention;
    std::int64_t first;     // row of head 0, slot 0
    std::int64_t capacity;  // rows of a head
    std::int64_t row(std::int64_t head, std::int64_t slot) const {
      return first + head * capacity + slot;
    }
  };

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
  static RetentionConfig full_config(const LazyLayerConfig& c) {
    RetentionConfig config = RetentionConfig::full(c.capacity, c.max_prompt);
    config.position_rule = PositionRule::kInText;
    return config;
  }
  static RetentionConfig lazy_config(const LazyLayerConfig& c) {
    RetentionConfig config =
        RetentionConfig::streaming_llm(c.num_sink_tokens, c.recent_size, c.max_chunk);
    config.position_rule = PositionRule::kInText;
    return config;
  }
  static const LazyLayerConfig& checked(const KvShape& shape, std::int64_t num_qo_heads,
                                        const LazyLayerConfig& c,
                                        std::span<const Rotary* const> rotaries) {
    const auto need = [](bool fine, ErrorCode code, const char* field, const std::string& expected,
                         std::int64_t found) {
      if (!fine)
        throw Error(code, {"cache configuration does not fit", "LazyLayerKvCache", field, expected,
                           std::to_string(found)});
    };
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    need(shape.num_layers >= 1, ErrorCode::kShape, "num_layers", "at least 1", shape.num_layers);
    need(shape.num_kv_heads >= 1, ErrorCode::kShape, "num_kv_heads", "at least 1",
         shape.num_kv_heads);
    need(shape.head_dim >= 1 && shape.head_dim <= kMaxRotaryDim, ErrorCode::kShape, "head_dim",
         "1 to " + std::to_string(kMaxRotaryDim), shape.head_dim);
    need(shape.value_dim >= 1, ErrorCode::kShape, "value_dim", "at least 1", shape.value_dim);
    need(num_qo_heads >= 1 && num_qo_heads % shape.num_kv_heads == 0, ErrorCode::kShape,
         "num_qo_heads", "a multiple of num_kv_heads = " + std::to_string(shape.num_kv_heads),
         num_qo_heads);
    need(static_cast<std::int64_t>(rotaries.size()) == shape.num_layers, ErrorCode::kShape,
         "rotaries", std::to_string(shape.num_layers) + " entries",
         static_cast<std::int64_t>(rotaries.size()));
    for (const Rotary* rotary : rotaries)
      need(rotary == nullptr || rotary->head_dim() == shape.head_dim, ErrorCode::kShape,
           "rotary head_dim", std::to_string(shape.head_dim),
           rotary == nullptr ? 0 : rotary->head_dim());
    need(c.num_full_layers >= 0, ErrorCode::kConfig, "num_full_layers", "at least 0",
         c.num_full_layers);
    need(c.num_queries >= 1 && c.num_queries <= kMost, ErrorCode::kConfig, "num_queries",
         "at least 1", c.num_queries);
    need(c.capacity >= 1 && c.capacity <= kMost, ErrorCode::kConfig, "capacity", "at least 1",
         c.capacity);
    need(c.max_prompt >= 1 && c.max_prompt <= c.capacity, ErrorCode::kConfig, "max_prompt",
         "1 to the capacity, " + std::to_string(c.capacity), c.max_prompt);
    need(c.max_chunk >= 1 && c.max_chunk <= c.max_prompt, ErrorCode::kConfig, "max_chunk",
         "1 to max_prompt, " + std::to_string(c.max_prompt), c.max_chunk);
    need(c.recent_size >= 1 && c.recent_size <= kMost, ErrorCode::kConfig, "recent_size",
         "at least 1", c.recent_size);
    return c;
  }

  std::array<std::pair<const char*, std::int64_t>, 9> identity() const {
    return {{{"num_qo_heads", num_qo_heads_},
             {"num_full_layers", config_.num_full_layers},
             {"num_sink_tokens", config_.num_sink_tokens},
             {"recent_size", config_.recent_size},
             {"num_queries", config_.num_queries},
             {"capacity", config_.capacity},
             {"max_prompt", config_.max_prompt},
             {"max_chunk", config_.max_chunk},
             {"prompt_in_chunks", config_.prompt_in_chunks ? 1 : 0}}};
  }
  template <class Self, class Visit>
  static void each_buffer(Self& self, Visit&& visit) {
    visit(self.keys_);
    visit(self.values_);
    visit(self.seen_queries_);
    visit(self.seen_lse_);
  }

  /// The queue holds layers only while a prompt passes, and no state is captured then.
  void take_over(const Books& books) {
    books_ = books;
    queue_.clear();
  }
  /// Frees the blocks that no layer has. Returns whether the layers' blocks, read from a file, are
  /// such as a stream could have.
  bool take_blocks() {
    books_.free.clear();
    for (std::int64_t block = num_blocks_; block > 0; --block) books_.free.push_back(block - 1);
    if (books_.full.total() != books_.lazy.total() || (books_.ended && !config_.prompt_in_chunks))
      return false;
    const bool open = prompt_open();
    if (total() > (open ? config_.max_prompt : config_.capacity)) return false;
    for (const std::int64_t block : books_.blocks) {
      if (block < kLazy || (block == kLazy && open) || (block == kNoBlock && total() > 0))
        return false;
      if (block < 0) continue;
      const auto taken = std::find(books_.free.begin(), books_.free.end(), block);
      if (taken == books_.free.end() || (block >= large_blocks_ && !open)) return false;
      books_.free.erase(taken);
    }
    return true;
  }

  void require_committed(const char* where) const {
    if (total() != committed() || total() == 0)
      throw Error(ErrorCode::kOrder,
                  {"uncommitted tokens, or none at all", where, "appended tokens", "0",
                   std::to_string(total() - committed())});
  }

  /// Where a layer's rows of a token that was seen are remembered.
  std::int64_t seen_row(std::int64_t layer, std::int64_t token) const {
    return layer * ring_ + token % ring_;
  }

  /// The first row of a block. Large ones hold the stream, those behind them the prompt.
  std::int64_t block_row(std::int64_t block) const {
    const std::int64_t large = std::min(block, large_blocks_);
    return shape_.num_kv_heads * (large * config_.capacity + (block - large) * config_.max_prompt);
  }
  Place place(std::int64_t layer) const {
    if (is_lazy(layer))
      return {&books_.lazy,
              block_row(num_blocks_) + layer * shape_.num_kv_heads * books_.lazy.config().capacity,
              books_.lazy.config().capacity};
    const std::int64_t block = books_.blocks[size(layer)];
    SLUICE_ASSERT(block >= 0);
    return {&books_.full, block_row(block),
            block < large_blocks_ ? config_.capacity : config_.max_prompt};
  }

  /// Moves a layer that stays full from a block of the prompt's size to one that has become free.
  void grow(std::int64_t layer) {
    const auto large = std::find_if(books_.free.begin(), books_.free.end(),
                                    [&](std::int64_t block) { return block < large_blocks_; });
    SLUICE_ASSERT(large != books_.free.end());
    const Place from = place(layer);
    std::swap(books_.blocks[size(layer)], *large);
    const Place to = place(layer);
    for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
      std::copy_n(keys_.data() + from.row(h, 0) * shape_.head_dim, total() * shape_.head_dim,
                  keys_.data() + to.row(h, 0) * shape_.head_dim);
      std::copy_n(values_.data() + from.row(h, 0) * shape_.value_dim, total() * shape_.value_dim,
                  values_.data() + to.row(h, 0) * shape_.value_dim);
    }
  }

  /// Copies what a lazy layer keeps to its own rows and gives the layer's block back.
  void cut(std::int64_t layer) {
    const Place from = place(layer);
    const std::int64_t block = books_.blocks[size(layer)];
    books_.blocks[size(layer)] = kLazy;
    const Place to = place(layer);
    const std::int64_t sinks = config_.num_sink_tokens;
    const std::int64_t ring = to.capacity - sinks;
    const auto copy = [&](std::int64_t token, std::int64_t slot) {
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        std::copy_n(keys_.data() + from.row(h, token) * shape_.head_dim, shape_.head_dim,
                    keys_.data() + to.row(h, slot) * shape_.head_dim);
        std::copy_n(values_.data() + from.row(h, token) * shape_.value_dim, shape_.value_dim,
                    values_.data() + to.row(h, slot) * shape_.value_dim);
      }
    };
    for (std::int64_t token = 0; token < std::min(sinks, total()); ++token) copy(token, token);
    for (std::int64_t token = std::max(sinks, total() - config_.recent_size); token < total();
         ++token)
      copy(token, sinks + (token - sinks) % ring);
    books_.free.push_back(block);
    count_kept();
  }

  void count_kept() {
    const auto row = static_cast<std::size_t>(shape_.num_kv_heads) *
                     (static_cast<std::size_t>(shape_.head_dim) * sizeof(Key) +
                      static_cast<std::size_t>(shape_.value_dim) * sizeof(Value));
    std::size_t rows = 0;
    for (const std::int64_t block : books_.blocks) {
      if (block == kLazy) rows += size(books_.lazy.size());
      if (block >= 0) rows += size(total());
    }
    books_.kept = rows * row;
    books_.kept_peak = std::max(books_.kept_peak, books_.kept);
  }

  template <class T>
  static void convert(const float* from, std::int64_t count, T* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }

  KvShape shape_;
  LazyLayerConfig config_;
  std::int64_t num_qo_heads_;
  float sm_scale_;
  std::vector<const Rotary*> rotaries_;
  Books books_;
  LazyQueue queue_;
  std::int64_t num_blocks_ = 0;
  std::int64_t large_blocks_ = 0;  // those in front, with room for the whole stream
  std::int64_t ring_ = 0;          // rows of each layer that are remembered while it is open
  Buffer<float> seen_queries_;     // [layers, ring, num_qo_heads, head_dim]
  Buffer<float> seen_lse_;         // [layers, ring, num_qo_heads]
  Buffer<float> last_queries_;     // [num_queries, num_qo_heads, head_dim], in their order
  Buffer<float> last_lse_;         // [num_queries, num_qo_heads]
  Buffer<Key> keys_;      // [blocks, kv heads, capacity, head_dim], [layers, kv heads, window, ..]
  Buffer<Value> values_;  // likewise
  bool measures_ = false;
};

}  // namespace sluice
