// SPDX-License-Identifier: MIT
/// The running state of an online softmax, and the merging of attention results over disjoint sets
/// of keys: sinks and window, source and target, split keys, ranks are all joined by one rule. A
/// partial result is (out, lse): the output normalised over its own keys, and the natural logarithm
/// of the sum of their exponentiated scores. Minus infinity and a zero output stand for no keys and
/// are neutral. Scores and lse are below plus infinity and not NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include "sluice/core/config.hpp"
#include "sluice/core/view.hpp"

namespace sluice {

/// The lse of a set without keys.
inline constexpr float kEmptyLse = -std::numeric_limits<float>::infinity();

/// Maximum and sum of an online softmax: the scores z seen so far give max(z) and sum(exp(z -
/// max)). The default state is empty.
struct SoftmaxState {
  float max = kEmptyLse;
  float sum = 0;

  constexpr bool empty() const { return max == kEmptyLse; }

  /// Natural logarithm of the sum of exp(z); minus infinity when empty.
  float lse() const { return empty() ? kEmptyLse : max + std::log(sum); }

  /// Raises the maximum to at least `score` before scores up to it are added. Returns what every
  /// weighted sum kept beside the state must be multiplied by: 0 for a state that was empty, 1 if
  /// the maximum stays.
  float raise_max(float score) {
    if (score <= max) return 1;
    const float factor = empty() ? 0.0F : std::exp(max - score);
    max = score;
    sum *= factor;
    return factor;
  }

  /// The weight exp(z - max) of a score that is at most max. A masked score (minus infinity) has
  /// weight 0, also in an empty state.
  float weight(float score) const { return score == kEmptyLse ? 0.0F : std::exp(score - max); }

  /// Adds the scores that another state has seen.
  void merge(const SoftmaxState& other) {
    if (other.empty()) return;
    raise_max(other.max);
    sum += other.sum * std::exp(other.max - max);
  }
};

/// Merges two partial results of one query row over disjoint key sets: out = (out_a e^lse_a + out_b
/// e^lse_b) / (e^lse_a + e^lse_b), *lse = ln of the denominator. out_a, out_b, out: [dim]; out may
/// be out_a or out_b. Where one set is empty the other comes out bit for bit, without its output
/// being read. Allocates nothing.
inline void merge(const float* out_a, float lse_a, const float* out_b, float lse_b,
                  std::int64_t dim, float* out, float* lse) {
  if (lse_b == kEmptyLse || lse_a == kEmptyLse) {
    const bool a_only = lse_b == kEmptyLse;
    const float* source = a_only ? out_a : out_b;
    *lse = a_only ? lse_a : lse_b;
    if (*lse == kEmptyLse)
      std::fill_n(out, dim, 0.0F);
    else if (source != out)
      std::copy_n(source, dim, out);
    return;
  }
  const float max = std::max(lse_a, lse_b);
  const float a = std::exp(lse_a - max);
  const float b = std::exp(lse_b - max);
  const float share_a = a / (a + b);
  const float share_b = b / (a + b);
  for (std::int64_t i = 0; i < dim; ++i) out[i] = share_a * out_a[i] + share_b * out_b[i];
  *lse = max + std::log(a + b);
}

/// Merges whole partial results in place. out, other: [tokens, num_qo_heads, head_dim_v] of equal
/// extents, of which `out` is updated; lse, other_lse: [tokens, num_qo_heads], rows consecutive.
inline void merge_partials(HeadsView<float> out, float* lse, HeadsView<const float> other,
                           const float* other_lse) {
  SLUICE_ASSERT(out.tokens == other.tokens && out.num_heads == other.num_heads &&
                out.head_dim == other.head_dim);
  for (std::int64_t token = 0; token < out.tokens; ++token) {
    for (std::int64_t head = 0; head < out.num_heads; ++head) {
      const std::int64_t row = token * out.num_heads + head;
      float* merged = out.head(token, head);  // [head_dim_v]
      merge(merged, lse[row], other.head(token, head), other_lse[row], out.head_dim, merged,
            &lse[row]);
    }
  }
}

/// Puts a sink logit into the denominator of a finished row: out *= sigmoid(lse - sink), which
/// turns weights e^z / sum(e^z) into e^z / (e^sink + sum(e^z)). Apply once per row, after the last
/// merge: lse keeps meaning the keys alone. sink = 0 is softmax-off-by-one (SoftMax1), minus
/// infinity changes nothing; a row without keys is set to 0. out: [dim]. Source: gpt-oss (learned
/// logit per query head, compared with scaled scores).
inline void apply_sink_logit(float* out, std::int64_t dim, float lse, float sink) {
  if (lse == kEmptyLse) {
    std::fill_n(out, dim, 0.0F);
    return;
  }
  const float factor = 1.0F / (1.0F + std::exp(sink - lse));
  for (std::int64_t i = 0; i < dim; ++i) out[i] *= factor;
}

/// The same for every row of a result. out: [tokens, num_qo_heads, head_dim_v]; lse: [tokens,
/// num_qo_heads], rows consecutive; sink_logits: [num_qo_heads].
inline void apply_sink_logits(HeadsView<float> out, const float* lse,
                              std::span<const float> sink_logits) {
  SLUICE_ASSERT(static_cast<std::int64_t>(sink_logits.size()) == out.num_heads);
  for (std::int64_t token = 0; token < out.tokens; ++token) {
    for (std::int64_t head = 0; head < out.num_heads; ++head) {
      apply_sink_logit(out.head(token, head), out.head_dim, lse[token * out.num_heads + head],
                       sink_logits[static_cast<std::size_t>(head)]);
    }
  }
}

}  // namespace sluice
