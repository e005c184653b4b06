// SPDX-License-Identifier: MIT
/// The two sides of a stream that listens, as steps: the source side turns samples into source rows
/// and counts words with CTC, the target side writes words when enough have been counted. Listener
/// (listener.hpp) runs them on two threads or on one.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "sluice/cache/group.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/spsc_ring.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/listen_model.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/ctc.hpp"
#include "sluice/stream/deadline.hpp"
#include "sluice/stream/listener_metrics.hpp"
#include "sluice/stream/paced_source.hpp"
#include "sluice/stream/sample_queue.hpp"

namespace sluice {

/// What a Listener is made of.
struct ListenerOptions {
  /// Never before the utterance has ended.
  static constexpr std::int64_t kWholeUtterance = std::int64_t{1} << 40;

  /// k of wait-k: a word is written when so many have been counted from it on, itself included.
  std::int64_t wait_words = 1;
  /// Source rows that must follow the label that completed the count; -1: what the model was
  /// trained for. Shorter is earlier and less sure.
  std::int64_t delay_rows = -1;
  /// An utterance ends after a word and so much time without a label. 0: pauses end none.
  double endpoint_ms = 800;
  /// An utterance ends after so much time at the latest, silence before its first word included. 0:
  /// it may go on for ever; the text of one that outgrows max_tokens is cut short.
  double max_utterance_ms = 20000;
  /// Without any word for so long, the stream starts anew, without text and without an endpoint.
  /// 0: never. Silence that lasts as long as max_utterance_ms is treated alike, so a limit on
  /// utterances that is shorter than this one makes no utterance of it.
  double silence_ms = 10000;
  /// Text of one utterance, at most, in pieces.
  std::int64_t max_tokens = 1024;
  /// Whether events tell about text that is not final.
  bool partial_text = true;
  int source_threads = 1;
  int target_threads = 1;
  /// In which form activations meet quantised and bf16 weights: exact, or rounded and faster.
  Activations activations = Activations::kFloat32;
  /// Source and target side on two threads, or both on the caller's.
  bool concurrent = false;
  /// Audio that was accepted and not yet processed.
  std::int64_t queue_samples = 480000;
  /// How far the source side may be ahead of the target side.
  std::int64_t lead_rows = 128;
  /// Events that wait for their reader: the target side pauses beyond it. At least 4.
  std::int64_t event_capacity = 256;

  /// A source row is due so long after its last sample was accepted: read, and what is written with
  /// it written. 0: no deadline, nothing is left out, and the text is the same at any speed.
  double deadline_ms = 0;
  /// What is put off when it would not be done in time, by what such work cost lately
  /// (deadline.hpp): nothing; with kSkipFrame a word; with kShortenWrite a piece, so that a word
  /// may be broken off. It is written with a later row that has the time, or when its utterance
  /// ends, which is always written whole: no word is lost, but it has then seen more of the sound,
  /// and so may be another.
  Shedding shedding = Shedding::kNone;
  /// After so many rows with something put off and none at which what was due had the time, a piece
  /// or word is written however late it will be. Rows are counted within an utterance: its end is
  /// always written, so the next one begins the count anew.
  std::int64_t max_put_off = 8;
  /// What becomes of audio whose row's deadline has passed before the row is read: kBlock, it is
  /// read late; kDropOldest, it is dropped unheard, up to the first row that is still in time;
  /// that one may be late yet, where writing is what takes too long. The others are refused:
  /// samples that wait need no joining.
  LatePolicy late = LatePolicy::kBlock;
  /// Where the stream reads the time. The clock must outlive the stream. Its times are above 0: 0
  /// stands for a time that is not known.
  ClockView clock = {};

