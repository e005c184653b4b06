// SPDX-License-Identifier: MIT
// Whole decoders over quantised caches beside the same decoder over float32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/stream/session.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::between;
using test::Geometry;
using test::kVocab;
using test::random_tokens;
using test::small_decoder;

/// A float32 cache whose rows get noise of up to `noise` times the largest |x| of the row.
class NoisyCache : public KvCache<float> {
 public:
  NoisyCache(KvCache<float>&& cache, double noise, std::uint64_t seed)
      : KvCache<float>(std::move(cache)), noise_(noise), random_(seed) {}

  void store(std::int64_t layer, HeadsView<const float> keys, HeadsView<const float> values,
             const float* rotation, std::int64_t begin, std::int64_t end) {
    const std::vector<float> noisy_keys = shaken(keys, begin, end);
    const std::vector<float> noisy_values = shaken(values, begin, end);
    KvCache<float>::store(layer, {noisy_keys.data(), keys.tokens, keys.num_heads, keys.head_dim},
                          {noisy_values.data(), values.tokens, values.num_heads, values.head_dim},
                          rotation, begin, end);
  }

 private:
  std::vector<float> shaken(HeadsView<const float> rows, std::int64_t begin, std::int64_t end) {
    std::vector<float> result;
    for (std::int64_t t = 0; t < rows.tokens; ++t)
      for (std::int64_t head = 0; head < rows.num_heads; ++head) {
        const float* row = rows.head(t, head);
        double peak = 0;
        for (std::int64_t d = 0; d < rows.head_dim; ++d)
          peak = std::max(peak, std::abs(static_cast<double>(row[d])));
        for (std::int64_t d = 0; d < rows.head_dim; ++d) {
          const double shift =
              t < begin || t >= end ? 0 : noise_ * peak * (2 * random_.uniform() - 1);
          result.push_back(static_cast<float>(static_cast<double>(row[d]) + shift));
        }
      }
    return result;
  }
  double noise_;
  Random random_;
};

template <class Cache>
std::vector<float> logits_of(const Decoder& model, Cache& cache, const std::vector<Token>& tokens,
                             std::uint64_t seed) {
  ThreadTeam team(1);
  DecoderWorkspace workspace(model, cache.max_chunk(), cache.max_entries(), 1);
  Random random(seed);
  std::vector<float> all;
  for (std::size_t first = 0; first < tokens.size();) {
    const auto count = static_cast<std::size_t>(std::min(
        between(random, 1, cache.max_chunk()), static_cast<std::int64_t>(tokens.size() - first)));
    model.forward({tokens.data() + first, count}, cache, workspace, team);
    const std::size_t before = all.size();
    all.resize(before + count * static_cast<std::size_t>(kVocab));
    model.logits(0, {all.data() + before, static_cast<std::int64_t>(count), kVocab}, workspace,
                 team);
    cache.commit();
    first += count;
  }
  return all;
}

double rms_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

/// Differences of a quantised stream's logits from float32's over those that noise of the format's
/// largest error gives.
template <class Element>
void check_format(double noise) {
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw})
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      Random random(seed);
      const auto model = small_decoder(Geometry{}, seed);
      CacheOptions options{.num_sink_tokens = 2, .window_size = 20, .chunk_size = 5};
      options.key_form = form;
      const CachePlan plan = plan_cache(model->config(), options);
      const std::vector<Token> tokens = random_tokens(random, 80);
      KvCache<float> plain = model->make_cache<float>(plan);
      KvCache<Element> quantised = model->make_cache<Element>(plan);
      EXPECT_LT(quantised.bytes(), plain.bytes());
      EXPECT_EQ(quantised.bytes(), model->cache_bytes<Element>(plan));
      const std::vector<float> exact = logits_of(*model, plain, tokens, seed);
      const double found = rms_difference(logits_of(*model, quantised, tokens, seed), exact);
      double expected = 0;
      for (std::uint64_t draw = 0; draw < 4; ++draw) {
        NoisyCache noisy(model->make_cache<float>(plan), noise, 100 * seed + draw);
        expected =
            std::max(expected, rms_difference(logits_of(*model, noisy, tokens, seed), exact));
      }
      // Noise of the same size, a stream of 4,000 logits: the two agree within a factor.
      EXPECT_LT(found, 1.5 * expected) << to_string(form) << ", seed " << seed;
      EXPECT_GT(found, expected / 20);
    }
}

// scale / 2 = max|x| / 254.
TEST(QuantisedDecoder, Int8DiffersAsNoiseOfItsErrorBound) {
  check_format<std::int8_t>(1.0 / 254);
}
// 2^-4 |x|, for all channels as if they were the largest.
TEST(QuantisedDecoder, Fp8DiffersAsNoiseOfItsErrorBound) {
  check_format<fp8_e4m3>(1.0 / 16);
}
// scale / 2 = (max - min) / 30, at most max|x| / 15.
TEST(QuantisedDecoder, Int4DiffersAsNoiseOfItsErrorBound) {
  check_format<int4x2>(1.0 / 15);
}

// Sessions over quantised caches: a checkpoint, a fork and a file give the same stream again.
TEST(QuantisedDecoder, SessionsGoBackForkAndRestore) {
  const std::shared_ptr<const Decoder> model = small_decoder(Geometry{}, 5);
  SessionOptions options;
  options.cache = {.num_sink_tokens = 2, .window_size = 20, .chunk_size = 5};
  options.checkpoints = 2;
  Random random(5);
  const std::vector<Token> text = random_tokens(random, 47);
  using Stream = Session<std::int8_t, int4x2>;
  Stream stream(model, options);
  stream.accept(text);
  const auto place = stream.checkpoint();
  Stream child = stream.fork();
  const std::string path = testing::TempDir() + "/quantised_session.sluice";
  stream.save(path);
  Stream restored(model, options);
  restored.restore(path);
  const auto continuation = [](Stream& from) {
    std::vector<float> all;
    for (int i = 0; i < 30; ++i) {
      const std::optional<Token> token = from.step();
      EXPECT_TRUE(token.has_value());
      all.insert(all.end(), from.logits().begin(), from.logits().end());
    }
    return all;
  };
  const std::vector<float> expected = continuation(stream);
  EXPECT_EQ(continuation(child), expected);
  EXPECT_EQ(continuation(restored), expected);
  stream.rollback_to(place);
  EXPECT_EQ(continuation(stream), expected);
  std::remove(path.c_str());
}

}  // namespace SLUICE_TEST_UNIT
