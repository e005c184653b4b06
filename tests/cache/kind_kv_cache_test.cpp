// SPDX-License-Identifier: MIT
// Going back, copying and saving a conversation about a video: the bits of a cache that never went
// the other way, and the definition's tokens where it places them.
#include "sluice/cache/kind_kv_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/position/vision_positions.hpp"
#include "support/naive_kinds.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 12;
constexpr std::int64_t kValueDim = 5;
constexpr double kTheta = 50;

/// Something done to a cache. Rows follow from `salt`.
struct Act {
  enum class Kind { kRound, kSpan, kTokens, kBack } kind = Kind::kRound;
  SpanRole role = SpanRole::kHead;
  VisionGrid grid{};
  std::int64_t tokens = 0;
  std::uint64_t salt = 0;
};

/// A conversation whose spans lie in their rooms; with detours, tokens are fed and taken back.
std::vector<Act> conversation(const KindRetentionConfig& config, int rounds, std::uint64_t seed,
                              bool detours) {
  Random random(seed);
  Random detour(seed + 1);
  std::vector<Act> acts;
  std::uint64_t salt = seed << 20;
  const auto feed = [&](std::int64_t tokens, std::int64_t room) {
    while (tokens > 0) {
      const std::int64_t part = std::min(tokens, test::between(random, 1, config.max_chunk));
      const std::uint64_t row = ++salt;
      if (detours && detour.below(2) == 0) {
        const std::int64_t more = std::min({room, config.max_chunk, std::int64_t{3}});
        acts.push_back({.kind = Act::Kind::kTokens, .tokens = more, .salt = row ^ 0xabcdef});
        acts.push_back({.kind = Act::Kind::kBack, .tokens = more});
      }
      acts.push_back({.kind = Act::Kind::kTokens, .tokens = part, .salt = row});
      tokens -= part;
      room -= part;
    }
  };
  const auto span = [&](SpanRole role, std::int64_t tokens, std::int64_t room,
                        const VisionGrid& grid = {}) {
    acts.push_back({.kind = Act::Kind::kSpan, .role = role, .grid = grid});
    feed(tokens, room);
  };
  span(SpanRole::kHead, 2, 2);
  span(SpanRole::kPrevious, test::between(random, 0, 8), 10);
  span(SpanRole::kTail, 2, 2);
  for (int round = 0; round < rounds; ++round) {
    acts.push_back({.kind = Act::Kind::kRound});
    span(SpanRole::kTurn, test::between(random, 0, 2), 2);
    for (std::int64_t grids = test::between(random, 1, 2); grids > 0; --grids) {
      const VisionGrid grid{.frames = test::between(random, 1, 2),
                            .rows = 2,
                            .cols = test::between(random, 1, 3),
                            .frame_step = 0.5};
      span(SpanRole::kVision, grid.num_tokens(), grid.num_tokens(), grid);
    }
    span(SpanRole::kTurn, test::between(random, 0, 3), 3);
    span(SpanRole::kReply, test::between(random, 0, 4), 4);
  }
  return acts;
}

/// A cache and, beside it, what was fed.
template <class Element>
struct Stream {
  explicit Stream(const KindRetentionConfig& config)
      : rotary({.head_dim = kDim, .rotary_dim = kDim, .theta = kTheta, .sections = {2, 2, 2}}),
        cache({kLayers, kHeads, kDim, kValueDim}, config,
              std::array<const Rotary*, kLayers>{&rotary, &rotary}),
        table(rotary, config.max_chunk) {}

  static std::vector<float> row(std::uint64_t salt, std::int64_t layer, std::int64_t token,
                                std::int64_t width) {
    Random random(salt * 1000003 + static_cast<std::uint64_t>(17 * layer + 64 * token + width));
    std::vector<float> values(static_cast<std::size_t>(kHeads * width));
    for (float& x : values) x = static_cast<float>(random.normal());
    return values;
  }

