// SPDX-License-Identifier: MIT
/// Session and its model on a GPU, for programs that the host compiler compiles: the verbs of
/// stream/session.hpp, so that a program changes from one backend to the other by its tag
/// (stream/backend_traits.hpp). What runs on the device is behind device_session.hpp, which says
/// what to link.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "sluice/attention/draft_tree.hpp"
#include "sluice/backend/cuda/decoder_shape.hpp"
#include "sluice/backend/cuda/device_session.hpp"
#include "sluice/backend/cuda/quantised_layout.hpp"
#include "sluice/backend/cuda/quantised_packing.hpp"
#include "sluice/backend/cuda/tag.hpp"
#include "sluice/cache/element_stream.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/cache/kv_element.hpp"
#include "sluice/cache/retention.hpp"
#include "sluice/cache/segment.hpp"
#include "sluice/core/atomic_file.hpp"
#include "sluice/core/backend.hpp"
#include "sluice/core/byte_stream.hpp"
#include "sluice/core/element.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder.hpp"
#include "sluice/nn/norm.hpp"
#include "sluice/nn/quantised_blocks.hpp"
#include "sluice/nn/weight_matrix.hpp"
#include "sluice/position/rotary.hpp"
#include "sluice/stream/backend_traits.hpp"
#include "sluice/stream/checkpoint_places.hpp"
#include "sluice/stream/clock.hpp"
#include "sluice/stream/metrics.hpp"
#include "sluice/stream/sampler.hpp"
#include "sluice/stream/session.hpp"

namespace sluice {

/// Element types of weights that the GPU multiplies.
template <class T>
concept CudaElement = std::same_as<T, bf16> || std::same_as<T, f16>;

/// Element types of keys and values on the GPU.
template <class T>
concept CudaKvElement = CudaElement<T> || CudaCode<T>;

/// Weights of a session that is told the type of its keys and values alone: that type, where it is
/// one for weights. f16 else, of which a chunk's roundings are an eighth of bf16's; a model that
/// f16 has no room for is refused when it is placed, and takes CudaSession<Element, bf16>.
template <CudaKvElement Element>
using CudaWeightsOf = std::conditional_t<CudaElement<Element>, Element, f16>;

namespace detail {

/// Rows or columns in runs of `unit`, each followed by zeros up to `padded`.
struct ZeroPadding {
  std::int64_t unit;
  std::int64_t padded;

  std::int64_t size(std::int64_t count) const { return count / unit * padded; }
};

/// \throws Error(kUnsupported) for a value that Element has no room for.
template <CudaElement Element>
void check_fits(std::span<const float> values, const char* name) {
  if constexpr (std::same_as<Element, f16>)
    for (const float value : values)
      if (std::isfinite(value) && std::abs(value) >= 65520.0F)  // what rounds to infinity
        throw Error(ErrorCode::kUnsupported,
                    {"a weight does not fit the element type", "CudaModel", name,
                     "below 65520, or bf16 weights", std::to_string(value)});
}
template <CudaElement Element>
void check_fits(const WeightMatrix& matrix, const char* name) {
  if constexpr (std::same_as<Element, f16>) {
    std::vector<float> row(static_cast<std::size_t>(matrix.cols));
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      dequantise(matrix.type, matrix.row(r), matrix.cols, row.data());
      check_fits<Element>(std::span<const float>(row), name);
    }
  }
}

/// A stored matrix of any type, rounded to Element, zeros added. \throws Error(kUnsupported) for a
/// weight that Element has no room for.
template <CudaElement Element>
std::vector<Element> rounded_matrix(const WeightMatrix& matrix, const char* name,
                                    std::optional<ZeroPadding> row_padding = {},
                                    std::optional<ZeroPadding> col_padding = {}) {
  const ZeroPadding in_rows = row_padding.value_or(ZeroPadding{matrix.rows, matrix.rows});
  const ZeroPadding in_cols = col_padding.value_or(ZeroPadding{matrix.cols, matrix.cols});
  const std::int64_t width = in_cols.size(matrix.cols);
  std::vector<Element> result(static_cast<std::size_t>(in_rows.size(matrix.rows) * width),
                              Element(0.0F));
  std::vector<float> row(static_cast<std::size_t>(matrix.cols));
  for (std::int64_t r = 0; r < matrix.rows; ++r) {
    dequantise(matrix.type, matrix.row(r), matrix.cols, row.data());
    Element* to = result.data() + (r / in_rows.unit * in_rows.padded + r % in_rows.unit) * width;
    for (std::int64_t c = 0; c < matrix.cols; c += in_cols.unit, to += in_cols.padded)
      for (std::int64_t i = 0; i < in_cols.unit; ++i)
        to[i] = Element(row[static_cast<std::size_t>(c + i)]);
    check_fits<Element>(std::span<const float>(row), name);
  }
  return result;
}

}  // namespace detail

