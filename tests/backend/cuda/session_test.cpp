// SPDX-License-Identifier: MIT
/// A session on the GPU against the same program with the tag cpu. Linked twice: with the device's
/// half, where everything that needs a GPU is skipped without one, and with
/// plain_device_session.cpp in its place, which tests the host's half anywhere.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <sluice/backend/cuda/quantised_layout.hpp>
#include <sluice/backend/cuda/session.hpp>
#include <sluice/core/random.hpp>
#include <sluice/stream/backend_traits.hpp>
#include <sluice/stream/likelihood.hpp>

#include "backend/cuda/random_decoder.hpp"

namespace {

using namespace sluice;
using namespace host_test;

SessionOptions options_of(std::int64_t sinks, std::int64_t window, std::int64_t chunk) {
  SessionOptions options;
  options.cache.num_sink_tokens = sinks;
  options.cache.window_size = window;
  options.cache.chunk_size = chunk;
  return options;
}

/// The program that both backends run: reads a prompt, writes, reports the logits of every step.
template <Backend Tag, KvElement Element>
class Program {
 public:
  Program(const std::shared_ptr<const Decoder>& model, const SessionOptions& options)
      : session_(place_model<Tag, Element>(model), options) {}

  SessionOn<Tag, Element>& session() { return session_; }
  std::vector<float> logits() { return copy(session_.logits()); }
  Token write() { return session_.step().value(); }

