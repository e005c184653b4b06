// SPDX-License-Identifier: MIT
#include <array>
#include <cstdint>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#include "support/test_unit.hpp"

#include "backend/cuda/segment_check.cuh"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using namespace sluice_test;

template <class Element, int kHeadDim, int kColumnTiles>
using Kernel = std::tuple<Element, std::integral_constant<int, kHeadDim>,
                          std::integral_constant<int, kColumnTiles>>;

template <class Parameters>
class SegmentAttention : public testing::Test {};
using Kernels = testing::Types<Kernel<bf16, 64, 1>, Kernel<bf16, 80, 1>, Kernel<bf16, 96, 1>,
                               Kernel<bf16, 128, 1>, Kernel<bf16, 256, 1>, Kernel<f16, 64, 1>,
                               Kernel<f16, 80, 1>, Kernel<f16, 96, 1>, Kernel<f16, 128, 1>,
                               Kernel<f16, 256, 1>, Kernel<bf16, 128, 2>, Kernel<f16, 80, 2>>;
TYPED_TEST_SUITE(SegmentAttention, Kernels);

TYPED_TEST(SegmentAttention, EqualsTheReferenceOverRandomLists) {
  SKIP_WITHOUT_DEVICE();
  check_random_segments<std::tuple_element_t<0, TypeParam>,
                        std::tuple_element_t<1, TypeParam>::value,
                        std::tuple_element_t<2, TypeParam>::value>(16, 21);
}

TYPED_TEST(SegmentAttention, Small) {
  SKIP_WITHOUT_DEVICE();
  check_small_segments<std::tuple_element_t<0, TypeParam>,
                       std::tuple_element_t<1, TypeParam>::value,
                       std::tuple_element_t<2, TypeParam>::value>();
}

TEST(SegmentAttentionVariants, AlibiAndSinkLogits) {
  SKIP_WITHOUT_DEVICE();
  using Variant =
      device::AttentionVariant<device::GroupCausalWindow, device::AlibiBias, device::SinkLogits>;
  Random random(31);
  for (std::uint64_t i = 0; i < 8; ++i) {
    SegmentCase c = random_segment_case(random, 128);
    c.origin = 0.5;
    c.variant.slopes = random_floats(random, static_cast<std::size_t>(c.shape.num_qo_heads), 0.1);
    c.variant.sinks = random_floats(random, static_cast<std::size_t>(c.shape.num_qo_heads), 3);
    const Buffer<float, cuda> slopes{std::span<const float>(c.variant.slopes)};
    const Buffer<float, cuda> sinks{std::span<const float>(c.variant.sinks)};
    const Variant variant{static_cast<float>(c.variant.sm_scale),
                          group_window(c.variant),
                          {slopes.data()},
                          {sinks.data()}};
    check_segments<bf16, 128, Variant, 1>(c, variant, 100 + i);
    if (HasFatalFailure()) return;
  }
}

TEST(SegmentAttentionVariants, SoftCapAndSoftmaxOffByOne) {
  SKIP_WITHOUT_DEVICE();
  using Variant =
      device::AttentionVariant<device::GroupCausalWindow, device::SoftCap, device::SoftmaxOffByOne>;
  Random random(32);
  for (std::uint64_t i = 0; i < 8; ++i) {
    SegmentCase c = random_segment_case(random, 128);
    c.variant.soft_cap = 2;
    c.variant.sinks.assign(static_cast<std::size_t>(c.shape.num_qo_heads), 0);
    const Variant variant{static_cast<float>(c.variant.sm_scale), group_window(c.variant), {2}, {}};
    check_segments<bf16, 128, Variant, 1>(c, variant, 200 + i);
    if (HasFatalFailure()) return;
  }
}

TEST(SegmentAttentionVariants, AllVisibleAndOneWindowForAll) {
  SKIP_WITHOUT_DEVICE();
  Random random(33);
  for (std::uint64_t i = 0; i < 8; ++i) {
    SegmentCase c = random_segment_case(random, 128);
    if (i % 2 == 0) {
      c.variant.all_visible = true;
      using Variant = device::AttentionVariant<device::AllVisible>;
      check_segments<bf16, 128, Variant, 1>(
          c, Variant{static_cast<float>(c.variant.sm_scale), {}, {}, {}}, 300 + i);
    } else {
      c.variant.every_group = true;
      c.variant.bidirectional = false;
      using Variant = device::AttentionVariant<device::CausalWindow>;
      check_segments<bf16, 128, Variant, 1>(
          c,
          Variant{static_cast<float>(c.variant.sm_scale),
                  {c.variant.window_size, c.variant.num_sink_tokens},
                  {},
                  {}},
          300 + i);
    }
    if (HasFatalFailure()) return;
  }
}

TEST(SegmentAttentionLists, HundredsOfSmallSegments) {
  SKIP_WITHOUT_DEVICE();
  using Variant = device::AttentionVariant<device::GroupCausalWindow>;
  Random random(34);
  for (const std::int64_t pages : {31, 33, 400, 470}) {
    SegmentCase c = random_segment_case(random, 128);
    c.pages = pages;
    c.shape.max_segments = 512;
    c.shape.max_queries = 2;
    const Variant variant{static_cast<float>(c.variant.sm_scale), group_window(c.variant), {}, {}};
    check_segments<bf16, 128, Variant, 1>(c, variant, 400 + static_cast<std::uint64_t>(pages));
    if (HasFatalFailure()) return;
  }
}

