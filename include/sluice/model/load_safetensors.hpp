// SPDX-License-Identifier: MIT
/// Reads a decoder from a Hugging Face folder: config.json and safetensors (one file or shards).
/// Model types llama, mistral, qwen2, qwen3, gemma3_text and gemma3. Needs sluice::io.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/json.hpp"
#include "sluice/io/safetensors.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/model/detail/collect_weights.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

namespace detail {

/// Fills theta and scaling from an object with rope_theta, rope_type and their parameters.
/// `context`: max_position_embeddings, what YaRN falls back to.
inline void read_rope(const Json& rope, const std::string& where, double context,
                      RotaryConfig& rotary) {
  rotary.theta = json_float_or(rope, "rope_theta", where, rotary.theta);
  rotary.rotary_dim = static_cast<int>(
      std::lround(json_float_or(rope, "partial_rotary_factor", where, 1.0) * rotary.head_dim));
  const std::string type =
      json_string_or(rope, "rope_type", where, json_string_or(rope, "type", where, "default"));
  if (type == "default") {
    rotary.scaling = NoScaling{};
  } else if (type == "linear") {
    rotary.scaling = LinearScaling{json_float(rope, "factor", where)};
  } else if (type == "llama3") {
    rotary.scaling = Llama3Scaling{json_float(rope, "factor", where),
                                   json_float(rope, "low_freq_factor", where),
                                   json_float(rope, "high_freq_factor", where),
                                   json_float(rope, "original_max_position_embeddings", where)};
  } else if (type == "yarn") {
    YarnScaling yarn;
    yarn.factor = json_float(rope, "factor", where);
    yarn.original_context =
        json_float_or(rope, "original_max_position_embeddings", where, context);
    yarn.beta_fast = json_float_or(rope, "beta_fast", where, yarn.beta_fast);
    yarn.beta_slow = json_float_or(rope, "beta_slow", where, yarn.beta_slow);
    yarn.truncate = json_bool_or(rope, "truncate", where, yarn.truncate);
    if (json_has(rope, "attention_factor") && !rope["attention_factor"].is_null())
      yarn.attention_factor = json_float(rope, "attention_factor", where);
    if (json_has(rope, "mscale") || json_has(rope, "mscale_all_dim"))
      throw Error(ErrorCode::kUnsupported, {"YaRN with mscale", where, "mscale", "none", "one"});
    rotary.scaling = yarn;
  } else {
    throw Error(ErrorCode::kUnsupported, {"rotary scaling", where, "rope_type",
                                          "default, linear, llama3 or yarn", type});
  }
}

}  // namespace detail

