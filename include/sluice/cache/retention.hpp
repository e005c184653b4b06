// SPDX-License-Identifier: MIT
/// Which tokens a cache keeps and where: full, sliding window, attention sinks + window
/// (StreamingLLM, arXiv 2309.17453), its batched evictions, and DuoAttention's streaming heads
/// (arXiv 2410.10819). This is bookkeeping alone: it knows slots and positions, no keys. One
/// retention serves every layer and head that shares it.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "sluice/cache/segment.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

inline constexpr std::int64_t kUnlimitedWindow = std::numeric_limits<std::int64_t>::max() / 4;

/// When tokens leave.
enum class Eviction : std::uint8_t {
  /// Token-wise: a query sees the sinks and the last `window_size` keys, its own included, however
  /// the stream was cut into chunks.
  kPerQuery,
  /// At the end of a chunk: its queries see the sinks, the `window_size` tokens before the chunk,
  /// and
  /// the chunk up to themselves. So the result depends on how a stream is cut: DuoAttention's
  /// streaming heads as released, which read a prompt in long chunks without a window inside them.
  kPerChunk,
  /// Only when shrink(), evict_for_space() or evict_range() is called; a chunk sees the whole cache
  /// (StreamingLLM's released loops).
  kOnRequest,
};

/// Run-time parameters of a retention. Use the named constructors.
struct RetentionConfig {
  std::int64_t num_sink_tokens = 0;
  /// Keys that a query sees besides the sinks, its own included (the library's one window
  /// convention). With kOnRequest and kPerChunk: `recent_size` of the originals, non-sink entries
  /// kept, the query not among them.
  std::int64_t window_size = kUnlimitedWindow;
  /// Entries that the storage can hold, sinks included.
  std::int64_t capacity = 0;
  /// The most tokens that may be appended between two commits.
  std::int64_t max_chunk = 1;
  PositionRule position_rule = PositionRule::kInCache;
  KeyForm key_form = KeyForm::kRotated;
  Eviction eviction = Eviction::kPerQuery;
  /// Position of the stream's token 0 (the target offset of group position encoding).
  Position origin = 0;

  /// Everything is kept; at most `capacity` tokens.
  static RetentionConfig full(std::int64_t capacity, std::int64_t max_chunk) {
    return {.capacity = capacity, .max_chunk = max_chunk};
  }
  /// The last `window_size` keys. Storage: window_size + max_chunk - 1 entries.
  static RetentionConfig window(std::int64_t window_size, std::int64_t max_chunk) {
    return sink_window(0, window_size, max_chunk);
  }
  /// Attention sinks and a window. Storage: num_sink_tokens + window_size + max_chunk - 1 entries.
  static RetentionConfig sink_window(std::int64_t num_sink_tokens, std::int64_t window_size,
                                     std::int64_t max_chunk) {
    return {.num_sink_tokens = num_sink_tokens,
            .window_size = window_size,
            .capacity = bounded(num_sink_tokens) + bounded(window_size) + bounded(max_chunk) - 1,
            .max_chunk = max_chunk};
  }
  /// StreamingLLM's evaluation loop (spec of eval_long_ppl.py): attend start + recent cached keys
  /// and the token itself, then shrink. In this library's convention the window is recent + 1.
  static RetentionConfig streaming_llm(std::int64_t start_size, std::int64_t recent_size,
                                       std::int64_t max_chunk = 1) {
    return sink_window(start_size, bounded(recent_size) + 1, max_chunk);
  }
  /// A streaming head of DuoAttention (tuple_kv_cache of the release): sinks and the `recent_size`
  /// newest tokens stay after each chunk, keys at their places in the text. Storage:
  /// num_sink_tokens + recent_size + max_chunk entries.
  static RetentionConfig per_chunk(std::int64_t num_sink_tokens, std::int64_t recent_size,
                                   std::int64_t max_chunk) {
    return {.num_sink_tokens = num_sink_tokens,
            .window_size = recent_size,
            .capacity = bounded(num_sink_tokens) + bounded(recent_size) + bounded(max_chunk),
            .max_chunk = max_chunk,
            .position_rule = PositionRule::kInText,
            .eviction = Eviction::kPerChunk};
  }
  /// StreamingLLM's batched evictions: the caller evicts, `capacity` bounds the rest.
  static RetentionConfig on_request(std::int64_t start_size, std::int64_t recent_size,
                                    std::int64_t capacity) {
    return {.num_sink_tokens = start_size,
            .window_size = recent_size,
            .capacity = capacity,
            .max_chunk = capacity,
            .eviction = Eviction::kOnRequest};
  }

