// SPDX-License-Identifier: MIT
#include "sluice/cache/group.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/view.hpp"
#include "sluice/position/position.hpp"
#include "sluice/position/rotary.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::CacheStatus;
using sluice::contiguous_views;
using sluice::Error;
using sluice::ErrorCode;
using sluice::Group;
using sluice::GroupSet;
using sluice::GroupView;
using sluice::HeadsView;
using sluice::KeyForm;
using sluice::kNoCeiling;
using sluice::KvCache;
using sluice::LayerCacheConfig;
using sluice::OrderedGroup;
using sluice::Position;
using sluice::PositionRule;
using sluice::Random;
using sluice::ReaderPlace;
using sluice::Retention;
using sluice::RetentionConfig;
using sluice::Rotary;
using sluice::Segment;
using sluice::SegmentRule;
using sluice::TokenKind;

using Indices = std::vector<std::int64_t>;

using sluice::test::between;
using sluice::test::error_of;

// ---- What a snapshot shows: a naive model
// ---------------------------------------------------------

/// The keys that token n - 1 saw, its own included, oldest first: element r has rank r.
Indices seen_by(const RetentionConfig& config, std::int64_t n) {
  Indices seen;
  for (std::int64_t i = 0; i < n; ++i)
    if (i < config.num_sink_tokens || i > n - 1 - config.window_size) seen.push_back(i);
  return seen;
}

/// Where each of them stands in the group's own numbering.
std::vector<Position> places_of(const RetentionConfig& config, const Indices& seen) {
  std::vector<Position> places;
  for (std::size_t rank = 0; rank < seen.size(); ++rank)
    places.push_back(config.origin +
                     static_cast<Position>(config.position_rule == PositionRule::kInCache
                                               ? static_cast<std::int64_t>(rank)
                                               : seen[rank]));
  return places;
}

/// Where token i stands when it reads.
Position reads_at(const RetentionConfig& config, std::int64_t i) {
  return places_of(config, seen_by(config, i + 1)).back();
}

/// A snapshot's rules, key by key: index, distance from a reader, slot.
struct Shown {
  Indices indices;
  std::vector<Position> distances;
  Indices slots;
};

Shown shown(const Retention& retention, std::int64_t snapshot, const ReaderPlace& place,
            Position reader) {
  std::array<SegmentRule, Retention::kMaxSegments> rules;
  const int count = retention.snapshot_rules(snapshot, place, rules);
  EXPECT_LE(count, 3) << "sinks and two runs of a ring";
  Shown result;
  for (int r = 0; r < count; ++r) {
    const SegmentRule& rule = rules[static_cast<std::size_t>(r)];
    EXPECT_GT(rule.count, 0);
    EXPECT_EQ(rule.visible, rule.count);
    const bool sink = rule.first_index < retention.config().num_sink_tokens;
    EXPECT_EQ(rule.kind, sink ? TokenKind::kPinned : TokenKind::kText);
    for (std::int64_t i = 0; i < rule.count; ++i) {
      result.indices.push_back(rule.first_index + i);
      result.distances.push_back(rule.reader_position(reader) -
                                 (rule.first_position + static_cast<Position>(i)));
      result.slots.push_back(rule.first_slot + i);
    }
  }
  return result;
}

RetentionConfig random_config(Random& random) {
  const std::int64_t window = between(random, 1, 9);
  RetentionConfig config;
  switch (random.below(4)) {
    case 0: config = RetentionConfig::full(between(random, 30, 40), between(random, 1, 8)); break;
    case 1: config = RetentionConfig::window(window, between(random, 1, window)); break;
    default:
      config =
          RetentionConfig::sink_window(between(random, 0, 4), window, between(random, 1, window));
      if (random.below(2) == 0) config.capacity += between(random, 1, 12);  // a lead
  }
  config.position_rule = random.below(2) == 0 ? PositionRule::kInCache : PositionRule::kInText;
  config.key_form = random.below(2) == 0 ? KeyForm::kRotated : KeyForm::kRaw;
  config.origin = static_cast<Position>(between(random, -8, 80)) / 4;
  return config;
}

