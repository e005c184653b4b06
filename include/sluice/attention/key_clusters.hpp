// SPDX-License-Identifier: MIT
/// Indexes over units of variable length, beside pages and frames: clusters of similar keys
/// (V-Rex's ReSV, arXiv 2512.12284) and spans that attend to themselves (Ltri-LLM, arXiv
/// 2412.04757). Neither has released code; what the papers leave open is stated where it is chosen.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/random.hpp"

namespace sluice {

/// The clusters that a query row needs: by falling score, until the sum of score * count exceeds
/// `share` of the whole. scores, counts: [clusters], scores of 0 or more (negative ones count as 0
/// here: the paper does not say); order: [clusters or more], gets their numbers, best first, ties
/// to the lower. Returns how many. Allocates nothing.
inline std::int64_t pick_clusters(std::span<const float> scores,
                                  std::span<const std::int64_t> counts, double share,
                                  std::span<std::int64_t> order) {
  const auto mass = [&](std::int64_t c) {
    const auto at = static_cast<std::size_t>(c);
    return scores[at] > 0 ? static_cast<double>(scores[at]) * static_cast<double>(counts[at]) : 0.0;
  };
  const auto count = static_cast<std::int64_t>(scores.size());
  double whole = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    order[static_cast<std::size_t>(c)] = c;
    whole += mass(c);
  }
  std::sort(order.begin(), order.begin() + count, [&](std::int64_t a, std::int64_t b) {
    // What is no number is the lowest, so that there is an order.
    const auto value = [&](std::int64_t cluster) {
      const float score = scores[static_cast<std::size_t>(cluster)];
      return score == score ? score : -std::numeric_limits<float>::infinity();
    };
    const float x = value(a);
    const float y = value(b);
    return x != y ? x > y : a < b;
  });
  double sum = 0;
  std::int64_t picked = 0;
  while (picked < count && !(sum > share * whole))
    sum += mass(order[static_cast<std::size_t>(picked++)]);
  return picked;
}

/// Clusters of keys by the signs of their products with random hyperplanes: a key joins the nearest
/// cluster if fewer than `threshold` signs differ, else it opens one. A cluster's signs are those
/// of its first key, its representative the mean of its keys (the paper leaves its update open); no
/// cluster is opened when there is no room: the key joins the nearest. Only construction allocates.
class KeyClusters {
 public:
  /// num_bits: hyperplanes, 1 to 64. \throws Error(kConfig) for extents that make no sense.
  KeyClusters(std::int64_t dim, std::int64_t max_clusters, std::int64_t max_keys, int num_bits = 32,
              int threshold = 7, std::uint64_t seed = 1)
      : dim_(dim),
        num_bits_(num_bits),
        threshold_(threshold),
        planes_(checked(dim, max_clusters, max_keys, num_bits, threshold)),
        means_(static_cast<std::size_t>(max_clusters * dim)),
        bits_(static_cast<std::size_t>(max_clusters)),
        counts_(static_cast<std::size_t>(max_clusters)),
        cluster_of_(static_cast<std::size_t>(max_keys)),
        lost_(static_cast<std::size_t>(max_clusters)) {
    Random random(seed);
    for (int i = 0; i < num_bits; ++i)
      for (std::int64_t d = 0; d < dim; ++d)
        planes_.data()[d * num_bits + i] = static_cast<float>(random.normal());
  }

  std::size_t bytes() const {
    return planes_.bytes() + means_.bytes() + bits_.bytes() + counts_.bytes() +
           cluster_of_.bytes() + lost_.bytes();
  }

  std::int64_t size() const { return size_; }
  std::int64_t num_keys() const { return keys_; }
  /// Keys of each cluster.
  std::span<const std::int64_t> counts() const {
    return counts_.span().first(static_cast<std::size_t>(size_));
  }
  /// The cluster of each key, in the order of their coming.
  std::span<const std::int64_t> cluster_of() const {
    return cluster_of_.span().first(static_cast<std::size_t>(keys_));
  }
  /// A cluster's representative: [dim].
  std::span<const float> representative(std::int64_t cluster) const {
    return {means_.data() + cluster * dim_, static_cast<std::size_t>(dim_)};
  }
  /// [k . h_i > 0] of each hyperplane, the first in the lowest bit.
  std::uint64_t signs(const float* key) const {
    float products[64] = {};
    for (std::int64_t d = 0; d < dim_; ++d)
      for (int i = 0; i < num_bits_; ++i) products[i] += key[d] * planes_.data()[d * num_bits_ + i];
    std::uint64_t bits = 0;
    for (int i = 0; i < num_bits_; ++i)
      bits |= static_cast<std::uint64_t>(products[i] > 0 ? 1 : 0) << i;
    return bits;
  }

