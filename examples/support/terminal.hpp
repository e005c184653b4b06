// SPDX-License-Identifier: MIT
// The program's surroundings: signals, stdout that may close, a progress line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace support {

/// From here on Ctrl-C and SIGTERM only raise a flag, once: a second one ends the program as usual.
/// A closed stdout is told by StdoutClosed, not by a signal.
void catch_signals();
/// The signal that was caught, or 0. Any thread.
int caught_signal();

/// The reader of stdout went away, or reads nothing for a second behind a caught signal: not an
/// error, but there is nobody left to write for.
struct StdoutClosed {};

/// Writes all of `text` to stdout at once; waits where its reader is behind.
/// \throws StdoutClosed; sluice::Error(kIo) for a full disk and the like.
void write_stdout(std::string_view text);

/// Catches signals, runs a program and gives its exit status: 128 and the signal if one was caught,
/// 0 if stdout went away, 2 for sluice::Error(kConfig) (values that make no sense together) and 1
/// for other errors, which are written to stderr behind the program's name.
int run_program(std::string_view name, const std::function<int()>& run);

/// Resident memory of this process, now and at most, in bytes; 0 where the system does not say.
/// Allocates nothing.
std::int64_t resident_bytes();
std::int64_t peak_resident_bytes();

bool stdin_is_terminal();
bool stdout_is_terminal();
bool stderr_is_terminal();

/// One line on stderr that is drawn over and over, on a terminal only, at most ten times a second.
class Progress {
 public:
  /// `what` stands in front: "reading".
  explicit Progress(std::string what);
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `tokens` are done, the part `fraction` of all; below 0 when nobody knows how much there is.
  /// `more` is appended.
  void show(std::int64_t tokens, double fraction, std::string_view more = {});
  /// The same for bytes of a file, once half a second has passed: most files are read sooner.
  void show_bytes(std::size_t done, std::size_t total);
  /// Wipes the line.
  void clear();

 private:
  void draw(double fraction, std::string_view text);

  std::string what_;
  bool on_terminal_;
  bool shown_ = false;
  std::int64_t start_ns_;
  std::int64_t next_ns_;
};

}  // namespace support
