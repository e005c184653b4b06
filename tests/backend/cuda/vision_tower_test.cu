// SPDX-License-Identifier: MIT
// The vision tower against its definition in double: patches in rows and columns, each seeing those
// of its window or all, rotated on two axes, no padding and no order but the picture's.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/device_test.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr int kDim = 64;

using Row = std::vector<double>;

/// Rounded values, and the same on the device.
std::vector<float> fill(Buffer<bf16, cuda>& matrix, std::int64_t rows, std::int64_t cols,
                        double gain, Random& random) {
  const std::vector<bf16> values = sluice_test::rounded_to<bf16>(sluice_test::random_floats(
      random, static_cast<std::size_t>(rows * cols), gain / std::sqrt(static_cast<double>(cols))));
  if (matrix.size() == values.size()) matrix.upload(values);
  std::vector<float> wide;
  for (const bf16 x : values) wide.push_back(static_cast<float>(x));
  return wide;
}
std::vector<float> fill(Buffer<float, cuda>& vector, std::int64_t size, double mean,
                        Random& random) {
  std::vector<float> values =
      sluice_test::random_floats(random, static_cast<std::size_t>(size), 0.3);
  for (float& x : values) x += static_cast<float>(mean);
  vector = Buffer<float, cuda>(std::span<const float>(values));
  return values;
}

/// An encoder with biases everywhere.
struct Model {
  CudaVisionWeights<bf16> weights;
  std::vector<float> patches;
  struct Layer {
    std::vector<float> attention_norm, fused, fused_bias, output, output_bias, feed_forward_norm,
        gate, up, gate_bias, up_bias, down, down_bias;
  };
  std::vector<Layer> layers;
  std::vector<float> merger_norm, first, first_bias, second, second_bias;

  explicit Model(const CudaVisionShape& shape) : weights(shape) {
    Random random(3);
    const std::int64_t width = shape.width;
    const std::int64_t wide = shape.feed_forward_width;
    const std::int64_t merged = shape.merged_width();
    Buffer<bf16, cuda> none;
    patches = fill(weights.patches, width, shape.patch_values(), 1, random);
    for (std::int64_t l = 0; l < shape.num_layers; ++l) {
      CudaVisionLayer<bf16>& w = weights.layers[static_cast<std::size_t>(l)];
      Layer layer;
      layer.attention_norm = fill(w.attention_norm, width, 1, random);
      // Attention that prefers some keys and weighs as much as the residual stream.
      layer.fused = fill(w.query_key_value, 3 * width, width, 1.4, random);
      layer.fused_bias = fill(w.query_key_value_bias, 3 * width, 0, random);
      layer.output = fill(w.output, width, width, 2, random);
      layer.output_bias = fill(w.output_bias, width, 0, random);
      layer.feed_forward_norm = fill(w.feed_forward_norm, width, 1, random);
      layer.gate = fill(none, wide, width, 1, random);
      layer.up = fill(none, wide, width, 1, random);
      layer.down = fill(none, width, wide, 1, random);
      weights.set_gate_up(l, sluice_test::rounded_to<bf16>(layer.gate),
                          sluice_test::rounded_to<bf16>(layer.up));
      weights.set_down(l, sluice_test::rounded_to<bf16>(layer.down));
      layer.gate_bias = sluice_test::random_floats(random, static_cast<std::size_t>(wide), 0.3);
      layer.up_bias = sluice_test::random_floats(random, static_cast<std::size_t>(wide), 0.3);
      weights.set_gate_up_bias(l, layer.gate_bias, layer.up_bias);
      layer.down_bias = fill(w.down_bias, width, 0, random);
      layers.push_back(std::move(layer));
    }
    merger_norm = fill(weights.merger_norm, width, 1, random);
    first = fill(weights.merger_first, merged, merged, 1, random);
    first_bias = fill(weights.merger_first_bias, merged, 0, random);
    second = fill(weights.merger_second, shape.out_width, merged, 1, random);
    second_bias = fill(weights.merger_second_bias, shape.out_width, 0, random);
  }
};

