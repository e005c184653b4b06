// SPDX-License-Identifier: MIT
// Scored retention in a whole decoder: every row's logits are those of a plain decoder in double
// whose rows see what the policy's definition says, kept sets recomputed in double from its own
// attention; and the kept lists are the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/scored_cache.hpp"
#include "sluice/cache/score_policy.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/decoder.hpp"
#include "support/naive_decoder.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::Geometry;
using test::kVocab;
using test::NaiveDecoder;
using test::random_tokens;
using test::small_decoder;

// As in group_streaming_test.cpp. A kept set that differs by one entry changes a logit by far more;
// scores that differ by rounding alone would have to be equal to 1e-6 to change a set, and the
// lists are compared themselves.
constexpr double kTolerance = 1.5e-4;

using Entries = std::vector<std::int64_t>;

/// The policy in plain code, for one layer. Feeds on the weights that the naive decoder has formed.
class PlainPolicy {
 public:
  PlainPolicy(const ScorePolicy& policy, std::size_t kv_heads, std::size_t group,
              const std::vector<double>& given)
      : policy_(policy), group_(group), given_(given), kept_(kv_heads), scores_(kv_heads) {}

  /// Entries of a head that rows of the chunk beginning now will see before themselves.
  const Entries& kept(std::size_t head) const { return kept_[head]; }

  /// The chunk [first, end) is over. weights[query head][row][key] of this layer.
  void commit(std::int64_t first, std::int64_t end,
              const std::vector<NaiveDecoder::Rows>& weights) {
    for (std::size_t h = 0; h < kept_.size(); ++h) {
      for (std::int64_t t = first; t < end; ++t) kept_[h].push_back(t);
      if (policy_.source == ScoreSource::kAllQueries)
        for (std::int64_t t = first; t < end; ++t)
          for (const std::int64_t j : kept_[h])
            if (j <= t) scores_[h][j] += reduced(weights, h, t, j, 1.0);
      if (policy_.source == ScoreSource::kGiven)
        for (std::int64_t t = first; t < end; ++t)
          scores_[h][t] = given_[static_cast<std::size_t>(t)];
    }
    bool full = false;
    for (const Entries& entries : kept_)
      full |= static_cast<std::int64_t>(entries.size()) + policy_.max_chunk >
              room(static_cast<std::size_t>(&entries - kept_.data()));
    if (full) select(end, weights);
  }

