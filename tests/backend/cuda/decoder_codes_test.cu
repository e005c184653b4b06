// SPDX-License-Identifier: MIT
/// Whole decoders over caches of codes: steps, chunks and batches against float64 with rows of
/// codes.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/decoder.cuh>
#include <sluice/core/random.hpp>

#include "backend/cuda/decoder_oracle.hpp"
#include "backend/cuda/device_test.hpp"
#include "backend/cuda/small_model.cuh"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::argmax;
using sluice_test::PlainCache;
using sluice_test::PlainDecoder;
using sluice_test::relative_error;
using sluice_test::rounding_error;
using sluice_test::SmallModel;

constexpr std::int64_t kSinks = 4;
constexpr std::int64_t kWindow = 50;

std::vector<std::int32_t> random_text(std::size_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::int32_t> text;
  for (std::size_t i = 0; i < count; ++i)
    text.push_back(static_cast<std::int32_t>(random.below(300)));
  return text;
}

/// A model, a text, and what may be between the reference and a decoder with a cache of codes.
template <class Cache, int kHeadDim>
struct CodesCase {
  using Decoder = CudaDecoder<bf16, kHeadDim, Cache>;
  static constexpr PlainCache kCache =
      std::is_same_v<Cache, std::int8_t> ? PlainCache::kInt8 : PlainCache::kFp8;

  SmallModel model;
  std::vector<std::int32_t> text;
  std::vector<std::vector<double>> expected;  // logits behind each token
  /// An entry between two codes may fall to either: what that does is computed.
  double exact_bound;
  /// Inputs of products are rounded to bf16, by 2^-9 of each at most. So are, in attention of 3
  /// layers, queries, probabilities and widened keys and values.
  double rounded_bound;

  explicit CodesCase(std::uint64_t seed)
      : model(kHeadDim, kHeadDim == 64, seed), text(random_text(90, seed + 1)) {
    PlainDecoder oracle = model.oracle(kSinks, kWindow, 0, 0, kCache);
    for (const std::int32_t token : text) expected.push_back(oracle.step(token));
    exact_bound = rounding_error(model, kSinks, kWindow, text, kCache);
    rounded_bound =
        rounding_error(model, kSinks, kWindow, text, kCache, 0x1p-9, 8) + 3 * 4 * 0x1p-9;
  }

  CudaDecoderOptions options(std::int64_t batch, std::int64_t chunk) const {
    return model.options(batch, kSinks, kWindow, chunk, true);
  }
};

template <class Case>
void check_steps(const Case& c) {
  std::vector<float> found[2];
  for (std::vector<float>& logits : found) {
    typename Case::Decoder decoder(*c.model.device, c.options(1, 0));
    const CudaDecoderShape& s = c.model.shape;
    EXPECT_EQ(decoder.cache_bytes(),
              static_cast<std::size_t>(2 * s.num_layers * s.num_kv_heads * (kSinks + kWindow) *
                                       (s.head_dim + 4)));
    for (std::size_t i = 0; i < c.text.size(); ++i) {
      decoder.feed({&c.text[i], 1});
      decoder.step(nullptr);
      logits = decoder.logits();
      ASSERT_LE(relative_error(logits, c.expected[i]), c.exact_bound) << "step " << i;
      ASSERT_EQ(decoder.tokens()[0], argmax(logits)) << "step " << i;
    }
  }
  EXPECT_EQ(found[0], found[1]) << "other bits the second time";
}

template <class Case>
void check_chunks(const Case& c) {
  const std::span<const std::int32_t> text(c.text);
  for (const std::int64_t chunk : {1, 7, 8, 9, 40, 80}) {
    SCOPED_TRACE("chunks of " + std::to_string(chunk));
    std::vector<float> found[2];
    for (std::vector<float>& logits : found) {
      typename Case::Decoder decoder(*c.model.device, c.options(1, chunk));
      decoder.prefill(0, text.first(80));
      ASSERT_LE(relative_error(decoder.logits(), c.expected[79]), c.rounded_bound);
      // And the stream goes on from there.
      for (std::size_t i = 80; i < text.size(); ++i) {
        decoder.feed(text.subspan(i, 1));
        decoder.step(nullptr);
        logits = decoder.logits();
        ASSERT_LE(relative_error(logits, c.expected[i]), c.rounded_bound) << "step " << i;
      }
    }
    EXPECT_EQ(found[0], found[1]) << "other bits the second time";
  }
}

/// Session b begins 4 b steps late, with a prompt of b tokens where b is even; the first leaves in
/// the middle, and its place is taken by another stream.
template <class Case>
void check_batch(const Case& c, std::size_t batch) {
  SCOPED_TRACE("batch " + std::to_string(batch));
  typename Case::Decoder decoder(*c.model.device, c.options(static_cast<std::int64_t>(batch), 16));
  std::vector<std::int64_t> totals(batch, -1);
  decoder.set_totals(totals);
  for (std::size_t i = 0; i < 70; ++i) {
    for (std::size_t b = 0; b < batch; ++b) {
      const bool joins = i == 4 * b || (b == 0 && i == 50);
      const bool leaves = b == 0 && i == 40;
      if (!joins && !leaves) continue;
      totals = decoder.state().totals();
      totals[b] = leaves ? -1 : 0;
      decoder.set_totals(totals);
      if (joins && b > 0 && b % 2 == 0)
        decoder.prefill(static_cast<std::int64_t>(b), std::span(c.text).first(b));
    }
    totals = decoder.state().totals();
    std::vector<std::int32_t> tokens(batch, 0);
    for (std::size_t b = 0; b < batch; ++b)
      if (totals[b] >= 0) tokens[b] = c.text[static_cast<std::size_t>(totals[b])];
    decoder.feed(tokens);
    const std::vector<std::int32_t> before = decoder.tokens();
    decoder.step(nullptr);
    const std::vector<float> logits = decoder.logits();
    const std::vector<std::int32_t> chosen = decoder.tokens();
    for (std::size_t b = 0; b < batch; ++b) {
      if (totals[b] < 0) {
        ASSERT_EQ(chosen[b], before[b]) << "an idle session chose a token";
        continue;
      }
      const std::span<const float> row = std::span(logits).subspan(300 * b, 300);
      ASSERT_LE(relative_error(row, c.expected[static_cast<std::size_t>(totals[b])]),
                c.rounded_bound)
          << "step " << i << ", session " << b;
      ASSERT_EQ(chosen[b], argmax(row));
    }
  }
}

template <class Case>
void check_all(const Case& c) {
  check_steps(c);
  check_chunks(c);
  for (const std::size_t batch : {3, 9}) check_batch(c, batch);
}

TEST(DecoderCodes, Int8AgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  check_all(CodesCase<std::int8_t, 64>(401));
}
TEST(DecoderCodes, Fp8AgainstFloat64) {
  SKIP_WITHOUT_DEVICE();
  check_all(CodesCase<fp8_e4m3, 128>(403));
}

TEST(DecoderCodes, Small) {  // for compute-sanitizer
  SKIP_WITHOUT_DEVICE();
  const SmallModel model(64, false, 405);
  CudaDecoder<bf16, 64, std::int8_t> decoder(*model.device, model.options(1, 2, 12, 12, true));
  decoder.prefill(0, random_text(12, 406));
  decoder.prefill(0, random_text(5, 407));
  for (int i = 0; i < 4; ++i) decoder.step(nullptr);
  EXPECT_EQ(decoder.state().totals(), std::vector<std::int64_t>{21});
}

}  // namespace SLUICE_TEST_UNIT
