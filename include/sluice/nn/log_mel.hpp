// SPDX-License-Identifier: MIT
/// Log-mel features of audio that arrives in pieces of any length: the front ends of NeMo,
/// Kaldi/WeNet, Whisper and the listening model as settings of one computation. Nothing in it looks
/// ahead further than its own window.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/core/byte_stream.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/detail/real_fft.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/stream_timing.hpp"

namespace sluice {

/// Where frame t lies in the stream, with W = window_length, H = hop_length, F = fft_size.
enum class Framing : std::uint8_t {
  /// Samples t H .. t H + W - 1; only whole frames: 1 + floor((N - W) / H) of N samples. Kaldi.
  kEdgeSnipped,
  /// Centred on t H, zeros before the first and behind the last sample: 1 + floor(N / H) frames.
  /// A frame that reaches behind the end comes with flush(). NeMo.
  kCentredZeros,
  /// The same with the signal mirrored at both ends (the end sample itself not repeated): the first
  /// frame waits for the W / 2 + 1 samples that it mirrors. Whisper.
  kCentredReflected,
};

/// High-pass x[n] - a x[n - 1].
enum class PreEmphasis : std::uint8_t {
  kNone,
  kStream,    ///< over the stream; its first sample stays as it is. NeMo.
  kPerFrame,  ///< inside each frame, whose first sample becomes x - a x. Kaldi, WeNet.
};

enum class WindowShape : std::uint8_t {
  kHannPeriodic,   ///< 0.5 - 0.5 cos(2 pi i / W)
  kHannSymmetric,  ///< 0.5 - 0.5 cos(2 pi i / (W - 1))
  kPovey,          ///< the symmetric Hann window to the power of 0.85. Kaldi.
};

enum class MelFilters : std::uint8_t {
  kHtk,     ///< mel = 2595 log10(1 + f / 700); triangles in mel, peak 1. Kaldi (the same scale).
  kSlaney,  ///< linear below 1 kHz, logarithmic above; triangles in Hz, area 1 (librosa's default).
};

enum class LogKind : std::uint8_t {
  kLnPlus,    ///< ln(energy + floor)
  kLnMax,     ///< ln(max(energy, floor))
  kLog10Max,  ///< log10(max(energy, floor))
};

/// What is done to the logarithms. Normalisers over the whole utterance need the future and are not
/// here; these are other functions than those and give other features until the stream's end.
enum class MelNormaliser : std::uint8_t {
  kNone,
  kFixed,           ///< (x - mean[m]) / deviation[m], constants of the model
  kCumulative,      ///< per mel, (x - mean) / (std + 1e-5) of all frames so far, std with n - 1
  kRunningMaximum,  ///< (max(x, M - 8) + 4) / 4, M the largest value so far. Whisper: of all.
};

/// A front end. The named functions give those of known systems.
struct LogMelConfig {
  double sample_rate = 16000;        ///< Hz
  std::int64_t window_length = 400;  ///< samples
  std::int64_t hop_length = 160;     ///< samples, at most window_length
  std::int64_t fft_size = 512;       ///< at least window_length; even, a product of 2, 3 and 5
  Framing framing = Framing::kEdgeSnipped;
  /// Centred framing: leave the last frame out, so that there are floor(N / H). NeMo masks it,
  /// Whisper drops it.
  bool drop_last_frame = false;
  double sample_scale = 1;  ///< what samples are multiplied by: 32768 where 16-bit values are meant
  bool remove_dc = false;   ///< take each frame's mean off it, before pre-emphasis inside it
  PreEmphasis pre_emphasis = PreEmphasis::kNone;
  double pre_emphasis_coefficient = 0.97;  ///< a, in [0, 1]
  WindowShape window = WindowShape::kHannPeriodic;
  MelFilters mel_filters = MelFilters::kHtk;
  std::int64_t num_mels = 80;
  double mel_low_hz = 0;
  double mel_high_hz = 8000;  ///< at most half the sample rate
  LogKind log = LogKind::kLnPlus;
  double log_floor = 1e-8;  ///< in units of energy, above 0
  MelNormaliser normaliser = MelNormaliser::kNone;
  std::vector<float> mean = {};       ///< [num_mels], for kFixed
  std::vector<float> deviation = {};  ///< [num_mels], for kFixed, above 0

