// SPDX-License-Identifier: MIT
/// Plain bytes in and out, for state that outlives the process: little-endian on every machine,
/// every read checked, a checksum at the end. What is read is untrusted: a damaged stream gives an
/// error that names source, field and byte offset, before anything of its length is allocated.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/core/checksum.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// What a byte stream holds: values whose bytes are all value, in one order. Structs are written
/// member by member (their padding has no defined content); bool is written as a std::uint8_t.
template <class T>
concept StreamValue =
    (std::integral<T> && !std::same_as<T, bool>) || std::is_enum_v<T> || std::same_as<T, float> ||
    std::same_as<T, double> || std::same_as<T, f16> || std::same_as<T, bf16>;

namespace detail {

/// Copies `count` values of `size` bytes, turning their bytes around on big-endian machines.
inline void copy_little_endian(std::byte* to, const std::byte* from, std::size_t count,
                               std::size_t size) {
  if (count == 0) return;  // an empty span's pointer may be null
  std::memcpy(to, from, count * size);
  if constexpr (std::endian::native != std::endian::little)
    for (std::size_t i = 0; i < count; ++i) std::reverse(to + i * size, to + (i + 1) * size);
}

}  // namespace detail

/// Appends values to a growing vector of bytes. A span or a string is preceded by its count as a
/// std::uint64_t; a value is not. Allocates as a vector does.
class ByteWriter {
 public:
  /// One value, sizeof(T) bytes.
  template <StreamValue T>
  void write(T value) {
    append(std::span<const T>(&value, 1));
  }

  /// The count, then the values.
  template <class T, std::size_t N>
  requires StreamValue<std::remove_const_t<T>>
  void write_span(std::span<T, N> values) {
    write(static_cast<std::uint64_t>(values.size()));
    append(std::span<const T>(values));
  }

  /// The number of bytes, then the bytes.
  void write_string(std::string_view text) {
    write_span(std::span<const char>(text.data(), text.size()));
  }

  /// CRC-64 of all bytes so far: the last thing to write (see ByteReader::verify_checksum).
  void write_checksum() { write(crc64(bytes_)); }

  std::size_t size() const noexcept { return bytes_.size(); }
  std::span<const std::byte> bytes() const noexcept { return bytes_; }
  /// Moves the bytes out and leaves the writer empty.
  std::vector<std::byte> take() noexcept { return std::exchange(bytes_, {}); }

 private:
  template <class T>
  void append(std::span<const T> values) {
    const std::size_t begin = bytes_.size();
    bytes_.resize(begin + values.size_bytes());
    detail::copy_little_endian(bytes_.data() + begin, std::as_bytes(values).data(), values.size(),
                               sizeof(T));
  }

  std::vector<std::byte> bytes_;
};

/// Reads back what a ByteWriter wrote, in the same order, from bytes that it does not own. Every
/// reading function throws Error(kFormat), naming the source, the field with its byte offset,
/// expected and found, and leaves the reader and its output as they were. Integers and enumerators
/// come back as stored: whether a value makes sense is for the caller to check.
class ByteReader {
 public:
  /// `source` is what errors call the bytes: a file's path, "session snapshot". `bytes` must
  /// outlive the reader.
  explicit ByteReader(std::span<const std::byte> bytes, std::string source = "byte stream")
      : bytes_(bytes), source_(std::move(source)) {}

  template <StreamValue T>
  T read(std::string_view field) {
    T value;
    take(field, std::span<T>(&value, 1));
    return value;
  }

  /// Reads a value that must equal `expected`: a magic number, a version, an extent.
  template <StreamValue T>
  requires(std::integral<T> || std::is_enum_v<T>) void read_expected(std::string_view field,
                                                                     T expected) {
    const std::size_t begin = offset_;
    const T found = read<T>(field);
    if (found == expected) return;
    offset_ = begin;
    fail("unexpected value", field, text_of(expected), text_of(found));
  }

  /// Reads values into `values`; the stored count must be values.size(). Allocates nothing.
  template <StreamValue T, std::size_t N>
  void read_span(std::string_view field, std::span<T, N> values) {
    const std::size_t begin = offset_;
    const auto count = read<std::uint64_t>(field);
    if (count != values.size()) {
      offset_ = begin;
      fail("wrong count", field, std::to_string(values.size()) + " values", std::to_string(count));
    }
    rewinding(begin, [&] { take(field, std::span<T>(values)); });
  }

