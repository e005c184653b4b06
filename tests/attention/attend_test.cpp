// SPDX-License-Identifier: MIT
#include "sluice/attention/attend.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/alibi.hpp"
#include "sluice/position/rotary.hpp"
#include "support/attention_scene.hpp"
#include "support/naive_attention.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::AlibiBias;
using sluice::AllVisible;
using sluice::attend;
using sluice::AttentionQuery;
using sluice::AttentionShape;
using sluice::AttentionVariant;
using sluice::AttentionWorkspace;
using sluice::bf16;
using sluice::CausalWindow;
using sluice::cpu;
using sluice::f16;
using sluice::HeadsView;
using sluice::KeyInfo;
using sluice::PlainScores;
using sluice::Position;
using sluice::QueryInfo;
using sluice::Random;
using sluice::Rotary;
using sluice::Segment;
using sluice::SegmentRule;
using sluice::SinkLogits;
using sluice::SoftCap;
using sluice::SoftmaxOffByOne;
using sluice::ThreadTeam;
using sluice::TileVisibility;
using sluice::TokenKind;
using sluice::test::add_sinks_and_ring;
using sluice::test::causal;
using sluice::test::Extents;
using sluice::test::naive_attention;
using sluice::test::NaiveKey;
using sluice::test::NaiveResult;
using sluice::test::NaiveRotation;
using sluice::test::NaiveVariant;
using sluice::test::Outcome;
using sluice::test::rotary_for;
using sluice::test::run_at;
using sluice::test::scale_for;
using sluice::test::Scene;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// ---- Typed-in tests -----------------------------------------------------------------------------

/// One KV head whose keys and values are given; channels beyond the given ones are 0, so that the
/// same numbers also go through kernels for wider heads.
struct TypedIn {
  std::int64_t dim;
  std::int64_t value_dim;
  std::deque<std::vector<float>> keys;
  std::deque<std::vector<float>> values;
  std::vector<Segment<float>> segments;

  static std::vector<float> padded(const std::vector<std::vector<float>>& rows, std::int64_t dim) {
    std::vector<float> result(rows.size() * static_cast<std::size_t>(dim));
    for (std::size_t r = 0; r < rows.size(); ++r)
      std::copy(rows[r].begin(), rows[r].end(),
                result.begin() + static_cast<std::ptrdiff_t>(r) * dim);
    return result;
  }
  void add(std::int64_t first_index, const std::vector<std::vector<float>>& key_rows,
           const std::vector<std::vector<float>>& value_rows) {
    Segment<float> segment;
    segment.rule = run_at(first_index, static_cast<std::int64_t>(key_rows.size()));
    segment.keys = keys.emplace_back(padded(key_rows, dim)).data();
    segment.values = values.emplace_back(padded(value_rows, value_dim)).data();
    segment.key_token_stride = dim;
    segment.value_token_stride = value_dim;
    segments.push_back(segment);
  }
  template <class Variant>
  Outcome run(const std::vector<std::vector<float>>& query_rows, std::int64_t heads,
              std::int64_t first_index, const Variant& variant, const Rotary* rotary = nullptr,
              Position first_position = 0) const {
    const std::vector<float> rows = padded(query_rows, dim);
    const auto tokens = static_cast<std::int64_t>(query_rows.size()) / heads;
    AttentionWorkspace<cpu> workspace(rotary,
                                      {.num_qo_heads = heads,
                                       .num_kv_heads = 1,
                                       .head_dim = dim,
                                       .value_dim = value_dim,
                                       .max_queries = tokens,
                                       .max_keys = 64},
                                      1);
    ThreadTeam team(1);
    Outcome outcome;
    outcome.out.resize(static_cast<std::size_t>(tokens * heads * value_dim));
    outcome.lse.resize(static_cast<std::size_t>(tokens * heads));
    attend(AttentionQuery{{rows.data(), tokens, heads, dim}, first_index, first_position},
           std::span<const Segment<float>>(segments), variant,
           HeadsView<float>(outcome.out.data(), tokens, heads, value_dim), outcome.lse.data(),
           workspace, team, cpu{});
    return outcome;
  }
};

class AttendTypedIn : public testing::TestWithParam<std::int64_t> {
 protected:
  std::int64_t dim() const { return GetParam(); }
};

TEST_P(AttendTypedIn, MergeableParts) {
  // core-algorithms 0.4 and 9.2: z = [1, 2, 0.5] as products with a query of 1. Six decimals are
  // printed there. Whole, and as the parts {0, 1} and {2}.
  const std::vector<std::vector<float>> keys{{1}, {2}, {0.5F}};
  const std::vector<std::vector<float>> values{{1, 0}, {0, 1}, {1, 1}};
  TypedIn whole{dim(), dim(), {}, {}, {}};
  whole.add(0, keys, values);
  TypedIn parts{dim(), dim(), {}, {}, {}};
  parts.add(0, {keys[0], keys[1]}, {values[0], values[1]});
  parts.add(2, {keys[2]}, {values[2]});
  for (const TypedIn* way : {&whole, &parts}) {
    const Outcome plain = way->run({{1}}, 1, 2, AttentionVariant<>{.sm_scale = 1});
    EXPECT_NEAR(plain.out[0], 0.371468, 1e-6);
    EXPECT_NEAR(plain.out[1], 0.768776, 1e-6);
    EXPECT_NEAR(plain.lse[0], 2.464369, 1e-6);
    const std::vector<float> logits{1.5F};
    const Outcome sink = way->run(
        {{1}}, 1, 2,
        AttentionVariant<CausalWindow, PlainScores, SinkLogits>{.sm_scale = 1, .sink = {logits}});
    EXPECT_NEAR(sink.out[0], 0.268941, 1e-6);  // counted twice: 0.210768
    EXPECT_NEAR(sink.out[1], 0.556591, 1e-6);
    EXPECT_NEAR(sink.lse[0], 2.464369, 1e-6);  // without the sink
    const Outcome off_by_one = way->run(
        {{1}}, 1, 2, AttentionVariant<CausalWindow, PlainScores, SoftmaxOffByOne>{.sm_scale = 1});
    EXPECT_NEAR(off_by_one.out[0], 0.342347, 1e-6);
    EXPECT_NEAR(off_by_one.out[1], 0.708509, 1e-6);
  }
}

