// SPDX-License-Identifier: MIT
#include "sluice/cache/kv_element.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/random.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
struct Stored {
  std::vector<T> codes;
  std::vector<typename KvRow<T>::Scale> scales;
  std::vector<float> read;  // as dequantise() gives them

  explicit Stored(const std::vector<float>& row)
      : codes(static_cast<std::size_t>(KvRow<T>::stored(static_cast<std::int64_t>(row.size())))),
        scales(static_cast<std::size_t>(KvRow<T>::scales(static_cast<std::int64_t>(row.size())))),
        read(row.size()) {
    const auto dim = static_cast<std::int64_t>(row.size());
    KvRow<T>::quantise(row.data(), dim, codes.data(), scales.data());
    KvRow<T>::dequantise(codes.data(), scales.data(), dim, read.data());
  }
};

/// The value of a code by the tables of the format, in double.
double e4m3_value(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const double mantissa = (bits & 7) / 8.0;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
  return bits >= 128 ? -magnitude : magnitude;
}

// ---- Typed-in tests -----------------------------------------------------------------------------

// Test E.6b's row: the codes of q8_0, whose scale is binary16 where ours is float32.
TEST(KvElement, Int8OfATypedInRow) {
  const Stored<std::int8_t> row({1.0F, -0.5F, 0.25F, 0.1F, 0.0F});
  EXPECT_EQ(row.codes, (std::vector<std::int8_t>{127, -64, 32, 13, 0}));
  EXPECT_FLOAT_EQ(row.scales[0], 0.007874016F);
  EXPECT_FLOAT_EQ(row.read[1], -64.0F / 127.0F);
  EXPECT_FLOAT_EQ(row.read[2], 32.0F / 127.0F);
  EXPECT_FLOAT_EQ(row.read[3], 13.0F / 127.0F);
}

// Test E.6b: ggml's blocks, the other channels 0.
TEST(KvElement, BlocksOfTypedInRows) {
  const auto row = [](std::vector<float> first) {
    first.resize(32);
    return first;
  };
  const Stored<q8_0> bytes(row({1.0F, -0.5F, 0.25F, 0.1F}));
  EXPECT_EQ(bytes.scales[0].bits, 0x2008);
  const int codes[] = {127, -64, 32, 13, 0};
  const double read[] = {0.999939, -0.503906, 0.251953, 0.102356, 0};
  for (std::size_t d = 0; d < 5; ++d) {
    EXPECT_EQ(bytes.codes[d].bits, codes[d]);
    EXPECT_NEAR(static_cast<double>(bytes.read[d]), read[d], 1e-6);
  }
  const Stored<q4_0> halves(row({-1.0F, 0.5F, 0.25F, 0.1F}));
  EXPECT_EQ(static_cast<float>(halves.scales[0]), 0.125F);
  const std::uint8_t packed[] = {0x80, 0x8C, 0x8A, 0x89, 0x88};
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(halves.codes[i].bits, packed[i]);
  // The value opposite in sign to the largest is clipped.
  const Stored<q4_0> clipped(row({1.0F, -1.0F, 0.5F, 0.1F}));
  EXPECT_EQ(static_cast<float>(clipped.scales[0]), -0.125F);
  const float seen[] = {1.0F, -0.875F, 0.5F, 0.125F, 0.0F};
  for (std::size_t d = 0; d < 5; ++d) EXPECT_EQ(clipped.read[d], seen[d]);
}

// Test E.6c.
TEST(KvElement, E4m3OfTypedInValues) {
  const auto round = [](float x) {
    return static_cast<float>(fp8_e4m3(x));
  };
  EXPECT_EQ(round(0.3F), 0.3125F);
  EXPECT_EQ(round(1.1F), 1.125F);
  EXPECT_EQ(round(17.0F), 16.0F);
  EXPECT_EQ(round(100.0F), 96.0F);
  EXPECT_EQ(round(0x1p-10F), 0.0F);
  EXPECT_EQ(round(1.5F * 0x1p-9F), 0x1p-8F);
  EXPECT_EQ(round(460.0F), 448.0F);
  EXPECT_EQ(round(500.0F), 448.0F);
  EXPECT_EQ(round(268.8F / 2.0F) * 2.0F, 256.0F);
  EXPECT_EQ(round(kInfinity), 448.0F);
  EXPECT_EQ(round(-kInfinity), -448.0F);
  EXPECT_TRUE(std::isnan(round(kNaN)));
  EXPECT_EQ(fp8_e4m3(-0.0F).bits, 0x80);
}