  /// Words are written so many milliseconds after their labels, or up to half a row more.
  static ListenerOptions with_delay(const ListenModel& model, double milliseconds) {
    ListenerOptions options;
    options.delay_rows = std::llround(milliseconds / model.milliseconds_per_row());
    return options;
  }
};

/// What a Listener hands to its reader.
struct ListenEvent {
  enum class Kind : std::uint8_t {
    kPartial,   ///< what the words beyond those written look like so far; replaces the last partial
    kWord,      ///< a word, for good
    kEndpoint,  ///< the utterance has ended: `word` words, at least one, were its text
    kEnd,       ///< the input has ended; nothing follows
  };
  static constexpr std::size_t kMostPieces = 64;

  Kind kind = Kind::kEnd;
  std::int32_t num_pieces = 0;
  std::array<Token, kMostPieces> pieces{};  ///< kPartial (the newest ones), kWord
  std::int64_t utterance = 0;
  std::int64_t word = 0;  ///< kWord: its number in the utterance, from 0
  /// Source clock, in samples since the stream's start: the end of the source row after which this
  /// was decided; where that was the input's end, all samples.
  std::int64_t samples = 0;
  /// kWord: the end of the row whose CTC label ended the word, an estimate of where its sound ends
  /// (somewhat early); -1: CTC did not count it.
  std::int64_t spoken_samples = -1;
  /// When the last sample before spoken_samples was accepted, by ListenerOptions::clock; 0: not
  /// known.
  std::int64_t spoken_ns = 0;
  std::int64_t time_ns = 0;  ///< when it was written, by ListenerOptions::clock

  std::span<const Token> tokens() const {
    return {pieces.data(), static_cast<std::size_t>(num_pieces)};
  }
};

constexpr std::string_view to_string(ListenEvent::Kind kind) {
  switch (kind) {
    case ListenEvent::Kind::kPartial: return "partial";
    case ListenEvent::Kind::kWord: return "word";
    case ListenEvent::Kind::kEndpoint: return "endpoint";
    case ListenEvent::Kind::kEnd: return "end";
  }
  return "unknown";
}

/// State and steps. One thread at a time calls the source's functions, one those of the target;
/// they may be the same. No step allocates, locks or throws.
///
/// The rule of writing is asked row by row: after row f the count C of words in the collapsed
/// greedy CTC labels, the rows V = f + 1 and the words written W say whether a word is written,
/// with a source prefix of V rows. So the text, and the audio time of each word, are the same for
/// any chunks of samples and for any timing of the two sides; unless a deadline is to be held,
/// which is to say that time decides.
class ListenerEngine {
 public:
  /// How far a step got.
  enum class Progress : std::uint8_t {
    kStepped,       ///< something was done: call again
    kNeedsSamples,  ///< source: waits for samples, or the input's end
    kNeedsSource,   ///< target: waits for a source row
    kNeedsRoom,     ///< source: the target is behind; target: events wait for their reader
    kEnded,         ///< nothing more will be done
  };

  /// Pieces of a word at most, and words beyond those that CTC counted at an utterance's end.
  static constexpr std::int64_t kMostPiecesOfWord = 16;
  static constexpr std::int64_t kMostUncounted = 8;

  /// \throws Error(kConfig) naming the option that makes no sense.
  ListenerEngine(std::shared_ptr<const ListenModel> model, const ListenerOptions& options)
      : model_(std::move(model)),
        options_(checked(options)),
        delay_rows_(options.delay_rows < 0 ? model_->config().trained_delay : options.delay_rows),
        endpoint_rows_(rows_of(options.endpoint_ms)),
        max_rows_(rows_of(options.max_utterance_ms)),
        silence_rows_(rows_of(options.silence_ms)),
        source_(model_->decoder().make_group<float>("source", kSourceGroup, source_plan())),
        target_(model_->decoder().make_cache<float>(target_plan())),
        reader_(source_->open_reader()),
        source_team_(options.source_threads),
        target_team_(options.target_threads),
        source_workspace_(model_->decoder(), 1, source_->cache().max_entries(),
                          options.source_threads, DecoderWorkspace::kDefaultSegments,
                          options.activations),
        target_workspace_(
            model_->decoder(), 1, source_->cache().max_entries() + target_.max_entries(),
            options.target_threads, DecoderWorkspace::kDefaultSegments, options.activations),
        front_end_(model_->make_state(options.source_threads, options.activations)),
        queue_(options.queue_samples),
        rows_(options.lead_rows + 2),
        scores_(static_cast<std::size_t>(model_->vocab_size() + 1)),
        ctc_(model_->blank()),
        logits_(static_cast<std::size_t>(model_->vocab_size())),
        events_(options.event_capacity),
        counted_(kCounted),
        partial_(kPartial),
        delays_(static_cast<std::size_t>(options.max_tokens)),
        metrics_(std::llround(1e6 * model_->milliseconds_per_row())),
        deadline_ns_(std::llround(1e6 * options.deadline_ms)),
        shedder_(
            {.policy = options.shedding == Shedding::kNone ? Shedding::kNone : Shedding::kSkipFrame,
             .max_skips = options.max_put_off}),
        row_end_(model_->samples_wanted(front_end_)),
        last_(model_->config().begin_token) {}

