// SPDX-License-Identifier: MIT
/// Checkpoints, forks, snapshots and drafts of a session on a GPU: what is tested of the CPU's, and
/// streams that move between the two. Linked twice, as session_test.cpp.
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/attention/draft_tree.hpp>
#include <sluice/backend/cuda/session.hpp>
#include <sluice/core/atomic_file.hpp>
#include <sluice/core/byte_stream.hpp>
#include <sluice/core/random.hpp>
#include <sluice/stream/session.hpp>

#include "backend/cuda/random_decoder.hpp"
#include "backend/cuda/snapshot_folder.hpp"
#include "stream/session_kill.hpp"
#include "stream/session_transactions.hpp"
#include "support/count_allocations.hpp"
#include "support/property.hpp"

namespace {

using namespace sluice;
using namespace host_test;
using test::error_of;
using test::expect_same_bits;
using test::transaction_options;

std::shared_ptr<const CudaModel<bf16>> placed_model(std::uint64_t seed) {
  return place_model<cuda, bf16>(make_model({.head_dim = 64}, seed));
}

TEST(CudaSessionCheckpoint, ReturnsBitForBitOnRandomOperations) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(101);
  for (const auto& [policy, chunk] :
       {std::pair(CachePolicy::kSinkWindow, 4), std::pair(CachePolicy::kFull, 4),
        std::pair(CachePolicy::kWindow, 1)})
    test::random_transactions(
        [&, p = policy, c = chunk] { return CudaSession<bf16>(model, transaction_options(p, c)); },
        44, std::string(to_string(policy)), 70);
}

TEST(CudaSessionCheckpoint, ExpiresWhenItsPlaceIsTakenOrItsFutureIsTakenBack) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(102);
  test::expect_checkpoints_expire(
      [&](const SessionOptions& options) { return CudaSession<bf16>(model, options); });
}

TEST(CudaSessionUpdate, EqualsAFreshSession) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(103);
  for (const CachePolicy policy :
       {CachePolicy::kSinkWindow, CachePolicy::kWindow, CachePolicy::kFull}) {
    SessionOptions options = transaction_options(policy, 1);
    options.checkpoint_every = 16;
    options.history = 90;
    const auto [kept, shared] = test::expect_updates_equal_fresh(
        [&] { return CudaSession<bf16>(model, options); }, 15, std::string(to_string(policy)));
    EXPECT_LE(kept, shared);
    EXPECT_GE(3 * kept, shared) << "checkpoints unused";
    EXPECT_TRUE(kept == shared || policy != CachePolicy::kFull);
  }
}

// What is kept is what the CPU keeps, in chunks too.
TEST(CudaSessionUpdate, KeepsWhatTheCpuKeeps) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 104);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 4);
  options.checkpoint_every = 20;
  Session<bf16> expected(model, options);
  CudaSession<bf16> found(model, options);
  Random random(105);
  std::vector<Token> text = some_tokens(150, 106);
  std::int64_t sum = 0;
  for (int i = 0; i < 20; ++i) {
    const UpdateResult result = expected.update(text);
    EXPECT_EQ(found.update(text).kept, result.kept) << "update " << i;
    sum += result.kept;
    EXPECT_LE(relative_error(found.logits(), expected.logits()), kRoundedBound) << "update " << i;
    Token& token = text[random.below(text.size())];
    token = (token + 1) % kVocab;
  }
  EXPECT_GT(sum, 0);
}

// The host's half allocates nothing, nor does the device's: its places are there.
template <KvElement Element>
void expect_no_allocation(CachePolicy policy) {
  CudaSession<Element> session(place_model<cuda, Element>(make_model({.head_dim = 64}, 107)),
                               transaction_options(policy, 4));
  session.accept(some_tokens(30, 108));
  // The CUDA runtime takes memory of its own now and then, where copies wait for a busy device.
  // What a call took would be taken in every round.
  std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
  for (int round = 0; round < 5; ++round) {
    const auto before = test::allocation_count();
    for (int i = 0; i < 10; ++i) {
      const CheckpointId id = session.checkpoint();
      EXPECT_TRUE(session.holds(id));
      session.rollback_to(id);
    }
    fewest = std::min(fewest, test::allocation_count() - before);
  }
  EXPECT_EQ(fewest, 0) << to_string(policy);
}
TEST(CudaSessionCheckpoint, AllocatesNothing) {
  SKIP_WITHOUT_DEVICE();
  for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kFull})
    expect_no_allocation<bf16>(policy);
  expect_no_allocation<fp8_e4m3>(CachePolicy::kSinkWindow);  // scales are kept as well
}

