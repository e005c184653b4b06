// SPDX-License-Identifier: MIT
#include "sluice/cache/kv_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/rotary.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::bf16;
using sluice::ByteReader;
using sluice::ByteWriter;
using sluice::CacheStatus;
using sluice::Error;
using sluice::ErrorCode;
using sluice::f16;
using sluice::HeadsView;
using sluice::KeyForm;
using sluice::KvCache;
using sluice::KvShape;
using sluice::LayerCacheConfig;
using sluice::PositionRule;
using sluice::Random;
using sluice::Retention;
using sluice::RetentionConfig;
using sluice::Rotary;
using sluice::Segment;
using sluice::TokenKind;

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kKeyDim = 8;
constexpr std::int64_t kValueDim = 6;

template <class Action>
std::optional<Error> error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

/// Keys and values of a stream, one row per token of which any part can be given to a cache.
/// `version` tells a token that was taken back from the one appended in its place.
struct Stream {
  static std::vector<float> row(const char* what, std::int64_t layer, std::int64_t token,
                                std::int64_t version, std::int64_t width) {
    Random random(static_cast<std::uint64_t>(what[0]) + 1000 * static_cast<std::uint64_t>(layer) +
                  1000000 * static_cast<std::uint64_t>(token) +
                  1000000000 * static_cast<std::uint64_t>(version));
    std::vector<float> values(static_cast<std::size_t>(width));
    for (float& value : values) value = static_cast<float>(random.normal());
    return values;
  }
  static std::vector<float> key(std::int64_t layer, std::int64_t token, std::int64_t version) {
    return row("key", layer, token, version, kHeads * kKeyDim);
  }
  static std::vector<float> value(std::int64_t layer, std::int64_t token, std::int64_t version) {
    return row("value", layer, token, version, kHeads * kValueDim);
  }
};

template <class T>
bool same_bits(const T* a, const T* b, std::int64_t count) {
  return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}

/// A cache of three layers: global with rotation, local window with another rotation, global
/// without rotation, beside the list of tokens that it should hold.
template <class Key, class Value>
struct Fixture {
  Rotary global_rotary{{.head_dim = kKeyDim, .rotary_dim = kKeyDim, .theta = 10000}};
  Rotary local_rotary{{.head_dim = kKeyDim,
                       .rotary_dim = kKeyDim / 2,
                       .theta = 100,
                       .pairing = sluice::RotaryPairing::kInterleaved}};
  std::vector<RetentionConfig> retentions;
  std::vector<LayerCacheConfig> layers;
  KvCache<Key, Value> cache;
  std::vector<std::int64_t> versions;  // of each token of the stream

  Fixture(RetentionConfig global, RetentionConfig local)
      : retentions{global, local},
        layers{{0, &global_rotary}, {1, &local_rotary}, {0, nullptr}},
        cache({3, kHeads, kKeyDim, kValueDim}, retentions, layers) {}

  const Rotary* rotary(std::int64_t layer) const {
    return layers[static_cast<std::size_t>(layer)].rotary;
  }

  /// Appends and stores; the last token's version is `version`. Rows are stored in two parts, as
  /// two threads would.
  void append(std::int64_t tokens, std::int64_t version = 0) {
    ASSERT_EQ(cache.status(tokens), CacheStatus::kOk);
    const std::int64_t first = cache.total();
    cache.append(tokens);
    versions.resize(static_cast<std::size_t>(first));
    for (std::int64_t t = 0; t < tokens; ++t) versions.push_back(version);
    for (std::int64_t layer = 0; layer < 3; ++layer) {
      std::vector<float> keys;
      std::vector<float> values;
      std::vector<float> rotation;
      for (std::int64_t t = first; t < first + tokens; ++t) {
        const std::vector<float> key = Stream::key(layer, t, version);
        const std::vector<float> value = Stream::value(layer, t, version);
        keys.insert(keys.end(), key.begin(), key.end());
        values.insert(values.end(), value.begin(), value.end());
        if (rotary(layer) == nullptr) continue;
        std::vector<float> row(static_cast<std::size_t>(rotary(layer)->row_size()));
        rotary(layer)->angles(cache.retention(layer).write_position(t), row.data());
        rotation.insert(rotation.end(), row.begin(), row.end());
      }
      const HeadsView<const float> key_view(keys.data(), tokens, kHeads, kKeyDim);
      const HeadsView<const float> value_view(values.data(), tokens, kHeads, kValueDim);
      cache.store(layer, key_view, value_view, rotation.data(), tokens / 2, tokens);
      cache.store(layer, key_view, value_view, rotation.data(), 0, tokens / 2);
    }
  }

