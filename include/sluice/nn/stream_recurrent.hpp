// SPDX-License-Identifier: MIT
/// LSTM and GRU over a stream of frames: unlimited memory in constant space, one step a frame. The
/// state is what a snapshot of such a network is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// Long short-term memory (PyTorch's LSTM, one layer, one direction): with i, f, g, o the quarters
/// of W x_t + b + U h + b', c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c). Frames:
/// [time, in] to [time, hidden], each row h. Starts from zeros. A NaN stays.
class StreamLstm {
 public:
  struct State {
    std::vector<float> h;  // [hidden]
    std::vector<float> c;  // [hidden]
    detail::FrameScratch gates;
  };

  /// input_weight: [4 hidden, in], hidden_weight: [4 hidden, hidden], rows in the order i, f, g, o;
  /// input_bias, hidden_bias: [4 hidden] or null, of which only the sum matters.
  /// \throws Error(kShape). Allocates.
  StreamLstm(const WeightMatrix& input_weight, const WeightMatrix& hidden_weight,
             const float* input_bias = nullptr, const float* hidden_bias = nullptr)
      : hidden_(hidden_weight.cols) {
    detail::require_shape(hidden_weight, 4 * hidden_, hidden_, "StreamLstm");
    detail::require_shape(input_weight, 4 * hidden_, input_weight.cols, "StreamLstm");
    std::vector<float> bias(static_cast<std::size_t>(4 * hidden_));
    for (std::int64_t i = 0; i < 4 * hidden_; ++i)
      bias[i] = (input_bias != nullptr ? input_bias[i] : 0.0F) +
                (hidden_bias != nullptr ? hidden_bias[i] : 0.0F);
    input_ = PackedLinear(input_weight, bias.data(), "StreamLstm");
    recurrent_ = PackedLinear(hidden_weight, nullptr, "StreamLstm");
  }

  std::int64_t in_width() const { return input_.cols(); }
  std::int64_t out_width() const { return hidden_; }
  State make_state() const {
    const auto hidden = static_cast<std::size_t>(hidden_);
    return {std::vector<float>(hidden), std::vector<float>(hidden),
            detail::FrameScratch((kBlock + 1) * 4 * hidden_)};
  }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    const std::int64_t width = 4 * hidden_;
    float* recurrent = state.gates.data() + kBlock * width;
    for (std::int64_t t = 0; t < in.rows; t += kBlock) {
      const std::int64_t count = std::min(kBlock, in.rows - t);
      input_.apply(in.middle_rows(t, count), {state.gates.data(), count, width});
      for (std::int64_t i = 0; i < count; ++i) {
        const float* gates = state.gates.data() + i * width;
        recurrent_.apply({state.h.data(), 1, hidden_}, {recurrent, 1, width});
        detail::for_each_register(hidden_, state.c.data(), [&](auto&& load) {
          const auto gate = [&](int part) {
            return load(gates + part * hidden_) + load(recurrent + part * hidden_);
          };
          return detail::sigmoid(gate(1)) * load(state.c.data()) +
                 detail::sigmoid(gate(0)) * detail::tanh(gate(2));
        });
        detail::for_each_register(hidden_, state.h.data(), [&](auto&& load) {
          return detail::sigmoid(load(gates + 3 * hidden_) + load(recurrent + 3 * hidden_)) *
                 detail::tanh(load(state.c.data()));
        });
        std::copy_n(state.h.data(), hidden_, out.row(t + i));
      }
    }
    return in.rows;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& state) const {
    std::fill(state.h.begin(), state.h.end(), 0.0F);
    std::fill(state.c.begin(), state.c.end(), 0.0F);
  }
  std::int64_t max_outputs(std::int64_t frames) const { return frames; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const { return static_cast<std::size_t>(2 * hidden_) * sizeof(float); }
  void save(const State& state, ByteWriter& writer) const {
    writer.write_span(std::span<const float>(state.h));
    writer.write_span(std::span<const float>(state.c));
  }
  void restore(ByteReader& reader, State& state) const {
    reader.read_span("h", std::span<float>(state.h));
    reader.read_span("c", std::span<float>(state.c));
  }
  StreamTiming timing() const { return {.left = kUnboundedFrames}; }

 private:
  static constexpr std::int64_t kBlock = 16;

  std::int64_t hidden_;
  PackedLinear input_;  // with both biases
  PackedLinear recurrent_;
};

