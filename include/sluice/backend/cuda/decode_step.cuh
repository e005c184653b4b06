// SPDX-License-Identifier: MIT
/// Where a step of decoding stands, kept on the device: how many tokens each sequence has had, the
/// slot that its next token goes to, which slots it sees, and the rotations of the step. All layers
/// of a step read it, one tiny kernel moves it on, so a captured step replays for ever, across
/// eviction and the ring's wrap, with no work on the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/position/position.hpp"

namespace sluice {

/// Which tokens the sequences of a batch keep, at which positions a query sees them, and how heads
/// are rotated. One for all sequences; what differs between them is their number of tokens.
///
/// The meaning of the first five members is RetentionConfig's (kPerQuery, KeyForm::kRotated,
/// max_chunk 1): a query sees the sinks and the last `window_size` keys, its own included; slot i <
/// num_sink_tokens holds sink i, every later token goes round a ring of the other slots. With
/// kInCache, sinks are read by a query that stands at origin + num_sink_tokens + window_size - 1 at
/// most.
struct DecodeStepConfig {
  /// A window without end: a full cache, for at most `capacity` tokens. RetentionConfig's value.
  static constexpr std::int64_t kUnlimitedWindow = std::numeric_limits<std::int64_t>::max() / 4;

  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = kUnlimitedWindow;
  std::int64_t capacity = 0;  ///< slots per sequence, at least num_sink_tokens + window_size
  PositionRule position_rule = PositionRule::kInCache;
  Position origin = 0;

  std::int64_t batch_size = 1;
  /// Radians per token of each rotated pair, Rotary::frequency(); empty: heads are not rotated.
  std::span<const double> frequencies = {};  // [num_pairs]
  double attention_factor = 1;               ///< Rotary::attention_factor()
  bool interleaved = false;                  ///< pairs (2i, 2i + 1) instead of (i, i + num_pairs)
};

namespace detail {

/// What a sequence's step does to its cache. 16 bytes: one load.
struct alignas(16) DecodePlace {
  std::int32_t extent;  ///< slots in use, the new token's included; 0: idle; kFull: no room
  std::int32_t slot;    ///< where the new token goes
  std::int32_t live;    ///< tokens of the ring that the query sees, its own included
  std::int32_t newest;  ///< ring place (slot - num_sink_tokens) of the newest token

  static constexpr std::int32_t kFull = -1;
};

/// A pair's frequency in turns per token, as an unevaluated sum: position * frequency is then exact
/// to the last bits of a double however large the position is.
struct alignas(16) TurnFrequency {
  double high;
  double low;
};

struct DecodeStepParams {
  std::int64_t* totals;              // [batch]
  DecodePlace* places;               // [batch]
  float* rows;                       // [batch, 2 (own place, sinks), 2 (cos, sin), num_pairs]
  const TurnFrequency* frequencies;  // [num_pairs]
  std::int64_t sinks;
  std::int64_t window;
  std::int64_t capacity;
  std::int64_t ceiling;  ///< highest index at which sinks are read
  double origin;
  double attention_factor;
  int num_pairs;
  int delta;  ///< tokens that the sequences move on
};

inline constexpr int kDecodeStepThreads = 128;

/// Cosine and sine of a pair's turn at a position, times `factor`.
__device__ inline float2 rotation_at(double position, TurnFrequency f, double factor) {
  // Whole turns are taken away exactly, so no argument reduction is left for sincospi.
  const double turns = position * f.high;
  const double rest = fma(position, f.high, -turns) + position * f.low;
  double sine;
  double cosine;
  sincospi(2 * ((turns - rint(turns)) + rest), &sine, &cosine);
  return {static_cast<float>(factor * cosine), static_cast<float>(factor * sine)};
}

/// One block per sequence. A template, because nvcc ignores `inline` on kernels.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    decode_step_kernel(const __grid_constant__ DecodeStepParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::int64_t sequence = blockIdx.x;
  std::int64_t total = p.totals[sequence];
  __syncthreads();  // all have read before one writes
  if (total >= 0) total += p.delta;
  if (threadIdx.x == 0) {
    p.totals[sequence] = total;
    DecodePlace place{0, 0, 0, 0};
    if (total >= p.capacity && p.window > p.capacity) {
      place.extent = DecodePlace::kFull;
    } else if (total >= 0) {
      const std::int64_t ring = p.capacity - p.sinks;
      const std::int64_t beyond = total - p.sinks;  // index among the ring's tokens
      place.extent = static_cast<std::int32_t>(total < p.capacity ? total + 1 : p.capacity);
      place.newest = beyond < 0 ? 0 : static_cast<std::int32_t>(beyond % ring);
      place.slot = static_cast<std::int32_t>(beyond < 0 ? total : p.sinks + place.newest);
      const std::int64_t kept = beyond + 1 < p.window ? beyond + 1 : p.window;
      place.live = static_cast<std::int32_t>(kept < 0 ? 0 : kept);
    }
    p.places[sequence] = place;
  }
  if (total < 0) return;
  float* rows = p.rows + sequence * 4 * p.num_pairs;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * p.num_pairs; i += kThreads) {
    const int which = i >= p.num_pairs ? 1 : 0;
    const int pair = i - which * p.num_pairs;
    const std::int64_t index = which == 1 && total > p.ceiling ? p.ceiling : total;
    const double position = p.origin + static_cast<double>(index);
    const float2 turned = rotation_at(position, p.frequencies[pair], p.attention_factor);
    float* row = rows + which * 2 * p.num_pairs;
    row[pair] = turned.x;
    row[p.num_pairs + pair] = turned.y;
  }
}

}  // namespace detail

