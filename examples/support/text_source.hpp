// SPDX-License-Identifier: MIT
// Text in, tokens out, as the text arrives: a file or a pipe of any length in constant memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/core/token.hpp"
#include "sluice/io/tokenizer.hpp"

namespace support {

/// Bytes of whole characters at the front of `text`, which may end in the middle of one.
std::size_t whole_characters(std::string_view text);

/// `source` and `offset` say where `text` stands: a name, and bytes before it.
/// \throws sluice::Error(kText) naming the byte where it is not valid UTF-8 (RFC 3629).
void require_utf8(std::string_view text, const std::string& source, std::int64_t offset);

/// Bytes of a text: given at once, of a file, or of stdin.
class TextSource {
 public:
  static TextSource from_text(std::string text);
  /// \throws sluice::Error(kIo).
  static TextSource from_file(const std::string& path);
  static TextSource from_stdin();
  ~TextSource();
  TextSource(TextSource&& other) noexcept;
  TextSource& operator=(TextSource&&) = delete;

  /// Appends what is there, waiting only if nothing is. False at the end of the text, and when a
  /// signal was caught. \throws sluice::Error(kIo).
  bool read(std::string& out);

  /// Whether read() has given out everything, as far as that is known before it returns false.
  bool exhausted() const { return total_bytes_ >= 0 && bytes_read_ >= total_bytes_; }

  /// The file descriptor, to wait for; -1 for a text that was given at once.
  int descriptor() const { return descriptor_; }
  /// What errors call it.
  const std::string& name() const { return name_; }
  /// Bytes of the whole text, or -1 where nobody knows.
  std::int64_t total_bytes() const { return total_bytes_; }

 private:
  TextSource(std::string name, int descriptor, bool owns)
      : name_(std::move(name)), descriptor_(descriptor), owns_(owns) {}

  std::string name_;
  int descriptor_ = -1;  // -1: text_ is all there is
  bool owns_ = false;
  std::string text_;
  std::int64_t total_bytes_ = -1;
  std::int64_t bytes_read_ = 0;
};

/// The tokens of a source, in the runs in which the text arrives.
///
/// Text is cut only where the tokeniser would part it anyway: before a space that follows a
/// printable ASCII character; where the tokeniser puts a space in front of a text, only if such a
/// character comes after the space too; where not, also after a line feed between two of them. No
/// pre-tokeniser in use joins text across these, so the tokens are those of the whole text. (Text
/// without such a place is cut all the same once kLongestPart bytes wait.) What is after the last
/// such place waits for more, or for the end.
class TokenSource {
 public:
  static constexpr std::size_t kLongestPart = std::size_t{1} << 16;

  /// `tokenizer` must outlive it. `begins`: this is the start of the stream, which the begin token
  /// goes in front of where the tokeniser says so.
  TokenSource(const sluice::Tokenizer& tokenizer, TextSource source, bool begins);

  /// Appends the next tokens, one or more. False at the end, and when a signal was caught.
  /// \throws sluice::Error(kText) naming the byte where the text is not valid UTF-8; kIo.
  bool next(std::vector<sluice::Token>& tokens);

  /// How much of the text is done, 0 to 1, when `part` of the last tokens that next() gave are; -1
  /// where nobody knows.
  double fraction(double part) const;

 private:
  void encode(std::string_view text, std::vector<sluice::Token>& tokens);

  const sluice::Tokenizer* tokenizer_;
  TextSource source_;
  std::string waiting_;
  std::size_t searched_ = 0;       // bytes of waiting_ that have no place to cut
  std::int64_t bytes_done_ = 0;    // of the text, encoded
  std::int64_t bytes_before_ = 0;  // of these, before the last next()
  bool ended_ = false;
  bool wants_bos_;
};

}  // namespace support
