// SPDX-License-Identifier: MIT
/// Layers that see one frame at a time: linear layers, activations, gates, normalisation over the
/// channels of a frame, batch normalisation with its trained statistics; and group normalisation
/// over everything so far. Normalisation over a whole utterance needs the future: there is none.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/activation.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

namespace detail {

// What layers without memory have in common; `Layer` has apply(in, out), rows for rows.
template <class Layer>
class FrameMap {
 public:
  struct State {};

  std::int64_t in_width() const { return in_width_; }
  std::int64_t out_width() const { return out_width_; }
  State make_state() const { return {}; }
  std::int64_t step(MatrixView<const float> in, State& /*state*/, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == in_width_ && out.cols == out_width_);
    static_cast<const Layer&>(*this).apply(in, out.middle_rows(0, in.rows));
    return in.rows;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& /*state*/) const {}
  std::int64_t max_outputs(std::int64_t frames) const { return frames; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const { return 0; }
  void save(const State& /*state*/, ByteWriter& /*writer*/) const {}
  void restore(ByteReader& /*reader*/, State& /*state*/) const {}
  StreamTiming timing() const { return {}; }

 protected:
  FrameMap(std::int64_t in_width, std::int64_t out_width, const char* where)
      : in_width_(in_width), out_width_(out_width) {
    require_positive(in_width, where, "in_width");
    require_positive(out_width, where, "out_width");
  }

 private:
  std::int64_t in_width_;
  std::int64_t out_width_;
};

// The sum of value(0) .. value(count - 1) as eight sums side by side, so that it is vector code.
template <class Value>
double sum_in_lanes(std::int64_t count, Value&& value) {
  constexpr std::int64_t kLanes = 8;
  double lanes[kLanes] = {};
  std::int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    for (std::int64_t i = 0; i < kLanes; ++i) lanes[i] += value(c + i);
  double sum = 0.0;
  for (; c < count; ++c) sum += value(c);
  for (const double lane : lanes) sum += lane;
  return sum;
}

[[gnu::always_inline]] inline simd::VecF sigmoid(simd::VecF x) {
  const simd::VecF one = simd::broadcast(1.0F);
  return one / (one + simd::exp(-x));
}

// (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x: within 1.5e-7.
[[gnu::always_inline]] inline simd::VecF tanh(simd::VecF x) {
  const simd::VecF one = simd::broadcast(1.0F);
  const simd::VecF zero = simd::zero();
  const simd::VecF power = simd::exp(simd::abs(x) * simd::broadcast(-2.0F));
  const simd::VecF size = (one - power) / (one + power);
  return simd::select_less(x, zero, -size, size);
}

}  // namespace detail

/// y_t = W x_t + bias. Frames: [time, cols] to [time, rows].
class FrameLinear : public detail::FrameMap<FrameLinear> {
 public:
  /// weight: [out, in]; bias: [out] or null. \throws Error(kShape). Allocates.
  explicit FrameLinear(const WeightMatrix& weight, const float* bias = nullptr)
      : FrameLinear(PackedLinear(weight, bias, "FrameLinear")) {}
  /// Shares weights that are packed already.
  explicit FrameLinear(PackedLinear linear)
      : FrameMap(linear.cols(), linear.rows(), "FrameLinear"), linear_(std::move(linear)) {}

  void apply(MatrixView<const float> x, MatrixView<float> y) const { linear_.apply(x, y); }

 private:
  PackedLinear linear_;
};

/// Functions of one value.
enum class FrameFunction {
  kRelu,
  kSilu,  ///< swish
  kGelu,
  kGeluTanh,
  kSigmoid,
  kTanh,
};

