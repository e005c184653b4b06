// SPDX-License-Identifier: MIT
#include "sluice/io/wav.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "io/wav_writer.hpp"
#include "sluice/core/random.hpp"
#include "sluice/io/audio_input.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::Bytes;
using test::expect_error;
using test::floats_as_bytes;
using test::wav_file;
using test::WavWriter;

ByteSource memory(const Bytes& bytes) {
  return ByteSource::of_memory(bytes, "memory.wav");
}

std::vector<float> read_all(AudioReader& reader, std::int64_t piece = 1000) {
  std::vector<float> all;
  std::vector<float> frames(static_cast<std::size_t>(piece * reader.format().channels));
  while (const std::int64_t count = reader.read(piece, frames.data()))
    all.insert(all.end(), frames.begin(), frames.begin() + count * reader.format().channels);
  return all;
}

std::vector<float> read_all(AudioInput& input) {
  std::vector<float> all;
  std::vector<float> piece(777);
  while (const std::int64_t count = input.read(piece))
    all.insert(all.end(), piece.begin(), piece.begin() + count);
  return all;
}

// --- Encodings -----------------------------------------------------------------------------------

TEST(Wav, EveryEncodingByItsDefinition) {
  const auto check = [](unsigned tag, unsigned bits, const Bytes& samples,
                        const std::vector<float>& expected) {
    const Bytes file = wav_file(tag, bits, 1, 8000, samples);
    PcmReader reader = read_wav(memory(file));
    EXPECT_EQ(reader.format(), (AudioFormat{8000, 1}));
    EXPECT_EQ(reader.frames_promised(), static_cast<std::int64_t>(expected.size()));
    EXPECT_EQ(read_all(reader), expected) << bits << " bits";
  };
  check(1, 8, WavWriter().number(0x80FF00, 3).bytes(), {-1.0F, 127.0F / 128.0F, 0.0F});
  check(1, 16, WavWriter().number(0x8000, 2).number(0x7FFF, 2).number(0xFFFF, 2).bytes(),
        {-1.0F, 32767.0F / 32768.0F, -1.0F / 32768.0F});
  check(1, 24, WavWriter().number(0x800000, 3).number(0x7FFFFF, 3).number(0xFFFFFF, 3).bytes(),
        {-1.0F, 8388607.0F / 8388608.0F, -1.0F / 8388608.0F});
  check(1, 32, WavWriter().number(0x80000000, 4).number(0x40000000, 4).bytes(), {-1.0F, 0.5F});
  check(3, 32, floats_as_bytes({0.25F, -3.5F}), {0.25F, -3.5F});
  check(3, 64, WavWriter().number(std::bit_cast<std::uint64_t>(-0.3), 8).bytes(), {-0.3F});
}

TEST(Wav, ExtensibleFormatsAndOtherChunks) {
  WavWriter out;
  out.word("RIFF").number(999, 4).word("WAVE");
  out.word("LIST").number(3, 4).word("abc").number(0, 1);  // an odd length is padded
  out.word("fmt ").number(40, 4).number(0xFFFE, 2).number(2, 2).number(44100, 4);
  out.number(176400, 4).number(4, 2).number(16, 2).number(22, 2).number(16, 2).number(3, 4);
  out.number(1, 2).number(0, 14);  // the sub-format: a tag and the rest of its identifier
  out.word("fact").number(4, 4).number(1, 4);
  out.word("data").number(4, 4).number(0x40000000, 4);
  out.word("LIST").number(4, 4).word("tail");
  PcmReader reader = read_wav(memory(out.bytes()));
  EXPECT_EQ(reader.format(), (AudioFormat{44100, 2}));
  EXPECT_EQ(read_all(reader), (std::vector<float>{0.0F, 0.5F}));
}

TEST(Wav, LengthsThatAWriterCouldNotFillInAreReadToTheEnd) {
  const Bytes samples = floats_as_bytes({0.1F, 0.2F, 0.3F});
  for (const std::uint32_t length : {0xFFFFFFFFU, 0x7FFFFFFFU, 0x7FFFF000U}) {
    const Bytes file = wav_file(3, 32, 1, 16000, samples, length);
    PcmReader reader = read_wav(memory(file));
    EXPECT_FALSE(reader.frames_promised());
    EXPECT_EQ(read_all(reader), (std::vector<float>{0.1F, 0.2F, 0.3F}));
  }
}

TEST(Wav, AnEmptyFileOfSamplesIsNoError) {
  const Bytes file = wav_file(1, 16, 1, 16000, {});
  PcmReader reader = read_wav(memory(file));
  EXPECT_TRUE(read_all(reader).empty());
  float sample = 7;
  EXPECT_EQ(reader.read(1, &sample), 0);
}

