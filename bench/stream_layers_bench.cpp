// SPDX-License-Identifier: MIT
/// Frame layers with state against overlapping windows (StreamiNNC, arXiv 2408.03223), and what a
/// speech encoder of such layers costs.
///
/// `streaminnc`: the paper's network (three blocks of convolution k3, batch norm, ReLU, max pool 4
/// with 128 filters, then convolutions k16 and k1, on 1024-sample windows; random weights), once
/// run anew on every window and once as a stream that computes the new columns only; in turns, for
/// hops from no overlap to 15/16. What no reuse can remove is the head, convolution k16 over the
/// window's columns, which every output has for itself; so the layers before it and the head are
/// also timed alone: their sum predicts the stream's time, and the ratio of the layers alone is the
/// speed-up of what is reused. Deviations are the root mean square of the difference over the
/// range: of windows whose convolutions are padded with zeros, as such networks are trained by
/// default, and of windows that see the signal beyond their edges ("signal padding"), for which
/// reuse is exact.
///
/// `streaminnc_misaligned`: at hops that are not multiples of the pooling strides. The largest
/// change of a first-layer pooled value against the paper's bound, (stride - 1) / rate max |x'|,
/// and the deviation of the network's output.
///
/// `frame_encoder`: a Conformer of random weights on one thread: time over the duration of the
/// audio by chunk size, of the clock and of the processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <deque>
#include <exception>
#include <iostream>
#include <numbers>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/arguments.hpp"
#include "support/json_record.hpp"

#include "sluice/core/random.hpp"
#include "sluice/nn/stream_attention.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_conformer.hpp"
#include "sluice/nn/stream_conv.hpp"
#include "sluice/nn/stream_pointwise.hpp"
#include "sluice/nn/stream_pool.hpp"
#include "sluice/stream/clock.hpp"

namespace {

using namespace sluice;

constexpr const char* kHelp =
    "usage: stream_layers_bench [--json] [WINDOWS]\n"
    "Frame layers with state against overlapping windows, and a speech encoder's real-time "
    "factor.\n"
    "  --json   JSON lines instead of a table\n"
    "  WINDOWS  windows of 1024 samples a measurement (40)\n";

constexpr std::int64_t kWindow = 1024;
constexpr std::int64_t kFilters = 128;
constexpr std::int64_t kPool = 4;
constexpr std::int64_t kColumn = kPool * kPool * kPool;  // samples of a column behind three pools
constexpr double kRate = 256.0;                          // samples a second

std::vector<float> random_values(Random& random, std::int64_t count, double scale) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(scale * random.normal());
  return values;
}

StreamConv1d random_conv(std::uint64_t seed, std::int64_t in, std::int64_t out,
                         const StreamKernelConfig& time) {
  Random random(seed);
  const std::int64_t fan_in = in * time.kernel;
  const std::vector<float> weight =
      random_values(random, out * fan_in, std::sqrt(2.0 / static_cast<double>(fan_in)));
  const std::vector<float> bias = random_values(random, out, 0.1);
  return {{.in_channels = in, .out_channels = out, .time = time},
          WeightMatrix::of(weight.data(), out, fan_in),
          bias.data()};
}

FrameAffine random_batch_norm(std::uint64_t seed) {
  Random random(seed);
  const std::vector<float> mean = random_values(random, kFilters, 0.1);
  std::vector<float> variance = random_values(random, kFilters, 0.2);
  for (float& value : variance) value = 1.0F + value * value;
  return FrameAffine::batch_norm(mean, variance, std::vector<float>(kFilters, 1.0F),
                                 random_values(random, kFilters, 0.1));
}

/// Convolution to pooling, three times: a column of features for 64 samples.
std::vector<AnyStreamLayer> feature_layers() {
  std::vector<AnyStreamLayer> layers;
  for (std::uint64_t block = 0; block < 3; ++block) {
    layers.emplace_back(
        random_conv(10 + block, block == 0 ? 1 : kFilters, kFilters, StreamKernelConfig::same(3)));
    layers.emplace_back(random_batch_norm(20 + block));
    layers.emplace_back(FrameActivation(FrameFunction::kRelu, kFilters));
    layers.emplace_back(StreamPool1d(Pooling::kMax, kFilters, kPool, kPool));
  }
  return layers;
}

