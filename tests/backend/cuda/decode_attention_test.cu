// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/sluice.cuh>

#include <sluice/core/random.hpp>

#include "backend/cuda/decode_oracle.hpp"
#include "backend/cuda/device_test.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using sluice_test::DecodeOracle;
using sluice_test::OracleConfig;
using sluice_test::random_floats;

struct Case {
  OracleConfig sequence;
  int batch = 1;
  std::vector<std::int64_t> starts;  // tokens before the first step, per sequence
  int steps = 8;
  DecodeSchedule schedule{};
  ElementType input = ElementType::kF32;
  ElementType output = ElementType::kF32;
  bool heads_first = true;  // cache rows [kv_heads, capacity] or [capacity, kv_heads]
};

std::string describe(const Case& c) {
  const OracleConfig& s = c.sequence;
  return "heads " + std::to_string(s.num_qo_heads) + ":" + std::to_string(s.num_kv_heads) + " x " +
         std::to_string(s.head_dim) + ", sinks " + std::to_string(s.num_sink_tokens) + ", window " +
         std::to_string(s.window_size) + ", capacity " + std::to_string(s.capacity) +
         (s.in_text ? ", in text" : ", in cache") + ", rotary " + std::to_string(s.rotary_dim) +
         (s.interleaved ? " interleaved" : " halves") + ", batch " + std::to_string(c.batch) +
         ", warps " + std::to_string(c.schedule.warps) + ", splits " +
         std::to_string(c.schedule.splits) + ", cluster " + std::to_string(c.schedule.cluster) +
         ", input " + std::string(to_string(c.input)) + ", output " +
         std::string(to_string(c.output));
}

/// Rounds `x` to `type` in place and returns the bytes to upload.
std::vector<std::uint8_t> encode(std::vector<float>& x, ElementType type) {
  std::vector<std::uint8_t> bytes(x.size() * (type == ElementType::kF32 ? 4 : 2));
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (type == ElementType::kF32) {
      std::memcpy(&bytes[4 * i], &x[i], 4);
    } else if (type == ElementType::kBF16) {
      const bf16 value(x[i]);
      x[i] = static_cast<float>(value);
      std::memcpy(&bytes[2 * i], &value, 2);
    } else {
      const f16 value(x[i]);
      x[i] = static_cast<float>(value);
      std::memcpy(&bytes[2 * i], &value, 2);
    }
  }
  return bytes;
}

std::vector<float> decode(const std::vector<std::uint8_t>& bytes, ElementType type) {
  std::vector<float> result(bytes.size() / (type == ElementType::kF32 ? 4 : 2));
  for (std::size_t i = 0; i < result.size(); ++i) {
    if (type == ElementType::kF32) {
      std::memcpy(&result[i], &bytes[4 * i], 4);
    } else {
      std::uint16_t bits;
      std::memcpy(&bits, &bytes[2 * i], 2);
      result[i] = type == ElementType::kBF16 ? static_cast<float>(bf16::from_bits(bits))
                                             : static_cast<float>(f16::from_bits(bits));
    }
  }
  return result;
}

DecodeStepConfig step_config(const Case& c, const std::vector<double>& frequencies,
                             double attention_factor) {
  const OracleConfig& s = c.sequence;
  return {.num_sink_tokens = s.num_sink_tokens,
          .window_size = s.window_size == 0 ? DecodeStepConfig::kUnlimitedWindow : s.window_size,
          .capacity = s.capacity,
          .position_rule = s.in_text ? PositionRule::kInText : PositionRule::kInCache,
          .origin = s.origin,
          .batch_size = c.batch,
          .frequencies = frequencies,
          .attention_factor = attention_factor,
          .interleaved = s.interleaved};
}

/// What a cache holds for one of keys and values: rows where `at` says, and, of codes, scales.
/// Slots beyond the first `used` of a sequence hold NaN, or codes of 0xff with NaN for a scale.
template <class Element>
struct HostCache {
  static constexpr bool kCodes = sizeof(Element) == 1;
  using Bits = std::conditional_t<kCodes, std::uint8_t, std::uint16_t>;
  std::vector<Bits> bits;
  std::vector<std::uint32_t> scales;  // bits of floats; empty unless kCodes

  friend bool operator==(const HostCache&, const HostCache&) = default;

