// SPDX-License-Identifier: MIT
/// A histogram of durations that covers one nanosecond to three centuries at fixed size, so that an
/// endless stream's percentiles cost constant memory and a record costs constant time.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>

#include "sluice/core/config.hpp"

namespace sluice {

/// Counts of durations in nanoseconds, in log-linear buckets (the layout of HdrHistogram): below
/// 256 ns one bucket a nanosecond, above that 128 equal buckets to each power of two. A quantile is
/// the middle of its bucket, so its relative error is at most 1/256; minimum, maximum, mean and
/// count are exact. About 58 KB, allocated at construction and never again.
///
/// One thread records, merges into it or resets it; any number of others may read at the same time
/// and see counts that lag a little. record() is wait-free: a few relaxed loads and stores.
class LatencyHistogram {
 public:
  LatencyHistogram() : state_(std::make_unique<State>()) {}

  /// Adds one duration. A negative one (two clocks mixed up) counts as zero.
  void record(std::int64_t duration_ns) noexcept {
    duration_ns = std::max<std::int64_t>(duration_ns, 0);
    add(state_->counts[bucket_of(duration_ns)], 1);
    add(state_->sum_ns, static_cast<std::uint64_t>(duration_ns));
    add(state_->count, 1);
    extend(duration_ns, duration_ns);
  }

  /// Adds everything that `other` holds.
  void merge(const LatencyHistogram& other) noexcept {
    for (std::size_t i = 0; i < kBuckets; ++i) add(state_->counts[i], get(other.state_->counts[i]));
    add(state_->sum_ns, get(other.state_->sum_ns));
    add(state_->count, get(other.state_->count));
    extend(get(other.state_->min_ns), get(other.state_->max_ns));
  }

  /// Forgets everything.
  void reset() noexcept {
    for (auto& bucket : state_->counts) bucket.store(0, std::memory_order_relaxed);
    state_->sum_ns.store(0, std::memory_order_relaxed);
    state_->count.store(0, std::memory_order_relaxed);
    state_->min_ns.store(kNone, std::memory_order_relaxed);
    state_->max_ns.store(0, std::memory_order_relaxed);
  }

  /// Number of durations recorded.
  std::int64_t count() const noexcept { return static_cast<std::int64_t>(get(state_->count)); }

  /// Exact smallest and largest; 0 when empty.
  std::int64_t min_ns() const noexcept { return count() == 0 ? 0 : get(state_->min_ns); }
  std::int64_t max_ns() const noexcept { return get(state_->max_ns); }

  /// Arithmetic mean; 0 when empty. Exact until the sum passes 2^64 ns (584 years).
  double mean_ns() const noexcept {
    const std::uint64_t n = get(state_->count);
    return n == 0 ? 0.0 : static_cast<double>(get(state_->sum_ns)) / static_cast<double>(n);
  }

  /// Sum of all durations, as mean_ns().
  std::uint64_t sum_ns() const noexcept { return get(state_->sum_ns); }

  /// The ceil(q * count)-th smallest duration (nearest rank), to 1/256 of its value; q = 0 and q =
  /// 1 are the exact minimum and maximum. q in [0, 1]. 0 when empty.
  std::int64_t quantile_ns(double q) const noexcept {
    SLUICE_ASSERT(q >= 0.0 && q <= 1.0);
    std::uint64_t total = 0;  // not count(): a concurrent record() may be between the two
    for (const auto& bucket : state_->counts) total += get(bucket);
    if (total == 0) return 0;
    if (q <= 0.0) return min_ns();
    if (q >= 1.0) return max_ns();
    const double wanted = std::ceil(q * static_cast<double>(total));
    const auto rank = std::clamp<std::uint64_t>(static_cast<std::uint64_t>(wanted), 1, total);
    std::uint64_t below = 0;
    std::size_t index = 0;
    for (; index + 1 < kBuckets; ++index) {
      below += get(state_->counts[index]);
      if (below >= rank) break;
    }
    return std::max(std::min(middle_of(index), max_ns()), min_ns());
  }

 private:
  static constexpr int kSubBits = 7;  // 2^7 buckets to a power of two
  static constexpr std::int64_t kLinear = std::int64_t{2} << kSubBits;
  static constexpr std::size_t kBuckets =
      static_cast<std::size_t>(kLinear) + (std::size_t{62 - kSubBits} << kSubBits);
  static constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();

  struct State {
    std::array<std::atomic<std::uint64_t>, kBuckets> counts{};
    std::atomic<std::uint64_t> sum_ns{0};
    std::atomic<std::uint64_t> count{0};
    std::atomic<std::int64_t> min_ns{kNone};
    std::atomic<std::int64_t> max_ns{0};
  };

  template <class T>
  static T get(const std::atomic<T>& value) noexcept {
    return value.load(std::memory_order_relaxed);
  }
  // With one writer a load and a store suffice, and no locked instruction is paid for.
  static void add(std::atomic<std::uint64_t>& value, std::uint64_t amount) noexcept {
    value.store(get(value) + amount, std::memory_order_relaxed);
  }
  void extend(std::int64_t low, std::int64_t high) noexcept {
    if (low < get(state_->min_ns)) state_->min_ns.store(low, std::memory_order_relaxed);
    if (high > get(state_->max_ns)) state_->max_ns.store(high, std::memory_order_relaxed);
  }

  /// Bits dropped from a value of this size, so that kSubBits + 1 significant bits stay.
  static int shift_of(std::uint64_t value) noexcept {
    return std::max(static_cast<int>(std::bit_width(value)) - (kSubBits + 1), 0);
  }
  static std::size_t bucket_of(std::int64_t duration_ns) noexcept {
    const auto value = static_cast<std::uint64_t>(duration_ns);
    const int shift = shift_of(value);
    return (static_cast<std::size_t>(shift) << kSubBits) + static_cast<std::size_t>(value >> shift);
  }
  static std::int64_t middle_of(std::size_t bucket) noexcept {
    const auto index = static_cast<std::int64_t>(bucket);
    if (index < kLinear) return index;
    const int shift = static_cast<int>(index >> kSubBits) - 1;
    const std::int64_t lowest = (index - (std::int64_t{shift} << kSubBits)) << shift;
    return lowest + ((std::int64_t{1} << shift) - 1) / 2;
  }

  std::unique_ptr<State> state_;
};

}  // namespace sluice
