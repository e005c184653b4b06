// SPDX-License-Identifier: MIT
#include "sluice/core/byte_stream.hpp"

#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

enum class Colour : std::uint16_t { kRed = 1, kBlue = 0x0203 };

std::vector<int> as_ints(std::span<const std::byte> bytes) {
  std::vector<int> result;
  for (std::byte byte : bytes) result.push_back(std::to_integer<int>(byte));
  return result;
}

// Runs `read`, which must throw Error(kFormat), and gives its detail.
template <class Read>
ErrorDetail refusal(Read&& read) {
  try {
    read();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kFormat) << error.what();
    return error.detail();
  }
  ADD_FAILURE() << "accepted";
  return {};
}

TEST(ByteWriter, WritesLittleEndian) {
  ByteWriter writer;
  writer.write(std::uint32_t{0x01020304});
  writer.write(std::int16_t{-2});
  writer.write(Colour::kBlue);
  writer.write(1.0F);
  writer.write(f16(1.0F));
  writer.write(bf16(-2.0F));
  writer.write_span(std::span<const std::uint16_t>(std::array<std::uint16_t, 2>{0x0a0b, 7}));
  writer.write_string("hi");
  EXPECT_EQ(
      as_ints(writer.bytes()),
      (std::vector<int>{4, 3, 2, 1, 0xfe, 0xff, 3, 2, 0,    0,    0x80, 0x3f, 0, 0x3c, 0, 0xc0,  //
                        2, 0, 0, 0, 0,    0,    0, 0, 0x0b, 0x0a, 7,    0,                       //
                        2, 0, 0, 0, 0,    0,    0, 0, 'h',  'i'}));
  EXPECT_EQ(writer.size(), writer.bytes().size());
  const auto taken = writer.take();
  EXPECT_EQ(taken.size(), 38U);
  EXPECT_EQ(writer.size(), 0U);
}

// A stream with every kind of field, as a session snapshot has it.
std::vector<std::byte> sample() {
  ByteWriter writer;
  writer.write(std::uint64_t{0x656369756c73});
  writer.write(std::uint32_t{3});
  writer.write_string("tiny \xc3\xa9");
  writer.write(Colour::kBlue);
  writer.write_span(std::span<const float>(std::array{1.5F, -0.0F, 3e-45F}));
  writer.write_span(std::span<const std::int64_t>());
  writer.write_span(std::span<const bf16>(std::array{bf16(0.5F), bf16(-7.0F)}));
  writer.write(std::numeric_limits<double>::quiet_NaN());
  writer.write(std::numeric_limits<std::int64_t>::min());
  writer.write_checksum();
  return writer.take();
}

void read_sample(ByteReader& reader) {
  reader.read_expected("magic", std::uint64_t{0x656369756c73});
  reader.read_expected("version", std::uint32_t{3});
  EXPECT_EQ(reader.read_string("name", 100), "tiny \xc3\xa9");
  EXPECT_EQ(reader.read<Colour>("colour"), Colour::kBlue);
  std::array<float, 3> floats{};
  reader.read_span("floats", std::span(floats));
  EXPECT_EQ(std::bit_cast<std::uint32_t>(floats[1]), 0x80000000U);
  EXPECT_EQ(floats[2], 3e-45F);
  EXPECT_TRUE(reader.read_vector<std::int64_t>("numbers", 5).empty());
  const auto halves = reader.read_vector<bf16>("halves", 2);
  EXPECT_EQ(static_cast<float>(halves.at(1)), -7.0F);
  EXPECT_NE(reader.read<double>("nan"), 0.0);
  EXPECT_EQ(reader.read<std::int64_t>("least"), std::numeric_limits<std::int64_t>::min());
}

TEST(ByteReader, ReadsBackWhatWasWritten) {
  const auto bytes = sample();
  ByteReader reader(bytes);
  reader.verify_checksum();
  read_sample(reader);
  reader.expect_end();
  EXPECT_EQ(reader.offset(), bytes.size() - 8);
}

TEST(ByteReader, TruncationAtEveryByteIsAnError) {
  const auto bytes = sample();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    const std::vector<std::byte> cut(bytes.begin(),
                                     bytes.begin() + static_cast<std::ptrdiff_t>(size));
    ByteReader checked(cut, "cut.bin");
    const auto damage = refusal([&] { checked.verify_checksum(); });
    EXPECT_EQ(damage.where, "cut.bin");
    // Without the checksum, field by field: an error too, unless only the checksum is cut.
    if (size + 8 >= bytes.size()) continue;
    ByteReader reader(cut, "cut.bin");
    const auto detail = refusal([&] { read_sample(reader); });
    EXPECT_EQ(detail.where, "cut.bin");
    EXPECT_NE(detail.field.find(" at byte "), std::string::npos);
    EXPECT_FALSE(detail.expected.empty());
    EXPECT_FALSE(detail.found.empty());
  }
}

