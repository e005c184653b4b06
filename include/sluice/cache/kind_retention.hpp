// SPDX-License-Identifier: MIT
/// Which tokens of a video conversation stay, by kind: text sinks, a text window, and the last
/// rounds with their frames (StreamingVLM, arXiv 2510.09608, section 3; core-algorithms 7). This is
/// bookkeeping alone: slots and positions, no keys. CPU caches and GPU kernels share it.
///
/// The stream is a block of earlier text (head | text | tail) and rounds behind it, one for each
/// piece of video: turn text, frames, the reply. What a reader sees is always
///
///   head | first text_sinks texts | last text_window texts | tail | the rounds that are kept
///
/// at contiguous positions on three axes. Nothing is rotated again for that: what is kept between
/// two gaps has one shift (cache/segment.hpp). When a round's text has had its time, the reply is
/// moved to the end of the block's text: each of its keys is rotated to its new place once, from
/// float32, and its values are copied; the rest of the round leaves by pointer arithmetic.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/cache/segment_rule.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/vision_positions.hpp"

namespace sluice {

/// What a run of tokens is in a conversation about a video: it decides how long it stays.
enum class SpanRole : std::uint8_t {
  kHead,      ///< structure before the block's text: stays for ever
  kPrevious,  ///< the block's text: sinks stay, then a window
  kTail,      ///< structure behind the block's text: stays, always right behind the newest text
  kTurn,      ///< text of a round that leaves with it: time stamps, markers, a question
  kVision,    ///< a round's frames: the last vision_rounds rounds
  kReply,     ///< what was said in a round: the last text_rounds rounds, then part of the block
};

constexpr std::string_view to_string(SpanRole role) {
  switch (role) {
    case SpanRole::kHead: return "head";
    case SpanRole::kPrevious: return "previous text";
    case SpanRole::kTail: return "tail";
    case SpanRole::kTurn: return "turn";
    case SpanRole::kVision: return "vision";
    case SpanRole::kReply: return "reply";
  }
  return "unknown";
}

/// How much of each kind stays. The defaults are StreamingVLM's, for rounds of one second.
struct KindRetentionConfig {
  std::int64_t text_sinks = 512;    ///< first texts of the block, tokens
  std::int64_t text_window = 512;   ///< last texts of the block, tokens
  std::int64_t text_rounds = 16;    ///< rounds whose turn text and reply stay, the newest included
  std::int64_t vision_rounds = 16;  ///< rounds whose frames stay, the newest included
  std::int64_t max_head = 8;        ///< tokens of the head, at most
  std::int64_t max_tail = 4;        ///< tokens of the tail, at most
  std::int64_t max_turn = 32;       ///< turn text of a round, tokens, at most
  std::int64_t max_reply = 20;      ///< a round's reply, tokens, at most
  std::int64_t max_vision = 0;      ///< a round's frames, tokens, at most
  std::int64_t max_spans = 8;       ///< begin_span() calls of a round, at most
  std::int64_t max_chunk = 1;       ///< tokens between two commits, at most

  /// Slots that hold all of it.
  std::int64_t capacity() const {
    return max_head + text_sinks + max_tail + text_window + text_rounds * (max_turn + max_reply) +
           vision_rounds * max_vision;
  }
};

/// A token that moves into the block: from a slot to another, its key rotated to `position`.
struct KindMove {
  std::int64_t from_slot = 0;
  std::int64_t to_slot = 0;
  std::int64_t reply_slot = 0;  ///< its place among the replies, [0, text_rounds * max_reply)
  Position position = 0;        ///< on all three axes
};

/// The bookkeeping.
///
/// Protocol: begin_span(kHead), append, ...; kPrevious; kTail; then for each round begin_round(),
/// begin_span(kTurn | kVision | kReply, ...), append()s, commit()s. A chunk (what is appended
/// between two commits) lies in one span. Only construction, save(), restore() and errors allocate;
/// assigning one made with the same configuration does not. One thread at a time. Positions are
/// rotary: functors that need the index of an old token get one that is below every newer token's,
/// not its own.
class KindRetention {
 public:
  /// Runs with distinct places or slots that one reader can see.
  static constexpr int kMaxSegments = 256;