TEST_P(AttendTypedIn, LearnedSinkLogits) {
  // core-algorithms 9.3: four decimals are printed. As one chunk and token by token.
  const double full[4][4] = {{0.6225, 0, 0.3775, 0},
                             {0.2741, 0.4519, 0.1863, 0.3072},
                             {0.6225, 0.6225, 0.5, 0.5},
                             {1.2750, 0.2157, 1.0950, 0.1853}};
  const double window_2[4][4] = {{0.6225, 0, 0.3775, 0},
                                 {0.2741, 0.4519, 0.1863, 0.3072},
                                 {0.5065, 0.8137, 0.3837, 0.6163},
                                 {1.4883, 0.2312, 1.1993, 0.1863}};
  TypedIn scene{dim(), dim(), {}, {}, {}};
  scene.add(0, {{1, 0}, {0, 1}, {1, 1}, {1, -1}}, {{1, 0}, {0, 1}, {1, 1}, {2, 0}});
  const std::vector<float> logits{0, 1};
  const std::vector<std::vector<float>> rows{{1, 0}, {0, 1}, {1, 1}, {2, -1}};
  for (const bool windowed : {false, true}) {
    AttentionVariant<CausalWindow, PlainScores, SinkLogits> variant{.sm_scale = 0.5F,
                                                                    .sink = {logits}};
    if (windowed) variant.visibility.window_size = 2;
    const auto& expected = windowed ? window_2 : full;
    std::vector<std::vector<float>> both_heads;
    for (const auto& row : rows) both_heads.insert(both_heads.end(), {row, row});
    const Outcome chunk = scene.run(both_heads, 2, 0, variant);
    for (std::size_t t = 0; t < 4; ++t) {
      const Outcome alone = scene.run({rows[t], rows[t]}, 2, static_cast<std::int64_t>(t), variant);
      for (std::size_t head = 0; head < 2; ++head)
        for (std::size_t d = 0; d < 2; ++d) {
          const auto width = static_cast<std::size_t>(dim());
          EXPECT_NEAR(chunk.out[(t * 2 + head) * width + d], expected[t][head * 2 + d], 5e-5)
              << "token " << t;
          EXPECT_NEAR(alone.out[head * width + d], expected[t][head * 2 + d], 5e-5)
              << "token " << t;
        }
    }
  }
}

TEST_P(AttendTypedIn, PositionsInTheCacheAndInTheText) {
  // core-algorithms 1.2: start 1, recent 2; token 4 reads tokens 0, 2, 3 and itself. One pair is
  // rotated, f = 1. Six decimals are printed; scores are seen through lse of one key alone.
  const Rotary rotary({.head_dim = static_cast<int>(dim()), .rotary_dim = 2, .theta = 10000});
  const std::vector<std::vector<float>> raw{{1, 0}, {0, 1}, {1, 1}, {1, -1}};
  const std::vector<std::vector<float>> values{{1, 0}, {0, 1}, {1, 1}, {2, 0}};
  const std::int64_t tokens[] = {0, 2, 3, 4};
  const auto rotated = [&](std::size_t i, double position) {
    std::vector<float> row(static_cast<std::size_t>(rotary.row_size()));
    rotary.angles(position, row.data());
    std::vector<float> key(static_cast<std::size_t>(dim()));
    std::copy(raw[i].begin(), raw[i].end(), key.begin());
    rotary.rotate(row.data(), key.data(), key.data());
    return key;
  };
  const auto scene_for = [&](const double(&positions)[4], double sink_shift, double sink_ceiling) {
    auto scene = std::make_unique<TypedIn>(TypedIn{dim(), dim(), {}, {}, {}});
    for (std::size_t i = 0; i < 4; ++i) {
      scene->add(tokens[i], {rotated(i, positions[i])}, {values[i]});
      scene->segments.back().rule.first_position = positions[i];
    }
    scene->segments[0].rule.shift = sink_shift;
    scene->segments[0].rule.ceiling = sink_ceiling;
    return scene;
  };
  const AttentionVariant<> variant{.sm_scale = 1 / std::sqrt(2.0F)};
  const double in_cache_scores[] = {-0.749924, 0.495840, 0.870582, 0.353553};
  const double in_text_scores[] = {-0.194626, 0.495840, 0.870582, 0.353553};
  const struct {
    std::unique_ptr<TypedIn> scene;
    Position query;
    const double* scores;
    double out[2];
  } rows[] = {
      // Keys rotated at their ranks, the query at its own.
      {scene_for({0, 1, 2, 3}, 0, sluice::kNoCeiling), 3, in_cache_scores, {0.963258, 0.680004}},
      {scene_for({0, 2, 3, 4}, 0, sluice::kNoCeiling), 4, in_text_scores, {0.965311, 0.642010}},
      // Keys at text positions, the sink read as if at 1: by a shift, or by a ceiling.
      {scene_for({0, 2, 3, 4}, -1, sluice::kNoCeiling), 4, in_cache_scores, {0.963258, 0.680004}},
      {scene_for({0, 2, 3, 4}, 0, 3), 4, in_cache_scores, {0.963258, 0.680004}},
  };
  for (const auto& row : rows) {
    const Outcome outcome = row.scene->run({{1, 0.5F}}, 1, 4, variant, &rotary, row.query);
    EXPECT_NEAR(outcome.out[0], row.out[0], 1e-6);
    EXPECT_NEAR(outcome.out[1], row.out[1], 1e-6);
    for (std::size_t i = 0; i < 4; ++i) {
      TypedIn alone{dim(), dim(), {}, {}, {row.scene->segments[i]}};
      EXPECT_NEAR(alone.run({{1, 0.5F}}, 1, 4, variant, &rotary, row.query).lse[0], row.scores[i],
                  1e-6)
          << "key " << i;
    }
  }

  // ALiBi, slope 0.5, keys of zeros: the scores are the biases.
  const std::vector<float> slopes{0.5F};
  const AttentionVariant<CausalWindow, AlibiBias> alibi{.sm_scale = 1, .transform = {slopes}};
  for (const bool in_cache : {true, false}) {
    const double biases[] = {in_cache ? -1.5 : -2.0, -1, -0.5, 0};
    for (std::size_t i = 0; i < 4; ++i) {
      TypedIn alone{dim(), dim(), {}, {}, {}};
      alone.add(tokens[i], {{0, 0}}, {values[i]});
      if (in_cache && i == 0) alone.segments[0].rule.shift = -1;
      EXPECT_EQ(alone.run({{1, 0.5F}}, 1, 4, alibi, nullptr, 4).lse[0],
                static_cast<float>(biases[i]));
    }
  }
}

// 2 channels go through the general kernel, the others through those for one query row.
INSTANTIATE_TEST_SUITE_P(Widths, AttendTypedIn, testing::Values(2, 16, 64));

// ---- Segments -----------------------------------------------------------------------------------

