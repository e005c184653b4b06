// SPDX-License-Identifier: MIT
/// A file mapped read-only into memory: weights are used where they lie, loaded by the kernel page
/// by page and shared between processes. POSIX only.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "sluice/core/error.hpp"

namespace sluice {

/// Maps a whole regular file for reading. Movable, not copyable; moving keeps the addresses. The
/// bytes start on a page boundary. Any number of threads may read. The file must not be shortened
/// while it is mapped: touching a page that is gone raises SIGBUS (replacing it by rename is safe).
class MappedFile {
 public:
  /// An empty file gives an empty span. Allocates nothing but the path.
  /// \throws Error(kIo) naming the path and the system's reason: cannot be opened, is a directory
  /// or another thing that is not a regular file, cannot be mapped.
  explicit MappedFile(std::string path) : path_(std::move(path)) {
    if (path_.find('\0') != std::string::npos)
      throw Error(ErrorCode::kIo,
                  {"cannot open the file", path_.c_str(), "path", "no zero byte", "one"});
    // O_NONBLOCK: opening a pipe by mistake must fail below, not wait for its writer.
    const Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    if (file.number < 0) fail("cannot open the file");
    struct stat status {};
    if (::fstat(file.number, &status) != 0) fail("cannot examine the file");
    if (!S_ISREG(status.st_mode))
      throw Error(ErrorCode::kIo, {"cannot map the file", path_, "", "a regular file",
                                   S_ISDIR(status.st_mode) ? "a directory" : "a special file"});
    if (!std::in_range<std::size_t>(status.st_size))
      throw Error(ErrorCode::kIo, {"cannot map the file", path_, "size", "within the address space",
                                   std::to_string(status.st_size) + " bytes"});
    const auto size = static_cast<std::size_t>(status.st_size);
    if (size == 0) return;
    void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number, 0);
    if (address == MAP_FAILED) fail("cannot map the file");
    bytes_ = {static_cast<const std::byte*>(address), size};
  }

  MappedFile(MappedFile&& other) noexcept
      : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, {})) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  ~MappedFile() {
    if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
  }

  /// The content: [file size in bytes], valid while this object, or the one it was moved to, lives.
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

  /// The path as it was given.
  const std::string& path() const noexcept { return path_; }

 private:
  struct Descriptor {
    int number;
    explicit Descriptor(int opened) : number(opened) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
      if (number >= 0) ::close(number);
    }
  };

  [[noreturn]] void fail(const char* what) const {
    const int reason = errno;
    throw Error(ErrorCode::kIo, {what, path_, "", "", std::generic_category().message(reason)});
  }

  std::string path_;
  std::span<const std::byte> bytes_;
};

}  // namespace sluice