__global__ void grow(std::int64_t* counter, device::SegmentReader* reader) {
  *counter += 7;
  reader->first_index += 1;
  reader->first_position += 1;
}

/// A captured launch sees prefixes and readers as they are when it is replayed.
TEST(SegmentAttentionReplay, PrefixGrowsBetweenReplays) {
  SKIP_WITHOUT_DEVICE();
  using Variant = device::AttentionVariant<device::AllVisible>;
  constexpr int kHeadDim = 128;
  Random random(41);
  SegmentAttentionShape shape;
  shape.num_qo_heads = 8;
  shape.num_kv_heads = 2;
  shape.max_keys = 200;
  OracleRotation rotation;
  for (int i = 0; i < kHeadDim / 2; ++i)
    rotation.frequencies.push_back(std::pow(10000.0, -i / 64.0));
  const SegmentAttentionPlan<bf16, kHeadDim, Variant> plan(shape, {rotation.frequencies, 1, false},
                                                           {5, 1});
  SegmentLists<bf16> lists(shape);
  Rows<bf16> keys(random, 2, 200, kHeadDim, true);
  Rows<bf16> values(random, 2, 200, kHeadDim, true);
  keys.upload();
  values.upload();
  Buffer<std::int64_t, cuda> counter(1);
  device::Segment<bf16> segment;
  segment.count = segment.visible = 200;
  segment.visible_tokens = counter.data();
  segment.keys = keys.device.data();
  segment.values = values.device.data();
  segment.key_head_stride = segment.value_head_stride = 200 * kHeadDim;
  segment.key_token_stride = segment.value_token_stride = kHeadDim;
  lists.set(0, 0, {&segment, 1});
  device::SegmentReader reader{50, 50, 1, 0};
  lists.set_readers({&reader, 1});

  const std::vector<float> query = random_floats(random, 8 * kHeadDim);
  const Buffer<float, cuda> input{std::span<const float>(query)};
  Buffer<float, cuda> output(8 * kHeadDim);
  Buffer<float, cuda> lse(8);
  SegmentAttentionTensors x;
  x.query = input.data();
  x.out = output.data();
  x.lse = lse.data();
  x.query_token_stride = x.query_session_stride = x.out_token_stride = x.out_session_stride =
      8 * kHeadDim;

  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin capture");
  plan.launch(lists.view(), x, Variant{0.09F, {}, {}, {}}, stream);
  grow<<<1, 1, 0, stream>>>(counter.data(), lists.readers());
  check_cuda(cudaStreamEndCapture(stream, &graph), "end capture");
  check_cuda(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  OracleVariant variant;
  variant.sm_scale = 0.09F;
  variant.all_visible = true;
  for (int replay = 0; replay < 32; ++replay) {
    check_cuda(cudaMemsetAsync(output.data(), 0xff, output.bytes(), stream), "cudaMemset");
    check_cuda(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    const std::vector<float> found = output.download(stream);
    const std::vector<float> found_lse = lse.download(stream);
    OracleSegment rule;
    rule.count = 200;
    rule.visible = std::min(7 * replay, 200);
    rule.ceiling = std::numeric_limits<double>::infinity();
    for (std::int64_t h = 0; h < 2; ++h)
      for (std::int64_t j = 0; j < 200; ++j) {
        const std::vector<float> k = keys.row(h, j);
        const std::vector<float> v = values.row(h, j);
        rule.keys.insert(rule.keys.end(), k.begin(), k.end());
        rule.values.insert(rule.values.end(), v.begin(), v.end());
      }
    std::vector<double> expected(8 * kHeadDim);
    std::array<double, 8> expected_lse{};
    attend_oracle(query.data(), 1, 8, 2, kHeadDim, 50 + replay, 50 + replay, {rule}, {0, 1},
                  variant, rotation, expected.data(), expected_lse.data());
    for (std::size_t e = 0; e < expected.size(); ++e)
      ASSERT_NEAR(static_cast<double>(found[e]), expected[e], 3e-4) << "replay " << replay;
    for (std::size_t h = 0; h < 8; ++h)
      if (replay > 0)
        ASSERT_NEAR(static_cast<double>(found_lse[h]), expected_lse[h], 5e-4)
            << "replay " << replay;
      else
        ASSERT_TRUE(std::isinf(found_lse[h]));
  }
  check_cuda(cudaGraphExecDestroy(executable), "destroy");
  check_cuda(cudaGraphDestroy(graph), "destroy");
  check_cuda(cudaStreamDestroy(stream), "destroy");
}

TEST(SegmentAttentionShapes, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  using Plan = SegmentAttentionPlan<bf16, 64>;
  SegmentAttentionShape shape;
  shape.num_qo_heads = 6;
  shape.num_kv_heads = 4;
  EXPECT_THROW(Plan(shape, {}), Error);
  shape.num_qo_heads = 8;
  shape.max_queries = 17;
  EXPECT_THROW(Plan(shape, {}), Error);
  shape.max_queries = 1;
  shape.head_classes = {{0, 1}, {1, 2, 3}};
  EXPECT_THROW(Plan(shape, {}), Error);
  shape.head_classes = {{0, 1}, {2}};
  EXPECT_THROW(Plan(shape, {}), Error);
  shape.head_classes = {};
  EXPECT_THROW(Plan(shape, {}, {-1, 0}), Error);
  EXPECT_THROW(Plan(shape, {}, {513, 1}), Error);
  EXPECT_THROW(Plan(shape, {}, {16, 32}), Error);
}

}  // namespace SLUICE_TEST_UNIT
