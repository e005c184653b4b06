// SPDX-License-Identifier: MIT
#include "sluice/core/threads.hpp"

#if defined(__linux__)
#include <sched.h>
#endif
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "support/sanitizers.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

void sleep_ms(int duration) {
  std::this_thread::sleep_for(std::chrono::milliseconds(duration));
}

TEST(ShareOf, SharesTileTheTotalInOrderAtTheGrain) {
  for (std::int64_t total : {0, 1, 2, 7, 8, 63, 64, 65, 1000, 12345})
    for (std::int64_t count : {1, 2, 3, 4, 8, 13})
      for (std::int64_t grain : {1, 4, 32}) {
        std::int64_t next = 0;
        const std::int64_t grains = (total + grain - 1) / grain;
        for (std::int64_t index = 0; index < count; ++index) {
          const WorkRange share = share_of(total, index, count, grain);
          ASSERT_EQ(share.begin, next);
          ASSERT_LE(share.begin, share.end);
          ASSERT_TRUE(share.begin % grain == 0 || share.begin == total);
          // Even to one grain.
          ASSERT_LE(share.end - share.begin, (grains / count + 1) * grain);
          next = share.end;
        }
        ASSERT_EQ(next, total);
      }
}

class ThreadTeamSizes : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(OneToEight, ThreadTeamSizes, testing::Range(1, 9));

TEST_P(ThreadTeamSizes, MembersAreThreadsThatPersist) {
  const int size = GetParam();
  ThreadTeam team(size);
  EXPECT_EQ(team.size(), size);
  std::set<std::thread::id> first_ids;
  for (int round = 0; round < 30; ++round) {
    std::vector<int> calls(static_cast<std::size_t>(size));
    std::vector<std::thread::id> ids(static_cast<std::size_t>(size));
    std::atomic<int> started{0};
    team.run([&](int index, int count) {
      EXPECT_EQ(count, size);
      ++calls[static_cast<std::size_t>(index)];
      ids[static_cast<std::size_t>(index)] = std::this_thread::get_id();
      // Nobody can take a second share before everybody has taken one.
      started.fetch_add(1);
      while (started.load() != size) std::this_thread::yield();
    });
    for (int call : calls) ASSERT_EQ(call, 1);
    const std::set<std::thread::id> distinct(ids.begin(), ids.end());
    ASSERT_EQ(distinct.size(), ids.size());
    ASSERT_TRUE(distinct.contains(std::this_thread::get_id()));
    if (round == 0) first_ids = distinct;
    ASSERT_EQ(distinct, first_ids);
  }
}

TEST_P(ThreadTeamSizes, EveryItemIsDoneOnceByOneMemberAtATime) {
  const int size = GetParam();
  ThreadTeam team(size);
  const int rounds = size <= 2 ? 500 : 40;
  for (const std::int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
    std::vector<int> calls(static_cast<std::size_t>(count));
    std::vector<std::atomic<bool>> inside(static_cast<std::size_t>(size));
    for (int round = 0; round < rounds; ++round)
      team.for_each(count, [&](std::int64_t item, int member) {
        ASSERT_TRUE(member >= 0 && member < size);
        ASSERT_FALSE(inside[static_cast<std::size_t>(member)].exchange(true));
        ++calls[static_cast<std::size_t>(item)];
        inside[static_cast<std::size_t>(member)] = false;
      });
    for (const int call : calls) ASSERT_EQ(call, rounds);
  }
  // Ranges tile what they are cut from.
  for (const std::int64_t total : {0, 1, 9, 10, 11, 95}) {
    std::vector<int> calls(static_cast<std::size_t>(total));
    team.for_each_range(total, 10, [&](WorkRange range, int) {
      ASSERT_EQ(range.begin % 10, 0);
      ASSERT_TRUE(range.end == range.begin + 10 || range.end == total);
      for (std::int64_t i = range.begin; i < range.end; ++i) ++calls[static_cast<std::size_t>(i)];
    });
    for (const int call : calls) ASSERT_EQ(call, 1);
  }
}

TEST_P(ThreadTeamSizes, AMemberThatIsHeldUpHoldsOneItemOnly) {
  // Every other member stays in its first item until all items that nobody holds are done: the
  // caller has to do those, the held members' shares included, or this never ends.
  const int size = GetParam();
  ThreadTeam team(size);
  constexpr std::int64_t kItems = 40;
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> held{0};
    std::atomic<int> done{0};
    team.for_each(kItems, [&](std::int64_t, int member) {
      if (member == 0) {
        ++done;
        return;
      }
      ++held;
      while (done + held < kItems) std::this_thread::yield();
    });
    ASSERT_EQ(done + held, kItems);
    ASSERT_LT(held, size);
  }
}