  void select(std::int64_t end, const std::vector<NaiveDecoder::Rows>& weights) {
    std::vector<std::map<std::int64_t, double>> chosen_by(kept_.size());
    for (std::size_t h = 0; h < kept_.size(); ++h) chosen_by[h] = final_scores(h, end, weights);
    std::vector<std::set<std::int64_t>> stay(kept_.size());
    const auto best_of = [&](std::size_t h, std::set<std::int64_t>& into, std::int64_t most) {
      Entries order;
      for (const std::int64_t j : kept_[h])
        if (!into.contains(j)) order.push_back(j);
      std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return chosen_by[h][a] > chosen_by[h][b];
      });
      for (std::size_t i = 0; i < order.size() && static_cast<std::int64_t>(into.size()) < most;
           ++i)
        into.insert(order[i]);
    };
    const auto heads = static_cast<std::int64_t>(kept_.size());
    std::int64_t left = heads * policy_.budget;
    for (std::size_t h = 0; h < kept_.size(); ++h) {
      const auto count = static_cast<std::int64_t>(kept_[h].size());
      std::int64_t most = policy_.budget;
      if (policy_.floor < 1)
        most = std::max(
            policy_.num_sink_tokens + policy_.recent,
            static_cast<std::int64_t>(policy_.floor * static_cast<double>(policy_.budget)));
      if (policy_.top >= 0) {
        best_of(h, stay[h], policy_.top);
        for (std::int64_t i = 0; i < policy_.num_sink_tokens; ++i)
          stay[h].insert(kept_[h][static_cast<std::size_t>(i)]);
        for (std::int64_t i = count - 1;
             i >= 1 && static_cast<std::int64_t>(stay[h].size()) < policy_.budget; --i)
          stay[h].insert(kept_[h][static_cast<std::size_t>(i)]);
        continue;
      }
      for (std::int64_t i = 0; i < std::min(count, policy_.num_sink_tokens); ++i)
        stay[h].insert(kept_[h][static_cast<std::size_t>(i)]);
      for (std::int64_t i = 0; i < std::min(count, policy_.recent); ++i)
        stay[h].insert(kept_[h][static_cast<std::size_t>(count - 1 - i)]);
      best_of(h, stay[h], most);
      left -= static_cast<std::int64_t>(stay[h].size());
    }
    if (policy_.floor < 1) {
      std::vector<std::pair<double, std::pair<std::size_t, std::int64_t>>> rest;
      for (std::size_t h = 0; h < kept_.size(); ++h)
        for (const std::int64_t j : kept_[h])
          if (!stay[h].contains(j)) rest.push_back({chosen_by[h][j], {h, j}});
      std::stable_sort(rest.begin(), rest.end(),
                       [](const auto& a, const auto& b) { return a.first > b.first; });
      for (std::size_t i = 0; i < rest.size() && static_cast<std::int64_t>(i) < left; ++i)
        stay[rest[i].second.first].insert(rest[i].second.second);
    }
    for (std::size_t h = 0; h < kept_.size(); ++h) {
      kept_[h].assign(stay[h].begin(), stay[h].end());
      for (auto& [j, score] : scores_[h]) score *= policy_.decay;
    }
    largest_.resize(kept_.size());
    for (std::size_t h = 0; h < kept_.size(); ++h)
      largest_[h] = static_cast<std::int64_t>(kept_[h].size());
  }

 private:
  /// Entries of a head that storage holds: after a selection with shared budgets each head has what
  /// it kept and room to grow.
  std::int64_t room(std::size_t head) const {
    if (policy_.floor == 1 || largest_.empty()) return policy_.budget + policy_.growth;
    return largest_[head] + policy_.growth;
  }

  double reduced(const std::vector<NaiveDecoder::Rows>& weights, std::size_t h, std::int64_t t,
                 std::int64_t j, double scale) const {
    double result = 0;
    for (std::size_t g = 0; g < group_; ++g) {
      const double share =
          scale * weights[h * group_ + g][static_cast<std::size_t>(t)][static_cast<std::size_t>(j)];
      switch (policy_.group_reduction) {
        case GroupReduction::kMean: result += share / static_cast<double>(group_); break;
        case GroupReduction::kSum: result += share; break;
        case GroupReduction::kMax: result = g == 0 ? share : std::max(result, share); break;
      }
    }
    return result;
  }

  std::map<std::int64_t, double> final_scores(std::size_t h, std::int64_t end,
                                              const std::vector<NaiveDecoder::Rows>& weights) {
    if (policy_.source != ScoreSource::kLastQueries) {
      std::map<std::int64_t, double> scores;
      for (const std::int64_t j : kept_[h])
        scores[j] = policy_.query_reduction == QueryReduction::kMean
                        ? scores_[h][j] / static_cast<double>(end - j)
                        : scores_[h][j];
      return scores;
    }
    const std::int64_t first = std::max<std::int64_t>(0, end - policy_.num_queries);
    Entries before;
    for (const std::int64_t j : kept_[h])
      if (j < end - policy_.num_queries) before.push_back(j);
    std::vector<double> votes(before.size());
    for (std::int64_t t = first; t < end; ++t)
      for (std::size_t i = 0; i < before.size(); ++i) {
        // Shares of what is there now: of a row's weights those of entries that have not left.
        double result = 0;
        for (std::size_t g = 0; g < group_; ++g) {
          const std::vector<double>& row = weights[h * group_ + g][static_cast<std::size_t>(t)];
          double sum = 0;
          for (const std::int64_t j : kept_[h])
            if (j <= t) sum += row[static_cast<std::size_t>(j)];
          const double share = row[static_cast<std::size_t>(before[i])] / sum;
          result = policy_.group_reduction == GroupReduction::kMax
                       ? std::max(result, share)
                       : result + share / (policy_.group_reduction == GroupReduction::kMean
                                               ? static_cast<double>(group_)
                                               : 1.0);
        }
        votes[i] += result;
      }
    std::map<std::int64_t, double> scores;
    for (const std::int64_t j : kept_[h]) scores[j] = 0;
    const auto half = static_cast<std::ptrdiff_t>(policy_.pool_size / 2);
    for (std::ptrdiff_t i = 0; i < std::ssize(before); ++i) {
      double pooled = policy_.pooling == ScorePooling::kMax ? -1 : 0;
      for (std::ptrdiff_t k = i - half; k <= i + half; ++k) {
        if (k < 0 || k >= std::ssize(before)) continue;
        const double vote = votes[static_cast<std::size_t>(k)];
        pooled = policy_.pooling == ScorePooling::kMax ? std::max(pooled, vote) : pooled + vote;
      }
      if (policy_.pooling == ScorePooling::kAverage)
        pooled /= static_cast<double>(policy_.pool_size);
      scores[before[static_cast<std::size_t>(i)]] =
          policy_.pooling == ScorePooling::kNone ? votes[static_cast<std::size_t>(i)] : pooled;
    }
    return scores;
  }

  ScorePolicy policy_;
  std::size_t group_;
  std::vector<double> given_;
  std::vector<Entries> kept_;
  std::vector<std::map<std::int64_t, double>> scores_;
  std::vector<std::int64_t> largest_;
};

