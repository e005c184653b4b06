// SPDX-License-Identifier: MIT
/// Frames and packets handed out on a clock: a file plays as a camera or a microphone would, and a
/// consumer that is late meets the rule that it chose. Every frame is accounted for.
#pragma once

#include <algorithm>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/stream/clock.hpp"

namespace sluice {

// --- Clocks --------------------------------------------------------------------------------------

/// Time in nanoseconds, and a way to let it pass. now_ns() may jump (a wall clock that is set, a
/// machine that slept): PacedSource says what happens then. wait_until() may return early.
template <class T>
concept Clock = requires(T& clock, const T& constant, std::int64_t time_ns) {
  { constant.now_ns() }
  noexcept->std::same_as<std::int64_t>;
  clock.wait_until(time_ns);
};

/// monotonic_ns(), and sleeping.
struct MonotonicClock {
  std::int64_t now_ns() const noexcept { return monotonic_ns(); }
  void wait_until(std::int64_t time_ns) const {
    const std::int64_t left = time_ns - monotonic_ns();
    if (left > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(left));
  }
};

/// A clock that stands still until it is told otherwise: for tests, and for playing a day in a
/// second. Waiting moves it.
class VirtualClock {
 public:
  explicit VirtualClock(std::int64_t now_ns = 0) : now_ns_(now_ns) {}
  std::int64_t now_ns() const noexcept { return now_ns_; }
  void wait_until(std::int64_t time_ns) noexcept { now_ns_ = std::max(now_ns_, time_ns); }
  void advance(std::int64_t duration_ns) noexcept { now_ns_ += duration_ns; }
  /// Sets any time, an earlier one too.
  void set(std::int64_t now_ns) noexcept { now_ns_ = now_ns; }

 private:
  std::int64_t now_ns_;
};

// --- Frames --------------------------------------------------------------------------------------

/// Where frames come from: a file, a pipe, a generator. A `Frame` owns memory that is used again
/// for the next one; frames are moved by swapping.
template <class T>
concept FrameSource = requires(T& source, typename T::Frame& frame, const typename T::Frame& read) {
  requires std::movable<typename T::Frame>;
  /// A frame with all the memory that reading will need.
  { source.make_frame() } -> std::same_as<typename T::Frame>;
  /// Reads the next frame; false at the end. May throw what the source throws.
  { source.read(frame) } -> std::same_as<bool>;
  /// When the frame is complete, in nanoseconds from the stream's start: its last sample, or its
  /// time stamp. Never decreases.
  { source.time_ns(read) } -> std::same_as<std::int64_t>;
};

/// Sources whose frames can be joined: merge(into, next) puts `next` behind (audio) or in place of
/// (pictures) `into` and returns true, or returns false and changes nothing when there is no room.
template <class T>
concept MergingSource = FrameSource<T> && requires(T& source, typename T::Frame& frame) {
  { source.merge(frame, frame) } -> std::same_as<bool>;
};

/// What happens to a frame that is due while `queue_length` earlier ones still wait.
enum class LatePolicy : std::uint8_t {
  kBlock,       ///< it waits in the source: nothing is lost, lateness grows
  kDropOldest,  ///< the oldest waiting frame is lost: the newest are seen
  kDropNewest,  ///< it is lost itself: what waits stays in order without a gap in it
  kCoalesce,    ///< it is joined with the newest waiting frame; where that refuses, as kBlock
};

struct PacedSourceConfig {
  /// Media time per clock time: 1 is real time, 2 twice as fast; 0: as fast as possible, every
  /// frame is due at once, none is late, and no rule is needed.
  double speed = 1;
  LatePolicy late = LatePolicy::kBlock;
  /// Frames that may wait, due and not taken: 1 or more.
  std::int64_t queue_length = 1;
  /// A frame taken later than this after it was due counts as late.
  std::int64_t late_after_ns = 0;
  /// When a frame is further behind its time than this, the clock is taken to have jumped (the
  /// machine slept, a debugger held the program): the schedule moves so that this frame is due now,
  /// and nothing is dropped for it. The default: never, lateness is lateness.
  std::int64_t resync_after_ns = std::numeric_limits<std::int64_t>::max();
  /// Asked by next() before it waits and ten times a second while it does: where it answers true
  /// the frames end. For programs that end on a signal, whenever the next frame may be due. Null:
  /// never.
  bool (*stop_when)() = nullptr;
};

/// What became of the frames. read = taken + dropped_oldest + dropped_newest + coalesced + those
/// that still wait.
struct PacedSourceCounts {
  std::int64_t read = 0;            ///< from the source
  std::int64_t taken = 0;           ///< by next() and poll()
  std::int64_t dropped_oldest = 0;  ///< lost to kDropOldest
  std::int64_t dropped_newest = 0;  ///< lost to kDropNewest
  std::int64_t coalesced = 0;       ///< joined with the frame before them
  std::int64_t late = 0;            ///< taken after their time
  std::int64_t max_late_ns = 0;     ///< the latest of them
  std::int64_t waits = 0;           ///< times that next() let time pass
  std::int64_t clock_back = 0;      ///< times that the clock was seen to go back
  std::int64_t clock_ahead = 0;     ///< times that resync_after_ns moved the schedule
};

enum class FrameStatus : std::uint8_t {
  kFrame,  ///< the frame was written
  kNone,   ///< none is due yet
  kEnd,    ///< none will come any more
};

/// Plays a source. A frame of media time m is due at start + m / speed, start being when start(),
/// or the first poll() or next(), was called; due times come from frames, not from sums, so that
/// hours do not drift. The source is read when its frame is due, by the caller's thread, one frame
/// ahead.
///
/// A clock that goes back: the schedule goes back with it, as if the time between the two readings
/// had been none; nothing stalls, nothing repeats. A clock that jumps ahead: all frames in between
/// are due and meet the late policy, or the schedule moves (resync_after_ns).
///
/// One thread at a time. Allocates at construction only, as long as the source does.
template <FrameSource Source, Clock ClockType = MonotonicClock>
class PacedSource {
 public:
  using Frame = typename Source::Frame;