  std::vector<Segment<Key, Value>> segments(std::int64_t layer, std::int64_t queries) const {
    std::array<Segment<Key, Value>, KvCache<Key, Value>::kMaxSegments> out;
    const int count = cache.segments(layer, queries, out);
    return {out.begin(), out.begin() + count};
  }

  /// Every row of every segment is, bit for bit, what was stored for the token that the rule names.
  /// Returns the stream indices in order.
  std::vector<std::int64_t> expect_rows(std::int64_t layer, std::int64_t queries) const {
    const Retention& retention = cache.retention(layer);
    const bool raw = retention.config().key_form == KeyForm::kRaw;
    std::vector<std::int64_t> tokens;
    for (const Segment<Key, Value>& segment : segments(layer, queries)) {
      EXPECT_EQ(segment.key_rotation != nullptr, raw && rotary(layer) != nullptr);
      for (std::int64_t i = 0; i < segment.rule.count; ++i) {
        const std::int64_t token = segment.rule.first_index + i;
        tokens.push_back(token);
        const std::int64_t version = versions[static_cast<std::size_t>(token)];
        const std::vector<float> key = Stream::key(layer, token, version);
        const std::vector<float> value = Stream::value(layer, token, version);
        std::vector<float> row;
        if (rotary(layer) != nullptr) {
          row.resize(static_cast<std::size_t>(rotary(layer)->row_size()));
          rotary(layer)->angles(segment.rule.first_position + static_cast<double>(i), row.data());
          if (raw) {
            EXPECT_TRUE(same_bits(segment.key_rotation + i * segment.key_rotation_stride,
                                  row.data(), rotary(layer)->row_size()))
                << "rotation of token " << token;
          }
        }
        for (std::int64_t head = 0; head < kHeads; ++head) {
          Key expected_key[kKeyDim];
          if (raw || rotary(layer) == nullptr)
            for (std::int64_t d = 0; d < kKeyDim; ++d)
              expected_key[d] = Key(key[static_cast<std::size_t>(head * kKeyDim + d)]);
          else
            rotary(layer)->rotate(row.data(), key.data() + head * kKeyDim, expected_key);
          Value expected_value[kValueDim];
          for (std::int64_t d = 0; d < kValueDim; ++d)
            expected_value[d] = Value(value[static_cast<std::size_t>(head * kValueDim + d)]);
          EXPECT_TRUE(same_bits(segment.key(head, i), expected_key, kKeyDim))
              << "layer " << layer << ", token " << token << ", head " << head;
          EXPECT_TRUE(same_bits(segment.value(head, i), expected_value, kValueDim))
              << "layer " << layer << ", token " << token << ", head " << head;
        }
      }
    }
    return tokens;
  }
};

std::vector<std::int64_t> range(std::int64_t begin, std::int64_t end) {
  std::vector<std::int64_t> result;
  for (std::int64_t i = begin; i < end; ++i) result.push_back(i);
  return result;
}

template <class Types>
class KvCacheElements : public testing::Test {};

template <class Key_, class Value_>
struct ElementPair {
  using Key = Key_;
  using Value = Value_;
};
using ElementPairs =
    testing::Types<ElementPair<float, float>, ElementPair<f16, f16>, ElementPair<bf16, bf16>,
                   ElementPair<bf16, float>, ElementPair<float, f16>>;
TYPED_TEST_SUITE(KvCacheElements, ElementPairs);

