// SPDX-License-Identifier: MIT
// What is watched with: a decoder and a vision encoder, from files or from a seed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/model/named_tensors.hpp"
#include "sluice/model/vision_encoder_config.hpp"

namespace sluice {
class Decoder;
class Tokenizer;
class VisionEncoder;
}  // namespace sluice

namespace watch {

/// Extents of a decoder of the Llama family.
struct DecoderGeometry {
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_qo_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t num_layers = 0;
  double norm_eps = 1e-6;
  double sm_scale = 0;
  double rope_theta = 1e6;
  std::array<int, 3> sections{0, 0, 0};  // pairs that turn by time, height, width; zeros: one axis
  std::vector<double> frequencies{};     // [head_dim / 2]
};

/// A pair of models to watch with, and what suits it.
struct Preset {
  std::string name;
  DecoderGeometry decoder;
  sluice::VisionEncoderConfig encoder;
  double fps = 8;
  std::int64_t rows = 4;  // tokens of a frame
  std::int64_t cols = 4;
  std::int64_t text_sinks = 64;
  std::int64_t text_window = 128;
};
/// "small", or "qwen2.5-vl-7b": the geometry and the retention sizes of StreamingVLM.
/// \throws sluice::Error(kConfig) for another name.
Preset preset_of(const std::string& name);

struct ModelChoice {
  Preset preset;        // of what is not loaded
  std::string model;    // empty: from the seed
  std::string encoder;  // empty: from the seed
  std::int64_t encoder_heads = 16;
  std::uint64_t seed = 1;
};

/// The models. Those from the seed are described, not made: the backend makes them.
class Models {
 public:
  /// \throws sluice::Error for files that are not what they should be.
  explicit Models(const ModelChoice& choice);

  const DecoderGeometry& decoder() const { return decoder_; }
  const sluice::VisionEncoderConfig& encoder() const { return encoder_; }
  std::uint64_t seed() const { return seed_; }
  std::uint64_t encoder_seed() const { return seed_ + 1; }
  /// Null without a loaded decoder.
  const sluice::Tokenizer* tokenizer() const { return tokenizer_.get(); }
  const sluice::Decoder* loaded_decoder() const { return loaded_.get(); }
  /// Null without a loaded encoder.
  const sluice::NamedTensors* loaded_encoder() const { return tensors_.get(); }

  /// The decoder, made from the seed where none was loaded.
  std::shared_ptr<const sluice::Decoder> make_decoder() const;
  std::unique_ptr<const sluice::VisionEncoder> make_encoder() const;

  /// \throws sluice::Error(kUnsupported) if the loaded decoder has more than norms, one rotation of
  /// whole heads, SiLU, and biases of queries, keys and values.
  void require_plain_decoder() const;
  /// Weights of the loaded decoder as float32, empty where there are none: "embedding", "output"
  /// (empty: the embedding), "output_norm" of layer -1; "attention_norm", "query", "key", "value",
  /// their "_bias", "output", "feed_forward_norm", "gate", "up", "down" of the others. Rows of
  /// queries and keys are in half-split order: elements i and i + head_dim / 2 are a pair.
  std::vector<float> decoder_weights(std::int64_t layer, std::string_view name) const;

 private:
  DecoderGeometry decoder_;
  sluice::VisionEncoderConfig encoder_;
  std::uint64_t seed_;
  std::shared_ptr<const sluice::Decoder> loaded_;
  std::shared_ptr<const sluice::Tokenizer> tokenizer_;
  std::shared_ptr<const sluice::NamedTensors> tensors_;
};

}  // namespace watch
