// SPDX-License-Identifier: MIT
// Source and target side by side on a terminal, drawn over and over.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>

namespace duplex_text {

/// Takes the terminal's second screen and gives it back, with the target's text on the first. The
/// source stands left (above, where the terminal is narrow), what the target has not read yet
/// dimmed; the target right, provisional text dimmed. Keeps the last 32 KiB of either text. Control
/// characters of texts do not reach the terminal.
class Panes {
 public:
  /// types: the source is typed on this terminal; it keeps two rows at the bottom.
  explicit Panes(bool types);
  ~Panes();
  Panes(const Panes&) = delete;
  Panes& operator=(const Panes&) = delete;

  /// One source unit.
  void add_source(std::string_view text);
  /// So many units are seen by the target.
  void read(std::int64_t units);
  void add_target(std::string_view text);
  void set_provisional(std::string_view text, std::int64_t tokens);

  /// At most 20 times a second, unless `now`.
  void draw(bool now);
  /// Gives the screen back and writes the target's text. Again: without effect.
  void close();

 private:
  bool types_;
  bool open_ = true;
  bool place_cursor_ = true;
  bool pending_ = false;
  std::int64_t next_ns_ = 0;
  std::string source_, target_, provisional_;
  std::int64_t source_dropped_ = 0;       // bytes of the source that are no longer kept
  std::deque<std::int64_t> unread_ends_;  // of the units not read yet, in bytes of the source
  std::int64_t source_read_ = 0;          // bytes of the source that the target sees
  std::int64_t units_fed_ = 0, units_read_ = 0, tokens_ = 0;
};

}  // namespace duplex_text