  /// \throws Error(kConfig) naming the field that makes no sense.
  explicit KindRetention(const KindRetentionConfig& config) : config_(config) {
    validate();
    sinks_base_ = config.max_head;
    tail_base_ = sinks_base_ + config.text_sinks;
    window_base_ = tail_base_ + config.max_tail;
    turns_ = {window_base_ + config.text_window,
              config.text_rounds * (config.max_turn + config.max_reply)};
    frames_ = {turns_.base + turns_.capacity, config.vision_rounds * config.max_vision};
    rounds_kept_ = std::max(config.text_rounds, config.vision_rounds);
    spans_.resize(static_cast<std::size_t>(rounds_kept_ * config.max_spans));
    rounds_.resize(static_cast<std::size_t>(rounds_kept_));
  }

  const KindRetentionConfig& config() const { return config_; }
  /// Index of the next token.
  std::int64_t total() const { return total_; }
  std::int64_t committed() const { return committed_; }
  /// Rounds that were ever begun.
  std::int64_t rounds() const { return round_count_; }
  /// Tokens that a reader sees, of a kind: kPinned is head, sinks and tail; kText the text window
  /// and the rounds' text; kVision the frames.
  std::int64_t kept(TokenKind kind) const {
    switch (kind) {
      case TokenKind::kPinned: return head_ + kept_sinks() + tail_;
      case TokenKind::kText: return kept_texts() - kept_sinks() + turns_.used;
      case TokenKind::kVision: return frames_.used;
      case TokenKind::kAudio: return 0;
    }
    return 0;
  }
  std::int64_t size() const {
    return kept(TokenKind::kPinned) + kept(TokenKind::kText) + kept(TokenKind::kVision);
  }
  /// Slots that are set aside for a kind.
  std::int64_t slots(TokenKind kind) const {
    switch (kind) {
      case TokenKind::kPinned: return config_.max_head + config_.text_sinks + config_.max_tail;
      case TokenKind::kText: return config_.text_window + turns_.capacity;
      case TokenKind::kVision: return frames_.capacity;
      case TokenKind::kAudio: return 0;
    }
    return 0;
  }

  /// Where the next token is written, on all axes: its own numbering, which only grows.
  Position next_position() const { return next_; }
  /// The same among what is kept, counted from 0: the rank that a reader has.
  Position rank_of(Position position) const { return position + base(); }

  /// Begins a round: what has had its time leaves, replies move into the block.
  /// `move(const KindMove&)` is called for each token of a reply that leaves its round, oldest
  /// first; a slot is never read after it was written. \throws Error(kOrder) with uncommitted
  /// tokens; nothing changes then.
  template <class Move>
  void begin_round(Move&& move) {
    require_committed("KindRetention::begin_round");
    span_open_ = false;
    open_tokens_ = 0;
    const std::int64_t text_out = round_count_ - config_.text_rounds;
    const std::int64_t vision_out = round_count_ - config_.vision_rounds;
    if (vision_out >= 0)
      each_span(vision_out, [&](Span& span) {
        if (span.role == SpanRole::kVision) drop(span, frames_);
      });
    if (text_out >= 0)
      each_span(text_out, [&](Span& span) {
        if (span.role == SpanRole::kVision) return;
        if (span.role == SpanRole::kReply) move_reply(span, move);
        drop(span, turns_);
      });
    const std::int64_t gone = round_count_ - rounds_kept_;
    if (gone >= 0) {
      first_span_ += round(gone).spans;
      first_round_ = gone + 1;
    }
    round(round_count_) = {first_span_ + live_spans(), 0, 0, 0, 0};
    ++round_count_;
  }
  void begin_round() {
    begin_round([](const KindMove&) {});
  }