  void apply(const Act& act) {
    switch (act.kind) {
      case Act::Kind::kRound: cache.begin_round(); return;
      case Act::Kind::kSpan: cache.begin_span(act.role, act.grid); return;
      case Act::Kind::kBack: cache.truncate(act.tokens); return;
      case Act::Kind::kTokens: break;
    }
    ASSERT_EQ(cache.status(act.tokens), CacheStatus::kOk);
    // Where a token stands decides nothing here but its bits.
    const Position first = cache.next_position();
    std::vector<Position3> positions;
    for (std::int64_t t = 0; t < act.tokens; ++t)
      positions.push_back(on_all_axes(first + static_cast<Position>(t)));
    table.fill(positions);
    cache.append(act.tokens);
    for (std::int64_t l = 0; l < kLayers; ++l) {
      std::vector<float> keys;
      std::vector<float> values;
      for (std::int64_t t = 0; t < act.tokens; ++t) {
        const std::vector<float> key = row(act.salt, l, t, kDim);
        const std::vector<float> value = row(act.salt, l, t, kValueDim);
        keys.insert(keys.end(), key.begin(), key.end());
        values.insert(values.end(), value.begin(), value.end());
      }
      cache.store(l, {keys.data(), act.tokens, kHeads, kDim},
                  {values.data(), act.tokens, kHeads, kValueDim}, table.rows(), 0, act.tokens);
    }
    cache.commit();
  }

  /// All that a reader can learn: rules and the bits of their rows.
  std::vector<std::uint8_t> seen() const {
    std::vector<std::uint8_t> bytes;
    const auto put = [&](const auto& value) {
      const auto* const from = reinterpret_cast<const std::uint8_t*>(&value);
      bytes.insert(bytes.end(), from, from + sizeof(value));
    };
    const auto put_row = [&](const Element* row, std::int64_t width) {
      const auto* const from = reinterpret_cast<const std::uint8_t*>(row);
      bytes.insert(bytes.end(), from, from + width * std::int64_t{sizeof(Element)});
    };
    put(cache.total());
    put(cache.next_position());
    put(cache.max_truncate());
    std::array<Segment<Element>, KindKvCache<Element>::kMaxSegments> segments;
    for (std::int64_t l = 0; l < kLayers; ++l) {
      const int count = cache.segments(l, 1, segments);
      for (int i = 0; i < count; ++i) {
        const Segment<Element>& s = segments[static_cast<std::size_t>(i)];
        put(s.rule.first_index);
        put(s.rule.count);
        put(s.rule.first_position);
        put(s.rule.shift);
        put(s.rule.first_slot);
        put(s.rule.kind);
        for (std::int64_t h = 0; h < kHeads; ++h)
          for (std::int64_t t = 0; t < s.rule.count; ++t) {
            put_row(s.key(h, t), kDim);
            put_row(s.value(h, t), kValueDim);
          }
      }
    }
    return bytes;
  }

  Rotary rotary;
  KindKvCache<Element> cache;
  RotaryTable table;
};

constexpr std::array<std::pair<int, int>, 3> kWindows{{{3, 3}, {5, 2}, {2, 4}}};

TEST(KindKvCacheTransactions, WhatWasTakenBackLeavesNoTrace) {
  for (const auto& [text, vision] : kWindows) {
    const KindRetentionConfig config = test::small_kinds(text, vision);
    const std::vector<Act> straight = conversation(config, 16, 5, false);
    const std::vector<Act> detours = conversation(config, 16, 5, true);
    ASSERT_GT(detours.size(), straight.size() + 50);
    Stream<bf16> a(config);
    Stream<bf16> b(config);
    std::size_t at = 0;
    for (const Act& act : straight) {
      a.apply(act);
      // The same act, after what is taken back again.
      while (detours[at].kind == Act::Kind::kTokens && detours[at].salt != act.salt) {
        b.apply(detours[at++]);
        ASSERT_EQ(detours[at].kind, Act::Kind::kBack);
        b.apply(detours[at++]);
      }
      b.apply(detours[at++]);
      ASSERT_EQ(a.seen(), b.seen()) << "act " << at;
    }
  }
}