 private:
  /// Sums of these do not overflow; what is out of range stays out of range.
  static constexpr std::int64_t bounded(std::int64_t value) {
    constexpr std::int64_t kLimit = std::int64_t{1} << 60;
    return value < -kLimit ? -kLimit : (value > kLimit ? kLimit : value);
  }
};

/// Where a reader of another group stands, in that group's ranks: at min(p + shift, ceiling), p
/// being the reader's position in its own group. {0, kNoCeiling}: every group counts for itself.
struct ReaderPlace {
  Position shift = 0;
  Position ceiling = kNoCeiling;
};

/// Bookkeeping of one token stream in a fixed number of slots.
///
/// Slots 0 .. num_sink_tokens-1 hold the sinks; every later token goes round a ring of the other
/// slots, so eviction is pointer arithmetic and nothing moves (only evict_range() of a middle part
/// moves rows). Rank r is the place of a kept token in order of age: its in-cache position.
///
/// Transaction: append() makes tokens visible to segments(); commit() makes them final;
/// rollback() forgets what was appended since the last commit, exactly: slots of tokens that a
/// roll-back would need are never given out before commit.
///
/// No function but the constructor, save() and restore() allocates. One thread at a time.
class Retention {
 public:
  /// Sinks, two runs of a wrapped ring, and gaps left by evict_range().
  static constexpr int kMaxRuns = 8;
  /// A run may be cut by the ring's end, one by the sinks' end.
  static constexpr int kMaxSegments = kMaxRuns + 3;

  /// \throws Error(kConfig) naming the field when sinks, window, chunk and capacity do not fit:
  /// sinks >= capacity, window < 1, chunk < 1, a chunk larger than the window, or fewer slots than
  /// sinks + window + chunk - 1 (kPerQuery: the first query of a chunk still needs keys that the
  /// last would overwrite).
  explicit Retention(const RetentionConfig& config) : config_(config) { validate(); }

  const RetentionConfig& config() const { return config_; }
  /// Tokens that were ever appended, uncommitted ones included: the next token's stream index.
  std::int64_t total() const { return total_; }
  std::int64_t committed() const { return committed_; }
  /// Kept tokens: what the next query sees beside itself.
  std::int64_t size() const { return rank_count(); }

  /// Whether `tokens` more can be appended now.
  CacheStatus status(std::int64_t tokens) const {
    if (tokens > config_.max_chunk) return CacheStatus::kFull;
    if (config_.eviction == Eviction::kOnRequest || unlimited())
      return rank_count() + tokens <= config_.capacity ? CacheStatus::kOk : CacheStatus::kFull;
    return total_ - committed_ + tokens <= config_.max_chunk ? CacheStatus::kOk
                                                             : CacheStatus::kFull;
  }

  /// Gives slots to `tokens` new tokens, whose stream indices start at total(). Precondition:
  /// status(tokens) == kOk.
  void append(std::int64_t tokens) {
    SLUICE_ASSERT(status(tokens) == CacheStatus::kOk);
    if (run_count_ == 0) runs_[run_count_++] = {total_, 0};
    runs_[run_count_ - 1].count += tokens;
    total_ += tokens;
    if (total_ > high_water_) high_water_ = total_;
  }

  /// Makes the appended tokens final and lets go of what no later query can see (not kOnRequest).
  void commit() {
    committed_ = total_;
    if (slides()) keep_window();
  }

  /// Forgets the tokens appended since the last commit.
  void rollback() { remove_newest(total_ - committed_); }

  /// How many of the newest tokens, uncommitted ones included, can be taken back exactly: those
  /// after which every key that the next query sees is still in its slot. With kPerChunk nothing
  /// committed comes back once tokens have left: what was kept then depends on how chunks were cut.
  std::int64_t max_truncate() const {
    if (!slides()) return run_count_ == 0 ? 0 : runs_[run_count_ - 1].count;
    if (config_.eviction == Eviction::kPerChunk)
      return committed_ <= config_.num_sink_tokens + config_.window_size ? total_
                                                                         : total_ - committed_;
    const std::int64_t oldest_stored = high_water_ - ring_slots();
    if (oldest_stored <= config_.num_sink_tokens) return total_;
    return total_ - oldest_stored - (config_.window_size - 1);
  }

