// SPDX-License-Identifier: MIT
#include "sluice/io/frame_source.hpp"

#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/io_test_support.hpp"
#include "sluice/core/random.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using test::expect_error;
using test::TempFolder;

ByteSource memory(const std::string& text) {
  return ByteSource::of_memory(std::as_bytes(std::span(text)), "memory");
}

std::vector<Picture> read_all(PictureReader& reader) {
  std::vector<Picture> all;
  Picture picture;
  while (reader.read(picture)) all.push_back(picture);
  return all;
}

std::string ppm(std::int64_t width, std::int64_t height, const std::string& pixels) {
  return "P6\n" + std::to_string(width) + " " + std::to_string(height) + "\n255\n" + pixels;
}

std::string noise(std::int64_t count, std::uint64_t seed) {
  Random random(seed);
  std::string bytes;
  for (std::int64_t i = 0; i < count; ++i) bytes.push_back(static_cast<char>(random.below(256)));
  return bytes;
}

std::string text_of(const Picture& picture) {
  return {picture.pixels.begin(), picture.pixels.end()};
}

// --- Netpbm --------------------------------------------------------------------------------------

TEST(Netpbm, PicturesOneBehindTheOther) {
  const std::string first = noise(2 * 3 * 3, 1);
  const std::string second = noise(2 * 3 * 3, 2);
  const std::string text =
      ppm(2, 3, first) + "P6 # a comment\n# and another\n 2\t3\r\n255 " + second;
  NetpbmReader reader(memory(text), 4);
  const std::vector<Picture> pictures = read_all(reader);
  ASSERT_EQ(pictures.size(), 2U);
  EXPECT_EQ(pictures[0].format, (PictureFormat{2, 3, 3}));
  EXPECT_EQ(text_of(pictures[0]), first);
  EXPECT_EQ(text_of(pictures[1]), second);
  EXPECT_EQ(pictures[1].index, 1);
  EXPECT_EQ(pictures[0].time_ns, 250'000'000);
  EXPECT_EQ(pictures[1].time_ns, 500'000'000);
}

TEST(Netpbm, Grey) {
  const std::string text = std::string("P5\n3 1\n255\n") + "abc";
  NetpbmReader reader(memory(text), 1);
  const std::vector<Picture> pictures = read_all(reader);
  ASSERT_EQ(pictures.size(), 1U);
  EXPECT_EQ(pictures[0].format.channels, 1);
  EXPECT_EQ(text_of(pictures[0]), "abc");
}

TEST(Netpbm, AFrameOfAnotherSizeIsAnError) {
  const std::string text = ppm(2, 2, noise(12, 1)) + ppm(2, 3, noise(18, 2));
  NetpbmReader reader(memory(text), 1);
  Picture picture;
  EXPECT_TRUE(reader.read(picture));
  expect_error(ErrorCode::kFormat,
               {"memory", "frame size changed", "frame 1", "expected 2 x 2", "found 2 x 3"},
               [&] { reader.read(picture); });
  const std::string grey = ppm(1, 1, "abc") + "P5 1 1 255 a";
  NetpbmReader other(memory(grey), 1);
  EXPECT_TRUE(other.read(picture));
  expect_error(ErrorCode::kFormat, {"frame size changed", "grey"}, [&] { other.read(picture); });
}

TEST(Netpbm, TruncatedAtEveryLength) {
  const std::string whole = ppm(2, 2, noise(12, 1)) + ppm(2, 2, noise(12, 2));
  const std::size_t one = whole.size() / 2;
  for (std::size_t size = 0; size <= whole.size(); ++size) {
    const std::string part = whole.substr(0, size);
    NetpbmReader reader(memory(part), 1);
    if (size % one == 0) {
      EXPECT_EQ(read_all(reader).size(), size / one);
    } else {
      expect_error(ErrorCode::kFormat, {"memory", "truncated picture"}, [&] { read_all(reader); });
    }
  }
}

