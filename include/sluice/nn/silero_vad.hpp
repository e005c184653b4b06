// SPDX-License-Identifier: MIT
/// Silero VAD: how likely a stretch of audio holds speech, 31.25 times a second, from a convolution
/// over a short spectrum and an LSTM. The smallest complete network of frame layers in the library.
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

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/stream_recurrent.hpp"
#include "sluice/nn/stream_timing.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// The published 16 kHz network's weights, as PyTorch stores them, 309,633 floats.
/// model/load_silero_vad.hpp reads them from safetensors.
struct SileroVadWeights {
  /// A convolution over time: [out, in, kernel], the kernel fastest.
  struct Convolution {
    std::vector<float> weight;
    std::vector<float> bias;  ///< [out]
  };
  std::vector<float> stft;           ///< [258, 256]: 129 real rows, 129 imaginary ones
  std::array<Convolution, 4> conv;   ///< 129 -> 128 -> 64 -> 64 -> 128, kernel 3
  std::vector<float> input_weight;   ///< [512, 128], rows i, f, g, o
  std::vector<float> hidden_weight;  ///< [512, 128]
  std::vector<float> input_bias;     ///< [512]
  std::vector<float> hidden_bias;    ///< [512]
  std::vector<float> output;         ///< [128]
  std::vector<float> output_bias;    ///< [1]
};

/// The network, a StreamLayer from samples (16 kHz, full scale 1) to speech probabilities, one for
/// each 512 samples; at the end zeros fill the last window up, as the published code does. A window
/// is read behind the 64 samples before it (zeros at the start). State: those, the samples of an
/// open window, and the LSTM's. A NaN stays in the LSTM until reset().
///
/// Source: snakers4/silero-vad, MIT licence: 64 + 512 samples, 64 more mirrored; short spectra of
/// 256 samples every 128; magnitudes; four convolutions (padding 1, strides 1, 2, 2, 1) with ReLU;
/// LSTM; ReLU, one output, sigmoid.
class SileroVad {
 public:
  static constexpr std::int64_t kWindow = 512;  ///< new samples a probability
  static constexpr std::int64_t kContext = 64;  ///< samples before them
  static constexpr std::int64_t kHidden = 128;  ///< of the LSTM
  static constexpr std::int64_t kSampleRate = 16000;

  struct State {
    std::vector<float> samples;  // [kContext + kWindow], the first kContext + pending are there
    std::int64_t pending = 0;    // samples of the open window
    StreamLstm::State lstm;
    detail::FrameScratch scratch;
  };

  /// \throws Error(kShape) naming the weights that have another number of values. Allocates.
  explicit SileroVad(const SileroVadWeights& weights)
      : lstm_(matrix(weights.input_weight, 4 * kHidden, kHidden, "lstm input"),
              matrix(weights.hidden_weight, 4 * kHidden, kHidden, "lstm hidden"),
              vector(weights.input_bias, 4 * kHidden, "lstm input bias"),
              vector(weights.hidden_bias, 4 * kHidden, "lstm hidden bias")) {
    stft_ = PackedLinear(matrix(weights.stft, 2 * kBins, kSpectrum, "stft"));
    for (std::size_t i = 0; i < kConvolutions; ++i) {
      const std::int64_t in = kChannels[i];
      const std::int64_t out = kChannels[i + 1];
      const std::string name = "conv" + std::to_string(i + 1);
      const std::vector<float>& stored = weights.conv[i].weight;
      matrix(stored, out, in * kKernel, name);
      std::vector<float> rows(stored.size());  // [out, kernel, in]: three frames are one long row
      for (std::int64_t o = 0; o < out; ++o)
        for (std::int64_t c = 0; c < in; ++c)
          for (std::int64_t k = 0; k < kKernel; ++k)
            rows[at((o * kKernel + k) * in + c)] = stored[at((o * in + c) * kKernel + k)];
      conv_[i] = PackedLinear(WeightMatrix::of(rows.data(), out, in * kKernel),
                              vector(weights.conv[i].bias, out, name + " bias"), name);
    }
    vector(weights.output, kHidden, "output");
    vector(weights.output_bias, 1, "output bias");
    output_ = weights.output;
    output_bias_ = weights.output_bias[0];
  }

