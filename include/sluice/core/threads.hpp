// SPDX-License-Identifier: MIT
/// A persistent team of threads for fork-join work inside a step. The caller is member 0. Work is
/// cut into items that members claim one by one, so that nobody waits for a member that the
/// scheduler has put behind a busy neighbour unless it holds an item. Waiting is spinning briefly,
/// then yielding, then parking in the kernel: an idle team costs nothing, and two members that
/// share a core do not spin against each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "sluice/core/config.hpp"
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

/// Threads that share the items of a loop: each member has a share of consecutive items, which it
/// goes through in order, and then helps with the shares of others. Nothing here allocates or takes
/// a lock after construction. The callables must not throw and must not fork on the same team.
///
/// Items are claimed one by one. A fork-join is open while it has unclaimed items. A member that
/// comes late finds it closed, or the next one open, and nobody has waited: the worst case is the
/// caller alone, plus one item that a member was holding when it lost its processor. Which member
/// does an item is a matter of chance; results are the same bits as long as items do not depend on
/// it.
///
/// A member that keeps the caller waiting for much longer than an item takes has met a neighbour
/// that may be there to stay: it rests for eight times as long, fifty milliseconds at most. So a
/// busy neighbour costs what the team does without that core and about a tenth, not one of its time
/// slices at every fork-join.
///
/// Several threads may fork on one team at the same time, as sessions do that share it: members
/// help whoever comes first, the others do their items alone.
class ThreadTeam {
 public:
  /// The most items of one fork-join.
  static constexpr std::int64_t kMaxItems = (std::int64_t{1} << 24) - 1;

  /// `cpus`: empty, and the system places the members (the default); or for each of members 1 to
  /// num_threads - 1 the number of the only processor that it may run on (Linux). The calling
  /// thread is never moved. Pinning avoids that two members meet on one core while another idles;
  /// it is for machines that run little else, since a pinned member cannot evade a neighbour.
  /// \throws Error(kConfig) unless 1 <= num_threads <= 1024 and cpus fit the members and the
  /// machine, std::system_error if the system starts no more threads. Allocates and starts
  /// num_threads - 1 threads.
  explicit ThreadTeam(int num_threads, std::span<const int> cpus = {}) : num_threads_(num_threads) {
    if (num_threads < 1 || num_threads > 1024)
      throw Error(ErrorCode::kConfig, {"thread count out of range", "ThreadTeam", "num_threads",
                                       "1 to 1024", std::to_string(num_threads)});
    if (!cpus.empty() && static_cast<int>(cpus.size()) != num_threads - 1)
      throw Error(ErrorCode::kConfig,
                  {"processors do not fit the members", "ThreadTeam", "cpus",
                   std::to_string(num_threads - 1) + " of them", std::to_string(cpus.size())});
    shares_ = std::vector<Share>(static_cast<std::size_t>(num_threads));
    workers_.reserve(static_cast<std::size_t>(num_threads - 1));
    try {
      for (int index = 1; index < num_threads; ++index) {
        workers_.emplace_back([this, index] { work(index); });
        if (!cpus.empty()) pin(workers_.back(), cpus[static_cast<std::size_t>(index - 1)]);
      }
    } catch (...) {
      stop();  // those that did start would be waited for, for ever
      throw;
    }
  }

  ~ThreadTeam() { stop(); }

  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const noexcept { return num_threads_; }

  /// Calls function(item, member) once for every item in [0, count), on the members, and returns
  /// when all have returned. member is in [0, size()); no two threads of one call share it. Writes
  /// of one call are seen by the next. Precondition: count <= kMaxItems.
  template <class Function>
  void for_each(std::int64_t count, Function&& function) {
    if (num_threads_ == 1 || count <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
      for (std::int64_t item = 0; item < count; ++item) function(item, 0);
      return;
    }
    SLUICE_ASSERT(count <= kMaxItems);
    using Callable = std::remove_reference_t<Function>;
    fork_join(
        const_cast<void*>(static_cast<const void*>(&function)),
        [](void* context, std::int64_t item, int member) {
          (*static_cast<Callable*>(context))(item, member);
        },
        count);
  }