  void write(std::size_t at, std::size_t scale_at, std::span<const float> row) {
    if constexpr (kCodes) {
      std::vector<Element> codes(row.size());
      const float scale = sluice_test::quantise_on_cpu(row, codes.data());
      std::memcpy(&bits[at], codes.data(), row.size());
      scales[scale_at] = std::bit_cast<std::uint32_t>(scale);
    } else {
      std::vector<float> copy(row.begin(), row.end());
      const std::vector<std::uint8_t> bytes = encode(copy, element_type_of<Element>);
      std::memcpy(&bits[at], bytes.data(), bytes.size());
    }
  }
  void poison(std::size_t at, std::size_t scale_at, std::size_t count) {
    std::fill_n(&bits[at], count, static_cast<Bits>(0xffff));
    if (kCodes) scales[scale_at] = 0xffffffffU;
  }
  std::vector<float> read(std::size_t at, std::size_t scale_at, std::size_t count) const {
    if constexpr (kCodes) {
      std::vector<Element> codes(count);
      std::vector<float> row(count);
      std::memcpy(codes.data(), &bits[at], count);
      const auto scale = std::bit_cast<float>(scales[scale_at]);
      for (std::size_t d = 0; d < count; ++d) row[d] = static_cast<float>(codes[d]) * scale;
      return row;
    } else {
      std::vector<std::uint8_t> bytes(2 * count);
      std::memcpy(bytes.data(), &bits[at], bytes.size());
      return decode(bytes, element_type_of<Element>);
    }
  }
};

/// Whether an appended row is the fresh one as it must be stored. `exact`: the fresh one is known
/// to the last bit. Otherwise it went through float32 arithmetic, whose error is 2^-8 of a 16-bit
/// rounding of the largest partner; of codes, 2^-21 of the largest channel.
template <class Element>
void check_row(const HostCache<Element>& found, std::size_t at, std::size_t scale_at,
               const std::vector<float>& fresh, bool exact) {
  const std::size_t count = fresh.size();
  if constexpr (HostCache<Element>::kCodes) {
    HostCache<Element> expected{std::vector<std::uint8_t>(count), {0}};
    expected.write(0, 0, fresh);
    const auto scale = std::bit_cast<float>(expected.scales[0]);
    const auto found_scale = std::bit_cast<float>(found.scales[scale_at]);
    if (exact) {
      ASSERT_EQ(found.scales[scale_at], expected.scales[0]);
      for (std::size_t d = 0; d < count; ++d)
        ASSERT_EQ(found.bits[at + d], expected.bits[d]) << "channel " << d;
      return;
    }
    ASSERT_NEAR(found_scale, scale, 0x1p-20F * scale);
    const std::vector<float> wide = found.read(at, scale_at, count);
    for (std::size_t d = 0; d < count; ++d) {
      const float step = std::is_same_v<Element, std::int8_t>
                             ? scale / 2
                             : std::max(std::abs(fresh[d]) * 0x1p-4F, scale * 0x1p-10F);
      ASSERT_NEAR(wide[d], fresh[d], step + 448 * scale * 0x1p-20F) << "channel " << d;
    }
  } else {
    const double rounding = std::is_same_v<Element, bf16> ? 0x1p-8 : 0x1p-11;
    const std::vector<float> wide = found.read(at, scale_at, count);
    for (std::size_t d = 0; d < count; ++d)
      ASSERT_NEAR(wide[d], fresh[d], rounding * (std::abs(fresh[d]) + 1e-4)) << "channel " << d;
  }
}

