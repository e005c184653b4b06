// SPDX-License-Identifier: MIT
/// Caches that keep everything and read little of it: pages that bounds pick for the query
/// (PageSelectKvCache: Quest, LServe's dense heads), or tokens that scored highest in an earlier
/// layer (TokenSelectKvCache: TidalDecode). Only steps of one token are selective: chunks of
/// several read everything.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/attention/page_bounds.hpp"
#include "sluice/backend/cpu/simd.hpp"
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

/// How pages are picked, for each KV head of a layer: the highest bound among its query heads
/// counts, where the released codes of Quest and LServe pick for each query head.
struct PageSelection {
  std::int64_t page_size = 16;          ///< tokens read together
  std::int64_t logical_page_size = 16;  ///< tokens bounded together; divides page_size
  std::int64_t budget = 64;             ///< pages read, the newest included
  std::int64_t interval = 1;            ///< tokens for which a selection serves
  std::int64_t dense_layers = 2;        ///< the first layers read everything

  /// Quest as released: pages of 16 tokens, at least 3 read, the first two layers dense.
  static PageSelection quest(std::int64_t budget_tokens) {
    return {.budget = std::max<std::int64_t>(3, budget_tokens / 16)};
  }
  /// LServe's dense heads as released: pages of 64 tokens bounded by 16, selected every 4 tokens.
  static PageSelection lserve(std::int64_t budget_tokens = 4096) {
    return {.page_size = 64,
            .logical_page_size = 16,
            .budget = std::max<std::int64_t>(3, budget_tokens / 64),
            .interval = 4,
            .dense_layers = 0};
  }
};

/// Which tokens later layers read.
struct TokenSelection {
  /// Layers that read everything and publish what scored highest, ascending; layers before the
  /// first read everything too. TidalDecode: 2 and one further on.
  std::vector<std::int64_t> publishing_layers{2};
  std::int64_t budget = 256;  ///< earlier tokens that are read; the decoded one comes on top
};

namespace detail {

/// What caches that select share: a KvCache that keeps everything, the verbs that change its
/// tokens, and queries as its keys see them. Cache, which derives from it (CRTP), has a hook
///   void unselect()
/// called after every change of tokens but commit(): nothing is selected for the tokens that are
/// there now, and what was formed of tokens that are gone is forgotten.
template <class Cache, RotaryElement Key, RotaryElement Value>
class SelectiveCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  using Checkpoint = typename KvCache<Key, Value>::Checkpoint;

