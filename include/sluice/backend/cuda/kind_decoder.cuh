// SPDX-License-Identifier: MIT
/// A decoder of the Llama family that watches: text and frames of one conversation, kept by kind
/// (cache/kind_retention.hpp; StreamingVLM, arXiv 2510.09608) in device memory. The host keeps the
/// books and sends each step's list of tiles ahead of it; replies are decoded by replays of one
/// captured step and the host does not wait for tokens. Needs cublasLt.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/backend/cuda/backend.cuh"
#include "sluice/backend/cuda/decoder.cuh"
#include "sluice/backend/cuda/decoder_kernels.cuh"
#include "sluice/backend/cuda/matrix_product.cuh"
#include "sluice/backend/cuda/matrix_vector.cuh"
#include "sluice/backend/cuda/memory.cuh"
#include "sluice/backend/cuda/tile_attention.cuh"
#include "sluice/cache/kind_retention.hpp"
#include "sluice/position/vision_positions.hpp"

namespace sluice {

/// What a CudaKindDecoder is made of.
struct CudaKindDecoderOptions {
  KindRetentionConfig retention;
  std::span<const double> frequencies = {};  ///< [head_dim / 2], Rotary::frequency()
  /// Pairs that turn by time and by height; the others by width (Rotary's sections). Both
  /// head_dim / 2: one axis.
  int time_pairs = 0;
  int height_pairs = 0;
  TokenChoice choice;
  std::int64_t history_size = 4096;  ///< chosen tokens kept, the newest
};

namespace detail {

/// Replies whose rounds are over become texts of the block: rotates their keys from float32, copies
/// values. Blocks: (token, layer).
struct KindMoveParams {
  const KindMove* moves;
  const TurnFrequency* frequencies;
  std::uint16_t* keys;
  std::uint16_t* values;
  const float* raw_keys;
  std::int64_t layer_stride;
  std::int64_t head_stride;
  std::int64_t raw_layer_stride;
  std::int64_t raw_stride;
  int num_kv_heads;
};

template <class Element, int kHeadDim>
__global__ void __launch_bounds__(kHeadDim / 2)
    kind_move_kernel(const __grid_constant__ KindMoveParams p) {
  constexpr int kPairs = kHeadDim / 2;
  const KindMove move = p.moves[blockIdx.x];
  const int pair = static_cast<int>(threadIdx.x);
  const std::int64_t layer = blockIdx.y;
  const float2 turned = rotation_at(move.position, p.frequencies[pair], 1);
  for (int head = 0; head < p.num_kv_heads; ++head) {
    const std::int64_t base = layer * p.layer_stride + head * p.head_stride;
    const float* const raw =
        p.raw_keys + layer * p.raw_layer_stride + head * p.raw_stride + move.reply_slot * kHeadDim;
    const float a = raw[pair];
    const float b = raw[pair + kPairs];
    const std::uint32_t packed =
        Half<Element>::pack(a * turned.x - b * turned.y, b * turned.x + a * turned.y);
    std::uint16_t* const key = p.keys + base + move.to_slot * kHeadDim;
    key[pair] = static_cast<std::uint16_t>(packed);
    key[pair + kPairs] = static_cast<std::uint16_t>(packed >> 16);
    reinterpret_cast<std::uint32_t*>(p.values + base + move.to_slot * kHeadDim)[pair] =
        reinterpret_cast<const std::uint32_t*>(p.values + base + move.from_slot * kHeadDim)[pair];
  }
}

}  // namespace detail

/// Host memory from which copies do not wait.
class PinnedBytes {
 public:
  explicit PinnedBytes(std::size_t size) {
    check_cuda(cudaMallocHost(&data_, size), "cudaMallocHost");
  }
  ~PinnedBytes() { static_cast<void>(cudaFreeHost(data_)); }
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;
  std::byte* data() { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

/// One stream. The protocol is KindRetention's: begin_span(head), read(), ... begin_round(),
/// begin_span(vision), see(), begin_span(reply), say(). Members enqueue on the stream and return;
/// download functions wait. Memory is allocated by the constructor (and by cuBLASLt at the first
/// chunk of a new length).
///
/// Arithmetic: chunks round activations to Element before each product, replies do not. The token
/// that a reply begins with is chosen behind the last chunk that was read or seen.
template <class Element, int kHeadDim>
class CudaKindDecoder {
 public:
  /// biases: per layer [fused_size] of queries, keys and values (Qwen2), or none. Both must outlive
  /// the decoder. \throws Error(kUnsupported) for quantised weights; Error(kConfig, kShape,
  /// kDevice).
  CudaKindDecoder(const CudaDecoderWeights<Element>& weights, const CudaKindDecoderOptions& options,
                  cudaStream_t stream, std::span<const Buffer<float, cuda>> biases = {})
      : weights_(&weights),
        biases_(biases),
        choice_(options.choice),
        history_size_(options.history_size),
        retention_(options.retention),
        capacity_(options.retention.capacity()),
        attention_(weights.shape().num_qo_heads, weights.shape().num_kv_heads, options.frequencies,
                   options.time_pairs, options.time_pairs + options.height_pairs,
                   options.retention.max_chunk, most_places(options.retention)),
        vector_(true),
        stream_(stream) {
    const CudaDecoderShape& s = shape();
    const KindRetentionConfig& c = options.retention;
    if (weights.is_quantised())
      throw Error(ErrorCode::kUnsupported, {"weights of 16 bits alone", "CudaKindDecoder",
                                            "weights", "bf16 or f16", "quantised matrices"});
    if (!biases.empty() && static_cast<std::int64_t>(biases.size()) != s.num_layers)
      throw Error(ErrorCode::kShape, {"one bias a layer", "CudaKindDecoder", "biases",
                                      std::to_string(s.num_layers), std::to_string(biases.size())});
    const auto size = [](std::int64_t a, std::int64_t b) {
      return static_cast<std::size_t>(a * b);
    };
    const std::int64_t rows = c.max_chunk;
    layer_stride_ = s.num_kv_heads * capacity_ * kHeadDim;
    raw_layer_stride_ = s.num_kv_heads * retention_.reply_slots() * kHeadDim;
    keys_ = Buffer<Element, cuda>(size(s.num_layers, layer_stride_));
    values_ = Buffer<Element, cuda>(size(s.num_layers, layer_stride_));
    raw_keys_ = Buffer<float, cuda>(size(s.num_layers, raw_layer_stride_));
    chunk_hidden_ = Buffer<float, cuda>(size(rows, s.hidden_size));
    hidden_ = Buffer<float, cuda>(size(1, s.hidden_size));
    fused_ = Buffer<float, cuda>(size(rows, s.fused_size()));
    rounded_ = Buffer<Element, cuda>(
        size(rows, std::max({s.hidden_size, s.query_size(), s.intermediate_size})));
    gate_up_ = Buffer<float, cuda>(size(rows, 2 * s.intermediate_size));
    attended_ = Buffer<float, cuda>(size(1, s.query_size()));
    activated_ = Buffer<float, cuda>(size(1, s.intermediate_size));
    logits_ = Buffer<float, cuda>(size(1, s.vocab_size));
    candidates_ = Buffer<TokenCandidate, cuda>(size(vector_.blocks(), 1));
    token_ = Buffer<std::int32_t, cuda>(1);
    chunk_tokens_ = Buffer<std::int32_t, cuda>(size(rows, 1));
    history_ = Buffer<std::int32_t, cuda>(size(options.history_size, 1));
    // A run gives at most one tile that is not full.
    max_tiles_ = capacity_ / detail::kChunkTile + KindRetention::kMaxSegments + 1;
    const auto align = [](std::size_t bytes) {
      return (bytes + 63) / 64 * 64;
    };
    at_positions_ = align(sizeof(detail::TileStep));
    at_slots_ = at_positions_ + align(size(rows, 1) * sizeof(Position3));
    at_raw_ = at_slots_ + align(size(rows, 1) * sizeof(std::int32_t));
    at_tiles_ = at_raw_ + align(size(rows, 1) * sizeof(std::int32_t));
    at_moves_ = at_tiles_ + align(size(max_tiles_, 1) * sizeof(AttentionTile));
    step_bytes_ = at_moves_ + align(size(c.max_reply, 1) * sizeof(KindMove));
    books_ = Buffer<std::byte, cuda>(step_bytes_);
    for (Slot& slot : ring_) {
      slot.memory = std::make_unique<PinnedBytes>(step_bytes_);
      check_cuda(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "cudaEventCreate");
    }
    detail::prefer_shared_memory(choose_kernel_);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // buffers are zero
  }
  ~CudaKindDecoder() {
    if (step_ != nullptr) static_cast<void>(cudaGraphExecDestroy(step_));
    for (Slot& slot : ring_) static_cast<void>(cudaEventDestroy(slot.copied));
  }
  CudaKindDecoder(const CudaKindDecoder&) = delete;
  CudaKindDecoder& operator=(const CudaKindDecoder&) = delete;

  const CudaDecoderShape& shape() const { return weights_->shape(); }
  const KindRetention& retention() const { return retention_; }
  /// Device memory of keys and values, and of the replies' keys in float32.
  std::size_t cache_bytes() const { return keys_.bytes() + values_.bytes() + raw_keys_.bytes(); }
  /// Keys and values of one token, all layers.
  std::size_t token_bytes() const {
    return static_cast<std::size_t>(2 * shape().num_layers * shape().kv_size()) * sizeof(Element);
  }

  /// As KindRetention's. \throws what it throws, Error(kDevice).
  void begin_round() {
    std::int64_t count = 0;
    Slot& slot = next_slot();
    auto* const moves = reinterpret_cast<KindMove*>(slot.memory->data() + at_moves_);
    retention_.begin_round([&](const KindMove& move) { moves[count++] = move; });
    if (count == 0) return;
    send(slot, at_moves_, static_cast<std::size_t>(count) * sizeof(KindMove));
    const detail::KindMoveParams p{
        .moves = reinterpret_cast<const KindMove*>(books_.data() + at_moves_),
        .frequencies = attention_.frequencies(),
        .keys = reinterpret_cast<std::uint16_t*>(keys_.data()),
        .values = reinterpret_cast<std::uint16_t*>(values_.data()),
        .raw_keys = raw_keys_.data(),
        .layer_stride = layer_stride_,
        .head_stride = capacity_ * kHeadDim,
        .raw_layer_stride = raw_layer_stride_,
        .raw_stride = retention_.reply_slots() * kHeadDim,
        .num_kv_heads = static_cast<int>(shape().num_kv_heads)};
    detail::kind_move_kernel<Element, kHeadDim>
        <<<dim3(static_cast<unsigned>(count), static_cast<unsigned>(shape().num_layers)),
           kHeadDim / 2, 0, stream_>>>(p);
    check_cuda(cudaGetLastError(), "kind_move_kernel");
  }
  void begin_span(SpanRole role, const VisionGrid& grid = {}) {
    if (role == SpanRole::kVision) {
      positions_.resize(static_cast<std::size_t>(grid.num_tokens()));
      fill_positions(grid, retention_.next_position(), positions_);
      seen_ = 0;
    }
    retention_.begin_span(role, grid);
  }

  /// Reads text into the open span, in chunks, and chooses the token behind it.
  /// \throws Error(kCapacity) if the span has no room, Error(kShape) for a token outside the
  /// vocabulary, Error(kDevice).
  void read(std::span<const std::int32_t> tokens) {
    for (const std::int32_t token : tokens)
      if (token < 0 || token >= shape().vocab_size)
        throw Error(ErrorCode::kShape,
                    {"a token outside the vocabulary", "CudaKindDecoder::read", "token",
                     "below " + std::to_string(shape().vocab_size), std::to_string(token)});
    const auto count = static_cast<std::int64_t>(tokens.size());
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t length = std::min(retention_.config().max_chunk, count - done);
      Slot& slot = append(length, "CudaKindDecoder::read");
      const Position first = retention_.next_position() - static_cast<Position>(length);
      Position3* const at = positions_in(slot);
      for (std::int64_t t = 0; t < length; ++t)
        at[t] = on_all_axes(first + static_cast<Position>(t));
      send_books(slot, length);
      check_cuda(cudaMemcpyAsync(chunk_tokens_.data(), tokens.data() + done,
                                 static_cast<std::size_t>(length) * sizeof(std::int32_t),
                                 cudaMemcpyHostToDevice, stream_),
                 "cudaMemcpyAsync");
      detail::launch_kernel("embedding_kernel", detail::embedding_kernel<Element>,
                            dim3(static_cast<unsigned>(length)), detail::kRowThreads, stream_,
                            false, chunk_tokens_.data(),
                            reinterpret_cast<const std::uint16_t*>(weights_->embedding.data()),
                            chunk_hidden_.data(), static_cast<int>(shape().hidden_size));
      run_chunk(length);
      done += length;
    }
  }
  /// Reads tokens of the open vision span: rows of an encoder, [tokens, hidden_size] float32 in
  /// device memory. \throws as read().
  void see(const float* embeddings, std::int64_t tokens) {
    for (std::int64_t done = 0; done < tokens;) {
      const std::int64_t length = std::min(retention_.config().max_chunk, tokens - done);
      Slot& slot = append(length, "CudaKindDecoder::see");
      std::copy_n(positions_.data() + seen_, length, positions_in(slot));
      seen_ += length;
      send_books(slot, length);
      check_cuda(
          cudaMemcpyAsync(chunk_hidden_.data(), embeddings + done * shape().hidden_size,
                          static_cast<std::size_t>(length * shape().hidden_size) * sizeof(float),
                          cudaMemcpyDeviceToDevice, stream_),
          "cudaMemcpyAsync");
      run_chunk(length);
      done += length;
    }
  }
  /// Chooses the token behind the last chunk: what say() begins with.
  void choose() {
    const CudaDecoderShape& s = shape();
    launch_logits(chunk_hidden_.data() + (last_chunk_ - 1) * s.hidden_size);
  }
  /// Feeds the chosen token into the open span and chooses the next, `count` times.
  /// \throws as read().
  void say(std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      Slot& slot = append(1, "CudaKindDecoder::say");
      positions_in(slot)[0] = on_all_axes(retention_.next_position() - 1);
      send_books(slot, 1);
      if (step_ == nullptr && warm_) capture();
      if (step_ == nullptr) {
        run_step();  // the first one compiles what is compiled late
        warm_ = true;
      } else {
        check_cuda(cudaGraphLaunch(step_, stream_), "cudaGraphLaunch");
      }
    }
  }