struct Outcome {
  double largest_difference = 0;
  std::int64_t selections = 0;
};

/// A stream through the cache and through the definition.
Outcome compare(const ScorePolicy& policy, std::uint64_t seed, std::int64_t length) {
  Random random(seed);
  const Geometry geometry{.num_layers = 2, .num_qo_heads = 6, .num_kv_heads = 3};
  const auto model = small_decoder(geometry, seed);
  const std::vector<Token> tokens = random_tokens(random, length);
  std::vector<double> given;
  for (std::int64_t t = 0; t < length; ++t) given.push_back(std::floor(8 * random.uniform()) / 4);
  std::vector<std::int64_t> ends;
  for (std::int64_t end = 0; end < length; ends.push_back(end))
    end += std::min(length - end, between(random, 1, policy.max_chunk));

  ScoredKvCache<float> cache = model->make_scored_cache<float>(policy);
  ThreadTeam team(1);
  DecoderWorkspace workspace(*model, cache.max_chunk(), cache.max_entries(), 1);
  std::vector<std::vector<float>> logits;
  std::vector<std::map<std::pair<std::int64_t, std::int64_t>, Entries>> kept_after;
  std::int64_t first = 0;
  for (const std::int64_t end : ends) {
    EXPECT_EQ(cache.status(end - first), CacheStatus::kOk);
    if (random.below(4) == 0) {  // something else is read, and taken back
      const std::vector<Token> other = random_tokens(random, policy.max_chunk);
      model->forward(other, cache, workspace, team);
      cache.rollback();
    }
    model->forward({tokens.data() + first, static_cast<std::size_t>(end - first)}, cache, workspace,
                   team);
    std::vector<float> rows(static_cast<std::size_t>((end - first) * kVocab));
    model->logits(0, {rows.data(), end - first, kVocab}, workspace, team);
    for (std::int64_t r = 0; r < end - first; ++r)
      logits.emplace_back(rows.begin() + r * kVocab, rows.begin() + (r + 1) * kVocab);
    if (policy.source == ScoreSource::kGiven) {
      std::vector<float> scores;
      for (std::int64_t t = first; t < end; ++t)
        scores.push_back(static_cast<float>(given[static_cast<std::size_t>(t)]));
      cache.give_scores(scores);
    }
    cache.commit();
    auto& after = kept_after.emplace_back();
    for (std::int64_t l = 0; l < geometry.num_layers; ++l)
      for (std::int64_t h = 0; h < geometry.num_kv_heads; ++h) {
        const std::span<const std::int64_t> entries = cache.kept(l, h);
        after[{l, h}] = {entries.begin(), entries.end()};
      }
    first = end;
  }

  std::vector<PlainPolicy> plain(static_cast<std::size_t>(geometry.num_layers),
                                 PlainPolicy(policy, 3, 2, given));
  std::vector<std::size_t> chunks_done(plain.size());
  NaiveDecoder::Pass pass;
  bool lists_equal = true;
  const auto advance = [&](std::size_t layer, std::int64_t row) {
    std::size_t& done = chunks_done[layer];
    while (done < ends.size() && ends[done] <= row) {
      plain[layer].commit(done == 0 ? 0 : ends[done - 1], ends[done], pass.weights[layer]);
      for (std::int64_t h = 0; h < geometry.num_kv_heads; ++h)
        lists_equal &= plain[layer].kept(static_cast<std::size_t>(h)) ==
                       kept_after[done][{static_cast<std::int64_t>(layer), h}];
      ++done;
    }
  };
  NaiveDecoder(*model).run_heads(
      tokens,
      [&](std::size_t layer, std::size_t head, std::size_t query,
          std::size_t key) -> std::optional<double> {
        const auto i = static_cast<std::int64_t>(query);
        const auto j = static_cast<std::int64_t>(key);
        advance(layer, i);
        const std::int64_t chunk_first = chunks_done[layer] == 0 ? 0 : ends[chunks_done[layer] - 1];
        const Entries& kept = plain[layer].kept(head);
        const auto place = std::lower_bound(kept.begin(), kept.end(), j);
        const bool is_kept = place != kept.end() && *place == j;
        if (j > i || (j < chunk_first && !is_kept)) return std::nullopt;
        if (policy.position_rule == PositionRule::kInText) return static_cast<double>(i - j);
        const auto count = static_cast<double>(kept.size());
        const double key_rank = is_kept ? static_cast<double>(place - kept.begin())
                                        : count + static_cast<double>(j - chunk_first);
        return count + static_cast<double>(i - chunk_first) - key_rank;
      },
      pass);
  for (std::size_t layer = 0; layer < plain.size(); ++layer) advance(layer, length);
  EXPECT_TRUE(lists_equal) << "seed " << seed;
  Outcome outcome{0, cache.selections()};
  for (std::size_t t = 0; t < logits.size(); ++t)
    for (std::size_t i = 0; i < logits[t].size(); ++i)
      outcome.largest_difference =
          std::max(outcome.largest_difference,
                   std::abs(static_cast<double>(logits[t][i]) - pass.logits[t][i]));
  return outcome;
}

