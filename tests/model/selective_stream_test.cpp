// SPDX-License-Identifier: MIT
// Selective reading in a whole decoder: every row's logits are those of a plain decoder in double
// whose rows see what the rule, recomputed in double from its own queries and keys, picks.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/selective_cache.hpp"
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
using test::kHeadDim;
using test::kVocab;
using test::NaiveDecoder;
using test::random_tokens;
using test::small_decoder;

// As in scored_stream_test.cpp: a pick that differs changes a logit by far more.
constexpr double kTolerance = 1.5e-4;
constexpr std::int64_t kLayers = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kGroup = 2;
const Geometry kGeometry{.num_layers = kLayers, .num_qo_heads = 4, .num_kv_heads = kKvHeads};

/// Chunks of a stream: long ones and steps, and where something else is read and taken back.
struct Feed {
  std::vector<Token> tokens;
  std::vector<std::int64_t> ends;
};

Feed random_feed(Random& random, std::int64_t length) {
  Feed feed{random_tokens(random, length), {}};
  for (std::int64_t end = 0; end < length; feed.ends.push_back(end))
    end += random.below(6) == 0 ? std::min(length - end, between(random, 1, 6)) : 1;
  return feed;
}

template <class Cache>
std::vector<std::vector<float>> logits_of(const Decoder& model, Cache& cache, const Feed& feed,
                                          Random& random, int threads = 1) {
  ThreadTeam team(threads);
  DecoderWorkspace workspace(model, cache.max_chunk(), cache.max_entries(), threads,
                             Cache::kMaxSegments);
  std::vector<std::vector<float>> logits;
  std::int64_t first = 0;
  for (const std::int64_t end : feed.ends) {
    if (random.below(4) == 0 && cache.status(3) == CacheStatus::kOk) {
      model.forward(random_tokens(random, 3), cache, workspace, team);
      cache.commit();
      cache.truncate(3);
    }
    model.forward({feed.tokens.data() + first, static_cast<std::size_t>(end - first)}, cache,
                  workspace, team);
    std::vector<float> rows(static_cast<std::size_t>((end - first) * kVocab));
    model.logits(0, {rows.data(), end - first, kVocab}, workspace, team);
    for (std::int64_t r = 0; r < end - first; ++r)
      logits.emplace_back(rows.begin() + r * kVocab, rows.begin() + (r + 1) * kVocab);
    cache.commit();
    first = end;
  }
  return logits;
}

double largest_difference(const std::vector<std::vector<float>>& logits,
                          const NaiveDecoder::Rows& expected) {
  double largest = 0;
  for (std::size_t t = 0; t < logits.size(); ++t)
    for (std::size_t i = 0; i < logits[t].size(); ++i)
      largest = std::max(largest, std::abs(static_cast<double>(logits[t][i]) - expected[t][i]));
  return largest;
}

/// Row i is a chunk of its own.
std::vector<bool> steps_of(const Feed& feed) {
  std::vector<bool> steps(feed.tokens.size());
  std::int64_t first = 0;
  for (const std::int64_t end : feed.ends) {
    if (end == first + 1) steps[static_cast<std::size_t>(first)] = true;
    first = end;
  }
  return steps;
}

std::vector<double> rotated(const Decoder& model, const double* x, double position) {
  const double theta = model.config().rotaries[0].theta;
  std::vector<double> y(kHeadDim);
  for (std::size_t i = 0; i < kHeadDim / 2; ++i) {
    const double angle = position * std::pow(theta, -2.0 * static_cast<double>(i) / kHeadDim);
    const double a = x[i];
    const double b = x[i + kHeadDim / 2];
    y[i] = a * std::cos(angle) - b * std::sin(angle);
    y[i + kHeadDim / 2] = b * std::cos(angle) + a * std::sin(angle);
  }
  return y;
}

