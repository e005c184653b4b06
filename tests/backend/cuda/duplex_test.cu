// SPDX-License-Identifier: MIT
#include <cstdint>
#include <numeric>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/duplex.cuh>

#include "support/test_unit.hpp"

#include "backend/cuda/small_model.cuh"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using namespace sluice_test;

CudaDuplexOptions options_of(const SmallModel& model, std::int64_t sinks, std::int64_t window,
                             std::int64_t chunk, const CudaDuplexPolicy& policy) {
  CudaDuplexOptions options;
  options.source = model.options(1, 0, 0, chunk, true);
  options.target = model.options(1, sinks, window, 0, true);
  options.policy = policy;
  return options;
}

std::vector<std::int32_t> some_tokens(std::uint64_t seed, std::size_t count) {
  Random random(seed);
  std::vector<std::int32_t> tokens;
  for (std::size_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<std::int32_t>(random.below(300)));
  return tokens;
}

TEST(CudaDuplex, TwoStreamsGiveTheBitsOfOne) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, false, 91);
  const std::vector<std::int32_t> source = some_tokens(4, 230);
  for (const std::int64_t window : {std::int64_t{0}, std::int64_t{30}}) {
    CudaDuplex<bf16, 64> duplex(*model.device,
                                options_of(model, window == 0 ? 0 : 3, window, 16, {5, 2, 1}));
    std::vector<std::int32_t> texts[4];
    std::vector<float> logits[4];
    for (int way = 0; way < 4; ++way) {
      duplex.run(source, 140, 7, way % 2 == 0 ? DuplexStreams::kOne : DuplexStreams::kTwo);
      texts[way] = duplex.target().history();
      logits[way] = duplex.target().logits();
    }
    for (int way = 1; way < 4; ++way) {
      EXPECT_EQ(texts[way], texts[0]) << "run " << way;
      EXPECT_EQ(logits[way], logits[0]) << "run " << way;
    }
    EXPECT_GT(std::set<std::int32_t>(texts[0].begin(), texts[0].begin() + 140).size(), 10U);
  }
}

TEST(CudaDuplex, AgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, true, 92);
  const std::vector<std::int32_t> source = some_tokens(8, 40);
  for (const std::int64_t window : {std::int64_t{0}, std::int64_t{6}}) {
    const std::int64_t sinks = window == 0 ? 0 : 2;
    const CudaDuplexPolicy policy{3, 3, 2};
    CudaDuplex<bf16, 64> duplex(*model.device, options_of(model, sinks, window, 7, policy));
    for (const std::int64_t steps : {1, 2, 5, 13, 30}) {
      duplex.run(source, steps, 7, DuplexStreams::kTwo);
      const std::vector<std::int32_t> text = duplex.target().history();
      PlainDecoder reader = model.oracle(0, 0);
      for (const std::int32_t token : source) reader.step(token);
      PlainDecoder writer = model.oracle(sinks, window);
      std::vector<double> expected;
      for (std::int64_t t = 0; t < steps; ++t)
        expected = writer.step(t == 0 ? 7 : text[static_cast<std::size_t>(t)], &reader,
                               policy.needed(t, static_cast<std::int64_t>(source.size())));
      // The source's keys come from rounded products, as in prefill.
      ASSERT_LE(relative_error(duplex.target().logits(), expected), kRoundedBound)
          << "steps " << steps << ", window " << window;
    }
  }
}

// Few enough tokens for compute-sanitizer.
TEST(CudaDuplex, Small) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, false, 94);
  CudaDuplex<bf16, 64> duplex(*model.device, options_of(model, 2, 6, 7, {3, 3, 2}));
  const std::vector<std::int32_t> source = some_tokens(9, 16);
  duplex.run(source, 9, 7, DuplexStreams::kOne);
  const std::vector<float> logits = duplex.target().logits();
  duplex.run(source, 9, 7, DuplexStreams::kTwo);
  EXPECT_EQ(duplex.target().logits(), logits);
}

TEST(CudaDuplex, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, false, 93);
  using Pair = CudaDuplex<bf16, 64>;
  EXPECT_THROW(Pair(*model.device, options_of(model, 0, 0, 0, {})), Error);
  EXPECT_THROW(Pair(*model.device, options_of(model, 0, 0, 8, {0, 1, 1})), Error);
  CudaDuplexOptions windowed = options_of(model, 0, 0, 8, {});
  windowed.source = model.options(1, 2, 20, 8, true);
  EXPECT_THROW(Pair(*model.device, windowed), Error);
  Pair pair(*model.device, options_of(model, 0, 0, 8, {}));
  EXPECT_THROW(pair.run({}, 1, 7, DuplexStreams::kTwo), Error);
  EXPECT_THROW(pair.run(std::vector<std::int32_t>{1, 300}, 1, 7, DuplexStreams::kTwo), Error);
  EXPECT_THROW(pair.run(std::vector<std::int32_t>(257, 1), 1, 7, DuplexStreams::kTwo), Error);
}

}  // namespace SLUICE_TEST_UNIT
