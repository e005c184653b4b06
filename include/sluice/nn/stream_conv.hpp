// SPDX-License-Identifier: MIT
/// Convolutions over a stream of frames: one-dimensional (dense, grouped, depthwise, strided,
/// dilated; causal, looking ahead or without padding), two-dimensional over time and features, and
/// transposed. Each equals its whole-sequence form for any chunks, bit for bit: the phase of the
/// stride is part of the state, which released systems leave out and demand chunks of whole strides
/// instead (kws_streaming, arXiv 2005.06720; NeMo; Moonshine).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/stream_window.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

namespace detail {

// A stored matrix as floats.
inline std::vector<float> widened(const WeightMatrix& weight) {
  std::vector<float> values(static_cast<std::size_t>(weight.rows * weight.cols));
  for (std::int64_t r = 0; r < weight.rows; ++r)
    dequantise(weight.type, weight.row(r), weight.cols, values.data() + r * weight.cols);
  return values;
}

inline void require_shape(const WeightMatrix& weight, std::int64_t rows, std::int64_t cols,
                          const char* where) {
  validate(weight, where);
  if (weight.rows != rows || weight.cols != cols)
    throw Error(ErrorCode::kShape,
                {"weights do not fit the layer", where, "shape",
                 std::to_string(rows) + " x " + std::to_string(cols),
                 std::to_string(weight.rows) + " x " + std::to_string(weight.cols)});
}

inline void require_groups(std::int64_t in_channels, std::int64_t out_channels, std::int64_t groups,
                           const char* where) {
  require_positive(in_channels, where, "in_channels");
  require_positive(out_channels, where, "out_channels");
  require_positive(groups, where, "groups");
  if (in_channels % groups != 0 || out_channels % groups != 0)
    throw Error(ErrorCode::kConfig, {"channels do not divide into groups", where, "groups",
                                     "a divisor of " + std::to_string(in_channels) + " and " +
                                         std::to_string(out_channels),
                                     std::to_string(groups)});
}

inline void require_size(std::size_t found, std::int64_t expected, const char* where,
                         const char* field) {
  if (found != 0 && found != static_cast<std::size_t>(expected))
    throw Error(ErrorCode::kShape, {"wrong number of values", where, field,
                                    std::to_string(expected) + " or none", std::to_string(found)});
}

// y[c] = bias[c] + sum over taps of w[i, c] x_i[c], taps `apart` floats apart, for `count`
// channels.
inline void depthwise(const float* x, std::int64_t apart, const float* taps, std::int64_t kernel,
                      const float* bias, std::int64_t count, float* y) {
  std::int64_t c = 0;
  for (; c + 4 * simd::kWidth <= count; c += 4 * simd::kWidth) {
    simd::VecF sums[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[v] = simd::load(bias + c + v * simd::kWidth);
    for (std::int64_t i = 0; i < kernel; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        sums[v] = simd::fma(simd::load(taps + i * count + c + v * simd::kWidth),
                            simd::load(x + i * apart + c + v * simd::kWidth), sums[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) simd::store(y + c + v * simd::kWidth, sums[v]);
  }
  for (; c < count; c += simd::kWidth) {
    const std::int64_t lanes = std::min<std::int64_t>(simd::kWidth, count - c);
    simd::VecF sum = simd::load_partial(bias + c, lanes);
    for (std::int64_t i = 0; i < kernel; ++i)
      sum = simd::fma(simd::load_partial(taps + i * count + c, lanes),
                      simd::load_partial(x + i * apart + c, lanes), sum);
    simd::store_partial(y + c, sum, lanes);
  }
}

}  // namespace detail

/// What a one-dimensional convolution is made of.
struct StreamConv1dConfig {
  std::int64_t in_channels = 1;
  std::int64_t out_channels = 1;
  std::int64_t groups = 1;  ///< in_channels: depthwise
  StreamKernelConfig time = {};
  /// The frame before the first, [in_channels]; empty for zeros. Conformers that were trained with
  /// another one exist (see conformer_convolution).
  std::vector<float> initial = {};
};

/// y_j[o] = bias[o] + sum over taps i and channels c of W[o, c, i] x_{e(j) - (kernel - 1 - i)
/// dilation}[c], e(j) = the anchor of output j plus `right` (StreamTiming). Frames: [time,
/// in_channels] to [time, out_channels]. With a dense kernel and dilation 1 a window is read where
/// it lies, as one long row. A NaN reaches the outputs whose window holds it and no others.
class StreamConv1d {
 public:
  struct State {
    StreamWindow window;
    detail::FrameScratch gathered;
  };

  /// `weight`: [out_channels, in_channels / groups * kernel], the kernel fastest and the oldest tap
  /// first, as PyTorch's Conv1d stores it; `bias`: [out_channels] or null.
  /// \throws Error(kShape, kConfig) if these do not describe a layer. Allocates.
  StreamConv1d(StreamConv1dConfig config, const WeightMatrix& weight, const float* bias = nullptr)
      : config_(std::move(config)) {
    constexpr const char* kWhere = "StreamConv1d";
    validate(config_.time, kWhere);
    detail::require_groups(config_.in_channels, config_.out_channels, config_.groups, kWhere);
    const std::int64_t kernel = config_.time.kernel;
    group_in_ = config_.in_channels / config_.groups;
    group_out_ = config_.out_channels / config_.groups;
    detail::require_shape(weight, config_.out_channels, group_in_ * kernel, kWhere);
    detail::require_size(config_.initial.size(), config_.in_channels, kWhere, "initial");
    const std::vector<float> stored = detail::widened(weight);
    if (group_in_ == 1 && group_out_ == 1) {
      taps_.resize(stored.size());
      for (std::int64_t c = 0; c < config_.out_channels; ++c)
        for (std::int64_t i = 0; i < kernel; ++i)
          taps_[i * config_.out_channels + c] = stored[c * kernel + i];
      bias_.assign(static_cast<std::size_t>(config_.out_channels), 0.0F);
      if (bias != nullptr) std::copy_n(bias, config_.out_channels, bias_.begin());
      return;
    }
    std::vector<float> rows(stored.size());  // tap by tap, as rows of a window lie
    for (std::int64_t o = 0; o < config_.out_channels; ++o)
      for (std::int64_t c = 0; c < group_in_; ++c)
        for (std::int64_t i = 0; i < kernel; ++i)
          rows[(o * kernel + i) * group_in_ + c] = stored[(o * group_in_ + c) * kernel + i];
    for (std::int64_t g = 0; g < config_.groups; ++g)
      products_.emplace_back(WeightMatrix::of(rows.data() + g * group_out_ * kernel * group_in_,
                                              group_out_, kernel * group_in_),
                             bias != nullptr ? bias + g * group_out_ : nullptr, kWhere);
  }

  std::int64_t in_width() const { return config_.in_channels; }
  std::int64_t out_width() const { return config_.out_channels; }
  const StreamConv1dConfig& config() const { return config_; }

  State make_state() const {
    return {StreamWindow(config_.time, config_.in_channels, initial()),
            detail::FrameScratch(gathers() ? StreamWindow::kBlock * config_.time.kernel * group_in_
                                           : 0)};
  }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    state.window.accept(in, [&](const float* first, std::int64_t outputs) {
      convolve(first, outputs, state, out, written);
    });
    return written;
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    state.window.pad(timing().end_padding, 0.0F, [&](const float* first, std::int64_t outputs) {
      convolve(first, outputs, state, out, written);
    });
    return written;
  }
  void reset(State& state) const { state.window.reset(config_.time, initial()); }

  std::int64_t max_outputs(std::int64_t frames) const { return timing().max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return timing().max_flush_outputs(); }
  std::size_t state_bytes() const { return StreamWindow::bytes(config_.time, config_.in_channels); }
  void save(const State& state, ByteWriter& writer) const { state.window.save(writer); }
  void restore(ByteReader& reader, State& state) const { state.window.restore(reader); }
  StreamTiming timing() const { return config_.time.timing(); }

 private:
  const float* initial() const {
    return config_.initial.empty() ? nullptr : config_.initial.data();
  }
  bool gathers() const {
    return taps_.empty() && (config_.groups > 1 || config_.time.dilation > 1);
  }

  void convolve(const float* first, std::int64_t outputs, State& state, MatrixView<float> out,
                std::int64_t& written) const {
    const std::int64_t width = config_.in_channels;
    const std::int64_t advance = config_.time.stride * width;
    const MatrixView<float> y = out.middle_rows(written, outputs);
    written += outputs;
    if (!taps_.empty()) {
      for (std::int64_t t = 0; t < outputs; ++t)
        detail::depthwise(first + t * advance, config_.time.dilation * width, taps_.data(),
                          config_.time.kernel, bias_.data(), width, y.row(t));
    } else if (!gathers()) {
      products_[0].apply({first, outputs, config_.time.kernel * width, advance}, y);
    } else {
      for (std::int64_t g = 0; g < config_.groups; ++g) {
        float* row = state.gathered.data();
        for (std::int64_t t = 0; t < outputs; ++t)
          for (std::int64_t i = 0; i < config_.time.kernel; ++i, row += group_in_)
            std::memcpy(row,
                        first + t * advance + i * config_.time.dilation * width + g * group_in_,
                        static_cast<std::size_t>(group_in_) * sizeof(float));
        products_[g].apply({state.gathered.data(), outputs, config_.time.kernel * group_in_},
                           {y.data + g * group_out_, outputs, group_out_, y.stride});
      }
    }
  }

  StreamConv1dConfig config_;
  std::int64_t group_in_ = 1;
  std::int64_t group_out_ = 1;
  std::vector<PackedLinear> products_;  // one a group, [group_out_, kernel * group_in_]
  std::vector<float> taps_;             // depthwise: [kernel, channels]
  std::vector<float> bias_;             // depthwise: [channels]
};

/// How a frame of features with channels lies in its row.
enum class FeatureLayout {
  kChannelsLast,   ///< [features, channels]: what convolutions work in
  kChannelsFirst,  ///< [channels, features]: PyTorch's flatten before the linear layer
};

/// What a convolution over time and features is made of.
struct StreamConv2dConfig {
  std::int64_t in_channels = 1;
  std::int64_t out_channels = 1;
  std::int64_t groups = 1;  ///< 1, or in_channels = out_channels: depthwise
  StreamKernelConfig time = {};
  std::int64_t features = 1;  ///< of the input frame
  std::int64_t feature_kernel = 1;
  std::int64_t feature_stride = 1;
  std::int64_t feature_padding_before = 0;
  std::int64_t feature_padding_after = 0;
  FeatureLayout in_layout = FeatureLayout::kChannelsLast;
  FeatureLayout out_layout = FeatureLayout::kChannelsLast;

  constexpr std::int64_t out_features() const {
    return (features + feature_padding_before + feature_padding_after - feature_kernel) /
               feature_stride +
           1;
  }
};

/// The two-dimensional convolutions of speech front ends: causal (NeMo pads kernel - 1 before and
/// stride - 1 behind in time and features alike: StreamKernelConfig::nemo_causal), symmetric, or
/// without padding (WeNet). Frames: [time, features * in_channels] to [time, out_features() *
/// out_channels], laid out as the configuration says. Padding is zeros, in time as in features.
class StreamConv2d {
 public:
  struct State {
    StreamWindow window;
    detail::FrameScratch scratch;  // gathered windows, then rows before they are laid out anew
  };

  /// `weight`: [out_channels, in_channels / groups * time kernel * feature kernel], the feature
  /// kernel fastest, as PyTorch's Conv2d over [channels, time, features] stores it; `bias`:
  /// [out_channels] or null. \throws Error(kShape, kConfig). Allocates.
  StreamConv2d(const StreamConv2dConfig& config, const WeightMatrix& weight,
               const float* bias = nullptr)
      : config_(config) {
    constexpr const char* kWhere = "StreamConv2d";
    validate(config_.time, kWhere);
    detail::require_groups(config_.in_channels, config_.out_channels, config_.groups, kWhere);
    detail::require_positive(config_.features, kWhere, "features");
    detail::require_positive(config_.feature_kernel, kWhere, "feature_kernel");
    detail::require_positive(config_.feature_stride, kWhere, "feature_stride");
    detail::require_positive(config_.feature_padding_before, kWhere, "feature_padding_before", 0);
    detail::require_positive(config_.feature_padding_after, kWhere, "feature_padding_after", 0);
    padded_ = config_.features + config_.feature_padding_before + config_.feature_padding_after;
    if (padded_ < config_.feature_kernel)
      throw Error(ErrorCode::kConfig,
                  {"the kernel is wider than the padded features", kWhere, "feature_kernel",
                   "at most " + std::to_string(padded_), std::to_string(config_.feature_kernel)});
    depthwise_ = config_.groups > 1;
    if (depthwise_ &&
        (config_.groups != config_.in_channels || config_.groups != config_.out_channels))
      throw Error(ErrorCode::kUnsupported,
                  {"grouped convolution over features", kWhere, "groups",
                   "1, or as many as in and out channels", std::to_string(config_.groups)});
    const std::int64_t in = depthwise_ ? 1 : config_.in_channels;
    const std::int64_t kt = config_.time.kernel;
    const std::int64_t kf = config_.feature_kernel;
    detail::require_shape(weight, config_.out_channels, in * kt * kf, kWhere);
    const std::vector<float> stored = detail::widened(weight);
    std::vector<float> rows(stored.size());
    for (std::int64_t o = 0; o < config_.out_channels; ++o)
      for (std::int64_t c = 0; c < in; ++c)
        for (std::int64_t i = 0; i < kt * kf; ++i) {
          const float value = stored[(o * in + c) * kt * kf + i];
          rows[depthwise_ ? i * config_.out_channels + o : (o * kt * kf + i) * in + c] = value;
        }
    if (depthwise_) {
      taps_ = std::move(rows);
      bias_.assign(static_cast<std::size_t>(config_.out_channels), 0.0F);
      if (bias != nullptr) std::copy_n(bias, config_.out_channels, bias_.begin());
    } else {
      product_ = PackedLinear(WeightMatrix::of(rows.data(), config_.out_channels, kt * kf * in),
                              bias, kWhere);
    }
  }

  std::int64_t in_width() const { return config_.features * config_.in_channels; }
  std::int64_t out_width() const { return config_.out_features() * config_.out_channels; }
  const StreamConv2dConfig& config() const { return config_; }

  State make_state() const {
    return {StreamWindow(padded_time(), padded_ * config_.in_channels, nullptr),
            detail::FrameScratch(padded_ * config_.in_channels + gather_size() + out_width())};
  }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    const auto use = [&](const float* first, std::int64_t outputs) {
      convolve(first, outputs, state, out, written);
    };
    float* padded = state.scratch.data();
    std::fill_n(padded, padded_ * config_.in_channels, 0.0F);
    for (std::int64_t t = 0; t < in.rows; ++t) {
      lay_out(in.row(t), config_.in_layout, config_.features, config_.in_channels,
              FeatureLayout::kChannelsLast,
              padded + config_.feature_padding_before * config_.in_channels);
      state.window.accept({padded, 1, padded_ * config_.in_channels}, use);
    }
    return written;
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    state.window.pad(timing().end_padding, 0.0F, [&](const float* first, std::int64_t outputs) {
      convolve(first, outputs, state, out, written);
    });
    return written;
  }
  void reset(State& state) const { state.window.reset(config_.time, nullptr); }

  std::int64_t max_outputs(std::int64_t frames) const { return timing().max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return timing().max_flush_outputs(); }
  std::size_t state_bytes() const {
    return StreamWindow::bytes(config_.time, padded_ * config_.in_channels);
  }
  void save(const State& state, ByteWriter& writer) const { state.window.save(writer); }
  void restore(ByteReader& reader, State& state) const { state.window.restore(reader); }
  StreamTiming timing() const { return config_.time.timing(); }

 private:
  const StreamKernelConfig& padded_time() const { return config_.time; }
  std::int64_t row_size() const {
    return config_.time.kernel * config_.feature_kernel * config_.in_channels;
  }
  std::int64_t gather_size() const { return depthwise_ ? 0 : config_.out_features() * row_size(); }

  static void lay_out(const float* from, FeatureLayout from_layout, std::int64_t features,
                      std::int64_t channels, FeatureLayout to_layout, float* to) {
    if (from_layout == to_layout || channels == 1 || features == 1) {
      std::memcpy(to, from, static_cast<std::size_t>(features * channels) * sizeof(float));
      return;
    }
    const bool to_last = to_layout == FeatureLayout::kChannelsLast;
    for (std::int64_t f = 0; f < features; ++f)
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::int64_t last = f * channels + c;
        const std::int64_t first = c * features + f;
        if (to_last)
          to[last] = from[first];
        else
          to[first] = from[last];
      }
  }

