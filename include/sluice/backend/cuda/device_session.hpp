// SPDX-License-Identifier: MIT
/// The device's half of a session, as the host compiler sees it: weights and one stream behind a
/// wall, so that a program is compiled by the host compiler as ever and by nvcc only this half.
///
/// The functions are defined in device_session.cuh. A program that uses them links the CMake target
/// sluice::cuda_session, or compiles one .cu file with
///
///     #include <sluice/backend/cuda/device_session.cuh>
///     template class sluice::CudaDeviceModel<sluice::bf16>;
///     template class sluice::CudaDeviceSession<sluice::bf16>;
///
/// (f16 likewise; CudaDeviceSession<f16, std::int8_t> for a cache of another type), and links
/// cublasLt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "sluice/backend/cuda/decoder_shape.hpp"
#include "sluice/backend/cuda/quantised_layout.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/token.hpp"
#include "sluice/position/position.hpp"

namespace sluice {

/// How a model's heads are rotated.
struct CudaRotation {
  std::vector<double> frequencies;  ///< [pairs], radians per token: Rotary::frequency()
  double attention_factor = 1;      ///< Rotary::attention_factor()
  bool interleaved = false;         ///< pairs (2i, 2i + 1) instead of (i, i + pairs)
};

/// Weights of one layer on the host. Matrices are [out, in], with the shape's extents.
template <class Element>
struct CudaLayerContent {
  std::span<const float> attention_norm;
  std::span<const Element> query;
  std::span<const Element> key;
  std::span<const Element> value;
  std::span<const Element> output;
  std::span<const float> feed_forward_norm;
  std::span<const Element> gate;
  std::span<const Element> up;
  std::span<const Element> down;

  // Quantised matrices (quantised_packing.hpp), in place of those above, which are empty then:
  // query, key and value all three; gate and up as one, with their rows in turns.
  CudaPackedRows packed_query;
  CudaPackedRows packed_key;
  CudaPackedRows packed_value;
  CudaPackedRows packed_output;
  CudaPackedRows packed_gate_up;
  CudaPackedRows packed_down;
};

/// A model's weights in device memory, for any number of sessions. Element: bf16 or f16. Setters
/// copy and wait.
template <class Element>
class CudaDeviceModel {
 public:
  /// Head sizes for which there are kernels here; others are padded with zeros by the caller.
  static constexpr std::int64_t kHeadDims[] = {64, 128};

  /// \throws Error(kDevice) saying what was found, unless that is a GPU that this backend can use.
  static void require_device(int device = kCurrentDevice);

  /// tied: the output projection is the embedding, in Element. device: on which it and its sessions
  /// live. Matrices get their memory when they are set: all are, before there is a session.
  /// \throws Error(kShape) naming the extent that does not fit; Error(kDevice).
  CudaDeviceModel(const CudaDecoderShape& shape, CudaRotation rotation, bool tied,
                  int device = kCurrentDevice);
  ~CudaDeviceModel();
  CudaDeviceModel(const CudaDeviceModel&) = delete;
  CudaDeviceModel& operator=(const CudaDeviceModel&) = delete;

  /// [vocab_size, hidden_size]. \throws Error(kShape, kDevice), as all setters.
  void set_embedding(std::span<const Element> embedding);
  /// [vocab_size, hidden_size]; not called where tied.
  void set_output(std::span<const Element> output);
  void set_output(const CudaPackedRows& output);
  void set_output_norm(std::span<const float> norm);
  void set_layer(std::int64_t layer, const CudaLayerContent<Element>& content);

  const CudaDecoderShape& shape() const;
  const CudaRotation& rotation() const;
  /// The index of its device, from 0.
  int device_index() const;
  /// Device memory of the weights.
  std::size_t bytes() const;

  struct Content;  ///< what lies on the device; device_session.cuh
  const Content& content() const { return *content_; }

 private:
  std::unique_ptr<Content> content_;
};

/// What a stream on the device keeps. The first five are RetentionConfig's (kPerQuery, kRotated).
struct CudaDeviceSessionConfig {
  std::int64_t num_sink_tokens = 0;
  std::int64_t window_size = 0;
  std::int64_t capacity = 0;
  std::int64_t max_chunk = 1;
  PositionRule position_rule = PositionRule::kInCache;
  Position origin = 0;
  /// Rows of logits that likelihoods() and drafts form at once.
  std::int64_t likelihood_rows = 1;
  int places = 0;                ///< moments that capture() can keep
  std::int64_t place_slots = 0;  ///< slots that each has room for
};

/// Rows of the first slots of a layer, on the host. Scales are empty where rows have none.
template <class Cache>
struct CudaCacheRows {
  std::span<Cache> keys;          ///< [num_kv_heads, slots, head_dim], rotated
  std::span<Cache> values;        ///< [num_kv_heads, slots, head_dim]
  std::span<float> key_scales;    ///< [num_kv_heads, slots]
  std::span<float> value_scales;  ///< [num_kv_heads, slots]
};

/// One stream: its cache, its counters, and a step that was captured once and is replayed for ever.
/// It lives on the model's device, and the model must outlive it. One thread at a time, any thread,
/// whose current device stays what it was. Functions wait for the device where nothing else is
/// said.
///
/// Element is the model's; Cache, of keys and values: Element, or std::int8_t or fp8_e4m3, codes
/// with a scale for each row (cache/kv_element.hpp).
///
/// Slots lie as RetentionConfig says, so that a Retention on the host tells which hold what: those
/// in use are always the first ones.
///
/// Only construction allocates, but for read() and drafts: some bytes on the host, and what
/// cuBLASLt needs for a length that it has not seen. All \throw Error(kDevice) when the device
/// refuses.
template <class Element, class Cache = Element>
class CudaDeviceSession {
 public:
  /// \throws Error(kConfig, kShape) for extents that do not fit; Error(kDevice).
  CudaDeviceSession(const CudaDeviceModel<Element>& model, const CudaDeviceSessionConfig& config);
  ~CudaDeviceSession();
  CudaDeviceSession(CudaDeviceSession&& other) noexcept;
  CudaDeviceSession& operator=(CudaDeviceSession&& other) noexcept;

