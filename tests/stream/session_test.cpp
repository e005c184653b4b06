// SPDX-License-Identifier: MIT
#include "sluice/stream/session.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/atomic_file.hpp"
#include "sluice/core/random.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

std::shared_ptr<const Decoder> model(const std::string& name = "llama3") {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/models/" + name;
  return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
}

std::vector<Token> random_tokens(std::size_t count, std::uint64_t seed = 3) {
  Random random(seed);
  std::vector<Token> tokens(count);
  for (Token& token : tokens) token = static_cast<Token>(random.below(128));
  return tokens;
}

SessionOptions sink_window(std::int64_t sinks, std::int64_t window, std::int64_t chunk) {
  SessionOptions options;
  options.cache.num_sink_tokens = sinks;
  options.cache.window_size = window;
  options.cache.chunk_size = chunk;
  options.sampler.temperature = 1;
  options.sampler.seed = 11;
  return options;
}

std::vector<Token> write(Session<float>& session, int count) {
  std::vector<Token> written;
  for (int i = 0; i < count; ++i) written.push_back(session.step().value());
  return written;
}

// Every chunking of a stream far longer than the cache gives the logits of token-by-token reading.
// float32 sums over 32 channels and at most 13 keys in 3 layers, logits of about 10: 1e-4 is 10
// times what is seen, and an evicted or repeated key changes logits by more than 0.1.
TEST(Session, AnyChunkingEqualsTokenByToken) {
  const auto decoder = model();
  const std::vector<Token> tokens = random_tokens(150);
  Session<float> reference(decoder, sink_window(2, 11, 1));
  reference.accept(tokens);
  const std::vector<float> expected(reference.logits().begin(), reference.logits().end());
  Random random(5);
  for (const std::int64_t chunk : {2, 3, 7, 11}) {
    for (int trial = 0; trial < 5; ++trial) {
      Session<float> session(decoder, sink_window(2, 11, chunk));
      for (std::size_t fed = 0; fed < tokens.size();) {
        const std::size_t count = std::min<std::size_t>(1 + random.below(40), tokens.size() - fed);
        session.accept(std::span(tokens).subspan(fed, count));
        fed += count;
      }
      for (std::size_t i = 0; i < expected.size(); ++i)
        ASSERT_NEAR(session.logits()[i], expected[i], 1e-4F) << "chunk " << chunk;
    }
  }
}

TEST(Session, ScoresEveryTokenWithTheLogitsBeforeIt) {
  const auto decoder = model();
  const std::vector<Token> tokens = random_tokens(40);
  Session<float> one(decoder, sink_window(2, 11, 1));
  std::vector<double> expected;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) {
      double sum = 0;
      for (const float logit : one.logits()) sum += std::exp(static_cast<double>(logit));
      expected.push_back(std::log(sum) -
                         static_cast<double>(one.logits()[static_cast<std::size_t>(tokens[i])]));
    }
    one.accept(std::span(tokens).subspan(i, 1));
  }
  for (const std::int64_t rows : {1, 3, 16}) {
    Session<float> session(decoder, sink_window(2, 11, 11));
    std::vector<float> scratch(static_cast<std::size_t>(rows * 128));
    std::vector<double> found(tokens.size(), -1);
    session.accept_scored(tokens, {scratch.data(), rows, 128},
                          [&](std::size_t i, double nll) { found[i] = nll; });
    EXPECT_EQ(found[0], -1);  // nothing predicts the first token
    for (std::size_t i = 1; i < tokens.size(); ++i)
      EXPECT_NEAR(found[i], expected[i - 1], 1e-4) << i;
  }
}

TEST(Session, RecomputeEqualsAFreshReadingOfTheWindow) {
  const auto decoder = model();
  const std::vector<Token> tokens = random_tokens(60);
  SessionOptions options = sink_window(0, 8, 0);
  options.cache.policy = CachePolicy::kRecompute;
  Session<float> session(decoder, options);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    session.accept(std::span(tokens).subspan(i, 1));
    const std::size_t first = i < 8 ? 0 : i - 7;
    SessionOptions fresh_options;
    fresh_options.cache.policy = CachePolicy::kFull;
    fresh_options.cache.capacity = 8;
    Session<float> fresh(decoder, fresh_options);
    fresh.accept(std::span(tokens).subspan(first, i + 1 - first));
    ASSERT_TRUE(
        std::equal(session.logits().begin(), session.logits().end(), fresh.logits().begin()))
        << "token " << i;
  }
}