/// How a CudaModel stores matrices.
enum class CudaWeights : std::uint8_t {
  kStored,   ///< quantised types as the file has them, the others as kElement
  kElement,  ///< all widened or rounded to Element
};

/// A decoder whose weights lie on the GPU. Quantised matrices (Q8_0, Q6_K, Q4_0, Q4_1, Q4_K) keep
/// the levels and scales of the file (quantised_layout.hpp): a step reads those and rounds no
/// weight, a chunk widens them to Element on its way. The rest is bf16 or f16: float32 matrices,
/// rounded; embeddings that are looked up, also where the output projection is the same matrix and
/// quantised; gate and up of two types; attention's matrices where heads of other sizes than the
/// kernels' are padded with zeros, which changes no result and costs their memory and time.
/// Immutable; sessions share it.
template <CudaElement Element>
class CudaModel {
 public:
  /// Copies the weights to a device, on which its sessions then run; the loaded model is kept, its
  /// pages are not read again. \throws Error(kUnsupported) naming what the GPU does not do;
  /// Error(kShape); Error(kDevice) where there is no such device or no memory.
  explicit CudaModel(std::shared_ptr<const Decoder> decoder, int device = kCurrentDevice,
                     CudaWeights weights = CudaWeights::kStored)
      : decoder_(std::move(decoder)), weights_(weights) {
    const DecoderConfig& c = decoder_->config();
    const DecoderWeights& w = decoder_->weights();
    check_supported(*decoder_);
    const std::int64_t head_dim = padded_head_dim(c.head_dim);
    const bool packed_output = is_packed(w.output);
    const bool tied = w.output.data == w.embedding.data && !packed_output;
    const Rotary& rotary = decoder_->rotary(0);
    CudaRotation rotation{.frequencies = {},
                          .attention_factor = rotary.attention_factor(),
                          .interleaved = c.rotaries[0].pairing == RotaryPairing::kInterleaved};
    for (int pair = 0; pair < rotary.num_pairs(); ++pair)
      rotation.frequencies.push_back(rotary.frequency(pair));
    device_ = std::make_unique<CudaDeviceModel<Element>>(
        CudaDecoderShape{c.vocab_size, c.hidden_size, c.intermediate_size, c.num_qo_heads,
                         c.num_kv_heads, head_dim, c.num_layers(), c.norm_eps, c.sm_scale},
        std::move(rotation), tied, device);
    device_->set_embedding(detail::rounded_matrix<Element>(w.embedding, "embedding"));
    if (packed_output) {
      const Packed output = packed({w.output}, "output");
      device_->set_output(output.rows);
    } else if (!tied) {
      device_->set_output(detail::rounded_matrix<Element>(w.output, "output"));
    }
    device_->set_output_norm(w.output_norm);
    for (std::size_t l = 0; l < w.layers.size(); ++l)
      set_layer(static_cast<std::int64_t>(l), w.layers[l], {c.head_dim, head_dim});
  }

  const Decoder& decoder() const { return *decoder_; }
  const CudaDeviceModel<Element>& device() const { return *device_; }
  /// The index of the device that it lies on.
  int device_index() const { return device_->device_index(); }
  /// How matrices are stored.
  CudaWeights weights() const { return weights_; }
  /// Device memory of the weights.
  std::size_t bytes() const { return device_->bytes(); }

  /// \throws Error(kUnsupported) naming what the GPU does not do of this model.
  static void check_supported(const Decoder& decoder) {
    const DecoderConfig& c = decoder.config();
    const DecoderWeights& w = decoder.weights();
    const auto require = [&](bool good, const char* field, const std::string& expected,
                             const std::string& found) {
      if (!good)
        throw Error(ErrorCode::kUnsupported,
                    {"the CUDA backend does not run this model", "CudaModel, family " + c.family,
                     field, expected, found});
    };
    require(c.activation == Activation::kSilu, "activation", "SiLU", "another");
    require(c.embedding_scale == 1, "embedding_scale", "1", std::to_string(c.embedding_scale));
    require(!c.norm_adds_one, "norm_adds_one", "norms' weights as they are", "less 1");
    require(c.rotaries.size() == 1, "rotaries", "one for all layers",
            std::to_string(c.rotaries.size()));
    require(c.head_dim <= largest_head_dim(), "head_dim",
            "at most " + std::to_string(largest_head_dim()), std::to_string(c.head_dim));
    require(c.hidden_size % 8 == 0, "hidden_size", "a multiple of 8",
            std::to_string(c.hidden_size));
    require(c.intermediate_size % 8 == 0, "intermediate_size", "a multiple of 8",
            std::to_string(c.intermediate_size));
    for (std::size_t l = 0; l < w.layers.size(); ++l) {
      const DecoderLayerWeights& layer = w.layers[l];
      const std::string found = "some in layer " + std::to_string(l);
      require(layer.query_bias.empty() && layer.key_bias.empty() && layer.value_bias.empty() &&
                  layer.output_bias.empty(),
              "biases of attention", "none", found);
      require(layer.query_norm.empty() && layer.key_norm.empty(), "norms of queries and keys",
              "none", found);
      require(layer.post_attention_norm.empty() && layer.post_feed_forward_norm.empty(),
              "norms before the residual sums", "none", found);
    }
  }

