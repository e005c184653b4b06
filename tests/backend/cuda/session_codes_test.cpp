// SPDX-License-Identifier: MIT
/// Sessions on a GPU whose keys and values are codes of a byte, against the CPU's sessions of the
/// same type. Linked twice, as session_test.cpp.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/attention/draft_tree.hpp>
#include <sluice/backend/cuda/session.hpp>
#include <sluice/core/atomic_file.hpp>
#include <sluice/core/random.hpp>
#include <sluice/stream/backend_traits.hpp>
#include <sluice/stream/session.hpp>

#include "backend/cuda/random_decoder.hpp"
#include "backend/cuda/snapshot_folder.hpp"
#include "stream/session_transactions.hpp"

namespace {

using namespace sluice;
using namespace host_test;
using test::error_of;
using test::expect_same_bits;
using test::transaction_options;

static_assert(backend_traits<cuda>::kStores<std::int8_t> &&
              backend_traits<cuda>::kStores<fp8_e4m3>);
static_assert(!backend_traits<cuda>::kStores<q8_0> && !backend_traits<cuda>::kStores<float>);
// Weights are of 16 bits; so is what a duplex caches on a GPU.
static_assert(std::same_as<ModelOn<cuda, std::int8_t>, CudaModel<f16>>);
static_assert(!CudaElement<std::int8_t> && !CudaElement<fp8_e4m3>);

/// A model whose norms' weights are off by normal deviates of `error` of themselves.
std::shared_ptr<const Decoder> disturbed(const Decoder& model, double error, std::uint64_t seed) {
  Random random(seed);
  DecoderWeights weights = model.weights();
  const auto disturb = [&](std::vector<float>& norm) {
    for (float& x : norm)
      x = static_cast<float>(static_cast<double>(x) * (1 + error * random.normal()));
  };
  for (DecoderLayerWeights& layer : weights.layers) {
    disturb(layer.attention_norm);
    disturb(layer.feed_forward_norm);
  }
  disturb(weights.output_norm);
  return std::make_shared<const Decoder>(model.config(), std::move(weights));
}

/// What another arithmetic may do to logits that are formed over codes, where an entry between two
/// of them may fall to either, by 2^-7 of its row's largest (int8_t) or 2^-3 of itself (fp8_e4m3):
/// the largest relative error that the CPU makes itself on a text when the norms' weights, and so
/// what all products are given, are off by `error`, each of 16 times another way.
template <KvElement Element>
double code_error(const std::shared_ptr<const Decoder>& model, const SessionOptions& options,
                  std::span<const Token> text, double error) {
  std::vector<std::vector<float>> expected;
  double worst = 0;
  for (std::uint64_t seed = 0; seed <= 16; ++seed) {
    Session<Element> session(seed == 0 ? model : disturbed(*model, error, seed), options);
    for (std::size_t i = 0; i < text.size(); ++i) {
      session.accept(text.subspan(i, 1));
      if (seed == 0)
        expected.push_back(copy(session.logits()));
      else
        worst = std::max(worst, relative_error(session.logits(), expected[i]));
    }
  }
  return worst;
}
/// Of a GPU's steps: products and attention in float32, or nearly (2^-22), in another order.
template <KvElement Element>
double step_bound(const std::shared_ptr<const Decoder>& model, const SessionOptions& options,
                  std::span<const Token> text) {
  return code_error<Element>(model, options, text, 0x1p-20);
}
/// Of its chunks: inputs of 4 products a layer and of the last are rounded to f16, by 2^-12 at
/// most, and so are widened rows; and these move what is stored.
template <KvElement Element>
double chunk_bound(const std::shared_ptr<const Decoder>& model, const SessionOptions& options,
                   std::span<const Token> text) {
  return (6 * kLayers + 1) * 0x1p-12 + code_error<Element>(model, options, text, 0x1p-12);
}

template <KvElement Element>
void expect_the_same_text(const Setting& setting, PositionRule rule, std::uint64_t seed) {
  SCOPED_TRACE("head size " + std::to_string(setting.head_dim));
  const auto model = make_model(setting, seed);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 1);
  options.cache.num_sink_tokens = 4;
  options.cache.window_size = 40;  // 44 slots: five rounds of the ring
  options.cache.position_rule = rule;
  options.sampler = {.temperature = 0};
  Session<Element> expected(model, options);
  std::vector<Token> text = some_tokens(60, seed + 1);
  expected.accept(text);
  std::vector<std::vector<float>> logits;
  for (int i = 0; i < 200; ++i) {
    logits.push_back(copy(expected.logits()));
    text.push_back(expected.step().value());
  }
  const double bound = step_bound<Element>(model, options, text);
  SessionOn<cuda, Element> found(model, options);
  EXPECT_EQ(found.cache().bytes(),
            kLayers * kKvHeads * 44 * 2 * (setting.head_dim <= 64 ? 64 + sizeof(float) : 132));
  std::size_t fed = 60;
  found.accept(std::span(text).first(fed));
  int parted = 0;
  double worst = 0;
  for (std::size_t i = 0; i < logits.size(); ++i, ++fed) {
    const double error = relative_error(found.logits(), logits[i]);
    ASSERT_TRUE(std::isfinite(error)) << "step " << i;  // a maximum would pass NaN over
    worst = std::max(worst, error);
    if (found.step().value() == text[fed]) continue;
    // Within the bound either token may be the greater: the GPU goes on with the CPU's text.
    EXPECT_LT(margin_of(logits[i]), 2 * bound * norm_of(logits[i])) << "step " << i;
    ++parted;
    found.reset();
    found.accept(std::span(text).first(fed + 1));
  }
  EXPECT_LE(worst, bound);
  EXPECT_LE(parted, 5);
  std::printf("relative error of logits %.2e of %.2e, %d of 200 tokens within the bound\n", worst,
              bound, parted);
}