  void convolve(const float* first, std::int64_t outputs, State& state, MatrixView<float> out,
                std::int64_t& written) const {
    for (std::int64_t t = 0; t < outputs; ++t)
      frame(first + t * config_.time.stride * padded_ * config_.in_channels, state,
            out.row(written + t));
    written += outputs;
  }

  void frame(const float* window, State& state, float* y) const {
    const std::int64_t channels = config_.in_channels;
    const std::int64_t apart = config_.time.dilation * padded_ * channels;  // tap to tap in time
    const std::int64_t run = config_.feature_kernel * channels;
    float* gathered = state.scratch.data() + padded_ * channels;
    const bool direct = config_.out_layout == FeatureLayout::kChannelsLast;
    float* rows = direct ? y : gathered + gather_size();
    const std::int64_t features = config_.out_features();
    if (depthwise_) {
      for (std::int64_t f = 0; f < features; ++f)
        depthwise_feature(window + f * config_.feature_stride * channels, apart,
                          rows + f * config_.out_channels);
    } else {
      float* row = gathered;
      for (std::int64_t f = 0; f < features; ++f)
        for (std::int64_t i = 0; i < config_.time.kernel; ++i, row += run)
          std::memcpy(row, window + i * apart + f * config_.feature_stride * channels,
                      static_cast<std::size_t>(run) * sizeof(float));
      product_.apply({gathered, features, row_size()}, {rows, features, config_.out_channels});
    }
    if (!direct)
      lay_out(rows, FeatureLayout::kChannelsLast, features, config_.out_channels,
              FeatureLayout::kChannelsFirst, y);
  }

