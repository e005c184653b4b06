// SPDX-License-Identifier: MIT
/// Random queries, keys and values through any cache with the decoder's protocol, and what each row
/// should have attended to, in double.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/position/rotary.hpp"
#include "support/attention_scene.hpp"
#include "support/naive_attention.hpp"

namespace sluice::test {

/// Feeds a cache layer by layer, as Decoder::forward does, and keeps everything that went in.
template <class Cache>
class CacheDriver {
 public:
  /// Of one token in one layer, all heads one behind the other, not rotated.
  struct Row {
    std::vector<double> query;
    std::vector<double> key;
    std::vector<double> value;
    std::vector<float> out;
  };
  /// How far `key` is from `query` in a layer and KV head, or nothing where it is not seen.
  using Sees = std::function<std::optional<double>(std::int64_t layer, std::int64_t kv_head,
                                                   std::int64_t query, std::int64_t key)>;
  /// The key and value that are read, where they are not those that were stored.
  using Reads = std::function<std::pair<std::vector<double>, std::vector<double>>(
      std::int64_t layer, std::int64_t kv_head, std::int64_t query, std::int64_t key)>;

  CacheDriver(Cache& cache, const Extents& extents, std::int64_t layers, const Rotary* rotary,
              std::uint64_t seed)
      : cache_(cache),
        extents_(extents),
        rotary_(rotary),
        random_(seed),
        rows_(static_cast<std::size_t>(layers)),
        workspace_(rotary,
                   {.num_qo_heads = extents.qo_heads(),
                    .num_kv_heads = extents.kv_heads,
                    .head_dim = extents.dim,
                    .value_dim = extents.value_dim,
                    .max_queries = cache.max_chunk(),
                    .max_keys = cache.max_entries(),
                    .max_segments = 64},
                   1) {
    if (rotary != nullptr)
      naive_ = NaiveRotation(rotary->config().rotary_dim, rotary->config().theta,
                             rotary->config().pairing == RotaryPairing::kInterleaved);
  }

  const std::vector<Row>& rows(std::int64_t layer) const {
    return rows_[static_cast<std::size_t>(layer)];
  }
  double scale() const { return static_cast<double>(scale_for(extents_.dim)); }

  /// One chunk, uncommitted. make(row) may change what is random.
  void feed(std::int64_t tokens, const std::function<void(std::int64_t, Row&)>& make = nullptr) {
    const std::int64_t first = cache_.total();
    const Position position = cache_.write_position(first);
    cache_.append(tokens);
    for (std::size_t l = 0; l < rows_.size(); ++l) {
      const auto layer = static_cast<std::int64_t>(l);
      std::vector<float> q, k, v;
      for (std::int64_t t = 0; t < tokens; ++t) {
        Row row;
        fill(row.query, extents_.qo_heads() * extents_.dim);
        fill(row.key, extents_.kv_heads * extents_.dim);
        fill(row.value, extents_.kv_heads * extents_.value_dim);
        if (make) make(layer, row);
        append(q, row.query);
        append(k, row.key);
        append(v, row.value);
        rows_[l].push_back(std::move(row));
      }
      std::vector<float> turns;
      if (rotary_ != nullptr) {
        turns.resize(static_cast<std::size_t>(tokens * rotary_->row_size()));
        for (std::int64_t t = 0; t < tokens; ++t)
          rotary_->angles(position + static_cast<Position>(t),
                          turns.data() + t * rotary_->row_size());
      }
      if constexpr (requires { cache_.begin_layer(layer); }) cache_.begin_layer(layer);
      cache_.store(layer, {k.data(), tokens, extents_.kv_heads, extents_.dim},
                   {v.data(), tokens, extents_.kv_heads, extents_.value_dim}, turns.data(), 0,
                   tokens);
      const AttentionQuery query{
          {q.data(), tokens, extents_.qo_heads(), extents_.dim}, first, position};
      if constexpr (requires { cache_.select(layer, query); }) cache_.select(layer, query);
      std::vector<float> out(
          static_cast<std::size_t>(tokens * extents_.qo_heads() * extents_.value_dim));
      std::vector<float> lse(static_cast<std::size_t>(tokens * extents_.qo_heads()));
      for (int part = 0; part < cache_.num_classes(layer); ++part) {
        std::array<typename Cache::SegmentType, Cache::kMaxSegments> segments;
        const auto count = static_cast<std::size_t>(cache_.segments(layer, tokens, segments, part));
        const auto heads = cache_.head_class(layer, part);
        AttentionQuery of_class = query;
        of_class.kv_heads = heads.kv_heads;
        const std::span<const typename Cache::SegmentType> seen(segments.data(), count);
        attend(
            of_class, seen,
            AttentionVariant<CausalWindow>{static_cast<float>(scale()),
                                           CausalWindow{heads.window_size, heads.num_sink_tokens}},
            HeadsView<float>(out.data(), tokens, extents_.qo_heads(), extents_.value_dim),
            lse.data(), workspace_, team_, cpu{});
        if constexpr (requires { cache_.observes(layer); })
          if (cache_.observes(layer)) cache_.observe({layer, part, of_class, seen, lse.data()});
      }
      const std::int64_t width = extents_.qo_heads() * extents_.value_dim;
      for (std::int64_t t = 0; t < tokens; ++t)
        rows_[l][rows_[l].size() - static_cast<std::size_t>(tokens - t)].out.assign(
            out.begin() + t * width, out.begin() + (t + 1) * width);
    }
  }
  void commit() { cache_.commit(); }
  void rollback() {
    cache_.rollback();
    keep_rows();
  }
  /// Forgets what the cache has been made to forget.
  void keep_rows() {
    for (auto& layer : rows_) layer.resize(static_cast<std::size_t>(cache_.total()));
  }

