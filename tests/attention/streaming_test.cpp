// SPDX-License-Identifier: MIT
/// A stream through cache and attention together: whatever the chunks, each query must get what the
/// definition of its policy says, computed from the whole stream's raw keys and values.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/random.hpp"
#include "sluice/position/alibi.hpp"
#include "sluice/position/rotary.hpp"
#include "support/naive_attention.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using sluice::AlibiBias;
using sluice::attend;
using sluice::AttentionQuery;
using sluice::AttentionVariant;
using sluice::AttentionWorkspace;
using sluice::bf16;
using sluice::ByteReader;
using sluice::ByteWriter;
using sluice::CacheStatus;
using sluice::CausalWindow;
using sluice::cpu;
using sluice::f16;
using sluice::HeadsView;
using sluice::KeyForm;
using sluice::KvCache;
using sluice::LayerCacheConfig;
using sluice::Position;
using sluice::PositionRule;
using sluice::Random;
using sluice::Retention;
using sluice::RetentionConfig;
using sluice::Rotary;
using sluice::RotaryPairing;
using sluice::Segment;
using sluice::ThreadTeam;
using sluice::test::naive_attention;
using sluice::test::NaiveKey;
using sluice::test::NaiveResult;
using sluice::test::NaiveRotation;

constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kGroup = 2;
constexpr std::int64_t kHeads = kKvHeads * kGroup;
constexpr std::int64_t kDim = 16;
constexpr std::int64_t kOut = kHeads * kDim;  // floats of a token's output
const float kScale = 0.25F;

/// Raw queries, keys and values of a whole stream.
struct Stream {
  std::int64_t tokens;
  std::vector<float> q;  // [tokens, kHeads, kDim]
  std::vector<float> k;  // [tokens, kKvHeads, kDim]
  std::vector<float> v;
  std::vector<double> k_exact;
  std::vector<double> v_exact;

  Stream(std::int64_t tokens_, std::uint64_t seed) : tokens(tokens_) {
    Random random(seed);
    const auto fill = [&](std::vector<float>& x, std::int64_t heads) {
      x.resize(static_cast<std::size_t>(tokens * heads * kDim));
      for (float& value : x) value = static_cast<float>(random.normal());
    };
    fill(q, kHeads);
    fill(k, kKvHeads);
    fill(v, kKvHeads);
    k_exact.assign(k.begin(), k.end());
    v_exact.assign(v.begin(), v.end());
  }
};

struct Rotation {
  Rotary rotary;
  NaiveRotation naive;
  explicit Rotation(bool odd)
      : rotary({.head_dim = kDim,
                .rotary_dim = odd ? 12 : 16,
                .theta = 100,
                .pairing = odd ? RotaryPairing::kInterleaved : RotaryPairing::kHalfSplit}),
        naive(odd ? 12 : 16, 100, odd) {}
};

/// A key that a query sees: its stream index and its distance from the query.
struct SeenKey {
  std::int64_t index;
  double distance;
};
using SeenBy = std::function<std::vector<SeenKey>(std::int64_t query)>;

std::vector<NaiveResult> naive_outputs(const Stream& stream, const NaiveRotation& rotation,
                                       const SeenBy& seen_by) {
  std::vector<NaiveResult> results;
  for (std::int64_t t = 0; t < stream.tokens; ++t) {
    const std::vector<SeenKey> seen = seen_by(t);
    for (std::int64_t head = 0; head < kHeads; ++head) {
      std::vector<NaiveKey> keys;
      for (const SeenKey& key : seen) {
        const auto at = static_cast<std::size_t>((key.index * kKvHeads + head / kGroup) * kDim);
        keys.push_back({std::span(stream.k_exact).subspan(at, kDim),
                        std::span(stream.v_exact).subspan(at, kDim), key.distance});
      }
      const float* row = stream.q.data() + (t * kHeads + head) * kDim;
      const std::vector<double> q(row, row + kDim);
      results.push_back(
          naive_attention(q, keys, kDim, rotation, {.sm_scale = static_cast<double>(kScale)}));
    }
  }
  return results;
}

