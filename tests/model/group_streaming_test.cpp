// SPDX-License-Identifier: MIT
// Streams of several groups against one batch pass: whatever order sources are read and targets
// written in, every row's logits are those of a plain decoder in double that is given the whole
// sequence at once, with who sees whom and at which distance.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/group_mask.hpp"
#include "sluice/cache/group.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "support/naive_decoder.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::CacheOptions;
using sluice::CachePlan;
using sluice::CachePolicy;
using sluice::CacheStatus;
using sluice::CausalWindow;
using sluice::contiguous_views;
using sluice::Decoder;
using sluice::DecoderConfig;
using sluice::DecoderInput;
using sluice::DecoderLayerWeights;
using sluice::DecoderWeights;
using sluice::DecoderWorkspace;
using sluice::Error;
using sluice::ErrorCode;
using sluice::Group;
using sluice::GroupPrefixMask;
using sluice::GroupReader;
using sluice::GroupSet;
using sluice::GroupView;
using sluice::KeyForm;
using sluice::kUnlimitedWindow;
using sluice::KvCache;
using sluice::MatrixView;
using sluice::on_all_axes;
using sluice::OrderedGroup;
using sluice::plan_cache;
using sluice::Position;
using sluice::Position3;
using sluice::PositionRule;
using sluice::Random;
using sluice::ThreadTeam;
using sluice::Token;
using sluice::wait_k_prefixes;
using sluice::WeightMatrix;
using sluice::test::between;
using sluice::test::Geometry;
using sluice::test::kHeadDim;
using sluice::test::kHidden;
using sluice::test::kVocab;
using sluice::test::NaiveDecoder;
using sluice::test::random_tokens;
using sluice::test::small_decoder;

// Logits below are of the order of 1. Both sides form the same sums of 8 to 48 products in three
// layers, one in float32: units of 2^-24 = 6e-8 grow to some 1e-6, and to 1e-5 in the worst of all
// sequences of this file. A window off by one, a position off by a half or a row that
// sees one source token less changes a logit by 1e-2 and more (WhatTheToleranceTells).
constexpr double kTolerance = 1.5e-4;
constexpr double kMistake = 1e-2;

// ---- What a reader sees, as the documentation says it
// --------------------------------------------

/// How one layer of a group keeps its tokens: the first `sinks` and the last `window`.
struct Kept {
  std::int64_t sinks = 0;
  std::int64_t window = kUnlimitedWindow;
  bool in_cache = false;  // positions are ranks
  double origin = 0;

  bool full() const { return window >= kUnlimitedWindow; }
  /// Whether key j is among what the first n tokens leave.
  bool keeps(std::int64_t n, std::int64_t j) const {
    return j < n && (full() || j < sinks || j >= n - window);
  }
  /// Position of key j, then.
  double key(std::int64_t n, std::int64_t j) const {
    if (!in_cache || full() || j < sinks) return origin + static_cast<double>(j);
    std::int64_t rank = sinks;
    for (std::int64_t older = sinks; older < j; ++older) rank += keeps(n, older) ? 1 : 0;
    return origin + static_cast<double>(rank);
  }
  /// Position of token i when it asks: as a key that has just come.
  double reader(std::int64_t i) const { return key(i + 1, i); }
  /// How many positions n tokens take up.
  double extent(std::int64_t n) const { return n == 0 ? 0 : reader(n - 1) - origin + 1; }
};

Kept kept(const CacheOptions& options, const Decoder& model, std::size_t layer) {
  Kept result;
  result.in_cache = options.position_rule == PositionRule::kInCache;
  result.origin = options.origin;
  if (options.policy != CachePolicy::kFull) {
    result.sinks = options.policy == CachePolicy::kWindow ? 0 : options.num_sink_tokens;
    result.window = options.window_size;
  }
  // A layer that was trained with a smaller window keeps that one, and no sinks.
  const std::int64_t trained = model.config().layers[layer].window_size;
  if (trained < result.window) {
    result.sinks = 0;
    result.window = trained;
  }
  return result;
}

// ---- A source, a target, and who has read what
// ----------------------------------------------------

struct Story {
  std::int64_t k = 1;
  std::vector<std::int64_t> source_units, target_units;
  std::vector<Token> source, target;
  /// Source tokens that the target's rows see, from core-algorithms 2.3.
  std::vector<std::int64_t> prefix;