  /// What is appended next. grid: the frames of a kVision span, whose extent on the axes is
  /// counted at once; not looked at for text, which counts one position a token. A span of any
  /// number of tokens may be begun; an empty one takes no room on the axes.
  /// \throws Error(kOrder) with uncommitted tokens, for a role out of its place or more than
  /// max_spans in a round; nothing changes then.
  void begin_span(SpanRole role, const VisionGrid& grid = {}) {
    constexpr const char* kWhere = "KindRetention::begin_span";
    require_committed(kWhere);
    const bool in_round =
        role == SpanRole::kTurn || role == SpanRole::kVision || role == SpanRole::kReply;
    const auto refuse = [&](const std::string& expected) {
      throw Error(ErrorCode::kOrder, {"span out of its place", kWhere, "role", expected,
                                      std::string(to_string(role))});
    };
    if (in_round && round_count_ == 0) refuse("a round first");
    if (!in_round && round_count_ > 0) refuse("part of a round");
    if (!in_round && static_cast<int>(role) < static_cast<int>(block_role_))
      refuse("head, previous text, tail in this order");
    if (!in_round) {
      block_role_ = role;
      if (role == SpanRole::kTail && tail_ == 0) tail_number_ = next_;
    } else {
      Round& newest = round(round_count_ - 1);
      if (newest.spans == config_.max_spans)
        refuse("at most " + std::to_string(config_.max_spans) + " spans in a round");
      Span& span = span_at(newest.first + newest.spans++);
      span = {.role = role, .position = next_, .behind = 0};
      span.extent = role == SpanRole::kVision ? grid.extent() : 0;
      if (role == SpanRole::kVision) next_ += span.extent;
    }
    role_ = role;
    span_open_ = true;
    open_tokens_ = 0;
  }

  /// Whether `tokens` more fit in the span that is open.
  CacheStatus status(std::int64_t tokens) const {
    const bool fits =
        span_open_ && total_ - committed_ + tokens <= config_.max_chunk && tokens <= room();
    return fits ? CacheStatus::kOk : CacheStatus::kFull;
  }
  /// Gives slots to new tokens. Precondition: status(tokens) == kOk.
  void append(std::int64_t tokens) { change(tokens); }
  void commit() { committed_ = total_; }
  void rollback() { change(committed_ - total_); }

  /// How many of the newest tokens, committed or not, truncate() takes back: those of the span that
  /// is open. Beyond it nothing can be undone by counters alone: spans and rounds that began moved
  /// positions, and rounds that left took their rows along.
  std::int64_t max_truncate() const { return span_open_ ? open_tokens_ : 0; }
  /// Takes back the newest `tokens` tokens; the span stays open.
  /// \throws Error(kCapacity) if tokens > max_truncate(): nothing changes then.
  void truncate(std::int64_t tokens) {
    if (tokens < 0 || tokens > max_truncate())
      throw Error(ErrorCode::kCapacity,
                  {"cannot take back that many tokens", "KindRetention::truncate", "tokens",
                   "0 to " + std::to_string(max_truncate()), std::to_string(tokens)});
    change(-tokens);
    committed_ = std::min(committed_, total_);
  }

  /// Forgets everything. O(1).
  void reset() {
    head_ = tail_ = texts_ = total_ = committed_ = round_count_ = 0;
    written_texts_ = block_tokens_ = open_tokens_ = 0;
    first_span_ = first_round_ = replies_ = 0;
    next_ = removed_ = tail_number_ = 0;
    turns_.first = turns_.used = frames_.first = frames_.used = 0;
    role_ = block_role_ = SpanRole::kHead;
    span_open_ = false;
  }

  /// Where the newest tokens are stored: token total() - back, of the open span.
  std::int64_t slot_of_newest(std::int64_t back) const {
    switch (role_) {
      case SpanRole::kHead: return head_ - back;
      case SpanRole::kPrevious: return slot_of_text(texts_ - back);
      case SpanRole::kTail: return tail_base_ + tail_ - back;
      case SpanRole::kTurn:
      case SpanRole::kReply: return turns_.slot(turns_.used - back);
      case SpanRole::kVision: return frames_.slot(frames_.used - back);
    }
    return 0;
  }
  /// The place among the replies of token total() - back, whose key is kept in float32 until it
  /// moves; -1 if the open span is no reply.
  std::int64_t reply_slot_of_newest(std::int64_t back) const {
    return role_ == SpanRole::kReply && span_open_ ? (replies_ - back) % reply_slots() : -1;
  }
  std::int64_t reply_slots() const { return config_.text_rounds * config_.max_reply; }
  SpanRole role() const { return role_; }