TEST(AttendSegments, AnyListIsReadUnderItsRules) {
  // Groups at positions of their own, some of them real, visible prefixes that hide all or part,
  // empty segments, gaps of a cache that evicts on request, more keys than one split takes.
  for (const std::int64_t tokens : {1, 3, 40}) {
    for (const std::int64_t dim : {16, 24, 64}) {
      for (const bool raw : {false, true}) {
        SCOPED_TRACE(testing::Message() << tokens << " rows, dim " << dim << ", raw " << raw);
        Scene<float, float> scene({.kv_heads = 2, .group = 2, .dim = dim, .value_dim = dim},
                                  rotary_for(dim), 17);
        SegmentRule source = run_at(0, 270);
        source.visible = 261;
        source.group = 1;
        source.shift = -800.5;
        scene.add(source, raw);
        SegmentRule hidden = run_at(300, 50);
        hidden.visible = 0;
        scene.add(hidden, raw);
        scene.add(run_at(400, 0), raw);
        SegmentRule vision = run_at(500, 130);
        vision.first_position = 12.25;
        vision.shift = -870;
        vision.ceiling = 90.75;
        vision.kind = TokenKind::kVision;
        scene.add(vision, raw);
        for (const std::int64_t first : {700, 760, 820}) {  // gaps: each run has its shift
          SegmentRule run = run_at(first, 40);
          run.shift = static_cast<Position>(first - 820) / 2;
          scene.add(run, raw);
        }
        SegmentRule target = run_at(900, 100);
        target.first_position = 0.5;
        target.shift = -899.5;
        scene.add(target, raw);
        const std::vector<float> rows = scene.queries(tokens);
        const std::int64_t first = 1000 - tokens;
        scene.check(rows, first, static_cast<Position>(first),
                    AttentionVariant<>{.sm_scale = scale_for(dim)}, causal());
        scene.check(rows, first, static_cast<Position>(first),
                    AttentionVariant<AllVisible>{.sm_scale = scale_for(dim)},
                    {.visible = [](const QueryInfo&, const KeyInfo&) {
                      return true;
                    }});
      }
    }
  }
}

TEST(AttendSegments, HeadsOfEverySizeAndGroups) {
  // Widths of one to sixteen registers and between, groups that fill kernels' blocks of heads or
  // leave some, values as wide as keys or not; a ring that has wrapped, and few and many rows, with
  // the last panel of a block full or nearly empty.
  Random random(5);
  for (const std::int64_t dim : {16, 40, 48, 64, 80, 96, 112, 128, 256}) {
    for (const std::int64_t group : {1, 2, 3, 4, 5, 7, 8}) {
      if (dim > 128 && group > 3) continue;
      const std::int64_t value_dim = group % 3 == 0 ? dim + 16 : dim;
      const std::int64_t tokens =
          group % 2 == 0 ? 1 : 1 + static_cast<std::int64_t>(random.below(30));
      const auto window = static_cast<std::int64_t>(60 + random.below(80));
      const auto cut = static_cast<std::int64_t>(1 + random.below(50));
      SCOPED_TRACE(testing::Message() << "dim " << dim << ", group " << group << ", " << tokens
                                      << " rows, window " << window << ", cut " << cut);
      for (const std::int64_t rows_at_once : {tokens, std::int64_t{1}}) {
        Scene<f16, bf16> scene({.kv_heads = 1, .group = group, .dim = dim, .value_dim = value_dim},
                               rotary_for(dim), static_cast<std::uint64_t>(dim + group));
        const std::int64_t total = 500;
        add_sinks_and_ring(scene, 4, total - rows_at_once - window + 1, total, cut, window);
        const std::int64_t first = total - rows_at_once;
        scene.check(scene.queries(rows_at_once), first, static_cast<Position>(first),
                    AttentionVariant<>{.sm_scale = scale_for(dim),
                                       .visibility = {.window_size = window, .num_sink_tokens = 4}},
                    causal(window, 4));
      }
    }
  }
}

TEST(AttendSegments, GroupsOfMoreHeadsThanABlockHasColumns) {
  Scene<float, float> scene({.kv_heads = 1, .group = 230, .dim = 16, .value_dim = 16},
                            rotary_for(16), 3);
  scene.add(run_at(0, 140));
  for (const std::int64_t tokens : {1, 3})
    scene.check(scene.queries(tokens), 140 - tokens, static_cast<Position>(140 - tokens),
                AttentionVariant<>{.sm_scale = 0.25F}, causal());
}

TEST(AttendSegments, EveryLengthAroundTilesAndSplits) {
  for (const std::int64_t count : {1,   2,   15,  16,  17,  63,  64,  65,  127,  128,  129, 255,
                                   256, 257, 383, 385, 511, 512, 513, 770, 2047, 2049, 2300}) {
    for (const std::int64_t tokens : {1, 3}) {
      SCOPED_TRACE(testing::Message() << count << " keys, " << tokens << " rows");
      Scene<float, float> scene({.kv_heads = 1, .group = 3, .dim = 32, .value_dim = 32},
                                rotary_for(32), static_cast<std::uint64_t>(count));
      scene.add(run_at(0, count));
      scene.check(scene.queries(tokens), count - 1, static_cast<Position>(count - 1),
                  AttentionVariant<>{.sm_scale = scale_for(32)}, causal());
    }
  }
}

TEST(AttendSegments, WindowsOf127To129KeysHoldAsManyKeys) {
  // With scores of 0 the log-sum-exp is the logarithm of the number of keys.
  for (const std::int64_t window : {127, 128, 129}) {
    for (const std::int64_t sinks : {0, 4}) {
      TypedIn scene{16, 16, {}, {}, {}};
      const std::vector<std::vector<float>> zeros(300);
      scene.add(0, {zeros.begin(), zeros.begin() + 4}, {zeros.begin(), zeros.begin() + 4});
      scene.add(4, {zeros.begin() + 4, zeros.end()}, {zeros.begin() + 4, zeros.end()});
      AttentionWorkspace<cpu> workspace(nullptr,
                                        {.num_qo_heads = 1,
                                         .num_kv_heads = 1,
                                         .head_dim = 16,
                                         .value_dim = 16,
                                         .max_queries = 300,
                                         .max_keys = 300},
                                        1);
      ThreadTeam team(1);
      const std::vector<float> rows(300 * 16, 1.0F);
      std::vector<float> out(rows.size());
      std::vector<float> lse(300);
      const AttentionVariant<> variant{
          .sm_scale = 1, .visibility = {.window_size = window, .num_sink_tokens = sinks}};
      const std::span<const Segment<float>> segments(scene.segments);
      const auto expect = [&](std::int64_t query, float found) {
        std::int64_t keys = std::min(query + 1, window);
        keys += std::min(sinks, query + 1 - keys);
        EXPECT_FLOAT_EQ(found, std::log(static_cast<float>(keys)))
            << "query " << query << ", window " << window << ", sinks " << sinks;
      };
      attend(AttentionQuery{{rows.data(), 300, 1, 16}, 0, 0}, segments, variant,
             HeadsView<float>(out.data(), 300, 1, 16), lse.data(), workspace, team, cpu{});
      for (std::int64_t query = 0; query < 300; ++query)
        expect(query, lse[static_cast<std::size_t>(query)]);
      for (std::int64_t query = 120; query < 140; ++query) {
        float alone = 0;
        attend(AttentionQuery{{rows.data(), 1, 1, 16}, query, static_cast<Position>(query)},
               segments, variant, HeadsView<float>(out.data(), 1, 1, 16), &alone, workspace, team,
               cpu{});
        expect(query, alone);
      }
    }
  }
}

