// SPDX-License-Identifier: MIT
// After construction a session allocates nothing, whatever its policy: not when it reads a text
// longer than the cache, not when it scores one, not when it writes, goes back, replaces its text
// or verifies a draft.
#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "sluice/stream/session.hpp"
#include "support/count_allocations.hpp"
#include "support/sanitizers.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

template <class Element>
void expect_no_allocation(const std::string& model_name, CachePolicy policy, KeyForm form,
                          int threads) {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/" + model_name;
  const auto decoder =
      load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
  SessionOptions options;
  options.cache.policy = policy;
  options.cache.key_form = form;
  options.cache.window_size = 24;
  options.cache.capacity = 4096;
  options.sampler = {.temperature = 0.8, .top_k = 20, .top_p = 0.9, .repetition_penalty = 1.1};
  options.num_threads = threads;
  Session<Element> session(decoder, options);
  std::vector<Token> tokens(200);
  Random random(1);
  for (Token& token : tokens) token = static_cast<Token>(random.below(128));
  std::vector<float> scratch(8 * 128);

  const auto before = test::allocation_count();
  session.accept(tokens);
  for (int i = 0; i < 150; ++i) session.step();
  session.accept_scored(tokens, {scratch.data(), 8, 128}, [](std::size_t, double) {});
  for (int i = 0; i < 150; ++i) session.step();
  EXPECT_EQ(test::allocation_count() - before, 0)
      << model_name << " " << to_string(policy) << " keys " << to_string(form);
}

/// Checkpoints, returns, updates, drafts and forks into a session that is there.
template <class AnySession>
void expect_transactions_without_allocation(AnySession& session, const char* where) {
  AnySession child = session.fork();
  Random random(2);
  std::vector<Token> text(150);
  for (Token& token : text) token = static_cast<Token>(random.below(128));
  DraftTree draft(4);
  const auto before = test::allocation_count();
  session.update(text);
  for (int round = 0; round < 20; ++round) {
    const CheckpointId id = session.checkpoint();
    session.accept(std::span<const Token>(text).first(7));
    session.step();
    session.fork_into(child);
    child.step();
    session.rollback_to(id);
    text[random.below(text.size())] = static_cast<Token>(random.below(128));
    session.update(text, [] { return false; });
    using Cache = std::remove_cvref_t<decltype(session.cache())>;
    constexpr bool verifies = requires(Cache & cache, std::span<const std::int64_t> path) {
      cache.keep_path(1, path);
    };
    if constexpr (!verifies) continue;
    if (session.options().cache.policy != CachePolicy::kRecompute) {
      draft.clear();
      draft.add(session.step().value(), DraftTree::kNoNode);
      draft.add(3, 0);
      draft.add(4, 0);
      session.step(draft);
    }
  }
  EXPECT_EQ(test::allocation_count() - before, 0) << where;
}

TEST(SessionAllocations, AreZeroInTransactions) {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/gemma3";
  const auto decoder =
      load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
  SessionOptions options;
  options.cache.window_size = 24;
  options.cache.capacity = 200;
  options.cache.chunk_size = 4;
  options.history = 100;
  options.checkpoints = 3;
  options.checkpoint_every = 40;
  for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kWindow,
                                   CachePolicy::kFull, CachePolicy::kRecompute}) {
    options.cache.policy = policy;
    Session<f16> session(decoder, options);
    expect_transactions_without_allocation(session, to_string(policy).data());
  }
  options.cache.policy = CachePolicy::kFull;
  PagedSession<f16> paged(decoder, options,
                          PagedKvCache<f16>(decoder->make_page_store<f16>(40, 16), 200, 4));
  expect_transactions_without_allocation(paged, "pages");
  ScoredSession<f16> scored(
      decoder, options, decoder->make_scored_cache<f16>(ScorePolicy::sir_llm(2, 8, 14, 0.9, 4)));
  expect_transactions_without_allocation(scored, "scored by surprisal");
  PageSelectSession<f16> selecting(
      decoder, options,
      decoder->make_page_select_cache<f16>(
          {.page_size = 4, .logical_page_size = 4, .budget = 4, .dense_layers = 1}, 200, 4));
  expect_transactions_without_allocation(selecting, "pages that queries pick");
  for (const bool in_chunks : {false, true}) {
    LazyLayerSession<f16> lazy(
        decoder, options,
        decoder->make_lazy_layer_cache<f16>({.num_full_layers = 1,
                                             .num_sink_tokens = 2,
                                             .recent_size = 12,
                                             .num_queries = 8,
                                             .capacity = 200,
                                             .max_prompt = 160,
                                             .max_chunk = 4,
                                             .prompt_in_chunks = in_chunks}));
    expect_transactions_without_allocation(lazy, "lazy layers");
  }
}

TEST(SessionAllocations, AreZeroAfterConstruction) {
  for (const char* model : {"llama3", "gemma3", "qwen2"})
    for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kWindow,
                                     CachePolicy::kFull, CachePolicy::kRecompute})
      for (const int threads : {1, 2})
        if (threads > 1 || !SLUICE_TEST_THREAD_SANITIZED)
          expect_no_allocation<f16>(model, policy, KeyForm::kRotated, threads);
  expect_no_allocation<float>("llama3", CachePolicy::kSinkWindow, KeyForm::kRaw, 2);
  expect_no_allocation<bf16>("llama3", CachePolicy::kSinkWindow, KeyForm::kRaw, 1);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
