// SPDX-License-Identifier: MIT
/// JSON from untrusted files: bounded nesting, errors that name the file and the byte, and typed
/// access to members whose errors name the file, the field, what was expected and what was found.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "sluice/core/error.hpp"
#include "sluice/io/detail/text.hpp"
#include "sluice/io/mapped_file.hpp"

namespace sluice {

/// The JSON value type of the readers.
using Json = nlohmann::json;

/// How deeply arrays and objects may nest. Known files need less than ten levels; the limit keeps
/// every recursive walk over a parsed value (copying, comparing, printing) within a small stack.
inline constexpr int kMaxJsonDepth = 128;

/// What a member name that occurs twice in one object means. RFC 8259 leaves it open.
enum class DuplicateKeys {
  kLastWins,  ///< as most readers do
  kReject,    ///< an error, for formats that forbid it
};

namespace detail {

inline void check_json_depth(std::string_view text, std::string_view where,
                             std::size_t first_byte) {
  std::ptrdiff_t depth = 0;  // wide: closing brackets of a broken text may take it far below zero
  bool in_string = false;
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char character = text[at];
    if (in_string) {
      if (character == '\\') ++at;
      if (character == '"') in_string = false;
    } else if (character == '"') {
      in_string = true;
    } else if (character == '[' || character == '{') {
      if (++depth > kMaxJsonDepth)
        throw Error(
            ErrorCode::kFormat,
            {"JSON is nested too deeply", std::string(where), at_byte("JSON", first_byte + at),
             "at most " + std::to_string(kMaxJsonDepth) + " levels", "more"});
    } else if (character == ']' || character == '}') {
      --depth;
    }
  }
}

/// Builds a value from parser events. Used instead of the library's own builder because that one
/// accepts duplicate names and loses the byte position of numbers that are out of range.
class JsonBuilder final : public nlohmann::json_sax<Json> {
 public:
  JsonBuilder(std::string_view where, DuplicateKeys duplicates, std::size_t first_byte,
              std::size_t size)
      : where_(where), duplicates_(duplicates), first_byte_(first_byte), size_(size) {}

  Json take() { return std::move(root_); }

  bool null() override { return add(Json(nullptr)); }
  bool boolean(bool value) override { return add(Json(value)); }
  bool number_integer(number_integer_t value) override { return add(Json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return add(Json(value)); }
  bool number_float(number_float_t value, const string_t&) override { return add(Json(value)); }
  bool string(string_t& value) override { return add(Json(std::move(value))); }
  bool binary(binary_t&) override { return false; }  // does not occur in text
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    const auto [member, is_new] = open_.back()->get_ref<Json::object_t&>().try_emplace(name);
    if (!is_new && duplicates_ == DuplicateKeys::kReject)
      throw Error(ErrorCode::kFormat, {"JSON object with a duplicate name", where_,
                                       quote_text(name), "one occurrence", "two"});
    member_ = &member->second;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    // The parser counts the bytes it has read, the offending one included.
    const std::size_t at = std::min(position == 0 ? 0 : position - 1, size_);
    throw Error(ErrorCode::kFormat,
                {"JSON cannot be parsed", where_, at_byte("JSON", first_byte_ + at), "valid JSON",
                 quote_text(error.what(), 240)});
  }

 private:
  Json* place(Json&& value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& elements = open_.back()->get_ref<Json::array_t&>();
      elements.push_back(std::move(value));
      return &elements.back();
    }
    *member_ = std::move(value);
    return member_;
  }
  bool add(Json&& value) {
    place(std::move(value));
    return true;
  }
  bool open(Json&& value) {
    open_.push_back(
        place(std::move(value)));  // stays put: its parent does not grow while it is open
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::string where_;
  DuplicateKeys duplicates_;
  std::size_t first_byte_;
  std::size_t size_;
  Json root_;
  std::vector<Json*> open_;  // innermost last
  Json* member_ = nullptr;   // where the value after a name goes
};

inline std::string describe_json(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "null";
    case Json::value_t::boolean: return value.get<bool>() ? "true" : "false";
    case Json::value_t::string: return "string " + quote_text(value.get_ref<const std::string&>());
    case Json::value_t::array: return "array of " + std::to_string(value.size());
    case Json::value_t::object: return "object of " + std::to_string(value.size());
    case Json::value_t::number_float: return "real number " + value.dump();
    default: return "integer " + value.dump();
  }
}

