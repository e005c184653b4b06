// SPDX-License-Identifier: MIT
/// The record that stream metrics are computed from: what was read and written, when, in fixed
/// memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// What happened to a token.
enum class EventKind : std::uint8_t {
  kInput,        ///< read from the source
  kOutput,       ///< written, final
  kProvisional,  ///< written, may still be revised
};

/// One token read or written.
struct Event {
  std::int64_t source_clock;  ///< position in the source, in its own unit (tokens, samples, frames)
  std::int64_t time_ns;       ///< monotonic_ns() when it happened
  Token token;
  EventKind kind;
};

/// The latest `capacity` events, oldest first; older ones are dropped and counted. One thread at a
/// time. Allocates at construction only (24 bytes an event).
class EventLog {
 public:
  /// \throws Error(kConfig) unless 1 <= capacity <= 2^32.
  explicit EventLog(std::int64_t capacity) : ring_(checked(capacity)) {}

  /// Appends an event. O(1); overwrites the oldest when full.
  void record(const Event& event) noexcept {
    ring_[static_cast<std::size_t>(recorded_ % capacity())] = event;
    ++recorded_;
  }

  /// Event `index` of size(), 0 the oldest still held.
  const Event& operator[](std::int64_t index) const {
    SLUICE_ASSERT(index >= 0 && index < size());
    return ring_[static_cast<std::size_t>((dropped() + index) % capacity())];
  }

  /// Calls visit(event) for every event held, oldest first.
  template <class Visitor>
  void for_each(Visitor&& visit) const {
    for (std::int64_t index = 0; index < size(); ++index) visit((*this)[index]);
  }

  std::int64_t capacity() const noexcept { return static_cast<std::int64_t>(ring_.size()); }
  std::int64_t size() const noexcept { return recorded_ < capacity() ? recorded_ : capacity(); }
  /// Events overwritten since construction or clear().
  std::int64_t dropped() const noexcept { return recorded_ - size(); }

  /// Forgets all events and the drop count.
  void clear() noexcept { recorded_ = 0; }

 private:
  static std::size_t checked(std::int64_t capacity) {
    constexpr std::int64_t kMax = std::int64_t{1} << 32;
    if (capacity < 1 || capacity > kMax)
      throw Error(ErrorCode::kConfig, {"event capacity out of range", "EventLog", "capacity",
                                       "1 to " + std::to_string(kMax), std::to_string(capacity)});
    return static_cast<std::size_t>(capacity);
  }

  Buffer<Event> ring_;         // [capacity], event n at n % capacity
  std::int64_t recorded_ = 0;  // since construction or clear()
};

}  // namespace sluice
