// SPDX-License-Identifier: MIT
// Sessions over caches that look at queries: what they write is what the same cache writes when it
// is driven by hand, and what goes back, forks or is restored goes on bit for bit; what a cache
// does not do is an error that says why.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/cluster_cache.hpp"
#include "sluice/attention/lazy_layer_cache.hpp"
#include "sluice/attention/retrieval_cache.hpp"
#include "sluice/attention/scored_cache.hpp"
#include "sluice/attention/selective_cache.hpp"
#include "sluice/core/random.hpp"
#include "sluice/stream/session.hpp"
#include "support/property.hpp"
#include "support/small_decoder.hpp"
#include "support/test_unit.hpp"

namespace SLUICE_TEST_UNIT {

using namespace sluice;
using test::error_of;
using test::random_tokens;

std::shared_ptr<const Decoder> small() {
  return test::small_decoder({.num_layers = 3, .num_qo_heads = 4, .num_kv_heads = 2}, 7);
}

SessionOptions options_for(std::int64_t checkpoints = 3) {
  SessionOptions options;
  options.cache.policy = CachePolicy::kFull;
  options.cache.capacity = 500;
  options.sampler = {.temperature = 1, .repetition_penalty = 1.2, .repetition_window = 16};
  options.history = 400;
  options.checkpoints = static_cast<int>(checkpoints);
  return options;
}

template <class AnySession>
void expect_same(AnySession& a, AnySession& b, const char* where) {
  for (int i = 0; i < 25; ++i) {
    ASSERT_TRUE(std::ranges::equal(a.logits(), b.logits())) << where << ", step " << i;
    ASSERT_EQ(a.step(), b.step()) << where;
  }
}

/// Checkpoints, forks, snapshots and updates of a session that make() makes.
template <class Make>
void expect_transactions(Make&& make, bool keeps_prefix, const char* where) {
  Random random(3);
  const std::vector<Token> text = random_tokens(random, 120);
  auto session = make();
  session.accept(text);
  for (int i = 0; i < 11; ++i) session.step();
  session.logits();  // feeds what was written last, as save() will
  const CheckpointId here = session.checkpoint();
  auto fork = session.fork();
  const std::string path =
      (std::filesystem::path(::testing::TempDir()) / (std::string(where) + ".session")).string();
  session.save(path);
  auto restored = make();
  restored.restore(path);
  expect_same(session, fork, where);
  session.accept(std::span(text).first(33));
  session.rollback_to(here);
  expect_same(session, restored, where);

  // A text that replaces another is what a fresh session reads, to the cut into chunks.
  std::vector<Token> changed = text;
  changed[100] = (changed[100] + 1) % static_cast<Token>(test::kVocab);
  auto fresh = make();
  fresh.accept(changed);
  auto updated = make();
  updated.accept(text);
  const UpdateResult result = updated.update(changed);
  EXPECT_EQ(result.common_prefix, 100) << where;
  EXPECT_EQ(result.kept, keeps_prefix ? 100 : 0) << where;
  EXPECT_EQ(result.computed, keeps_prefix ? 20 : 120) << where;
  const auto a = fresh.logits();
  const auto b = updated.logits();
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 2e-4) << where;

  // Damage is an error by name, and the session reads on.
  std::ifstream file(path, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(file)), {});
  file.close();
  bytes[bytes.size() / 2] ^= 0x10;
  std::ofstream(path, std::ios::binary) << bytes;
  const auto error = error_of([&] { restored.restore(path); });
  ASSERT_TRUE(error) << where;
  EXPECT_EQ(error->code(), ErrorCode::kFormat) << where;
  std::filesystem::remove(path);
}

TEST(SessionCaches, Scored) {
  const auto model = small();
  ScorePolicy shared = ScorePolicy::h2o(10, 6, 4);
  shared.floor = 0.5;
  shared.growth = 9;
  const std::pair<const char*, ScorePolicy> policies[] = {
      {"SnapKV", ScorePolicy::snap_kv(16, 12, 4, 6)},
      {"H2O", ScorePolicy::h2o(10, 6, 4)},
      {"shared", shared},
      {"SirLLM", ScorePolicy::sir_llm(2, 4, 10, 0.9, 4)}};
  for (const auto& [name, policy] : policies)
    expect_transactions(
        [&, &chosen = policy] {
          return ScoredSession<f16>(model, options_for(), model->make_scored_cache<f16>(chosen));
        },
        false, name);
}