/// Runs a case step by step and compares every step's output, lse and appended rows.
template <class Element, int kHeadDim>
void check(const Case& c, std::uint64_t seed) {
  SCOPED_TRACE(describe(c));
  const OracleConfig& s = c.sequence;
  ASSERT_EQ(s.head_dim, kHeadDim);
  using Host = HostCache<Element>;
  Random random(seed);
  const auto kv_heads = static_cast<std::size_t>(s.num_kv_heads);
  const auto qo_heads = static_cast<std::size_t>(s.num_qo_heads);
  const auto batch = static_cast<std::size_t>(c.batch);
  const auto capacity = static_cast<std::size_t>(s.capacity);
  const std::size_t cache = kv_heads * capacity * kHeadDim;  // elements per sequence

  std::vector<DecodeOracle> oracles;
  for (std::size_t b = 0; b < batch; ++b) {
    oracles.emplace_back(s);
    oracles.back().skip(c.starts[b]);
  }
  const std::vector<double> frequencies = oracles[0].frequencies();
  const DecodeStepConfig config = step_config(c, frequencies, oracles[0].attention_factor());
  DecodeStep step(config);
  step.set_totals(c.starts);
  const DecodeAttentionShape shape{s.num_qo_heads, s.num_kv_heads, kHeadDim};
  const DecodeAttentionPlan<Element, kHeadDim> plan(shape, config, false, c.schedule);

  // Rows that were written hold random numbers, all others NaN.
  const std::size_t head_stride = c.heads_first ? capacity * kHeadDim : kHeadDim;
  const std::size_t token_stride = c.heads_first ? kHeadDim : kv_heads * kHeadDim;
  const std::size_t scale_head_stride = capacity + 3;
  const std::size_t scale_sequence_stride = kv_heads * scale_head_stride + 1;
  const auto at = [&](std::size_t b, std::size_t head, std::size_t slot) {
    return b * cache + head * head_stride + slot * token_stride;
  };
  const auto scale_at = [&](std::size_t b, std::size_t head, std::size_t slot) {
    return b * scale_sequence_stride + head * scale_head_stride + slot;
  };
  std::array<Host, 2> host;  // keys, values
  for (int kv = 0; kv < 2; ++kv) {
    host[kv].bits.resize(batch * cache);
    if (Host::kCodes) host[kv].scales.resize(batch * scale_sequence_stride, 0xffffffffU);
    for (std::size_t b = 0; b < batch; ++b)
      for (std::size_t head = 0; head < kv_heads; ++head)
        for (std::size_t slot = 0; slot < capacity; ++slot) {
          std::vector<float> row = random_floats(random, kHeadDim);
          // Values of one head may differ by far: scales may leave the range of f16.
          if (Host::kCodes && kv == 1) {
            const int exponent = static_cast<int>(random.next() % 20) - 14;
            for (float& x : row) x = std::ldexp(x, exponent);
          }
          if (static_cast<std::int64_t>(slot) < c.starts[b])
            host[kv].write(at(b, head, slot), scale_at(b, head, slot), row);
          else
            host[kv].poison(at(b, head, slot), scale_at(b, head, slot), kHeadDim);
        }
  }
  using Bits = typename Host::Bits;
  std::array<Buffer<Bits, cuda>, 2> rows;
  std::array<Buffer<std::uint32_t, cuda>, 2> scales;
  for (int kv = 0; kv < 2; ++kv) {
    rows[kv] = Buffer<Bits, cuda>{std::span<const Bits>(host[kv].bits)};
    if (Host::kCodes)
      scales[kv] = Buffer<std::uint32_t, cuda>{std::span<const std::uint32_t>(host[kv].scales)};
  }

  const std::size_t in_size = c.input == ElementType::kF32 ? 4 : 2;
  const std::size_t out_size = c.output == ElementType::kF32 ? 4 : 2;
  // One fused row [query, key, value] per sequence, as a projection writes it.
  const std::size_t fused = (qo_heads + 2 * kv_heads) * kHeadDim;
  Buffer<std::uint8_t, cuda> input(batch * fused * in_size);
  Buffer<std::uint8_t, cuda> output(batch * qo_heads * kHeadDim * out_size);
  Buffer<float, cuda> lse(batch * qo_heads);

  DecodeAttentionTensors<Element> x;
  x.query = input.data();
  x.key = input.data() + qo_heads * kHeadDim * in_size;
  x.value = input.data() + (qo_heads + kv_heads) * kHeadDim * in_size;
  x.query_stride = x.key_stride = x.value_stride = static_cast<std::int64_t>(fused);
  x.input_type = c.input;
  x.out = output.data();
  x.lse = lse.data();
  x.out_stride = static_cast<std::int64_t>(qo_heads * kHeadDim);
  x.output_type = c.output;
  x.keys = reinterpret_cast<Element*>(rows[0].data());
  x.values = reinterpret_cast<Element*>(rows[1].data());
  x.sequence_stride = static_cast<std::int64_t>(cache);
  x.head_stride = static_cast<std::int64_t>(head_stride);
  x.token_stride = static_cast<std::int64_t>(token_stride);
  if (Host::kCodes) {
    x.key_scales = reinterpret_cast<float*>(scales[0].data());
    x.value_scales = reinterpret_cast<float*>(scales[1].data());
    x.scale_sequence_stride = static_cast<std::int64_t>(scale_sequence_stride);
    x.scale_head_stride = static_cast<std::int64_t>(scale_head_stride);
  }

  for (int i = 0; i < c.steps; ++i) {
    std::vector<float> in = random_floats(random, batch * fused);
    input.upload(encode(in, c.input));
    std::array<std::vector<std::uint8_t>, 2> outputs;  // of the same step, run twice
    for (std::vector<std::uint8_t>& bytes : outputs) {
      check_cuda(cudaMemset(output.data(), 0xff, output.bytes()), "cudaMemset");
      check_cuda(cudaMemset(lse.data(), 0xff, lse.bytes()), "cudaMemset");
      plan.launch(step, x, s.sm_scale, nullptr);
      bytes = output.download();
    }
    ASSERT_EQ(outputs[0], outputs[1]) << "step " << i;
    step.advance(nullptr);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");

    const std::vector<float> out = decode(outputs[1], c.output);
    const std::vector<float> found_lse = lse.download();
    std::array<Host, 2> found;
    for (int kv = 0; kv < 2; ++kv) {
      found[kv].bits = rows[kv].download();
      if (Host::kCodes) found[kv].scales = scales[kv].download();
    }
    for (std::size_t b = 0; b < batch; ++b) {
      const auto slot = static_cast<std::size_t>(oracles[b].append());
      const float* row = &in[b * fused];
      std::array<std::vector<float>, 2> held;  // [kv_heads, capacity, head_dim]
      for (int kv = 0; kv < 2; ++kv) {
        for (std::size_t head = 0; head < kv_heads; ++head) {
          SCOPED_TRACE("step " + std::to_string(i) + ", row " + std::to_string(kv) + ", head " +
                       std::to_string(head));
          const float* fresh = row + (qo_heads + (kv == 0 ? 0 : kv_heads) + head) * kHeadDim;
          const std::vector<float> expected =
              kv == 0 ? oracles[b].stored_key(fresh) : std::vector<float>(fresh, fresh + kHeadDim);
          const std::size_t place = at(b, head, slot);
          const std::size_t scale_place = scale_at(b, head, slot);
          check_row(found[kv], place, scale_place, expected, kv == 1 || s.rotary_dim == 0);
          if (testing::Test::HasFatalFailure()) return;
          std::copy_n(&found[kv].bits[place], kHeadDim, &host[kv].bits[place]);
          if (Host::kCodes) host[kv].scales[scale_place] = found[kv].scales[scale_place];
          for (std::size_t j = 0; j < capacity; ++j) {
            const std::vector<float> wide =
                found[kv].read(at(b, head, j), scale_at(b, head, j), kHeadDim);
            held[kv].insert(held[kv].end(), wide.begin(), wide.end());
          }
        }
      }
      std::vector<double> expected_out(qo_heads * kHeadDim);
      std::vector<double> expected_lse(qo_heads);
      oracles[b].attend(row, held[0].data(), held[1].data(), expected_out.data(),
                        expected_lse.data());
      oracles[b].commit();
      double error = 0;
      double norm = 0;
      for (std::size_t e = 0; e < expected_out.size(); ++e) {
        const double difference =
            static_cast<double>(out[b * expected_out.size() + e]) - expected_out[e];
        error += difference * difference;
        norm += expected_out[e] * expected_out[e];
      }
      // Queries and probabilities carry 16 bits (bf16) or 22 (f16, codes): 2^-17 of scores up to
      // about 20.
      const double bound = c.output == ElementType::kF32    ? 2e-4
                           : c.output == ElementType::kBF16 ? 3e-3
                                                            : 4e-4;
      ASSERT_LE(std::sqrt(error), bound * std::sqrt(norm)) << "step " << i << ", sequence " << b;
      for (std::size_t h = 0; h < qo_heads; ++h)
        ASSERT_NEAR(found_lse[b * qo_heads + h], expected_lse[h], 5e-4)
            << "step " << i << ", sequence " << b << ", head " << h;
    }
    // Nothing but the appended rows has changed.
    ASSERT_TRUE(found == host) << "step " << i;
  }
}