  void depthwise_feature(const float* x, std::int64_t apart, float* y) const {
    const std::int64_t channels = config_.in_channels;
    for (std::int64_t c = 0; c < channels; c += simd::kWidth) {
      const std::int64_t lanes = std::min<std::int64_t>(simd::kWidth, channels - c);
      simd::VecF sum = simd::load_partial(bias_.data() + c, lanes);
      const float* tap = taps_.data() + c;
      for (std::int64_t i = 0; i < config_.time.kernel; ++i)
        for (std::int64_t k = 0; k < config_.feature_kernel; ++k, tap += channels)
          sum = simd::fma(simd::load_partial(tap, lanes),
                          simd::load_partial(x + i * apart + k * channels + c, lanes), sum);
      simd::store_partial(y + c, sum, lanes);
    }
  }

  StreamConv2dConfig config_;
  std::int64_t padded_ = 0;  // features with their padding
  bool depthwise_ = false;
  PackedLinear product_;     // [out_channels, time kernel * feature kernel * in_channels]
  std::vector<float> taps_;  // depthwise: [time kernel * feature kernel, channels]
  std::vector<float> bias_;  // depthwise: [channels]
};

/// Upsampling by `stride`: input t adds W^T x_t to the outputs t stride .. t stride + kernel - 1,
/// and each output has the bias once. Frames: [time, in_channels] to [stride * time, out_channels]:
/// what reaches beyond the last input's stride is cropped, as decoders of codecs do. State: kernel
/// - stride partial sums without the bias, for with it overlapping outputs would have it twice.
class StreamConvTranspose1d {
 public:
  struct State {
    std::vector<float> sums;       // [max(kernel - stride, 0), out_channels]
    detail::FrameScratch product;  // [kBlock, kernel * out_channels]
  };