  /// NVIDIA NeMo's FastConformer models ("normalize: NA"): centred with zeros, pre-emphasis over
  /// the stream, symmetric Hann, Slaney filters over the whole band, ln(x + 2^-24), no dither.
  static LogMelConfig nemo() {
    LogMelConfig config;
    config.framing = Framing::kCentredZeros;
    config.drop_last_frame = true;
    config.pre_emphasis = PreEmphasis::kStream;
    config.window = WindowShape::kHannSymmetric;
    config.mel_filters = MelFilters::kSlaney;
    config.log_floor = 0x1p-24;
    return config;
  }

  /// Kaldi's filter banks as WeNet calls them: 16-bit sample values, DC off, pre-emphasis inside
  /// the frame, Povey window, HTK filters from 20 Hz, ln(max(x, 2^-23)), no dither.
  static LogMelConfig kaldi() {
    LogMelConfig config;
    config.sample_scale = 32768;
    config.remove_dc = true;
    config.pre_emphasis = PreEmphasis::kPerFrame;
    config.window = WindowShape::kPovey;
    config.mel_low_hz = 20;
    config.log = LogKind::kLnMax;
    config.log_floor = 0x1p-23;
    return config;
  }

  /// Whisper with the running maximum in place of the maximum over the whole utterance (as
  /// CarelessWhisper does): frames before a stream's loudest one differ from the published front
  /// end, the others do not.
  static LogMelConfig whisper_running_maximum() {
    LogMelConfig config;
    config.fft_size = 400;
    config.framing = Framing::kCentredReflected;
    config.drop_last_frame = true;
    config.mel_filters = MelFilters::kSlaney;
    config.log = LogKind::kLog10Max;
    config.log_floor = 1e-10;
    config.normaliser = MelNormaliser::kRunningMaximum;
    return config;
  }

  /// The listening model of examples/: periodic Hann, HTK filters from 20 to 7600 Hz, ln(x + 1e-8)
  /// unless the model's file says otherwise (listen-en: 1e-6), fixed mean and standard deviation
  /// from its file, both [80].
  static LogMelConfig listen(std::vector<float> mean, std::vector<float> deviation) {
    LogMelConfig config;
    config.mel_low_hz = 20;
    config.mel_high_hz = 7600;
    config.normaliser = MelNormaliser::kFixed;
    config.mean = std::move(mean);
    config.deviation = std::move(deviation);
    return config;
  }
};

/// x[n] -= coefficient * x[n - 1], in place; `before` stands for the sample before x[0]: the last
/// of the piece before it, 0 at a stream's start (its first sample stays), x[0] itself inside a
/// frame.
inline void pre_emphasise(std::span<double> x, double coefficient, double before) noexcept {
  for (double& sample : x) {
    const double filtered = sample - coefficient * before;
    before = std::exchange(sample, filtered);
  }
}

/// Normalises a value by those of the same mel so far, itself included: (x - mean) / (std + 1e-5),
/// std with n - 1 (0 for the first). Welford's recurrence, in double. A NaN stays for ever.
struct CumulativeNormaliser {
  double mean = 0;
  double squares = 0;  ///< sum of squared deviations from the mean

  /// `count`: values including this one.
  double operator()(double x, std::int64_t count) noexcept {
    const double before = x - mean;
    mean += before / static_cast<double>(count);
    squares += before * (x - mean);
    const double variance = count > 1 ? squares / static_cast<double>(count - 1) : 0.0;
    return (x - mean) / (std::sqrt(variance) + 1e-5);
  }
};

/// Whisper's scaling of log10 energies with the largest so far: (max(x, maximum - 8) + 4) / 4. A
/// NaN does not become the maximum.
struct RunningMaximumNormaliser {
  double maximum = -std::numeric_limits<double>::infinity();