template <class T>
T pick(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[random.next() % choices.size()];
}

/// Any valid shape.
Case random_case(Random& random, int head_dim) {
  Case c;
  OracleConfig& s = c.sequence;
  s.head_dim = head_dim;
  s.num_kv_heads = pick(random, {1, 2, 3});
  s.num_qo_heads = s.num_kv_heads * pick(random, {1, 2, 3, 4, 5, 7, 8, 16});
  s.num_sink_tokens = pick(random, {0, 1, 2, 3, 4, 17, 40});
  const bool full = random.next() % 5 == 0;
  s.window_size = full ? 0 : pick<std::int64_t>(random, {1, 2, 15, 16, 17, 65, 127, 128, 129, 300});
  s.capacity =
      full ? s.num_sink_tokens + 150
           : s.num_sink_tokens + s.window_size + pick<std::int64_t>(random, {0, 0, 0, 3, 20});
  s.in_text = random.next() % 2 == 0;
  s.origin = pick(random, {0.0, 0.5, 7.0, 1e8});
  s.rotary_dim = pick(random, {0, 2, head_dim / 2, head_dim, head_dim, head_dim});
  s.theta = pick(random, {10000.0, 500000.0});
  s.interleaved = random.next() % 2 == 0;
  s.yarn = s.rotary_dim > 2 && random.next() % 4 == 0;
  s.sm_scale = 1 / std::sqrt(static_cast<float>(head_dim));
  c.batch = pick(random, {1, 1, 2, 3});
  for (int b = 0; b < c.batch; ++b) {
    const std::int64_t most = full ? s.capacity - 8 : 4 * s.capacity;
    c.starts.push_back(pick<std::int64_t>(
        random, {0, std::max<std::int64_t>(0, std::min(most, s.num_sink_tokens - 2)),
                 std::max<std::int64_t>(0, std::min(most, s.num_sink_tokens + s.window_size - 3)),
                 std::max<std::int64_t>(0, std::min(most, s.capacity - 3)),
                 static_cast<std::int64_t>(random.next() % static_cast<std::uint64_t>(most + 1))}));
  }
  c.steps = 6;
  const int cluster = pick(random, {1, 1, 2, 4, 8});
  c.schedule = {pick(random, {1, 2, 3, 4, 8}), cluster * pick(random, {1, 2, 3, 5}), cluster};
  c.input = pick(random, {ElementType::kF32, ElementType::kBF16, ElementType::kF16});
  c.output =
      pick(random, {ElementType::kF32, ElementType::kF32, ElementType::kBF16, ElementType::kF16});
  c.heads_first = random.next() % 3 != 0;
  return c;
}