TEST(AttendSegments, RowsThatSeeNothingAreZero) {
  const std::vector<float> logits{0.5F, -1};
  for (const std::int64_t value_dim : {16, 10}) {  // with and without the kernel for one row
    for (const std::int64_t tokens : {1, 6}) {
      Scene<float, float> scene({.kv_heads = 1, .group = 2, .dim = 16, .value_dim = value_dim},
                                rotary_for(16), 3);
      scene.add(run_at(103, 300));  // the first three of six queries see none of it
      const std::vector<float> rows = scene.queries(tokens);
      const NaiveVariant naive = causal();
      const Outcome plain =
          scene.check(rows, 100, 100, AttentionVariant<>{.sm_scale = 0.25F}, naive);
      NaiveVariant naive_sink = naive;
      naive_sink.sink = [&](std::int64_t head) {
        return static_cast<double>(logits[static_cast<std::size_t>(head)]);
      };
      const Outcome sink = scene.check(rows, 100, 100,
                                       AttentionVariant<CausalWindow, PlainScores, SinkLogits>{
                                           .sm_scale = 0.25F, .sink = {logits}},
                                       naive_sink);
      const auto masked_tokens = static_cast<std::size_t>(std::min<std::int64_t>(tokens, 3));
      for (const Outcome* outcome : {&plain, &sink}) {
        for (std::size_t i = 0; i < masked_tokens * 2; ++i)
          EXPECT_EQ(outcome->lse[i], kMinusInfinity);
        for (std::size_t i = 0; i < masked_tokens * 2 * static_cast<std::size_t>(value_dim); ++i)
          EXPECT_EQ(outcome->out[i], 0.0F);
      }
    }
  }
}

TEST(AttendSegments, NoSegmentsAtAll) {
  for (const std::int64_t value_dim : {16, 10}) {
    Scene<float, float> scene({.kv_heads = 2, .group = 2, .dim = 16, .value_dim = value_dim},
                              rotary_for(16), 3);
    for (const std::int64_t tokens : {1, 4}) {
      const Outcome outcome =
          scene.run(scene.queries(tokens), 5, 5, AttentionVariant<>{.sm_scale = 1});
      EXPECT_EQ(outcome.out, std::vector<float>(outcome.out.size(), 0.0F));
      EXPECT_EQ(outcome.lse, std::vector<float>(outcome.lse.size(), kMinusInfinity));
    }
  }
}

/// A functor of a user: vision is seen from even positions, group 1 by everybody, and text is
/// causal.
struct ByKind {
  bool visible(QueryInfo query, KeyInfo key) const {
    if (key.group == 1) return true;
    if (key.kind == TokenKind::kVision) return std::fmod(query.position, 2) == 0;
    return key.index <= query.index;
  }
  TileVisibility classify(std::int64_t, std::int64_t, KeyInfo, std::int64_t) const {
    return TileVisibility::kSome;
  }
};

TEST(AttendVariants, FunctorsSeeIndexPositionKindAndGroup) {
  for (const std::int64_t tokens : {1, 9}) {
    for (const double start : {10.0, 11.0}) {
      Scene<float, float> scene({.kv_heads = 1, .group = 1, .dim = 16, .value_dim = 16},
                                rotary_for(16), 8);
      SegmentRule group = run_at(1000, 20);  // ahead of every query
      group.group = 1;
      scene.add(group);
      SegmentRule vision = run_at(0, 30);
      vision.kind = TokenKind::kVision;
      scene.add(vision);
      scene.add(run_at(35, 30));
      scene.check(scene.queries(tokens), 40, start, AttentionVariant<ByKind>{.sm_scale = 0.25F},
                  {.visible = [](const QueryInfo& query, const KeyInfo& key) {
                    return ByKind{}.visible(query, key);
                  }});
    }
  }
}

// ---- Score transforms and sink terms ------------------------------------------------------------

/// One and several rows over sinks, a wrapped window and more than one split.
template <class Variant>
void check_variant(const Variant& variant, const NaiveVariant& naive, std::int64_t window,
                   std::int64_t sinks, bool rotates) {
  for (const std::int64_t dim : {16, 40, 64}) {
    for (const std::int64_t tokens : {1, 5, 70}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << ", rows " << tokens);
      Scene<float, float> scene({.kv_heads = 2, .group = 3, .dim = dim, .value_dim = dim},
                                rotates ? std::optional<Rotary>(rotary_for(dim)) : std::nullopt, 9);
      const std::int64_t total = 2000;
      add_sinks_and_ring(scene, sinks, total - tokens - (window - 1), total, window / 2, window);
      scene.check(scene.queries(tokens), total - tokens, static_cast<Position>(total - tokens),
                  variant, naive);
    }
  }
}

TEST(AttendVariants, SoftCapBoundsScores) {
  NaiveVariant naive = causal(700, 4);
  naive.transform = [](std::int64_t, double score, double) {
    return 3 * std::tanh(score / 3);
  };
  check_variant(AttentionVariant<CausalWindow, SoftCap>{.sm_scale = 0.6F,
                                                        .visibility = {.window_size = 700,
                                                                       .num_sink_tokens = 4},
                                                        .transform = {.cap = 3}},
                naive, 700, 4, true);
}

TEST(AttendVariants, AlibiIsLinearInTheDistance) {
  const std::vector<float> slopes = sluice::alibi_slopes(6);
  NaiveVariant naive = causal(700, 4);
  naive.transform = [&](std::int64_t head, double score, double distance) {
    return score - static_cast<double>(slopes[static_cast<std::size_t>(head)]) * distance;
  };
  check_variant(AttentionVariant<CausalWindow, AlibiBias>{.sm_scale = 0.2F,
                                                          .visibility = {.window_size = 700,
                                                                         .num_sink_tokens = 4},
                                                          .transform = {slopes}},
                naive, 700, 4, false);
}