/// The definition of Quest's and LServe's rule for one KV head of a layer.
std::set<std::int64_t> plain_pages(const Decoder& model, const NaiveDecoder::Pass& pass,
                                   const PageSelection& rule, std::size_t layer, std::size_t head,
                                   std::int64_t row) {
  const std::int64_t n = row + 1;
  std::vector<std::vector<double>> keys;
  for (std::int64_t j = 0; j < n; ++j)
    keys.push_back(rotated(model,
                           pass.keys[layer][static_cast<std::size_t>(j)].data() + head * kHeadDim,
                           static_cast<double>(j)));
  std::vector<std::pair<double, std::int64_t>> ranking;
  for (std::int64_t page = 0; page * rule.page_size < n; ++page) {
    double best = -1e30;
    for (std::int64_t from = page * rule.page_size; from < std::min(n, (page + 1) * rule.page_size);
         from += rule.logical_page_size)
      for (std::size_t g = 0; g < kGroup; ++g) {
        const std::vector<double> q =
            rotated(model,
                    pass.queries[layer][static_cast<std::size_t>(row)].data() +
                        (head * kGroup + g) * kHeadDim,
                    static_cast<double>(row));
        double bound = 0;
        for (std::size_t d = 0; d < kHeadDim; ++d) {
          double largest = -1e30;
          for (std::int64_t j = from; j < std::min(n, from + rule.logical_page_size); ++j)
            largest = std::max(largest, q[d] * keys[static_cast<std::size_t>(j)][d]);
          bound += largest;
        }
        best = std::max(best, bound);
      }
    ranking.emplace_back(best, page);
  }
  std::set<std::int64_t> picked{ranking.back().second};
  ranking.pop_back();
  std::stable_sort(ranking.begin(), ranking.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  for (std::size_t i = 0; static_cast<std::int64_t>(i) + 1 < rule.budget; ++i)
    picked.insert(ranking[i].second);
  return picked;
}

void expect_pages(const PageSelection& rule, std::uint64_t seed) {
  Random random(seed);
  const auto model = small_decoder(kGeometry, seed);
  const Feed feed = random_feed(random, 70);
  auto cache = model->make_page_select_cache<float>(rule, 80, 6);
  const auto logits = logits_of(*model, cache, feed, random);
  EXPECT_GT(cache.selections(), 10);
  const std::vector<bool> steps = steps_of(feed);

  struct State {
    std::int64_t selected_at = 0;
    std::set<std::int64_t> pages;
  };
  std::map<std::pair<std::size_t, std::size_t>, State> states;
  std::map<std::pair<std::size_t, std::size_t>, std::int64_t> done;
  NaiveDecoder::Pass pass;
  NaiveDecoder(*model).run_heads(
      feed.tokens,
      [&](std::size_t layer, std::size_t head, std::size_t query,
          std::size_t key) -> std::optional<double> {
        const auto i = static_cast<std::int64_t>(query);
        const auto j = static_cast<std::int64_t>(key);
        if (j > i) return std::nullopt;
        const std::int64_t pages = (i + rule.page_size) / rule.page_size;
        State& state = states[{layer, head}];
        if (static_cast<std::int64_t>(layer) >= rule.dense_layers && steps[query] &&
            pages > rule.budget) {
          if (done[{layer, head}] != i + 1) {
            done[{layer, head}] = i + 1;
            if (state.selected_at == 0 || i + 1 - state.selected_at >= rule.interval)
              state = {i + 1, plain_pages(*model, pass, rule, layer, head, i)};
          }
          // Pages behind the newest of the selection have been opened since.
          const std::int64_t page = j / rule.page_size;
          if (page < *state.pages.rbegin() && !state.pages.contains(page)) return std::nullopt;
        }
        return static_cast<double>(i - j);
      },
      pass);
  EXPECT_LT(largest_difference(logits, pass.logits), kTolerance) << "seed " << seed;
}

TEST(SelectiveStream, Pages) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    expect_pages({.page_size = 4, .logical_page_size = 4, .budget = 3, .dense_layers = 1}, seed);
    expect_pages({.page_size = 6, .logical_page_size = 2, .budget = 4, .dense_layers = 0}, seed);
    expect_pages({.page_size = 1, .logical_page_size = 1, .budget = 9, .dense_layers = 2}, seed);
    expect_pages(
        {.page_size = 4, .logical_page_size = 2, .budget = 3, .interval = 4, .dense_layers = 0},
        seed);
    expect_pages(
        {.page_size = 3, .logical_page_size = 3, .budget = 3, .interval = 8, .dense_layers = 1},
        seed);
  }
}