/// What a token-wise policy shows: sinks and the last window_size keys, whatever the chunks.
SeenBy windowed(std::int64_t sinks, std::int64_t window, PositionRule rule) {
  return [=](std::int64_t query) {
    std::vector<SeenKey> seen;
    for (std::int64_t i = 0; i <= query; ++i)
      if (i < sinks || query - i < window) seen.push_back({i, static_cast<double>(query - i)});
    if (rule == PositionRule::kInCache)
      for (std::size_t rank = 0; rank < seen.size(); ++rank)
        seen[rank].distance = static_cast<double>(seen.size() - 1 - rank);
    return seen;
  };
}

/// One layer that reads a stream chunk by chunk.
template <class Key = float, class Value = Key>
class Layer {
 public:
  Layer(const Stream& stream, const Rotary* rotary, const RetentionConfig& config)
      : stream_(stream),
        rotary_(rotary),
        cache_({1, kKvHeads, kDim, kDim}, {&config, 1}, std::vector<LayerCacheConfig>{{0, rotary}}),
        workspace_(rotary,
                   {.num_qo_heads = kHeads,
                    .num_kv_heads = kKvHeads,
                    .head_dim = kDim,
                    .value_dim = kDim,
                    .max_queries = config.max_chunk,
                    .max_keys = config.capacity},
                   1) {}

  KvCache<Key, Value>& cache() { return cache_; }

  /// Reads the next `tokens` tokens. [tokens, kHeads, kDim]. The cache is left uncommitted.
  std::vector<float> read(std::int64_t tokens) {
    const std::int64_t first = cache_.total();
    EXPECT_EQ(cache_.status(tokens), CacheStatus::kOk);
    cache_.append(tokens);
    const Retention& retention = cache_.retention(0);
    std::vector<float> rotation;
    for (std::int64_t t = first; t < first + tokens && rotary_ != nullptr; ++t) {
      std::vector<float> row(static_cast<std::size_t>(rotary_->row_size()));
      rotary_->angles(retention.write_position(t), row.data());
      rotation.insert(rotation.end(), row.begin(), row.end());
    }
    cache_.store(0, {stream_.k.data() + first * kKvHeads * kDim, tokens, kKvHeads, kDim},
                 {stream_.v.data() + first * kKvHeads * kDim, tokens, kKvHeads, kDim},
                 rotation.data(), 0, tokens);
    std::array<Segment<Key, Value>, KvCache<Key, Value>::kMaxSegments> segments;
    const int count = cache_.segments(0, tokens, segments);
    std::vector<float> out(static_cast<std::size_t>(tokens * kOut));
    const AttentionVariant<> variant{
        .sm_scale = kScale,
        .visibility = {.window_size = retention.window(),
                       .num_sink_tokens = retention.config().num_sink_tokens}};
    attend(AttentionQuery{{stream_.q.data() + first * kOut, tokens, kHeads, kDim},
                          first,
                          retention.write_position(first)},
           std::span<const Segment<Key, Value>>(segments.data(), static_cast<std::size_t>(count)),
           variant, HeadsView<float>(out.data(), tokens, kHeads, kDim), nullptr, workspace_, team_,
           cpu{});
    return out;
  }

  /// Reads and commits everything that is left, in chunks that `next_chunk` chooses.
  std::vector<float> read_all(const std::function<std::int64_t()>& next_chunk) {
    std::vector<float> out;
    while (cache_.total() < stream_.tokens) {
      const std::vector<float> some = read(std::min(next_chunk(), stream_.tokens - cache_.total()));
      out.insert(out.end(), some.begin(), some.end());
      cache_.commit();
    }
    return out;
  }

 private:
  const Stream& stream_;
  const Rotary* rotary_;
  KvCache<Key, Value> cache_;
  AttentionWorkspace<cpu> workspace_;
  ThreadTeam team_{1};
};

