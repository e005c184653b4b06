// SPDX-License-Identifier: MIT
/// The convolution module of a Conformer (arXiv 2005.08100) over a stream: linear to twice the
/// width, gated linear unit, depthwise convolution, normalisation, swish, linear.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "sluice/core/view.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/stream_window.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// What the depthwise convolution finds before the first frame. It is part of how a model was
/// trained, so the loader decides.
enum class ConformerStart {
  kZeros,           ///< zeros behind the gate: NeMo
  kProjectedZeros,  ///< zeros before the first linear layer, so GLU(its bias): WeNet
};

/// GLU(bias), [width] from a bias of [2 width]: the frame that stands before the first in a model
/// that caches frames in front of the first linear layer (WeNet).
inline std::vector<float> projected_zeros(const std::vector<float>& bias) {
  std::vector<float> frame(bias.size() / 2);
  const auto width = static_cast<std::int64_t>(frame.size());
  FrameGlu(width).apply({bias.data(), 1, 2 * width}, {frame.data(), 1, width});
  return frame;
}

/// The parts of a convolution module. A batch normalisation is a FrameAffine; models that stream
/// have a FrameNorm in its place.
struct ConformerConvolution {
  WeightMatrix expand = {};                ///< [2 width, width], PyTorch's pointwise_conv1
  std::vector<float> expand_bias = {};     ///< [2 width] or empty
  WeightMatrix depthwise = {};             ///< [width, kernel]
  std::vector<float> depthwise_bias = {};  ///< [width] or empty
  StreamKernelConfig time = {};            ///< of the depthwise convolution
  ConformerStart start = ConformerStart::kZeros;
  WeightMatrix project = {};             ///< [width, width], pointwise_conv2
  std::vector<float> project_bias = {};  ///< [width] or empty
};

/// Puts the module together with `norm` behind the depthwise convolution. Its state is the
/// convolution's frames behind the gate, whichever side the model's own code caches: with `start`
/// set right both give the same outputs, and those behind the gate need no second projection.
/// \throws Error(kShape, kConfig) if the parts do not fit. Allocates.
inline StreamChain conformer_convolution(const ConformerConvolution& parts, AnyStreamLayer norm) {
  const std::int64_t width = parts.expand.cols;
  detail::require_shape(parts.expand, 2 * width, width, "conformer_convolution");
  detail::require_size(parts.expand_bias.size(), 2 * width, "conformer_convolution", "expand_bias");
  detail::require_size(parts.depthwise_bias.size(), width, "conformer_convolution",
                       "depthwise_bias");
  detail::require_size(parts.project_bias.size(), width, "conformer_convolution", "project_bias");
  const auto data = [](const std::vector<float>& values) {
    return values.empty() ? nullptr : values.data();
  };
  StreamConv1dConfig conv{
      .in_channels = width, .out_channels = width, .groups = width, .time = parts.time};
  if (parts.start == ConformerStart::kProjectedZeros && !parts.expand_bias.empty())
    conv.initial = projected_zeros(parts.expand_bias);
  std::vector<AnyStreamLayer> layers;
  layers.emplace_back(FrameLinear(parts.expand, data(parts.expand_bias)));
  layers.emplace_back(FrameGlu(width));
  layers.emplace_back(StreamConv1d(std::move(conv), parts.depthwise, data(parts.depthwise_bias)));
  layers.emplace_back(std::move(norm));
  layers.emplace_back(FrameActivation(FrameFunction::kSilu, width));
  layers.emplace_back(FrameLinear(parts.project, data(parts.project_bias)));
  return StreamChain(std::move(layers));
}

}  // namespace sluice
