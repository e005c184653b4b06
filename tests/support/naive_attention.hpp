// SPDX-License-Identifier: MIT
/// Attention as its definition reads, in double, for one query row: a list of keys, each with its
/// distance from the reader. No segments, no absolute positions, no tiles, no running maximum: what
/// the library does must come to this.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace sluice::test {

/// Rotation by a distance in double, from the formula: frequencies theta^(-2i/R).
class NaiveRotation {
 public:
  NaiveRotation() = default;  // no rotation
  NaiveRotation(int rotary_dim, double theta, bool interleaved)
      : rotary_dim_(rotary_dim), theta_(theta), interleaved_(interleaved) {}

  /// R(position) x.
  std::vector<double> rotate(double position, std::span<const double> x) const {
    std::vector<double> result(x.begin(), x.end());
    if (rotary_dim_ == 0) return result;
    const auto& turns = turns_at(position);
    for (int i = 0; i < rotary_dim_ / 2; ++i) {
      const auto a = static_cast<std::size_t>(interleaved_ ? 2 * i : i);
      const auto b = static_cast<std::size_t>(interleaved_ ? 2 * i + 1 : i + rotary_dim_ / 2);
      const auto& [cosine, sine] = turns[static_cast<std::size_t>(i)];
      result[a] = x[a] * cosine - x[b] * sine;
      result[b] = x[b] * cosine + x[a] * sine;
    }
    return result;
  }

  /// <R(distance) q, k>.
  double score(double distance, std::span<const double> q, std::span<const double> k) const {
    double sum = 0;
    if (rotary_dim_ != 0) {
      const auto& turns = turns_at(distance);
      for (int i = 0; i < rotary_dim_ / 2; ++i) {
        const auto a = static_cast<std::size_t>(interleaved_ ? 2 * i : i);
        const auto b = static_cast<std::size_t>(interleaved_ ? 2 * i + 1 : i + rotary_dim_ / 2);
        const auto& [cosine, sine] = turns[static_cast<std::size_t>(i)];
        sum += cosine * (q[a] * k[a] + q[b] * k[b]) + sine * (q[a] * k[b] - q[b] * k[a]);
      }
    }
    for (auto d = static_cast<std::size_t>(rotary_dim_); d < q.size(); ++d) sum += q[d] * k[d];
    return sum;
  }

 private:
  const std::vector<std::pair<double, double>>& turns_at(double position) const {
    auto& turns = turns_[position];
    if (turns.empty())
      for (int i = 0; i < rotary_dim_ / 2; ++i) {
        const double angle = position * std::pow(theta_, -2.0 * i / rotary_dim_);
        turns.emplace_back(std::cos(angle), std::sin(angle));
      }
    return turns;
  }

  int rotary_dim_ = 0;
  double theta_ = 10000;
  bool interleaved_ = false;
  mutable std::map<double, std::vector<std::pair<double, double>>> turns_;
};

/// A key that a query sees.
struct NaiveKey {
  std::span<const double> key;    // [head_dim], not rotated
  std::span<const double> value;  // [value_dim]
  double distance = 0;            // reader position less key position
};

struct NaiveOptions {
  double sm_scale = 1;
  /// Score after scaling and the distance to the score before the softmax.
  std::function<double(double score, double distance)> transform = nullptr;
  double sink = -std::numeric_limits<double>::infinity();
};

struct NaiveResult {
  std::vector<double> out;  // [value_dim]
  double lse = -std::numeric_limits<double>::infinity();
  /// What float32 may differ by, derived in naive_attention().
  double out_bound = 0;
  double lse_bound = 0;
};

inline NaiveResult naive_attention(std::span<const double> q, const std::vector<NaiveKey>& keys,
                                   std::size_t value_dim, const NaiveRotation& rotation,
                                   const NaiveOptions& options) {
  NaiveResult result;
  result.out.assign(value_dim, 0.0);
  if (keys.empty()) return result;
  const auto norm = [](std::span<const double> x) {
    double sum = 0;
    for (const double v : x) sum += v * v;
    return std::sqrt(sum);
  };
  std::vector<double> scores;
  double max = -std::numeric_limits<double>::infinity();
  double largest_product = 0;  // scale |q| |k|
  double largest_score = 0;
  double largest_value = 0;
  for (const NaiveKey& key : keys) {
    double score = options.sm_scale * rotation.score(key.distance, q, key.key);
    largest_product = std::max(largest_product, options.sm_scale * norm(q) * norm(key.key));
    largest_score = std::max(largest_score, std::abs(score));
    if (options.transform != nullptr) score = options.transform(score, key.distance);
    largest_score = std::max(largest_score, std::abs(score));
    scores.push_back(score);
    max = std::max(max, score);
    for (const double v : key.value) largest_value = std::max(largest_value, std::abs(v));
  }
  double sum = 0;
  for (const double score : scores) sum += std::exp(score - max);
  const double denominator = sum + std::exp(options.sink - max);
  for (std::size_t j = 0; j < scores.size(); ++j)
    for (std::size_t d = 0; d < value_dim; ++d)
      result.out[d] += std::exp(scores[j] - max) / denominator * keys[j].value[d];
  result.lse = max + std::log(sum);

  // With u = 2^-24: a product of D terms is off by at most D u |q| |k|; rotating q and k in float
  // (cosine, sine, two products and a sum, each u) and scaling add less than 12 u |q| |k|; a
  // transform and the subtraction of the maximum are off by less than 6 u of the largest score. A
  // weight is off by twice a score's error (its own and its share of the sum), exp by 2 ulp = 4 u,
  // and sums over n keys by n u, in the numerator and the denominator.
  constexpr double kUnit = 0x1p-24;
  const auto dim = static_cast<double>(q.size());
  const auto count = static_cast<double>(keys.size());
  const double score_error = ((dim + 12) * largest_product + 6 * largest_score + 4) * kUnit;
  const double weight_error = 2 * score_error + 2 * (count + 16) * kUnit;
  result.out_bound = 1.01 * weight_error * largest_value + 1e-30;
  result.lse_bound = 1.01 * (score_error + (count + 16) * kUnit + 2 * kUnit * std::abs(result.lse));
  return result;
}

}  // namespace sluice::test
