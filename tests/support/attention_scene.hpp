// SPDX-License-Identifier: MIT
/// Random segments beside the plain list of their keys, and the check of attend() and of
/// attend_reference() against that list.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/reference.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/rotary.hpp"
#include "support/naive_attention.hpp"

namespace sluice::test {

struct Extents {
  std::int64_t kv_heads = 1;
  std::int64_t group = 1;
  std::int64_t dim = 16;
  std::int64_t value_dim = 16;
  std::int64_t qo_heads() const { return kv_heads * group; }
};

/// What naive_attention() needs to know of a variant besides its scale.
struct NaiveVariant {
  std::function<bool(const QueryInfo&, const KeyInfo&)> visible;
  /// Of the query head, the scaled score and the distance; null: the score as it is.
  std::function<double(std::int64_t, double, double)> transform = nullptr;
  std::function<double(std::int64_t)> sink = nullptr;
};

struct Outcome {
  std::vector<float> out;  // [T, qo_heads, value_dim]
  std::vector<float> lse;  // [T, qo_heads]
};

/// Segments with random content, and the same keys as a plain list.
template <class Key, class Value>
class Scene {
 public:
  Scene(const Extents& extents, std::optional<Rotary> rotary, std::uint64_t seed)
      : extents_(extents), rotary_(std::move(rotary)), random_(seed) {
    if (rotary_)
      naive_rotation_ = NaiveRotation(rotary_->config().rotary_dim, rotary_->config().theta,
                                      rotary_->config().pairing == RotaryPairing::kInterleaved);
  }

  /// Adds a run of random keys and values; `raw`: rotated while they are read.
  void add(SegmentRule rule, bool raw = false) {
    const std::int64_t padding = static_cast<std::int64_t>(segments_.size()) % 3;  // strides vary
    const std::int64_t key_stride = extents_.dim + padding;
    const std::int64_t value_stride = extents_.value_dim + padding;
    auto& storage = storage_.emplace_back();
    storage.keys.resize(static_cast<std::size_t>(extents_.kv_heads * rule.count * key_stride));
    storage.values.resize(static_cast<std::size_t>(extents_.kv_heads * rule.count * value_stride));
    Segment<Key, Value> segment;
    segment.rule = rule;
    segment.keys = storage.keys.data();
    segment.values = storage.values.data();
    segment.key_token_stride = key_stride;
    segment.key_head_stride = rule.count * key_stride;
    segment.value_token_stride = value_stride;
    segment.value_head_stride = rule.count * value_stride;
    std::vector<float> table;
    if (rotary_) table.resize(static_cast<std::size_t>(rule.count * rotary_->row_size()));
    for (std::int64_t j = 0; j < rule.count && rotary_; ++j)
      rotary_->angles(rule.first_position + static_cast<Position>(j),
                      table.data() + j * rotary_->row_size());
    storage.table = std::move(table);
    raw = raw && rotary_.has_value();
    if (raw) {
      segment.key_rotation = storage.table.data();
      segment.key_rotation_stride = rotary_->row_size();
    }
    for (std::int64_t head = 0; head < extents_.kv_heads; ++head) {
      for (std::int64_t j = 0; j < rule.count; ++j) {
        std::vector<float> key(static_cast<std::size_t>(extents_.dim));
        for (float& x : key) x = static_cast<float>(random_.normal());
        Key* stored = storage.keys.data() + head * segment.key_head_stride + j * key_stride;
        if (rotary_ && !raw)
          rotary_->rotate(storage.table.data() + j * rotary_->row_size(), key.data(), stored);
        else
          for (std::int64_t d = 0; d < extents_.dim; ++d)
            stored[d] = Key(key[static_cast<std::size_t>(d)]);
        Value* value = storage.values.data() + head * segment.value_head_stride + j * value_stride;
        for (std::int64_t d = 0; d < extents_.value_dim; ++d)
          value[d] = Value(static_cast<float>(random_.normal()));
      }
    }
    segments_.push_back(segment);
  }

  std::span<const Segment<Key, Value>> segments() const { return segments_; }
  const Rotary* rotary() const { return rotary_ ? &*rotary_ : nullptr; }
  const Extents& extents() const { return extents_; }
  std::int64_t keys() const {
    std::int64_t count = 0;
    for (const auto& segment : segments_) count += segment.rule.count;
    return count;
  }

