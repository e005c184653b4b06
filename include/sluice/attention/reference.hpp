// SPDX-License-Identifier: MIT
/// The plain float64 reference of attention over segments: one query row at a time, three loops, no
/// tiles. Users read it, tests compare with it. It shares no code with the fast kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "sluice/attention/variant.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// What attend() computes (attend.hpp), in double, from the same arguments. `rotary` may be null,
/// `kv_heads` is AttentionQuery::kv_heads. out: [T, num_qo_heads, value_dim]; lse: [T,
/// num_qo_heads]. Allocates.
template <class Key, class Value, Visibility Mask, ScoreTransform Transform, SinkTerm Sink>
void attend_reference(HeadsView<const float> query, std::int64_t first_index,
                      Position first_position, std::span<const Segment<Key, Value>> segments,
                      const AttentionVariant<Mask, Transform, Sink>& variant, const Rotary* rotary,
                      std::int64_t num_kv_heads, HeadsView<double> out, double* lse,
                      std::span<const std::int32_t> kv_heads = {}) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto rotate = [&](std::vector<double>& x, Position position) {
    if (rotary == nullptr) return;
    const int pairs = rotary->num_pairs();
    const bool halves = rotary->config().pairing == RotaryPairing::kHalfSplit;
    for (int i = 0; i < pairs; ++i) {
      const double angle = position * rotary->frequency(i);
      const double cosine = rotary->attention_factor() * std::cos(angle);
      const double sine = rotary->attention_factor() * std::sin(angle);
      double& a = x[static_cast<std::size_t>(halves ? i : 2 * i)];
      double& b = x[static_cast<std::size_t>(halves ? i + pairs : 2 * i + 1)];
      const double rotated = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = rotated;
    }
  };
  const std::int64_t group = query.num_heads / num_kv_heads;
  for (std::int64_t t = 0; t < query.tokens; ++t) {
    const QueryInfo info{first_index + t, first_position + static_cast<Position>(t)};
    for (std::int64_t head = 0; head < query.num_heads; ++head) {
      std::int64_t stored = head / group;  // where the segments have this head's keys
      if (!kv_heads.empty()) {
        const auto found = std::find(kv_heads.begin(), kv_heads.end(), head / group);
        if (found == kv_heads.end()) continue;
        stored = found - kv_heads.begin();
      }
      const float* raw = query.head(t, head);
      std::vector<double> scores;
      std::vector<std::vector<double>> values;
      for (const Segment<Key, Value>& segment : segments) {
        const Position reader = segment.rule.reader_position(info.position);
        std::vector<double> q(raw, raw + query.head_dim);
        rotate(q, reader);
        for (std::int64_t j = 0; j < segment.rule.visible; ++j) {
          const KeyInfo key{segment.rule.first_index + j, segment.rule.kind, segment.rule.group};
          if (!variant.visibility.visible(info, key)) continue;
          std::vector<double> k(static_cast<std::size_t>(query.head_dim));
          std::vector<float> row(static_cast<std::size_t>(query.head_dim));
          KvRow<Key>::dequantise(segment.key(stored, j), segment.key_scale(stored, j),
                                 query.head_dim, row.data());
          std::copy(row.begin(), row.end(), k.begin());
          const Position position = segment.rule.first_position + static_cast<Position>(j);
          if (segment.key_rotation != nullptr) rotate(k, position);
          double score = 0;
          for (std::size_t d = 0; d < k.size(); ++d) score += q[d] * k[d];
          auto scaled = static_cast<float>(score * static_cast<double>(variant.sm_scale));
          variant.transform.apply({head, reader, position}, {&scaled, 1});
          scores.push_back(static_cast<double>(scaled));
          row.resize(static_cast<std::size_t>(out.head_dim));
          KvRow<Value>::dequantise(segment.value(stored, j), segment.value_scale(stored, j),
                                   out.head_dim, row.data());
          values.emplace_back(row.begin(), row.end());
        }
      }
      double max = -kInfinity;
      for (const double score : scores) max = score > max ? score : max;
      double sum = 0;
      for (const double score : scores) sum += std::exp(score - max);
      double* result = out.head(t, head);
      for (std::int64_t d = 0; d < out.head_dim; ++d) result[d] = 0;
      lse[t * query.num_heads + head] = scores.empty() ? -kInfinity : max + std::log(sum);
      if (scores.empty()) continue;
      const double sink = static_cast<double>(variant.sink.logit(head));
      const double denominator = sum + std::exp(sink - max);
      for (std::size_t j = 0; j < scores.size(); ++j)
        for (std::int64_t d = 0; d < out.head_dim; ++d)
          result[d] +=
              std::exp(scores[j] - max) / denominator * values[j][static_cast<std::size_t>(d)];
    }
  }
}

}  // namespace sluice