  /// Takes in a key; returns its cluster. key: [dim]. Precondition: fewer than max_keys so far.
  std::int64_t add(const float* key) {
    SLUICE_ASSERT(keys_ < static_cast<std::int64_t>(cluster_of_.size()));
    const std::uint64_t bits = signs(key);
    std::int64_t nearest = -1;
    int least = 65;
    for (std::int64_t c = 0; c < size_; ++c) {
      const int distance = std::popcount(bits ^ bits_[static_cast<std::size_t>(c)]);
      if (distance < least) {
        least = distance;
        nearest = c;
      }
    }
    if (least >= threshold_ && size_ < static_cast<std::int64_t>(counts_.size())) {
      nearest = size_++;
      bits_[static_cast<std::size_t>(nearest)] = bits;
      counts_[static_cast<std::size_t>(nearest)] = 0;
      std::fill_n(means_.data() + nearest * dim_, dim_, 0.0F);
    }
    take_in(nearest, key);
    cluster_of_[static_cast<std::size_t>(keys_++)] = nearest;
    return nearest;
  }
  void reset() { size_ = keys_ = 0; }

  /// Leaves the first `keys` keys: bit for bit the clusters of a run that went no further.
  /// key(i): key i once more, [dim], valid until the next call; asked for keys of clusters that
  /// lose some. O(num_keys()). Allocates nothing.
  template <class KeyOf>
  void truncate(std::int64_t keys, KeyOf&& key) {
    if (keys >= keys_) return;
    std::fill_n(lost_.data(), size_, std::uint8_t{0});
    for (std::int64_t i = keys; i < keys_; ++i)
      lost_.data()[cluster_of_[static_cast<std::size_t>(i)]] = 1;
    for (std::int64_t c = 0; c < size_; ++c)
      if (lost_.data()[c] != 0) {
        counts_[static_cast<std::size_t>(c)] = 0;
        std::fill_n(means_.data() + c * dim_, dim_, 0.0F);
      }
    // Which cluster a key joined depends on the keys before it alone.
    size_ = 0;
    for (std::int64_t i = 0; i < keys; ++i) {
      const std::int64_t cluster = cluster_of_[static_cast<std::size_t>(i)];
      size_ = std::max(size_, cluster + 1);
      if (lost_.data()[cluster] != 0) take_in(cluster, key(i));
    }
    keys_ = keys;
  }

  /// scores[c] = e^(sm_scale <query, representative>), which is never negative: the weight that a
  /// key like the representative has. scores: [size()]; shifted by the largest, which changes no
  /// choice.
  void score(const float* query, float sm_scale, std::span<float> scores) const {
    float largest = 0;
    for (std::int64_t c = 0; c < size_; ++c) {
      const float* const mean = means_.data() + c * dim_;
      simd::VecF sum = simd::zero();
      std::int64_t d = 0;
      for (; d + simd::kWidth <= dim_; d += simd::kWidth)
        sum = simd::fma(simd::load(query + d), simd::load(mean + d), sum);
      float product = simd::reduce_add(sum);
      for (; d < dim_; ++d) product += query[d] * mean[d];
      scores[static_cast<std::size_t>(c)] = sm_scale * product;
      largest = c == 0 ? sm_scale * product : std::max(largest, sm_scale * product);
    }
    for (std::int64_t c = 0; c < size_; ++c)
      scores[static_cast<std::size_t>(c)] = std::exp(scores[static_cast<std::size_t>(c)] - largest);
  }

 private:
  void take_in(std::int64_t cluster, const float* key) {
    const auto count = static_cast<float>(++counts_[static_cast<std::size_t>(cluster)]);
    float* mean = means_.data() + cluster * dim_;
    for (std::int64_t d = 0; d < dim_; ++d) mean[d] += (key[d] - mean[d]) / count;
  }

