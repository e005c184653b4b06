// SPDX-License-Identifier: MIT
#include "sluice/io/sound_file.hpp"

#include <fcntl.h>
#include <sndfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <numbers>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "io/wav_writer.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::expect_error;
using test::TempFolder;

// Whole multiples of 1 / 32768, which 16 bits hold exactly.
std::vector<float> sixteen_bits(std::int64_t count) {
  Random random(3);
  std::vector<float> samples;
  for (std::int64_t i = 0; i < count; ++i) {
    const double tone =
        0.4 * std::sin(2 * std::numbers::pi * 440 * static_cast<double>(i) / 16000.0);
    samples.push_back(
        static_cast<float>(std::round(32768 * (tone + 0.01 * random.normal())) / 32768));
  }
  return samples;
}

std::string write(const std::string& path, int format, int channels,
                  const std::vector<float>& samples) {
  SF_INFO info{};
  info.samplerate = 16000;
  info.channels = channels;
  info.format = format;
  SNDFILE* const file = sf_open(path.c_str(), SFM_WRITE, &info);
  EXPECT_NE(file, nullptr) << sf_strerror(nullptr);
  if (file == nullptr) return path;
  const auto frames = static_cast<sf_count_t>(samples.size()) / channels;
  EXPECT_EQ(sf_writef_float(file, samples.data(), frames), frames);
  sf_close(file);
  return path;
}

std::vector<float> read_all(AudioInput input) {
  std::vector<float> all;
  std::vector<float> piece(777);
  while (const std::int64_t count = input.read(piece))
    all.insert(all.end(), piece.begin(), piece.begin() + count);
  return all;
}

TEST(SoundFile, FlacIsLossless) {
  const TempFolder folder;
  const std::vector<float> samples = sixteen_bits(20000);
  const std::string mono =
      write(folder.path("mono.flac"), SF_FORMAT_FLAC | SF_FORMAT_PCM_16, 1, samples);
  EXPECT_EQ(read_all(open_audio(mono)), samples);
  const std::string stereo =
      write(folder.path("stereo.flac"), SF_FORMAT_FLAC | SF_FORMAT_PCM_16, 2, samples);
  SoundFileReader reader(stereo);
  EXPECT_EQ(reader.format(), (AudioFormat{16000, 2}));
  std::vector<float> frames(samples.size());
  EXPECT_EQ(reader.read(10000, frames.data()), 10000);
  EXPECT_EQ(frames, samples);
  EXPECT_EQ(reader.read(1, frames.data()), 0);
}

TEST(SoundFile, OggVorbisSoundsTheSame) {
  const TempFolder folder;
  const std::vector<float> samples = sixteen_bits(20000);
  const std::string path =
      write(folder.path("tone.ogg"), SF_FORMAT_OGG | SF_FORMAT_VORBIS, 1, samples);
  const std::vector<float> found = read_all(open_audio(path));
  ASSERT_EQ(found.size(), samples.size());
  double error = 0;
  double power = 0;
  for (std::size_t i = 0; i < samples.size(); ++i) {
    error += std::pow(static_cast<double>(found[i]) - static_cast<double>(samples[i]), 2);
    power += std::pow(static_cast<double>(samples[i]), 2);
  }
  EXPECT_LT(error, 0.01 * power);  // a lossy code: the tone stays, its noise is another
}

TEST(SoundFile, WavGoesToItsOwnReader) {
  const TempFolder folder;
  const test::Bytes whole =
      test::wav_file(3, 32, 1, 16000, test::floats_as_bytes({0.5F, 0.25F, 0.125F}));
  const std::string path = folder.write("short.wav", std::span(whole).first(whole.size() - 4));
  // libsndfile would read two samples and say nothing.
  expect_error(ErrorCode::kFormat, {path, "truncated audio", "3 frames", "2 frames"},
               [&] { read_all(open_audio(path)); });
}

// What told that it is WAV was read from the pipe and comes once only.
TEST(SoundFile, WavThroughANamedPipe) {
  const TempFolder folder;
  const std::vector<float> samples{0.5F, 0.25F, -0.125F};
  const test::Bytes file = test::wav_file(3, 32, 1, 16000, test::floats_as_bytes(samples));
  const std::string path = folder.path("pipe");
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  std::thread writer([&] {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(file.data()),
               static_cast<std::streamsize>(file.size()));
  });
  EXPECT_EQ(read_all(open_audio(path)), samples);
  writer.join();
}

// libsndfile would open the pipe a second time, and wait for ever or miss its beginning.
TEST(SoundFile, OnlyWavThroughANamedPipe) {
  const TempFolder folder;
  const std::string path = folder.path("pipe");
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  std::thread writer([&] { std::ofstream(path) << "fLaC and what follows"; });
  expect_error(ErrorCode::kUnsupported, {"only WAV", path, "RIFF"}, [&] { open_audio(path); });
  writer.join();
}

// Half a header, then nothing: a program that got a signal need not wait for more.
TEST(SoundFile, CanBeStoppedWhileNothingComes) {
  const TempFolder folder;
  const std::string path = folder.path("pipe");
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  const int both = ::open(path.c_str(), O_RDWR | O_CLOEXEC);  // never ends, never blocks
  ASSERT_GE(both, 0);
  ASSERT_EQ(::write(both, "RIFF\0\0\0\0WAVEfmt ", 16), 16);
  static int asked = 0;
  asked = 0;
  expect_error(ErrorCode::kFormat, {"truncated", path}, [&] {
    open_audio(path, {.stop_when = [] {
                 return ++asked > 3;
               }});
  });
  EXPECT_GT(asked, 3);
  ::close(both);
}

TEST(SoundFile, DamagedFilesAreTypedErrors) {
  const TempFolder folder;
  expect_error(ErrorCode::kIo, {folder.path("none"), "No such file"},
               [&] { open_audio(folder.path("none")); });
  expect_error(ErrorCode::kFormat, {"not a sound file"},
               [&] { open_audio(folder.write("text", "this is no sound")); });
  expect_error(ErrorCode::kFormat, {"not a sound file"},
               [&] { open_audio(folder.write("empty", "")); });
  const std::string path =
      write(folder.path("a.flac"), SF_FORMAT_FLAC | SF_FORMAT_PCM_16, 1, sixteen_bits(20000));
  const test::Bytes whole = test::read_bytes(path);
  for (const double share : {0.0, 0.01, 0.1, 0.5, 0.9}) {
    const auto size = static_cast<std::size_t>(share * static_cast<double>(whole.size()));
    const std::string part = folder.write("part.flac", std::span(whole).first(size));
    const std::optional<Error> error = test::expected_error([&] { read_all(open_audio(part)); });
    ASSERT_TRUE(error) << share;
    EXPECT_EQ(error->code(), ErrorCode::kFormat) << error->what();
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
