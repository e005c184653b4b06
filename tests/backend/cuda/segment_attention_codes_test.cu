// SPDX-License-Identifier: MIT
/// Segment attention over rows of 8 bits.
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "support/test_unit.hpp"

#include "backend/cuda/segment_check.cuh"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using namespace sluice_test;

template <class Element, int kHeadDim, int kColumnTiles>
using Kernel = std::tuple<Element, std::integral_constant<int, kHeadDim>,
                          std::integral_constant<int, kColumnTiles>>;

template <class Parameters>
class SegmentAttentionCodes : public testing::Test {};
using Kernels =
    testing::Types<Kernel<std::int8_t, 64, 1>, Kernel<std::int8_t, 80, 1>,
                   Kernel<std::int8_t, 96, 1>, Kernel<std::int8_t, 128, 1>,
                   Kernel<std::int8_t, 256, 1>, Kernel<fp8_e4m3, 64, 1>, Kernel<fp8_e4m3, 80, 1>,
                   Kernel<fp8_e4m3, 96, 1>, Kernel<fp8_e4m3, 128, 1>, Kernel<fp8_e4m3, 256, 1>,
                   Kernel<std::int8_t, 64, 2>, Kernel<fp8_e4m3, 96, 2>>;
TYPED_TEST_SUITE(SegmentAttentionCodes, Kernels);

TYPED_TEST(SegmentAttentionCodes, EqualsTheReferenceOverRandomLists) {
  SKIP_WITHOUT_DEVICE();
  check_random_segments<std::tuple_element_t<0, TypeParam>,
                        std::tuple_element_t<1, TypeParam>::value,
                        std::tuple_element_t<2, TypeParam>::value>(16, 51);
}

TYPED_TEST(SegmentAttentionCodes, Small) {
  SKIP_WITHOUT_DEVICE();
  check_small_segments<std::tuple_element_t<0, TypeParam>,
                       std::tuple_element_t<1, TypeParam>::value,
                       std::tuple_element_t<2, TypeParam>::value>();
}

}  // namespace SLUICE_TEST_UNIT
