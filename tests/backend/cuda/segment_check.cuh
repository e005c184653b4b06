// SPDX-License-Identifier: MIT
/// What the tests of segment attention share: random lists over caches of all kinds, and the
/// comparison with the oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/segment_attention.cuh>
#include <sluice/core/random.hpp>

#include "backend/cuda/device_test.hpp"
#include "backend/cuda/segment_oracle.hpp"

namespace sluice_test {

using namespace sluice;

template <class T>
T pick_one(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[random.next() % choices.size()];
}

/// A stored row type as the tests write it.
template <class Element>
struct StoredForm {
  static constexpr bool kScaled = false;
  static Element encode(float x) { return Element(x); }
  static float decode(Element x) { return static_cast<float>(x); }
};
template <>
struct StoredForm<std::int8_t> {
  static constexpr bool kScaled = true;
  static std::int8_t encode(float x) {
    return static_cast<std::int8_t>(std::lround(std::clamp(x * 40, -128.0F, 127.0F)));
  }
  static float decode(std::int8_t x) { return static_cast<float>(x); }
};
template <>
struct StoredForm<fp8_e4m3> {
  static constexpr bool kScaled = true;
  static fp8_e4m3 encode(float x) {
    return fp8_e4m3(x * (std::abs(x) < 0.1F ? 0.05F : 100));  // subnormals, too
  }
  static float decode(fp8_e4m3 x) { return static_cast<float>(x); }
};

/// Rows of one cache: [heads, slots, head_dim], or [slots, heads, head_dim].
template <class Element>
struct Rows {
  Rows(Random& random, std::int64_t heads, std::int64_t slots, std::int64_t dim, bool heads_first)
      : heads(heads), slots(slots), dim(dim), heads_first(heads_first) {
    const std::vector<float> x =
        random_floats(random, static_cast<std::size_t>(heads * slots * dim));
    codes.reserve(x.size());
    for (const float v : x) codes.push_back(StoredForm<Element>::encode(v));
    scales.resize(static_cast<std::size_t>(heads * slots));
    for (float& s : scales)
      s = StoredForm<Element>::kScaled ? 0.01F + 0.02F * static_cast<float>(random.uniform()) : 1;
  }
  std::int64_t head_stride() const { return heads_first ? slots * dim : dim; }
  std::int64_t token_stride() const { return heads_first ? dim : heads * dim; }
  std::int64_t scale_head_stride() const { return heads_first ? slots : 1; }
  std::int64_t scale_token_stride() const { return heads_first ? 1 : heads; }
  std::vector<float> row(std::int64_t head, std::int64_t slot) const {
    std::vector<float> result;
    const auto at = static_cast<std::size_t>(head * head_stride() + slot * token_stride());
    const float scale =
        scales[static_cast<std::size_t>(head * scale_head_stride() + slot * scale_token_stride())];
    for (std::size_t d = 0; d < static_cast<std::size_t>(dim); ++d)
      result.push_back(StoredForm<Element>::decode(codes[at + d]) *
                       (StoredForm<Element>::kScaled ? scale : 1));
    return result;
  }
  /// NaN in every form of a row.
  void poison(std::int64_t slot) {
    for (std::int64_t head = 0; head < heads; ++head) {
      const auto at = static_cast<std::size_t>(head * head_stride() + slot * token_stride());
      std::memset(static_cast<void*>(&codes[at]), 0xff,
                  static_cast<std::size_t>(dim) * sizeof(Element));
      scales[static_cast<std::size_t>(head * scale_head_stride() + slot * scale_token_stride())] =
          std::numeric_limits<float>::quiet_NaN();
    }
  }
  void upload() {
    device = Buffer<Element, cuda>(std::span<const Element>(codes));
    device_scales = Buffer<float, cuda>(std::span<const float>(scales));
  }

  std::int64_t heads, slots, dim;
  bool heads_first;
  std::vector<Element> codes;
  std::vector<float> scales;
  Buffer<Element, cuda> device;
  Buffer<float, cuda> device_scales;
};

/// One head class of one session: its caches, and the list over them in both forms.
template <class Element>
struct SegmentList {
  struct Run {
    std::size_t cache;
    std::int64_t first_slot;
    OracleSegment rule;
    bool counted;  // the prefix comes from device memory
  };
  std::vector<std::unique_ptr<Rows<Element>>> keys;
  std::vector<std::unique_ptr<Rows<Element>>> values;
  std::vector<Run> runs;
  Buffer<std::int64_t, cuda> counters;

