// SPDX-License-Identifier: MIT
// Checks and texts that the command lines of the examples share.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include <CLI/CLI.hpp>

namespace support {

/// A check whose message says what was expected; CLI11 puts the option's name in front.
CLI::Validator whole_number(std::int64_t least,
                            std::int64_t most = std::numeric_limits<std::int64_t>::max());

/// `expected` describes the range in words.
CLI::Validator number(double least, double most, const char* expected);

/// The command line as a shell takes it.
std::string join_command(int argc, char** argv);

}  // namespace support