Row product(const std::vector<float>& matrix, const Row& x, const std::vector<float>& bias = {}) {
  Row y(matrix.size() / x.size(), 0.0);
  for (std::size_t r = 0; r < y.size(); ++r) {
    if (!bias.empty()) y[r] = static_cast<double>(bias[r]);
    for (std::size_t c = 0; c < x.size(); ++c)
      y[r] += static_cast<double>(matrix[r * x.size() + c]) * x[c];
  }
  return y;
}
Row norm(const Row& x, const std::vector<float>& weight, double eps) {
  double square = 0;
  for (const double v : x) square += v * v;
  Row y = x;
  for (std::size_t i = 0; i < y.size(); ++i)
    y[i] *=
        static_cast<double>(weight[i]) / std::sqrt(square / static_cast<double>(x.size()) + eps);
  return y;
}
void add(Row& to, const Row& x) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += x[i];
}

/// [rows * cols][out_width]: the definition.
std::vector<Row> encode(const Model& model, std::int64_t rows, std::int64_t cols,
                        const std::vector<std::uint8_t>& frames) {
  const CudaVisionShape& s = model.weights.shape();
  const std::int64_t height = rows * s.merge;  // patches
  const std::int64_t width = cols * s.merge;
  std::vector<Row> hidden;
  for (std::int64_t y = 0; y < height; ++y)
    for (std::int64_t x = 0; x < width; ++x) {
      Row patch;
      for (std::int64_t c = 0; c < s.channels; ++c)
        for (std::int64_t f = 0; f < s.grid_frames; ++f)
          for (std::int64_t i = 0; i < s.patch_size; ++i)
            for (std::int64_t j = 0; j < s.patch_size; ++j) {
              const std::int64_t line = f * height * s.patch_size + y * s.patch_size + i;
              const std::int64_t at =
                  (line * width * s.patch_size + x * s.patch_size + j) * s.channels + c;
              const auto channel = static_cast<std::size_t>(c);
              const double value = frames[static_cast<std::size_t>(at)] / 255.0;
              patch.push_back((value - s.mean[channel]) / s.deviation[channel]);
            }
      hidden.push_back(product(model.patches, patch));
    }
  const std::int64_t side = s.window_size == 0 ? height + width : s.window_size / s.patch_size;
  const auto window_of = [&](std::int64_t p) {
    return std::pair{p / width / side, p % width / side};
  };
  for (std::int64_t l = 0; l < s.num_layers; ++l) {
    const Model::Layer& layer = model.layers[static_cast<std::size_t>(l)];
    const bool whole = std::count(s.whole_layers.begin(), s.whole_layers.end(), l) > 0;
    std::vector<Row> fused;
    for (const Row& x : hidden)
      fused.push_back(
          product(layer.fused, norm(x, layer.attention_norm, s.norm_eps), layer.fused_bias));
    const auto count = static_cast<std::int64_t>(hidden.size());
    for (std::int64_t q = 0; q < count; ++q) {
      Row attended(static_cast<std::size_t>(s.width), 0.0);
      for (std::int64_t h = 0; h < s.num_heads; ++h) {
        Row weights;
        double sum = 0;
        std::vector<std::int64_t> seen;
        for (std::int64_t k = 0; k < count; ++k) {
          if (!whole && window_of(q) != window_of(k)) continue;
          const double* const a = fused[static_cast<std::size_t>(q)].data() + h * kDim;
          const double* const b = fused[static_cast<std::size_t>(k)].data() + s.width + h * kDim;
          double score = 0;
          for (int i = 0; i < kDim / 2; ++i) {
            // The first half of the pairs turns by rows, the second by columns, both alike.
            const bool by_row = i < kDim / 4;
            const auto distance =
                static_cast<double>(by_row ? q / width - k / width : q % width - k % width);
            const double angle = distance * std::pow(s.rope_theta, -4.0 * (i % (kDim / 4)) / kDim);
            score += std::cos(angle) * (a[i] * b[i] + a[i + kDim / 2] * b[i + kDim / 2]) +
                     std::sin(angle) * (a[i] * b[i + kDim / 2] - a[i + kDim / 2] * b[i]);
          }
          weights.push_back(std::exp(score / std::sqrt(static_cast<double>(kDim))));
          sum += weights.back();
          seen.push_back(k);
        }
        for (std::size_t k = 0; k < seen.size(); ++k)
          for (int d = 0; d < kDim; ++d)
            attended[static_cast<std::size_t>(h * kDim + d)] +=
                weights[k] / sum *
                fused[static_cast<std::size_t>(seen[k])]
                     [static_cast<std::size_t>(2 * s.width + h * kDim + d)];
      }
      add(hidden[static_cast<std::size_t>(q)], product(layer.output, attended, layer.output_bias));
    }
    for (Row& x : hidden) {
      const Row normed = norm(x, layer.feed_forward_norm, s.norm_eps);
      Row gate = product(layer.gate, normed, layer.gate_bias);
      const Row up = product(layer.up, normed, layer.up_bias);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      add(x, product(layer.down, gate, layer.down_bias));
    }
  }
  std::vector<Row> result;
  for (std::int64_t y = 0; y < rows; ++y)
    for (std::int64_t x = 0; x < cols; ++x) {
      Row together;
      for (std::int64_t i = 0; i < s.merge; ++i)
        for (std::int64_t j = 0; j < s.merge; ++j) {
          const std::int64_t patch = (y * s.merge + i) * width + x * s.merge + j;
          const Row one =
              norm(hidden[static_cast<std::size_t>(patch)], model.merger_norm, s.norm_eps);
          together.insert(together.end(), one.begin(), one.end());
        }
      Row middle = product(model.first, together, model.first_bias);
      for (double& v : middle) v *= 0.5 * (1 + std::erf(v / std::sqrt(2.0)));
      result.push_back(product(model.second, middle, model.second_bias));
    }
  return result;
}

