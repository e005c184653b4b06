// SPDX-License-Identifier: MIT
/// A stream that listens: samples in, in pieces of any length; words out while the speaker goes on.
/// Verbs: accept, finish, next / poll / for_each, stop.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <semaphore>
#include <span>
#include <string>
#include <thread>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/core/signal.hpp"
#include "sluice/model/listen_model.hpp"
#include "sluice/stream/listener_engine.hpp"
#include "sluice/stream/listener_metrics.hpp"

namespace sluice {

/// One audio stream through a listening model, for as long as the audio lasts: utterances end at
/// pauses, then both groups start anew, so memory is what the constructor took.
///
///     Listener listener(model, ListenerOptions{.wait_words = 2});
///     while (microphone.read(samples)) {
///       listener.accept(samples);
///       listener.for_each([&](const ListenEvent& event) { show(event); });
///     }
///     listener.finish();
///     listener.for_each([&](const ListenEvent& event) { show(event); });
///
/// One thread calls accept() and finish(), one takes events. Without threads
/// (ListenerOptions::concurrent false, as above) they must be the same, and the work is done when
/// events are asked for. With threads, work goes on by itself; for_each() then waits for the end of
/// the stream, and poll() is what a loop like the above calls. They may be the same thread then
/// only where audio comes no faster than it is listened to: accept() waits for room in the queue,
/// the queue for the target side, and that for events to be taken. Same audio: same words at the
/// same audio times, bit for bit, for any pieces, either way, and for any number of threads a side,
/// unless ListenerOptions lets a deadline decide what is put off or dropped. After construction
/// nothing allocates.
class Listener {
 public:
  /// Allocates everything and, if concurrent, starts the two threads.
  /// \throws Error(kConfig) naming the option that makes no sense.
  explicit Listener(std::shared_ptr<const ListenModel> model, const ListenerOptions& options = {})
      : engine_(std::move(model), options) {
    if (!options.concurrent) return;
    source_thread_ = std::jthread([this] { run_source(); });
    try {
      target_thread_ = std::jthread([this] { run_target(); });
    } catch (...) {
      stop();  // or the first thread would be waited for in vain
      throw;
    }
  }
  ~Listener() { stop(); }
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  const ListenModel& model() const { return engine_.model(); }
  const ListenerOptions& options() const { return engine_.options(); }
  const ListenerEngine& engine() const { return engine_; }

  /// Takes samples: mono, at the model's rate, in [-1, 1] (louder ones are taken as they are).
  /// Returns how many: all, unless the stream was stopped or, without threads, events wait to be
  /// taken. With threads it waits while the queue is full. None: nothing happens.
  /// \throws Error(kFormat) naming the first sample that is not a finite number, Error(kOrder)
  /// after finish(). Nothing was taken then.
  std::size_t accept(std::span<const float> samples) {
    if (finished_input_)
      throw Error(ErrorCode::kOrder, {"the input has ended", "Listener::accept", "", "", ""});
    for (std::size_t i = 0; i < samples.size(); ++i)
      if (!std::isfinite(samples[i]))
        throw Error(ErrorCode::kFormat, {"a sample is no number", "Listener::accept",
                                         "sample " + std::to_string(engine_.queue().pushed() +
                                                                    static_cast<std::int64_t>(i)),
                                         "a finite value", std::to_string(samples[i])});
    const std::int64_t now = engine_.now_ns();
    std::size_t taken = 0;
    while (taken < samples.size() && !stopping()) {
      const std::uint32_t seen = caller_signal_.now();
      const std::size_t more = engine_.queue().push(samples.subspan(taken), now);
      taken += more;
      if (more > 0) {
        engine_.metrics().on_samples(static_cast<std::int64_t>(more));
        source_signal_.raise();
      } else if (options().concurrent) {
        caller_signal_.wait(seen);
      } else if (!step()) {
        break;
      }
    }
    return taken;
  }

  /// Nothing follows: the last utterance is written to its end. Again: without effect.
  void finish() {
    if (finished_input_) return;
    finished_input_ = true;
    engine_.metrics().on_input_end(engine_.now_ns());
    engine_.end_input();
    source_signal_.raise();
  }

