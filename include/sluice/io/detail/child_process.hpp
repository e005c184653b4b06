// SPDX-License-Identifier: MIT
/// A program whose standard output is read through a pipe. POSIX only.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/byte_source.hpp"

extern "C" char** environ;

namespace sluice::detail {

/// The end of what comes through a pipe: everything is read, little is kept, for a program that
/// complains for hours. Allocates once.
class PipeTail final : public ByteSource::Beside {
 public:
  static constexpr std::size_t kKept = 4096;

  /// Owns the descriptor, that of a pipe's reading end, and never waits for it.
  explicit PipeTail(int descriptor) : descriptor_(descriptor) {
    ::fcntl(descriptor_, F_SETFL, ::fcntl(descriptor_, F_GETFL) | O_NONBLOCK);
    text_.reserve(2 * kKept);
  }
  PipeTail(const PipeTail&) = delete;
  PipeTail& operator=(const PipeTail&) = delete;
  ~PipeTail() override { close(); }

  int descriptor() const noexcept override { return descriptor_; }
  void read() noexcept override {
    std::array<char, kKept> some;
    // As much as a pipe holds: one that is filled all the while must not keep its reader for ever.
    for (int part = 0; part < 16 && descriptor_ >= 0; ++part) {
      const ssize_t count = ::read(descriptor_, some.data(), some.size());
      if (count > 0) {
        text_.append(some.data(), static_cast<std::size_t>(count));
        if (text_.size() > kKept) text_.erase(0, text_.size() - kKept);
      } else if (count == 0 || (errno != EINTR && errno != EAGAIN)) {
        close();
      } else if (errno == EAGAIN) {
        return;
      }
    }
  }
  /// Waits so long, at most, for something to read, and reads it.
  void wait(int milliseconds) noexcept {
    pollfd waiting{descriptor_, POLLIN, 0};
    if (::poll(&waiting, 1, milliseconds) > 0) read();
  }
  void close() noexcept {
    if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  }
  /// The last kKept bytes.
  const std::string& text() const noexcept { return text_; }

 private:
  int descriptor_;
  std::string text_;
};

/// Runs a program without a shell: arguments are passed as they are, nothing in them is
/// interpreted. Its standard input is empty. Its error output is read whenever its output is, and
/// the end of it kept for the message if it fails. Movable; the destructor ends the program, at the
/// latest kGrace after it was asked to end.
class ChildProcess {
 public:
  /// How long a program may take to end once it was asked to (SIGTERM), before it is made to
  /// (SIGKILL).
  static constexpr std::chrono::milliseconds kGrace{1000};
  /// How long it may go on once its output has ended.
  static constexpr std::chrono::milliseconds kPatience{5000};