  const ListenModel& model() const { return *model_; }
  const ListenerOptions& options() const { return options_; }
  /// Rows of delay in force.
  std::int64_t delay_rows() const { return delay_rows_; }
  SampleQueue& queue() { return queue_; }
  SpscRing<ListenEvent>& events() { return events_; }
  ListenerMetrics& metrics() { return metrics_; }
  const ListenerMetrics& metrics() const { return metrics_; }
  /// Bytes of keys and values.
  std::int64_t cache_bytes() const { return source_->cache().bytes() + target_.bytes(); }

  /// The target side: events ever written.
  std::int64_t events_put() const { return events_put_; }
  /// The stream's clock. Any thread.
  std::int64_t now_ns() const noexcept { return options_.clock.now_ns(); }

  /// Any thread: nothing will be accepted any more. The queue may still hold samples.
  void end_input() { input_ended_.store(true, std::memory_order_release); }

  /// The source side: takes samples up to the next source row, reads the row and publishes it.
  Progress step_source() {
    if (source_ended_) return Progress::kEnded;
    if (rows_.room() < 2) return Progress::kNeedsRoom;
    if (between_utterances_) {
      if (utterances_done_.load(std::memory_order_acquire) != utterances_ended_)
        return Progress::kNeedsRoom;
      source_->reset();
      model_->restart(front_end_);
      ctc_.reset();
      words_counted_ = 0;
      between_utterances_ = false;
    }
    if (source_->room() < 1) return Progress::kNeedsRoom;
    // Asked before the queue: samples accepted before the end are then seen.
    const bool ended = input_ended_.load(std::memory_order_acquire);
    std::span<const float> samples = queue_.front();
    if (samples.empty()) {
      if (!ended) return Progress::kNeedsSamples;
      source_ended_ = true;
      push({.kind = Row::Kind::kEnd, .samples = samples_taken()});
      return Progress::kEnded;
    }
    if (options_.late == LatePolicy::kDropOldest && drop_late()) return Progress::kStepped;
    const std::int64_t begin = now_ns();
    std::span<const float> row;
    std::int64_t taken_in_all = 0;
    do {
      const std::size_t taken =
          std::min(samples.size(), static_cast<std::size_t>(model_->samples_wanted(front_end_)));
      row = model_->accept(samples.first(taken), front_end_);
      queue_.pop(taken);
      taken_in_all += static_cast<std::int64_t>(taken);
      samples = queue_.front();
    } while (row.empty() && !samples.empty());
    if (!row.empty()) read(row);
    const std::int64_t end = now_ns();
    metrics_.on_source_work(end - begin, taken_in_all, row.empty() ? 0 : 1);
    return Progress::kStepped;
  }

