// SPDX-License-Identifier: MIT
/// A stream that reads and writes at the same time: source units are fed from any thread at any
/// rate, the source side reads them on a thread of its own, the target side writes on another, over
/// shared segments and without a copy. Verbs: feed, end_input, next / poll / for_each, stop.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <semaphore>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

#include "sluice/cache/kv_element.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/signal.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/position/group_layout.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/duplex_engine.hpp"
#include "sluice/stream/duplex_metrics.hpp"
#include "sluice/stream/duplex_options.hpp"
#include "sluice/stream/duplex_sides.hpp"
#include "sluice/stream/policy.hpp"

namespace sluice {

/// What became of a fed unit.
enum class FeedStatus : std::uint8_t {
  kAccepted,
  kFull,     ///< no room now; nothing was taken (try_feed, and feed without threads)
  kStopped,  ///< the stream has ended or was stopped: nothing was taken
};

/// A source that is read and a target that is written meanwhile.
///
/// Feeders: feed(), try_feed() and end_input() from any thread; units of several feeders are
/// serialised, each whole. Consumer: one thread takes outputs, by next(), poll(), for_each() or as
/// a range; several must take turns. stop() from any thread. What either side throws (a policy,
/// memory at start) reaches the consumer, after the outputs that came before it.
///
/// A slow consumer pauses the target, a slow target pauses the source, and a slow source lets
/// feed() block: nothing is lost, and memory is what the constructor took. Steps take no lock;
/// feeders share one among themselves.
///
/// Same units and same answers of the policy: same tokens and logits, bit for bit, with threads or
/// without (DuplexOptions::concurrent), for any number of threads a side, unless coalesce_units
/// > 1.
///
/// What computes is a type, Sides: Duplex below is this on the CPU, DuplexOn
/// (stream/duplex_backend.hpp) this on the backend of a tag.
template <ReadWritePolicy Policy, DuplexSides Sides>
class BasicDuplex {
 public:
  using Engine = DuplexEngine<Policy, Sides>;

  /// Allocates everything and, if concurrent, starts the two threads.
  /// \throws Error(kConfig) naming the option that makes no sense; Error(kUnsupported) naming what
  /// the backend does not do.
  BasicDuplex(std::shared_ptr<const typename Engine::Model> model, const DuplexOptions& options,
              Policy policy, typename Engine::Layout layout)
      : engine_(std::move(model), options, std::move(policy), std::move(layout)) {
    if (!options.concurrent) return;
    source_thread_ = std::jthread([this] { guard([this] { run_source(); }); });
    target_thread_ = std::jthread([this] { guard([this] { run_target(); }); });
  }
  ~BasicDuplex() { stop(); }
  BasicDuplex(const BasicDuplex&) = delete;
  BasicDuplex& operator=(const BasicDuplex&) = delete;

  const Engine& engine() const { return engine_; }
  const DuplexOptions& options() const { return engine_.options(); }

  /// Hands over one source unit (a word, a sentence, a frame's tokens); waits while the queue is
  /// full. `last`: nothing follows; the policy then knows when it has read this unit.
  /// \throws Error(kOrder) after end_input() or a last unit; Error(kShape) for an empty unit, one
  /// longer than max_unit_tokens, or a token outside the vocabulary; Error(kCapacity) when a full
  /// source cache could never hold it. Nothing was taken then.
  FeedStatus feed(std::span<const Token> unit, bool last = false) {
    return wait_until_taken([&] { return try_feed(unit, last); });
  }
  /// The same for a unit of embeddings (a frame of an encoder), [rows, hidden_size], already scaled
  /// as the model wants them. Needs DuplexOptions::queue_embeddings.
  /// \throws Error(kConfig) without it, Error(kFormat) for values that are not finite, and as
  /// above.
  FeedStatus feed_embeddings(MatrixView<const float> unit, bool last = false) {
    return wait_until_taken([&] { return try_feed_embeddings(unit, last); });
  }

