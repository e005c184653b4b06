// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "sluice/nn/log_mel.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::LogMel;
using sluice::LogMelConfig;
using sluice::MelNormaliser;

TEST(LogMelAllocations, AreNone) {
  LogMelConfig cumulative = LogMelConfig::nemo();
  cumulative.normaliser = MelNormaliser::kCumulative;
  for (const LogMelConfig& config :
       {LogMelConfig::kaldi(), LogMelConfig::whisper_running_maximum(), cumulative}) {
    const LogMel front_end(config);
    LogMel::State state = front_end.make_state();
    LogMel::State copy = front_end.make_state();
    const std::vector<float> samples(1000, 0.25F);
    std::vector<float> rows(10 * 80);
    const std::int64_t before = sluice::test::allocation_count();
    for (int i = 0; i < 20; ++i) {
      front_end.step(samples, state, {rows.data(), 10, 80});
      copy = state;
    }
    front_end.flush(state, {rows.data(), 10, 80});
    front_end.reset(state);
    EXPECT_EQ(sluice::test::allocation_count(), before);
  }
}

}  // namespace SLUICE_TEST_UNIT