CudaVisionShape small(std::int64_t window_size, std::int64_t patch, std::int64_t frames) {
  CudaVisionShape shape;
  shape.width = 2 * kDim;
  shape.num_layers = 3;
  shape.num_heads = 2;
  shape.feed_forward_width = 84;  // stored as 88
  shape.out_width = 40;
  shape.patch_size = patch;
  shape.grid_frames = frames;
  shape.window_size = window_size;
  shape.whole_layers = {1};
  shape.rope_theta = 300;
  if (window_size == 0) shape.whole_layers = {0, 1, 2};
  return shape;
}

void run(const CudaVisionShape& shape, std::int64_t rows, std::int64_t cols) {
  const Model model(shape);
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  {
    CudaVisionTower<bf16, kDim> tower(model.weights, rows, cols, stream);
    ASSERT_EQ(tower.tokens(), rows * cols);
    Random random(8);
    for (int picture = 0; picture < 2; ++picture) {
      std::vector<std::uint8_t> frames(
          static_cast<std::size_t>(shape.grid_frames * tower.frame_bytes()));
      for (std::uint8_t& pixel : frames) pixel = static_cast<std::uint8_t>(random.below(256));
      const float* const seen = tower.encode(frames.data());
      std::vector<float> found(static_cast<std::size_t>(tower.tokens() * shape.out_width));
      check_cuda(cudaMemcpyAsync(found.data(), seen, found.size() * sizeof(float),
                                 cudaMemcpyDeviceToHost, stream),
                 "cudaMemcpyAsync");
      check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      const std::vector<Row> expected = encode(model, rows, cols, frames);
      double largest = 0;
      double worst = 0;
      for (std::size_t t = 0; t < expected.size(); ++t)
        for (std::size_t i = 0; i < expected[t].size(); ++i) {
          largest = std::max(largest, std::abs(expected[t][i]));
          const double value = static_cast<double>(found[t * expected[t].size() + i]);
          ASSERT_TRUE(std::isfinite(value));  // a maximum would pass NaN over
          worst = std::max(worst, std::abs(value - expected[t][i]));
        }
      // bf16 pixels, queries, keys, values, weights of attention and inputs of products: 2^-9 each,
      // some fifteen roundings in a row.
      EXPECT_LE(worst, 0.03 * largest) << rows << " x " << cols << ", picture " << picture;
    }
  }
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

// On the host alone: every patch stands once, a token's side by side, a window within a tile.
TEST(VisionLayout, PlacesEveryPatchOnceAndWindowsInTiles) {
  for (const auto& [window, patch] : {std::pair{32, 8}, {32, 4}, {16, 8}, {0, 8}}) {
    const CudaVisionShape shape = small(window, patch, 1);
    for (const auto& [rows, cols] : {std::pair{1, 1}, {3, 5}, {4, 8}, {5, 6}, {8, 16}, {7, 9}}) {
      const detail::VisionLayout layout = detail::vision_layout(shape, rows, cols);
      const std::size_t group = 4;
      const std::size_t count = layout.places.size();
      ASSERT_EQ(count % 64, 0U);
      ASSERT_EQ(layout.positions.size(), count);
      ASSERT_EQ(layout.token_of.size() * group, count);
      ASSERT_EQ(layout.tiles.size() * 64, count);
      std::vector<int> seen(static_cast<std::size_t>(rows * cols), 0);
      for (std::size_t g = 0; g < layout.token_of.size(); ++g) {
        const int token = layout.token_of[g];
        for (std::size_t i = 0; i < group; ++i) {
          const detail::PatchOnGrid place = layout.places[g * group + i];
          const Position3 at = layout.positions[g * group + i];
          if (token < 0) {
            EXPECT_LT(place.y, 0);
            continue;
          }
          EXPECT_EQ(place.y, token / cols * 2 + static_cast<int>(i) / 2);
          EXPECT_EQ(place.x, token % cols * 2 + static_cast<int>(i) % 2);
          EXPECT_EQ(at.t, 0);
          EXPECT_EQ(at.h, place.y);
          EXPECT_EQ(at.w, place.x);
        }
        if (token >= 0) ++seen[static_cast<std::size_t>(token)];
      }
      EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), rows * cols);
      std::map<std::pair<int, int>, std::size_t> tile_of;
      const int side = window == 0 ? 1 << 20 : window / patch;
      for (std::size_t tile = 0; tile < layout.tiles.size(); ++tile) {
        const AttentionTile& listed = layout.tiles[tile];
        EXPECT_EQ(listed.slot, static_cast<int>(64 * tile));
        ASSERT_GE(listed.count, 1);
        std::optional<std::pair<int, int>> held;
        for (int j = 0; j < 64; ++j) {
          const detail::PatchOnGrid place = layout.places[64 * tile + static_cast<std::size_t>(j)];
          EXPECT_EQ(place.y >= 0, j < listed.count);  // padding is behind what is listed
          if (place.y < 0) continue;
          const std::pair<int, int> of{place.y / side, place.x / side};
          EXPECT_TRUE(!held || *held == of);
          held = of;
          if (window != 0) {
            EXPECT_EQ(tile_of.emplace(of, tile).first->second, tile);
          }
        }
      }
    }
  }
}

