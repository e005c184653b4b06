// SPDX-License-Identifier: MIT
/// What frame input costs, one thread: log_mel/<front end>, resample/<Hz to Hz>, silero_vad and
/// pcm16 by the second of audio, patches/<width>x<height> by the frame. `rtf` is computing time
/// over the time that the audio or (at 2 frames a second) the video lasts.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>

#include "sluice/core/random.hpp"
#include "sluice/io/audio_input.hpp"
#include "sluice/io/resampler.hpp"
#include "sluice/nn/log_mel.hpp"
#include "sluice/nn/patch_embedding.hpp"
#include "sluice/nn/silero_vad.hpp"

namespace {

std::vector<float> noise(std::int64_t count, double scale) {
  sluice::Random random(1);
  std::vector<float> values;
  for (std::int64_t i = 0; i < count; ++i)
    values.push_back(static_cast<float>(scale * random.normal()));
  return values;
}

void report(benchmark::State& state, double media_s) {
  state.counters["rtf"] =
      benchmark::Counter(media_s * static_cast<double>(state.iterations()),
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

// A second of audio in packets of 20 ms.
void log_mel(benchmark::State& state, const sluice::LogMelConfig& config) {
  const sluice::LogMel front_end(config);
  sluice::LogMel::State stream = front_end.make_state();
  const std::vector<float> samples = noise(320, 0.1);
  std::vector<float> rows(static_cast<std::size_t>(4 * front_end.num_mels()));
  for (auto _ : state) {
    for (int packet = 0; packet < 50; ++packet)
      front_end.step(samples, stream, {rows.data(), 4, front_end.num_mels()});
    benchmark::DoNotOptimize(rows.data());
  }
  report(state, 1);
}

void resample(benchmark::State& state, std::int64_t from, std::int64_t to) {
  sluice::Resampler resampler(from, to);
  const std::vector<float> samples = noise(from / 50, 0.1);
  std::vector<float> out(static_cast<std::size_t>(resampler.max_outputs(from / 50)));
  for (auto _ : state) {
    for (int packet = 0; packet < 50; ++packet) resampler.step(samples, out);
    benchmark::DoNotOptimize(out.data());
  }
  report(state, 1);
}

// Raw samples from memory: decoding, mixing two channels, checking.
void pcm16(benchmark::State& state) {
  const std::vector<std::byte> bytes(16000 * 2 * 2, std::byte{17});
  std::vector<float> samples(320);
  for (auto _ : state) {
    sluice::AudioInput input = sluice::open_pcm(sluice::ByteSource::of_memory(bytes, "memory"),
                                                {16000, 2}, sluice::SampleEncoding::kS16);
    while (input.read(samples) > 0) benchmark::DoNotOptimize(samples.data());
  }
  report(state, 1);
}

// The network's time does not depend on its weights.
void silero_vad(benchmark::State& state) {
  sluice::SileroVadWeights weights;
  weights.stft = noise(258 * 256, 0.01);
  const std::int64_t channels[] = {129, 128, 64, 64, 128};
  for (std::size_t i = 0; i < 4; ++i) {
    weights.conv[i].weight = noise(3 * channels[i] * channels[i + 1], 0.01);
    weights.conv[i].bias = noise(channels[i + 1], 0.01);
  }
  weights.input_weight = noise(512 * 128, 0.01);
  weights.hidden_weight = noise(512 * 128, 0.01);
  weights.input_bias = weights.hidden_bias = noise(512, 0.01);
  weights.output = noise(128, 0.01);
  weights.output_bias = noise(1, 0.01);
  const sluice::SileroVad vad(weights);
  sluice::SileroVad::State stream = vad.make_state();
  const std::vector<float> samples = noise(16000, 0.1);
  std::vector<float> probabilities(32);
  for (auto _ : state) {
    vad.step(samples, stream, probabilities);
    benchmark::DoNotOptimize(probabilities.data());
  }
  report(state, 1);
}

void patches(benchmark::State& state, std::int64_t width, std::int64_t height) {
  const sluice::PatchConfig config{.width = width, .height = height};
  constexpr std::int64_t kEmbedding = 1280;
  const std::int64_t row = sluice::PatchRows(config).row_width();
  const std::vector<float> weight = noise(kEmbedding * row, 0.01);
  const sluice::PatchEmbedding embedding(config,
                                         sluice::WeightMatrix::of(weight.data(), kEmbedding, row));
  sluice::PatchEmbedding::State stream = embedding.make_state();
  const std::vector<std::uint8_t> frame(static_cast<std::size_t>(embedding.patches().frame_bytes()),
                                        99);
  std::vector<float> out(static_cast<std::size_t>(embedding.max_outputs() * kEmbedding));
  for (auto _ : state) {
    embedding.step(frame, stream, {out.data(), embedding.max_outputs(), kEmbedding});
    benchmark::DoNotOptimize(out.data());
  }
  report(state, 0.5);
}

}  // namespace

int main(int argc, char** argv) {
  using benchmark::RegisterBenchmark;
  RegisterBenchmark("log_mel/nemo", log_mel, sluice::LogMelConfig::nemo());
  RegisterBenchmark("log_mel/kaldi", log_mel, sluice::LogMelConfig::kaldi());
  RegisterBenchmark("log_mel/whisper", log_mel, sluice::LogMelConfig::whisper_running_maximum());
  for (const std::int64_t rate : {22050, 44100, 48000})
    RegisterBenchmark(("resample/" + std::to_string(rate) + "to16000").c_str(), resample, rate,
                      std::int64_t{16000});
  RegisterBenchmark("pcm16", pcm16);
  RegisterBenchmark("silero_vad", silero_vad);
  RegisterBenchmark("patches/448x448", patches, std::int64_t{448}, std::int64_t{448});
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
