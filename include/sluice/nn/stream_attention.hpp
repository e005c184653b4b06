// SPDX-License-Identifier: MIT
/// Self-attention of streaming encoders: each frame sees a bounded stretch of frames before it and,
/// where the model was trained so, some behind it or the rest of its chunk. Keys and values are
/// projected once and stay in a ring; frames whose right context is not there yet are held back and
/// become final later. Windows are data, so one set of weights serves any chunk size (WeNet's
/// dynamic chunks, NeMo's list of contexts, Transformer-Transducer, Moonshine v2).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cpu/simd.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/view.hpp"
#include "sluice/nn/packed_linear.hpp"
#include "sluice/nn/stream_chain.hpp"
#include "sluice/nn/stream_layer.hpp"
#include "sluice/nn/stream_timing.hpp"

namespace sluice {

/// Which frames a frame sees: those from `left` before its chunk begins to `right` behind its
/// chunk's end. Frames are in chunks of `chunk` on a grid from frame 0; with chunk 1 that is a
/// window around each frame by itself.
struct FrameVisibility {
  std::int64_t left = 0;
  std::int64_t right = 0;
  std::int64_t chunk = 1;

  friend constexpr bool operator==(const FrameVisibility&, const FrameVisibility&) = default;

  /// Frames i - left .. i + right; look-aheads of layers add up (NeMo's "regular",
  /// Transformer-Transducer, arXiv 2002.02562).
  static constexpr FrameVisibility window(std::int64_t left, std::int64_t right) {
    return {left, right, 1};
  }
  /// NeMo's "chunked_limited" (arXiv 2312.17279): chunks of right + 1 frames, each of which sees
  /// itself and the left / (right + 1) before it. Look-ahead does not add up over layers.
  /// \throws Error(kConfig) unless left is a multiple of right + 1.
  static FrameVisibility chunked_limited(std::int64_t left, std::int64_t right) {
    if (right < 0 || left < 0 || left % (right + 1) != 0)
      throw Error(ErrorCode::kConfig,
                  {"left context does not hold whole chunks", "chunked_limited", "left",
                   "a multiple of " + std::to_string(right + 1), std::to_string(left)});
    return {left, 0, right + 1};
  }
  /// WeNet's chunk mask (arXiv 2012.05481): chunks of `chunk` frames, each sees itself and
  /// `left_chunks` before it; negative: all before.
  static constexpr FrameVisibility chunks(std::int64_t chunk, std::int64_t left_chunks) {
    return {left_chunks < 0 ? kUnboundedFrames : left_chunks * chunk, 0, chunk};
  }
  /// Moonshine v2's pairs. The maker's exporter counts both bounds inclusive, the frame itself
  /// besides: 16 + 4 + 1 keys for (16, 4). transformers takes distances below them: 15 + 3 + 1.
  static constexpr FrameVisibility moonshine(std::int64_t back, std::int64_t ahead,
                                             bool inclusive = true) {
    if (inclusive) return {back, ahead, 1};
    return {std::max<std::int64_t>(back - 1, 0), std::max<std::int64_t>(ahead - 1, 0), 1};
  }

  /// First frame that `frame` sees, and one behind the last, of `total` frames.
  constexpr std::int64_t begin(std::int64_t frame) const {
    return left >= kUnboundedFrames ? 0 : std::max<std::int64_t>(frame / chunk * chunk - left, 0);
  }
  constexpr std::int64_t end(std::int64_t frame, std::int64_t total) const {
    return std::min(frame / chunk * chunk + chunk + right, total);
  }

