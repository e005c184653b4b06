// SPDX-License-Identifier: MIT
/// How file content appears in error messages: quoted, escaped and cut, so that a hostile file can
/// neither flood a log nor send control sequences to a terminal.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace sluice::detail {

/// `text` in single quotes, bytes outside printable ASCII as \xNN, cut after `limit` bytes.
inline std::string quote_text(std::string_view text, std::size_t limit = 80) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string result = "'";
  for (const char character : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(character);
    if (byte >= 0x20 && byte < 0x7f) {
      result += character;
    } else {
      result += "\\x";
      result += kDigits[byte >> 4];
      result += kDigits[byte & 15];
    }
  }
  result += "'";
  if (text.size() > limit) result += "... (" + std::to_string(text.size()) + " bytes)";
  return result;
}

/// "<field> (byte <offset>)": a header field and where it starts in its file.
inline std::string at_byte(std::string_view field, std::size_t offset) {
  return std::string(field) + " (byte " + std::to_string(offset) + ")";
}

}  // namespace sluice::detail
