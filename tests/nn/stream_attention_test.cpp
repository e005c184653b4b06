// SPDX-License-Identifier: MIT
#include "sluice/nn/stream_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/frame_stream.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::error_of;
using test::expect_close;
using test::expect_declared_latency;
using test::expect_exact_streaming;
using test::Frames;
using test::random_values;
using test::run_whole;

using Values = std::vector<float>;

// Float32 projections, scores of some 30 keys, softmax.
constexpr double kTolerance = 3e-6;

std::vector<std::string> rows_of(const FrameVisibility& visible, std::int64_t total) {
  std::vector<std::string> rows;
  for (std::int64_t i = 0; i < total; ++i) {
    std::string row;
    for (std::int64_t j = 0; j < total; ++j)
      row += j >= visible.begin(i) && j < visible.end(i, total) ? '1' : '0';
    rows.push_back(row);
  }
  return rows;
}

using Rows = std::vector<std::string>;

// frame-stream B.1, as NeMo's masks came out.
TEST(FrameVisibility, MasksOfNemo) {
  EXPECT_EQ(rows_of(FrameVisibility::chunked_limited(4, 1), 8),
            (Rows{"11000000", "11000000", "11110000", "11110000", "11111100", "11111100",
                  "00111111", "00111111"}));
  EXPECT_EQ(rows_of(FrameVisibility::window(2, 1), 6),
            (Rows{"110000", "111000", "111100", "011110", "001111", "000111"}));
  const auto error = error_of([] { FrameVisibility::chunked_limited(5, 1); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kConfig);
}

// B.2a: WeNet's chunk mask.
TEST(FrameVisibility, MasksOfWenet) {
  EXPECT_EQ(rows_of(FrameVisibility::chunks(3, -1), 7),
            (Rows{"1110000", "1110000", "1110000", "1111110", "1111110", "1111110", "1111111"}));
  EXPECT_EQ(rows_of(FrameVisibility::chunks(3, 1), 7),
            (Rows{"1110000", "1110000", "1110000", "1111110", "1111110", "1111110", "0001111"}));
  EXPECT_EQ(rows_of(FrameVisibility::chunks(3, 0), 7),
            (Rows{"1110000", "1110000", "1110000", "0001110", "0001110", "0001110", "0000001"}));
}

// B.2b: what the cache holds before each chunk, what is attended to, at which first position.
TEST(FrameVisibility, CacheOfWenetChunkByChunk) {
  const FrameVisibility visible = FrameVisibility::chunks(4, 2);
  const std::vector<std::int64_t> cached{0, 4, 8, 8, 8};
  const std::vector<std::int64_t> attended{4, 8, 12, 12, 12};
  const std::vector<std::int64_t> position{0, 0, 0, 4, 8};
  for (std::int64_t chunk = 0; chunk < 5; ++chunk)
    for (std::int64_t i = 4 * chunk; i < 4 * chunk + 4; ++i) {
      EXPECT_EQ(4 * chunk - visible.begin(i), cached[chunk]);
      EXPECT_EQ(visible.end(i, 1000) - visible.begin(i), attended[chunk]);
      EXPECT_EQ(visible.begin(i), position[chunk]);
    }
}

struct Parts {
  Values query, key, value, output, position;
  Values query_bias, key_bias, value_bias, output_bias;
  Values content_bias, position_bias, distance_bias;
};

Parts random_parts(Random& random, const FrameAttentionConfig& config, bool distance_bias) {
  const std::int64_t width = config.width;
  const double scale = 1.0 / std::sqrt(static_cast<double>(width));
  const auto matrix = [&] {
    return random_values(random, width * width, scale);
  };
  const auto vector = [&] {
    return random_values(random, width, 0.5);
  };
  const FrameVisibility& visible = config.visibility;
  const std::int64_t distances = visible.left + visible.right + 2 * visible.chunk - 1;
  return {.query = matrix(),
          .key = matrix(),
          .value = matrix(),
          .output = matrix(),
          .position = matrix(),
          .query_bias = vector(),
          .key_bias = vector(),
          .value_bias = vector(),
          .output_bias = vector(),
          .content_bias = vector(),
          .position_bias = vector(),
          .distance_bias =
              distance_bias ? random_values(random, config.num_heads * distances) : Values{}};
}

StreamAttention layer_of(const FrameAttentionConfig& config, const Parts& parts) {
  const auto packed = [&](const Values& weight, const Values& bias) {
    return PackedLinear(WeightMatrix::of(weight.data(), config.width, config.width),
                        bias.empty() ? nullptr : bias.data());
  };
  FrameAttentionWeights weights{.query = packed(parts.query, parts.query_bias),
                                .key = packed(parts.key, parts.key_bias),
                                .value = packed(parts.value, parts.value_bias),
                                .output = packed(parts.output, parts.output_bias)};
  if (config.positions != FramePositions::kNone) {
    weights.position = packed(parts.position, {});
    weights.content_bias = parts.content_bias;
    weights.position_bias = parts.position_bias;
  }
  weights.distance_bias = parts.distance_bias;
  return {config, weights};
}

std::vector<double> project(const Values& weight, const Values& bias,
                            const std::vector<double>& x) {
  const std::size_t width = x.size();
  std::vector<double> y(width);
  for (std::size_t r = 0; r < width; ++r) {
    y[r] = bias.empty() ? 0.0 : static_cast<double>(bias[r]);
    for (std::size_t c = 0; c < width; ++c)
      y[r] += static_cast<double>(weight[r * width + c]) * x[c];
  }
  return y;
}

// The whole sequence with an explicit test of who sees whom, in float64. `origin`: the index of
// the first frame, for positions that count from the beginning.
std::vector<double> reference(const FrameAttentionConfig& config, const Parts& parts,
                              const Frames& in) {
  const std::int64_t total = in.rows;
  const auto width = static_cast<std::size_t>(config.width);
  const auto heads = static_cast<std::size_t>(config.num_heads);
  const std::size_t head_dim = width / heads;
  const FrameVisibility& v = config.visibility;
  const bool with_biases = config.positions != FramePositions::kNone;
  const auto place = [&](std::int64_t position) {
    std::vector<double> row(width);
    for (std::size_t c = 0; c < width; ++c) {
      const double angle =
          static_cast<double>(position) /
          std::pow(10000.0, static_cast<double>(c - c % 2) / static_cast<double>(width));
      row[c] = c % 2 == 0 ? std::sin(angle) : std::cos(angle);
    }
    return project(parts.position, {}, row);
  };
  std::vector<std::vector<double>> q, k, val;
  for (std::int64_t t = 0; t < total; ++t) {
    const std::vector<double> x(in.row(t), in.row(t) + config.width);
    q.push_back(project(parts.query, parts.query_bias, x));
    k.push_back(project(parts.key, parts.key_bias, x));
    val.push_back(project(parts.value, parts.value_bias, x));
  }
  std::vector<double> out;
  for (std::int64_t i = 0; i < total; ++i) {
    std::vector<double> context(width);
    for (std::size_t h = 0; h < heads; ++h) {
      std::vector<double> scores;
      std::vector<std::int64_t> keys;
      for (std::int64_t j = 0; j < total; ++j) {
        // In whole chunks: the key is at most `left` before the query's chunk and `right` behind.
        const std::int64_t chunk_begin = i - i % v.chunk;
        if (j < chunk_begin - v.left || j > chunk_begin + v.chunk - 1 + v.right) continue;
        std::vector<double> p(width);
        if (config.positions == FramePositions::kRelative) p = place(i - j);
        if (config.positions == FramePositions::kAbsoluteKey)
          p = place(std::min(j, config.max_positions - 1));
        double score = 0.0;
        for (std::size_t c = h * head_dim; c < (h + 1) * head_dim; ++c) {
          const double u = with_biases ? static_cast<double>(parts.content_bias[c]) : 0.0;
          const double w = with_biases ? static_cast<double>(parts.position_bias[c]) : 0.0;
          score += (q[i][c] + u) * k[j][c] + (q[i][c] + w) * p[c];
        }
        score *= config.sm_scale != 0.0 ? config.sm_scale
                                        : 1.0 / std::sqrt(static_cast<double>(head_dim));
        if (!parts.distance_bias.empty()) {
          const std::int64_t distances = v.left + v.right + 2 * v.chunk - 1;
          score +=
              static_cast<double>(parts.distance_bias[static_cast<std::int64_t>(h) * distances +
                                                      (i - j) + v.right + v.chunk - 1]);
        }
        scores.push_back(score);
        keys.push_back(j);
      }
      const double largest = *std::max_element(scores.begin(), scores.end());
      double sum = 0.0;
      for (double& score : scores) sum += score = std::exp(score - largest);
      for (std::size_t n = 0; n < keys.size(); ++n)
        for (std::size_t c = h * head_dim; c < (h + 1) * head_dim; ++c)
          context[c] += scores[n] / sum * val[keys[n]][c];
    }
    const std::vector<double> row = project(parts.output, parts.output_bias, context);
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

TEST(StreamAttention, EqualsTheWholeSequenceInAnyChunks) {
  const std::vector<std::pair<const char*, FrameVisibility>> windows{
      {"causal", FrameVisibility::window(5, 0)},
      {"itself", FrameVisibility::window(0, 0)},
      {"two_sided", FrameVisibility::window(6, 3)},
      {"ahead_only", FrameVisibility::window(0, 2)},
      {"chunked_limited", FrameVisibility::chunked_limited(6, 2)},
      {"chunks", FrameVisibility::chunks(4, 2)},
      {"chunks_alone", FrameVisibility::chunks(5, 0)},
      {"chunks_and_ahead", {3, 2, 4}},
      {"moonshine", FrameVisibility::moonshine(16, 4)},
      {"long_chunks", FrameVisibility::chunks(50, 1)},
  };
  Random random(1);
  int turn = 0;
  for (const auto& [name, visible] : windows)
    for (const FramePositions positions :
         {FramePositions::kNone, FramePositions::kRelative, FramePositions::kAbsoluteKey}) {
      SCOPED_TRACE(testing::Message() << name << " positions " << static_cast<int>(positions));
      const FrameAttentionConfig config{.width = 12,
                                        .num_heads = 2,
                                        .visibility = visible,
                                        .positions = positions,
                                        .sm_scale = turn % 3 == 0 ? 0.7 : 0.0};
      const Parts parts = random_parts(random, config, turn % 2 == 0);
      const StreamAttention layer = layer_of(config, parts);
      for (const std::int64_t frames : {0, 1, 3, 37}) {
        const Frames in = Frames::random(random, frames, 12);
        expect_close(run_whole(layer, in), reference(config, parts, in), kTolerance);
        // All windows share the bookkeeping, so a thousand chunkings of each would repeat them.
        expect_exact_streaming(layer, in, random.next(), frames == 37 ? 100 : 10);
      }
      expect_declared_latency(layer, 3 * visible.chunk + 2 * visible.right + 4);
      ++turn;
    }
}

TEST(StreamAttention, AThousandChunkingsWithAWindowOfEachKind) {
  Random random(2);
  for (const FrameVisibility& visible :
       {FrameVisibility::window(4, 2), FrameVisibility::chunks(3, 2)}) {
    const FrameAttentionConfig config{
        .width = 8, .num_heads = 2, .visibility = visible, .positions = FramePositions::kRelative};
    const StreamAttention layer = layer_of(config, random_parts(random, config, false));
    expect_exact_streaming(layer, Frames::random(random, 30, 8), 3, 1000);
  }
}

// Wide heads with a rest: 20 channels are one register and a part of one, or several.
TEST(StreamAttention, HeadsOfAnyWidth) {
  Random random(3);
  for (const std::int64_t heads : {1, 3, 6}) {
    const FrameAttentionConfig config{.width = 60,
                                      .num_heads = heads,
                                      .visibility = FrameVisibility::window(9, 1),
                                      .positions = FramePositions::kRelative};
    const Parts parts = random_parts(random, config, false);
    const Frames in = Frames::random(random, 30, 60);
    expect_close(run_whole(layer_of(config, parts), in), reference(config, parts, in), kTolerance);
  }
}

// Keys and values of the frames that may be seen, queries of those that may wait.
TEST(StreamAttention, StateGrowsWithTheWindow) {
  Random random(9);
  FrameAttentionConfig config{.width = 8, .num_heads = 2};
  config.visibility = FrameVisibility::chunked_limited(6, 2);
  EXPECT_EQ(layer_of(config, random_parts(random, config, false)).state_bytes(),
            ((6 + 2) * 16 + 2 * 8) * sizeof(float) + 16);
  config.visibility = FrameVisibility::window(70, 1);
  config.positions = FramePositions::kAbsoluteKey;
  EXPECT_EQ(layer_of(config, random_parts(random, config, false)).state_bytes(),
            ((70 + 1) * 24 + 8) * sizeof(float) + 16);
}

// Chunk sizes are data: layers with other windows share the weights.
TEST(StreamAttention, OneSetOfWeightsServesAnyWindow) {
  Random random(4);
  FrameAttentionConfig config{.width = 12, .num_heads = 3};
  config.visibility = FrameVisibility::chunks(4, 2);
  const Parts parts = random_parts(random, config, false);
  const StreamAttention first = layer_of(config, parts);
  const Frames in = Frames::random(random, 33, 12);
  for (const std::int64_t right : {0, 1, 3, 11}) {
    config.visibility = FrameVisibility::chunked_limited(12, right);
    const StreamAttention other(config, first.weights());
    expect_close(run_whole(other, in), reference(config, parts, in), kTolerance);
  }
}

// Relative positions and none do not care where a stream began; absolute ones do. After a window's
// worth of other frames, what a frame sees is the same frames at the same distances.
TEST(StreamAttention, RelativePositionsAreShiftInvariant) {
  Random random(5);
  for (const FramePositions positions :
       {FramePositions::kNone, FramePositions::kRelative, FramePositions::kAbsoluteKey}) {
    const FrameAttentionConfig config{.width = 8,
                                      .num_heads = 2,
                                      .visibility = FrameVisibility::window(6, 2),
                                      .positions = positions};
    const StreamAttention layer = layer_of(config, random_parts(random, config, false));
    const Frames in = Frames::random(random, 40, 8);
    Frames later(in.rows + 1000, 8, 0.25F);
    std::copy(in.values.begin(), in.values.end(), later.row(1000));
    const Frames early_rows = run_whole(layer, in);
    const Frames later_rows = run_whole(layer, later);
    bool same = true;
    for (std::int64_t t = 6; t < in.rows; ++t)
      same = same && test::same_bits({early_rows.row(t), 8}, {later_rows.row(1000 + t), 8});
    EXPECT_EQ(same, positions != FramePositions::kAbsoluteKey);
  }
}

TEST(StreamAttention, AbsolutePositionsHaveALimit) {
  Random random(6);
  const FrameAttentionConfig config{.width = 8,
                                    .num_heads = 2,
                                    .visibility = FrameVisibility::chunks(4, 1),
                                    .positions = FramePositions::kAbsoluteKey,
                                    .max_positions = 10};
  const Parts parts = random_parts(random, config, false);
  const StreamAttention layer = layer_of(config, parts);
  auto state = layer.make_state();
  Frames out(8, 8);
  const Frames in = Frames::random(random, 24, 8);
  EXPECT_EQ(layer.positions_left(state), 10);
  layer.step(in.view().middle_rows(0, 7), state, out.view());
  EXPECT_EQ(layer.positions_left(state), 3);
  layer.step(in.view().middle_rows(7, 7), state, out.view());
  EXPECT_EQ(layer.positions_left(state), 0);
  layer.reset(state);
  EXPECT_EQ(layer.positions_left(state), 10);
  // Beyond it the last row of the table stands for all that follow: defined, and finite.
  expect_close(run_whole(layer, in), reference(config, parts, in), kTolerance);
}

// Frame 2^33 of a stream scores as frame 10 does: the ring and the distances do not overflow.
TEST(StreamAttention, CountsBeyond32Bits) {
  Random random(7);
  const FrameAttentionConfig config{.width = 8,
                                    .num_heads = 2,
                                    .visibility = FrameVisibility::window(5, 1),
                                    .positions = FramePositions::kRelative};
  const StreamAttention layer = layer_of(config, random_parts(random, config, false));
  const Frames in = Frames::random(random, 40, 8);
  const Frames whole = run_whole(layer, in);
  auto state = layer.make_state();
  state.frames = std::int64_t{1} << 33;
  state.next = state.frames - 1;
  Frames out(48, 8);
  const std::int64_t rows = layer.step(in.view(), state, out.view());
  ASSERT_EQ(rows, 40);  // one frame waits; another from before came out
  for (std::int64_t t = 5; t < 39; ++t)
    EXPECT_TRUE(test::same_bits({out.row(t + 1), 8}, {whole.row(t), 8})) << t;
}

TEST(StreamAttention, RefusesWhatIsNoLayer) {
  Random random(8);
  const FrameAttentionConfig good{.width = 8,
                                  .num_heads = 2,
                                  .visibility = FrameVisibility::window(4, 1),
                                  .positions = FramePositions::kRelative};
  const Parts parts = random_parts(random, good, true);
  const FrameAttentionWeights weights = layer_of(good, parts).weights();
  const auto code_of = [](const FrameAttentionConfig& config, const FrameAttentionWeights& w) {
    const auto error = error_of([&] { const StreamAttention layer(config, w); });
    return error.value_or(Error(ErrorCode::kIo, {})).code();
  };
  EXPECT_EQ(code_of(good, weights), ErrorCode::kIo) << "this one is a layer";
  FrameAttentionConfig config = good;
  config.num_heads = 3;
  EXPECT_EQ(code_of(config, weights), ErrorCode::kConfig);
  config = good;
  config.width = 6;
  EXPECT_EQ(code_of(config, weights), ErrorCode::kShape);
  config = good;
  config.visibility.right = -1;
  EXPECT_EQ(code_of(config, weights), ErrorCode::kConfig);
  config = good;
  config.visibility = FrameVisibility::chunks(4, -1);
  EXPECT_EQ(code_of(config, weights), ErrorCode::kCapacity) << "no ring holds everything";
  config = good;
  config.visibility = FrameVisibility::window(5, 1);
  EXPECT_EQ(code_of(config, weights), ErrorCode::kShape) << "distance bias of another window";
  FrameAttentionWeights other = weights;
  other.position = PackedLinear();
  EXPECT_EQ(code_of(good, other), ErrorCode::kShape);
  other = weights;
  other.content_bias.pop_back();
  EXPECT_EQ(code_of(good, other), ErrorCode::kShape);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
