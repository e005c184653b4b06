// SPDX-License-Identifier: MIT
/// A vision encoder of Qwen2.5-VL's geometry with random weights, for measuring: patches of two
/// frames, 32 layers of windowed (64 patches) or whole-frame attention with rotations on two axes,
/// gated feed-forward, 2 x 2 patches merged into one token of the decoder's width. Biases of the
/// products but those of queries, keys and values are left out, and the feed-forward is 3,424 wide
/// instead of 3,420 so that rows are aligned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <sluice/sluice.cuh>

#include "cuda/measure.cuh"

namespace sluice::bench {

struct VisionTowerShape {
  std::int64_t rows = 8;   ///< merged tokens of a frame, vertically; a multiple of 4
  std::int64_t cols = 16;  ///< horizontally; a multiple of 4
  std::int64_t hidden_size = 1280;
  std::int64_t intermediate_size = 3424;
  std::int64_t num_layers = 32;
  std::int64_t num_heads = 16;
  std::int64_t out_size = 3584;

  std::int64_t tokens() const { return rows * cols; }
  std::int64_t patches() const { return 4 * tokens(); }
  std::int64_t height() const { return rows * 28; }
  std::int64_t width() const { return cols * 28; }
  /// Two frames of 8-bit RGB.
  std::int64_t frame_bytes() const { return 2 * height() * width() * 3; }
};

inline constexpr int kPatchSize = 14;
inline constexpr int kPatchValues = 3 * 2 * kPatchSize * kPatchSize;

/// Patch p of the tower's order: windows of 8 x 8 patches, in them 2 x 2 groups, row by row.
__host__ __device__ inline void patch_place(int p, int cols, int* y, int* x) {
  const int windows = 2 * cols / 8;  // in a row of windows
  const int window = p / 64;
  const int group = p % 64 / 4;
  *y = window / windows * 8 + group / 4 * 2 + p % 4 / 2;
  *x = window % windows * 8 + group % 4 * 2 + p % 2;
}

/// Pixels to normalised patches: a block per patch.
__global__ void __launch_bounds__(256)
    patchify(const std::uint8_t* frames, std::uint16_t* patches, int cols, int height, int width) {
  int y = 0;
  int x = 0;
  patch_place(static_cast<int>(blockIdx.x), cols, &y, &x);
  for (int i = static_cast<int>(threadIdx.x); i < kPatchValues; i += 256) {
    const int channel = i / (2 * kPatchSize * kPatchSize);
    const int frame = i / (kPatchSize * kPatchSize) % 2;
    const int row = y * kPatchSize + i / kPatchSize % kPatchSize;
    const int col = x * kPatchSize + i % kPatchSize;
    const float pixel =
        static_cast<float>(frames[((frame * height + row) * width + col) * 3 + channel]);
    patches[static_cast<std::int64_t>(blockIdx.x) * kPatchValues + i] =
        static_cast<std::uint16_t>(detail::Half<bf16>::pack((pixel / 255 - 0.5F) / 0.27F, 0));
  }
}

__global__ void __launch_bounds__(256) gelu(const float* x, std::uint16_t* y, std::int64_t count) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < count)
    y[i] = static_cast<std::uint16_t>(
        detail::Half<bf16>::pack(0.5F * x[i] * (1 + erff(x[i] * 0.70710678F)), 0));
}

/// Tokens back from the tower's order into rows and columns: a block per token.
__global__ void __launch_bounds__(256) unwindow(const float* from, float* to, int cols, int size) {
  int y = 0;
  int x = 0;
  patch_place(4 * static_cast<int>(blockIdx.x), cols, &y, &x);
  const std::int64_t token = static_cast<std::int64_t>(y / 2) * cols + x / 2;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += 256)
    to[token * size + i] = from[static_cast<std::int64_t>(blockIdx.x) * size + i];
}