TEST(ByteReader, EveryFlippedBitFailsTheChecksum) {
  auto bytes = sample();
  for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    ByteReader reader(bytes);
    const auto detail = refusal([&] { reader.verify_checksum(); });
    EXPECT_EQ(detail.field, "checksum at byte " + std::to_string(bytes.size() - 8));
    bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
  }
}

TEST(ByteReader, ErrorsNameFieldOffsetExpectedAndFound) {
  ByteWriter writer;
  writer.write(std::uint16_t{7});
  writer.write(std::uint32_t{2});
  const auto bytes = writer.take();
  ByteReader reader(bytes, "state.bin");
  reader.read<std::uint16_t>("first");
  auto detail = refusal([&] { reader.read_expected("version", std::uint32_t{3}); });
  EXPECT_EQ(detail.where, "state.bin");
  EXPECT_EQ(detail.field, "version at byte 2");
  EXPECT_EQ(detail.expected, "3");
  EXPECT_EQ(detail.found, "2");
  detail = refusal([&] { reader.read<double>("weight"); });
  EXPECT_EQ(detail.field, "weight at byte 2");
  EXPECT_EQ(detail.expected, "8 bytes");
  EXPECT_EQ(detail.found, "4");
  detail = refusal([&] { reader.expect_end(); });
  EXPECT_EQ(detail.found, "4 bytes");
  detail = refusal([&] { reader.read_expected("colour", Colour::kRed); });
  EXPECT_EQ(detail.found, "2");
  EXPECT_EQ(reader.offset(), 2U);  // refused reads do not move it
  EXPECT_EQ(reader.read<std::uint32_t>("version"), 2U);
  reader.expect_end();
}

TEST(ByteReader, HostileCountsAreRefusedBeforeAnythingIsAllocated) {
  for (std::uint64_t count : {std::uint64_t{3}, std::uint64_t{1} << 32, std::uint64_t{1} << 61,
                              (std::uint64_t{1} << 61) + 1, ~std::uint64_t{0}}) {
    ByteWriter writer;
    writer.write(count);
    writer.write(std::uint64_t{0});  // one value where `count` are announced
    const auto bytes = writer.take();
    ByteReader reader(bytes);
    const auto most = std::numeric_limits<std::uint64_t>::max();
    EXPECT_EQ(refusal([&] { reader.read_vector<double>("values", most); }).what, "truncated");
    EXPECT_EQ(refusal([&] { reader.read_vector<double>("values", 2); }).what, "count out of range");
    std::array<double, 1> one{4.0};
    EXPECT_EQ(refusal([&] { reader.read_span("values", std::span(one)); }).what, "wrong count");
    EXPECT_EQ(one[0], 4.0);
    EXPECT_EQ(reader.offset(), 0U);
  }
  ByteWriter writer;
  writer.write(std::uint64_t{9});
  writer.write(std::uint64_t{0});
  const auto bytes = writer.take();
  ByteReader reader(bytes);
  EXPECT_EQ(refusal([&] { reader.read_string("name", 100); }).what, "truncated");
  EXPECT_EQ(refusal([&] { reader.read_string("name", 8); }).what, "count out of range");
  EXPECT_EQ(reader.offset(), 0U);
}

TEST(ByteReader, SpanCutShortLeavesTheOutputAlone) {
  ByteWriter writer;
  writer.write(std::uint64_t{2});
  writer.write(std::uint32_t{1});
  const auto bytes = writer.take();
  ByteReader reader(bytes);
  std::array<std::uint32_t, 2> values{8, 9};
  EXPECT_EQ(refusal([&] { reader.read_span("values", std::span(values)); }).what, "truncated");
  EXPECT_EQ(values, (std::array<std::uint32_t, 2>{8, 9}));
  EXPECT_EQ(reader.offset(), 0U);
}

TEST(ByteStream, RefusesTypesWhoseBytesAreNotTheirValue) {
  static_assert(StreamValue<std::uint8_t> && StreamValue<double> && StreamValue<f16> &&
                StreamValue<Colour> && StreamValue<std::byte>);
  struct Padded {
    char a;
    int b;
  };
  static_assert(!StreamValue<Padded> && !StreamValue<bool> && !StreamValue<int*> &&
                !StreamValue<long double> && !StreamValue<const int*>);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