/// What sees 16 columns, every `stride` columns.
std::vector<AnyStreamLayer> head_layers(std::int64_t stride) {
  std::vector<AnyStreamLayer> layers;
  layers.emplace_back(
      random_conv(30, kFilters, kFilters, StreamKernelConfig::valid(kWindow / kColumn, stride)));
  layers.emplace_back(FrameActivation(FrameFunction::kRelu, kFilters));
  layers.emplace_back(random_conv(31, kFilters, 1, StreamKernelConfig::causal(1)));
  return layers;
}

/// The whole network, on weights that copies of the layers share.
StreamChain network(std::vector<AnyStreamLayer> features, const std::vector<AnyStreamLayer>& head) {
  features.insert(features.end(), head.begin(), head.end());
  return StreamChain(std::move(features), kWindow);
}

/// Slow waves, their harmonics and noise: [samples, 1].
std::vector<float> signal(std::int64_t samples) {
  Random random(1);
  std::vector<float> values(static_cast<std::size_t>(samples));
  for (std::int64_t t = 0; t < samples; ++t) {
    const double time = static_cast<double>(t) / kRate;
    double sum = 0.1 * random.normal();
    for (int k = 1; k <= 5; ++k)
      sum += std::cos(2.0 * std::numbers::pi * 1.1 * k * time + 0.7 * k) / k;
    values[static_cast<std::size_t>(t)] =
        static_cast<float>(sum * (1.0 + 0.5 * std::sin(2.0 * std::numbers::pi * 0.05 * time)));
  }
  return values;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

/// What a network of windows gives if its convolutions see the signal beyond the window's edges:
/// each window with a window's worth before it and a column behind it, whose features are then cut
/// to those of the window.
std::vector<float> signal_padded_windows(const std::vector<float>& in, std::int64_t hop) {
  const StreamChain features(feature_layers(), kWindow);
  const StreamChain head(head_layers(1));
  auto feature_state = features.make_state();
  auto head_state = head.make_state();
  constexpr std::int64_t kColumns = kWindow / kColumn;
  std::vector<float> columns(static_cast<std::size_t>((2 * kColumns + 2) * kFilters));
  std::vector<float> out;
  const auto samples = static_cast<std::int64_t>(in.size());
  for (std::int64_t first = 0; first + kWindow + kColumn <= samples; first += hop) {
    const std::int64_t before = std::min(first / kColumn, kColumns);
    features.reset(feature_state);
    head.reset(head_state);
    features.step({in.data() + first - before * kColumn, before * kColumn + kWindow + kColumn, 1},
                  feature_state, {columns.data(), 2 * kColumns + 2, kFilters});
    float value = 0.0F;
    head.step({columns.data() + before * kFilters, kColumns, kFilters}, head_state, {&value, 1, 1});
    out.push_back(value);
  }
  return out;
}

struct Reuse {  // microseconds for one window's output
  double windowed_us = 0.0;
  double streaming_us = 0.0;
  double windowed_features_us = 0.0;  // without the head
  double features_us = 0.0;
  double head_us = 0.0;
  double zero_padding = 0.0;
  double signal_padding = 0.0;
};

/// `windows` windows `hop` apart, by both ways in turns, `hop` a multiple of a column. Times are
/// medians of single windows and of single hops, which a busy neighbour disturbs least.
Reuse measure_reuse(std::int64_t hop, std::int64_t windows) {
  constexpr int kRounds = 7;
  const auto time = [](std::vector<double>& all_us, auto&& work) {
    const std::int64_t begin = monotonic_ns();
    work();
    all_us.push_back(static_cast<double>(monotonic_ns() - begin) * 1e-3);
  };
  const std::int64_t samples = kWindow + (windows - 1) * hop;
  const std::vector<float> in = signal(samples + kColumn);
  const std::vector<AnyStreamLayer> shared = feature_layers();
  const std::vector<AnyStreamLayer> whole_head = head_layers(1);
  const std::vector<AnyStreamLayer> hop_head = head_layers(hop / kColumn);
  const StreamChain windowed = network(shared, whole_head);
  const StreamChain streaming = network(shared, hop_head);
  auto windowed_state = windowed.make_state();
  auto streaming_state = streaming.make_state();
  std::vector<float> windowed_out(static_cast<std::size_t>(windows));
  std::vector<float> streaming_out(static_cast<std::size_t>(windows) + 2);
  // The same in two parts, of which the second follows the first as in the network.
  const StreamChain features(shared, kWindow);
  const StreamChain whole_window(whole_head);
  const StreamChain head(hop_head);
  auto features_state = features.make_state();
  auto whole_state = whole_window.make_state();
  auto head_state = head.make_state();
  const std::int64_t columns = features.max_outputs(kWindow) + features.max_flush_outputs();
  std::vector<float> column_out(static_cast<std::size_t>(columns * kFilters));
  const MatrixView<float> column_rows(column_out.data(), columns, kFilters);
  std::vector<double> windowed_us, streaming_us, windowed_features_us, features_us, head_us;
  const auto rows = static_cast<std::int64_t>(streaming_out.size());
  std::int64_t written = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (std::int64_t w = 0; w < windows; ++w) {
      const MatrixView<const float> window(in.data() + w * hop, kWindow, 1);
      time(windowed_us, [&] {
        windowed_inference(windowed, window, kWindow, hop, windowed_state,
                           {windowed_out.data() + w, 1, 1});
      });
    }
    float value = 0.0F;
    for (std::int64_t w = 0; w < windows; ++w) {
      const MatrixView<const float> window(in.data() + w * hop, kWindow, 1);
      time(windowed_features_us, [&] {
        windowed_inference(features, window, kWindow, hop, features_state, column_rows);
      });
      windowed_inference(whole_window, column_rows.middle_rows(0, kWindow / kColumn),
                         kWindow / kColumn, 1, whole_state, {&value, 1, 1});
    }
    // As samples arrive: the first window, then a hop at a time. The column behind the last window
    // is what its convolutions look ahead to.
    streaming.reset(streaming_state);
    written = 0;
    for (std::int64_t at = 0; at < samples + kColumn;) {
      const std::int64_t count = std::min(at == 0 ? kWindow : hop, samples + kColumn - at);
      std::vector<double> first_us;
      time(at > 0 && count == hop ? streaming_us : first_us, [&] {
        written += streaming.step({in.data() + at, count, 1}, streaming_state,
                                  {streaming_out.data() + written, rows - written, 1});
      });
      at += count;
    }
    features.reset(features_state);
    head.reset(head_state);
    for (std::int64_t at = 0; at + hop <= samples; at += hop) {
      std::int64_t found = 0;
      time(features_us, [&] {
        found = features.step({in.data() + at, hop, 1}, features_state, column_rows);
      });
      std::vector<double> first_us;
      time(at >= kWindow ? head_us : first_us, [&] {
        head.step(column_rows.middle_rows(0, found), head_state, {&value, 1, 1});
      });
    }
  }
  if (written < windows) throw std::runtime_error("the stream gave fewer outputs than windows");
  const auto count = static_cast<std::size_t>(windows);
  const std::vector<float> padded = signal_padded_windows(in, hop);
  return {median(windowed_us),
          median(streaming_us),
          median(windowed_features_us),
          median(features_us),
          median(head_us),
          normalised_rms_deviation({streaming_out.data(), count}, windowed_out),
          normalised_rms_deviation({streaming_out.data(), count}, {padded.data(), count})};
}