  const KvShape& shape() const { return cache_.shape(); }
  std::int64_t total() const { return cache_.total(); }
  std::int64_t committed() const { return cache_.retentions().front().committed(); }
  Position write_position(std::int64_t index) const { return cache_.write_position(index); }
  bool takes_positions() const { return true; }
  std::int64_t max_chunk() const { return cache_.max_chunk(); }
  std::int64_t max_entries() const { return cache_.max_entries(); }
  std::int64_t max_truncate() const { return cache_.max_truncate(); }
  /// Bytes of keys and values.
  std::size_t bytes() const { return cache_.bytes(); }
  CacheStatus status(std::int64_t tokens) const { return cache_.status(tokens); }
  /// Tokens that may follow the first `fed`.
  std::int64_t room_behind(std::int64_t fed) const { return cache_.max_entries() - fed; }
  /// Writes keys and values of the newest tokens; as KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    cache_.store(layer, keys, values, rotation, begin, end);
  }

  /// Precondition: status(tokens) == kOk.
  void append(std::int64_t tokens) {
    cache_.append(tokens);
    unselect();
  }
  void commit() { cache_.commit(); }
  void rollback() {
    cache_.rollback();
    unselect();
  }
  /// Takes back the newest tokens, committed or not. \throws Error(kCapacity): nothing changes.
  void truncate(std::int64_t tokens) {
    cache_.truncate(tokens);
    unselect();
  }
  void reset() {
    cache_.reset();
    unselect();
  }
  /// Keeps a verified path of drafted tokens (KvCache::keep_path).
  void keep_path(std::int64_t tokens, std::span<const std::int64_t> path) {
    cache_.keep_path(tokens, path);
    unselect();
  }

  /// As KvCache: rows stay where they are, and what is formed of them follows.
  Checkpoint make_checkpoint() const { return cache_.make_checkpoint(); }
  void capture(Checkpoint& checkpoint) const { cache_.capture(checkpoint); }
  void revert(const Checkpoint& checkpoint) {
    cache_.revert(checkpoint);
    unselect();
  }

 protected:
  SelectiveCache(const char* where, const KvShape& shape, std::int64_t num_qo_heads,
                 std::span<const Rotary* const> rotaries, std::int64_t capacity,
                 std::int64_t max_chunk, Position origin)
      : where_(where),
        rotaries_(rotaries.begin(), rotaries.end()),
        cache_(make(shape, rotaries, capacity, max_chunk, origin)) {
    if (num_qo_heads < 1 || num_qo_heads % shape.num_kv_heads != 0)
      throw Error(ErrorCode::kShape,
                  {"cache shape does not fit", where, "num_qo_heads",
                   "a multiple of num_kv_heads = " + std::to_string(shape.num_kv_heads),
                   std::to_string(num_qo_heads)});
    group_ = num_qo_heads / shape.num_kv_heads;
    query_ = Buffer<float>(static_cast<std::size_t>(num_qo_heads * shape.head_dim));
    for (const Rotary* rotary : rotaries_) {
      std::size_t table = 0;
      while (table < tables_.size() && tables_[table].first != rotary) ++table;
      if (rotary != nullptr && table == tables_.size())
        tables_.emplace_back(rotary, RotaryTable(*rotary, 1));
      table_of_.push_back(table);
    }
  }

  std::int64_t num_qo_heads() const { return group_ * shape().num_kv_heads; }
  const RetentionConfig& retention() const { return cache_.retentions().front().config(); }

  /// The one segment that is everything. Precondition: total() > 0.
  SegmentType everything(std::int64_t layer) const {
    std::array<SegmentType, KvCache<Key, Value>::kMaxSegments> found;
    [[maybe_unused]] const int count = cache_.segments(layer, 0, found);
    SLUICE_ASSERT(count == 1);
    return found[0];
  }

  /// The rows of a step's query, rotated to where it stands: [num_qo_heads, head_dim].
  const float* placed_query(std::int64_t layer, const AttentionQuery& query) {
    const std::int64_t dim = shape().head_dim;
    const Rotary* rotary = rotaries_[static_cast<std::size_t>(layer)];
    const float* angles = nullptr;
    if (rotary != nullptr) {
      RotaryTable& table = tables_[table_of_[static_cast<std::size_t>(layer)]].second;
      if (query.positions == nullptr)
        table.fill_run(query.first_position, 1);
      else
        table.fill(std::span<const Position3>(query.positions, 1));
      angles = table.row(0);
    }
    for (std::int64_t h = 0; h < query.rows.num_heads; ++h) {
      if (rotary != nullptr)
        rotary->rotate(angles, query.rows.head(0, h), query_.data() + h * dim);
      else
        std::copy_n(query.rows.head(0, h), dim, query_.data() + h * dim);
    }
    return query_.data();
  }

  [[noreturn]] void refuse(const char* field, const std::string& expected,
                           std::int64_t found) const {
    throw Error(ErrorCode::kConfig,
                {"selection does not fit", where_, field, expected, std::to_string(found)});
  }

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

  const char* where_;
  std::vector<const Rotary*> rotaries_;
  KvCache<Key, Value> cache_;
  std::int64_t group_ = 1;  // query heads of a KV head

 private:
  static KvCache<Key, Value> make(const KvShape& shape, std::span<const Rotary* const> rotaries,
                                  std::int64_t capacity, std::int64_t max_chunk, Position origin) {
    RetentionConfig config = RetentionConfig::full(capacity, max_chunk);
    config.position_rule = PositionRule::kInText;
    config.origin = origin;
    std::vector<LayerCacheConfig> layers;
    for (const Rotary* rotary : rotaries) layers.push_back({.retention = 0, .rotary = rotary});
    return KvCache<Key, Value>(shape, std::array{config}, layers);
  }

  void unselect() { static_cast<Cache&>(*this).unselect(); }

  Buffer<float> query_;                                        // [num_qo_heads, head_dim]
  std::vector<std::pair<const Rotary*, RotaryTable>> tables_;  // one a rotation
  std::vector<std::size_t> table_of_;                          // [num_layers]
};

}  // namespace detail

