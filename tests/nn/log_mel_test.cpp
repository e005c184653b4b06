// SPDX-License-Identifier: MIT
#include "sluice/nn/log_mel.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/nn/stream_window.hpp"
#include "support/property.hpp"
#include "support/test_unit.hpp"

namespace sluice {
namespace SLUICE_TEST_UNIT {

using Rows = std::vector<std::vector<double>>;

// --- The oracle: whole signals, dense tables, a discrete Fourier transform by its definition
// ------

constexpr double kPi = std::numbers::pi;

std::vector<double> reference_window(const LogMelConfig& c) {
  std::vector<double> window;
  for (std::int64_t i = 0; i < c.window_length; ++i) {
    const auto x = static_cast<double>(i);
    const auto w = static_cast<double>(c.window_length);
    switch (c.window) {
      case WindowShape::kHannPeriodic: window.push_back(std::pow(std::sin(kPi * x / w), 2)); break;
      case WindowShape::kHannSymmetric:
        window.push_back(std::pow(std::sin(kPi * x / (w - 1)), 2));
        break;
      case WindowShape::kPovey:
        window.push_back(std::pow(std::abs(std::sin(kPi * x / (w - 1))), 1.7));
        break;
    }
  }
  return window;
}

// [num_mels, fft_size / 2 + 1]
Rows reference_filters(const LogMelConfig& c) {
  const bool slaney = c.mel_filters == MelFilters::kSlaney;
  const auto mel_of = [&](double hz) {
    if (!slaney)
      return 1127.0 * std::log1p(hz / 700.0);  // another base, another unit: same filters
    return hz < 1000.0 ? 3.0 * hz / 200.0 : 15.0 + 27.0 * std::log(hz / 1000.0) / std::log(6.4);
  };
  const auto hz_of = [&](double mel) {
    return mel < 15.0 ? 200.0 * mel / 3.0 : 1000.0 * std::pow(6.4, (mel - 15.0) / 27.0);
  };
  const double low = mel_of(c.mel_low_hz);
  const double step = (mel_of(c.mel_high_hz) - low) / static_cast<double>(c.num_mels + 1);
  Rows filters;
  for (std::int64_t m = 0; m < c.num_mels; ++m) {
    std::vector<double> corners;
    for (std::int64_t i = m; i < m + 3; ++i) {
      const double mel = low + step * static_cast<double>(i);
      corners.push_back(slaney ? hz_of(mel) : mel);
    }
    std::vector<double> filter;
    for (std::int64_t bin = 0; bin <= c.fft_size / 2; ++bin) {
      const double hz = c.sample_rate * static_cast<double>(bin) / static_cast<double>(c.fft_size);
      const double x = slaney ? hz : mel_of(hz);
      double weight = 0;
      if (x > corners[0] && x <= corners[1]) weight = (x - corners[0]) / (corners[1] - corners[0]);
      if (x > corners[1] && x < corners[2]) weight = (corners[2] - x) / (corners[2] - corners[1]);
      filter.push_back(slaney ? 2.0 * weight / (corners[2] - corners[0]) : weight);
    }
    filters.push_back(filter);
  }
  return filters;
}

// Frames before the window, as the systems cut them: the whole signal is filtered and padded by
// half an FFT on both sides, frames are as long as the FFT. [frames, window_length]
Rows reference_frames(const LogMelConfig& c, const std::vector<float>& samples) {
  std::vector<double> signal;
  for (std::size_t i = 0; i < samples.size(); ++i) {
    double value = c.sample_scale * static_cast<double>(samples[i]);
    if (c.pre_emphasis == PreEmphasis::kStream && i > 0)
      value -= c.pre_emphasis_coefficient * c.sample_scale * static_cast<double>(samples[i - 1]);
    signal.push_back(value);
  }
  const auto n = static_cast<std::int64_t>(signal.size());
  const std::int64_t pad = c.framing == Framing::kEdgeSnipped ? 0 : c.fft_size / 2;
  const std::int64_t span = c.framing == Framing::kEdgeSnipped ? c.window_length : c.fft_size;
  const std::int64_t offset =
      c.framing == Framing::kEdgeSnipped ? 0 : (c.fft_size - c.window_length) / 2;
  const auto padded = [&](std::int64_t i) {
    i -= pad;
    if (c.framing == Framing::kCentredReflected) {
      while (n > 1 && (i < 0 || i >= n)) i = i < 0 ? -i : 2 * (n - 1) - i;
      if (n == 1) i = 0;
    }
    return i >= 0 && i < n ? signal[static_cast<std::size_t>(i)] : 0.0;
  };
  Rows frames;
  for (std::int64_t start = 0; n > 0 && start + span <= n + 2 * pad; start += c.hop_length) {
    std::vector<double> frame;
    for (std::int64_t i = 0; i < c.window_length; ++i) frame.push_back(padded(start + offset + i));
    if (c.remove_dc) {
      double mean = 0;
      for (const double value : frame) mean += value / static_cast<double>(c.window_length);
      for (double& value : frame) value -= mean;
    }
    if (c.pre_emphasis == PreEmphasis::kPerFrame) {
      const std::vector<double> plain = frame;
      for (std::size_t i = 0; i < frame.size(); ++i)
        frame[i] = plain[i] - c.pre_emphasis_coefficient * plain[i == 0 ? 0 : i - 1];
    }
    frames.push_back(frame);
  }
  if (c.drop_last_frame && c.framing != Framing::kEdgeSnipped && !frames.empty()) frames.pop_back();
  return frames;
}

Rows reference(const LogMelConfig& c, const std::vector<float>& samples) {
  const std::vector<double> window = reference_window(c);
  const Rows filters = reference_filters(c);
  std::vector<double> cosines;
  std::vector<double> sines;
  for (std::int64_t i = 0; i < c.fft_size; ++i) {
    const double angle = 2.0 * kPi * static_cast<double>(i) / static_cast<double>(c.fft_size);
    cosines.push_back(std::cos(angle));
    sines.push_back(std::sin(angle));
  }
  Rows rows;
  for (const std::vector<double>& frame : reference_frames(c, samples)) {
    std::vector<double> power;
    for (std::int64_t k = 0; k <= c.fft_size / 2; ++k) {
      double re = 0;
      double im = 0;
      for (std::size_t i = 0; i < frame.size(); ++i) {
        const auto turn = static_cast<std::size_t>(static_cast<std::int64_t>(i) * k % c.fft_size);
        re += frame[i] * window[i] * cosines[turn];
        im -= frame[i] * window[i] * sines[turn];
      }
      power.push_back(re * re + im * im);
    }
    std::vector<double> row;
    for (const std::vector<double>& filter : filters) {
      double energy = 0;
      for (std::size_t k = 0; k < power.size(); ++k) energy += filter[k] * power[k];
      switch (c.log) {
        case LogKind::kLnPlus: row.push_back(std::log(energy + c.log_floor)); break;
        case LogKind::kLnMax: row.push_back(std::log(std::max(energy, c.log_floor))); break;
        case LogKind::kLog10Max: row.push_back(std::log10(std::max(energy, c.log_floor))); break;
      }
    }
    rows.push_back(row);
  }
  const Rows plain = rows;
  double maximum = -1e300;
  for (std::size_t t = 0; t < rows.size(); ++t) {
    for (const double value : plain[t]) maximum = std::max(maximum, value);
    for (std::size_t m = 0; m < rows[t].size(); ++m) {
      double& value = rows[t][m];
      switch (c.normaliser) {
        case MelNormaliser::kNone: break;
        case MelNormaliser::kFixed:
          value = (value - static_cast<double>(c.mean[m])) / static_cast<double>(c.deviation[m]);
          break;
        case MelNormaliser::kCumulative: {  // both sums anew for every frame
          double mean = 0;
          for (std::size_t i = 0; i <= t; ++i) mean += plain[i][m] / static_cast<double>(t + 1);
          double squares = 0;
          for (std::size_t i = 0; i <= t; ++i) squares += std::pow(plain[i][m] - mean, 2);
          const double deviation = t == 0 ? 0.0 : std::sqrt(squares / static_cast<double>(t));
          value = (value - mean) / (deviation + 1e-5);
          break;
        }
        case MelNormaliser::kRunningMaximum:
          value = (std::max(value, maximum - 8.0) + 4.0) / 4.0;
          break;
      }
    }
  }
  return rows;
}

// --- Settings and signals ------------------------------------------------------------------------

struct Named {
  const char* name;
  LogMelConfig config;
};

std::vector<Named> settings() {
  std::vector<float> mean(80);
  std::vector<float> deviation(80);
  for (std::size_t m = 0; m < 80; ++m) {
    mean[m] = -6.0F + 0.05F * static_cast<float>(m);
    deviation[m] = 2.0F + 0.01F * static_cast<float>(m);
  }
  std::vector<Named> all{{"nemo", LogMelConfig::nemo()},
                         {"kaldi", LogMelConfig::kaldi()},
                         {"whisper", LogMelConfig::whisper_running_maximum()},
                         {"listen", LogMelConfig::listen(mean, deviation)}};
  LogMelConfig odd;  // lengths that share no factor, every radix of the transform
  odd.window_length = 401;
  odd.hop_length = 127;
  odd.fft_size = 480;
  odd.framing = Framing::kCentredReflected;
  odd.num_mels = 23;
  odd.normaliser = MelNormaliser::kCumulative;
  all.push_back({"odd", odd});
  LogMelConfig short_hop;
  short_hop.sample_rate = 8000;
  short_hop.window_length = 64;
  short_hop.hop_length = 1;
  short_hop.fft_size = 64;
  short_hop.framing = Framing::kCentredZeros;
  short_hop.mel_high_hz = 4000;
  short_hop.num_mels = 5;
  short_hop.pre_emphasis = PreEmphasis::kStream;
  all.push_back({"short_hop", short_hop});
  LogMelConfig wide_hop = short_hop;  // the last frame waits for the next one's time
  wide_hop.hop_length = 64;
  wide_hop.drop_last_frame = true;
  all.push_back({"wide_hop", wide_hop});
  return all;
}

std::vector<float> speech_like(std::int64_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> samples;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto t = static_cast<double>(i) / 16000.0;
    const double buzz = std::sin(2 * kPi * 150 * t) + 0.4 * std::sin(2 * kPi * 1234.5 * t);
    const double envelope = 0.5 - 0.5 * std::cos(2 * kPi * 4 * t);
    samples.push_back(static_cast<float>(0.2 * buzz * envelope + 0.01 * random.normal() + 0.02));
  }
  return samples;
}

// Rows of a stream that arrives in pieces of the lengths that `next_piece()` gives.
template <class NextPiece>
std::vector<float> run(const LogMel& front_end, const std::vector<float>& samples,
                       NextPiece next_piece) {
  LogMel::State state = front_end.make_state();
  std::vector<float> rows;
  std::vector<float> piece_rows;
  const auto view = [&](std::int64_t count) {
    piece_rows.assign(static_cast<std::size_t>(count * front_end.num_mels()), 0.0F);
    return MatrixView<float>(piece_rows.data(), count, front_end.num_mels());
  };
  std::size_t done = 0;
  while (done < samples.size()) {
    const std::size_t length =
        std::min(static_cast<std::size_t>(next_piece()), samples.size() - done);
    const std::int64_t expected =
        front_end.frames_in_step(static_cast<std::int64_t>(length), state);
    const std::int64_t count =
        front_end.step(std::span(samples).subspan(done, length), state, view(expected));
    EXPECT_EQ(count, expected);
    rows.insert(rows.end(), piece_rows.begin(), piece_rows.end());
    done += length;
    EXPECT_EQ(state.samples(), static_cast<std::int64_t>(done));
    EXPECT_EQ(state.frames(), front_end.frames_of(state.samples()));
  }
  const std::int64_t expected = front_end.frames_in_flush(state);
  EXPECT_EQ(front_end.flush(state, view(expected)), expected);
  rows.insert(rows.end(), piece_rows.begin(), piece_rows.end());
  return rows;
}

std::vector<float> run_whole(const LogMel& front_end, const std::vector<float>& samples) {
  return run(front_end, samples, [&] { return samples.size(); });
}

// Doubles on both sides; the two transforms differ by some 1e-13 of the loudest bin, and no bin of
// these signals lies 1e-6 below it. What is left is the rounding to float.
void expect_equal(const Rows& expected, const std::vector<float>& rows, const char* name) {
  std::size_t next = 0;
  for (const std::vector<double>& row : expected) {
    for (const double value : row) {
      ASSERT_LT(next, rows.size()) << name;
      ASSERT_NEAR(rows[next], value, 2e-7 * std::max(1.0, std::abs(value)))
          << name << ", value " << next;
      ++next;
    }
  }
  EXPECT_EQ(next, rows.size()) << name;
}

// --- Typed-in values -----------------------------------------------------------------------------

// Frames of 400 samples, hop 160.
TEST(LogMel, CountsFrames) {
  LogMelConfig centred = LogMelConfig::nemo();
  centred.drop_last_frame = false;
  const LogMel snipped_end(LogMelConfig::kaldi());
  const LogMel centred_end(centred);
  const LogMel dropped_end(LogMelConfig::nemo());
  const std::vector<std::int64_t> samples{399, 400, 560, 1600, 16000};
  const std::vector<std::int64_t> snipped{0, 1, 2, 8, 98};
  const std::vector<std::int64_t> whole{3, 3, 4, 11, 101};
  for (std::size_t i = 0; i < samples.size(); ++i) {
    EXPECT_EQ(snipped_end.frames_at_end(samples[i]), snipped[i]);
    EXPECT_EQ(centred_end.frames_at_end(samples[i]), whole[i]);
    EXPECT_EQ(dropped_end.frames_at_end(samples[i]), whole[i] - 1);
  }
  EXPECT_EQ(centred_end.frames_at_end(0), 0);
  // Edge-snipped frame t needs 160 t + 400 samples, a centred one 160 t + 200; Whisper's first one
  // mirrors 200 samples around sample 0.
  EXPECT_EQ(snipped_end.samples_needed(6), 1360);
  EXPECT_EQ(centred_end.samples_needed(0), 200);
  EXPECT_EQ(centred_end.samples_needed(6), 1160);
  const LogMel whisper(LogMelConfig::whisper_running_maximum());
  EXPECT_EQ(whisper.samples_needed(0), 201);
}

TEST(LogMel, PreEmphasisOverTheStreamAndInsideFrames) {
  std::vector<double> stream{1, 2, 3, 4, 5, 6};
  pre_emphasise(std::span(stream).first(4), 0.97, 0.0);
  pre_emphasise(std::span(stream).subspan(4), 0.97, 4.0);
  const std::vector<double> expected{1, 1.03, 1.06, 1.09, 1.12, 1.15};
  for (std::size_t i = 0; i < 6; ++i) EXPECT_NEAR(stream[i], expected[i], 1e-12);

  std::vector<double> first{1, 2, 3, 4};
  std::vector<double> second{3, 4, 5, 6};
  pre_emphasise(first, 0.97, first[0]);
  pre_emphasise(second, 0.97, second[0]);
  const std::vector<double> expected_first{0.03, 1.03, 1.06, 1.09};
  const std::vector<double> expected_second{0.09, 1.09, 1.12, 1.15};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(first[i], expected_first[i], 1e-12);
    EXPECT_NEAR(second[i], expected_second[i], 1e-12);
  }