  std::int64_t source_size() const { return static_cast<std::int64_t>(source.size()); }
  std::int64_t target_size() const { return static_cast<std::int64_t>(target.size()); }
  std::vector<Token> sequence() const {
    std::vector<Token> tokens = source;
    tokens.insert(tokens.end(), target.begin(), target.end());
    return tokens;
  }
};

Story random_story(Random& random, std::int64_t k) {
  Story story;
  story.k = k;
  const auto units = [&](std::vector<std::int64_t>& lengths, std::int64_t least) {
    for (std::int64_t left = between(random, 1, 8); left > 0; --left)
      lengths.push_back(between(random, least, 4));
  };
  units(story.source_units, 0);
  story.source_units[0] += 1;  // something must be read before something is written
  units(story.target_units, 1);
  story.source = random_tokens(
      random, std::accumulate(story.source_units.begin(), story.source_units.end(), 0L));
  story.target = random_tokens(
      random, std::accumulate(story.target_units.begin(), story.target_units.end(), 0L));
  // Row t belongs to the unit of token t + 1, which it predicts; the last row to its own.
  std::vector<std::int64_t> unit_of;
  for (std::size_t unit = 0; unit < story.target_units.size(); ++unit)
    unit_of.insert(unit_of.end(), static_cast<std::size_t>(story.target_units[unit]),
                   static_cast<std::int64_t>(unit));
  for (std::size_t row = 0; row < unit_of.size(); ++row) {
    const std::int64_t unit = unit_of[std::min(row + 1, unit_of.size() - 1)];
    std::int64_t seen = 0;
    for (std::int64_t u = 0; u < static_cast<std::int64_t>(story.source_units.size()); ++u)
      if (u < k + unit) seen += story.source_units[static_cast<std::size_t>(u)];
    story.prefix.push_back(seen);
  }
  return story;
}

/// The batch pass with the group mask and group ids.
NaiveDecoder::Pass batch_pass(const Decoder& model, const Story& story,
                              const CacheOptions& source_options,
                              const CacheOptions& target_options) {
  const std::int64_t sources = story.source_size();
  return NaiveDecoder(model).run(
      story.sequence(),
      [&](std::size_t layer, std::size_t q, std::size_t k) -> std::optional<double> {
        const Kept source = kept(source_options, model, layer);
        const Kept target = kept(target_options, model, layer);
        const auto query = static_cast<std::int64_t>(q);
        const auto key = static_cast<std::int64_t>(k);
        if (query < sources) {  // the source sees itself alone
          if (key >= sources || !source.keeps(query + 1, key)) return std::nullopt;
          return source.reader(query) - source.key(query + 1, key);
        }
        const std::int64_t row = query - sources;
        const std::int64_t seen =
            key < sources ? story.prefix[static_cast<std::size_t>(row)] : row + 1;
        const Kept& group = key < sources ? source : target;
        const std::int64_t index = key < sources ? key : key - sources;
        if (!group.keeps(seen, index)) return std::nullopt;
        return target.reader(row) - group.key(seen, index);
      });
}

double largest_difference(const NaiveDecoder::Rows& expected, const std::vector<float>& found) {
  EXPECT_EQ(found.size(), expected.size() * static_cast<std::size_t>(kVocab));
  if (found.size() != expected.size() * static_cast<std::size_t>(kVocab)) return HUGE_VAL;
  double largest = 0;
  for (std::size_t row = 0; row < expected.size(); ++row)
    for (std::size_t i = 0; i < expected[row].size(); ++i) {
      const double difference =
          std::abs(static_cast<double>(found[row * expected[row].size() + i]) - expected[row][i]);
      if (!(difference <= largest)) largest = difference;  // a NaN is the largest
    }
  return largest;
}

/// One writer's tools.
struct Writer {
  Writer(const Decoder& decoder, std::int64_t max_keys)
      : model(decoder), workspace(decoder, 16, max_keys, 1, 24), team(1) {}

  /// Feeds a chunk and appends the logits of its rows.
  void feed(std::span<const Token> tokens, KvCache<float>& cache,
            const GroupReader<float, float>& reader, std::vector<float>& logits) {
    model.forward(DecoderInput{tokens}, cache, reader, workspace, team);
    take_logits(static_cast<std::int64_t>(tokens.size()), logits);
  }
  void take_logits(std::int64_t rows, std::vector<float>& logits) {
    const std::size_t before = logits.size();
    logits.resize(before + static_cast<std::size_t>(rows * kVocab));
    model.logits(0, MatrixView<float>(logits.data() + before, rows, kVocab), workspace, team);
  }

  const Decoder& model;
  DecoderWorkspace workspace;
  ThreadTeam team;
};

