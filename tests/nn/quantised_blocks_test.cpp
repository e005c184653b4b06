// SPDX-License-Identifier: MIT
#include "sluice/nn/quantised_blocks.hpp"

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

// What tests/oracle/make_quant_goldens.py wrote.
struct Golden {
  std::vector<float> before;  // empty where the stored form is random bytes
  std::vector<unsigned char> stored;
  std::vector<float> after;
};

Golden read_golden(const std::string& name) {
  std::ifstream file(std::string(SLUICE_TEST_DATA) + "/quant/" + name + ".bin", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::uint32_t header[3] = {};
  EXPECT_GE(bytes.size(), sizeof(header)) << name;
  if (bytes.size() < sizeof(header)) return {};
  std::memcpy(header, bytes.data(), sizeof(header));
  Golden golden;
  golden.before.resize(header[2] != 0 ? header[0] : 0);
  golden.stored.resize(header[1]);
  golden.after.resize(header[0]);
  const std::size_t before_bytes = golden.before.size() * sizeof(float);
  const std::size_t after_bytes = golden.after.size() * sizeof(float);
  EXPECT_EQ(bytes.size(), sizeof(header) + before_bytes + golden.stored.size() + after_bytes);
  const char* next = bytes.data() + sizeof(header);
  if (before_bytes != 0) std::memcpy(golden.before.data(), next, before_bytes);
  next += before_bytes;
  std::memcpy(golden.stored.data(), next, golden.stored.size());
  next += golden.stored.size();
  std::memcpy(golden.after.data(), next, after_bytes);
  return golden;
}

struct Case {
  ElementType type;
  const char* file;
};

class QuantisedBlocks : public testing::TestWithParam<Case> {};

TEST_P(QuantisedBlocks, ReadsBitForBitWhatThePythonPackageReads) {
  const Golden golden = read_golden(GetParam().file);
  const auto count = static_cast<std::int64_t>(golden.after.size());
  ASSERT_GT(count, 0);
  ASSERT_EQ(static_cast<std::int64_t>(golden.stored.size()), storage_bytes(GetParam().type, count));
  std::vector<float> values(golden.after.size());
  dequantise(GetParam().type, golden.stored.data(), count, values.data());
  for (std::size_t i = 0; i < values.size(); ++i)
    ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]),
              std::bit_cast<std::uint32_t>(golden.after[i]))
        << "value " << i << ": " << values[i] << " for " << golden.after[i];
}

TEST_P(QuantisedBlocks, ReadsFromUnalignedMemory) {
  const Golden golden = read_golden(GetParam().file);
  const auto count = static_cast<std::int64_t>(golden.after.size());
  std::vector<unsigned char> shifted(golden.stored.size() + 1);
  std::memcpy(shifted.data() + 1, golden.stored.data(), golden.stored.size());
  std::vector<float> values(golden.after.size());
  dequantise(GetParam().type, shifted.data() + 1, count, values.data());
  EXPECT_EQ(values, golden.after);
}

TEST_P(QuantisedBlocks, StoresTheBytesThatThePythonPackageStores) {
  const Golden golden = read_golden(GetParam().file);
  if (golden.before.empty()) {
    float values[256] = {};
    unsigned char stored[256];
    try {
      quantise(GetParam().type, values, 256, stored);
      FAIL() << "no quantiser was expected";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    }
    return;
  }
  std::vector<unsigned char> stored(golden.stored.size());
  quantise(GetParam().type, golden.before.data(), static_cast<std::int64_t>(golden.before.size()),
           stored.data());
  EXPECT_EQ(stored, golden.stored);
}

INSTANTIATE_TEST_SUITE_P(
    Types, QuantisedBlocks,
    testing::Values(Case{ElementType::kF16, "f16"}, Case{ElementType::kBF16, "bf16"},
                    Case{ElementType::kQ8_0, "q8_0"}, Case{ElementType::kQ4_0, "q4_0"},
                    Case{ElementType::kQ4_1, "q4_1"}, Case{ElementType::kQ4_K, "q4_k"},
                    Case{ElementType::kQ6_K, "q6_k"}),
    [](const auto& each) { return std::string(each.param.file); });

TEST(QuantisedBlock, F32IsACopy) {
  const std::vector<float> values = {1.0F, -0.0F, 3.5e-39F, 7.0e30F, -2.0F};
  std::vector<unsigned char> stored(values.size() * sizeof(float));
  quantise(ElementType::kF32, values.data(), 5, stored.data());
  std::vector<float> back(values.size());
  dequantise(ElementType::kF32, stored.data(), 5, back.data());
  EXPECT_EQ(std::memcmp(back.data(), values.data(), stored.size()), 0);
}

// A typed-in block: every scale and min differs, and the expected scales are from the bit table in
// ggml's comment (six bits each: low four or six in one byte, the upper two in another).
TEST(QuantisedBlock, UnpacksTheScalesOfQ4K) {
  const std::uint8_t packed[12] = {0xC1, 0x82, 0x43, 0x04, 0x45, 0x86,
                                   0xC7, 0x08, 0x9A, 0xBC, 0xDE, 0xF0};
  std::uint8_t unpacked[16];
  unpack_scales_q4_k(packed, unpacked);
  const std::uint8_t expected[16] = {1, 2, 3, 4, 0x3A, 0x2C, 0x1E, 0x00,
                                     5, 6, 7, 8, 0x19, 0x2B, 0x3D, 0x0F};
  for (int i = 0; i < 16; ++i) EXPECT_EQ(unpacked[i], expected[i]) << i;
}

TEST(QuantisedBlock, RefusesPartialBlocks) {
  float values[40] = {};
  unsigned char stored[64];
  try {
    quantise(ElementType::kQ8_0, values, 40, stored);
    FAIL() << "40 values are not whole blocks of 32";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kShape);
    EXPECT_EQ(error.detail().expected, "a multiple of 32");
    EXPECT_EQ(error.detail().found, "40");
  }
}

// cache-and-kernel-algorithms.md, test E.6b: ggml's blocks of 32 as keys and values use them.
TEST(QuantisedBlocks, TypedInBlocksOf32) {
  std::array<float, 32> x{1, -.5F, .25F, .1F};
  const BlockQ8_0 bytes = detail::quantise_block_q8_0(x.data());
  EXPECT_EQ(std::bit_cast<std::uint16_t>(bytes.d), 0x2008);
  const int levels[] = {127, -64, 32, 13, 0};
  const double values[] = {.999939, -.503906, .251953, .102356, 0};
  std::array<float, 32> back{};
  detail::dequantise_block(bytes, back.data());
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(bytes.qs[i], levels[i]);
    EXPECT_NEAR(static_cast<double>(back[i]), values[i], 1e-6);
  }
  x = {-1, .5F, .25F, .1F};
  const BlockQ4_0 nibbles = detail::quantise_block_q4_0(x.data());
  EXPECT_EQ(static_cast<float>(nibbles.d), .125F);
  const int bytes_of[] = {0x80, 0x8C, 0x8A, 0x89, 0x88};
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(nibbles.qs[i], bytes_of[i]);
  // The value that is opposite in sign to the largest is clipped.
  x = {1, -1, .5F, .1F};
  const BlockQ4_0 clipped = detail::quantise_block_q4_0(x.data());
  EXPECT_EQ(static_cast<float>(clipped.d), -.125F);
  detail::dequantise_block(clipped, back.data());
  const float clipped_to[] = {1, -.875F, .5F, .125F};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(back[i], clipped_to[i]);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