  /// Calls visit(slot) for each token that is kept, in reading order.
  template <class Visit>
  void each_stored_slot(Visit&& visit) const {
    std::array<SegmentRule, kMaxSegments> runs;
    const int count = rules(runs);
    for (int r = 0; r < count; ++r) {
      const SegmentRule& run = runs[static_cast<std::size_t>(r)];
      for (std::int64_t i = 0; i < run.count; ++i) visit(run.first_slot + i);
    }
  }
  /// Calls visit(place) for each place among the replies whose key may still move, oldest first.
  template <class Visit>
  void each_reply_slot(Visit&& visit) const {
    for (std::int64_t i = replies_ - live_replies(); i < replies_; ++i) visit(i % reply_slots());
  }

  /// The runs that are kept, uncommitted tokens included (causality among those is the reader's);
  /// returns how many of `rules` ([kMaxSegments]) were written. A reader at position p, in the
  /// numbering of next_position(), stands at p + shift in a run's.
  int rules(std::span<SegmentRule> rules) const {
    int written = 0;
    // Runs that continue each other in memory at one shift are one.
    const auto add = [&](std::int64_t slot, std::int64_t count, std::int64_t last_index,
                         Position first, Position shift, TokenKind kind) {
      if (count == 0) return;
      if (written > 0) {
        SegmentRule& before = rules[static_cast<std::size_t>(written - 1)];
        if (before.kind == kind && before.shift == shift &&
            before.first_slot + before.count == slot) {
          before.count += count;
          before.visible = before.count;
          before.first_index = last_index - before.count + 1;
          return;
        }
      }
      rules[static_cast<std::size_t>(written++)] = {.first_index = last_index - count + 1,
                                                    .count = count,
                                                    .visible = count,
                                                    .first_position = first,
                                                    .shift = shift,
                                                    .first_slot = slot,
                                                    .kind = kind};
    };
    const Position reader = base();
    const std::int64_t sinks = kept_sinks();
    const std::int64_t texts = kept_texts();
    // While the block is written its indices are exact: a chunk of it sees itself causally.
    add(0, head_, head_ - 1, 0, reader, TokenKind::kPinned);
    add(sinks_base_, sinks, head_ + sinks - 1, static_cast<Position>(head_), reader,
        TokenKind::kPinned);
    for (std::int64_t text = texts_ - (texts - sinks); text < texts_;) {
      const std::int64_t slot = slot_of_text(text);
      const std::int64_t count = std::min(texts_ - text, window_base_ + config_.text_window - slot);
      // Of texts that were moved here, any index below the rounds' will do.
      const std::int64_t last = std::min(head_ + text + count, block_tokens_) - 1;
      add(slot, count, last, static_cast<Position>(head_ + text),
          reader + static_cast<Position>(texts_ - texts), TokenKind::kText);
      text += count;
    }
    add(tail_base_, tail_, block_tokens_ - 1, tail_number_,
        reader + tail_number_ - static_cast<Position>(head_ + texts), TokenKind::kPinned);
    for (const TokenKind kind : {TokenKind::kText, TokenKind::kVision}) {
      const Ring& ring = kind == TokenKind::kVision ? frames_ : turns_;
      std::int64_t place = 0;  // in the ring, from its oldest token
      const std::int64_t end = first_span_ + live_spans();
      for (std::int64_t s = first_span_; s < end; ++s) {
        const Span& span = span_at(s);
        if ((span.role == SpanRole::kVision) != (kind == TokenKind::kVision)) continue;
        for (std::int64_t done = 0; done < span.count;) {
          const std::int64_t slot = ring.slot(place);
          const std::int64_t count = std::min(span.count - done, ring.base + ring.capacity - slot);
          add(slot, count, span.first_index + done + count - 1, span.position, -span.behind, kind);
          done += count;
          place += count;
        }
      }
    }
    return written;
  }