TEST(Netpbm, WhatIsWrongIsNamed) {
  const auto check = [](ErrorCode code, std::initializer_list<std::string_view> parts,
                        const std::string& text) {
    NetpbmReader reader(memory(text), 1);
    expect_error(code, parts, [&] { read_all(reader); });
  };
  check(ErrorCode::kFormat, {"magic number", "P3"}, "P3\n1 1\n255\n1 2 3");
  check(ErrorCode::kFormat, {"magic number"}, "GIF89a");
  check(ErrorCode::kFormat, {"magic number"}, "P6x");
  check(ErrorCode::kFormat, {"not a number", "width"}, "P6\n-1 1\n255\n");
  check(ErrorCode::kFormat, {"not a number", "height"}, "P6\n1 1234567890\n255\n");
  check(ErrorCode::kFormat, {"size out of range", "0 x 1"}, "P6\n0 1\n255\n");
  check(ErrorCode::kFormat, {"size out of range"}, "P6\n32768 32768\n255\n");
  check(ErrorCode::kUnsupported, {"largest value", "65535"}, "P6\n1 1\n65535\n123456");
  expect_error(ErrorCode::kConfig, {"rate"}, [] { NetpbmReader reader(memory(""), 0); });
}

// A header may promise 200 MB: memory follows the bytes that are there.
TEST(Netpbm, LyingHeadersCostNothing) {
  const std::string text = "P6\n32768 2048\n255\nabc";
  for (int i = 0; i < 1000; ++i) {
    NetpbmReader reader(memory(text), 1);
    Picture picture;
    expect_error(ErrorCode::kFormat, {"truncated picture", "201326592 bytes", "found 3"},
                 [&] { reader.read(picture); });
    EXPECT_LE(picture.pixels.size(), std::size_t{1} << 20);
  }
}

TEST(PictureFiles, AreOneStream) {
  const TempFolder folder;
  const std::string a = folder.write("a.ppm", ppm(1, 1, "abc"));
  const std::string b = folder.write("b.ppm", ppm(1, 1, "def"));
  const std::string c = folder.write("c.ppm", ppm(1, 2, "ghijkl"));
  PictureFiles reader({a, b}, 10);
  const std::vector<Picture> pictures = read_all(reader);
  ASSERT_EQ(pictures.size(), 2U);
  EXPECT_EQ(text_of(pictures[1]), "def");
  EXPECT_EQ(pictures[1].time_ns, 200'000'000);
  PictureFiles changing({a, c}, 10);
  expect_error(ErrorCode::kFormat, {c, "frame size changed"}, [&] { read_all(changing); });
  PictureFiles missing({a, folder.path("none")}, 10);
  expect_error(ErrorCode::kIo, {folder.path("none")}, [&] { read_all(missing); });
  PictureFiles empty({folder.write("empty", "")}, 10);
  expect_error(ErrorCode::kFormat, {"no picture"}, [&] { read_all(empty); });
  PictureFiles none({}, 10);
  EXPECT_TRUE(read_all(none).empty());
}

// --- Raw frames and Y4M
// ----------------------------------------------------------------------------

TEST(RawVideo, WholeFramesOnly) {
  const std::string text = noise(2 * 2 * 3 * 2, 4);
  RawVideoReader reader(memory(text), {2, 2, 3}, 5);
  const std::vector<Picture> pictures = read_all(reader);
  ASSERT_EQ(pictures.size(), 2U);
  EXPECT_EQ(text_of(pictures[1]), text.substr(12));
  const std::string part = text.substr(0, 13);
  RawVideoReader cut(memory(part), {2, 2, 3}, 5);
  expect_error(ErrorCode::kFormat, {"truncated picture", "12 bytes"}, [&] { read_all(cut); });
  expect_error(ErrorCode::kConfig, {"channels"}, [&] {
    RawVideoReader bad(memory(text), {2, 2, 2}, 5);
  });
  expect_error(ErrorCode::kFormat, {"size out of range"}, [&] {
    RawVideoReader bad(memory(text), {0, 2, 3}, 5);
  });
}