// --- Damage --------------------------------------------------------------------------------------

TEST(Wav, TruncatedAtEveryLength) {
  const Bytes file =
      wav_file(1, 16, 2, 16000,
               WavWriter().number(0x11112222, 4).number(0, 4).number(0x33334444, 4).bytes());
  for (std::size_t size = 0; size <= file.size(); ++size) {
    const Bytes part(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size));
    std::vector<float> frames(2);
    std::int64_t count = 0;
    const auto read = [&] {
      PcmReader reader = read_wav(memory(part));
      while (reader.read(1, frames.data()) == 1) ++count;
    };
    if (size == file.size()) {
      read();
      EXPECT_EQ(count, 3);
    } else if (size < 44) {
      expect_error(ErrorCode::kFormat, {"memory.wav", "truncated WAV header"}, read);
    } else {
      expect_error(ErrorCode::kFormat, {"memory.wav", "truncated audio", "expected 3 frames"},
                   read);
      // What is there comes first.
      EXPECT_EQ(count, static_cast<std::int64_t>(size - 44) / 4);
    }
  }
}

TEST(Wav, WhatIsWrongIsNamed) {
  const auto header = [](auto change) {
    Bytes file = wav_file(1, 16, 1, 16000, Bytes(8));
    change(file);
    return file;
  };
  const auto set = [](std::size_t at, std::uint32_t value, int width) {
    return [=](Bytes& file) {
      for (int i = 0; i < width; ++i)
        file[at + static_cast<std::size_t>(i)] = static_cast<std::byte>(value >> (8 * i));
    };
  };
  const auto check = [&](ErrorCode code, const char* part, const char* field, auto change) {
    const Bytes file = header(change);
    expect_error(code, {"memory.wav", part, field}, [&] { read_wav(memory(file)); });
  };
  check(ErrorCode::kFormat, "not a WAV file", "byte 0", set(0, 0x46464f4c, 4));
  check(ErrorCode::kFormat, "not a WAV file", "byte 0", set(8, 0, 4));
  check(ErrorCode::kUnsupported, "not implemented", "RF64", set(0, 0x34364652, 4));
  check(ErrorCode::kFormat, "too short", "fmt at byte 12", set(16, 15, 4));
  check(ErrorCode::kUnsupported, "encoding", "6 with 16", set(20, 6, 2));
  check(ErrorCode::kUnsupported, "encoding", "1 with 12", set(34, 12, 2));
  check(ErrorCode::kFormat, "channels", "found 0", set(22, 0, 2));
  check(ErrorCode::kFormat, "sample rate", "found 0", set(24, 0, 4));
  check(ErrorCode::kFormat, "sample rate", "found 4294967295", set(24, 0xFFFFFFFF, 4));
  check(ErrorCode::kFormat, "frame size", "block align", set(32, 3, 2));
  check(ErrorCode::kFormat, "do not divide", "found 7", set(40, 7, 4));
  check(ErrorCode::kFormat, "samples before the format", "data", set(12, 0x61746164, 4));
  check(ErrorCode::kFormat, "truncated WAV header", "chunk at byte 12", [&](Bytes& file) {
    set(12, 0x64726f77, 4)(file);  // a chunk of another name, longer than the file
    set(16, 0x7fffffff, 4)(file);
  });
}

TEST(Wav, ALaterFormatChunkReplacesTheEarlierOneWhole) {
  Bytes file = wav_file(1, 16, 1, 8000, WavWriter().number(0, 2).bytes());
  // Behind the first format chunk (12 bytes of RIFF, 24 of the chunk) one of A-law.
  const Bytes second = WavWriter()
                           .word("fmt ")
                           .number(16, 4)
                           .number(6, 2)
                           .number(1, 2)
                           .number(8000, 4)
                           .number(16000, 4)
                           .number(2, 2)
                           .number(8, 2)
                           .bytes();
  file.insert(file.begin() + 36, second.begin(), second.end());
  expect_error(ErrorCode::kUnsupported, {"format tag and bits", "6 with 8"},
               [&] { read_wav(memory(file)); });
}

