// SPDX-License-Identifier: MIT
/// A decoder of the Llama family on the GPU: weights, caches and the step in device memory. A step
/// reads the token that the step before it chose and chooses the next, so one captured step
/// replays for ever with no work on the host. Needs cublasLt.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/chunk_attention.cuh"
#include "sluice/backend/cuda/decode_attention.cuh"
#include "sluice/backend/cuda/decode_step.cuh"
#include "sluice/backend/cuda/decoder_kernels.cuh"
#include "sluice/backend/cuda/decoder_shape.hpp"
#include "sluice/backend/cuda/group_list.hpp"
#include "sluice/backend/cuda/matrix_columns.cuh"
#include "sluice/backend/cuda/matrix_product.cuh"
#include "sluice/backend/cuda/matrix_vector.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/quantised_columns.cuh"
#include "sluice/backend/cuda/quantised_vector.cuh"
#include "sluice/backend/cuda/segment_attention.cuh"

namespace sluice {

/// Consecutive rows of a quantised matrix, in device memory.
struct CudaQuantisedRows {
  ElementType type = ElementType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  Buffer<std::uint8_t, cuda> content;  ///< quantised_layout.hpp
};
/// All rows of a matrix, those of one type together; none where the matrix is not quantised.
using CudaQuantisedMatrix = std::vector<CudaQuantisedRows>;

/// Copies to the device; neighbours of one type become one. \throws Error(kShape) unless sizes fit
/// and all but the last part have a multiple of 8 rows; Error(kDevice).
inline CudaQuantisedMatrix place_quantised(std::span<const CudaPackedRows> parts,
                                           std::int64_t cols) {
  CudaQuantisedMatrix result;
  for (std::size_t i = 0; i < parts.size();) {
    CudaQuantisedRows rows{parts[i].type, 0, cols, {}};
    std::vector<std::uint8_t> content;
    for (; i < parts.size() && parts[i].type == rows.type; ++i) {
      const CudaPackedRows& part = parts[i];
      const std::int64_t bytes =
          is_quantised(part.type) ? quantised_bytes(part.type, part.rows, cols) : 0;
      if (bytes == 0 || static_cast<std::int64_t>(part.content.size()) != bytes)
        throw Error(ErrorCode::kShape,
                    {"quantised matrix does not fit", "place_quantised", "bytes",
                     std::to_string(bytes), std::to_string(part.content.size())});
      if (i + 1 < parts.size() && part.rows % kQuantisedTileRows != 0)
        throw Error(ErrorCode::kShape, {"rows that others follow", "place_quantised", "rows",
                                        "a multiple of 8", std::to_string(part.rows)});
      content.insert(content.end(), part.content.begin(), part.content.end());
      rows.rows += part.rows;
    }
    rows.content = Buffer<std::uint8_t, cuda>{std::span<const std::uint8_t>(content)};
    result.push_back(std::move(rows));
  }
  return result;
}

/// Weights of one layer, in device memory. Matrices are [out, in]; where a quantised one has rows,
/// the one of 16 bits is not read and may be empty.
template <class Element>
struct CudaLayerWeights {
  Buffer<float, cuda> attention_norm;     ///< [hidden_size]
  Buffer<Element, cuda> query_key_value;  ///< [(num_qo_heads + 2 num_kv_heads) head_dim, hidden]
  Buffer<Element, cuda> output;           ///< [hidden_size, num_qo_heads * head_dim]
  Buffer<float, cuda> feed_forward_norm;  ///< [hidden_size]
  /// [2 * intermediate_size, hidden_size]: gate's row i is row 2 i, up's is row 2 i + 1.
  Buffer<Element, cuda> gate_up;
  Buffer<Element, cuda> down;  ///< [hidden_size, intermediate_size]

  CudaQuantisedMatrix quantised_query_key_value;
  CudaQuantisedMatrix quantised_output;
  CudaQuantisedMatrix quantised_gate_up;
  CudaQuantisedMatrix quantised_down;
};

/// A model's weights in device memory; any number of decoders may share them. Construction
/// allocates (zeros); the setters copy from the host and wait.
template <class Element>
class CudaDecoderWeights {
 public:
  /// tied: the output projection is the embedding. allocate: false leaves matrices but for the
  /// embedding without memory, until they are set or quantised ones are put in their place.
  /// \throws Error(kShape) naming the extent that does not fit; Error(kDevice).
  CudaDecoderWeights(const CudaDecoderShape& shape, bool tied, bool allocate = true)
      : shape_(checked(shape)),
        embedding(size(shape.vocab_size, shape.hidden_size)),
        output_norm(size(shape.hidden_size, 1)),
        output(tied || !allocate ? 0 : size(shape.vocab_size, shape.hidden_size)) {
    const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
      return Buffer<Element, cuda>(allocate ? size(rows, cols) : 0);
    };
    for (std::int64_t l = 0; l < shape.num_layers; ++l) {
      CudaLayerWeights<Element> layer;
      layer.attention_norm = Buffer<float, cuda>(size(shape.hidden_size, 1));
      layer.query_key_value = matrix(shape.fused_size(), shape.hidden_size);
      layer.output = matrix(shape.hidden_size, shape.query_size());
      layer.feed_forward_norm = Buffer<float, cuda>(size(shape.hidden_size, 1));
      layer.gate_up = matrix(2 * shape.intermediate_size, shape.hidden_size);
      layer.down = matrix(shape.hidden_size, shape.intermediate_size);
      layers.push_back(std::move(layer));
    }
  }

  const CudaDecoderShape& shape() const { return shape_; }
  const Element* output_matrix() const {
    return output.size() == 0 ? embedding.data() : output.data();
  }

  /// query: [num_qo_heads * head_dim, hidden_size], key and value: [num_kv_heads * head_dim,
  /// hidden_size]. \throws Error(kShape, kDevice).
  void set_query_key_value(std::int64_t layer, std::span<const Element> query,
                           std::span<const Element> key, std::span<const Element> value) {
    std::vector<Element> fused(query.begin(), query.end());
    fused.insert(fused.end(), key.begin(), key.end());
    fused.insert(fused.end(), value.begin(), value.end());
    set(layers[static_cast<std::size_t>(layer)].query_key_value, shape_.fused_size(),
        shape_.hidden_size, fused);
  }
  /// gate, up: [intermediate_size, hidden_size]. \throws Error(kShape, kDevice).
  void set_gate_up(std::int64_t layer, std::span<const Element> gate, std::span<const Element> up) {
    const auto width = static_cast<std::size_t>(shape_.hidden_size);
    std::vector<Element> rows;
    rows.reserve(gate.size() + up.size());
    for (std::size_t at = 0; at + width <= std::min(gate.size(), up.size()); at += width) {
      const auto from = static_cast<std::ptrdiff_t>(at);
      const auto to = static_cast<std::ptrdiff_t>(at + width);
      rows.insert(rows.end(), gate.begin() + from, gate.begin() + to);
      rows.insert(rows.end(), up.begin() + from, up.begin() + to);
    }
    set(layers[static_cast<std::size_t>(layer)].gate_up, 2 * shape_.intermediate_size,
        shape_.hidden_size, rows);
  }
  /// One of the matrices of 16 bits, which is allocated if it has no memory yet.
  /// \throws Error(kShape, kDevice).
  static void set(Buffer<Element, cuda>& matrix, std::int64_t rows, std::int64_t cols,
                  std::span<const Element> content) {
    if (matrix.size() == 0) matrix = Buffer<Element, cuda>(size(rows, cols));
    matrix.upload(content);
  }