/// Gated recurrent unit (PyTorch's GRU, one layer, one direction): r = sigmoid(W_r x + b_r + U_r h
/// + b'_r), z alike, n = tanh(W_n x + b_n + r (U_n h + b'_n)), h = (1 - z) n + z h. The second bias
/// is inside the reset gate's product, so the two cannot be added up; the original (arXiv
/// 1406.1078) applies r to h instead. Frames: [time, in] to [time, hidden]. Starts from zeros. A
/// NaN stays.
class StreamGru {
 public:
  struct State {
    std::vector<float> h;  // [hidden]
    detail::FrameScratch gates;
  };

  /// input_weight: [3 hidden, in], hidden_weight: [3 hidden, hidden], rows in the order r, z, n;
  /// input_bias, hidden_bias: [3 hidden] or null. \throws Error(kShape). Allocates.
  StreamGru(const WeightMatrix& input_weight, const WeightMatrix& hidden_weight,
            const float* input_bias = nullptr, const float* hidden_bias = nullptr)
      : hidden_(hidden_weight.cols) {
    detail::require_shape(hidden_weight, 3 * hidden_, hidden_, "StreamGru");
    detail::require_shape(input_weight, 3 * hidden_, input_weight.cols, "StreamGru");
    input_ = PackedLinear(input_weight, input_bias, "StreamGru");
    recurrent_ = PackedLinear(hidden_weight, hidden_bias, "StreamGru");
  }

  std::int64_t in_width() const { return input_.cols(); }
  std::int64_t out_width() const { return hidden_; }
  State make_state() const {
    return {std::vector<float>(static_cast<std::size_t>(hidden_)),
            detail::FrameScratch((kBlock + 1) * 3 * hidden_)};
  }
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    const std::int64_t width = 3 * hidden_;
    float* recurrent = state.gates.data() + kBlock * width;
    for (std::int64_t t = 0; t < in.rows; t += kBlock) {
      const std::int64_t count = std::min(kBlock, in.rows - t);
      input_.apply(in.middle_rows(t, count), {state.gates.data(), count, width});
      for (std::int64_t i = 0; i < count; ++i) {
        const float* gates = state.gates.data() + i * width;
        recurrent_.apply({state.h.data(), 1, hidden_}, {recurrent, 1, width});
        detail::for_each_register(hidden_, state.h.data(), [&](auto&& load) {
          const simd::VecF r = detail::sigmoid(load(gates) + load(recurrent));
          const simd::VecF z = detail::sigmoid(load(gates + hidden_) + load(recurrent + hidden_));
          const simd::VecF n =
              detail::tanh(simd::fma(r, load(recurrent + 2 * hidden_), load(gates + 2 * hidden_)));
          return (simd::broadcast(1.0F) - z) * n + z * load(state.h.data());
        });
        std::copy_n(state.h.data(), hidden_, out.row(t + i));
      }
    }
    return in.rows;
  }
  std::int64_t flush(State& /*state*/, MatrixView<float> /*out*/) const { return 0; }
  void reset(State& state) const { std::fill(state.h.begin(), state.h.end(), 0.0F); }
  std::int64_t max_outputs(std::int64_t frames) const { return frames; }
  std::int64_t max_flush_outputs() const { return 0; }
  std::size_t state_bytes() const { return static_cast<std::size_t>(hidden_) * sizeof(float); }
  void save(const State& state, ByteWriter& writer) const {
    writer.write_span(std::span<const float>(state.h));
  }
  void restore(ByteReader& reader, State& state) const {
    reader.read_span("h", std::span<float>(state.h));
  }
  StreamTiming timing() const { return {.left = kUnboundedFrames}; }

 private:
  static constexpr std::int64_t kBlock = 16;

  std::int64_t hidden_;
  PackedLinear input_;
  PackedLinear recurrent_;
};

}  // namespace sluice
