// SPDX-License-Identifier: MIT
/// From speech probabilities to where speech begins and ends, with hysteresis: what opens and
/// closes the sessions behind a microphone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"

namespace sluice {

/// Defaults are those of Silero VAD's iterator.
struct SpeechSegmenterConfig {
  std::int64_t sample_rate = 16000;  ///< Hz
  std::int64_t window = 512;         ///< samples a probability
  double on = 0.5;                   ///< speech begins at or above
  double off = 0.35;                 ///< and may end below
  double min_silence_ms = 100;       ///< that so long a silence is its end
  double pad_ms = 30;                ///< what a segment is made longer by, on both sides
};

/// Takes one probability a window and says when a segment begins or ends, in samples from the
/// stream's start. Speech begins with a probability of `on` or more, `pad` before its window. Its
/// end is remembered at the first window below `off`, forgotten at the next one of `on` or more,
/// and final when a window below `off` lies min_silence or more behind it. O(1); state of three
/// numbers; a copy is a snapshot. A NaN counts as neither above nor below. Source:
/// snakers4/silero-vad, VADIterator, its arithmetic to the sample.
class SpeechSegmenter {
 public:
  /// A border: where speech begins or ends.
  struct Border {
    bool begins = false;
    std::int64_t sample = 0;
    friend bool operator==(const Border&, const Border&) = default;
  };

  /// \throws Error(kConfig) naming the field.
  explicit SpeechSegmenter(SpeechSegmenterConfig config = {}) : config_(config) {
    const auto require = [](bool sound, const char* field, const char* expected, double found) {
      if (!sound)
        throw Error(ErrorCode::kConfig, {"option out of range", "SpeechSegmenterConfig", field,
                                         expected, std::to_string(found)});
    };
    require(config.sample_rate >= 1 && config.sample_rate <= 1'000'000, "sample_rate",
            "1 to 1000000 Hz", static_cast<double>(config.sample_rate));
    require(config.window >= 1 && config.window <= (1 << 24), "window", "1 to 2^24 samples",
            static_cast<double>(config.window));
    require(config.on > 0 && config.on <= 1, "on", "above 0, at most 1", config.on);
    require(config.off >= 0 && config.off <= config.on, "off", "0 to on", config.off);
    require(config.min_silence_ms >= 0 && config.min_silence_ms <= 1e6, "min_silence_ms",
            "0 to 1e6", config.min_silence_ms);
    require(config.pad_ms >= 0 && config.pad_ms <= 1e6, "pad_ms", "0 to 1e6", config.pad_ms);
    const auto rate = static_cast<double>(config.sample_rate);
    silence_ = std::llround(config.min_silence_ms * 1e-3 * rate);
    pad_ = std::llround(config.pad_ms * 1e-3 * rate);
  }

  /// The probability of the next window. A border may lie before ones that were given out (the
  /// pad), never before the stream's start.
  std::optional<Border> accept(double probability) noexcept {
    samples_ += config_.window;
    if (probability >= config_.on) {
      silent_since_ = 0;
      if (speaking_) return std::nullopt;
      speaking_ = true;
      return Border{true, std::max<std::int64_t>(samples_ - pad_ - config_.window, 0)};
    }
    if (!speaking_ || !(probability < config_.off)) return std::nullopt;
    if (silent_since_ == 0) silent_since_ = samples_;
    if (samples_ - silent_since_ < silence_) return std::nullopt;
    const Border end{false, silent_since_ + pad_ - config_.window};
    silent_since_ = 0;
    speaking_ = false;
    return end;
  }

  /// The stream has ended: a segment that is open ends here.
  std::optional<Border> finish() noexcept {
    if (!speaking_) return std::nullopt;
    speaking_ = false;
    silent_since_ = 0;
    return Border{false, samples_};
  }

  bool speaking() const noexcept { return speaking_; }
  std::int64_t samples() const noexcept { return samples_; }  ///< of all windows so far
  void reset() noexcept {
    samples_ = silent_since_ = 0;
    speaking_ = false;
  }

  /// Appends the state to bytes, and reads it back. \throws Error(kFormat).
  void save(ByteWriter& writer) const {
    writer.write(samples_);
    writer.write(silent_since_);
    writer.write(static_cast<std::uint8_t>(speaking_ ? 1 : 0));
  }
  void restore(ByteReader& reader) {
    const std::size_t begin = reader.offset();
    const auto samples = reader.read<std::int64_t>("samples");
    const auto silent_since = reader.read<std::int64_t>("silent_since");
    const auto speaking = reader.read<std::uint8_t>("speaking");
    constexpr std::int64_t kMost = std::int64_t{1} << 60;  // what follows must not overflow
    if (samples < 0 || samples > kMost || silent_since < 0 || silent_since > samples ||
        speaking > 1)
      reader.fail_at(begin, "state makes no sense", "samples",
                     "0 <= silent_since <= samples <= 2^60",
                     std::to_string(silent_since) + " of " + std::to_string(samples));
    samples_ = samples;
    silent_since_ = silent_since;
    speaking_ = speaking == 1;
  }

 private:
  SpeechSegmenterConfig config_;
  std::int64_t silence_ = 0;  // samples
  std::int64_t pad_ = 0;      // samples
  std::int64_t samples_ = 0;
  std::int64_t silent_since_ = 0;  // samples when silence began; 0: none
  bool speaking_ = false;
};

}  // namespace sluice