TEST(CudaSessionFork, IsMadeAlikeAndGoesItsOwnWay) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(109);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 4);
  CudaSession<bf16> session(model, options);
  session.accept(some_tokens(50, 110));
  std::vector<CudaSession<bf16>> forks;
  for (std::uint64_t i = 0; i < 3; ++i) {
    forks.push_back(session.fork());
    forks.back().reseed(i);
  }
  std::vector<std::vector<Token>> written(forks.size());
  for (int t = 0; t < 20; ++t)  // in turns
    for (std::size_t i = 0; i < forks.size(); ++i) written[i].push_back(forks[i].step().value());
  for (std::size_t i = 0; i < forks.size(); ++i) {
    CudaSession<bf16> alone(model, options);
    alone.accept(some_tokens(50, 110));
    alone.reseed(i);
    for (const Token token : written[i]) EXPECT_EQ(alone.step(), token);
    expect_same_bits(forks[i], alone, "fork " + std::to_string(i));
  }
  options.cache.window_size = 12;
  CudaSession<bf16> other(model, options);
  EXPECT_EQ(error_of([&] { session.fork_into(other); })->code(), ErrorCode::kConfig);
  options.cache.window_size = 11;
  CudaSession<bf16> elsewhere(placed_model(109), options);
  EXPECT_EQ(error_of([&] { session.fork_into(elsewhere); })->code(), ErrorCode::kConfig);
}

// --- Snapshots -----------------------------------------------------------------------------------

class CudaSnapshot : public SnapshotFolder {};

TEST_F(CudaSnapshot, MovesBetweenBackends) {
  SKIP_WITHOUT_DEVICE();
  const auto bound = [](const auto&, const auto&, const auto&) {
    return kExactBound;
  };
  for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kFull})
    expect_moves<bf16>({.head_dim = 64}, policy, bound);
  // Padded, interleaved; keys of other elements.
  expect_moves<bf16>({.head_dim = 40}, CachePolicy::kSinkWindow, bound);
  expect_moves<f16>({.head_dim = 16, .interleaved = true}, CachePolicy::kWindow, bound);
}

TEST_F(CudaSnapshot, OfAnEmptyStream) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(115);
  const SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 4);
  CudaSession<bf16> session(model, options);
  session.save(path("empty"));
  session.accept(some_tokens(20, 116));
  session.restore(path("empty"));
  EXPECT_EQ(session.position(), 0);
  EXPECT_FALSE(session.is_ready());
  session.accept(some_tokens(20, 116));
  CudaSession<bf16> fresh(model, options);
  fresh.accept(some_tokens(20, 116));
  expect_same_bits(session, fresh, "behind an empty stream");
}

TEST_F(CudaSnapshot, OfAnotherKindIsRefusedByName) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 117);
  const SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 4);
  CudaSession<bf16> session(model, options);
  session.accept(some_tokens(30, 118));
  const std::vector<float> before = copy(session.logits());
  const auto field_of = [&](const std::string& file) {
    const auto error = error_of([&] { session.restore(file); });
    if (!error) return std::string("none");
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
    return error->detail().field.substr(0, error->detail().field.find(" at"));
  };
  SessionOptions wider = options;
  wider.cache.window_size = 12;
  Session<bf16> window(model, wider);
  window.save(path("window"));
  EXPECT_EQ(field_of(path("window")), "window_size");
  EXPECT_EQ(copy(session.logits()), before) << "the session changed";
  Session<f16> elements(model, options);  // is seen behind what identifies the stream: a reset
  elements.save(path("elements"));
  EXPECT_EQ(field_of(path("elements")), "key type");
  EXPECT_EQ(session.position(), 0);
  EXPECT_EQ(error_of([&] { session.restore(path("absent")); })->code(), ErrorCode::kIo);
  EXPECT_EQ(error_of([&] { session.save(path("no/folder")); })->code(), ErrorCode::kIo);
}

