// SPDX-License-Identifier: MIT
/// Rows of codes on the device against the CPU's, bit for bit.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/decode_oracle.hpp"
#include "backend/cuda/device_test.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

/// A warp to a row. from: [rows, kHeadDim]; to: the same; scales: [rows].
template <class Element, int kHeadDim>
__global__ void quantise_rows(const float* from, Element* to, float* scales) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kHeadDim;
  const float scale =
      detail::quantise_row<Element, kHeadDim>(from + at, to + at, static_cast<int>(threadIdx.x));
  scales[blockIdx.x * 32 + threadIdx.x] = scale;
}

/// Floats of every exponent, signs and zeros, and what is no number.
std::vector<float> row_of_bits(Random& random, std::size_t dim, int kind) {
  std::vector<float> row(dim);
  const auto bits = [&] {
    return static_cast<std::uint32_t>(random.next());
  };
  const std::uint32_t exponent = bits() % 255;
  for (float& x : row) {
    const std::uint32_t mantissa = bits() & 0x807fffffU;
    switch (kind % 5) {
      case 0: x = static_cast<float>(static_cast<std::int32_t>(bits())) * 0x1p-30F; break;
      case 1: x = std::bit_cast<float>(mantissa | exponent << 23); break;
      case 2: x = std::bit_cast<float>(mantissa | bits() % 255 << 23); break;
      case 3:  // quotients that lie between two codes, and those codes
        x = static_cast<float>(static_cast<int>(bits() % 509) - 254) * 0.5F;
        break;
      default: x = std::bit_cast<float>((mantissa & 0x800000ffU) >> (bits() % 2)); break;
    }
  }
  if (kind % 5 == 3) row[bits() % dim] = kind % 2 == 0 ? 127.0F : -448.0F;
  if (kind % 11 == 0) row[bits() % dim] = std::numeric_limits<float>::quiet_NaN();
  if (kind % 13 == 0) row[bits() % dim] = -std::numeric_limits<float>::infinity();
  if (kind % 17 == 0) std::fill(row.begin(), row.end(), kind % 2 == 0 ? 0.0F : -0.0F);
  return row;
}

template <class Parameters>
class KvCodes : public testing::Test {};
template <class Element, int kHeadDim>
using Row = std::tuple<Element, std::integral_constant<int, kHeadDim>>;
using RowTypes =
    testing::Types<Row<std::int8_t, 64>, Row<std::int8_t, 80>, Row<std::int8_t, 96>,
                   Row<std::int8_t, 128>, Row<std::int8_t, 256>, Row<fp8_e4m3, 64>,
                   Row<fp8_e4m3, 80>, Row<fp8_e4m3, 96>, Row<fp8_e4m3, 128>, Row<fp8_e4m3, 256>>;
TYPED_TEST_SUITE(KvCodes, RowTypes);

TYPED_TEST(KvCodes, RowsAreQuantisedAsOnTheCpu) {
  SKIP_WITHOUT_DEVICE();
  using Element = std::tuple_element_t<0, TypeParam>;
  constexpr int kHeadDim = std::tuple_element_t<1, TypeParam>::value;
  constexpr std::size_t kRows = 4096;
  Random random(kHeadDim);
  std::vector<float> content;
  for (std::size_t row = 0; row < kRows; ++row) {
    const std::vector<float> x = row_of_bits(random, kHeadDim, static_cast<int>(row));
    content.insert(content.end(), x.begin(), x.end());
  }
  const Buffer<float, cuda> from{std::span<const float>(content)};
  Buffer<std::uint8_t, cuda> to(content.size());
  Buffer<float, cuda> scales(kRows * 32);
  quantise_rows<Element, kHeadDim>
      <<<kRows, 32>>>(from.data(), reinterpret_cast<Element*>(to.data()), scales.data());
  check_cuda(cudaGetLastError(), "quantise_rows");
  const std::vector<std::uint8_t> codes = to.download();
  const std::vector<float> found_scales = scales.download();
  for (std::size_t row = 0; row < kRows; ++row) {
    std::array<Element, kHeadDim> expected;
    const float scale = sluice_test::quantise_on_cpu(
        std::span<const float>(&content[row * kHeadDim], kHeadDim), expected.data());
    for (std::size_t lane = 0; lane < 32; ++lane)
      ASSERT_EQ(std::bit_cast<std::uint32_t>(found_scales[row * 32 + lane]),
                std::bit_cast<std::uint32_t>(scale))
          << row;
    for (std::size_t d = 0; d < kHeadDim; ++d) {
      std::uint8_t code;
      std::memcpy(&code, &expected[d], 1);
      ASSERT_EQ(codes[row * kHeadDim + d], code)
          << row << " " << content[row * kHeadDim + d] << " of " << scale;
    }
  }
}

