// SPDX-License-Identifier: MIT
/// Greedy decoding of transducers (RNN-T, Graves, arXiv 1211.3711), frame by frame: the predictor's
/// last token is carried from chunk to chunk.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// For each frame: the joint network is asked with the frame and the predictor's output; a blank
/// ends the frame, anything else is emitted and fed to the predictor, at most max_symbols times a
/// frame (released decoders: 1 in sherpa-onnx, 10 in NeMo). Any cut of the frames into chunks gives
/// the same tokens at the same frames. Allocates nothing.
class TransducerGreedy {
 public:
  /// \throws Error(kConfig) if max_symbols < 1.
  explicit TransducerGreedy(Token blank, std::int64_t max_symbols = 1)
      : blank_(blank), max_symbols_(max_symbols) {
    if (max_symbols < 1)
      throw Error(ErrorCode::kConfig, {"option out of range", "TransducerGreedy", "max_symbols",
                                       "at least 1", std::to_string(max_symbols)});
  }

  /// Decodes the next `count` frames. joint(frame of this chunk) gives the best token for it and
  /// the predictor's present output; predict(token) runs the predictor on a token that was emitted;
  /// emit(token, frame of the stream) takes it. The predictor's state is the caller's: it begins
  /// without a token, and is carried from chunk to chunk.
  template <class Joint, class Predict, class Emit>
  void push(std::int64_t count, Joint&& joint, Predict&& predict, Emit&& emit) {
    for (std::int64_t t = 0; t < count; ++t)
      for (std::int64_t symbols = 0; symbols < max_symbols_; ++symbols) {
        const Token token = joint(t);
        if (token == blank_) break;
        emit(token, frames_ + t);
        predict(token);
      }
    frames_ += count;
  }

  /// Frames since the start.
  std::int64_t frames() const { return frames_; }
  void reset() { frames_ = 0; }

 private:
  Token blank_;
  std::int64_t max_symbols_;
  std::int64_t frames_ = 0;
};

}  // namespace sluice
