// SPDX-License-Identifier: MIT
/// A cache for endless video: a local window, frames spilled to the host, and for a question the
/// frames that answer it best, reloaded (ReKV, arXiv 2503.00540).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/page_bounds.hpp"
#include "sluice/cache/frame_store.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// The frames that a question gets: frames are grouped by `chunk_frames` in order, a group scores
/// the mean of its frames (the last may be smaller), and the best top_frames / chunk_frames groups
/// are taken, all frames where there are at most top_frames. scores: [frames]; means, order:
/// [frames or more], scratch; picked: [top_frames or more], gets their numbers, ascending. Returns
/// how many. Ties go to the earlier. Allocates nothing.
inline std::int64_t pick_frames(std::span<const float> scores, std::int64_t top_frames,
                                std::int64_t chunk_frames, std::span<float> means,
                                std::span<std::int64_t> order, std::span<std::int64_t> picked) {
  const auto frames = static_cast<std::int64_t>(scores.size());
  std::int64_t written = 0;
  if (frames <= top_frames) {
    for (; written < frames; ++written) picked[static_cast<std::size_t>(written)] = written;
    return written;
  }
  const std::int64_t groups = (frames + chunk_frames - 1) / chunk_frames;
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::int64_t first = group * chunk_frames;
    const std::int64_t last = std::min(first + chunk_frames, frames);
    float sum = 0;
    for (std::int64_t f = first; f < last; ++f) sum += scores[static_cast<std::size_t>(f)];
    means[static_cast<std::size_t>(group)] = sum / static_cast<float>(last - first);
  }
  const std::int64_t best =
      pick_highest(means.first(static_cast<std::size_t>(groups)), top_frames / chunk_frames, order);
  for (std::int64_t i = 0; i < best; ++i) {
    const std::int64_t first = order[static_cast<std::size_t>(i)] * chunk_frames;
    for (std::int64_t f = first; f < std::min(first + chunk_frames, frames); ++f)
      picked[static_cast<std::size_t>(written++)] = f;
  }
  return written;
}

/// Extents of a RetrievalKvCache.
struct RetrievalConfig {
  std::int64_t num_init_tokens = 0;  ///< the first tokens (a system prompt): always at hand
  std::int64_t window_size = 15000;  ///< keys that a token sees, its own included
  std::int64_t frame_size = 196;     ///< tokens that are spilled, scored and loaded together
  std::int64_t max_frames = 0;       ///< frames that the host store holds
  std::int64_t top_frames = 64;      ///< frames that a question gets, at most
  std::int64_t chunk_frames = 1;     ///< neighbours that are picked together
  std::int64_t num_slots = 128;      ///< loaded frames of a layer, at least top_frames
  std::int64_t max_question = 1024;  ///< tokens of a question and its answer
  std::int64_t max_chunk = 196;      ///< tokens between two commits
  /// Frames are kept in a file in this folder; absent: in memory.
  std::optional<std::filesystem::path> folder = std::nullopt;
};

/// Keys and values of one stream of which a window is at hand and everything else on the host, in
/// whole frames: frame f is tokens num_init_tokens + f * frame_size on. Keys are stored raw.
///
/// Reading the stream, token i sees the last window_size keys at their distances, and the init
/// tokens that have left the window, all at distance window_size - 1. A frame is copied to the host
/// when its last token is committed, with the mean of its keys.
///
/// begin_question() turns to a question: tokens that follow see the init tokens, the picked frames
/// in order of time and the question so far, numbered by rank from 0, the last window_size of them.
/// The first chunk of the question picks, in each layer for itself: a frame scores the mean over
/// the chunk's tokens of the product of all heads' queries, not rotated, with its mean keys. Frames
/// that are not loaded are read from the host into slots; the least recently used make room.
/// end_question() forgets the question; the stream goes on as if it had not been asked. Tokens of
/// a frame that is not complete are not retrieved.
///
/// Protocol of a step: as KvCache, with select() between store() and segments(). Only construction
/// allocates. Nothing throws but a file store: commit(), select() and late_segments() pass on what
/// FrameStore throws; the step is then still uncommitted and may be rolled back or, in commit(),
/// tried again. One thread at a time; store() of different rows may run on several.
///
/// overlap_loads(true): select() only posts what is to be loaded, segments() lists what is at hand,
/// and late_segments() the rest, once it is there: the two parts of attention are merged by their
/// log-sum-exps, which is exact. Any number of other threads, the caller's, may call load_one()
/// meanwhile; what none of them has taken is loaded by late_segments() itself, so that nothing
/// depends on them but the time. No lock is taken.
template <RotaryElement Key, RotaryElement Value = Key>
class RetrievalKvCache {
 public:
  using KeyType = Key;
  using ValueType = Value;
  using SegmentType = Segment<Key, Value>;
  static constexpr int kMaxSegments = AttentionWorkspace<cpu>::kMaxSegments;

