// SPDX-License-Identifier: MIT
/// A decoder of the Llama family as its definition reads, in double, a whole sequence at once:
/// every pair of rows has a distance at which the one sees the other, or does not see it. No cache,
/// no chunks, no positions: what streaming computes, in any order, must come to this. It shares the
/// description of a model with the library and none of its arithmetic.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stdexcept>
#include <variant>
#include <vector>

#include "sluice/core/token.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/decoder_config.hpp"

namespace sluice::test {

/// Reads float32 weights; understands what tests use: grouped heads, rotation of halves on one
/// axis, gated SiLU, plain norms. The model must outlive it.
class NaiveDecoder {
 public:
  using Rows = std::vector<std::vector<double>>;
  /// Reader position less key position where row `query` sees row `key`; nothing: it does not.
  using Sees =
      std::function<std::optional<double>(std::size_t layer, std::size_t query, std::size_t key)>;
  /// The same where heads of a layer see different rows.
  using HeadSees = std::function<std::optional<double>(std::size_t layer, std::size_t kv_head,
                                                       std::size_t query, std::size_t key)>;
  struct Pass {
    Rows logits;  // [rows, vocab_size]
    /// What each head attends to: weights[layer][head][query][key].
    std::vector<std::vector<Rows>> weights;
    std::vector<Rows> queries;  ///< [layer][row][num_qo_heads * head_dim], not rotated
    std::vector<Rows> keys;     ///< [layer][row][num_kv_heads * head_dim], not rotated
  };

  explicit NaiveDecoder(const Decoder& model) : config_(model.config()), weights_(model.weights()) {
    if (config_.norm_adds_one || config_.activation != Activation::kSilu)
      throw std::logic_error("the naive decoder knows neither Gemma's norms nor its activation");
    for (const RotaryConfig& rotary : config_.rotaries)
      if (rotary.pairing != RotaryPairing::kHalfSplit || rotary.sections[0] != 0 ||
          !std::holds_alternative<NoScaling>(rotary.scaling) || !rotary.frequency_factors.empty())
        throw std::logic_error("the naive decoder rotates halves on one axis, unscaled");
  }

  Pass run(std::span<const Token> tokens, const Sees& sees) const {
    return run_heads(tokens, [&](std::size_t layer, std::size_t, std::size_t query,
                                 std::size_t key) { return sees(layer, query, key); });
  }

  Pass run_heads(std::span<const Token> tokens, const HeadSees& sees) const {
    Pass pass;
    run_heads(tokens, sees, pass);
    return pass;
  }

  /// The same into a pass that `sees` may look at: rows are formed in order, layer by layer, so
  /// that weights of earlier rows of the layer are final when a row asks what it sees. pass: empty.
  void run_heads(std::span<const Token> tokens, const HeadSees& sees, Pass& pass) const {
    Rows hidden;
    for (const Token token : tokens) {
      hidden.push_back(row_of(weights_.embedding, static_cast<std::size_t>(token)));
      for (double& x : hidden.back()) x *= config_.embedding_scale;
    }
    for (std::size_t l = 0; l < weights_.layers.size(); ++l) {
      const DecoderLayerWeights& layer = weights_.layers[l];
      Rows query;
      Rows key;
      Rows value;
      for (const std::vector<double>& x : hidden) {
        const std::vector<double> normed = norm(x, layer.attention_norm);
        query.push_back(product(layer.query, normed));
        key.push_back(product(layer.key, normed));
        value.push_back(product(layer.value, normed));
      }
      pass.queries.push_back(query);
      pass.keys.push_back(key);
      const Rows attended = attention(l, query, key, value, sees, pass);
      for (std::size_t t = 0; t < hidden.size(); ++t) {
        add(hidden[t], product(layer.output, attended[t]));
        const std::vector<double> normed = norm(hidden[t], layer.feed_forward_norm);
        std::vector<double> gate = product(layer.gate, normed);
        const std::vector<double> up = product(layer.up, normed);
        for (std::size_t i = 0; i < gate.size(); ++i)
          gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
        add(hidden[t], product(layer.down, gate));
      }
    }
    for (const std::vector<double>& x : hidden)
      pass.logits.push_back(product(weights_.output, norm(x, weights_.output_norm)));
  }

