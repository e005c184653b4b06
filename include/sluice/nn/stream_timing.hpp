// SPDX-License-Identifier: MIT
/// What layers of frames do to time: which input frames an output needs, how many outputs follow
/// from so many inputs, and what a chain of layers adds up to: receptive field, look-ahead, wait
/// for whole chunks, inputs until the first output. Everything follows from what layers declare;
/// nothing is typed in a second time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "sluice/core/config.hpp"

namespace sluice {

/// A reach without end: recurrent layers, running means, attention to everything before.
inline constexpr std::int64_t kUnboundedFrames = std::int64_t{1} << 48;

/// Which input of a stride is the newest that output j sees, besides the look-ahead. The two are
/// not interchangeable: both occur in released models.
enum class StreamAlignment {
  kFirst,  ///< input j * stride: ordinary causal padding (NeMo, Moonshine, PyTorch)
  kLast,   ///< input (j + 1) * stride - 1: kws_streaming with several rows a call (2005.06720)
};

namespace detail {

constexpr std::int64_t floor_div(std::int64_t a, std::int64_t b) {
  return a / b - (a % b != 0 && (a % b < 0) != (b < 0) ? 1 : 0);
}
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return -floor_div(-a, b);
}

}  // namespace detail

/// What one layer does to time, in frames of its own input. With anchor(j) = floor(j / upsample) *
/// stride (+ stride - 1 if last-aligned) and a layer that works frame by frame (chunk 1), output j
/// sees the inputs anchor - left .. anchor + right; in chunks it sees those from `left` before its
/// chunk begins to `right` behind its chunk's end. Inputs before the first are the layer's initial
/// state. A convolution of kernel k and dilation d has left + right = (k - 1) d: right 0 is causal,
/// left 0 is a "valid" convolution, right = left is "same" padding.
struct StreamTiming {
  std::int64_t stride = 1;
  std::int64_t left = 0;   ///< or kUnboundedFrames
  std::int64_t right = 0;  ///< look-ahead
  StreamAlignment alignment = StreamAlignment::kFirst;
  std::int64_t upsample = 1;     ///< outputs for each anchor (transposed convolution)
  std::int64_t chunk = 1;        ///< anchors that become known together, on a grid from frame 0
  std::int64_t end_padding = 0;  ///< frames that the layer supplies itself when the input ends

  friend constexpr bool operator==(const StreamTiming&, const StreamTiming&) = default;

  /// The input at whose time output `output` stands.
  constexpr std::int64_t anchor(std::int64_t output) const {
    return detail::floor_div(output, upsample) * stride +
           (alignment == StreamAlignment::kLast ? stride - 1 : 0);
  }
  /// The oldest input that the output sees; at or below -kUnboundedFrames there is none.
  constexpr std::int64_t first_input(std::int64_t output) const {
    if (left >= kUnboundedFrames || output <= -kUnboundedFrames) return -kUnboundedFrames;
    return detail::floor_div(anchor(output), chunk) * chunk - left;
  }
  /// The newest input that must be there before the output is.
  constexpr std::int64_t last_input(std::int64_t output) const {
    return detail::floor_div(anchor(output), chunk) * chunk + chunk - 1 + right;
  }

  /// How many outputs there are once `inputs` frames were accepted.
  constexpr std::int64_t outputs_after(std::int64_t inputs) const {
    return outputs_for(std::max<std::int64_t>(inputs - right, 0) / chunk * chunk);
  }
  /// How many there are in all when the input has ended after `inputs` frames: those whose window
  /// ends within the padding. None without input.
  constexpr std::int64_t outputs_at_end(std::int64_t inputs) const {
    if (inputs <= 0) return 0;
    return outputs_for(std::max<std::int64_t>(inputs + end_padding - right, 0));
  }
  /// The most outputs that `inputs` more frames can give, whatever came before.
  constexpr std::int64_t max_outputs(std::int64_t inputs) const {
    return detail::ceil_div((inputs + chunk - 1) / chunk * chunk, stride) * upsample;
  }
  /// The most outputs that the end of the input can give.
  constexpr std::int64_t max_flush_outputs() const {
    return detail::ceil_div(end_padding + chunk - 1, stride) * upsample;
  }

