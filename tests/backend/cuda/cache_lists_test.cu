// SPDX-License-Identifier: MIT
// The segment lists of the CPU's caches on the device: a list for each class of KV heads, rows
// copied as they are, against the float64 reference.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "backend/cuda/cache_lists.hpp"
#include "backend/cuda/segment_check.cuh"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using namespace sluice_test;

void check_lists(const CacheLists& c) {
  SCOPED_TRACE(c.name);
  constexpr int kHeadDim = 64;
  using Variant = device::AttentionVariant<device::AllVisible>;
  ASSERT_EQ(c.head_dim, kHeadDim);
  SegmentAttentionShape shape;
  shape.num_qo_heads = c.qo_heads;
  shape.num_kv_heads = c.kv_heads;
  shape.max_segments = 64;
  shape.max_keys = 400;
  shape.head_classes = c.classes;
  const SegmentAttentionPlan<f16, kHeadDim, Variant> plan(shape,
                                                          {c.rotation.frequencies, 1, false});
  SegmentLists<f16> lists(shape);
  // Rows of all segments, one behind the other: [segments][heads, count, head_dim].
  std::vector<float> keys;
  std::vector<float> values;
  for (const std::vector<OracleSegment>& list : c.lists)
    for (const OracleSegment& segment : list) {
      keys.insert(keys.end(), segment.keys.begin(), segment.keys.end());
      values.insert(values.end(), segment.values.begin(), segment.values.end());
    }
  const std::vector<f16> stored_keys = rounded_to<f16>(keys);
  const std::vector<f16> stored_values = rounded_to<f16>(values);
  const Buffer<f16, cuda> device_keys{std::span<const f16>(stored_keys)};
  const Buffer<f16, cuda> device_values{std::span<const f16>(stored_values)};
  std::size_t at = 0;
  for (std::size_t k = 0; k < c.lists.size(); ++k) {
    std::vector<device::Segment<f16>> list;
    for (const OracleSegment& from : c.lists[k]) {
      device::Segment<f16> segment;
      segment.first_index = from.first_index;
      segment.count = from.count;
      segment.visible = from.visible;
      segment.first_position = from.first_position;
      segment.shift = from.shift;
      segment.ceiling = from.ceiling;
      segment.keys = device_keys.data() + at;
      segment.values = device_values.data() + at;
      segment.key_head_stride = segment.value_head_stride = from.count * kHeadDim;
      segment.key_token_stride = segment.value_token_stride = kHeadDim;
      list.push_back(segment);
      at += from.keys.size();
    }
    ASSERT_LE(list.size(), 64U);
    lists.set(0, static_cast<std::int64_t>(k), list);
  }
  const device::SegmentReader reader{c.first_index, c.first_position, 1, 0};
  lists.set_readers({&reader, 1});

  const Buffer<float, cuda> input{std::span<const float>(c.query)};
  Buffer<float, cuda> output(c.query.size());
  Buffer<float, cuda> lse(static_cast<std::size_t>(c.qo_heads));
  SegmentAttentionTensors x;
  x.query = input.data();
  x.out = output.data();
  x.lse = lse.data();
  x.query_token_stride = x.query_session_stride = x.out_token_stride = x.out_session_stride =
      c.qo_heads * kHeadDim;
  check_cuda(cudaMemset(output.data(), 0xff, output.bytes()), "cudaMemset");
  plan.launch(lists.view(), x, Variant{static_cast<float>(c.sm_scale), {}, {}, {}}, nullptr);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const std::vector<float> found = output.download();
  const std::vector<float> found_lse = lse.download();

  OracleVariant variant;
  variant.sm_scale = c.sm_scale;
  variant.all_visible = true;
  std::vector<double> expected(found.size());
  std::vector<double> expected_lse(found_lse.size());
  for (std::size_t k = 0; k < c.lists.size(); ++k)
    attend_oracle(c.query.data(), 1, c.qo_heads, c.kv_heads, kHeadDim, c.first_index,
                  c.first_position, c.lists[k], c.classes[k], variant, c.rotation, expected.data(),
                  expected_lse.data());
  double error = 0;
  double host_error = 0;
  double norm = 0;
  for (std::size_t e = 0; e < expected.size(); ++e) {
    const double difference = static_cast<double>(found[e]) - expected[e];
    const double on_host = static_cast<double>(c.attended[e]) - expected[e];
    error += difference * difference;
    host_error += on_host * on_host;
    norm += expected[e] * expected[e];
  }
  // As in segment_check.cuh: queries and probabilities carry 16 bits.
  ASSERT_LE(std::sqrt(error), 2e-4 * std::sqrt(norm));
  // attend() on the CPU reads the same list; keys that it rotates itself were not rounded again.
  ASSERT_LE(std::sqrt(host_error), 1e-3 * std::sqrt(norm));
  for (std::size_t h = 0; h < expected_lse.size(); ++h)
    ASSERT_NEAR(static_cast<double>(found_lse[h]), expected_lse[h], 5e-4) << "head " << h;
}

TEST(CacheLists, OfTheCpusCachesAfterRandomOperations) {
  SKIP_WITHOUT_DEVICE();
  std::size_t classes = 0;
  std::size_t segments = 0;
  for (const std::uint64_t seed : {1U, 2U})
    for (const CacheLists& lists : random_cache_lists(seed)) {
      check_lists(lists);
      if (HasFatalFailure()) return;
      classes = std::max(classes, lists.classes.size());
      for (const auto& list : lists.lists) segments = std::max(segments, list.size());
    }
  EXPECT_EQ(classes, 4U);  // heads that choose for themselves
  EXPECT_GE(segments, 4U);
}

}  // namespace SLUICE_TEST_UNIT