/// y_t[c] = function(x_t[c]). Frames: [time, width] to [time, width].
class FrameActivation : public detail::FrameMap<FrameActivation> {
 public:
  /// \throws Error(kConfig) unless width is positive.
  FrameActivation(FrameFunction function, std::int64_t width)
      : FrameMap(width, width, "FrameActivation"), function_(function) {}

  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    for (std::int64_t t = 0; t < x.rows; ++t) row(x.row(t), y.row(t));
  }

 private:
  void row(const float* x, float* y) const {
    const auto count = static_cast<std::size_t>(in_width());
    const auto each = [&](auto function) {
      detail::for_each_register(in_width(), y, [&](auto&& load) { return function(load(x)); });
    };
    switch (function_) {
      case FrameFunction::kRelu:
        // Not a maximum of registers, which loses a NaN.
        for (std::size_t i = 0; i < count; ++i) y[i] = x[i] < 0.0F ? 0.0F : x[i];
        return;
      case FrameFunction::kSilu: return activate(Activation::kSilu, {x, count}, {y, count});
      case FrameFunction::kGelu: return activate(Activation::kGelu, {x, count}, {y, count});
      case FrameFunction::kGeluTanh: return activate(Activation::kGeluTanh, {x, count}, {y, count});
      case FrameFunction::kSigmoid: return each([](simd::VecF v) { return detail::sigmoid(v); });
      case FrameFunction::kTanh: return each([](simd::VecF v) { return detail::tanh(v); });
    }
  }

  FrameFunction function_;
};

/// y_t = a sigmoid(b), x_t = a ++ b (gated linear unit, arXiv 1612.08083). Frames: [time, 2 width]
/// to [time, width].
class FrameGlu : public detail::FrameMap<FrameGlu> {
 public:
  /// \throws Error(kConfig) unless width, that of the output, is positive.
  explicit FrameGlu(std::int64_t width) : FrameMap(2 * width, width, "FrameGlu") {}

  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    const std::int64_t width = out_width();
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const float* a = x.row(t);
      detail::for_each_register(
          width, y.row(t), [&](auto&& load) { return load(a) * detail::sigmoid(load(a + width)); });
    }
  }
};

/// y_t[c] = scale[c] x_t[c] + shift[c]: batch normalisation with its running statistics, or
/// features normalised by a trained mean and deviation. Frames: [time, width] to [time, width].
class FrameAffine : public detail::FrameMap<FrameAffine> {
 public:
  /// scale, shift: [width]. \throws Error(kShape, kConfig) unless they are as long, and not empty.
  FrameAffine(std::vector<float> scale, std::vector<float> shift)
      : FrameMap(static_cast<std::int64_t>(scale.size()), static_cast<std::int64_t>(scale.size()),
                 "FrameAffine"),
        scale_(std::move(scale)),
        shift_(std::move(shift)) {
    detail::require_width(in_width(), static_cast<std::int64_t>(shift_.size()), "FrameAffine",
                          "shift");
  }

  /// Batch normalisation at inference (arXiv 1502.03167): gamma (x - mean) / sqrt(variance + eps) +
  /// beta, folded in float64. All: [width]. \throws Error(kShape, kConfig) unless they agree.
  static FrameAffine batch_norm(std::span<const float> mean, std::span<const float> variance,
                                std::span<const float> gamma, std::span<const float> beta,
                                double eps = 1e-5) {
    const auto width = static_cast<std::int64_t>(mean.size());
    for (const std::span<const float> other : {variance, gamma, beta})
      detail::require_width(width, static_cast<std::int64_t>(other.size()), "batch norm",
                            "statistics");
    std::vector<float> scale(mean.size());
    std::vector<float> shift(mean.size());
    for (std::size_t c = 0; c < mean.size(); ++c) {
      const double factor =
          static_cast<double>(gamma[c]) / std::sqrt(static_cast<double>(variance[c]) + eps);
      scale[c] = static_cast<float>(factor);
      shift[c] =
          static_cast<float>(static_cast<double>(beta[c]) - factor * static_cast<double>(mean[c]));
    }
    return {std::move(scale), std::move(shift)};
  }

  const std::vector<float>& scale() const { return scale_; }
  const std::vector<float>& shift() const { return shift_; }

  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const float* row = x.row(t);
      const float* scale = scale_.data();
      const float* shift = shift_.data();
      detail::for_each_register(in_width(), y.row(t), [&](auto&& load) {
        return simd::fma(load(row), load(scale), load(shift));
      });
    }
  }

 private:
  std::vector<float> scale_;
  std::vector<float> shift_;
};