 private:
  static std::vector<double> row_of(const WeightMatrix& matrix, std::size_t row) {
    if (matrix.type != ElementType::kF32) throw std::logic_error("the weights are not float32");
    const auto cols = static_cast<std::size_t>(matrix.cols);
    const float* first = static_cast<const float*>(matrix.data) + row * cols;
    return {first, first + cols};
  }

  static std::vector<double> product(const WeightMatrix& matrix, const std::vector<double>& x) {
    std::vector<double> y;
    for (std::size_t row = 0; row < static_cast<std::size_t>(matrix.rows); ++row) {
      const float* weights =
          static_cast<const float*>(matrix.data) + row * static_cast<std::size_t>(matrix.cols);
      double sum = 0;
      for (std::size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(weights[i]) * x[i];
      y.push_back(sum);
    }
    return y;
  }

  static void add(std::vector<double>& x, const std::vector<double>& y) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  std::vector<double> norm(std::vector<double> x, const std::vector<float>& weight) const {
    double squares = 0;
    for (const double v : x) squares += v * v;
    const double root = std::sqrt(squares / static_cast<double>(x.size()) + config_.norm_eps);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= static_cast<double>(weight[i]) / root;
    return x;
  }

  Rows attention(std::size_t l, const Rows& query, const Rows& key, const Rows& value,
                 const HeadSees& sees, Pass& pass) const {
    const auto heads = static_cast<std::size_t>(config_.num_qo_heads);
    const auto heads_of_kv = heads / static_cast<std::size_t>(config_.num_kv_heads);
    const auto dim = static_cast<std::size_t>(config_.head_dim);
    const RotaryConfig& rotary =
        config_.rotaries[static_cast<std::size_t>(config_.layers[l].rotary)];
    const auto pairs = static_cast<std::size_t>(rotary.rotary_dim) / 2;
    const std::size_t rows = query.size();
    std::vector<Rows>& weights =
        pass.weights.emplace_back(heads, Rows(rows, std::vector<double>(rows)));
    Rows attended(rows, std::vector<double>(heads * dim));
    for (std::size_t t = 0; t < rows; ++t) {
      std::vector<double> sums(heads);
      for (std::size_t j = 0; j < rows; ++j)
        for (std::size_t kv_head = 0; kv_head < heads / heads_of_kv; ++kv_head) {
          const std::optional<double> distance = sees(l, kv_head, t, j);
          if (!distance) continue;
          std::vector<double> cosines;
          std::vector<double> sines;
          for (std::size_t i = 0; i < pairs; ++i) {
            const double angle = *distance * std::pow(rotary.theta, -2.0 * static_cast<double>(i) /
                                                                        rotary.rotary_dim);
            cosines.push_back(std::cos(angle));
            sines.push_back(std::sin(angle));
          }
          for (std::size_t head = kv_head * heads_of_kv; head < (kv_head + 1) * heads_of_kv;
               ++head) {
            const double* q = query[t].data() + head * dim;
            const double* k = key[j].data() + kv_head * dim;
            // <R(distance) q, k>
            double score = 0;
            for (std::size_t i = 0; i < pairs; ++i)
              score += cosines[i] * (q[i] * k[i] + q[i + pairs] * k[i + pairs]) +
                       sines[i] * (q[i] * k[i + pairs] - q[i + pairs] * k[i]);
            for (std::size_t d = 2 * pairs; d < dim; ++d) score += q[d] * k[d];
            // Scores of a small model do not overflow: no maximum is taken off.
            weights[head][t][j] = std::exp(config_.sm_scale * score);
            sums[head] += weights[head][t][j];
          }
        }
      for (std::size_t head = 0; head < heads; ++head)
        for (std::size_t j = 0; j < rows; ++j) {
          if (weights[head][t][j] == 0) continue;
          weights[head][t][j] /= sums[head];
          for (std::size_t d = 0; d < dim; ++d)
            attended[t][head * dim + d] +=
                weights[head][t][j] * value[j][head / heads_of_kv * dim + d];
        }
    }
    return attended;
  }

  const DecoderConfig& config_;
  const DecoderWeights& weights_;
};

}  // namespace sluice::test