  /// Takes back the newest `tokens` tokens, committed or not.
  /// \throws Error(kCapacity) if tokens > max_truncate(): nothing changes then.
  void truncate(std::int64_t tokens) {
    if (tokens < 0 || tokens > max_truncate())
      throw Error(ErrorCode::kCapacity,
                  {"cannot take back that many tokens", "Retention::truncate", "tokens",
                   "0 to " + std::to_string(max_truncate()), std::to_string(tokens)});
    remove_newest(tokens);
    if (total_ >= committed_) return;
    committed_ = total_;
    if (slides()) keep_window();
  }

  /// Forgets everything. O(1).
  void reset() {
    run_count_ = 0;
    tail_ = 0;
    total_ = committed_ = high_water_ = 0;
  }

  /// StreamingLLM kv_cache.py, __call__: keeps [0, start) and the last `recent`.
  void shrink() { evict_for_space(0); }

  /// StreamingLLM kv_cache.py, evict_for_space: makes room for `coming` tokens; does nothing when
  /// they fit, else keeps [0, start) and the last recent - coming.
  /// \throws Error(kOrder) unless the configuration says kOnRequest, or with uncommitted tokens.
  void evict_for_space(std::int64_t coming) {
    require_on_request("Retention::evict_for_space");
    const std::int64_t start = config_.num_sink_tokens;
    const std::int64_t recent = config_.window_size;
    const std::int64_t count = rank_count();
    if (count + coming <= start + recent) return;
    std::int64_t first_kept = count - recent + coming;
    if (first_kept > count) first_kept = count;
    if (first_kept > start) evict_ranks(start, first_kept, [](std::int64_t, std::int64_t) {});
  }

  /// StreamingLLM kv_cache.py, evict_range: removes the kept tokens with ranks [begin, end). Rows
  /// behind the gap move down (or rows before it up, whichever is fewer): `move(from, to)` is
  /// called for each, in an order in which no row is overwritten before it has moved. Deviation: a
  /// range that touches the sinks is refused, so that no call drops them by accident. \throws
  /// Error(kOrder) as evict_for_space; Error(kShape) for a range outside [sinks, size()];
  /// Error(kCapacity) when more than kMaxRuns runs would result. Nothing changes then.
  template <class Move>
  void evict_range(std::int64_t begin, std::int64_t end, Move&& move) {
    check_evict_range(begin, end);
    if (begin != end) evict_ranks(begin, end, move);
  }

  /// Throws what evict_for_space() and shrink() would, and changes nothing.
  void check_evict() const { require_on_request("Retention::evict_for_space"); }
  /// Throws what evict_range() would, and changes nothing.
  void check_evict_range(std::int64_t begin, std::int64_t end) const {
    require_on_request("Retention::evict_range");
    const std::int64_t low = config_.num_sink_tokens;
    if (begin > end || begin < low || end > rank_count())
      throw Error(ErrorCode::kShape,
                  {"range outside the evictable ranks", "Retention::evict_range", "[begin, end)",
                   "within [" + std::to_string(low) + ", " + std::to_string(rank_count()) + "]",
                   "[" + std::to_string(begin) + ", " + std::to_string(end) + ")"});
    if (begin == end) return;
    std::array<Run, kMaxRuns + 2> kept;
    const int runs = surviving_runs(begin, end, kept);
    // One more than kMaxRuns is left to evict_for_space(), which may cut the sinks' run.
    if (runs > run_count_ && runs > kMaxRuns)
      throw Error(ErrorCode::kCapacity,
                  {"too many gaps between kept tokens", "Retention::evict_range", "runs",
                   "at most " + std::to_string(kMaxRuns), std::to_string(runs)});
  }

  /// Where the token with rank `rank` is stored.
  std::int64_t slot_of_rank(std::int64_t rank) const {
    const std::int64_t sinks = config_.num_sink_tokens;
    return rank < sinks ? rank : sinks + (tail_ + rank - sinks) % ring_slots();
  }
  /// Where the newest tokens are stored: token total() - back.
  std::int64_t slot_of_newest(std::int64_t back) const { return slot_of_rank(rank_count() - back); }

