// SPDX-License-Identifier: MIT
#include "sluice/stream/block_beam.hpp"
#include "support/test_unit.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using Tokens = std::vector<Token>;

/// A source that is spelled token by token: 1 2 3 ..., of which `heard` have arrived. The model
/// says the next one with probability 0.8; when there is none, it ends (0) or repeats what it said.
struct Speller {
  std::int64_t heard = 0;
  bool repeats = false;

  void operator()(std::span<const Token> said, std::span<double> next) const {
    std::fill(next.begin(), next.end(), std::log(0.2 / static_cast<double>(next.size() - 1)));
    const auto count = static_cast<std::int64_t>(said.size());
    const std::int64_t likely =
        count < heard ? count + 1 : (repeats && count > 0 ? said.back() : 0);
    next[static_cast<std::size_t>(likely)] = std::log(0.8);
  }
};

TEST(BlockBeam, GrowsAsFarAsTheBlocksCarryIt) {
  for (const bool repeats : {false, true}) {
    BlockBeam beam(1, 0, 20);
    beam.extend(8, false, Speller{2, repeats});
    EXPECT_EQ(beam.best().tokens, (Tokens{1, 2})) << repeats;
    beam.extend(8, false, Speller{2, repeats});  // nothing new
    EXPECT_EQ(beam.best().tokens, (Tokens{1, 2}));
    beam.extend(8, false, Speller{5, repeats});
    EXPECT_EQ(beam.best().tokens, (Tokens{1, 2, 3, 4, 5}));
    EXPECT_TRUE(beam.ended().empty());
    beam.extend(8, true, Speller{6, false});
    EXPECT_EQ(beam.best().tokens, (Tokens{1, 2, 3, 4, 5, 6, 0}));
    EXPECT_NEAR(beam.best().score, 7 * std::log(0.8), 1e-12);
  }
}

// A beam that holds every text finds the best one.
TEST(BlockBeam, OfEnoughWidthFindsTheMostProbableText) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto score = [&](std::span<const Token> said, std::span<double> next) {
      std::uint64_t hash = seed;
      for (const Token token : said) hash = hash * 1000003 + static_cast<std::uint64_t>(token) + 1;
      Random random(hash);
      double sum = 0;
      for (double& value : next) sum += value = 0.01 + random.uniform();
      for (double& value : next) value = std::log(value / sum);
    };
    double best = -std::numeric_limits<double>::infinity();
    const std::function<void(Tokens, double)> search = [&](Tokens said, double sum) {
      if (said.size() == 4 || (!said.empty() && said.back() == 0)) {
        best = std::max(best, sum);
        return;
      }
      std::vector<double> next(3);
      score(said, next);
      for (std::size_t token = 0; token < 3; ++token) {
        Tokens longer = said;
        longer.push_back(static_cast<Token>(token));
        search(longer, sum + next[token]);
      }
    };
    search({}, 0);
    BlockBeam beam(100, 0, 4);
    beam.extend(3, true, score);
    EXPECT_NEAR(beam.best().score, best, 1e-12) << seed;
  }
  EXPECT_THROW(BlockBeam(0, 0, 4), Error);
  EXPECT_THROW(BlockBeam(1, 0, 0), Error);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