TYPED_TEST(KvCacheElements, LayersOfDifferentRetentionsReturnWhatWasStored) {
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig global = RetentionConfig::full(64, 7);
    RetentionConfig local = RetentionConfig::sink_window(2, 9, 5);
    global.key_form = local.key_form = form;
    local.origin = form == KeyForm::kRotated ? 100.5 : 0;
    Fixture<typename TypeParam::Key, typename TypeParam::Value> f(global, local);
    EXPECT_EQ(f.cache.max_chunk(), 5);
    Random random(3);
    std::int64_t total = 0;
    while (total < 55) {
      const auto chunk = static_cast<std::int64_t>(1 + random.below(5));
      f.append(chunk);
      total += chunk;
      EXPECT_EQ(f.cache.total(), total);
      for (const std::int64_t layer : {0, 2})
        EXPECT_EQ(f.expect_rows(layer, chunk), range(0, total)) << "layer " << layer;
      // Two sinks, and what the oldest query of the chunk sees.
      std::vector<std::int64_t> local_tokens = range(0, std::min<std::int64_t>(2, total));
      for (const std::int64_t i : range(std::max<std::int64_t>(2, total - chunk - 8), total))
        local_tokens.push_back(i);
      EXPECT_EQ(f.expect_rows(1, chunk), local_tokens);
      f.cache.commit();
    }
  }
}

TYPED_TEST(KvCacheElements, EvictRangeMovesTheRowsOfEveryLayer) {
  using Key = typename TypeParam::Key;
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig config = RetentionConfig::on_request(2, 10, 16);
    config.key_form = form;
    Fixture<Key, typename TypeParam::Value> f(config, config);
    f.append(16);
    f.cache.commit();
    std::vector<std::int64_t> tokens = range(0, 16);
    const auto evict = [&](std::int64_t begin, std::int64_t end) {
      f.cache.evict_range(begin, end);
      tokens.erase(tokens.begin() + begin, tokens.begin() + end);
      for (std::int64_t layer = 0; layer < 3; ++layer)
        EXPECT_EQ(f.expect_rows(layer, 0), tokens) << "layer " << layer;
    };
    evict(3, 6);    // the tail of the ring moves up
    evict(10, 12);  // what follows moves down
    f.append(4);    // wraps round the ring's end
    f.cache.commit();
    for (const std::int64_t i : range(16, 20)) tokens.push_back(i);
    evict(5, 6);
    evict(8, tokens.size() - 1);
    f.cache.shrink();  // fits: nothing happens
    EXPECT_EQ(f.expect_rows(0, 0), tokens);
    f.append(5);
    f.cache.commit();
    for (const std::int64_t i : range(20, 25)) tokens.push_back(i);
    f.cache.evict_for_space(4);  // 2 sinks and the last 6
    tokens.erase(tokens.begin() + 2, tokens.end() - 6);
    for (std::int64_t layer = 0; layer < 3; ++layer) EXPECT_EQ(f.expect_rows(layer, 0), tokens);
  }
}

TYPED_TEST(KvCacheElements, WhatWasTakenBackIsOverwritten) {
  RetentionConfig local = RetentionConfig::sink_window(1, 6, 4);
  local.capacity += 8;
  Fixture<typename TypeParam::Key, typename TypeParam::Value> f(RetentionConfig::full(60, 8),
                                                                local);
  Random random(11);
  for (int step = 0; step < 60; ++step) {
    const auto chunk = static_cast<std::int64_t>(1 + random.below(4));
    if (f.cache.status(chunk) == CacheStatus::kOk) {
      f.append(chunk, step);
      f.expect_rows(0, chunk);
      f.expect_rows(1, chunk);
      if (random.below(4) == 0)
        f.cache.rollback();
      else
        f.cache.commit();
    }
    const std::int64_t most = f.cache.max_truncate();
    if (random.below(3) == 0 && most > 0)
      f.cache.truncate(static_cast<std::int64_t>(
          random.below(static_cast<std::uint64_t>(std::min<std::int64_t>(most, 6)) + 1)));
    f.versions.resize(static_cast<std::size_t>(f.cache.total()));
    // What is kept now is what the next query needs, of the tokens' present versions.
    for (std::int64_t layer = 0; layer < 3; ++layer) f.expect_rows(layer, 0);
  }
}

