// SPDX-License-Identifier: MIT
#include "models.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>

#include "random_weights.hpp"

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/load_encoder.hpp"
#include "sluice/model/load_model.hpp"
#include "sluice/model/vision_encoder.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "support/report_text.hpp"

namespace watch {

using sluice::Error;
using sluice::ErrorCode;

namespace {

std::vector<double> plain_frequencies(const DecoderGeometry& geometry) {
  std::vector<double> result;
  for (std::int64_t i = 0; i < geometry.head_dim / 2; ++i)
    result.push_back(std::pow(geometry.rope_theta, -2.0 * static_cast<double>(i) /
                                                       static_cast<double>(geometry.head_dim)));
  return result;
}

/// The extents of an encoder, read off the shapes of its tensors.
sluice::VisionEncoderConfig config_of(const sluice::NamedTensors& tensors, std::int64_t num_heads) {
  const auto extent = [&](const std::string& name, std::size_t axis) {
    const sluice::NamedTensors::Tensor& tensor = tensors.get(name);
    return axis < tensor.shape.size() ? tensor.shape[axis] : 0;
  };
  const std::string patches = "patch_embed.proj.weight";
  sluice::VisionEncoderConfig config;
  config.width = extent(patches, 0);
  config.channels = extent(patches, 1);
  config.grid_frames = extent(patches, 2);
  config.patch_size = extent(patches, 3);
  config.num_heads = num_heads;
  config.num_layers = 0;
  while (tensors.has("blocks." + std::to_string(config.num_layers) + ".norm1.weight"))
    ++config.num_layers;
  config.feed_forward_width = extent("blocks.0.mlp.gate_proj.weight", 0);
  config.out_width = extent("merger.mlp.2.weight", 0);
  config.merge =
      std::llround(std::sqrt(static_cast<double>(extent("merger.mlp.0.weight", 0)) /
                             static_cast<double>(std::max<std::int64_t>(config.width, 1))));
  config.window_size = config.patch_size * config.merge * 4;
  config.whole_layers.clear();
  for (std::int64_t l = 7; l < config.num_layers; l += 8) config.whole_layers.push_back(l);
  return config;
}

std::vector<std::uint16_t> random_matrix(std::uint64_t seed, const std::string& name,
                                         std::int64_t rows, std::int64_t cols, float scale) {
  std::vector<std::uint16_t> bits(static_cast<std::size_t>(rows * cols));
  const std::uint64_t salt = salt_of(seed, name);
  for (std::size_t i = 0; i < bits.size(); ++i)
    bits[i] = random_weight(salt, static_cast<std::int64_t>(i), scale);
  return bits;
}

std::shared_ptr<const sluice::Decoder> random_decoder(const DecoderGeometry& geometry,
                                                      std::uint64_t seed) {
  sluice::DecoderConfig config;
  config.family = "random";
  config.vocab_size = geometry.vocab_size;
  config.hidden_size = geometry.hidden_size;
  config.intermediate_size = geometry.intermediate_size;
  config.num_qo_heads = geometry.num_qo_heads;
  config.num_kv_heads = geometry.num_kv_heads;
  config.head_dim = geometry.head_dim;
  config.norm_eps = geometry.norm_eps;
  config.sm_scale = geometry.sm_scale;
  const int head_dim = static_cast<int>(geometry.head_dim);
  config.rotaries = {{.head_dim = head_dim,
                      .rotary_dim = head_dim,
                      .theta = geometry.rope_theta,
                      .sections = geometry.sections}};
  config.layers.resize(static_cast<std::size_t>(geometry.num_layers));

  const std::int64_t hidden = geometry.hidden_size;
  const std::int64_t wide = geometry.intermediate_size;
  const std::int64_t q_size = geometry.num_qo_heads * geometry.head_dim;
  const std::int64_t kv_size = geometry.num_kv_heads * geometry.head_dim;
  support::require_memory(
      2 * (2 * geometry.vocab_size * hidden +
           geometry.num_layers * hidden * (2 * q_size + 2 * kv_size + 3 * wide)),
      "the decoder's weights");
  auto storage = std::make_shared<std::vector<std::vector<std::uint16_t>>>();
  const auto matrix = [&](const std::string& name, std::int64_t rows, std::int64_t cols,
                          float scale) {
    storage->push_back(random_matrix(seed, name, rows, cols, scale));
    return sluice::WeightMatrix{sluice::ElementType::kBF16, storage->back().data(), rows, cols};
  };
  const auto weights_of = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
    return matrix(name, rows, cols, scale_of(cols));
  };
  const std::vector<float> ones(static_cast<std::size_t>(hidden), 1.0F);
  sluice::DecoderWeights weights;
  weights.embedding = matrix("embedding", geometry.vocab_size, hidden, scale_of(1));
  weights.output = weights_of("output", geometry.vocab_size, hidden);
  weights.output_norm = ones;
  for (std::int64_t l = 0; l < geometry.num_layers; ++l) {
    const std::string at = std::to_string(l) + ".";
    sluice::DecoderLayerWeights layer;
    layer.attention_norm = layer.feed_forward_norm = ones;
    layer.query = weights_of(at + "query", q_size, hidden);
    layer.key = weights_of(at + "key", kv_size, hidden);
    layer.value = weights_of(at + "value", kv_size, hidden);
    layer.output = weights_of(at + "output", hidden, q_size);
    layer.gate = weights_of(at + "gate", wide, hidden);
    layer.up = weights_of(at + "up", wide, hidden);
    layer.down = weights_of(at + "down", hidden, wide);
    weights.layers.push_back(std::move(layer));
  }
  weights.storage = storage;
  return std::make_shared<const sluice::Decoder>(std::move(config), std::move(weights));
}

/// The tensors of an encoder under the names of its file.
sluice::NamedTensors random_tensors(const sluice::VisionEncoderConfig& config, std::uint64_t seed) {
  sluice::NamedTensors made("weights from a seed");
  const auto matrix = [&](const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t cols = 1;
    for (std::size_t i = 1; i < shape.size(); ++i) cols *= shape[i];
    std::vector<float> values;
    values.reserve(static_cast<std::size_t>(shape.front() * cols));
    for (const std::uint16_t bits :
         random_matrix(seed, name, shape.front(), cols, scale_of(cols))) {
      sluice::bf16 value;
      value.bits = bits;
      values.push_back(static_cast<float>(value));
    }
    made.add(name, std::move(shape), std::move(values));
  };
  const auto ones = [&](const std::string& name) {
    made.add(name, {config.width},
             std::vector<float>(static_cast<std::size_t>(config.width), 1.0F));
  };
  const std::int64_t width = config.width;
  const std::int64_t wide = config.feed_forward_width;
  const std::int64_t merged = width * config.merge * config.merge;
  matrix("patch_embed.proj.weight",
         {width, config.channels, config.grid_frames, config.patch_size, config.patch_size});
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    const std::string at = "blocks." + std::to_string(l) + ".";
    ones(at + "norm1.weight");
    ones(at + "norm2.weight");
    matrix(at + "attn.qkv.weight", {3 * width, width});
    matrix(at + "attn.proj.weight", {width, width});
    matrix(at + "mlp.gate_proj.weight", {wide, width});
    matrix(at + "mlp.up_proj.weight", {wide, width});
    matrix(at + "mlp.down_proj.weight", {width, wide});
  }
  ones("merger.ln_q.weight");
  matrix("merger.mlp.0.weight", {merged, merged});
  matrix("merger.mlp.2.weight", {config.out_width, merged});
  return made;
}

}  // namespace

