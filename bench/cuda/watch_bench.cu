// SPDX-License-Identifier: MIT
/// Watches video at StreamingVLM's geometry (Qwen2.5-VL-7B with random weights, bf16) for a given
/// time of video, as fast as it can: two frames a grid through the vision tower, the grid's tokens
/// into the decoder, and a reply after each second or after each grid. Sinks 512, text window 512,
/// 16 s of frames, replies of at most 20 tokens a second: the released sizes. One JSON object a
/// line, on stdout.
///
/// usage: watch_bench [--fps N] [--rows N --cols N] [--seconds N] [--reply N] [--per-grid]
///                    [--report N] [--no-tower]
///   --fps N      frames of a second of video (30); two are a grid
///   --rows, --cols  tokens of a grid (8 x 16; at 8 frames a second 16 x 24), multiples of 4
///   --seconds N  of video (60)
///   --reply N    tokens said in a round (20; with --per-grid 2)
///   --per-grid   a round is a grid, not a second: the reply follows its frames at once
///   --report N   a row for each N seconds of video besides the one at the end (0: none)
///   --no-tower   the decoder alone: tokens of frames are given
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include <sluice/sluice.cuh>

#include "cuda/measure.cuh"
#include "cuda/random_weights.cuh"

namespace {

using namespace sluice;
using namespace sluice::bench;

struct Options {
  double fps = 30;
  std::int64_t rows = 8;
  std::int64_t cols = 16;
  std::int64_t seconds = 60;
  std::int64_t reply = 0;
  std::int64_t report = 0;
  bool per_grid = false;
  bool tower = true;
};

double quantile(std::vector<double> x, double q) {
  if (x.empty()) return 0;
  std::sort(x.begin(), x.end());
  return x[static_cast<std::size_t>(q * static_cast<double>(x.size() - 1))];
}

/// Qwen2.5-VL's tower, its feed-forward 3,424 wide instead of 3,420: every row has content.
CudaVisionWeights<bf16> tower_weights() {
  CudaVisionWeights<bf16> weights(CudaVisionShape{.feed_forward_width = 3424});
  const CudaVisionShape& shape = weights.shape();
  std::uint64_t salt = 1000;
  fill(weights.patches, shape.patch_values(), salt++);
  for (CudaVisionLayer<bf16>& layer : weights.layers) {
    fill(layer.query_key_value, shape.width, salt++);
    fill(layer.output, shape.width, salt++);
    fill(layer.gate_up, shape.width, salt++);
    fill(layer.down, shape.stored_feed_forward(), salt++);
  }
  fill(weights.merger_first, shape.merged_width(), salt++);
  fill(weights.merger_second, shape.merged_width(), salt++);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return weights;
}

class Events {
 public:
  explicit Events(std::size_t count) : events_(count) {
    for (cudaEvent_t& event : events_) check_cuda(cudaEventCreate(&event), "cudaEventCreate");
  }
  ~Events() {
    for (cudaEvent_t event : events_) static_cast<void>(cudaEventDestroy(event));
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  void record(std::size_t i, cudaStream_t stream) {
    check_cuda(cudaEventRecord(events_[i], stream), "cudaEventRecord");
  }
  /// Milliseconds from event a to event b.
  double between(std::size_t a, std::size_t b) const {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, events_[a], events_[b]), "cudaEventElapsedTime");
    return static_cast<double>(ms);
  }

 private:
  std::vector<cudaEvent_t> events_;
};

/// A row over the `seconds` of video that end with event `last`, `end` seconds into the run.
void report(std::int64_t seconds, std::int64_t end, std::int64_t grids_per_second,
            const Events& events, std::size_t last, long long growth) {
  const auto second_events = static_cast<std::size_t>(4 * grids_per_second);
  std::vector<double> each;
  for (std::int64_t i = 0; i < seconds; ++i) {
    const std::size_t to = last - static_cast<std::size_t>(i) * second_events;
    each.push_back(events.between(to + 1 - second_events, to));
  }
  const double total =
      events.between(last + 1 - static_cast<std::size_t>(seconds) * second_events, last);
  std::printf(
      "{\"bench\": \"watch_part\", \"from_s\": %lld, \"to_s\": %lld, \"fps\": %.2f, "
      "\"second_ms_p50\": %.2f, \"second_ms_max\": %.2f, \"memory_growth_bytes\": %lld}\n",
      static_cast<long long>(end - seconds), static_cast<long long>(end),
      static_cast<double>(2 * seconds * grids_per_second) / total * 1e3, quantile(each, 0.5),
      quantile(each, 1), growth);
  std::fflush(stdout);
}