  /// Whether any matrix is quantised.
  bool is_quantised() const {
    return !quantised_output.empty() ||
           std::any_of(layers.begin(), layers.end(), [](const CudaLayerWeights<Element>& layer) {
             return !layer.quantised_query_key_value.empty() || !layer.quantised_output.empty() ||
                    !layer.quantised_gate_up.empty() || !layer.quantised_down.empty();
           });
  }
  /// Device memory.
  std::size_t bytes() const {
    const auto of = [](const CudaQuantisedMatrix& matrix) {
      std::size_t sum = 0;
      for (const CudaQuantisedRows& rows : matrix) sum += rows.content.bytes();
      return sum;
    };
    std::size_t sum =
        embedding.bytes() + output_norm.bytes() + output.bytes() + of(quantised_output);
    for (const CudaLayerWeights<Element>& layer : layers)
      sum += layer.attention_norm.bytes() + layer.query_key_value.bytes() + layer.output.bytes() +
             layer.feed_forward_norm.bytes() + layer.gate_up.bytes() + layer.down.bytes() +
             of(layer.quantised_query_key_value) + of(layer.quantised_output) +
             of(layer.quantised_gate_up) + of(layer.quantised_down);
    return sum;
  }

 private:
  static std::size_t size(std::int64_t rows, std::int64_t cols) {
    return static_cast<std::size_t>(rows * cols);
  }
  static const CudaDecoderShape& checked(const CudaDecoderShape& s) {
    const auto require = [](bool good, const char* field, const char* expected,
                            std::int64_t found) {
      if (!good)
        throw Error(ErrorCode::kShape, {"decoder does not fit", "CudaDecoderShape", field, expected,
                                        std::to_string(found)});
    };
    require(s.vocab_size >= 1 && s.vocab_size <= (1 << 26), "vocab_size", "1 to 2^26",
            s.vocab_size);
    require(s.hidden_size >= 8 && s.hidden_size % 8 == 0, "hidden_size", "a multiple of 8",
            s.hidden_size);
    require(s.intermediate_size >= 8 && s.intermediate_size % 8 == 0, "intermediate_size",
            "a multiple of 8", s.intermediate_size);
    require(s.num_kv_heads >= 1, "num_kv_heads", "at least 1", s.num_kv_heads);
    require(s.num_qo_heads >= 1 && s.num_qo_heads % s.num_kv_heads == 0, "num_qo_heads",
            "a multiple of num_kv_heads", s.num_qo_heads);
    require(s.head_dim >= 8 && s.head_dim % 8 == 0, "head_dim", "a multiple of 8", s.head_dim);
    require(s.num_layers >= 1, "num_layers", "at least 1", s.num_layers);
    return s;
  }

  CudaDecoderShape shape_;

 public:
  Buffer<Element, cuda> embedding;  ///< [vocab_size, hidden_size]
  std::vector<CudaLayerWeights<Element>> layers;
  Buffer<float, cuda> output_norm;  ///< [hidden_size]
  Buffer<Element, cuda> output;     ///< [vocab_size, hidden_size]; empty where tied
  CudaQuantisedMatrix quantised_output;
};

/// What a CudaDecoder is made of.
struct CudaDecoderOptions {
  DecodeStepConfig step;  ///< sessions (batch_size), sinks, window, capacity, rotation
  TokenChoice choice;
  /// Tokens of one prefill step; 0: prefill() is not called. With a window, the capacity must hold
  /// max_chunk - 1 entries beyond sinks and window.
  std::int64_t max_chunk = 0;
  std::int64_t history_size = 0;  ///< chosen tokens kept per session, the newest; 0: none
  /// Multiprocessors that products with one row take up, 0: all (MatrixVectorPlan).
  int vector_multiprocessors = 0;
  bool overlap = true;  ///< launches fetch weights and cache rows ahead of their turn
  /// The state behind a session's last token stays in hidden_data(): chosen tokens are not looked
  /// up, so that every token has to be fed (feed(), feed_from()).
  bool keep_hidden = false;
  /// Up to 8 rows go through products with several vectors; false: as more rows do. For
  /// measurements.
  bool few_rows = true;
};

/// Another stream's cache, the first tokens of which every step of a decoder sees beside its own:
/// what Retention::snapshot_rules says, the sinks and the window that ends at the snapshot. A
/// writer of a windowed cache must not go further beyond a snapshot that is read than the capacity
/// exceeds sinks and window (Group::room()).
template <class Element>
struct CudaGroupView {
  const Element* keys = nullptr;  ///< [layers, num_kv_heads, capacity, head_dim], rotated
  const Element* values = nullptr;
  std::int64_t layer_stride = 0;
  GroupExtents extents;
  /// Added to the reader's own position (which stops at the last rank of its window): 0 where
  /// groups count for themselves.
  double shift = 0;
  /// Tokens that the step sees, in device memory; it changes between steps alone.
  const std::int64_t* snapshot = nullptr;
};