  // The oracle's frames are those of the two systems, too.
  LogMelConfig config;
  config.window_length = 4;
  config.hop_length = 2;
  config.fft_size = 4;
  config.pre_emphasis = PreEmphasis::kPerFrame;
  const std::vector<float> samples{1, 2, 3, 4, 5, 6};
  const Rows frames = reference_frames(config, samples);
  ASSERT_EQ(frames.size(), 2U);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(frames[0][i], expected_first[i], 1e-12);
    EXPECT_NEAR(frames[1][i], expected_second[i], 1e-12);
  }
  config.pre_emphasis = PreEmphasis::kStream;
  EXPECT_NEAR(reference_frames(config, samples)[1][0], 1.06, 1e-12);
}

TEST(LogMel, RunningMaximum) {
  const std::vector<double> values{-10, -3, -4, 1, -9, -2};
  const std::vector<double> expected{-1.5, 0.25, 0, 1.25, -0.75, 0.5};
  RunningMaximumNormaliser normalise;
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::vector<double> frame{values[i]};
    normalise(frame);
    EXPECT_DOUBLE_EQ(frame[0], expected[i]);
  }
}

TEST(LogMel, Cumulative) {
  const std::vector<double> values{1, 2, 4, 8};
  const std::vector<double> expected{0, 0.707097, 1.091082, 1.372869};
  CumulativeNormaliser normalise;
  for (std::size_t i = 0; i < values.size(); ++i)
    EXPECT_NEAR(normalise(values[i], static_cast<std::int64_t>(i) + 1), expected[i], 5e-7);
}

