// SPDX-License-Identifier: MIT
/// The clock that every latency in the library is measured with.
#pragma once

#include <chrono>
#include <cstdint>

namespace sluice {

/// Now, in nanoseconds since an arbitrary start that is fixed while the process runs. Never goes
/// back; the difference of two readings is a duration. Any thread.
inline std::int64_t monotonic_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace sluice
