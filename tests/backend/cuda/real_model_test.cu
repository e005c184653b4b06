// SPDX-License-Identifier: MIT
/// The default model on CPU and GPU, with the same weights rounded to bf16. Skips without the file.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include "backend/cuda/device_test.hpp"
#include "backend/cuda/real_model_oracle.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::RealModel;
using sluice_test::RealStream;

constexpr std::int64_t kSinks = 4;
constexpr std::int64_t kWindow = 124;
constexpr int kText = 256;

/// "The history of the steam engine begins long before the railways. In the first century,"
constexpr std::array<std::int32_t, 17> kPrompt{504, 1463,  282, 260, 9403, 2327, 5634, 986, 1092,
                                               260, 33214, 30,  533, 260,  808,  2070, 28};

CudaDecoderWeights<bf16> upload(const RealModel& m) {
  const auto elements = [](const std::vector<std::uint16_t>& bits) {
    return std::span<const bf16>(reinterpret_cast<const bf16*>(bits.data()), bits.size());
  };
  CudaDecoderWeights<bf16> weights(
      {m.vocab_size, m.hidden_size, m.intermediate_size, m.num_qo_heads, m.num_kv_heads, m.head_dim,
       static_cast<std::int64_t>(m.layers.size()), m.norm_eps, m.sm_scale},
      false);
  weights.embedding.upload(elements(m.embedding));
  weights.output.upload(elements(m.output));
  weights.output_norm.upload(m.output_norm);
  for (std::size_t l = 0; l < m.layers.size(); ++l) {
    const sluice_test::RealLayer& from = m.layers[l];
    weights.layers[l].attention_norm.upload(from.attention_norm);
    weights.layers[l].feed_forward_norm.upload(from.feed_forward_norm);
    weights.layers[l].output.upload(elements(from.output));
    weights.layers[l].down.upload(elements(from.down));
    weights.set_query_key_value(static_cast<std::int64_t>(l), elements(from.query),
                                elements(from.key), elements(from.value));
    weights.set_gate_up(static_cast<std::int64_t>(l), elements(from.gate), elements(from.up));
  }
  return weights;
}

std::int32_t argmax(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

double relative_error(std::span<const float> found, std::span<const float> expected) {
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double difference = static_cast<double>(found[i]) - static_cast<double>(expected[i]);
    error += difference * difference;
    norm += static_cast<double>(expected[i]) * static_cast<double>(expected[i]);
  }
  return std::sqrt(error / norm);
}

/// The cache wraps twice on the way: 272 tokens through 128 slots.
TEST(RealModel, WritesTheSameTextOnBothSides) {
  SKIP_WITHOUT_DEVICE();
  const std::string path = sluice_test::real_model_path();
  if (path.empty()) GTEST_SKIP() << "no model file";
  const RealModel model = sluice_test::load_real_model(path);
  if (model.head_dim != 64) GTEST_SKIP() << "head size " << model.head_dim;
  const CudaDecoderWeights<bf16> weights = upload(model);
  const auto options = [&](std::int64_t chunk) {
    CudaDecoderOptions result;
    result.step = {.num_sink_tokens = kSinks,
                   .window_size = kWindow,
                   .capacity = kSinks + kWindow + std::max<std::int64_t>(chunk - 1, 0),
                   .frequencies = model.frequencies,
                   .interleaved = model.interleaved};
    result.max_chunk = chunk;
    return result;
  };

  // The CPU's text, and beside it the GPU's logits for the same tokens.
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / 2);
  RealStream cpu(model, kSinks, kWindow, threads, true);
  RealStream exact(model, kSinks, kWindow, threads, false);
  CudaDecoder<bf16, 64> follower(weights, options(0));
  std::vector<std::int32_t> text(kPrompt.begin(), kPrompt.end());
  double worst = 0;
  double rounding = 0;
  for (int i = 0; i < static_cast<int>(kPrompt.size()) + kText - 1; ++i) {
    const std::int32_t token = text[static_cast<std::size_t>(i)];
    const std::span<const float> expected = cpu.step(token);
    follower.feed(std::array{token});
    follower.step(nullptr);
    const double error = relative_error(follower.logits(), expected);
    ASSERT_TRUE(std::isfinite(error)) << "token " << i;  // a maximum would pass NaN over
    worst = std::max(worst, error);
    rounding = std::max(rounding, relative_error(exact.step(token), expected));
    if (i + 1 >= static_cast<int>(kPrompt.size())) text.push_back(argmax(expected));
  }
  // Float32 on both sides, in another order. Where a key or value then rounds to its other neighbour,
  // thirty layers make that the next keys' error, until the two streams' roundings have nothing in
  // common: on the CPU alone, norms off by 2^-21 move logits by 1.3e-2 to 1.6e-2 with a bf16 cache,
  // by 5e-6 with a float32 one. Each stream is off from the exact one by about `rounding`, so they
  // are apart by the sum of both at most.
  EXPECT_LE(worst, 2 * rounding);
  EXPECT_LE(rounding, 0.05);

  // The GPU's own text: the prompt fed, then nothing but replays.
  CudaDecoder<bf16, 64> writer(weights, options(0));
  std::vector<std::int32_t> written(kPrompt.begin(), kPrompt.end());
  for (const std::int32_t token : kPrompt) {
    writer.feed(std::array{token});
    writer.step(nullptr);
  }
  written.push_back(writer.tokens()[0]);
  while (written.size() < text.size()) {
    writer.step(nullptr);
    written.push_back(writer.tokens()[0]);
  }
  EXPECT_EQ(written, text);

  // The prompt read as chunks, products rounded: logits within bf16 of the CPU's.
  CudaDecoder<bf16, 64> reader(weights, options(7));
  RealStream again(model, kSinks, kWindow, threads, true);
  std::vector<float> expected;
  for (const std::int32_t token : kPrompt) {
    const std::span<const float> logits = again.step(token);
    expected.assign(logits.begin(), logits.end());
  }
  reader.prefill(0, kPrompt);
  const double chunked = relative_error(reader.logits(), expected);
  // Each of the 121 products rounds its input by up to 2^-9, in directions that do not agree: the
  // square root of their number, times 2^-9.
  EXPECT_LE(chunked, std::sqrt(121.0) * 0x1p-9);
  std::printf("relative error of logits: stepping %.2e, prompt in chunks %.2e; a bf16 cache %.2e\n",
              worst, chunked, rounding);
}

}  // namespace SLUICE_TEST_UNIT