  /// rotaries: [num_layers], each null or outliving the cache. num_qo_heads: the model's.
  /// \throws Error(kConfig, kShape) for extents that do not fit, Error(kIo) as FrameStore.
  RetrievalKvCache(const KvShape& shape, std::int64_t num_qo_heads, const RetrievalConfig& config,
                   std::span<const Rotary* const> rotaries)
      : shape_(shape),
        config_(checked(config)),
        group_(num_qo_heads / std::max<std::int64_t>(1, shape.num_kv_heads)),
        rotaries_(rotaries.begin(), rotaries.end()),
        cache_(make_window(shape, config, rotaries)) {
    if (num_qo_heads < 1 || num_qo_heads % shape.num_kv_heads != 0)
      throw Error(ErrorCode::kShape,
                  {"cache shape does not fit", "RetrievalKvCache", "num_qo_heads",
                   "a multiple of num_kv_heads = " + std::to_string(shape.num_kv_heads),
                   std::to_string(num_qo_heads)});
    frame_keys_ = shape.num_kv_heads * config.frame_size * shape.head_dim;
    frame_values_ = shape.num_kv_heads * config.frame_size * shape.value_dim;
    const auto record = frame_keys_ * static_cast<std::int64_t>(sizeof(Key)) +
                        frame_values_ * static_cast<std::int64_t>(sizeof(Value));
    const std::int64_t records = shape.num_layers * config.max_frames;
    store_ = config.folder ? std::make_unique<FrameStore>(records, record, *config.folder)
                           : std::make_unique<FrameStore>(records, record);
    record_ = Buffer<std::byte>(size(record));
    posted_ = std::make_unique<Posted>(config.top_frames);
    init_ = Rows(shape, config.num_init_tokens);
    question_ = Rows(shape, config.max_question);
    means_ = Buffer<float>(size(records * shape.num_kv_heads * shape.head_dim));
    slot_keys_ = Buffer<Key>(size(shape.num_layers * config.num_slots * frame_keys_));
    slot_values_ = Buffer<Value>(size(shape.num_layers * config.num_slots * frame_values_));
    slots_ = Buffer<Slot>(size(shape.num_layers * config.num_slots));
    picked_ = Buffer<std::int64_t>(size(shape.num_layers * config.top_frames));
    given_ = Buffer<std::int64_t>(size(config.top_frames));
    picks_.resize(size(shape.num_layers));
    query_ = Buffer<double>(size(shape.num_kv_heads * shape.head_dim));
    scores_ = Buffer<float>(size(config.max_frames));
    group_means_ = Buffer<float>(size(config.max_frames));
    order_ = Buffer<std::int64_t>(size(config.max_frames));
    for (std::size_t l = 0; l < rotaries_.size(); ++l) {
      std::shared_ptr<RotaryTable> table;
      for (std::size_t k = 0; k < l; ++k)
        if (rotaries_[k] == rotaries_[l]) table = tables_[k];
      if (rotaries_[l] != nullptr && table == nullptr) {
        table = std::make_shared<RotaryTable>(*rotaries_[l], question_ranks());
        table->fill_run(0, question_ranks());
      }
      tables_.push_back(table);
    }
    reset();
  }