TEST(SnapshotRules, ShowWhatTheLastTokenOfTheSnapshotSaw) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const RetentionConfig config = random_config(random);
    const RetentionConfig reader_config = random_config(random);
    Retention retention(config);
    const ReaderPlace own = Retention(reader_config).reader_place();
    for (std::int64_t n = 0; n <= 30; ++n) {
      const Indices seen = seen_by(config, n);
      const std::vector<Position> places = places_of(config, seen);
      // In the text, what has gone leaves gaps behind.
      EXPECT_EQ(retention.ranks(n), config.position_rule == PositionRule::kInCache
                                        ? static_cast<std::int64_t>(seen.size())
                                        : n);
      for (const Position shift : {0.0, -3.5, 12.25}) {
        // Readers of every age; one that has long filled its window has nearly no limit.
        for (const std::int64_t i : {std::int64_t{0}, between(random, 0, 20), std::int64_t{1000}}) {
          const Position reader = reader_config.origin + static_cast<Position>(i);
          const Shown found = shown(retention, n, {own.shift + shift, own.ceiling + shift}, reader);
          ASSERT_EQ(found.indices, seen);
          for (std::size_t rank = 0; rank < seen.size(); ++rank)
            ASSERT_EQ(found.distances[rank], reads_at(reader_config, i) + shift - places[rank])
                << "snapshot " << n << ", reader " << i << ", key " << seen[rank];
        }
      }
      // The same answer whatever the writer did meanwhile.
      const Shown now = shown(retention, n, own, 7);
      const Shown before = shown(Retention(config), n, own, 7);
      EXPECT_EQ(now.slots, before.slots);
      EXPECT_EQ(now.distances, before.distances);
      if (retention.status(1) != CacheStatus::kOk) break;
      retention.append(1);
      retention.commit();
    }
  }
}

// The token that is appended as number n sees through rules() what a reader of snapshot n sees.
TEST(SnapshotRules, AgreeWithWhatTheStreamItselfSees) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const RetentionConfig config = random_config(random);
    Retention retention(config);
    for (std::int64_t n = 1; n <= 30 && retention.status(1) == CacheStatus::kOk; ++n) {
      retention.append(1);
      std::array<SegmentRule, Retention::kMaxSegments> rules;
      const int count = retention.rules(1, rules);
      const Position reader = retention.write_position(n - 1);
      Shown own;
      for (int r = 0; r < count; ++r)
        for (std::int64_t i = 0; i < rules[static_cast<std::size_t>(r)].count; ++i) {
          const SegmentRule& rule = rules[static_cast<std::size_t>(r)];
          own.indices.push_back(rule.first_index + i);
          own.distances.push_back(rule.reader_position(reader) -
                                  (rule.first_position + static_cast<Position>(i)));
          own.slots.push_back(rule.first_slot + i);
        }
      const Shown other = shown(retention, n, retention.reader_place(), reader);
      ASSERT_EQ(other.indices, own.indices) << n;
      ASSERT_EQ(other.slots, own.slots) << n;
      ASSERT_EQ(other.distances, own.distances) << n;
      retention.commit();
    }
  }
}

TEST(SnapshotRules, WithoutAWindowNothingIsClamped) {
  RetentionConfig config = RetentionConfig::full(20, 4);
  config.position_rule = PositionRule::kInCache;
  EXPECT_EQ(Retention(config).reader_place().ceiling, kNoCeiling);
  EXPECT_EQ(Retention(config).max_lead(), 20);
  config = RetentionConfig::sink_window(2, 5, 3);
  EXPECT_EQ(Retention(config).reader_place().ceiling, 6);
  EXPECT_EQ(Retention(config).max_lead(), 2);
  config.origin = 0.5;
  EXPECT_EQ(Retention(config).reader_place().ceiling, 6.5);
  config.position_rule = PositionRule::kInText;
  EXPECT_EQ(Retention(config).reader_place().ceiling, kNoCeiling);
  const Retention on_request(RetentionConfig::on_request(2, 5, 10));
  EXPECT_FALSE(on_request.supports_snapshots());
  EXPECT_EQ(on_request.reader_place().ceiling, kNoCeiling);
}

// ---- Rows ---------------------------------------------------------------------------------------

constexpr std::int64_t kDim = 4;

