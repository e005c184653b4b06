// SPDX-License-Identifier: MIT
// Pages picked by bounds and tokens picked by scores: the specification's examples, bounds against
// plain maxima, and random histories against a list of what was stored.
#include "sluice/attention/selective_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "sluice/attention/page_bounds.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/rotary.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::error_of;

using List = std::vector<std::int64_t>;

List list(std::span<const std::int64_t> values) {
  return {values.begin(), values.end()};
}

/// A cache of one layer and head without rotation that holds these keys, and its newest query.
template <class Cache>
void feed(Cache& cache, const std::vector<std::vector<float>>& keys) {
  for (const std::vector<float>& key : keys) {
    const auto dim = static_cast<std::int64_t>(key.size());
    cache.append(1);
    cache.store(0, {key.data(), 1, 1, dim}, {key.data(), 1, 1, dim}, nullptr, 0, 1);
    cache.commit();
  }
}

// Specification, test C.2.
TEST(PageSelection, QuestExample) {
  const std::vector<std::vector<float>> keys{{1, 0}, {3, 1}, {2, -1},  {-1, -2}, {0, 3},
                                             {4, 2}, {2, 1}, {1, .5F}, {-1, 0},  {1, -1}};
  const std::array<const Rotary*, 1> rotaries{nullptr};
  PageSelectKvCache<float> cache(
      {1, 1, 2, 2}, 1,
      {.page_size = 2, .logical_page_size = 2, .budget = 3, .interval = 1, .dense_layers = 0},
      rotaries, 10, 1);
  feed(cache, {keys.begin(), keys.end() - 1});
  cache.append(1);
  cache.store(0, {keys.back().data(), 1, 1, 2}, {keys.back().data(), 1, 1, 2}, nullptr, 0, 1);
  const std::array<float, 2> query{1, -2};
  cache.select(0, {{query.data(), 1, 1, 2}, 9, 9});
  ASSERT_TRUE(cache.picks(0));
  const std::array<float, 5> bounds{3, 6, 0, 1, 3};
  for (std::int64_t page = 0; page < 5; ++page)
    EXPECT_EQ(page_bound(query.data(), cache.bounds(0).maxima(0, page),
                         cache.bounds(0).minima(0, page), 2),
              bounds[static_cast<std::size_t>(page)]);
  EXPECT_EQ(list(cache.picked(0, 0)), (List{0, 1, 4}));

  // Pages 0 and 1 follow each other: one segment, at their own places.
  std::array<Segment<float>, static_cast<std::size_t>(PageSelectKvCache<float>::kMaxSegments)> out;
  ASSERT_EQ(cache.num_classes(0), 1);
  ASSERT_EQ(cache.segments(0, 1, out), 2);
  EXPECT_EQ(out[0].rule.first_index, 0);
  EXPECT_EQ(out[0].rule.visible, 4);
  EXPECT_EQ(out[1].rule.first_index, 8);
  EXPECT_EQ(out[1].rule.first_position, 8);
  EXPECT_EQ(out[1].rule.visible, 2);
  EXPECT_EQ(out[1].key(0, 1)[1], -1);
}

// Specification, test A.3 (the example of LServe's paper).
TEST(PageSelection, LServeExample) {
  const std::array<float, 8> query{1, -2, 2, -2, 1, 1, 1, -3};
  const std::array<float, 8> a_most{2, 3, 2, 8, 4, 5, 2, 6};
  const std::array<float, 8> a_least{-6, -1, -6, 1, -5, -6, -6, -2};
  const std::array<float, 8> b_most{4, 6, 3, 4, 2, 4, 5, 7};
  const std::array<float, 8> b_least{0, -2, -8, -3, -8, -7, -3, -3};
  EXPECT_EQ(page_bound(query.data(), a_most.data(), a_least.data(), 8), 23);
  EXPECT_EQ(page_bound(query.data(), b_most.data(), b_least.data(), 8), 40);
  // As the logical pages of one physical page, whose bound is the larger: with 40 it comes before
  // page 1, whose logical pages are both 30; pages of 23 alone would not.
  const std::vector<float> c(a_most.size(), 0);
  std::vector<float> thirty(8, 0);
  thirty[0] = 30;
  const auto rows = [](const auto& values) {
    return std::vector<float>(values.begin(), values.end());
  };
  const std::vector<std::vector<float>> keys{rows(a_most),
                                             rows(a_least),
                                             rows(b_most),
                                             rows(b_least),
                                             thirty,
                                             thirty,
                                             thirty,
                                             thirty,
                                             c,
                                             c,
                                             c};
  const std::array<const Rotary*, 1> rotaries{nullptr};
  PageSelectKvCache<f16> cache(
      {1, 1, 8, 8}, 1,
      {.page_size = 4, .logical_page_size = 2, .budget = 2, .interval = 1, .dense_layers = 0},
      rotaries, 12, 1);
  feed(cache, keys);
  cache.append(1);
  cache.store(0, {c.data(), 1, 1, 8}, {c.data(), 1, 1, 8}, nullptr, 0, 1);
  cache.select(0, {{query.data(), 1, 1, 8}, 11, 11});
  EXPECT_EQ(list(cache.picked(0, 0)), (List{0, 2}));
}

