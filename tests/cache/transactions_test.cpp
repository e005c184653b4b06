// SPDX-License-Identifier: MIT
// Transactions of caches against a list: what a query sees after any sequence of operations is what
// the documentation says of a plain list of tokens, rows and positions included.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/paged_kv_cache.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::between;

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 4;
constexpr std::int64_t kChunk = 6;

/// A token's row in a layer and head: its number and where it is.
std::array<float, kDim> row_of(std::int64_t number, std::int64_t layer, std::int64_t head,
                               bool value) {
  return {static_cast<float>(number), static_cast<float>(layer), static_cast<float>(head),
          value ? 1.0F : 0.0F};
}

/// Whether a stored row, scales included, is what `row` becomes as such elements.
template <class T>
bool holds(const T* stored, const typename KvRow<T>::Scale* scales,
           const std::array<float, kDim>& row) {
  std::array<T, kDim> codes{};
  std::array<typename KvRow<T>::Scale, 1> expected{};
  KvRow<T>::quantise(row.data(), kDim, codes.data(), expected.data());
  return std::memcmp(stored, codes.data(), sizeof(T) * KvRow<T>::stored(kDim)) == 0 &&
         (KvRow<T>::scales(kDim) == 0 ||
          std::memcmp(scales, expected.data(), sizeof(expected)) == 0);
}

/// A cache beside the list of what was appended, each token with a number of its own.
template <class Cache>
struct Stream {
  Cache cache;
  std::int64_t layers;
  std::vector<std::int64_t> numbers;  // of tokens 0 .. total - 1
  std::int64_t committed = 0;

  void append(std::int64_t tokens, std::int64_t& next) {
    cache.append(tokens);
    std::vector<std::int64_t> fresh;
    for (std::int64_t i = 0; i < tokens; ++i) fresh.push_back(next++);
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      std::vector<float> keys;
      std::vector<float> values;
      for (const std::int64_t number : fresh)
        for (std::int64_t head = 0; head < kHeads; ++head) {
          const auto key = row_of(number, layer, head, false);
          const auto value = row_of(number, layer, head, true);
          keys.insert(keys.end(), key.begin(), key.end());
          values.insert(values.end(), value.begin(), value.end());
        }
      cache.store(layer, {keys.data(), tokens, kHeads, kDim}, {values.data(), tokens, kHeads, kDim},
                  nullptr, 0, tokens);
    }
    numbers.insert(numbers.end(), fresh.begin(), fresh.end());
  }

  void expect_agreement() const {
    const auto total = static_cast<std::int64_t>(numbers.size());
    ASSERT_EQ(cache.total(), total);
    const std::int64_t queries = total - committed;
    for (std::int64_t layer = 0; layer < layers; ++layer) {
      const Retention& retention = cache.retention(layer);
      const std::int64_t sinks = retention.config().num_sink_tokens;
      const std::int64_t oldest =
          retention.window() >= kUnlimitedWindow ? 0 : total - queries - (retention.window() - 1);
      std::vector<std::int64_t> expected;
      for (std::int64_t i = 0; i < total; ++i)
        if (i < sinks || i >= oldest) expected.push_back(i);
      std::vector<std::int64_t> found;
      std::array<typename Cache::SegmentType, static_cast<std::size_t>(Cache::kMaxSegments)> seen;
      const int count = cache.segments(layer, queries, seen);
      for (int s = 0; s < count; ++s) {
        const auto& segment = seen[static_cast<std::size_t>(s)];
        for (std::int64_t i = 0; i < segment.rule.count; ++i) {
          const std::int64_t token = segment.rule.first_index + i;
          found.push_back(token);
          ASSERT_EQ(segment.rule.first_position + static_cast<Position>(i),
                    cache.write_position(token));
          for (std::int64_t head = 0; head < kHeads; ++head) {
            const auto key = row_of(numbers[static_cast<std::size_t>(token)], layer, head, false);
            const auto value = row_of(numbers[static_cast<std::size_t>(token)], layer, head, true);
            ASSERT_TRUE(holds(segment.key(head, i), segment.key_scale(head, i), key))
                << "layer " << layer << " token " << token;
            ASSERT_TRUE(holds(segment.value(head, i), segment.value_scale(head, i), value));
          }
        }
      }
      ASSERT_EQ(found, expected) << "layer " << layer;
    }
  }
};

template <class Cache>
struct Held {
  typename Cache::Checkpoint checkpoint;
  std::vector<std::int64_t> numbers;
  std::int64_t max_truncate;
};