// Against the definition: tokens of the open span come back and no others.
TEST(KindKvCacheTransactions, TakesBackTheOpenSpanAlone) {
  for (const auto& [text, vision] : kWindows) {
    const KindRetentionConfig config = test::small_kinds(text, vision);
    Stream<float> stream(config);
    test::NaiveKinds naive(config);
    Random random(static_cast<std::uint64_t>(text * 8 + vision));
    std::int64_t open = 0;
    for (const Act& act : conversation(config, 14, 9, false)) {
      const std::int64_t total = stream.cache.total();
      stream.apply(act);
      if (act.kind == Act::Kind::kRound) naive.begin_round();
      if (act.kind == Act::Kind::kSpan) naive.begin_span(act.role, act.grid);
      if (act.kind != Act::Kind::kTokens) {
        open = 0;
        EXPECT_EQ(stream.cache.max_truncate(), 0);
        continue;
      }
      for (std::int64_t t = 0; t < act.tokens; ++t) naive.append(total + t);
      open += act.tokens;
      ASSERT_EQ(stream.cache.max_truncate(), open);
      const auto before = stream.seen();
      for (const std::int64_t refused : {open + 1, std::int64_t{-1}}) {
        const auto error = test::error_of([&] { stream.cache.truncate(refused); });
        ASSERT_TRUE(error);
        EXPECT_EQ(error->code(), ErrorCode::kCapacity);
      }
      ASSERT_EQ(stream.seen(), before);
      const std::int64_t back = test::between(random, 0, open);
      KindKvCache<float> shorter = stream.cache.sibling();
      shorter.copy_from(stream.cache);
      shorter.truncate(back);
      test::NaiveKinds expected = naive;
      expected.take_back(back);
      EXPECT_EQ(shorter.total(), total + act.tokens - back);
      EXPECT_EQ(shorter.max_truncate(), open - back);
      shorter.rollback();  // what is left is final
      EXPECT_EQ(shorter.total(), total + act.tokens - back);
      std::map<TokenKind, std::int64_t> kept;
      for (const auto& token : expected.tokens()) ++kept[token.kind];
      for (const TokenKind kind : {TokenKind::kPinned, TokenKind::kText, TokenKind::kVision})
        ASSERT_EQ(shorter.retention().kept(kind), kept[kind]);
      // Where the next token would stand.
      expected.append(total + 1000);
      const double reader = expected.tokens().back().position[0];
      const SpanRole role = stream.cache.retention().role();
      if (role != SpanRole::kVision && role != SpanRole::kPrevious) {
        EXPECT_NEAR(shorter.retention().rank_of(shorter.next_position()), reader, 1e-9);
      }
    }
  }
}

TEST(KindKvCacheTransactions, ACheckpointIsReturnedToFromAnywhere) {
  for (const auto& [text, vision] : kWindows) {
    const KindRetentionConfig config = test::small_kinds(text, vision);
    const std::vector<Act> acts = conversation(config, 16, 7, true);
    const std::vector<Act> other = conversation(config, 16, 8, true);
    Stream<f16> stream(config);
    auto checkpoint = stream.cache.make_checkpoint();
    for (std::size_t from = 0; from < acts.size(); from += 23) {
      stream.cache.reset();
      for (std::size_t i = 0; i < from; ++i) stream.apply(acts[i]);
      stream.cache.capture(checkpoint);
      EXPECT_EQ(checkpoint.total(), stream.cache.total());
      EXPECT_EQ(checkpoint.max_truncate(), stream.cache.max_truncate());
      const auto captured = stream.seen();
      std::vector<std::vector<std::uint8_t>> followed;
      for (std::size_t i = from; i < acts.size(); ++i) {
        stream.apply(acts[i]);
        followed.push_back(stream.seen());
      }
      const std::int64_t moved = stream.cache.tokens_moved();
      if (from % 2 == 0) {  // another conversation in between
        stream.cache.reset();
        for (const Act& act : other) stream.apply(act);
      }
      stream.cache.revert(checkpoint);
      ASSERT_EQ(stream.seen(), captured);
      for (std::size_t i = from; i < acts.size(); ++i) {
        stream.apply(acts[i]);
        ASSERT_EQ(stream.seen(), followed[i - from]) << "act " << i << " after " << from;
      }
      EXPECT_EQ(stream.cache.tokens_moved(), moved);
    }
  }
}

