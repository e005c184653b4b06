// SPDX-License-Identifier: MIT
/// name=value arguments of the benchmark programs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sluice::bench {

/// A positive number. \throws std::invalid_argument naming `argument`.
inline std::int64_t number(std::string_view text, const std::string& argument) {
  char* end = nullptr;
  const std::string copy(text);
  const long long value = std::strtoll(copy.c_str(), &end, 10);
  if (copy.empty() || *end != '\0' || value < 1)
    throw std::invalid_argument(argument + ": expected a positive number, found '" + copy + "'");
  return value;
}

inline std::vector<std::string_view> split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t place = text.find(at);
    parts.push_back(text.substr(0, place));
    if (place == std::string_view::npos) return parts;
    text.remove_prefix(place + 1);
  }
}

/// Positive numbers with commas between them. \throws as number().
inline std::vector<std::int64_t> numbers(std::string_view text, const std::string& argument) {
  std::vector<std::int64_t> values;
  for (const std::string_view part : split(text, ',')) values.push_back(number(part, argument));
  return values;
}

}  // namespace sluice::bench
