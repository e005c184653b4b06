// SPDX-License-Identifier: MIT
/// A bounded queue between two threads without a lock.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "sluice/core/config.hpp"
#include "sluice/core/memory.hpp"

namespace sluice {

/// First in, first out; one thread pushes, one thread pops. Allocates at construction only.
template <class T>
class SpscRing {
 public:
  /// Precondition: capacity >= 1.
  explicit SpscRing(std::int64_t capacity) : items_(static_cast<std::size_t>(capacity)) {
    SLUICE_ASSERT(capacity >= 1);
  }

  std::int64_t capacity() const noexcept { return static_cast<std::int64_t>(items_.size()); }

  /// Producer: items that can be pushed now, at least.
  std::int64_t room() const noexcept {
    return capacity() -
           (pushed_.load(std::memory_order_relaxed) - popped_.load(std::memory_order_acquire));
  }
  /// Producer. False when full: nothing was pushed then.
  bool try_push(const T& item) noexcept {
    if (room() == 0) return false;
    const std::int64_t place = pushed_.load(std::memory_order_relaxed);
    items_[static_cast<std::size_t>(place % capacity())] = item;
    pushed_.store(place + 1, std::memory_order_release);
    return true;
  }
  /// Consumer. False when empty.
  bool try_pop(T& item) noexcept {
    const T* next = front();
    if (next == nullptr) return false;
    item = *next;
    pop();
    return true;
  }
  /// Consumer: the oldest item, or null. Stays valid until pop().
  const T* front() const noexcept {
    const std::int64_t place = popped_.load(std::memory_order_relaxed);
    if (place == pushed_.load(std::memory_order_acquire)) return nullptr;
    return &items_[static_cast<std::size_t>(place % capacity())];
  }
  /// Consumer. Precondition: front() is not null.
  void pop() noexcept {
    popped_.store(popped_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }

 private:
  Buffer<T> items_;
  alignas(64) std::atomic<std::int64_t> pushed_{0};
  alignas(64) std::atomic<std::int64_t> popped_{0};
};

}  // namespace sluice