 private:
  static constexpr std::int64_t largest_head_dim() {
    return *std::max_element(std::begin(CudaDeviceModel<Element>::kHeadDims),
                             std::end(CudaDeviceModel<Element>::kHeadDims));
  }
  static std::int64_t padded_head_dim(std::int64_t head_dim) {
    std::int64_t best = largest_head_dim();
    for (const std::int64_t size : CudaDeviceModel<Element>::kHeadDims)
      if (size >= head_dim) best = std::min(best, size);
    return best;
  }

  /// A matrix as the device has it, and where it lies.
  struct Packed {
    std::vector<std::uint8_t> content;
    CudaPackedRows rows;
  };

  bool is_packed(const WeightMatrix& matrix) const {
    return weights_ == CudaWeights::kStored && is_quantised(matrix.type);
  }
  /// Matrices of one type and shape, their rows in turns. \throws Error(kUnsupported) for a weight
  /// that Element has no room for.
  static Packed packed(std::initializer_list<WeightMatrix> matrices, const char* name) {
    for (const WeightMatrix& matrix : matrices) detail::check_fits<Element>(matrix, name);
    Packed result;
    result.content = pack_quantised({matrices.begin(), matrices.size()});
    result.rows = {matrices.begin()->type,
                   static_cast<std::int64_t>(matrices.size()) * matrices.begin()->rows,
                   result.content};
    return result;
  }

  void set_layer(std::int64_t layer, const DecoderLayerWeights& from,
                 const detail::ZeroPadding& heads) {
    using Matrix = std::vector<Element>;
    const bool whole_heads = heads.unit == heads.padded;
    CudaLayerContent<Element> to;
    to.attention_norm = from.attention_norm;
    to.feed_forward_norm = from.feed_forward_norm;
    Packed packed_query, packed_key, packed_value, packed_output, packed_gate_up, packed_down;
    Matrix query, key, value, output, gate, up, down;
    if (whole_heads && is_packed(from.query) && is_packed(from.key) && is_packed(from.value)) {
      to.packed_query = (packed_query = packed({from.query}, "query")).rows;
      to.packed_key = (packed_key = packed({from.key}, "key")).rows;
      to.packed_value = (packed_value = packed({from.value}, "value")).rows;
    } else {
      to.query = query = detail::rounded_matrix<Element>(from.query, "query", heads);
      to.key = key = detail::rounded_matrix<Element>(from.key, "key", heads);
      to.value = value = detail::rounded_matrix<Element>(from.value, "value", heads);
    }
    if (whole_heads && is_packed(from.output))
      to.packed_output = (packed_output = packed({from.output}, "output of attention")).rows;
    else
      to.output = output =
          detail::rounded_matrix<Element>(from.output, "output of attention", {}, heads);
    if (is_packed(from.gate) && from.up.type == from.gate.type) {
      to.packed_gate_up = (packed_gate_up = packed({from.gate, from.up}, "gate and up")).rows;
    } else {
      to.gate = gate = detail::rounded_matrix<Element>(from.gate, "gate");
      to.up = up = detail::rounded_matrix<Element>(from.up, "up");
    }
    if (is_packed(from.down))
      to.packed_down = (packed_down = packed({from.down}, "down")).rows;
    else
      to.down = down = detail::rounded_matrix<Element>(from.down, "down");
    device_->set_layer(layer, to);
  }

  std::shared_ptr<const Decoder> decoder_;
  CudaWeights weights_;
  std::unique_ptr<CudaDeviceModel<Element>> device_;
};

/// What a GPU session says of its cache.
struct CudaCacheView {
  std::int64_t tokens = 0;
  std::int64_t chunk = 0;
  std::size_t device_bytes = 0;

  /// Tokens so far, evicted ones included.
  std::int64_t total() const { return tokens; }
  std::int64_t max_chunk() const { return chunk; }
  /// Device memory of keys and values, with their scales.
  std::size_t bytes() const { return device_bytes; }
};

