// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_timing.hpp"

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/nn/stream_attention.hpp"
#include "sluice/nn/stream_window.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr StreamTiming symmetric(std::int64_t kernel, std::int64_t stride) {
  return StreamKernelConfig::same(kernel, stride).timing();
}
constexpr StreamTiming causal(std::int64_t kernel, std::int64_t stride) {
  return StreamKernelConfig::causal(kernel, stride).timing();
}
constexpr StreamTiming valid(std::int64_t kernel, std::int64_t stride) {
  return StreamKernelConfig::valid(kernel, stride).timing();
}

// frame-stream A.8: receptive field, stride and look-ahead of published front ends, folded at
// compile time.
struct Folded {
  std::int64_t receptive_field;
  std::int64_t stride;
  std::int64_t look_ahead;
  friend constexpr bool operator==(const Folded&, const Folded&) = default;
};
template <std::size_t N>
constexpr Folded folded(const std::array<StreamTiming, N>& chain) {
  const StreamLatency latency = latency_of(std::span<const StreamTiming>(chain));
  return {latency.receptive_field, latency.stride, latency.look_ahead};
}

constexpr std::array kNemoCausal{causal(3, 2), causal(3, 2), causal(3, 2)};
constexpr std::array kNemoSymmetric{symmetric(3, 2), symmetric(3, 2), symmetric(3, 2)};
constexpr std::array kWenet{valid(3, 2), valid(3, 2)};
constexpr std::array kMoonshine{causal(5, 2), causal(5, 2)};
constexpr std::array kWhisper{symmetric(3, 1), symmetric(3, 2)};
constexpr std::array kConv31{symmetric(31, 1), symmetric(31, 1), symmetric(31, 1),
                             symmetric(31, 1)};

static_assert(folded(kNemoCausal) == Folded{15, 8, 0});
static_assert(folded(kNemoSymmetric) == Folded{15, 8, 7});
static_assert(folded(kWenet) == Folded{7, 4, 6});
static_assert(folded(kMoonshine) == Folded{13, 4, 0});
static_assert(folded(kWhisper) == Folded{5, 2, 2});
static_assert(folded(kConv31) == Folded{121, 1, 60});

TEST(StreamTiming, FoldsPublishedFrontEnds) {
  EXPECT_EQ(folded(kNemoCausal), (Folded{15, 8, 0}));
  EXPECT_EQ(folded(kNemoSymmetric), (Folded{15, 8, 7}));
  EXPECT_EQ(folded(kWenet), (Folded{7, 4, 6}));
  EXPECT_EQ(folded(kMoonshine), (Folded{13, 4, 0}));
  EXPECT_EQ(folded(kWhisper), (Folded{5, 2, 2}));
  EXPECT_EQ(folded(kConv31), (Folded{121, 1, 60}));
  const StreamLatency nothing = latency_of(std::span<const StreamTiming>());
  EXPECT_EQ(nothing, StreamLatency{});
}

// A.8 in samples at 16 kHz: frames of 400 every 160 and a convolution chain are one chain.
TEST(StreamTiming, CountsSamplesThroughFraming) {
  const StreamTiming snipped{.stride = 160, .right = 399};
  const std::array wenet{snipped, kWenet[0], kWenet[1]};
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(wenet)).first_output, 1360);
  EXPECT_EQ(last_input(wenet, 15) + 1, 10960);
  EXPECT_EQ(last_input(kWenet, 15) + 1, 67) << "frames for a chunk of 16 outputs";

  const StreamTiming centred{.stride = 160, .left = 200, .right = 199};
  const std::array nemo{centred, kNemoCausal[0], kNemoCausal[1], kNemoCausal[2]};
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(nemo)).first_output, 200);

  // Moonshine: frames of 80 samples, none shared; then 16 features of look-ahead in the encoder.
  const StreamTiming frames{.stride = 80, .right = 79};
  std::vector<StreamTiming> moonshine{frames, kMoonshine[0], kMoonshine[1]};
  for (std::int64_t j = 0; j < 5; ++j) EXPECT_EQ(last_input(moonshine, j) + 1, 80 * (4 * j + 1));
  const std::vector<std::int64_t> samples{80, 160, 320, 640, 1280, 16000, 16080};
  const std::vector<std::int64_t> features{1, 1, 1, 2, 4, 50, 51};
  for (std::size_t i = 0; i < samples.size(); ++i)
    EXPECT_EQ(outputs_after(moonshine, samples[i]), features[i]) << samples[i] << " samples";
  for (const std::int64_t ahead : {4, 4, 0, 0, 4, 4})
    moonshine.push_back(FrameVisibility::moonshine(16, ahead).timing());
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(moonshine)).first_output, 5200);
}