// --- Against the oracle --------------------------------------------------------------------------

TEST(LogMel, MatchesTheDefinitionInFloat64) {
  for (const Named& setting : settings()) {
    const LogMel front_end(setting.config);
    for (const std::int64_t count : {1, 2, 63, 150, 399, 400, 401, 560, 1700}) {
      const std::vector<float> samples = speech_like(count, 3);
      expect_equal(reference(setting.config, samples), run_whole(front_end, samples), setting.name);
    }
  }
}

TEST(LogMel, AnyChunkingGivesTheSameBits) {
  for (const Named& setting : settings()) {
    const LogMel front_end(setting.config);
    const std::vector<float> samples = speech_like(3000, 5);
    const std::vector<float> whole = run_whole(front_end, samples);
    EXPECT_EQ(run(front_end, samples, [] { return 1; }), whole) << setting.name;
    Random random(7);
    for (int trial = 0; trial < 150; ++trial) {
      const std::int64_t longest = test::between(random, 1, 900);
      EXPECT_EQ(run(front_end, samples, [&] { return test::between(random, 0, longest); }), whole)
          << setting.name;
    }
  }
}

TEST(LogMel, FramesOfSilenceAreTheFloor) {
  const LogMel front_end(LogMelConfig::kaldi());
  const std::vector<float> rows = run_whole(front_end, std::vector<float>(800));
  ASSERT_EQ(rows.size(), 3U * 80U);
  for (const float value : rows) EXPECT_FLOAT_EQ(value, static_cast<float>(std::log(0x1p-23)));
}