TEST(ByteSource, WhatIsPutBackComesOnceMore) {
  Bytes bytes;
  for (int i = 0; i < 40; ++i) bytes.push_back(static_cast<Bytes::value_type>(i));
  ByteSource source = memory(bytes);
  Bytes front(12);
  ASSERT_EQ(source.read(front), 12U);
  source.put_back(front);
  EXPECT_EQ(source.offset(), 0U);
  ByteSource moved = std::move(source);
  Bytes few(5);
  ASSERT_EQ(moved.read(few), 5U);
  EXPECT_TRUE(std::equal(few.begin(), few.end(), bytes.begin()));
  Bytes rest(100);
  ASSERT_EQ(moved.read(rest), 35U);
  EXPECT_TRUE(std::equal(bytes.begin() + 5, bytes.end(), rest.begin()));
  EXPECT_EQ(moved.offset(), 40U);
}

TEST(ByteSource, EndsWhereItIsToldToWhileNothingComes) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  ByteSource source = ByteSource::of_descriptor(ends[0], true, "pipe");
  static int asked = 0;
  asked = 0;
  source.stop_when([] { return ++asked > 2; });
  Bytes bytes(4);
  EXPECT_EQ(source.read(bytes), 0U);  // nobody writes
  EXPECT_EQ(asked, 3);
  asked = -100;
  ASSERT_EQ(write(ends[1], "abcd", 4), 4);
  EXPECT_EQ(source.read(bytes), 4U);
  close(ends[1]);
}

TEST(Wav, FilesThatCannotBeOpened) {
  const test::TempFolder folder;
  expect_error(ErrorCode::kIo, {folder.path("none"), "No such file"},
               [&] { read_wav(folder.path("none")); });
  expect_error(ErrorCode::kIo, {folder.path(), "directory"}, [&] { read_wav(folder.path()); });
}

// --- Raw samples ---------------------------------------------------------------------------------

TEST(Pcm, RawSamplesFromAPipeInAnyPieces) {
  const std::vector<float> expected{0.5F, -0.25F, 0.125F, 1.0F, -1.0F, 0.0F};
  const Bytes bytes = floats_as_bytes(expected);
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  std::thread writer([&] {
    for (std::size_t at = 0; at < bytes.size(); at += 5) {  // pieces that cut samples
      const std::size_t length = std::min<std::size_t>(5, bytes.size() - at);
      EXPECT_EQ(::write(ends[1], bytes.data() + at, length), static_cast<ssize_t>(length));
      std::this_thread::yield();
    }
    ::close(ends[1]);
  });
  PcmReader reader(ByteSource::of_descriptor(ends[0], true, "pipe"), {16000, 2},
                   SampleEncoding::kF32);
  const std::vector<float> found = read_all(reader);
  writer.join();
  EXPECT_EQ(found, expected);
}

TEST(Pcm, ASampleCutOffAtTheEndIsAnError) {
  const Bytes bytes(7);
  PcmReader reader(ByteSource::of_memory(bytes, "raw"), {16000, 1}, SampleEncoding::kS16);
  std::vector<float> frames(10);
  EXPECT_EQ(reader.read(10, frames.data()), 3);
  expect_error(ErrorCode::kFormat, {"truncated audio", "3 frames and 1 bytes"},
               [&] { reader.read(10, frames.data()); });
}

TEST(Pcm, RefusesFormats) {
  for (const AudioFormat& format : {AudioFormat{0, 1}, AudioFormat{16000, 0},
                                    AudioFormat{2'000'000, 1}, AudioFormat{16000, 65}})
    expect_error(ErrorCode::kConfig, {"out of range"}, [&] {
      PcmReader reader(ByteSource::of_memory({}, "raw"), format, SampleEncoding::kS16);
    });
}

// --- One channel, one rate, finite samples -------------------------------------------------------

AudioInput input_of(const Bytes& file, const AudioInputConfig& config = {}) {
  return open_wav(memory(file), config);
}

TEST(AudioInput, MixesOrPicksAChannel) {
  const Bytes file = wav_file(3, 32, 2, 16000, floats_as_bytes({1.0F, 0.5F, -1.0F, 0.25F}));
  AudioInput mean = input_of(file);
  EXPECT_EQ(read_all(mean), (std::vector<float>{0.75F, -0.375F}));
  AudioInput second = input_of(file, {.channel = 1});
  EXPECT_EQ(read_all(second), (std::vector<float>{0.5F, 0.25F}));
  for (const std::int64_t channel : {-1, 2})
    expect_error(ErrorCode::kConfig, {"no such channel", "0 to 1"},
                 [&] { input_of(file, {.channel = channel}); });
}