  /// Every row from token `first` on against its definition; `bound`: added to what float32 may
  /// differ by (storage of less precision).
  void expect(const Sees& sees, double bound = 0, std::int64_t first = 0,
              const Reads& reads = nullptr) const {
    const auto at = [](std::int64_t i) {
      return static_cast<std::size_t>(i);
    };
    for (std::size_t l = 0; l < rows_.size(); ++l) {
      const auto layer = static_cast<std::int64_t>(l);
      for (std::int64_t t = first; t < std::ssize(rows_[l]); ++t)
        for (std::int64_t head = 0; head < extents_.qo_heads(); ++head) {
          const std::int64_t kv = head / extents_.group;
          std::deque<std::pair<std::vector<double>, std::vector<double>>> replaced;
          std::vector<NaiveKey> keys;
          for (std::int64_t j = 0; j <= t; ++j) {
            const std::optional<double> distance = sees(layer, kv, t, j);
            if (!distance) continue;
            const Row& row = rows_[l][at(j)];
            std::span<const double> key(row.key.data() + kv * extents_.dim, at(extents_.dim));
            std::span<const double> value(row.value.data() + kv * extents_.value_dim,
                                          at(extents_.value_dim));
            if (reads) {
              replaced.push_back(reads(layer, kv, t, j));
              key = replaced.back().first;
              value = replaced.back().second;
            }
            keys.push_back({key, value, *distance});
          }
          const std::span<const double> query(rows_[l][at(t)].query.data() + head * extents_.dim,
                                              at(extents_.dim));
          const NaiveResult exact =
              naive_attention(query, keys, at(extents_.value_dim), naive_, {.sm_scale = scale()});
          for (std::int64_t d = 0; d < extents_.value_dim; ++d)
            ASSERT_NEAR(static_cast<double>(rows_[l][at(t)].out[at(head * extents_.value_dim + d)]),
                        exact.out[at(d)], exact.out_bound + bound)
                << "layer " << layer << ", token " << t << ", head " << head << ", channel " << d;
        }
    }
  }

 private:
  void fill(std::vector<double>& row, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i)
      row.push_back(static_cast<double>(static_cast<float>(random_.normal())));
  }
  static void append(std::vector<float>& to, const std::vector<double>& from) {
    for (const double x : from) to.push_back(static_cast<float>(x));
  }

  Cache& cache_;
  Extents extents_;
  const Rotary* rotary_;
  NaiveRotation naive_;
  Random random_;
  std::vector<std::vector<Row>> rows_;  // [layer][token]
  AttentionWorkspace<cpu> workspace_;
  ThreadTeam team_{1};
};

}  // namespace sluice::test
