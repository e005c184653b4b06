// SPDX-License-Identifier: MIT
/// Where frames of a long stream wait outside its cache: records of one size in host memory, or in
/// a file whose records are checked when they are read.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include "sluice/core/atomic_file.hpp"
#include "sluice/core/checksum.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"

namespace sluice {

/// `num_records` records of `record_bytes` bytes each. In memory: allocated at construction. In a
/// file: made in the given folder, written as records come, removed with the store; each record
/// carries its number and a CRC-64. It holds what this process wrote and is no format for others.
/// put() and get() allocate nothing. One thread at a time.
class FrameStore {
 public:
  /// In memory.
  FrameStore(std::int64_t num_records, std::int64_t record_bytes)
      : num_records_(num_records),
        record_bytes_(record_bytes),
        memory_(static_cast<std::size_t>(num_records * record_bytes)) {}

  /// In a new file in `folder`. \throws Error(kIo) if it cannot be made.
  FrameStore(std::int64_t num_records, std::int64_t record_bytes,
             const std::filesystem::path& folder)
      : num_records_(num_records), record_bytes_(record_bytes) {
    const std::string stem = (folder / ("frames." + std::to_string(::getpid()) + ".")).string();
    for (int number = 0; !file_; ++number) {
      path_ = stem + std::to_string(number);
      const int descriptor = ::open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
      if (descriptor >= 0)
        file_.emplace(descriptor);
      else if (errno != EEXIST && errno != EINTR)
        detail::throw_io(errno, "open", path_);
    }
  }
  ~FrameStore() {
    if (file_) ::unlink(path_.c_str());
  }
  FrameStore(const FrameStore&) = delete;
  FrameStore& operator=(const FrameStore&) = delete;

  std::int64_t num_records() const { return num_records_; }
  std::int64_t record_bytes() const { return record_bytes_; }
  /// The file; empty: memory.
  const std::filesystem::path& path() const { return path_; }
  /// Bytes of host memory.
  std::size_t bytes() const { return memory_.bytes(); }

  /// Writes a record. bytes: [record_bytes]. \throws Error(kIo) if the file cannot be written.
  void put(std::int64_t record, std::span<const std::byte> bytes) {
    check(record, bytes.size());
    if (!file_) {
      std::copy(bytes.begin(), bytes.end(), memory_.data() + record * record_bytes_);
      return;
    }
    transfer<true>(const_cast<std::byte*>(bytes.data()), bytes.size(), offset(record), record);
    Trailer trailer{static_cast<std::uint64_t>(record), crc64(bytes)};
    std::array<std::byte, sizeof(Trailer)> raw;
    std::memcpy(raw.data(), &trailer, sizeof trailer);
    transfer<true>(raw.data(), raw.size(), offset(record) + record_bytes_, record);
  }

  /// Reads a record that was written. bytes: [record_bytes]. \throws Error(kIo) if the file cannot
  /// be read, Error(kFormat) naming the record if it is cut short or is not what was written.
  void get(std::int64_t record, std::span<std::byte> bytes) const {
    check(record, bytes.size());
    if (!file_) {
      std::copy_n(memory_.data() + record * record_bytes_, record_bytes_, bytes.data());
      return;
    }
    transfer<false>(bytes.data(), bytes.size(), offset(record), record);
    std::array<std::byte, sizeof(Trailer)> raw;
    transfer<false>(raw.data(), raw.size(), offset(record) + record_bytes_, record);
    Trailer trailer;
    std::memcpy(&trailer, raw.data(), sizeof trailer);
    if (trailer.record != static_cast<std::uint64_t>(record))
      fail("not the record that was asked for", record, std::to_string(record),
           std::to_string(trailer.record));
    const std::uint64_t checksum = crc64(bytes);
    if (checksum != trailer.checksum)
      fail("wrong checksum", record, std::to_string(trailer.checksum), std::to_string(checksum));
  }

 private:
  struct Trailer {
    std::uint64_t record;
    std::uint64_t checksum;
  };

  void check([[maybe_unused]] std::int64_t record, [[maybe_unused]] std::size_t size) const {
    SLUICE_ASSERT(record >= 0 && record < num_records_);
    SLUICE_ASSERT(size == static_cast<std::size_t>(record_bytes_));
  }
  std::int64_t offset(std::int64_t record) const {
    return record * (record_bytes_ + static_cast<std::int64_t>(sizeof(Trailer)));
  }
  [[noreturn]] void fail(const char* what, std::int64_t record, std::string expected,
                         std::string found) const {
    throw Error(ErrorCode::kFormat, {what, path_.string(), "record " + std::to_string(record),
                                     std::move(expected), std::move(found)});
  }

  template <bool kWrite>
  void transfer(std::byte* bytes, std::size_t size, std::int64_t at, std::int64_t record) const {
    std::size_t done = 0;
    while (done < size) {
      const auto place = static_cast<off_t>(at + static_cast<std::int64_t>(done));
      const ssize_t count = kWrite ? ::pwrite(file_->get(), bytes + done, size - done, place)
                                   : ::pread(file_->get(), bytes + done, size - done, place);
      if (count < 0) {
        if (errno == EINTR) continue;
        detail::throw_io(errno, kWrite ? "pwrite" : "pread", path_);
      }
      if (count == 0)
        fail("record cut short", record, std::to_string(size) + " bytes", std::to_string(done));
      done += static_cast<std::size_t>(count);
    }
  }

  std::int64_t num_records_;
  std::int64_t record_bytes_;
  Buffer<std::byte> memory_;
  std::filesystem::path path_;
  std::optional<detail::FileDescriptor> file_;
};

}  // namespace sluice