  /// Of the last chunk's end or the last step. Waits.
  std::vector<float> logits() const { return logits_.download(stream_); }
  std::int32_t token() const { return token_.download(stream_)[0]; }
  /// Where the chosen token lies in device memory, for copies that go along with the stream.
  const std::int32_t* device_token() const { return token_.data(); }
  /// The last chunk's hidden states before the final norm, [max_chunk, hidden_size]. Waits.
  std::vector<float> hidden() const { return chunk_hidden_.download(stream_); }

 private:
  /// Books on their way to the device.
  struct Slot {
    std::unique_ptr<PinnedBytes> memory;
    cudaEvent_t copied = nullptr;
    bool used = false;
  };

  static int most_places(const KindRetentionConfig& c) {
    const std::int64_t apart = c.text_rounds > c.vision_rounds ? c.text_rounds - c.vision_rounds
                                                               : c.vision_rounds - c.text_rounds;
    const std::int64_t places = 4 + apart * c.max_spans;
    if (places > detail::kMaxPlaces)
      throw Error(ErrorCode::kConfig,
                  {"cache configuration does not fit", "CudaKindDecoder", "text_rounds",
                   "as many as vision_rounds, or few more spans", std::to_string(c.text_rounds)});
    return static_cast<int>(places);
  }

  Slot& next_slot() {
    Slot& slot = ring_[static_cast<std::size_t>(turn_++) % ring_.size()];
    if (slot.used) check_cuda(cudaEventSynchronize(slot.copied), "cudaEventSynchronize");
    slot.used = true;
    return slot;
  }
  void send(Slot& slot, std::size_t at, std::size_t bytes) {
    check_cuda(cudaMemcpyAsync(books_.data() + at, slot.memory->data() + at, bytes,
                               cudaMemcpyHostToDevice, stream_),
               "cudaMemcpyAsync");
    check_cuda(cudaEventRecord(slot.copied, stream_), "cudaEventRecord");
  }
  Position3* positions_in(Slot& slot) {
    return reinterpret_cast<Position3*>(slot.memory->data() + at_positions_);
  }

