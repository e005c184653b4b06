// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "sluice/nn/patch_embedding.hpp"
#include "sluice/nn/silero_vad.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::MatrixView;

TEST(PatchEmbeddingAllocations, AreNone) {
  const sluice::PatchConfig config{.width = 56, .height = 28};
  const std::vector<float> weight(16 * 1176, 0.01F);
  const sluice::PatchEmbedding embedding(config, sluice::WeightMatrix::of(weight.data(), 16, 1176));
  sluice::PatchEmbedding::State state = embedding.make_state();
  sluice::PatchEmbedding::State copy = state;
  const std::vector<std::uint8_t> frame(56 * 28 * 3, 100);
  std::vector<float> rows(8 * 16);
  const MatrixView<float> out(rows.data(), 8, 16);
  const std::int64_t before = sluice::test::allocation_count();
  std::int64_t written = 0;
  for (int i = 0; i < 9; ++i) {
    written += embedding.step(frame, state, out);
    copy = state;
  }
  written += embedding.flush(state, out);
  embedding.reset(state);
  EXPECT_EQ(sluice::test::allocation_count(), before);
  EXPECT_EQ(written, 5 * 8);
}

TEST(SileroVadAllocations, AreNone) {
  sluice::SileroVadWeights weights;
  weights.stft.resize(258 * 256);
  const std::int64_t channels[] = {129, 128, 64, 64, 128};
  for (std::size_t i = 0; i < 4; ++i) {
    weights.conv[i].weight.resize(static_cast<std::size_t>(3 * channels[i] * channels[i + 1]));
    weights.conv[i].bias.resize(static_cast<std::size_t>(channels[i + 1]));
  }
  weights.input_weight.resize(512 * 128);
  weights.hidden_weight.resize(512 * 128);
  weights.input_bias.resize(512);
  weights.hidden_bias.resize(512);
  weights.output.resize(128);
  weights.output_bias.resize(1);
  const sluice::SileroVad vad(weights);
  sluice::SileroVad::State state = vad.make_state();
  sluice::SileroVad::State copy = state;
  const std::vector<float> samples(1000, 0.1F);
  std::vector<float> probabilities(3);
  const std::int64_t before = sluice::test::allocation_count();
  std::int64_t written = 0;
  for (int i = 0; i < 10; ++i) {
    written += vad.step(samples, state, probabilities);
    copy = state;
  }
  written += vad.flush(state, {probabilities.data(), 1, 1});
  vad.reset(state);
  EXPECT_EQ(sluice::test::allocation_count(), before);
  EXPECT_EQ(written, 20);
}

}  // namespace SLUICE_TEST_UNIT