/// 400 random operations on two streams, one of which is now and then made a fork of the other.
template <class Make>
void random_operations(Make&& make, std::int64_t layers, std::int64_t most, std::uint64_t seed) {
  using Cache = decltype(make());
  Random random(seed);
  std::int64_t next = 1;
  std::array<Stream<Cache>, 2> streams{Stream<Cache>{make(), layers, {}},
                                       Stream<Cache>{make(), layers, {}}};
  std::array<std::vector<Held<Cache>>, 2> held;
  const auto taken_back = [&](std::size_t which) {
    std::erase_if(held[which], [&](const Held<Cache>& h) {
      return h.checkpoint.total() > streams[which].committed;
    });
  };
  for (int step = 0; step < 400; ++step) {
    const std::size_t which = random.below(2);
    Stream<Cache>& stream = streams[which];
    Cache& cache = stream.cache;
    const std::int64_t open = cache.total() - stream.committed;
    const auto resize = [&](std::int64_t length) {
      stream.numbers.resize(static_cast<std::size_t>(length));
      stream.committed = std::min(stream.committed, length);
      taken_back(which);
    };
    switch (random.below(9)) {
      case 0:
      case 1:
      case 2: {
        const std::int64_t tokens = between(random, 1, kChunk);
        if (cache.total() + tokens <= most && cache.status(tokens) == CacheStatus::kOk)
          stream.append(tokens, next);
        break;
      }
      case 3:
        cache.commit();
        stream.committed = cache.total();
        break;
      case 4:
        cache.rollback();
        resize(stream.committed);
        break;
      case 5: {
        const std::int64_t tokens = between(random, 0, cache.max_truncate());
        cache.truncate(tokens);
        resize(static_cast<std::int64_t>(stream.numbers.size()) - tokens);
        break;
      }
      case 6: {
        if (open == 0) {
          Held<Cache> h{cache.make_checkpoint(), stream.numbers, cache.max_truncate()};
          cache.capture(h.checkpoint);
          held[which].push_back(std::move(h));
          break;
        }
        // A path through a draft: any ascending choice of the open tokens.
        std::vector<std::int64_t> path;
        std::vector<std::int64_t> kept(stream.numbers.begin(),
                                       stream.numbers.end() - static_cast<std::ptrdiff_t>(open));
        for (std::int64_t i = 0; i < open; ++i)
          if (random.below(2) == 0) {
            path.push_back(i);
            kept.push_back(
                stream.numbers[stream.numbers.size() - static_cast<std::size_t>(open - i)]);
          }
        cache.keep_path(open, path);
        stream.numbers = kept;
        break;
      }
      case 7: {
        if (held[which].empty()) break;
        cache.rollback();
        const Held<Cache>& h = held[which][random.below(held[which].size())];
        cache.revert(h.checkpoint);
        stream.numbers = h.numbers;
        stream.committed = cache.total();
        ASSERT_EQ(cache.max_truncate(), h.max_truncate);
        taken_back(which);
        break;
      }
      default: {
        if (open > 0) break;
        Stream<Cache>& child = streams[1 - which];
        child.cache.rollback();
        child.cache.copy_from(cache);
        child.numbers = stream.numbers;
        child.committed = stream.committed;
        held[1 - which].clear();
      }
    }
    for (const Stream<Cache>& checked : streams) checked.expect_agreement();
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(CacheTransactions, AgreeWithAListOfTokens) {
  const std::vector<LayerCacheConfig> layers{{0, nullptr}, {1, nullptr}, {0, nullptr}};
  const KvShape shape{3, kHeads, kDim, kDim};
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    std::vector<RetentionConfig> configs{RetentionConfig::sink_window(2, 11, kChunk),
                                         RetentionConfig::window(6, kChunk)};
    if (seed % 3 == 1) configs[0] = RetentionConfig::full(300, kChunk);
    if (seed % 3 == 2) configs[0].capacity += 9;  // room for longer truncations
    random_operations([&] { return KvCache<float>(shape, configs, layers); }, 3,
                      seed % 3 == 1 ? 300 : 100000, seed);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

// Rows and their scales move together.
TEST(CacheTransactions, AgreeWithAListOfTokensWhereRowsAreQuantised) {
  const std::vector<LayerCacheConfig> layers{{0, nullptr}, {1, nullptr}};
  const KvShape shape{2, kHeads, kDim, kDim};
  const std::vector<RetentionConfig> configs{RetentionConfig::sink_window(2, 11, kChunk),
                                             RetentionConfig::full(300, kChunk)};
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    random_operations([&] { return KvCache<std::int8_t, int4x2>(shape, configs, layers); }, 2, 300,
                      seed);
    if (HasFatalFailure()) FAIL() << "int8 and int4, seed " << seed;
    random_operations([&] { return KvCache<int4x2, fp8_e4m3>(shape, configs, layers); }, 2, 300,
                      seed);
    if (HasFatalFailure()) FAIL() << "int4 and fp8, seed " << seed;
  }
}

TEST(CacheTransactions, AgreeWithAListOfTokensInPages) {
  const std::vector<const Rotary*> rotaries(2, nullptr);
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const auto size = static_cast<std::int64_t>(1 + seed);
    const auto store = std::make_shared<PageStore<float>>(KvShape{2, kHeads, kDim, kDim}, rotaries,
                                                          400 / size, size);
    random_operations([&] { return PagedKvCache<float>(store, 150, kChunk); }, 2, 150, seed);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
    EXPECT_EQ(store->pool().free_pages(), store->pool().num_pages());  // nothing leaks
  }
}

/// Random rows for a stream, in the caches that shall hold the same.
struct Rows {
  Rows(Random& random, std::int64_t tokens, std::int64_t dim)
      : tokens_(tokens), dim_(dim), values(static_cast<std::size_t>(tokens * kHeads * dim)) {
    for (float& value : values) value = static_cast<float>(random.normal());
  }
  HeadsView<const float> view(std::int64_t first, std::int64_t count) const {
    return {values.data() + first * kHeads * dim_, count, kHeads, dim_};
  }
  std::int64_t tokens_;
  std::int64_t dim_;
  std::vector<float> values;
};

/// The worst difference, over decoding and prefill steps, between attention over a paged cache
/// whose pages lie scattered, `together` in a row, and over a KvCache with the same keys.
double paged_difference(std::int64_t page_size, std::int64_t together, std::int64_t tokens,
                        int& runs) {
  constexpr std::int64_t kHeadDim = 16;
  constexpr std::int64_t kStep = 7;
  Random random(3);
  ThreadTeam team(1);
  const Rotary rotary({.head_dim = kHeadDim, .rotary_dim = kHeadDim});
  const KvShape shape{1, kHeads, kHeadDim, kHeadDim};
  const std::vector<const Rotary*> rotaries{&rotary};
  // Every (together + 1)-th page is someone else's.
  const std::int64_t pages = (tokens / page_size + 1) * (together + 1) / together + 1;
  const auto store = std::make_shared<PageStore<f16>>(shape, rotaries, pages, page_size);
  for (std::int64_t page = 0; page < pages; ++page)
    store->pool().acquire(static_cast<std::int32_t>(page) - 1);
  for (std::int64_t page = 0; page < pages; ++page)
    if (page % (together + 1) != together) store->pool().release(static_cast<std::int32_t>(page));
  PagedKvCache<f16> paged(store, tokens, kStep);
  const RetentionConfig config = RetentionConfig::full(tokens, kStep);
  const LayerCacheConfig layer{0, &rotary};
  KvCache<f16> plain(shape, {&config, 1}, {&layer, 1});
  AttentionWorkspace<cpu> workspace(&rotary,
                                    {.num_qo_heads = 2 * kHeads,
                                     .num_kv_heads = kHeads,
                                     .head_dim = kHeadDim,
                                     .value_dim = kHeadDim,
                                     .max_queries = kStep,
                                     .max_keys = tokens,
                                     .max_segments = PagedKvCache<f16>::kMaxSegments},
                                    1);
  const Rows keys(random, tokens, kHeadDim);
  const Rows values(random, tokens, kHeadDim);
  RotaryTable rotation(rotary, kStep);
  double worst = 0;
  for (std::int64_t fed = 0; fed < tokens;) {
    const std::int64_t count = std::min(random.below(2) == 0 ? 1 : kStep, tokens - fed);
    rotation.fill_run(static_cast<Position>(fed), count);
    const auto feed = [&](auto& cache) {
      cache.append(count);
      cache.store(0, keys.view(fed, count), values.view(fed, count), rotation.rows(), 0, count);
    };
    feed(plain);
    feed(paged);
    std::vector<float> query(static_cast<std::size_t>(count * 2 * kHeads * kHeadDim));
    for (float& value : query) value = static_cast<float>(random.normal());
    std::vector<float> expected(query.size());
    std::vector<float> found(query.size());
    const auto look = [&](const auto& cache, std::vector<float>& out) {
      using Cache = std::remove_cvref_t<decltype(cache)>;
      std::array<Segment<f16>, static_cast<std::size_t>(Cache::kMaxSegments)> segments;
      const int seen = cache.segments(0, count, segments);
      attend(
          AttentionQuery{
              {query.data(), count, 2 * kHeads, kHeadDim}, fed, static_cast<Position>(fed)},
          std::span<const Segment<f16>>(segments.data(), static_cast<std::size_t>(seen)),
          AttentionVariant<>{0.25F}, {out.data(), count, 2 * kHeads, kHeadDim}, nullptr, workspace,
          team, cpu{});
      return seen;
    };
    look(plain, expected);
    runs = look(paged, found);
    for (std::size_t i = 0; i < found.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(found[i] - expected[i])));
    plain.commit();
    paged.commit();
    fed += count;
  }
  return worst;
}

