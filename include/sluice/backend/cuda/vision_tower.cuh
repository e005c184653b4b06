// SPDX-License-Identifier: MIT
/// A vision encoder of Qwen2.5-VL's kind on the GPU (arXiv 2502.13923, section 2.1.1; on the CPU
/// model/vision_encoder.hpp): pixels to patches, layers of attention in windows or over the whole
/// grid with rotations on two axes, neighbouring patches merged into the tokens that a decoder
/// reads. Needs cublasLt.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/chunk_attention.cuh"
#include "sluice/backend/cuda/decoder_kernels.cuh"
#include "sluice/backend/cuda/matrix_product.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/tile_attention.cuh"
#include "sluice/core/error.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// Extents of an encoder: VisionEncoderConfig's, and how pixels are normalised (PatchConfig's). The
/// defaults are Qwen2.5-VL's.
struct CudaVisionShape {
  std::int64_t width = 1280;  ///< a multiple of 8
  std::int64_t num_layers = 32;
  std::int64_t num_heads = 16;
  std::int64_t feed_forward_width = 3420;
  std::int64_t out_width = 3584;  ///< of a token, the decoder's
  std::int64_t patch_size = 14;   ///< pixels
  std::int64_t grid_frames = 2;   ///< frames that make one grid of patches
  std::int64_t channels = 3;
  std::int64_t merge = 2;          ///< merge x merge patches become a token: 1, 2, 4 or 8
  std::int64_t window_size = 112;  ///< pixels, at most 64 patches; 0: every layer sees the grid
  std::vector<std::int64_t> whole_layers{7, 15, 23, 31};  ///< layers that see the whole grid
  double rope_theta = 10000;
  double norm_eps = 1e-6;
  /// A value v of 0 to 255 enters as (v / 255 - mean) / deviation, per channel.
  std::array<double, 4> mean{0.48145466, 0.4578275, 0.40821073, 0.0};
  std::array<double, 4> deviation{0.26862954, 0.26130258, 0.27577711, 1.0};

  /// Values of a patch: [channels, grid_frames, patch_size, patch_size].
  std::int64_t patch_values() const { return channels * grid_frames * patch_size * patch_size; }
  std::int64_t head_dim() const { return width / num_heads; }
  /// Width of what the merger reads: merge x merge patches side by side.
  std::int64_t merged_width() const { return merge * merge * width; }
  /// Stored width of the feed-forward layers: whole 16 bytes; what is added is zero.
  std::int64_t stored_feed_forward() const { return (feed_forward_width + 7) / 8 * 8; }
  bool is_whole(std::int64_t layer) const {
    return window_size == 0 ||
           std::find(whole_layers.begin(), whole_layers.end(), layer) != whole_layers.end();
  }
};

/// Weights of one layer, in device memory. Matrices are [out, in]; a bias without elements is none.
template <class Element>
struct CudaVisionLayer {
  Buffer<float, cuda> attention_norm;        ///< [width]
  Buffer<Element, cuda> query_key_value;     ///< [3 width, width]
  Buffer<float, cuda> query_key_value_bias;  ///< [3 width]
  Buffer<Element, cuda> output;              ///< [width, width]
  Buffer<float, cuda> output_bias;           ///< [width]
  Buffer<float, cuda> feed_forward_norm;     ///< [width]
  /// [2 stored_feed_forward(), width]: gate's row i is row 2 i, up's is row 2 i + 1.
  Buffer<Element, cuda> gate_up;
  Buffer<float, cuda> gate_up_bias;  ///< [2 stored_feed_forward()], in the same order
  Buffer<Element, cuda> down;        ///< [width, stored_feed_forward()]
  Buffer<float, cuda> down_bias;     ///< [width]
};

