// SPDX-License-Identifier: MIT
/// A small decoder with random weights, on the device and for the plain reference.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <sluice/backend/cuda/decoder.cuh>
#include <sluice/core/random.hpp>

#include "backend/cuda/decoder_oracle.hpp"
#include "backend/cuda/device_test.hpp"
#include "backend/cuda/quantised_sample.hpp"

namespace sluice_test {

using namespace sluice;

/// A small model with random weights, on both sides.
struct SmallModel {
  PlainDecoderConfig plain;
  PlainWeights host;
  CudaDecoderShape shape;
  std::vector<double> frequencies;
  std::optional<CudaDecoderWeights<bf16>> device;

  /// type: kBF16 or a quantised one, for all matrices but the embedding.
  SmallModel(int head_dim, bool interleaved, std::uint64_t seed,
             ElementType type = ElementType::kBF16) {
    const bool quantised = is_quantised(type);
    const bool whole = block_shape(type).values == 256;
    plain = {.vocab_size = 300,
             .hidden_size = whole ? 256 : 192,
             .intermediate_size = whole       ? 512
                                  : quantised ? 352
                                              : 328,
             .num_qo_heads = 4,
             .num_kv_heads = 2,
             .head_dim = head_dim,
             .num_layers = 3,
             .norm_eps = 1e-5,
             .sm_scale = 1 / std::sqrt(static_cast<double>(head_dim)),
             .interleaved = interleaved};
    shape = {plain.vocab_size,   plain.hidden_size,  plain.intermediate_size,
             plain.num_qo_heads, plain.num_kv_heads, plain.head_dim,
             plain.num_layers,   plain.norm_eps,     plain.sm_scale};
    for (int i = 0; i < head_dim / 2; ++i)
      frequencies.push_back(std::pow(plain.theta, -2.0 * i / head_dim));
    Random random(seed);
    const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
      std::vector<float> m = random_floats(random, static_cast<std::size_t>(rows * cols),
                                           1.5 / std::sqrt(static_cast<double>(cols)));
      for (float& v : m) v = static_cast<float>(bf16(v));
      return m;
    };
    const auto norm = [&] {
      std::vector<float> v =
          random_floats(random, static_cast<std::size_t>(shape.hidden_size), 0.2);
      for (float& x : v) x += 1;
      return v;
    };
    const auto sample = [&](std::int64_t rows, std::int64_t cols) {
      return random_quantised(type, rows, cols, random.next(),
                              1.5 / std::sqrt(static_cast<double>(cols)));
    };
    const auto rows_of = [](const QuantisedSample& x) {
      return CudaPackedRows{x.type, x.rows, x.packed};
    };
    device.emplace(shape, false, !quantised);
    host.embedding =
        random_floats(random, static_cast<std::size_t>(shape.vocab_size * shape.hidden_size), 1);
    for (float& v : host.embedding) v = static_cast<float>(bf16(v));
    if (quantised) {
      const QuantisedSample output = sample(shape.vocab_size, shape.hidden_size);
      device->quantised_output = place_quantised(std::array{rows_of(output)}, shape.hidden_size);
      host.output = output.values;
    } else {
      host.output = matrix(shape.vocab_size, shape.hidden_size);
      device->output.upload(rounded_to<bf16>(host.output));
    }
    host.output_norm = norm();
    device->embedding.upload(rounded_to<bf16>(host.embedding));
    device->output_norm.upload(host.output_norm);
    for (std::int64_t l = 0; l < shape.num_layers; ++l) {
      PlainLayer layer;
      layer.attention_norm = norm();
      CudaLayerWeights<bf16>& to = device->layers[static_cast<std::size_t>(l)];
      if (quantised) {
        layer.feed_forward_norm = norm();
        const QuantisedSample query = sample(shape.query_size(), shape.hidden_size);
        const QuantisedSample key = sample(shape.kv_size(), shape.hidden_size);
        const QuantisedSample value = sample(shape.kv_size(), shape.hidden_size);
        const QuantisedSample output = sample(shape.hidden_size, shape.query_size());
        const QuantisedSample gate = sample(shape.intermediate_size, shape.hidden_size);
        const QuantisedSample up = sample(shape.intermediate_size, shape.hidden_size);
        const QuantisedSample down = sample(shape.hidden_size, shape.intermediate_size);
        const std::vector<std::uint8_t> both = packed_in_turns(gate, up);
        to.quantised_query_key_value = place_quantised(
            std::array{rows_of(query), rows_of(key), rows_of(value)}, shape.hidden_size);
        to.quantised_output = place_quantised(std::array{rows_of(output)}, shape.query_size());
        to.quantised_gate_up = place_quantised(
            std::array{CudaPackedRows{type, 2 * shape.intermediate_size, both}}, shape.hidden_size);
        to.quantised_down = place_quantised(std::array{rows_of(down)}, shape.intermediate_size);
        layer.query = query.values;
        layer.key = key.values;
        layer.value = value.values;
        layer.output = output.values;
        layer.gate = gate.values;
        layer.up = up.values;
        layer.down = down.values;
      } else {
        layer.query = matrix(shape.query_size(), shape.hidden_size);
        layer.key = matrix(shape.kv_size(), shape.hidden_size);
        layer.value = matrix(shape.kv_size(), shape.hidden_size);
        layer.output = matrix(shape.hidden_size, shape.query_size());
        layer.feed_forward_norm = norm();
        layer.gate = matrix(shape.intermediate_size, shape.hidden_size);
        layer.up = matrix(shape.intermediate_size, shape.hidden_size);
        layer.down = matrix(shape.hidden_size, shape.intermediate_size);
        to.output.upload(rounded_to<bf16>(layer.output));
        to.down.upload(rounded_to<bf16>(layer.down));
        device->set_query_key_value(l, rounded_to<bf16>(layer.query), rounded_to<bf16>(layer.key),
                                    rounded_to<bf16>(layer.value));
        device->set_gate_up(l, rounded_to<bf16>(layer.gate), rounded_to<bf16>(layer.up));
      }
      to.attention_norm.upload(layer.attention_norm);
      to.feed_forward_norm.upload(layer.feed_forward_norm);
      host.layers.push_back(std::move(layer));
    }
  }