  /// Takes a frame in, then scales it, in place.
  void operator()(std::span<double> frame) noexcept {
    for (const double x : frame)
      if (x > maximum) maximum = x;
    for (double& x : frame) x = ((x < maximum - 8 ? maximum - 8 : x) + 4) / 4;
  }
};

/// The computation, without the state of any stream: const after construction, shared by any number
/// of streams and threads. Everything between samples and features is double, so features are exact
/// to their rounding and the same however the audio was cut. Allocates at construction only.
///
///     LogMel front_end(LogMelConfig::kaldi());
///     LogMel::State state = front_end.make_state();
///     rows = front_end.step(samples, state, features);  // and again
///     rows = front_end.flush(state, features);          // at the end
///
/// It is a StreamLayer whose input frames are single samples, so a chain that begins with it states
/// its latency in samples.
class LogMel {
 public:
  /// What one stream keeps: at most one window and one sample of audio, counters, what the
  /// normaliser has seen, and room to work in. Made by make_state(); a copy is a snapshot.
  class State {
   public:
    State() = default;

    std::int64_t samples() const noexcept { return samples_; }  ///< accepted since the start
    std::int64_t frames() const noexcept { return frames_; }    ///< given out since the start

   private:
    friend class LogMel;
    std::size_t held() const noexcept { return static_cast<std::size_t>(samples_ - first_); }

    std::vector<float> history_;                    // samples first_ .. samples_ - 1
    std::vector<CumulativeNormaliser> cumulative_;  // [num_mels], or none
    RunningMaximumNormaliser maximum_;
    std::int64_t first_ = 0;
    std::int64_t samples_ = 0;
    std::int64_t frames_ = 0;
    // Without meaning between calls.
    std::vector<double> frame_;  // [fft_size], zeros behind the window
    std::vector<double> work_;   // [fft work]
    std::vector<double> power_;  // [fft_size / 2 + 1]
    std::vector<double> mels_;   // [num_mels]
  };

  /// \throws Error(kConfig) naming the field.
  explicit LogMel(LogMelConfig config)
      : config_(checked(std::move(config))),
        fft_(config_.fft_size),
        window_(make_window(config_)),
        filters_(static_cast<std::size_t>(config_.num_mels)) {
    if (config_.framing != Framing::kEdgeSnipped)
      left_ = config_.fft_size / 2 - (config_.fft_size - config_.window_length) / 2;
    ahead_ = config_.window_length - left_;
    if (drops_last()) ahead_ = std::max(ahead_, config_.hop_length);
    // The first frame mirrors left_ samples around sample 0.
    if (config_.framing == Framing::kCentredReflected) ahead_ = std::max(ahead_, left_ + 1);
    make_filters();
  }

  const LogMelConfig& config() const noexcept { return config_; }
  std::int64_t num_mels() const noexcept { return config_.num_mels; }

  /// Frame t is given out once so many samples have been accepted (or at the end).
  std::int64_t samples_needed(std::int64_t frame) const noexcept {
    return frame * config_.hop_length + ahead_;
  }
  /// Frames complete after `samples` samples while the stream goes on.
  std::int64_t frames_of(std::int64_t samples) const noexcept {
    return samples < ahead_ ? 0 : 1 + (samples - ahead_) / config_.hop_length;
  }
  /// Frames of a stream that ends after `samples` samples; 0 if there is none.
  std::int64_t frames_at_end(std::int64_t samples) const noexcept {
    if (config_.framing == Framing::kEdgeSnipped) return frames_of(samples);
    if (samples == 0) return 0;
    return samples / config_.hop_length + (config_.drop_last_frame ? 0 : 1);
  }
  /// What a StreamLayer declares: in samples, and at most so many rows.
  std::int64_t in_width() const noexcept { return 1; }
  std::int64_t out_width() const noexcept { return config_.num_mels; }
  std::int64_t max_outputs(std::int64_t samples) const noexcept {
    return timing().max_outputs(samples);
  }
  std::int64_t max_flush_outputs() const noexcept { return timing().max_flush_outputs(); }
  StreamTiming timing() const noexcept {
    const bool remembers = config_.normaliser == MelNormaliser::kCumulative ||
                           config_.normaliser == MelNormaliser::kRunningMaximum;
    // Behind the end stand as many samples as make frames_at_end() of the frames.
    std::int64_t end_padding = 0;
    if (config_.framing != Framing::kEdgeSnipped)
      end_padding = ahead_ - (config_.drop_last_frame ? config_.hop_length : 0);
    return {.stride = config_.hop_length,
            .left = remembers ? kUnboundedFrames : left_,
            .right = ahead_ - 1,
            .end_padding = end_padding};
  }
  std::size_t state_bytes() const noexcept {
    std::size_t bytes = static_cast<std::size_t>(left_ + ahead_ + 1) * sizeof(float) +
                        3 * sizeof(std::int64_t) + sizeof(double);
    if (config_.normaliser == MelNormaliser::kCumulative)
      bytes += static_cast<std::size_t>(num_mels()) * sizeof(CumulativeNormaliser);
    return bytes;
  }

