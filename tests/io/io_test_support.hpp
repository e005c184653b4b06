// SPDX-License-Identifier: MIT
/// What the tests of file readers share: exact copies that a sanitizer can guard, temporary
/// folders, checksums, and the check that an error says what it must.
#pragma once

#include <stdlib.h>  // mkdtemp

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/error.hpp"

namespace sluice::test {

using Bytes = std::vector<std::byte>;

/// A folder that goes with its content when the test ends.
class TempFolder {
 public:
  TempFolder() : path_(::testing::TempDir() + "sluice_io_XXXXXX") {
    if (::mkdtemp(path_.data()) == nullptr) throw std::runtime_error("cannot make " + path_);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string path(std::string_view name = "") const {
    return name.empty() ? path_ : path_ + "/" + std::string(name);
  }
  std::string write(std::string_view name, std::string_view content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
  }
  std::string write(std::string_view name, std::span<const std::byte> content) const {
    return write(name,
                 std::string_view(reinterpret_cast<const char*>(content.data()), content.size()));
  }

 private:
  std::string path_;
};

inline Bytes read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const auto* const first = reinterpret_cast<const std::byte*>(text.data());
  return {first, first + text.size()};
}

/// An own heap block of exactly this size: AddressSanitizer sees every step past its end.
inline Bytes exact_copy(std::span<const std::byte> bytes) {
  return {bytes.begin(), bytes.end()};
}

/// Reads every byte; the sum keeps the compiler from leaving it out.
inline unsigned touch(std::span<const std::byte> bytes) {
  unsigned sum = 0;
  for (const std::byte byte : bytes) sum += std::to_integer<unsigned>(byte);
  return sum;
}

/// CRC-32 as zlib computes it (polynomial 0xedb88320), bit by bit.
inline std::uint32_t crc32(std::span<const std::byte> bytes) {
  std::uint32_t crc = 0xffffffffU;
  for (const std::byte byte : bytes) {
    crc ^= std::to_integer<std::uint32_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xedb88320U : 0U);
  }
  return ~crc;
}

/// The error that `function` throws; a test failure if it throws none, or another type.
template <class Function>
std::optional<Error> expected_error(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no error was thrown";
  return std::nullopt;
}

/// Expects an error of this code whose text holds all of `parts`, and whose detail names what,
/// where, expected and found.
template <class Function>
void expect_error(ErrorCode code, std::initializer_list<std::string_view> parts,
                  Function function) {
  const std::optional<Error> error = expected_error(function);
  if (!error) return;
  EXPECT_EQ(error->code(), code) << error->what();
  EXPECT_FALSE(error->detail().what.empty()) << error->what();
  EXPECT_FALSE(error->detail().where.empty()) << error->what();
  EXPECT_FALSE(error->detail().found.empty()) << error->what();
  for (const std::string_view part : parts)
    EXPECT_NE(std::string_view(error->what()).find(part), std::string_view::npos)
        << "'" << part << "' is missing in: " << error->what();
}

/// Runs `load` on damaged input: it must succeed or throw sluice::Error with a file and a reason.
/// Returns whether it succeeded.
template <class Function>
bool loads_or_throws(Function load) {
  try {
    load();
    return true;
  } catch (const Error& error) {
    EXPECT_FALSE(error.detail().where.empty()) << error.what();
    EXPECT_FALSE(error.detail().field.empty()) << error.what();
    EXPECT_FALSE(error.detail().expected.empty()) << error.what();
    EXPECT_FALSE(error.detail().found.empty()) << error.what();
    return false;
  }
}

}  // namespace sluice::test
