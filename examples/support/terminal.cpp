// SPDX-License-Identifier: MIT
#include "support/terminal.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include "sluice/core/error.hpp"
#include "sluice/stream/clock.hpp"

namespace support {

namespace {

// Read by any thread, whichever one the signal interrupted.
std::atomic<int> caught{0};
static_assert(std::atomic<int>::is_always_lock_free);

extern "C" void remember_signal(int signal) {
  caught = signal;
}

}  // namespace

void catch_signals() {
  struct sigaction action {};
  action.sa_handler = remember_signal;
  // No SA_RESTART: a read that waits for input must return.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

int caught_signal() {
  return caught;
}

void write_stdout(std::string_view text) {
  // A write that waits for a reader is not interrupted by a signal that another thread gets, so
  // that room is asked for first, and no more written than a pipe that has room takes.
  constexpr int kWaitMs = 100;
  int patience = 10;  // waits behind a signal
  while (!text.empty()) {
    pollfd room{STDOUT_FILENO, POLLOUT, 0};
    if (::poll(&room, 1, kWaitMs) <= 0) {
      if (caught_signal() != 0 && --patience == 0) throw StdoutClosed{};
      continue;
    }
    const std::size_t part = std::min<std::size_t>(text.size(), PIPE_BUF);
    const ssize_t written = ::write(STDOUT_FILENO, text.data(), part);
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EPIPE) {
      throw StdoutClosed{};
    } else if (errno != EINTR && errno != EAGAIN) {
      throw sluice::Error(sluice::ErrorCode::kIo, {"write failed", "stdout", "", "success",
                                                   std::generic_category().message(errno)});
    }
  }
}

std::int64_t resident_bytes() {
  const int file = ::open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  std::array<char, 128> text{};
  const ssize_t count = ::read(file, text.data(), text.size());
  ::close(file);
  if (count <= 0) return 0;
  // "size resident ...", in pages.
  const char* const end = text.data() + count;
  const char* const resident = std::find(static_cast<const char*>(text.data()), end, ' ') + 1;
  std::int64_t pages = 0;
  if (resident >= end || std::from_chars(resident, end, pages).ec != std::errc()) return 0;
  return pages * ::sysconf(_SC_PAGESIZE);
}

std::int64_t peak_resident_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  // The two are counted at different moments.
  return std::max(std::int64_t{usage.ru_maxrss} * 1024, resident_bytes());
}

bool stdin_is_terminal() {
  return ::isatty(STDIN_FILENO) == 1;
}
bool stdout_is_terminal() {
  return ::isatty(STDOUT_FILENO) == 1;
}
bool stderr_is_terminal() {
  return ::isatty(STDERR_FILENO) == 1;
}

Progress::Progress(std::string what)
    : what_(std::move(what)),
      on_terminal_(stderr_is_terminal()),
      start_ns_(sluice::monotonic_ns()),
      next_ns_(start_ns_) {}

void Progress::show(std::int64_t tokens, double fraction, std::string_view more) {
  const std::int64_t now = sluice::monotonic_ns();
  if (!on_terminal_ || now < next_ns_) return;
  const double seconds = std::max(static_cast<double>(now - start_ns_) * 1e-9, 1e-9);
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), " %lld tokens, %.1f tokens/s",
                static_cast<long long>(tokens), static_cast<double>(tokens) / seconds);
  draw(fraction, text.data() + std::string(more));
}

void Progress::show_bytes(std::size_t done, std::size_t total) {
  const std::int64_t now = sluice::monotonic_ns();
  if (!on_terminal_ || now < next_ns_ || now < start_ns_ + 500'000'000) return;
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), " %zu of %zu MB", done / 1'000'000, total / 1'000'000);
  draw(static_cast<double>(done) / static_cast<double>(std::max<std::size_t>(total, 1)),
       text.data());
}

void Progress::draw(double fraction, std::string_view text) {
  next_ns_ = sluice::monotonic_ns() + 100'000'000;
  std::string line = "\r" + what_;
  if (fraction >= 0) {
    constexpr int kWidth = 24;
    const int full = static_cast<int>(std::min(fraction, 1.0) * kWidth);
    line += " [" + std::string(static_cast<std::size_t>(full), '#') +
            std::string(static_cast<std::size_t>(kWidth - full), '.') + "]";
  }
  line += text;
  line += "\x1b[K";
  std::fwrite(line.data(), 1, line.size(), stderr);
  std::fflush(stderr);
  shown_ = true;
}

void Progress::clear() {
  if (shown_) std::fputs("\r\x1b[K", stderr);
  shown_ = false;
}

int run_program(std::string_view name, const std::function<int()>& run) {
  catch_signals();
  int status = 0;
  try {
    status = run();
  } catch (const StdoutClosed&) {
    status = 0;
  } catch (const sluice::Error& error) {
    std::cerr << name << ": " << error.what() << '\n';
    status = error.code() == sluice::ErrorCode::kConfig ? 2 : 1;
  } catch (const std::bad_alloc&) {
    std::cerr << name << ": out of memory\n";
    status = 1;
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
    status = 1;
  }
  // An error behind a signal may be its doing: Ctrl-C ends the programs that were started, too.
  return caught_signal() != 0 ? 128 + caught_signal() : status;
}

}  // namespace support
