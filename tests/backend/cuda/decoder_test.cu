// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/chunk_check.cuh"
#include "backend/cuda/decode_oracle.hpp"
#include "backend/cuda/decoder_oracle.hpp"
#include "backend/cuda/device_test.hpp"
#include "backend/cuda/small_model.cuh"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::argmax;
using sluice_test::check_chunks;
using sluice_test::ChunkCase;
using sluice_test::kExactBound;
using sluice_test::kRoundedBound;
using sluice_test::OracleConfig;
using sluice_test::PlainDecoder;
using sluice_test::random_floats;
using sluice_test::relative_error;
using sluice_test::rounded_to;
using sluice_test::rounding_error;
using sluice_test::small_chunks;
using sluice_test::SmallModel;

// --- Chunks --------------------------------------------------------------------------------------

TEST(ChunkAttention, AnyChunkingOfRandomStreams) {
  SKIP_WITHOUT_DEVICE();
  Random random(21);
  for (int i = 0; i < 24; ++i) {
    ChunkCase c;
    OracleConfig& s = c.sequence;
    const int head_dims[] = {64, 128, 64, 128, 80, 96, 256, 128};
    s.head_dim = head_dims[i % 8];
    s.num_kv_heads = 1 + static_cast<int>(random.below(2));
    s.num_qo_heads = s.num_kv_heads * (1 + static_cast<int>(random.below(4)));
    const std::int64_t sinks[] = {0, 1, 4, 4, 70};
    s.num_sink_tokens = sinks[random.below(5)];
    const std::int64_t windows[] = {0, 1, 17, 63, 64, 127, 128, 129};
    s.window_size = windows[random.below(8)];
    const std::int64_t most = 1 + static_cast<std::int64_t>(random.below(150));
    std::int64_t sum = 0;
    for (int k = 0; k < 4; ++k) {
      c.chunks.push_back(
          k == 1 ? most
                 : 1 + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(most))));
      sum += c.chunks.back();
    }
    s.capacity = s.window_size == 0 ? sum + s.num_sink_tokens
                                    : s.num_sink_tokens + s.window_size + most - 1 +
                                          static_cast<std::int64_t>(random.below(3));
    s.in_text = random.next() % 2 == 0;
    s.origin = random.next() % 2 == 0 ? 0 : 100.5;
    s.rotary_dim = random.next() % 4 == 0 ? s.head_dim / 2 : s.head_dim;
    s.interleaved = random.next() % 2 == 0;
    s.sm_scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
    const std::uint64_t seed = 50 + static_cast<std::uint64_t>(i);
    switch (s.head_dim) {
      case 64: check_chunks<f16, 64>(c, seed); break;
      case 80: check_chunks<bf16, 80>(c, seed); break;
      case 96: check_chunks<bf16, 96>(c, seed); break;
      case 256: check_chunks<bf16, 256>(c, seed); break;
      default: check_chunks<bf16, 128>(c, seed);
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

/// The kernel for Hopper, where there is one: sinks at a product of their own, rings that wrap
/// within a tile, caches that are not full, chunks that end within a block.
template <class Element>
void check_hopper_chunks(std::uint64_t seed, int cases, std::uint64_t longest) {
  Random random(seed);
  for (int i = 0; i < cases; ++i) {
    ChunkCase c;
    OracleConfig& s = c.sequence;
    s.head_dim = 128;
    s.num_kv_heads = 1 + static_cast<int>(random.below(2));
    s.num_qo_heads = s.num_kv_heads * (1 + static_cast<int>(random.below(3)));
    const std::int64_t sinks[] = {0, 1, 4, 4, 15, 16};
    s.num_sink_tokens = sinks[random.below(6)];
    const std::int64_t windows[] = {0, 1, 17, 127, 128, 129, 300, 400};
    s.window_size = windows[random.below(8)];
    std::int64_t most = 0;
    std::int64_t sum = 0;
    for (int k = 0; k < 4; ++k) {
      c.chunks.push_back(1 + static_cast<std::int64_t>(random.below(longest)));
      sum += c.chunks.back();
      most = std::max(most, c.chunks.back());
    }
    s.capacity = s.window_size == 0 ? sum + s.num_sink_tokens
                                    : s.num_sink_tokens + s.window_size + most - 1 +
                                          static_cast<std::int64_t>(random.below(3));
    s.in_text = random.next() % 2 == 0;
    s.rotary_dim = 128;
    s.sm_scale = 1 / std::sqrt(128.0F);
    check_chunks<Element, 128>(c, seed + static_cast<std::uint64_t>(i), ChunkKernel::kHopper);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(ChunkAttention, HopperInAnyChunking) {
  SKIP_WITHOUT_DEVICE();
  if (detail::hopper_multiprocessors() == 0) GTEST_SKIP() << "no Hopper";
  check_hopper_chunks<bf16>(61, 10, 200);
  check_hopper_chunks<f16>(62, 4, 200);
  check_hopper_chunks<bf16>(63, 3, 600);
}

// Up to 8 tokens onto caches of any length: keys are divided among blocks of a cluster, some of
// which find none.
TEST(ChunkAttention, FewTokens) {
  SKIP_WITHOUT_DEVICE();
  Random random(22);
  for (int i = 0; i < 30; ++i) {
    ChunkCase c;
    OracleConfig& s = c.sequence;
    const int head_dims[] = {64, 128, 80, 96, 256};
    s.head_dim = s.rotary_dim = head_dims[i % 5];
    s.num_kv_heads = 1 + static_cast<int>(random.below(2));
    s.num_qo_heads = s.num_kv_heads * (1 + static_cast<int>(random.below(4)));
    const std::int64_t sinks[] = {0, 1, 4, 4, 16, 70};
    s.num_sink_tokens = sinks[random.below(6)];
    const std::int64_t windows[] = {0, 1, 7, 17, 64, 129, 300, 700};
    s.window_size = windows[random.below(8)];
    const std::int64_t first = 1 + static_cast<std::int64_t>(random.below(i % 2 == 0 ? 8 : 600));
    c.chunks.push_back(first);
    std::int64_t sum = first;
    for (int k = 0; k < 12; ++k) {
      c.chunks.push_back(1 + static_cast<std::int64_t>(random.below(8)));
      sum += c.chunks.back();
    }
    s.capacity = s.window_size == 0
                     ? sum + s.num_sink_tokens
                     : s.num_sink_tokens + s.window_size + std::max<std::int64_t>(first, 8) - 1 +
                           static_cast<std::int64_t>(random.below(3));
    s.in_text = random.next() % 2 == 0;
    s.interleaved = random.next() % 2 == 0;
    s.sm_scale = 1 / std::sqrt(static_cast<float>(s.head_dim));
    const std::uint64_t seed = 150 + static_cast<std::uint64_t>(i);
    switch (s.head_dim) {
      case 64: check_chunks<f16, 64>(c, seed, ChunkKernel::kAuto); break;
      case 80: check_chunks<bf16, 80>(c, seed, ChunkKernel::kAuto); break;
      case 96: check_chunks<bf16, 96>(c, seed, ChunkKernel::kAuto); break;
      case 256: check_chunks<bf16, 256>(c, seed, ChunkKernel::kAuto); break;
      default: check_chunks<bf16, 128>(c, seed, ChunkKernel::kAuto);
    }
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(ChunkAttention, Small) {
  SKIP_WITHOUT_DEVICE();
  check_chunks<bf16, 64>(small_chunks(64), 71);
  check_chunks<f16, 128>(small_chunks(128), 72);
}
TEST(ChunkAttention, SmallOfFewTokens) {
  SKIP_WITHOUT_DEVICE();
  ChunkCase c = small_chunks(64);
  c.sequence.window_size = 200;
  c.sequence.capacity = 4 + 200 + 7;
  c.chunks.clear();
  for (int i = 0; i < 30; ++i) c.chunks.push_back(1 + i % 8);
  check_chunks<bf16, 64>(c, 77, ChunkKernel::kAuto);
}
TEST(ChunkAttention, SmallOnHopper) {
  SKIP_WITHOUT_DEVICE();
  if (detail::hopper_multiprocessors() == 0) GTEST_SKIP() << "no Hopper";
  check_chunks<bf16, 128>(small_chunks(128), 73, ChunkKernel::kHopper);
}

// Scores of hundreds of tokens from 0.2 to 50: the running maximum must be followed, in steps of
// any size. Without rotation nothing but weights and outputs is rounded, so that the bound holds.
template <class Element>
void check_growing_scores(std::uint64_t seed, ChunkKernel kernel) {
  ChunkCase c;
  OracleConfig& s = c.sequence;
  s.head_dim = 128;
  s.num_kv_heads = 1;
  s.num_qo_heads = 2;
  s.sm_scale = 1 / std::sqrt(128.0F);
  c.chunks = {130, 400, 50};
  c.swell = 0.006;
  for (const std::int64_t sinks : {0, 4}) {
    s.num_sink_tokens = sinks;
    s.window_size = 300;
    s.capacity = sinks + 300 + 400 - 1;
    check_chunks<Element, 128>(c, seed, kernel);
    if (testing::Test::HasFatalFailure()) return;
  }
}
TEST(ChunkAttention, GrowingScores) {
  SKIP_WITHOUT_DEVICE();
  check_growing_scores<bf16>(74, ChunkKernel::kMma);
}
TEST(ChunkAttention, GrowingScoresOnHopper) {
  SKIP_WITHOUT_DEVICE();
  if (detail::hopper_multiprocessors() == 0) GTEST_SKIP() << "no Hopper";
  check_growing_scores<bf16>(75, ChunkKernel::kHopper);
  check_growing_scores<f16>(76, ChunkKernel::kHopper);
}

// --- Products of several rows --------------------------------------------------------------------

TEST(MatrixProducts, AgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  Random random(31);
  MatrixProducts<bf16> products;
  for (const auto& [rows, cols, count] :
       {std::array<std::size_t, 3>{192, 128, 3}, {64, 192, 8}, {1000, 256, 17}, {8, 8, 2}}) {
    const std::vector<bf16> w = rounded_to<bf16>(random_floats(random, rows * cols));
    const std::vector<bf16> x = rounded_to<bf16>(random_floats(random, count * cols));
    const std::vector<float> before = random_floats(random, count * rows);
    const Buffer<bf16, cuda> device_w{std::span<const bf16>(w)};
    const Buffer<bf16, cuda> device_x{std::span<const bf16>(x)};
    for (const bool add : {false, true}) {
      Buffer<float, cuda> y(count * rows);
      if (add)
        y.upload(before);
      else
        check_cuda(cudaMemset(y.data(), 0xff, y.bytes()), "cudaMemset");
      products.launch(device_w.data(), static_cast<std::int64_t>(rows),
                      static_cast<std::int64_t>(cols), device_x.data(),
                      static_cast<std::int64_t>(count), y.data(), add, nullptr);
      const std::vector<float> found = y.download();
      for (std::size_t i = 0; i < count; ++i)
        for (std::size_t r = 0; r < rows; ++r) {
          double expected = add ? static_cast<double>(before[i * rows + r]) : 0;
          double magnitude = std::abs(expected);
          for (std::size_t c = 0; c < cols; ++c) {
            const double term = static_cast<double>(static_cast<float>(w[r * cols + c])) *
                                static_cast<double>(static_cast<float>(x[i * cols + c]));
            expected += term;
            magnitude += std::abs(term);
          }
          // Products are exact, sums in float32: a rounding per term at most.
          ASSERT_NEAR(static_cast<double>(found[i * rows + r]), expected,
                      static_cast<double>(cols + 1) * 0x1p-23 * magnitude);
        }
    }
  }
}

// --- Whole decoders ------------------------------------------------------------------------------

TEST(CudaDecoder, OneSessionAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  for (const bool interleaved : {false, true}) {
    const SmallModel model(64, interleaved, 77);
    for (const std::int64_t window : {std::int64_t{0}, std::int64_t{24}}) {
      const std::int64_t sinks = window == 0 ? 0 : 4;
      CudaDecoder<bf16, 64> decoder(*model.device, model.options(1, sinks, window, 0, true));
      PlainDecoder oracle = model.oracle(sinks, window);
      Random random(5);
      std::int32_t token = 7;
      for (int i = 0; i < 90; ++i) {
        // Some tokens are given, most are the decoder's own.
        if (i < 20) {
          token = static_cast<std::int32_t>(random.below(300));
          decoder.feed(std::vector<std::int32_t>{token});
        }
        decoder.step(nullptr);
        const std::vector<double> expected = oracle.step(token);
        const std::vector<float> found = decoder.logits();
        ASSERT_LE(relative_error(found, expected), kExactBound) << "step " << i;
        token = decoder.tokens()[0];
        ASSERT_EQ(token, argmax(found)) << "step " << i;
        ASSERT_EQ(decoder.history()[static_cast<std::size_t>(i + 1)], token);
      }
    }
  }
}

// Steps round no weight. Chunks and batches that are widened round weights as well as inputs, each
// by 2^-9 at most.
TEST(CudaDecoder, QuantisedWeightsAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  for (const ElementType type : {ElementType::kQ8_0, ElementType::kQ6_K, ElementType::kQ4_0,
                                 ElementType::kQ4_1, ElementType::kQ4_K}) {
    SCOPED_TRACE(std::string(to_string(type)));
    const SmallModel model(64, false, 81, type);
    std::vector<std::int32_t> prompt;
    Random random(6);
    for (int i = 0; i < 33; ++i) prompt.push_back(static_cast<std::int32_t>(random.below(300)));
    const double bound = std::max(kExactBound, rounding_error(model, 4, 24, prompt));
    PlainDecoder oracle = model.oracle(4, 24);
    CudaDecoder<bf16, 64> steps(*model.device, model.options(1, 4, 24, 0, true));
    CudaDecoderOptions several = model.options(1, 4, 24, 7, true);
    several.few_rows = false;
    CudaDecoder<bf16, 64> chunks(*model.device, several);
    several = model.options(3, 4, 24, 0, true);
    several.few_rows = false;
    CudaDecoder<bf16, 64> batch(*model.device, several);
    std::vector<double> expected;
    for (const std::int32_t token : prompt) {
      expected = oracle.step(token);
      steps.feed(std::vector<std::int32_t>{token});
      steps.step(nullptr);
      ASSERT_LE(relative_error(steps.logits(), expected), bound);
      batch.feed(std::vector<std::int32_t>(3, token));
      batch.step(nullptr);
    }
    chunks.prefill(0, prompt);
    EXPECT_LE(relative_error(chunks.logits(), expected), 2 * kRoundedBound);
    const std::vector<float> logits = batch.logits();
    for (std::size_t b = 0; b < 3; ++b)
      EXPECT_LE(relative_error(std::span<const float>(logits).subspan(300 * b, 300), expected),
                2 * kRoundedBound)
          << "session " << b;
    EXPECT_EQ(steps.tokens()[0], argmax(steps.logits()));
  }
}

// Chunks and batches of up to 8 rows read quantised weights as they are and round inputs of
// products to 11 bits: by 2^-11 of their size at most, 13 products. Attention of a chunk rounds as
// it does for longer ones (queries, probabilities: to bf16, by 2^-9 in the mean square), in 3
// layers; that of a batch does not.
TEST(CudaDecoder, FewRowsOfQuantisedWeightsAgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  constexpr double kFewBound = kExactBound + 13 * 0x1p-11;
  constexpr double kFewChunkBound = kFewBound + 3 * 2 * 0x1p-9;
  for (const ElementType type : {ElementType::kQ8_0, ElementType::kQ6_K, ElementType::kQ4_0,
                                 ElementType::kQ4_1, ElementType::kQ4_K}) {
    SCOPED_TRACE(std::string(to_string(type)));
    const SmallModel model(type == ElementType::kQ4_0 ? 128 : 64, false, 82, type);
    const auto check = [&](auto head_dim) {
      using Model = CudaDecoder<bf16, decltype(head_dim)::value>;
      std::vector<std::int32_t> prompt;
      Random random(7);
      for (int i = 0; i < 41; ++i) prompt.push_back(static_cast<std::int32_t>(random.below(300)));
      PlainDecoder oracle = model.oracle(4, 24);
      std::vector<std::vector<double>> expected;
      for (const std::int32_t token : prompt) expected.push_back(oracle.step(token));
      for (std::int64_t chunk = 1; chunk <= 8; ++chunk) {
        SCOPED_TRACE("chunk " + std::to_string(chunk));
        std::vector<float> found[2];
        for (std::vector<float>& logits : found) {
          Model decoder(*model.device, model.options(1, 4, 24, chunk, true));
          decoder.prefill(0, prompt);
          logits = decoder.logits();
          // Logits behind every token of the last chunk.
          const auto last = static_cast<std::int64_t>(prompt.size() - 1) % chunk + 1;
          Buffer<float, cuda> rows(static_cast<std::size_t>(last * 300));
          decoder.chunk_logits(0, last, rows.data(), nullptr);
          const std::vector<float> all = rows.download();
          for (std::int64_t i = 0; i < last; ++i)
            ASSERT_LE(relative_error(std::span<const float>(all).subspan(
                                         static_cast<std::size_t>(300 * i), 300),
                                     expected[prompt.size() - static_cast<std::size_t>(last - i)]),
                      kFewChunkBound)
                << "row " << i;
        }
        ASSERT_EQ(found[0], found[1]) << "other bits the second time";
        ASSERT_LE(relative_error(found[0], expected.back()), kFewChunkBound);
      }
      for (std::size_t batch = 2; batch <= 9; ++batch) {  // 9 are more than a few
        SCOPED_TRACE("batch " + std::to_string(batch));
        Model decoder(*model.device,
                      model.options(static_cast<std::int64_t>(batch), 4, 24, 0, true));
        // Session b begins b steps late: all stand elsewhere.
        for (std::size_t i = 0; i < prompt.size(); ++i) {
          if (i < batch) {
            std::vector<std::int64_t> totals = decoder.state().totals();
            for (std::size_t b = i; b < batch; ++b) totals[b] = b == i ? 0 : -1;
            decoder.set_totals(totals);
          }
          std::vector<std::int32_t> tokens(batch, 0);
          for (std::size_t b = 0; b <= std::min(i, batch - 1); ++b) tokens[b] = prompt[i - b];
          decoder.feed(tokens);
          decoder.step(nullptr);
        }
        const std::vector<float> logits = decoder.logits();
        const std::vector<std::int32_t> chosen = decoder.tokens();
        for (std::size_t b = 0; b < batch; ++b) {
          const std::span<const float> row = std::span(logits).subspan(300 * b, 300);
          ASSERT_LE(relative_error(row, expected[prompt.size() - 1 - b]),
                    batch <= 8 ? kFewBound : 2 * kRoundedBound)
              << "session " << b;
          ASSERT_EQ(chosen[b], argmax(row));
        }
      }
    };
    if (type == ElementType::kQ4_0)
      check(std::integral_constant<int, 128>());
    else
      check(std::integral_constant<int, 64>());
    if (testing::Test::HasFatalFailure()) return;
  }
}

// As small_chunks(): a prompt in chunks, then steps across the ring's end.
TEST(CudaDecoder, Small) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, false, 78);
  CudaDecoder<bf16, 64> decoder(*model.device, model.options(1, 2, 12, 5, true));
  PlainDecoder oracle = model.oracle(2, 12);
  std::vector<double> expected;
  const std::vector<std::int32_t> prompt{7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47};
  for (const std::int32_t token : prompt) expected = oracle.step(token);
  decoder.prefill(0, prompt);
  for (int i = 0; i < 6; ++i) {
    ASSERT_LE(relative_error(decoder.logits(), expected), kRoundedBound) << "step " << i;
    expected = oracle.step(decoder.tokens()[0]);
    decoder.step(nullptr);
  }
}

TEST(CudaDecoder, AReplayedStepIsTheSameBitsAsLaunches) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(128, false, 3);
  for (const std::int64_t batch : {1, 5}) {
    std::vector<std::int32_t> histories[3];
    std::vector<float> logits[3];
    for (int way = 0; way < 3; ++way) {  // launches, replays, replays with overlap
      CudaDecoderOptions options = model.options(batch, 4, 60, 0, way == 2);
      options.choice = {.temperature = 0.8F, .seed = 11};
      CudaDecoder<bf16, 128> decoder(*model.device, options);
      std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch));
      std::iota(tokens.begin(), tokens.end(), 5);
      decoder.feed(tokens);
      constexpr int kSteps = 300;
      cudaStream_t stream = nullptr;
      check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
      decoder.step(stream);
      if (way == 0) {
        for (int i = 1; i < kSteps; ++i) decoder.step(stream);
      } else {
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t executable = nullptr;
        check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
        decoder.step(stream);
        check_cuda(cudaStreamEndCapture(stream, &graph), "end");
        check_cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
        for (int i = 1; i < kSteps; ++i) check_cuda(cudaGraphLaunch(executable, stream), "launch");
        check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        check_cuda(cudaGraphExecDestroy(executable), "destroy");
        check_cuda(cudaGraphDestroy(graph), "destroy");
      }
      histories[way] = decoder.history(stream);
      logits[way] = decoder.logits(stream);
      EXPECT_EQ(decoder.state().totals(stream),
                std::vector<std::int64_t>(static_cast<std::size_t>(batch), kSteps));
      check_cuda(cudaStreamDestroy(stream), "destroy");
    }
    EXPECT_EQ(histories[0], histories[1]);
    EXPECT_EQ(logits[0], logits[1]);
    if (batch == 1) {
      EXPECT_GT(std::set<std::int32_t>(histories[0].begin(), histories[0].end()).size(), 20U);
    }
    // With overlap, attention may be cut otherwise: the sums, not the text, may differ in bits.
    EXPECT_EQ(histories[0], histories[2]);
  }
}