/// A full cache of which a step reads the pages whose keys may score highest, for each KV head.
/// Keys are rotated once, at their places in the text; page p holds tokens p * page_size on.
///
/// A step of one token reads everything in the first dense_layers layers, or where there are at
/// most `budget` pages; otherwise the newest page and the budget - 1 whose bounds are highest. A
/// selection serves `interval` tokens, with pages that are opened meanwhile; taking back the token
/// that it was made for ends it. Layers with a trained window pick among all pages.
///
/// Protocol of a step: as KvCache, with select() between store() and segments(). Bounds are formed
/// of the stored keys, O(1) a token; a selection is O(pages), on the calling thread. Only
/// construction allocates: bytes(), and bounds_bytes() = 2 / logical_page_size of the keys. One
/// thread at a time; store() of different rows may run on several.
template <RotaryElement Key, RotaryElement Value = Key>
class PageSelectKvCache : public detail::SelectiveCache<PageSelectKvCache<Key, Value>, Key, Value> {
  using Base = detail::SelectiveCache<PageSelectKvCache, Key, Value>;
  friend Base;
  using Base::cache_;
  using Base::group_;
  using Base::size;

 public:
  using typename Base::SegmentType;
  static constexpr int kMaxSegments = AttentionWorkspace<cpu>::kMaxSegments;

 private:
  /// What a layer selected last.
  struct Selected {
    bool picks = false;
    std::int64_t selected_at = 0;  // total() at the selection; 0: there is none
    std::int64_t count = 0;        // pages that each head reads
    std::int64_t chosen = 0;       // those of the selection itself
  };

 public:
  /// rotaries: [num_layers], each null or outliving the cache. num_qo_heads: the model's.
  /// \throws Error(kConfig) for a selection that makes no sense or more than kMaxSegments pages,
  /// Error(kConfig, kShape) as KvCache.
  PageSelectKvCache(const KvShape& shape, std::int64_t num_qo_heads, const PageSelection& selection,
                    std::span<const Rotary* const> rotaries, std::int64_t capacity,
                    std::int64_t max_chunk, Position origin = 0)
      : Base("PageSelectKvCache", shape, num_qo_heads, rotaries, capacity, max_chunk, origin),
        selection_(checked(selection)) {
    const std::int64_t pages = (capacity + selection.page_size - 1) / selection.page_size;
    list_size_ = most_picked(selection);
    picked_ = Buffer<std::int64_t>(size(shape.num_layers * shape.num_kv_heads * list_size_));
    scores_ = Buffer<float>(size(pages));
    order_ = Buffer<std::int64_t>(size(pages));
    layers_.resize(size(shape.num_layers));
    for (std::int64_t l = 0; l < shape.num_layers; ++l)
      bounds_.emplace_back(shape.num_kv_heads, l < selection.dense_layers ? 0 : capacity,
                           selection.logical_page_size, shape.head_dim);
    for (std::int64_t h = 0; h < shape.num_kv_heads; ++h)
      heads_.push_back(static_cast<std::int32_t>(h));
  }

  const PageSelection& selection() const { return selection_; }
  std::size_t bounds_bytes() const {
    std::size_t bytes = 0;
    for (const PageBounds<Key>& bounds : bounds_) bytes += bounds.bytes();
    return bytes;
  }
  /// Bounds of a layer's logical pages, as far as tokens are committed or selected among.
  const PageBounds<Key>& bounds(std::int64_t layer) const { return bounds_[size(layer)]; }
  /// Whether the last select() of a layer picked, or everything is read.
  bool picks(std::int64_t layer) const { return layers_[size(layer)].picks; }
  /// The pages that a head reads, ascending. Precondition: picks(layer).
  std::span<const std::int64_t> picked(std::int64_t layer, std::int64_t kv_head) const {
    return {list(layer, kv_head), size(layers_[size(layer)].count)};
  }
  /// Selections so far, of all layers together.
  std::int64_t selections() const { return selections_; }