  Slot& append(std::int64_t tokens, const char* where) {
    if (retention_.status(tokens) != CacheStatus::kOk)
      throw Error(ErrorCode::kCapacity, {"the span has no room", where, "tokens",
                                         "what KindRetentionConfig allows for a " +
                                             std::string(to_string(retention_.role())) + " span",
                                         std::to_string(tokens)});
    retention_.append(tokens);
    return next_slot();
  }
  /// Writes the step's list of tiles and sends everything. The tokens are final then: nothing on
  /// the device takes them back.
  void send_books(Slot& slot, std::int64_t tokens) {
    std::byte* const memory = slot.memory->data();
    auto& step = *reinterpret_cast<detail::TileStep*>(memory);
    auto* const slots = reinterpret_cast<std::int32_t*>(memory + at_slots_);
    auto* const raw = reinterpret_cast<std::int32_t*>(memory + at_raw_);
    auto* const tiles = reinterpret_cast<AttentionTile*>(memory + at_tiles_);
    for (std::int64_t t = 0; t < tokens; ++t) {
      slots[t] = static_cast<std::int32_t>(retention_.slot_of_newest(tokens - t));
      raw[t] = static_cast<std::int32_t>(retention_.reply_slot_of_newest(tokens - t));
    }
    const std::int64_t first = retention_.total() - tokens;
    const int count = retention_.rules(rules_);
    step.total = retention_.total();
    step.num_tiles = step.num_places = 0;
    for (int r = 0; r < count; ++r) {
      const SegmentRule& rule = rules_[static_cast<std::size_t>(r)];
      int place = 0;
      while (place < step.num_places && step.shifts[place] != rule.shift) ++place;
      if (place == step.num_places) step.shifts[step.num_places++] = rule.shift;
      for (std::int64_t done = 0; done < rule.count; done += detail::kChunkTile)
        tiles[step.num_tiles++] = {static_cast<std::int32_t>(rule.first_slot + done),
                                   static_cast<std::int32_t>(std::min<std::int64_t>(
                                       detail::kChunkTile, rule.count - done)),
                                   place,
                                   static_cast<std::int32_t>(std::max<std::int64_t>(
                                       rule.first_index + done - first, AttentionTile::kOld))};
    }
    retention_.commit();
    send(slot, 0, at_tiles_ + static_cast<std::size_t>(step.num_tiles) * sizeof(AttentionTile));
    num_tiles_ = step.num_tiles;
  }

