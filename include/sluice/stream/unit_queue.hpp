// SPDX-License-Identifier: MIT
/// What was fed and not yet read: a bounded queue of source units, each a few tokens.
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
#include "sluice/core/spsc_ring.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// A source unit in the queue.
struct QueuedUnit {
  std::int64_t first = 0;  ///< its first token, counted from the first ever pushed
  std::int64_t tokens = 0;
  std::int64_t arrival_ns = 0;  ///< when it was fed
  bool last = false;            ///< nothing follows
};

/// Units in order of arrival; one thread pushes, one pops, no lock. Allocates at construction only.
class UnitQueue {
 public:
  /// \throws Error(kConfig) unless both are at least 1 (and at most 2^32).
  UnitQueue(std::int64_t max_units, std::int64_t max_tokens)
      : units_(checked("max_units", max_units)),
        tokens_(static_cast<std::size_t>(checked("max_tokens", max_tokens))) {}

  std::int64_t max_tokens() const noexcept { return static_cast<std::int64_t>(tokens_.size()); }

  /// Producer. False when there is no room for all of it: nothing was pushed then.
  bool try_push(std::span<const Token> unit, std::int64_t arrival_ns, bool last) noexcept {
    const auto count = static_cast<std::int64_t>(unit.size());
    const std::int64_t used = pushed_tokens_ - popped_tokens_.load(std::memory_order_acquire);
    if (units_.room() == 0 || count > max_tokens() - used) return false;
    for (std::int64_t i = 0; i < count; ++i)
      tokens_[place(pushed_tokens_ + i)] = unit[static_cast<std::size_t>(i)];
    units_.try_push({pushed_tokens_, count, arrival_ns, last});
    pushed_tokens_ += count;
    return true;
  }

  /// Consumer: the oldest unit, or null.
  const QueuedUnit* front() const noexcept { return units_.front(); }
  /// Consumer: copies the oldest unit's tokens. Precondition: out holds them.
  void copy_front(std::span<Token> out) const noexcept {
    const QueuedUnit& unit = *units_.front();
    SLUICE_ASSERT(static_cast<std::int64_t>(out.size()) >= unit.tokens);
    for (std::int64_t i = 0; i < unit.tokens; ++i)
      out[static_cast<std::size_t>(i)] = tokens_[place(unit.first + i)];
  }
  /// Consumer. Precondition: front() is not null.
  void pop() noexcept {
    const QueuedUnit& unit = *units_.front();
    popped_tokens_.store(unit.first + unit.tokens, std::memory_order_release);
    units_.pop();
  }

 private:
  static std::int64_t checked(const char* field, std::int64_t value) {
    constexpr std::int64_t kMost = std::int64_t{1} << 32;
    if (value < 1 || value > kMost)
      throw Error(ErrorCode::kConfig, {"queue size out of range", "UnitQueue", field,
                                       "1 to " + std::to_string(kMost), std::to_string(value)});
    return value;
  }
  std::size_t place(std::int64_t token) const noexcept {
    return static_cast<std::size_t>(token % max_tokens());
  }

  SpscRing<QueuedUnit> units_;
  Buffer<Token> tokens_;
  std::int64_t pushed_tokens_ = 0;  // the producer's
  std::atomic<std::int64_t> popped_tokens_{0};
};

}  // namespace sluice