namespace detail {

template <class Element>
struct GroupListsParams {
  CudaGroupView<Element> source;
  CudaGroupView<Element> own;  // without a snapshot
  const std::int64_t* totals;
  device::Segment<Element>* segments;  // [layers, kGroupSegments]
  std::int32_t* counts;                // [layers]
  device::SegmentReader* readers;      // [layers]
  int head_dim;
};

inline constexpr int kGroupSegments = 2 * kGroupRuns;  // source, own

/// The list of a step for each layer, from counters on the device. A block per layer, a thread per
/// run.
template <class Element>
__global__ void __launch_bounds__(kWarpSize)
    group_lists_kernel(const __grid_constant__ GroupListsParams<Element> p) {
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t layer = blockIdx.x;
  const std::int64_t total = *p.totals;  // index of the step's token
  const GroupExtents& own = p.own.extents;
  const bool full = !own.is_limited() && total >= own.capacity;
  const bool of_source = lane < kGroupRuns;
  SegmentRule run;
  if (total >= 0 && !full && lane < kGroupSegments)
    run = of_source ? snapshot_run(p.source.extents, *p.source.snapshot, p.source.shift,
                                   own.ceiling() + p.source.shift, lane)
                    : own_run(own, total, lane - kGroupRuns);
  const unsigned present = __ballot_sync(0xffffffffU, run.count > 0);
  if (run.count > 0) {
    const CudaGroupView<Element>& cache = of_source ? p.source : p.own;
    const std::int64_t at = layer * cache.layer_stride + run.first_slot * p.head_dim;
    device::Segment<Element> s;
    s.first_index = run.first_index;
    s.count = s.visible = run.count;
    s.first_position = run.first_position;
    s.shift = run.shift;
    s.ceiling = run.ceiling;
    s.group = of_source ? 0 : 1;
    s.keys = cache.keys + at;
    s.values = cache.values + at;
    s.key_head_stride = s.value_head_stride = cache.extents.capacity * p.head_dim;
    s.key_token_stride = s.value_token_stride = p.head_dim;
    p.segments[layer * kGroupSegments + __popc(present & ((1U << lane) - 1))] = s;
  }
  if (lane == 0) {
    p.counts[layer] = __popc(present);
    p.readers[layer] = {total, own.origin + static_cast<double>(total), total >= 0 ? 1 : 0, 0};
  }
}

/// Rotates a token's keys and stores them and its values: a block per KV head.
template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kHeadDim / 2)
    group_append_kernel(const float* key, const float* value, const DecodePlace* place,
                        const float* rows, int num_pairs, bool interleaved, std::uint16_t* keys,
                        std::uint16_t* values, std::int64_t head_stride) {
  using H = Half<Element>;
  if (place->extent <= 0) return;
  const auto head = static_cast<std::int64_t>(blockIdx.x);
  const int pair = static_cast<int>(threadIdx.x);
  const std::int64_t to = head * head_stride + std::int64_t{place->slot} * kHeadDim;
  const RotatedPair x = rotate_pair(num_pairs, interleaved, rows, key + head * kHeadDim, pair);
  const std::uint32_t k = H::pack(x.a, x.b);
  keys[to + x.first] = static_cast<std::uint16_t>(k);
  keys[to + x.second] = static_cast<std::uint16_t>(k >> 16);
  const float* const v = value + head * kHeadDim + 2 * pair;
  *reinterpret_cast<std::uint32_t*>(values + to + 2 * pair) = H::pack(v[0], v[1]);
}

}  // namespace detail

/// Sessions of one model that step together. Caches and scratch are allocated by the constructor;
/// step() allocates nothing after its first call and may be captured. One stream at a time.
///
/// Element is what weights are of, and what rounded activations are. Cache, of keys and values, is
/// Element or a CudaCode: rows are then quantised once, from float32, as the CPU's cache does, a
/// token attends to its own row as it is stored, and a row takes head_dim + 4 bytes. Such a decoder
/// sees no other group (see()).
///
/// A step feeds each session's token (feed(), prefill() or the step before chose it), appends to
/// its cache and chooses its next one. Arithmetic: activations are float32 and weights are widened
/// for one session; for several, and in prefill, activations are rounded to Element before each
/// product with weights, and so are quantised weights. Up to 8 sessions, and chunks of up to 8
/// tokens, are between the two: weights stay what they are, activations keep 16 bits and more
/// (matrix_columns.cuh), 11 with quantised weights (quantised_columns.cuh). Residual sums are
/// float32. Chunks read codes rounded to Element, by half a unit at most (chunk_attention.cuh).
template <class Element, int kHeadDim, class Cache = Element>
class CudaDecoder {
 public:
  static constexpr bool kHasScales = CudaCode<Cache>;  ///< of rows
  static_assert(kHasScales || std::is_same_v<Cache, Element>,
                "a cache is of the weights' type, or of codes: std::int8_t or fp8_e4m3");

  /// The weights must outlive the decoder. \throws Error(kConfig, kShape, kDevice).
  CudaDecoder(const CudaDecoderWeights<Element>& weights, const CudaDecoderOptions& options)
      : weights_(&weights),
        options_(options),
        step_(options.step),
        attention_(
            {weights.shape().num_qo_heads, weights.shape().num_kv_heads, weights.shape().head_dim},
            options.step, options.overlap),
        vector_(options.overlap, options.vector_multiprocessors),
        quantised_vector_(options.overlap, vector_.blocks()),
        columns_(options.overlap, vector_.blocks()),
        quantised_columns_(options.overlap, vector_.blocks()),
        few_in_layers_(options.few_rows && takes_few_in_layers(weights)),
        few_logits_(options.few_rows && takes_few(weights.quantised_output)),
        overlap_(options.overlap && supports_overlap()),
        frequencies_(options.step.frequencies.begin(), options.step.frequencies.end()) {
    options_.step.frequencies = {};
    const CudaDecoderShape& s = shape();
    const std::int64_t batch = options.step.batch_size;
    const std::int64_t rows = std::max(batch, options.max_chunk);
    const auto size = [](std::int64_t a, std::int64_t b) {
      return static_cast<std::size_t>(a * b);
    };
    layer_stride_ = batch * s.num_kv_heads * options.step.capacity * kHeadDim;
    keys_ = Buffer<Cache, cuda>(size(s.num_layers, layer_stride_));
    values_ = Buffer<Cache, cuda>(size(s.num_layers, layer_stride_));
    if (kHasScales) {
      key_scales_ = Buffer<float, cuda>(size(s.num_layers, layer_stride_ / kHeadDim));
      value_scales_ = Buffer<float, cuda>(key_scales_.size());
    }
    hidden_ = Buffer<float, cuda>(size(batch, s.hidden_size));
    fused_ = Buffer<float, cuda>(size(rows, s.fused_size()));
    logits_ = Buffer<float, cuda>(size(batch, s.vocab_size));
    tokens_ = Buffer<std::int32_t, cuda>(size(batch, 1));
    history_ = Buffer<std::int32_t, cuda>(size(batch, options.history_size));
    candidates_ = Buffer<TokenCandidate, cuda>(
        size(std::max<std::int64_t>(vector_.blocks(), batch * detail::kCandidateParts), 1));
    const std::int64_t few = few_in_layers_ ? std::min(rows, kMostFew) : 1;
    attended_ = Buffer<float, cuda>(size(few, s.query_size()));
    activated_ = Buffer<float, cuda>(size(few, s.intermediate_size));
    if (batch > 1 || options.max_chunk > 0) {
      products_.emplace();
      rounded_ = Buffer<Element, cuda>(
          size(rows, std::max({s.hidden_size, s.query_size(), s.intermediate_size})));
      gate_up_ = Buffer<float, cuda>(size(rows, 2 * s.intermediate_size));
      widened_ = Buffer<Element, cuda>(static_cast<std::size_t>(widened_size(weights)));
    }
    if (options.max_chunk > 0) {
      chunk_.emplace(attention_.shape(), options.step, options.max_chunk, ChunkKernel::kAuto,
                     overlap_);
      chunk_hidden_ = Buffer<float, cuda>(size(options.max_chunk, s.hidden_size));
      chunk_tokens_ = Buffer<std::int32_t, cuda>(size(options.max_chunk, 1));
    }
    detail::prefer_shared_memory(choose_kernel_);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // buffers are zero
  }