  void commit() {
    Base::commit();
    for (std::int64_t l = 0; l < this->shape().num_layers; ++l) extend_bounds(l);
  }
  /// As Base's. Bounds know uncommitted rows where one of them has selected, and those may move.
  void keep_path(std::int64_t tokens, std::span<const std::int64_t> path) {
    for (PageBounds<Key>& bounds : bounds_) bounds.truncate(this->total() - tokens);
    Base::keep_path(tokens, path);
  }

  /// A state that revert() returns to: rows stay where they are, what is picked is copied.
  struct Checkpoint {
    typename Base::Checkpoint cache;
    std::vector<Selected> layers;
    Buffer<std::int64_t> picked;
    std::size_t bytes() const { return cache.bytes() + picked.bytes(); }
    std::int64_t total() const { return cache.total(); }
    std::int64_t max_truncate() const { return cache.max_truncate(); }
  };
  /// As KvCache.
  Checkpoint make_checkpoint() const {
    return {Base::make_checkpoint(), layers_, Buffer<std::int64_t>(picked_.size())};
  }
  void capture(Checkpoint& checkpoint) const {
    Base::capture(checkpoint.cache);
    checkpoint.layers = layers_;
    std::copy_n(picked_.data(), picked_.size(), checkpoint.picked.data());
  }
  void revert(const Checkpoint& checkpoint) {
    Base::revert(checkpoint.cache);
    layers_ = checkpoint.layers;
    std::copy_n(checkpoint.picked.data(), picked_.size(), picked_.data());
  }
  void copy_from(const PageSelectKvCache& other) {
    cache_.copy_from(other.cache_);
    copy_selection(other);
    form_bounds();
  }
  PageSelectKvCache sibling() const {
    const RetentionConfig& kept = this->retention();
    return PageSelectKvCache(this->shape(), this->num_qo_heads(), selection_, this->rotaries_,
                             kept.capacity, kept.max_chunk, kept.origin);
  }
  /// Appends selection, rows and what is picked; bounds follow from the rows. Allocates in the
  /// writer. \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    for (const auto& [field, value] : identity()) writer.write<std::int64_t>(value);
    cache_.save(writer);
    for (const Selected& layer : layers_)
      for (const std::int64_t value : {layer.selected_at, layer.count, layer.chosen})
        writer.write<std::int64_t>(value);
    writer.write_span(picked_.span());
  }
  /// Takes over a saved state. \throws Error(kFormat) naming the field; the cache is then reset.
  void restore(ByteReader& reader) {
    this->reset();
    try {
      for (const auto& [field, value] : identity())
        reader.read_expected<std::int64_t>(field, value);
      cache_.restore(reader);
      const std::int64_t pages = (this->total() + selection_.page_size - 1) / selection_.page_size;
      for (Selected& layer : layers_) {
        layer.selected_at = reader.read<std::int64_t>("selected at");
        layer.count = reader.read<std::int64_t>("pages");
        layer.chosen = reader.read<std::int64_t>("chosen pages");
        if (layer.selected_at < 0 || layer.selected_at > this->total() || layer.chosen < 0 ||
            layer.count < layer.chosen || layer.count > list_size_)
          throw Error(ErrorCode::kFormat,
                      {"inconsistent snapshot", reader.source(), "pages", "a selection", ""});
      }
      reader.read_span<std::int64_t>("picked pages", picked_.span());
      for (std::int64_t l = 0; l < this->shape().num_layers; ++l)
        for (std::int64_t h = 0; h < this->shape().num_kv_heads; ++h)
          if (layers_[size(l)].selected_at > 0 &&
              !is_selection(layers_[size(l)], list(l, h), pages))
            throw Error(ErrorCode::kFormat, {"inconsistent snapshot", reader.source(),
                                             "picked pages", "ascending pages", ""});
      form_bounds();
    } catch (...) {
      for (Selected& layer : layers_) layer = {};
      this->reset();
      throw;
    }
  }

  /// Picks pages for the newest token, whose keys are stored. query: all heads' rows, not rotated.
  void select(std::int64_t layer, const AttentionQuery& query) {
    Selected& at = layers_[size(layer)];
    const std::int64_t pages =
        this->total() / selection_.page_size + (this->total() % selection_.page_size != 0 ? 1 : 0);
    at.picks =
        query.rows.tokens == 1 && layer >= selection_.dense_layers && pages > selection_.budget;
    if (!at.picks) return;
    if (at.selected_at == 0 || this->total() - at.selected_at >= selection_.interval) {
      pick(layer, query, pages);
      return;
    }
    for (std::int64_t page = list(layer, 0)[at.count - 1] + 1; page < pages; ++page, ++at.count)
      for (std::int64_t h = 0; h < this->shape().num_kv_heads; ++h) list(layer, h)[at.count] = page;
  }

  int num_classes(std::int64_t layer) const {
    return picks(layer) ? static_cast<int>(heads_.size()) : 1;
  }
  HeadClassView head_class(std::int64_t layer, int part = 0) const {
    HeadClassView view;
    if (picks(layer)) view.kv_heads = {heads_.data() + part, 1};
    return view;
  }
  /// Everything, or the maximal runs of consecutive pages that one head reads.
  int segments(std::int64_t layer, [[maybe_unused]] std::int64_t queries,
               std::span<SegmentType, kMaxSegments> out, int part = 0) const {
    SLUICE_ASSERT(queries <= this->total());
    if (this->total() == 0) return 0;
    const SegmentType all = this->everything(layer);
    if (!picks(layer)) {
      out[0] = all;
      return 1;
    }
    const std::span<const std::int64_t> pages = picked(layer, part);
    int written = 0;
    for (std::size_t i = 0; i < pages.size();) {
      std::size_t next = i + 1;
      while (next < pages.size() && pages[next] == pages[next - 1] + 1) ++next;
      const std::int64_t first = pages[i] * selection_.page_size;
      const std::int64_t last =
          std::min((pages[next - 1] + 1) * selection_.page_size, this->total());
      SegmentType& run = out[size(written++)];
      run = all;
      run.rule.first_index += first;
      run.rule.first_position += static_cast<Position>(first);
      run.rule.first_slot += first;
      run.rule.count = run.rule.visible = last - first;
      run.keys = all.key(part, first);
      run.values = all.value(part, first);
      i = next;
    }
    return written;
  }

 private:
  std::array<std::pair<const char*, std::int64_t>, 5> identity() const {
    return {{{"page_size", selection_.page_size},
             {"logical_page_size", selection_.logical_page_size},
             {"budget", selection_.budget},
             {"interval", selection_.interval},
             {"dense_layers", selection_.dense_layers}}};
  }
  void copy_selection(const PageSelectKvCache& other) {
    layers_ = other.layers_;
    std::copy_n(other.picked_.data(), picked_.size(), picked_.data());
  }
  /// Bounds anew, from the stored keys.
  void form_bounds() {
    for (PageBounds<Key>& bounds : bounds_) bounds.truncate(0);
    for (std::int64_t l = 0; l < this->shape().num_layers; ++l) extend_bounds(l);
  }

  /// Pages of a list: a selection and what may be opened while it serves.
  static std::int64_t most_picked(const PageSelection& s) {
    return s.budget + s.interval / s.page_size + 1;
  }
  PageSelection checked(const PageSelection& s) const {
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    if (s.page_size < 1 || s.page_size > kMost)
      this->refuse("page_size", "at least 1", s.page_size);
    if (s.logical_page_size < 1 || s.page_size % s.logical_page_size != 0)
      this->refuse("logical_page_size", "a divisor of page_size = " + std::to_string(s.page_size),
                   s.logical_page_size);
    if (s.budget < 1 || s.budget > kMaxSegments)
      this->refuse("budget", "1 to " + std::to_string(kMaxSegments), s.budget);
    if (s.interval < 1 || s.interval > kMost) this->refuse("interval", "at least 1", s.interval);
    if (most_picked(s) > kMaxSegments)
      this->refuse("budget",
                   "with the pages of an interval at most " + std::to_string(kMaxSegments),
                   most_picked(s));
    if (s.dense_layers < 0) this->refuse("dense_layers", "at least 0", s.dense_layers);
    return s;
  }

  /// Whether pages could have been picked so: `chosen` ascending ones, the newest of that time
  /// last, then every page that has begun since.
  bool is_selection(const Selected& at, const std::int64_t* pages, std::int64_t num_pages) const {
    if (at.chosen < 1 || at.chosen > selection_.budget ||
        pages[at.chosen - 1] != (at.selected_at - 1) / selection_.page_size)
      return false;
    for (std::int64_t i = 0; i < at.count; ++i) {
      const std::int64_t least = i == 0 ? 0 : pages[i - 1] + 1;
      if (pages[i] < least || pages[i] >= num_pages || (i >= at.chosen && pages[i] != least))
        return false;
    }
    return true;
  }
  std::int64_t* list(std::int64_t layer, std::int64_t head) {
    return picked_.data() + (layer * this->shape().num_kv_heads + head) * list_size_;
  }
  const std::int64_t* list(std::int64_t layer, std::int64_t head) const {
    return picked_.data() + (layer * this->shape().num_kv_heads + head) * list_size_;
  }

  void extend_bounds(std::int64_t layer) {
    if (layer < selection_.dense_layers || this->total() == 0) return;
    const SegmentType all = this->everything(layer);
    bounds_[size(layer)].extend(all.keys, all.key_head_stride, all.key_token_stride, this->total());
  }

  /// Picks serve one step, selections as long as the token that they were made for is there.
  void unselect() {
    for (Selected& layer : layers_) {
      layer.picks = false;
      if (layer.selected_at > this->total()) layer.selected_at = 0;
      if (layer.selected_at == 0) continue;
      // Pages that were opened since and are gone.
      const std::int64_t pages = (this->total() + selection_.page_size - 1) / selection_.page_size;
      const std::int64_t* one = list(&layer - layers_.data(), 0);
      while (layer.count > layer.chosen && one[layer.count - 1] >= pages) --layer.count;
    }
    for (PageBounds<Key>& bounds : bounds_) bounds.truncate(this->total());
  }

  void pick(std::int64_t layer, const AttentionQuery& query, std::int64_t pages) {
    extend_bounds(layer);
    const float* rows = this->placed_query(layer, query);
    const PageBounds<Key>& bounds = bounds_[size(layer)];
    const std::int64_t dim = this->shape().head_dim;
    const std::int64_t parts = selection_.page_size / selection_.logical_page_size;
    const std::int64_t logical =
        (this->total() + selection_.logical_page_size - 1) / selection_.logical_page_size;
    Selected& at = layers_[size(layer)];
    for (std::int64_t h = 0; h < this->shape().num_kv_heads; ++h) {
      // The newest page is read whatever it scores.
      for (std::int64_t page = 0; page < pages; ++page) {
        float best = -std::numeric_limits<float>::infinity();
        for (std::int64_t part = page * parts; part < std::min((page + 1) * parts, logical); ++part)
          for (std::int64_t g = 0; g < group_; ++g)
            best = std::max(best, page_bound(rows + (h * group_ + g) * dim, bounds.maxima(h, part),
                                             bounds.minima(h, part), dim));
        scores_[size(page)] = best;
      }
      at.count = pick_pages({scores_.data(), size(pages)}, selection_.budget, order_.span());
      std::copy_n(order_.data(), at.count, list(layer, h));
    }
    at.chosen = at.count;
    at.selected_at = this->total();
    ++selections_;
  }

  PageSelection selection_;
  std::vector<Selected> layers_;
  std::vector<PageBounds<Key>> bounds_;  // [num_layers]
  std::vector<std::int32_t> heads_;      // 0, 1, ..: a class for each where pages are picked
  std::int64_t list_size_ = 0;
  Buffer<std::int64_t> picked_;  // [layers, kv heads, list_size]
  Buffer<float> scores_;         // [pages]
  Buffer<std::int64_t> order_;   // [pages]
  std::int64_t selections_ = 0;
};