  /// Reads at most `max_count` values. Allocates them, after checking that they are there.
  template <StreamValue T>
  std::vector<T> read_vector(std::string_view field, std::uint64_t max_count) {
    const std::size_t begin = offset_;
    std::vector<T> values;
    rewinding(begin, [&] {
      values.resize(checked_count(field, begin, max_count, sizeof(T)));
      take(field, std::span<T>(values));
    });
    return values;
  }

  /// Reads a string of at most `max_bytes` bytes; its encoding is not checked.
  std::string read_string(std::string_view field, std::uint64_t max_bytes) {
    const std::size_t begin = offset_;
    std::string text;
    rewinding(begin, [&] {
      text.resize(checked_count(field, begin, max_bytes, 1));
      take(field, std::span<char>(text));
    });
    return text;
  }

  /// Checks that the last eight bytes are the CRC-64 of all before them, and takes them off the
  /// end. Call it before the first read, so that damage anywhere is told as damage.
  void verify_checksum() {
    constexpr std::size_t kSize = sizeof(std::uint64_t);
    if (bytes_.size() - offset_ < kSize) truncated("checksum", kSize);
    ByteReader tail(bytes_.last(kSize), source_);
    const auto stored = tail.read<std::uint64_t>("checksum");
    const std::uint64_t computed = crc64(bytes_.first(bytes_.size() - kSize));
    if (stored != computed)
      throw Error(ErrorCode::kFormat,
                  {"damaged content", source_, at("checksum", bytes_.size() - kSize),
                   std::to_string(computed), std::to_string(stored)});
    bytes_ = bytes_.first(bytes_.size() - kSize);
  }

  /// Checks that everything has been read.
  void expect_end() const {
    if (remaining() != 0)
      fail("bytes after the end", "end", "no more bytes", std::to_string(remaining()) + " bytes");
  }

  /// Reports a value that the caller found wrong, for a field that began at byte `offset`.
  [[noreturn]] void fail_at(std::size_t offset, std::string what, std::string_view field,
                            std::string expected, std::string found) const {
    throw Error(ErrorCode::kFormat, {std::move(what), source_, at(field, offset),
                                     std::move(expected), std::move(found)});
  }

  /// Bytes read so far, and left to read.
  std::size_t offset() const noexcept { return offset_; }
  std::size_t remaining() const noexcept { return bytes_.size() - offset_; }
  const std::string& source() const noexcept { return source_; }

 private:
  static std::string at(std::string_view field, std::size_t offset) {
    return std::string(field) + " at byte " + std::to_string(offset);
  }

  template <class T>
  static std::string text_of(T value) {
    if constexpr (std::is_enum_v<T>)
      return std::to_string(static_cast<std::underlying_type_t<T>>(value));
    else
      return std::to_string(value);
  }

  [[noreturn]] void fail(std::string what, std::string_view field, std::string expected,
                         std::string found) const {
    fail_at(offset_, std::move(what), field, std::move(expected), std::move(found));
  }

  [[noreturn]] void truncated(std::string_view field, std::uint64_t size) const {
    fail("truncated", field, std::to_string(size) + " bytes", std::to_string(remaining()));
  }

  template <class T>
  void take(std::string_view field, std::span<T> values) {
    if (values.size_bytes() > remaining()) truncated(field, values.size_bytes());
    detail::copy_little_endian(std::as_writable_bytes(values).data(), bytes_.data() + offset_,
                               values.size(), sizeof(T));
    offset_ += values.size_bytes();
  }

  std::size_t checked_count(std::string_view field, std::size_t begin, std::uint64_t max_count,
                            std::size_t value_size) {
    const auto count = read<std::uint64_t>(field);
    if (count > max_count)
      fail_at(begin, "count out of range", field, "at most " + std::to_string(max_count),
              std::to_string(count));
    if (count > remaining() / value_size)
      fail_at(begin, "truncated", field, std::to_string(count) + " values",
              std::to_string(remaining()) + " bytes");
    return static_cast<std::size_t>(count);
  }

  template <class Action>
  void rewinding(std::size_t begin, Action action) {
    try {
      action();
    } catch (...) {
      offset_ = begin;
      throw;
    }
  }

  std::span<const std::byte> bytes_;
  std::string source_;
  std::size_t offset_ = 0;
};

}  // namespace sluice
