// SPDX-License-Identifier: MIT
#include "backend/cuda/segment_oracle.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace sluice_test {

bool OracleVariant::sees(std::int64_t query, std::int64_t key, std::int32_t group) const {
  if (all_visible || (!every_group && group != own_group)) return true;
  if (key > query) return bidirectional;
  return key > query - window_size || key < num_sink_tokens;
}

void attend_oracle(const float* query, std::int64_t queries, std::int64_t qo_heads,
                   std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t first_index,
                   double first_position, const std::vector<OracleSegment>& segments,
                   const std::vector<std::int32_t>& kv_heads, const OracleVariant& variant,
                   const OracleRotation& rotation, double* out, double* lse) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::int64_t group = qo_heads / num_kv_heads;
  const auto dim = static_cast<std::size_t>(head_dim);
  for (std::int64_t t = 0; t < queries; ++t) {
    for (std::size_t row = 0; row < kv_heads.size(); ++row) {
      for (std::int64_t head = kv_heads[row] * group; head < (kv_heads[row] + 1) * group; ++head) {
        std::vector<double> scores;
        std::vector<const float*> values;
        for (const OracleSegment& segment : segments) {
          const double reader =
              std::min(first_position + static_cast<double>(t) + segment.shift, segment.ceiling);
          std::vector<double> q(query + (t * qo_heads + head) * head_dim,
                                query + (t * qo_heads + head + 1) * head_dim);
          const std::size_t pairs = rotation.frequencies.size();
          for (std::size_t i = 0; i < pairs; ++i) {
            const double angle = reader * rotation.frequencies[i];
            double& a = q[rotation.interleaved ? 2 * i : i];
            double& b = q[rotation.interleaved ? 2 * i + 1 : i + pairs];
            const double turned = rotation.factor * (a * std::cos(angle) - b * std::sin(angle));
            b = rotation.factor * (b * std::cos(angle) + a * std::sin(angle));
            a = turned;
          }
          for (std::int64_t j = 0; j < std::min(segment.visible, segment.count); ++j) {
            if (!variant.sees(first_index + t, segment.first_index + j, segment.group)) continue;
            const std::size_t at =
                (row * static_cast<std::size_t>(segment.count) + static_cast<std::size_t>(j)) * dim;
            double score = 0;
            for (std::size_t d = 0; d < dim; ++d)
              score += q[d] * static_cast<double>(segment.keys[at + d]);
            score *= variant.sm_scale;
            if (variant.soft_cap > 0)
              score = variant.soft_cap * std::tanh(score / variant.soft_cap);
            if (!variant.slopes.empty())
              score += static_cast<double>(variant.slopes[static_cast<std::size_t>(head)]) *
                       (segment.first_position + static_cast<double>(j) - reader);
            scores.push_back(score);
            values.push_back(&segment.values[at]);
          }
        }
        double most = -kInfinity;
        for (const double score : scores) most = std::max(most, score);
        double sum = 0;
        for (const double score : scores) sum += std::exp(score - most);
        double* const result = out + (t * qo_heads + head) * head_dim;
        std::fill_n(result, dim, 0.0);
        lse[t * qo_heads + head] = scores.empty() ? -kInfinity : most + std::log(sum);
        if (scores.empty()) continue;
        if (!variant.sinks.empty())
          sum +=
              std::exp(static_cast<double>(variant.sinks[static_cast<std::size_t>(head)]) - most);
        for (std::size_t j = 0; j < scores.size(); ++j)
          for (std::size_t d = 0; d < dim; ++d)
            result[d] += std::exp(scores[j] - most) / sum * static_cast<double>(values[j][d]);
      }
    }
  }
}

}  // namespace sluice_test