  /// Rows that step() will write for `samples` more samples, and flush() now.
  std::int64_t frames_in_step(std::int64_t samples, const State& state) const noexcept {
    return frames_of(state.samples_ + samples) - state.frames_;
  }
  std::int64_t frames_in_flush(const State& state) const noexcept {
    return frames_at_end(state.samples_) - state.frames_;
  }

  /// The state at a stream's start. Allocates it.
  State make_state() const {
    State state;
    // From one sample before the next frame's start to what completes it.
    state.history_.resize(static_cast<std::size_t>(left_ + ahead_ + 1));
    if (config_.normaliser == MelNormaliser::kCumulative)
      state.cumulative_.resize(static_cast<std::size_t>(num_mels()));
    state.frame_.resize(static_cast<std::size_t>(config_.fft_size));
    state.work_.resize(static_cast<std::size_t>(fft_.work_size()));
    state.power_.resize(static_cast<std::size_t>(config_.fft_size / 2 + 1));
    state.mels_.resize(static_cast<std::size_t>(num_mels()));
    return state;
  }

  /// Back to a stream's start. Allocates nothing.
  void reset(State& state) const noexcept {
    state.first_ = state.samples_ = state.frames_ = 0;
    state.maximum_ = {};
    for (CumulativeNormaliser& mel : state.cumulative_) mel = {};
  }

  /// Appends a state to bytes. Precondition: flush() was not called.
  void save(const State& state, ByteWriter& out) const {
    SLUICE_ASSERT(state.frames_ == frames_of(state.samples_));
    out.write(state.samples_);
    out.write_span(std::span<const float>(state.history_.data(), state.held()));
    out.write(state.maximum_.maximum);
    for (const CumulativeNormaliser& mel : state.cumulative_) {
      out.write(mel.mean);
      out.write(mel.squares);
    }
  }

  /// Reads what save() wrote with the same configuration into a state that make_state() made.
  /// \throws Error(kFormat); the state is then to be reset.
  void restore(ByteReader& in, State& state) const {
    reset(state);
    const std::size_t begin = in.offset();
    const auto samples = in.read<std::int64_t>("samples");
    if (samples < 0 || samples > kMaxSamples)
      in.fail_at(begin, "sample count out of range", "samples",
                 "0 to " + std::to_string(kMaxSamples), std::to_string(samples));
    const std::int64_t first = first_kept(frames_of(samples));
    in.read_span("history",
                 std::span(state.history_).first(static_cast<std::size_t>(samples - first)));
    state.maximum_.maximum = in.read<double>("maximum");
    for (CumulativeNormaliser& mel : state.cumulative_) {
      mel.mean = in.read<double>("mean");
      mel.squares = in.read<double>("squares");
    }
    state.samples_ = samples;
    state.frames_ = frames_of(samples);
    state.first_ = first;
  }

  /// Accepts samples and writes the frames that they complete to the first rows of `out`.
  /// samples: [any number], none changes nothing. out: [at least frames_in_step(), num_mels].
  /// Returns the rows written. Allocates nothing. A NaN gives NaN in the frames that hold it, and
  /// with kCumulative in all that follow (io/audio_input.hpp keeps NaN out).
  std::int64_t step(std::span<const float> samples, State& state,
                    MatrixView<float> out) const noexcept {
    SLUICE_ASSERT(out.rows >= frames_in_step(static_cast<std::int64_t>(samples.size()), state));
    std::int64_t rows = 0;
    while (!samples.empty()) {
      const auto wanted = static_cast<std::size_t>(samples_needed(state.frames_) - state.samples_);
      const std::size_t taken = std::min(wanted, samples.size());
      std::copy_n(samples.data(), taken, state.history_.data() + state.held());
      state.samples_ += static_cast<std::int64_t>(taken);
      samples = samples.subspan(taken);
      while (samples_needed(state.frames_) <= state.samples_)
        write_frame(state, state.samples_, out.row(rows++));
    }
    return rows;
  }