  /// Appends the state and the configuration that restore() compares.
  /// \throws Error(kOrder) with uncommitted tokens.
  void save(ByteWriter& writer) const {
    require_committed("KindRetention::save");
    for (const auto& [field, value] : identity()) writer.write<std::int64_t>(value);
    for (const std::int64_t value :
         {head_, tail_, texts_, written_texts_, total_, round_count_, replies_, first_span_,
          turns_.first, frames_.first, static_cast<std::int64_t>(role_),
          static_cast<std::int64_t>(block_role_), std::int64_t{span_open_ ? 1 : 0}, open_tokens_})
      writer.write<std::int64_t>(value);
    for (const Position value : {next_, removed_, tail_number_}) writer.write<double>(value);
    for (std::int64_t r = first_round_; r < round_count_; ++r) {
      const Round& of = round(r);
      for (const std::int64_t value : {of.spans, of.turn, of.reply, of.vision})
        writer.write<std::int64_t>(value);
      for (std::int64_t s = of.first; s < of.first + of.spans; ++s) {
        const Span& span = span_at(s);
        writer.write<std::int64_t>(static_cast<std::int64_t>(span.role));
        writer.write<std::int64_t>(span.first_index);
        writer.write<std::int64_t>(span.count);
        for (const Position value : {span.position, span.extent, span.behind})
          writer.write<double>(value);
      }
    }
  }

  /// Takes over a saved state; what follows from other values is not stored, but formed.
  /// \throws Error(kFormat) when it was saved under another configuration or breaks an invariant:
  /// nothing changes then.
  void restore(ByteReader& reader) {
    for (const auto& [field, value] : identity()) reader.read_expected<std::int64_t>(field, value);
    KindRetention loaded(config_);
    const auto require = [&](bool good, const char* field) {
      if (!good)
        throw Error(ErrorCode::kFormat,
                    {"inconsistent snapshot", reader.source(), field, "a consistent value", ""});
    };
    const auto number = [&](const char* field, std::int64_t most) {
      const auto value = reader.read<std::int64_t>(field);
      require(value >= 0 && value <= most, field);
      return value;
    };
    const auto position = [&](const char* field) {
      const auto value = reader.read<double>(field);
      require(value >= 0 && value <= static_cast<double>(kMaxTotal), field);
      return value;
    };
    loaded.head_ = number("head", config_.max_head);
    loaded.tail_ = number("tail", config_.max_tail);
    loaded.texts_ = number("texts", kMaxTotal);
    loaded.written_texts_ =
        number("written texts", std::min(loaded.texts_, config_.text_sinks + config_.text_window));
    loaded.total_ = loaded.committed_ = number("total", kMaxTotal);
    loaded.round_count_ = number("rounds", kMaxTotal);
    loaded.replies_ = number("replies", loaded.total_);
    loaded.first_span_ = number("spans", kMaxTotal);
    loaded.turns_.first = number("first turn", std::max<std::int64_t>(turns_.capacity - 1, 0));
    loaded.frames_.first = number("first frame", std::max<std::int64_t>(frames_.capacity - 1, 0));
    loaded.role_ = static_cast<SpanRole>(number("role", 5));
    loaded.block_role_ = static_cast<SpanRole>(number("block role", 2));
    loaded.span_open_ = number("open", 1) == 1;
    loaded.open_tokens_ = number("open tokens", loaded.total_);
    loaded.next_ = position("next position");
    loaded.removed_ = position("removed");
    loaded.tail_number_ = position("tail position");
    loaded.block_tokens_ = loaded.head_ + loaded.tail_ + loaded.written_texts_;
    require(loaded.block_tokens_ <= loaded.total_, "total");
    require(loaded.tail_number_ <= loaded.next_, "tail position");

    loaded.first_round_ = std::max<std::int64_t>(0, loaded.round_count_ - rounds_kept_);
    std::int64_t next_span = loaded.first_span_;
    std::int64_t next_index = loaded.block_tokens_;
    for (std::int64_t r = loaded.first_round_; r < loaded.round_count_; ++r) {
      Round& of = loaded.round(r);
      const bool text_stays = r >= loaded.round_count_ - config_.text_rounds;
      const bool vision_stays = r >= loaded.round_count_ - config_.vision_rounds;
      of.first = next_span;
      of.spans = number("spans of a round", config_.max_spans);
      of.turn = number("turn of a round", config_.max_turn);
      of.reply = number("reply of a round", config_.max_reply);
      of.vision = number("frames of a round", config_.max_vision);
      Round counted{};
      for (; next_span < of.first + of.spans; ++next_span) {
        Span& span = loaded.span_at(next_span);
        const std::int64_t role = number("role of a span", 5);
        require(role >= static_cast<std::int64_t>(SpanRole::kTurn), "role of a span");
        span.role = static_cast<SpanRole>(role);
        span.first_index = number("first token of a span", loaded.total_);
        span.count = number("tokens of a span", loaded.total_);
        span.position = position("position of a span");
        span.extent = position("extent of a span");
        span.behind = position("what left behind a span");
        const bool vision = span.role == SpanRole::kVision;
        require((vision ? vision_stays : text_stays) || (span.count == 0 && span.extent == 0),
                "tokens of a span");
        require(vision || span.extent == static_cast<Position>(span.count), "extent of a span");
        require(span.position + span.extent <= loaded.next_, "position of a span");
        // Only what stands before something that left is shifted: see validate() about runs.
        require(
            span.behind <= loaded.removed_ && (span.behind == 0 || !(text_stays && vision_stays)),
            "what left behind a span");
        if (span.count > 0) {
          require(span.first_index >= next_index && span.first_index + span.count <= loaded.total_,
                  "first token of a span");
          next_index = span.first_index + span.count;
        }
        (vision                          ? counted.vision
         : span.role == SpanRole::kReply ? counted.reply
                                         : counted.turn) += span.count;
      }
      require(!text_stays || (of.turn == counted.turn && of.reply == counted.reply),
              "text of a round");
      require(!vision_stays || of.vision == counted.vision, "frames of a round");
      loaded.turns_.used += counted.turn + counted.reply;
      loaded.frames_.used += counted.vision;
    }
    // The replies that left are texts of the block now.
    std::int64_t reply = loaded.replies_ - loaded.live_replies();
    require(reply >= 0 && loaded.texts_ - loaded.written_texts_ == reply, "texts");
    for (std::int64_t s = loaded.first_span_; s < next_span; ++s) {
      Span& span = loaded.span_at(s);
      if (span.role != SpanRole::kReply) continue;
      span.first_reply = reply;
      reply += span.count;
    }
    if (loaded.round_count_ == 0) {
      require(loaded.replies_ == 0, "replies");
      require(loaded.total_ == loaded.block_tokens_ && loaded.first_span_ == 0 &&
                  loaded.next_ == static_cast<Position>(loaded.total_),
              "total");
      require(loaded.role_ == loaded.block_role_, "role");
      const std::int64_t written = loaded.role_ == SpanRole::kHead   ? loaded.head_
                                   : loaded.role_ == SpanRole::kTail ? loaded.tail_
                                                                     : loaded.written_texts_;
      require(loaded.open_tokens_ <= (loaded.span_open_ ? written : 0), "open tokens");
    } else {
      const Round& newest = loaded.round(loaded.round_count_ - 1);
      require(!loaded.span_open_ || newest.spans > 0, "open");
      std::int64_t open = 0;
      if (loaded.span_open_) {
        const Span& span = loaded.span_at(newest.first + newest.spans - 1);
        require(span.role == loaded.role_, "role");
        open = span.count;
        require(open == 0 || span.first_index + open == loaded.total_, "total");
      }
      require(loaded.open_tokens_ == open, "open tokens");
    }
    *this = loaded;
  }