  /// feed() that does not wait. \throws as feed().
  FeedStatus try_feed(std::span<const Token> unit, bool last = false) {
    check(unit);
    return push(unit, static_cast<std::int64_t>(unit.size()), last);
  }
  FeedStatus try_feed_embeddings(MatrixView<const float> unit, bool last = false) {
    check(unit);
    return push(unit, unit.rows, last);
  }

  /// Nothing follows. What was fed is still read; the policy learns it at the READ that finds
  /// nothing. Again: without effect.
  void end_input() {
    const std::lock_guard lock(feed_mutex_);
    end_locked();
    source_signal_.raise();
  }

  /// The next output; waits for it. Empty when the target has ended and all was taken. Without
  /// threads: works until there is an output; empty also when it needs more source first
  /// (is_finished() tells). \throws what a side threw, after all outputs.
  std::optional<DuplexOutput> next() {
    for (;;) {
      const bool finished = is_finished();
      if (auto output = take()) return output;
      if (finished) return at_end();
      if (options().concurrent)
        available_.acquire();
      else if (!work())
        return take_or_end();
    }
  }

  /// next() that waits at most so long: empty then too.
  template <class Rep, class Period>
  std::optional<DuplexOutput> next_for(std::chrono::duration<Rep, Period> timeout) {
    if (!options().concurrent) return next();
    const auto until = std::chrono::steady_clock::now() + timeout;
    for (;;) {
      const bool finished = is_finished();
      if (auto output = take()) return output;
      if (finished) return at_end();
      if (!available_.try_acquire_until(until)) return std::nullopt;
    }
  }

  /// The next output if there is one now. Without threads: does no work. \throws as next().
  std::optional<DuplexOutput> poll() {
    const bool finished = is_finished();
    if (auto output = take()) return output;
    return finished ? at_end() : std::nullopt;
  }

  /// Calls visit(output) for every output until the target ends (without threads: or starves).
  template <class Visit>
  void for_each(Visit&& visit) {
    while (const std::optional<DuplexOutput> output = next()) visit(*output);
  }

  /// Outputs as an input range: `for (const DuplexOutput& output : duplex)`.
  class Iterator {
   public:
    using value_type = DuplexOutput;
    using difference_type = std::ptrdiff_t;
    using iterator_concept = std::input_iterator_tag;

    Iterator() = default;
    explicit Iterator(BasicDuplex* duplex) : duplex_(duplex), output_(duplex->next()) {}
    const DuplexOutput& operator*() const { return *output_; }
    Iterator& operator++() {
      output_ = duplex_->next();
      return *this;
    }
    void operator++(int) { ++*this; }
    friend bool operator==(const Iterator& iterator, std::default_sentinel_t) {
      return !iterator.output_;
    }

   private:
    BasicDuplex* duplex_ = nullptr;
    std::optional<DuplexOutput> output_;
  };
  Iterator begin() { return Iterator(this); }
  std::default_sentinel_t end() { return {}; }

  /// Ends both sides at their next step; does not wait. Outputs written so far can still be taken.
  /// Any thread, also from a policy.
  void stop() noexcept {
    stopping_.store(true, std::memory_order_release);
    if (!options().concurrent) finished_.store(true, std::memory_order_release);
    wake_all();
  }

  /// Whether the target has ended: no further outputs will be written.
  bool is_finished() const noexcept { return finished_.load(std::memory_order_acquire); }
  /// Why. kRunning until is_finished().
  DuplexEnd end_reason() const {
    if (!is_finished()) return DuplexEnd::kRunning;
    const std::lock_guard lock(error_mutex_);
    if (error_) return DuplexEnd::kError;
    return reason_.load(std::memory_order_acquire);
  }

  /// Figures up to now. Any thread.
  DuplexReport report() const { return engine_.metrics().report(); }
  /// Source units visible to each final token (DuplexMetrics::delays). Any thread.
  std::span<const std::int64_t> delays() const { return engine_.metrics().delays(); }

 private:
  using Progress = typename Engine::Progress;

  bool stopping() const noexcept { return stopping_.load(std::memory_order_acquire); }

