// SPDX-License-Identifier: MIT
/// Which KV heads of a model keep everything, and which keep sinks and a window: one normal form
/// for the head maps of DuoAttention, LServe's static half, MoA and LightTransfer. A map is
/// run-time data: no head is reordered and no kernel instantiated for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/cache/retention.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// What one KV head keeps: the first num_sink_tokens tokens, and the last window_size. The window
/// counts as its map's eviction says (Eviction::kPerQuery: the query's own key included).
struct HeadRetention {
  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = kUnlimitedWindow;  ///< unlimited: everything

  static constexpr HeadRetention full() { return {}; }
  bool is_full() const { return window_size >= kUnlimitedWindow; }
  friend bool operator==(const HeadRetention&, const HeadRetention&) = default;
};

/// A table of one value per layer and head, as files of head maps hold it.
struct HeadTable {
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::vector<double> values;  ///< [num_layers, num_heads]
};

/// A retention for every KV head of a model. [num_layers, num_kv_heads]
class HeadMap {
 public:
  HeadMap() = default;
  /// heads: [num_layers, num_kv_heads]. \throws Error(kShape) when their number does not fit,
  /// Error(kConfig) for negative sinks or a window below 1.
  HeadMap(std::int64_t num_layers, std::int64_t num_kv_heads, std::vector<HeadRetention> heads,
          Eviction eviction = Eviction::kPerQuery)
      : num_layers_(num_layers),
        num_kv_heads_(num_kv_heads),
        eviction_(eviction),
        heads_(std::move(heads)) {
    const auto fail = [](ErrorCode code, const std::string& field, const std::string& expected,
                         std::int64_t found) {
      throw Error(code,
                  {"head map does not fit", "HeadMap", field, expected, std::to_string(found)});
    };
    if (num_layers < 1) fail(ErrorCode::kShape, "num_layers", "at least 1", num_layers);
    if (num_kv_heads < 1) fail(ErrorCode::kShape, "num_kv_heads", "at least 1", num_kv_heads);
    if (static_cast<std::int64_t>(heads_.size()) / num_kv_heads != num_layers ||
        static_cast<std::int64_t>(heads_.size()) % num_kv_heads != 0)
      fail(ErrorCode::kShape, "heads",
           std::to_string(num_layers) + " x " + std::to_string(num_kv_heads),
           static_cast<std::int64_t>(heads_.size()));
    if (eviction == Eviction::kOnRequest)
      throw Error(ErrorCode::kConfig, {"heads of a map evict by themselves", "HeadMap", "eviction",
                                       "per query or per chunk", "on request"});
    for (std::size_t i = 0; i < heads_.size(); ++i) {
      const std::string at = "head " + std::to_string(i % static_cast<std::size_t>(num_kv_heads)) +
                             " of layer " +
                             std::to_string(i / static_cast<std::size_t>(num_kv_heads));
      if (heads_[i].num_sink_tokens < 0)
        fail(ErrorCode::kConfig, at + " sinks", "at least 0", heads_[i].num_sink_tokens);
      if (heads_[i].window_size < 1)
        fail(ErrorCode::kConfig, at + " window", "at least 1", heads_[i].window_size);
    }
  }

  bool empty() const { return heads_.empty(); }
  std::int64_t num_layers() const { return num_layers_; }
  std::int64_t num_kv_heads() const { return num_kv_heads_; }
  /// kPerQuery: every query has its window. kPerChunk: DuoAttention's released rule.
  Eviction eviction() const { return eviction_; }
  const HeadRetention& at(std::int64_t layer, std::int64_t kv_head) const {
    return heads_[static_cast<std::size_t>(layer * num_kv_heads_ + kv_head)];
  }
  /// Heads that keep everything.
  std::int64_t num_full() const {
    return std::count_if(heads_.begin(), heads_.end(),
                         [](const HeadRetention& head) { return head.is_full(); });
  }

  /// Whether heads that retain alike here do so there too: a reader of two groups attends to both
  /// with the same heads at once.
  bool has_classes_of(const HeadMap& other) const {
    if (num_layers_ != other.num_layers_ || num_kv_heads_ != other.num_kv_heads_) return false;
    for (std::int64_t layer = 0; layer < num_layers_; ++layer)
      for (std::int64_t a = 0; a < num_kv_heads_; ++a)
        for (std::int64_t b = 0; b < a; ++b)
          if ((at(layer, a) == at(layer, b)) != (other.at(layer, a) == other.at(layer, b)))
            return false;
    return true;
  }