 private:
  /// Tokens of a stream: a Position counts exactly up to here.
  static constexpr std::int64_t kMaxTotal = std::int64_t{1} << 53;

  /// Slots that are taken in turn.
  struct Ring {
    std::int64_t base = 0;
    std::int64_t capacity = 0;
    std::int64_t first = 0;  // place of the oldest token
    std::int64_t used = 0;

    std::int64_t slot(std::int64_t i) const {
      const std::int64_t place = first + i;
      return base + (place < capacity ? place : place - capacity);
    }
    void pop(std::int64_t count) {
      used -= count;
      first = capacity == 0 ? 0 : (first + count) % capacity;
    }
  };
  /// A run of one round's tokens.
  struct Span {
    SpanRole role = SpanRole::kTurn;
    std::int64_t first_index = 0;
    std::int64_t count = 0;
    std::int64_t first_reply = 0;  // kReply: counter of the first token among all replies
    Position position = 0;         // of its first token, as written
    Position extent = 0;
    Position behind = 0;  // extents that have left between it and the reader
  };
  struct Round {
    std::int64_t first = 0;  // its first span, counted from the stream's beginning
    std::int64_t spans = 0;
    std::int64_t turn = 0;  // tokens
    std::int64_t reply = 0;
    std::int64_t vision = 0;
  };

