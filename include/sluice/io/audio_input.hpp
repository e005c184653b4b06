// SPDX-License-Identifier: MIT
/// Audio as a model wants it: one channel, one rate, finite samples, from whatever a reader gives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/error.hpp"
#include "sluice/io/resampler.hpp"
#include "sluice/io/wav.hpp"

namespace sluice {

/// What becomes of a sample that is NaN or infinite.
enum class NonFinite : std::uint8_t {
  kReject,  ///< an error that names its place
  kZero,    ///< silence, counted
};

struct AudioInputConfig {
  std::int64_t sample_rate = 16000;  ///< Hz, what the model was trained with
  /// The channel to take, from 0; none: the mean of all.
  std::optional<std::int64_t> channel = std::nullopt;
  /// Whether audio of another rate is resampled; otherwise it is refused.
  bool resample = true;
  ResamplerConfig resampler = {};
  NonFinite non_finite = NonFinite::kReject;
  /// What open_wav(), open_pcm() and open_audio() tell the bytes that they read
  /// (ByteSource::stop_when): where it answers true, a wait for bytes is their end.
  bool (*stop_when)() = nullptr;
};

/// One channel at the configured rate. Reads in pieces; what a live source has is handed on at
/// once. Not for several threads at a time. Allocates at construction only, as long as the reader
/// does.
class AudioInput {
 public:
  /// \throws Error(kUnsupported) if the rate is another and may not be resampled, or the two have
  /// no manageable ratio; kConfig if the channel does not exist or an option makes no sense.
  explicit AudioInput(std::unique_ptr<AudioReader> reader, AudioInputConfig config = {})
      : reader_(std::move(reader)),
        config_(config),
        format_(reader_->format()),
        resampler_(checked_rate(), config.sample_rate, config.resampler),
        frames_(static_cast<std::size_t>(kBlock * format_.channels)),
        mono_(kBlock) {
    if (config.channel && (*config.channel < 0 || *config.channel >= format_.channels))
      throw Error(ErrorCode::kConfig, {"no such channel", reader_->name(), "channel",
                                       "0 to " + std::to_string(format_.channels - 1),
                                       std::to_string(*config.channel)});
    ready_.resize(
        static_cast<std::size_t>(resampler_.max_outputs(kBlock) + resampler_.max_flush_outputs()));
  }

  std::int64_t sample_rate() const noexcept { return config_.sample_rate; }
  /// What the reader has, before mixing and resampling.
  const AudioFormat& source_format() const noexcept { return format_; }
  const std::string& name() const { return reader_->name(); }

  /// Reads at most out.size() samples: how many, 0 only at the end (and for an empty `out`, which
  /// changes nothing). Waits for the first of them.
  /// \throws Error(kFormat) naming the frame for a sample that is not finite (kReject), and what
  /// the reader throws, after the samples before it were handed out; from then on every call does.
  std::int64_t read(std::span<float> out) {
    std::size_t done = 0;
    while (done == 0 && !out.empty()) {
      if (next_ == end_ && !refill()) break;
      done = std::min(out.size(), end_ - next_);
      std::copy_n(ready_.data() + next_, done, out.data());
      next_ += done;
    }
    samples_ += static_cast<std::int64_t>(done);
    return static_cast<std::int64_t>(done);
  }

  /// Reads until `out` is full or the audio ends: how many. An error behind samples that were read
  /// is thrown by the next call.
  std::int64_t read_full(std::span<float> out) {
    std::int64_t done = 0;
    while (done < static_cast<std::int64_t>(out.size())) {
      std::int64_t count = 0;
      try {
        count = read(out.subspan(static_cast<std::size_t>(done)));
      } catch (const Error&) {
        if (done == 0) throw;
      }
      if (count == 0) break;
      done += count;
    }
    return done;
  }

  /// Samples handed out since the start.
  std::int64_t samples() const noexcept { return samples_; }
  /// Samples that were not finite and became silence, in all channels together.
  std::int64_t zeroed() const noexcept { return zeroed_; }

 private:
  static constexpr std::int64_t kBlock = 2048;

  std::int64_t checked_rate() const {
    if (!config_.resample && format_.sample_rate != config_.sample_rate)
      throw Error(ErrorCode::kUnsupported,
                  {"another sample rate, and resampling is off", reader_->name(), "sample rate",
                   std::to_string(config_.sample_rate) + " Hz",
                   std::to_string(format_.sample_rate) + " Hz"});
    return format_.sample_rate;
  }

  // What cannot be read ends the audio: the rest of the samples before it comes out first.
  bool refill() {
    next_ = end_ = 0;
    while (end_ == 0) {
      if (ended_) {
        if (error_) throw *error_;
        return false;
      }
      std::int64_t count = 0;
      try {
        count = mix(reader_->read(kBlock, frames_.data()));
      } catch (const Error& error) {
        error_ = error;
      }
      if (count > 0)
        end_ = static_cast<std::size_t>(
            resampler_.step(std::span(mono_).first(static_cast<std::size_t>(count)), ready_));
      if (count > 0 && !error_) continue;
      ended_ = true;
      end_ += static_cast<std::size_t>(resampler_.flush(std::span(ready_).subspan(end_)));
    }
    return true;
  }