  /// The same for a column of samples, [samples, 1], as any StreamLayer takes it.
  std::int64_t step(MatrixView<const float> in, State& state,
                    MatrixView<float> out) const noexcept {
    SLUICE_ASSERT(in.cols == 1);
    if (in.stride == 1 || in.rows == 0)
      return step(std::span(in.data, static_cast<std::size_t>(in.rows)), state, out);
    std::int64_t rows = 0;
    for (std::int64_t i = 0; i < in.rows; ++i)
      rows += step(std::span(in.row(i), 1), state, out.middle_rows(rows, out.rows - rows));
    return rows;
  }

  /// Ends the stream: writes the frames that reach behind its last sample. out: [at least
  /// frames_in_flush(), num_mels]. Returns the rows written. Only reset() may follow.
  std::int64_t flush(State& state, MatrixView<float> out) const noexcept {
    const std::int64_t rows = frames_in_flush(state);
    SLUICE_ASSERT(out.rows >= rows);
    for (std::int64_t row = 0; row < rows; ++row) write_frame(state, state.samples_, out.row(row));
    return std::max<std::int64_t>(rows, 0);
  }

 private:
  static constexpr std::int64_t kMaxSamples = std::int64_t{1} << 60;

  // The weights of one mel filter on consecutive bins of the power spectrum.
  struct Filter {
    std::int64_t first_bin = 0;
    std::int64_t bins = 0;
    std::int64_t weights = 0;  // index of the first one
  };

  bool drops_last() const noexcept {
    return config_.drop_last_frame && config_.framing != Framing::kEdgeSnipped;
  }

  static LogMelConfig checked(LogMelConfig config) {
    const auto require = [](bool sound, const char* field, std::string expected, double found) {
      if (!sound)
        throw Error(ErrorCode::kConfig, {"option out of range", "LogMelConfig", field,
                                         std::move(expected), std::to_string(found)});
    };
    const auto number = [](std::int64_t value) {
      return static_cast<double>(value);
    };
    require(std::isfinite(config.sample_rate) && config.sample_rate > 0, "sample_rate",
            "above 0 Hz", config.sample_rate);
    require(config.window_length >= 2, "window_length", "at least 2", number(config.window_length));
    require(config.hop_length >= 1 && config.hop_length <= config.window_length, "hop_length",
            "1 to window_length", number(config.hop_length));
    require(config.fft_size >= config.window_length && detail::RealFft::supports(config.fft_size),
            "fft_size", "an even product of 2, 3 and 5, at least window_length, at most 2^20",
            number(config.fft_size));
    require(std::isfinite(config.sample_scale) && config.sample_scale > 0, "sample_scale",
            "above 0", config.sample_scale);
    require(config.pre_emphasis_coefficient >= 0 && config.pre_emphasis_coefficient <= 1,
            "pre_emphasis_coefficient", "0 to 1", config.pre_emphasis_coefficient);
    // The mirror image of the filtered signal would need one more sample than the frame.
    require(
        config.framing != Framing::kCentredReflected || config.pre_emphasis != PreEmphasis::kStream,
        "pre_emphasis", "not over the stream with a reflected one",
        number(static_cast<std::int64_t>(config.pre_emphasis)));
    require(config.num_mels >= 1 && config.num_mels <= 65536, "num_mels", "1 to 65536",
            number(config.num_mels));
    require(config.mel_low_hz >= 0 && std::isfinite(config.mel_low_hz), "mel_low_hz", "at least 0",
            config.mel_low_hz);
    require(config.mel_high_hz > config.mel_low_hz && config.mel_high_hz <= config.sample_rate / 2,
            "mel_high_hz", "above mel_low_hz, at most half the sample rate", config.mel_high_hz);
    require(std::isfinite(config.log_floor) && config.log_floor > 0, "log_floor", "above 0",
            config.log_floor);
    if (config.normaliser == MelNormaliser::kFixed) {
      for (const auto& [field, values] :
           {std::pair{"mean", &config.mean}, std::pair{"deviation", &config.deviation}}) {
        require(static_cast<std::int64_t>(values->size()) == config.num_mels, field,
                "one value a mel", static_cast<double>(values->size()));
        for (const float value : *values)
          require(std::isfinite(value) && (values == &config.mean || value > 0), field,
                  values == &config.mean ? "finite" : "finite, above 0",
                  static_cast<double>(value));
      }
    }
    return config;
  }