  /// The next event. With threads: waits for it; empty after the last one. Without: works until
  /// there is one; empty also when more samples are needed first (is_finished() tells).
  std::optional<ListenEvent> next() {
    for (;;) {
      const bool finished = is_finished();
      if (auto event = take()) return event;
      if (finished) return std::nullopt;
      if (options().concurrent)
        available_.acquire();
      else if (!step())
        return take();
    }
  }
  /// next() that waits at most so long: empty then too.
  template <class Rep, class Period>
  std::optional<ListenEvent> next_for(std::chrono::duration<Rep, Period> timeout) {
    if (!options().concurrent) return next();
    const auto until = std::chrono::steady_clock::now() + timeout;
    for (;;) {
      const bool finished = is_finished();
      if (auto event = take()) return event;
      if (finished || !available_.try_acquire_until(until)) return std::nullopt;
    }
  }
  /// The next event if there is one now. Does no work.
  std::optional<ListenEvent> poll() { return take(); }
  /// Calls visit(event) for every event until the stream ends (without threads: or starves).
  template <class Visit>
  void for_each(Visit&& visit) {
    while (const std::optional<ListenEvent> event = next()) visit(*event);
  }

  /// Ends both sides at their next step. Events written so far can still be taken. Any thread.
  void stop() noexcept {
    stopping_.store(true, std::memory_order_release);
    finished_.store(true, std::memory_order_release);
    wake_all();
  }
  /// Whether no further events will be written.
  bool is_finished() const noexcept { return finished_.load(std::memory_order_acquire); }

  /// Figures up to now. Any thread.
  ListenerReport report() const { return engine_.metrics().report(model().sample_rate()); }

 private:
  using Progress = ListenerEngine::Progress;

  bool stopping() const noexcept { return stopping_.load(std::memory_order_acquire); }

  std::optional<ListenEvent> take() {
    ListenEvent event;
    if (!engine_.events().try_pop(event)) return std::nullopt;
    // The count only says that it may be worth looking: keep it from growing.
    static_cast<void>(available_.try_acquire());
    target_signal_.raise();  // room
    return event;
  }

  /// Without threads: does something. False: nothing can be done now.
  bool step() {
    if (is_finished()) return false;
    switch (engine_.step_target()) {
      case Progress::kStepped: return true;
      case Progress::kEnded: finished_.store(true, std::memory_order_release); return true;
      case Progress::kNeedsRoom:
      case Progress::kNeedsSamples: return false;
      case Progress::kNeedsSource: break;
    }
    const Progress source = engine_.step_source();
    return source == Progress::kStepped || source == Progress::kEnded;
  }

  void run_source() {
    while (!stopping()) {
      const std::uint32_t seen = source_signal_.now();
      const Progress progress = engine_.step_source();
      if (progress == Progress::kNeedsSamples || progress == Progress::kNeedsRoom) {
        source_signal_.wait(seen);
        continue;
      }
      target_signal_.raise();
      caller_signal_.raise();
      if (progress == Progress::kEnded) return;
    }
  }

  void run_target() {
    while (!stopping()) {
      const std::uint32_t seen = target_signal_.now();
      const std::int64_t before = engine_.events_put();
      const Progress progress = engine_.step_target();
      if (const std::int64_t put = engine_.events_put() - before; put > 0)
        available_.release(static_cast<std::ptrdiff_t>(put));
      if (progress == Progress::kEnded) break;
      if (progress == Progress::kStepped)
        source_signal_.raise();  // room behind the rows seen
      else
        target_signal_.wait(seen);
    }
    finished_.store(true, std::memory_order_release);
    wake_all();
  }

  void wake_all() noexcept {
    source_signal_.raise();
    target_signal_.raise();
    caller_signal_.raise();
    available_.release();
  }

  ListenerEngine engine_;
  Signal source_signal_;  // samples, the target moved on, the end
  Signal target_signal_;  // a row, an event was taken, the end
  Signal caller_signal_;  // the queue has room, the end
  std::counting_semaphore<> available_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> finished_{false};
  bool finished_input_ = false;  // the caller's
  std::jthread source_thread_;   // last: joined before the members above go
  std::jthread target_thread_;
};

}  // namespace sluice
