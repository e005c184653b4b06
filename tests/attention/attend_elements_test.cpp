// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <type_traits>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/core/element.hpp"
#include "support/attention_scene.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::AttentionVariant;
using sluice::bf16;
using sluice::f16;
using sluice::Position;
using sluice::SegmentRule;
using sluice::test::add_sinks_and_ring;
using sluice::test::causal;
using sluice::test::Extents;
using sluice::test::rotary_for;
using sluice::test::run_at;
using sluice::test::scale_for;
using sluice::test::Scene;

template <class Key_, class Value_>
struct ElementPair {
  using Key = Key_;
  using Value = Value_;
};

template <class Types>
class AttendElements : public testing::Test {};
using ElementPairs =
    testing::Types<ElementPair<float, float>, ElementPair<f16, f16>, ElementPair<bf16, bf16>,
                   ElementPair<f16, bf16>, ElementPair<bf16, float>>;
TYPED_TEST_SUITE(AttendElements, ElementPairs);

TYPED_TEST(AttendElements, AgreeWithTheNaiveListInAllShapes) {
  const std::int64_t dims[] = {8, 16, 64, 80, 96, 128, 256};
  const std::int64_t groups[] = {1, 2, 3, 4, 5, 7, 8};
  constexpr bool kFloat = std::is_same_v<typename TypeParam::Key, float>;
  std::uint64_t turn = 0;
  for (const std::int64_t dim : dims) {
    for (const std::int64_t tokens : {1, 2, 3, 17, 64, 130}) {
      // Every width meets every number of rows, and with one row, whose kernels differ by ratio,
      // every ratio. Elsewhere ratios and value widths go round.
      const std::int64_t next_group = groups[turn++ % std::size(groups)];
      for (const std::int64_t group : groups) {
        if (tokens > 1 && group != next_group) continue;
        if (!kFloat && (tokens == 17 || tokens == 64)) continue;  // the other types differ in loads
        const bool own_width = tokens == 1 ? group == next_group : turn % 3 == 0;
        const Extents extents{.kv_heads = group < 4 ? 2 : 1,
                              .group = group,
                              .dim = dim,
                              .value_dim = own_width ? dim / 2 + 3 : dim};
        SCOPED_TRACE(testing::Message() << "dim " << dim << ", value dim " << extents.value_dim
                                        << ", group " << group << ", rows " << tokens);
        Scene<typename TypeParam::Key, typename TypeParam::Value> scene(extents, rotary_for(dim),
                                                                        turn);
        const std::int64_t window = tokens > 60 ? 140 : 300;
        const std::int64_t total = 1000;
        add_sinks_and_ring(scene, 4, total - tokens - (window - 1), total, window / 3, window);
        scene.check(scene.queries(tokens), total - tokens, static_cast<Position>(total - tokens),
                    AttentionVariant<>{.sm_scale = scale_for(dim),
                                       .visibility = {.window_size = window, .num_sink_tokens = 4}},
                    causal(window, 4));
        if (this->HasFailure()) return;
      }
    }
  }
}

TYPED_TEST(AttendElements, RawKeysAreRotatedWhileTheyAreRead) {
  for (const std::int64_t dim : {16, 80, 96, 128}) {
    for (const std::int64_t tokens : {1, 19}) {
      SCOPED_TRACE(testing::Message() << "dim " << dim << ", rows " << tokens);
      Scene<typename TypeParam::Key, typename TypeParam::Value> scene(
          {.kv_heads = 2, .group = 3, .dim = dim, .value_dim = dim}, rotary_for(dim), 5);
      SegmentRule pinned = run_at(0, 3);
      pinned.ceiling = 30;
      scene.add(pinned, true);
      SegmentRule window = run_at(5000, 300);  // numbered from 3, as a raw cache does
      window.first_position = 3;
      window.shift = -4997;
      scene.add(window, true);
      scene.check(scene.queries(tokens), 5300 - tokens, static_cast<Position>(5300 - tokens),
                  AttentionVariant<>{.sm_scale = scale_for(dim)}, causal());
    }
  }
}

TYPED_TEST(AttendElements, WithoutRotation) {
  for (const std::int64_t dim : {5, 64}) {
    for (const std::int64_t tokens : {1, 7}) {
      Scene<typename TypeParam::Key, typename TypeParam::Value> scene(
          {.kv_heads = 1, .group = 2, .dim = dim, .value_dim = dim}, std::nullopt, 6);
      scene.add(run_at(0, 150));
      scene.check(scene.queries(tokens), 150 - tokens, 0.0,
                  AttentionVariant<>{.sm_scale = scale_for(dim)}, causal());
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
