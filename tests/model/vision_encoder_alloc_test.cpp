// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "sluice/model/vision_encoder.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

TEST(VisionEncoderAllocations, AreNone) {
  const sluice::VisionEncoderConfig config{.width = 32,
                                           .num_layers = 2,
                                           .num_heads = 4,
                                           .feed_forward_width = 48,
                                           .out_width = 16,
                                           .patch_size = 4,
                                           .window_size = 16,
                                           .whole_layers = {1}};
  const sluice::VisionEncoder encoder = sluice::VisionEncoder::random(config, 1);
  sluice::ThreadTeam team(2);
  sluice::VisionEncoder::Workspace workspace(encoder, 3, 4, 2);
  std::vector<float> patches(static_cast<std::size_t>(48 * config.patch_values()));
  const std::int64_t before = sluice::test::allocation_count();
  for (int i = 0; i < 20; ++i)
    encoder.encode({patches.data(), 48, config.patch_values()}, workspace, team);
  EXPECT_EQ(sluice::test::allocation_count(), before);
}

}  // namespace SLUICE_TEST_UNIT