  void add_cache(Random& random, std::int64_t heads, std::int64_t slots, std::int64_t dim) {
    const bool heads_first = random.next() % 3 != 0;
    keys.push_back(std::make_unique<Rows<Element>>(random, heads, slots, dim, heads_first));
    values.push_back(std::make_unique<Rows<Element>>(random, heads, slots, dim, heads_first));
  }
  /// Rows that no query sees become NaN; the lists are written down for the device and the oracle.
  std::vector<device::Segment<Element>> seal(const OracleVariant& variant, std::int64_t first_index,
                                             std::int64_t queries) {
    for (std::size_t c = 0; c < keys.size(); ++c) {
      std::vector<bool> seen(static_cast<std::size_t>(keys[c]->slots), false);
      for (const Run& run : runs) {
        if (run.cache != c) continue;
        for (std::int64_t j = 0; j < run.rule.visible; ++j)
          for (std::int64_t q = 0; q < queries; ++q)
            if (variant.sees(first_index + q, run.rule.first_index + j, run.rule.group))
              seen[static_cast<std::size_t>(run.first_slot + j)] = true;
      }
      for (std::size_t s = 0; s < seen.size(); ++s) {
        if (seen[s]) continue;
        keys[c]->poison(static_cast<std::int64_t>(s));
        values[c]->poison(static_cast<std::int64_t>(s));
      }
      keys[c]->upload();
      values[c]->upload();
    }
    std::vector<std::int64_t> counts;
    for (Run& run : runs) {
      counts.push_back(run.rule.first_index + run.rule.visible);
      for (std::int64_t h = 0; h < keys[run.cache]->heads; ++h)
        for (std::int64_t j = 0; j < run.rule.count; ++j) {
          const std::vector<float> k = keys[run.cache]->row(h, run.first_slot + j);
          const std::vector<float> v = values[run.cache]->row(h, run.first_slot + j);
          run.rule.keys.insert(run.rule.keys.end(), k.begin(), k.end());
          run.rule.values.insert(run.rule.values.end(), v.begin(), v.end());
        }
    }
    counters = Buffer<std::int64_t, cuda>(std::span<const std::int64_t>(counts));
    std::vector<device::Segment<Element>> list;
    for (std::size_t r = 0; r < runs.size(); ++r) {
      const Run& run = runs[r];
      const Rows<Element>& k = *keys[run.cache];
      const Rows<Element>& v = *values[run.cache];
      device::Segment<Element> s;
      s.first_index = run.rule.first_index;
      s.count = run.rule.count;
      s.visible = run.counted ? run.rule.count : run.rule.visible;
      s.visible_tokens = run.counted ? counters.data() + r : nullptr;
      s.first_position = run.rule.first_position;
      s.shift = run.rule.shift;
      s.ceiling = run.rule.ceiling;
      s.group = run.rule.group;
      s.keys = k.device.data() + run.first_slot * k.token_stride();
      s.values = v.device.data() + run.first_slot * v.token_stride();
      s.key_head_stride = k.head_stride();
      s.key_token_stride = k.token_stride();
      s.value_head_stride = v.head_stride();
      s.value_token_stride = v.token_stride();
      s.key_scales = k.device_scales.data() + run.first_slot * k.scale_token_stride();
      s.value_scales = v.device_scales.data() + run.first_slot * v.scale_token_stride();
      s.key_scale_head_stride = k.scale_head_stride();
      s.key_scale_token_stride = k.scale_token_stride();
      s.value_scale_head_stride = v.scale_head_stride();
      s.value_scale_token_stride = v.scale_token_stride();
      list.push_back(s);
    }
    return list;
  }
};

struct SegmentCase {
  SegmentAttentionShape shape;
  std::int64_t head_dim = 64;
  OracleRotation rotation;
  OracleVariant variant;
  std::int64_t pages = 0;  // segments of up to 3 entries, at places of their own
  int splits = 0;
  ElementType input = ElementType::kF32;
  ElementType output = ElementType::kF32;
  double origin = 0;
};

inline std::string describe(const SegmentCase& c) {
  const SegmentAttentionShape& s = c.shape;
  return "heads " + std::to_string(s.num_qo_heads) + ":" + std::to_string(s.num_kv_heads) + " x " +
         std::to_string(c.head_dim) + ", queries " + std::to_string(s.max_queries) + ", batch " +
         std::to_string(s.batch_size) + ", classes " + std::to_string(s.num_classes()) +
         ", window " + std::to_string(c.variant.window_size) + ", sinks " +
         std::to_string(c.variant.num_sink_tokens) + ", splits " + std::to_string(c.splits) +
         ", pairs " + std::to_string(c.rotation.frequencies.size()) +
         (c.rotation.interleaved ? " interleaved" : " halves") + ", origin " +
         std::to_string(c.origin) + ", input " + std::string(to_string(c.input)) + ", output " +
         std::string(to_string(c.output));
}

inline SegmentCase random_segment_case(Random& random, std::int64_t head_dim) {
  SegmentCase c;
  c.head_dim = head_dim;
  SegmentAttentionShape& s = c.shape;
  s.num_kv_heads = pick_one(random, {1, 2, 3});
  s.num_qo_heads = s.num_kv_heads * pick_one(random, {1, 2, 3, 4, 5, 7, 8, 16});
  s.batch_size = pick_one(random, {1, 1, 2, 3});
  s.max_queries = pick_one(random, {1, 1, 2, 3, 5, 8, 16});
  s.max_segments = 40;
  s.max_keys = 1000;
  if (s.num_kv_heads > 1 && random.next() % 2 == 0) {
    s.head_classes.resize(2);  // heads in reversed order, the last by itself
    for (std::int64_t h = s.num_kv_heads - 1; h >= 0; --h)
      s.head_classes[h == s.num_kv_heads - 1 ? 1 : 0].push_back(static_cast<std::int32_t>(h));
  }
  const int pairs =
      pick_one(random, {0, 1, static_cast<int>(head_dim / 4), static_cast<int>(head_dim / 2),
                        static_cast<int>(head_dim / 2)});
  for (int i = 0; i < pairs; ++i)
    c.rotation.frequencies.push_back(std::pow(10000.0, -static_cast<double>(i) / pairs));
  c.rotation.interleaved = random.next() % 2 == 0;
  c.rotation.factor = pick_one(random, {1.0, 1.0, 1.1});
  c.variant.sm_scale = 1 / std::sqrt(static_cast<double>(head_dim));
  c.variant.window_size = pick_one<std::int64_t>(random, {1, 2, 15, 16, 17, 127, 128, 129, 300});
  c.variant.num_sink_tokens = pick_one<std::int64_t>(random, {0, 1, 4, 17});
  c.variant.own_group = 1;
  c.variant.bidirectional = random.next() % 6 == 0;
  c.splits = pick_one(random, {0, 1, 2, 3, 7, 16, 24});
  c.input = pick_one(random, {ElementType::kF32, ElementType::kBF16, ElementType::kF16});
  c.output = pick_one(
      random, {ElementType::kF32, ElementType::kF32, ElementType::kBF16, ElementType::kF16});
  c.origin = pick_one(random, {0.0, 0.5, 7.0, 1e8});
  return c;
}

/// Bytes of `x` rounded to `type`; `x` becomes what they say.
inline std::vector<std::uint8_t> encode_as(std::vector<float>& x, ElementType type) {
  const std::size_t size = type == ElementType::kF32 ? 4 : 2;
  std::vector<std::uint8_t> bytes(x.size() * size);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (type == ElementType::kBF16) {
      const bf16 value(x[i]);
      x[i] = static_cast<float>(value);
      std::memcpy(&bytes[2 * i], &value, 2);
    } else if (type == ElementType::kF16) {
      const f16 value(x[i]);
      x[i] = static_cast<float>(value);
      std::memcpy(&bytes[2 * i], &value, 2);
    } else {
      std::memcpy(&bytes[4 * i], &x[i], 4);
    }
  }
  return bytes;
}
inline float decode_as(const std::uint8_t* bytes, ElementType type, std::size_t i) {
  if (type == ElementType::kF32) {
    float x;
    std::memcpy(&x, bytes + 4 * i, 4);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, bytes + 2 * i, 2);
  return type == ElementType::kBF16 ? static_cast<float>(bf16::from_bits(bits))
                                    : static_cast<float>(f16::from_bits(bits));
}

