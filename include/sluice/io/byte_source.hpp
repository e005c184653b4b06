// SPDX-License-Identifier: MIT
/// Bytes that come one behind the other: a file, standard input, a pipe, memory. What readers of
/// audio and pictures read from; none of them seeks, so all of them read from pipes. POSIX only.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// A sequence of bytes, read once. Movable, not copyable. One thread at a time. Allocates its name.
class ByteSource {
 public:
  /// Opens a file, a named pipe or a device.
  /// \throws Error(kIo) naming the path and the system's reason.
  static ByteSource open(std::string path) {
    if (path.find('\0') != std::string::npos)
      throw Error(ErrorCode::kIo,
                  {"cannot open the file", path.c_str(), "path", "no zero byte", "one"});
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail("cannot open the file", path.empty() ? "''" : path, errno);
    return ByteSource(descriptor, true, std::move(path));
  }
  static ByteSource standard_input() { return ByteSource(STDIN_FILENO, false, "standard input"); }
  /// A descriptor that is open for reading; closed with the source if `owned`.
  static ByteSource of_descriptor(int descriptor, bool owned, std::string name) {
    return ByteSource(descriptor, owned, std::move(name));
  }
  /// Memory that outlives the source.
  static ByteSource of_memory(std::span<const std::byte> bytes, std::string name) {
    ByteSource source(-1, false, std::move(name));
    source.memory_ = bytes;
    return source;
  }

  ByteSource(ByteSource&& other) noexcept
      : descriptor_(std::exchange(other.descriptor_, -1)),
        owned_(std::exchange(other.owned_, false)),
        memory_(std::exchange(other.memory_, {})),
        offset_(other.offset_),
        back_(other.back_),
        back_count_(std::exchange(other.back_count_, 0)),
        stops_(other.stops_),
        beside_(other.beside_),
        name_(std::move(other.name_)) {}
  ByteSource& operator=(ByteSource&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(owned_, other.owned_);
    std::swap(memory_, other.memory_);
    std::swap(offset_, other.offset_);
    std::swap(back_, other.back_);
    std::swap(back_count_, other.back_count_);
    std::swap(stops_, other.stops_);
    std::swap(beside_, other.beside_);
    std::swap(name_, other.name_);
    return *this;
  }
  ~ByteSource() {
    if (owned_ && descriptor_ >= 0) ::close(descriptor_);
  }

  /// Fills `out` unless the bytes end before: the number of bytes read. Waits for them.
  /// \throws Error(kIo) if the system refuses.
  std::size_t read(std::span<std::byte> out) {
    std::size_t done = 0;
    while (done < out.size()) {
      const std::size_t count = read_some(out.subspan(done));
      if (count == 0) break;
      done += count;
    }
    return done;
  }

  /// Reads what is there, at least a byte unless the bytes have ended, at most out.size().
  /// \throws Error(kIo) if the system refuses.
  std::size_t read_some(std::span<std::byte> out) {
    std::size_t count = 0;
    if (back_count_ > 0) {
      count = std::min(out.size(), back_count_);
      std::copy_n(back_.begin(), count, out.begin());
      std::copy(back_.begin() + static_cast<std::ptrdiff_t>(count),
                back_.begin() + static_cast<std::ptrdiff_t>(back_count_), back_.begin());
      back_count_ -= count;
    } else if (descriptor_ < 0) {
      count = std::min(out.size(), memory_.size());
      if (count > 0) std::memcpy(out.data(), memory_.data(), count);
      memory_ = memory_.subspan(count);
    } else if (!out.empty()) {
      if (!wait()) return 0;
      ssize_t result = 0;
      do {
        result = ::read(descriptor_, out.data(), out.size());
      } while (result < 0 && errno == EINTR);
      if (result < 0) fail("cannot read", name_, errno);
      count = static_cast<std::size_t>(result);
    }
    offset_ += count;
    return count;
  }

