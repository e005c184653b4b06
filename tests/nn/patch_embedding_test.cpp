// SPDX-License-Identifier: MIT
#include "sluice/nn/patch_embedding.hpp"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using Frame = std::vector<std::uint8_t>;

std::vector<Frame> random_frames(const PatchConfig& config, std::int64_t count) {
  Random random(11);
  std::vector<Frame> frames;
  for (std::int64_t i = 0; i < count; ++i) {
    Frame frame;
    for (std::int64_t k = 0; k < config.width * config.height * config.channels; ++k)
      frame.push_back(static_cast<std::uint8_t>(random.below(256)));
    frames.push_back(frame);
  }
  return frames;
}

// The image processor's definition, in double: the video [frames, channels, height, width] is seen
// as [grids, time, channel, row block, row of block, y, column block, column of block, x] and laid
// out as [grids, row block, column block, row of block, column of block, channel, time, y, x].
std::vector<std::vector<double>> reference_rows(const PatchConfig& c, std::vector<Frame> frames) {
  while (static_cast<std::int64_t>(frames.size()) % c.temporal_patch != 0)
    frames.push_back(frames.back());
  const auto grids = static_cast<std::int64_t>(frames.size()) / c.temporal_patch;
  std::vector<std::vector<double>> rows;
  for (std::int64_t g = 0; g < grids; ++g)
    for (std::int64_t row_block = 0; row_block < c.height / c.patch / c.merge; ++row_block)
      for (std::int64_t col_block = 0; col_block < c.width / c.patch / c.merge; ++col_block)
        for (std::int64_t row_in = 0; row_in < c.merge; ++row_in)
          for (std::int64_t col_in = 0; col_in < c.merge; ++col_in) {
            std::vector<double> row;
            for (std::int64_t channel = 0; channel < c.channels; ++channel)
              for (std::int64_t t = 0; t < c.temporal_patch; ++t)
                for (std::int64_t y = 0; y < c.patch; ++y)
                  for (std::int64_t x = 0; x < c.patch; ++x) {
                    const std::int64_t line = (row_block * c.merge + row_in) * c.patch + y;
                    const std::int64_t column = (col_block * c.merge + col_in) * c.patch + x;
                    const Frame& frame = frames[static_cast<std::size_t>(g * c.temporal_patch + t)];
                    const auto at =
                        static_cast<std::size_t>((line * c.width + column) * c.channels + channel);
                    const auto k = static_cast<std::size_t>(channel);
                    row.push_back((frame[at] / 255.0 - c.mean[k]) / c.deviation[k]);
                  }
            rows.push_back(row);
          }
  return rows;
}

std::vector<PatchConfig> configurations() {
  PatchConfig qwen{.width = 84, .height = 56};
  PatchConfig plain{
      .width = 12, .height = 8, .channels = 1, .patch = 4, .temporal_patch = 1, .merge = 1};
  PatchConfig odd{.width = 18, .height = 27, .patch = 3, .temporal_patch = 3, .merge = 3};
  return {qwen, plain, odd};
}

TEST(PatchRows, MatchTheDefinitionInFloat64) {
  for (const PatchConfig& config : configurations()) {
    const PatchRows patches(config);
    const std::vector<Frame> frames = random_frames(config, 5);
    const std::vector<std::vector<double>> expected = reference_rows(config, frames);
    PatchRows::State state = patches.make_state();
    std::size_t next = 0;
    std::vector<float> row(static_cast<std::size_t>(patches.row_width()));
    const auto check = [&] {
      for (std::int64_t i = 0; i < patches.rows_per_grid(); ++i) {
        patches.read(state, i, {row.data(), 1, patches.row_width()});
        for (std::size_t k = 0; k < row.size(); ++k)
          ASSERT_NEAR(row[k], expected[next][k], 2e-7 * 4);  // one rounding of values up to 4
        ++next;
      }
    };
    for (std::size_t i = 0; i < frames.size(); ++i) {
      const bool complete = patches.accept(frames[i], state);
      EXPECT_EQ(complete, static_cast<std::int64_t>(i + 1) % config.temporal_patch == 0);
      if (complete) check();
    }
    if (patches.flush(state)) check();
    EXPECT_FALSE(patches.flush(state));
    EXPECT_EQ(next, expected.size());
  }
}

TEST(PatchEmbedding, MatchesTheDefinitionInFloat64) {
  for (const PatchConfig& config : configurations()) {
    const std::int64_t width = PatchRows(config).row_width();
    constexpr std::int64_t kEmbedding = 19;
    Random random(5);
    std::vector<float> weight;
    std::vector<float> bias;
    for (std::int64_t i = 0; i < kEmbedding * width; ++i)
      weight.push_back(static_cast<float>(random.normal() / std::sqrt(static_cast<double>(width))));
    for (std::int64_t i = 0; i < kEmbedding; ++i)
      bias.push_back(static_cast<float>(random.normal()));
    const PatchEmbedding embedding(config, WeightMatrix::of(weight.data(), kEmbedding, width),
                                   bias.data());
    const std::vector<Frame> frames = random_frames(config, 5);
    const std::vector<std::vector<double>> rows = reference_rows(config, frames);
    PatchEmbedding::State state = embedding.make_state();
    std::vector<float> out(static_cast<std::size_t>(embedding.max_outputs() * kEmbedding));
    std::size_t next = 0;
    const auto check = [&](std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i, ++next)
        for (std::int64_t e = 0; e < kEmbedding; ++e) {
          auto sum = static_cast<double>(bias[static_cast<std::size_t>(e)]);
          for (std::int64_t k = 0; k < width; ++k)
            sum += rows[next][static_cast<std::size_t>(k)] *
                   static_cast<double>(weight[static_cast<std::size_t>(e * width + k)]);
          // A chain of up to 1,176 float32 roundings of sums around 1.
          ASSERT_NEAR(out[static_cast<std::size_t>(i * kEmbedding + e)], sum, 2e-5);
        }
    };
    const MatrixView<float> view(out.data(), embedding.max_outputs(), kEmbedding);
    for (const Frame& frame : frames) check(embedding.step(frame, state, view));
    check(embedding.flush(state, view));
    EXPECT_EQ(next, rows.size());
  }
}