// The matrix of BT.601 inverted anew: the exact R, G, B of a Y, Cb, Cr, in double.
std::vector<double> exact_rgb(double y, double cb, double cr, bool full) {
  const double luma = full ? y / 255 : (y - 16) / 219;
  const double blue = (cb - 128) / (full ? 255 : 224);
  const double red = (cr - 128) / (full ? 255 : 224);
  const double r = luma + 2 * (1 - 0.299) * red;
  const double b = luma + 2 * (1 - 0.114) * blue;
  const double g = (luma - 0.299 * r - 0.114 * b) / 0.587;
  std::vector<double> rgb;
  for (const double value : {r, g, b}) rgb.push_back(std::min(std::max(255 * value, 0.0), 255.0));
  return rgb;
}

TEST(Y4m, EverySamplingAgainstTheDefinition) {
  struct Sampling {
    const char* name;
    std::int64_t across;
    std::int64_t down;
  };
  constexpr std::int64_t kWidth = 5;
  constexpr std::int64_t kHeight = 3;
  for (const Sampling& sampling :
       {Sampling{"420jpeg", 2, 2}, Sampling{"420mpeg2", 2, 2}, Sampling{"420", 2, 2},
        Sampling{"422", 2, 1}, Sampling{"444", 1, 1}}) {
    for (const bool full : {false, true}) {
      const std::int64_t cw = (kWidth + sampling.across - 1) / sampling.across;
      const std::int64_t ch = (kHeight + sampling.down - 1) / sampling.down;
      const std::string planes = noise(kWidth * kHeight + 2 * cw * ch, 7);
      const std::string text = std::string("YUV4MPEG2 W5 H3 F30000:1001 Ip A1:1 C") +
                               sampling.name + (full ? " XCOLORRANGE=FULL" : "") + "\nFRAME\n" +
                               planes + "FRAME Xparameter\n" + planes;
      Y4mReader reader(memory(text));
      EXPECT_DOUBLE_EQ(reader.rate(), 30000.0 / 1001.0);
      const std::vector<Picture> pictures = read_all(reader);
      ASSERT_EQ(pictures.size(), 2U);
      EXPECT_EQ(pictures[1].pixels, pictures[0].pixels);
      const auto plane = [&](std::int64_t at) {
        return static_cast<double>(
            static_cast<unsigned char>(planes[static_cast<std::size_t>(at)]));
      };
      for (std::int64_t y = 0; y < kHeight; ++y) {
        for (std::int64_t x = 0; x < kWidth; ++x) {
          const std::int64_t chroma =
              kWidth * kHeight + y / sampling.down * cw + x / sampling.across;
          const std::vector<double> rgb =
              exact_rgb(plane(y * kWidth + x), plane(chroma), plane(chroma + cw * ch), full);
          for (std::int64_t c = 0; c < 3; ++c)
            // Half a step of rounding, and the six digits of the float coefficients.
            EXPECT_NEAR(pictures[0].pixels[static_cast<std::size_t>((y * kWidth + x) * 3 + c)],
                        rgb[static_cast<std::size_t>(c)], 0.501);
        }
      }
    }
  }
}

TEST(Y4m, MonoIsGrey) {
  const std::string text = "YUV4MPEG2 W2 H1 F25:1 Cmono\nFRAME\nab";
  Y4mReader reader(memory(text), 50);
  EXPECT_EQ(reader.rate(), 50);
  const std::vector<Picture> pictures = read_all(reader);
  ASSERT_EQ(pictures.size(), 1U);
  EXPECT_EQ(text_of(pictures[0]), "ab");
}