/// An encoder's weights in device memory; any number of towers may share them. Construction
/// allocates: norms are 1, matrices 0, biases absent. The setters copy from the host and wait.
template <class Element>
class CudaVisionWeights {
 public:
  /// \throws Error(kShape) naming the extent that does not fit; Error(kDevice).
  explicit CudaVisionWeights(CudaVisionShape shape)
      : shape_(checked(std::move(shape))),
        patches(size(shape_.width, shape_.patch_values())),
        merger_norm(ones()),
        merger_first(size(shape_.merged_width(), shape_.merged_width())),
        merger_second(size(shape_.out_width, shape_.merged_width())) {
    const std::int64_t width = shape_.width;
    const std::int64_t wide = shape_.stored_feed_forward();
    for (std::int64_t l = 0; l < shape_.num_layers; ++l) {
      CudaVisionLayer<Element> layer;
      layer.attention_norm = ones();
      layer.query_key_value = Buffer<Element, cuda>(size(3 * width, width));
      layer.output = Buffer<Element, cuda>(size(width, width));
      layer.feed_forward_norm = ones();
      layer.gate_up = Buffer<Element, cuda>(size(2 * wide, width));
      layer.down = Buffer<Element, cuda>(size(width, wide));
      layers.push_back(std::move(layer));
    }
  }

  const CudaVisionShape& shape() const { return shape_; }

  /// gate, up: [feed_forward_width, width]. \throws Error(kShape, kDevice).
  void set_gate_up(std::int64_t layer, std::span<const Element> gate, std::span<const Element> up) {
    layers[static_cast<std::size_t>(layer)].gate_up.upload(interleaved(gate, up, shape_.width));
  }
  /// gate, up: [feed_forward_width]. \throws Error(kShape, kDevice).
  void set_gate_up_bias(std::int64_t layer, std::span<const float> gate,
                        std::span<const float> up) {
    Buffer<float, cuda>& bias = layers[static_cast<std::size_t>(layer)].gate_up_bias;
    bias = Buffer<float, cuda>(size(2, shape_.stored_feed_forward()));
    bias.upload(interleaved(gate, up, 1));
  }
  /// down: [width, feed_forward_width]. \throws Error(kShape, kDevice).
  void set_down(std::int64_t layer, std::span<const Element> down) {
    const auto stored = static_cast<std::size_t>(shape_.stored_feed_forward());
    const auto given = static_cast<std::size_t>(shape_.feed_forward_width);
    require_size("down", down.size(), static_cast<std::size_t>(shape_.width) * given);
    std::vector<Element> rows(static_cast<std::size_t>(shape_.width) * stored);
    for (std::size_t r = 0; r < static_cast<std::size_t>(shape_.width); ++r)
      std::copy_n(down.data() + r * given, given, rows.data() + r * stored);
    layers[static_cast<std::size_t>(layer)].down.upload(rows);
  }