  static std::size_t checked(std::int64_t dim, std::int64_t max_clusters, std::int64_t max_keys,
                             int num_bits, int threshold) {
    const auto need = [](bool fine, const char* field, const char* expected, std::int64_t found) {
      if (!fine)
        throw Error(ErrorCode::kConfig,
                    {"clusters do not fit", "KeyClusters", field, expected, std::to_string(found)});
    };
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    need(dim >= 1 && dim <= 4096, "dim", "1 to 4096", dim);
    need(max_clusters >= 1 && max_clusters <= kMost, "max_clusters", "at least 1", max_clusters);
    need(max_keys >= 1 && max_keys <= kMost, "max_keys", "at least 1", max_keys);
    need(num_bits >= 1 && num_bits <= 64, "num_bits", "1 to 64", num_bits);
    need(threshold >= 0 && threshold <= 65, "threshold", "0 to 65", threshold);
    return static_cast<std::size_t>(num_bits * dim);
  }

  std::int64_t dim_;
  int num_bits_;
  int threshold_;
  Buffer<float> planes_;             // [dim, num_bits]
  Buffer<float> means_;              // [max_clusters, dim]
  Buffer<std::uint64_t> bits_;       // [max_clusters]
  Buffer<std::int64_t> counts_;      // [max_clusters]
  Buffer<std::int64_t> cluster_of_;  // [max_keys]
  Buffer<std::uint8_t> lost_;        // [max_clusters], of truncate()
  std::int64_t size_ = 0;
  std::int64_t keys_ = 0;
};

/// Tokens [begin, end) that belong together, and how much.
struct Span {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  double score = 0;

  friend bool operator==(const Span&, const Span&) = default;
};

/// Spans of a text by its attention map (Ltri-LLM): the score of [x, y] is the sum of attention -
/// threshold over the square of its tokens, by 2-D prefix sums; spans with a positive score are
/// taken best first, and those that overlap a taken one by more than `overlap` of their union are
/// dropped (greedy non-maximum suppression, 0.3 in a third-party detector). attention: [tokens,
/// tokens], summed over heads; longest: tokens of a span, at most. Returns them best first, ties to
/// the earlier and then the shorter. O(tokens * longest) spans; allocates.
inline std::vector<Span> attention_spans(std::span<const float> attention, std::int64_t tokens,
                                         double threshold, std::int64_t longest,
                                         double overlap = 0.3) {
  SLUICE_ASSERT(static_cast<std::int64_t>(attention.size()) == tokens * tokens);
  const std::int64_t width = tokens + 1;
  std::vector<double> sums(static_cast<std::size_t>(width * width));
  const auto sum = [&](std::int64_t i, std::int64_t j) -> double& {
    return sums[static_cast<std::size_t>(i * width + j)];
  };
  for (std::int64_t i = 0; i < tokens; ++i)
    for (std::int64_t j = 0; j < tokens; ++j)
      sum(i + 1, j + 1) = static_cast<double>(attention[static_cast<std::size_t>(i * tokens + j)]) -
                          threshold + sum(i, j + 1) + sum(i + 1, j) - sum(i, j);
  std::vector<Span> found;
  for (std::int64_t begin = 0; begin < tokens; ++begin)
    for (std::int64_t end = begin + 1; end <= std::min(tokens, begin + longest); ++end) {
      const double score = sum(end, end) - sum(begin, end) - sum(end, begin) + sum(begin, begin);
      if (score > 0) found.push_back({begin, end, score});
    }
  std::stable_sort(found.begin(), found.end(),
                   [](const Span& a, const Span& b) { return a.score > b.score; });
  std::vector<Span> taken;
  for (const Span& span : found) {
    const bool free = std::all_of(taken.begin(), taken.end(), [&](const Span& other) {
      const std::int64_t shared = std::min(span.end, other.end) - std::max(span.begin, other.begin);
      const std::int64_t both =
          (span.end - span.begin) + (other.end - other.begin) - std::max<std::int64_t>(0, shared);
      return static_cast<double>(shared) <= overlap * static_cast<double>(both);
    });
    if (free) taken.push_back(span);
  }
  return taken;
}

}  // namespace sluice