 private:
  SessionOn<Tag, Element> session_;
};

template <KvElement Element>
void expect_the_same_text(const Setting& setting, PositionRule rule, std::uint64_t seed) {
  SCOPED_TRACE("head size " + std::to_string(setting.head_dim) + ", " +
               std::string(to_string(rule)));
  const auto model = make_model(setting, seed);
  SessionOptions options = options_of(4, 40, 1);  // 44 slots: five rounds of the ring
  options.cache.position_rule = rule;
  Program<cpu, Element> expected(model, options);
  Program<cuda, Element> found(model, options);
  std::vector<Token> text = some_tokens(60, seed + 1);
  expected.session().accept(text);
  found.session().accept(text);
  int parted = 0;
  double worst = 0;
  for (int i = 0; i < 200; ++i) {
    const std::vector<float> logits = expected.logits();
    const double error = relative_error(found.logits(), logits);
    ASSERT_TRUE(std::isfinite(error)) << "step " << i;  // a maximum would pass NaN over
    worst = std::max(worst, error);
    const Token token = expected.write();
    text.push_back(token);
    if (found.write() == token) continue;
    // Within the bound either token may be the greater: the GPU goes on with the CPU's text.
    EXPECT_LT(margin_of(logits), 2 * kExactBound * norm_of(logits)) << "step " << i;
    ++parted;
    found.session().reset();
    found.session().accept(text);
  }
  EXPECT_LE(worst, kExactBound);
  EXPECT_LE(parted, 5);
  EXPECT_EQ(expected.session().position(), found.session().position());
  std::printf("relative error of logits %.2e, %d of 200 tokens within the bound\n", worst, parted);
}

TEST(CudaSession, WritesTheCpusText) {
  SKIP_WITHOUT_DEVICE();
  expect_the_same_text<bf16>({.head_dim = 64}, PositionRule::kInCache, 7);
  expect_the_same_text<bf16>({.head_dim = 128}, PositionRule::kInCache, 9);
  // Padded with zeros.
  expect_the_same_text<f16>({.head_dim = 16, .interleaved = true}, PositionRule::kInText, 8);
}

constexpr Setting kQuantised{.head_dim = 64,
                             .type = ElementType::kQ4_0,
                             .value_type = ElementType::kQ8_0,
                             .output_type = ElementType::kQ4_1};

// No weight is rounded: the bound is the one of bf16 weights.
TEST(CudaSession, WritesTheCpusTextWithQuantisedWeights) {
  SKIP_WITHOUT_DEVICE();
  for (const ElementType type : {ElementType::kQ8_0, ElementType::kQ4_1})
    expect_the_same_text<bf16>(
        {.head_dim = 64, .type = type, .value_type = type, .output_type = type},
        PositionRule::kInCache, 17);
  // Two products for queries, keys and values; heads that are padded, whose matrices are widened.
  expect_the_same_text<f16>(kQuantised, PositionRule::kInText, 18);
  expect_the_same_text<f16>({.head_dim = 32, .type = ElementType::kQ8_0}, PositionRule::kInCache,
                            19);
}

TEST(CudaSession, QuantisedWeightsTakeTheFilesBytes) {
  SKIP_WITHOUT_DEVICE();
  const auto bytes = [](const Setting& setting, CudaWeights weights) {
    return CudaModel<bf16>(make_model(setting, 27), kCurrentDevice, weights).bytes();
  };
  const auto packed = [](ElementType type, std::int64_t rows, std::int64_t cols) {
    return static_cast<std::size_t>(quantised_bytes(type, rows, cols));
  };
  const std::size_t wide = 64 * kQoHeads;
  const std::size_t narrow = 64 * kKvHeads;
  const std::size_t weights_of_layer =
      kHidden * (2 * wide + 2 * narrow + 3 * static_cast<std::size_t>(kIntermediate));
  const std::size_t plain = bytes(kQuantised, CudaWeights::kElement);
  EXPECT_EQ(plain, bytes({.head_dim = 64}, CudaWeights::kStored));
  using enum ElementType;
  const std::size_t saved =
      2 * (kVocab * kHidden + kLayers * weights_of_layer) - packed(kQ4_1, kVocab, kHidden) -
      kLayers * (packed(kQ4_0, 64 * (kQoHeads + kKvHeads), kHidden) +
                 packed(kQ8_0, 64 * kKvHeads, kHidden) + packed(kQ4_0, kHidden, 64 * kQoHeads) +
                 packed(kQ4_0, 2 * kIntermediate, kHidden) + packed(kQ4_0, kHidden, kIntermediate));
  EXPECT_EQ(bytes(kQuantised, CudaWeights::kStored), plain - saved);
  // A tied matrix is there twice: in 16 bits, for the lookup, and as it is stored.
  Setting tied = kQuantised;
  tied.tied = true;
  EXPECT_EQ(bytes(tied, CudaWeights::kStored), plain - saved);
  EXPECT_EQ(bytes(tied, CudaWeights::kElement), plain - 2 * kVocab * kHidden);
}

// Looked up rows are rounded to bf16, by half of 2^-8; widened weights of every product likewise.
TEST(CudaSession, TiedAndWidenedWeights) {
  SKIP_WITHOUT_DEVICE();
  Setting setting = kQuantised;
  setting.tied = true;
  const auto model = make_model(setting, 28);
  const std::vector<Token> text = some_tokens(50, 29);
  Session<bf16> expected(model, options_of(4, 40, 1));
  expected.accept(text);
  for (const CudaWeights weights : {CudaWeights::kStored, CudaWeights::kElement})
    for (const std::int64_t chunk : {1, 16}) {
      const auto placed = std::make_shared<const CudaModel<bf16>>(model, kCurrentDevice, weights);
      EXPECT_EQ(placed->weights(), weights);
      CudaSession<bf16> found(placed, options_of(4, 40, chunk));
      found.accept(text);
      EXPECT_LE(relative_error(found.logits(), expected.logits()), 2 * kRoundedBound);
    }
}

void expect_any_chunks(const Setting& setting, std::span<const std::int64_t> chunks) {
  SCOPED_TRACE("head size " + std::to_string(setting.head_dim));
  const auto model = make_model(setting, 11);
  const auto placed = place_model<cuda, bf16>(model);
  const std::vector<Token> text = some_tokens(60, 12);
  Session<bf16> expected(model, options_of(4, 30, 1));
  expected.accept(text);
  for (const std::int64_t chunk : chunks) {
    const double bound = chunk == 1 ? kExactBound : kRoundedBound;
    std::vector<float> bits;
    for (int again = 0; again < 2; ++again) {
      CudaSession<bf16> session(placed, options_of(4, 30, chunk));
      session.accept(text);
      EXPECT_LE(relative_error(session.logits(), expected.logits()), bound) << "chunk " << chunk;
      if (again == 1) {
        EXPECT_EQ(copy(session.logits()), bits) << "chunk " << chunk;
      }
      bits = copy(session.logits());
      session.reset();
      session.accept(text);
      EXPECT_EQ(copy(session.logits()), bits) << "after a reset, chunk " << chunk;
    }
    // Cut by the caller, too.
    CudaSession<bf16> session(placed, options_of(4, 30, chunk));
    const std::span<const Token> tokens(text);
    session.accept(tokens.first(1));
    session.accept(tokens.subspan(1, 40));
    session.accept(tokens.subspan(41));
    EXPECT_LE(relative_error(session.logits(), expected.logits()), bound) << "chunk " << chunk;
    if (chunk == 1) {
      EXPECT_EQ(copy(session.logits()), bits);
    }
  }
}

TEST(CudaSession, ReadsInAnyChunks) {
  SKIP_WITHOUT_DEVICE();
  expect_any_chunks({.head_dim = 64}, std::array<std::int64_t, 4>{1, 2, 8, 16});
  expect_any_chunks({.head_dim = 128}, std::array<std::int64_t, 1>{7});  // by others on Hopper
  expect_any_chunks({.head_dim = 40}, std::array<std::int64_t, 1>{30});  // padded
  expect_any_chunks(kQuantised, std::array<std::int64_t, 9>{1, 2, 3, 4, 5, 6, 7, 8, 16});
}

template <Backend Tag>
std::vector<double> scores_of(const std::shared_ptr<const Decoder>& model, std::int64_t chunk,
                              std::span<const Token> text) {
  SessionOn<Tag, bf16> session(place_model<Tag, bf16>(model), options_of(4, 40, chunk));
  std::vector<float> memory(static_cast<std::size_t>(8 * kVocab));
  const MatrixView<float> scratch(memory.data(), 8, kVocab);
  std::vector<double> scores(text.size(), -1);
  std::size_t begin = 0;
  for (const std::size_t length : {std::size_t{90}, std::size_t{1}, text.size() - 91}) {
    session.accept_scored(text.subspan(begin, length), scratch,
                          [&](std::size_t i, double nll) { scores.at(begin + i) = nll; });
    begin += length;
  }
  return scores;
}

TEST(CudaSession, ScoresTheCpusPerplexity) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 21);
  const std::vector<Token> text = some_tokens(180, 22);
  const std::vector<double> expected = scores_of<cpu>(model, 1, text);
  const double logits_norm = std::sqrt(static_cast<double>(kVocab));  // within a few percent
  for (const std::int64_t chunk : {1, 16}) {
    const double bound = chunk == 1 ? kExactBound : kRoundedBound;
    const std::vector<double> found = scores_of<cuda>(model, chunk, text);
    EXPECT_EQ(found[0], -1);  // nothing predicts it
    double difference = 0;
    for (std::size_t i = 1; i < text.size(); ++i) {
      // A target and the sum of all: each moves by no more than all logits together.
      EXPECT_NEAR(found[i], expected[i], 2 * bound * 1.2 * logits_norm) << "token " << i;
      difference += found[i] - expected[i];
    }
    // Of the mean: what a logit's standard deviation is moved by.
    EXPECT_LE(std::abs(difference) / static_cast<double>(text.size() - 1), bound)
        << "chunk " << chunk;
  }
}