/// By hand: forward, scores, commit.
TEST(SessionCaches, ScoredWritesWhatTheCacheWritesByHand) {
  const auto model = small();
  Random random(5);
  const std::vector<Token> text = random_tokens(random, 90);
  SessionOptions options = options_for();
  options.sampler = {.temperature = 0};
  const ScorePolicy policy = ScorePolicy::sir_llm(2, 4, 10, 0.9, 4);
  ScoredSession<float> session(model, options, model->make_scored_cache<float>(policy));
  session.accept(text);
  std::vector<Token> written;
  for (int i = 0; i < 30; ++i) written.push_back(session.step().value());

  auto cache = model->make_scored_cache<float>(policy);
  ThreadTeam team(1);
  DecoderWorkspace workspace(*model, 4, cache.max_entries(), 1);
  std::vector<float> last(static_cast<std::size_t>(test::kVocab));
  const auto feed = [&](std::span<const Token> chunk) {
    model->forward(chunk, cache, workspace, team);
    std::vector<float> scores;
    std::vector<float> row = last;
    for (std::size_t t = 0; t < chunk.size(); ++t) {
      const bool first = cache.committed() == 0 && t == 0;
      scores.push_back(first ? 0.0F : static_cast<float>(negative_log_likelihood(row, chunk[t])));
      model->logits(static_cast<std::int64_t>(t), {row.data(), 1, test::kVocab}, workspace, team);
    }
    if (cache.committed() == 0) scores[0] = *std::max_element(scores.begin(), scores.end());
    cache.give_scores(scores);
    cache.commit();
    last = row;
  };
  for (std::size_t t = 0; t < text.size(); t += 4)
    feed(std::span(text).subspan(t, std::min<std::size_t>(4, text.size() - t)));
  for (const Token token : written) {
    EXPECT_EQ(token, std::max_element(last.begin(), last.end()) - last.begin());
    feed({&token, 1});
  }
  for (std::int64_t l = 0; l < 3; ++l) {
    // The session has not fed its last token.
    const auto a = session.cache().kept(l, 1);
    EXPECT_EQ(session.cache().total() + 1, cache.total());
    EXPECT_TRUE(std::is_sorted(a.begin(), a.end()));
  }
}

TEST(SessionCaches, Pages) {
  const auto model = small();
  for (const std::int64_t interval : {1, 3}) {
    const PageSelection selection{.page_size = 4,
                                  .logical_page_size = 2,
                                  .budget = 5,
                                  .interval = interval,
                                  .dense_layers = 1};
    expect_transactions(
        [&] {
          return PageSelectSession<f16>(model, options_for(),
                                        model->make_page_select_cache<f16>(selection, 500, 8));
        },
        true, interval == 1 ? "pages" : "pages for three tokens");
  }
}

TEST(SessionCaches, Tokens) {
  const auto model = small();
  const TokenSelection selection{.publishing_layers = {0}, .budget = 9};
  expect_transactions(
      [&] {
        return TokenSelectSession<f16>(model, options_for(),
                                       model->make_token_select_cache<f16>(selection, 500, 8));
      },
      true, "tokens");
}

TEST(SessionCaches, Clusters) {
  const auto model = small();
  const ClusterSelection selection{.num_bits = 16,
                                   .threshold = 4,
                                   .max_clusters = 30,
                                   .budget = 24,
                                   .recent = 6,
                                   .dense_layers = 1};
  expect_transactions(
      [&] {
        return ClusterSelectSession<f16>(model, options_for(),
                                         model->make_cluster_select_cache<f16>(selection, 500, 8));
      },
      true, "clusters");
}

