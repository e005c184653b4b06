// SPDX-License-Identifier: MIT
/// A file mapped read-only into memory: weights are used where they lie, loaded by the kernel page
/// by page and shared between processes. POSIX only.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <functional>
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
#if defined(MADV_HUGEPAGE)
    // A hint: file systems that keep files in large pages (ext4, XFS) read and map them as such,
    // and a pass over the weights meets fewer misses of address translation.
    ::madvise(address, size, MADV_HUGEPAGE);
#endif
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

/// Reads the pages of a mapping now, instead of when they are first used, and keeps them in memory
/// if `lock` is set: the system then never takes them back, until the mapping goes. `path` is what
/// errors call it. done(bytes) is called after every 16 MiB and at the end; it may throw, and the
/// pages read or locked so far stay so. Any thread.
/// \throws Error(kIo) naming the path, the system's reason and the limit on locked memory.
inline void read_pages(std::span<const std::byte> mapping, const std::string& path, bool lock,
                       const std::function<void(std::size_t)>& done = {}) {
  constexpr std::size_t kPiece = std::size_t{16} << 20;
  constexpr std::size_t kPage = 4096;
  if (mapping.empty()) return;
  // A hint: the system may read ahead of us.
  ::madvise(const_cast<std::byte*>(mapping.data()), mapping.size(), MADV_WILLNEED);
  for (std::size_t begin = 0; begin < mapping.size(); begin += kPiece) {
    const std::span<const std::byte> piece =
        mapping.subspan(begin, std::min(kPiece, mapping.size() - begin));
    if (lock && ::mlock(piece.data(), piece.size()) != 0) {
      const int reason = errno;
      rlimit limit{};
      std::string found = std::generic_category().message(reason);
      if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        found += "; the limit (ulimit -l) is " + std::to_string(limit.rlim_cur / 1024) + " KiB";
      throw Error(ErrorCode::kIo, {"cannot lock the file in memory", path, "",
                                   std::to_string(mapping.size() / 1024) + " KiB locked", found});
    }
    for (std::size_t i = 0; i < piece.size(); i += kPage)
      static_cast<void>(*static_cast<const volatile std::byte*>(piece.data() + i));
    if (done) done(begin + piece.size());
  }
}

}  // namespace sluice