  detail::TileAppendParams append_params(std::int64_t layer) {
    const std::byte* const books = books_.data();
    detail::TileAppendParams p{};
    p.fused = fused_.data();
    p.bias = biases_.empty() ? nullptr : biases_[static_cast<std::size_t>(layer)].data();
    p.step = reinterpret_cast<const detail::TileStep*>(books);
    p.positions = reinterpret_cast<const Position3*>(books + at_positions_);
    p.slots = reinterpret_cast<const std::int32_t*>(books + at_slots_);
    p.raw_slots = reinterpret_cast<const std::int32_t*>(books + at_raw_);
    p.keys = reinterpret_cast<std::uint16_t*>(keys_.data() + layer * layer_stride_);
    p.values = reinterpret_cast<std::uint16_t*>(values_.data() + layer * layer_stride_);
    p.raw_keys = raw_keys_.data() + layer * raw_layer_stride_;
    p.head_stride = capacity_ * kHeadDim;
    p.raw_stride = retention_.reply_slots() * kHeadDim;
    return p;
  }
  const AttentionTile* tiles() const {
    return reinterpret_cast<const AttentionTile*>(books_.data() + at_tiles_);
  }

  void norm_rows(const float* x, const float* norm, std::int64_t rows) {
    detail::launch_kernel(
        "rms_norm_kernel", detail::rms_norm_kernel<Element>, dim3(static_cast<unsigned>(rows)),
        detail::kRowThreads, stream_, false, x, norm, static_cast<float>(shape().norm_eps),
        reinterpret_cast<std::uint16_t*>(rounded_.data()), static_cast<int>(shape().hidden_size));
  }