  CudaDecoderOptions options(std::int64_t batch, std::int64_t sinks, std::int64_t window,
                             std::int64_t chunk, bool overlap) const {
    CudaDecoderOptions result;
    const bool full = window == 0;
    result.step = {.num_sink_tokens = sinks,
                   .window_size = full ? DecodeStepConfig::kUnlimitedWindow : window,
                   .capacity = full ? 256 : sinks + window + std::max<std::int64_t>(chunk - 1, 0),
                   .batch_size = batch,
                   .frequencies = frequencies,
                   .interleaved = plain.interleaved};
    result.max_chunk = chunk;
    result.overlap = overlap;
    result.history_size = 512;
    return result;
  }
  PlainDecoder oracle(std::int64_t sinks, std::int64_t window, double product_error = 0,
                      std::uint64_t error_seed = 0, PlainCache cache = PlainCache::kBF16) const {
    PlainDecoderConfig config = plain;
    config.num_sink_tokens = sinks;
    config.window_size = window;
    config.product_error = product_error;
    config.error_seed = error_seed;
    config.cache = cache;
    return PlainDecoder(config, host);
  }
};

/// ||found - expected|| / ||expected||.
inline double relative_error(std::span<const float> found, const std::vector<double>& expected) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = static_cast<double>(found[i]) - expected[i];
    error += difference * difference;
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

inline std::int32_t argmax(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// Keys and values that fall on the other side of a rounding than the reference's: a bf16 unit of a
// few entries among thousands. Everything else is float32.
inline constexpr double kExactBound = 1e-3;

/// The same for one model and text, where an entry that lies between two numbers of the cache
/// weighs more: the largest error of logits that the reference makes itself when its products are
/// off by `product_error`, each of `times` times another way. Left out, it is 2^-20, less than
/// float32 sums may be (quantised_vector_test.cu).
inline double rounding_error(const SmallModel& model, std::int64_t sinks, std::int64_t window,
                             std::span<const std::int32_t> tokens,
                             PlainCache cache = PlainCache::kBF16, double product_error = 0x1p-20,
                             std::uint64_t times = 32) {
  std::vector<std::vector<double>> expected;
  PlainDecoder exact = model.oracle(sinks, window, 0, 0, cache);
  for (const std::int32_t token : tokens) expected.push_back(exact.step(token));
  double worst = 0;
  for (std::uint64_t seed = 1; seed <= times; ++seed) {
    PlainDecoder other = model.oracle(sinks, window, product_error, seed, cache);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::vector<double> logits = other.step(tokens[i]);
      const std::vector<float> found(logits.begin(), logits.end());
      worst = std::max(worst, relative_error(found, expected[i]));
    }
  }
  return worst;
}
// Inputs of every product are rounded to bf16, by 2^-9 of their size at most; 13 products.
inline constexpr double kRoundedBound = 13 * 0x1p-9;

}  // namespace sluice_test