TEST(Y4m, TruncatedAtEveryLength) {
  const std::string header = "YUV4MPEG2 W2 H2 F1:1 C444\n";
  const std::string frame = "FRAME\n" + noise(12, 3);
  const std::string whole = header + frame + frame;
  for (std::size_t size = 0; size <= whole.size(); ++size) {
    const std::string part = whole.substr(0, size);
    const auto read = [&] {
      Y4mReader reader(memory(part));
      return read_all(reader).size();
    };
    if (size >= header.size() && (size - header.size()) % frame.size() == 0) {
      EXPECT_EQ(read(), (size - header.size()) / frame.size());
    } else {
      expect_error(ErrorCode::kFormat, {"memory", "truncated"}, read);
    }
  }
}

TEST(Y4m, WhatIsWrongIsNamed) {
  const auto check = [](ErrorCode code, std::initializer_list<std::string_view> parts,
                        const std::string& text) {
    expect_error(code, parts, [&] {
      Y4mReader reader(memory(text));
      read_all(reader);
    });
  };
  check(ErrorCode::kFormat, {"not a Y4M stream"}, "RIFFxxxx\n");
  check(ErrorCode::kFormat, {"size out of range"}, "YUV4MPEG2 F1:1\n");
  check(ErrorCode::kFormat, {"size out of range"}, "YUV4MPEG2 W99999 H1 F1:1\n");
  check(ErrorCode::kFormat, {"not a number", "width"}, "YUV4MPEG2 Wx H1 F1:1\n");
  check(ErrorCode::kFormat, {"frame rate"}, "YUV4MPEG2 W1 H1 F1\n");
  check(ErrorCode::kFormat, {"frame rate", "0:1"}, "YUV4MPEG2 W1 H1 F0:1\n");
  check(ErrorCode::kUnsupported, {"sampling", "420p10"}, "YUV4MPEG2 W1 H1 F1:1 C420p10\n");
  check(ErrorCode::kFormat, {"line is too long"}, "YUV4MPEG2 " + std::string(2000, 'x') + "\n");
  check(ErrorCode::kFormat, {"frame header"}, "YUV4MPEG2 W1 H1 F1:1 C444\nFRAMExx\nabc");
}

// --- ffmpeg --------------------------------------------------------------------------------------

bool has_ffmpeg() {
  try {
    detail::ChildProcess process({"ffmpeg", "-version"});
    ByteSource source = process.output("ffmpeg");
    source.skip(1 << 20);
    process.finish();
    return true;
  } catch (const Error&) {
    return false;
  }
}

// PPM in, PPM out: ffmpeg must give the very pixels. The folder's name holds what a shell or a
// format would read something into.
TEST(Ffmpeg, FramesComeThroughThePipeUnchanged) {
  if (!has_ffmpeg()) GTEST_SKIP() << "no ffmpeg here";
  const TempFolder folder;
  std::string frames;
  std::vector<std::string> expected;
  for (std::uint64_t i = 0; i < 5; ++i) {
    expected.push_back(noise(8 * 6 * 3, i));
    frames += ppm(8, 6, expected.back());
  }
  const std::string path = folder.write("-a b'$(touch x);\"c.ppm", frames);
  FfmpegVideo video(path, {.input_arguments = {"-f", "ppm_pipe", "-framerate", "10"}, .rate = 10});
  const std::vector<Picture> pictures = read_all(video);
  ASSERT_EQ(pictures.size(), 5U);
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(text_of(pictures[i]), expected[i]) << i;
  EXPECT_EQ(pictures[4].time_ns, 500'000'000);
  EXPECT_EQ(video.name(), path);
  Picture picture;
  EXPECT_FALSE(video.read(picture));  // the end stays the end
}

TEST(Ffmpeg, RateAndSizeAreWhatWasAskedFor) {
  if (!has_ffmpeg()) GTEST_SKIP() << "no ffmpeg here";
  FfmpegVideo video("testsrc=duration=2:size=64x48:rate=25",
                    {.input_arguments = {"-f", "lavfi"}, .rate = 5, .width = 32});
  const std::vector<Picture> pictures = read_all(video);
  EXPECT_EQ(pictures.size(), 10U);
  for (const Picture& picture : pictures) EXPECT_EQ(picture.format, (PictureFormat{32, 24, 3}));
}