TEST(CudaSession, ScoresWithTheLogitsThatItShows) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 23);
  CudaSession<bf16> session(model, options_of(4, 40, 16));
  const std::vector<Token> text = some_tokens(40, 24);
  session.accept(text);
  std::vector<float> memory(static_cast<std::size_t>(kVocab));
  const MatrixView<float> scratch(memory.data(), 1, kVocab);
  for (const Token token : some_tokens(20, 25)) {
    const double expected = negative_log_likelihood(session.logits(), token);
    // A float32 sum of 128 terms, and a float32 result.
    session.accept_scored({&token, 1}, scratch,
                          [&](std::size_t, double nll) { EXPECT_NEAR(nll, expected, 2e-5); });
  }
}

TEST(CudaSession, DrawsWithTheSameSampler) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 31);
  SessionOptions options = options_of(4, 40, 16);
  options.sampler = {.temperature = 0.8,
                     .top_k = 30,
                     .top_p = 0.95,
                     .repetition_penalty = 1.1,
                     .repetition_window = 20,
                     .seed = 5};
  CudaSession<bf16> session(model, options);
  Sampler sampler(options.sampler, kVocab);
  const std::vector<Token> text = some_tokens(50, 32);
  session.accept(text);
  for (const Token token : text) sampler.accept(token);
  for (int i = 0; i < 100; ++i) {
    const Token expected = sampler.sample(copy(session.logits()));
    sampler.accept(expected);
    ASSERT_EQ(session.step(), expected) << "token " << i;
    ASSERT_EQ(session.result(), expected);
  }
  const StreamMetrics::Report report = session.metrics().report();
  EXPECT_EQ(report.tokens_read, 50);
  EXPECT_EQ(report.tokens_written, 100);
  EXPECT_EQ(session.position(), 150);
}

