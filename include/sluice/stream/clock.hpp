// SPDX-License-Identifier: MIT
/// The clock that every latency in the library is measured with.
#pragma once

#include <chrono>
#include <concepts>
#include <cstdint>

namespace sluice {

/// Now, in nanoseconds since an arbitrary start that is fixed while the process runs. Never goes
/// back; the difference of two readings is a duration. Any thread.
inline std::int64_t monotonic_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// Where a stream reads the time: monotonic_ns(), or a clock of the caller's, so that what depends
/// on time can be tested and replayed. A reference: the clock must outlive it. Any thread, if the
/// clock may be read by any.
class ClockView {
 public:
  /// monotonic_ns().
  constexpr ClockView() = default;
  /// Anything with `std::int64_t now_ns() const noexcept`.
  template <class T>
  requires requires(const T& clock) {
    { clock.now_ns() }
    noexcept->std::same_as<std::int64_t>;
  }
  static ClockView of(const T& clock) {
    ClockView view;
    view.read_ = [](const void* own) noexcept {
      return static_cast<const T*>(own)->now_ns();
    };
    view.clock_ = &clock;
    return view;
  }
  /// Not of one that ends with the statement.
  template <class T>
  static ClockView of(const T&&) = delete;

  std::int64_t now_ns() const noexcept { return read_ == nullptr ? monotonic_ns() : read_(clock_); }

 private:
  std::int64_t (*read_)(const void*) noexcept = nullptr;
  const void* clock_ = nullptr;
};

}  // namespace sluice