TEST(CudaDecoder, SessionsOfDifferentLengthsJoinAndLeave) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, true, 8);
  constexpr std::size_t kBatch = 4;
  CudaDecoder<bf16, 64> decoder(*model.device, model.options(kBatch, 3, 40, 16, true));
  std::vector<std::optional<PlainDecoder>> oracles(kBatch);
  std::vector<std::int64_t> totals(kBatch, -1);
  std::vector<std::int32_t> next(kBatch, 0);
  decoder.set_totals(totals);
  Random random(44);
  for (int round = 0; round < 70; ++round) {
    if (round % 7 == 0) {  // one leaves or joins
      const std::size_t b = random.below(kBatch);
      totals = decoder.state().totals();
      totals[b] = totals[b] < 0 ? 0 : -1;
      decoder.set_totals(totals);
      oracles[b].reset();
      if (totals[b] == 0) oracles[b].emplace(model.oracle(3, 40));
      for (std::size_t i = 0; i < kBatch; ++i)
        next[i] = static_cast<std::int32_t>(random.below(300));
      decoder.feed(next);
      if (totals[b] == 0 && round % 2 == 0) {  // with a prompt, in chunks
        std::vector<std::int32_t> prompt;
        std::vector<double> expected;
        for (std::uint64_t i = 0; i < 5 + random.below(60); ++i) {
          prompt.push_back(static_cast<std::int32_t>(random.below(300)));
          expected = oracles[b]->step(prompt.back());
        }
        decoder.prefill(static_cast<std::int64_t>(b), prompt);
        const std::vector<float> found = decoder.logits();
        const std::span<const float> row = std::span(found).subspan(b * 300, 300);
        ASSERT_LE(relative_error(row, expected), kRoundedBound) << "prompt of " << prompt.size();
        next[b] = decoder.tokens()[b];
        ASSERT_EQ(next[b], argmax(row));
      }
    }
    const std::vector<std::int32_t> before = decoder.tokens();
    decoder.step(nullptr);
    const std::vector<float> found = decoder.logits();
    const std::vector<std::int32_t> chosen = decoder.tokens();
    for (std::size_t b = 0; b < kBatch; ++b) {
      if (!oracles[b]) {
        ASSERT_EQ(chosen[b], before[b]) << "an idle session chose a token";
        continue;
      }
      const std::span<const float> row = std::span(found).subspan(b * 300, 300);
      ASSERT_LE(relative_error(row, oracles[b]->step(next[b])), kRoundedBound)
          << "round " << round << ", session " << b;
      ASSERT_EQ(chosen[b], argmax(row));
      next[b] = chosen[b];
    }
  }
}