/// The configuration in a config.json, in its layouts before and since Transformers 5
/// (rope_theta + rope_scaling; rope_parameters).
/// \throws Error(kUnsupported, kFormat, kConfig) naming the file, the field, expected and found.
inline DecoderConfig read_decoder_config(const Json& root, const std::string& where) {
  std::string type = json_string(root, "model_type", where);
  const Json& json = type == "gemma3" ? json_object(root, "text_config", where) : root;
  const bool gemma = type == "gemma3" || type == "gemma3_text";
  if (type != "llama" && type != "mistral" && type != "qwen2" && type != "qwen3" && !gemma)
    throw Error(ErrorCode::kUnsupported,
                {"model type", where, "model_type",
                 "llama, mistral, qwen2, qwen3, gemma3_text or gemma3", type});

  DecoderConfig config;
  config.family = type;
  config.vocab_size = json_int(json, "vocab_size", where);
  config.hidden_size = json_int(json, "hidden_size", where);
  config.intermediate_size = json_int(json, "intermediate_size", where);
  config.num_qo_heads = json_int(json, "num_attention_heads", where);
  config.num_kv_heads = json_int_or(json, "num_key_value_heads", where, config.num_qo_heads);
  config.context_length = json_int_or(json, "max_position_embeddings", where, 0);
  config.norm_eps = json_float_or(json, "rms_norm_eps", where, 1e-6);
  const std::int64_t num_layers = json_int(json, "num_hidden_layers", where);
  const auto sane = [&](const char* field, std::int64_t value, std::int64_t limit) {
    if (value < 1 || value > limit)
      throw Error(ErrorCode::kConfig, {"model description makes no sense", where, field,
                                       "1 to " + std::to_string(limit), std::to_string(value)});
  };
  sane("num_attention_heads", config.num_qo_heads, 1 << 14);
  sane("num_hidden_layers", num_layers, 1 << 14);
  // Widths that the classes fall back to when the file leaves head_dim out.
  const std::int64_t default_head_dim =
      gemma ? 256 : (type == "qwen3" ? 128 : config.hidden_size / config.num_qo_heads);
  config.head_dim = json_int_or(json, "head_dim", where, default_head_dim);
  sane("head_dim", config.head_dim, 1 << 13);
  const double scalar =
      gemma ? json_float_or(json, "query_pre_attn_scalar", where, 256.0)
            : static_cast<double>(config.head_dim);
  config.sm_scale = 1.0 / std::sqrt(scalar);

  const std::string activation =
      json_string_or(json, gemma ? "hidden_activation" : "hidden_act", where,
                     gemma ? "gelu_pytorch_tanh" : "silu");
  if (activation == "silu") {
    config.activation = Activation::kSilu;
  } else if (activation == "gelu_pytorch_tanh") {
    config.activation = Activation::kGeluTanh;
  } else {
    throw Error(ErrorCode::kUnsupported, {"activation", where, "hidden_act",
                                          "silu or gelu_pytorch_tanh", activation});
  }
  for (const char* cap : {"attn_logit_softcapping", "final_logit_softcapping"})
    if (json_has(json, cap) && !json[cap].is_null())
      throw Error(ErrorCode::kUnsupported, {"soft-capped logits", where, cap, "null", "a number"});
  if (gemma) {
    config.norm_adds_one = true;
    config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
  }

  RotaryConfig rotary;
  rotary.head_dim = static_cast<int>(config.head_dim);
  rotary.rotary_dim = rotary.head_dim;
  rotary.theta = json_float_or(json, "rope_theta", where, gemma ? 1e6 : 10000.0);
  const auto context = static_cast<double>(config.context_length);
  RotaryConfig local = rotary;
  local.theta = json_float_or(json, "rope_local_base_freq", where, 10000.0);
  if (json_has(json, "rope_parameters") && !json["rope_parameters"].is_null()) {
    const Json& rope = json_object(json, "rope_parameters", where);
    if (json_has(rope, "full_attention")) {
      detail::read_rope(json_object(rope, "full_attention", where), where, context, rotary);
      if (json_has(rope, "sliding_attention"))
        detail::read_rope(json_object(rope, "sliding_attention", where), where, context, local);
    } else {
      detail::read_rope(rope, where, context, rotary);
    }
  } else if (json_has(json, "rope_scaling") && !json["rope_scaling"].is_null()) {
    detail::read_rope(json_object(json, "rope_scaling", where), where, context, rotary);
  }
  config.rotaries.push_back(rotary);
  if (gemma) config.rotaries.push_back(local);

  config.layers.assign(static_cast<std::size_t>(num_layers), DecoderLayerConfig{});
  std::int64_t window = json_int_or(json, "sliding_window", where, 0);
  const bool windowed = window > 0 && json_bool_or(json, "use_sliding_window", where,
                                                   type == "mistral" || gemma);
  if (windowed) {
    std::vector<std::string> layer_types;
    if (json_has(json, "layer_types") && !json["layer_types"].is_null())
      layer_types = json_strings(json, "layer_types", where);
    if (!layer_types.empty() && static_cast<std::int64_t>(layer_types.size()) != num_layers)
      throw Error(ErrorCode::kFormat, {"one type per layer", where, "layer_types",
                                       std::to_string(num_layers) + " entries",
                                       std::to_string(layer_types.size())});
    const std::int64_t pattern =
        json_int_or(json, "sliding_window_pattern", where,
                    json_int_or(json, "_sliding_window_pattern", where, 6));
    sane("sliding_window_pattern", pattern, 1 << 14);
    // Qwen: the first max_window_layers see everything.
    const std::int64_t full_layers =
        type == "qwen2" || type == "qwen3"
            ? json_int_or(json, "max_window_layers", where, num_layers) : 0;
    for (std::int64_t l = 0; l < num_layers; ++l) {
      bool is_local = true;
      if (!layer_types.empty()) {
        const std::string& kind = layer_types[static_cast<std::size_t>(l)];
        if (kind != "sliding_attention" && kind != "full_attention")
          throw Error(ErrorCode::kUnsupported,
                      {"layer type", where, "layer_types",
                       "sliding_attention or full_attention", kind});
        is_local = kind == "sliding_attention";
      } else if (gemma) {
        is_local = (l + 1) % pattern != 0;
      } else {
        is_local = l >= full_layers;
      }
      if (is_local) config.layers[static_cast<std::size_t>(l)] = {window, gemma ? 1 : 0};
    }
  }
  config.validate(where);
  return config;
}

/// A decoder over the safetensors of a folder, which the result keeps mapped. `config_path` is the
/// config.json beside them.
/// \throws Error as read_decoder_config() and SafetensorsModel, and kFormat / kShape naming a
/// tensor that is missing or has another shape than config.json says.
inline std::shared_ptr<const Decoder> load_decoder(std::shared_ptr<const SafetensorsModel> file,
                                                   const std::string& config_path) {
  DecoderConfig config = read_decoder_config(read_json_file(config_path), config_path);
  const std::string where = file->path();
  const bool gemma = config.family == "gemma3" || config.family == "gemma3_text";
  // Multimodal checkpoints keep the text model under a prefix.
  std::string stem = "model.";
  for (const char* prefix : {"language_model.model.", "model.language_model."})
    if (file->find_tensor(std::string(prefix) + "embed_tokens.weight") != nullptr) stem = prefix;
  detail::TensorNames names{
      stem + "embed_tokens", stem + "norm", "lm_head", [stem, gemma](std::int64_t l) {
        const std::string at = stem + "layers." + std::to_string(l) + ".";
        const std::string attention = at + "self_attn.";
        return detail::LayerTensorNames{
            at + "input_layernorm",
            attention + "q_proj",
            attention + "k_proj",
            attention + "v_proj",
            attention + "o_proj",
            attention + "q_norm",
            attention + "k_norm",
            gemma ? at + "post_attention_layernorm" : std::string(),
            at + (gemma ? "pre_feedforward_layernorm" : "post_attention_layernorm"),
            at + "mlp.gate_proj",
            at + "mlp.up_proj",
            at + "mlp.down_proj",
            gemma ? at + "post_feedforward_layernorm" : std::string()};
      }};
  detail::WeightCollector<SafetensorsModel> collector(std::move(file), where);
  DecoderWeights weights = collector.collect(config, names);
  return std::make_shared<const Decoder>(std::move(config), std::move(weights), where);
}

}  // namespace sluice