Preset preset_of(const std::string& name) {
  Preset preset{.name = name, .decoder = {}, .encoder = {}};
  if (name == "small") {
    preset.decoder = {.vocab_size = 512,
                      .hidden_size = 128,
                      .intermediate_size = 384,
                      .num_qo_heads = 4,
                      .num_kv_heads = 2,
                      .head_dim = 64,
                      .num_layers = 4,
                      .sections = {8, 12, 12}};
    preset.encoder.width = 128;
    preset.encoder.num_layers = 2;
    preset.encoder.num_heads = 2;
    preset.encoder.feed_forward_width = 192;
    preset.encoder.patch_size = 8;
    preset.encoder.grid_frames = 1;
    preset.encoder.window_size = 32;
    preset.encoder.whole_layers = {1};
  } else if (name == "qwen2.5-vl-7b") {
    preset.decoder = {.vocab_size = 152064,
                      .hidden_size = 3584,
                      .intermediate_size = 18944,
                      .num_qo_heads = 28,
                      .num_kv_heads = 4,
                      .head_dim = 128,
                      .num_layers = 28,
                      .sections = {16, 24, 24}};
    preset.fps = 30;
    preset.rows = 8;
    preset.cols = 16;
    preset.text_sinks = preset.text_window = 512;
  } else {
    throw Error(ErrorCode::kConfig,
                {"no such geometry", "watch", "geometry", "small or qwen2.5-vl-7b", name});
  }
  preset.decoder.sm_scale = 1 / std::sqrt(static_cast<double>(preset.decoder.head_dim));
  preset.decoder.frequencies = plain_frequencies(preset.decoder);
  return preset;
}

