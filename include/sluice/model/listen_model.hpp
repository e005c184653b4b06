// SPDX-License-Identifier: MIT
/// A model that listens: log-mel frames, a causal subsampling to one source row each 40 ms, a
/// decoder that reads these rows as its source group and writes text as its target group, and a CTC
/// head on the source rows that counts words. Immutable and shared; a stream's state is apart.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/nn/activation.hpp"
#include "sluice/nn/linear.hpp"
#include "sluice/nn/log_mel.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/stream_window.hpp"
#include "sluice/nn/weight_matrix.hpp"

namespace sluice {

/// Extents and choices of a listening model beside its decoder's.
struct ListenConfig {
  LogMelConfig front_end = LogMelConfig::listen({}, {});
  /// Source rows that a source row sees, its own included, and a target row behind its prefix.
  std::int64_t frame_window = 256;
  /// Source rows between a word's CTC label and its writing that the model was trained for.
  std::int64_t trained_delay = 4;
  Token unknown_token = 0;  ///< never written
  Token begin_token = 1;    ///< fed before the first token of an utterance
  Token end_token = 2;      ///< ends an utterance
};

/// Weights beside the decoder's. Matrices are [out, in]; D: the decoder's hidden size.
struct ListenWeights {
  WeightMatrix conv1;       ///< [D, 3 num_mels], the oldest frame's channels first
  WeightMatrix conv2;       ///< [D, 3 D]
  WeightMatrix projection;  ///< [D, D]
  WeightMatrix ctc;         ///< [vocab_size + 1, D]; the blank is the last
  std::vector<float> conv1_bias;
  std::vector<float> conv2_bias;
  std::vector<float> projection_bias;
  std::vector<float> ctc_bias;
  std::shared_ptr<const void> storage;  ///< keeps the matrices' bytes alive
};

/// The model. Any number of streams and threads may use it, each with states of its own.
///
/// Source row j reads mel frames up to 4 j (two convolutions of three frames and stride 2, each
/// aligned to its first input, zeros before it), so it is complete with mel frame 4 j.
class ListenModel {
 public:
  /// Mel frames from one source row to the next.
  static constexpr std::int64_t kStride = 4;
  /// The mark of pieces that end a word (U+2581).
  static constexpr std::string_view kEndOfWord = "\xE2\x96\x81";

  /// What one stream keeps between mel frames, and scratch. Made by make_state().
  class State {
   public:
    /// Samples since the stream's start.
    std::int64_t samples() const { return mel_.samples(); }

   private:
    friend class ListenModel;
    State(const ListenModel& model, int team_size, Activations activations);

    LogMel::State mel_;
    StreamConv1d::State first_;
    StreamConv1d::State second_;
    FrameLinear::State projection_;
    LinearWorkspace linear_;
    Buffer<float> mel_row_;  // [num_mels]
    Buffer<float> half_;     // [D]: a row behind the first convolution
    Buffer<float> quarter_;  // [D]: behind the second
    Buffer<float> row_;      // [D]: the source row
  };

  /// pieces: [vocab_size], UTF-8; those that end a word end with kEndOfWord.
  /// \throws Error(kConfig, kShape) naming what does not fit.
  ListenModel(ListenConfig config, ListenWeights weights, std::shared_ptr<const Decoder> decoder,
              std::vector<std::string> pieces, const std::string& where = "ListenModel")
      : config_(std::move(config)),
        weights_(std::move(weights)),
        decoder_(std::move(decoder)),
        pieces_(std::move(pieces)),
        log_mel_(config_.front_end),
        first_(convolution(weights_.conv1, weights_.conv1_bias, log_mel_.num_mels(), where)),
        second_(convolution(weights_.conv2, weights_.conv2_bias, hidden_size(), where)),
        projection_(weights_.projection, weights_.projection_bias.data()) {
    for (const std::string& piece : pieces_) ends_word_.push_back(piece.ends_with(kEndOfWord));
  }

  const ListenConfig& config() const { return config_; }
  const ListenWeights& weights() const { return weights_; }
  const Decoder& decoder() const { return *decoder_; }
  const std::shared_ptr<const Decoder>& shared_decoder() const { return decoder_; }
  const LogMel& log_mel() const { return log_mel_; }
  std::int64_t hidden_size() const { return decoder_->config().hidden_size; }
  std::int64_t vocab_size() const { return decoder_->config().vocab_size; }
  /// The CTC label that stands for no piece.
  Token blank() const { return static_cast<Token>(vocab_size()); }

  const std::vector<std::string>& pieces() const { return pieces_; }
  /// Whether a piece ends a word; false for the blank.
  bool ends_word(Token piece) const {
    const auto index = static_cast<std::size_t>(piece);
    return index < ends_word_.size() && ends_word_[index];
  }
  /// Appends a piece's letters, without the mark, to a text.
  void append_text(Token piece, std::string& text) const {
    const std::string& own = pieces_[static_cast<std::size_t>(piece)];
    text.append(own, 0, own.size() - (ends_word(piece) ? kEndOfWord.size() : 0));
  }