template <class Parameters>
class DecodeAttention : public testing::Test {};
template <class Element, int kHeadDim>
using Kernel = std::tuple<Element, std::integral_constant<int, kHeadDim>>;
using Kernels =
    testing::Types<Kernel<bf16, 64>, Kernel<bf16, 80>, Kernel<bf16, 96>, Kernel<bf16, 128>,
                   Kernel<bf16, 256>, Kernel<f16, 64>, Kernel<f16, 80>, Kernel<f16, 96>,
                   Kernel<f16, 128>, Kernel<f16, 256>, Kernel<std::int8_t, 64>,
                   Kernel<std::int8_t, 80>, Kernel<std::int8_t, 96>, Kernel<std::int8_t, 128>,
                   Kernel<std::int8_t, 256>, Kernel<fp8_e4m3, 64>, Kernel<fp8_e4m3, 80>,
                   Kernel<fp8_e4m3, 96>, Kernel<fp8_e4m3, 128>, Kernel<fp8_e4m3, 256>>;
TYPED_TEST_SUITE(DecodeAttention, Kernels);

TYPED_TEST(DecodeAttention, EqualsTheReferenceOverRandomShapes) {
  SKIP_WITHOUT_DEVICE();
  using Element = std::tuple_element_t<0, TypeParam>;
  constexpr int kHeadDim = std::tuple_element_t<1, TypeParam>::value;
  Random random(11 + kHeadDim);
  for (int i = 0; i < 24; ++i) {
    check<Element, kHeadDim>(random_case(random, kHeadDim), 100 + static_cast<std::uint64_t>(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

/// Small enough for a sanitizer that watches every access.
TYPED_TEST(DecodeAttention, Small) {
  SKIP_WITHOUT_DEVICE();
  using Element = std::tuple_element_t<0, TypeParam>;
  constexpr int kHeadDim = std::tuple_element_t<1, TypeParam>::value;
  for (const int ratio : {1, 5, 16}) {
    Case c;
    c.sequence = {.num_qo_heads = 2 * ratio,
                  .num_kv_heads = 2,
                  .head_dim = kHeadDim,
                  .num_sink_tokens = 3,
                  .window_size = 70,
                  .capacity = 73,
                  .rotary_dim = kHeadDim,
                  .interleaved = ratio == 5,
                  .sm_scale = 0.1F};
    c.batch = 2;
    c.starts = {0, 200};
    c.steps = 3;
    c.schedule = ratio == 1 ? DecodeSchedule{2, 2, 1} : DecodeSchedule{2, 4, ratio == 5 ? 2 : 4};
    check<Element, kHeadDim>(c, 5);
    if (testing::Test::HasFatalFailure()) return;
  }
}

template <class Element>
class DecodeAttentionWindows : public testing::Test {};
using Elements = testing::Types<bf16, std::int8_t, fp8_e4m3>;
TYPED_TEST_SUITE(DecodeAttentionWindows, Elements);

TYPED_TEST(DecodeAttentionWindows, AroundAHundredAndTwentyEight) {
  SKIP_WITHOUT_DEVICE();
  for (const std::int64_t window : {127, 128, 129}) {
    for (std::int64_t sinks = 0; sinks <= 4; ++sinks) {
      for (const bool in_text : {false, true}) {
        Case c;
        c.sequence = {.num_qo_heads = 8,
                      .num_kv_heads = 2,
                      .head_dim = 128,
                      .num_sink_tokens = sinks,
                      .window_size = window,
                      .capacity = sinks + window,
                      .in_text = in_text,
                      .rotary_dim = 128,
                      .sm_scale = 0.0883883476F};
        c.batch = 3;
        c.starts = {0, sinks + window - 2, 1000};
        c.steps = 5;
        check<TypeParam, 128>(c, 17);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TYPED_TEST(DecodeAttentionWindows, StreamsFromAnEmptyCacheAcrossTwoWraps) {
  SKIP_WITHOUT_DEVICE();
  Case c;
  c.sequence = {.num_qo_heads = 4,
                .num_kv_heads = 1,
                .head_dim = 64,
                .num_sink_tokens = 2,
                .window_size = 21,
                .capacity = 23,
                .rotary_dim = 64,
                .sm_scale = 0.125F};
  c.starts = {0};
  c.steps = 70;
  c.schedule = {1, 2};
  check<TypeParam, 64>(c, 3);
}

TEST(DecodeStep, AnglesAreExactFarOut) {
  SKIP_WITHOUT_DEVICE();
  for (const double origin : {0.0, 0.5, 1e8, 4.5e9}) {
    OracleConfig s{.head_dim = 128,
                   .num_sink_tokens = 4,
                   .window_size = 100,
                   .capacity = 104,
                   .origin = origin,
                   .rotary_dim = 128,
                   .theta = 500000};
    const DecodeOracle oracle(s);
    Case c;
    c.sequence = s;
    c.batch = 2;
    const std::vector<double> frequencies = oracle.frequencies();
    DecodeStep step(step_config(c, frequencies, 1));
    const std::vector<std::int64_t> totals{50, 123456789};
    step.set_totals(totals);
    const std::vector<float> rows = step.rows_buffer().download();
    for (std::size_t b = 0; b < 2; ++b) {
      const double own = origin + static_cast<double>(totals[b]);
      const std::array<double, 2> places{own, std::min(own, origin + 103)};
      for (std::size_t which = 0; which < 2; ++which) {
        const std::vector<float> expected = oracle.angles(places[which]);
        // Float rounding, and the error of the reference's product of doubles.
        const double bound = 1.2e-7 + places[which] * 0x1p-53;
        for (std::size_t i = 0; i < 128; ++i)
          ASSERT_NEAR(rows[(b * 2 + which) * 128 + i], expected[i], bound) << origin << " " << i;
      }
    }
  }
}

TEST(DecodeStep, RefusesWhatDoesNotFit) {
  SKIP_WITHOUT_DEVICE();
  EXPECT_THROW(DecodeStep({.capacity = 0}), Error);
  EXPECT_THROW(DecodeStep({.num_sink_tokens = 4, .window_size = 8, .capacity = 11}), Error);
  EXPECT_THROW(DecodeStep({.window_size = 0, .capacity = 11}), Error);
  EXPECT_THROW((DecodeAttentionPlan<bf16, 64>({3, 2, 64}, {.capacity = 8}, false)), Error);
  EXPECT_THROW((DecodeAttentionPlan<bf16, 64>({4, 2, 128}, {.capacity = 8}, false)), Error);
  try {
    check_cuda(cudaErrorInvalidValue, "a call");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kDevice);
    EXPECT_NE(std::string(error.what()).find("a call"), std::string::npos);
    EXPECT_NE(error.detail().where.find("decode_attention_test.cu:"), std::string::npos);
  }
}

/// Fills a step's inputs from its counters, so that any way of running a step sees the same ones.
__global__ void draw_inputs(const std::int64_t* totals, std::uint16_t* input, int per_sequence,
                            std::uint64_t salt) {
  const auto total = static_cast<std::uint64_t>(totals[blockIdx.x]);
  for (int i = static_cast<int>(threadIdx.x); i < per_sequence; i += static_cast<int>(blockDim.x)) {
    std::uint64_t z = (total * 0x10001 + blockIdx.x * 977 + salt) * 0x9e3779b97f4a7c15ULL +
                      static_cast<std::uint64_t>(i) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    const float uniform = static_cast<float>((z >> 40) & 0xffffff) * 0x1p-23F - 1;
    input[blockIdx.x * static_cast<unsigned>(per_sequence) + static_cast<unsigned>(i)] =
        static_cast<std::uint16_t>(__float_as_uint(3 * uniform) >> 16);
  }
}

/// Adds a step's output bits to a digest that depends on order.
__global__ void digest_output(const std::uint32_t* output, std::uint64_t* digest, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) digest[i] = digest[i] * 0x100000001b3ULL + output[i];
}

/// A model of two layers with a batch of ragged sequences: everything of a step on the device.
template <class Element>
struct TwoLayers {
  static constexpr int kBatch = 3;
  static constexpr int kFused = (8 + 2 * 2) * 128;
  static constexpr int kOut = kBatch * 8 * 128;
  static constexpr std::int64_t kScales = kBatch * 2 * 260;
  static constexpr std::int64_t kCache = kScales * 128;
  DecodeStepConfig config;
  DecodeStep step;
  DecodeAttentionPlan<Element, 128> plan;
  Buffer<std::uint8_t, cuda> keys, values;
  Buffer<float, cuda> scales;
  Buffer<std::uint16_t, cuda> input;
  Buffer<float, cuda> output, lse;
  Buffer<std::uint64_t, cuda> digest;
  bool overlap;

  static DecodeStepConfig make(const std::vector<double>& frequencies) {
    return {.num_sink_tokens = 4,
            .window_size = 256,
            .capacity = 260,
            .batch_size = kBatch,
            .frequencies = frequencies};
  }
  TwoLayers(const std::vector<double>& frequencies, bool overlap_)
      : config(make(frequencies)),
        step(config),
        plan({8, 2, 128}, config, overlap_),
        keys(2 * kCache * sizeof(Element)),
        values(2 * kCache * sizeof(Element)),
        scales(4 * kScales),
        input(kBatch * kFused),
        output(kOut),
        lse(kBatch * 8),
        digest(2 * kOut),
        overlap(overlap_) {
    const std::vector<std::int64_t> totals{0, 100, 5000};
    step.set_totals(totals);
  }
  void attend(int layer, cudaStream_t stream) {
    DecodeAttentionTensors<Element> x;
    x.query = input.data();
    x.key = input.data() + 8 * 128;
    x.value = input.data() + 10 * 128;
    x.query_stride = x.key_stride = x.value_stride = kFused;
    x.out = output.data();
    x.output_type = ElementType::kF32;
    x.out_stride = 8 * 128;
    x.lse = lse.data();
    x.keys = reinterpret_cast<Element*>(keys.data()) + layer * kCache;
    x.values = reinterpret_cast<Element*>(values.data()) + layer * kCache;
    x.key_scales = scales.data() + layer * kScales;
    x.value_scales = scales.data() + (2 + layer) * kScales;
    x.scale_sequence_stride = 2 * 260;
    x.scale_head_stride = 260;
    x.sequence_stride = 2 * 260 * 128;
    x.head_stride = 260 * 128;
    x.token_stride = 128;
    plan.launch(step, x, 0.0883883476F, stream);
  }
  void run(cudaStream_t stream) {
    for (int layer = 0; layer < 2; ++layer) {
      draw_inputs<<<kBatch, 128, 0, stream>>>(step.totals_data(), input.data(), kFused,
                                              static_cast<std::uint64_t>(layer));
      attend(layer, stream);
      digest_output<<<kOut / 128, 128, 0, stream>>>(
          reinterpret_cast<const std::uint32_t*>(output.data()), digest.data() + layer * kOut,
          kOut);
    }
    step.advance(stream, overlap);
    check_cuda(cudaGetLastError(), "a step's launches");
  }
};

std::vector<double> plain_frequencies() {
  return DecodeOracle({.head_dim = 128, .window_size = 1, .capacity = 1, .rotary_dim = 128})
      .frequencies();
}

template <class Element>
class DecodeGraph : public testing::Test {};
TYPED_TEST_SUITE(DecodeGraph, Elements);

TYPED_TEST(DecodeGraph, ReplaysForThreeThousandStepsAsLaunchesOneByOne) {
  SKIP_WITHOUT_DEVICE();
  const std::vector<double> frequencies = plain_frequencies();
  constexpr int kSteps = 3000;
  TwoLayers<TypeParam> one_by_one(frequencies, false);
  for (int i = 0; i < kSteps; ++i) one_by_one.run(nullptr);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");

  for (const bool overlap : {false, true}) {
    TwoLayers<TypeParam> replayed(frequencies, overlap);
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "begin");
    replayed.run(stream);
    check_cuda(cudaStreamEndCapture(stream, &graph), "end");
    check_cuda(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
    for (int i = 0; i < kSteps; ++i) check_cuda(cudaGraphLaunch(executable, stream), "launch");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");

    EXPECT_EQ(replayed.step.totals(), (std::vector<std::int64_t>{3000, 3100, 8000}));
    EXPECT_EQ(replayed.digest.download(), one_by_one.digest.download()) << overlap;
    EXPECT_EQ(replayed.keys.download(), one_by_one.keys.download()) << overlap;
    EXPECT_EQ(replayed.values.download(), one_by_one.values.download()) << overlap;
    EXPECT_EQ(replayed.scales.download(), one_by_one.scales.download()) << overlap;
    check_cuda(cudaGraphExecDestroy(executable), "destroy");
    check_cuda(cudaGraphDestroy(graph), "destroy");
    check_cuda(cudaStreamDestroy(stream), "destroy");
  }
}

/// Nothing but attention and advance() in the stream: every launch starts under the one before it,
/// and fetches rows that the launch before that one wrote.
TYPED_TEST(DecodeGraph, AChainOfOverlappingLaunchesIsExact) {
  SKIP_WITHOUT_DEVICE();
  const std::vector<double> frequencies = plain_frequencies();
  constexpr int kSteps = 1200;
  std::vector<std::vector<float>> outputs[2];
  std::vector<std::uint8_t> caches[2];
  for (const bool overlap : {false, true}) {
    TwoLayers<TypeParam> model(frequencies, overlap);
    draw_inputs<<<model.kBatch, 128>>>(model.step.totals_data(), model.input.data(), model.kFused,
                                       99);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    for (int i = 0; i < kSteps; ++i) {
      model.attend(0, stream);
      if (i % 2 == 0) model.attend(1, stream);  // and one layer alone
      model.step.advance(stream, overlap);
      if (i % 100 == 99) outputs[overlap].push_back(model.output.download(stream));
    }
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    caches[overlap] = model.keys.download();
    check_cuda(cudaStreamDestroy(stream), "destroy");
  }
  EXPECT_EQ(outputs[0], outputs[1]);
  EXPECT_EQ(caches[0], caches[1]);
}

TYPED_TEST(DecodeGraph, IdleSequencesSeeNothingAndStay) {
  SKIP_WITHOUT_DEVICE();
  const std::vector<double> frequencies = plain_frequencies();
  TwoLayers<TypeParam> layers(frequencies, false);
  const std::vector<std::int64_t> totals{10, -1, 300};
  layers.step.set_totals(totals);
  check_cuda(cudaMemset(layers.output.data(), 0xff, layers.output.bytes()), "cudaMemset");
  const std::vector<std::uint8_t> before = layers.keys.download();
  layers.run(nullptr);
  EXPECT_EQ(layers.step.totals(), (std::vector<std::int64_t>{11, -1, 301}));
  const std::vector<float> out = layers.output.download();
  const std::vector<float> lse = layers.lse.download();
  for (std::size_t i = 0; i < 8 * 128; ++i) ASSERT_EQ(out[8 * 128 + i], 0.0F);
  for (std::size_t h = 0; h < 8; ++h) {
    ASSERT_EQ(lse[8 + h], -std::numeric_limits<float>::infinity());
    ASSERT_TRUE(std::isfinite(lse[h]));
  }
  const std::vector<std::uint8_t> after = layers.keys.download();
  const std::size_t per_sequence = 2 * 260 * 128 * sizeof(TypeParam);
  for (std::size_t i = 0; i < per_sequence; ++i)
    ASSERT_EQ(after[per_sequence + i], before[per_sequence + i]);
}

TEST(DecodeFull, ACacheWithoutRoomSaysSo) {
  SKIP_WITHOUT_DEVICE();
  DecodeStepConfig config{.capacity = 20};
  DecodeStep step(config);
  DecodeAttentionPlan<bf16, 64> plan({2, 1, 64}, config, false);
  Buffer<std::uint16_t, cuda> keys(20 * 64), values(20 * 64), input(4 * 64);
  Buffer<float, cuda> output(2 * 64), lse(2);
  DecodeAttentionTensors<bf16> x;
  x.query = input.data();
  x.key = x.value = input.data() + 128;
  x.out = output.data();
  x.output_type = ElementType::kF32;
  x.lse = lse.data();
  x.keys = reinterpret_cast<bf16*>(keys.data());
  x.values = reinterpret_cast<bf16*>(values.data());
  x.token_stride = 64;
  x.head_stride = x.sequence_stride = 20 * 64;
  step.set_totals(std::vector<std::int64_t>{19});
  plan.launch(step, x, 1, nullptr);
  step.advance(nullptr);
  for (const float value : output.download()) ASSERT_EQ(value, 0.0F);  // all values are zero
  EXPECT_NEAR(lse.download()[0], std::log(20.0), 1e-5);
  plan.launch(step, x, 1, nullptr);
  for (const float value : output.download()) ASSERT_TRUE(std::isnan(value));
  ASSERT_TRUE(std::isnan(lse.download()[1]));
}

}  // namespace SLUICE_TEST_UNIT