class VisionTower {
 public:
  explicit VisionTower(const VisionTowerShape& shape, cudaStream_t stream)
      : shape_(shape),
        stream_(stream),
        attention_(shape.num_heads, shape.num_heads, frequencies(), 0, 20, shape.patches(), 1),
        pixels_(static_cast<std::size_t>(shape.frame_bytes())),
        patches_(size(shape.patches(), kPatchValues)),
        hidden_(size(shape.patches(), shape.hidden_size)),
        rounded_(size(shape.patches(), std::max(shape.intermediate_size, shape.hidden_size))),
        fused_(size(shape.patches(), 3 * shape.hidden_size)),
        gate_up_(size(shape.patches(), 2 * shape.intermediate_size)),
        keys_(size(shape.patches(), shape.hidden_size)),
        values_(size(shape.patches(), shape.hidden_size)),
        merged_(size(shape.tokens(), 4 * shape.hidden_size)),
        windowed_(size(shape.tokens(), shape.out_size)),
        tokens_(size(shape.tokens(), shape.out_size)),
        ones_(size(1, shape.hidden_size)),
        bias_(size(1, 3 * shape.hidden_size)) {
    const std::int64_t h = shape.hidden_size;
    std::uint64_t salt = 1000;
    const auto random = [&](std::int64_t rows, std::int64_t cols) {
      Buffer<bf16, cuda> matrix(size(rows, cols));
      fill_random<<<1024, 256>>>(reinterpret_cast<std::uint16_t*>(matrix.data()), rows * cols,
                                 salt++ << 33, 1 / std::sqrt(static_cast<float>(cols)));
      return matrix;
    };
    embed_ = random(h, kPatchValues);
    for (std::int64_t l = 0; l < shape.num_layers; ++l)
      layers_.push_back({random(3 * h, h), random(h, h), random(2 * shape.intermediate_size, h),
                         random(h, shape.intermediate_size)});
    first_ = random(4 * h, 4 * h);
    second_ = random(shape.out_size, 4 * h);
    ones_.upload(std::vector<float>(ones_.size(), 1.0F));
    // Positions, slots and tiles of a frame never change.
    std::vector<Position3> positions;
    std::vector<std::int32_t> slots;
    std::vector<AttentionTile> tiles;
    for (int p = 0; p < static_cast<int>(shape.patches()); ++p) {
      int y = 0;
      int x = 0;
      patch_place(p, static_cast<int>(shape.cols), &y, &x);
      positions.push_back({0, static_cast<Position>(y), static_cast<Position>(x)});
      slots.push_back(p);
      if (p % 64 == 0) tiles.push_back({p, 64, 0, AttentionTile::kOld});
    }
    positions_ = Buffer<Position3, cuda>(std::span<const Position3>(positions));
    slots_ = Buffer<std::int32_t, cuda>(std::span<const std::int32_t>(slots));
    tiles_ = Buffer<AttentionTile, cuda>(std::span<const AttentionTile>(tiles));
    detail::TileStep step{};
    step.num_tiles = static_cast<std::int32_t>(tiles.size());
    step.num_places = 1;
    step_ = Buffer<detail::TileStep, cuda>(std::span<const detail::TileStep>(&step, 1));
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  /// Two frames, [2, height, width, 3], in pinned host memory; gives [tokens, out_size] in device
  /// memory, valid until the next call.
  const float* encode(const std::uint8_t* frames) {
    const std::int64_t n = shape_.patches();
    const std::int64_t h = shape_.hidden_size;
    check_cuda(
        cudaMemcpyAsync(pixels_.data(), frames, pixels_.size(), cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync");
    patchify<<<static_cast<unsigned>(n), 256, 0, stream_>>>(
        pixels_.data(), reinterpret_cast<std::uint16_t*>(patches_.data()),
        static_cast<int>(shape_.cols), static_cast<int>(shape_.height()),
        static_cast<int>(shape_.width()));
    products_.launch(embed_.data(), h, kPatchValues, patches_.data(), n, hidden_.data(), false,
                     stream_);
    detail::TileAppendParams p{};
    p.fused = fused_.data();
    p.bias = bias_.data();
    p.step = step_.data();
    p.positions = positions_.data();
    p.slots = slots_.data();
    p.keys = reinterpret_cast<std::uint16_t*>(keys_.data());
    p.values = reinterpret_cast<std::uint16_t*>(values_.data());
    p.head_stride = n * (h / shape_.num_heads);
    attention_.rotate(p, n, stream_);
    for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
      const Layer& w = layers_[static_cast<std::size_t>(l)];
      norm(n);
      products_.launch(w.fused.data(), 3 * h, h, rounded_.data(), n, fused_.data(), false, stream_);
      const bool whole = l % 8 == 7;
      attention_.launch(p, tiles_.data(), !whole,
                        1 / std::sqrt(static_cast<float>(h / shape_.num_heads)), n,
                        static_cast<std::int64_t>(tiles_.size()), rounded_.data(), false, stream_);
      products_.launch(w.output.data(), h, h, rounded_.data(), n, hidden_.data(), true, stream_);
      norm(n);
      products_.launch(w.gate_up.data(), 2 * shape_.intermediate_size, h, rounded_.data(), n,
                       gate_up_.data(), false, stream_);
      const std::int64_t elements = n * shape_.intermediate_size;
      detail::gated_silu_kernel<bf16>
          <<<static_cast<unsigned>((elements / 2 + 255) / 256), 256, 0, stream_>>>(
              gate_up_.data(), reinterpret_cast<std::uint16_t*>(rounded_.data()), elements);
      products_.launch(w.down.data(), h, shape_.intermediate_size, rounded_.data(), n,
                       hidden_.data(), true, stream_);
    }
    norm(n);
    const std::int64_t tokens = shape_.tokens();
    products_.launch(first_.data(), 4 * h, 4 * h, rounded_.data(), tokens, merged_.data(), false,
                     stream_);
    gelu<<<static_cast<unsigned>((tokens * 4 * h + 255) / 256), 256, 0, stream_>>>(
        merged_.data(), reinterpret_cast<std::uint16_t*>(rounded_.data()), tokens * 4 * h);
    products_.launch(second_.data(), shape_.out_size, 4 * h, rounded_.data(), tokens,
                     windowed_.data(), false, stream_);
    unwindow<<<static_cast<unsigned>(tokens), 256, 0, stream_>>>(windowed_.data(), tokens_.data(),
                                                                 static_cast<int>(shape_.cols),
                                                                 static_cast<int>(shape_.out_size));
    check_cuda(cudaGetLastError(), "VisionTower");
    return tokens_.data();
  }

 private:
  struct Layer {
    Buffer<bf16, cuda> fused;
    Buffer<bf16, cuda> output;
    Buffer<bf16, cuda> gate_up;
    Buffer<bf16, cuda> down;
  };
  static std::size_t size(std::int64_t rows, std::int64_t cols) {
    return static_cast<std::size_t>(rows * cols);
  }
  static std::vector<double> frequencies() {
    std::vector<double> result;  // 20 pairs by height, 20 by width
    for (int i = 0; i < 40; ++i) result.push_back(std::pow(10000.0, -2.0 * (i % 20) / 40));
    return result;
  }
  void norm(std::int64_t rows) {
    detail::rms_norm_kernel<bf16><<<static_cast<unsigned>(rows), detail::kRowThreads, 0, stream_>>>(
        hidden_.data(), ones_.data(), 1e-6F, reinterpret_cast<std::uint16_t*>(rounded_.data()),
        static_cast<int>(shape_.hidden_size));
  }

  VisionTowerShape shape_;
  cudaStream_t stream_;
  TileAttentionPlan<bf16, 80> attention_;
  MatrixProducts<bf16> products_;
  Buffer<std::uint8_t, cuda> pixels_;
  Buffer<bf16, cuda> patches_;
  Buffer<float, cuda> hidden_;
  Buffer<bf16, cuda> rounded_;
  Buffer<float, cuda> fused_;
  Buffer<float, cuda> gate_up_;
  Buffer<bf16, cuda> keys_;
  Buffer<bf16, cuda> values_;
  Buffer<float, cuda> merged_;
  Buffer<float, cuda> windowed_;
  Buffer<float, cuda> tokens_;
  Buffer<float, cuda> ones_;
  Buffer<float, cuda> bias_;
  Buffer<bf16, cuda> embed_;
  std::vector<Layer> layers_;
  Buffer<bf16, cuda> first_;
  Buffer<bf16, cuda> second_;
  Buffer<Position3, cuda> positions_;
  Buffer<std::int32_t, cuda> slots_;
  Buffer<AttentionTile, cuda> tiles_;
  Buffer<detail::TileStep, cuda> step_;
};

}  // namespace sluice::bench