  friend bool operator==(const HeadMap&, const HeadMap&) = default;

 private:
  std::int64_t num_layers_ = 0;
  std::int64_t num_kv_heads_ = 0;
  Eviction eviction_ = Eviction::kPerQuery;
  std::vector<HeadRetention> heads_;
};

namespace detail {

inline void check_table(const HeadTable& table, const char* where) {
  const auto fail = [&](const char* field, const std::string& expected, const std::string& found) {
    throw Error(ErrorCode::kShape, {"head table does not fit", where, field, expected, found});
  };
  if (table.num_layers < 1) fail("layers", "at least 1", std::to_string(table.num_layers));
  if (table.num_heads < 1) fail("heads", "at least 1", std::to_string(table.num_heads));
  const auto cells = static_cast<std::int64_t>(table.values.size());
  if (cells / table.num_heads != table.num_layers || cells % table.num_heads != 0)
    fail("values", std::to_string(table.num_layers) + " x " + std::to_string(table.num_heads),
         std::to_string(cells));
  for (std::size_t i = 0; i < table.values.size(); ++i)
    if (!std::isfinite(table.values[i]))
      fail("values", "finite numbers",
           std::to_string(table.values[i]) + " at " + std::to_string(i));
}

}  // namespace detail

/// DuoAttention's choice of full heads (duo_attn/utils.py, sparsify_attention_heads): gates are
/// clipped to [0, 1]; full are those at or above the quantile `sparsity` of all gates (linear
/// interpolation). sparsity >= 1: none, <= 0: all. Deviation: where the release breaks ties by
/// noise, the lower (layer, head) is full first, so that a file always gives one map.
/// Returns [num_layers, num_heads], true: full. \throws Error(kShape), Error(kConfig) for a
/// sparsity that is no number.
inline std::vector<bool> full_heads(const HeadTable& gates, double sparsity) {
  detail::check_table(gates, "full_heads");
  if (std::isnan(sparsity))
    throw Error(ErrorCode::kConfig, {"no such share of streaming heads", "full_heads", "sparsity",
                                     "a number", "not a number"});
  const std::size_t count = gates.values.size();
  std::vector<bool> full(count, sparsity <= 0);
  if (sparsity <= 0 || sparsity >= 1) return full;
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto gate = [&](std::size_t i) {
    return std::clamp(gates.values[i], 0.0, 1.0);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return gate(a) > gate(b); });
  // The quantile lies at this place of the ascending order: all places from there on are full.
  const auto below = static_cast<std::size_t>(std::ceil(sparsity * static_cast<double>(count - 1)));
  for (std::size_t i = 0; i < count - below; ++i) full[order[i]] = true;
  return full;
}

/// DuoAttention: retrieval heads keep everything, streaming heads `num_sink_tokens` and
/// `recent_size` tokens at their places in the text. `eviction`: kPerChunk is the released rule
/// (a chunk sees itself whole), kPerQuery the training mask's, exact for every query.
inline HeadMap duo_attention_map(const HeadTable& gates, double sparsity,
                                 std::int64_t num_sink_tokens, std::int64_t recent_size,
                                 Eviction eviction = Eviction::kPerChunk) {
  const std::vector<bool> full = full_heads(gates, sparsity);
  std::vector<HeadRetention> heads;
  for (const bool keeps_all : full)
    heads.push_back(keeps_all ? HeadRetention::full()
                              : HeadRetention{num_sink_tokens, recent_size});
  return HeadMap(gates.num_layers, gates.num_heads, std::move(heads), eviction);
}