/// The counters and rotations of a batch of sequences. A step is: every layer's decode_attention(),
/// then advance(). Only construction allocates; one stream at a time.
class DecodeStep {
 public:
  /// \throws Error(kConfig) naming the option that makes no sense; Error(kDevice).
  explicit DecodeStep(const DecodeStepConfig& config)
      : config_(config),
        num_pairs_(static_cast<int>(config.frequencies.size())),
        totals_(checked(config)),
        places_(totals_.size()),
        rows_(totals_.size() * 4 * config.frequencies.size()) {
    config_.frequencies = {};
    std::vector<detail::TurnFrequency> turns;
    for (const double frequency : config.frequencies) {
      const long double exact =
          static_cast<long double>(frequency) / (2 * std::numbers::pi_v<long double>);
      const auto high = static_cast<double>(exact);
      turns.push_back({high, static_cast<double>(exact - static_cast<long double>(high))});
    }
    frequencies_ =
        Buffer<detail::TurnFrequency, cuda>(std::span<const detail::TurnFrequency>(turns));
    detail::prefer_shared_memory(kernel_);
    run(0, nullptr, false);
    check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  }

  const DecodeStepConfig& config() const { return config_; }
  int rotary_dim() const { return 2 * num_pairs_; }

  /// Tells how many tokens each sequence has had: the stream index of its next one. Negative: the
  /// sequence is idle; it sees nothing, stores nothing and stays where it is. Waits for the stream.
  /// \throws Error(kShape) unless there is one count per sequence.
  void set_totals(std::span<const std::int64_t> totals, cudaStream_t stream = nullptr) {
    if (totals.size() != totals_.size())
      throw Error(ErrorCode::kShape,
                  {"one count per sequence", "DecodeStep::set_totals", "totals",
                   std::to_string(totals_.size()), std::to_string(totals.size())});
    totals_.upload(totals, stream);
    run(0, stream, false);
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  /// The counts, read back. Waits for the stream.
  std::vector<std::int64_t> totals(cudaStream_t stream = nullptr) const {
    return totals_.download(stream);
  }

  /// Makes the step's tokens final and prepares the next step. May be captured. overlap: as in
  /// DecodeAttentionPlan.
  /// \throws Error(kDevice).
  void advance(cudaStream_t stream, bool overlap = false) { run(1, stream, overlap); }

  const detail::DecodePlace* places() const { return places_.data(); }
  const float* rows() const { return rows_.data(); }
  const detail::TurnFrequency* frequencies() const { return frequencies_.data(); }
  /// Highest index at which a query reads sinks.
  std::int64_t ceiling() const {
    const bool limited = config_.window_size < DecodeStepConfig::kUnlimitedWindow;
    return limited && config_.position_rule == PositionRule::kInCache
               ? config_.num_sink_tokens + config_.window_size - 1
               : std::numeric_limits<std::int64_t>::max();
  }
  /// Device memory of the counts, for kernels that decide on the device who joins and leaves.
  std::int64_t* totals_data() { return totals_.data(); }
  const std::int64_t* totals_data() const { return totals_.data(); }
  const Buffer<float, cuda>& rows_buffer() const { return rows_; }

 private:
  static std::size_t checked(const DecodeStepConfig& c) {
    const auto require = [](bool good, const char* field, const std::string& expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kConfig, {"decode step does not fit", "DecodeStepConfig", field,
                                         expected, std::to_string(found)});
    };
    require(c.batch_size >= 1 && c.batch_size <= 65535, "batch_size", "1 to 65535", c.batch_size);
    require(c.capacity >= 1 && c.capacity <= (std::int64_t{1} << 30), "capacity", "1 to 2^30",
            c.capacity);
    require(c.num_sink_tokens >= 0 && c.num_sink_tokens < c.capacity, "num_sink_tokens",
            "0 to capacity - 1", c.num_sink_tokens);
    require(c.window_size >= 1, "window_size", "at least 1", c.window_size);
    require(c.window_size >= DecodeStepConfig::kUnlimitedWindow ||
                c.window_size <= c.capacity - c.num_sink_tokens,
            "window_size", "at most capacity - sinks, or unlimited", c.window_size);
    require(c.frequencies.size() <= 512, "frequencies", "at most 512",
            static_cast<std::int64_t>(c.frequencies.size()));
    require(std::isfinite(c.origin), "origin", "a finite position", 0);
    return static_cast<std::size_t>(c.batch_size);
  }

  void run(int delta, cudaStream_t stream, bool overlap) {
    const detail::DecodeStepParams params{.totals = totals_.data(),
                                          .places = places_.data(),
                                          .rows = rows_.data(),
                                          .frequencies = frequencies_.data(),
                                          .sinks = config_.num_sink_tokens,
                                          .window = config_.window_size,
                                          .capacity = config_.capacity,
                                          .ceiling = ceiling(),
                                          .origin = config_.origin,
                                          .attention_factor = config_.attention_factor,
                                          .num_pairs = num_pairs_,
                                          .delta = delta};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(config_.batch_size));
    launch.blockDim = dim3(detail::kDecodeStepThreads);
    launch.stream = stream;
    launch.attrs = &attribute;
    launch.numAttrs = overlap ? 1 : 0;
    check_cuda(cudaLaunchKernelEx(&launch, kernel_, params), "decode_step_kernel");
  }

  // What the attribute is set on (backend.cuh).
  void (*kernel_)(detail::DecodeStepParams) =
      detail::decode_step_kernel<detail::kDecodeStepThreads>;
  DecodeStepConfig config_;
  int num_pairs_;
  Buffer<std::int64_t, cuda> totals_;
  Buffer<detail::DecodePlace, cuda> places_;
  Buffer<float, cuda> rows_;
  Buffer<detail::TurnFrequency, cuda> frequencies_;
};

}  // namespace sluice
