// SPDX-License-Identifier: MIT
/// Greedy decoding of connectionist temporal classification, frame by frame: repeats collapse,
/// blanks go, and the last label is carried from chunk to chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "sluice/core/config.hpp"
#include "sluice/core/token.hpp"

namespace sluice {

/// Index of the largest value, the first of equal ones. Precondition: values is not empty.
inline Token argmax(std::span<const float> values) {
  SLUICE_ASSERT(!values.empty());
  std::size_t best = 0;
  for (std::size_t i = 1; i < values.size(); ++i)
    if (values[i] > values[best]) best = i;
  return static_cast<Token>(best);
}

/// The state of greedy CTC decoding (Graves et al., ICML 2006, section 3.2: the best path): one
/// label. Any cut of the frames into chunks gives the same tokens. Allocates nothing.
class CtcGreedy {
 public:
  explicit CtcGreedy(Token blank) : blank_(blank), last_(blank) {}

  Token blank() const { return blank_; }

  /// The label of the next frame: a token where one begins, nothing for a blank or a repeat.
  std::optional<Token> push(Token label) {
    const bool begins = label != last_ && label != blank_;
    last_ = label;
    ++frames_;
    blank_run_ = label == blank_ ? blank_run_ + 1 : 0;
    return begins ? std::optional<Token>(label) : std::nullopt;
  }
  /// The same for a frame's scores, one for each label, blank included.
  std::optional<Token> push(std::span<const float> scores) { return push(argmax(scores)); }

  /// Frames since the start, and how many of the last ones were blank.
  std::int64_t frames() const { return frames_; }
  std::int64_t blank_run() const { return blank_run_; }

  void reset() { *this = CtcGreedy(blank_); }

 private:
  Token blank_;
  Token last_;
  std::int64_t frames_ = 0;
  std::int64_t blank_run_ = 0;
};

}  // namespace sluice