TEST(PageSelection, TiesAndNansGoToTheOlder) {
  const std::array<float, 6> scores{1, std::nanf(""), 2, 2, 2, -3};
  std::array<std::int64_t, 6> order;
  const auto pick = [&](std::int64_t budget) {
    return list({order.data(), static_cast<std::size_t>(pick_pages(scores, budget, order))});
  };
  EXPECT_EQ(pick(1), (List{5}));
  EXPECT_EQ(pick(3), (List{2, 3, 5}));
  EXPECT_EQ(pick(5), (List{0, 2, 3, 4, 5}));
  EXPECT_EQ(pick(9), (List{0, 1, 2, 3, 4, 5}));
}

/// Random appends, commits, roll-backs, truncations and paths of drafts: bounds are those of the
/// keys that are there, no score exceeds its page's bound, and what is picked is what sorting would
/// pick.
TEST(PageSelection, RandomHistories) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    Random random(seed);
    constexpr std::int64_t kHeads = 2;
    constexpr std::int64_t kGroup = 3;
    constexpr std::int64_t kDim = 10;  // no whole number of registers
    const Rotary rotary({.head_dim = kDim, .rotary_dim = 8, .theta = 50});
    const std::array<const Rotary*, 1> rotaries{&rotary};
    const std::int64_t logical = between(random, 1, 3);
    const std::int64_t parts = between(random, 1, 3);
    const std::int64_t page_size = logical * parts;
    const std::int64_t budget = between(random, 1, 5);
    PageSelectKvCache<f16> cache({1, kHeads, kDim, 4}, kHeads * kGroup,
                                 {.page_size = page_size,
                                  .logical_page_size = logical,
                                  .budget = budget,
                                  .interval = 1,
                                  .dense_layers = 0},
                                 rotaries, 90, 7);
    RotaryTable table(rotary, 7);
    std::int64_t picked_steps = 0;
    // Keys as the cache rounds them: [token][head * dim].
    std::vector<std::vector<f16>> stored;
    for (int step = 0; step < 250; ++step) {
      const std::int64_t first = cache.total();
      const std::int64_t tokens = random.below(3) == 0 ? between(random, 1, 7) : 1;
      if (cache.status(tokens) != CacheStatus::kOk) {
        cache.truncate(between(random, 1, cache.max_truncate()));
        stored.resize(static_cast<std::size_t>(cache.total()));
        continue;
      }
      std::vector<float> keys(static_cast<std::size_t>(tokens * kHeads * kDim));
      for (float& key : keys) key = static_cast<float>(random.normal());
      const std::vector<float> values(static_cast<std::size_t>(tokens * kHeads * 4), 1);
      cache.append(tokens);
      table.fill_run(cache.write_position(first), tokens);
      cache.store(0, {keys.data(), tokens, kHeads, kDim}, {values.data(), tokens, kHeads, 4},
                  table.rows(), 0, tokens);
      for (std::int64_t t = 0; t < tokens; ++t) {
        std::vector<f16>& row = stored.emplace_back(static_cast<std::size_t>(kHeads * kDim));
        rotary.rotate_heads(table.row(t), keys.data() + t * kHeads * kDim, kHeads, row.data());
      }
      std::vector<float> query(static_cast<std::size_t>(tokens * kHeads * kGroup * kDim));
      for (float& q : query) q = static_cast<float>(random.normal());
      cache.select(
          0, {{query.data(), tokens, kHeads * kGroup, kDim}, first, cache.write_position(first)});
      const std::int64_t total = cache.total();
      const std::int64_t pages = (total + page_size - 1) / page_size;
      ASSERT_EQ(cache.picks(0), tokens == 1 && pages > budget);
      if (cache.picks(0)) {
        ++picked_steps;
        std::vector<float> placed(query.size());
        rotary.rotate_heads(table.row(0), query.data(), kHeads * kGroup, placed.data());
        for (std::int64_t h = 0; h < kHeads; ++h) {
          std::vector<std::pair<double, std::int64_t>> ranking;
          for (std::int64_t page = 0; page < pages; ++page) {
            double bound = -1e30;
            for (std::int64_t from = page * page_size;
                 from < std::min(total, (page + 1) * page_size); from += logical)
              for (std::int64_t g = 0; g < kGroup; ++g) {
                double sum = 0;
                for (std::int64_t d = 0; d < kDim; ++d) {
                  double most = -1e30;
                  double least = 1e30;
                  for (std::int64_t j = from; j < std::min(total, from + logical); ++j) {
                    const auto key = static_cast<double>(
                        static_cast<float>(stored[static_cast<std::size_t>(j)]
                                                 [static_cast<std::size_t>(h * kDim + d)]));
                    most = std::max(most, key);
                    least = std::min(least, key);
                  }
                  const std::int64_t part = from / logical;
                  ASSERT_EQ(static_cast<float>(cache.bounds(0).maxima(h, part)[d]), most);
                  ASSERT_EQ(static_cast<float>(cache.bounds(0).minima(h, part)[d]), least);
                  const auto q = static_cast<double>(
                      placed[static_cast<std::size_t>((h * kGroup + g) * kDim + d)]);
                  sum += std::max(q * most, q * least);
                }
                // Products of floats are exact in double and sums round alike: never exceeded.
                for (std::int64_t j = from; j < std::min(total, from + logical); ++j) {
                  double score = 0;
                  for (std::int64_t d = 0; d < kDim; ++d)
                    score += static_cast<double>(
                                 placed[static_cast<std::size_t>((h * kGroup + g) * kDim + d)]) *
                             static_cast<double>(static_cast<float>(stored[static_cast<std::size_t>(
                                 j)][static_cast<std::size_t>(h * kDim + d)]));
                  ASSERT_LE(score, sum);
                }
                bound = std::max(bound, sum);
              }
            ranking.emplace_back(bound, page);
          }
          List expected{ranking.back().second};
          ranking.pop_back();
          std::stable_sort(ranking.begin(), ranking.end(),
                           [](const auto& a, const auto& b) { return a.first > b.first; });
          for (std::int64_t i = 0; i + 1 < budget; ++i)
            expected.push_back(ranking[static_cast<std::size_t>(i)].second);
          std::sort(expected.begin(), expected.end());
          ASSERT_EQ(list(cache.picked(0, h)), expected) << "seed " << seed << " step " << step;
        }
      }
      switch (random.below(7)) {
        case 0: cache.rollback(); break;
        case 1:
          cache.truncate(between(random, 0, std::min<std::int64_t>(9, cache.max_truncate())));
          break;
        case 2: {
          const std::int64_t open = cache.total() - cache.committed();
          std::vector<std::int64_t> path;
          for (std::int64_t i = 0; i < open; ++i) {
            if (random.below(2) == 0) continue;
            stored[static_cast<std::size_t>(cache.committed() + std::ssize(path))] =
                stored[static_cast<std::size_t>(cache.committed() + i)];
            path.push_back(i);
          }
          cache.keep_path(open, path);
          break;
        }
        case 3: break;  // another chunk before the commit
        default: cache.commit();
      }
      stored.resize(static_cast<std::size_t>(cache.total()));
      ASSERT_LE(cache.bounds(0).rows(), cache.total());
    }
    EXPECT_GT(picked_steps, 20) << "seed " << seed;
  }
}