 private:
  static std::size_t size(std::int64_t rows, std::int64_t cols) {
    return static_cast<std::size_t>(rows * cols);
  }
  Buffer<float, cuda> ones() const {
    const std::vector<float> values(static_cast<std::size_t>(shape_.width), 1.0F);
    return Buffer<float, cuda>(std::span<const float>(values));
  }
  static void require_size(const char* field, std::size_t found, std::size_t expected) {
    if (found != expected)
      throw Error(ErrorCode::kShape, {"values do not fill the tensor", "CudaVisionWeights", field,
                                      std::to_string(expected), std::to_string(found)});
  }
  template <class T>
  std::vector<T> interleaved(std::span<const T> gate, std::span<const T> up,
                             std::int64_t cols) const {
    const auto width = static_cast<std::size_t>(cols);
    const auto rows = static_cast<std::size_t>(shape_.feed_forward_width);
    require_size("gate", gate.size(), rows * width);
    require_size("up", up.size(), rows * width);
    std::vector<T> result;
    result.reserve(2 * rows * width);
    for (std::size_t r = 0; r < rows; ++r) {
      result.insert(result.end(), gate.data() + r * width, gate.data() + (r + 1) * width);
      result.insert(result.end(), up.data() + r * width, up.data() + (r + 1) * width);
    }
    return result;
  }
  static CudaVisionShape checked(CudaVisionShape s) {
    const auto require = [](bool good, const char* field, const char* expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape, {"vision encoder does not fit", "CudaVisionShape", field,
                                        expected, std::to_string(found)});
    };
    constexpr std::int64_t kMost = 1 << 20;
    const auto in_range = [](std::int64_t x) {
      return x >= 1 && x <= kMost;
    };
    require(in_range(s.width) && s.width % 8 == 0, "width", "a multiple of 8, at most 2^20",
            s.width);
    require(in_range(s.num_layers), "num_layers", "1 to 2^20", s.num_layers);
    require(in_range(s.num_heads) && s.width % s.num_heads == 0, "num_heads",
            "a divisor of the width", s.num_heads);
    require(in_range(s.feed_forward_width), "feed_forward_width", "1 to 2^20",
            s.feed_forward_width);
    require(in_range(s.out_width), "out_width", "1 to 2^20", s.out_width);
    require(s.patch_size >= 1 && s.patch_size <= 1024, "patch_size", "1 to 1024", s.patch_size);
    require(s.grid_frames >= 1 && s.grid_frames <= 64, "grid_frames", "1 to 64", s.grid_frames);
    require(s.channels >= 1 && s.channels <= 4, "channels", "1 to 4", s.channels);
    require(s.patch_values() % 8 == 0, "patch_size",
            "a multiple of 8 values a patch: rows of whole 16 bytes", s.patch_size);
    require(s.merge == 1 || s.merge == 2 || s.merge == 4 || s.merge == 8, "merge", "1, 2, 4 or 8",
            s.merge);
    const std::int64_t unit = s.patch_size * s.merge;
    const std::int64_t side = s.window_size < 0 ? -1 : s.window_size / s.patch_size;
    require(s.window_size >= 0 && s.window_size % unit == 0 &&
                side * side <= std::int64_t{detail::kChunkTile},
            "window_size", "whole tokens, at most 64 patches", s.window_size);
    return s;
  }

  CudaVisionShape shape_;

 public:
  Buffer<Element, cuda> patches;  ///< [width, patch_values()]
  std::vector<CudaVisionLayer<Element>> layers;
  Buffer<float, cuda> merger_norm;         ///< [width]
  Buffer<Element, cuda> merger_first;      ///< [merged_width(), merged_width()]
  Buffer<float, cuda> merger_first_bias;   ///< [merged_width()]
  Buffer<Element, cuda> merger_second;     ///< [out_width, merged_width()]
  Buffer<float, cuda> merger_second_bias;  ///< [out_width]
};