Models::Models(const ModelChoice& choice)
    : decoder_(choice.preset.decoder), encoder_(choice.preset.encoder), seed_(choice.seed) {
  if (!choice.model.empty()) {
    const sluice::LoadedModel model = sluice::load_model(choice.model);
    loaded_ = model.decoder;
    tokenizer_ = model.tokenizer;
    const sluice::DecoderConfig& config = loaded_->config();
    const sluice::Rotary& rotary = loaded_->rotary(0);
    decoder_ = {.vocab_size = config.vocab_size,
                .hidden_size = config.hidden_size,
                .intermediate_size = config.intermediate_size,
                .num_qo_heads = config.num_qo_heads,
                .num_kv_heads = config.num_kv_heads,
                .head_dim = config.head_dim,
                .num_layers = config.num_layers(),
                .norm_eps = config.norm_eps,
                .sm_scale = config.sm_scale,
                .rope_theta = rotary.config().theta,
                .sections = rotary.config().sections};
    for (int pair = 0; pair < rotary.num_pairs(); ++pair)
      decoder_.frequencies.push_back(rotary.frequency(pair));
  }
  if (!choice.encoder.empty()) {
    const sluice::SafetensorsFile file(choice.encoder);
    const bool inside = file.contains("visual.patch_embed.proj.weight");
    tensors_ = std::make_shared<const sluice::NamedTensors>(
        sluice::read_tensors(file, inside ? "visual." : ""));
    encoder_ = config_of(*tensors_, choice.encoder_heads);
  } else {
    encoder_.out_width = decoder_.hidden_size;
  }
  if (encoder_.out_width != decoder_.hidden_size)
    throw Error(ErrorCode::kShape,
                {"the encoder is of another decoder", choice.encoder, "out_width",
                 std::to_string(decoder_.hidden_size), std::to_string(encoder_.out_width)});
}

std::shared_ptr<const sluice::Decoder> Models::make_decoder() const {
  return loaded_ != nullptr ? loaded_ : random_decoder(decoder_, seed());
}

std::unique_ptr<const sluice::VisionEncoder> Models::make_encoder() const {
  return std::make_unique<const sluice::VisionEncoder>(
      encoder_, tensors_ != nullptr ? *tensors_ : random_tensors(encoder_, encoder_seed()));
}

