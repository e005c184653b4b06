// SPDX-License-Identifier: MIT
/// What a decoder-only transformer of the Llama family looks like: one description that covers
/// Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and Gemma 3. Data only; files are read in
/// load_gguf.hpp and load_safetensors.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "sluice/cache/retention.hpp"
#include "sluice/core/error.hpp"
#include "sluice/nn/activation.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// How one layer differs from the others.
struct DecoderLayerConfig {
  /// Keys that a query of this layer sees by training, its own included; kUnlimitedWindow: all.
  std::int64_t window_size = kUnlimitedWindow;
  /// Index into DecoderConfig::rotaries.
  int rotary = 0;
};

/// Extents and choices of a decoder. Matrices are [out, in].
struct DecoderConfig {
  std::string family;  ///< "llama", "qwen2", ...: for reports
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_qo_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t context_length = 0;  ///< tokens seen in training; 0: unknown
  double norm_eps = 1e-5;
  double sm_scale = 0;              ///< of attention scores; 1 / sqrt(head_dim) in most families
  double embedding_scale = 1;       ///< Gemma: sqrt(hidden_size)
  bool norm_adds_one = false;       ///< Gemma in safetensors: weights are stored less 1
  Activation activation = Activation::kSilu;
  std::vector<RotaryConfig> rotaries;        ///< one, or local and global (Gemma 3)
  std::vector<DecoderLayerConfig> layers;

  std::int64_t num_layers() const { return static_cast<std::int64_t>(layers.size()); }

  /// \throws Error(kConfig) naming `where` (the file) and the field whose value makes no sense.
  void validate(const std::string& where) const {
    const auto positive = [&](const char* field, std::int64_t value, std::int64_t limit) {
      if (value < 1 || value > limit)
        throw Error(ErrorCode::kConfig, {"model description makes no sense", where, field,
                                         "1 to " + std::to_string(limit), std::to_string(value)});
    };
    positive("vocab_size", vocab_size, std::int64_t{1} << 26);
    positive("hidden_size", hidden_size, 1 << 20);
    positive("intermediate_size", intermediate_size, 1 << 22);
    positive("num_layers", num_layers(), 1 << 14);
    positive("num_qo_heads", num_qo_heads, 1 << 14);
    positive("num_kv_heads", num_kv_heads, num_qo_heads);
    positive("head_dim", head_dim, 1 << 13);
    if (num_qo_heads % num_kv_heads != 0)
      throw Error(ErrorCode::kConfig,
                  {"model description makes no sense", where, "num_qo_heads",
                   "a multiple of num_kv_heads = " + std::to_string(num_kv_heads),
                   std::to_string(num_qo_heads)});
    const auto finite = [&](const char* field, double value) {
      if (!(value > 0 && std::isfinite(value)))
        throw Error(ErrorCode::kConfig, {"model description makes no sense", where, field,
                                         "a positive number", std::to_string(value)});
    };
    finite("norm_eps", norm_eps);
    finite("sm_scale", sm_scale);
    finite("embedding_scale", embedding_scale);
    for (const DecoderLayerConfig& layer : layers)
      positive("layer window", layer.window_size, kUnlimitedWindow);
  }
};

}  // namespace sluice