TYPED_TEST(KvCacheElements, ARestoredCacheGoesOnBitForBit) {
  using Key = typename TypeParam::Key;
  using Value = typename TypeParam::Value;
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig global = RetentionConfig::full(64, 8);
    RetentionConfig local = RetentionConfig::sink_window(2, 6, 3);
    local.capacity += 5;
    global.key_form = local.key_form = form;
    for (const std::int64_t tokens : {0, 1, 5, 9, 30}) {
      Fixture<Key, Value> original(global, local);
      for (std::int64_t i = 0; i < tokens; ++i) {
        original.append(1);
        original.cache.commit();
      }
      ByteWriter writer;
      original.cache.save(writer);
      Fixture<Key, Value> restored(global, local);
      restored.append(3, 77);  // what was there before must not show through
      restored.cache.commit();
      ByteReader reader(writer.bytes());
      restored.cache.restore(reader);
      reader.expect_end();
      restored.versions = original.versions;
      ByteWriter again;
      restored.cache.save(again);
      EXPECT_TRUE(std::ranges::equal(writer.bytes(), again.bytes()));
      // Tokens that a truncation brings back belong to the state too.
      for (Fixture<Key, Value>* f : {&original, &restored}) {
        f->cache.truncate(std::min<std::int64_t>(3, f->cache.max_truncate()));
        f->versions.resize(static_cast<std::size_t>(f->cache.total()));
        f->append(2, 5);
        for (std::int64_t layer = 0; layer < 3; ++layer) f->expect_rows(layer, 2);
        f->cache.commit();
      }
      ByteWriter first;
      ByteWriter second;
      original.cache.save(first);
      restored.cache.save(second);
      EXPECT_TRUE(std::ranges::equal(first.bytes(), second.bytes()));
    }
  }
}

TEST(KvCacheSnapshots, GapsAreRestoredToo) {
  RetentionConfig config = RetentionConfig::on_request(2, 10, 16);
  Fixture<f16, f16> original(config, config);
  original.append(16);
  original.cache.commit();
  original.cache.evict_range(4, 9);
  original.cache.evict_range(6, 7);
  original.append(3);
  original.cache.commit();
  ByteWriter writer;
  original.cache.save(writer);
  Fixture<f16, f16> restored(config, config);
  ByteReader reader(writer.bytes());
  restored.cache.restore(reader);
  restored.versions = original.versions;
  const std::vector<std::int64_t> tokens{0, 1, 2, 3, 9, 10, 12, 13, 14, 15, 16, 17, 18};
  for (std::int64_t layer = 0; layer < 3; ++layer)
    EXPECT_EQ(restored.expect_rows(layer, 0), tokens);
}

TEST(KvCacheSnapshots, DamageGivesAnErrorAndAnEmptyCache) {
  const RetentionConfig global = RetentionConfig::full(16, 8);
  const RetentionConfig local = RetentionConfig::sink_window(1, 4, 3);
  Fixture<bf16, float> f(global, local);
  for (int i = 0; i < 6; ++i) {
    f.append(1);
    f.cache.commit();
  }
  ByteWriter writer;
  f.cache.save(writer);
  const std::vector<std::byte> bytes(writer.bytes().begin(), writer.bytes().end());
  Fixture<bf16, float> target(global, local);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    target.cache.reset();
    target.versions.clear();
    target.append(2);
    target.cache.commit();
    const auto error = error_of([&] {
      ByteReader reader({bytes.data(), size}, "the snapshot");
      target.cache.restore(reader);
    });
    ASSERT_TRUE(error) << size;
    ASSERT_EQ(error->code(), ErrorCode::kFormat);
    ASSERT_EQ(error->detail().where, "the snapshot");
    ASSERT_EQ(target.cache.total(), 0);
    ASSERT_EQ(target.cache.max_truncate(), 0);
  }
  // Types and shapes, then both retentions: 2 * 4 + 4 * 8 + (8 + 5) * 8 + 2 runs at most each.
  for (std::size_t bit = 0; bit < 300 * 8; ++bit) {
    std::vector<std::byte> damaged = bytes;
    damaged[bit / 8] ^= std::byte{1} << (bit % 8);
    const auto error = error_of([&] {
      ByteReader reader(damaged);
      target.cache.restore(reader);
    });
    if (error) {
      ASSERT_EQ(error->code(), ErrorCode::kFormat);
      ASSERT_EQ(target.cache.total(), 0);
    } else {
      ASSERT_EQ(target.cache.status(1), CacheStatus::kOk);
      target.versions.assign(static_cast<std::size_t>(target.cache.total()), 0);
      target.append(1);
      target.cache.commit();
    }
  }
}