TEST(VisionTower, EqualsItsDefinition) {
  SKIP_WITHOUT_DEVICE();
  // Windows of 2 x 2 tokens, some cut by the picture's edges: 16 patches and fewer.
  run(small(32, 8, 1), 3, 5);
  // Full tiles of 64 patches, and rests.
  run(small(32, 4, 2), 5, 6);
  run(small(32, 4, 2), 4, 8);
}
TEST(VisionTower, EqualsItsDefinitionWithoutWindows) {
  SKIP_WITHOUT_DEVICE();
  run(small(0, 8, 1), 6, 5);  // 120 patches: a full tile and a rest
}

TEST(VisionTower, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const auto refused = [](auto&& change) {
    CudaVisionShape shape = small(32, 8, 1);
    change(shape);
    const auto error = test::error_of([&] { CudaVisionWeights<bf16> weights(shape); });
    return error && error->code() == ErrorCode::kShape;
  };
  EXPECT_FALSE(refused([](CudaVisionShape&) {}));
  EXPECT_TRUE(refused([](CudaVisionShape& s) { s.width = 100; }));
  EXPECT_TRUE(refused([](CudaVisionShape& s) { s.num_heads = 3; }));
  EXPECT_TRUE(refused([](CudaVisionShape& s) { s.merge = 3; }));
  EXPECT_TRUE(refused([](CudaVisionShape& s) { s.window_size = 24; }));
  EXPECT_TRUE(refused([](CudaVisionShape& s) { s.window_size = 80; }));  // 100 patches
  EXPECT_TRUE(refused([](CudaVisionShape& s) { s.patch_size = 3; }));
  const CudaVisionWeights<bf16> weights(small(32, 8, 1));
  EXPECT_TRUE(test::error_of([&] { CudaVisionTower<bf16, kDim>(weights, 0, 4, nullptr); }));
  EXPECT_TRUE(test::error_of([&] { CudaVisionTower<bf16, 80>(weights, 4, 4, nullptr); }));
}

}  // namespace SLUICE_TEST_UNIT