  /// What a saved state must agree in.
  std::array<std::pair<const char*, std::int64_t>, 11> identity() const {
    const KindRetentionConfig& c = config_;
    return {{{"text_sinks", c.text_sinks},
             {"text_window", c.text_window},
             {"text_rounds", c.text_rounds},
             {"vision_rounds", c.vision_rounds},
             {"max_head", c.max_head},
             {"max_tail", c.max_tail},
             {"max_turn", c.max_turn},
             {"max_reply", c.max_reply},
             {"max_vision", c.max_vision},
             {"max_spans", c.max_spans},
             {"max_chunk", c.max_chunk}}};
  }

  /// Tokens of replies that are still in their rounds.
  std::int64_t live_replies() const {
    std::int64_t count = 0;
    for (std::int64_t s = first_span_, end = first_span_ + live_spans(); s < end; ++s)
      if (span_at(s).role == SpanRole::kReply) count += span_at(s).count;
    return count;
  }

  std::int64_t kept_texts() const {
    return std::min(texts_, config_.text_sinks + config_.text_window);
  }
  std::int64_t kept_sinks() const { return std::min(texts_, config_.text_sinks); }
  std::int64_t slot_of_text(std::int64_t text) const {
    if (text < config_.text_sinks) return sinks_base_ + text;
    return window_base_ + (text - config_.text_sinks) % config_.text_window;
  }
  /// A reader at position p has rank p + base(): what left is taken away, what moved into the
  /// block is counted there.
  Position base() const { return static_cast<Position>(kept_texts() - written_texts_) - removed_; }

  Span& span_at(std::int64_t s) {
    return spans_[static_cast<std::size_t>(s % static_cast<std::int64_t>(spans_.size()))];
  }
  const Span& span_at(std::int64_t s) const {
    return spans_[static_cast<std::size_t>(s % static_cast<std::int64_t>(spans_.size()))];
  }
  Round& round(std::int64_t r) { return rounds_[static_cast<std::size_t>(r % rounds_kept_)]; }
  const Round& round(std::int64_t r) const {
    return rounds_[static_cast<std::size_t>(r % rounds_kept_)];
  }
  /// Spans of the rounds that are kept.
  std::int64_t live_spans() const {
    std::int64_t count = 0;
    for (std::int64_t r = first_round_; r < round_count_; ++r) count += round(r).spans;
    return count;
  }
  template <class Visit>
  void each_span(std::int64_t r, Visit&& visit) {
    const Round& of = round(r);
    for (std::int64_t s = of.first; s < of.first + of.spans; ++s) {
      dropping_ = s;
      visit(span_at(s));
    }
  }
  /// Takes a span out: it is the oldest of its ring.
  void drop(Span& span, Ring& ring) {
    ring.pop(span.count);
    removed_ += span.extent;
    for (std::int64_t s = first_span_; s < dropping_; ++s) span_at(s).behind += span.extent;
    span.count = 0;
    span.extent = 0;
  }
  template <class Move>
  void move_reply(const Span& span, Move&& move) {
    for (std::int64_t i = 0; i < span.count; ++i) {
      const std::int64_t text = texts_++;
      move(KindMove{turns_.slot(i), slot_of_text(text), (span.first_reply + i) % reply_slots(),
                    static_cast<Position>(head_ + text)});
    }
  }

