// SPDX-License-Identifier: MIT
// A decoder that keeps text and frames by kind, against its definition in double: a list of tokens
// from which spans are erased and moved, positions counted anew over what is left, every key
// rotated anew for every query.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/device_test.hpp"
#include "support/naive_kinds.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr int kHidden = 64;
constexpr int kWidth = 128;  // feed-forward
constexpr int kHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kDim = 64;
constexpr int kLayers = 2;
constexpr int kVocab = 96;
constexpr int kFused = (kHeads + 2 * kKvHeads) * kDim;
constexpr double kTheta = 200;
constexpr std::array<int, 3> kSections{8, 12, 12};

std::vector<double> frequencies() {
  std::vector<double> result;
  for (int i = 0; i < kDim / 2; ++i) result.push_back(std::pow(kTheta, -2.0 * i / kDim));
  return result;
}

/// Rounded values, and the same on the device.
std::vector<float> fill(Buffer<bf16, cuda>& matrix, int cols, double gain, Random& random) {
  std::vector<bf16> rounded(matrix.size());
  std::vector<float> wide;
  for (bf16& x : rounded) {
    x = bf16(static_cast<float>(gain * random.normal() / std::sqrt(static_cast<double>(cols))));
    wide.push_back(static_cast<float>(x));
  }
  matrix.upload(rounded);
  return wide;
}

struct Model {
  CudaDecoderShape shape{kVocab,  kHidden,  kWidth,
                         kHeads,  kKvHeads, kDim,
                         kLayers, 1e-5,     1 / std::sqrt(static_cast<double>(kDim))};
  CudaDecoderWeights<bf16> weights{shape, false};
  std::vector<Buffer<float, cuda>> device_biases;
  std::vector<float> embedding;
  std::vector<float> output;
  struct Layer {
    std::vector<float> fused;
    std::vector<float> bias;
    std::vector<float> out;
    std::vector<float> gate_up;
    std::vector<float> down;
  };
  std::vector<Layer> layers;

  Model() {
    Random random(11);
    const std::vector<float> ones(kHidden, 1.0F);
    embedding = fill(weights.embedding, 1, 1, random);
    output = fill(weights.output, kHidden, 1, random);
    weights.output_norm.upload(ones);
    for (CudaLayerWeights<bf16>& w : weights.layers) {
      w.attention_norm.upload(ones);
      w.feed_forward_norm.upload(ones);
      Layer layer;
      // Attention that prefers some keys and weighs as much as the residual stream.
      layer.fused = fill(w.query_key_value, kHidden, 1.4, random);
      layer.out = fill(w.output, kHeads * kDim, 2, random);
      layer.gate_up = fill(w.gate_up, kHidden, 1, random);
      layer.down = fill(w.down, kWidth, 1, random);
      for (int i = 0; i < kFused; ++i)
        layer.bias.push_back(static_cast<float>(0.5 * random.normal()));
      device_biases.emplace_back(std::span<const float>(layer.bias));
      layers.push_back(std::move(layer));
    }
  }
};

using Row = std::vector<double>;

Row product(const std::vector<float>& matrix, const Row& x) {
  Row y(matrix.size() / x.size(), 0.0);
  for (std::size_t r = 0; r < y.size(); ++r)
    for (std::size_t c = 0; c < x.size(); ++c)
      y[r] += static_cast<double>(matrix[r * x.size() + c]) * x[c];
  return y;
}
Row norm(const Row& x) {
  double square = 0;
  for (const double v : x) square += v * v;
  Row y = x;
  for (double& v : y) v /= std::sqrt(square / static_cast<double>(x.size()) + 1e-5);
  return y;
}

/// The definition.
struct Oracle {
  explicit Oracle(const Model& of, const KindRetentionConfig& config) : model(of), kinds(config) {
    keys.resize(kLayers);
    values.resize(kLayers);
  }

  Row embedding(std::int32_t token) const {
    const auto from = model.embedding.begin() + token * kHidden;
    return {from, from + kHidden};
  }
  /// Feeds a token; gives the logits after it.
  Row feed(Row hidden) {
    kinds.append(total);
    const std::vector<test::NaiveKinds::Token> kept = kinds.tokens();
    const auto self = std::find_if(kept.begin(), kept.end(),
                                   [&](const auto& token) { return token.index == total; });
    ++total;
    for (std::size_t l = 0; l < kLayers; ++l) {
      const Model::Layer& layer = model.layers[l];
      Row fused = product(layer.fused, norm(hidden));
      for (std::size_t i = 0; i < fused.size(); ++i) fused[i] += static_cast<double>(layer.bias[i]);
      keys[l].push_back(
          {fused.begin() + kHeads * kDim, fused.begin() + (kHeads + kKvHeads) * kDim});
      values[l].push_back({fused.begin() + (kHeads + kKvHeads) * kDim, fused.end()});
      Row attended(kHeads * kDim, 0.0);
      for (int h = 0; h < kHeads; ++h) {
        const int kv = h / (kHeads / kKvHeads);
        Row weights;
        double sum = 0;
        for (const auto& token : kept) {
          const double* key = keys[l][static_cast<std::size_t>(token.index)].data() + kv * kDim;
          const double* query = fused.data() + h * kDim;
          double score = 0;
          for (int i = 0; i < kDim / 2; ++i) {
            const std::size_t axis = i < kSections[0] ? 0 : i < kSections[0] + kSections[1] ? 1 : 2;
            const double angle =
                (self->position[axis] - token.position[axis]) * std::pow(kTheta, -2.0 * i / kDim);
            const double a = query[i] * key[i] + query[i + kDim / 2] * key[i + kDim / 2];
            const double b = query[i] * key[i + kDim / 2] - query[i + kDim / 2] * key[i];
            score += std::cos(angle) * a + std::sin(angle) * b;
          }
          weights.push_back(std::exp(score * model.shape.sm_scale));
          sum += weights.back();
        }
        for (std::size_t k = 0; k < kept.size(); ++k)
          for (int d = 0; d < kDim; ++d)
            attended[static_cast<std::size_t>(h * kDim + d)] +=
                weights[k] / sum *
                values[l][static_cast<std::size_t>(kept[k].index)]
                      [static_cast<std::size_t>(kv * kDim + d)];
      }
      const Row added = product(layer.out, attended);
      for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] += added[i];
      const Row wide = product(layer.gate_up, norm(hidden));
      Row active(kWidth);
      for (std::size_t i = 0; i < active.size(); ++i)
        active[i] = wide[2 * i] / (1 + std::exp(-wide[2 * i])) * wide[2 * i + 1];
      const Row last = product(layer.down, active);
      for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] += last[i];
    }
    return product(model.output, norm(hidden));
  }

  const Model& model;
  test::NaiveKinds kinds;
  std::vector<std::vector<Row>> keys;    // [layer][token], not rotated
  std::vector<std::vector<Row>> values;  // [layer][token]
  std::int64_t total = 0;
};