  const CudaDecoderShape& shape() const { return weights_->shape(); }
  const DecodeStep& state() const { return step_; }
  std::int64_t batch_size() const { return options_.step.batch_size; }
  /// Device memory of keys and values and their scales, all sessions.
  std::size_t cache_bytes() const {
    return keys_.bytes() + values_.bytes() + key_scales_.bytes() + value_scales_.bytes();
  }

  /// Tells how many tokens each session has had; negative: the session is idle, sees and stores
  /// nothing and chooses no token. Joining and leaving is this, between steps: a session that joins
  /// begins at 0. Waits for the stream. \throws Error(kShape, kDevice).
  void set_totals(std::span<const std::int64_t> totals, cudaStream_t stream = nullptr) {
    step_.set_totals(totals, stream);
  }

  /// Says which token each session's next step feeds; idle sessions' are not looked at. Waits.
  /// \throws Error(kShape) unless there is one token of the vocabulary per session.
  void feed(std::span<const std::int32_t> tokens, cudaStream_t stream = nullptr) {
    if (static_cast<std::int64_t>(tokens.size()) != batch_size())
      throw Error(ErrorCode::kShape, {"one token per session", "CudaDecoder::feed", "tokens",
                                      std::to_string(batch_size()), std::to_string(tokens.size())});
    check_tokens(tokens, "CudaDecoder::feed");
    tokens_.upload(tokens, stream);
    detail::TokenChoiceParams p = choice_params(0, 0);
    p.parts = 0;
    choose(p, static_cast<unsigned>(batch_size()), stream);
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");  // steps may use another
  }

