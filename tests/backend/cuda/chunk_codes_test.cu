// SPDX-License-Identifier: MIT
/// Attention of chunks over caches of codes: rows as they are stored, and outputs against float64
/// over those.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/chunk_attention.cuh>
#include <sluice/core/random.hpp>

#include "backend/cuda/chunk_check.cuh"
#include "backend/cuda/device_test.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::check_chunks;
using sluice_test::ChunkCase;
using sluice_test::OracleConfig;
using sluice_test::small_chunks;

/// Chunks of 1 to `longest` tokens onto a cache of random extents.
ChunkCase random_chunks(Random& random, int head_dim, std::uint64_t longest, int count) {
  ChunkCase c;
  OracleConfig& s = c.sequence;
  s.head_dim = head_dim;
  s.num_kv_heads = 1 + static_cast<int>(random.below(2));
  s.num_qo_heads = s.num_kv_heads * (1 + static_cast<int>(random.below(4)));
  const std::int64_t sinks[] = {0, 1, 4, 4, 16, 70};
  s.num_sink_tokens = sinks[random.below(6)];
  const std::int64_t windows[] = {0, 1, 17, 64, 127, 128, 129, 300};
  s.window_size = windows[random.below(8)];
  std::int64_t most = 1;
  std::int64_t sum = 0;
  for (int k = 0; k < count; ++k) {
    c.chunks.push_back(1 + static_cast<std::int64_t>(random.below(longest)));
    most = std::max(most, c.chunks.back());
    sum += c.chunks.back();
  }
  s.capacity = s.window_size == 0 ? sum + s.num_sink_tokens
                                  : s.num_sink_tokens + s.window_size + most - 1 +
                                        static_cast<std::int64_t>(random.below(3));
  s.in_text = random.next() % 2 == 0;
  s.rotary_dim = random.next() % 4 == 0 ? s.head_dim / 2 : s.head_dim;
  s.interleaved = random.next() % 2 == 0;
  s.sm_scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
  return c;
}

// Chunks of more than 8 tokens are widened to a scratch, others in shared memory.
TEST(ChunkCodes, AnyChunkingOfRandomStreams) {
  SKIP_WITHOUT_DEVICE();
  Random random(91);
  for (int i = 0; i < 18; ++i) {
    const std::uint64_t seed = 300 + static_cast<std::uint64_t>(i);
    const bool few = i % 2 == 0;
    const ChunkKernel kernel = i % 3 == 0 ? ChunkKernel::kMma : ChunkKernel::kAuto;
    const auto chunks = [&](int head_dim) {
      return random_chunks(random, head_dim, few ? 8 : 150, few ? 14 : 4);
    };
    switch (i % 3) {
      case 0: check_chunks<f16, 64, std::int8_t>(chunks(64), seed, kernel); break;
      case 1: check_chunks<bf16, 80, fp8_e4m3>(chunks(80), seed, kernel); break;
      default: check_chunks<bf16, 128, std::int8_t>(chunks(128), seed, kernel);
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(ChunkCodes, OnHopper) {
  SKIP_WITHOUT_DEVICE();
  if (detail::hopper_multiprocessors() == 0) GTEST_SKIP() << "no Hopper";
  Random random(92);
  for (std::uint64_t seed = 330; seed < 338; ++seed) {
    ChunkCase c = random_chunks(random, 128, 300, 3);
    c.sequence.num_sink_tokens = std::min<std::int64_t>(c.sequence.num_sink_tokens, 16);
    check_chunks<bf16, 128, std::int8_t>(c, seed, ChunkKernel::kHopper);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(ChunkCodes, Small) {  // for compute-sanitizer
  SKIP_WITHOUT_DEVICE();
  check_chunks<f16, 64, std::int8_t>(small_chunks(64), 71);
  ChunkCase few = small_chunks(80);
  few.chunks = {3, 8, 1, 5, 8, 8, 8, 8, 2, 7, 8};
  check_chunks<bf16, 80, fp8_e4m3>(few, 72, ChunkKernel::kAuto);
}

}  // namespace SLUICE_TEST_UNIT