  constexpr StreamTiming timing() const {
    return {.left = left, .right = right, .chunk = chunk, .end_padding = right};
  }
};

/// How the place of a key enters a score.
enum class FramePositions {
  kNone,      ///< not at all (Moonshine v2)
  kRelative,  ///< (q + u) k + (q + v) W r(i - j): Transformer-XL, arXiv 1901.02860; NeMo
  /// (q + u) k + (q + v) W p(j) with the key's own index: WeNet's "relative" layer, which leaves
  /// out the shift. Not shift-invariant: the stream must be reset before max_positions frames.
  kAbsoluteKey,
};

/// What a frame attention layer is made of. All projections are [width, width].
struct FrameAttentionConfig {
  std::int64_t width = 0;
  std::int64_t num_heads = 1;
  FrameVisibility visibility = {};
  FramePositions positions = FramePositions::kNone;
  std::int64_t max_positions = 5000;  ///< kAbsoluteKey: rows of the model's table
  double sm_scale = 0.0;              ///< 0: 1 / sqrt(head_dim)
};

/// Weights of a frame attention layer; PackedLinear shares them between copies, so that layers
/// with other windows cost no memory.
struct FrameAttentionWeights {
  PackedLinear query;
  PackedLinear key;
  PackedLinear value;
  PackedLinear output;
  PackedLinear position = {};             ///< W, unless positions are kNone; no bias
  std::vector<float> content_bias = {};   ///< u: [width] or empty
  std::vector<float> position_bias = {};  ///< v: [width] or empty
  /// A learned bias of the score by distance: [num_heads, left + right + 2 chunk - 1], the newest
  /// key first, that is i - j from -(right + chunk - 1) to left + chunk - 1. Empty: none.
  std::vector<float> distance_bias = {};
};

/// The sinusoid of position `position`: [width], sines at even places and cosines at odd ones, of
/// position * 10000^(-2k / width). Formed in double. (arXiv 1706.03762; NeMo and WeNet interleave.)
inline void sinusoid(double position, std::span<float> row) {
  const auto width = static_cast<double>(row.size());
  for (std::size_t c = 0; c < row.size(); ++c) {
    const double angle =
        position * std::exp(-std::log(10000.0) * static_cast<double>(c / 2 * 2) / width);
    row[c] = static_cast<float>(c % 2 == 0 ? std::sin(angle) : std::cos(angle));
  }
}

/// Multi-head self-attention over a stream of frames. Frames: [time, width] to [time, width], one
/// row for each frame. Frame i attends to visibility.begin(i) .. end(i): nothing stands before the
/// first frame or behind the last. Scores, softmax and sums are float32 in the order of the keys,
/// so that a stream gives the same bits however it is cut.
class StreamAttention {
 public:
  struct State {
    std::int64_t frames = 0;     // accepted
    std::int64_t next = 0;       // the frame whose output comes next
    std::vector<float> keys;     // [capacity, key_parts * width], slot = frame % capacity
    std::vector<float> queries;  // [query_capacity, width]
    detail::FrameScratch scratch;
  };

  /// \throws Error(kConfig, kShape) if windows, widths and weights do not fit, or `left` is not
  /// bounded. Allocates a table of distances for FramePositions::kRelative.
  StreamAttention(const FrameAttentionConfig& config, FrameAttentionWeights weights)
      : config_(config), weights_(std::move(weights)) {
    constexpr const char* kWhere = "StreamAttention";
    detail::require_positive(config.width, kWhere, "width");
    detail::require_positive(config.num_heads, kWhere, "num_heads");
    if (config.width % config.num_heads != 0)
      throw Error(ErrorCode::kConfig, {"width does not divide into heads", kWhere, "num_heads",
                                       "a divisor of " + std::to_string(config.width),
                                       std::to_string(config.num_heads)});
    const FrameVisibility& visible = config.visibility;
    constexpr std::int64_t kMost = std::int64_t{1} << 20;
    detail::require_positive(visible.left, kWhere, "left", 0);
    detail::require_positive(visible.right, kWhere, "right", 0);
    detail::require_positive(visible.chunk, kWhere, "chunk");
    for (const auto& [name, value] :
         {std::pair{"left", visible.left}, std::pair{"right", visible.right},
          std::pair{"chunk", visible.chunk}})
      if (value > kMost)
        throw Error(ErrorCode::kCapacity,
                    {"a ring cannot hold this window", kWhere, name,
                     "at most " + std::to_string(kMost), std::to_string(value)});
    for (const auto& [name, matrix] :
         {std::pair{"query", &weights_.query}, std::pair{"key", &weights_.key},
          std::pair{"value", &weights_.value}, std::pair{"output", &weights_.output}})
      require_square(*matrix, name);
    head_dim_ = config.width / config.num_heads;
    scale_ = static_cast<float>(
        config.sm_scale != 0.0 ? config.sm_scale : 1.0 / std::sqrt(static_cast<double>(head_dim_)));
    newest_ = -(visible.right + visible.chunk - 1);
    distances_ = visible.left + visible.right + 2 * visible.chunk - 1;
    max_keys_ = visible.left + visible.right + visible.chunk;
    query_capacity_ = visible.right + visible.chunk - 1 + kBlock;
    capacity_ = visible.left + query_capacity_;
    require_values(weights_.content_bias, config.width, "content_bias");
    require_values(weights_.position_bias, config.width, "position_bias");
    require_values(weights_.distance_bias, config.num_heads * distances_, "distance_bias");
    if (weights_.content_bias.empty())
      weights_.content_bias.resize(static_cast<std::size_t>(config.width));
    if (weights_.position_bias.empty())
      weights_.position_bias.resize(static_cast<std::size_t>(config.width));
    if (config.positions != FramePositions::kNone) require_square(weights_.position, "position");
    if (config.positions == FramePositions::kRelative) project_distances();
    if (config.positions == FramePositions::kAbsoluteKey) {
      detail::require_positive(config.max_positions, kWhere, "max_positions");
      key_parts_ = 3;
      for (std::int64_t c = 0; c < config.width; ++c)
        frequencies_.push_back(std::exp(-std::log(10000.0) * static_cast<double>(c / 2 * 2) /
                                        static_cast<double>(config.width)));
    }
  }