  template <class TryFeed>
  FeedStatus wait_until_taken(TryFeed&& try_feed) {
    for (;;) {
      const std::uint32_t seen = feeder_signal_.now();
      const FeedStatus status = try_feed();
      if (status != FeedStatus::kFull || !options().concurrent) return status;
      feeder_signal_.wait(seen);
    }
  }

  template <class Unit>
  FeedStatus push(const Unit& unit, std::int64_t count, bool last) {
    const std::lock_guard lock(feed_mutex_);
    if (input_ended_)
      throw Error(ErrorCode::kOrder, {"the input has ended", "Duplex::feed", "", "", ""});
    const CacheOptions& source = options().source;
    if (source.is_bounded() && fed_tokens_ + count > source.capacity)
      throw Error(
          ErrorCode::kCapacity,
          {"the full source cache cannot hold that many tokens", "Duplex::feed", "unit",
           "at most " + std::to_string(source.capacity - fed_tokens_), std::to_string(count)});
    if (is_finished() || stopping()) return FeedStatus::kStopped;
    const std::int64_t now = monotonic_ns();
    if (!engine_.queue().try_push(unit, now, last)) return FeedStatus::kFull;
    engine_.metrics().on_fed(now);
    fed_tokens_ += count;
    if (last) end_locked();
    source_signal_.raise();
    return FeedStatus::kAccepted;
  }

  [[noreturn]] static void does_not_fit(const std::string& field, const std::string& expected,
                                        std::int64_t found) {
    throw Error(ErrorCode::kShape,
                {"unit does not fit", "Duplex::feed", field, expected, std::to_string(found)});
  }
  void check_count(std::int64_t count, const char* what) const {
    if (count < 1 || count > options().max_unit_tokens)
      does_not_fit("unit",
                   "1 to max_unit_tokens = " + std::to_string(options().max_unit_tokens) + what,
                   count);
  }
  void check(std::span<const Token> unit) const {
    check_count(static_cast<std::int64_t>(unit.size()), " tokens");
    const std::int64_t vocab = engine_.model().config().vocab_size;
    for (std::size_t i = 0; i < unit.size(); ++i)
      if (unit[i] < 0 || unit[i] >= vocab)
        does_not_fit("unit[" + std::to_string(i) + "]", "0 to " + std::to_string(vocab - 1),
                     unit[i]);
  }
  void check(MatrixView<const float> unit) const {
    if (options().queue_embeddings == 0)
      throw Error(ErrorCode::kConfig, {"no room for embeddings", "Duplex::feed_embeddings",
                                       "queue_embeddings", "at least max_unit_tokens", "0"});
    check_count(unit.rows, " rows");
    const std::int64_t width = engine_.model().config().hidden_size;
    if (unit.cols != width) does_not_fit("columns", std::to_string(width), unit.cols);
    for (std::int64_t r = 0; r < unit.rows; ++r)
      for (std::int64_t c = 0; c < width; ++c)
        if (!std::isfinite(unit.row(r)[c]))
          throw Error(ErrorCode::kFormat,
                      {"an embedding is no number", "Duplex::feed_embeddings",
                       "unit[" + std::to_string(r) + ", " + std::to_string(c) + "]",
                       "a finite value", std::to_string(unit.row(r)[c])});
  }

  void end_locked() {
    input_ended_ = true;
    engine_.end_input();
  }

  std::optional<DuplexOutput> take() {
    DuplexOutput output;
    if (!engine_.outputs().try_pop(output)) return std::nullopt;
    // The count only says that it may be worth looking: keep it from growing.
    static_cast<void>(available_.try_acquire());
    target_signal_.raise();  // room
    return output;
  }

  std::optional<DuplexOutput> at_end() {
    const std::lock_guard lock(error_mutex_);
    if (error_) std::rethrow_exception(error_);
    return std::nullopt;
  }
  std::optional<DuplexOutput> take_or_end() {
    if (auto output = take()) return output;
    return is_finished() ? at_end() : std::nullopt;
  }

  // ---- without threads -----------------------------------------------------------------------