TEST(ThreadTeam, AMemberThatWasWaitedForRestsAndComesBack) {
  ThreadTeam team(2);
  const auto items_of_the_member = [&] {
    std::atomic<int> count{0};
    team.for_each(8, [&](std::int64_t, int member) {
      if (member == 0)
        sleep_ms(1);  // time enough for the other to come
      else
        ++count;
    });
    return count.load();
  };
  bool rested = false;
  for (int attempt = 0; attempt < 20 && !rested; ++attempt) {
    std::atomic<bool> joined{false};
    std::atomic<bool> left{false};
    team.for_each(2, [&](std::int64_t, int member) {
      if (member == 1) {
        joined = true;
        while (!left) std::this_thread::yield();
        sleep_ms(20);  // the caller has nothing left to do meanwhile
      } else {
        const auto begin = std::chrono::steady_clock::now();
        while (!joined && std::chrono::steady_clock::now() - begin < std::chrono::seconds(1))
          std::this_thread::yield();
        left = true;
      }
    });
    // Where the scheduler kept the caller away for all of the rest, try again.
    rested = items_of_the_member() == 0;
  }
  EXPECT_TRUE(rested);
  bool back = false;
  for (int attempt = 0; attempt < 20 && !back; ++attempt) {
    sleep_ms(50);
    back = items_of_the_member() > 0;
  }
  EXPECT_TRUE(back);
}

TEST(ThreadTeam, ASecondCallerDoesItsWorkAlone) {
  // As long as one caller's items wait for it, the other must not wait for the members.
  ThreadTeam team(2);
  std::atomic<bool> inside{false};
  std::atomic<bool> finished{false};
  std::jthread other([&] {
    team.for_each(2, [&](std::int64_t, int) {
      inside = true;
      while (!finished) std::this_thread::yield();
    });
  });
  while (!inside) std::this_thread::yield();
  const std::thread::id self = std::this_thread::get_id();
  for (int round = 0; round < 100; ++round) {
    std::int64_t sum = 0;
    team.for_each(10, [&](std::int64_t item, int member) {
      EXPECT_EQ(std::this_thread::get_id(), self);
      EXPECT_EQ(member, 0);
      sum += item;
    });
    EXPECT_EQ(sum, 45);
  }
  finished = true;
}

TEST(ThreadTeam, MayBeSharedByCallersAtTheSameTime) {
  ThreadTeam team(3);
  std::vector<std::jthread> callers;
  std::atomic<int> good{0};
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      bool right = true;
      for (std::int64_t round = 0; round < 300; ++round) {
        std::array<std::int64_t, 20> seen{};
        team.for_each(20, [&](std::int64_t item, int) {
          seen[static_cast<std::size_t>(item)] += round + item;
        });
        for (std::size_t i = 0; i < seen.size(); ++i)
          right = right && seen[i] == round + static_cast<std::int64_t>(i);
      }
      good += right ? 1 : 0;
    });
  callers.clear();
  EXPECT_EQ(good.load(), 3);
}

#if defined(__linux__)
TEST(ThreadTeam, MembersArePinnedWhereTheUserSays) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  ASSERT_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &allowed)) ++cpu;
  const std::array<int, 1> cpus{cpu};
  ThreadTeam team(2, cpus);
  std::atomic<int> started{0};
  std::atomic<int> found{-1};
  team.run([&](int, int) {
    ++started;
    while (started != 2) std::this_thread::yield();
    cpu_set_t mine;
    CPU_ZERO(&mine);
    sched_getaffinity(0, sizeof(mine), &mine);
    if (CPU_COUNT(&mine) == 1 && CPU_ISSET(cpu, &mine)) found = cpu;
  });
  EXPECT_EQ(found, cpu);
  cpu_set_t after;
  CPU_ZERO(&after);
  ASSERT_EQ(sched_getaffinity(0, sizeof(after), &after), 0);
  EXPECT_TRUE(CPU_EQUAL(&after, &allowed));  // the caller is not moved
}
#endif

TEST(ThreadTeam, ProcessorsThatDoNotFitAreNamed) {
  const std::array<int, 2> many{0, 0};
  const std::array<int, 1> unknown{1 << 20};
  for (const std::span<const int> cpus :
       {std::span<const int>(many), std::span<const int>(unknown)})
    try {
      ThreadTeam team(2, cpus);
      ADD_FAILURE() << cpus.size();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, "cpus");
      EXPECT_EQ(error.detail().found, cpus.size() == 2 ? "2" : std::to_string(unknown[0]));
    }
}