TEST(AttendVariants, SinkLogitsCountOnceHoweverKeysAreSplit) {
  // 700 keys and sinks: one row is computed as at least four parts, several rows as seven tiles.
  const std::vector<float> logits{0, 1, 5, -3, 9, 2};
  NaiveVariant naive = causal(700, 4);
  naive.sink = [&](std::int64_t head) {
    return static_cast<double>(logits[static_cast<std::size_t>(head)]);
  };
  check_variant(
      AttentionVariant<CausalWindow, PlainScores, SinkLogits>{
          .sm_scale = 0.3F,
          .visibility = {.window_size = 700, .num_sink_tokens = 4},
          .sink = {logits}},
      naive, 700, 4, true);
}

TEST(AttendVariants, SoftmaxOffByOneIsASinkOfZero) {
  NaiveVariant naive = causal(700, 4);
  naive.sink = [](std::int64_t) {
    return 0.0;
  };
  check_variant(
      AttentionVariant<CausalWindow, PlainScores, SoftmaxOffByOne>{
          .sm_scale = 0.3F, .visibility = {.window_size = 700, .num_sink_tokens = 4}},
      naive, 700, 4, true);
}

TEST(AttendVariants, TransformAndSinkTogether) {
  const std::vector<float> logits{2, 1, 0, -1, -2, kMinusInfinity};
  NaiveVariant naive = causal(130);
  naive.transform = [](std::int64_t, double score, double) {
    return 5 * std::tanh(score / 5);
  };
  naive.sink = [&](std::int64_t head) {
    return static_cast<double>(logits[static_cast<std::size_t>(head)]);
  };
  check_variant(
      AttentionVariant<CausalWindow, SoftCap, SinkLogits>{.sm_scale = 0.5F,
                                                          .visibility = {.window_size = 130},
                                                          .transform = {.cap = 5},
                                                          .sink = {logits}},
      naive, 130, 0, true);
}

TEST(AttendVariants, ASinkFarAboveOrBelowTheScores) {
  for (const std::int64_t tokens : {1, 2}) {
    Scene<float, float> scene({.kv_heads = 1, .group = 2, .dim = 16, .value_dim = 16},
                              rotary_for(16), 4);
    scene.add(run_at(0, 20));
    const std::vector<float> logits{1000, -1000};
    const Outcome outcome = scene.run(scene.queries(tokens), 19, 19,
                                      AttentionVariant<CausalWindow, PlainScores, SinkLogits>{
                                          .sm_scale = 0.25F, .sink = {logits}});
    for (std::size_t i = 0; i < 16; ++i) EXPECT_EQ(outcome.out[i], 0.0F);
    for (std::size_t i = 16; i < 32; ++i) EXPECT_NE(outcome.out[i], 0.0F);
    for (const float value : outcome.out) EXPECT_TRUE(std::isfinite(value));
  }
}

// ---- Numbers ------------------------------------------------------------------------------------

TEST(AttendNumbers, LargeScoresDoNotOverflow) {
  // Small integers times powers of two: products and their sums are exact in float, so scores up
  // to 1e4 have no error and the bound is that of the softmax alone.
  for (const std::int64_t tokens : {1, 4}) {
    for (const float sign : {1.0F, -1.0F}) {
      TypedIn scene{16, 16, {}, {}, {}};
      std::vector<std::vector<float>> keys;
      std::vector<std::vector<float>> values;
      std::vector<double> scores;
      Random random(6);
      for (int j = 0; j < 40; ++j) {
        const auto a = static_cast<float>(random.below(5));
        keys.push_back({sign * 9996, a});
        values.push_back({static_cast<float>(random.normal()), 1});
        scores.push_back(static_cast<double>(sign) * 9996 + static_cast<double>(a));
      }
      scene.add(0, keys, values);
      double sum = 0;
      double out = 0;
      for (std::size_t j = 0; j < scores.size(); ++j) {
        const double weight = std::exp(scores[j] - scores[0]);
        sum += weight;
        out += weight * static_cast<double>(values[j][0]);
      }
      const std::vector<std::vector<float>> rows(static_cast<std::size_t>(tokens), {1, 1});
      const Outcome outcome = scene.run(rows, 1, 39, AttentionVariant<>{.sm_scale = 1});
      for (std::size_t t = 0; t < rows.size(); ++t) {
        EXPECT_NEAR(static_cast<double>(outcome.out[t * 16]), out / sum, 100 * 0x1p-24 * 4);
        EXPECT_NEAR(static_cast<double>(outcome.out[t * 16 + 1]), 1, 100 * 0x1p-24);
        // Half an ulp at 1e4.
        EXPECT_NEAR(static_cast<double>(outcome.lse[t]), scores[0] + std::log(sum), 0x1p-10);
      }
    }
  }
}

TEST(AttendNumbers, ScoresFarApartLeaveTheLargest) {
  for (const std::int64_t tokens : {1, 3}) {
    TypedIn scene{16, 16, {}, {}, {}};
    // The largest comes last, in a later split than the first 300 keys.
    std::vector<std::vector<float>> keys(310, {-10000});
    std::vector<std::vector<float>> values(310, {5, 1});
    keys[305] = {10000};
    values[305] = {-3, 1};
    scene.segments.reserve(2);
    TypedIn small{16, 16, {}, {}, {}};
    scene.add(0, keys, values);
    AttentionWorkspace<cpu> workspace(nullptr,
                                      {.num_qo_heads = 1,
                                       .num_kv_heads = 1,
                                       .head_dim = 16,
                                       .value_dim = 16,
                                       .max_queries = tokens,
                                       .max_keys = 310},
                                      1);
    ThreadTeam team(1);
    const std::vector<float> rows(static_cast<std::size_t>(tokens * 16), 1.0F);
    std::vector<float> out(rows.size());
    std::vector<float> lse(static_cast<std::size_t>(tokens));
    attend(AttentionQuery{{rows.data(), tokens, 1, 16}, 309, 309},
           std::span<const Segment<float>>(scene.segments), AttentionVariant<>{.sm_scale = 1},
           HeadsView<float>(out.data(), tokens, 1, 16), lse.data(), workspace, team, cpu{});
    for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
      EXPECT_EQ(out[t * 16], -3.0F);
      EXPECT_EQ(out[t * 16 + 1], 1.0F);
      EXPECT_EQ(lse[t], 10000.0F);
    }
  }
}

