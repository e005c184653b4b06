// SPDX-License-Identifier: MIT
/// The decoder of the Llama family over a segment cache: embedding, layers of attention and gated
/// feed-forward, final norm, output projection. The model is immutable and shared; caches and
/// workspaces belong to streams.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sluice/attention/attend.hpp"
#include "sluice/attention/variant.hpp"
#include "sluice/cache/kv_cache.hpp"
#include "sluice/core/config.hpp"
#include "sluice/core/error.hpp"
#include "sluice/core/memory.hpp"
#include "sluice/core/threads.hpp"
#include "sluice/core/token.hpp"
#include "sluice/core/view.hpp"
#include "sluice/model/cache_plan.hpp"
#include "sluice/model/decoder_config.hpp"
#include "sluice/nn/activation.hpp"
#include "sluice/nn/embedding.hpp"
#include "sluice/nn/linear.hpp"
#include "sluice/nn/norm.hpp"
#include "sluice/position/rotary.hpp"

namespace sluice {

/// Weights of one layer. Vectors are float32, empty where the family has none; matrices are views
/// into storage that DecoderWeights::storage keeps alive.
struct DecoderLayerWeights {
  std::vector<float> attention_norm;  ///< [hidden_size]
  WeightMatrix query;                 ///< [num_qo_heads * head_dim, hidden_size]
  WeightMatrix key;                   ///< [num_kv_heads * head_dim, hidden_size]
  WeightMatrix value;                 ///< [num_kv_heads * head_dim, hidden_size]
  WeightMatrix output;                ///< [hidden_size, num_qo_heads * head_dim]
  std::vector<float> query_bias;      ///< Qwen2
  std::vector<float> key_bias;
  std::vector<float> value_bias;
  std::vector<float> output_bias;
  std::vector<float> query_norm;           ///< [head_dim] (Qwen3, Gemma 3)
  std::vector<float> key_norm;             ///< [head_dim]
  std::vector<float> post_attention_norm;  ///< [hidden_size], before the residual sum (Gemma 3)
  std::vector<float> feed_forward_norm;    ///< [hidden_size]
  WeightMatrix gate;                       ///< [intermediate_size, hidden_size]
  WeightMatrix up;                         ///< [intermediate_size, hidden_size]
  WeightMatrix down;                       ///< [hidden_size, intermediate_size]
  std::vector<float> post_feed_forward_norm;  ///< [hidden_size] (Gemma 3)
};

/// All weights of a decoder.
struct DecoderWeights {
  WeightMatrix embedding;  ///< [vocab_size, hidden_size]
  std::vector<DecoderLayerWeights> layers;
  std::vector<float> output_norm;  ///< [hidden_size]
  WeightMatrix output;             ///< [vocab_size, hidden_size]; the embedding where tied
  std::shared_ptr<const void> storage;  ///< keeps the matrices' bytes alive
};

/// Scratch of forward() for one stream, sized for a chunk and a cache; allocated at construction.
class DecoderWorkspace;

/// A model: configuration and weights, immutable after construction. Any number of threads may call
/// forward() with caches and workspaces of their own.
class Decoder {
 public:
  /// \throws Error(kConfig, kShape) naming the tensor whose extents do not fit the configuration.
  Decoder(DecoderConfig config, DecoderWeights weights, const std::string& where = "Decoder")
      : config_(std::move(config)), weights_(std::move(weights)) {
    config_.validate(where);
    for (const RotaryConfig& rotary : config_.rotaries) rotaries_.emplace_back(rotary);
    check_weights(where);
  }
  // Caches keep pointers to the rotations.
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  const DecoderConfig& config() const { return config_; }
  const DecoderWeights& weights() const { return weights_; }
  const Rotary& rotary(std::int64_t layer) const {
    return rotaries_[static_cast<std::size_t>(
        config_.layers[static_cast<std::size_t>(layer)].rotary)];
  }

  KvShape kv_shape() const {
    return {config_.num_layers(), config_.num_kv_heads, config_.head_dim, config_.head_dim};
  }

  /// A cache for one stream of this model. The model must outlive it.
  template <RotaryElement Key, RotaryElement Value = Key>
  KvCache<Key, Value> make_cache(const CachePlan& plan) const {
    std::vector<LayerCacheConfig> layers;
    for (std::int64_t layer = 0; layer < config_.num_layers(); ++layer)
      layers.push_back(
          {plan.retention_of_layer[static_cast<std::size_t>(layer)], &rotary(layer)});
    return KvCache<Key, Value>(kv_shape(), plan.retentions, layers);
  }