  /// `source` and `clock` must outlive this object.
  /// \throws Error(kConfig) naming the field, or if kCoalesce is asked of a source that cannot.
  PacedSource(Source& source, ClockType& clock, PacedSourceConfig config)
      : source_(source), clock_(clock), config_(checked(config)), pending_(source.make_frame()) {
    queue_.reserve(static_cast<std::size_t>(config.queue_length));
    for (std::int64_t i = 0; i < config.queue_length; ++i) queue_.push_back(source.make_frame());
  }

  /// A frame to hand to next() and poll().
  Frame make_frame() { return source_.make_frame(); }

  /// Media time 0 is now.
  void start() noexcept {
    origin_ns_ = last_ns_ = clock_.now_ns();
    started_ = true;
  }

  /// The oldest frame that is due, swapped into `frame`; never waits.
  FrameStatus poll(Frame& frame) {
    const std::int64_t now = read_clock();
    admit(now);
    if (waiting_ == 0) {
      if (!ended_ || has_pending_) return FrameStatus::kNone;
      if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
      return FrameStatus::kEnd;
    }
    std::swap(frame, queue_[place(0)]);
    const std::int64_t late = now - due_ns(frame);
    if (paced() && late > config_.late_after_ns) {
      ++counts_.late;
      counts_.max_late_ns = std::max(counts_.max_late_ns, late);
    }
    first_ = place(1);
    --waiting_;
    ++counts_.taken;
    return FrameStatus::kFrame;
  }

  /// The same, waiting until a frame is due: kFrame or kEnd.
  FrameStatus next(Frame& frame) {
    for (;;) {
      const FrameStatus status = poll(frame);
      if (status != FrameStatus::kNone) return status;
      std::int64_t until = due_ns(pending_);
      if (config_.stop_when != nullptr) {
        if (config_.stop_when()) return FrameStatus::kEnd;
        until = std::min(until, last_ns_ + kStopNs);
      }
      ++counts_.waits;
      clock_.wait_until(until);
    }
  }