void watch(const Options& options) {
  const CudaDecoderShape shape{152064, 3584, 18944, 28, 4, 128, 28, 1e-6, 1 / std::sqrt(128.0)};
  const std::unique_ptr<CudaDecoderWeights<bf16>> weights = random_weights(shape);
  std::vector<Buffer<float, cuda>> biases;
  for (std::int64_t l = 0; l < shape.num_layers; ++l)
    biases.emplace_back(static_cast<std::size_t>(shape.fused_size()));

  const auto grids_per_second = static_cast<std::int64_t>(std::lround(options.fps / 2));
  const std::int64_t tokens = options.rows * options.cols;
  const std::int64_t rounds_per_second = options.per_grid ? grids_per_second : 1;
  const std::int64_t grids_per_round = grids_per_second / rounds_per_second;
  const std::int64_t reply = options.reply > 0 ? options.reply : options.per_grid ? 2 : 20;
  std::vector<double> frequencies;
  for (int i = 0; i < 64; ++i) frequencies.push_back(std::pow(1000000.0, -2.0 * i / 128));
  CudaKindDecoderOptions decoder_options;
  decoder_options.retention = {.text_sinks = 512,
                               .text_window = 512,
                               .text_rounds = 16 * rounds_per_second,
                               .vision_rounds = 16 * rounds_per_second,
                               .max_head = 4,
                               .max_tail = 2,
                               .max_turn = 16,
                               .max_reply = std::max<std::int64_t>(reply, 1),
                               .max_vision = tokens * grids_per_round,
                               .max_spans = grids_per_round + 3,
                               .max_chunk = tokens};
  decoder_options.frequencies = frequencies;
  decoder_options.time_pairs = 16;
  decoder_options.height_pairs = 24;
  decoder_options.choice = {.temperature = 0.9F, .seed = 1};
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  {
    CudaKindDecoder<bf16, 128> decoder(*weights, decoder_options, stream, biases);
    // Without the tower neither it nor its weights take memory: the figures are the decoder's.
    std::optional<CudaVisionWeights<bf16>> seeing_weights;
    std::optional<CudaVisionTower<bf16, 80>> tower;
    std::int64_t grid_bytes = 0;
    if (options.tower) {
      seeing_weights.emplace(tower_weights());
      tower.emplace(*seeing_weights, options.rows, options.cols, stream);
      grid_bytes = tower->shape().grid_frames * tower->frame_bytes();
    }
    Buffer<float, cuda> given(static_cast<std::size_t>(tokens * shape.hidden_size));
    std::vector<float> row(given.size());
    for (std::size_t i = 0; i < row.size(); ++i)
      row[i] = std::sin(static_cast<float>(i % 8191)) * 1.4F;
    given.upload(row);
    // A scene of four grids that comes round: what frames show changes no cost.
    constexpr std::int64_t kScenes = 4;
    PinnedBytes frames(static_cast<std::size_t>(kScenes * grid_bytes));
    for (std::int64_t i = 0; i < kScenes * grid_bytes; ++i)
      frames.data()[i] = static_cast<std::byte>((i * 2654435761U >> 13) & 0xff);

    std::vector<std::int32_t> turn{151644, 872, 198, 1462, 28, 15, 12, 16, 82, 151652};
    decoder.begin_span(SpanRole::kHead);
    decoder.read(std::vector<std::int32_t>{151644, 19702, 1467, 198});
    decoder.begin_span(SpanRole::kPrevious);
    std::vector<std::int32_t> previous;
    for (std::int32_t i = 0; i < 512; ++i) previous.push_back(1000 + 37 * i);
    decoder.read(previous);
    decoder.begin_span(SpanRole::kTail);
    decoder.read(std::vector<std::int32_t>{151645, 198});

    const VisionGrid grid{.frames = 1,
                          .rows = options.rows,
                          .cols = options.cols,
                          .frame_step = time_step(2 / options.fps)};
    const std::int64_t warm = 20 * grids_per_second;  // the frames' ring is full, and wraps
    const std::int64_t all = options.seconds * grids_per_second + warm;
    // Per grid: begin, tower done, tokens in, reply done.
    Events events(static_cast<std::size_t>(4 * all));
    std::vector<bool> replied(static_cast<std::size_t>(all), false);
    std::size_t free_before = 0;
    std::size_t free_after = 0;
    std::size_t memory = 0;
    for (std::int64_t g = 0; g < all; ++g) {
      const auto at = static_cast<std::size_t>(4 * g);
      events.record(at, stream);
      if (g % grids_per_round == 0) {
        decoder.begin_round();
        if (g % grids_per_second == 0) {
          decoder.begin_span(SpanRole::kTurn);
          decoder.read(turn);
        }
      }
      const float* seen = tower
                              ? tower->encode(reinterpret_cast<const std::uint8_t*>(frames.data()) +
                                              g % kScenes * grid_bytes)
                              : given.data();
      events.record(at + 1, stream);
      decoder.begin_span(SpanRole::kVision, grid);
      decoder.see(seen, tokens);
      events.record(at + 2, stream);
      if (g % grids_per_round == grids_per_round - 1) {
        decoder.choose();
        decoder.begin_span(SpanRole::kReply);
        decoder.say(reply);
        replied[static_cast<std::size_t>(g)] = true;
      }
      events.record(at + 3, stream);
      if (g == warm - 1) {
        check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        check_cuda(cudaMemGetInfo(&free_before, &memory), "cudaMemGetInfo");
      }
      // The wait for the device costs a row's first grid some launches in advance, nothing else.
      const std::int64_t watched = g - warm + 1;
      if (options.report > 0 && watched > 0 && watched % (options.report * grids_per_second) == 0) {
        check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        check_cuda(cudaMemGetInfo(&free_after, &memory), "cudaMemGetInfo");
        report(options.report, watched / grids_per_second, grids_per_second, events, at + 3,
               static_cast<long long>(free_before) - static_cast<long long>(free_after));
      }
    }
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    check_cuda(cudaMemGetInfo(&free_after, &memory), "cudaMemGetInfo");

    std::vector<double> whole;
    std::vector<double> seeing;
    std::vector<double> reading;
    std::vector<double> token_times;
    std::vector<double> per_second;
    std::vector<double> late;  // completion less arrival of the grid's second frame
    // As if frames came on a clock: a grid is taken up when it is there and the one before is done.
    double done = 0;
    std::int64_t misses = 0;
    const double period = 2000 / options.fps;
    for (std::int64_t g = warm; g < all; ++g) {
      const auto at = static_cast<std::size_t>(4 * g);
      const double cost = events.between(at, at + 3);
      whole.push_back(cost);
      seeing.push_back(events.between(at, at + 1));
      reading.push_back(events.between(at + 1, at + 2));
      if (replied[static_cast<std::size_t>(g)])
        token_times.push_back(events.between(at + 2, at + 3) / static_cast<double>(reply));
      const double arrival = static_cast<double>(g - warm + 1) * period;
      done = std::max(done, arrival) + cost;
      late.push_back(done - arrival);
      misses += done > arrival + period ? 1 : 0;
      if (g % grids_per_second == grids_per_second - 1)
        per_second.push_back(
            events.between(4 * static_cast<std::size_t>(g - grids_per_second + 1), at + 3));
    }
    const double total =
        events.between(static_cast<std::size_t>(4 * warm), static_cast<std::size_t>(4 * all - 1));
    const auto grids = static_cast<double>(all - warm);
    const auto tenth =
        static_cast<std::ptrdiff_t>(std::max<std::size_t>(per_second.size() / 10, 1));
    const KindRetention& kept = decoder.retention();
    const auto megabytes = [&](TokenKind kind) {
      return static_cast<double>(kept.kept(kind)) * static_cast<double>(decoder.token_bytes()) *
             1e-6;
    };
    std::printf(
        "{\"bench\": \"watch\", \"model\": \"qwen2.5-vl-7b\", \"type\": \"bf16\", \"tower\": %s, "
        "\"goal_fps\": %.0f, \"tokens_per_grid\": %lld, \"round\": \"%s\", \"reply\": %lld, "
        "\"video_seconds\": %lld, \"frames\": %.0f, \"took_s\": %.3f, \"sustained_fps\": %.1f, "
        "\"speed\": %.2f, \"grid_ms_p50\": %.3f, \"grid_ms_p99\": %.3f, \"grid_ms_max\": %.3f, "
        "\"tower_ms_p50\": %.3f, \"read_ms_p50\": %.3f, \"read_ms_p99\": %.3f, "
        "\"token_ms_p50\": %.3f, \"second_ms_p50\": %.2f, \"second_ms_p99\": %.2f, "
        "\"second_ms_first_tenth\": %.2f, \"second_ms_last_tenth\": %.2f, "
        "\"paced_latency_ms_p50\": %.2f, \"paced_latency_ms_p99\": %.2f, "
        "\"paced_latency_ms_max\": %.2f, \"paced_misses\": %lld, \"hour_s\": %.1f, "
        "\"kept_tokens\": %lld, \"cache_mb\": %.1f, \"pinned_mb\": %.1f, \"text_mb\": %.1f, "
        "\"vision_mb\": %.1f, \"rounds\": %lld, \"tokens_seen\": %lld, "
        "\"memory_growth_bytes\": %lld}\n",
        options.tower ? "true" : "false", options.fps, static_cast<long long>(tokens),
        options.per_grid ? "grid" : "second", static_cast<long long>(reply),
        static_cast<long long>(options.seconds), 2 * grids, total * 1e-3, 2 * grids / total * 1e3,
        static_cast<double>(options.seconds) / total * 1e3, quantile(whole, 0.5),
        quantile(whole, 0.99), quantile(whole, 1), quantile(seeing, 0.5), quantile(reading, 0.5),
        quantile(reading, 0.99), quantile(token_times, 0.5), quantile(per_second, 0.5),
        quantile(per_second, 0.99), quantile({per_second.begin(), per_second.begin() + tenth}, 0.5),
        quantile({per_second.end() - tenth, per_second.end()}, 0.5), quantile(late, 0.5),
        quantile(late, 0.99), quantile(late, 1), static_cast<long long>(misses),
        3600 * total * 1e-3 / static_cast<double>(options.seconds),
        static_cast<long long>(kept.size()), static_cast<double>(decoder.cache_bytes()) * 1e-6,
        megabytes(TokenKind::kPinned), megabytes(TokenKind::kText), megabytes(TokenKind::kVision),
        static_cast<long long>(kept.rounds()), static_cast<long long>(kept.total()),
        static_cast<long long>(free_before) - static_cast<long long>(free_after));
    std::fflush(stdout);
  }
  check_cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const auto number = [&](const char* name, auto& value) {
      if (std::strcmp(arguments[i], name) != 0 || i + 1 >= count) return false;
      value = static_cast<std::remove_reference_t<decltype(value)>>(std::atof(arguments[++i]));
      return true;
    };
    if (number("--fps", options.fps) || number("--rows", options.rows) ||
        number("--cols", options.cols) || number("--seconds", options.seconds) ||
        number("--reply", options.reply) || number("--report", options.report))
      continue;
    if (std::strcmp(arguments[i], "--per-grid") == 0) {
      options.per_grid = true;
    } else if (std::strcmp(arguments[i], "--no-tower") == 0) {
      options.tower = false;
    } else {
      std::fprintf(stderr,
                   "usage: watch_bench [--fps N] [--rows N --cols N] [--seconds N] [--reply N] "
                   "[--per-grid] [--report N] [--no-tower]\n");
      return 2;
    }
  }
  if (options.fps < 2 || options.fps > 240 || std::lround(options.fps) % 2 != 0 ||
      options.rows < 4 || options.rows % 4 != 0 || options.cols < 4 || options.cols % 4 != 0 ||
      options.seconds < 1) {
    std::fprintf(stderr,
                 "watch_bench: an even rate, rows and columns in fours, a second at least\n");
    return 2;
  }
  try {
    watch(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "watch_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