TEST(Session, StepFeedsWhatItWrote) {
  const auto decoder = model();
  SessionOptions options = sink_window(2, 11, 4);
  options.sampler.temperature = 0;
  Session<float> writer(decoder, options);
  const std::vector<Token> prompt = random_tokens(9);
  writer.accept(prompt);
  std::vector<Token> stream = prompt;
  for (int i = 0; i < 40; ++i) {
    Session<float> reader(decoder, options);
    reader.accept(stream);
    const auto logits = reader.logits();
    const Token token = writer.step().value();
    EXPECT_EQ(token, std::max_element(logits.begin(), logits.end()) - logits.begin());
    EXPECT_EQ(writer.result(), token);
    stream.push_back(token);
    EXPECT_EQ(writer.position(), static_cast<std::int64_t>(stream.size()));
  }
}

TEST(Session, EveryThreadCountGivesTheSameBits) {
  const auto decoder = model();
  std::vector<std::vector<float>> logits;
  for (const int threads : {1, 2, 3}) {
    SessionOptions options = sink_window(2, 40, 16);
    options.num_threads = threads;
    Session<float> session(decoder, options);
    session.accept(random_tokens(100));
    write(session, 20);
    logits.emplace_back(session.logits().begin(), session.logits().end());
  }
  EXPECT_EQ(logits[0], logits[1]);
  EXPECT_EQ(logits[0], logits[2]);
}

// The model with its matrices stored as Q8_0.
std::shared_ptr<const Decoder> quantised_model() {
  const auto plain = model();
  DecoderWeights weights = plain->weights();
  auto stored = std::make_shared<std::vector<std::vector<unsigned char>>>();
  const auto quantise_matrix = [&](WeightMatrix& matrix) {
    const std::int64_t count = matrix.rows * matrix.cols;
    std::vector<float> values(static_cast<std::size_t>(count));
    dequantise(matrix.type, matrix.data, count, values.data());
    stored->emplace_back(static_cast<std::size_t>(storage_bytes(ElementType::kQ8_0, count)));
    quantise(ElementType::kQ8_0, values.data(), count, stored->back().data());
    matrix = {ElementType::kQ8_0, stored->back().data(), matrix.rows, matrix.cols};
  };
  quantise_matrix(weights.embedding);
  quantise_matrix(weights.output);
  for (DecoderLayerWeights& layer : weights.layers)
    for (WeightMatrix* matrix : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate,
                                 &layer.up, &layer.down})
      quantise_matrix(*matrix);
  weights.storage = stored;
  return std::make_shared<const Decoder>(plain->config(), std::move(weights));
}

// Each of the model's products is off by about half a percent; its logits have to be another's, and
// near: 4 percent are seen, and a level dropped or a scale of another block would give far more.
TEST(Session, RoundedActivationsAreNearAndTheSameForEveryThreadCount) {
  const auto decoder = quantised_model();
  const std::vector<Token> tokens = random_tokens(60);
  SessionOptions options = sink_window(2, 24, 13);
  Session<float> exact(decoder, options);
  exact.accept(tokens);
  options.activations = Activations::kInt8;
  Session<float> rounded(decoder, options);
  rounded.accept(tokens);
  double error = 0;
  double scale = 0;
  for (std::size_t i = 0; i < exact.logits().size(); ++i) {
    const double difference =
        static_cast<double>(rounded.logits()[i]) - static_cast<double>(exact.logits()[i]);
    error += difference * difference;
    scale += static_cast<double>(exact.logits()[i]) * static_cast<double>(exact.logits()[i]);
  }
  EXPECT_GT(error, 0.0);
  EXPECT_LE(std::sqrt(error / scale), 0.1);
  RecordProperty("relative_error", std::to_string(std::sqrt(error / scale)));
  for (const int threads : {2, 3}) {
    options.num_threads = threads;
    Session<float> session(decoder, options);
    session.accept(tokens);
    EXPECT_TRUE(std::ranges::equal(session.logits(), rounded.logits())) << threads << " threads";
  }
}