[[noreturn]] inline void json_mismatch(std::string_view field, std::string_view where,
                                       std::string_view expected, std::string found) {
  throw Error(ErrorCode::kFormat, {"JSON field has the wrong type or value", std::string(where),
                                   std::string(field), std::string(expected), std::move(found)});
}

// The member, or nullptr when it is absent. An error when `object` is no object.
inline const Json* json_find(const Json& object, std::string_view key, std::string_view where,
                             std::string_view expected) {
  if (!object.is_object())
    json_mismatch(quote_text(key), where, "an object with " + std::string(expected),
                  describe_json(object));
  const auto& members = object.get_ref<const Json::object_t&>();
  const auto member = members.find(key);
  return member == members.end() ? nullptr : &member->second;
}

inline std::optional<std::int64_t> to_int(const Json& value) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (std::in_range<std::int64_t>(number)) return static_cast<std::int64_t>(number);
  } else if (value.is_number_integer()) {
    return value.get<std::int64_t>();
  }
  return std::nullopt;
}
inline std::optional<std::uint64_t> to_uint(const Json& value) {
  if (value.is_number_unsigned()) return value.get<std::uint64_t>();
  // Values that programs put in place themselves may be signed.
  if (value.is_number_integer() && value.get<std::int64_t>() >= 0)
    return static_cast<std::uint64_t>(value.get<std::int64_t>());
  return std::nullopt;
}
inline std::optional<double> to_float(const Json& value) {
  if (value.is_number()) return value.get<double>();
  return std::nullopt;
}
inline std::optional<bool> to_bool(const Json& value) {
  if (value.is_boolean()) return value.get<bool>();
  return std::nullopt;
}
inline std::optional<std::string> to_text(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  return std::nullopt;
}

// One member through one conversion.
template <class Convert>
auto json_get(const Json& object, std::string_view key, std::string_view where,
              std::string_view expected, Convert convert) {
  const Json* const value = json_find(object, key, where, expected);
  if (value == nullptr) json_mismatch(quote_text(key), where, expected, "no such field");
  const auto result = convert(*value);
  if (!result) json_mismatch(quote_text(key), where, expected, describe_json(*value));
  return *result;
}

// The same, where a member that is absent or null means the fallback.
template <class Convert, class Value>
Value json_get_or(const Json& object, std::string_view key, std::string_view where, Value fallback,
                  std::string_view expected, Convert convert) {
  const Json* const value = json_find(object, key, where, expected);
  if (value == nullptr || value->is_null()) return fallback;
  return json_get(object, key, where, expected, convert);
}

// An array whose elements all go through one conversion.
template <class Value, class Convert>
std::vector<Value> json_get_all(const Json& object, std::string_view key, std::string_view where,
                                std::string_view expected, Convert convert) {
  const std::string array_of = "an array of " + std::string(expected);
  const Json* const array = json_find(object, key, where, array_of);
  if (array == nullptr) json_mismatch(quote_text(key), where, array_of, "no such field");
  if (!array->is_array()) json_mismatch(quote_text(key), where, array_of, describe_json(*array));
  std::vector<Value> result;
  result.reserve(array->size());
  for (const Json& element : *array) {
    auto value = convert(element);
    if (!value)
      json_mismatch(quote_text(key) + "[" + std::to_string(result.size()) + "]", where, expected,
                    describe_json(element));
    result.push_back(std::move(*value));
  }
  return result;
}

}  // namespace detail