/// Streams a story: the source is read in random chunks, at random ahead of what the target has
/// asked for; target rows follow in random chunks of one snapshot. Now and then a chunk is fed too
/// early, taken back and fed again, as the released inference does (core-algorithms 2.4).
/// Logits of all rows, source first.
std::vector<float> stream(const Decoder& model, const Story& story,
                          const CacheOptions& source_options, const CacheOptions& target_options,
                          Random& random) {
  const auto source =
      model.make_group<float>("source", 0, plan_cache(model.config(), source_options));
  const auto target =
      model.make_group<float>("target", 1, plan_cache(model.config(), target_options));
  Writer reading(model, 128);
  Writer writing(model, 256);
  std::vector<float> source_logits;
  std::vector<float> target_logits;
  const int reader = source->open_reader();

  const auto read_some = [&] {
    const std::int64_t left = story.source_size() - source->published();
    const std::int64_t most =
        std::min({left, source->room(), source->cache().max_chunk(), std::int64_t{16}});
    if (most == 0) return false;
    const std::int64_t count = between(random, 1, most);
    EXPECT_EQ(source->cache().status(count), CacheStatus::kOk);
    reading.feed(std::span(story.source)
                     .subspan(static_cast<std::size_t>(source->published()),
                              static_cast<std::size_t>(count)),
                 source->cache(), {.own_group = 0}, source_logits);
    source->cache().commit();
    source->publish();
    return true;
  };
  const auto write = [&](std::int64_t row, std::int64_t count, std::vector<float>& logits) {
    const GroupView<float> view = source->view(story.prefix[static_cast<std::size_t>(row)]);
    writing.feed(std::span(story.target)
                     .subspan(static_cast<std::size_t>(row), static_cast<std::size_t>(count)),
                 target->cache(), {.own_group = 1, .sees = {&view, 1}}, logits);
  };

  for (std::int64_t row = 0; row < story.target_size();) {
    const std::int64_t needed = story.prefix[static_cast<std::size_t>(row)];
    // A reader that waits lets go of what it will not read again, or the source could not go on.
    source->hold(reader, std::min(needed, source->published()));
    while (source->published() < needed) {
      if (!read_some()) {
        ADD_FAILURE() << "the source cannot go on to " << needed << " from " << source->published();
        return {};
      }
      source->hold(reader, std::min(needed, source->published()));
    }
    while (random.below(3) == 0 && read_some()) {
    }
    std::int64_t same = 1;
    while (row + same < story.target_size() &&
           story.prefix[static_cast<std::size_t>(row + same)] == needed)
      ++same;
    const std::int64_t count = between(random, 1, std::min(same, target->cache().max_chunk()));
    if (random.below(4) == 0) {
      std::vector<float> dropped;
      write(row, 1, dropped);
      if (random.below(2) == 0) {
        target->cache().rollback();
      } else {
        target->cache().commit();
        target->cache().truncate(1);
      }
    }
    write(row, count, target_logits);
    target->cache().commit();
    target->publish();
    row += count;
  }
  source->close_reader(reader);
  while (read_some()) {
  }
  EXPECT_EQ(source->published(), story.source_size());
  EXPECT_EQ(source->cache().bytes_moved() + target->cache().bytes_moved(), 0);
  source_logits.insert(source_logits.end(), target_logits.begin(), target_logits.end());
  return source_logits;
}

// ---- The caches that are tried
// --------------------------------------------------------------------

constexpr std::array<double, 3> kOffsets{0, 0.5, 17.25};

CacheOptions full_cache(Random& random) {
  return {.policy = CachePolicy::kFull,
          .capacity = 64,
          .chunk_size = between(random, 1, 8),
          .position_rule = PositionRule::kInText,
          .lead = between(random, 1, 6)};  // of local layers
}

CacheOptions windowed_cache(Random& random, PositionRule rule, KeyForm form) {
  const std::int64_t window = between(random, 1, 9);
  return {.policy = CachePolicy::kSinkWindow,
          .num_sink_tokens = between(random, 0, 3),
          .window_size = window,
          .chunk_size = between(random, 1, window),
          .position_rule = rule,
          .key_form = form,
          .lead = between(random, 1, 6)};
}

using MakeOptions = std::function<CacheOptions(Random&)>;