/// Session (stream/session.hpp) on a GPU: the same options and verbs, and the same results to
/// rounding. Keys and values are of Element: bf16, f16, or codes, std::int8_t or fp8_e4m3, which
/// are what Session<Element> stores, and take head_dim + 4 bytes a row. Weights that are not
/// quantised are of Weight.
///
/// | verb                                               |                                       |
/// |----------------------------------------------------|---------------------------------------|
/// | accept, accept_scored, step, result, logits, reset | as Session's                          |
/// | step(draft)                                        | as Session's, rounded as chunks are   |
/// | update, checkpoint, rollback_to, holds, release    | as Session's; rows stay on the device |
/// | fork, fork_into                                    | as Session's; scratch is not shared   |
/// | save, restore                                      | Session's files, in both directions   |
///
/// Policies: sinks + window, window, full, with rotated keys; others are Error(kUnsupported).
/// Arithmetic: a step's activations are float32; a chunk of two tokens and more is read as a
/// matrix, for which the inputs of products, quantised weights and rows of codes are rounded to
/// Weight: logits are then within 2^-8 (bf16) or 2^-11 (f16) of their size times the square root of
/// the number of products.
/// The token of the greatest logit is chosen on the device. Otherwise logits come to the host, so
/// that the same sampler draws, with the same seed, as on the CPU.
///
/// Everything is allocated by the constructor, on the device and here. Apart from fork(), save()
/// and restore() only reading and drafts allocate: some bytes (CudaDeviceSession). One thread at a
/// time, any thread; sessions of one model are independent, forks too, and run on its device. The
/// calling thread's current device stays what it was. A verb returns when the device is done, and
/// throws Error(kDevice) when it refuses: the session is then to be thrown away.
template <CudaKvElement Element = f16, CudaElement Weight = CudaWeightsOf<Element>>
class CudaSession {
 public:
  using Model = CudaModel<Weight>;

  /// \throws Error(kConfig) as Session does, Error(kUnsupported) naming the option that the GPU
  /// does not do; Error(kDevice).
  CudaSession(std::shared_ptr<const Model> model, const SessionOptions& options)
      : model_(std::move(model)),
        options_(options),
        retention_(checked(model_->decoder(), options)),
        device_(model_->device(), device_config(retention_.config(), options.checkpoints)),
        sampler_(options.sampler, model_->decoder().config().vocab_size),
        history_(static_cast<std::size_t>(options.history)),
        nll_(static_cast<std::size_t>(retention_.config().max_chunk)),
        written_(static_cast<std::size_t>(retention_.config().max_chunk)),
        depths_(written_.size()),
        ancestors_(written_.size() * ((written_.size() + 63) / 64)) {
    for (int i = 0; i < options.checkpoints; ++i)
      saved_.add({.device_place = i, .cache = retention_, .sampler = sampler_.make_checkpoint()});
    metrics_.set_cache_bytes(static_cast<std::int64_t>(device_.cache_bytes()));
  }
  /// Copies the weights to the current device for this session alone. \throws as above, and what
  /// CudaModel throws.
  CudaSession(std::shared_ptr<const Decoder> model, const SessionOptions& options)
      : CudaSession(placed(std::move(model), options), options) {}

  const Decoder& model() const { return model_->decoder(); }
  const std::shared_ptr<const Model>& device_model() const { return model_; }
  const SessionOptions& options() const { return options_; }
  CudaCacheView cache() const {
    return {device_.total(), retention_.config().max_chunk, device_.cache_bytes()};
  }
  StreamMetrics& metrics() { return metrics_; }
  const StreamMetrics& metrics() const { return metrics_; }
  std::int64_t position() const { return position_; }

  template <std::predicate Stop = detail::NeverStop>
  std::int64_t accept(std::span<const Token> tokens, Stop&& stop = Stop()) {
    check(tokens, 0, device_.total(), pending_ ? 1 : 0);
    return read(
        tokens, false, [](std::size_t, double) {}, stop);
  }
  /// As Session::accept_scored(). Logits are formed on the device: scratch is not written, but
  /// without rows nothing is scored.
  template <class Visit>
  void accept_scored(std::span<const Token> tokens, MatrixView<float> scratch, Visit&& visit) {
    check(tokens, 0, device_.total(), pending_ ? 1 : 0);
    read(tokens, scratch.rows > 0, visit, detail::NeverStop());
  }

  std::int64_t common_prefix(std::span<const Token> tokens) const {
    return detail::common_prefix(
        history_.span().first(static_cast<std::size_t>(std::min(options_.history, position_))),
        tokens);
  }
  template <std::predicate Stop = detail::NeverStop>
  UpdateResult update(std::span<const Token> tokens, Stop&& stop = Stop()) {
    UpdateResult result;
    result.common_prefix = common_prefix(tokens);
    const std::int64_t limit =
        std::min(result.common_prefix, static_cast<std::int64_t>(tokens.size()) - 1);
    const GoBack way = saved_.way_back(limit, retention_.total(), retention_.max_truncate());
    check(tokens, way.kept, way.kept, 0);
    go_back(way);
    if (tokens.empty()) return result;
    sampler_.reset();
    position_ = 0;
    for (const Token token : tokens.first(static_cast<std::size_t>(way.kept))) take(token);
    result.kept = way.kept;
    result.computed = read(
        tokens.subspan(static_cast<std::size_t>(way.kept)), false, [](std::size_t, double) {},
        stop);
    return result;
  }