TEST(CudaSession, UpdateKeepsWhatIsThere) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 41);
  const auto placed = place_model<cuda, bf16>(model);
  SessionOptions options = options_of(4, 40, 8);  // 51 slots
  options.history = 400;
  CudaSession<bf16> session(placed, options);
  const auto logits_of = [&](std::span<const Token> text) {
    CudaSession<bf16> fresh(placed, options);
    fresh.accept(text);
    return copy(fresh.logits());
  };
  std::vector<Token> text = some_tokens(48, 42);
  session.accept(text);
  static_cast<void>(session.step());  // pending: is forgotten
  std::vector<Token> other = text;
  other[30] = (other[30] + 1) % kVocab;
  UpdateResult result = session.update(other);
  EXPECT_EQ(result.common_prefix, 30);
  EXPECT_EQ(result.kept, 30);
  EXPECT_EQ(result.computed, 18);
  EXPECT_LE(relative_error(session.logits(), logits_of(other)), kRoundedBound);
  // The ring has gone round: 8 tokens back nothing that is seen is gone, 9 back something is.
  const std::vector<Token> more = some_tokens(40, 43);
  other.insert(other.end(), more.begin(), more.end());
  session.accept(more);
  for (const int back : {8, 9}) {
    std::vector<Token> changed = other;
    Token& token = changed[changed.size() - static_cast<std::size_t>(back)];
    token = (token + 1) % kVocab;
    result = session.update(changed);
    EXPECT_EQ(result.kept, back == 8 ? static_cast<std::int64_t>(other.size()) - 8 : 0);
    EXPECT_LE(relative_error(session.logits(), logits_of(changed)), kRoundedBound);
    result = session.update(other);
    EXPECT_LE(relative_error(session.logits(), logits_of(other)), kRoundedBound);
  }
}

// What a longer text wrote over stays gone after that text was taken back.
TEST(CudaSession, UpdateRemembersWhatWasWrittenOver) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 45);
  SessionOptions options = options_of(4, 40, 8);  // 51 slots, a ring of 47
  options.history = 400;
  Session<bf16> expected(model, options);
  CudaSession<bf16> found(model, options);
  const auto change = [](std::vector<Token> text, std::size_t at) {
    text[at] = (text[at] + 1) % kVocab;
    return text;
  };
  const std::vector<Token> text = some_tokens(55, 46);  // token 54 takes the place of token 7
  const std::vector<Token> shorter = change({text.begin(), text.begin() + 51}, 50);
  for (const std::vector<Token>& next : {text, shorter, change(shorter, 10)}) {
    const std::int64_t kept = expected.update(next).kept;
    EXPECT_EQ(found.update(next).kept, kept) << next.size();
    EXPECT_LE(relative_error(found.logits(), expected.logits()), kRoundedBound) << next.size();
  }
}

TEST(CudaSession, AFullCacheEnds) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 51);
  SessionOptions options;
  options.cache.policy = CachePolicy::kFull;
  options.cache.capacity = 30;
  options.cache.chunk_size = 8;
  Session<bf16> expected(model, options);
  CudaSession<bf16> found(model, options);
  EXPECT_FALSE(found.is_ready());
  EXPECT_EQ(found.step(), std::nullopt);
  const std::vector<Token> text = some_tokens(25, 52);
  expected.accept(text);
  found.accept(text);
  int written = 0;
  while (expected.is_ready()) {
    ASSERT_TRUE(found.is_ready());
    static_cast<void>(expected.step());
    static_cast<void>(found.step());
    ++written;
  }
  EXPECT_EQ(written, 6);
  EXPECT_EQ(found.step(), std::nullopt);
  try {
    found.accept(text);
    FAIL() << "more than fits";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCapacity) << error.what();
  }
  try {
    found.accept(std::vector<Token>{1, kVocab});
    FAIL() << "a token outside the vocabulary";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kShape) << error.what();
    EXPECT_EQ(error.detail().field, "tokens[1]");
  }
}