void expect_definition(const char* name, const ScorePolicy& policy) {
  double worst = 0;
  std::int64_t selections = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    const Outcome outcome = compare(policy, seed, 60);
    worst = std::max(worst, outcome.largest_difference);
    selections += outcome.selections;
  }
  ::testing::Test::RecordProperty(std::string(name) + ", largest difference",
                                  std::to_string(worst));
  EXPECT_LT(worst, kTolerance) << name;
  EXPECT_GE(selections, 12) << name;
}

TEST(ScoredStream, SnapKv) {
  expect_definition("average", ScorePolicy::snap_kv(12, 9, 4, 5, ScorePooling::kAverage, 3));
  expect_definition("maximum", ScorePolicy::snap_kv(12, 9, 4, 5, ScorePooling::kMax, 5));
  ScorePolicy one = ScorePolicy::snap_kv(10, 6, 6, 1, ScorePooling::kNone, 1);
  one.num_sink_tokens = 2;
  one.group_reduction = GroupReduction::kMax;
  expect_definition("one query, sinks", one);
}

TEST(ScoredStream, HeavyHitters) {
  expect_definition("every token", ScorePolicy::h2o(6, 4));
  expect_definition("chunks", ScorePolicy::h2o(6, 4, 5));
  ScorePolicy mean = ScorePolicy::h2o(6, 4, 3);
  mean.query_reduction = QueryReduction::kMean;
  mean.group_reduction = GroupReduction::kMax;
  mean.growth = 8;
  mean.num_sink_tokens = 1;
  mean.budget = 11;
  expect_definition("mean of those that could see it", mean);
  ScorePolicy ranks = ScorePolicy::h2o(6, 4, 5);
  ranks.position_rule = PositionRule::kInCache;
  ranks.origin = 3.5;
  expect_definition("at ranks", ranks);
}

