// SPDX-License-Identifier: MIT
/// UTF-8 and Unicode as the tokenisers need them: decoding that tells incomplete from invalid, the
/// character classes of the reference tokenisers, normal forms, lower case.
#pragma once

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "sluice/core/error.hpp"

namespace sluice::detail {

enum class Utf8Kind { kValid, kIncomplete, kInvalid };

/// The first unit of some bytes: one character, the start of one that the bytes end in, or bytes
/// that can start no character. `length` counts its bytes; for kInvalid it is the maximal subpart
/// (Unicode 15, section 3.9, U+FFFD substitution), which is what Python replaces by one U+FFFD.
struct Utf8Unit {
  Utf8Kind kind;
  std::size_t length;
  char32_t code;
};

inline Utf8Unit scan_utf8(std::string_view bytes) {
  const auto byte = [&](std::size_t at) {
    return static_cast<unsigned char>(bytes[at]);
  };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Utf8Kind::kValid, 1, lead};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Kind::kInvalid, 1, 0};
  const std::size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
  unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  char32_t code = static_cast<char32_t>(lead & (0xFF >> (size + 1)));
  for (std::size_t at = 1; at < size; ++at) {
    if (at == bytes.size()) return {Utf8Kind::kIncomplete, at, 0};
    if (byte(at) < low || byte(at) > high) return {Utf8Kind::kInvalid, at, 0};
    code = (code << 6) | (byte(at) & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8Kind::kValid, size, code};
}

/// The offset of the first byte that is not part of a character, or npos.
inline std::size_t find_invalid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Unit unit = scan_utf8(text.substr(at));
    if (unit.kind != Utf8Kind::kValid) return at;
    at += unit.length;
  }
  return std::string_view::npos;
}

inline void append_utf8(std::string& out, char32_t code) {
  utf8proc_uint8_t bytes[4];
  const auto size = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code), bytes);
  out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(size));
}

/// Where the last character of valid, non-empty UTF-8 begins.
inline std::size_t last_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
  return at;
}

/// The property White_Space.
inline bool is_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

/// \w of Unicode regular expressions (UTS 18), without the few symbols that are Other_Alphabetic.
inline bool is_word(char32_t code) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return code == 0x200C || code == 0x200D;
  }
}

/// How many bytes of white space valid UTF-8 starts with, and ends with.
inline std::size_t leading_space(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Utf8Unit unit = scan_utf8(text.substr(at));
    if (!is_space(unit.code)) break;
    at += unit.length;
  }
  return at;
}
inline std::size_t trailing_space(std::string_view text) {
  std::size_t end = text.size();
  while (end > 0) {
    const std::size_t at = last_character(text.substr(0, end));
    if (!is_space(scan_utf8(text.substr(at)).code)) break;
    end = at;
  }
  return text.size() - end;
}

inline bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char character) { return static_cast<unsigned char>(character) < 0x80; });
}

/// A normal form of valid UTF-8. `options` is UTF8PROC_COMPOSE or UTF8PROC_DECOMPOSE, with
/// UTF8PROC_COMPAT for the compatibility forms.
inline std::string normal_form(std::string_view text, int options) {
  if (is_ascii(text)) return std::string(text);
  utf8proc_uint8_t* result = nullptr;
  const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                 static_cast<utf8proc_ssize_t>(text.size()), &result,
                                 static_cast<utf8proc_option_t>(options | UTF8PROC_STABLE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(result, &std::free);
  if (size < 0)
    throw Error(ErrorCode::kText, {"text cannot be normalised", "Unicode normal form", "text",
                                   "a result that fits", utf8proc_errmsg(size)});
  return std::string(reinterpret_cast<const char*>(result), static_cast<std::size_t>(size));
}

/// Lower case, character by character (no rule looks at neighbours).
inline std::string lower_case(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Unit unit = scan_utf8(text.substr(at));
    at += unit.length;
    if (unit.code == 0x130) {
      result += "i\xCC\x87";  // the one character whose lower case is two
    } else {
      append_utf8(result, static_cast<char32_t>(
                              utf8proc_tolower(static_cast<utf8proc_int32_t>(unit.code))));
    }
  }
  return result;
}

/// Upper case, character by character; the simple mapping (sharp s stays).
inline std::string upper_case(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Unit unit = scan_utf8(text.substr(at));
    at += unit.length;
    append_utf8(result,
                static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(unit.code))));
  }
  return result;
}

/// Joins bytes that arrive in pieces to valid UTF-8: an incomplete character at the end waits for
/// its rest, at most 3 bytes; bytes that can be none become U+FFFD as Python's "replace" has it. A
/// small value: copying it saves the state.
class Utf8Assembler {
 public:
  /// `drop_space`: the first byte of all, if it is a space, is left out.
  explicit Utf8Assembler(bool drop_space) : drop_space_(drop_space) {}

  /// Appends to `out` what has become complete.
  void push(std::string_view bytes, std::string& out) {
    if (bytes.empty()) return;
    if (std::exchange(drop_space_, false) && bytes.front() == ' ') bytes.remove_prefix(1);
    while (waiting_size_ > 0 && !bytes.empty()) {
      waiting_[waiting_size_++] = bytes.front();
      const Utf8Unit unit = scan_utf8({waiting_.data(), waiting_size_});
      if (unit.kind == Utf8Kind::kInvalid) {
        waiting_size_ = 0;  // the new byte ended the character, and is looked at again
        out += kReplacement;
        break;
      }
      bytes.remove_prefix(1);
      if (unit.kind == Utf8Kind::kValid) {
        out.append(waiting_.data(), waiting_size_);
        waiting_size_ = 0;
      }
    }
    while (!bytes.empty()) {
      const Utf8Unit unit = scan_utf8(bytes);
      if (unit.kind == Utf8Kind::kIncomplete) {
        std::copy(bytes.begin(), bytes.end(), waiting_.begin());
        waiting_size_ = bytes.size();
        return;
      }
      if (unit.kind == Utf8Kind::kValid) {
        out.append(bytes.substr(0, unit.length));
      } else {
        out += kReplacement;
      }
      bytes.remove_prefix(unit.length);
    }
  }

  /// Ends the text: an incomplete character becomes U+FFFD.
  void finish(std::string& out) {
    if (waiting_size_ > 0) out += kReplacement;
    waiting_size_ = 0;
  }

  /// How many bytes wait for the rest of their character.
  std::size_t waiting() const noexcept { return waiting_size_; }

 private:
  static constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

  std::array<char, 4> waiting_{};
  std::size_t waiting_size_ = 0;
  bool drop_space_;
};

inline void replace_all(std::string& text, std::string_view from, std::string_view to) {
  if (from.empty() || text.find(from) == std::string::npos) return;
  std::string result;
  result.reserve(text.size());
  std::size_t begin = 0;
  for (std::size_t at; (at = text.find(from, begin)) != std::string::npos; begin = at + from.size())
    result.append(text, begin, at - begin).append(to);
  result.append(text, begin);
  text = std::move(result);
}

}  // namespace sluice::detail