  /// Feeds tokens and leaves the hidden states, final norm applied, in the workspace: row t belongs
  /// to tokens[t]. The cache gets the tokens' keys and values, uncommitted: the caller commits or
  /// rolls back. Allocates nothing.
  /// Preconditions: cache.status(tokens.size()) == kOk, tokens in [0, vocab_size), at most the
  /// workspace's chunk.
  template <class Key, class Value>
  void forward(std::span<const Token> tokens, KvCache<Key, Value>& cache,
               DecoderWorkspace& workspace, ThreadTeam& team) const;

  /// Logits of rows [first, first + logits.rows) of the last forward(). logits: [rows, vocab_size].
  void logits(std::int64_t first, MatrixView<float> logits, DecoderWorkspace& workspace,
              ThreadTeam& team) const;

 private:
  void check_weights(const std::string& where) const;

  DecoderConfig config_;
  DecoderWeights weights_;
  std::vector<Rotary> rotaries_;
};

class DecoderWorkspace {
 public:
  /// For chunks of up to `max_tokens` tokens and caches of up to `max_keys` entries.
  DecoderWorkspace(const Decoder& model, std::int64_t max_tokens, std::int64_t max_keys,
                   int team_size)
      : max_tokens_(max_tokens),
        hidden_(buffer(max_tokens, model.config().hidden_size)),
        normed_(buffer(max_tokens, model.config().hidden_size)),
        query_(buffer(max_tokens, model.config().num_qo_heads * model.config().head_dim)),
        key_(buffer(max_tokens, model.config().num_kv_heads * model.config().head_dim)),
        value_(buffer(max_tokens, model.config().num_kv_heads * model.config().head_dim)),
        attended_(buffer(max_tokens, model.config().num_qo_heads * model.config().head_dim)),
        gate_(buffer(max_tokens, model.config().intermediate_size)),
        up_(buffer(max_tokens, model.config().intermediate_size)),
        linear_(widest(model.config()), team_size) {
    const DecoderConfig& config = model.config();
    const AttentionShape shape{.num_qo_heads = config.num_qo_heads,
                               .num_kv_heads = config.num_kv_heads,
                               .head_dim = config.head_dim,
                               .value_dim = config.head_dim,
                               .max_queries = max_tokens,
                               .max_keys = max_keys};
    for (std::size_t r = 0; r < config.rotaries.size(); ++r) {
      const Rotary rotary(config.rotaries[r]);
      attention_.push_back(
          std::make_unique<AttentionWorkspace<cpu>>(&rotary, shape, team_size));
      write_rotation_.emplace_back(rotary, max_tokens);
    }
  }

  std::int64_t max_tokens() const { return max_tokens_; }
  /// Rows of the last forward(), final norm applied. [tokens, hidden_size]
  MatrixView<const float> hidden_states() const {
    const auto width = static_cast<std::int64_t>(normed_.size()) / max_tokens_;
    return {normed_.data(), tokens_, width};
  }

 private:
  friend class Decoder;

  static Buffer<float> buffer(std::int64_t rows, std::int64_t cols) {
    return Buffer<float>(static_cast<std::size_t>(rows * cols));
  }
  static std::int64_t widest(const DecoderConfig& config) {
    return std::max({config.hidden_size, config.intermediate_size,
                     config.num_qo_heads * config.head_dim});
  }