TEST(KvCacheSnapshots, OtherShapesAndTypesAreRefusedByName) {
  const RetentionConfig config = RetentionConfig::full(8, 4);
  const LayerCacheConfig layers[] = {{0, nullptr}, {0, nullptr}};
  const std::span<const RetentionConfig> retentions(&config, 1);
  const KvShape shape{2, 2, 4, 6};
  KvCache<f16> cache(shape, retentions, layers);
  ByteWriter writer;
  cache.save(writer);
  const auto field_of = [&](auto&& target) {
    const auto error = error_of([&] {
      ByteReader reader(writer.bytes());
      target.restore(reader);
    });
    const std::string field = error ? error->detail().field : "(none)";
    return field.substr(0, field.find(" at byte"));
  };
  EXPECT_EQ(field_of(KvCache<f16>(shape, retentions, layers)), "(none)");
  EXPECT_EQ(field_of(KvCache<bf16, f16>(shape, retentions, layers)), "key type");
  EXPECT_EQ(field_of(KvCache<f16, float>(shape, retentions, layers)), "value type");
  EXPECT_EQ(field_of(KvCache<f16>({1, 2, 4, 6}, retentions, {layers, 1})), "num_layers");
  EXPECT_EQ(field_of(KvCache<f16>({2, 1, 4, 6}, retentions, layers)), "num_kv_heads");
  EXPECT_EQ(field_of(KvCache<f16>({2, 2, 8, 6}, retentions, layers)), "head_dim");
  EXPECT_EQ(field_of(KvCache<f16>({2, 2, 4, 4}, retentions, layers)), "value_dim");
  const RetentionConfig other = RetentionConfig::full(9, 4);
  EXPECT_EQ(field_of(KvCache<f16>(shape, {&other, 1}, layers)), "capacity");

  cache.append(1);
  ByteWriter unfinished;
  const auto error = error_of([&] { cache.save(unfinished); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kOrder);
}

TEST(KvCacheTransactions, ARefusedCallChangesNoRetention) {
  // The first retention could do what is asked, the second cannot.
  const RetentionConfig retentions[] = {RetentionConfig::on_request(1, 8, 12),
                                        RetentionConfig::on_request(3, 6, 12)};
  const LayerCacheConfig layers[] = {{0, nullptr}, {1, nullptr}};
  KvCache<float> cache({2, 1, 4, 4}, retentions, layers);
  cache.append(10);
  cache.commit();
  const auto kept = [&] {
    std::vector<std::int64_t> result;
    for (const Retention& retention : cache.retentions()) result.push_back(retention.size());
    return result;
  };
  const auto refused = error_of([&] { cache.evict_range(2, 4); });
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->code(), ErrorCode::kShape);
  EXPECT_EQ(kept(), (std::vector<std::int64_t>{10, 10}));

  cache.shrink();
  EXPECT_EQ(kept(), (std::vector<std::int64_t>{9, 9}));
  EXPECT_EQ(cache.max_truncate(), 6);
  const auto truncated = error_of([&] { cache.truncate(7); });
  ASSERT_TRUE(truncated);
  EXPECT_EQ(truncated->code(), ErrorCode::kCapacity);
  EXPECT_EQ(truncated->detail().expected, "0 to 6");
  EXPECT_TRUE(error_of([&] { cache.truncate(-1); }));
  EXPECT_EQ(cache.total(), 10);
  EXPECT_EQ(kept(), (std::vector<std::int64_t>{9, 9}));

  const RetentionConfig mixed[] = {RetentionConfig::on_request(1, 8, 12),
                                   RetentionConfig::window(4, 4)};
  KvCache<float> alternating({2, 1, 4, 4}, mixed, layers);
  for (int i = 0; i < 10; ++i) {
    alternating.append(1);
    alternating.commit();
  }
  for (const auto& error : {error_of([&] { alternating.shrink(); }),
                            error_of([&] { alternating.evict_range(2, 3); })}) {
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kOrder);
    EXPECT_EQ(alternating.retentions()[0].size(), 10);
  }
}