/// Parses one JSON text (RFC 8259, UTF-8 checked, a byte order mark is skipped). `where` names the
/// file in errors, `first_byte` is where the text starts in it.
/// \throws Error(kFormat) with the byte position: not valid JSON, a number out of range, nested
/// deeper than kMaxJsonDepth, or (kReject) a name that occurs twice in an object.
inline Json parse_json(std::string_view text, std::string_view where,
                       DuplicateKeys duplicates = DuplicateKeys::kLastWins,
                       std::size_t first_byte = 0) {
  detail::check_json_depth(text, where, first_byte);
  detail::JsonBuilder builder(where, duplicates, first_byte, text.size());
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

/// Reads and parses a whole JSON file.
/// \throws Error(kIo) as MappedFile does, Error(kFormat) as parse_json does.
inline Json read_json_file(const std::string& path,
                           DuplicateKeys duplicates = DuplicateKeys::kLastWins) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  return parse_json({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path, duplicates);
}

/// \name Members of an object, by type
/// `where` names the file in errors. Each throws Error(kFormat) naming file, field, expected and
/// found when `object` is no object, or the member is absent or of another type. The `_or` forms
/// give the fallback for a member that is absent or null; another type is still an error.
/// @{

/// An integer within int64; 1.0 is not one.
inline std::int64_t json_int(const Json& object, std::string_view key, std::string_view where) {
  return detail::json_get(object, key, where, "an integer", detail::to_int);
}
inline std::int64_t json_int_or(const Json& object, std::string_view key, std::string_view where,
                                std::int64_t fallback) {
  return detail::json_get_or(object, key, where, fallback, "an integer", detail::to_int);
}

/// An integer within uint64, not negative.
inline std::uint64_t json_uint(const Json& object, std::string_view key, std::string_view where) {
  return detail::json_get(object, key, where, "an integer of at least 0", detail::to_uint);
}
inline std::uint64_t json_uint_or(const Json& object, std::string_view key, std::string_view where,
                                  std::uint64_t fallback) {
  return detail::json_get_or(object, key, where, fallback, "an integer of at least 0",
                             detail::to_uint);
}

/// Any number, integers included.
inline double json_float(const Json& object, std::string_view key, std::string_view where) {
  return detail::json_get(object, key, where, "a number", detail::to_float);
}
inline double json_float_or(const Json& object, std::string_view key, std::string_view where,
                            double fallback) {
  return detail::json_get_or(object, key, where, fallback, "a number", detail::to_float);
}

/// true or false.
inline bool json_bool(const Json& object, std::string_view key, std::string_view where) {
  return detail::json_get(object, key, where, "true or false", detail::to_bool);
}
inline bool json_bool_or(const Json& object, std::string_view key, std::string_view where,
                         bool fallback) {
  return detail::json_get_or(object, key, where, fallback, "true or false", detail::to_bool);
}

/// A string, UTF-8.
inline std::string json_string(const Json& object, std::string_view key, std::string_view where) {
  return detail::json_get(object, key, where, "a string", detail::to_text);
}
inline std::string json_string_or(const Json& object, std::string_view key, std::string_view where,
                                  std::string fallback) {
  return detail::json_get_or(object, key, where, std::move(fallback), "a string", detail::to_text);
}

/// An array of integers, of numbers, of strings: copied out, in order.
inline std::vector<std::int64_t> json_ints(const Json& object, std::string_view key,
                                           std::string_view where) {
  return detail::json_get_all<std::int64_t>(object, key, where, "integers", detail::to_int);
}
inline std::vector<double> json_floats(const Json& object, std::string_view key,
                                       std::string_view where) {
  return detail::json_get_all<double>(object, key, where, "numbers", detail::to_float);
}
inline std::vector<std::string> json_strings(const Json& object, std::string_view key,
                                             std::string_view where) {
  return detail::json_get_all<std::string>(object, key, where, "strings", detail::to_text);
}

/// A nested object or array; the reference lives as long as `object`.
inline const Json& json_object(const Json& object, std::string_view key, std::string_view where) {
  return *detail::json_get(object, key, where, "an object", [](const Json& value) {
    return value.is_object() ? std::optional<const Json*>(&value) : std::nullopt;
  });
}
inline const Json& json_array(const Json& object, std::string_view key, std::string_view where) {
  return *detail::json_get(object, key, where, "an array", [](const Json& value) {
    return value.is_array() ? std::optional<const Json*>(&value) : std::nullopt;
  });
}

/// Whether the member is there and not null.
inline bool json_has(const Json& object, std::string_view key) {
  if (!object.is_object()) return false;
  const auto& members = object.get_ref<const Json::object_t&>();
  const auto member = members.find(key);
  return member != members.end() && !member->second.is_null();
}
/// @}

}  // namespace sluice