TEST(LogMel, EndlessStreamsHoldOneWindow) {
  const LogMel front_end(LogMelConfig::nemo());
  ByteWriter start;
  front_end.save(front_end.make_state(), start);
  LogMel::State state = front_end.make_state();
  const std::vector<float> samples = speech_like(1000, 9);
  std::vector<float> rows(8 * 80);
  for (int i = 0; i < 100; ++i) {
    front_end.step(samples, state, {rows.data(), 8, 80});
    ByteWriter now;
    front_end.save(state, now);
    EXPECT_LE(now.size(), start.size() + 401 * sizeof(float));
  }
}

// What it declares to chains of layers is what it does.
TEST(LogMel, TimingIsTrue) {
  for (const Named& setting : settings()) {
    const LogMel front_end(setting.config);
    const StreamTiming timing = front_end.timing();
    for (std::int64_t samples = 0; samples < 1500; ++samples) {
      ASSERT_EQ(timing.outputs_after(samples), front_end.frames_of(samples)) << setting.name;
      ASSERT_EQ(timing.outputs_at_end(samples), front_end.frames_at_end(samples))
          << setting.name << ", " << samples << " samples";
    }
  }
  // WeNet: two convolutions (3, 2) without padding over edge-snipped frames; NeMo: centred frames.
  const StreamTiming valid = StreamKernelConfig::valid(3, 2).timing();
  const StreamTiming wenet[] = {LogMel(LogMelConfig::kaldi()).timing(), valid, valid};
  EXPECT_EQ(latency_of(wenet).first_output, 1360);
  EXPECT_EQ(last_input(wenet, 15) + 1, 10960);
  EXPECT_EQ(latency_of(LogMel(LogMelConfig::nemo())).first_output, 200);
}

