// SPDX-License-Identifier: MIT
#include "sluice/core/threads.hpp"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "support/sanitizers.hpp"

namespace sluice {
namespace {

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

TEST_P(ThreadTeamSizes, EveryMemberRunsOnceOnAThreadOfItsOwn) {
  const int size = GetParam();
  ThreadTeam team(size);
  EXPECT_EQ(team.size(), size);
  std::vector<std::thread::id> first_ids;
  for (int round = 0; round < 30; ++round) {
    std::vector<int> calls(static_cast<std::size_t>(size));
    std::vector<std::thread::id> ids(static_cast<std::size_t>(size));
    team.run([&](int index, int count) {
      EXPECT_EQ(count, size);
      ++calls[static_cast<std::size_t>(index)];
      ids[static_cast<std::size_t>(index)] = std::this_thread::get_id();
    });
    for (int call : calls) ASSERT_EQ(call, 1);
    ASSERT_EQ(ids[0], std::this_thread::get_id());  // the caller is member 0
    ASSERT_EQ(std::set(ids.begin(), ids.end()).size(), ids.size());
    if (round == 0) first_ids = ids;
    ASSERT_EQ(ids, first_ids);  // the team persists
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

}  // namespace
}  // namespace sluice