  std::int64_t in_width() const { return 1; }
  std::int64_t out_width() const { return 1; }
  State make_state() const {
    return {std::vector<float>(at(kContext + kWindow)), 0, lstm_.make_state(),
            detail::FrameScratch(2 * kRoom + kHidden)};
  }

  /// Accepts samples, writes the probabilities of the windows that they complete: how many.
  /// probabilities: [at least max_outputs(samples.size())]. Allocates nothing.
  std::int64_t step(std::span<const float> samples, State& state,
                    std::span<float> probabilities) const {
    return accept(samples, state, [&](std::int64_t index, float probability) {
      SLUICE_ASSERT(index < static_cast<std::int64_t>(probabilities.size()));
      probabilities[at(index)] = probability;
    });
  }
  /// The same for a column of samples, [samples, 1], as any StreamLayer takes it.
  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    std::int64_t count = 0;
    const auto write = [&](std::int64_t, float probability) {
      out.row(count++)[0] = probability;
    };
    if (in.stride == 1) {
      accept(std::span(in.data, at(in.rows)), state, write);
    } else {
      for (std::int64_t i = 0; i < in.rows; ++i) accept(std::span(in.row(i), 1), state, write);
    }
    return count;
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    if (state.pending == 0) return 0;
    std::fill(state.samples.begin() + kContext + state.pending, state.samples.end(), 0.0F);
    out.row(0)[0] = window(state);
    return 1;
  }
  void reset(State& state) const {
    std::fill(state.samples.begin(), state.samples.end(), 0.0F);
    state.pending = 0;
    lstm_.reset(state.lstm);
  }
  std::int64_t max_outputs(std::int64_t samples) const { return timing().max_outputs(samples); }
  std::int64_t max_flush_outputs() const { return 1; }
  std::size_t state_bytes() const {
    return at(kContext + kWindow) * sizeof(float) + sizeof(std::int64_t) + lstm_.state_bytes();
  }
  StreamTiming timing() const {
    return {.stride = kWindow,
            .left = kUnboundedFrames,
            .right = kWindow - 1,
            .end_padding = kWindow - 1};
  }
  void save(const State& state, ByteWriter& writer) const {
    writer.write(state.pending);
    writer.write_span(std::span<const float>(state.samples));
    lstm_.save(state.lstm, writer);
  }
  void restore(ByteReader& reader, State& state) const {
    const std::size_t begin = reader.offset();
    const auto pending = reader.read<std::int64_t>("pending");
    if (pending < 0 || pending >= kWindow)
      reader.fail_at(begin, "samples of an open window", "pending", "0 to 511",
                     std::to_string(pending));
    reader.read_span("samples", std::span<float>(state.samples));
    lstm_.restore(reader, state.lstm);
    state.pending = pending;
  }

 private:
  static constexpr std::int64_t kSpectrum = 256;  // samples of a spectrum
  static constexpr std::int64_t kHop = 128;
  static constexpr std::int64_t kBins = kSpectrum / 2 + 1;
  static constexpr std::int64_t kMirrored = 64;
  static constexpr std::int64_t kFrames = 4;  // spectra a window
  static constexpr std::int64_t kKernel = 3;
  static constexpr std::size_t kConvolutions = 4;
  static constexpr std::array<std::int64_t, kConvolutions + 1> kChannels{kBins, 128, 64, 64, 128};
  static constexpr std::array<std::int64_t, kConvolutions> kStrides{1, 2, 2, 1};
  // The widest of what lies between two layers: the window, or the frames with one before and
  // behind.
  static constexpr std::int64_t kRoom = 2 * kFrames * kBins;

  static constexpr std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

  static WeightMatrix matrix(const std::vector<float>& values, std::int64_t rows, std::int64_t cols,
                             const std::string& name) {
    vector(values, rows * cols, name);
    return WeightMatrix::of(values.data(), rows, cols);
  }
  static const float* vector(const std::vector<float>& values, std::int64_t count,
                             const std::string& name) {
    if (static_cast<std::int64_t>(values.size()) != count)
      throw Error(ErrorCode::kShape, {"wrong number of values", "SileroVadWeights", name,
                                      std::to_string(count), std::to_string(values.size())});
    return values.data();
  }

  // Calls use(n, probability) for the n-th window that the samples complete; the number of them.
  template <class Use>
  std::int64_t accept(std::span<const float> samples, State& state, Use use) const {
    std::int64_t count = 0;
    while (!samples.empty()) {
      const std::size_t taken = std::min(samples.size(), at(kWindow - state.pending));
      std::copy_n(samples.data(), taken, state.samples.data() + kContext + state.pending);
      samples = samples.subspan(taken);
      state.pending += static_cast<std::int64_t>(taken);
      if (state.pending == kWindow) use(count++, window(state));
    }
    return count;
  }

  // One step of the network on a full window; then the window is the past.
  float window(State& state) const {
    float* from = state.scratch.data();
    float* to = from + kRoom;
    float* const hidden = to + kRoom;
    constexpr std::int64_t kHeld = kContext + kWindow;
    std::copy_n(state.samples.data(), kHeld, from);
    for (std::int64_t i = 0; i < kMirrored; ++i) from[kHeld + i] = from[kHeld - 2 - i];
    stft_.apply({from, kFrames, kSpectrum, kHop}, {to, kFrames, 2 * kBins});
    std::int64_t frames = kFrames;
    std::fill_n(from, kBins, 0.0F);
    std::fill_n(from + (frames + 1) * kBins, kBins, 0.0F);
    for (std::int64_t t = 0; t < frames; ++t) {
      const float* const spectrum = to + t * 2 * kBins;
      for (std::int64_t k = 0; k < kBins; ++k)
        from[(t + 1) * kBins + k] =
            std::sqrt(spectrum[k] * spectrum[k] + spectrum[kBins + k] * spectrum[kBins + k]);
    }
    for (std::size_t i = 0; i < kConvolutions; ++i) {
      const std::int64_t in = kChannels[i];
      const std::int64_t out = kChannels[i + 1];
      const std::int64_t outputs = (frames - 1) / kStrides[i] + 1;
      // Zeros stand before and behind the frames of the next layer.
      std::fill_n(to, out, 0.0F);
      std::fill_n(to + (outputs + 1) * out, out, 0.0F);
      const MatrixView<float> rows(to + out, outputs, out);
      conv_[i].apply({from, outputs, kKernel * in, kStrides[i] * in}, rows);
      for (std::int64_t k = 0; k < outputs * out; ++k) rows.data[k] = std::max(rows.data[k], 0.0F);
      frames = outputs;
      std::swap(from, to);
    }
    lstm_.step({from + kHidden, 1, kHidden}, state.lstm, {hidden, 1, kHidden});
    double logit = static_cast<double>(output_bias_);
    for (std::int64_t k = 0; k < kHidden; ++k)
      logit += static_cast<double>(output_[at(k)]) *
               static_cast<double>(hidden[k] < 0.0F ? 0.0F : hidden[k]);

    std::copy_n(state.samples.data() + kWindow, kContext, state.samples.data());
    state.pending = 0;
    return static_cast<float>(1.0 / (1.0 + std::exp(-logit)));
  }

  PackedLinear stft_;                             // [258, 256]
  std::array<PackedLinear, kConvolutions> conv_;  // [out, 3 in]
  StreamLstm lstm_;
  std::vector<float> output_;  // [128]
  float output_bias_ = 0.0F;
};

static_assert(StreamLayer<SileroVad>);

}  // namespace sluice
