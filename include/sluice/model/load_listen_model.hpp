// SPDX-License-Identifier: MIT
/// Reads a listening model from one GGUF file: the trunk as any decoder of architecture llama,
/// front end and heads under keys and tensors of their own. Needs sluice::io.
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
#include "sluice/core/token.hpp"
#include "sluice/io/gguf.hpp"
#include "sluice/model/detail/collect_weights.hpp"
#include "sluice/model/listen_model.hpp"
#include "sluice/model/load_gguf.hpp"

namespace sluice {

/// A listening model over a GGUF file, which the result keeps mapped. Keys beside the decoder's:
/// listen.version (1), .sample_rate, .frame_length, .hop, .fft_size, .mel_low_hz, .mel_high_hz,
/// .log_floor, .frame_window, .trained_delay, tokenizer.ggml.tokens, .bos_token_id, .eos_token_id;
/// tensors: listen.mel_mean, .mel_std [mels], .conv1 [D, 3 mels], .conv2 [D, 3 D], .proj [D, D],
/// .ctc [V + 1, D], each ".weight" and ".bias".
/// \throws Error(kFormat) for a missing or mistyped key or tensor, Error(kShape) for one that does
/// not fit, Error(kUnsupported) for another version, Error(kConfig) for values that make no sense;
/// what load_decoder() throws. Nothing is returned then.
inline std::shared_ptr<const ListenModel> load_listen_model(std::shared_ptr<const GgufFile> file) {
  const std::string where = file->path();
  if (!file->has("listen.version"))
    throw Error(ErrorCode::kFormat,
                {"not a listening model", where, "listen.version", "a key of this name", "none"});
  if (const std::uint64_t version = file->get_uint("listen.version"); version != 1)
    throw Error(ErrorCode::kUnsupported, {"listening model of another version", where,
                                          "listen.version", "1", std::to_string(version)});
  const auto whole = [&](const char* key) {
    const std::uint64_t value = file->get_uint(key);
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int32_t>::max()))
      throw Error(ErrorCode::kFormat,
                  {"number out of range", where, key, "at most 2^31 - 1", std::to_string(value)});
    return static_cast<std::int64_t>(value);
  };
  const auto number = [&](const char* key) {
    const GgufType type = file->value_type(key);
    return type == GgufType::kFloat32 || type == GgufType::kFloat64
               ? file->get_float(key)
               : static_cast<double>(whole(key));
  };
  std::shared_ptr<const Decoder> decoder = load_decoder(file);
  const std::int64_t width = decoder->config().hidden_size;
  const std::int64_t vocab = decoder->config().vocab_size;

  detail::WeightCollector<GgufFile> collector(file, where);
  const std::vector<std::int64_t>& statistics = file->tensor("listen.mel_mean").shape;
  const std::int64_t mels = statistics.empty() ? 0 : statistics.front();
  ListenConfig config;
  config.front_end = LogMelConfig::listen(collector.vector("listen.mel_mean", mels),
                                          collector.vector("listen.mel_std", mels));
  config.front_end.num_mels = mels;
  config.front_end.sample_rate = number("listen.sample_rate");
  config.front_end.window_length = whole("listen.frame_length");
  config.front_end.hop_length = whole("listen.hop");
  config.front_end.fft_size = whole("listen.fft_size");
  config.front_end.mel_low_hz = number("listen.mel_low_hz");
  config.front_end.mel_high_hz = number("listen.mel_high_hz");
  config.front_end.log_floor = number("listen.log_floor");
  config.frame_window = whole("listen.frame_window");
  config.trained_delay = whole("listen.trained_delay");
  config.begin_token = static_cast<Token>(whole("tokenizer.ggml.bos_token_id"));
  config.end_token = static_cast<Token>(whole("tokenizer.ggml.eos_token_id"));

  ListenWeights weights;
  weights.conv1 = collector.matrix("listen.conv1", width, 3 * mels);
  weights.conv1_bias = collector.vector("listen.conv1.bias", width);
  weights.conv2 = collector.matrix("listen.conv2", width, 3 * width);
  weights.conv2_bias = collector.vector("listen.conv2.bias", width);
  weights.projection = collector.matrix("listen.proj", width, width);
  weights.projection_bias = collector.vector("listen.proj.bias", width);
  weights.ctc = collector.matrix("listen.ctc", vocab + 1, width);
  weights.ctc_bias = collector.vector("listen.ctc.bias", vocab + 1);
  weights.storage = collector.storage();

  std::vector<std::string> pieces;
  for (const std::string_view piece : file->get_strings("tokenizer.ggml.tokens"))
    pieces.emplace_back(piece);
  return std::make_shared<const ListenModel>(std::move(config), std::move(weights),
                                             std::move(decoder), std::move(pieces), where);
}

/// The same from a path. \throws also Error(kIo).
inline std::shared_ptr<const ListenModel> load_listen_model(const std::string& path) {
  return load_listen_model(std::make_shared<const GgufFile>(path));
}

}  // namespace sluice