/// `extra`: what a key's and a value's storage rounds, relative (0 for float).
void expect_outputs(const std::vector<float>& out, const std::vector<NaiveResult>& expected,
                    double extra = 0) {
  ASSERT_EQ(out.size(), expected.size() * static_cast<std::size_t>(kDim));
  for (std::size_t row = 0; row < expected.size(); ++row)
    for (std::size_t d = 0; d < static_cast<std::size_t>(kDim); ++d)
      ASSERT_NEAR(static_cast<double>(out[row * kDim + d]), expected[row].out[d],
                  expected[row].out_bound + extra)
          << "token " << row / kHeads << ", head " << row % kHeads;
}

/// The ways to cut a stream that every policy is tried with.
std::vector<std::pair<std::string, std::function<std::int64_t()>>> chunkings(
    std::int64_t max_chunk) {
  std::vector<std::pair<std::string, std::function<std::int64_t()>>> result;
  for (const std::int64_t size : {std::int64_t{1}, std::int64_t{3}, std::int64_t{7}, max_chunk})
    if (size <= max_chunk)
      result.emplace_back("chunks of " + std::to_string(size), [size] { return size; });
  for (const std::uint64_t seed : {1, 2})
    result.emplace_back(
        "random chunks " + std::to_string(seed), [random = Random(seed), max_chunk]() mutable {
          return static_cast<std::int64_t>(1 + random.below(static_cast<std::uint64_t>(max_chunk)));
        });
  return result;
}

// ---- Token-wise policies: any chunking equals the definition
// -------------------------------------

struct Policy {
  std::int64_t sinks;
  std::int64_t window;
  std::int64_t max_chunk;
};

class StreamingPolicies : public testing::TestWithParam<std::tuple<Policy, PositionRule, KeyForm>> {
};

TEST_P(StreamingPolicies, AnyChunkingEqualsTheDefinition) {
  const auto& [policy, rule, form] = GetParam();
  const Stream stream(230, 42);  // many times the cache
  const Rotation rotation(policy.sinks % 2 == 1);
  RetentionConfig config =
      RetentionConfig::sink_window(policy.sinks, policy.window, policy.max_chunk);
  config.position_rule = rule;
  config.key_form = form;
  const std::vector<NaiveResult> expected =
      naive_outputs(stream, rotation.naive, windowed(policy.sinks, policy.window, rule));
  std::vector<float> one_by_one;
  for (const auto& [name, next_chunk] : chunkings(policy.max_chunk)) {
    SCOPED_TRACE(name);
    Layer<> layer(stream, &rotation.rotary, config);
    const std::vector<float> out = layer.read_all(next_chunk);
    expect_outputs(out, expected);
    if (HasFatalFailure()) return;
    if (one_by_one.empty()) one_by_one = out;
    for (std::size_t i = 0; i < out.size(); ++i)
      ASSERT_NEAR(out[i], one_by_one[i], 2 * expected[i / kDim].out_bound);
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, StreamingPolicies,
    testing::Combine(testing::Values(Policy{4, 16, 16}, Policy{1, 33, 9}, Policy{0, 24, 24},
                                     Policy{3, 1, 1}, Policy{0, 1, 1}, Policy{2, 7, 7},
                                     Policy{4, 128, 64}),
                     testing::Values(PositionRule::kInCache, PositionRule::kInText),
                     testing::Values(KeyForm::kRotated, KeyForm::kRaw)),
    [](const auto& param) {
      const Policy& policy = std::get<0>(param.param);
      const bool in_cache = std::get<1>(param.param) == PositionRule::kInCache;
      return "sinks" + std::to_string(policy.sinks) + "window" + std::to_string(policy.window) +
             "chunk" + std::to_string(policy.max_chunk) + (in_cache ? "cache" : "text") +
             std::string(to_string(std::get<2>(param.param)));
    });

TEST(Streaming, FullCacheEqualsCausalAttention) {
  const Stream stream(200, 3);
  const Rotation rotation(false);
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig config = RetentionConfig::full(200, 200);
    config.key_form = form;
    const std::vector<NaiveResult> expected =
        naive_outputs(stream, rotation.naive, windowed(0, 1000, PositionRule::kInText));
    for (const auto& [name, next_chunk] : chunkings(200)) {
      SCOPED_TRACE(name);
      expect_outputs(Layer<>(stream, &rotation.rotary, config).read_all(next_chunk), expected);
    }
  }
}