  std::int64_t room() const {
    const Round* newest = round_count_ > 0 ? &round(round_count_ - 1) : nullptr;
    switch (role_) {
      case SpanRole::kHead: return config_.max_head - head_;
      case SpanRole::kPrevious: return config_.text_sinks + config_.text_window - texts_;
      case SpanRole::kTail: return config_.max_tail - tail_;
      case SpanRole::kTurn: return config_.max_turn - newest->turn;
      case SpanRole::kReply: return config_.max_reply - newest->reply;
      case SpanRole::kVision: return config_.max_vision - newest->vision;
    }
    return 0;
  }
  /// Adds tokens to the open span, or takes them back.
  void change(std::int64_t tokens) {
    if (tokens == 0) return;
    const bool in_round = round_count_ > 0;
    if (!in_round) {
      (role_ == SpanRole::kHead ? head_ : role_ == SpanRole::kTail ? tail_ : texts_) += tokens;
      if (role_ == SpanRole::kPrevious) written_texts_ = texts_;
      next_ += static_cast<Position>(tokens);
      block_tokens_ = total_ + tokens;
    } else {
      Round& newest = round(round_count_ - 1);
      Span& span = span_at(newest.first + newest.spans - 1);
      if (span.count == 0) {
        span.first_index = total_;
        span.first_reply = replies_;
      }
      span.count += tokens;
      if (role_ == SpanRole::kVision) {
        newest.vision += tokens;
        frames_.used += tokens;
      } else {
        (role_ == SpanRole::kReply ? newest.reply : newest.turn) += tokens;
        if (role_ == SpanRole::kReply) replies_ += tokens;
        turns_.used += tokens;
        span.extent += static_cast<Position>(tokens);
        next_ += static_cast<Position>(tokens);
      }
    }
    total_ += tokens;
    open_tokens_ += tokens;
  }

  void require_committed(const char* where) const {
    if (total_ != committed_)
      throw Error(ErrorCode::kOrder, {"uncommitted tokens", where, "appended tokens", "0",
                                      std::to_string(total_ - committed_)});
  }
  void validate() const {
    const auto within = [](const char* field, std::int64_t value, std::int64_t least,
                           std::int64_t most = std::int64_t{1} << 24) {
      if (value < least || value > most)
        throw Error(ErrorCode::kConfig,
                    {"cache configuration does not fit", "KindRetentionConfig", field,
                     std::to_string(least) + " to " + std::to_string(most), std::to_string(value)});
    };
    const KindRetentionConfig& c = config_;
    within("text_sinks", c.text_sinks, 0);
    within("text_window", c.text_window, 1);
    within("text_rounds", c.text_rounds, 1, 1 << 16);
    within("vision_rounds", c.vision_rounds, 1, 1 << 16);
    within("max_head", c.max_head, 0);
    within("max_tail", c.max_tail, 0);
    within("max_turn", c.max_turn, 0);
    // A reply must fit the window whole: a slot is not read after it was written.
    within("max_reply", c.max_reply, 1, c.text_window);
    within("max_vision", c.max_vision, 0);
    within("max_spans", c.max_spans, 1, 1 << 10);
    within("max_chunk", c.max_chunk, 1);
    within("slots in all", c.capacity(), 1, std::int64_t{1} << 32);
    // Where frames and text leave at different times, each round between has a place of its own.
    const std::int64_t apart = c.text_rounds > c.vision_rounds ? c.text_rounds - c.vision_rounds
                                                               : c.vision_rounds - c.text_rounds;
    within("runs of rounds that keep one kind alone", apart * c.max_spans, 0, kMaxSegments - 16);
  }

  KindRetentionConfig config_;
  std::int64_t sinks_base_ = 0;
  std::int64_t tail_base_ = 0;
  std::int64_t window_base_ = 0;
  Ring turns_;
  Ring frames_;
  std::int64_t rounds_kept_ = 0;
  std::vector<Span> spans_;    // ring, by span number
  std::vector<Round> rounds_;  // ring, by round number

  std::int64_t head_ = 0;
  std::int64_t tail_ = 0;
  std::int64_t texts_ = 0;          // of the block, ever
  std::int64_t written_texts_ = 0;  // of these, read as such; the others were moved there
  std::int64_t block_tokens_ = 0;
  std::int64_t total_ = 0;
  std::int64_t committed_ = 0;
  std::int64_t round_count_ = 0;
  std::int64_t first_round_ = 0;  // the oldest that is kept
  std::int64_t first_span_ = 0;
  std::int64_t dropping_ = 0;
  std::int64_t replies_ = 0;      // tokens of replies, ever
  std::int64_t open_tokens_ = 0;  // of the open span
  Position next_ = 0;
  Position removed_ = 0;  // extents that left the rounds
  Position tail_number_ = 0;
  SpanRole role_ = SpanRole::kHead;
  SpanRole block_role_ = SpanRole::kHead;
  bool span_open_ = false;
};

}  // namespace sluice
