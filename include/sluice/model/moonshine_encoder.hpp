// SPDX-License-Identifier: MIT
/// The encoder of Moonshine v2 over a stream of samples (arXiv 2602.12241): 5 ms frames of raw
/// audio, normalised and compressed one by one, two causal convolutions, and attention without
/// positions in windows that look ahead in some layers only. No spectrum and no future in the front
/// end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/model/named_tensors.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_attention.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// Samples to frames of `size` of them, without overlap. Frames: [samples, 1] to [samples / size,
/// size]. A rest that fills no frame is dropped at the end.
class SampleFrames {
 public:
  struct State {
    std::vector<float> pending;  // [size]
    std::int64_t count = 0;
  };

  /// \throws Error(kConfig) unless size is positive.
  explicit SampleFrames(std::int64_t size) : size_(size) {
    detail::require_positive(size, "SampleFrames", "size");
  }

  std::int64_t in_width() const { return 1; }
  std::int64_t out_width() const { return size_; }
  State make_state() const { return {std::vector<float>(static_cast<std::size_t>(size_)), 0}; }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == 1);
    std::int64_t written = 0;
    for (std::int64_t t = 0; t < in.rows; ++t) {
      state.pending[static_cast<std::size_t>(state.count)] = in.row(t)[0];
      if (++state.count < size_) continue;
      std::copy(state.pending.begin(), state.pending.end(), out.row(written++));
      state.count = 0;
    }
    return written;
  }
  std::int64_t flush(State& state, MatrixView<float>) const {
    state.count = 0;
    return 0;
  }
  void reset(State& state) const { state.count = 0; }
  std::int64_t max_outputs(std::int64_t frames) const { return timing().max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const {
    return static_cast<std::size_t>(size_) * sizeof(float) + sizeof(std::int64_t);
  }
  void save(const State& state, ByteWriter& writer) const {
    writer.write(state.count);
    writer.write_span(std::span<const float>(state.pending));
  }
  void restore(ByteReader& reader, State& state) const {
    const std::size_t at = reader.offset();
    state.count = reader.read<std::int64_t>("pending samples");
    if (state.count < 0 || state.count >= size_)
      reader.fail_at(at, "count out of range", "pending samples",
                     "0 to " + std::to_string(size_ - 1), std::to_string(state.count));
    reader.read_span("samples", std::span<float>(state.pending));
  }
  StreamTiming timing() const {
    return {.stride = size_, .left = size_ - 1, .alignment = StreamAlignment::kLast};
  }

 private:
  std::int64_t size_;
};

/// y = asinh(gain * (x - mean) / sqrt(variance + 10^-6)), mean and variance of each frame: loudness
/// goes, and peaks are compressed. Frames: [time, width] to [time, width].
class FrameCompression : public detail::FrameMap<FrameCompression> {
 public:
  /// \throws Error(kConfig) unless width is positive.
  FrameCompression(std::int64_t width, double gain)
      : FrameMap(width, width, "FrameCompression"), gain_(gain) {}

  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    const auto count = static_cast<double>(in_width());
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const float* from = x.row(t);
      double mean = 0;
      for (std::int64_t i = 0; i < in_width(); ++i) mean += static_cast<double>(from[i]);
      mean /= count;
      double square = 0;
      for (std::int64_t i = 0; i < in_width(); ++i) {
        const double centred = static_cast<double>(from[i]) - mean;
        square += centred * centred;
      }
      const double scale = gain_ / std::sqrt(square / count + 1e-6);
      for (std::int64_t i = 0; i < in_width(); ++i)
        y.row(t)[i] = static_cast<float>(std::asinh(scale * (static_cast<double>(from[i]) - mean)));
    }
  }

 private:
  double gain_;
};

/// How many frames a layer sees back and ahead.
struct MoonshineWindow {
  std::int64_t back = 16;
  std::int64_t ahead = 0;
};

/// Extents of an encoder; the defaults are those of the smallest model.
struct MoonshineEncoderConfig {
  std::int64_t frame_size = 80;  ///< samples: 5 ms at 16 kHz
  std::int64_t width = 320;
  std::int64_t num_heads = 8;
  std::int64_t feed_forward_width = 1280;
  std::vector<MoonshineWindow> layers{{16, 4}, {16, 4}, {16, 0}, {16, 0}, {16, 4}, {16, 4}};
  /// Whether bounds count the farthest frame: the maker's exporter says yes (16 + 1 + 4 keys),
  /// Transformers no (15 + 1 + 3).
  bool inclusive = true;
  double norm_eps = 1e-5;
};