  const KvShape& shape() const { return shape_; }
  const RetrievalConfig& config() const { return config_; }
  /// Index of the next token, those of a question counted.
  std::int64_t total() const { return cache_.total() + asked_; }
  /// A question's tokens stand behind as many frames as it may get; layers that picked fewer shift.
  Position write_position(std::int64_t index) const {
    if (!asking_) return cache_.write_position(index);
    return static_cast<Position>(config_.num_init_tokens + config_.top_frames * config_.frame_size +
                                 index - cache_.total());
  }
  bool takes_positions() const { return false; }
  std::int64_t max_chunk() const { return config_.max_chunk; }
  /// Entries that one query can see in a layer.
  std::int64_t max_entries() const {
    return std::max(cache_.max_entries() + config_.num_init_tokens, question_ranks());
  }
  /// Bytes of keys and values at hand: window, init tokens, question, slots.
  std::size_t bytes() const {
    return cache_.bytes() + init_.bytes() + question_.bytes() + slot_keys_.bytes() +
           slot_values_.bytes();
  }
  const FrameStore& store() const { return *store_; }
  /// Frames on the host.
  std::int64_t frames() const { return frames_; }
  /// Frames read from the host so far, of all layers.
  std::int64_t loads() const { return loads_; }
  bool asking() const { return asking_; }
  /// Whether loads overlap attention. Not between select() and late_segments().
  void overlap_loads(bool on) { overlaps_ = on; }
  /// Loads one frame that a step has posted. Returns whether there was one. For threads beside the
  /// one that steps, while the cache lives; throws nothing (a frame that cannot be read is tried
  /// again, and the error thrown, by the step). record: [store().record_bytes()], the thread's own.
  bool load_one(std::span<std::byte> record) { return load_posted(record); }
  /// Frames that were loaded by load_one() so far.
  std::int64_t overlapped_loads() const { return posted_->taken.load(std::memory_order_relaxed); }
  /// The frames that a layer's question reads, ascending; empty before select().
  std::span<const std::int64_t> picked(std::int64_t layer) const {
    return {picked_.data() + layer * config_.top_frames, size(picks_[size(layer)].count)};
  }

