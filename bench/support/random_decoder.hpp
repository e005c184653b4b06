// SPDX-License-Identifier: MIT
/// A decoder with seeded random weights of any geometry, for measuring where no model file is at
/// hand: time depends on extents and types, not on what the weights say.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/memory.hpp"
#include "sluice/core/random.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/nn/quantised_blocks.hpp"

namespace sluice::bench {

struct Geometry {
  std::string name;
  std::int64_t vocab_size, hidden_size, intermediate_size, num_layers, num_qo_heads, num_kv_heads,
      head_dim;
};

inline Geometry smollm2_135m() {
  return {"smollm2-135m", 49152, 576, 1536, 30, 9, 3, 64};
}
inline Geometry llama_1b() {
  return {"llama-1b", 128256, 2048, 8192, 16, 32, 8, 64};
}

/// Weights of one type, normally distributed with the deviation 1 / sqrt(in features).
inline std::shared_ptr<const Decoder> random_decoder(const Geometry& g, ElementType type) {
  struct Storage {
    std::vector<Buffer<std::uint8_t>> matrices;
  };
  auto storage = std::make_shared<Storage>();
  Random random(1);
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    const WeightMatrix shape{type, nullptr, rows, cols};
    storage->matrices.emplace_back(static_cast<std::size_t>(shape.bytes()));
    std::uint8_t* data = storage->matrices.back().data();
    std::vector<float> row(static_cast<std::size_t>(cols));
    const double scale = 1.0 / std::sqrt(static_cast<double>(cols));
    for (float& value : row) value = static_cast<float>(scale * random.normal());
    for (std::int64_t r = 0; r < rows; ++r) {
      // One draw of a row, turned and shifted: drawing every weight would take minutes.
      const auto at = static_cast<std::size_t>(random.below(static_cast<std::uint64_t>(cols)));
      std::rotate(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(at), row.end());
      quantise(type, row.data(), cols, data + r * shape.row_bytes());
    }
    return WeightMatrix{type, data, rows, cols};
  };
  const std::vector<float> ones(static_cast<std::size_t>(g.hidden_size), 1.0F);

  DecoderConfig config;
  config.family = "random " + g.name;
  config.vocab_size = g.vocab_size;
  config.hidden_size = g.hidden_size;
  config.intermediate_size = g.intermediate_size;
  config.num_qo_heads = g.num_qo_heads;
  config.num_kv_heads = g.num_kv_heads;
  config.head_dim = g.head_dim;
  config.sm_scale = 1.0 / std::sqrt(static_cast<double>(g.head_dim));
  config.rotaries.push_back(
      {.head_dim = static_cast<int>(g.head_dim), .rotary_dim = static_cast<int>(g.head_dim)});
  config.layers.resize(static_cast<std::size_t>(g.num_layers));
  DecoderWeights weights;
  weights.embedding = weights.output = matrix(g.vocab_size, g.hidden_size);
  weights.output_norm = ones;
  for (std::int64_t l = 0; l < g.num_layers; ++l) {
    DecoderLayerWeights layer;
    layer.attention_norm = layer.feed_forward_norm = ones;
    layer.query = matrix(g.num_qo_heads * g.head_dim, g.hidden_size);
    layer.key = matrix(g.num_kv_heads * g.head_dim, g.hidden_size);
    layer.value = matrix(g.num_kv_heads * g.head_dim, g.hidden_size);
    layer.output = matrix(g.hidden_size, g.num_qo_heads * g.head_dim);
    layer.gate = matrix(g.intermediate_size, g.hidden_size);
    layer.up = matrix(g.intermediate_size, g.hidden_size);
    layer.down = matrix(g.hidden_size, g.intermediate_size);
    weights.layers.push_back(std::move(layer));
  }
  weights.storage = storage;
  return std::make_shared<const Decoder>(std::move(config), std::move(weights), "random_decoder");
}

}  // namespace sluice::bench
