// SPDX-License-Identifier: MIT
// What a session that went back, forked or was cancelled writes is, bit for bit, what a fresh one
// that was given the same tokens in the same chunks writes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/random.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "sluice/stream/session.hpp"
#include "stream/session_transactions.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"
#include "tiny_model/tiny_model.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::error_of;
using test::expect_same_bits;
using test::random_tokens;
using test::random_transactions;
using test::write_with_drafts;

std::shared_ptr<const Decoder> model(const std::string& name = "llama3") {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/" + name;
  return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
}

constexpr CachePolicy kPolicies[]{CachePolicy::kSinkWindow, CachePolicy::kWindow,
                                  CachePolicy::kFull, CachePolicy::kRecompute};

// cache-and-kernel-algorithms D.1, token by token (a full cache keeps the prefix as it is).
TEST(SessionUpdate, KeepsTheCommonPrefixAndComputesTheRest) {
  const std::vector<Token> old{5, 6, 7, 8, 9, 2, 4, 4, 1, 3};
  const std::vector<Token> changed{5, 6, 7, 8, 9, 2, 9, 9};
  const auto decoder = model();
  const SessionOptions options = test::transaction_options(CachePolicy::kFull, 1);
  Session<float> session(decoder, options);
  session.accept(old);
  EXPECT_EQ(session.common_prefix(changed), 6);
  const UpdateResult same = session.update(old);
  EXPECT_EQ(same.common_prefix, 10);
  EXPECT_EQ(same.kept, 9);
  EXPECT_EQ(same.computed, 1);
  const UpdateResult result = session.update(changed);
  EXPECT_EQ(result.common_prefix, 6);
  EXPECT_EQ(result.kept, 6);
  EXPECT_EQ(result.computed, 2);
  Session<float> fresh(decoder, options);
  fresh.accept(changed);
  expect_same_bits(session, fresh, "after the update");
  for (int i = 0; i < 20; ++i) EXPECT_EQ(session.step(), fresh.step());
}

// Block-wise reuse of the same texts, B = 4: 4 tokens are kept and 4 computed (D.1), and C.1's
// hits.
TEST(SessionUpdate, AdoptsWholePagesOfAnotherSession) {
  const auto decoder = model();
  const auto store = decoder->make_page_store<float>(40, 4);
  const SessionOptions options = test::transaction_options(CachePolicy::kFull, 1);
  const auto session = [&] {
    return PagedSession<float>(decoder, options, PagedKvCache<float>(store, 60, 1));
  };
  PagedSession<float> first = session();
  first.accept(std::vector<Token>{5, 6, 7, 8, 9, 2, 4, 4, 1, 3});
  {
    const std::vector<Token> changed{5, 6, 7, 8, 9, 2, 9, 9};
    PagedSession<float> other = session();
    const UpdateResult result = other.update(changed);
    EXPECT_EQ(result.kept, 4);
    EXPECT_EQ(result.computed, 4);
    Session<float> fresh(decoder, options);
    fresh.accept(changed);
    for (std::size_t i = 0; i < 128; ++i) ASSERT_NEAR(other.logits()[i], fresh.logits()[i], 1e-4F);
    EXPECT_EQ(first.common_prefix(changed), 6);  // its own tokens, one by one
  }
  const std::vector<Token> text{5, 6, 7, 8, 9, 2, 4, 4, 1, 3};
  for (const auto& [length, hit] :
       std::vector<std::pair<std::size_t, std::int64_t>>{{10, 8}, {8, 4}, {4, 0}}) {
    PagedSession<float> other = session();
    EXPECT_EQ(other.update(std::span(text).first(length)).kept, hit) << length;
  }
  const std::vector<Token> behind_the_start{9, 2, 4, 4, 5};  // page 1's tokens at position 0
  PagedSession<float> other = session();
  EXPECT_EQ(other.update(behind_the_start).kept, 0);
}

