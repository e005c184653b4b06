// SPDX-License-Identifier: MIT
/// Regular expressions of tokeniser files (written for Oniguruma) through PCRE2, with limits on
/// what an untrusted pattern may cost.
#pragma once

#ifndef PCRE2_CODE_UNIT_WIDTH
#define PCRE2_CODE_UNIT_WIDTH 8
#endif
#include <pcre2.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/io/detail/text.hpp"

namespace sluice::detail {

/// A half-open range of bytes.
struct ByteRange {
  std::size_t begin;
  std::size_t end;
};

/// One compiled pattern. Const use is safe from any number of threads.
class Regex {
 public:
  /// \throws Error(kUnsupported) naming the pattern: PCRE2 refuses it, or it uses an escape or set
  /// syntax that means something else in Oniguruma.
  Regex(std::string_view pattern, std::string_view where) : where_(where) {
    const std::string translated = translate(pattern);
    int status = 0;
    PCRE2_SIZE offset = 0;
    const std::unique_ptr<pcre2_compile_context_8, FreeCompileContext> context(
        pcre2_compile_context_create_8(nullptr));
    if (context == nullptr) throw std::bad_alloc();
    pcre2_set_max_pattern_length_8(context.get(), kMaxPatternBytes);
    // Multi-line: in Oniguruma's default syntax ^ and $ match at lines.
    code_.reset(pcre2_compile_8(reinterpret_cast<PCRE2_SPTR8>(translated.data()), translated.size(),
                                PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                                &status, &offset, context.get()));
    if (code_ == nullptr) {
      PCRE2_UCHAR8 message[256] = {};
      pcre2_get_error_message_8(status, message, sizeof(message));
      refuse(pattern, reinterpret_cast<const char*>(message));
    }
    // Without a just-in-time compiler on this machine, matching is interpreted: same result.
    pcre2_jit_compile_8(code_.get(), PCRE2_JIT_COMPLETE);
  }

  /// Calls `on_match(ByteRange)` for each match in valid UTF-8, from left to right. An empty match
  /// right after a match does not count.
  /// \throws Error(kText) when matching exceeds its limits, which grow with the text.
  template <class OnMatch>
  void for_each(std::string_view text, OnMatch on_match) const {
    const std::unique_ptr<pcre2_match_data_8, FreeMatchData> match(
        pcre2_match_data_create_8(1, nullptr));
    const std::unique_ptr<pcre2_match_context_8, FreeMatchContext> context(
        pcre2_match_context_create_8(nullptr));
    if (match == nullptr || context == nullptr) throw std::bad_alloc();
    // Backing out of a run of n characters takes n steps, so the limit is linear in the text.
    const std::size_t steps = kMatchSteps + 32 * text.size();
    pcre2_set_match_limit_8(context.get(),
                            static_cast<std::uint32_t>(std::min<std::size_t>(steps, UINT32_MAX)));
    pcre2_set_depth_limit_8(context.get(), kMatchDepth);
    pcre2_set_heap_limit_8(context.get(), kMatchHeapKib);

    std::optional<std::size_t> last_end;
    std::size_t from = 0;
    while (from <= text.size()) {
      const auto run = [&](std::uint32_t options) {
        return pcre2_match_8(code_.get(), reinterpret_cast<PCRE2_SPTR8>(text.data()), text.size(),
                             from, options | PCRE2_NO_UTF_CHECK, match.get(), context.get());
      };
      int status = run(0);
      if (status == PCRE2_ERROR_JIT_STACKLIMIT) status = run(PCRE2_NO_JIT);
      if (status == PCRE2_ERROR_NOMATCH) return;
      if (status < 0) fail(status);
      const PCRE2_SIZE* const ends = pcre2_get_ovector_pointer_8(match.get());
      const ByteRange range{ends[0], ends[1]};
      if (range.begin > range.end || range.begin < from) fail(PCRE2_ERROR_NOMATCH);  // \K
      if (range.begin == range.end) {
        if (last_end != range.end) on_match(range);
        from = range.end + 1;  // to the next character
        while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xC0) == 0x80)
          ++from;
      } else {
        on_match(range);
        from = range.end;
      }
      last_end = range.end;
    }
  }

 private:
  static constexpr std::size_t kMaxPatternBytes = 1 << 16;
  static constexpr std::size_t kMatchSteps = 1'000'000;
  static constexpr std::uint32_t kMatchDepth = 100'000;
  static constexpr std::uint32_t kMatchHeapKib = 64 * 1024;

  struct FreeCode {
    void operator()(pcre2_code_8* code) const { pcre2_code_free_8(code); }
  };
  struct FreeCompileContext {
    void operator()(pcre2_compile_context_8* c) const { pcre2_compile_context_free_8(c); }
  };
  struct FreeMatchData {
    void operator()(pcre2_match_data_8* data) const { pcre2_match_data_free_8(data); }
  };
  struct FreeMatchContext {
    void operator()(pcre2_match_context_8* c) const { pcre2_match_context_free_8(c); }
  };

  [[noreturn]] void refuse(std::string_view pattern, std::string reason) const {
    throw Error(ErrorCode::kUnsupported,
                {"regular expression is not supported", where_, quote_text(pattern, 240),
                 "a pattern that Oniguruma and PCRE2 read alike", std::move(reason)});
  }
  [[noreturn]] void fail(int status) const {
    PCRE2_UCHAR8 message[256] = {};
    pcre2_get_error_message_8(status, message, sizeof(message));
    throw Error(ErrorCode::kText,
                {"text cannot be split by the tokeniser's regular expression", where_, "text",
                 "matches within the limits", reinterpret_cast<const char*>(message)});
  }

  // Where the two engines read the same characters differently: \s is White_Space in Oniguruma and
  // has one character more (U+180E) in PCRE2; \h, \w, \b and sets within sets differ for good.
  std::string translate(std::string_view pattern) const {
    std::string result;
    bool in_set = false;
    for (std::size_t at = 0; at < pattern.size(); ++at) {
      const char character = pattern[at];
      const std::string_view rest = pattern.substr(at + 1);
      if (character == '\\' && !rest.empty()) {
        ++at;
        switch (rest[0]) {
          case 's': result += "\\p{White_Space}"; break;
          case 'S': result += "\\P{White_Space}"; break;
          case 'h':
          case 'H':
          case 'w':
          case 'W':
          case 'b':
          case 'B':
          case 'K':
          case 'Q': refuse(pattern, std::string("the escape \\") + rest[0]);
          default: result += {'\\', rest[0]};
        }
        continue;
      }
      if (in_set) {
        if (character == '[' && !rest.starts_with(':')) refuse(pattern, "a set within a set");
        if (character == '&' && rest.starts_with('&')) refuse(pattern, "an intersection of sets");
        if (character == '[') {  // a class by name: its own brackets, copied whole
          const std::size_t end = pattern.find(":]", at);
          if (end == std::string_view::npos) refuse(pattern, "an unfinished set");
          result += pattern.substr(at, end + 2 - at);
          at = end + 1;
          continue;
        }
        in_set = character != ']';
      } else if (character == '[') {
        in_set = true;
        result += character;
        if (rest.starts_with('^')) {
          result += '^';
          ++at;
        }
        continue;
      }
      result += character;
    }
    return result;
  }

  std::string where_;
  std::unique_ptr<pcre2_code_8, FreeCode> code_;
};

}  // namespace sluice::detail