/// A cache of keys without rotation whose rows say which token of which layer they are.
class Numbered {
 public:
  Numbered(const std::vector<RetentionConfig>& retentions, std::int64_t layers) {
    std::vector<LayerCacheConfig> configs;
    for (std::int64_t layer = 0; layer < layers; ++layer)
      configs.push_back({static_cast<int>(layer) % static_cast<int>(retentions.size()), nullptr});
    cache_ = std::make_unique<KvCache<float>>(sluice::KvShape{layers, 1, kDim, kDim}, retentions,
                                              configs);
  }

  KvCache<float>& cache() { return *cache_; }

  static void write(KvCache<float>& cache, std::int64_t tokens) {
    ASSERT_EQ(cache.status(tokens), CacheStatus::kOk);
    const std::int64_t first = cache.total();
    cache.append(tokens);
    for (std::int64_t layer = 0; layer < cache.shape().num_layers; ++layer) {
      std::vector<float> keys;
      std::vector<float> values;
      for (std::int64_t t = 0; t < tokens; ++t) {
        keys.insert(keys.end(), kDim, key_of(layer, first + t));
        values.insert(values.end(), kDim, -key_of(layer, first + t));
      }
      cache.store(layer, HeadsView<const float>(keys.data(), tokens, 1, kDim),
                  HeadsView<const float>(values.data(), tokens, 1, kDim), nullptr, 0, tokens);
    }
    cache.commit();
  }

  /// Tokens of a snapshot whose rows are not what was written.
  static std::int64_t lost(const KvCache<float>& cache, std::int64_t snapshot) {
    std::int64_t wrong = 0;
    for (std::int64_t layer = 0; layer < cache.shape().num_layers; ++layer) {
      std::array<Segment<float>, KvCache<float>::kMaxSegments> segments;
      const int count = cache.snapshot_segments(layer, snapshot, {}, segments);
      for (int s = 0; s < count; ++s) {
        const Segment<float>& segment = segments[static_cast<std::size_t>(s)];
        for (std::int64_t i = 0; i < segment.rule.visible; ++i) {
          const float expected = key_of(layer, segment.rule.first_index + i);
          bool good = true;
          for (std::int64_t d = 0; d < kDim; ++d)
            good = good && segment.key(0, i)[d] == expected && segment.value(0, i)[d] == -expected;
          wrong += good ? 0 : 1;
        }
      }
    }
    return wrong;
  }

 private:
  static float key_of(std::int64_t layer, std::int64_t token) {
    return static_cast<float>(1000 * layer + token + 1);
  }

  std::unique_ptr<KvCache<float>> cache_;
};

TEST(SnapshotSegments, RowsStayUntilTheLeadIsSpent) {
  std::int64_t tight = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    std::vector<RetentionConfig> retentions{random_config(random)};
    if (random.below(2) == 0) {  // local layers beside
      const std::int64_t window = between(random, 1, 4);
      retentions.push_back(RetentionConfig::window(window, between(random, 1, window)));
      retentions.back().origin = retentions.front().origin;
      retentions.back().capacity += between(random, 0, 5);
    }
    Numbered numbered(retentions, 2);
    KvCache<float>& cache = numbered.cache();
    const std::int64_t lead = retentions.size() == 1 ? cache.retentions()[0].max_lead()
                                                     : std::min(cache.retentions()[0].max_lead(),
                                                                cache.retentions()[1].max_lead());
    EXPECT_EQ(cache.max_lead(), lead);
    for (int step = 0; step < 40; ++step) {
      const std::int64_t tokens = between(random, 1, cache.max_chunk());
      if (cache.status(tokens) != CacheStatus::kOk) break;
      Numbered::write(cache, tokens);
      for (std::int64_t n = std::max<std::int64_t>(0, cache.total() - lead); n <= cache.total();
           ++n)
        ASSERT_EQ(Numbered::lost(cache, n), 0) << "snapshot " << n << " of " << cache.total();
      // One more would be too many as soon as the snapshot's oldest row goes round.
      const std::int64_t n = cache.total() - lead - 1;
      if (retentions.size() == 1 && retentions[0].window_size < 100 &&
          n >= retentions[0].num_sink_tokens + retentions[0].window_size) {
        EXPECT_GT(Numbered::lost(cache, n), 0) << "max_lead() is larger than it says";
        ++tight;
      }
    }
    EXPECT_EQ(cache.bytes_moved(), 0);
  }
  EXPECT_GT(tight, 1000);
}

