// SPDX-License-Identifier: MIT
/// That sampling and measuring allocate nothing once constructed. An executable of its own: it
/// replaces the allocation functions.
#include <vector>

#include <gtest/gtest.h>

#include "sluice/stream/event_log.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/sampler.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

TEST(SamplerAllocations, SamplingAllocatesNothing) {
  Random random(9);
  std::vector<float> logits(5000);
  for (float& logit : logits) logit = static_cast<float>(random.normal());
  for (const SamplerOptions& options :
       {SamplerOptions{}, SamplerOptions{.temperature = 1.0, .repetition_penalty = 1.1},
        SamplerOptions{.temperature = 1.0, .top_k = 40, .top_p = 0.9, .min_p = 0.05},
        SamplerOptions{.temperature = 1.0, .top_p = 0.9}}) {
    Sampler sampler(options, 5000);
    const std::int64_t before = test::allocation_count();
    for (int i = 0; i < 100; ++i) sampler.accept(sampler.sample(logits));
    sampler.reset();
    EXPECT_EQ(test::allocation_count(), before);
  }
}

TEST(MetricsAllocations, MeasuringAndReportingAllocateNothing) {
  StreamMetrics metrics;
  EventLog log(100);
  LatencyHistogram merged;
  const std::int64_t before = test::allocation_count();
  std::int64_t now = 0;
  for (Token token = 0; token < 10'000; ++token) {
    now += 1000 + token;
    metrics.on_input(now, 1);
    metrics.on_input_done(500, 1);
    metrics.on_output(now + 700);
    log.record({token, now, token, EventKind::kOutput});
    if (token % 1000 == 999) metrics.on_turn_end();
  }
  merged.merge(metrics.inter_token());
  const auto report = metrics.report();
  metrics.reset();
  log.clear();
  EXPECT_EQ(test::allocation_count(), before);
  EXPECT_EQ(report.tokens_written, 10'000);
  EXPECT_EQ(merged.count(), 9990);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