// B.4b: 20 features through six layers, in both readings of the window.
TEST(StreamTiming, MoonshineWindowsCountTwoWays) {
  for (const bool inclusive : {true, false}) {
    std::vector<StreamTiming> layers;
    for (const std::int64_t ahead : {4, 4, 0, 0, 4, 4})
      layers.push_back(FrameVisibility::moonshine(16, ahead, inclusive).timing());
    EXPECT_EQ(outputs_after(layers, 20), inclusive ? 4 : 8);
    EXPECT_EQ(latency_of(std::span<const StreamTiming>(layers)).look_ahead, inclusive ? 16 : 12);
    const FrameVisibility ahead = FrameVisibility::moonshine(16, 4, inclusive);
    EXPECT_EQ(ahead.end(100, 1000) - ahead.begin(100), inclusive ? 21 : 19);
    const FrameVisibility behind = FrameVisibility::moonshine(16, 0, inclusive);
    EXPECT_EQ(behind.end(100, 1000) - behind.begin(100), inclusive ? 17 : 16);
  }
}

// B.3: look-aheads of windows add up. Frames of 40 ms.
TEST(StreamTiming, LookAheadsAddUpOverLayers) {
  std::vector<StreamTiming> layers(18, FrameVisibility::window(10, 2).timing());
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(layers)).look_ahead * 40, 1440);
  for (std::size_t i = 3; i < layers.size(); ++i)
    layers[i] = FrameVisibility::window(10, 0).timing();
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(layers)).look_ahead * 40, 240);
}

// A.8: chunked masks look ahead to the end of the chunk once, whatever the depth.
TEST(StreamTiming, ChunksWaitOnce) {
  const StreamTiming chunked = FrameVisibility::chunks(4, 2).timing();
  for (const std::size_t depth : {1, 2, 17}) {
    const std::vector<StreamTiming> layers(depth, chunked);
    const StreamLatency latency = latency_of(std::span<const StreamTiming>(layers));
    EXPECT_EQ(latency.look_ahead, 0);
    EXPECT_EQ(latency.max_chunk_wait, 3);
    EXPECT_DOUBLE_EQ(latency.mean_chunk_wait, 1.5);
    EXPECT_EQ(latency.first_output, 4);
    EXPECT_EQ(latency.receptive_field, static_cast<std::int64_t>(depth) * 8 + 4);
  }
  // Behind a subsampling by 4 a chunk is 16 frames: WeNet needs 19 for the first, then 16 each.
  std::vector<StreamTiming> wenet{kWenet[0], kWenet[1], chunked, chunked};
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(wenet)).first_output, 19);
  for (std::int64_t chunk = 0; chunk < 5; ++chunk) {
    EXPECT_EQ(last_input(wenet, 4 * chunk) + 1, 19 + 16 * chunk);
    EXPECT_EQ(outputs_after(wenet, 19 + 16 * chunk), 4 * (chunk + 1));
    EXPECT_EQ(outputs_after(wenet, 18 + 16 * chunk), 4 * chunk);
  }
}