TEST(KindKvCacheTransactions, ACopyAndASavedCacheGoOnAlike) {
  for (const auto& [text, vision] : kWindows) {
    const KindRetentionConfig config = test::small_kinds(text, vision);
    const std::vector<Act> acts = conversation(config, 14, 3, true);
    for (std::size_t from = 0; from < acts.size(); from += 29) {
      Stream<bf16> stream(config);
      for (std::size_t i = 0; i < from; ++i) stream.apply(acts[i]);
      ByteWriter writer;
      stream.cache.save(writer);
      writer.write_checksum();
      Stream<bf16> loaded(config);
      Stream<bf16> copied(config);
      for (const Act& act : conversation(config, 3, 4, false)) {  // what they held before
        loaded.apply(act);
        copied.apply(act);
      }
      ByteReader reader(writer.bytes(), "memory");
      reader.verify_checksum();
      loaded.cache.restore(reader);
      reader.expect_end();
      copied.cache.copy_from(stream.cache);
      ASSERT_EQ(loaded.seen(), stream.seen());
      ASSERT_EQ(copied.seen(), stream.seen());
      for (std::size_t i = from; i < acts.size(); ++i) {
        for (Stream<bf16>* each : {&stream, &loaded, &copied}) each->apply(acts[i]);
        ASSERT_EQ(loaded.seen(), stream.seen()) << "act " << i << " after " << from;
        ASSERT_EQ(copied.seen(), stream.seen()) << "act " << i << " after " << from;
      }
      EXPECT_EQ(loaded.cache.tokens_moved(), stream.cache.tokens_moved());
      ByteWriter again;
      ByteWriter straight;
      loaded.cache.save(again);
      stream.cache.save(straight);
      EXPECT_TRUE(std::ranges::equal(again.bytes(), straight.bytes()));
    }
  }
}

TEST(KindKvCacheTransactions, OpenChunksAreNotSaved) {
  Stream<bf16> stream(test::small_kinds(3, 3));
  stream.cache.begin_span(SpanRole::kHead);
  stream.cache.append(1);
  ByteWriter writer;
  const auto error = test::error_of([&] { stream.cache.save(writer); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kOrder);
}

TEST(KindKvCacheTransactions, DamagedFilesAreRefused) {
  const KindRetentionConfig config = test::small_kinds(3, 2);
  Stream<bf16> stream(config);
  for (const Act& act : conversation(config, 6, 2, false)) stream.apply(act);
  ByteWriter writer;
  stream.cache.save(writer);
  const std::size_t whole = writer.size();
  writer.write_checksum();
  const std::vector<std::byte> file(writer.bytes().begin(), writer.bytes().end());

  Stream<bf16> loaded(config);
  const auto read = [&](std::span<const std::byte> bytes, bool checked) {
    return test::error_of([&] {
      ByteReader reader(bytes, "memory");
      if (checked) reader.verify_checksum();
      loaded.cache.restore(reader);
      reader.expect_end();
    });
  };
  ASSERT_FALSE(read(file, true));
  // Cut at any byte, with the checksum's eye and without.
  for (std::size_t size = 0; size < whole; size += size < 2000 ? 1 : 37) {
    for (const bool checked : {true, false}) {
      const auto error = read(std::span(file).first(size), checked);
      ASSERT_TRUE(error) << size;
      EXPECT_EQ(error->code(), ErrorCode::kFormat);
      if (!checked) {
        EXPECT_EQ(loaded.cache.total(), 0);
      }
    }
  }
  // A bit of any byte.
  Random random(6);
  for (std::size_t at = 0; at < file.size(); at += file.size() < 4000 || at < 1200 ? 1 : 23) {
    std::vector<std::byte> damaged = file;
    damaged[at] ^= std::byte{1} << random.below(8);
    const auto error = read(damaged, true);
    ASSERT_TRUE(error) << at;
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
  }
  // Another configuration, another type.
  for (const auto& change : {&KindRetentionConfig::text_sinks, &KindRetentionConfig::text_window,
                             &KindRetentionConfig::text_rounds, &KindRetentionConfig::vision_rounds,
                             &KindRetentionConfig::max_vision, &KindRetentionConfig::max_chunk}) {
    KindRetentionConfig changed = config;
    ++(changed.*change);
    Stream<bf16> another(changed);
    const auto error = test::error_of([&] {
      ByteReader reader(file, "memory");
      another.cache.restore(reader);
    });
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
  }
  Stream<f16> other_type(config);
  EXPECT_TRUE(test::error_of([&] {
    ByteReader reader(file, "memory");
    other_type.cache.restore(reader);
  }));
}

// Without a checksum: an error, or a cache whose books hold and that goes on.
TEST(KindKvCacheTransactions, NoDamageBreaksTheBooks) {
  const KindRetentionConfig config = test::small_kinds(4, 2);
  Stream<bf16> stream(config);
  for (const Act& act : conversation(config, 7, 21, false)) stream.apply(act);
  ByteWriter writer;
  stream.cache.save(writer);
  const std::size_t books = 2 * 4 + 5 * 8;  // behind types and extents
  Random random(12);
  int refused = 0;
  int accepted = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    std::vector<std::byte> damaged(writer.bytes().begin(), writer.bytes().end());
    const std::size_t at = books + 11 * 8 + random.below(1100);
    damaged[at] ^= std::byte{1} << random.below(8);
    Stream<bf16> loaded(config);
    const auto error = test::error_of([&] {
      ByteReader reader(damaged, "memory");
      loaded.cache.restore(reader);
    });
    if (error) {
      EXPECT_EQ(error->code(), ErrorCode::kFormat);
      EXPECT_EQ(loaded.cache.total(), 0);
      ++refused;
      continue;
    }
    ++accepted;
    const auto check = [&] {
      const KindRetention& kept = loaded.cache.retention();
      std::vector<bool> taken(static_cast<std::size_t>(config.capacity()), false);
      std::int64_t count = 0;
      kept.each_stored_slot([&](std::int64_t slot) {
        ASSERT_GE(slot, 0);
        ASSERT_LT(slot, config.capacity());
        ASSERT_FALSE(taken[static_cast<std::size_t>(slot)]) << "a slot twice";
        taken[static_cast<std::size_t>(slot)] = true;
        ++count;
      });
      ASSERT_EQ(count, kept.size());
      kept.each_reply_slot([&](std::int64_t place) {
        ASSERT_GE(place, 0);
        ASSERT_LT(place, kept.reply_slots());
      });
    };
    check();
    if (HasFatalFailure()) FAIL() << "byte " << at;
    if (loaded.cache.total() > std::int64_t{1} << 50) continue;
    for (int round = 0; round < 6; ++round) {
      loaded.apply({.kind = Act::Kind::kRound});
      const VisionGrid grid{.frames = 1, .rows = 2, .cols = 3};
      loaded.apply({.kind = Act::Kind::kSpan, .role = SpanRole::kVision, .grid = grid});
      loaded.apply({.kind = Act::Kind::kTokens, .tokens = 6, .salt = 1});
      loaded.apply({.kind = Act::Kind::kSpan, .role = SpanRole::kReply});
      loaded.apply({.kind = Act::Kind::kTokens, .tokens = 3, .salt = 2});
      check();
      if (HasFatalFailure()) FAIL() << "byte " << at << ", round " << round;
    }
  }
  EXPECT_GT(refused, 2500);
  EXPECT_GT(accepted, 20);
}

