// SPDX-License-Identifier: MIT
/// How attention of chunks is checked, for the tests of caches of each type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/chunk_attention.cuh>
#include <sluice/backend/cuda/decoder_shape.hpp>
#include <sluice/core/random.hpp>

#include "backend/cuda/decode_oracle.hpp"
#include "backend/cuda/device_test.hpp"

namespace sluice_test {

using namespace sluice;

struct ChunkCase {
  OracleConfig sequence;
  std::vector<std::int64_t> chunks;
  double swell = 0;  // not 0: inputs grow by so much a token, and are rounded to Element
};

/// Compares a row with what came. found: [head_dim], as it is read; scale: of codes. Numbers of 16
/// bits are off by half a unit. Codes are by what kv_element.hpp says of them, and by the roundings
/// of a rotation in float32.
template <class Cache>
void check_stored_row(std::span<const float> found, const float* expected, bool is_key,
                      float scale) {
  double peak = 0;
  for (std::size_t d = 0; d < found.size(); ++d)
    peak = std::max(peak, static_cast<double>(std::abs(expected[d])));
  const double slack = is_key ? 0x1p-22 * peak : 0;
  if constexpr (CudaCode<Cache>) {
    constexpr double kTop = std::is_same_v<Cache, std::int8_t> ? 127 : 448;
    // Two roundings of a quotient, here and there.
    ASSERT_NEAR(static_cast<double>(scale), peak / kTop, (0x1p-23 * peak + slack) / kTop);
  }
  for (std::size_t d = 0; d < found.size(); ++d) {
    const double x = static_cast<double>(expected[d]);
    const double step = static_cast<double>(scale);
    double bound = 0;
    if constexpr (std::is_same_v<Cache, std::int8_t>) {
      bound = step * (0.5 + 0x1p-16) + slack;
    } else if constexpr (CudaCode<Cache>) {
      bound = (1 + 0x1p-16) * std::max(0x1p-4 * std::abs(x), 0x1p-10 * step) + slack;
    } else {
      const double rounding = std::is_same_v<Cache, bf16> ? 0x1p-8 : 0x1p-11;
      // Below 2^-14, f16 is subnormal.
      bound = rounding * (is_key ? std::abs(x) + 1e-4 : std::max(std::abs(x), 0x1p-14));
    }
    ASSERT_NEAR(static_cast<double>(found[d]), x, bound) << "channel " << d;
  }
}

/// Feeds chunks and compares every token's output and every appended row.
template <class Element, int kHeadDim, class Cache = Element>
void check_chunks(const ChunkCase& c, std::uint64_t seed, ChunkKernel kernel = ChunkKernel::kMma) {
  const OracleConfig& s = c.sequence;
  SCOPED_TRACE("heads " + std::to_string(s.num_qo_heads) + ":" + std::to_string(s.num_kv_heads) +
               " x " + std::to_string(kHeadDim) + ", sinks " + std::to_string(s.num_sink_tokens) +
               ", window " + std::to_string(s.window_size) + ", capacity " +
               std::to_string(s.capacity) + ", first chunk " + std::to_string(c.chunks[0]));
  Random random(seed);
  DecodeOracle oracle(s);
  const std::vector<double> frequencies = oracle.frequencies();
  const DecodeStepConfig config{
      .num_sink_tokens = s.num_sink_tokens,
      .window_size = s.window_size == 0 ? DecodeStepConfig::kUnlimitedWindow : s.window_size,
      .capacity = s.capacity,
      .position_rule = s.in_text ? PositionRule::kInText : PositionRule::kInCache,
      .origin = s.origin,
      .frequencies = frequencies,
      .interleaved = s.interleaved};
  const DecodeStep step(config);
  const std::int64_t longest = *std::max_element(c.chunks.begin(), c.chunks.end());
  ChunkAttentionPlan<Element, kHeadDim, Cache> plan({s.num_qo_heads, s.num_kv_heads, kHeadDim},
                                                    config, longest, kernel);
  const auto qo = static_cast<std::size_t>(s.num_qo_heads);
  const auto kv = static_cast<std::size_t>(s.num_kv_heads);
  const auto capacity = static_cast<std::size_t>(s.capacity);
  const std::size_t fused = (qo + 2 * kv) * kHeadDim;
  // Rows that nobody wrote are NaN.
  Buffer<Cache, cuda> keys(kv * capacity * kHeadDim);
  Buffer<Cache, cuda> values(keys.size());
  Buffer<float, cuda> key_scales(CudaCode<Cache> ? kv * capacity : 1);
  Buffer<float, cuda> value_scales(key_scales.size());
  check_cuda(cudaMemset(keys.data(), 0xff, keys.bytes()), "cudaMemset");
  check_cuda(cudaMemset(values.data(), 0xff, values.bytes()), "cudaMemset");
  check_cuda(cudaMemset(key_scales.data(), 0xff, key_scales.bytes()), "cudaMemset");
  check_cuda(cudaMemset(value_scales.data(), 0xff, value_scales.bytes()), "cudaMemset");
  Buffer<float, cuda> input(static_cast<std::size_t>(longest) * fused);
  Buffer<std::uint16_t, cuda> output(static_cast<std::size_t>(longest) * qo * kHeadDim);
  ChunkAttentionTensors<Element, Cache> x;
  x.query = input.data();
  x.key = input.data() + qo * kHeadDim;
  x.value = input.data() + (qo + kv) * kHeadDim;
  x.stride = static_cast<std::int64_t>(fused);
  x.out = reinterpret_cast<Element*>(output.data());
  x.keys = keys.data();
  x.values = values.data();
  x.head_stride = s.capacity * kHeadDim;
  x.token_stride = kHeadDim;
  if (CudaCode<Cache>) {
    x.key_scales = key_scales.data();
    x.value_scales = value_scales.data();
    x.scale_head_stride = s.capacity;
  }
  const double rounding = element_type_of<Element> == ElementType::kBF16 ? 0x1p-8 : 0x1p-11;

  std::int64_t base = 0;
  for (const std::int64_t length : c.chunks) {
    std::vector<float> in = random_floats(random, static_cast<std::size_t>(length) * fused);
    for (std::size_t i = 0; c.swell > 0 && i < in.size(); ++i) {
      const double token = static_cast<double>(base) + static_cast<double>(i / fused);
      in[i] = static_cast<float>(Element(in[i] * static_cast<float>(0.25 + c.swell * token)));
    }
    input.upload(in);
    std::vector<std::uint16_t> found[2];
    for (std::vector<std::uint16_t>& result : found) {
      check_cuda(cudaMemset(output.data(), 0xff, output.bytes()), "cudaMemset");
      plan.rotate(step, base, length, nullptr);
      plan.launch(step, x, base, length, s.sm_scale, nullptr);
      result = output.download();
    }
    ASSERT_EQ(found[0], found[1]) << "other bits the second time";
    const auto widen = [](const std::vector<std::uint16_t>& bits) {
      std::vector<float> wide;
      for (const std::uint16_t b : bits) wide.push_back(static_cast<float>(Element::from_bits(b)));
      return wide;
    };
    // Rows as they are read, and their scales.
    const auto held = [&](const Buffer<Cache, cuda>& rows, const std::vector<float>& scales) {
      const std::vector<Cache> stored = rows.download();
      std::vector<float> wide(stored.size());
      for (std::size_t e = 0; e < wide.size(); ++e)
        wide[e] = static_cast<float>(stored[e]) * (CudaCode<Cache> ? scales[e / kHeadDim] : 1);
      return wide;
    };
    const std::vector<float> scales_of_keys = key_scales.download();
    const std::vector<float> scales_of_values = value_scales.download();
    const std::vector<float> held_keys = held(keys, scales_of_keys);
    const std::vector<float> held_values = held(values, scales_of_values);
    const std::vector<float> out = widen(found[0]);
    for (std::int64_t i = 0; i < length; ++i) {
      const auto slot = static_cast<std::size_t>(oracle.append());
      const float* row = &in[static_cast<std::size_t>(i) * fused];
      // Later tokens of the chunk may have taken this one's slot only where nobody sees it.
      const bool held = i + s.capacity - s.num_sink_tokens >= length;
      for (std::size_t head = 0; held && head < kv; ++head) {
        const std::vector<float> key = oracle.stored_key(row + (qo + head) * kHeadDim);
        const std::size_t at = head * capacity + slot;
        const auto check = [&](const std::vector<float>& rows, const std::vector<float>& scales,
                               const float* expected, bool is_key) {
          check_stored_row<Cache>(std::span(rows).subspan(at * kHeadDim, kHeadDim), expected,
                                  is_key, CudaCode<Cache> ? scales[at] : 1);
        };
        check(held_keys, scales_of_keys, key.data(), true);
        check(held_values, scales_of_values, row + (qo + kv + head) * kHeadDim, false);
        if (testing::Test::HasFatalFailure()) return;
      }
      std::vector<double> expected(qo * kHeadDim);
      std::vector<double> lse(qo);
      oracle.attend(row, held_keys.data(), held_values.data(), expected.data(), lse.data());
      oracle.commit();
      double error = 0;
      double norm = 0;
      for (std::size_t e = 0; e < expected.size(); ++e) {
        const double difference =
            static_cast<double>(out[static_cast<std::size_t>(i) * expected.size() + e]) -
            expected[e];
        error += difference * difference;
        norm += expected[e] * expected[e];
      }
      // Query, probabilities and output are rounded once each, at most half a unit: scores of about
      // 4 move by 4 times that. Codes are widened: keys are rounded as the query is, values as the
      // output.
      const double roundings = CudaCode<Cache> ? 5 : 3;
      ASSERT_LE(std::sqrt(error), roundings * rounding * std::sqrt(norm)) << "token " << base + i;
    }
    base += length;
  }
}

// Few enough tokens for compute-sanitizer, whose racecheck follows every access to shared memory:
// sinks, a ring that wraps, a chunk that ends within a block.
inline ChunkCase small_chunks(int head_dim) {
  ChunkCase c;
  OracleConfig& s = c.sequence;
  s.head_dim = s.rotary_dim = head_dim;
  s.num_kv_heads = 1;
  s.num_qo_heads = 2;
  s.num_sink_tokens = 4;
  s.window_size = 40;
  s.sm_scale = 1 / std::sqrt(static_cast<float>(head_dim));
  c.chunks = {20, 33, 5};
  s.capacity = s.num_sink_tokens + s.window_size + 33 - 1;
  return c;
}

}  // namespace sluice_test