  std::int64_t max_tokens_;
  std::int64_t tokens_ = 0;  // rows of the last forward
  Buffer<float> hidden_;     // [max_tokens, hidden_size], the residual stream
  Buffer<float> normed_;     // [max_tokens, hidden_size]
  Buffer<float> query_;      // [max_tokens, num_qo_heads, head_dim]
  Buffer<float> key_;        // [max_tokens, num_kv_heads, head_dim]
  Buffer<float> value_;      // [max_tokens, num_kv_heads, head_dim]
  Buffer<float> attended_;   // [max_tokens, num_qo_heads, head_dim]
  Buffer<float> gate_;       // [max_tokens, intermediate_size]
  Buffer<float> up_;         // [max_tokens, intermediate_size]
  LinearWorkspace linear_;
  std::vector<std::unique_ptr<AttentionWorkspace<cpu>>> attention_;  // one per rotary
  std::vector<RotaryTable> write_rotation_;                          // one per rotary
};

template <class Key, class Value>
void Decoder::forward(std::span<const Token> tokens, KvCache<Key, Value>& cache,
                      DecoderWorkspace& w, ThreadTeam& team) const {
  const auto count = static_cast<std::int64_t>(tokens.size());
  SLUICE_ASSERT(count >= 1 && count <= w.max_tokens_);
  const DecoderConfig& c = config_;
  const auto eps = static_cast<float>(c.norm_eps);
  const std::int64_t first_index = cache.total();
  cache.append(count);
  w.tokens_ = count;
  for (std::size_t r = 0; r < w.write_rotation_.size(); ++r)
    w.write_rotation_[r].fill_run(static_cast<Position>(first_index), count);

  const MatrixView<float> hidden(w.hidden_.data(), count, c.hidden_size);
  const MatrixView<float> normed(w.normed_.data(), count, c.hidden_size);
  const MatrixView<float> query(w.query_.data(), count, c.num_qo_heads * c.head_dim);
  const MatrixView<float> key(w.key_.data(), count, c.num_kv_heads * c.head_dim);
  const MatrixView<float> value(w.value_.data(), count, c.num_kv_heads * c.head_dim);
  const MatrixView<float> attended(w.attended_.data(), count, c.num_qo_heads * c.head_dim);
  const MatrixView<float> gate(w.gate_.data(), count, c.intermediate_size);
  const MatrixView<float> up(w.up_.data(), count, c.intermediate_size);
  const auto norm = [&](MatrixView<const float> x, const std::vector<float>& weight,
                        MatrixView<float> y) {
    rms_norm(x, weight.data(), eps, y, c.norm_adds_one);
  };
  const auto bias = [](const std::vector<float>& values) {
    return values.empty() ? nullptr : values.data();
  };
  // y += W x, through the family's norm of the branch where it has one.
  const auto add_branch = [&](const WeightMatrix& weight, MatrixView<const float> x,
                              const float* offset, const std::vector<float>& post_norm) {
    if (post_norm.empty()) {
      linear_add(weight, x, offset, hidden, w.linear_, team, cpu{});
      return;
    }
    linear(weight, x, offset, normed, w.linear_, team, cpu{});
    norm(normed, post_norm, normed);
    for (std::int64_t i = 0; i < count * c.hidden_size; ++i) hidden.data[i] += normed.data[i];
  };

  embed(weights_.embedding, tokens, static_cast<float>(c.embedding_scale), hidden);
  for (std::int64_t l = 0; l < c.num_layers(); ++l) {
    const DecoderLayerWeights& layer = weights_.layers[static_cast<std::size_t>(l)];
    const DecoderLayerConfig& layer_config = c.layers[static_cast<std::size_t>(l)];
    const auto rotary_index = static_cast<std::size_t>(layer_config.rotary);

    norm(hidden, layer.attention_norm, normed);
    const std::array<LinearTask, 3> projections{
        LinearTask{layer.query, bias(layer.query_bias), query},
        LinearTask{layer.key, bias(layer.key_bias), key},
        LinearTask{layer.value, bias(layer.value_bias), value}};
    linear_many(projections, normed, w.linear_, team, cpu{});
    if (!layer.query_norm.empty()) {
      norm({query.data, count * c.num_qo_heads, c.head_dim}, layer.query_norm,
           {query.data, count * c.num_qo_heads, c.head_dim});
      norm({key.data, count * c.num_kv_heads, c.head_dim}, layer.key_norm,
           {key.data, count * c.num_kv_heads, c.head_dim});
    }
    const HeadsView<const float> keys(key.data, count, c.num_kv_heads, c.head_dim);
    const HeadsView<const float> values(value.data, count, c.num_kv_heads, c.head_dim);
    const float* rotation = w.write_rotation_[rotary_index].rows();
    if (count == 1)
      cache.store(l, keys, values, rotation, 0, 1);
    else
      team.run([&](int member, int members) {
        const WorkRange share = share_of(count, member, members);
        cache.store(l, keys, values, rotation, share.begin, share.end);
      });

    std::array<Segment<Key, Value>, KvCache<Key, Value>::kMaxSegments> segments;
    const int num_segments = cache.segments(l, count, segments);
    const Retention& retention = cache.retention(l);
    const AttentionVariant<> variant{
        static_cast<float>(c.sm_scale),
        {std::min(retention.window(), layer_config.window_size),
         retention.config().num_sink_tokens}};
    attend(AttentionQuery{{query.data, count, c.num_qo_heads, c.head_dim},
                          first_index,
                          static_cast<Position>(first_index)},
           std::span<const Segment<Key, Value>>(segments.data(),
                                                static_cast<std::size_t>(num_segments)),
           variant, HeadsView<float>(attended.data, count, c.num_qo_heads, c.head_dim), nullptr,
           *w.attention_[rotary_index], team, cpu{});
    add_branch(layer.output, attended, bias(layer.output_bias), layer.post_attention_norm);

    norm(hidden, layer.feed_forward_norm, normed);
    const std::array<LinearTask, 2> expand{LinearTask{layer.gate, nullptr, gate},
                                           LinearTask{layer.up, nullptr, up}};
    linear_many(expand, normed, w.linear_, team, cpu{});
    const std::int64_t elements = count * c.intermediate_size;
    if (count == 1)
      gate_up(c.activation, gate.data, up.data, gate.data, elements);
    else
      team.run([&](int member, int members) {
        const WorkRange share = share_of(elements, member, members, 16);
        gate_up(c.activation, gate.data + share.begin, up.data + share.begin,
                gate.data + share.begin, share.end - share.begin);
      });
    add_branch(layer.down, gate, nullptr, layer.post_feed_forward_norm);
  }
  norm(hidden, weights_.output_norm, normed);
}

inline void Decoder::logits(std::int64_t first, MatrixView<float> logits, DecoderWorkspace& w,
                            ThreadTeam& team) const {
  SLUICE_ASSERT(first >= 0 && first + logits.rows <= w.tokens_);
  linear(weights_.output, w.hidden_states().middle_rows(first, logits.rows), nullptr, logits,
         w.linear_, team, cpu{});
}

inline void Decoder::check_weights(const std::string& where) const {
  const auto fail = [&](const std::string& tensor, const std::string& expected,
                        const std::string& found) {
    throw Error(ErrorCode::kShape,
                {"tensor does not fit the model", where, tensor, expected, found});
  };
  const auto matrix = [&](const std::string& name, const WeightMatrix& m, std::int64_t rows,
                          std::int64_t cols) {
    if (m.rows != rows || m.cols != cols || m.data == nullptr)
      fail(name, "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]",
           "[" + std::to_string(m.rows) + ", " + std::to_string(m.cols) + "]");
    if (cols % block_shape(m.type).values != 0)
      fail(name, "columns in whole blocks of " + std::to_string(block_shape(m.type).values),
           std::to_string(cols));
  };
  const auto vector = [&](const std::string& name, const std::vector<float>& v, std::int64_t size,
                          bool optional) {
    if (!(optional && v.empty()) && static_cast<std::int64_t>(v.size()) != size)
      fail(name, "[" + std::to_string(size) + "]", "[" + std::to_string(v.size()) + "]");
  };
  const DecoderConfig& c = config_;
  const std::int64_t q_size = c.num_qo_heads * c.head_dim;
  const std::int64_t kv_size = c.num_kv_heads * c.head_dim;
  matrix("embedding", weights_.embedding, c.vocab_size, c.hidden_size);
  matrix("output", weights_.output, c.vocab_size, c.hidden_size);
  vector("output_norm", weights_.output_norm, c.hidden_size, false);
  if (weights_.layers.size() != c.layers.size())
    fail("layers", std::to_string(c.layers.size()), std::to_string(weights_.layers.size()));
  for (std::size_t l = 0; l < weights_.layers.size(); ++l) {
    const DecoderLayerWeights& layer = weights_.layers[l];
    const std::string at = "layer " + std::to_string(l) + " ";
    vector(at + "attention_norm", layer.attention_norm, c.hidden_size, false);
    matrix(at + "query", layer.query, q_size, c.hidden_size);
    matrix(at + "key", layer.key, kv_size, c.hidden_size);
    matrix(at + "value", layer.value, kv_size, c.hidden_size);
    matrix(at + "output", layer.output, c.hidden_size, q_size);
    vector(at + "query_bias", layer.query_bias, q_size, true);
    vector(at + "key_bias", layer.key_bias, kv_size, true);
    vector(at + "value_bias", layer.value_bias, kv_size, true);
    vector(at + "output_bias", layer.output_bias, c.hidden_size, true);
    vector(at + "query_norm", layer.query_norm, c.head_dim, true);
    vector(at + "key_norm", layer.key_norm, c.head_dim, true);
    if (layer.query_norm.empty() != layer.key_norm.empty())
      fail(at + "key_norm", "query and key norms together", "one of them");
    vector(at + "post_attention_norm", layer.post_attention_norm, c.hidden_size, true);
    vector(at + "feed_forward_norm", layer.feed_forward_norm, c.hidden_size, false);
    matrix(at + "gate", layer.gate, c.intermediate_size, c.hidden_size);
    matrix(at + "up", layer.up, c.intermediate_size, c.hidden_size);
    matrix(at + "down", layer.down, c.hidden_size, c.intermediate_size);
    vector(at + "post_feed_forward_norm", layer.post_feed_forward_norm, c.hidden_size, true);
    const int rotary = c.layers[l].rotary;
    if (rotary < 0 || rotary >= static_cast<int>(rotaries_.size()))
      fail(at + "rotary", "below " + std::to_string(rotaries_.size()), std::to_string(rotary));
    if (rotaries_[static_cast<std::size_t>(rotary)].head_dim() != c.head_dim)
      fail(at + "rotary", "head_dim " + std::to_string(c.head_dim),
           std::to_string(rotaries_[static_cast<std::size_t>(rotary)].head_dim()));
  }
}

}  // namespace sluice