/// Four codes i, i + 1, i + 2, i + 3 widened in three ways.
__global__ void widen_all(uint2* results) {
  const unsigned i = threadIdx.x;
  const std::uint32_t four =
      (i & 255U) | ((i + 1) & 255U) << 8 | ((i + 2) & 255U) << 16 | ((i + 3) & 255U) << 24;
  detail::ByteCodes<std::int8_t>::widen(four, results[i].x, results[i].y);
  detail::ByteCodes<fp8_e4m3>::widen(four, results[256 + i].x, results[256 + i].y);
  detail::widen_e4m3_bits(four, results[512 + i].x, results[512 + i].y);
}

TEST(KvCodesWidened, AreTheCodesNumbers) {
  SKIP_WITHOUT_DEVICE();
  Buffer<uint2, cuda> results(3 * 256);
  widen_all<<<1, 256>>>(results.data());
  check_cuda(cudaGetLastError(), "widen_all");
  const std::vector<uint2> found = results.download();
  for (unsigned i = 0; i < 256; ++i) {
    for (unsigned j = 0; j < 4; ++j) {
      const auto code = static_cast<std::uint8_t>(i + j);
      const auto number = [&](unsigned way) {
        const uint2 pairs = found[way * 256 + i];
        const std::uint32_t pair = j < 2 ? pairs.x : pairs.y;
        return static_cast<float>(
            f16::from_bits(static_cast<std::uint16_t>(j % 2 == 0 ? pair : pair >> 16)));
      };
      ASSERT_EQ(number(0), static_cast<float>(static_cast<std::int8_t>(code)));
      if ((code & 0x7fU) == 0x7fU) continue;  // NaN
      const auto expected = static_cast<float>(fp8_e4m3::from_bits(code));
      ASSERT_EQ(std::bit_cast<std::uint32_t>(number(1)), std::bit_cast<std::uint32_t>(expected));
      ASSERT_EQ(std::bit_cast<std::uint32_t>(number(2)), std::bit_cast<std::uint32_t>(expected));
    }
  }
}

__global__ void round_all(const float* from, std::uint8_t* to, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = static_cast<std::uint8_t>(detail::e4m3_bits(from[i]));
}

TEST(KvCodesRounded, ByIntegersAsOnTheCpu) {
  SKIP_WITHOUT_DEVICE();
  std::vector<float> content;
  // The upper 16 bits of every float to 512, with a mantissa below, at and above each midpoint.
  for (std::uint32_t high = 0; high < 0x4400U; ++high)
    for (const std::uint32_t low : {0U, 1U, 0x8000U, 0xffffU})
      for (const std::uint32_t sign : {0U, 0x80000000U})
        content.push_back(std::bit_cast<float>(sign | high << 16 | low));
  const Buffer<float, cuda> from{std::span<const float>(content)};
  Buffer<std::uint8_t, cuda> to(content.size());
  const auto count = static_cast<int>(content.size());
  round_all<<<static_cast<unsigned>((count + 255) / 256), 256>>>(from.data(), to.data(), count);
  check_cuda(cudaGetLastError(), "round_all");
  const std::vector<std::uint8_t> found = to.download();
  for (std::size_t i = 0; i < content.size(); ++i)
    ASSERT_EQ(found[i], fp8_e4m3(content[i]).bits) << content[i];
}

}  // namespace SLUICE_TEST_UNIT