/// Two of three layers become lazy by a prompt of up to 130 tokens.
LazyLayerConfig lazy_config(bool in_chunks) {
  return {.num_full_layers = 1,
          .num_sink_tokens = 2,
          .recent_size = 11,
          .num_queries = 5,
          .capacity = 300,
          .max_prompt = 130,
          .max_chunk = 4,
          .prompt_in_chunks = in_chunks};
}

TEST(SessionCaches, LazyLayers) {
  const auto model = small();
  for (const bool in_chunks : {false, true})
    expect_transactions(
        [&] {
          return LazyLayerSession<f16>(model, options_for(),
                                       model->make_lazy_layer_cache<f16>(lazy_config(in_chunks)));
        },
        false, in_chunks ? "lazy layers, in chunks" : "lazy layers");
}

/// By hand: the prompt, its end, one token after the other, a second text.
TEST(SessionCaches, LazyLayersWriteWhatTheCacheWritesByHand) {
  const auto model = small();
  Random random(11);
  const std::vector<Token> prompt = random_tokens(random, 102);
  const std::vector<Token> second = random_tokens(random, 10);
  for (const bool in_chunks : {false, true}) {
    SCOPED_TRACE(in_chunks ? "in chunks" : "in one chunk");
    SessionOptions options = options_for();
    options.sampler = {.temperature = 0};
    LazyLayerSession<float> session(model, options,
                                    model->make_lazy_layer_cache<float>(lazy_config(in_chunks)));
    session.accept(prompt);
    EXPECT_EQ(session.cache().num_lazy(), in_chunks ? 0 : 2);
    std::vector<Token> written;
    for (int i = 0; i < 20; ++i) written.push_back(session.step().value());
    session.accept(second);

    auto cache = model->make_lazy_layer_cache<float>(lazy_config(in_chunks));
    ThreadTeam team(1);
    DecoderWorkspace workspace(*model, cache.max_chunk(), cache.max_entries(), 1);
    std::vector<float> last(static_cast<std::size_t>(test::kVocab));
    const auto feed = [&](const std::vector<Token>& tokens, std::size_t chunk) {
      for (std::size_t t = 0; t < tokens.size(); t += chunk) {
        const std::size_t count = std::min(chunk, tokens.size() - t);
        model->forward({tokens.data() + t, count}, cache, workspace, team);
        model->logits(static_cast<std::int64_t>(count) - 1, {last.data(), 1, test::kVocab},
                      workspace, team);
        cache.commit();
      }
    };
    feed(prompt, in_chunks ? 4 : prompt.size());
    cache.end_prompt();
    for (const Token token : written) {
      EXPECT_EQ(token, std::max_element(last.begin(), last.end()) - last.begin());
      feed({token}, 1);
    }
    feed(second, 4);
    EXPECT_TRUE(std::ranges::equal(session.logits(), last));
    EXPECT_EQ(session.cache().num_lazy(), 2);
    for (std::int64_t l = 0; l < 3; ++l)
      EXPECT_EQ(session.cache().is_lazy(l), cache.is_lazy(l)) << l;

    // A prompt has its room, and so has the stream behind it.
    const auto full = error_of([&] { session.accept(random_tokens(random, 300 - 131)); });
    ASSERT_TRUE(full);
    EXPECT_EQ(full->code(), ErrorCode::kCapacity);
    session.reset();
    const auto long_prompt = error_of([&] { session.accept(random_tokens(random, 131)); });
    ASSERT_TRUE(long_prompt);
    EXPECT_EQ(long_prompt->code(), ErrorCode::kCapacity);
    if (!in_chunks) continue;
    const auto nothing_read = error_of([&] { session.end_prompt(); });
    ASSERT_TRUE(nothing_read);
    EXPECT_EQ(nothing_read->code(), ErrorCode::kOrder);
    session.accept(std::span(prompt).first(40));
    session.end_prompt();  // without a token written
    EXPECT_EQ(session.cache().num_lazy(), 2);
  }
}