TEST(SnapshotSegments, RawKeysCarryTheRotationOfTheirRanks) {
  const Rotary rotary({.head_dim = kDim, .rotary_dim = kDim, .theta = 100});
  RetentionConfig config = RetentionConfig::sink_window(1, 3, 1);
  config.key_form = KeyForm::kRaw;
  config.capacity += 2;
  for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
    config.position_rule = rule;
    const LayerCacheConfig layer{0, &rotary};
    KvCache<float> cache({1, 1, kDim, kDim}, {&config, 1}, {&layer, 1});
    for (std::int64_t n = 0; n < 30; ++n) {
      std::array<Segment<float>, KvCache<float>::kMaxSegments> segments;
      const int count = cache.snapshot_segments(0, n, {}, segments);
      std::int64_t rank = 0;
      for (int s = 0; s < count; ++s) {
        const Segment<float>& segment = segments[static_cast<std::size_t>(s)];
        ASSERT_NE(segment.key_rotation, nullptr);
        for (std::int64_t i = 0; i < segment.rule.count; ++i, ++rank) {
          // Numbered from 0, however long the text is: a small table serves for ever.
          ASSERT_EQ(segment.rule.first_position + static_cast<Position>(i),
                    static_cast<Position>(rank));
          std::array<float, kDim> expected{};
          rotary.angles(static_cast<Position>(rank), expected.data());
          const float* found = segment.key_rotation + i * segment.key_rotation_stride;
          ASSERT_TRUE(std::equal(expected.begin(), expected.end(), found)) << "rank " << rank;
        }
      }
      ASSERT_EQ(rank, std::min<std::int64_t>(n, 4));
      if (cache.status(1) == CacheStatus::kOk) cache.append(1);
      cache.commit();
    }
  }
}

TEST(KvCacheOfAGroup, SaysWhichPositionsItTakes) {
  const auto takes = [](std::vector<RetentionConfig> retentions) {
    std::vector<LayerCacheConfig> layers(2);
    layers[1].retention = static_cast<int>(retentions.size()) - 1;
    return KvCache<float>({2, 1, kDim, kDim}, retentions, layers).takes_positions();
  };
  RetentionConfig full = RetentionConfig::full(8, 2);
  RetentionConfig window = RetentionConfig::window(4, 2);
  EXPECT_TRUE(takes({full}));  // ranks are places in the text
  EXPECT_FALSE(takes({window}));
  window.position_rule = PositionRule::kInText;
  EXPECT_TRUE(takes({window}));
  EXPECT_TRUE(takes({full, window}));
  window.position_rule = PositionRule::kInCache;
  EXPECT_FALSE(takes({full, window}));
  full.key_form = KeyForm::kRaw;
  EXPECT_FALSE(takes({full}));

  full.origin = 17.25;
  const LayerCacheConfig layer;
  const KvCache<float> cache({1, 1, kDim, kDim}, {&full, 1}, {&layer, 1});
  EXPECT_EQ(cache.write_position(0), 17.25);
  EXPECT_EQ(cache.write_position(3), 20.25);

  // Retentions may have origins of their own: the first one's is meant.
  const std::array<RetentionConfig, 2> apart{full, RetentionConfig::full(8, 2)};
  EXPECT_EQ(KvCache<float>({1, 1, kDim, kDim}, apart, {&layer, 1}).write_position(1), 18.25);
}

TEST(KvCacheOfAGroup, CountsTheBytesThatItMoves) {
  const std::vector<RetentionConfig> retentions{RetentionConfig::on_request(1, 20, 24)};
  Numbered numbered(retentions, 2);
  KvCache<float>& cache = numbered.cache();
  Numbered::write(cache, 12);
  cache.evict_range(1, 5);  // right behind the sinks: the ring's tail moves, no row
  EXPECT_EQ(cache.bytes_moved(), 0);
  cache.evict_range(6, 7);  // the one row behind the gap moves, in both layers
  EXPECT_EQ(cache.total(), 12);
  const std::int64_t row = 2 * 2 * kDim * static_cast<std::int64_t>(sizeof(float));
  EXPECT_EQ(cache.bytes_moved(), row);
  cache.evict_range(3, 5);  // two before, two behind
  EXPECT_EQ(cache.bytes_moved(), 3 * row);
}