TEST(CudaDecoder, PrefillInAnyChunksIsFeeding) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(128, false, 4);
  std::vector<std::int32_t> prompt;
  Random random(2);
  for (int i = 0; i < 150; ++i) prompt.push_back(static_cast<std::int32_t>(random.below(300)));
  PlainDecoder oracle = model.oracle(4, 50);
  std::vector<double> expected;
  for (const std::int32_t token : prompt) expected = oracle.step(token);
  std::vector<double> after;
  for (const std::int64_t chunk : {1, 7, 64, 100, 150}) {
    CudaDecoder<bf16, 128> decoder(*model.device, model.options(1, 4, 50, chunk, true));
    decoder.prefill(0, prompt);
    EXPECT_LE(relative_error(decoder.logits(), expected), kRoundedBound) << chunk;
    EXPECT_EQ(decoder.state().totals(), std::vector<std::int64_t>{150});
    // And the stream goes on from there.
    const std::int32_t token = 42;
    if (after.empty()) after = oracle.step(token);
    decoder.feed(std::vector<std::int32_t>{token});
    decoder.step(nullptr);
    EXPECT_LE(relative_error(decoder.logits(), after), kRoundedBound) << chunk;
  }
}

TEST(CudaDecoder, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, false, 1);
  CudaDecoder<bf16, 64> decoder(*model.device, model.options(1, 0, 0, 8, false));
  const std::vector<std::int32_t> outside{300};
  const std::vector<std::int32_t> two{1, 2};
  EXPECT_THROW(decoder.feed(outside), Error);
  EXPECT_THROW(decoder.feed(two), Error);
  EXPECT_THROW(decoder.prefill(0, {}), Error);
  EXPECT_THROW(decoder.prefill(1, two), Error);
  EXPECT_THROW(decoder.prefill(0, std::vector<std::int32_t>(257, 1)), Error);
  CudaDecoder<bf16, 64> no_chunks(*model.device, model.options(1, 0, 0, 0, false));
  EXPECT_THROW(no_chunks.prefill(0, two), Error);
  CudaDecoderShape odd = model.shape;
  odd.hidden_size = 12;
  EXPECT_THROW((CudaDecoderWeights<bf16>(odd, true)), Error);
  CudaDecoderOptions options = model.options(1, 4, 50, 8, false);
  options.step.capacity = 56;
  EXPECT_THROW((CudaDecoder<bf16, 64>(*model.device, options)), Error);
}

}  // namespace SLUICE_TEST_UNIT