/// The encoder as one layer over samples, [samples, 1] to [features, width]: 50 features a second
/// at 16 kHz, each final as soon as all that its layers look ahead is there (latency_of; 16
/// features for the default windows).
///
/// Tensor names are those of Transformers' MoonshineStreamingEncoder: embedder.{comp.log_k, linear,
/// conv1, conv2}, layers.N.{input_layernorm.gamma, self_attn.q_proj, ..., post_attention_layernorm,
/// mlp.fc1, mlp.fc2}, final_norm.gamma; norms are stored less 1.
/// \throws Error(kFormat) for a missing tensor, Error(kShape) for one of another shape,
/// Error(kConfig) for extents that make no sense.
inline StreamChain make_moonshine_encoder(const MoonshineEncoderConfig& config,
                                          const NamedTensors& tensors) {
  const std::int64_t width = config.width;
  const std::int64_t wide = config.feed_forward_width;
  detail::require_positive(config.frame_size, "MoonshineEncoderConfig", "frame_size");
  detail::require_positive(width, "MoonshineEncoderConfig", "width");
  detail::require_positive(wide, "MoonshineEncoderConfig", "feed_forward_width");
  const auto linear = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
    const std::vector<float>& weight = tensors.get(name + ".weight", {rows, cols});
    const std::vector<float> bias = tensors.optional(name + ".bias", {rows});
    return PackedLinear(WeightMatrix::of(weight.data(), rows, cols),
                        bias.empty() ? nullptr : bias.data(), name);
  };
  const auto norm = [&](const std::string& name) -> AnyStreamLayer {
    return FrameNorm({.eps = config.norm_eps, .add_one_to_weight = true},
                     tensors.get(name + ".gamma", {width}));
  };
  const auto conv = [&](const std::string& name, std::int64_t in,
                        std::int64_t out) -> AnyStreamLayer {
    const std::vector<float> bias = tensors.optional(name + ".bias", {out});
    return StreamConv1d(
        {.in_channels = in, .out_channels = out, .time = StreamKernelConfig::causal(5, 2)},
        WeightMatrix::of(tensors.get(name + ".weight", {out, in, 5}).data(), out, in * 5),
        bias.empty() ? nullptr : bias.data());
  };

  const NamedTensors::Tensor& gain = tensors.get("embedder.comp.log_k");
  if (gain.values.size() != 1)
    throw Error(ErrorCode::kShape,
                {"tensor does not fit the model", tensors.where(), "embedder.comp.log_k",
                 "one value", std::to_string(gain.values.size())});
  std::vector<AnyStreamLayer> layers;
  layers.emplace_back(SampleFrames(config.frame_size));
  layers.emplace_back(
      FrameCompression(config.frame_size, std::exp(static_cast<double>(gain.values[0]))));
  layers.emplace_back(FrameLinear(linear("embedder.linear", width, config.frame_size)));
  layers.emplace_back(FrameActivation(FrameFunction::kSilu, width));
  layers.push_back(conv("embedder.conv1", width, 2 * width));
  layers.emplace_back(FrameActivation(FrameFunction::kSilu, 2 * width));
  layers.push_back(conv("embedder.conv2", 2 * width, width));
  for (std::size_t l = 0; l < config.layers.size(); ++l) {
    const std::string at = "layers." + std::to_string(l) + ".";
    const MoonshineWindow& window = config.layers[l];
    std::vector<AnyStreamLayer> attention;
    attention.push_back(norm(at + "input_layernorm"));
    attention.emplace_back(StreamAttention(
        {.width = width,
         .num_heads = config.num_heads,
         .visibility = FrameVisibility::moonshine(window.back, window.ahead, config.inclusive)},
        {.query = linear(at + "self_attn.q_proj", width, width),
         .key = linear(at + "self_attn.k_proj", width, width),
         .value = linear(at + "self_attn.v_proj", width, width),
         .output = linear(at + "self_attn.o_proj", width, width)}));
    layers.emplace_back(StreamResidual(StreamChain(std::move(attention))));
    std::vector<AnyStreamLayer> feed_forward;
    feed_forward.push_back(norm(at + "post_attention_layernorm"));
    feed_forward.emplace_back(FrameLinear(linear(at + "mlp.fc1", wide, width)));
    feed_forward.emplace_back(FrameActivation(FrameFunction::kGelu, wide));
    feed_forward.emplace_back(FrameLinear(linear(at + "mlp.fc2", width, wide)));
    layers.emplace_back(StreamResidual(StreamChain(std::move(feed_forward))));
  }
  layers.push_back(norm("final_norm"));
  // Blocks of half a second of samples.
  return StreamChain(std::move(layers), 100 * config.frame_size);
}

/// What an encoder would say if the input ended now: the rows that are not final yet. `ahead` is a
/// second state that is overwritten with a copy of `state`; room as for flush(). Returns how many
/// rows. Allocates nothing where `ahead` came from the same layer's make_state().
template <StreamLayer Layer>
std::int64_t provisional_rows(const Layer& layer, const typename Layer::State& state,
                              typename Layer::State& ahead, MatrixView<float> out) {
  ahead = state;
  return layer.flush(ahead, out);
}

}  // namespace sluice