TEST_P(ThreadTeamSizes, ThousandsOfRunsAllSumUpRight) {
  const int size = GetParam();
  ThreadTeam team(size);
  // Plain (non-atomic) data: every run sees what the run before it wrote, on every member.
  std::vector<std::int64_t> values(97);
  std::vector<std::int64_t> partial(static_cast<std::size_t>(size) * 16);
  // More threads than cores makes a run cost a time slice or two.
  const int rounds = size <= 2 ? 20'000 : 300;
  for (int round = 1; round <= rounds; ++round) {
    team.run([&](int index, int count) {
      const WorkRange share = share_of(97, index, count);
      for (std::int64_t i = share.begin; i < share.end; ++i)
        values[static_cast<std::size_t>(i)] += i;
    });
    team.run([&](int index, int count) {
      // Another cut than above, so that members read what others wrote.
      std::int64_t sum = 0;
      for (std::int64_t i = index; i < 97; i += count) sum += values[static_cast<std::size_t>(i)];
      partial[static_cast<std::size_t>(index) * 16] = sum;
    });
    std::int64_t total = 0;
    for (std::size_t i = 0; i < partial.size(); i += 16) total += partial[i];
    ASSERT_EQ(total, std::int64_t{97} * 96 / 2 * round);
  }
}

TEST_P(ThreadTeamSizes, ParkedMembersWakeUp) {
  ThreadTeam team(GetParam());
  for (int round = 0; round < 4; ++round) {
    sleep_ms(50);  // far longer than the spinning
    std::atomic<int> calls{0};
    team.run([&](int, int) { calls.fetch_add(1, std::memory_order_relaxed); });
    ASSERT_EQ(calls.load(), GetParam());
  }
}

TEST_P(ThreadTeamSizes, CallerParksForASlowMember) {
  ThreadTeam team(GetParam());
  for (int slow = 0; slow < team.size(); ++slow) {
    int done = 0;
    team.run([&](int index, int) {
      if (index == slow) {
        sleep_ms(10);
        done = 1;
      }
    });
    ASSERT_EQ(done, 1);
  }
}

TEST_P(ThreadTeamSizes, EndsWhileNewSpinningAndParked) {
  for (int round = 0; round < 20; ++round) ThreadTeam team(GetParam());  // never run
  for (int round = 0; round < 20; ++round) {
    ThreadTeam team(GetParam());
    team.run([](int, int) {});
  }
  auto parked = std::make_unique<ThreadTeam>(GetParam());
  parked->run([](int, int) {});
  sleep_ms(20);
  parked.reset();
}

TEST(ThreadTeam, AcceptsAnyCallable) {
  ThreadTeam team(2);
  std::atomic<int> sum{0};
  const auto constant = [&sum](int index, int) {
    sum += index + 1;
  };
  team.run(constant);
  struct Counter {
    std::atomic<int> calls{0};
    void operator()(int, int) { ++calls; }
  } counter;
  team.run(counter);
  EXPECT_EQ(sum.load(), 3);
  EXPECT_EQ(counter.calls.load(), 2);
}

TEST(ThreadTeam, TeamsAreIndependent) {
  std::vector<std::jthread> sessions;
  std::atomic<int> good{0};
  for (int session = 0; session < 3; ++session)
    sessions.emplace_back([&good, session] {
      ThreadTeam team(2);
      bool right = true;
      for (int round = 0; round < 500; ++round) {
        std::array<int, 2> seen{};
        team.run([&](int index, int) {
          seen[static_cast<std::size_t>(index)] = session * 1000 + round;
        });
        right = right && seen[0] == session * 1000 + round && seen[1] == seen[0];
      }
      good += right ? 1 : 0;
    });
  sessions.clear();
  EXPECT_EQ(good.load(), 3);
}

TEST(ThreadTeam, SizesOutOfRangeAreNamed) {
  for (int size : {0, -1, 1025}) {
    try {
      ThreadTeam team(size);
      ADD_FAILURE() << size;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, "num_threads");
      EXPECT_EQ(error.detail().found, std::to_string(size));
    }
  }
}

#if !SLUICE_TEST_SANITIZED
// Sanitizers reserve more address space than the limit below leaves.
TEST(ThreadTeam, ThrowsWhenTheSystemHasNoMoreThreads) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    // Room for the stacks of some threads, not for those of 1024.
    const auto room = static_cast<rlim_t>(pages * ::sysconf(_SC_PAGESIZE) + (400LL << 20));
    const rlimit limit{room, room};
    if (::setrlimit(RLIMIT_AS, &limit) != 0) ::_exit(2);
    ::alarm(20);  // the fault to find is waiting for ever
    try {
      ThreadTeam team(1024);
    } catch (const std::system_error&) {
      ::_exit(0);
    }
    ::_exit(3);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}
#endif

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
