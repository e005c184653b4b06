// SPDX-License-Identifier: MIT
/// From a sound file to features, at a pace: what reads, paces and computes, put together.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/io/audio_input.hpp"
#include "sluice/model/load_silero_vad.hpp"
#include "sluice/nn/log_mel.hpp"
#include "sluice/nn/silero_vad.hpp"
#include "sluice/stream/paced_source.hpp"
#include "sluice/stream/speech_segmenter.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

constexpr std::int64_t kMs = 1'000'000;

// A buzz of 150 Hz that swells four times a second from 2.0 to 3.5 s of eight, as raw floats at
// 44.1 kHz.
std::vector<std::byte> recording() {
  std::vector<std::byte> bytes;
  for (int i = 0; i < 8 * 44100; ++i) {
    const double t = static_cast<double>(i) / 44100.0;
    double sample = 0;
    if (t >= 2.0 && t < 3.5) {
      for (int k = 1; k <= 10; ++k) sample += std::cos(2 * std::numbers::pi * 150 * k * t) / k;
      sample *= 0.1 * (0.5 - 0.5 * std::cos(2 * std::numbers::pi * 4 * t));
    }
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(sample));
    for (int byte = 0; byte < 4; ++byte)
      bytes.push_back(static_cast<std::byte>(bits >> (8 * byte)));
  }
  return bytes;
}

struct Outcome {
  std::vector<float> features;
  std::vector<float> probabilities;
  PacedSourceCounts counts;
  std::int64_t end_ns = 0;
};

// Plays the recording in packets of 20 ms to a consumer that needs work_ns for each.
Outcome play(const std::vector<std::byte>& bytes, PacedSourceConfig config, std::int64_t work_ns) {
  AudioInput input =
      open_pcm(ByteSource::of_memory(bytes, "recording"), {44100, 1}, SampleEncoding::kF32);
  AudioPackets packets(input, 320, 16000);
  VirtualClock clock;
  PacedSource source(packets, clock, config);
  const LogMel front_end(LogMelConfig::kaldi());
  const SileroVad vad(
      load_silero_vad(std::string(SLUICE_TEST_DATA) + "/silero_vad/silero_vad_16k.safetensors"));
  LogMel::State mel = front_end.make_state();
  SileroVad::State speech = vad.make_state();
  Outcome outcome;
  std::vector<float> rows(101 * 80);
  std::vector<float> probabilities(33);
  AudioPackets::Frame packet = source.make_frame();
  std::int64_t next_sample = 0;
  while (source.next(packet) == FrameStatus::kFrame) {
    EXPECT_EQ(packet.first_sample, next_sample);  // the source clock has no gap
    next_sample += static_cast<std::int64_t>(packet.samples.size());
    const std::int64_t frames = front_end.step(packet.samples, mel, {rows.data(), 101, 80});
    outcome.features.insert(outcome.features.end(), rows.begin(), rows.begin() + frames * 80);
    const std::int64_t windows = vad.step(packet.samples, speech, probabilities);
    outcome.probabilities.insert(outcome.probabilities.end(), probabilities.begin(),
                                 probabilities.begin() + windows);
    clock.advance(work_ns);
  }
  outcome.counts = source.counts();
  outcome.end_ns = clock.now_ns();
  return outcome;
}

// Pace, lateness and joining change when features come, never what they are.
TEST(FrameInput, PaceChangesNoBit) {
  const std::vector<std::byte> bytes = recording();
  const Outcome fast = play(bytes, {.speed = 0}, 0);
  EXPECT_EQ(fast.features.size(), 80U * (1 + (8 * 16000 - 400) / 160));
  EXPECT_EQ(fast.probabilities.size(), 8U * 16000 / 512);
  EXPECT_EQ(fast.end_ns, 0);

  const Outcome paced = play(bytes, {}, 5 * kMs);
  EXPECT_EQ(paced.features, fast.features);
  EXPECT_EQ(paced.counts.late, 0);
  EXPECT_EQ(paced.end_ns, 8'005 * kMs);  // no drift: the last packet is due at 8 s

  const Outcome late = play(bytes, {.late = LatePolicy::kBlock}, 30 * kMs);
  EXPECT_EQ(late.features, fast.features);
  EXPECT_GT(late.counts.late, 300);

  const Outcome joined = play(bytes, {.late = LatePolicy::kCoalesce}, 70 * kMs);
  EXPECT_EQ(joined.features, fast.features);
  EXPECT_EQ(joined.probabilities, fast.probabilities);
  EXPECT_GT(joined.counts.coalesced, 200);
  EXPECT_LT(joined.counts.max_late_ns, 100 * kMs);  // joining keeps up where waiting does not
}

TEST(FrameInput, SpeechIsFoundWhereItIs) {
  const Outcome outcome = play(recording(), {.speed = 0}, 0);
  SpeechSegmenter segmenter;
  std::vector<SpeechSegmenter::Border> borders;
  for (const float probability : outcome.probabilities)
    if (const auto border = segmenter.accept(static_cast<double>(probability)))
      borders.push_back(*border);
  if (const auto border = segmenter.finish()) borders.push_back(*border);
  // The buzz is no voice, and the network soon hears that: it finds where it begins, and nothing in
  // the silence around it.
  ASSERT_GE(borders.size(), 2U);
  for (const SpeechSegmenter::Border& border : borders) {
    const double s = static_cast<double>(border.sample) / 16000.0;
    EXPECT_TRUE(s > 1.9 && s < 3.8) << s;
  }
  EXPECT_TRUE(borders.front().begins);
  EXPECT_NEAR(static_cast<double>(borders.front().sample) / 16000.0, 2.0, 0.25);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
