// SPDX-License-Identifier: MIT
/// Audio that lies uncompressed in a file or comes through a pipe: WAV and raw samples. Nothing
/// seeks. The content is untrusted: every length is checked, and no memory is taken on its word.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/byte_source.hpp"

namespace sluice {

/// What a stream of audio is.
struct AudioFormat {
  std::int64_t sample_rate = 16000;  ///< frames a second
  std::int64_t channels = 1;         ///< samples a frame

  friend bool operator==(const AudioFormat&, const AudioFormat&) = default;
};

/// Where audio comes from. A frame is one sample of each channel, interleaved; full scale is 1.
class AudioReader {
 public:
  virtual ~AudioReader() = default;
  virtual AudioFormat format() const = 0;
  /// Reads at most `frames` frames to `out`, [frames, channels]: how many there were, 0 only at the
  /// end (and for frames = 0). Waits for the first of them. \throws Error as the reader says.
  virtual std::int64_t read(std::int64_t frames, float* out) = 0;
  /// What errors call it.
  virtual const std::string& name() const = 0;
};

/// How a sample is stored. Little endian, as WAV has it.
enum class SampleEncoding : std::uint8_t { kU8, kS16, kS24, kS32, kF32, kF64 };

constexpr std::int64_t bytes_of(SampleEncoding encoding) {
  switch (encoding) {
    case SampleEncoding::kU8: return 1;
    case SampleEncoding::kS16: return 2;
    case SampleEncoding::kS24: return 3;
    case SampleEncoding::kS32:
    case SampleEncoding::kF32: return 4;
    case SampleEncoding::kF64: return 8;
  }
  return 0;
}

namespace detail {

inline std::uint32_t little_endian_32(const std::byte* bytes) {
  std::uint32_t value = 0;
  for (int i = 3; i >= 0; --i) value = value << 8 | std::to_integer<std::uint32_t>(bytes[i]);
  return value;
}
inline std::uint16_t little_endian_16(const std::byte* bytes) {
  return static_cast<std::uint16_t>(std::to_integer<unsigned>(bytes[0]) |
                                    std::to_integer<unsigned>(bytes[1]) << 8);
}

inline float decode_sample(SampleEncoding encoding, const std::byte* bytes) {
  switch (encoding) {
    case SampleEncoding::kU8:
      return static_cast<float>(std::to_integer<int>(bytes[0]) - 128) * 0x1p-7F;
    case SampleEncoding::kS16:
      return static_cast<float>(static_cast<std::int16_t>(little_endian_16(bytes))) * 0x1p-15F;
    case SampleEncoding::kS24: {
      const std::uint32_t high = std::to_integer<std::uint32_t>(bytes[2]) << 24;
      const std::uint32_t low = static_cast<std::uint32_t>(little_endian_16(bytes)) << 8;
      return static_cast<float>(static_cast<std::int32_t>(high | low)) * 0x1p-31F;
    }
    case SampleEncoding::kS32:
      return static_cast<float>(static_cast<std::int32_t>(little_endian_32(bytes))) * 0x1p-31F;
    case SampleEncoding::kF32: return std::bit_cast<float>(little_endian_32(bytes));
    case SampleEncoding::kF64: {
      const auto value = std::bit_cast<double>(
          static_cast<std::uint64_t>(little_endian_32(bytes + 4)) << 32 | little_endian_32(bytes));
      return static_cast<float>(value);
    }
  }
  return 0.0F;
}

inline void check_audio_format(const AudioFormat& format, const char* where) {
  const auto require = [&](bool sound, const char* field, const char* expected,
                           std::int64_t found) {
    if (!sound)
      throw Error(ErrorCode::kConfig,
                  {"option out of range", where, field, expected, std::to_string(found)});
  };
  require(format.sample_rate >= 1 && format.sample_rate <= 1'000'000, "sample_rate",
          "1 to 1000000 Hz", format.sample_rate);
  require(format.channels >= 1 && format.channels <= 64, "channels", "1 to 64", format.channels);
}

}  // namespace detail

/// Samples one behind the other without a header, from a byte source: what `arecord -t raw`,
/// `ffmpeg -f s16le` and sox write. Blocks in the source until samples are there.
class PcmReader final : public AudioReader {
 public:
  /// byte_count: bytes of samples that the source promises; none: until it ends.
  /// \throws Error(kConfig) for a format that is no format.
  PcmReader(ByteSource source, AudioFormat format, SampleEncoding encoding,
            std::optional<std::uint64_t> byte_count = std::nullopt)
      : source_(std::move(source)),
        format_(format),
        encoding_(encoding),
        frame_bytes_(static_cast<std::size_t>(bytes_of(encoding) * format.channels)),
        promised_(byte_count) {
    detail::check_audio_format(format, "PcmReader");
    bytes_.resize(std::max<std::size_t>(kBlockBytes / frame_bytes_, 1) * frame_bytes_);
  }