namespace detail {

/// A patch's place in the picture, in patches; y negative: padding.
struct PatchOnGrid {
  std::int32_t y;
  std::int32_t x;
};

/// Where patches stand in a tower's rows.
struct VisionLayout {
  std::vector<PatchOnGrid> places;     // [rows]
  std::vector<Position3> positions;    // [rows]
  std::vector<std::int32_t> token_of;  // [rows / merge^2]; negative: padding
  std::vector<AttentionTile> tiles;    // [rows / 64]: the rows that are no padding
};

/// Tokens window by window, those at the right and at the bottom smaller, each window from a whole
/// tile on; without windows, row by row. rows, cols: tokens of a grid.
inline VisionLayout vision_layout(const CudaVisionShape& s, std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kTile = kChunkTile;
  const std::int64_t side =
      s.window_size == 0 ? std::max(rows, cols) : s.window_size / s.patch_size / s.merge;
  VisionLayout layout;
  const auto pad = [&] {
    while (static_cast<std::int64_t>(layout.places.size()) % kTile != 0) {
      layout.token_of.push_back(-1);
      for (std::int64_t i = 0; i < s.merge * s.merge; ++i) {
        layout.places.push_back({-1, -1});
        layout.positions.push_back({});
      }
    }
  };
  for (std::int64_t y = 0; y < rows; y += side)
    for (std::int64_t x = 0; x < cols; x += side) {
      for (std::int64_t r = y; r < std::min(y + side, rows); ++r)
        for (std::int64_t c = x; c < std::min(x + side, cols); ++c) {
          layout.token_of.push_back(static_cast<std::int32_t>(r * cols + c));
          for (std::int64_t i = 0; i < s.merge * s.merge; ++i) {
            const std::int64_t row = r * s.merge + i / s.merge;
            const std::int64_t col = c * s.merge + i % s.merge;
            layout.places.push_back(
                {static_cast<std::int32_t>(row), static_cast<std::int32_t>(col)});
            layout.positions.push_back({0, static_cast<Position>(row), static_cast<Position>(col)});
          }
        }
      pad();
    }
  const auto count = static_cast<std::int64_t>(layout.places.size());
  for (std::int64_t first = 0; first < count; first += kTile) {
    std::int32_t held = 0;
    for (std::int64_t i = first; i < first + kTile; ++i)
      held += layout.places[static_cast<std::size_t>(i)].y >= 0 ? 1 : 0;
    layout.tiles.push_back({static_cast<std::int32_t>(first), held, 0, AttentionTile::kOld});
  }
  return layout;
}

struct VisionPatchParams {
  const std::uint8_t* frames;  // [grid_frames, height, width, channels]
  const PatchOnGrid* places;   // [rows]
  const float* values;         // [channels, 256], normalised
  std::uint16_t* patches;      // [rows, channels, grid_frames, patch, patch]
  int height;
  int width;
  int channels;
  int grid_frames;
  int patch;
};

/// Pixels to normalised patches: a block per row.
template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    vision_patch_kernel(const __grid_constant__ VisionPatchParams p) {
  const PatchOnGrid place = p.places[blockIdx.x];
  const int square = p.patch * p.patch;
  const int count = p.channels * p.grid_frames * square;
  std::uint16_t* const to = p.patches + static_cast<std::int64_t>(blockIdx.x) * count;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kRowThreads) {
    float value = 0;
    if (place.y >= 0) {
      const int channel = i / (p.grid_frames * square);
      const int frame = i / square % p.grid_frames;
      const int row = place.y * p.patch + i / p.patch % p.patch;
      const int col = place.x * p.patch + i % p.patch;
      const std::int64_t pixel =
          (static_cast<std::int64_t>(frame * p.height + row) * p.width + col) * p.channels +
          channel;
      value = p.values[channel * 256 + p.frames[pixel]];
    }
    to[i] = static_cast<std::uint16_t>(Half<Element>::pack(value, 0));
  }
}

/// y += bias in every row.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    vision_bias_kernel(float* y, const float* bias, std::int64_t count, int cols) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) y[i] += bias[i % cols];
}

/// y = GELU(x + bias), the form with the error function, rounded once. bias may be null.
template <class Element>
__global__ void __launch_bounds__(kRowThreads)
    vision_gelu_kernel(const float* x, const float* bias, std::uint16_t* y, std::int64_t count,
                       int cols) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= count) return;
  const float v = x[i] + (bias == nullptr ? 0.0F : bias[i % cols]);
  y[i] = static_cast<std::uint16_t>(Half<Element>::pack(0.5F * v * (1 + erff(v * 0.70710678F)), 0));
}

/// Tokens from the tower's order back into rows and columns, bias added: a block per token of the
/// tower's. bias may be null; padding goes nowhere.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    vision_token_kernel(const float* from, const float* bias, const std::int32_t* token_of,
                        float* to, int width) {
  const std::int64_t token = token_of[blockIdx.x];
  if (token < 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kThreads)
    to[token * width + i] = from[static_cast<std::int64_t>(blockIdx.x) * width + i] +
                            (bias == nullptr ? 0.0F : bias[i]);
}

}  // namespace detail

