// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/core/element.hpp"
#include "sluice/position/rotary.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::attend;
using sluice::AttentionQuery;
using sluice::AttentionVariant;
using sluice::AttentionWorkspace;
using sluice::cpu;
using sluice::f16;
using sluice::GroupScale;
using sluice::HeadsView;
using sluice::int4x2;
using sluice::Rotary;
using sluice::Segment;
using sluice::ThreadTeam;

/// Query rows and threads.
class AttendAllocations : public testing::TestWithParam<std::tuple<std::int64_t, int>> {};

TEST_P(AttendAllocations, AreNone) {
  const auto [tokens, threads] = GetParam();
  const Rotary rotary({.head_dim = 64, .rotary_dim = 64});
  const std::vector<f16> rows(400 * 2 * 64, f16(0.125F));
  Segment<f16> sinks;
  sinks.rule = {.count = 4, .visible = 4, .ceiling = 303};
  sinks.keys = sinks.values = rows.data();
  sinks.key_token_stride = sinks.value_token_stride = 64;
  sinks.key_head_stride = sinks.value_head_stride = 400 * 64;
  Segment<f16> window = sinks;
  window.rule = {.first_index = 600, .count = 396, .visible = 396, .first_position = 600};
  std::vector<float> table(static_cast<std::size_t>(4 * rotary.row_size()));
  for (std::int64_t i = 0; i < 4; ++i)
    rotary.angles(static_cast<double>(i), table.data() + i * rotary.row_size());
  sinks.key_rotation = table.data();  // raw keys beside rotated ones
  sinks.key_rotation_stride = rotary.row_size();
  const Segment<f16> segments[] = {sinks, window};

  const std::vector<float> queries(static_cast<std::size_t>(tokens * 6 * 64), 0.5F);
  std::vector<float> out(queries.size());
  std::vector<float> lse(static_cast<std::size_t>(tokens * 6));
  AttentionWorkspace<cpu> workspace(&rotary,
                                    {.num_qo_heads = 6,
                                     .num_kv_heads = 2,
                                     .head_dim = 64,
                                     .value_dim = 64,
                                     .max_queries = tokens,
                                     .max_keys = 400},
                                    threads);
  ThreadTeam team(threads);
  const AttentionVariant<> variant{.sm_scale = 0.125F,
                                   .visibility = {.window_size = 300, .num_sink_tokens = 4}};
  const std::int64_t before = sluice::test::allocation_count();
  for (std::int64_t call = 0; call < 20; ++call)
    attend(
        AttentionQuery{
            {queries.data(), tokens, 6, 64}, 900 + call, static_cast<double>(900 + call)},
        std::span<const Segment<f16>>(segments), variant,
        HeadsView<float>(out.data(), tokens, 6, 64), lse.data(), workspace, team, cpu{});
  EXPECT_EQ(sluice::test::allocation_count(), before);
  EXPECT_NEAR(out.back(), 0.125F, 1e-6);
}

TEST_P(AttendAllocations, AreNoneOverQuantisedRows) {
  const auto [tokens, threads] = GetParam();
  const std::vector<int4x2> keys(400 * 2 * 32, int4x2{0x11});
  const std::vector<GroupScale> key_scales(400 * 2, {f16(0.5F), f16(-0.5F)});  // keys of 0
  const std::vector<std::int8_t> values(400 * 2 * 64, std::int8_t{4});
  const std::vector<float> value_scales(400 * 2, 0.25F);
  Segment<int4x2, std::int8_t> segment;
  segment.rule = {.count = 400, .visible = 400};
  segment.keys = keys.data();
  segment.values = values.data();
  segment.key_scales = key_scales.data();
  segment.value_scales = value_scales.data();
  segment.key_token_stride = 32;
  segment.value_token_stride = 64;
  segment.key_head_stride = 400 * 32;
  segment.value_head_stride = 400 * 64;
  segment.key_scale_token_stride = segment.value_scale_token_stride = 1;
  segment.key_scale_head_stride = segment.value_scale_head_stride = 400;
  const std::vector<float> queries(static_cast<std::size_t>(tokens * 6 * 64), 0.5F);
  std::vector<float> out(queries.size());
  AttentionWorkspace<cpu> workspace(nullptr,
                                    {.num_qo_heads = 6,
                                     .num_kv_heads = 2,
                                     .head_dim = 64,
                                     .value_dim = 64,
                                     .max_queries = tokens,
                                     .max_keys = 400},
                                    threads);
  ThreadTeam team(threads);
  const std::int64_t before = sluice::test::allocation_count();
  for (std::int64_t call = 0; call < 20; ++call)
    attend(AttentionQuery{{queries.data(), tokens, 6, 64}, 900},
           std::span<const Segment<int4x2, std::int8_t>>(&segment, 1), AttentionVariant<>{0.125F},
           HeadsView<float>(out.data(), tokens, 6, 64), nullptr, workspace, team, cpu{});
  EXPECT_EQ(sluice::test::allocation_count(), before);
  EXPECT_NEAR(out.back(), 1.0F, 1e-6);
}

INSTANTIATE_TEST_SUITE_P(RowsAndThreads, AttendAllocations,
                         testing::Combine(testing::Values(1, 64), testing::Values(1, 2)),
                         [](const auto& param) {
                           return "rows" + std::to_string(std::get<0>(param.param)) + "threads" +
                                  std::to_string(std::get<1>(param.param));
                         });

}  // namespace SLUICE_TEST_UNIT
