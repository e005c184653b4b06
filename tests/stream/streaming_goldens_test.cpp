// SPDX-License-Identifier: MIT
// Against the authors' own code: READ/WRITE schedules of EIT-NLP/StreamingLLM (group position
// encoding with Qwen2 and Llama 3, StreamingThinker with Qwen3) on small seeded weights, recorded
// by tests/oracle/make_streaming_goldens.py with the logits of every fed token. Their float32 run
// is within 2e-5 of float64; getting one of their rules wrong changes a logit by more than 1.5.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "sluice/io/json.hpp"
#include "sluice/io/safetensors.hpp"
#include "sluice/model/load_safetensors.hpp"
#include "sluice/stream/duplex.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr double kTolerance = 1e-4;

struct Case {
  std::string model;
  int schedule;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.model << " " << c.schedule;
}

/// A recorded schedule and its logits.
struct Golden {
  explicit Golden(const Case& c)
      : folder(std::string(SLUICE_TEST_DATA) + "/streaming/" + c.model),
        json(read_json_file(folder + "/schedule_" + std::to_string(c.schedule) + ".json")),
        file(folder + "/logits_" + std::to_string(c.schedule) + ".safetensors"),
        rows(reinterpret_cast<const float*>(file.find_tensor("logits")->data)),
        vocab(json.at("vocab").get<std::int64_t>()) {}

  std::shared_ptr<const Decoder> decoder() const {
    return load_decoder(std::make_shared<const SafetensorsModel>(folder), folder + "/config.json");
  }
  const float* row(std::int64_t r) const { return rows + r * vocab; }

  std::string folder;
  Json json;
  SafetensorsFile file;
  const float* rows;
  std::int64_t vocab;
};

class StreamingGoldens : public testing::TestWithParam<Case> {};

