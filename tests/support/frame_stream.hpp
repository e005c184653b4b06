// SPDX-License-Identifier: MIT
/// Runs layers over frames in random chunks: what every test of a streaming layer needs.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include <gtest/gtest.h>

#include "sluice/core/random.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "support/property.hpp"

namespace sluice::test {

/// Rows of floats. [rows, width]
struct Frames {
  std::int64_t rows = 0;
  std::int64_t width = 0;
  std::vector<float> values = {};

  Frames(std::int64_t rows_, std::int64_t width_, float value = 0.0F)
      : rows(rows_), width(width_), values(static_cast<std::size_t>(rows_ * width_), value) {}
  Frames(std::int64_t width_, std::vector<float> values_)
      : rows(static_cast<std::int64_t>(values_.size()) / width_),
        width(width_),
        values(std::move(values_)) {}
  static Frames random(Random& random, std::int64_t rows, std::int64_t width) {
    Frames frames(rows, width);
    for (float& value : frames.values) value = static_cast<float>(random.normal());
    return frames;
  }

  float* row(std::int64_t t) { return values.data() + t * width; }
  const float* row(std::int64_t t) const { return values.data() + t * width; }
  float at(std::int64_t t, std::int64_t c) const { return row(t)[c]; }
  MatrixView<const float> view() const { return {values.data(), rows, width}; }
  MatrixView<float> view() { return {values.data(), rows, width}; }
};

inline std::vector<float> random_values(Random& random, std::int64_t count, double scale = 1.0) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(scale * random.normal());
  return values;
}

/// Room for everything that a layer writes for `frames` inputs in any chunks, full of NaN.
template <StreamLayer Layer>
Frames room_for(const Layer& layer, std::int64_t frames) {
  return {layer.max_outputs(frames) + layer.max_flush_outputs() + 1, layer.out_width(),
          std::numeric_limits<float>::quiet_NaN()};
}

/// One step with everything, then the end.
template <StreamLayer Layer>
Frames run_whole(const Layer& layer, const Frames& in) {
  auto state = layer.make_state();
  Frames out = room_for(layer, in.rows);
  std::int64_t rows = layer.step(in.view(), state, out.view());
  rows += layer.flush(state, out.view().middle_rows(rows, out.rows - rows));
  out.values.resize(static_cast<std::size_t>(rows * out.width));
  out.rows = rows;
  return out;
}

/// The same bits, NaNs included.
inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
  });
}

/// `runs` random chunkings, chunks of no frames included, against one step with everything: the
/// same bits, each row as soon as the layer's timing says and not earlier. In every eighth run the
/// stream is left at a random chunk: what follows must be the same from a copy of the state, from
/// restored bytes, and from the state itself after another stream went through it.
template <StreamLayer Layer>
void expect_exact_streaming(const Layer& layer, const Frames& in, std::uint64_t seed,
                            int runs = 1000) {
  const Frames whole = run_whole(layer, in);
  const std::vector<StreamTiming> timings = timings_of(layer);
  ASSERT_EQ(whole.rows, outputs_at_end(std::span<const StreamTiming>(timings), in.rows));
  Random random(seed);
  auto state = layer.make_state();
  auto other = layer.make_state();
  Frames out = room_for(layer, in.rows);
  for (int run = 0; run < runs; ++run) {
    layer.reset(state);
    std::fill(out.values.begin(), out.values.end(), std::numeric_limits<float>::quiet_NaN());
    const std::int64_t longest = between(random, 1, run % 4 == 0 ? in.rows + 1 : 5);
    const std::int64_t leave = run % 8 == 0 ? between(random, 0, in.rows) : -1;
    std::int64_t accepted = 0;
    std::int64_t rows = 0;
    bool left = false;
    while (accepted < in.rows) {
      const std::int64_t frames = std::min(between(random, 0, longest), in.rows - accepted);
      const std::int64_t written = layer.step(in.view().middle_rows(accepted, frames), state,
                                              out.view().middle_rows(rows, out.rows - rows));
      accepted += frames;
      rows += written;
      ASSERT_LE(written, layer.max_outputs(frames));
      ASSERT_EQ(rows, outputs_after(std::span<const StreamTiming>(timings), accepted))
          << "after " << accepted << " frames";
      if (leave >= 0 && accepted >= leave && !left) {
        left = true;
        const auto copy = state;
        const std::vector<std::byte> bytes = save_stream_state(layer, state);
        // What is declared holds what is saved, besides the frame around it and a count a row,
        // which is twice the size of a row of one float.
        ASSERT_LE(bytes.size(), layer.state_bytes() * 3 + 200);
        // Another stream goes through the state; then the first comes back.
        Frames rest = room_for(layer, in.rows);
        layer.step(in.view(), state, rest.view());
        if (run % 16 == 0) {
          state = copy;
        } else {
          layer.step(in.view(), other, rest.view());
          restore_stream_state(layer, bytes, other);
          std::swap(state, other);
        }
      }
    }
    const std::int64_t flushed = layer.flush(state, out.view().middle_rows(rows, out.rows - rows));
    ASSERT_LE(flushed, layer.max_flush_outputs());
    rows += flushed;
    ASSERT_EQ(rows, whole.rows);
    ASSERT_TRUE(
        same_bits(std::span<const float>(out.values).first(whole.values.size()), whole.values))
        << "run " << run << " of seed " << seed;
  }
}

/// `actual` within `tolerance` of the float64 reference, relative to its largest value.
inline void expect_close(const Frames& actual, std::span<const double> expected, double tolerance) {
  ASSERT_EQ(actual.values.size(), expected.size());
  double largest = 1.0;
  for (const double value : expected) largest = std::max(largest, std::fabs(value));
  for (std::size_t i = 0; i < expected.size(); ++i)
    ASSERT_NEAR(static_cast<double>(actual.values[i]), expected[i], tolerance * largest)
        << "row " << static_cast<std::int64_t>(i) / actual.width << ", column "
        << static_cast<std::int64_t>(i) % actual.width;
}

/// Latency as declared against a run frame by frame: when the first row comes, and how long the
/// rows of a few periods wait.
template <StreamLayer Layer>
void expect_declared_latency(const Layer& layer, std::int64_t frames) {
  const StreamLatency latency = latency_of(layer);
  auto state = layer.make_state();
  Frames out = room_for(layer, frames);
  const Frames frame(1, layer.in_width(), 0.5F);
  std::int64_t rows = 0;
  std::int64_t first = -1;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  std::int64_t most = 0;
  for (std::int64_t t = 0; t < frames; ++t) {
    const std::int64_t written =
        layer.step(frame.view(), state, out.view().middle_rows(rows, out.rows - rows));
    for (std::int64_t n = rows; n < rows + written; ++n) {
      if (first < 0) first = t + 1;
      const std::int64_t wait = t - n * latency.stride / latency.upsample;
      least = std::min(least, wait);
      most = std::max(most, wait);
    }
    rows += written;
  }
  EXPECT_EQ(first, latency.first_output);
  EXPECT_EQ(least, latency.look_ahead);
  EXPECT_EQ(most, latency.look_ahead + latency.max_chunk_wait);
}

}  // namespace sluice::test