  /// Stream index of the kept token with rank `rank`: the trace of what a cache holds.
  std::int64_t index_of_rank(std::int64_t rank) const {
    int run = 0;
    while (rank >= runs_[run].count) rank -= runs_[run++].count;
    return runs_[run].first_index + rank;
  }

  /// With kPerQuery: how many slots have rows that belong to the state. They are the first ones.
  std::int64_t stored_slots() const {
    const std::int64_t written = unlimited() ? total_ : high_water_;
    return written < config_.capacity ? written : config_.capacity;
  }
  /// Whether a token's row stays where it is until it is taken back.
  bool only_appends() const { return config_.eviction == Eviction::kPerQuery && unlimited(); }
  /// Calls visit(slot) for every slot whose row belongs to the state: kept tokens, and with
  /// kPerQuery older ones that a truncation may bring back. Fixed order.
  template <class Visit>
  void each_stored_slot(Visit&& visit) const {
    if (config_.eviction == Eviction::kPerQuery && !unlimited()) {
      for (std::int64_t slot = 0; slot < stored_slots(); ++slot) visit(slot);
      return;
    }
    const std::int64_t count = rank_count();
    for (std::int64_t rank = 0; rank < count; ++rank) visit(slot_of_rank(rank));
  }

  /// Position that token `index` is written with (KeyForm::kRotated).
  Position write_position(std::int64_t index) const {
    return config_.origin + static_cast<Position>(index);
  }

  /// The runs that queries with stream indices total() - queries .. total() - 1 see; returns how
  /// many of `rules` were written. Per-query limits inside them (causality, the window) are
  /// CausalWindow's, which takes window() and num_sink_tokens from here. Unless eviction is on
  /// request the queries must not be committed yet: commit() lets go of what only they see.
  /// 0 queries: what is kept.
  int rules(std::int64_t queries, std::span<SegmentRule, kMaxSegments> rules) const {
    SLUICE_ASSERT(queries <= total_);
    const std::int64_t sinks = config_.num_sink_tokens;
    SLUICE_ASSERT(!slides() || queries <= total_ - committed_);
    // The oldest key that the first query still sees.
    const std::int64_t first =
        config_.eviction == Eviction::kPerChunk ? committed_ : total_ - queries;
    const std::int64_t oldest = slides() ? first - kept_tokens() : 0;
    const std::int64_t removed_total = evicted();
    int written = 0;
    std::int64_t rank = 0;
    for (int r = 0; r < run_count_; ++r) {
      std::int64_t index = runs_[r].first_index;
      std::int64_t left = runs_[r].count;
      const std::int64_t removed_before = index - rank;
      while (left > 0) {
        // Cut at the sinks' end, at the oldest visible key and at the ring's end.
        std::int64_t count = left;
        const std::int64_t slot = slot_of_rank(rank);
        const bool sink = rank < sinks;
        if (sink && rank + count > sinks) count = sinks - rank;
        if (!sink && slot + count > config_.capacity) count = config_.capacity - slot;
        const bool hidden = !sink && index < oldest;
        if (hidden && index + count > oldest) count = oldest - index;
        if (!hidden) {
          SegmentRule& rule = rules[written++];
          rule = {.first_index = index, .count = count, .visible = count, .first_slot = slot};
          if (sink) rule.kind = TokenKind::kPinned;
          place(rule, sink, rank, removed_before, removed_total, oldest);
        }
        rank += count;
        index += count;
        left -= count;
      }
    }
    return written;
  }

