// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/nn/stream_attention.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_conformer.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/stream_pool.hpp"
#include "sluice/nn/stream_recurrent.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr std::int64_t kWidth = 8;

std::vector<float> ones(std::int64_t count) {
  return std::vector<float>(static_cast<std::size_t>(count), 0.1F);
}

struct NamedLayer {
  std::string name;
  AnyStreamLayer layer;
};

std::vector<NamedLayer> every_layer() {
  const std::vector<float> values = ones(64 * kWidth * kWidth);
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    return WeightMatrix::of(values.data(), rows, cols);
  };
  const auto conv = [&](const StreamKernelConfig& time, std::int64_t groups) {
    return StreamConv1d(
        {.in_channels = kWidth, .out_channels = kWidth, .groups = groups, .time = time},
        matrix(kWidth, kWidth / groups * time.kernel));
  };
  const auto attention = [&](const FrameVisibility& visible, FramePositions positions) {
    const PackedLinear square(matrix(kWidth, kWidth));
    return StreamAttention(
        {.width = kWidth, .num_heads = 2, .visibility = visible, .positions = positions},
        {.query = square, .key = square, .value = square, .output = square, .position = square});
  };
  const FrameNorm norm({}, ones(kWidth));
  const ConformerConvolution parts{.expand = matrix(2 * kWidth, kWidth),
                                   .depthwise = matrix(kWidth, 9),
                                   .time = StreamKernelConfig::causal(9),
                                   .project = matrix(kWidth, kWidth)};
  std::vector<NamedLayer> layers{
      {"dense convolution", conv(StreamKernelConfig::same(5), 1)},
      {"gathered convolution", conv(StreamKernelConfig::causal(3, 2, 4), 2)},
      {"depthwise convolution", conv(StreamKernelConfig::causal(31), kWidth)},
      {"two dimensions", StreamConv2d({.in_channels = 1,
                                       .out_channels = 4,
                                       .time = StreamKernelConfig::nemo_causal(3, 2),
                                       .features = kWidth,
                                       .feature_kernel = 3,
                                       .feature_stride = 2,
                                       .feature_padding_before = 2,
                                       .feature_padding_after = 1,
                                       .out_layout = FeatureLayout::kChannelsFirst},
                                      matrix(4, 9))},
      {"transposed", StreamConvTranspose1d(kWidth, kWidth, 4, 2, matrix(kWidth, 4 * kWidth))},
      {"cells", StreamPool1d(Pooling::kMax, kWidth, 4, 4)},
      {"overlapping pooling", StreamPool1d(Pooling::kAverage, kWidth, 5, 2, 1)},
      {"running mean", StreamRunningMean(kWidth)},
      {"delay", StreamDelay(kWidth, 3)},
      {"norm", norm},
      {"group norm", StreamGroupNorm(2, ones(kWidth), ones(kWidth))},
      {"affine", FrameAffine(ones(kWidth), ones(kWidth))},
      {"lstm", StreamLstm(matrix(4 * kWidth, kWidth), matrix(4 * kWidth, kWidth))},
      {"gru", StreamGru(matrix(3 * kWidth, kWidth), matrix(3 * kWidth, kWidth))},
      {"attention", attention(FrameVisibility::window(7, 2), FramePositions::kRelative)},
      {"chunked attention", attention(FrameVisibility::chunks(4, 2), FramePositions::kNone)},
      {"absolute attention",
       attention(FrameVisibility::window(7, 0), FramePositions::kAbsoluteKey)},
      {"conformer convolution", conformer_convolution(parts, norm)},
  };
  for (const FrameFunction function :
       {FrameFunction::kRelu, FrameFunction::kSilu, FrameFunction::kGelu, FrameFunction::kGeluTanh,
        FrameFunction::kSigmoid, FrameFunction::kTanh})
    layers.push_back({"activation", FrameActivation(function, kWidth)});
  layers.push_back(
      {"a network",
       StreamChain({conv(StreamKernelConfig::same(3, 2), 1),
                    StreamResidual(StreamChain(
                        {norm, attention(FrameVisibility::chunks(4, 1), FramePositions::kNone)})),
                    StreamParallel({conv(StreamKernelConfig::same(7), 1),
                                    conv(StreamKernelConfig::causal(3), kWidth)},
                                   BranchMerge::kConcat),
                    FrameGlu(kWidth)},
                   16)});
  return layers;
}

TEST(StreamLayerAllocations, TheCounterSeesAllocations) {
  const std::int64_t before = test::allocation_count();
  const std::vector<NamedLayer> layers = every_layer();
  EXPECT_GT(test::allocation_count(), before);
}

// Steps of any size, the end, a new stream, and snapshots into a state that is there already.
TEST(StreamLayerAllocations, AStreamAllocatesNothing) {
  for (const NamedLayer& named : every_layer()) {
    const AnyStreamLayer& layer = named.layer;
    AnyStreamState state = layer.make_state();
    AnyStreamState snapshot = layer.make_state();
    const std::int64_t longest = 150;
    const std::vector<float> in = ones(longest * layer.in_width());
    const std::int64_t room = layer.max_outputs(longest) + layer.max_flush_outputs();
    std::vector<float> out(static_cast<std::size_t>(room * layer.out_width()));
    Random random(1);
    std::int64_t rows = 0;

    const std::int64_t before = test::allocation_count();
    for (int stream = 0; stream < 20; ++stream) {
      for (int step = 0; step < 20; ++step) {
        const auto frames = static_cast<std::int64_t>(
            random.below(step % 5 == 0 ? static_cast<std::uint64_t>(longest) : 6));
        rows += layer.step({in.data(), frames, layer.in_width()}, state,
                           {out.data(), room, layer.out_width()});
        if (step == 7) snapshot = state;
        if (step == 13) state = snapshot;
      }
      rows += layer.flush(state, {out.data(), room, layer.out_width()});
      layer.reset(state);
    }
    EXPECT_EQ(test::allocation_count(), before) << named.name;
    EXPECT_GT(rows, 1000) << named.name;
  }
}

}  // namespace SLUICE_TEST_UNIT
