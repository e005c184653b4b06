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
#include "support/property.hpp"
#include "support/test_unit.hpp"
#include "tiny_model/tiny_model.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::between;
using test::error_of;

std::shared_ptr<const Decoder> model(const std::string& name = "llama3") {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/" + name;
  return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
}

std::vector<Token> random_tokens(std::size_t count, Random& random, std::uint64_t vocab = 128) {
  std::vector<Token> tokens(count);
  for (Token& token : tokens) token = static_cast<Token>(random.below(vocab));
  return tokens;
}

SessionOptions options_of(CachePolicy policy, std::int64_t chunk) {
  SessionOptions options;
  options.cache.policy = policy;
  options.cache.num_sink_tokens = 2;
  options.cache.window_size = 11;
  options.cache.capacity = 400;
  options.cache.chunk_size = chunk;
  options.sampler = {.temperature = 1, .repetition_penalty = 1.2, .repetition_window = 16};
  options.history = 300;
  options.checkpoints = 4;
  return options;
}

constexpr CachePolicy kPolicies[]{CachePolicy::kSinkWindow, CachePolicy::kWindow,
                                  CachePolicy::kFull, CachePolicy::kRecompute};

template <class A, class B>
void expect_same_bits(A& a, B& b, const std::string& where) {
  ASSERT_EQ(a.position(), b.position()) << where;
  ASSERT_EQ(a.is_ready(), b.is_ready()) << where;
  if (!a.is_ready()) return;
  ASSERT_TRUE(std::ranges::equal(a.logits(), b.logits())) << where;
}