void expect_near(const std::vector<float>& found, const Row& expected, const std::string& where) {
  double largest = 0;
  double worst = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    ASSERT_TRUE(std::isfinite(found[i]));  // a maximum would pass NaN over
    worst = std::max(worst, std::abs(static_cast<double>(found[i]) - expected[i]));
  }
  // bf16 keys, values, queries, weights of attention and inputs of products: 2^-9 each, some ten
  // roundings in a row.
  EXPECT_LE(worst, 0.03 * largest) << where;
}

void run_conversation(std::int64_t text_rounds, std::int64_t vision_rounds) {
  const Model model;
  const std::vector<double> turns = frequencies();
  CudaKindDecoderOptions options;
  options.retention = {.text_sinks = 3,
                       .text_window = 9,
                       .text_rounds = text_rounds,
                       .vision_rounds = vision_rounds,
                       .max_head = 3,
                       .max_tail = 2,
                       .max_turn = 4,
                       .max_reply = 5,
                       .max_vision = 90,
                       .max_spans = 3,
                       .max_chunk = 80};
  options.frequencies = turns;
  options.time_pairs = kSections[0];
  options.height_pairs = kSections[1];
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  {
    CudaKindDecoder<bf16, kDim> decoder(model.weights, options, stream, model.device_biases);
    Oracle oracle(model, options.retention);
    Random random(5);
    Row logits;
    const auto read = [&](SpanRole role, std::int64_t count, const std::string& where) {
      decoder.begin_span(role);
      oracle.kinds.begin_span(role, {});
      std::vector<std::int32_t> tokens;
      for (std::int64_t i = 0; i < count; ++i)
        tokens.push_back(static_cast<std::int32_t>(random.below(kVocab)));
      decoder.read(tokens);
      for (const std::int32_t token : tokens) logits = oracle.feed(oracle.embedding(token));
      decoder.choose();
      expect_near(decoder.logits(), logits, where);
    };
    read(SpanRole::kHead, 2, "head");
    read(SpanRole::kPrevious, 6, "previous text");
    read(SpanRole::kTail, 2, "tail");
    for (int round = 0; round < 14; ++round) {
      const std::string where = "round " + std::to_string(round);
      decoder.begin_round();
      oracle.kinds.begin_round();
      read(SpanRole::kTurn, 1 + round % 3, where + ", turn");
      // 72 tokens are more than a tile, and 8 x 9 more than the 64 rows of a block.
      const VisionGrid grid{.frames = 1 + round % 2,
                            .rows = round % 3 == 0 ? 8 : 2,
                            .cols = round % 3 == 0 ? 5 : 9,
                            .frame_step = 0.5};
      std::vector<float> rows(static_cast<std::size_t>(grid.num_tokens()) * kHidden);
      for (float& x : rows) x = static_cast<float>(random.normal());
      Buffer<float, cuda> frames{std::span<const float>(rows)};
      decoder.begin_span(SpanRole::kVision, grid);
      oracle.kinds.begin_span(SpanRole::kVision, grid);
      decoder.see(frames.data(), grid.num_tokens());
      for (std::int64_t t = 0; t < grid.num_tokens(); ++t)
        logits = oracle.feed({rows.begin() + t * kHidden, rows.begin() + (t + 1) * kHidden});
      decoder.choose();
      expect_near(decoder.logits(), logits, where + ", frames");
      decoder.begin_span(SpanRole::kReply);
      oracle.kinds.begin_span(SpanRole::kReply, {});
      for (int i = 0; i < 1 + round % 5; ++i) {
        logits = oracle.feed(oracle.embedding(decoder.token()));
        decoder.say(1);
        expect_near(decoder.logits(), logits, where + ", reply " + std::to_string(i));
      }
      EXPECT_EQ(decoder.retention().size(),
                static_cast<std::int64_t>(oracle.kinds.tokens().size()));
    }
  }
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

TEST(KindDecoder, EqualsItsDefinition) {
  SKIP_WITHOUT_DEVICE();
  run_conversation(3, 3);
}
TEST(KindDecoder, EqualsItsDefinitionWhereFramesLeaveEarlier) {
  SKIP_WITHOUT_DEVICE();
  run_conversation(4, 2);
}
TEST(KindDecoder, EqualsItsDefinitionWhereTextLeavesEarlier) {
  SKIP_WITHOUT_DEVICE();
  run_conversation(2, 4);
}

}  // namespace SLUICE_TEST_UNIT
