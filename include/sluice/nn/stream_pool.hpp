// SPDX-License-Identifier: MIT
/// Pooling over a stream of frames, exact for any chunks because the open cell is part of the
/// state; means over everything so far; and what StreamiNNC (arXiv 2408.03223) needs around them:
/// when activations of one window may be used again for the next, what is lost where they may not,
/// and the overlapping windows that such reuse replaces.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/stream_timing.hpp"
#include "sluice/nn/stream_window.hpp"

namespace sluice {

/// What a pooling layer does with its window.
enum class Pooling {
  kMax,      ///< padding counts as minus infinity
  kAverage,  ///< padding counts as zeros, and in the divisor
};

/// Pooling over time, each channel by itself. Frames: [time, width] to [time, width]. Where cells
/// do not overlap and nothing is padded, the state is the running maximum or sum of the open cell
/// and how many frames are in it; otherwise it is the window. A NaN reaches the outputs whose
/// window holds it and no others.
class StreamPool1d {
 public:
  struct State {
    std::vector<float> cell;  // [width] of the open cell
    std::int64_t filled = 0;
    StreamWindow window;
  };

  /// Windows of `kernel` frames every `stride`; `padding` frames before the input, and as many
  /// behind it, at most half a kernel (PyTorch's MaxPool1d and AvgPool1d with ceil_mode off).
  /// \throws Error(kConfig) otherwise.
  StreamPool1d(Pooling pooling, std::int64_t width, std::int64_t kernel, std::int64_t stride,
               std::int64_t padding = 0)
      : pooling_(pooling), width_(width) {
    constexpr const char* kWhere = "StreamPool1d";
    detail::require_positive(width, kWhere, "width");
    if (padding < 0 || padding > kernel / 2)
      throw Error(ErrorCode::kConfig, {"value out of range", kWhere, "padding",
                                       "0 to half the kernel", std::to_string(padding)});
    time_ = {
        .kernel = kernel, .stride = stride, .right = kernel - 1 - padding, .end_padding = padding};
    validate(time_, kWhere);
    cells_ = kernel == stride && padding == 0;
    outside_.assign(static_cast<std::size_t>(width), pad_value());
  }

  std::int64_t in_width() const { return width_; }
  std::int64_t out_width() const { return width_; }
  State make_state() const {
    State state;
    if (cells_)
      state.cell.resize(static_cast<std::size_t>(width_));
    else
      state.window = StreamWindow(time_, width_, outside_.data());
    return state;
  }

  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == width_);
    std::int64_t written = 0;
    if (!cells_) {
      state.window.accept(in, [&](const float* first, std::int64_t outputs) {
        reduce(first, outputs, out, written);
      });
      return written;
    }
    for (std::int64_t t = 0; t < in.rows; ++t) {
      const float* x = in.row(t);
      // A cell of one frame is that frame, whatever its sign of zero.
      if (state.filled == 0)
        std::copy_n(x, width_, state.cell.data());
      else
        gather(x, state.cell.data());
      if (++state.filled == time_.kernel) {
        finish(state.cell.data(), out.row(written++));
        state.filled = 0;
      }
    }
    return written;
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    std::int64_t written = 0;
    if (!cells_)
      state.window.pad(
          time_.end_padding, pad_value(),
          [&](const float* first, std::int64_t outputs) { reduce(first, outputs, out, written); });
    return written;
  }
  void reset(State& state) const {
    state.filled = 0;
    if (!cells_) state.window.reset(time_, outside_.data());
  }

  std::int64_t max_outputs(std::int64_t frames) const { return timing().max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return timing().max_flush_outputs(); }
  std::size_t state_bytes() const {
    if (!cells_) return StreamWindow::bytes(time_, width_);
    return static_cast<std::size_t>(width_) * sizeof(float) + sizeof(std::int64_t);
  }
  void save(const State& state, ByteWriter& writer) const {
    if (!cells_) return state.window.save(writer);
    writer.write(state.filled);
    writer.write_span(std::span<const float>(state.cell));
  }
  void restore(ByteReader& reader, State& state) const {
    if (!cells_) return state.window.restore(reader);
    const std::size_t at = reader.offset();
    state.filled = reader.read<std::int64_t>("frames in the cell");
    if (state.filled < 0 || state.filled >= time_.kernel)
      reader.fail_at(at, "count out of range", "frames in the cell",
                     "0 to " + std::to_string(time_.kernel - 1), std::to_string(state.filled));
    reader.read_span("cell", std::span<float>(state.cell));
  }
  StreamTiming timing() const { return time_.timing(); }

 private:
  float pad_value() const {
    return pooling_ == Pooling::kMax ? -std::numeric_limits<float>::infinity() : 0.0F;
  }
  void gather(const float* x, float* cell) const {
    if (pooling_ == Pooling::kMax) {
      // Written so that a NaN stays, from either side.
      for (std::int64_t c = 0; c < width_; ++c)
        cell[c] = x[c] > cell[c] || x[c] != x[c] ? x[c] : cell[c];
    } else {
      for (std::int64_t c = 0; c < width_; ++c) cell[c] += x[c];
    }
  }
  void finish(const float* cell, float* y) const {
    const float scale = pooling_ == Pooling::kMax ? 1.0F : 1.0F / static_cast<float>(time_.kernel);
    for (std::int64_t c = 0; c < width_; ++c) y[c] = cell[c] * scale;
  }
  void reduce(const float* first, std::int64_t outputs, MatrixView<float> out,
              std::int64_t& written) const {
    for (std::int64_t t = 0; t < outputs; ++t) {
      const float* x = first + t * time_.stride * width_;
      float* y = out.row(written++);
      std::copy_n(x, width_, y);
      for (std::int64_t i = 1; i < time_.kernel; ++i) gather(x + i * width_, y);
      finish(y, y);
    }
  }

  Pooling pooling_;
  std::int64_t width_;
  StreamKernelConfig time_;
  bool cells_ = false;
  std::vector<float> outside_;  // [width], what stands before the input
};