void Models::require_plain_decoder() const {
  if (loaded_ == nullptr) return;
  const sluice::DecoderConfig& config = loaded_->config();
  const auto require = [&](bool plain, const char* field, const char* expected) {
    if (!plain)
      throw Error(ErrorCode::kUnsupported, {"this backend does not run such a decoder",
                                            config.family, field, expected, "another"});
  };
  require(config.rotaries.size() == 1, "rotaries", "one for all layers");
  const sluice::Rotary& rotary = loaded_->rotary(0);
  require(rotary.config().rotary_dim == config.head_dim, "rotary_dim", "whole heads");
  require(rotary.attention_factor() == 1, "attention_factor", "1");
  require(config.activation == sluice::Activation::kSilu, "activation", "SiLU");
  require(config.embedding_scale == 1, "embedding_scale", "1");
  require(!config.norm_adds_one, "norms", "weights as they are");
  for (const sluice::DecoderLayerConfig& layer : config.layers)
    require(layer.window_size >= sluice::kUnlimitedWindow, "window_size", "none");
  const std::vector<sluice::DecoderLayerWeights>& layers = loaded_->weights().layers;
  const bool biased = !layers.front().query_bias.empty();
  for (const sluice::DecoderLayerWeights& layer : layers) {
    for (const std::vector<float>* bias : {&layer.query_bias, &layer.key_bias, &layer.value_bias})
      require(bias->empty() != biased, "biases",
              "of queries, keys and values in all layers, or none");
    require(layer.output_bias.empty(), "output_bias", "none");
    require(layer.query_norm.empty() && layer.key_norm.empty(), "query_norm", "none");
    require(layer.post_attention_norm.empty() && layer.post_feed_forward_norm.empty(),
            "post_attention_norm", "none");
  }
}

std::vector<float> Models::decoder_weights(std::int64_t layer, std::string_view name) const {
  const sluice::DecoderWeights& all = loaded_->weights();
  const auto values = [](const sluice::WeightMatrix& matrix) {
    std::vector<float> result(static_cast<std::size_t>(matrix.rows * matrix.cols));
    sluice::dequantise(matrix.type, matrix.data, matrix.rows * matrix.cols, result.data());
    return result;
  };
  // `cols` values of each row, pairs of neighbours set apart.
  const auto half_split = [&](std::vector<float> rows, std::int64_t cols) {
    if (loaded_->rotary(0).config().pairing == sluice::RotaryPairing::kHalfSplit) return rows;
    std::vector<float> result(rows.size());
    const auto width = static_cast<std::size_t>(cols);
    const auto dim = static_cast<std::size_t>(decoder_.head_dim);
    for (std::size_t r = 0; r < rows.size() / width; ++r) {
      const std::size_t in_head = r % dim;
      const std::size_t to = r - in_head + in_head / 2 + in_head % 2 * (dim / 2);
      std::copy_n(rows.data() + r * width, width, result.data() + to * width);
    }
    return result;
  };
  if (layer < 0) {
    if (name == "embedding") return values(all.embedding);
    if (name == "output_norm") return all.output_norm;
    return all.output.data == all.embedding.data ? std::vector<float>{} : values(all.output);
  }
  const sluice::DecoderLayerWeights& w = all.layers[static_cast<std::size_t>(layer)];
  if (name == "attention_norm") return w.attention_norm;
  if (name == "feed_forward_norm") return w.feed_forward_norm;
  if (name == "query") return half_split(values(w.query), w.query.cols);
  if (name == "key") return half_split(values(w.key), w.key.cols);
  if (name == "value") return values(w.value);
  if (name == "query_bias") return half_split(w.query_bias, 1);
  if (name == "key_bias") return half_split(w.key_bias, 1);
  if (name == "value_bias") return w.value_bias;
  if (name == "output") return values(w.output);
  if (name == "gate") return values(w.gate);
  if (name == "up") return values(w.up);
  if (name == "down") return values(w.down);
  throw Error(ErrorCode::kConfig, {"no such weights", "Models::decoder_weights", "name",
                                   "a name of the list", std::string(name)});
}

}  // namespace watch
