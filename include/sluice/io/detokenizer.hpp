// SPDX-License-Identifier: MIT
/// Tokens back to text while they are being produced: text comes out as soon as it is certain, and
/// never half a character.
#pragma once

#include <cstddef>
#include <string>

#include "sluice/core/token.hpp"
#include "sluice/io/detail/unicode.hpp"
#include "sluice/io/tokenizer.hpp"

namespace sluice {

struct DetokenizerOptions {
  bool skip_special = true;  ///< special tokens give no text
  bool starts_text = true;   ///< nothing came before: a leading space that encoding put is dropped
};

/// Turns a stream of tokens into UTF-8. However the tokens are spread over calls, the joined output
/// of push() and finish() is what Tokenizer::decode gives for all of them. At most 3 bytes are held
/// back, the beginning of a character; bytes that can be none become U+FFFD, one for each maximal
/// part, as Python's "replace" does. One stream, one thread; the tokeniser must outlive it. Copying
/// it copies the state, so a saved copy continues where the original stood.
class StreamingDetokenizer {
 public:
  explicit StreamingDetokenizer(const Tokenizer& tokenizer, DetokenizerOptions options = {})
      : tokenizer_(&tokenizer),
        skip_special_(options.skip_special),
        assembler_(options.starts_text && tokenizer.drops_leading_space()) {}

  /// Appends to `out` the text that this token completes, often none. A number outside the
  /// vocabulary gives no text. Allocates only if `out` has too little room: 3 * max_bytes() + 3
  /// bytes are always enough.
  void push(Token token, std::string& out) {
    if (skip_special_ && tokenizer_->is_special(token)) return;
    assembler_.push(tokenizer_->bytes(token), out);
  }

  /// The same as a new string.
  std::string push(Token token) {
    std::string out;
    push(token, out);
    return out;
  }

  /// Ends the text: what is still held back becomes one U+FFFD. Pushing may go on afterwards.
  void finish(std::string& out) { assembler_.finish(out); }
  std::string finish() {
    std::string out;
    finish(out);
    return out;
  }

  /// How many bytes are held back, 0 to 3.
  std::size_t held_back() const noexcept { return assembler_.waiting(); }

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  detail::Utf8Assembler assembler_;
};

}  // namespace sluice