/// y_t = the mean of x_0 .. x_t, each channel by itself: global average pooling of what is known,
/// whose last row is the global mean. Sums are float64. Frames: [time, width] to [time, width].
/// A NaN stays in the mean for good.
class StreamRunningMean {
 public:
  struct State {
    std::vector<double> sums;  // [width]
    std::int64_t frames = 0;
  };

  /// \throws Error(kConfig) unless width is positive.
  explicit StreamRunningMean(std::int64_t width) : width_(width) {
    detail::require_positive(width, "StreamRunningMean", "width");
  }

  std::int64_t in_width() const { return width_; }
  std::int64_t out_width() const { return width_; }
  State make_state() const { return {std::vector<double>(static_cast<std::size_t>(width_)), 0}; }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == width_);
    for (std::int64_t t = 0; t < in.rows; ++t) {
      const float* x = in.row(t);
      float* y = out.row(t);
      const double frames = static_cast<double>(++state.frames);
      for (std::int64_t c = 0; c < width_; ++c) {
        state.sums[c] += static_cast<double>(x[c]);
        y[c] = static_cast<float>(state.sums[c] / frames);
      }
    }
    return in.rows;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& state) const {
    std::fill(state.sums.begin(), state.sums.end(), 0.0);
    state.frames = 0;
  }
  std::int64_t max_outputs(std::int64_t frames) const { return frames; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const {
    return static_cast<std::size_t>(width_) * sizeof(double) + sizeof(std::int64_t);
  }
  void save(const State& state, ByteWriter& writer) const {
    writer.write(state.frames);
    writer.write_span(std::span<const double>(state.sums));
  }
  void restore(ByteReader& reader, State& state) const {
    const std::size_t at = reader.offset();
    state.frames = reader.read<std::int64_t>("frames");
    if (state.frames < 0)
      reader.fail_at(at, "count out of range", "frames", "at least 0",
                     std::to_string(state.frames));
    reader.read_span("sums", std::span<double>(state.sums));
  }
  StreamTiming timing() const { return {.left = kUnboundedFrames}; }

 private:
  std::int64_t width_;
};

/// The frame of `frames` ago; before that many have come, zeros. Of a model whose branches must be
/// delayed by hand (kws_streaming); compositions here delay by themselves. The last frames stay
/// inside when the input ends. Frames: [time, width] to [time, width].
class StreamDelay {
 public:
  struct State {
    detail::FrameQueue held;
  };

  /// \throws Error(kConfig) unless width is positive and frames is not negative.
  StreamDelay(std::int64_t width, std::int64_t frames) : width_(width), frames_(frames) {
    detail::require_positive(width, "StreamDelay", "width");
    detail::require_positive(frames, "StreamDelay", "frames", 0);
    zeros_.resize(static_cast<std::size_t>(width));
  }

