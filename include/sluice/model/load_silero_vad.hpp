// SPDX-License-Identifier: MIT
/// Reads Silero VAD's 16 kHz weights from the published safetensors file. Needs sluice::io.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/io/safetensors.hpp"
#include "sluice/nn/silero_vad.hpp"

namespace sluice {

/// The weights of silero_vad_16k.safetensors. `where` is what errors call the file.
/// \throws Error(kFormat) for a tensor that is missing; kShape for one of another shape;
/// kUnsupported for one that is not float32; and what SafetensorsFile throws.
inline SileroVadWeights load_silero_vad_weights(const SafetensorsFile& file,
                                                const std::string& where) {
  const auto read = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    const SafetensorsTensor& tensor = file.tensor(name);
    const auto text = [](const std::vector<std::int64_t>& extents) {
      std::string joined;
      for (const std::int64_t extent : extents)
        joined += (joined.empty() ? "" : " x ") + std::to_string(extent);
      return joined;
    };
    if (tensor.type != ElementType::kF32)
      throw Error(ErrorCode::kUnsupported,
                  {"Silero VAD is read as float32", where, "tensor " + name, "F32", "other"});
    if (tensor.shape != shape)
      throw Error(ErrorCode::kShape, {"not Silero VAD at 16 kHz", where, "tensor " + name,
                                      text(shape), text(tensor.shape)});
    std::vector<float> values(tensor.bytes / sizeof(float));
    std::memcpy(values.data(), tensor.data, tensor.bytes);
    return values;
  };
  SileroVadWeights weights;
  weights.stft = read("stft_conv.weight", {258, 1, 256});
  const std::int64_t channels[] = {129, 128, 64, 64, 128};
  for (std::size_t i = 0; i < 4; ++i) {
    const std::string name = "conv" + std::to_string(i + 1);
    weights.conv[i].weight = read(name + ".weight", {channels[i + 1], channels[i], 3});
    weights.conv[i].bias = read(name + ".bias", {channels[i + 1]});
  }
  weights.input_weight = read("lstm_cell.weight_ih", {512, 128});
  weights.hidden_weight = read("lstm_cell.weight_hh", {512, 128});
  weights.input_bias = read("lstm_cell.bias_ih", {512});
  weights.hidden_bias = read("lstm_cell.bias_hh", {512});
  weights.output = read("final_conv.weight", {1, 128, 1});
  weights.output_bias = read("final_conv.bias", {1});
  return weights;
}

/// The network of a file. \throws Error as above.
inline SileroVad load_silero_vad(const std::string& path) {
  return SileroVad(load_silero_vad_weights(SafetensorsFile(path), path));
}

}  // namespace sluice
