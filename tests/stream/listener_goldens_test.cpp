// SPDX-License-Identifier: MIT
// The trained listening model writes what PyTorch writes with the same file, piece for piece, and
// at the same frames: tests/data/listen/goldens.json, recorded by examples/training. Another folder
// of the same form: $SLUICE_LISTEN_GOLDENS.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/io/audio_input.hpp"
#include "sluice/io/json.hpp"
#include "sluice/model/load_listen_model.hpp"
#include "sluice/stream/listener.hpp"
#include "support/sanitizers.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

struct Written {
  std::vector<Token> tokens;
  std::vector<std::int64_t> samples;  // of each whole word
};

Written write_down(const std::shared_ptr<const ListenModel>& model, const ListenerOptions& options,
                   std::span<const float> samples, std::size_t piece) {
  Listener listener(model, options);
  Written written;
  const auto take = [&](const ListenEvent& event) {
    if (event.kind != ListenEvent::Kind::kWord) return;
    const auto tokens = event.tokens();
    written.tokens.insert(written.tokens.end(), tokens.begin(), tokens.end());
    written.samples.push_back(event.samples);
  };
  for (std::size_t done = 0; done < samples.size(); done += piece) {
    listener.accept(samples.subspan(done, std::min(piece, samples.size() - done)));
    if (!options.concurrent) listener.for_each(take);
  }
  listener.finish();
  listener.for_each(take);
  return written;
}

TEST(ListenerGoldens, TrainedModelWritesWhatPyTorchWrites) {
  const char* const other = std::getenv("SLUICE_LISTEN_GOLDENS");
  const std::string folder =
      other != nullptr && *other != '\0' ? other : std::string(SLUICE_TEST_DATA) + "/listen";
  const std::string beside = folder + "/listen-en.gguf";
  const auto model = load_listen_model(std::filesystem::exists(beside)
                                           ? beside
                                           : std::string(SLUICE_TEST_DATA) +
                                                 "/../../examples/03_listen/listen-en.gguf");
  const Json goldens(read_json_file(folder + "/goldens.json"));
  std::int64_t utterances = 0;
  std::int64_t pieces = 0;
  for (const Json& golden : goldens.at("utterances")) {
    const auto name = golden.at("audio").get<std::string>();
    SCOPED_TRACE(name);
    AudioInput audio = open_wav(
        folder + "/" + name,
        {.sample_rate = static_cast<std::int64_t>(model->sample_rate()), .resample = false});
    std::vector<float> samples(std::size_t{16000} * 60);
    samples.resize(static_cast<std::size_t>(audio.read_full(samples)));
    ListenerOptions options;
    const auto k = golden.at("k").get<std::int64_t>();
    options.wait_words = k == 0 ? ListenerOptions::kWholeUtterance : k;
    options.delay_rows = golden.at("delay").get<std::int64_t>();
    options.endpoint_ms = options.max_utterance_ms = options.silence_ms = 0;
    const std::int64_t index = utterances++;
    const auto expected = golden.at("tokens").get<std::vector<Token>>();
    pieces += static_cast<std::int64_t>(expected.size());
    options.concurrent = index % 4 == 3;
    if (SLUICE_TEST_THREAD_SANITIZED && !options.concurrent) continue;
    const Written written =
        write_down(model, options, samples, index % 2 == 0 ? samples.size() : std::size_t{777});
    EXPECT_EQ(written.tokens, expected) << "k = " << k;
    if (golden.contains("words")) {
      const auto words = golden.at("words");
      // A word that the end breaks off is none there.
      ASSERT_LE(words.size(), written.samples.size());
      for (std::size_t w = 0; w < words.size(); ++w) {
        const auto rows = words[w].at(0).get<std::int64_t>();
        const auto end = static_cast<std::int64_t>(samples.size());
        EXPECT_EQ(written.samples[w], words[w].at(1).get<bool>()
                                          ? end
                                          : (rows - 1) * model->samples_per_row() +
                                                model->config().front_end.window_length)
            << "word " << w;
      }
    }
  }
  EXPECT_GE(utterances, 24);
  EXPECT_GT(pieces, 150);
  RecordProperty("utterances", static_cast<int>(utterances));
  RecordProperty("pieces", static_cast<int>(pieces));
}

// The front end alone: normalised log-mels of one utterance, PyTorch's in float32.
TEST(ListenerGoldens, FeaturesAreThoseOfTraining) {
  const std::string folder = std::string(SLUICE_TEST_DATA) + "/listen";
  const auto model =
      load_listen_model(std::string(SLUICE_TEST_DATA) + "/../../examples/03_listen/listen-en.gguf");
  std::ifstream file(folder + "/mel.f32", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> expected(bytes.size() / sizeof(float));
  std::memcpy(expected.data(), bytes.data(), expected.size() * sizeof(float));
  AudioInput audio = open_wav(folder + "/u0.wav", {.resample = false});
  std::vector<float> samples(160000);
  samples.resize(static_cast<std::size_t>(audio.read_full(samples)));
  const LogMel& front_end = model->log_mel();
  LogMel::State state = front_end.make_state();
  const std::int64_t rows =
      front_end.frames_in_step(static_cast<std::int64_t>(samples.size()), state);
  ASSERT_GT(rows, 100);
  ASSERT_EQ(rows * front_end.num_mels(), static_cast<std::int64_t>(expected.size()));
  std::vector<float> found(expected.size());
  front_end.step(samples, state, {found.data(), rows, front_end.num_mels()});
  // Theirs are logarithms of float32 energies, ours of double ones.
  for (std::size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 2e-4) << i;
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
