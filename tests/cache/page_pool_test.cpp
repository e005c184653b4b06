// SPDX-License-Identifier: MIT
#include "sluice/cache/page_pool.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr auto kNoCopy = [](std::int64_t, std::int64_t, std::int64_t) {
  FAIL() << "nothing is shared";
};

/// All pages taken by someone else, so that a test says which are free, and when.
void take_all(PagePool& pool) {
  for (std::int64_t i = 0; i < pool.num_pages(); ++i)
    pool.acquire(static_cast<std::int32_t>(i) - 1);
  ASSERT_EQ(pool.free_pages(), 0);
}

// cache-and-kernel-algorithms C.1: table [7, 1, 3], token 9 in slot 13, token 12 in a new block.
TEST(PageTable, LeadsToSlots) {
  PagePool pool(10, 4);
  take_all(pool);
  PageTable table(pool, 40);
  for (const std::int32_t page : {7, 1, 3}) {
    pool.release(page);
    table.append(4, kNoCopy);
  }
  EXPECT_TRUE(std::ranges::equal(table.pages(), std::vector<std::int32_t>{7, 1, 3}));
  EXPECT_EQ(table.slot(9), 13);
  EXPECT_EQ(table.runs(), 3);
  EXPECT_FALSE(table.fits(1));  // token 12 needs a fourth page
  pool.release(8);
  EXPECT_TRUE(table.fits(1));
  EXPECT_EQ(table.room_behind(12), 4);
  EXPECT_EQ(table.room_behind(6), 10);  // page 3 is given back
}

// D.3: 6 tokens in pages [3, 5]; the child's token 6 copies page 5 into 9, the parent's copies
// none.
TEST(PageTable, CopiesASharedPageWhenItIsWritten) {
  PagePool pool(10, 4);
  take_all(pool);
  PageTable parent(pool, 40);
  pool.release(3);
  parent.append(4, kNoCopy);
  pool.release(5);
  parent.append(2, kNoCopy);
  ASSERT_TRUE(std::ranges::equal(parent.pages(), std::vector<std::int32_t>{3, 5}));

  PageTable child(pool, 40);
  child.share(parent);
  EXPECT_EQ(pool.references(3), 2);
  EXPECT_EQ(pool.references(5), 2);
  EXPECT_FALSE(child.fits(1));  // there is no page to copy into
  EXPECT_EQ(child.room_behind(6), 0);

  pool.release(9);
  int copies = 0;
  child.append(1, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
    EXPECT_EQ(from, 5 * 4);
    EXPECT_EQ(to, 9 * 4);
    EXPECT_EQ(count, 2);
    ++copies;
  });
  EXPECT_EQ(copies, 1);
  EXPECT_TRUE(std::ranges::equal(child.pages(), std::vector<std::int32_t>{3, 9}));
  EXPECT_EQ(pool.references(3), 2);
  EXPECT_EQ(pool.references(5), 1);
  EXPECT_EQ(pool.references(9), 1);
  parent.append(1, kNoCopy);
  EXPECT_TRUE(std::ranges::equal(parent.pages(), std::vector<std::int32_t>{3, 5}));
}

TEST(PagePool, FindsPagesByTheirTokensAndWhatIsBeforeThem) {
  PagePool pool(8, 2);
  const std::vector<Token> ab{1, 2};
  const std::vector<Token> cd{3, 4};
  const std::int32_t first = pool.acquire(kNoPage);
  const std::int32_t second = pool.acquire(first);
  const NamedPage a = pool.publish(first, {}, ab);
  const NamedPage b = pool.publish(second, a, cd);
  EXPECT_EQ(pool.find({}, ab).page, first);
  EXPECT_EQ(pool.find(a, cd).page, second);
  EXPECT_EQ(pool.find({}, cd).page, kNoPage);  // the same tokens, but not at the start
  EXPECT_EQ(pool.find(b, cd).page, kNoPage);
  // The same content in another page is known by the first.
  const std::int32_t twin = pool.acquire(second);
  EXPECT_EQ(pool.publish(twin, {}, ab).page, first);
  // Free, it is still found; used anew, it is not, and neither is what came behind it.
  pool.release(first);
  EXPECT_EQ(pool.find({}, ab).page, first);
  while (pool.references(first) == 0) pool.acquire(kNoPage);
  EXPECT_EQ(pool.find({}, ab).page, kNoPage);
  EXPECT_EQ(pool.find(a, cd).page, kNoPage);
  EXPECT_EQ(pool.publish(twin, a, cd).page, kNoPage);
}