// B.1: lengths behind NeMo's three causal stages, and what output n reads.
TEST(StreamTiming, SubsampledLengthsOfNemo) {
  const std::vector<StreamTiming> stages(3, StreamKernelConfig::nemo_causal(3, 2).timing());
  const std::vector<std::pair<std::int64_t, std::int64_t>> lengths{
      {1, 1},  {8, 2},  {9, 2},    {16, 3},   {17, 3},  {25, 4},
      {57, 8}, {65, 9}, {105, 14}, {112, 15}, {121, 16}};
  for (const auto& [frames, outputs] : lengths) EXPECT_EQ(outputs_at_end(stages, frames), outputs);
  EXPECT_EQ(outputs_at_end(stages, 0), 0);
  for (std::int64_t n = 0; n < 6; ++n) {
    EXPECT_EQ(first_input(stages, n), 8 * n - 14);
    EXPECT_EQ(last_input(stages, n), 8 * n);
  }
  // First and later chunks for the contexts that NeMo trains: 8 mel frames an output.
  for (const std::int64_t right : {13, 6, 1, 0}) {
    std::vector<StreamTiming> model = stages;
    model.push_back(FrameVisibility::chunked_limited(70, right).timing());
    EXPECT_EQ(last_input(model, 0) + 1, 8 * right + 1);
    EXPECT_EQ(last_input(model, right + 1) - last_input(model, 0), 8 * (right + 1));
  }
  // Regular [70, 1] in 17 layers: 17 frames of 80 ms.
  const std::vector<StreamTiming> regular(17, FrameVisibility::window(70, 1).timing());
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(regular)).look_ahead * 80, 1360);
}

// A.1: how many outputs follow from N inputs in either alignment.
TEST(StreamTiming, AlignmentsCountOutputs) {
  for (std::int64_t stride = 1; stride <= 5; ++stride) {
    const StreamTiming first{.stride = stride, .left = 4};
    StreamTiming last = first;
    last.alignment = StreamAlignment::kLast;
    for (std::int64_t inputs = 0; inputs <= 40; ++inputs) {
      EXPECT_EQ(first.outputs_after(inputs), inputs == 0 ? 0 : (inputs - 1) / stride + 1);
      EXPECT_EQ(last.outputs_after(inputs), inputs / stride);
    }
    EXPECT_EQ(latency_of(std::span<const StreamTiming>(&last, 1)).look_ahead, stride - 1);
  }
}

// Counting outputs one by one is the definition; the closed forms and the bounds must agree.
TEST(StreamTiming, ClosedFormsAgreeWithCounting) {
  for (const std::int64_t stride : {1, 2, 3})
    for (const std::int64_t upsample : {1, 2})
      for (const std::int64_t chunk : {1, 3, 4})
        for (const std::int64_t right : {0, 1, 5})
          for (const auto alignment : {StreamAlignment::kFirst, StreamAlignment::kLast}) {
            const StreamTiming timing{.stride = stride,
                                      .left = 2,
                                      .right = right,
                                      .alignment = alignment,
                                      .upsample = upsample,
                                      .chunk = chunk,
                                      .end_padding = right};
            for (std::int64_t inputs = 0; inputs < 30; ++inputs) {
              std::int64_t count = 0;
              while (timing.last_input(count) < inputs) ++count;
              EXPECT_EQ(timing.outputs_after(inputs), count);
              for (std::int64_t more = 0; more < 9; ++more)
                EXPECT_LE(timing.outputs_after(inputs + more) - timing.outputs_after(inputs),
                          timing.max_outputs(more));
              EXPECT_LE(timing.outputs_at_end(inputs) - timing.outputs_after(inputs),
                        timing.max_flush_outputs());
            }
          }
}

TEST(StreamTiming, UnboundedReachStaysUnbounded) {
  const std::vector<StreamTiming> chain{causal(3, 2), {.left = kUnboundedFrames}, causal(5, 1)};
  EXPECT_EQ(latency_of(std::span<const StreamTiming>(chain)).receptive_field, kUnboundedFrames);
}

// Chunks that share no divisor: the period is cut off, the answer stays a bound of what is seen.
TEST(StreamTiming, OddChunksEndInTime) {
  std::vector<StreamTiming> chain;
  for (const std::int64_t chunk : {999983, 999979, 999961, 999959})
    chain.push_back(FrameVisibility::chunks(chunk, 1).timing());
  const StreamLatency latency = latency_of(std::span<const StreamTiming>(chain));
  // Each layer's first chunk ends within the first chunk of the one before.
  EXPECT_EQ(latency.first_output, 999983);
  EXPECT_GT(latency.receptive_field, 999983);
}

// 64-bit counters: 37 hours at 16 kHz would overflow 32 bits.
TEST(StreamTiming, CountsBeyond32Bits) {
  const std::int64_t many = std::int64_t{1} << 40;
  EXPECT_EQ(outputs_after(kNemoCausal, many), many / 8);
  EXPECT_EQ(last_input(kNemoSymmetric, many), 8 * many + 7);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