/// The field that a session of these options names, or "none".
std::string refused_field(const std::shared_ptr<const Decoder>& model,
                          const SessionOptions& options, ErrorCode code) {
  try {
    CudaSession<bf16> session(model, options);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_FALSE(error.detail().expected.empty());
    EXPECT_FALSE(error.detail().found.empty());
    return error.detail().field;
  }
  return "none";
}

// These fail before a device is looked for.
TEST(CudaSession, SaysWhatItDoesNotDo) {
  const auto model = make_model({.head_dim = 64}, 71);
  const auto refused = [&](auto&& change) {
    SessionOptions options = options_of(4, 40, 8);
    change(options);
    return refused_field(model, options, ErrorCode::kUnsupported);
  };
  EXPECT_EQ(refused([](auto& o) { o.cache.policy = CachePolicy::kRecompute; }), "cache.policy");
  EXPECT_EQ(refused([](auto& o) { o.cache.policy = CachePolicy::kPerHead; }), "cache.policy");
  EXPECT_EQ(refused([](auto& o) { o.cache.key_form = KeyForm::kRaw; }), "cache.key_form");
  EXPECT_EQ(refused([](auto& o) { o.cache.lead = 3; }), "cache.lead");
  EXPECT_EQ(refused([](auto& o) { o.activations = Activations::kInt8; }), "activations");
  SessionOptions options = options_of(4, 40, 8);
  options.sampler.temperature = -1;
  EXPECT_EQ(refused_field(model, options, ErrorCode::kConfig), "temperature");
  options = options_of(4, 40, 8);
  options.checkpoint_every = 5;
  EXPECT_EQ(refused_field(model, options, ErrorCode::kConfig), "checkpoints");
  options = options_of(4, 40, 8);
  EXPECT_EQ(refused_field(make_model({.head_dim = 64, .biased = true}, 1), options,
                          ErrorCode::kUnsupported),
            "biases of attention");
  EXPECT_EQ(refused_field(make_model({.head_dim = 256}, 1), options, ErrorCode::kUnsupported),
            "head_dim");
  EXPECT_EQ(refused_field(make_model({.head_dim = 64, .trained_window = 20}, 1), options,
                          ErrorCode::kUnsupported),
            "cache.window_size");
}

/// The field of the Error(kDevice) that placing throws; empty if it throws none.
template <Backend Tag>
std::string refused_place(const std::shared_ptr<const Decoder>& model, int device) {
  try {
    static_cast<void>(place_model<Tag, bf16>(model, device));
    return "";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kDevice) << error.what();
    return error.detail().field;
  }
}

TEST(CudaSession, RunsWhereItsModelLies) {
  SKIP_WITHOUT_DEVICE();
  const auto model = make_model({.head_dim = 64}, 91);
  EXPECT_EQ((place_model<cuda, bf16>(model)->device_index()), 0);
  const std::vector<Token> prompt = some_tokens(20, 92);
  // Both at once, and in turns: on the devices that there are.
  std::vector<CudaSession<bf16>> sessions;
  for (int device = 0; device < 2 && has_device(device); ++device) {
    const auto placed = place_model<cuda, bf16>(model, device);
    EXPECT_EQ(placed->device_index(), device);
    sessions.emplace_back(placed, options_of(4, 40, 8)).accept(prompt);
  }
  for (int i = 0; i < 40; ++i) {
    const std::vector<float> logits = copy(sessions.front().logits());
    const Token token = sessions.front().step().value();
    for (std::size_t s = 1; s < sessions.size(); ++s) {
      EXPECT_EQ(copy(sessions[s].logits()), logits) << "step " << i;
      EXPECT_EQ(sessions[s].step().value(), token) << "step " << i;
    }
  }
  for (const int none : {-2, 1000}) {
    EXPECT_EQ(refused_place<cuda>(model, none), "device");
    EXPECT_EQ(refused_place<cpu>(model, none), "device");
  }
  EXPECT_EQ(refused_place<cpu>(model, 1), "device");
  EXPECT_EQ((place_model<cpu, bf16>(model, 0)), model);
}

TEST(CudaSession, SaysThatThereIsNoDevice) {
  if (has_device(kCurrentDevice)) GTEST_SKIP() << "there is one";
  EXPECT_EQ(
      refused_field(make_model({.head_dim = 64}, 81), options_of(4, 40, 8), ErrorCode::kDevice),
      "device");
}

}  // namespace