TEST(Streaming, ShorterThanTheWindowIsDenseAttentionBitForBit) {
  const Stream stream(60, 3);
  const Rotation rotation(false);
  for (const std::int64_t chunk : {1, 8}) {
    const auto next_chunk = [&] {
      return chunk;
    };
    std::vector<float> dense =
        Layer<>(stream, &rotation.rotary, RetentionConfig::full(60, 8)).read_all(next_chunk);
    std::vector<float> window =
        Layer<>(stream, &rotation.rotary, RetentionConfig::window(56, 8)).read_all(next_chunk);
    EXPECT_NE(window, dense);  // the last four tokens no longer see the first ones
    dense.resize(56 * kOut);
    window.resize(56 * kOut);
    EXPECT_EQ(window, dense);
  }
}

TEST(Streaming, SixteenBitCachesStayWithinTheirRounding) {
  const Stream stream(150, 8);
  const Rotation rotation(false);
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig config = RetentionConfig::sink_window(4, 20, 11);
    config.key_form = form;
    const std::vector<NaiveResult> expected =
        naive_outputs(stream, rotation.naive, windowed(4, 20, PositionRule::kInCache));
    // Rounding a key by r changes a score by at most r scale |q| |k| and so a weight by twice that;
    // values change by r themselves. Norms below 8, values below 5 here.
    const auto extra = [](double r) {
      return 5 * (2 * r * 0.25 * 8 * 8) + 5 * r;
    };
    for (const auto& [name, next_chunk] : chunkings(11)) {
      SCOPED_TRACE(name);
      expect_outputs((Layer<f16>(stream, &rotation.rotary, config).read_all(next_chunk)), expected,
                     extra(0x1p-11));
      expect_outputs((Layer<bf16>(stream, &rotation.rotary, config).read_all(next_chunk)), expected,
                     extra(0x1p-8));
      expect_outputs((Layer<float, f16>(stream, &rotation.rotary, config).read_all(next_chunk)),
                     expected, 5 * 0x1p-11);
    }
  }
}

TEST(Streaming, StartingAtAHundredMillionChangesNothing) {
  // Position of token 0, a half included: differences stay, and so do scores, to rounding.
  const Stream stream(120, 9);
  const Rotation rotation(false);
  for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
    for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
      for (const Position origin : {0.5, 1e6, 1e8 + 0.5}) {
        RetentionConfig config = RetentionConfig::sink_window(4, 20, 11);
        config.position_rule = rule;
        config.key_form = form;
        config.origin = origin;
        // Angles of 1e8 rad in double: off by 1e8 * 2^-53 = 1.1e-8, as scores by that times 16.
        expect_outputs(Layer<>(stream, &rotation.rotary, config).read_all([] { return 7; }),
                       naive_outputs(stream, rotation.naive, windowed(4, 20, rule)), 5 * 2 * 2e-7);
      }
    }
  }
}

// ---- StreamingLLM as released -------------------------------------------------------------------

/// The released cache in words of lists: kept indices in order; keys are raw and rotated at their
/// ranks (or places in the text) whenever they are read; a chunk sees the whole cache.
struct Original {
  std::vector<std::int64_t> kept;
  std::int64_t start;
  std::int64_t recent;
  std::int64_t next = 0;

  std::vector<std::vector<SeenKey>> forward(std::int64_t tokens, PositionRule rule) {
    std::vector<std::vector<SeenKey>> result;
    for (std::int64_t t = 0; t < tokens; ++t) {
      kept.push_back(next++);
      std::vector<SeenKey> seen;
      for (std::size_t rank = 0; rank < kept.size(); ++rank)
        seen.push_back({kept[rank], rule == PositionRule::kInCache
                                        ? static_cast<double>(kept.size() - 1 - rank)
                                        : static_cast<double>(kept.back() - kept[rank])});
      result.push_back(seen);
    }
    return result;
  }
  void evict_for_space(std::int64_t coming) {
    const auto count = static_cast<std::int64_t>(kept.size());
    if (count + coming <= start + recent) return;
    std::vector<std::int64_t> result;
    for (std::int64_t i = 0; i < count; ++i)
      if (i < start || i >= count - recent + coming)
        result.push_back(kept[static_cast<std::size_t>(i)]);
    kept = result;
  }
};