  /// `weight`: [in_channels, out_channels * kernel], the kernel fastest, as PyTorch's
  /// ConvTranspose1d stores it; `bias`: [out_channels] or null. \throws Error(kShape, kConfig).
  StreamConvTranspose1d(std::int64_t in_channels, std::int64_t out_channels, std::int64_t kernel,
                        std::int64_t stride, const WeightMatrix& weight,
                        const float* bias = nullptr)
      : in_channels_(in_channels), out_channels_(out_channels), kernel_(kernel), stride_(stride) {
    constexpr const char* kWhere = "StreamConvTranspose1d";
    validate({.kernel = kernel, .stride = stride}, kWhere);
    detail::require_groups(in_channels, out_channels, 1, kWhere);
    detail::require_shape(weight, in_channels, out_channels * kernel, kWhere);
    const std::vector<float> stored = detail::widened(weight);
    std::vector<float> rows(stored.size());
    for (std::int64_t c = 0; c < in_channels; ++c)
      for (std::int64_t o = 0; o < out_channels; ++o)
        for (std::int64_t i = 0; i < kernel; ++i)
          rows[(i * out_channels + o) * in_channels + c] =
              stored[(c * out_channels + o) * kernel + i];
    product_ = PackedLinear(WeightMatrix::of(rows.data(), kernel * out_channels, in_channels),
                            nullptr, kWhere);
    bias_.assign(static_cast<std::size_t>(out_channels), 0.0F);
    if (bias != nullptr) std::copy_n(bias, out_channels, bias_.begin());
  }