TEST(CudaSessionCodes, WritesTheCpusText) {
  SKIP_WITHOUT_DEVICE();
  expect_the_same_text<std::int8_t>({.head_dim = 64}, PositionRule::kInCache, 201);
  // Padded with zeros, which are codes of 0 and leave the scale as it is.
  expect_the_same_text<fp8_e4m3>({.head_dim = 16, .interleaved = true}, PositionRule::kInText, 202);
}

template <KvElement Element>
void expect_any_chunks(std::uint64_t seed) {
  const auto model = make_model({.head_dim = 64}, seed);
  const auto placed = place_model<cuda, Element>(model);
  const std::vector<Token> text = some_tokens(60, seed + 1);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 1);
  options.cache.num_sink_tokens = 4;
  options.cache.window_size = 30;
  Session<Element> expected(model, options);
  expected.accept(text);
  const double bound = chunk_bound<Element>(model, options, text);
  for (const std::int64_t chunk : {2, 8, 16, 30}) {
    options.cache.chunk_size = chunk;
    std::vector<float> bits;
    for (int again = 0; again < 2; ++again) {
      CudaSession<Element> session(placed, options);
      session.accept(text);
      EXPECT_LE(relative_error(session.logits(), expected.logits()), bound) << "chunk " << chunk;
      if (again == 1) {
        EXPECT_EQ(copy(session.logits()), bits) << "chunk " << chunk;
      }
      bits = copy(session.logits());
    }
  }
}

TEST(CudaSessionCodes, ReadsInAnyChunks) {
  SKIP_WITHOUT_DEVICE();
  expect_any_chunks<std::int8_t>(211);
  expect_any_chunks<fp8_e4m3>(213);
}

TEST(CudaSessionCodes, ReturnsBitForBitOnRandomOperations) {
  SKIP_WITHOUT_DEVICE();
  const auto model = place_model<cuda, std::int8_t>(make_model({.head_dim = 64}, 221));
  for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kFull})
    test::random_transactions(
        [&] { return CudaSession<std::int8_t>(model, transaction_options(policy, 4)); }, 44,
        std::string(to_string(policy)), 70);
}

TEST(CudaSessionCodes, CheckpointsHoldScalesAndForksAreAlike) {
  SKIP_WITHOUT_DEVICE();
  const auto model = place_model<cuda, fp8_e4m3>(make_model({.head_dim = 64}, 223));
  const SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 4);
  CudaSession<fp8_e4m3> session(model, options);
  session.accept(some_tokens(50, 224));
  const std::size_t rows = session.cache().bytes();
  EXPECT_GE(session.checkpoint_bytes(), rows);
  EXPECT_LE(session.checkpoint_bytes(), rows + kHidden * sizeof(float) + 4096);
  CudaSession<fp8_e4m3> child = session.fork();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(child.step(), session.step());
  expect_same_bits(child, session, "a fork");
}

class CudaSnapshotOfCodes : public SnapshotFolder {};

TEST_F(CudaSnapshotOfCodes, MovesBetweenBackends) {
  SKIP_WITHOUT_DEVICE();
  for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kFull})
    expect_moves<std::int8_t>({.head_dim = 64}, policy, step_bound<std::int8_t>);
  expect_moves<fp8_e4m3>({.head_dim = 40}, CachePolicy::kWindow, step_bound<fp8_e4m3>);
}

TEST_F(CudaSnapshotOfCodes, OfAnotherTypeIsRefused) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 235);
  const SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 4);
  CudaSession<std::int8_t> session(model, options);
  Session<fp8_e4m3> other(model, options);
  other.accept(some_tokens(30, 236));
  other.save(path("other"));
  const auto error = error_of([&] { session.restore(path("other")); });
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code(), ErrorCode::kFormat);
  EXPECT_TRUE(error->detail().field.starts_with("key type")) << error->what();
}

// A tree whose right nodes are the last of their siblings, so that rows and their scales move up.
TEST(CudaSessionCodes, DraftsKeepTheBranchThatWasRight) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 241);
  SessionOptions options = transaction_options(CachePolicy::kSinkWindow, 12);
  options.cache.window_size = 24;
  options.sampler = {.temperature = 0};
  CudaSession<std::int8_t> session(model, options);
  std::vector<Token> text = some_tokens(40, 242);
  session.accept(text);
  for (int round = 0; round < 8; ++round) {
    const Token root = session.step().value();
    text.push_back(root);
    CudaSession<std::int8_t> plain = session.fork();
    DraftTree draft(12);
    std::int64_t right = draft.add(root, DraftTree::kNoNode);
    for (int depth = 0; depth < 4; ++depth) {
      const Token next = plain.step().value();
      draft.add((next + 1) % static_cast<Token>(kVocab), right);
      right = draft.add(next, right);
    }
    const std::span<const Token> written = session.step(draft);
    text.insert(text.end(), written.begin(), written.end());
    SessionOptions of_steps = options;
    of_steps.cache.chunk_size = 1;
    Session<std::int8_t> reference(model, of_steps);
    reference.accept(text);
    EXPECT_LE(relative_error(session.logits(), reference.logits()),
              chunk_bound<std::int8_t>(model, of_steps, text))
        << "round " << round;
  }
}

}  // namespace