  double sample_rate() const { return config_.front_end.sample_rate; }
  /// Samples from one source row to the next.
  std::int64_t samples_per_row() const { return kStride * config_.front_end.hop_length; }
  double milliseconds_per_row() const {
    return 1000 * static_cast<double>(samples_per_row()) / sample_rate();
  }

  /// Parameters of the whole model, the front end's statistics not counted.
  std::int64_t parameters() const;

  /// A stream's state. Allocates it. \throws Error(kConfig) as LinearWorkspace.
  State make_state(int team_size, Activations activations = Activations::kFloat32) const {
    return State(*this, team_size, activations);
  }
  /// The next mel frame is the first of an utterance; the audio goes on.
  void restart(State& state) const {
    first_.reset(state.first_);
    second_.reset(state.second_);
  }

  /// Samples that complete the stream's next mel frame.
  std::int64_t samples_wanted(const State& state) const {
    return log_mel_.samples_needed(state.mel_.frames()) - state.mel_.samples();
  }
  /// Accepts samples, at most samples_wanted() of them. Returns the source row that they complete,
  /// [D], valid until the next call, or nothing. Allocates nothing.
  std::span<const float> accept(std::span<const float> samples, State& state) const {
    SLUICE_ASSERT(static_cast<std::int64_t>(samples.size()) <= samples_wanted(state));
    const MatrixView<float> mel = one_row(state.mel_row_);
    if (log_mel_.step(samples, state.mel_, mel) == 0) return {};
    return push(state.mel_row_.span(), state);
  }
  /// The same for a mel frame, normalised, of a front end elsewhere. frame: [num_mels].
  std::span<const float> push(std::span<const float> frame, State& state) const {
    const MatrixView<const float> mel(frame.data(), 1, log_mel_.num_mels());
    if (first_.step(mel, state.first_, one_row(state.half_)) == 0) return {};
    activate(Activation::kGelu, state.half_.span(), state.half_.span());
    if (second_.step(one_row(state.half_), state.second_, one_row(state.quarter_)) == 0) return {};
    activate(Activation::kGelu, state.quarter_.span(), state.quarter_.span());
    projection_.step(one_row(state.quarter_), state.projection_, one_row(state.row_));
    return state.row_.span();
  }

  /// Scores of the CTC labels, the blank last. hidden: [rows, D], the decoder's hidden states of
  /// source rows, final norm applied; scores: [rows, vocab_size + 1]. Allocates nothing.
  void ctc_scores(MatrixView<const float> hidden, MatrixView<float> scores, State& state,
                  ThreadTeam& team) const {
    linear(weights_.ctc, hidden, weights_.ctc_bias.data(), scores, state.linear_, team, cpu{});
  }

 private:
  static MatrixView<float> one_row(Buffer<float>& values) {
    return {values.data(), 1, static_cast<std::int64_t>(values.size())};
  }

  StreamConv1d convolution(const WeightMatrix& weight, const std::vector<float>& bias,
                           std::int64_t width, const std::string& where);
  void check(const std::string& where) const;