/// Encodes grids of one size. Scratch is allocated by the constructor (and by cuBLASLt at the first
/// grid); encode() enqueues on the stream and returns. One stream at a time.
///
/// Patches stand window by window, each window in 64 rows of its own: what it lacks of 64 is
/// padding that nobody sees, so one tile of keys is one window. Arithmetic: inputs of products,
/// queries, keys, values and weights of attention are rounded to Element, sums are float32.
template <class Element, int kHeadDim>
class CudaVisionTower {
 public:
  /// rows, cols: tokens of a grid, that is patches / merge. The weights must outlive the tower.
  /// \throws Error(kShape) if extents do not fit, Error(kDevice).
  CudaVisionTower(const CudaVisionWeights<Element>& weights, std::int64_t rows, std::int64_t cols,
                  cudaStream_t stream)
      : weights_(&weights),
        stream_(stream),
        rows_(require(rows, "rows")),
        cols_(require(cols, "cols")),
        layout_(detail::vision_layout(weights.shape(), rows, cols)),
        attention_(weights.shape().num_heads, weights.shape().num_heads,
                   frequencies(weights.shape()), 0, kHeadDim / 4, patch_rows(), 1) {
    const CudaVisionShape& s = shape();
    if (s.head_dim() != kHeadDim)
      throw Error(ErrorCode::kShape, {"heads of another size", "CudaVisionTower", "head_dim",
                                      std::to_string(kHeadDim), std::to_string(s.head_dim())});
    const auto room = [&](std::int64_t width) {
      return static_cast<std::size_t>(patch_rows() * width);
    };
    pixels_ = Buffer<std::uint8_t, cuda>(static_cast<std::size_t>(frame_bytes() * s.grid_frames));
    patches_ = Buffer<Element, cuda>(room(s.patch_values()));
    hidden_ = Buffer<float, cuda>(room(s.width));
    rounded_ = Buffer<Element, cuda>(room(std::max(s.width, s.stored_feed_forward())));
    fused_ = Buffer<float, cuda>(room(3 * s.width));
    gate_up_ = Buffer<float, cuda>(room(2 * s.stored_feed_forward()));
    keys_ = Buffer<Element, cuda>(room(s.width));
    values_ = Buffer<Element, cuda>(room(s.width));
    merged_ = Buffer<float, cuda>(room(s.width));
    windowed_ = Buffer<float, cuda>(static_cast<std::size_t>(groups() * s.out_width));
    tokens_ = Buffer<float, cuda>(static_cast<std::size_t>(tokens() * s.out_width));
    std::vector<float> table;
    for (std::size_t c = 0; c < static_cast<std::size_t>(s.channels); ++c)
      for (int v = 0; v < 256; ++v)
        table.push_back(static_cast<float>((v / 255.0 - s.mean[c]) / s.deviation[c]));
    normalised_ = Buffer<float, cuda>(std::span<const float>(table));
    std::vector<std::int32_t> slots;
    for (std::int32_t row = 0; row < static_cast<std::int32_t>(patch_rows()); ++row)
      slots.push_back(row);
    places_ =
        Buffer<detail::PatchOnGrid, cuda>(std::span<const detail::PatchOnGrid>(layout_.places));
    token_of_ = Buffer<std::int32_t, cuda>(std::span<const std::int32_t>(layout_.token_of));
    positions_ = Buffer<Position3, cuda>(std::span<const Position3>(layout_.positions));
    slots_ = Buffer<std::int32_t, cuda>(std::span<const std::int32_t>(slots));
    tiles_ = Buffer<AttentionTile, cuda>(std::span<const AttentionTile>(layout_.tiles));
    detail::TileStep step{};
    step.num_tiles = static_cast<std::int32_t>(layout_.tiles.size());
    step.num_places = 1;
    step_ = Buffer<detail::TileStep, cuda>(std::span<const detail::TileStep>(&step, 1));
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // buffers are zero
  }

  const CudaVisionShape& shape() const { return weights_->shape(); }
  std::int64_t tokens() const { return rows_ * cols_; }
  std::int64_t width() const { return cols_ * shape().merge * shape().patch_size; }   ///< pixels
  std::int64_t height() const { return rows_ * shape().merge * shape().patch_size; }  ///< pixels
  /// Bytes of one frame, [height, width, channels].
  std::int64_t frame_bytes() const { return height() * width() * shape().channels; }