TEST(StreamingLlm, EvaluationLoopInEveryRealisation) {
  // core-algorithms 1.3: forward one token over cache_size + 1 keys, then shrink. The released
  // loop, this library's token-wise window of recent + 1, raw and rotated keys: one result.
  const Stream stream(60, 5);
  const Rotation rotation(false);
  Original original{{}, 4, 8};
  std::vector<std::vector<SeenKey>> seen;
  for (std::int64_t t = 0; t < stream.tokens; ++t) {
    seen.push_back(original.forward(1, PositionRule::kInCache).front());
    original.evict_for_space(0);
  }
  EXPECT_EQ(seen.back().size(), 13U);
  const std::vector<NaiveResult> expected = naive_outputs(
      stream, rotation.naive, [&](std::int64_t t) { return seen[static_cast<std::size_t>(t)]; });
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig on_request = RetentionConfig::on_request(4, 8, 13);
    on_request.key_form = form;
    Layer<> released(stream, &rotation.rotary, on_request);
    std::vector<float> out;
    for (std::int64_t t = 0; t < stream.tokens; ++t) {
      const std::vector<float> row = released.read(1);
      out.insert(out.end(), row.begin(), row.end());
      released.cache().commit();
      released.cache().shrink();
    }
    expect_outputs(out, expected);

    for (const std::int64_t chunk : {1, 9}) {
      RetentionConfig token_wise = RetentionConfig::streaming_llm(4, 8, chunk);
      token_wise.key_form = form;
      expect_outputs(Layer<>(stream, &rotation.rotary, token_wise).read_all([&] { return chunk; }),
                     expected);
    }
  }
}

TEST(StreamingLlm, BatchedEvictionsEqualTheOriginal) {
  // The chat demo and more: room is made for a prompt and its answer, spans leave from the middle,
  // prompts are read in chunks that see the whole cache, answers token by token.
  const std::int64_t capacity = 60;
  for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
    for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
      for (const std::uint64_t seed : {1, 2, 3, 4}) {
        SCOPED_TRACE(std::string(to_string(rule)) + ", " + std::string(to_string(form)) +
                     ", seed " + std::to_string(seed));
        const Stream stream(300, 100 + seed);
        const Rotation rotation(seed % 2 == 0);
        const auto start = static_cast<std::int64_t>(seed - 1);
        RetentionConfig config = RetentionConfig::on_request(start, 40, capacity);
        config.position_rule = rule;
        config.key_form = form;
        config.origin = seed == 3 ? 17.5 : 0;
        Layer<> layer(stream, &rotation.rotary, config);
        Original original{{}, start, 40};
        Random random(seed);
        const auto below = [&](std::int64_t bound) {
          return static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(bound)));
        };
        std::vector<float> out;
        std::vector<std::vector<SeenKey>> seen;
        int refusals = 0;
        while (original.next < stream.tokens) {
          const std::int64_t prompt = std::min(1 + below(15), stream.tokens - original.next);
          const std::int64_t answer = std::min(below(10), stream.tokens - original.next - prompt);
          if (below(2) == 0 || layer.cache().retention(0).size() + prompt + answer > capacity) {
            layer.cache().evict_for_space(prompt + answer);
            original.evict_for_space(prompt + answer);
          }
          const auto count = static_cast<std::int64_t>(original.kept.size());
          if (count > start + 3 && below(2) == 0) {
            const std::int64_t begin = start + below(count - start);
            const std::int64_t end = begin + below(std::min<std::int64_t>(6, count - begin) + 1);
            try {
              layer.cache().evict_range(begin, end);
              original.kept.erase(original.kept.begin() + begin, original.kept.begin() + end);
            } catch (const sluice::Error& error) {
              ASSERT_EQ(error.code(), sluice::ErrorCode::kCapacity);  // too many gaps
              ++refusals;
              layer.cache().shrink();
              original.evict_for_space(0);
            }
          }
          const auto forward = [&](std::int64_t tokens) {
            const std::vector<float> rows = layer.read(tokens);
            out.insert(out.end(), rows.begin(), rows.end());
            layer.cache().commit();
            for (auto& row : original.forward(tokens, rule)) seen.push_back(row);
          };
          forward(prompt);
          for (std::int64_t i = 0; i < answer; ++i) forward(1);
          ASSERT_EQ(layer.cache().retention(0).size(),
                    static_cast<std::int64_t>(original.kept.size()));
        }
        EXPECT_LT(refusals, 10);
        expect_outputs(out, naive_outputs(stream, rotation.naive, [&](std::int64_t t) {
                         return seen[static_cast<std::size_t>(t)];
                       }));
        if (HasFatalFailure()) return;
      }
    }
  }
}

