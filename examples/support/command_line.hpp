// SPDX-License-Identifier: MIT
// Checks and texts that the command lines of the examples share.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include <CLI/CLI.hpp>

#include "sluice/nn/linear.hpp"
#include "sluice/stream/deadline.hpp"
#include "sluice/stream/paced_source.hpp"

namespace support {

/// What --version says: the program and the library's version.
std::string version_text(const std::string& program);

/// A check whose message says what was expected; CLI11 puts the option's name in front.
CLI::Validator whole_number(std::int64_t least,
                            std::int64_t most = std::numeric_limits<std::int64_t>::max());

/// `expected` describes the range in words.
CLI::Validator number(double least, double most, const char* expected);

/// A file or folder, or whatever else has a name: not an empty text, which is what a shell makes of
/// a variable that was forgotten.
CLI::Validator some_name();

/// --threads and its like: 1 to 1024.
inline CLI::Validator thread_count() {
  return whole_number(1, 1024);
}

/// --activations, in all programs: f32, bf16, int8.
CLI::Validator activations_name();
sluice::Activations activations_of(const std::string& name);

/// --late: what becomes of input while its reader is busy. block, drop-oldest, drop-newest,
/// coalesce.
sluice::LatePolicy late_policy_of(const std::string& name);
/// --shed: what is left out to hold a deadline. none, skip, shorten.
CLI::Validator shedding_name();
sluice::Shedding shedding_of(const std::string& name);

/// The command line as a shell takes it.
std::string join_command(int argc, char** argv);

}  // namespace support