  ListenConfig config_;
  ListenWeights weights_;
  std::shared_ptr<const Decoder> decoder_;
  std::vector<std::string> pieces_;
  std::vector<bool> ends_word_;  // [vocab_size]
  LogMel log_mel_;
  StreamConv1d first_;
  StreamConv1d second_;
  FrameLinear projection_;
};

/// A convolution of three frames and stride 2, once all weights are known to fit. Files hold a
/// frame's channels together, layers the frames of a channel.
inline StreamConv1d ListenModel::convolution(const WeightMatrix& weight,
                                             const std::vector<float>& bias, std::int64_t width,
                                             const std::string& where) {
  check(where);
  constexpr std::int64_t kKernel = 3;
  std::vector<float> stored(static_cast<std::size_t>(weight.cols));
  std::vector<float> rows;
  for (std::int64_t r = 0; r < weight.rows; ++r) {
    dequantise(weight.type, weight.row(r), weight.cols, stored.data());
    for (std::int64_t c = 0; c < width; ++c)
      for (std::int64_t tap = 0; tap < kKernel; ++tap)
        rows.push_back(stored[static_cast<std::size_t>(tap * width + c)]);
  }
  return StreamConv1d(StreamConv1dConfig{.in_channels = width,
                                         .out_channels = hidden_size(),
                                         .time = StreamKernelConfig::causal(kKernel, 2)},
                      WeightMatrix::of(rows.data(), weight.rows, weight.cols), bias.data());
}

inline ListenModel::State::State(const ListenModel& model, int team_size, Activations activations)
    : mel_(model.log_mel_.make_state()),
      first_(model.first_.make_state()),
      second_(model.second_.make_state()),
      projection_(model.projection_.make_state()),
      linear_(model.hidden_size(), team_size, activations, 1),
      mel_row_(static_cast<std::size_t>(model.log_mel_.num_mels())),
      half_(static_cast<std::size_t>(model.hidden_size())),
      quarter_(static_cast<std::size_t>(model.hidden_size())),
      row_(static_cast<std::size_t>(model.hidden_size())) {}

inline std::int64_t ListenModel::parameters() const {
  std::int64_t count = 0;
  const auto matrix = [&](const WeightMatrix& weight) {
    count += weight.rows * weight.cols;
  };
  const auto vector = [&](const std::vector<float>& values) {
    count += static_cast<std::int64_t>(values.size());
  };
  for (const WeightMatrix& weight :
       {weights_.conv1, weights_.conv2, weights_.projection, weights_.ctc})
    matrix(weight);
  for (const auto* bias :
       {&weights_.conv1_bias, &weights_.conv2_bias, &weights_.projection_bias, &weights_.ctc_bias})
    vector(*bias);
  const DecoderWeights& trunk = decoder_->weights();
  matrix(trunk.embedding);
  if (trunk.output.data != trunk.embedding.data) matrix(trunk.output);
  vector(trunk.output_norm);
  for (const DecoderLayerWeights& layer : trunk.layers) {
    for (const WeightMatrix& weight :
         {layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down})
      matrix(weight);
    for (const auto* values :
         {&layer.attention_norm, &layer.query_bias, &layer.key_bias, &layer.value_bias,
          &layer.output_bias, &layer.query_norm, &layer.key_norm, &layer.post_attention_norm,
          &layer.feed_forward_norm, &layer.post_feed_forward_norm})
      vector(*values);
  }
  return count;
}

inline void ListenModel::check(const std::string& where) const {
  const auto option = [&](const char* field, std::int64_t value, std::int64_t least,
                          std::int64_t most) {
    if (value < least || value > most)
      throw Error(ErrorCode::kConfig,
                  {"model description makes no sense", where, field,
                   std::to_string(least) + " to " + std::to_string(most), std::to_string(value)});
  };
  option("frame_window", config_.frame_window, 1, 1 << 16);
  option("trained_delay", config_.trained_delay, 0, 1000);
  for (const auto& [field, token] :
       {std::pair{"unknown_token", config_.unknown_token},
        std::pair{"begin_token", config_.begin_token}, std::pair{"end_token", config_.end_token}})
    option(field, token, 0, vocab_size() - 1);
  if (config_.end_token == config_.begin_token || config_.end_token == config_.unknown_token)
    throw Error(ErrorCode::kConfig, {"model description makes no sense", where, "end_token",
                                     "another token than begin_token and unknown_token",
                                     std::to_string(config_.end_token)});
  if (static_cast<std::int64_t>(pieces_.size()) != vocab_size())
    throw Error(ErrorCode::kShape, {"one piece for each token", where, "pieces",
                                    std::to_string(vocab_size()), std::to_string(pieces_.size())});
  for (std::size_t i = 0; i < pieces_.size(); ++i)
    if (pieces_[i].empty())
      throw Error(ErrorCode::kFormat, {"a piece without text", where,
                                       "pieces[" + std::to_string(i) + "]", "letters", "none"});
  const auto matrix = [&](const char* field, const WeightMatrix& weight, std::int64_t rows,
                          std::int64_t cols) {
    validate(weight, where + " " + field);
    if (weight.rows != rows || weight.cols != cols)
      throw Error(ErrorCode::kShape,
                  {"tensor does not fit the model", where, field,
                   "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]",
                   "[" + std::to_string(weight.rows) + ", " + std::to_string(weight.cols) + "]"});
  };
  const auto vector = [&](const char* field, const std::vector<float>& values, std::int64_t size) {
    if (static_cast<std::int64_t>(values.size()) != size)
      throw Error(ErrorCode::kShape,
                  {"tensor does not fit the model", where, field, "[" + std::to_string(size) + "]",
                   "[" + std::to_string(values.size()) + "]"});
  };
  const std::int64_t width = hidden_size();
  matrix("conv1", weights_.conv1, width, 3 * log_mel_.num_mels());
  matrix("conv2", weights_.conv2, width, 3 * width);
  matrix("projection", weights_.projection, width, width);
  matrix("ctc", weights_.ctc, vocab_size() + 1, width);
  vector("conv1_bias", weights_.conv1_bias, width);
  vector("conv2_bias", weights_.conv2_bias, width);
  vector("projection_bias", weights_.projection_bias, width);
  vector("ctc_bias", weights_.ctc_bias, vocab_size() + 1);
}

}  // namespace sluice