TEST(ScoredStream, SharedBudgets) {
  ScorePolicy policy = ScorePolicy::h2o(8, 4, 4);
  policy.floor = 0.5;
  policy.growth = 7;
  expect_definition("half", policy);
  policy.floor = 0;
  policy.position_rule = PositionRule::kInCache;
  expect_definition("all", policy);
}

TEST(ScoredStream, GivenScores) {
  expect_definition("SirLLM", ScorePolicy::sir_llm(2, 3, 8, 0.7, 4));
  expect_definition("as released", ScorePolicy::sir_llm_released(2, 2, 9, 0.9, 4));
  ScorePolicy gaps = ScorePolicy::sir_llm(2, 0, 8, 1, 3);
  gaps.position_rule = PositionRule::kInText;
  expect_definition("with gaps", gaps);
}

/// A budget that holds everything is a full cache.
TEST(ScoredStream, NothingLeavesBelowTheBudget) {
  Random random(9);
  const auto model = small_decoder({.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 2}, 9);
  const std::vector<Token> tokens = random_tokens(random, 40);
  const auto logits = [&](auto cache) {
    ThreadTeam team(1);
    DecoderWorkspace workspace(*model, 8, 64, 1);
    for (std::size_t t = 0; t < tokens.size(); t += 8) {
      model->forward({tokens.data() + t, 8}, cache, workspace, team);
      cache.commit();
    }
    std::vector<float> row(static_cast<std::size_t>(kVocab));
    model->logits(7, {row.data(), 1, kVocab}, workspace, team);
    return row;
  };
  CacheOptions full{.policy = CachePolicy::kFull, .capacity = 64};
  const std::vector<float> expected =
      logits(model->make_cache<float>(plan_cache(model->config(), full)));
  EXPECT_EQ(logits(model->make_scored_cache<float>(ScorePolicy::snap_kv(40, 24, 8, 8))), expected);
}

/// A long stream: the capacity is never exceeded and lists, rows and positions stay in step.
TEST(ScoredStream, FixedBudgetMeansFixed) {
  Random random(11);
  const auto model = small_decoder({.num_layers = 2, .num_qo_heads = 4, .num_kv_heads = 2}, 11);
  for (const double floor : {1.0, 0.25}) {
    ScorePolicy policy = ScorePolicy::h2o(10, 6, 4);
    policy.floor = floor;
    policy.growth = 9;
    ScoredKvCache<f16> cache = model->make_scored_cache<f16>(policy);
    ThreadTeam team(1);
    DecoderWorkspace workspace(*model, cache.max_chunk(), cache.max_entries(), 1);
    while (cache.total() < 5000) {
      const std::int64_t chunk = between(random, 1, 4);
      model->forward(random_tokens(random, chunk), cache, workspace, team);
      if (random.below(5) == 0)
        cache.rollback();
      else
        cache.commit();
      for (std::int64_t l = 0; l < 2; ++l) {
        std::int64_t entries = 0;
        for (std::int64_t h = 0; h < 2; ++h) {
          const std::span<const std::int64_t> kept = cache.kept(l, h);
          entries += static_cast<std::int64_t>(kept.size());
          ASSERT_TRUE(std::is_sorted(kept.begin(), kept.end()));
          ASSERT_TRUE(std::adjacent_find(kept.begin(), kept.end()) == kept.end());
          // The newest are always there, up to the last committed token.
          for (std::int64_t i = 1; i <= std::min<std::int64_t>(6, cache.total()); ++i)
            ASSERT_EQ(kept[kept.size() - static_cast<std::size_t>(i)], cache.total() - i);
        }
        ASSERT_LE(entries, 2 * policy.capacity());
      }
    }
    EXPECT_GT(cache.selections(), 500);
  }
}

}  // namespace SLUICE_TEST_UNIT