  /// Calls function(range, member) for consecutive ranges of `grain` of `total` items, the last
  /// one possibly shorter, otherwise as above.
  template <class Function>
  void for_each_range(std::int64_t total, std::int64_t grain, Function&& function) {
    for_each((total + grain - 1) / grain, [&](std::int64_t item, int member) {
      function(WorkRange{item * grain, std::min((item + 1) * grain, total)}, member);
    });
  }

  /// Calls function(share, size()) for every share in [0, size()), as above: for work that is cut
  /// into as many parts as there are members. A member may do several shares.
  template <class Function>
  void run(Function&& function) {
    for_each(num_threads_,
             [&](std::int64_t share, int) { function(static_cast<int>(share), num_threads_); });
  }

 private:
  using Clock = std::chrono::steady_clock;

  // Defined below: what waits and wakes is compiled once in a program with several kernel
  // libraries.
  void fork_join(void* context, void (*invoke)(void*, std::int64_t, int), std::int64_t count);

  // Low bits of Share::open: items of the share that nobody has claimed yet; above them the number
  // of the fork-join, so that nobody can claim from one that is over.
  static constexpr std::uint64_t kItemMask = static_cast<std::uint64_t>(kMaxItems);
  struct alignas(64) Share {
    std::atomic<std::uint64_t> open{0};
    std::atomic<bool> takes_part{false};     // its member, in some fork-join
    std::atomic<Clock::rep> rests_until{0};  // its member, on Clock
    bool was_waited_for = false;             // the caller's
  };
  // A member is held to be stopped when the caller has waited for this and four items' time.
  static constexpr std::chrono::microseconds kPatience{300};
  static constexpr std::chrono::milliseconds kLongestRest{50};
  // Spinning outlasts the gap between two kernels of a step; yielding, during which others of this
  // core go first, the gap between two steps. Both are far shorter than a scheduler's time slice.
  static constexpr std::chrono::microseconds kSpinFor{30};
  static constexpr std::chrono::microseconds kYieldFor{200};