class GroupStreaming : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    models_.push_back(sluice::test::small_decoder({}, 1));
    models_.push_back(
        sluice::test::small_decoder({.num_layers = 2, .num_qo_heads = 6, .num_kv_heads = 1}, 2));
    models_.push_back(
        sluice::test::small_decoder({.num_layers = 4, .num_qo_heads = 2, .num_kv_heads = 2}, 3));
    // Local layers between global ones.
    models_.push_back(
        sluice::test::small_decoder({.num_layers = 3, .windows = {4, kUnlimitedWindow, 2}}, 4));
  }
  static void TearDownTestSuite() { models_.clear(); }

  static const Decoder& model(std::uint64_t seed) { return *models_[seed % models_.size()]; }

  /// 200 random stories, k = 1 .. 7, each streamed and compared with its batch pass.
  static void check_stories(const MakeOptions& source, const MakeOptions& target) {
    double largest = 0;
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
      Random random(seed);
      const Story story = random_story(random, 1 + static_cast<std::int64_t>(seed % 7));
      const CacheOptions source_options = source(random);
      CacheOptions target_options = target(random);
      target_options.origin = kOffsets[random.below(kOffsets.size())];
      const Decoder& decoder = model(seed);
      const std::vector<float> found =
          stream(decoder, story, source_options, target_options, random);
      const double difference = largest_difference(
          batch_pass(decoder, story, source_options, target_options).logits, found);
      ASSERT_LE(difference, kTolerance) << "seed " << seed;
      largest = std::max(largest, difference);
    }
    RecordProperty("largest_difference", std::to_string(largest));
  }

  static std::vector<std::unique_ptr<const Decoder>> models_;
};

std::vector<std::unique_ptr<const Decoder>> GroupStreaming::models_;

// ---- Streaming equals the batch pass
// --------------------------------------------------------------

TEST_F(GroupStreaming, FullCachesEqualOneBatchPass) {
  check_stories(full_cache, full_cache);
}

TEST_F(GroupStreaming, SinksAndWindowsAtTextPositionsEqualOneBatchPass) {
  const auto options = [](Random& random) {
    return windowed_cache(random, PositionRule::kInText, KeyForm::kRotated);
  };
  check_stories(options, options);
}

TEST_F(GroupStreaming, SinksAndWindowsAtCachePositionsEqualOneBatchPass) {
  const auto options = [](Random& random) {
    return windowed_cache(random, PositionRule::kInCache, KeyForm::kRotated);
  };
  check_stories(options, options);
}

TEST_F(GroupStreaming, RawKeysEqualOneBatchPass) {
  const auto options = [](Random& random) {
    CacheOptions result = windowed_cache(
        random, random.below(2) == 0 ? PositionRule::kInText : PositionRule::kInCache,
        KeyForm::kRaw);
    if (random.below(4) == 0) {
      result = full_cache(random);
      result.key_form = KeyForm::kRaw;
    }
    return result;
  };
  check_stories(options, options);
}

TEST_F(GroupStreaming, GroupsMayKeepTheirTokensInDifferentWays) {
  const auto options = [](Random& random) {
    if (random.below(4) == 0) return full_cache(random);
    return windowed_cache(random,
                          random.below(2) == 0 ? PositionRule::kInText : PositionRule::kInCache,
                          random.below(2) == 0 ? KeyForm::kRotated : KeyForm::kRaw);
  };
  check_stories(options, options);
}

// The comparison would see the smallest mistakes that it is there for.
TEST_F(GroupStreaming, WhatTheToleranceTells) {
  Random random(5);
  Story story = random_story(random, 2);
  while (story.source_size() < 12 || story.target_size() < 12) story = random_story(random, 2);
  CacheOptions options{.num_sink_tokens = 2,
                       .window_size = 5,
                       .chunk_size = 2,
                       .position_rule = PositionRule::kInCache,
                       .lead = 4};
  const std::vector<float> found = stream(model(0), story, options, options, random);
  const auto difference = [&](const Story& other, const CacheOptions& source,
                              const CacheOptions& target) {
    return largest_difference(batch_pass(model(0), other, source, target).logits, found);
  };
  EXPECT_LE(difference(story, options, options), kTolerance);
  CacheOptions wrong = options;
  wrong.window_size = 6;
  EXPECT_GE(difference(story, wrong, options), kMistake) << "source window";
  EXPECT_GE(difference(story, options, wrong), kMistake) << "target window";
  wrong = options;
  wrong.num_sink_tokens = 3;
  EXPECT_GE(difference(story, wrong, options), kMistake) << "sinks";
  wrong = options;
  wrong.origin = 0.5;
  EXPECT_GE(difference(story, options, wrong), kMistake) << "target offset";
  wrong = options;
  wrong.position_rule = PositionRule::kInText;
  EXPECT_GE(difference(story, options, wrong), kMistake) << "position rule";
  Story late = story;
  late.prefix.back() -= 1;
  EXPECT_GE(difference(late, options, options), kMistake) << "one source token less";
}