// Every step of the schedule, as it was fed: source rows, prefix, words, tokens fed again.
TEST_P(StreamingGoldens, EveryStepOfTheSchedule) {
  const Golden golden(GetParam());
  const auto decoder = golden.decoder();
  const double phi = golden.json.at("phi").get<double>();
  for (const KeyForm form : {KeyForm::kRotated, KeyForm::kRaw}) {
    CacheOptions options{.policy = CachePolicy::kFull, .capacity = 64, .key_form = form};
    const auto source =
        decoder->make_group<float>("source", kSourceGroup, plan_cache(decoder->config(), options));
    options.origin = phi;
    const auto target =
        decoder->make_group<float>("target", kTargetGroup, plan_cache(decoder->config(), options));
    DecoderWorkspace workspace(*decoder, 64, 128, 1);
    ThreadTeam team(1);
    std::vector<float> found(static_cast<std::size_t>(64 * golden.vocab));
    double worst = 0;
    std::int64_t rows = 0;
    for (const Json& step : golden.json.at("steps")) {
      const std::string action = step.at("action").get<std::string>();
      if (action == "drop") {
        target->cache().truncate(1);
        ASSERT_EQ(target->cache().total(), step.at("sees_target").get<std::int64_t>());
        continue;
      }
      const auto tokens = step.at("tokens").get<std::vector<Token>>();
      const bool reads = action == "read";
      Group<float>& group = reads ? *source : *target;
      const std::array<GroupView<float>, 1> sees{source->view(source->published())};
      GroupReader<float, float> reader{.own_group = group.id()};
      if (!reads) reader.sees = sees;
      reader.bidirectional = step.at("mask").get<std::string>() == "none";
      ASSERT_EQ(source->published(), step.at("sees_source").get<std::int64_t>());
      for (std::size_t t = 0; t < tokens.size(); ++t)
        ASSERT_EQ(
            group.cache().write_position(group.cache().total() + static_cast<std::int64_t>(t)),
            step.at("positions")[t].get<double>());
      decoder->forward(DecoderInput{tokens}, group.cache(), reader, workspace, team);
      group.cache().commit();
      group.publish();
      const auto count = static_cast<std::int64_t>(tokens.size());
      decoder->logits(0, {found.data(), count, golden.vocab}, workspace, team);
      const auto first = step.at("logits")[0].get<std::int64_t>();
      for (std::int64_t i = 0; i < count * golden.vocab; ++i)
        worst = std::max(worst, std::abs(static_cast<double>(found[static_cast<std::size_t>(i)]) -
                                         static_cast<double>(golden.row(first)[i])));
      rows += count;
    }
    EXPECT_EQ(rows, golden.json.at("rows").get<std::int64_t>());
    EXPECT_LE(worst, kTolerance);
    RecordProperty(form == KeyForm::kRaw ? "worst_raw" : "worst_rotated", std::to_string(worst));
    EXPECT_EQ(source->cache().bytes_moved() + target->cache().bytes_moved(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Authors, StreamingGoldens,
                         testing::Values(Case{"gpe_qwen2", 0}, Case{"gpe_qwen2", 1},
                                         Case{"gpe_qwen2", 2}, Case{"gpe_llama3", 0},
                                         Case{"thinker_qwen3", 0}, Case{"thinker_qwen3", 1}));

/// Wraps a policy and compares the logits of each new candidate with the recorded rows, in order.
template <class Inner>
struct Checked {
  Inner inner;
  const Golden* golden;
  std::vector<std::int64_t> write_rows;  // last row of each write step
  std::size_t next = 0;
  double* worst;
  std::size_t* checked;

  Decision decide(const PolicyState& state) {
    if (state.candidate && next < write_rows.size()) {
      const float* row = golden->row(write_rows[next++]);
      for (std::size_t i = 0; i < state.logits.size(); ++i)
        *worst = std::max(
            *worst, std::abs(static_cast<double>(state.logits[i]) - static_cast<double>(row[i])));
      ++*checked;
    }
    return inner.decide(state);
  }
};

// The released loop decides by itself when to read: its greedy run (schedule 1: k = 1, phi = 0.5, a
// prefix of three tokens that see each other) comes out of a Duplex token for token, with threads
// and without.
TEST(GroupPositionEncoding, DuplexWritesWhatTheReleasedLoopWrites) {
  const Golden golden({"gpe_qwen2", 1});
  const auto decoder = golden.decoder();
  std::vector<Token> expected;
  std::vector<std::int64_t> write_rows;
  const auto prefix = golden.json.at("prefix").get<std::vector<Token>>();
  const Json& steps = golden.json.at("steps");
  std::optional<Token> last;
  for (const Json& step : steps) {
    const std::string action = step.at("action").get<std::string>();
    if (action == "drop") expected.pop_back();  // fed again: it comes back with the next write
    if (action != "write") continue;
    const auto tokens = step.at("tokens").get<std::vector<Token>>();
    if (tokens != prefix) expected.insert(expected.end(), tokens.begin(), tokens.end());
    write_rows.push_back(step.at("logits")[1].get<std::int64_t>() - 1);
    last = step.at("predicted").get<Token>();
  }
  WordUnits words;
  words.punctuation_ends_word = false;
  for (const Json& piece : golden.json.at("pieces"))
    words.classes.push_back(WordUnits::classify(piece.get<std::string>()));

  for (const bool concurrent : {false, true}) {
    DuplexOptions options;
    options.target_prefix = prefix;
    options.bidirectional_prefix = true;
    options.max_target_tokens = static_cast<std::int64_t>(expected.size());
    options.concurrent = concurrent;
    double worst = 0;
    std::size_t checked = 0;
    using Policy = Checked<WaitK<WordUnits>>;
    Duplex<Policy, float> duplex(decoder, options,
                                 Policy{WaitK(golden.json.at("k").get<std::int64_t>(), words),
                                        &golden, write_rows, 0, &worst, &checked},
                                 GroupedLayout::group_positions(0.5));
    for (const Json& unit : golden.json.at("units")) duplex.feed(unit.get<std::vector<Token>>());
    duplex.end_input();
    std::vector<Token> written;
    duplex.for_each([&](const DuplexOutput& output) {
      ASSERT_EQ(output.kind, DuplexOutput::Kind::kFinal);
      written.push_back(output.token);
    });
    EXPECT_EQ(written, expected);
    EXPECT_EQ(duplex.end_reason(), DuplexEnd::kTokenLimit);
    EXPECT_LE(worst, kTolerance);
    // All of them: the released loop predicts once more after its last token.
    EXPECT_GE(checked + 1, write_rows.size());
  }
}

// StreamingThinker's separators with greedy tokens are not recorded (their schedule is forced), so
// the moment of the READ is: a unit's separator is fed with the next source unit visible (3.3).
TEST(StreamingThinker, SeparatorIsFedAfterTheRead) {
  const Golden golden({"thinker_qwen3", 1});
  const auto separators = golden.json.at("separators").get<std::vector<Token>>();
  const Json& steps = golden.json.at("steps");
  for (std::size_t s = 1; s + 1 < steps.size(); ++s) {
    if (steps[s].at("action").get<std::string>() != "write") continue;
    const bool separator = std::find(separators.begin(), separators.end(),
                                     steps[s].at("predicted").get<Token>()) != separators.end();
    EXPECT_EQ(separator, steps[s + 1].at("action").get<std::string>() == "read");
    ReadUntilSeparator policy(separators);
    PolicyState state;
    state.units_read = 1;
    state.candidate = steps[s].at("predicted").get<Token>();
    const Decision decision = policy.decide(state);
    EXPECT_EQ(decision.action, separator ? Action::kRead : Action::kWrite);
    if (separator) {
      EXPECT_EQ(decision.last_token, LastToken::kKeep);
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