  void run_chunk(std::int64_t length) {
    const CudaDecoderShape& s = shape();
    float* const hidden = chunk_hidden_.data();
    last_chunk_ = length;
    attention_.rotate(append_params(0), length, stream_);
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const CudaLayerWeights<Element>& w = weights_->layers[static_cast<std::size_t>(l)];
      norm_rows(hidden, w.attention_norm.data(), length);
      products_.launch(w.query_key_value.data(), s.fused_size(), s.hidden_size, rounded_.data(),
                       length, fused_.data(), false, stream_);
      attention_.launch(append_params(l), tiles(), false, static_cast<float>(s.sm_scale), length,
                        num_tiles_, rounded_.data(), false, stream_);
      products_.launch(w.output.data(), s.hidden_size, s.query_size(), rounded_.data(), length,
                       hidden, true, stream_);
      norm_rows(hidden, w.feed_forward_norm.data(), length);
      products_.launch(w.gate_up.data(), 2 * s.intermediate_size, s.hidden_size, rounded_.data(),
                       length, gate_up_.data(), false, stream_);
      const std::int64_t elements = length * s.intermediate_size;
      detail::launch_kernel("gated_silu_kernel", detail::gated_silu_kernel<Element>,
                            dim3(static_cast<unsigned>((elements / 2 + detail::kRowThreads - 1) /
                                                       detail::kRowThreads)),
                            detail::kRowThreads, stream_, false, gate_up_.data(),
                            reinterpret_cast<std::uint16_t*>(rounded_.data()), elements);
      products_.launch(w.down.data(), s.hidden_size, s.intermediate_size, rounded_.data(), length,
                       hidden, true, stream_);
    }
  }

