// SPDX-License-Identifier: MIT
/// Audio that was accepted and not yet processed: a bounded queue of samples between two threads
/// that remembers when each piece arrived.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"

namespace sluice {

/// Samples in order; one thread pushes, one pops, no lock. Allocates at construction only.
class SampleQueue {
 public:
  /// \throws Error(kConfig) unless 1 <= capacity <= 2^32, in samples.
  explicit SampleQueue(std::int64_t capacity)
      : samples_(static_cast<std::size_t>(checked(capacity))), arrivals_(kArrivals) {}

  std::int64_t capacity() const noexcept { return static_cast<std::int64_t>(samples_.size()); }
  /// Producer: samples ever pushed.
  std::int64_t pushed() const noexcept { return pushed_.load(std::memory_order_relaxed); }

  /// Producer: samples that can be pushed now, at least.
  std::int64_t room() const noexcept {
    return capacity() - (pushed() - popped_.load(std::memory_order_acquire));
  }
  /// Producer: takes what there is room for; returns how many samples.
  std::size_t push(std::span<const float> samples, std::int64_t arrival_ns) noexcept {
    const std::int64_t first = pushed();
    const std::size_t count =
        std::min(samples.size(), static_cast<std::size_t>(std::max<std::int64_t>(room(), 0)));
    if (count == 0) return 0;
    const std::size_t place = at(first);
    const std::size_t before_end = std::min(count, samples_.size() - place);
    std::copy_n(samples.data(), before_end, samples_.data() + place);
    std::copy_n(samples.data() + before_end, count - before_end, samples_.data());
    // Pieces are stamped by their ends. When too many wait, the newest stamp stands for several.
    const std::int64_t stamps = stamped_.load(std::memory_order_relaxed);
    if (stamps - retired_.load(std::memory_order_acquire) < kArrivals) {
      arrivals_[static_cast<std::size_t>(stamps % kArrivals)] = {
          first + static_cast<std::int64_t>(count), arrival_ns};
      stamped_.store(stamps + 1, std::memory_order_release);
    }
    pushed_.store(first + static_cast<std::int64_t>(count), std::memory_order_release);
    return count;
  }

  /// Consumer: the oldest samples, as many as lie in one piece; empty if there are none. Valid
  /// until they are popped.
  std::span<const float> front() const noexcept {
    const std::int64_t first = popped_.load(std::memory_order_relaxed);
    const auto waiting = static_cast<std::size_t>(pushed_.load(std::memory_order_acquire) - first);
    const std::size_t place = at(first);
    return {samples_.data() + place, std::min(waiting, samples_.size() - place)};
  }
  /// Consumer: samples that wait, at least.
  std::int64_t waiting() const noexcept {
    return pushed_.load(std::memory_order_acquire) - popped_.load(std::memory_order_relaxed);
  }
  /// Consumer. Precondition: as many wait.
  void pop(std::size_t count) noexcept {
    popped_.store(popped_.load(std::memory_order_relaxed) + static_cast<std::int64_t>(count),
                  std::memory_order_release);
  }
  /// Consumer: when the sample before `sample` (the last of those ending there) arrived. Asked with
  /// places that never fall, at most what was pushed as far as waiting() has told.
  std::int64_t arrival_before(std::int64_t sample) noexcept {
    std::int64_t oldest = retired_.load(std::memory_order_relaxed);
    const std::int64_t stamps = stamped_.load(std::memory_order_acquire);
    while (oldest < stamps) {
      const Arrival& arrival = arrivals_[static_cast<std::size_t>(oldest % kArrivals)];
      last_arrival_ns_ = arrival.time_ns;
      if (arrival.end >= sample) break;
      ++oldest;
    }
    arrival_known_ = oldest < stamps;
    retired_.store(oldest, std::memory_order_release);
    return last_arrival_ns_;
  }
  /// Consumer: whether that was the time of the piece which arrival_before() was asked about, or of
  /// one that stands for it. False where so many pieces wait that the newest have no stamp: it was
  /// that of an older piece then.
  bool arrival_known() const noexcept { return arrival_known_; }

 private:
  static constexpr std::int64_t kArrivals = 4096;

  struct Arrival {
    std::int64_t end = 0;  // samples up to and with the piece
    std::int64_t time_ns = 0;
  };

  static std::int64_t checked(std::int64_t capacity) {
    constexpr std::int64_t kMost = std::int64_t{1} << 32;
    if (capacity < 1 || capacity > kMost)
      throw Error(ErrorCode::kConfig, {"queue size out of range", "SampleQueue", "capacity",
                                       "1 to " + std::to_string(kMost), std::to_string(capacity)});
    return capacity;
  }
  std::size_t at(std::int64_t sample) const noexcept {
    return static_cast<std::size_t>(sample % capacity());
  }

  Buffer<float> samples_;
  Buffer<Arrival> arrivals_;
  alignas(64) std::atomic<std::int64_t> pushed_{0};
  std::atomic<std::int64_t> stamped_{0};
  alignas(64) std::atomic<std::int64_t> popped_{0};
  std::atomic<std::int64_t> retired_{0};
  std::int64_t last_arrival_ns_ = 0;  // the consumer's
  bool arrival_known_ = false;        // the consumer's
};

}  // namespace sluice