/// The runs that a window of its own group shows a chunk of queries, over a ring with a wrap, and
/// what it sees of other groups: prefixes, empty segments, other places.
template <class Element>
void fill_list(SegmentList<Element>& list, Random& random, const SegmentCase& c, std::int64_t heads,
               std::int64_t total, std::int64_t queries) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  const OracleVariant& v = c.variant;
  const auto add = [&](std::size_t cache, std::int64_t slot, std::int64_t index, std::int64_t count,
                       std::int64_t visible, double position, double shift, double ceiling,
                       std::int32_t group, bool counted) {
    OracleSegment rule;
    rule.first_index = index;
    rule.count = count;
    rule.visible = visible;
    rule.first_position = position;
    rule.shift = shift;
    rule.ceiling = ceiling;
    rule.group = group;
    list.runs.push_back({cache, slot, rule, counted});
  };
  // Another group in front: its first tokens, read from a place of their own.
  const auto others = [&](std::int32_t group) {
    const auto count = pick_one<std::int64_t>(random, {0, 1, 16, 33, 150});
    const auto visible = pick_one<std::int64_t>(
        random, {0, count, count, count / 2, std::max<std::int64_t>(count - 1, 0)});
    list.add_cache(random, heads, std::max<std::int64_t>(count, 1), c.head_dim);
    add(list.keys.size() - 1, 0, 0, count, visible, c.origin,
        pick_one(random, {0.0, 0.0, -3.0, 12.5}), pick_one(random, {kNone, c.origin + 40}), group,
        random.next() % 2 == 0);
  };
  if (random.next() % 3 != 0) others(0);
  // The own group: sinks, then a ring that may wrap.
  const std::int64_t sinks = v.num_sink_tokens;
  const std::int64_t ring = v.window_size + queries - 1 + pick_one<std::int64_t>(random, {0, 3});
  list.add_cache(random, heads, sinks + ring, c.head_dim);
  const std::size_t own = list.keys.size() - 1;
  const std::int64_t pinned = std::min(sinks, total);
  if (pinned > 0)
    add(own, 0, 0, pinned, pinned, c.origin, 0,
        random.next() % 2 == 0 ? c.origin + static_cast<double>(sinks + v.window_size - 1) : kNone,
        v.own_group, false);
  const std::int64_t oldest = std::max(sinks, total - queries - v.window_size + 1);
  for (std::int64_t index = oldest; index < total;) {
    const std::int64_t slot = sinks + (index - sinks) % ring;
    const std::int64_t count = std::min(total - index, sinks + ring - slot);
    add(own, slot, index, count, count, c.origin + static_cast<double>(index), 0, kNone,
        v.own_group, false);
    index += count;
  }
  if (random.next() % 4 == 0) others(2);
  if (random.next() % 4 == 0)
    for (int i = 0; i < 9; ++i) others(3 + i);
  if (c.pages > 0) {
    list.add_cache(random, heads, 3 * c.pages, c.head_dim);
    for (std::int64_t page = 0; page < c.pages; ++page) {
      const auto count = pick_one<std::int64_t>(random, {0, 1, 2, 3});
      add(list.keys.size() - 1, 3 * page, 3 * page, count, count,
          c.origin + static_cast<double>(3 * page), pick_one(random, {0.0, 0.0, 0.0, 5.0}), kNone,
          20, false);
    }
  }
}