  bool is_ready() const {
    return has_state_ && (!pending_ || retention_.status(1) == CacheStatus::kOk);
  }
  std::optional<Token> step() {
    if (!is_ready()) return std::nullopt;
    feed_pending();
    const Token token = greedy() ? device_.best() : sampler_.sample(device_.logits());
    write(token);
    return token;
  }
  /// As Session::step(draft). The tree is read as a chunk, so its logits are rounded as those of
  /// chunks.
  std::span<const Token> step(const DraftTree& draft) {
    detail::check_draft(draft, pending_, model().config().vocab_size, "CudaSession::step");
    detail::check_draft_room(draft, retention_.status(draft.size()), retention_.config().max_chunk,
                             "CudaSession::step");
    if (draft.size() == 1) {
      written_[0] = *step();
      return written_.span().first(1);
    }
    retention_.append(draft.size());
    if (draft.is_path())
      device_.read_draft(draft.tokens());
    else
      read_tree(draft);
    std::int64_t accepted = 0;  // nodes
    for (std::int64_t node = 0; node != DraftTree::kNoNode;) {
      // The path moves up, in ascending order; rows stay that lie where they belong.
      if (node != accepted)
        device_.move_slot(retention_.slot_of_newest(draft.size() - node),
                          retention_.slot_of_newest(draft.size() - accepted));
      const Token token =
          greedy() ? device_.draft_best(node) : sampler_.sample(device_.draft_logits(node));
      written_[static_cast<std::size_t>(accepted++)] = token;
      write(token);
      node = draft.child(node, token);
    }
    retention_.truncate(draft.size() - accepted);
    retention_.commit();
    device_.keep_draft(accepted);
    return written_.span().first(static_cast<std::size_t>(accepted));
  }
  std::optional<Token> result() const { return pending_; }
  /// [vocab_size], on the host; valid until the next verb. Precondition: is_ready().
  std::span<const float> logits() {
    feed_pending();
    return device_.logits();
  }
  void reset() {
    device_.set_total(0);
    retention_.reset();
    sampler_.reset();
    metrics_.on_turn_end();
    saved_.expire(0);
    pending_.reset();
    position_ = 0;
    has_state_ = wrote_since_input_ = false;
  }
  void reseed(std::uint64_t seed) { sampler_.reseed(seed); }

  CheckpointId checkpoint() {
    Saved& place = saved_.take();
    device_.capture(place.device_place, kept_slots(retention_));
    place.cache = retention_;
    sampler_.capture(place.sampler);
    place.position = position_;
    place.pending = pending_;
    place.has_state = has_state_;
    place.wrote_since_input = wrote_since_input_;
    return {place.serial};
  }
  void rollback_to(CheckpointId id) {
    const Saved& place = saved_.go_back(id);
    revert_cache(place);
    sampler_.revert(place.sampler);
    position_ = place.position;
    pending_ = place.pending;
    if (pending_) remember_at(position_ - 1, *pending_);  // another may have been there since
    has_state_ = place.has_state;
    wrote_since_input_ = place.wrote_since_input;
  }
  bool holds(CheckpointId id) const { return saved_.holds(id); }
  void release(CheckpointId id) { saved_.release(id); }
  /// As Session::checkpoint_bytes(): nearly all of it device memory.
  std::size_t checkpoint_bytes() const {
    if (saved_.empty()) return 0;
    return sizeof(Saved) + saved_.front().sampler.bytes() + device_.place_bytes();
  }

  /// As Session::fork(). Allocates all that a session has on the device. \throws Error(kDevice).
  CudaSession fork() const {
    CudaSession child(model_, options_);
    fork_into(child);
    return child;
  }
  /// As Session::fork_into(): `child` is over the same model, with the same options.
  void fork_into(CudaSession& child) const {
    if (child.model_ != model_ ||
        detail::session_identity(child.model(), child.options_) !=
            detail::session_identity(model(), options_) ||
        child.history_.size() != history_.size())
      throw Error(ErrorCode::kConfig,
                  {"a fork continues a session that was made alike", "CudaSession::fork_into",
                   "options", "those of the session", ""});
    child.reset();
    child.device_.copy_from(device_, retention_.stored_slots());
    child.retention_ = retention_;
    child.sampler_.copy_from(sampler_);
    std::copy_n(history_.data(), std::min(options_.history, position_), child.history_.data());
    child.position_ = position_;
    child.pending_ = pending_;
    child.has_state_ = has_state_;
    child.wrote_since_input_ = wrote_since_input_;
  }