// Four rows that a merger joins are one token: their place is that of fill_positions().
TEST(PatchRows, MergedRowsStandWhereTheirTokenStands) {
  for (const PatchConfig& config : configurations()) {
    const PatchRows patches(config);
    const SequenceSpan span = patches.grid(3, time_step(0.5));
    ASSERT_EQ(count_tokens(std::span(&span, 1)), 3 * patches.tokens_per_grid());
    std::vector<Position3> positions(static_cast<std::size_t>(3 * patches.tokens_per_grid()));
    fill_positions(span, 7, positions);
    const std::int64_t merged = config.merge * config.merge;
    std::vector<int> seen(static_cast<std::size_t>(patches.rows_per_grid()));
    for (std::int64_t g = 0; g < 3; ++g) {
      for (std::int64_t row = 0; row < patches.rows_per_grid(); ++row) {
        const PatchPlace place = patches.place(row);
        const Position3& position =
            positions[static_cast<std::size_t>(g * patches.tokens_per_grid() + row / merged)];
        EXPECT_EQ(position.t, 7.0 + static_cast<double>(g));
        EXPECT_EQ(position.h, 7.0 + static_cast<double>(place.row / config.merge));
        EXPECT_EQ(position.w, 7.0 + static_cast<double>(place.col / config.merge));
        ++seen[static_cast<std::size_t>(place.row * (config.width / config.patch) + place.col)];
      }
    }
    for (const int times : seen) EXPECT_EQ(times, 3);
  }
}

TEST(PatchRows, SnapshotsContinue) {
  const PatchConfig config{.width = 28, .height = 28};
  const PatchRows patches(config);
  const std::vector<Frame> frames = random_frames(config, 2);
  PatchRows::State first = patches.make_state();
  EXPECT_FALSE(patches.accept(frames[0], first));
  ByteWriter writer;
  patches.save(first, writer);
  PatchRows::State second = patches.make_state();
  ByteReader reader(writer.bytes());
  patches.restore(reader, second);
  EXPECT_TRUE(patches.accept(frames[1], first));
  EXPECT_TRUE(patches.accept(frames[1], second));
  EXPECT_EQ(first.frames, second.frames);
  ByteWriter wrong;
  wrong.write(std::int64_t{3});
  ByteReader damaged(wrong.bytes());
  EXPECT_TRUE(test::error_of([&] { patches.restore(damaged, second); }));
}

// Worked out by hand from the rule, factor 28.
TEST(PatchAlignedSize, RoundsAndKeepsWithinTheBounds) {
  constexpr std::int64_t kMin = 56 * 56;
  constexpr std::int64_t kMax = 28 * 28 * 1280;
  using Size = PictureSize;
  EXPECT_EQ(patch_aligned_size({640, 480}, 28, kMin, kMax), (Size{644, 476}));
  EXPECT_EQ(patch_aligned_size({28, 28}, 28, kMin, kMax), (Size{56, 56}));
  EXPECT_EQ(patch_aligned_size({10, 1000}, 28, kMin, kMax), (Size{28, 1008}));
  // 1920 x 1080 is 1932 x 1092 = 2,109,744 pixels: scaled by sqrt(2073600 / 1003520) = 1.43747.
  EXPECT_EQ(patch_aligned_size({1920, 1080}, 28, kMin, kMax), (Size{1316, 728}));
  // Halves go to the even neighbour: 70 / 28 = 2.5.
  EXPECT_EQ(patch_aligned_size({70, 98}, 28, kMin, kMax), (Size{56, 112}));
  EXPECT_TRUE(test::error_of([] { patch_aligned_size({1, 1000}, 28, kMin, kMax); }));
  EXPECT_TRUE(test::error_of([] { patch_aligned_size({0, 10}, 28, kMin, kMax); }));
}

TEST(PatchRows, RefusesConfigurationsByName) {
  const auto field_of = [](auto change) {
    PatchConfig config{.width = 56, .height = 28};
    change(config);
    const auto error = test::error_of([&] { PatchRows patches(config); });
    return error ? error->detail().field : std::string("none");
  };
  EXPECT_EQ(field_of([](PatchConfig&) {}), "none");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.width = 55; }), "width");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.height = 0; }), "height");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.channels = 5; }), "channels");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.patch = 0; }), "patch");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.merge = 0; }), "merge");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.temporal_patch = 0; }), "temporal_patch");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.mean[1] = NAN; }), "mean");
  EXPECT_EQ(field_of([](PatchConfig& c) { c.deviation[2] = 0; }), "deviation");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
