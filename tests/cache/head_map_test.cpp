// SPDX-License-Identifier: MIT
#include "sluice/cache/head_map.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/error.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

ErrorCode code_of(const auto& action, std::string* message = nullptr) {
  const std::optional<Error> error = test::error_of(action);
  if (!error) ADD_FAILURE() << "no error";
  if (error && message != nullptr) *message = error->what();
  return error ? error->code() : ErrorCode::kOrder;
}

std::vector<std::int64_t> true_places(const std::vector<bool>& flags) {
  std::vector<std::int64_t> places;
  for (std::size_t i = 0; i < flags.size(); ++i)
    if (flags[i]) places.push_back(static_cast<std::int64_t>(i));
  return places;
}

using Places = std::vector<std::int64_t>;

// core-algorithms.md, test 6.2.
TEST(FullHeads, QuantileOfTheGates) {
  EXPECT_EQ(true_places(full_heads({1, 4, {0.9, 0.1, 0.4, 0.6}}, 0.5)), (Places{0, 3}));
}

TEST(FullHeads, ShareOfStreamingHeads) {
  const HeadTable gates{2, 4, {0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1}};
  EXPECT_EQ(true_places(full_heads(gates, -1)).size(), 8U);
  EXPECT_EQ(true_places(full_heads(gates, 0)).size(), 8U);
  EXPECT_EQ(true_places(full_heads(gates, 1)).size(), 0U);
  EXPECT_EQ(true_places(full_heads(gates, 2)).size(), 0U);
  // Quantiles at places 1.75, 3.5, 5.25 of 0 .. 7.
  EXPECT_EQ(true_places(full_heads(gates, 0.25)), (Places{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(true_places(full_heads(gates, 0.5)), (Places{0, 1, 2, 3}));
  EXPECT_EQ(true_places(full_heads(gates, 0.75)), (Places{0, 1}));
  // A place that is whole is itself full: "at or above the threshold".
  EXPECT_EQ(true_places(full_heads({1, 3, {0.1, 0.5, 0.9}}, 0.5)), (Places{1, 2}));
}

TEST(FullHeads, GatesAreClippedBeforeTheyAreCompared) {
  // 1.7 and 1.2 are both 1, -3 is 0: ties go to the lower head.
  EXPECT_EQ(true_places(full_heads({1, 4, {1.0, 1.7, -3, 1.2}}, 0.5)), (Places{0, 1}));
  EXPECT_EQ(true_places(full_heads({1, 4, {-1, 0, -2, 0}}, 0.5)), (Places{0, 1}));
}

TEST(FullHeads, TablesThatDoNotFit) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(code_of([] { full_heads({2, 2, {1, 1, 1}}, 0.5); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([] { full_heads({0, 2, {}}, 0.5); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([] { full_heads({2, 0, {}}, 0.5); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { full_heads({1, 2, {1, nan}}, 0.5); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([&] { full_heads({1, 2, {1, 0}}, nan); }), ErrorCode::kConfig);
}

TEST(HeadMap, DuoAttention) {
  const HeadMap map = duo_attention_map({1, 4, {0.9, 0.1, 0.4, 0.6}}, 0.5, 64, 256);
  EXPECT_EQ(map.eviction(), Eviction::kPerChunk);
  EXPECT_EQ(map.num_full(), 2);
  EXPECT_TRUE(map.at(0, 0).is_full());
  EXPECT_EQ(map.at(0, 1), (HeadRetention{64, 256}));
}

TEST(HeadMap, LazyLayers) {
  const std::vector<std::int64_t> lazy{1, 3};
  const HeadMap map = lazy_layers_map(4, 2, lazy, {4, 1020});
  for (std::int64_t layer = 0; layer < 4; ++layer)
    for (std::int64_t head = 0; head < 2; ++head)
      EXPECT_EQ(map.at(layer, head).is_full(), layer % 2 == 0);
  const std::vector<std::int64_t> beyond{4};
  EXPECT_EQ(code_of([&] { lazy_layers_map(4, 2, beyond, {4, 1020}); }), ErrorCode::kShape);
}

// cache-and-kernel-algorithms.md, test A.2.
TEST(HeadMap, SpansOfMoA) {
  struct Row {
    std::int64_t horizon;
    std::vector<std::int64_t> entries;
  };
  const std::vector<double> alphas{0, 0, -1024, 1024, 2048};
  const std::vector<double> betas{.125, .625, 1, .125, 0};
  for (const Row& row : {Row{2048 + 1024, {384, 1920, 2048, 1408, 2048}},
                         Row{8192 + 1024, {1152, 5760, 8192, 2176, 2048}},
                         Row{100 + 28, {128, 128, 128, 128, 128}}}) {
    const HeadMap map = span_map({1, 5, alphas}, {1, 5, betas}, 5, row.horizon);
    for (std::int64_t head = 0; head < 5; ++head) {
      const std::int64_t entries = row.entries[static_cast<std::size_t>(head)];
      EXPECT_EQ(map.at(0, head), (HeadRetention{64, entries - 64})) << row.horizon;
    }
  }
}

TEST(HeadMap, SpansOfQueryHeadsGroupedByTheLargest) {
  const HeadMap map = span_map({1, 4, {128, 256, 0, 0}}, {1, 4, {0, 0, .5, .25}}, 2, 4096);
  EXPECT_EQ(map.at(0, 0), (HeadRetention{64, 192}));
  EXPECT_EQ(map.at(0, 1), (HeadRetention{64, 2048 - 64}));
  EXPECT_EQ(code_of([] {
              span_map({1, 4, {1, 1, 1, 1}}, {1, 2, {1, 1}}, 2, 10);
            }),
            ErrorCode::kShape);
  EXPECT_EQ(code_of([] {
              span_map({1, 4, {1, 1, 1, 1}}, {1, 4, {1, 1, 1, 1}}, 3, 10);
            }),
            ErrorCode::kShape);
  EXPECT_EQ(code_of([] {
              span_map({1, 4, {1, 1, 1, 1}}, {1, 4, {1, 1, 1, 1}}, 2, 0);
            }),
            ErrorCode::kConfig);
}

TEST(HeadMap, ThingsThatAreNoMap) {
  std::string message;
  EXPECT_EQ(code_of([] { HeadMap(2, 2, {{}, {}, {}}); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([] { HeadMap(0, 2, {}); }), ErrorCode::kShape);
  EXPECT_EQ(code_of([] { HeadMap(1, 2, {{}, {}}, Eviction::kOnRequest); }), ErrorCode::kConfig);
  EXPECT_EQ(code_of([] { HeadMap(1, 2, {{}, {4, 0}}); }, &message), ErrorCode::kConfig);
  EXPECT_NE(message.find("head 1 of layer 0"), std::string::npos) << message;
  EXPECT_EQ(code_of([] { HeadMap(1, 2, {{-1, 5}, {}}); }), ErrorCode::kConfig);
}

// core-algorithms.md, 6.7: 100,000 tokens in 16 bits, sinks 64, recent 256.
TEST(HeadMap, BytesThatAMapPromises) {
  const auto bytes = [](std::int64_t layers, std::int64_t heads, std::int64_t full_of_8) {
    const std::vector<RetentionConfig> retentions{RetentionConfig::full(100'000, 1),
                                                  RetentionConfig::per_chunk(64, 256, 1)};
    std::vector<LayerCacheConfig> configs;
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      std::vector<int> of_head;
      for (std::int64_t head = 0; head < heads; ++head)
        of_head.push_back(head % 8 < full_of_8 ? 0 : 1);
      configs.push_back({0, nullptr, of_head});
    }
    return static_cast<double>(
               KvCache<f16>::bytes_needed({layers, heads, 128, 128}, retentions, configs)) *
           1e-9;
  };
  // A streaming head holds one row more, for the token being read: below the last digit given.
  EXPECT_NEAR(bytes(32, 8, 8), 13.107, 0.0005);
  EXPECT_NEAR(bytes(32, 8, 4), 6.575, 0.0005);
  EXPECT_NEAR(bytes(32, 8, 8) / bytes(32, 8, 4), 1.994, 0.0005);
  EXPECT_NEAR(bytes(32, 32, 8), 52.43, 0.005);
  EXPECT_NEAR(bytes(32, 32, 2), 13.23, 0.005);
  EXPECT_NEAR(bytes(32, 32, 8) / bytes(32, 32, 2), 3.96, 0.005);
}

TEST(HeadMap, WhatIsNeededIsWhatIsHeld) {
  const std::vector<RetentionConfig> retentions{RetentionConfig::full(100, 8),
                                                RetentionConfig::sink_window(2, 10, 8)};
  const std::vector<LayerCacheConfig> layers{{0, nullptr, {0, 1, 1}}, {1, nullptr}};
  const KvShape shape{2, 3, 16, 8};
  EXPECT_EQ((KvCache<float, f16>::bytes_needed(shape, retentions, layers)),
            (KvCache<float, f16>(shape, retentions, layers).bytes()));
  EXPECT_EQ(
      code_of([&] {
        KvCache<float>(shape, retentions, std::vector<LayerCacheConfig>{{0, nullptr, {0, 1}}, {}});
      }),
      ErrorCode::kShape);
  EXPECT_EQ(code_of([&] {
              KvCache<float>(shape, retentions,
                             std::vector<LayerCacheConfig>{{0, nullptr, {0, 1, 2}}, {}});
            }),
            ErrorCode::kShape);
}

}  // namespace SLUICE_TEST_UNIT