  MatrixVectorTask<Element> task(const Element* matrix, std::int64_t rows, std::int64_t cols,
                                 const float* x, const float* norm, float* y) const {
    MatrixVectorTask<Element> result;
    result.matrix = matrix;
    result.rows = rows;
    result.cols = cols;
    result.x = x;
    result.norm = norm;
    result.norm_eps = static_cast<float>(shape().norm_eps);
    result.y = y;
    return result;
  }
  const std::int64_t* total() const { return reinterpret_cast<const std::int64_t*>(books_.data()); }

  /// The logits of a hidden state, the choice, and the chosen token's embedding in hidden_.
  void launch_logits(const float* hidden) {
    const CudaDecoderShape& s = shape();
    MatrixVectorTask<Element> last = task(weights_->output_matrix(), s.vocab_size, s.hidden_size,
                                          hidden, weights_->output_norm.data(), logits_.data());
    last.candidates = candidates_.data();
    last.choice = choice_;
    last.totals = total();
    vector_.launch(last, VectorEpilogue::kChoose, stream_);
    const detail::TokenChoiceParams p{
        .logits = logits_.data(),
        .candidates = candidates_.data(),
        .totals = total(),
        .tokens = token_.data(),
        .history = history_size_ > 0 ? history_.data() : nullptr,
        .embedding = reinterpret_cast<const std::uint16_t*>(weights_->embedding.data()),
        .hidden = hidden_.data(),
        .history_size = history_size_,
        .sequence = 0,
        .seed = choice_.seed,
        .temperature = choice_.temperature,
        .parts = vector_.blocks(),
        .vocab_size = static_cast<int>(s.vocab_size),
        .hidden_size = static_cast<int>(s.hidden_size)};
    detail::launch_kernel("choose_token_kernel", choose_kernel_, dim3(1), detail::kRowThreads,
                          stream_, vector_.overlap(), p);
  }