/// One kernel's launch, so that the rest is compiled once for a stored type.
template <class Element>
using SegmentLaunch =
    std::function<void(const SegmentListsView<Element>&, const SegmentAttentionTensors&)>;

template <class Element>
void check_launch(const SegmentCase& c, const SegmentLaunch<Element>& launch, std::uint64_t seed) {
  SCOPED_TRACE(describe(c) + ", seed " + std::to_string(seed));
  Random random(seed);
  const SegmentAttentionShape& s = c.shape;
  const std::int64_t classes = s.num_classes();
  SegmentLists<Element> lists(s);

  std::vector<std::vector<std::int32_t>> heads = s.head_classes;
  if (heads.empty()) {
    heads.resize(1);
    for (std::int64_t h = 0; h < s.num_kv_heads; ++h)
      heads[0].push_back(static_cast<std::int32_t>(h));
  }
  std::vector<SegmentList<Element>> contents(static_cast<std::size_t>(s.batch_size * classes));
  std::vector<device::SegmentReader> readers;
  for (std::int64_t b = 0; b < s.batch_size; ++b) {
    device::SegmentReader reader;
    reader.queries = static_cast<std::int32_t>(
        b == 0 ? s.max_queries
               : static_cast<std::int64_t>(random.next() %
                                           static_cast<std::uint64_t>(s.max_queries + 1)));
    const std::int64_t total =
        reader.queries + pick_one<std::int64_t>(random, {0, 3, 100, 129, 500, 700});
    reader.first_index = total - reader.queries;
    reader.first_position = c.origin + static_cast<double>(reader.first_index);
    readers.push_back(reader);
    for (std::int64_t k = 0; k < classes; ++k) {
      auto& list = contents[static_cast<std::size_t>(b * classes + k)];
      // All heads of a session are at the same token; what they keep differs.
      fill_list(list, random, c,
                static_cast<std::int64_t>(heads[static_cast<std::size_t>(k)].size()), total,
                std::max<std::int64_t>(reader.queries, 1));
      lists.set(b, k, list.seal(c.variant, reader.first_index, reader.queries));
    }
  }
  lists.set_readers(readers);

  const auto per_token = static_cast<std::size_t>(s.num_qo_heads * c.head_dim);
  const auto rows = static_cast<std::size_t>(s.batch_size * s.max_queries);
  std::vector<float> query = random_floats(random, rows * per_token);
  const std::vector<std::uint8_t> bytes = encode_as(query, c.input);
  const Buffer<std::uint8_t, cuda> input{std::span<const std::uint8_t>(bytes)};
  const std::size_t out_size = c.output == ElementType::kF32 ? 4 : 2;
  Buffer<std::uint8_t, cuda> output(rows * per_token * out_size);
  Buffer<float, cuda> lse(rows * static_cast<std::size_t>(s.num_qo_heads));
  SegmentAttentionTensors x;
  x.query = input.data();
  x.input_type = c.input;
  x.out = output.data();
  x.output_type = c.output;
  x.query_token_stride = x.out_token_stride = static_cast<std::int64_t>(per_token);
  x.query_session_stride = x.out_session_stride =
      s.max_queries * static_cast<std::int64_t>(per_token);
  x.lse = lse.data();

  std::vector<std::uint8_t> found;
  std::vector<float> found_lse;
  for (int repeat = 0; repeat < 2; ++repeat) {
    check_cuda(cudaMemset(output.data(), 0xff, output.bytes()), "cudaMemset");
    check_cuda(cudaMemset(lse.data(), 0xff, lse.bytes()), "cudaMemset");
    launch(lists.view(), x);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const std::vector<std::uint8_t> now = output.download();
    const std::vector<float> now_lse = lse.download();
    if (repeat == 1) {
      ASSERT_EQ(now, found) << "the same bits twice";
      ASSERT_EQ(std::memcmp(now_lse.data(), found_lse.data(), now_lse.size() * 4), 0);
    }
    found = now;
    found_lse = now_lse;
  }

  for (std::int64_t b = 0; b < s.batch_size; ++b) {
    const device::SegmentReader& reader = readers[static_cast<std::size_t>(b)];
    const std::size_t base = static_cast<std::size_t>(b * s.max_queries) * per_token;
    const auto queries = static_cast<std::size_t>(reader.queries);
    std::vector<double> expected(queries * per_token);
    std::vector<double> expected_lse(queries * static_cast<std::size_t>(s.num_qo_heads));
    for (std::int64_t k = 0; k < classes; ++k) {
      std::vector<OracleSegment> segments;
      for (const auto& run : contents[static_cast<std::size_t>(b * classes + k)].runs)
        segments.push_back(run.rule);
      attend_oracle(&query[base], reader.queries, s.num_qo_heads, s.num_kv_heads, c.head_dim,
                    reader.first_index, reader.first_position, segments,
                    heads[static_cast<std::size_t>(k)], c.variant, c.rotation, expected.data(),
                    expected_lse.data());
    }
    double error = 0;
    double norm = 0;
    for (std::size_t e = 0; e < expected.size(); ++e) {
      const double difference =
          static_cast<double>(decode_as(found.data(), c.output, base + e)) - expected[e];
      error += difference * difference;
      norm += expected[e] * expected[e];
    }
    // As in decode attention: queries and probabilities carry 16 bits; then the output's rounding.
    const double bound = c.output == ElementType::kF32    ? 2e-4
                         : c.output == ElementType::kBF16 ? 3e-3
                                                          : 4e-4;
    ASSERT_LE(std::sqrt(error), bound * std::sqrt(norm)) << "session " << b;
    const std::size_t first = static_cast<std::size_t>(b * s.max_queries * s.num_qo_heads);
    for (std::size_t e = 0; e < expected_lse.size(); ++e) {
      if (std::isinf(expected_lse[e]))
        ASSERT_EQ(static_cast<double>(found_lse[first + e]), expected_lse[e]) << "session " << b;
      else
        ASSERT_NEAR(static_cast<double>(found_lse[first + e]), expected_lse[e], 5e-4)
            << "session " << b << ", row " << e;
    }
    // Rows behind a session's queries are nobody's.
    for (std::size_t e = (base + queries * per_token) * out_size;
         e < (base + static_cast<std::size_t>(s.max_queries) * per_token) * out_size; ++e)
      ASSERT_EQ(found[e], 0xff) << "session " << b;
  }
}