struct Misaligned {
  double largest_change = 0.0;
  double bound = 0.0;
  double deviation = 0.0;
};

/// Reuse at a hop that is `hop` modulo the strides off: pooled values of the first layer, and the
/// output of the column before the one that a window would begin with.
Misaligned measure_misaligned(std::int64_t hop, std::int64_t windows) {
  const std::int64_t samples = kWindow + (windows - 1) * hop;
  const std::vector<float> in = signal(samples + kWindow);
  const auto all = static_cast<std::int64_t>(in.size());
  Misaligned result;

  std::vector<AnyStreamLayer> first = feature_layers();
  first.erase(first.begin() + 3, first.end());
  const StreamChain before_pool(first);
  first.emplace_back(StreamPool1d(Pooling::kMax, kFilters, kPool, 1));  // a cell at every sample
  const StreamChain every_cell(std::move(first));
  std::vector<float> values(static_cast<std::size_t>(all * kFilters));
  std::vector<float> cells(values.size());
  auto value_state = before_pool.make_state();
  auto cell_state = every_cell.make_state();
  const std::int64_t value_rows =
      before_pool.step({in.data(), all, 1}, value_state, {values.data(), all, kFilters});
  const std::int64_t cell_rows =
      every_cell.step({in.data(), all, 1}, cell_state, {cells.data(), all, kFilters});
  double slope = 0.0;
  for (std::int64_t i = kFilters; i < value_rows * kFilters; ++i)
    slope = std::max(
        slope, std::fabs(static_cast<double>(values[static_cast<std::size_t>(i)]) -
                         static_cast<double>(values[static_cast<std::size_t>(i - kFilters)])));
  result.bound = pooling_reuse_bound(kPool, kRate, slope * kRate);
  const std::int64_t shift = hop % kPool;
  for (std::int64_t i = shift * kFilters; i < cell_rows * kFilters; ++i)
    result.largest_change = std::max(
        result.largest_change,
        std::fabs(static_cast<double>(cells[static_cast<std::size_t>(i)]) -
                  static_cast<double>(cells[static_cast<std::size_t>(i - shift * kFilters)])));

  const StreamChain windowed = network(feature_layers(), head_layers(1));
  auto state = windowed.make_state();
  std::vector<float> exact(static_cast<std::size_t>(windows));
  windowed_inference(windowed, {in.data(), samples, 1}, kWindow, hop, state,
                     {exact.data(), windows, 1});
  std::vector<float> columns(static_cast<std::size_t>(all / kColumn));
  windowed.reset(state);
  windowed.step({in.data(), all, 1}, state,
                {columns.data(), static_cast<std::int64_t>(columns.size()), 1});
  std::vector<float> reused;
  for (std::int64_t w = 0; w < windows; ++w)
    reused.push_back(columns[static_cast<std::size_t>(w * hop / kColumn)]);
  result.deviation = normalised_rms_deviation(reused, exact);
  return result;
}

