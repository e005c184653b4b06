// SPDX-License-Identifier: MIT
// Linear layers allocate nothing once their workspace and team exist.
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/nn/linear.hpp"
#include "support/count_allocations.hpp"
#include "support/test_unit.hpp"
#include "support/random_matrix.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

TEST(LinearAllocations, NoneForAnyTypeOrNumberOfTokens) {
  LinearWorkspace exact(512, 2);
  LinearWorkspace rounded(512, 2, Activations::kInt8);
  LinearWorkspace pairs(512, 2, Activations::kBf16, 16);
  ThreadTeam team(2);
  for (const ElementType type :
       {ElementType::kF32, ElementType::kF16, ElementType::kBF16, ElementType::kQ8_0,
        ElementType::kQ4_0, ElementType::kQ4_1, ElementType::kQ4_K, ElementType::kQ6_K}) {
    const test::RandomMatrix weight(type, 70, 512, 13);
    const std::vector<float> x = test::random_values(30 * 512, 14);
    std::vector<float> y(30 * 70);
    const std::int64_t before = test::allocation_count();
    for (LinearWorkspace* workspace : {&exact, &rounded, &pairs})
      for (const std::int64_t tokens : {1, 4, 8, 9, 30})
        linear_add(weight.view, MatrixView<const float>{x.data(), tokens, 512}, nullptr,
                   MatrixView<float>{y.data(), tokens, 70}, *workspace, team);
    const std::int64_t after = test::allocation_count();
    EXPECT_EQ(after, before) << to_string(type);
  }
}

TEST(LinearAllocations, AreCounted) {
  const std::int64_t before = test::allocation_count();
  LinearWorkspace workspace(32, 1);
  EXPECT_GT(test::allocation_count(), before);
}

}  // namespace
}  // namespace SLUICE_TEST_UNIT