// Damage is found by the checksum, and changes nothing. What has a checksum of its own and lies is
// refused or read; the session goes on either way.
TEST_F(CudaSnapshot, OfHostileFiles) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(119);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 2);
  options.cache.num_sink_tokens = 1;
  options.cache.window_size = 3;
  options.sampler = {};
  CudaSession<bf16> session(model, options);
  session.accept(some_tokens(9, 120));
  session.save(path("file"));
  const std::vector<std::byte> good = read_file(path("file"));
  const std::vector<float> before = copy(session.logits());
  Random random(121);
  const auto code_of = [&](std::span<const std::byte> bytes) {
    write_file_atomically(path("file"), bytes);
    const auto error = error_of([&] { session.restore(path("file")); });
    return error ? std::optional(error->code()) : std::nullopt;
  };
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<std::byte> bytes = good;
    if (trial % 2 == 0)
      bytes.resize(random.below(good.size()));
    else
      bytes[random.below(good.size())] ^= static_cast<std::byte>(1U << random.below(8));
    ASSERT_EQ(code_of(bytes), ErrorCode::kFormat);
  }
  EXPECT_EQ(copy(session.logits()), before);
  const std::size_t head = 600;  // the fields; what follows are rows for the most part
  int refused = 0;
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<std::byte> bytes(good.begin(), good.end() - 8);
    if (trial % 5 == 0)
      bytes.resize(random.below(bytes.size()));
    else
      bytes[random.below(trial % 5 == 1 ? bytes.size() : head)] =
          static_cast<std::byte>(random.below(256));
    ByteWriter writer;
    for (const std::byte byte : bytes) writer.write(static_cast<std::uint8_t>(byte));
    writer.write_checksum();
    const auto code = code_of(writer.bytes());
    if (code) {
      ASSERT_EQ(code, ErrorCode::kFormat);
      ++refused;
    }
    if (trial % 20 == 0) {
      session.accept(some_tokens(5, 122));
      ASSERT_EQ(session.logits().size(), static_cast<std::size_t>(kVocab));
    }
  }
  EXPECT_GT(refused, 100);
  ASSERT_EQ(code_of(good), std::nullopt);
  EXPECT_EQ(copy(session.logits()), before);
}

class CudaKilledSession : public test::KilledSession {};

// The file is written as the CPU writes its own.
TEST_F(CudaKilledSession, RestoresToTheStateBeforeOrAfterTheSave) {
  if (!is_plain_device()) GTEST_SKIP() << "a process that uses a GPU does not fork";
  const auto model = placed_model(133);
  test::expect_kills_survived([&] { return CudaSession<bf16>(model, test::killed_options()); },
                              path(), 100);
}

// --- Drafts --------------------------------------------------------------------------------------

/// Each token has the greatest logit of a session that reads all before it, to the rounding of
/// chunks: within twice the bound either of two may be the greater.
template <class Reference>
void expect_likely(Reference& reference, std::span<const Token> written) {
  for (std::size_t i = 0; i < written.size(); ++i) {
    const std::vector<float> logits = copy(reference.logits());
    const double best = static_cast<double>(*std::ranges::max_element(logits));
    const double taken = static_cast<double>(logits[static_cast<std::size_t>(written[i])]);
    ASSERT_LE(best - taken, 2 * kRoundedBound * norm_of(logits)) << "token " << i;
    reference.accept(written.subspan(i, 1));
  }
}

// Greedy, by the device's choice and by the sampler's: verified drafts write what the model writes,
// to the rounding of chunks, and leave no trace of what was wrong.
void expect_drafts_follow(CachePolicy policy, PositionRule rule, std::int64_t nodes, int top_k,
                          bool branches, int head_dim = 64) {
  SCOPED_TRACE(std::string(to_string(policy)) + ", " + std::to_string(nodes) + " nodes");
  const auto model = make_model({.head_dim = head_dim}, 123);
  const auto placed = place_model<cuda, bf16>(model);
  SessionOptions options = transaction_options(policy, nodes);
  options.cache.window_size = std::max<std::int64_t>(nodes, 11);
  options.cache.position_rule = rule;
  options.sampler = {};
  options.sampler.temperature = top_k == 0 ? 0 : 1;  // the best of one either way
  options.sampler.top_k = std::max(top_k, 0);
  const std::vector<Token> prompt = some_tokens(30, 124);
  CudaSession<bf16> plain(placed, options);
  plain.accept(prompt);
  std::vector<Token> guesses;
  for (int i = 0; i < 150; ++i) guesses.push_back(plain.step().value());
  CudaSession<bf16> drafted(placed, options);
  drafted.accept(prompt);
  std::int64_t forwards = 0;
  const std::vector<Token> written =
      test::write_with_drafts(drafted, guesses, nodes, branches, kVocab, forwards);
  if (is_plain_device()) {  // elsewhere the texts may part, and guesses are wrong from there on
    EXPECT_EQ(written, guesses);
    EXPECT_LT(forwards, 90);
  }
  Session<bf16> reference(model, options);
  reference.accept(prompt);
  expect_likely(reference, written);
}