// ---- The library's own batch pass
// -----------------------------------------------------------------

TEST_F(GroupStreaming, TheMaskedPassOverOneCacheEqualsTheSameBatchPass) {
  double largest = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Random random(1000 + seed);
    const Story story = random_story(random, 1 + static_cast<std::int64_t>(seed % 7));
    // The mask takes the place of trained windows: models without.
    const Decoder& decoder = *models_[seed % 3];
    const auto options = [&] {
      return random.below(3) == 0
                 ? full_cache(random)
                 : windowed_cache(random, PositionRule::kInText, KeyForm::kRotated);
    };
    const CacheOptions source = options();
    CacheOptions target = options();
    target.origin = kOffsets[random.below(kOffsets.size())];
    const auto window_of = [&](const CacheOptions& group) {
      const Kept rule = kept(group, decoder, 0);
      return CausalWindow{rule.window, rule.sinks};
    };
    std::vector<std::int64_t> prefix(static_cast<std::size_t>(story.target_size()));
    wait_k_prefixes(story.k, story.source_units, story.target_units, prefix);
    ASSERT_EQ(prefix, story.prefix);
    const GroupPrefixMask mask(story.source_size(), prefix, window_of(source), window_of(target));
    std::vector<Position3> ids;
    for (std::int64_t i = 0; i < story.source_size(); ++i)
      ids.push_back(on_all_axes(static_cast<Position>(i)));
    for (std::int64_t i = 0; i < story.target_size(); ++i)
      ids.push_back(on_all_axes(target.origin + static_cast<Position>(i)));

    const std::vector<Token> tokens = story.sequence();
    const NaiveDecoder::Pass expected = batch_pass(decoder, story, source, target);
    // All at once, and cut at random: indices of the mask are those of the stream.
    for (const bool whole : {true, false}) {
      const auto size = static_cast<std::int64_t>(tokens.size());
      CacheOptions everything = full_cache(random);
      everything.capacity = size;
      everything.chunk_size = size;
      KvCache<float> cache = decoder.make_cache<float>(plan_cache(decoder.config(), everything));
      ThreadTeam team(1);
      DecoderWorkspace workspace(decoder, size, size, 1);
      std::vector<float> found(tokens.size() * static_cast<std::size_t>(kVocab));
      for (std::int64_t first = 0; first < size;) {
        const std::int64_t count = whole ? size : between(random, 1, size - first);
        const auto at = static_cast<std::size_t>(first);
        const auto rows = static_cast<std::size_t>(count);
        decoder.forward(DecoderInput{.tokens = std::span(tokens).subspan(at, rows),
                                     .positions = std::span(ids).subspan(at, rows)},
                        cache, mask, workspace, team);
        cache.commit();
        decoder.logits(0, MatrixView<float>(found.data() + first * kVocab, count, kVocab),
                       workspace, team);
        first += count;
      }
      const double difference = largest_difference(expected.logits, found);
      ASSERT_LE(difference, kTolerance) << "seed " << seed << (whole ? ", whole" : ", in chunks");
      largest = std::max(largest, difference);
    }
  }
  RecordProperty("largest_difference", std::to_string(largest));
}

// ---- Several writers
// ------------------------------------------------------------------------------

/// Hogwild! Inference: a prompt and two writers that see each other's tokens while they come, each
/// in an order of its own.
struct Company {
  std::array<CacheOptions, 3> options;  // prompt, two workers
  std::array<std::vector<Token>, 3> tokens;
  std::array<std::vector<std::int32_t>, 3> order;  // of the workers
};

/// What a worker saw when it fed a token, and where it stood.
struct Moment {
  std::array<std::int64_t, 3> seen{};
  std::int64_t own_before = 0;  // own tokens when the views were laid out
};