  std::vector<float> queries(std::int64_t tokens) {
    std::vector<float> rows(static_cast<std::size_t>(tokens * extents_.qo_heads() * extents_.dim));
    for (float& x : rows) x = static_cast<float>(random_.normal());
    return rows;
  }

  template <class Variant>
  Outcome run(const std::vector<float>& rows, std::int64_t first_index, Position first_position,
              const Variant& variant, int threads = 1) const {
    const std::int64_t tokens =
        static_cast<std::int64_t>(rows.size()) / (extents_.qo_heads() * extents_.dim);
    AttentionWorkspace<cpu> workspace(rotary(),
                                      {.num_qo_heads = extents_.qo_heads(),
                                       .num_kv_heads = extents_.kv_heads,
                                       .head_dim = extents_.dim,
                                       .value_dim = extents_.value_dim,
                                       .max_queries = std::max<std::int64_t>(tokens, 1),
                                       .max_keys = std::max<std::int64_t>(keys(), 1)},
                                      threads);
    ThreadTeam team(threads);
    Outcome outcome;
    outcome.out.assign(static_cast<std::size_t>(tokens * extents_.qo_heads() * extents_.value_dim),
                       -77.0F);
    outcome.lse.assign(static_cast<std::size_t>(tokens * extents_.qo_heads()), -77.0F);
    attend(
        AttentionQuery{
            {rows.data(), tokens, extents_.qo_heads(), extents_.dim}, first_index, first_position},
        segments(), variant,
        HeadsView<float>(outcome.out.data(), tokens, extents_.qo_heads(), extents_.value_dim),
        outcome.lse.data(), workspace, team, cpu{});
    return outcome;
  }

  /// The naive result of one query row and head. The key is turned back by its own position, in
  /// double, so that from there on distances alone count.
  NaiveResult naive(const float* row, const QueryInfo& query, std::int64_t head, double sm_scale,
                    const NaiveVariant& variant) const {
    std::deque<std::vector<double>> rows;
    std::vector<NaiveKey> list;
    for (std::size_t s = 0; s < segments_.size(); ++s) {
      const SegmentRule& rule = segments_[s].rule;
      for (std::int64_t j = 0; j < rule.visible; ++j) {
        if (!variant.visible(query, {rule.first_index + j, rule.kind, rule.group})) continue;
        const double reader = std::min(query.position + rule.shift, rule.ceiling);
        const auto& [key, value] = doubles(s, head / extents_.group, j);
        list.push_back({key, value, reader - (rule.first_position + static_cast<double>(j))});
      }
    }
    NaiveOptions options{.sm_scale = sm_scale};
    if (variant.transform != nullptr)
      options.transform = [&](double score, double distance) {
        return variant.transform(head, score, distance);
      };
    if (variant.sink != nullptr) options.sink = variant.sink(head);
    const std::vector<double> q(row, row + extents_.dim);
    return naive_attention(q, list, static_cast<std::size_t>(extents_.value_dim), naive_rotation_,
                           options);
  }

  /// The fast path against the naive list and against the library's own reference, all rows; of
  /// many rows a part, without the reference.
  template <class Variant>
  Outcome check(const std::vector<float>& rows, std::int64_t first_index, Position first_position,
                const Variant& variant, const NaiveVariant& naive_variant) const {
    const std::int64_t heads = extents_.qo_heads();
    const std::int64_t tokens = static_cast<std::int64_t>(rows.size()) / (heads * extents_.dim);
    Outcome outcome = run(rows, first_index, first_position, variant);
    const bool many = tokens > 20;
    std::vector<double> reference(outcome.out.size());
    std::vector<double> reference_lse(outcome.lse.size());
    if (!many)
      attend_reference(HeadsView<const float>(rows.data(), tokens, heads, extents_.dim),
                       first_index, first_position, segments(), variant, rotary(),
                       extents_.kv_heads,
                       HeadsView<double>(reference.data(), tokens, heads, extents_.value_dim),
                       reference_lse.data());
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (many && t % 7 != 0 && t != tokens - 1) continue;
      for (std::int64_t head = 0; head < heads; ++head) {
        const std::int64_t at = t * heads + head;
        const NaiveResult exact =
            naive(rows.data() + at * extents_.dim,
                  {first_index + t, first_position + static_cast<Position>(t)}, head,
                  static_cast<double>(variant.sm_scale), naive_variant);
        const auto row = static_cast<std::size_t>(at);
        if (std::isinf(exact.lse)) {
          EXPECT_EQ(outcome.lse[row], -std::numeric_limits<float>::infinity());
          if (!many) {
            EXPECT_EQ(reference_lse[row], -std::numeric_limits<double>::infinity());
          }
        } else {
          EXPECT_NEAR(static_cast<double>(outcome.lse[row]), exact.lse, exact.lse_bound)
              << "lse of token " << t << ", head " << head;
          if (!many) {
            EXPECT_NEAR(reference_lse[row], exact.lse, exact.lse_bound);
          }
        }
        for (std::int64_t d = 0; d < extents_.value_dim; ++d) {
          const auto i = static_cast<std::size_t>(at * extents_.value_dim + d);
          const double expected = exact.out[static_cast<std::size_t>(d)];
          EXPECT_NEAR(static_cast<double>(outcome.out[i]), expected, exact.out_bound)
              << "token " << t << ", head " << head << ", channel " << d;
          if (!many) {
            EXPECT_NEAR(reference[i], expected, exact.out_bound) << "reference";
          }
          if (testing::Test::HasFailure()) return outcome;
        }
      }
    }
    return outcome;
  }

