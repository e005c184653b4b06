// SPDX-License-Identifier: MIT
/// Scored retention under a fixed budget, as data: where scores come from, how they are reduced and
/// pooled, what is protected, how many entries stay. SnapKV, H2O, Q-Filters, SirLLM and StreamMem
/// are settings of these. Selection works on plain arrays and knows no cache.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "sluice/cache/segment.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Where an entry's score comes from. P = e^(score - lse) is the share of a query's attention.
enum class ScoreSource : std::uint8_t {
  /// P summed over the last `num_queries` tokens' queries, formed when entries are selected, over
  /// all entries that are there then (SnapKV's observation window).
  kLastQueries,
  /// P summed over all queries since the entry came, each at its own time (H2O).
  kAllQueries,
  /// P summed over the queries of tokens that are fed for this alone and then taken back; their
  /// attention is over the entries that may leave (StreamMem's proxy queries).
  kProxyQueries,
  /// The key's component along a direction found offline for its head (Q-Filters).
  kKeyDirection,
  /// Given by the caller, one number a token for all layers and heads: the surprisal of the token
  /// under the model's own logits (SirLLM).
  kGiven,
};

/// Over queries: sums favour entries that have been there for long; means divide by the number of
/// queries that could see the entry.
enum class QueryReduction : std::uint8_t { kSum, kMean };
/// Over the query heads that share a KV head.
enum class GroupReduction : std::uint8_t { kMean, kSum, kMax };
/// Along the entries, odd window, stride 1: averages count the padding as zeros, maxima skip it.
enum class ScorePooling : std::uint8_t { kNone, kAverage, kMax };

/// Which entries stay. Entries are numbered by age; ties go to the older.
struct KeepRule {
  std::int64_t num_sink_tokens = 0;  ///< the first entries stay
  std::int64_t recent = 0;           ///< the newest stay
  std::int64_t budget = 0;           ///< entries that stay, the above included
  /// SirLLM as released: the best `top` of all entries stay, sinks and newest ones competing, then
  /// the sinks, and what is left of the budget goes to the newest. Negative: off.
  std::int64_t top = -1;
};

/// Marks the entries that stay. scores: [count], a NaN counts as the lowest; order: [count],
/// scratch; kept: [budget or more], gets their numbers, ascending. Returns how many stay: all where
/// count <= budget. O(count) on average (one selection, then sorting what stays). Allocates
/// nothing. Precondition: sinks + recent <= budget.
inline std::int64_t select_entries(std::span<const double> scores, const KeepRule& rule,
                                   std::span<std::int64_t> order, std::span<std::int64_t> kept) {
  const auto count = static_cast<std::int64_t>(scores.size());
  SLUICE_ASSERT(rule.num_sink_tokens + std::max(rule.recent, rule.top) <= rule.budget);
  if (count <= rule.budget) {
    for (std::int64_t i = 0; i < count; ++i) kept[static_cast<std::size_t>(i)] = i;
    return count;
  }
  const auto value = [&](std::int64_t i) {
    const double score = scores[static_cast<std::size_t>(i)];
    return std::isnan(score) ? -std::numeric_limits<double>::infinity() : score;
  };
  const auto better = [&](std::int64_t a, std::int64_t b) {
    const double x = value(a);
    const double y = value(b);
    return x != y ? x > y : a < b;
  };
  const bool compete = rule.top >= 0;
  const std::int64_t first = compete ? 0 : rule.num_sink_tokens;
  const std::int64_t last = compete ? count : count - rule.recent;
  const std::int64_t best =
      std::min(compete ? rule.top : rule.budget - rule.num_sink_tokens - rule.recent, last - first);
  for (std::int64_t i = first; i < last; ++i) order[static_cast<std::size_t>(i - first)] = i;
  const auto begin = order.begin();
  if (best < last - first) std::nth_element(begin, begin + best, begin + (last - first), better);
  std::int64_t written = 0;
  for (std::int64_t i = 0; i < best; ++i)
    kept[static_cast<std::size_t>(written++)] = order[static_cast<std::size_t>(i)];
  std::sort(kept.begin(), kept.begin() + written);
  const auto add = [&](std::int64_t i) {
    const auto end = kept.begin() + written;
    const auto place = std::lower_bound(kept.begin(), end, i);
    if (place != end && *place == i) return;
    std::copy_backward(place, end, end + 1);
    *place = i;
    ++written;
  };
  for (std::int64_t i = 0; i < rule.num_sink_tokens; ++i) add(i);
  for (std::int64_t i = count - 1; i >= count - rule.recent; --i) add(i);
  if (compete)
    for (std::int64_t i = count - 1; i >= 1 && written < rule.budget; --i) add(i);
  return written;
}

