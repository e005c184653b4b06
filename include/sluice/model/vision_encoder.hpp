// SPDX-License-Identifier: MIT
/// A vision encoder for the frames of a stream: patches, layers of attention in windows or over the
/// whole frame with rotations on two axes, neighbouring patches merged into the tokens that a
/// decoder reads. The geometry of Qwen2.5-VL (arXiv 2502.13923, section 2.1.1).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/named_tensors.hpp"
#include "sluice/model/vision_encoder_config.hpp"
#include "sluice/nn/activation.hpp"
#include "sluice/nn/norm.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/weight_matrix.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Weights of a vision encoder. Const after construction: any number of workspaces and threads.
///
/// Tensor names are those of Transformers' Qwen2_5_VisionTransformer: patch_embed.proj.weight,
/// blocks.N.{norm1, attn.qkv, attn.proj, norm2, mlp.gate_proj, mlp.up_proj, mlp.down_proj},
/// merger.{ln_q, mlp.0, mlp.2}.
class VisionEncoder {
 public:
  /// \throws Error(kFormat) for a missing tensor, Error(kShape) for one of another shape,
  /// Error(kConfig) for extents that make no sense.
  VisionEncoder(VisionEncoderConfig config, const NamedTensors& tensors)
      : config_(std::move(config)) {
    check(config_);
    const std::int64_t width = config_.width;
    const std::int64_t wide = config_.feed_forward_width;
    const std::int64_t merged = width * config_.merge * config_.merge;
    embed_ = PackedLinear(WeightMatrix::of(tensors
                                               .get("patch_embed.proj.weight",
                                                    {width, config_.channels, config_.grid_frames,
                                                     config_.patch_size, config_.patch_size})
                                               .data(),
                                           width, config_.patch_values()),
                          nullptr, "patch_embed.proj");
    for (std::int64_t l = 0; l < config_.num_layers; ++l) {
      const std::string at = "blocks." + std::to_string(l) + ".";
      Layer layer;
      layer.attention_norm = tensors.get(at + "norm1.weight", {width});
      layer.query_key_value = linear(tensors, at + "attn.qkv", 3 * width, width);
      layer.output = linear(tensors, at + "attn.proj", width, width);
      layer.feed_forward_norm = tensors.get(at + "norm2.weight", {width});
      layer.gate = linear(tensors, at + "mlp.gate_proj", wide, width);
      layer.up = linear(tensors, at + "mlp.up_proj", wide, width);
      layer.down = linear(tensors, at + "mlp.down_proj", width, wide);
      layer.whole = config_.window_size == 0 ||
                    std::find(config_.whole_layers.begin(), config_.whole_layers.end(), l) !=
                        config_.whole_layers.end();
      layers_.push_back(std::move(layer));
    }
    merger_norm_ = tensors.get("merger.ln_q.weight", {width});
    merger_first_ = linear(tensors, "merger.mlp.0", merged, merged);
    merger_second_ = linear(tensors, "merger.mlp.2", config_.out_width, merged);
  }