TEST(CudaSessionDraft, WritesWhatTheModelWrites) {
  SKIP_WITHOUT_DEVICE();
  for (const bool branches : {false, true}) {
    expect_drafts_follow(CachePolicy::kSinkWindow, PositionRule::kInCache, 9, 0, branches);
    expect_drafts_follow(CachePolicy::kWindow, PositionRule::kInText, 9, 1, branches);
    expect_drafts_follow(CachePolicy::kFull, PositionRule::kInCache, 40, 0, branches);
  }
  // Other kernels read chunks of this size on Hopper; more nodes than a tile, or a word, has.
  expect_drafts_follow(CachePolicy::kSinkWindow, PositionRule::kInCache, 70, 1, true, 128);
}

// Trees whose right nodes are the last of their siblings, so that rows move up: what follows is
// what a session writes that reads the text token by token, to the rounding of chunks. The trees
// lie across the sinks, at the beginning of a stream, and around the ring.
TEST(CudaSessionDraft, KeepsTheBranchThatWasRight) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 134);
  const auto placed = place_model<cuda, bf16>(model);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 20);
  options.cache.num_sink_tokens = 6;
  options.cache.window_size = 24;
  options.sampler = {.temperature = 0};
  for (const std::size_t length : {1, 3, 5, 40, 47, 90}) {
    CudaSession<bf16> session(placed, options);
    Session<bf16> reference(model, options);
    const std::vector<Token> prompt = some_tokens(length, 135);
    session.accept(prompt);
    reference.accept(prompt);
    std::size_t most = 0;
    for (int round = 0; round < 8; ++round) {
      const Token root = session.step().value();
      expect_likely(reference, std::span(&root, 1));
      CudaSession<bf16> plain = session.fork();
      DraftTree draft(20);
      std::int64_t right = draft.add(root, DraftTree::kNoNode);
      for (int depth = 0; depth < 4; ++depth) {
        // The right one is the last of its siblings; all of these have a child.
        const Token next = plain.step().value();
        const std::int64_t parent = right;
        for (const Token wrong :
             {(next + 1) % static_cast<Token>(kVocab), (next + 2) % static_cast<Token>(kVocab)})
          draft.add(wrong, parent);
        right = draft.add(next, parent);
        if (depth < 3) draft.add(next, right - 1);
      }
      const std::span<const Token> found = session.step(draft);
      const std::vector<Token> written(found.begin(), found.end());
      most = std::max(most, written.size());
      expect_likely(reference, std::span(written).first(written.size() - 1));
      // The last is written, not fed.
      EXPECT_EQ(session.cache().total(), reference.cache().total());
      expect_likely(reference, std::span(written).last(1));
      EXPECT_LE(relative_error(session.logits(), reference.logits()), kRoundedBound)
          << "after " << length << " tokens, round " << round;
    }
    EXPECT_GE(most, 4U) << "after " << length << " tokens";
  }
}

// The same nodes, but for the last one's place: a leaf that nothing else sees. All the others give
// the same bits, whichever kernel reads them.
TEST(CudaSessionDraft, ALeafAsideChangesNothing) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(136);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 12);
  options.cache.num_sink_tokens = 6;
  options.cache.window_size = 24;
  options.sampler = {.temperature = 0};
  for (const std::size_t length : {1, 3, 5, 40, 47, 90}) {
    CudaSession<bf16> session(model, options);
    session.accept(some_tokens(length, 137));
    for (int round = 0; round < 5; ++round) {
      const Token root = session.step().value();
      CudaSession<bf16> other = session.fork();
      CudaSession<bf16> plain = session.fork();
      DraftTree path(12);
      DraftTree tree(12);
      for (DraftTree* draft : {&path, &tree}) draft->add(root, DraftTree::kNoNode);
      while (path.size() < 8) {
        const Token next = plain.step().value();
        for (DraftTree* draft : {&path, &tree}) draft->add(next, draft->size() - 1);
      }
      const Token after = plain.step().value();
      Token wrong = 0;  // in both places
      while (wrong == path.token(1) || wrong == after) ++wrong;
      path.add(wrong, path.size() - 1);
      tree.add(wrong, 0);
      ASSERT_FALSE(tree.is_path());
      const std::span<const Token> expected = session.step(path);
      const std::span<const Token> found = other.step(tree);
      ASSERT_TRUE(std::ranges::equal(found, expected)) << length << " tokens, round " << round;
      expect_same_bits(other, session, "behind the draft");
    }
  }
}

