// SPDX-License-Identifier: MIT
// The real model against Hugging Face Transformers in float32 with the same dequantised weights
// (tests/oracle/make_smollm2_goldens.py). The bounds are 20 times the difference that was recorded
// between Transformers' float32 run and a float64 run of the same weights; they lie far below 1e-3
// of the logits' range, which is asserted too.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/core/threads.hpp"
#include "sluice/io/json.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/stream/session.hpp"
#include "support/model_path.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

class SmolLm2Goldens : public testing::Test {
 protected:
  void SetUp() override {
    const auto path = test::smollm2_path();
    if (!path)
      GTEST_SKIP() << "SmolLM2-135M-Instruct.Q4_1.gguf is not on this machine: run "
                      "cmake/get_model.sh or set SLUICE_MODEL";
    golden_ = read_json_file(std::string(SLUICE_TEST_DATA) + "/smollm2/goldens.json");
    static const auto model = load_decoder(std::make_shared<const GgufFile>(*path));
    model_ = model;
  }

  std::vector<Token> tokens(const char* key) const {
    return golden_.at(key).get<std::vector<Token>>();
  }
  /// 20 times the recorded difference between float32 and float64.
  double bound(const char* key) const { return 20 * golden_.at("float64").at(key).get<double>(); }

  Session<float> full(std::int64_t chunk) const {
    SessionOptions options;
    options.cache.policy = CachePolicy::kFull;
    options.cache.capacity = 640;
    options.cache.chunk_size = chunk;
    options.num_threads = 2;
    return Session<float>(model_, options);
  }

  /// Scores the first tokens of the text one by one; the worst difference to `expected`.
  double worst_log_prob(Session<float>& session, const std::vector<double>& expected) const {
    const std::vector<Token> text = tokens("tokens");
    Buffer<float> scratch(static_cast<std::size_t>(8 * model_->config().vocab_size));
    double worst = 0;
    std::size_t scored = 0;
    session.accept_scored(std::span(text).first(expected.size() + 1),
                          MatrixView<float>(scratch.data(), 8, model_->config().vocab_size),
                          [&](std::size_t i, double nll) {
                            worst = std::max(worst, std::abs(-nll - expected.at(i - 1)));
                            ++scored;
                          });
    EXPECT_EQ(scored, expected.size());
    return worst;
  }

  void expect_greedy(std::span<const Token> prompt, const char* key) const {
    Session<float> session = full(512);
    session.accept(prompt);
    std::vector<Token> written;
    for (std::size_t i = 0; i < tokens(key).size(); ++i) written.push_back(session.step().value());
    EXPECT_EQ(written, tokens(key));
  }

  Json golden_;
  std::shared_ptr<const Decoder> model_;
};

TEST_F(SmolLm2Goldens, LogitsOf512Tokens) {
  const std::vector<Token> text = tokens("tokens");
  const auto positions = golden_.at("positions").get<std::vector<std::size_t>>();
  const auto ids = golden_.at("vocab_ids").get<std::vector<std::size_t>>();
  const double range = golden_.at("logit_range").get<double>();
  for (const std::int64_t chunk : {512, 100}) {
    Session<float> session = full(chunk);
    std::size_t fed = 0;
    double worst = 0;
    for (std::size_t p = 0; p < positions.size(); ++p) {
      session.accept(std::span(text).subspan(fed, positions[p] + 1 - fed));
      fed = positions[p] + 1;
      const std::span<const float> logits = session.logits();
      for (std::size_t i = 0; i < ids.size(); ++i)
        worst = std::max(worst, std::abs(static_cast<double>(logits[ids[i]]) -
                                         golden_.at("logits").at(p).at(i).get<double>()));
      const auto top = golden_.at("top_ids").at(p).get<std::vector<std::size_t>>();
      for (std::size_t i = 0; i < top.size(); ++i)
        worst = std::max(worst, std::abs(static_cast<double>(logits[top[i]]) -
                                         golden_.at("top_logits").at(p).at(i).get<double>()));
      EXPECT_EQ(
          static_cast<std::size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()),
          top[0])
          << "position " << positions[p];
    }
    std::printf("chunk %ld: largest logit difference %.3g, %.3g of the range %.1f\n",
                static_cast<long>(chunk), worst, worst / range, range);
    EXPECT_LE(worst, bound("logits"));
    EXPECT_LE(worst, 1e-3 * range);
  }
}

TEST_F(SmolLm2Goldens, LogProbabilitiesOfTheText) {
  Session<float> session = full(512);
  EXPECT_LE(worst_log_prob(session, golden_.at("log_probs").get<std::vector<double>>()),
            bound("log_probs"));
}

TEST_F(SmolLm2Goldens, GreedyContinuationOfTheText) {
  expect_greedy(tokens("tokens"), "greedy_text");
}

TEST_F(SmolLm2Goldens, GreedyContinuationOfAChat) {
  expect_greedy(tokens("chat_tokens"), "greedy_chat");
}

// Token-wise StreamingLLM and the plain window, in chunks of one and of many tokens. The window
// without sinks amplifies rounding once it has lost the first token, and has a bound of its own.
TEST_F(SmolLm2Goldens, SinkWindowAndWindowStreams) {
  struct Run {
    const char* stream;
    std::int64_t chunk;
    KeyForm form;
  };
  for (const Run& run : {Run{"stream", 1, KeyForm::kRotated}, Run{"stream", 61, KeyForm::kRaw},
                         Run{"stream", 37, KeyForm::kRotated}, Run{"window", 1, KeyForm::kRaw},
                         Run{"window", 65, KeyForm::kRotated}}) {
    const Json& stream = golden_.at(run.stream);
    SessionOptions options;
    options.cache.num_sink_tokens = stream.at("start").get<std::int64_t>();
    options.cache.window_size = stream.at("recent").get<std::int64_t>() + 1;
    options.cache.chunk_size = run.chunk;
    options.cache.key_form = run.form;
    options.num_threads = 2;
    Session<float> session(model_, options);
    const std::string key = std::string(run.stream) + "_log_probs";
    EXPECT_LE(worst_log_prob(session, stream.at("log_probs").get<std::vector<double>>()),
              bound(key.c_str()))
        << run.stream << " chunk " << run.chunk << " keys " << to_string(run.form);
  }
}

TEST_F(SmolLm2Goldens, RecomputedWindow) {
  const Json& recompute = golden_.at("recompute");
  const std::vector<Token> text = tokens("tokens");
  const auto positions = recompute.at("positions").get<std::vector<std::size_t>>();
  SessionOptions options;
  options.cache.policy = CachePolicy::kRecompute;
  options.cache.window_size = recompute.at("window").get<std::int64_t>();
  options.num_threads = 2;
  Session<float> session(model_, options);
  std::size_t fed = 0;
  double worst = 0;
  for (std::size_t p = 0; p < positions.size(); ++p) {
    session.accept(std::span(text).subspan(fed, positions[p] + 1 - fed));
    fed = positions[p] + 1;
    worst = std::max(worst, std::abs(-negative_log_likelihood(session.logits(), text[fed]) -
                                     recompute.at("log_probs").at(p).get<double>()));
  }
  EXPECT_LE(worst, bound("log_probs"));
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