  /// feed() of the only session, from page-locked host memory that is read when the stream gets
  /// there: waits for nothing and may be captured. Preconditions: batch_size() is 1; a token of the
  /// vocabulary. \throws Error(kDevice).
  void feed_from(const std::int32_t* token, cudaStream_t stream) {
    check_cuda(
        cudaMemcpyAsync(tokens_.data(), token, sizeof(*token), cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
    // Not launched early: what stands before it is no kernel.
    detail::launch_kernel("choose_token_kernel", choose_kernel_, dim3(1), detail::kRowThreads,
                          stream, false, choice_params(0, 0));
  }

  /// One step of all sessions. May be captured. \throws Error(kDevice).
  void step(cudaStream_t stream) {
    if (batch_size() == 1)
      step_one(stream);
    else
      step_many(stream);
  }

  /// Reads `tokens` into a session's cache, a chunk at a time, and chooses the token after them:
  /// what feeding them step by step would do, with products rounded as for batches. The session
  /// must not be idle. Waits for the stream.
  /// \throws Error(kShape) for a token outside the vocabulary or no tokens, Error(kCapacity) when a
  /// full cache cannot hold them, Error(kConfig) without max_chunk. Nothing was read then.
  void prefill(std::int64_t session, std::span<const std::int32_t> tokens,
               cudaStream_t stream = nullptr) {
    const auto require = [](bool good, ErrorCode code, const char* field,
                            const std::string& expected, std::int64_t found) {
      if (!good)
        throw Error(code, {"prefill does not fit", "CudaDecoder::prefill", field, expected,
                           std::to_string(found)});
    };
    require(chunk_.has_value(), ErrorCode::kConfig, "max_chunk", "at least 1", 0);
    require(session >= 0 && session < batch_size(), ErrorCode::kShape, "session",
            "below " + std::to_string(batch_size()), session);
    require(!tokens.empty(), ErrorCode::kShape, "tokens", "at least 1", 0);
    check_tokens(tokens, "CudaDecoder::prefill");
    std::vector<std::int64_t> totals = step_.totals(stream);
    std::int64_t& total = totals[static_cast<std::size_t>(session)];
    const auto count = static_cast<std::int64_t>(tokens.size());
    require(total >= 0, ErrorCode::kConfig, "session", "one that is not idle", session);
    require(step_.config().window_size < DecodeStepConfig::kUnlimitedWindow ||
                total + count <= step_.config().capacity,
            ErrorCode::kCapacity, "tokens",
            "at most " + std::to_string(step_.config().capacity - total), count);
    std::int64_t length = 0;
    for (std::int64_t done = 0; done < count; done += length) {
      length = std::min(options_.max_chunk, count - done);
      chunk_tokens_.upload(
          tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(length)), stream);
      run_chunk(session, total + done, chunk_tokens_.data(), length, stream);
    }
    total += count;
    step_.set_totals(totals, stream);
    // What follows the last token: its logits, and the choice.
    const CudaDecoderShape& s = shape();
    MatrixVectorTask<Element> task =
        vector_task(weights_->output_matrix(), s.vocab_size, s.hidden_size,
                    chunk_hidden_.data() + (length - 1) * s.hidden_size,
                    weights_->output_norm.data(), logits_.data() + session * s.vocab_size);
    set_choice(task, session);
    multiply(task, weights_->quantised_output, VectorEpilogue::kChoose, stream);
    choose(choice_params(session, vector_.blocks()), 1, stream);
    if (options_.keep_hidden)
      check_cuda(cudaMemcpyAsync(hidden_.data() + session * s.hidden_size, task.x,
                                 static_cast<std::size_t>(s.hidden_size) * sizeof(float),
                                 cudaMemcpyDeviceToDevice, stream),
                 "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }

  /// [batch_size, hidden_size], device memory: with keep_hidden, the residual stream behind each
  /// session's last token.
  float* hidden_data() { return hidden_.data(); }
  const float* hidden_data() const { return hidden_.data(); }
  /// Forms the only session's logits and choice from hidden_data(): to the bit what the step or the
  /// prefill that left it there formed. normed: the final norm has been applied to it. Waits for
  /// nothing. Preconditions: keep_hidden, batch_size() is 1. \throws Error(kDevice).
  void choose_again(bool normed, cudaStream_t stream) {
    const CudaDecoderShape& s = shape();
    MatrixVectorTask<Element> task =
        vector_task(weights_->output_matrix(), s.vocab_size, s.hidden_size, hidden_.data(),
                    normed ? nullptr : weights_->output_norm.data(), logits_.data());
    set_choice(task, 0);
    multiply(task, weights_->quantised_output, VectorEpilogue::kChoose, stream);
    choose(choice_params(0, vector_.blocks()), 1, stream);
  }

  /// Reads a chunk into a session's cache, from tokens in device memory, and does nothing else: no
  /// logits, no choice, no wait. `base` is the index of the chunk's first token; counts are the
  /// caller's (set_totals). Nodes of a tree are stored as if they followed each other.
  /// Preconditions: tokens of the vocabulary, 1 to max_chunk of them, room in a full cache.
  /// \throws Error(kDevice).
  void append_chunk(std::int64_t session, std::int64_t base, const std::int32_t* tokens,
                    std::int64_t length, cudaStream_t stream, const ChunkTree& tree = {}) {
    run_chunk(session, base, tokens, length, stream, tree);
  }
  /// The same for inputs that are no tokens (frames of an encoder). rows: [length, hidden_size] in
  /// device memory, or in page-locked host memory, which is read when the stream gets there.
  void append_chunk_rows(std::int64_t session, std::int64_t base, const float* rows,
                         std::int64_t length, cudaStream_t stream) {
    check_cuda(
        cudaMemcpyAsync(chunk_hidden_.data(), rows,
                        static_cast<std::size_t>(length * shape().hidden_size) * sizeof(float),
                        cudaMemcpyDefault, stream),
        "cudaMemcpyAsync");
    run_chunk_layers(session, base, length, stream);
  }

  /// Logits behind tokens [first, first + rows) of the last chunk that was read, inputs of the
  /// product rounded. to: [rows, vocab_size], device memory. Waits for nothing.
  /// \throws Error(kDevice).
  void chunk_logits(std::int64_t first, std::int64_t rows, float* to, cudaStream_t stream) {
    const CudaDecoderShape& s = shape();
    const float* const hidden = chunk_hidden_.data() + first * s.hidden_size;
    if (few_logits_ && rows <= kMostFew)
      return multiply_few(vector_task(weights_->output_matrix(), s.vocab_size, s.hidden_size,
                                      hidden, weights_->output_norm.data(), to),
                          weights_->quantised_output, rows, VectorEpilogue::kStore, stream);
    norm_rows(hidden, weights_->output_norm.data(), rows, stream);
    multiply_rows(weights_->output_matrix(), weights_->quantised_output, s.vocab_size,
                  s.hidden_size, rounded_.data(), rows, to, false, stream);
  }

  /// This decoder's first session as others see it.
  CudaGroupView<Element> view(const std::int64_t* snapshot, double shift = 0) const
      requires(!kHasScales) {
    const DecodeStepConfig& c = options_.step;
    return {.keys = keys_.data(),
            .values = values_.data(),
            .layer_stride = layer_stride_,
            .extents = {c.num_sink_tokens, c.window_size, c.capacity, c.position_rule, c.origin},
            .shift = shift,
            .snapshot = snapshot};
  }
  /// From now on every step sees the first *source.snapshot tokens of another cache beside its own,
  /// or what its window keeps of them.
  /// The other decoder must outlive this one. Allocates. \throws Error(kConfig) with several
  /// sessions; Error(kDevice).
  void see(const CudaGroupView<Element>& source) requires(!kHasScales) {
    const CudaDecoderShape& s = shape();
    if (batch_size() != 1)
      throw Error(ErrorCode::kConfig, {"one session sees another group", "CudaDecoder::see",
                                       "batch_size", "1", std::to_string(batch_size())});
    source_ = source;
    SegmentAttentionShape extents;
    extents.num_qo_heads = s.num_qo_heads;
    extents.num_kv_heads = s.num_kv_heads;
    extents.max_segments = detail::kGroupSegments;
    extents.max_keys = source.extents.most_seen() + view(nullptr).extents.most_seen();
    segment_attention_.emplace(
        extents,
        SegmentRotation{frequencies_, options_.step.attention_factor, options_.step.interleaved});
    extents.batch_size = s.num_layers;  // a list for each layer
    lists_.emplace(extents);
  }

  /// Device memory of keys and of values: [layers, batch, num_kv_heads, capacity, head_dim], keys
  /// rotated.
  Cache* keys_data() { return keys_.data(); }
  Cache* values_data() { return values_.data(); }
  const Cache* keys_data() const { return keys_.data(); }
  const Cache* values_data() const { return values_.data(); }
  /// Of their scales: [layers, batch, num_kv_heads, capacity]; null where rows have none.
  float* key_scales_data() { return key_scales_.data(); }
  float* value_scales_data() { return value_scales_.data(); }
  const float* key_scales_data() const { return key_scales_.data(); }
  const float* value_scales_data() const { return value_scales_.data(); }

  /// Calls fill(rows, count) with the device memory of all keys, then of all values, and of their
  /// scales where they have some, for programs that bring a cache of their own. The caller waits
  /// for what fill() launches.
  template <class Fill>
  void fill_cache(Fill&& fill) {
    fill(keys_.data(), keys_.size());
    fill(values_.data(), values_.size());
    if constexpr (kHasScales) {
      fill(key_scales_.data(), key_scales_.size());
      fill(value_scales_.data(), value_scales_.size());
    }
  }

  /// Device memory of what tokens() and logits() copy.
  const std::int32_t* tokens_data() const { return tokens_.data(); }
  const float* logits_data() const { return logits_.data(); }

  /// The token of each session's next step. Waits for the stream.
  std::vector<std::int32_t> tokens(cudaStream_t stream = nullptr) const {
    return tokens_.download(stream);
  }
  /// [batch_size, vocab_size], of the last step or prefill. Waits for the stream.
  std::vector<float> logits(cudaStream_t stream = nullptr) const {
    return logits_.download(stream);
  }
  /// [batch_size, history_size]: the token with index i in its stream stands at i % history_size,
  /// if it was chosen here. Waits for the stream.
  std::vector<std::int32_t> history(cudaStream_t stream = nullptr) const {
    return history_.download(stream);
  }

 private:
  static bool supports_overlap() {
    int device = 0;
    int major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    return major >= 9;
  }

  void check_tokens(std::span<const std::int32_t> tokens, const char* where) const {
    for (const std::int32_t token : tokens)
      if (token < 0 || token >= shape().vocab_size)
        throw Error(ErrorCode::kShape,
                    {"a token outside the vocabulary", where, "token",
                     "below " + std::to_string(shape().vocab_size), std::to_string(token)});
  }

  MatrixVectorTask<Element> vector_task(const Element* matrix, std::int64_t rows, std::int64_t cols,
                                        const float* x, const float* norm, float* y) const {
    MatrixVectorTask<Element> task;
    task.matrix = matrix;
    task.rows = rows;
    task.cols = cols;
    task.x = x;
    task.norm = norm;
    task.norm_eps = static_cast<float>(shape().norm_eps);
    task.y = y;
    return task;
  }
  /// task's product, by `quantised` where it has rows.
  void multiply(const MatrixVectorTask<Element>& task, const CudaQuantisedMatrix& quantised,
                VectorEpilogue epilogue, cudaStream_t stream, bool alone = false) const {
    if (quantised.empty()) return vector_.launch(task, epilogue, stream, alone);
    float* y = task.y;
    for (const CudaQuantisedRows& part : quantised) {
      QuantisedVectorTask rows;
      rows.type = part.type;
      rows.matrix = part.content.data();
      rows.rows = part.rows;
      rows.cols = part.cols;
      rows.x = task.x;
      rows.norm = task.norm;
      rows.norm_eps = task.norm_eps;
      rows.y = y;
      rows.candidates = task.candidates;
      rows.choice = task.choice;
      rows.totals = task.totals;
      rows.sequence = task.sequence;
      quantised_vector_.launch(rows, epilogue, stream, alone);
      y += epilogue == VectorEpilogue::kGatedSilu ? part.rows / 2 : part.rows;
    }
  }

  /// Rows that one launch multiplies as they are.
  static constexpr std::int64_t kMostFew = QuantisedColumnsPlan::kMostColumns;

  /// Whether multiply_few() knows the matrix.
  bool takes_few(const CudaQuantisedMatrix& quantised) const {
    return std::all_of(quantised.begin(), quantised.end(), [&](const CudaQuantisedRows& part) {
      return quantised_columns_.fits(part.type, part.rows, part.cols);
    });
  }
  bool takes_few_in_layers(const CudaDecoderWeights<Element>& weights) const {
    return std::all_of(
        weights.layers.begin(), weights.layers.end(), [&](const CudaLayerWeights<Element>& w) {
          return takes_few(w.quantised_query_key_value) && takes_few(w.quantised_output) &&
                 takes_few(w.quantised_gate_up) && takes_few(w.quantised_down);
        });
  }
  /// task's product with `count` rows of x, 1 to kMostFew, that follow one another, as rows of y
  /// do. kChoose is not for several.
  void multiply_few(const MatrixVectorTask<Element>& task, const CudaQuantisedMatrix& quantised,
                    std::int64_t count, VectorEpilogue epilogue, cudaStream_t stream,
                    bool alone = false) const {
    const std::int64_t per_output = epilogue == VectorEpilogue::kGatedSilu ? 2 : 1;
    // rows: MatrixColumnsTask or QuantisedColumnsTask, its matrix and its number of rows set.
    const auto launch = [&](const auto& plan, auto rows, float* y) {
      rows.cols = task.cols;
      rows.count = static_cast<int>(count);
      rows.x = task.x;
      rows.x_stride = task.cols;
      rows.norm = task.norm;
      rows.norm_eps = task.norm_eps;
      rows.y = y;
      rows.y_stride = task.rows / per_output;
      plan.launch(rows, epilogue, stream, alone);
    };
    if (quantised.empty()) {
      MatrixColumnsTask<Element> rows;
      rows.matrix = task.matrix;
      rows.rows = task.rows;
      return launch(columns_, rows, task.y);
    }
    float* y = task.y;
    for (const CudaQuantisedRows& part : quantised) {
      QuantisedColumnsTask rows;
      rows.type = part.type;
      rows.matrix = part.content.data();
      rows.rows = part.rows;
      launch(quantised_columns_, rows, y);
      y += part.rows / per_output;
    }
  }

  /// Rows of a quantised matrix that are widened at once: 2^25 weights, 64 MB.
  static std::int64_t widened_rows(const CudaQuantisedRows& part) {
    const std::int64_t most = (std::int64_t{1} << 25) / part.cols / kQuantisedTileRows;
    return std::min(part.rows, std::max<std::int64_t>(most, 1) * kQuantisedTileRows);
  }
  static std::int64_t widened_size(const CudaDecoderWeights<Element>& weights) {
    std::int64_t size = 0;
    const auto count = [&](const CudaQuantisedMatrix& matrix) {
      for (const CudaQuantisedRows& part : matrix)
        size = std::max(size, widened_rows(part) * part.cols);
    };
    count(weights.quantised_output);
    for (const CudaLayerWeights<Element>& layer : weights.layers) {
      count(layer.quantised_query_key_value);
      count(layer.quantised_output);
      count(layer.quantised_gate_up);
      count(layer.quantised_down);
    }
    return size;
  }
  /// Y = X W^T (+ Y) for several rows: a quantised matrix is widened first, some rows at a time.
  void multiply_rows(const Element* w, const CudaQuantisedMatrix& quantised, std::int64_t rows,
                     std::int64_t cols, const Element* x, std::int64_t count, float* y, bool add,
                     cudaStream_t stream) {
    if (quantised.empty()) return products_->launch(w, rows, cols, x, count, y, add, stream);
    for (const CudaQuantisedRows& part : quantised) {
      const std::int64_t most = widened_rows(part);
      for (std::int64_t row = 0; row < part.rows; row += most) {
        const std::int64_t some = std::min(most, part.rows - row);
        dequantise(part.type, part.content.data() + quantised_bytes(part.type, row, cols), some,
                   cols, widened_.data(), stream);
        products_->launch(widened_.data(), some, cols, x, count, y, add, stream, rows);
        y += some;
      }
    }
  }

  void set_choice(MatrixVectorTask<Element>& task, std::int64_t session) {
    task.candidates = candidates_.data();
    task.choice = options_.choice;
    task.totals = step_.totals_data();
    task.sequence = session;
  }

  detail::TokenChoiceParams choice_params(std::int64_t session, int parts) {
    return {.logits = logits_.data(),
            .candidates = candidates_.data(),
            .totals = step_.totals_data(),
            .tokens = tokens_.data(),
            .history = options_.history_size > 0 ? history_.data() : nullptr,
            .embedding = reinterpret_cast<const std::uint16_t*>(weights_->embedding.data()),
            .hidden = options_.keep_hidden && parts > 0
                          ? nullptr
                          : hidden_.data() + session * shape().hidden_size,
            .history_size = options_.history_size,
            .sequence = session,
            .seed = options_.choice.seed,
            .temperature = options_.choice.temperature,
            .parts = parts,
            .vocab_size = static_cast<int>(shape().vocab_size),
            .hidden_size = static_cast<int>(shape().hidden_size)};
  }
  void choose(const detail::TokenChoiceParams& p, unsigned rows, cudaStream_t stream) {
    detail::launch_kernel("choose_token_kernel", choose_kernel_, dim3(rows), detail::kRowThreads,
                          stream, overlap_, p);
  }

  /// The tensors of a layer's step, from fused rows of queries, keys and values.
  DecodeAttentionTensors<Cache> attention_tensors(std::int64_t layer) {
    const CudaDecoderShape& s = shape();
    DecodeAttentionTensors<Cache> x;
    x.query = fused_.data();
    x.key = fused_.data() + s.query_size();
    x.value = fused_.data() + s.query_size() + s.kv_size();
    x.query_stride = x.key_stride = x.value_stride = s.fused_size();
    x.input_type = ElementType::kF32;
    x.out_stride = s.query_size();
    x.keys = keys_.data() + layer * layer_stride_;
    x.values = values_.data() + layer * layer_stride_;
    x.sequence_stride = s.num_kv_heads * step_.config().capacity * kHeadDim;
    x.head_stride = step_.config().capacity * kHeadDim;
    x.token_stride = kHeadDim;
    if constexpr (kHasScales) {
      x.key_scales = key_scales_.data() + layer * layer_stride_ / kHeadDim;
      x.value_scales = value_scales_.data() + layer * layer_stride_ / kHeadDim;
      x.scale_sequence_stride = s.num_kv_heads * step_.config().capacity;
      x.scale_head_stride = step_.config().capacity;
    }
    return x;
  }

  void step_one(cudaStream_t stream) {
    using enum VectorEpilogue;
    const CudaDecoderShape& s = shape();
    float* const hidden = hidden_.data();
    if constexpr (!kHasScales)
      if (lists_) write_lists(stream);
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const CudaLayerWeights<Element>& w = weights_->layers[static_cast<std::size_t>(l)];
      multiply(vector_task(w.query_key_value.data(), s.fused_size(), s.hidden_size, hidden,
                           w.attention_norm.data(), fused_.data()),
               w.quantised_query_key_value, kStore, stream);
      DecodeAttentionTensors<Cache> x = attention_tensors(l);
      x.out = attended_.data();
      x.output_type = ElementType::kF32;
      attend(l, x, stream);
      multiply(vector_task(w.output.data(), s.hidden_size, s.query_size(), attended_.data(),
                           nullptr, hidden),
               w.quantised_output, kAdd, stream, true);
      multiply(vector_task(w.gate_up.data(), 2 * s.intermediate_size, s.hidden_size, hidden,
                           w.feed_forward_norm.data(), activated_.data()),
               w.quantised_gate_up, kGatedSilu, stream);
      multiply(vector_task(w.down.data(), s.hidden_size, s.intermediate_size, activated_.data(),
                           nullptr, hidden),
               w.quantised_down, kAdd, stream);
    }
    // The token is counted before the next is chosen: choices go by the index that is chosen for.
    step_.advance(stream, overlap_);
    MatrixVectorTask<Element> task =
        vector_task(weights_->output_matrix(), s.vocab_size, s.hidden_size, hidden,
                    weights_->output_norm.data(), logits_.data());
    set_choice(task, 0);
    multiply(task, weights_->quantised_output, kChoose, stream);
    choose(choice_params(0, vector_.blocks()), 1, stream);
  }

  /// A layer's attention of the only session.
  void attend(std::int64_t layer, const DecodeAttentionTensors<Cache>& x, cudaStream_t stream) {
    if constexpr (!kHasScales)
      if (lists_) return attend_groups(layer, x, stream);
    attention_.launch(step_, x, static_cast<float>(shape().sm_scale), stream);
  }

  void write_lists(cudaStream_t stream) requires(!kHasScales) {
    const detail::GroupListsParams<Element> params{.source = source_,
                                                   .own = view(nullptr),
                                                   .totals = step_.totals_data(),
                                                   .segments = lists_->segments(),
                                                   .counts = lists_->counts(),
                                                   .readers = lists_->readers(),
                                                   .head_dim = kHeadDim};
    detail::group_lists_kernel<Element>
        <<<static_cast<unsigned>(shape().num_layers), detail::kWarpSize, 0, stream>>>(params);
    check_cuda(cudaGetLastError(), "group_lists_kernel");
  }

  /// Appends the step's token to a layer's cache and attends to both groups.
  void attend_groups(std::int64_t layer, const DecodeAttentionTensors<Element>& x,
                     cudaStream_t stream) requires(!kHasScales) {
    const CudaDecoderShape& s = shape();
    detail::group_append_kernel<Element, kHeadDim>
        <<<static_cast<unsigned>(s.num_kv_heads), kHeadDim / 2, 0, stream>>>(
            static_cast<const float*>(x.key), static_cast<const float*>(x.value), step_.places(),
            step_.rows(), step_.rotary_dim() / 2, step_.config().interleaved,
            reinterpret_cast<std::uint16_t*>(x.keys), reinterpret_cast<std::uint16_t*>(x.values),
            x.head_stride);
    check_cuda(cudaGetLastError(), "group_append_kernel");
    SegmentAttentionTensors tensors;
    tensors.query = x.query;
    tensors.input_type = x.input_type;
    tensors.out = x.out;
    tensors.output_type = x.output_type;
    device::AttentionVariant<device::AllVisible> variant;  // lists hold what the step sees
    variant.sm_scale = static_cast<float>(s.sm_scale);
    segment_attention_->launch(lists_->view(layer), tensors, variant, stream);
  }

  void norm_rows(const float* x, const float* norm, std::int64_t rows, cudaStream_t stream) {
    detail::launch_kernel(
        "rms_norm_kernel", detail::rms_norm_kernel<Element>, dim3(static_cast<unsigned>(rows)),
        detail::kRowThreads, stream, overlap_, x, norm, static_cast<float>(shape().norm_eps),
        reinterpret_cast<std::uint16_t*>(rounded_.data()), static_cast<int>(shape().hidden_size));
  }

  /// What follows attention in a layer; attended rows are in rounded_.
  void finish_layer(const CudaLayerWeights<Element>& w, float* hidden, std::int64_t rows,
                    cudaStream_t stream) {
    const CudaDecoderShape& s = shape();
    multiply_rows(w.output.data(), w.quantised_output, s.hidden_size, s.query_size(),
                  rounded_.data(), rows, hidden, true, stream);
    norm_rows(hidden, w.feed_forward_norm.data(), rows, stream);
    multiply_rows(w.gate_up.data(), w.quantised_gate_up, 2 * s.intermediate_size, s.hidden_size,
                  rounded_.data(), rows, gate_up_.data(), false, stream);
    const std::int64_t elements = rows * s.intermediate_size;
    detail::launch_kernel(
        "gated_silu_kernel", detail::gated_silu_kernel<Element>,
        dim3(static_cast<unsigned>((elements / 2 + detail::kRowThreads - 1) / detail::kRowThreads)),
        detail::kRowThreads, stream, overlap_, gate_up_.data(),
        reinterpret_cast<std::uint16_t*>(rounded_.data()), elements);
    multiply_rows(w.down.data(), w.quantised_down, s.hidden_size, s.intermediate_size,
                  rounded_.data(), rows, hidden, true, stream);
  }

  /// A layer's queries, keys and values of `rows` rows: to fused_.
  void begin_layer(const CudaLayerWeights<Element>& w, float* hidden, std::int64_t rows, bool few,
                   cudaStream_t stream) {
    const CudaDecoderShape& s = shape();
    if (few)
      return multiply_few(vector_task(w.query_key_value.data(), s.fused_size(), s.hidden_size,
                                      hidden, w.attention_norm.data(), fused_.data()),
                          w.quantised_query_key_value, rows, VectorEpilogue::kStore, stream);
    norm_rows(hidden, w.attention_norm.data(), rows, stream);
    multiply_rows(w.query_key_value.data(), w.quantised_query_key_value, s.fused_size(),
                  s.hidden_size, rounded_.data(), rows, fused_.data(), false, stream);
  }

  /// finish_layer() of few rows; attended rows are in attended_.
  void finish_layer_few(const CudaLayerWeights<Element>& w, float* hidden, std::int64_t rows,
                        cudaStream_t stream) {
    using enum VectorEpilogue;
    const CudaDecoderShape& s = shape();
    multiply_few(vector_task(w.output.data(), s.hidden_size, s.query_size(), attended_.data(),
                             nullptr, hidden),
                 w.quantised_output, rows, kAdd, stream, true);
    multiply_few(vector_task(w.gate_up.data(), 2 * s.intermediate_size, s.hidden_size, hidden,
                             w.feed_forward_norm.data(), activated_.data()),
                 w.quantised_gate_up, rows, kGatedSilu, stream);
    multiply_few(vector_task(w.down.data(), s.hidden_size, s.intermediate_size, activated_.data(),
                             nullptr, hidden),
                 w.quantised_down, rows, kAdd, stream);
  }

  void step_many(cudaStream_t stream) {
    const CudaDecoderShape& s = shape();
    const std::int64_t batch = batch_size();
    const bool few = few_in_layers_ && batch <= kMostFew;
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const CudaLayerWeights<Element>& w = weights_->layers[static_cast<std::size_t>(l)];
      begin_layer(w, hidden_.data(), batch, few, stream);
      DecodeAttentionTensors<Cache> x = attention_tensors(l);
      x.out = few ? static_cast<void*>(attended_.data()) : rounded_.data();
      x.output_type = few ? ElementType::kF32 : element_type_of<Element>;
      attention_.launch(step_, x, static_cast<float>(s.sm_scale), stream);
      if (few)
        finish_layer_few(w, hidden_.data(), batch, stream);
      else
        finish_layer(w, hidden_.data(), batch, stream);
    }
    step_.advance(stream, overlap_);
    if (few_logits_ && batch <= kMostFew) {
      multiply_few(vector_task(weights_->output_matrix(), s.vocab_size, s.hidden_size,
                               hidden_.data(), weights_->output_norm.data(), logits_.data()),
                   weights_->quantised_output, batch, VectorEpilogue::kStore, stream);
    } else {
      norm_rows(hidden_.data(), weights_->output_norm.data(), batch, stream);
      multiply_rows(weights_->output_matrix(), weights_->quantised_output, s.vocab_size,
                    s.hidden_size, rounded_.data(), batch, logits_.data(), false, stream);
    }
    const detail::TokenChoiceParams p = choice_params(0, detail::kCandidateParts);
    detail::launch_kernel("candidates_kernel", detail::candidates_kernel<detail::kVectorThreads>,
                          dim3(detail::kCandidateParts, static_cast<unsigned>(batch)),
                          detail::kVectorThreads, stream, overlap_, p);
    choose(p, static_cast<unsigned>(batch), stream);
  }

  void run_chunk(std::int64_t session, std::int64_t base, const std::int32_t* tokens,
                 std::int64_t length, cudaStream_t stream, const ChunkTree& tree = {}) {
    detail::launch_kernel("embedding_kernel", detail::embedding_kernel<Element>,
                          dim3(static_cast<unsigned>(length)), detail::kRowThreads, stream,
                          overlap_, tokens,
                          reinterpret_cast<const std::uint16_t*>(weights_->embedding.data()),
                          chunk_hidden_.data(), static_cast<int>(shape().hidden_size));
    run_chunk_layers(session, base, length, stream, tree);
  }

  /// The layers of a chunk whose inputs are in chunk_hidden_.
  void run_chunk_layers(std::int64_t session, std::int64_t base, std::int64_t length,
                        cudaStream_t stream, const ChunkTree& tree = {}) {
    const CudaDecoderShape& s = shape();
    float* const hidden = chunk_hidden_.data();
    const bool few = few_in_layers_ && length <= kMostFew;
    chunk_->rotate(step_, base, length, stream, tree);
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const CudaLayerWeights<Element>& w = weights_->layers[static_cast<std::size_t>(l)];
      begin_layer(w, hidden, length, few, stream);
      const DecodeAttentionTensors<Cache> all = attention_tensors(l);
      ChunkAttentionTensors<Element, Cache> x;
      x.query = fused_.data();
      x.key = fused_.data() + s.query_size();
      x.value = fused_.data() + s.query_size() + s.kv_size();
      x.stride = s.fused_size();
      x.out = few ? static_cast<void*>(attended_.data()) : rounded_.data();
      x.output_type = few ? ElementType::kF32 : element_type_of<Element>;
      x.keys = all.keys + session * all.sequence_stride;
      x.values = all.values + session * all.sequence_stride;
      x.head_stride = all.head_stride;
      x.token_stride = all.token_stride;
      if constexpr (kHasScales) {
        x.key_scales = all.key_scales + session * all.scale_sequence_stride;
        x.value_scales = all.value_scales + session * all.scale_sequence_stride;
        x.scale_head_stride = all.scale_head_stride;
      }
      x.tree = tree;
      chunk_->launch(step_, x, base, length, static_cast<float>(s.sm_scale), stream);
      if (few)
        finish_layer_few(w, hidden, length, stream);
      else
        finish_layer(w, hidden, length, stream);
    }
  }

