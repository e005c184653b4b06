// SPDX-License-Identifier: MIT
#include "sluice/core/memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include <gtest/gtest.h>

#include "sluice/core/element.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

template <class T>
class BufferTest : public testing::Test {};
using Elements = testing::Types<float, double, f16, bf16, std::uint8_t, std::int64_t>;
TYPED_TEST_SUITE(BufferTest, Elements);

TYPED_TEST(BufferTest, IsAlignedAndZero) {
  for (std::size_t size : {1U, 2U, 3U, 63U, 64U, 65U, 1000U, 100'003U}) {
    // Dirty memory first: a recycled block must come out zero too.
    {
      Buffer<TypeParam> dirty(size);
      auto* bytes = reinterpret_cast<unsigned char*>(dirty.data());
      for (std::size_t i = 0; i < dirty.bytes(); ++i) bytes[i] = 0xa5;
    }
    const Buffer<TypeParam> buffer(size);
    ASSERT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % kAlignment, 0U);
    ASSERT_EQ(buffer.size(), size);
    ASSERT_EQ(buffer.bytes(), size * sizeof(TypeParam));
    ASSERT_EQ(buffer.span().data(), buffer.data());
    ASSERT_EQ(buffer.span().size(), size);
    const auto* bytes = reinterpret_cast<const unsigned char*>(buffer.data());
    for (std::size_t i = 0; i < buffer.bytes(); ++i) ASSERT_EQ(bytes[i], 0);
  }
}

TEST(Buffer, EmptyHasNoStorage) {
  const Buffer<float> made_empty(0);
  const Buffer<float> by_default;
  for (const auto* buffer : {&made_empty, &by_default}) {
    EXPECT_EQ(buffer->data(), nullptr);
    EXPECT_EQ(buffer->size(), 0U);
    EXPECT_TRUE(buffer->span().empty());
  }
}

TEST(Buffer, MovesStorageAndLeavesNothingBehind) {
  Buffer<int> a(10);
  for (int i = 0; i < 10; ++i) a[static_cast<std::size_t>(i)] = i;
  const int* const storage = a.data();
  Buffer<int> b(std::move(a));
  EXPECT_EQ(b.data(), storage);
  EXPECT_EQ(b.size(), 10U);
  EXPECT_EQ(a.data(), nullptr);  // NOLINT: the moved-from state is part of the contract
  EXPECT_EQ(a.size(), 0U);
  Buffer<int> c(3);
  c = std::move(b);
  EXPECT_EQ(c.data(), storage);
  EXPECT_EQ(c.size(), 10U);
  EXPECT_EQ(b.data(), nullptr);
  EXPECT_EQ(b.size(), 0U);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(c[static_cast<std::size_t>(i)], i);
  Buffer<int>& same = c;
  c = std::move(same);
  EXPECT_EQ(c.data(), storage);
  EXPECT_EQ(c.size(), 10U);
  static_assert(!std::is_copy_constructible_v<Buffer<int>>);
  static_assert(!std::is_copy_assignable_v<Buffer<int>>);
  static_assert(std::is_nothrow_move_constructible_v<Buffer<int>>);
}

/// Large ones, which ask for large pages, change places with small ones: each is freed as it was
/// allocated.
TEST(Buffer, LargeOnesAreLikeSmallOnes) {
  constexpr std::size_t kSize = (std::size_t{5} << 20) + 3;
  Buffer<std::uint8_t> large(kSize);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large.data()) % kAlignment, 0U);
  EXPECT_TRUE(std::ranges::all_of(large.span(), [](std::uint8_t x) { return x == 0; }));
  large[kSize - 1] = 7;
  Buffer<std::uint8_t> small(3);
  small[2] = 5;
  std::swap(large, small);
  ASSERT_EQ(small.size(), kSize);
  EXPECT_EQ(small[kSize - 1], 7);
  ASSERT_EQ(large.size(), 3U);
  EXPECT_EQ(large[2], 5);
  small = Buffer<std::uint8_t>(4);
  large = Buffer<std::uint8_t>(kSize);
  EXPECT_EQ(small.size(), 4U);
  EXPECT_EQ(large[kSize - 1], 0);
}

TEST(Buffer, SizesThatCannotBeAreRefused) {
  // 2^61 + 1 doubles are 8 bytes modulo 2^64.
  for (const std::size_t size :
       {(std::size_t{1} << 61) + 1, std::numeric_limits<std::size_t>::max()})
    EXPECT_THROW(Buffer<double>{size}, std::bad_alloc);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