TEST(KvCacheTransactions, FullMeansFullInOneRetention) {
  const RetentionConfig retentions[] = {RetentionConfig::window(4, 3), RetentionConfig::full(5, 4)};
  const LayerCacheConfig layers[] = {{0, nullptr}, {1, nullptr}};
  KvCache<float> cache({2, 1, 4, 4}, retentions, layers);
  EXPECT_EQ(cache.max_chunk(), 3);
  EXPECT_EQ(cache.status(4), CacheStatus::kFull);
  for (int i = 0; i < 4; ++i) {
    cache.append(1);
    cache.commit();
  }
  EXPECT_EQ(cache.status(1), CacheStatus::kOk);
  EXPECT_EQ(cache.status(2), CacheStatus::kFull);
  cache.reset();
  EXPECT_EQ(cache.total(), 0);
  EXPECT_EQ(cache.status(3), CacheStatus::kOk);
}

TEST(KvCacheMemory, BytesFollowFromTheRetentions) {
  // Rows fill whole cache lines here, so that nothing is rounded: [2, capacity, 32] and [.., 64].
  const RetentionConfig retentions[] = {RetentionConfig::full(96, 8),
                                        RetentionConfig::sink_window(4, 24, 5)};
  const LayerCacheConfig layers[] = {{0, nullptr}, {1, nullptr}, {1, nullptr}};
  const std::int64_t tokens = 96 + 32 + 32;
  const KvShape shape{3, 2, 32, 64};
  EXPECT_EQ((KvCache<float>(shape, retentions, layers).bytes()),
            static_cast<std::size_t>(tokens * 2 * (32 + 64) * 4));
  EXPECT_EQ((KvCache<f16>(shape, retentions, layers).bytes()),
            static_cast<std::size_t>(tokens * 2 * (32 + 64) * 2));
  EXPECT_EQ((KvCache<bf16, float>(shape, retentions, layers).bytes()),
            static_cast<std::size_t>(tokens * 2 * (32 * 2 + 64 * 4)));
  // Elsewhere a layer is rounded up, by less than 64 elements.
  const KvShape odd{3, 1, 5, 3};
  const std::size_t exact = static_cast<std::size_t>(tokens * (5 + 3) * 4);
  const std::size_t bytes = KvCache<float>(odd, retentions, layers).bytes();
  EXPECT_GE(bytes, exact);
  EXPECT_LT(bytes, exact + 3 * 2 * 64 * 4);
}

TEST(KvCacheMemory, LayersDoNotOverlap) {
  Fixture<float, float> f(RetentionConfig::full(13, 13), RetentionConfig::window(7, 7));
  f.append(7);
  f.cache.commit();
  f.append(6);
  // All layers, read after all were written.
  for (std::int64_t layer = 0; layer < 3; ++layer) f.expect_rows(layer, 6);
  for (std::int64_t layer = 0; layer < 3; ++layer)
    for (const auto& segment : f.segments(layer, 6)) EXPECT_EQ(segment.rule.kind, TokenKind::kText);
}

