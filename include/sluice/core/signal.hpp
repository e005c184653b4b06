// SPDX-License-Identifier: MIT
/// Waiting for something to change, without a lock on either side.
#pragma once

#include <atomic>
#include <cstdint>

#include "sluice/core/threads.hpp"

namespace sluice {

/// An event count. The waiter reads now(), looks at the state it waits for, and if that is not yet
/// there calls wait() with what it read: a raise() in between is never missed. The one who changes
/// the state calls raise() afterwards. Any number of threads on both sides; raise() takes no lock,
/// and enters the kernel only if somebody sleeps. Allocates nothing.
class Signal {
 public:
  std::uint32_t now() const noexcept { return count_.load(std::memory_order_acquire); }

  void raise() noexcept {
    count_.fetch_add(1, std::memory_order_acq_rel);
    count_.notify_all();
  }

  /// Returns when now() differs from `seen`: spins briefly, then sleeps.
  void wait(std::uint32_t seen) const noexcept {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (now() != seen) return;
      spin_pause();
    }
    count_.wait(seen, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 200;  // about 2 to 5 microseconds

  alignas(64) std::atomic<std::uint32_t> count_{0};
};

}  // namespace sluice