// Every policy, trained windows.
TEST(SessionUpdate, EqualsAFreshSession) {
  for (const char* name : {"llama3", "gemma3"}) {
    const auto decoder = model(name);
    for (const CachePolicy policy : kPolicies) {
      SessionOptions options = test::transaction_options(policy, 1);
      options.cache.lead = 6;
      options.checkpoint_every = 16;
      options.history = 90;
      const std::string where = std::string(name) + " " + std::string(to_string(policy));
      const auto [kept, shared] = test::expect_updates_equal_fresh(
          [&] { return Session<float>(decoder, options); }, 25, where);
      RecordProperty(std::string(name) + "_" + std::string(to_string(policy)),
                     std::to_string(kept) + " of " + std::to_string(shared));
      EXPECT_LE(kept, policy == CachePolicy::kRecompute ? 0 : shared);
      EXPECT_GE(3 * kept, policy == CachePolicy::kRecompute ? 0 : shared) << "checkpoints unused";
      EXPECT_TRUE(kept == shared || policy != CachePolicy::kFull || std::string(name) != "llama3");
    }
  }
}

TEST(SessionUpdate, RefusesBeforeAnythingChanges) {
  const auto decoder = model();
  SessionOptions options = test::transaction_options(CachePolicy::kFull, 4);
  options.cache.capacity = 12;
  Session<float> session(decoder, options);
  Random random(1);
  const std::vector<Token> text = random_tokens(9, random);
  session.accept(text);
  session.step();
  Session<float> untouched = session.fork();
  auto error = error_of([&] { session.update(random_tokens(13, random)); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kCapacity);
  error = error_of([&] { session.update(std::vector<Token>{text[0], 128}); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kShape);
  expect_same_bits(session, untouched, "after the refusals");
  session.update(std::vector<Token>{});
  EXPECT_EQ(session.position(), 0);
  EXPECT_FALSE(session.is_ready());
}

TEST(SessionStop, StopsReadingBetweenChunksAndKeepsWhatItRead) {
  const auto decoder = model();
  for (const CachePolicy policy : kPolicies) {
    const SessionOptions options = test::transaction_options(policy, 4);
    Random random(3);
    const std::vector<Token> text = random_tokens(50, random);
    for (const int chunks : {1, 3}) {
      Session<float> session(decoder, options);
      int asked = 0;
      const std::int64_t read = session.accept(text, [&] { return ++asked == chunks; });
      EXPECT_EQ(read, chunks * (policy == CachePolicy::kRecompute ? 11 : 4));
      Session<float> fresh(decoder, options);
      fresh.accept(std::span(text).first(static_cast<std::size_t>(read)));
      expect_same_bits(session, fresh, std::string(to_string(policy)));
      EXPECT_EQ(session.common_prefix(text), read);
      // Going on is as if nothing had been asked.
      session.accept(std::span(text).subspan(static_cast<std::size_t>(read)));
      fresh.reset();
      fresh.accept(text);
      expect_same_bits(session, fresh, std::string(to_string(policy)));
      // An update that is cancelled has replaced the text as far as it came.
      std::vector<Token> changed = text;
      for (std::size_t i = 20; i < changed.size(); ++i) changed[i] = (changed[i] + 1) % 128;
      asked = 0;
      const UpdateResult result = session.update(changed, [&] { return ++asked == chunks; });
      EXPECT_LT(result.kept + result.computed, 50);
      EXPECT_EQ(session.position(), result.kept + result.computed);
      EXPECT_EQ(session.common_prefix(changed), session.position());
    }
  }
}

TEST(SessionCheckpoint, ReturnsBitForBitOnRandomOperations) {
  for (const char* name : {"llama3", "gemma3"}) {
    const auto decoder = model(name);
    for (const CachePolicy policy : kPolicies)
      for (const std::int64_t chunk : {1, 4})
        random_transactions(
            [&] { return Session<float>(decoder, test::transaction_options(policy, chunk)); },
            static_cast<std::uint64_t>(chunk) + 40,
            std::string(name) + " " + std::string(to_string(policy)));
  }
}

TEST(SessionCheckpoint, ReturnsBitForBitInPages) {
  const auto decoder = model();
  // Pages as wide as the kernels' cut of keys: bits do not depend on where pages lie. Small ones:
  // bits depend on it, so every session gets a store of its own, and forks are compared elsewhere.
  const auto store = decoder->make_page_store<f16>(30, 256);
  random_transactions(
      [&] {
        return PagedSession<f16>(decoder, test::transaction_options(CachePolicy::kFull, 4),
                                 PagedKvCache<f16>(store, 400, 4));
      },
      9, "pages");
}

TEST(SessionCheckpoint, ExpiresWhenItsPlaceIsTakenOrItsFutureIsTakenBack) {
  const auto decoder = model();
  test::expect_checkpoints_expire(
      [&](const SessionOptions& options) { return Session<float>(decoder, options); });
}

// Eight continuations of one stream cost the stream once and eight tails, and write what eight
// streams on their own write.
TEST(SessionFork, SharesPagesUntilSomeoneWrites) {
  const auto decoder = model();
  constexpr std::int64_t kPage = 8;
  constexpr std::size_t kPrefix = 203;  // ends inside a page
  constexpr int kForks = 8;
  constexpr int kTail = 20;
  const auto store = decoder->make_page_store<float>(80, kPage);
  const SessionOptions options = test::transaction_options(CachePolicy::kFull, 16);
  Random random(6);
  const std::vector<Token> prefix = random_tokens(kPrefix, random);
  std::vector<PagedSession<float>> forks;
  forks.reserve(kForks + 1);
  forks.emplace_back(decoder, options, PagedKvCache<float>(store, 300, 16));
  forks[0].accept(prefix);
  const std::size_t one = store->bytes_in_use();
  EXPECT_EQ(one, 26 * store->page_bytes());
  for (int i = 1; i < kForks; ++i) forks.push_back(forks[0].fork());
  EXPECT_EQ(store->bytes_in_use(), one);
  std::vector<std::vector<Token>> written(kForks);
  for (int i = 0; i < kForks; ++i) forks[static_cast<std::size_t>(i)].reseed(i + 1);
  for (int t = 0; t < kTail; ++t)
    for (std::size_t i = 0; i < kForks; ++i) written[i].push_back(forks[i].step().value());
  // A tail: the 3 tokens of the copied page, and those written (the last one is not fed).
  const std::size_t tail = (3 + kTail - 1 + kPage - 1) / kPage;
  EXPECT_EQ(store->bytes_in_use(), one - store->page_bytes() + kForks * tail * store->page_bytes());
  for (std::size_t i = 0; i < kForks; ++i) {
    EXPECT_LE(forks[i].cache().table().runs(), 4);
    Session<float> alone(decoder, options);
    alone.accept(prefix);
    alone.reseed(i + 1);
    for (int t = 0; t < kTail; ++t)
      EXPECT_EQ(alone.step(), written[i][static_cast<std::size_t>(t)]);
    for (std::size_t other = 0; other < i; ++other) EXPECT_NE(written[i], written[other]);
  }
}

TEST(SessionFork, OfAStoreWithoutPagesSaysSo) {
  const auto decoder = model();
  const auto store = decoder->make_page_store<float>(4, 4);
  const SessionOptions options = test::transaction_options(CachePolicy::kFull, 4);
  PagedSession<float> session(decoder, options, PagedKvCache<float>(store, 40, 4));
  Random random(1);
  session.accept(random_tokens(14, random));
  PagedSession<float> child = session.fork();
  auto error = error_of([&] { child.accept(std::vector<Token>{1}); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code(), ErrorCode::kCapacity);
  EXPECT_EQ(error->detail().expected, "at most 0");
  EXPECT_TRUE(child.is_ready());  // logits are there; what is written cannot be fed
  EXPECT_TRUE(child.step().has_value());
  EXPECT_FALSE(child.is_ready());
  session.reset();  // the pages are the child's alone now
  EXPECT_TRUE(child.step().has_value());
  SessionOptions window = test::transaction_options(CachePolicy::kSinkWindow, 4);
  error =
      error_of([&] { PagedSession<float>(decoder, window, PagedKvCache<float>(store, 40, 4)); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->detail().field, "cache.policy");
  SessionOptions other = test::transaction_options(CachePolicy::kSinkWindow, 4);
  Session<float> a(decoder, other);
  other.cache.window_size = 12;
  Session<float> b(decoder, other);
  EXPECT_EQ(error_of([&] { a.fork_into(b); })->code(), ErrorCode::kConfig);
}

// Greedy and seeded sampling, full cache, windows that move on, pages: verified drafts write what
// plain decoding writes, in fewer forwards, and leave no trace of what was wrong.
TEST(SessionDraft, WritesWhatPlainDecodingWrites) {
  const LoadedModel tiny = tiny_model::load();
  const std::int64_t vocab = tiny.decoder->config().vocab_size;
  Random random(5);
  const std::vector<Token> prompt = random_tokens(30, random, static_cast<std::uint64_t>(vocab));
  for (const double temperature : {0.0, 1.0})
    for (const CachePolicy policy :
         {CachePolicy::kFull, CachePolicy::kSinkWindow, CachePolicy::kWindow})
      for (const PositionRule rule : {PositionRule::kInCache, PositionRule::kInText})
        for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
          SessionOptions options = test::transaction_options(policy, 9);
          options.sampler = {.temperature = temperature, .seed = 3};
          options.cache.position_rule = rule;
          options.cache.key_form = form;
          Session<float> plain(tiny.decoder, options);
          plain.accept(prompt);
          std::vector<Token> expected;
          for (int i = 0; i < 150; ++i) expected.push_back(plain.step().value());
          Session<float> drafted(tiny.decoder, options);
          drafted.accept(prompt);
          std::int64_t forwards = 0;
          const bool branches = form == KeyForm::kRotated;
          EXPECT_EQ(write_with_drafts(drafted, expected, 9, branches, vocab, forwards), expected)
              << to_string(policy) << " " << to_string(rule) << " " << to_string(form);
          EXPECT_LT(forwards, 90);
        }
  const auto store = tiny.decoder->make_page_store<float>(40, 8);
  SessionOptions options = test::transaction_options(CachePolicy::kFull, 9);
  options.sampler = {.temperature = 0};
  Session<float> plain(tiny.decoder, options);
  plain.accept(prompt);
  std::vector<Token> expected;
  for (int i = 0; i < 150; ++i) expected.push_back(plain.step().value());
  PagedSession<float> paged(tiny.decoder, options, PagedKvCache<float>(store, 300, 9));
  paged.accept(prompt);
  std::int64_t forwards = 0;
  EXPECT_EQ(write_with_drafts(paged, expected, 9, true, vocab, forwards), expected);
}

TEST(SessionDraft, RefusesBeforeAnythingChanges) {
  const auto decoder = model();
  const auto session = [&](CachePolicy policy, KeyForm form) {
    SessionOptions options = test::transaction_options(policy, 4);
    options.cache.key_form = form;
    return Session<float>(decoder, options);
  };
  test::expect_bad_drafts_refused(
      [&] { return session(CachePolicy::kSinkWindow, KeyForm::kRotated); });
  EXPECT_EQ(
      test::refusal_of_draft(session(CachePolicy::kSinkWindow, KeyForm::kRaw), test::add_branches),
      "unsupported");
  EXPECT_EQ(test::refusal_of_draft(
                session(CachePolicy::kRecompute, KeyForm::kRotated),
                [](DraftTree& draft, Token root) { draft.add(root, DraftTree::kNoNode); }),
            "unsupported");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
