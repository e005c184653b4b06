// SPDX-License-Identifier: MIT
#include "support/command_line.hpp"

#include <charconv>
#include <string_view>
#include <system_error>

#include "sluice/core/version.hpp"

namespace support {

std::string version_text(const std::string& program) {
  return program + " (sluice " + std::to_string(SLUICE_VERSION_MAJOR) + "." +
         std::to_string(SLUICE_VERSION_MINOR) + "." + std::to_string(SLUICE_VERSION_PATCH) + ")";
}

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

CLI::Validator some_name() {
  return {[](std::string& text) -> std::string {
            return text.empty() ? "expected a name, found ''" : std::string();
          },
          ""};
}

CLI::Validator activations_name() {
  return CLI::IsMember({"f32", "bf16", "int8"});
}
sluice::Activations activations_of(const std::string& name) {
  if (name == "bf16") return sluice::Activations::kBf16;
  if (name == "int8") return sluice::Activations::kInt8;
  return sluice::Activations::kFloat32;
}

sluice::LatePolicy late_policy_of(const std::string& name) {
  if (name == "drop-oldest") return sluice::LatePolicy::kDropOldest;
  if (name == "drop-newest") return sluice::LatePolicy::kDropNewest;
  if (name == "coalesce") return sluice::LatePolicy::kCoalesce;
  return sluice::LatePolicy::kBlock;
}
CLI::Validator shedding_name() {
  return CLI::IsMember({"none", "skip", "shorten"});
}
sluice::Shedding shedding_of(const std::string& name) {
  if (name == "skip") return sluice::Shedding::kSkipFrame;
  if (name == "shorten") return sluice::Shedding::kShortenWrite;
  return sluice::Shedding::kNone;
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