  /// Weights from a seed, for measuring and for programs without a model.
  static VisionEncoder random(const VisionEncoderConfig& config, std::uint64_t seed) {
    check(config);
    RandomTensors made(seed);
    const std::int64_t width = config.width;
    const std::int64_t wide = config.feed_forward_width;
    const std::int64_t merged = width * config.merge * config.merge;
    const auto linear = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
      made.matrix(name + ".weight", {rows, cols});
    };
    made.matrix("patch_embed.proj.weight",
                {width, config.channels, config.grid_frames, config.patch_size, config.patch_size});
    for (std::int64_t l = 0; l < config.num_layers; ++l) {
      const std::string at = "blocks." + std::to_string(l) + ".";
      made.vector(at + "norm1.weight", width, 1).vector(at + "norm2.weight", width, 1);
      linear(at + "attn.qkv", 3 * width, width);
      linear(at + "attn.proj", width, width);
      linear(at + "mlp.gate_proj", wide, width);
      linear(at + "mlp.up_proj", wide, width);
      linear(at + "mlp.down_proj", width, wide);
    }
    made.vector("merger.ln_q.weight", width, 1);
    linear("merger.mlp.0", merged, merged);
    linear("merger.mlp.2", config.out_width, merged);
    return VisionEncoder(config, made.tensors());
  }

  const VisionEncoderConfig& config() const { return config_; }
  /// Bytes of weights.
  std::size_t bytes() const {
    std::size_t sum = embed_.bytes() + merger_first_.bytes() + merger_second_.bytes();
    for (const Layer& layer : layers_)
      sum += layer.query_key_value.bytes() + layer.output.bytes() + layer.gate.bytes() +
             layer.up.bytes() + layer.down.bytes();
    return sum;
  }

  /// What encoding grids of one size needs: order of patches, rotations, room to work in.
  class Workspace {
   public:
    /// rows, cols: tokens of a grid, that is patches / merge.
    /// \throws Error(kConfig) unless both are positive. Allocates.
    Workspace(const VisionEncoder& encoder, std::int64_t rows, std::int64_t cols, int team_size)
        : rows_(rows), cols_(cols) {
      for (const auto& [name, value] : {std::pair{"rows", rows}, std::pair{"cols", cols}})
        if (value < 1)
          throw Error(ErrorCode::kConfig, {"value out of range", "VisionEncoder::Workspace", name,
                                           "at least 1", std::to_string(value)});
      const VisionEncoderConfig& c = encoder.config_;
      const std::int64_t merge = c.merge;
      const std::int64_t patches = rows * cols * merge * merge;
      encoder.place_windows(rows, cols, order_, windows_);
      const int pairs = static_cast<int>(c.head_dim() / 2);
      // Both halves of the pairs turn by the same frequencies, one by rows and one by columns.
      RotaryConfig rotary{.head_dim = static_cast<int>(c.head_dim()),
                          .rotary_dim = static_cast<int>(c.head_dim()),
                          .theta = c.rope_theta,
                          .sections = {0, pairs / 2, pairs - pairs / 2}};
      for (int i = 0; i < pairs; ++i) {
        const double plain = std::pow(c.rope_theta, -2.0 * i / static_cast<double>(2 * pairs));
        const double wanted =
            std::pow(c.rope_theta, -2.0 * (i % (pairs / 2)) / static_cast<double>(pairs));
        rotary.frequency_factors.push_back(static_cast<float>(plain / wanted));
      }
      rotary_ = std::make_unique<RotaryTable>(Rotary(rotary), patches);
      std::vector<Position3> positions;
      for (const std::int64_t token : order_)
        for (std::int64_t p = 0; p < merge * merge; ++p)
          positions.push_back({0, static_cast<Position>(token / cols * merge + p / merge),
                               static_cast<Position>(token % cols * merge + p % merge)});
      rotary_->fill(positions);
      attention_ =
          std::make_unique<AttentionWorkspace<cpu>>(nullptr,
                                                    AttentionShape{.num_qo_heads = c.num_heads,
                                                                   .num_kv_heads = c.num_heads,
                                                                   .head_dim = c.head_dim(),
                                                                   .value_dim = c.head_dim(),
                                                                   .max_queries = patches,
                                                                   .max_keys = patches,
                                                                   .max_segments = 1,
                                                                   .max_places = 1},
                                                    team_size);
      const auto room = [&](std::int64_t width) {
        return Buffer<float>(static_cast<std::size_t>(patches * width));
      };
      hidden_ = room(c.width);
      normed_ = room(c.width);
      fused_ = room(3 * c.width);
      attended_ = room(c.width);
      gate_ = room(c.feed_forward_width);
      up_ = room(c.feed_forward_width);
      tokens_ = Buffer<float>(static_cast<std::size_t>(rows * cols * c.out_width));
    }

    std::int64_t rows() const { return rows_; }
    std::int64_t cols() const { return cols_; }
    std::int64_t tokens() const { return rows_ * cols_; }

   private:
    friend class VisionEncoder;
    std::int64_t rows_;
    std::int64_t cols_;
    std::vector<std::int64_t> order_;    // [tokens]: the token that stands there, window by window
    std::vector<std::int64_t> windows_;  // ends of windows, in patches
    std::unique_ptr<RotaryTable> rotary_;
    std::unique_ptr<AttentionWorkspace<cpu>> attention_;
    Buffer<float> hidden_;
    Buffer<float> normed_;
    Buffer<float> fused_;  // [patches, 3 (query, key, value), heads, head_dim]
    Buffer<float> attended_;
    Buffer<float> gate_;
    Buffer<float> up_;
    Buffer<float> tokens_;
  };

  /// Encodes one grid. patches: [tokens * merge^2, patch_values()], the merge^2 patches of a token
  /// side by side, tokens row by row: what PatchRows cuts (nn/patch_embedding.hpp). Returns
  /// [tokens, out_width], valid until the workspace is used again. Allocates nothing.
  MatrixView<const float> encode(MatrixView<const float> patches, Workspace& w,
                                 ThreadTeam& team) const {
    const VisionEncoderConfig& c = config_;
    const std::int64_t group = c.merge * c.merge;
    const std::int64_t count = w.tokens() * group;
    SLUICE_ASSERT(patches.rows == count && patches.cols == c.patch_values());
    const auto eps = static_cast<float>(c.norm_eps);
    const auto view = [&](Buffer<float>& buffer, std::int64_t width) {
      return MatrixView<float>(buffer.data(), count, width);
    };
    const MatrixView<float> hidden = view(w.hidden_, c.width);
    const MatrixView<float> normed = view(w.normed_, c.width);
    const MatrixView<float> fused = view(w.fused_, 3 * c.width);
    const MatrixView<float> attended = view(w.attended_, c.width);
    const MatrixView<float> gate = view(w.gate_, c.feed_forward_width);
    const MatrixView<float> up = view(w.up_, c.feed_forward_width);
    const auto each = [&](std::int64_t rows, auto&& function) {
      team.for_each_range(rows, kRows, [&](WorkRange range, int) {
        function(range.begin, range.end - range.begin);
      });
    };
    const auto add = [](MatrixView<const float> x, MatrixView<float> y) {
      for (std::int64_t t = 0; t < x.rows; ++t)
        for (std::int64_t i = 0; i < x.cols; ++i) y.row(t)[i] += x.row(t)[i];
    };

    each(w.tokens(), [&](std::int64_t first, std::int64_t rows) {
      for (std::int64_t t = first; t < first + rows; ++t)
        embed_.apply(patches.middle_rows(w.order_[static_cast<std::size_t>(t)] * group, group),
                     hidden.middle_rows(t * group, group));
    });
    for (const Layer& layer : layers_) {
      each(count, [&](std::int64_t first, std::int64_t rows) {
        const auto part = [&](MatrixView<float> x) {
          return x.middle_rows(first, rows);
        };
        rms_norm(part(hidden), layer.attention_norm.data(), eps, part(normed));
        layer.query_key_value.apply(part(normed), part(fused));
        for (std::int64_t t = first; t < first + rows; ++t)  // queries and keys
          w.rotary_->rotary().rotate_heads(w.rotary_->row(t), fused.row(t), 2 * c.num_heads,
                                           fused.row(t));
      });
      std::int64_t begin = 0;
      if (layer.whole) {
        attend_within(0, count, fused, attended, w, team);
      } else {
        for (const std::int64_t end : w.windows_) {
          attend_within(begin, end - begin, fused, attended, w, team);
          begin = end;
        }
      }
      each(count, [&](std::int64_t first, std::int64_t rows) {
        const auto part = [&](MatrixView<float> x) {
          return x.middle_rows(first, rows);
        };
        layer.output.apply(part(attended), part(normed));
        add(part(normed), part(hidden));
        rms_norm(part(hidden), layer.feed_forward_norm.data(), eps, part(normed));
        layer.gate.apply(part(normed), part(gate));
        layer.up.apply(part(normed), part(up));
        gate_up(Activation::kSilu, part(gate).data, part(up).data, part(gate).data,
                rows * c.feed_forward_width);
        layer.down.apply(part(gate), part(normed));
        add(part(normed), part(hidden));
      });
    }
    const std::int64_t merged = group * c.width;
    const MatrixView<float> out(w.tokens_.data(), w.tokens(), c.out_width);
    each(w.tokens(), [&](std::int64_t first, std::int64_t rows) {
      rms_norm(hidden.middle_rows(first * group, rows * group), merger_norm_.data(), eps,
               normed.middle_rows(first * group, rows * group));
      const MatrixView<const float> wide(w.normed_.data() + first * merged, rows, merged);
      const MatrixView<float> middle(w.fused_.data() + first * merged, rows, merged);
      merger_first_.apply(wide, middle);
      const auto values = static_cast<std::size_t>(rows * merged);
      activate(Activation::kGelu, {middle.data, values}, {middle.data, values});
      for (std::int64_t t = 0; t < rows; ++t)  // back to rows and columns
        merger_second_.apply(middle.middle_rows(t, 1),
                             out.middle_rows(w.order_[static_cast<std::size_t>(first + t)], 1));
    });
    return out;
  }

 private:
  /// Rows that a thread takes at a time.
  static constexpr std::int64_t kRows = 24;

  struct Layer {
    std::vector<float> attention_norm;
    PackedLinear query_key_value;
    PackedLinear output;
    std::vector<float> feed_forward_norm;
    PackedLinear gate;
    PackedLinear up;
    PackedLinear down;
    bool whole = true;
  };

  static void check(const VisionEncoderConfig& c) {
    constexpr const char* kWhere = "VisionEncoderConfig";
    for (const auto& [name, value] :
         {std::pair{"width", c.width}, std::pair{"num_layers", c.num_layers},
          std::pair{"num_heads", c.num_heads},
          std::pair{"feed_forward_width", c.feed_forward_width},
          std::pair{"out_width", c.out_width}, std::pair{"patch_size", c.patch_size},
          std::pair{"grid_frames", c.grid_frames}, std::pair{"channels", c.channels},
          std::pair{"merge", c.merge}})
      if (value < 1 || value > (std::int64_t{1} << 20))
        throw Error(ErrorCode::kConfig,
                    {"value out of range", kWhere, name, "1 to 2^20", std::to_string(value)});
    if (c.width % c.num_heads != 0 || c.head_dim() % 4 != 0)
      throw Error(ErrorCode::kConfig, {"heads need pairs for both axes", kWhere, "num_heads",
                                       "a divisor of the width that leaves a multiple of 4",
                                       std::to_string(c.num_heads)});
    if (c.window_size < 0 || c.window_size % (c.patch_size * c.merge) != 0)
      throw Error(ErrorCode::kConfig, {"windows do not hold whole tokens", kWhere, "window_size",
                                       "a multiple of " + std::to_string(c.patch_size * c.merge),
                                       std::to_string(c.window_size)});
  }
  static PackedLinear linear(const NamedTensors& tensors, const std::string& name,
                             std::int64_t rows, std::int64_t cols) {
    const std::vector<float>& weight = tensors.get(name + ".weight", {rows, cols});
    const std::vector<float> bias = tensors.optional(name + ".bias", {rows});
    return PackedLinear(WeightMatrix::of(weight.data(), rows, cols),
                        bias.empty() ? nullptr : bias.data(), name);
  }

  /// Tokens window by window, those at the right and at the bottom smaller; and where windows end.
  void place_windows(std::int64_t rows, std::int64_t cols, std::vector<std::int64_t>& order,
                     std::vector<std::int64_t>& windows) const {
    const std::int64_t side = config_.window_size == 0
                                  ? std::max(rows, cols)
                                  : config_.window_size / config_.patch_size / config_.merge;
    for (std::int64_t y = 0; y < rows; y += side)
      for (std::int64_t x = 0; x < cols; x += side) {
        for (std::int64_t r = y; r < std::min(y + side, rows); ++r)
          for (std::int64_t col = x; col < std::min(x + side, cols); ++col)
            order.push_back(r * cols + col);
        windows.push_back(static_cast<std::int64_t>(order.size()) * config_.merge * config_.merge);
      }
  }

  /// Patches [first, first + count) among themselves.
  void attend_within(std::int64_t first, std::int64_t count, MatrixView<float> fused,
                     MatrixView<float> out, Workspace& w, ThreadTeam& team) const {
    const VisionEncoderConfig& c = config_;
    Segment<float> segment;
    segment.rule.count = segment.rule.visible = count;
    segment.keys = fused.row(first) + c.width;
    segment.values = fused.row(first) + 2 * c.width;
    segment.key_head_stride = segment.value_head_stride = c.head_dim();
    segment.key_token_stride = segment.value_token_stride = 3 * c.width;
    attend(AttentionQuery{{fused.row(first), count, c.num_heads, c.head_dim(), 3 * c.width}},
           std::span<const Segment<float>>(&segment, 1),
           AttentionVariant<AllVisible>{1 / std::sqrt(static_cast<float>(c.head_dim()))},
           HeadsView<float>(out.row(first), count, c.num_heads, c.head_dim()), nullptr,
           *w.attention_, team, cpu{});
  }

  VisionEncoderConfig config_;
  PackedLinear embed_;
  std::vector<Layer> layers_;
  std::vector<float> merger_norm_;
  PackedLinear merger_first_;
  PackedLinear merger_second_;
};

}  // namespace sluice