/// Four given tokens, of which token 1 leaves, then token 4 reads: core-algorithms 1.2.
template <class Read>
void typed_in(const RetentionConfig& config, bool evict, Read&& read) {
  const Rotary rotary({.head_dim = 2, .rotary_dim = 2});
  const LayerCacheConfig layer{0, &rotary};
  KvCache<float> cache({1, 1, 2, 2}, {&config, 1}, {&layer, 1});
  const float keys[][2] = {{1, 0}, {9, -7}, {0, 1}, {1, 1}, {1, -1}};
  const float values[][2] = {{1, 0}, {50, 60}, {0, 1}, {1, 1}, {2, 0}};
  for (std::int64_t t = 0; t < 5; ++t) {
    if (t == 4 && evict) cache.evict_range(1, 2);
    cache.append(1);
    float row[2];
    rotary.angles(cache.retention(0).write_position(t), row);
    cache.store(0, {keys[t], 1, 1, 2}, {values[t], 1, 1, 2}, row, 0, 1);
    if (t < 4) cache.commit();
  }
  AttentionWorkspace<cpu> workspace(
      &rotary, {.num_qo_heads = 1, .num_kv_heads = 1, .head_dim = 2, .value_dim = 2, .max_keys = 8},
      1);
  ThreadTeam team(1);
  std::array<Segment<float>, KvCache<float>::kMaxSegments> segments;
  const auto count = static_cast<std::size_t>(cache.segments(0, 1, segments));
  const float query[] = {1, 0.5F};
  float out[2];
  const AttentionVariant<> variant{.sm_scale = 1 / std::sqrt(2.0F),
                                   .visibility = {.window_size = cache.retention(0).window(),
                                                  .num_sink_tokens = config.num_sink_tokens}};
  attend(AttentionQuery{{query, 1, 1, 2}, 4, cache.retention(0).write_position(4)},
         std::span<const Segment<float>>(segments.data(), count), variant,
         HeadsView<float>(out, 1, 1, 2), nullptr, workspace, team, cpu{});
  read(out);
}

TEST(StreamingLlm, TypedInPositions) {
  // Six decimals are printed. Evicted on request, and by a window of 3 with one sink.
  for (const bool on_request : {true, false}) {
    for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
      for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
        RetentionConfig config = on_request ? RetentionConfig::on_request(1, 3, 5)
                                            : RetentionConfig::sink_window(1, 3, 1);
        config.position_rule = rule;
        config.key_form = form;
        typed_in(config, on_request, [&](const float* out) {
          const bool in_cache = rule == PositionRule::kInCache;
          EXPECT_NEAR(out[0], in_cache ? 0.963258 : 0.965311, 1e-6);
          EXPECT_NEAR(out[1], in_cache ? 0.680004 : 0.642010, 1e-6);
        });
      }
    }
  }
}

