// SPDX-License-Identifier: MIT
/// A program whose standard output is read through a pipe. POSIX only.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/byte_source.hpp"

extern "C" char** environ;

namespace sluice::detail {

/// Runs a program without a shell: arguments are passed as they are, nothing in them is
/// interpreted. Its standard input is empty, its error output is kept for the message if it fails.
/// Movable; the destructor ends the program and waits for it.
class ChildProcess {
 public:
  /// \throws Error(kIo) if the program cannot be started, naming it and the system's reason.
  explicit ChildProcess(std::vector<std::string> arguments) : arguments_(std::move(arguments)) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) fail("cannot make a pipe", errno);
    output_ = ends[0];
    // Where temporary files belong (TMPDIR); without such a place its words are not kept.
    std::error_code no_place;
    std::string name = std::filesystem::temp_directory_path(no_place) / "sluice_child_XXXXXX";
    errors_ = no_place ? -1 : ::mkostemp(name.data(), O_CLOEXEC);
    if (errors_ >= 0) ::unlink(name.c_str());

    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    if (errors_ >= 0) ::posix_spawn_file_actions_adddup2(&actions, errors_, STDERR_FILENO);
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
    if (reason != 0) {
      process_ = -1;
      close_all();
      fail("cannot start the program", reason);
    }
  }

  ChildProcess(ChildProcess&& other) noexcept
      : arguments_(std::move(other.arguments_)),
        process_(std::exchange(other.process_, -1)),
        output_(std::exchange(other.output_, -1)),
        errors_(std::exchange(other.errors_, -1)) {}
  ChildProcess& operator=(ChildProcess&& other) noexcept {
    std::swap(arguments_, other.arguments_);
    std::swap(process_, other.process_);
    std::swap(output_, other.output_);
    std::swap(errors_, other.errors_);
    return *this;
  }
  ~ChildProcess() {
    const pid_t process = process_;
    close_output();
    if (process >= 0) {
      ::kill(process, SIGTERM);
      wait();
    }
    close_all();
  }

  /// Its output, which belongs to this object and may be read once. `name` is what errors call it.
  ByteSource output(std::string name) const {
    return ByteSource::of_descriptor(output_, false, std::move(name));
  }
  const std::string& program() const noexcept { return arguments_[0]; }

  /// After the end of the output: waits for the program.
  /// \throws Error(kIo) with its status and the end of its error output if it failed. Once.
  void finish() {
    if (process_ < 0) return;
    const int status = wait();
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
    std::string found = WIFEXITED(status) ? "status " + std::to_string(WEXITSTATUS(status))
                                          : "signal " + std::to_string(WTERMSIG(status));
    const std::string text = error_text();
    if (!text.empty()) found += ": " + text;
    throw Error(ErrorCode::kIo, {"the program failed", arguments_[0], "", "status 0", found});
  }

 private:
  int wait() {
    int status = 0;
    while (::waitpid(process_, &status, 0) < 0 && errno == EINTR) {
    }
    process_ = -1;
    return status;
  }

  std::string error_text() const {
    constexpr off_t kMost = 600;
    if (errors_ < 0) return "";
    const off_t size = ::lseek(errors_, 0, SEEK_END);
    std::string text(static_cast<std::size_t>(size < 0 ? 0 : (size > kMost ? kMost : size)), '\0');
    const ssize_t count =
        ::pread(errors_, text.data(), text.size(), size - static_cast<off_t>(text.size()));
    text.resize(count < 0 ? 0 : static_cast<std::size_t>(count));
    while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
    return text;
  }

  void close_output() {
    if (output_ >= 0) ::close(std::exchange(output_, -1));
  }
  void close_all() {
    close_output();
    if (errors_ >= 0) ::close(std::exchange(errors_, -1));
  }

  [[noreturn]] void fail(const char* what, int reason) const {
    throw Error(ErrorCode::kIo,
                {what, arguments_[0], "", "", std::generic_category().message(reason)});
  }

  std::vector<std::string> arguments_;
  pid_t process_ = -1;
  int output_ = -1;
  int errors_ = -1;  // an unlinked file
};

}  // namespace sluice::detail
