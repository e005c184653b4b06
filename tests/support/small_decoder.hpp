// SPDX-License-Identifier: MIT
/// A random decoder of a few layers in float32, small enough for a plain decoder in double to
/// follow (naive_decoder.hpp), and what tests feed it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/decoder.hpp"

namespace sluice::test {

struct Geometry {
  std::int64_t num_layers = 3;
  std::int64_t num_qo_heads = 4;
  std::int64_t num_kv_heads = 2;
  std::vector<std::int64_t> windows = {};  // of the layers, where they are trained with any
};

inline constexpr std::int64_t kVocab = 50;
inline constexpr std::int64_t kHidden = 32;
inline constexpr std::int64_t kHeadDim = 8;

/// Random weights whose attention is far from uniform and turns fast with the distance.
inline std::unique_ptr<const Decoder> small_decoder(const Geometry& geometry, std::uint64_t seed) {
  constexpr std::int64_t kIntermediate = 48;
  auto storage = std::make_shared<std::vector<std::vector<float>>>();
  Random random(seed);
  const auto matrix = [&](std::int64_t rows, std::int64_t cols, double gain) {
    std::vector<float>& values = storage->emplace_back(static_cast<std::size_t>(rows * cols));
    for (float& value : values)
      value = static_cast<float>(gain * random.normal() / std::sqrt(static_cast<double>(cols)));
    return WeightMatrix::of(values.data(), rows, cols);
  };
  const auto norm = [&] {
    std::vector<float> values(static_cast<std::size_t>(kHidden));
    for (float& value : values) value = static_cast<float>(0.5 + random.uniform());
    return values;
  };
  DecoderConfig config;
  config.family = "small";
  config.vocab_size = kVocab;
  config.hidden_size = kHidden;
  config.intermediate_size = kIntermediate;
  config.num_qo_heads = geometry.num_qo_heads;
  config.num_kv_heads = geometry.num_kv_heads;
  config.head_dim = kHeadDim;
  config.sm_scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
  config.rotaries.push_back({.head_dim = kHeadDim, .rotary_dim = kHeadDim, .theta = 100});
  config.layers.resize(static_cast<std::size_t>(geometry.num_layers));
  for (std::size_t l = 0; l < geometry.windows.size(); ++l)
    config.layers[l].window_size = geometry.windows[l];
  const std::int64_t q_size = geometry.num_qo_heads * kHeadDim;
  const std::int64_t kv_size = geometry.num_kv_heads * kHeadDim;
  DecoderWeights weights;
  weights.embedding = matrix(kVocab, kHidden, std::sqrt(static_cast<double>(kHidden)));
  weights.output = matrix(kVocab, kHidden, 1);
  weights.output_norm = norm();
  for (std::int64_t l = 0; l < geometry.num_layers; ++l) {
    DecoderLayerWeights layer;
    layer.attention_norm = norm();
    layer.feed_forward_norm = norm();
    layer.query = matrix(q_size, kHidden, 1.4);
    layer.key = matrix(kv_size, kHidden, 1.4);
    layer.value = matrix(kv_size, kHidden, 1);
    layer.output = matrix(kHidden, q_size, 1);
    layer.gate = matrix(kIntermediate, kHidden, 1);
    layer.up = matrix(kIntermediate, kHidden, 1);
    layer.down = matrix(kHidden, kIntermediate, 1);
    weights.layers.push_back(std::move(layer));
  }
  weights.storage = storage;
  return std::make_unique<const Decoder>(std::move(config), std::move(weights), "small_decoder");
}

inline std::vector<Token> random_tokens(Random& random, std::int64_t count) {
  std::vector<Token> tokens;
  for (std::int64_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<Token>(random.below(static_cast<std::uint64_t>(kVocab))));
  return tokens;
}

}  // namespace sluice::test