/// LightTransfer's pre-selected layers (arXiv 2410.13846, the train variant): all heads of a lazy
/// layer keep sinks and a window, other layers everything.
/// \throws Error(kShape) for a layer that the model does not have.
inline HeadMap lazy_layers_map(std::int64_t num_layers, std::int64_t num_kv_heads,
                               std::span<const std::int64_t> lazy_layers,
                               const HeadRetention& lazy) {
  std::vector<HeadRetention> heads(static_cast<std::size_t>(num_layers * num_kv_heads));
  for (const std::int64_t layer : lazy_layers) {
    if (layer < 0 || layer >= num_layers)
      throw Error(ErrorCode::kShape,
                  {"no such layer", "lazy_layers_map", "layer",
                   "0 to " + std::to_string(num_layers - 1), std::to_string(layer)});
    std::fill_n(heads.begin() + layer * num_kv_heads, num_kv_heads, lazy);
  }
  return HeadMap(num_layers, num_kv_heads, std::move(heads));
}

/// How MoA turns a rule into a head's number of entries.
struct SpanRule {
  std::int64_t num_sink_tokens = 64;  ///< part of the span
  std::int64_t block = 64;            ///< spans are whole blocks
  std::int64_t smallest = 128;
};

/// Entries of one head of MoA (arXiv 2406.14909; MoA/attention/cache_utils.py) for a request of
/// `horizon` tokens, prompt and answer: alpha + beta * horizon, at most the horizon, at least
/// rule.smallest, rounded up to whole blocks.
inline std::int64_t span_entries(double alpha, double beta, std::int64_t horizon,
                                 const SpanRule& rule = {}) {
  const double span = std::floor(alpha + beta * static_cast<double>(horizon));
  const double bounded =
      std::max(std::min(span, static_cast<double>(horizon)), static_cast<double>(rule.smallest));
  const auto entries = static_cast<std::int64_t>(bounded);
  return (entries + rule.block - 1) / rule.block * rule.block;
}

/// MoA: each head has a span that grows with a declared horizon (an endless stream has none:
/// declare what the spans are to be sized for). Tables count query heads, as MoA's files do; a KV
/// head keeps the largest span of its query heads. Deviation: its other query heads see that span
/// too, where MoA, which duplicates keys for each query head, cuts theirs; equal for multi-head
/// models. \throws Error(kShape) when the tables differ or are no multiple of num_kv_heads,
/// Error(kConfig) for a horizon below 1.
inline HeadMap span_map(const HeadTable& alphas, const HeadTable& betas, std::int64_t num_kv_heads,
                        std::int64_t horizon, const SpanRule& rule = {}) {
  detail::check_table(alphas, "span_map alphas");
  detail::check_table(betas, "span_map betas");
  if (alphas.num_layers != betas.num_layers || alphas.num_heads != betas.num_heads)
    throw Error(ErrorCode::kShape,
                {"head tables differ", "span_map", "betas",
                 std::to_string(alphas.num_layers) + " x " + std::to_string(alphas.num_heads),
                 std::to_string(betas.num_layers) + " x " + std::to_string(betas.num_heads)});
  if (num_kv_heads < 1 || alphas.num_heads % num_kv_heads != 0)
    throw Error(ErrorCode::kShape, {"query heads do not divide into KV heads", "span_map", "heads",
                                    "a multiple of " + std::to_string(num_kv_heads),
                                    std::to_string(alphas.num_heads)});
  if (horizon < 1)
    throw Error(ErrorCode::kConfig, {"spans need a horizon", "span_map", "horizon", "at least 1",
                                     std::to_string(horizon)});
  if (rule.block < 1 || rule.num_sink_tokens < 0 || rule.smallest <= rule.num_sink_tokens)
    throw Error(ErrorCode::kConfig, {"no room for a window", "span_map", "smallest",
                                     "more than the sinks, " + std::to_string(rule.num_sink_tokens),
                                     std::to_string(rule.smallest)});
  const std::int64_t group = alphas.num_heads / num_kv_heads;
  std::vector<HeadRetention> heads;
  for (std::int64_t first = 0; first < alphas.num_layers * alphas.num_heads; first += group) {
    std::int64_t entries = 0;
    for (std::int64_t g = first; g < first + group; ++g)
      entries =
          std::max(entries, span_entries(alphas.values[static_cast<std::size_t>(g)],
                                         betas.values[static_cast<std::size_t>(g)], horizon, rule));
    heads.push_back({rule.num_sink_tokens, entries - rule.num_sink_tokens});
  }
  return HeadMap(alphas.num_layers, num_kv_heads, std::move(heads));
}

}  // namespace sluice
