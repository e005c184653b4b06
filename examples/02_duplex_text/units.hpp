// SPDX-License-Identifier: MIT
// The source in units, as its text arrives: words, lines or sentences, each with its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "options.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/tokenizer.hpp"
#include "support/text_source.hpp"

namespace duplex_text {

/// A file descriptor that becomes readable when somebody calls raise(): what waits for input waits
/// for it too.
class Wakeup {
 public:
  /// \throws sluice::Error(kIo).
  Wakeup();
  ~Wakeup();
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  /// Any thread. For good.
  void raise() noexcept;
  /// Waits until `descriptor` can be read, or `timeout_ms` are over (below 0: never). False when
  /// raised. `descriptor` may be -1: nothing but the time.
  bool wait(int descriptor, int timeout_ms) const;

 private:
  int descriptors_[2] = {-1, -1};
};

struct SourceUnit {
  std::string text;
  std::vector<sluice::Token> tokens;
  std::int64_t words = 0;
};

/// Where the first unit of `text` ends, or npos while that is not certain. Words end before white
/// space; lines behind their line feed; sentences behind . ! ? (and closing quotes) before white
/// space, behind their full-width forms, and behind an empty line. Units of white space alone do
/// not exist: it belongs to the unit that follows.
std::size_t unit_end(std::string_view text, UnitKind kind);

/// Units of a text that is still arriving. White space at its end is no unit.
class UnitReader {
 public:
  /// All must outlive it.
  UnitReader(const sluice::Tokenizer& tokenizer, support::TextSource source, UnitKind kind,
             std::int64_t max_tokens, const Wakeup& wakeup);

  /// The next unit; waits for it. A unit of more than max_tokens comes in pieces, its text with the
  /// first. False at the end, and when the wakeup was raised.
  /// \throws sluice::Error(kText) naming the byte where the text is not valid UTF-8; kIo.
  bool next(SourceUnit& unit);

 private:
  static constexpr std::size_t kLongestText = std::size_t{1} << 16;

  bool read_unit();

  const sluice::Tokenizer* tokenizer_;
  support::TextSource source_;
  UnitKind kind_;
  std::size_t max_tokens_;
  const Wakeup* wakeup_;
  std::string waiting_;
  std::int64_t bytes_done_ = 0;
  bool ended_ = false;
  SourceUnit current_;
  std::size_t given_ = 0;  // tokens of current_ that next() gave
};

/// Tokens of a whole file in these units. \throws as UnitReader.
std::int64_t count_tokens(const sluice::Tokenizer& tokenizer, const std::string& file,
                          UnitKind kind);

}  // namespace duplex_text
