// SPDX-License-Identifier: MIT
// The target as text while it grows, provisional tokens included, and how far its words lag.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/core/token.hpp"
#include "sluice/io/detokenizer.hpp"
#include "sluice/io/tokenizer.hpp"
#include "sluice/stream/duplex_engine.hpp"
#include "view.hpp"

namespace duplex_text {

class Transcript {
 public:
  /// Words whose delay is kept, the first ones: an endless stream has no average lagging.
  static constexpr std::size_t kMostWords = 65536;

  explicit Transcript(const sluice::Tokenizer& tokenizer);

  /// The output with its text. What it refers to is valid until the next call.
  Written add(const sluice::DuplexOutput& output);
  /// Text that was held back. Ends the last word.
  std::string finish();

  std::int64_t tokens() const { return tokens_; }
  std::int64_t words() const { return words_; }
  /// Source units seen when each word ended.
  const std::vector<std::int64_t>& delays() const { return delays_; }

 private:
  void make_final(sluice::Token token, std::int64_t units_read);
  void end_word();

  const sluice::Tokenizer* tokenizer_;
  std::vector<std::uint8_t> classes_;  // [vocab_size], sluice::WordUnits
  sluice::StreamingDetokenizer final_;
  sluice::StreamingDetokenizer tail_;       // final_, and the provisional tokens
  std::vector<sluice::Token> provisional_;  // oldest first
  std::vector<sluice::Token> confirmed_;
  std::string text_, provisional_text_;
  std::int64_t tokens_ = 0;
  std::int64_t words_ = 0;
  std::int64_t word_delay_ = -1;  // of the word that is being written; -1: none is
  std::vector<std::int64_t> delays_;
};

}  // namespace duplex_text