  AudioFormat format() const override { return format_; }
  SampleEncoding encoding() const noexcept { return encoding_; }
  /// Frames read so far, and those that the header promised.
  std::int64_t frames_read() const noexcept { return frames_; }
  std::optional<std::int64_t> frames_promised() const noexcept {
    if (!promised_) return std::nullopt;
    return static_cast<std::int64_t>(*promised_ / frame_bytes_);
  }
  const std::string& name() const override { return source_.name(); }

  /// The frames that are there come first; if the source then ends before its promise, or inside a
  /// frame, the call after the last of them
  /// \throws Error(kFormat) "truncated", with the frames expected and found.
  std::int64_t read(std::int64_t frames, float* out) override {
    std::int64_t done = 0;
    while (done < frames && done == 0) {  // one piece: a live source must not be waited for twice
      std::size_t wanted = bytes_.size();
      wanted = std::min(wanted, static_cast<std::size_t>(std::min<std::int64_t>(
                                    frames, static_cast<std::int64_t>(bytes_.size()))) *
                                    frame_bytes_);
      if (promised_) {
        const std::uint64_t left = *promised_ - consumed_;
        if (left < frame_bytes_) return 0;
        wanted = static_cast<std::size_t>(std::min<std::uint64_t>(wanted, left));
      }
      const std::size_t count =
          source_.read_some(std::span(bytes_).subspan(partial_, wanted - partial_));
      if (count == 0) {
        if (promised_ || partial_ > 0) fail_truncated();
        return 0;
      }
      const std::size_t held = partial_ + count;
      const std::size_t whole = held / frame_bytes_;
      const auto sample_bytes = static_cast<std::size_t>(bytes_of(encoding_));
      for (std::size_t i = 0; i < whole * static_cast<std::size_t>(format_.channels); ++i)
        out[i] = detail::decode_sample(encoding_, bytes_.data() + i * sample_bytes);
      partial_ = held - whole * frame_bytes_;
      if (partial_ > 0) std::memmove(bytes_.data(), bytes_.data() + whole * frame_bytes_, partial_);
      consumed_ += whole * frame_bytes_;
      done += static_cast<std::int64_t>(whole);
      frames_ += static_cast<std::int64_t>(whole);
    }
    return done;
  }

 private:
  static constexpr std::size_t kBlockBytes = 16384;

  [[noreturn]] void fail_truncated() const {
    std::string expected = "whole frames of " + std::to_string(frame_bytes_) + " bytes";
    if (promised_) expected = std::to_string(*promised_ / frame_bytes_) + " frames";
    std::string found = std::to_string(frames_) + " frames";
    if (partial_ > 0) found += " and " + std::to_string(partial_) + " bytes";
    source_.fail_at(source_.offset(), "truncated audio", "samples", std::move(expected),
                    std::move(found));
  }