  // What the attribute is set on (backend.cuh).
  void (*choose_kernel_)(detail::TokenChoiceParams) = detail::choose_token_kernel<Element>;
  const CudaDecoderWeights<Element>* weights_;
  CudaDecoderOptions options_;
  DecodeStep step_;
  DecodeAttentionPlan<Cache, kHeadDim> attention_;
  MatrixVectorPlan<Element> vector_;
  QuantisedVectorPlan quantised_vector_;
  MatrixColumnsPlan<Element> columns_;
  QuantisedColumnsPlan quantised_columns_;
  bool few_in_layers_;                               // multiply_few() knows all matrices of layers
  bool few_logits_;                                  // and the last
  std::optional<MatrixProducts<Element>> products_;  // several rows
  std::optional<ChunkAttentionPlan<Element, kHeadDim, Cache>> chunk_;  // prefill
  bool overlap_;
  std::vector<double> frequencies_;
  CudaGroupView<Element> source_;  // another group, if lists_ is there
  std::optional<
      SegmentAttentionPlan<Element, kHeadDim, device::AttentionVariant<device::AllVisible>>>
      segment_attention_;
  std::optional<SegmentLists<Element>> lists_;
  std::int64_t layer_stride_ = 0;     // elements of a layer's keys
  Buffer<Cache, cuda> keys_;          // [layers, batch, kv_heads, capacity, head_dim]
  Buffer<Cache, cuda> values_;        // the same
  Buffer<float, cuda> key_scales_;    // [layers, batch, kv_heads, capacity], of codes
  Buffer<float, cuda> value_scales_;  // the same
  Buffer<float, cuda> hidden_;        // [batch, hidden_size], the residual stream
  Buffer<float, cuda> fused_;         // [rows, query + key + value]
  Buffer<float, cuda> attended_;      // [few rows, query_size]
  Buffer<float, cuda> activated_;     // [few rows, intermediate_size]
  Buffer<Element, cuda> rounded_;     // [rows, widest]: inputs of products
  Buffer<Element, cuda> widened_;     // rows of a quantised matrix, for products with several rows
  Buffer<float, cuda> gate_up_;       // [rows, 2 intermediate_size]
  Buffer<float, cuda> logits_;        // [batch, vocab_size]
  Buffer<TokenCandidate, cuda> candidates_;
  Buffer<std::int32_t, cuda> tokens_;        // [batch]
  Buffer<std::int32_t, cuda> history_;       // [batch, history_size]
  Buffer<float, cuda> chunk_hidden_;         // [max_chunk, hidden_size]
  Buffer<std::int32_t, cuda> chunk_tokens_;  // [max_chunk]
};

}  // namespace sluice
