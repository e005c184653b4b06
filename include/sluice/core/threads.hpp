// SPDX-License-Identifier: MIT
/// A persistent team of threads for fork-join work inside a step. The caller is member 0. Members
/// wait by spinning briefly and then parking in the kernel, so that an idle team costs nothing and
/// a busy neighbour cannot stall a barrier for a whole time slice of spinning.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "sluice/core/error.hpp"

namespace sluice {

/// Tells the processor that this is a wait loop.
inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// A half-open range of work items.
struct WorkRange {
  std::int64_t begin;
  std::int64_t end;
};

/// The share of member `index` of `count` in `total` items, cut at multiples of `grain`.
constexpr WorkRange share_of(std::int64_t total, std::int64_t index, std::int64_t count,
                             std::int64_t grain = 1) {
  const std::int64_t grains = (total + grain - 1) / grain;
  const std::int64_t begin = grains * index / count * grain;
  const std::int64_t end = grains * (index + 1) / count * grain;
  return {begin < total ? begin : total, end < total ? end : total};
}

/// Runs one callable on every member and returns when all are done. run() allocates nothing, takes
/// no lock and must not be called from two threads at once, nor from inside a running callable
/// (each session has its own team or uses it in turn). The callable must not throw.
class ThreadTeam {
 public:
  /// \throws Error(kConfig) unless 1 <= num_threads <= 1024, std::system_error if the system
  /// starts no more threads. Allocates and starts num_threads - 1 threads.
  explicit ThreadTeam(int num_threads) : num_threads_(num_threads) {
    if (num_threads < 1 || num_threads > 1024)
      throw Error(ErrorCode::kConfig, {"thread count out of range", "ThreadTeam", "num_threads",
                                       "1 to 1024", std::to_string(num_threads)});
    workers_.reserve(static_cast<std::size_t>(num_threads - 1));
    try {
      for (int index = 1; index < num_threads; ++index)
        workers_.emplace_back([this, index] { work(index); });
    } catch (...) {
      stop();  // those that did start would be waited for, for ever
      throw;
    }
  }

  ~ThreadTeam() { stop(); }

  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const noexcept { return num_threads_; }

  /// Calls function(member_index, team_size) on every member, the caller included.
  template <class Function>
  void run(Function&& function) {
    if (num_threads_ == 1) {
      function(0, 1);
      return;
    }
    using Callable = std::remove_reference_t<Function>;
    context_ = const_cast<void*>(static_cast<const void*>(&function));
    invoke_ = [](void* context, int index, int count) {
      (*static_cast<Callable*>(context))(index, count);
    };
    pending_.store(num_threads_ - 1, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    function(0, num_threads_);
    for (int spin = 0; spin < kSpins; ++spin) {
      if (pending_.load(std::memory_order_acquire) == 0) return;
      spin_pause();
    }
    for (int left = pending_.load(std::memory_order_acquire); left != 0;
         left = pending_.load(std::memory_order_acquire))
      pending_.wait(left, std::memory_order_acquire);
  }

 private:
  // About 20 to 50 microseconds: longer than the gap between two kernels of one step, far shorter
  // than a scheduler's time slice.
  static constexpr int kSpins = 2000;

  void stop() {
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }

  void work(int index) {
    std::uint32_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins; ++spin) {
        if (generation_.load(std::memory_order_acquire) != seen) break;
        spin_pause();
      }
      generation_.wait(seen, std::memory_order_acquire);
      ++seen;
      if (stopping_) return;
      invoke_(context_, index, num_threads_);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

  int num_threads_;
  bool stopping_ = false;       // published by generation_
  void* context_ = nullptr;     // published by generation_
  void (*invoke_)(void*, int, int) = nullptr;
  alignas(64) std::atomic<std::uint32_t> generation_{0};
  alignas(64) std::atomic<int> pending_{0};
  std::vector<std::jthread> workers_;  // last: joined before the members above go
};

}  // namespace sluice