/// The published tokens of a KV head: the largest shares, in double, of any of its query heads.
void expect_tokens(const TokenSelection& rule, std::uint64_t seed) {
  Random random(seed);
  const auto model = small_decoder(kGeometry, seed);
  const Feed feed = random_feed(random, 70);
  auto cache = model->make_token_select_cache<float>(rule, 80, 6);
  const auto logits = logits_of(*model, cache, feed, random);
  const std::vector<bool> steps = steps_of(feed);
  std::map<std::pair<std::size_t, std::size_t>, std::pair<std::size_t, std::set<std::size_t>>> sets;
  NaiveDecoder::Pass pass;
  NaiveDecoder(*model).run_heads(
      feed.tokens,
      [&](std::size_t layer, std::size_t head, std::size_t query,
          std::size_t key) -> std::optional<double> {
        if (key > query) return std::nullopt;
        std::int64_t source = -1;
        for (const std::int64_t publishing : rule.publishing_layers)
          if (publishing <= static_cast<std::int64_t>(layer)) source = publishing;
        if (steps[query] && source >= 0 && source != static_cast<std::int64_t>(layer)) {
          auto& [row, tokens] = sets[{layer, head}];
          if (tokens.empty() || row != query) {
            std::vector<std::pair<double, std::size_t>> ranking;
            for (std::size_t j = 0; j < query; ++j) {
              double share = 0;
              for (std::size_t g = head * kGroup; g < (head + 1) * kGroup; ++g)
                share =
                    std::max(share, pass.weights[static_cast<std::size_t>(source)][g][query][j]);
              ranking.emplace_back(share, j);
            }
            std::stable_sort(ranking.begin(), ranking.end(),
                             [](const auto& a, const auto& b) { return a.first > b.first; });
            row = query;
            tokens = {query};
            for (std::size_t i = 0;
                 i < ranking.size() && static_cast<std::int64_t>(i) < rule.budget; ++i)
              tokens.insert(ranking[i].second);
          }
          if (!tokens.contains(key)) return std::nullopt;
        }
        return static_cast<double>(query) - static_cast<double>(key);
      },
      pass);
  EXPECT_LT(largest_difference(logits, pass.logits), kTolerance) << "seed " << seed;
}

TEST(SelectiveStream, Tokens) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    expect_tokens({{1}, 8}, seed);
    expect_tokens({{0, 2}, 5}, seed);
    expect_tokens({{2}, 1}, seed);
  }
}

/// A budget that holds everything is a full cache, bit for bit: it is read as one segment.
TEST(SelectiveStream, EverythingIsAFullCache) {
  for (const int threads : {1, 2}) {
    Random feeding(5);
    const auto model = small_decoder(kGeometry, 5);
    const Feed feed = random_feed(feeding, 60);
    const auto with = [&](auto cache) {
      Random random(6);
      return logits_of(*model, cache, feed, random, threads);
    };
    CacheOptions full{.policy = CachePolicy::kFull, .capacity = 64};
    full.chunk_size = 6;
    const auto expected = with(model->make_cache<f16>(plan_cache(model->config(), full)));
    EXPECT_EQ(
        with(model->make_page_select_cache<f16>(
            {.page_size = 4, .logical_page_size = 2, .budget = 16, .dense_layers = 0}, 64, 6)),
        expected);
    EXPECT_EQ(with(model->make_token_select_cache<f16>({{1}, 64}, 64, 6)), expected);
  }
}

/// Hundreds of single-token pages are as many segments.
TEST(SelectiveStream, HundredsOfSegments) {
  Random random(8);
  const auto model = small_decoder(kGeometry, 8);
  const Feed feed{random_tokens(random, 700), {}};
  auto cache = model->make_page_select_cache<float>(
      {.page_size = 1, .logical_page_size = 1, .budget = 300, .dense_layers = 0}, 700, 64);
  ThreadTeam team(2);
  DecoderWorkspace workspace(*model, 64, 700, 2, cache.kMaxSegments);
  for (std::int64_t first = 0; first < 640; first += 64) {
    model->forward({feed.tokens.data() + first, 64}, cache, workspace, team);
    cache.commit();
  }
  std::vector<Segment<float>> out(static_cast<std::size_t>(cache.kMaxSegments));
  int most = 0;
  for (std::size_t t = 640; t < 700; ++t) {
    model->forward({feed.tokens.data() + t, 1}, cache, workspace, team);
    for (int part = 0; part < cache.num_classes(0); ++part) {
      const int count = cache.segments(
          0, 1, std::span<Segment<float>, static_cast<std::size_t>(cache.kMaxSegments)>(out), part);
      most = std::max(most, count);
      std::int64_t visible = 0;
      for (int s = 0; s < count; ++s) visible += out[static_cast<std::size_t>(s)].rule.visible;
      ASSERT_EQ(visible, 300);
    }
    cache.commit();
  }
  EXPECT_GT(most, 100);
}

}  // namespace SLUICE_TEST_UNIT
