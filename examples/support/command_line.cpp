// SPDX-License-Identifier: MIT
#include "support/command_line.hpp"

#include <charconv>
#include <string_view>
#include <system_error>

namespace support {

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  return {[least, most](std::string& text) -> std::string {
            std::int64_t value = 0;
            const char* const end = text.data() + text.size();
            const auto [stop, error] = std::from_chars(text.data(), end, value);
            if (error == std::errc() && stop == end && value >= least && value <= most) return {};
            std::string range = "a whole number from " + std::to_string(least);
            if (most != std::numeric_limits<std::int64_t>::max())
              range += " to " + std::to_string(most);
            return "expected " + range + ", found '" + text + "'";
          },
          ""};
}

CLI::Validator number(double least, double most, const char* expected) {
  return {[least, most, expected](std::string& text) -> std::string {
            double value = 0;
            const char* const end = text.data() + text.size();
            const auto [stop, error] = std::from_chars(text.data(), end, value);
            if (error == std::errc() && stop == end && value >= least && value <= most) return {};
            return std::string("expected ") + expected + ", found '" + text + "'";
          },
          ""};
}

std::string join_command(int argc, char** argv) {
  std::string command;
  for (int i = 0; i < argc; ++i) {
    const std::string_view word = argv[i];
    if (i > 0) command += ' ';
    const bool plain =
        !word.empty() && word.find_first_of(" \t\n'\"\\$`*?<>|&;()[]{}!#~") == std::string::npos;
    if (plain) {
      command += word;
      continue;
    }
    command += '\'';
    for (const char character : word) character == '\'' ? command += "'\\''" : command += character;
    command += '\'';
  }
  return command;
}

}  // namespace support