TEST(LogMel, TakesAColumnOfSamples) {
  const LogMel front_end(LogMelConfig::kaldi());
  const std::vector<float> samples = speech_like(1000, 2);
  std::vector<float> spread(3000, 1e9F);
  for (std::size_t i = 0; i < 1000; ++i) spread[3 * i] = samples[i];
  std::vector<float> rows(80 * 80);
  LogMel::State state = front_end.make_state();
  const std::int64_t count = front_end.step(MatrixView<const float>(spread.data(), 1000, 1, 3),
                                            state, {rows.data(), 80, 80});
  rows.resize(static_cast<std::size_t>(80 * count));
  EXPECT_EQ(rows, run_whole(front_end, samples));
}

// --- Snapshots -----------------------------------------------------------------------------------

TEST(LogMel, SnapshotsContinueBitForBit) {
  for (const Named& setting : settings()) {
    const LogMel front_end(setting.config);
    const std::vector<float> samples = speech_like(2000, 11);
    const std::int64_t mels = front_end.num_mels();
    std::vector<float> rows(static_cast<std::size_t>(2001 * mels));
    const MatrixView<float> out(rows.data(), 2001, mels);
    for (const std::size_t cut : {0U, 1U, 150U, 201U, 777U, 2000U}) {
      LogMel::State first = front_end.make_state();
      front_end.step(std::span(samples).first(cut), first, out);
      ByteWriter writer;
      front_end.save(first, writer);
      LogMel::State second = front_end.make_state();
      front_end.step(std::span(samples).first(500), second, out);  // overwritten
      LogMel::State third = first;
      ByteReader reader(writer.bytes());
      front_end.restore(reader, second);
      reader.expect_end();

      std::vector<std::vector<float>> endings;
      for (LogMel::State* state : {&first, &second, &third}) {
        std::int64_t count = front_end.step(std::span(samples).subspan(cut), *state, out);
        count += front_end.flush(*state, out.middle_rows(count, 2001 - count));
        endings.emplace_back(rows.begin(), rows.begin() + count * mels);
      }
      EXPECT_EQ(endings[1], endings[0]) << setting.name << " at " << cut;
      EXPECT_EQ(endings[2], endings[0]) << setting.name << " at " << cut;
    }
  }
}