  static Buffer<double> make_window(const LogMelConfig& config) {
    Buffer<double> window(static_cast<std::size_t>(config.window_length));
    const std::int64_t period = config.window == WindowShape::kHannPeriodic
                                    ? config.window_length
                                    : config.window_length - 1;
    for (std::int64_t i = 0; i < config.window_length; ++i) {
      const double hann = 0.5 - 0.5 * std::cos(2.0 * std::numbers::pi * static_cast<double>(i) /
                                               static_cast<double>(period));
      window[static_cast<std::size_t>(i)] =
          config.window == WindowShape::kPovey ? std::pow(std::max(hann, 0.0), 0.85) : hann;
    }
    return window;
  }

  static double htk_mel(double hz) { return 2595.0 * std::log10(1.0 + hz / 700.0); }
  static constexpr double kSlaneyBreak = 1000.0;                // Hz; 15 mel
  static constexpr double kSlaneyHzPerMel = 200.0 / 3.0;        // below
  static constexpr double kSlaneyLogStep = 0.0687517774209491;  // ln(6.4) / 27, above
  static double slaney_mel(double hz) {
    if (hz < kSlaneyBreak) return hz / kSlaneyHzPerMel;
    return kSlaneyBreak / kSlaneyHzPerMel + std::log(hz / kSlaneyBreak) / kSlaneyLogStep;
  }
  static double slaney_hz(double mel) {
    constexpr double kBreakMel = kSlaneyBreak / kSlaneyHzPerMel;
    if (mel < kBreakMel) return mel * kSlaneyHzPerMel;
    return kSlaneyBreak * std::exp((mel - kBreakMel) * kSlaneyLogStep);
  }

  void make_filters() {
    const bool slaney = config_.mel_filters == MelFilters::kSlaney;
    const std::int64_t bins = config_.fft_size / 2 + 1;
    const double low = slaney ? slaney_mel(config_.mel_low_hz) : htk_mel(config_.mel_low_hz);
    const double high = slaney ? slaney_mel(config_.mel_high_hz) : htk_mel(config_.mel_high_hz);
    // Corner i of num_mels + 2, on the axis on which the triangles are straight.
    const auto corner = [&](std::int64_t i) {
      const double mel =
          low + (high - low) * static_cast<double>(i) / static_cast<double>(num_mels() + 1);
      return slaney ? slaney_hz(mel) : mel;
    };
    for (std::int64_t m = 0; m < num_mels(); ++m) {
      Filter& filter = filters_[static_cast<std::size_t>(m)];
      filter.weights = static_cast<std::int64_t>(weights_.size());
      const double left = corner(m);
      const double centre = corner(m + 1);
      const double right = corner(m + 2);
      const double peak = slaney ? 2.0 / (right - left) : 1.0;
      for (std::int64_t bin = 0; bin < bins; ++bin) {
        const double hz =
            static_cast<double>(bin) * config_.sample_rate / static_cast<double>(config_.fft_size);
        const double place = slaney ? hz : htk_mel(hz);
        const double weight =
            std::min((place - left) / (centre - left), (right - place) / (right - centre));
        if (weight <= 0) continue;  // one run of bins is left
        if (filter.bins == 0) filter.first_bin = bin;
        ++filter.bins;
        weights_.push_back(peak * weight);
      }
    }
  }

  // The first sample that frame `frame` needs, and the one before it.
  std::int64_t first_kept(std::int64_t frame) const noexcept {
    return std::max<std::int64_t>(frame * config_.hop_length - left_ - 1, 0);
  }

  // Index `index` of a stream of `end` samples, mirrored at both ends as often as it takes.
  static std::int64_t mirrored(std::int64_t index, std::int64_t end) noexcept {
    const std::int64_t period = std::max<std::int64_t>(2 * (end - 1), 1);
    index = ((index % period) + period) % period;
    return index < end ? index : period - index;
  }