  /// \throws Error(kIo) if the program cannot be started, naming it and the system's reason.
  explicit ChildProcess(std::vector<std::string> arguments) : arguments_(std::move(arguments)) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) fail("cannot make a pipe", errno);
    output_ = ends[0];
    int error_ends[2];
    if (::pipe2(error_ends, O_CLOEXEC) != 0) {
      const int reason = errno;
      ::close(ends[1]);
      close_output();
      fail("cannot make a pipe", reason);
    }
    errors_ = std::make_unique<PipeTail>(error_ends[0]);

    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    ::posix_spawn_file_actions_adddup2(&actions, error_ends[1], STDERR_FILENO);
    // The program gets the usual signals whatever this process ignores or blocks: it must notice
    // when nobody reads any more.
    posix_spawnattr_t attributes;
    ::posix_spawnattr_init(&attributes);
    sigset_t signals;
    ::sigemptyset(&signals);
    ::posix_spawnattr_setsigmask(&attributes, &signals);
    ::sigaddset(&signals, SIGPIPE);
    ::posix_spawnattr_setsigdefault(&attributes, &signals);
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);

    std::vector<char*> pointers;
    for (std::string& argument : arguments_) pointers.push_back(argument.data());
    pointers.push_back(nullptr);
    const int reason =
        ::posix_spawnp(&process_, pointers[0], &actions, &attributes, pointers.data(), environ);
    ::posix_spawnattr_destroy(&attributes);
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    ::close(error_ends[1]);
    if (reason != 0) {
      process_ = -1;
      close_output();
      fail("cannot start the program", reason);
    }
  }

  ChildProcess(ChildProcess&& other) noexcept
      : arguments_(std::move(other.arguments_)),
        process_(std::exchange(other.process_, -1)),
        output_(std::exchange(other.output_, -1)),
        errors_(std::move(other.errors_)) {}
  ChildProcess& operator=(ChildProcess&& other) noexcept {
    std::swap(arguments_, other.arguments_);
    std::swap(process_, other.process_);
    std::swap(output_, other.output_);
    std::swap(errors_, other.errors_);
    return *this;
  }
  ~ChildProcess() {
    close_output();
    if (process_ < 0) return;
    errors_->close();  // or last words might wait for a reader
    end();
  }

  /// Its output, which belongs to this object and may be read once. `name` is what errors call it.
  ByteSource output(std::string name) const {
    ByteSource source = ByteSource::of_descriptor(output_, false, std::move(name));
    source.read_beside(errors_.get());
    return source;
  }
  const std::string& program() const noexcept { return arguments_[0]; }

  /// After the end of the output: waits for the program, at most so long; then it is ended.
  /// \throws Error(kIo) with its status, or that it goes on, and the end of its error output if it
  /// failed. Once.
  void finish(std::chrono::milliseconds patience = kPatience) {
    if (process_ < 0) return;
    const std::optional<int> status = ended_within(patience);
    if (status && WIFEXITED(*status) && WEXITSTATUS(*status) == 0) return;
    std::string found = "one that goes on";
    if (!status)
      end();
    else if (WIFEXITED(*status))
      found = "status " + std::to_string(WEXITSTATUS(*status));
    else
      found = "signal " + std::to_string(WTERMSIG(*status));
    const std::string text = error_text();
    if (!text.empty()) found += ": " + text;
    throw Error(ErrorCode::kIo,
                {status ? "the program failed" : "the program does not end with its output",
                 arguments_[0], "", "status 0", found});
  }

 private:
  /// Its status, if it ends in that time. Reads its error output meanwhile.
  std::optional<int> ended_within(std::chrono::milliseconds most) {
    const auto until = std::chrono::steady_clock::now() + most;
    // A program of its own may hold its error output open for longer than it lives, so that the end
    // of neither tells. Doubled each time: an end at once is seen at once.
    constexpr int kLongest = 50;
    for (int milliseconds = 1;; milliseconds = std::min(2 * milliseconds, kLongest)) {
      int status = 0;
      const pid_t ended = ::waitpid(process_, &status, WNOHANG);
      if (ended == process_ || (ended < 0 && errno != EINTR)) {
        errors_->read();
        process_ = -1;
        return status;
      }
      if (std::chrono::steady_clock::now() >= until) return std::nullopt;
      errors_->wait(milliseconds);
    }
  }

  /// Asks it to end, then makes it. One that the system holds even then (in a read from a device
  /// that is gone) is left to it.
  void end() {
    ::kill(process_, SIGTERM);
    if (ended_within(kGrace)) return;
    ::kill(process_, SIGKILL);
    ended_within(kGrace);
    process_ = -1;
  }

  std::string error_text() const {
    constexpr std::size_t kMost = 600;
    const std::string& kept = errors_->text();
    std::string text = kept.substr(kept.size() - std::min(kept.size(), kMost));
    while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
    return text;
  }

  void close_output() {
    if (output_ >= 0) ::close(std::exchange(output_, -1));
  }

  [[noreturn]] void fail(const char* what, int reason) const {
    throw Error(ErrorCode::kIo,
                {what, arguments_[0], "", "", std::generic_category().message(reason)});
  }

  std::vector<std::string> arguments_;
  pid_t process_ = -1;
  int output_ = -1;
  std::unique_ptr<PipeTail> errors_;
};

}  // namespace sluice::detail