  /// Session's snapshot, which a Session with the same options and elements restores as well.
  /// Behind it lies what its hidden state was before the final norm, for the same bits on a GPU.
  /// \throws Error(kIo, kDevice).
  void save(const std::string& path) {
    feed_pending();
    ByteWriter writer;
    detail::write_snapshot_begin(writer, model(), options_);
    writer.write(static_cast<std::uint8_t>(has_state_));
    writer.write(position_);
    writer.write(static_cast<std::uint8_t>(wrote_since_input_));
    sampler_.save(writer);
    save_cache(writer);
    writer.write_span(std::span<const Token>());  // of a recomputed window
    writer.write_span(
        history_.span().first(static_cast<std::size_t>(std::min(options_.history, position_))));
    const DecoderConfig& c = model().config();
    std::vector<float> residual(static_cast<std::size_t>(c.hidden_size));
    const bool normed = device_.hidden(residual);
    std::vector<float> hidden = residual;
    if (!normed)
      rms_norm({residual.data(), 1, c.hidden_size}, model().weights().output_norm.data(),
               static_cast<float>(c.norm_eps), {hidden.data(), 1, c.hidden_size});
    writer.write_span(std::span<const float>(hidden));
    if (!normed) writer.write_span(std::span<const float>(residual));
    writer.write_checksum();
    write_file_atomically(path, writer.bytes());
  }
  /// As Session::restore(), from a file of either's: one of this class continues bit for bit, one
  /// of Session's to rounding.
  void restore(const std::string& path) {
    const std::vector<std::byte> bytes = read_file(path);
    ByteReader reader(bytes, path);
    reader.verify_checksum();
    detail::expect_snapshot_begin(reader, model(), options_);
    try {
      reset();
      const bool has_state = reader.read<std::uint8_t>("has_state") != 0;
      const std::size_t at_position = reader.offset();
      const auto position = reader.read<std::int64_t>("position");
      const bool wrote = reader.read<std::uint8_t>("wrote") != 0;
      sampler_.restore(reader);
      restore_cache(reader);
      if (position != retention_.total())
        reader.fail_at(at_position, "inconsistent snapshot", "position",
                       std::to_string(retention_.total()), std::to_string(position));
      reader.read_expected<std::uint64_t>("window tokens", 0);
      const DecoderConfig& c = model().config();
      detail::read_history(reader, c.vocab_size, position, history_);
      std::vector<float> hidden(static_cast<std::size_t>(c.hidden_size));
      reader.read_span<float>("hidden state", std::span(hidden));
      const bool normed = reader.remaining() == 0;
      if (!normed) reader.read_span<float>("residual state", std::span(hidden));
      reader.expect_end();
      device_.set_total(position);
      device_.set_hidden(hidden, normed);
      has_state_ = has_state;
      position_ = position;
      wrote_since_input_ = wrote;
    } catch (...) {
      reset();
      throw;
    }
  }

 private:
  static constexpr std::int64_t kLikelihoodRows = 32;  // of logits, formed at once

  /// A checkpoint's place.
  struct Saved {
    std::uint64_t serial = 0;  // 0: free
    int device_place = 0;
    Retention cache;
    Sampler::Checkpoint sampler;
    std::int64_t position = 0;
    std::optional<Token> pending{};
    bool has_state = false;
    bool wrote_since_input = false;

    /// Tokens in the cache.
    std::int64_t fed() const { return cache.total(); }
  };
  using GoBack = detail::WayBack<Saved>;

  static std::shared_ptr<const Model> placed(std::shared_ptr<const Decoder> model,
                                             const SessionOptions& options) {
    Model::check_supported(*model);
    static_cast<void>(checked(*model, options));  // before anything is copied
    return std::make_shared<const Model>(std::move(model));
  }

  /// The retention of all layers.
  static RetentionConfig checked(const Decoder& model, const SessionOptions& options) {
    const CacheOptions& cache = options.cache;
    const auto require = [](bool good, const char* field, const std::string& expected,
                            const std::string& found) {
      if (!good)
        throw Error(ErrorCode::kUnsupported, {"the CUDA backend does not do this", "SessionOptions",
                                              field, expected, found});
    };
    require(cache.policy == CachePolicy::kSinkWindow || cache.policy == CachePolicy::kWindow ||
                cache.policy == CachePolicy::kFull,
            "cache.policy", "sink-window, window or full", std::string(to_string(cache.policy)));
    require(cache.key_form == KeyForm::kRotated, "cache.key_form", "rotated", "raw");
    require(cache.lead == 0, "cache.lead", "0", std::to_string(cache.lead));
    require(options.activations == Activations::kFloat32, "activations",
            std::string(to_string(Activations::kFloat32)),
            std::string(to_string(options.activations)));
    static_cast<void>(detail::checked_session(options));
    options.sampler.validate();
    const CachePlan plan = plan_cache(model.config(), cache);
    require(
        plan.retentions.size() == 1, "cache.window_size",
        "at most the windows that layers were trained with",
        cache.policy == CachePolicy::kFull ? "a full cache" : std::to_string(cache.window_size));
    return plan.retentions.front();
  }
  static CudaDeviceSessionConfig device_config(const RetentionConfig& r, int checkpoints) {
    return {.num_sink_tokens = r.num_sink_tokens,
            .window_size = r.window_size,
            .capacity = r.capacity,
            .max_chunk = r.max_chunk,
            .position_rule = r.position_rule,
            .origin = r.origin,
            .likelihood_rows = std::min(kLikelihoodRows, r.max_chunk),
            .places = checkpoints,
            .place_slots = Retention(r).only_appends() ? 0 : r.capacity};
  }