// Runs that stand apart are bounded by the configuration: a file cannot make more of them than a
// list of segments holds.
TEST(KindKvCacheTransactions, AFileCannotPullRunsApart) {
  KindRetentionConfig config = test::small_kinds(70, 70);
  config.max_vision = 8;
  KindRetention retention(config);
  for (int round = 0; round < 75; ++round) {
    retention.begin_round();
    for (int span = 0; span < 4; ++span) {
      retention.begin_span(SpanRole::kVision, {.frames = 1, .rows = 1, .cols = 2});
      retention.append(2);
      retention.commit();
    }
  }
  ByteWriter writer;
  retention.save(writer);
  std::vector<std::byte> bytes(writer.bytes().begin(), writer.bytes().end());
  // Configuration, counters and positions; then of each round four counts, of each span three
  // counts, its position, its extent and what left behind it.
  const std::size_t rounds = (11 + 14 + 3) * 8;
  ASSERT_EQ(bytes.size(), rounds + 70 * (4 + 4 * 6) * 8);
  for (std::size_t span = 0; span < 280; ++span) {
    const double behind = 0.25 * static_cast<double>(1 + span % 3);
    std::memcpy(bytes.data() + rounds + (span / 4 * 28 + 4 + span % 4 * 6 + 5) * 8, &behind, 8);
  }
  KindRetention loaded(config);
  const auto error = test::error_of([&] {
    ByteReader reader(bytes, "memory");
    loaded.restore(reader);
  });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
  EXPECT_EQ(loaded.total(), 0);
  ByteReader reader(writer.bytes(), "memory");
  loaded.restore(reader);
  EXPECT_EQ(loaded.total(), retention.total());
}

}  // namespace SLUICE_TEST_UNIT