  std::int64_t in_width() const { return in_channels_; }
  std::int64_t out_width() const { return out_channels_; }
  State make_state() const {
    return {std::vector<float>(static_cast<std::size_t>(held() * out_channels_)),
            detail::FrameScratch(kBlock * kernel_ * out_channels_)};
  }

  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == in_channels_);
    const std::int64_t width = kernel_ * out_channels_;
    for (std::int64_t t = 0; t < in.rows; t += kBlock) {
      const std::int64_t count = std::min(kBlock, in.rows - t);
      product_.apply(in.middle_rows(t, count), {state.product.data(), count, width});
      for (std::int64_t i = 0; i < count; ++i)
        overlap(state.product.data() + i * width, state, out, (t + i) * stride_);
    }
    return in.rows * stride_;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& state) const { std::fill(state.sums.begin(), state.sums.end(), 0.0F); }

  std::int64_t max_outputs(std::int64_t frames) const { return frames * stride_; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const {
    return static_cast<std::size_t>(held() * out_channels_) * sizeof(float);
  }
  void save(const State& state, ByteWriter& writer) const {
    writer.write_span(std::span<const float>(state.sums));
  }
  void restore(ByteReader& reader, State& state) const {
    reader.read_span("partial sums", std::span<float>(state.sums));
  }
  StreamTiming timing() const {
    return {.left = detail::ceil_div(kernel_, stride_) - 1, .upsample = stride_};
  }

 private:
  static constexpr std::int64_t kBlock = 16;

  std::int64_t held() const { return std::max<std::int64_t>(kernel_ - stride_, 0); }

  // product: [kernel, out_channels] of one input, whose outputs begin at row `at`.
  void overlap(float* product, State& state, MatrixView<float> out, std::int64_t at) const {
    const std::int64_t kept = held() * out_channels_;
    for (std::int64_t i = 0; i < kept; ++i) product[i] += state.sums[i];
    for (std::int64_t s = 0; s < stride_; ++s) {
      float* y = out.row(at + s);
      for (std::int64_t o = 0; o < out_channels_; ++o)
        y[o] = bias_[o] + (s < kernel_ ? product[s * out_channels_ + o] : 0.0F);
    }
    std::copy_n(product + stride_ * out_channels_, kept, state.sums.begin());
  }

  std::int64_t in_channels_;
  std::int64_t out_channels_;
  std::int64_t kernel_;
  std::int64_t stride_;
  PackedLinear product_;  // [kernel * out_channels, in_channels]
  std::vector<float> bias_;
};

}  // namespace sluice