  bool greedy() const {
    return options_.sampler.temperature == 0 && options_.sampler.repetition_penalty == 1;
  }

  void check(std::span<const Token> tokens, std::int64_t first, std::int64_t fed,
             std::int64_t pending) const {
    detail::check_vocabulary(tokens, model().config().vocab_size, "CudaSession::accept");
    if (options_.cache.is_bounded())
      detail::check_room(static_cast<std::int64_t>(tokens.size()) - first + pending,
                         retention_.config().capacity - fed, "CudaSession::accept");
  }

  template <class Visit, class Stop>
  std::int64_t read(std::span<const Token> tokens, bool scored, Visit&& visit, Stop&& stop) {
    if (tokens.empty()) return 0;
    const std::int64_t begin = monotonic_ns();
    if (wrote_since_input_) metrics_.on_turn_end();
    wrote_since_input_ = false;
    metrics_.on_input(begin, 0);
    feed_pending();
    std::size_t done = 0;
    while (done < tokens.size() && (done == 0 || !stop())) {
      const std::size_t count =
          std::min(tokens.size() - done, static_cast<std::size_t>(retention_.config().max_chunk));
      const std::span<const Token> chunk = tokens.subspan(done, count);
      if (scored && has_state_) visit(done, device_.likelihood(chunk[0]));
      retention_.append(static_cast<std::int64_t>(count));
      device_.read(chunk);
      retention_.commit();
      has_state_ = true;
      if (scored && count > 1) {
        const std::span<float> nll = nll_.span().first(count - 1);
        device_.likelihoods(chunk.subspan(1), nll);
        for (std::size_t i = 0; i < nll.size(); ++i)
          visit(done + i + 1, static_cast<double>(nll[i]));
      }
      for (const Token token : chunk) take(token);
      metrics_.on_input(begin, static_cast<std::int64_t>(count));
      done += count;
      if (options_.checkpoint_every > 0 && position_ - saved_.newest() >= options_.checkpoint_every)
        checkpoint();
    }
    metrics_.on_input_done(monotonic_ns() - begin, static_cast<std::int64_t>(done));
    return static_cast<std::int64_t>(done);
  }

  /// Slots that a checkpoint copies: those of windows. What only appends stays in place.
  static std::int64_t kept_slots(const Retention& retention) {
    return retention.only_appends() ? 0 : retention.stored_slots();
  }
  void revert_cache(const Saved& place) {
    device_.revert(place.device_place, kept_slots(place.cache), place.cache.total());
    retention_ = place.cache;
  }
  void go_back(const GoBack& way) {
    if (way.kept == 0) {
      reset();
      return;
    }
    if (way.from != nullptr) revert_cache(*way.from);
    retention_.truncate(retention_.total() - way.kept);
    device_.set_total(way.kept);
    saved_.expire(way.kept);
    pending_.reset();
  }

  void feed_pending() {
    if (!pending_) return;
    retention_.append(1);
    device_.step(*pending_);
    retention_.commit();
    pending_.reset();
  }
  /// The stream has one token more.
  void take(Token token) {
    sampler_.accept(token);
    remember_at(position_++, token);
  }
  void remember_at(std::int64_t index, Token token) {
    if (index < options_.history) history_[static_cast<std::size_t>(index)] = token;
  }
  /// Takes a sampled token into the stream; it is fed when something follows.
  void write(Token token) {
    take(token);
    pending_ = token;
    wrote_since_input_ = true;
    metrics_.on_output(monotonic_ns());
  }

  void read_tree(const DraftTree& draft) {
    const std::size_t words = ancestors_.size() / depths_.size();
    for (std::int64_t node = 0; node < draft.size(); ++node) {
      const auto at = static_cast<std::size_t>(node);
      depths_[at] = static_cast<std::int32_t>(draft.depth(node));
      std::uint64_t* const row = ancestors_.data() + at * words;
      if (node == 0)
        std::fill_n(row, words, std::uint64_t{0});
      else
        std::copy_n(ancestors_.data() + static_cast<std::size_t>(draft.parent(node)) * words, words,
                    row);
      row[at / 64] |= std::uint64_t{1} << (at % 64);
    }
    const auto count = static_cast<std::size_t>(draft.size());
    device_.read_draft(draft.tokens(), depths_.span().first(count),
                       ancestors_.span().first(count * words));
  }

  KvShape cache_shape() const {
    const DecoderConfig& c = model().config();
    return {c.num_layers(), c.num_kv_heads, c.head_dim, c.head_dim};
  }
  /// The rows of a layer's stored slots, on the host.
  struct LayerRows {
    std::vector<Element> keys;        // [num_kv_heads, slots, padded head_dim]
    std::vector<Element> values;      // the same
    std::vector<float> key_scales;    // [num_kv_heads, slots], of codes
    std::vector<float> value_scales;  // the same