void check_company(const Decoder& model, const Company& company, Random& random, double& largest) {
  GroupSet<float> groups;
  const char* names[] = {"prompt", "one", "two"};
  for (std::int32_t g = 0; g < 3; ++g)
    groups.add(model.make_group<float>(
        names[g], g, plan_cache(model.config(), company.options[static_cast<std::size_t>(g)])));
  Writer writer(model, 256);
  std::array<std::vector<float>, 3> logits;
  std::array<std::vector<Moment>, 3> moments;
  const auto size = [&](std::size_t g) {
    return static_cast<std::int64_t>(company.tokens[g].size());
  };
  // A reader each at the other groups, opened when the reader starts.
  std::array<std::array<int, 3>, 3> readers{};
  for (std::int32_t g = 1; g < 3; ++g)
    for (std::int32_t other = 0; other < 3; ++other)
      if (other != g)
        readers[static_cast<std::size_t>(g)][static_cast<std::size_t>(other)] =
            groups[other].open_reader();

  const auto step = [&](std::size_t g) {
    Group<float>& own = groups[static_cast<std::int32_t>(g)];
    std::vector<OrderedGroup> order;
    std::vector<GroupView<float>> views(2);
    int written = 0;
    Moment moment;
    moment.own_before = own.published();
    if (g != 0) {
      for (const std::int32_t other : company.order[g]) {
        const std::int64_t visible = groups[other].published();
        order.push_back({other, visible});
        if (other == own.id()) continue;
        groups[other].hold(readers[g][static_cast<std::size_t>(other)], visible);
        moment.seen[static_cast<std::size_t>(other)] = visible;
      }
      written = contiguous_views<float, float>(groups, order, own.id(), views);
      EXPECT_EQ(written, static_cast<int>(company.order[g].size()) - 1);
    }
    const std::int64_t left = size(g) - own.published();
    const std::int64_t most = std::min({left, own.room(), own.cache().max_chunk()});
    if (most == 0) return;
    const std::int64_t count = between(random, 1, most);
    writer.feed(
        std::span(company.tokens[g])
            .subspan(static_cast<std::size_t>(own.published()), static_cast<std::size_t>(count)),
        own.cache(),
        {.own_group = own.id(), .sees = std::span(views).first(static_cast<std::size_t>(written))},
        logits[g]);
    own.cache().commit();
    own.publish();
    for (std::int64_t i = 0; i < count; ++i) moments[g].push_back(moment);
  };
  while (groups["prompt"].published() < size(0)) {
    step(0);
    for (std::int32_t g = 1; g < 3; ++g)
      groups[0].hold(readers[static_cast<std::size_t>(g)][0], groups[0].published());
  }
  while (groups[1].published() < size(1) || groups[2].published() < size(2)) {
    const std::int64_t before = groups[1].published() + groups[2].published();
    step(1 + random.below(2));
    if (groups[1].published() + groups[2].published() > before) continue;
    // The one may wait for the other to look again, or be done.
    step(1);
    step(2);
  }

  // The oracle: one sequence of all groups, laid out for each row as its reader saw them.
  std::vector<Token> sequence;
  std::vector<std::pair<std::size_t, std::int64_t>> places;  // group, index in it
  std::vector<float> found;
  for (std::size_t g = 0; g < 3; ++g) {
    for (std::int64_t i = 0; i < size(g); ++i) places.emplace_back(g, i);
    sequence.insert(sequence.end(), company.tokens[g].begin(), company.tokens[g].end());
    found.insert(found.end(), logits[g].begin(), logits[g].end());
  }
  const NaiveDecoder::Pass expected = NaiveDecoder(model).run(
      sequence, [&](std::size_t layer, std::size_t q, std::size_t k) -> std::optional<double> {
        const auto [own, i] = places[q];
        const auto [other, j] = places[k];
        const auto rule = [&](std::size_t g) {
          Kept result = kept(company.options[g], model, layer);
          result.origin = 0;  // groups stand where the reader lays them
          return result;
        };
        const Moment& moment = moments[own][static_cast<std::size_t>(i)];
        const std::int64_t seen = own == other ? i + 1 : moment.seen[other];
        if (!rule(other).keeps(seen, j)) return std::nullopt;
        std::array<double, 3> start{};
        double end = 0;
        for (const std::int32_t id : company.order[own]) {
          const auto g = static_cast<std::size_t>(id);
          start[g] = end;
          end += rule(g).extent(g == own ? moment.own_before : moment.seen[g]);
        }
        return start[own] + rule(own).reader(i) - (start[other] + rule(other).key(seen, j));
      });
  const double difference = largest_difference(expected.logits, found);
  ASSERT_LE(difference, kTolerance);
  largest = std::max(largest, difference);
}