  /// While bytes are waited for, `stops` is asked ten times a second; where it answers true they
  /// end there. For programs that end on a signal while their input says nothing. Null: never.
  void stop_when(bool (*stops)()) noexcept { stops_ = stops; }

  /// What is read while bytes are waited for, so that whoever writes both need not wait for it: the
  /// error output of a program whose output this is.
  class Beside {
   public:
    virtual ~Beside() = default;
    /// The descriptor to watch; below 0: none any more.
    virtual int descriptor() const noexcept = 0;
    /// Reads what is there, without waiting.
    virtual void read() noexcept = 0;
  };
  /// `beside` outlives the source, or this is called again with null.
  void read_beside(Beside* beside) noexcept { beside_ = beside; }

  /// Bytes that a pipe has given and that come once more: those read last, at most kMostBack, while
  /// none of an earlier call waits (asserted).
  void put_back(std::span<const std::byte> bytes) {
    SLUICE_ASSERT(back_count_ == 0 && bytes.size() <= kMostBack && bytes.size() <= offset_);
    std::copy(bytes.begin(), bytes.end(), back_.begin());
    back_count_ = bytes.size();
    offset_ -= bytes.size();
  }
  static constexpr std::size_t kMostBack = 16;

  /// Reads and forgets `count` bytes: how many there were.
  std::uint64_t skip(std::uint64_t count) {
    std::byte scrap[4096];
    std::uint64_t done = 0;
    while (done < count) {
      const auto part =
          static_cast<std::size_t>(std::min<std::uint64_t>(count - done, sizeof scrap));
      const std::size_t read = read_some(std::span(scrap, part));
      if (read == 0) break;
      done += read;
    }
    return done;
  }

  /// Bytes read so far.
  std::uint64_t offset() const noexcept { return offset_; }
  /// What errors call it: the path, or a word for what it is.
  const std::string& name() const noexcept { return name_; }

  /// An error about a field that began at byte `offset`.
  [[noreturn]] void fail_at(std::uint64_t offset, std::string what, std::string_view field,
                            std::string expected, std::string found,
                            ErrorCode code = ErrorCode::kFormat) const {
    throw Error(code,
                {std::move(what), name_, std::string(field) + " at byte " + std::to_string(offset),
                 std::move(expected), std::move(found)});
  }

 private:
  static constexpr int kStopMilliseconds = 100;

  ByteSource(int descriptor, bool owned, std::string name)
      : descriptor_(descriptor), owned_(owned), name_(std::move(name)) {}

  // Until there is something to read, if only the end: false where stops_ ends it.
  bool wait() {
    for (;;) {
      const int beside = beside_ != nullptr ? beside_->descriptor() : -1;
      if (stops_ == nullptr && beside < 0) return true;  // read() waits by itself
      if (stops_ != nullptr && stops_()) return false;
      std::array<pollfd, 2> waiting{{{descriptor_, POLLIN, 0}, {beside, POLLIN, 0}}};
      if (::poll(waiting.data(), beside < 0 ? 1 : 2, stops_ != nullptr ? kStopMilliseconds : -1) <=
          0)
        continue;
      if (waiting[1].revents != 0) beside_->read();
      if (waiting[0].revents != 0) return true;
    }
  }

  [[noreturn]] static void fail(const char* what, const std::string& name, int reason) {
    throw Error(ErrorCode::kIo, {what, name, "", "", std::generic_category().message(reason)});
  }

  int descriptor_ = -1;  // -1: memory
  bool owned_ = false;
  std::span<const std::byte> memory_;  // what is left
  std::uint64_t offset_ = 0;
  std::array<std::byte, kMostBack> back_{};  // what was put back, its first back_count_ bytes
  std::size_t back_count_ = 0;
  bool (*stops_)() = nullptr;
  Beside* beside_ = nullptr;
  std::string name_;
};

}  // namespace sluice