  /// The runs that a reader of another group sees of the first `snapshot` tokens; returns how many
  /// of `rules` were written. What token snapshot - 1 saw: the sinks and the last window_size
  /// tokens, its own included, at the ranks that they had then (kInCache) or at their places in the
  /// text.
  ///
  /// The answer follows from the configuration and the snapshot alone, so a reader may ask while
  /// another thread appends: nothing that append() or commit() changes is read. Rows of a snapshot
  /// stay in their slots while total() <= snapshot + max_lead().
  /// Precondition: supports_snapshots(), 0 <= snapshot.
  int snapshot_rules(std::int64_t snapshot, const ReaderPlace& place,
                     std::span<SegmentRule, kMaxSegments> rules) const {
    SLUICE_ASSERT(supports_snapshots() && snapshot >= 0);
    const std::int64_t sinks = config_.num_sink_tokens;
    const bool in_cache = config_.position_rule == PositionRule::kInCache;
    const bool raw = config_.key_form == KeyForm::kRaw;
    const std::int64_t pinned = snapshot < sinks ? snapshot : sinks;
    const std::int64_t windowed = unlimited() ? 0 : snapshot - config_.window_size;
    const std::int64_t oldest = windowed > sinks ? windowed : sinks;
    const auto gone = static_cast<Position>(oldest - sinks);  // evicted before the snapshot
    int written = 0;
    const auto add = [&](std::int64_t index, std::int64_t count, std::int64_t slot, bool sink) {
      SegmentRule& rule = rules[static_cast<std::size_t>(written++)];
      rule = {.first_index = index, .count = count, .visible = count, .first_slot = slot};
      if (sink) rule.kind = TokenKind::kPinned;
      // From the reader's rank to the run's own numbering: raw keys are numbered by rank from 0,
      // rotated ones by the text.
      Position shift = 0;
      if (raw) {
        rule.first_position = static_cast<Position>(index) - (sink ? 0 : gone);
        shift = -config_.origin - (sink || in_cache ? 0 : gone);
      } else {
        rule.first_position = write_position(index);
        shift = !sink && in_cache ? gone : 0;
      }
      rule.shift = place.shift + shift;
      rule.ceiling = place.ceiling + shift;
    };
    if (pinned > 0) add(0, pinned, 0, true);
    for (std::int64_t index = oldest; index < snapshot;) {
      const std::int64_t slot = sinks + (index - sinks) % ring_slots();
      const std::int64_t to_ring_end = config_.capacity - slot;
      const std::int64_t left = snapshot - index;
      const std::int64_t count = left < to_ring_end ? left : to_ring_end;
      add(index, count, slot, false);
      index += count;
    }
    return written;
  }

  /// Whether snapshot_rules() may be asked: eviction on request depends on what was requested, per
  /// chunk on how the stream was cut.
  bool supports_snapshots() const { return config_.eviction == Eviction::kPerQuery; }
  /// Tokens that may follow a snapshot before one of its rows is overwritten. Constant.
  std::int64_t max_lead() const {
    return unlimited() ? config_.capacity : ring_slots() - config_.window_size;
  }
  /// Positions that `snapshot` tokens take up: the ranks of those that a reader sees, or in the
  /// text (kInText) all of them, gaps included.
  std::int64_t ranks(std::int64_t snapshot) const {
    const bool in_text = config_.position_rule == PositionRule::kInText;
    const std::int64_t most = config_.num_sink_tokens + config_.window_size;
    return in_text || unlimited() || snapshot < most ? snapshot : most;
  }
  /// Where queries of this stream stand as readers of other groups: their own rank (kInCache),
  /// which stops growing when the window is full, or their place in the text.
  ReaderPlace reader_place() const {
    if (config_.position_rule == PositionRule::kInText || unlimited() || !supports_snapshots())
      return {};
    return {0, config_.origin +
                   static_cast<Position>(config_.num_sink_tokens + config_.window_size - 1)};
  }

  /// The window for visibility functors: unlimited for full caches and for kOnRequest.
  std::int64_t window() const {
    return config_.eviction == Eviction::kPerQuery ? config_.window_size : kUnlimitedWindow;
  }