// Pages as wide as the kernels' cut of keys give the bits of a contiguous cache wherever they lie;
// small ones group the same sums otherwise: outputs of about 1 from up to 3000 products in float32.
TEST(PagedAttention, EqualsContiguousAttention) {
  int runs = 0;
  EXPECT_EQ(paged_difference(256, 1, 3000, runs), 0.0);
  EXPECT_EQ(runs, 12);
  const double small = paged_difference(16, 4, 1500, runs);
  EXPECT_GE(runs, 20);
  EXPECT_LT(small, 2e-6);
}

TEST(PagedKvCache, RestoresWhatItSavedAndNothingElse) {
  const std::vector<const Rotary*> rotaries(2, nullptr);
  const KvShape shape{2, kHeads, kDim, kDim};
  const auto store = std::make_shared<PageStore<float>>(shape, rotaries, 20, 4);
  Stream<PagedKvCache<float>> stream{PagedKvCache<float>(store, 60, kChunk), 2, {}};
  std::int64_t next = 1;
  for (int i = 0; i < 4; ++i) {
    stream.append(5, next);
    stream.cache.commit();
  }
  stream.committed = 20;
  ByteWriter writer;
  stream.cache.save(writer);
  Stream<PagedKvCache<float>> other{stream.cache.sibling(), 2, stream.numbers, 20};
  ByteReader reader(writer.bytes());
  other.cache.restore(reader);
  reader.expect_end();
  other.expect_agreement();
  // Cut anywhere, it is an error, and the cache is empty.
  for (const std::size_t size : {std::size_t{0}, std::size_t{90}, writer.size() - 1}) {
    ByteReader cut(writer.bytes().first(size));
    const auto error = test::error_of([&] { other.cache.restore(cut); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
    EXPECT_EQ(other.cache.total(), 0);
  }
  const auto small = std::make_shared<PageStore<float>>(shape, rotaries, 4, 4);
  PagedKvCache<float> tight(small, 60, kChunk);
  ByteReader again(writer.bytes());
  EXPECT_EQ(test::error_of([&] { tight.restore(again); })->code(), ErrorCode::kCapacity);
}

TEST(PageStore, RefusesExtentsThatMakeNoSense) {
  const Rotary rotary({.head_dim = 8, .rotary_dim = 8});
  const std::vector<const Rotary*> two(2, nullptr);
  const std::vector<const Rotary*> wide{&rotary};
  const auto field_of = [](const KvShape& shape, std::span<const Rotary* const> rotaries) {
    const auto error = test::error_of([&] { PageStore<float> store(shape, rotaries, 4, 4); });
    return error ? error->detail().field : "none";
  };
  EXPECT_EQ(field_of({0, 1, 4, 4}, two), "num_layers");
  EXPECT_EQ(field_of({2, 0, 4, 4}, two), "num_kv_heads");
  EXPECT_EQ(field_of({2, 1, 0, 4}, two), "head_dim");
  EXPECT_EQ(field_of({2, 1, 4, -1}, two), "value_dim");
  EXPECT_EQ(field_of({1, 1, 4, 4}, two), "rotaries");
  EXPECT_EQ(field_of({1, 1, 4, 4}, wide), "rotary head_dim");
  EXPECT_EQ(field_of({2, std::int64_t{1} << 48, 4, 4}, two), "elements");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
