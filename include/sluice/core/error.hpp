// SPDX-License-Identifier: MIT
/// Errors of construction, loading and configuration. Each says what went wrong, where, what was
/// expected and what was found, and carries a code that a program can switch on. Hot functions
/// (a step after construction) throw none of these: they assert in debug builds or return a status.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace sluice {

/// The kinds of failure. A caller switches on these; the text is for people.
enum class ErrorCode {
  kIo,           ///< the operating system refused: open, read, map, write
  kFormat,       ///< a file's content is damaged or is not what its type promises
  kUnsupported,  ///< valid, but not something this library implements
  kShape,        ///< extents of tensors or spans do not fit together
  kConfig,       ///< an option or a combination of options makes no sense
  kCapacity,     ///< the fixed capacity cannot hold what was asked for
  kOrder,        ///< calls came in an order that the contract forbids
  kText,         ///< text is not valid UTF-8, or cannot be tokenised
  kDevice,       ///< an accelerator refused: allocation, copy, launch
};

/// The word for a code, for messages and JSON.
constexpr std::string_view to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::kIo: return "io";
    case ErrorCode::kFormat: return "format";
    case ErrorCode::kUnsupported: return "unsupported";
    case ErrorCode::kShape: return "shape";
    case ErrorCode::kConfig: return "config";
    case ErrorCode::kCapacity: return "capacity";
    case ErrorCode::kOrder: return "order";
    case ErrorCode::kText: return "text";
    case ErrorCode::kDevice: return "device";
  }
  return "unknown";
}

/// What an error is made of. `where` names the file, tensor, option or call; `field` the part of it
/// (a header field with its byte offset, a dimension); either may be empty.
struct ErrorDetail {
  std::string what;
  std::string where;
  std::string field;
  std::string expected;
  std::string found;
};

/// The one exception type of the library. what() reads
/// "<code>: <what> [in <where>][, field <field>][: expected <expected>][, found <found>]".
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, ErrorDetail detail)
      : std::runtime_error(message(code, detail)), code_(code), detail_(std::move(detail)) {}

  ErrorCode code() const noexcept { return code_; }
  const ErrorDetail& detail() const noexcept { return detail_; }

 private:
  static std::string message(ErrorCode code, const ErrorDetail& detail) {
    std::string text{to_string(code)};
    text += ": " + detail.what;
    if (!detail.where.empty()) text += " in " + detail.where;
    if (!detail.field.empty()) text += ", field " + detail.field;
    if (!detail.expected.empty()) text += ": expected " + detail.expected;
    if (!detail.found.empty()) text += (detail.expected.empty() ? ": found " : ", found ") + detail.found;
    return text;
  }

  ErrorCode code_;
  ErrorDetail detail_;
};

}  // namespace sluice
