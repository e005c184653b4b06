// SPDX-License-Identifier: MIT
/// Counts that one thread keeps and any thread reads: what the metrics of streams with two sides
/// are made of.
#pragma once

#include <atomic>
#include <cstdint>

namespace sluice {

/// A number with one writing thread at a time; any other reads it, and sees a value that lags a
/// little. A load and a store each, no locked instruction. Numbers that belong together are read
/// one after the other, so a reader may find one newer than another.
template <class T = std::int64_t>
class WorkCounter {
 public:
  T get() const noexcept { return value_.load(std::memory_order_relaxed); }
  void set(T value) noexcept { value_.store(value, std::memory_order_relaxed); }
  void add(T more) noexcept { set(get() + more); }

 private:
  std::atomic<T> value_{};
};

/// What one side of a stream has worked: how long, and on how many things (tokens, rows, forwards).
/// Aligned so that two sides on two threads share no cache line.
struct alignas(64) SideCounter {
  WorkCounter<> busy_ns;
  WorkCounter<> count;

  /// Work on `things` took so long.
  void on_work(std::int64_t duration_ns, std::int64_t things) noexcept {
    busy_ns.add(duration_ns);
    count.add(things);
  }
  double busy_ms() const noexcept { return static_cast<double>(busy_ns.get()) * 1e-6; }
};

}  // namespace sluice