TEST(Ffmpeg, ItsFailureIsReported) {
  if (!has_ffmpeg()) GTEST_SKIP() << "no ffmpeg here";
  const TempFolder folder;
  Picture picture;
  FfmpegVideo missing(folder.path("none.mp4"), {});
  expect_error(ErrorCode::kIo, {"the program failed", "ffmpeg", "No such file"},
               [&] { missing.read(picture); });
  FfmpegVideo text(folder.write("text.mp4", "no video"), {});
  expect_error(ErrorCode::kIo, {"the program failed", "status"}, [&] { text.read(picture); });
}

TEST(Ffmpeg, AVideoThatNobodyReadsAnyMoreEnds) {
  if (!has_ffmpeg()) GTEST_SKIP() << "no ffmpeg here";
  FfmpegVideo endless("testsrc=size=64x48:rate=25",
                      {.input_arguments = {"-f", "lavfi"}, .rate = 25});
  Picture picture;
  EXPECT_TRUE(endless.read(picture));
}

TEST(Ffmpeg, AProgramThatIsNotThere) {
  expect_error(ErrorCode::kIo, {"cannot start the program", "no such program here"},
               [] { FfmpegVideo video("x.mp4", {.program = "no such program here"}); });
  expect_error(ErrorCode::kConfig, {"rate"}, [] { FfmpegVideo video("x.mp4", {.rate = 0}); });
  expect_error(ErrorCode::kConfig, {"width"}, [] { FfmpegVideo video("x.mp4", {.width = -2}); });
}

// A picture that is refused while the program goes on writing: whoever waited for its end would
// wait for ever.
TEST(Ffmpeg, APictureThatIsRefusedEndsIt) {
  const TempFolder folder;
  const std::string program = folder.write(
      "endless", "#!/bin/sh\nprintf 'P6\\n16384 16384\\n255\\n'\nexec cat /dev/zero\n");
  std::filesystem::permissions(program, std::filesystem::perms::owner_all);
  FfmpegVideo video("x.mp4", {.program = program});
  Picture picture;
  expect_error(ErrorCode::kFormat, {"picture"}, [&] { video.read(picture); });
}

// A program that gives no picture, or half of one, and does not end by itself.
TEST(Ffmpeg, CanBeStoppedWhileNothingComes) {
  const TempFolder folder;
  for (const char* first : {":", "printf 'P6\\n16 16\\n255\\nhalf'"}) {
    const std::string program =
        folder.write("silent", std::string("#!/bin/sh\n") + first + "\nexec sleep 60\n");
    std::filesystem::permissions(program, std::filesystem::perms::owner_all);
    static int asked = 0;
    asked = 0;
    FfmpegVideo video("x.mp4", {.program = program, .stop_when = [] {
                                  return ++asked > 2;
                                }});
    Picture picture;
    EXPECT_FALSE(video.read(picture)) << first;
    EXPECT_GT(asked, 2);
    EXPECT_LT(asked, 20);
  }
}

// More than any pipe holds, on both outputs by turns: neither side waits for the other, and the
// message has the end of it.
TEST(ChildProcess, ComplaintsWithoutEndAreReadAndTheirEndKept) {
  const TempFolder folder;
  const std::string program = folder.write(
      "complains",
      "#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' a >&2\n"
      "head -c 200000 /dev/zero\n"
      "head -c 3000000 /dev/zero | tr '\\0' b >&2\necho 'the last words' >&2\nexit 7\n");
  std::filesystem::permissions(program, std::filesystem::perms::owner_all);
  detail::ChildProcess process({program});
  ByteSource source = process.output("complains");
  std::vector<std::byte> bytes(300000);
  EXPECT_EQ(source.read(bytes), 200000U);
  try {
    process.finish();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo);
    const std::string& found = error.detail().found;
    EXPECT_TRUE(found.starts_with("status 7: bbb")) << found.substr(0, 40);
    EXPECT_TRUE(found.ends_with("bbbthe last words")) << found.substr(found.size() - 40);
    EXPECT_LT(found.size(), 650U);
  }
}