TEST(KvCacheConfiguration, ErrorsNameFieldExpectedAndFound) {
  const Rotary rotary({.head_dim = 8, .rotary_dim = 8});
  const RetentionConfig retention = RetentionConfig::full(8, 4);
  struct Case {
    KvShape shape;
    std::vector<RetentionConfig> retentions;
    std::vector<LayerCacheConfig> layers;
    ErrorCode code;
    std::string field;
    std::string expected;
    std::string found;
  };
  const std::vector<LayerCacheConfig> two{{0, nullptr}, {0, nullptr}};
  const Case cases[] = {
      {{0, 1, 8, 8}, {retention}, {}, ErrorCode::kShape, "num_layers", "at least 1", "0"},
      {{2, 0, 8, 8}, {retention}, two, ErrorCode::kShape, "num_kv_heads", "at least 1", "0"},
      {{2, 1, -1, 8}, {retention}, two, ErrorCode::kShape, "head_dim", "at least 1", "-1"},
      {{2, 1, 8, 0}, {retention}, two, ErrorCode::kShape, "value_dim", "at least 1", "0"},
      {{3, 1, 8, 8}, {retention}, two, ErrorCode::kShape, "layers", "3 entries", "2"},
      {{2, 1, 8, 8}, {}, two, ErrorCode::kShape, "retentions", "at least one", "0"},
      {{2, 1, 8, 8},
       {retention},
       {{0, nullptr}, {1, nullptr}},
       ErrorCode::kShape,
       "layer retention",
       "below 1",
       "1"},
      {{2, 1, 8, 8},
       {retention},
       {{0, nullptr}, {-1, nullptr}},
       ErrorCode::kShape,
       "layer retention",
       "below 1",
       "-1"},
      {{2, 1, 16, 8},
       {retention},
       {{0, nullptr}, {0, &rotary}},
       ErrorCode::kShape,
       "rotary head_dim",
       "16",
       "8"},
      {{2, 1, 8, 8},
       {RetentionConfig::window(0, 1)},
       two,
       ErrorCode::kConfig,
       "capacity",
       "1 to 2^40",
       "0"},
      // A product that wraps round 2^64 must not become a small buffer.
      {{2, std::int64_t{1} << 40, std::int64_t{1} << 20, 8},
       {retention},
       two,
       ErrorCode::kShape,
       "head_dim",
       "at most 2^50 elements in a layer",
       "1048576"},
      {{2, 1, 8, std::int64_t{1} << 60},
       {retention},
       two,
       ErrorCode::kShape,
       "value_dim",
       "at most 2^50 elements in a layer",
       std::to_string(std::int64_t{1} << 60)},
  };
  for (const Case& c : cases) {
    const auto error = error_of([&] { KvCache<float>(c.shape, c.retentions, c.layers); });
    ASSERT_TRUE(error) << c.field;
    EXPECT_EQ(error->code(), c.code) << error->what();
    EXPECT_EQ(error->detail().field, c.field) << error->what();
    EXPECT_EQ(error->detail().expected, c.expected) << error->what();
    EXPECT_EQ(error->detail().found, c.found) << error->what();
  }
}

TEST(KvCacheAccess, SaysHowLayersAreKept) {
  Fixture<float, float> f(RetentionConfig::full(13, 13), RetentionConfig::window(7, 7));
  EXPECT_EQ(f.cache.rotary(0), &f.global_rotary);
  EXPECT_EQ(f.cache.rotary(1), &f.local_rotary);
  EXPECT_EQ(f.cache.rotary(2), nullptr);
  EXPECT_EQ(f.cache.retention(0).config().capacity, 13);
  EXPECT_EQ(f.cache.retention(1).window(), 7);
  EXPECT_EQ(&f.cache.retention(0), &f.cache.retention(2));
  EXPECT_EQ(f.cache.shape().value_dim, kValueDim);
  EXPECT_EQ(f.cache.retentions().size(), 2U);
}

}  // namespace SLUICE_TEST_UNIT