TEST(StreamingLlm, AlibiIsContiguousInTheCache) {
  // Keys of zeros, so that scores are biases, and values of zeros: lse tells the biases' sum.
  const std::vector<float> slopes{0.5F};
  for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText}) {
    RetentionConfig config = RetentionConfig::sink_window(2, 3, 1);
    config.position_rule = rule;
    const LayerCacheConfig layer{0, nullptr};
    KvCache<float> cache({1, 1, 4, 4}, {&config, 1}, {&layer, 1});
    AttentionWorkspace<cpu> workspace(
        nullptr,
        {.num_qo_heads = 1, .num_kv_heads = 1, .head_dim = 4, .value_dim = 4, .max_keys = 8}, 1);
    ThreadTeam team(1);
    const float zeros[4] = {};
    for (std::int64_t t = 0; t < 20; ++t) {
      cache.append(1);
      cache.store(0, {zeros, 1, 1, 4}, {zeros, 1, 1, 4}, nullptr, 0, 1);
      std::array<Segment<float>, KvCache<float>::kMaxSegments> segments;
      const auto count = static_cast<std::size_t>(cache.segments(0, 1, segments));
      float out[4];
      float lse = 0;
      attend(AttentionQuery{{zeros, 1, 1, 4}, t, static_cast<Position>(t)},
             std::span<const Segment<float>>(segments.data(), count),
             AttentionVariant<CausalWindow, AlibiBias>{
                 .sm_scale = 1,
                 .visibility = {.window_size = 3, .num_sink_tokens = 2},
                 .transform = {slopes}},
             HeadsView<float>(out, 1, 1, 4), &lse, workspace, team, cpu{});
      cache.commit();
      double sum = 0;
      for (const SeenKey& key : windowed(2, 3, rule)(t)) sum += std::exp(-0.5 * key.distance);
      EXPECT_NEAR(lse, std::log(sum), 1e-6) << "token " << t;
    }
  }
}

// ---- Transactions and snapshots in mid-stream
// ----------------------------------------------------

TEST(Streaming, RolledBackReadsLeaveNoTrace) {
  const Stream stream(160, 14);
  Stream other(160, 15);  // what the rolled-back reads contain
  const Rotation rotation(false);
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    RetentionConfig config = RetentionConfig::sink_window(3, 18, 6);
    config.key_form = form;
    Stream mixed = stream;
    Layer<> straight(stream, &rotation.rotary, config);
    Layer<> hesitant(mixed, &rotation.rotary, config);
    Random random(3);
    while (straight.cache().total() < 150) {
      const auto chunk = static_cast<std::int64_t>(1 + random.below(6));
      if (random.below(2) == 0) {
        std::swap(mixed.k, other.k);
        hesitant.read(static_cast<std::int64_t>(1 + random.below(6)));
        std::swap(mixed.k, other.k);
        hesitant.cache().rollback();
      }
      ASSERT_EQ(hesitant.read(chunk), straight.read(chunk));
      hesitant.cache().commit();
      straight.cache().commit();
    }
  }
}

TEST(Streaming, ARestoredStreamContinuesBitForBit) {
  const Stream stream(120, 16);
  const Rotation rotation(false);
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    for (const bool on_request : {false, true}) {
      RetentionConfig config = on_request ? RetentionConfig::on_request(3, 17, 30)
                                          : RetentionConfig::sink_window(3, 18, 6);
      config.key_form = form;
      Layer<f16> first(stream, &rotation.rotary, config);
      Random random(3);
      while (first.cache().total() < 100) {
        const auto chunk = static_cast<std::int64_t>(1 + random.below(6));
        if (on_request) first.cache().evict_for_space(chunk);
        first.read(chunk);
        first.cache().commit();
        if (on_request && random.below(3) == 0) first.cache().evict_range(5, 6);
        if (on_request && random.below(3) == 0) first.cache().shrink();
        ByteWriter writer;
        first.cache().save(writer);
        Layer<f16> second(stream, &rotation.rotary, config);
        ByteReader reader(writer.bytes());
        second.cache().restore(reader);
        ASSERT_EQ(second.read(2), first.read(2));
        first.cache().rollback();
      }
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