  CacheStatus status(std::int64_t tokens) const {
    if (asking_)
      return tokens <= config_.max_chunk - (asked_ - asked_committed_) &&
                     asked_ + tokens <= config_.max_question
                 ? CacheStatus::kOk
                 : CacheStatus::kFull;
    if (frames_of(cache_.total() + tokens) > config_.max_frames) return CacheStatus::kFull;
    return cache_.status(tokens);
  }
  /// Tokens that may follow `fed` ones: of the question that is being asked, or until the host
  /// store is full.
  std::int64_t room_behind(std::int64_t fed) const {
    if (asking_ && fed > 0) return config_.max_question - asked_;
    return config_.num_init_tokens + (config_.max_frames + 1) * config_.frame_size - 1 - fed;
  }
  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    if (!asking_) {
      cache_.append(tokens);
      return;
    }
    if (asked_committed_ == 0 && asked_ == 0)
      for (Picks& picks : picks_) picks = {};
    asked_ += tokens;
  }
  /// Makes the appended tokens final; frames that they complete go to the host.
  void commit() {
    if (asking_) {
      asked_committed_ = asked_;
      return;
    }
    spill();
    cache_.commit();
    frames_ = frames_of(cache_.total());
  }
  void rollback() {
    if (asking_)
      asked_ = asked_committed_;
    else
      cache_.rollback();
  }
  void reset() {
    cache_.reset();
    frames_ = asked_ = asked_committed_ = 0;
    asking_ = false;
    for (Slot& slot : slots_.span()) slot = {};
    for (Picks& picks : picks_) picks = {};
  }

  /// What follows is a question. frames: those that every layer reads, ascending; empty: each layer
  /// picks. \throws Error(kOrder) with uncommitted tokens or during a question, Error(kCapacity)
  /// for more than top_frames, Error(kConfig) for frames that are not there; nothing changes.
  void begin_question(std::span<const std::int64_t> frames = {}) {
    const auto fail = [](ErrorCode code, const char* what, const char* field,
                         const std::string& expected, std::int64_t found) {
      throw Error(
          code, {what, "RetrievalKvCache::begin_question", field, expected, std::to_string(found)});
    };
    const std::int64_t open = cache_.total() - cache_.retentions().front().committed();
    if (asking_) fail(ErrorCode::kOrder, "a question is open", "question", "none", 1);
    if (open > 0) fail(ErrorCode::kOrder, "uncommitted tokens", "tokens", "0", open);
    const auto count = static_cast<std::int64_t>(frames.size());
    if (count > config_.top_frames)
      fail(ErrorCode::kCapacity, "too many frames", "frames",
           "at most " + std::to_string(config_.top_frames), count);
    for (std::size_t i = 0; i < frames.size(); ++i)
      if (frames[i] < (i == 0 ? 0 : frames[i - 1] + 1) || frames[i] >= frames_)
        fail(ErrorCode::kConfig, "no such frame", "frames",
             "ascending, below " + std::to_string(frames_), frames[i]);
    std::copy(frames.begin(), frames.end(), given_.data());
    given_count_ = count;
    asking_ = true;
    asked_ = asked_committed_ = 0;
  }
  /// Forgets the question and its answer.
  void end_question() {
    asking_ = false;
    asked_ = asked_committed_ = 0;
  }

  /// Writes keys and values of the newest tokens; as KvCache::store().
  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    if (!asking_) cache_.store(layer, keys, values, rotation, begin, end);
    Rows& rows = asking_ ? question_ : init_;
    const std::int64_t first = (asking_ ? asked_ : cache_.total()) - keys.tokens;
    for (std::int64_t t = begin; t < std::min(end, rows.capacity - first); ++t)
      for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h) {
        convert(keys.head(t, h), shape_.head_dim, rows.key(shape_, layer, h, first + t));
        convert(values.head(t, h), shape_.value_dim, rows.value(shape_, layer, h, first + t));
      }
  }

  /// At a question's first chunk: picks frames for the layer and loads them. query: all heads'
  /// rows, not rotated. \throws what FrameStore::get throws.
  void select(std::int64_t layer, const AttentionQuery& query) {
    if (!asking_ || picks_[size(layer)].made) return;
    std::int64_t* picked = picked_.data() + layer * config_.top_frames;
    std::int64_t count = given_count_;
    if (count > 0) {
      std::copy_n(given_.data(), count, picked);
    } else {
      score(layer, query.rows);
      count = pick_frames({scores_.data(), size(frames_)}, config_.top_frames, config_.chunk_frames,
                          group_means_.span(), order_.span(), {picked, size(config_.top_frames)});
    }
    // Frames of this request do not give way to each other.
    ++requests_;
    for (std::int64_t i = 0; i < count; ++i)
      if (Slot* slot = slot_of(layer, picked[i])) slot->used = requests_;
    std::uint32_t posted = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      if (slot_of(layer, picked[i]) != nullptr) continue;
      if (overlaps_)
        posted_->requests[posted++] = {layer, picked[i], take_slot(layer, picked[i]), false};
      else
        load(layer, picked[i]);
    }
    if (posted > 0) posted_->open(posted);
    picks_[size(layer)] = {true, count};
  }

  int num_classes(std::int64_t) const { return 1; }
  HeadClassView head_class(std::int64_t, int = 0) const {
    HeadClassView view;
    view.window_size = config_.window_size;
    return view;
  }
  int segments(std::int64_t layer, std::int64_t queries, std::span<SegmentType, kMaxSegments> out,
               int = 0) const {
    return asking_ ? question_segments(layer, out, false) : stream_segments(layer, queries, out);
  }
  /// The segments whose frames were on their way when segments() was called; waits for them.
  /// Between attention over the others and the layer's end. \throws what FrameStore::get throws.
  int late_segments(std::int64_t layer, std::int64_t, std::span<SegmentType> out) {
    if (!asking_ || !posted_->is_open()) return 0;
    while (load_posted(record_.span())) posted_->taken.fetch_sub(1, std::memory_order_relaxed);
    posted_->wait();
    for (std::uint32_t i = 0; i < posted_->count; ++i) reload(i);
    const int written = question_segments(layer, out, true);
    posted_->close();
    return written;
  }

 private:
  /// Raw rows of all layers: [layers, kv heads, capacity, dim].
  struct Rows {
    Rows() = default;
    Rows(const KvShape& shape, std::int64_t rows)
        : capacity(rows),
          keys(size(shape.num_layers * shape.num_kv_heads * rows * shape.head_dim)),
          values(size(shape.num_layers * shape.num_kv_heads * rows * shape.value_dim)) {}
    std::size_t bytes() const { return keys.bytes() + values.bytes(); }
    std::int64_t row(const KvShape& shape, std::int64_t layer, std::int64_t head,
                     std::int64_t i) const {
      return (layer * shape.num_kv_heads + head) * capacity + i;
    }
    Key* key(const KvShape& s, std::int64_t layer, std::int64_t head, std::int64_t i) {
      return keys.data() + row(s, layer, head, i) * s.head_dim;
    }
    Value* value(const KvShape& s, std::int64_t layer, std::int64_t head, std::int64_t i) {
      return values.data() + row(s, layer, head, i) * s.value_dim;
    }
    SegmentType segment(const KvShape& s, std::int64_t layer) const {
      SegmentType result;
      result.keys = keys.data() + row(s, layer, 0, 0) * s.head_dim;
      result.values = values.data() + row(s, layer, 0, 0) * s.value_dim;
      result.key_token_stride = s.head_dim;
      result.value_token_stride = s.value_dim;
      result.key_head_stride = capacity * s.head_dim;
      result.value_head_stride = capacity * s.value_dim;
      return result;
    }

    std::int64_t capacity = 0;
    Buffer<Key> keys;
    Buffer<Value> values;
  };
  struct Slot {
    std::int64_t frame = -1;
    std::int64_t used = 0;  // the request that it served last
  };
  struct Picks {
    bool made = false;
    std::int64_t count = 0;
  };
  struct Request {
    std::int64_t layer = 0;
    std::int64_t frame = 0;
    std::int64_t slot = 0;
    bool failed = false;
  };
  /// Frames to be loaded: written by the step, claimed one by one by whoever comes.
  struct Posted {
    explicit Posted(std::int64_t most) : requests(static_cast<std::size_t>(most)) {}

    std::vector<Request> requests;
    std::uint32_t count = 0;  // of the step alone
    /// Round in the upper half, then requests and requests claimed, 16 bits each: a claim of an
    /// earlier round fails.
    std::atomic<std::uint64_t> ticket{0};
    std::atomic<std::uint32_t> done{0};
    std::atomic<std::int64_t> taken{0};

    bool is_open() const { return count > 0; }
    void open(std::uint32_t requests_posted) {
      count = requests_posted;
      done.store(0, std::memory_order_relaxed);
      const std::uint64_t round = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
      ticket.store(round << 32 | std::uint64_t{requests_posted} << 16, std::memory_order_release);
    }
    void close() { count = 0; }
    /// The number of a request that is now the caller's to serve; -1: none is left.
    std::int64_t claim() {
      std::uint64_t seen = ticket.load(std::memory_order_acquire);
      while ((seen & 0xffff) < ((seen >> 16) & 0xffff))
        if (ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel,
                                         std::memory_order_acquire))
          return static_cast<std::int64_t>(seen & 0xffff);
      return -1;
    }
    void finish() {
      done.fetch_add(1, std::memory_order_acq_rel);
      done.notify_one();
    }
    void wait() const {
      for (std::uint32_t seen = done.load(std::memory_order_acquire); seen < count;
           seen = done.load(std::memory_order_acquire))
        done.wait(seen, std::memory_order_acquire);
    }
  };

  static std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
  template <class T>
  static void convert(const float* from, std::int64_t count, T* to) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }

  static const RetrievalConfig& checked(const RetrievalConfig& c) {
    const auto need = [](bool fine, const char* field, const std::string& expected,
                         std::int64_t found) {
      if (!fine)
        throw Error(ErrorCode::kConfig, {"cache configuration does not fit", "RetrievalKvCache",
                                         field, expected, std::to_string(found)});
    };
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    const auto at_least = [&](const char* field, std::int64_t value, std::int64_t least) {
      need(value >= least && value <= kMost, field, "at least " + std::to_string(least), value);
    };
    at_least("num_init_tokens", c.num_init_tokens, 0);
    at_least("frame_size", c.frame_size, 1);
    at_least("max_frames", c.max_frames, 1);
    at_least("chunk_frames", c.chunk_frames, 1);
    at_least("top_frames", c.top_frames, c.chunk_frames);
    need(c.top_frames <= kMaxSegments - 2, "top_frames",
         "at most " + std::to_string(kMaxSegments - 2), c.top_frames);
    at_least("num_slots", c.num_slots, c.top_frames);
    at_least("max_question", c.max_question, 1);
    at_least("max_chunk", c.max_chunk, 1);
    // A frame that is completed is still in the window, and so is a chunk behind the init tokens,
    // whose segment borrows indices there.
    at_least("window_size", c.window_size,
             std::max(c.frame_size, c.num_init_tokens + c.max_chunk + 1));
    return c;
  }

  static KvCache<Key, Value> make_window(const KvShape& shape, const RetrievalConfig& config,
                                         std::span<const Rotary* const> rotaries) {
    RetentionConfig window = RetentionConfig::window(config.window_size, config.max_chunk);
    window.key_form = KeyForm::kRaw;
    std::vector<LayerCacheConfig> layers;
    for (const Rotary* rotary : rotaries) layers.push_back({.retention = 0, .rotary = rotary});
    return KvCache<Key, Value>(shape, std::array{window}, layers);
  }

  /// Positions of a question: init tokens, frames, the question.
  std::int64_t question_ranks() const {
    return config_.num_init_tokens + config_.top_frames * config_.frame_size + config_.max_question;
  }
  /// Whole frames among the first `tokens` tokens.
  std::int64_t frames_of(std::int64_t tokens) const {
    return std::max<std::int64_t>(0, tokens - config_.num_init_tokens) / config_.frame_size;
  }

  int stream_segments(std::int64_t layer, std::int64_t queries,
                      std::span<SegmentType, kMaxSegments> out) const {
    std::array<SegmentType, KvCache<Key, Value>::kMaxSegments> found;
    const int count = cache_.segments(layer, queries, found);
    int written = 0;
    // Init tokens that a query of the chunk no longer has in its window.
    const std::int64_t last = cache_.total() - 1;
    const std::int64_t far = std::min(config_.num_init_tokens, last + 1 - config_.window_size);
    if (far > 0) {
      SegmentType& segment = out[size(written++)];
      segment = init_.segment(shape_, layer);
      segment.rule.count = segment.rule.visible = far;
      segment.rule.kind = TokenKind::kPinned;
      // One distance for all: keys stand at 0, the reader at window_size - 1.
      segment.rule.ceiling = static_cast<Position>(config_.window_size - 1);
      if (tables_[size(layer)] != nullptr) segment.key_rotation = tables_[size(layer)]->row(0);
      // Visibility goes by indices. While init tokens are leaving, token j has that of the query
      // that first misses it; later any in every query's window will do.
      const std::int64_t first = cache_.total() - queries;
      segment.rule.first_index = first >= config_.num_init_tokens + config_.window_size
                                     ? first - config_.num_init_tokens
                                     : config_.window_size;
    }
    for (int i = 0; i < count; ++i) out[size(written++)] = found[size(i)];
    return written;
  }

  /// All segments of a question, or where loads are on their way those that were at hand (late:
  /// false) or not.
  int question_segments(std::int64_t layer, std::span<SegmentType> out, bool late) const {
    const std::span<const std::int64_t> frames = picked(layer);
    const std::int64_t init = std::min(config_.num_init_tokens, cache_.total());
    const auto loaded = static_cast<std::int64_t>(frames.size()) * config_.frame_size;
    int written = 0;
    std::int64_t rank = 0;
    const auto add = [&](const SegmentType& rows, std::int64_t count, bool is_late) {
      if (count == 0) return;
      if (is_late != late) {
        rank += count;
        return;
      }
      SegmentType& segment = out[size(written++)];
      segment = rows;
      segment.rule.count = segment.rule.visible = count;
      segment.rule.first_position = static_cast<Position>(rank);
      segment.rule.first_index = cache_.total() - init - loaded + rank;
      segment.rule.shift = static_cast<Position>(init + loaded - config_.num_init_tokens -
                                                 config_.top_frames * config_.frame_size);
      if (tables_[size(layer)] != nullptr) {
        segment.key_rotation = tables_[size(layer)]->row(rank);
        segment.key_rotation_stride = rotaries_[size(layer)]->row_size();
      }
      rank += count;
    };
    add(init_.segment(shape_, layer), init, false);
    for (const std::int64_t frame : frames) {
      const Slot* slot = slot_of(layer, frame);
      const std::int64_t at = slot - slots_.data();
      SegmentType rows;
      rows.keys = slot_keys_.data() + at * frame_keys_;
      rows.values = slot_values_.data() + at * frame_values_;
      rows.key_token_stride = shape_.head_dim;
      rows.value_token_stride = shape_.value_dim;
      rows.key_head_stride = config_.frame_size * shape_.head_dim;
      rows.value_head_stride = config_.frame_size * shape_.value_dim;
      rows.rule.kind = TokenKind::kVision;
      add(rows, config_.frame_size, is_posted(layer, frame));
    }
    add(question_.segment(shape_, layer), asked_, false);
    return written;
  }

  /// Writes the frames that the uncommitted tokens complete.
  void spill() {
    const std::int64_t fresh = cache_.total() - cache_.retentions().front().committed();
    for (std::int64_t frame = frames_; frame < frames_of(cache_.total()); ++frame)
      for (std::int64_t layer = 0; layer < shape_.num_layers; ++layer) {
        std::array<SegmentType, KvCache<Key, Value>::kMaxSegments> found;
        const int count = cache_.segments(layer, fresh, found);
        Key* keys = reinterpret_cast<Key*>(record_.data());
        Value* values = reinterpret_cast<Value*>(
            record_.data() + frame_keys_ * static_cast<std::int64_t>(sizeof(Key)));
        const std::int64_t first = config_.num_init_tokens + frame * config_.frame_size;
        float* means = means_of(layer, frame);
        std::fill_n(means, shape_.num_kv_heads * shape_.head_dim, 0.0F);
        for (int s = 0; s < count; ++s) {
          const SegmentType& run = found[size(s)];
          const std::int64_t from = std::max(first, run.rule.first_index);
          const std::int64_t to =
              std::min(first + config_.frame_size, run.rule.first_index + run.rule.count);
          for (std::int64_t h = 0; h < shape_.num_kv_heads; ++h)
            for (std::int64_t j = from; j < to; ++j) {
              const std::int64_t row = h * config_.frame_size + j - first;
              const Key* key = run.key(h, j - run.rule.first_index);
              std::copy_n(key, shape_.head_dim, keys + row * shape_.head_dim);
              std::copy_n(run.value(h, j - run.rule.first_index), shape_.value_dim,
                          values + row * shape_.value_dim);
              for (std::int64_t d = 0; d < shape_.head_dim; ++d)
                means[h * shape_.head_dim + d] +=
                    static_cast<float>(key[d]) / static_cast<float>(config_.frame_size);
            }
        }
        store_->put(frame * shape_.num_layers + layer, record_.span());
      }
  }

  float* means_of(std::int64_t layer, std::int64_t frame) {
    return means_.data() +
           (frame * shape_.num_layers + layer) * shape_.num_kv_heads * shape_.head_dim;
  }

  void score(std::int64_t layer, HeadsView<const float> rows) {
    const std::int64_t dim = shape_.head_dim;
    std::fill_n(query_.data(), query_.size(), 0.0);
    for (std::int64_t t = 0; t < rows.tokens; ++t)
      for (std::int64_t h = 0; h < rows.num_heads; ++h)
        for (std::int64_t d = 0; d < dim; ++d)
          query_[size(h / group_ * dim + d)] +=
              static_cast<double>(rows.head(t, h)[d]) / static_cast<double>(rows.tokens);
    for (std::int64_t frame = 0; frame < frames_; ++frame) {
      const float* means = means_of(layer, frame);
      double sum = 0;
      for (std::int64_t d = 0; d < shape_.num_kv_heads * dim; ++d)
        sum += query_[size(d)] * static_cast<double>(means[d]);
      scores_[size(frame)] = static_cast<float>(sum);
    }
  }

  const Slot* slot_of(std::int64_t layer, std::int64_t frame) const {
    const Slot* first = slots_.data() + layer * config_.num_slots;
    const Slot* last = first + config_.num_slots;
    const Slot* found = std::find_if(first, last, [&](const Slot& s) { return s.frame == frame; });
    return found == last ? nullptr : found;
  }
  Slot* slot_of(std::int64_t layer, std::int64_t frame) {
    return const_cast<Slot*>(std::as_const(*this).slot_of(layer, frame));
  }
  /// Empties the least recently used slot of a layer for a frame; returns its number.
  std::int64_t take_slot(std::int64_t layer, std::int64_t frame) {
    Slot* first = slots_.data() + layer * config_.num_slots;
    Slot* slot = std::min_element(first, first + config_.num_slots,
                                  [](const Slot& a, const Slot& b) { return a.used < b.used; });
    SLUICE_ASSERT(slot->used < requests_);
    *slot = {frame, requests_};
    ++loads_;
    return slot - slots_.data();
  }
  void load(std::int64_t layer, std::int64_t frame) {
    const std::int64_t at = take_slot(layer, frame);
    const Slot taken = std::exchange(slots_[size(at)], Slot{});  // empty, should reading fail
    fill_slot(layer, frame, at, record_.span());
    slots_[size(at)] = taken;
  }
  void fill_slot(std::int64_t layer, std::int64_t frame, std::int64_t at,
                 std::span<std::byte> record) {
    store_->get(frame * shape_.num_layers + layer, record);
    const auto key_bytes = size(frame_keys_) * sizeof(Key);
    std::memcpy(slot_keys_.data() + at * frame_keys_, record.data(), key_bytes);
    std::memcpy(slot_values_.data() + at * frame_values_, record.data() + key_bytes,
                size(frame_values_) * sizeof(Value));
  }
  /// Claims a posted frame and loads it; whether there was one.
  bool load_posted(std::span<std::byte> record) {
    const std::int64_t number = posted_->claim();
    if (number < 0) return false;
    Request& request = posted_->requests[size(number)];
    try {
      fill_slot(request.layer, request.frame, request.slot, record);
    } catch (...) {  // whatever it is, the step that waits must hear of it
      request.failed = true;
    }
    posted_->taken.fetch_add(1, std::memory_order_relaxed);
    posted_->finish();
    return true;
  }
  /// Tries a posted frame again that could not be read. \throws what FrameStore::get throws; the
  /// frames that are not there are forgotten then.
  void reload(std::uint32_t number) {
    const Request& request = posted_->requests[number];
    if (!request.failed) return;
    try {
      fill_slot(request.layer, request.frame, request.slot, record_.span());
    } catch (...) {
      for (std::uint32_t i = number; i < posted_->count; ++i)
        if (posted_->requests[i].failed) slots_[size(posted_->requests[i].slot)] = {};
      posted_->close();
      throw;
    }
  }
  /// Whether a frame of the layer was posted at this step.
  bool is_posted(std::int64_t layer, std::int64_t frame) const {
    for (std::uint32_t i = 0; i < posted_->count; ++i)
      if (posted_->requests[i].layer == layer && posted_->requests[i].frame == frame) return true;
    return false;
  }

  KvShape shape_;
  RetrievalConfig config_;
  std::int64_t group_;
  std::vector<const Rotary*> rotaries_;
  KvCache<Key, Value> cache_;  // the window, raw keys
  std::int64_t frame_keys_ = 0;
  std::int64_t frame_values_ = 0;
  std::unique_ptr<FrameStore> store_;  // record frame * num_layers + layer
  std::unique_ptr<Posted> posted_;
  bool overlaps_ = false;
  Buffer<std::byte> record_;
  Rows init_;
  Rows question_;
  Buffer<float> means_;  // [frames, layers, kv heads, head_dim]
  Buffer<Key> slot_keys_;
  Buffer<Value> slot_values_;
  Buffer<Slot> slots_;  // [layers, num_slots]
  Buffer<std::int64_t> picked_;
  Buffer<std::int64_t> given_;
  std::int64_t given_count_ = 0;
  std::vector<Picks> picks_;  // [num_layers]
  Buffer<double> query_;      // [kv heads, head_dim]
  Buffer<float> scores_;
  Buffer<float> group_means_;
  Buffer<std::int64_t> order_;
  std::vector<std::shared_ptr<RotaryTable>> tables_;  // ranks 0 .., one a layer
  std::int64_t frames_ = 0;
  std::int64_t asked_ = 0;
  std::int64_t asked_committed_ = 0;
  bool asking_ = false;
  std::int64_t requests_ = 0;
  std::int64_t loads_ = 0;
};

}  // namespace sluice