TEST(Session, TwoSessionsOfOneModelDoNotMeet) {
  const auto decoder = model();
  Session<float> alone(decoder, sink_window(2, 11, 4));
  alone.accept(random_tokens(30, 1));
  const std::vector<Token> expected = write(alone, 30);
  Session<float> a(decoder, sink_window(2, 11, 4));
  Session<float> b(decoder, sink_window(2, 11, 4));
  a.accept(random_tokens(30, 1));
  b.accept(random_tokens(30, 2));
  std::vector<Token> written;
  for (int i = 0; i < 30; ++i) {
    written.push_back(a.step().value());
    b.step();
  }
  EXPECT_EQ(written, expected);
}

TEST(Session, ResetStartsANewStream) {
  const auto decoder = model();
  Session<float> session(decoder, sink_window(2, 11, 4));
  session.accept(random_tokens(50));
  const std::vector<Token> first = write(session, 25);
  session.reset();
  EXPECT_FALSE(session.is_ready());
  EXPECT_FALSE(session.step().has_value());
  EXPECT_EQ(session.position(), 0);
  session.accept(random_tokens(50));
  EXPECT_EQ(write(session, 25), first);
}

TEST(Session, AFullCacheRefusesBeforeReadingAndStopsWriting) {
  const auto decoder = model();
  SessionOptions options;
  options.cache.policy = CachePolicy::kFull;
  options.cache.capacity = 20;
  Session<float> session(decoder, options);
  session.accept(random_tokens(15));
  const std::vector<float> before(session.logits().begin(), session.logits().end());
  try {
    session.accept(random_tokens(6));
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCapacity);
    EXPECT_EQ(error.detail().expected, "at most 5");
    EXPECT_EQ(error.detail().found, "6");
  }
  EXPECT_TRUE(std::equal(before.begin(), before.end(), session.logits().begin()));
  // 15 read and 5 fed fill the cache; the sixth token can still be written, not fed.
  for (int i = 0; i < 6; ++i) EXPECT_TRUE(session.step().has_value()) << i;
  EXPECT_FALSE(session.is_ready());
  EXPECT_FALSE(session.step().has_value());
}

TEST(Session, RefusesTokensOutsideTheVocabularyBeforeReadingAny) {
  Session<float> session(model(), sink_window(2, 11, 4));
  for (const Token bad : {Token{-1}, Token{128}}) {
    const std::vector<Token> tokens{1, 2, bad};
    try {
      session.accept(tokens);
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kShape);
      EXPECT_EQ(error.detail().field, "tokens[2]");
      EXPECT_EQ(error.detail().expected, "0 to 127");
      EXPECT_EQ(error.detail().found, std::to_string(bad));
    }
    EXPECT_EQ(session.position(), 0);
    EXPECT_FALSE(session.is_ready());
  }
}

TEST(Session, RefusesOptionsThatDoNotFit) {
  const auto decoder = model();
  const auto field_of = [&](const SessionOptions& options) -> std::string {
    try {
      Session<float> session(decoder, options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kConfig);
      EXPECT_FALSE(error.detail().expected.empty());
      EXPECT_FALSE(error.detail().found.empty());
      return error.detail().field;
    }
    return "none";
  };
  EXPECT_EQ(field_of(sink_window(-1, 8, 4)), "num_sink_tokens");
  EXPECT_EQ(field_of(sink_window(2, 0, 4)), "window_size");
  EXPECT_EQ(field_of(sink_window(2, 8, 9)), "max_chunk");  // a window smaller than a chunk
  EXPECT_EQ(field_of(sink_window(2, 8, -1)), "max_chunk");
  SessionOptions threads = sink_window(2, 8, 4);
  threads.num_threads = 0;
  EXPECT_EQ(field_of(threads), "num_threads");
  SessionOptions full;
  full.cache.policy = CachePolicy::kFull;
  full.cache.capacity = 0;
  EXPECT_EQ(field_of(full), "capacity");
  SessionOptions sampling = sink_window(2, 8, 4);
  sampling.sampler.top_p = 2;
  EXPECT_EQ(field_of(sampling), "top_p");
}

class Snapshot : public testing::Test {
 protected:
  void SetUp() override {
    path_ =
        (std::filesystem::temp_directory_path() /
         ("sluice_snapshot_" + std::to_string(::testing::UnitTest::GetInstance()->random_seed()) +
          "_" + ::testing::UnitTest::GetInstance()->current_test_info()->name()))
            .string();
  }
  void TearDown() override { std::filesystem::remove(path_); }
  std::string path_;
};

