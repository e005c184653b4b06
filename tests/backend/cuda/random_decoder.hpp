// SPDX-License-Identifier: MIT
/// A small decoder with random weights in bf16, and how results of it are compared: for tests of
/// the host's half of the CUDA backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/session.hpp>
#include <sluice/core/random.hpp>
#include <sluice/stream/backend_traits.hpp>

namespace host_test {

using namespace sluice;

inline constexpr std::int64_t kVocab = 128;
inline constexpr std::int64_t kHidden = 96;
inline constexpr std::int64_t kIntermediate = 160;
inline constexpr std::int64_t kLayers = 3;
inline constexpr std::int64_t kQoHeads = 4;
inline constexpr std::int64_t kKvHeads = 2;

// Relative errors of logits, which have a standard deviation of 1 here.
// Steps: float32 on both sides, in another order. What differs by more are keys and values that
// round to the other neighbour: a few among thousands, by 2^-8 of themselves (bf16). All of them at
// once, by half of that, are the bound.
inline constexpr double kExactBound = 0x1p-9;
// Chunks: inputs of 4 products a layer and of the last are rounded to bf16, by 2^-9 at most.
inline constexpr double kRoundedBound = (4 * kLayers + 1) * 0x1p-9;

inline bool has_device(int device) {
  try {
    backend_traits<cuda>::require_device(device);
    return true;
  } catch (const Error&) {
    return false;
  }
}

/// Whether plain_device_session.cpp stands in for the device's half: nothing is rounded there.
inline bool is_plain_device() {
  try {
    backend_traits<cuda>::require_device(1000);
  } catch (const Error& error) {
    return error.detail().where == "plain device";
  }
  return false;
}

struct Setting {
  int head_dim = 64;
  bool interleaved = false;
  bool biased = false;
  std::int64_t trained_window = kUnlimitedWindow;
  // Of layers' matrices but for values, of values, of the output projection.
  ElementType type = ElementType::kBF16;
  ElementType value_type = ElementType::kBF16;
  ElementType output_type = ElementType::kBF16;
  bool tied = false;
};

/// A random model, the same for both sides: embeddings, which the GPU looks up in 16 bits, are of
/// bf16 or what is tied to them.
inline std::shared_ptr<const Decoder> make_model(const Setting& setting, std::uint64_t seed) {
  // Rows of whole bf16 numbers: plain elements are aligned.
  auto storage = std::make_shared<std::vector<std::vector<bf16>>>();
  storage->reserve(2 + 7 * kLayers);
  Random random(seed);
  const auto matrix = [&](ElementType type, std::int64_t rows, std::int64_t cols, double gain) {
    std::vector<float> values;
    for (std::int64_t i = 0; i < rows * cols; ++i)
      values.push_back(
          static_cast<float>(gain * random.normal() / std::sqrt(static_cast<double>(cols))));
    std::vector<bf16>& stored = storage->emplace_back(
        static_cast<std::size_t>(storage_bytes(type, rows * cols)) / sizeof(bf16));
    quantise(type, values.data(), rows * cols, stored.data());
    return WeightMatrix{type, stored.data(), rows, cols};
  };
  const auto norm = [&] {
    std::vector<float> values(static_cast<std::size_t>(kHidden));
    for (float& value : values) value = static_cast<float>(1 + 0.2 * random.normal());
    return values;
  };
  DecoderConfig config;
  config.family = "llama";
  config.vocab_size = kVocab;
  config.hidden_size = kHidden;
  config.intermediate_size = kIntermediate;
  config.num_qo_heads = kQoHeads;
  config.num_kv_heads = kKvHeads;
  config.head_dim = setting.head_dim;
  config.sm_scale = 1 / std::sqrt(static_cast<double>(setting.head_dim));
  config.rotaries.push_back(
      {.head_dim = setting.head_dim,
       .rotary_dim = setting.head_dim,
       .pairing = setting.interleaved ? RotaryPairing::kInterleaved : RotaryPairing::kHalfSplit});
  config.layers.resize(static_cast<std::size_t>(kLayers));
  for (DecoderLayerConfig& layer : config.layers) layer.window_size = setting.trained_window;
  DecoderWeights weights;
  if (setting.tied) {
    weights.embedding = weights.output = matrix(setting.output_type, kVocab, kHidden, 1);
  } else {
    weights.embedding =
        matrix(ElementType::kBF16, kVocab, kHidden, std::sqrt(static_cast<double>(kHidden)));
    weights.output = matrix(setting.output_type, kVocab, kHidden, 1);
  }
  weights.output_norm = norm();
  for (std::int64_t l = 0; l < kLayers; ++l) {
    DecoderLayerWeights layer;
    layer.attention_norm = norm();
    layer.feed_forward_norm = norm();
    const ElementType type = setting.type;
    layer.query = matrix(type, kQoHeads * setting.head_dim, kHidden, 1.5);
    layer.key = matrix(type, kKvHeads * setting.head_dim, kHidden, 1.5);
    layer.value = matrix(setting.value_type, kKvHeads * setting.head_dim, kHidden, 1);
    layer.output = matrix(type, kHidden, kQoHeads * setting.head_dim, 1);
    layer.gate = matrix(type, kIntermediate, kHidden, 1);
    layer.up = matrix(type, kIntermediate, kHidden, 1);
    layer.down = matrix(type, kHidden, kIntermediate, 1);
    if (setting.biased)
      layer.query_bias.resize(static_cast<std::size_t>(kQoHeads * setting.head_dim));
    weights.layers.push_back(std::move(layer));
  }
  weights.storage = storage;
  return std::make_shared<const Decoder>(std::move(config), std::move(weights));
}

inline std::vector<Token> some_tokens(std::size_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<Token> tokens;
  for (std::size_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<Token>(random.below(kVocab)));
  return tokens;
}

inline double norm_of(std::span<const float> x) {
  double sum = 0;
  for (const float value : x) sum += static_cast<double>(value) * static_cast<double>(value);
  return std::sqrt(sum);
}
/// ||found - expected|| / ||expected||.
inline double relative_error(std::span<const float> found, std::span<const float> expected) {
  std::vector<float> difference(found.size());
  for (std::size_t i = 0; i < found.size(); ++i) difference[i] = found[i] - expected[i];
  return norm_of(difference) / norm_of(expected);
}
/// By how much the greatest logit leads.
inline double margin_of(std::span<const float> logits) {
  std::vector<float> sorted(logits.begin(), logits.end());
  std::partial_sort(sorted.begin(), sorted.begin() + 2, sorted.end(), std::greater<float>());
  return static_cast<double>(sorted[0]) - static_cast<double>(sorted[1]);
}
inline std::vector<float> copy(std::span<const float> x) {
  return {x.begin(), x.end()};
}

}  // namespace host_test

#define SKIP_WITHOUT_DEVICE() \
  if (!host_test::has_device(sluice::kCurrentDevice)) GTEST_SKIP() << "no CUDA device"