    CudaCacheRows<Element> view() { return {keys, values, key_scales, value_scales}; }
  };
  /// Calls visit(part) for the parts of each stored row, as KvCache has them in order: spans of a
  /// key's elements and scales, and of a value's. load(layer, slots, rows) comes before a layer's,
  /// done(layer, slots, rows) behind them.
  template <class Load, class Visit, class Done>
  void each_row(Load&& load, Visit&& visit, Done&& done) const {
    const KvShape shape = cache_shape();
    const std::int64_t slots = retention_.stored_slots();
    const std::int64_t padded = model_->device().shape().head_dim;
    const auto count = static_cast<std::size_t>(shape.num_kv_heads * slots);
    LayerRows rows;
    rows.keys.assign(count * static_cast<std::size_t>(padded), Element(0.0F));
    rows.values = rows.keys;
    rows.key_scales.resize(CudaCode<Element> ? count : 0);
    rows.value_scales = rows.key_scales;
    for (std::int64_t layer = 0; layer < shape.num_layers; ++layer) {
      load(layer, slots, rows.view());
      for (std::int64_t slot = 0; slot < slots; ++slot)
        for (std::int64_t head = 0; head < shape.num_kv_heads; ++head) {
          const auto row = static_cast<std::size_t>(head * slots + slot);
          const auto part = [&](std::vector<Element>& elements, std::vector<float>& scales) {
            visit(std::span(elements).subspan(row * static_cast<std::size_t>(padded),
                                              static_cast<std::size_t>(shape.head_dim)));
            if constexpr (CudaCode<Element>) visit(std::span(scales).subspan(row, 1));
          };
          part(rows.keys, rows.key_scales);
          part(rows.values, rows.value_scales);
        }
      done(layer, slots, rows.view());
    }
  }
  /// What KvCache::save() writes of a cache with one retention.
  void save_cache(ByteWriter& writer) const {
    const KvShape shape = cache_shape();
    detail::write_shape<Element, Element>(writer, shape);
    retention_.save(writer);
    for (std::int64_t i = 0; i < shape.num_layers * shape.num_kv_heads; ++i)
      writer.write<std::int32_t>(0);  // the retention of a head
    each_row(
        [&](std::int64_t layer, std::int64_t slots, const CudaCacheRows<Element>& rows) {
          device_.download(layer, slots, rows);
        },
        [&]<class T>(std::span<T> part) { detail::put_elements(writer, std::span<const T>(part)); },
        [](auto&&...) {});
  }
  /// What KvCache::restore() reads. \throws as that.
  void restore_cache(ByteReader& reader) {
    const KvShape shape = cache_shape();
    detail::expect_shape<Element, Element>(reader, shape);
    retention_.restore(reader);
    for (std::int64_t i = 0; i < shape.num_layers * shape.num_kv_heads; ++i)
      reader.read_expected<std::int32_t>("retention of a head", 0);
    each_row([](auto&&...) {}, [&](auto part) { detail::get_elements(reader, part); },
             [&](std::int64_t layer, std::int64_t slots, const CudaCacheRows<Element>& rows) {
               device_.upload(layer, slots, rows);
             });
  }

  std::shared_ptr<const Model> model_;
  SessionOptions options_;
  Retention retention_;  // of all layers and heads: which slots on the device hold what
  CudaDeviceSession<Weight, Element> device_;
  Sampler sampler_;
  StreamMetrics metrics_;
  Buffer<Token> history_;            // [SessionOptions::history], the stream's first tokens
  Buffer<float> nll_;                // [chunk]
  Buffer<Token> written_;            // [chunk], by step(draft)
  Buffer<std::int32_t> depths_;      // [chunk], of a draft's nodes
  Buffer<std::uint64_t> ancestors_;  // [chunk, ceil(chunk / 64)], bit by node
  detail::CheckpointPlaces<Saved> saved_{"CudaSession"};
  std::int64_t position_ = 0;
  std::optional<Token> pending_;  // written, not yet fed
  bool has_state_ = false;        // something was fed
  bool wrote_since_input_ = false;
};

template <>
struct backend_traits<cuda> {
  static constexpr std::string_view kName = "cuda";
  template <class Element>
  static constexpr bool kStores = CudaKvElement<Element>;

  template <KvElement Element>
  using Model = CudaModel<CudaWeightsOf<Element>>;
  template <KvElement Element>
  using Session = CudaSession<Element>;

  static void require_device(int device = kCurrentDevice) {
    CudaDeviceModel<bf16>::require_device(device);
  }
  template <KvElement Element>
  static std::shared_ptr<const Model<Element>> place(std::shared_ptr<const Decoder> model,
                                                     int device = kCurrentDevice) {
    return std::make_shared<const Model<Element>>(std::move(model), device);
  }
};

}  // namespace sluice
