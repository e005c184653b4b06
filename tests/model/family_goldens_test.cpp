// SPDX-License-Identifier: MIT
// Every supported family against Hugging Face Transformers: tiny seeded models whose logits and
// greedy continuations were recorded by tests/oracle/make_model_goldens.py. Tolerance: 20 times the
// error that Transformers' own float32 run has against float64 (recorded per model, about 1e-5):
// any order of float32 summation errs about as much.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/io/json.hpp"
#include "sluice/model/load_gguf.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "sluice/stream/session.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

struct Case {
  std::string model;    // folder under tests/data/models
  std::string variant;  // config file in it, or "gguf"
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.model << " " << c.variant;
}

std::string models() {
  return std::string(SLUICE_TEST_DATA) + "/models/";
}

std::shared_ptr<const Decoder> load(const Case& c) {
  const std::string folder = models() + c.model;
  if (c.variant == "gguf") return load_decoder(std::make_shared<const GgufFile>(folder + ".gguf"));
  return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/" + c.variant);
}

Json goldens(const Case& c) {
  return read_json_file(models() + c.model + "/goldens.json");
}

std::vector<Token> tokens_of(const Json& json, const char* key) {
  return json.at(key).get<std::vector<Token>>();
}

void expect_near(std::span<const float> found, const std::vector<double>& expected, double bound,
                 const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  double worst = 0;
  for (std::size_t i = 0; i < expected.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(found[i]) - expected[i]));
  EXPECT_LE(worst, bound) << what;
}

SessionOptions full(std::int64_t chunk, int threads) {
  SessionOptions options;
  options.cache.policy = CachePolicy::kFull;
  options.cache.capacity = 128;
  options.cache.chunk_size = chunk;
  options.num_threads = threads;
  return options;
}

class FamilyGoldens : public testing::TestWithParam<Case> {};
class SinkStreamGoldens : public testing::TestWithParam<Case> {};

TEST_P(FamilyGoldens, LogitsOfTheWholeTextInAnyChunks) {
  const auto model = load(GetParam());
  const Json golden = goldens(GetParam());
  const std::vector<Token> tokens = tokens_of(golden, "tokens");
  const auto positions = golden.at("positions").get<std::vector<std::size_t>>();
  const double bound = 20 * golden.at("float64_error").get<double>();
  for (const std::int64_t chunk : {1, 5, 40}) {
    for (const int threads : {1, 2}) {
      Session<float> session(model, full(chunk, threads));
      std::size_t fed = 0;
      for (std::size_t p = 0; p < positions.size(); ++p) {
        session.accept(std::span(tokens).subspan(fed, positions[p] + 1 - fed));
        fed = positions[p] + 1;
        expect_near(session.logits(), golden.at("logits").at(p).get<std::vector<double>>(), bound,
                    "chunk " + std::to_string(chunk) + " position " + std::to_string(positions[p]));
      }
    }
  }
}

TEST_P(FamilyGoldens, GreedyContinuation) {
  const auto model = load(GetParam());
  const Json golden = goldens(GetParam());
  Session<float> session(model, full(40, 2));
  session.accept(tokens_of(golden, "tokens"));
  std::vector<Token> written;
  for (const Token expected : tokens_of(golden, "greedy")) {
    const auto token = session.step();
    ASSERT_TRUE(token.has_value());
    written.push_back(*token);
    ASSERT_EQ(*token, expected) << "at token " << written.size();
  }
}

// Token by token through sinks + window, positions in the cache and in the text, against a plain
// PyTorch loop that keeps raw keys and rotates all of them at every step.
TEST_P(SinkStreamGoldens, InAnyChunksWithBothKeyForms) {
  const auto model = load(GetParam());
  const Json golden = goldens(GetParam());
  int streams = 0;
  for (const char* name : {"stream", "stream_in_text"}) {
    if (!golden.contains(name)) continue;
    ++streams;
    const Json& stream = golden.at(name);
    const std::vector<Token> tokens = tokens_of(stream, "tokens");
    const auto logits = stream.at("logits").get<std::vector<std::vector<double>>>();
    const double bound = 20 * std::max(stream.at("float64_error").get<double>(), 1e-6);
    for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
      for (const std::int64_t chunk : {1, 3, 7}) {
        SessionOptions options;
        options.cache.num_sink_tokens = stream.at("start").get<std::int64_t>();
        options.cache.window_size = stream.at("recent").get<std::int64_t>() + 1;
        options.cache.chunk_size = chunk;
        options.cache.key_form = form;
        options.cache.position_rule =
            stream.at("position") == "in-cache" ? PositionRule::kInCache : PositionRule::kInText;
        Session<float> session(model, options);
        const std::size_t first = tokens.size() - logits.size();
        session.accept(std::span(tokens).first(first));
        for (std::size_t i = 0; i < logits.size(); ++i) {
          session.accept(std::span(tokens).subspan(first + i, 1));
          expect_near(session.logits(), logits[i], bound,
                      std::string(name) + " keys " + std::string(to_string(form)) + " chunk " +
                          std::to_string(chunk));
        }
      }
    }
  }
  EXPECT_EQ(streams, GetParam().model == "llama3" ? 2 : 1);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* model :
       {"llama2", "llama3", "smollm2-like", "mistral", "qwen2", "qwen3", "gemma3", "llama-yarn"})
    for (const char* config : {"config.json", "config.alternate.json"})
      all.push_back({model, config});
  for (const char* model : {"llama3", "qwen2", "qwen3", "gemma3"}) all.push_back({model, "gguf"});
  return all;
}

std::string name_of(const testing::TestParamInfo<Case>& parameter) {
  std::string name = parameter.param.model + "_" + parameter.param.variant;
  std::replace_if(
      name.begin(), name.end(), [](char c) { return c == '-' || c == '.'; }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Models, FamilyGoldens, testing::ValuesIn(cases()), name_of);
// The models whose streams were recorded.
INSTANTIATE_TEST_SUITE_P(Models, SinkStreamGoldens,
                         testing::Values(Case{"llama3", "config.json"}, Case{"llama3", "gguf"},
                                         Case{"qwen3", "config.json"}, Case{"qwen3", "gguf"},
                                         Case{"smollm2-like", "config.json"}),
                         name_of);

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
