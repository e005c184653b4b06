// SPDX-License-Identifier: MIT
// Attention over quantised caches: what attend() gives is what plain loops in double give over the
// numbers that the stored codes and scales stand for.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/reference.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::between;

/// A stored row in double, by the formats' definitions, and a bound of the numbers that a float32
/// product with it adds up: those of scale * n and of zero apart.
struct PlainRow {
  std::vector<double> x;
  std::vector<double> size;
};

double e4m3_value(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const double mantissa = (bits & 7) / 8.0;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
  return bits >= 128 ? -magnitude : magnitude;
}

template <class T, class Scale>
PlainRow plain_row(const T* row, [[maybe_unused]] const Scale* scales, std::int64_t dim) {
  PlainRow result;
  for (std::int64_t d = 0; d < dim; ++d) {
    double x;
    double size;
    if constexpr (std::is_same_v<T, std::int8_t>) {
      x = static_cast<double>(*scales) * row[d];
      size = std::abs(x);
    } else if constexpr (std::is_same_v<T, fp8_e4m3>) {
      x = static_cast<double>(*scales) * e4m3_value(row[d].bits);
      size = std::abs(x);
    } else if constexpr (std::is_same_v<T, int4x2>) {
      const int pair = row[d / 2].bits;
      const int code = d % 2 == 0 ? pair / 16 : pair % 16;
      const auto zero = static_cast<double>(static_cast<float>(scales[d / 128].zero));
      const double scaled = static_cast<double>(static_cast<float>(scales[d / 128].scale)) * code;
      x = scaled + zero;
      size = scaled + std::abs(zero);
    } else if constexpr (BlockElement<T>) {
      int code = 0;
      if constexpr (std::is_same_v<T, q8_0>) {
        code = row[d].bits;
      } else {
        const int pair = row[d / 32 * 16 + d % 16].bits;
        code = (d % 32 < 16 ? pair % 16 : pair / 16) - 8;
      }
      x = static_cast<double>(static_cast<float>(scales[d / 32])) * code;
      size = std::abs(x);
    } else {
      x = static_cast<double>(static_cast<float>(row[d]));
      size = std::abs(x);
    }
    result.x.push_back(x);
    result.size.push_back(size);
  }
  return result;
}

void rotate(std::vector<double>& x, const Rotary& rotary, double position) {
  const auto pairs = static_cast<std::size_t>(rotary.num_pairs());
  for (std::size_t i = 0; i < pairs; ++i) {
    const double angle = position * rotary.frequency(static_cast<int>(i));
    const double a = x[i];
    const double b = x[i + pairs];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + pairs] = b * std::cos(angle) + a * std::sin(angle);
  }
}

struct Case {
  std::int64_t head_dim;
  std::int64_t value_dim;
  std::int64_t group;
  KeyForm form;
};