// ---- Groups -------------------------------------------------------------------------------------

std::unique_ptr<Group<float>> group_of(std::string name, std::int32_t id,
                                       const std::vector<RetentionConfig>& retentions) {
  Numbered numbered(retentions, static_cast<std::int64_t>(retentions.size()));
  return std::make_unique<Group<float>>(std::move(name), id, std::move(numbered.cache()));
}

void write_and_publish(Group<float>& group, std::int64_t tokens) {
  for (; tokens > 0; --tokens) Numbered::write(group.cache(), 1);
  group.publish();
}

TEST(Group, PublishesWhatIsCommitted) {
  const auto group = group_of("source", 3, {RetentionConfig::full(20, 4)});
  EXPECT_EQ(group->name(), "source");
  EXPECT_EQ(group->id(), 3);
  EXPECT_EQ(group->published(), 0);
  Numbered::write(group->cache(), 4);
  EXPECT_EQ(group->published(), 0) << "committed, not published";
  group->publish();
  EXPECT_EQ(group->published(), 4);
  const GroupView<float> view = group->view(2, -1.5);
  EXPECT_EQ(view.cache, &group->cache());
  EXPECT_EQ(view.group, 3);
  EXPECT_EQ(view.visible, 2);
  EXPECT_EQ(view.shift, -1.5);
}

TEST(Group, RoomIsWhatTheSlowestReaderLeaves) {
  // Lead 3: sinks 1, window 4, capacity 8.
  RetentionConfig config = RetentionConfig::sink_window(1, 4, 2);
  config.capacity = 8;
  const auto group = group_of("source", 0, {config});
  EXPECT_EQ(group->room(), std::numeric_limits<std::int64_t>::max()) << "nobody reads";
  const int slow = group->open_reader();
  const int fast = group->open_reader();
  EXPECT_NE(slow, fast);
  EXPECT_EQ(group->room(), 3);
  write_and_publish(*group, 2);
  EXPECT_EQ(group->room(), 1);
  group->hold(fast, 2);
  EXPECT_EQ(group->room(), 1);
  group->hold(slow, 1);
  EXPECT_EQ(group->room(), 2);
  group->close_reader(slow);
  EXPECT_EQ(group->room(), 3);
  write_and_publish(*group, 3);
  EXPECT_EQ(group->room(), 0);
  EXPECT_EQ(Numbered::lost(group->cache(), 2), 0);
  group->hold(fast, 5);
  EXPECT_EQ(group->room(), 3);
  group->close_reader(fast);
  EXPECT_EQ(group->room(), std::numeric_limits<std::int64_t>::max());
}

TEST(Group, RoomOfAFullCacheIsItsCapacity) {
  const auto group = group_of("source", 0, {RetentionConfig::full(5, 5)});
  EXPECT_EQ(group->room(), 5);
  const int reader = group->open_reader();
  write_and_publish(*group, 4);
  EXPECT_EQ(group->room(), 1) << "readers hold nothing back";
  write_and_publish(*group, 1);
  EXPECT_EQ(group->room(), 0);
  group->hold(reader, 5);
  EXPECT_EQ(group->room(), 0);
}

TEST(Group, RoomIsTheSmallestOfTheLayers) {
  RetentionConfig local = RetentionConfig::window(2, 1);
  local.capacity = 3;  // lead 1
  RetentionConfig wide = RetentionConfig::window(6, 1);
  wide.capacity = 10;  // lead 4
  const auto group = group_of("source", 0, {wide, RetentionConfig::full(9, 1), local});
  EXPECT_EQ(group->room(), 9);
  const int reader = group->open_reader();
  EXPECT_EQ(group->room(), 1);
  for (std::int64_t n = 1; n <= 9; ++n) {
    write_and_publish(*group, 1);
    EXPECT_EQ(group->room(), 0);
    group->hold(reader, n);
    EXPECT_EQ(group->room(), n == 9 ? 0 : 1);
  }
}