/// Folds a normalisation behind a linear layer or a convolution into it: weight[o, :] times
/// scale[o], bias[o] times scale[o] plus shift[o]. weight: [scale.size() * row_size]; bias:
/// [scale.size()]. \throws Error(kShape) if sizes differ. Not for a layer whose output is padded
/// before the normalisation.
inline void fold_affine(const FrameAffine& affine, std::span<float> weight, std::span<float> bias) {
  const auto rows = static_cast<std::int64_t>(affine.scale().size());
  detail::require_width(rows, static_cast<std::int64_t>(bias.size()), "fold_affine", "bias");
  const std::int64_t row_size = static_cast<std::int64_t>(weight.size()) / rows;
  detail::require_width(rows * row_size, static_cast<std::int64_t>(weight.size()), "fold_affine",
                        "weight");
  for (std::int64_t o = 0; o < rows; ++o) {
    for (std::int64_t i = 0; i < row_size; ++i) weight[o * row_size + i] *= affine.scale()[o];
    bias[o] = affine.scale()[o] * bias[o] + affine.shift()[o];
  }
}

/// What FrameNorm subtracts and divides by.
enum class FrameNormKind {
  kLayer,       ///< mean and variance (arXiv 1607.06450)
  kMeanSquare,  ///< the root of the mean square, no mean (arXiv 1910.07467)
};

/// Normalisation over the channels of each frame, all of them or group by group (group
/// normalisation, arXiv 1803.08494, over a frame; over the time of a whole utterance it would need
/// the future: see StreamGroupNorm). Statistics are float64. Frames: [time, width] to [time,
/// width].
class FrameNorm : public detail::FrameMap<FrameNorm> {
 public:
  struct Config {
    FrameNormKind kind = FrameNormKind::kLayer;
    double eps = 1e-5;
    std::int64_t groups = 1;
    bool add_one_to_weight = false;  ///< stored weights are gamma - 1 (Moonshine v2)
  };

  /// weight: [width]; bias: [width] or empty. \throws Error(kShape, kConfig).
  FrameNorm(const Config& config, std::vector<float> weight, std::vector<float> bias = {})
      : FrameMap(static_cast<std::int64_t>(weight.size()), static_cast<std::int64_t>(weight.size()),
                 "FrameNorm"),
        config_(config),
        weight_(std::move(weight)),
        bias_(std::move(bias)) {
    if (bias_.empty()) bias_.resize(weight_.size());
    detail::require_width(in_width(), static_cast<std::int64_t>(bias_.size()), "FrameNorm", "bias");
    if (config_.groups < 1 || in_width() % config_.groups != 0)
      throw Error(ErrorCode::kConfig,
                  {"channels do not divide into groups", "FrameNorm", "groups",
                   "a divisor of " + std::to_string(in_width()), std::to_string(config_.groups)});
    if (config_.add_one_to_weight)
      for (float& value : weight_) value += 1.0F;
  }

  void apply(MatrixView<const float> x, MatrixView<float> y) const {
    const std::int64_t size = in_width() / config_.groups;
    for (std::int64_t t = 0; t < x.rows; ++t)
      for (std::int64_t g = 0; g < config_.groups; ++g) {
        const float* row = x.row(t) + g * size;
        float* target = y.row(t) + g * size;
        const float* weight = weight_.data() + g * size;
        const float* bias = bias_.data() + g * size;
        const double mean =
            config_.kind == FrameNormKind::kLayer
                ? detail::sum_in_lanes(
                      size, [&](std::int64_t c) { return static_cast<double>(row[c]); }) /
                      static_cast<double>(size)
                : 0.0;
        const double squares = detail::sum_in_lanes(size, [&](std::int64_t c) {
          const double d = static_cast<double>(row[c]) - mean;
          return d * d;
        });
        const auto scale =
            static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(size) + config_.eps));
        const auto center = static_cast<float>(mean);
        for (std::int64_t c = 0; c < size; ++c)
          target[c] = (row[c] - center) * scale * weight[c] + bias[c];
      }
  }

 private:
  Config config_;
  std::vector<float> weight_;
  std::vector<float> bias_;
};

