// SPDX-License-Identifier: MIT
#include "panes.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include <sys/ioctl.h>
#include <unistd.h>
#include <utf8proc.h>

#include "sluice/io/detail/unicode.hpp"
#include "sluice/stream/clock.hpp"
#include "support/terminal.hpp"

namespace duplex_text {

namespace {

constexpr std::size_t kKept = std::size_t{1} << 15;  // bytes of a text
constexpr std::int64_t kDrawNs = 50'000'000;
constexpr int kSideBySide = 60;  // columns

/// Without what could steer the terminal; tabs become spaces.
std::string printable(std::string_view text) {
  std::string result;
  for (std::size_t at = 0; at < text.size();) {
    const sluice::detail::Utf8Unit unit = sluice::detail::scan_utf8(text.substr(at));
    const bool control = unit.kind != sluice::detail::Utf8Kind::kValid || unit.code == 0x7F ||
                         (unit.code >= 0x80 && unit.code < 0xA0) ||
                         (unit.code < 0x20 && unit.code != '\n');
    if (!control)
      result += text.substr(at, unit.length);
    else if (text[at] == '\t')
      result += ' ';
    else if (text[at] != '\r')
      result += "\xEF\xBF\xBD";
    at += unit.length;
  }
  return result;
}

/// Cuts the front off, at a character. Returns the bytes that went.
std::size_t keep_tail(std::string& text) {
  if (text.size() <= kKept + kKept / 4) return 0;
  std::size_t cut = text.size() - kKept;
  while (cut < text.size() && (static_cast<unsigned char>(text[cut]) & 0xC0U) == 0x80U) ++cut;
  text.erase(0, cut);
  return cut;
}

struct Line {
  std::size_t begin = 0, end = 0;  // bytes
  int columns = 0;
};

/// Lines of at most `width` columns, broken at spaces where there are some.
std::vector<Line> wrap(std::string_view text, int width) {
  std::vector<Line> lines{{}};
  std::size_t space = std::string_view::npos;  // behind the last space of the line
  int columns_to_space = 0;
  for (std::size_t at = 0; at < text.size();) {
    const sluice::detail::Utf8Unit unit = sluice::detail::scan_utf8(text.substr(at));
    Line* line = &lines.back();
    if (unit.code == '\n') {
      line->end = at;
      at += 1;
      lines.push_back({at, at, 0});
      space = std::string_view::npos;
      continue;
    }
    const int columns = std::max(utf8proc_charwidth(static_cast<utf8proc_int32_t>(unit.code)), 0);
    if (line->columns + columns > width && line->end > line->begin) {
      const bool at_space = space != std::string_view::npos && space > line->begin;
      const std::size_t begin = at_space ? space : at;
      const int rest = at_space ? line->columns - columns_to_space : 0;
      line->end = begin;
      if (at_space) line->columns = columns_to_space;
      lines.push_back({begin, at, rest});
      line = &lines.back();
      space = std::string_view::npos;
    }
    at += unit.length;
    line->end = at;
    line->columns += columns;
    if (unit.code == ' ') {
      space = at;
      columns_to_space = line->columns;
    }
  }
  return lines;
}

/// A line padded to `width`, what lies at or beyond `dim_from` dimmed.
std::string drawn(std::string_view text, const Line& line, std::size_t dim_from, int width) {
  std::string result;
  const std::size_t bright_end = std::clamp(dim_from, line.begin, line.end);
  result += text.substr(line.begin, bright_end - line.begin);
  if (bright_end < line.end) {
    result += "\x1b[2m";
    result += text.substr(bright_end, line.end - bright_end);
    result += "\x1b[22m";
  }
  // A space at which a line was broken may stand beyond the edge.
  if (line.columns < width) result.append(static_cast<std::size_t>(width - line.columns), ' ');
  return result;
}

std::string at_row(int row, int column) {
  return "\x1b[" + std::to_string(row) + ";" + std::to_string(column) + "H";
}

}  // namespace

Panes::Panes(bool types) : types_(types) {
  support::write_stdout(types_ ? "\x1b[?1049h\x1b[2J" : "\x1b[?1049h\x1b[2J\x1b[?25l");
  draw(true);
}

Panes::~Panes() {
  try {
    close();
  } catch (...) {  // the terminal is gone
  }
}

void Panes::add_source(std::string_view text) {
  source_ += printable(text);
  const auto dropped = static_cast<std::int64_t>(keep_tail(source_));
  source_dropped_ += dropped;
  ++units_fed_;
  unread_ends_.push_back(source_dropped_ + static_cast<std::int64_t>(source_.size()));
  place_cursor_ = pending_ = true;
}

void Panes::read(std::int64_t units) {
  for (; units_read_ < units && !unread_ends_.empty(); ++units_read_) {
    source_read_ = unread_ends_.front();
    unread_ends_.pop_front();
  }
  pending_ = true;
}

void Panes::add_target(std::string_view text) {
  target_ += printable(text);
  keep_tail(target_);
  pending_ = true;
}

void Panes::set_provisional(std::string_view text, std::int64_t tokens) {
  provisional_ = printable(text);
  tokens_ = tokens;
  pending_ = true;
}

void Panes::draw(bool now) {
  if (!open_ || (!pending_ && !now)) return;
  const std::int64_t time = sluice::monotonic_ns();
  if (time < next_ns_ && !now) return;
  next_ns_ = time + kDrawNs;
  pending_ = false;

  winsize size{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0 || size.ws_col == 0)
    size = {24, 80, 0, 0};
  // Two rows at the bottom for what is typed and the line feed behind it.
  // Bounded: a terminal may call itself any size, and every cell is drawn.
  const int rows = std::clamp(size.ws_row - (types_ ? 2 : 0), 4, 500);
  const int columns = std::clamp<int>(size.ws_col, 10, 1000);
  const bool side_by_side = columns >= kSideBySide;
  const int width = side_by_side ? (columns - 3) / 2 : columns;
  const int body = side_by_side ? rows - 1 : (rows - 2) / 2;

  const std::string source_title =
      "source: " + std::to_string(units_fed_) + " units, " + std::to_string(units_read_) + " read";
  const std::string target_title = "target: " + std::to_string(tokens_) + " tokens";
  const std::string target = target_ + provisional_;
  const auto source_lines = wrap(source_, width);
  const auto target_lines = wrap(target, width);
  const auto dim_source =
      static_cast<std::size_t>(std::max<std::int64_t>(source_read_ - source_dropped_, 0));

  std::string out =
      "\x1b"
      "7";
  const auto title = [&](int row, int column, const std::string& text) {
    out += at_row(row, column) + "\x1b[7m" + text.substr(0, static_cast<std::size_t>(width)) +
           std::string(static_cast<std::size_t>(std::max(width - static_cast<int>(text.size()), 0)),
                       ' ') +
           "\x1b[27m";
  };
  const auto pane = [&](int row, int column, std::string_view text, const std::vector<Line>& lines,
                        std::size_t dim_from, const char* color) {
    const std::size_t count = std::min(lines.size(), static_cast<std::size_t>(body));
    for (int r = 0; r < body; ++r) {
      out += at_row(row + r, column) + color;
      if (static_cast<std::size_t>(r) < count)
        out +=
            drawn(text, lines[lines.size() - count + static_cast<std::size_t>(r)], dim_from, width);
      else
        out.append(static_cast<std::size_t>(width), ' ');
      out += "\x1b[39m";
      if (side_by_side && column == 1) out += at_row(row + r, width + 2) + "\xE2\x94\x82";
    }
  };
  const int target_row = side_by_side ? 1 : body + 2;
  const int target_column = side_by_side ? width + 4 : 1;
  title(1, 1, source_title);
  title(target_row, target_column, target_title);
  pane(2, 1, source_, source_lines, dim_source, "\x1b[36m");
  pane(target_row + 1, target_column, target, target_lines, target_.size(), "\x1b[39m");
  if (types_ && place_cursor_)
    out += at_row(rows + 1, 1) + "\x1b[J> ";
  else
    out +=
        "\x1b"
        "8";
  place_cursor_ = false;
  support::write_stdout(out);
}

void Panes::close() {
  if (!open_) return;
  open_ = false;
  support::write_stdout("\x1b[?25h\x1b[?1049l" + target_ + "\n");
}

}  // namespace duplex_text