  /// The target side: takes note of a source row, or predicts a piece.
  Progress step_target() {
    if (ended_) return Progress::kEnded;
    if (events_.room() < kMostEvents) return Progress::kNeedsRoom;
    if (writing_) {
      write();
      if (!writing_ && !finishing_) end_row();
      return ended_ ? Progress::kEnded : Progress::kStepped;
    }
    const Row* front = rows_.front();
    if (front == nullptr) return Progress::kNeedsSource;
    const Row row = *front;
    rows_.pop();
    switch (row.kind) {
      case Row::Kind::kRow: note(row); break;
      case Row::Kind::kFinish: finish(); break;
      case Row::Kind::kForget: end_text(); break;
      case Row::Kind::kEnd:
        at_end_ = true;
        samples_ = row.samples;
        finish();
        break;
    }
    return ended_ ? Progress::kEnded : Progress::kStepped;
  }

 private:
  static constexpr std::int64_t kMostEvents = 4;  // of one step
  static constexpr std::int64_t kCounted = 4096;  // counted words whose rows are remembered
  static constexpr std::int64_t kPartial = 1024;  // pieces of partial text
  static constexpr std::int64_t kMostDelay = 4096;

  /// What the source side tells the target side.
  struct Row {
    enum class Kind : std::uint8_t {
      kRow,
      kFinish,  ///< the utterance has ended
      kForget,  ///< there was none
      kEnd,     ///< the input has ended
    };
    Kind kind = Kind::kRow;
    Token piece = -1;             // that begins with this row; -1: none
    std::int64_t words = 0;       // counted so far
    std::int64_t samples = 0;     // end of the row in the stream
    std::int64_t arrival_ns = 0;  // of its last sample
    bool sounds = false;          // its label is not blank
    bool last = false;            // the utterance ends with it: kFinish or kForget follows
  };
  /// Where CTC's count reached a number of words.
  struct Counted {
    std::int64_t rows = 0;  // so many of the utterance by then
    std::int64_t samples = 0;
    std::int64_t arrival_ns = 0;
  };
  struct PartialPiece {
    Token piece = 0;
    std::int64_t word = 0;
  };