struct EncoderShape {
  std::int64_t layers = 12;
  std::int64_t width = 256;
  std::int64_t hidden = 1024;
  std::int64_t heads = 4;
  std::int64_t mels = 80;
};

/// A Conformer behind a subsampling by 4 (two convolutions of 64 channels), 10 ms frames in.
StreamChain encoder(const EncoderShape& shape, ElementType type, std::int64_t chunk,
                    std::int64_t& parameters) {
  Random random(3);
  parameters = 0;
  std::deque<std::vector<float>> keep;
  std::deque<std::vector<bf16>> keep_narrow;
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    parameters += rows * cols;
    if (type == ElementType::kBF16) {
      std::vector<bf16>& narrow = keep_narrow.emplace_back();
      for (const float value :
           random_values(random, rows * cols, 1.0 / std::sqrt(static_cast<double>(cols))))
        narrow.emplace_back(value);
      return WeightMatrix{type, narrow.data(), rows, cols};
    }
    keep.push_back(random_values(random, rows * cols, 1.0 / std::sqrt(static_cast<double>(cols))));
    return WeightMatrix::of(keep.back().data(), rows, cols);
  };
  const std::int64_t width = shape.width;
  const auto norm = [&] {
    parameters += 2 * width;
    return FrameNorm({}, std::vector<float>(static_cast<std::size_t>(width), 1.0F));
  };
  constexpr std::int64_t kChannels = 64;
  StreamConv2dConfig conv{.in_channels = 1,
                          .out_channels = kChannels,
                          .time = StreamKernelConfig::nemo_causal(3, 2),
                          .features = shape.mels,
                          .feature_kernel = 3,
                          .feature_stride = 2,
                          .feature_padding_before = 2,
                          .feature_padding_after = 1};
  std::vector<AnyStreamLayer> layers;
  layers.emplace_back(StreamConv2d(conv, matrix(kChannels, 9)));
  layers.emplace_back(FrameActivation(FrameFunction::kRelu, conv.out_features() * kChannels));
  conv.features = conv.out_features();
  conv.in_channels = kChannels;
  layers.emplace_back(StreamConv2d(conv, matrix(kChannels, 9 * kChannels)));
  layers.emplace_back(FrameActivation(FrameFunction::kRelu, conv.out_features() * kChannels));
  layers.emplace_back(FrameLinear(matrix(width, conv.out_features() * kChannels)));
  const auto feed_forward = [&] {
    return StreamResidual(StreamChain({norm(), FrameLinear(matrix(shape.hidden, width)),
                                       FrameActivation(FrameFunction::kSilu, shape.hidden),
                                       FrameLinear(matrix(width, shape.hidden))}),
                          0.5F);
  };
  const auto packed = [&] {
    return PackedLinear(matrix(width, width));
  };
  for (std::int64_t l = 0; l < shape.layers; ++l) {
    layers.emplace_back(feed_forward());
    layers.emplace_back(StreamResidual(StreamChain(
        {norm(), StreamAttention({.width = width,
                                  .num_heads = shape.heads,
                                  .visibility = FrameVisibility::chunks(chunk, 64 / chunk),
                                  .positions = FramePositions::kRelative},
                                 {.query = packed(),
                                  .key = packed(),
                                  .value = packed(),
                                  .output = packed(),
                                  .position = packed()})})));
    const ConformerConvolution parts{.expand = matrix(2 * width, width),
                                     .depthwise = matrix(width, 9),
                                     .time = StreamKernelConfig::causal(9),
                                     .project = matrix(width, width)};
    layers.emplace_back(
        StreamResidual(StreamChain({norm(), conformer_convolution(parts, norm())})));
    layers.emplace_back(feed_forward());
    layers.emplace_back(norm());
  }
  return StreamChain(std::move(layers));
}