// Test 6.6.
TEST(KvElement, Int4OfATypedInRow) {
  const std::vector<float> row{-1.0F, 0.0F, 0.6F, 2.0F};
  const Stored<int4x2> stored(row);
  EXPECT_EQ(stored.codes[0].bits, 0x05);
  EXPECT_EQ(stored.codes[1].bits, 0x8F);
  EXPECT_EQ(static_cast<float>(stored.scales[0].zero), -1.0F);
  EXPECT_NEAR(static_cast<double>(static_cast<float>(stored.scales[0].scale)), 0.2, 0x1p-14);
  for (std::size_t d = 0; d < row.size(); ++d)
    EXPECT_NEAR(static_cast<double>(stored.read[d]), static_cast<double>(row[d]), 15 * 0x1p-14);
}

// ---- Conversions --------------------------------------------------------------------------------

// Every value is its own nearest one, and halfway between two neighbours the even code wins.
TEST(KvElement, E4m3RoundsToNearestEven) {
  for (int code = 0; code <= 0x7e; ++code) {
    const auto bits = static_cast<std::uint8_t>(code);
    const auto value = static_cast<float>(fp8_e4m3::from_bits(bits));
    ASSERT_EQ(static_cast<double>(value), e4m3_value(bits));
    ASSERT_EQ(fp8_e4m3(value).bits, bits);
    ASSERT_EQ(fp8_e4m3(-value).bits, bits | 0x80);
    if (code == 0x7e) break;
    const auto next = static_cast<float>(e4m3_value(static_cast<std::uint8_t>(code + 1)));
    const float middle = (value + next) / 2;
    ASSERT_EQ(fp8_e4m3(middle).bits, code % 2 == 0 ? code : code + 1);
    ASSERT_EQ(fp8_e4m3(std::nextafter(middle, 0.0F)).bits, code);
    ASSERT_EQ(fp8_e4m3(std::nextafter(middle, kInfinity)).bits, code + 1);
  }
}

/// Rows of all sizes and scales, with zeros and outliers among them.
std::vector<std::vector<float>> rows() {
  std::vector<std::vector<float>> result;
  Random random(1);
  for (const std::size_t dim : {2U, 8U, 64U, 80U, 128U, 200U, 256U})
    for (int i = 0; i < 60; ++i) {
      std::vector<float>& row = result.emplace_back(dim);
      // binary16 holds the scales of int4x2: values up to 60,000 for all.
      const double magnitude = std::pow(10.0, -12 + i % 17);
      for (float& x : row)
        x = static_cast<float>(std::clamp(magnitude * random.normal(), -6e4, 6e4));
      if (i % 4 == 1) row[random.below(dim)] = static_cast<float>(std::min(6e4, magnitude * 1e3));
      if (i % 5 == 2) std::fill(row.begin(), row.begin() + 2, 0.0F);
      if (i % 7 == 3)
        for (float& x : row) x = std::fabs(x) + static_cast<float>(magnitude);
      if (i == 58) std::fill(row.begin(), row.end(), 0.0F);
      if (i == 59)
        for (float& x : row) x *= 1e-44F;  // subnormal
    }
  return result;
}

TEST(KvElement, Int8KeepsItsErrorBound) {
  for (const std::vector<float>& row : rows()) {
    const Stored<std::int8_t> stored(row);
    const auto scale = static_cast<double>(stored.scales[0]);
    ASSERT_TRUE(std::isnormal(stored.scales[0]));
    for (std::size_t d = 0; d < row.size(); ++d)
      ASSERT_LE(std::abs(static_cast<double>(row[d]) - scale * stored.codes[d]),
                scale * (0.5 + 0x1p-16));
  }
}

TEST(KvElement, Fp8KeepsItsErrorBound) {
  for (const std::vector<float>& row : rows()) {
    const Stored<fp8_e4m3> stored(row);
    const auto scale = static_cast<double>(stored.scales[0]);
    for (std::size_t d = 0; d < row.size(); ++d) {
      const auto x = static_cast<double>(row[d]);
      ASSERT_LE(std::abs(x - scale * e4m3_value(stored.codes[d].bits)),
                (1 + 0x1p-16) * std::max(0x1p-4 * std::abs(x), 0x1p-10 * scale));
    }
  }
}

TEST(KvElement, Int4KeepsItsErrorBound) {
  for (const std::vector<float>& row : rows()) {
    const Stored<int4x2> stored(row);
    for (std::size_t begin = 0; begin < row.size(); begin += 128) {
      const std::size_t end = std::min<std::size_t>(begin + 128, row.size());
      const auto [low, high] = std::minmax_element(row.data() + begin, row.data() + end);
      const double range = static_cast<double>(*high) - static_cast<double>(*low);
      const double bound = (0.5 + 0x1p-16) * (range / 15 + 1e-8) +
                           0x1p-11 * (range + std::abs(static_cast<double>(*low))) + 0x1p-20;
      const GroupScale& group = stored.scales[begin / 128];
      for (std::size_t d = begin; d < end; ++d) {
        const int pair = stored.codes[d / 2].bits;
        const int code = d % 2 == 0 ? pair / 16 : pair % 16;
        ASSERT_LE(std::abs(static_cast<double>(row[d]) -
                           (static_cast<double>(static_cast<float>(group.scale)) * code +
                            static_cast<double>(static_cast<float>(group.zero)))),
                  bound);
      }
    }
  }
}