/// Feeds a stream in chunks of random sizes until its window has gone round several times, and
/// compares every row of two chunks in seventeen.
template <class Key, class Value>
void check_stream(const Case& c, std::uint64_t seed) {
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kSinks = 3;
  constexpr std::int64_t kWindow = 90;
  constexpr std::int64_t kChunk = 9;
  const std::int64_t qo_heads = kHeads * c.group;
  const Rotary rotary(
      {.head_dim = static_cast<int>(c.head_dim), .rotary_dim = static_cast<int>(c.head_dim)});
  std::array<RetentionConfig, 1> retention{RetentionConfig::sink_window(kSinks, kWindow, kChunk)};
  retention[0].key_form = c.form;
  const std::array<LayerCacheConfig, 1> layer{LayerCacheConfig{0, &rotary}};
  KvCache<Key, Value> cache({1, kHeads, c.head_dim, c.value_dim}, retention, layer);
  AttentionWorkspace<cpu> workspace(&rotary,
                                    {.num_qo_heads = qo_heads,
                                     .num_kv_heads = kHeads,
                                     .head_dim = c.head_dim,
                                     .value_dim = c.value_dim,
                                     .max_queries = kChunk,
                                     .max_keys = retention[0].capacity},
                                    2);
  ThreadTeam team(2);
  RotaryTable table(rotary, kChunk);
  Random random(seed);
  const auto noise = [&](std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) value = static_cast<float>(0.3 + random.normal());
    return values;
  };
  const double sm_scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
  const AttentionVariant<> variant{static_cast<float>(sm_scale), {kWindow, kSinks}};
  for (int step = 0; cache.total() < 2 * retention[0].capacity + 20; ++step) {
    const std::int64_t count = step % 2 == 0 ? 1 : between(random, 2, kChunk);
    const std::int64_t first = cache.total();
    const std::vector<float> keys = noise(count * kHeads * c.head_dim);
    const std::vector<float> values = noise(count * kHeads * c.value_dim);
    const std::vector<float> query = noise(count * qo_heads * c.head_dim);
    const Position first_position = cache.write_position(first);
    table.fill_run(first_position, count);
    cache.append(count);
    cache.store(0, {keys.data(), count, kHeads, c.head_dim},
                {values.data(), count, kHeads, c.value_dim}, table.rows(), 0, count);
    std::array<Segment<Key, Value>, KvCache<Key, Value>::kMaxSegments> found;
    const std::span<const Segment<Key, Value>> segments(
        found.data(), static_cast<std::size_t>(cache.segments(0, count, found)));
    std::vector<float> out(static_cast<std::size_t>(count * qo_heads * c.value_dim));
    std::vector<float> lse(static_cast<std::size_t>(count * qo_heads));
    attend(AttentionQuery{{query.data(), count, qo_heads, c.head_dim}, first, first_position},
           segments, variant, {out.data(), count, qo_heads, c.value_dim}, lse.data(), workspace,
           team, cpu{});
    cache.commit();
    if (step % 17 > 1) continue;
    std::vector<double> reference(out.size());
    std::vector<double> reference_lse(lse.size());
    attend_reference({query.data(), count, qo_heads, c.head_dim}, first, first_position, segments,
                     variant, &rotary, kHeads,
                     HeadsView<double>(reference.data(), count, qo_heads, c.value_dim),
                     reference_lse.data());
    for (std::int64_t t = 0; t < count; ++t)
      for (std::int64_t head = 0; head < qo_heads; ++head) {
        const auto row = static_cast<std::size_t>(t * qo_heads + head);
        std::vector<double> scores;
        std::vector<PlainRow> rows;
        double size = 0;     // of what a score adds up
        double largest = 0;  // of what an output adds up
        for (const Segment<Key, Value>& segment : segments) {
          const SegmentRule& rule = segment.rule;
          const float* raw = query.data() + static_cast<std::int64_t>(row) * c.head_dim;
          std::vector<double> q(raw, raw + c.head_dim);
          rotate(q, rotary, rule.reader_position(first_position + static_cast<Position>(t)));
          for (std::int64_t j = 0; j < rule.visible; ++j) {
            const std::int64_t back = first + t - (rule.first_index + j);
            if (back < 0 || (rule.first_index + j >= kSinks && back >= kWindow)) continue;
            PlainRow key = plain_row(segment.key(head / c.group, j),
                                     segment.key_scale(head / c.group, j), c.head_dim);
            if (segment.key_rotation != nullptr) {
              rotate(key.x, rotary, rule.first_position + static_cast<double>(j));
              // Both channels of a pair are in each of them.
              const std::size_t half = key.size.size() / 2;
              for (std::size_t i = 0; i < half; ++i)
                key.size[i] = key.size[i + half] = key.size[i] + key.size[i + half];
            }
            double score = 0;
            double sum = 0;
            for (std::size_t d = 0; d < q.size(); ++d) {
              score += q[d] * key.x[d];
              sum += std::abs(q[d]) * key.size[d];
            }
            scores.push_back(sm_scale * score);
            size = std::max(size, sm_scale * sum);
            rows.push_back(plain_row(segment.value(head / c.group, j),
                                     segment.value_scale(head / c.group, j), c.value_dim));
            largest = std::max(largest,
                               *std::max_element(rows.back().size.begin(), rows.back().size.end()));
          }
        }
        const double max = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (const double score : scores) sum += std::exp(score - max);
        // Roundings of 2^-24 each: of sums over the lanes of a register and of their parts, of
        // rotations (6 with their tables), scales and products, and a rotation's angle, which is
        // exact to 2^-24 of a turn's cosine. A score's error changes weights by twice itself.
        const double score_bound = (static_cast<double>(c.head_dim) / 4 + 24) * 0x1p-24 * size;
        const double out_bound = (2 * score_bound + 40 * 0x1p-24) * largest;
        const double exact_lse = max + std::log(sum);
        ASSERT_NEAR(static_cast<double>(lse[row]), exact_lse, score_bound + 8 * 0x1p-24)
            << "lse of token " << first + t << " of " << count << ", head " << head;
        ASSERT_NEAR(reference_lse[row], exact_lse, score_bound + 0x1p-24);
        for (std::int64_t d = 0; d < c.value_dim; ++d) {
          double expected = 0;
          for (std::size_t j = 0; j < rows.size(); ++j)
            expected += std::exp(scores[j] - max) / sum * rows[j].x[static_cast<std::size_t>(d)];
          const auto i = static_cast<std::size_t>(static_cast<std::int64_t>(row) * c.value_dim + d);
          ASSERT_NEAR(static_cast<double>(out[i]), expected, out_bound)
              << "token " << first + t << " of " << count << ", head " << head << ", channel " << d;
          ASSERT_NEAR(reference[i], expected, out_bound);
        }
      }
  }
}