  /// Tokens in the cache so far, evicted ones included.
  std::int64_t total() const;
  /// Goes on behind the first `total` tokens. Precondition: their rows are still in the cache.
  void set_total(std::int64_t total);

  /// Reads a chunk, as a matrix: inputs of products are rounded to Element.
  /// Preconditions: 1 to max_chunk tokens of the vocabulary, room in a full cache.
  void read(std::span<const Token> tokens);
  /// Reads one token, activations in float32. Preconditions: as read().
  void step(Token token);

  /// The token of the greatest logit behind the last token read, of equals the first.
  Token best();
  /// Logits behind the last token read. [vocab_size], page-locked; valid until the next read.
  std::span<const float> logits();
  /// -ln softmax(logits)[next] behind the last token read, in nats.
  double likelihood(Token next);
  /// The same for the first tokens of the chunk that read() was given last: nll[i] belongs to
  /// next[i], behind token i of the chunk. Preconditions: as many as next, fewer than the chunk.
  void likelihoods(std::span<const Token> next, std::span<float> nll);

  /// Reads a chunk without counting it yet: keep_draft() does. depths: [tokens], of the nodes of a
  /// tree, parents before their children; empty: a path. ancestors: [tokens, ceil(max_chunk / 64)],
  /// bit by node, its own included; empty with depths. Preconditions: as read(), at least two
  /// tokens.
  void read_draft(std::span<const Token> tokens, std::span<const std::int32_t> depths = {},
                  std::span<const std::uint64_t> ancestors = {});
  /// The token of the greatest logit behind token i of the draft, of equals the first.
  Token draft_best(std::int64_t i);
  /// Logits behind token i of the draft, the last product's inputs rounded. [vocab_size],
  /// page-locked; valid until the next call.
  std::span<const float> draft_logits(std::int64_t i);
  /// Copies what a slot holds to another, in all layers: a node to where it follows its parent. The
  /// one function that waits for nothing: keep_draft() follows.
  void move_slot(std::int64_t from, std::int64_t to);
  /// Counts the first `tokens` of the draft; the others were never there. What is said of the last
  /// token read holds again after the next read() or step(). Preconditions: one at least, and no
  /// row that a later token sees lay where the others were put.
  void keep_draft(std::int64_t tokens);

  /// Keeps the state behind the last token, and the first `slots` slots, in a place.
  /// Preconditions: place < places, slots <= place_slots.
  void capture(int place, std::int64_t slots);
  /// Goes back to a place that was captured with as many slots. Logits are formed anew when they
  /// are asked for, to the bit. Preconditions: the slots beyond are those of then, as far as later
  /// tokens see them.
  void revert(int place, std::int64_t slots, std::int64_t total);
  /// Device memory of a place.
  std::size_t place_bytes() const;
  /// Becomes a copy of another stream of the same model and extents, of which the first `slots`
  /// slots are in use. Nobody may use the other meanwhile.
  void copy_from(const CudaDeviceSession& other, std::int64_t slots);

  /// Copies the first `slots` slots of a layer to the host, or from there. Precondition: `rows` has
  /// what slots have.
  void download(std::int64_t layer, std::int64_t slots, const CudaCacheRows<Cache>& rows) const;
  void upload(std::int64_t layer, std::int64_t slots, const CudaCacheRows<Cache>& rows);
  /// The state behind the last token read. to: [hidden_size]. Returns whether the final norm has
  /// been applied to it, as set_hidden() said: otherwise it is the residual stream.
  bool hidden(std::span<float> to) const;
  /// Goes on from such a state: logits are formed from it when they are asked for.
  void set_hidden(std::span<const float> hidden, bool normed);

  /// Device memory of keys and values, with their scales.
  std::size_t cache_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

extern template class CudaDeviceModel<bf16>;
extern template class CudaDeviceModel<f16>;
extern template class CudaDeviceSession<bf16>;
extern template class CudaDeviceSession<f16>;
extern template class CudaDeviceSession<f16, std::int8_t>;
extern template class CudaDeviceSession<f16, fp8_e4m3>;

}  // namespace sluice