TEST(AttendNumbers, AHundredMillionTokensInScoresAreTheSame) {
  // The same keys and queries at positions around 1e3 and around 1e8. Rotations at the two places
  // round differently: two results of one bound each; the angles, formed in double, add
  // 1e8 * 2^-53 rad = 1.1e-8, a fifth of a rounding. Float angles would be off by radians.
  for (const std::int64_t tokens : {1, 20}) {
    for (const bool raw : {false, true}) {
      Outcome outcomes[3];
      double bound = 0;
      double lse_bound = 0;
      const Position bases[] = {1e3, 1e8, 1e8 + 0.5};
      for (int place = 0; place < 3; ++place) {
        const auto base = static_cast<std::int64_t>(bases[place]);
        Scene<float, float> scene({.kv_heads = 2, .group = 2, .dim = 64, .value_dim = 64},
                                  rotary_for(64), 12);  // one seed: the same content
        SegmentRule sinks = run_at(0, 4);
        sinks.ceiling = 203;
        scene.add(sinks, raw);
        SegmentRule window = run_at(base, 300);
        window.first_position = bases[place];
        if (raw) {
          window.first_position = 4;
          window.shift = 4 - bases[place];
        }
        scene.add(window, raw);
        const std::vector<float> rows = scene.queries(tokens);
        const AttentionVariant<> variant{.sm_scale = scale_for(64),
                                         .visibility = {.window_size = 200, .num_sink_tokens = 4}};
        const Position first = bases[place] + static_cast<Position>(300 - tokens);
        outcomes[place] = scene.run(rows, base + 300 - tokens, first, variant);
        for (std::int64_t t = 0; t < tokens && place == 0; ++t)
          for (std::int64_t head = 0; head < 4; ++head) {
            const NaiveResult exact =
                scene.naive(rows.data() + (t * 4 + head) * 64,
                            {base + 300 - tokens + t, first + static_cast<Position>(t)}, head,
                            static_cast<double>(variant.sm_scale), causal(200, 4));
            bound = std::max(bound, exact.out_bound);
            lse_bound = std::max(lse_bound, exact.lse_bound);
          }
      }
      for (int place = 1; place < 3; ++place) {
        for (std::size_t i = 0; i < outcomes[0].out.size(); ++i)
          ASSERT_NEAR(outcomes[place].out[i], outcomes[0].out[i], 2.2 * bound);
        for (std::size_t i = 0; i < outcomes[0].lse.size(); ++i)
          ASSERT_NEAR(outcomes[place].lse[i], outcomes[0].lse[i], 2.2 * lse_bound);
      }
    }
  }
}

// ---- Calls --------------------------------------------------------------------------------------

TEST(AttendCalls, TheTeamsSizeChangesNoBit) {
  for (const std::int64_t tokens : {1, 2, 33, 150}) {
    for (const std::int64_t dim : {20, 64}) {
      const Extents extents{.kv_heads = 3, .group = 3, .dim = dim, .value_dim = dim};
      Scene<bf16, bf16> scene(extents, rotary_for(dim), 2);
      add_sinks_and_ring(scene, 4, 2000 - tokens - 599, 2000, 250, 600);
      const std::vector<float> rows = scene.queries(tokens);
      const AttentionVariant<> variant{.sm_scale = scale_for(dim),
                                       .visibility = {.window_size = 600, .num_sink_tokens = 4}};
      const Outcome one =
          scene.run(rows, 2000 - tokens, static_cast<Position>(2000 - tokens), variant, 1);
      for (const int threads : {2, 3, 4}) {
        const Outcome more =
            scene.run(rows, 2000 - tokens, static_cast<Position>(2000 - tokens), variant, threads);
        EXPECT_EQ(more.out, one.out) << threads << " threads";
        EXPECT_EQ(more.lse, one.lse) << threads << " threads";
      }
    }
  }
}

TEST(AttendCalls, SubsetsOfHeadsWriteTheirRowsAlone) {
  // Segments that hold some KV heads, in any order, give those heads' rows of the full call bit for
  // bit and leave the others alone, whatever the number of threads; kernels for one query row, wide
  // and narrow, and for several.
  const std::vector<float> slopes{0.5F, 0.25F, 0.125F, 0.0625F, 0.03F, 0.02F, 0.01F, 0.005F};
  const std::vector<float> logits{0.5F, -1, 2, 0.25F, 1, -2, 0, 3};
  const std::vector<std::vector<std::int32_t>> subsets{{0}, {3}, {2, 0}, {1, 3, 2}, {3, 2, 1, 0}};
  for (const std::int64_t tokens : {1, 3, 70}) {
    for (const std::int64_t dim : {20, 64}) {
      Scene<f16, f16> scene({.kv_heads = 4, .group = 2, .dim = dim, .value_dim = dim},
                            rotary_for(dim), 31);
      add_sinks_and_ring(scene, 4, 400, 1000, 250, 600);
      const std::vector<float> rows = scene.queries(tokens);
      const AttentionVariant<CausalWindow, AlibiBias, SinkLogits> variant{
          .sm_scale = scale_for(dim),
          .visibility = {.window_size = 600, .num_sink_tokens = 4},
          .transform = {slopes},
          .sink = {logits}};
      const std::int64_t first = 1000 - tokens;
      const Outcome full = scene.run(rows, first, static_cast<Position>(first), variant);
      for (const std::vector<std::int32_t>& subset : subsets) {
        // The chosen heads' storage, gathered in the subset's order.
        std::deque<std::vector<f16>> storage;
        std::vector<Segment<f16>> segments;
        for (Segment<f16> segment : scene.segments()) {
          const auto gather = [&](const f16* from, std::int64_t& stride) {
            std::vector<f16>& to = storage.emplace_back();
            for (const std::int32_t head : subset)
              to.insert(to.end(), from + head * stride, from + (head + 1) * stride);
            return to.data();
          };
          segment.keys = gather(segment.keys, segment.key_head_stride);
          segment.values = gather(segment.values, segment.value_head_stride);
          segments.push_back(segment);
        }
        for (const int threads : {1, 3}) {
          AttentionWorkspace<cpu> workspace(scene.rotary(),
                                            {.num_qo_heads = 8,
                                             .num_kv_heads = 4,
                                             .head_dim = dim,
                                             .value_dim = dim,
                                             .max_queries = tokens,
                                             .max_keys = 1000},
                                            threads);
          ThreadTeam team(threads);
          std::vector<float> out(full.out.size(), -77.0F);
          std::vector<float> lse(full.lse.size(), -77.0F);
          attend(AttentionQuery{.rows = {rows.data(), tokens, 8, dim},
                                .first_index = first,
                                .first_position = static_cast<Position>(first),
                                .kv_heads = subset},
                 std::span<const Segment<f16>>(segments), variant,
                 HeadsView<float>(out.data(), tokens, 8, dim), lse.data(), workspace, team, cpu{});
          for (std::size_t row = 0; row < lse.size(); ++row) {
            const auto kv_head = static_cast<std::int32_t>(row % 8 / 2);
            const bool chosen = std::find(subset.begin(), subset.end(), kv_head) != subset.end();
            ASSERT_EQ(lse[row], chosen ? full.lse[row] : -77.0F) << "row " << row;
            for (std::size_t i = row * static_cast<std::size_t>(dim);
                 i < (row + 1) * static_cast<std::size_t>(dim); ++i)
              ASSERT_EQ(out[i], chosen ? full.out[i] : -77.0F) << "row " << row;
          }
          if (tokens > 3) continue;
          std::vector<double> reference(out.size(), -77.0);
          std::vector<double> reference_lse(lse.size(), -77.0);
          attend_reference(HeadsView<const float>(rows.data(), tokens, 8, dim), first,
                           static_cast<Position>(first), std::span<const Segment<f16>>(segments),
                           variant, scene.rotary(), 4,
                           HeadsView<double>(reference.data(), tokens, 8, dim),
                           reference_lse.data(), subset);
          // Values are below 4.5 and weights sum to 1; the bound of check() is wider than this.
          for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], reference[i], 3e-5);
          for (std::size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], reference_lse[i], 3e-5);
        }
      }
    }
  }
}