// Whoever has what it wants ends the program, whatever that still has to say about it.
TEST(ChildProcess, EndsWhileItComplains) {
  const TempFolder folder;
  const std::string program =
      folder.write("complains", "#!/bin/sh\necho x\nexec yes 'and another thing' >&2\n");
  std::filesystem::permissions(program, std::filesystem::perms::owner_all);
  detail::ChildProcess process({program});
  ByteSource source = process.output("complains");
  std::vector<std::byte> bytes(2);
  EXPECT_EQ(source.read(bytes), 2U);
}

// A program that leaves another behind, which keeps the pipes open: its own end is what counts.
TEST(ChildProcess, IsNotWaitedForLongerThanItLives) {
  detail::ChildProcess process({"sh", "-c", "exec >&-; sleep 30 & echo gone >&2; exit 3"});
  ByteSource source = process.output("sh");
  std::vector<std::byte> bytes(2);
  EXPECT_EQ(source.read(bytes), 0U);
  const auto begin = std::chrono::steady_clock::now();
  expect_error(ErrorCode::kIo, {"status 3", "gone"}, [&] { process.finish(); });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
}

// The shell ignores the request to end, and nobody reads its output.
TEST(ChildProcess, OneThatWillNotEndIsMadeTo) {
  const auto begin = std::chrono::steady_clock::now();
  pid_t child = 0;
  {
    detail::ChildProcess process(
        {"sh", "-c", "trap '' TERM INT HUP PIPE; echo $$; while :; do sleep 0.1; done"});
    ByteSource source = process.output("sh");
    char digit = 0;
    while (source.read(std::as_writable_bytes(std::span(&digit, 1))) == 1 && digit != '\n')
      child = 10 * child + (digit - '0');
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin,
            detail::ChildProcess::kGrace + std::chrono::seconds(5));
  ASSERT_GT(child, 0);
  EXPECT_EQ(::kill(child, 0), -1);  // it is gone
  EXPECT_EQ(errno, ESRCH);
}

// Its output has ended, it has not.
TEST(ChildProcess, OneThatGoesOnWithoutOutputIsAnError) {
  detail::ChildProcess process({"sh", "-c", "exec >&-; echo 'still busy' >&2; exec sleep 60"});
  ByteSource source = process.output("sh");
  std::byte letter{};
  EXPECT_EQ(source.read(std::span(&letter, 1)), 0U);
  const auto begin = std::chrono::steady_clock::now();
  expect_error(ErrorCode::kIo, {"does not end with its output", "sh", "goes on", "still busy"},
               [&] { process.finish(std::chrono::milliseconds(200)); });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
  process.finish();  // there is none any more
}

TEST(PipeTail, KeepsTheEndInBoundedMemory) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  detail::PipeTail tail(ends[0]);
  tail.read();  // nothing there: does not wait
  EXPECT_EQ(tail.text(), "");
  std::string all;
  for (int i = 0; i < 5000; ++i) {
    const std::string line = "line " + std::to_string(i) + "\n";
    ASSERT_EQ(::write(ends[1], line.data(), line.size()), static_cast<ssize_t>(line.size()));
    all += line;
    tail.read();
    ASSERT_LE(tail.text().size(), detail::PipeTail::kKept);
  }
  EXPECT_EQ(tail.text(), all.substr(all.size() - detail::PipeTail::kKept));
  EXPECT_GE(tail.descriptor(), 0);
  ::close(ends[1]);
  tail.read();
  EXPECT_LT(tail.descriptor(), 0);  // the end
}

TEST(ChildProcess, ArgumentsStayWhatTheyAre) {
  const std::string strange = "a b\n'\"$HOME`*;|&\\";
  detail::ChildProcess process({"printf", "%s", strange});
  ByteSource source = process.output("printf");
  std::vector<std::byte> bytes(100);
  bytes.resize(source.read(bytes));
  process.finish();
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), strange);
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