  std::int64_t in_width() const { return width_; }
  std::int64_t out_width() const { return width_; }
  State make_state() const {
    State state{detail::FrameQueue(frames_ + 1, width_)};
    reset(state);
    return state;
  }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    for (std::int64_t t = 0; t < in.rows; ++t) {
      state.held.push(in.middle_rows(t, 1));
      std::copy_n(state.held.row(0), width_, out.row(t));
      state.held.pop(1);
    }
    return in.rows;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& state) const {
    state.held.clear();
    for (std::int64_t i = 0; i < frames_; ++i) state.held.push({zeros_.data(), 1, width_});
  }
  std::int64_t max_outputs(std::int64_t frames) const { return frames; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const { return detail::FrameQueue::bytes(frames_, width_); }
  void save(const State& state, ByteWriter& writer) const { state.held.save(writer); }
  void restore(ByteReader& reader, State& state) const {
    const std::size_t at = reader.offset();
    state.held.restore(reader);
    if (state.held.size() != frames_)
      reader.fail_at(at, "unexpected value", "queued frames", std::to_string(frames_),
                     std::to_string(state.held.size()));
  }
  StreamTiming timing() const { return {.left = frames_}; }

 private:
  std::int64_t width_;
  std::int64_t frames_;
  std::vector<float> zeros_;
};

// --- StreamiNNC: windows that overlap, and what they have in common ------------------------------

/// Whether activations of one window stand for the same inputs in a window that begins `hop` frames
/// later, in every layer of the chain: pooling is shift-invariant only for shifts by whole products
/// of all strides so far.
constexpr bool reuse_is_exact(std::span<const StreamTiming> chain, std::int64_t hop) {
  std::int64_t product = 1;
  for (const StreamTiming& layer : chain) product *= layer.stride;
  return hop % product == 0;
}

/// How much a reused max-pooled value may differ from what pooling at the right place would give
/// (arXiv 2408.03223): (stride - 1) / sample_rate * max |x'|. `max_slope`: the largest absolute
/// derivative of the pooled signal, per second.
constexpr double pooling_reuse_bound(std::int64_t stride, double sample_rate, double max_slope) {
  return static_cast<double>(stride - 1) / sample_rate * max_slope;
}

/// A bound of the slope of a sum of `terms` unit cosines at frequency, 2 frequency, ... (hertz): as
/// released with the paper it takes the steepest for all of them, 2 pi terms (terms frequency).
constexpr double cosine_sum_slope_bound(std::int64_t terms, double frequency) {
  const auto n = static_cast<double>(terms);
  return 2.0 * std::numbers::pi * n * n * frequency;
}

/// Root mean square of a - b over the range of b: the normalised deviation of arXiv 2408.03223.
/// Zero where both are the same, infinite where b does not vary but a differs. a, b: [count].
inline double normalised_rms_deviation(std::span<const float> a, std::span<const float> b) {
  SLUICE_ASSERT(a.size() == b.size());
  double squares = 0.0;
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    squares += difference * difference;
    low = std::min(low, static_cast<double>(b[i]));
    high = std::max(high, static_cast<double>(b[i]));
  }
  if (squares == 0.0) return 0.0;
  return std::sqrt(squares / static_cast<double>(a.size())) / (high - low);
}

/// The overlapping windows that streaming replaces: runs the layer on every `window` frames from
/// the start, `hop` apart, each as a sequence of its own with its end, and writes what each gives,
/// window after window. Returns the rows written; out has room for the outputs of all windows.
/// Allocates nothing.
template <StreamLayer Layer>
std::int64_t windowed_inference(const Layer& layer, MatrixView<const float> in, std::int64_t window,
                                std::int64_t hop, typename Layer::State& state,
                                MatrixView<float> out) {
  SLUICE_ASSERT(window >= 1 && hop >= 1);
  std::int64_t written = 0;
  for (std::int64_t first = 0; first + window <= in.rows; first += hop) {
    layer.reset(state);
    written += layer.step(in.middle_rows(first, window), state,
                          out.middle_rows(written, out.rows - written));
    written += layer.flush(state, out.middle_rows(written, out.rows - written));
  }
  return written;
}

}  // namespace sluice
