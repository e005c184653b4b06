// SPDX-License-Identifier: MIT
/// The encoder of FastConformer models over a stream (arXiv 2305.05084; cache-aware: 2312.17279):
/// mel frames, convolutions that reduce the rate, blocks of attention with relative positions and
/// convolution. The context of the attention is chosen per stream; weights are shared.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/model/named_tensors.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_attention.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_conformer.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// Extents of an encoder.
struct ConformerConfig {
  std::int64_t num_mels = 80;
  std::int64_t width = 512;
  std::int64_t num_layers = 17;
  std::int64_t num_heads = 8;
  std::int64_t feed_forward_width = 2048;
  std::int64_t conv_kernel = 9;
  std::int64_t subsampling_channels = 256;
  /// Convolutions that halve the rate: 3 make one output of 8 mel frames.
  int subsampling_stages = 3;
  /// Convolutions that see no later frame, in time; models that stream were trained so. Otherwise
  /// they are symmetric and their look-aheads add up.
  bool causal = true;
  bool scale_input = true;  ///< features times sqrt(width) before the first block
  double norm_eps = 1e-5;
};

/// Weights of an encoder, ready for any number of streams. Const: any thread may make chains.
///
/// Tensor names are those of Transformers' ParakeetEncoder: subsampling.layers.0.weight ...,
/// subsampling.linear, layers.N.{norm_feed_forward1, feed_forward1.linear1, ..., self_attn.q_proj,
/// self_attn.relative_k_proj, self_attn.bias_u, conv.pointwise_conv1, conv.norm, norm_out};
/// read_conformer_tensors (load_encoder.hpp) gives them from NeMo's files too. A block whose
/// conv.norm has running statistics is normalised by them, otherwise by a layer norm, as models are
/// that stream.
class ConformerEncoder {
 public:
  /// \throws Error(kFormat) for a missing tensor, Error(kShape) for one of another shape,
  /// Error(kConfig) for extents that make no sense.
  ConformerEncoder(const ConformerConfig& config, const NamedTensors& tensors) : config_(config) {
    constexpr const char* kWhere = "ConformerConfig";
    for (const auto& [name, value] :
         {std::pair{"num_mels", config.num_mels}, std::pair{"width", config.width},
          std::pair{"num_layers", config.num_layers}, std::pair{"num_heads", config.num_heads},
          std::pair{"feed_forward_width", config.feed_forward_width},
          std::pair{"conv_kernel", config.conv_kernel},
          std::pair{"subsampling_channels", config.subsampling_channels},
          std::pair{"subsampling_stages", std::int64_t{config.subsampling_stages}}})
      detail::require_positive(value, kWhere, name);
    if (config.width % config.num_heads != 0)
      throw Error(ErrorCode::kConfig, {"width does not divide into heads", kWhere, "num_heads",
                                       "a divisor of " + std::to_string(config.width),
                                       std::to_string(config.num_heads)});
    make_front(tensors);
    for (std::int64_t l = 0; l < config.num_layers; ++l)
      blocks_.push_back(make_block(tensors, "layers." + std::to_string(l) + "."));
  }

  const ConformerConfig& config() const { return config_; }

  /// The encoder as one layer over mel frames, [time, num_mels] to [time / 2^stages, width], whose
  /// attention sees `visible` frames of the reduced rate: FrameVisibility::chunked_limited(70, 13)
  /// is [70, 13] in NeMo's lists. Shares the weights. \throws what StreamAttention throws.
  StreamChain chain(const FrameVisibility& visible) const {
    std::vector<AnyStreamLayer> layers = front_;
    for (const Block& block : blocks_) {
      layers.push_back(block.first);
      std::vector<AnyStreamLayer> attention;
      attention.push_back(block.attention_norm);
      attention.emplace_back(StreamAttention({.width = config_.width,
                                              .num_heads = config_.num_heads,
                                              .visibility = visible,
                                              .positions = FramePositions::kRelative},
                                             block.attention));
      layers.emplace_back(StreamResidual(StreamChain(std::move(attention))));
      layers.push_back(block.convolution);
      layers.push_back(block.second);
      layers.push_back(block.norm);
    }
    return StreamChain(std::move(layers));
  }