  std::int64_t in_width() const { return config_.width; }
  std::int64_t out_width() const { return config_.width; }
  const FrameAttentionConfig& config() const { return config_; }
  const FrameAttentionWeights& weights() const { return weights_; }

  State make_state() const {
    State state;
    state.keys.resize(static_cast<std::size_t>(capacity_ * key_size()));
    state.queries.resize(static_cast<std::size_t>(query_capacity_ * config_.width));
    state.scratch =
        detail::FrameScratch(2 * kBlock * config_.width + 2 * head_dim_ + max_keys_ + 4);
    return state;
  }

  std::int64_t step(MatrixView<const float> in, State& state, MatrixView<float> out) const {
    SLUICE_ASSERT(in.cols == config_.width);
    std::int64_t written = 0;
    for (std::int64_t t = 0; t < in.rows; t += kBlock) {
      accept(in.middle_rows(t, std::min(kBlock, in.rows - t)), state);
      written += emit(timing().outputs_after(state.frames), state,
                      out.middle_rows(written, out.rows - written));
    }
    return written;
  }
  std::int64_t flush(State& state, MatrixView<float> out) const {
    return emit(state.frames, state, out);
  }
  void reset(State& state) const { state.frames = state.next = 0; }

  /// Frames that a stream may still accept: without end, but for FramePositions::kAbsoluteKey.
  /// Beyond it keys are placed at the last position.
  std::int64_t positions_left(const State& state) const {
    if (config_.positions != FramePositions::kAbsoluteKey) return kUnboundedFrames;
    return std::max<std::int64_t>(config_.max_positions - state.frames, 0);
  }

  std::int64_t max_outputs(std::int64_t frames) const { return timing().max_outputs(frames); }
  std::int64_t max_flush_outputs() const { return timing().max_flush_outputs(); }
  /// The frames that are waiting, and those that they and later ones see.
  std::size_t state_bytes() const {
    const std::int64_t waiting = config_.visibility.right + config_.visibility.chunk - 1;
    return static_cast<std::size_t>((config_.visibility.left + waiting) * key_size() +
                                    waiting * config_.width) *
               sizeof(float) +
           2 * sizeof(std::int64_t);
  }
  void save(const State& state, ByteWriter& writer) const {
    writer.write(state.frames);
    writer.write(state.next);
    for (std::int64_t t = config_.visibility.begin(state.next); t < state.frames; ++t)
      writer.write_span(std::span<const float>(state.keys.data() + t % capacity_ * key_size(),
                                               static_cast<std::size_t>(key_size())));
    for (std::int64_t t = state.next; t < state.frames; ++t)
      writer.write_span(
          std::span<const float>(state.queries.data() + t % query_capacity_ * config_.width,
                                 static_cast<std::size_t>(config_.width)));
  }
  void restore(ByteReader& reader, State& state) const {
    const std::size_t at = reader.offset();
    state.frames = reader.read<std::int64_t>("frames");
    state.next = reader.read<std::int64_t>("next frame");
    if (state.frames < 0 || state.frames >= std::numeric_limits<std::int64_t>::max() / 2)
      reader.fail_at(at, "count out of range", "frames", "at least 0",
                     std::to_string(state.frames));
    if (const std::int64_t next = timing().outputs_after(state.frames); state.next != next)
      reader.fail_at(at + sizeof(state.frames), "unexpected value", "next frame",
                     std::to_string(next), std::to_string(state.next));
    for (std::int64_t t = config_.visibility.begin(state.next); t < state.frames; ++t)
      reader.read_span("keys and values",
                       std::span<float>(state.keys.data() + t % capacity_ * key_size(),
                                        static_cast<std::size_t>(key_size())));
    for (std::int64_t t = state.next; t < state.frames; ++t)
      reader.read_span("queries",
                       std::span<float>(state.queries.data() + t % query_capacity_ * config_.width,
                                        static_cast<std::size_t>(config_.width)));
  }
  StreamTiming timing() const { return config_.visibility.timing(); }