TEST_F(GroupStreaming, WritersThatSeeEachOtherEqualOneBatchPass) {
  double largest = 0;
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(2000 + seed);
    const PositionRule rule = seed % 2 == 0 ? PositionRule::kInCache : PositionRule::kInText;
    Company company;
    for (std::size_t g = 0; g < 3; ++g) {
      company.options[g] =
          seed % 3 == 0 ? full_cache(random)
                        : windowed_cache(random, rule,
                                         random.below(2) == 0 ? KeyForm::kRotated : KeyForm::kRaw);
      company.options[g].origin = kOffsets[random.below(kOffsets.size())];
      company.tokens[g] = random_tokens(random, between(random, 3, 12));
    }
    company.order[1] = {0, 2, 1};
    company.order[2] = {0, 1, 2};
    if (seed % 5 == 3) company.order[2] = {1, 0, 2};
    // The own tokens need not stand last.
    if (seed % 5 == 4) company.order[1] = {0, 1, 2};
    if (seed % 5 == 4) company.order[2] = {2, 0, 1};
    // Ranks are counted in the first layer, so trained windows go with text positions alone.
    check_company(*models_[seed % (rule == PositionRule::kInText ? 4 : 3)], company, random,
                  largest);
    if (HasFatalFailure()) return;
  }
  RecordProperty("largest_difference", std::to_string(largest));
}

// ---- The rest of a reader
// -------------------------------------------------------------------------

// The first WRITE of the released inference: the assistant's prefix sees itself in both directions.
TEST_F(GroupStreaming, ABidirectionalChunkSeesItselfWhole) {
  for (const std::int64_t window : {kUnlimitedWindow, std::int64_t{5}}) {
    Random random(7);
    const std::vector<Token> source = random_tokens(random, 6);
    const std::vector<Token> target = random_tokens(random, 9);
    CacheOptions source_options = full_cache(random);
    source_options.chunk_size = 8;
    CacheOptions target_options = source_options;
    target_options.origin = 0.5;
    if (window < kUnlimitedWindow) {
      target_options.policy = CachePolicy::kWindow;
      target_options.window_size = window;
      target_options.chunk_size = window;
    }
    const auto source_group =
        model(0).make_group<float>("source", 0, plan_cache(model(0).config(), source_options));
    const auto target_group =
        model(0).make_group<float>("target", 1, plan_cache(model(0).config(), target_options));
    Writer writer(model(0), 64);
    std::vector<float> found;
    writer.feed(source, source_group->cache(), {.own_group = 0}, found);
    source_group->cache().commit();
    source_group->publish();
    const GroupView<float> view = source_group->view(4);
    // Chunks of 4, 4 and 1 rows; the second sees all of itself and causally what was before.
    for (std::size_t first = 0; first < target.size(); first += 4) {
      writer.feed(std::span(target).subspan(first, std::min<std::size_t>(4, target.size() - first)),
                  target_group->cache(),
                  {.own_group = 1, .sees = {&view, 1}, .bidirectional = true}, found);
      target_group->cache().commit();
    }
    std::vector<Token> tokens = source;
    tokens.insert(tokens.end(), target.begin(), target.end());
    const NaiveDecoder::Pass expected = NaiveDecoder(model(0)).run(
        tokens, [&](std::size_t, std::size_t q, std::size_t k) -> std::optional<double> {
          if (q < 6) return k > q ? std::nullopt : std::optional(static_cast<double>(q - k));
          const double reader = 0.5 + static_cast<double>(q) - 6;
          if (k < 6) return k >= 4 ? std::nullopt : std::optional(reader - static_cast<double>(k));
          if ((k - 6) / 4 > (q - 6) / 4) return std::nullopt;
          if (static_cast<std::int64_t>(q) - static_cast<std::int64_t>(k) >= window)
            return std::nullopt;
          return static_cast<double>(q) - static_cast<double>(k);
        });
    EXPECT_LE(largest_difference(expected.logits, found), kTolerance);
  }
}