  /// Encodes a grid. frames: [grid_frames, height, width, channels] in host memory, pinned where
  /// the host is not to wait; not to be written before the stream has taken it. Returns [tokens(),
  /// out_width] float32 in device memory, valid until the next call. \throws Error(kDevice).
  const float* encode(const std::uint8_t* frames) {
    const CudaVisionShape& s = shape();
    const std::int64_t n = patch_rows();
    check_cuda(
        cudaMemcpyAsync(pixels_.data(), frames, pixels_.bytes(), cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync");
    detail::vision_patch_kernel<Element>
        <<<static_cast<unsigned>(n), detail::kRowThreads, 0, stream_>>>(
            {.frames = pixels_.data(),
             .places = places_.data(),
             .values = normalised_.data(),
             .patches = reinterpret_cast<std::uint16_t*>(patches_.data()),
             .height = static_cast<int>(height()),
             .width = static_cast<int>(width()),
             .channels = static_cast<int>(s.channels),
             .grid_frames = static_cast<int>(s.grid_frames),
             .patch = static_cast<int>(s.patch_size)});
    check_cuda(cudaGetLastError(), "vision_patch_kernel");
    products_.launch(weights_->patches.data(), s.width, s.patch_values(), patches_.data(), n,
                     hidden_.data(), false, stream_);
    detail::TileAppendParams p{};
    p.fused = fused_.data();
    p.step = step_.data();
    p.positions = positions_.data();
    p.slots = slots_.data();
    p.keys = reinterpret_cast<std::uint16_t*>(keys_.data());
    p.values = reinterpret_cast<std::uint16_t*>(values_.data());
    p.head_stride = n * kHeadDim;
    attention_.rotate(p, n, stream_);
    const std::int64_t wide = s.stored_feed_forward();
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const CudaVisionLayer<Element>& w = weights_->layers[static_cast<std::size_t>(l)];
      norm(w.attention_norm);
      products_.launch(w.query_key_value.data(), 3 * s.width, s.width, rounded_.data(), n,
                       fused_.data(), false, stream_);
      p.bias = w.query_key_value_bias.data();
      attention_.launch(
          p, tiles_.data(), !s.is_whole(l), 1 / std::sqrt(static_cast<float>(kHeadDim)), n,
          static_cast<std::int64_t>(layout_.tiles.size()), rounded_.data(), false, stream_);
      products_.launch(w.output.data(), s.width, s.width, rounded_.data(), n, hidden_.data(), true,
                       stream_);
      add_bias(w.output_bias, hidden_);
      norm(w.feed_forward_norm);
      products_.launch(w.gate_up.data(), 2 * wide, s.width, rounded_.data(), n, gate_up_.data(),
                       false, stream_);
      add_bias(w.gate_up_bias, gate_up_);
      const std::int64_t elements = n * wide;
      detail::gated_silu_kernel<Element>
          <<<blocks_of(elements / 2), detail::kRowThreads, 0, stream_>>>(
              gate_up_.data(), reinterpret_cast<std::uint16_t*>(rounded_.data()), elements);
      check_cuda(cudaGetLastError(), "gated_silu_kernel");
      products_.launch(w.down.data(), s.width, wide, rounded_.data(), n, hidden_.data(), true,
                       stream_);
      add_bias(w.down_bias, hidden_);
    }
    norm(weights_->merger_norm);
    const std::int64_t merged = s.merged_width();
    products_.launch(weights_->merger_first.data(), merged, merged, rounded_.data(), groups(),
                     merged_.data(), false, stream_);
    detail::vision_gelu_kernel<Element>
        <<<blocks_of(groups() * merged), detail::kRowThreads, 0, stream_>>>(
            merged_.data(), weights_->merger_first_bias.data(),
            reinterpret_cast<std::uint16_t*>(rounded_.data()), groups() * merged,
            static_cast<int>(merged));
    check_cuda(cudaGetLastError(), "vision_gelu_kernel");
    products_.launch(weights_->merger_second.data(), s.out_width, merged, rounded_.data(), groups(),
                     windowed_.data(), false, stream_);
    detail::vision_token_kernel<detail::kRowThreads>
        <<<static_cast<unsigned>(groups()), detail::kRowThreads, 0, stream_>>>(
            windowed_.data(), weights_->merger_second_bias.data(), token_of_.data(), tokens_.data(),
            static_cast<int>(s.out_width));
    check_cuda(cudaGetLastError(), "vision_token_kernel");
    return tokens_.data();
  }

 private:
  static std::int64_t require(std::int64_t extent, const char* field) {
    if (extent < 1 || extent > 1024)
      throw Error(ErrorCode::kShape, {"value out of range", "CudaVisionTower", field, "1 to 1024",
                                      std::to_string(extent)});
    return extent;
  }
  /// Both halves of the pairs turn by the same frequencies, one by rows and one by columns.
  static std::vector<double> frequencies(const CudaVisionShape& s) {
    constexpr int kPairs = kHeadDim / 2;
    std::vector<double> result;
    for (int i = 0; i < kPairs; ++i)
      result.push_back(std::pow(s.rope_theta, -2.0 * (i % (kPairs / 2)) / kPairs));
    return result;
  }

  std::int64_t patch_rows() const { return static_cast<std::int64_t>(layout_.places.size()); }
  /// Tokens of the tower's order, padding included.
  std::int64_t groups() const { return static_cast<std::int64_t>(layout_.token_of.size()); }
  static unsigned blocks_of(std::int64_t elements) {
    return static_cast<unsigned>((elements + detail::kRowThreads - 1) / detail::kRowThreads);
  }
  void norm(const Buffer<float, cuda>& weight) {
    detail::rms_norm_kernel<Element>
        <<<static_cast<unsigned>(patch_rows()), detail::kRowThreads, 0, stream_>>>(
            hidden_.data(), weight.data(), static_cast<float>(shape().norm_eps),
            reinterpret_cast<std::uint16_t*>(rounded_.data()), static_cast<int>(shape().width));
    check_cuda(cudaGetLastError(), "rms_norm_kernel");
  }
  /// Adds a bias, where there is one, to all rows.
  void add_bias(const Buffer<float, cuda>& bias, Buffer<float, cuda>& rows) {
    if (bias.size() == 0) return;
    const std::int64_t count = patch_rows() * static_cast<std::int64_t>(bias.size());
    detail::vision_bias_kernel<detail::kRowThreads>
        <<<blocks_of(count), detail::kRowThreads, 0, stream_>>>(rows.data(), bias.data(), count,
                                                                static_cast<int>(bias.size()));
    check_cuda(cudaGetLastError(), "vision_bias_kernel");
  }

  const CudaVisionWeights<Element>* weights_;
  cudaStream_t stream_;
  std::int64_t rows_;
  std::int64_t cols_;
  detail::VisionLayout layout_;
  TileAttentionPlan<Element, kHeadDim> attention_;
  MatrixProducts<Element> products_;
  Buffer<std::uint8_t, cuda> pixels_;  // [grid_frames, height, width, channels]
  Buffer<Element, cuda> patches_;      // [rows, patch_values]
  Buffer<float, cuda> hidden_;         // [rows, width]
  Buffer<Element, cuda> rounded_;      // inputs of products
  Buffer<float, cuda> fused_;          // [rows, 3 width]
  Buffer<float, cuda> gate_up_;        // [rows, 2 stored_feed_forward]
  Buffer<Element, cuda> keys_;         // [heads, rows, head_dim]
  Buffer<Element, cuda> values_;       // the same
  Buffer<float, cuda> merged_;         // [groups, merged_width]
  Buffer<float, cuda> windowed_;       // [groups, out_width]
  Buffer<float, cuda> tokens_;         // [tokens, out_width]
  Buffer<float, cuda> normalised_;     // [channels, 256]
  Buffer<detail::PatchOnGrid, cuda> places_;
  Buffer<std::int32_t, cuda> token_of_;
  Buffer<Position3, cuda> positions_;
  Buffer<std::int32_t, cuda> slots_;
  Buffer<AttentionTile, cuda> tiles_;
  Buffer<detail::TileStep, cuda> step_;
};

}  // namespace sluice
