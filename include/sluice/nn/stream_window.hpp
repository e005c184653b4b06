// SPDX-License-Identifier: MIT
/// The past that a layer with a kernel needs, in one contiguous run of rows, with the phase of its
/// stride: what convolutions and pooling share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/stream_timing.hpp"

namespace sluice {

/// A kernel over time. `kernel` taps that are `dilation` frames apart, the oldest first; `right` of
/// its (kernel - 1) * dilation frames lie in the future of an output's anchor.
struct StreamKernelConfig {
  std::int64_t kernel = 1;
  std::int64_t stride = 1;
  std::int64_t dilation = 1;
  std::int64_t right = 0;  ///< 0 is causal, (kernel - 1) * dilation a "valid" layer
  StreamAlignment alignment = StreamAlignment::kFirst;
  /// Frames that stand behind the last one when the input ends; -1: `right` of them ("same"
  /// padding, and for a causal layer none). 0 with right > 0 gives nothing at the end ("valid").
  std::int64_t end_padding = -1;

  constexpr std::int64_t extent() const { return (kernel - 1) * dilation + 1; }
  constexpr StreamTiming timing() const {
    return {.stride = stride,
            .left = extent() - 1 - right,
            .right = right,
            .alignment = alignment,
            .end_padding = end_padding < 0 ? right : end_padding};
  }

  /// A causal kernel with ordinary left padding.
  static constexpr StreamKernelConfig causal(std::int64_t kernel, std::int64_t stride = 1,
                                             std::int64_t dilation = 1) {
    return {.kernel = kernel, .stride = stride, .dilation = dilation};
  }
  /// Half of the reach on either side, for an even kernel the odd tap in the past; what PyTorch
  /// calls padding = dilation * (kernel - 1) / 2.
  static constexpr StreamKernelConfig same(std::int64_t kernel, std::int64_t stride = 1,
                                           std::int64_t dilation = 1) {
    return {.kernel = kernel,
            .stride = stride,
            .dilation = dilation,
            .right = (kernel - 1) * dilation / 2};
  }
  /// No padding at all: nothing comes out before a whole window is there.
  static constexpr StreamKernelConfig valid(std::int64_t kernel, std::int64_t stride = 1,
                                            std::int64_t dilation = 1) {
    return {.kernel = kernel,
            .stride = stride,
            .dilation = dilation,
            .right = (kernel - 1) * dilation,
            .end_padding = 0};
  }
  /// NeMo's causal subsampling: kernel - 1 frames of padding before the input, stride - 1 behind
  /// it.
  static constexpr StreamKernelConfig nemo_causal(std::int64_t kernel, std::int64_t stride) {
    return {.kernel = kernel, .stride = stride, .end_padding = stride - 1};
  }
};

/// \throws Error(kConfig) unless the kernel describes a layer.
inline void validate(const StreamKernelConfig& config, const char* where) {
  const auto require = [&](bool good, const char* field, std::string expected, std::int64_t found) {
    if (!good)
      throw Error(ErrorCode::kConfig,
                  {"value out of range", where, field, std::move(expected), std::to_string(found)});
  };
  constexpr std::int64_t kMost = std::int64_t{1} << 24;
  const auto range = [&](const char* field, std::int64_t value, std::int64_t least) {
    require(value >= least && value <= kMost, field,
            std::to_string(least) + " to " + std::to_string(kMost), value);
  };
  range("kernel", config.kernel, 1);
  range("stride", config.stride, 1);
  range("dilation", config.dilation, 1);
  require(config.extent() <= kMost, "kernel times dilation", "at most " + std::to_string(kMost),
          config.extent());
  require(config.right >= 0 && config.right < config.extent(), "right",
          "0 to " + std::to_string(config.extent() - 1), config.right);
  range("end_padding", config.end_padding, -1);
}

/// The rows from the first one that the next output sees, and how many incoming ones it does not
/// see. That is the phase: no count of frames is needed, so a stream may go on for ever.
class StreamWindow {
 public:
  /// Frames that are taken at once.
  static constexpr std::int64_t kBlock = 32;

  StreamWindow() = default;
  /// Before the first frame stand rows equal to `initial`, [width] or null for zeros. Allocates.
  StreamWindow(const StreamKernelConfig& config, std::int64_t width, const float* initial)
      : extent_(config.extent()),
        stride_(config.stride),
        width_(width),
        capacity_(2 * config.extent() + kBlock),
        values_(static_cast<std::size_t>(capacity_ * width)) {
    reset(config, initial);
  }

  void reset(const StreamKernelConfig& config, const float* initial) {
    first_ = 0;
    const std::int64_t oldest = config.timing().first_input(0);
    size_ = std::max<std::int64_t>(-oldest, 0);
    skip_ = std::max<std::int64_t>(oldest, 0);
    started_ = false;
    for (std::int64_t i = 0; i < size_; ++i) fill(values_.data() + i * width_, initial);
  }