  ByteSource source_;
  AudioFormat format_;
  SampleEncoding encoding_;
  std::size_t frame_bytes_;
  std::optional<std::uint64_t> promised_;  // bytes
  std::uint64_t consumed_ = 0;             // bytes, whole frames
  std::size_t partial_ = 0;                // bytes of a frame at the front of bytes_
  std::int64_t frames_ = 0;
  std::vector<std::byte> bytes_;
};

/// Reads a WAV header (RIFF, "WAVE", chunks up to "data") and gives a reader of its samples.
/// Integer samples of 8, 16, 24 and 32 bits, float of 32 and 64, plain and WAVE_FORMAT_EXTENSIBLE;
/// other chunks are passed over. A writer that could not seek leaves a length of 0xFFFFFFFF
/// (ffmpeg) or one from 0x7FFFF000 on (sox): such a file is read until it ends, whole frames.
/// Source: Microsoft's "Multimedia Programming Interface and Data Specifications 1.0", RIFF WAVE.
/// \throws Error(kFormat) naming file, field with its byte offset, expected and found; kUnsupported
/// for another encoding (A-law, ADPCM ...) and for RF64.
inline PcmReader read_wav(ByteSource source) {
  const auto take = [&](std::span<std::byte> out, const char* field) {
    const std::uint64_t begin = source.offset();
    const std::size_t count = source.read(out);
    if (count != out.size())
      source.fail_at(begin, "truncated WAV header", field, std::to_string(out.size()) + " bytes",
                     std::to_string(count));
  };
  const auto word_is = [](const std::byte* bytes, const char* word) {
    return std::memcmp(bytes, word, 4) == 0;
  };

  std::array<std::byte, 12> riff;
  take(riff, "RIFF header");
  if (word_is(riff.data(), "RF64") || word_is(riff.data(), "RIFX"))
    source.fail_at(0, "kind of WAV file is not implemented", "RIFF header", "RIFF",
                   "RF64 or big endian", ErrorCode::kUnsupported);
  if (!word_is(riff.data(), "RIFF") || !word_is(riff.data() + 8, "WAVE"))
    source.fail_at(0, "not a WAV file", "RIFF header", "RIFF and WAVE", "other bytes");

  AudioFormat format;
  SampleEncoding encoding = SampleEncoding::kU8;
  std::int64_t frame_bytes = 0;  // 0 until a format chunk was read
  for (;;) {
    const std::uint64_t begin = source.offset();
    std::array<std::byte, 8> header;
    take(header, frame_bytes != 0 ? "chunk header before data" : "chunk header before fmt");
    const std::uint32_t size = detail::little_endian_32(header.data() + 4);
    if (word_is(header.data(), "fmt ")) {
      std::array<std::byte, 40> fmt{};
      const std::size_t held = std::min<std::size_t>(size, fmt.size());
      if (size < 16)
        source.fail_at(begin, "format chunk is too short", "fmt", "at least 16 bytes",
                       std::to_string(size));
      take(std::span(fmt).first(held), "fmt");
      const std::uint64_t rest = size - held + size % 2;
      if (source.skip(rest) != rest)
        source.fail_at(begin, "truncated WAV header", "fmt", std::to_string(size) + " bytes",
                       "fewer");
      unsigned tag = detail::little_endian_16(fmt.data());
      const unsigned channels = detail::little_endian_16(fmt.data() + 2);
      const std::uint32_t rate = detail::little_endian_32(fmt.data() + 4);
      const unsigned block = detail::little_endian_16(fmt.data() + 12);
      const unsigned bits = detail::little_endian_16(fmt.data() + 14);
      if (tag == 0xFFFE) {
        if (size < 40)
          source.fail_at(begin, "format chunk is too short", "fmt extension", "40 bytes",
                         std::to_string(size));
        tag = detail::little_endian_16(fmt.data() + 24);
      }
      if (tag == 1 && bits == 8) {
        encoding = SampleEncoding::kU8;
      } else if (tag == 1 && bits == 16) {
        encoding = SampleEncoding::kS16;
      } else if (tag == 1 && bits == 24) {
        encoding = SampleEncoding::kS24;
      } else if (tag == 1 && bits == 32) {
        encoding = SampleEncoding::kS32;
      } else if (tag == 3 && bits == 32) {
        encoding = SampleEncoding::kF32;
      } else if (tag == 3 && bits == 64) {
        encoding = SampleEncoding::kF64;
      } else {
        source.fail_at(begin + 8, "WAV encoding is not implemented", "format tag and bits",
                       "1 with 8, 16, 24, 32 or 3 with 32, 64",
                       std::to_string(tag) + " with " + std::to_string(bits),
                       ErrorCode::kUnsupported);
      }
      if (channels < 1 || channels > 64)
        source.fail_at(begin + 10, "channels out of range", "channels", "1 to 64",
                       std::to_string(channels));
      if (rate < 1 || rate > 1'000'000)
        source.fail_at(begin + 12, "sample rate out of range", "sample rate", "1 to 1000000 Hz",
                       std::to_string(rate));
      format = {rate, channels};
      frame_bytes = bytes_of(encoding) * format.channels;
      if (static_cast<std::int64_t>(block) != frame_bytes)
        source.fail_at(begin + 20, "frame size does not fit the format", "block align",
                       std::to_string(frame_bytes), std::to_string(block));
    } else if (word_is(header.data(), "data")) {
      if (frame_bytes == 0)
        source.fail_at(begin, "samples before the format", "data", "a fmt chunk before it", "none");
      std::optional<std::uint64_t> promised;
      constexpr std::uint32_t kUnknownFrom = 0x7FFFF000;
      if (size < kUnknownFrom) {
        promised = size;
        if (size % frame_bytes != 0)
          source.fail_at(begin + 4, "samples do not divide into frames", "data length",
                         "a multiple of " + std::to_string(frame_bytes), std::to_string(size));
      }
      return PcmReader(std::move(source), format, encoding, promised);
    } else {
      const std::uint64_t length = std::uint64_t{size} + size % 2;
      if (source.skip(length) != length)
        source.fail_at(begin, "truncated WAV header", "chunk", std::to_string(size) + " bytes",
                       "fewer");
    }
  }
}

/// The same from a file. \throws Error(kIo) besides.
inline PcmReader read_wav(const std::string& path) {
  return read_wav(ByteSource::open(path));
}

}  // namespace sluice
