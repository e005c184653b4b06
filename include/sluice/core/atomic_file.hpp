// SPDX-License-Identifier: MIT
/// Whole files in and out (POSIX). A write replaces the old file in one step: whoever opens the
/// path, after a kill or a power cut at any moment, finds all of the old content or all of the new.
#pragma once

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sluice/core/error.hpp"

namespace sluice {

namespace detail {

/// Throws Error(kIo) for a system call that failed with `error` (a value of errno).
[[noreturn]] inline void throw_io(int error, const char* call, const std::filesystem::path& path) {
  throw Error(ErrorCode::kIo, {std::string(call) + " failed", path.string(), "", "success",
                               std::generic_category().message(error)});
}

/// Throws where something other than a regular file has the name, itself or behind a link: a rename
/// would put a file in the place of a device or a pipe, which whoever may write to it did not ask
/// for.
inline void require_replaceable(const std::filesystem::path& path) {
  struct stat old_file {};
  if (::stat(path.c_str(), &old_file) != 0 || S_ISREG(old_file.st_mode)) return;
  throw Error(ErrorCode::kIo, {"cannot be replaced by a file", path.string(), "",
                               "a regular file, or nothing of this name",
                               S_ISDIR(old_file.st_mode) ? "a folder" : "a device or pipe"});
}

/// A file descriptor that closes itself. Movable by swap only; -1 is none.
class FileDescriptor {
 public:
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  ~FileDescriptor() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  int get() const noexcept { return descriptor_; }
  /// Closes now, for callers that must know whether it worked.
  int close() noexcept { return ::close(std::exchange(descriptor_, -1)); }

 private:
  int descriptor_;
};

/// The file that becomes the new one; removed again unless commit() is reached.
class TemporaryFile {
 public:
  /// Creates a new file beside `path`, for the owner and as the umask allows.
  explicit TemporaryFile(const std::filesystem::path& path) : file_(create(path, path_)) {}
  ~TemporaryFile() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  int descriptor() const noexcept { return file_.get(); }
  const std::filesystem::path& path() const noexcept { return path_; }

  void commit(const std::filesystem::path& target) {
    if (file_.close() != 0) throw_io(errno, "close", path_);
    if (::rename(path_.c_str(), target.c_str()) != 0) throw_io(errno, "rename", target);
    path_.clear();
  }

 private:
  /// A name that no other process and no other thread has: the process id, and the first number
  /// that is free.
  static int create(const std::filesystem::path& target, std::filesystem::path& created) {
    const std::string stem = target.string() + ".tmp." + std::to_string(::getpid()) + ".";
    for (int number = 0;; ++number) {
      std::filesystem::path candidate = stem + std::to_string(number);
      const int descriptor =
          ::open(candidate.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor >= 0) {
        created = std::move(candidate);
        return descriptor;
      }
      if (errno != EEXIST && errno != EINTR) throw_io(errno, "open", candidate);
    }
  }

  std::filesystem::path path_;  // before file_, whose initialiser sets it
  FileDescriptor file_;
};

inline void write_all(int descriptor, std::span<const std::byte> bytes,
                      const std::filesystem::path& path) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      throw_io(errno, "write", path);
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

}  // namespace detail

/// Makes `bytes` the content of the file at `path`, atomically and durably: written to a new file
/// beside it (`<path>.tmp.<process>.<number>`, which a kill may leave behind), synchronised,
/// renamed over it, and the folder synchronised. A replaced file's access rights are kept; a
/// symbolic link is replaced, not followed. Two writers at once: one of the two contents stays,
/// whole. \throws Error(kIo) naming the path and the failed call, or that the path is that of a
/// folder, device or pipe, or of a link to one; the old file is then untouched (if only the
/// folder's synchronisation failed, the new file is in place but may not survive a power cut).
inline void write_file_atomically(const std::filesystem::path& path,
                                  std::span<const std::byte> bytes) {
  detail::require_replaceable(path);
  detail::TemporaryFile temporary(path);
  struct stat old_file {};
  if (::lstat(path.c_str(), &old_file) == 0 && S_ISREG(old_file.st_mode) &&
      ::fchmod(temporary.descriptor(), old_file.st_mode & 07777U) != 0)
    detail::throw_io(errno, "fchmod", temporary.path());
  detail::write_all(temporary.descriptor(), bytes, temporary.path());
  if (::fsync(temporary.descriptor()) != 0) detail::throw_io(errno, "fsync", temporary.path());
  temporary.commit(path);

  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  const detail::FileDescriptor opened(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (opened.get() < 0) detail::throw_io(errno, "open", folder);
  // EINVAL: a file system that cannot synchronise folders; there is nothing more to ask of it.
  if (::fsync(opened.get()) != 0 && errno != EINVAL) detail::throw_io(errno, "fsync", folder);
}

/// Whether write_file_atomically() could write there now, for programs that write at their end what
/// took hours: makes and removes the new file, and leaves the old one alone.
/// \throws Error(kIo) as it does.
inline void require_writable(const std::filesystem::path& path) {
  detail::require_replaceable(path);
  detail::TemporaryFile{path};
}

/// The whole content of the regular file at `path`. Allocates it.
/// \throws Error(kIo) if it cannot be opened or read, or is not a regular file.
inline std::vector<std::byte> read_file(const std::filesystem::path& path) {
  // O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
  const detail::FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) detail::throw_io(errno, "open", path);
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) detail::throw_io(errno, "fstat", path);
  if (!S_ISREG(status.st_mode))
    throw Error(ErrorCode::kIo,
                {"cannot read", path.string(), "", "a regular file", "a folder, device or pipe"});
  std::vector<std::byte> bytes(static_cast<std::size_t>(status.st_size));
  std::size_t filled = 0;
  while (filled < bytes.size()) {
    const ssize_t count = ::read(file.get(), bytes.data() + filled, bytes.size() - filled);
    if (count < 0) {
      if (errno == EINTR) continue;
      detail::throw_io(errno, "read", path);
    }
    if (count == 0)
      throw Error(ErrorCode::kIo,
                  {"file shrank while it was read", path.string(), "",
                   std::to_string(bytes.size()) + " bytes", std::to_string(filled)});
    filled += static_cast<std::size_t>(count);
  }
  return bytes;
}

}  // namespace sluice