// More rows than logits are formed of at once, all of them right: a guess that was not taken is
// replaced by what was, and the draft verified again.
TEST(CudaSessionDraft, OfManyRightGuesses) {
  SKIP_WITHOUT_DEVICE();
  constexpr std::int64_t kNodes = 40;
  const auto model = make_model({.head_dim = 64}, 131);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, kNodes);
  options.cache.window_size = kNodes;
  options.sampler = {.temperature = 0};
  CudaSession<bf16> session(model, options);
  const std::vector<Token> prompt = some_tokens(90, 132);
  session.accept(prompt);
  const Token root = session.step().value();
  const CheckpointId id = session.checkpoint();
  std::vector<Token> written;
  DraftTree draft(kNodes);
  for (int tries = 0; tries < 20 && std::ssize(written) < kNodes; ++tries) {
    session.rollback_to(id);
    CudaSession<bf16> plain = session.fork();
    plain.accept(written);
    draft.clear();
    draft.add(root, DraftTree::kNoNode);
    for (const Token token : written) draft.add(token, draft.size() - 1);
    while (draft.size() < kNodes) draft.add(plain.step().value(), draft.size() - 1);
    const std::span<const Token> found = session.step(draft);
    written.assign(found.begin(), found.end());
  }
  ASSERT_EQ(std::ssize(written), kNodes);
  EXPECT_EQ(session.cache().total(), 90 + kNodes);
  Session<bf16> reference(model, options);
  reference.accept(prompt);
  reference.accept({&root, 1});
  expect_likely(reference, written);
  // The last was written, not fed; the session feeds it.
  EXPECT_LE(relative_error(session.logits(), reference.logits()), kRoundedBound);
}

// What a draft took back is as if it had never been: the stream goes on as one that was not
// drafted, checkpoints hold, a snapshot too.
TEST(CudaSessionDraft, LeavesNoTrace) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(125);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 8);
  options.sampler = {.temperature = 0};
  CudaSession<bf16> session(model, options);
  session.accept(some_tokens(40, 126));
  const Token root = session.step().value();
  const CheckpointId id = session.checkpoint();
  CudaSession<bf16> plain = session.fork();
  const std::vector<float> logits = copy(plain.logits());
  DraftTree draft(8);
  draft.add(root, DraftTree::kNoNode);
  // Wrong from the first on: the least likely token.
  const auto least = std::ranges::min_element(logits) - logits.begin();
  for (int i = 0; i < 7; ++i) draft.add(static_cast<Token>(least), i);
  const std::span<const Token> written = session.step(draft);
  ASSERT_EQ(written.size(), 1U);
  EXPECT_EQ(session.result(), written[0]);
  EXPECT_EQ(session.position(), 42);
  EXPECT_EQ(session.cache().total(), 41);
  // The chunk's rounding is in one row of keys and values.
  const std::vector<Token> more = some_tokens(20, 127);
  plain.accept(written);
  EXPECT_LE(error_on(session, plain, more), kRoundedBound);
  session.rollback_to(id);
  EXPECT_EQ(copy(session.logits()), logits);
}

TEST(CudaSessionDraft, SamplesAsPlainDecoding) {
  if (!is_plain_device())
    GTEST_SKIP() << "a chunk's logits are rounded: another token may be drawn";
  const auto model = placed_model(128);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 9);
  options.sampler = {
      .temperature = 1, .repetition_penalty = 1.2, .repetition_window = 16, .seed = 3};
  const std::vector<Token> prompt = some_tokens(30, 129);
  CudaSession<bf16> plain(model, options);
  plain.accept(prompt);
  std::vector<Token> expected;
  for (int i = 0; i < 100; ++i) expected.push_back(plain.step().value());
  CudaSession<bf16> drafted(model, options);
  drafted.accept(prompt);
  std::int64_t forwards = 0;
  EXPECT_EQ(test::write_with_drafts(drafted, expected, 9, true, kVocab, forwards), expected);
  EXPECT_LT(forwards, 60);
}

TEST(CudaSessionDraft, RefusesBeforeAnythingChanges) {
  SKIP_WITHOUT_DEVICE();
  const auto model = placed_model(130);
  const auto make = [&] {
    return CudaSession<bf16>(model, transaction_options(CachePolicy::kSinkWindow, 4));
  };
  test::expect_bad_drafts_refused(make);
}

}  // namespace