TEST_F(GroupStreaming, AProbeMeasuresTheMassOfTheNewestTokensOfAGroup) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(3000 + seed);
    const Decoder& decoder = *models_[seed % 3];
    const auto options = [&] {
      return seed % 4 == 0
                 ? full_cache(random)
                 : windowed_cache(random,
                                  seed % 2 == 0 ? PositionRule::kInText : PositionRule::kInCache,
                                  random.below(2) == 0 ? KeyForm::kRotated : KeyForm::kRaw);
    };
    Story story = random_story(random, 1);
    const CacheOptions source_options = options();
    const CacheOptions target_options = options();
    // Every row sees the whole source.
    std::fill(story.prefix.begin(), story.prefix.end(), story.source_size());
    const NaiveDecoder::Pass expected = batch_pass(decoder, story, source_options, target_options);
    const auto source =
        decoder.make_group<float>("source", 0, plan_cache(decoder.config(), source_options));
    const auto target =
        decoder.make_group<float>("target", 1, plan_cache(decoder.config(), target_options));
    Writer writer(decoder, 256);
    std::vector<float> unused;
    for (const Token& token : story.source) {
      writer.feed({&token, 1}, source->cache(), {.own_group = 0}, unused);
      source->cache().commit();
    }
    source->publish();
    const GroupView<float> view = source->view(story.source_size());
    for (std::size_t row = 0; row < story.target.size(); ++row) {
      const auto layer = random.below(static_cast<std::uint64_t>(decoder.config().num_layers()));
      const auto newest =
          between(random, 1, std::min<std::int64_t>(4, kept(source_options, decoder, 0).window));
      writer.feed(
          {&story.target[row], 1}, target->cache(),
          {.own_group = 1,
           .sees = {&view, 1},
           .probe = {.layer = static_cast<std::int64_t>(layer), .group = 0, .newest = newest}},
          unused);
      target->cache().commit();
      const std::span<const float> mass = writer.workspace.attention_mass();
      ASSERT_EQ(static_cast<std::int64_t>(mass.size()), decoder.config().num_qo_heads);
      for (std::size_t head = 0; head < mass.size(); ++head) {
        const std::vector<double>& weights =
            expected.weights[layer][head][story.source.size() + row];
        double sum = 0;
        for (std::int64_t j = std::max<std::int64_t>(0, story.source_size() - newest);
             j < story.source_size(); ++j)
          sum += weights[static_cast<std::size_t>(j)];
        // Shares, at most 1: the logits' tolerance is wide.
        ASSERT_NEAR(static_cast<double>(mass[head]), sum, kTolerance) << "row " << row;
      }
    }
  }
}

// ---- Plans
// ----------------------------------------------------------------------------------------

TEST_F(GroupStreaming, APlanMakesRoomForTheLeadAndPlacesTheOrigin) {
  const DecoderConfig& config = model(3).config();  // windows 4, none, 2
  CacheOptions options{.num_sink_tokens = 3, .window_size = 10, .chunk_size = 4, .origin = 17.25};
  const auto capacities = [&](std::int64_t lead) {
    options.lead = lead;
    std::vector<std::int64_t> result;
    for (const sluice::RetentionConfig& retention : plan_cache(config, options).retentions) {
      EXPECT_EQ(retention.origin, 17.25);
      EXPECT_EQ(sluice::Retention(retention).max_lead(), std::max(lead, retention.max_chunk - 1));
      result.push_back(retention.capacity);
    }
    return result;
  };
  // Sinks + window + chunk - 1, until the lead asks for more; local layers have smaller chunks.
  using Capacities = std::vector<std::int64_t>;
  EXPECT_EQ(capacities(0), (Capacities{16, 7, 3}));
  EXPECT_EQ(capacities(1), (Capacities{16, 7, 3}));
  EXPECT_EQ(capacities(3), (Capacities{16, 7, 5}));
  EXPECT_EQ(capacities(4), (Capacities{17, 8, 6}));
  EXPECT_EQ(capacities(100), (Capacities{113, 104, 102}));
  EXPECT_EQ(model(3).make_cache<float>(plan_cache(config, options)).max_lead(), 100);

  options = {.policy = CachePolicy::kFull, .capacity = 20, .lead = 100};
  EXPECT_EQ(plan_cache(model(0).config(), options).retentions[0].capacity, 20);

  for (const std::int64_t lead : {std::int64_t{-1}, sluice::kMaxLead + 1}) {
    try {
      plan_cache(config, {.lead = lead});
      ADD_FAILURE() << lead << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_EQ(error.detail().field, "lead");
      EXPECT_EQ(error.detail().expected, "0 to 4294967296");
      EXPECT_EQ(error.detail().found, std::to_string(lead));
    }
  }
}

TEST_F(GroupStreaming, AllLayersCountFromOnePosition) {
  CachePlan plan = plan_cache(model(3).config(), {.num_sink_tokens = 1, .window_size = 12});
  ASSERT_GT(plan.retentions.size(), 1U);
  plan.retentions.back().origin = 0.5;
  try {
    model(3).make_cache<float>(plan);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kConfig);
    EXPECT_EQ(error.detail().field, "origin");
  }
}

}  // namespace SLUICE_TEST_UNIT