// cache-and-kernel-algorithms D.1, token by token (a full cache keeps the prefix as it is).
TEST(SessionUpdate, KeepsTheCommonPrefixAndComputesTheRest) {
  const std::vector<Token> old{5, 6, 7, 8, 9, 2, 4, 4, 1, 3};
  const std::vector<Token> changed{5, 6, 7, 8, 9, 2, 9, 9};
  const auto decoder = model();
  const SessionOptions options = options_of(CachePolicy::kFull, 1);
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
  const SessionOptions options = options_of(CachePolicy::kFull, 1);
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

// Random texts that share random beginnings, in chunks of one token, where no cut into chunks can
// hide behind rounding: every policy, trained windows, pages; the windows have moved on.
TEST(SessionUpdate, EqualsAFreshSession) {
  for (const char* name : {"llama3", "gemma3"}) {
    const auto decoder = model(name);
    for (const CachePolicy policy : kPolicies) {
      Random random(17);
      SessionOptions options = options_of(policy, 1);
      options.cache.lead = 6;
      options.checkpoint_every = 16;
      options.history = 90;
      Session<float> session(decoder, options);
      std::vector<Token> text;
      std::int64_t kept = 0;
      std::int64_t shared = 0;
      for (int round = 0; round < 25; ++round) {
        text.resize(random.below(text.size() + 1));
        const auto more = random_tokens(1 + random.below(60), random);
        text.insert(text.end(), more.begin(), more.end());
        const std::int64_t fed = session.cache().total();  // not a token that was just written
        const UpdateResult result = session.update(text);
        const auto count = static_cast<std::int64_t>(text.size());
        ASSERT_EQ(result.kept + result.computed, count);
        ASSERT_LE(result.kept, std::min(result.common_prefix, count - 1));
        kept += result.kept;
        shared += std::min({result.common_prefix, count - 1, fed});
        Session<float> fresh(decoder, options);
        fresh.accept(text);
        expect_same_bits(session, fresh, std::string(name) + " " + std::string(to_string(policy)));
        for (std::uint64_t i = random.below(4); i > 0; --i) {
          text.push_back(session.step().value());
          ASSERT_EQ(fresh.step(), text.back());
        }
      }
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
  SessionOptions options = options_of(CachePolicy::kFull, 4);
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
    const SessionOptions options = options_of(policy, 4);
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

/// What was done to a session: replayed on a fresh one, it must give the same bits.
struct Action {
  std::vector<Token> tokens;  // read; empty: a step
};

template <class AnySession>
void replay(const std::vector<Action>& log, AnySession& fresh) {
  for (const Action& action : log)
    if (action.tokens.empty())
      fresh.step();
    else
      fresh.accept(action.tokens);
}

/// Random reading, writing, checkpoints and returns, forks among them; after each return and each
/// fork, logits and position against a fresh session that replays what is left of the log.
template <class Make>
void random_transactions(Make&& make, std::uint64_t seed, const std::string& where) {
  using AnySession = decltype(make());
  Random random(seed);
  AnySession session = make();
  std::vector<Action> log;
  std::vector<std::pair<CheckpointId, std::vector<Action>>> held;
  int returns = 0;
  const auto compare = [&](AnySession& found) {
    AnySession fresh = make();
    replay(log, fresh);
    expect_same_bits(found, fresh, where);
    // The sampler too: what is drawn next.
    AnySession a = found.fork();
    AnySession b = fresh.fork();
    for (int i = 0; i < 3; ++i) ASSERT_EQ(a.step(), b.step()) << where;
  };
  for (int step = 0; step < 120; ++step) {
    if (session.position() > 250) {
      session.reset();
      log.clear();
    }
    switch (random.below(6)) {
      case 0:
      case 1: {
        log.push_back({random_tokens(1 + random.below(25), random)});
        session.accept(log.back().tokens);
        break;
      }
      case 2:
        if (!session.is_ready()) break;
        log.push_back({});
        session.step();
        break;
      case 3: held.emplace_back(session.checkpoint(), log); break;
      case 4: {
        if (held.empty()) break;
        const auto& [id, then] = held[random.below(held.size())];
        if (!session.holds(id)) {
          EXPECT_EQ(error_of([&] { session.rollback_to(id); })->code(), ErrorCode::kOrder);
          break;
        }
        session.rollback_to(id);
        log = then;
        ++returns;
        compare(session);
        break;
      }
      default: {
        AnySession child = session.fork();
        compare(child);
        if (!session.is_ready()) break;
        // The two do not meet: the child goes elsewhere, then takes the parent's place again.
        child.accept(random_tokens(1 + random.below(20), random));
        compare(session);
        session.fork_into(child);
        compare(child);
      }
    }
    if (testing::Test::HasFatalFailure()) return;
  }
  EXPECT_GT(returns, 3) << where;
}

TEST(SessionCheckpoint, ReturnsBitForBitOnRandomOperations) {
  for (const char* name : {"llama3", "gemma3"}) {
    const auto decoder = model(name);
    for (const CachePolicy policy : kPolicies)
      for (const std::int64_t chunk : {1, 4})
        random_transactions([&] { return Session<float>(decoder, options_of(policy, chunk)); },
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
        return PagedSession<f16>(decoder, options_of(CachePolicy::kFull, 4),
                                 PagedKvCache<f16>(store, 400, 4));
      },
      9, "pages");
}

TEST(SessionCheckpoint, ExpiresWhenItsPlaceIsTakenOrItsFutureIsTakenBack) {
  const auto decoder = model();
  Random random(2);
  Session<float> session(decoder, options_of(CachePolicy::kSinkWindow, 4));
  const auto what_of = [&](CheckpointId id) {
    const auto error = error_of([&] { session.rollback_to(id); });
    return error ? error->detail().what : "none";
  };
  EXPECT_EQ(what_of({}), "no such checkpoint");
  EXPECT_EQ(what_of({1}), "no such checkpoint");
  std::vector<CheckpointId> ids;
  for (int i = 0; i < 5; ++i) {
    session.accept(random_tokens(10, random));
    ids.push_back(session.checkpoint());
  }
  EXPECT_EQ(what_of(ids[0]), "the checkpoint has expired");  // four places
  EXPECT_TRUE(session.holds(ids[4]));
  EXPECT_EQ(what_of(ids[2]), "none");
  EXPECT_EQ(session.position(), 30);
  EXPECT_EQ(what_of(ids[3]), "the checkpoint has expired");  // behind the return
  EXPECT_EQ(what_of(ids[2]), "none");                        // again, and again
  session.release(ids[2]);
  EXPECT_EQ(what_of(ids[2]), "the checkpoint has expired");
  EXPECT_EQ(what_of(ids[1]), "none");
  session.reset();
  EXPECT_EQ(what_of(ids[1]), "the checkpoint has expired");
  // Its cost is known, and windows alone cost rows.
  EXPECT_GT(session.checkpoint_bytes(), 3 * 2 * 16 * sizeof(float));
  SessionOptions none = options_of(CachePolicy::kFull, 4);
  Session<float> full(decoder, none);
  EXPECT_LT(full.checkpoint_bytes(), session.checkpoint_bytes());
  none.checkpoints = 0;
  Session<float> without(decoder, none);
  EXPECT_EQ(without.checkpoint_bytes(), 0U);
  EXPECT_EQ(error_of([&] { without.checkpoint(); })->code(), ErrorCode::kConfig);
  none.checkpoint_every = 5;
  EXPECT_EQ(error_of([&] { Session<float>(decoder, none); })->detail().field, "checkpoints");
  none = options_of(CachePolicy::kFull, 4);
  none.history = -1;
  EXPECT_EQ(error_of([&] { Session<float>(decoder, none); })->detail().field, "history");
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
  const SessionOptions options = options_of(CachePolicy::kFull, 16);
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
  const SessionOptions options = options_of(CachePolicy::kFull, 4);
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
  SessionOptions window = options_of(CachePolicy::kSinkWindow, 4);
  error =
      error_of([&] { PagedSession<float>(decoder, window, PagedKvCache<float>(store, 40, 4)); });
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->detail().field, "cache.policy");
  SessionOptions other = options_of(CachePolicy::kSinkWindow, 4);
  Session<float> a(decoder, other);
  other.cache.window_size = 12;
  Session<float> b(decoder, other);
  EXPECT_EQ(error_of([&] { a.fork_into(b); })->code(), ErrorCode::kConfig);
}

/// Tokens that a session writes by verifying random drafts, some of whose guesses are right because
/// they were looked up in what plain decoding wrote.
template <class AnySession>
std::vector<Token> write_with_drafts(AnySession& session, std::span<const Token> plain,
                                     std::int64_t most, bool branches, std::int64_t vocab,
                                     std::int64_t& forwards) {
  Random random(12);
  std::vector<Token> written{session.step().value()};
  DraftTree draft(most);
  while (written.size() < plain.size()) {
    draft.clear();
    std::int64_t right = draft.add(written.back(), DraftTree::kNoNode);
    std::size_t next = written.size();
    while (draft.size() < most && next < plain.size()) {
      // Wrong guesses before and behind the right one.
      const auto wrong = [&] {
        return static_cast<Token>(random.below(static_cast<std::uint64_t>(vocab)));
      };
      if (branches && random.below(2) == 0)
        draft.add(wrong(), between(random, 0, draft.size() - 1));
      if (draft.size() == most) break;
      if (random.below(6) == 0) {
        draft.add(wrong(), right);
        break;
      }
      right = draft.add(plain[next++], right);
    }
    for (const Token token : session.step(draft)) written.push_back(token);
    ++forwards;
  }
  written.resize(plain.size());
  return written;
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
          SessionOptions options = options_of(policy, 9);
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
  SessionOptions options = options_of(CachePolicy::kFull, 9);
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
  Random random(1);
  const auto code_of = [&](CachePolicy policy, KeyForm form, auto&& build) {
    SessionOptions options = options_of(policy, 4);
    options.cache.key_form = form;
    Session<float> session(decoder, options);
    session.accept(random_tokens(20, random));
    const Token root = session.step().value();
    Session<float> untouched = session.fork();
    DraftTree draft(8);
    build(draft, root);
    const auto error = error_of([&] { session.step(draft); });
    expect_same_bits(session, untouched, "after the refusal");
    return error ? std::string(to_string(error->code())) : "none";
  };
  const auto plain = [](DraftTree& draft, Token root) {
    draft.add(root, DraftTree::kNoNode);
  };
  const auto fork = [](DraftTree& draft, Token root) {
    draft.add(root, DraftTree::kNoNode);
    draft.add(1, 0);
    draft.add(2, 0);
  };
  const auto window = CachePolicy::kSinkWindow;
  EXPECT_EQ(code_of(window, KeyForm::kRotated, [](DraftTree&, Token) {}), "order");
  EXPECT_EQ(code_of(window, KeyForm::kRotated,
                    [](DraftTree& d, Token root) { d.add((root + 1) % 128, DraftTree::kNoNode); }),
            "order");
  EXPECT_EQ(code_of(window, KeyForm::kRotated,
                    [](DraftTree& d, Token root) {
                      d.add(root, DraftTree::kNoNode);
                      d.add(128, 0);
                    }),
            "shape");
  EXPECT_EQ(code_of(window, KeyForm::kRotated,
                    [](DraftTree& d, Token root) {
                      d.add(root, DraftTree::kNoNode);
                      for (int i = 0; i < 4; ++i) d.add(1, 0);
                    }),
            "capacity");
  EXPECT_EQ(code_of(window, KeyForm::kRaw, fork), "unsupported");
  EXPECT_EQ(code_of(CachePolicy::kRecompute, KeyForm::kRotated, plain), "unsupported");
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