TEST(LogMel, DamagedSnapshotsAreRefused) {
  LogMelConfig config = LogMelConfig::nemo();
  config.normaliser = MelNormaliser::kCumulative;
  const LogMel front_end(config);
  LogMel::State state = front_end.make_state();
  std::vector<float> rows(80 * 80);
  front_end.step(speech_like(900, 1), state, {rows.data(), 80, 80});
  ByteWriter writer;
  front_end.save(state, writer);
  for (std::size_t size = 0; size < writer.size(); ++size) {
    ByteReader reader(writer.bytes().first(size));
    const auto error = test::error_of([&] { front_end.restore(reader, state); });
    ASSERT_TRUE(error) << size;
    EXPECT_EQ(error->code(), ErrorCode::kFormat);
  }
  for (const std::int64_t samples : {std::int64_t{-1}, std::int64_t{1} << 61, std::int64_t{7}}) {
    ByteWriter wrong;
    wrong.write(samples);
    std::vector<std::byte> bytes(writer.bytes().begin(), writer.bytes().end());
    std::copy(wrong.bytes().begin(), wrong.bytes().end(), bytes.begin());
    ByteReader reader(bytes);
    EXPECT_TRUE(test::error_of([&] { front_end.restore(reader, state); })) << samples;
  }
}

// --- Configurations ------------------------------------------------------------------------------