/// Group normalisation over the frames so far: frame t is normalised by the mean and variance of
/// its group's channels in frames 0 .. t (the cumulative layer norm of Conv-TasNet, arXiv
/// 1809.07454, is one group). Statistics by Welford's method in float64. Frames: [time, width] to
/// [time, width]. A NaN stays in its group for good.
class StreamGroupNorm {
 public:
  struct State {
    std::vector<double> mean;     // [groups]
    std::vector<double> squares;  // [groups], of deviations from the mean
    std::int64_t frames = 0;
  };

  /// weight, bias: [width]. \throws Error(kShape, kConfig).
  StreamGroupNorm(std::int64_t groups, std::vector<float> weight, std::vector<float> bias,
                  double eps = 1e-5)
      : groups_(groups), weight_(std::move(weight)), bias_(std::move(bias)), eps_(eps) {
    detail::require_positive(in_width(), "StreamGroupNorm", "width");
    detail::require_width(in_width(), static_cast<std::int64_t>(bias_.size()), "StreamGroupNorm",
                          "bias");
    if (groups < 1 || in_width() % groups != 0)
      throw Error(ErrorCode::kConfig,
                  {"channels do not divide into groups", "StreamGroupNorm", "groups",
                   "a divisor of " + std::to_string(in_width()), std::to_string(groups)});
  }

  std::int64_t in_width() const { return static_cast<std::int64_t>(weight_.size()); }
  std::int64_t out_width() const { return in_width(); }
  State make_state() const {
    const auto groups = static_cast<std::size_t>(groups_);
    return {std::vector<double>(groups), std::vector<double>(groups), 0};
  }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == in_width());
    const std::int64_t size = in_width() / groups_;
    for (std::int64_t t = 0; t < in.rows; ++t) {
      const float* x = in.row(t);
      float* y = out.row(t);
      for (std::int64_t g = 0; g < groups_; ++g) {
        double count = static_cast<double>(state.frames) * static_cast<double>(size);
        for (std::int64_t c = g * size; c < (g + 1) * size; ++c) {
          const double value = static_cast<double>(x[c]);
          const double difference = value - state.mean[g];
          count += 1.0;
          state.mean[g] += difference / count;
          state.squares[g] += difference * (value - state.mean[g]);
        }
        const double scale = 1.0 / std::sqrt(state.squares[g] / count + eps_);
        for (std::int64_t c = g * size; c < (g + 1) * size; ++c)
          y[c] =
              static_cast<float>((static_cast<double>(x[c]) - state.mean[g]) * scale) * weight_[c] +
              bias_[c];
      }
      ++state.frames;
    }
    return in.rows;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& state) const {
    std::fill(state.mean.begin(), state.mean.end(), 0.0);
    std::fill(state.squares.begin(), state.squares.end(), 0.0);
    state.frames = 0;
  }
  std::int64_t max_outputs(std::int64_t frames) const { return frames; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const {
    return static_cast<std::size_t>(2 * groups_) * sizeof(double) + sizeof(std::int64_t);
  }
  void save(const State& state, ByteWriter& writer) const {
    writer.write(state.frames);
    writer.write_span(std::span<const double>(state.mean));
    writer.write_span(std::span<const double>(state.squares));
  }
  void restore(ByteReader& reader, State& state) const {
    const std::size_t at = reader.offset();
    state.frames = reader.read<std::int64_t>("frames");
    if (state.frames < 0)
      reader.fail_at(at, "count out of range", "frames", "at least 0",
                     std::to_string(state.frames));
    reader.read_span("mean", std::span<double>(state.mean));
    reader.read_span("squares", std::span<double>(state.squares));
  }
  StreamTiming timing() const { return {.left = kUnboundedFrames}; }

 private:
  std::int64_t groups_;
  std::vector<float> weight_;
  std::vector<float> bias_;
  double eps_;
};

}  // namespace sluice