  static const ListenerOptions& checked(const ListenerOptions& options) {
    const auto fail = [](const char* field, const std::string& expected, const std::string& found) {
      throw Error(ErrorCode::kConfig,
                  {"option out of range", "ListenerOptions", field, expected, found});
    };
    const auto range = [&](const char* field, std::int64_t value, std::int64_t least,
                           std::int64_t most) {
      if (value < least || value > most)
        fail(field, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
    };
    if (options.wait_words != ListenerOptions::kWholeUtterance)
      range("wait_words", options.wait_words, 1, kCounted / 2);
    range("delay_rows", options.delay_rows, -1, kMostDelay);
    range("max_tokens", options.max_tokens, 1, 1 << 20);
    range("lead_rows", options.lead_rows, 1, kMaxLead);
    range("event_capacity", options.event_capacity, kMostEvents, 1 << 24);
    for (const auto& [field, value] : {std::pair{"endpoint_ms", options.endpoint_ms},
                                       std::pair{"max_utterance_ms", options.max_utterance_ms},
                                       std::pair{"silence_ms", options.silence_ms}})
      if (!(value >= 0 && value <= 1e9)) fail(field, "0 to 1e9", std::to_string(value));
    range("max_put_off", options.max_put_off, 0, 1 << 20);
    const bool sheds =
        options.shedding != Shedding::kNone || options.late == LatePolicy::kDropOldest;
    if (!(options.deadline_ms >= (sheds ? 1e-6 : 0) && options.deadline_ms <= 1e9))
      fail("deadline_ms", sheds ? "1e-6 to 1e9: something is to be left out for it" : "0 to 1e9",
           std::to_string(options.deadline_ms));
    if (options.late != LatePolicy::kBlock && options.late != LatePolicy::kDropOldest)
      fail("late", "kBlock or kDropOldest", "another");
    return options;
  }

  /// At least one row of a time above 0; none for 0.
  std::int64_t rows_of(double milliseconds) const {
    if (milliseconds <= 0) return 0;
    return std::max<std::int64_t>(1, std::llround(milliseconds / model_->milliseconds_per_row()));
  }

  /// Rows count from the utterance's start, so that a target row stands at its own distance from
  /// each, window or not.
  CachePlan source_plan() const {
    CacheOptions cache;
    cache.policy = CachePolicy::kWindow;
    cache.window_size = model_->config().frame_window;
    cache.chunk_size = 1;
    cache.lead = options_.lead_rows;
    cache.position_rule = PositionRule::kInText;
    return plan_cache(model_->decoder().config(), cache);
  }
  CachePlan target_plan() const {
    CacheOptions cache;
    cache.policy = CachePolicy::kFull;
    cache.capacity = options_.max_tokens;
    cache.chunk_size = 1;
    cache.position_rule = PositionRule::kInText;
    return plan_cache(model_->decoder().config(), cache);
  }

  // ---- the source side -------------------------------------------------------------------------

  void read(std::span<const float> row) {
    const DecoderInput input{.embeddings = {row.data(), 1, model_->hidden_size()}};
    model_->decoder().forward(input, source_->cache(),
                              GroupReader<float, float>{.own_group = kSourceGroup},
                              source_workspace_, source_team_);
    source_->cache().commit();
    source_->publish();
    model_->ctc_scores(source_workspace_.hidden_states(),
                       {scores_.data(), 1, static_cast<std::int64_t>(scores_.size())}, front_end_,
                       source_team_);
    const Token piece = ctc_.push(scores_.span()).value_or(-1);
    if (piece >= 0 && model_->ends_word(piece)) ++words_counted_;
    const std::int64_t samples = samples_taken();
    SLUICE_ASSERT(samples == row_end_);
    const std::int64_t arrival_ns = queue_.arrival_before(samples);
    metrics_.on_row(now_ns(), arrival_ns);
    const auto passed = [](std::int64_t rows, std::int64_t limit) {
      return limit > 0 && rows >= limit;
    };
    const bool finished = (words_counted_ > 0 && passed(ctc_.blank_run(), endpoint_rows_)) ||
                          passed(ctc_.frames(), max_rows_);
    const bool silent = !finished && words_counted_ == 0 && passed(ctc_.blank_run(), silence_rows_);
    push({.piece = piece,
          .words = words_counted_,
          .samples = samples,
          .arrival_ns = arrival_ns,
          .sounds = ctc_.blank_run() == 0,
          .last = finished || silent});
    if (finished || silent)
      end_utterance(finished ? Row::Kind::kFinish : Row::Kind::kForget);
    else
      row_end_ = samples + model_->samples_per_row();
  }

  void end_utterance(Row::Kind kind) {
    const std::int64_t samples = samples_taken();
    push({.kind = kind, .samples = samples});
    row_end_ = samples + model_->samples_wanted(front_end_);  // convolutions start anew
    between_utterances_ = true;
    ++utterances_ended_;
  }

  /// Samples that have left the queue.
  std::int64_t samples_taken() const { return front_end_.samples() + dropped_samples_; }

  /// Where the next row's deadline has passed, as many samples as a row brings, or all that wait if
  /// they are fewer, leave the queue unheard, again and again: what follows is heard as if it had
  /// come instead, and a row that was begun goes on with it. What came in so many pieces that the
  /// queue does not know when is heard. False: nothing was late.
  bool drop_late() {
    const std::int64_t now = now_ns();
    std::int64_t rows = 0;
    std::int64_t samples = 0;
    for (std::int64_t waiting = queue_.waiting();
         waiting >= row_end_ - samples_taken() &&
         queue_.arrival_before(row_end_) + deadline_ns_ < now && queue_.arrival_known();
         ++rows) {
      const std::int64_t count = std::min(waiting, model_->samples_per_row());
      queue_.pop(static_cast<std::size_t>(count));
      dropped_samples_ += count;
      row_end_ += count;
      samples += count;
      waiting -= count;
    }
    if (rows > 0) metrics_.on_dropped(samples, rows);
    return rows > 0;
  }

  void push(const Row& row) {
    [[maybe_unused]] const bool pushed = rows_.try_push(row);
    SLUICE_ASSERT(pushed);  // step_source() made sure
  }

  // ---- the target side -------------------------------------------------------------------------

  /// A source row is there.
  void note(const Row& row) {
    ++seen_;
    samples_ = row.samples;
    source_->hold(reader_, seen_);
    row_open_ = true;
    due_ns_ = row.arrival_ns + deadline_ns_;
    ends_utterance_ = row.last;
    if (row.sounds) {
      sounding_ns_ = row.arrival_ns;
      sounded_ = true;
    }
    if (row.piece >= 0) {
      add_partial(row.piece, counted_words_);
      if (row.words != counted_words_) {
        counted_words_ = row.words;
        counted_[static_cast<std::size_t>(counted_words_ % kCounted)] = {seen_, row.samples,
                                                                         row.arrival_ns};
      }
      put_partial();
    }
    writing_ = triggered() && in_time();
    if (!writing_) end_row();
  }

  /// Nothing more is done with the newest row. One that ends its utterance has the text's end to
  /// wait for.
  void end_row() {
    if (!row_open_ || ends_utterance_) return;
    row_open_ = false;
    if (deadline_ns_ > 0) metrics_.on_row_done(due_ns_, now_ns());
  }

  /// Whether the next word or piece is written with this row; otherwise it is put off. What the
  /// utterance's end will write anyway is not.
  bool in_time() {
    if (options_.shedding == Shedding::kNone || ends_utterance_) return true;
    const std::int64_t forced = shedder_.counts().forced;
    if (shedder_.decide(due_ns_ - now_ns()).skip) {
      metrics_.on_put_off();
      return false;
    }
    if (shedder_.counts().forced != forced) metrics_.on_forced();
    return true;
  }

  /// Whether the next word is due: word W once W + k are counted, and delay_rows_ rows later.
  bool triggered() const {
    if (full_ || counted_words_ < awaited_words_) return false;
    const std::int64_t due = written_words_ + options_.wait_words;
    if (counted_words_ < due) return false;
    if (counted_words_ - due >= kCounted) return true;  // long ago
    return seen_ >= counted_[static_cast<std::size_t>(due % kCounted)].rows + delay_rows_;
  }

  /// Every row is seen. Where none had a label nothing was said, whatever the decoder would write.
  void finish() {
    finishing_ = true;
    writing_ = sounded_ && !full_;
    if (!writing_) end_text();
  }

  /// Feeds the last piece, with every row seen so far, and predicts the next one.
  void write() {
    if (target_.status(1) != CacheStatus::kOk) {
      full_ = true;
      writing_ = false;
      if (finishing_) end_text();
      return;
    }
    const std::int64_t begin = now_ns();
    const std::array<GroupView<float, float>, 1> sees{source_->view(seen_)};
    const std::array<Token, 1> tokens{last_};
    model_->decoder().forward(DecoderInput{tokens}, target_,
                              GroupReader<float, float>{.own_group = kTargetGroup, .sees = sees},
                              target_workspace_, target_team_);
    model_->decoder().logits(0, {logits_.data(), 1, static_cast<std::int64_t>(logits_.size())},
                             target_workspace_, target_team_);
    const ListenConfig& config = model_->config();
    for (const Token never : {config.unknown_token, config.begin_token})
      logits_[static_cast<std::size_t>(never)] = -std::numeric_limits<float>::infinity();
    const Token token = argmax(logits_.span());
    const std::int64_t end = now_ns();
    metrics_.on_target_work(end - begin);
    const bool ends_word = model_->ends_word(token) || word_pieces_ + 1 >= kMostPiecesOfWord;
    const bool by_pieces = options_.shedding == Shedding::kShortenWrite;
    word_cost_ns_ += end - begin;
    if (options_.shedding != Shedding::kNone &&
        (by_pieces || ends_word || token == config.end_token))
      shedder_.on_step(0, std::exchange(word_cost_ns_, 0));
    if (token == config.end_token) {
      // The row was computed with a prefix that has not all of the utterance: it is forgotten.
      target_.rollback();
      writing_ = false;
      awaited_words_ = counted_words_ + 1;
      if (finishing_) end_text();
      return;
    }
    target_.commit();
    last_ = token;
    word_[static_cast<std::size_t>(word_pieces_++)] = token;
    if (!ends_word) {
      if (by_pieces && !finishing_) writing_ = in_time();
      return;
    }
    put_word(end);
    if (finishing_) {
      if (written_words_ >= counted_words_ + kMostUncounted) end_text();
    } else {
      writing_ = triggered() && in_time();
    }
  }

  /// The utterance's text is complete, or there was none.
  void end_text() {
    const std::int64_t now = now_ns();
    if (word_pieces_ > 0) put_word(now);
    // What has no word is no utterance: silence, and sounds of which no text was made.
    if (written_words_ > 0) {
      put({.kind = ListenEvent::Kind::kEndpoint, .word = written_words_, .time_ns = now});
      metrics_.on_utterance(sounding_ns_,
                            delays_.span().first(static_cast<std::size_t>(std::min(
                                written_words_, static_cast<std::int64_t>(delays_.size())))),
                            milliseconds(samples_ - start_samples_));
      ++utterance_;
    } else if (num_partial_ > 0) {
      num_partial_ = 0;
      put_partial();  // no endpoint takes it away
    }
    ends_utterance_ = false;
    end_row();
    begin_utterance();
    if (!at_end_) return;
    put({.kind = ListenEvent::Kind::kEnd, .time_ns = now});
    ended_ = true;
    source_->close_reader(reader_);
  }

  double milliseconds(std::int64_t samples) const {
    return 1000 * static_cast<double>(samples) / model_->sample_rate();
  }

  void begin_utterance() {
    target_.reset();
    shedder_.forget_skips();
    start_samples_ = samples_;
    seen_ = counted_words_ = awaited_words_ = written_words_ = word_pieces_ = 0;
    num_partial_ = first_partial_ = 0;
    sounding_ns_ = word_cost_ns_ = 0;
    writing_ = finishing_ = full_ = sounded_ = false;
    last_ = model_->config().begin_token;
    utterances_done_.store(utterances_done_.load(std::memory_order_relaxed) + 1,
                           std::memory_order_release);
  }

  void put_word(std::int64_t now) {
    ListenEvent event{.kind = ListenEvent::Kind::kWord,
                      .num_pieces = static_cast<std::int32_t>(word_pieces_),
                      .word = written_words_,
                      .time_ns = now};
    std::copy_n(word_.begin(), word_pieces_, event.pieces.begin());
    const std::int64_t number = written_words_ + 1;
    if (counted_words_ >= number && counted_words_ - number < kCounted) {
      const Counted& counted = counted_[static_cast<std::size_t>(number % kCounted)];
      event.spoken_samples = counted.samples;
      event.spoken_ns = counted.arrival_ns;
    }
    put(event);
    metrics_.on_word(now, event.spoken_ns, written_words_ == 0);
    if (written_words_ < static_cast<std::int64_t>(delays_.size()))
      delays_[static_cast<std::size_t>(written_words_)] = milliseconds(samples_ - start_samples_);
    ++written_words_;
    word_pieces_ = 0;
    // CTC's own form of the word gives way to it.
    while (num_partial_ > 0 &&
           partial_[static_cast<std::size_t>(first_partial_)].word < written_words_) {
      first_partial_ = (first_partial_ + 1) % kPartial;
      --num_partial_;
    }
    if (!finishing_) put_partial();
  }

  void add_partial(Token piece, std::int64_t word) {
    if (!options_.partial_text || word < written_words_) return;
    if (num_partial_ == kPartial) {
      first_partial_ = (first_partial_ + 1) % kPartial;
      --num_partial_;
    }
    partial_[static_cast<std::size_t>((first_partial_ + num_partial_++) % kPartial)] = {piece,
                                                                                        word};
  }

  void put_partial() {
    if (!options_.partial_text) return;
    constexpr auto kMost = static_cast<std::int64_t>(ListenEvent::kMostPieces);
    ListenEvent event{
        .kind = ListenEvent::Kind::kPartial, .word = written_words_, .time_ns = now_ns()};
    for (std::int64_t i = std::max<std::int64_t>(0, num_partial_ - kMost); i < num_partial_; ++i)
      event.pieces[static_cast<std::size_t>(event.num_pieces++)] =
          partial_[static_cast<std::size_t>((first_partial_ + i) % kPartial)].piece;
    put(event);
  }

  void put(ListenEvent event) {
    event.utterance = utterance_;
    event.samples = samples_;
    [[maybe_unused]] const bool put = events_.try_push(event);
    SLUICE_ASSERT(put);  // step_target() made sure
    ++events_put_;
  }

  std::shared_ptr<const ListenModel> model_;
  ListenerOptions options_;
  std::int64_t delay_rows_;
  std::int64_t endpoint_rows_;
  std::int64_t max_rows_;
  std::int64_t silence_rows_;
  std::unique_ptr<Group<float, float>> source_;
  KvCache<float, float> target_;
  int reader_;
  ThreadTeam source_team_;
  ThreadTeam target_team_;
  DecoderWorkspace source_workspace_;
  DecoderWorkspace target_workspace_;
  ListenModel::State front_end_;
  SampleQueue queue_;
  SpscRing<Row> rows_;
  Buffer<float> scores_;  // [vocab_size + 1]
  CtcGreedy ctc_;
  Buffer<float> logits_;  // [vocab_size]
  SpscRing<ListenEvent> events_;
  Buffer<Counted> counted_;       // count n at n % kCounted
  Buffer<PartialPiece> partial_;  // a ring
  Buffer<double> delays_;         // [max_tokens]; of the utterance's words, ms from its start
  ListenerMetrics metrics_;
  std::int64_t deadline_ns_;  // 0: none
  WorkShedder shedder_;       // the target side's; a word, or a piece, is its step

  std::atomic<bool> input_ended_{false};
  alignas(64) std::atomic<std::int64_t> utterances_done_{0};

  // The source side's.
  alignas(64) std::int64_t words_counted_ = 0;
  std::int64_t utterances_ended_ = 0;
  std::int64_t dropped_samples_ = 0;
  std::int64_t row_end_;  // of the next row, in samples
  bool between_utterances_ = false;
  bool source_ended_ = false;

  // The target side's.
  alignas(64) std::int64_t seen_ = 0;  // source rows of the utterance
  std::int64_t counted_words_ = 0;     // by CTC
  std::int64_t awaited_words_ = 0;     // nothing is written below this count
  std::int64_t written_words_ = 0;
  std::int64_t word_pieces_ = 0;
  std::array<Token, static_cast<std::size_t>(kMostPiecesOfWord)> word_{};
  std::int64_t first_partial_ = 0;
  std::int64_t num_partial_ = 0;
  std::int64_t utterance_ = 0;
  std::int64_t events_put_ = 0;
  std::int64_t samples_ = 0;        // end of the newest row, or of the input
  std::int64_t start_samples_ = 0;  // where the utterance began
  std::int64_t sounding_ns_ = 0;    // arrival of the newest row with a label; 0: none
  std::int64_t due_ns_ = 0;         // of the newest row
  std::int64_t word_cost_ns_ = 0;   // of what was written since a step was counted
  Token last_;                      // written, not yet fed
  bool writing_ = false;
  bool row_open_ = false;        // the newest row's work goes on
  bool ends_utterance_ = false;  // the newest row
  bool finishing_ = false;       // every row of the utterance is seen
  bool sounded_ = false;         // a row of the utterance had a label
  bool full_ = false;            // no room for more text
  bool at_end_ = false;
  bool ended_ = false;
};

}  // namespace sluice
