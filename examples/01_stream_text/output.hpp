// SPDX-License-Identifier: MIT
// What goes to stdout: text as it is written, or one JSON object a line.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "options.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/json.hpp"
#include "sluice/stream/clock.hpp"

namespace stream_text {

/// The stream of written tokens on stdout, flushed piece by piece. All functions throw as
/// support::write_stdout().
class Output {
 public:
  explicit Output(Format format) : format_(format) { line_.reserve(256); }

  bool json() const { return format_ == Format::kJson; }

  /// A token was written; `text` is what it completes, often a word, sometimes nothing.
  void token(sluice::Token token, std::string_view text);
  /// Text that belongs to no token: half a character at the end, the line feed after a reply.
  void text(std::string_view text);
  /// One object, as a line. In text format nothing.
  void object(const sluice::Json& object);

 private:
  Format format_;
  std::int64_t index_ = 0;
  std::int64_t start_ns_ = sluice::monotonic_ns();
  std::string line_;
};

}  // namespace stream_text
