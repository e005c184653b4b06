// SPDX-License-Identifier: MIT
// What a stream shows while it runs: JSON lines, the target's text alone, or two panes.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "options.hpp"
#include "sluice/core/token.hpp"
#include "sluice/io/json.hpp"
#include "sluice/stream/duplex_engine.hpp"

namespace duplex_text {

/// A source unit went into the stream.
struct FedUnit {
  enum class Kind { kPrompt, kSource, kClosing };
  Kind kind = Kind::kSource;
  std::int64_t unit = 0;  ///< from 0
  std::int64_t tokens = 0;
  std::string_view text;
  std::int64_t time_ns = 0;
};

/// An output of the stream, with its text.
struct Written {
  sluice::DuplexOutput output;
  std::int64_t index = 0;                 ///< of the first target token concerned
  std::string_view text;                  ///< what it adds: to the final text, or provisionally
  std::span<const sluice::Token> tokens;  ///< that became final
  std::string_view provisional;           ///< all provisional text now
};

/// One call at a time, from any thread. All of them may throw what support::write_stdout() throws.
class View {
 public:
  virtual ~View() = default;
  virtual void fed(const FedUnit&) {}
  /// The target sees so much of the source; told with the first output that follows.
  virtual void read(std::int64_t units, std::int64_t tokens, std::int64_t time_ns) = 0;
  virtual void written(const Written&) = 0;
  /// Nothing happened for a moment.
  virtual void tick() {}
  /// The target is complete; `rest` is text that was held back.
  virtual void end(std::string_view rest, std::string_view reason, std::int64_t time_ns) = 0;
  virtual void report(const sluice::Json&) {}
};

/// JSON where it is asked for; panes on a terminal, unless --plain; else text.
/// start_ns: monotonic_ns() that times in events count from.
std::unique_ptr<View> make_view(const Options& options, std::int64_t start_ns);

}  // namespace duplex_text
