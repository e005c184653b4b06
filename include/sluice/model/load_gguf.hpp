// SPDX-License-Identifier: MIT
/// Reads a decoder from a GGUF file (architectures llama, qwen2, qwen3, gemma3). Weights stay
/// memory-mapped in their stored types. Needs sluice::io.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/model/detail/collect_weights.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

namespace detail {

/// Metadata of one architecture, all keys under its prefix.
class GgufModelKeys {
 public:
  GgufModelKeys(const GgufFile& file, std::string_view architecture)
      : file_(file), prefix_(std::string(architecture) + ".") {}

  std::int64_t integer(const std::string& key) const { return checked(key, file_.get_uint(prefix_ + key)); }
  std::int64_t integer_or(const std::string& key, std::int64_t fallback) const {
    return has(key) ? integer(key) : fallback;
  }
  double number(const std::string& key) const { return file_.get_float(prefix_ + key); }
  double number_or(const std::string& key, double fallback) const {
    return has(key) ? number(key) : fallback;
  }
  std::string text_or(const std::string& key, std::string_view fallback) const {
    return std::string(file_.get_string_or(prefix_ + key, fallback));
  }
  bool has(const std::string& key) const { return file_.has(prefix_ + key); }

 private:
  std::int64_t checked(const std::string& key, std::uint64_t value) const {
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int32_t>::max()))
      throw Error(ErrorCode::kFormat, {"number out of range", file_.path(), prefix_ + key,
                                       "at most 2^31 - 1", std::to_string(value)});
    return static_cast<std::int64_t>(value);
  }

  const GgufFile& file_;
  std::string prefix_;
};

inline RotaryScaling gguf_rotary_scaling(const GgufFile& file, const GgufModelKeys& keys) {
  const std::string type = keys.text_or("rope.scaling.type", "none");
  const double factor = keys.number_or("rope.scaling.factor", 1.0);
  if (type == "none") return NoScaling{};
  if (type == "linear") return LinearScaling{factor};
  if (type == "yarn") {
    YarnScaling yarn;
    yarn.factor = factor;
    yarn.original_context = static_cast<double>(keys.integer("rope.scaling.original_context_length"));
    yarn.beta_fast = keys.number_or("rope.scaling.yarn_beta_fast", yarn.beta_fast);
    yarn.beta_slow = keys.number_or("rope.scaling.yarn_beta_slow", yarn.beta_slow);
    if (keys.has("rope.scaling.attn_factor"))
      yarn.attention_factor = keys.number("rope.scaling.attn_factor");
    return yarn;
  }
  throw Error(ErrorCode::kUnsupported, {"rotary scaling", file.path(), "rope.scaling.type",
                                        "none, linear or yarn", type});
}

}  // namespace detail

