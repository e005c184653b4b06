// SPDX-License-Identifier: MIT
#include "backend/cuda/decoder_oracle.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include <sluice/core/element.hpp>

namespace sluice_test {
namespace {

using Row = std::vector<double>;

Row norm(const Row& x, const std::vector<float>& weight, double eps) {
  double square = 0;
  for (const double v : x) square += v * v;
  const double scale = 1 / std::sqrt(square / static_cast<double>(x.size()) + eps);
  Row y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * static_cast<double>(weight[i]);
  return y;
}

void rotate(double* head, int head_dim, double position, double theta, bool interleaved) {
  for (int i = 0; i < head_dim / 2; ++i) {
    const double angle = position * std::pow(theta, -2.0 * i / head_dim);
    double& a = head[interleaved ? 2 * i : i];
    double& b = head[interleaved ? 2 * i + 1 : i + head_dim / 2];
    const double first = a * std::cos(angle) - b * std::sin(angle);
    b = b * std::cos(angle) + a * std::sin(angle);
    a = first;
  }
}

/// To the nearest number of three bits behind the first, of exponents from -6 on; ties to even.
double rounded_to_e4m3(double x) {
  int exponent = 0;
  static_cast<void>(std::frexp(x, &exponent));
  const double unit = std::ldexp(1.0, std::max(exponent - 1, -6) - 3);
  return std::nearbyint(x / unit) * unit;
}

void add(Row& x, const Row& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

}  // namespace

std::vector<double> PlainDecoder::product(const std::vector<float>& matrix, const Row& x) {
  Row y(matrix.size() / x.size());
  for (std::size_t r = 0; r < y.size(); ++r) {
    double squares = 0;
    for (std::size_t c = 0; c < x.size(); ++c) {
      const double term = static_cast<double>(matrix[r * x.size() + c]) * x[c];
      y[r] += term;
      squares += term * term;
    }
    if (config_.product_error > 0)
      y[r] += config_.product_error * std::sqrt(squares) * random_.normal();
  }
  return y;
}

std::vector<double> PlainDecoder::stored(const Row& row) const {
  Row result;
  const auto dim = static_cast<std::size_t>(config_.head_dim);
  for (std::size_t head = 0; head < row.size(); head += dim) {
    float peak = 0;
    for (std::size_t d = 0; d < dim; ++d)
      peak = std::max(peak, std::abs(static_cast<float>(row[head + d])));
    const bool whole = config_.cache == PlainCache::kInt8;
    const float scale = peak / (whole ? 127.0F : 448.0F);
    for (std::size_t d = 0; d < dim; ++d) {
      const auto x = static_cast<float>(row[head + d]);
      if (config_.cache == PlainCache::kBF16) {
        result.push_back(static_cast<double>(static_cast<float>(sluice::bf16(x))));
        continue;
      }
      const auto quotient = static_cast<double>(x / scale);
      result.push_back((whole ? std::nearbyint(quotient) : rounded_to_e4m3(quotient)) *
                       static_cast<double>(scale));
    }
  }
  return result;
}

std::vector<double> PlainDecoder::step(int token, const PlainDecoder* source,
                                       std::int64_t snapshot) {
  const PlainDecoderConfig& c = config_;
  const auto width = static_cast<std::ptrdiff_t>(c.hidden_size);
  const auto row = weights_->embedding.begin() + token * width;
  Row hidden(row, row + width);
  const std::int64_t sinks = c.num_sink_tokens;
  const std::int64_t window = c.window_size == 0 ? total_ + 1 : c.window_size;
  // Sinks are read from where the query stood when the window was first full.
  const std::int64_t sink_place =
      c.window_size == 0 ? total_ : std::min(total_, sinks + c.window_size - 1);
  for (std::size_t l = 0; l < weights_->layers.size(); ++l) {
    const PlainLayer& layer = weights_->layers[l];
    const Row x = norm(hidden, layer.attention_norm, c.norm_eps);
    const Row query = product(layer.query, x);
    Row key = product(layer.key, x);
    for (int h = 0; h < c.num_kv_heads; ++h)
      rotate(&key[static_cast<std::size_t>(h * c.head_dim)], c.head_dim,
             static_cast<double>(total_), c.theta, c.interleaved);
    keys_[l].push_back(stored(key));
    values_[l].push_back(stored(product(layer.value, x)));
    Row attended(query.size());
    for (int h = 0; h < c.num_qo_heads; ++h) {
      const int kv = h / (c.num_qo_heads / c.num_kv_heads);
      const auto from = query.begin() + h * c.head_dim;
      Row own(from, from + c.head_dim);
      Row at_sinks = own;
      rotate(own.data(), c.head_dim, static_cast<double>(total_), c.theta, c.interleaved);
      rotate(at_sinks.data(), c.head_dim, static_cast<double>(sink_place), c.theta, c.interleaved);
      std::vector<double> scores;
      std::vector<const Row*> seen;  // value rows
      const auto see = [&](const Row& q, const Row& key_row, const Row& value_row) {
        double score = 0;
        for (int d = 0; d < c.head_dim; ++d)
          score += q[static_cast<std::size_t>(d)] *
                   key_row[static_cast<std::size_t>(kv * c.head_dim + d)];
        scores.push_back(score * c.sm_scale);
        seen.push_back(&value_row);
      };
      for (std::size_t k = 0; k < static_cast<std::size_t>(snapshot); ++k)
        see(at_sinks, source->keys_[l][k], source->values_[l][k]);
      for (std::int64_t k = 0; k <= total_; ++k)
        if (k < sinks || k > total_ - window)
          see(k < sinks ? at_sinks : own, keys_[l][static_cast<std::size_t>(k)],
              values_[l][static_cast<std::size_t>(k)]);
      const double most = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      for (double& s : scores) sum += s = std::exp(s - most);
      for (std::size_t i = 0; i < seen.size(); ++i)
        for (int d = 0; d < c.head_dim; ++d)
          attended[static_cast<std::size_t>(h * c.head_dim + d)] +=
              scores[i] / sum * (*seen[i])[static_cast<std::size_t>(kv * c.head_dim + d)];
    }
    add(hidden, product(layer.output, attended));
    const Row y = norm(hidden, layer.feed_forward_norm, c.norm_eps);
    Row gate = product(layer.gate, y);
    const Row up = product(layer.up, y);
    for (std::size_t i = 0; i < gate.size(); ++i)
      gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    add(hidden, product(layer.down, gate));
  }
  ++total_;
  return product(weights_->output, norm(hidden, weights_->output_norm, c.norm_eps));
}

}  // namespace sluice_test
