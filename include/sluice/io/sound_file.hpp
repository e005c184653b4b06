// SPDX-License-Identifier: MIT
/// Compressed audio through libsndfile: FLAC, Ogg Vorbis and Opus, MP3, AIFF and what else it
/// reads. Needs the target sluice::audio.
#pragma once

#include <sndfile.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "sluice/core/error.hpp"
#include "sluice/io/audio_input.hpp"
#include "sluice/io/byte_source.hpp"
#include "sluice/io/wav.hpp"

namespace sluice {

/// A sound file that libsndfile decodes. Movable, not copyable.
class SoundFileReader final : public AudioReader {
 public:
  /// \throws Error(kIo) if the file cannot be opened; kFormat with libsndfile's reason if it cannot
  /// be read.
  explicit SoundFileReader(std::string path) : name_(std::move(path)) {
    ByteSource::open(name_);  // says why a file cannot be opened; libsndfile does not
    SF_INFO info{};
    file_.reset(sf_open(name_.c_str(), SFM_READ, &info));
    if (file_ == nullptr)
      throw Error(ErrorCode::kFormat,
                  {"not a sound file that libsndfile reads", name_, "", "", sf_strerror(nullptr)});
    format_ = {info.samplerate, info.channels};
    detail::check_audio_format(format_, "SoundFileReader");
    // Streams of unknown length promise the largest number there is.
    if (info.frames < (sf_count_t{1} << 60)) promised_ = info.frames;
  }

  AudioFormat format() const override { return format_; }
  const std::string& name() const override { return name_; }

  /// \throws Error(kFormat) if the file ends before the frames that its header promises, after
  /// those that are there; or if its content is damaged where libsndfile notices.
  std::int64_t read(std::int64_t frames, float* out) override {
    sf_count_t count = 0;
    if (damage_ == SF_ERR_NO_ERROR) {
      count = sf_readf_float(file_.get(), out, frames);
      damage_ = sf_error(file_.get());
    }
    if (count == 0 && damage_ != SF_ERR_NO_ERROR)  // once what came before it is handed out
      throw Error(ErrorCode::kFormat, {"damaged audio", name_, "frame " + std::to_string(read_), "",
                                       sf_error_number(damage_)});
    read_ += count;
    if (count == 0 && frames > 0 && read_ < promised_)
      throw Error(ErrorCode::kFormat,
                  {"truncated audio", name_, "samples", std::to_string(promised_) + " frames",
                   std::to_string(read_) + " frames"});
    return count;
  }

 private:
  struct Close {
    void operator()(SNDFILE* file) const noexcept { sf_close(file); }
  };
  std::string name_;
  std::unique_ptr<SNDFILE, Close> file_;
  AudioFormat format_;
  std::int64_t promised_ = 0;
  std::int64_t read_ = 0;
  int damage_ = SF_ERR_NO_ERROR;
};

/// Any audio file as a model wants it: WAV by our own reader, everything else through libsndfile;
/// "-" is WAV on standard input. \throws Error as the readers and AudioInput; kUnsupported for
/// anything but WAV where the path is no regular file: libsndfile would have to read the first
/// bytes again, and a pipe has them once.
inline AudioInput open_audio(const std::string& path, AudioInputConfig config = {}) {
  if (path == "-") return open_wav(ByteSource::standard_input(), config);
  ByteSource source = ByteSource::open(path);
  source.stop_when(config.stop_when);
  std::array<std::byte, 12> front{};
  const std::size_t held = source.read(front);
  if (std::memcmp(front.data(), "RIFF", 4) == 0 && std::memcmp(front.data() + 8, "WAVE", 4) == 0) {
    source.put_back(std::span(front).first(held));  // a pipe has them once
    return open_wav(std::move(source), config);
  }
  std::error_code none;
  if (!std::filesystem::is_regular_file(path, none))
    throw Error(ErrorCode::kUnsupported,
                {"only WAV is read from what is no regular file", path, "magic number at byte 0",
                 "RIFF and WAVE", held == 0 ? "the end" : "another"});
  return AudioInput(std::make_unique<SoundFileReader>(path), config);
}

}  // namespace sluice