  /// When a frame is due, on the clock.
  std::int64_t due_ns(const Frame& frame) const noexcept {
    if (!paced()) return last_ns_;
    return origin_ns_ +
           static_cast<std::int64_t>(static_cast<double>(source_.time_ns(frame)) / config_.speed);
  }
  /// Frames that are due and not taken.
  std::int64_t waiting() const noexcept { return waiting_; }
  const PacedSourceCounts& counts() const noexcept { return counts_; }

 private:
  static constexpr std::int64_t kStopNs = 100'000'000;

  static PacedSourceConfig checked(const PacedSourceConfig& config) {
    const auto require = [](bool sound, const char* field, const char* expected, double found) {
      if (!sound)
        throw Error(ErrorCode::kConfig, {"option out of range", "PacedSourceConfig", field,
                                         expected, std::to_string(found)});
    };
    require(config.speed >= 0 && config.speed <= 1e6, "speed", "0 to 1e6", config.speed);
    require(config.queue_length >= 1 && config.queue_length <= 65536, "queue_length", "1 to 65536",
            static_cast<double>(config.queue_length));
    require(config.late_after_ns >= 0, "late_after_ns", "at least 0",
            static_cast<double>(config.late_after_ns));
    require(config.resync_after_ns > 0, "resync_after_ns", "above 0",
            static_cast<double>(config.resync_after_ns));
    require(config.late != LatePolicy::kCoalesce || MergingSource<Source>, "late",
            "a source whose frames can be joined", 0);
    return config;
  }

  bool paced() const noexcept { return config_.speed > 0; }
  std::size_t place(std::int64_t index) const noexcept {
    return (first_ + static_cast<std::size_t>(index)) % queue_.size();
  }

  std::int64_t read_clock() noexcept {
    if (!started_) start();
    const std::int64_t now = clock_.now_ns();
    if (now < last_ns_) {
      origin_ns_ -= last_ns_ - now;
      ++counts_.clock_back;
    }
    last_ns_ = now;
    return now;
  }

  // Lets in what has become due.
  void admit(std::int64_t now) {
    for (;;) {
      if (!has_pending_) {
        if (ended_) return;
        try {
          ended_ = !source_.read(pending_);
        } catch (...) {
          ended_ = true;
          failure_ = std::current_exception();
        }
        if (ended_) return;
        has_pending_ = true;
        ++counts_.read;
      }
      if (paced()) {
        const std::int64_t behind = now - due_ns(pending_);
        if (behind < 0) return;
        if (behind > config_.resync_after_ns) {
          origin_ns_ += behind;
          ++counts_.clock_ahead;
        }
      }
      if (waiting_ == static_cast<std::int64_t>(queue_.size()) && !make_room()) return;
      if (!has_pending_) continue;  // it was dropped or joined
      std::swap(queue_[place(waiting_)], pending_);
      ++waiting_;
      has_pending_ = false;
    }
  }

  // The queue is full: false if the pending frame has to wait.
  bool make_room() {
    if (!paced()) return false;
    switch (config_.late) {
      case LatePolicy::kBlock: return false;
      case LatePolicy::kDropOldest:
        first_ = place(1);
        --waiting_;
        ++counts_.dropped_oldest;
        return true;
      case LatePolicy::kDropNewest:
        has_pending_ = false;
        ++counts_.dropped_newest;
        return true;
      case LatePolicy::kCoalesce:
        if constexpr (MergingSource<Source>) {
          if (!source_.merge(queue_[place(waiting_ - 1)], pending_)) return false;
          has_pending_ = false;
          ++counts_.coalesced;
          return true;
        }
        return false;
    }
    return false;
  }

  Source& source_;
  ClockType& clock_;
  PacedSourceConfig config_;
  std::vector<Frame> queue_;  // [queue_length], a ring
  std::size_t first_ = 0;
  std::int64_t waiting_ = 0;
  Frame pending_;  // read, and not due or not let in
  bool has_pending_ = false;
  bool ended_ = false;
  std::exception_ptr failure_;  // what ended it
  bool started_ = false;
  std::int64_t origin_ns_ = 0;
  std::int64_t last_ns_ = 0;  // the clock when it was read last
  PacedSourceCounts counts_;
};

}  // namespace sluice