  // Writes the next frame of a stream of which `end` samples are known, and lets go of what the
  // frame after it does not need.
  void write_frame(State& state, std::int64_t end, float* out) const noexcept {
    const std::int64_t start = state.frames_ * config_.hop_length - left_;
    const std::int64_t length = config_.window_length;
    const auto sample = [&](std::int64_t index) {
      return config_.sample_scale *
             static_cast<double>(state.history_[static_cast<std::size_t>(index - state.first_)]);
    };
    // The stream's own samples are indices first .. last - 1 of the frame.
    const std::int64_t first = std::max<std::int64_t>(-start, 0);
    const std::int64_t last = std::clamp<std::int64_t>(end - start, first, length);
    double* const frame = state.frame_.data();
    const bool reflected = config_.framing == Framing::kCentredReflected;
    for (std::int64_t i = 0; i < first; ++i)
      frame[i] = reflected ? sample(mirrored(start + i, end)) : 0.0;
    for (std::int64_t i = first; i < last; ++i) frame[i] = sample(start + i);
    for (std::int64_t i = last; i < length; ++i)
      frame[i] = reflected ? sample(mirrored(start + i, end)) : 0.0;

    const double coefficient = config_.pre_emphasis_coefficient;
    if (config_.pre_emphasis == PreEmphasis::kStream)
      pre_emphasise(std::span(frame + first, frame + last), coefficient,
                    start + first > 0 ? sample(start + first - 1) : 0.0);
    if (config_.remove_dc) {
      double sum = 0;
      for (std::int64_t i = 0; i < length; ++i) sum += frame[i];
      const double mean = sum / static_cast<double>(length);
      for (std::int64_t i = 0; i < length; ++i) frame[i] -= mean;
    }
    if (config_.pre_emphasis == PreEmphasis::kPerFrame)
      pre_emphasise(std::span(frame, frame + length), coefficient, frame[0]);
    for (std::int64_t i = 0; i < length; ++i) frame[i] *= window_[static_cast<std::size_t>(i)];
    fft_.power_spectrum(frame, state.work_.data(), state.power_.data());

    for (std::int64_t m = 0; m < num_mels(); ++m) {
      const Filter& filter = filters_[static_cast<std::size_t>(m)];
      const double* const weights = weights_.data() + filter.weights;
      const double* const power = state.power_.data() + filter.first_bin;
      double energy = 0;
      for (std::int64_t i = 0; i < filter.bins; ++i) energy += weights[i] * power[i];
      state.mels_[static_cast<std::size_t>(m)] = logarithm(energy);
    }
    ++state.frames_;
    normalise(state);
    for (std::int64_t m = 0; m < num_mels(); ++m)
      out[m] = static_cast<float>(state.mels_[static_cast<std::size_t>(m)]);

    const std::int64_t keep = std::min(first_kept(state.frames_), state.samples_);
    float* const history = state.history_.data();
    std::copy(history + (keep - state.first_), history + state.held(), history);
    state.first_ = keep;
  }

  double logarithm(double energy) const noexcept {
    // Written so that a NaN stays one.
    const double raised = energy < config_.log_floor ? config_.log_floor : energy;
    switch (config_.log) {
      case LogKind::kLnPlus: return std::log(energy + config_.log_floor);
      case LogKind::kLnMax: return std::log(raised);
      case LogKind::kLog10Max: break;
    }
    return std::log10(raised);
  }

  void normalise(State& state) const noexcept {
    switch (config_.normaliser) {
      case MelNormaliser::kNone: break;
      case MelNormaliser::kFixed:
        for (std::size_t m = 0; m < state.mels_.size(); ++m)
          state.mels_[m] = (state.mels_[m] - static_cast<double>(config_.mean[m])) /
                           static_cast<double>(config_.deviation[m]);
        break;
      case MelNormaliser::kCumulative:
        for (std::size_t m = 0; m < state.mels_.size(); ++m)
          state.mels_[m] = state.cumulative_[m](state.mels_[m], state.frames_);
        break;
      case MelNormaliser::kRunningMaximum: state.maximum_(state.mels_); break;
    }
  }

  LogMelConfig config_;
  detail::RealFft fft_;
  Buffer<double> window_;        // [window_length]
  std::vector<Filter> filters_;  // [num_mels]
  std::vector<double> weights_;  // of all filters, one behind the other
  std::int64_t left_ = 0;        // samples of a frame before its time t H
  std::int64_t ahead_ = 0;       // samples from t H on that complete frame t
};

static_assert(StreamLayer<LogMel>);

}  // namespace sluice