  void run_step() {
    using enum VectorEpilogue;
    const CudaDecoderShape& s = shape();
    float* const hidden = hidden_.data();
    attention_.rotate(append_params(0), 1, stream_);
    for (std::int64_t l = 0; l < s.num_layers; ++l) {
      const CudaLayerWeights<Element>& w = weights_->layers[static_cast<std::size_t>(l)];
      vector_.launch(task(w.query_key_value.data(), s.fused_size(), s.hidden_size, hidden,
                          w.attention_norm.data(), fused_.data()),
                     kStore, stream_);
      attention_.launch(append_params(l), tiles(), false, static_cast<float>(s.sm_scale), 1,
                        max_tiles_, attended_.data(), true, stream_);
      vector_.launch(
          task(w.output.data(), s.hidden_size, s.query_size(), attended_.data(), nullptr, hidden),
          kAdd, stream_, true);
      vector_.launch(task(w.gate_up.data(), 2 * s.intermediate_size, s.hidden_size, hidden,
                          w.feed_forward_norm.data(), activated_.data()),
                     kGatedSilu, stream_);
      vector_.launch(task(w.down.data(), s.hidden_size, s.intermediate_size, activated_.data(),
                          nullptr, hidden),
                     kAdd, stream_);
    }
    launch_logits(hidden);
  }
  void capture() {
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "begin capture");
    run_step();
    check_cuda(cudaStreamEndCapture(stream_, &graph), "end capture");
    check_cuda(cudaGraphInstantiate(&step_, graph, 0), "cudaGraphInstantiate");
    check_cuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }

  const CudaDecoderWeights<Element>* weights_;
  std::span<const Buffer<float, cuda>> biases_;
  TokenChoice choice_;
  std::int64_t history_size_;
  KindRetention retention_;
  std::int64_t capacity_;
  TileAttentionPlan<Element, kHeadDim> attention_;
  MatrixVectorPlan<Element> vector_;
  MatrixProducts<Element> products_;
  cudaStream_t stream_;
  // What the attribute is set on (backend.cuh).
  void (*choose_kernel_)(detail::TokenChoiceParams) = detail::choose_token_kernel<Element>;
  std::int64_t layer_stride_ = 0;
  std::int64_t raw_layer_stride_ = 0;
  std::int64_t max_tiles_ = 0;
  std::int64_t num_tiles_ = 0;
  std::int64_t last_chunk_ = 0;
  std::size_t at_positions_ = 0;  // bytes, in the books
  std::size_t at_slots_ = 0;
  std::size_t at_raw_ = 0;
  std::size_t at_tiles_ = 0;
  std::size_t at_moves_ = 0;
  std::size_t step_bytes_ = 0;
  Buffer<std::byte, cuda> books_;
  std::array<Slot, 64> ring_;
  std::uint64_t turn_ = 0;
  std::array<SegmentRule, KindRetention::kMaxSegments> rules_;
  std::vector<Position3> positions_;  // of the open vision span
  std::int64_t seen_ = 0;
  cudaGraphExec_t step_ = nullptr;
  bool warm_ = false;
  Buffer<Element, cuda> keys_;    // [layers, kv heads, capacity, head_dim]
  Buffer<Element, cuda> values_;  // the same
  Buffer<float, cuda> raw_keys_;  // [layers, kv heads, reply slots, head_dim], not rotated
  Buffer<float, cuda> chunk_hidden_;
  Buffer<float, cuda> hidden_;
  Buffer<float, cuda> fused_;
  Buffer<Element, cuda> rounded_;
  Buffer<float, cuda> gate_up_;
  Buffer<float, cuda> attended_;
  Buffer<float, cuda> activated_;
  Buffer<float, cuda> logits_;
  Buffer<TokenCandidate, cuda> candidates_;
  Buffer<std::int32_t, cuda> token_;
  Buffer<std::int32_t, cuda> chunk_tokens_;
  Buffer<std::int32_t, cuda> history_;
};

}  // namespace sluice
