// SPDX-License-Identifier: MIT
/// What checkpoints, forks, updates and drafts of a session must do, whatever it runs on: for tests
/// of every backend. The sessions' vocabulary has 128 tokens where nothing else is said.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/draft_tree.hpp"
#include "sluice/core/random.hpp"
#include "sluice/stream/session.hpp"
#include "support/property.hpp"

namespace sluice::test {

inline std::vector<Token> random_tokens(std::size_t count, Random& random,
                                        std::uint64_t vocab = 128) {
  std::vector<Token> tokens(count);
  for (Token& token : tokens) token = static_cast<Token>(random.below(vocab));
  return tokens;
}

inline SessionOptions transaction_options(CachePolicy policy, std::int64_t chunk) {
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

template <class A, class B>
void expect_same_bits(A& a, B& b, const std::string& where) {
  ASSERT_EQ(a.position(), b.position()) << where;
  ASSERT_EQ(a.is_ready(), b.is_ready()) << where;
  if (!a.is_ready()) return;
  ASSERT_TRUE(std::ranges::equal(a.logits(), b.logits())) << where;
}

struct KeptTokens {
  std::int64_t kept = 0;
  std::int64_t shared = 0;  ///< what could have been kept at most
};
/// Random texts that share random beginnings, in chunks of one token, where no cut into chunks can
/// hide behind rounding: after each update the bits are those of a fresh session. The windows have
/// moved on. make(): a session with history and checkpoint_every.
template <class Make>
KeptTokens expect_updates_equal_fresh(Make&& make, int rounds, const std::string& where) {
  Random random(17);
  auto session = make();
  std::vector<Token> text;
  KeptTokens sum;
  for (int round = 0; round < rounds; ++round) {
    text.resize(random.below(text.size() + 1));
    const auto more = random_tokens(1 + random.below(60), random);
    text.insert(text.end(), more.begin(), more.end());
    const std::int64_t fed = session.cache().total();  // not a token that was just written
    const UpdateResult result = session.update(text);
    const auto count = static_cast<std::int64_t>(text.size());
    EXPECT_EQ(result.kept + result.computed, count);
    EXPECT_LE(result.kept, std::min(result.common_prefix, count - 1));
    sum.kept += result.kept;
    sum.shared += std::min({result.common_prefix, count - 1, fed});
    auto fresh = make();
    fresh.accept(text);
    expect_same_bits(session, fresh, where);
    for (std::uint64_t i = random.below(4); i > 0; --i) {
      text.push_back(session.step().value());
      EXPECT_EQ(fresh.step(), text.back());
    }
    if (testing::Test::HasFailure()) break;
  }
  return sum;
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
void random_transactions(Make&& make, std::uint64_t seed, const std::string& where,
                         int steps = 120) {
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
  for (int step = 0; step < steps; ++step) {
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
        const auto& chosen = held[random.below(held.size())];
        const CheckpointId id = chosen.first;
        if (!session.holds(id)) {
          EXPECT_EQ(error_of([&] { session.rollback_to(id); })->code(), ErrorCode::kOrder);
          break;
        }
        session.rollback_to(id);
        log = chosen.second;
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

/// Ids expire when their place is taken or their future is taken back. make(options): a session.
template <class Make>
void expect_checkpoints_expire(Make&& make) {
  Random random(2);
  auto session = make(transaction_options(CachePolicy::kSinkWindow, 4));
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
  SessionOptions none = transaction_options(CachePolicy::kFull, 4);
  auto full = make(none);
  EXPECT_LT(full.checkpoint_bytes(), session.checkpoint_bytes());
  none.checkpoints = 0;
  auto without = make(none);
  EXPECT_EQ(without.checkpoint_bytes(), 0U);
  EXPECT_EQ(error_of([&] { without.checkpoint(); })->code(), ErrorCode::kConfig);
  none.checkpoint_every = 5;
  EXPECT_EQ(error_of([&] { make(none); })->detail().field, "checkpoints");
  none = transaction_options(CachePolicy::kFull, 4);
  none.history = -1;
  EXPECT_EQ(error_of([&] { make(none); })->detail().field, "history");
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

/// The code of the error that a draft gives, behind which the session must be as it was.
/// build(draft, root): makes the draft.
template <class AnySession, class Build>
std::string refusal_of_draft(AnySession&& session, Build&& build) {
  Random random(1);
  session.accept(random_tokens(20, random));
  const Token root = session.step().value();
  auto untouched = session.fork();
  DraftTree draft(8);
  build(draft, root);
  const auto error = error_of([&] { session.step(draft); });
  expect_same_bits(session, untouched, "after the refusal");
  return error ? std::string(to_string(error->code())) : "none";
}

/// What every backend refuses of a session with chunks of 4 tokens.
template <class Make>
void expect_bad_drafts_refused(Make&& make) {
  EXPECT_EQ(refusal_of_draft(make(), [](DraftTree&, Token) {}), "order");
  EXPECT_EQ(
      refusal_of_draft(make(), [](DraftTree& draft,
                                  Token root) { draft.add((root + 1) % 128, DraftTree::kNoNode); }),
      "order");
  EXPECT_EQ(refusal_of_draft(make(),
                             [](DraftTree& draft, Token root) {
                               draft.add(root, DraftTree::kNoNode);
                               draft.add(128, 0);
                             }),
            "shape");
  EXPECT_EQ(refusal_of_draft(make(),
                             [](DraftTree& draft, Token root) {
                               draft.add(root, DraftTree::kNoNode);
                               for (int i = 0; i < 4; ++i) draft.add(1, i);
                             }),
            "capacity");
}
/// A root with two children.
inline void add_branches(DraftTree& draft, Token root) {
  draft.add(root, DraftTree::kNoNode);
  draft.add(1, 0);
  draft.add(2, 0);
}

}  // namespace sluice::test