  static void pin(std::jthread& worker, int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu >= 0 && cpu < CPU_SETSIZE) {
      CPU_SET(static_cast<std::size_t>(cpu), &set);
      if (pthread_setaffinity_np(worker.native_handle(), sizeof(set), &set) == 0) return;
    }
    const char* const expected = "a processor that this process may use";
#else
    static_cast<void>(worker);
    const char* const expected = "none: members can be pinned on Linux only";
#endif
    throw Error(ErrorCode::kConfig,
                {"member cannot be pinned", "ThreadTeam", "cpus", expected, std::to_string(cpu)});
  }

  // Spins, then yields; returns true as soon as `value` is not `seen`, false when it is time to
  // park.
  static bool changes_soon(const std::atomic<std::uint32_t>& value, std::uint32_t seen) {
    const Clock::time_point begin = Clock::now();
    for (;;) {
      for (int spin = 0; spin < 16; ++spin) {
        if (value.load(std::memory_order_acquire) != seen) return true;
        spin_pause();
      }
      const auto waited = Clock::now() - begin;
      if (waited > kYieldFor) return false;
      if (waited > kSpinFor) std::this_thread::yield();
    }
  }

  // Waits for the items that other members hold. `own`: how many the caller did since `begin`.
  void await_others(Clock::time_point begin, std::uint32_t own) {
    for (Share& share : shares_) share.was_waited_for = false;  // by an earlier call
    const Clock::time_point from = Clock::now();
    for (std::uint32_t left = unfinished_.load(std::memory_order_acquire); left != 0;
         left = unfinished_.load(std::memory_order_acquire)) {
      if (changes_soon(unfinished_, left)) continue;
      for (Share& share : shares_)
        share.was_waited_for = share.takes_part.load(std::memory_order_relaxed);
      unfinished_.wait(left, std::memory_order_acquire);
    }
    const Clock::time_point now = Clock::now();
    if (now - from <= kPatience + 4 * (from - begin) / std::max(own, 1U)) return;
    const auto rest = std::min<Clock::duration>(8 * (now - from), kLongestRest);
    for (Share& share : shares_)
      if (std::exchange(share.was_waited_for, false))
        share.rests_until.store((now + rest).time_since_epoch().count(), std::memory_order_relaxed);
  }

  // Claims and does items until none are left: the member's own, then those of the members behind.
  // Returns how many it did.
  std::uint32_t take_part(int member) {
    std::uint32_t finished = 0;
    std::atomic<bool>& takes_part = shares_[static_cast<std::size_t>(member)].takes_part;
    takes_part.store(member != 0, std::memory_order_relaxed);
    for (int step = 0; step < num_threads_; ++step)
      finished += take_from((member + step) % num_threads_, member);
    if (finished != 0 && unfinished_.fetch_sub(finished, std::memory_order_acq_rel) == finished &&
        member != 0)
      unfinished_.notify_one();
    takes_part.store(false, std::memory_order_relaxed);
    return finished;
  }

  // Claims and does items of one share; returns how many.
  std::uint32_t take_from(int owner, int member) {
    std::atomic<std::uint64_t>& share = shares_[static_cast<std::size_t>(owner)].open;
    std::uint32_t finished = 0;
    std::uint64_t open = share.load(std::memory_order_acquire);
    while ((open & kItemMask) != 0) {
      const auto invoke = invoke_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      const std::int64_t count = count_.load(std::memory_order_relaxed);
      if (!share.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire))
        continue;
      const std::int64_t end = share_of(count, owner, num_threads_).end;
      invoke(context, end - static_cast<std::int64_t>(open & kItemMask), member);
      ++finished;
      open = share.load(std::memory_order_acquire);
    }
    return finished;
  }

  void stop() {
    stopping_.store(true, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    generation_.notify_all();
  }

  void work(int member) {
    const std::atomic<Clock::rep>& rests_until =
        shares_[static_cast<std::size_t>(member)].rests_until;
    std::uint32_t seen = 0;
    for (;;) {
      if (!changes_soon(generation_, seen)) generation_.wait(seen, std::memory_order_acquire);
      seen = generation_.load(std::memory_order_acquire);
      if (stopping_.load(std::memory_order_relaxed)) return;
      const Clock::time_point until{Clock::duration(rests_until.load(std::memory_order_relaxed))};
      if (until.time_since_epoch().count() != 0 && until > Clock::now())
        std::this_thread::sleep_until(until);
      take_part(member);
    }
  }

  int num_threads_;
  std::atomic<bool> stopping_{false};  // published by generation_
  std::atomic<bool> busy_{false};      // a thread is forking
  std::atomic<void*> context_{nullptr};
  std::atomic<void (*)(void*, std::int64_t, int)> invoke_{nullptr};
  std::atomic<std::int64_t> count_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};  // what idle members watch
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};  // items that have not returned
  std::vector<Share> shares_;
  std::vector<std::jthread> workers_;  // last: joined before the members above go
};

#if !SLUICE_KERNELS_ISOLATED
inline void ThreadTeam::fork_join(void* context, void (*invoke)(void*, std::int64_t, int),
                                  std::int64_t count) {
  // Relaxed: a member uses what it read here only if it then claims an item, which fails unless
  // this fork-join is still open.
  context_.store(context, std::memory_order_relaxed);
  invoke_.store(invoke, std::memory_order_relaxed);
  count_.store(count, std::memory_order_relaxed);
  unfinished_.store(static_cast<std::uint32_t>(count), std::memory_order_relaxed);
  const std::uint64_t fork = (shares_[0].open.load(std::memory_order_relaxed) | kItemMask) + 1;
  for (int member = 0; member < num_threads_; ++member) {
    const WorkRange share = share_of(count, member, num_threads_);
    shares_[static_cast<std::size_t>(member)].open.store(
        fork | static_cast<std::uint64_t>(share.end - share.begin), std::memory_order_release);
  }
  generation_.fetch_add(1, std::memory_order_seq_cst);
  generation_.notify_all();
  const Clock::time_point begin = Clock::now();
  const std::uint32_t own = take_part(0);
  if (unfinished_.load(std::memory_order_acquire) != 0) await_others(begin, own);
  busy_.store(false, std::memory_order_release);
}
#endif

}  // namespace sluice