TEST(AudioInput, AnotherRateIsResampledOrRefused) {
  const Bytes file = wav_file(3, 32, 1, 44100, floats_as_bytes(std::vector<float>(44100, 0.5F)));
  AudioInput input = input_of(file);
  const std::vector<float> samples = read_all(input);
  EXPECT_EQ(samples.size(), 16000U);
  EXPECT_EQ(input.samples(), 16000);
  EXPECT_NEAR(samples[8000], 0.5F, 1e-6F);
  expect_error(ErrorCode::kUnsupported, {"memory.wav", "expected 16000 Hz", "found 44100 Hz"},
               [&] { input_of(file, {.resample = false}); });
  AudioInput same = input_of(file, {.sample_rate = 44100, .resample = false});
  EXPECT_EQ(read_all(same).size(), 44100U);
}

TEST(AudioInput, SamplesThatAreNotFiniteAreRefusedOrSilenced) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Bytes file =
      wav_file(3, 32, 2, 16000, floats_as_bytes({1, 1, 0.5F, kNan, -kInfinity, kNan, 1, 1}));
  AudioInput zeroing = input_of(file, {.non_finite = NonFinite::kZero});
  EXPECT_EQ(read_all(zeroing), (std::vector<float>{1, 0.25F, 0, 1}));
  EXPECT_EQ(zeroing.zeroed(), 3);
  AudioInput rejecting = input_of(file);
  std::vector<float> samples(4);
  EXPECT_EQ(rejecting.read(samples), 1);  // what stands before it comes first
  EXPECT_EQ(samples[0], 1.0F);
  for (int i = 0; i < 2; ++i)
    expect_error(ErrorCode::kFormat, {"memory.wav", "frame 1, channel 1", "NaN"},
                 [&] { rejecting.read(samples); });
}

TEST(AudioInput, NothingAskedForChangesNothing) {
  const Bytes file = wav_file(3, 32, 1, 16000, floats_as_bytes({1, 2, 3}));
  AudioInput input = input_of(file);
  EXPECT_EQ(input.read({}), 0);
  EXPECT_EQ(input.samples(), 0);
  EXPECT_EQ(read_all(input), (std::vector<float>{1, 2, 3}));
}

TEST(AudioInput, TruncatedFilesGiveWhatIsThereAndThenTheError) {
  const Bytes whole = wav_file(3, 32, 1, 16000, floats_as_bytes(std::vector<float>(5000, 0.5F)));
  const Bytes file(whole.begin(), whole.end() - 401);
  AudioInput input = input_of(file);
  std::vector<float> piece(1000);
  std::int64_t count = 0;
  expect_error(ErrorCode::kFormat, {"truncated audio", "5000 frames"}, [&] {
    while (const std::int64_t part = input.read(piece)) count += part;
  });
  EXPECT_EQ(count, 4899);
  // In packets, resampled: all of them, and then the error, every time.
  AudioInput other = open_pcm(ByteSource::of_memory(std::span(file).subspan(44), "raw"), {48000, 1},
                              SampleEncoding::kF32);
  AudioPackets packets(other, 1000, 1000);
  AudioPackets::Frame packet = packets.make_frame();
  ASSERT_TRUE(packets.read(packet));
  EXPECT_EQ(packet.samples.size(), 1000U);
  ASSERT_TRUE(packets.read(packet));
  EXPECT_EQ(packet.samples.size(), 633U);  // a third of 4899, all in all
  for (int i = 0; i < 2; ++i)
    expect_error(ErrorCode::kFormat, {"truncated audio"}, [&] { packets.read(packet); });
}

TEST(AudioPackets, KeepTheSourceClock) {
  const Bytes file = wav_file(3, 32, 1, 16000, floats_as_bytes(std::vector<float>(2500, 0.5F)));
  AudioInput input = input_of(file);
  AudioPackets packets(input, 1000, 2400);
  AudioPackets::Frame first = packets.make_frame();
  AudioPackets::Frame second = packets.make_frame();
  AudioPackets::Frame third = packets.make_frame();
  ASSERT_TRUE(packets.read(first));
  ASSERT_TRUE(packets.read(second));
  ASSERT_TRUE(packets.read(third));
  EXPECT_EQ(second.first_sample, 1000);
  EXPECT_EQ(packets.time_ns(first), 62'500'000);
  EXPECT_EQ(packets.time_ns(third), 156'250'000);
  EXPECT_EQ(third.samples.size(), 500U);
  EXPECT_TRUE(packets.merge(first, second));
  EXPECT_EQ(first.samples.size(), 2000U);
  EXPECT_EQ(packets.time_ns(first), 125'000'000);
  EXPECT_FALSE(packets.merge(first, third));  // no room
  EXPECT_FALSE(packets.read(third));
  expect_error(ErrorCode::kConfig, {"packet"}, [&] { AudioPackets none(input, 0, 1); });
  expect_error(ErrorCode::kConfig, {"room"}, [&] { AudioPackets none(input, 10, 9); });
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