  /// Appends the state and the configuration that restore() compares.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    if (total_ != committed_)
      throw Error(ErrorCode::kOrder, {"uncommitted tokens", "Retention::save", "appended tokens",
                                      "0", std::to_string(total_ - committed_)});
    for (const std::int64_t value :
         {config_.num_sink_tokens, config_.window_size, config_.capacity, config_.max_chunk,
          static_cast<std::int64_t>(config_.position_rule),
          static_cast<std::int64_t>(config_.key_form), static_cast<std::int64_t>(config_.eviction)})
      writer.write<std::int64_t>(value);
    writer.write<double>(config_.origin);
    writer.write<std::int64_t>(total_);
    writer.write<std::int64_t>(committed_);
    writer.write<std::int64_t>(high_water_);
    writer.write<std::int64_t>(tail_);
    writer.write<std::int64_t>(run_count_);
    for (int r = 0; r < run_count_; ++r) {
      writer.write<std::int64_t>(runs_[r].first_index);
      writer.write<std::int64_t>(runs_[r].count);
    }
  }

  /// Takes over a saved state.
  /// \throws Error(kFormat) when it was saved under another configuration or breaks an invariant.
  void restore(ByteReader& reader) {
    const auto expect = [&](const char* field, std::int64_t expected) {
      reader.read_expected<std::int64_t>(field, expected);
    };
    expect("num_sink_tokens", config_.num_sink_tokens);
    expect("window_size", config_.window_size);
    expect("capacity", config_.capacity);
    expect("max_chunk", config_.max_chunk);
    expect("position_rule", static_cast<std::int64_t>(config_.position_rule));
    expect("key_form", static_cast<std::int64_t>(config_.key_form));
    expect("eviction", static_cast<std::int64_t>(config_.eviction));
    const auto origin = reader.read<double>("origin");
    Retention loaded(config_);
    loaded.total_ = reader.read<std::int64_t>("total");
    loaded.committed_ = reader.read<std::int64_t>("committed");
    loaded.high_water_ = reader.read<std::int64_t>("high_water");
    loaded.tail_ = reader.read<std::int64_t>("tail");
    const auto runs = reader.read<std::int64_t>("runs");
    const auto require = [&](bool good, const char* field) {
      if (!good)
        throw Error(ErrorCode::kFormat,
                    {"inconsistent snapshot", reader.source(), field, "a consistent value", ""});
    };
    require(origin == config_.origin, "origin");
    require(loaded.total_ >= 0 && loaded.total_ <= kMaxTotal, "total");
    require(loaded.committed_ == loaded.total_, "committed");
    require(loaded.high_water_ >= loaded.total_ &&
                loaded.high_water_ - loaded.total_ <= config_.capacity,
            "high_water");
    require(runs >= 0 && runs <= kMaxRuns + 1, "runs");
    loaded.run_count_ = static_cast<int>(runs);
    std::int64_t next = 0;
    std::int64_t count = 0;
    for (int r = 0; r < loaded.run_count_; ++r) {
      Run& run = loaded.runs_[r];
      run.first_index = reader.read<std::int64_t>("run.first_index");
      run.count = reader.read<std::int64_t>("run.count");
      require(run.first_index >= next && run.count >= 0 && run.count <= config_.capacity - count &&
                  run.first_index <= loaded.total_,
              "run");
      next = run.first_index + run.count;
      count += run.count;
    }
    require(next == loaded.total_, "total");
    if (config_.eviction != Eviction::kOnRequest) {
      // The runs follow from the total: anything else is damage.
      Retention derived = loaded;
      if (unlimited()) {
        derived.runs_[0] = {0, derived.total_};
        derived.run_count_ = 1;
        derived.tail_ = 0;
      } else {
        derived.keep_window();
      }
      if (loaded.total_ == 0) derived.run_count_ = 0;
      require(derived.run_count_ == loaded.run_count_ || loaded.total_ == 0, "runs");
      require(derived.tail_ == loaded.tail_, "tail");
      for (int r = 0; r < derived.run_count_; ++r)
        require(derived.runs_[r].first_index == loaded.runs_[r].first_index &&
                    derived.runs_[r].count == loaded.runs_[r].count,
                "run");
      require(loaded.max_truncate() >= 0, "high_water");
    } else if (loaded.run_count_ > 1 && config_.num_sink_tokens > 0) {
      // Something was evicted, so the first run holds the sinks, which never leave.
      const Run& first = loaded.runs_[0];
      require(first.first_index == 0 && first.count >= config_.num_sink_tokens, "run");
    }
    // Only evict_for_space() makes one run more, by cutting the first behind the sinks.
    require(loaded.run_count_ <= kMaxRuns || loaded.runs_[0].count <= config_.num_sink_tokens,
            "runs");
    require(loaded.tail_ >= 0 && loaded.tail_ < ring_slots(), "tail");
    *this = loaded;
  }

 private:
  /// Tokens of a stream: a Position counts exactly up to here.
  static constexpr std::int64_t kMaxTotal = std::int64_t{1} << 53;

  /// A run of consecutive stream indices that are kept.
  struct Run {
    std::int64_t first_index = 0;
    std::int64_t count = 0;
  };

  bool unlimited() const { return config_.window_size >= kUnlimitedWindow; }
  /// Whether commit() lets tokens go.
  bool slides() const { return config_.eviction != Eviction::kOnRequest && !unlimited(); }
  /// Non-sink tokens that stay at a commit.
  std::int64_t kept_tokens() const {
    return config_.window_size - (config_.eviction == Eviction::kPerQuery ? 1 : 0);
  }
  std::int64_t ring_slots() const { return config_.capacity - config_.num_sink_tokens; }
  std::int64_t rank_count() const {
    std::int64_t count = 0;
    for (int r = 0; r < run_count_; ++r) count += runs_[r].count;
    return count;
  }
  std::int64_t evicted() const { return total_ - rank_count(); }

  void place(SegmentRule& rule, bool sink, std::int64_t rank, std::int64_t removed_before,
             std::int64_t removed_total, std::int64_t oldest) const {
    const std::int64_t sinks = config_.num_sink_tokens;
    const bool in_cache = config_.position_rule == PositionRule::kInCache;
    const bool raw = config_.key_form == KeyForm::kRaw;
    if (config_.eviction == Eviction::kOnRequest) {
      // The reader's in-cache position is its index less everything evicted; a key's is its rank.
      const auto total = static_cast<Position>(removed_total);
      if (raw) {
        // Keys count by rank in both rules, so that their rotations come from a small table.
        rule.first_position = static_cast<Position>(rank);
        rule.shift = (in_cache ? -total : -static_cast<Position>(removed_before)) - config_.origin;
      } else {
        rule.first_position = write_position(rule.first_index);
        rule.shift = in_cache ? static_cast<Position>(removed_before) - total : 0;
      }
      return;
    }
    if (sink) {
      // Once the window is full, every query stands right behind sinks + window in the cache.
      rule.first_position =
          raw ? static_cast<Position>(rule.first_index) : write_position(rule.first_index);
      rule.shift = raw ? -config_.origin : 0;
      if (in_cache && !unlimited())
        rule.ceiling =
            (raw ? 0 : config_.origin) + static_cast<Position>(sinks + config_.window_size - 1);
      return;
    }
    if (raw) {
      // Renumber from the oldest visible key, so that positions stay small for ever.
      const std::int64_t base = oldest > sinks ? oldest : sinks;
      rule.first_position = static_cast<Position>(sinks + rule.first_index - base);
      rule.shift = static_cast<Position>(sinks - base) - config_.origin;
    } else {
      rule.first_position = write_position(rule.first_index);
    }
  }

  void require_on_request(const char* where) const {
    if (config_.eviction != Eviction::kOnRequest)
      throw Error(ErrorCode::kOrder,
                  {"this cache evicts by itself", where, "eviction", "on request", "per query"});
    if (total_ != committed_)
      throw Error(ErrorCode::kOrder, {"uncommitted tokens", where, "appended tokens", "0",
                                      std::to_string(total_ - committed_)});
  }

  /// Removes ranks [begin, end), begin >= sinks.
  template <class Move>
  void evict_ranks(std::int64_t begin, std::int64_t end, Move&& move) {
    const std::int64_t sinks = config_.num_sink_tokens;
    const std::int64_t count = rank_count();
    const std::int64_t gap = end - begin;
    const std::int64_t before = begin - sinks;
    const std::int64_t after = count - end;
    if (before <= after) {  // rows before the gap move up, the ring's tail follows
      for (std::int64_t rank = begin - 1; rank >= sinks; --rank)
        move(slot_of_rank(rank), slot_of_rank(rank + gap));
      tail_ = (tail_ + gap) % ring_slots();
    } else {
      for (std::int64_t rank = end; rank < count; ++rank)
        move(slot_of_rank(rank), slot_of_rank(rank - gap));
    }
    erase_from_runs(begin, end);
  }

  /// The runs that are left without ranks [begin, end); returns how many.
  int surviving_runs(std::int64_t begin, std::int64_t end,
                     std::array<Run, kMaxRuns + 2>& kept) const {
    int kept_count = 0;
    std::int64_t rank = 0;
    for (int r = 0; r < run_count_; ++r) {
      const Run& run = runs_[r];
      const std::int64_t low = clamp(begin - rank, 0, run.count);
      const std::int64_t high = clamp(end - rank, 0, run.count);
      if (low > 0) kept[kept_count++] = {run.first_index, low};
      if (run.count > high) kept[kept_count++] = {run.first_index + high, run.count - high};
      rank += run.count;
    }
    // The last run always ends at total(), even when it is empty: appending continues there.
    if (kept_count == 0 || kept[kept_count - 1].first_index + kept[kept_count - 1].count != total_)
      kept[kept_count++] = {total_, 0};
    return kept_count;
  }

  void erase_from_runs(std::int64_t begin, std::int64_t end) {
    std::array<Run, kMaxRuns + 2> kept;
    run_count_ = surviving_runs(begin, end, kept);
    SLUICE_ASSERT(run_count_ <= kMaxRuns + 1);
    for (int r = 0; r < run_count_; ++r) runs_[r] = kept[r];
  }

  static std::int64_t clamp(std::int64_t value, std::int64_t low, std::int64_t high) {
    return value < low ? low : (value > high ? high : value);
  }

  /// The runs that the next query sees beside itself. Token i >= sinks always lives at ring place
  /// (i - sinks) mod ring_slots(), so older tokens come back by themselves after a truncation.
  void keep_window() {
    const std::int64_t sinks = config_.num_sink_tokens;
    const std::int64_t oldest = total_ - kept_tokens();
    if (oldest <= sinks) {
      runs_[0] = {0, total_};
      run_count_ = 1;
      tail_ = 0;
      return;
    }
    run_count_ = 0;
    if (sinks > 0) runs_[run_count_++] = {0, sinks};
    runs_[run_count_++] = {oldest, total_ - oldest};
    tail_ = (oldest - sinks) % ring_slots();
  }

  void remove_newest(std::int64_t tokens) {
    if (run_count_ == 0) return;
    runs_[run_count_ - 1].count -= tokens;
    total_ -= tokens;
  }

  void validate() const {
    const auto fail = [](const char* field, const std::string& expected, std::int64_t found) {
      throw Error(ErrorCode::kConfig, {"cache configuration does not fit", "RetentionConfig", field,
                                       expected, std::to_string(found)});
    };
    const RetentionConfig& c = config_;
    if (c.capacity < 1 || c.capacity > (std::int64_t{1} << 40))
      fail("capacity", "1 to 2^40", c.capacity);
    if (c.num_sink_tokens < 0 || c.num_sink_tokens >= c.capacity)
      fail("num_sink_tokens", "0 to capacity - 1 = " + std::to_string(c.capacity - 1),
           c.num_sink_tokens);
    if (c.eviction != Eviction::kOnRequest && c.window_size < 1)
      fail("window_size", "at least 1", c.window_size);
    if (c.max_chunk < 1) fail("max_chunk", "at least 1", c.max_chunk);
    if (!std::isfinite(c.origin))
      throw Error(ErrorCode::kConfig, {"cache configuration does not fit", "RetentionConfig",
                                       "origin", "a finite position", std::to_string(c.origin)});
    if (c.eviction == Eviction::kOnRequest) {
      if (c.window_size < 0) fail("window_size", "at least 0", c.window_size);
      if (c.window_size > c.capacity - c.num_sink_tokens)
        fail("capacity",
             "at least sinks + recent = " + std::to_string(c.num_sink_tokens) + " + " +
                 std::to_string(c.window_size),
             c.capacity);
      return;
    }
    if (c.eviction == Eviction::kPerQuery && c.max_chunk > c.window_size)
      fail("max_chunk", "at most the window, " + std::to_string(c.window_size), c.max_chunk);
    if (c.window_size >= kUnlimitedWindow) return;
    if (c.eviction == Eviction::kPerChunk) {
      if (c.position_rule != PositionRule::kInText)
        throw Error(ErrorCode::kConfig,
                    {"cache configuration does not fit", "RetentionConfig", "position_rule",
                     "in text: ranks would depend on how chunks were cut", "in cache"});
      const std::int64_t most = c.num_sink_tokens + c.window_size + c.max_chunk;
      if (c.capacity < most)
        fail("capacity", "at least sinks + recent + chunk = " + std::to_string(most), c.capacity);
      return;
    }
    const std::int64_t needed = c.num_sink_tokens + c.window_size + c.max_chunk - 1;
    if (c.capacity < needed)
      fail("capacity", "at least sinks + window + chunk - 1 = " + std::to_string(needed),
           c.capacity);
  }

  RetentionConfig config_;
  std::array<Run, kMaxRuns + 1> runs_{};  // sorted, disjoint; the last one ends at total_
  int run_count_ = 0;
  std::int64_t tail_ = 0;        // ring place of the oldest non-sink token
  std::int64_t total_ = 0;       // tokens appended
  std::int64_t committed_ = 0;   // of these, final
  std::int64_t high_water_ = 0;  // most tokens ever appended: older slots were overwritten
};

}  // namespace sluice