/// Drafts are verified where rows of a rejected path leave nothing behind.
TEST(SessionCaches, Drafts) {
  const auto model = small();
  Random random(6);
  const std::vector<Token> text = random_tokens(random, 60);
  const PageSelection everything{
      .page_size = 4, .logical_page_size = 4, .budget = 200, .dense_layers = 0};
  const auto make = [&] {
    SessionOptions options = options_for();
    options.sampler = {.temperature = 0};
    return PageSelectSession<float>(model, options,
                                    model->make_page_select_cache<float>(everything, 500, 8));
  };
  auto plain = make();
  plain.accept(text);
  std::vector<Token> expected;
  for (int i = 0; i < 20; ++i) expected.push_back(plain.step().value());
  auto drafted = make();
  drafted.accept(text);
  std::vector<Token> written{drafted.step().value()};
  DraftTree draft(8);
  while (written.size() < 20) {
    draft.clear();
    draft.add(written.back(), DraftTree::kNoNode);
    draft.add(expected[written.size()], 0);  // one right guess, one wrong one
    draft.add((expected[written.size()] + 1) % static_cast<Token>(test::kVocab), 0);
    for (const Token token : drafted.step(draft)) written.push_back(token);
  }
  written.resize(20);
  EXPECT_EQ(written, expected);

  ScoredSession<f16> scored(model, options_for(),
                            model->make_scored_cache<f16>(ScorePolicy::h2o(8, 8, 4)));
  scored.accept(text);
  draft.clear();
  draft.add(scored.step().value(), DraftTree::kNoNode);
  const auto error = error_of([&] { scored.step(draft); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kUnsupported);
}

TEST(SessionCaches, Frames) {
  const auto model = small();
  const RetrievalConfig config{.num_init_tokens = 2,
                               .window_size = 12,
                               .frame_size = 4,
                               .max_frames = 20,
                               .top_frames = 3,
                               .num_slots = 4,
                               .max_question = 40,
                               .max_chunk = 5};
  SessionOptions options = options_for(0);
  const auto make = [&] {
    return RetrievalSession<f16>(model, options, model->make_retrieval_cache<f16>(config));
  };
  Random random(8);
  const std::vector<Token> text = random_tokens(random, 60);
  const std::vector<Token> question = random_tokens(random, 5);
  auto session = make();
  auto other = make();
  session.accept(text);
  other.accept(text);
  session.begin_question();
  EXPECT_FALSE(session.is_ready());
  session.accept(question);
  std::vector<Token> answer;
  for (int i = 0; i < 8; ++i) answer.push_back(session.step().value());
  EXPECT_EQ(session.cache().picked(0).size(), 3U);
  session.end_question();
  // The stream has not heard of it.
  EXPECT_EQ(session.position(), 60);
  EXPECT_TRUE(std::ranges::equal(session.logits(), other.logits()));
  session.accept(std::span(text).first(9));
  other.accept(std::span(text).first(9));
  EXPECT_TRUE(std::ranges::equal(session.logits(), other.logits()));

  for (const auto& error :
       {error_of([&] { static_cast<void>(session.fork()); }),
        error_of([&] { session.save(::testing::TempDir() + "/frames.session"); }),
        error_of([&] { session.restore(::testing::TempDir() + "/frames.session"); }),
        error_of([&] { session.checkpoint(); }), error_of([&] {
          SessionOptions with = options;
          with.checkpoints = 1;
          RetrievalSession<f16>(model, with, model->make_retrieval_cache<f16>(config));
        })}) {
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error->what()).find("host"), std::string::npos) << error->what();
  }
  // The host store ends the stream, with an error that says how much is left.
  const auto full = error_of([&] { session.accept(random_tokens(random, 60)); });
  ASSERT_TRUE(full);
  EXPECT_EQ(full->code(), ErrorCode::kCapacity);
}

TEST(SessionCaches, ProxyQueriesAreTheCallers) {
  const auto model = small();
  const auto error = error_of([&] {
    ScoredSession<f16>(model, options_for(),
                       model->make_scored_cache<f16>(ScorePolicy::stream_mem(1, 8, 8, 4, 2)));
  });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kUnsupported);
}

}  // namespace SLUICE_TEST_UNIT
