// SPDX-License-Identifier: MIT
/// That a run of a thread team allocates nothing, on any member. An executable of its own: it
/// replaces the allocation functions.
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// Keeps the compiler from removing an allocation that is not used.
void* volatile escaped = nullptr;

template <class Action>
std::int64_t allocations_of(Action&& action) {
  const std::int64_t before = test::allocation_count();
  action();
  return test::allocation_count() - before;
}

TEST(CountAllocations, SeesEveryWayToAllocate) {
  struct alignas(128) Wide {
    char bytes[128];
  };
  EXPECT_EQ(allocations_of([] {}), 0);
  EXPECT_EQ(allocations_of([] {
              auto single = std::make_unique<int>(1);
              escaped = single.get();
            }),
            1);
  EXPECT_EQ(allocations_of([] {
              std::vector<double> values(100);
              escaped = values.data();
            }),
            1);
  EXPECT_EQ(allocations_of([] {
              auto wide = std::make_unique<Wide>();
              escaped = wide.get();
              EXPECT_EQ(reinterpret_cast<std::uintptr_t>(wide.get()) % 128, 0U);
            }),
            1);
  EXPECT_EQ(allocations_of([] {
              const Buffer<float> buffer(1000);
              escaped = const_cast<float*>(buffer.data());
            }),
            1);
  EXPECT_EQ(allocations_of([] {
              int* const quiet = new (std::nothrow) int[10];
              escaped = quiet;
              delete[] quiet;
            }),
            1);
#if SLUICE_TEST_COUNTS_MALLOC
  EXPECT_EQ(allocations_of([] {
              void* pointer = std::malloc(10);
              escaped = pointer;
              pointer = std::realloc(pointer, 100'000);
              escaped = pointer;
              std::free(pointer);
              pointer = std::calloc(3, 5);
              escaped = pointer;
              std::free(pointer);
              pointer = std::aligned_alloc(64, 128);
              escaped = pointer;
              std::free(pointer);
            }),
            4);
#endif
}

TEST(CountAllocations, SeesOtherThreads) {
  std::atomic<bool> go{false};
  std::jthread other([&] {
    go.wait(false);
    auto single = std::make_unique<int>(1);
    escaped = single.get();
  });
  EXPECT_EQ(allocations_of([&] {
              go = true;
              go.notify_one();
              other.join();
            }),
            1);
}

TEST(ThreadTeamAllocations, RunAllocatesNothing) {
  for (int size : {1, 2, 4}) {
    ThreadTeam team(size);
    team.run([](int, int) {});
    std::array<std::atomic<int>, 4> calls{};  // of shares
    std::atomic<std::int64_t> items{0};
    const std::array<double, 32> large_capture{};  // more than a std::function holds in place
    EXPECT_EQ(allocations_of([&] {
                for (int round = 0; round < 1000; ++round) {
                  team.run([&calls, large_capture](int index, int) {
                    calls[static_cast<std::size_t>(index)] +=
                        1 + static_cast<int>(large_capture[3]);
                  });
                  team.for_each(10, [&](std::int64_t item, int) { items += item; });
                }
                std::this_thread::sleep_for(std::chrono::milliseconds(50));
                team.run([&](int index, int) { ++calls[static_cast<std::size_t>(index)]; });
              }),
              0);
    for (int index = 0; index < size; ++index)
      EXPECT_EQ(calls[static_cast<std::size_t>(index)], 1001);
    EXPECT_EQ(items, 45'000);
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