struct EncoderTime {
  std::int64_t parameters = 0;
  double rtf = 0.0;         // of all chunks
  double median_rtf = 0.0;  // of the median chunk
  double cpu_rtf = 0.0;     // processor time, which neighbours do not stretch as much
  double worst_chunk_ms = 0.0;
  StreamLatency latency;
  std::size_t state_bytes = 0;
};

/// 10 seconds of frames, a chunk at a time, after one second to warm up.
EncoderTime measure_encoder(ElementType type, std::int64_t chunk) {
  EncoderTime result;
  const EncoderShape shape;
  const StreamChain model = encoder(shape, type, chunk, result.parameters);
  auto state = model.make_state();
  Random random(4);
  const std::int64_t frames = 4 * chunk;  // of 10 ms
  const std::vector<float> in = random_values(random, frames * shape.mels, 1.0);
  std::vector<float> out(static_cast<std::size_t>(model.max_outputs(frames) * shape.width));
  const MatrixView<const float> view(in.data(), frames, shape.mels);
  const MatrixView<float> target(out.data(), model.max_outputs(frames), shape.width);
  for (std::int64_t t = 0; t < 100; t += frames) model.step(view, state, target);
  std::vector<double> all_ms;
  const std::clock_t cpu_begin = std::clock();
  for (std::int64_t fed = 0; fed < 1000; fed += frames) {
    const std::int64_t begin = monotonic_ns();
    model.step(view, state, target);
    const double ms = static_cast<double>(monotonic_ns() - begin) * 1e-6;
    all_ms.push_back(ms);
    result.worst_chunk_ms = std::max(result.worst_chunk_ms, ms);
  }
  const double cpu_ms = 1e3 * static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC;
  double total = 0.0;
  for (const double ms : all_ms) total += ms;
  const double chunk_ms = 10.0 * static_cast<double>(frames);
  result.rtf = total / (chunk_ms * static_cast<double>(all_ms.size()));
  result.median_rtf = median(all_ms) / chunk_ms;
  result.cpu_rtf = cpu_ms / (chunk_ms * static_cast<double>(all_ms.size()));
  result.latency = latency_of(model);
  result.state_bytes = model.state_bytes();
  return result;
}