template <class Key, class Value>
struct Formats {
  using K = Key;
  using V = Value;
};
template <class T>
class QuantisedAttention : public testing::Test {};
using AllFormats =
    testing::Types<Formats<std::int8_t, std::int8_t>, Formats<std::int8_t, f16>,
                   Formats<float, std::int8_t>, Formats<fp8_e4m3, fp8_e4m3>,
                   Formats<int4x2, int4x2>, Formats<int4x2, f16>, Formats<std::int8_t, int4x2>,
                   Formats<q8_0, q4_0>, Formats<q4_0, q8_0>>;
TYPED_TEST_SUITE(QuantisedAttention, AllFormats, );

TYPED_TEST(QuantisedAttention, IsAttentionOverWhatTheRowsStandFor) {
  using K = typename TypeParam::K;
  using V = typename TypeParam::V;
  std::uint64_t seed = 1;
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw})
    // 6 and 72: no whole registers; 192 and 256: two groups of channels.
    for (const Case& c : {Case{64, 64, 3, form}, Case{80, 80, 1, form}, Case{128, 128, 4, form},
                          Case{192, 256, 2, form}, Case{6, 72, 5, form}}) {
      if (c.head_dim % KvRow<K>::kUnit != 0 || c.value_dim % KvRow<V>::kUnit != 0) continue;
      check_stream<K, V>(c, seed++);
      if (this->HasFatalFailure())
        FAIL() << to_string(form) << " keys, head_dim " << c.head_dim << ", group " << c.group;
    }
}

// A row that holds a NaN makes the rows that see it NaN, and no others.
TYPED_TEST(QuantisedAttention, PassesNaNOn) {
  using K = typename TypeParam::K;
  using V = typename TypeParam::V;
  const std::array<RetentionConfig, 1> retention{RetentionConfig::full(8, 1)};
  const std::array<LayerCacheConfig, 1> layer{LayerCacheConfig{0, nullptr}};
  KvCache<K, V> cache({1, 1, 64, 64}, retention, layer);
  AttentionWorkspace<cpu> workspace(
      nullptr, {.num_qo_heads = 1, .num_kv_heads = 1, .head_dim = 64, .value_dim = 64}, 1);
  ThreadTeam team(1);
  for (int step = 0; step < 4; ++step) {
    std::vector<float> row(64, 0.5F);
    const std::vector<float> key = row;
    if (step == 2) row[7] = std::numeric_limits<float>::quiet_NaN();
    cache.append(1);
    cache.store(0, {key.data(), 1, 1, 64}, {row.data(), 1, 1, 64}, nullptr, 0, 1);
    std::array<Segment<K, V>, KvCache<K, V>::kMaxSegments> found;
    const int count = cache.segments(0, 1, found);
    std::vector<float> out(64);
    attend(AttentionQuery{{key.data(), 1, 1, 64}, cache.total() - 1},
           std::span<const Segment<K, V>>(found.data(), static_cast<std::size_t>(count)),
           AttentionVariant<>{0.125F}, {out.data(), 1, 1, 64}, nullptr, workspace, team, cpu{});
    cache.commit();
    EXPECT_EQ(std::isnan(out[7]), step >= 2) << step;
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