  /// Mel frames to features of the reduced rate, without the blocks.
  StreamChain front() const { return StreamChain(front_); }

 private:
  struct Block {
    AnyStreamLayer first;
    AnyStreamLayer attention_norm;
    FrameAttentionWeights attention;
    AnyStreamLayer convolution;
    AnyStreamLayer second;
    AnyStreamLayer norm;
  };

  static const float* data(const std::vector<float>& values) {
    return values.empty() ? nullptr : values.data();
  }
  StreamKernelConfig halving() const {
    return config_.causal ? StreamKernelConfig::nemo_causal(3, 2) : StreamKernelConfig::same(3, 2);
  }

  void make_front(const NamedTensors& tensors) {
    const std::int64_t channels = config_.subsampling_channels;
    const std::string stem = "subsampling.layers.";
    std::int64_t features = config_.num_mels;
    const auto conv = [&](int index, std::int64_t in, std::int64_t groups, std::int64_t kernel,
                          FeatureLayout out) {
      const std::string name = stem + std::to_string(index);
      const std::vector<float>& weight =
          tensors.get(name + ".weight", {channels, in / groups, kernel, kernel});
      const std::vector<float> bias = tensors.optional(name + ".bias", {channels});
      StreamConv2dConfig c;
      c.in_channels = in;
      c.out_channels = channels;
      c.groups = groups;
      c.features = features;
      c.feature_kernel = kernel;
      c.out_layout = out;
      if (kernel > 1) {
        c.time = halving();
        c.feature_stride = 2;
        c.feature_padding_before = config_.causal ? 2 : 1;
        c.feature_padding_after = 1;
      }
      features = c.out_features();
      front_.emplace_back(StreamConv2d(
          c, WeightMatrix::of(weight.data(), channels, in / groups * kernel * kernel), data(bias)));
    };
    const auto relu = [&] {
      front_.emplace_back(FrameActivation(FrameFunction::kRelu, features * channels));
    };
    using enum FeatureLayout;
    const int stages = config_.subsampling_stages;
    conv(0, 1, 1, 3, stages == 1 ? kChannelsFirst : kChannelsLast);
    relu();
    for (int stage = 1; stage < stages; ++stage) {
      conv(3 * stage - 1, channels, channels, 3, kChannelsLast);
      conv(3 * stage, channels, 1, 1, stage == stages - 1 ? kChannelsFirst : kChannelsLast);
      relu();
    }
    const std::int64_t in = features * channels;
    std::vector<float> weight = tensors.get("subsampling.linear.weight", {config_.width, in});
    std::vector<float> bias = tensors.optional("subsampling.linear.bias", {config_.width});
    if (config_.scale_input) {
      const auto scale = static_cast<float>(std::sqrt(static_cast<double>(config_.width)));
      for (float& x : weight) x *= scale;
      for (float& x : bias) x *= scale;
    }
    front_.emplace_back(
        FrameLinear(WeightMatrix::of(weight.data(), config_.width, in), data(bias)));
  }