/// A full cache of which the layers behind a publishing one read only the tokens that scored
/// highest there, at the same step: for each KV head the `budget` earlier tokens with the largest
/// share of attention in any of its query heads (TidalDecode publishes for each query head), and
/// the decoded token itself, which is always read.
///
/// The chosen rows are copied side by side into one run for all heads: single tokens would each be
/// a segment with a rotation of the queries and a work item of its own, and a row is read once
/// either way. Runs are numbered as if nothing were left out, so models whose layers have trained
/// windows or whose scores depend on distances otherwise than by rotation (ALiBi) cannot use it.
///
/// Protocol of a step: as KvCache, with select() between store() and segments() and observe() after
/// attention. Publishing reads a layer's keys once more. Only construction allocates: bytes() and
/// the copies. One thread at a time; store() of different rows may run on several.
template <RotaryElement Key, RotaryElement Value = Key>
class TokenSelectKvCache
    : public detail::SelectiveCache<TokenSelectKvCache<Key, Value>, Key, Value> {
  using Base = detail::SelectiveCache<TokenSelectKvCache, Key, Value>;
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
  TokenSelectKvCache(const KvShape& shape, std::int64_t num_qo_heads, float sm_scale,
                     const TokenSelection& selection, std::span<const Rotary* const> rotaries,
                     std::int64_t capacity, std::int64_t max_chunk, Position origin = 0)
      : Base("TokenSelectKvCache", shape, num_qo_heads, rotaries, capacity, max_chunk, origin),
        selection_(selection),
        sm_scale_(sm_scale),
        publishes_(size(shape.num_layers)) {
    if (selection_.budget < 1) this->refuse("budget", "at least 1", selection_.budget);
    selection_.budget = std::min(selection_.budget, capacity);
    std::int64_t last = -1;
    for (const std::int64_t layer : selection_.publishing_layers) {
      if (layer <= last || layer >= shape.num_layers)
        this->refuse("publishing_layers", "ascending, below " + std::to_string(shape.num_layers),
                     layer);
      publishes_[size(layer)] = true;
      last = layer;
    }
    const std::int64_t most = selection_.budget + 1;
    published_ = Buffer<std::int64_t>(size(shape.num_kv_heads * most));
    keys_ = Buffer<Key>(size(shape.num_kv_heads * most * shape.head_dim));
    values_ = Buffer<Value>(size(shape.num_kv_heads * most * shape.value_dim));
    scores_ = Buffer<float>(size(capacity));
    order_ = Buffer<std::int64_t>(size(capacity));
  }

  const TokenSelection& selection() const { return selection_; }
  /// The tokens that were published last at this step, ascending, the decoded one last; empty:
  /// none were. The same number for every head.
  std::span<const std::int64_t> published(std::int64_t kv_head) const {
    return {published_.data() + kv_head * (selection_.budget + 1), size(published_count_)};
  }
  /// Whether the last select() was of a layer that reads what was published.
  bool gathers() const { return gathers_; }

  void copy_from(const TokenSelectKvCache& other) {
    cache_.copy_from(other.cache_);
    unselect();
  }
  TokenSelectKvCache sibling() const {
    const RetentionConfig& kept = this->retention();
    return TokenSelectKvCache(this->shape(), this->num_qo_heads(), sm_scale_, selection_,
                              this->rotaries_, kept.capacity, kept.max_chunk, kept.origin);
  }
  /// Appends selection and rows. Allocates in the writer. \throws Error(kOrder) with uncommitted
  /// tokens.
  void save(ByteWriter& writer) const {
    writer.write<std::int64_t>(selection_.budget);
    writer.write_span(std::span<const std::int64_t>(selection_.publishing_layers));
    cache_.save(writer);
  }
  /// Takes over a saved state. \throws Error(kFormat) naming the field; the cache is then reset.
  void restore(ByteReader& reader) {
    this->reset();
    reader.read_expected<std::int64_t>("budget", selection_.budget);
    const std::vector<std::int64_t> layers = reader.read_vector<std::int64_t>(
        "publishing layers", static_cast<std::uint64_t>(this->shape().num_layers));
    if (layers != selection_.publishing_layers)
      throw Error(ErrorCode::kFormat, {"saved with another selection", reader.source(),
                                       "publishing layers", "those of the cache", "others"});
    cache_.restore(reader);
  }

  /// Gathers the published tokens' rows of a layer that reads them.
  void select(std::int64_t layer, const AttentionQuery& query) {
    gathers_ = query.rows.tokens == 1 && published_count_ > 0 && published_count_ < this->total() &&
               !publishes_[size(layer)];
    if (!gathers_) return;
    const SegmentType all = this->everything(layer);
    const KvShape& s = this->shape();
    for (std::int64_t h = 0; h < s.num_kv_heads; ++h) {
      const std::span<const std::int64_t> tokens = published(h);
      for (std::int64_t i = 0; i < published_count_; ++i) {
        const std::int64_t row = h * (selection_.budget + 1) + i;
        std::copy_n(all.key(h, tokens[size(i)]), s.head_dim, keys_.data() + row * s.head_dim);
        std::copy_n(all.value(h, tokens[size(i)]), s.value_dim, values_.data() + row * s.value_dim);
      }
    }
  }

  int num_classes(std::int64_t) const { return 1; }
  HeadClassView head_class(std::int64_t, int = 0) const { return {}; }
  int segments(std::int64_t layer, [[maybe_unused]] std::int64_t queries,
               std::span<SegmentType, kMaxSegments> out, int = 0) const {
    SLUICE_ASSERT(queries <= this->total());
    if (this->total() == 0) return 0;
    SegmentType& segment = out[0];
    segment = this->everything(layer);
    if (!gathers_) return 1;
    const std::int64_t left_out = this->total() - published_count_;
    segment.rule.first_index += left_out;
    segment.rule.first_position += static_cast<Position>(left_out);
    segment.rule.count = segment.rule.visible = published_count_;
    segment.keys = keys_.data();
    segment.values = values_.data();
    segment.key_head_stride = (selection_.budget + 1) * this->shape().head_dim;
    segment.value_head_stride = (selection_.budget + 1) * this->shape().value_dim;
    return 1;
  }

  bool observes(std::int64_t layer) const { return publishes_[size(layer)]; }
  /// Publishes, at a step of one token in a publishing layer.
  void observe(const ObservedAttention<Key, Value>& seen) {
    if (seen.query.rows.tokens != 1 || !publishes_[size(seen.layer)]) return;
    const float* rows = this->placed_query(seen.layer, seen.query);
    const SegmentType all = this->everything(seen.layer);
    const std::int64_t earlier = this->total() - 1;
    const std::int64_t dim = this->shape().head_dim;
    for (std::int64_t h = 0; h < this->shape().num_kv_heads; ++h) {
      for (std::int64_t j = 0; j < earlier; ++j) {
        // ln of the largest share among the query heads.
        float best = -std::numeric_limits<float>::infinity();
        for (std::int64_t g = h * group_; g < (h + 1) * group_; ++g)
          best = std::max(
              best, sm_scale_ * page_bound(rows + g * dim, all.key(h, j), all.key(h, j), dim) -
                        seen.lse[g]);
        scores_[size(j)] = best;
      }
      const std::int64_t picked =
          pick_highest({scores_.data(), size(earlier)}, selection_.budget, order_.span());
      std::int64_t* to = published_.data() + h * (selection_.budget + 1);
      std::copy_n(order_.data(), picked, to);
      to[picked] = earlier;
      published_count_ = picked + 1;
    }
  }

 private:
  /// What is published serves one step, and is no state.
  void unselect() {
    published_count_ = 0;
    gathers_ = false;
  }

  TokenSelection selection_;
  float sm_scale_;
  std::vector<bool> publishes_;     // [num_layers]
  Buffer<std::int64_t> published_;  // [kv heads, budget + 1]
  std::int64_t published_count_ = 0;
  bool gathers_ = false;
  Buffer<Key> keys_;            // [kv heads, budget + 1, head_dim], of the layer that is read
  Buffer<Value> values_;        // [kv heads, budget + 1, value_dim]
  Buffer<float> scores_;        // [capacity]
  Buffer<std::int64_t> order_;  // [capacity]
};

}  // namespace sluice