/// out[i] = scores pooled over size entries round i. Sizes are odd. in and out: [count], not the
/// same memory. Allocates nothing.
inline void pool_scores(std::span<const double> in, ScorePooling pooling, std::int64_t size,
                        std::span<double> out) {
  const auto count = static_cast<std::int64_t>(in.size());
  const std::int64_t half = pooling == ScorePooling::kNone ? 0 : size / 2;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t first = std::max<std::int64_t>(0, i - half);
    const std::int64_t last = std::min(count - 1, i + half);
    double pooled = pooling == ScorePooling::kAverage ? 0 : in[static_cast<std::size_t>(first)];
    for (std::int64_t j = first; j <= last; ++j) {
      const double score = in[static_cast<std::size_t>(j)];
      pooled = pooling == ScorePooling::kAverage ? pooled + score : std::max(pooled, score);
    }
    out[static_cast<std::size_t>(i)] =
        pooling == ScorePooling::kAverage ? pooled / static_cast<double>(size) : pooled;
  }
}

/// A policy that keeps what scores highest. Use the named constructors, then change what you like.
struct ScorePolicy {
  ScoreSource source = ScoreSource::kLastQueries;
  std::int64_t num_queries = 32;  ///< kLastQueries: how many; kProxyQueries: at most so many
  QueryReduction query_reduction = QueryReduction::kSum;
  GroupReduction group_reduction = GroupReduction::kMean;
  ScorePooling pooling = ScorePooling::kNone;
  std::int64_t pool_size = 1;
  std::int64_t num_sink_tokens = 0;  ///< protected
  std::int64_t recent = 0;           ///< protected
  /// Entries of a KV head that stay when entries are selected, protected ones included.
  std::int64_t budget = 0;
  /// Heads of a layer share budget * heads entries by rank of their scores, but none gets fewer
  /// than `floor` * budget (AdaKV's rule). Nothing below 1: all heads keep `budget`.
  double floor = 1;
  /// Scores of entries that stay are multiplied by this at each selection (SirLLM's decay).
  double decay = 1;
  /// SirLLM as released, KeepRule::top. Negative: off.
  std::int64_t top = -1;
  /// Entries beyond the budget that storage has room for. Selection happens at a commit that leaves
  /// less than a chunk free, or when the caller asks.
  std::int64_t growth = 0;
  std::int64_t max_chunk = 1;  ///< at most `growth`
  /// kInText: keys are rotated where they stood in the text, gaps stay. kInCache: keys are stored
  /// raw and read at their ranks, so positions stay below the capacity for ever.
  PositionRule position_rule = PositionRule::kInText;
  Position origin = 0;  ///< position of the stream's token 0
  /// Tokens of which kinds may leave, by TokenKind; the others stay, the oldest of them where they
  /// alone exceed the budget (StreamMem lets go of vision alone).
  std::array<bool, kNumTokenKinds> may_leave{true, true, true, true};
  /// kProxyQueries: each run of so many tokens of one kind that came since the last selection
  /// leaves a prototype beside what is kept of it, a row that is the mean of its rows weighted by
  /// their scores, keys averaged as if they were raw and placed at the mean position. Prototypes
  /// count in the budget, stay at the selection that makes them, and compete at later ones. 0:
  /// none.
  std::int64_t frame_size = 0;

  /// Entries of a KV head that storage has room for on average over a layer.
  std::int64_t capacity() const { return budget + growth; }