/// What an element stands for without its block's scale, by the format's layout.
int block_code(const std::vector<q8_0>& codes, std::size_t d) {
  return codes[d].bits;
}
int block_code(const std::vector<q4_0>& codes, std::size_t d) {
  const int pair = codes[d / 32 * 16 + d % 16].bits;
  return (d % 32 < 16 ? pair % 16 : pair / 16) - 8;
}

template <class T>
void blocks_keep_their_bound(double steps, double least) {
  for (const std::vector<float>& row : rows()) {
    if (row.size() % 32 != 0) continue;
    const Stored<T> stored(row);
    for (std::size_t d = 0; d < row.size(); ++d) {
      const auto scale = static_cast<double>(static_cast<float>(stored.scales[d / 32]));
      const double exact = scale * block_code(stored.codes, d);
      ASSERT_LE(std::abs(static_cast<double>(row[d]) - exact), steps * std::abs(scale) + least);
      ASSERT_EQ(stored.read[d], static_cast<float>(exact));
    }
  }
}

TEST(KvElement, BlocksKeepTheirErrorBound) {
  blocks_keep_their_bound<q8_0>(0.5 + 0x1p-4, 0x1p-18);
  blocks_keep_their_bound<q4_0>(1 + 0x1p-7, 0x1p-21);
}

template <class T>
class KvElementOf : public testing::Test {};
using Quantised = testing::Types<std::int8_t, fp8_e4m3, int4x2, q8_0, q4_0>;
TYPED_TEST_SUITE(KvElementOf, Quantised, );

// dequantise() is the formula in float32; zeros stay zeros.
TYPED_TEST(KvElementOf, ReadsZerosAsZeros) {
  for (const float x : Stored<TypeParam>(std::vector<float>(96, 0.0F)).read) EXPECT_EQ(x, 0.0F);
}

// What is not finite poisons its row (its group of channels), as it would in floats.
TYPED_TEST(KvElementOf, GivesNaNForWhatIsNotFinite) {
  for (const float bad : {kInfinity, -kInfinity, kNaN, -kNaN}) {
    std::vector<float> row(256, 1.0F);
    row[3] = bad;
    const Stored<TypeParam> stored(row);
    for (std::size_t d = 0; d < row.size(); ++d) {
      if (std::is_same_v<TypeParam, int4x2> && d >= 128)
        EXPECT_NEAR(static_cast<double>(stored.read[d]), 1.0, 1e-6);
      else if (BlockElement<TypeParam> && d >= 32)
        EXPECT_NEAR(static_cast<double>(stored.read[d]), 1.0, 0x1p-11);
      else
        EXPECT_TRUE(std::isnan(stored.read[d]));
    }
  }
}

TEST(KvElement, Int4GroupsThatBinary16DoesNotHoldAreNaN) {
  EXPECT_TRUE(std::isnan(Stored<int4x2>({-70000.0F, 0.0F}).read[0]));
  EXPECT_TRUE(std::isnan(Stored<int4x2>({-60000.0F, 1e6F}).read[0]));
  EXPECT_TRUE(std::isnan(Stored<int4x2>({-3e38F, 3e38F}).read[0]));
  EXPECT_FALSE(std::isnan(Stored<int4x2>({-65504.0F, 900000.0F}).read[0]));
}

TEST(KvElement, BlocksThatBinary16DoesNotHoldAreNaN) {
  std::vector<float> row(32, 1.0F);
  row[5] = -127.0F * 65504.0F;
  EXPECT_FALSE(std::isnan(Stored<q8_0>(row).read[0]));
  EXPECT_TRUE(std::isnan(Stored<q4_0>(row).read[0]));
  row[5] = 1e7F;
  EXPECT_TRUE(std::isnan(Stored<q8_0>(row).read[0]));
}

// ---- The cache's share --------------------------------------------------------------------------

TEST(QuantisedCache, CountsItsScales) {
  const std::vector<RetentionConfig> full{RetentionConfig::full(256, 1)};
  const std::vector<LayerCacheConfig> layers{{0, nullptr}};
  const KvShape shape{1, 2, 256, 128};
  const auto check = [&]<class Key, class Value>(std::size_t expected) {
    EXPECT_EQ((KvCache<Key, Value>::bytes_needed(shape, full, layers)), expected);
    EXPECT_EQ((KvCache<Key, Value>(shape, full, layers).bytes()), expected);
  };
  const std::size_t rows = 2 * 256;
  check.operator()<float, float>(rows * (256 + 128) * 4);
  check.operator()<std::int8_t, std::int8_t>(rows * (256 + 4 + 128 + 4));
  check.operator()<fp8_e4m3, f16>(rows * (256 + 4 + 128 * 2));
  check.operator()<int4x2, int4x2>(rows * (128 + 2 * 4 + 64 + 4));
  check.operator()<q8_0, q4_0>(rows * (8 * 34 + 4 * 18));  // as many bytes as in ggml's blocks
}