TEST(AttendCalls, AWorkspaceMayBeUsedAgainAndAgain) {
  // Rotations are kept from call to call: other places, shapes and lists must not show through.
  const Rotary rotary = rotary_for(32);
  const Extents extents{.kv_heads = 1, .group = 4, .dim = 32, .value_dim = 32};
  AttentionWorkspace<cpu> workspace(&rotary,
                                    {.num_qo_heads = 4,
                                     .num_kv_heads = 1,
                                     .head_dim = 32,
                                     .value_dim = 32,
                                     .max_queries = 20,
                                     .max_keys = 1000},
                                    1);
  ThreadTeam team(1);
  Random random(13);
  for (std::uint64_t call = 0; call < 60; ++call) {
    Scene<float, float> scene(extents, rotary, call);
    const auto tokens = static_cast<std::int64_t>(1 + random.below(20));
    const auto first = static_cast<std::int64_t>(random.below(3) * 400);
    for (std::uint64_t s = 0; s <= random.below(6); ++s) {
      SegmentRule rule =
          run_at(static_cast<std::int64_t>(s) * 60, static_cast<std::int64_t>(random.below(60)));
      rule.shift = -static_cast<Position>(random.below(3));
      if (random.below(2) == 0) rule.ceiling = static_cast<Position>(395 + random.below(20));
      scene.add(rule);
    }
    const std::vector<float> rows = scene.queries(tokens);
    const AttentionVariant<> variant{.sm_scale = 0.2F};
    const Outcome fresh = scene.run(rows, first, static_cast<Position>(first), variant);
    std::vector<float> out(fresh.out.size());
    std::vector<float> lse(fresh.lse.size());
    attend(AttentionQuery{{rows.data(), tokens, 4, 32}, first, static_cast<Position>(first)},
           scene.segments(), variant, HeadsView<float>(out.data(), tokens, 4, 32), lse.data(),
           workspace, team, cpu{});
    ASSERT_EQ(out, fresh.out) << "call " << call;
    ASSERT_EQ(lse, fresh.lse) << "call " << call;
  }
}

// Few rows over many keys: keys are cut into parts that are merged, at places that no number of
// threads changes. The windows end inside a part, and one part is hidden from every row.
TEST(AttendCalls, FewRowsOverManyKeys) {
  Scene<f16, f16> scene({.kv_heads = 2, .group = 3, .dim = 32, .value_dim = 32}, rotary_for(32), 9);
  add_sinks_and_ring(scene, 4, 704, 3700, 1900, 3700);
  for (const std::int64_t tokens : {2, 9, 17}) {
    const std::vector<float> rows = scene.queries(tokens);
    const std::int64_t first = 3700 - tokens;
    for (const std::int64_t window : {300, 2001}) {
      const AttentionVariant<> variant{
          .sm_scale = 0.2F, .visibility = {.window_size = window, .num_sink_tokens = 4}};
      const Outcome alone =
          scene.check(rows, first, static_cast<Position>(first), variant, causal(window, 4));
      const Outcome three = scene.run(rows, first, static_cast<Position>(first), variant, 3);
      EXPECT_EQ(alone.out, three.out);
      EXPECT_EQ(alone.lse, three.lse);
    }
  }
}

TEST(AttendCalls, RowsMayBePassedInParts) {
  Scene<f16, f16> scene({.kv_heads = 2, .group = 2, .dim = 64, .value_dim = 64}, rotary_for(64), 7);
  add_sinks_and_ring(scene, 4, 701, 1000, 120, 200);
  const std::int64_t width = 4 * 64;
  const std::vector<float> rows = scene.queries(100);
  const AttentionVariant<> variant{.sm_scale = 0.125F,
                                   .visibility = {.window_size = 200, .num_sink_tokens = 4}};
  const Outcome whole = scene.run(rows, 900, 900, variant);
  for (const std::int64_t part : {1, 7, 64}) {
    for (std::int64_t first = 0; first < 100; first += part) {
      const std::int64_t count = std::min(part, 100 - first);
      const Outcome some =
          scene.run({rows.begin() + first * width, rows.begin() + (first + count) * width},
                    900 + first, static_cast<Position>(900 + first), variant);
      // Two float results of the same sums in other orders; values are below 4.5, weights sum to 1.
      for (std::size_t i = 0; i < some.out.size(); ++i)
        ASSERT_NEAR(some.out[i], whole.out[static_cast<std::size_t>(first * width) + i], 2e-5);
      for (std::size_t i = 0; i < some.lse.size(); ++i)
        ASSERT_NEAR(some.lse[i], whole.lse[static_cast<std::size_t>(first * 4) + i], 2e-5);
    }
  }
}

TEST(AttendCalls, StridesAreRespectedAndLseIsOptional) {
  for (const std::int64_t tokens : {1, 5}) {
    Scene<float, float> scene({.kv_heads = 2, .group = 2, .dim = 16, .value_dim = 16},
                              rotary_for(16), 7);
    scene.add(run_at(0, 40));
    const std::vector<float> rows = scene.queries(tokens);
    const AttentionVariant<> variant{.sm_scale = 0.25F};
    const Outcome packed = scene.run(rows, 40 - tokens, 3, variant);
    // Queries inside a joint [q, k, v] row, outputs inside a wider one.
    std::vector<float> wide(static_cast<std::size_t>(tokens * 100), 9.0F);
    std::vector<float> out(static_cast<std::size_t>(tokens * 70), 9.0F);
    for (std::int64_t t = 0; t < tokens; ++t)
      std::copy_n(rows.begin() + t * 64, 64, wide.begin() + t * 100 + 10);
    AttentionWorkspace<cpu> workspace(scene.rotary(),
                                      {.num_qo_heads = 4,
                                       .num_kv_heads = 2,
                                       .head_dim = 16,
                                       .value_dim = 16,
                                       .max_queries = 5,
                                       .max_keys = 40},
                                      1);
    ThreadTeam team(1);
    attend(AttentionQuery{{wide.data() + 10, tokens, 4, 16, 100}, 40 - tokens, 3}, scene.segments(),
           variant, HeadsView<float>(out.data() + 2, tokens, 4, 16, 70), nullptr, workspace, team,
           cpu{});
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = 0; i < 70; ++i) {
        const float found = out[static_cast<std::size_t>(t * 70 + i)];
        if (i < 2 || i >= 66)
          ASSERT_EQ(found, 9.0F) << "written beside the rows";
        else
          ASSERT_EQ(found, packed.out[static_cast<std::size_t>(t * 64 + i - 2)]);
      }
  }
}