template <class Element, int kHeadDim, class Variant, int kColumnTiles>
void check_segments(const SegmentCase& c, const Variant& variant, std::uint64_t seed) {
  const SegmentRotation rotation{c.rotation.frequencies, c.rotation.factor, c.rotation.interleaved};
  const SegmentAttentionPlan<Element, kHeadDim, Variant, kColumnTiles> plan(c.shape, rotation,
                                                                            {c.splits, 0});
  check_launch<Element>(
      c,
      [&](const SegmentListsView<Element>& lists, const SegmentAttentionTensors& x) {
        plan.launch(lists, x, variant, nullptr, seed % 2 == 1);
      },
      seed);
}

/// The variant that `c` asks the oracle for.
inline device::GroupCausalWindow group_window(const OracleVariant& v) {
  return {{v.window_size, v.num_sink_tokens}, v.own_group, v.bidirectional};
}

template <class Element, int kHeadDim, int kColumnTiles>
void check_random_segments(int cases, std::uint64_t seed) {
  using Variant = device::AttentionVariant<device::GroupCausalWindow>;
  Random random(seed);
  for (int i = 0; i < cases; ++i) {
    SegmentCase c = random_segment_case(random, kHeadDim);
    const Variant variant{static_cast<float>(c.variant.sm_scale), group_window(c.variant), {}, {}};
    check_segments<Element, kHeadDim, Variant, kColumnTiles>(c, variant,
                                                             seed + static_cast<std::uint64_t>(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

/// Small enough for a sanitizer that watches every access.
template <class Element, int kHeadDim, int kColumnTiles>
void check_small_segments() {
  using Variant = device::AttentionVariant<device::GroupCausalWindow>;
  Random random(5);
  for (const int ratio : {1, 5}) {
    SegmentCase c = random_segment_case(random, kHeadDim);
    c.shape.num_qo_heads = ratio * c.shape.num_kv_heads;
    c.variant.window_size = 40;
    c.splits = 3;
    const Variant variant{static_cast<float>(c.variant.sm_scale), group_window(c.variant), {}, {}};
    check_segments<Element, kHeadDim, Variant, kColumnTiles>(c, variant, 9);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace sluice_test