TEST(LogMel, RefusesConfigurationsByName) {
  const auto field_of = [](auto change) {
    LogMelConfig config = LogMelConfig::listen(std::vector<float>(80), std::vector<float>(80, 1));
    change(config);
    const auto error = test::error_of([&] { LogMel front_end(config); });
    if (!error) return std::string("none");
    EXPECT_EQ(error->code(), ErrorCode::kConfig);
    return error->detail().field;
  };
  using Config = LogMelConfig;
  EXPECT_EQ(field_of([](Config&) {}), "none");
  EXPECT_EQ(field_of([](Config& c) { c.sample_rate = 0; }), "sample_rate");
  EXPECT_EQ(field_of([](Config& c) { c.window_length = 1; }), "window_length");
  EXPECT_EQ(field_of([](Config& c) { c.hop_length = 401; }), "hop_length");
  EXPECT_EQ(field_of([](Config& c) { c.hop_length = 0; }), "hop_length");
  EXPECT_EQ(field_of([](Config& c) { c.fft_size = 398; }), "fft_size");
  EXPECT_EQ(field_of([](Config& c) { c.fft_size = 405; }), "fft_size");
  EXPECT_EQ(field_of([](Config& c) { c.fft_size = 434; }), "fft_size");
  EXPECT_EQ(field_of([](Config& c) { c.sample_scale = NAN; }), "sample_scale");
  EXPECT_EQ(field_of([](Config& c) { c.pre_emphasis_coefficient = 1.5; }),
            "pre_emphasis_coefficient");
  EXPECT_EQ(field_of([](Config& c) {
              c.framing = Framing::kCentredReflected;
              c.pre_emphasis = PreEmphasis::kStream;
            }),
            "pre_emphasis");
  EXPECT_EQ(field_of([](Config& c) { c.num_mels = 0; }), "num_mels");
  EXPECT_EQ(field_of([](Config& c) { c.mel_low_hz = -1; }), "mel_low_hz");
  EXPECT_EQ(field_of([](Config& c) { c.mel_high_hz = 8001; }), "mel_high_hz");
  EXPECT_EQ(field_of([](Config& c) { c.log_floor = 0; }), "log_floor");
  EXPECT_EQ(field_of([](Config& c) { c.mean.pop_back(); }), "mean");
  EXPECT_EQ(field_of([](Config& c) { c.deviation[3] = 0; }), "deviation");
}

// --- The transform by itself ---------------------------------------------------------------------

TEST(RealFft, EveryPlannedLength) {
  for (std::int64_t size = 1; size <= 600; ++size) {
    std::int64_t rest = size;
    for (const std::int64_t prime : {2, 3, 5})
      while (rest % prime == 0) rest /= prime;
    ASSERT_EQ(detail::RealFft::supports(size), size % 2 == 0 && rest == 1) << size;
    if (!detail::RealFft::supports(size)) continue;
    const detail::RealFft fft(size);
    Random random(static_cast<std::uint64_t>(size));
    std::vector<double> input;
    for (std::int64_t i = 0; i < size; ++i) input.push_back(random.normal());
    std::vector<double> work(static_cast<std::size_t>(fft.work_size()));
    std::vector<double> power(static_cast<std::size_t>(size / 2 + 1));
    fft.power_spectrum(input.data(), work.data(), power.data());
    for (std::int64_t k = 0; k <= size / 2; ++k) {
      double re = 0;
      double im = 0;
      for (std::int64_t i = 0; i < size; ++i) {
        const double angle =
            2 * kPi * static_cast<double>(i * k % size) / static_cast<double>(size);
        re += input[static_cast<std::size_t>(i)] * std::cos(angle);
        im -= input[static_cast<std::size_t>(i)] * std::sin(angle);
      }
      // A few dozen roundings of values whose squares sum up to `size`.
      EXPECT_NEAR(power[static_cast<std::size_t>(k)], re * re + im * im,
                  1e-13 * static_cast<double>(size * size))
          << size << ", bin " << k;
    }
  }
}

}  // namespace SLUICE_TEST_UNIT
}  // namespace sluice