TEST(QuantisedCache, RefusesWhatItCannotHold) {
  const std::vector<RetentionConfig> full{RetentionConfig::full(16, 1)};
  const auto field_of = [&]<class Key, class Value>(const KvShape& shape, const Rotary* rotary) {
    const std::vector<LayerCacheConfig> layers{{0, rotary}};
    const auto error = test::error_of([&] { KvCache<Key, Value> cache(shape, full, layers); });
    return error ? error->detail().field : "none";
  };
  EXPECT_EQ((field_of.operator()<int4x2, f16>({1, 1, 7, 8}, nullptr)), "head_dim");
  EXPECT_EQ((field_of.operator()<f16, int4x2>({1, 1, 8, 7}, nullptr)), "value_dim");
  EXPECT_EQ((field_of.operator()<std::int8_t, fp8_e4m3>({1, 1, 7, 7}, nullptr)), "none");
  EXPECT_EQ((field_of.operator()<q8_0, q4_0>({1, 1, 80, 64}, nullptr)), "head_dim");
  EXPECT_EQ((field_of.operator()<q8_0, q4_0>({1, 1, 64, 80}, nullptr)), "value_dim");
  const Rotary wide({.head_dim = 1026, .rotary_dim = 64});
  EXPECT_EQ((field_of.operator()<std::int8_t, f16>({1, 1, 1026, 8}, &wide)), "head_dim");
  EXPECT_EQ((field_of.operator()<f16, std::int8_t>({1, 1, 1026, 8}, &wide)), "none");
}

template <class Key, class Value>
void save_and_restore() {
  constexpr int kDim = BlockElement<Key> ? 32 : 8;
  constexpr int kValueDim = BlockElement<Value> ? 64 : 6;
  const Rotary rotary({.head_dim = kDim, .rotary_dim = kDim});
  const std::vector<RetentionConfig> window{RetentionConfig::sink_window(2, 9, 4)};
  const std::vector<LayerCacheConfig> layers{{0, &rotary}, {0, nullptr}};
  const KvShape shape{2, 2, kDim, kValueDim};
  KvCache<Key, Value> cache(shape, window, layers);
  Random random(2);
  RotaryTable table(rotary, 4);
  for (int step = 0; step < 9; ++step) {
    std::vector<float> keys(4 * 2 * kDim);
    std::vector<float> values(4 * 2 * kValueDim);
    for (float& x : keys) x = static_cast<float>(random.normal());
    for (float& x : values) x = static_cast<float>(random.normal());
    table.fill_run(static_cast<Position>(cache.total()), 4);
    cache.append(4);
    for (std::int64_t layer = 0; layer < 2; ++layer)
      cache.store(layer, {keys.data(), 4, 2, kDim}, {values.data(), 4, 2, kValueDim}, table.rows(),
                  0, 4);
    cache.commit();
  }
  ByteWriter writer;
  cache.save(writer);
  KvCache<Key, Value> other(shape, window, layers);
  ByteReader reader(writer.bytes());
  other.restore(reader);
  reader.expect_end();
  ByteWriter again;
  other.save(again);
  ASSERT_EQ(writer.size(), again.size());
  EXPECT_TRUE(std::equal(writer.bytes().begin(), writer.bytes().end(), again.bytes().begin()));
  const auto error_of = [&]<class OtherKey, class OtherValue>(std::size_t size) {
    KvCache<OtherKey, OtherValue> into(shape, window, layers);
    ByteReader from(writer.bytes().first(size));
    const auto error = test::error_of([&] { into.restore(from); });
    EXPECT_TRUE(error.has_value());
    EXPECT_EQ(into.total(), 0);
    return error ? error->code() : ErrorCode::kConfig;
  };
  EXPECT_EQ((error_of.template operator()<Key, Value>(writer.size() - 1)), ErrorCode::kFormat);
  EXPECT_EQ((error_of.template operator()<f16, f16>(writer.size())), ErrorCode::kFormat);
}

TEST(QuantisedCache, RestoresWhatItSavedAndNothingElse) {
  save_and_restore<std::int8_t, std::int8_t>();
  save_and_restore<std::int8_t, float>();
  save_and_restore<fp8_e4m3, bf16>();
  save_and_restore<float, int4x2>();
  save_and_restore<int4x2, int4x2>();
  save_and_restore<q8_0, q4_0>();
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
