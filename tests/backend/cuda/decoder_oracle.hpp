// SPDX-License-Identifier: MIT
/// What a decoder on the GPU must compute: plain float64 loops over float32 weights, one token at a
/// time, keys and values rounded as a cache holds them. Shares no code with the backend.
#pragma once

#include <cstdint>
#include <vector>

#include <sluice/core/random.hpp>

namespace sluice_test {

/// What a cache holds of a row: bf16 numbers, or codes of a byte times the row's largest entry over
/// the largest code.
enum class PlainCache { kBF16, kInt8, kFp8 };

struct PlainDecoderConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_qo_heads = 1;
  int num_kv_heads = 1;
  int head_dim = 64;
  int num_layers = 1;
  double norm_eps = 1e-5;
  double sm_scale = 1;
  double theta = 10000;
  bool interleaved = false;
  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = 0;  ///< 0: unlimited
  PlainCache cache = PlainCache::kBF16;
  /// What is added to every product: normal deviates of this times the root of the terms' sum of
  /// squares. Stands for another arithmetic, whose keys and values may round the other way.
  double product_error = 0;
  std::uint64_t error_seed = 0;
};

struct PlainLayer {
  std::vector<float> attention_norm, query, key, value, output;
  std::vector<float> feed_forward_norm, gate, up, down;
};

struct PlainWeights {
  std::vector<float> embedding, output_norm, output;
  std::vector<PlainLayer> layers;
};

/// One stream.
class PlainDecoder {
 public:
  PlainDecoder(const PlainDecoderConfig& config, const PlainWeights& weights)
      : config_(config),
        weights_(&weights),
        random_(config.error_seed),
        keys_(weights.layers.size()),
        values_(weights.layers.size()) {}

  /// Feeds a token; logits of the next. [vocab_size] The token also sees the first `snapshot`
  /// tokens of another stream, from its own place (with a window, its rank).
  std::vector<double> step(int token, const PlainDecoder* source = nullptr,
                           std::int64_t snapshot = 0);

 private:
  std::vector<double> product(const std::vector<float>& matrix, const std::vector<double>& x);
  /// A row of all KV heads as it is read from the cache.
  std::vector<double> stored(const std::vector<double>& row) const;

  PlainDecoderConfig config_;
  const PlainWeights* weights_;
  sluice::Random random_;  // of product_error
  std::int64_t total_ = 0;
  // By layer: every token's row [num_kv_heads, head_dim], keys rotated.
  std::vector<std::vector<std::vector<double>>> keys_, values_;
};

}  // namespace sluice_test