  // Mixes frames_ into mono_: how many of them, those before a sample that is refused.
  std::int64_t mix(std::int64_t count) {
    const std::int64_t channels = format_.channels;
    for (std::int64_t i = 0; i < count; ++i, ++read_frames_) {
      float* const frame = frames_.data() + i * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        if (std::isfinite(frame[c])) continue;
        if (config_.non_finite == NonFinite::kReject) {
          error_ =
              Error(ErrorCode::kFormat,
                    {"sample is not a finite number", reader_->name(),
                     "frame " + std::to_string(read_frames_) + ", channel " + std::to_string(c),
                     "a finite number", std::isnan(frame[c]) ? "NaN" : "infinity"});
          return i;
        }
        frame[c] = 0.0F;
        ++zeroed_;
      }
      if (config_.channel) {
        mono_[static_cast<std::size_t>(i)] = frame[*config_.channel];
        continue;
      }
      double sum = 0;
      for (std::int64_t c = 0; c < channels; ++c) sum += static_cast<double>(frame[c]);
      mono_[static_cast<std::size_t>(i)] = static_cast<float>(sum / static_cast<double>(channels));
    }
    return count;
  }

  std::unique_ptr<AudioReader> reader_;
  AudioInputConfig config_;
  AudioFormat format_;
  Resampler resampler_;
  std::vector<float> frames_;  // [kBlock, channels]
  std::vector<float> mono_;    // [kBlock]
  std::vector<float> ready_;   // next_ .. end_ - 1 wait to be read
  std::size_t next_ = 0;
  std::size_t end_ = 0;
  bool ended_ = false;
  std::optional<Error> error_;  // what ended it
  std::int64_t read_frames_ = 0;
  std::int64_t samples_ = 0;
  std::int64_t zeroed_ = 0;
};

/// A WAV file, or WAV on a pipe, as a model wants it. \throws Error as read_wav and AudioInput.
inline AudioInput open_wav(ByteSource source, AudioInputConfig config = {}) {
  if (config.stop_when != nullptr) source.stop_when(config.stop_when);
  return AudioInput(std::make_unique<PcmReader>(read_wav(std::move(source))), config);
}
inline AudioInput open_wav(const std::string& path, AudioInputConfig config = {}) {
  return open_wav(ByteSource::open(path), config);
}
/// Raw samples: standard input, a pipe, a file. \throws Error as PcmReader and AudioInput.
inline AudioInput open_pcm(ByteSource source, AudioFormat format, SampleEncoding encoding,
                           AudioInputConfig config = {}) {
  if (config.stop_when != nullptr) source.stop_when(config.stop_when);
  return AudioInput(std::make_unique<PcmReader>(std::move(source), format, encoding), config);
}

/// Audio in packets of a fixed length (the last one shorter), for PacedSource: a packet is due when
/// its last sample is. Joining appends, as far as the packet's room goes.
class AudioPackets {
 public:
  struct Frame {
    std::vector<float> samples;     ///< capacity is the room; size is what is there
    std::int64_t first_sample = 0;  ///< the source clock of the first
  };

  /// packet: samples a packet. room: samples that joined packets may have together; at least
  /// packet. `input` must outlive this object. \throws Error(kConfig).
  AudioPackets(AudioInput& input, std::int64_t packet, std::int64_t room)
      : input_(input), packet_(packet), room_(room) {
    if (packet < 1 || packet > (std::int64_t{1} << 24))
      throw Error(ErrorCode::kConfig, {"option out of range", "AudioPackets", "packet",
                                       "1 to 2^24 samples", std::to_string(packet)});
    if (room < packet || room > (std::int64_t{1} << 28))
      throw Error(ErrorCode::kConfig, {"option out of range", "AudioPackets", "room",
                                       "packet to 2^28 samples", std::to_string(room)});
  }

  Frame make_frame() const {
    Frame frame;
    frame.samples.reserve(static_cast<std::size_t>(room_));
    return frame;
  }
  bool read(Frame& frame) {
    frame.first_sample = input_.samples();
    frame.samples.resize(static_cast<std::size_t>(packet_));
    frame.samples.resize(static_cast<std::size_t>(input_.read_full(frame.samples)));
    return !frame.samples.empty();
  }
  std::int64_t time_ns(const Frame& frame) const noexcept {
    const std::int64_t end = frame.first_sample + static_cast<std::int64_t>(frame.samples.size());
    // Whole seconds apart: samples times 10^9 would overflow after a week at 16 kHz.
    const std::int64_t rate = input_.sample_rate();
    return end / rate * 1'000'000'000 + end % rate * 1'000'000'000 / rate;
  }
  bool merge(Frame& into, Frame& more) const {
    if (static_cast<std::int64_t>(into.samples.size() + more.samples.size()) > room_) return false;
    into.samples.insert(into.samples.end(), more.samples.begin(), more.samples.end());
    return true;
  }

 private:
  AudioInput& input_;
  std::int64_t packet_;
  std::int64_t room_;
};

}  // namespace sluice