 private:
  static constexpr std::int64_t kBlock = 32;

  // Keys, values and, for kAbsoluteKey, projected positions of a frame lie side by side.
  std::int64_t key_size() const { return key_parts_ * config_.width; }
  void require_square(const PackedLinear& matrix, const char* name) const {
    if (matrix.rows() != config_.width || matrix.cols() != config_.width)
      throw Error(ErrorCode::kShape,
                  {"weights do not fit the layer", "StreamAttention", name,
                   std::to_string(config_.width) + " x " + std::to_string(config_.width),
                   std::to_string(matrix.rows()) + " x " + std::to_string(matrix.cols())});
  }
  static void require_values(const std::vector<float>& values, std::int64_t expected,
                             const char* name) {
    if (!values.empty() && static_cast<std::int64_t>(values.size()) != expected)
      throw Error(ErrorCode::kShape,
                  {"wrong number of values", "StreamAttention", name,
                   std::to_string(expected) + " or none", std::to_string(values.size())});
  }

  void project_distances() {
    std::vector<float> rows(static_cast<std::size_t>(distances_ * config_.width));
    for (std::int64_t i = 0; i < distances_; ++i)
      sinusoid(static_cast<double>(newest_ + i),
               {rows.data() + i * config_.width, static_cast<std::size_t>(config_.width)});
    projected_.resize(rows.size());
    weights_.position.apply({rows.data(), distances_, config_.width},
                            {projected_.data(), distances_, config_.width});
  }

  void accept(MatrixView<const float> in, State& state) const {
    const std::int64_t width = config_.width;
    const MatrixView<float> rows(state.scratch.data(), in.rows, width);
    const auto store = [&](std::vector<float>& ring, std::int64_t capacity, std::int64_t size,
                           std::int64_t offset) {
      for (std::int64_t t = 0; t < in.rows; ++t)
        std::memcpy(ring.data() + (state.frames + t) % capacity * size + offset, rows.row(t),
                    static_cast<std::size_t>(width) * sizeof(float));
    };
    weights_.query.apply(in, rows);
    store(state.queries, query_capacity_, width, 0);
    weights_.key.apply(in, rows);
    store(state.keys, capacity_, key_size(), 0);
    weights_.value.apply(in, rows);
    store(state.keys, capacity_, key_size(), width);
    if (config_.positions == FramePositions::kAbsoluteKey) {
      const MatrixView<float> places(state.scratch.data() + kBlock * width, in.rows, width);
      for (std::int64_t t = 0; t < in.rows; ++t) {
        const auto place =
            static_cast<double>(std::min(state.frames + t, config_.max_positions - 1));
        for (std::int64_t c = 0; c < width; ++c)
          places.row(t)[c] = static_cast<float>(c % 2 == 0 ? std::sin(place * frequencies_[c])
                                                           : std::cos(place * frequencies_[c]));
      }
      weights_.position.apply(places, rows);
      store(state.keys, capacity_, key_size(), 2 * width);
    }
    state.frames += in.rows;
  }

  std::int64_t emit(std::int64_t ready, State& state, MatrixView<float> out) const {
    const std::int64_t width = config_.width;
    std::int64_t written = 0;
    while (state.next < ready) {
      const std::int64_t count = std::min(kBlock, ready - state.next);
      const MatrixView<float> contexts(state.scratch.data(), count, width);
      for (std::int64_t t = 0; t < count; ++t) attend(state.next + t, state, contexts.row(t));
      weights_.output.apply(contexts, out.middle_rows(written, count));
      written += count;
      state.next += count;
    }
    return written;
  }

  // sums[n] = a . b_n for up to four rows b_n.
  static void dot_four(const float* a, const float* const (&b)[4], std::int64_t count,
                       float* sums) {
    simd::VecF parts[4] = {};
    std::int64_t c = 0;
    for (; c + simd::kWidth <= count; c += simd::kWidth) {
      const simd::VecF value = simd::in_register(simd::load(a + c));
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) parts[n] = simd::fma(value, simd::load(b[n] + c), parts[n]);
    }
    if (c < count) {
      const simd::VecF value = simd::load_partial(a + c, count - c);
      for (int n = 0; n < 4; ++n)
        parts[n] = simd::fma(value, simd::load_partial(b[n] + c, count - c), parts[n]);
    }
    simd::reduce_add(parts, sums);
  }