/// A selection serves `interval` tokens, pages opened meanwhile included; it ends with its token.
TEST(PageSelection, Intervals) {
  const std::array<const Rotary*, 1> rotaries{nullptr};
  PageSelectKvCache<float> cache(
      {1, 1, 1, 1}, 1,
      {.page_size = 2, .logical_page_size = 1, .budget = 2, .interval = 5, .dense_layers = 0},
      rotaries, 40, 4);
  const auto step = [&](float key, float query) {
    cache.append(1);
    cache.store(0, {&key, 1, 1, 1}, {&key, 1, 1, 1}, nullptr, 0, 1);
    cache.select(0, {{&query, 1, 1, 1}, cache.total() - 1, 0});
  };
  for (const float key : {1.F, 1.F, 5.F, 5.F}) {
    step(key, 1);
    EXPECT_FALSE(cache.picks(0));
    cache.commit();
  }
  step(0, 1);  // token 4 opens page 2 and selects
  EXPECT_EQ(list(cache.picked(0, 0)), (List{1, 2}));
  cache.commit();
  step(0, -1);  // still served, though page 0 is better for this query
  EXPECT_EQ(list(cache.picked(0, 0)), (List{1, 2}));
  cache.commit();
  step(0, -1);
  EXPECT_EQ(list(cache.picked(0, 0)), (List{1, 2, 3}));
  cache.rollback();
  step(0, -1);
  EXPECT_EQ(list(cache.picked(0, 0)), (List{1, 2, 3}));
  cache.commit();
  EXPECT_EQ(cache.selections(), 1);
  cache.truncate(3);  // the selection's token is gone
  step(0, -1);
  EXPECT_EQ(list(cache.picked(0, 0)), (List{0, 2}));
  EXPECT_EQ(cache.selections(), 2);
  cache.commit();
  for (int i = 0; i < 4; ++i) {
    step(0, 1);
    cache.commit();
  }
  EXPECT_EQ(list(cache.picked(0, 0)), (List{0, 2, 3, 4}));
  step(0, 1);
  EXPECT_EQ(list(cache.picked(0, 0)), (List{1, 4}));
}

