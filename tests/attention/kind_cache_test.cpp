// SPDX-License-Identifier: MIT
// Attention over a cache that keeps tokens by kind, against the definition in double: erase and
// move tokens in a list, number what is left anew on three axes, rotate everything.
#include "sluice/cache/kind_kv_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/vision_positions.hpp"
#include "support/naive_kinds.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kDim = 12;
constexpr std::int64_t kValueDim = 5;
constexpr int kPairs = 6;
constexpr double kTheta = 50;

struct Row {
  std::vector<float> key;    // [kKvHeads, kDim]
  std::vector<float> value;  // [kKvHeads, kValueDim]
};

std::vector<float> normals(std::int64_t count, Random& random) {
  std::vector<float> result(static_cast<std::size_t>(count));
  for (float& x : result) x = static_cast<float>(random.normal());
  return result;
}

/// Two pairs an axis.
double frequency(int pair) {
  return std::pow(kTheta, -2.0 * pair / kDim);
}

std::vector<double> attend_naively(const float* query, std::int64_t head,
                                   const test::NaiveKinds::Token& self,
                                   const std::vector<test::NaiveKinds::Token>& kept,
                                   const std::vector<Row>& rows) {
  const std::int64_t kv = head / (kHeads / kKvHeads);
  std::vector<double> weights;
  std::vector<double> out(kValueDim, 0.0);
  double sum = 0;
  for (const auto& token : kept) {
    if (token.index > self.index) continue;
    const float* key = rows[static_cast<std::size_t>(token.index)].key.data() + kv * kDim;
    double score = 0;
    for (int pair = 0; pair < kPairs; ++pair) {
      const auto axis = static_cast<std::size_t>(pair / 2);
      const double angle = (self.position[axis] - token.position[axis]) * frequency(pair);
      const double qa = static_cast<double>(query[pair]);
      const double qb = static_cast<double>(query[pair + kPairs]);
      const double ka = static_cast<double>(key[pair]);
      const double kb = static_cast<double>(key[pair + kPairs]);
      score += std::cos(angle) * (qa * ka + qb * kb) + std::sin(angle) * (qa * kb - qb * ka);
    }
    const double weight = std::exp(score / std::sqrt(static_cast<double>(kDim)));
    sum += weight;
    for (std::int64_t d = 0; d < kValueDim; ++d)
      out[static_cast<std::size_t>(d)] +=
          weight * static_cast<double>(rows[static_cast<std::size_t>(token.index)]
                                           .value[static_cast<std::size_t>(kv * kValueDim + d)]);
  }
  for (double& x : out) x /= sum;
  return out;
}

class Stream {
 public:
  explicit Stream(const KindRetentionConfig& config, std::uint64_t seed)
      : random_(seed),
        rotary_({.head_dim = kDim, .rotary_dim = kDim, .theta = kTheta, .sections = {2, 2, 2}}),
        cache_({1, kKvHeads, kDim, kValueDim}, config, std::array<const Rotary*, 1>{&rotary_}),
        naive_(config),
        table_(rotary_, config.max_chunk),
        team_(1),
        workspace_(&rotary_,
                   {.num_qo_heads = kHeads,
                    .num_kv_heads = kKvHeads,
                    .head_dim = kDim,
                    .value_dim = kValueDim,
                    .max_queries = config.max_chunk,
                    .max_keys = cache_.max_entries(),
                    .max_segments = KindKvCache<float>::kMaxSegments},
                   1) {}

  void begin_round() {
    cache_.begin_round();
    naive_.begin_round();
  }
  void span(SpanRole role, std::int64_t tokens, const VisionGrid& grid = {}) {
    const Position first = cache_.next_position();
    cache_.begin_span(role, grid);
    naive_.begin_span(role, grid);
    std::vector<Position3> positions(static_cast<std::size_t>(tokens));
    if (role == SpanRole::kVision)
      fill_positions(grid, first, positions);
    else
      fill_positions(TextRun{tokens}, first, positions);
    for (std::int64_t done = 0; done < tokens;) {
      const std::int64_t part =
          std::min(tokens - done, test::between(random_, 1, cache_.max_chunk()));
      chunk({positions.data() + done, static_cast<std::size_t>(part)});
      if (testing::Test::HasFatalFailure()) return;
      done += part;
    }
  }
  const KindKvCache<float>& cache() const { return cache_; }
  Random& random() { return random_; }