 private:
  struct Storage {
    std::vector<Key> keys;
    std::vector<Value> values;
    std::vector<float> table;
  };

  /// Unrotated key and value in double, made at the first use.
  const std::pair<std::vector<double>, std::vector<double>>& doubles(std::size_t s,
                                                                     std::int64_t head,
                                                                     std::int64_t j) const {
    const Segment<Key, Value>& segment = segments_[s];
    auto& cached = doubles_[{static_cast<std::int64_t>(s), head, j}];
    if (!cached.first.empty()) return cached;
    for (std::int64_t d = 0; d < extents_.dim; ++d)
      cached.first.push_back(static_cast<double>(static_cast<float>(segment.key(head, j)[d])));
    if (segment.key_rotation == nullptr)
      cached.first = naive_rotation_.rotate(-(segment.rule.first_position + static_cast<double>(j)),
                                            cached.first);
    for (std::int64_t d = 0; d < extents_.value_dim; ++d)
      cached.second.push_back(static_cast<double>(static_cast<float>(segment.value(head, j)[d])));
    return cached;
  }

  Extents extents_;
  std::optional<Rotary> rotary_;
  NaiveRotation naive_rotation_;
  Random random_;
  std::deque<Storage> storage_;
  std::vector<Segment<Key, Value>> segments_;
  mutable std::map<std::array<std::int64_t, 3>, std::pair<std::vector<double>, std::vector<double>>>
      doubles_;
};

inline Rotary rotary_for(std::int64_t dim) {
  // Partly rotated and interleaved for some widths.
  return Rotary({.head_dim = static_cast<int>(dim),
                 .rotary_dim = static_cast<int>(dim == 96 ? 48 : dim),
                 .theta = 10000,
                 .pairing = dim == 80 ? RotaryPairing::kInterleaved : RotaryPairing::kHalfSplit});
}

inline NaiveVariant causal(std::int64_t window = 1 << 30, std::int64_t sinks = 0) {
  return {.visible = [=](const QueryInfo& query, const KeyInfo& key) {
    return key.index <= query.index && (query.index - key.index < window || key.index < sinks);
  }};
}

inline float scale_for(std::int64_t dim) {
  return 1 / std::sqrt(static_cast<float>(dim));
}

inline SegmentRule run_at(std::int64_t first, std::int64_t count) {
  return {.first_index = first,
          .count = count,
          .visible = count,
          .first_position = static_cast<Position>(first)};
}

/// Sinks read under a ceiling and a window whose ring has wrapped, as a full cache shows them.
template <class Key, class Value>
void add_sinks_and_ring(Scene<Key, Value>& scene, std::int64_t sinks, std::int64_t oldest,
                        std::int64_t total, std::int64_t cut, std::int64_t window) {
  SegmentRule pinned = run_at(0, sinks);
  pinned.kind = TokenKind::kPinned;
  pinned.ceiling = static_cast<Position>(sinks + window - 1);
  scene.add(pinned);
  scene.add(run_at(oldest, cut));
  scene.add(run_at(oldest + cut, total - oldest - cut));
}

}  // namespace sluice::test