/// The configuration that a GGUF file describes.
/// \throws Error(kUnsupported) for another architecture or an option that is not implemented;
/// Error(kFormat) for a missing or mistyped key; Error(kConfig) for values that make no sense. Each
/// names the file, the key, what was expected and what was found.
inline DecoderConfig read_decoder_config(const GgufFile& file) {
  const std::string architecture(file.get_string("general.architecture"));
  const bool gemma = architecture == "gemma3";
  if (architecture != "llama" && architecture != "qwen2" && architecture != "qwen3" && !gemma)
    throw Error(ErrorCode::kUnsupported, {"model architecture", file.path(), "general.architecture",
                                          "llama, qwen2, qwen3 or gemma3", architecture});
  const detail::GgufModelKeys keys(file, architecture);
  if (keys.integer_or("expert_count", 0) > 0)
    throw Error(ErrorCode::kUnsupported, {"mixture of experts", file.path(), "expert_count", "0",
                                          std::to_string(keys.integer("expert_count"))});

  DecoderConfig config;
  config.family = architecture;
  config.hidden_size = keys.integer("embedding_length");
  config.intermediate_size = keys.integer("feed_forward_length");
  config.num_qo_heads = keys.integer("attention.head_count");
  config.num_kv_heads = keys.integer_or("attention.head_count_kv", config.num_qo_heads);
  if (config.num_qo_heads < 1)
    throw Error(ErrorCode::kConfig, {"model description makes no sense", file.path(),
                                     architecture + ".attention.head_count", "at least 1",
                                     std::to_string(config.num_qo_heads)});
  config.head_dim =
      keys.integer_or("attention.key_length", config.hidden_size / config.num_qo_heads);
  if (keys.integer_or("attention.value_length", config.head_dim) != config.head_dim)
    throw Error(ErrorCode::kUnsupported,
                {"values of another width than keys", file.path(),
                 architecture + ".attention.value_length", std::to_string(config.head_dim),
                 std::to_string(keys.integer("attention.value_length"))});
  config.context_length = keys.integer_or("context_length", 0);
  config.norm_eps = keys.number("attention.layer_norm_rms_epsilon");
  config.sm_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  const GgufTensor& embedding = file.tensor("token_embd.weight");
  config.vocab_size = embedding.shape.front();
  const std::int64_t num_layers = keys.integer("block_count");
  if (num_layers < 1 || num_layers > (1 << 14))
    throw Error(ErrorCode::kConfig, {"model description makes no sense", file.path(),
                                     architecture + ".block_count", "1 to 16384",
                                     std::to_string(num_layers)});

  RotaryConfig rotary;
  rotary.head_dim = static_cast<int>(config.head_dim);
  rotary.rotary_dim = static_cast<int>(keys.integer_or("rope.dimension_count", config.head_dim));
  rotary.theta = keys.number_or("rope.freq_base", 10000.0);
  // The converter permutes the rows of Llama's query and key projections for neighbouring pairs.
  rotary.pairing =
      architecture == "llama" ? RotaryPairing::kInterleaved : RotaryPairing::kHalfSplit;
  rotary.scaling = detail::gguf_rotary_scaling(file, keys);
  if (const GgufTensor* factors = file.find_tensor("rope_freqs.weight"))
    rotary.frequency_factors = detail::WeightCollector<GgufFile>::to_floats(*factors);
  config.rotaries.push_back(rotary);
  config.layers.assign(static_cast<std::size_t>(num_layers), DecoderLayerConfig{});

  if (gemma) {
    config.activation = Activation::kGeluTanh;
    config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
    // Gemma 3 27B scales by the mean head width instead (its query_pre_attn_scalar); GGUF has no
    // key for it, and 62 layers is what tells that model apart.
    if (num_layers == 62)
      config.sm_scale = 1.0 / std::sqrt(static_cast<double>(config.hidden_size) /
                                        static_cast<double>(config.num_qo_heads));
    RotaryConfig local = rotary;
    local.theta = keys.number_or("rope.freq_base_swa", 10000.0);
    local.scaling = NoScaling{};
    config.rotaries.push_back(local);
    const std::int64_t window = keys.integer("attention.sliding_window");
    // Five local layers, one global: fixed for the architecture.
    for (std::int64_t l = 0; l < num_layers; ++l)
      if (l % 6 != 5) config.layers[static_cast<std::size_t>(l)] = {window, 1};
  } else if (const std::int64_t window = keys.integer_or("attention.sliding_window", 0);
             window > 0) {
    for (DecoderLayerConfig& layer : config.layers) layer.window_size = window;
  }
  config.validate(file.path());
  return config;
}

/// A decoder over a GGUF file, which the result keeps mapped.
/// \throws Error as read_decoder_config(), and kFormat / kShape naming a tensor that is missing or
/// has another shape than the metadata says. Nothing is returned then.
inline std::shared_ptr<const Decoder> load_decoder(std::shared_ptr<const GgufFile> file) {
  DecoderConfig config = read_decoder_config(*file);
  const std::string where = file->path();
  const bool gemma = config.family == "gemma3";
  detail::TensorNames names{
      "token_embd", "output_norm", "output", [gemma](std::int64_t l) {
        const std::string at = "blk." + std::to_string(l) + ".";
        return detail::LayerTensorNames{
            at + "attn_norm",  at + "attn_q",      at + "attn_k",
            at + "attn_v",     at + "attn_output", at + "attn_q_norm",
            at + "attn_k_norm", gemma ? at + "post_attention_norm" : std::string(),
            at + "ffn_norm",   at + "ffn_gate",    at + "ffn_up",
            at + "ffn_down",   gemma ? at + "post_ffw_norm" : std::string()};
      }};
  detail::WeightCollector<GgufFile> collector(std::move(file), where);
  DecoderWeights weights = collector.collect(config, names);
  return std::make_shared<const Decoder>(std::move(config), std::move(weights), where);
}

}  // namespace sluice
