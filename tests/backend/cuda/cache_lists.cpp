// SPDX-License-Identifier: MIT
#include "backend/cuda/cache_lists.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <utility>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/observed_attention.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/cache/head_map.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice_test {

namespace {

using namespace sluice;

constexpr std::int64_t kDim = 64;
constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kGroup = 3;
constexpr std::int64_t kMaxChunk = 7;
constexpr std::int64_t kLength = 300;

float in_f16(float x) {
  return static_cast<float>(f16(x));
}

/// The rows of a class's segments as the device gets them.
template <class Segments>
std::vector<OracleSegment> rows_of(const Segments& segments, std::int64_t heads,
                                   const Rotary& rotary) {
  std::vector<OracleSegment> result;
  for (const Segment<f16>& segment : segments) {
    OracleSegment to;
    to.first_index = segment.rule.first_index;
    to.count = to.visible = segment.rule.visible;
    to.first_position = segment.rule.first_position;
    to.shift = segment.rule.shift;
    to.ceiling = segment.rule.ceiling;
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t j = 0; j < to.count; ++j) {
        float key[kDim];
        const f16* const stored = segment.key(h, j);
        if (segment.key_rotation != nullptr)
          rotary.rotate(segment.key_rotation + j * segment.key_rotation_stride, stored, key);
        else
          std::transform(stored, stored + kDim, key, [](f16 x) { return static_cast<float>(x); });
        // Raw keys are rotated in float32; the device holds rotated ones in f16.
        for (const float x : key) to.keys.push_back(in_f16(x));
        for (std::int64_t d = 0; d < kDim; ++d)
          to.values.push_back(static_cast<float>(segment.value(h, j)[d]));
      }
    result.push_back(std::move(to));
  }
  return result;
}

template <class Cache>
class Stream {
 public:
  Stream(std::string name, Cache& cache, const Rotary& rotary, std::uint64_t seed)
      : name_(std::move(name)),
        cache_(cache),
        rotary_(rotary),
        random_(seed),
        table_(rotary, kMaxChunk),
        workspace_(&rotary,
                   {.num_qo_heads = kHeads * kGroup,
                    .num_kv_heads = kHeads,
                    .head_dim = kDim,
                    .value_dim = kDim,
                    .max_queries = kMaxChunk,
                    .max_keys = kLength + kMaxChunk,
                    .max_segments = AttentionWorkspace<cpu>::kMaxSegments},
                   1) {}

  void run(std::vector<CacheLists>& to) {
    for (int step = 0; cache_.total() + kMaxChunk < kLength; ++step) {
      const auto tokens = static_cast<std::int64_t>(1 + random_.below(kMaxChunk));
      feed(step % 2 == 0 ? 1 : tokens, step % 16 == 14 ? &to : nullptr);
      if (random_.below(5) == 0)
        cache_.rollback();
      else
        cache_.commit();
    }
    feed(1, &to);
  }