  /// Calls use(first row, outputs) for whole windows, output i's beginning i * stride rows behind
  /// `first row`; rows are `width` floats apart. At most kBlock outputs a call.
  template <class Use>
  void accept(MatrixView<const float> in, Use&& use) {
    SLUICE_ASSERT(in.cols == width_);
    started_ = started_ || in.rows > 0;
    for (std::int64_t t = 0; t < in.rows;) {
      if (skip_ > 0) {
        const std::int64_t skipped = std::min(skip_, in.rows - t);
        skip_ -= skipped;
        t += skipped;
        continue;
      }
      const std::int64_t count = std::min(kBlock, in.rows - t);
      float* target = room(count);
      for (std::int64_t i = 0; i < count; ++i)
        std::memcpy(target + i * width_, in.row(t + i),
                    static_cast<std::size_t>(width_) * sizeof(float));
      size_ += count;
      t += count;
      emit(use);
    }
  }

  /// As accept() with `count` rows of the padding, each equal to `value`; nothing if there never
  /// was a frame.
  template <class Use>
  void pad(std::int64_t count, float value, Use&& use) {
    if (!started_) return;
    for (; count > 0; --count) {
      if (skip_ > 0) {
        --skip_;
        continue;
      }
      std::fill_n(room(1), width_, value);
      ++size_;
      emit(use);
    }
  }

  /// Rows held, and one of them, the oldest first.
  std::int64_t size() const { return size_; }
  const float* row(std::int64_t index) const {
    SLUICE_ASSERT(index >= 0 && index < size_);
    return values_.data() + (first_ + index) * width_;
  }

  /// What a stream holds at most between two steps.
  static std::size_t bytes(const StreamKernelConfig& config, std::int64_t width) {
    return static_cast<std::size_t>((config.extent() - 1) * width) * sizeof(float) +
           2 * sizeof(std::int64_t) + 1;
  }
  void save(ByteWriter& writer) const {
    writer.write(size_);
    writer.write(skip_);
    writer.write(static_cast<std::uint8_t>(started_));
    writer.write_span(std::span<const float>(values_.data() + first_ * width_,
                                             static_cast<std::size_t>(size_ * width_)));
  }
  void restore(ByteReader& reader) {
    const std::size_t at = reader.offset();
    const auto size = reader.read<std::int64_t>("rows held");
    const auto skip = reader.read<std::int64_t>("rows to skip");
    if (size < 0 || size >= extent_)
      reader.fail_at(at, "count out of range", "rows held", "0 to " + std::to_string(extent_ - 1),
                     std::to_string(size));
    if (skip < 0 || skip >= stride_ || (skip > 0 && size > 0))
      reader.fail_at(at + sizeof(size), "count out of range", "rows to skip",
                     "0 to " + std::to_string(stride_ - 1) + ", 0 if rows are held",
                     std::to_string(skip));
    started_ = reader.read<std::uint8_t>("started") != 0;
    first_ = 0;
    size_ = size;
    skip_ = skip;
    reader.read_span("rows",
                     std::span<float>(values_.data(), static_cast<std::size_t>(size * width_)));
  }

 private:
  void fill(float* row, const float* value) const {
    if (value != nullptr)
      std::memcpy(row, value, static_cast<std::size_t>(width_) * sizeof(float));
    else
      std::fill_n(row, width_, 0.0F);
  }
  // Where the next `count` rows go. Rows move to the front only when the end is reached, so that
  // each is copied about once however small the chunks are.
  float* room(std::int64_t count) {
    if (first_ + size_ + count > capacity_) {
      std::memmove(values_.data(), values_.data() + first_ * width_,
                   static_cast<std::size_t>(size_ * width_) * sizeof(float));
      first_ = 0;
    }
    return values_.data() + (first_ + size_) * width_;
  }
  template <class Use>
  void emit(Use&& use) {
    if (size_ < extent_) return;
    const std::int64_t outputs = (size_ - extent_) / stride_ + 1;
    use(values_.data() + first_ * width_, outputs);
    const std::int64_t gone = outputs * stride_;
    skip_ = std::max<std::int64_t>(gone - size_, 0);
    first_ += std::min(gone, size_);
    size_ = std::max<std::int64_t>(size_ - gone, 0);
  }

  std::int64_t extent_ = 1;
  std::int64_t stride_ = 1;
  std::int64_t width_ = 0;
  std::int64_t capacity_ = 0;
  std::int64_t first_ = 0;
  std::int64_t size_ = 0;
  std::int64_t skip_ = 0;
  bool started_ = false;
  std::vector<float> values_;  // [capacity_, width_]
};

}  // namespace sluice
