// SPDX-License-Identifier: MIT
#include "sluice/core/checksum.hpp"

#include <array>
#include <cstring>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

std::vector<std::byte> bytes_of(std::string_view text) {
  std::vector<std::byte> bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

// Polynomial division bit by bit, not reflected: another shape of the same definition.
std::uint64_t divided_bit_by_bit(std::span<const std::byte> bytes) {
  const auto reversed = [](std::uint64_t value, int bits) {
    std::uint64_t result = 0;
    for (int i = 0; i < bits; ++i) result |= ((value >> i) & 1U) << (bits - 1 - i);
    return result;
  };
  std::uint64_t remainder = ~std::uint64_t{0};
  for (std::byte byte : bytes) {
    remainder ^= reversed(std::to_integer<std::uint64_t>(byte), 8) << 56;
    for (int bit = 0; bit < 8; ++bit)
      remainder = (remainder << 1) ^ ((remainder >> 63) != 0 ? 0x42f0e1eba9ea3693ULL : 0);
  }
  return ~reversed(remainder, 64);
}

TEST(Crc64, PublishedAndRecordedValues) {
  EXPECT_EQ(crc64(bytes_of("123456789")), 0x995dc9bbdf1939faULL);  // the catalogue's check value
  EXPECT_EQ(crc64({}), 0U);
  EXPECT_EQ(crc64(std::vector<std::byte>(1)), 0x1fada17364673f59ULL);
  EXPECT_EQ(crc64(std::vector<std::byte>(32, std::byte{0xff})), 0xe95dce9efaa09acfULL);
  std::vector<std::byte> pattern(1000);
  for (std::size_t i = 0; i < pattern.size(); ++i)
    pattern[i] = static_cast<std::byte>((i * i * 31 + i * 7 + (i >> 3)) & 255U);
  EXPECT_EQ(crc64(pattern), 0x9911c865f096e531ULL);
  constexpr std::array<std::byte, 3> kConstant{std::byte{'a'}, std::byte{'b'}, std::byte{'c'}};
  static_assert(crc64(kConstant) != 0);  // usable in constant expressions
}

TEST(Crc64, EqualsDivisionBitByBitAtEveryLengthAndAlignment) {
  Random random(1);
  std::vector<std::byte> bytes(100);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next() & 255U);
  const std::span<const std::byte> all(bytes);
  for (std::size_t begin = 0; begin < 16; ++begin)
    for (std::size_t size = 0; size + begin <= bytes.size(); ++size)
      ASSERT_EQ(crc64(all.subspan(begin, size)), divided_bit_by_bit(all.subspan(begin, size)));
}

TEST(Crc64, PiecesGiveTheSameAsTheWhole) {
  Random random(2);
  std::vector<std::byte> bytes(10'000);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next() & 255U);
  const std::span<const std::byte> all(bytes);
  const std::uint64_t whole = crc64(all);
  for (int trial = 0; trial < 50; ++trial) {
    Crc64 checksum;
    for (std::size_t at = 0; at < bytes.size();) {
      const std::size_t size = std::min<std::size_t>(random.below(40), bytes.size() - at);
      checksum.update(all.subspan(at, size));
      at += size;
    }
    ASSERT_EQ(checksum.value(), whole);
  }
}

TEST(Crc64, SeesEveryFlippedBitAndEveryShortBurst) {
  std::vector<std::byte> bytes(64, std::byte{0x5a});
  const std::uint64_t good = crc64(bytes);
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    ASSERT_NE(crc64(bytes), good);
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
  }
  Random random(3);
  for (int trial = 0; trial < 10'000; ++trial) {
    auto damaged = bytes;
    const std::size_t at = random.below(bytes.size() - 8);
    for (std::size_t i = 0; i < 8; ++i) damaged[at + i] ^= static_cast<std::byte>(random.next());
    if (damaged != bytes) {
      ASSERT_NE(crc64(damaged), good);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