TEST(PagePool, RefusesExtentsThatMakeNoSense) {
  for (const auto& [pages, size] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 4}, {4, 0}, {-1, 4}, {std::int64_t{1} << 40, 16}}) {
    const auto error = test::error_of([&] { PagePool pool(pages, size); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
  }
  PagePool pool(4, 4);
  EXPECT_TRUE(test::error_of([&] { PageTable table(pool, 0); }).has_value());
}

// A stream alone in a store is one run, and eight forks that grow in turns stay a few runs each.
TEST(PageTable, StaysFewRuns) {
  PagePool pool(512, 4);
  PageTable alone(pool, 2048);
  for (int i = 0; i < 100; ++i) alone.append(3, kNoCopy);
  EXPECT_EQ(alone.runs(), 1);
  std::deque<PageTable> forks;
  for (int i = 0; i < 8; ++i) forks.emplace_back(pool, 2048).share(alone);
  for (int i = 0; i < 60; ++i)
    for (PageTable& fork : forks) fork.append(2, [](std::int64_t, std::int64_t, std::int64_t) {});
  for (const PageTable& fork : forks) EXPECT_LE(fork.runs(), 4);
}

// Random appends, cuts and forks over a small pool against a model in which every table owns a list
// of values, one a token: what the slots hold, through every copy, must be that list, no page has
// more or fewer holders than tables that list it, and no table exceeds what attention takes.
TEST(PageTable, EqualsListsOfValuesOnRandomOperations) {
  Random random(8);
  int gathered = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t size = test::between(random, 1, 5);
    const std::int64_t pages = test::between(random, 1, 150);
    PagePool pool(pages, size);
    std::vector<int> slots(static_cast<std::size_t>(pages * size), -1);
    std::deque<PageTable> tables;
    std::deque<std::vector<int>> values;
    for (int i = 0; i < 5; ++i) {
      tables.emplace_back(pool, pages * size);
      values.emplace_back();
    }
    int next = 0;
    for (int step = 0; step < 400; ++step) {
      const std::size_t which = random.below(5);
      PageTable& table = tables[which];
      std::vector<int>& expected = values[which];
      const std::uint64_t action = random.below(10);
      if (action < 6) {
        const std::int64_t tokens = test::between(random, 1, 2 * size);
        if (!table.fits(tokens)) continue;
        const int runs = table.runs();
        table.append(tokens, [&](std::int64_t from, std::int64_t to, std::int64_t count) {
          ASSERT_LE(count, size);
          std::copy_n(slots.begin() + from, count, slots.begin() + to);
        });
        if (table.runs() < runs) ++gathered;
        for (std::int64_t i = 0; i < tokens; ++i) {
          slots[static_cast<std::size_t>(table.slot(static_cast<std::int64_t>(expected.size())))] =
              next;
          expected.push_back(next++);
        }
      } else if (action < 9) {
        const auto length = static_cast<std::size_t>(
            test::between(random, 0, static_cast<std::int64_t>(expected.size())));
        table.truncate(static_cast<std::int64_t>(length));
        expected.resize(length);
      } else {
        const std::size_t from = random.below(5);
        if (from == which) continue;
        table.share(tables[from]);
        expected = values[from];
      }
      std::map<std::int32_t, std::int32_t> holders;
      for (std::size_t t = 0; t < 5; ++t) {
        ASSERT_EQ(tables[t].total(), static_cast<std::int64_t>(values[t].size()));
        ASSERT_LE(tables[t].runs(), PageTable::kMaxRuns);
        for (std::size_t i = 0; i < values[t].size(); ++i)
          ASSERT_EQ(slots[static_cast<std::size_t>(tables[t].slot(static_cast<std::int64_t>(i)))],
                    values[t][i])
              << "table " << t << " token " << i;
        std::int64_t next_token = 0;
        tables[t].each_run([&](std::int64_t first, std::int64_t count, std::int64_t slot) {
          ASSERT_EQ(first, next_token);
          for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(tables[t].slot(first + i), slot + i);
          next_token = first + count;
        });
        ASSERT_EQ(next_token, tables[t].total());
        for (const std::int32_t page : tables[t].pages()) ++holders[page];
      }
      std::int64_t free = 0;
      for (std::int32_t page = 0; page < pages; ++page) {
        ASSERT_EQ(pool.references(page), holders.contains(page) ? holders[page] : 0);
        free += pool.references(page) == 0;
      }
      ASSERT_EQ(pool.free_pages(), free);
      const std::int64_t room = table.room_behind(table.total());
      if (table.runs() + 2 <= PageTable::kMaxRuns / 2 && room > 0 &&
          room <= PageTable::kMaxRuns / 2 * size) {
        ASSERT_TRUE(table.fits(room));
        ASSERT_FALSE(table.fits(room + 1));
      }
    }
  }
  EXPECT_GT(gathered, 0) << "no table ever became too many runs";
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