  void attend(std::int64_t frame, State& state, float* context) const {
    const std::int64_t width = config_.width;
    const std::int64_t first = config_.visibility.begin(frame);
    const std::int64_t keys = config_.visibility.end(frame, state.frames) - first;
    float* content = state.scratch.data() + 2 * kBlock * width;
    float* position = content + head_dim_;
    float* scores = position + head_dim_;
    const float* query = state.queries.data() + frame % query_capacity_ * width;
    const std::int64_t start = first % capacity_;
    const auto row = [&](std::int64_t key, std::int64_t part) {
      const std::int64_t slot = start + key;  // keys <= capacity: it wraps at most once
      return state.keys.data() + (slot < capacity_ ? slot : slot - capacity_) * key_size() +
             part * width;
    };
    for (std::int64_t h = 0; h < config_.num_heads; ++h) {
      const std::int64_t at = h * head_dim_;
      for (std::int64_t c = 0; c < head_dim_; ++c) {
        content[c] = query[at + c] + weights_.content_bias[at + c];
        position[c] = query[at + c] + weights_.position_bias[at + c];
      }
      for (std::int64_t k = 0; k < keys; k += 4) {
        const float* rows[4];
        float sums[4];
        const auto each = [&](auto&& row_of) {
          for (std::int64_t n = 0; n < 4; ++n) rows[n] = row_of(std::min(k + n, keys - 1)) + at;
        };
        each([&](std::int64_t key) { return row(key, 0); });
        dot_four(content, rows, head_dim_, scores + k);
        if (config_.positions != FramePositions::kNone) {
          if (config_.positions == FramePositions::kRelative)
            each([&](std::int64_t key) {
              return projected_.data() + (frame - first - key - newest_) * width;
            });
          else
            each([&](std::int64_t key) { return row(key, 2); });
          dot_four(position, rows, head_dim_, sums);
          for (int n = 0; n < 4; ++n) scores[k + n] += sums[n];
        }
      }
      const float* bias =
          weights_.distance_bias.empty() ? nullptr : weights_.distance_bias.data() + h * distances_;
      float largest = -std::numeric_limits<float>::infinity();
      for (std::int64_t k = 0; k < keys; ++k) {
        scores[k] *= scale_;
        if (bias != nullptr) scores[k] += bias[frame - first - k - newest_];
        largest = scores[k] > largest || scores[k] != scores[k] ? scores[k] : largest;
      }
      float sum = 0.0F;
      for (std::int64_t k = 0; k < keys; k += simd::kWidth) {
        const std::int64_t lanes = std::min<std::int64_t>(simd::kWidth, keys - k);
        simd::store_partial(
            scores + k, simd::exp(simd::load_partial(scores + k, lanes) - simd::broadcast(largest)),
            lanes);
      }
      for (std::int64_t k = 0; k < keys; ++k) sum += scores[k];
      const float share = 1.0F / sum;
      for (std::int64_t c = 0; c < head_dim_; c += simd::kWidth) {
        const std::int64_t lanes = std::min<std::int64_t>(simd::kWidth, head_dim_ - c);
        simd::VecF mix = simd::zero();
        for (std::int64_t k = 0; k < keys; ++k)
          mix = simd::fma(simd::broadcast(scores[k]), simd::load_partial(row(k, 1) + at + c, lanes),
                          mix);
        simd::store_partial(context + at + c, mix * simd::broadcast(share), lanes);
      }
    }
  }

  FrameAttentionConfig config_;
  FrameAttentionWeights weights_;
  std::int64_t head_dim_ = 0;
  float scale_ = 1.0F;
  std::int64_t key_parts_ = 2;
  std::int64_t newest_ = 0;     // i - j of the newest key that any frame sees
  std::int64_t distances_ = 0;  // values of i - j
  std::int64_t max_keys_ = 0;
  std::int64_t capacity_ = 0;
  std::int64_t query_capacity_ = 0;
  std::vector<float> projected_;     // kRelative: [distances_, width], row i for newest_ + i
  std::vector<double> frequencies_;  // kAbsoluteKey: [width]
};

}  // namespace sluice