TEST(AttendCalls, ValuesMayBeTheFirstChannelsOfTheKeys) {
  // Multi-head latent attention: one stored row of 24 is the key, its first 16 channels the value.
  for (const std::int64_t value_dim : {16, 24}) {
    for (const std::int64_t tokens : {1, 6}) {
      const std::int64_t count = 150;
      Random random(21);
      std::vector<float> rows(static_cast<std::size_t>(count * 24));
      for (float& x : rows) x = static_cast<float>(random.normal());
      std::vector<float> copied;
      for (std::int64_t j = 0; j < count; ++j)
        copied.insert(copied.end(), rows.begin() + j * 24, rows.begin() + j * 24 + value_dim);
      Segment<float> segment;
      segment.rule = run_at(0, count);
      segment.keys = rows.data();
      segment.values = rows.data();
      segment.key_token_stride = segment.value_token_stride = 24;
      Segment<float> apart = segment;
      apart.values = copied.data();
      apart.value_token_stride = value_dim;
      std::vector<float> queries(static_cast<std::size_t>(tokens * 3 * 24));
      for (float& x : queries) x = static_cast<float>(random.normal());
      AttentionWorkspace<cpu> workspace(nullptr,
                                        {.num_qo_heads = 3,
                                         .num_kv_heads = 1,
                                         .head_dim = 24,
                                         .value_dim = value_dim,
                                         .max_queries = tokens,
                                         .max_keys = count},
                                        1);
      ThreadTeam team(1);
      std::vector<float> out[2];
      for (int way = 0; way < 2; ++way) {
        out[way].resize(static_cast<std::size_t>(tokens * 3 * value_dim));
        attend(AttentionQuery{{queries.data(), tokens, 3, 24}, count - tokens, 0},
               std::span<const Segment<float>>(way == 0 ? &segment : &apart, 1),
               AttentionVariant<>{.sm_scale = 0.2F},
               HeadsView<float>(out[way].data(), tokens, 3, value_dim), nullptr, workspace, team,
               cpu{});
      }
      EXPECT_EQ(out[0], out[1]);
      // And it is right: the last row, head 0, in double.
      std::vector<double> q(queries.end() - 3 * 24, queries.end() - 2 * 24);
      std::vector<double> all(rows.begin(), rows.end());
      std::vector<NaiveKey> list;
      for (std::size_t j = 0; j < static_cast<std::size_t>(count); ++j)
        list.push_back({std::span(all).subspan(j * 24, 24),
                        std::span(all).subspan(j * 24, static_cast<std::size_t>(value_dim)), 0});
      const NaiveResult exact =
          naive_attention(q, list, static_cast<std::size_t>(value_dim), NaiveRotation(),
                          {.sm_scale = static_cast<double>(0.2F)});
      for (std::int64_t d = 0; d < value_dim; ++d)
        EXPECT_NEAR(out[0][static_cast<std::size_t>((tokens - 1) * 3 * value_dim + d)],
                    exact.out[static_cast<std::size_t>(d)], exact.out_bound);
    }
  }
}

TEST(AttendWorkspace, ErrorsNameTheExtent) {
  const Rotary rotary = rotary_for(16);
  const AttentionShape good{.num_qo_heads = 6,
                            .num_kv_heads = 2,
                            .head_dim = 16,
                            .value_dim = 16,
                            .max_queries = 4,
                            .max_keys = 32};
  const auto with = [&](auto change) {
    AttentionShape shape = good;
    change(shape);
    return shape;
  };
  const struct {
    AttentionShape shape;
    int team;
    sluice::ErrorCode code;
    std::string field;
    std::string expected;
    std::string found;
  } rows[] = {
      {with([](auto& s) { s.num_kv_heads = 0; }), 1, sluice::ErrorCode::kShape, "num_kv_heads",
       "at least 1", "0"},
      {with([](auto& s) { s.num_qo_heads = 5; }), 1, sluice::ErrorCode::kShape, "num_qo_heads",
       "a multiple of num_kv_heads = 2", "5"},
      {with([](auto& s) { s.num_qo_heads = 0; }), 1, sluice::ErrorCode::kShape, "num_qo_heads",
       "a multiple of num_kv_heads = 2", "0"},
      {with([](auto& s) { s.head_dim = 0; }), 1, sluice::ErrorCode::kShape, "head_dim",
       "at least 1", "0"},
      {with([](auto& s) { s.head_dim = 32; }), 1, sluice::ErrorCode::kShape, "head_dim",
       "the rotation's, 16", "32"},
      {with([](auto& s) { s.value_dim = -2; }), 1, sluice::ErrorCode::kShape, "value_dim",
       "at least 1", "-2"},
      {with([](auto& s) { s.max_queries = 0; }), 1, sluice::ErrorCode::kShape, "max_queries",
       "at least 1", "0"},
      {with([](auto& s) { s.max_keys = 0; }), 1, sluice::ErrorCode::kShape, "max_keys",
       "at least 1", "0"},
      {good, 0, sluice::ErrorCode::kConfig, "team_size", "at least 1", "0"},
  };
  for (const auto& row : rows) {
    try {
      AttentionWorkspace<cpu>(&rotary, row.shape, row.team);
      ADD_FAILURE() << row.field << " was accepted";
    } catch (const sluice::Error& error) {
      EXPECT_EQ(error.code(), row.code) << error.what();
      EXPECT_EQ(error.detail().where, "AttentionWorkspace");
      EXPECT_EQ(error.detail().field, row.field);
      EXPECT_EQ(error.detail().expected, row.expected);
      EXPECT_EQ(error.detail().found, row.found);
    }
  }
  const AttentionWorkspace<cpu> workspace(&rotary, good, 2);
  EXPECT_EQ(workspace.shape().num_qo_heads, 6);
  EXPECT_EQ(workspace.rotary()->head_dim(), 16);
  EXPECT_GT(workspace.bytes(), 0U);
  EXPECT_EQ(AttentionWorkspace<cpu>(nullptr, good, 1).rotary(), nullptr);
}

}  // namespace SLUICE_TEST_UNIT