  /// Steps until there is an output. False: nothing more can be done now.
  bool work() {
    bool more = true;
    guard([&] {
      while (!stopping() && engine_.outputs().front() == nullptr) {
        const Progress progress = engine_.step_target();
        if (progress == Progress::kEnded) {
          conclude();
          more = false;
          return;
        }
        // A READ: the source side does its work now.
        if (progress == Progress::kNeedsSource) {
          const Progress source = engine_.step_source();
          if (source == Progress::kNeedsSource || source == Progress::kNeedsRoom) {
            more = false;
            return;
          }
        }
      }
    });
    return more && !is_finished();
  }

  // ---- with threads --------------------------------------------------------------------------

  void run_source() {
    while (!stopping() && !is_finished()) {
      const std::uint32_t seen = source_signal_.now();
      const Progress progress = engine_.step_source();
      if (progress == Progress::kNeedsSource || progress == Progress::kNeedsRoom) {
        source_signal_.wait(seen);
        continue;
      }
      target_signal_.raise();
      feeder_signal_.raise();
      if (progress == Progress::kEnded) return;
    }
  }

  void run_target() {
    std::int64_t units_seen = 0;
    while (!stopping()) {
      const std::uint32_t seen = target_signal_.now();
      const std::int64_t before = engine_.outputs_put();
      const Progress progress = engine_.step_target();
      if (const std::int64_t put = engine_.outputs_put() - before; put > 0)
        available_.release(static_cast<std::ptrdiff_t>(put));
      if (engine_.units_read() != units_seen) {
        units_seen = engine_.units_read();
        source_signal_.raise();  // room behind the snapshot
      }
      if (progress == Progress::kEnded) break;
      if (progress != Progress::kStepped) target_signal_.wait(seen);
    }
    conclude();
  }

  void conclude() {
    if (stopping()) engine_.finish(DuplexEnd::kStopped);
    reason_.store(engine_.end(), std::memory_order_release);
    finished_.store(true, std::memory_order_release);
    wake_all();
  }

  void wake_all() noexcept {
    source_signal_.raise();
    target_signal_.raise();
    feeder_signal_.raise();
    available_.release();
  }

  /// Runs one side; what it throws ends both.
  template <class Side>
  void guard(Side&& side) noexcept {
    try {
      side();
    } catch (...) {
      {
        const std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
      stopping_.store(true, std::memory_order_release);
      finished_.store(true, std::memory_order_release);
      wake_all();
    }
  }

  Engine engine_;
  Signal source_signal_;  // a unit was fed, the target moved on, the end
  Signal target_signal_;  // a unit was published, an output was taken, the end
  Signal feeder_signal_;  // the queue has room, the end
  std::counting_semaphore<> available_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> finished_{false};
  std::atomic<DuplexEnd> reason_{DuplexEnd::kStopped};
  std::mutex feed_mutex_;
  bool input_ended_ = false;     // under feed_mutex_
  std::int64_t fed_tokens_ = 0;  // under feed_mutex_
  mutable std::mutex error_mutex_;
  std::exception_ptr error_;    // under error_mutex_
  std::jthread source_thread_;  // last: joined before the members above go
  std::jthread target_thread_;
};

namespace detail {

/// Where each group counts for itself from 0.
template <GroupLayout Layout>
Layout default_layout() {
  if constexpr (std::is_same_v<Layout, GroupedLayout>)
    return GroupedLayout::group_positions();
  else
    return Layout();
}

}  // namespace detail

/// BasicDuplex on the CPU. Key and Value are the elements of both groups' caches.
template <ReadWritePolicy Policy, KvElement Key = f16, KvElement Value = Key,
          GroupLayout Layout = GroupedLayout>
class Duplex : public BasicDuplex<Policy, CpuDuplexSides<Key, Value, Layout>> {
 public:
  /// \throws Error(kConfig) naming the option that makes no sense.
  Duplex(std::shared_ptr<const Decoder> model, const DuplexOptions& options, Policy policy,
         Layout layout = detail::default_layout<Layout>())
      : BasicDuplex<Policy, CpuDuplexSides<Key, Value, Layout>>(
            std::move(model), options, std::move(policy), std::move(layout)) {}
};

}  // namespace sluice