// Specification, test C.3.
TEST(TokenSelection, TidalDecodeExample) {
  const std::array<const Rotary*, 2> rotaries{nullptr, nullptr};
  TokenSelectKvCache<float> cache({2, 1, 1, 1}, 1, 1.F, {{0}, 2}, rotaries, 8, 1);
  const std::array<float, 5> scores{.1F, 2, .3F, 1.5F, .2F};
  const float query = 1;
  const float lse = 3;
  for (std::size_t t = 0; t < scores.size(); ++t) {
    cache.append(1);
    const auto index = static_cast<std::int64_t>(t);
    for (std::int64_t layer = 0; layer < 2; ++layer)
      cache.store(layer, {&scores[t], 1, 1, 1}, {&scores[t], 1, 1, 1}, nullptr, 0, 1);
    EXPECT_TRUE(cache.published(0).empty());
    ASSERT_TRUE(cache.observes(0));
    ASSERT_FALSE(cache.observes(1));
    cache.observe({0, 0, {{&query, 1, 1, 1}, index, 0}, {}, &lse});
    cache.select(1, {{&query, 1, 1, 1}, index, 0});
    cache.commit();
  }
  EXPECT_EQ(list(cache.published(0)), (List{1, 3, 4}));  // token 4 is forced
  std::array<Segment<float>, 1> out;
  ASSERT_TRUE(cache.gathers());
  ASSERT_EQ(cache.segments(1, 0, out), 1);
  ASSERT_EQ(out[0].rule.visible, 3);
  EXPECT_EQ(out[0].key(0, 0)[0], 2);
  EXPECT_EQ(out[0].value(0, 1)[0], 1.5F);
  EXPECT_EQ(out[0].key(0, 2)[0], .2F);
}

TEST(Selection, RefusesWhatMakesNoSense) {
  const std::array<const Rotary*, 1> rotaries{nullptr};
  const auto code = [&](const PageSelection& selection) {
    const auto error = error_of([&] {
      PageSelectKvCache<float>({1, 1, 2, 2}, 1, selection, rotaries, 8, 1);
    });
    return error ? error->detail().field : "";
  };
  EXPECT_EQ(code(PageSelection::quest(1024)), "");
  EXPECT_EQ(code(PageSelection::lserve()), "");
  EXPECT_EQ(code({.page_size = 0}), "page_size");
  EXPECT_EQ(code({.page_size = 16, .logical_page_size = 5}), "logical_page_size");
  EXPECT_EQ(code({.budget = 0}), "budget");
  EXPECT_EQ(code({.budget = 513}), "budget");
  EXPECT_EQ(code({.budget = 500, .interval = 1000}), "budget");
  EXPECT_EQ(code({.interval = 0}), "interval");
  EXPECT_EQ(code({.dense_layers = -1}), "dense_layers");
  EXPECT_TRUE(error_of([&] { PageSelectKvCache<float>({1, 2, 2, 2}, 3, {}, rotaries, 8, 1); }));
  const auto tokens = [&](const TokenSelection& selection) {
    return error_of([&] {
             TokenSelectKvCache<float>({1, 1, 2, 2}, 1, 1.F, selection, rotaries, 8, 1);
           })
        .has_value();
  };
  EXPECT_FALSE(tokens({{0}, 4}));
  EXPECT_TRUE(tokens({{0, 0}, 4}));
  EXPECT_TRUE(tokens({{1}, 4}));
  EXPECT_TRUE(tokens({{0}, 0}));
}

}  // namespace SLUICE_TEST_UNIT