  /// SnapKV (arXiv 2404.14469; snapkv_utils.py): what the last `window` queries attend to, pooled,
  /// and those tokens themselves. As released it selects once, at the end of a prompt: give
  /// `growth` the room for the prompt and the answer and call compact(); with less it goes on
  /// selecting whenever it is full. Deviation: one kept set a KV head, votes averaged over its
  /// query heads, where the release duplicates keys for each query head.
  static ScorePolicy snap_kv(std::int64_t budget, std::int64_t growth, std::int64_t max_chunk,
                             std::int64_t window = 32,
                             ScorePooling pooling = ScorePooling::kAverage,
                             std::int64_t pool_size = 5) {
    return {.source = ScoreSource::kLastQueries,
            .num_queries = window,
            .pooling = pooling,
            .pool_size = pool_size,
            .recent = window,
            .budget = budget,
            .growth = growth,
            .max_chunk = max_chunk};
  }
  /// H2O (arXiv 2306.14048; modify_llama.py): the `heavy` entries that were attended to most and
  /// the `recent` newest, selected at every commit. group_reduction sums, as one set a head would.
  static ScorePolicy h2o(std::int64_t heavy, std::int64_t recent, std::int64_t max_chunk = 1) {
    return {.source = ScoreSource::kAllQueries,
            .group_reduction = GroupReduction::kSum,
            .recent = recent,
            .budget = heavy + recent,
            .growth = max_chunk,
            .max_chunk = max_chunk};
  }
  /// Q-Filters (arXiv 2503.02812; hf_cache.py): the entries with the largest component against the
  /// filter, and the `window` newest.
  static ScorePolicy q_filters(std::int64_t budget, std::int64_t window, std::int64_t growth,
                               std::int64_t max_chunk) {
    return {.source = ScoreSource::kKeyDirection,
            .recent = window,
            .budget = budget,
            .growth = growth,
            .max_chunk = max_chunk};
  }
  /// SirLLM (arXiv 2405.12528, section 3): sinks and the most surprising tokens, at their ranks.
  static ScorePolicy sir_llm(std::int64_t num_sink_tokens, std::int64_t recent,
                             std::int64_t surprising, double decay, std::int64_t max_chunk) {
    return {.source = ScoreSource::kGiven,
            .num_sink_tokens = num_sink_tokens,
            .recent = recent,
            .budget = num_sink_tokens + recent + surprising,
            .decay = decay,
            .growth = max_chunk,
            .max_chunk = max_chunk,
            .position_rule = PositionRule::kInCache};
  }
  /// SirLLM as its release evicts (kv_cache.py): of start + recent + entropy entries so many are
  /// let go that a chunk fits, the best entropy - chunk of all stay, the rest goes to the newest.
  static ScorePolicy sir_llm_released(std::int64_t start, std::int64_t recent, std::int64_t entropy,
                                      double decay, std::int64_t max_chunk) {
    ScorePolicy policy = sir_llm(start, recent, entropy, decay, max_chunk);
    policy.recent = 0;
    policy.budget -= max_chunk;
    policy.top = std::max<std::int64_t>(0, entropy - max_chunk);
    return policy;
  }
  /// StreamMem (arXiv 2508.15717; no released code was found): what proxy queries attend to, sinks
  /// protected. The paper's prototypes: set frame_size. It leaves open where a prototype stands and
  /// whether keys are averaged before their rotation: here they are, at the mean position.
  static ScorePolicy stream_mem(std::int64_t num_sink_tokens, std::int64_t budget,
                                std::int64_t growth, std::int64_t max_chunk,
                                std::int64_t max_proxies = 16) {
    return {.source = ScoreSource::kProxyQueries,
            .num_queries = max_proxies,
            .num_sink_tokens = num_sink_tokens,
            .budget = budget,
            .growth = growth,
            .max_chunk = max_chunk};
  }

  KeepRule keep_rule() const { return {num_sink_tokens, recent, budget, top}; }

  /// \throws Error(kConfig) naming the field that does not fit.
  void validate() const {
    const auto fail = [](const char* field, const std::string& expected, const std::string& found) {
      throw Error(ErrorCode::kConfig,
                  {"score policy does not fit", "ScorePolicy", field, expected, found});
    };
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    const auto within = [&](const char* field, std::int64_t value, std::int64_t least,
                            std::int64_t most) {
      if (value < least || value > most)
        fail(field, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
    };
    within("budget", budget, 1, kMost);
    within("growth", growth, 1, kMost);
    within("max_chunk", max_chunk, 1, growth);
    within("num_sink_tokens", num_sink_tokens, 0, budget);
    within("recent", recent, 0, budget - num_sink_tokens);
    within("top", top, -1, budget - num_sink_tokens);
    if (source == ScoreSource::kLastQueries) within("num_queries", num_queries, 1, kMost);
    if (source == ScoreSource::kProxyQueries) within("num_queries", num_queries, 1, max_chunk);
    if (pooling != ScorePooling::kNone && (pool_size < 1 || pool_size % 2 == 0))
      fail("pool_size", "an odd number", std::to_string(pool_size));
    if (!(floor >= 0 && floor <= 1)) fail("floor", "0 to 1", std::to_string(floor));
    if (!(decay > 0 && decay <= 1)) fail("decay", "above 0, at most 1", std::to_string(decay));
    if (frame_size != 0) {
      within("frame_size", frame_size, 1, budget + growth);
      if (source != ScoreSource::kProxyQueries || floor < 1 || top >= 0)
        fail("frame_size", "0 unless proxy queries score, each head alone, without top",
             std::to_string(frame_size));
    }
    if (!std::isfinite(origin)) fail("origin", "a finite position", std::to_string(origin));
    if (floor < 1 && top >= 0)
      fail("floor", "1 with SirLLM's released rule", std::to_string(floor));
  }
};

}  // namespace sluice
