// SPDX-License-Identifier: MIT
/// A decoder of the Llama family with seeded random float32 weights, small enough for the naive
/// float64 decoder.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice::test {

/// The extents of a small model.
struct SmallDecoder {
  static constexpr std::int64_t kVocab = 50;
  static constexpr std::int64_t kHidden = 32;
  static constexpr std::int64_t kHeadDim = 8;

  std::int64_t num_layers = 3;
  std::int64_t num_qo_heads = 4;
  std::int64_t num_kv_heads = 2;
  std::vector<std::int64_t> windows = {};  // of the layers, where they are trained with any
};

/// Random weights whose attention is far from uniform and turns fast with the distance.
inline std::unique_ptr<const Decoder> small_decoder(const SmallDecoder& geometry,
                                                    std::uint64_t seed) {
  constexpr std::int64_t kVocab = SmallDecoder::kVocab;
  constexpr std::int64_t kHidden = SmallDecoder::kHidden;
  constexpr std::int64_t kHeadDim = SmallDecoder::kHeadDim;
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

}  // namespace sluice::test