 private:
  // Outputs whose anchors are below `anchors`.
  constexpr std::int64_t outputs_for(std::int64_t anchors) const {
    return (alignment == StreamAlignment::kFirst ? detail::ceil_div(anchors, stride)
                                                 : anchors / stride) *
           upsample;
  }
};

/// What a chain of layers adds up to, in frames of its input.
struct StreamLatency {
  std::int64_t receptive_field = 1;  ///< inputs that one output sees at most, or kUnboundedFrames
  std::int64_t stride = 1;           ///< stride inputs make upsample outputs, in lowest terms
  std::int64_t upsample = 1;
  /// Algorithmic look-ahead: output n stands at input n * stride / upsample, and the least that any
  /// output waits beyond it. Look-aheads of layers add up.
  std::int64_t look_ahead = 0;
  /// What waiting for whole chunks adds to that, at most and on average over the outputs.
  std::int64_t max_chunk_wait = 0;
  double mean_chunk_wait = 0.0;
  std::int64_t first_output = 1;  ///< inputs accepted when the first output is there

  friend constexpr bool operator==(const StreamLatency&, const StreamLatency&) = default;
};

/// The oldest and the newest network input that output `output` of a chain depends on.
constexpr std::int64_t first_input(std::span<const StreamTiming> chain, std::int64_t output) {
  for (std::size_t i = chain.size(); i-- > 0;) output = chain[i].first_input(output);
  return std::max(output, -kUnboundedFrames);
}
constexpr std::int64_t last_input(std::span<const StreamTiming> chain, std::int64_t output) {
  for (std::size_t i = chain.size(); i-- > 0;) output = chain[i].last_input(output);
  return output;
}
/// Outputs of a chain once `inputs` frames were accepted, and in all when the input then ends.
constexpr std::int64_t outputs_after(std::span<const StreamTiming> chain, std::int64_t inputs) {
  for (const StreamTiming& layer : chain) inputs = layer.outputs_after(inputs);
  return inputs;
}
constexpr std::int64_t outputs_at_end(std::span<const StreamTiming> chain, std::int64_t inputs) {
  for (const StreamTiming& layer : chain) inputs = layer.outputs_at_end(inputs);
  return inputs;
}

/// Walks a chain, first layer first, and adds up: r += (left + right) S and so on, S being the
/// product of strides so far. Exact also where chunks, strides and look-aheads mix, because outputs
/// of a whole period are followed back to their inputs, one by one; of a period of more than 2^16
/// outputs (chunks without common divisors) the first 2^16. constexpr; allocates nothing.
constexpr StreamLatency latency_of(std::span<const StreamTiming> chain) {
  StreamLatency sum;
  std::int64_t period = 1;  // in inputs
  for (const StreamTiming& layer : chain) {
    if (period <= (std::int64_t{1} << 20))  // beyond that it is cut off in any case
      period = std::lcm(period, std::lcm(layer.chunk, layer.stride) * sum.stride);
    sum.stride *= layer.stride;
    sum.upsample *= layer.upsample;
    const std::int64_t common = std::gcd(sum.stride, sum.upsample);
    sum.stride /= common;
    sum.upsample /= common;
  }
  period = std::lcm(period, sum.stride);
  const std::int64_t outputs = std::min(period / sum.stride * sum.upsample, std::int64_t{1} << 16);
  std::int64_t least = kUnboundedFrames;
  std::int64_t most = 0;
  std::int64_t total = 0;
  for (std::int64_t n = 0; n < outputs; ++n) {
    const std::int64_t last = last_input(chain, n);
    const std::int64_t wait = last - n * sum.stride / sum.upsample;
    least = std::min(least, wait);
    most = std::max(most, wait);
    total += wait;
    sum.receptive_field =
        std::min(std::max(sum.receptive_field, last - first_input(chain, n) + 1), kUnboundedFrames);
  }
  sum.look_ahead = least;
  sum.max_chunk_wait = most - least;
  sum.mean_chunk_wait =
      static_cast<double>(total) / static_cast<double>(outputs) - static_cast<double>(least);
  sum.first_output = last_input(chain, 0) + 1;
  return sum;
}

}  // namespace sluice