void run(bool json, std::int64_t windows) {
  if (!json)
    std::printf("%6s %8s %11s %10s %9s %12s %9s %10s %10s %13s %15s\n", "hop", "overlap",
                "windows us", "stream us", "speed-up", "features us", "head us", "predicted",
                "features x", "zero padding", "signal padding");
  for (const std::int64_t hop : {1024, 768, 512, 384, 256, 192, 128, 64}) {
    const Reuse reuse = measure_reuse(hop, windows);
    const double overlap = 1.0 - static_cast<double>(hop) / static_cast<double>(kWindow);
    const double speedup = reuse.windowed_us / reuse.streaming_us;
    const double predicted_us = reuse.features_us + reuse.head_us;
    const double predicted = (reuse.windowed_features_us + reuse.head_us) / predicted_us;
    const double features_speedup = reuse.windowed_features_us / reuse.features_us;
    if (json)
      bench::Record("streaminnc")
          .field("window", kWindow)
          .field("hop", hop)
          .field("overlap", overlap)
          .field("windows", windows)
          .field("windowed_us", reuse.windowed_us)
          .field("streaming_us", reuse.streaming_us)
          .field("speedup", speedup)
          .field("windowed_features_us", reuse.windowed_features_us)
          .field("features_us", reuse.features_us)
          .field("head_us", reuse.head_us)
          .field("predicted_us", predicted_us)
          .field("predicted_speedup", predicted)
          .field("features_speedup", features_speedup)
          .field("work_ratio", static_cast<double>(kWindow) / static_cast<double>(hop))
          .field("deviation_zero_padding", reuse.zero_padding)
          .field("deviation_signal_padding", reuse.signal_padding);
    else
      std::printf(
          "%6lld %7.1f%% %11.1f %10.1f %9.2f %12.1f %9.1f %10.2f %10.2f %12.3f%% %14.3g%%\n",
          static_cast<long long>(hop), 100.0 * overlap, reuse.windowed_us, reuse.streaming_us,
          speedup, reuse.features_us, reuse.head_us, predicted, features_speedup,
          100.0 * reuse.zero_padding, 100.0 * reuse.signal_padding);
  }
  if (!json)
    std::printf("\n%6s %16s %12s %18s\n", "hop", "largest change", "bound", "output deviation");
  for (const std::int64_t hop : {65, 66, 67, 95, 257}) {
    const Misaligned found = measure_misaligned(hop, windows);
    if (json)
      bench::Record("streaminnc_misaligned")
          .field("window", kWindow)
          .field("hop", hop)
          .field("pool_stride", kPool)
          .field("largest_change", found.largest_change)
          .field("bound", found.bound)
          .field("output_deviation", found.deviation);
    else
      std::printf("%6lld %16.4f %12.4f %17.3f%%\n", static_cast<long long>(hop),
                  found.largest_change, found.bound, 100.0 * found.deviation);
  }
  if (!json)
    std::printf("\n%6s %6s %12s %8s %8s %16s %16s %12s\n", "type", "chunk", "parameters", "RTF",
                "of CPU", "slowest chunk ms", "first output ms", "state KiB");
  for (const auto& [type, chunk] : {std::pair{ElementType::kF32, 1},
                                    {ElementType::kF32, 4},
                                    {ElementType::kF32, 16},
                                    {ElementType::kBF16, 1},
                                    {ElementType::kBF16, 4},
                                    {ElementType::kBF16, 16}}) {
    const EncoderTime time = measure_encoder(type, chunk);
    if (json)
      bench::Record("frame_encoder")
          .field("weights", std::string(to_string(type)))
          .field("chunk_frames", std::int64_t{chunk})
          .field("frame_ms", std::int64_t{40})
          .field("parameters", time.parameters)
          .field("rtf", time.rtf)
          .field("median_rtf", time.median_rtf)
          .field("cpu_rtf", time.cpu_rtf)
          .field("worst_chunk_ms", time.worst_chunk_ms)
          .field("first_output_ms", 10 * time.latency.first_output)
          .field("look_ahead_ms", 10 * time.latency.look_ahead)
          .field("max_chunk_wait_ms", 10 * time.latency.max_chunk_wait)
          .field("state_bytes", static_cast<std::int64_t>(time.state_bytes));
    else
      std::printf("%6s %6d %11.1fM %8.4f %8.4f %16.2f %16lld %12.0f\n",
                  std::string(to_string(type)).c_str(), chunk,
                  static_cast<double>(time.parameters) * 1e-6, time.rtf, time.cpu_rtf,
                  time.worst_chunk_ms, static_cast<long long>(10 * time.latency.first_output),
                  static_cast<double>(time.state_bytes) / 1024.0);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  bool json = false;
  std::int64_t windows = 40;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--benchmark_list_tests") {
      std::cout << "streaminnc\nstreaminnc_misaligned\nframe_encoder\n";
      return 0;
    }
    if (argument == "--help") {
      std::cout << kHelp;
      return 0;
    }
    if (argument == "--json") {
      json = true;
      continue;
    }
    windows = bench::number(argument, "WINDOWS");
  }
  run(json, windows);
} catch (const std::exception& error) {
  std::cerr << "stream_layers_bench: " << error.what() << "\n" << kHelp;
  return 2;
}
