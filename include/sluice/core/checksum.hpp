// SPDX-License-Identifier: MIT
/// A 64-bit checksum against damage of stored state: CRC-64/XZ. It finds every burst of damage of
/// up to 64 bits and misses other damage with probability 2^-64. It is no protection against
/// intent.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace sluice {

namespace detail {

/// Remainders of one byte followed by `row` zero bytes. [8, 256]
using Crc64Tables = std::array<std::array<std::uint64_t, 256>, 8>;

constexpr Crc64Tables make_crc64_tables() {
  constexpr std::uint64_t kPolynomial = 0xc96c5795d7870f42ULL;  // ECMA-182, bits reversed
  Crc64Tables tables{};
  for (std::size_t byte = 0; byte < 256; ++byte) {
    std::uint64_t remainder = byte;
    for (int bit = 0; bit < 8; ++bit)
      remainder = (remainder >> 1) ^ ((remainder & 1U) != 0 ? kPolynomial : 0);
    tables[0][byte] = remainder;
  }
  for (std::size_t row = 1; row < 8; ++row)
    for (std::size_t byte = 0; byte < 256; ++byte)
      tables[row][byte] = (tables[row - 1][byte] >> 8) ^ tables[0][tables[row - 1][byte] & 0xffU];
  return tables;
}

inline constexpr Crc64Tables kCrc64Tables = make_crc64_tables();

}  // namespace detail

/// CRC-64/XZ of a sequence of bytes given in any number of pieces: polynomial of ECMA-182, bits
/// reflected, start and end inverted (the check value of "123456789" is 995dc9bbdf1939fa). The same
/// on every machine: it reads bytes, never words. Eight bytes a round, by eight tables (Kounavis
/// and Berry, "A systematic approach to building high performance software-based CRC generators",
/// ISCC 2005). Allocates nothing.
class Crc64 {
 public:
  /// Appends `bytes` to the sequence.
  constexpr void update(std::span<const std::byte> bytes) {
    const auto& tables = detail::kCrc64Tables;
    std::uint64_t state = state_;
    std::size_t index = 0;
    for (; bytes.size() - index >= 8; index += 8) {
      std::uint64_t next = 0;
      for (std::size_t k = 0; k < 8; ++k)
        next ^= tables[7 - k][((state >> (8 * k)) & 0xffU) ^
                              std::to_integer<std::uint64_t>(bytes[index + k])];
      state = next;
    }
    for (; index < bytes.size(); ++index)
      state =
          (state >> 8) ^ tables[0][(state & 0xffU) ^ std::to_integer<std::uint64_t>(bytes[index])];
    state_ = state;
  }

  /// The checksum of everything given so far; 0 for nothing.
  constexpr std::uint64_t value() const { return ~state_; }

 private:
  std::uint64_t state_ = ~std::uint64_t{0};
};

/// CRC-64/XZ of `bytes`.
constexpr std::uint64_t crc64(std::span<const std::byte> bytes) {
  Crc64 checksum;
  checksum.update(bytes);
  return checksum.value();
}

}  // namespace sluice
