// SPDX-License-Identifier: MIT
#include "sluice/cache/frame_store.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::error_of;

std::vector<std::byte> record_of(std::uint64_t seed, std::size_t size) {
  Random random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.below(256));
  return bytes;
}

void expect_round_trip(FrameStore& store) {
  constexpr std::size_t kSize = 1000;
  // Out of order, and one written anew.
  for (const std::int64_t record : {3, 0, 2, 3, 1})
    store.put(record, record_of(static_cast<std::uint64_t>(record) + 1, kSize));
  for (std::int64_t record = 0; record < 4; ++record) {
    std::vector<std::byte> bytes(kSize);
    store.get(record, bytes);
    EXPECT_EQ(bytes, record_of(static_cast<std::uint64_t>(record) + 1, kSize));
  }
}

TEST(FrameStore, GivesBackWhatItWasGiven) {
  FrameStore memory(4, 1000);
  expect_round_trip(memory);
  EXPECT_EQ(memory.bytes(), std::size_t{4000});
  std::filesystem::path path;
  {
    FrameStore file(4, 1000, ::testing::TempDir());
    FrameStore other(4, 1000, ::testing::TempDir());
    EXPECT_NE(file.path(), other.path());
    expect_round_trip(file);
    EXPECT_EQ(file.bytes(), std::size_t{0});
    path = file.path();
    EXPECT_TRUE(std::filesystem::exists(path));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(FrameStore, FindsDamage) {
  constexpr std::int64_t kSize = 64;
  FrameStore store(3, kSize, ::testing::TempDir());
  for (std::int64_t record = 0; record < 2; ++record) store.put(record, record_of(9, kSize));
  std::vector<std::byte> bytes(kSize);
  const auto get = [&](std::int64_t record) {
    return error_of([&] { store.get(record, bytes); });
  };
  constexpr std::int64_t kStep = kSize + 16;
  EXPECT_EQ(get(2)->code(), ErrorCode::kFormat);  // never written
  // Every byte of a record matters.
  for (std::int64_t offset = kStep; offset < 2 * kStep; ++offset) {
    std::fstream file(store.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(offset);
    const char kept = static_cast<char>(file.get());
    file.seekp(offset);
    file.put(static_cast<char>(kept ^ 4));
    file.flush();
    const auto error = get(1);
    ASSERT_TRUE(error) << offset;
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
    EXPECT_EQ(error->detail().field, "record 1");
    EXPECT_EQ(error->detail().where, store.path().string());
    file.seekp(offset);
    file.put(kept);
  }
  EXPECT_FALSE(get(1));
  std::filesystem::resize_file(store.path(), static_cast<std::uintmax_t>(2 * kStep - 1));
  EXPECT_EQ(get(1)->code(), ErrorCode::kFormat);
  EXPECT_FALSE(get(0));
  EXPECT_EQ(error_of([] { FrameStore(1, 8, "/no/such/folder"); })->code(), ErrorCode::kIo);
}

}  // namespace SLUICE_TEST_UNIT