TEST(Group, ResetForgetsTokensAndKeepsReaders) {
  RetentionConfig config = RetentionConfig::sink_window(1, 4, 2);
  config.capacity = 8;
  const auto group = group_of("source", 0, {config});
  const int closed = group->open_reader();
  const int open = group->open_reader();
  write_and_publish(*group, 3);
  group->hold(open, 3);
  group->close_reader(closed);
  EXPECT_EQ(group->room(), 3);
  group->reset();
  EXPECT_EQ(group->published(), 0);
  EXPECT_EQ(group->cache().total(), 0);
  EXPECT_EQ(group->room(), 3) << "the open reader holds snapshot 0";
  group->close_reader(open);
  EXPECT_EQ(group->room(), std::numeric_limits<std::int64_t>::max()) << "the closed one stays so";
}

TEST(Group, HasSoManyReaders) {
  const auto group = group_of("source", 0, {RetentionConfig::window(4, 2)});
  std::vector<bool> taken(Group<float>::kMaxReaders);
  for (int i = 0; i < Group<float>::kMaxReaders; ++i) {
    const auto reader = static_cast<std::size_t>(group->open_reader());
    ASSERT_LT(reader, taken.size());
    EXPECT_FALSE(taken[reader]);
    taken[reader] = true;
  }
  const auto error = error_of([&] { group->open_reader(); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kCapacity);
  EXPECT_EQ(error->detail().field, "source");
  EXPECT_EQ(error->detail().expected, "at most 16");
  group->close_reader(11);
  EXPECT_EQ(group->open_reader(), 11);
}

// With window + 0 slots the first token behind a snapshot would overwrite one of its rows.
TEST(Group, RefusesReadersWithoutALead) {
  const auto group = group_of("source", 0, {RetentionConfig::window(4, 1)});
  const auto error = error_of([&] { group->open_reader(); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kConfig);
  EXPECT_EQ(error->detail().field, "source lead");
}

TEST(Group, RefusesCachesThatEvictOnRequest) {
  const auto error =
      error_of([] { group_of("source", 0, {RetentionConfig::on_request(1, 4, 8)}); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kConfig);
  EXPECT_EQ(error->detail().where, "Group");
  EXPECT_EQ(error->detail().field, "source eviction");
  // Every layer counts.
  EXPECT_TRUE(
      error_of([] {
        group_of("source", 0, {RetentionConfig::full(8, 8), RetentionConfig::on_request(1, 4, 8)});
      }).has_value());
}

// A writer that goes on while others read: what they hold is never overwritten.
TEST(Group, ReadersSeeWholeRowsWhileTheWriterGoesOn) {
  constexpr std::int64_t kTokens = 3000;
  RetentionConfig config = RetentionConfig::sink_window(2, 5, 3);
  config.capacity = 2 + 5 + 4;
  const auto group = group_of("source", 0, {config, RetentionConfig::window(3, 3)});
  std::atomic<std::int64_t> lost{0};
  const std::array<int, 2> numbers{group->open_reader(), group->open_reader()};
  std::vector<std::thread> readers;
  for (const int reader : numbers)
    readers.emplace_back([&, reader] {
      for (std::int64_t held = 0; held < kTokens;) {
        const std::int64_t published = group->published();
        if (published == held) {
          std::this_thread::yield();
          continue;
        }
        held = published;
        group->hold(reader, held);
        lost += Numbered::lost(group->cache(), held);
      }
      group->close_reader(reader);
    });
  std::int64_t left = kTokens;
  while (left > 0) {
    const std::int64_t tokens = std::min({left, group->room(), std::int64_t{3}});
    if (tokens == 0) {
      std::this_thread::yield();
      continue;
    }
    Numbered::write(group->cache(), tokens);
    group->publish();
    left -= tokens;
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(lost, 0);
}

TEST(GroupSet, FindsGroupsByNameAndNumber) {
  GroupSet<float> groups;
  EXPECT_EQ(groups.size(), 0);
  const std::vector<RetentionConfig> retentions{RetentionConfig::full(4, 4)};
  Group<float>& source = groups.add(group_of("source", 0, retentions));
  Group<float>& target = groups.add(group_of("target", 1, retentions));
  EXPECT_EQ(groups.size(), 2);
  EXPECT_EQ(&groups[0], &source);
  EXPECT_EQ(&groups[1], &target);
  EXPECT_EQ(&groups["source"], &source);
  EXPECT_EQ(&groups["target"], &target);
  EXPECT_EQ(&std::as_const(groups)[1], &target);

  const auto unknown = error_of([&] { groups["tarted"]; });
  ASSERT_TRUE(unknown.has_value());
  EXPECT_EQ(unknown->code(), ErrorCode::kConfig);
  EXPECT_EQ(unknown->detail().expected, "source, target");
  EXPECT_EQ(unknown->detail().found, "tarted");

  const auto twice = error_of([&] { groups.add(group_of("source", 2, retentions)); });
  ASSERT_TRUE(twice.has_value());
  EXPECT_EQ(twice->code(), ErrorCode::kConfig);
  EXPECT_EQ(twice->detail().found, "source");

  const auto gap = error_of([&] { groups.add(group_of("third", 3, retentions)); });
  ASSERT_TRUE(gap.has_value());
  EXPECT_EQ(gap->code(), ErrorCode::kConfig);
  EXPECT_EQ(gap->detail().expected, "2");
  EXPECT_EQ(gap->detail().found, "3");
  EXPECT_EQ(groups.size(), 2) << "a refused group is not taken in";
}

// ---- One group behind the other
// -------------------------------------------------------------------

/// Tokens in the order of a reader, numbered through: what concatenating the caches would give.
struct Concatenated {
  std::vector<std::pair<std::int32_t, std::int64_t>> tokens;  // group, index

  /// The group's tokens count through the gaps in the text, and by rank in the cache.
  void add(const RetentionConfig& config, std::int32_t group, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const Indices seen = seen_by(config, n);
      if (config.position_rule == PositionRule::kInText ||
          std::find(seen.begin(), seen.end(), i) != seen.end())
        tokens.emplace_back(group, i);
    }
  }
  Position place(std::int32_t group, std::int64_t index) const {
    const auto at = std::find(tokens.begin(), tokens.end(), std::pair(group, index));
    EXPECT_NE(at, tokens.end());
    return static_cast<Position>(at - tokens.begin());
  }
};

TEST(ContiguousViews, EqualTheConcatenationInTheReadersOrder) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    GroupSet<float> groups;
    std::vector<RetentionConfig> configs;
    const std::int32_t count = 3 + static_cast<std::int32_t>(random.below(2));
    for (std::int32_t g = 0; g < count; ++g) {
      configs.push_back(random_config(random));
      groups.add(group_of("group " + std::to_string(g), g, {configs.back()}));
      write_and_publish(groups[g], between(random, 0, 25));
    }
    for (std::int32_t own = 0; own < count; ++own) {
      // Every reader has an order of its own; some do not see everybody.
      std::vector<OrderedGroup> order;
      for (std::int32_t g = 0; g < count; ++g)
        if (g == own || random.below(4) != 0)
          order.push_back({g, between(random, 0, groups[g].published())});
      for (std::size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[random.below(i)]);
      const std::int64_t own_total = groups[own].cache().total();
      const auto n_of = [&](const OrderedGroup& entry) {
        return entry.group == own ? own_total : entry.visible;
      };
      Concatenated text;
      for (const OrderedGroup& entry : order)
        text.add(configs[static_cast<std::size_t>(entry.group)], entry.group, n_of(entry));

      std::vector<GroupView<float>> views(order.size() - 1);
      ASSERT_EQ((contiguous_views<float, float>(groups, order, own, views)),
                static_cast<int>(order.size()) - 1);
      if (own_total == 0) continue;
      const RetentionConfig& reader_config = configs[static_cast<std::size_t>(own)];
      const ReaderPlace place = groups[own].cache().retentions().front().reader_place();
      const Position reader = groups[own].cache().write_position(own_total - 1);
      // The reader's newest token, as a key of its own group.
      const Position reader_place = text.place(own, own_total - 1);
      EXPECT_EQ(reads_at(reader_config, own_total - 1), std::min(reader, place.ceiling));
      std::size_t written = 0;
      for (const OrderedGroup& entry : order) {
        if (entry.group == own) continue;
        const GroupView<float>& view = views[written++];
        EXPECT_EQ(view.group, entry.group);
        EXPECT_EQ(view.visible, entry.visible);
        EXPECT_EQ(view.cache, &groups[entry.group].cache());
        const Shown found = shown(view.cache->retentions().front(), view.visible,
                                  {place.shift + view.shift, place.ceiling + view.shift}, reader);
        for (std::size_t i = 0; i < found.indices.size(); ++i)
          ASSERT_EQ(found.distances[i], reader_place - text.place(entry.group, found.indices[i]))
              << "reader " << own << ", token " << found.indices[i] << " of group " << entry.group;
      }
    }
  }
}

// Hogwild! Inference: prompt, the other worker, the own tokens, for both workers at once.
TEST(ContiguousViews, TwoWorkersAndAPrompt) {
  GroupSet<float> groups;
  const std::vector<RetentionConfig> retentions{RetentionConfig::full(40, 4)};
  const char* names[] = {"prompt", "one", "two"};
  const std::int64_t sizes[] = {10, 3, 5};
  for (std::int32_t g = 0; g < 3; ++g) {
    groups.add(group_of(names[g], g, retentions));
    write_and_publish(groups[g], sizes[g]);
  }
  std::array<GroupView<float>, 2> views;
  // Worker one: prompt at 0 .. 9, two at 10 .. 14, itself from 15 on.
  const OrderedGroup one[] = {{0, 10}, {2, 5}, {1, 0}};
  ASSERT_EQ((contiguous_views<float, float>(groups, one, 1, views)), 2);
  EXPECT_EQ(views[0].group, 0);
  EXPECT_EQ(views[0].shift, 15);
  EXPECT_EQ(views[1].group, 2);
  EXPECT_EQ(views[1].shift, 5);
  // Worker two: prompt, one (2 of its 3 tokens), itself from 12 on.
  const OrderedGroup two[] = {{0, 10}, {1, 2}, {2, 0}};
  ASSERT_EQ((contiguous_views<float, float>(groups, two, 2, views)), 2);
  EXPECT_EQ(views[0].shift, 12);
  EXPECT_EQ(views[1].group, 1);
  EXPECT_EQ(views[1].shift, 2);
  // The own tokens in the middle: what stands behind begins where they end so far, 10 + 3.
  const OrderedGroup middle[] = {{0, 10}, {1, 0}, {2, 4}};
  ASSERT_EQ((contiguous_views<float, float>(groups, middle, 1, views)), 2);
  EXPECT_EQ(views[0].shift, 10);
  EXPECT_EQ(views[1].shift, -3);
}

TEST(ContiguousViews, ErrorsNameTheOrder) {
  GroupSet<float> groups;
  const std::vector<RetentionConfig> retentions{RetentionConfig::full(40, 4)};
  groups.add(group_of("one", 0, retentions));
  groups.add(group_of("two", 1, retentions));
  std::array<GroupView<float>, 2> views;
  const OrderedGroup without[] = {{1, 0}};
  const OrderedGroup twice[] = {{0, 0}, {1, 0}, {0, 0}};
  const auto missing = error_of([&] { contiguous_views<float, float>(groups, without, 0, views); });
  ASSERT_TRUE(missing.has_value());
  EXPECT_EQ(missing->code(), ErrorCode::kConfig);
  EXPECT_EQ(missing->detail().where, "contiguous_views");
  EXPECT_EQ(missing->detail().found, "0");
  const auto repeated = error_of([&] { contiguous_views<float, float>(groups, twice, 0, views); });
  ASSERT_TRUE(repeated.has_value());
  EXPECT_EQ(repeated->detail().found, "2");
  const OrderedGroup both[] = {{0, 0}, {1, 0}};
  const auto narrow = error_of(
      [&] { contiguous_views<float, float>(groups, both, 0, std::span<GroupView<float>>()); });
  ASSERT_TRUE(narrow.has_value());
  EXPECT_EQ(narrow->code(), ErrorCode::kShape);
  EXPECT_EQ(narrow->detail().field, "views");
  EXPECT_EQ(narrow->detail().expected, "1");
  EXPECT_EQ(narrow->detail().found, "0");
}

}  // namespace SLUICE_TEST_UNIT