  AnyStreamLayer layer_norm(const NamedTensors& tensors, const std::string& name) const {
    return FrameNorm({.eps = config_.norm_eps}, tensors.get(name + ".weight", {config_.width}),
                     tensors.optional(name + ".bias", {config_.width}));
  }
  PackedLinear linear(const NamedTensors& tensors, const std::string& name, std::int64_t rows,
                      std::int64_t cols) const {
    const std::vector<float>& weight = tensors.get(name + ".weight", {rows, cols});
    const std::vector<float> bias = tensors.optional(name + ".bias", {rows});
    return PackedLinear(WeightMatrix::of(weight.data(), rows, cols),
                        bias.empty() ? nullptr : bias.data(), name);
  }
  AnyStreamLayer feed_forward(const NamedTensors& tensors, const std::string& norm,
                              const std::string& name) const {
    const std::int64_t wide = config_.feed_forward_width;
    std::vector<AnyStreamLayer> layers;
    layers.push_back(layer_norm(tensors, norm));
    layers.emplace_back(FrameLinear(linear(tensors, name + ".linear1", wide, config_.width)));
    layers.emplace_back(FrameActivation(FrameFunction::kSilu, wide));
    layers.emplace_back(FrameLinear(linear(tensors, name + ".linear2", config_.width, wide)));
    return StreamResidual(StreamChain(std::move(layers)), 0.5F);
  }

  AnyStreamLayer convolution(const NamedTensors& tensors, const std::string& at) const {
    const std::int64_t width = config_.width;
    const std::int64_t kernel = config_.conv_kernel;
    const std::string name = at + "conv.";
    ConformerConvolution parts;
    parts.expand =
        WeightMatrix::of(tensors.get(name + "pointwise_conv1.weight", {2 * width, width, 1}).data(),
                         2 * width, width);
    parts.expand_bias = tensors.optional(name + "pointwise_conv1.bias", {2 * width});
    parts.depthwise = WeightMatrix::of(
        tensors.get(name + "depthwise_conv.weight", {width, 1, kernel}).data(), width, kernel);
    parts.depthwise_bias = tensors.optional(name + "depthwise_conv.bias", {width});
    parts.time =
        config_.causal ? StreamKernelConfig::causal(kernel) : StreamKernelConfig::same(kernel);
    parts.project = WeightMatrix::of(
        tensors.get(name + "pointwise_conv2.weight", {width, width, 1}).data(), width, width);
    parts.project_bias = tensors.optional(name + "pointwise_conv2.bias", {width});
    const auto norm = [&]() -> AnyStreamLayer {
      if (!tensors.has(name + "norm.running_mean")) return layer_norm(tensors, name + "norm");
      return FrameAffine::batch_norm(tensors.get(name + "norm.running_mean", {width}),
                                     tensors.get(name + "norm.running_var", {width}),
                                     tensors.get(name + "norm.weight", {width}),
                                     tensors.get(name + "norm.bias", {width}), config_.norm_eps);
    };
    std::vector<AnyStreamLayer> layers;
    layers.push_back(layer_norm(tensors, at + "norm_conv"));
    layers.emplace_back(conformer_convolution(parts, norm()));
    return StreamResidual(StreamChain(std::move(layers)));
  }

  Block make_block(const NamedTensors& tensors, const std::string& at) const {
    const std::int64_t width = config_.width;
    const std::string name = at + "self_attn.";
    const std::vector<std::int64_t> heads{config_.num_heads, width / config_.num_heads};
    FrameAttentionWeights attention{
        .query = linear(tensors, name + "q_proj", width, width),
        .key = linear(tensors, name + "k_proj", width, width),
        .value = linear(tensors, name + "v_proj", width, width),
        .output = linear(tensors, name + "o_proj", width, width),
        .position = linear(tensors, name + "relative_k_proj", width, width),
        .content_bias = tensors.get(name + "bias_u", heads),
        .position_bias = tensors.get(name + "bias_v", heads)};
    return {.first = feed_forward(tensors, at + "norm_feed_forward1", at + "feed_forward1"),
            .attention_norm = layer_norm(tensors, at + "norm_self_att"),
            .attention = std::move(attention),
            .convolution = convolution(tensors, at),
            .second = feed_forward(tensors, at + "norm_feed_forward2", at + "feed_forward2"),
            .norm = layer_norm(tensors, at + "norm_out")};
  }

  ConformerConfig config_;
  std::vector<AnyStreamLayer> front_;
  std::vector<Block> blocks_;
};

}  // namespace sluice