TEST_F(Snapshot, ContinuesBitForBit) {
  for (const char* name : {"llama3", "gemma3"}) {
    const auto decoder = model(name);
    for (const CachePolicy policy : {CachePolicy::kSinkWindow, CachePolicy::kWindow,
                                     CachePolicy::kFull, CachePolicy::kRecompute}) {
      for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
        SessionOptions options = sink_window(2, 11, 4);
        options.cache.policy = policy;
        options.cache.key_form = form;
        options.cache.capacity = 200;
        options.sampler.repetition_penalty = 1.2;
        Session<float> session(decoder, options);
        session.accept(random_tokens(50));
        write(session, 13);
        session.save(path_);
        const std::vector<Token> expected = write(session, 40);
        const std::vector<float> logits(session.logits().begin(), session.logits().end());

        Session<float> restored(decoder, options);
        restored.accept(random_tokens(20, 9));  // what it held is replaced
        restored.restore(path_);
        EXPECT_EQ(restored.position(), 63);
        EXPECT_EQ(write(restored, 40), expected) << name << " " << to_string(policy);
        EXPECT_TRUE(std::equal(logits.begin(), logits.end(), restored.logits().begin()));
      }
    }
  }
}

TEST_F(Snapshot, OfHalfPrecisionCaches) {
  const auto decoder = model();
  Session<bf16, f16> session(decoder, sink_window(2, 11, 4));
  session.accept(random_tokens(50));
  session.save(path_);
  const Token expected = session.step().value();
  Session<bf16, f16> restored(decoder, sink_window(2, 11, 4));
  restored.restore(path_);
  EXPECT_EQ(restored.step().value(), expected);
  Session<f16, f16> other(decoder, sink_window(2, 11, 4));
  EXPECT_THROW(other.restore(path_), Error);
}

TEST_F(Snapshot, OfAnotherModelOrOptionsIsRefusedByName) {
  const auto decoder = model();
  Session<float> session(decoder, sink_window(2, 11, 4));
  session.accept(random_tokens(50));
  session.save(path_);
  const auto field_of = [&](Session<float>& other) -> std::string {
    other.accept(random_tokens(10));
    try {
      other.restore(path_);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kFormat);
      EXPECT_EQ(error.detail().where, path_);
      EXPECT_EQ(other.position(), 10) << "the session changed";
      return error.detail().field.substr(0, error.detail().field.find(' '));
    }
    return "none";
  };
  Session<float> window(decoder, sink_window(2, 12, 4));
  EXPECT_EQ(field_of(window), "window_size");
  Session<float> sinks(decoder, sink_window(3, 11, 4));
  EXPECT_EQ(field_of(sinks), "num_sink_tokens");
  Session<float> chunk(decoder, sink_window(2, 11, 5));
  EXPECT_EQ(field_of(chunk), "chunk_size");
  Session<float> model_of_other_shape(model("qwen3"), sink_window(2, 11, 4));
  EXPECT_NE(field_of(model_of_other_shape), "none");
}

// Every truncation and every flipped bit is found by the checksum; the session keeps what it had.
TEST_F(Snapshot, DamageIsFoundAndChangesNothing) {
  const auto decoder = model();
  Session<float> session(decoder, sink_window(1, 3, 2));
  session.accept(random_tokens(5));
  session.save(path_);
  const std::vector<std::byte> good = read_file(path_);
  const auto refused = [&](const std::vector<std::byte>& bytes) {
    write_file_atomically(path_, bytes);
    try {
      session.restore(path_);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kFormat;
    }
    return false;
  };
  const std::vector<float> before(session.logits().begin(), session.logits().end());
  Random random(1);
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<std::byte> bytes = good;
    bytes.resize(random.below(good.size()));
    ASSERT_TRUE(refused(bytes)) << "cut to " << bytes.size();
    bytes = good;
    const std::size_t at = random.below(good.size());
    bytes[at] ^= static_cast<std::byte>(1U << random.below(8));
    ASSERT_TRUE(refused(bytes)) << "bit flipped at " << at;
  }
  EXPECT_EQ(session.position(), 5);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), session.logits().begin()));
  write_file_atomically(path_, good);
  session.restore(path_);
}

TEST_F(Snapshot, OfAMissingFile) {
  Session<float> session(model(), sink_window(2, 11, 4));
  try {
    session.restore(path_ + ".absent");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo);
    EXPECT_NE(std::string(error.what()).find(".absent"), std::string::npos);
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