 private:
  std::vector<float> noise(std::int64_t count) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& value : x) value = static_cast<float>(random_.normal());
    return x;
  }

  /// One layer's part of a step; `to`: gets what its one query sees.
  void feed(std::int64_t tokens, std::vector<CacheLists>* to) {
    const std::int64_t first = cache_.total();
    const Position position = cache_.write_position(first);
    const std::vector<float> keys = noise(tokens * kHeads * kDim);
    const std::vector<float> values = noise(tokens * kHeads * kDim);
    const std::vector<float> rows = noise(tokens * kHeads * kGroup * kDim);
    cache_.append(tokens);
    table_.fill_run(position, tokens);
    cache_.store(0, {keys.data(), tokens, kHeads, kDim}, {values.data(), tokens, kHeads, kDim},
                 table_.rows(), 0, tokens);
    const AttentionQuery query{{rows.data(), tokens, kHeads * kGroup, kDim}, first, position};
    if constexpr (requires { cache_.select(0, query); }) cache_.select(0, query);
    CacheLists lists;
    lists.name = name_ + ", token " + std::to_string(first);
    lists.qo_heads = kHeads * kGroup;
    lists.kv_heads = kHeads;
    lists.head_dim = kDim;
    lists.first_index = first;
    lists.first_position = position;
    lists.sm_scale = 0.125;
    for (int i = 0; i < rotary_.num_pairs(); ++i)
      lists.rotation.frequencies.push_back(rotary_.frequency(i));
    lists.query = rows;
    lists.attended.resize(static_cast<std::size_t>(tokens * kHeads * kGroup * kDim));
    std::vector<float> lse(static_cast<std::size_t>(tokens * kHeads * kGroup));
    for (int part = 0; part < cache_.num_classes(0); ++part) {
      std::array<Segment<f16>, Cache::kMaxSegments> found;
      const std::span<const Segment<f16>> seen(
          found.data(), static_cast<std::size_t>(cache_.segments(0, tokens, found, part)));
      const auto view = cache_.head_class(0, part);
      AttentionQuery of_class = query;
      of_class.kv_heads = view.kv_heads;
      attend(of_class, seen,
             AttentionVariant<CausalWindow>{static_cast<float>(lists.sm_scale),
                                            CausalWindow{view.window_size, view.num_sink_tokens}},
             HeadsView<float>(lists.attended.data(), tokens, kHeads * kGroup, kDim), lse.data(),
             workspace_, team_, cpu{});
      if constexpr (requires { cache_.observes(0); })
        if (cache_.observes(0)) cache_.observe({0, part, of_class, seen, lse.data()});
      if (to == nullptr || tokens != 1) continue;
      std::vector<std::int32_t> heads(view.kv_heads.begin(), view.kv_heads.end());
      for (std::int32_t h = 0; view.kv_heads.empty() && h < kHeads; ++h) heads.push_back(h);
      lists.lists.push_back(rows_of(seen, static_cast<std::int64_t>(heads.size()), rotary_));
      lists.classes.push_back(std::move(heads));
    }
    if (to != nullptr && tokens == 1) to->push_back(std::move(lists));
  }

  std::string name_;
  Cache& cache_;
  const Rotary& rotary_;
  Random random_;
  RotaryTable table_;
  AttentionWorkspace<cpu> workspace_;
  ThreadTeam team_{1};
};

template <class Cache>
void add(std::vector<CacheLists>& to, const char* name, Cache&& cache, const Rotary& rotary,
         std::uint64_t seed) {
  Stream<std::remove_reference_t<Cache>>(name, cache, rotary, seed).run(to);
}

}  // namespace

std::vector<CacheLists> random_cache_lists(std::uint64_t seed) {
  const Rotary rotary({.head_dim = kDim, .rotary_dim = kDim, .theta = 10000});
  const std::array<const Rotary*, 1> rotaries{&rotary};
  const KvShape shape{1, kHeads, kDim, kDim};
  std::vector<CacheLists> result;

  // DuoAttention: heads 0 and 3 full, 1 and 2 sinks and recent tokens.
  const HeadTable gates{.num_layers = 1, .num_heads = kHeads, .values = {1, 0, 0, 1}};
  const HeadMap map = duo_attention_map(gates, 0.5, 4, 30);
  RetentionConfig full = RetentionConfig::full(kLength, kMaxChunk);
  RetentionConfig recent = RetentionConfig::sink_window(4, 31, kMaxChunk);
  full.position_rule = recent.position_rule = PositionRule::kInText;
  std::vector<int> of_head;
  for (std::int64_t h = 0; h < kHeads; ++h) of_head.push_back(map.at(0, h).is_full() ? 0 : 1);
  add(result, "DuoAttention",
      KvCache<f16>(shape, std::array{full, recent},
                   std::array{LayerCacheConfig{
                       .retention = 0, .rotary = &rotary, .retention_of_head = of_head}}),
      rotary, seed);

  ScorePolicy policy = ScorePolicy::h2o(40, 24, kMaxChunk);
  policy.position_rule = PositionRule::kInCache;
  policy.floor = 0.5;
  add(result, "H2O at ranks", ScoredKvCache<f16>(shape, kHeads * kGroup, 0.125F, policy, rotaries),
      rotary, seed + 1);

  add(result, "Quest",
      PageSelectKvCache<f16>(
          shape, kHeads * kGroup,
          {.page_size = 8, .logical_page_size = 4, .budget = 9, .dense_layers = 0}, rotaries,
          kLength, kMaxChunk),
      rotary, seed + 2);

  // In-cache positions: sinks of a full window stand at one distance.
  add(result, "sinks and window",
      KvCache<f16>(shape, std::array{RetentionConfig::sink_window(4, 60, kMaxChunk)},
                   std::array{LayerCacheConfig{.retention = 0, .rotary = &rotary}}),
      rotary, seed + 3);
  return result;
}

}  // namespace sluice_test