 private:
  void chunk(std::span<const Position3> positions) {
    const auto tokens = static_cast<std::int64_t>(positions.size());
    std::vector<float> keys;
    std::vector<float> values;
    for (std::int64_t t = 0; t < tokens; ++t) {
      rows_.push_back({normals(kKvHeads * kDim, random_), normals(kKvHeads * kValueDim, random_)});
      keys.insert(keys.end(), rows_.back().key.begin(), rows_.back().key.end());
      values.insert(values.end(), rows_.back().value.begin(), rows_.back().value.end());
      naive_.append(cache_.total() + t);
    }
    const std::int64_t first = cache_.total();
    cache_.append(tokens);
    table_.fill(positions);
    cache_.store(0, {keys.data(), tokens, kKvHeads, kDim},
                 {values.data(), tokens, kKvHeads, kValueDim}, table_.rows(), 0, tokens);
    const std::vector<float> query = normals(tokens * kHeads * kDim, random_);
    std::vector<float> out(static_cast<std::size_t>(tokens * kHeads * kValueDim));
    std::array<Segment<float>, KindKvCache<float>::kMaxSegments> segments;
    const auto count = static_cast<std::size_t>(cache_.segments(0, tokens, segments));
    attend(AttentionQuery{{query.data(), tokens, kHeads, kDim}, first, 0, positions.data()},
           std::span<const Segment<float>>(segments.data(), count),
           AttentionVariant<>{1 / std::sqrt(static_cast<float>(kDim))},
           HeadsView<float>(out.data(), tokens, kHeads, kValueDim), nullptr, workspace_, team_,
           cpu{});
    const std::vector<test::NaiveKinds::Token> kept = naive_.tokens();
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto self = std::find_if(kept.begin(), kept.end(),
                                     [&](const auto& token) { return token.index == first + t; });
      ASSERT_NE(self, kept.end());
      for (std::int64_t h = 0; h < kHeads; ++h) {
        const std::vector<double> expected =
            attend_naively(query.data() + (t * kHeads + h) * kDim, h, *self, kept, rows_);
        // Sums of 12 products of normals in float32, whose scores lie within 10: 2e-6 each way;
        // values within 4.
        for (std::int64_t d = 0; d < kValueDim; ++d)
          ASSERT_NEAR(out[static_cast<std::size_t>((t * kHeads + h) * kValueDim + d)],
                      expected[static_cast<std::size_t>(d)], 2e-5)
              << "token " << first + t << ", head " << h;
      }
    }
    cache_.commit();
  }

  Random random_;
  Rotary rotary_;
  KindKvCache<float> cache_;
  test::NaiveKinds naive_;
  RotaryTable table_;
  ThreadTeam team_;
  AttentionWorkspace<cpu> workspace_;
  std::vector<Row> rows_;
};

TEST(KindKvCache, EqualsItsDefinition) {
  for (const auto& [text, vision] : {std::pair{3, 3}, {5, 2}, {2, 4}}) {
    Stream stream(test::small_kinds(text, vision), static_cast<std::uint64_t>(10 * text + vision));
    Random& random = stream.random();
    stream.span(SpanRole::kHead, 2);
    stream.span(SpanRole::kPrevious, test::between(random, 0, 8));
    stream.span(SpanRole::kTail, 2);
    for (int round = 0; round < 25; ++round) {
      stream.begin_round();
      stream.span(SpanRole::kTurn, test::between(random, 0, 2));
      for (std::int64_t grids = test::between(random, 1, 2); grids > 0; --grids) {
        const VisionGrid grid{.frames = test::between(random, 1, 2),
                              .rows = 2,
                              .cols = test::between(random, 1, 3),
                              .frame_step = 0.5};
        stream.span(SpanRole::kVision, grid.num_tokens(), grid);
      }
      stream.span(SpanRole::kTurn, test::between(random, 0, 3));
      stream.span(SpanRole::kReply, test::between(random, 0, 4));
      ASSERT_FALSE(HasFatalFailure()) << "round " << round;
    }
    EXPECT_GT(stream.cache().tokens_moved(), 20);
  }
}

// A key that moves is rotated from what the model gave, and rounded once.
TEST(KindKvCache, MovesRepliesWithoutRoundingTwice) {
  const Rotary rotary({.head_dim = 8, .rotary_dim = 8});
  KindRetentionConfig config = test::small_kinds(1, 1);
  config.text_sinks = 0;
  KindKvCache<bf16> cache({2, 1, 8, 4}, config, std::array<const Rotary*, 2>{&rotary, &rotary});
  Random random(5);
  RotaryTable table(rotary, 4);
  std::vector<std::vector<float>> said;
  std::vector<std::vector<float>> values;
  for (int round = 0; round < 9; ++round) {
    cache.begin_round();
    cache.begin_span(SpanRole::kReply);
    cache.append(2);
    table.fill_run(cache.next_position() - 2, 2);
    said.push_back(normals(2 * 8, random));
    values.push_back(normals(2 * 4, random));
    for (std::int64_t layer = 0; layer < 2; ++layer)
      cache.store(layer, {said.back().data(), 2, 1, 8}, {values.back().data(), 2, 1, 4},
                  table.rows(), 0, 2);
    cache.commit();
  }
  // 16 texts moved, the last 7 are kept: texts 9 to 15, in two runs of the ring.
  std::array<Segment<bf16>, KindKvCache<bf16>::kMaxSegments> segments;
  const int count = cache.segments(1, 1, segments);
  std::int64_t text = 9;
  for (int s = 0; s < count && text < 16; ++s) {
    const Segment<bf16>& segment = segments[static_cast<std::size_t>(s)];
    for (std::int64_t i = 0; i < segment.rule.count; ++i, ++text) {
      const auto round = static_cast<std::size_t>(text / 2);
      std::array<float, 8> angles{};
      std::array<bf16, 8> expected{};
      rotary.angles(static_cast<Position>(text), angles.data());
      rotary.rotate(angles.data(), said[round].data() + text % 2 * 8, expected.data());
      for (std::size_t d = 0; d < 8; ++d)
        EXPECT_EQ(segment.key(0, i)[d].bits, expected[d].bits) << "text " << text;
      for (std::size_t d = 0; d < 4; ++d)
        EXPECT_EQ(segment.value(0, i)[d].bits,
                  bf16(values[round][static_cast<std::size_t>(text % 2 * 4) + d]).bits);
    }
  }
  EXPECT_EQ(text, 16);
}

}  // namespace SLUICE_TEST_UNIT
